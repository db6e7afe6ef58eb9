"""How long it takes to begin: python bench/start.py

Seconds from the command until its first update begins (its line, less the update itself), for the
demo with its data prepared; with torch.compile, whose first step counts, as it compiles: for the
first time, and when a run before has left its kernels. And `gpt2 --help`.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from turns import spread

GPT2 = (sys.executable, "-m", "gpt2")
STEP = re.compile(r"step 1 \| .*?dt: ([\d.]+)ms")


def first_step(folder: Path, *flags: str, kernels: Path | None = None) -> tuple[float, float]:
    """Seconds until the first update has begun, and until it is done."""
    started = time.perf_counter()
    command = [*GPT2, "train", "--preset", "demo", "--max_steps", "1", "--sample_interval", "None"]
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
                return done - float(found[1]) / 1000, done
    raise SystemExit(f"no step by {' '.join(command)}")


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
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
        times = [
            first_step(folder / name, *flags, "--compile", "on", kernels=folder / "kernels")
            for name in ("first", "second")
        ]
        print(f"until the first update is done, compiled: {times[0][1]:.1f} s")
        print(f"the same with the kernels of the run before: {times[1][1]:.1f} s")


if __name__ == "__main__":
    main()
