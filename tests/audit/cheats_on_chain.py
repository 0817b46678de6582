"""Cheats on what the release is made of: records, logs, weights, images, licences, roots."""

import json
import shutil
from pathlib import Path
from typing import Any

from dinov3.release.images import ROLE_EVALUATED, ROLE_TRAINED
from dinov3.release.record import canonical_json, digest_of
from tests.audit.changes import (
    CURATED,
    MANIFEST,
    REPORT,
    STUDENT,
    TEACHER,
    Change,
    Edit,
    adding,
    all_of,
    in_bytes,
    in_images,
    in_json,
    in_record,
    insider,
    setting,
    settled,
    swapping,
)
from tests.audit.insider import edit_json, edit_record, record_of


def delete(stage: str, *parts: str) -> Change:
    def change(folder: Path) -> None:
        for part in parts or ("records", "runs", "events"):
            for path in (folder / part).glob(f"{stage}-*"):
                path.unlink()
        if not any((folder / "events").iterdir()):
            (folder / "events").rmdir()

    return change


def forget(stage: str) -> Edit:
    def change(content: Any) -> None:
        content["records"] = [one for one in content["records"] if one[0] != stage]

    return change


def _add_record(folder: Path) -> None:
    record = json.loads((folder / record_of(folder, MANIFEST)).read_bytes())
    record["facts"]["rows"] = 10**6
    data = canonical_json(record)
    digest = digest_of(record)
    (folder / f"records/{MANIFEST}-{digest[:12]}.json").write_bytes(data)
    run = json.loads((folder / record_of(folder, MANIFEST, "runs")).read_bytes())
    run["record"] = digest
    (folder / f"runs/{MANIFEST}-{digest[:12]}.json").write_bytes(canonical_json(run))

    def list_it(content: Any) -> None:
        content["records"].insert(1, [MANIFEST, digest])

    edit_json(folder, "release.json", list_it)


def _kinder_record(folder: Path) -> None:
    """The same output and a kinder story; what was made from it names the old digest."""
    name = record_of(folder, CURATED)
    old = name.rpartition("-")[2].removesuffix(".json")
    record = json.loads((folder / name).read_bytes())
    record["config"]["dedup"]["relative_threshold"] = 0.5
    record["config_digest"] = digest_of(record["config"])
    digest = digest_of(record)
    (folder / name).unlink()
    (folder / f"records/{CURATED}-{digest[:12]}.json").write_bytes(canonical_json(record))
    run = folder / f"runs/{CURATED}-{old}.json"
    content = json.loads(run.read_bytes())
    content["record"] = digest
    run.unlink()
    (folder / f"runs/{CURATED}-{digest[:12]}.json").write_bytes(canonical_json(content))

    def name_it(release: Any) -> None:
        release["records"] = [
            [stage, digest if stage == CURATED else one] for stage, one in release["records"]
        ]

    edit_json(folder, "release.json", name_it)


def _reorder(content: Any) -> None:
    content["records"].reverse()


def _claim_steps(record: Any) -> None:
    record["steps"] = {"planned": 500, "performed": 500}
    record["config"]["schedules"]["num_steps"] = 500


def _cut_events(folder: Path) -> None:
    """The ends of all logs; those of teacher and student have the same bytes."""
    for path in (folder / "events").iterdir():
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-2]))


def _shuffle_events(folder: Path) -> None:
    for path in (folder / "events").iterdir():
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[::-1]))


def _other_run(folder: Path) -> None:
    edit_json(folder, record_of(folder, STUDENT, "runs"), setting(record="0" * 64))


def no_log(folder: Path) -> None:
    """No log at all, and a run.json that never had one."""
    (folder / record_of(folder, STUDENT, "events")).unlink()

    def clear(run: Any) -> None:
        run["beside"] = {}

    edit_json(folder, record_of(folder, STUDENT, "runs"), clear)


def _kinder_metric(report: Any) -> None:
    for row in report["rows"]:
        if row["subject"] == "model":
            row["value"] = 0.99


def _other_weights(report: Any) -> None:
    report["model"]["sha256"] = "0" * 64


def _contaminate(rows: list[tuple[bytes, int]]) -> None:
    digest = next(digest for digest, role in rows if role == ROLE_TRAINED)
    number = next(number for number, (_, role) in enumerate(rows) if role == ROLE_EVALUATED)
    rows[number] = (digest, ROLE_EVALUATED)


def _hide(rows: list[tuple[bytes, int]]) -> None:
    """A picture that was trained on is said to have been left out."""
    number = next(number for number, (_, role) in enumerate(rows) if role == ROLE_TRAINED)
    rows[number] = (rows[number][0], 2)


def _second_name(data: bytes) -> bytes:
    """An image that is evaluated on was trained on too, by a role that nobody counts."""
    start = 12 + int.from_bytes(data[8:12], "little")
    header = json.loads(data[12:start])
    rows = [data[at : at + 33] for at in range(start, len(data), 33)]
    digest = next(row[:32] for row in rows if row[32] == ROLE_EVALUATED)
    rows = sorted([*rows, digest + bytes([16])])
    header["roles"]["16"] = "trained"
    raw = canonical_json({**header, "count": len(rows)})
    return data[:8] + len(raw).to_bytes(4, "little") + raw + b"".join(rows)


def _hide_from_head(content: Any) -> None:
    content["images"]["num_trained"] -= 1


def _loosen(record: Any) -> None:
    record["config"]["dedup"]["relative_threshold"] = 0.9999


