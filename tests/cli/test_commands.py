import errno
import inspect
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from tests.conftest import OWN, TINY, TINY_URANET, make_parts
from typer.testing import CliRunner, Result

from unflaw import __version__
from unflaw.cli import app, common
from unflaw.detector import Detector
from unflaw.io.detector_file import read_metadata
from unflaw.io.files import steps_of
from unflaw.training import loop as training

pytestmark = pytest.mark.slow


def unflaw(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def settings(changes: dict) -> list[str]:
    return [part for name, value in changes.items() for part in ("--set", f"{name}={json.dumps(value)}")]


@pytest.fixture(scope="module")
def tiny_training(parts, weights) -> list[object]:
    """Arguments of a quick `unflaw train`, but for --out."""
    return ["train", "--data", parts, "--weights", weights, *settings(TINY | TINY_URANET)]


@pytest.fixture(scope="module")
def model(tiny_training, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "models" / "parts.safetensors"  # the folder is not there yet
    done = unflaw(*tiny_training, "--out", path)
    assert done.exit_code == 0, done.output
    assert str(path) in done.stdout and "false-alarm rate" in done.stdout
    assert [p.name for p in path.parent.iterdir()] == ["parts.safetensors"]  # no checkpoint is left
    return path


# What is quick stays quick


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["predict", "--help"],
        ["info", "MODEL"],
        ["train"],
        ["info", "no"],
    ],
)
def test_without_work_torch_is_not_imported(arguments, saved):
    arguments = [str(saved) if argument == "MODEL" else argument for argument in arguments]
    code = (
        "import sys\nfrom unflaw.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print({'torch', 'timm', 'sklearn', 'skimage', 'matplotlib'} & set(sys.modules))"
    )
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.splitlines()[-1] == "set()"
    assert (done.stdout + done.stderr).count("\n") > 1  # it said something


def test_help_names_every_command_with_an_example():
    text = unflaw("--help").stdout
    for command in ("train", "evaluate", "predict", "info", "figures", "ablate", "demo"):
        assert command in text
        assert unflaw(command, "--help").exit_code == 0
    assert "Example" in text
    assert unflaw().exit_code == 2 or "Usage" in unflaw().output


def test_the_version():
    assert unflaw("--version").stdout == f"unflaw {__version__}\n"


def test_the_command_is_installed():
    done = subprocess.run(
        [Path(sys.executable).parent / "unflaw", "--help"], capture_output=True, text=True, check=True
    )
    assert "train" in done.stdout


# The way of a user


def test_what_train_writes_is_what_was_asked(model, detector):
    """The same settings through the command line and through Python: the same detector."""
    assert read_metadata(model)["config"] == detector.config.model_dump(mode="json")
    state = {f"network.{name}": tensor for name, tensor in detector.network.state_dict().items()}
    written = load_file(model)
    assert all(torch.equal(tensor, written[name]) for name, tensor in state.items())


def test_info_describes(model):
    done = unflaw("info", model)
    assert done.exit_code == 0
    assert "MB" in done.stdout and "false-alarm rate" in done.stdout
    described = json.loads(done.stdout[done.stdout.index("{") :])
    assert described["config"]["features"]["backbone"] == "resnet18"
    assert described["record"]["good_images"] == 12


def test_evaluate_measures_and_reports(model, parts, tmp_path):
    metrics, report = tmp_path / "deep/metrics.json", tmp_path / "deep/report.html"
    done = unflaw("evaluate", model, "--data", parts, "--json", metrics, "--report", report)
    assert done.exit_code == 0, done.output
    written = json.loads(metrics.read_text())
    assert f"image_auroc {written['image_auroc']:.4f}" in done.stdout
    assert f"aupro_30 {written['aupro_30']:.4f}" in done.stdout
    assert "8 images" in done.stdout
    page = report.read_text("utf-8")
    assert page.count("<article") == 8 and "</html>" in page and "parts" in page


