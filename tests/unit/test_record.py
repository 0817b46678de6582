"""Records: canonical bytes, strict reading."""

import json
import os

import pytest

from dinov3.release.record import (
    SCHEMA,
    Edge,
    Output,
    Record,
    RecordError,
    canonical_json,
    digest_of,
    parse_canonical,
    parse_json,
    read_record,
)

A, B = "a" * 64, "b" * 64


def a_record(**changes):
    fields = {
        "stage": "curated_dataset",
        "inputs": (Edge("manifest", "manifest.parquet", A, B), Edge("source", "folder", B, None)),
        "config": {"seed": 0, "lr": 0.001},
        "config_digest": A,
        "code": A,
        "environment": B,
        "outputs": {"x.parquet": Output(A, 3), "w.safetensors": Output(B, 4, A)},
        "seeds": {"seed": 0},
        "licences": {"in": ("MIT",), "out": ("MIT",)},
    }
    return Record(**{**fields, **changes})


def test_record_survives_writing_and_reading(tmp_path):
    path = tmp_path / "record.json"
    path.write_bytes(a_record().to_bytes())
    assert read_record(path) == a_record()


def test_equal_content_gives_equal_bytes_whatever_the_key_order():
    assert canonical_json({"b": 1, "a": "ü"}) == canonical_json({"a": "ü", "b": 1})
    assert canonical_json({"b": 1, "a": "ü"}) == '{"a":"ü","b":1}\n'.encode()
    assert digest_of([1]) != digest_of([2])


def test_nan_cannot_be_recorded():
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json({"x": float("nan")})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"a":1,"a":2}', "stands twice"),
        (b'{"a":NaN}', "not a number JSON knows"),
        (b"{", "not readable as JSON"),
        (b"\xff", "not readable as JSON"),
        (b"[" * 100_000, "not readable as JSON"),
        (b"9" * 10_000, "not readable as JSON"),
        (b"1" * 19, "a number not every reader knows"),
        (b"-" + b"1" * 19, "a number not every reader knows"),
        (b"-0", "a number not every reader knows"),
        (b"0." + b"1" * 39, "a number not every reader knows"),
        (b"[" * 65 + b"]" * 65, "nested deeper than 64"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested deeper than 64"),
        (b'[{"a":' * 33 + b"1" + b"}]" * 33, "nested deeper than 64"),
        (b'["\\"' + b",[" * 70 + b"]" * 71, "nested deeper than 64"),
        (b'{"a":1}{', "not readable as JSON"),
        (b"{} x", "not readable as JSON"),
        (b"\xef\xbb\xbf{}", "not readable as JSON"),
        (b'"\\ud800"', "not readable as JSON"),
        (b'{"\\uDfff":1}', "not readable as JSON"),
        (b'"\xed\xa0\x80"', "not readable as JSON"),
        (b'"a\nb"', "not readable as JSON"),
        (b"", "not readable as JSON"),
        (b'{"a":1e999}', "not a number JSON knows"),
        (b'{"a":-1e999}', "not a number JSON knows"),
    ],
)
def test_ambiguous_json_is_refused(text, reason):
    with pytest.raises(RecordError, match=reason):
        parse_json(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b"[" * 64 + b"]" * 64, None),
        (b'["' + b"[" * 100 + b'\\"]"]', ["[" * 100 + '"]']),
        (b"[" + b"[]," * 100 + b"[]]", [[]] * 101),
        (b"1" * 18, int("1" * 18)),
        (b"-1.7976931348623157e+308", -1.7976931348623157e308),
        (b'"\\ud83d\\ude00"', "\U0001f600"),
        (b'"\\\\ud800"', "\\ud800"),
    ],
)
def test_what_lies_within_the_limits_is_read(text, value):
    found = parse_json(text)
    assert value is None or found == value


@pytest.mark.parametrize(
    "text", [b"[" + b"[]," * 2**18 + b"[]]", b"[" + b"1," * (2**20 + 1) + b"1]"]
)
def test_document_of_very_many_values_is_not_built(text):
    with pytest.raises(RecordError, match="more than 262144 lists or 1048576 values"):
        parse_json(text)


