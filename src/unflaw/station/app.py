"""HTTP routes of the station, their parameters and documentation, and error answers."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.security import HTTPBearer
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError
from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from unflaw._version import __version__
from unflaw.errors import DetectorError, ImageError, WriteError
from unflaw.station import schemas
from unflaw.station.detectors import Served
from unflaw.station.forms import read_form
from unflaw.station.guard import Guard
from unflaw.station.log import Entry, Filter, Log, legible
from unflaw.station.service import Slot, Station, names

_PROBLEMS = {
    400: "The body cannot be parsed.",
    401: "The token is missing or wrong.",
    403: "Without a token: the request came from another site.",
    404: "There is no such detector, category, inspection or image.",
    409: "The detector cannot be calibrated in its present state.",
    413: "The body is larger than the limit.",
    422: "The image cannot be read or has too many pixels, or a parameter is invalid.",
    429: "The maximum number of requests is in progress; retry after `Retry-After` seconds.",
    503: "The request took too long, or the log cannot be written or read.",
}
_RETRY = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}}
_FILE = {"type": "string", "format": "binary"}
_TEXT = {"type": "string", "maxLength": 200}
_FORM = {
    "type": "object",
    "required": ["image"],
    "additionalProperties": False,
    "properties": {"image": _FILE, "detector": _TEXT, "category": _TEXT, "name": _TEXT},
}
_KINDS = ("image/png", "image/jpeg", "image/tiff", "image/bmp", "image/webp", "application/octet-stream")
_BODY = {
    "required": True,
    "description": "The image file, or a form that contains it.",
    "content": {"multipart/form-data": {"schema": _FORM}, **{kind: {"schema": _FILE} for kind in _KINDS}},
}


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Document error answers."""
    return {
        status: {"model": schemas.Problem, "description": _PROBLEMS[status]}
        | ({"headers": _RETRY} if status == 429 else {})
        for status in statuses
    }


async def _station(request: Request) -> Station:
    return request.app.state.station


Serving = Annotated[Station, Depends(_station)]
Id = Annotated[schemas.Number, Path(description="Number of an inspection.")]
inspection_routes = APIRouter(tags=["inspections"])
image_routes = APIRouter(tags=["images"], responses=_problems(404, 422, 429, 503))
state_routes = APIRouter(tags=["station"])
public_routes = APIRouter()


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
    """Create the ASGI application of a station.

    Args:
        token: Token that requests must carry. None: only requests to a loopback name of this machine are answered.
        origins: Origins of other sites whose pages may use the station (CORS).
        root_path: Path under which a proxy publishes the station, such as `/line3`. The proxy may remove it from
            requests or leave it in; only in the latter case the page needs it. The OpenAPI document names it.
        days, image_bytes: Retention, as in `Log.prune`; applied at the start and then every `every` seconds.

    Raises:
        ValueError: `root_path` is not a path, or begins like a path of the station.
    """
    root_path = root_path.rstrip("/")
    if not re.fullmatch(r"(/[\w.~-]+)*", root_path, re.ASCII) or {".", ".."} & set(root_path.split("/")):
        raise ValueError(f"--root-path {root_path}: is not a path; give one such as /line3")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        retention = asyncio.create_task(_retain(station.log, days, image_bytes, every))
        yield
        retention.cancel()
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
        summary="Finds deviations from good parts.",
        version=__version__,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        docs_url=None,  # both would load scripts from other hosts
        redoc_url=None,
        lifespan=lifespan,
        middleware=[cors, guard] if origins else [guard],
        responses={} if token else _problems(403),
        exception_handlers=_HANDLERS,
    )
    app.state.station = station
    # documents that a token is needed; `Guard` checks it
    bearer = [Depends(HTTPBearer(auto_error=False, description="The station's token."))] if token else []
    for router in (inspection_routes, image_routes, state_routes):
        app.include_router(router, dependencies=bearer, responses=_problems(401) if token else {})
    app.include_router(public_routes)
    app.mount("/page", _PAGE)
    first = root_path[1:].partition("/")[0]
    if first and first in {"page", "openapi.json", *(path.split("/")[1] for path in app.openapi()["paths"])}:
        raise ValueError(f"--root-path {root_path}: the station has a path /{first} of its own; choose another prefix")
    return app


