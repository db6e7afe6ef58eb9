import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import pickle
import struct
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2.base.errors import DataError
from gpt2.data import columns, readers
from gpt2.data.corpus import BadLines, Document, Place
from gpt2.data.tokenizer import EXACT_CUT

COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def read(path: Path, field: str | None = None) -> list[Document | BadLines]:
    kind = next(part for part in path.suffixes[::-1] if part not in COMPRESS)
    found = readers.choose_field([path], kind, field)
    blocks = readers.blocks([path], kind, found)(Place(), EXACT_CUT)
    return [item for block in blocks for item in block.content.documents()]


def texts(path: Path, field: str | None = None) -> list[str]:
    items = read(path, field)
    assert all(isinstance(item, Document) for item in items), items
    return [item.text for item in items]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


RECORDS = [{"id": 1, "text": "one\ntwo, é"}, {"id": None, "text": None}, {"id": 3, "text": '"3"'}]


def content_of(kind: str) -> bytes:
    """RECORDS as a file of a kind."""
    if kind == ".jsonl":
        return "".join(json.dumps(record) + "\n" for record in RECORDS).encode()
    if kind == ".json":
        return json.dumps(RECORDS, indent=1).encode()
    if kind in (".csv", ".tsv"):
        file = io.StringIO(newline="")
        rows = csv.DictWriter(file, ["id", "text"], delimiter="," if kind == ".csv" else "\t")
        rows.writeheader()
        rows.writerows(RECORDS)
        return file.getvalue().encode()
    table, file = pyarrow.Table.from_pylist(RECORDS), io.BytesIO()
    if kind == ".parquet":
        parquet.write_table(table, file)
    else:
        with pyarrow.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    return file.getvalue()


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow"])
def test_every_kind_gives_the_same_texts(tmp_path: Path, kind: str, compression: str):
    content = COMPRESS[compression](content_of(kind))
    assert texts(write(tmp_path, f"a{kind}{compression}", content)) == ["one\ntwo, é", "", '"3"']


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_text_file_is_one_document(tmp_path: Path, compression: str):
    content = COMPRESS[compression]("one\r\ntwo\rthree é\n\n".encode())
    assert texts(write(tmp_path, f"a.txt{compression}", content)) == ["one\ntwo\nthree é\n\n"]


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_a_long_text_is_one_document_in_parts(tmp_path_factory, data: st.DataObject):
    text = data.draw(st.text("a \nß\u2028\ufeff", max_size=60).map(str), label="text")
    path = write(tmp_path_factory.mktemp("long"), "a.txt", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "BLOCK_BYTES", data.draw(st.integers(1, 9)))
        patch.setattr(readers, "LONGEST_PIECE", 20)
        items = read(path)
    assert "".join(item.text for item in items) == text.lstrip("\ufeff")
    assert [item.continues for item in items] == [False, *[True] * (len(items) - 1)]
    for item in items[1:]:
        assert item.text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"caf\xe9", "caf\ufffd"),
        (b"\xef\xbb\xbfone", "one"),
        ("one é".encode("utf-16"), "one é"),
        (b"", ""),
        (b"2024-01-01", "2024-01-01"),
    ],
)
def test_what_is_damaged_in_a_text_is_mended(tmp_path: Path, content: bytes, expected: str):
    assert read(write(tmp_path, "a.txt", content)) == [
        Document(expected, replaced="\ufffd" in expected)
    ]


def test_a_replacement_in_a_long_text_counts_once(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 4)
    items = read(write(tmp_path, "a.txt", b"\xff aa bb cc \xff dd ee ff \xff"))
    assert len(items) > 3
    assert [item.replaced for item in items] == [True, *[False] * (len(items) - 1)]


@pytest.mark.parametrize("field", ["text", "TEXT", "content", "raw_content", "Body", "whatever"])
def test_the_usual_field_is_found(tmp_path: Path, field: str):
    assert texts(write(tmp_path, "a.jsonl", json.dumps({field: "one"}))) == ["one"]


