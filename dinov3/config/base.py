"""What all parts of a recipe share: number types, the frozen section, dump and digest."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from dinov3.release.record import digest_of


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise PydanticCustomError("unordered", "The first must not be above the second")
    return pair


def require(holds: bool, message: str) -> None:
    """Refuses a tree whose parts contradict each other."""
    if not holds:
        raise ValueError(message)


Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Steps = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Channel = Annotated[int, Field(ge=0, le=255)]
Colour = tuple[Channel, Channel, Channel]
Ordered = AfterValidator(_ordered)
ScaleRange = Annotated[tuple[PositiveFraction, PositiveFraction], Ordered]


class Section(BaseModel):
    """Base of every part of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class InferenceRun(Section):
    """What cannot change features of a frozen model, nor figures about them."""

    batch_size: Count
    device: str
    threads: Count | None  # None: as many as each library chooses


def dump(config: Section) -> dict[str, Any]:
    """The resolved tree as JSON values, without `run`: what determines the result."""
    return config.model_dump(mode="json", exclude={"run"})


def config_digest(config: Section) -> str:
    """sha256 of the resolved tree without `run`."""
    return digest_of(dump(config))
