"""Bytes to and from a lakeFS server, in chunks and in bounded time.

A server may stay silent for `timeout` seconds, and a transfer may not fall below a floor of speed:
a peer that sends a byte now and then counts as hung too.
"""

import hashlib
import io
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

import urllib3

from dinov3.errors import StoreError
from dinov3.lake.refusal import refused, unreachable

if TYPE_CHECKING:
    from urllib3.response import BaseHTTPResponse

SLOWEST = 32 * 1024  # bytes per second below which a transfer counts as hung
_CHUNK_SIZE = 1 << 17
_MAX_ANSWER_SIZE = 64 << 20  # bytes of an answer that is held whole


class Pace:
    """Watches the time spent on the wire, not what the user takes between chunks."""

    def __init__(self, what: str, timeout: float) -> None:
        self._what, self._timeout = what, timeout
        self._spent, self._moved = 0.0, 0

    def spend(self, seconds: float, num_bytes: int) -> None:
        """Adds what one chunk took.

        Raises:
            StoreError: The transfer has become too slow.
        """
        self._spent += seconds
        self._moved += num_bytes
        if self._spent > self._timeout + self._moved / SLOWEST:
            msg = (
                f"{self._what}: too slow, got {self._moved} bytes in {self._spent:.1f} s. "
                f"Check the server and the network, then run it again."
            )
            raise StoreError(msg)


@dataclass(frozen=True)
class Answer:
    """A small answer, held whole."""

    status: int
    reason: str | None
    data: bytes
    headers: Mapping[str, str]


class Wire:
    """Connections to one server; nothing is retried."""

    def __init__(self, endpoint: str, access_key: str, secret_key: str, timeout: float) -> None:
        self.endpoint, self.timeout = endpoint, timeout
        self._headers = urllib3.make_headers(basic_auth=f"{access_key}:{secret_key}")
        self._pool = urllib3.PoolManager(
            retries=False,
            timeout=urllib3.Timeout(connect=timeout, read=timeout),
            blocksize=_CHUNK_SIZE,
        )

    def request(self, method: str, url: str, **options: Any) -> Answer:
        """One call of the SDK, whose own pool would read for as long as bytes trickle in."""
        options |= {"preload_content": False}
        options.pop("timeout", None)
        return self._whole(url, self._pool.request(method, url, **options))

    def get(self, path: str, *, start: int, what: str) -> "BaseHTTPResponse":
        """The answer that carries the bytes of an object from `start` on."""
        headers = {**self._headers, "range": f"bytes={start}-"}
        with self.explained(what):
            response = self._pool.request(
                "GET", f"{self.endpoint}/api/v1{path}", headers=headers, preload_content=False
            )
            if response.status == 206 or (response.status == 200 and start == 0):
                return response
            answer = self._whole(what, response)
        raise refused(what, answer.status, answer.data)

    def post(self, path: str, body: "Outgoing", *, what: str) -> None:
        """Makes an object of the bytes of `body`, sent as they are read."""
        headers = {
            **self._headers,
            "content-type": "application/octet-stream",
            "content-length": str(body.size),
        }
        with self.explained(what):
            answer = self.request(
                "POST", f"{self.endpoint}/api/v1{path}", body=body, headers=headers
            )
        if answer.status != 201:
            raise refused(what, answer.status, answer.data)

    @contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Tells failures of the network in our words."""
        try:
            yield
        except urllib3.exceptions.HTTPError as error:
            raise unreachable(what, self.endpoint, self.timeout, error) from error

    def _whole(self, what: str, response: "BaseHTTPResponse") -> Answer:
        data, pace = bytearray(), Pace(what, self.timeout)
        while chunk := read_some(response, _CHUNK_SIZE, pace):
            data += chunk
            if len(data) > _MAX_ANSWER_SIZE:
                response.close()
                msg = f"{what}: not an answer of lakeFS, got over {_MAX_ANSWER_SIZE} bytes."
                raise StoreError(f"{msg} Check LAKEFS_ENDPOINT.")
        response.release_conn()
        return Answer(response.status, response.reason, bytes(data), response.headers)


def read_some(response: "BaseHTTPResponse", most: int, pace: Pace) -> bytes:
    """What has arrived, at most `most` bytes; empty at the end."""
    begun = time.monotonic()
    chunk = response.read1(most)
    try:
        pace.spend(time.monotonic() - begun, len(chunk))
    except StoreError:
        response.close()  # else the rest would be taken for the next answer
        raise
    return chunk


class Incoming(io.RawIOBase):
    """One object as a seekable stream: a jump costs a request, nothing is held."""

    def __init__(self, wire: Wire, path: str, size: int, what: str) -> None:
        super().__init__()
        self._wire, self._path, self._size, self._what = wire, path, size, what
        self._pace = Pace(what, wire.timeout)
        self._position = 0
        self._response: BaseHTTPResponse | None = None

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Bytes from the start."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves; the next read asks for the bytes from there."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            msg = f"{self._what}: before its start, got {base + offset}"
            raise ValueError(msg)
        if base + offset != self._position:
            self._drop()
            self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer, or less; 0 at the end.

        Raises:
            StoreError: The server failed, fell silent or sent too little.
        """
        if self._position >= self._size or not len(buffer):
            return 0
        if self._response is None:
            self._response = self._wire.get(self._path, start=self._position, what=self._what)
        with self._wire.explained(self._what):
            chunk = read_some(self._response, len(buffer), self._pace)
        if not chunk:
            msg = f"{self._what}: cut short, got {self._position} of {self._size} bytes."
            raise StoreError(f"{msg} Run it again.")
        buffer[: len(chunk)] = chunk
        self._position += len(chunk)
        return len(chunk)

    def close(self) -> None:
        """Lets go of the connection."""
        self._drop()
        super().close()

    def _drop(self) -> None:
        response, self._response = self._response, None
        if response is None:
            return
        if self._position >= self._size:
            response.release_conn()
        else:
            response.close()


class Outgoing:
    """A body that is hashed and counted while it is sent."""

    def __init__(
        self, stream: BinaryIO, size: int, pace: Pace, what: str, on_bytes: Callable[[int], object]
    ) -> None:
        self.size = size
        self._stream, self._pace, self._what, self._on_bytes = stream, pace, what, on_bytes
        self._left = size
        self._digest = hashlib.sha256()
        self._last: tuple[float, int] | None = None  # when the last chunk was handed out, its size

    @property
    def sha256(self) -> str:
        """Of what was handed out so far."""
        return self._digest.hexdigest()

    def read(self, most: int = -1) -> bytes:
        """The next chunk, as the connection asks for it.

        Raises:
            StoreError: Sending is too slow, or the file is shorter than it was.
        """
        if self._last is not None:
            handed_out, num_bytes = self._last
            self._pace.spend(time.monotonic() - handed_out, num_bytes)
            self._on_bytes(num_bytes)
        chunk = self._stream.read(self._left if most < 0 else min(most, self._left))
        if not chunk and self._left:
            msg = f"{self._what}: shorter than it was, {self._left} bytes of {self.size} missing."
            raise StoreError(f"{msg} Leave the file alone and run it again.")
        self._left -= len(chunk)
        self._digest.update(chunk)
        self._last = (time.monotonic(), len(chunk))
        return chunk
