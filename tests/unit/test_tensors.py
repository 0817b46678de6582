"""The tensor digest names weights, not their container."""

import hashlib
import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from dinov3.release.record import RecordError, digest_of
from dinov3.release.tensors import tensor_digest


def a_file(path, header, data=b""):
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def test_digest_follows_its_published_definition(tmp_path):
    path = tmp_path / "w.safetensors"
    weights = {"b": torch.arange(6.0).view(2, 3), "a": torch.tensor([1, 2], dtype=torch.int64)}
    save_file(weights, path)
    rows = [
        [name, dtype, list(weights[name].shape), hashlib.sha256(weights[name].numpy()).hexdigest()]
        for name, dtype in (("a", "I64"), ("b", "F32"))
    ]
    assert tensor_digest(path) == digest_of(rows)


def test_digest_ignores_metadata_and_order_of_storage(tmp_path):
    one, two = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, one, metadata={"made": "here"})
    a, b = torch.ones(2).numpy().tobytes(), torch.zeros(3).numpy().tobytes()
    header = {
        "b": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]},
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [12, 20]},
    }
    a_file(two, header, b + a)
    assert one.read_bytes() != two.read_bytes()
    assert tensor_digest(one) == tensor_digest(two)


def test_digest_tells_name_and_dtype_apart(tmp_path):
    """Hashing name and dtype end to end would not: `a`+`BF16` reads as `aB`+`F16`."""
    one, two = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    a_file(one, {"a": {"dtype": "BF16", "shape": [1], "data_offsets": [0, 2]}}, b"xy")
    a_file(two, {"aB": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}, b"xy")
    assert tensor_digest(one) != tensor_digest(two)


@pytest.mark.parametrize(
    ("offsets", "data", "reason"),
    [
        ([[0, 4], [2, 6]], b"123456", "do not tile"),
        ([[0, 4], [6, 8]], b"12345678", "do not tile"),
        ([[0, 4], [4, 6]], b"1234567", "belong to no tensor"),
        ([[0, 4], [4, 9]], b"12345678", "belong to no tensor"),
    ],
)
def test_ranges_that_do_not_tile_the_data_are_refused(tmp_path, offsets, data, reason):
    header = {
        name: {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        for name, (begin, end) in zip("ab", offsets, strict=True)
    }
    with pytest.raises(RecordError, match=reason):
        tensor_digest(a_file(tmp_path / "w.safetensors", header, data))


def test_header_longer_than_the_file_is_refused(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", 10**12) + b"{}")
    with pytest.raises(RecordError, match="runs past the file"):
        tensor_digest(path)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": None},
        {"dtype": "\ud800"},
        {"shape": "4"},
        {"shape": [2.0, 2]},
        {"shape": [True, 4]},
        {"shape": [-4]},
        {"data_offsets": None},
        {"data_offsets": [0, 2, 4]},
        {"data_offsets": [0.0, 4.0]},
        {"data_offsets": [0, "4"]},
        {"data_offsets": [False, 4]},
        {"data_offsets": {"0": 4}},
    ],
)
def test_malformed_entry_is_refused(tmp_path, change):
    header = {"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4], **change}}
    with pytest.raises(RecordError, match="safetensors header: 'a' lacks"):
        tensor_digest(a_file(tmp_path / "w.safetensors", header, b"1234"))


@pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets"])
def test_entry_without_a_field_is_refused(tmp_path, field):
    entry = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
    del entry[field]
    with pytest.raises(RecordError, match="safetensors header: 'a' lacks"):
        tensor_digest(a_file(tmp_path / "w.safetensors", {"a": entry}, b"1234"))


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', "not Unicode"),
        (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,1e999]}}', "not a number"),
        (b'{"a":[]}', "lacks"),
        (b'{"a":1}', "lacks"),
        (b"[]", "not an object"),
        (b"{", "not readable as JSON"),
        (b'{"a":1,"a":2}', "stands twice"),
    ],
)
def test_malformed_header_is_refused(tmp_path, header, reason):
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(RecordError, match=reason):
        tensor_digest(path)
