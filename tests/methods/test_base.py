"""Parts that methods share: raw maps become one anomaly map and one image score."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.conftest import first_rows
from torch import Tensor

from unflaw.config import Weights
from unflaw.methods import base, create
from unflaw.methods.base import Inspection, Method
from unflaw.methods.feature_set import Context, FeatureSet
from unflaw.methods.nearest import NearestNeighbor
from unflaw.methods.uranet import URANet

pytestmark = pytest.mark.slow

GRID = 8
SHARES, COARSE_SHARE = (0.1, 1.0), 0.3
ALONE = {
    "network.restoration.prototypes": 0,
    "network.restoration.regional_prototypes": 0,
    "network.restoration.regional": False,
}


def evidence(kinds: int, n: int = 5, seed: int = 0) -> Tensor:
    return torch.rand(n, kinds, GRID, GRID, generator=torch.Generator().manual_seed(seed))


def random_inspection(method: Method) -> Inspection:
    coarse = torch.rand(5, method.n_regional, GRID // 2, GRID // 2, generator=torch.Generator().manual_seed(1))
    perceived = evidence(1, seed=2) if method.has_perceived else None
    return Inspection(evidence(method.n_maps), perceived, coarse if method.has_regional else None)


@pytest.fixture(params=["nearest_neighbor", "uranet", "alone"])
def method(request, tiny) -> Method:
    """One kind of evidence or two, with perceived and coarse evidence or without. Knows nothing of what is normal yet:
    mean 0 and deviation 1."""
    settings = {
        "scoring.top_fractions": SHARES,
        "scoring.regional_top_fraction": COARSE_SHARE,
        "scoring.regional_map_weight": 0.5,
        "scoring.regional_weight": 2,
    }
    if request.param != "alone":
        return create(tiny(request.param, **settings), Weights.RANDOM)
    made = create(tiny(**settings, **ALONE), Weights.RANDOM)
    torch.nn.init.normal_(made.restoration.widen.weight, generator=torch.Generator().manual_seed(0))  # else no residual
    return made


def learned(method: Method, good: int = 10) -> Tensor:
    """Features of good images, (N, C, g, g) float16, which the method is set up on."""
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(good, method.features.channels, GRID, GRID, generator=rng).half()
    method.fit_memory(FeatureSet.of(features), torch.Generator().manual_seed(0))
    return features


def test_methods_by_name(tiny):
    assert isinstance(create(tiny("nearest_neighbor"), Weights.RANDOM), NearestNeighbor)
    assert isinstance(create(tiny("uranet"), Weights.RANDOM), URANet)


def test_kinds_of_evidence_are_counted(tiny):
    made = (
        create(tiny("nearest_neighbor"), Weights.RANDOM),
        create(tiny(), Weights.RANDOM),
        create(tiny(**ALONE), Weights.RANDOM),
    )
    for network, kinds, perceives, regional in zip(made, (1, 2, 1), (0, 1, 1), (1, 2, 0), strict=True):
        assert (network.n_maps, network.n_regional) == (kinds, regional)
        assert network.normal.shape == (kinds + regional, 2)
        shares = len(network.config.scoring.top_fractions)
        assert network.has_perceived == perceives
        assert network.normal_scores.shape == (shares * (1 + perceives) + (regional > 0), 2)
        with torch.no_grad():
            found = network(torch.randn(3, network.features.channels, GRID, GRID))
        assert found.anomaly_maps.shape == (3, kinds, GRID, GRID)
        assert found.regional.shape == (3, regional, GRID // 2, GRID // 2) if regional else found.regional is None
        assert found.perceived.shape == (3, 1, GRID, GRID) if perceives else found.perceived is None


def test_the_judge_is_saved_and_the_extractor_only_once(tiny):
    for name in ("nearest_neighbor", "uranet"):
        state = create(tiny(name), Weights.RANDOM).state_dict()
        judge = {key for key in state if key.startswith("regional_memory.")}
        assert {"regional_memory.memory.prototypes", "regional_memory.memory.added"} <= judge
        assert all(key.startswith("regional_memory.memory.") for key in judge)


def test_the_map_is_the_mean_of_the_evidence_and_a_part_of_the_coarse_and_keeps_constants(method):
    flat = torch.tensor([2.0, 2.0] if method.n_maps == 1 else [-1.0, 5.0])[: method.n_maps].view(1, -1, 1, 1)
    flat = flat.expand(2, -1, GRID, GRID)
    perceived = torch.tensor([1.0, 9.0]).view(2, 1, 1, 1).expand(-1, 1, GRID, GRID) if method.has_perceived else None
    coarse = torch.full((2, method.n_regional, 4, 4), 3.0) if method.has_regional else None
    maps, scores = method.fuse(Inspection(flat, perceived, coarse))
    assert maps.shape == (2, 64, 64) and scores.shape == (2,)
    torch.testing.assert_close(maps, torch.full((2, 64, 64), 2 + 0.5 * (1 - 0.5) * 3 if method.has_regional else 2.0))
    own = 2.0 if method.n_maps == 1 else 5.0  # with a memory the distance to it judges
    fine = torch.tensor([own, 9.0 if method.has_perceived else own])  # the larger of both
    torch.testing.assert_close(scores, (fine + 2 * 3) / 3 if method.has_regional else fine)


@pytest.mark.parametrize("name", ["nearest_neighbor", "uranet"])
def test_coarse_evidence_shows_where_it_lies_and_only_with_a_weight(tiny, name):
    weighted, off = (
        create(tiny(name, **{"scoring.regional_map_weight": weight}), Weights.RANDOM) for weight in (0.3, 0.0)
    )
    flat, coarse = torch.zeros(1, weighted.n_maps, GRID, GRID), torch.zeros(1, weighted.n_regional, 4, 4)
    perceived = flat[:, :1] if weighted.has_perceived else None
    coarse[..., 3, 1] = 8.0
    (maps, scores), (none, same) = (m.fuse(Inspection(flat, perceived, coarse)) for m in (weighted, off))
    row, column = divmod(int(maps.argmax()), 64)
    assert row >= 48 and 16 <= column < 32
    assert 0 < maps.max() <= 0.3 * 8
    assert not none.any()
    assert torch.equal(scores, same) and (scores > 0).all()


def test_evidence_counts_in_its_own_deviations(method):
    """However small the numbers of a kind are."""
    inspection = random_inspection(method)
    expected = method.fuse(inspection)
    mean, deviation = (torch.tensor(v)[: method.n_maps] for v in ([3.0, -1.0, 0.0], [100.0, 0.01, 2.0]))
    rows, coarse = torch.stack([mean, deviation], dim=-1), inspection.regional
    if coarse is not None:
        rows, coarse = torch.cat([rows, torch.tensor([[7.0, 0.1]]).repeat(method.n_regional, 1)]), 0.1 * coarse + 7
    method.normal.copy_(rows)
    scaled = inspection.anomaly_maps * deviation.view(-1, 1, 1) + mean.view(-1, 1, 1)
    for a, b in zip(method.fuse(Inspection(scaled, inspection.perceived, coarse)), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def smoothed(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Mean over those of the 3×3 neighbours that there are."""
    out = np.zeros_like(values)
    for y, x in np.argwhere(valid):
        near = np.s_[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
        out[y, x] = values[near][valid[near]].mean()
    return out


def highest_by_hand(values: np.ndarray, valid: np.ndarray, share: float) -> float:
    ordered = np.sort(smoothed(values, valid)[valid])[::-1]
    return float(ordered[: max(1, round(share * ordered.size))].mean())


def holding_any(valid: np.ndarray) -> np.ndarray:
    starts = range(0, len(valid), 2)
    return np.array([[valid[y : y + 2, x : x + 2].any() for x in starts] for y in starts])


def scores_by_hand(method: Method, inspection: Inspection, valid: np.ndarray, normal: np.ndarray) -> list[float]:
    scores = []
    for i, inside in enumerate(valid):
        found = statistics_by_hand(
            inspection, inspection.anomaly_maps[i, method.scored_maps].mean(0).numpy(), inside, i
        )
        above = [(f - mean) / dev for f, (mean, dev) in zip(found, normal, strict=True)]
        fine = max(np.mean(above[:2]), np.mean(above[2:4])) if inspection.perceived is not None else np.mean(above[:2])
        scores.append(float(fine if inspection.regional is None else (fine + 2 * above[-1]) / 3))
    return scores


def statistics_by_hand(inspection: Inspection, fused: np.ndarray, inside: np.ndarray, i: int) -> list[float]:
    found = [highest_by_hand(fused, inside, share) for share in SHARES]
    if inspection.perceived is not None:
        found += [highest_by_hand(inspection.perceived[i, 0].numpy(), inside, share) for share in SHARES]
    if inspection.regional is not None:
        found.append(highest_by_hand(inspection.regional[i].mean(0).numpy(), holding_any(inside), COARSE_SHARE))
    return found


NORMAL = [[0.7, 0.05], [0.5, 0.2], [0.4, 0.1], [0.6, 0.3], [-0.3, 4.0]]


@pytest.mark.parametrize("normal", [[[0.0, 1.0]] * 5, NORMAL])
def test_the_score_is_made_of_highest_shares_in_their_own_deviations(method, normal):
    normal = normal[: len(method.normal_scores)]
    method.normal_scores.copy_(torch.tensor(normal))
    inspection, everywhere = random_inspection(method), np.ones((5, GRID, GRID), bool)
    expected = scores_by_hand(method, inspection, everywhere, np.array(normal))
    np.testing.assert_allclose(method.fuse(inspection)[1].numpy(), expected, rtol=1e-4)


def test_fine_evidence_has_the_say_that_is_known_of_it(tiny):
    method = create(tiny("nearest_neighbor", **{"scoring.regional_weight": 2}), Weights.RANDOM)
    inspection = random_inspection(method)
    fine, coarse = method._image_scores(inspection, None)
    method.patch_weight.fill_(0.25)
    torch.testing.assert_close(method.fuse(inspection)[1], (0.25 * fine + 1.5 * coarse) / 1.75)
    method.patch_weight.fill_(1)
    torch.testing.assert_close(method.fuse(inspection)[1], fine)


def differing(between: float, images: int = 400, cells: int = 16) -> Tensor:
    """Maps (N, 4, 4) of variance 1, of which a share lies between images."""
    rng = torch.Generator().manual_seed(0)
    own = torch.randn(images, 1, generator=rng)
    return (between**0.5 * own + (1 - between) ** 0.5 * torch.randn(images, cells, generator=rng)).view(-1, 4, 4)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 0.9])