def test_of_several_usual_fields_the_first_of_the_list_is_taken(tmp_path: Path):
    path = write(tmp_path, "a.jsonl", json.dumps({"content": "no", "id": 1, "text": "yes"}))
    assert texts(path) == ["yes"]
    assert texts(path, "content") == ["no"]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet", ".arrow"])
def test_a_field_that_is_not_there(tmp_path: Path, kind: str):
    path = write(tmp_path, f"a{kind}", content_of(kind))
    with pytest.raises(DataError) as error:
        read(path, "body")
    assert str(error.value) == (
        f"{path} has no field 'body'; choose one of id, text with --text_field"
    )


def test_files_without_records_do_not_choose_the_field(tmp_path: Path):
    paths = [write(tmp_path, "a.jsonl", "\n\n"), write(tmp_path, "b.jsonl", '{"content": "one"}')]
    assert readers.choose_field(paths, ".jsonl", None) == "content"
    assert readers.choose_field(paths[:1], ".jsonl", None) == "text"


@pytest.mark.parametrize(
    "other",
    [
        '"x": 1}\n{"text": "b", "x": "two"}\n{"text": "c", "x": null}\n{"text": "d"}',
        '"x": {"y": [1]}}\n{"text": "b", "x": []}\n{"y": 2, "text": "c"}\n{"z": {}, "text": "d"}',
        f'"x": {"9" * 6000}}}\n{{"text": "b", "x": NaN}}\n{{"text": "c"}}\n\n \n{{"text": "d"}}',
    ],
)
def test_other_fields_do_not_matter(tmp_path: Path, other: str):
    path = write(tmp_path, "a.jsonl", '{"text": "a", ' + other)
    assert texts(path) == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "cut', "invalid JSON in column 10 (Unterminated string starting at)"),
        ("not JSON", "invalid JSON in column 1 (Expecting value)"),
        ("\0\0\0", "invalid JSON in column 1 (Expecting value)"),
        ("[1, 2]", "expected a JSON object, got an array"),
        ("17", "expected a JSON object, got a number"),
        ('{"body": "x"}', "no field 'text' among body"),
        ('{"text": ["x"]}', "expected text in field 'text', got an array"),
        ("[" * 100_000, "JSON that is nested too deeply"),
    ],
)
def test_a_bad_line_is_left_out_with_its_place(tmp_path: Path, line: str, reason: str):
    path = write(tmp_path, "a.jsonl", f'{{"text": "a"}}\n{line}\n{{"text": "b"}}')
    assert read(path) == [Document("a"), BadLines(f"{path}:2: {reason}"), Document("b")]


@pytest.mark.parametrize("value", ["1", "-1.5", "true", "1e400"])
def test_a_number_in_place_of_a_text_is_refused_by_file_and_line(tmp_path: Path, value: str):
    path = write(
        tmp_path, "a.jsonl", f'{{"text": "a"}}\n\n{{"text": {value}, "id": 1, "title": "b"}}\n'
    )
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:3: expected text in field 'text', got ")
    assert str(error.value).endswith("; mend it, or choose one of title with --text_field")


def test_names_in_messages_are_one_line(tmp_path: Path):
    path = write(tmp_path, "a\n\x1b.jsonl", 'bad\n{"text": "a", "\\u001b[2J": 1}\n')
    assert read(path)[0] == BadLines(f"{str(path)!r}:1: invalid JSON in column 1 (Expecting value)")
    with pytest.raises(DataError) as error:
        read(path, "none")
    assert str(error.value) == (
        f"{str(path)!r} has no field 'none'; choose one of text, '\\x1b[2J' with --text_field"
    )


