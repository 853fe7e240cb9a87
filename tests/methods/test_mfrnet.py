import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import first_rows
from torch import Generator, Tensor

from unflaw.config import Weights, make_config
from unflaw.detector import Detector
from unflaw.methods.crossed_masks import HybridBlock, MFRNetOptions, RestorationNetwork, crossed_masks
from unflaw.methods.feature_set import FeatureSet
from unflaw.methods.layers import gradient_magnitude_similarity, ssim_map
from unflaw.methods.mfrnet import SCALES, STABLE, WINDOW, MFRNet
from unflaw.training.loop import optimise

pytestmark = pytest.mark.slow

CHANNELS, GRID = 8, 8  # components and grid of the tiny configuration


def rng(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def network(tiny, **changes) -> MFRNet:
    """Without a memory, as in the paper, unless asked for."""
    torch.manual_seed(0)
    changes = {"prototypes": 0, **changes}
    return MFRNet(
        tiny("mfrnet", **{f"network.{name}": value for name, value in changes.items()}), Weights.RANDOM
    ).eval()


@pytest.fixture(scope="module")
def features() -> Tensor:
    """A few patterns, smooth over places, and a little noise."""
    patterns = torch.randn(4, CHANNELS, generator=rng())
    weights = F.interpolate(torch.randn(12, 4, 3, 3, generator=rng(1)), (GRID, GRID), mode="bicubic")
    return torch.einsum("nkij,kc->ncij", weights.softmax(1), patterns) + 0.05 * torch.randn(
        12, CHANNELS, GRID, GRID, generator=rng(2)
    )


def train(made: MFRNet, features: Tensor, steps: int) -> list[dict[str, float]]:
    tensors = {"features": features, **made.fit_memory(FeatureSet.of(features.half()), rng())}

    def loss(rows: Tensor, rng: Generator) -> dict[str, Tensor]:
        return made.loss({name: t[rows].float() for name, t in tensors.items()}, rng)

    history = optimise(made, loss, len(features), steps, made.config.training)
    made.fit_normalization(features.half(), first_rows(features.half()))
    return history


@pytest.fixture(scope="module")
def trained(tiny, features) -> tuple[MFRNet, list[dict[str, float]]]:
    torch.manual_seed(0)
    made = MFRNet(tiny("mfrnet", **{"training.learning_rate": 3e-3, "network.prototypes": 0}), Weights.RANDOM)
    return made, train(made, features, 300)


@pytest.fixture(scope="module")
def remembering(tiny, features) -> MFRNet:
    torch.manual_seed(0)
    made = MFRNet(tiny("mfrnet"), Weights.RANDOM).eval()
    train(made, features, 10)
    return made


# Crossed masks


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    k=st.integers(1, 40),
    n=st.sampled_from([2, 3, 4, 5, 9, 16]),
    margin=st.integers(0, 5),
    arrangement=st.sampled_from(["regular", "random"]),
    seed=st.integers(0, 999),
)
def test_masks_keep_every_cell_exactly_once(rows, columns, k, n, margin, arrangement, seed):
    cells = math.ceil(rows / k) * math.ceil(columns / k)
    if arrangement == "regular":
        n = math.isqrt(n) ** 2
    if k > min(rows, columns) or n > cells:
        with pytest.raises(ValueError, match=r"network\.k"):
            crossed_masks((rows, columns), k, n, rng(seed), margin, arrangement)
        return
    visible, kept = crossed_masks((rows, columns), k, n, rng(seed), margin, arrangement)
    for masks in (visible, kept):
        assert masks.shape == (n, rows, columns) and set(masks.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(kept.sum(0), torch.ones(rows, columns))  # disjoint and complete
    corners = kept[:, ::k, ::k]
    assert torch.equal(corners.repeat_interleave(k, 1).repeat_interleave(k, 2)[:, :rows, :columns], kept)  # whole cells
    near = F.max_pool2d(kept[:, None], 2 * margin + 1, 1, margin)[:, 0]
    assert not (visible * near).any()  # nothing within the margin is visible
    y, x = slice(margin, rows - margin), slice(margin, columns - margin)
    assert torch.equal(1 - visible[:, y, x], near[:, y, x])  # and nothing else is hidden
    if arrangement == "random" and margin == 0:
        shares = corners.sum((1, 2))
        assert shares.sum() == cells and shares.max() - shares.min() <= 1


def test_random_masks_are_those_of_the_generator():
    def drawn(seed: int, side: int = 12, n: int = 3) -> Tensor:
        return crossed_masks((side, side), 2, n, rng(seed)).kept

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    kept = torch.stack([drawn(seed, 8, 4) for seed in range(400)]).mean(0)
    torch.testing.assert_close(kept, torch.full_like(kept, 0.25), atol=0.1, rtol=0)


def test_every_place_of_a_regular_mask_has_the_same_surroundings():
    """Away from the border of the grid, what is visible around a cell that is kept is the same for all of them."""
    visible, kept = crossed_masks((24, 24), 2, 16, rng(), 2, "regular")
    patterns = set()
    padded = F.pad(visible, (6,) * 4, value=-1)
    for mask, places in zip(padded, kept[:, ::2, ::2], strict=True):
        for y, x in places.nonzero().tolist():
            window = mask[2 * y : 2 * y + 14, 2 * x : 2 * x + 14]
            if (window >= 0).all():
                patterns.add(window.numpy().tobytes())
    assert len(patterns) == 1
    (pattern,) = patterns
    seen = torch.frombuffer(bytearray(pattern), dtype=torch.float32).view(14, 14)
    assert not seen[4:10, 4:10].any() and seen[2:4].any() and seen[:, 10:12].any()


# The network


def started(made: MFRNet) -> MFRNet:
    """Every part has a say, as after training: what starts at 0 is drawn at random."""
    for parameter in made.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return made


@pytest.mark.parametrize(
    "changes",
    [
        {"k": (1,), "n": 9},
        {"k": (2,), "n": 16, "margin": 1},
        {"k": (1, 2), "n": 4},
        {"k": (3,), "n": 3, "arrangement": "random"},
        {"k": (1, 2, 5), "n": 3, "arrangement": "random"},
        {"k": (1,), "n": 9, "margin": 1, "arrangement": "random"},
    ],
)
@pytest.mark.parametrize("moment", ["training", "inspection"])
def test_what_is_hidden_has_no_influence_on_its_own_restoration(tiny, features, changes, moment):
    """The derivative of F̂ at a cell with respect to F anywhere that the same mask hides is 0."""
    made = started(network(tiny, **changes))
    made.fit_memory(FeatureSet.of(features.half()), rng())
    made = started(made)
    made.train(moment == "training")
    x = features[:2].clone().requires_grad_()
    restored = made.restore(x)
    for which in range(len(made.kept)):
        for visible, kept in zip(made.visible[which] > 0, made.kept[which] > 0, strict=True):
            (slope,) = torch.autograd.grad(restored[:, which][..., kept].square().sum(), x, retain_graph=True)
            assert not slope[..., ~visible].any()
            if visible.any():
                assert slope[..., visible].abs().max() > 1e-5


def test_unmasked_it_sees_what_it_restores(tiny, features):
    made = started(network(tiny, masked=False))
    assert made.visible.shape == made.kept.shape == (1, 1, GRID, GRID) and made.visible.all() and made.kept.all()
    x = features[:2].clone().requires_grad_()
    restored = made.restore(x)[:, 0, :, 3, 3].sum()
    (slope,) = torch.autograd.grad(restored, x)
    assert slope[:, :, 3, 3].abs().min() > 0


def test_one_batch_is_what_the_formula_says(tiny, features):
    """F̂ = Σ_i K_i ⊙ R(M_i ⊙ F), mask by mask, and R sees nothing but M_i ⊙ F."""
    made = network(tiny, k=(2, 4), n=4)
    made.fit_memory(FeatureSet.of(features.half()), rng())
    made = started(made)
    with torch.no_grad():
        together = made.restore(features[:3])
        assert together.shape == (3, 2, CHANNELS, GRID, GRID)
        for which in range(2):
            pairs = zip(made.visible[which], made.kept[which], strict=True)
            parts = [
                k * made.restoration(m * features[:3], *(t.expand(3, 1, -1, -1) for t in (m, k))) for m, k in pairs
            ]
            torch.testing.assert_close(together[:, which], sum(parts), atol=1e-5, rtol=1e-4)


def test_training_starts_at_the_best_linear_restoration():
    """Waves are a linear function of their surroundings: they are restored without any step, in new images too."""
    place, side = torch.arange(24.0), 24
    phases, mixed = 6.3 * torch.rand(48, 2, 6, generator=rng(1)), torch.randn(6, CHANNELS, generator=rng(2))
    rows, columns = ((place * step + phases[:, i, :, None]).cos() for i, step in enumerate((0.25, 0.4)))
    waves = torch.einsum("nky,nkx,kc->ncyx", rows, columns, mixed)
    masks = crossed_masks((side, side), 2, 16, rng(), 2, "regular")
    torch.manual_seed(0)
    made = RestorationNetwork(CHANNELS, (side, side), MFRNetOptions(widths=(32,), heads=2))
    made.fit(waves[:40], [masks])
    visible, kept = (m.expand(8, -1, -1, -1) for m in masks)
    with torch.no_grad():
        error = (made(waves[40:], visible, kept) - waves[40:]).square()[..., 8:16, 8:16].sum()
    assert error < 0.02 * waves[40:].square()[..., 8:16, 8:16].sum()


def test_random_masks_leave_the_blocks_alone(tiny, features):
    made = network(tiny, k=(1,), n=3, arrangement="random")
    made.fit_memory(FeatureSet.of(features.half()), rng())
    assert not made.restoration.linear.taps.any()
    with torch.no_grad():
        assert not made.restore(features).any()


def test_where_no_tap_lies_on_the_grid_the_blocks_are_alone():
    """Two by two tokens, whose only visible neighbours would be beyond the border."""
    x, masks = torch.randn(6, 5, 4, 4, generator=rng()), crossed_masks((4, 4), 2, 4, rng(), 2, "regular")
    made = RestorationNetwork(5, (4, 4), MFRNetOptions(widths=(8,), heads=2))
    made.fit(x, [masks])
    visible, kept = (m.expand(6, -1, -1, -1) for m in masks)
    with torch.no_grad():
        assert made.linear.taps.any() and not made(x, visible, kept).any()


def test_few_images_are_enough_to_start_from(tiny, features):
    made = network(tiny)
    with torch.no_grad():
        made.fit_memory(FeatureSet.of(features[:2].half()), rng())
        found = made(features)
    assert found.anomaly_maps.isfinite().all()


@pytest.mark.parametrize(
    "shape, patch, widths",
    [
        ((8, 8), 2, (8, 12)),
        ((12, 12), 3, (8,)),
        ((12, 12), 1, (4, 8, 12)),
        ((9, 9), 3, (8,)),
        ((4, 4), 1, (8, 8, 8)),
        ((8, 20), 2, (8, 12)),
        ((12, 4), 1, (4, 8, 12)),
    ],
)
def test_any_patch_and_any_number_of_scales_gives_back_the_grid(shape, patch, widths):
    options = MFRNetOptions(patch=patch, widths=widths, heads=2, depth=1)
    restoration = RestorationNetwork(5, shape, options)
    x, all_of_it = torch.randn(2, 5, *shape, generator=rng()), torch.ones(2, 1, *shape)
    out = restoration(x, all_of_it, all_of_it)
    assert out.shape == x.shape
    (out - x).square().sum().backward()
    assert restoration.widen.weight.grad.abs().sum() > 0


def test_a_block_has_two_branches_beside_each_other():
    x = torch.randn(2, 16, 8, generator=rng())
    torch.manual_seed(0)
    both = HybridBlock(8, MFRNetOptions(heads=2), (4, 4))
    normal = both.norm1(x)
    grid = normal.transpose(1, 2).view(2, 8, 4, 4)
    mixed = x + both.attention(normal) + both.convolution(grid).flatten(2).transpose(1, 2)
    torch.testing.assert_close(both(x), mixed + both.mlp(both.norm2(mixed)))
    for options, gone in ((MFRNetOptions(attention=False), "attention"), (MFRNetOptions(convolution=False), "convol")):
        single = HybridBlock(8, options, (4, 4))
        assert single(x).shape == x.shape
        assert not [name for name, _ in single.named_parameters() if name.startswith(gone)]


def test_without_attention_what_is_far_has_no_influence():
    """Two 3×3 convolutions reach two places; attention reaches all."""
    for attention in (True, False):
        torch.manual_seed(0)
        options = MFRNetOptions(attention=attention, heads=2)
        blocks = torch.nn.Sequential(HybridBlock(8, options, (8, 8)), HybridBlock(8, options, (8, 8)))
        x = torch.randn(1, 64, 8, generator=rng(), requires_grad=True)
        (slope,) = torch.autograd.grad(blocks(x)[0, 0].sum(), x)
        reached = slope[0].abs().sum(1).view(8, 8) > 0
        assert reached[:3, :3].all()
        assert reached.all() if attention else not reached[3:].any() and not reached[:, 3:].any()


# The memory


def test_distance_and_regions_join_the_evidence(remembering, features):
    with torch.no_grad():
        found, left_out = remembering(features), remembering(features, first_rows(features))
        plain = network_without_memory(remembering, features)
    assert remembering.scored_maps == slice(1, 2)  # the distance judges the image
    assert remembering.n_maps == 2 and remembering.has_regional and found.anomaly_maps.shape == (12, 2, GRID, GRID)
    torch.testing.assert_close(found.anomaly_maps[:, :1], plain)
    torch.testing.assert_close(found.anomaly_maps[:, 1:], remembering.memory(features).scored)
    assert torch.equal(found.regional, remembering.regional_memory(features))
    assert left_out.anomaly_maps[:, 1].mean() > found.anomaly_maps[:, 1].mean()
    assert left_out.regional.mean() > found.regional.mean()


def network_without_memory(made: MFRNet, features: Tensor) -> Tensor:
    """The root of the hybrid loss of F and F̂, (N, 1, g, g)."""
    terms = [made.compare(features, part) for part in made.restore(features).unbind(1)]
    return torch.stack([(term["pixel"] + term["ssim"] + term["gms"]).sqrt() for term in terms]).mean(0)


def test_what_is_learned_after_calibration_only_lowers_evidence(remembering, features):
    made = copy.deepcopy(remembering)
    foreign = torch.cat([features, 1.5 * features.roll(2, 1)])
    with torch.no_grad():
        before, scores = made(foreign), made.fuse(made(foreign))[1]
        made.add_prototypes(FeatureSet.of(foreign[12:16].half()), rng())
        after, lower = made(foreign), made.fuse(made(foreign))[1]
    assert torch.equal(after.anomaly_maps[:, 0], before.anomaly_maps[:, 0])
    assert (after.anomaly_maps[:, 1] <= before.anomaly_maps[:, 1]).all() and (after.regional <= before.regional).all()
    assert (lower <= scores + 1e-5).all() and lower[12:16].mean() < scores[12:16].mean() - 0.01


# The hybrid loss


def test_the_evidence_is_the_root_of_the_loss_of_every_cell(trained, features):
    made = trained[0]
    with torch.no_grad():
        found = made(features)
        restored, expected = made.restore(features), 0.0
        for which in range(restored.shape[1]):
            x, y = features / made.scale, restored[:, which] / made.scale
            structure = 1 - ssim_map(x, y, WINDOW, (STABLE, STABLE))
            gradients = 1 - gradient_magnitude_similarity(x, y, STABLE, SCALES)
            hybrid = (x - y).square().sum(1, keepdim=True) + structure + gradients
            expected = expected + hybrid.sqrt() / restored.shape[1]
        loss = made.loss({"features": features}, rng())
    assert made.n_maps == 1 and found.anomaly_maps.shape == (12, 1, GRID, GRID)
    torch.testing.assert_close(found.anomaly_maps, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.restored, restored.mean(1))
    assert loss["loss"].item() == pytest.approx(sum(loss[name].item() for name in ("pixel", "ssim", "gms")), rel=1e-5)


@pytest.mark.parametrize("weights", [(2.0, 0.0, 0.0), (0.0, 1.0, 3.0), (1.0, 0.5, 0.0)])
def test_weights_of_the_terms_count_in_loss_and_evidence(tiny, features, weights):
    made = network(tiny, **dict(zip(("pixel", "ssim", "gms"), weights, strict=True)))
    made.fit_memory(FeatureSet.of(features.half()), rng())
    with torch.no_grad():
        terms, found = made.loss({"features": features}, rng()), made(features)
        each = made.compare(features.repeat_interleave(2, 0), made.restore(features).flatten(0, 1))
    kept = {name: w for name, w in zip(("pixel", "ssim", "gms"), weights, strict=True) if w}
    assert terms.keys() == kept.keys() | {"loss"} and each.keys() == kept.keys()
    assert terms["loss"].item() == pytest.approx(sum(w * terms[name].item() for name, w in kept.items()), rel=1e-5)
    hybrid = torch.stack([w * each[name] for name, w in kept.items()]).sum(0)
    expected = hybrid.clamp_min(0).sqrt().view(12, 2, 1, GRID, GRID).mean(1)
    torch.testing.assert_close(found.anomaly_maps, expected, atol=1e-4, rtol=1e-4)


def test_units_of_the_features_do_not_matter(tiny, features):
    first, second = network(tiny), network(tiny)
    first.fit_memory(FeatureSet.of(features.half()), rng())
    second.fit_memory(FeatureSet.of((4 * features).half()), rng())
    with torch.no_grad():
        torch.testing.assert_close(
            first(features).anomaly_maps, second(4 * features).anomaly_maps, atol=1e-3, rtol=1e-3
        )


# Training and inspection


def test_training_restores_better(trained, features):
    losses = [step["loss"] for step in trained[1]]
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])


