"""docs/audit.md: every name and test it speaks of exists, and its test vectors hold."""

import json
import re
import struct
import subprocess
import sys
from pathlib import Path

from dinov3.release.refusals import REFUSALS
from dinov3.release.tensors import tensor_digest

CHECKOUT = Path(__file__).resolve().parents[2]
TEXT = (CHECKOUT / "docs" / "audit.md").read_text()


def test_every_refusal_is_explained_in_its_own_words():
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| (.+) \|$", TEXT, re.MULTILINE))
    assert rows == REFUSALS


def test_every_test_that_is_named_is_collected():
    named = set(re.findall(r"`(tests/[^`]+)`", TEXT))
    files = sorted({name.partition("::")[0] for name in named if "::" in name})
    assert files
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:randomly"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider", *files],
        cwd=CHECKOUT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    collected = set(done.stdout.splitlines())
    collected |= {name.partition("[")[0] for name in collected}
    for name in named:
        assert name in collected if "::" in name else (CHECKOUT / name).exists(), name


def test_vectors_of_the_tensor_digest_hold(tmp_path):
    rows = re.findall(r"^\| `(\[.*\])` \| `([0-9a-f]{64})` \|$", TEXT, re.MULTILINE)
    assert len(rows) >= 4
    for tensors, digest in rows:
        header, data = {}, b""
        for name, dtype, shape, content in json.loads(tensors):
            end = len(data) + len(bytes.fromhex(content))
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), end]}
            data += bytes.fromhex(content)
        raw = json.dumps(header).encode()
        path = tmp_path / "weights.safetensors"
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
        assert tensor_digest(path) == digest
    assert len({digest for _, digest in rows}) == len(rows)
