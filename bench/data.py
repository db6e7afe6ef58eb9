"""Speed of tokenising and of reading batches: python bench/data.py

Tokenising: `prepare` with all cores against (cores × the rate of one process that only calls
tiktoken) and against one such process per core, measured in turn; its memory on a corpus and on one
three times as long. Reading: batches of 64 × 1024 on one thread, and the share of a training step
of the demo model that waits for them. `python bench/data.py reading` measures the batches alone,
`python bench/data.py files jsonl small_txt` preparations of such files, `files 48 jsonl` of a file
with 48 times the embedded corpus.
"""

import functools
import gzip
import itertools
import json
import multiprocessing
import os
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gpt2.data import tokenizer
from gpt2.data.corpus import Corpus, Document, in_blocks

if TYPE_CHECKING:
    from gpt2.data.sampler import Rows, Shuffle

# The workers of a preparation import this file, as they import the `gpt2` command, which has few
# imports: what they do not use is imported by the functions that use it.

ROUNDS = 3
COPIES, COPIES_IN_FILES = 24, 16
"""of the embedded corpus, which takes a process 4 seconds"""


def documents(skip: int, copies: int = COPIES) -> Iterator[Document]:
    """The embedded corpus several times: long enough for start-up not to count."""
    from gpt2.data import corpora

    assert skip == 0
    for _ in range(copies):
        yield from corpora.python_stdlib()


@dataclass(frozen=True)
class Speed:
    """Tokens per second, and per second of CPU time in all processes, which other work on the
    machine changes less."""

    per_s: float
    per_cpu_s: float

    @classmethod
    def of(cls, work: Callable[[], int]) -> "Speed":
        """That of `work`, which returns a number of tokens."""
        started, cpu_before_s = time.perf_counter(), cpu_s()
        tokens = work()
        return cls(tokens / (time.perf_counter() - started), tokens / (cpu_s() - cpu_before_s))


def cpu_s() -> float:
    """CPU time so far, of processes that have ended too."""
    used = (resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def single() -> Speed:
    """One process that has the same texts in memory and does nothing else."""
    from gpt2.data import corpora

    encoding = tokenizer.load()
    texts = [document.text for document in corpora.python_stdlib()]

    def encode() -> int:
        return sum(
            len(encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16))
            for text in texts
        )

    return Speed.of(encode)


def rate_of_all(cores: int) -> float:
    """Tokens/s of one such process on every core at once, without what they need to start."""
    with multiprocessing.get_context("spawn").Pool(cores) as pool:
        speeds = [pool.apply_async(single) for _ in range(cores)]
        return sum(speed.get().per_s for speed in speeds)


def speed(make: Callable[[], Corpus], folder: Path, val_tokens: int | None = None) -> Speed:
    """A whole preparation on all cores, start-up, checksums and fsync included."""
    from rich.console import Console

    from gpt2.data import prepare

    def run() -> int:
        quiet = Console(quiet=True)
        manifest = prepare.prepare(make(), folder, val_tokens=val_tokens, console=quiet)
        return sum(shard.tokens for shard in manifest.shards)

    return Speed.of(run)


def in_memory(folder: Path) -> Speed:
    return speed(lambda: Corpus("bench", "a bench", 10_000_000, in_blocks(documents)), folder)


def prepare_with_defaults(folder: Path, copies: int) -> None:
    """With shards of the size that real corpora have here."""
    copied = in_blocks(functools.partial(documents, copies=copies))
    speed(lambda: Corpus("bench", "", 100_000_000, copied), folder, val_tokens=1_000_000)


def memory(folder: Path, copies: int) -> None:
    """The most that a preparation and each of its processes hold (VmHWM of /proc)."""
    from gpt2.data.remote import Storage
    from gpt2.data.shards import load_index

    process = multiprocessing.get_context("spawn").Process(
        target=prepare_with_defaults, args=(folder, copies)
    )
    process.start()
    peaks: dict[int, float] = {}
    while process.is_alive():
        assert process.pid is not None
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        try:
            for pid in (process.pid, *map(int, children.read_text().split())):
                status = Path(f"/proc/{pid}/status").read_text()
                if found := re.search(r"VmHWM:\s*(\d+) kB", status):
                    peaks[pid] = int(found[1]) / 1e3
        except OSError:
            pass  # it ended between two looks
        time.sleep(0.1)
    main = peaks.pop(process.pid)
    tokens = sum(shard.tokens for shard in load_index(Storage(str(folder))).shards)
    workers = ", ".join(f"{peak:.0f}" for peak in sorted(peaks.values(), reverse=True))
    print(f"  {tokens / 1e6:.0f} M tokens: the process that writes {main:.0f} MB; others {workers}")


