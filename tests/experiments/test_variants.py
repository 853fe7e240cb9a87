import pytest

from unflaw import registry
from unflaw.config import make_config
from unflaw.experiments.variants import FULL, Variant, choose, named, parse


@pytest.mark.parametrize("method", registry.names())
def test_every_named_variant_is_another_configuration_with_a_reason(method):
    variants = named(method)
    assert variants[0] is FULL and FULL.changes == {} and (len(variants) > 15) == (method in ("uranet", "mfrnet"))
    assert len({variant.name for variant in variants}) == len(variants)
    assert all(variant.why and not set(variant.name) & set(" :;|") for variant in variants)
    assert len({variant.config(method, {}, 0) for variant in variants}) == len(variants)


@pytest.mark.parametrize(
    "method, name, expected",
    [
        ("uranet", "no-fasm", {"synthesis": {"clean": 1.0}}),
        ("uranet", "fasm-textures", {"synthesis": {"others": 0, "shuffles": 0, "jitter": 0, "textures": 1.0}}),
        ("uranet", "no-uncertainty", {"perception": {"bayesian": False}}),
        ("uranet", "no-memory", {"restoration": {"prototypes": 0}}),
        ("uranet", "tau-v-0.4", {"perception": {"deviation_threshold": 0.4, "mean_threshold": 0.5}}),
        ("uranet", "nearest_neighbor", {"method": "nearest_neighbor"}),
        ("mfrnet", "k-2-4-8", {"k": (2, 4, 8), "n": 16}),
        ("mfrnet", "gms-only", {"pixel": 0, "ssim": 0, "gms": 1}),
        ("mfrnet", "nothing-hidden", {"masked": False}),
    ],
)
def test_variants_change_what_their_names_say(method, name, expected):
    (variant,) = (variant for variant in named(method) if variant.name == name)
    network = variant.config(method, {}, 0).network.model_dump()
    for room, value in expected.items():
        assert network[room] | value == network[room] if isinstance(value, dict) else network[room] == value


def test_a_variant_is_written_as_it_is_read():
    variant = parse(" deep : network.restoration.depth = 6;features.levels=[1, 2]; preparation.fit=pad; method=uranet;")
    assert variant.name == "deep"
    assert variant.changes == {
        "network.restoration.depth": 6,
        "features.levels": [1, 2],
        "preparation.fit": "pad",
        "method": "uranet",
    }
    for other in (variant, *named("uranet"), *named("mfrnet")):
        assert parse(f"{other.name}: {other.overrides}", other.why) == other
    assert parse("same:").changes == {}


@pytest.mark.parametrize("text", ["", ":", ": a=1", "deep", "deep: a", "deep: =1", "a=1; b=2"])
def test_variants_of_another_form_are_refused(text):
    with pytest.raises(ValueError, match="name: setting=value"):
        parse(text)


def test_a_variant_that_has_a_name_is_chosen_by_it():
    with pytest.raises(
        ValueError, match="'nearest_neighbor' is a variant that has a name; choose it with --only nearest_neighbor"
    ):
        choose("uranet", own=["nearest_neighbor"])
    with pytest.raises(ValueError, match="name: setting=value"):
        choose("draem", own=["nearest_neighbor"])  # has none of that name


def test_configurations_have_what_is_common_then_what_is_their_own():
    common = {"training.steps": 7, "network.restoration.depth": 2, "training.display_steps": 5}
    config = parse("a: training.steps=9").config("uranet", common, 4)
    assert (config.training.steps, config.training.seed, config.training.display_steps) == (9, 4, 5)
    assert config.network.restoration.depth == 2
    assert FULL.config("uranet", {}, 0, "paper") == make_config("uranet", "paper", {"training.seed": 0})
    nearest_neighbor = parse("b: method=nearest_neighbor; network.prototypes=50").config("uranet", common, 0)
    assert (nearest_neighbor.method, nearest_neighbor.network.prototypes, nearest_neighbor.training.steps) == (
        "nearest_neighbor",
        50,
        7,
    )
    assert parse("c: method=uranet").config("uranet", common, 0).network.restoration.depth == 2


@pytest.mark.parametrize("changes, named", [({"network.depht": 1}, "depht"), ({"training.seed": 3}, "training.seed")])
def test_a_wrong_setting_is_named_with_its_variant(changes, named):
    with pytest.raises(ValueError, match=rf"variant 'odd'.*{named}"):
        Variant("odd", changes).config("uranet", {}, 0)
    with pytest.raises(ValueError, match=rf"variant 'full'.*{named}"):
        FULL.config("uranet", changes, 0)


def test_choosing():
    def names(*arguments):
        return [variant.name for variant in choose(*arguments)]

    assert names("uranet") == [variant.name for variant in named("uranet")]
    assert names("uranet", ["nearest_neighbor", "no-memory"]) == [
        "full",
        "no-memory",
        "nearest_neighbor",
    ]  # in the order of the table
    assert names("uranet", ["full"], ["nearest_neighbor: method=nearest_neighbor", "b:"]) == [
        "full",
        "nearest_neighbor",
        "b",
    ]
    assert names("draem", [], ["b:"]) == ["full", "b"]
    with pytest.raises(
        ValueError, match=r"uranet has no variant 'no-memroy'; there are full, .*no-memory.*nearest_neighbor"
    ):
        choose("uranet", ["no-memroy"])
    with pytest.raises(ValueError, match=r"'nearest_neighbor'.*another name"):
        choose("uranet", [], ["nearest_neighbor: method=nearest_neighbor"])
    with pytest.raises(ValueError, match=r"'b'.*another name"):
        choose("uranet", ["full"], ["b:", "b: training.steps=1"])
    with pytest.raises(ValueError, match=r"unknown method 'uranett'.*uranet"):
        choose("uranett")
