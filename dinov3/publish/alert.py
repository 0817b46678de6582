"""Telling somebody of a regression: a command that reads it, or a webhook that gets it.

Both are bounded in time. What cannot be delivered is returned in words and never raised: the
regression it was about must be heard in any case.
"""

import json
import os
import subprocess
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from typing import IO, Any

from dinov3.launch import stop_tree

_FROM_ENVIRONMENT = "env:"  # begins the name of a variable: the URL itself may be a secret
_SHOWN = 300  # bytes of what a failed command said last
_KILL_AFTER = 1.0  # seconds a command has to end when its time is over


def send_alert(
    finding: Mapping[str, Any],
    *,
    command: Sequence[str] | None,
    webhook: str | None,
    timeout: float,
) -> list[str]:
    """Delivers a finding as JSON; returns what could not be delivered and why.

    Args:
        finding: JSON values.
        command: Program and arguments; the finding is its standard input. None runs none.
        webhook: URL that gets the finding by POST, or env:NAME. None calls none.
        timeout: Seconds that each of both may take.
    """
    text = json.dumps(finding, ensure_ascii=False, indent=1)
    content = text.encode("utf-8", "backslashreplace")  # half of a pair: JSON's own escape
    failures = []
    if command is not None and (failed := _run(command, content, timeout)) is not None:
        failures.append(f"alert command {command[0]}: {failed}")
    if webhook is not None and (failed := _call(webhook, content, timeout)) is not None:
        failures.append(f"alert webhook: {failed}")
    return failures


def _run(command: Sequence[str], content: bytes, timeout: float) -> str | None:
    """Files stand in for pipes: a child that it leaves behind must not keep us."""
    try:
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as said:
            given.write(content)
            given.seek(0)
            process = subprocess.Popen(
                command, stdin=given, stdout=said, stderr=said, start_new_session=True
            )
            return _await(process, said, timeout)
    except (OSError, ValueError) as error:  # no such program, a full disk, a zero byte
        return f"cannot be run: {getattr(error, 'strerror', None) or error}"


def _await(process: "subprocess.Popen[bytes]", said: IO[bytes], timeout: float) -> str | None:
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        stop_tree(process.pid, _KILL_AFTER)
        process.wait()
        return f"not done after {timeout:g} s"
    if code == 0:
        return None
    said.seek(-min(_SHOWN, said.seek(0, os.SEEK_END)), os.SEEK_END)
    last = said.read().decode("utf-8", "replace").strip()
    return f"ended with {code}" + (f", said {last!r}" if last else "")


def _call(webhook: str, content: bytes, timeout: float) -> str | None:
    """In a thread of its own: a name server or a server that drips has no time limit of its own."""
    url = _url_of(webhook)
    if url is None:
        return f"the variable {webhook.removeprefix(_FROM_ENVIRONMENT)} is not set"
    if not url.lower().startswith(("http://", "https://")):
        return "not a URL of http or https"
    outcome: list[str | None] = []
    poster = threading.Thread(
        target=lambda: outcome.append(_post(url, content, timeout)), daemon=True
    )
    poster.start()
    poster.join(timeout)
    return outcome[0] if outcome else f"no answer after {timeout:g} s"


def _url_of(webhook: str) -> str | None:
    if webhook.startswith(_FROM_ENVIRONMENT):
        return os.environ.get(webhook.removeprefix(_FROM_ENVIRONMENT))
    return webhook


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would arrive as a GET without the finding."""

    def redirect_request(self, *_: Any) -> None:
        """Follows none: the redirect itself is the answer, and it is not a success."""


def _post(url: str, content: bytes, timeout: float) -> str | None:
    headers = {"Content-Type": "application/json", "User-Agent": "dinov3"}
    try:
        request = urllib.request.Request(url, data=content, headers=headers, method="POST")
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout):
            return None
    except urllib.error.HTTPError as error:
        with error:
            return f"answered {error.code}"
    except OSError as error:
        return f"not reached: {getattr(error, 'reason', error)}"
    except (HTTPException, ValueError) as error:  # their words may hold the URL
        return f"not reached: {type(error).__name__}"
