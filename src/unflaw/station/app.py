"""The station over HTTP: routes, what they take and answer, and errors as one sentence."""

from __future__ import annotations

import asyncio
import functools
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field, ValidationError
from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from unflaw._version import __version__
from unflaw.calibration.thresholds import Calibration
from unflaw.errors import DetectorError, ImageError, WriteError
from unflaw.station import schemas
from unflaw.station.detectors import Served
from unflaw.station.forms import read_form
from unflaw.station.guard import Guard
from unflaw.station.log import Entry, Filter, legible
from unflaw.station.service import Busy, Missing, Slot, Station, names

T = TypeVar("T")
_PROBLEMS = {
    400: "A body that cannot be parsed.",
    401: "The token is missing or wrong.",
    403: "Without a token, a request that came from another site.",
    404: "There is no such detector, category, inspection or image.",
    409: "It cannot be done as things stand.",
    413: "More bytes than the station takes.",
    422: "An image that cannot be read or has too many pixels, or parameters that cannot be used.",
    429: "As many requests are being worked on as the station takes; come back after `Retry-After` seconds.",
    503: "It took too long, or the log cannot be written or read.",
}
_RETRY = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
_IMAGE = {"type": "string", "format": "binary"}
_TEXT = {"type": "string", "maxLength": 200}
_KINDS = ("image/png", "image/jpeg", "image/tiff", "image/bmp", "image/webp", "application/octet-stream")
_BODY = {
    "requestBody": {
        "required": True,
        "description": "The image's file, or a form with it.",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "additionalProperties": False,
                    "properties": {"image": _IMAGE, "detector": _TEXT, "category": _TEXT, "name": _TEXT},
                }
            },
            **{kind: {"schema": _IMAGE} for kind in _KINDS},
        },
    }
}


Id = Annotated[schemas.Number, Path(description="Of an inspection.")]


class Asked(BaseModel):
    """What is asked along with an image."""

    detector: str | None = Field(None, max_length=200, description="Needed where several are served.")
    category: str | None = Field(None, max_length=200, description="Needed for a detector of several.")
    name: str | None = Field(None, max_length=200, description="What to call the image; by default its file's name.")


class Wanted(BaseModel):
    """Which inspections."""

    verdict: schemas.Verdict | None = None
    detector: str | None = Field(None, max_length=200)
    category: str | None = Field(None, max_length=200)
    since: schemas.Moment | None = Field(None, description="First moment, with a time zone.")
    until: schemas.Moment | None = Field(None, description="First moment that is too late.")
    text: str | None = Field(None, max_length=200, description="Part of the image's name.")
    waiting: bool = Field(False, description="Only those that a person should decide: not good, or drawn at random.")
    decided: bool | None = Field(None, description="Only those that a person has decided, or has not.")
    before: schemas.Number | None = Field(None, description="`next` of the page before.")
    limit: int = Field(50, ge=1, le=200)


def create_app(
    station: Station,
    *,
    token: str | None = None,
    origins: Sequence[str] = (),
    root_path: str = "",
    days: float | None = None,
    image_bytes: int | None = None,
    every: float = 3600.0,
) -> FastAPI:
    """The application that serves a station.

    Args:
        token: What requests must carry; None: only requests to this machine by its own name are answered.
        origins: Other sites whose pages may use the station.
        root_path: Path under which a proxy publishes the station, such as `/line3`. The proxy may remove it from
            requests, or leave it. The page needs it only in the latter case; the OpenAPI document names it.
        days, image_bytes: Retention, as for `Log.prune`, now and `every` so many seconds.

    Raises:
        ValueError: `root_path` is not a path, or begins like a path of the station's own.
    """
    root_path = root_path.rstrip("/")
    if not re.fullmatch(r"(/[\w.~-]+)*", root_path, re.ASCII) or {".", ".."} & set(root_path.split("/")):
        raise ValueError(f"--root-path {root_path}: is not a path; give one such as /line3")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        keeping = asyncio.create_task(_retain(station, days, image_bytes, every))
        yield
        keeping.cancel()
        await asyncio.to_thread(station.close)

    guard = Middleware(Guard, metrics=station.metrics, max_bytes=station.limits.bytes, token=token, root_path=root_path)
    cors = Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["GET", "POST", "PUT"],
        allow_headers=["Authorization", "Content-Type"],
        expose_headers=["Retry-After"],
    )
    app = FastAPI(
        title="unflaw inspection station",
        summary="Finds what differs from good parts.",
        version=__version__,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        docs_url=None,  # both would load their scripts from other hosts
        redoc_url=None,
        lifespan=lifespan,
        middleware=[cors, guard] if origins else [guard],
        responses={} if token else _problems(403),
        exception_handlers=_HANDLERS,
    )
    # this only documents that a token is needed: the guard checks
    bearer = [Depends(HTTPBearer(auto_error=False, description="The station's token."))] if token else []
    api = APIRouter(dependencies=bearer, responses=_problems(401) if token else {})
    _add_inspections(api, station)
    _add_state(api, station)
    app.include_router(api)
    _add_page(app, station)
    first = root_path[1:].partition("/")[0]
    if first and first in {"page", "openapi.json", *(path.split("/")[1] for path in app.openapi()["paths"])}:
        raise ValueError(f"--root-path {root_path}: the station has a path /{first} of its own; choose another prefix")
    return app