def test_lines_with_odd_characters(tmp_path: Path):
    lines = ['\ufeff{"text": "a\u2028b\x85c"}', '{"text": "tab\there"}', '{"text": "\\ud800"}\r']
    path = write(tmp_path, "a.jsonl", "\n".join(lines).encode() + b'\n{"text": "\xff"}')
    assert texts(path) == ["a\u2028b\x85c", "tab\there", "\ud800", "\ufffd"]


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a"}, {"text": "b"}]',
        '[\n {"text": "a", "x": [1, {"y": "]"}]},\n {\n"text": "b"}\n]\n',
        '{\n "text": "a"\n}\n{\n "text": "b"\n}\n',
        '{"text": "a"}\n{"text": "b"}',
        '  {"text": "a"} \n\n {"text": "b"}  \n',
    ],
)
@pytest.mark.parametrize("block_bytes", [16, 500_000])
def test_arrays_and_records_over_several_lines(tmp_path: Path, monkeypatch, content, block_bytes):
    monkeypatch.setattr(readers, "BLOCK_BYTES", block_bytes)
    assert texts(write(tmp_path, "a.json", content)) == ["a", "b"]


@pytest.mark.parametrize(
    "content",
    [
        '{"text": "a"},\n{"text": "b"},\n{"text": "c"}',
        '{"text": "a"}{"text": "b"}\n{"text": "c"}\n',
        '{"text": "a"}{"text": "b"} {"text": "c"}',
        '{"text": "a"}\r{"text": "b"}\r{"text": "c"}\r',
        '\x1e{"text": "a"}\n\x1e{"text": "b"}\n\x1e{"text": "c"}\n',
        '\x1e{\n"text": "a"}\n\x1e{"text": "b"}\n\x1e{"text": "c"}\n',
        '{"text": "a"}\n\0\0\0\0{"text": "b"}\n{"text": "c"}\0\0',
        '[{"text": "a"}]\r\n\ufeff[{"text": "b"}, {"text": "c"}]',
    ],
)
@pytest.mark.parametrize("block_bytes", [16, 500_000])
def test_records_with_other_separators(tmp_path: Path, monkeypatch, content, block_bytes):
    monkeypatch.setattr(readers, "BLOCK_BYTES", block_bytes)
    assert texts(write(tmp_path, "a.jsonl", content)) == ["a", "b", "c"]


@pytest.mark.parametrize("line", ['{"text": "b"} x', '12 {"text": "b"}', '{"text": "b"}, 1'])
def test_a_line_of_records_and_something_else_is_bad(tmp_path: Path, line: str):
    _, bad, _ = read(write(tmp_path, "a.jsonl", f'{{"text": "a"}}\n{line}\n{{"text": "c"}}'))
    assert isinstance(bad, BadLines)
    assert "a.jsonl:2: invalid JSON in column " in bad.reason
    assert "(Extra data)" in bad.reason


def test_not_a_number_is_a_text_that_pandas_does_not_have(tmp_path: Path):
    assert texts(write(tmp_path, "a.jsonl", '{"text": "a"}\n{"text": NaN}')) == ["a", ""]


def test_a_line_without_an_end_is_refused_in_flat_memory(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 20)
    monkeypatch.setattr(readers, "LONGEST_VALUE", 100)
    path = write(tmp_path, "a.json", '{"text": "a"}\n{"1": "' + "x" * 200)
    with pytest.raises(DataError, match=r"a\.json:2: a line of more than 100 bytes"):
        read(path)


def test_an_array_of_texts_is_named_as_such(tmp_path: Path):
    items = read(write(tmp_path, "a.json", '[\n"one",\n"two"\n]'))
    assert [item.reason.rpartition("a.json:")[2] for item in items] == [
        "2: expected a JSON object, got text",
        "3: expected a JSON object, got text",
    ]


def test_a_name_that_is_no_line_is_one_in_messages(tmp_path: Path):
    path = write(tmp_path, "a\nb.jsonl", '{"a\\nb": 1, "c": 2}')
    with pytest.raises(DataError) as error:
        read(path)
    assert "\n" not in str(error.value)
    assert "'a\\nb', c" in str(error.value)


