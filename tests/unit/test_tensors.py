"""The tensor digest names weights, not their container."""

import hashlib
import json
import os
import struct
import subprocess
import sys
from io import FileIO
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dinov3.release.record import RecordError, digest_of
from dinov3.release.refusals import Refused
from dinov3.release.tensors import FileHash, hash_file, hash_stream, read_header, tensor_digest

CHUNK = 1 << 20  # what is read at once


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
        ([[4, 8], [8, 9]], b"123456789", "do not tile"),
        ([[0, 4], [0, 4]], b"1234", "do not tile"),
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


@pytest.mark.parametrize("length", [16 * CHUNK + 1, 10**8, 2**63, 2**64 - 1])
def test_gigantic_header_is_refused_before_it_is_read(tmp_path, length):
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", length))
    os.truncate(path, 2 * 10**8)
    with pytest.raises(RecordError, match=r"longer than|runs past the file"):
        tensor_digest(path)


def test_header_of_very_many_lists_is_refused_before_it_is_built(tmp_path):
    raw = b'{"a":[' + b"[]," * CHUNK + b"[]]}"
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    with pytest.raises(RecordError, match="more than 262144 lists"):
        tensor_digest(path)


@pytest.mark.parametrize("size", range(8))
def test_file_too_short_for_a_length_is_refused(tmp_path, size):
    path = tmp_path / "w.safetensors"
    path.write_bytes(bytes(size))
    with pytest.raises(RecordError, match="runs past the file"):
        tensor_digest(path)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": None},
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
        (b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', "not readable as JSON"),
        (b'{"a":{"dtype":"\\ud800","shape":[0],"data_offsets":[0,0]}}', "not readable as JSON"),
        (b' {"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', "starts with b' "),
        (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}\n', "other bytes than spaces"),
        (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}\0', "not readable as JSON"),
        (b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}', "not readable as JSON"),
        (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":1}}', "unknown field 'x'"),
        (b'{"a":{"dtype":"u8","shape":[0],"data_offsets":[0,0]}}', "unknown dtype, got 'u8'"),
        (b'{"a":{"dtype":"F4","shape":[0],"data_offsets":[0,0]}}', "unknown dtype, got 'F4'"),
        (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,0]}}', "does not fill 0 to 0"),
        (b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,0]}}', "does not fill 0 to 0"),
        (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[1,0]}}', "does not fill 1 to 0"),
        (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[1,1]}}', "do not tile"),
        (b'{"__metadata__":1}', "not an object of strings"),
        (b'{"__metadata__":null}', "not an object of strings"),
        (b'{"__metadata__":{"a":1}}', "not an object of strings"),
        (b'{"__metadata__":{"a":"1","a":"2"}}', "stands twice"),
        (
            b'{"a":{"dtype":"U8","shape":[999999999999999999,999999999999999999,0],'
            b'"data_offsets":[0,0]}}',
            "no reader can hold",
        ),
        (
            b'{"a":{"dtype":"U8","shape":[' + b"1," * 32 + b'0],"data_offsets":[0,0]}}',
            "no reader can hold",
        ),
        (b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,1e999]}}', "not a number"),
        (b'{"a":[]}', "lacks"),
        (b'{"a":1}', "lacks"),
        (b"[]", "not an object"),
        (b"", "not an object"),
        (b"{", "not readable as JSON"),
        (b'{"a":1,"a":2}', "stands twice"),
    ],
)
def test_malformed_header_is_refused(tmp_path, header, reason):
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(RecordError, match=reason):
        tensor_digest(path)


def test_header_lists_tensors_in_the_order_of_their_bytes(tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "b": {"dtype": "U8", "shape": [2, 1], "data_offsets": [4, 6]},
        "a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
    }
    path = a_file(tmp_path / "w.safetensors", header, b"123456")
    found = read_header(path)
    start = path.stat().st_size - 6
    assert [(one.name, one.shape, one.begin - start, one.end - start) for one in found.tensors] == [
        ("a", (), 0, 4),
        ("b", (2, 1), 4, 6),
    ]
    assert found.metadata == {"format": "pt"}


@pytest.mark.parametrize(
    "sizes", [[], [0], [0, 0, 5, 0], [3 * CHUNK + 7], [CHUNK - 90, CHUNK], [1]]
)
def test_one_pass_finds_both_digests(tmp_path, sizes):
    """Tensors end within, at and beyond what is read at once."""
    path = tmp_path / "w.safetensors"
    at, header = 0, {}
    for number, size in enumerate(sizes):
        entry = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        header[f"t{number}"] = entry
        at += size
    data = bytes(range(251)) * (at // 251 + 1)
    a_file(path, header, data[:at])
    rows = [
        [
            name,
            "U8",
            entry["shape"],
            hashlib.sha256(data[slice(*entry["data_offsets"])]).hexdigest(),
        ]
        for name, entry in header.items()
    ]
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert hash_file(path) == FileHash(sha256, path.stat().st_size, digest_of(rows))
    assert tensor_digest(path) == digest_of(rows)


def test_file_of_another_name_has_no_tensor_digest(tmp_path):
    path = tmp_path / "w.bin"
    path.write_bytes(b"x" * 3 * CHUNK)
    assert hash_file(path) == FileHash(hashlib.sha256(b"x" * 3 * CHUNK).hexdigest(), 3 * CHUNK)


def test_only_a_regular_file_is_hashed(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("link", "pipe", "folder"):
        with pytest.raises(Refused, match=f"{name}: .*not a regular file"):
            hash_file(tmp_path / name)


class Rewritten(FileIO):
    """A file that someone writes to while it is hashed."""

    asked = 0

    def fileno(self):
        self.asked += 1
        if self.asked == 2:
            with Path(self.name).open("r+b") as other:
                other.seek(-1, os.SEEK_END)
                other.write(b"!")
        return super().fileno()


@pytest.mark.parametrize("weights", [False, True])
def test_file_that_is_written_to_meanwhile_is_refused(tmp_path, weights):
    header = {"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}
    path = a_file(tmp_path / "w.safetensors", header, b"abc")
    os.utime(path, (0, 0))  # the clock of a file system may be coarse
    with (
        Rewritten(path) as stream,
        pytest.raises(RecordError, match="changed while it was read"),
    ):
        hash_stream(stream, weights=weights)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    path = tmp_path / "w.safetensors"
    size = 4 << 30
    header = {"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    a_file(path, header)
    os.truncate(path, path.stat().st_size + size)
    code = (  # VmHWM is this program's own; ru_maxrss would count what forked it
        "import sys; from pathlib import Path; "
        "from dinov3.release.tensors import hash_file; hash_file(Path(sys.argv[1])); "
        "status = Path('/proc/self/status').read_text(); "
        "print(status.split('VmHWM:')[1].split()[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 200_000  # KiB
