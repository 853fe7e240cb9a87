import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from unflaw import registry
from unflaw.config import Config, Weights, make_config


def test_dotted_changes_reach_their_setting_and_no_other():
    config = make_config(
        "uranet", "cpu", {"training.steps": 7, "network.perception.draws": 3, "preparation.fit": "pad"}
    )
    assert (config.training.steps, config.network.perception.draws, config.preparation.fit) == (7, 3, "pad")
    plain = make_config()
    defaults = {"training.steps": plain.training.steps, "network.perception.draws": plain.network.perception.draws}
    undone = make_config("uranet", "cpu", defaults)
    assert undone == plain
    assert config.network.restoration == plain.network.restoration
    assert config.training == plain.training.model_copy(update={"steps": 7})


@pytest.mark.parametrize("method", registry.names())
@pytest.mark.parametrize("profile", ["cpu", "paper"])
def test_every_method_has_every_profile(method, profile):
    config = make_config(method, profile)
    assert config.method == method
    assert Config.model_validate(json.loads(config.model_dump_json())) == config


def test_the_paper_profile_changes_what_it_says_and_gives_way_to_changes():
    paper, name = registry.method_class("uranet").profiles["paper"], "network.restoration.width"
    assert make_config("uranet", "paper").network.restoration.width == paper[name] == 768
    assert make_config("uranet", "cpu").network.restoration.width != 768
    assert make_config("uranet", "paper", {name: 48}).network.restoration.width == 48
    assert make_config("nearest_neighbor", "paper").features.backbone == paper["features.backbone"]


def test_lookup_is_an_alias():
    assert make_config("lookup") == make_config("nearest_neighbor")
    given = {"network": {"method": "lookup", "prototypes": 7}}
    assert Config.model_validate(given) == make_config("nearest_neighbor", changes={"network.prototypes": 7})


@pytest.mark.parametrize("network", [{}, {"method": 3}, 3, {"method": "uranet", "prototypes": 7}, {"method": "none"}])
def test_options_are_those_of_a_method(network):
    with pytest.raises(ValidationError, match="network"):
        Config.model_validate({"network": network})


@pytest.mark.parametrize(
    "name, value",
    [
        ("training.stepps", 3),
        ("network.perception.draw", 3),
        ("nonsense", 3),
        ("training.steps", -1),
        ("training.steps", "many"),
        ("training.steps", 2.5),
        ("training.learning_rate", 0),
        ("training.learning_rate", float("nan")),
        ("training.precision", "float8"),
        ("features.levels", "all"),
        ("features.levels", ()),
        ("features.smooth", 2),
        ("network.perception.draws", 0),
        ("network.restoration.width", 30),
        ("network.synthesis.clean", 1.5),
        ("network.synthesis.others", -1),
        ("network.restoration.regional_prototypes", -1),
        ("preparation.size", 1),
        ("preparation.fit", "crop"),
        ("calibration.false_alarm_rate", 0),
        ("calibration.false_alarm_rate", 1),
        ("calibration.holdout", 1),
        ("features.level_weights", ()),
        ("scoring.top_fractions", ()),
        ("scoring.regional_top_fraction", 0),
        ("scoring.regional_top_fraction", 1.5),
        ("scoring.regional_map_weight", -0.1),
        ("scoring.locating", ()),  # those of earlier versions are not silently taken
        ("scoring.judging", (0.0, 0.0, 0.0)),
        ("training.seed", 2**32),
    ],
)
def test_a_setting_that_is_unknown_or_out_of_range_is_named(name, value):
    with pytest.raises(ValueError) as caught:
        make_config("uranet", "cpu", {name: value})
    message = str(caught.value)
    assert name in message and repr(value) in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "name, values, place",
    [
        ("scoring.top_fractions", (0.0, 0.1), 0),
        ("scoring.top_fractions", (0.1, 1.5), 1),
        ("features.levels", (1, -1), 1),
        ("features.levels", (1, 2, "coarse"), 2),
        ("features.level_weights", (1.0, 0.0, 4.0), 1),
        ("features.level_weights", (-1.0,), 0),
    ],
)
def test_a_wrong_one_among_several_values_is_named_by_its_place(name, values, place):
    with pytest.raises(ValueError) as caught:
        make_config("uranet", "cpu", {name: values})
    message = str(caught.value)
    assert f"{name}.{place}" in message and repr(values[place]) in message
    assert "\n" not in message