def _drop_licence(record: Any) -> None:
    record["licences"] = {"in": [], "out": []}


def _unknown_licence(folder: Path) -> None:
    for path in (folder / "records").iterdir():
        name = path.name.rpartition("-")[0]
        edit_record(folder, name, setting(licences={"in": ["unknown"], "out": ["unknown"]}))


def _no_text(folder: Path) -> None:
    shutil.rmtree(folder / "licences")


def _drop_root(content: Any) -> None:
    content["roots"] = []


def _kinder_root(content: Any) -> None:
    for root in content["roots"]:
        root["training_data"] = "listed"


def _forget_unknown(folder: Path) -> None:
    """Records below outside weights no longer say so."""
    for path in (folder / "records").iterdir():
        record = json.loads(path.read_bytes())
        record["facts"].pop("training_data", None)
        path.write_bytes(canonical_json(record))


def _say_uncontaminated(folder: Path) -> None:
    def change(report: Any) -> None:
        report["dataset"]["contamination"] = "none"

    edit_json(folder, "evals.json", change)
    edit_record(folder, REPORT, lambda record: record["facts"].update(contamination="none"))


TELL_MORE_ROWS = in_record(MANIFEST, lambda record: record["facts"].update(rows=10**6))

CHEATS = [
    insider(
        "two students swapped", swapping("model.safetensors", "heads.safetensors"), "weights-differ"
    ),
    insider("heads left out", lambda f: (f / "heads.safetensors").unlink(), "weights-differ"),
    insider(
        "tensor digests of others",
        in_json("release.json", lambda c: c["tensors"].update({"model.safetensors": "0" * 64})),
        "weights-differ",
    ),
    settled(
        "a record without a field", in_record(CURATED, lambda r: r.pop("code")), "record-malformed"
    ),
    settled(
        "a record of inputs without end",
        in_record(STUDENT, lambda r: r["inputs"].extend(r["inputs"] * 300)),
        "record-malformed",
    ),
    settled(
        "a report of rows without end",
        in_json("evals.json", lambda r: r["rows"].extend(r["rows"] * 300)),
        "evaluation-unbound",
    ),
    settled(
        "a record under another stage's name",
        in_record(CURATED, setting(stage="curated")),
        "record-malformed",
    ),
    insider("a record deleted", delete(MANIFEST), "record-missing"),
    insider(
        "a record deleted and forgotten",
        all_of(delete(MANIFEST), in_json("release.json", forget(MANIFEST))),
        "record-missing",
    ),
    insider("a record's run deleted", delete(MANIFEST, "runs"), "file-missing"),
    insider("records reordered", in_json("release.json", _reorder), "record-unlisted"),
    insider("a record nothing leads to", _add_record, "record-unlisted"),
    insider("a record no list names", adding("records/other-000000000000.json"), "record-unlisted"),
    insider("a kinder record of the same output", _kinder_record, "record-missing"),
    insider(
        "a kinder record in its place",
        in_record(CURATED, lambda r: r["facts"].update(rows=10**6)),
        "record-missing",
    ),
    settled(
        "an edge to other bytes",
        in_record(STUDENT, lambda r: r["inputs"][0].update(sha256="0" * 64)),
        "edge-broken",
    ),
    insider("run.json of another record", _other_run, "run-differs"),
    insider("a log cut short", _cut_events, "run-differs"),
    settled("a log cut short, run.json with it", _cut_events, "steps-differ"),
    insider("a log left out", no_log, "steps-differ"),
    settled("a log out of order", _shuffle_events, "events-malformed"),
    settled("more steps claimed", in_record(STUDENT, _claim_steps), "steps-differ"),
    insider("a metric changed", in_json("evals.json", _kinder_metric), "evaluation-unbound"),
    settled(
        "an evaluation of other weights",
        in_json("evals.json", _other_weights),
        "evaluation-unbound",
    ),
    insider(
        "a picture added to the list",
        in_images(lambda rows: rows.append((b"\0" * 32, 2))),
        "images-differ",
    ),
    settled(
        "a list of images that is none",
        in_bytes("images.bin", lambda d: d + d[-33:]),
        "images-malformed",
    ),
    settled("an image trained and evaluated on", in_images(_contaminate), "contamination"),
    settled(
        "a trained image hidden",
        all_of(in_images(_hide), in_json("release.json", _hide_from_head)),
        "images-differ",
    ),
    settled(
        "an image trained and evaluated on, by a role of another name",
        in_bytes("images.bin", _second_name),
        "images-malformed",
    ),
    settled(
        "more images trained on, the list kept back",
        all_of(
            lambda folder: (folder / "images.bin").unlink(),
            in_json("release.json", lambda c: c["images"].update(mode="digest", num_trained=10**9)),
        ),
        "images-differ",
    ),
    settled("deduplication loosened", in_record(CURATED, _loosen), "dedup-threshold"),
    settled("a licence dropped on the way", in_record(TEACHER, _drop_licence), "licence"),
    settled("a licence nobody knows", _unknown_licence, "licence"),
    insider("the licence's text left out", _no_text, "licence"),
    insider("a root dropped", in_json("release.json", _drop_root), "root-undeclared"),
]

# On a release below outside weights.
OUTSIDE_CHEATS = [
    insider(
        "outside weights said to be known", in_json("release.json", _kinder_root), "root-undeclared"
    ),
    settled("records that forget outside weights", _forget_unknown, "root-undeclared"),
    settled("an evaluation that knows too much", _say_uncontaminated, "evaluation-unbound"),
]