def test_inspection_is_deterministic_and_of_each_image_alone(trained, features):
    made = trained[0]
    with torch.no_grad():
        found, again, alone = made(features), made(features), made(features[3:4])
    assert torch.equal(found.anomaly_maps, again.anomaly_maps)
    torch.testing.assert_close(found.anomaly_maps[3:4], alone.anomaly_maps, atol=1e-4, rtol=1e-4)
    assert found.restored.shape == features.shape and {"visible", "kept"} <= made.state_dict().keys()


@pytest.mark.parametrize("arrangement", ["regular", "random"])
def test_training_draws_masks_of_every_k_for_each_image(tiny, features, monkeypatch, arrangement):
    made, drawn = network(tiny, k=(2, 4), arrangement=arrangement), []
    restoration = made.restoration.forward
    monkeypatch.setattr(
        made.restoration, "forward", lambda x, visible, kept: drawn.append(visible) or restoration(x, visible, kept)
    )
    with torch.no_grad():
        for seed in range(12):
            made.loss({"features": features}, rng(seed))
            made.loss({"features": features}, rng(seed))
    assert all(visible.shape == (12, 1, GRID, GRID) for visible in drawn)
    assert all(torch.equal(a, b) for a, b in zip(drawn[::2], drawn[1::2], strict=True))  # the generator decides
    each = [{mask.numpy().tobytes() for mask in visible} for visible in drawn]
    assert max(map(len, each)) == 4  # images of one step have masks of their own
    assert len(set.union(*each)) == 8 if arrangement == "regular" else len(set.union(*each)) > 20
    blocks = F.avg_pool2d(torch.cat(drawn), 4).flatten(1)
    whole = ((blocks == 0) | (blocks == 1)).all(1)
    assert whole.any() and not whole.all()  # cells of four, and smaller ones


