"""Tables of an experiment: one pandas DataFrame, written as Markdown, CSV, JSON and LaTeX.

`by_run` has a row per run and seed. `summarize` makes a row per cell of the grid of it, with `mean`, `deviation` and
`median` over the seeds, the paired `difference` from the variant `full`, and the bounds `low` and `high` of a bootstrap
interval. All writers show that table; `run.write_tables` calls them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from unflaw.datasets.public import COLLECTIONS
from unflaw.evaluation.bootstrap import METRICS as RESAMPLED
from unflaw.evaluation.bootstrap import PerImage, interval, resampled
from unflaw.evaluation.metrics import Array
from unflaw.evaluation.results import METRICS, defined
from unflaw.experiments.grid import Run
from unflaw.experiments.records import Record, images_file
from unflaw.experiments.variants import FULL
from unflaw.io.words import count

if TYPE_CHECKING:
    from pandas import DataFrame, Series

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
FIGURES = [*METRICS, *COSTS]
KEYS = ["data", "method", "variant", "backbone", "size"]
# Means over the 15 categories of MVTec AD.
PUBLISHED = (
    ("PatchCore, WideResNet-50", ".992", ".981", ".944", "README of amazon-science/patchcore-inspection"),
    ("PatchCore, WideResNet-50", ".980", ".980", "–", "anomalib, page of the model"),
    ("PaDiM, ResNet-18", ".891", ".968", "–", "anomalib, page of the model"),
    ("Reverse distillation, WideResNet-50", ".985", ".969", "–", "anomalib, page of the model"),
)
MEANING = (
    "Means over the seeds, with 95 % intervals over resampled test images. *: 0 lies outside. They do not "
    "include variation due to the choice of training images, and with many comparisons some exclude 0 by chance."
)


def pandas() -> Any:
    """The module.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError("tables need pandas; install it with: pip install 'unflaw[train]'") from error
    return pandas


def by_run(runs: Sequence[Run], records: Mapping[str, Record]) -> DataFrame:
    """A row per run: KEYS, "seed", "finished", "overrides" and "why" of the variant, METRICS and COSTS (NaN: unknown).

    Records are found by digest, so that runs of equal settings share one.
    """
    rows = []
    for run in runs:
        record = records.get(run.digest)
        row: dict[str, Any] = dict(zip(KEYS, run.row, strict=True)) | {"seed": run.seed, "finished": record is not None}
        row |= {"overrides": run.variant.overrides, "why": run.variant.why} | dict.fromkeys(FIGURES)
        rows.append(row | (_figures(record) if record else {}))
    return pandas().DataFrame(rows).astype(dict.fromkeys(FIGURES, float))


def _figures(record: Record) -> dict[str, float | None]:
    one, many = record.latency.get("1"), record.latency.get("32")
    return {name: record.metrics.get(name) for name in METRICS} | {
        "training": record.seconds["training"],
        "memory": record.memory and record.memory / 1e9,
        "file": record.file and record.file / 1e6,
        "latency_1": one.median * 1e3 if one else None,
        "latency_1_p95": one.p95 * 1e3 if one else None,
        "latency_32": many.median * 1e3 if many else None,
    }


