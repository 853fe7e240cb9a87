import numpy as np
import pytest

from unflaw.datasets import digest, load_dataset
from unflaw.imaging.reading import read, read_mask

pytest.importorskip("skimage", reason="the photographs come with scikit-image")
from unflaw.datasets import synthetic as demo_data


@pytest.fixture(scope="module")
def bricks(tmp_path_factory):
    return demo_data.make_demo_data(tmp_path_factory.mktemp("demo") / "bricks", seed=3)


def test_it_is_a_data_set_without_problems(bricks):
    dataset = load_dataset(bricks)
    kinds = [sample.defect for sample in dataset.test]
    assert (dataset.layout, dataset.problems, len(dataset.train)) == ("mvtec", (), 80)
    assert {kind: kinds.count(kind) for kind in kinds} == {"good": 20, **dict.fromkeys(demo_data.FLAWS, 10)}
    assert all(sample.mask for sample in dataset.test if sample.label)
    text = (bricks / "README.txt").read_text(encoding="utf-8")
    assert "SYNTHETIC" in text and "CC0" in text and "Seed: 3" in text


def test_masks_are_of_a_sensible_size_and_off_the_rim(bricks):
    for sample in load_dataset(bricks).test:
        pixels = read(sample.path)
        assert pixels.shape == (256, 256, 3)
        if sample.mask:
            mask = read_mask(sample.mask)
            assert 50 < mask.sum() < 0.2 * mask.size


@pytest.mark.parametrize("kind", demo_data.FLAWS)
def test_a_mask_covers_what_was_changed(kind):
    for seed in range(4):
        rng = np.random.default_rng(seed)
        image = demo_data._piece(rng, demo_data._photograph("brick"))
        changed, alpha = demo_data.FLAWS[kind](rng, image)
        assert alpha.shape == (256, 256) and alpha.min() >= 0 and alpha.max() <= 1
        difference = np.abs(alpha[..., None] * (changed - image)).max(axis=2)
        assert difference[alpha <= 0.15].max() <= 0.16 and difference[alpha > 0.15].mean() > 0.03


def test_the_seed_decides(bricks, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_data, "N_TRAIN", 3)
    monkeypatch.setattr(demo_data, "N_VALIDATION", 1)
    monkeypatch.setattr(demo_data, "N_GOOD", 1)
    monkeypatch.setattr(demo_data, "N_PER_DEFECT", 1)
    a, b, c = (demo_data.make_demo_data(tmp_path / name, seed) for name, seed in (("a", 3), ("b", 3), ("c", 4)))
    assert digest(load_dataset(a).test) == digest(load_dataset(b).test) != digest(load_dataset(c).test)
    assert digest(load_dataset(a).train) == digest(load_dataset(bricks).train[:3])


def test_nothing_is_overwritten(bricks):
    with pytest.raises(FileExistsError, match="not empty"):
        demo_data.make_demo_data(bricks)