def test_the_loss_is_of_what_is_kept(tiny, features):
    """What is visible, and what only the margin hides, costs nothing."""
    made = started(network(tiny, k=(1,), n=16, margin=1, ssim=0.0, gms=0.0))
    with torch.no_grad():
        loss = made.loss({"features": features}, rng(3))["loss"]
        torch.randint(1, (1,), generator=(again := rng(3)))
        which = torch.randint(16, (12,), generator=again)
        visible, kept = made.visible[0][which][:, None], made.kept[0][which][:, None]
        error = (made.restoration(features, visible, kept) - features).square().sum(1, keepdim=True)
    torch.testing.assert_close(loss, (error * kept).sum() / kept.sum() / made.scale**2)


def test_a_foreign_patch_stands_out(trained, features):
    made, changed = trained[0], features.clone()
    changed[:, :, 3:5, 3:5] = 3 * torch.randn(CHANNELS, 2, 2, generator=rng(5))
    with torch.no_grad():
        found, plain = made(changed), made(features)
        scores, plain_scores = made.fuse(found)[1], made.fuse(plain)[1]
    assert (scores > plain_scores).all()
    mean, deviation = made.normal[..., None, None].unbind(1)
    standard = (found.anomaly_maps - mean) / deviation
    assert (standard[:, :, 3:5, 3:5].mean((0, 2, 3)) > standard.mean((0, 2, 3)) + 1).all()  # every kind says so


