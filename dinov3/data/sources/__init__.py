"""Where images come from, named on one line.

`folder:PATH`, `list:FILE`, `parquet:FILE`, `wds:PATTERN`, `stamps:PATH` or
`lakefs://REPO/COMMIT/PREFIX`. Nothing here imports torch or polars: the fingerprint of a source
must be cheap.
"""

import difflib
from collections.abc import Callable
from pathlib import Path

from dinov3.data.sources.entries import Entry, ImageSource
from dinov3.data.sources.folder import FolderSource
from dinov3.data.sources.shards import ShardSource
from dinov3.data.sources.stamps import StampsSource
from dinov3.data.sources.table import ListSource, open_parquet
from dinov3.errors import DataError

__all__ = ["Entry", "ImageSource", "open_source", "require_images"]


def _open_lakefs(rest: str) -> ImageSource:
    from dinov3.data.sources.lakefs import LakefsSource

    return LakefsSource(f"lakefs:{rest}")


_OPENERS: dict[str, Callable[[str], ImageSource]] = {
    "folder": lambda rest: FolderSource(Path(rest).expanduser()),
    "list": lambda rest: ListSource(Path(rest).expanduser()),
    "parquet": lambda rest: open_parquet(Path(rest).expanduser()),
    "wds": lambda rest: ShardSource(str(Path(rest).expanduser())),
    "stamps": lambda rest: StampsSource(Path(rest).expanduser()),
    "lakefs": _open_lakefs,
}


def open_source(spec: str) -> ImageSource:
    """The source a one-line specification names.

    Raises:
        DataError: Unknown kind, nothing at that place, or something that cannot be its kind.
    """
    kind, colon, rest = spec.partition(":")
    if not colon or not rest:
        msg = f"source: not of the form kind:path, got {spec!r}. Write e.g. folder:/my/pictures."
        raise DataError(msg)
    if kind not in _OPENERS:
        near = difflib.get_close_matches(kind, _OPENERS, 1, 0.4)
        hint = f"Did you mean {near[0]}?" if near else f"Use one of {', '.join(_OPENERS)}."
        msg = f"source: unknown kind, got {kind!r} in {spec!r}. {hint}"
        raise DataError(msg)
    return _OPENERS[kind](rest)


def require_images(spec: str, source: ImageSource, num_entries: int) -> None:
    """Refuses a source that offered nothing.

    Raises:
        DataError: `num_entries` is 0.
    """
    if num_entries == 0:
        passed = ", ".join(f"{count} {kind}" for kind, count in source.ignored.most_common(5))
        msg = (
            f"source: empty, holds no image, got {spec} (passed over: {passed or 'nothing'}). "
            f"Put images there or name another source."
        )
        raise DataError(msg)