def test_share_of_variance_between_images(share):
    maps = differing(share)
    everywhere, each = torch.ones_like(maps, dtype=torch.bool), torch.arange(len(maps))
    found = base.variance_between(maps, everywhere, each)
    assert found.item() == pytest.approx(share + (1 - share) / 16, abs=0.05)  # a mean of 16 cells varies by itself
    torch.testing.assert_close(base.variance_between(7 * maps - 3, everywhere, each), found)
    half = torch.zeros_like(everywhere)
    half[:, :2] = True
    garbled = torch.where(half, maps, 1e3)
    torch.testing.assert_close(
        base.variance_between(garbled, half, each), base.variance_between(maps[:, :2], half[:, :2], each)
    )


def test_windows_of_an_image_are_not_images():
    """A window over the rim of a part differs from one over its middle in every image alike."""
    maps = differing(0.0) + torch.arange(400).remainder(4).view(-1, 1, 1)
    everywhere = torch.ones_like(maps, dtype=torch.bool)
    assert base.variance_between(maps, everywhere, torch.arange(400)) > 0.5
    assert base.variance_between(maps, everywhere, torch.arange(400) // 4) < 0.05
    assert base.variance_between(maps[:4], everywhere[:4], torch.zeros(4)) == 0  # one image says nothing
    assert base.variance_between(0 * maps, everywhere, torch.arange(400)) == 0


@pytest.mark.parametrize(("share", "weight"), [(0.0, 1.0), (0.1, 0.75), (0.2, 0.5), (0.4, 0.0), (0.9, 0.0)])
def test_patches_weigh_less_the_more_good_images_differ_as_wholes(tiny, monkeypatch, share, weight):
    method = create(tiny("nearest_neighbor"), Weights.RANDOM)
    maps = differing(share)[:, None].repeat(1, 1, 64, 64)  # many cells: their mean tells the image's own level
    maps = maps[..., :64, :64]

    def forward(features: Tensor, context: Context) -> Inspection:
        rows = context.training_rows
        return Inspection(torch.zeros(len(rows), 1, GRID, GRID), regional=maps[rows])

    monkeypatch.setattr(method, "forward", forward)
    monkeypatch.setattr(method, "_images", lambda context, n: torch.arange(n))
    features = torch.zeros(len(maps), 4, GRID, GRID).half()
    method.fit_normalization(features, first_rows(features))
    own = maps.flatten(1).mean(1).var()
    expected = 1 - own / (own + maps.flatten(1).var(1, correction=0).mean()) / 0.4
    assert method.patch_weight.item() == pytest.approx(max(0.0, expected.item()), abs=1e-4)
    assert method.patch_weight.item() == pytest.approx(weight, abs=0.25)


def test_the_weight_counts_images_by_the_memory(tiny):
    """Rows are windows; the memory knows the image of each."""
    method = create(tiny("nearest_neighbor"), Weights.RANDOM)
    features = torch.randn(12, method.features.channels, GRID, GRID, generator=torch.Generator().manual_seed(0)).half()
    features *= torch.arange(12).remainder(3).add(1).view(-1, 1, 1, 1)
    weights = []
    for images in (torch.arange(12), torch.arange(12) // 3):
        method.fit_memory(FeatureSet(features, images), torch.Generator().manual_seed(0))
        method.fit_normalization(features, first_rows(features))
        weights.append(method.patch_weight.item())
    assert weights[0] < weights[1] - 0.1


@pytest.mark.parametrize(
    ("shape", "starts"),
    [((6, 6), [0]), ((4, 8), [0, 2, 4]), ((9, 4), [0, 1, 3, 5]), ((4, 5), [0, 1]), ((1, 3), [0, 1, 2])],
)
def test_square_parts_cover_a_map_and_overlap(shape, starts):
    maps, side = torch.rand(2, *shape), min(shape)
    parts = base.square_parts(maps)
    assert [p.shape for p in parts] == [(2, side, side)] * len(starts)
    for part, start in zip(parts, starts, strict=True):
        axis = 1 if shape[0] > shape[1] else 2
        assert torch.equal(part, maps.narrow(axis, start, side))
    steps = np.diff([*starts])
    assert (steps <= max(1, side // 2)).all() and starts[-1] + side == max(shape)


def test_a_defect_counts_the_same_however_long_the_product_is(tiny):
    """The same cells on a square and on a strip of four squares."""
    settings = {"scoring.top_fractions": SHARES, "scoring.regional_top_fraction": COARSE_SHARE}
    square, strip = (
        create(tiny("nearest_neighbor", **settings, **{"preparation.size": size}), Weights.RANDOM)
        for size in (64, (256, 64))
    )
    assert strip.features.shape == (8, 32)
    small, coarse = evidence(1), evidence(1, seed=1)[..., :4, :4]
    for place in range(4):
        long, regions = torch.zeros(5, 1, 8, 32), torch.zeros(5, 1, 4, 16)
        long[..., 8 * place : 8 * place + 8], regions[..., 4 * place : 4 * place + 4] = small, coarse
        found, expected = (
            strip.fuse(Inspection(long, regional=regions)),
            square.fuse(Inspection(small, regional=coarse)),
        )
        assert found[0].shape == (5, 64, 256)
        assert (found[1] >= expected[1] - 1e-5).all()  # another part may lie better
        torch.testing.assert_close(found[1], expected[1], rtol=0.2, atol=0)


def strips() -> Tensor:
    """Valid cells of five images of different size in a batch."""
    valid = torch.zeros(5, GRID, GRID, dtype=torch.bool)
    valid[:, 2:6] = True
    valid[3:, 2:4] = False
    valid[3:, 5] = False  # one row alone, of which the coarse cells hold but a half
    return valid


def test_padding_has_no_part_in_the_score(method):
    inspection, valid = random_inspection(method), strips()
    expected = scores_by_hand(method, inspection, valid.numpy(), np.array([[0.0, 1.0]] * len(method.normal_scores)))
    scores = method.fuse(inspection, valid)[1]
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-5)
    anomaly_maps, coarse = torch.where(valid[:, None], inspection.anomaly_maps, 100.0), inspection.regional
    perceived = torch.where(valid[:, None], inspection.perceived, 100.0) if method.has_perceived else None
    if coarse is not None:
        held = torch.from_numpy(np.stack([holding_any(v) for v in valid.numpy()]))
        assert not held.all() and (held.flatten(1).sum(1) * 4 > valid.flatten(1).sum(1)).any()
        coarse = torch.where(held[:, None], coarse, 100.0)
    torch.testing.assert_close(method.fuse(Inspection(anomaly_maps, perceived, coarse), valid)[1], scores)
    everywhere = torch.ones_like(valid)
    torch.testing.assert_close(method.fuse(inspection, everywhere)[1], method.fuse(inspection)[1])


def test_a_last_cell_of_an_odd_grid_has_a_coarse_cell_of_its_own(tiny):
    method = create(tiny("nearest_neighbor", **{"features.grid": 7, "scoring.regional_weight": 2}), Weights.RANDOM)
    valid = torch.zeros(1, 7, 7, dtype=torch.bool)
    valid[..., 6, 6] = True
    coarse = torch.arange(16.0).view(1, 1, 4, 4)
    score = method.fuse(Inspection(torch.ones(1, 1, 7, 7), regional=coarse), valid)[1]
    assert score.item() == pytest.approx((1 + 2 * 15) / 3)


@pytest.mark.parametrize("grid", [7, 8])
def test_coarse_evidence_lies_where_its_cells_lie(tiny, grid):
    """A ramp over coarse cells stays that ramp on the canvas, also where half of the last cell is off the grid."""
    method = create(
        tiny("nearest_neighbor", **{"features.grid": grid, "scoring.regional_map_weight": 1.0, "scoring.smooth": 0}),
        Weights.RANDOM,
    )
    method.patch_weight.fill_(0)
    coarse = torch.arange(4.0).view(1, 1, 4, 1).expand(1, 1, 4, 4)
    maps = method.fuse(Inspection(torch.zeros(1, 1, grid, grid), regional=coarse))[0]
    rows = (torch.arange(64) + 0.5) / 64 * grid / 2 - 0.5
    torch.testing.assert_close(maps[0, :, 30], rows.clamp(0, 3), atol=0.02, rtol=0)


def standardised(method: Method, inspection: Inspection) -> list[Tensor]:
    """Each kind of evidence, (N, g, g) or (N, h, h), the coarse ones last."""
    kinds = list(inspection.anomaly_maps.unbind(1))
    kinds += [] if inspection.regional is None else list(inspection.regional.unbind(1))
    return [(kind - mean) / deviation for kind, (mean, deviation) in zip(kinds, method.normal, strict=True)]


def assert_statistics_are_standard(method: Method, inspection: Inspection, valid: Tensor | None = None) -> None:
    """Every statistic that judges an image has mean 0 and deviation 1 over these images."""
    mean, deviation = method.normal_scores.unbind(-1)
    above = (method._statistics(inspection, valid) - mean) / deviation
    torch.testing.assert_close(above.mean(0), torch.zeros_like(mean), atol=1e-3, rtol=0)
    torch.testing.assert_close(above.std(0, correction=0), torch.ones_like(mean), atol=1e-2, rtol=0)


def test_after_training_evidence_counts_in_deviations_of_good_images(method):
    """Of training images as if they were new: what they taught the memory is left out."""
    features = learned(method)
    method.fit_normalization(features, first_rows(features))
    with torch.no_grad():
        found = method(features.float(), first_rows(features))
        standard = standardised(method, found)
        maps, scores = method.fuse(found)
    assert len(standard) == method.n_maps + method.n_regional
    for kind in standard:
        assert kind.mean().item() == pytest.approx(0, abs=1e-3)
        assert kind.std().item() == pytest.approx(1, abs=1e-3)
    assert maps.mean().item() == pytest.approx(0, abs=0.05)
    assert_statistics_are_standard(method, found)
    if not method.has_perceived:  # the larger of two has no mean of 0
        assert scores.mean().item() == pytest.approx(0, abs=1e-3)
    fused = torch.stack(standard[: method.n_maps], 1)[:, method.scored_maps].mean(1).numpy()
    everywhere = np.ones((GRID, GRID), bool)
    coarse = torch.stack(standard[method.n_maps :], 1) if method.has_regional else None
    judged = Inspection(found.anomaly_maps, found.perceived, coarse)
    statistics = [statistics_by_hand(judged, f, everywhere, i) for i, f in enumerate(fused)]
    mean, deviation = method.normal_scores.unbind(-1)
    np.testing.assert_allclose(np.mean(statistics, 0), mean.numpy(), atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(np.std(statistics, 0), deviation.numpy(), atol=1e-4, rtol=1e-3)
    assert {"normal", "normal_scores"} <= method.state_dict().keys()  # a saved detector needs them


@pytest.mark.parametrize("name", ["nearest_neighbor", "uranet"])
def test_training_images_are_not_judged_by_what_they_taught(tiny, name):
    """With their own prototypes they would look far more usual than new ones."""
    method = create(tiny(name), Weights.RANDOM)
    features = learned(method, 48)
    new = torch.randn(64, *features.shape[1:], generator=torch.Generator().manual_seed(9))
    method.fit_normalization(features, first_rows(features))
    distances = [method.n_maps - 1, method.n_maps + method.n_regional - 1]  # last of the fine and of the coarse
    with torch.no_grad():
        found = (standardised(method, method(f)) for f in (features.float(), new))
        itself, unseen = (torch.stack([kinds[i].mean() for i in distances]) for kinds in found)
    assert (itself < -0.15).all()
    assert (unseen > itself / 2).all()


def test_padding_has_no_part_in_what_is_normal(method):
    features, rows = learned(method), torch.arange(10)
    valid = torch.zeros(10, GRID, GRID, dtype=torch.bool)
    valid[:, 2:6] = True
    method.fit_normalization(features, first_rows(features, valid))
    before = method.normal.clone(), method.normal_scores.clone()
    with torch.no_grad():
        found = method(features.float(), Context(valid, rows))
    assert_statistics_are_standard(method, found, valid)
    for kind in standardised(method, found):
        inside = kind[:, 2:6] if kind.shape[-1] == GRID else kind[:, 1:3]
        assert inside.mean().item() == pytest.approx(0, abs=1e-3)
        assert inside.std().item() == pytest.approx(1, abs=1e-3)
    if isinstance(
        method, NearestNeighbor
    ):  # which looks at each cell by itself: what stands in the padding is all the same
        method.fit_normalization(
            torch.where(valid[:, None], features, 9.0), first_rows(torch.where(valid[:, None], features, 9.0), valid)
        )
        torch.testing.assert_close((method.normal, method.normal_scores), before)


def test_one_training_image_gives_finite_numbers(method):
    features = learned(method)
    method.fit_normalization(features[:1], first_rows(features[:1]))
    with torch.no_grad():
        maps, scores = method.fuse(method(features[:3].float()))
    assert maps.isfinite().all() and scores.isfinite().all()


@pytest.mark.parametrize("seed", range(4))
def test_extending_raises_no_evidence_of_any_image(method, seed):
    rng = torch.Generator().manual_seed(seed)
    for parameter in method.parameters():  # weights that nobody trained and nobody shrank
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3, generator=rng)
    features = learned(method)
    method.fit_normalization(features, first_rows(features))
    held, new = (2 * torch.randn(6, *features.shape[1:], generator=rng) for _ in range(2))
    everything = torch.cat([features.float(), held, new, 100 * new])
    with torch.no_grad():
        before = method(everything)
        method.add_prototypes(FeatureSet.of(held.half()), rng)
        after = method(everything)
        maps, scores = zip(method.fuse(before), method.fuse(after), strict=True)
    assert (after.anomaly_maps <= before.anomaly_maps).all()
    assert after.perceived is None or (after.perceived <= before.perceived).all()
    assert (scores[1] <= scores[0] + 1e-5).all() and (maps[1] <= maps[0] + 1e-4).all()
    if not method.has_regional:
        assert torch.equal(after.anomaly_maps, before.anomaly_maps)
        return
    assert (after.regional <= before.regional).all()
    learned_now, known = slice(10, 16), len(method.regional_memory.memory.added)
    assert known and (after.regional[learned_now] < 0.05 * before.regional[learned_now]).sum() >= known
    assert (scores[1][learned_now] < scores[0][learned_now]).any()


@pytest.mark.parametrize("levels", [(2,), (2, 3), (1, 2, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("name", ["nearest_neighbor", "uranet"])
def test_any_number_of_levels_gives_one_map(tiny, name, levels):
    method = create(tiny(name, **{"features.levels": levels}), Weights.RANDOM)
    features = learned(method)
    method.fit_normalization(features, first_rows(features))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps, scores = method.fuse(method(method.embed(images)))
    assert maps.shape == (2, 64, 64) and scores.shape == (2,)
    assert maps.isfinite().all() and scores.isfinite().all()


def test_lookup_is_the_distance_to_the_memory(tiny):
    method = create(tiny("nearest_neighbor"), Weights.RANDOM)
    features = learned(method)
    method.add_prototypes(FeatureSet.of(3 * features[:4]), torch.Generator().manual_seed(1))
    everything, rows = torch.cat([3 * features[:4], features[:2]]).float(), torch.arange(4)[[0, 1, 2, 3, 0, 1]]
    for context in (Context(), Context(added_rows=rows)):
        found = method(everything, context)
        retrieved, distance, least, scored = method.memory(everything, context)
        assert torch.equal(found.anomaly_maps, scored) and torch.equal(found.restored, retrieved)
        assert torch.equal(found.regional, method.regional_memory(everything, context))
        assert not torch.equal(least, distance)
    assert not torch.equal(method(everything).regional, method(everything, context).regional)
    assert not list(p for p in method.parameters() if p.requires_grad)
    with pytest.raises(TypeError, match="NearestNeighbor has nothing to train"):
        method.loss({"features": features.float()}, torch.Generator())


def test_a_forward_that_breaks_the_contract_is_named(tiny):
    method = create(tiny("nearest_neighbor"), Weights.RANDOM)
    features, whole = learned(method), method.forward
    for wrong, message in (
        (lambda found: found.anomaly_maps[:, 0], r"NearestNeighbor\.forward .* \(10, 8, 8\); .* \(10, 1, 8, 8\)"),
        (lambda found: found.anomaly_maps * torch.nan, "not all of them finite"),
    ):
        method.forward = lambda *given, wrong=wrong: replace(whole(*given), anomaly_maps=wrong(whole(*given)))
        with pytest.raises(ValueError, match=message):
            method.fit_normalization(features, first_rows(features))