ABLATIONS = {
    "one k": {"k": (2,)},
    "odd k": {"k": (3,)},
    "two masks": {"n": 2, "arrangement": "random"},
    "many masks": {"n": 16, "margin": 1},
    "random masks, a margin": {"n": 9, "k": (1,), "margin": 1, "arrangement": "random"},
    "no masks": {"masked": False},
    "no attention": {"attention": False},
    "no convolution": {"convolution": False},
    "one scale": {"widths": (8,)},
    "pixels of features only": {"ssim": 0.0, "gms": 0.0},
    "memory": {"prototypes": 64},
    "memory, no masks": {"prototypes": 64, "masked": False},
}


@pytest.mark.parametrize("changes", ABLATIONS.values(), ids=ABLATIONS)
def test_every_switch_trains_and_inspects(tiny, features, changes):
    made = network(tiny, **changes)
    assert len(train(made, features, 2)) == 2
    with torch.no_grad():
        found = made(features[:2])
        maps, scores = made.fuse(found)
    assert maps.isfinite().all() and scores.isfinite().all() and found.restored.isfinite().all()


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"network.k": (9,)}, r"cells of 9 .* grid of 8.*network\.k"),
        ({"network.k": (8,)}, r"4 masks cannot share 1 cell;.*network\.n"),
        ({"network.patch": 3}, r"grid of 8 .* patches of 3.*multiple of 6"),
        ({"network.widths": (8, 8, 8, 8)}, r"grid of 8 .* halved 3 times.*multiple of 16"),
    ],
)
def test_settings_that_do_not_fit_the_grid_are_named(tiny, changes, named):
    with pytest.raises(ValueError, match=named):
        MFRNet(tiny("mfrnet", **changes), Weights.RANDOM)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"network.n": 1}, r"network\.n"),
        ({"network.n": 3}, r"3 masks cannot lie on a square lattice.*network\.n"),
        ({"network.n": 9}, r"9 masks, mask cells of 2 and a margin of 2, everything is hidden.*network\.margin"),
        ({"network.k": ()}, r"network\.k"),
        ({"network.k": (2, 0)}, r"network\.k\.1"),
        ({"network.heads": 5}, "cut into 5 heads"),
        ({"network.attention": False, "network.convolution": False}, "attention, convolution or both"),
        ({"network.pixel": 0, "network.ssim": 0, "network.gms": 0}, "above 0"),
    ],
)
def test_settings_that_cannot_work_are_named(changes, named):
    with pytest.raises(ValueError, match=named):
        make_config("mfrnet", "cpu", changes)


