"""The documents of files: one reader per kind, which takes the text and nothing else of a record.

A reader runs in the main process and yields the file's contents in blocks of flat size. What costs
time is left to the worker process that gets the block: decoding, and parsing lines of JSON.

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
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gpt2.base.errors import DataError
from gpt2.base.text import printable
from gpt2.data import corpus, streams
from gpt2.data.corpus import BadLines, Block, Content, Document, Documents, Place
from gpt2.data.tokenisation import EXACT_CUT

BLOCK_BYTES = 500_000
LONGEST_PIECE = 8 * BLOCK_BYTES
"""characters of a text without a place at which it can be divided exactly"""
ROWS_AT_ONCE = 64
"""rows of a table that are read at a time"""
LONGEST_VALUE = 1 << 28
"""characters of one value of a JSON array, and of a field of a .csv file"""
SAMPLED_RECORDS = 100
"""of a file of JSON, which show the fields that it has"""
FIELDS = ("text", "content", "raw_content", "body", "document", "article", "story", "code")
"""where a corpus usually has its text; the first that a file has is taken"""
MOST_NAMES = 12
"""fields that a message lists"""
DELIMITERS = ",;\t|"
"""of a .csv file: the one that gives the most columns"""
ARROW_FILE = b"ARROW1"
ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"

UTF_8 = codecs.getincrementaldecoder("utf-8")
# Other columns may hold numbers of any length, which float() takes and int() refuses.
DECODER = json.JSONDecoder(strict=False, parse_int=float)
NAMES_OF_TYPES = {float: "a number", bool: "true or false", list: "an array", dict: "an object"}


def blocks(
    paths: Sequence[Path], kind: str, field: str | None = None
) -> Callable[[Place], Iterator[Block]]:
    """The blocks of files of one kind; `field` has the text in those that have fields."""

    def from_place(place: Place) -> Iterator[Block]:
        sizes = [streams.size(path) for path in paths]
        before = sum(sizes[: place.file])
        for number in range(place.file, len(paths)):
            path, first = paths[number], place.number if number == place.file else 0
            with OPEN[kind](path) as file:
                contents = READERS[kind](printable(path), file, field or "")
                for at, content in enumerate(itertools.islice(contents, first, None), first):
                    done = before + min(streams.position(file), sizes[number])
                    yield Block(Place(number, at), content, done)
            before += sizes[number]

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
            return field_among(names, wanted, printable(path))
    return wanted or FIELDS[0]


def field_among(names: Sequence[str], wanted: str | None, source: str) -> str:
    """`wanted`, or the usual name of the field with the text; raises DataError without one."""
    lowered = {name.lower(): name for name in reversed(names)}
    usual = [lowered[name] for name in FIELDS if name in lowered]
    if wanted in names or (wanted is None and (usual or len(names) == 1)):
        return wanted or (usual or names)[0]
    missing = f"field {wanted!r}" if wanted else f"field {', '.join(FIELDS[:3])} or the like"
    raise DataError(f"{source} has no {missing}; choose one of {_listed(names)} with --text_field")


# Text


def read_text(_name: str, file: BinaryIO, _field: str) -> Iterator[Content]:
    """A file is one document. `\\r\\n` and `\\r` become `\\n`, as in Python's text files."""
    decoder = io.IncrementalNewlineDecoder(UTF_8("replace"), translate=True)
    text, is_begun, is_replaced = "", False, False
    while True:
        chunk = file.read(BLOCK_BYTES)
        text += decoder.decode(chunk, final=not chunk)
        end = _end_of_piece(text) if chunk else len(text)
        if end is None:
            continue
        piece, text = text[:end], text[end:]
        replaced = not is_replaced and "\ufffd" in piece
        if piece or not is_begun:
            yield Documents((Document(piece, replaced, continues=is_begun),))
        is_begun, is_replaced = True, is_replaced or replaced
        if not chunk:
            return


