"""Report of an evaluation as one self-contained HTML file."""

from __future__ import annotations

import base64
import io
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from unflaw.evaluation.results import Evaluation, defined, mean_metrics
from unflaw.io.files import write_atomically
from unflaw.io.words import count
from unflaw.postprocessing.results import Scale
from unflaw.report.panels import heat_map, label, views

if TYPE_CHECKING:
    from jinja2 import Environment

_METRICS = {
    "image_auroc": ("Image AUROC", "probability that a defective image scores above a good one"),
    "image_ap": ("Image AP", "average precision over images"),
    "image_f1_max": ("Image F1 max", "best F1 over all thresholds; chosen on these images, so an upper bound"),
    "pixel_auroc": ("Pixel AUROC", "probability that a defective pixel scores above a good one"),
    "pixel_ap": ("Pixel AP", "average precision over pixels"),
    "pixel_f1_max": ("Pixel F1 max", "best F1 over all pixel thresholds, also an upper bound"),
    "aupro_30": ("AUPRO 30%", "share of each defect found, averaged over false-positive rates up to 30%"),
    "aupro_05": ("AUPRO 5%", "the same up to 5%, which is closer to practice"),
    "aupimo": ("AUPIMO", "share of each image's defects found while 1 to 10 of 100,000 good pixels are marked"),
    "spro_05": ("sPRO 5%", "as AUPRO 5%, but each defect is found fully once a minimum area of its kind is found"),
}
# metrics at the detector's own thresholds
_DECISIONS = {
    "region_recall": ("Region recall", "share of the true defect areas that a predicted region overlaps"),
    "false_regions": ("False regions", "per good image"),
    "good_with_regions": ("Good with regions", "share of good images with any region"),
    "review_good": ("Good for review", "number of good images sent to review"),
    "review_defective": ("Defects for review", "number of defective images sent to review"),
}
# name -> title, x axis, y axis, end of the x axis; PRO matters at low false-positive rates only
_CURVES = {
    "roc": ("ROC, images", "false-alarm rate", "detection rate", 1.0),
    "pr": ("Precision and recall, images", "recall", "precision", 1.0),
    "pro": ("Per-region overlap, pixels", "false-positive rate", "overlap", 0.3),
    "risk": ("Review by p-value", "share sent to review", "share of errors left", 1.0),
    "risk_uncertainty": ("Review with uncertainty", "share sent to review", "share of errors left", 1.0),
}


