"""Errors that end a command with a sentence."""


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one clear sentence: what was wrong, where, and what to do. The command line prints it
    without a traceback and exits with status 2; the server answers with a 4xx status.
    """


class CommunicationError(RuntimeError):
    """Another worker of a crew is gone or does not answer; the message says what this one waited for.

    The command line prints it without a traceback and exits with status 1.
    """
