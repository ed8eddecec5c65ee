"""Reading tables: formats, and one clear error for each kind of bad file."""

import csv
import gzip
import io
import json
import os
import subprocess
import sys
import threading
import tracemalloc

import pytest

from bertfast.data import DataError, read_chunks, read_table


def _write(tmp_path, name, content):
    path = tmp_path / name
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def _refused(path, *parts, columns=None):
    with pytest.raises(DataError) as e:
        read_table(path, columns)
    for part in (str(path), *parts):
        assert part in str(e.value)


ROWS = {"text": ["a\u2028b", 'say "hi", é', "x"], "label": ["p", "q", "p"]}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_every_format_reads_the_same_rows(tmp_path, kind, suffix):
    if kind == "jsonl":
        content = "\n".join(
            json.dumps(dict(zip(ROWS, row, strict=True)), ensure_ascii=False)
            for row in zip(*ROWS.values(), strict=True)
        )
    elif kind == "csv":
        content = 'text,label\na\u2028b,p\n"say ""hi"", é",q\nx,p\n'
    elif kind == "tsv":
        content = 'text\tlabel\na\u2028b\tp\nsay "hi", é\tq\nx\tp\n'
    else:
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        sink = io.BytesIO()
        pq.write_table(pa.table(ROWS), sink)
        content = sink.getvalue()
    path = _write(tmp_path, f"t.{kind}{suffix}", content)
    assert read_table(path) == ROWS
    assert read_table(path, ["label"]) == {"label": ROWS["label"]}
    _refused(path, "no column 'txt'", "'text', 'label'", columns=["txt"])


def test_quotes_in_tsv_are_plain_characters(tmp_path):
    path = _write(tmp_path, "t.tsv", 'text\tlabel\n"open\ta\n""\tb\n')
    assert read_table(path) == {"text": ['"open', '""'], "label": ["a", "b"]}
    # Well-formed, but nothing that writes tables with quotes would write these.
    for text in ('"quoted"', '"so", he said', 'say "hi"', '""', '"a" "b"'):
        path = _write(tmp_path, "t.tsv", f'text\tlabel\n{text}\ta\n"" x\tb\n')
        assert read_table(path)["text"] == [text, '"" x']
        path = _write(tmp_path, "t.tsv", f"text\tlabel\n{text}\ta\n")
        assert read_table(path)["text"] == [text]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_NONNUMERIC, csv.QUOTE_ALL])
def test_tsv_as_pandas_writes_it(tmp_path, quoting, end):
    """`to_csv(sep="\\t")`, that is the csv module."""
    rows = [["text", "n"], ['say "hi"', 1], ["a\tb\nc", 2], ["", 3], ['"', 4]]
    out = io.StringIO()
    csv.writer(out, delimiter="\t", lineterminator=end, quoting=quoting).writerows(rows)
    path = _write(tmp_path, "t.tsv", out.getvalue())
    table = read_table(path)
    assert table == {"text": [r[0] for r in rows[1:]], "n": list("1234")}
    assert table.lines == [2, 3, 5, 6]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("sep, first", [(",", ""), (";", ""), ("\t", ""), (";", "sep=;"), ("|", "sep=|")])  # fmt: skip
def test_csv_as_excel_writes_it(tmp_path, sep, first, end):
    """A byte-order mark, any separator, empty columns and rows; fewer of them in some rows."""
    lines = ["text,label,,", '"a, b; c",1,,', "x,2,", "", "y,3", ",,,", ",,,"]
    lines = [line.replace(",", sep).replace(f"a{sep} b", "a, b") for line in lines]
    text = "".join(line + end for line in ([first] if first else []) + lines)
    table = read_table(_write(tmp_path, "t.csv", "\ufeff" + text))
    assert table == {"text": ["a, b; c", "x", "y"], "label": ["1", "2", "3"]}
    assert table.lines == [n + bool(first) for n in (2, 3, 5)]


@pytest.mark.parametrize("sep", [",", ";", "\t"])
def test_separators_in_quotes_of_the_header_count_for_nothing(tmp_path, sep):
    name = 'kind, of; 5"; or\t6", or 7'
    with open(tmp_path / "x.csv", "w", newline="") as f:
        csv.writer(f, delimiter=sep).writerows([["text", name], ["a, b", "1"]])
    assert read_table(tmp_path / "x.csv") == {"text": ["a, b"], name: ["1"]}


def test_csv_is_not_cut_where_a_cell_has_no_column(tmp_path):
    _refused(
        _write(tmp_path, "t.csv", "text,label,,\na,b,,\nhello, world,x,\n"), "line 3 has 4 fields"
    )
    _refused(_write(tmp_path, "t.csv", "text,label\na,b,c\n"), "line 2 has 3 fields")
    path = _write(tmp_path, "t.csv", ",text,label\n0,a,b\n1,,\n")  # pandas' index
    assert read_table(path, ["text"]) == {"text": ["a", ""]}
    path = _write(tmp_path, "t.csv", "text,label\na,b\n,\nc,d\n")  # no end: a row to be told of
    assert read_table(path)["text"] == ["a", "", "c"]


