"""`images.bin`: found by bisection, one form for one content, nothing malformed believed."""

import hashlib
import os
import random
import struct

import pytest

from dinov3.release.images import read_images, write_images
from dinov3.release.record import canonical_json
from dinov3.release.refusals import Refused

ROLES = {1: "trained", 2: "clustered only", 3: "evaluated", 16: "excluded: exact duplicate"}


def digest(number):
    return hashlib.sha256(str(number).encode()).digest()


@pytest.fixture
def rows():
    """Roles of 5000 images, two of them trained and evaluated on."""
    chosen = random.Random(0).choices(list(ROLES), k=5000)
    table = [(digest(number), role) for number, role in enumerate(chosen)]
    return [*table, (digest("x"), 3), (digest("x"), 1), (digest("y"), 1), (digest("y"), 3)]


@pytest.fixture
def path(tmp_path, rows):
    write_images(tmp_path / "images.bin", rows, ROLES)
    return tmp_path / "images.bin"


def forge(path, rows=b"", *, magic=b"DINOIMG1", raw=None, **changes):
    header = {
        "schema": "dinov3.images/1",
        "roles": {"1": "trained", "3": "evaluated"},
        "count": len(rows) // 33,
        "keyed": None,
        **changes,
    }
    raw = canonical_json(header) if raw is None else raw
    path.write_bytes(magic + struct.pack("<I", len(raw)) + raw + rows)
    return path


def test_every_image_is_found_with_its_roles(path, rows):
    with read_images(path) as images:
        assert images.count == len(rows)
        assert all(role in images.find(key) for key, role in rows)
        assert images.find(digest("x")) == (1, 3)
        assert images.find(digest("nobody")) == ()
        assert images.find(bytes(32)) == images.find(b"\xff" * 32) == ()


def test_rows_are_read_sorted_whatever_order_they_were_written_in(path, rows):
    with read_images(path) as images:
        assert list(images) == sorted(rows)


def test_equal_content_gives_equal_bytes(path, rows, tmp_path):
    shuffled = rows + rows[:100]
    random.Random(1).shuffle(shuffled)
    write_images(tmp_path / "other.bin", shuffled, dict(reversed(ROLES.items())))
    assert (tmp_path / "other.bin").read_bytes() == path.read_bytes()


def test_counts_and_overlap_are_those_of_the_rows(path, rows):
    with read_images(path) as images:
        tally = images.tally()
        assert images.counts() == {role: [one for _, one in rows].count(role) for role in ROLES}
        assert images.overlap() == tally.overlap == 2
        assert tally.first_overlap == min(digest("x"), digest("y"))


def test_overlap_is_seen_across_what_is_read_at_once(tmp_path):
    """Other roles of the digest stand between, and rows are read 16384 at a time."""
    table = [(number.to_bytes(32, "big"), 1) for number in range(16383)]
    shared = (16383).to_bytes(32, "big")
    write_images(tmp_path / "i", [*table, (shared, 3), (shared, 2), (shared, 1)], ROLES)
    with read_images(tmp_path / "i") as images:
        assert images.tally().first_overlap == shared


def test_empty_table_holds_nothing(tmp_path):
    write_images(tmp_path / "i", [], ROLES)
    with read_images(tmp_path / "i") as images:
        assert list(images) == []
        assert images.find(digest(1)) == ()


def test_only_a_few_rows_are_read_to_find_one(tmp_path):
    """The file is sparse: 33 GB could not be read whole."""
    count = 10**9
    path = forge(tmp_path / "i", count=count)
    os.truncate(path, path.stat().st_size + 33 * count)
    with read_images(path) as images:
        assert images.find(digest(1)) == ()


def test_keyed_table_says_so(tmp_path):
    write_images(tmp_path / "i", [(digest(1), 1)], ROLES, salt_sha256="a" * 64)
    with read_images(tmp_path / "i") as images:
        assert images.salt_sha256 == "a" * 64


@pytest.mark.parametrize("row", [(b"short", 1), (digest(1), 4), (digest(1), 300)])
def test_row_that_is_none_cannot_be_written(tmp_path, row):
    with pytest.raises(ValueError, match="not a sha256 and a known role"):
        write_images(tmp_path / "i", [row], {**ROLES})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"magic": b"DINOIMG2"}, "does not start with DINOIMG1"),
        ({"magic": b""}, "does not start with DINOIMG1"),
        ({"schema": "dinov3.images/2"}, "schema is not"),
        ({"more": 1}, "one too many"),
        ({"count": 1}, "do not fill"),
        ({"count": -1}, "no number of rows"),
        ({"count": True}, "no number of rows"),
        ({"count": "0"}, "no number of rows"),
        ({"roles": {"0": "x"}}, "roles are not"),
        ({"roles": {"01": "x"}}, "roles are not"),
        ({"roles": {"256": "x"}}, "roles are not"),
        ({"roles": {"²": "x"}}, "roles are not"),
        ({"roles": {"1": None}}, "roles are not"),
        ({"roles": {"9" * 5000: "x"}}, "roles are not"),
        ({"roles": {"1": "clustered only"}}, "roles are not"),
        ({"roles": {"4": "trained"}}, "roles are not"),
        ({"roles": []}, "roles are not"),
        ({"keyed": True}, "salt"),
        ({"keyed": {"salt_sha256": "x"}}, "salt"),
        ({"keyed": {"salt_sha256": "a" * 64, "salt": "x"}}, "salt"),
        ({"raw": b"{}"}, "canonical"),
        ({"raw": b"[]\n"}, "lacks a field"),
        ({"raw": b"{}\n"}, "lacks a field"),
        ({"raw": b" " * 70_000}, "a header of more than"),
        ({"raw": b"{" * 60_000}, "nested deeper"),
    ],
)
def test_malformed_header_is_refused(tmp_path, changes, why):
    with pytest.raises(Refused, match=why) as caught:
        read_images(forge(tmp_path / "i", **changes))
    assert caught.value.name == "images-malformed"


def test_truncated_or_longer_file_is_refused(path):
    whole = path.read_bytes()
    for size in (0, 5, 11, 50, len(whole) - 33, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(Refused, match=r"images\.bin: "):
            read_images(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(Refused, match="do not fill"):
        read_images(path)


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (b"b" * 32 + b"\1" + b"a" * 32 + b"\1", "row 1 is not after"),
        (b"a" * 32 + b"\1" + b"a" * 32 + b"\1", "row 1 is not after"),
        (b"a" * 32 + b"\3" + b"a" * 32 + b"\1", "row 1 is not after"),
        (b"a" * 32 + b"\2", "row 0 has an unknown role 2"),
    ],
)
def test_unsorted_repeated_or_unknown_rows_are_refused(tmp_path, rows, why):
    with read_images(forge(tmp_path / "i", rows)) as images, pytest.raises(Refused, match=why):
        images.tally()


def test_unknown_role_of_the_image_that_is_looked_for_is_refused(tmp_path):
    path = forge(tmp_path / "i", b"a" * 32 + b"\2")
    with read_images(path) as images, pytest.raises(Refused, match="unknown role"):
        images.find(b"a" * 32)


def test_link_is_not_followed(path, tmp_path):
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(Refused, match="link: a link"):
        read_images(tmp_path / "link")
