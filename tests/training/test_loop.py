import itertools
import signal

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

from unflaw.config import Training, Weights
from unflaw.errors import InUseError, TrainingError
from unflaw.io.files import steps_of
from unflaw.methods import create
from unflaw.methods.layers import BayesianConv2d
from unflaw.parallel.process_group import uses_bfloat16
from unflaw.training.loop import decay_groups, learning_rate, optimise, step_rng


class Line(nn.Module):
    """y = w·x with noise in its loss, and a parameter that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def loss_on(self, data: Tensor, stop_at: int | None = None):
        calls = itertools.count()

        def loss(rows: Tensor, rng: Generator) -> dict[str, Tensor]:
            if next(calls) == stop_at:
                raise KeyboardInterrupt
            x = data[rows]
            noise = 0.1 * torch.randn(len(x), generator=rng)
            error = (x @ self.w - x @ torch.tensor([1.0, -2.0, 3.0]) + noise).square().mean()
            return {"loss": error + 0.001 * self.w.square().sum(), "error": error}

        return loss


DATA = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))


def settings(**changes) -> Training:
    return Training(**{"batch": 8, "learning_rate": 0.1, "checkpoint_seconds": 0.0, **changes})


def test_the_loop_learns_and_records():
    line, reports = Line(), []
    history = optimise(
        line, line.loss_on(DATA), 50, 250, settings(), stage="fitting", progress=lambda *r: reports.append(r)
    )
    torch.testing.assert_close(line.w.detach(), torch.tensor([1.0, -2.0, 3.0]), atol=0.1, rtol=0)
    assert torch.equal(line.frozen, torch.ones(3))
    assert not line.training
    assert 100 <= len(history) <= 125 and set(history[0]) == {"loss", "error"}
    assert history[-1]["loss"] < 0.01 * history[0]["loss"]
    assert reports[-1] == ("fitting", 250, 250, history[-1]["loss"])


def test_the_seed_decides():
    def trained(seed: int) -> Tensor:
        line = Line()
        optimise(line, line.loss_on(DATA), 50, 20, settings(seed=seed))
        return line.w.detach()

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


@pytest.mark.parametrize("steps, stop_at", [(40, 17), (250, 101), (250, 249)])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, steps, stop_at):
    whole = Line()
    history = optimise(whole, whole.loss_on(DATA), 50, steps, settings())
    checkpoint, broken = tmp_path / "run.checkpoint", Line()
    with pytest.raises(KeyboardInterrupt):
        optimise(broken, broken.loss_on(DATA, stop_at), 50, steps, settings(), checkpoint=checkpoint)
    assert [p.name for p in tmp_path.iterdir()] == ["run.checkpoint"]
    resumed, reports = Line(), []
    again = optimise(
        resumed,
        resumed.loss_on(DATA),
        50,
        steps,
        settings(),
        checkpoint=checkpoint,
        progress=lambda *r: reports.append(r[1]),
    )
    assert torch.equal(resumed.w, whole.w)
    assert again == history
    assert reports[0] > stop_at - 3  # it went on, rather than from the start


@pytest.mark.parametrize("stop_at", [0, 100, 101, 249])
def test_ctrl_c_ends_a_step_saves_it_and_the_run_goes_on_bit_for_bit(tmp_path, ctrl_c, stop_at):
    """Also in the midst of the steps whose terms become one line of the history."""
    whole, rare = Line(), settings(checkpoint_seconds=1e6)
    history = optimise(whole, whole.loss_on(DATA), 50, 250, rare)
    checkpoint, broken, reports = tmp_path / "run.checkpoint", Line(), []
    loss, calls = broken.loss_on(DATA), itertools.count()

    def pressing(rows: Tensor, rng: Generator) -> dict[str, Tensor]:
        if next(calls) == stop_at:
            ctrl_c()
        return loss(rows, rng)

    with pytest.raises(KeyboardInterrupt):
        optimise(broken, pressing, 50, 250, rare, checkpoint=checkpoint)
    assert next(calls) == stop_at + 1 and not broken.training
    assert steps_of(checkpoint) == (stop_at + 1, f"step {stop_at + 1} of 250")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = Line()
    again = optimise(
        resumed,
        resumed.loss_on(DATA),
        50,
        250,
        rare,
        checkpoint=checkpoint,
        progress=lambda *report: reports.append(report[1:3]),
    )
    assert torch.equal(resumed.w, whole.w) and again == history and reports[0] == (stop_at + 1, 250)
    assert [path.name for path in tmp_path.iterdir()] == ["run.checkpoint"]


def test_the_second_ctrl_c_ends_a_step_that_does_not_end(tmp_path, ctrl_c):
    line = Line()

    def endless(rows: Tensor, rng: Generator) -> dict[str, Tensor]:
        for _ in range(3):
            ctrl_c()
        pytest.fail("it goes on")

    with pytest.raises(KeyboardInterrupt):
        optimise(line, endless, 50, 10, settings(), checkpoint=tmp_path / "run.checkpoint")
    assert list(tmp_path.iterdir()) == [] and not line.training


def test_the_last_step_is_saved_for_what_comes_after_it(tmp_path):
    line, checkpoint = Line(), tmp_path / "run.checkpoint"
    optimise(line, line.loss_on(DATA), 50, 7, settings(checkpoint_seconds=1e6), checkpoint=checkpoint)
    assert steps_of(checkpoint) == (7, "step 7 of 7")
    other = Line()
    optimise(other, lambda *_: pytest.fail("no step is left"), 50, 7, settings(), checkpoint=checkpoint)
    assert torch.equal(other.w, line.w)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_module_is_in_evaluation_mode_however_training_ends(error):
    line = Line()

    def loss(rows: Tensor, rng: Generator) -> dict[str, Tensor]:
        assert line.training
        raise error

    with pytest.raises(error):
        optimise(line, loss, 50, 10, settings())
    assert not line.training


def test_running_statistics_go_on_too(tmp_path):
    """Batch normalisation changes buffers at every step."""

    def loss_of(module: nn.Module, stop_at: int = -1):
        steps = itertools.count()

        def loss(rows: Tensor, rng: Generator) -> dict[str, Tensor]:
            if next(steps) == stop_at:
                raise KeyboardInterrupt
            return {"loss": module(DATA[rows]).square().mean()}

        return loss

    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(DATA.shape[1], 4), nn.BatchNorm1d(4))

    whole, broken, resumed = made(), made(), made()
    optimise(whole, loss_of(whole), 50, 20, settings())
    with pytest.raises(KeyboardInterrupt):
        optimise(broken, loss_of(broken, 9), 50, 20, settings(), checkpoint=tmp_path / "c")
    optimise(resumed, loss_of(resumed), 50, 20, settings(), checkpoint=tmp_path / "c")
    assert whole[1].num_batches_tracked == 20
    state = resumed.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.state_dict().items())


def interrupted(path, identity: str = "these images", steps: int = 10) -> None:
    """Leaves a checkpoint of an unfinished run."""
    line = Line()
    with pytest.raises(KeyboardInterrupt):
        optimise(line, line.loss_on(DATA, 5), 50, steps, settings(), checkpoint=path, identity=identity)


def test_a_checkpoint_of_other_data_or_settings_is_refused(tmp_path):
    checkpoint, line = tmp_path / "run.checkpoint", Line()
    interrupted(checkpoint)
    content = checkpoint.read_bytes()
    for other in ("other images", ""):
        with pytest.raises(TrainingError, match=r"run\.checkpoint.*other images or settings.*--resume"):
            optimise(line, line.loss_on(DATA), 50, 10, settings(), checkpoint=checkpoint, identity=other)
    assert not line.w.any()  # nothing of it was taken over
    assert checkpoint.read_bytes() == content  # and it is still there for those it belongs to
    whole, resumed = Line(), Line()
    optimise(whole, whole.loss_on(DATA), 50, 10, settings())
    optimise(resumed, resumed.loss_on(DATA), 50, 10, settings(), checkpoint=checkpoint, identity="these images")
    assert torch.equal(resumed.w, whole.w)


def test_two_trainings_do_not_write_one_checkpoint(tmp_path, holder):
    checkpoint, line = tmp_path / "run.checkpoint", Line()
    interrupted(checkpoint)
    content, other = checkpoint.read_bytes(), holder(checkpoint)
    with pytest.raises(InUseError, match=rf"run\.checkpoint: .*process {other.pid} "):
        optimise(line, line.loss_on(DATA), 50, 10, settings(), checkpoint=checkpoint, identity="these images")
    assert checkpoint.read_bytes() == content and not line.w.any()


@pytest.mark.parametrize(
    "kind", ["empty", "no safetensors", "cut off", "other names", "other shapes", "no step", "no history", "odd names"]
)
def test_a_damaged_checkpoint_is_named(tmp_path, kind):
    checkpoint, line = tmp_path / "run.checkpoint", Line()
    interrupted(checkpoint)
    tensors, content = load_file(checkpoint), checkpoint.read_bytes()
    with safe_open(checkpoint, "pt") as file:
        metadata = file.metadata()
    if kind == "empty":
        checkpoint.write_bytes(b"")
    elif kind == "no safetensors":
        checkpoint.write_bytes(b"half of it")
    elif kind == "cut off":
        checkpoint.write_bytes(content[:-5])
    else:
        if kind == "other names":
            tensors["module.v"] = tensors.pop("module.w")
        elif kind == "other shapes":
            tensors["module.w"] = torch.zeros(5)
        elif kind == "odd names":
            tensors["optimiser.w.exp_avg"] = tensors.pop("optimiser.0.exp_avg")
        elif kind == "no step":
            del metadata["step"]
        else:
            metadata["history"] = "[{"
        save_file(tensors, checkpoint, metadata)
    with pytest.raises(TrainingError, match=r"run\.checkpoint.*damaged"):
        optimise(line, line.loss_on(DATA), 50, 10, settings(), checkpoint=checkpoint, identity="these images")


def test_a_loss_that_is_not_finite_stops_training_with_advice():
    line = Line()
    steps = itertools.count()

    def loss(rows: Tensor, rng: Generator) -> dict[str, Tensor]:
        factor = float("nan") if next(steps) == 3 else 1.0
        return {"loss": (line.w - 1).square().sum() * factor}

    with pytest.raises(TrainingError, match=r"step 3.*training\.learning_rate"):
        optimise(line, loss, 50, 10, settings())
    assert line.w.isfinite().all()


def test_no_steps_change_nothing():
    line = Line()
    assert optimise(line, line.loss_on(DATA), 50, 0, settings()) == []
    assert not line.w.any()


@pytest.mark.parametrize("steps", [10, 37, 400])
def test_learning_rate_rises_over_a_tenth_and_falls_to_a_hundredth(steps):
    rates = np.array([learning_rate(step, steps, 2.0) for step in range(steps)])
    warm = steps // 10
    assert rates.max() == pytest.approx(2.0)
    np.testing.assert_allclose(rates[:warm], 2.0 * np.arange(1, warm + 1) / warm)
    assert (np.diff(rates[warm:]) < 0).all()
    assert rates.min() > 0 and 0.02 <= rates[-1] < 0.02 + 5 * 2.0 / steps
    middle = warm + (steps - warm) / 2
    assert learning_rate(int(middle), steps, 2.0) == pytest.approx(1.01, abs=4 / steps)


def test_one_step_has_a_learning_rate_too():
    assert learning_rate(0, 1, 2.0) == 2.0


def test_randomness_is_a_function_of_seed_step_and_stream():
    def numbers(seed: int, step: int, stream: int = 0) -> list[float]:
        return torch.rand(3, generator=step_rng(seed, step, stream)).tolist()

    drawn = [numbers(seed, step, stream) for seed in (0, 1, 2**32 - 1) for step in range(50) for stream in (0, 1, 500)]
    assert len({tuple(d) for d in drawn}) == 450
    assert numbers(3, 7) == numbers(3, 7, 0)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, True), ({"bf16": True}, True), ({"avx2": True, "avx512_bf16": False}, False)],
)
def test_bfloat16_is_used_where_the_processor_has_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert uses_bfloat16(Training()) == expected
    assert uses_bfloat16(Training(precision="bfloat16")) and not uses_bfloat16(Training(precision="float32"))


@pytest.mark.parametrize("method", ["uranet", "mfrnet", "memae"])
def test_weights_decay_and_biases_norms_and_deviations_do_not(tiny, method):
    """Decay of log-deviations would pull the deviations of Bayesian weights towards 1."""
    network = create(tiny(method), Weights.RANDOM)
    decaying, fixed = decay_groups(network, 0.3)
    assert (decaying["weight_decay"], fixed["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in network.named_parameters() if parameter.requires_grad}
    groups = [{names[id(parameter)] for parameter in group["params"]} for group in (decaying, fixed)]
    assert groups[0] | groups[1] == set(names.values()) and not groups[0] & groups[1]
    deviations = {name for name in names.values() if name.endswith("log_deviation")}
    flat = {name for name in names.values() if network.get_parameter(name).ndim == 1}
    assert groups[1] == deviations | flat and bool(deviations) == (method == "uranet")
    assert not [name for name in groups[0] if name.endswith("bias")]


def test_decay_leaves_what_does_not_decay_where_it_is():
    """Without any gradient but that of decay: weights shrink, biases and log-deviations stay."""

    class Still(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bayesian, self.norm = BayesianConv2d(2, 3, 3, 2, 0.1), nn.LayerNorm(4)
            nn.init.ones_(self.bayesian.bias)

    module = Still()
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    def loss(rows, rng):
        return {"loss": sum((p * 0).sum() for p in module.parameters())}

    optimise(module, loss, 4, 20, Training(batch=2, learning_rate=0.1, weight_decay=0.5))
    changed = {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"bayesian.weight"}
