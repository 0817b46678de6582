"""Places in lakeFS: `lakefs://REPO/REF/PATH`."""

import re
from dataclasses import dataclass

from dinov3.errors import StoreError

_COMMIT = re.compile(r"[0-9a-f]{64}")
_URL = re.compile(r"lakefs://([^/]+)/([^/]+)(?:/(.*))?", re.DOTALL)


@dataclass(frozen=True)
class Address:
    """A repository, a branch, tag or commit id of it, and a path or prefix, maybe empty."""

    repo: str
    ref: str
    path: str

    @property
    def is_pinned(self) -> bool:
        """Whether the ref is a commit id, which always names the same bytes."""
        return is_commit(self.ref)

    def __str__(self) -> str:
        return f"lakefs://{self.repo}/{self.ref}/{self.path}"


def is_commit(ref: str) -> bool:
    """Whether a ref is a whole commit id."""
    return _COMMIT.fullmatch(ref) is not None


def parse_address(url: str) -> Address:
    """The parts of `lakefs://REPO/REF[/PATH]`.

    Raises:
        StoreError: It is no such address.
    """
    found = _URL.fullmatch(url)
    if found is None:
        msg = f"address: not of the form lakefs://REPO/REF/PATH, got {url!r}. Write all three."
        raise StoreError(msg)
    return Address(found[1], found[2], found[3] or "")
