import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests.conftest import TINY, TINY_URANET
from tests.parallel import group_of_two
from torch import Tensor
from typer.testing import CliRunner

from unflaw.cli import app
from unflaw.config import Training
from unflaw.detector import Detector
from unflaw.errors import TrainingError
from unflaw.io.files import steps_of
from unflaw.parallel import launch as launching
from unflaw.parallel.launch import FAILURE_FOLDER, launch, launched
from unflaw.parallel.process_group import SINGLE_PROCESS
from unflaw.training.loop import optimise

pytestmark = pytest.mark.slow

pytest.importorskip("lightning_fabric", reason="needs pip install 'unflaw[distributed]'")


def environment(**more: str) -> dict[str, str]:
    """Of processes that are started by hand, with the path of the tests."""
    kept = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", FAILURE_FOLDER)}
    path = os.pathsep.join([str(Path(__file__).parents[2]), kept.get("PYTHONPATH", "")])
    return kept | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | more


@pytest.fixture(scope="module")
def together(parts: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of each of two processes."""
    out = tmp_path_factory.mktemp("team")
    meeting = {n: v for n, v in launching._environment(2).items() if n in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")}
    command = [sys.executable, group_of_two.__file__, str(parts), str(weights), str(out)]
    team = [subprocess.Popen(command, env=environment(LOCAL_RANK=str(rank), **meeting)) for rank in range(2)]
    try:
        assert [process.wait(240) for process in team] == [0, 0]
    finally:
        for process in team:
            process.kill()
    return [torch.load(out / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def alone(parts: Path, weights: Path) -> dict[str, Any]:
    return group_of_two.everything(SINGLE_PROCESS, parts, weights)


def apart(found: Any, expected: Any) -> float:
    """The largest difference of two results with the same entries."""
    assert found.keys() == expected.keys()
    differences = [0.0]
    for name, value in expected.items():
        if isinstance(value, Tensor) or (value and isinstance(value[0], list)):
            one, other = (torch.as_tensor(v).double() for v in (found[name], value))
            assert one.shape == other.shape
            differences.append(float((one - other).abs().max()))
        else:
            assert found[name] == value
    return max(differences)


def test_every_process_ends_with_the_same(together):
    assert together[0].keys() == together[1].keys()
    for name in together[0]:
        if name != "failure":
            assert apart(together[0][name], together[1][name]) == 0, name


def parameters_only(found: dict[str, Any]) -> dict[str, Any]:
    """Without running statistics: those of two processes are those of the first one's parts."""
    return {name: value for name, value in found.items() if "running_" not in name and "num_batches" not in name}


@pytest.mark.parametrize("kind", ["loop", "loop, four parts", "loop, normalised"])
def test_two_processes_learn_what_one_does_in_two_passes(together, alone, kind):
    """In double precision, with noise, quotients of sums, and batch normalisation of each part.

    A bias before a normalisation has rounding for a gradient, which the optimiser scales up.
    """
    found, expected = (parameters_only(each[kind]) for each in (together[0], alone))
    assert apart(found, expected) < (1e-8 if "normalised" in kind else 1e-10)


def test_the_cache_is_the_same_to_the_bit(together, alone):
    assert apart(together[0]["cache"], alone["cache"]) == 0
    assert len(alone["cache"]["skipped"]) == 1  # an image that is not there shifts nothing
    assert apart(together[0]["cache, tiles"], alone["cache, tiles"]) < 2e-3  # other batches: float16 rounds otherwise


@pytest.mark.parametrize("method", ["uranet", "mfrnet", "draem", "memae"])
def test_gradients_of_a_step_are_those_of_the_same_parts_in_one_process(together, alone, method):
    """In double precision. In single, rounding grows from step to step."""
    found, expected = together[0][f"{method}, gradients"], alone[f"{method}, gradients"]
    largest = max(float(value.abs().max()) for value in expected.values())
    assert len(expected) > 15 and apart(found, expected) < 1e-9 * largest


@pytest.mark.parametrize("kind", ["uranet", "mfrnet", "nearest_neighbor", "crossed"])
def test_two_processes_make_the_detector_of_two_passes(together, alone, kind):
    assert apart(together[0][kind], alone[kind]) < 1e-3


@pytest.mark.parametrize("method", ["uranet", "mfrnet", "memae"])
def test_the_metrics_of_a_whole_run_are_those_of_one_process(together, parts, weights, method):
    """One process, one pass: other random draws, and for MemAE batch normalisation over eight images, not four."""
    plain = group_of_two.fitted(SINGLE_PROCESS, method, parts, weights, 1)
    assert plain["auroc"] > 0.6 and abs(together[0][method]["auroc"] - plain["auroc"]) < 0.1


def test_what_fails_in_the_first_process_fails_in_all(together):
    assert [found["failure"] for found in together] == ["cannot be read"] * 2


@pytest.mark.parametrize("batch, accumulate", [(2, 3), (7, 2), (1, 2)])
def test_a_batch_that_cannot_be_cut_into_equal_parts_is_refused(batch, accumulate):
    curve = group_of_two.Curve(normalised=True)
    multiple = -(-batch // accumulate) * accumulate
    expected = rf"batch of {batch} .* 1 process in {accumulate} passes .* --set training\.batch={multiple}"
    with pytest.raises(TrainingError, match=expected):
        optimise(curve, lambda *_: pytest.fail("a step was made"), 4, 1, Training(batch=batch, accumulate=accumulate))


def test_a_group_of_one_has_nobody_to_wait_for():
    one = SINGLE_PROCESS
    one.barrier()
    assert one.is_main and one.all_gather(3) == [3] and one.broadcast("x") == "x" and one.on_main(lambda: 4) == 4


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rank_of(pid: int) -> str:
    found = re.search(rb"LOCAL_RANK=(\d)", Path(f"/proc/{pid}/environ").read_bytes())
    return found[1].decode() if found else ""


def tiny_command(parts: Path, weights: Path, out: Path, *more: str) -> list[str]:
    settings = TINY | TINY_URANET | {"training.steps": 120, "training.batch": 8}
    changes = [f"{name}={str(value).replace('(', '[').replace(')', ']')}" for name, value in settings.items()]
    options = [part for change in changes for part in ("--set", change)]
    command = ["train", "--data", str(parts), "--weights", str(weights), "--out", str(out), "--precision", "32-true"]
    command += [*options, *more]
    return [sys.executable, "-m", "unflaw", *command]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds processes in /proc")
def test_a_process_that_is_killed_ends_the_run_which_then_goes_on(parts, weights, tmp_path):
    out = tmp_path / "parts.safetensors"
    alone = ("--set", "training.checkpoint_seconds=0")
    run = subprocess.Popen(
        tiny_command(parts, weights, out, *alone, "--devices", "2"),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    checkpoint = out.with_name(out.name + ".checkpoint")
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        assert run.poll() is None
        time.sleep(0.05)
    ranks = {rank_of(pid): pid for pid in children(run.pid)}
    os.kill(ranks["1"], signal.SIGKILL)
    _, said = run.communicate(timeout=20)
    assert run.returncode == 2
    assert said.strip() == "error: process 2 of 2 was ended by signal 9 (SIGKILL); perhaps memory ran out; train again"
    with safe_open(checkpoint, "pt") as file:
        reached = int(file.metadata()["step"])
    assert not out.exists() and not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())
    again = CliRunner().invoke(app, [*tiny_command(parts, weights, out, *alone, "--resume")[3:]])
    assert again.exit_code == 0, again.output  # the checkpoint of two serves one
    assert reached < 120
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert all(tensor.isfinite().all() for tensor in load_file(out).values())


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds processes in /proc")
def test_ctrl_c_stops_all_processes_after_the_same_step(parts, weights, tmp_path):
    out, rare = tmp_path / "parts.safetensors", ("--set", "training.steps=400")
    alone = ("--set", "training.checkpoint_seconds=0", *rare, "--devices", "2")
    hears = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from unflaw.cli import main; main()"
    )
    command = [sys.executable, "-c", hears, *tiny_command(parts, weights, out, *alone)[3:]]
    run = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    checkpoint = out.with_name(out.name + ".checkpoint")
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and time.monotonic() < deadline:
        assert run.poll() is None
        time.sleep(0.05)
    team = children(run.pid)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130 and len(team) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in team)
    _, reached = steps_of(checkpoint)
    assert said == f"stopped at {reached}; the same command with --resume continues from there\n"
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]


