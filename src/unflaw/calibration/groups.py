"""Groups of good images that belong together: named ones, and bursts and near-copies that are found. No torch.

A good image with near-copies among those that the detector learned from scores lower than new ones do. So whole groups
are held out, and the promise counts groups, not images (`training.splits`, `thresholds`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import PurePath

import numpy as np

from unflaw.errors import TrainingError
from unflaw.imaging.inputs import Input
from unflaw.io.words import count

AUTO, NONE = "auto", "none"  # values of `calibration.groups` that are no patterns
SIDE = 32  # of the thumbnails that are compared, in pixels
CLOSE = 5  # an image in a burst has its neighbour in the sequence among this many most similar images
SHARE = 20  # a group of neighbours has at most one of this many parts of the images; longer ones are divided
FIELDS = 10  # groups that names must make at least
MANY = 4096  # above this many images near-copies are looked for among neighbours in the sequence only


def name_groups(paths: Sequence[Input], given: Mapping[Input, str], pattern: str) -> list[str] | None:
    """Returns the named group of each image, or None if none is named.

    Args:
        paths: Images.
        given: Groups by image, as a table has them; others are named by the pattern.
        pattern: Regular expression that is searched in the path with slashes; its capturing groups, or all that
            matches, name the group. `AUTO` and `NONE` name none.

    Raises:
        TrainingError: The pattern is none, matches no image, or not all.
    """
    if pattern in (AUTO, NONE):
        if pattern == NONE or not any(path in given for path in paths):
            return None
        if missing := [path for path in paths if path not in given]:
            raise TrainingError(f"{missing[0]}: has no group, but others have; fill the column, or leave it out")
        return [given[path] for path in paths]
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise TrainingError(f"--groups {pattern}: is no regular expression ({error})") from error
    found = []
    for path in paths:
        match = compiled.search(str(path).replace("\\", "/"))
        if match is None:
            raise TrainingError(f"{path}: --groups {pattern} does not match its path; every good image needs a group")
        found.append("\n".join(part or "" for part in (match.groups() or (match[0],))))
    return found


def find_groups(thumbnails: np.ndarray, paths: Sequence[Input]) -> np.ndarray:
    """Finds bursts and near-copies among images (ours).

    Two images are compared by the amplitudes of the Fourier transforms of their grey thumbnails, which a shift or
    another light hardly changes. Two rules join images, and both compare ranks, not distances, so that they need no
    threshold for "near":

    * neighbours in the natural order of their names, or next but one, if one is among the `CLOSE` most similar
      images of the other (by chance, that holds for few of them);
    * sets of three and more, up to a tenth of all, whose members are all more similar to each other than any is to
      an image outside.

    Names join images, too, if all have several fields ("strip7_x1280", "patient12-3") and all but the last of them
    make at least `FIELDS` groups, none of which has more than an eighth of the images: crops of one strip, images of
    one patient, views of one part, parts of one day.

    Args:
        thumbnails: (n, h, w) uint8 grey, or (n, 3, h, w).
        paths: Their paths; sorted by these, neighbours were taken one after another. Images in memory have their
            given order.

    Returns:
        (n,) int, the number of the group of each image.
    """
    n = len(paths)
    order = sorted(range(n), key=lambda i: _natural(str(paths[i])))
    root = list(range(n))

    def top(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    spectra = _spectra(np.asarray(thumbnails)[order])
    close = max(1, min(CLOSE, n // SHARE))
    start, longest = 0, max(CLOSE + 1, n // SHARE)
    near = _near_in_sequence(spectra, close)
    for i in range(n - 1):
        before = i > start and near[1][i - 1]  # one image between may differ
        if i + 1 - start < longest and (near[0][i] or before):
            root[top(i + 1)] = top(i)
        else:
            start = i + 1
    if 3 <= n <= MANY:
        for members in _closed_sets(spectra):
            for i in members[1:]:
                root[top(i)] = top(members[0])
    found = np.empty(n, int)
    found[order] = [top(i) for i in range(n)]
    by_name = _named_alike(paths)
    for i in range(n):
        root[i] = i if by_name is None else by_name.index(by_name[i])
    first: dict[int, int] = {}
    for i in range(n):
        root[top(i)] = top(first.setdefault(int(found[i]), i))
    return np.unique([top(i) for i in range(n)], return_inverse=True)[1]


def _named_alike(paths: Sequence[Input]) -> list[str] | None:
    """The name of each image without its last field; None if these are no groups (see `find_groups`)."""
    fields = [re.fullmatch(r"(.+)[_\-. ][^_\-. ]+", PurePath(str(path)).stem) for path in paths]
    names = [f"{PurePath(str(path)).parent}\n{field[1]}" for path, field in zip(paths, fields, strict=True) if field]
    sizes = Counter(names)
    if len(names) < len(paths) or not FIELDS <= len(sizes) < len(paths) or max(sizes.values()) > len(paths) / 8:
        return None
    return names


def describe_groups(named: bool, groups: int, images: int) -> str:
    """Says in one sentence what the groups mean; empty if every image stands for itself."""
    if groups == images:
        return ""
    of = count(images, "good image")
    if named:
        return f"{of} in {count(groups, 'group')} as named: whole groups calibrate, and the promise counts groups"
    return (
        f"{of} make {count(groups, 'group')}, since some are nearly the same (bursts, copies) or named alike: whole "
        "groups calibrate, and the promise counts groups; --groups names others, or none"
    )


def _natural(text: str) -> list[tuple[int, int, str]]:
    """Key that sorts img9 before img10."""
    parts = re.split(r"(\d+)", text)
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts]


def _spectra(thumbnails: np.ndarray) -> np.ndarray:
    """(n, …, h, w) → (n, D) float32: roots of the amplitudes of normalised thumbnails under a Hann window."""
    grey = thumbnails.astype(np.float32)
    grey = grey.mean(1) if grey.ndim == 4 else grey
    n, h, w = grey.shape
    grey = grey.reshape(n, SIDE, h // SIDE, SIDE, w // SIDE).mean((2, 4))
    grey -= grey.mean((1, 2), keepdims=True)
    grey /= np.maximum(grey.std((1, 2), keepdims=True), 1.0)
    window = np.hanning(SIDE)
    amplitudes = np.abs(np.fft.rfft2(grey * np.outer(window, window)))
    return np.sqrt(amplitudes).reshape(n, -1).astype(np.float32)


def _near_in_sequence(spectra: np.ndarray, close: int) -> tuple[np.ndarray, np.ndarray]:
    """Which images have the next one, and the next but one, among the `close` most similar to one of the two.

    Returns:
        Two bool arrays, (n − 1,) and (n − 2,).
    """
    n, squares = len(spectra), (spectra**2).sum(1)
    near = np.zeros((2, n), bool)
    for block in np.array_split(np.arange(n), max(1, n // 512)):
        apart = squares - 2 * spectra[block] @ spectra.T  # without the constant of the row
        apart[np.arange(len(block)), block] = -np.inf  # each image is the most similar to itself
        for step in (1, 2):
            for other, first in ((block + step, block), (block - step, block - step)):
                inside = (other >= 0) & (other < n)
                rows = np.flatnonzero(inside)
                target = apart[rows, other[inside]]
                near[step - 1, first[inside]] |= (apart[rows] < target[:, None]).sum(1) <= close
    return near[0, : n - 1], near[1, : max(0, n - 2)]


def _closed_sets(spectra: np.ndarray) -> list[list[int]]:
    """Sets of 3 to n / 10 images whose members have all others of the set, and only those, as their nearest."""
    from scipy.cluster.hierarchy import linkage  # slow to import
    from scipy.spatial.distance import pdist, squareform

    n = len(spectra)
    condensed = pdist(spectra)
    apart = squareform(condensed)
    np.fill_diagonal(apart, -1)
    nearest = apart.argsort(1, kind="stable")[:, : max(3, n // 10)]  # each image first
    sets: dict[int, list[int]] = {i: [i] for i in range(n)}
    found = []
    for step, (a, b, *_) in enumerate(linkage(condensed, "single")):
        left, right = sets.pop(int(a), None), sets.pop(int(b), None)
        if left is None or right is None or len(left) + len(right) > nearest.shape[1]:
            continue
        members = sets[n + step] = left + right
        if len(members) >= 3 and set(nearest[members, : len(members)].flat) == set(members):
            found.append(members)
    return found
