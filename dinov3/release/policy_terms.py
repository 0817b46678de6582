"""The policy of a release: what its gates ask, as data.

A policy is plain JSON, kept whole in `release.json`:

    {"evaluation": [{"protocol": "k-NN", "metric": "top-1", "subject": "model", "k": 20,
                     "at_least": 0.3, "against": "random init", "difference_low_at_least": 0.0}],
     "max_relative_threshold": 0.977, "max_self_threshold": 0.985, "licence": "GPL-2.0-only",
     "health": {"max_mean_cosine": 0.98, "min_participation_ratio": 2.0},
     "waivable": ["evaluation"]}

`at_least` is asked of the low end of the row's interval, `difference_low_at_least` of the low end
of the difference to `against`. Without `k` every row of that protocol and metric must hold. A
threshold of deduplication is a cosine above which pictures count as alike: lower removes more.
What could never refuse anything is no policy: a threshold out of its range, none on the model.
"""

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

GATES = (
    "chain",
    "clean_code",
    "training_health",
    "manifest_verdict",
    "evaluation",
    "contamination",
    "licences",
)
NEVER_WAIVED = frozenset({"chain", "contamination"})
NO_WEIGHTS = frozenset(  # roles of roots that nothing was trained by
    {
        *("source", "captions", "backgrounds", "embedder"),
        *("pictures", "training pictures", "test pictures"),
    }
)
MODEL = "model"  # the subject of an evaluation that is not a baseline

_KEYS = {
    "evaluation",
    "max_relative_threshold",
    "max_self_threshold",
    "licence",
    "health",
    "waivable",
}
_MOST_THRESHOLDS = 1000  # each is held against every row
_THRESHOLD_TEXTS = {"protocol", "metric", "subject", "against"}
_THRESHOLD_NUMBERS = {"k", "at_least", "difference_low_at_least"}


class PolicyError(ValueError):
    """A policy, or what it is applied to, lacks a field or holds one of the wrong kind."""


@dataclass(frozen=True)
class Threshold:
    """One demand on an evaluation; the module's docstring names the fields."""

    protocol: str
    metric: str
    subject: str = MODEL
    k: int | None = None
    at_least: float | None = None
    against: str | None = None
    difference_low_at_least: float | None = None

    def asks_of(self, row: Mapping[str, Any]) -> bool:
        """Whether a row of a report is one this demand speaks of."""
        same = all(
            row.get(name) == getattr(self, name) for name in ("protocol", "metric", "subject")
        )
        return same and (self.k is None or row.get("k") == self.k)


@dataclass(frozen=True)
class Policy:
    """The resolved policy of one release."""

    evaluation: tuple[Threshold, ...]
    max_relative_threshold: float
    max_self_threshold: float
    licence: str
    health: Mapping[str, float] = field(default_factory=dict)
    waivable: frozenset[str] = frozenset()


def read_policy(raw: Any) -> Policy:
    """The policy from its JSON.

    Raises:
        PolicyError: A field is missing, unknown, of the wrong kind, or can refuse nothing.
    """
    if not isinstance(raw, Mapping) or raw.keys() != _KEYS:
        found = sorted(map(str, raw)) if isinstance(raw, Mapping) else type(raw).__name__
        msg = f"policy: needs exactly the fields {sorted(_KEYS)}, got {found}"
        raise PolicyError(msg)
    asked = raw["evaluation"]
    if not isinstance(asked, Sequence) or isinstance(asked, str) or len(asked) > _MOST_THRESHOLDS:
        shown = reprlib.repr(asked)
        msg = f"policy: evaluation: not a list of at most {_MOST_THRESHOLDS}, got {shown}"
        raise PolicyError(msg)
    health = raw["health"]
    if not isinstance(health, Mapping) or not all(is_number(one) for one in health.values()):
        msg = f"policy: health: not an object of numbers, got {health!r}"
        raise PolicyError(msg)
    if odd := [name for name in health if not str(name).startswith(("min_", "max_"))]:
        msg = f"policy: health: names start with min_ or max_, got {odd[0]!r}"
        raise PolicyError(msg)
    evaluation = tuple(_read_threshold(one) for one in asked)
    if all(one.subject != MODEL for one in evaluation):
        msg = f"policy: evaluation: asks nothing of the model, got {asked!r}"
        raise PolicyError(msg)
    return Policy(
        evaluation=evaluation,
        max_relative_threshold=_cosine(raw, "max_relative_threshold"),
        max_self_threshold=_cosine(raw, "max_self_threshold"),
        licence=_text(raw, "licence"),
        health=dict(health),
        waivable=_read_waivable(raw["waivable"]),
    )


