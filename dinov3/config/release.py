"""Recipe of a release: what its gates ask, under which licence it goes out, what its card says."""

from typing import Any, Literal, Self

from pydantic import model_validator

from dinov3.config.base import Count, Positive, Section, require

Waivable = Literal["clean_code", "training_health", "manifest_verdict", "evaluation", "licences"]


class ThresholdConfig(Section):
    """What a row of the evaluation report must reach with the low end of its interval.

    Without `k` every row of that protocol and metric must.
    """

    protocol: str
    metric: str
    subject: str | None = None  # the model
    k: Count | None = None  # of k-NN
    at_least: float | None = None
    against: str | None = None  # a baseline; with it goes
    difference_low_at_least: float | None = None

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        difference = self.difference_low_at_least is not None
        require(
            difference == (self.against is not None),
            f"evaluation: against and difference_low_at_least go together, got "
            f"{self.against!r} and {self.difference_low_at_least}. Set both or none.",
        )
        require(
            difference or self.at_least is not None,
            f"evaluation: asks nothing of {self.protocol} {self.metric}, got neither at_least nor "
            "difference_low_at_least. Set one.",
        )
        return self


class PolicyConfig(Section):
    """What a release is refused by, before signing and by whoever verifies it."""

    licence: str  # SPDX expression that the release goes out under
    evaluation: tuple[ThresholdConfig, ...]
    max_relative_threshold: Positive  # of deduplication against held-out images, a cosine
    max_self_threshold: Positive  # among training images
    health: dict[str, float]  # min_… or max_… of a metric of every health.json
    waivable: tuple[Waivable, ...]  # gates that a waiver may let through

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        require(
            len(self.evaluation) > 0,
            "policy.evaluation: no threshold, got an empty list. Ask for at least one row.",
        )
        return self


class CardConfig(Section):
    """What only a person can say on the model card: plain text, escaped where it is shown."""

    summary: str
    intended_uses: tuple[str, ...]
    limitations: tuple[str, ...]


class ReleaseConfig(Section):
    """`release_*`: policy and card."""

    phase: Literal["release"]
    images: Literal["plain", "keyed", "digest"]  # how the list of images goes along
    policy: PolicyConfig
    card: CardConfig


def resolved_policy(config: ReleaseConfig) -> dict[str, Any]:
    """The policy as `release.json` carries it; what is not asked is left out."""
    policy: dict[str, Any] = config.policy.model_dump(mode="json", exclude_none=True)
    return policy