def summarize(runs: DataFrame, samples: Mapping[tuple[Any, ...], Bootstrap] | None = None) -> DataFrame:
    """A row per cell of the grid, in the order of the runs, then means over the data sets.

    Args:
        runs: From `by_run`.
        samples: From `bootstrap`.

    Returns:
        Index KEYS; columns (figure, statistic): "mean", "deviation" (standard deviation of a sample) and "median" over
        the seeds; of METRICS "difference", the mean difference from `FULL` with the same seed; of RESAMPLED "low" and
        "high", between which 95 % of the resamples lie. Then "n", the number of finished runs (of a mean: of data
        sets), "overrides" and "why". NaN where undefined. A mean, whose data is "", is there once all its data sets
        have finished runs.
    """
    groups = runs.groupby(KEYS, sort=False)
    table = groups[FIGURES].agg(["mean", "std", "median"]).rename(columns={"std": "deviation"}, level=1)
    same = ["data", "method", "backbone", "size", "seed"]
    full = runs[runs["variant"] == FULL.name].set_index(same)[[*METRICS]]
    more = runs[[*METRICS]] - full.reindex(pandas().MultiIndex.from_frame(runs[same])).to_numpy()
    for name, values in more.groupby([runs[key] for key in KEYS], sort=False).mean().items():
        table[name, "difference"] = values
    for name in RESAMPLED:
        found = [samples[row].values.get(name) if samples and row in samples else None for row in table.index]
        bounds = np.array([(np.nan, np.nan) if values is None else interval(values) for values in found])
        table[name, "low"], table[name, "high"] = bounds.T
    table["n", ""] = groups["finished"].sum()
    for name in ("overrides", "why"):
        table[name, ""] = groups[name].first()
    if runs["data"].nunique() == 1:
        return table
    cells, special = table.groupby(KEYS[1:], sort=False), {"n": "size", "overrides": "first", "why": "first"}
    how = {column: special.get(column[0], "mean") for column in table if column[1] not in ("deviation", "low", "high")}
    means = cells.agg(how)[cells["n"].min() > 0]
    return pandas().concat([table, pandas().concat({"": means}, names=["data"])])


class Bootstrap(NamedTuple):
    """A row of the table on resamples of its test images.

    Attributes:
        images: Names of the test images.
        points: Metrics of RESAMPLED, of every image once, means over the seeds; undefined ones are left out.
        values: Of the same metrics, the values on all resamples.
    """

    images: list[str]
    points: dict[str, float]
    values: dict[str, Array]


def bootstrap(runs: Sequence[Run], records: Mapping[str, Record], out: Path) -> dict[tuple[Any, ...], Bootstrap]:
    """By `Run.row`, of the finished runs whose images are kept."""
    files: dict[tuple[Any, ...], list[Path]] = defaultdict(list)
    for run in runs:
        file = images_file(out, run.digest)
        if run.digest in records and file.is_file():
            files[run.row].append(file)
    return {row: _bootstrap(tuple(found)) for row, found in files.items()}


@cache  # a file never changes: its name is the digest of all that decides its content
def _bootstrap(files: tuple[Path, ...]) -> Bootstrap:
    samples = [PerImage.load(file) for file in files]
    once = np.ones((1, len(samples[0].names)))
    found = {name: resampled(samples, name) for name in RESAMPLED}
    values = {name: value for name, value in found.items() if value is not None}
    points = {name: float(np.mean([sample.values(name, once) for sample in samples])) for name in values}
    return Bootstrap(samples[0].names, points, values)


def differences(samples: Mapping[tuple[Any, ...], Bootstrap]) -> list[dict[str, Any]]:
    """Differences on the same images between rows that differ in one of method, variant and backbone.

    Variants are compared with `FULL` of the same method; methods and backbones are compared by their `FULL`.

    Returns:
        "data size a b", and for each of RESAMPLED None or "difference", "low", "high" and "certain": 0 lies outside.
    """
    pairs = []
    for first, second in combinations(samples, 2):
        differ = [key for key, x, y in zip(KEYS, first, second, strict=True) if x != y]
        if len(differ) > 1 or differ[0] in ("data", "size") or FULL.name not in (first[2], second[2]):
            continue
        a, b = (second, first) if differ == ["variant"] else (first, second)  # a variant minus `FULL`, which is first
        x, y = samples[a], samples[b]
        pair = {"data": a[0], "size": a[4], "a": row_label(a), "b": row_label(b)}
        for name in RESAMPLED:
            pair[name] = None
            if name in x.values and name in y.values and x.images == y.images:
                low, high = interval(x.values[name] - y.values[name])
                pair[name] = {"difference": x.points[name] - y.points[name], "low": low, "high": high}
                pair[name]["certain"] = low > 0 or high < 0
        pairs.append(pair)
    return pairs


# From a table to text


class Section(NamedTuple):
    """A table with its title, as text; `rows` are the numbers of the same rows, if it is one of figures."""

    title: str
    text: DataFrame
    rows: DataFrame | None = None
    note: str = ""