def test_an_array_that_is_cut_off(tmp_path: Path):
    whole = json.dumps([{"text": "a"}, {"text": "b"}])
    for end in range(14, len(whole)):
        path = write(tmp_path, "a.json", whole[:end])
        with pytest.raises(DataError, match=r"a\.json.* (cut off|invalid JSON)"):
            read(path)


def test_rows_of_csv(tmp_path: Path):
    path = write(
        tmp_path, "a.csv", 'id;Text\n1;"a;b ""c""\nd"\n\n2;2024-01-01\n3;\n4;x;\n5\n6;x;y\n'
    )
    assert read(path) == [
        Document('a;b "c"\nd'),
        Document("2024-01-01"),
        Document(""),
        Document("x"),
        BadLines(f"{path}:8: expected 2 columns, got 1"),
        BadLines(f"{path}:9: expected 2 columns, got 3"),
    ]


def test_empty_lines_before_the_names_of_columns(tmp_path: Path):
    path = write(tmp_path, "a.csv", "\n\r\ntext,id\none,1\ntext,id\n")
    assert texts(path) == ["one", "text"]


def test_names_of_columns_that_cannot_be_read(tmp_path: Path):
    path = write(tmp_path, "a.csv", '"te"xt,id\none,1\n')
    with pytest.raises(DataError, match=r"a\.csv:1: .*; expected the names of columns"):
        read(path)


@pytest.mark.parametrize(
    "content",
    [
        'sep=;\r\nid;text\r\n1;"a, b"\r\n',
        "sep=|\nid|text\n1|a, b\n",
        '"id";"text"\n"1";"a, b"\n',
        '"id"\t"text"\n"1"\t"a, b"\n',
        'id, text\n1,"a, b"\n',
        '"the\nid",text\n1,"a, b"\n',
    ],
)
def test_names_of_columns_in_other_forms(tmp_path: Path, content: str):
    assert texts(write(tmp_path, "a.csv", content)) == ["a, b"]


def test_a_comma_at_the_end_of_a_text_without_quotes_is_not_lost(tmp_path: Path):
    path = write(tmp_path, "a.csv", "text\none,\ntwo\n")
    assert read(path) == [BadLines(f"{path}:2: expected 1 columns, got 2"), Document("two")]


def test_two_columns_of_one_name_are_refused(tmp_path: Path):
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    table = parquet_file(tmp_path / "a.parquet", pyarrow.table(columns, names=["text", "text"]))
    for path in (table, write(tmp_path, "a.csv", "text,text\na,b\n")):
        with pytest.raises(DataError, match="has 2 columns 'text'; rename"):
            read(path)


def test_a_table_without_the_text_is_found_before_the_others_are_read(tmp_path: Path):
    columns = ({"text": ["a"]}, {"body": ["b"]}, {"text": [1]})
    good, without, number = (
        parquet_file(tmp_path / f"{name}.parquet", pyarrow.table(values))
        for name, values in zip("abc", columns, strict=True)
    )
    assert readers.choose_field([good, good], ".parquet", None) == "text"
    with pytest.raises(DataError, match=r"b\.parquet has no column 'text'; it has body"):
        readers.choose_field([good, without], ".parquet", None)
    with pytest.raises(DataError, match=r"c\.parquet: expected text .*, got int64"):
        readers.choose_field([good, number], ".parquet", None)
    header = write(tmp_path, "a.csv", "id,body\n1,2\n")
    with pytest.raises(DataError, match=r"a\.csv has no column 'text'; it has id, body"):
        readers.choose_field([write(tmp_path, "0.csv", "text\n"), header], ".csv", None)


def test_a_quote_that_is_not_closed_counts_all_lines_that_it_takes(tmp_path: Path):
    path = write(tmp_path, "a.csv", 'text\none\n"two\nthree\nfour\n')
    reason = f"{path}:3: invalid CSV (unexpected end of data); a quote in quotes is written twice"
    assert read(path) == [Document("one"), BadLines(reason, count=3)]


def parquet_file(path: Path, table: pyarrow.Table, **options) -> Path:
    parquet.write_table(table, path, **options)
    return path


