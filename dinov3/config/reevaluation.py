"""Recipe of re-evaluation: which protocols, how far each metric may fall, and whom to tell."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dinov3.config.base import InferenceRun, Positive, Section, require

Fall = Annotated[float, Field(ge=0, le=1)]
Word = Annotated[str, Field(min_length=1)]


class AlertConfig(Section):
    """Whom to tell of a regression; with both null nobody is told."""

    command: Annotated[tuple[Word, ...], Field(min_length=1)] | None  # reads the finding on stdin
    webhook: Word | None  # URL that gets it by POST, or env:NAME of a variable that holds the URL
    timeout: Positive  # seconds that either may take


class ReevaluationRun(InferenceRun):
    """What cannot change the figures."""

    alert: AlertConfig


class ReevaluationConfig(Section):
    """`reevaluate`: released weights judged again, each metric against its released value.

    The settings of the protocols are those of the release's own evaluation: other settings would
    give figures that cannot be compared.
    """

    phase: Literal["reevaluation"]
    protocols: dict[str, dict[str, Fall] | None]  # protocol -> metric -> allowed fall; null: not it
    run: ReevaluationRun

    @property
    def tolerances(self) -> dict[tuple[str, str], float]:
        """How far below its released value a metric may be, by protocol and metric."""
        return {
            (protocol, metric): fall
            for protocol, metrics in self.protocols.items()
            for metric, fall in (metrics or {}).items()
        }

    @model_validator(mode="after")
    def _something_is_judged(self) -> Self:
        require(
            bool(self.tolerances),
            f"protocols: no metric has a tolerance, got {self.protocols}. Give one at least.",
        )
        return self