def test_csv_quoted_line_breaks_crlf_bom_blank_lines_and_long_fields(tmp_path):
    long = "w " * 200_000  # csv's own limit is 131,072 characters
    path = _write(tmp_path, "t.csv", f'\ufefftext,label\r\n"a\nb",p\r\n\r\n{long},q\r\n')
    assert read_table(path) == {"text": ["a\nb", long], "label": ["p", "q"]}


def test_gzip_is_recognised_by_content_and_bom_is_dropped_from_jsonl(tmp_path):
    path = _write(tmp_path, "t.jsonl", gzip.compress('\ufeff{"text": "a"}\n\n'.encode()))
    assert read_table(path) == {"text": ["a"]}


def test_jsonl_rows_with_other_keys_are_filled_with_none(tmp_path):
    path = _write(tmp_path, "t.jsonl", '{"a": 1}\n{"b": 2}\n{"a": 3, "b": 4}\n')
    assert read_table(path) == {"a": [1, None, 3], "b": [None, 2, 4]}


def test_lines_of_rows(tmp_path):
    path = _write(tmp_path, "t.jsonl", '\ufeff\n{"a": 1}\n\n{"a": 2}\n')
    assert read_table(path).lines == [2, 4]
    path = _write(tmp_path, "t.csv", '\na\n\n"1\n2"\n3\n')
    assert read_table(path).lines == [4, 6]


def test_json_key_twice(tmp_path):
    path = _write(tmp_path, "t.jsonl", '{"text": "a", "text": "b"}\n')
    _refused(path, "line 1", "'text' stands twice")


def test_standard_input_is_jsonl(monkeypatch):
    raw = io.BufferedReader(io.BytesIO(b'{"text": "a"}\n'))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(raw))
    assert read_table("-") == {"text": ["a"]}
    assert not raw.closed


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.tsv", "t.csv.gz"])
@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff"])
def test_empty_file(tmp_path, name, content):
    _refused(_write(tmp_path, name, content), "is empty")


def test_header_without_rows(tmp_path):
    _refused(_write(tmp_path, "t.csv", "text,label\n"), "no rows", "'text', 'label'")


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv"])
def test_not_utf8_names_line_byte_and_offset(tmp_path, name):
    first = b'{"text": "x"}\n' if name == "t.jsonl" else b"text\n"
    path = _write(tmp_path, name, first + b"caf\xe9\n")
    _refused(path, "not UTF-8", "0xe9", "line 2", f"byte offset {len(first) + 3}")


def test_not_utf8_after_a_byte_order_mark(tmp_path):
    path = _write(tmp_path, "t.csv", b"\xef\xbb\xbfa\xff\n")
    _refused(path, "0xff at line 1, byte offset 4")


@pytest.mark.parametrize(
    "line", ["{'text': 1}", '{"text": "a"', "[" * 100_000, '{"n": ' + "9" * 5000 + "}"]
)
def test_malformed_json_names_the_line(tmp_path, line):
    _refused(_write(tmp_path, "t.jsonl", '{"text": "a"}\n\n' + line), "line 3", "JSON")


def test_json_line_that_is_no_object(tmp_path):
    _refused(_write(tmp_path, "t.jsonl", '{"a": 1}\n["a"]\n'), "line 2", "list", "one object")


@pytest.mark.parametrize("name, sep", [("t.csv", ","), ("t.tsv", "\t")])
def test_ragged_rows(tmp_path, name, sep):
    good = f"text{sep}label\na{sep}b\n"
    _refused(_write(tmp_path, name, good + f"a{sep}b{sep}c\n"), "line 3 has 3 fields", "has 2")
    _refused(_write(tmp_path, name, good + "a\n"), "line 3 has 1 fields")


def test_ragged_row_is_named_by_its_first_line(tmp_path):
    _refused(_write(tmp_path, "t.csv", 'a,b\n"1\n2",3\n"4\n5"\n'), "line 4 has 1 fields")


def test_line_ends_of_old_macs(tmp_path):
    _refused(_write(tmp_path, "t.csv", "text,label\ra,b\r"), "line 1 is malformed", "new-line")


def test_unclosed_quote_names_where_it_begins(tmp_path):
    path = _write(tmp_path, "t.csv", 'text,label\na,b\n"open,c\nd,e\n')
    _refused(path, "begins at line 3", "malformed")


def test_column_twice(tmp_path):
    _refused(_write(tmp_path, "t.csv", "text,text\na,b\n"), "'text' stands twice")


def test_missing_file_folder_and_unknown_format(tmp_path):
    _refused(tmp_path / "none.jsonl", "No such file")
    (tmp_path / "d.csv").mkdir()
    _refused(tmp_path / "d.csv", "cannot be read")
    _refused(tmp_path / "t.xlsx", "unknown format '.xlsx'", ".jsonl, .csv, .tsv, .parquet")
    _refused(tmp_path / "t", "without a suffix")


