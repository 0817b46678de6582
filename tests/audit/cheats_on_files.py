"""Cheats on the files themselves: their bytes, names and forms."""

import os
import unicodedata
from pathlib import Path
from typing import Any

from dinov3.release.files import SUMS_NAME
from tests.audit.changes import (
    Change,
    adding,
    all_of,
    anybody,
    flip,
    in_bytes,
    in_json,
    insider,
    setting,
    swapping,
)
from tests.audit.insider import list_again


def _rename_card(folder: Path) -> None:
    (folder / "README.md").rename(folder / "READ")


def _symlink(folder: Path) -> None:
    (folder / "config.json").rename(folder.parent / "elsewhere.json")
    (folder / "config.json").symlink_to(folder.parent / "elsewhere.json")


def _hard_link(folder: Path) -> None:
    os.link(folder / "config.json", folder.parent / "second name")


def _pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def _unicode_twins(folder: Path) -> None:
    for form in ("NFC", "NFD"):
        (folder / unicodedata.normalize(form, "caf\u00e9.txt")).write_text("x")
    list_again(folder)


def _case_twins(folder: Path) -> None:
    (folder / "Config.json").write_text("x")
    list_again(folder)


def _escaping_path(folder: Path) -> None:
    lines = (folder / SUMS_NAME).read_text().splitlines(keepends=True)
    lines.append(f"{'0' * 64}  ../outside\n")
    (folder / SUMS_NAME).write_text("".join(sorted(lines, key=lambda line: line[66:])))


def _kinder_metric(report: Any) -> None:
    for row in report["rows"]:
        if row["subject"] == "model":
            row["value"] = 0.99


def _header(text: str) -> Change:
    """Another header over the weights, which every name of them then follows."""

    def change(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        entries = data[8 : 8 + length].decode().rstrip(" ")
        raw = text.replace("OLD", entries[1:-1]).encode()
        return len(raw).to_bytes(8, "little") + raw + data[8 + length :]

    return in_bytes("model.safetensors", change)


def _gigantic(data: bytes) -> bytes:
    return (1 << 40).to_bytes(8, "little") + data[8:]


def _deep(data: bytes) -> bytes:
    return data.rstrip()[:-1] + b',"x":' + b"[" * 5000 + b"]" * 5000 + b"}\n"


def _twice(data: bytes) -> bytes:
    return data.rstrip()[:-1] + b',"version":"9.9.9"}\n'


def _huge_number(data: bytes) -> bytes:
    return data.rstrip()[:-1] + b',"x":' + b"9" * 5000 + b"}\n"


def _spaced(data: bytes) -> bytes:
    return data.replace(b",", b", ", 1)


def _gigantic_document(folder: Path) -> None:
    os.truncate(folder / "checks.json", 1 << 42)


def _gigantic_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1 << 42)


def _endless_list(folder: Path) -> None:
    lines = "".join(f"{'0' * 64}  {number:05d}\n" for number in range(20_000))
    (folder / SUMS_NAME).write_text(lines)


def _endless_folders(folder: Path) -> None:
    for number in range(10_001):
        (folder / f"{number}").mkdir()


CHEATS = [
    anybody("one byte of the weights", in_bytes("model.safetensors", flip), "file-changed"),
    anybody("one byte of a record", in_bytes("release.json", flip), "file-changed"),
    anybody("a file cut short", in_bytes("evals.json", lambda data: data[:-1]), "file-changed"),
    anybody("a byte appended", in_bytes("README.md", lambda d: d + b"\n"), "file-changed"),
    anybody("a file removed", lambda f: (f / "images.bin").unlink(), "file-missing"),
    anybody("a file renamed", _rename_card, "file-missing"),
    anybody("a file added", adding("payload.py"), "file-unlisted"),
    anybody("git attributes added", adding(".gitattributes"), "file-unlisted"),
    anybody("a hidden folder added", adding(".git/config"), "file-unlisted"),
    anybody("an empty folder added", lambda f: (f / "more").mkdir(), "file-unlisted"),
    anybody("a link for a file", _symlink, "file-special"),
    anybody("a hard link to a file", _hard_link, "file-special"),
    anybody("a pipe for a file", _pipe, "file-special"),
    anybody("names that differ by case", _case_twins, "name-unsafe"),
    anybody("names that differ by Unicode form", _unicode_twins, "name-unsafe"),
    anybody("a path that escapes", _escaping_path, "name-unsafe"),
    anybody("an unsorted list", in_bytes(SUMS_NAME, lambda d: d[67:] + d[:67]), "sums-malformed"),
    anybody("no list", lambda f: (f / SUMS_NAME).unlink(), "file-missing"),
    anybody("a list without end", _endless_list, "sums-malformed"),
    anybody("folders without end", _endless_folders, "file-unlisted"),
    anybody("a document of terabytes", _gigantic_document, "file-changed"),
    anybody("weights of terabytes", _gigantic_weights, "file-changed"),
    anybody("two files swapped", swapping("evals.json", "checks.json"), "file-changed"),
    anybody(
        "files and their list changed",
        all_of(in_json("evals.json", _kinder_metric), list_again),
        "signature-invalid",
    ),
    anybody("the signature stripped", lambda f: (f / "model.sig").unlink(), "signature-missing"),
    anybody("one byte of the signature", in_bytes("model.sig", flip), "json-malformed"),
    insider("a file with no place", adding("payload.py"), "file-unlisted"),
    insider("no evaluation", lambda f: (f / "evals.json").unlink(), "file-missing"),
    insider("a key twice", in_bytes("release.json", _twice), "json-malformed"),
    insider("a huge number", in_bytes("release.json", _huge_number), "json-malformed"),
    insider("deep nesting", in_bytes("release.json", _deep), "json-malformed"),
    insider("JSON of another form", in_bytes("release.json", _spaced), "json-malformed"),
    insider(
        "an older schema",
        in_json("release.json", setting(schema="dinov3.release/0")),
        "schema-unknown",
    ),
    insider(
        "a schema of another kind",
        in_json("checks.json", setting(schema="other/1")),
        "schema-unknown",
    ),
    insider(
        "a field missing", in_json("release.json", lambda c: c.pop("roots")), "release-malformed"
    ),
    insider(
        "a policy that is not the digest's",
        in_json("release.json", lambda c: c["policy"].update(max_self_threshold=1.0)),
        "release-malformed",
    ),
    insider(
        "weights that overlap",
        _header('{"x":{"dtype":"F32","shape":[4,8],"data_offsets":[0,128]},OLD}'),
        "weights-malformed",
    ),
    insider(
        "weights that overrun",
        _header('{"x":{"dtype":"F32","shape":[4,8],"data_offsets":[256,384]},OLD}'),
        "weights-malformed",
    ),
    insider("a tensor named twice", _header("{OLD,OLD}"), "weights-malformed"),
    insider("a gigantic header", in_bytes("model.safetensors", _gigantic), "weights-malformed"),
]
