"""Realised against guaranteed false-alarm rates on the good images of data sets, with the method nearest_neighbor.

    python benchmarks/reliability.py ../shared/data/mvtec_ad/screw … --models 10

Prints a Markdown table. The good images of the training and the test part are pooled and split at random for every
model. "hold-out": a fifth of them, at least 50, are test images; the rest trains as `unflaw train` does, and a fifth of
it calibrates, each image scored without its own prototypes. "not learned": the same with
`calibration.update_memory=false`, so calibration images add no prototypes and the rates are certified.
"cross-fitting": 40 images train and calibrate, all others are test images. "as it comes": the training part of the set
trains and calibrates, and its own good test images are tested; nothing ensures that these are exchangeable.

Memory banks have a quarter of their usual size, so that many models take minutes; guarantees hold for any size.

The interval holds 95 of 100 counts of false alarms if good images are exchangeable. Each model's count is
beta-binomial, since one calibration serves all its test images. If calibration images also add prototypes, this law
does not hold, and only twice the rate is proved; the same interval is printed for comparison.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

from unflaw.calibration.thresholds import calibrate
from unflaw.config import make_config
from unflaw.datasets import Dataset, load_dataset
from unflaw.experiments.feature_store import CachedDetector, FeatureFile
from unflaw.methods import create

RATES = (0.1, 0.05, 0.02, 0.01)
SMALL = {"training.display_steps": 0, "network.prototypes": 1024, "network.regional_prototypes": 4096}
FEW = 40  # images of cross-fitting
Counts = list[tuple[int, int, int, int]]  # false alarms, good test images, k and n of the calibration, by model


def main(data: Sequence[Path], models: int) -> None:
    torch.set_num_threads(1)
    print("| set | split | models | calibrated on | nominal | guaranteed | realised | 95 % of counts | within |")
    print("|---|---|---|---|---|---|---|---|---|")
    for path in data:
        dataset = load_dataset(path)
        for name, counts in measured(dataset, models):
            for rate, found in counts.items():
                print(row(dataset.name, name, rate, found), flush=True)


def measured(dataset: Dataset, models: int) -> Iterator[tuple[str, dict[float, Counts]]]:
    """Yield the name of each split, and its counts by rate."""
    given = [sample.path for sample in (*dataset.train, *dataset.validation)]
    own = [sample.path for sample in dataset.test if sample.label == 0]
    every = np.array([*given, *own])
    config = make_config("nearest_neighbor", changes=SMALL)
    extractor = create(config).features
    with tempfile.TemporaryDirectory(prefix="unflaw-reliability-") as folder:
        file = FeatureFile(Path(folder) / "features.npy", every, extractor, config.preparation)

        def counts(
            train: Sequence[Path], test: Sequence[Path], **options: Any
        ) -> dict[float, tuple[int, int, int, int]]:
            changed = make_config(
                "nearest_neighbor", changes=SMALL | {f"calibration.{name}": v for name, v in options.items()}
            )
            detector = CachedDetector(changed, extractor.backbone, file).fit(train)
            good = detector.select().scores
            scores = [found.score for found in detector.inspect_many(test, on_error="skip")]
            result = {}
            for rate in RATES:
                calibration = calibrate(good, [0.0] * len(good), 0.0, rate)
                alarms = sum(calibration.verdict(score) == "defect" for score in scores)
                result[rate] = alarms, len(scores), round(calibration.rate * (len(good) + 1)), len(good)
            return result

        rng = np.random.default_rng(0)
        found = defaultdict[str, list[Any]](list)
        for _ in range(models):
            order = rng.permutation(every)
            tests = max(50, len(every) // 5)
            for name, options in (("hold-out", {}), ("not learned", {"update_memory": False})):
                found[name].append(counts(order[tests:].tolist(), order[:tests].tolist(), **options))
            found["cross-fitting"].append(counts(order[:FEW].tolist(), order[FEW:].tolist(), folds=FEW))
        if own:
            found["as it comes"].append(counts(given, own))
            found["as it comes, not learned"].append(counts(given, own, update_memory=False))
        for name, models_of in found.items():
            yield name, {rate: [one[rate] for one in models_of] for rate in RATES}


def row(dataset: str, split: str, rate: float, counts: Counts) -> str:
    alarms, tests = (sum(column) for column in list(zip(*counts, strict=True))[:2])
    rng = np.random.default_rng(1)
    drawn = sum(stats.betabinom.rvs(m, k, n + 1 - k, size=20_000, random_state=rng) for _, m, k, n in counts)
    low, high = np.quantile(drawn, [0.025, 0.975])
    k, n = counts[0][2:]
    guaranteed = f"{k / (n + 1):.2%}" + ("" if k / (n + 1) <= rate else " (more is not certified)")
    within = "yes" if low <= alarms <= high else "below" if alarms < low else "above"
    return (
        f"| {dataset} | {split} | {len(counts)} | {n} | {rate:.0%} | {guaranteed} "
        f"| {alarms / tests:.2%} ({alarms} of {tests}) | {low / tests:.2%} to {high / tests:.2%} | {within} |"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", type=Path)
    parser.add_argument("--models", type=int, default=10, help="number of random splits of each kind")
    arguments = parser.parse_args()
    main(arguments.data, arguments.models)