def test_the_paper_profile_is_vgg_on_a_fine_grid():
    config = make_config("mfrnet", "paper")
    assert config.features.backbone.startswith("vgg16") and config.features.grid == 64
    assert config.network.widths > make_config("mfrnet").network.widths
    masks = config.network
    assert (masks.k, masks.n, masks.margin, masks.arrangement) == ((2,), 3, 0, "random")  # the paper's figure 3
    RestorationNetwork(4, (64, 64), config.network.model_copy(update={"widths": (8, 16), "depth": 1}))


# With everything around it


def test_it_finds_an_obvious_defect_and_is_saved_whole(parts, weights, tiny, tmp_path):
    config = tiny("mfrnet", **{"training.steps": 25})
    made = Detector(config=config, weights=weights).fit(parts)
    bad, good = (sorted((parts / "test" / name).iterdir()) for name in ("square", "good"))
    results = {path: made.inspect(path) for path in bad + good}
    assert min(results[path].score for path in bad) > max(results[path].score for path in good)
    assert results[bad[0]].layers.keys() == {"restored"} and results[bad[0]].uncertainty is None
    made.save(tmp_path / "parts.safetensors")
    loaded = Detector.load(tmp_path / "parts.safetensors")
    assert torch.equal(loaded.network.kept, made.network.kept)
    assert torch.equal(loaded.network.visible, made.network.visible)
    assert loaded.inspect(bad[0]).score == results[bad[0]].score
    again = Detector(config=config, weights=weights).fit(parts)
    assert again.inspect(bad[0]).score == results[bad[0]].score  # the same seed
    assert again.calibration_ == made.calibration_
