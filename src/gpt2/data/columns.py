"""The texts of Parquet and Arrow files, of which the column with the text alone is read."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from gpt2.base.errors import DataError
from gpt2.data import fields
from gpt2.data.corpus import Document

ROWS_AT_ONCE = 64
"""rows of a table that are read at a time"""
BUFFER_BYTES = 500_000
"""of a column of Parquet that are read at a time"""
ARROW_FILE = b"ARROW1"
ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"


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


def read_parquet(name: str, file: BinaryIO, field: str) -> Iterator[Column]:
    import pyarrow.parquet as parquet

    with _errors_of_arrow(name):
        table = parquet.ParquetFile(file, buffer_size=BUFFER_BYTES, page_checksum_verification=True)
        _text_column(name, table.schema_arrow, field)
        # A name with a dot is also the path of a field in a struct: both are read.
        for batch in table.iter_batches(ROWS_AT_ONCE, columns=[field], use_threads=True):
            array = batch.column(batch.schema.names.index(field))
            yield _column(array.dictionary_decode() if _has_dictionary(array) else array)


def read_arrow(name: str, file: BinaryIO, field: str) -> Iterator[Column]:
    """A file or a stream of Arrow's IPC format; the `datasets` library writes streams."""
    import pyarrow

    with _errors_of_arrow(name):
        number = _text_column(name, _reader_of_arrow(name, file).schema, field)
        only = pyarrow.ipc.IpcReadOptions(included_fields=[number])
        for batch in _batches_of_arrow(_reader_of_arrow(name, file, only)):
            array = batch.column(0)
            array.validate()
            values = _validated(array.dictionary if _has_dictionary(array) else array)
            for start in range(0, len(array), ROWS_AT_ONCE):
                rows = array.slice(start, ROWS_AT_ONCE)
                if _has_dictionary(array):
                    yield _column(values.take(rows.indices))
                else:
                    yield _column(values.slice(start, ROWS_AT_ONCE))


def fields_of_parquet(name: str, file: BinaryIO) -> list[str]:
    import pyarrow.parquet as parquet

    with _errors_of_arrow(name):
        return list(parquet.read_schema(file).names)


def fields_of_arrow(name: str, file: BinaryIO) -> list[str]:
    with _errors_of_arrow(name):
        return list(_reader_of_arrow(name, file).schema.names)


def require_text_in_parquet(name: str, file: BinaryIO, field: str) -> None:
    """Raises DataError if the file does not have text in that column."""
    import pyarrow.parquet as parquet

    with _errors_of_arrow(name):
        _text_column(name, parquet.read_schema(file), field)


def require_text_in_arrow(name: str, file: BinaryIO, field: str) -> None:
    """Raises DataError if the file does not have text in that column."""
    with _errors_of_arrow(name):
        _text_column(name, _reader_of_arrow(name, file).schema, field)


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


def _text_column(name: str, schema: Any, field: str) -> int:
    """The number of the column with the text. Raises DataError if it has none."""
    import pyarrow
    from pyarrow import types

    number = fields.column(schema.names, field, name)
    texts = (*_binary_types(), *_binary_types().values())

    def holds(column: int) -> Any:
        kind = schema.field(column).type
        return kind.value_type if types.is_dictionary(kind) else kind

    if holds(number) not in (*texts, pyarrow.null()):
        others = [other for at, other in enumerate(schema.names) if holds(at) in texts]
        raise DataError(
            f"{name}: expected text in column {field!r}, got {schema.field(number).type}"
            f"; convert it{fields.instead(others)}"
        )
    return number


def _binary_types() -> dict[Any, Any]:
    """By each type of text, that of its bytes."""
    import pyarrow

    return {
        pyarrow.string(): pyarrow.binary(),
        pyarrow.large_string(): pyarrow.large_binary(),
        pyarrow.string_view(): pyarrow.binary_view(),
    }


def _has_dictionary(array: Any) -> bool:
    from pyarrow import types

    return bool(types.is_dictionary(array.type))


def _validated(array: Any) -> Any:
    """The values as bytes. Those of an Arrow file are as they are in it: pyarrow would follow wrong
    offsets out of its memory."""
    import pyarrow

    values = array.view(_binary_types().get(array.type, array.type))
    values.validate(full=True)
    return values.cast(pyarrow.large_binary())


def _column(array: Any) -> Column:
    import pyarrow

    return Column(tuple(array.cast(pyarrow.large_binary()).to_pylist()))


@contextlib.contextmanager
def _errors_of_arrow(name: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "decrypt" in reason.lower():
            raise DataError(f"{name} is encrypted ({reason}); decrypt it") from error
        raise DataError(f"{name} is damaged or cut off: {reason}") from error
