"""A corpus prepared by several processes, which are killed or find the disk full."""

import contextlib
import hashlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import small_tokenizers
import support
from gpt2.data import corpora, corpus, prepare, tokenisation, tokenizer_files
from gpt2.data.corpus import Block, Document, Documents, Place
from gpt2.data.tokenizer import GPT2_TOKENIZER
from support import shard_tokens, wait_until


def test_number_of_workers_does_not_matter(data_root: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK_CHARACTERS", 10_000)
    prepare.prepare(support.SMALL_CORPUS, tmp_path, workers=3)
    assert (tmp_path / "manifest.json").read_bytes() == (data_root / "manifest.json").read_bytes()


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tok") / "tokenizer.json"
    path.write_text(small_tokenizers.trained("cl100k", 4096))
    return path


def test_workers_get_the_tokenizer(tokenizer_file: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(corpus, "BLOCK_CHARACTERS", 10_000)
    encoder = tokenizer_files.load(tokenizer_file)
    for workers in (1, 2, 3):
        folder = tmp_path / f"{workers}"
        options = {"tokenizer": encoder, "workers": workers, "command": "the same"}
        prepare.prepare(support.SMALL_CORPUS, folder, **options)
        assert contents(folder) == contents(tmp_path / "1")
    expected = [
        token
        for document in support.small_documents()
        for token in (encoder.end_of_text, *encoder.encode(document.text))
    ]
    assert shard_tokens(folder) == expected


UNGUARDED = """
import sys
from pathlib import Path
from gpt2.data import prepare, tokenizer_files
import support
tokenizer = tokenizer_files.load(Path(sys.argv[1]))
prepare.prepare(support.SMALL_CORPUS, Path("shards"), tokenizer=tokenizer, workers=2)
"""


def test_workers_that_die_at_their_start_are_an_error(tokenizer_file: Path, tmp_path: Path):
    """As those of a script without `if __name__ == "__main__":`, which each of them runs. Their
    tokenizer is larger than a pipe."""
    (tmp_path / "unguarded.py").write_text(UNGUARDED)
    done = subprocess.run(
        [sys.executable, "unguarded.py", str(tokenizer_file)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=subprocess.PIPE,
        text=True,
        timeout=support.HANG_S,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("gpt2.base.errors.DataError: a tokenising proc")


def test_blocks_are_read_ahead_up_to_a_limit(monkeypatch):
    """Of one block per task and worker, at least two: memory is bounded, whatever their size."""
    monkeypatch.setattr(tokenisation, "AHEAD_CHARACTERS", 1)
    read = []

    def endless() -> Iterator[Block]:
        for number in itertools.count():
            read.append(number)
            text = Document("word " * corpus.BLOCK_CHARACTERS)
            yield Block(Place(0, number), Documents((text,)), number)

    found = tokenisation.encoded_blocks(endless(), GPT2_TOKENIZER, workers=1)
    with contextlib.closing(found) as encoded:
        assert [next(encoded).place.number for _ in range(3)] == [0, 1, 2]
    assert len(read) == 3 + tokenisation.TASKS_PER_WORKER


def test_a_place_may_be_counted_in_a_task_of_more_files(tmp_path: Path, monkeypatch):
    """As earlier versions counted characters where there are bytes now: nothing comes twice."""
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(f"text {number} " * 2000)
    found = corpora.local_files("own", [str(tmp_path / "*.txt")])
    options = {"shard_tokens": 5000, "val_tokens": 1000, "workers": 1, "command": "the same"}
    prepare.prepare(found, tmp_path / "whole", **options)
    record = prepare._ProgressFile.record

    def killed(self, done, position):
        record(self, done, position)
        if len(done) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(prepare._ProgressFile, "record", killed)
        prepare.prepare(found, tmp_path / "parts", **options)
    monkeypatch.setattr(corpus, "BLOCK_CHARACTERS", 1)  # a task per file
    prepare.prepare(found, tmp_path / "parts", **options)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


SIZES = ["--shard_tokens", "16000", "--max_tokens", "800000"]


def data_command(folder: Path, *options: str) -> list[str]:
    start = "import sys; from gpt2.cli.main import main; sys.exit(main())"
    corpus = ["data", "python-stdlib", "--out", str(folder), *SIZES]
    return [sys.executable, "-c", start, *corpus, *options]


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def never_killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("never_killed")
    support.run_command(data_command(folder))
    return folder


def kill_at_random(folder: Path, kills: int, seed: int) -> None:
    """Kills preparations of `folder` with SIGKILL, each after it has finished some more shards."""
    choice = random.Random(seed)
    while kills:
        kills -= killed_after(choice.randint(0, 12), folder, workers=choice.randint(1, 3))
        if (folder / "manifest.json").exists():  # the next trial starts from nothing
            shutil.rmtree(folder)


def killed_after(shards: int, folder: Path, workers: int, *options: str) -> bool:
    """Whether a preparation was killed when it had finished `shards` more, or had ended before."""
    reached = number_of_shards(folder) + shards
    command = data_command(folder, "--workers", str(workers), *options)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as started:
        wait_until(lambda: started.poll() is not None or number_of_shards(folder) >= reached)
        started.kill()
    wait_until(lambda: not processes_of(started.pid))
    return started.returncode != 0


def number_of_shards(folder: Path) -> int:
    return len(list(folder.glob("*.npy")))


def processes_of(session: int) -> list[str]:
    """Ids of the workers of a preparation, which should end soon after it was killed."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, _, rest = path.read_text().partition(" ")
            stat = rest.rpartition(")")[2].split()
            if int(stat[3]) == session and stat[0] not in "ZX":
                found.append(pid)
    return found


def test_killed_at_random_moments_it_ends_byte_identical(tmp_path: Path, never_killed: Path):
    kill_at_random(tmp_path / "data", kills=2, seed=1)
    support.run_command(data_command(tmp_path / "data"))
    assert contents(tmp_path / "data") == contents(never_killed)


def test_killed_with_a_tokenizer_of_one_s_own(tmp_path: Path, tokenizer_file: Path):
    options = ("--tokenizer", str(tokenizer_file))
    killed_after(4, tmp_path / "data", 2, *options)
    for folder in (tmp_path / "data", tmp_path / "other"):
        support.run_command(data_command(folder, *options))
    assert contents(tmp_path / "data") == contents(tmp_path / "other")


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(5))
def test_soak_killed_at_random_moments(tmp_path: Path, never_killed: Path, seed: int):
    kill_at_random(tmp_path / "data", kills=6, seed=seed)
    support.run_command(data_command(tmp_path / "data"))
    assert contents(tmp_path / "data") == contents(never_killed)


def test_interrupts_one_after_the_other_end_a_preparation(tmp_path: Path, never_killed: Path):
    folder = tmp_path / "data"
    command = data_command(folder, "--workers", "2")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **quiet, start_new_session=True) as started:
        wait_until(lambda: number_of_shards(folder))

        def ended() -> bool:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGINT)
            return started.poll() is not None

        wait_until(ended)
    assert started.returncode in (130, -signal.SIGINT)
    support.run_command(data_command(folder))
    assert contents(folder) == contents(never_killed)


def test_a_full_disk_is_one_error_and_finished_shards_are_kept(tmp_path: Path, never_killed: Path):
    limit = 24_000  # bytes of a file: the small validation shard fits, the next one does not
    start = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "import sys; from gpt2.cli.main import main; sys.exit(main())"
    )
    command = data_command(tmp_path / "data", "--val_tokens", "8000")
    failed = support.run_command([command[0], "-c", start, *command[3:]], expect=2)
    assert failed.stderr.count("\n") == 1
    assert (
        "finished shards are kept: free disk space and type the same command again" in failed.stderr
    )
    assert (tmp_path / "data" / "python_stdlib_val_000000.npy").exists()
    assert not list((tmp_path / "data").glob("*.tmp"))
    support.run_command(command)
    assert shard_tokens(tmp_path / "data") == shard_tokens(never_killed)
