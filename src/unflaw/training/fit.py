"""Training of a detector, from images to calibration: read → cache → split → train → calibrate. Read top to bottom."""

from __future__ import annotations

import copy
import math
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unflaw import registry
from unflaw._version import __version__
from unflaw.calibration.crossfit import (
    cross_fit,
    cross_fit_memory,
    find_outliers,
    fit_normalization,
    leave_one_out,
    score_held_out,
)
from unflaw.calibration.outliers import ALL, HELD_OUT, outliers
from unflaw.calibration.reserve import WINDOWS, reserve_of, score_rises
from unflaw.config import Config, Weights
from unflaw.datasets.samples import SHORT, content_keys, digest
from unflaw.errors import TrainingError
from unflaw.features.backbones import patch_of
from unflaw.features.cache import MINIMUM, Cache, Source, build_cache
from unflaw.features.extractor import PixelExtractor
from unflaw.io.progress import Progress, silent
from unflaw.io.words import count
from unflaw.methods import Method, create
from unflaw.methods.decoder import DisplayDecoder
from unflaw.methods.feature_set import Context
from unflaw.methods.synthesis import texture_images
from unflaw.parallel.process_group import SINGLE_PROCESS, ProcessGroup
from unflaw.training.canvas import fit_canvas
from unflaw.training.cleaning import describe_dropped, drop_strangest
from unflaw.training.decoder import fit_display
from unflaw.training.few import describe_few, few_config, fit_few, read_views
from unflaw.training.loop import seeded, step_rng, train
from unflaw.training.splits import (
    Category,
    Data,
    build_drift_reference,
    check_groups,
    resolve_data,
    split_calibration,
    with_groups,
    without_copies,
)


@dataclass(frozen=True)
class Fitted:
    """Result of a training.

    Attributes:
        network: Trained network.
        display: Decoder that draws restored features; None if there is none.
        categories: Network, calibration and drift reference of each category.
        record: Facts about the training, as in `Detector.record_`.
    """

    network: Method
    display: DisplayDecoder | None
    categories: dict[str, Category]
    record: dict[str, Any]


