"""Whole runs as users start them, and how they end: parts of `gpu_check.py`, not a bench.

The ranks of a run are forked from a process that has torch, as `tests/forked_ranks.py` does.
"""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gpu_machine
import torch
from gpu_check import ROOMY_GB, ROOT, Setting
from gpu_report import Recorder

from gpt2.checkpoint import store
from gpt2.config import memory

sys.path.append(str(ROOT / "tests"))
from forked_ranks import Ranks

SCRIPT = ROOT / "bench" / "gpu_rank.py"
STEPS, EVENT_AT = 8, 4
STOPPED = 128 + signal.SIGTERM
"""exit code of a run that SIGTERM has stopped"""
HANG_S = 60
"""seconds after which a rank that has not ended counts as hanging"""
ROWS_OF_FIT = 64
TEST_TOOLS = ("pytest", "hypothesis")
OUT_OF_MEMORY = "do not fit into the memory"


def flags(setting: Setting, out: Path, **changes: object) -> list[str]:
    """Of a short run with everything in `out`; medium-sized, or tiny for --smoke."""
    length = 64 if setting.is_smoke else 1024
    shape: dict[str, object] = {"n_layer": 4, "block_size": length}
    if setting.is_smoke:
        shape |= {"n_layer": 1, "n_head": 2, "n_embd": 32}
    given: dict[str, object] = {
        **shape,
        "data_root": gpu_machine.made_up_data(setting),
        "out_dir": out,
        "device": gpu_machine.own_device().type,
        "compile": "off",
        "total_batch_size": 16 * length,
        "mini_batch_size": 4,
        "max_steps": STEPS,
        "decay_steps": STEPS,
        "warmup_steps": 2,
        "eval_interval": None,
        "hellaswag_interval": None,
        "sample_interval": None,
        "checkpoint_interval": 2,
        "resume": "latest",
        **changes,
    }
    named = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    return ["--preset", "gpt2-124m", *named]


def losses(out: Path) -> dict[int, float]:
    """Step -> loss, in full precision; the last one of each step."""
    lines = (out / "logs" / "metrics.jsonl").read_text().splitlines()
    records = map(json.loads, lines)
    return {each["step"]: each["loss"] for each in records if each["kind"] == "step"}


def difference(one: Path, other: Path) -> str:
    """`none`, or what the losses and last weights of two runs differ in."""
    theirs, ours = losses(one), losses(other)
    if set(theirs) != set(range(1, STEPS + 1)) or set(ours) != set(theirs):
        return f"steps {sorted(theirs)} and {sorted(ours)}"
    apart = [step for step in theirs if theirs[step] != ours[step]]
    if apart:
        most = max(abs(theirs[step] - ours[step]) for step in apart)
        return f"losses from step {apart[0]} on, by {most:.1e} at most"
    name = f"step_{STEPS:06}.pt"
    states = [store.load(out / "checkpoints" / name)["model"] for out in (one, other)]
    names = [name for name, part in states[0].items() if not torch.equal(part, states[1][name])]
    return f"{len(names)} weights, as {names[0]}" if names else "none"


def on_two_ranks(setting: Setting, out: Path, *situation: str) -> tuple[list[int | None], str]:
    """Exit codes of two ranks on one device (None: it hangs), and what they have printed."""
    out.mkdir(exist_ok=True)
    options = flags(setting, out, collective_timeout=HANG_S / 2)
    arguments = ["--share_gpu", *situation, *options, "--deterministic"]
    with Ranks(arguments, 2, out, SCRIPT) as ranks:
        for process in ranks.processes:
            process.join(HANG_S * (5 if setting.is_smoke else 1))
        codes = [process.exitcode for process in ranks.processes]
        return codes, ranks.text()


