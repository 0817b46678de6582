"""From the roots down: which artifacts and releases used a file, a picture, a licence, a version.

    dinov3 lineage data/curated_dataset/curated.parquet --reverse
    dinov3 lineage torch==2.15.0 --reverse --store directory:.dinov3/store

Records name what they read by digest, so their users are found without any of the bytes.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinov3.release.binding import REPORT_NAME
from dinov3.release.checks import Node
from dinov3.release.environments import LOCK_NAME, PINNED, is_version, versions_of
from dinov3.release.index import Index, Released
from dinov3.release.licences import identifiers
from dinov3.release.pictures import find_picture
from dinov3.release.record import RECORD_NAME, RecordError, file_sha256
from dinov3.release.refusals import CannotCheck, Refused
from dinov3.release.spdx import LicenceError
from dinov3.release.targets import (
    DIGEST,
    Answer,
    LineageError,
    hash_target,
    matches,
    names,
)
from dinov3.release.trace import Findings

TRAINED, EVALUATED = "trained", "evaluated"  # roles of a picture, in the words of images.bin
HELD_OUT = "held out for evaluation"  # the same in those of curated.parquet

_LICENCE_WORDS = re.compile(r"[^\s()]+")
_WHOLE = 64  # digits of a digest that is not shortened


@dataclass
class Users:
    """Who used the target.

    Attributes:
        how: In words, by the record of the user.
        asked: Records that are the target itself, or wrote it.
        roles: Of a picture, by release digest; None where the target is none.
        held: What the target is in releases that hold it, by release digest.
        answers: What the target is.
    """

    how: dict[str, str] = field(default_factory=dict)
    asked: set[str] = field(default_factory=set)
    roles: dict[str, tuple[str, ...]] | None = None
    held: dict[str, str] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)

    @property
    def is_known(self) -> bool:
        """Whether anything here names the target."""
        return bool(self.how or self.asked or self.held or self.answers)

    def release_uses(self, release: Released) -> str | None:
        """How a release used the target; None where it did not."""
        if self.roles is not None:  # of a picture its own list tells
            return ", ".join(self.roles.get(release.digest, ())) or None
        if release.digest in self.held:
            return self.held[release.digest]
        if release.head.final in self.asked:
            return "its weights are of that record"
        weights = release.by_digest[release.head.final]
        for node in (*weights, *reversed(release.nodes)):
            if node.digest in self.how:
                return f"{node.record.stage} {self.how[node.digest]}"
        return None


def find_users(target: str, root: Path, index: Index) -> Findings:
    """Which records and releases used a target; what could not tell is named as unchecked."""
    findings = Findings(target, wrong=index.wrong, unchecked=index.unchecked, is_reverse=True)
    findings.note = "Told by records, which name what they read by digest; no artifact was hashed."
    try:
        users = _Search(root, index, findings).users_of(target)
    except (RecordError, Refused) as error:
        findings.wrong.append(str(error))
        return findings
    except (LineageError, CannotCheck, OSError) as error:
        findings.unchecked.append(str(error))
        return findings
    nodes = index.everywhere()
    findings.releases = [one for one in index.releases if users.release_uses(one) is not None]
    findings.answers = [*users.answers, *_describe(users, findings.releases, nodes)]
    shown = users.asked | users.how.keys()
    findings.chain = [
        (int(digest in users.how), nodes[digest]) for digest in nodes if digest in shown
    ]
    return findings


@dataclass
class _Search:
    """One question to everything that was found."""

    root: Path
    index: Index
    findings: Findings

    def users_of(self, target: str) -> Users:
        """By what the target is: a path, a digest, `name==version`, a release, a root, a licence.

        Raises:
            LineageError: Nothing names it.
        """
        users = self._users_of(target)
        if not users.is_known and not self.findings.unchecked:
            msg = (
                f"{target}: no record below {self.root} names it. Give a path, a digest, "
                "MODEL@VERSION, the name of a source, a licence, NAME==VERSION, or --root."
            )
            raise LineageError(msg)
        return users

    def _users_of(self, target: str) -> Users:
        path = Path(target)
        if path.exists():
            return self._of_digests(self._digests_of(path))
        if DIGEST.fullmatch(target):
            finals = [
                one.head.final for one in self.index.releases if one.digest.startswith(target)
            ]
            return self._of_digests([target, *finals])
        if pinned := PINNED.fullmatch(target):
            return self._of_version(pinned[1], pinned[2])
        if named := [one.head.final for one in self.index.releases if one.name == target]:
            return self._of_digests(named)
        nodes = self.index.everywhere()
        users = Users(follow(nodes, (), _roots_named(target, nodes)))
        for node in nodes.values():
            if _has_licence(node, target):
                users.how.setdefault(node.digest, "has the licence")
        for release in self.index.releases:
            if _names_licence(release.head.licence, target):
                users.held[release.digest] = "is given out under the licence"
        return users

    def _digests_of(self, path: Path) -> list[str]:
        """What names a path: its bytes and tensors, its record, or the weights of a release."""
        if not path.is_dir():
            found = hash_target(path)
            return [one for one in (found.sha256, found.tensors) if one is not None]
        if (path / RECORD_NAME).is_file():
            return [file_sha256(path / RECORD_NAME)]
        release = self.index.add_release(path)
        return [] if release is None else [release.head.final]

    def _of_digests(self, digests: list[str]) -> Users:
        """Users of a record, of one file of it, of a root, of an environment; else of a picture."""
        nodes = self.index.everywhere()
        users = Users(asked={one for one in nodes if _begins(one, digests)})
        files = {sha256 for node in nodes.values() for sha256 in _files(node, digests)}
        users.how = follow(nodes, users.asked, files)
        for release in () if users.asked else self.index.releases:
            if (match := next(matches(release, digests), None)) is not None:
                users.held[release.digest] = match
        for digest, node in nodes.items():
            if {node.record.environment, node.record.code} & set(digests):
                users.how[digest] = "ran in it"
        if not users.asked:
            users.asked = {
                key for key, node in nodes.items() if any(names(node, one) for one in digests)
            }
            users.answers = [
                Answer(f"written by {nodes[key].record.stage}", {"record": key})
                for key in sorted(users.asked)
            ]
        if not users.is_known and digests and len(digests[0]) == _WHOLE:
            return self._of_picture(digests[0])
        return users

    def _of_picture(self, digest: str) -> Users:
        """A picture is used where it was trained or evaluated on; elsewhere it was left out."""
        seen = find_picture(bytes.fromhex(digest), self.index)
        self.findings.wrong.extend(seen.wrong)
        self.findings.unchecked.extend([*seen.unchecked, *seen.silent])
        nodes = self.index.everywhere()
        users = Users(roles=seen.roles)
        users.answers = [
            Answer(one.title, one.facts, "withdrawn" in one.facts) for one in seen.found
        ]
        for one in seen.found:
            users.asked.add(one.node.digest)
            roles = _roles(one.facts)
            for user, how in follow(nodes, [one.node.digest], ()).items():
                is_report = REPORT_NAME in nodes[user].record.outputs
                if TRAINED in roles or (EVALUATED in roles and is_report):
                    users.how[user] = how
        return users

    def _of_version(self, package: str, wanted: str) -> Users:
        versions = versions_of(package, self.root, self.index)
        for lock, count in sorted(versions.silent.items()):
            self.findings.unchecked.append(
                f"environment {lock[:16]} of {count} records: neither run.json nor a {LOCK_NAME} "
                f"here tells its version of {package}"
            )
        users = Users()
        for digest, version in versions.told.items():
            if is_version(version, wanted):
                users.how[digest] = f"ran with {package} {version}"
        if versions.told:
            counts = Counter(versions.told.values())
            facts = {version: f"{count} records" for version, count in sorted(counts.items())}
            users.answers.append(Answer(f"versions of {package}", facts))
        return users


def follow(
    nodes: Mapping[str, Node], records: Collection[str], files: Collection[str]
) -> dict[str, str]:
    """Record -> how it used any of some records or files: itself, or through another record."""
    how: dict[str, str] = {}
    below: dict[str, list[Node]] = {}
    for node in nodes.values():
        for edge in node.record.inputs:
            below.setdefault(str(edge.record), []).append(node)
            if edge.record in records or edge.sha256 in files:
                how.setdefault(node.digest, f"read {edge.name} as {edge.role}")
    pending = list(how)
    while pending:
        digest = pending.pop()
        for node in below.get(digest, ()):
            if node.digest not in how:
                how[node.digest] = f"through {nodes[digest].record.stage}"
                pending.append(node.digest)
    return how


def _roles(facts: Mapping[str, Any]) -> list[str]:
    """The roles that images.bin tells, or the table of a dataset made without one."""
    if facts.get("kept") is True:
        return [TRAINED]
    if facts.get("left out because") == HELD_OUT:
        return [EVALUATED]
    return str(facts.get("role", "")).split(", ")


def _begins(digest: str, wanted: Collection[str]) -> bool:
    return any(digest.startswith(one) for one in wanted)


def _files(node: Node, wanted: Collection[str]) -> Iterator[str]:
    """sha256 of the files a record read or wrote that are wanted, by bytes or by tensors."""
    for output in node.record.outputs.values():
        if _begins(output.sha256, wanted) or _begins(output.tensors or "", wanted):
            yield output.sha256
    for edge in node.record.inputs:
        if _begins(edge.sha256, wanted):
            yield edge.sha256


def _roots_named(name: str, nodes: Mapping[str, Node]) -> set[str]:
    """sha256 of what enters from outside under a name, such as a source of pictures."""
    edges = (edge for node in nodes.values() for edge in node.record.inputs)
    return {edge.sha256 for edge in edges if edge.record is None and edge.name == name}


def _has_licence(node: Node, licence: str) -> bool:
    """Whether a record carries a licence, alone or within an expression."""
    texts = {text for side in node.record.licences.values() for text in side}
    return any(_names_licence(text, licence) for text in texts)


def _names_licence(text: str, licence: str) -> bool:
    """By the very words, or by another spelling of the same licence, such as GPL-2.0+."""
    if licence == text or licence in _LICENCE_WORDS.findall(text):
        return True
    try:
        asked = identifiers(licence)
        return len(asked) == 1 and asked <= identifiers(text)
    except LicenceError:
        return False


def _describe(
    users: Users, releases: Collection[Released], nodes: Mapping[str, Node]
) -> Iterator[Answer]:
    """An answer for each user: artifacts, then releases, withdrawn ones marked."""
    for digest, how in users.how.items():
        node = nodes[digest]
        facts: dict[str, Any] = {"how": how, "record": digest, "where": str(node.folder)}
        yield Answer(f"used by {node.record.stage}", facts)
    for release in releases:
        facts = {
            "how": users.release_uses(release),
            "release digest": release.digest,
            "where": release.where,
            "signature": release.signature,
            "withdrawn": release.withdrawn,
        }
        kind = "release" if release.is_signed else "unsigned release"
        yield Answer(f"used by {kind} {release.name}", facts, release.withdrawn is not None)
    if not users.how and not releases:
        yield Answer("used by nothing that is known here")
