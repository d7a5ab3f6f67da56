from __future__ import annotations

from pathlib import Path

import pytest

from mmformer.datasets.tables import ManifestError, read_table, values


def table(tmp_path: Path, text: str | bytes, name: str = "a.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_table(path)


@pytest.mark.parametrize("separator", list(",;\t|"))
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_the_separator_is_seen_in_the_header(tmp_path, separator, name) -> None:
    others = " ".join(set(",;\t|") - {separator})
    read = table(tmp_path, separator.join(["id", "text"]) + f"\n1{separator}a {others} b\n", name)
    assert values(read.columns["text"]) == [f"a {others} b"]
    assert read.notes == (f"separator {separator!r}",)


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_newlines_of_any_kind_and_inside_quotes(tmp_path, newline) -> None:
    read = table(tmp_path, newline.join(["", "id,text", "", '1,"a\r\nb\n""c"""', "2,d", ""]))
    assert values(read.columns["text"]) == ['a\r\nb\n"c"', "d"]


def test_a_header_may_be_quoted_and_span_lines(tmp_path) -> None:
    read = table(tmp_path, '"id","the, long\ntext"\n1,a\n')
    assert values(read.columns["the, long\ntext"]) == ["a"]


def test_a_long_cell_and_one_column(tmp_path) -> None:
    read = table(tmp_path, "text\n" + "x" * 3_000_000 + "\nnan\n")
    assert [len(text) for text in values(read.columns["text"])] == [3_000_000, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows"),
        ("id,text\n", "no rows"),
        ("id,text,text\n1,a,b\n", "several columns are called 'text'"),
        ("id,text\n1,a\n2,b,c\n", r"Expected 2 columns, got 3: 2,b,c \(separator ','\)"),
        ('id,text\n1,a\n2,"b\n3,c\n', "the row at line 3 has an unclosed or stray quote"),
        (b"id,text\n1,a\n2,\xff\n", r"line 3 is not UTF-8 \(byte 0xff\): save it as UTF-8"),
    ],
)
def test_a_malformed_csv_is_an_error_with_its_place(tmp_path, text, message) -> None:
    with pytest.raises(ManifestError, match=message):
        table(tmp_path, text)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a"\n', "line 2 is not JSON"),
        ("a.jsonl", b"\n\n[1]\n", "line 3 is a list: each line must be an object"),
        ("a.parquet", b"PAR1 no more", "a damaged Parquet file"),
        ("a.parquet", b"", "a damaged Parquet file"),
        ("a.zip", b"PK no more", "a damaged zip archive"),
        ("a.xlsx", b"x", "not a manifest: give one of .csv"),
    ],
)
def test_other_malformed_files(tmp_path, name, data, message) -> None:
    with pytest.raises(ManifestError, match=message):
        table(tmp_path, data, name)


def test_json_of_mixed_types_is_kept(tmp_path) -> None:
    read = table(tmp_path, '{"a": 1, "b": []}\n{"a": "x", "c": NaN}\n', "a.jsonl")
    assert values(read.columns["a"]) == [1, "x"]
    assert values(read.columns["c"]) == [None, None]
