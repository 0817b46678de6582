"""Changes to a release, to be put together into attacks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov3.release.images import read_images, write_images
from tests.audit.insider import edit_json, edit_record

STUDENT, TEACHER, CURATED = "distilled_students_vits", "pretrained_checkpoint", "curated_dataset"
MANIFEST, REPORT = "image_manifest", "eval_reports_vits"

Change = Callable[[Path], None]
Edit = Callable[[Any], None]


@dataclass(frozen=True)
class Cheat:
    """One attack.

    Attributes:
        what: In words.
        change: What is done to the files.
        refusal: The name it must be refused by.
        signs: Whether it is signed anew with the publisher's key, by an insider or a thief.
        settles: Whether digests of changed files are changed wherever they are named.
    """

    what: str
    change: Change
    refusal: str
    signs: bool = False
    settles: bool = False


def anybody(what: str, change: Change, refusal: str) -> Cheat:
    """Needs no key."""
    return Cheat(what, change, refusal)


def insider(what: str, change: Change, refusal: str) -> Cheat:
    """Needs the publisher's key."""
    return Cheat(what, change, refusal, signs=True)


def settled(what: str, change: Change, refusal: str) -> Cheat:
    """Needs the publisher's key, and patience."""
    return Cheat(what, change, refusal, signs=True, settles=True)


def in_json(name: str, change: Edit) -> Change:
    """Changes a JSON file."""
    return lambda folder: edit_json(folder, name, change)


def in_record(stage: str, change: Edit) -> Change:
    """Changes the record of a stage."""
    return lambda folder: edit_record(folder, stage, change)


def setting(**fields: Any) -> Edit:
    """Sets fields of an object."""

    def change(content: Any) -> None:
        content.update(fields)

    return change


def in_gate(name: str, **fields: Any) -> Change:
    """Sets fields of a gate's entry."""

    def change(content: Any) -> None:
        (gate,) = [one for one in content["gates"] if one["name"] == name]
        gate.update(fields)

    return in_json("checks.json", change)


def in_bytes(name: str, change: Callable[[bytes], bytes]) -> Change:
    """Changes the bytes of a file."""

    def write(folder: Path) -> None:
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return write


def all_of(*changes: Change) -> Change:
    """Several changes, one after the other."""

    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def flip(data: bytes) -> bytes:
    """One bit of the first byte."""
    return bytes([data[0] ^ 1]) + data[1:]


def adding(name: str) -> Change:
    """A file more."""

    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"{}\n")

    return change


def swapping(first: str, second: str) -> Change:
    """Each of two files gets the other's bytes."""

    def change(folder: Path) -> None:
        one, other = (folder / first).read_bytes(), (folder / second).read_bytes()
        (folder / first).write_bytes(other)
        (folder / second).write_bytes(one)

    return change


def in_images(change: Callable[[list[tuple[bytes, int]]], None]) -> Change:
    """Changes the rows of the list of images."""

    def write(folder: Path) -> None:
        with read_images(folder / "images.bin") as images:
            rows, roles = list(images), images.roles
        change(rows)
        write_images(folder / "images.bin", rows, roles)

    return write
