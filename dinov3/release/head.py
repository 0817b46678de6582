"""`release.json`: what a release says of itself, field by field."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dinov3.release.contents import (
    HEADS_NAME,
    MODEL_NAME,
    RELEASE_NAME,
    Contents,
    check_schema,
)
from dinov3.release.licences import normal_form
from dinov3.release.policy_terms import Policy, PolicyError, read_policy
from dinov3.release.record import digest_of
from dinov3.release.refusals import Refused
from dinov3.release.spdx import LicenceError

SCHEMA = "dinov3.release/1"
LISTED, UNKNOWN = "listed", "unknown"  # training data of a root
PLAIN, KEYED, DIGEST_ONLY = "plain", "keyed", "digest"  # how images.bin goes along

_MAX_RECORDS = 1000
_HEX = re.compile(r"[0-9a-f]{64}")
_MODEL = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_VERSION = re.compile(r"(0|[1-9][0-9]{0,8})(\.(0|[1-9][0-9]{0,8})){2}")
_STAGE = re.compile(r"[a-z0-9][a-z0-9_]{0,79}")


@dataclass(frozen=True)
class Root:
    """Something outside the graph that a record of the chain read."""

    role: str
    name: str
    sha256: str
    licences: tuple[str, ...]
    training_data: str


@dataclass(frozen=True)
class ImageList:
    """What is said of `images.bin`: `mode` plain, keyed or digest alone."""

    mode: str
    sha256: str
    num_trained: int
    num_evaluated: int


@dataclass(frozen=True)
class Head:
    """The content of `release.json`."""

    model: str
    version: str
    final: str
    evaluation: str
    records: tuple[tuple[str, str], ...]
    roots: tuple[Root, ...]
    previous: str | None
    policy: Policy
    licence: str
    tensors: Mapping[str, str]
    images: ImageList | None

    @property
    def name(self) -> str:
        """`MODEL@VERSION`."""
        return f"{self.model}@{self.version}"


def read_head(contents: Contents) -> Head:
    """Reads `release.json`.

    Raises:
        Refused: `release-malformed`, `schema-unknown`, `json-malformed` or `file-missing`.
        CannotCheck: Its schema is newer.
    """
    raw = contents.read_object(RELEASE_NAME)
    check_schema(raw.get("schema"), SCHEMA, RELEASE_NAME)
    _check_fields(raw, _FIELDS, "release")
    if raw["policy_digest"] != digest_of(raw["policy"]):
        raise _malformed("policy_digest is not the digest of its policy")
    try:
        policy = read_policy(raw["policy"])
    except PolicyError as error:
        raise _malformed(str(error)) from error
    if raw["licence"] not in (policy.licence, _normal(policy.licence)):
        raise _malformed("the policy names another licence than the release")
    images = raw["images"]
    return Head(
        model=raw["model"],
        version=raw["version"],
        final=raw["final"],
        evaluation=raw["evaluation"],
        records=tuple((stage, digest) for stage, digest in raw["records"]),
        roots=tuple(_read_root(one) for one in raw["roots"]),
        previous=raw["previous"],
        policy=policy,
        licence=raw["licence"],
        tensors=raw["tensors"],
        images=None if images is None else _read_images(images),
    )


def _read_root(raw: Any) -> Root:
    _check_fields(raw, _ROOT, "root")
    return Root(**{**raw, "licences": tuple(raw["licences"])})


def _read_images(raw: Any) -> ImageList:
    _check_fields(raw, _IMAGES, "images")
    return ImageList(**raw)


def _normal(licence: str) -> str | None:
    try:
        return normal_form(licence)
    except LicenceError:  # the licences' gate names it
        return None


def _check_fields(raw: Any, fields: Mapping[str, Callable[[Any], bool]], what: str) -> None:
    if not isinstance(raw, dict) or raw.keys() != fields.keys():
        raise _malformed(f"{what} has not exactly the fields {', '.join(fields)}")
    for name, fits in fields.items():
        if not fits(raw[name]):
            raise _malformed(f"{what}: {name} is of the wrong kind")


def _malformed(why: str) -> Refused:
    return Refused("release-malformed", RELEASE_NAME, why)


def _matches(pattern: re.Pattern[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


_is_digest = _matches(_HEX)


def _is_digest_or_none(value: Any) -> bool:
    return value is None or _is_digest(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_object_or_none(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_stages(value: Any) -> bool:
    if not isinstance(value, list) or len(value) > _MAX_RECORDS:
        return False
    return all(
        isinstance(one, list)
        and len(one) == 2
        and isinstance(one[0], str)
        and _STAGE.fullmatch(one[0]) is not None
        and _is_digest(one[1])
        for one in value
    )


def _is_tensors(value: Any) -> bool:
    known = isinstance(value, dict) and {MODEL_NAME} <= value.keys() <= {MODEL_NAME, HEADS_NAME}
    return known and all(_is_digest(one) for one in value.values())


def _is_among(*words: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in words


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "schema": _is_text,
    "model": _matches(_MODEL),
    "version": _matches(_VERSION),
    "final": _is_digest,
    "evaluation": _is_digest,
    "records": _is_stages,
    "roots": _is_list,
    "previous": _is_digest_or_none,
    "policy": _is_object,
    "policy_digest": _is_digest,
    "licence": _is_text,
    "tensors": _is_tensors,
    "images": _is_object_or_none,
}
_ROOT: dict[str, Callable[[Any], bool]] = {
    "role": _is_text,
    "name": _is_text,
    "sha256": _is_digest,
    "licences": _is_texts,
    "training_data": _is_among(LISTED, UNKNOWN),
}
_IMAGES: dict[str, Callable[[Any], bool]] = {
    "mode": _is_among(PLAIN, KEYED, DIGEST_ONLY),
    "sha256": _is_digest,
    "num_trained": _is_count,
    "num_evaluated": _is_count,
}
