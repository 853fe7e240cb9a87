import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator, Tensor, nn

from unflaw.config import Features, Training
from unflaw.features import FeatureExtractor
from unflaw.images import Preparation, prepare, read
from unflaw.training import TrainingError, ahead, batched, build_cache, learning_rate, optimise, stack, step_rng

PREPARATION = Preparation(size=32)
PLENTY, NOTHING = 1e9, 0.0  # bytes of RAM


@pytest.fixture(scope="module")
def extractor(weights) -> FeatureExtractor:
    return FeatureExtractor(Features(backbone="resnet18", grid=4, components=8), weights)


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> list[Path]:
    """70 pictures, more than the extractor is fitted on, in no alphabetical order; two of them broken."""
    folder = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(0)
    paths = [folder / f"{i:02d}.png" for i in rng.permutation(70)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    paths[10].write_bytes(b"no picture")
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


# The cache


def test_cache_holds_every_readable_picture_in_order(extractor, many):
    seen = []
    cache = build_cache(extractor, many, PREPARATION, PLENTY, lambda *report: seen.append(report))
    readable = [p for i, p in enumerate(many) if i not in (10, 40)]
    assert cache.paths == readable
    assert {Path(path) for path, _ in cache.skipped} == {many[10], many[40]}
    assert all(path in reason for path, reason in cache.skipped)
    assert cache.features.shape == (68, extractor.channels, 4, 4) and cache.features.dtype == torch.float16
    assert len(cache.thumbnails) == 68 and cache.thumbnails.dtype == torch.uint8
    for i in (0, 9, 10, 39, 67):
        torch.testing.assert_close(cache.features[i].float(), embedded(extractor, readable[i]), atol=1e-2, rtol=1e-2)
        side = cache.thumbnails.shape[-1] // 32
        thumbnail = cache.thumbnails[i].float().unfold(1, side, side).unfold(2, side, side).mean((-1, -2))
        picture = torch.from_numpy(prepare(read(readable[i]), PREPARATION).pixels) * 255
        torch.testing.assert_close(thumbnail, picture, atol=1.0, rtol=0)
    assert [report[0] for report in seen] == ["features"] * len(seen) and seen[-1][1] == 68


def test_features_on_disk_are_those_in_memory(extractor, many):
    ram = build_cache(extractor, many, PREPARATION, PLENTY)
    basis = extractor.basis.clone()
    disk = build_cache(extractor, many, PREPARATION, NOTHING)
    assert torch.equal(extractor.basis, basis)  # fitted on the same pictures
    assert sorted(disk.paths) == sorted(ram.paths)
    where = [disk.paths.index(path) for path in ram.paths]
    assert torch.equal(disk.features[where], ram.features)
    assert torch.equal(disk.thumbnails[where], ram.thumbnails)


def test_a_part_of_a_cache(extractor, many):
    cache = build_cache(extractor, many[:10], PREPARATION, PLENTY)
    part = cache.subset(torch.tensor([7, 2]))
    assert part.paths == [cache.paths[7], cache.paths[2]]
    assert torch.equal(part.features, cache.features[[7, 2]])
    assert torch.equal(part.thumbnails, cache.thumbnails[[7, 2]])


def test_too_few_pictures_are_refused_with_the_reason(extractor, many):
    with pytest.raises(TrainingError, match="7 good pictures are too few"):
        build_cache(extractor, many[:7], PREPARATION, PLENTY)
    some = [*many[:7], many[10], many[40]]
    with pytest.raises(TrainingError, match=rf"2 could not be read, first: .*({many[10].name}|{many[40].name})"):
        build_cache(extractor, some, PREPARATION, PLENTY)
    with pytest.raises(TrainingError, match="0 good pictures"):
        build_cache(extractor, [many[10]] * 9, PREPARATION, PLENTY)


def test_copies_of_one_picture_are_refused(extractor, many):
    with pytest.raises(TrainingError, match="identical"):
        build_cache(extractor, [many[0]] * 10, PREPARATION, PLENTY)


# The loop


class Line(nn.Module):
    """y = w·x with noise in its loss, and a parameter that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def loss_on(self, data: Tensor, stop_at: int | None = None):
        calls = itertools.count()

        def loss(indices: Tensor, rng: Generator) -> dict[str, Tensor]:
            if next(calls) == stop_at:
                raise KeyboardInterrupt
            x = data[indices]
            noise = 0.1 * torch.randn(len(x), generator=rng)
            error = (x @ self.w - x @ torch.tensor([1.0, -2.0, 3.0]) + noise).square().mean()
            return {"loss": error + 0.001 * self.w.square().sum(), "error": error}

        return loss


DATA = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))


def settings(**changes) -> Training:
    return Training(**{"batch": 8, "learning_rate": 0.1, "checkpoint_seconds": 0.0, **changes})


def test_the_loop_learns_and_records():
    line, reports = Line(), []
    history = optimise(
        line, line.loss_on(DATA), 50, 250, settings(), stage="fitting", progress=lambda *r: reports.append(r)
    )
    torch.testing.assert_close(line.w.detach(), torch.tensor([1.0, -2.0, 3.0]), atol=0.1, rtol=0)
    assert torch.equal(line.frozen, torch.ones(3))
    assert not line.training
    assert 100 <= len(history) <= 125 and set(history[0]) == {"loss", "error"}
    assert history[-1]["loss"] < 0.01 * history[0]["loss"]
    assert reports[-1] == ("fitting", 250, 250, history[-1]["loss"])


def test_the_seed_decides():
    def trained(seed: int) -> Tensor:
        line = Line()
        optimise(line, line.loss_on(DATA), 50, 20, settings(seed=seed))
        return line.w.detach()

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


@pytest.mark.parametrize("steps, stop_at", [(40, 17), (250, 101), (250, 249)])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, steps, stop_at):
    whole = Line()
    history = optimise(whole, whole.loss_on(DATA), 50, steps, settings())
    checkpoint, broken = tmp_path / "run.checkpoint", Line()
    with pytest.raises(KeyboardInterrupt):
        optimise(broken, broken.loss_on(DATA, stop_at), 50, steps, settings(), checkpoint=checkpoint)
    assert [p.name for p in tmp_path.iterdir()] == ["run.checkpoint"]
    resumed, reports = Line(), []
    again = optimise(
        resumed,
        resumed.loss_on(DATA),
        50,
        steps,
        settings(),
        checkpoint=checkpoint,
        progress=lambda *r: reports.append(r[1]),
    )
    assert torch.equal(resumed.w, whole.w)
    assert again == history
    assert reports[0] > stop_at - 3  # it went on, rather than from the start


def test_a_checkpoint_of_another_stage_is_left_alone(tmp_path):
    checkpoint, line, other = tmp_path / "run.checkpoint", Line(), Line()
    with pytest.raises(KeyboardInterrupt):
        optimise(line, line.loss_on(DATA, 5), 50, 10, settings(), checkpoint=checkpoint, stage="first")
    whole = Line()
    optimise(whole, whole.loss_on(DATA), 50, 10, settings())
    optimise(other, other.loss_on(DATA), 50, 10, settings(), checkpoint=checkpoint, stage="second")
    assert torch.equal(other.w, whole.w)


def test_a_loss_that_is_not_finite_stops_training_with_advice():
    line = Line()
    steps = itertools.count()

    def loss(indices: Tensor, rng: Generator) -> dict[str, Tensor]:
        factor = float("nan") if next(steps) == 3 else 1.0
        return {"loss": (line.w - 1).square().sum() * factor}

    with pytest.raises(TrainingError, match=r"step 3.*training\.learning_rate"):
        optimise(line, loss, 50, 10, settings())
    assert line.w.isfinite().all()


def test_no_steps_change_nothing():
    line = Line()
    assert optimise(line, line.loss_on(DATA), 50, 0, settings()) == []
    assert not line.w.any()


@pytest.mark.parametrize("steps", [10, 37, 400])
def test_learning_rate_rises_over_a_tenth_and_falls_to_a_hundredth(steps):
    rates = np.array([learning_rate(step, steps, 2.0) for step in range(steps)])
    warm = steps // 10
    assert rates.max() == pytest.approx(2.0)
    np.testing.assert_allclose(rates[:warm], 2.0 * np.arange(1, warm + 1) / warm)
    assert (np.diff(rates[warm:]) < 0).all()
    assert rates.min() > 0 and 0.02 <= rates[-1] < 0.02 + 5 * 2.0 / steps
    middle = warm + (steps - warm) / 2
    assert learning_rate(int(middle), steps, 2.0) == pytest.approx(1.01, abs=4 / steps)


def test_one_step_has_a_learning_rate_too():
    assert learning_rate(0, 1, 2.0) == 2.0


def test_randomness_is_a_function_of_seed_and_step():
    def numbers(seed: int, step: int) -> list[float]:
        return torch.rand(3, generator=step_rng(seed, step)).tolist()

    drawn = [numbers(seed, step) for seed in range(4) for step in range(50)]
    assert len({tuple(d) for d in drawn}) == 200
    assert numbers(3, 7) == numbers(3, 7)