def of_files(root: Path, kind: str) -> Speed:
    """Of files, which are looked for and checked first."""
    from gpt2.data import corpora, files

    paths = [str(path) for path in sorted((root / kind).iterdir())]

    def corpus() -> Corpus:
        return corpora.of_files("bench", kind, files.find(paths), None)

    with tempfile.TemporaryDirectory(dir=root) as out:
        return speed(corpus, Path(out, "shards"), val_tokens=1_000_000)


def write_files(root: Path, copies: int, wanted: list[str]) -> list[str]:
    """The embedded corpus several times, in files of the kinds that are wanted, or of all."""
    import pyarrow
    import pyarrow.parquet as parquet
    import zstandard

    from gpt2.data import corpora

    texts = [document.text for document in corpora.python_stdlib()]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode() * copies
    texts *= copies
    table = pyarrow.table({"text": texts})
    contents = {
        "jsonl": lambda path: path.with_suffix(".jsonl").write_bytes(lines),
        "jsonl.gz": lambda path: path.with_suffix(".jsonl.gz").write_bytes(gzip.compress(lines, 6)),
        "jsonl.zst": lambda path: path.with_suffix(".jsonl.zst").write_bytes(
            zstandard.compress(lines)
        ),
        "json": lambda path: path.with_suffix(".json").write_text(
            json.dumps([{"text": text} for text in texts])
        ),
        "parquet": lambda path: parquet.write_table(table, path.with_suffix(".parquet")),
        "small_txt": lambda path: [
            path.with_name(f"{number:05}.txt").write_text(text[at : at + 8000])
            for number, (text, at) in enumerate(
                itertools.islice(
                    ((text, at) for text in texts for at in range(0, len(text), 8000)), 10_000
                )
            )
        ],
    }
    for kind in wanted or contents:
        (root / kind).mkdir()
        contents[kind](root / kind / "a")
    return wanted or [*contents]


def files_of_every_kind(
    root: Path, cores: int, wanted: list[str], copies: int = COPIES_IN_FILES
) -> None:
    """Preparations of files, each against cores × one process that only calls tiktoken."""
    print(f"Files, share of {cores} × one process; share of the CPU time that tokenises:")
    for kind in write_files(root, copies, wanted):
        measured = [(single(), of_files(root, kind), single()) for _ in range(ROUNDS)]
        print(f"  {kind:<10} {shares(measured, cores)}", flush=True)


def shares(measured: list[tuple[Speed, Speed, Speed]], cores: int) -> str:
    """Of preparations, each between two measurements of one process."""
    of_time = [
        whole.per_s / (cores * statistics.mean([before.per_s, after.per_s]))
        for before, whole, after in measured
    ]
    of_cpu_time = [
        whole.per_cpu_s / statistics.mean([before.per_cpu_s, after.per_cpu_s])
        for before, whole, after in measured
    ]
    return "; ".join(
        f"{statistics.median(found):.0%} ({min(found):.0%} to {max(found):.0%})"
        for found in (of_time, of_cpu_time)
    )


def write_shards(folder: Path) -> None:
    """1 GB of random ids in shards of the size that real corpora have here."""
    folder.mkdir()
    ids = np.random.default_rng(1)
    for split, number, tokens in [("val", 0, 10_000), *(("train", n, 10**8) for n in range(5))]:
        shard = ids.integers(tokenizer.VOCAB_SIZE, size=tokens, dtype=np.uint16)
        np.save(folder / f"bench_{split}_{number:06}.npy", shard)


