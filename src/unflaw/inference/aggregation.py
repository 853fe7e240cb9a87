"""Joint results of many images: parts with several images, and discoveries in a batch."""

from __future__ import annotations

import json
import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unflaw.calibration import conformal
from unflaw.calibration.drift import Reference, check_rate
from unflaw.calibration.thresholds import Calibration
from unflaw.errors import ImageError
from unflaw.io.files import write_atomically
from unflaw.io.words import count
from unflaw.postprocessing.results import Result, Verdict

SEVERITY: tuple[Verdict, ...] = ("good", "review", "defect")
ROUNDING = 1e-12  # tolerance for a p-value that equals a rate


class Sink(ABC):
    """Consumer of all outcomes of `predict.predict`, in order."""

    @abstractmethod
    def add(self, path: Path, outcome: Result | ImageError) -> None:
        """Add the outcome of the next image."""

    def amend(self, file: Path) -> None:  # noqa: B027 - most sinks change nothing
        """Change the complete file of lines before it is renamed."""

    @abstractmethod
    def close(self) -> str:
        """Write the output and describe it in a sentence."""


def part_of(path: Path, rule: str) -> str:
    """Return the name of the part that an image shows.

    Args:
        path: Path of the image.
        rule: "folder": images of a part share a folder. Otherwise a regular expression that is searched in the path;
            the part is its first group or, without groups, the whole match.

    Raises:
        ValueError: The rule is not a regular expression, does not match, or matches an empty string.
    """
    if rule == "folder":
        return path.parent.as_posix()
    try:
        found = re.search(rule, path.as_posix())
    except re.error as error:
        raise ValueError(f"{rule!r} is neither 'folder' nor a regular expression ({error})") from error
    if found is None:
        raise ValueError(f"{path}: {rule!r} does not match it, so its part is not known; mend the rule or leave it out")
    part = found[1] if found.re.groups else found[0]
    if not part:
        raise ValueError(f"{path}: what {rule!r} finds in it is empty, so its part is not known; mend the rule")
    return part


class _Image(NamedTuple):
    """One image of a part, with p-value and verdict if it could be read."""

    path: Path
    p_value: float | None = None
    verdict: Verdict | None = None


class Parts(Sink):
    """Combined p-value and verdict for parts with several images each, as JSON lines.

    A part is defective if its combined p-value is at most the calibrated rate, and for review up to the review rate.
    Its verdict is never more severe than the worst one of its images. A good part becomes "review" if an image could
    not be read.

    The combined p-value has a smallest value (`conformal.combination_factor`), which usually grows with the number of
    images. If it exceeds the rate, the part can never be defective; its verdict is then None, with "reason" and
    "missing", the number of further good calibration images that are needed.

    Args:
        file: Output file.
        paths: All images that will be added.
        rule: See `part_of`.
        calibration: Calibration of the detector.
        method: See `conformal.combine`.

    Raises:
        ValueError: See `part_of`, for any path.
    """

    def __init__(
        self,
        file: Path,
        paths: Iterable[Path],
        rule: str,
        calibration: Calibration,
        method: conformal.Combination = "bonferroni",
    ) -> None:
        self.file, self.calibration, self.method = file, calibration, method
        self._parts = {path: part_of(path, rule) for path in paths}
        self._found: dict[str, list[_Image]] = {}

    def add(self, path: Path, outcome: Result | ImageError) -> None:
        image = _Image(path)
        if isinstance(outcome, Result):
            p_value = outcome.p_estimated if self.calibration.estimated else outcome.p_value
            image = _Image(path, p_value, outcome.verdict)
        self._found.setdefault(self._parts[path], []).append(image)

    def close(self) -> str:
        lines = [self._line(part, found) for part, found in self._found.items()]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomically(self.file, lambda file: file.write_text(text, "utf-8", "backslashreplace"))
        counts = Counter(line["verdict"] for line in lines)
        summary = (
            f"{self.file}: of {count(len(lines), 'part')} {counts['good']} good, {counts['review']} for review, "
            f"{counts['defect']} defective"
        )
        if not counts[None]:
            return summary
        most = max((line for line in lines if "missing" in line), key=lambda line: line["missing"])
        return f"{summary}, {counts[None]} without a verdict: {most['reason']}"

    def _line(self, part: str, found: list[_Image]) -> dict[str, Any]:
        known = [image.p_value for image in found if image.p_value is not None]
        line: dict[str, Any] = {"part": part, "images": [str(image.path) for image in found]}
        verdict: Verdict | None = "good"
        if known:
            p_value, calibration = conformal.combine(known, self.method), self.calibration
            line |= {
                "p_value": p_value,
                "combination": self.method,
                "rate": calibration.rate,
                "estimated": calibration.estimated,
            }
            why = self._unreachable(len(known))
            if why:
                line, verdict = line | why, None
            elif p_value <= calibration.rate + ROUNDING:
                verdict = max((image.verdict for image in found if image.verdict is not None), key=SEVERITY.index)
            elif calibration.review_rate is not None and p_value <= calibration.review_rate + ROUNDING:
                verdict = "review"
        if len(known) < len(found):
            line["unread"] = len(found) - len(known)
            verdict = "review" if verdict == "good" else verdict
        return line | {"verdict": verdict}

    def _unreachable(self, k: int) -> dict[str, Any]:
        """Return why k images together can have no verdict; empty if they can."""
        calibration = self.calibration
        n, asked, factor = len(calibration.scores), calibration.asked_rate, conformal.combination_factor(k, self.method)
        least = min(1.0, factor * calibration.smallest_p_value)
        if least <= calibration.rate + ROUNDING:
            return {}
        need = conformal.needed(asked, k, self.method)
        if calibration.estimated and factor < conformal.MAX_EXTRAPOLATION:  # with a tail, which reaches further
            need = math.ceil(factor / (conformal.MAX_EXTRAPOLATION * asked) - ROUNDING) - 1
        reason = (
            f"with {count(n, 'good calibration image')} the p-value of {count(k, 'image')} together cannot be below "
            f"{least:.4g}, and the false-alarm rate is {calibration.rate:.4g}; "
            f"{count(need - n, 'more good calibration image')} would allow a verdict"
        )
        return {"missing": need - n, "reason": reason}