def _end_of_piece(text: str) -> int | None:
    """Where to divide a text of which more follows; None for nowhere yet."""
    if cut := EXACT_CUT.search(text, BLOCK_BYTES):
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
    content: bytes
    field: str

    @property
    def size(self) -> int:
        return len(self.content)

    def documents(self) -> Iterator[Document | BadLines]:
        for number, line in enumerate(self.content.split(b"\n"), self.first):
            if not line or line.isspace():
                continue
            place = f"{self.name}:{number}"
            try:
                value = _json(line)
            except ValueError as error:
                yield BadLines(f"{place}: {error}")
                continue
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
        content = head + file.readline()
        yield Lines(name, number, content, field)
        number += content.count(b"\n")
        head = file.read(BLOCK_BYTES)


def _has_a_record_per_line(head: bytes) -> bool:
    """Whether a file that begins so has a record per line, as far as it can be seen."""
    text = head.decode("utf-8", "replace").lstrip()
    if text.startswith("["):
        return not text[1:].lstrip().startswith(("{", "]"))
    first, newline, _ = text.partition("\n")
    if newline and first.strip() == "{":
        return False
    try:
        _json(first.encode())
    except ValueError:
        try:
            _, end = DECODER.raw_decode(text)
        except (ValueError, RecursionError):
            return True
        return end <= len(first) or not newline
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
            while at < len(text) and text[at] in " \t\r\n,[]":
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
                    f"{name}:{line}: invalid JSON ({reason}); expected an array of records, or a "
                    "record per line"
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
        values = _values_of_lines(head + file.readline())
    else:
        values = (value for _, value in _values(name, head, file))
    sampled = itertools.islice(values, SAMPLED_RECORDS)
    records = [value for value in sampled if isinstance(value, dict)]
    return list(dict.fromkeys(name for record in records for name in record))


def _values_of_lines(content: bytes) -> Iterator[Any]:
    for line in content.split(b"\n"):
        if line and not line.isspace():
            try:
                yield _json(line)
            except ValueError:
                continue


def _json(line: bytes) -> Any:
    """Raises ValueError, saying what is wrong."""
    text = line.decode("utf-8", "replace").strip("\ufeff \t\r\n")
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error


