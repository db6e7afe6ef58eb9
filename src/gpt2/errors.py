"""Errors that a user can mend. The command line prints them as one line and exits with 2."""


class UserError(ValueError):
    """Says what was given, what is needed and what to type."""

    aloud: bool | None = None
    """whether this rank is the one that prints it; None where the ranks have not agreed on one"""


class ConfigError(UserError):
    """A flag, a configuration file or their combination cannot work."""


class DataError(UserError):
    """Training data is missing, incomplete or does not fit the run."""


class TrainingError(UserError):
    """Training cannot go on: it diverges, or its batch does not fit into the memory."""


class Diverged(TrainingError):
    """Training has given up: what it would meet again, however often it is started."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, not trusted, or contradicts the run."""
