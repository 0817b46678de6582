"""Around `reproduce`: take or fetch the release, verify it, find its pictures and a workplace."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dinov3.data.sources.verb import current_source
from dinov3.errors import ConfigError, DataError
from dinov3.publish.reproduce import Reproduction, Say, reproduce
from dinov3.publish.store import open_store, split_name
from dinov3.publish.verified import verified_signer

_PARAMS = Path("params.yaml")


def remake(
    release: str,
    *,
    store: str | None,
    key: Path | None,
    source: str | None,
    scratch: Path | None,
    say: Say,
) -> Reproduction:
    """Makes a release again that lies in a folder or in a store.

    Args:
        release: The folder, or, of a store, `MODEL@VERSION`.
        store: Where it is published; None takes the folder.
        key: Public key that must have signed it; None leaves the signer unchecked, and no code
            that the release itself carries is run.
        source: Its pictures; None: those of the pipeline in the current folder.
        scratch: An empty folder, which is left behind; None works in a passing one.
        say: Told what is going on.

    Raises:
        StoreError: It is not in the store, or no store is named.
        LineageBroken: It is not what its signature or its list of files says.
        DataError, ConfigError: See `reproduce`.
    """
    with _workplace(scratch) as place:
        folder, name, where = Path(release), None, None
        if store is not None:
            folder, name, where = place / "release", release, open_store(store)
            where.fetch(*split_name(release), folder)
        elif not folder.is_dir():
            msg = f"store: needed for what is no folder, got {release!r}. Name one by --store."
            raise ConfigError(msg)
        is_trusted = verified_signer(folder, key, name, where) is not None
        pictures = _absolute(source)
        return reproduce(folder, pictures, scratch=place, say=say, is_trusted=is_trusted)


def _absolute(source: str | None) -> str:
    """Commands run in another folder than this one."""
    if source is None:
        if not _PARAMS.is_file():
            msg = "source: none given and no params.yaml here, got none. Name it by --source."
            raise ConfigError(msg)
        source = current_source(_PARAMS)
    kind, _, rest = source.partition(":")
    if rest.startswith("//"):  # a server's address
        return source
    return f"{kind}:{Path(rest).expanduser().absolute()}"


@contextlib.contextmanager
def _workplace(scratch: Path | None) -> Iterator[Path]:
    if scratch is None:
        with tempfile.TemporaryDirectory(prefix="reproduce-") as made:
            yield Path(made)
        return
    scratch.mkdir(parents=True, exist_ok=True)
    if any(scratch.iterdir()):
        msg = f"scratch: not empty, got {scratch}. Name another folder."
        raise DataError(msg)
    yield scratch.absolute()