def test_heads_that_do_not_divide_the_width_are_named():
    with pytest.raises(ValueError, match=r"network\.restoration.* 48 .* 5 heads") as caught:
        make_config("uranet", "cpu", {"network.restoration.width": 48, "network.restoration.heads": 5})
    assert "\n" not in str(caught.value)
    make_config("uranet", "cpu", {"network.restoration.width": 48, "network.restoration.heads": 6})


@pytest.mark.parametrize(
    "changes",
    [{"features.smooth": k} for k in (1, 3, 5, 7)] + [{"training.seed": 2**32 - 1}, {"scoring.top_fractions": (1,)}],
)
def test_the_ends_of_ranges_are_in_them(changes):
    ((name, value),) = changes.items()
    group, field = name.split(".")
    assert make_config("uranet", "cpu", changes).model_dump(mode="json")[group][field] in (value, [1.0])


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"features.backbone": "resnet18", "features.backbone.depth": 1}, "features.backbone"),
        ({"training": 5, "training.steps": 5}, "training"),
    ],
)
def test_a_setting_inside_a_plain_value_is_named(changes, name):
    with pytest.raises(ValueError, match=name):
        make_config("uranet", "cpu", changes)


def test_an_unknown_group_of_settings_is_named():
    with pytest.raises(ValueError, match="setting trainings"):
        make_config("uranet", "cpu", {"trainings.steps": 3})


@pytest.mark.parametrize(
    "method, slip, hint",
    [
        ("uranet", "training.step", "did you mean training.steps?"),
        ("uranet", "steps", "did you mean training.steps?"),
        ("uranet", "train.steps", "did you mean training.steps?"),
        ("uranet", "network.draws", "did you mean network.perception.draws?"),
        ("nearest_neighbor", "network.perception.draws", "network has prototypes, regional_prototypes"),
        ("memae", "training.lr", "training has steps, batch, accumulate, learning_rate, "),
        ("mfrnet", "nonsense", "a configuration has network, preparation, features, training, scoring, calibration"),
    ],
)
def test_an_unknown_setting_gets_the_nearest_one_or_those_there_are(method, slip, hint):
    with pytest.raises(ValueError) as caught:
        make_config(method, "cpu", {slip: 10})
    assert str(caught.value).startswith(f"setting {slip}: {method} has no such setting; {hint}")
    assert str(caught.value).endswith("(given: 10)")


def test_settings_of_another_method_are_refused():
    with pytest.raises(ValueError, match=r"network\.perception"):
        make_config("nearest_neighbor", "cpu", {"network.perception.draws": 3})


@pytest.mark.parametrize("method, profile, named", [("uranett", "cpu", "uranett"), ("uranet", "gpu", "gpu")])
def test_unknown_methods_and_profiles_are_named_with_those_there_are(method, profile, named):
    with pytest.raises(ValueError, match=named) as caught:
        make_config(method, profile)
    assert any(name in str(caught.value) for name in ("nearest_neighbor", "paper"))


def test_a_configuration_survives_json_and_cannot_be_changed():
    changes = {"features.levels": (2, 3), "features.components": None, "network.synthesis.strength": (0.1, 0.4)}
    config = make_config("uranet", "cpu", changes)
    again = Config.model_validate(json.loads(json.dumps(config.model_dump(mode="json"))))
    assert again == config
    assert again.features.levels == (2, 3)
    with pytest.raises(ValidationError):
        config.training.steps = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    "text, source, name, short",
    [
        (None, None, "default", "default"),
        ("random", Weights.RANDOM, "random", "random"),
        ("./random", "./random", "./random", "./random"),
        ("later", "later", "./later", "./later"),
        ("w/default", "w/default", "w/default", "./default"),
        (Path("w/resnet18.pth"), Path("w/resnet18.pth"), str(Path("w/resnet18.pth")), "resnet18.pth"),
    ],
)
def test_weights_that_are_no_file_are_not_mistaken_for_one_nor_the_other_way_round(text, source, name, short):
    assert Weights.parse(text) == source
    assert (Weights.name_of(source), Weights.name_of(source, short=True)) == (name, short)
    assert Weights.name_of(Path("random")) == "./random"  # a Path is always a file


def test_importing_the_configuration_does_not_import_torch():
    """Nor does reading the configuration of an exported detector, whose method need not even be there."""
    code = (
        "import sys, unflaw, unflaw.config, unflaw.registry; unflaw.registry.names(); "
        "given, context = {'network': {'method': 'theirs', 'more': 3}}, {'exported': True}; "
        "assert unflaw.config.Config.model_validate(given, context=context).method == 'theirs'; "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
