"""The tables of a benchmark: Markdown, CSV, JSON, LaTeX and an HTML page, with intervals and paired differences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

from unflaw.datasets.public import COLLECTIONS
from unflaw.evaluation.bootstrap import METRICS as RESAMPLED
from unflaw.evaluation.bootstrap import PerImage, interval, resampled
from unflaw.evaluation.results import METRICS, defined
from unflaw.experiments.grid import Run
from unflaw.experiments.records import Record, images_file
from unflaw.experiments.tables import short, summary
from unflaw.io.words import count

HEADS = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1_max": "image F1 max",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pixel_f1_max": "pixel F1 max",
    "aupro_30": "AUPRO",
    "aupro_05": "AUPRO 5 %",
    "aupimo": "AUPIMO",
    "spro_05": "sPRO 5 %",
}
COSTS = {
    "training": "training s",
    "memory": "memory GB",
    "file": "file MB",
    "latency_1": "ms per image",
    "latency_1_p95": "p95",
    "latency_32": "ms, batch 32",
}
# Means over the 15 categories of MVTec AD that others publish: image AUROC, pixel AUROC, AUPRO, source.
PUBLISHED = (
    ("PatchCore, WideResNet-50", 0.992, 0.981, 0.944, "README of amazon-science/patchcore-inspection"),
    ("PatchCore, WideResNet-50", 0.980, 0.980, None, "anomalib, page of the model"),
    ("PaDiM, ResNet-18", 0.891, 0.968, None, "anomalib, page of the model"),
    ("Reverse distillation, WideResNet-50", 0.985, 0.969, None, "anomalib, page of the model"),
)
Row = dict[str, Any]


def tabulate(runs: Sequence[Run], records: Mapping[str, Record]) -> list[Row]:
    """A row per data set, method, backbone and size, in the order of the runs, then means over all data sets.

    Args:
        runs: Not all of which need be finished.
        records: Of the finished ones, by digest.

    Returns:
        "data method backbone size n", n the number of finished runs (of a mean: of data sets); for each metric and each
        of COSTS "mean", "deviation" and "median" over the seeds, None where nothing is known. The row of a mean, whose
        "data" is "", is there once all its data sets are; its deviation is None.
    """
    groups: dict[tuple[str, str, str, int], list[Record]] = {}
    for run in runs:
        groups.setdefault(run.row, []).extend([records[run.digest]] if run.digest in records else [])
    rows = [
        dict(zip(("data", "method", "backbone", "size"), key, strict=True))
        | {"n": len(found)}
        | {name: summary([record.metrics.get(name) for record in found]) for name in METRICS}
        | {name: summary([_costs(record)[name] for record in found]) for name in COSTS}
        for key, found in groups.items()
    ]
    return rows + list(_means(rows, len({row["data"] for row in rows})))


def _costs(record: Record) -> dict[str, float | None]:
    one, many = record.latency.get("1"), record.latency.get("32")
    return {
        "training": record.seconds["training"],
        "memory": record.memory and record.memory / 1e9,
        "file": record.file and record.file / 1e6,
        "latency_1": one.median * 1e3 if one else None,
        "latency_1_p95": one.p95 * 1e3 if one else None,
        "latency_32": many.median * 1e3 if many else None,
    }


def _means(rows: Sequence[Row], datasets: int) -> Iterable[Row]:
    same: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        same[row["method"], row["backbone"], row["size"]].append(row)
    for (method, backbone, size), members in same.items():
        if datasets > 1 and all(row["n"] for row in members):
            mean: Row = {"data": "", "method": method, "backbone": backbone, "size": size, "n": len(members)}
            for name in (*METRICS, *COSTS):
                known = {how: [row[name][how] for row in members if row[name][how] is not None] for how in _MIDDLES}
                mean[name] = {how: fmean(values) if values else None for how, values in known.items()}
                mean[name]["deviation"] = None
            yield mean


_MIDDLES = ("mean", "median")


def intervals(runs: Sequence[Run], records: Mapping[str, Record], out: Path) -> tuple[list[Row], list[Row]]:
    """95 % intervals of rows, and of differences between rows on the same images, by bootstrap (`statistics`).

    Returns:
        Rows "data method backbone size" with "low" and "high" of each of RESAMPLED; and rows "data size a b", of each
        two that differ in method or backbone alone, with "difference", "low", "high" and "certain": whether 0 lies
        outside. None where undefined. Runs whose images are no longer there take no part.
    """
    samples: dict[tuple[str, str, str, int], list[PerImage]] = defaultdict(list)
    for run in runs:
        file = images_file(out, run.digest)
        if run.digest in records and file.is_file():
            samples[run.row].append(PerImage.load(file))
    values = {key: {name: resampled(found, name) for name in RESAMPLED} for key, found in samples.items()}
    rows = []
    for key, by_metric in values.items():
        row = dict(zip(("data", "method", "backbone", "size"), key, strict=True))
        rows.append(row | {name: None if v is None else _bounds(v) for name, v in by_metric.items()})
    pairs = []
    for a, b in combinations(values, 2):
        if (a[0], a[3]) == (b[0], b[3]) and (a[1] == b[1]) != (a[2] == b[2]):
            pair = {"data": a[0], "size": a[3], "a": _label(*a[1:3]), "b": _label(*b[1:3])}
            for name in RESAMPLED:
                first, second = values[a][name], values[b][name]
                if first is not None and second is not None and samples[a][0].names == samples[b][0].names:
                    difference = fmean(_point(samples[a], name)) - fmean(_point(samples[b], name))
                    bounds = _bounds(first - second)
                    certain = bounds["low"] > 0 or bounds["high"] < 0
                    pair[name] = {"difference": difference, **bounds, "certain": certain}
                else:
                    pair[name] = None
            pairs.append(pair)
    return rows, pairs


def _bounds(values: Any) -> dict[str, float]:
    return dict(zip(("low", "high"), interval(values), strict=True))


def _point(samples: Sequence[PerImage], metric: str) -> list[float]:
    """The metric itself: every image once."""
    found = [sample.values(metric, (sample.labels >= 0)[None].astype(float)) for sample in samples]
    return [float(value[0]) for value in found if value is not None]


def _label(method: str, backbone: str) -> str:
    return f"{method}, {backbone}" if backbone else method


def sections(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by data set, the means last."""
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["data"]].append(row)
    return found


