"""Every reader on damaged and hostile input, the same few examples each time; `benchmarks/fuzz.py` has more."""

import logging

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from tests.hostile.targets import Material, targets

NAMES = (
    *("images", "detector metadata", "unflaw info", "tensors", "detector files", "graph metadata", "graphs"),
    *("tables", "grids", "run logs"),
)
SLOW = ("detector metadata", "unflaw info", "tensors", "detector files", "graph metadata")  # to some tenths of a second


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    return targets(Material(tmp_path_factory.mktemp("material")))


def test_all_targets_are_named(found):
    assert tuple(found) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_only_documented_errors_come_out(found, name, tmp_path):
    target = found[name]
    taken = refused = 0

    @settings(
        max_examples=25 if name in SLOW else 120,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(target.feed)
    def run(fed):
        nonlocal taken, refused
        try:
            target.run(fed, tmp_path)
            taken += 1
        except target.allowed as error:
            refused += 1
            assert str(error)

    run()
    assert taken + refused >= 20