def ranks(record: Recorder, setting: Setting) -> None:
    """Four runs at a time: whole; stopped; one rank killed; one rank out of memory."""
    folder = setting.folder / "ranks"
    folder.mkdir()
    situations = {
        "whole": [],
        "stopped": ["--stop_at", str(EVENT_AT)],
        "killed": ["--kill_at", str(EVENT_AT)],
        "memory": ["--out_of_memory_at", str(EVENT_AT)],
    }
    with ThreadPoolExecutor(1 if setting.is_smoke else 4) as pool:
        first = {
            name: pool.submit(on_two_ranks, setting, folder / name, *situation)
            for name, situation in situations.items()
        }
        ended = {name: future.result() for name, future in first.items()}
        again = ("stopped", "killed", "memory")
        second = {name: pool.submit(on_two_ranks, setting, folder / name) for name in again}
        resumed = {name: future.result() for name, future in second.items()}
    record_ends(record, ended)
    for name, (codes, text) in resumed.items():
        with record.attempt(f"{name}, then resumed", "as if never interrupted"):
            found = "failed" if any(codes) else difference(folder / "whole", folder / name)
            record.add(
                f"{name}, then resumed: different",
                found,
                "none",
                found == "none",
                details=[] if found == "none" else text.splitlines()[-20:],
            )


def record_ends(record: Recorder, ended: dict[str, tuple[list[int | None], str]]) -> None:
    """How the first runs end. Of a killed rank's, the other may end by itself or by torchrun."""
    predicted: dict[str, tuple[str, Callable[[list[int | None], str], object]]] = {
        "whole": ("0, 0", lambda codes, _: codes == [0, 0]),
        "stopped": (f"{STOPPED}, {STOPPED}", lambda codes, _: codes == [STOPPED, STOPPED]),
        "killed": ("not 0, -9", lambda codes, _: codes[1] == -signal.SIGKILL and codes[0]),
        "memory": ("not 0, 2", lambda codes, text: codes[1] == 2 and OUT_OF_MEMORY in text),
    }
    for name, (codes, text) in ended.items():
        words, is_good = predicted[name]
        is_ok = bool(is_good(codes, text)) and None not in codes
        shown = ", ".join("hangs" if code is None else str(code) for code in codes)
        lines = [line for line in text.splitlines() if "error" in line.lower()]
        record.add(
            f"{name}: exit codes of the ranks",
            shown,
            words,
            is_ok,
            details=lines[-3:] if is_ok else text.splitlines()[-20:],
        )