def shown(rows: Sequence[Row]) -> list[str]:
    """The metrics that have a column."""
    return defined([{name: row[name]["median"] for name in METRICS} for row in rows])


def measured(rows: Sequence[Row]) -> dict[str, str]:
    """The costs that have a column, and its head: those that are known of any row."""
    return {name: head for name, head in COSTS.items() if any(row[name]["median"] is not None for row in rows)}


def heading(data: str, rows: Sequence[Row]) -> str:
    return data or f"Mean over {count(max(row['n'] for row in rows), 'data set')}"


def preamble(made: Mapping[str, Any]) -> str:
    """How the figures were made and what they mean, in a few sentences."""
    seeds = f"medians over the seeds 0 to {made['seeds'] - 1}" if made["seeds"] > 1 else "seed 0"
    left, sharing = made["runs"] - made["finished"], made["shared"]
    unfinished = f"; {left} {'is' if left == 1 else 'are'} not finished" if left else ""
    parts = [
        f"{count(made['finished'], 'run')}, {seeds}{unfinished}",
        *([f"Weights: {', '.join(made['weights'])}"] if made["weights"] else []),
        *([f"Settings: {'; '.join(made['settings'])}"] if made["settings"] else []),
        *[", ".join(part) for part in (made["machines"], made["versions"]) if part],
    ]
    shared = f"Of {count(sharing, 'run')} with shared features it counts from these on. " if sharing else ""
    return (
        f"{'. '.join(parts)}. [In brackets]: where 95 % of bootstrap resamples of the test images lie. AUPRO: up to "
        "a rate of false positives of 0.3. Training: from files to saved detector, in a process of its own, whose "
        f"largest memory is given. {shared}Milliseconds: from file to result, warm. Of anomalib's methods training and "
        "milliseconds are without reading and resizing. –: undefined or not run."
    )


def published(rows: Sequence[Row]) -> Sequence[tuple[str, float, float, float | None, str]]:
    """PUBLISHED where the rows are of all of MVTec AD, so that the means can be compared; else nothing."""
    return PUBLISHED if {row["data"] for row in rows} - {""} == COLLECTIONS[0].counts.keys() else ()


