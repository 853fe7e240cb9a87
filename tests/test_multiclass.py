"""Several categories in one detector: one network, but what is normal, thresholds and verdicts of each category."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.conftest import OWN, TINY, first_rows, learn, make_parts
from typer.testing import CliRunner

from unflaw import load_categories
from unflaw.cli import app
from unflaw.config import Weights
from unflaw.datasets import DatasetError, load_dataset
from unflaw.detector import Detector
from unflaw.errors import DetectorError, TrainingError
from unflaw.evaluation.evaluate import evaluate, evaluate_all
from unflaw.evaluation.results import RARE
from unflaw.experiments.feature_store import ExperimentRunner
from unflaw.features.cache import Cache, build_cache
from unflaw.features.extractor import FeatureExtractor
from unflaw.imaging.tiling import Preparation, Window, layout
from unflaw.io.detector_file import FORMAT, read_metadata
from unflaw.methods import create
from unflaw.methods.feature_set import Context, FeatureSet
from unflaw.methods.memory_bank import MemoryBank
from unflaw.report.figures import write_figures
from unflaw.training import fit, loop
from unflaw.training.splits import split_calibration

pytestmark = pytest.mark.slow

QUICK = {"training.display_steps": 0}
METRICS = ("image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "pixel_f1_max", "aupro_30", "aupro_05")


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> Path:
    """A folder of two categories: nuts are rough, bolts smooth and bright, and there are more of them."""
    root = tmp_path_factory.mktemp("both") / "both"
    make_parts(root / "nuts")
    make_parts(root / "bolts", train=16)
    for path in [*root.glob("bolts/train/good/*"), *root.glob("bolts/test/*/*")]:
        image = np.array(Image.open(path))
        Image.fromarray((200 - image // 4).astype(np.uint8)).save(path)
    (root / "readme.txt").write_text("no image")
    return root


@pytest.fixture(scope="module")
def multi(both, weights, tiny) -> Detector:
    """A nearest_neighbor of both. Only to be used, not to be changed."""
    return Detector(config=tiny("nearest_neighbor", **QUICK), weights=weights).fit(load_categories([both]))


def bad(both: Path, name: str) -> list[Path]:
    return sorted((both / name / "test/square").iterdir())


def named(categories: list[str], rng: torch.Generator, channels: int = 8) -> Cache:
    """One image for each name; the later the category comes in the alphabet, the larger its features."""
    n, side = len(categories), 4
    size = torch.tensor([1.0 + 3 * (name == "b") for name in categories])[:, None, None, None]
    features = (torch.randn(n, channels, side, side, generator=rng) * size).half()
    paths = [Path(__file__)] * n
    return Cache(
        features,
        torch.zeros(n, 0),
        [Window(layout(64, 64, Preparation(size=64)), 0)] * n,
        torch.zeros(n, 87),
        paths,
        categories=categories,
    )


def unfitted(tiny, **changes) -> Detector:
    network = {"network.prototypes": 1024, "network.regional_prototypes": 256, "features.grid": 4}
    return Detector(config=tiny("nearest_neighbor", **QUICK, **network, **changes), weights=Weights.RANDOM)


# Learning


def test_what_is_normal_and_the_calibration_are_of_each_category(multi, both):
    assert list(multi.categories_) == ["bolts", "nuts"]
    bolts, nuts = multi.categories_.values()
    assert (len(bolts.calibration.scores), len(nuts.calibration.scores)) == (3, 2)
    assert bolts.calibration.pixel_threshold != nuts.calibration.pixel_threshold
    states = [known.network.category_state() for known in (bolts, nuts)]
    assert states[0].keys() == states[1].keys() == set(multi.network.category_buffers)
    assert not torch.equal(states[0]["normal"], states[1]["normal"])
    path = bad(both, "nuts")[0]
    as_nut, as_bolt = (multi.inspect(path, category=name) for name in ("nuts", "bolts"))
    assert as_nut.score != as_bolt.score and not np.array_equal(as_nut.map, as_bolt.map)
    record = multi.record_
    assert (record["good_images"], record["held_out"]) == (28, 5)
    assert record["categories"]["bolts"] == {"good_images": 16, "held_out": 3}


def test_a_threshold_is_what_the_hold_out_of_its_category_gives(both, weights, tiny):
    """Of two validation parts, and of one and a hold-out: nothing of the other category takes part."""
    data = load_categories([both])
    given = {
        name: [s for s in dataset.test if not s.label][:count]
        for (name, dataset), count in zip(data.items(), (4, 3), strict=True)
    }
    config = tiny("nearest_neighbor", **QUICK, **{"calibration.update_memory": False})
    whole = {name: replace(data[name], validation=tuple(found)) for name, found in given.items()}
    for data_sets in (whole, whole | {"bolts": data["bolts"]}):
        made = Detector(config=config, weights=weights).fit(data_sets)
        for name, dataset in data_sets.items():
            known = made.categories_[name].calibration
            paths = [s.path for s in dataset.validation or dataset.train]
            results = [made.inspect(path, category=name) for path in paths]
            scores = np.array([result.score for result in results])
            assert len(known.scores) == len(dataset.validation or [0, 0, 0])
            for score in known.scores:  # features were cached in half precision
                assert np.abs(scores - score).min() < 0.02 * max(1, abs(score))
            if dataset.validation:
                assert known.threshold == pytest.approx(scores.max(), rel=0.02, abs=0.02)
                peaks = [result.map.max() for result in results]
                assert known.pixel_threshold == pytest.approx(max(peaks), rel=0.02, abs=0.02)


def test_the_memory_of_a_category_leaves_out_the_image_itself(tiny):
    """Normal range of a category: distances of its training images to all tokens of its others, less a quarter of
    their spacing among themselves, by brute force."""
    made = unfitted(tiny)
    cache = named(list("aabbabababbbabbabbbb"), torch.Generator().manual_seed(0))
    learn(made, cache)
    train, calibrating = split_calibration(cache, None, 0.2, 1e9)
    assert {name: len(held) for name, held in calibrating.items()} == {"a": 2, "b": 3}
    tokens = train.features.float().flatten(2).transpose(1, 2)  # (N, T, C)
    for name, rows in train.rows().items():
        found = []
        for row in rows:
            others = tokens[[other for other in rows if other != row]].flatten(0, 1)
            size, n = len(made.network.memory.prototypes), tokens.shape[1]  # tokens are repeated to fill it
            kept = torch.arange(size) % (len(rows) * n)
            kept = kept[kept // n != rows.index(row)]
            kept = kept - n * (kept // n > rows.index(row)).long()  # as rows of `others`
            apart, nearest = torch.cdist(tokens[row], others[kept]).sort(1)
            spacing = torch.cdist(others, others).sort(1).values[:, 1:5].mean(1)[kept][nearest]
            found.append((apart - 0.25 * spacing)[:, :4].amin(1).clamp_min(0))
        distance = torch.cat(found)
        mean, deviation = made.network_of(name).normal[0].tolist()
        assert mean == pytest.approx(float(distance.mean()), rel=1e-3)
        assert deviation == pytest.approx(float(distance.std()), rel=1e-3)


def test_images_of_all_categories_take_turns(both, multi):
    cache = named(list("ab"), torch.Generator())
    assert cache.rows() == {"a": [0], "b": [1]}
    data = load_categories([both])
    categories = {s.path: name for name, dataset in data.items() for s in dataset.train}
    extractor = multi.network.features
    built = build_cache(extractor, list(categories), multi.config.preparation, 1e9, fit=False, categories=categories)
    assert [categories[path] for path in built.paths] == built.categories
    assert built.categories[:2] == ["bolts", "nuts"]
    for part in (7, 14, 21):  # 16 of 28 are bolts
        assert abs(built.categories[:part].count("bolts") - part * 16 / 28) <= 1


def test_the_extractor_is_fitted_on_no_image_that_calibrates(both, weights, tiny, monkeypatch):
    seen, aggregated = [], []
    fit_extractor, aggregate = FeatureExtractor.fit, FeatureExtractor.aggregate

    def noted(self, images):
        raw = aggregate(self, images)
        aggregated.append(raw)
        return raw

    monkeypatch.setattr(FeatureExtractor, "aggregate", noted)
    monkeypatch.setattr(FeatureExtractor, "fit", lambda self, raw: (seen.append(raw), fit_extractor(self, raw))[1])
    caches = []
    whole = fit.fit_cached

    def spy(network, cache, *rest, **options):
        caches.append(cache)
        return whole(network, cache, *rest, **options)

    monkeypatch.setattr(fit, "fit_cached", spy)
    Detector(config=tiny("nearest_neighbor", **QUICK, **{"calibration.holdout": 0.4}), weights=weights).fit(
        load_categories([both])
    )
    (cache,), (raw,) = caches, seen
    every = torch.cat(aggregated)
    rows = [int((every == one).flatten(1).all(1).nonzero()[0]) for one in raw]
    train, _ = split_calibration(cache, None, 0.4, 1e9)
    fitted = {cache.paths[row] for row in rows}
    assert fitted <= set(train.paths) and len(fitted) >= 10
    assert {cache.categories[row] for row in rows} == {"bolts", "nuts"}


def test_what_calibrated_a_category_is_learned_by_its_memory_once(tiny, monkeypatch):
    thresholds, calls = [], []
    for extend in (False, True):
        made = unfitted(tiny, **{"calibration.update_memory": extend})
        whole = type(made.network).add_prototypes
        monkeypatch.setattr(
            type(made.network),
            "add_prototypes",
            lambda self, *given, whole=whole: (calls.append(given[0]), whole(self, *given))[1],
        )
        learn(made, named(list("ab") * 10, torch.Generator().manual_seed(1)))
        monkeypatch.undo()
        thresholds += [score for known in made.categories_.values() for score in known.calibration.scores]
    assert all(after <= before + 1e-5 for before, after in zip(thresholds[:4], thresholds[4:], strict=True))
    assert [len(data.features) for data in calls] == [2, 2]


def test_one_category_with_a_name_is_the_detector_without(both, weights, tiny):
    config = tiny("nearest_neighbor", **QUICK)
    plain, alone = (Detector(config=config, weights=weights).fit(d) for d in (both / "nuts", {"nuts": both / "nuts"}))
    assert plain.calibration_ == alone.calibration_ == alone.categories_["nuts"].calibration
    first, second = plain.network.state_dict(), alone.network.state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    path = bad(both, "nuts")[0]
    score = plain.inspect(path).score
    assert score == alone.inspect(path).score == alone.inspect(path, category="nuts").score


@pytest.mark.parametrize("method", ["uranet", "mfrnet", "memae"])
def test_other_methods_learn_several_categories(both, weights, tiny, tmp_path, method):
    made = Detector(config=tiny(method, **{"training.steps": 2}), weights=weights).fit(load_categories([both]))
    nuts, bolts = (made.network_of(name).category_state() for name in ("nuts", "bolts"))
    assert not torch.equal(nuts["normal"], bolts["normal"])
    assert ("perception.thresholds" in nuts) == (method == "uranet")
    path = bad(both, "nuts")[0]
    before = [made.inspect(path, category=name) for name in ("nuts", "bolts", "nuts")]
    assert before[0].score == before[2].score != before[1].score
    made.save(tmp_path / "both.safetensors")
    loaded = Detector.load(tmp_path / "both.safetensors")
    assert [loaded.inspect(path, category=name).score for name in ("nuts", "bolts")] == [r.score for r in before[:2]]


def test_finish_writes_no_buffer_but_those_of_a_category(tiny):
    """Else something of one category would stay in the network while another is inspected."""
    for method in OWN:
        network = create(tiny(method, **{"training.steps": 0}), Weights.RANDOM).eval()
        features = network.embed(torch.rand(4, 3, 64, 64))
        network.fit_memory(FeatureSet.of(features.half()), torch.Generator().manual_seed(0))
        before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
        network.fit_normalization(features.half(), first_rows(features.half()))
        changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
        assert changed and changed <= set(network.category_buffers)


def test_data_of_categories_that_cannot_work_is_refused(both, weights, tiny, tmp_path):
    untrained, nuts = Detector(config=tiny("nearest_neighbor", **QUICK), weights=weights), load_dataset(both / "nuts")
    paths = [sample.path for sample in nuts.train]
    for data, message in (
        ({}, "there is no category"),
        ({"": paths}, "without a name"),
        ({"a": paths, "b": []}, "b: there are no good images"),
        ({"a": paths, "b": paths[3:]}, r"003\.png: is in two categories, a and b"),
        ({"a": paths[:8], "b": paths[8:]}, "b: 4 good images are too few to learn from: at least 8"),
    ):
        with pytest.raises(TrainingError, match=message):
            untrained.fit(data)
    same = [tmp_path / f"{i}.png" for i in range(9)]
    for i, path in enumerate(same):  # the same image in files that differ
        Image.new("RGB", (64, 64)).save(path, dpi=(72 + i, 72))
    with pytest.raises(TrainingError, match="b: all good images are identical"):
        untrained.fit({"a": paths, "b": same})
    for path in same:
        shutil.copy(same[0], path) if path != same[0] else None
    with pytest.raises(TrainingError, match=r"b: 1 good image is too few .* 8 files are copies of others"):
        untrained.fit({"a": paths, "b": same})
    shutil.copy(paths[0], same[3])  # it would train the weights as one category and calibrate as the other
    with pytest.raises(
        TrainingError, match=r"3\.png: is the same image as .*000\.png, but of another category, b and a"
    ):
        untrained.fit({"a": paths, "b": same})
    with pytest.raises(TrainingError, match=r"a: calibration\.holdout leaves"):
        Detector(config=tiny("nearest_neighbor", **{"calibration.holdout": 0.9}), weights=weights).fit({"a": paths})


# Inspecting


def test_a_category_must_be_named_and_known(multi, detector, both, tmp_path):
    path = bad(both, "nuts")[0]
    for run in (multi.inspect, lambda p, **o: next(multi.inspect_many([p], **o))):
        with pytest.raises(DetectorError, match=r"needs a category; name one of bolts, nuts \(category=.*--category"):
            run(path)
        with pytest.raises(DetectorError, match="has no category 'nut'; name one of bolts, nuts"):
            run(path, category="nut")
        with pytest.raises(DetectorError, match="no categories"):
            detector.inspect(path, category="nuts")
    with pytest.raises(DetectorError, match="needs a category"):
        _ = multi.calibration_
    with pytest.raises(DetectorError, match="fit"):
        Detector(config=multi.config, weights=Weights.LATER).select("nuts")


def test_categories_may_be_inspected_in_turns(multi, both):
    paths = bad(both, "nuts")
    alone = {name: [r.score for r in multi.inspect_many(paths, category=name)] for name in ("nuts", "bolts")}
    together = zip(*(multi.inspect_many(paths, category=name, batch=1) for name in alone), strict=True)
    for (nut, bolt), *expected in zip(together, *alone.values(), strict=True):
        assert [nut.score, bolt.score] == pytest.approx(expected, rel=1e-5)
    assert alone["nuts"] != alone["bolts"]


# Files


def test_a_loaded_detector_knows_its_categories(multi, both, tmp_path):
    path = tmp_path / "both.safetensors"
    multi.save(path)
    loaded = Detector.load(path)
    assert list(loaded.categories_) == ["bolts", "nuts"]
    for name, known in multi.categories_.items():
        assert loaded.categories_[name].calibration == known.calibration
        a, b = (d.inspect(bad(both, name)[0], category=name) for d in (multi, loaded))
        assert np.array_equal(a.map, b.map) and a.to_json() == b.to_json()
    loaded.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_files_without_categories_are_as_ever(saved):
    assert list(read_metadata(saved)) == ["format", "config", "calibration", "drift", "record"]
    assert read_metadata(saved)["format"] == 1
    assert {name.split(".")[0] for name in load_file(saved)} == {"network", "display"}


@pytest.mark.parametrize("harm", ["lost", "shape", "metadata"])
def test_damaged_categories_are_an_error_that_names_the_file(multi, tmp_path, harm):
    path = tmp_path / "both.safetensors"
    multi.save(path)
    metadata, tensors = read_metadata(path), load_file(path)
    assert metadata["format"] == FORMAT
    if harm == "lost":
        del tensors["categories.1.normal"]
    elif harm == "shape":
        tensors["categories.1.normal"] = torch.zeros(7, 2)
    else:
        metadata["categories"]["nuts"] = 5
    save_file(tensors, path, {"unflaw": json.dumps(metadata)})
    with pytest.raises(DetectorError, match=r"both\.safetensors"):
        Detector.load(path)


# Measuring


def test_each_data_set_is_measured_as_its_category(multi, both):
    data = load_categories([both])
    found = evaluate_all(multi, data)
    for name, dataset in data.items():
        assert found[name].metrics["category"] == name
        assert found[name].metrics["threshold"] == multi.categories_[name].calibration.threshold
        expected = [multi.inspect(s.path, category=name).score for s in dataset.test]
        assert [row["score"] for row in found[name].rows] == pytest.approx(expected, rel=1e-4)
    other = evaluate(multi, data["nuts"], category="bolts")
    assert other.metrics["category"] == "bolts" and other.rows[0]["score"] != found["nuts"].rows[0]["score"]
    with pytest.raises(DetectorError, match="no category 'screws'; name one of bolts, nuts"):
        evaluate_all(multi, {"screws": data["nuts"]})


def test_a_plain_detector_measures_several_data_sets(detector, both):
    found = evaluate_all(detector, load_categories([both]))
    assert {e.metrics["threshold"] for e in found.values()} == {detector.calibration_.threshold}
    assert all("category" not in e.metrics for e in found.values())


def test_figures_show_the_category_of_the_data(multi, both, tmp_path):
    dataset = load_dataset(both / "nuts")

    def drawn(folder: str, **options) -> bytes:
        (written,) = write_figures(multi, dataset, tmp_path / folder, count=2, **options)
        return written.read_bytes()

    assert drawn("a") == drawn("b", category="nuts") != drawn("c", category="bolts")


def test_the_laboratory_is_for_one_category_as_ever(both, weights, tiny, tmp_path):
    dataset = load_dataset(both / "nuts")
    made = ExperimentRunner(tmp_path, weights).fit(tiny("nearest_neighbor", **QUICK), dataset)
    assert list(made.categories_) == [""] and evaluate(made, dataset).metrics["n_images"] == 8


# Names


def test_names_tell_data_sets_apart(both, tmp_path):
    for folder in ("a/good", "b/good", "b/other"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "0.png")
    (tmp_path / "b/good.csv").write_text("path,label\ngood/0.png,0\n")
    found = load_categories([tmp_path / "a/good", tmp_path / "b/good", tmp_path / "b/other", both])
    assert list(found) == ["a/good", "b/good", "other", "bolts", "nuts"]
    assert [dataset.name for dataset in found.values()] == list(found)
    assert found["nuts"].test == load_dataset(both / "nuts").test
    assert list(load_categories([tmp_path / "b/good.csv"])) == ["good"]
    for twice in ([both, both / "nuts"], [tmp_path / "a/good"] * 2, [tmp_path / "b/good", tmp_path / "b/good.csv"]):
        with pytest.raises(DatasetError, match="twice"):
            load_categories(twice)
    with pytest.raises(DatasetError, match="gone: there is no such"):
        load_categories([tmp_path / "gone"])


# The command line


def unflaw(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def training(weights) -> list[object]:
    small = TINY | OWN["uranet"] | {"training.steps": 6}
    given = [part for name, value in small.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    return ["train", "--weights", weights, *given]


@pytest.fixture(scope="module")
def model(training, both, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "all.safetensors"
    done = unflaw(*training, "--data", both, "--multi-class", "--out", path)
    assert done.exit_code == 0, done.output
    assert (
        "bolts: " in done.stdout
        and "nuts: " in done.stdout
        and done.stdout.count("cross-validated good images give a false-alarm rate of about") == 2
    )
    return path


def test_a_folder_is_the_same_as_its_categories(training, model, both, tmp_path):
    out = tmp_path / "m.safetensors"
    data = ["--data", both / "bolts", "--data", both / "nuts"]
    assert unflaw(*training, *data, "--multi-class", "--out", out).exit_code == 0
    expected, found = load_file(model), load_file(out)
    assert expected.keys() == found.keys() and all(torch.equal(found[name], t) for name, t in expected.items())


def test_info_lists_categories(model):
    done = unflaw("info", model)
    for name, known in Detector.load(model).categories_.items():
        calibration = known.calibration
        assert f"category {name}: {calibration.describe()}; threshold {calibration.threshold:.4g}\n" in done.stdout


def test_evaluate_gives_each_category_and_the_mean(model, both, tmp_path):
    metrics, report = tmp_path / "m.json", tmp_path / "m.html"
    done = unflaw("evaluate", model, "--data", both, "--json", metrics, "--report", report)
    assert done.exit_code == 0, done.output
    written = json.loads(metrics.read_text())
    assert list(written) == ["mean", "categories"] and list(written["mean"]) == [*METRICS, *RARE]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[0] == list(METRICS)  # too few good pixels for AUPIMO, and no saturations
    assert [row[0] for row in rows[1:4]] == ["bolts", "nuts", "mean"]
    page = report.read_text("utf-8")
    head = page[: page.index('id="category-1"')]
    for i, name in enumerate(METRICS):
        values = [written["categories"][category][name] for category in ("bolts", "nuts")]
        assert written["mean"][name] == pytest.approx(sum(values) / 2)
        shown = [*values, written["mean"][name]]
        assert [row[i + 1] for row in rows[1:4]] == [f"{value:.4f}" for value in shown]
        assert all(f">{value:.3f}<" in head for value in shown)
    assert page.count('class="category"') == 2 and page.count("<article") == 16
    for known in Detector.load(model).categories_.values():
        assert f"pixel threshold {known.calibration.pixel_threshold:.3g}" in page
    one = unflaw("evaluate", model, "--data", both / "nuts", "--json", metrics)
    assert one.exit_code == 0 and json.loads(metrics.read_text())["image_auroc"] == pytest.approx(
        written["categories"]["nuts"]["image_auroc"]
    )


def test_commands_take_a_category(model, both, tmp_path):
    images, out = both / "nuts/test/square", tmp_path / "results"
    scores = []
    for name in ("nuts", "bolts"):
        done = unflaw("predict", model, images, "--category", name, "--out", out, "--images")
        assert done.exit_code == 0, done.output
        scores.append([json.loads(line)["score"] for line in (out / "results.jsonl").read_text().splitlines()])
    detector = Detector.load(model)
    assert scores[0] == pytest.approx([detector.inspect(p, category="nuts").score for p in bad(both, "nuts")], rel=1e-5)
    assert scores[0] != scores[1]
    data = load_dataset(both / "nuts")
    table = tmp_path / "mine.csv"
    table.write_text("path,label,split\n" + "".join(f"{s.path},{s.label},test\n" for s in data.test))
    for command in (["evaluate", model, "--data", table], ["figures", model, "--data", table, "--out", tmp_path / "f"]):
        line = unflaw(*command)
        assert line.exit_code == 2 and "has no category 'mine'; name one of bolts, nuts" in line.stderr
        assert "--category" in line.stderr
        assert unflaw(*command, "--category", "nuts").exit_code == 0
    before = (out / "results.jsonl").read_bytes()
    for given in ([], ["--category", "screws"]):
        done = unflaw("predict", model, images, "--out", out, *given)
        assert done.exit_code == 2 and "bolts, nuts" in done.stderr
    assert (out / "results.jsonl").read_bytes() == before
    done = unflaw("evaluate", model, "--data", both, "--category", "nuts")
    assert done.exit_code == 2 and "--category goes with one" in done.stderr


def test_several_data_sets_ask_for_multi_class(training, both, tmp_path):
    for data in (["--data", both], ["--data", both / "nuts", "--data", both / "bolts"]):
        done = unflaw(*training, *data, "--out", tmp_path / "m.safetensors")
        assert done.exit_code == 2 and "--multi-class" in done.stderr and "Traceback" not in done.output
    assert not list(tmp_path.iterdir())


def test_an_interrupted_training_goes_on_with_resume(training, model, both, tmp_path, monkeypatch):
    save, saves, out = loop._checkpoint, [], tmp_path / "all.safetensors"

    def interrupted(*arguments: object) -> None:
        save(*arguments)
        saves.append(arguments[3])
        if len(saves) == 3:
            raise KeyboardInterrupt

    arguments = [*training, "--multi-class", "--set", "training.checkpoint_seconds=0", "--out", out]
    monkeypatch.setattr(loop, "_checkpoint", interrupted)
    assert unflaw(*arguments, "--data", both).exit_code != 0
    assert not out.exists()
    other = unflaw(*arguments, "--data", both / "nuts", "--resume")
    assert other.exit_code == 2 and "other images or settings" in other.stderr
    assert unflaw(*arguments, "--data", both, "--resume").exit_code == 0
    assert saves[3] == saves[2] + 1  # it went on where it was
    expected, found = load_file(model), load_file(out)
    assert expected.keys() == found.keys() and all(torch.equal(found[name], t) for name, t in expected.items())


def test_a_checkpoint_of_the_same_images_in_other_categories_is_refused(both, weights, tiny, tmp_path):
    data = load_categories([both])
    config = tiny(**{"training.checkpoint_seconds": 0.0, "training.steps": 6})

    def stop(stage: str, done: int, total: int, loss: float | None = None) -> None:
        if stage == "training" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Detector(config=config, weights=weights).fit(data, progress=stop, checkpoint=tmp_path / "c")
    images = [sample.path for dataset in data.values() for sample in dataset.train]
    with pytest.raises(TrainingError, match="other images or settings"):
        Detector(config=config, weights=weights).fit(images, checkpoint=tmp_path / "c")


def test_categories_have_memories_of_their_own(multi):
    """Each is of tokens of its own training images, and another category's do not come near."""
    bolts, nuts = (multi.network_of(name).state_dict() for name in ("bolts", "nuts"))
    own = {name for name in bolts if name in multi.network.category_buffers}
    assert {"memory.prototypes", "regional_memory.memory.prototypes"} <= own
    for name, tensor in bolts.items():
        if name in own:
            assert tensor.data_ptr() != nuts[name].data_ptr()
        else:
            assert tensor.data_ptr() == nuts[name].data_ptr() or not tensor.numel()  # weights are common
    assert not torch.equal(bolts["memory.prototypes"], nuts["memory.prototypes"])


