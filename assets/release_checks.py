"""Checks of a release: its gates as they judged it, and whether it still is what was signed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinov3.release.files import check_sums, release_digest
from dinov3.release.record import RecordError, parse_json
from dinov3.release.refusals import CannotCheck, Refused
from dinov3.release.revoked import REVOKED_NAME, Revocation, read_revoked
from dinov3.release.signature import verify_signature
from orchestration.reevaluation import read_settings
from orchestration.runner import Check, Judgement
from orchestration.stages import RELEASE_LOG

_PROMISES = {
    "chain": "Every artifact of the chain is there and is the one that its record names.",
    "clean_code": "Every stage ran the code of a commit.",
    "training_health": "No training of the chain collapsed or met a non-finite value.",
    "manifest_verdict": "The table of pictures met the expectations of its recipe.",
    "evaluation": "The figures of these very weights reach the thresholds of the policy.",
    "contamination": "No picture was both trained on and evaluated on.",
    "licences": "The licences of all inputs are known and allow this release.",
}


def gate_check(name: str) -> Check:
    """The check that shows one gate of `checks.json`."""

    def check(folder: Path) -> Judgement:
        return judge_gate(folder, name)

    check.__doc__ = _PROMISES[name]
    return check


def judge_gate(folder: Path, name: str) -> Judgement:
    """What the release's own gate said: passed, failed, or waived by somebody.

    Args:
        folder: Of the stage, in `data/releases/`.
        name: Of the gate.
    """
    path = folder / "release" / "checks.json"
    if not path.is_file():
        return _judge_attempt(folder, name)
    gates = {gate["name"]: gate for gate in parse_json(path.read_bytes())["gates"]}
    if name not in gates:
        return Judgement(False, f"checks.json has no gate {name}.")
    gate = gates[name]
    facts = {fact: str(gate[fact]) for fact in ("result", "threshold")}
    waiver = gate["waiver"]
    if gate["passed"] or waiver is None:
        return Judgement(bool(gate["passed"]), gate["reason"] or "passed", facts)
    said = f"waived by {waiver['who']} until {waiver['until']}: {waiver['why']} ({gate['reason']})"
    return Judgement(True, said, {**facts, "waived": True})


def intact(folder: Path) -> Judgement:
    """Every file is the one that was listed and signed by the log's key, and no other is there."""
    release, root = folder / "release", folder.parents[2]
    if not release.is_dir():
        return Judgement(False, "There is no release: its gates refused it.")
    name = read_settings(root).key
    key = Path(RELEASE_LOG) / "keys" / f"{name}.pub"
    if not (root / key).is_file():
        said = f"{key}: missing. Copy {name}.pub from the folder of keys to it, and commit it."
        return Judgement(False, said)
    try:
        hashes = check_sums(release)
        found = {name: one.sha256 for name, one in hashes.items()}
        signer = verify_signature(release, found, (root / key).read_bytes())
        head = parse_json((release / "release.json").read_bytes())
        revoked = _revocation(root / RELEASE_LOG / REVOKED_NAME, str(signer.fingerprint))
    except (Refused, CannotCheck, RecordError, OSError) as error:
        return Judgement(False, str(error))
    if revoked is not None:
        said = f"signed by a key that was revoked on {revoked.date}: {revoked.reason}"
        return Judgement(False, said)
    version = f"{head['model']}@{head['version']}"
    return Judgement(
        True,
        f"{version}: {len(hashes)} files, signed by {signer.fingerprint}",
        {
            "digest": release_digest(hashes),
            "signer": str(signer.fingerprint),
            "verify": f"dinov3 verify {release.relative_to(root)} --key {key} --expect {version}",
        },
    )


def _revocation(path: Path, fingerprint: str) -> Revocation | None:
    return read_revoked(path).get(fingerprint) if path.exists() else None


def _judge_attempt(folder: Path, name: str) -> Judgement:
    """A refused release leaves no files, only a line in the log of attempts."""
    log = folder.parents[2] / RELEASE_LOG / "attempts.jsonl"
    lines = log.read_bytes().splitlines() if log.is_file() else []
    attempts: list[Mapping[str, Any]] = [parse_json(line) for line in lines]
    mine = [attempt for attempt in attempts if attempt["model"] == folder.name]
    if not mine:
        return Judgement(False, "There is no release and no attempt at one.")
    last = mine[-1]
    said = f"attempt at {last['model']}@{last['version']} of {last['date']}"
    if not last["failed"]:
        return Judgement(False, f"There is no release; its {said} passed. Materialize it again.")
    if name in last["failed"]:
        return Judgement(False, f"Failed, {said}: the last lines of the run say why.")
    return Judgement(True, f"Passed, {said}, which other gates refused.")
