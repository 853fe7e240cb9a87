from pathlib import Path

import pytest

from unflaw.datasets import load_dataset
from unflaw.experiments.grid import plan, read_grid


def test_flags_go_before_the_file_and_its_paths_are_relative_to_it(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/r.pth").touch()
    (tmp_path / "screw").mkdir()
    file = tmp_path / "grid.yaml"
    file.write_text("methods: [uranet]\ndata: [screw]\nbackbones: [resnet18=weights/r.pth, resnet34]\nseeds: 5\n")
    file.write_text(file.read_text() + "features: cache\npeer_python: /usr/bin/python\n")
    found = read_grid(file, {"seeds": 1})
    assert (found.features, found.peer_python) == (tmp_path / "cache", Path("/usr/bin/python"))
    assert (found.methods, found.seeds, found.data) == (["uranet"], 1, [tmp_path / "screw"])
    assert found.backbones == [f"resnet18={tmp_path / 'weights/r.pth'}", "resnet34"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: [a]\nmethod: [uranet]", "grid.yaml: method: .* there are methods, data"),
        ("methods: [uranet]", "data: Field required; name data sets with --data"),
        ("data: [a]\nseeds: 0", "grid.yaml: seeds"),
        ("- a", "must hold fields"),
        ("data: [a", "cannot be read as YAML"),
    ],
)
def test_a_wrong_grid_names_the_field(text, message, tmp_path):
    (tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_grid(tmp_path / "grid.yaml", {})


def test_every_place_of_the_grid_is_planned_and_methods_on_pixels_once(grid, dataset, weights):
    wanted = grid(
        methods=["nearest_neighbor", "memae"], backbones=[f"resnet18={weights}", "test_resnet=random"], sizes=[32, 64]
    )
    runs = plan(wanted, [dataset])
    assert len(runs) == len({run.digest for run in runs}) == (2 + 1) * 2 * 2
    assert [run.row for run in runs[::2]] == [
        ("parts", method, "full", backbone, size)
        for method, backbone in (("nearest_neighbor", "resnet18"), ("nearest_neighbor", "test_resnet"), ("memae", ""))
        for size in (32, 64)
    ]
    assert runs[0].weights == str(weights) and runs[0].config.preparation.size == 32


def test_every_method_has_the_variants_that_it_can_have(grid, dataset):
    variants = ["no-memory", "k-4", "deep: network.restoration.depth=2", "smooth: scoring.smooth=2"]
    runs = plan(grid(methods=["uranet", "mfrnet"], variants=variants, seeds=1, settings={}), [dataset])
    assert [(run.method, run.variant.name) for run in runs] == [
        *(("uranet", name) for name in ("full", "no-memory", "deep", "smooth")),
        *(("mfrnet", name) for name in ("full", "k-4", "no-memory", "smooth")),
    ]
    assert runs[2].config.network.restoration.depth == 2 and runs[2].variant.overrides == "network.restoration.depth=2"
    assert runs[2].name == "parts, uranet, variant deep, resnet18, 64 pixels, seed 0"
    assert plan(grid(seeds=1), [dataset])[0].variant.name == "full"


def test_a_variant_stands_in_the_cell_that_it_is_compared_with(grid, dataset, weights):
    """Whatever backbone and size it has itself; one on pixels is run once for all backbones."""
    variants = ["pixels: method=memae", "other: features.backbone=test_efficientnet; preparation.size=32"]
    wanted = grid(variants=variants, backbones=["resnet18=random", "test_resnet=random"], seeds=1, settings={})
    runs = plan(wanted, [dataset])
    assert [run.row[1:] for run in runs] == [
        ("nearest_neighbor", variant, backbone, 64)
        for variant in ("full", "pixels", "other")
        for backbone in ("resnet18", "test_resnet")
    ]
    assert runs[2].digest == runs[3].digest and len({run.digest for run in runs}) == 4
    assert (runs[4].config.features.backbone, runs[4].config.preparation.size) == ("test_efficientnet", 32)
    wanted = grid(methods=["memae"], variants=["back: method=nearest_neighbor"], seeds=1, settings={})
    memae, back = plan(wanted, [dataset])
    assert (memae.backbone, memae.weights, back.backbone, back.weights) == ("", None, "", str(weights))
    assert back.config.features.backbone == "resnet18"


def test_paths_in_a_file_may_hold_equals_signs(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text("data: [x=1/screw]\nbackbones: [resnet18=x=1/r.pth]\n")
    found = read_grid(file, {})
    assert found.data == [tmp_path / "x=1/screw"] and found.backbones == [f"resnet18={tmp_path}/x=1/r.pth"]


def test_what_cannot_work_is_said_before_the_first_run(grid, dataset, tmp_path, parts, weights):
    for changes, message in (
        ({"methods": ["uranett"]}, "unknown method 'uranett'"),
        ({"methods": []}, "there is nothing to run"),
        ({"settings": {"training.stepz": 1}}, "stepz"),
        ({"settings": {"steps": 5}}, "steps"),
        ({"settings": {"training.seed": 5}}, "--seeds says how many"),
        ({"backbones": [f"resnet18={weights}", "resnet18=random"]}, "two weight files"),
        ({"backbones": ["resnet18=nothing.pth"]}, "nothing.pth"),
        ({"variants": ["no-memroy"]}, "no variant 'no-memroy'; there are full"),
        ({"variants": ["deep: network.depht=3"]}, r"variant 'deep'.*network\.depht"),
        ({"variants": ["deep: method=uranett"]}, "variant 'deep'.*unknown method 'uranett'"),
        ({"variants": ["a: scoring.smooth=2", "a: scoring.smooth=3"]}, "two variants are called 'a'"),
        ({"variants": ["odd: features.levels=[17]"]}, "variant 'odd'.*levels"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            plan(grid(**changes), [dataset])
    with pytest.raises(ValueError, match="there are no test images"):
        plan(grid(), [load_dataset(parts / "train/good")])
