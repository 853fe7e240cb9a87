import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from unflaw.config import Perception, Restoration
from unflaw.methods.uranet import RAM, UIAPM, URANet
from unflaw.training import optimise

LEVELS = [8, 8, 8]  # components of each level in the tiny configuration
CHANNELS, GRID = sum(LEVELS), 8
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
    network.finish(features[:3])
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
    assert found.witnesses.shape == (12, network.kinds, 3, GRID, GRID) and found.witnesses.isfinite().all()
    assert found.restored.shape == features.shape
    assert {"mean", "uncertainty", "mask"} <= set(found.layers)
    for layer in found.layers.values():
        assert layer.shape == (12, 1, GRID, GRID) and layer.min() >= 0 and layer.max() <= 1
    assert torch.equal(found.witnesses, again.witnesses)
    torch.testing.assert_close(found.witnesses[3:4], alone.witnesses, atol=1e-4, rtol=1e-4)
    options = network.config.network.perception
    marked = found.layers["mean"] >= options.mean_threshold
    ambiguous = found.layers["uncertainty"] >= options.deviation_threshold
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
    levels = network.levels(found.witnesses)
    assert (levels[..., inside].mean(-1) > levels[..., ~inside].mean(-1) + 2).all()  # deviations, at every level
    assert (scores > plain_scores).all()
    peaks = maps.flatten(1).argmax(1)
    cell = maps.shape[-1] // GRID
    rows, columns = peaks // maps.shape[-1], peaks % maps.shape[-1]
    assert all(3 * cell <= int(i) < 5 * cell for i in (*rows, *columns))
    mean = found.layers["mean"][:, 0]
    assert mean[:, inside].mean() > mean[:, ~inside].mean()


ABLATIONS = {
    "as it is": {},
    "no prototypes": {"network.restoration.prototypes": 0},
    "no masked attention": {"network.restoration.masked": False},
    "no transformer": {"network.restoration.depth": 0},
    "no Bayesian weights": {"network.perception.bayesian": False},
    "one draw": {"network.perception.draws": 1},
    "never clean": {"network.synthesis.clean": 0.0},
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
