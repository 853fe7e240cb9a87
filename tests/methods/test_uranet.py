import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.conftest import first_rows
from torch import Generator, Tensor

from unflaw.config import Weights
from unflaw.methods.base import Batch
from unflaw.methods.feature_set import Context, FeatureSet
from unflaw.methods.layers import to_grid, to_tokens
from unflaw.methods.synthesis import synthesise
from unflaw.methods.uranet import (
    RAM,
    SUREST,
    UIAPM,
    Perception,
    Restoration,
    URANet,
    length,
    mean_logit,
    relative_error,
)
from unflaw.training.loop import optimise

pytestmark = pytest.mark.slow

CHANNELS, GRID = 8, 8  # components and grid of the tiny configuration
SOURCES = ("textures", "others", "shuffles", "jitter")


def rng(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def features() -> Tensor:
    """Features like those of good images: a few patterns, smooth over places, and a little noise."""
    patterns = torch.randn(4, CHANNELS, generator=rng())
    weights = F.interpolate(torch.randn(12, 4, 3, 3, generator=rng(1)), (GRID, GRID), mode="bicubic")
    noise = 0.05 * torch.randn(12, CHANNELS, GRID, GRID, generator=rng(2))
    return (torch.einsum("nkij,kc->ncij", weights.softmax(1), patterns) + noise).half()


@pytest.fixture(scope="module")
def textures() -> Tensor:
    return 3 * torch.randn(3, CHANNELS, GRID, GRID, generator=rng(3))


def train(network: URANet, features: Tensor, textures: Tensor | None, steps: int) -> list[dict[str, float]]:
    """Setup and training as `Detector` does them."""
    tensors = {"features": features, **network.fit_memory(FeatureSet.of(features, textures=textures), rng())}

    def loss(rows: Tensor, rng: Generator) -> dict[str, Tensor]:
        return network.loss({name: t[rows].float() for name, t in tensors.items()}, rng)

    history = optimise(network, loss, len(features), steps, network.config.training)
    network.fit_normalization(features, first_rows(features))
    return history


@pytest.fixture(scope="module")
def trained(tiny, features, textures) -> tuple[URANet, list[dict[str, float]]]:
    torch.manual_seed(0)
    network = URANet(tiny(**{"training.learning_rate": 3e-3, "network.perception.width": 32}), Weights.RANDOM)
    return network, train(network, features, textures, 100)


def batch_of(network: URANet, features: Tensor, textures: Tensor | None) -> Batch:
    return {"features": features.float()} | {
        k: t.float() for k, t in network.fit_memory(FeatureSet.of(features, textures=textures), rng()).items()
    }


def restoration(patch: int = 2, gap: int = 1, shape: tuple[int, int] = (GRID, GRID), **changes) -> RAM:
    torch.manual_seed(0)
    options = Restoration(**{"width": 24, "heads": 2, "depth": 2, **changes})
    return RAM(CHANNELS, shape, options, patch, gap).eval()


def shaken(part: RAM) -> RAM:
    """With last layers that are not zero, so that both parts have a say."""
    for layer in (part.widen, part.linear.linear):
        torch.nn.init.normal_(layer.weight, std=0.3, generator=rng(5))
    return part


def square(n: int = 2) -> Tensor:
    """Marks the cells 2 to 3 of rows 2 to 5: whole patches."""
    marked = torch.zeros(n, 1, GRID, GRID)
    marked[:, :, 2:6, 2:4] = 1
    return marked


# Perception


def test_final_mask_adds_ambiguous_places_to_the_marked_ones():
    part = UIAPM(CHANNELS, Perception(width=4, mean_threshold=0.5, deviation_threshold=0.2))
    mean = torch.tensor([0.5, 0.49, 0.9, 0.1]).view(1, 1, 2, 2)
    deviation = torch.tensor([0.0, 0.2, 0.3, 0.19]).view(1, 1, 2, 2)
    marked, final = part.masks(mean, deviation)
    assert marked.flatten().tolist() == [1, 0, 1, 0]
    assert final.flatten().tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize("bayesian", [True, False])
def test_maps_are_mean_and_deviation_of_probabilities(features, bayesian):
    torch.manual_seed(0)
    part = UIAPM(CHANNELS, Perception(width=8, draws=5, bayesian=bayesian))
    for layer in part.bayesian_layers():
        torch.nn.init.constant_(layer.log_deviation, -1.0)
        layer.freeze(rng())
    with torch.no_grad():
        mean, deviation = part(features.float())
        again = part(features.float())
    assert mean.shape == deviation.shape == (12, 1, GRID, GRID)
    assert mean.min() >= 0 and mean.max() <= 1 and mean.std() > 0
    assert torch.equal(again[0], mean) and torch.equal(again[1], deviation)
    assert deviation.min() >= 0
    assert bool(deviation.any()) == bayesian
    assert deviation.max() <= 0.5 * (5 / 4) ** 0.5 + 1e-5  # no larger for numbers between 0 and 1


def test_perception_loss_is_lower_for_the_truth():
    part = UIAPM(CHANNELS, Perception(width=4))
    mask = square()
    right, wrong = (part.loss(10 * sign * (2 * mask - 1), mask, 10)["perception"] for sign in (1, -1))
    assert right.item() == pytest.approx(0, abs=0.01)
    assert wrong.item() > 5


def test_more_images_weaken_the_prior():
    part = UIAPM(CHANNELS, Perception(width=4))
    few, many = (part.loss(torch.zeros(2, 1, 8, 8), square(), n)["kl"].item() for n in (10, 100))
    assert few == pytest.approx(10 * many) and many > 0


def test_thresholds_rise_until_hardly_a_good_cell_is_marked():
    part = UIAPM(CHANNELS, Perception(width=4, mean_threshold=0.5, deviation_threshold=0.2))
    assert "thresholds" in part.state_dict()  # a saved detector needs them
    assert part.thresholds.tolist() == pytest.approx([0.5, 0.2])
    mean, deviation = torch.rand(2, 50, 1, 20, 20, generator=rng())
    part.fit_thresholds(0.4 * mean, 0.1 * deviation)  # nothing is marked as it is
    assert part.thresholds.tolist() == pytest.approx([0.5, 0.2])
    part.fit_thresholds(mean, deviation)
    marked, final = part.masks(mean, deviation)
    assert part.thresholds[0] > 0.99 and part.thresholds[1] > 0.99
    assert 0 < marked.sum() <= 1e-4 * marked.numel() + 1 and final.sum() <= 2e-4 * marked.numel() + 2


# Restoration


def test_untrained_restoration_is_the_mean(features):
    with torch.no_grad():
        assert not restoration()(features[:2].float(), square()).any()


@pytest.mark.parametrize(("patch", "gap", "depth"), [(2, 1, 2), (2, 2, 2), (1, 3, 3), (1, 1, 0)])
def test_no_place_takes_part_in_its_own_restoration(patch, gap, depth):
    """Nor do those nearer than the gap, whatever the weights: so no path through the network can copy an anomaly."""
    part = shaken(restoration(patch, gap, (12, 16), depth=depth))
    x, marked = torch.randn(1, CHANNELS, 12, 16, generator=rng(1)), torch.zeros(1, 1, 12, 16)
    rows, columns, changed = 12 // patch, 16 // patch, x.clone()
    row, column = rows // 2, columns // 2 - 1
    changed[..., row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] += 5
    with torch.no_grad():
        difference = (part(changed, marked) - part(x, marked)).abs().amax(1, keepdim=True)
    moved = F.max_pool2d(difference, patch)[0, 0] > 1e-5
    near = torch.maximum((torch.arange(rows) - row).abs()[:, None], (torch.arange(columns) - column).abs()) < gap
    assert not moved[near].any() and near[row, column]
    assert moved[row + gap, column] and (depth == 0 or moved[~near].all())  # attention reaches all that may see it


def test_without_a_gap_a_place_sees_itself():
    part = shaken(restoration(gap=0))
    x, marked = torch.randn(1, CHANNELS, GRID, GRID, generator=rng(1)), torch.zeros(1, 1, GRID, GRID)
    with torch.no_grad():
        difference = (part(x + 5 * square(1), marked) - part(x, marked)).abs().amax(1)
    assert difference[square(1)[:, 0].bool()].min() > 1e-3


def test_a_gap_wider_than_half_the_image_leaves_something_to_see():
    part = shaken(restoration(patch=2, gap=50))
    assert part.far.any(1).all()
    with torch.no_grad():
        assert part(torch.randn(1, CHANNELS, GRID, GRID), torch.zeros(1, 1, GRID, GRID)).std() > 0


def test_the_unit_of_features_does_not_matter(features):
    part, x = restoration(), features[:3].float()
    part.fit(features)
    torch.nn.init.normal_(part.widen.weight, std=0.3, generator=rng(5))
    with torch.no_grad():
        plain = part(x, square(3))
        part.fit(100 * features.float())
        torch.testing.assert_close(part(100 * x, square(3)) / 100, plain, rtol=1e-2, atol=1e-3)


def test_training_starts_at_the_best_linear_restoration(features):
    """Of a place from the 24 around it, zeros beyond the edge: by hand, with NumPy."""
    part, x = restoration(patch=1, gap=1, width=24, token_width=CHANNELS), features.float()
    part.fit(features)
    padded = F.pad(x, (2, 2, 2, 2))
    around = [(y, z) for y in range(5) for z in range(5) if (y, z) != (2, 2)]
    seen = torch.cat([padded[..., y : y + GRID, z : z + GRID] for y, z in around], 1)
    design = seen.movedim(1, -1).reshape(-1, 24 * CHANNELS).double().numpy()
    target = x.movedim(1, -1).reshape(-1, CHANNELS).double().numpy()
    solved = np.linalg.lstsq(design, target, rcond=None)[0]
    best, total = np.square(target - design @ solved).sum(), np.square(target).sum()
    with torch.no_grad():
        found = (x - part(x, torch.zeros(12, 1, GRID, GRID))).square().sum().item()
    assert best < 0.1 * total
    assert best * 0.999 <= found < best + 0.02 * total  # a little more: the ridge


def test_less_rank_restores_less(features):
    def error(width: int) -> float:
        part = restoration(patch=1, gap=1, width=width, heads=1)
        part.fit(features)
        with torch.no_grad():
            restored = part(features.float(), torch.zeros(12, 1, GRID, GRID))
        return relative_error(restored, features.float()).item()

    assert error(24) < error(4) < 1


@pytest.mark.parametrize("masked", [True, False])
def test_attention_sees_only_what_is_unmarked(features, masked):
    """Masked attention; plain attention sees everything. The surroundings are left out here: they see marked places."""
    part = shaken(restoration(masked=masked))
    torch.nn.init.zeros_(part.linear.surroundings.weight)
    x, marked = features[:2].float(), square()
    changed = x + 5 * marked * torch.randn(x.shape, generator=rng(6))
    elsewhere = x + 5 * (1 - marked) * torch.randn(x.shape, generator=rng(6))
    with torch.no_grad():
        restored = part(x, marked)
        assert restored.shape == x.shape
        assert ((part(changed, marked) - restored).abs().max() < 1e-5) == masked
        inside = marked.expand_as(x).bool()
        assert (part(elsewhere, marked) - restored)[inside].abs().max() > 1e-3  # context restores


def test_everything_marked_is_still_restored(features):
    with torch.no_grad():
        restored = shaken(restoration())(features[:2].float(), torch.ones(2, 1, GRID, GRID))
    assert restored.isfinite().all() and restored.abs().max() > 0


def test_a_patch_is_hidden_if_any_of_its_cells_is_marked(features):
    x, one = features[:1].float(), torch.zeros(1, 1, GRID, GRID)
    one[..., 2, 2] = 1
    patch = torch.zeros(1, 1, GRID, GRID)
    patch[..., 2:4, 2:4] = 1
    part = shaken(restoration())
    with torch.no_grad():
        assert torch.equal(part(x, one), part(x, patch))


def test_a_grid_that_patches_do_not_divide_is_named(tiny):
    with pytest.raises(ValueError, match=r"8 cells.*patches of 3"):
        URANet(tiny(**{"network.restoration.patch": 3}), Weights.RANDOM)


# The whole


def test_training_lowers_the_loss(trained):
    history = trained[1]
    first = history[0]
    assert {"loss", "perception", "kl", "restoration"} <= set(first)
    assert first["loss"] == pytest.approx(sum(v for name, v in first.items() if name != "loss"), rel=1e-4)
    head, tail = ({n: sum(h[n] for h in part) / 20 for n in first} for part in (history[:20], history[-20:]))
    assert tail["loss"] < head["loss"] and tail["restoration"] < 0.8 * head["restoration"]


def test_the_same_anomalies_are_perceived_better_than_before(trained, features, textures):
    def losses(network: URANet) -> float:
        batch = batch_of(network, features, textures)
        with torch.no_grad():
            return sum(network.loss(batch, rng(seed))["perception"].item() for seed in range(5))

    torch.manual_seed(0)
    assert losses(trained[0]) < 0.8 * losses(URANet(trained[0].config, Weights.RANDOM))


def test_inspection_is_what_the_contract_says(trained, features):
    network = trained[0]
    with torch.no_grad():
        found = network(features.float())
        again = network(features.float())
        alone = network(features[3:4].float())
    assert found.anomaly_maps.shape == (12, 2, GRID, GRID) and network.n_maps == 2 and network.has_perceived
    assert found.restored.shape == features.shape
    (residual, least), perceived = found.anomaly_maps.unbind(1), found.perceived[:, 0]
    torch.testing.assert_close(residual, (features.float() - found.restored).norm(dim=1))
    torch.testing.assert_close(least, network.memory(features.float()).scored[:, 0])
    torch.testing.assert_close(perceived.sigmoid(), found.layers["mean"][:, 0], atol=2e-6, rtol=1e-4)
    regions = network.features.to_regions(features.float())
    with torch.no_grad():
        restored = network.regional_restoration(regions, F.max_pool2d(found.layers["mask"], 2))
    assert found.regional.shape == (12, 2, GRID // 2, GRID // 2) and network.n_regional == 2
    torch.testing.assert_close(found.regional[:, 0], (regions - restored).norm(dim=1))
    assert torch.equal(found.regional[:, 1:], network.regional_memory(features.float()))
    assert {"mean", "uncertainty", "mask"} <= set(found.layers)
    for layer in found.layers.values():
        assert layer.shape == (12, 1, GRID, GRID) and layer.min() >= 0 and layer.max() <= 1
    assert torch.equal(found.anomaly_maps, again.anomaly_maps)
    for together, single in ((found.anomaly_maps, alone.anomaly_maps), (found.regional, alone.regional)):
        # squares: near 0 the root of a distance magnifies rounding
        torch.testing.assert_close(together[3:4].square(), single.square(), atol=1e-5, rtol=1e-4)
    options, (of_mean, of_deviation) = network.config.network.perception, network.perception.thresholds.tolist()
    assert of_mean >= options.mean_threshold - 1e-6 and of_deviation >= options.deviation_threshold - 1e-6
    marked = found.layers["mean"] >= of_mean
    ambiguous = found.layers["uncertainty"] >= of_deviation
    assert torch.equal(found.layers["mask"].bool(), marked | ambiguous)


def test_a_foreign_patch_stands_out(trained, features, textures):
    changed = features.float().clone()
    changed[:, :, 3:5, 3:5] = textures[0, :, 3:5, 3:5]
    network = trained[0]
    with torch.no_grad():
        found, plain = network(changed), network(features.float())
        (maps, scores), (_, plain_scores) = network.fuse(found), network.fuse(plain)
    inside = torch.zeros(GRID, GRID, dtype=torch.bool)
    inside[3:5, 3:5] = True
    mean, deviation = network.normal[: network.n_maps, :, None, None].unbind(1)
    standard = (found.anomaly_maps - mean) / deviation
    assert (standard[..., inside].mean(-1) > standard[..., ~inside].mean(-1) + 2).all()  # deviations, of every kind
    assert (scores > plain_scores).all()
    peaks = maps.flatten(1).argmax(1)
    cell = maps.shape[-1] // GRID
    rows, columns = peaks // maps.shape[-1], peaks % maps.shape[-1]
    assert all(3 * cell <= int(i) < 5 * cell for i in (*rows, *columns))
    marked = found.layers["mean"][:, 0]
    assert marked[:, inside].mean() > marked[:, ~inside].mean()


def seen_by(network: URANet, features: Tensor, images: Tensor | None = None, which: int = 1) -> Tensor:
    """Distance to the memory (1), or to all that it ever learned (2), and departure from the recall, by hand."""
    found = network.memory(features, Context(training_rows=images))
    retrieval_residual = (features - found[0]).norm(dim=1, keepdim=True)
    return torch.cat([found[which], retrieval_residual], 1) / network.memory.radius - 1


@pytest.fixture
def extended(tiny, features, textures) -> URANet:
    """Set up, a little trained, and shown held-out images of which it knew nothing."""
    torch.manual_seed(1)
    network = URANet(tiny(**{"training.learning_rate": 3e-3}), Weights.RANDOM)
    train(network, features, textures, 5)
    network.add_prototypes(FeatureSet.of(held_out(features)), rng(7))
    return network


def held_out(features: Tensor) -> Tensor:
    return features[:5].roll(3, 1) + 0.5


def test_perception_sees_how_far_features_are_from_normal_in_units_of_the_radius(trained, features):
    network, given = trained[0], []
    hook = network.perception.narrow.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    far = features[:3].float() + 0.3 * torch.randn(3, CHANNELS, GRID, GRID, generator=rng(8))
    rows = torch.tensor([4, 0, 2])
    with torch.no_grad():
        network(far)
        plain = len(given)
        network(features[rows].float(), Context(training_rows=rows))
        hook.remove()
        expected = seen_by(network, far), seen_by(network, features[rows].float(), rows)
    assert 0 < plain < len(given) and expected[0].shape == (3, 2, GRID, GRID)
    for i, seen in enumerate(given):
        torch.testing.assert_close(seen, expected[i >= plain], atol=1e-4, rtol=1e-4)
    typical = given[-1][:, 0].median().item()
    assert typical == pytest.approx(0, abs=0.2)  # of good images, left out: the radius itself


def test_without_prototypes_perception_sees_the_features(tiny):
    network = URANet(tiny(**{"network.restoration.prototypes": 0}), Weights.RANDOM)
    x = torch.randn(2, CHANNELS, GRID, GRID, generator=rng())
    with torch.no_grad():
        assert torch.equal(network(x).layers["mean"], network.perception(x)[0])


def test_what_was_learned_after_calibration_speaks_for_an_image_and_never_against_it(extended, features):
    everything = torch.cat([features, held_out(features)]).float()
    with torch.no_grad():
        found = extended(everything)
        mean, _ = extended.perception(seen_by(extended, everything))
        calmed, _ = extended.perception(seen_by(extended, everything, which=2))
        _, distance, least, scored = extended.memory(everything)
    assert (calmed < mean).any() and not torch.equal(least, distance)
    expected = torch.minimum(mean, calmed).clamp(1e-6, 1 - 1e-6)
    torch.testing.assert_close(found.perceived.sigmoid(), expected, atol=1e-6, rtol=1e-3)
    assert torch.equal(found.anomaly_maps[:, 1:2], scored)
    torch.testing.assert_close(found.layers["mean"], mean)  # the mask is that of before, and so is the residual
    with torch.no_grad():
        restored = extended.restoration(everything, found.layers["mask"])
    torch.testing.assert_close(found.restored, restored)


@pytest.mark.parametrize("seed", range(4))
def test_after_extending_the_residual_is_the_same_and_the_rest_can_only_fall(tiny, features, seed):
    """Whatever the network is like: were U to rise anywhere, its old value would hold."""
    torch.manual_seed(seed)
    network = URANet(tiny(), Weights.RANDOM)
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.4)
    network.fit_memory(FeatureSet.of(features), rng(seed))
    network.fit_normalization(features, first_rows(features))
    held = held_out(features)
    everything = torch.cat([features, held, -features]).float()
    with torch.no_grad():
        before, (_, scores) = network(everything), network.fuse(network(everything))
        network.add_prototypes(FeatureSet.of(held), rng(seed))
        after, (_, lower) = network(everything), network.fuse(network(everything))
        calmed = network.perception(seen_by(network, everything, which=2))[0]
    assert (calmed > before.layers["mean"]).any()  # which would have been against an image
    assert torch.equal(after.anomaly_maps[:, 0], before.anomaly_maps[:, 0])
    assert torch.equal(after.restored, before.restored)
    assert all(torch.equal(after.layers[name], layer) for name, layer in before.layers.items())
    assert (after.anomaly_maps[:, 1] <= before.anomaly_maps[:, 1]).all() and (after.perceived <= before.perceived).all()
    assert (after.anomaly_maps[12:17, 1] < before.anomaly_maps[12:17, 1]).any()
    assert (after.perceived[12:17] < before.perceived[12:17]).any()
    assert (after.regional <= before.regional).all() and (after.regional[12:17] < before.regional[12:17]).any()
    assert (lower <= scores + 1e-5).all() and lower[12:17].mean() < scores[12:17].mean()


def test_training_images_are_recalled_and_judged_without_themselves(trained, features):
    network, rows = trained[0], torch.tensor([7, 1, 5])
    x = features[rows].float()
    with torch.no_grad():
        found, plain = network(x, Context(training_rows=rows)), network(x)
    distance = network.memory(x, Context(training_rows=rows)).scored
    assert torch.equal(found.anomaly_maps[:, 1:2], distance)
    assert torch.equal(found.regional[:, 1:], network.regional_memory(x, Context(training_rows=rows)))
    assert torch.equal(found.regional[:, 0], plain.regional[:, 0])  # restored from the image alone
    for with_itself, left_out in (
        (plain.anomaly_maps[:, 1], found.anomaly_maps[:, 1]),
        (plain.regional[:, 1], found.regional[:, 1]),
    ):
        assert left_out.mean() > 1.05 * with_itself.mean()
    left_out, with_itself = (network.memory(x, c).distance for c in (Context(training_rows=rows), Context()))
    assert (left_out >= with_itself - 3e-3).all() and left_out.mean() > 1.05 * with_itself.mean()
    with torch.no_grad():
        restored = network.restoration(x, found.layers["mask"])
    torch.testing.assert_close(found.restored, restored)


def test_what_is_cached_of_an_image_is_recalled_without_itself(tiny, features):
    many = torch.cat([features, features.flip(0) + 0.05 * torch.randn(features.shape, generator=rng(8)).half()])
    network = URANet(tiny(), Weights.RANDOM)
    batch = batch_of(network, many, None)
    recalled, distance, *_ = network.memory(many.float(), first_rows(many))
    assert set(batch) == {"features", "retrieved", "distance", "row"}
    assert batch["row"].tolist() == list(range(24))
    assert batch["retrieved"].shape == many.shape and batch["distance"].shape == (24, 1, GRID, GRID)
    torch.testing.assert_close(batch["distance"], distance)
    torch.testing.assert_close(batch["retrieved"], recalled, atol=2e-3, rtol=2e-3)
    assert batch["distance"].mean() > 1.05 * network.memory(many.float())[1].mean()


def test_altered_cells_are_recalled_anew_and_the_others_are_cached(trained, features, textures):
    """As if the whole altered image had been recalled, and not from the images that it is made of."""
    network = trained[0]
    rows = torch.randperm(12, generator=rng(5))
    with torch.no_grad():
        batch = {name: t[rows] for name, t in batch_of(network, features, textures).items()}
        anomalies = synthesise(batch["features"], textures, network.options.synthesis, rng(4))
        found = network._perceived_input(anomalies, batch)
        cached = seen_by(network, batch["features"], rows)
        anew = torch.empty_like(found)
        for i, x in enumerate(anomalies.features.split(1)):
            made_of = torch.tensor([rows[i], rows[anomalies.origin[i]]]).expand(GRID**2, 2)
            mixture, distance, *_ = network.memory.retrieve(to_tokens(x)[0], made_of)
            mixture, distance = to_grid(mixture[None], (GRID, GRID)), distance.view(1, 1, GRID, GRID)
            anew[i] = network._distances(distance, length(x - mixture))[0]
        plain = seen_by(network, anomalies.features)
    assert (anomalies.origin != torch.arange(12)).any()
    assert (anew >= plain - 1e-2)[:, :1].all() and anew.mean() > plain.mean()
    altered = anomalies.mask.bool().expand_as(found)
    assert altered.any() and not altered.all()
    assert found.shape == (12, 2, GRID, GRID)
    torch.testing.assert_close(found[altered], anew[altered], atol=1e-2, rtol=5e-3)
    torch.testing.assert_close(found[~altered], cached[~altered], atol=1e-2, rtol=5e-3)
    assert (anew - cached)[altered].abs().mean() > 0.5


def test_perception_learns_which_cells_were_altered(trained, features, textures, monkeypatch):
    network, labels = trained[0], []
    loss = network.perception.loss
    monkeypatch.setattr(
        network.perception,
        "loss",
        lambda logits, mask, n: labels.append((logits, mask, n)) or loss(logits, mask, n),
    )
    with torch.no_grad():
        batch = batch_of(network, features, textures)
        network.loss(batch, rng(4))
    anomalies = synthesise(batch["features"], textures, network.options.synthesis, rng(4))
    ((logits, mask, n),) = labels
    assert torch.equal(mask, anomalies.mask) and mask.any()
    assert logits.shape == mask.shape and n == 12


@pytest.mark.parametrize("part", ["restoration", "regional_restoration"])
def test_restoration_learns_clean_features_from_altered_ones(trained, features, monkeypatch, part):
    """It sees F_a, its attention only what M leaves of it; the target is F."""
    network, given = trained[0], []
    forward = getattr(network, part).forward
    monkeypatch.setattr(
        getattr(network, part), "forward", lambda x, marked: given.append((x, marked)) or forward(x, marked)
    )
    batch = batch_of(network, features, None)
    with torch.no_grad():
        terms = network.loss(batch, rng(4))
    ((seen, marked),) = given
    clean, made = batch["features"], synthesise(batch["features"], None, network.options.synthesis, rng(4))
    altered, mask = made.features, made.mask
    if part == "regional_restoration":
        clean, altered = (network.features.to_regions(x) for x in (clean, altered))
        mask = F.max_pool2d(mask, 2)
    assert torch.equal(seen, altered) and torch.equal(marked, mask) and marked.any()
    restored = forward(seen, marked).detach()
    expected = (restored - clean).square().sum() / clean.square().sum()
    assert terms[part].item() == pytest.approx(expected.item(), rel=1e-4)


PAPER_PARTS = {
    "network.restoration.prototypes": 0,
    "network.restoration.regional_prototypes": 0,
    "network.restoration.regional": False,
}


def test_without_prototypes_the_image_alone_is_restored(tiny, features):
    """As in the paper: one kind of evidence, no memory, nothing to cache."""
    network = URANet(tiny(**PAPER_PARTS), Weights.RANDOM)
    assert (
        network.memory is None
        and network.regional_memory is None
        and network.fit_memory(FeatureSet.of(features), rng()) == {}
    )
    with torch.no_grad():
        found = network(features.float())
    assert network.n_maps == 1 and found.anomaly_maps.shape == (12, 1, GRID, GRID) and found.regional is None
    torch.testing.assert_close(found.anomaly_maps[:, 0], (features.float() - found.restored).norm(dim=1))


@pytest.mark.parametrize("seed", range(2))
def test_a_foreign_patch_that_nothing_marks_is_not_copied_to_the_restoration(tiny, features, textures, seed):
    """Without a memory what RAM predicts is all: its residual shows the patch, several times its surroundings."""
    torch.manual_seed(seed)
    own = {"training.learning_rate": 3e-3, "training.seed": seed, "network.restoration.gap": 1}  # of 4 × 4 tokens
    network = URANet(tiny(**PAPER_PARTS, **own), Weights.RANDOM)
    train(network, features, textures, 300)
    network.perception.thresholds.fill_(2)  # no probability reaches that
    changed, patch = features.float().clone(), (..., slice(3, 5), slice(3, 5))
    changed[patch] = textures[seed][patch]
    with torch.no_grad():
        found, good = network(changed), network(features.float())
    residual, inside = found.anomaly_maps[:, 0], torch.zeros(GRID, GRID, dtype=torch.bool)
    inside[patch] = True
    assert not found.layers["mask"].any()
    assert residual[:, inside].mean() > 6 * residual[:, ~inside].mean()
    assert good.anomaly_maps.mean() < 0.6 * features.float().norm(dim=1).mean()  # good images are restored


SWITCHES = {
    "network.restoration.prototypes": 0,
    "network.restoration.regional_prototypes": 0,
    "network.restoration.regional": False,
    "network.perception.input": "features",
    "network.perception.in_score": False,
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_of_our_additions_has_a_switch_of_its_own(tiny, features, switch):
    """Each switch changes one part only; without a memory there is no distance for UIAPM to see."""
    network = URANet(tiny(**{switch: SWITCHES[switch]}), Weights.RANDOM)
    train(network, features, None, 2)
    with torch.no_grad():
        found = network(features.float())
    assert (
        (network.memory is None) == (found.anomaly_maps.shape[1] == 1) == (switch == "network.restoration.prototypes")
    )
    own = switch in ("network.restoration.regional_prototypes", "network.restoration.regional")
    assert found.regional.shape[1] == network.n_regional == 2 - own
    assert (found.perceived is None) == (switch == "network.perception.in_score")
    sees = network.perception.narrow.in_channels
    assert sees == (CHANNELS if switch in ("network.restoration.prototypes", "network.perception.input") else 2)
    assert network.fuse(found)[1].isfinite().all()


def marking(tiny, features: Tensor) -> URANet:
    """Thresholds of 0, so that they are what good images say."""
    torch.manual_seed(0)
    zero = {"network.perception.mean_threshold": 0.0, "network.perception.deviation_threshold": 0.0}
    network = URANet(tiny(**zero), Weights.RANDOM)
    network.fit_memory(FeatureSet.of(features), rng())
    return network


def test_padding_has_no_part_in_thresholds(tiny, features):
    network = marking(tiny, features)
    with torch.no_grad():
        layers = network(features.float(), first_rows(features)).layers
    mean, deviation = layers["mean"][:, 0], layers["uncertainty"][:, 0]
    valid = (mean < mean.quantile(0.8)) & (deviation < deviation.quantile(0.8))  # all that is high is padding
    network.fit_normalization(features, first_rows(features, valid))
    for found, threshold in zip((mean, deviation), network.perception.thresholds, strict=True):
        assert 0 < threshold <= found[valid].max() + 1e-5


def test_thresholds_are_those_of_the_latest_training(tiny, features):
    network = marking(tiny, features)
    bias = network.perception.bayesian_layers()[-1].bias
    bias.data += 2  # U and V of every cell rise
    network.fit_normalization(features, first_rows(features))
    bias.data -= 2
    high = network.perception.thresholds.clone()
    network.fit_normalization(features, first_rows(features))
    assert (network.perception.thresholds < high).all()


ABLATIONS = {
    "as it is": {},
    "no prototypes": {"network.restoration.prototypes": 0},
    "the paper's parts alone": PAPER_PARTS,
    "no masked attention": {"network.restoration.masked": False},
    "no attention": {"network.restoration.depth": 0},
    "sees itself": {"network.restoration.gap": 0, "network.restoration.regional_gap": 0},
    "no restoration of regions": {"network.restoration.regional": False},
    "no Bayesian weights": {"network.perception.bayesian": False},
    "one draw": {"network.perception.draws": 1},
    "never clean": {"network.synthesis.clean": 0.0},
    "wide mask": {"network.synthesis.threshold": -2.0},
    "always clean": {"network.synthesis.clean": 1.0},
    **{f"no {source}": {f"network.synthesis.{source}": 0.0} for source in SOURCES},
    "no source": {f"network.synthesis.{source}": 0.0 for source in SOURCES},
}


@pytest.mark.parametrize("changes", ABLATIONS.values(), ids=ABLATIONS)
def test_every_switch_trains_and_inspects(tiny, features, textures, changes):
    network = URANet(tiny(**changes), Weights.RANDOM)
    history = train(network, features, textures, 2)
    assert len(history) == 2
    with torch.no_grad():
        found = network(features[:2].float())
        maps, scores = network.fuse(found)
    assert maps.isfinite().all() and scores.isfinite().all() and found.restored.isfinite().all()
    uncertain = found.layers["uncertainty"]
    if {"network.perception.bayesian", "network.perception.draws"} & set(changes):
        assert not uncertain.any()
    else:
        assert uncertain.any()


def test_it_trains_without_any_texture_image(tiny, features):
    assert len(train(URANet(tiny(), Weights.RANDOM), features, None, 2)) == 2


def test_the_mean_of_probabilities_keeps_its_digits_in_logarithms():
    logits = 12 * torch.randn(2, 8, 5, 5, generator=rng(4))
    expected = logits.double().sigmoid().mean(1, keepdim=True).logit(1e-6)
    torch.testing.assert_close(mean_logit(logits).double(), expected, rtol=1e-5, atol=1e-5)
    assert mean_logit(torch.full((1, 3, 1, 1), -40.0)).item() == pytest.approx(-SUREST)
