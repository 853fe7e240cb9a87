from pathlib import Path

import numpy as np
import pytest

from unflaw.evaluation import text
from unflaw.inference.annotations import Coco, LabelMe
from unflaw.io.words import count
from unflaw.postprocessing.results import Region, Result
from unflaw.report import html


@pytest.mark.parametrize(
    "number, words, expected",
    [
        (0, ["image"], "0 images"),
        (1, ["image"], "1 image"),
        (2, ["image"], "2 images"),
        (1, ["category", "categories"], "1 category"),
        (3, ["category", "categories"], "3 categories"),
    ],
)
def test_a_number_has_the_right_form_of_its_noun(number, words, expected):
    assert count(number, *words) == expected


def test_summaries_of_one_image_are_in_the_singular(tmp_path):
    metrics = {"n_images": 2, "n_good": 1, "false_alarms": 1, "missed": 1, "review_good": 0, "review_defective": 1}
    assert text._verdicts(metrics) == (
        "2 images: 1 false alarm among 1 good one, 1 missed of 1 defective one, for review 0 good and 1 defective one"
    )
    rows = [{"label": 0, "outcome": "false alarm"}, {"label": 1, "outcome": "review"}]
    assert html._summary(rows) == (
        "At the calibrated threshold, 1 of 1 good image (100.0%) raised a false alarm and 0 of 1 defective image "
        "(0.0%) passed as good. 1 of 2 images (50.0%) went to review."
    )
    region = Region((0, 0, 4, 4), 16, 2.0, contour=((0.0, 0.0), (4.0, 0.0), (4.0, 4.0)))
    image = np.zeros((4, 4, 3), np.uint8)
    result = Result(1.0, 0.5, "defect", image[..., 0], (region,), image, (0, 0, 4, 4), size=(4, 4))
    coco, labelme = (Coco(tmp_path / "a"), "1 region on 1 image (COCO)"), (LabelMe(tmp_path), "1 file (LabelMe)")
    for sink, summary in (coco, labelme):
        sink.add(Path("a.png"), result)
        assert sink.close().endswith(f": {summary}")