def _read_threshold(raw: Any) -> Threshold:
    if not isinstance(raw, Mapping):
        msg = f"policy: evaluation: not an object, got {raw!r}"
        raise PolicyError(msg)
    for name, value in raw.items():
        fits = isinstance(value, str) if name in _THRESHOLD_TEXTS else is_number(value)
        if name not in _THRESHOLD_TEXTS | _THRESHOLD_NUMBERS or not fits:
            msg = f"policy: evaluation: unknown field or wrong kind, got {name}={value!r}"
            raise PolicyError(msg)
    given = Threshold(**{"protocol": "", "metric": "", **raw})
    asks = given.at_least is not None or given.difference_low_at_least is not None
    paired = (given.against is None) == (given.difference_low_at_least is None)
    if not given.protocol or not given.metric or not asks or not paired:
        msg = f"policy: evaluation: asks for nothing, or half of a difference, got {dict(raw)!r}"
        raise PolicyError(msg)
    for name, least in (("at_least", 0.0), ("difference_low_at_least", -1.0)):
        value = getattr(given, name)
        if value is not None and not least <= value <= 1:
            msg = f"policy: evaluation: {name}: from {least:g} to 1, got {value!r}"
            raise PolicyError(msg)
    return given


def policy_text(policy: Policy) -> str:
    """The thresholds in words, for whoever has to judge whether they ask enough."""
    asked = []
    for one in policy.evaluation:
        of_whom = "" if one.subject == MODEL else f" of {one.subject}"
        what = f"{one.protocol} {one.metric}{of_whom}" + ("" if one.k is None else f" k={one.k}")
        if one.at_least is not None:
            asked.append(f"{what} at least {one.at_least:g}")
        if one.difference_low_at_least is not None:
            asked.append(f"{what} over {one.against} at least {one.difference_low_at_least:g}")
    asked += [f"health {name} {limit:g}" for name, limit in sorted(policy.health.items())]
    asked.append(f"duplicates above {policy.max_relative_threshold:g} of held-out pictures and")
    return "; ".join(asked) + f" {policy.max_self_threshold:g} among trained ones left out"


def threshold_json(asked: Threshold) -> dict[str, Any]:
    """The demand as it stands in a policy."""
    names = (*sorted(_THRESHOLD_TEXTS), *sorted(_THRESHOLD_NUMBERS))
    return {name: getattr(asked, name) for name in names if getattr(asked, name) is not None}


def _read_waivable(raw: Any) -> frozenset[str]:
    names = frozenset(raw) if isinstance(raw, list) and all(map(_is_text, raw)) else None
    if names is None or not names <= set(GATES) - NEVER_WAIVED:
        can_be = ", ".join(name for name in GATES if name not in NEVER_WAIVED)
        msg = f"policy: waivable: not a list of gates that can be waived ({can_be}), got {raw!r}"
        raise PolicyError(msg)
    return names


def _text(raw: Mapping[str, Any], name: str) -> str:
    if not _is_text(raw[name]) or not raw[name]:
        msg = f"policy: {name}: not a text, got {raw[name]!r}"
        raise PolicyError(msg)
    return str(raw[name])


def number_of(raw: Mapping[str, Any], name: str) -> float:
    """The finite number of a field.

    Raises:
        PolicyError: It is none.
    """
    value = raw.get(name)
    if not is_number(value):
        msg = f"{name}: not a finite number, got {value!r}"
        raise PolicyError(msg)
    return float(value)


def _cosine(raw: Mapping[str, Any], name: str) -> float:
    value = number_of(raw, name)
    if not 0 < value <= 1:
        msg = f"policy: {name}: a cosine above 0, at most 1, got {value!r}"
        raise PolicyError(msg)
    return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a JSON value is a finite number of a size that floats can hold."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