@inspection_routes.post(
    "/inspect",
    response_model=schemas.Inspection,
    responses=_problems(400, 404, 413, 422, 429, 503),
    openapi_extra={"requestBody": _BODY},
)
async def inspect(request: Request, station: Serving, options: Annotated[schemas.Options, Query()]) -> Entry:
    """Inspect an image. The answer is sent once the inspection is in the log."""

    async def work(slot: Slot) -> Entry:
        data, given = await _read_image(request, options, station.limits.bytes)
        return await station.inspect(
            slot, data, name=given.name or "image", detector=given.detector, category=given.category
        )

    return await station.within_limits(work)


@inspection_routes.get("/inspections", response_model=schemas.History, responses=_problems(422, 503))
async def history(station: Serving, query: Annotated[schemas.HistoryQuery, Query()]) -> dict[str, Any]:
    """List inspections, newest first."""
    wanted = Filter(**query.model_dump(exclude={"before", "limit"}))
    found = await station.read(lambda log: log.find(wanted, before=query.before, limit=query.limit))
    return {"items": found, "next": found[-1].id if len(found) == query.limit else None}


@inspection_routes.get("/inspections/{id}", response_model=schemas.Inspection, responses=_problems(404, 422, 503))
async def inspection(station: Serving, id: Id) -> Entry:
    """Get one inspection."""
    return await station.entry(id)


@inspection_routes.put(
    "/inspections/{id}/review", response_model=schemas.Inspection, responses=_problems(400, 404, 413, 422, 503)
)
async def review(station: Serving, id: Id, review: schemas.Review) -> Entry:
    """Record a person's decision. It replaces any earlier one."""
    return await station.decide(id, review.decision, legible(review.by))


@image_routes.get("/inspections/{id}/images", response_model=schemas.Images)
async def images(station: Serving, id: Id) -> dict[str, Any]:
    """List the images of an inspection. A kept image may be inspected again for this."""
    _, result, _ = await station.within_limits(lambda slot: station.result(slot, id))
    return {"images": names(result), "contours": [region.contour for region in result.regions]}


@image_routes.get(
    "/inspections/{id}/images/{image}",
    response_class=Response,
    responses={200: {"content": {"image/png": {"schema": _FILE}}}},
)
async def image(station: Serving, id: Id, image: Annotated[str, Path(max_length=40)]) -> Response:
    """Get an image of an inspection, as PNG.

    `image` is the inspected image. `heat` is the anomaly map on the detector's fixed scale: blue up to the threshold,
    warm above it. `overlay` is the same with transparency, to lay over the image. The others depend on the method.
    """
    png = await station.within_limits(lambda slot: station.draw(slot, id, image))
    return Response(png, media_type="image/png")


@state_routes.get("/station", responses=_problems(503))
async def state(station: Serving) -> schemas.StationState:
    """Describe the detectors and the limits of the station."""
    return schemas.StationState(
        detectors=[await station.read(partial(_detector_state, served)) for served in station.detectors.values()],
        keeps_images=station.log.images is not None,
        waiting=await station.read(lambda log: log.count(Filter(waiting=True))),
        sample=station.limits.sample,
        max_bytes=station.limits.bytes,
        max_pixels=station.limits.pixels,
    )


@state_routes.post("/detectors/{name}/calibrate", responses=_problems(400, 404, 409, 413, 422, 503))
async def calibrate(
    station: Serving, name: Annotated[str, Path(max_length=200)], options: schemas.Recalibration
) -> schemas.RecalibrationDone:
    """Recalibrate a detector with people's decisions and replace its file. Inspections continue meanwhile."""
    served = station.detector(name)
    given = options.model_dump() | {"category": served.detector.category(options.category or None)}
    try:  # in a thread of its own: it may take minutes
        return await asyncio.to_thread(served.recalibrate, station.log, **given)
    except (ValueError, OSError) as error:
        raise HTTPException(409, str(error)) from error