def test_truncated_and_damaged_gzip(tmp_path):
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    (tmp_path / "t.jsonl.gz").write_bytes(whole[:-12])
    _refused(tmp_path / "t.jsonl.gz", "gzip")
    (tmp_path / "t.jsonl.gz").write_bytes(whole[:-8] + b"\0" * 8)
    _refused(tmp_path / "t.jsonl.gz", "gzip")


def test_damaged_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    _refused(_write(tmp_path, "t.parquet", b"PAR1 no parquet"), "not a readable Parquet file")


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    _refused(_write(tmp_path, "t.parquet", b"x"), "pip install 'bertfast[train]'")


@pytest.mark.seconds
def test_import_loads_no_heavy_library():
    code = (
        "import sys, bertfast.data; "
        "print({'transformers', 'sklearn', 'pyarrow', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def _joined(chunks):
    """Of `read_chunks`: the columns of all, each row's number and the line where it begins."""
    columns, numbers, lines = {}, [], []
    for chunk in chunks:
        for name, cells in chunk.items():
            columns.setdefault(name, []).extend(cells)
        size = len(next(iter(chunk.values())))
        numbers += range(chunk.first, chunk.first + size)
        lines += chunk.lines or [None] * size
    return columns, numbers, lines


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_chunks_are_the_table_in_parts(tmp_path, kind, suffix):
    rows = [{"text": f"row\n{i}" if i % 7 else "", "id": str(i)} for i in range(50)]
    path = tmp_path / f"t.{kind}{suffix}"
    out = io.StringIO(newline="")
    if kind == "parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=20)
        content = sink.getvalue()
    elif kind == "jsonl":
        content = "\n\n".join(json.dumps(row) for row in rows).encode()
    else:
        writer = csv.writer(out, delimiter="\t" if kind == "tsv" else ",")
        writer.writerows([["text", "id"], *([row["text"], row["id"]] for row in rows)])
        content = out.getvalue().encode()
    _write(tmp_path, path.name, content)
    whole = read_table(path)
    assert whole["id"] == [row["id"] for row in rows]
    for size in (1, 7, 50, 1000):
        chunks = list(read_chunks(path, rows=size))
        assert [len(c["id"]) for c in chunks] == [
            *[size] * (50 // size),
            *[50 % size] * (50 % size > 0),
        ]
        columns, numbers, lines = _joined(chunks)
        assert columns == whole and numbers == [*range(1, 51)]
        assert lines == (whole.lines or [None] * 50)
        shares = [c.share for c in chunks]
        assert shares == sorted(shares) and shares[-1] == 1 and shares[0] > 0
    assert [len(c["text"]) for c in read_chunks(path, ["text"], characters=13)][:2] == [4, 3]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_a_chunk_is_all_that_is_read(tmp_path, kind):
    """Of a file of 10 MB; a fault is told after the chunks before it."""
    path, text = tmp_path / f"t.{kind}", "x" * 1000
    if kind == "parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        with pq.ParquetWriter(path, pa.schema([("text", pa.string())])) as writer:
            for _ in range(10):
                writer.write_table(pa.table({"text": [text] * 1000}))
    else:
        row = json.dumps({"text": text}) if kind == "jsonl" else text
        end = '["no row"]\n' if kind == "jsonl" else f"a{',' if kind == 'csv' else chr(9)}b\n"
        path.write_text("text\n" * (kind != "jsonl") + f"{row}\n" * 10_000 + end)
    chunks = read_chunks(path, rows=100)
    tracemalloc.start()
    try:
        count = next(chunks).first  # and whatever a format reads once
        tracemalloc.reset_peak()
        for chunk in chunks:
            count = chunk.first + 99
    except DataError:
        assert kind != "parquet"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 10_000 and peak < 2e6


def test_columns_must_be_in_the_first_chunk(tmp_path):
    path = _write(tmp_path, "t.jsonl", '{"a": 1}\n{"a": 2}\n{"b": 3}\n')
    with pytest.raises(DataError, match=r"no column 'b'; it has: 'a'"):
        next(read_chunks(path, ["b"], rows=2))
    assert _joined(read_chunks(path, ["a"], rows=2))[0] == {"a": [1, 2, None]}
    assert read_table(path, ["b"]) == {"b": [None, None, 3]}


def test_chunks_of_a_pipe(tmp_path):
    """TSV is looked at before it is read: a pipe can't go back."""
    os.mkfifo(tmp_path / "t.tsv")
    write = threading.Thread(target=lambda: (tmp_path / "t.tsv").write_text('a\tb\n"x"\ty\n' * 2))
    write.start()
    chunks = list(read_chunks(tmp_path / "t.tsv", rows=2))
    write.join()
    assert _joined(chunks)[0] == {"a": ['"x"', "a", '"x"'], "b": ["y", "b", "y"]}
