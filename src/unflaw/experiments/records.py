"""Records of finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel

from unflaw.evaluation.results import METRICS
from unflaw.experiments.run_log import Finished

if TYPE_CHECKING:
    pass


KEPT = (*METRICS, "n_images", "n_good", "false_alarms", "missed")


class Latency(BaseModel):
    """Wall seconds per image, from file to result, warm."""

    median: float
    p95: float


class Record(Finished):
    """A finished run, a line of `runs.jsonl`.

    Attributes:
        digest: Of configuration, data, weights and version.
        data, method, backbone, size, seed: What was run; the backbone of a method on pixels is "".
        weights: Name of the backbone's weight file, or "default" or "random".
        settings: What was changed for the whole grid.
        metrics: KEPT; None where undefined.
        skipped: Images that could not be read, and why.
        seconds: "training", from files to saved detector (of a peer: from prepared images on), and "metrics".
        memory: Largest resident size of the training process, bytes, that of the libraries included; None where the
            system does not tell.
        file: Size of the detector file, bytes.
        latency: By batch, "1" and "32".
        shared: Its features were shared with other runs: "training" is without them, memory and latency are unknown.
        machine: Processor architecture and threads.
        unflaw, torch: Versions.
    """

    data: str
    method: str
    backbone: str
    size: int
    seed: int
    weights: str
    settings: str
    metrics: dict[str, int | float | None]
    skipped: dict[str, str]
    seconds: dict[str, float]
    memory: int | None
    file: int | None
    latency: dict[str, Latency]
    machine: str
    unflaw: str
    torch: str
    shared: bool = False


def images_file(out: Path, digest: str) -> Path:
    """Where the scores and counts of every test image of a run are kept."""
    return out / "images" / f"{digest[:16]}.npz"
