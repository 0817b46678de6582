"""`checks.json`: the gates a release went through, judged again where its own files allow it."""

import datetime
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dinov3.release.chain import Chain
from dinov3.release.contents import CHECKS_NAME, Contents, check_schema
from dinov3.release.head import Head
from dinov3.release.images import IMAGES_NAME
from dinov3.release.licences import identifiers
from dinov3.release.policy import (
    GATES,
    ImageCounts,
    PolicyError,
    Verdict,
    judge_chain,
    judge_clean_code,
    judge_contamination,
    judge_evaluation,
    judge_health,
    judge_licences,
    loose_thresholds,
    may_be_waived,
)
from dinov3.release.policy_terms import is_number
from dinov3.release.refusals import Refused

SCHEMA = "dinov3.checks/1"

_ENTRY = {"name", "passed", "result", "threshold", "reason", "waiver"}
_WAIVER = {"who", "why", "until"}
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_HEX = re.compile(r"[0-9a-f]{64}")


def read_gates(contents: Contents) -> list[dict[str, Any]]:
    """The entries of `checks.json`: every gate, in the fixed order.

    Raises:
        Refused: `check-missing`, `check-failed`, `schema-unknown` or `json-malformed`.
        CannotCheck: Its schema is newer.
    """
    raw = contents.read_object(CHECKS_NAME)
    check_schema(raw.get("schema"), SCHEMA, CHECKS_NAME)
    gates = raw.get("gates")
    if raw.keys() != {"schema", "gates", "attempts"} or not isinstance(gates, list):
        raise Refused("check-missing", CHECKS_NAME, "not a list of gates and of attempts")
    names = [gate.get("name") if isinstance(gate, dict) else None for gate in gates]
    if names != list(GATES):
        lacking = [name for name in GATES if name not in names]
        why = f"lacks {', '.join(lacking)}" if lacking else "its gates are not in order"
        raise Refused("check-missing", CHECKS_NAME, why)
    for gate in gates:
        if gate.keys() != _ENTRY or not isinstance(gate["passed"], bool):
            raise Refused("check-missing", CHECKS_NAME, f"{gate['name']}: not a gate's entry")
    attempts = raw["attempts"]
    if not isinstance(attempts, dict) or not _is_attempts(attempts):
        raise Refused("check-missing", CHECKS_NAME, "does not say which attempt it was")
    return gates


def check_gates(
    gates: Sequence[Mapping[str, Any]],
    head: Head,
    chain: Chain,
    report: Mapping[str, Any],
    counts: ImageCounts | None,
) -> tuple[list[str], list[str]]:
    """Judges again what can be, and lets a failed gate pass only with a waiver that holds.

    Args:
        gates: Of `checks.json`.
        head: `release.json`.
        chain: The records.
        report: The evaluation.
        counts: Of the images; None where they are not here.

    Returns:
        Names of the gates that were judged again; one sentence per waiver.

    Raises:
        Refused: `contamination`, `dedup-threshold`, `licence`, `check-differs`, `check-failed`.
    """
    try:
        again = {one.name: one for one in _judge_again(head, chain, report, counts)}
    except PolicyError as error:
        raise Refused("check-differs", CHECKS_NAME, str(error)) from error
    for gate in gates:
        verdict = again.get(gate["name"])
        if verdict is not None:
            _compare(gate, verdict)
        if gate["passed"] and gate["waiver"] is not None:
            why = f"{gate['name']}: is said to have passed, and a waiver stands beside it"
            raise Refused("check-differs", CHECKS_NAME, why)
    _check_health({gate["name"]: gate for gate in gates}["training_health"], head, chain)
    made = _made(chain)
    return list(again), [_waived(gate, head, made) for gate in gates if not gate["passed"]]


def check_licences(contents: Contents, head: Head, chain: Chain) -> tuple[str, ...]:
    """Licences of the weights and of their evaluation, against that of the release.

    Returns:
        What whoever passes the release on has to do.

    Raises:
        Refused: `licence`: one is unknown, forbids the release, or its text is not here.
    """
    verdict = judge_licences(_licences(chain), head.policy)
    result = verdict.result
    if result["unknown"] or not result["inputs"]:
        why = ", ".join(result["unknown"]) or "no input states one"
        raise Refused("licence", "release.json", f"unknown: {why}")
    for name in sorted(identifiers(head.licence)):
        if f"licences/{name}.txt" not in contents.hashes:
            raise Refused("licence", f"licences/{name}.txt", "the text is not here")
    return tuple(result["obligations"])


