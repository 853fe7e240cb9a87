"""Middleware that checks every request: token, host, origin and size."""

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

_OPEN = ("", "/", "/health")  # need no token: the page holds no data, and load balancers request /health
_PAGE = "/page/"
_METHODS = ("GET", "HEAD", "OPTIONS", "POST", "PUT")
_FRAMING = 64 * 2**10  # bytes of a multipart form around the image
_DRAIN = 10.0  # seconds in which the rest of a refused request is read and discarded
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; media-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(self), microphone=(), geolocation=()",
}


def is_loopback(host: str) -> bool:
    """Return True if an address can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """ASGI middleware that refuses requests and adds security headers to answers.

    With a token, requests must carry it as `Authorization: Bearer …`. Without one, only this machine can reach the
    station, and `Host` and `Origin` are checked, so that no other site can use it through a browser. Without a token
    and without `Host`, a request gets the page and `/health` only.

    HEAD is answered like GET, without the body.

    Args:
        max_bytes: Maximum size of a body, without the framing of a form.
        root_path: Prefix under which a proxy publishes the station; paths may have it or not.
    """

    def __init__(
        self, app: ASGIApp, *, metrics: Metrics, max_bytes: int, token: str | None, root_path: str = ""
    ) -> None:
        self._app, self._metrics, self._root_path = app, metrics, root_path
        self._token = None if token is None else token.encode()
        self._max_bytes = max_bytes + _FRAMING
        self._too_large = f"the request is larger than {self._max_bytes:,} bytes; send a smaller image"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        root, path, method = self._root_path, scope["path"], scope["method"]
        if path == root or path.startswith(f"{root}/"):
            path = path[len(root) :]
        # ASGI requires the prefix in the path
        scope = {**scope, "root_path": root, "path": root + path, "method": "GET" if method == "HEAD" else method}
        read, more = 0, True

        async def limited() -> Message:
            nonlocal read, more
            message = await receive()
            read += len(message.get("body", b""))
            more = message.get("more_body", False)
            if read > self._max_bytes and message["type"] == "http.request":
                raise HTTPException(413, self._too_large)
            return message

        async def finish(message: Message) -> None:
            if message["type"] == "http.response.start":
                if message["status"] >= 400 and more and read <= self._max_bytes:
                    await _drain(receive, self._max_bytes)
                out = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    out.setdefault(name, value)
                # browsers check the page for updates, and no proxy stores answers of the API
                out.setdefault("cache-control", "no-cache" if path.startswith(_PAGE) else "no-store")
                if "GET" in (allowed := out.get("allow", "").split(", ")) and "HEAD" not in allowed:
                    out["allow"] = ", ".join([*allowed, "HEAD"])
                route = getattr(scope.get("route"), "path", "other")
                self._metrics.answers.labels(method if method in _METHODS else "other", route, message["status"]).inc()
            elif method == "HEAD" and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await (self._refuse(scope["method"], path, Headers(scope=scope)) or self._app)(scope, limited, finish)

    def _refuse(self, method: str, path: str, headers: Headers) -> JSONResponse | None:
        """Return the answer to a request that is refused."""
        is_open = path in _OPEN or path.startswith(_PAGE)
        host, origin = headers.get("host"), headers.get("origin")
        if self._token is None and host is None:
            # Browsers always send Host, but a proxy may drop it from a browser's request: no data then.
            if not is_open:
                return _problem(403, "a request without Host gets the page and /health only; send Host: localhost")
        elif self._token is None:
            if not is_loopback(_split(f"//{host}").hostname or ""):
                return _problem(403, "without a token the station answers to localhost only; start it with a token")
            if method not in ("GET", "OPTIONS") and origin and _split(origin).netloc != host:
                return _problem(403, f"{origin} may not use this station; start it with --cors {origin} and a token")
        elif not is_open:
            kind, _, given = headers.get("authorization", "").partition(" ")
            # compared as bytes: non-ASCII text cannot be compared in constant time
            if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._token):
                detail = "this station needs its token: Authorization: Bearer …"
                return _problem(401, detail, {"www-authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_bytes:
            return _problem(413, self._too_large)
        return None


def _split(url: str) -> SplitResult:
    """Split a URL; an invalid one gives empty parts."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def _problem(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, headers)


async def _drain(receive: Receive, limit: int) -> None:
    """Read and discard the rest of a body. A client whose connection is closed while it sends may miss the answer."""

    async def discard() -> None:
        read, more = 0, True
        while more and read <= limit:
            message = await receive()
            read += len(message.get("body", b""))
            more = message["type"] == "http.request" and message.get("more_body", False)

    try:
        await asyncio.wait_for(discard(), _DRAIN)
    except asyncio.TimeoutError:
        return
