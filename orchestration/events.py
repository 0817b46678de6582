"""Which events would tell Dagster something it does not know."""

from collections.abc import Iterable, Iterator, Mapping

import dagster as dg

from orchestration.lock import (
    CODE_VERSION,
    DATA_VERSION,
    INPUT_VERSION,
    SUPERSEDED,
    Lock,
    root_version,
)
from orchestration.stages import Pipeline

_TELLING = (DATA_VERSION, CODE_VERSION, INPUT_VERSION)


def is_news(instance: dg.DagsterInstance, key: str, tags: Mapping[str, str]) -> bool:
    """Whether an asset's latest event is of other bytes, other code or other inputs.

    An input that was made anew since is no news: then the latest event tells what was used.
    """
    latest = instance.get_latest_materialization_event(dg.AssetKey(key))
    event = None if latest is None else latest.asset_materialization
    known = {} if event is None else event.tags or {}
    return any(
        known.get(name) != version
        for name, version in tags.items()
        if name.startswith(_TELLING) and not version.startswith(SUPERSEDED)
    )


def root_events(
    instance: dg.DagsterInstance, pipeline: Pipeline, roots: Iterable[str], lock: Lock
) -> Iterator[dg.AssetMaterialization]:
    """Says which version of a source dvc saw, where that is news."""
    for root in roots:
        version = root_version(pipeline, root, lock)
        tags = {} if version is None else {DATA_VERSION: version}
        if is_news(instance, root, tags):
            yield dg.AssetMaterialization(root, description="as seen by dvc", tags=tags)
