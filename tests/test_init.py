import subprocess
import sys

import pytest

import unflaw


def test_every_public_name_is_there():
    for name in unflaw.__all__:
        assert callable(getattr(unflaw, name))
    assert unflaw.Detector.__module__ == "unflaw.detector"


def test_public_names_are_listed_before_they_are_used():
    code = "import sys, unflaw; print({*unflaw.__all__, '__version__'} - {*dir(unflaw)}, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["set()", "False"]


def test_other_names_are_not():
    with pytest.raises(AttributeError, match="Detectr"):
        _ = unflaw.Detectr


def test_load_reads_what_was_saved(saved, detector):
    assert unflaw.load(str(saved)).calibration_ == detector.calibration_
