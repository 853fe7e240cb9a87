"""The commands of the README work, on a small data set and with a short training."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from tests.conftest import SIDE, make_parts
from typer.testing import CliRunner

import unflaw
from unflaw.cli import app

pytestmark = pytest.mark.slow

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
SHORT = {"preparation.size": SIDE, "features.grid": 8, "training.steps": 4, "training.display_steps": 2}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A folder that holds what the README's examples name."""
    make_parts(tmp_path / "parts")
    shutil.copytree(tmp_path / "parts/train/good", tmp_path / "parts/good")
    shutil.copytree(tmp_path / "parts/test/square", tmp_path / "parts/new")
    shutil.copy(tmp_path / "parts/new/000.png", tmp_path / "parts/new/0001.png")
    shutil.copy(tmp_path / "parts/new/000.png", tmp_path / "0001.png")
    shutil.copytree(tmp_path / "parts/test/good", tmp_path / "parts/today")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_commands(bench):
    fenced = README.split("```")[1::2]
    commands = [line for block in fenced for line in block.splitlines() if line.startswith("unflaw ")]
    assert [shlex.split(line)[1] for line in commands] == [
        *("train", "predict", "serve", "evaluate", "figures", "calibrate", "export", "verify", "bench", "info"),
    ]
    for line in commands:
        arguments = shlex.split(line, comments=True)[1:]
        if arguments[0] == "serve":  # until it is stopped: tests/test_station_cli.py does that
            continue
        if arguments[0] == "bench":
            arguments += ["--rounds", "1"]
        if arguments[0] == "train":
            arguments += [part for name, value in SHORT.items() for part in ("--set", f"{name}={value}")]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{line}\n{result.output}"
    assert len((bench / "results/results.jsonl").read_text().splitlines()) == 6
    assert (bench / "parts.html").is_file() and (bench / "parts.json").is_file()
    assert (bench / "figures/perception.png").is_file()


def test_the_python_example(bench, monkeypatch):
    (example,) = re.findall(r"^```python\n(.*?)^```", README, flags=re.M | re.S)
    settings = {name.replace(".", "__"): value for name, value in SHORT.items()}
    whole = unflaw.Detector
    monkeypatch.setattr(unflaw, "Detector", lambda **given: whole(**settings, **given), raising=False)
    names: dict = {}
    exec(example, names)
    result = names["result"]
    assert result.uncertainty.shape == result.map.shape == (SIDE, SIDE)
    assert result.verdict in ("good", "defect") and 0 < result.p_value <= 1 and isinstance(result.regions, tuple)
    assert unflaw.load(str(bench / "parts.safetensors")).calibration_ == names["detector"].calibration_