def sections(table: DataFrame, pairs: Sequence[Mapping[str, Any]]) -> list[Section]:
    """A section per data set, the means, published figures that can be compared with them, and the differences."""
    text, found = as_text(table), []
    for data, rows in table.groupby(level="data", sort=False):
        title = data or f"Mean over {count(rows['n'].max(), 'data set')}"
        found.append(Section(title, text.loc[rows.index], rows))
    heads = [HEADS[name] for name in RESAMPLED]
    if set(table.index.unique("data")) - {""} == COLLECTIONS[0].counts.keys():
        others = pandas().DataFrame(PUBLISHED, columns=["", *heads, "source"])
        found.append(Section("Published by others, not measured here", others))
    if pairs:
        lines = [
            [
                pair["data"],
                str(pair["size"]),
                f"{pair['a']} − {pair['b']}",
                *(_change(pair[name]) for name in RESAMPLED),
            ]
            for pair in pairs
        ]
        changes = pandas().DataFrame(lines, columns=["data", "size", "difference", *heads])
        found.append(Section("Differences on the same images", changes, note=MEANING))
    return found


def _change(found: Mapping[str, Any] | None) -> str:
    """`+.012 [+.003, +.020] *`."""
    if found is None:
        return "–"
    difference, low, high = (short(found[name], "+") for name in ("difference", "low", "high"))
    return f"{difference} [{low}, {high}]{' *' if found['certain'] else ''}"


def as_text(table: DataFrame) -> DataFrame:
    """The table for readers: text, and only columns in which something is known; the index is that of the table.

    A metric is shown as `median [low, high]`; where there are variants, as `mean ± deviation (difference from FULL)`.
    """
    text = table.index.to_frame()[["method", "variant", "backbone", "size"]].replace("", "–").astype(str)
    varied = text["variant"] != FULL.name

    def part(values: Series, form: str = "{}", sign: str = "-") -> Series:
        return values.map(lambda value: "" if np.isnan(value) else form.format(short(value, sign)))

    known = [name for name in FIGURES if table[name]["median"].notna().any()]
    for name in defined([dict.fromkeys(known)]):
        found = table[name]
        if varied.any():
            cells = part(found["mean"]) + part(found["deviation"], " ± {}")
            cells += part(found["difference"].where(varied), " ({})", "+")
        else:
            cells = part(found["median"])
            cells += part(found["low"], " [{}, ") + part(found["high"], "{}]") if name in RESAMPLED else ""
        text[HEADS[name]] = cells.replace("", "–")
    for name, head in COSTS.items():
        if name in known:
            form = "{:.1f}" if name == "memory" else "{:.0f}"
            text[head] = table[name]["median"].map(form.format, na_action="ignore").fillna("–")
    text["n"] = table["n"].astype(str)
    text["changed"] = [f"`{changes}`" if changes else "" for changes in table["overrides"]]
    return text if varied.any() else text.drop(columns=["variant", "changed"])


def short(value: float, sign: str = "-") -> str:
    """Three decimals, without the zero before the point, with a true minus."""
    return f"{round(value, 3) + 0.0:{sign}.3f}".replace("0.", ".", 1).replace("-", "−")


def row_label(row: tuple[Any, ...], size: bool = False) -> str:
    """Method, variant and backbone of a row of the index, without empty and default values, and on request its size."""
    _, method, variant, backbone, side = row
    parts = [method, "" if variant == FULL.name else variant, backbone, str(side) if size else ""]
    return ", ".join(filter(None, parts))


def describe(runs: Sequence[Run], records: Mapping[str, Record]) -> dict[str, Any]:
    """Circumstances of the figures: numbers of runs, seeds, variants, settings, weights, machines, versions."""
    done = [(run, records[run.digest]) for run in runs if run.digest in records]
    return {
        "runs": len(runs),
        "finished": len(done),
        "seeds": max(run.seed for run in runs) + 1,
        "variants": list(dict.fromkeys(run.variant.name for run in runs)),
        "settings": sorted({run.settings for run in runs if run.settings}),
        "weights": sorted(
            {f"{run.trained_backbone}: {record.weights}" for run, record in done if run.trained_backbone}
        ),
        "machines": sorted({record.machine for _, record in done}),
        "versions": sorted({f"unflaw {record.unflaw}, torch {record.torch}" for _, record in done}),
        "shared": sum(record.shared for _, record in done),
    }