def write_report(
    evaluation: Evaluation | Mapping[str, Evaluation],
    path: Path,
    *,
    title: str,
    scale: Scale | Mapping[str, Scale],
    notes: Sequence[str] = (),
    model: Path | None = None,
    own_scale: bool = False,
) -> None:
    """Write an evaluation as one self-contained HTML page, atomically.

    Args:
        evaluation: One evaluation, or several by category, shown below a table of their metrics and means. Besides the
            metrics, `threshold`, `per_defect`, `config` and `timing` of `evaluation.metrics` are shown if present.
        path: File to write; missing folders are created.
        title: Heading, such as "URA-Net on screw".
        scale: Fixed scale of the detector for all heat maps, or those of the categories.
        notes: Sentences below the summary, such as "Synthetic defects on real textures".
        model: Detector file, for the command that sets a threshold.
        own_scale: Colour each heat map on a scale of its own (`Scale.up_to`), which shows evidence below the threshold.

    Raises:
        ImportError: Jinja2 is not installed.
        OSError: The file cannot be written.
    """
    named = evaluation if isinstance(evaluation, Mapping) else {"": evaluation}
    scales = scale if isinstance(scale, Mapping) else dict.fromkeys(named, scale)
    sections = [_section(name, found, scales[name], own_scale) for name, found in named.items()]
    for section in sections:
        section["slider"] = _slider(section, model) if section["rows"] else None
    template = templates().get_template("report.html.j2")
    page = template.render(
        title=title,
        summary=_summary([row for section in sections for row in section["rows"]]),
        notes=notes,
        meanings={name: _METRICS[name] for name in defined(section["metrics"] for section in sections)},
        sections=sections,
        mean=mean_metrics(named),
        own_scale=own_scale,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # file names may not be valid UTF-8
    write_atomically(path, lambda file: file.write_text(page, "utf-8", "backslashreplace"))


def templates() -> Environment:
    """Return the environment with the templates of this folder.

    Raises:
        ImportError: Jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader, StrictUndefined
    except ImportError as error:
        raise ImportError("the report needs Jinja2; install it with: pip install 'unflaw[report]'") from error

    loader, strict = PackageLoader("unflaw", "report"), StrictUndefined
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=strict)
    environment.filters |= {"number": _number, "data_uri": _data_uri, "label": label, "outcome": _outcome}
    return environment


def _slider(section: Mapping[str, Any], model: Path | None) -> dict[str, Any] | None:
    """Scores of good and defective images, thresholds, and ends of the slider; None without a threshold."""
    metrics, rows = section["metrics"], section["rows"]
    threshold, category = metrics.get("threshold"), metrics.get("category")
    if threshold is None:
        return None
    scores = [row["score"] for row in rows]
    return {
        "good": [row["score"] for row in rows if not row["label"]],
        "defective": [row["score"] for row in rows if row["label"]],
        "threshold": threshold,
        "review": metrics.get("review_threshold"),
        "low": min(*scores, threshold),
        "high": max(*scores, threshold),
        "model": "MODEL" if model is None else shlex.quote(str(model)),
        "category": f" --category {shlex.quote(category)}" if category else "",
    }


def _section(name: str, evaluation: Evaluation, scale: Scale, own_scale: bool = False) -> dict[str, Any]:
    """Return the variables of the template for one category."""
    metrics, curves = evaluation.metrics, evaluation.curves
    rows = [row | {"outcome": _outcome(row["verdict"], row["label"])} for row in evaluation.rows]
    per_defect = (metrics.get("per_defect") or {}).values()
    return {
        "name": name,
        "metrics": metrics,
        "decisions": {name: about for name, about in _DECISIONS.items() if metrics.get(name) is not None},
        "defect_columns": list(dict.fromkeys(column for values in per_defect for column in values)),
        "scores": _histogram(rows, metrics.get("threshold"), metrics.get("review_threshold")) if rows else None,
        "curves": [(_points(*curves[name], about[-1]), *about) for name, about in _CURVES.items() if name in curves],
        "cards": [
            (shown, views(shown.result, scale.up_to(shown.result.map) if own_scale else scale, shown.mask))
            for shown in evaluation.shown
        ],
        "scale": scale,
        "colour_bar": heat_map(np.linspace(scale.low, 2 * scale.threshold - scale.low, 256)[None], scale),
        "rows": rows,
        "skipped": evaluation.skipped,
    }


def _outcome(verdict: str, defective: int) -> str:
    """Compare a verdict with the label: "correct", "review", "missed" or "false alarm"."""
    if verdict == "review":
        return verdict
    mistake = "missed" if defective else "false alarm"
    return "correct" if (verdict == "defect") == bool(defective) else mistake


def _summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the numbers of images, false alarms and missed defects as a sentence."""
    clauses, kinds = [], {"good": ("false alarm", "raised a false alarm"), "defective": ("missed", "passed as good")}
    for kind, (mistake, happened) in kinds.items():
        outcomes = [row["outcome"] for row in rows if bool(row["label"]) == (kind == "defective")]
        if outcomes:
            n, total = outcomes.count(mistake), len(outcomes)
            clauses.append(f"{n} of {count(total, f'{kind} image')} ({n / total:.1%}) {happened}")
    if not clauses:
        return "No image was inspected."
    review = sum(row["outcome"] == "review" for row in rows)
    reviewed = f" {review} of {count(len(rows), 'image')} ({review / len(rows):.1%}) went to review." if review else ""
    return f"At the calibrated threshold, {' and '.join(clauses)}.{reviewed}"


def _data_uri(pixels: np.ndarray, side: int = 384) -> str:
    """Encode an image as a data URI of at most `side` pixels, so that a report of 40 images takes a few megabytes."""
    image, data = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((side, side))
    image.save(data, "JPEG", quality=90, subsampling=0)  # subsampled colour would blur outlines
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def _histogram(
    rows: Sequence[Mapping[str, Any]], threshold: float | None, review: float | None = None, bins: int = 48
) -> dict[str, Any]:
    """Count good and defective scores between common edges; the threshold is an edge, so that no bar crosses it.

    "lines" are the thresholds by name; that of review only if it lies between the edges.
    """
    scores, defective = np.array([(row["score"], bool(row["label"])) for row in rows], float).T
    origin = scores.min() if threshold is None else threshold
    low, high = min(scores.min(), origin), max(scores.max(), origin)
    step = (high - low) / bins or 1.0
    edges = origin + step * np.arange(np.floor((low - origin) / step), np.ceil((high - origin) / step) + 1.5)
    scores = np.clip(scores, edges[0], edges[-1])  # rounding may leave the lowest or highest outside
    good, bad = (np.histogram(scores[defective == kind], edges)[0] for kind in (0, 1))
    known = {"threshold": threshold, "review": review}
    lines = {name: at for name, at in known.items() if at is not None and edges[0] <= at <= edges[-1]}
    return {"edges": edges, "good": good, "defective": bad, "lines": lines}


def _points(x: np.ndarray, y: np.ndarray, end: float) -> str:
    """Format a curve for SVG in the unit square, y downward, cut at x = `end`, without indistinguishable points."""
    shown = x <= end
    x, y = np.append(x[shown], min(end, x.max())), np.append(y[shown], np.interp(end, x, y))
    points = np.round(np.column_stack([x / end, 1 - y]), 3)
    points = points[np.append(True, np.diff(points, axis=0).any(axis=1))]
    return " ".join(f"{right:g},{down:g}" for right, down in points)


def _number(value: Any, form: str = ".3f") -> str:
    """Format a value for a table: "–" for None and NaN, floats with the given format."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return format(value, form) if isinstance(value, float) else str(value)
