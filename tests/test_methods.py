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
SHARES = (0.1, 1.0)


def evidence(n: int = 5, kinds: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(n, kinds, GRID, GRID, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["lookup", "uranet"])
def method(request, tiny) -> Method:
    """One and two kinds of evidence. Knows nothing of what is normal yet: mean 0 and deviation 1."""
    return create(tiny(request.param, **{"scoring.shares": SHARES}), "random")


def learned(method: Method, good: int = 10) -> Tensor:
    """Features of good pictures, (N, C, g, g) float16, which the method is set up on."""
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(good, method.features.channels, GRID, GRID, generator=rng).half()
    method.setup(features, None, torch.Generator().manual_seed(0))
    return features


def test_methods_by_name(tiny):
    assert isinstance(create(tiny("lookup"), "random"), Lookup)
    assert isinstance(create(tiny("uranet"), "random"), URANet)


def test_kinds_of_evidence_are_counted(tiny):
    alone = create(tiny(**{"network.restoration.prototypes": 0}), "random")
    for network, kinds in ((create(tiny("lookup"), "random"), 1), (create(tiny(), "random"), 2), (alone, 1)):
        assert network.kinds == kinds and network.normal.shape == (kinds, 2)
        assert network.normal_scores.shape == (len(network.config.scoring.shares), 2)
        with torch.no_grad():
            assert network(torch.randn(3, network.features.channels, GRID, GRID)).witnesses.shape[:2] == (3, kinds)


def test_the_map_is_the_mean_of_the_evidence_and_keeps_constants(method):
    flat = torch.tensor([2.0, 5.0])[: method.kinds].view(1, -1, 1, 1).expand(2, -1, GRID, GRID)
    maps, scores = method.fuse(Inspection(flat))
    assert maps.shape == (2, 64, 64) and scores.shape == (2,)
    mean = 3.5 if method.kinds == 2 else 2.0
    torch.testing.assert_close(maps, torch.full((2, 64, 64), mean))
    torch.testing.assert_close(scores, torch.full((2,), mean))


def test_evidence_counts_in_its_own_deviations(method):
    """However small the numbers of a kind are."""
    expected = method.fuse(Inspection(evidence(kinds=method.kinds)))
    mean, deviation = (torch.tensor(v)[: method.kinds] for v in ([3.0, -1.0], [100.0, 0.01]))
    method.normal.copy_(torch.stack([mean, deviation], dim=-1))
    scaled = evidence(kinds=method.kinds) * deviation.view(-1, 1, 1) + mean.view(-1, 1, 1)
    for a, b in zip(method.fuse(Inspection(scaled)), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def smoothed(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Mean over those of the 3×3 neighbours that there are."""
    out = np.zeros_like(values)
    for y, x in np.argwhere(valid):
        near = np.s_[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
        out[y, x] = values[near][valid[near]].mean()
    return out


def score_by_hand(witnesses: Tensor, valid: np.ndarray, normal: np.ndarray) -> float:
    values = np.sort(smoothed(witnesses.mean(0).numpy(), valid)[valid])[::-1]
    highest = [values[: max(1, round(q * values.size))].mean() for q in SHARES]
    return float(np.mean([(h - mean) / deviation for h, (mean, deviation) in zip(highest, normal, strict=True)]))


@pytest.mark.parametrize("normal", [[[0.0, 1.0], [0.0, 1.0]], [[0.7, 0.05], [0.5, 0.2]]])
def test_the_score_is_the_mean_of_highest_shares_in_their_own_deviations(method, normal):
    method.normal_scores.copy_(torch.tensor(normal))
    witnesses, everywhere = evidence(kinds=method.kinds), np.ones((GRID, GRID), bool)
    expected = [score_by_hand(w, everywhere, np.array(normal)) for w in witnesses]
    np.testing.assert_allclose(method.fuse(Inspection(witnesses))[1].numpy(), expected, rtol=1e-4)


def test_padding_has_no_part_in_the_score(method):
    witnesses = evidence(kinds=method.kinds)
    valid = torch.zeros(5, GRID, GRID, dtype=torch.bool)
    valid[:, 2:6] = True
    valid[3:, 3] = False  # pictures of a batch differ in size
    valid[3:, 5] = False
    normal = np.array([[0.0, 1.0]] * 2)
    expected = [score_by_hand(w, v.numpy(), normal) for w, v in zip(witnesses, valid, strict=True)]
    scores = method.fuse(Inspection(witnesses), valid)[1]
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-5)
    shouting = torch.where(valid[:, None], witnesses, 100.0)
    torch.testing.assert_close(method.fuse(Inspection(shouting), valid)[1], scores)
    everywhere = torch.ones_like(valid)
    torch.testing.assert_close(method.fuse(Inspection(witnesses), everywhere)[1], method.fuse(Inspection(witnesses))[1])


def standardised(method: Method, witnesses: Tensor) -> Tensor:
    mean, deviation = method.normal[..., None, None].unbind(1)
    return (witnesses - mean) / deviation


def test_after_training_evidence_counts_in_deviations_of_good_pictures(method):
    features = learned(method)
    method.finish(features)
    with torch.no_grad():
        found = method(features.float())
        standard = standardised(method, found.witnesses)
        maps, scores = method.fuse(found)
    torch.testing.assert_close(standard.mean((0, 2, 3)), torch.zeros(method.kinds), atol=1e-3, rtol=0)
    torch.testing.assert_close(standard.std((0, 2, 3)), torch.ones(method.kinds), atol=1e-3, rtol=0)
    torch.testing.assert_close(maps.mean(), torch.tensor(0.0), atol=0.05, rtol=0)  # the mean of both
    assert scores.mean().item() == pytest.approx(0, abs=1e-3)
    statistics = method._statistics(standard.mean(1))
    mean, deviation = method.normal_scores.unbind(-1)
    torch.testing.assert_close(statistics.mean(0), mean, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(statistics.std(0, correction=0), deviation, atol=1e-4, rtol=1e-3)
    assert {"normal", "normal_scores"} <= method.state_dict().keys()  # a saved detector needs them


def test_padding_has_no_part_in_what_is_normal(method):
    features = learned(method)
    valid = torch.zeros(10, GRID, GRID, dtype=torch.bool)
    valid[:, 2:6] = True
    method.finish(features, valid)
    before = method.normal.clone(), method.normal_scores.clone()
    with torch.no_grad():
        found = method(features.float())
        inside = standardised(method, found.witnesses)[:, :, 2:6]
        assert method.fuse(found, valid)[1].mean().item() == pytest.approx(0, abs=1e-3)
    torch.testing.assert_close(inside.mean((0, 2, 3)), torch.zeros(method.kinds), atol=1e-3, rtol=0)
    torch.testing.assert_close(inside.std((0, 2, 3)), torch.ones(method.kinds), atol=1e-3, rtol=0)
    if isinstance(method, Lookup):  # which looks at each cell by itself: what stands in the padding is all the same
        method.finish(torch.where(valid[:, None], features, 9.0), valid)
        torch.testing.assert_close((method.normal, method.normal_scores), before)


def test_one_training_picture_gives_finite_numbers(method):
    features = learned(method)
    method.finish(features[:1])
    with torch.no_grad():
        maps, scores = method.fuse(method(features[:3].float()))
    assert maps.isfinite().all() and scores.isfinite().all()


@pytest.mark.parametrize("levels", [(2,), (2, 3), (1, 2, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("name", ["lookup", "uranet"])
def test_any_number_of_levels_gives_one_map(tiny, name, levels):
    method = create(tiny(name, **{"features.levels": levels}), "random")
    features = learned(method)
    method.finish(features)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps, scores = method.fuse(method(method.embed(images)))
    assert maps.shape == (2, 64, 64) and scores.shape == (2,)
    assert maps.isfinite().all() and scores.isfinite().all()


def test_lookup_is_the_distance_to_the_memory(tiny):
    method = create(tiny("lookup"), "random")
    features = learned(method)
    with torch.no_grad():
        found = method(features.float())
    recalled, distance = method.memory(features.float())
    assert torch.equal(found.witnesses, distance) and torch.equal(found.restored, recalled)
    assert not list(p for p in method.parameters() if p.requires_grad)
    with pytest.raises(TypeError, match="Lookup has nothing to train"):
        method.loss({"features": features.float()}, torch.Generator())
