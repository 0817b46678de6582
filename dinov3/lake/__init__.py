"""lakeFS: data and releases as commits of a server; the only user of its SDK.

A branch or tag is resolved to a commit id once, and everything after reads at that id. Nothing is
retried, no call waits without bound, and bytes pass in chunks.
"""

from dinov3.lake.address import Address, is_commit, parse_address
from dinov3.lake.client import Commit, Lake, Stat

__all__ = ["Address", "Commit", "Lake", "Stat", "is_commit", "parse_address"]
