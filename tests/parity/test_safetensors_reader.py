"""What our reader of safetensors accepts, the reference reader loads identically.

Ours may refuse more. Headers are mutated at random, always by the same seeds: fields, offsets,
names, types and raw bytes; among them are files that the reference takes and ours must not.
"""

import hashlib
import json
import random
import struct

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dinov3.release.record import RecordError
from dinov3.release.tensors import DTYPE_SIZES, hash_file, read_header

NUM_MUTATIONS = 400
TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
NAMES = [
    "a",
    "b",
    "blocks.0.attn.qkv.weight",
    "",
    "é",
    "e\u0301",
    "\0",
    "\U0001f600",
    "__metadata__",
]


def pack(raw, data):
    return struct.pack("<Q", len(raw)) + raw + data


def ours(path):
    """Name -> dtype, shape, digest of the bytes; the reader's own refusal otherwise."""
    data = path.read_bytes()
    return {
        tensor.name: (
            tensor.dtype,
            list(tensor.shape),
            hashlib.sha256(data[tensor.begin : tensor.end]).hexdigest(),
        )
        for tensor in read_header(path).tensors
    }


def theirs(path):
    names = {dtype: name for name, dtype in TYPES.items()}
    found = {}
    with safe_open(path, framework="pt") as reader:
        for name in reader.keys():  # noqa: SIM118 - not a mapping
            tensor = reader.get_tensor(name)
            raw = bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())
            digest = hashlib.sha256(raw).hexdigest()
            found[name] = (names[tensor.dtype], list(tensor.shape), digest)
    return found


def a_header(chosen):
    """A well-formed header of a few small tensors, and its data."""
    header, at = {}, 0
    for name in chosen.sample(NAMES[:-1], chosen.randint(0, 4)):
        dtype = chosen.choice(list(DTYPE_SIZES))
        shape = [chosen.randint(0, 3) for _ in range(chosen.randint(0, 3))]
        size = DTYPE_SIZES[dtype]
        for dim in shape:
            size *= dim
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    if chosen.random() < 0.3:
        header["__metadata__"] = {"format": "pt", "é": ""}
    items = list(header.items())
    chosen.shuffle(items)
    data = bytes(chosen.randrange(2) for _ in range(at))  # a byte of BOOL is 0 or 1
    return dict(items), data


def change_value(chosen, header):
    """Replaces one value somewhere by another one."""
    values = [
        0,
        1,
        -1,
        2**31,
        2**53,
        2**63,
        2**64,
        10**18,
        1.0,
        True,
        None,
        "U8",
        "F4",
        [],
        {},
        [0],
        "",
    ]
    if not header:
        return
    entry = header[chosen.choice(list(header))]
    if not isinstance(entry, dict) or not entry:
        return
    key = chosen.choice([*entry, "extra"])
    if isinstance(entry.get(key), list) and entry[key] and chosen.random() < 0.8:
        entry[key][chosen.randrange(len(entry[key]))] = chosen.choice(values)
    else:
        entry[key] = chosen.choice(values)


def change_bytes(chosen, raw):
    """Replaces, removes, adds or repeats bytes of the text of the header."""
    raw = bytearray(raw)
    at = chosen.randrange(len(raw))
    kind = chosen.randrange(5)
    if kind == 0:
        raw[at] = chosen.choice(b'{}[]",:0123456789-.eE \t\n\\ud\0\xff')
    elif kind == 1:
        del raw[at : at + chosen.randint(1, 9)]
    elif kind == 2:
        raw[at:at] = chosen.choice([b" ", b"\n", b"0", b"-", b",", b"\xef\xbb\xbf", b'"a":{},'])
    elif kind == 3:
        raw[at:at] = raw[at : at + 60]
    else:
        raw += chosen.choice([b" ", b"  ", b"\n", b"\0", b"{}", b"\t", b"x"])
    return bytes(raw)


def mutation(seed):
    """Bytes of a file: one in four is left well-formed."""
    chosen = random.Random(seed)
    header, data = a_header(chosen)
    if chosen.random() < 0.4:
        change_value(chosen, header)
    raw = json.dumps(header, ensure_ascii=chosen.random() < 0.5).encode()
    if chosen.random() < 0.4:
        raw = change_bytes(chosen, raw)
    if chosen.random() < 0.1:
        data = data[:-1] if chosen.random() < 0.5 else data + b"\0"
    return pack(raw, data)


def test_whatever_ours_accepts_the_reference_loads_identically(tmp_path):
    path = tmp_path / "w.safetensors"
    num_accepted, num_refused = 0, 0
    for seed in range(NUM_MUTATIONS):
        path.write_bytes(mutation(seed))
        try:
            found = ours(path)
        except RecordError:
            num_refused += 1
            continue
        num_accepted += 1
        assert found == theirs(path), f"seed {seed}"
        assert hash_file(path).tensors is not None
    assert num_accepted > NUM_MUTATIONS // 5
    assert num_refused > NUM_MUTATIONS // 5


@pytest.mark.parametrize("dtype", list(TYPES))
def test_every_type_the_reference_writes_is_read(tmp_path, dtype):
    path = tmp_path / "w.safetensors"
    save_file({"x": torch.ones(3, 2).to(TYPES[dtype]), "é": torch.zeros(0)}, path, {"a": "b"})
    assert ours(path) == theirs(path)
    assert ours(path)["x"][:2] == (dtype, [3, 2])


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
        b'"a":{"dtype":"U8","shape":[1,2],"data_offsets":[0,2]}}',
        b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2],"extra":[1]}}',
    ],
)
def test_what_the_reference_takes_in_one_of_two_ways_is_refused(tmp_path, raw):
    path = tmp_path / "w.safetensors"
    path.write_bytes(pack(raw, b"xy"))
    assert list(theirs(path)) == ["a"]
    with pytest.raises(RecordError, match=r"stands twice|unknown field"):
        ours(path)


def test_header_that_overlaps_is_refused_by_both(tmp_path):
    path = tmp_path / "w.safetensors"
    entry = '{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'
    path.write_bytes(pack(f'{{"a":{entry},"b":{entry}}}'.encode(), b"xy"))
    with pytest.raises(SafetensorError, match=r"Invalid|invalid"):
        theirs(path)
    with pytest.raises(RecordError, match="do not tile"):
        ours(path)
