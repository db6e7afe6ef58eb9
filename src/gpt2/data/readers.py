"""The documents of files: one reader per kind, which takes the text and nothing else of a record.

A reader runs in the main process and yields the file's contents in blocks of flat size. What costs
time is left to the worker process that gets the block: decoding, parsing lines of JSON, and reading
small texts and lines of files that are not compressed.

What is damaged is mended (bytes that are no UTF-8 become U+FFFD) or left out and counted (a line
that is no record). Raises DataError, naming file and line, where no text can be found.
"""

import codecs
import contextlib
import csv
import functools
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gpt2.base.control_characters import printable
from gpt2.base.errors import DataError
from gpt2.data import columns, corpus, fields, streams
from gpt2.data.corpus import BadLines, Block, Blocks, Content, Cut, Document, Documents, Place
from gpt2.data.streams import Part

BLOCK_BYTES = 500_000
LONGEST_PIECE = 8 * BLOCK_BYTES
"""characters of a text without a place at which it can be divided exactly"""
LONGEST_VALUE = 1 << 28
"""characters of one value of a JSON array, or of a field of a .csv file; bytes of a line of JSON"""
SAMPLED_RECORDS = 1000
"""of a file of JSON, which show the fields that it has"""
DELIMITERS = ",;\t|"
"""of a .csv file: the one that gives the most columns"""

UTF_8 = codecs.getincrementaldecoder("utf-8")
# Other columns may hold numbers of any length, which float() takes and int() refuses.
# NaN is what Python writes for a text that pandas does not have.
DECODER = json.JSONDecoder(
    strict=False,
    parse_int=float,
    parse_constant=lambda name: None if name == "NaN" else float(name),
)
# Beside white space: byte order marks of concatenated files, the separators of RFC 7464, and the
# padding of files after a crash.
BLANKS = " \t\n\v\f\r\x1e\0\ufeff"
BETWEEN_RECORDS = re.compile(f"[{BLANKS},]*")
SEP = re.compile(r"sep=(.)\r?\n")
"""the first line of what Excel is to read"""
NAMES_OF_TYPES = {float: "a number", bool: "true or false", list: "an array", dict: "an object"}


def blocks(paths: Sequence[Path], kind: str, field: str | None = None) -> Blocks:
    """The blocks of files of one kind; `field` has the text in those that have fields."""

    def from_place(place: Place, exact_cut: Cut) -> Iterator[Block]:
        before = sum(streams.size(path) for path in paths[: place.file])
        for number, path in enumerate(paths[place.file :], place.file):
            first, size = place.number if number == place.file else 0, streams.size(path)
            if kind == ".txt" and size <= BLOCK_BYTES and not streams.compression_of(path):
                if not first:
                    yield Block(Place(number), SmallText(str(path), size), before + size)
            else:
                with OPEN[kind](path) as file:
                    contents = (
                        read_text(file, exact_cut)
                        if kind == ".txt"
                        else READERS[kind](printable(path), file, field or "")
                    )
                    for at, content in enumerate(itertools.islice(contents, first, None), first):
                        done = before + min(streams.position(file), size)
                        yield Block(Place(number, at), content, done)
            before += size

    return from_place


def choose_field(paths: Sequence[Path], kind: str, wanted: str | None) -> str | None:
    """The field that has the text: `wanted`, or the usual one that the first record has.

    None for a kind without fields. Raises DataError if there is no such field.
    """
    if kind not in FIELDS_OF:
        return None
    for path in paths:
        with OPEN[kind](path) as file:
            names = FIELDS_OF[kind](printable(path), file)
        if names:  # else the file has no records
            field = fields.choose(names, wanted, printable(path))
            _require_in_all(paths, kind, field)
            return field
    return wanted or fields.USUAL[0]


def _require_in_all(paths: Sequence[Path], kind: str, field: str) -> None:
    """Raises DataError for the first table without the text, before anything is tokenised."""
    if kind not in REQUIRE:
        return
    for path in paths:
        if OPEN[kind] is not streams.seekable or not streams.compression_of(path):
            with OPEN[kind](path) as file:
                REQUIRE[kind](printable(path), file, field)


