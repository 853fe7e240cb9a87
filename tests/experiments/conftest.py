from pathlib import Path

import pytest
from tests.conftest import OWN, TINY

from unflaw.datasets import load_dataset
from unflaw.experiments import run as module
from unflaw.experiments.grid import Grid
from unflaw.experiments.run import measure

SETTINGS = TINY | {"training.steps": 2, "training.display_steps": 0} | OWN["nearest_neighbor"]


@pytest.fixture(scope="module")
def dataset(parts):
    return load_dataset(parts)


@pytest.fixture
def grid(weights):
    """`grid(**changes)`: a small grid of the nearest-neighbor search."""

    def make(**changes):
        settings = {name: v for name, v in SETTINGS.items() if name not in ("preparation.size", "features.backbone")}
        given = {
            "data": [Path("parts")],
            "methods": ["nearest_neighbor"],
            "backbones": [f"resnet18={weights}"],
            "sizes": [64],
        }
        return Grid(**given | {"seeds": 2, "settings": settings} | changes)

    return make


@pytest.fixture
def here(monkeypatch):
    """Runs in this process: only what a run gives is of interest. Returns the names of the runs."""
    done = []

    def run(run, out, progress):
        done.append(run.name)
        return measure(run, out, progress)

    monkeypatch.setattr(module, "_in_own_process", run)
    monkeypatch.setattr(module, "latencies", lambda *_: {})
    return done
