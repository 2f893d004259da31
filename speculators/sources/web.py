"""The transport for ``http`` and ``https``, through huggingface_hub's client: pooled, with proxies, with redirects."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from speculators.errors import CheckpointError
from speculators.sources.remote import NoRangesError, NotFoundError, Stat, TransientError

TIMEOUT = 20.0
"""Seconds without a byte after which a connection counts as lost."""

LONGEST_WAIT = 60.0
"""The most seconds that a server's own ``Retry-After`` is obeyed."""

_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses that may be others a moment later."""


def basic_authorization(user: str) -> dict[str, str]:
    """Return the header that carries ``user:password`` (RFC 7617)."""
    return {"Authorization": f"Basic {b64encode(user.encode()).decode()}"}


@dataclass
class WebFile:
    """A file that a web server serves.

    Attributes:
        url: Its address, without user and password.
        name: What messages call it.
        headers: Sent with each request to that server, and not to others that it redirects to.
        refusal: What to do where the server wants another user, or any.
    """

    url: str = field(repr=False)
    name: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    refusal: str = "put user and password into the address, as https://user:password@host/…"
    _seen: tuple[int | None, str | None] | None = field(default=None, init=False, repr=False)

    def stat(self) -> Stat:
        """Ask for one byte: it tells the size, the version, and whether parts are served."""
        with self._response(0, 1) as response:
            size, version = _total(response), _version(response)
            self._seen = (size, version)
            return Stat(size, version, ranges=response.status_code in (206, 416) and size is not None)

    def read(self, start: int, stop: int | None) -> Iterator[bytes]:
        """Yield the bytes of one response."""
        with self._response(start, stop) as response:
            self._compare(response)
            whole = start == 0 and stop is None
            encoded = response.headers.get("Content-Encoding", "identity") != "identity"
            if not whole and (response.status_code == 200 or encoded):
                raise NoRangesError(self.name)
            if response.status_code == 416:
                raise CheckpointError(f"{self.name}: the server has no bytes {start} to {stop}; was it changed?")
            if response.status_code == 206 and not _starts_at(response, start):
                raise CheckpointError(
                    f"{self.name}: the server sent another part than bytes {start} to {stop} "
                    f"({response.headers.get('Content-Range', 'no Content-Range')})"
                )
            try:
                yield from response.iter_bytes()  # as they come: nothing that arrived is lost with the connection
            except http_error() as error:
                raise TransientError(reason(error)) from error

    def _compare(self, response: Any) -> None:
        """Refuse bytes of another version than the first answer was about."""
        now = (_total(response), _version(response))
        if self._seen is None:
            self._seen = now
        for before, after in zip(self._seen, now, strict=True):
            if before is not None and after is not None and before != after:
                raise CheckpointError(
                    f"{self.name} was changed on the server while it was read ({before} became {after}); "
                    "run the command again"
                )

    @contextmanager
    def _response(self, start: int, stop: int | None) -> Iterator[Any]:
        from huggingface_hub import get_session

        headers = {**self.headers, "Accept-Encoding": "identity"}  # offsets count the file's own bytes
        if start or stop is not None:
            headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        try:
            with get_session().stream(
                "GET", self.url, headers=headers, timeout=TIMEOUT, follow_redirects=True
            ) as response:
                self._judge(response)
                yield response
        except (http_error(), OSError) as error:
            raise TransientError(reason(error)) from error

    def _judge(self, response: Any) -> None:
        status = response.status_code
        if status in (200, 206, 416):
            return
        if status in (404, 410):
            raise NotFoundError(self.name)
        if status in _PASSING:
            wait = response.headers.get("Retry-After", "")
            raise TransientError(f"status {status}", min(float(wait), LONGEST_WAIT) if wait.isdigit() else None)
        if status in (401, 403, 407):
            raise CheckpointError(f"{self.name}: the server refuses it (status {status}); {self.refusal}")
        raise CheckpointError(f"{self.name}: the server answers with status {status}; expected 200 or 206")


def http_error() -> type[Exception]:
    """Return the class of the client's errors, whichever client huggingface_hub is built on."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def reason(error: Exception) -> str:
    """Return what went wrong with a connection, without addresses, which may hold secrets."""
    return re.sub(r"\S+://\S+", "…", str(error)) or type(error).__name__


def _total(response: Any) -> int | None:
    """Return the size of the whole file, if the answer tells it."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        return None
    if response.status_code == 200:
        length = response.headers.get("Content-Length", "")
        return int(length) if length.isdigit() else None
    found = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+)", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _starts_at(response: Any, start: int) -> bool:
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return found is not None and int(found[1]) == start


def _version(response: Any) -> str | None:
    version: str | None = response.headers.get("ETag") or response.headers.get("Last-Modified")
    return version