def test_threads_may_inspect_different_categories_at_the_same_time(multi, both, tmp_path):
    """One is stopped in the middle of its image while another category is inspected, evaluated and saved."""
    path = bad(both, "nuts")[0]
    alone = {name: multi.inspect(path, category=name) for name in ("nuts", "bolts")}
    inside, goes_on, found = threading.Event(), threading.Event(), []

    def stop(*_: object) -> None:
        if threading.current_thread() is slow:
            inside.set()
            assert goes_on.wait(60)

    slow = threading.Thread(target=lambda: found.append(multi.inspect(path, category="nuts")))
    hook = multi.network.features.register_forward_pre_hook(stop)
    slow.start()
    assert inside.wait(60)
    try:
        assert multi.inspect(path, category="bolts").score == alone["bolts"].score
        assert next(iter(multi.inspect_many([path], category="bolts"))).score == alone["bolts"].score
        evaluate(multi, load_categories([both])["bolts"], category="bolts")
        multi.select("bolts")
        multi.save(tmp_path / "both.safetensors")
    finally:
        goes_on.set()
        slow.join()
        hook.remove()
    assert found[0].score == alone["nuts"].score and np.array_equal(found[0].map, alone["nuts"].map)


def test_many_threads_find_what_one_does(multi, both):
    work = [(path, name) for path in bad(both, "nuts")[:2] for name in ("nuts", "bolts")] * 4
    expected = [multi.inspect(path, category=name).score for path, name in work[:4]] * 4
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda asked: multi.inspect(asked[0], category=asked[1]).score, work)) == expected


def test_training_images_of_mixed_batches_are_recalled_by_their_own_category():
    rng = torch.Generator().manual_seed(3)
    features = torch.randn(8, 4, 3, 3, generator=rng)
    features[1::2] += 10  # the second category lies far off, and varies more
    features[1::2] *= 3
    categories = torch.tensor([0, 1] * 4)
    memory = MemoryBank(12, 4)
    memory.fit(FeatureSet.of(features, categories=categories), torch.Generator().manual_seed(0))
    mixed = memory(features, Context(training_rows=torch.arange(8)))
    assert memory.unit(torch.arange(8)).flatten()[:2].unique().numel() == 2
    for number in (0, 1):
        rows = torch.arange(8)[number::2]
        alone = memory(features[rows], Context(training_rows=rows))
        assert all(torch.allclose(m[rows], a) for m, a in zip(mixed, alone, strict=True))
        memory.select_category(number)
        assert torch.allclose(memory.unit(), memory.unit(rows)[0].flatten())
        assert (categories[memory.banks[number].source_images] == number).all()
