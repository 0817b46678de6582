"""Cheats on where weights come from: steps, logs, datasets, and what entered from outside."""

import hashlib
import json
from pathlib import Path
from typing import Any

from dinov3.release.record import canonical_json, digest_of
from tests.audit.changes import (
    CURATED,
    MANIFEST,
    REPORT,
    STUDENT,
    TEACHER,
    Change,
    Edit,
    all_of,
    in_json,
    in_record,
    insider,
    setting,
    settled,
)
from tests.audit.cheats_on_chain import delete, forget, no_log
from tests.audit.insider import edit_json, edit_record, record_of


def _without_evidence(folder: Path) -> None:
    """A student that took no steps: no log, no verdict on its health."""
    no_log(folder)

    def clear(record: Any) -> None:
        record["steps"] = {}
        record["outputs"].pop("health.json")

    edit_record(folder, STUDENT, clear)


def _from_nowhere(*roots: dict[str, Any]) -> Change:
    """Weights of which nobody says how they came about, below these roots alone."""

    def change(folder: Path) -> None:
        _without_evidence(folder)
        edit_record(folder, STUDENT, setting(inputs=list(roots)))
        delete(TEACHER)(folder)
        edit_json(folder, "release.json", forget(TEACHER))

        def declare(content: Any) -> None:
            content["roots"] += map(_declared, roots)
            content["records"].sort(key=lambda one: one[0] != STUDENT)

        edit_json(folder, "release.json", declare)

    return change


def _declared(edge: dict[str, Any]) -> dict[str, Any]:
    known = {name: edge[name] for name in ("role", "name", "sha256")}
    return {**known, "licences": ["GPL-2.0-or-later"], "training_data": "listed"}


def _root(role: str, name: str) -> dict[str, Any]:
    return {"role": role, "name": name, "sha256": "1" * 64, "record": None}


def _smuggle(role: str, name: str) -> Change:
    """Something more that the student read, by a role of which nobody is trained."""
    edge = _root(role, name)
    return all_of(
        in_record(STUDENT, lambda record: record["inputs"].append(edge)),
        in_json("release.json", lambda content: content["roots"].append(_declared(edge))),
    )


def _drop_edge(*roles: str) -> Edit:
    def change(record: Any) -> None:
        record["inputs"] = [edge for edge in record["inputs"] if edge["role"] not in roles]

    return change


def _one_line(folder: Path) -> None:
    """A million steps; teacher and student have the same log."""
    steps = 10**6
    for stage in (TEACHER, STUDENT):
        edit_record(folder, stage, _steps(steps))
    for path in (folder / "events").iterdir():
        path.write_bytes(json.dumps({"step": steps, "time": 1.0, "loss": 0.1}).encode() + b"\n")


def _steps(number: int) -> Edit:
    def change(record: Any) -> None:
        record["steps"] = {"planned": number, "performed": number}
        record["config"]["schedules"]["num_steps"] = number

    return change


def _holes(folder: Path) -> None:
    """Lines from the middle of all logs are gone."""
    for path in (folder / "events").iterdir():
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([*lines[:2], *lines[4:]]))


def _forget_licences(content: Any) -> None:
    for root in content["roots"]:
        root["licences"] = []


def _other_table(record: Any) -> None:
    """The dataset was made of another image table than the one that was judged."""
    for edge in record["inputs"]:
        if edge["role"] == "manifest":
            edge["role"] = "table"


def _excused(folder: Path) -> None:
    """No training reads the dataset; each says that what it was trained on is unknown."""
    for stage in (TEACHER, STUDENT):
        edit_record(folder, stage, _drop_edge("dataset"))
    for stage in (TEACHER, STUDENT, REPORT):
        edit_record(folder, stage, lambda record: record["facts"].update(training_data="unknown"))


