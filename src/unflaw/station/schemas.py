"""Requests and answers over HTTP, as the OpenAPI document shows them."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field

if TYPE_CHECKING:
    from unflaw.calibration.thresholds import Calibration

Verdict = Literal["good", "defect", "review"]
Decision = Literal["good", "defect"]
Number = Annotated[int, Field(ge=1, le=2**63 - 1)]
_DIGEST = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


def _no_timestamp(moment: object) -> object:
    if isinstance(moment, str) and "-" not in moment:  # Pydantic would read it as seconds since 1970
        raise ValueError("is not a time such as 2026-11-25T06:12:00Z")
    return moment


def _utc(moment: datetime) -> datetime:
    try:
        return moment.astimezone(timezone.utc)
    except OverflowError as error:
        raise ValueError("lies outside the years 1 to 9999 in UTC") from error


Moment = Annotated[AwareDatetime, BeforeValidator(_no_timestamp), AfterValidator(_utc)]


def _example(**fields: Any) -> ConfigDict:
    return ConfigDict(from_attributes=True, json_schema_extra={"examples": [fields]})


class Options(BaseModel):
    """Options of an inspection."""

    detector: str | None = Field(None, max_length=200, description="Detector; needed if there are several.")
    category: str | None = Field(None, max_length=200, description="Category; needed if the detector has several.")
    name: str | None = Field(None, max_length=200, description="Name of the image; by default that of the file.")


class HistoryQuery(BaseModel):
    """Conditions for inspections, and a page of them."""

    verdict: Verdict | None = None
    detector: str | None = Field(None, max_length=200)
    category: str | None = Field(None, max_length=200)
    since: Moment | None = Field(None, description="Earliest time, with a time zone.")
    until: Moment | None = Field(None, description="Time, with a time zone, before which they were logged.")
    text: str | None = Field(None, max_length=200, description="Part of the image's name.")
    waiting: bool = Field(False, description="Only those without a decision that are not good or drawn at random.")
    decided: bool | None = Field(None, description="Only those with a decision, or only those without.")
    before: Number | None = Field(None, description="`next` of the previous page.")
    limit: int = Field(50, ge=1, le=200)


class Problem(BaseModel):
    """Body of every answer with a status of 400 or more."""

    model_config = _example(detail="detector screw has no category 'nut'; name none")
    detail: str = Field(description="Problem and remedy, for people.")


class Region(BaseModel):
    """Area above the detector's pixel threshold. Detectors may add fields."""

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
    """Inspection, as in the log."""

    model_config = _example(**_INSPECTION)
    id: int
    time: datetime = Field(description="Time of logging, UTC.")
    name: str
    digest: str = Field(description="SHA-256 of the image file, in hex.")
    size: int = Field(description="Size of the image file, bytes.")
    width: int = Field(description="Width of the upright image, pixels.")
    height: int = Field(description="Height of the upright image, pixels.")
    source: str | None = Field(None, description="Path of a watched file; null for images sent over HTTP.")
    detector: str
    detector_digest: str = Field(description="SHA-256 of the detector file, in hex.")
    category: str = Field(description="Category of the detector; empty if it has none.")
    score: float = Field(description="Raw anomaly score; comparable only between images of one detector and category.")
    p_value: float = Field(description="Share of good images that score at least as high, in (0, 1].")
    p_estimated: float | None = Field(
        None, description="Estimate that can be smaller than any p_value; only with an extrapolated tail."
    )
    threshold: float = Field(description="Score above which an image is a defect.")
    verdict: Verdict
    regions: list[Region] = Field(description="Largest peak first.")
    sampled: bool = Field(description="True if drawn at random for review, whatever the verdict.")
    decision: Decision | None = Field(None, description="Decision of a person.")
    decided_by: str | None = None
    decided_at: datetime | None = None


class History(BaseModel):
    """Page of inspections, newest first."""

    model_config = _example(items=[_INSPECTION], next=4711)
    items: list[Inspection]
    next: int | None = Field(None, description="Value of `before` for the next page; null at the end.")


class Images(BaseModel):
    """Images and contours of an inspection."""

    model_config = _example(
        images=["image", "heat", "overlay", "mean", "uncertainty", "mask", "restored"],
        contours=[[[212, 90], [261, 90], [261, 130], [212, 130]]],
    )
    images: list[str] = Field(description="Names for `/inspections/{id}/images/{name}`.")
    contours: list[list[Annotated[list[float], Field(min_length=2, max_length=2)]]] = Field(
        description="Corners (x, y) of the polygon around each region, in pixels of the image. They are not logged: "
        "after a recalibration the regions may differ from those in the log."
    )


class Review(BaseModel):
    """Decision of a person."""

    model_config = _example(decision="good", by="A. Lovelace") | ConfigDict(extra="forbid")
    decision: Decision | None = Field(description="Decision; null withdraws an earlier one.")
    by: str = Field(min_length=1, max_length=100, description="Name of the person.")


class CalibrationState(BaseModel):
    """Calibration of a category."""

    threshold: float
    false_alarm_rate: float
    described: str = Field(description="Guarantee, in a sentence.")

    @classmethod
    def of(cls, calibration: Calibration) -> CalibrationState:
        return cls(threshold=calibration.threshold, false_alarm_rate=calibration.rate, described=calibration.describe())


class Category(CalibrationState):
    """Calibration of a category, and the decisions available to recalibrate it."""

    decided_good: int
    decided_good_sampled: int = Field(description="Good ones that were drawn at random for review.")
    decided_defect: int


class DetectorState(BaseModel):
    """Detector of the station."""

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
    digest: str = Field(description="SHA-256 of the detector file, in hex.")
    fixed: str | None = Field(None, description="Reason why it cannot be recalibrated; null if it can.")
    categories: dict[str, Category] = Field(description="Categories by name; the name is empty if there is only one.")


class StationState(BaseModel):
    """Detectors and limits of the station."""

    detectors: list[DetectorState]
    keeps_images: bool
    waiting: int = Field(description="Number of inspections that wait for a decision.")
    sample: float = Field(description="Share of images drawn at random for review.")
    max_bytes: int
    max_pixels: int


class Recalibration(BaseModel):
    """Options of a recalibration."""

    model_config = _example(category="", append=True, sampled=True) | ConfigDict(extra="forbid")
    category: str = Field("", max_length=200, description="Category, for a detector with several.")
    append: bool = Field(True, description="Also use the scores of the previous calibration.")
    sampled: bool = Field(
        False,
        description="Use only good images drawn at random. Those reviewed because of their verdict are not "
        "representative and raise the threshold.",
    )
    rate: float | None = Field(None, ge=1e-6, le=0.5, description="False-alarm rate; null: that of the detector.")
    miss_rate: float | None = Field(
        None, ge=1e-6, le=0.5, description="Miss rate; if given, images decided to be defects set the threshold."
    )


class RecalibrationDone(BaseModel):
    """Result of a recalibration."""

    before: CalibrationState
    after: CalibrationState
    good: int = Field(description="Number of good images used.")
    defects: int = Field(description="Number of defects used.")
    seen: int = Field(description="Number of good images left out because the detector was trained on them.")
    counted: int = Field(
        description="Number of good images left out because the previous calibration already has their scores."
    )
    lost: int = Field(description="Number of images left out because they are no longer kept.")
    digest: str = Field(description="SHA-256 of the new detector file, in hex.")


class Health(BaseModel):
    """State of the station."""

    model_config = _example(status="ok", version="0.2.0")
    status: Literal["ok"]
    version: str
