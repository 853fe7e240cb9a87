"""Commissioning: the first good parts of a new session set the threshold (ours). No torch.

Other light, focus or position move the scores of all images, good and defective ones, by about the same. So the scores
that calibrated before are moved to the median of the new ones and calibrate together with them: few new images are
enough to find the median, and the shape of the distribution stays known. What follows is an estimate, for it assumes
that the shape stayed. The new images alone certify 1 / (n + 1).
"""

from __future__ import annotations

import math

import numpy as np

from unflaw.calibration.scores import CalibrationScores
from unflaw.calibration.thresholds import Calibration
from unflaw.errors import TrainingError
from unflaw.io.words import count

FEWEST = 5  # minimum number of images
FAR = 7.0  # robust deviations of scores; a session that moves them further is no mild change


def move(before: Calibration, found: CalibrationScores, share: float) -> tuple[Calibration, list[str]]:
    """Moves a calibration to a new session, and leaves presumed defects out.

    Args:
        before: Present calibration.
        found: Scores and maps of the images of the new session; those presumed defective are removed from it.
        share: Largest share of defects expected among them, in [0, 1). The highest scores, up to this share, are
            presumed defects if the moved threshold calls them so.

    Returns:
        `before` with moved scores and thresholds, without reserve, and the paths of presumed defects.

    Raises:
        TrainingError: Fewer than `FEWEST` images.
    """
    if len(found.scores) < FEWEST:
        raise TrainingError(f"{count(len(found.scores), 'image')} cannot commission; give {FEWEST} at least")
    scores = np.array(found.scores)
    median = float(np.median(scores))
    shift = median - before.centre  # of images: the highest scores of groups lie above them
    threshold = before.threshold - before.reserve + shift
    most = math.ceil(share * len(scores)) if share else 0
    out = [int(i) for i in np.argsort(-scores)[:most] if scores[i] > threshold]
    paths = [found.paths[i] for i in out]
    found.leave_out(out)
    by = float(np.median(found.medians)) - before.low  # maps move by another amount than scores
    review = before.review_threshold
    return before.model_copy(
        update={
            "scores": tuple(score + shift for score in before.scores),
            "median": median,
            "threshold": threshold,
            "review_threshold": None if review is None else review + shift,
            "pixel_threshold": before.pixel_threshold + by,
            "low": before.low + by,
            "reserve": 0.0,
        }
    ), paths


def warnings(before: Calibration, moved: Calibration, found: CalibrationScores) -> list[str]:
    """Says what does not fit a new session of the same product.

    Args:
        before: Calibration before commissioning.
        moved: The same, moved (`move`).
        found: Scores of the images that are kept.
    """
    said = []
    above = [path for path, score in zip(found.paths, found.scores, strict=True) if score > moved.threshold]
    if above:
        said.append(
            f"{count(len(above), 'image')} more than the stated share of defects would be called defective and count "
            "as good, so they raise the threshold; look at them, and without the defective ones commission again "
            "after `unflaw undo`:" + "".join(f"\n  {path}" for path in above[:20])
        )
    scores = np.array(before.scores)
    spread = 1.4826 * float(np.median(np.abs(scores - np.median(scores))))
    by = moved.centre - before.centre
    if spread > 0 and abs(by) > FAR * spread:
        said.append(
            f"scores moved by {by / spread:.0f} deviations: images so different may hide defects; restore light, focus "
            "and place, or train again with images of this session"
        )
    return said


def describe_commissioning(new: int, before: Calibration, after: Calibration, suspects: int) -> str:
    """Says in one sentence what rate follows."""
    left = f", {suspects} left out as presumed defects," if suspects else ""
    moved = f"scores moved by {after.centre - before.centre:+.3g}"
    return (
        f"{new} images of this session{left} and the {len(before.scores)} that calibrated before, moved to them "
        f"({moved}), give a false-alarm rate of about {after.rate:.2%}; the new ones alone certify {1 / (new + 1):.2%}"
    )
