import pytest
import torch
from torch import Generator, Tensor

from unflaw.methods.memory import Memory

LEVELS = [2, 4]
PARTS = (slice(0, 2), slice(2, 6))


def rng(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def features() -> Tensor:
    return torch.randn(4, 6, 8, 8, generator=rng())


def filled(features: Tensor, size: int = 20, sharpness: float = 2.0, seed: int = 1) -> Memory:
    memory = Memory(size, LEVELS, sharpness)
    memory.fit(features, rng(seed))
    return memory


def as_tokens(features: Tensor) -> Tensor:
    return features.permute(0, 2, 3, 1).reshape(-1, 6)


def brute_force(tokens: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to the nearest prototype, and that prototype."""
    distances = (tokens[:, None] - prototypes).norm(dim=-1)
    return distances.amin(1), prototypes[distances.argmin(1)]


def test_prototypes_are_tokens_of_the_pictures(features):
    memory, tokens = filled(features), as_tokens(features)
    assert memory.prototypes.shape == (20, 6)
    for part in PARTS:
        assert all((tokens[:, part] == p).all(1).any() for p in memory.prototypes[:, part])
        assert len(memory.prototypes[:, part].unique(dim=0)) == 20
    again = filled(features)
    assert torch.equal(again.prototypes, memory.prototypes) and torch.equal(again.radius, memory.radius)


def test_the_radius_is_a_typical_distance_of_its_level(features):
    scaled = features.clone()
    scaled[:, 2:] *= 10
    memory = filled(scaled)
    for part, radius in zip(PARTS, memory.radius, strict=True):
        distances = brute_force(as_tokens(scaled)[:, part], memory.prototypes[:, part])[0]
        assert radius.item() == pytest.approx(distances.median().item(), rel=0.1)


def test_half_precision_features_are_taken_as_cached(features):
    memory = filled(features.half())
    assert memory.prototypes.dtype == torch.float32 and memory.prototypes.abs().sum() > 0


def test_distances_are_those_of_a_full_search(features):
    memory = filled(features)
    tokens = torch.randn(3000, 6, generator=rng(2))  # more than one chunk
    distance = memory.recall(tokens)[1]
    assert distance.shape == (3000, 2)
    for i, part in enumerate(PARTS):
        expected = brute_force(tokens[:, part], memory.prototypes[:, part])[0]
        torch.testing.assert_close(distance[:, i], expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("sharpness", [0.1, 2.0])
def test_recall_is_attention_to_prototypes(features, sharpness):
    memory = filled(features, sharpness=sharpness)
    tokens = torch.randn(100, 6, generator=rng(2))
    mixture = memory.recall(tokens)[0]
    for part, radius in zip(PARTS, memory.radius, strict=True):
        keys = memory.prototypes[:, part]
        squared = (tokens[:, None, part] - keys).square().sum(-1)
        expected = (-sharpness * squared / radius**2).softmax(-1) @ keys
        torch.testing.assert_close(mixture[:, part], expected, atol=1e-4, rtol=1e-4)


def test_sharp_recall_is_the_nearest_prototype_and_flat_recall_their_mean(features):
    tokens = torch.randn(100, 6, generator=rng(2))
    sharp, flat = (filled(features, sharpness=sharpness) for sharpness in (1e4, 1e-7))
    for part in PARTS:
        keys = sharp.prototypes[:, part]
        two = (tokens[:, None, part] - keys).norm(dim=-1).topk(2, largest=False).values
        clear = two[:, 1] - two[:, 0] > 0.05  # no tie
        assert clear.any()
        nearest = brute_force(tokens[:, part], keys)[1]
        torch.testing.assert_close(sharp.recall(tokens)[0][clear][:, part], nearest[clear], atol=1e-3, rtol=1e-3)
    mean = flat.prototypes.mean(0).expand_as(tokens)
    torch.testing.assert_close(flat.recall(tokens)[0], mean, atol=1e-4, rtol=1e-4)


def test_recall_never_leaves_the_prototypes(features):
    memory = filled(features)
    for far in (1e1, 1e3, 1e5):
        recalled = memory.recall(far * torch.randn(200, 6, generator=rng(3)))[0]
        low, high = memory.prototypes.amin(0) - 1e-4, memory.prototypes.amax(0) + 1e-4
        assert ((recalled >= low) & (recalled <= high)).all()


def test_grids_are_their_tokens(features):
    memory = filled(features)
    recalled, distance = memory(features)
    assert recalled.shape == features.shape and distance.shape == (4, 2, 8, 8)
    mixture, expected = memory.recall(as_tokens(features))
    torch.testing.assert_close(as_tokens(recalled), mixture)
    torch.testing.assert_close(distance.permute(0, 2, 3, 1).reshape(-1, 2), expected)


def test_fewer_tokens_than_prototypes_fill_the_memory(features):
    few = features[:1, :, :2, :2]
    memory = filled(few, size=10)
    assert len(memory.prototypes.unique(dim=0)) == 4
    recalled, distance = memory(few)
    assert recalled.isfinite().all() and distance.isfinite().all()
    torch.testing.assert_close(recalled, few, atol=1e-2, rtol=1e-2)
    assert all(t.isfinite().all() for t in memory(torch.randn(1, 6, 3, 3, generator=rng(1))))


def test_pictures_that_are_mostly_one_colour_do_not_break_recall():
    """More than half of all tokens are the same: their distance to the nearest prototype is 0."""
    features = torch.ones(4, 6, 8, 8)
    features[:, :, 0] = torch.randn(4, 6, 8, generator=rng())
    memory = filled(features, size=10)
    recalled, distance = memory(torch.randn(1, 6, 3, 3, generator=rng(1)))
    assert recalled.isfinite().all() and distance.isfinite().all()
    torch.testing.assert_close(memory(torch.ones(1, 6, 1, 1))[0], torch.ones(1, 6, 1, 1), atol=1e-3, rtol=0)
