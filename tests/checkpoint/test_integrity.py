import hashlib
import io
import os
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from gpt2.checkpoint import integrity
from gpt2.checkpoint.integrity import HashingWriter


@given(st.lists(st.binary(max_size=50), max_size=8), st.integers(1, 40))
def test_digests_of_pieces_whatever_the_writes(parts: list[bytes], piece_bytes: int):
    file = io.BytesIO()
    writer = HashingWriter(file, piece_bytes)
    assert [writer.write(part) for part in parts] == [len(part) for part in parts]
    whole = b"".join(parts)
    assert file.getvalue() == whole
    pieces = [whole[at : at + piece_bytes] for at in range(0, len(whole), piece_bytes)] or [b""]
    assert writer.digests() == [hashlib.sha256(piece).hexdigest() for piece in pieces]


def test_every_flipped_bit_is_found(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(integrity, "_READ_BYTES", 7)
    content = bytearray(range(100))
    writer = HashingWriter(io.BytesIO(), 30)
    writer.write(bytes(content))
    path = tmp_path / "file"

    def is_intact() -> bool:
        path.write_bytes(content)
        with path.open("rb") as file:
            return integrity.is_intact(file.fileno(), writer.digests(), 30)

    assert is_intact()
    for place in range(100):
        content[place] ^= 1 << (place % 8)
        assert not is_intact()
        content[place] ^= 1 << (place % 8)
    assert is_intact()


def test_a_signature_is_of_one_user_and_one_file(tmp_path: Path, monkeypatch):
    signature = integrity.sign(["a", "b"])
    assert integrity.is_signed(["a", "b"], signature)
    assert not integrity.is_signed(["a", "c"], signature)
    assert not integrity.is_signed(["a", "b"], None)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "another user"))
    assert not integrity.is_signed(["a", "b"], signature)
    assert not os.path.exists(tmp_path / "another user")