def _add_inspections(api: APIRouter, station: Station) -> None:
    async def within(slot: Slot, work: Awaitable[T]) -> T:
        try:
            return await asyncio.wait_for(work, station.limits.seconds)
        except asyncio.TimeoutError as error:
            seconds = station.limits.seconds
            raise HTTPException(
                503,
                f"it took longer than {seconds:g} second{'s' * (seconds != 1)} and was given up; unless it is in the "
                "history nothing is logged",
                {"Retry-After": "1"},
            ) from error
        finally:
            slot.leave()

    @api.post(
        "/inspect",
        tags=["inspections"],
        response_model=schemas.Inspection,
        responses=_problems(400, 404, 413, 422, 429, 503),
        openapi_extra=_BODY,
    )
    async def inspect(request: Request, asked: Annotated[Asked, Query()]) -> Entry:
        """Inspect an image. The answer comes when the inspection is in the log."""
        slot = Slot(station)

        async def work() -> Entry:
            data, found = await _image(request, asked, station.limits.bytes)
            return await station.inspect(
                slot, data, name=found.name or "image", detector=found.detector, category=found.category
            )

        return await within(slot, work())

    @api.get("/inspections", tags=["inspections"], response_model=schemas.History, responses=_problems(422, 503))
    async def history(wanted: Annotated[Wanted, Query()]) -> dict[str, Any]:
        """Inspections, newest first."""
        conditions = Filter(**wanted.model_dump(exclude={"before", "limit"}))
        found = await station.read(lambda log: log.find(conditions, before=wanted.before, limit=wanted.limit))
        return {"items": found, "next": found[-1].id if len(found) == wanted.limit else None}

    @api.get(
        "/inspections/{id}",
        tags=["inspections"],
        response_model=schemas.Inspection,
        responses=_problems(404, 422, 503),
    )
    async def inspection(id: Id) -> Entry:
        """One inspection."""
        return await station.entry(id)

    @api.put(
        "/inspections/{id}/review",
        tags=["inspections"],
        response_model=schemas.Inspection,
        responses=_problems(400, 404, 413, 422, 503),
    )
    async def review(id: Id, review: schemas.Review) -> Entry:
        """Say what a person decided, instead of any earlier decision."""
        return await station.decide(id, review.decision, legible(review.by))

    @api.get(
        "/inspections/{id}/images",
        tags=["images"],
        response_model=schemas.Images,
        responses=_problems(404, 422, 429, 503),
    )
    async def images(id: Id) -> dict[str, Any]:
        """What can be shown of an inspection. If its image is kept it may be inspected again for that."""
        slot = Slot(station)
        _, result, _ = await within(slot, station.shown(slot, id))
        return {"images": names(result), "contours": [region.contour for region in result.regions]}

    @api.get(
        "/inspections/{id}/images/{image}",
        tags=["images"],
        response_class=Response,
        responses={200: {"content": {"image/png": {"schema": _IMAGE}}}, **_problems(404, 422, 429, 503)},
    )
    async def image(id: Id, image: Annotated[str, Path(max_length=40)]) -> Response:
        """An image of an inspection, as PNG.

        `image` is what was inspected, `heat` the anomaly map on the detector's fixed scale: blue up to the threshold,
        warm above it; `overlay` is that with transparency, to lay over the image. The others are the method's own.
        """
        slot = Slot(station)
        png = await within(slot, station.draw(slot, id, image))
        return Response(png, media_type="image/png")


