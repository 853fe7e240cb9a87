"""Types of images that users may pass: paths, and images in memory. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from PIL import Image

TAKEN = (
    "a path, the bytes of a file, an open file, a Pillow image, or a NumPy array (H, W) or (H, W, 1 to 4 channels) of "
    "bool, uint8, uint16, or floats from 0 to 1"
)


class Readable(Protocol):
    """An object with a method `read` that returns the bytes of a file, such as an open file."""

    def read(self) -> bytes: ...


@dataclass(frozen=True)
class InMemory:
    """An image in memory. Two with the same name are equal.

    Attributes:
        name: Name in messages and records.
        source: The bytes of a file, a Pillow image or an array, see `reading.read`.
    """

    name: str
    source: bytes | Image.Image | np.ndarray = field(compare=False, repr=False)

    def __str__(self) -> str:
        return self.name


ImageLike: TypeAlias = "str | Path | bytes | Readable | Image.Image | np.ndarray"
Input = Path | InMemory


def check_kind(image: Any, name: str) -> None:
    """Check the type of an image.

    Raises:
        TypeError: The type is not supported; the message names those that are.
    """
    if isinstance(image, str | Path | bytes | InMemory | Image.Image | np.ndarray) or hasattr(image, "read"):
        return
    kind = type(image)
    called = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    remedy = f"give {TAKEN}"
    if isinstance(image, list | tuple):
        remedy = "give one image to inspect, and several to inspect_many"
    elif kind.__module__.partition(".")[0] == "torch" and hasattr(image, "permute"):
        remedy = f"{remedy}: convert (C, H, W) with .permute(1, 2, 0).numpy(force=True)"
    elif hasattr(image, "__array__"):
        remedy = f"{remedy}: convert it with numpy.asarray"
    raise TypeError(f"{name}: has the type {called} and is not an image; {remedy}")


def inputs(images: Any, called: str = "image") -> Iterator[Input]:
    """Iterate over images as paths or, in memory, under names such as "image 0".

    Args:
        images: An iterable of images, or an array (N, H, W, C).
        called: Prefix of the names of images in memory; their index follows.

    Raises:
        TypeError: One image instead of several; during iteration, an object that is not an image.
    """
    one = isinstance(images, str | Path | bytes | Mapping | Image.Image) or hasattr(images, "read")
    if one or not isinstance(images, Iterable):
        given = str(images) if isinstance(images, str | Path) else f"an object of the type {type(images).__name__}"
        raise TypeError(f"{given}: is not a list of images; give a list of paths or arrays, such as [image]")
    if isinstance(images, np.ndarray) and images.ndim != 4:
        raise TypeError(
            f"an array of the shape {images.shape} is not a list of images; give (N, H, W, C), or a list of arrays"
        )
    return (_input(image, f"{called} {number}") for number, image in enumerate(images))


def _input(image: Any, name: str) -> Input:
    check_kind(image, name)
    if isinstance(image, InMemory):
        return image
    if isinstance(image, str | Path):
        return Path(image)
    return InMemory(name, image if isinstance(image, bytes | Image.Image | np.ndarray) else image.read())