def from_record(value: Any, field: str, place: str) -> Document | BadLines:
    """The text of a record. Raises DataError for a number in place of a text."""
    if not isinstance(value, dict):
        return BadLines(f"{place}: expected a JSON object, got {_kind(value)}")
    if field not in value:
        return BadLines(f"{place}: no field {field!r} among {_listed(list(value))}")
    text = value[field]
    if text is None:
        return Document("")
    if isinstance(text, float | bool):
        raise DataError(
            f"{place}: expected text in field {field!r}, got {_kind(text)}; choose one of "
            f"{_listed(list(value))} with --text_field"
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
            yield from corpus.grouped(_documents_of_csv(name, field, names, rows))


def _documents_of_csv(
    name: str, field: str, names: list[str], rows: Any
) -> Iterator[Document | BadLines]:
    if field not in names:
        raise DataError(f"{name} has no column {field!r}; it has {_listed(names)}")
    column = names.index(field)
    while next(rows) != names:
        pass  # empty lines before the names
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadLines(f"{name}:{line}: {error}", count=rows.line_num - line + 1)
            continue
        if not row:
            continue  # an empty line
        if len(row) < len(names) or any(row[len(names) :]):
            yield BadLines(f"{name}:{line}: expected {len(names)} columns, got {len(row)}")
        else:
            yield Document(row[column], replaced="\ufffd" in row[column])


def _header(name: str, file: BinaryIO, delimiters: str) -> tuple[str, list[str]]:
    """The delimiter that gives the most columns, and their names."""
    assert isinstance(file, io.BufferedReader)
    head = io.StringIO(file.peek().decode("utf-8", "replace"), newline="")
    found = list[tuple[str, list[str]]]()
    for delimiter in delimiters:
        head.seek(0)
        try:
            rows = csv.reader(head, delimiter=delimiter, strict=True)
            found.append((delimiter, next(filter(None, rows), [])))
        except csv.Error as error:
            raise DataError(f"{name}:1: {error}; expected the names of columns") from error
    return max(found, key=lambda item: len(item[1]))


# Tables in columns


@dataclass(frozen=True)
class Column:
    """Rows of a column of text."""

    values: tuple[bytes | None, ...]

    @property
    def size(self) -> int:
        return sum(len(value) for value in self.values if value is not None)

    def documents(self) -> Iterator[Document]:
        for value in self.values:
            text = "" if value is None else value.decode("utf-8", "replace")
            yield Document(text, replaced="\ufffd" in text)


def read_parquet(name: str, file: BinaryIO, field: str) -> Iterator[Content]:
    import pyarrow.parquet as parquet

    with _errors_of_arrow(name):
        table = parquet.ParquetFile(file, buffer_size=BLOCK_BYTES)
        _require_text(name, table.schema_arrow, field)
        for batch in table.iter_batches(ROWS_AT_ONCE, columns=[field], use_threads=True):
            yield _column(batch.column(0))


def read_arrow(name: str, file: BinaryIO, field: str) -> Iterator[Content]:
    """A file or a stream of Arrow's IPC format; the `datasets` library writes streams."""
    import pyarrow

    with _errors_of_arrow(name):
        schema = _reader_of_arrow(name, file).schema
        _require_text(name, schema, field)
        only = pyarrow.ipc.IpcReadOptions(included_fields=[schema.get_field_index(field)])
        for batch in _batches_of_arrow(_reader_of_arrow(name, file, only)):
            for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                yield _column(batch.column(0).slice(start, ROWS_AT_ONCE))


def _reader_of_arrow(name: str, file: BinaryIO, options: Any = None) -> Any:
    import pyarrow

    file.seek(0)
    magic = file.read(len(ARROW_FILE))
    if magic == ARROW_FILE:
        file.seek(0)
        return pyarrow.ipc.open_file(file, options=options)
    file.seek(-min(len(ARROW_END), file.seek(0, os.SEEK_END)), os.SEEK_END)
    if not file.read().endswith(ARROW_END):
        raise DataError(f"{name} is cut off: it has no end; copy or download it again")
    file.seek(0)
    return pyarrow.ipc.open_stream(file, options=options)


def _batches_of_arrow(reader: Any) -> Iterator[Any]:
    if hasattr(reader, "num_record_batches"):
        return (reader.get_batch(number) for number in range(reader.num_record_batches))
    return iter(reader)


def _require_text(name: str, schema: Any, field: str) -> None:
    from pyarrow import types

    if field not in schema.names:
        raise DataError(f"{name} has no column {field!r}; it has {_listed(schema.names)}")
    kind = schema.field(field).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    is_text = types.is_string(value) or types.is_large_string(value) or types.is_string_view(value)
    if not is_text and not types.is_binary(value) and not types.is_null(value):
        raise DataError(
            f"{name}: expected text in column {field!r}, got {kind}; choose one of "
            f"{_listed(schema.names)} with --text_field"
        )


def _column(array: Any) -> Column:
    import pyarrow

    if pyarrow.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return Column(tuple(array.cast(pyarrow.large_binary()).to_pylist()))


def _fields_of_parquet(name: str, file: BinaryIO) -> list[str]:
    import pyarrow.parquet as parquet

    with _errors_of_arrow(name):
        return list(parquet.read_schema(file).names)


def _fields_of_arrow(name: str, file: BinaryIO) -> list[str]:
    with _errors_of_arrow(name):
        return list(_reader_of_arrow(name, file).schema.names)


@contextlib.contextmanager
def _errors_of_arrow(name: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{name} is damaged or cut off: {reason}") from error


def _listed(names: Sequence[str]) -> str:
    """The first names of fields, each shortened: in a file without names they are texts."""
    shown = [printable(f"{name:.40}") for name in names[:MOST_NAMES]]
    return ", ".join([*shown, "…"] if len(names) > MOST_NAMES else shown)


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
    ".txt": read_text,
    ".jsonl": read_json,
    ".json": read_json,
    ".csv": functools.partial(read_csv, delimiters=DELIMITERS),
    ".tsv": functools.partial(read_csv, delimiters="\t"),
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
FIELDS_OF: dict[str, Callable[[str, BinaryIO], list[str]]] = {
    ".jsonl": _fields_of_json,
    ".json": _fields_of_json,
    ".csv": lambda name, file: _header(name, file, DELIMITERS)[1],
    ".tsv": lambda name, file: _header(name, file, "\t")[1],
    ".parquet": _fields_of_parquet,
    ".arrow": _fields_of_arrow,
}