# Text


@dataclass(frozen=True)
class SmallText:
    """A file of text that is one block."""

    path: str
    size: int

    def documents(self) -> Iterator[Document | BadLines]:
        content = io.BytesIO(streams.whole(self.path, self.size))
        with streams.as_utf8(io.BufferedReader(content)) as file:
            for part in read_text(file, exact_cut=None):
                yield from part.documents()


def read_text(file: BinaryIO, exact_cut: Cut) -> Iterator[Content]:
    """A file is one document. `\\r\\n` and `\\r` become `\\n`, as in Python's text files."""
    decoder = io.IncrementalNewlineDecoder(UTF_8("replace"), translate=True)
    text, is_begun, is_replaced = "", False, False
    while True:
        chunk = file.read(BLOCK_BYTES)
        text += decoder.decode(chunk, final=not chunk)
        end = _end_of_piece(text, exact_cut) if chunk else len(text)
        if end is None:
            continue
        piece, text = text[:end], text[end:]
        replaced = not is_replaced and "\ufffd" in piece
        if piece or not is_begun:
            yield Documents((Document(piece, replaced, continues=is_begun),))
        is_begun, is_replaced = True, is_replaced or replaced
        if not chunk:
            return


def _end_of_piece(text: str, exact_cut: Cut) -> int | None:
    """Where to divide a text of which more follows; None for nowhere yet."""
    if exact_cut is not None and (cut := exact_cut.search(text, BLOCK_BYTES)):
        return cut.start()
    return LONGEST_PIECE if len(text) > LONGEST_PIECE else None


# JSON


@dataclass(frozen=True)
class Lines:
    """Some lines of a file, each with a record in JSON."""

    name: str
    """of the file, in messages"""
    first: int
    """number of the first line"""
    content: Part | bytes
    field: str

    @property
    def size(self) -> int:
        return len(self.content)

    def documents(self) -> Iterator[Document | BadLines]:
        content = self.content.read() if isinstance(self.content, Part) else self.content
        for number, line in enumerate(content.split(b"\n"), self.first):
            if not line or line.isspace():
                continue
            place = f"{self.name}:{number}"
            try:
                values = _values_of_line(line)
            except ValueError as error:
                yield BadLines(f"{place}: {error}")
                continue
            for value in values:
                yield from_record(value, self.field, place)


def read_json(name: str, file: BinaryIO, field: str) -> Iterator[Content]:
    """A record per line; or an array of records, or records over several lines each."""
    head = file.read(BLOCK_BYTES)
    if not _has_a_record_per_line(head):
        values = _values(name, head, file)
        records = (from_record(value, field, f"{name}:{line}") for line, value in values)
        yield from corpus.grouped(records)
        return
    number = 1
    while head:
        content = head + file.readline(LONGEST_VALUE)
        lines = content.count(b"\n")
        if len(content) - len(head) == LONGEST_VALUE and not content.endswith(b"\n"):
            raise DataError(
                f"{name}:{number + lines}: a line of more than {LONGEST_VALUE:,} bytes; "
                "expected a record per line, or an array of records"
            )
        yield Lines(name, number, streams.part(file, content), field)
        number += lines
        head = file.read(BLOCK_BYTES)


def _has_a_record_per_line(head: bytes) -> bool:
    """Whether a file that begins so has a record per line, as far as it can be seen."""
    text = head.decode("utf-8", "replace").lstrip(BLANKS)
    if text.startswith("[") and text[1:].lstrip().startswith(("{", "]")):
        return False
    first, newline, _ = text.partition("\n")
    if newline and first.strip() == "{":
        return False
    try:
        _values_of_line(first.encode())
    except ValueError:
        try:
            _, end = DECODER.raw_decode(text)
        except (ValueError, RecursionError):
            return True
        return bool(newline) and end <= len(first)
    return True


