"""Words for messages."""

from __future__ import annotations


def count(number: int, singular: str, plural: str | None = None) -> str:
    """A number with its noun: "1 image", "2 images".

    Args:
        number: Of things.
        singular: Their name, of one.
        plural: Their name, of several; None: the singular with an s.
    """
    return f"{number} {singular if number == 1 else plural or singular + 's'}"
