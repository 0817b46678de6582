"""What a lakeFS server's refusals mean, as one sentence and one action."""

import json
import re

import urllib3

from dinov3.errors import StoreError

_MAX_DETAIL = 300  # characters of the server's own words
_MEANINGS = {
    400: ("refused", "Mend what it names."),
    401: (
        "the server does not know this key",
        "Check LAKEFS_ACCESS_KEY_ID and LAKEFS_SECRET_ACCESS_KEY.",
    ),
    403: ("this key may not do that", "Ask the owner of the repository."),
    404: ("not there", "Check the repository, the ref and the path."),
    409: ("in conflict with what is there", "Look at what is there, then run it again."),
    410: ("its bytes are gone", "Restore the storage behind the server."),
    412: ("a hook or a condition of the server refuses it", "Mend what it names."),
}


def refused(what: str, status: int | None, body: str | bytes | None) -> StoreError:
    """The error for an answer that is no success."""
    meaning, action = _MEANINGS.get(
        status or 0, ("the server failed", "Look at the server's log, then run it again.")
    )
    return StoreError(f"{what}: {meaning}, got {status}: {detail_of(body)}. {action}")


def detail_of(body: str | bytes | None) -> str:
    """The server's own words on one short printable line."""
    text = body.decode("utf-8", "replace") if isinstance(body, bytes) else body or ""
    try:
        parsed = json.loads(text)
    except ValueError:
        parsed = None
    if isinstance(parsed, dict) and isinstance(parsed.get("message"), str):
        text = parsed["message"]
    line = re.sub(r"[^\x20-\x7e]+", " ", text).strip().rstrip(".")
    return line[:_MAX_DETAIL] or "no words"


def unreachable(
    what: str, endpoint: str, timeout: float, error: urllib3.exceptions.HTTPError
) -> StoreError:
    """The error for a server that did not answer."""
    exceptions = urllib3.exceptions
    dead = (exceptions.NewConnectionError, exceptions.ConnectTimeoutError)
    if isinstance(error, dead):
        msg = (
            f"{what}: no lakeFS server answers, got {_plain(error)} at {endpoint}. "
            f"Start it (make lakefs) or set LAKEFS_ENDPOINT."
        )
    elif isinstance(error, exceptions.TimeoutError) or "timed out" in str(error):
        msg = (
            f"{what}: the server at {endpoint} is silent, got no byte for {timeout:g} s. "
            f"Whether it acted is unknown: check the server, then run it again."
        )
    else:
        msg = (
            f"{what}: the connection to {endpoint} was lost, got {_plain(error)}. "
            f"Whether the server acted is unknown: check it, then run it again."
        )
    return StoreError(msg)


def _plain(error: Exception) -> str:
    return re.sub(r"<[^>]*>:? ?", "", str(error)).rstrip(".") or type(error).__name__
