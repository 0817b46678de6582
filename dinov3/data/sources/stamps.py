"""`stamps:PATH`: the pictures of Tux Paint, and how to fetch them from Debian without root.

The package `tuxpaint-stamps-default` holds clip-art and photographs, most with an alpha mask, in a
tree of categories, with an English caption on the first line of the `.txt` beside each. Mirrored
doubles are passed over.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from dinov3.data.sources.entries import Entry, clean_text
from dinov3.data.sources.folder import FolderSource, first_folder
from dinov3.data.sources.paths import decode_path, read_regular
from dinov3.errors import DataError

PACKAGE = "tuxpaint-stamps-default"
INSIDE = Path("usr/share/tuxpaint/stamps")  # where the package keeps the pictures
LICENCE = "GPL-2.0-or-later"  # what the package's copyright file grants
_DOUBLES = ("_mirror", "_flip", "_mirror_flip")
_OWN_PICTURES = "Or use your own pictures: SOURCE=folder:/my/pictures"


class StampsSource(FolderSource):
    """Tux Paint stamps with label (top-level category), caption and licence."""

    kind = "stamps"

    def __init__(self, root: Path) -> None:
        inside = root / INSIDE
        if not root.is_dir():
            msg = (
                f"source: the stamps are not there, got stamps:{root}. Fetch them with `make demo` "
                f"or `python -m dinov3 stamps {root}`. {_OWN_PICTURES}."
            )
            raise DataError(msg)
        super().__init__(inside if inside.is_dir() else root)

    def _entry(self, path: str) -> Entry | None:
        stem, suffix = os.path.splitext(path)  # noqa: PTH122 - a name, not a place
        if suffix.lower() != ".png":
            self.ignore(suffix.lower() or "no suffix")
            return None
        if stem.endswith(_DOUBLES):
            self.ignore("mirrored double")
            return None
        return Entry(path, first_folder(path), self._caption(stem), LICENCE)

    def _caption(self, stem: str) -> str | None:
        try:
            text = read_regular(f"{self.root}/{decode_path(stem)}.txt")
        except OSError:  # a stamp without a caption is complete
            return None
        return clean_text(text.split(b"\n", 1)[0].decode("utf-8", "replace"))


def fetch_stamps(destination: Path) -> Path:
    """Fetches and unpacks the package; returns at once where that is already done.

    The downloaded package is kept in `$XDG_CACHE_HOME/dinov3` (`~/.cache/dinov3`), so a second
    checkout needs no network.

    Raises:
        DataError: The tools of Debian are missing, or nothing can be downloaded or written.
    """
    pictures = destination / INSIDE
    if pictures.is_dir():  # the folder appears whole, by a rename
        return pictures
    if missing := [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]:
        msg = (
            f"stamps: fetching them needs the Debian tools apt-get and dpkg-deb, got a machine "
            f"without {' and '.join(missing)}. Use your own pictures: SOURCE=folder:/my/pictures."
        )
        raise DataError(msg)
    try:
        _unpack(_cached_package(), destination)
    except OSError as error:
        msg = f"{destination}: cannot be written: {error}. Free the disk or choose another folder."
        raise DataError(msg) from error
    return pictures


def _unpack(package: Path, destination: Path) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".stamps-", dir=destination.parent) as folder:
        unpacked = Path(folder) / "package"
        failure = _run(["dpkg-deb", "-x", str(package), str(unpacked)])
        if failure is not None or not (unpacked / INSIDE).is_dir():
            package.unlink(missing_ok=True)
            msg = f"{package}: not a usable package, got {failure or 'no pictures'}. Try again."
            raise DataError(msg)
        if destination.is_dir() and not any(destination.iterdir()):
            destination.rmdir()
        elif destination.exists():
            msg = f"{destination}: holds something else than the stamps. Choose another folder."
            raise DataError(msg)
        unpacked.rename(destination)


def _cached_package() -> Path:
    """The package file, downloaded unless an earlier download is kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(base) / "dinov3"
    cache.mkdir(parents=True, exist_ok=True)
    kept = sorted(cache.glob(f"{PACKAGE}_*.deb"))
    if kept:
        return kept[-1]
    with tempfile.TemporaryDirectory(prefix=".apt-", dir=cache) as folder:
        package = _download(Path(folder))
        return package.rename(cache / package.name)


def _download(folder: Path) -> Path:
    """Downloads by the machine's package lists, or by lists of our own where it has none."""
    options = _options(folder)
    failure = _run(["apt-get", *options, "download", PACKAGE], folder)
    if failure is not None:
        lists = folder / "lists"
        (lists / "partial").mkdir(parents=True)
        options += ["-o", f"Dir::State::lists={lists}"]
        failure = _run(["apt-get", *options, "update"], folder)
        later = _run(["apt-get", *options, "download", PACKAGE], folder)
        failure = None if later is None else f"{later} (apt-get update: {failure or 'done'})"
    packages = list(folder.glob(f"{PACKAGE}_*.deb"))
    if failure is not None or not packages:
        msg = (
            f"stamps: {PACKAGE} cannot be downloaded, got {failure or 'no file'}. "
            f"Check the network and apt's sources. {_OWN_PICTURES}."
        )
        raise DataError(msg)
    return packages[0]


def _options(folder: Path) -> list[str]:
    """Options that keep apt inside our folder: no root, no locks of the system."""
    cache = folder / "cache"
    (cache / "archives" / "partial").mkdir(parents=True)
    settings = {
        "Dir::Cache": cache,
        "Debug::NoLocking": "true",
        "APT::Sandbox::User": "",  # else root hands the download to a user who cannot write here
        "APT::Update::Error-Mode": "any",
    }
    return ["-q", *(part for key, value in settings.items() for part in ("-o", f"{key}={value}"))]


def _run(command: list[str], folder: Path | None = None) -> str | None:
    """Runs a tool of Debian; returns what it complained of last, or None when it succeeded."""
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.startswith("E:")]
    return (lines or done.stderr.splitlines() or [f"exit {done.returncode}"])[-1]
