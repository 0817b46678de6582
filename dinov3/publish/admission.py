"""Lets a chain through its gates or refuses it: the verdicts, the waivers, the attempt noted."""

import contextlib
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinov3.config import ReleaseConfig, resolved_policy
from dinov3.errors import ConfigError, ReleaseRefused
from dinov3.gates import Evidence, judge_all
from dinov3.publish.licence_texts import licence_remedy
from dinov3.publish.waivers import (
    WAIVERS_NAME,
    Waiver,
    idle_waivers,
    lets_through,
    note_attempt,
    read_waivers,
)
from dinov3.release.gate_list import SCHEMA
from dinov3.release.licences import normal_form
from dinov3.release.policy import Policy, PolicyError, Verdict, may_be_waived, read_policy
from dinov3.release.record import digest_of
from dinov3.release.spdx import LicenceError

_MAX_REASON = 2_000  # characters; a lost folder is as many faults as it had files
_REMEDIES = {
    "chain": "Restore the files with dvc checkout --force or dvc pull, or make them anew.",
    "clean_code": "Commit the code and make these stages again.",
    "training_health": "Read health.json of the stage and train again.",
    "manifest_verdict": "Read verdict.json of image_manifest and mend the source.",
    "evaluation": "Train better, or make the report of these very weights again.",
    "contamination": "Curate again, with thresholds as strict as the policy's, and train anew.",
}


@dataclass(frozen=True)
class Attempted:
    """Which release is tried, where that is noted, and on which day."""

    model: str
    version: str
    log: Path
    day: datetime.date


def policy_of(config: ReleaseConfig) -> dict[str, Any]:
    """The policy, its licence in SPDX's spelling; what is no licence is left for its gate.

    Raises:
        ConfigError: It names a health limit that is none.
    """
    policy = resolved_policy(config)
    with contextlib.suppress(LicenceError):
        policy["licence"] = normal_form(str(policy["licence"]))
    try:
        read_policy(policy)
    except PolicyError as error:
        msg = f"{error}. Mend the recipe."
        raise ConfigError(msg) from error
    return policy


def pass_gates(evidence: Evidence, raw: Mapping[str, Any], tried: Attempted) -> dict[str, Any]:
    """Runs every gate and notes the attempt, however it ends.

    Args:
        evidence: The chain.
        raw: The policy as JSON.
        tried: The release.

    Returns:
        The content of `checks.json`.

    Raises:
        ReleaseRefused: A gate failed and no waiver lets it through.
        DataError, LineageBroken: Waivers or attempts cannot be read or written.
    """
    policy = read_policy(raw)
    path = tried.log / WAIVERS_NAME
    waivers = read_waivers(path, tried.model, tried.version, tried.day)
    verdicts = judge_all(evidence, policy)
    passes = [(verdict, lets_through(verdict, waivers, policy)) for verdict in verdicts]
    failed = [verdict for verdict, waiver in passes if not verdict.passed and waiver is None]
    attempt = note_attempt(
        tried.log,
        model=tried.model,
        version=tried.version,
        failed=[verdict.name for verdict in failed],
        judged=_judged(evidence, raw, verdicts),
        day=tried.day,
    )
    if failed:
        void = (*waivers.void, *idle_waivers(failed, waivers, policy))
        raise ReleaseRefused(_refusal(tried, failed, evidence, policy, void))
    gates = [_entry(verdict, waiver) for verdict, waiver in passes]
    return {"schema": SCHEMA, "gates": gates, "attempts": attempt.as_json()}


def _judged(evidence: Evidence, raw: Mapping[str, Any], verdicts: Sequence[Verdict]) -> str:
    """Digest of what was judged and how."""
    return digest_of(
        {
            "final": evidence.final.digest,
            "evaluation": evidence.evaluation.digest,
            "policy": digest_of(raw),
            "verdicts": [verdict.as_json() for verdict in verdicts],
        }
    )


def _entry(verdict: Verdict, waiver: Waiver | None) -> dict[str, Any]:
    return {**verdict.as_json(), "waiver": None if waiver is None else waiver.as_json()}


def _refusal(
    tried: Attempted,
    failed: Sequence[Verdict],
    evidence: Evidence,
    policy: Policy,
    void: Sequence[str],
) -> str:
    """Each failed gate in a sentence, with what to do."""
    lines = [f"{tried.model}@{tried.version}: refused by its gates, nothing was signed."]
    for verdict in failed:
        remedy = _REMEDIES.get(verdict.name) or _licence_remedy(verdict, evidence, tried.log)
        lines.append(f"  {verdict.name}: {_cut(verdict.reason)}. {remedy}")
    open_to = [one.name for one in failed if may_be_waived(one.as_json(), policy)]
    if open_to:
        where = tried.log / WAIVERS_NAME
        lines.append(f"  A waiver in {where} can let through: {', '.join(open_to)}.")
    lines += [f"  {text}." for text in void]
    return "\n".join(lines)


def _licence_remedy(verdict: Verdict, evidence: Evidence, log: Path) -> str:
    absent = [name for name, path in (evidence.texts or {}).items() if path is None]
    return licence_remedy(verdict, absent, log)


def _cut(reason: str | None) -> str:
    whole = str(reason)
    return whole if len(whole) <= _MAX_REASON else f"{whole[:_MAX_REASON]} …"