class Unread(Sink):
    """Reasons why images could not be read, in `reasons`."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def add(self, path: Path, outcome: Result | ImageError) -> None:
        if isinstance(outcome, ImageError):
            self.reasons.append(str(outcome))

    def close(self) -> str:
        return f"{count(len(self.reasons), 'image')} could not be read"


def _amend_results(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Changes the lines of a results file that have a p-value, in order."""

    def write(temporary: Path) -> None:
        with file.open(encoding="utf-8") as old, temporary.open("wb") as new:
            for text in old:
                line = json.loads(text)
                if "p_value" in line:
                    line |= change(line)
                new.write(f"{json.dumps(line, ensure_ascii=False)}\n".encode(errors="backslashreplace"))

    write_atomically(file, write)


class ReviewOnDrift(Sink):
    """Sends every image of a batch to review if the batch raises a drift alarm.

    Lines then have the verdict "review", and the one before as "verdict_without_drift".

    Attributes:
        alarmed: True if there was an alarm; known at the end of the batch.

    Raises:
        ValueError: See `drift.Reference.test`.
    """

    def __init__(self, reference: Reference, rate: float) -> None:
        check_rate(rate)
        self.reference, self.rate, self.alarmed = reference, rate, False
        self._described: list[np.ndarray] = []

    def add(self, path: Path, outcome: Result | ImageError) -> None:
        if isinstance(outcome, Result) and outcome.described is not None:
            self._described.append(outcome.described)

    def amend(self, file: Path) -> None:
        self.alarmed = bool(self._described) and self.reference.test(self._described, self.rate).alarm
        if self.alarmed:
            _amend_results(file, lambda line: {"verdict": "review", "verdict_without_drift": line["verdict"]})

    def counts(self, counts: Counter[str]) -> Counter[str]:
        """Numbers of images by verdict and "error" after an alarm, if there was one."""
        if not self.alarmed:
            return counts
        return Counter(review=counts.total() - counts["error"], error=counts["error"])

    def close(self) -> str:
        if self.alarmed:
            return f"drift alarm: {count(len(self._described), 'image')} sent to review"
        return "no drift alarm: verdicts stay"


class Discoveries(Sink):
    """Adds "discovery" to every line of a results file that has a p-value, at a false discovery rate in (0, 1).

    See `conformal.discoveries`; raises its ValueError for another rate.
    """

    def __init__(self, rate: float, calibration: Calibration) -> None:
        conformal.discoveries([], rate)  # checks the rate early
        self.rate, self.calibration = rate, calibration
        self._p_values: list[float] = []

    def add(self, path: Path, outcome: Result | ImageError) -> None:
        if isinstance(outcome, Result):
            self._p_values.append(outcome.p_value)

    def amend(self, file: Path) -> None:
        marks = iter(conformal.discoveries(self._p_values, self.rate))
        _amend_results(file, lambda line: {"discovery": next(marks)})

    def close(self) -> str:
        found, m = sum(conformal.discoveries(self._p_values, self.rate)), len(self._p_values)
        about = "about " if self.calibration.out_of_fold else ""
        summary = (
            f"{count(found, 'discovery', 'discoveries')} among {count(m, 'image')} at a false discovery rate of "
            f"{about}{self.rate:.2%}"
        )
        n, smallest = len(self.calibration.scores), self.calibration.smallest
        least = conformal.least_discoveries(m, smallest, self.rate)
        if least <= m or not m:
            return summary if least == 1 else f"{summary}; with this calibration there are none, or at least {least}"
        return (
            f"{summary}; none are possible: with {count(n, 'good calibration image')} no "
            f"p-value is below {smallest:.4g}; {conformal.needed(self.rate) - n} more would allow some"
        )