def preamble(about: Mapping[str, Any]) -> str:
    """Explanation of the figures in a few sentences: how they were made, and what they mean."""
    compared, seeds = about["variants"] != [FULL.name], "seed 0"
    if about["seeds"] > 1:
        seeds = f"{'' if compared else 'medians over the '}seeds 0 to {about['seeds'] - 1}"
    left, sharing = about["runs"] - about["finished"], about["shared"]
    unfinished = f"; {left} {'is' if left == 1 else 'are'} not finished" if left else ""
    parts = [
        f"{count(about['finished'], 'run')}, {seeds}{unfinished}",
        *([f"Weights: {', '.join(about['weights'])}"] if about["weights"] else []),
        *([f"Settings: {'; '.join(about['settings'])}"] if about["settings"] else []),
        *[", ".join(part) for part in (about["machines"], about["versions"]) if part],
    ]
    figures = (
        f"Metrics: mean ± standard deviation over n seeds (mean difference from {FULL.name} with the same seed). "
        "Costs: medians."
        if compared
        else "[In brackets]: where 95 % of bootstrap resamples of the test images lie."
    )
    shared = f"For {count(sharing, 'run')} with shared features, training excludes extraction. " if sharing else ""
    return (
        f"{'. '.join(parts)}. {figures} AUPRO: up to a rate of false positives of 0.3. Training: from files to saved "
        f"detector, each run in a process of its own; memory is its peak. {shared}Milliseconds: from file to result, "
        "warm. For anomalib's methods, times exclude reading and resizing. –: undefined or not run."
    )


# Writers


def markdown(parts: Sequence[Section], preamble: str) -> str:
    """All sections, below each other."""
    text = preamble + "\n"
    for part in parts:
        note = part.note.replace("*", "\\*") + "\n\n" if part.note else ""
        text += f"\n## {markdown_text(part.title)}\n\n{note}{markdown_table(part.text)}"
    return text


def markdown_text(text: object) -> str:
    """Text for a cell or a heading in Markdown: names cannot end the cell or be read as HTML."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")


def markdown_table(text: DataFrame) -> str:
    """A DataFrame of text in Markdown, without its index."""
    rows = (text.columns, *text.itertuples(index=False))
    lines = [f"| {' | '.join(map(markdown_text, cells))} |" for cells in rows]
    return "\n".join([lines[0], "|---" * len(text.columns) + "|", *lines[1:]]) + "\n"


def comma_separated(table: DataFrame) -> str:
    """A DataFrame as CSV, without its index; the column (figure, statistic) is `<figure>_<statistic>`."""
    names = ["_".join(filter(None, column)) if isinstance(column, tuple) else column for column in table]
    return str(table.to_csv(index=False, header=names, lineterminator="\n"))


def nested(table: DataFrame) -> list[dict[str, Any]]:
    """Rows for JSON: the column (figure, statistic) is `row[figure][statistic]`, NaN None."""
    flat, rows = table.reset_index(), []
    for values in flat.astype(object).where(flat.notna(), None).to_dict("records"):
        row: dict[str, Any] = {}
        for (name, statistic), value in values.items():
            if statistic:
                row.setdefault(name, {})[statistic] = value
            else:
                row[name] = value
        rows.append(row)
    return rows


def latex(table: DataFrame) -> str:
    """One `tabular` for the package booktabs: image AUROC / pixel AUROC / AUPRO in percent, data sets as columns."""
    medians = table.xs("median", axis=1, level=1)[[*RESAMPLED]]
    cells = medians.map(lambda value: "--" if np.isnan(value) else f"{100 * value:.1f}").agg(" / ".join, axis=1)
    wide = cells.unstack("data", fill_value=" / ".join(["--"] * len(RESAMPLED)), sort=False)
    wide = wide.rename(columns={"": "mean"}).reset_index().replace({"backbone": {"": "--"}})
    if set(wide["variant"]) == {FULL.name}:
        wide = wide.drop(columns="variant")
    keys = sum(name in KEYS for name in wide)
    special = str.maketrans({"|": "\\textbar{}", "<": "\\textless{}", ">": "\\textgreater{}"})  # pandas escapes others
    made = wide.to_latex(index=False, escape=True, column_format="l" * keys + "c" * (len(wide.columns) - keys))
    return str(made).translate(special)