def _add_state(api: APIRouter, station: Station) -> None:
    @api.get("/station", tags=["station"], response_model=schemas.StationState, responses=_problems(503))
    async def state() -> dict[str, Any]:
        """What is served, and within which limits."""
        return {
            "detectors": [await _state(station, served) for served in station.detectors.values()],
            "keeps_images": station.log.images is not None,
            "waiting": await station.waiting(),
            "sample": station.limits.sample,
            "max_bytes": station.limits.bytes,
            "max_pixels": station.limits.pixels,
        }

    @api.post(
        "/detectors/{name}/calibrate",
        tags=["station"],
        response_model=schemas.RecalibrationDone,
        responses=_problems(400, 404, 409, 413, 422, 503),
    )
    async def calibrate(name: Annotated[str, Path(max_length=200)], wanted: schemas.Recalibration) -> dict[str, Any]:
        """Set a detector's threshold anew by what people decided, and replace its file. Inspections go on meanwhile."""
        served = station.detector(name)
        category, options = served.detector.category(wanted.category or None), wanted.model_dump(exclude={"category"})
        try:
            done = await station.recalibrate(served, category, **options)
        except (ValueError, OSError) as error:
            raise HTTPException(409, str(error)) from error
        return {**vars(done), "before": _told(done.before), "after": _told(done.after), "digest": served.digest}

    @api.get(
        "/metrics",
        tags=["station"],
        response_class=Response,
        responses={200: {"content": {CONTENT_TYPE_LATEST: {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(station.metrics.render(), media_type=CONTENT_TYPE_LATEST)


def _add_page(app: FastAPI, station: Station) -> None:
    @app.get("/health", tags=["station"], response_model=schemas.Health, responses=_problems(503))
    async def health() -> dict[str, str]:
        """Whether the station answers and its log can be read. Needs no token."""
        await station.read(lambda log: log.ping())
        return {"status": "ok", "version": __version__}

    page = StaticFiles(packages=[("unflaw.station", "page")])
    app.mount("/page", page)

    @app.get("/", include_in_schema=False)
    async def index() -> FileResponse:
        return FileResponse(page.lookup_path("index.html")[0], headers={"cache-control": "no-cache"})


async def _image(request: Request, asked: Asked, limit: int) -> tuple[bytes, Asked]:
    """The image in a request and what is asked with it; fields of a form go before the query."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        data = await request.body()
    else:
        async with read_form(request, max_files=1, max_fields=8) as form:
            file = form.get("image")
            if not isinstance(file, UploadFile):
                raise HTTPException(422, "the form has no file called image; put the image there")
            data = await file.read()
            given: dict[str, Any] = {"name": (file.filename or "")[-200:]} | asked.model_dump(exclude_none=True)
            given |= {name: value for name, value in form.items() if name in Asked.model_fields and value}
        asked = Asked.model_validate(given)
    if len(data) > limit:
        name = asked.name or "the image"
        raise HTTPException(413, f"{name}: has {len(data):,} bytes, over the limit of {limit:,}; send a smaller one")
    return data, asked


async def _state(station: Station, served: Served) -> dict[str, Any]:
    def counted(category: str) -> dict[str, int]:
        mine = functools.partial(Filter, detector=served.name, category=category)
        return {
            "decided_good": station.log.count(mine(decision="good")),
            "decided_good_sampled": station.log.count(mine(decision="good", sampled=True)),
            "decided_defect": station.log.count(mine(decision="defect")),
        }

    calibrations = served.detector.calibrations
    counts = await station.read(lambda _: {category: counted(category) for category in calibrations})
    categories = {category: _told(known) | counts[category] for category, known in calibrations.items()}
    return {"name": served.name, "digest": served.digest, "fixed": served.fixed, "categories": categories}


def _told(calibration: Calibration) -> dict[str, Any]:
    return {
        "threshold": calibration.threshold,
        "false_alarm_rate": calibration.rate,
        "described": calibration.describe(),
    }


async def _retain(station: Station, days: float | None, image_bytes: int | None, every: float) -> None:
    while days is not None or image_bytes is not None:
        try:
            await station.prune(days, image_bytes)
        except Exception:  # the next time, then; whatever it is, it must not end retention
            logging.getLogger(__name__).exception("retention failed, and is tried again later")
        await asyncio.sleep(every)


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    headers = {429: {"headers": _RETRY}}
    return {
        status: {"model": schemas.Problem, "description": _PROBLEMS[status], **headers.get(status, {})}
        for status in statuses
    }


def _answer(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, headers)


def _says(status: int) -> Callable[[Request, Exception], JSONResponse]:
    return lambda _, error: _answer(status, str(error))


def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError | ValidationError)
    faults = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
    return _answer(422, "; ".join(faults))


def _unlogged(_: Request, error: Exception) -> JSONResponse:
    known = getattr(error, "orig", None) or getattr(error, "strerror", None)
    reason = str(known or type(error).__name__).splitlines()[0]
    return _answer(503, f"the log cannot be written or read ({reason}), so nothing was done; mend it and try again")


_HANDLERS: dict[Any, Any] = {
    Busy: lambda _, error: _answer(429, "the station is busy; try again in a second", {"Retry-After": "1"}),
    ClientDisconnect: lambda _, error: _answer(400, "the image did not arrive whole"),  # nobody reads that
    DetectorError: _says(404),
    Exception: lambda _, error: _answer(500, "the station failed; its output says why"),
    ImageError: _says(422),
    Missing: _says(404),
    RequestValidationError: _invalid,
    SQLAlchemyError: _unlogged,
    ValidationError: _invalid,
    WriteError: _unlogged,  # the image could not be kept
}
