"""Errors that a user can fix. The command line prints them as one line and exits with code 2."""

# Messages of the CPU allocator, CUDA and cuBLAS where torch raises no OutOfMemoryError.
OUT_OF_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "STATUS_ALLOC_FAILED")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the device or the host ran out of memory."""
    return type(error).__name__ == "OutOfMemoryError" or any(
        words in str(error) for words in OUT_OF_MEMORY
    )


class UserError(Exception):
    """Its message says what was given, what is expected and what to type."""


class ReportedByOtherRank(UserError):
    """This rank fails with an error that another rank prints. `__cause__` is the error itself."""


class ConfigError(UserError):
    """A flag, a configuration file or a combination of flags is invalid."""


class DataError(UserError):
    """Training data is missing, incomplete or does not match the run."""


class WrongContent(DataError):
    """Training data is not what it was, or should be; starting the run again would not help."""


class TrainingError(UserError):
    """Training cannot continue: it diverges, or its batch does not fit into memory."""


class Diverged(TrainingError):
    """Training diverged and gave up; starting the run again would not help."""


class FolderInUse(UserError):
    """Another process works in the folder."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, not trusted, or contradicts the run."""
