"""What a user can mend."""


class InputError(Exception):
    """A problem with input or settings that its user can mend; shown as one message, without a traceback."""
