"""`dvc.yaml` with everything interpolated, as dvc reads it.

A `foreach` becomes one entry per arm, addressed as dvc does it: `eval_reports@pretrained`.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from dinov3.errors import ConfigError

_REFERENCE = re.compile(r"\$\{\s*([^{}]*?)\s*\}")


def read_stages(root: Path) -> dict[str, dict[str, Any]]:
    """The interpolated entry of every stage and arm, by dvc's address.

    Args:
        root: Folder of `dvc.yaml` and `params.yaml`.

    Raises:
        ConfigError: Something in them that we cannot read the way dvc does.
    """
    described = _load(root / "dvc.yaml")
    refused = sorted(set(described) - {"stages"})
    if refused:
        msg = f"dvc.yaml: only stages are read here, got {', '.join(refused)}. Move them away."
        raise ConfigError(msg)
    params = _load(root / "params.yaml") if (root / "params.yaml").is_file() else {}
    return dict(_expand(described.get("stages") or {}, params))


def _load(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, yaml.YAMLError) as error:
        msg = f"{path}: cannot be read: {error}. Mend the file."
        raise ConfigError(msg) from error
    return value or {}


def _expand(
    stages: Mapping[str, Any], params: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """One (address, interpolated body) per stage and per arm of a `foreach`."""
    for name, body in stages.items():
        if "foreach" not in body:
            yield name, _interpolate(body, params, name)
            continue
        arms = _interpolate(body["foreach"], params, name)
        if isinstance(arms, list):
            arms = {_text(arm): arm for arm in arms}
            contexts = {arm: {"item": item} for arm, item in arms.items()}
        else:
            contexts = {arm: {"item": item, "key": arm} for arm, item in arms.items()}
        for arm, context in contexts.items():
            address = f"{name}@{arm}"
            yield address, _interpolate(body["do"], {**params, **context}, address)


def _interpolate(value: Any, context: Mapping[str, Any], where: str) -> Any:
    if isinstance(value, dict):
        return {
            _interpolate(key, context, where): _interpolate(one, context, where)
            for key, one in value.items()
        }
    if isinstance(value, list):
        return [_interpolate(one, context, where) for one in value]
    if not isinstance(value, str):
        return value
    whole = _REFERENCE.fullmatch(value)
    if whole:
        return _look_up(whole[1], context, where)
    return _REFERENCE.sub(lambda found: _text(_look_up(found[1], context, where)), value)


def _look_up(reference: str, context: Mapping[str, Any], where: str) -> Any:
    value: Any = context
    for part in reference.split("."):
        if not isinstance(value, Mapping) or part not in value:
            msg = (
                f"dvc.yaml: {where}: unknown name, got ${{{reference}}}. Define it in params.yaml."
            )
            raise ConfigError(msg)
        value = value[part]
    return value


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
