import contextlib
import functools
import hashlib
import http.server
import io
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from gpt2.base.errors import DataError
from gpt2.data import cache, remote, shards, token_stream
from gpt2.data.cache import ShardCache
from gpt2.data.loader import Loader
from gpt2.data.remote import Storage
from gpt2.data.sampler import Sampler
from gpt2.data.shards import DatasetIndex, TokenDataset, load_index
from gpt2.data.verification import Verification
from support import HANG_S, wait_until

URL = "memory://bucket/corpora/small"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache, "RETRY_PAUSES_S", (0.01, 0.01, 0.01))


@pytest.fixture
def memory(data_root: Path):
    """The small corpus in a bucket in memory."""
    bucket = fsspec.filesystem("memory")
    for path in data_root.iterdir():
        bucket.pipe(f"/bucket/corpora/small/{path.name}", path.read_bytes())
    yield bucket
    bucket.store.clear()


@pytest.fixture
def downloads(memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the downloaded files, in order."""
    for thread in threading.enumerate():  # of the previous test
        if thread.name == "download":
            thread.join(10)
    names: list[str] = []
    get_file = MemoryFileSystem.get_file

    def counted(self: MemoryFileSystem, source: str, target: str, **options: object) -> None:
        names.append(Path(source).name)
        get_file(self, source, target, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", counted)
    return names


def remote_index(tmp_path: Path, limit_bytes: int | None = None, url: str = URL) -> DatasetIndex:
    return load_index(Storage(url), ShardCache(tmp_path / "cache", limit_bytes))


def local_index(root: Path) -> DatasetIndex:
    return load_index(Storage(str(root)))


def copies(tmp_path: Path) -> list[Path]:
    return [path for path in tmp_path.glob("cache/*") if path.is_file()]


def copied_bytes(tmp_path: Path) -> int:
    """Disk space of the copies, some of which may be removed meanwhile."""
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
    assert remote.is_url("filecache::/mnt/slow/folder")
    assert not remote.is_url("mine::folder")
    assert not remote.is_url("data/fineweb_edu")
    assert not remote.is_url("/data/s3:/x")


def test_remote_rows_equal_local_ones_with_a_cache_for_a_part_of_them(
    memory: MemoryFileSystem, data_root: Path, tmp_path: Path
):
    here, whole = open_train(local_index(data_root)), remote_index(tmp_path)
    room = sum(shard.bytes for shard in whole.of("val")) + 3 * max(s.bytes for s in whole.shards)
    assert room < sum(shard.bytes for shard in whole.shards)
    TokenDataset(remote_index(tmp_path, room), "val", 32)
    dataset = open_train(remote_index(tmp_path, room))
    assert whole.fingerprint() == local_index(data_root).fingerprint()
    assert dataset.rows_per_shard == here.rows_per_shard
    assert len(dataset.rows_per_shard) > 3
    sampler = Sampler(here.rows_per_shard, 7, seed=3)
    with Loader(dataset, sampler, range(10**6), mini_batch_size=7) as loader:
        for step in range(2 * sampler.rows_per_epoch // 7):
            [(inputs, targets)] = loader.next_step()
            expected = here.read(sampler.rows(step))
            assert np.array_equal(inputs, expected[0])
            assert np.array_equal(targets, expected[1])
            assert copied_bytes(tmp_path) <= room


def test_the_next_shard_is_downloaded_before_it_is_needed(downloads: list[str], tmp_path: Path):
    dataset = open_train(remote_index(tmp_path))
    sampler = Sampler(dataset.rows_per_shard, 1, seed=1)
    with Loader(dataset, sampler, range(100), mini_batch_size=1) as loader:
        loader.next_step()
        wait_until(lambda: len(downloads) >= 2)
    assert downloads == [shard.file for shard in dataset.shards[:2]]


def test_a_copy_is_downloaded_once_for_all_ranks(downloads: list[str], tmp_path: Path):
    sets = [open_train(remote_index(tmp_path)) for _ in range(4)]
    threads = [threading.Thread(target=part.read, args=(np.array([[0, 0]]),)) for part in sets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert downloads == [sets[0].shards[0].file]
    again = open_train(remote_index(tmp_path))
    again.read(np.array([[0, 0]]))
    assert len(downloads) == 1


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-7], lambda data: b"", lambda data: b"x" * len(data)]
)
def test_a_damaged_copy_is_downloaded_again(downloads: list[str], tmp_path: Path, damage):
    rows = np.array([[0, 0], [0, 5]])
    good = open_train(remote_index(tmp_path)).read(rows)
    [path] = copies(tmp_path)
    path.write_bytes(damage(path.read_bytes()))  # as if killed during a download
    assert np.array_equal(open_train(remote_index(tmp_path)).read(rows), good)
    assert len(downloads) == 2


def test_downloads_are_tried_again_when_the_network_fails(
    downloads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
):
    get_file, failures = MemoryFileSystem.get_file, [ConnectionError("reset"), TimeoutError()]

    def failing(self: MemoryFileSystem, source: str, target: str, **options: object) -> None:
        if failures:
            Path(target).write_bytes(b"half")
            raise failures.pop()
        get_file(self, source, target, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", failing)
    dataset = open_train(remote_index(tmp_path))
    dataset.read(np.array([[0, 0]]))
    assert not failures
    file = dataset.shards[0].file
    assert downloads == [file]
    assert caplog.messages == [
        f"{URL}/{file} could not be downloaded ({reason}); trying again in 0.01 s"
        for reason in ("TimeoutError", "ConnectionError: reset")
    ]


def test_a_bug_in_a_check_is_not_taken_for_a_failed_download(
    memory: MemoryFileSystem, tmp_path: Path
):
    copy = ShardCache(tmp_path / "cache").copy(
        Storage(URL), "manifest.json", 10, lambda path: path.no_such_attribute
    )
    with pytest.raises(AttributeError, match="no_such_attribute"), copy:
        pass


def test_a_damaged_remote_file_is_named(memory: MemoryFileSystem, tmp_path: Path):
    dataset = open_train(remote_index(tmp_path))
    name = f"/bucket/corpora/small/{dataset.shards[0].file}"
    memory.pipe(name, memory.cat(name)[:-1] + b"!")
    message = rf"{URL}/{dataset.shards[0].file} could not be downloaded: its SHA-256 differs"
    with pytest.raises(DataError, match=message):
        dataset.read(np.array([[0, 0]]))
    memory.rm(name)
    with pytest.raises(
        DataError, match=rf"{dataset.shards[0].file} could not be downloaded: FileNotFoundError"
    ):
        dataset.read(np.array([[0, 0]]))


@pytest.fixture
def server(data_root: Path):
    """The small corpus behind HTTP, from a server without ranges."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(data_root))
    handler.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_downloads_are_tried_again_while_a_server_is_down(server, tmp_path: Path, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(cache, "RETRY_PAUSES_S", (0.3,) * 10)
    host, port = server.server_address
    dataset = open_train(remote_index(tmp_path, url=f"http://{host}:{port}"))
    good = dataset.read(np.array([[0, 0]]))
    server.shutdown()
    server.server_close()
    threading.Timer(1, lambda: start_again(server, port)).start()
    dataset.read(np.array([[1, 0]]))
    assert np.array_equal(dataset.read(np.array([[0, 0]]))[0], good[0])


def start_again(server: http.server.ThreadingHTTPServer, port: int) -> None:
    server.__init__(("127.0.0.1", port), server.RequestHandlerClass)
    threading.Thread(target=server.serve_forever, daemon=True).start()


def test_a_server_without_ranges(server, data_root: Path):
    pytest.importorskip("aiohttp")
    host, port = server.server_address
    url = f"http://{host}:{port}"
    shard = local_index(data_root).shards[1]
    far, near = (
        token_stream.read(storage, shard, 3, 5)
        for storage in (Storage(url), Storage(str(data_root)))
    )
    assert np.array_equal(far, near)


class InParts(io.RawIOBase):
    """A file that gives 1 to 1000 bytes at a time, as that of a server may."""

    def __init__(self, content: bytes) -> None:
        self._file = io.BytesIO(content)
        self._sizes = np.random.default_rng(7)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        return self._file.readinto(buffer[: self._sizes.integers(1, 1000)])


def test_an_open_file_gives_what_it_is_asked_for(memory: MemoryFileSystem, monkeypatch):
    content = np.random.default_rng(0).bytes(30_000)
    monkeypatch.setattr(MemoryFileSystem, "_open", lambda *_, **__: InParts(content))
    buffer = bytearray(10_000)
    with Storage(URL).open("x.bin") as file:
        read = file.read(15_000)
        assert file.readinto(buffer) == 10_000
        assert read + buffer + file.read(6_000) == content
        assert file.readinto(buffer) == 0


def test_a_dataset_outlives_its_loader(memory: MemoryFileSystem, data_root: Path, tmp_path: Path):
    """A run that goes back to a checkpoint opens another loader."""
    dataset, here = open_train(remote_index(tmp_path)), open_train(local_index(data_root))
    sampler = Sampler(dataset.rows_per_shard, 1, seed=1)
    for steps in (range(3), range(1000, 1003)):
        assert sampler.rows(steps[0])[0, 0] not in dataset._open  # it must be downloaded
        with Loader(dataset, sampler, steps, mini_batch_size=1) as loader:
            for step in steps:
                [(inputs, _)] = loader.next_step()
                assert np.array_equal(inputs, here.read(sampler.rows(step))[0])


def test_a_shard_in_use_is_not_removed(downloads: list[str], tmp_path: Path):
    """Also if other shards were used more recently."""
    dataset = open_train(remote_index(tmp_path))
    assert len(dataset.rows_per_shard) >= 5
    for shard in (0, 1, 2, 0, 3, 0, 4, 0):
        dataset.read(np.array([[shard, 0]]))
    assert len(downloads) == 5
    held = sum(path.stat().st_size for path in copies(tmp_path))
    ShardCache(tmp_path / "cache", held).make_room(held)
    kept = {path.stat().st_size for path in copies(tmp_path)}
    assert len(copies(tmp_path)) == 3  # the ones that are open
    assert dataset.shards[0].bytes in kept


def test_a_shard_that_a_killed_process_used_is_removed(data_root: Path, tmp_path: Path):
    script = (
        "import sys, os, signal, numpy as np\n"
        "from pathlib import Path\n"
        "from gpt2.data.shards import TokenDataset, load_index\n"
        "from gpt2.data.cache import ShardCache\n"
        "from gpt2.data.remote import Storage\n"
        "found = load_index(Storage(sys.argv[1]), ShardCache(Path(sys.argv[2])))\n"
        "dataset = TokenDataset(found, 'train', 32)\n"
        "dataset.read(np.array([[0, 0]]))\n"
        "print('open', flush=True)\n"
        "sys.stdin.read()\n"
    )
    folder = tmp_path / "cache"
    command = [sys.executable, "-c", script, f"file://{data_root}", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"open\n"
        ShardCache(folder, 0).make_room(1)
        assert len(copies(tmp_path)) == 1
        process.kill()
    ShardCache(folder, 0).make_room(1)
    assert not copies(tmp_path)


def test_a_cache_folder_that_cannot_be_used(memory: MemoryFileSystem, tmp_path: Path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cannot use the cache folder .*--cache_dir"):
        open_train(remote_index(tmp_path)).read(np.array([[0, 0]]))


def test_a_missing_remote_shard_is_an_error_at_the_start(memory: MemoryFileSystem, tmp_path: Path):
    name = name_of_a_train_shard(memory)
    memory.rm(name)
    with pytest.raises(DataError, match=f"{Path(name).name} cannot be read: FileNotFoundError"):
        remote_index(tmp_path)


def name_of_a_train_shard(memory: MemoryFileSystem) -> str:
    return sorted(memory.find("/bucket/corpora/small"))[-2]


def test_closing_does_not_wait_for_a_download(
    memory: MemoryFileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    begun, goes_on, ended = threading.Event(), threading.Event(), threading.Event()

    def hangs(*_: object, **__: object) -> None:
        begun.set()
        goes_on.wait(HANG_S)
        ended.set()
        sys.exit()

    monkeypatch.setattr(MemoryFileSystem, "get_file", hangs)
    dataset = open_train(remote_index(tmp_path))
    sampler = Sampler(dataset.rows_per_shard, 1, seed=1)
    loader = Loader(dataset, sampler, range(100), mini_batch_size=1)
    begun.wait()
    loader.close()
    assert not ended.is_set(), "it waited for the download"
    goes_on.set()


def test_a_cache_that_cannot_hold_two_shards_is_refused(memory: MemoryFileSystem, tmp_path: Path):
    with pytest.raises(DataError, match=r"cache_gb=1e-05 is too small .*; use --cache_gb 6\."):
        open_train(remote_index(tmp_path, 10_000))


def test_global_shuffling_reads_remote_rows_as_local_ones_and_keeps_all_shards_open(
    downloads: list[str], data_root: Path, tmp_path: Path
):
    here, found = open_train(local_index(data_root)), remote_index(tmp_path)
    room = sum(shard.bytes for shard in found.shards)
    dataset = TokenDataset(remote_index(tmp_path, room), "train", 32, shuffle="global")
    assert downloads == []
    sampler = Sampler(here.rows_per_shard, 50, seed=3, shuffle="global")
    with Loader(dataset, sampler, range(100), mini_batch_size=20) as loader:
        for step in range(20):
            read = np.concatenate([inputs for inputs, _ in loader.next_step()])
            assert np.array_equal(read, here.read(sampler.rows(step))[0])
    assert sorted(downloads) == [shard.file for shard in dataset.shards]
    assert len(dataset.shards) > shards.OPEN_REMOTE_SHARDS
    ShardCache(tmp_path / "cache", room).make_room(room)
    assert len(copies(tmp_path)) == len(dataset.shards), "it removed a shard that is open"


def test_global_shuffling_needs_a_cache_for_all_shards(memory: MemoryFileSystem, tmp_path: Path):
    room = sum(shard.bytes for shard in remote_index(tmp_path).shards)
    TokenDataset(remote_index(tmp_path, room), "train", 32, shuffle="global")
    found = remote_index(tmp_path, room - 1)
    with pytest.raises(
        DataError,
        match=r"too small .* with --shuffle global: the validation split and \d+ training shards "
        r"take .* GB; use --shuffle rows, or --cache_gb [\d.e-]+ or more$",
    ):
        TokenDataset(found, "train", 32, shuffle="global")
    TokenDataset(found, "train", 32, shuffle="rows")


def test_shards_without_a_manifest(memory: MemoryFileSystem, tmp_path: Path):
    tokens = np.arange(2000, dtype="<u2")
    folder = tmp_path / "local"
    folder.mkdir()
    for name in ("x_train_0.bin", "x_train_1.bin", "x_val_0.bin"):
        (folder / name).write_bytes(tokens.tobytes())
        memory.pipe(f"/theirs/deep/{name}", tokens.tobytes())
    by_folder = remote_index(tmp_path, url="memory://theirs")
    by_glob = remote_index(tmp_path, url="memory://theirs/deep/x_*_?.bin")
    ends = [list(index.ends.values()) for index in (by_glob, by_folder, local_index(folder))]
    assert ends[0] == ends[1] == ends[2]
    first, second, val = map(by_glob.ends_of, by_glob.shards)
    assert by_glob.fingerprint() == {"train": [first, second], "val": [val]}
    inputs, _ = TokenDataset(by_glob, "train", 10).read(np.array([[1, 3]]))
    assert inputs.tolist() == [list(range(30, 40))]
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()  # known as soon as the shard is there
    assert by_glob.fingerprint() == {"train": [first, digest], "val": [val]}
    memory.pipe("/theirs/deep/x_train_0.bin", tokens[::-1].tobytes())
    with pytest.raises(
        DataError, match=r"x_train_0\.bin .* the file has changed since the run began"
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
def test_what_cannot_be_opened_is_one_sampler(tmp_path: Path, url: str, message: str):
    with pytest.raises(DataError, match=message) as caught:
        remote_index(tmp_path, url=url)
    assert "\n" not in str(caught.value)


def test_an_unfinished_remote_folder(memory: MemoryFileSystem, tmp_path: Path):
    memory.rm("/bucket/corpora/small/manifest.json")
    memory.pipe("/bucket/corpora/small/progress.json", b"{}")
    with pytest.raises(
        DataError,
        match=r"memory://.* is unfinished: it has a progress\.json, but no manifest\.json",
    ):
        remote_index(tmp_path)


def test_remote_shards_are_verified(memory: MemoryFileSystem, tmp_path: Path):
    place = Storage(URL)
    listed = remote_index(tmp_path).shards

    def wrong() -> list[str]:
        reports = Verification(place).run(lambda _: None)
        assert len(reports) == len(listed)
        return [report.wrong for report in reports if report.wrong]

    assert wrong() == []
    memory.pipe(f"/bucket/corpora/small/{listed[1].file}", b"short")
    assert wrong() == [f"expected {listed[1].bytes} bytes, got 5"]


def test_shards_behind_a_server_without_ranges_are_verified(server):
    port = server.server_address[1]
    reports = Verification(Storage(f"http://127.0.0.1:{port}")).run(lambda _: None)
    assert reports and not any(report.wrong for report in reports)


def test_killed_during_a_download(data_root: Path, tmp_path: Path):
    """A process is killed during a download; the next one downloads the whole file."""
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import sys, time, numpy as np\n"
        "from fsspec.implementations.local import LocalFileSystem\n"
        "from pathlib import Path\n"
        "from gpt2.data.shards import TokenDataset, load_index\n"
        "from gpt2.data.cache import ShardCache\n"
        "from gpt2.data.remote import Storage\n"
        "def get_file(self, source, target, **_):\n"
        "    Path(target).write_bytes(Path(source).read_bytes()[:5000])\n"
        "    print('half', flush=True)\n"
        "    time.sleep(60)\n"
        "LocalFileSystem.get_file = get_file\n"
        "found = load_index(Storage(sys.argv[1]), ShardCache(Path(sys.argv[2])))\n"
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
    dataset, here = open_train(remote_index(tmp_path, url=url)), open_train(local_index(corpus))
    rows = np.array([[0, 0], [1, 1]])
    assert np.array_equal(dataset.read(rows), here.read(rows))
