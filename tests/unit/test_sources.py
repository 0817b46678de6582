"""Sources: every kind offers its images in order, names what it cannot use, and never hangs."""

import hashlib
import io
import json
import os
import pickle
import socket
import subprocess
import sys
import tarfile

import polars as pl
import pytest
from PIL import Image

from dinov3.data.sources import open_source
from dinov3.data.sources.entries import Entry, sort_lines
from dinov3.data.sources.images import SourceImages
from dinov3.data.sources.paths import decode_path, encode_path, read_regular
from dinov3.errors import DataError, LineageBroken


def png(value=0, size=(4, 3)):
    stream = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def write(path, data=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def make_shard(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def listed(spec):
    return list(open_source(spec).entries())


def reasons(entries):
    return {entry.path: entry.refused for entry in entries if entry.refused is not None}


@pytest.mark.parametrize(
    "name",
    [b"plain.png", b"a b.png", b"new\nline.png", b"bad\xff\xfe.png", b"back\\slash\\x41.png",
     "Käse/日本.png".encode(), "turn\u202eed.png".encode(), b"tab\t.png", b"c1\xc2\x85.png"],
)  # fmt: skip
def test_any_file_name_survives_its_printable_form(name):
    text = encode_path(name)
    assert "\n" not in text
    assert os.fsencode(decode_path(text)) == name
    assert text.encode("utf-8")


def test_only_what_is_not_printable_is_escaped():
    assert encode_path("Käse/日本 1.png") == "Käse/日本 1.png"
    assert encode_path(b"\xff\n\\") == "\\xff\\x0a\\\\"


def test_sorting_in_runs_on_disk_equals_sorting_in_memory():
    lines = [f"{(i * 7919) % 1000:04d}\0é" for i in range(1000)]
    assert list(sort_lines(lines, run_size=64)) == sorted(lines)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("foldr:/tmp", "unknown kind, got 'foldr'.*Did you mean folder"),
        ("/tmp/pictures", "not of the form kind:path"),
        ("folder:", "not of the form kind:path"),
        ("folder:{}/none", "no such folder"),
        ("list:{}/none.txt", "no such file"),
        ("parquet:{}/none.parquet", "no such file"),
        ("wds:{}/none-*.tar", "no such shard"),
        ("stamps:{}/none", "make demo.*python -m dinov3 stamps .*SOURCE=folder:/my/pictures"),
    ],
)
def test_unusable_source_is_one_clear_error(tmp_path, spec, message):
    with pytest.raises(DataError, match=message) as caught:
        open_source(spec.format(tmp_path))
    assert caught.value.exit_code == 2


def test_folder_lists_images_in_path_order_with_first_folder_as_label(tmp_path):
    for name in (
        "b/c/2.PNG",
        "b/1.jpg",
        "b.webp",
        "b-1/3.gif",
        "top.png",
        "notes.txt",
        ".hidden.png",
    ):
        write(tmp_path / name)
    source = open_source(f"folder:{tmp_path}")
    found = list(source.entries())
    assert [entry.path for entry in found] == sorted(entry.path for entry in found)
    assert {entry.path: entry.label for entry in found} == {
        "b/c/2.PNG": "b", "b/1.jpg": "b", "b.webp": None, "b-1/3.gif": "b-1", "top.png": None,
    }  # fmt: skip
    assert source.ignored == {".txt": 1, "hidden": 1}