def test_predict_goes_on_after_a_broken_file(model, parts, tmp_path):
    broken = tmp_path / "gebrochen_ä.png"
    broken.write_bytes(b"no image")
    out = tmp_path / "results"
    first = parts / "test/square/000.png"
    done = unflaw("predict", model, first, broken, parts / "test/good", "--out", out, "--images")
    assert done.exit_code == 3
    assert re.search(r"\b1 not readable", done.stdout) and str(out) in done.stdout
    assert "skipped" in done.stderr and "gebrochen_ä.png" in done.stderr
    assert unflaw("predict", model, first, broken, "--out", tmp_path / "two", "--exit-code").exit_code == 4
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text("utf-8").splitlines()]
    expected = [first, broken, *sorted((parts / "test/good").iterdir())]
    assert [line["path"] for line in lines] == [str(path) for path in expected]
    assert "gebrochen_ä.png" in lines[1]["error"] and "score" not in lines[1]
    assert lines[0]["verdict"] == "defect" and lines[0]["regions"]
    for line in (lines[0], *lines[2:]):
        assert {"score", "p_value", "verdict", "regions", "image"} <= line.keys()
        assert (out / line["image"]).is_file()
    assert len(list((out / "images").iterdir())) == 5


@pytest.mark.parametrize(
    "name", ["件" * 83 + ".png", "line\nbreak.png", os.fsdecode(b"not utf-8 \xff.png")], ids=["long", "lines", "bytes"]
)
def test_predict_takes_any_name_that_a_file_can_have(model, parts, tmp_path, name):
    path, content = tmp_path / name, (parts / "test/good/000.png").read_bytes()
    try:
        path.write_bytes(content)
    except OSError:
        pytest.skip("this file system has other rules for names")
    done = unflaw("predict", model, path, parts / "test/good/000.png", "--out", tmp_path / "results", "--images")
    assert done.exit_code == 0, (done.output, done.exception)
    lines = [json.loads(line) for line in (tmp_path / "results/results.jsonl").read_bytes().splitlines()]
    assert len(lines) == 2 and lines[0]["score"] == pytest.approx(lines[1]["score"], rel=1e-5)
    assert all((tmp_path / "results" / line["image"]).is_file() for line in lines)


def test_predict_without_images_or_mistakes(model, parts, tmp_path):
    out = tmp_path / "new/results"
    done = unflaw("predict", model, parts / "test/good", "--out", out)
    assert done.exit_code == 0
    assert sorted(p.name for p in out.iterdir()) == ["drift.json", "results.jsonl"]
    assert len((out / "results.jsonl").read_text().splitlines()) == 4


def test_options_and_settings_reach_the_configuration(parts, weights, tmp_path):
    out = tmp_path / "nearest_neighbor.safetensors"
    arguments = ["--method", "nearest_neighbor", "--backbone", "resnet18", "--weights", weights, "--levels", "2,3"]
    arguments += ["--size", 48, "--fit", "pad", "--seed", 3, "--rate", 0.25]
    network = {"network.prototypes": 20, "network.regional_prototypes": 10}
    arguments += settings({**network, "features.grid": 6, "training.display_steps": 0})
    arguments += ["--set", "features.standardise=channel"]  # no JSON: taken as it stands
    done = unflaw("train", "--data", parts, "--out", out, *arguments)
    assert done.exit_code == 0, done.output
    config = read_metadata(out)["config"]
    assert config["features"] | {"levels": [2, 3], "grid": 6, "standardise": "channel"} == config["features"]
    assert config["preparation"] | {"size": 48, "fit": "pad"} == config["preparation"]
    assert (config["training"]["seed"], config["calibration"]["false_alarm_rate"]) == (3, 0.25)
    assert config["network"] == {"method": "nearest_neighbor", "prototypes": 20, "regional_prototypes": 10}