def train(arguments: list[str], **variables: str) -> None:
    """A run in a process of its own. Raises RuntimeError, with the end of its output, if it neither
    finishes nor is stopped by a signal."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout, flush=True)
    if done.returncode not in (0, STOPPED):
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        raise RuntimeError(f"exit code {done.returncode}: {lines[-1] if lines else ''}")


def determinism(record: Recorder, setting: Setting) -> None:
    """A whole run, and one that stops and is resumed twice from there; each compiles by itself."""
    folder = setting.folder / "determinism"
    folder.mkdir()
    compiled = "off" if setting.is_smoke else "auto"  # torch 2.9 cannot do both

    def run(name: str, kernels: str, *more: str, **changes: object) -> None:
        arguments = flags(setting, folder / name, compile=compiled, **changes)
        train(
            [*more, *arguments, "--deterministic"],
            TORCHINDUCTOR_CACHE_DIR=str(folder / f"kernels_{kernels}"),
        )

    with ThreadPoolExecutor(1 if setting.is_smoke else 2) as pool:
        whole = pool.submit(run, "whole", "1")
        pool.submit(run, "stopped", "2", "--stop_at", str(EVENT_AT)).result()
        begun = folder / "stopped" / "checkpoints" / f"step_{EVENT_AT - 1:06}.pt"
        resumes = [
            pool.submit(run, f"resumed_{kernels}", kernels, resume=begun) for kernels in "34"
        ]
        whole.result()
        for resumed in resumes:
            resumed.result()
    for name in ("resumed_3", "resumed_4"):
        found = difference_after(folder, name)
        record.add(
            f"{name.replace('_', ' with cache ')}: different", found, "none", found == "none"
        )


def difference_after(folder: Path, name: str) -> str:
    """As `difference`, of the steps after the stop."""
    whole, resumed = losses(folder / "whole"), losses(folder / name)
    wanted = range(EVENT_AT, STEPS + 1)
    if any(whole[step] != resumed.get(step) for step in wanted):
        return f"losses: {[whole[step] for step in wanted]} and {list(resumed.values())}"
    states = [
        store.load(folder / each / "checkpoints" / f"step_{STEPS:06}.pt")["model"]
        for each in ("whole", name)
    ]
    apart = [key for key, part in states[0].items() if not torch.equal(part, states[1][key])]
    return f"{len(apart)} weights, as {apart[0]}" if apart else "none"


def fits(record: Recorder, setting: Setting, *sizes_gb: int) -> None:
    """GPT-2 124M, 64 rows in a step, on a part of the memory: it finds what fits, and trains."""
    on_cuda = torch.cuda.is_available()
    whole_gb = torch.cuda.mem_get_info()[1] / gpu_machine.GB if on_cuda else math.inf
    for size in (size for size in sizes_gb if size > whole_gb):
        record.add(f"{size} GB", f"left out: the GPU has {whole_gb:.0f} GB")
    at_once = len(sizes_gb) if on_cuda and whole_gb >= ROOMY_GB else 1
    with ThreadPoolExecutor(at_once) as pool:
        notes = {size: pool.submit(fitted, setting, size) for size in sizes_gb if size <= whole_gb}
    run = gpu_machine.run_config(setting, ROWS_OF_FIT)
    for size_gb, future in notes.items():
        with record.attempt(f"{size_gb} GB", "trains"):
            found = future.result()
            rows = memory.automatic_rows(run, size_gb * 10**9, memory.computation(run, ranks=1))
            is_known = on_cuda and not setting.is_smoke
            is_ok = found["rows"] == rows and found["peak_gb"] <= size_gb if is_known else None
            peak = gpu_machine.shown_gb(found["peak_gb"])
            record.add(
                f"{size_gb} GB",
                f"trains with {found['rows']} rows at once, {peak} reserved",
                f"trains with {rows} rows at once, in {size_gb} GB" if is_known else "trains",
                is_ok,
                **found,
            )


def fitted(setting: Setting, size_gb: int) -> dict[str, Any]:
    """Rows of a micro-batch, and peak memory of a run of two steps."""
    out = setting.folder / f"memory_{size_gb}"
    out.mkdir()
    notes = out / "notes.json"
    changes: dict[str, object] = {"max_steps": 2, "checkpoint_interval": None}
    if not setting.is_smoke:
        compiled = "on" if gpu_machine.compiles(setting) else "off"
        changes |= {"n_layer": 12, "total_batch_size": ROWS_OF_FIT * 1024, "compile": compiled}
    arguments = flags(setting, out, mini_batch_size="auto", **changes)
    train(["--memory_gb", str(size_gb), "--notes", str(notes), *arguments])
    found: dict[str, Any] = json.loads(notes.read_text())
    return found


def tests(record: Recorder, setting: Setting) -> None:
    """`pytest tests/cuda`; each result is in the log as soon as it is known."""
    if missing := [name for name in TEST_TOOLS if importlib.util.find_spec(name) is None]:
        record.add("pytest tests/cuda", f"needs {' and '.join(missing)}", "all pass")
        return
    options = ["-v", "-rfEs", "--tb=short", "-p", "no:cacheprovider", "--import-mode=importlib"]
    options += ["-o", "addopts=", "-o", "filterwarnings="]  # they need plugins that may be missing
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", str(ROOT / "tests/cuda"), *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    wrong = [line for line in lines if line.startswith(("FAILED", "ERROR", "SKIPPED"))]
    found, is_ok = lines[-1].strip("= ") if lines else "no output", process.wait() == 0
    record.add(
        "pytest tests/cuda", found, "all pass", is_ok, details=wrong if is_ok else lines[-40:]
    )
