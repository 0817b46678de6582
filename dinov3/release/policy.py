"""The rules a release is held to; the gates apply them before signing, the verifier after.

`policy_terms.py` says what a policy is. Every function here is pure: data in, `Verdict` out.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from dinov3.release.licences import judge
from dinov3.release.policy_terms import (
    GATES,
    MODEL,
    NEVER_WAIVED,
    Policy,
    PolicyError,
    Threshold,
    is_number,
    number_of,
    read_policy,
    threshold_json,
)

__all__ = [
    "GATES",
    "MODEL",
    "NEVER_WAIVED",
    "ImageCounts",
    "Policy",
    "PolicyError",
    "Threshold",
    "Verdict",
    "contamination_of",
    "held_out_faults",
    "judge_chain",
    "judge_clean_code",
    "judge_contamination",
    "judge_evaluation",
    "judge_health",
    "judge_licences",
    "judge_manifest",
    "loose_thresholds",
    "may_be_waived",
    "read_policy",
]

NONE, FOUND, UNKNOWN = "none", "found", "unknown"  # contamination
_DEDUP = ("relative_threshold", "self_threshold")
_HELD_OUT = "held out for evaluation"  # why a curated dataset left a picture out


@dataclass(frozen=True)
class Verdict:
    """What one gate found: JSON values, as they stand in `checks.json`."""

    name: str
    passed: bool
    result: Any
    threshold: Any
    reason: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The gate's entry in `checks.json`, without its waiver."""
        return {
            "name": self.name,
            "passed": self.passed,
            "result": self.result,
            "threshold": self.threshold,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class ImageCounts:
    """What `images.bin` says: images of each kind, and those of both."""

    num_trained: int
    num_evaluated: int
    num_overlap: int


def judge_evaluation(
    report: Mapping[str, Any], policy: Policy, *, unknown_roots: Collection[str] = ()
) -> Verdict:
    """Holds a report's intervals against the policy's thresholds.

    Args:
        report: Content of `report.json`.
        policy: Of the release.
        unknown_roots: Names of outside weights in the chain: their training images are unknown,
            so that the report must not claim to be free of contamination.

    Raises:
        PolicyError: The report has no readable rows.
    """
    rows, differences = _rows(report, "rows"), _rows(report, "differences")
    found: list[Any] = []
    failed: list[str] = []
    for asked in policy.evaluation:
        for what, low, least in _asked_values(asked, rows, differences):
            found.append({"what": what, "low": low})
            if low is None:
                failed.append(f"{what}: no such row")
            elif not low >= least:
                failed.append(f"{what}: interval starts at {low}, below {least}")
    claimed = contamination_of(report)
    if unknown_roots and claimed != UNKNOWN:
        names = ", ".join(sorted(unknown_roots))
        failed.append(f"contamination is said to be {claimed!r}, of {names} it is unknown")
    elif claimed not in {NONE, UNKNOWN}:
        failed.append(f"contamination is {claimed!r}")
    asked_json = [threshold_json(one) for one in policy.evaluation]
    result = {"contamination": claimed, "values": found}
    return Verdict("evaluation", not failed, result, asked_json, "; ".join(failed) or None)


def contamination_of(report: Mapping[str, Any]) -> str:
    """What a report says of trained images among the evaluated: none, unknown or found.

    Raises:
        PolicyError: It says nothing.
    """
    dataset = report.get("dataset")
    claimed = dataset.get("contamination") if isinstance(dataset, Mapping) else None
    if not isinstance(claimed, str):
        msg = f"report: dataset.contamination: not a word, got {claimed!r}"
        raise PolicyError(msg)
    return claimed


def held_out_faults(
    report: Mapping[str, Any], num_evaluated: int, dataset: Mapping[str, Any]
) -> Iterator[str]:
    """How the pictures that a report says it judged are not those of the list of images.

    The list counts files; of the pictures that are held out, some may be copies of one file. How
    many are held out the record of the dataset says, and nobody else.

    Args:
        report: Content of `report.json`.
        num_evaluated: Images evaluated on, by the list.
        dataset: Facts of the curated dataset's record.

    Yields:
        Each of them in words.
    """
    said = report.get("dataset")
    said = said if isinstance(said, Mapping) else {}
    left_out = dataset.get("left_out")
    held_out = left_out.get(_HELD_OUT) if isinstance(left_out, Mapping) else num_evaluated
    if not _is_count(held_out) or num_evaluated > held_out:
        yield f"{num_evaluated} images are held out, the dataset's record says {held_out!r}"
        return
    judged, labelled = said.get("num_held_out", said.get("num_test")), said.get("num_test")
    if not _is_count(judged) or not _is_count(labelled) or not labelled <= judged:
        yield f"judged {labelled!r} pictures of {judged!r} that are held out"
    elif judged > held_out or ("num_held_out" in said and judged != held_out):
        yield f"says {judged} pictures are held out, of the dataset it is {held_out}"
    rows, trained_by = dataset.get("rows"), said.get("num_train")
    if _is_count(rows) and not (_is_count(trained_by) and trained_by <= rows - held_out):
        yield f"its probes had {trained_by!r} pictures, of {rows} were {held_out} held out"


def judge_contamination(
    images: ImageCounts | None,
    dedup: Mapping[str, Any] | None,
    policy: Policy,
    *,
    unknown_roots: Collection[str] = (),
) -> Verdict:
    """No image both trained and evaluated; near-duplicates removed as strictly as asked.

    Args:
        images: Of the curated dataset; None where the chain has none (outside weights alone).
        dedup: `config.dedup` of the curated dataset's record; None where there is none.
        policy: Of the release.
        unknown_roots: Names of outside weights in the chain.

    Raises:
        PolicyError: The record's thresholds are no numbers.
    """
    failed = []
    if images is None and not unknown_roots:
        failed.append("no list of images, and no outside weights that would explain it")
    if images is not None and images.num_overlap:
        failed.append(f"{images.num_overlap} images were trained on and evaluated on")
    loose = () if dedup is None else tuple(loose_thresholds(dedup, policy))
    kept = NONE if not unknown_roots else UNKNOWN
    result = {
        "contamination": FOUND if images is not None and images.num_overlap else kept,
        "num_trained": None if images is None else images.num_trained,
        "num_evaluated": None if images is None else images.num_evaluated,
        "num_overlap": None if images is None else images.num_overlap,
        **{name: None if dedup is None else dedup.get(name) for name in _DEDUP},
    }
    asked = {"num_overlap": 0, **{name: getattr(policy, f"max_{name}") for name in _DEDUP}}
    reason = "; ".join([*failed, *loose]) or None
    return Verdict("contamination", reason is None, result, asked, reason)


def loose_thresholds(dedup: Mapping[str, Any], policy: Policy) -> Iterator[str]:
    """Which thresholds of deduplication are above the policy's.

    Raises:
        PolicyError: They are no numbers.
    """
    for name in _DEDUP:
        used, most = number_of(dedup, name), getattr(policy, f"max_{name}")
        if used > most:
            yield f"dedup.{name} is {used}, the policy allows at most {most}"


def judge_licences(inputs: Collection[str], policy: Policy) -> Verdict:
    """Holds the release's licence against those of its inputs.

    Args:
        inputs: `licences.out` of the weights' record.
        policy: Names the licence of the release.
    """
    found = judge(inputs, policy.licence)
    result = {
        "inputs": sorted(set(inputs)),
        "obligations": list(found.obligations),
        "conflicts": list(found.conflicts),
        "unknown": list(found.unknown),
    }
    failed = [*found.conflicts, *(f"{name}: unknown to the table" for name in found.unknown)]
    if not inputs:
        failed.append("no input states a licence")
    return Verdict("licences", not failed, result, policy.licence, "; ".join(failed) or None)


def judge_chain(num_records: int, faults: Sequence[str]) -> Verdict:
    """Every record of the chain is there and every artifact has the bytes its record names.

    Args:
        num_records: Of the chain.
        faults: What was found wrong when all was hashed again.
    """
    result = {"num_records": num_records, "faults": sorted(faults)}
    reason = "; ".join(sorted(faults)) or None
    return Verdict("chain", not faults, result, {"faults": []}, reason)


def judge_clean_code(runs: Mapping[str, Mapping[str, Any]]) -> Verdict:
    """Every stage ran with the code of a commit.

    Args:
        runs: `run.json` of every record by the record's name.
    """
    dirty = sorted(name for name, run in runs.items() if run.get("dirty") is not False)
    commits = {str(run["commit"]) for run in runs.values() if run.get("commit") is not None}
    reason = f"the code of {', '.join(dirty)} was of no commit" if dirty else None
    result = {"dirty": dirty, "commits": sorted(commits)}
    return Verdict("clean_code", not dirty, result, {"dirty": []}, reason)


def judge_health(health: Mapping[str, Mapping[str, Any]], policy: Policy) -> Verdict:
    """Every training run ended in health, by its own thresholds and the policy's.

    Args:
        health: `health.json` of every training stage by the stage's name.
        policy: Its `health` limits hold for each of them.
    """
    failed: list[str] = []
    for stage, one in sorted(health.items()):
        if one.get("passed") is not True:
            failed.append(f"{stage}: {one.get('reason') or 'not passed'}")
        failed.extend(_beyond(stage, one.get("metrics"), policy.health))
    result = {stage: one.get("metrics") for stage, one in sorted(health.items())}
    reason = "; ".join(failed) or None
    return Verdict("training_health", not failed, result, dict(policy.health), reason)


def judge_manifest(verdict: Mapping[str, Any] | None) -> Verdict:
    """The image table passed its own expectations.

    Args:
        verdict: `verdict.json` of the image table; None where the chain has no table.
    """
    if verdict is None:
        return Verdict("manifest_verdict", True, None, None, None)
    expectations = verdict.get("expectations")
    known = [one for one in expectations or () if isinstance(one, Mapping)]
    failed = sorted({str(one.get("name")) for one in known if one.get("passed") is not True})
    passed = verdict.get("passed") is True and not failed
    result = {"rows": verdict.get("rows"), "num_expectations": len(known), "failed": failed}
    reason = None if passed else f"not passed: {', '.join(failed) or 'by its own word'}"
    return Verdict("manifest_verdict", passed, result, {"failed": []}, reason)


def may_be_waived(verdict: Mapping[str, Any], policy: Policy) -> bool:
    """Whether a failed gate can be let through by a waiver.

    Args:
        verdict: Entry of `checks.json`, or `Verdict.as_json()`.
        policy: Names what can be waived; some gates never can.
    """
    name = verdict["name"]
    if name == "licences":
        result = verdict["result"]
        if not isinstance(result, Mapping) or result.get("unknown") or not result.get("inputs"):
            return False
    return name in policy.waivable and name not in NEVER_WAIVED


def _asked_values(
    asked: Threshold, rows: Sequence[Mapping[str, Any]], differences: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, float | None, float]]:
    """What is asked, the low end that was found (None: no such row), the least allowed."""
    name = f"{asked.protocol} {asked.metric}"
    if asked.at_least is not None:
        yield from _lows(name, asked, rows, asked.at_least)
    if asked.difference_low_at_least is not None:
        against = [row for row in differences if row.get("against") == asked.against]
        title = f"{name} against {asked.against}"
        yield from _lows(title, asked, against, asked.difference_low_at_least)


def _lows(
    title: str, asked: Threshold, rows: Sequence[Mapping[str, Any]], least: float
) -> Iterator[tuple[str, float | None, float]]:
    matching = [row for row in rows if asked.asks_of(row)]
    if not matching:
        yield (title if asked.k is None else f"{title} k={asked.k}"), None, least
    for row in matching:
        what = f"{title} k={row['k']}" if "k" in row else title
        yield what, number_of(row, "low"), least


def _beyond(stage: str, metrics: Any, limits: Mapping[str, float]) -> Iterator[str]:
    """Metrics of a stage on the wrong side of a limit; one that is not there is on it too."""
    found = metrics if isinstance(metrics, Mapping) else {}
    for name, limit in sorted(limits.items()):
        kind, metric = name[:3], name[4:]
        value = found.get(metric)
        fits = is_number(value) and (value >= limit if kind == "min" else value <= limit)
        if not fits:
            yield f"{stage}: {metric} is {value}, {kind}imum is {limit}"


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _rows(report: Mapping[str, Any], name: str) -> Sequence[Mapping[str, Any]]:
    rows = report.get(name)
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        msg = f"report: {name}: not a list of rows"
        raise PolicyError(msg)
    return rows
