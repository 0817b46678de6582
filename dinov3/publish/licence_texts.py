"""The texts of licences: those that ship with us, others from folders of the user.

Of a licence that we do not ship, or of terms of one's own (`LicenseRef-NAME`), the text is put into
the log of releases, as `licences/<SPDX identifier>.txt`: whoever clones the project has it too.
"""

from collections.abc import Collection, Iterator
from pathlib import Path

from dinov3.release.licences import identifiers
from dinov3.release.policy import Verdict
from dinov3.release.spdx import LicenceError

OURS = Path(__file__).resolve().parent / "licences"
LOG_FOLDER = "licences"  # in the log of releases

_INCLUDED = {"LGPL-3.0": "GPL-3.0"}  # a text that only adds to another one
_OF_PICTURES = 'overrides, manifest: "licence=…"'
_OF_RELEASE = 'overrides, release: "policy.licence=…"'


def licence_texts(expressions: Collection[str], *folders: Path | None) -> dict[str, Path | None]:
    """Where the text of every licence that the expressions name lies; None where there is none.

    Args:
        expressions: SPDX expressions; one that cannot be read names nothing, its gate says so.
        folders: Hold `<SPDX identifier>.txt` of licences that do not ship with us, or better texts;
            the first that has one counts, before ours. None is no folder.
    """
    names: set[str] = set()
    for expression in expressions:
        try:
            names |= identifiers(expression)
        except LicenceError:
            continue
    for name in list(names):
        for adds, to in _INCLUDED.items():
            if name.startswith(f"{adds}-"):
                names.add(to + name.removeprefix(adds))
    places = [*(folder for folder in folders if folder is not None), OURS]
    return {name: _find(name, places) for name in sorted(names)}


def licence_remedy(verdict: Verdict, absent: Collection[str], log: Path) -> str:
    """What to do about a failed gate of licences, each kind of failure by its own name.

    Args:
        verdict: Of that gate.
        absent: Licences without a text.
        log: Folder of the log of releases.
    """
    return " ".join(_remedies(verdict, absent, log))


def _remedies(verdict: Verdict, absent: Collection[str], log: Path) -> Iterator[str]:
    found = verdict.result
    if not found["inputs"]:
        yield f"No licence at all: state that of the pictures in params.yaml ({_OF_PICTURES})."
    if found["unknown"]:
        yield (
            f"Unknown ({', '.join(found['unknown'])}): name it by its SPDX identifier, terms of "
            f"your own as LicenseRef-NAME, in params.yaml: of the pictures ({_OF_PICTURES}), of "
            f"the release ({_OF_RELEASE})."
        )
    if found["conflicts"]:
        yield (
            "Not allowed: give the release out under a licence that the inputs allow, in "
            f"params.yaml ({_OF_RELEASE}), or leave those pictures out."
        )
    for name in sorted(absent):
        yield f"No text: put it into {log / LOG_FOLDER / f'{name}.txt'} and commit it."


def _find(name: str, places: Collection[Path]) -> Path | None:
    """The versions "only" and "or later" of a licence have one text."""
    same = name.removesuffix("-or-later") + "-only" if name.endswith("-or-later") else name
    for place in places:
        for spelling in dict.fromkeys((name, same)):
            path = place / f"{spelling}.txt"
            if path.is_file():
                return path
    return None
