import contextlib
import functools
import http.server
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from gpt2.base.errors import DataError
from gpt2.data import cache, remote, shards
from gpt2.data.cache import Cache
from gpt2.data.loader import Loader
from gpt2.data.remote import Storage
from gpt2.data.sampler import Sampler
from gpt2.data.shards import DatasetIndex, TokenDataset, load_index

URL = "memory://bucket/corpora/small"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache, "PAUSES_S", (0.01, 0.01, 0.01))


@pytest.fixture
def memory(data_root: Path):
    """The small corpus in a bucket that lies in memory."""
    bucket = fsspec.filesystem("memory")
    for path in data_root.iterdir():
        bucket.pipe(f"/bucket/corpora/small/{path.name}", path.read_bytes())
    yield bucket
    bucket.store.clear()


@pytest.fixture
def downloads(memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were fetched, one after another."""
    for thread in threading.enumerate():  # of the test before
        if thread.name == "fetch":
            thread.join(10)
    names: list[str] = []
    get_file = MemoryFileSystem.get_file

    def counted(self: MemoryFileSystem, far: str, near: str, **options: object) -> None:
        names.append(Path(far).name)
        get_file(self, far, near, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", counted)
    return names


def far(tmp_path: Path, limit_bytes: int | None = None, url: str = URL) -> DatasetIndex:
    return load_index(Storage(url), Cache(tmp_path / "cache", limit_bytes))


def near(root: Path) -> DatasetIndex:
    return load_index(Storage(str(root)))


def copies(tmp_path: Path) -> list[Path]:
    return [path for path in tmp_path.glob("cache/*") if path.is_file()]


def copied_bytes(tmp_path: Path) -> int:
    """Disk space of the copies, while they come and go."""
    size = 0
    for path in copies(tmp_path):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size
    return size


def open_train(found: DatasetIndex) -> TokenDataset:
    return TokenDataset(found, "train", 32)


def test_what_is_a_url():
    assert remote.is_url("s3://bucket/folder")
    assert remote.is_url("hf://datasets/someone/corpus/*.bin")
    assert remote.is_url("simplecache::s3://bucket/folder")
    assert not remote.is_url("data/fineweb_edu")
    assert not remote.is_url("/data/s3:/x")


def test_far_rows_are_the_near_ones_while_the_disk_holds_a_part(
    memory: MemoryFileSystem, data_root: Path, tmp_path: Path
):
    here, whole = open_train(near(data_root)), far(tmp_path)
    room = sum(shard.bytes for shard in whole.of("val")) + 3 * max(s.bytes for s in whole.shards)
    assert room < sum(shard.bytes for shard in whole.shards)
    TokenDataset(far(tmp_path, room), "val", 32)
    distant = open_train(far(tmp_path, room))
    assert whole.fingerprint() == near(data_root).fingerprint()
    assert distant.rows_per_shard == here.rows_per_shard
    assert len(distant.rows_per_shard) > 3
    line = Sampler(here.rows_per_shard, 7, seed=3)
    with Loader(distant, line, range(10**6), mini_batch_size=7) as loader:
        for step in range(2 * line.rows_per_epoch // 7):
            [(inputs, targets)] = loader.next_step()
            expected = here.read(line.rows(step))
            assert np.array_equal(inputs, expected[0])
            assert np.array_equal(targets, expected[1])
            assert copied_bytes(tmp_path) <= room


def test_next_shard_is_fetched_before_it_is_needed(downloads: list[str], tmp_path: Path):
    distant = open_train(far(tmp_path))
    line = Sampler(distant.rows_per_shard, 1, seed=1)
    with Loader(distant, line, range(100), mini_batch_size=1) as loader:
        loader.next_step()
        deadline = time.monotonic() + 10
        while len(downloads) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert downloads == [shard.file for shard in distant.shards[:2]]


def test_a_copy_is_fetched_once_for_all_ranks(downloads: list[str], tmp_path: Path):
    sets = [open_train(far(tmp_path)) for _ in range(4)]
    threads = [threading.Thread(target=part.read, args=(np.array([[0, 0]]),)) for part in sets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert downloads == [sets[0].shards[0].file]
    again = open_train(far(tmp_path))
    again.read(np.array([[0, 0]]))
    assert len(downloads) == 1


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-7], lambda data: b"", lambda data: b"x" * len(data)]
)
def test_a_copy_that_is_not_whole_is_fetched_again(downloads: list[str], tmp_path: Path, damage):
    rows = np.array([[0, 0], [0, 5]])
    good = open_train(far(tmp_path)).read(rows)
    [path] = copies(tmp_path)
    path.write_bytes(damage(path.read_bytes()))  # as by a kill in the middle of a download
    assert np.array_equal(open_train(far(tmp_path)).read(rows), good)
    assert len(downloads) == 2


def test_a_network_that_fails_for_a_while_ends_nothing(
    downloads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    get_file, failures = MemoryFileSystem.get_file, [ConnectionError("reset"), TimeoutError()]

    def failing(self: MemoryFileSystem, source: str, target: str, **options: object) -> None:
        if failures:
            Path(target).write_bytes(b"half")
            raise failures.pop()
        get_file(self, source, target, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", failing)
    distant = open_train(far(tmp_path))
    distant.read(np.array([[0, 0]]))
    assert not failures
    assert downloads == [distant.shards[0].file]


def test_a_far_file_that_is_damaged_is_named(memory: MemoryFileSystem, tmp_path: Path):
    distant = open_train(far(tmp_path))
    name = f"/bucket/corpora/small/{distant.shards[0].file}"
    memory.pipe(name, memory.cat(name)[:-1] + b"!")
    message = rf"{URL}/{distant.shards[0].file} did not arrive: its SHA-256 is not"
    with pytest.raises(DataError, match=message):
        distant.read(np.array([[0, 0]]))
    memory.rm(name)
    with pytest.raises(
        DataError, match=rf"{distant.shards[0].file} did not arrive: FileNotFoundError"
    ):
        distant.read(np.array([[0, 0]]))


@pytest.fixture
def server(data_root: Path):
    """The small corpus behind HTTP, from a server that knows no ranges."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(data_root))
    handler.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_server_that_is_gone_for_a_while_ends_nothing(server, tmp_path: Path, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(cache, "PAUSES_S", (0.3,) * 10)
    host, port = server.server_address
    distant = open_train(far(tmp_path, url=f"http://{host}:{port}"))
    good = distant.read(np.array([[0, 0]]))
    server.shutdown()
    server.server_close()
    threading.Timer(1, lambda: start_again(server, port)).start()
    distant.read(np.array([[1, 0]]))
    assert np.array_equal(distant.read(np.array([[0, 0]]))[0], good[0])


def start_again(server: http.server.ThreadingHTTPServer, port: int) -> None:
    server.__init__(("127.0.0.1", port), server.RequestHandlerClass)
    threading.Thread(target=server.serve_forever, daemon=True).start()


def test_a_server_without_ranges(server, data_root: Path):
    pytest.importorskip("aiohttp")
    host, port = server.server_address
    url = f"http://{host}:{port}"
    shard = near(data_root).shards[1]
    assert shards.first_tokens(Storage(url), shard, 5) == shards.first_tokens(
        Storage(str(data_root)), shard, 5
    )


def test_shards_outlive_the_loader(memory: MemoryFileSystem, data_root: Path, tmp_path: Path):
    """A run that goes back to a checkpoint opens another loader on them."""
    distant, here = open_train(far(tmp_path)), open_train(near(data_root))
    line = Sampler(distant.rows_per_shard, 1, seed=1)
    for steps in (range(3), range(1000, 1003)):
        assert line.rows(steps[0])[0, 0] not in distant._maps  # it has to be fetched
        with Loader(distant, line, steps, mini_batch_size=1) as loader:
            for step in steps:
                [(inputs, _)] = loader.next_step()
                assert np.array_equal(inputs, here.read(line.rows(step))[0])


def test_a_shard_in_use_is_not_removed(downloads: list[str], tmp_path: Path):
    """Also when it was used first, and others were used since."""
    distant = open_train(far(tmp_path))
    assert len(distant.rows_per_shard) == 5
    for shard in (0, 1, 2, 0, 3, 0, 4, 0):
        distant.read(np.array([[shard, 0]]))
    assert len(downloads) == 5
    held = sum(path.stat().st_size for path in copies(tmp_path))
    Cache(tmp_path / "cache", held)._make_room(held)
    kept = {path.stat().st_size for path in copies(tmp_path)}
    assert len(copies(tmp_path)) == 3  # the ones that are open
    assert distant.shards[0].bytes in kept


def test_a_cache_folder_that_cannot_be_used(memory: MemoryFileSystem, tmp_path: Path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cannot use the cache folder .*--cache_dir"):
        open_train(far(tmp_path)).read(np.array([[0, 0]]))


def test_a_missing_far_shard_is_told_at_the_start(memory: MemoryFileSystem, tmp_path: Path):
    name = near_name(memory)
    memory.rm(name)
    with pytest.raises(DataError, match=f"{Path(name).name} cannot be read: FileNotFoundError"):
        far(tmp_path)


def near_name(memory: MemoryFileSystem) -> str:
    return sorted(memory.find("/bucket/corpora/small"))[-2]


def test_closing_does_not_wait_for_a_download(
    memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hanging = threading.Event()
    monkeypatch.setattr(
        MemoryFileSystem, "get_file", lambda *_, **__: (hanging.wait(60), sys.exit())
    )
    distant = open_train(far(tmp_path))
    line = Sampler(distant.rows_per_shard, 1, seed=1)
    loader = Loader(distant, line, range(100), mini_batch_size=1)
    time.sleep(0.05)
    started = time.monotonic()
    loader.close()
    assert time.monotonic() - started < 5
    hanging.set()


def test_a_cache_that_cannot_hold_two_shards_is_refused(memory: MemoryFileSystem, tmp_path: Path):
    with pytest.raises(DataError, match=r"cache_gb=1e-05 is too small .*; use --cache_gb 6\."):
        open_train(far(tmp_path, 10_000))


def test_shards_of_others(memory: MemoryFileSystem, tmp_path: Path):
    tokens = np.arange(2000, dtype="<u2")
    folder = tmp_path / "near"
    folder.mkdir()
    for name in ("x_train_0.bin", "x_train_1.bin", "x_val_0.bin"):
        (folder / name).write_bytes(tokens.tobytes())
        memory.pipe(f"/theirs/deep/{name}", tokens.tobytes())
    by_folder = far(tmp_path, url="memory://theirs")
    by_glob = far(tmp_path, url="memory://theirs/deep/x_*_?.bin")
    assert by_glob.fingerprint() == by_folder.fingerprint() == near(folder).fingerprint()
    inputs, _ = TokenDataset(by_glob, "train", 10).read(np.array([[1, 3]]))
    assert inputs.tolist() == [list(range(30, 40))]
    memory.pipe("/theirs/deep/x_train_0.bin", tokens[::-1].tobytes())
    with pytest.raises(
        DataError, match=r"x_train_0\.bin .* it is not the file that was there before"
    ):
        TokenDataset(by_folder, "train", 10).read(np.array([[0, 3]]))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://nothing/here", r"no training data in memory://nothing/here$"),
        ("nonsense://bucket/x", r"nonsense://bucket/x cannot be opened: Protocol not known"),
        ("http://127.0.0.1:9/x", r"http://127\.0\.0\.1:9/x.* cannot be (read|opened): .*"),
    ],
)
def test_what_cannot_be_opened_is_one_line(tmp_path: Path, url: str, message: str):
    with pytest.raises(DataError, match=message) as caught:
        far(tmp_path, url=url)
    assert "\n" not in str(caught.value)


def test_an_unfinished_far_folder(memory: MemoryFileSystem, tmp_path: Path):
    memory.rm("/bucket/corpora/small/manifest.json")
    memory.pipe("/bucket/corpora/small/progress.json", b"{}")
    with pytest.raises(DataError, match=r"no manifest\.json in memory://.*: it is unfinished"):
        far(tmp_path)


def test_far_shards_are_verified_and_shown(memory: MemoryFileSystem, tmp_path: Path):
    place = Storage(URL)
    listed = far(tmp_path).shards
    assert [shards.verify(place, shard) for shard in listed] == [None] * len(listed)
    assert shards.first_tokens(place, listed[1], 5) == shards.first_tokens(place, listed[1], 9)[:5]
    memory.pipe(f"/bucket/corpora/small/{listed[1].file}", b"short")
    assert shards.verify(place, listed[1]) == f"5 bytes instead of {listed[1].bytes}"


def test_killed_while_it_fetches(data_root: Path, tmp_path: Path):
    """Another process is killed in the middle of a copy; the next one fetches it whole."""
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import sys, time, numpy as np\n"
        "from fsspec.implementations.local import LocalFileSystem\n"
        "from pathlib import Path\n"
        "from gpt2.data.shards import TokenDataset, load_index\n"
        "from gpt2.data.cache import Cache\n"
        "from gpt2.data.remote import Storage\n"
        "def get_file(self, far, near, **_):\n"
        "    Path(near).write_bytes(Path(far).read_bytes()[:5000])\n"
        "    print('half', flush=True)\n"
        "    time.sleep(60)\n"
        "LocalFileSystem.get_file = get_file\n"
        "found = load_index(Storage(sys.argv[1]), Cache(Path(sys.argv[2])))\n"
        "TokenDataset(found, 'train', 32).read(np.array([[0, 0]]))\n"
    )
    corpus = Path(shutil.copytree(data_root, tmp_path / "corpus"))
    url = f"file://{corpus}"
    command = [sys.executable, str(slow), url, str(tmp_path / "cache")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.kill()
    assert [path.stat().st_size for path in copies(tmp_path)] == [5000]
    distant, here = open_train(far(tmp_path, url=url)), open_train(near(corpus))
    rows = np.array([[0, 0], [1, 1]])
    assert np.array_equal(distant.read(rows), here.read(rows))
