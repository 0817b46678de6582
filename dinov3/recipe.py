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
    kind = type_of_phase.get(str(tree.get("phase")))
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
    except (TypeError, ValueError, RecursionError) as error:
        msg = f"recipe {name}: a value JSON does not know, got {error}. Write it as text or number."
        raise ConfigError(msg) from error


def recipe_families() -> list[str]:
    """Names of the recipe families that ship with the package."""
    return sorted(path.name for path in RECIPES.iterdir() if path.is_dir())


def _recipe_path(name: str, phase: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
    else:
        path = RECIPES / (f"{name}.yaml" if "/" in name else f"{name}/{phase}.yaml")
    if not _is_file(path):
        known = sorted(str(p.relative_to(RECIPES).with_suffix("")) for p in RECIPES.rglob("*.yaml"))
        near = difflib.get_close_matches(name, [*recipe_families(), *known], 1, 0.4)
        hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(known)}."
        msg = f"recipe: no such recipe, got {name!r} (phase {phase}). {hint}"
        raise ConfigError(msg)
    return path


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # not allowed to look there, or the name is too long to be one
        return False


def _resolve(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The recipe laid over its parents, the farthest first."""
    if path in seen:
        chain = " -> ".join(p.stem for p in (*seen, path))
        msg = f"{path}: extends itself, got {chain}. Break the circle."
        raise ConfigError(msg)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"{path}: not a readable text, got {error}. Give a file of YAML."
        raise ConfigError(msg) from error
    tree = _parse(text, str(path), "Mend it")
    if not isinstance(tree, dict):
        kind = type(tree).__name__
        msg = f"{path}: not a mapping of keys to values, got {kind}. Write `key: value`."
        raise ConfigError(msg)
    return _extended(tree, path, (*seen, path))


def _extended(
    tree: dict[str, Any],
    path: Path,
    seen: tuple[Path, ...],
    around: tuple[dict[str, Any], ...] = (),
) -> dict[str, Any]:
    """A mapping laid over the recipe it extends, and so every mapping inside it.

    It is left as it is: an alias of YAML may let it stand in several places.
    """
    if any(tree is one for one in around):
        msg = f"{path}: a mapping must not stand in itself, got Circular reference. Write it out."
        raise ConfigError(msg)
    own = {
        key: _extended(value, path, seen, (*around, tree)) if isinstance(value, dict) else value
        for key, value in tree.items()
        if key != "extends"
    }
    parent = tree.get("extends")
    if parent is None:
        return own
    beside = path.parent / str(parent)
    parent_path = beside if _is_file(beside) else _recipe_path(str(parent), path.stem)
    return _merge(_resolve(parent_path, seen), own)


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
    value = _parse(text, f"override {key}", "Quote it")
    *parents, last = key.split(".")
    node: dict[str, Any] = tree
    for part in parents:
        below = node.get(part)
        if not isinstance(below, dict):
            raise ConfigError(_unknown(key, key, node, part))
        node = below
    if last not in node:
        raise ConfigError(_unknown(key, key, node, last))
    both = isinstance(node[last], dict) and isinstance(value, dict)
    node[last] = _merge(node[last], value) if both else value


def _parse(text: str, where: str, action: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError as error:
        msg = f"{where}: not readable as YAML, got lists or mappings nested too deep. {action}."
        raise ConfigError(msg) from error
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        # PyYAML's own constructors fall over `!!int x`, `!!bool x`, `!!map [1]`, `!!timestamp x`
        shown = " ".join(str(error).split())
        msg = f"{where}: not readable as YAML, got {text[:60]!r} ({shown}). {action}."
        raise ConfigError(msg) from error


def _unknown(where: str, got: str, valid: Iterable[str], part: str) -> str:
    names = sorted(str(name) for name in valid)
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
        elif item["type"] == "recursion_loop" or item["type"] == "json_invalid":
            lines.append(f"{where or 'values'}: {item['msg']}. Make them flatter.")
        elif item["type"] == "missing":
            lines.append(f"{where}: missing. Set it, or extend a recipe that does.")
        else:
            lines.append(f"{where}: {item['msg']}, got {_short(item['input'])}. Change it.")
    return f"recipe {name}: " + "; ".join(lines)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _fields(kind: type[BaseModel], parents: Iterable[Any]) -> list[str]:
    current: Any = kind
    for part in parents:
        field = getattr(current, "model_fields", {}).get(str(part))
        current = field.annotation if field is not None else None
    return list(getattr(current, "model_fields", {}))


class _Loader(yaml.SafeLoader):
    """YAML where 1e-4 is a number, a date is text and a key may stand only once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                msg = f"the key {key!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, msg, node.start_mark)
        return super().construct_mapping(node, deep)


_REPLACED = {f"tag:yaml.org,2002:{kind}" for kind in ("float", "timestamp")}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf)$"),
    list("-+0123456789."),
)