def fit(
    config: Config,
    data: Data | Mapping[str, Data],
    backbone: nn.Module,
    *,
    weights: str = "",
    source: Source | None = None,
    progress: Progress = silent,
    checkpoint: Path | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Fitted:
    """Trains a detector on good images; see `Detector.fit`.

    Args:
        config: Configuration of the detector.
        data, progress, checkpoint, group: See `Detector.fit`.
        backbone: Frozen backbone with its weights; empty for a method on pixels.
        weights: Name of the weights in the record.
        source: Source of raw features; None: the images.
    """
    started, settings = time.perf_counter(), config.training

    # Select: decide which images take part. Of copies, one counts: a training image must not calibrate as well.
    found, validation, category_of, named = resolve_data(data)
    images, validation, copies = without_copies(found, validation, category_of, content_keys(category_of))
    check_groups(images, validation, config.calibration.groups, named)
    canvas = ""
    if patch_of(backbone) is None:  # positions of plain transformers were resampled for the canvas of the configuration
        config, canvas = fit_canvas(config, images)
    few = len({category_of[path] for path in images}) == 1 and len(images) < MINIMUM
    few = few and not registry.method_class(config.method).on_pixels
    asked = config.method
    if few:
        config, progress = few_config(config), silent
    with seeded(settings.seed):  # the same start, however often `fit` is called
        network = create(config, Weights.LATER).eval()
    network.features.backbone = backbone
    textures = texture_images(settings.textures, config.preparation) if network.uses_textures else []

    # Cache: each image is read once and passes the backbone once.
    build = partial(
        build_cache,
        network.features,
        preparation=config.preparation,
        budget=settings.cache_gb * 2**30,
        categories=category_of,
        group=group,
    )
    calibrated = {category_of[path] for path in images} <= {category_of[path] for path in validation}
    held_out = 0.0 if calibrated or config.calibration.folds else config.calibration.holdout
    with group.hosting(backbone):
        try:
            given = read_views(network.features, config.preparation, settings.seed) if few else source
            cache = build(images, seed=settings.seed, held_out=held_out, progress=progress, source=given)
        except TrainingError as error:
            if not copies:
                raise
            does = "does" if len(copies) == 1 else "do"
            copied = "1 file is a copy" if len(copies) == 1 else f"{len(copies)} files are copies"
            raise TrainingError(f"{error}; {copied} of others and {does} not count") from error
        held = build(validation, fit=False, source=source) if validation else None
        embedded = network.embed(torch.from_numpy(np.stack(textures))) if textures else None
    cached = time.perf_counter()

    # Clean: on request, the strangest images are presumed defective.
    dropped, images_read = list[str](), cache.count
    if (share := config.calibration.drop_outliers) and not few:
        cache, dropped = drop_strangest(network, cache, share, settings.seed, settings.cache_gb * 2**30)

    # Group: near-copies of an image that calibrates must not train.
    grouped = ""
    if not few:
        cache, grouped = with_groups(cache, config.calibration.groups, named)
    if held:
        held, _ = with_groups(held, config.calibration.groups, named)

    if few:
        fitted = _fit_few(network, cache, held)
    else:
        fitted = fit_cached(
            network, cache, held, textures=embedded, progress=progress, checkpoint=checkpoint, group=group
        )

    contents = cache.content_of() | (held.content_of() if held else {})
    processes = f", {group.size} processes" if group.size > 1 else ""
    record = {
        "unflaw": __version__,
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {count(torch.get_num_threads(), 'thread')}{processes}",
        "trained": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "weights": weights,
        "good_images": len(set(cache.paths)),
        "digest": digest(dict.fromkeys(cache.paths), contents),
        "seen": sorted(content[:SHORT] for content in contents.values()),
        **({"canvas": canvas} if canvas else {}),
        **({"groups": grouped} if grouped else {}),
        **({"few": describe_few(len(set(cache.paths)), asked)} if few else {}),
        **({"dropped": dropped, "drop": describe_dropped(dropped, images_read)} if dropped else {}),
        "skipped": copies + cache.skipped + (held.skipped if held else []),
        **fitted.record,
        "seconds": {
            "features": round(cached - started, 2),
            "training": round(time.perf_counter() - cached, 2),
            "total": round(time.perf_counter() - started, 2),
        },
    }
    return Fitted(fitted.network, fitted.display, fitted.categories, record)


def _fit_few(network: Method, cache: Cache, validation: Cache | None) -> Fitted:
    """`fit_cached` for fewer than `MINIMUM` images and their views. A validation part calibrates as usual."""
    options, name = network.config.calibration, cache.categories[0]
    calibration = fit_few(network, cache)
    if validation is not None:
        rng = step_rng(network.config.training.seed, 2**31 + 1)
        scores, learned_too = score_held_out(network, validation, options, rng, random=False)
        calibration = scores.calibrate(options, out_of_fold=learned_too)
    reference = None  # so few images do not tell what others usually look like
    if validation is not None:
        reference = build_drift_reference(cache, range(len(cache)), validation, network.config.training.seed)
    category = Category(calibration, network.with_category(network.category_state()), reference)
    held = {"held_out": 0 if validation is None else validation.count}
    counts = {"categories": {name: {"good_images": len(set(cache.paths)), **held}}} if name else {}
    record = {"history": [], **held, "strangest": [], "strangest_among": ALL, **counts}
    return Fitted(network, None, {name: category}, record)


def _session_rise(network: Method, training: Cache, rows: list[int], held: Cache | None, *, joined: bool) -> float:
    """Reserve from held-out images, which may have joined the memory, or without them from some training images."""
    if held is not None:
        context = Context(added_rows=torch.arange(len(held)) if joined else None)
        return reserve_of(score_rises(network, held, context))
    heads = training.heads(rows)[: WINDOWS + 1]
    some = [row for row in rows if row < heads[-1]] or rows  # whole images, since all windows of one are adjacent
    context = Context(training_rows=torch.tensor(some))
    return reserve_of(score_rises(network, training.take(some, math.inf), context))


def fit_cached(
    network: Method,
    cache: Cache,
    validation: Cache | None = None,
    *,
    textures: Tensor | None = None,
    progress: Progress = silent,
    checkpoint: Path | None = None,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Fitted:
    """Trains and calibrates a network from cached features: split → train → calibrate.

    Args:
        network: Untrained network, its extractor fitted.
        cache: Good images except those of validation parts.
        validation: Images of validation parts, if any.
        textures: F of texture images, for methods that use them.
        progress, checkpoint, group: See `Detector.fit`.

    Returns:
        The result. Its record has the "history" of losses, the number of images "held_out", numbers by "categories" if
        they have names, "strangest", outliers from `outliers.outliers` with their category, and "strangest_among", the
        images among which outliers were searched: all good images, or the held-out ones if there is no memory; and
        "strangest_tenth", paths of the tenth of each category that is strangest to its memory.
    """
    config, options = network.config, network.config.calibration
    settings, budget = config.training, config.training.cache_gb * 2**30
    rng = step_rng(settings.seed, 2**31)

    # Split: without a validation part some images are held out, unless all are cross-fitted.
    training, calibrating = split_calibration(
        cache, validation, 0.0 if options.folds else options.holdout, budget, settings.seed
    )
    own_validation = {} if validation is None else validation.rows()
    # A memory can leave single images out; anything else has to be learned anew without them.
    refitted = network.memory is None or any(p.requires_grad for p in network.parameters())
    untrained = copy.deepcopy(network) if options.folds and refitted else network

    # Train
    history = train(network, training, textures, rng, progress=progress, checkpoint=checkpoint, group=group)
    display = None
    if settings.display_steps and not isinstance(network.features, PixelExtractor):
        display = fit_display(training, settings, progress)

    # Calibrate: score good images that the network did not learn from.
    def train_fold(part: Cache, number: int) -> Method:
        def named(stage: str, done: int, total: int, loss: float | None) -> None:
            progress(f"{stage} {number + 1}/{options.folds}", done, total, loss)

        fold, draws = copy.deepcopy(untrained), step_rng(settings.seed, 2**31 + 1 + number)
        train(fold, part, textures, draws, progress=named, group=group)
        return fold

    out_of_fold = {}
    if refitted and len(calibrating) < len(training.rows()):
        out_of_fold = cross_fit(train_fold, training, options, calibrating.keys(), budget)
    categories, strangest, ranking, among = {}, list[dict[str, Any]](), list[str](), ALL
    for number, (name, rows) in enumerate(training.rows().items()):
        # before prototypes of calibration images are added, which would lower their scores
        fit_normalization(network, training, number, rows)
        held = calibrating.get(name)
        random = name not in own_validation  # a random part of the good images
        strange = find_outliers(network, training, rows, held, random=random)
        far_images = None
        if strange is not None:
            far_images, first = strange
            ranking += first
        learned_too = True  # the network has learned from the images that calibrate
        if name in out_of_fold:
            scores = out_of_fold[name]
        elif held is not None:
            scores, learned_too = score_held_out(network, held, options, rng, random=random)
            if random and learned_too and len(set(held.groups)) < options.fewest:
                own = training.take(rows, budget)
                scores = cross_fit_memory(network, [own, held], options, budget, step_rng(settings.seed, 2**31 + 3))
        else:
            scores = leave_one_out(network, training, rows, options, budget)
        reserve = 0.0
        if options.reserve and random:  # images of a validation part are of other sessions already
            reserve = options.reserve * _session_rise(network, training, rows, held, joined=learned_too)
        if far_images is None:  # no memory to be far from: by their scores
            far_images = outliers(dict(zip(scores.paths, scores.scores, strict=True)))
            among = among if name in out_of_fold else HELD_OUT
        strangest += [entry | ({"category": name} if name else {}) for entry in far_images]
        calibration = scores.calibrate(options, out_of_fold=learned_too, reserve=reserve)
        reference = build_drift_reference(training, rows, held, settings.seed)
        categories[name] = Category(calibration, network.with_category(network.category_state()), reference)

    counts = {
        name: {
            "good_images": len(cache.heads(rows)),
            "held_out": calibrating[name].count if name in calibrating else 0,
        }
        for name, rows in cache.rows().items()
    }
    record = {
        "history": history,
        "held_out": sum(held.count for held in calibrating.values()),
        "strangest": strangest,
        "strangest_among": among,
        "strangest_tenth": ranking,
        **({} if "" in counts else {"categories": counts}),
    }
    return Fitted(network, display, categories, record)
