"""torch.compile, whose kernels stay for the next run."""

import contextlib
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import cast

import torch
from torch import nn

from gpt2.base import user_folders
from gpt2.base.errors import ConfigError
from gpt2.distributed import precision, rendezvous

logger = logging.getLogger(__name__)
KERNELS = "TORCHINDUCTOR_CACHE_DIR"
WORKERS = "TORCHINDUCTOR_COMPILE_THREADS"
MOST_WORKERS = 32
"""torch's own limit"""
MOST_SHAPES = 64
"""torch's own limit is 8, after which it computes without compiling; each phase of a batch-size
ramp may have two shapes, beside those of validation"""


def is_used(wanted: str, device: torch.device) -> bool:
    """Whether training is compiled; `wanted` is the value of --compile.

    Raises ConfigError if that is `on` and Triton cannot work, or not as --deterministic requests;
    with `auto`, that is a warning.
    """
    if wanted == "off" or (wanted == "auto" and not precision.can_compile(device)):
        return False
    if device.type != "cuda":
        return True
    lacking = missing()
    # torch 2.9 has no torch._inductor.config.deterministic.
    if torch.are_deterministic_algorithms_enabled() and torch.__version__.startswith("2.9."):
        lacking = "torch 2.10 or newer beside --deterministic"
    if lacking is not None and wanted == "on":
        raise ConfigError(f"compile=on needs {lacking}, or use --compile off")
    if lacking is not None:
        logger.warning("training is not compiled, which makes it slower: that needs %s", lacking)
    return lacking is None


def missing() -> str | None:
    """What Triton would need to build the code that starts its kernels, and what to install; None
    if it has all. It looks for them as `triton/runtime/build.py` does."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return "a C compiler: apt install gcc, or set CC"
    headers = sysconfig.get_path("include", "posix_prefix")
    command = [compiler, "-E", "-x", "c", "-", f"-I{headers}"]
    try:
        subprocess.run(command, input=b"#include <Python.h>", check=True, capture_output=True)
    except subprocess.CalledProcessError:
        return f"Python.h in {headers}: apt install python3-dev"
    except OSError as error:
        return f"a C compiler, and the one in CC is none ({error})"
    return None


def compiled(net: nn.Module) -> nn.Module:
    """`net`, which its first call compiles, unless an earlier process has compiled the same.

    torch keeps the kernels below /tmp, which a restart of the machine empties; here they stay in
    the user's cache folder, or where TORCHINDUCTOR_CACHE_DIR says. Machines with other processors
    may share that folder: each kind has its own part.

    Each process builds kernels with its share of the machine's cores, unless
    TORCHINDUCTOR_COMPILE_THREADS says otherwise: torch would start as many workers as there are
    cores, up to 32, for every rank.

    Each shape has its own graph. By default, torch compiles the second shape of an input as one of
    any size, and everything stays on that slower graph from then on.
    """
    if KERNELS not in os.environ and (caches := user_folders.cache()) is not None:
        with contextlib.suppress(OSError):  # a home that cannot be written
            folder = caches / "kernels" / _processor()
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                os.environ[KERNELS] = str(folder)
    _, _, _, ranks = rendezvous.env_rank()
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault(WORKERS, str(max(1, min(MOST_WORKERS, cores // ranks))))
    torch._dynamo.config.recompile_limit = MOST_SHAPES
    return cast(nn.Module, torch.compile(net, dynamic=False))


def _processor() -> str:
    """A word for this processor's instructions: kernels for the CPU may use all of them."""
    known = Path("/proc/cpuinfo").read_text()
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", known, re.MULTILINE)
    names = sorted(found[1].split()) if found else []
    return hashlib.sha256(" ".join(names).encode()).hexdigest()[:12]
