"""The one error a user causes: bad input, said in one line, exit status 2."""


class InputError(ValueError):
    """What is wrong, where, and what to do about it, in one line."""
