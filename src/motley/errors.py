"""The one kind of error that is the user's to mend."""


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one clear sentence: what was wrong, where, and what to do. The command line prints it
    without a traceback and exits with status 2; the server answers with a 4xx status.
    """
