import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from unflaw.config import Perception, Restoration
from unflaw.methods.base import Batch
from unflaw.methods.uranet import RAM, UIAPM, URANet
from unflaw.synthesis import Anomalies, synthesise
from unflaw.training import optimise

CHANNELS, GRID = 8, 8  # components and grid of the tiny configuration
SOURCES = ("textures", "others", "shuffles", "jitter")


def rng(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def features() -> Tensor:
    """What features of good pictures are like: a few patterns, smooth over places, and a little noise."""
    patterns = torch.randn(4, CHANNELS, generator=rng())
    weights = F.interpolate(torch.randn(12, 4, 3, 3, generator=rng(1)), (GRID, GRID), mode="bicubic")
    noise = 0.05 * torch.randn(12, CHANNELS, GRID, GRID, generator=rng(2))
    return (torch.einsum("nkij,kc->ncij", weights.softmax(1), patterns) + noise).half()


@pytest.fixture(scope="module")
def textures() -> Tensor:
    return 3 * torch.randn(3, CHANNELS, GRID, GRID, generator=rng(3))


def train(network: URANet, features: Tensor, textures: Tensor | None, steps: int) -> list[dict[str, float]]:
    """Setup and training as `Detector` does them."""
    tensors = {"features": features, **network.setup(features, textures, rng())}

    def loss(indices: Tensor, rng: Generator) -> dict[str, Tensor]:
        return network.loss({name: t[indices].float() for name, t in tensors.items()}, rng)

    history = optimise(network, loss, len(features), steps, network.config.training)
    network.finish(features)
    return history


@pytest.fixture(scope="module")
def trained(tiny, features, textures) -> tuple[URANet, list[dict[str, float]]]:
    torch.manual_seed(0)
    network = URANet(tiny(**{"training.learning_rate": 3e-3}), "random")
    return network, train(network, features, textures, 60)


def restoration(**changes) -> RAM:
    torch.manual_seed(0)
    return RAM(CHANNELS, GRID, Restoration(**{"patch": 2, "width": 24, "heads": 2, "depth": 2, **changes})).eval()


def shaken(part: RAM) -> RAM:
    """With a last layer that is not zero, so that the transformer has a say."""
    torch.nn.init.normal_(part.widen.weight, std=0.3, generator=rng(5))
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


def test_more_pictures_weaken_the_prior():
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


def test_untrained_restoration_is_recall_where_unmarked(features):
    recalled = features[:2].float()
    with torch.no_grad():
        restored = restoration()(recalled, square())
    unmarked = (square() == 0).expand_as(recalled)
    assert torch.equal(restored[unmarked], recalled[unmarked])


def test_what_is_not_normal_is_not_recalled(tiny, features):
    """However far off features are, what the untrained network restores of them lies among the prototypes."""
    network = URANet(tiny(**{"network.perception.deviation_threshold": 1.0}), "random")
    network.setup(features, None, rng())
    far = 50 * torch.randn(3, CHANNELS, GRID, GRID, generator=rng(4))
    with torch.no_grad():
        found = network(far)
    patch = network.options.restoration.patch
    hidden = F.interpolate(F.max_pool2d(found.layers["mask"], patch), scale_factor=patch)
    unmarked = (hidden == 0).expand_as(far)
    assert unmarked.any()
    prototypes = network.memory.prototypes
    low, high = (bound.view(1, -1, 1, 1) for bound in (prototypes.amin(0) - 1e-3, prototypes.amax(0) + 1e-3))
    assert (((found.restored >= low) & (found.restored <= high)) | ~unmarked).all()


@pytest.mark.parametrize("masked", [True, False])
def test_what_is_marked_has_no_influence(features, masked):
    part = shaken(restoration(masked=masked))
    x, marked = features[:2].float(), square()
    changed = x + 5 * marked * torch.randn(x.shape, generator=rng(6))
    elsewhere = x + 5 * (1 - marked) * torch.randn(x.shape, generator=rng(6))
    with torch.no_grad():
        restored = part(x, marked)
        assert restored.shape == x.shape
        torch.testing.assert_close(part(changed, marked), restored, atol=1e-5, rtol=1e-5)
        inside = marked.expand_as(x).bool()
        assert (part(elsewhere, marked) - restored)[inside].abs().max() > 1e-3  # context restores


@pytest.mark.parametrize("masked", [True, False])
def test_masked_attention_keeps_mask_tokens_to_their_place(features, masked):
    part, x, marked = shaken(restoration(masked=masked)), features[:2].float(), square()
    outside = (1 - marked).expand_as(x).bool()
    with torch.no_grad():
        before = part(x, marked)
        part.mask_token += 3 * torch.randn(part.mask_token.shape, generator=rng(7))
        difference = (part(x, marked) - before).abs()
    assert difference[~outside].max() > 1e-3
    assert (difference[outside].max() < 1e-5) == masked  # plain self-attention lets them speak to all


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
        URANet(tiny(**{"network.restoration.patch": 3}), "random")


# The whole


def test_training_lowers_the_loss(trained):
    history = trained[1]
    first = history[0]
    assert {"loss", "perception", "kl", "restoration"} <= set(first)
    assert first["loss"] == pytest.approx(sum(v for name, v in first.items() if name != "loss"), rel=1e-4)
    head, tail = (sum(h["loss"] for h in part) / 10 for part in (history[:10], history[-10:]))
    assert tail < 0.8 * head


def test_inspection_is_what_the_contract_says(trained, features):
    network = trained[0]
    with torch.no_grad():
        found = network(features.float())
        again = network(features.float())
        alone = network(features[3:4].float())
    assert found.witnesses.shape == (12, 2, GRID, GRID) and network.kinds == 2
    assert found.restored.shape == features.shape
    residual = (features.float() - found.restored).norm(dim=1)
    torch.testing.assert_close(found.witnesses[:, 0], residual)
    torch.testing.assert_close(found.witnesses[:, 1], network.memory(features.float())[1][:, 0])
    assert {"mean", "uncertainty", "mask"} <= set(found.layers)
    for layer in found.layers.values():
        assert layer.shape == (12, 1, GRID, GRID) and layer.min() >= 0 and layer.max() <= 1
    assert torch.equal(found.witnesses, again.witnesses)
    torch.testing.assert_close(found.witnesses[3:4], alone.witnesses, atol=1e-4, rtol=1e-4)
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
    mean, deviation = network.normal[..., None, None].unbind(1)
    standard = (found.witnesses - mean) / deviation
    assert (standard[..., inside].mean(-1) > standard[..., ~inside].mean(-1) + 2).all()  # deviations, of every kind
    assert (scores > plain_scores).all()
    peaks = maps.flatten(1).argmax(1)
    cell = maps.shape[-1] // GRID
    rows, columns = peaks // maps.shape[-1], peaks % maps.shape[-1]
    assert all(3 * cell <= int(i) < 5 * cell for i in (*rows, *columns))
    marked = found.layers["mean"][:, 0]
    assert marked[:, inside].mean() > marked[:, ~inside].mean()


def altered(network: URANet, features: Tensor, textures: Tensor | None, seed: int = 4) -> tuple[Anomalies, Batch]:
    batch = {"features": features.float(), "recalled": network.setup(features, textures, rng())["recalled"].float()}
    return synthesise(batch["features"], textures, network.options.synthesis, rng(seed)), batch


def test_recall_is_cached_and_that_of_altered_cells_is_not(trained, features, textures):
    """As if all altered features had been recalled. What the memory knows is no anomaly, whatever was done to it."""
    network = trained[0]
    with torch.no_grad():
        anomalies, batch = altered(network, features, textures)
        assert anomalies.mask.any() and not anomalies.mask.all()
        recalled, abnormal = network._recall_altered(anomalies, batch)
        expected, distance = network.memory(anomalies.features)
    torch.testing.assert_close(recalled, expected, atol=5e-3, rtol=5e-3)
    clear = (distance - network.memory.limit).abs() > 1e-4
    unknown = (distance > network.memory.limit) & anomalies.mask.bool()
    assert abnormal.shape == anomalies.mask.shape and torch.equal(abnormal.bool()[clear], unknown[clear])
    assert abnormal.any()


def test_normal_in_place_of_normal_is_no_anomaly(tiny, features):
    """All that there is to know is in the memory: cells that changed places are as normal as they were."""
    sources = {f"network.synthesis.{source}": float(source == "shuffles") for source in SOURCES}
    changes = {"network.restoration.prototypes": 12 * GRID**2, "network.synthesis.strength": (1.0, 1.0)}
    network = URANet(tiny(**sources, **changes), "random")
    with torch.no_grad():
        anomalies, batch = altered(network, features, None)
        network.memory.limit.fill_(0.01)
        assert anomalies.mask.any()
        assert not network._recall_altered(anomalies, batch)[1].any()


def test_restoration_learns_from_the_recall_of_what_was_there(trained, features, monkeypatch):
    """Altered cells are mask tokens: nothing of what they became reaches the restoration."""
    network, given = trained[0], []
    forward = network.restoration.forward
    monkeypatch.setattr(
        network.restoration, "forward", lambda x, marked: given.append((x, marked)) or forward(x, marked)
    )
    batch = {"features": features.float(), "recalled": network.setup(features, None, rng())["recalled"].float()}
    with torch.no_grad():
        terms = network.loss(batch, rng(4))
    ((recalled, marked),) = given
    assert torch.equal(recalled, batch["recalled"])
    anomalies = synthesise(batch["features"], None, network.options.synthesis, rng(4))
    assert torch.equal(marked, anomalies.mask) and marked.any()
    restored, clean = forward(recalled, marked).detach(), batch["features"]
    expected = (restored - clean).square().sum() / clean.square().sum()
    assert terms["restoration"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_without_prototypes_the_picture_alone_is_restored(tiny, features):
    """As in the paper: one kind of evidence, no memory, nothing to cache."""
    network = URANet(tiny(**{"network.restoration.prototypes": 0}), "random")
    assert network.memory is None and network.setup(features, None, rng()) == {}
    with torch.no_grad():
        found = network(features.float())
    assert network.kinds == 1 and found.witnesses.shape == (12, 1, GRID, GRID)
    torch.testing.assert_close(found.witnesses[:, 0], (features.float() - found.restored).norm(dim=1))


def marking(tiny, features: Tensor) -> URANet:
    """Thresholds of 0, so that they are what good pictures say."""
    torch.manual_seed(0)
    zero = {"network.perception.mean_threshold": 0.0, "network.perception.deviation_threshold": 0.0}
    network = URANet(tiny(**zero), "random")
    network.setup(features, None, rng())
    return network


def test_padding_has_no_part_in_thresholds(tiny, features):
    network = marking(tiny, features)
    with torch.no_grad():
        layers = network(features.float()).layers
    mean, deviation = layers["mean"][:, 0], layers["uncertainty"][:, 0]
    valid = (mean < mean.quantile(0.8)) & (deviation < deviation.quantile(0.8))  # all that is high is padding
    network.finish(features, valid)
    for found, threshold in zip((mean, deviation), network.perception.thresholds, strict=True):
        assert 0 < threshold <= found[valid].max() + 1e-5


def test_thresholds_are_those_of_the_latest_training(tiny, features):
    network = marking(tiny, features)
    network.finish(30 * features)
    high = network.perception.thresholds.clone()
    network.finish(features)
    assert (network.perception.thresholds < high).all()


ABLATIONS = {
    "as it is": {},
    "no prototypes": {"network.restoration.prototypes": 0},
    "no masked attention": {"network.restoration.masked": False},
    "no transformer": {"network.restoration.depth": 0},
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
    network = URANet(tiny(**changes), "random")
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


def test_it_trains_without_any_texture_picture(tiny, features):
    assert len(train(URANet(tiny(), "random"), features, None, 2)) == 2
