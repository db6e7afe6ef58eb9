"""Errors that a user can mend. The command line prints them as one line and exits with 2."""

# What the CPU's allocator, CUDA and cuBLAS say where torch raises no OutOfMemoryError.
OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the memory of the device, or of the host, did not suffice."""
    return type(error).__name__ == "OutOfMemoryError" or any(
        words in str(error) for words in OUT_OF_MEMORY
    )


class UserError(Exception):
    """Its message says what was given, what is expected and what to type."""

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
