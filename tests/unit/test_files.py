"""Files of a release: what may stand there, the list of them, and the identity of the whole."""

import os
import socket
import struct
from pathlib import Path

import pytest

from dinov3.release import files
from dinov3.release.files import (
    check_name,
    check_sums,
    format_sums,
    list_files,
    parse_sums,
    read_file,
    release_digest,
)
from dinov3.release.record import digest_of, file_sha256
from dinov3.release.refusals import CannotCheck, Refused

A, B = "a" * 64, "b" * 64


@pytest.fixture
def folder(tmp_path):
    """A folder with a few files and their list."""
    root = tmp_path / "release"
    (root / "records").mkdir(parents=True)
    (root / "records" / "one.json").write_text("{}\n")
    (root / "config.json").write_text("{}\n")
    header = b'{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}'
    (root / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"abc")
    (root / "model.sig").write_text("signature")
    relist(root)
    return root


def relist(root):
    names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    (root / "SHA256SUMS").write_bytes(
        format_sums({name: file_sha256(root / name) for name in names})
    )


def refusal_of(check, *arguments):
    with pytest.raises(Refused, match=": ") as caught:
        check(*arguments)
    return caught.value.name, caught.value.where


def test_untouched_folder_holds_and_every_file_is_identified(folder):
    found = check_sums(folder)
    assert list(found) == [
        "SHA256SUMS",
        "config.json",
        "model.safetensors",
        "model.sig",
        "records/one.json",
    ]
    assert all(found[name].sha256 == file_sha256(folder / name) for name in found)
    assert found["model.safetensors"].tensors is not None
    assert found["config.json"].tensors is None


def test_list_is_what_sha256sum_reads(folder):
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    assert [line.split("  ")[1] for line in lines] == [
        "config.json",
        "model.safetensors",
        "records/one.json",
    ]


def test_release_digest_follows_its_published_definition(folder):
    names = ["SHA256SUMS", "config.json", "model.safetensors", "model.sig", "records/one.json"]
    rows = [[name, file_sha256(folder / name)] for name in names]
    assert release_digest(check_sums(folder)) == digest_of(rows)


def test_release_digest_sees_the_signature(folder):
    before = release_digest(check_sums(folder))
    (folder / "model.sig").write_text("another")
    assert release_digest(check_sums(folder)) != before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "records/one.json"])
def test_changed_byte_is_named_wherever_it_stands(folder, name):
    whole = (folder / name).read_bytes()
    for place in {0, len(whole) // 2, len(whole) - 1}:
        data = bytearray(whole)
        data[place] ^= 1
        (folder / name).write_bytes(data)
        assert refusal_of(check_sums, folder) == ("file-changed", name)


@pytest.mark.parametrize("name", ["config.json", "records/one.json", "SHA256SUMS"])
def test_removed_file_is_named(folder, name):
    (folder / name).unlink()
    if name == "records/one.json":
        (folder / "records").rmdir()
    assert refusal_of(check_sums, folder) == ("file-missing", name)


@pytest.mark.parametrize(
    "name", [".git", ".gitattributes", ".git/config", "json.py", "dinov3/__init__.py", "x"]
)
def test_file_that_is_not_listed_is_named(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("")
    assert refusal_of(check_sums, folder) == ("file-unlisted", name)


def test_folder_without_files_is_named(folder):
    (folder / ".git" / "objects").mkdir(parents=True)
    assert refusal_of(check_sums, folder) == ("file-unlisted", ".git")


def test_weights_that_are_none_are_refused_although_listed(folder):
    (folder / "model.safetensors").write_bytes(b"pickle")
    relist(folder)
    assert refusal_of(check_sums, folder) == ("weights-malformed", "model.safetensors")


@pytest.mark.parametrize("place", ["config.json", "records/two.json", "extra"])
def test_link_is_never_followed(folder, tmp_path, place):
    (tmp_path / "same").write_text("{}\n")
    (folder / place).unlink(missing_ok=True)
    (folder / place).symlink_to(tmp_path / "same")
    assert refusal_of(check_sums, folder) == ("file-special", place)


def test_link_to_a_folder_is_never_followed(folder, tmp_path):
    (folder / "records").rename(tmp_path / "records")
    (folder / "records").symlink_to(tmp_path / "records")
    assert refusal_of(check_sums, folder) == ("file-special", "records")


def test_hard_link_is_refused(folder, tmp_path):
    os.link(folder / "config.json", tmp_path / "other")
    assert refusal_of(check_sums, folder) == ("file-special", "config.json")


def test_pipe_is_refused_without_waiting_for_its_writer(folder):
    os.mkfifo(folder / "pipe")
    assert refusal_of(check_sums, folder) == ("file-special", "pipe")


def test_socket_is_refused(folder, monkeypatch):
    monkeypatch.chdir(folder)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        assert refusal_of(check_sums, folder) == ("file-special", "socket")


@pytest.mark.parametrize("place", ["config.json", "records/one.json"])
def test_link_put_in_place_after_the_listing_is_not_followed(folder, tmp_path, place):
    part = place.split("/")[0]
    (folder / part).rename(tmp_path / part)
    (folder / part).symlink_to(tmp_path / part)
    assert refusal_of(files.check_file, folder, place, None) == ("file-special", place)


@pytest.mark.parametrize(
    ("first", "second"), [("Readme", "README"), ("\u00e9", "e\u0301"), ("ﬁ", "fi")]
)
def test_names_that_some_systems_hold_for_one_are_refused(folder, first, second):
    (folder / first).write_text("")
    (folder / second).write_text("")
    name, _ = refusal_of(list_files, folder)
    assert name == "name-unsafe"


def test_folders_that_some_systems_hold_for_one_are_refused(folder):
    (folder / "Records").mkdir()
    (folder / "Records" / "two.json").write_text("")
    name, _ = refusal_of(list_files, folder)
    assert name == "name-unsafe"


def test_name_that_is_not_text_is_refused(folder):
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff")).write_text("")
    assert refusal_of(list_files, folder)[0] == "name-unsafe"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/etc/passwd",
        "../x",
        "a/../x",
        "./x",
        "a//x",
        "a/",
        "a\\x",
        "C:x",
        "a\nb",
        "a\rb",
        "\x1b[31m",
        "a\0",
        "a\u202eb",
        "a\u200bb",
        "a\u2028b",
        " a",
        "a ",
        "a.",
        "\ud800",
        "x" * 600,
        "a*",
    ],
)
def test_name_that_leads_elsewhere_or_is_not_shown_is_refused(name):
    assert refusal_of(check_name, name)[0] == "name-unsafe"


