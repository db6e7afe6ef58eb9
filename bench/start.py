"""How long it takes to begin: python bench/start.py

Seconds from the command until its first update begins (its line, less the update itself), for the
demo with its data prepared; with torch.compile, whose first step counts, as it compiles: for the
first time, and when a run before has left its kernels. And `gpt2 --help`. `--ranks 2` is with that
many ranks. Beside the time is that of all cores that it used, which other work changes less.
"""

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from turns import spread

GPT2 = (sys.executable, "-m", "gpt2")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
STEP = re.compile(r"step 1 \| .*?dt: ([\d.]+)ms")


def first_step(
    folder: Path, *flags: str, kernels: Path | None = None, ranks: int = 1
) -> tuple[float, float, float]:
    """Seconds until the first update has begun, and until it is done; CPU seconds of the run."""
    started, used = time.perf_counter(), cpu_s()
    of_ranks = (*TORCHRUN, f"--nproc_per_node={ranks}", "-m", "gpt2")
    command = [*(GPT2 if ranks == 1 else of_ranks), "train", "--preset", "demo"]
    command += ["--max_steps", "1", "--sample_interval", "None"]
    process = subprocess.Popen(
        [*command, "--out_dir", str(folder), *flags],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | ({"TORCHINDUCTOR_CACHE_DIR": str(kernels)} if kernels else {}),
    )
    assert process.stdout is not None
    with process:
        for line in process.stdout:
            if found := STEP.match(line):
                done = time.perf_counter() - started
                process.communicate()
                return done - float(found[1]) / 1000, done, cpu_s() - used
    raise SystemExit(f"no step by {' '.join(command)}")


def cpu_s() -> float:
    """Of the processes that this one started, and of theirs, so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=1, help="of the compiled runs")
    options, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first_step(folder / "data", *flags)  # prepares the data, and reads the packages once
        begun, helped = [], []
        for number in range(options.rounds):
            begun.append(first_step(folder / f"{number}", *flags)[0])
            helped.append(seconds([*GPT2, "--help"]))
        print(f"until the first update begins: {spread(begun)} s")
        print(f"gpt2 --help: {spread(helped)} s", flush=True)
        compiled = [*flags, "--compile", "on"]
        kernels, ranks = folder / "kernels", options.ranks
        for name, what in (("first", "for the first time"), ("second", "with those kernels")):
            _, done, cpu = first_step(folder / name, *compiled, kernels=kernels, ranks=ranks)
            print(f"until the first update is done, compiled {what}: {done:.1f} s, CPU {cpu:.1f} s")


if __name__ == "__main__":
    main()
