"""The tool for research: variants of a method side by side, each a few changed settings, features computed once.

    python benchmarks/variants.py --data ../shared/data/mvtec_ad/screw --backbone resnet18=WEIGHTS --seeds 3 \\
        'lookup: method=lookup' 'base:' 'deep: network.restoration.depth=6; training.steps=800'

It trains and scores as `Detector.fit` and `evaluate` do, from cached features instead of pictures, and prints a row per
data set, variant and seed, and their medians. Features stay in `--cache` for the next call.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unflaw.cache import Cache, TrainingError, ahead, batched, load, stack
from unflaw.config import Config, make_config
from unflaw.datasets import Dataset, Sample, digest, load_dataset
from unflaw.detector import Detector
from unflaw.features import FeatureExtractor
from unflaw.files import write_atomically
from unflaw.images import ImageError, prepare_mask, read_mask
from unflaw.metrics import PixelAccumulator, image_metrics

METRICS = ("image_auroc", "pixel_auroc", "aupro_30", "pixel_ap")


def raw_features(extractor: FeatureExtractor, paths: Sequence[Path], config: Config, folder: Path) -> Tensor:
    """Aggregated features (N, C_raw, g, g) float16 of pictures, memory-mapped from a file in `folder`, made if absent.

    The name of the file is a digest of everything it depends on: pictures, preparation, backbone, levels, grid.
    """
    parts = config.features.model_dump(include={"backbone", "levels", "grid", "smooth"})
    parts |= {"preparation": config.preparation.model_dump(), "pictures": digest([Sample(p, 0) for p in paths])}
    parts |= {"weights": float(sum(p.abs().double().sum() for p in extractor.backbone.parameters()))}
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"{key}.npy"
    if not path.is_file():
        shape = (len(paths), sum(extractor.level_channels), config.features.grid, config.features.grid)

        def write(temporary: Path) -> None:
            store, done = np.lib.format.open_memmap(temporary, "w+", np.float16, shape), 0
            for group in batched(ahead(lambda p: load(p, config.preparation), paths), 16):
                for picture in group:
                    if isinstance(picture, ImageError):
                        raise TrainingError(str(picture))
                raw = extractor.aggregate(stack([p for p in group if not isinstance(p, ImageError)]))
                store[done : done + len(raw)] = raw.numpy()
                done += len(raw)
            store.flush()

        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, write)
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def project(extractor: FeatureExtractor, raw: Tensor, fit: bool = False) -> Tensor:
    """Raw features → F (N, C, g, g) float16, after fitting the extractor on the first 50 where asked."""
    if fit:
        extractor.fit(raw[:50].float())
    return torch.cat([extractor.project(part.float()).half() for part in raw.split(32)])


def run(config: Config, dataset: Dataset, folder: Path, weights: Path | None) -> dict[str, Any]:
    """Trains and measures one variant on one data set; returns METRICS, seconds, and the false alarms and misses."""
    detector = Detector(config=config, weights=weights)
    extractor = detector.network.features
    train_paths, test = [s.path for s in dataset.train], dataset.test
    train_raw = raw_features(extractor, train_paths, config, folder)
    test_raw = raw_features(extractor, [s.path for s in test], config, folder)
    started = time.perf_counter()
    order = torch.randperm(len(train_raw), generator=torch.Generator().manual_seed(config.training.seed))
    features = project(extractor, train_raw[order], fit=True)
    boxes = torch.tensor([[0, 0, config.preparation.size, config.preparation.size]]).expand(len(features), 4)
    textures = detector._textures()
    embedded = detector.network.embed(torch.from_numpy(np.stack(textures))) if textures else None
    cache = Cache(features, torch.empty(len(features), 0), boxes, [train_paths[i] for i in order.tolist()])
    detector.learn(cache, textures=embedded)
    seconds = time.perf_counter() - started
    scores, pixels = [], PixelAccumulator()
    masks_known = any(sample.mask for sample in test)
    done = 0
    for part in test_raw.split(8):
        with torch.inference_mode():
            fused, scored = detector.network.fuse(detector.network(extractor.project(part.float())))
        scores += scored.tolist()
        for anomaly_map in fused.numpy():
            sample = test[done]
            if masks_known and (not sample.label or sample.mask):
                mask = (
                    prepare_mask(read_mask(sample.mask), config.preparation) if sample.label and sample.mask else None
                )
                pixels.update(anomaly_map, mask)
            done += 1
    labels = [sample.label for sample in test]
    metrics = {**image_metrics(scores, labels), **(pixels.compute() if masks_known else {})}
    return {"seconds": round(seconds, 1)} | {name: metrics.get(name) for name in METRICS}


def variant(text: str, backbone: str, seed: int) -> tuple[str, Config]:
    """A name and its configuration from `name: setting=value; …`; `method=NAME` chooses the method."""
    name, _, rest = text.partition(":")
    settings = dict(part.strip().split("=", 1) for part in rest.split(";") if part.strip())
    method = settings.pop("method", "uranet")
    changes: dict[str, Any] = {"features.backbone": backbone, "training.seed": seed, "training.display_steps": 0}
    for key, value in settings.items():
        try:
            changes[key] = json.loads(value)
        except ValueError:
            changes[key] = value
    return name.strip(), make_config(method, "cpu", changes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, action="append", required=True)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0", help="NAME or NAME=WEIGHTS")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path("runs/features"))
    parser.add_argument("variants", nargs="+", help="'name: setting=value; …'")
    args = parser.parse_args()
    backbone, _, weights = args.backbone.partition("=")
    columns = ("seconds", *METRICS)
    print(f"| data | variant | seed | {' | '.join(columns)} |\n|{'---|' * (3 + len(columns))}")
    for data in args.data:
        dataset = load_dataset(data)
        for text in args.variants:
            rows = []
            for seed in range(args.seeds):
                name, config = variant(text, backbone, seed)
                rows.append(run(config, dataset, args.cache, Path(weights) if weights else None))
                show(dataset.name, name, str(seed), rows[-1])
            if len(rows) > 1:
                known = {c: [row[c] for row in rows if row[c] is not None] for c in columns}
                show(
                    dataset.name, name, "median", {c: median(values) if values else None for c, values in known.items()}
                )


def show(data: str, name: str, seed: str, row: dict[str, Any]) -> None:
    """Prints a row of the table."""
    cells = ["–" if value is None else f"{value:.1f}" if c == "seconds" else f"{value:.4f}" for c, value in row.items()]
    print(f"| {data} | {name} | {seed} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
