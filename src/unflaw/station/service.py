"""Work of the station: inspection in threads, the log entry before the answer, and drawings of results."""

from __future__ import annotations

import asyncio
import io
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image, ImageChops
from starlette.exceptions import HTTPException

from unflaw.imaging.reading import read
from unflaw.postprocessing.results import Result
from unflaw.report.panels import colour_map, grey_map, heat_map, heat_overlay
from unflaw.station.detectors import Served
from unflaw.station.log import Entry, Log
from unflaw.station.metrics import Metrics

T = TypeVar("T")
RECENT = 64 * 2**20  # bytes of results that are kept in memory to be drawn
SHOWN = 1600  # maximum longer side of an image that is sent, pixels


class Busy(HTTPException):
    """The maximum number of requests is in progress."""

    def __init__(self) -> None:
        super().__init__(429, "the station is busy; try again in a second", {"Retry-After": "1"})


class Missing(HTTPException):
    """There is no such detector, inspection or image."""

    def __init__(self, detail: str) -> None:
        super().__init__(404, detail)


@dataclass(frozen=True)
class Limits:
    """Limits of the station.

    Attributes:
        bytes: Maximum size of an image file.
        pixels: Maximum number of pixels of an image.
        seconds: Maximum time from the first byte of a request to its answer.
        concurrency: Maximum number of requests in progress or waiting; more are refused.
        sample: Share of images drawn at random for review, in [0, 1].
    """

    bytes: int = 32_000_000
    pixels: int = 50_000_000
    seconds: float = 30.0
    concurrency: int = 16
    sample: float = 0.0


class Slot:
    """Place of one request among `Limits.concurrency`. It is free again when the request and its thread have ended."""

    def __init__(self, station: Station) -> None:
        if station.working >= station.limits.concurrency:
            raise Busy
        self._station = station
        station.working += 1
        self._running: Future | None = None

    async def compute(self, pool: ThreadPoolExecutor, function: Callable[[], T]) -> T:
        """Run a function in a thread of a pool."""
        self._running = future = pool.submit(function)
        return await asyncio.wrap_future(future)

    def leave(self) -> None:
        """Free the slot, now or when its thread ends: a thread cannot be stopped."""
        if self._running is None or self._running.done():
            self._free()
        else:
            loop = asyncio.get_running_loop()
            self._running.add_done_callback(lambda _: loop.call_soon_threadsafe(self._free))

    def _free(self) -> None:
        self._station.working -= 1