def _values(name: str, head: bytes, stream: BinaryIO) -> Iterator[tuple[int, Any]]:
    """The elements of an array, or values one after the other, each with its line."""
    decoder, more = UTF_8("replace"), head
    text, at, line = "", 0, 1
    is_open = is_array = False
    while True:
        text, at = text[at:] + decoder.decode(more, final=not more), 0
        more_follows = bool(more)
        while True:
            begin = at
            while at < len(text) and (text[at] in ",[]" or text[at] in BLANKS):
                is_array |= text[at] == "["
                is_open = text[at] == "[" or (is_open and text[at] != "]")
                at += 1
            line += text.count("\n", begin, at)
            if at == len(text):
                break
            try:
                value, end = DECODER.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                if more_follows and _may_be_incomplete(error, text):
                    break
                reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deep"
                raise DataError(
                    f"{name}:{line}: invalid JSON ({reason}); expected an array of "
                    "records, or a record per line"
                ) from error
            yield line, value
            line += text.count("\n", at, end)
            at = end
        if not more_follows:
            break
        more = stream.read(max(BLOCK_BYTES, len(text) - at))
    if is_array and is_open:
        raise DataError(f"{name} is cut off: its array has no end; copy or download it again")


def _may_be_incomplete(error: Exception, text: str) -> bool:
    """Whether invalid JSON may be the beginning of valid JSON."""
    if not isinstance(error, json.JSONDecodeError) or len(text) > LONGEST_VALUE:
        return False
    return error.msg.startswith("Unterminated string") or error.pos > len(text) - 16


def _fields_of_json(name: str, file: BinaryIO) -> list[str]:
    head = file.read(BLOCK_BYTES)
    if _has_a_record_per_line(head):
        values = _values_of_lines(head + file.readline(LONGEST_VALUE))
    else:
        values = (value for _, value in _values(name, head, file))
    sampled = itertools.islice(values, SAMPLED_RECORDS)
    records = [value for value in sampled if isinstance(value, dict)]
    return list(dict.fromkeys(name for record in records for name in record))


def _values_of_lines(content: bytes) -> Iterator[Any]:
    for line in content.split(b"\n"):
        if line and not line.isspace():
            with contextlib.suppress(ValueError):
                yield from _values_of_line(line)


def _values_of_line(line: bytes) -> list[Any]:
    """One value, or several records. Raises ValueError, saying what is wrong."""
    text = line.decode("utf-8", "replace").strip(BLANKS)
    try:
        return [DECODER.decode(text)]
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and (records := _records_in_a_row(text)):
            return records
        raise ValueError(f"invalid JSON in column {error.colno} ({error.msg})") from error
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error


def _records_in_a_row(text: str) -> list[Any]:
    """The records of which a text consists, with commas or nothing between them; [] for others."""
    records, at = list[Any](), 0
    while at < len(text):
        try:
            value, at = DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            return []
        if not isinstance(value, dict):
            return []
        records.append(value)
        at = BETWEEN_RECORDS.match(text, at).end()  # type: ignore[union-attr]  # it always matches
    return records


def from_record(value: Any, field: str, place: str) -> Document | BadLines:
    """The text of a record. Raises DataError for a number in place of a text."""
    if not isinstance(value, dict):
        return BadLines(f"{place}: expected a JSON object, got {_kind(value)}")
    if field not in value:
        return BadLines(f"{place}: no field {field!r} among {fields.listed(list(value))}")
    text = value[field]
    if text is None:
        return Document("")
    if isinstance(text, float | bool):
        others = [name for name, other in value.items() if isinstance(other, str)]
        raise DataError(
            f"{place}: expected text in field {field!r}, got {_kind(text)}; mend it"
            f"{fields.instead(others)}"
        )
    if not isinstance(text, str):
        return BadLines(f"{place}: expected text in field {field!r}, got {_kind(text)}")
    return Document(text, replaced="\ufffd" in text)


def _kind(value: Any) -> str:
    return NAMES_OF_TYPES.get(type(value), "null" if value is None else "text")


# Tables as text


