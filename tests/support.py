"""What several tests need: a small corpus, a small run, real processes."""

import itertools
import json
import os
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from gpt2.config import options, presets
from gpt2.config.run import RunConfig
from gpt2.data.corpus import Corpus, Document, in_blocks

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "src" / "train_improved.py"
SMALL_RUN: dict[str, object] = {
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 8,
    "window": 8,
    "dropout": 0.1,
    "total_batch_size": 32,
    "mini_batch_size": 4,
    "max_steps": 20,
    "optimizer": "adamw",
    "learning_rate": 6e-3,
    "warmup_steps": 5,
    "eval_interval": 5,
    "eval_batches": 2,
    "sample_interval": None,
    "checkpoint_interval": 10,
    "device": "cpu",  # `auto` depends on the machine, for the dtype too
    "dtype": "float32",
}
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-3}
"""how far the losses of runs with other micro-batches or other numbers of ranks are apart at most
(docs/operations.md). A processor without products of bfloat16 emulates them, slowly."""

HANG_S = 300
"""nothing that is merely slow takes so long, also on a machine with much else to do"""


def wait_until(happens: Callable[[], object], otherwise: Callable[[], object] = str) -> None:
    """Returns once `happens()` is true. Fails with what `otherwise()` says if it never is."""
    deadline = time.monotonic() + HANG_S
    while not happens():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.01)


def small_documents(skip: int = 0) -> Iterator[Document]:
    """Some modules of the standard library."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    names = ("abc", "bisect", "calendar", "cmd", "csv", "glob", "heapq", "keyword", "sched")
    for name in names[skip:]:
        yield Document((stdlib / f"{name}.py").read_text(encoding="utf-8"))


def small_text() -> str:
    return "".join(document.text for document in small_documents())


SMALL_CORPUS = Corpus("small", "a few modules", 8000, in_blocks(small_documents))


def shard_tokens(folder: Path) -> list[int]:
    """All tokens of a data folder, in the order of its shards."""
    files = sorted(folder.glob("*.npy"), key=lambda path: path.stem.split("_")[-1])
    return [token for path in files for token in np.load(path).tolist()]


def write_tasks(path: Path, count: int = 6) -> Path:
    """A file in the format of HellaSwag's validation split."""
    things = ("a door", "a window", "an old box", "the gate", "a jar", "the lid")
    endings = ("opens it slowly.", "paints it blue.", "sings to it.", "eats all of it [step] now.")
    chosen = itertools.islice(itertools.cycle(things), count)
    tasks = [
        {
            "activity_label": "Opening things",
            "ctx_a": (begin := " ".join([f"Somebody sees {thing}."] * (1 + number % 3))),
            "ctx_b": "the person",
            "ctx": f"{begin} the person",
            "endings": endings,
            "label": number % 4,
        }
        for number, thing in enumerate(chosen)
    ]
    path.write_text("".join(json.dumps(task) + "\n" for task in tasks))
    return path


def small_config(data_root: Path, out: Path, /, **changes: object) -> RunConfig:
    """A run of seconds that keeps everything under `out`."""
    folders = {"checkpoint_dir": out / "checkpoints", "runs_dir": out / "runs"}
    folders["log_dir"] = out / "logs"
    return options.overlay(
        presets.preset("demo"), {**SMALL_RUN, **folders, "data_root": data_root, **changes}
    )


def small_flags(data_root: Path, out: Path, /, **changes: object) -> list[str]:
    """The same run as flags of train_improved.py."""
    values = {"data_root": data_root, **SMALL_RUN, **changes}
    flags = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    return ["--preset", "demo", "--out_dir", str(out), *flags]


def train_command(flags: list[str], ranks: int | None = None, script: Path = TRAIN) -> list[str]:
    """The command line of a run in processes of its own; `ranks` starts it through torchrun."""
    if ranks is None:
        return [sys.executable, str(script), *flags]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, *launcher, str(script), *flags]


def run_command(
    command: list[str], cwd: Path = ROOT, expect: int | None = 0, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs to the end; fails with the whole output if the exit code is another than expected."""
    done = subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        timeout=HANG_S,
    )
    assert expect is None or done.returncode == expect, f"{done.stdout}\n{done.stderr}"
    return done


_LINE = re.compile(
    r"(step \d+ \| epoch \d+ \| (?:loss|val loss): \S+(?: \| lr: \S+ \| norm: \S+)?)"
)


def loss_lines(log: Path) -> list[str]:
    """Step and validation lines of a log, without times; the last one of each step."""
    lines: dict[str, str] = {}
    for line in log.read_text().splitlines():
        if found := _LINE.match(line):
            lines[found.group(1).split("loss:")[0]] = found.group(1)
    return list(lines.values())


def losses(log: Path) -> dict[int, float]:
    """Step -> training loss."""
    found = re.findall(r"step (\d+) \| epoch \d+ \| loss: (\S+)", log.read_text())
    return {int(step): float(loss) for step, loss in found}
