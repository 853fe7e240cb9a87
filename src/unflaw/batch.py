"""What is said of many pictures together: parts of several pictures, and discoveries in a batch."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from unflaw import conformal
from unflaw.calibration import Calibration
from unflaw.files import write_atomically
from unflaw.images import ImageError
from unflaw.results import Result, Verdict


class Sink(Protocol):
    """Sees every outcome of `prediction.predict`, in order, and has a last word."""

    def add(self, path: Path, outcome: Result | ImageError) -> None: ...

    def close(self) -> str:
        """Writes what it has to write and says, in one sentence, what came of it."""


@runtime_checkable
class Amending(Protocol):
    """A sink that has something to add to the lines of all pictures, before the file with them takes its name."""

    def amend(self, file: Path) -> None: ...


def part_of(path: Path, rule: str) -> str:
    """The part that a picture shows.

    Args:
        path: Of the picture.
        rule: "folder": pictures of a part share a folder. Else a regular expression that is searched in the path: what
            its first group matches or, if it has none, the whole, is the part.

    Raises:
        ValueError: It is no regular expression, does not match, or finds nothing.
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


class Parts:
    """Several pictures of one part: a combined p-value and a verdict for each part, in a file of JSON lines.

    A part is defective at the calibration's rate, or at the least one that its pictures can certify together: with
    Bonferroni, k times that of one picture. It is for review up to the rate of review, and where it would be good but a
    picture could not be read.

    Args:
        file: To be written.
        paths: All pictures that will come.
        rule: Of `part_of`.
        calibration: Of the detector.
        method: Of `conformal.combine`.

    Raises:
        ValueError: As `part_of`, of any path.
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
        self._found: dict[str, list[tuple[Path, float | None]]] = {}

    def add(self, path: Path, outcome: Result | ImageError) -> None:
        p_value = None
        if isinstance(outcome, Result):
            p_value = outcome.p_estimated if self.calibration.estimated else outcome.p_value
        self._found.setdefault(self._parts[path], []).append((path, p_value))

    def close(self) -> str:
        lines = [self._line(part, found) for part, found in self._found.items()]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomically(self.file, lambda file: file.write_text(text, "utf-8", "backslashreplace"))
        counts = Counter(line["verdict"] for line in lines)
        return (
            f"{self.file}: of {len(lines)} parts {counts['good']} good, {counts['review']} for review, "
            f"{counts['defect']} defective"
        )

    def _line(self, part: str, found: list[tuple[Path, float | None]]) -> dict[str, Any]:
        known = [p_value for _, p_value in found if p_value is not None]
        line: dict[str, Any] = {"part": part, "pictures": [str(path) for path, _ in found]}
        verdict: Verdict = "good"
        if known:
            p_value, calibration = conformal.combine(known, self.method), self.calibration
            rate = calibration.rate
            if not calibration.estimated:
                rate = max(rate, conformal.combine([calibration.smallest] * len(known), self.method))
            if p_value <= rate + 1e-12:
                verdict = "defect"
            elif calibration.review_rate is not None and p_value <= calibration.review_rate:
                verdict = "review"
            line |= {"p_value": p_value, "combination": self.method, "rate": rate, "estimated": calibration.estimated}
        if len(known) < len(found):
            line["unread"] = len(found) - len(known)
            verdict = "review" if verdict == "good" else verdict
        return line | {"verdict": verdict}


class Unread:
    """Why pictures could not be read, in `reasons`."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def add(self, path: Path, outcome: Result | ImageError) -> None:
        if isinstance(outcome, ImageError):
            self.reasons.append(str(outcome))

    def close(self) -> str:
        return f"{len(self.reasons)} pictures could not be read"


class Discoveries:
    """Adds "discovery" to every line of a results file that has a p-value: see `conformal.discoveries`.

    Args:
        rate: The false discovery rate.
        calibration: Of the detector.

    Raises:
        ValueError: The rate is not between 0 and 1.
    """

    def __init__(self, rate: float, calibration: Calibration) -> None:
        conformal.discoveries([], rate)  # refuses a wrong rate before the work
        self.rate, self.smallest = rate, calibration.smallest
        self._p_values: list[float] = []

    def add(self, path: Path, outcome: Result | ImageError) -> None:
        if isinstance(outcome, Result):
            self._p_values.append(outcome.p_value)

    def amend(self, file: Path) -> None:
        def write(temporary: Path) -> None:
            marks = iter(conformal.discoveries(self._p_values, self.rate))
            with file.open(encoding="utf-8") as old, temporary.open("wb") as new:
                for text in old:
                    line = json.loads(text)
                    if "p_value" in line:
                        line["discovery"] = next(marks)
                    new.write(f"{json.dumps(line, ensure_ascii=False)}\n".encode(errors="backslashreplace"))

        write_atomically(file, write)

    def close(self) -> str:
        found, n = conformal.discoveries(self._p_values, self.rate), len(self._p_values)
        least = conformal.least_discoveries(n, self.smallest, self.rate)
        return (
            f"{sum(found)} of {n} pictures are discoveries at a false discovery rate of {self.rate:.2%}; with this "
            f"calibration at least {least} must lie beyond all its pictures"
        )