def read_csv(name: str, file: BinaryIO, field: str, delimiters: str) -> Iterator[Content]:
    """A row is a record; the first one has the names of the fields."""
    delimiter, names = _header(name, file, delimiters)
    if names:
        csv.field_size_limit(LONGEST_VALUE)
        with io.TextIOWrapper(file, "utf-8", "replace", newline="") as lines:
            rows = csv.reader(lines, delimiter=delimiter, strict=True)
            yield from corpus.grouped(_documents_of_csv(name, field, rows))


def _documents_of_csv(name: str, field: str, rows: Any) -> Iterator[Document | BadLines]:
    names = _names_of_columns(name, rows)
    column = fields.column(names, field, name)
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            reason = f"{name}:{line}: invalid CSV ({error}); a quote in quotes is written twice"
            yield BadLines(reason, count=rows.line_num - line + 1)
            continue
        if not row:
            continue  # an empty line
        more = row[len(names) :]
        # Empty ones at the end of a row are usual; but without others, they are commas of a text.
        if len(row) < len(names) or any(more) or (more and len(names) == 1):
            yield BadLines(f"{name}:{line}: expected {len(names)} columns, got {len(row)}")
        else:
            yield Document(row[column], replaced="\ufffd" in row[column])


def _header(name: str, file: BinaryIO, delimiters: str) -> tuple[str, list[str]]:
    """The delimiter that gives the most columns, and their names."""
    assert isinstance(file, io.BufferedReader)
    head = file.peek().decode("utf-8", "replace")
    if stated := SEP.match(head):
        delimiters = stated[1]
    found = list[tuple[str, list[str]]]()
    wrong = list[DataError]()
    for delimiter in delimiters:
        rows = csv.reader(io.StringIO(head, newline=""), delimiter=delimiter, strict=True)
        try:
            found.append((delimiter, _names_of_columns(name, rows)))
        except DataError as error:  # as of "a";"b" with a comma as delimiter
            wrong.append(error)
    if not found:
        raise wrong[0]
    return max(found, key=lambda item: len(item[1]))


def _names_of_columns(name: str, rows: Any) -> list[str]:
    """The first row that has something; none if there is no such row."""
    try:
        for row in rows:
            if row and row[0] != "sep=":
                return [name.strip() for name in row]
    except csv.Error as error:
        raise DataError(
            f"{name}:{rows.line_num}: {error}; expected the names of columns"
        ) from error
    return []


def _require_column(name: str, file: BinaryIO, field: str, delimiters: str) -> None:
    if names := _header(name, file, delimiters)[1]:
        fields.column(names, field, name)


OPEN: dict[str, Callable[[Path], contextlib.AbstractContextManager[BinaryIO]]] = {
    ".txt": streams.open_utf8,
    ".jsonl": streams.open_utf8,
    ".json": streams.open_utf8,
    ".csv": streams.open_utf8,
    ".tsv": streams.open_utf8,
    ".parquet": streams.seekable,
    ".arrow": streams.seekable,
}
READERS: dict[str, Callable[[str, BinaryIO, str], Iterator[Content]]] = {
    ".jsonl": read_json,
    ".json": read_json,
    ".csv": functools.partial(read_csv, delimiters=DELIMITERS),
    ".tsv": functools.partial(read_csv, delimiters="\t"),
    ".parquet": columns.read_parquet,
    ".arrow": columns.read_arrow,
}
FIELDS_OF: dict[str, Callable[[str, BinaryIO], list[str]]] = {
    ".jsonl": _fields_of_json,
    ".json": _fields_of_json,
    ".csv": lambda name, file: _header(name, file, DELIMITERS)[1],
    ".tsv": lambda name, file: _header(name, file, "\t")[1],
    ".parquet": columns.fields_of_parquet,
    ".arrow": columns.fields_of_arrow,
}
REQUIRE: dict[str, Callable[[str, BinaryIO, str], object]] = {
    ".csv": functools.partial(_require_column, delimiters=DELIMITERS),
    ".tsv": functools.partial(_require_column, delimiters="\t"),
    ".parquet": columns.require_text_in_parquet,
    ".arrow": columns.require_text_in_arrow,
}
"""raise DataError if a table does not have the text in that column"""
