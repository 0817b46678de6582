"""Configs of networks from mappings: what is unknown, missing or impossible is refused by name."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from dinov3.errors import ConfigError

C = TypeVar("C")


def config_of(kind: type[C], fields: Mapping[str, Any], owner: str) -> C:
    """The dataclass `kind` with these fields, such as those of a config.json.

    Args:
        kind: Checks its values on construction.
        fields: By name.
        owner: What the fields describe, for messages: a ConvNeXt, a text tower.

    Raises:
        ConfigError: A field is unknown, with the nearest known one named, missing, or of another
            type.
    """
    check_fields(kind, fields, owner)
    try:
        return kind(**fields)
    except TypeError as error:
        msg = f"model: {error}, got {dict(fields)}. Correct the field."
        raise ConfigError(msg) from error


def check_fields(kind: type, fields: Mapping[str, Any], owner: str) -> None:
    """Refuse names that are no fields of the dataclass `kind`, and missing ones.

    Raises:
        ConfigError: A field is unknown, with the nearest known one named, or missing.
    """
    known = {field.name: field for field in dataclasses.fields(kind)}
    for name, value in fields.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Use {', '.join(known)}."
            msg = f"{name}: no such field of {owner}, got {value!r}. {hint}"
            raise ConfigError(msg)
    for name, field in known.items():
        if field.default is dataclasses.MISSING and name not in fields:
            msg = f"{name}: missing from {owner}, got {', '.join(fields) or 'nothing'}. Set {name}."
            raise ConfigError(msg)


def require(holds: bool, name: str, rule: str, value: object) -> None:
    """Refuse a value of a config.

    Raises:
        ConfigError: `holds` is false.
    """
    if not holds:
        msg = f"{name}: {rule}, got {value!r}. Change {name}."
        raise ConfigError(msg)
