import itertools
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from unflaw.config import Features, Weights
from unflaw.errors import ImageError, TrainingError
from unflaw.features.cache import Cache, allocate, build_cache, stack
from unflaw.features.extractor import FeatureExtractor
from unflaw.imaging.reading import read
from unflaw.imaging.tiling import Preparation
from unflaw.imaging.transforms import prepare, try_prepare
from unflaw.io.progress import ahead, batched

PREPARATION = Preparation(size=32)
PLENTY, NOTHING = 1e9, 0.0  # bytes of RAM


@pytest.fixture
def extractor(weights) -> FeatureExtractor:
    return FeatureExtractor(Features(backbone="resnet18", grid=4, components=8), weights)


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> list[Path]:
    """70 images, more than the extractor is fitted on, in no alphabetical order; two of them broken."""
    folder = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(0)
    paths = [folder / f"{i:02d}.png" for i in rng.permutation(70)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    paths[10].write_bytes(b"no image")
    paths[40].unlink()
    return paths


def embedded(extractor: FeatureExtractor, path: Path) -> Tensor:
    return extractor(stack([prepare(read(path), PREPARATION)]))[0]


# Iteration


def test_ahead_keeps_the_order_and_does_not_run_away():
    started, lock = [], threading.Lock()

    def work(i: int) -> int:
        with lock:
            started.append(i)
        return i * i

    results = ahead(work, itertools.count(), workers=2, depth=5)  # endless
    assert list(itertools.islice(results, 20)) == [i * i for i in range(20)]
    results.close()
    assert max(started) < 20 + 5
    assert list(ahead(work, [])) == []


def test_ahead_passes_errors_on():
    results = ahead(lambda i: 1 // i, [1, 0, 1])
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_batched_leaves_nothing_out():
    assert list(batched(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(batched([], 3)) == []


def test_a_bad_file_is_loaded_as_its_error(many):
    first = try_prepare(many[10], PREPARATION)
    assert isinstance(first, ImageError) and many[10].name in str(first)
    assert isinstance(try_prepare(many[40], PREPARATION), ImageError)
    pixels = stack([try_prepare(many[0], PREPARATION), try_prepare(many[1], PREPARATION)])
    assert pixels.shape == (2, 3, 32, 32) and pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels[1].permute(1, 2, 0), np.asarray(Image.open(many[1])) / 255, atol=1e-6)


# The cache


@pytest.mark.parametrize("batch", [1, 16, 100])
def test_cache_holds_every_readable_image(extractor, many, batch):
    seen = []
    cache = build_cache(extractor, many, PREPARATION, PLENTY, batch=batch, progress=lambda *report: seen.append(report))
    readable = [p for i, p in enumerate(many) if i not in (10, 40)]
    assert sorted(cache.paths) == sorted(readable) and len(cache) == 68
    assert [Path(path) for path, _ in cache.skipped] == sorted([many[10], many[40]])
    assert all(path in reason for path, reason in cache.skipped)
    assert cache.features.shape == (68, extractor.channels, 4, 4) and cache.features.dtype == torch.float16
    assert len(cache.thumbnails) == 68 and cache.thumbnails.dtype == torch.uint8
    assert [window.box for window in cache.windows] == [(0, 0, 32, 32)] * 68
    for i in (0, 9, 10, 39, 67):
        torch.testing.assert_close(cache.features[i].float(), embedded(extractor, cache.paths[i]), atol=1e-2, rtol=1e-2)
        side = cache.thumbnails.shape[-1] // 32
        thumbnail = cache.thumbnails[i].float().unfold(1, side, side).unfold(2, side, side).mean((-1, -2))
        image = torch.from_numpy(prepare(read(cache.paths[i]), PREPARATION).pixels) * 255
        torch.testing.assert_close(thumbnail, image, atol=1.0, rtol=0)
    done = [report[1] for report in seen]
    assert {(report[0], report[2]) for report in seen} == {("features", 70)}
    assert done == sorted(done) and done[-1] == 70


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_progress_reaches_its_end_whichever_images_cannot_be_read(extractor, many, seed):
    build_cache(extractor, many[:8], PREPARATION, PLENTY)
    done, paths = [], [many[10], many[0], many[40]]
    build_cache(
        extractor, paths, PREPARATION, PLENTY, seed=seed, fit=False, batch=1, progress=lambda *r: done.append(r[1])
    )
    assert done[-1] == 3


def test_the_order_is_random_and_the_seed_decides(extractor, many):
    def order(seed: int) -> list[Path]:
        return build_cache(extractor, many[:10], PREPARATION, PLENTY, seed=seed).paths

    assert order(0) == order(0)
    assert len({tuple(order(seed)) for seed in range(5)}) == 5
    assert all(order(seed) not in (many[:10], sorted(many[:10])) for seed in range(5))


def test_features_on_disk_are_those_in_memory(weights, many):
    def built(budget: float) -> tuple[FeatureExtractor, Cache]:
        extractor = FeatureExtractor(Features(backbone="resnet18", grid=4, components=8), weights)
        return extractor, build_cache(extractor, many, PREPARATION, budget, seed=3)

    (a, ram), (b, disk) = built(PLENTY), built(NOTHING)
    assert torch.equal(a.basis, b.basis)  # fitted on the same images
    assert disk.paths == ram.paths and disk.skipped == ram.skipped
    for name in ("features", "thumbnails", "described"):
        assert torch.equal(getattr(disk, name), getattr(ram, name))
    assert ram._file is None
    status = os.fstat(disk._file.fileno())
    assert status.st_size >= disk.features.nbytes and status.st_nlink == 0  # nothing stays of a killed process
    part = disk[:5]
    del disk, b
    assert torch.equal(part.features, ram.features[:5])  # lives as long as any part


def test_the_budget_decides_where_features_are():
    for budget, on_disk in ((2000, False), (1999, True)):
        features, folder = allocate((10, 4, 5, 5), budget)
        assert features.shape == (10, 4, 5, 5) and features.dtype == torch.float16
        assert (folder is not None) == on_disk


def test_the_extractor_is_fitted_on_the_first_images_or_left_alone(extractor, many):
    cache = build_cache(extractor, many, PREPARATION, PLENTY, batch=16)
    raw = torch.cat([extractor.aggregate(stack([prepare(read(path), PREPARATION)])) for path in cache.paths])
    first = FeatureExtractor(extractor.config, Weights.RANDOM)
    few, all_ = (first.fit(part).centre.clone() for part in (raw[:64], raw))
    assert (extractor.centre - few).abs().max() < (few - all_).abs().max() + 1e-4
    state = {name: tensor.clone() for name, tensor in extractor.state_dict().items()}
    build_cache(extractor, many[:9], PREPARATION, PLENTY, fit=False)
    assert all(torch.equal(tensor, state[name]) for name, tensor in extractor.state_dict().items())


@pytest.mark.parametrize("part", [slice(3), slice(3, None), slice(2, 8), slice(-2, None), slice(0, 0)])
def test_a_part_of_a_cache_is_a_view(extractor, many, part):
    cache = build_cache(extractor, many[:11], PREPARATION, PLENTY)
    found = cache[part]
    assert found.paths == cache.paths[part] and len(found) == len(cache.paths[part])
    assert found.skipped == cache.skipped and len(found.skipped) == 1
    for name in ("features", "thumbnails", "described"):
        whole, some = getattr(cache, name), getattr(found, name)
        assert torch.equal(some, whole[part])
        assert some.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()  # nothing is copied


def test_boxes_are_where_the_images_are(extractor, many, tmp_path):
    paths = []
    for path in many[:8]:
        paths.append(tmp_path / path.name)
        width = 64 if int(path.stem) % 2 else 32
        Image.open(path).resize((width, 32)).save(paths[-1])
    cache = build_cache(extractor, paths, Preparation(size=32, fit="pad"), PLENTY)
    for path, window in zip(cache.paths, cache.windows, strict=True):
        assert window.box == ((0, 8, 32, 24) if int(path.stem) % 2 else (0, 0, 32, 32))


def test_too_few_images_are_refused_with_the_reason(extractor, many):
    with pytest.raises(TrainingError, match="7 good images are too few to learn from"):
        build_cache(extractor, many[:7], PREPARATION, PLENTY)
    some = [*many[:7], many[10], many[40]]
    with pytest.raises(TrainingError, match=rf"2 could not be read, first: .*({many[10].name}|{many[40].name})"):
        build_cache(extractor, some, PREPARATION, PLENTY)
    with pytest.raises(TrainingError, match="0 good images"):
        build_cache(extractor, [many[10]] * 9, PREPARATION, PLENTY)
    with pytest.raises(TrainingError, match="0 good images"):
        build_cache(extractor, [], PREPARATION, PLENTY)


def test_to_calibrate_one_image_is_enough_but_none_is_not(extractor, many):
    build_cache(extractor, many[:8], PREPARATION, PLENTY)
    assert len(build_cache(extractor, many[:1], PREPARATION, PLENTY, fit=False)) == 1
    with pytest.raises(TrainingError, match=rf"0 good images are too few to calibrate with.*{many[10].name}"):
        build_cache(extractor, [many[10]], PREPARATION, PLENTY, fit=False)


def test_copies_of_one_image_are_refused(extractor, many):
    with pytest.raises(TrainingError, match="identical"):
        build_cache(extractor, [many[0]] * 10, PREPARATION, PLENTY)
    build_cache(extractor, many[:8], PREPARATION, PLENTY)
    assert len(build_cache(extractor, [many[0]] * 3, PREPARATION, PLENTY, fit=False)) == 3  # nothing is learned


@pytest.mark.parametrize("budget", [PLENTY, NOTHING])
def test_more_windows_than_the_first_images_have_find_room(extractor, tmp_path, monkeypatch, budget):
    """Images are not counted in windows before they are read."""
    rng, sides = np.random.default_rng(1), [32, 32, 32, 32, 64, 96, 64, 96, 96, 96]
    for i, side in enumerate(sides):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    paths = [tmp_path / f"{i}.png" for i in range(len(sides))]
    monkeypatch.setattr("unflaw.features.cache._shuffled", lambda paths, *_: list(paths))  # small ones first
    whole = build_cache(extractor, paths, Preparation(size=32, tile=32, overlap=0), PLENTY, batch=4)
    assert len(whole) == sum((side // 32) ** 2 for side in sides)
    monkeypatch.setattr("unflaw.features.cache.FITTED_ON", 4)
    grown = build_cache(extractor, paths, Preparation(size=32, tile=32, overlap=0), budget, batch=4, fit=False)
    assert torch.equal(grown.features, whole.features) and grown.paths == whole.paths