def check_dedup(head: Head, chain: Chain) -> None:
    """Near-duplicates were removed at least as strictly as the policy asks.

    Raises:
        Refused: `dedup-threshold`.
    """
    for link in chain.writers_of(IMAGES_NAME):
        dedup = link.record.config.get("dedup")
        try:
            loose = list(loose_thresholds(dedup if isinstance(dedup, dict) else {}, head.policy))
        except PolicyError as error:
            raise Refused("dedup-threshold", link.stem, str(error)) from error
        if loose:
            raise Refused("dedup-threshold", link.stem, "; ".join(loose))


def _judge_again(
    head: Head, chain: Chain, report: Mapping[str, Any], counts: ImageCounts | None
) -> Iterator[Verdict]:
    """The gates whose evidence is in the release."""
    roots, policy = chain.unknown_roots, head.policy
    yield judge_chain(len(chain.links), ())
    yield judge_clean_code({link.stem: link.run for link in chain.links.values()})
    yield judge_evaluation(report, policy, unknown_roots=roots)
    writers = chain.writers_of(IMAGES_NAME)
    if counts is not None or not writers:
        dedup = writers[0].record.config.get("dedup") if writers else None
        yield judge_contamination(counts, dedup, policy, unknown_roots=roots)
    yield judge_licences(_licences(chain), policy)


def _licences(chain: Chain) -> list[str]:
    links = (chain.final, chain.evaluation)
    return sorted({name for link in links for name in link.record.licences.get("out", ())})


def _compare(gate: Mapping[str, Any], verdict: Verdict) -> None:
    """A gate may have found more against a release than can be seen here, never less."""
    name = verdict.name
    for field in ("result", "threshold"):
        if gate[field] != getattr(verdict, field):
            why = f"{name}: its {field} is not what the release's own files give"
            raise Refused("check-differs", CHECKS_NAME, why)
    if gate["passed"] and not verdict.passed:
        why = f"{name}: is said to have passed, but {verdict.reason}"
        raise Refused("check-differs", CHECKS_NAME, why)
    for reason in (verdict.reason or "").split("; "):
        if reason not in str(gate["reason"]):
            why = f"{name}: does not say why it failed: {reason}"
            raise Refused("check-differs", CHECKS_NAME, why)


def _check_health(gate: Mapping[str, Any], head: Head, chain: Chain) -> None:
    """What is said of the health of each training, and of no other, is not beyond the policy.

    What each of them measured is the signer's word.
    """
    trained = {link.stem for link in chain.links.values() if link.events is not None}
    said = gate["result"]
    if not isinstance(said, dict) or said.keys() != trained:
        why = "training_health: does not say of each training how it ended, or of another"
        raise Refused("check-differs", CHECKS_NAME, why)
    metrics = {stem: {"passed": True, "metrics": one} for stem, one in said.items()}
    _compare(gate, judge_health(metrics, head.policy))


def _made(chain: Chain) -> datetime.date:
    """The day the last stage finished, by the clock of the machine it ran on."""
    times = [link.run.get("finished") for link in chain.links.values()]
    known = [float(time) for time in times if is_number(time) and 0 <= float(time) < 2**35]
    return datetime.datetime.fromtimestamp(max(known, default=0.0), datetime.UTC).date()


def _waived(gate: Mapping[str, Any], head: Head, made: datetime.date) -> str:
    """Who answers for a failed gate.

    Raises:
        Refused: `check-failed`: nobody does, or nobody may; `check-differs`: of what is hidden.
    """
    name, waiver = gate["name"], gate["waiver"]
    if waiver is None:
        raise _failed(f"{name}: {gate['reason']}")
    if not may_be_waived(gate, head.policy):
        raise _failed(f"{name} cannot be waived: {gate['reason']}")
    texts = waiver.values() if isinstance(waiver, dict) and waiver.keys() == _WAIVER else [None]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise _failed(f"{name}: its waiver does not say who, why and until when")
    try:
        until = datetime.date.fromisoformat(waiver["until"])
    except ValueError as error:
        raise _failed(f"{name}: its waiver ends at no date") from error
    if not _DATE.fullmatch(waiver["until"]) or until < made:
        raise _failed(f"{name}: its waiver ended on {until}, the chain was made on {made}")
    if not isinstance(gate["reason"], str) or not gate["reason"].strip():
        raise Refused("check-differs", CHECKS_NAME, f"{name}: does not say why it failed")
    return f"{name}, waived by {waiver['who']} until {until}: {waiver['why']}"


def _is_attempts(attempts: Mapping[str, Any]) -> bool:
    count, digest = attempts.get("count"), attempts.get("digest")
    return (
        attempts.keys() == {"count", "digest"}
        and isinstance(count, int)
        and not isinstance(count, bool)
        and count >= 1
        and isinstance(digest, str)
        and _HEX.fullmatch(digest) is not None
    )


def _failed(why: str) -> Refused:
    return Refused("check-failed", CHECKS_NAME, why)