def test_options_are_settings(parts, weights, tmp_path):
    out = tmp_path / "x.safetensors"
    options = ("--accumulate", "2", "--precision", "bf16-mixed", "--set", "training.steps=1")
    assert CliRunner().invoke(app, tiny_command(parts, weights, out, *options)[3:]).exit_code == 0
    config = Detector.load(out).config.training
    assert (config.accumulate, config.precision, config.steps) == (2, "bfloat16", 1)


@pytest.mark.parametrize("option, known", [("--accelerator", "auto, cpu, gpu"), ("--strategy", "auto, ddp")])
def test_unknown_options_are_named(parts, weights, tmp_path, option, known):
    done = CliRunner().invoke(app, tiny_command(parts, weights, tmp_path / "x.safetensors", option, "tpu")[3:])
    assert done.exit_code == 2 and f"{option} tpu is unknown; choose one of {known}" in done.output


def test_an_error_is_said_once(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(launching, "PATIENCE", 30.0)  # so that both fail for themselves
    for name in ("LOCAL_RANK", FAILURE_FOLDER):
        monkeypatch.delenv(name, raising=False)
    assert launch(["info", str(tmp_path / "none.safetensors")], 2) == 2
    said = capfd.readouterr()
    assert not said.out and said.err.startswith("error: ") and said.err.count("none.safetensors: there is no") == 1


def test_words_of_processes_are_weighed(tmp_path, monkeypatch):
    """A killed process explains all; else what is meant for the user; else the first fault; else the last lines."""
    (tmp_path / "1.log").write_text("cannot import\nname")
    assert launching._reason([None, 3], tmp_path) == "process 2 of 2 ended with exit code 3\ncannot import\nname"
    monkeypatch.setenv(FAILURE_FOLDER, str(tmp_path))
    for rank, error, expected in ((0, RuntimeError("peer is gone"), False), (1, OSError("disk is full"), False)):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert launching.report_failure(error, expected)
    assert "process 1 of 2 failed:\nRuntimeError: peer is gone" in launching._reason([2, 2], tmp_path)
    assert launching.report_failure(ValueError("no images"), True)
    assert launching._reason([2, 2], tmp_path) == "no images"
    assert "process 1 of 2 was ended by signal 11 (SIGSEGV)" in launching._reason([-11, 2], tmp_path)
    monkeypatch.delenv(FAILURE_FOLDER)
    assert not launching.report_failure(ValueError(), True)


def test_several_nodes_need_a_place_to_meet(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    with pytest.raises(TrainingError, match="--nodes 2 needs MASTER_PORT, NODE_RANK in the environment"):
        launch([], 2, nodes=2)
    monkeypatch.setenv("NODE_RANK", "1")
    assert launching._environment(2, nodes=2)["MASTER_ADDR"] == "10.0.0.1"
    alone = launching._environment(2)  # another training left that behind
    assert (alone["MASTER_ADDR"], alone["NODE_RANK"]) == ("127.0.0.1", "0")


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, False),
        ({"LOCAL_RANK": "0"}, True),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4"}, True),
        ({"SLURM_NTASKS": "4"}, False),
    ],
)
def test_a_process_of_a_team_starts_no_others(monkeypatch, given, expected):
    for name in ("LOCAL_RANK", "SLURM_STEP_ID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert launched() == expected
