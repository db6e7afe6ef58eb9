"""Files that are no shards, whatever their names say: each is one line that names the file."""

import gc
import io
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import foreign_shards
from gpt2.base.errors import DataError
from gpt2.data import formats
from gpt2.data.formats import Layout
from gpt2.data.remote import Storage
from gpt2.data.shards import TokenDataset, load_index

IDS = np.arange(1000, dtype=np.uint16) * 7
SAVE = "save the token ids as numpy.save(FILE, ids.ravel().astype(numpy.uint16))"


def npy(array: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def llmc(**changes: int) -> bytes:
    header = np.zeros(256, dtype=np.int32)
    header[:3] = (
        changes.get("magic", 20240520),
        changes.get("version", 1),
        changes.get("count", 1000),
    )
    return header.tobytes() + IDS.tobytes()


def npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, ids=IDS)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(IDS.astype(np.int64)), f"1 dimensions of int64; {SAVE}"),
        (npy(IDS.astype(np.int32)), "1 dimensions of int32"),
        (npy(IDS.astype(np.int16)), "1 dimensions of int16"),
        (npy(IDS.astype(np.uint8)), "1 dimensions of uint8"),
        (npy(IDS.astype(">u2")), "1 dimensions of >u2"),
        (npy(IDS.astype(np.float32)), "1 dimensions of float32"),
        (npy(IDS > 7), "1 dimensions of bool"),
        (npy(IDS.reshape(10, 100)), "2 dimensions of uint16"),
        (npy(np.uint16(7)), "0 dimensions of uint16"),
        (npy(np.array(["text"])), "1 dimensions of <U4"),
        (npy(np.zeros(9, [("ids", "<u2")])), "1 dimensions of "),
        (npy(np.array([[1], [2, 3]], object)), "1 dimensions of Python objects, a pickle"),
        (
            npy(IDS).replace(b"\x01\0", b"\x03\0", 1),
            "expected version 1.0 or 2.0 of numpy's format, got (3",
        ),
        (npy(IDS)[:-2], "its header says 1000 tokens, the file has 999"),
        (npy(IDS)[:40], "EOF"),
        (npz(), "expected an array as numpy.save writes it, got a zip archive"),
        (pickle.dumps(IDS), "expected an array as numpy.save writes it, got a pickle"),
        (IDS.tobytes(), "expected an array as numpy.save writes it, got something else"),
        (b"", "expected an array as numpy.save writes it, got something else"),
        (llmc(), "expected an array as numpy.save writes it, got something else"),
    ],
)
def test_what_is_no_npy_is_named(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "x_train_0.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"x_train_0\.npy is truncated, damaged or no") as caught:
        load_index(Storage(str(tmp_path)))
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (llmc(count=999), "its header says 999 tokens, the file has 1000"),
        (llmc(count=-1), "its header says -1 tokens, the file has 1000"),
        (llmc() + IDS.tobytes(), "its header says 1000 tokens, the file has 2000"),
        (llmc(version=2), "expected version 1 of llm.c's format, got 2"),
        (llmc(magic=20240801, version=7), "expected tokens of GPT-2, got tokens of Llama 3"),
        (llmc(magic=20240522), "expected tokens in llm.c's format, 20240520, got its 20240522"),
        (llmc(magic=20240326), "expected tokens in llm.c's format, 20240520, got its 20240326"),
        (llmc()[:1000], "its header is incomplete"),
        (npz(), "it is a zip archive"),
    ],
)
def test_what_is_no_bin_is_named(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "x_train_0.bin").write_bytes(content)
    with pytest.raises(DataError, match=r"x_train_0\.bin is truncated, damaged or no") as caught:
        load_index(Storage(str(tmp_path)))
    assert message in str(caught.value)


def test_an_array_with_the_other_ending_is_read(tmp_path: Path):
    (tmp_path / "train.bin").write_bytes(npy(IDS))
    (tmp_path / "x_train.npy").write_bytes(npy(IDS.astype(np.uint32)))
    inputs, _ = TokenDataset(load_index(Storage(str(tmp_path))), "train", 8).read(
        np.array([[0, 1], [1, 2]])
    )
    assert inputs.tolist() == [IDS[8:16].tolist(), IDS[16:24].tolist()]


def test_shards_of_llama_3_are_refused(tmp_path: Path):
    foreign_shards.llmc(tmp_path / "fineweb_train_000001.bin", [128_000, 1], big_vocabulary=True)
    with pytest.raises(DataError, match=r"train_000001\.bin is .*tokens of Llama 3 in llm\.c's fo"):
        load_index(Storage(str(tmp_path)))


def layout(name: str, content: bytes) -> Layout:
    return formats.layout(name, content, len(content), lambda start, end: content[start:end])


@pytest.mark.parametrize(
    "content", [npy(IDS[:40]), llmc()[: 1024 + 80], npy(IDS[:40], allow_pickle=True)]
)
@pytest.mark.parametrize("name", ["x_train.npy", "x_train.bin"])
def test_damage_at_any_bit_of_a_header_is_one_line_or_harmless(content: bytes, name: str):
    for position in range(min(len(content), 160)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            try:
                found = layout(name, bytes(damaged))
            except DataError as error:
                assert str(error).startswith(f"{name} is ")
                assert len(str(error).splitlines()) == 1
            else:
                assert found.start + found.tokens * found.dtype.itemsize == len(content)


def test_headers_of_sound_files_are_read_in_several_threads_at_once():
    """Python's parser of literals is not safe there, if it is interrupted by the garbage collector:
    a verification has called sound files damaged."""
    content, before = npy(IDS), gc.get_threshold()

    def let_others_run(*_: object) -> None:
        time.sleep(1e-5)

    gc.callbacks.append(let_others_run)
    gc.set_threshold(10)
    try:
        with ThreadPoolExecutor(4) as threads:
            found = threads.map(
                lambda _: formats.layout("a.npy", content, len(content)), range(256)
            )
            assert {layout.tokens for layout in found} == {1000}
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(let_others_run)


@pytest.mark.parametrize("dtype", [formats.DTYPE, formats.WIDE_DTYPE])
def test_a_header_is_that_of_numpy_and_as_long_for_any_number_of_tokens(dtype: np.dtype[Any]):
    for tokens in (0, 7, 12_345):
        array = np.arange(tokens).astype(dtype)
        assert formats.npy_header(dtype, tokens) + array.tobytes() == npy(array)
    assert len(formats.npy_header(dtype, 10**15)) == len(formats.npy_header(dtype, 0))
