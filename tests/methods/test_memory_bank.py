from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from unflaw.methods.feature_set import Context, FeatureSet
from unflaw.methods.memory_bank import CHUNK, MOST_TOKENS, MemoryBank, RegionalMemoryBank

CHANNELS = 6


def rng(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def features() -> Tensor:
    return torch.randn(4, CHANNELS, 8, 8, generator=rng())


def filled(features: Tensor, size: int = 20, sharpness: float = 2.0, neighbours: int = 8, seed: int = 1) -> MemoryBank:
    memory = MemoryBank(size, CHANNELS, sharpness, neighbours)
    memory.fit(FeatureSet.of(features), rng(seed))
    return memory


def as_tokens(features: Tensor) -> Tensor:
    return features.permute(0, 2, 3, 1).reshape(-1, CHANNELS)


def brute_force(tokens: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to the nearest prototype, and that prototype."""
    distances = (tokens[:, None] - prototypes).norm(dim=-1)
    return distances.amin(1), prototypes[distances.argmin(1)]


def not_of(image: Tensor, prototypes: Tensor) -> Tensor:
    """The prototypes that are no tokens of this image (C, g, g)."""
    own = (prototypes[:, None] == as_tokens(image[None])).all(-1).any(1)
    assert own.any() and not own.all()
    return prototypes[~own]


def test_prototypes_are_tokens_of_the_images(features):
    memory, tokens = filled(features), as_tokens(features)
    assert memory.prototypes.shape == (20, CHANNELS)
    assert all((tokens == p).all(1).any() for p in memory.prototypes)
    assert len(memory.prototypes.unique(dim=0)) == 20
    again = filled(features)
    assert all(torch.equal(tensor, memory.state_dict()[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_the_radius_is_the_median_distance_to_what_other_images_taught(features, scale):
    scaled = scale * features
    memory = filled(scaled)
    distances = [brute_force(as_tokens(f[None]), not_of(f, memory.prototypes))[0] for f in scaled]
    assert memory.radius.item() == pytest.approx(torch.cat(distances).median().item(), rel=1e-4)
    assert memory.radius > brute_force(as_tokens(scaled), memory.prototypes)[0].median()


def test_half_precision_features_are_taken_as_cached(features):
    memory = filled(features.half())
    assert memory.prototypes.dtype == torch.float32 and memory.prototypes.abs().sum() > 0


def numbered(features: Tensor) -> Tensor:
    """With the number of the image, in hundreds, in all of its tokens."""
    return features + torch.arange(4.0).mul(100).view(4, 1, 1, 1)


def test_of_more_images_than_it_can_look_at_it_takes_some(monkeypatch, features):
    """Whole ones, drawn from everywhere."""
    monkeypatch.setattr("unflaw.methods.memory_bank.MOST_TOKENS", 2 * 64)
    assert MOST_TOKENS > 2 * 64
    seen = set()
    for seed in range(20):
        memory = filled(numbered(features), seed=seed)
        images = (memory.prototypes.mean(1) / 100).round()
        assert memory.banks[0].source_images.tolist() == images.tolist()  # by their rows among all
        seen.add(tuple(images.unique().tolist()))
    assert all(len(images) == 2 for images in seen)
    assert {image for images in seen for image in images} == {0, 1, 2, 3}


def test_distances_are_those_of_a_full_search(features):
    memory = filled(features)
    tokens = torch.randn(10 * CHUNK + 1, CHANNELS, generator=rng(2))  # more than one chunk, the last one smaller
    _, distance, least, _ = memory.retrieve(tokens)
    assert distance.shape == (len(tokens),)
    expected = brute_force(tokens, memory.prototypes)[0]
    torch.testing.assert_close(distance, expected, atol=1e-3, rtol=1e-4)
    assert torch.equal(least, distance)  # as long as it was not extended


def attention(memory: MemoryBank, tokens: Tensor, keys: Tensor) -> Tensor:
    """Softmax over the nearest keys, as the words say it."""
    squared = (tokens[:, None] - keys).square().sum(-1)
    squared, nearest = squared.topk(min(memory.neighbours, len(keys)), largest=False)
    weights = (-memory.sharpness * squared / memory.radius**2).softmax(-1)
    return (weights[..., None] * keys[nearest]).sum(1)


@pytest.mark.parametrize("neighbours", [1, 3, 8, 100])
@pytest.mark.parametrize("sharpness", [0.1, 2.0])
def test_recall_is_attention_to_the_nearest_prototypes(features, sharpness, neighbours):
    memory = filled(features, sharpness=sharpness, neighbours=neighbours)
    tokens = torch.randn(CHUNK + 100, CHANNELS, generator=rng(2))
    expected = attention(memory, tokens, memory.prototypes)
    torch.testing.assert_close(memory.retrieve(tokens)[0], expected, atol=1e-4, rtol=1e-4)


def test_sharp_recall_is_the_nearest_prototype_and_flat_recall_the_mean_of_the_nearest(features):
    tokens = torch.randn(100, CHANNELS, generator=rng(2))
    sharp, flat = (filled(features, sharpness=sharpness) for sharpness in (1e4, 1e-7))
    keys = sharp.prototypes
    ordered, order = (tokens[:, None] - keys).norm(dim=-1).sort()
    clear = ordered[:, 1] - ordered[:, 0] > 0.05  # no tie
    assert clear.any()
    nearest = brute_force(tokens, keys)[1]
    torch.testing.assert_close(sharp.retrieve(tokens)[0][clear], nearest[clear], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(flat.retrieve(tokens)[0], keys[order[:, :8]].mean(1), atol=1e-4, rtol=1e-4)


def test_recall_never_leaves_the_prototypes(features):
    memory = filled(features)
    for far in (1e1, 1e3, 1e5):
        recalled = memory.retrieve(far * torch.randn(200, CHANNELS, generator=rng(3)))[0]
        low, high = memory.prototypes.amin(0) - 1e-4, memory.prototypes.amax(0) + 1e-4
        assert ((recalled >= low) & (recalled <= high)).all()


def test_grids_are_their_tokens(features):
    memory = filled(features)
    memory.add_prototypes(FeatureSet.of(2 * features), rng(2))
    recalled, *distances = memory(features)
    mixture, *expected = memory.retrieve(as_tokens(features))
    assert recalled.shape == features.shape
    torch.testing.assert_close(as_tokens(recalled), mixture)
    for grid, tokens in zip(distances, expected, strict=True):
        assert grid.shape == (4, 1, 8, 8)
        torch.testing.assert_close(grid.flatten(), tokens)


def test_what_an_image_taught_is_left_out_for_it(features):
    """As if only the others had been there, wherever in a batch it stands."""
    memory = filled(features)
    rows = torch.tensor([2, 0, 3])
    recalled, distance, least, _ = memory(features[rows], Context(training_rows=rows))
    for i, row in enumerate(rows.tolist()):
        tokens, others = as_tokens(features[row : row + 1]), not_of(features[row], memory.prototypes)
        expected = attention(memory, tokens, others)
        torch.testing.assert_close(as_tokens(recalled[i : i + 1]), expected, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(distance[i].flatten(), brute_force(tokens, others)[0], atol=1e-3, rtol=1e-4)
    assert torch.equal(least, distance)
    assert (distance >= memory(features[rows])[1] - 1e-4).all()


def test_a_token_can_leave_out_several_images_but_not_all(features):
    memory = filled(features)
    tokens = torch.randn(CHUNK + 3, CHANNELS, generator=rng(2))
    leave = torch.tensor([[0, 2], [3, 3], [1, 1]]).repeat(len(tokens), 1)[: len(tokens)]
    distance = memory.retrieve(tokens, leave)[1]
    for left_out in ({0, 2}, {3}, {1}):
        mine = torch.tensor([set(row) == left_out for row in leave.tolist()])
        others = memory.prototypes[torch.tensor([o not in left_out for o in memory.banks[0].source_images.tolist()])]
        torch.testing.assert_close(distance[mine], brute_force(tokens[mine], others)[0], atol=1e-3, rtol=1e-4)
    everything = torch.arange(4).expand(len(tokens), 4)
    torch.testing.assert_close(memory.retrieve(tokens, everything), memory.retrieve(tokens))


def test_an_image_without_prototypes_has_nothing_excluded(monkeypatch, features):
    monkeypatch.setattr("unflaw.methods.memory_bank.MOST_TOKENS", 2 * 64)
    memory = filled(features)
    without = torch.tensor([row for row in range(4) if row not in memory.banks[0].source_images])
    assert len(without) == 2
    found = memory(features[without], Context(training_rows=without))
    for left_out, expected in zip(found, memory(features[without]), strict=True):
        torch.testing.assert_close(left_out, expected, atol=3e-3, rtol=1e-4)


def test_fewer_tokens_than_prototypes_fill_the_memory(features):
    few = features[:2, :, :2, :2]
    memory = filled(few, size=20)
    assert len(memory.prototypes.unique(dim=0)) == 8
    recalled, distance, *_ = memory(few)
    assert recalled.isfinite().all()
    torch.testing.assert_close(distance, torch.zeros(2, 1, 2, 2), atol=2e-3, rtol=0)
    rows = torch.arange(2)
    apart = torch.cdist(as_tokens(few[:1]), as_tokens(few[1:]))
    expected = torch.cat([apart.amin(1), apart.amin(0)])  # all copies of a token have the same owner
    torch.testing.assert_close(memory(few, Context(training_rows=rows))[1].flatten(), expected, atol=1e-3, rtol=1e-4)
    assert all(t.isfinite().all() for t in memory(torch.randn(1, CHANNELS, 3, 3, generator=rng(1))))


def test_a_single_image_gives_finite_numbers(features):
    memory = filled(features[:1])
    for found in (memory(features), memory(features[:1], Context(training_rows=torch.arange(1)))):
        assert all(t.isfinite().all() for t in found)
    assert memory.radius.isfinite() and memory.radius > 0


@pytest.mark.parametrize("size", [1, 3])
def test_a_memory_of_next_to_nothing_works(features, size):
    """Too small to be extended."""
    memory = filled(features, size=size)
    memory.add_prototypes(FeatureSet.of(features), rng())
    expected = brute_force(as_tokens(features), memory.prototypes)[0]
    _, distance, least, _ = memory(features)
    torch.testing.assert_close(distance.flatten(), expected, atol=3e-3, rtol=1e-4)
    assert torch.equal(least, distance)
    assert all(t.isfinite().all() for t in memory(features, Context(training_rows=torch.arange(4))))


def test_images_that_are_mostly_one_colour_do_not_break_recall():
    """More than half of all tokens are the same: their distance to the nearest prototype is 0."""
    features = torch.ones(4, CHANNELS, 8, 8)
    features[:, :, 0] = torch.randn(4, CHANNELS, 8, generator=rng())
    memory = filled(features, size=10)
    assert all(t.isfinite().all() for t in memory(torch.randn(1, CHANNELS, 3, 3, generator=rng(1))))
    same = torch.ones(1, CHANNELS, 1, 1)
    torch.testing.assert_close(memory(same)[0], same, atol=1e-3, rtol=0)


def test_extending_can_only_lower_the_least_distance_and_leaves_the_rest_alone():
    """So that what calibrated the detector may be learned afterwards: no image scores higher than before."""
    rng = torch.Generator().manual_seed(0)
    known, held, new = (torch.randn(n, 6, 4, 4, generator=rng) + shift for n, shift in ((8, 0), (4, 3), (4, 3)))
    everything = torch.cat([known, held, new])
    memory = MemoryBank(32, 6)
    memory.fit(FeatureSet.of(known), rng)
    before = memory(everything)
    memory.add_prototypes(FeatureSet.of(held), rng)
    after = memory(everything)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert (after[2] <= before[2]).all()
    assert after[2][12:].mean() < 0.8 * before[2][12:].mean()  # images like those held out, too
    expected = brute_force(as_tokens(everything), torch.cat([memory.prototypes, memory.added]))[0]
    torch.testing.assert_close(after[2].flatten(), expected, atol=5e-3, rtol=1e-4)
    assert all((as_tokens(held) == p).all(1).any() for p in memory.added)
    memory.fit(FeatureSet.of(known), torch.Generator().manual_seed(0))
    assert (memory.added == memory.added[0, 0]).all()  # fitting anew forgets them


@pytest.mark.parametrize("windows", [1, 2])
def test_what_an_image_added_is_left_out_for_it(windows):
    """All windows of it; what other held-out images added, and what training taught, is not."""
    rng = torch.Generator().manual_seed(0)
    known, held = torch.randn(8, 6, 4, 4, generator=rng), torch.randn(4, 6, 4, 4, generator=rng) + 3
    memory, images = MemoryBank(32, 6), torch.arange(4) // windows
    memory.fit(FeatureSet.of(known), rng)
    memory.add_prototypes(FeatureSet(held, images), rng)
    rows = torch.tensor([2, 0, 3, 1])
    mixture, distance, least, _ = memory(held[rows], Context(added_rows=rows))
    assert (least > memory(held[rows])[2]).any()
    assert all(torch.equal(a, b) for a, b in zip((mixture, distance), memory(held[rows])[:2], strict=True))
    for row, found in zip(rows.tolist(), least, strict=True):
        own = held[images == images[row]]
        mine = (memory.added[:, None] == as_tokens(own)).all(-1).any(1)
        others = torch.cat([memory.prototypes, memory.added[~mine]])
        expected = brute_force(as_tokens(held[row : row + 1]), others)[0]
        torch.testing.assert_close(found.flatten(), expected, atol=5e-3, rtol=1e-4)
    memory.add_prototypes(
        FeatureSet(held, torch.zeros(4, dtype=torch.long)), rng
    )  # all of one image: nothing that was added is left
    _, distance, least, _ = memory(held, Context(added_rows=torch.arange(4)))
    assert torch.equal(least, distance)


def crowded(prototypes: Tensor, others: Tensor) -> Tensor:
    """Mean distance of each prototype to the 4 nearest others, by sorting all of them."""
    return torch.cdist(prototypes, others).sort(1).values[:, 1:5].mean(1)


def less_spacing(tokens: Tensor, prototypes: Tensor, spacing: Tensor) -> Tensor:
    """The smallest distance to one of the 4 nearest prototypes less a quarter of its spacing, by sorting all."""
    apart, order = torch.cdist(tokens, prototypes).sort(1)
    return (apart - 0.25 * spacing[order])[:, :4].amin(1).clamp_min(0)


def test_the_scored_distance_does_not_jump_between_prototypes_equally_near(features):
    """Runtimes round differently, and may find either of the two first."""
    memory = filled(features)
    a, b = memory.prototypes[:1], memory.prototypes[1:]
    middle = (a + b[torch.cdist(a, b).argmin(1)]) / 2
    steps = torch.linspace(-1e-3, 1e-3, 41)[:, None] * (a - middle)
    scored = memory.retrieve(middle + steps).scored
    assert scored.diff().abs().max() < 1e-3 and memory.spacing.std() > 0.01


def test_the_scored_distance_counts_for_less_where_prototypes_lie_far_apart(features):
    memory = filled(features)
    torch.testing.assert_close(memory.spacing, crowded(memory.prototypes, memory.prototypes))
    tokens = torch.randn(300, CHANNELS, generator=rng(3))
    expected = less_spacing(tokens, memory.prototypes, memory.spacing)
    torch.testing.assert_close(memory.retrieve(tokens).scored, expected, atol=1e-3, rtol=1e-3)
    known = memory(features).scored
    assert (known >= 0).all() and (known == 0).any()  # a prototype itself is not nearer than at home


def test_spacing_leaves_out_what_an_image_taught(features):
    """As if only the others had been there."""
    memory, row = filled(features), 2
    others = not_of(features[row], memory.prototypes)
    tokens = as_tokens(features[row : row + 1])
    expected = less_spacing(tokens, others, crowded(others, others))
    found = memory(features[row : row + 1], Context(training_rows=torch.tensor([row]))).scored
    torch.testing.assert_close(found.flatten(), expected, atol=1e-3, rtol=1e-3)


def test_prototypes_added_can_only_lower_the_scored_distance(features):
    memory, new = filled(features), 3 * torch.randn(300, CHANNELS, generator=rng(3))
    before = memory.retrieve(new).scored
    memory.add_prototypes(FeatureSet.of(3 * features[:2]), rng(2))
    torch.testing.assert_close(
        memory.added_spacing, crowded(memory.added, torch.cat([memory.prototypes, memory.added]))
    )
    after = memory.retrieve(new).scored
    assert (after <= before).all() and (after < before - 0.1).any()
    added = less_spacing(new, memory.added, memory.added_spacing)
    torch.testing.assert_close(after, torch.minimum(before, added), atol=1e-3, rtol=1e-3)
    rows = torch.zeros(300, dtype=torch.long)
    own = memory.retrieve(new, added_rows=rows).scored
    assert (own >= after - 1e-6).all() and (own > after + 1e-3).any()
    memory.select_category(0)
    assert not memory.added_spacing.any()
    torch.testing.assert_close(memory.retrieve(new).scored, before)


def test_repeated_prototypes_are_no_neighbours_of_themselves(features):
    few = features[:2, :, :2, :2]
    memory = filled(few, size=20)
    distinct = as_tokens(few)
    expected = crowded(distinct, distinct)
    for prototype, found in zip(memory.prototypes, memory.spacing, strict=True):
        assert found.item() == pytest.approx(expected[(distinct == prototype).all(1)].item(), rel=1e-4)
    assert not filled(features[:1, :, :1, :1], size=4).spacing.any()  # one token has no neighbour


def test_training_rows_mean_training_images_also_after_extending(features):
    memory, rows = filled(features), torch.tensor([2, 0])
    before = memory(features[rows], Context(training_rows=rows))
    memory.add_prototypes(FeatureSet.of(3 * features), rng(2))
    after = memory(features[rows], Context(training_rows=rows))
    assert all(torch.equal(a, b) for a, b in zip(before[:2], after[:2], strict=True))
    assert (after[1] > memory(features[rows])[1] + 1e-3).any()  # they are still left out
    both = memory(3 * features[rows], Context(training_rows=rows, added_rows=rows))[2]
    assert (both > memory(3 * features[rows], Context(training_rows=rows))[2] + 1e-3).any()


def test_leave_one_out_is_refused_where_nobody_knows_what_to_leave_out(features):
    """As after loading: silently leaving out nothing would make training images look more normal than new ones."""
    memory, rows = filled(features), torch.arange(4)
    with pytest.raises(RuntimeError, match="held-out images can be excluded only once"):
        memory(features, Context(added_rows=rows))
    loaded = MemoryBank(20, CHANNELS)
    loaded.load_state_dict(memory.state_dict())
    for unknowing in (MemoryBank(20, CHANNELS), loaded):
        with pytest.raises(RuntimeError, match="leave-one-out needs to know which training image"):
            unknowing(features, Context(training_rows=rows))
    torch.testing.assert_close(loaded(features), memory(features))
    memory.end_training()
    with pytest.raises(RuntimeError, match="leave-one-out needs"):
        memory(features, Context(training_rows=rows))


def test_the_search_is_in_float32_under_autocast(features):
    """In bfloat16 a good part of the tokens would find another neighbour."""
    memory = filled(40 + features, size=200)
    tokens = 40 + torch.randn(2 * CHUNK, CHANNELS, generator=rng(2))
    expected = memory.retrieve(tokens, torch.zeros(len(tokens), 1, dtype=torch.long))
    with torch.autocast("cpu", torch.bfloat16):
        found = memory.retrieve(tokens, torch.zeros(len(tokens), 1, dtype=torch.long))
    assert all(part.dtype == torch.float32 for part in found)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# Whole regions


def to_regions(features: Tensor) -> Tensor:
    return -F.avg_pool2d(features, 2, ceil_mode=True)


def regions_of(features: Tensor) -> Tensor:
    """Apart from what all regions of an image have in common."""
    coarse = to_regions(features)
    return coarse - coarse.mean((2, 3), keepdim=True)


def judge(features: Tensor, size: int = 20) -> RegionalMemoryBank:
    made = RegionalMemoryBank(size, SimpleNamespace(regional_channels=CHANNELS, to_regions=to_regions))
    made.fit(FeatureSet.of(features), rng(1))
    return made


def as_scored(regions: Tensor, prototypes: Tensor, spacing: Tensor) -> Tensor:
    return less_spacing(as_tokens(regions), prototypes, spacing)


@pytest.mark.parametrize("side", [8, 7])
def test_a_judge_says_how_far_the_nearest_known_region_is(features, side):
    """Those of the image itself left out, for one of training."""
    cut = features[..., :side, :side]
    made, regions = judge(cut), regions_of(cut)
    prototypes = made.memory.prototypes
    assert all((as_tokens(regions) == p).all(1).any() for p in prototypes)
    found, new = made(cut), made(2 * cut)
    assert found.shape == (4, 1, 4, 4)
    torch.testing.assert_close(found.flatten(), as_scored(regions, prototypes, made.memory.spacing), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        new.flatten(), as_scored(2 * regions, prototypes, made.memory.spacing), atol=1e-3, rtol=0
    )
    rows = torch.tensor([3, 1])
    for row, alone in zip(rows.tolist(), made(cut[rows], Context(training_rows=rows)), strict=True):
        others = not_of(regions[row], prototypes)
        expected = as_scored(regions[row : row + 1], others, crowded(others, others))
        torch.testing.assert_close(alone.flatten(), expected, atol=1e-3, rtol=0)


def test_what_a_whole_image_has_in_common_does_not_matter_to_a_judge(features):
    made = judge(features)
    shift = torch.arange(float(CHANNELS)).view(1, -1, 1, 1)
    torch.testing.assert_close(made(features + shift), made(features), atol=1e-3, rtol=0)


def test_what_does_not_count_has_no_part_in_what_an_image_has_in_common(features):
    made, valid = judge(features), torch.zeros(len(features), *features.shape[-2:], dtype=torch.bool)
    valid[:, :4] = True
    other = torch.where(valid[:, None], features, 50.0)
    found, expected = (made(f, Context(valid))[:, :, :2] for f in (other, features))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_a_judge_learns_from_all_cached_images(features):
    many = torch.cat([features] * 10).half()
    many[-1] *= 100  # far from all others, in the second part
    assert (judge(many).memory.prototypes.abs().amax(1) > 50).any()


def test_extending_a_judge_can_only_lower_what_it_says(features):
    made, held, new = judge(features), 2 * features[:2], 3 * features
    before = made(held), made(new)
    made.add_prototypes(FeatureSet.of(held.half()), rng(2))
    after = made(held), made(new)
    assert all((a <= b).all() for a, b in zip(after, before, strict=True))
    assert after[0].mean() < 0.9 * before[0].mean()
    kept = (made.memory.prototypes, made.memory.spacing), (made.memory.added, made.memory.added_spacing)
    expected = torch.minimum(*(as_scored(regions_of(new), *bank) for bank in kept))
    torch.testing.assert_close(after[1].flatten(), expected, atol=1e-3, rtol=0)


def test_no_tokens_are_recalled_as_none_of_several_categories_too():
    memory = MemoryBank(16, 4)
    rng = torch.Generator().manual_seed(0)
    memory.fit(FeatureSet.of(torch.randn(8, 4, 4, 4, generator=rng), categories=torch.tensor([0] * 4 + [1] * 4)), rng)
    mixture, distance, least, scored = memory.retrieve(torch.zeros(0, 4), torch.zeros(0, 2, dtype=torch.long))
    assert mixture.shape == (0, 4) and distance.shape == least.shape == scored.shape == (0,)