def test_loops_pipes_sockets_and_dangling_links_are_listed_and_never_opened(tmp_path):
    tree = tmp_path / "tree"
    write(tree / "a" / "ok.png", png())
    (tree / "a" / "loop").symlink_to(tree)
    (tree / "self.png").symlink_to(tree / "self.png")
    (tree / "gone.png").symlink_to(tmp_path / "nothing")
    (tree / "twice").symlink_to(tree / "a")
    os.mkfifo(tree / "pipe.png")
    (tree / "to-pipe.png").symlink_to(tree / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tree / "sock"))
        found = listed(f"folder:{tree}")
    assert [entry.path for entry in found if entry.refused is None] == ["a/ok.png"]
    assert reasons(found) == {
        "a/loop/": "symlink loop: link to a folder above it",
        "gone.png": "missing: link: No such file or directory",
        "pipe.png": "not a regular file: named pipe",
        "self.png": "symlink loop: link: Too many levels of symbolic links",
        "sock": "not a regular file: socket",
        "to-pipe.png": "not a regular file: named pipe",
        "twice/": "symlink to a folder of this source: its images are listed there",
    }
    with pytest.raises(OSError, match="neither a file nor a link"):
        read_regular(tree / "pipe.png")


def test_links_out_of_the_tree_are_followed_once(tmp_path):
    write(tmp_path / "elsewhere" / "sub" / "1.png", png())
    (tmp_path / "elsewhere" / "sub" / "back").symlink_to(tmp_path / "elsewhere")
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "first").symlink_to(tmp_path / "elsewhere")
    (tree / "second").symlink_to(tmp_path / "elsewhere")
    (tree / "file.png").symlink_to(tmp_path / "elsewhere" / "sub" / "1.png")
    source = open_source(f"folder:{tree}")
    found = list(source.entries())
    usable = [entry.path for entry in found if entry.refused is None]
    assert usable == ["file.png", "first/sub/1.png"]
    assert all(source.read(path) == png() for path in usable)
    assert set(reasons(found)) == {"first/sub/back/", "second/"}


def test_links_into_hidden_folders_are_followed(tmp_path):
    write(tmp_path / ".store" / "blob", png())
    (tmp_path / "a.png").symlink_to(tmp_path / ".store" / "blob")
    source = open_source(f"folder:{tmp_path}")
    assert [source.read(entry.path) for entry in source.entries()] == [png()]


def test_text_beside_a_picture_steers_no_terminal(tmp_path):
    write(tmp_path / "a.png", png())
    written = write(tmp_path / "list.tsv", b"a.png\tl\x1b[2Jabel\tcap\x9b\x07tion \xc2\x9b2J\n")
    (entry,) = open_source(f"list:{written}").entries()
    assert (entry.label, entry.caption) == ("l [2Jabel", "cap\\x9b tion 2J")


@pytest.mark.parametrize("size", [-1024, -512, -1])
def test_shard_whose_member_has_a_negative_size_is_listed_as_damaged(tmp_path, size):
    info = tarfile.TarInfo("before.png")
    info.size = len(png())
    good = info.tobuf() + png().ljust(tarfile.BLOCKSIZE, b"\0")
    header = bytearray(tarfile.TarInfo("loop.png").tobuf())
    header[124:136] = size.to_bytes(12, "big", signed=True)
    checksum = sum(header[:148]) + sum(header[156:]) + 8 * ord(" ")
    header[148:156] = b"%06o\0 " % checksum
    write(tmp_path / "0.tar", good + bytes(header) + bytes(1024))
    source = open_source(f"wds:{tmp_path}/0.tar")
    damage = "damaged shard: after 1 members: a member of negative size"
    assert [(one.path, one.refused) for one in source.entries()] == [
        ("0.tar", damage),
        ("0.tar!before.png", None),
    ]
    assert source.read("0.tar!before.png") == png()


def test_shard_of_long_names_without_end_is_listed_as_damaged(tmp_path):
    info = tarfile.TarInfo("name")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, tarfile.BLOCKSIZE
    write(tmp_path / "0.tar", (info.tobuf() + b"n" * tarfile.BLOCKSIZE) * 3000 + bytes(1024))
    (entry,) = open_source(f"wds:{tmp_path}/0.tar").entries()
    assert entry.path == "0.tar"
    assert str(entry.refused).startswith("damaged shard: after 0 members: maximum recursion")


