"""From images to calibration: the guarantees of `fit` as a whole. Its steps have tests of their own."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.conftest import TINY, make_parts

from unflaw.datasets.samples import content_keys

# Counts how often files below a folder are opened; a hook of the interpreter cannot be taken away again.
COUNTING = """
import json, sys
from pathlib import Path
folder, weights, settings = json.loads(sys.argv[1])
opened = []
paths = sorted(Path(folder).iterdir())
names = set(map(str, paths))
sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" and str(args[0]) in names else None)
from unflaw.config import make_config
from unflaw.detector import Detector
Detector(config=make_config("nearest_neighbor", changes=settings), weights=weights).fit(paths)
print(json.dumps([str(path) for path in opened]))
"""


def opened(folder: Path, weights: Path, **changes: object) -> Counter[str]:
    settings = TINY | {"training.display_steps": 0} | changes
    call = [sys.executable, "-c", COUNTING, json.dumps([str(folder), str(weights), settings])]
    done = subprocess.run(call, capture_output=True, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return Counter(Path(path).name for path in json.loads(done.stdout))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"preparation.tile": 40}])
def test_each_image_is_read_once(tmp_path, weights, changes):
    """Of images with the same size in bytes, as all BMP have, the ends are looked at too."""
    make_parts(tmp_path / "parts")
    good, rng = tmp_path / "good", np.random.default_rng(0)
    good.mkdir()
    for i, path in enumerate(sorted((tmp_path / "parts/train/good").iterdir())):
        image = Image.open(path)
        if i < 3:
            image.save(good / f"{i}.bmp")
        else:  # no two are equally large
            (good / f"{i}.png").write_bytes(path.read_bytes() + bytes(int(rng.integers(256)) for _ in range(i)))
    sizes = Counter(path.stat().st_size for path in good.iterdir())
    found = opened(good, weights, **changes)
    assert found == {path.name: min(2, sizes[path.stat().st_size]) for path in good.iterdir()}
    assert sorted(found.values()) == [1] * 9 + [2] * 3


def test_keys_are_equal_for_copies_alone(tmp_path):
    middle = bytes(2**18)
    contents = {
        "a": b"x" + middle + b"y",
        "copy": b"x" + middle + b"y",
        "ends alike": b"x" + middle[:-1] + b"!" + b"y",
        "inside alike": b"x" + bytes(2**17) + b"!" + bytes(2**17 - 1) + b"y",
        "other end": b"x" + middle + b"z",
        "short": b"x",
        "empty": b"",
        "empty too": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    keys = content_keys([*(tmp_path / name for name in contents), tmp_path / "none"])
    assert keys.pop(tmp_path / "none") == ""
    named = {path.name: key for path, key in keys.items()}
    assert named["a"] == named["copy"] and named["empty"] == named["empty too"]
    assert len(set(named.values())) == len(contents) - 2 and "" not in named.values()
