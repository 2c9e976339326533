"""The one error class for bad input: names the option, the value and what would be right.
Not here: checks themselves (each room checks its own input), nor errors of PyTorch or the model."""


class InputError(ValueError):
    """Bad input from the user. Recipes print its message alone and exit with status 2."""
