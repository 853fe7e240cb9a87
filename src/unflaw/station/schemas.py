"""What goes over HTTP, as the OpenAPI document shows it."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field

Verdict = Literal["good", "defect", "review"]
Decision = Literal["good", "defect"]
Number = Annotated[int, Field(ge=1, le=2**63 - 1)]
_DIGEST = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


def _written(moment: object) -> object:
    if isinstance(moment, str) and "-" not in moment:  # would be taken for seconds since 1970
        raise ValueError("is not a time such as 2026-11-25T06:12:00Z")
    return moment


def _in_range(moment: datetime) -> datetime:
    try:
        return moment.astimezone(timezone.utc)
    except OverflowError as error:
        raise ValueError("lies outside the years 1 to 9999 in UTC") from error


Moment = Annotated[AwareDatetime, BeforeValidator(_written), AfterValidator(_in_range)]


def _example(**fields: Any) -> ConfigDict:
    return ConfigDict(from_attributes=True, json_schema_extra={"examples": [fields]})


class Problem(BaseModel):
    """What every answer of 400 and above holds."""

    model_config = _example(detail="detector screw has no category 'nut'; name none")
    detail: str = Field(description="What is wrong and what to do about it, for people.")


class Region(BaseModel):
    """An area above the detector's pixel threshold; detectors may tell more of it."""

    model_config = ConfigDict(extra="allow")
    box: tuple[int, int, int, int] = Field(description="x0, y0, x1, y1 in pixels of the image; x1, y1 exclusive.")
    area: int | float = Field(description="Pixels of the image.")
    peak: float = Field(description="Largest map value inside.")


_INSPECTION: dict[str, Any] = {
    "id": 4711,
    "time": "2026-11-25T06:12:09.120000Z",
    "name": "line-3/000231.png",
    "digest": _DIGEST,
    "size": 48211,
    "width": 640,
    "height": 480,
    "source": None,
    "detector": "screw",
    "detector_digest": _DIGEST,
    "category": "",
    "score": 7.31,
    "p_value": 0.0099,
    "p_estimated": 0.0021,
    "threshold": 5.02,
    "verdict": "defect",
    "regions": [{"box": [212, 90, 261, 130], "area": 1204, "peak": 11.8}],
    "sampled": False,
    "decision": None,
    "decided_by": None,
    "decided_at": None,
}


class Inspection(BaseModel):
    """One inspection, as the log has it."""

    model_config = _example(**_INSPECTION)
    id: int
    time: datetime = Field(description="When it was logged, UTC.")
    name: str
    digest: str = Field(description="SHA-256 of the image's file, in hex.")
    size: int = Field(description="Bytes of the image's file.")
    width: int = Field(description="Of the image, upright, pixels.")
    height: int
    source: str | None = Field(None, description="The path of a watched file; null for what came over HTTP.")
    detector: str
    detector_digest: str = Field(description="SHA-256 of the detector's file, in hex.")
    category: str = Field(description="Empty for a detector that has no categories.")
    score: float = Field(description="Raw; comparable between images of one detector and category only.")
    p_value: float = Field(description="Share of good images that score at least as high, in (0, 1].")
    p_estimated: float | None = Field(
        None, description="Where the calibration has a tail: an estimate that goes below what p_value can reach."
    )
    threshold: float = Field(description="What the score was compared with.")
    verdict: Verdict
    regions: list[Region] = Field(description="Largest peak first.")
    sampled: bool = Field(description="Whether it was drawn at random for review, whatever its verdict.")
    decision: Decision | None = Field(None, description="What a person decided.")
    decided_by: str | None = None
    decided_at: datetime | None = None


class History(BaseModel):
    """Inspections, newest first."""

    model_config = _example(items=[_INSPECTION], next=4711)
    items: list[Inspection]
    next: int | None = Field(None, description="`before` of the next page; null at the end.")


class Images(BaseModel):
    """What can be shown of an inspection."""

    model_config = _example(
        images=["image", "heat", "overlay", "mean", "uncertainty", "mask", "restored"],
        contours=[[[212, 90], [261, 90], [261, 130], [212, 130]]],
    )
    images: list[str] = Field(description="Names for `/inspections/{id}/images/{name}`.")
    contours: list[list[Annotated[list[float], Field(min_length=2, max_length=2)]]] = Field(
        description="Corners (x, y) of the polygon around each region, in pixels of the image. They are not logged: "
        "after a new calibration there may be other regions than in the log."
    )


class Review(BaseModel):
    """A person's decision."""

    model_config = _example(decision="good", by="A. Lovelace") | ConfigDict(extra="forbid")
    decision: Decision | None = Field(description="null takes an earlier decision back.")
    by: str = Field(min_length=1, max_length=100, description="Who decides.")


class CalibrationState(BaseModel):
    """The calibration of a category."""

    threshold: float
    false_alarm_rate: float
    described: str = Field(description="What it promises, in a sentence.")


class Category(CalibrationState):
    """The calibration of a category, and the decisions that could renew it."""

    decided_good: int
    decided_good_sampled: int = Field(description="Of those, drawn at random for review.")
    decided_defect: int


class DetectorState(BaseModel):
    """A detector that is served."""

    model_config = _example(
        name="screw",
        digest=_DIGEST,
        fixed=None,
        categories={
            "": {
                "threshold": 5.02,
                "false_alarm_rate": 0.01,
                "described": "false-alarm rate 1.00% or less, certified by 120 good images outside of training",
                "decided_good": 14,
                "decided_good_sampled": 9,
                "decided_defect": 3,
            }
        },
    )
    name: str
    digest: str = Field(description="SHA-256 of its file, in hex.")
    fixed: str | None = Field(None, description="Why it cannot be calibrated anew; null: it can.")
    categories: dict[str, Category] = Field(description="By name; the name is empty where there is one only.")


class StationState(BaseModel):
    """What this station serves, and within which limits."""

    detectors: list[DetectorState]
    keeps_images: bool
    waiting: int = Field(description="Inspections that a person should decide.")
    sample: float = Field(description="Share of images drawn at random for review.")
    max_bytes: int
    max_pixels: int


class Recalibration(BaseModel):
    """How decisions become a new threshold."""

    model_config = _example(category="", keep=True, sampled=True) | ConfigDict(extra="forbid")
    category: str = Field("", max_length=200, description="Of a detector of several.")
    keep: bool = Field(True, description="Also count the images that calibrated it before.")
    sampled: bool = Field(
        False,
        description="Of good images, only those drawn at random. Those that a person saw because of their verdict "
        "are not like images to come, and raise the threshold.",
    )
    rate: float | None = Field(
        None, ge=1e-6, le=0.5, description="False-alarm rate asked for; null: the detector's own."
    )
    miss_rate: float | None = Field(
        None,
        ge=1e-6,
        le=0.5,
        description="Share of defects that may be missed; decided defects then set the threshold.",
    )


class RecalibrationDone(BaseModel):
    """What came of it."""

    before: CalibrationState
    after: CalibrationState
    good: int = Field(description="Good images that took part.")
    defects: int = Field(description="Defects that took part.")
    seen: int = Field(description="Good images left out because the detector has learned from them.")
    counted: int = Field(description="Good images left out because their scores are among those that were kept.")
    lost: int = Field(description="Decided images that are no longer kept.")
    digest: str = Field(description="SHA-256 of the detector's new file, in hex.")


class Health(BaseModel):
    """Whether the station answers and its log can be read."""

    model_config = _example(status="ok", version="0.1.0")
    status: Literal["ok"]
    version: str