def _secret_table(folder: Path) -> None:
    """The student reads a second table of images, which its dataset knows nothing of."""
    record = json.loads((folder / record_of(folder, MANIFEST)).read_bytes())
    run = json.loads((folder / record_of(folder, MANIFEST, "runs")).read_bytes())
    record["stage"] = stage = "a_secret_table"
    record["outputs"]["manifest.parquet"]["sha256"] = sha256 = "7" * 64
    run["record"] = digest = digest_of(record)
    (folder / f"records/{stage}-{digest[:12]}.json").write_bytes(canonical_json(record))
    (folder / f"runs/{stage}-{digest[:12]}.json").write_bytes(canonical_json(run))
    edit_json(folder, "release.json", lambda c: c["records"].insert(0, [stage, digest]))
    edge = {"role": "more", "name": "manifest.parquet", "sha256": sha256, "record": digest}
    edit_record(folder, STUDENT, lambda student: student["inputs"].append(edge))


def _borrowed_steps(folder: Path) -> None:
    """The student goes on where the teacher ended: five steps more than it took."""

    def change(record: Any) -> None:
        _steps(9)(record)
        (edge,) = [one for one in record["inputs"] if one["role"] == "teacher config"]
        edge["role"] = "resume"

    edit_record(folder, STUDENT, change)
    _write_log(folder, TEACHER, range(1, 6))
    _write_log(folder, STUDENT, range(6, 10))


def _write_log(folder: Path, stage: str, steps: range) -> None:
    lines = [json.dumps({"step": step, "time": float(step)}) + "\n" for step in steps]
    data = "".join(lines).encode()
    (folder / record_of(folder, stage, "events")).write_bytes(data)
    beside = {"events.jsonl": hashlib.sha256(data).hexdigest()}
    edit_json(folder, record_of(folder, stage, "runs"), setting(beside=beside))


CHEATS = [
    settled("weights from nowhere", _from_nowhere(), "steps-differ"),
    settled(
        "weights from a source alone", _from_nowhere(_root("source", "magic")), "root-undeclared"
    ),
    settled("a training without its evidence", _without_evidence, "steps-differ"),
    settled(
        "a training without a verdict on its health",
        in_record(STUDENT, lambda r: r["outputs"].pop("health.json")),
        "steps-differ",
    ),
    settled("a training of a million steps and one line", _one_line, "steps-differ"),
    settled("a log with lines cut out", _holes, "steps-differ"),
    settled("a training on no dataset", in_record(STUDENT, _drop_edge("dataset")), "images-differ"),
    settled(
        "no training on any dataset",
        all_of(*(in_record(stage, _drop_edge("dataset")) for stage in (TEACHER, STUDENT))),
        "images-differ",
    ),
    settled(
        "a training that does not count its images",
        in_record(STUDENT, lambda r: r["facts"].pop("num_images")),
        "images-differ",
    ),
    settled(
        "a training on more images than the dataset kept",
        in_record(STUDENT, lambda r: r["facts"].update(num_images=1000)),
        "images-differ",
    ),
    settled(
        "outside weights as an embedder", _smuggle("embedder", "outside.pth"), "root-undeclared"
    ),
    settled("a secret source of pictures", _smuggle("source", "secret"), "root-undeclared"),
    settled(
        "backgrounds that were trained on", _smuggle("backgrounds", "photos"), "root-undeclared"
    ),
    settled(
        "pictures nobody lists, excused by outside weights that are not there",
        _excused,
        "root-undeclared",
    ),
    settled("a training on a second image table", _secret_table, "images-differ"),
    settled("steps that another training took", _borrowed_steps, "steps-differ"),
    settled(
        "an image table from no source",
        all_of(in_record(MANIFEST, setting(inputs=[])), in_json("release.json", setting(roots=[]))),
        "root-undeclared",
    ),
    settled(
        "an image table that nobody judged",
        in_record(MANIFEST, lambda record: record["outputs"].pop("verdict.json")),
        "record-malformed",
    ),
    settled(
        "an evaluation on another image table",
        in_record(CURATED, _other_table),
        "evaluation-unbound",
    ),
    insider("licences of the roots emptied", in_json("release.json", _forget_licences), "licence"),
]
