"""The command of each artifact, as the `dvc.yaml` of a checkout states it.

It is the only place where a command line is written; whoever makes an artifact again reads it
there, in the version of the code that made the artifact.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from dinov3.errors import ConfigError
from dinov3.release.record import RECORD_NAME

_REFERENCE = re.compile(r"\$\{\s*([\w.\-]+)\s*\}")
_OVERRIDES = re.compile(r"\$\{\s*overrides\.\w+\s*\}")


@dataclass(frozen=True)
class Command:
    """How an artifact is made; several artifacts may come from one command."""

    stage: str  # as dvc addresses it
    template: str
    folder: PurePosixPath  # of the artifact, relative to where the command runs
    names: Mapping[str, Any]  # of a foreach: key and item

    def line(self, given: Mapping[str, Any]) -> str:
        """The command line, for a shell, with nothing laid over the recipe.

        Args:
            given: Values of the parameters that it names.

        Raises:
            ConfigError: It names another.
        """
        bare = _OVERRIDES.sub("", self.template)
        return _fill(bare, {**given, **self.names}, self.stage)


def read_commands(checkout: Path) -> dict[str, Command]:
    """The command behind each artifact, by the name that its record gives as its stage.

    Args:
        checkout: Folder of `dvc.yaml`.

    Raises:
        ConfigError: There is no readable `dvc.yaml`.
    """
    path = checkout / "dvc.yaml"
    try:
        stages = yaml.safe_load(path.read_text("utf-8"))["stages"]
        return {
            key: command for name, body in stages.items() for key, command in _commands(name, body)
        }
    except (OSError, yaml.YAMLError, LookupError, TypeError, AttributeError) as error:
        msg = f"{path}: not a readable pipeline, got {error!r}. Use a checkout of the project."
        raise ConfigError(msg) from error


def _commands(name: str, body: Mapping[str, Any]) -> Iterator[tuple[str, Command]]:
    if "foreach" not in body:
        yield from _artifacts(name, body, {})
        return
    for arm, item in body["foreach"].items():
        yield from _artifacts(f"{name}@{arm}", body["do"], {"key": arm, "item": item})


def _artifacts(
    stage: str, body: Mapping[str, Any], names: Mapping[str, Any]
) -> Iterator[tuple[str, Command]]:
    """One, or one per folder with a record where there are several."""
    outs = [next(iter(out)) if isinstance(out, dict) else out for out in body.get("outs", ())]
    paths = [PurePosixPath(_fill(out, names, stage)) for out in outs]
    folders = [path.parent for path in paths if path.name == RECORD_NAME]
    key = re.sub(r"\W", "_", stage, flags=re.ASCII)
    for folder in folders:
        own = key if len(folders) == 1 else f"{key}_{folder.name}"
        yield own, Command(stage, body["cmd"], folder, names)


def _fill(text: str, given: Mapping[str, Any], where: str) -> str:
    def value(found: re.Match[str]) -> str:
        node: Any = given
        for part in found[1].split("."):
            if not isinstance(node, Mapping) or part not in node:
                msg = f"dvc.yaml: {where}: unknown name, got ${{{found[1]}}}. Define it."
                raise ConfigError(msg)
            node = node[part]
        return str(node)

    return _REFERENCE.sub(value, text)