TYPES = [
    pyarrow.large_string(),
    pyarrow.string_view(),
    pyarrow.binary(),
    pyarrow.large_binary(),
    pyarrow.binary_view(),
    pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    pyarrow.dictionary(pyarrow.uint8(), pyarrow.large_string()),
]
NOT_IN_PARQUET = pyarrow.dictionary(pyarrow.uint32(), pyarrow.string_view())


def values_of(kind: pyarrow.DataType) -> pyarrow.Array:
    if not pyarrow.types.is_dictionary(kind):
        return pyarrow.array(["a", None, "é", "a"], pyarrow.string()).cast(kind)
    indices = pyarrow.array([0, None, 1, 0], kind.index_type)
    return pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array(["a", "é"], kind.value_type))


@pytest.mark.parametrize("kind", [*TYPES, NOT_IN_PARQUET], ids=str)
def test_columns_of_other_types_of_text(tmp_path: Path, kind: pyarrow.DataType):
    table = pyarrow.table({"n": pyarrow.nulls(4), "text": values_of(kind)})
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as file:
        file.write_table(table)
    assert texts(tmp_path / "a.arrow") == ["a", "", "é", "a"]
    if kind != NOT_IN_PARQUET:
        assert texts(parquet_file(tmp_path / "a.parquet", table)) == ["a", "", "é", "a"]


def test_a_name_with_a_dot_is_not_the_field_of_a_struct(tmp_path: Path):
    columns = {"a": [{"b": "no"}], "a.b": ["yes"], "a.c": ["neither"]}
    path = parquet_file(tmp_path / "a.parquet", pyarrow.table(columns))
    assert texts(path, "a.b") == ["yes"]


@pytest.mark.parametrize("use_dictionary", [False, True])
def test_a_page_that_its_checksum_contradicts_is_refused(tmp_path: Path, use_dictionary: bool):
    table = pyarrow.table({"text": [f"sentence {n}" for n in range(50)]})
    options = {"compression": "none", "write_page_checksum": True}
    path = parquet_file(tmp_path / "a.parquet", table, use_dictionary=use_dictionary, **options)
    path.write_bytes(path.read_bytes().replace(b"sentence 25", b"sentence 52"))
    with pytest.raises(DataError, match=r"a\.parquet is damaged or cut off: .*checksum"):
        read(path)


@pytest.mark.parametrize("is_dictionary", [False, True])
def test_numbers_in_an_arrow_file_that_lead_out_of_it_are_refused(tmp_path: Path, is_dictionary):
    values = pyarrow.array(["abcde", "fgh", "ij", "abcde"])
    table = pyarrow.table({"text": values.dictionary_encode() if is_dictionary else values})
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as stream:
        stream.write_table(table)
    right = (0, 1, 2, 0) if is_dictionary else (0, 5, 8, 10, 15)
    wrong = (right[0], 2_000_000_000, *right[2:])
    content = (tmp_path / "a.arrow").read_bytes()
    whole, damaged = (struct.pack(f"<{len(right)}i", *numbers) for numbers in (right, wrong))
    assert content.count(whole) == 1
    path = write(tmp_path, "b.arrow", content.replace(whole, damaged))
    with pytest.raises(DataError, match=r"b\.arrow is damaged or cut off: "):
        read(path)


def test_a_column_without_text(tmp_path: Path):
    table = pyarrow.table({"text": [1, 2], "id": ["a", "b"]})
    path = parquet_file(tmp_path / "a.parquet", table)
    with pytest.raises(
        DataError,
        match="expected text in column 'text', got int64; convert it, or choose one of id",
    ):
        read(path)
    assert texts(path, "id") == ["a", "b"]