def markdown(rows: Sequence[Row], bounds: Sequence[Row], pairs: Sequence[Row], made: Mapping[str, Any]) -> str:
    """A table per data set and one of the means, then the differences."""
    names = shown(rows)
    around = {_key(row): row for row in bounds}
    heads = ["method", "backbone", "size", *(HEADS[name] for name in names), *measured(rows).values(), "n"]
    lines = [preamble(made)]
    for data, members in sections(rows).items():
        lines += ["", f"## {heading(data, members)}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for row in members:
            known = around.get(_key(row), {})
            metrics = [_number(row[name]["median"]) + _brackets(known.get(name)) for name in names]
            cells = [row["method"], row["backbone"] or "–", str(row["size"]), *metrics]
            cells += [*costs(row, measured(rows)), str(row["n"])]
            lines.append(f"| {' | '.join(cells)} |")
    if others := published(rows):
        lines += ["", "Published by others, not measured here:", "", "| | image AUROC | pixel AUROC | AUPRO | source |"]
        lines += ["|---|---|---|---|---|"]
        lines += [
            f"| {who} | {_number(i)} | {_number(p)} | {_number(o)} | {source} |" for who, i, p, o, source in others
        ]
    if pairs:
        lines += ["", "## Differences on the same images", "", MEANING.replace("*", "\\*"), ""]
        lines += [
            f"| data | size | difference | {' | '.join(HEADS[name] for name in RESAMPLED)} |",
            "|---|---|---|---|---|---|",
        ]
        for pair in pairs:
            cells = [difference(pair[name]) for name in RESAMPLED]
            lines.append(f"| {pair['data']} | {pair['size']} | {pair['a']} − {pair['b']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


MEANING = (
    "Means over the seeds, with 95 % intervals over resampled test images. *: 0 lies outside. What another draw of "
    "training images would change is not in them, and with many comparisons some exclude 0 by chance."
)


def latex(rows: Sequence[Row]) -> str:
    """One `tabular` for the package booktabs: image AUROC / pixel AUROC / AUPRO in percent, data sets as columns."""
    parts = sections(rows)
    keys = list(dict.fromkeys((row["method"], row["backbone"], row["size"]) for row in rows))
    by_key = {(row["data"], row["method"], row["backbone"], row["size"]): row for row in rows}
    lines = [f"\\begin{{tabular}}{{lll{'c' * len(parts)}}}", "\\toprule"]
    titles = [_escaped(data or "mean") for data in parts]
    lines += [" & ".join(["method", "backbone", "size", *titles]) + " \\\\", "\\midrule"]
    for method, backbone, size in keys:
        cells = [_escaped(method), _escaped(backbone) or "--", str(size)]
        for data in parts:
            row = by_key.get((data, method, backbone, size))
            values = [row[name]["median"] if row else None for name in RESAMPLED]
            cells.append(" / ".join("--" if value is None else f"{100 * value:.1f}" for value in values))
        lines.append(" & ".join(cells) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _escaped(text: str) -> str:
    return "".join(f"\\{sign}" if sign in "_&%#$" else sign for sign in text)


def _key(row: Row) -> tuple[Any, ...]:
    return row["data"], row["method"], row["backbone"], row["size"]


def _number(value: float | None) -> str:
    return "–" if value is None else short(value)


def _brackets(bounds: Mapping[str, float] | None) -> str:
    return f" [{short(bounds['low'])}, {short(bounds['high'])}]" if bounds else ""


def costs(row: Row, names: Iterable[str]) -> list[str]:
    """Some of a row's COSTS as text."""
    forms = {"memory": ".1f"}
    values = [(name, row[name]["median"]) for name in names]
    return ["–" if value is None else format(value, forms.get(name, ".0f")) for name, value in values]


def difference(found: Mapping[str, Any] | None) -> str:
    """`+.012 [+.003, +.020] *`."""
    if found is None:
        return "–"
    low, high = (short(found[name], "+") for name in ("low", "high"))
    return f"{short(found['difference'], '+')} [{low}, {high}]{' *' if found['certain'] else ''}"