def test_record_of_any_size_is_refused_in_bounded_memory(tmp_path):
    path = tmp_path / "record.json"
    path.touch()
    os.truncate(path, 10**12)
    with pytest.raises(RecordError, match=r"record\.json: not readable as JSON: larger than"):
        read_record(path)


def test_document_larger_than_its_limit_is_not_parsed():
    assert parse_json(b"[1, 2]", max_bytes=6) == [1, 2]
    with pytest.raises(RecordError, match="larger than 5 bytes, got 6"):
        parse_json(b"[1, 2]", max_bytes=5)


@pytest.mark.parametrize(
    "text", [b'{"a":1}', b'{"a": 1}\n', b'{"b":1,"a":1}\n', b'"\\u00e4"\n', b"1e2\n", b"{}\n\n"]
)
def test_canonical_reading_takes_one_form_alone(text):
    value = parse_json(text)
    assert parse_canonical(canonical_json(value)) == value
    with pytest.raises(RecordError, match="not canonical JSON"):
        parse_canonical(text)


def test_unknown_schema_is_refused(tmp_path):
    path = tmp_path / "record.json"
    path.write_bytes(a_record(schema="dinov3.record/9").to_bytes())
    with pytest.raises(RecordError, match=f"schema is not {SCHEMA}, got 'dinov3.record/9'"):
        read_record(path)


@pytest.mark.parametrize("field", ["stage", "inputs", "outputs", "licences", "code"])
def test_missing_field_is_refused(tmp_path, field):
    raw = json.loads(a_record().to_bytes())
    del raw[field]
    path = tmp_path / "record.json"
    path.write_bytes(canonical_json(raw))
    with pytest.raises(RecordError, match="missing or of the wrong kind"):
        read_record(path)


def test_digest_that_is_not_hexadecimal_is_refused(tmp_path):
    path = tmp_path / "record.json"
    path.write_bytes(a_record(outputs={"x": Output("../etc", 1)}).to_bytes())
    with pytest.raises(RecordError, match="not a sha256"):
        read_record(path)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (["stage"], 3),
        (["inputs"], {}),
        (["inputs"], [3]),
        (["inputs", 0], {"role": "a"}),
        (["inputs", 0, "role"], None),
        (["inputs", 0, "name"], ["x"]),
        (["inputs", 0, "sha256"], A.upper()),
        (["inputs", 0, "record"], ""),
        (["inputs", 0, "more"], 1),
        (["config"], []),
        (["config_digest"], None),
        (["code"], "a" * 63),
        (["environment"], 1.5),
        (["outputs"], []),
        (["outputs", "x.parquet"], None),
        (["outputs", "x.parquet", "bytes"], "3"),
        (["outputs", "x.parquet", "bytes"], True),
        (["outputs", "x.parquet", "bytes"], -1),
        (["outputs", "x.parquet", "bytes"], 3.0),
        (["outputs", "x.parquet", "tensors"], "\x1b[31m"),
        (["outputs", "x.parquet", "more"], 1),
        (["seeds"], []),
        (["steps"], None),
        (["facts"], "x"),
        (["licences"], ["MIT"]),
        (["licences", "out"], "MIT"),
        (["licences", "out"], [3]),
        (["more"], 1),
    ],
)
def test_field_of_the_wrong_kind_is_refused(tmp_path, place, value):
    raw = json.loads(a_record().to_bytes())
    *above, last = place
    part = raw
    for step in above:
        part = part[step]
    part[last] = value
    path = tmp_path / "record.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(RecordError, match=r"record\.json: a field is missing or of the wrong kind"):
        read_record(path)


def test_record_with_text_that_is_not_unicode_is_refused(tmp_path):
    path = tmp_path / "record.json"
    path.write_text(json.dumps({**json.loads(a_record().to_bytes()), "stage": "\ud800"}))
    with pytest.raises(RecordError, match=r"record\.json: not readable as JSON"):
        read_record(path)


def test_record_that_is_no_regular_file_is_not_opened(tmp_path):
    path = tmp_path / "record.json"
    os.mkfifo(path)
    with pytest.raises(RecordError, match=r"record\.json: not a regular file"):
        read_record(path)