def test_tables_in_odd_forms(tmp_path: Path):
    columns = {"n": pyarrow.nulls(700), "text": [f"{n} é" for n in range(700)], "x": [[1]] * 700}
    table = pyarrow.table(columns)
    expected = columns["text"]
    assert texts(parquet_file(tmp_path / "a.parquet", table, row_group_size=300)) == expected
    assert texts(parquet_file(tmp_path / "b.parquet", table.slice(0, 0))) == []
    assert texts(parquet_file(tmp_path / "c.parquet", pyarrow.table({"text": []}))) == []
    with pyarrow.ipc.new_file(tmp_path / "d.arrow", table.schema) as file:
        file.write_table(table, max_chunksize=500)
    assert texts(tmp_path / "d.arrow") == expected
    with pyarrow.ipc.new_stream(tmp_path / "e.arrow", table.schema) as stream:
        stream.write_table(table.slice(0, 0))
    assert texts(tmp_path / "e.arrow") == []


def test_strings_that_are_not_utf8_in_a_table(tmp_path: Path):
    wrong = pyarrow.array([b"caf\xe9"]).view(pyarrow.string())
    path = parquet_file(tmp_path / "a.parquet", pyarrow.table({"text": wrong}))
    assert read(path) == [Document("caf\ufffd", replaced=True)]


@pytest.mark.parametrize("kind", [".parquet", ".arrow"])
def test_a_table_that_is_cut_off(tmp_path: Path, kind: str):
    whole = content_of(kind)
    for end in range(0, len(whole), 7):
        path = write(tmp_path, f"a{kind}", whole[:end])
        with pytest.raises(DataError, match=f"a{kind} is (damaged or )?cut off"):
            read(path)


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".json", ".csv", ".parquet", ".arrow"])
def test_from_any_block_on_the_rest_is_the_same(tmp_path: Path, monkeypatch, kind: str):
    monkeypatch.setattr(readers, "BLOCK_BYTES", 10)
    monkeypatch.setattr(readers.corpus, "BLOCK_CHARACTERS", 3)
    monkeypatch.setattr(columns, "ROWS_AT_ONCE", 1)
    content = b"some words and more\n" * 3 if kind == ".txt" else content_of(kind)
    paths = [write(tmp_path, f"{name}{kind}", content) for name in "ab"]
    from_place = readers.blocks(paths, kind, None if kind == ".txt" else "text")
    blocks = list(from_place(Place(), EXACT_CUT))
    assert len(blocks) > 3
    for number, block in enumerate(blocks):
        assert list(from_place(block.place, EXACT_CUT)) == blocks[number:]
    done = [block.done for block in blocks]
    assert done == sorted(done)
    assert 0 < done[-1] <= sum(path.stat().st_size for path in paths)
    assert len({item.place for item in blocks}) == len(blocks)
    assert all(itertools.starmap(lambda a, b: a.place < b.place, itertools.pairwise(blocks)))


@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_a_worker_reads_a_plain_file_itself(tmp_path: Path, kind: str):
    """The text is not sent to it; what changed meanwhile, or is gone, is named."""
    path = write(tmp_path, f"a{kind}", content_of(kind) * 100 if kind == ".jsonl" else "a b" * 9999)
    (block,) = readers.blocks([path], kind, "text")(Place(), EXACT_CUT)
    sent = pickle.dumps(block)
    assert len(sent) < 1000 < block.content.size
    assert list(pickle.loads(sent).content.documents()) == read(path, "text")
    before = path.read_bytes()
    for now in (before[:-1], before[1:] + b" " if kind == ".jsonl" else before + b" "):
        path.write_bytes(now)
        with pytest.raises(DataError, match=rf"a\{kind} changed while it was read.*--overwrite"):
            list(block.content.documents())
    path.unlink()
    with pytest.raises(DataError, match=rf"^cannot read .*a\{kind}: No such file"):
        list(block.content.documents())


def test_lines_of_a_compressed_file_are_sent(tmp_path: Path):
    path = write(tmp_path, "a.jsonl.gz", gzip.compress(content_of(".jsonl")))
    (block,) = readers.blocks([path], ".jsonl", "text")(Place(), EXACT_CUT)
    path.unlink()
    assert len(list(block.content.documents())) == len(RECORDS)
