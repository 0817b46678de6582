"""What changed between two releases: weights, records, settings, figures, images, licences, code.

Everything is read from the records and tables that the two release digests bind.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dinov3.errors import LineageBroken
from dinov3.publish.releases import View, metrics
from dinov3.release.head import Head
from dinov3.release.images import IMAGES_NAME, Images, read_images
from dinov3.release.record import Record
from dinov3.release.refusals import Refused
from dinov3.release.render import visible

Values = Mapping[str, Any]
Pair = tuple[Values, Values]
_MAX_SETTINGS = 20  # of one stage, told one by one
Records = Mapping[str, tuple[str, Record]]


def differences(before: View, after: View, *, every_setting: bool = False) -> Iterator[str]:
    """Lines for a person: one heading a subject, below it what changed, or that nothing did.

    Args:
        before: One release.
        after: Another one.
        every_setting: Also where so many settings of a stage changed that only their number is
            told otherwise: between architectures that is nearly all of them.
    """
    heads, chains = (before.head(), after.head()), (before.records(), after.records())
    subjects: dict[str, Iterator[str]] = {
        "weights": _changes(_pair(_weights, heads)),
        "records": _changes(_pair(_digests, chains)),
        "config": _setting_changes(chains, _MAX_SETTINGS if not every_setting else None),
        "metrics": _changes(_pair(metrics, (before, after))),
        "images": _images(before, after),
        "licences": _changes(_pair(_licences, chains)),
        "licence of the release": _changes(_pair(lambda head: {"licence": head.licence}, heads)),
        "policy": _changes(_pair(lambda head: dict(_flat("", asdict(head.policy))), heads)),
        "code": _at_once(_pair(lambda chain: _each(chain, "code"), chains)),
        "environment": _at_once(_pair(lambda chain: _each(chain, "environment"), chains)),
    }
    yield f"{before.entry.name} -> {after.entry.name}"
    for title, lines in subjects.items():
        yield from _section(title, lines)


def _section(title: str, lines: Iterator[str]) -> Iterator[str]:
    found = list(lines)
    yield f"{title}:" if found else f"{title}: unchanged"
    yield from (f"  {line}" for line in found)


def _changes(pair: Pair) -> Iterator[str]:
    """Names of one side only, and those whose values differ."""
    before, after = pair
    for name in [*before, *(name for name in after if name not in before)]:
        word = visible(name)
        if name not in before:
            yield f"+ {word}: {visible(str(after[name]))}"
        elif name not in after:
            yield f"- {word}: {visible(str(before[name]))}"
        elif before[name] != after[name]:
            yield f"~ {word}: {visible(str(before[name]))} -> {visible(str(after[name]))}"


def _at_once(pair: Pair) -> Iterator[str]:
    """As `_changes`, in one line where all records changed alike, as code does."""
    sides = [set(values.values()) for values in pair]
    if all(len(side) == 1 for side in sides):
        before, after = (side.pop() for side in sides)
        yield from _changes(({"all records": before}, {"all records": after}))
    else:
        yield from _changes(pair)


def _pair(read: Callable[[Any], Values], sides: tuple[Any, Any]) -> Pair:
    before, after = sides
    return read(before), read(after)


def _weights(head: Head) -> Values:
    return {name: digest[:16] for name, digest in head.tensors.items()}


def _digests(chain: Records) -> Values:
    return {stage: digest[:12] for stage, (digest, _) in chain.items()}


def _setting_changes(chains: tuple[Any, Any], limit: int | None) -> Iterator[str]:
    """Stage by stage; of more changes than the limit only their number."""
    before, after = chains
    for stage in [*before, *(stage for stage in after if stage not in before)]:
        lines = list(_changes((_settings(stage, before), _settings(stage, after))))
        if limit is None or len(lines) <= limit:
            yield from lines
            continue
        signs = {sign: sum(line[0] == sign for line in lines) for sign in "~+-"}
        counts = f"{signs['~']} changed, {signs['+']} added, {signs['-']} removed"
        yield f"~ {visible(stage)}: {len(lines)} settings: {counts}; --all lists them"


def _settings(stage: str, chain: Records) -> Values:
    if stage not in chain:
        return {}
    return {f"{stage} {name}": value for name, value in _flat("", chain[stage][1].config)}


def _licences(chain: Records) -> Values:
    return {
        stage: ", ".join(record.licences.get("out", ())) or "none"
        for stage, (_, record) in chain.items()
    }


def _each(chain: Records, field: str) -> Values:
    """A digest that every record holds, in short."""
    return {stage: getattr(record, field)[:12] for stage, (_, record) in chain.items()}


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """`a.b.c` -> value for every leaf of nested settings."""
    if isinstance(value, Mapping) and value:
        for name, one in value.items():
            yield from _flat(f"{prefix}.{name}" if prefix else str(name), one)
    else:
        yield prefix, value


def _images(before: View, after: View) -> Iterator[str]:
    """Rows of images added and removed, by role: one pass over both sorted tables."""
    held = [IMAGES_NAME in view.hashes for view in (before, after)]
    if not all(held):
        if any(held):
            yield "only one of the two has a table of images"
        return
    if before.hashes[IMAGES_NAME] == after.hashes[IMAGES_NAME]:
        return
    with tempfile.TemporaryDirectory() as scratch:
        old = before.copy(IMAGES_NAME, Path(scratch) / "before.bin")
        new = after.copy(IMAGES_NAME, Path(scratch) / "after.bin")
        try:
            with read_images(old) as first, read_images(new) as second:
                if first.salt_sha256 != second.salt_sha256:
                    yield "keyed with different salts: not comparable"
                    return
                yield from _rows(first, second)
        except Refused as error:
            msg = f"{IMAGES_NAME}: {error}. Do not use this release."
            raise LineageBroken(msg) from error


def _rows(before: Images, after: Images) -> Iterator[str]:
    removed: dict[str, int] = {}
    added: dict[str, int] = {}
    left, right = iter(before), iter(after)
    one, other = next(left, None), next(right, None)
    while one is not None or other is not None:
        if other is None or (one is not None and one < other):
            _count(removed, before.roles[one[1]] if one else "")
            one = next(left, None)
        elif one is None or other < one:
            _count(added, after.roles[other[1]])
            other = next(right, None)
        else:
            one, other = next(left, None), next(right, None)
    for role in sorted(added.keys() | removed.keys()):
        yield f"{visible(role)}: +{added.get(role, 0)} -{removed.get(role, 0)}"


def _count(counts: dict[str, int], role: str) -> None:
    counts[role] = counts.get(role, 0) + 1
