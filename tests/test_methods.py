"""What methods share: bringing evidence to one map and one score."""

import numpy as np
import pytest
import torch
from torch import Tensor

from unflaw.methods import create
from unflaw.methods.base import Inspection, Method
from unflaw.methods.lookup import Lookup
from unflaw.methods.uranet import URANet

GRID = 8


def evidence(n: int = 5, kinds: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(n, kinds, 3, GRID, GRID, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def method(tiny) -> Method:
    """Knows nothing of what is normal yet: mean 0 and deviation 1."""
    return create(tiny("lookup", **{"scoring.shares": (0.1, 1.0), "scoring.judging": (1.0, 2.0, 3.0)}), "random")


def test_methods_by_name(tiny):
    assert isinstance(create(tiny("lookup"), "random"), Lookup)
    assert isinstance(create(tiny("uranet"), "random"), URANet)


def test_the_map_weighs_levels_and_keeps_constants(tiny):
    method = create(tiny("lookup", **{"scoring.locating": (1.0, 2.0, 5.0)}), "random")
    flat = torch.tensor([2.0, 4.0, 8.0]).view(1, 1, 3, 1, 1).expand(2, 1, 3, GRID, GRID)
    maps, scores = method.fuse(Inspection(flat))
    assert maps.shape == (2, 64, 64) and scores.shape == (2,)
    torch.testing.assert_close(maps, torch.full((2, 64, 64), (2 * 1 + 4 * 2 + 8 * 5) / 8))


def smoothed(level: np.ndarray) -> np.ndarray:
    """Mean over those of the 3×3 neighbours that there are."""
    out = np.zeros_like(level)
    for y, x in np.ndindex(level.shape):
        out[y, x] = level[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].mean()
    return out


def score_by_hand(levels: np.ndarray, valid: np.ndarray, shares: tuple, weights: tuple) -> float:
    total = 0.0
    for level, weight in zip(levels, weights, strict=True):
        values = np.sort(smoothed(level)[valid])[::-1]
        total += weight * np.mean([values[: max(1, round(q * values.size))].mean() for q in shares])
    return total / sum(weights)


def test_the_score_is_the_mean_of_highest_shares(method):
    witnesses, everywhere = evidence(), np.ones((GRID, GRID), bool)
    expected = [score_by_hand(w[0].numpy(), everywhere, (0.1, 1.0), (1, 2, 3)) for w in witnesses]
    np.testing.assert_allclose(method.fuse(Inspection(witnesses))[1].numpy(), expected, rtol=1e-5)


def test_padding_has_no_part_in_the_score(method):
    witnesses = evidence()
    valid = torch.zeros(5, GRID, GRID, dtype=torch.bool)
    valid[:, 2:6] = True
    expected = [score_by_hand(w[0].numpy(), valid[0].numpy(), (0.1, 1.0), (1, 2, 3)) for w in witnesses]
    scores = method.fuse(Inspection(witnesses), valid)[1]
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-5)
    shouting = witnesses.clone()
    shouting[:, :, :, 7] = 100
    torch.testing.assert_close(method.fuse(Inspection(shouting), valid)[1], scores)
    everywhere = torch.ones_like(valid)
    torch.testing.assert_close(method.fuse(Inspection(witnesses), everywhere)[1], method.fuse(Inspection(witnesses))[1])


def test_after_training_evidence_counts_in_deviations_of_good_pictures(tiny):
    method = create(tiny(), "random")
    features = torch.randn(10, method.features.channels, GRID, GRID, generator=torch.Generator().manual_seed(0)).half()
    method.setup(features, None, torch.Generator().manual_seed(0))
    method.finish(features[:6])
    with torch.no_grad():
        found = method(features[:6].float())
        normal = method.normal.unbind(-1)
        standard = (found.witnesses - normal[0][..., None, None]) / normal[1][..., None, None]
        scores = method.fuse(found)[1]
    torch.testing.assert_close(standard.mean((0, 3, 4)), torch.zeros(method.kinds, 3), atol=1e-3, rtol=0)
    torch.testing.assert_close(standard.std((0, 3, 4)), torch.ones(method.kinds, 3), atol=1e-3, rtol=0)
    torch.testing.assert_close(method.levels(found.witnesses), standard.mean(1))
    assert scores.mean().item() == pytest.approx(0, abs=1e-3)
    assert {"normal", "normal_scores"} <= method.state_dict().keys()  # a saved detector needs them


def test_one_held_out_picture_gives_finite_numbers(tiny):
    method = create(tiny("lookup"), "random")
    features = torch.randn(10, method.features.channels, GRID, GRID, generator=torch.Generator().manual_seed(0)).half()
    method.setup(features, None, torch.Generator().manual_seed(0))
    method.finish(features[:1])
    with torch.no_grad():
        maps, scores = method.fuse(method(features[:3].float()))
    assert maps.isfinite().all() and scores.isfinite().all()


@pytest.mark.parametrize("levels", [(2,), (2, 3), (1, 2, 3), (0, 1, 2, 3)])
def test_any_number_of_levels_is_weighed(tiny, levels):
    method = create(tiny("lookup", **{"features.levels": levels}), "random")
    ones = torch.ones(2, 1, len(levels), GRID, GRID)
    maps, scores = method.fuse(Inspection(ones))
    torch.testing.assert_close(maps, torch.ones(2, 64, 64))
    torch.testing.assert_close(scores, torch.ones(2))


def test_lookup_is_the_distance_to_the_memory(tiny):
    method = create(tiny("lookup"), "random")
    features = torch.randn(10, method.features.channels, GRID, GRID, generator=torch.Generator().manual_seed(0)).half()
    method.setup(features, None, torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = method(features.float())
    distance = method.memory(features.float())[1]
    assert torch.equal(found.witnesses, distance[:, None])
    assert not list(p for p in method.parameters() if p.requires_grad)
