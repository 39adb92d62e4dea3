"""The one exception for input that a person can mend."""


class InputError(ValueError):
    """Bad input: the message is one line that says what is wrong and what to do.

    The command lines print it without a traceback and exit with 2.
    """