@state_routes.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {CONTENT_TYPE_LATEST: {"schema": {"type": "string"}}}}},
)
async def metrics(station: Serving) -> Response:
    """Get the counters for Prometheus."""
    return Response(station.metrics.render(), media_type=CONTENT_TYPE_LATEST)


@public_routes.get("/health", tags=["station"], responses=_problems(503))
async def health(station: Serving) -> schemas.Health:
    """Check that the station answers and that its log can be read. Needs no token."""
    await station.read(lambda log: log.ping())
    return schemas.Health(status="ok", version=__version__)


_PAGE = StaticFiles(packages=[("unflaw.station", "page")])


@public_routes.get("/", include_in_schema=False)
async def index() -> FileResponse:
    return FileResponse(_PAGE.lookup_path("index.html")[0], headers={"cache-control": "no-cache"})


async def _read_image(request: Request, options: schemas.Options, limit: int) -> tuple[bytes, schemas.Options]:
    """Read the image of a request and its options. Fields of a form take precedence over the query."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        data = await request.body()
    else:
        async with read_form(request, max_files=1, max_fields=8) as form:
            file = form.get("image")
            if not isinstance(file, UploadFile):
                raise HTTPException(422, "the form has no file named image; send the image under that name")
            data = await file.read()
            given: dict[str, Any] = {"name": (file.filename or "")[-200:]} | options.model_dump(exclude_none=True)
            given |= {name: value for name, value in form.items() if name in schemas.Options.model_fields and value}
        options = schemas.Options.model_validate(given)
    if len(data) > limit:
        name = options.name or "the image"
        raise HTTPException(413, f"{name}: has {len(data):,} bytes, over the limit of {limit:,}; send a smaller one")
    return data, options


def _detector_state(served: Served, log: Log) -> schemas.DetectorState:
    def decided(category: str, decision: str, sampled: bool | None = None) -> int:
        return log.count(Filter(detector=served.name, category=category, decision=decision, sampled=sampled))

    categories = {
        category: schemas.Category(
            **schemas.CalibrationState.of(calibration).model_dump(),
            decided_good=decided(category, "good"),
            decided_good_sampled=decided(category, "good", sampled=True),
            decided_defect=decided(category, "defect"),
        )
        for category, calibration in served.detector.calibrations.items()
    }
    return schemas.DetectorState(name=served.name, digest=served.digest, fixed=served.fixed, categories=categories)


async def _retain(log: Log, days: float | None, image_bytes: int | None, every: float) -> None:
    while days is not None or image_bytes is not None:
        try:
            await asyncio.to_thread(log.prune, days=days, image_bytes=image_bytes)
        except Exception:  # no failure may end retention
            logging.getLogger(__name__).exception("retention failed and will be tried again")
        await asyncio.sleep(every)


def _answer(status: int, detail: str) -> JSONResponse:
    return JSONResponse({"detail": detail}, status)


def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError | ValidationError)
    faults = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
    return _answer(422, "; ".join(faults))


def _log_failure(_: Request, error: Exception) -> JSONResponse:
    cause = getattr(error, "orig", None) or getattr(error, "strerror", None)
    reason = str(cause or type(error).__name__).splitlines()[0]
    return _answer(503, f"the log cannot be written or read ({reason}), so nothing was done; fix it and try again")


_HANDLERS: dict[Any, Any] = {
    ClientDisconnect: lambda _, error: _answer(400, "the image did not arrive completely"),  # the client is gone
    DetectorError: lambda _, error: _answer(404, str(error)),
    Exception: lambda _, error: _answer(500, "the station failed; see its output for the reason"),
    ImageError: lambda _, error: _answer(422, str(error)),
    RequestValidationError: _invalid,
    SQLAlchemyError: _log_failure,
    ValidationError: _invalid,
    WriteError: _log_failure,  # the image could not be kept
}
