"""The GPUs that this process sees. The only file that reads CUDA_VISIBLE_DEVICES; without torch."""

import os

from gpt2.config import gpu_list


def ids() -> list[str] | None:
    """The GPUs that CUDA_VISIBLE_DEVICES shows; None if that is all of the machine.

    The variable is rewritten in CUDA's own spelling: CUDA knows neither ranges nor words, and would
    show other GPUs. Raises ConfigError if it is no list of different GPUs.
    """
    given = os.environ.get(gpu_list.VARIABLE)
    if given is None:
        return None
    shown = gpu_list.shown_by(given)
    if shown is None:
        del os.environ[gpu_list.VARIABLE]
    else:
        os.environ[gpu_list.VARIABLE] = ",".join(shown)
    return shown


def ids_of(count: int) -> list[str]:
    """The ids of the `count` GPUs that CUDA shows this process.

    Of several MIG devices, CUDA shows a process only the first; the list has all of them, because
    other processes can use the others.
    """
    shown = ids()
    if shown is None:
        return [str(index) for index in range(count)]
    if count and shown and shown[0].startswith("MIG-"):
        return shown
    return shown[:count]
