"""The demo's pictures: labels, captions, no doubles; fetched by Debian's tools, offline."""

import hashlib
import shutil
import subprocess

import pytest
from PIL import Image

from dinov3.data.sources import Entry, open_source
from dinov3.data.sources.stamps import INSIDE, PACKAGE, fetch_stamps
from dinov3.errors import DataError

needs_debian = pytest.mark.skipif(
    shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None, reason="not Debian"
)

CONTROL = f"""Package: {PACKAGE}
Version: 1-1
Architecture: all
Maintainer: nobody <nobody@localhost>
Description: a picture
"""


def names(folder):
    return [path.name for path in folder.iterdir()]


def draw(root):
    birds = root / INSIDE / "animals" / "birds"
    birds.mkdir(parents=True)
    for name in ("owl.png", "owl_mirror.png", "wren_flip.png", "wren.png"):
        Image.new("RGBA", (3, 2)).save(birds / name)
    (birds / "owl.txt").write_text("An owl. \nde.utf8=Eine Eule.\n")
    (birds / "owl.ogg").write_bytes(b"hoo")


def build_package(root):
    draw(root / "tree")
    (root / "tree" / "DEBIAN").mkdir()
    (root / "tree" / "DEBIAN" / "control").write_text(CONTROL)
    package = root / f"{PACKAGE}_1-1_all.deb"
    command = ["dpkg-deb", "--root-owner-group", "--build", root / "tree", package]
    subprocess.run(command, check=True, capture_output=True)
    return package


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    (tmp_path / "xdg" / "dinov3").mkdir(parents=True)
    return tmp_path / "xdg" / "dinov3"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """An apt repository in a folder, on a machine whose package lists are empty."""
    folder = tmp_path / "repository"
    folder.mkdir()
    package = build_package(folder)
    data = package.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    index = f"{CONTROL}Filename: ./{package.name}\nSize: {len(data)}\nSHA256: {digest}\n"
    (folder / "Packages").write_text(index)
    (folder / "sources.list").write_text(f"deb [trusted=yes] copy:{folder} ./\n")
    (folder / "lists" / "partial").mkdir(parents=True)
    (folder / "none").mkdir()
    settings = {
        "Etc::sourcelist": "sources.list",
        "Etc::sourceparts": "none",
        "State::lists": "lists",
    }
    lines = [f'Dir::{key} "{folder / name}";\n' for key, name in settings.items()]
    (folder / "apt.conf").write_text("".join(lines))
    monkeypatch.setenv("APT_CONFIG", str(folder / "apt.conf"))
    return folder


def test_stamps_have_label_caption_and_licence_and_no_doubles(tmp_path):
    draw(tmp_path)
    expected = [
        Entry("animals/birds/owl.png", "animals", "An owl.", "GPL-2.0-or-later"),
        Entry("animals/birds/wren.png", "animals", None, "GPL-2.0-or-later"),
    ]
    for root in (tmp_path, tmp_path / INSIDE):
        source = open_source(f"stamps:{root}")
        assert list(source.entries()) == expected
    assert source.ignored == {"mirrored double": 2, ".txt": 1, ".ogg": 1}


@needs_debian
def test_fetching_works_with_empty_package_lists_and_needs_no_second_download(
    tmp_path, cache, repository
):
    pictures = fetch_stamps(tmp_path / "data" / "stamps")
    assert len(list(open_source(f"stamps:{tmp_path}/data/stamps").entries())) == 2
    assert [path.name for path in cache.iterdir()] == [f"{PACKAGE}_1-1_all.deb"]
    assert names(repository / "lists") == ["partial"]  # the machine's own are left alone
    before = pictures.stat().st_ino
    shutil.rmtree(repository)
    assert fetch_stamps(tmp_path / "data" / "stamps").stat().st_ino == before
    fetch_stamps(tmp_path / "second checkout")
    assert names(tmp_path / "data") == ["stamps"]


@needs_debian
def test_damaged_download_is_thrown_away(tmp_path, cache):
    kept = cache / f"{PACKAGE}_1-1_all.deb"
    kept.write_bytes(b"half a file")
    with pytest.raises(DataError, match="not a usable package"):
        fetch_stamps(tmp_path / "stamps")
    assert not kept.exists()
    assert not (tmp_path / "stamps").exists()


@needs_debian
def test_fetching_never_replaces_a_folder_with_something_else(tmp_path, cache):
    build_package(tmp_path).rename(cache / f"{PACKAGE}_1-1_all.deb")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "holiday.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match="holds something else than the stamps"):
        fetch_stamps(tmp_path / "mine")
    assert names(tmp_path / "mine") == ["holiday.jpg"]


@needs_debian
def test_failed_download_says_why_and_names_the_alternative(tmp_path, cache, repository):
    (repository / "sources.list").write_text("")
    with pytest.raises(
        DataError, match=r"cannot be downloaded, got E: .*SOURCE=folder:/my/pictures"
    ):
        fetch_stamps(tmp_path / "stamps")


def test_machine_without_debian_tools_is_told_the_alternative(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"without apt-get and dpkg-deb\. Use .*SOURCE=folder:/my"):
        fetch_stamps(tmp_path / "stamps")
