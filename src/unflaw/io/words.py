"""Numbers in messages, in singular and plural."""


def count(number: int, singular: str, plural: str | None = None) -> str:
    """Returns a number with its noun: "1 image", "2 images", "0 images".

    Args:
        number: How many.
        singular: The noun for exactly one.
        plural: The noun for all other numbers; None: the singular with an "s".
    """
    return f"{number} {singular if number == 1 else plural or singular + 's'}"
