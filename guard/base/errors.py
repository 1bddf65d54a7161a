"""The two ways in which a run ends without a result: bad input (exit status 2) and a refusal (3), a line each."""


class InputError(ValueError):
    """What is wrong, where, and what to do about it."""


class Refused(Exception):  # noqa: N818
    """Nothing is published: the guard is not safer, or not equal to its hooks, or cannot be made."""


def first_line(error: BaseException) -> str:
    """Returns the first line of what an error says, or its name."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