@pytest.mark.parametrize("name", ["a", ".gitattributes", "a-b_c/d+e.json", "naïve/日本.txt", "a b"])
def test_plain_name_is_let_through(name):
    check_name(name)


@pytest.mark.parametrize(
    "data",
    [
        f"{A}  b\n{B}  a\n",
        f"{A}  a\n{A}  a\n",
        f"{A}  a",
        f"{A}  a\n\n",
        f"{A} a\n",
        f"{A} *a\n",
        f"{A.upper()}  a\n",
        f"{A[1:]}  a\n",
        f"{A}  \n",
        f"{A}  SHA256SUMS\n",
        f"{A}  model.sig\n",
        f"{A}  a\r\n",
        f"\ufeff{A}  a\n",
    ],
)
def test_list_has_one_form_alone(data):
    name, _ = refusal_of(parse_sums, data.encode())
    assert name in ("sums-malformed", "name-unsafe")


def test_list_that_is_not_text_is_refused():
    assert refusal_of(parse_sums, A.encode() + b"  \xff\n")[0] == "sums-malformed"


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/./x", "a\tb", "\u202e"])
def test_listed_path_that_escapes_is_refused(name):
    assert refusal_of(parse_sums, f"{A}  {name}\n".encode())[0] == "name-unsafe"


def test_list_survives_writing_and_reading():
    hashes = {"b/ü": A, "b.json": B, "a": A, "b-1": B}
    assert parse_sums(format_sums(hashes)) == hashes
    assert parse_sums(b"") == {}


def test_small_file_is_read_with_its_digest_and_within_its_limit(folder):
    sha256 = file_sha256(folder / "config.json")
    assert read_file(folder, "config.json", limit=3, sha256=sha256) == b"{}\n"
    assert refusal_of(read_file_of, folder, 2, None) == ("file-changed", "config.json")
    assert refusal_of(read_file_of, folder, 3, A) == ("file-changed", "config.json")


def read_file_of(folder, limit, sha256):
    return read_file(folder, "config.json", limit=limit, sha256=sha256)


def test_folder_that_is_not_there_cannot_be_checked(tmp_path):
    with pytest.raises(CannotCheck, match="nowhere: cannot be read"):
        list_files(tmp_path / "nowhere")


def test_list_without_end_is_refused_before_it_is_parsed(monkeypatch):
    monkeypatch.setattr(files, "_MAX_FILES", 2)
    lines = "".join(f"{A}  {name}\n" for name in "abc")
    assert parse_sums(lines[: 2 * 68].encode()) == {"a": A, "b": A}
    with pytest.raises(Refused, match="more than 2 lines") as caught:
        parse_sums(lines.encode())
    assert caught.value.name == "sums-malformed"


def test_folders_count_as_files_do(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_MAX_FILES", 2)
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    with pytest.raises(Refused, match="more than 2 files and folders") as caught:
        list_files(tmp_path)
    assert caught.value.name == "file-unlisted"


def test_file_that_is_parsed_whole_has_a_limit(folder):
    os.truncate(folder / "config.json", 1 << 40)
    with pytest.raises(Refused, match="larger than") as caught:
        check_sums(folder)
    assert (caught.value.name, caught.value.where) == ("file-changed", "config.json")
