import pytest

from unflaw.words import count


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
