import pytest
import torch
from torch import Generator, Tensor

from unflaw.methods.memory import CHUNK, MOST_TOKENS, Memory

CHANNELS = 6


def rng(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def features() -> Tensor:
    return torch.randn(4, CHANNELS, 8, 8, generator=rng())


def filled(features: Tensor, size: int = 20, sharpness: float = 2.0, seed: int = 1) -> Memory:
    memory = Memory(size, CHANNELS, sharpness)
    memory.fit(features, rng(seed))
    return memory


def as_tokens(features: Tensor) -> Tensor:
    return features.permute(0, 2, 3, 1).reshape(-1, CHANNELS)


def brute_force(tokens: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to the nearest prototype, and that prototype."""
    distances = (tokens[:, None] - prototypes).norm(dim=-1)
    return distances.amin(1), prototypes[distances.argmin(1)]


def test_prototypes_are_tokens_of_the_pictures(features):
    memory, tokens = filled(features), as_tokens(features)
    assert memory.prototypes.shape == (20, CHANNELS)
    assert all((tokens == p).all(1).any() for p in memory.prototypes)
    assert len(memory.prototypes.unique(dim=0)) == 20
    again = filled(features)
    assert all(torch.equal(tensor, memory.state_dict()[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_the_radius_is_a_typical_distance_and_the_limit_a_rare_one(features, scale):
    scaled = scale * features
    memory = filled(scaled)
    distances = brute_force(as_tokens(scaled), memory.prototypes)[0]
    assert memory.radius.item() == pytest.approx(distances.median().item(), rel=0.1)
    assert distances.quantile(0.97) <= memory.limit <= distances.max() + 1e-3


def test_half_precision_features_are_taken_as_cached(features):
    memory = filled(features.half())
    assert memory.prototypes.dtype == torch.float32 and memory.prototypes.abs().sum() > 0


def test_of_more_pictures_than_it_can_look_at_it_takes_some(monkeypatch, features):
    """Whole ones, drawn from everywhere."""
    monkeypatch.setattr("unflaw.methods.memory.MOST_TOKENS", 2 * 64)
    assert MOST_TOKENS > 2 * 64
    numbered = features + torch.arange(4.0).mul(100).view(4, 1, 1, 1)
    seen = {
        tuple((filled(numbered, seed=seed).prototypes.mean(1) / 100).round().unique().tolist()) for seed in range(20)
    }
    assert all(len(pictures) == 2 for pictures in seen)
    assert {picture for pictures in seen for picture in pictures} == {0, 1, 2, 3}


def test_distances_are_those_of_a_full_search(features):
    memory = filled(features)
    tokens = torch.randn(10 * CHUNK + 1, CHANNELS, generator=rng(2))  # more than one chunk, the last one smaller
    distance = memory.recall(tokens)[1]
    assert distance.shape == (len(tokens),)
    expected = brute_force(tokens, memory.prototypes)[0]
    torch.testing.assert_close(distance, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("sharpness", [0.1, 2.0])
def test_recall_is_attention_to_prototypes(features, sharpness):
    memory = filled(features, sharpness=sharpness)
    tokens = torch.randn(CHUNK + 100, CHANNELS, generator=rng(2))
    mixture = memory.recall(tokens)[0]
    keys = memory.prototypes
    squared = (tokens[:, None] - keys).square().sum(-1)
    expected = (-sharpness * squared / memory.radius**2).softmax(-1) @ keys
    torch.testing.assert_close(mixture, expected, atol=1e-4, rtol=1e-4)


def test_sharp_recall_is_the_nearest_prototype_and_flat_recall_their_mean(features):
    tokens = torch.randn(100, CHANNELS, generator=rng(2))
    sharp, flat = (filled(features, sharpness=sharpness) for sharpness in (1e4, 1e-7))
    keys = sharp.prototypes
    two = (tokens[:, None] - keys).norm(dim=-1).topk(2, largest=False).values
    clear = two[:, 1] - two[:, 0] > 0.05  # no tie
    assert clear.any()
    nearest = brute_force(tokens, keys)[1]
    torch.testing.assert_close(sharp.recall(tokens)[0][clear], nearest[clear], atol=1e-3, rtol=1e-3)
    mean = flat.prototypes.mean(0).expand_as(tokens)
    torch.testing.assert_close(flat.recall(tokens)[0], mean, atol=1e-4, rtol=1e-4)


def test_recall_never_leaves_the_prototypes(features):
    memory = filled(features)
    for far in (1e1, 1e3, 1e5):
        recalled = memory.recall(far * torch.randn(200, CHANNELS, generator=rng(3)))[0]
        low, high = memory.prototypes.amin(0) - 1e-4, memory.prototypes.amax(0) + 1e-4
        assert ((recalled >= low) & (recalled <= high)).all()


def test_grids_are_their_tokens(features):
    memory = filled(features)
    recalled, distance = memory(features)
    assert recalled.shape == features.shape and distance.shape == (4, 1, 8, 8)
    mixture, expected = memory.recall(as_tokens(features))
    torch.testing.assert_close(as_tokens(recalled), mixture)
    torch.testing.assert_close(distance.flatten(), expected)


def test_fewer_tokens_than_prototypes_fill_the_memory(features):
    few = features[:1, :, :2, :2]
    memory = filled(few, size=10)
    assert len(memory.prototypes.unique(dim=0)) == 4
    recalled, distance = memory(few)
    assert recalled.isfinite().all() and distance.isfinite().all()
    torch.testing.assert_close(recalled, few, atol=1e-2, rtol=1e-2)
    assert all(t.isfinite().all() for t in memory(torch.randn(1, CHANNELS, 3, 3, generator=rng(1))))


def test_pictures_that_are_mostly_one_colour_do_not_break_recall():
    """More than half of all tokens are the same: their distance to the nearest prototype is 0."""
    features = torch.ones(4, CHANNELS, 8, 8)
    features[:, :, 0] = torch.randn(4, CHANNELS, 8, generator=rng())
    memory = filled(features, size=10)
    recalled, distance = memory(torch.randn(1, CHANNELS, 3, 3, generator=rng(1)))
    assert recalled.isfinite().all() and distance.isfinite().all()
    same = torch.ones(1, CHANNELS, 1, 1)
    torch.testing.assert_close(memory(same)[0], same, atol=1e-3, rtol=0)


def test_extending_can_only_lower_distances_and_leaves_the_recall_alone():
    """So that what calibrated the detector may be learned afterwards: no picture scores higher than before."""
    rng = torch.Generator().manual_seed(0)
    known, held, new = (torch.randn(n, 6, 4, 4, generator=rng) + shift for n, shift in ((8, 0), (4, 3), (4, 3)))
    memory = Memory(32, 6)
    memory.fit(known, rng)
    before = memory(torch.cat([known, held, new]))
    memory.extend(held, rng)
    after = memory(torch.cat([known, held, new]))
    assert torch.equal(before[0], after[0])
    assert (after[1] <= before[1]).all()
    assert after[1][8:].mean() < 0.8 * before[1][8:].mean()  # pictures like those held out, too
    memory.fit(known, torch.Generator().manual_seed(0))
    assert (memory.extra == memory.extra[0, 0]).all()  # fitting anew forgets them
