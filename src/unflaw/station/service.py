"""What the station does, apart from HTTP: inspects in threads, logs before it answers, and draws what was found."""

from __future__ import annotations

import asyncio
import io
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image

from unflaw.imaging.reading import read
from unflaw.postprocessing.results import Result
from unflaw.report.panels import colour_map, grey_map, heat_map, veil
from unflaw.station.detectors import Recalibrated, Served
from unflaw.station.log import Entry, Filter, Log
from unflaw.station.metrics import Metrics

T = TypeVar("T")
RECENT = 64 * 2**20  # bytes of results that are kept in memory to be drawn
SHOWN = 1600  # pixels of the longer side of an image that is shown, at most


class Busy(Exception):
    """As many requests are being worked on as the station takes at once."""


class Missing(LookupError):
    """There is no such detector, inspection or image. The message says why."""


@dataclass(frozen=True)
class Limits:
    """What the station takes.

    Attributes:
        bytes, pixels: Of an image.
        seconds: From a request's first byte to its answer.
        concurrency: Requests that are worked on or wait for it; further ones are told to come back.
        sample: Share of images that are drawn at random for review.
    """

    bytes: int = 32_000_000
    pixels: int = 50_000_000
    seconds: float = 30.0
    concurrency: int = 16
    sample: float = 0.0


class Slot:
    """The place of one request among those worked on. Free when the request ends and no thread computes for it."""

    def __init__(self, station: Station) -> None:
        if station.working >= station.limits.concurrency:
            raise Busy
        self._station = station
        station.working += 1
        self._running: Future | None = None

    async def compute(self, pool: ThreadPoolExecutor, function: Callable[[], T]) -> T:
        self._running = future = pool.submit(function)
        return await asyncio.wrap_future(future)

    def leave(self) -> None:
        if self._running is None or self._running.done():
            self._free()
        else:  # given up, but a thread cannot be stopped: as long as it computes it counts
            loop = asyncio.get_running_loop()
            self._running.add_done_callback(lambda _: loop.call_soon_threadsafe(self._free))

    def _free(self) -> None:
        self._station.working -= 1