@pytest.mark.parametrize("method", ["mfrnet", "draem", "memae"])
def test_every_method_goes_the_same_way(parts, weights, tmp_path, method):
    model, out = tmp_path / "m.safetensors", tmp_path / "results"
    short = settings(TINY | OWN[method] | {"training.steps": 2})
    done = unflaw("train", "--data", parts, "--method", method, "--weights", weights, *short, "--out", model)
    assert done.exit_code == 0, done.output
    assert f'"method": "{method}"' in unflaw("info", model).stdout
    done = unflaw("evaluate", model, "--data", parts, "--json", tmp_path / "m.json", "--report", tmp_path / "m.html")
    assert done.exit_code == 0 and json.loads((tmp_path / "m.json").read_text())["pixel_auroc"] is not None
    assert (tmp_path / "m.html").read_text("utf-8").count("Restored") > 0
    done = unflaw("predict", model, parts / "test/good", "--out", out, "--images")
    assert done.exit_code == 0 and len(list((out / "images").iterdir())) == 4


@pytest.mark.parametrize(
    "method, setting, named",
    [
        ("mfrnet", "network.k=[9]", "network.k"),
        ("mfrnet", "network.n=1", "network.n"),
        ("mfrnet", "network.patch=3", "patches of 3"),
        ("mfrnet", "features.grid=9", "grid of 9"),
        ("draem", "preparation.size=100", "side of 100 pixels"),
        ("draem", "training.textures=nowhere", "nowhere"),
        ("memae", "network.side=100000", "network.side"),
        ("memae", "network.side=4000", "preparation.size"),
        ("memae", "network.shrinkage=5", "network.shrinkage"),
    ],
)
def test_settings_that_a_method_cannot_work_with_are_named(parts, weights, tmp_path, method, setting, named):
    base = settings(TINY | OWN[method])
    if setting.endswith("4000"):
        base += ["--set", "preparation.size=60"]
    arguments = ["--method", method, "--weights", weights, *base, "--set", setting]
    assert named in complaint(unflaw("train", "--data", parts, "--out", tmp_path / "m.safetensors", *arguments))


