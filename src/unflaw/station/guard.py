"""What every request passes before it is looked at: who asks, from where, and how much it sends."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from unflaw.station.metrics import Metrics

_OPEN = ("", "/", "/health")  # without a token: the page holds no data, and balancers ask for health
_PAGE = "/page/"
_METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT")
_FRAMING = 64 * 2**10  # bytes of a multipart form around the image
_DRAIN = 10.0  # seconds in which the rest of a refused request is read and dropped
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; media-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """Refuses what may not come in, and puts headers on what goes out.

    With a token, requests must carry it as `Authorization: Bearer …`. Without, only this machine can reach the station;
    then what a browser sends on behalf of other sites is refused, by the names in `Host` and `Origin`. A request
    without `Host` gets only what needs no token either.

    HEAD is answered as GET is, without the body.

    Args:
        max_bytes: Of a body, besides the framing of a form.
        root_path: Prefix under which a proxy publishes the station; paths may have or lack it.
    """

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, max_bytes: int, token: str | None, root_path: str = ""
    ) -> None:
        self._app, self._metrics, self._root_path = app, metrics, root_path
        self._token = None if token is None else token.encode()
        self._max_bytes = max_bytes + _FRAMING

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        root, path, asked = self._root_path, scope["path"], scope["method"]
        if path == root or path.startswith(f"{root}/"):
            path = path[len(root) :]
        # ASGI wants the prefix in the path; and a HEAD is a GET of which only the head is sent
        scope = {**scope, "root_path": root, "path": root + path, "method": "GET" if asked == "HEAD" else asked}
        read, more = 0, True

        async def limited() -> Message:
            nonlocal read, more
            message = await receive()
            read += len(message.get("body", b""))
            more = message.get("more_body", False)
            if read > self._max_bytes and message["type"] == "http.request":
                raise HTTPException(413, f"the request is larger than {self._max_bytes:,} bytes; send a smaller image")
            return message

        async def finish(message: Message) -> None:
            if message["type"] == "http.response.start":
                if message["status"] >= 400 and more and read <= self._max_bytes:
                    await _drain(receive, self._max_bytes)
                out = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    out.setdefault(name, value)
                # the page is looked up anew after an update, and no proxy keeps what the API says
                out.setdefault("cache-control", "no-cache" if path.startswith(_PAGE) else "no-store")
                if "GET" in (allowed := out.get("allow", "").split(", ")) and "HEAD" not in allowed:
                    out["allow"] = ", ".join([*allowed, "HEAD"])
                route = getattr(scope.get("route"), "path", "other")
                method = asked if asked in _METHODS else "other"
                self._metrics.answers.labels(method, route, message["status"]).inc()
            elif asked == "HEAD" and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        refusal = self._refuse(scope["method"], path, headers)
        await (refusal or self._app)(scope, limited, finish)

    def _refuse(self, method: str, path: str, headers: Headers) -> JSONResponse | None:
        is_open = path in _OPEN or path.startswith(_PAGE)
        if self._token is None and "host" not in headers:
            # No browser sends that, but a proxy may that leaves the line out of what a browser sent: no data, then.
            if not is_open:
                return _problem(403, "a request without a Host line gets page and health only; send Host: localhost")
        elif self._token is None:
            if not is_loopback(_split(f"//{headers['host']}").hostname or ""):
                return _problem(403, "without a token the station only answers to localhost; start it with a token")
            origin = headers.get("origin")
            if method not in ("GET", "OPTIONS") and origin and not self._own(origin, headers):
                return _problem(403, f"{origin} may not use this station; start it with --cors {origin} and a token")
        elif not is_open:
            kind, _, given = headers.get("authorization", "").partition(" ")
            # compared in bytes: text with other letters than ASCII cannot be compared in constant time
            if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._token):
                refused = _problem(401, "this station needs its token: Authorization: Bearer …")
                refused.headers["www-authenticate"] = "Bearer"
                return refused
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_bytes:
            return _problem(413, f"the request is larger than {self._max_bytes:,} bytes; send a smaller image")
        return None

    @staticmethod
    def _own(origin: str, headers: Headers) -> bool:
        return _split(origin).netloc == headers.get("host")


def _split(url: str) -> SplitResult:
    """As `urlsplit`; of what is no URL, nothing."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def _problem(status: int, detail: str) -> JSONResponse:
    return JSONResponse({"detail": detail}, status)


async def _drain(receive: Receive, limit: int) -> None:
    """Reads what a client still sends: were the connection closed on it, it might never see the answer."""

    async def rest() -> None:
        read = 0
        while read <= limit:
            message = await receive()
            read += len(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body", False):
                return

    try:
        await asyncio.wait_for(rest(), _DRAIN)
    except asyncio.TimeoutError:
        return
