"""Lists of GPUs, as in `--gpus 0,2-3` and CUDA_VISIBLE_DEVICES. Pure."""

import re
from collections.abc import Sequence

from gpt2.base.errors import ConfigError

VARIABLE = "CUDA_VISIBLE_DEVICES"
ALL = "all"
NONE = ("", "-1", "none", "void", "nodevfiles", "10000")
"""no GPU; the last four as NVIDIA's containers, Slurm and HTCondor write it"""
EXPECTED = "GPUs separated by commas, such as 0,2-3 or GPU-8f3a51c2, or all, or none"
INDEX = re.compile(r"0|[1-9][0-9]{0,2}")
RANGE = re.compile(f"({INDEX.pattern})-({INDEX.pattern})")
HEX = "[0-9A-Fa-f][0-9A-Fa-f-]*"
UUID = re.compile(rf"GPU-{HEX}|MIG-(GPU-)?{HEX}(/[0-9]+/[0-9]+)?")
FROM_A_NEGATIVE_INDEX_ON = re.compile(r"(^|,)\s*-[0-9]+\s*(,.*)?$")


def parse(text: str, source: str) -> list[str] | None:
    """The GPUs of a list by index, UUID or MIG id; None for `all`. Messages name `source`, the flag
    or variable that the list is from.

    Raises ConfigError for what is no list of different GPUs.
    """
    word = text.strip().lower()
    if word == ALL:
        return None
    if word in NONE:
        return []
    found: list[str] = []
    for item in text.strip().removesuffix(",").split(","):
        gpus = _gpus(item.strip())
        if not gpus:
            raise _invalid(source, text, f"{item.strip()!r} is not a GPU", found)
        for gpu in gpus:
            if any(is_same(gpu, other) for other in found):
                raise _invalid(source, text, f"duplicate GPU {gpu}", found)
            found.append(gpu)
    return found


def shown_by(visible: str) -> list[str] | None:
    """The GPUs that a value of CUDA_VISIBLE_DEVICES shows; None for all of the machine.

    As in CUDA, a negative index hides itself and what follows it. Raises ConfigError as `parse`.
    """
    return parse(FROM_A_NEGATIVE_INDEX_ON.sub("", visible), VARIABLE)


def is_uuid(gpu: str) -> bool:
    """Whether it is a UUID or MIG id, not an index."""
    return not gpu.isdigit()


def is_same(one: str, other: str) -> bool:
    """Whether two ids may be those of one GPU: of a UUID, the beginning is enough."""
    if is_uuid(one) and is_uuid(other) and "/" not in one + other:
        return one.startswith(other) or other.startswith(one)
    return one == other


def find(gpu: str, among: Sequence[str]) -> str | None:
    """The one of several ids that names this GPU; None if none does, or more than one."""
    same = [other for other in among if is_same(gpu, other)]
    return same[0] if len(same) == 1 else None


def is_gpu(text: str) -> bool:
    """Whether the text is the id of a GPU."""
    return bool(INDEX.fullmatch(text) or UUID.fullmatch(text))


def _gpus(item: str) -> list[str]:
    """The GPUs of one item of a list; none if it is invalid."""
    if is_gpu(item):
        return [item]
    if ends := RANGE.fullmatch(item):
        return [str(index) for index in range(int(ends[1]), int(ends[2]) + 1)]
    return []


def _invalid(source: str, text: str, problem: str, understood: Sequence[str]) -> ConfigError:
    so_far = ", ".join(understood) or "nothing"
    return ConfigError(f"{source} {text!r}: {problem} (understood: {so_far}); expected {EXPECTED}")
