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