def test_an_interrupted_training_goes_on_with_resume(model, tiny_training, tmp_path, monkeypatch):
    out = tmp_path / "parts.safetensors"
    save, saves = training._checkpoint, []

    def interrupted(*arguments: object) -> None:
        save(*arguments)
        saves.append(arguments[3])
        if len(saves) == 4:
            raise KeyboardInterrupt

    arguments = [*tiny_training, "--set", "training.checkpoint_seconds=0", "--out", out]
    monkeypatch.setattr(training, "_checkpoint", interrupted)
    assert unflaw(*arguments).exit_code != 0
    assert not out.exists() and (tmp_path / "parts.safetensors.checkpoint").is_file()
    resumed = unflaw(*arguments, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert saves[4] == saves[3] + 1  # it went on where it was
    assert [p.name for p in tmp_path.iterdir()] == ["parts.safetensors"]
    expected = load_file(model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(out).items())


HEARS = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from unflaw.cli import main; main()"


def started(*arguments: object, **options: object) -> subprocess.Popen[str]:
    """A command as a process of its own, which hears Ctrl-C also where the tests run in the background."""
    command = [sys.executable, "-c", HEARS, *map(str, arguments)]
    return subprocess.Popen(command, text=True, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    """Until there is something in a file that a command writes."""
    deadline = time.monotonic() + 120
    while not (path.exists() and path.stat().st_size) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_ctrl_c_says_where_training_stopped_and_resume_where_it_goes_on(tiny_training, tmp_path):
    out, steps = tmp_path / "parts.safetensors", ["--set", "training.steps=100"]
    checkpoint = out.with_name(out.name + ".checkpoint")
    run = started(*tiny_training, *steps, "--set", "training.checkpoint_seconds=0", "--out", out)
    wait_for(checkpoint, run)
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=60)
    assert run.returncode == 130 and said[0] == ""
    found = re.fullmatch(
        r"stopped at step (\d+) of 100; the same command with --resume continues from there\n", said[1]
    )
    assert found and steps_of(checkpoint) == (int(found[1]), f"step {found[1]} of 100")
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]
    arguments = [*tiny_training, *steps, "--set", "training.checkpoint_seconds=0", "--out", out]
    resumed = unflaw(*arguments, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert (
        f"note: {checkpoint}: holds step {found[1]} of 100, from which the same training continues\n" in resumed.stderr
    )
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_ctrl_c_before_the_first_step_leaves_nothing_to_resume(tiny_training, tmp_path, monkeypatch, ctrl_c):
    out = tmp_path / "parts.safetensors"
    monkeypatch.setattr(Detector, "fit", lambda *_, **__: ctrl_c())
    done = unflaw(*tiny_training, "--out", out)
    assert done.exit_code == 130
    assert done.stderr == "stopped before a step was saved; the same command starts over\n"
    line = complaint(unflaw(*tiny_training, "--out", out, "--resume"))
    assert line == f"error: {out}.checkpoint: there is no such checkpoint; leave --resume out"
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_says_how_many_images_were_inspected(model, parts, tmp_path):
    out, many = tmp_path / "out", tmp_path / "many"
    many.mkdir()
    for i in range(400):
        (many / f"{i:03d}.png").symlink_to(parts / "test/good/000.png")
    run = started("predict", model, many, "--out", out)
    wait_for(out / "results.jsonl.part", run)
    run.send_signal(signal.SIGINT)
    said = run.communicate(timeout=60)
    assert run.returncode == 130 and said[0] == ""
    found = re.fullmatch(
        r"stopped after (\d+) images?, whose lines? (is|are) in (.*); the same command starts over\n", said[1]
    )
    assert found and found[3] == f"{out / 'results.jsonl.part'}"
    lines = (out / "results.jsonl.part").read_text().splitlines()
    assert (
        0 <= len(lines) - int(found[1]) <= 1 and len(lines) < 400 and all(json.loads(line)["score"] for line in lines)
    )
    assert [path.name for path in out.iterdir()] == ["results.jsonl.part"]


@pytest.mark.parametrize(
    "command, where, says",
    [
        (
            "evaluate MODEL --data PARTS",
            "unflaw.evaluation.evaluate.evaluate_all",
            "stopped; the same command starts over",
        ),
        (
            "calibrate MODEL --good PARTS/test/good --out c.safetensors",
            "unflaw.detector.Detector.calibrate",
            "stopped; ",
        ),
        ("info MODEL", "unflaw.io.detector_file.read_metadata", "stopped; the same command starts over"),
        ("demo --out out", "unflaw.detector.Detector.fit", "stopped; the same command starts over"),
        (
            "ablate --data PARTS --weights WEIGHTS --only full --out out",
            "unflaw.experiments.run._in_own_process",
            "stopped; 0 finished runs stay in out/runs.jsonl, and the same command goes on with the others",
        ),
        (
            "benchmark --data PARTS --method nearest_neighbor --backbone resnet18=WEIGHTS --out out",
            "unflaw.experiments.run._in_own_process",
            "stopped; 0 finished runs stay in out/runs.jsonl, and the same command goes on with the others",
        ),
        (
            "fleet PARTS/.. --weights WEIGHTS --backbone resnet18 --workers 1 --out out",
            "unflaw.experiments.per_category.ProcessWorker.train",
            "stopped; finished detectors stay in out, and the same command goes on with the others",
        ),
        (
            "predict MODEL --engine ray --input PARTS --output out",
            "unflaw.scale.predict",
            "stopped; finished partitions stay in out, and the same command goes on with the others",
        ),
    ],
)
def test_ctrl_c_says_of_every_command_what_it_leaves(
    model, parts, weights, tmp_path, monkeypatch, command, where, says
):
    def pressed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    for name, few in (("N_TRAIN", 8), ("N_VALIDATION", 1), ("N_GOOD", 1), ("N_PER_DEFECT", 1)):
        monkeypatch.setattr(f"unflaw.datasets.synthetic.{name}", few)
    monkeypatch.setattr(where, pressed)
    names = {"MODEL": model, "PARTS": parts, "WEIGHTS": weights}
    words = [re.sub("|".join(names), lambda found: str(names[found[0]]), word) for word in command.split()]
    done = unflaw(*words, *(settings(TINY | TINY_URANET) if words[0] == "ablate" else []))
    assert done.exit_code == 130 and done.stderr.startswith(says) and done.stderr.count("\n") == 1, done.output


# A reader that goes


@pytest.mark.parametrize("command", ["info MODEL", "datasets", "ablate --list", "--version"])
def test_a_command_whose_reader_has_gone_ends_without_a_word(model, command):
    reading, writing = os.pipe()
    os.close(reading)
    run = started(*command.replace("MODEL", str(model)).split(), stdout=writing)
    os.close(writing)
    assert run.communicate(timeout=60)[1] == "" and run.returncode == 128 + signal.SIGPIPE


def test_all_is_written_before_the_first_word_that_finds_no_reader(model, parts, tmp_path, monkeypatch):
    def gone(*_: object, **__: object) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    monkeypatch.setattr(typer, "echo", gone)
    out = tmp_path / "out"
    options = ["--group-by", "folder", "--labelme", "--coco", out / "coco.json"]
    assert unflaw("predict", model, parts / "test", "--out", out, *options).exit_code == 1
    written = {"coco.json", "drift.json", "labelme", "parts.jsonl", "results.jsonl"}
    assert {path.name for path in out.iterdir()} == written


def test_a_watcher_whose_reader_has_gone_files_what_it_has_begun(model, parts, tmp_path, monkeypatch):
    said: list[object] = []

    def gone(line: object, **_: object) -> None:
        said.append(line)
        if len(said) > 1:  # the first one tells what is watched
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    camera, out = tmp_path / "camera", tmp_path / "sorted"
    shutil.copytree(parts / "test/good", camera)
    words = ["watch", camera, "--model", model, "--out", out, "--store", tmp_path / "store", "--settle", 0, "--once"]
    for name in ("SIGINT", "SIGTERM"):  # which it takes for itself
        monkeypatch.setattr(signal, name, signal.SIGUSR1)
    monkeypatch.setattr(typer, "echo", gone)
    assert unflaw(*words).exit_code == 1
    assert (len(list(out.rglob("*.png"))), len(list(camera.iterdir()))) == (1, 3)


def test_another_pipe_that_breaks_is_an_error_like_others(capfd):
    with pytest.raises(typer.Exit), common.errors():
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
    assert "Broken pipe" in capfd.readouterr().err


# Without a terminal


def test_a_service_without_standard_error_has_no_progress(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with common.progress_bars() as progress:
        progress("training", 1, 2, 0.5)


def test_progress_is_a_line_now_and_then(capfd, monkeypatch):
    with common.progress_bars() as progress:
        for i in range(100):
            progress("training", i, 100, 0.5)
    assert capfd.readouterr().err == ""  # it took no time
    clock = iter(range(0, 100_000, 10))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with common.progress_bars(every=30) as progress:
        for i in range(7):
            progress("training", i, 40, 0.5)
        progress("calibration", 1, 1, None)
        for i in (2, 0, 1, 2, 3, 4):  # another run
            progress("training", i, 40, None)
    assert capfd.readouterr().err.splitlines() == [
        "training: 2 of 40, loss 0.5000, about 6 min left",
        "training: 5 of 40, loss 0.5000, about 6 min left",
        "training: 2 of 40",
        "training: 2 of 40, about 6 min left",
    ]
    with common.progress_bars(shown=False, every=0) as progress:
        progress("training", 1, 2, None)
    assert capfd.readouterr().err == ""


def test_without_resume_an_old_checkpoint_is_forgotten(model, tiny_training, tmp_path):
    out = tmp_path / "parts.safetensors"
    out.with_name(out.name + ".checkpoint").write_bytes(b"of another time")
    assert unflaw(*tiny_training, "--out", out).exit_code == 0
    expected = load_file(model)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(out).items())


@pytest.mark.parametrize("kind", ["damaged", "of other settings"])
def test_a_checkpoint_that_does_not_fit_is_named(tiny_training, tmp_path, monkeypatch, kind):
    out = tmp_path / "parts.safetensors"
    checkpoint = out.with_name(out.name + ".checkpoint")
    if kind == "damaged":
        checkpoint.write_bytes(b"half of it")
    else:
        metadata = {"identity": "of other settings", "step": "3", "history": "[]"}
        save_file({"module.restoration.narrow.bias": torch.zeros(24)}, checkpoint, metadata)
    assert checkpoint.name in complaint(unflaw(*tiny_training, "--out", out, "--resume"))


def test_broken_training_images_are_reported(tiny_training, parts, tmp_path):
    root = make_parts(tmp_path / "parts", bad=1)
    (root / "train/good/000.png").write_bytes(b"no image")
    arguments = [root if argument == parts else argument for argument in tiny_training]
    done = unflaw(*arguments, "--set", "training.steps=1", "--out", tmp_path / "m.safetensors")
    assert done.exit_code == 0
    assert "skipped" in done.stderr and "000.png" in done.stderr


# What a user can mend is one line


def complaint(done: Result) -> str:
    """The one line that says what is wrong."""
    assert done.exit_code == 2, (done.output, done.exception)
    assert "Traceback" not in done.output
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("note: ")]
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--data", "nowhere"], "nowhere"),
        (["--method", "uranett"], "uranett"),
        (["--profile", "gpu"], "gpu"),
        (["--set", "training.stepps=3"], "training.stepps"),
        (["--set", "training.steps=many"], "training.steps"),
        (["--set", "features.backbone.depth=3", "--backbone", "resnet18"], "features.backbone"),
        (["--set", "network.restoration.heads=5"], "heads"),
        (["--set", "network.restoration.patch=3"], "patches of 3"),
        (["--set", "training.seed=100000000000000000000"], "training.seed"),
        (["--set", "features.grid=1"], "features.grid"),
        (["--set", "calibration.holdout=0.97"], "holdout"),
        (["--rate", "2"], "false_alarm_rate"),
        (["--size", "5"], "preparation.size"),
        (["--fit", "crop"], "preparation.fit"),
        (["--seed", "-1"], "training.seed"),
        (["--levels", "1,9"], "levels"),
        (["--levels", "2,2"], "levels"),
        (["--backbone", "resnet18x"], "resnet18x"),
        (["--weights", "nothing.pth"], "nothing.pth"),
        (["--weights", "README.md"], "README.md"),
        (["--weights", "./random"], "random: no such weight file"),
        (["--textures", "nowhere"], "nowhere"),
        (["--textures", "empty"], "empty"),
        (["--textures", "empty", "--method", "nearest_neighbor"], "leave --textures out"),
        (["--out", "empty"], "empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_train_names_what_is_wrong(parts, weights, tmp_path, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("README.md").write_text("no weights")
    options = {"--size": "preparation.size", "--levels": "features.levels", "--backbone": "features.backbone"}
    shadowed = {options[name] for name in options if name in arguments}  # --set would win over them
    own = TINY if "nearest_neighbor" in arguments else TINY | TINY_URANET
    base = settings({name: value for name, value in own.items() if name not in shadowed})
    data = [] if "--data" in arguments else ["--data", parts]
    line = complaint(unflaw("train", *data, "--weights", weights, *base, "--out", "m.safetensors", *arguments))
    assert named in line
    assert not Path("m.safetensors").exists()


@pytest.mark.parametrize("arguments", [["--levels", "a,b"], ["--set", "training.steps"]])
def test_train_explains_options_that_it_cannot_parse(tiny_training, tmp_path, arguments):
    done = unflaw(*tiny_training, "--out", tmp_path / "m.safetensors", *arguments)
    assert done.exit_code == 2 and "Traceback" not in done.output
    assert arguments[0] in done.stderr and arguments[1] in done.stderr


def test_other_commands_name_what_is_wrong(model, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("broken.safetensors").write_bytes(b"no detector")
    save_file({"x": torch.zeros(1)}, "foreign.safetensors")
    for name in ("missing.safetensors", "broken.safetensors", "foreign.safetensors"):
        assert name in complaint(unflaw("info", name))
        assert name in complaint(unflaw("evaluate", name, "--data", parts))
        assert name in complaint(unflaw("predict", name, parts / "test/good", "--out", "results"))
    assert "nowhere" in complaint(unflaw("evaluate", model, "--data", "nowhere"))
    assert "no test images" in complaint(unflaw("evaluate", model, "--data", parts / "train/good"))
    assert "empty" in complaint(unflaw("evaluate", model, "--data", parts, "--json", "empty"))
    assert "empty" in complaint(unflaw("predict", model, "empty", "--out", "results"))


@pytest.mark.parametrize(
    "command, held",
    [
        ("predict MODEL PARTS/test/good --out out", "out"),
        ("figures MODEL --data PARTS --out out", "out"),
        ("train --data PARTS --method nearest_neighbor --weights WEIGHTS --out out/d.safetensors", "out/d.safetensors"),
        ("calibrate MODEL --good PARTS/test/good --out out/d.safetensors", "out/d.safetensors"),
        ("ablate --data PARTS --method nearest_neighbor --weights WEIGHTS --only full --out out", "out/runs.jsonl"),
        ("benchmark --data PARTS --method nearest_neighbor --backbone resnet18=WEIGHTS --out out", "out/runs.jsonl"),
        ("fleet PARTS/.. --weights WEIGHTS --backbone resnet18 --workers 1 --out out", "out/fleet.jsonl"),
        ("demo --out out", "out"),
    ],
)
def test_the_second_run_into_one_place_is_refused(model, parts, weights, tmp_path, monkeypatch, holder, command, held):
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("out/runs.jsonl").touch(), Path("out/fleet.jsonl").touch(), Path("out/d.safetensors.checkpoint").touch()
    before, other = sorted(Path("out").rglob("*")), holder(tmp_path / held)
    names = {"MODEL": model, "PARTS": parts, "WEIGHTS": weights}
    words = [re.sub("|".join(names), lambda found: str(names[found[0]]), word) for word in command.split()]
    changes = settings(TINY) if words[0] in ("train", "ablate") else []
    line = complaint(unflaw(*words, *changes))
    assert line.startswith(f"error: {held}: cannot be written (in use by process {other.pid} on ")
    assert line.endswith("); wait until it has ended, or name another output")
    other.kill()
    other.wait()
    left = [path for path in sorted(Path("out").rglob("*")) if not path.name.endswith(".lock")]
    assert left == before


def test_a_missing_image_is_a_line_like_any_other(model, parts, tmp_path):
    done = unflaw("predict", model, tmp_path / "gone.png", parts / "test/good/000.png", "--out", tmp_path / "results")
    assert done.exit_code == 3
    first, second = map(json.loads, (tmp_path / "results/results.jsonl").read_text().splitlines())
    assert "gone.png" in first["error"] and "score" in second


# Ablation


def test_ablate_lists_its_variants():
    done = unflaw("ablate", "--list")
    assert "paper-parts: network.restoration.prototypes=0; network.restoration.regional_prototypes=0\n" in done.stdout
    assert "nearest_neighbor: method=nearest_neighbor" in done.stdout and done.stdout.startswith("full:")
    done = unflaw("ablate", "--method", "mfrnet", "--only", "k-8", "--variant", "deep: network.depth=4", "--list")
    assert [line for line in done.stdout.splitlines() if line[0] != " "] == [
        "full: ",
        "k-8: network.k=[8]",
        "deep: network.depth=4",
    ]


def test_ablate_compares_variants_and_goes_on(parts, tmp_path):
    other = shutil.copytree(parts, tmp_path / "other/parts")  # another data set of the same name
    (other / "train/good/005.png").write_bytes(b"no image")
    base = settings(TINY | OWN["nearest_neighbor"] | {"training.steps": 2})
    out, cache, few = tmp_path / "out", tmp_path / "elsewhere", ["--weights", "random", "--seeds", 1, *base]
    arguments = ["ablate", "--method", "nearest_neighbor", "--data", parts, "--data", other, *few, "--out", out]
    arguments += ["--variant", "wide: scoring.smooth=8; features.grid=6"]
    done = unflaw(*arguments, "--cache", cache)
    assert done.exit_code == 0, done.output
    tables = {f"table.{suffix}" for suffix in ("md", "csv", "json", "tex", "html")}
    assert {path.name for path in out.iterdir()} == {"runs.jsonl", "images", *tables}
    assert done.stdout.strip() == (out / "table.md").read_text("utf-8").strip()
    assert f"## {parts.parent.name}/parts\n" in done.stdout and "## other/parts\n" in done.stdout
    assert "| wide | " in done.stdout and "Settings: training.display_steps=" in done.stdout
    assert "note: skipped" in done.stderr and "005.png" in done.stderr
    written = (out / "runs.jsonl").read_text()
    assert written.count("\n") == 4 and len(list(cache.iterdir())) == 4
    again = unflaw(*arguments)
    assert again.stdout == done.stdout and (out / "runs.jsonl").read_text() == written
    assert not (out / "features").exists()
    more = unflaw(
        "ablate", "--method", "nearest_neighbor", "--data", parts, *few, "--set", "scoring.smooth=2", "--out", out
    )
    assert "## parts\n" in more.stdout and (out / "runs.jsonl").read_text().startswith(written)
    assert len(list((out / "features").iterdir())) == 1


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--only", "no-memroy"], "no-memory"),
        (["--variant", "deep"], "name: setting=value"),
        (["--variant", "nearest_neighbor"], "--only nearest_neighbor"),
        (["--variant", "deep: network.depht=3"], "network.depht"),
        (["--variant", "deep: network.restoration.patch=3"], "patches of 3"),
        (["--set", "training.seed=3"], "--seeds"),
        (["--data", "nowhere"], "nowhere"),
        (["--data", "GOOD"], "no test images"),
        (["--backbone", "resnet_18"], "resnet18"),
        (["--method", "uranett"], "uranett"),
        (["--out", "file"], "file"),
    ],
)
def test_ablate_says_what_is_wrong_before_it_starts(parts, tmp_path, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("in the way")
    arguments = [parts / "train/good" if argument == "GOOD" else argument for argument in arguments]
    given = ["--weights", "random", "--only", "untrained", *settings({"features.grid": 8, "preparation.size": 64})]
    given += [] if "--data" in arguments else ["--data", parts]
    given += [] if "--out" in arguments else ["--out", "out"]
    line = complaint(unflaw("ablate", *given, *arguments))
    assert named in line
    assert not list(tmp_path.rglob("*.npy"))


def test_ablate_asks_for_data_and_a_folder(parts):
    assert "--out" in complaint(unflaw("ablate", "--data", parts))
    assert "--data" in complaint(unflaw("ablate", "--out", "out"))
    assert unflaw("ablate", "--data", parts, "--out", "out", "--seeds", 0).exit_code == 2


def test_a_bar_begins_again_with_the_stage_of_another_run(monkeypatch):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with common.progress_bars() as progress:
        bars = inspect.getclosurevars(progress).nonlocals["bars"]
        progress("training", 5, 5, 0.5)
        progress("training", 2, 5, 0.5)
        (task,) = bars.tasks
        assert (task.completed, task.total, task.finished_time) == (2, 5, None)
        progress("training", 3, 5, 0.5)
        assert task.completed == 3