class Station:
    """Detectors, their log, and threads to work in. Its methods run in one event loop."""

    def __init__(self, detectors: Mapping[str, Served], log: Log, limits: Limits) -> None:
        self.detectors, self.log, self.limits = detectors, log, limits
        self.metrics = Metrics(lambda: self.working, detectors)
        self.working = 0
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="log")  # writers of SQLite wait for each other anyway
        self._reader = ThreadPoolExecutor(2, thread_name_prefix="read")
        self._recent: OrderedDict[int, tuple[Result, bytes]] = OrderedDict()
        self._recent_bytes = 0

    def detector(self, name: str | None) -> Served:
        """None will do where there is one only.

        Raises:
            Missing: Not known, or None where there are several.
        """
        if not name and len(self.detectors) == 1:
            return next(iter(self.detectors.values()))
        if name and name in self.detectors:
            return self.detectors[name]
        fault = f"there is no detector {name}" if name else "there are several detectors"
        raise Missing(f"{fault}; name one of {', '.join(self.detectors)}")

    async def inspect(self, slot: Slot, data: bytes, *, name: str, detector: str | None, category: str | None) -> Entry:
        """Inspects an image. When this returns the inspection is in the log, on disk.

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
        """Asks the log."""
        return await asyncio.wrap_future(self._reader.submit(function, self.log))

    async def entry(self, number: int) -> Entry:
        """An inspection. Raises Missing."""
        return self._known(number, await self.read(lambda log: log.get(number)))

    async def decide(self, number: int, decision: str | None, by: str) -> Entry:
        """See `Log.decide`. Raises Missing."""
        deciding = self._writer.submit(self.log.decide, number, decision, by)
        return self._known(number, await asyncio.wrap_future(deciding))

    async def recalibrate(self, served: Served, category: str, **options: bool | float | None) -> Recalibrated:
        """See `Served.recalibrate`."""
        # for minutes perhaps, so not in a thread that others wait for
        return await asyncio.to_thread(served.recalibrate, self.log, category, **options)  # type: ignore[arg-type]

    async def shown(self, slot: Slot, number: int) -> tuple[Entry, Result, bytes]:
        """What an inspection found. Where memory has lost it, a kept image is inspected again, without a record.

        Raises:
            Missing: No such inspection, or its image is gone.
        """
        entry = await self.entry(number)
        if number in self._recent:
            self._recent.move_to_end(number)
            return entry, *self._recent[number]
        path = self.log.image(entry.digest)
        gone = Missing(f"the image of inspection {number} is not kept, so there is nothing to show of it any more")
        if path is None:
            raise gone
        served = self.detector(entry.detector)

        def work() -> tuple[Result, bytes]:
            try:
                data = path.read_bytes()
            except FileNotFoundError:  # retention was faster
                raise gone from None
            _, result = served.inspect(data, name=entry.name, category=entry.category, max_pixels=self.limits.pixels)
            return result, data

        result, data = await slot.compute(served.worker, work)
        self._remember(number, result, data)
        return entry, result, data

    async def draw(self, slot: Slot, number: int, image: str) -> bytes:
        """One of `names`, as PNG.

        Raises:
            Missing: As `shown`, or the method has no such image.
        """
        entry, result, data = await self.shown(slot, number)
        if image not in names(result):
            raise Missing(f"inspection {number} has no image {image}; it has {', '.join(names(result))}")
        scale = self.detector(entry.detector).detector.select(entry.category).scale

        def work() -> bytes:
            if image == "image":
                return _png(_fitting(read(data)))
            if image in ("heat", "overlay"):
                return _png(_placed((heat_map if image == "heat" else veil)(result.map, scale), result))
            layer = result.layers[image]
            if image == "uncertainty":  # a deviation of values in [0, 1] is at most one half
                return _png(_placed(colour_map(layer, 0.5), result))
            return _png(_placed(layer if layer.ndim == 3 else grey_map(layer), result))

        return await slot.compute(self._reader, work)

    async def prune(self, days: float | None, image_bytes: int | None) -> None:
        """See `Log.prune`."""
        await asyncio.to_thread(self.log.prune, days=days, image_bytes=image_bytes)  # nobody waits for it

    async def waiting(self) -> int:
        """Inspections that a person should decide."""
        return await self.read(lambda log: log.count(Filter(waiting=True)))

    def close(self) -> None:
        """Ends the threads; what they have begun is finished first."""
        for pool in (*(served.worker for served in self.detectors.values()), self._writer, self._reader):
            pool.shutdown()
        self.log.close()

    def _known(self, number: int, entry: Entry | None) -> Entry:
        if entry is None:
            raise Missing(f"there is no inspection {number} in the log")
        return entry

    def _remember(self, number: int, result: Result, data: bytes) -> None:
        if number in self._recent:
            self._recent_bytes -= _bytes(*self._recent.pop(number))
        self._recent[number] = result, data
        self._recent_bytes += _bytes(result, data)
        while self._recent_bytes > RECENT and len(self._recent) > 1:
            self._recent_bytes -= _bytes(*self._recent.popitem(last=False)[1])


def names(result: Result) -> list[str]:
    """The images that there are of a result."""
    return ["image", "heat", "overlay", *result.layers]


def _bytes(result: Result, data: bytes) -> int:
    arrays = (result.map, result.image, *result.layers.values())
    return len(data) + sum(array.nbytes for array in arrays)


def _placed(drawn: np.ndarray, result: Result) -> Image.Image:
    """An image of the map's shape as it lies over the original one: transparent where that does not count."""
    x0, y0, x1, y1 = result.valid
    if result.counted is not None:
        opacity = drawn[..., 3] if drawn.shape[2] == 4 else np.full(drawn.shape[:2], 255, np.uint8)
        drawn = np.dstack([drawn[..., :3], np.where(result.counted, opacity, 0).astype(np.uint8)])
    image = Image.fromarray(drawn[y0:y1, x0:x1])
    if result.crop == (0, 0, *result.size):
        return image
    shrink = min(1, SHOWN / max(result.size))
    width, height = (max(1, round(side * shrink)) for side in result.size)
    whole = Image.new("RGBA", (width, height))
    left, top, right, bottom = (round(edge * shrink) for edge in result.crop)
    whole.paste(image.convert("RGBA").resize((max(1, right - left), max(1, bottom - top))), (left, top))
    return whole


def _fitting(pixels: np.ndarray) -> Image.Image:
    if pixels.dtype != np.uint8:
        pixels = (pixels * 255).round().astype(np.uint8)
    image = Image.fromarray(pixels)
    image.thumbnail((SHOWN, SHOWN))
    return image


def _png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG", compress_level=1)
    return data.getvalue()
