"""The error class for bad input: names the option, the value and what would be right.
Not here: checks themselves (each room checks its own input), nor errors of PyTorch or the model."""


class InputError(ValueError):
    """Bad input from the user. Recipes print its message alone and exit with status 2."""


class DivergedError(InputError):
    """A training whose loss or alpha is infinite or NaN, most often of too high a learning rate."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """What another library's error says, as a part of one line: at most `limit` characters."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
