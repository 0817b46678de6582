"""A release before it is written: what its files are made of."""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dinov3.config import ReleaseConfig
from dinov3.gates import Evidence, count_images, weights_name
from dinov3.release.checks import Node
from dinov3.release.contents import CONFIG_NAME
from dinov3.release.images import IMAGES_NAME
from dinov3.release.policy import ImageCounts
from dinov3.release.record import RUN_NAME, parse_json


@dataclass(frozen=True)
class Draft:
    """What went through the gates.

    Attributes:
        model: Name of the model.
        version: MAJOR.MINOR.PATCH.
        recipe: Name of the recipe of the release.
        overrides: Laid over it.
        config: The resolved recipe.
        policy: Its policy as JSON.
        evidence: The chain.
        report: Content of the evaluation's `report.json`.
        checks: Content of `checks.json`.
        previous: Digest of the release before; None for the first.
        salt: Keys the list of images; None leaves it plain.
    """

    model: str
    version: str
    recipe: str
    overrides: tuple[str, ...]
    config: ReleaseConfig
    policy: Mapping[str, Any]
    evidence: Evidence
    report: Mapping[str, Any]
    checks: Mapping[str, Any]
    previous: str | None = None
    salt: bytes | None = None

    @property
    def name(self) -> str:
        """`MODEL@VERSION`."""
        return f"{self.model}@{self.version}"

    @property
    def licence(self) -> str:
        """Of the release, an SPDX expression."""
        return str(self.policy["licence"])

    @property
    def weights(self) -> str:
        """The file of weights in its stage's folder."""
        name = weights_name(self.evidence.final)
        if name is None:  # the evaluation's gate asks for it
            msg = "release: its final record names no weights"
            raise ValueError(msg)
        return name

    @cached_property
    def curated(self) -> Node | None:
        """The stage that wrote the list of images; None below outside weights alone."""
        return next(iter(self.evidence.writers_of(IMAGES_NAME)), None)

    @cached_property
    def images(self) -> ImageCounts | None:
        """How many images were trained and evaluated on; None where nobody knows."""
        return None if self.curated is None else count_images(self.curated)

    @cached_property
    def network(self) -> dict[str, Any]:
        """Fields of the network, from the config beside the weights."""
        config = parse_json((self.evidence.final.folder / CONFIG_NAME).read_bytes())
        fields: dict[str, Any] = config["model"]
        return fields

    @cached_property
    def runs(self) -> tuple[dict[str, Any], ...]:
        """Content of each `run.json`, in the order of the nodes; the chain's gate found them."""
        return tuple(
            parse_json((node.folder / RUN_NAME).read_bytes()) for node in self.evidence.nodes
        )

    @property
    def began(self) -> datetime.datetime:
        """When the first stage of the chain began, by its own clock."""
        return _moment(min(float(run.get("started", 0)) for run in self.runs))

    @property
    def made(self) -> datetime.datetime:
        """When the last stage of the chain had finished, by its own clock."""
        return _moment(max(float(run.get("finished", 0)) for run in self.runs))


def _moment(seconds: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(int(seconds), datetime.UTC)
