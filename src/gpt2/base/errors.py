"""Errors that a user can fix. The command line prints them as one line and exits with code 2."""

import errno

from gpt2.base import addresses

OUT_OF_MEMORY = (
    "out of memory",  # CUDA and its allocator, NCCL's "Cuda failure 2", Triton's loader
    "OutOfMemoryError",  # Inductor and Dynamo, which name the error that they wrap
    "CUDA_ERROR_OUT_OF_MEMORY",  # the driver
    "STATUS_ALLOC_FAILED",  # cuBLAS, cuSPARSE, cuDNN 8
    "ALLOCATION_FAILED",  # cuDNN 9
    "can't allocate memory",  # torch's allocator for the CPU
    "Cannot allocate memory",  # the system, as for mmap
)
"""a RuntimeError whose message contains one of these reports it; torch wraps some more than once"""


OF_A_NAME = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG),
)
"""what the system says of a name that cannot be used as it is"""


def is_of_a_name(error: BaseException) -> bool:
    """Whether it is about a file that cannot be used as it is, such as a circle of links, which the
    user can mend. A missing file is no such error: it may be a defect of the program."""
    return isinstance(error, OSError) and error.filename is not None and error.errno in OF_A_NAME


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host ran out of memory."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError"
        or any(words in str(error) for words in OUT_OF_MEMORY)
    )


class UserError(Exception):
    """Its message says what was given, what is expected and what to type. Addresses in it have no
    passwords."""

    def __str__(self) -> str:
        return addresses.without_secrets(super().__str__())


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


def described(error: BaseException) -> str:
    """An error as text: its message and, unless that is for users, its type."""
    if isinstance(error, UserError):
        return str(error)
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    return addresses.without_secrets(text)
