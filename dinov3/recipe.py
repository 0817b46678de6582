"""Reading recipes: `dinov3/recipes/<family>/<phase>.yaml`, each a diff of its parent by `extends:`.

Values pass through JSON on their way to pydantic: strict mode then takes lists for tuples and ints
for floats, and still refuses the rest.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dinov3.config import Section, type_of_phase
from dinov3.errors import ConfigError

RECIPES = Path(__file__).resolve().parent / "recipes"


def load_recipe(name: str, overrides: Iterable[str] = (), *, phase: str = "pretrain") -> Section:
    """Resolves a recipe to its typed tree.

    Args:
        name: A family (`demo`), a family and phase (`demo/pretrain`) or the path of a YAML file.
        overrides: `key=value` with dotted keys, laid over the recipe in order.
        phase: Which file of the family, where `name` says only the family.

    Raises:
        ConfigError: Unknown, duplicate or contradictory keys; a missing recipe or parent.
    """
    path = _recipe_path(name, phase)
    tree = _resolve(path, ())
    for override in overrides:
        _apply(tree, override)
    kind = type_of_phase.get(tree.get("phase", ""))
    if kind is None:
        known, got = ", ".join(type_of_phase), tree.get("phase")
        msg = f"{path.name}: phase is not one of {known}, got {got!r}. Set it."
        raise ConfigError(msg)
    if "/" not in name and not name.endswith(".yaml") and tree["phase"] != phase:
        msg = f"{path}: phase must be {phase}, got {tree['phase']!r}. Move the recipe."
        raise ConfigError(msg)
    try:
        return kind.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise ConfigError(_explain(error, kind, name)) from error


def recipe_families() -> list[str]:
    """Names of the recipe families that ship with the package."""
    return sorted(path.name for path in RECIPES.iterdir() if path.is_dir())


def _recipe_path(name: str, phase: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
    else:
        path = RECIPES / (f"{name}.yaml" if "/" in name else f"{name}/{phase}.yaml")
    if not path.is_file():
        known = sorted(str(p.relative_to(RECIPES).with_suffix("")) for p in RECIPES.rglob("*.yaml"))
        near = difflib.get_close_matches(name, [*recipe_families(), *known], 1, 0.4)
        hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}."
        msg = f"recipe: no such recipe, got {name!r} (phase {phase}). {hint}"
        raise ConfigError(msg)
    return path


def _resolve(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The recipe laid over its parents, the farthest first."""
    if path in seen:
        chain = " -> ".join(p.stem for p in (*seen, path))
        msg = f"{path}: extends itself, got {chain}. Break the circle."
        raise ConfigError(msg)
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        msg = f"{path}: not readable as YAML: {error}. Mend the line it names."
        raise ConfigError(msg) from error
    if not isinstance(tree, dict):
        kind = type(tree).__name__
        msg = f"{path}: not a mapping of keys to values, got {kind}. Write `key: value`."
        raise ConfigError(msg)
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    beside = path.parent / str(parent)
    parent_path = beside if beside.is_file() else _recipe_path(str(parent), path.stem)
    return _merge(_resolve(parent_path, (*seen, path)), tree)


def _merge(base: dict[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        below = merged.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = _merge(below, value) if both else value  # type: ignore[arg-type]
    return merged


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        msg = f"override: not of the form key=value, got {override!r}. Write e.g. seed=1."
        raise ConfigError(msg)
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        msg = f"override {key}: value is not YAML, got {text!r}. Quote it."
        raise ConfigError(msg) from error
    *parents, last = key.split(".")
    node: dict[str, Any] = tree
    for part in parents:
        below = node.get(part)
        if not isinstance(below, dict):
            raise ConfigError(_unknown(key, key, node, part))
        node = below
    if last not in node:
        raise ConfigError(_unknown(key, key, node, last))
    node[last] = _merge(node[last], value) if isinstance(value, dict) else value


def _unknown(where: str, got: str, valid: Iterable[str], part: str) -> str:
    names = sorted(valid)
    near = difflib.get_close_matches(part, names, 1, 0.5)
    hint = f"Did you mean {near[0]}?" if near else f"Valid here: {', '.join(names)}."
    return f"{where}: unknown key, got {got!r}. {hint}"


def _explain(error: ValidationError, kind: type[Section], name: str) -> str:
    lines = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            *parents, last = item["loc"]
            lines.append(_unknown(where, where, _fields(kind, parents), str(last)))
        elif item["type"] == "value_error":
            text = item["msg"].removeprefix("Value error, ")
            lines.append(text)
        elif item["type"] == "missing":
            lines.append(f"{where}: missing. Set it, or extend a recipe that does.")
        else:
            lines.append(f"{where}: {item['msg']}, got {item['input']!r}. Change it.")
    return f"recipe {name}: " + "; ".join(lines)


def _fields(kind: type[BaseModel], parents: Iterable[Any]) -> list[str]:
    current: Any = kind
    for part in parents:
        field = getattr(current, "model_fields", {}).get(str(part))
        current = field.annotation if field is not None else None
    return list(getattr(current, "model_fields", {}))


class _Loader(yaml.SafeLoader):
    """YAML where 1e-4 is a number and a key may stand only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                msg = f"the key {key!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, msg, node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag != "tag:yaml.org,2002:float"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf)$"),
    list("-+0123456789."),
)
