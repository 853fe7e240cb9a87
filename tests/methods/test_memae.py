import math

import pytest
import torch
from torch import Generator, Tensor

from unflaw.config import make_config
from unflaw.detector import Detector
from unflaw.methods.memae import AddressedMemory, MemAE
from unflaw.report import panel

SIDE = 64


def rng(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=rng(seed))


def network(tiny, **changes) -> MemAE:
    torch.manual_seed(0)
    return MemAE(tiny("memae", **changes)).eval()


# The memory


def test_addressing_by_hand():
    """Items along x, y and −x, λ = 1/3; the query lies along x, so that the cosines are 1, 0 and −1."""
    memory = AddressedMemory(3, 2, shrinkage=1.0)
    memory.items.data = torch.tensor([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0]])
    mixed, weights = memory(torch.tensor([[[7.0, 0.0]]]))
    torch.testing.assert_close(weights, torch.tensor([[[1.0, 0.0, 0.0]]]))  # e, 1 and 1/e of their sum: .67, .24, .09
    torch.testing.assert_close(mixed, torch.tensor([[[2.0, 0.0]]]))  # the item itself, not its direction
    memory.shrink = 0.2
    total = math.e + 1
    mixed, weights = memory(torch.tensor([[[7.0, 0.0]]]))
    torch.testing.assert_close(weights, torch.tensor([[[math.e / total, 1 / total, 0.0]]]))
    torch.testing.assert_close(mixed, torch.tensor([[[2 * math.e / total, 5 / total]]]))


def test_without_shrinkage_all_items_take_part():
    memory, queries = AddressedMemory(6, 4, shrinkage=0.0), torch.randn(2, 5, 4, generator=rng())
    _, weights = memory(queries)
    cosine = torch.nn.functional.cosine_similarity(queries[:, :, None], memory.items, dim=-1)
    torch.testing.assert_close(weights, cosine.softmax(-1))


@pytest.mark.parametrize("items", [1, 2, 50])
def test_up_to_a_shrinkage_of_one_no_address_is_empty(items):
    memory, queries = AddressedMemory(items, 8, shrinkage=0.99), torch.randn(3, 20, 8, generator=rng())
    _, weights = memory(queries)
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 20))
    assert items < 3 or (weights == 0).any()


def test_an_empty_address_gives_nothing_and_finite_gradients():
    memory, queries = AddressedMemory(4, 8, shrinkage=3.0), torch.randn(2, 3, 8, generator=rng(), requires_grad=True)
    with torch.no_grad():
        memory.items.fill_(1.0)  # all as near: every weight is 1/4
    mixed, weights = memory(queries)
    assert not weights.any() and not mixed.any()
    mixed.square().sum().backward()
    assert queries.grad.isfinite().all()


def test_addresses_are_learned(tiny):
    made = network(tiny)
    made.loss({"features": rand(3, 3, SIDE, SIDE)}, rng())["loss"].backward()
    assert made.addressed_memory.items.grad.abs().sum() > 0
    assert all(p.grad is not None for p in made.encoder.parameters())


# The method


def test_inspection_is_the_squared_error(tiny):
    made, images = network(tiny), rand(2, 3, SIDE, SIDE)
    with torch.no_grad():
        found, again = made(images), made(images)
    assert found.restored.shape == images.shape and torch.equal(found.anomaly_maps, again.anomaly_maps)
    torch.testing.assert_close(found.anomaly_maps[:, 0], (found.restored - images).square().mean(1))


def test_the_loss_is_squared_error_and_entropy(tiny):
    made, images = network(tiny, **{"network.entropy": 0.5}), rand(2, 3, SIDE, SIDE)
    assert made.options.model_copy(update={"entropy": 0.0002}) == tiny("memae").network  # the paper's by default
    weights: list[Tensor] = []
    made.addressed_memory.register_forward_hook(lambda module, inputs, output: weights.append(output[1]))
    with torch.no_grad():
        terms, restored = made.loss({"features": images}, rng()), made(images).restored
    assert weights[0].shape == (2, 8 * 8, 10)  # three halvings
    w = weights[0].double()
    entropy = -torch.where(w > 0, w * w.clamp_min(1e-300).log(), 0).sum(-1).mean().item()
    assert terms["entropy"].item() == pytest.approx(entropy, rel=1e-4)
    assert terms["mse"].item() == pytest.approx((restored - images).square().mean().item(), rel=1e-4)
    assert terms["loss"].item() == pytest.approx(terms["mse"].item() + 0.5 * entropy, rel=1e-4)


def test_nothing_passes_beside_the_memory(tiny):
    made = network(tiny)
    with torch.no_grad():
        made.addressed_memory.items.copy_(
            made.addressed_memory.items[:1].expand(10, -1)
        )  # one item: every code is the same
        first, second = made(rand(1, 3, SIDE, SIDE)).restored, made(rand(1, 3, SIDE, SIDE, seed=1)).restored
    torch.testing.assert_close(first, second)


def test_a_side_that_cannot_be_halved_is_named(tiny):
    with pytest.raises(ValueError, match=r"side of 36 pixels.*halved 3 times.*multiple of 8.*network\.side"):
        MemAE(tiny("memae", **{"network.side": 36}))


def test_the_paper_profile_has_the_published_widths():
    options = make_config("memae", "paper").network
    assert (options.widths, options.items, options.side) == ((64, 128, 128, 256), 500, None)


def test_shrinkage_out_of_the_published_range_is_named():
    with pytest.raises(ValueError, match=r"network\.shrinkage"):
        make_config("memae", "cpu", {"network.shrinkage": 4})


# With everything around it


def test_it_finds_an_obvious_defect_and_is_saved_whole(parts, tiny, tmp_path):
    config = tiny("memae", **{"training.steps": 80, "training.learning_rate": 3e-3})
    made = Detector(config=config).fit(parts)
    bad, good = (sorted((parts / "test" / name).iterdir()) for name in ("square", "good"))
    results = {path: made.inspect(path) for path in bad + good}
    assert min(results[path].score for path in bad) > max(results[path].score for path in good)
    assert made.display is None and results[bad[0]].layers["restored"].shape == (SIDE, SIDE, 3)
    assert panel(results[bad[0]], made.calibration_.scale).width > 600  # image, heat map, restored
    made.save(tmp_path / "parts.safetensors")
    assert Detector.load(tmp_path / "parts.safetensors").inspect(bad[0]).score == results[bad[0]].score
    again = Detector(config=config).fit(parts)
    assert again.inspect(bad[0]).score == results[bad[0]].score  # the same seed
    assert again.calibration_ == made.calibration_


def test_an_interrupted_fit_goes_on_to_the_same_detector(parts, tiny, tmp_path):
    """With the running statistics of batch normalisation."""
    config, checkpoint = tiny("memae", **{"training.checkpoint_seconds": 0.0}), tmp_path / "run.checkpoint"

    def stop(stage: str, done: int, total: int, loss: float | None = None) -> None:
        if stage == "training" and done == total - 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Detector(config=config).fit(parts, progress=stop, checkpoint=checkpoint)
    resumed, whole = Detector(config=config).fit(parts, checkpoint=checkpoint), Detector(config=config).fit(parts)
    state = resumed.network.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.network.state_dict().items())