class Station:
    """Detectors, their log and the threads that work for them. The methods run in one event loop."""

    def __init__(self, detectors: Mapping[str, Served], log: Log, limits: Limits) -> None:
        self.detectors, self.log, self.limits = detectors, log, limits
        self.metrics = Metrics(lambda: self.working, detectors)
        self.working = 0
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="log")  # SQLite has one writer at a time anyway
        self._reader = ThreadPoolExecutor(2, thread_name_prefix="read")
        self._recent: OrderedDict[int, tuple[Result, bytes]] = OrderedDict()
        self._recent_bytes = 0

    def detector(self, name: str | None) -> Served:
        """Return a detector by name; None is enough if there is only one.

        Raises:
            Missing: The name is unknown, or None although there are several detectors.
        """
        if not name and len(self.detectors) == 1:
            return next(iter(self.detectors.values()))
        if name and name in self.detectors:
            return self.detectors[name]
        fault = f"there is no detector {name}" if name else "there are several detectors"
        raise Missing(f"{fault}; name one of {', '.join(self.detectors)}")

    async def within_limits(self, work: Callable[[Slot], Awaitable[T]]) -> T:
        """Do the work of a request in a slot, within the time limit.

        Raises:
            Busy: No slot is free. HTTPException: 503, after the time limit.
        """
        slot, seconds = Slot(self), self.limits.seconds
        try:
            return await asyncio.wait_for(work(slot), seconds)
        except asyncio.TimeoutError as error:
            raise HTTPException(
                503,
                f"the request took longer than {seconds:g} second{'s' * (seconds != 1)} and was aborted; nothing is "
                "logged unless it appears in the history",
                {"Retry-After": "1"},
            ) from error
        finally:
            slot.leave()

    async def inspect(self, slot: Slot, data: bytes, *, name: str, detector: str | None, category: str | None) -> Entry:
        """Inspect an image and log the result; on return it is on disk.

        Raises:
            Missing: As `detector`. ImageError, DetectorError: As `Served.inspect`. SQLAlchemyError: Not logged.
        """
        served = self.detector(detector)

        def work() -> tuple[Entry, Result]:
            with self.metrics.seconds.labels(served.name).time():
                return served.inspect(
                    data, name=name, category=category, max_pixels=self.limits.pixels, sample=self.limits.sample
                )

        entry, result = await slot.compute(served.worker, work)
        await slot.compute(self._writer, lambda: self.log.add(entry, data))
        self.metrics.count(entry)
        self._remember(entry.id, result, data)
        return entry

    async def read(self, function: Callable[[Log], T]) -> T:
        """Read from the log in a thread."""
        return await asyncio.wrap_future(self._reader.submit(function, self.log))

    async def entry(self, number: int) -> Entry:
        """Return an inspection. Raises Missing."""
        return _existing(number, await self.read(lambda log: log.get(number)))

    async def decide(self, number: int, decision: str | None, by: str) -> Entry:
        """Record a decision, as `Log.decide`. Raises Missing."""
        future = self._writer.submit(self.log.decide, number, decision, by)
        return _existing(number, await asyncio.wrap_future(future))

    async def result(self, slot: Slot, number: int) -> tuple[Entry, Result, bytes]:
        """Return an inspection, its result and its image file.

        If the result is no longer in memory, the kept image is inspected again, without a record.

        Raises:
            Missing: There is no such inspection, or its image is not kept.
        """
        entry = await self.entry(number)
        if number in self._recent:
            self._recent.move_to_end(number)
            return entry, *self._recent[number]
        path = self.log.image(entry.digest)
        gone = Missing(f"the image of inspection {number} is not kept, so it cannot be shown")
        if path is None:
            raise gone
        served = self.detector(entry.detector)

        def work() -> tuple[Result, bytes]:
            try:
                data = path.read_bytes()
            except FileNotFoundError:  # removed by retention meanwhile
                raise gone from None
            _, result = served.inspect(data, name=entry.name, category=entry.category, max_pixels=self.limits.pixels)
            return result, data

        result, data = await slot.compute(served.worker, work)
        self._remember(number, result, data)
        return entry, result, data

    async def draw(self, slot: Slot, number: int, image: str) -> bytes:
        """Draw one of the images of `names`, as PNG.

        Raises:
            Missing: As `result`, or the method has no such image.
        """
        entry, result, data = await self.result(slot, number)
        if image not in names(result):
            raise Missing(f"inspection {number} has no image {image}; it has {', '.join(names(result))}")
        scale = self.detector(entry.detector).detector.select(entry.category).scale

        def work() -> bytes:
            if image == "image":
                drawn = _original(data)
            elif image == "heat":
                drawn = _placed(heat_map(result.map, scale), result)
            elif image == "overlay":
                drawn = _placed(heat_overlay(result.map, scale), result)
            elif image == "uncertainty":  # the standard deviation of values in [0, 1] is 0.5 at most
                drawn = _placed(colour_map(result.layers[image], 0.5), result)
            else:
                layer = result.layers[image]
                drawn = _placed(layer if layer.ndim == 3 else grey_map(layer), result)
            file = io.BytesIO()
            drawn.save(file, "PNG", compress_level=1)
            return file.getvalue()

        return await slot.compute(self._reader, work)

    def close(self) -> None:
        """Finish what the threads have begun, then end them."""
        for pool in (*(served.worker for served in self.detectors.values()), self._writer, self._reader):
            pool.shutdown()
        self.log.close()

    def _remember(self, number: int, result: Result, data: bytes) -> None:
        if number in self._recent:
            self._recent_bytes -= _bytes(*self._recent.pop(number))
        self._recent[number] = result, data
        self._recent_bytes += _bytes(result, data)
        while self._recent_bytes > RECENT and len(self._recent) > 1:
            self._recent_bytes -= _bytes(*self._recent.popitem(last=False)[1])


def names(result: Result) -> list[str]:
    """Return the names of the images of a result."""
    return ["image", "heat", "overlay", *result.layers]


def _existing(number: int, entry: Entry | None) -> Entry:
    if entry is None:
        raise Missing(f"there is no inspection {number} in the log")
    return entry


def _bytes(result: Result, data: bytes) -> int:
    return len(data) + sum(array.nbytes for array in (result.map, result.image, *result.layers.values()))


def _placed(drawn: np.ndarray, result: Result) -> Image.Image:
    """Place a drawn map (H, W, 3 or 4) on the original image; what is outside the region of interest is transparent."""
    x0, y0, x1, y1 = result.valid
    image = Image.fromarray(drawn)
    if result.counted is not None:
        image = image.convert("RGBA")
        image.putalpha(ImageChops.multiply(image.getchannel("A"), Image.fromarray(result.counted).convert("L")))
    image = image.crop((x0, y0, x1, y1))
    if result.crop == (0, 0, *result.size):
        return image
    shrink = min(1, SHOWN / max(result.size))
    width, height = (max(1, round(side * shrink)) for side in result.size)
    whole = Image.new("RGBA", (width, height))
    left, top, right, bottom = (round(edge * shrink) for edge in result.crop)
    whole.paste(image.convert("RGBA").resize((max(1, right - left), max(1, bottom - top))), (left, top))
    return whole


def _original(data: bytes) -> Image.Image:
    """Decode an image, at most `SHOWN` pixels long."""
    pixels = read(data)
    if pixels.dtype != np.uint8:
        pixels = (pixels * 255).round().astype(np.uint8)
    image = Image.fromarray(pixels)
    image.thumbnail((SHOWN, SHOWN))
    return image