def drop_pages(folder: Path) -> None:
    """Takes the shards out of the page cache, so that each row is read from the disk, as it is from
    a corpus that is much larger than the memory."""
    for path in folder.glob("*.npy"):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what is not on the disk yet stays in memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_bytes() -> int:
    """What this process has read from disks so far."""
    found = re.search(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def by_memory_maps(folder: Path) -> "Callable[[Rows], object]":
    """Reads the rows through memory maps, unchecked."""
    maps = [np.load(path, mmap_mode="r") for path in sorted(folder.glob("*_train_*.npy"))]
    return lambda rows: np.stack(
        [maps[shard][row * 1024 : (row + 1) * 1024 + 1] for shard, row in rows.tolist()]
    ).astype(np.int64)


def reading(folder: Path) -> None:
    """Batches on one thread, from the page cache and from the disk; the contenders take turns. The
    steps of the rounds differ, so that each reads rows that are not in memory."""
    from gpt2.data.remote import Storage
    from gpt2.data.sampler import Sampler
    from gpt2.data.shards import TokenDataset, load_index

    index = load_index(Storage(str(folder)))
    kinds: dict[str, Shuffle] = {
        "shards": "shards",
        "rows": "rows",
        "global": "global",
        "global, by memory maps": "global",
    }
    for is_cached, steps in ((True, 200), (False, 100)):
        rates: dict[str, list[float]] = {name: [] for name in kinds}
        bytes_read = dict.fromkeys(kinds, 0)
        for number, name in itertools.product(range(1 + ROUNDS), kinds):
            dataset = TokenDataset(index, "train", 1024, kinds[name])
            sampler = Sampler(dataset.rows_per_shard, 64, seed=1, shuffle=kinds[name])
            if not is_cached:
                drop_pages(folder)
            read = by_memory_maps(folder) if "maps" in name else dataset.read
            before, started = read_bytes(), time.perf_counter()
            for step in range(number * steps, (number + 1) * steps):
                read(sampler.rows(step))
            elapsed_s = time.perf_counter() - started
            del read  # pages of a map stay in memory
            if number:  # the first round only warms up
                rates[name].append(steps * 64 * 1024 / elapsed_s / 1e6)
                bytes_read[name] += read_bytes() - before
        print(f"  from the {'page cache' if is_cached else 'disk'}, M tokens/s:")
        for name, found in rates.items():
            ratios = [rate / base for rate, base in zip(found, rates["shards"], strict=True)]
            share = bytes_read[name] / (ROUNDS * steps * 64 * 1024 * 2)
            print(
                f"    {name:<22} {statistics.median(found):5.1f} ({min(found):.1f} to "
                f"{max(found):.1f}), {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
                f"{max(ratios):.2f}) of shards; read from the disk: {share:.2f} of the bytes used"
            )


def waiting(folder: Path) -> None:
    """How long a training step waits for its batch."""
    import torch

    from gpt2 import model
    from gpt2.config import memory, presets
    from gpt2.data.loader import Loader
    from gpt2.data.remote import Storage
    from gpt2.data.sampler import Sampler
    from gpt2.data.shards import TokenDataset, load_index

    torch.set_num_threads(1)
    run = presets.preset("demo")
    shards = TokenDataset(load_index(Storage(str(folder))), "train", run.model.block_size)
    line = Sampler(shards.rows_per_shard, run.rows_per_step, seed=1)
    rows = memory.ROWS_ON_CPU["demo"]
    net = model.build(run.model)
    waited_s = total_s = 0.0
    with Loader(shards, line, range(40), mini_batch_size=rows) as loader:
        for step in range(40):
            started = time.perf_counter()
            micros = loader.next_step()
            got = time.perf_counter()
            for tokens_BT, targets_BT in micros:
                net(tokens_BT, targets_BT).backward()
            net.zero_grad()
            if step >= 5:
                waited_s += got - started
                total_s += time.perf_counter() - started
    print(f"  a training step of the demo waits {waited_s / total_s:.2%} of its time for its batch")


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    print(f"{cores} cores")
    measured = []
    with tempfile.TemporaryDirectory() as root:
        for number in range(ROUNDS):
            folder = Path(root, str(number))
            before, every, whole = single(), rate_of_all(cores), in_memory(folder)
            measured.append((before, whole, single()))
            print(
                f"  M tokens/s: one process {before.per_s / 1e6:.2f}, one per core "
                f"{every / 1e6:.2f}, prepare {whole.per_s / 1e6:.2f}: "
                f"{whole.per_s / every:.0%} of one per core"
            )
        print(f"Tokenising: share of {cores} × one process; share of the CPU time that tokenises:")
        print(f"  {shares(measured, cores)}")
        files_of_every_kind(Path(root), cores, [])
        print("Memory:")
        for copies in (COPIES // 3, COPIES):
            memory(Path(root, f"memory{copies}"), copies)
        print("Reading 64 × 1024 on one thread:")
        waiting(folder)


def reading_alone() -> None:
    with tempfile.TemporaryDirectory() as root:
        write_shards(Path(root, "shards"))
        print("Reading 64 × 1024 on one thread:")
        reading(Path(root, "shards"))


def files_alone(kinds: list[str], copies: int = COPIES_IN_FILES) -> None:
    with tempfile.TemporaryDirectory() as root:
        files_of_every_kind(Path(root), len(os.sched_getaffinity(0)), kinds, copies)


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            main()
            reading_alone()
        case ["reading"]:
            reading_alone()
        case ["files", copies, *kinds] if copies.isdigit():
            files_alone(kinds, int(copies))
        case ["files", *kinds]:
            files_alone(kinds)
