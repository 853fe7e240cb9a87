"""Numbers in messages, in singular and plural."""


def count(number: int, singular: str, plural: str | None = None) -> str:
    """Format a number with its noun: "1 image", "2 images"; the default plural adds an "s"."""
    return f"{number} {singular if number == 1 else plural or singular + 's'}"