def test_parquet_text_that_is_no_text_is_an_error(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    broken = pa.array([b"\xff\xfe"]).cast(pa.string(), safe=False)
    never = pa.array([10**17], pa.timestamp("ms"))
    for label in (broken, never):
        pq.write_table(pa.table({"path": ["a.png"], "label": label}), tmp_path / "t.parquet")
        with pytest.raises(DataError, match=r"t\.parquet is damaged"):
            list(open_source(f"parquet:{tmp_path}/t.parquet").entries())
        pq.write_table(pa.table({"image": label}), tmp_path / "t.parquet")
        source = open_source(f"parquet:{tmp_path}/t.parquet")
        (entry,) = source.entries()
        with pytest.raises(OSError, match="not readable"):
            source.read(entry.path)


def test_list_takes_relative_and_absolute_paths_labels_and_captions(tmp_path):
    write(tmp_path / "in" / "b.png", png(1))
    write(tmp_path / "out" / "a.png", png(2))
    lines = [b"b.png\tcat\tA cat.", os.fsencode(tmp_path / "out" / "a.png"), b"", b"./b.png\tdog",
             b"none\xff.png"]  # fmt: skip
    table = write(tmp_path / "in" / "list.txt", b"\r\n".join(lines))
    source = open_source(f"list:{table}")
    found = list(source.entries())
    assert found == [
        Entry(f"{tmp_path}/out/a.png"),
        Entry("b.png", "cat", "A cat."),
        Entry("b.png", "dog", refused="named twice"),
        Entry("none\\xff.png"),
    ]
    assert source.read("b.png") == png(1)
    assert source.read(found[0].path) == png(2)
    with pytest.raises(OSError, match="No such file"):
        source.read("none\\xff.png")
    assert source.ignored == {"empty line": 1}


def test_parquet_of_paths_equals_list(tmp_path):
    write(tmp_path / "b.png")
    table = pl.DataFrame({"path": ["b.png", None], "label": [3, 4], "licence": ["MIT", None]})
    table.write_parquet(tmp_path / "t.parquet")
    assert listed(f"parquet:{tmp_path}/t.parquet") == [Entry("b.png", "3", None, "MIT")]


@pytest.mark.parametrize("wrapped", [False, True])
def test_parquet_of_pictures_streams_row_groups(tmp_path, wrapped):
    pictures = [png(i) for i in range(7)]
    cells = [{"bytes": data, "path": None} for data in pictures] if wrapped else pictures
    table = pl.DataFrame({"image": [*cells, None], "caption": [f"c{i}" for i in range(8)]})
    table.write_parquet(tmp_path / "t.parquet", row_group_size=3)
    source = open_source(f"parquet:{tmp_path}/t.parquet")
    found = list(source.entries())
    assert [entry.caption for entry in found] == [f"c{i}" for i in range(8)]
    assert [source.read(entry.path) for entry in found[:7]] == pictures
    with pytest.raises(OSError, match="row without a picture"):
        source.read(found[7].path)
    assert pickle.loads(pickle.dumps(source)).read(found[4].path) == pictures[4]


def test_parquet_without_pictures_names_its_columns(tmp_path):
    pl.DataFrame({"img_url": ["x"]}).write_parquet(tmp_path / "t.parquet")
    with pytest.raises(DataError, match="no column image or path, got img_url"):
        open_source(f"parquet:{tmp_path}/t.parquet")
    write(tmp_path / "bad.parquet", b"not parquet")
    with pytest.raises(DataError, match="not readable as parquet"):
        open_source(f"parquet:{tmp_path}/bad.parquet")


def test_shards_join_samples_by_name_and_read_by_offset(tmp_path):
    make_shard(
        tmp_path / "s-01.tar",
        {"b.png": png(1), "b.cls": b"7\n", "b.txt": b"A bee.\n", "a/x.jpg": png(2),
         "a/x.json": json.dumps({"label": "fly", "caption": "A fly."}).encode(), "notes.md": b"-"},
    )  # fmt: skip
    make_shard(tmp_path / "s-00.tar", {"b.png": png(3)})
    source = open_source(f"wds:{tmp_path}/s-{{00..02}}.tar")
    found = list(source.entries())
    assert found == [
        Entry("s-00.tar!b.png"),
        Entry("s-01.tar!a/x.jpg", "fly", "A fly."),
        Entry("s-01.tar!b.png", "7", "A bee."),
        Entry("s-02.tar", refused="missing: shard: No such file or directory"),
    ]
    assert [source.read(entry.path) for entry in found[:3]] == [png(3), png(2), png(1)]
    assert source.ignored == {".md": 1}
    assert pickle.loads(pickle.dumps(source)).read("s-01.tar!b.png") == png(1)
    assert len(listed(f"wds:{tmp_path}/*.tar")) == 3


def test_side_files_of_a_shard_can_hold_anything(tmp_path):
    sides = {
        "b.json": b'{"label": "\\ud800", "caption": ["no text"]}',
        "c.json": b"{",
        "d.cls": b"\xff",
    }
    pictures = {name: png() for name in ("b.png", "c.png", "d.png")}
    make_shard(tmp_path / "s.tar", {**sides, **pictures})
    source = open_source(f"wds:{tmp_path}/s.tar")
    assert [entry.label for entry in source.entries()] == ["\\ud800", None, "\\xff"]
    assert source.ignored == {"damaged .json": 1}


def test_damaged_and_compressed_shards_are_listed_beside_what_they_still_hold(tmp_path):
    whole = make_shard(tmp_path / "whole.tar", {"a.png": png(1), "b.png": png(2)}).read_bytes()
    second = whole.index(b"b.png")
    write(tmp_path / "header.tar", whole[:second] + b"\xff" * 400 + whole[second + 400 :])
    write(tmp_path / "cut.tar", whole[: second + 512 + 20])
    write(tmp_path / "empty.tar", b"")
    write(tmp_path / "zip.tar", b"\x1f\x8b" + b"0" * 600)
    found = listed(f"wds:{tmp_path}/*.tar")
    assert {entry.path for entry in found if entry.refused is None} >= {
        "cut.tar!a.png", "header.tar!a.png", "whole.tar!a.png", "whole.tar!b.png",
    }  # fmt: skip
    refused = reasons(found)
    assert refused["header.tar"] == "damaged shard: after 1 members: header not readable"
    assert refused["cut.tar"].startswith("damaged shard")
    assert refused["empty.tar"].startswith("damaged shard")
    assert refused["zip.tar"].startswith("compressed shard")


def test_shard_members_that_are_no_files_or_named_twice_are_refused(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for kind in (tarfile.FIFOTYPE, tarfile.SYMTYPE, tarfile.REGTYPE, tarfile.REGTYPE):
            info = tarfile.TarInfo(f"m{kind.decode()}.png")
            info.type, info.linkname = kind, "/etc/hostname"
            tar.addfile(info)
    found = reasons(listed(f"wds:{tmp_path}/s.tar"))
    assert found["s.tar!m6.png"].startswith("not a regular file")
    assert found["s.tar!m2.png"].startswith("not a regular file")
    assert found["s.tar!m0.png"] == "named twice"


def test_images_are_checked_against_the_table_on_their_first_read(tmp_path):
    place = write(tmp_path / "a.png", png(1))
    source = open_source(f"folder:{tmp_path}")
    sha256 = hashlib.sha256(png(1)).hexdigest()
    images = SourceImages(source, ["a.png"], [sha256])
    assert (len(images), images.name(0), images.read(0)) == (1, "a.png", png(1))
    place.write_bytes(png(2))
    again = pickle.loads(pickle.dumps(SourceImages(source, ["a.png"], [sha256])))
    with pytest.raises(LineageBroken, match=r"a\.png: its bytes differ from the image table"):
        again.read(0)
    place.unlink()
    with pytest.raises(LineageBroken, match=r"a\.png: can no longer be read.*missing"):
        again.read(0)


def test_opening_sources_imports_no_heavy_library():
    code = (
        "import sys, dinov3.data.sources.fingerprint as f; "
        "print(sorted({'torch', 'polars', 'typer', 'pandas', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
