"""The transport for ``http`` and ``https``, through huggingface_hub's client: pooled, with proxies, with redirects."""

from __future__ import annotations

import logging
import re
import sys
from base64 import b64encode
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from speculators.errors import CheckpointError, printable
from speculators.sources.locations import below, redacted_text
from speculators.sources.remote import (
    ContradictionError,
    ForbiddenError,
    NoRangesError,
    NotFoundError,
    Stat,
    TransientError,
)

TIMEOUT = 20.0
"""Seconds without a byte after which a connection counts as lost."""

LONGEST_WAIT = 60.0
"""The most seconds that a server's own ``Retry-After`` is obeyed."""

PASSING = frozenset({408, 421, 425, 429, *range(500, 600)})
"""Statuses that may be others a moment later."""

PAGE_STARTS = (b"<", b" ", b"\t", b"\r", b"\n", b"\xef")
"""First bytes of a page, the last of a byte-order mark."""

IDENTITY = frozenset({"", "identity", "aws-chunked"})
"""Content encodings that leave the bytes as they are; the last is what some stores keep from an upload."""


class WebServer:
    """A folder on a web server, which does not list its files.

    Args:
        url: The folder.
        name: What messages call it.
        user: ``user:password``, if the server wants to know.
    """

    def __init__(self, url: str, name: str, user: str | None) -> None:
        keep_secrets_from_logs()
        self._url = url
        self._name = name
        # Basic authorization (RFC 7617)
        self._headers = {"Authorization": f"Basic {b64encode(user.encode()).decode()}"} if user else {}

    def file(self, name: str) -> WebFile:
        """Return a file in the folder."""
        refusal = "check user and password" if self._headers else "is it there? Does it want a user and a password"
        refusal += " in the address, https://user:password@host/…"
        return WebFile(below(self._url, name), f"{self._name}/{name}", self._headers, refusal)

    def names(self) -> Collection[str]:
        """Return nothing, as the server tells nothing."""
        return ()


@dataclass
class WebFile:
    """A file that a web server serves.

    Attributes:
        url: Its address, without user and password.
        name: What messages call it.
        headers: Sent with each request to that server, and not to others that it redirects to.
        refusal: What to do where the server refuses it.
        pinned: Whether the address means one content for ever, so that other ETags mean other machines.
        size: Its size in bytes, where that is known already.
    """

    url: str = field(repr=False)
    name: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    refusal: str = ""
    pinned: bool = False
    size: int | None = None
    _seen: tuple[int | None, str | None] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Let the first answer be compared with what is known."""
        if self.size is not None:
            self._seen = (self.size, None)

    def stat(self) -> Stat:
        """Ask for one byte: it tells the size, the version, and whether parts are served.

        A page of HTML is what some servers send for whatever they do not have.
        """
        with self._response(0, 1) as response:
            size, version = _total(response), _version(response)
            page = "text/html" in response.headers.get("Content-Type", "")
            if page and next(response.iter_bytes(), b"")[:1] in PAGE_STARTS:
                raise NotFoundError(self.name)
            self._seen = (size, version)
            return Stat(size, version, ranges=response.status_code in (206, 416) and size is not None)

    def read(self, start: int, stop: int | None) -> Iterator[bytes]:
        """Yield the bytes of one response."""
        with self._response(start, stop) as response:
            self._compare(response)
            encoding = response.headers.get("Content-Encoding", "")
            encoded = encoding not in IDENTITY
            if (start or stop is not None) and (response.status_code == 200 or encoded):
                raise NoRangesError
            if encoded and encoding not in ("gzip", "deflate"):
                raise CheckpointError(
                    f"{self.name}: the server sends it encoded as {encoding!r}, which was not asked for"
                )
            if response.status_code == 416:
                raise ContradictionError(f"{self.name}: the server has no bytes {start} to {stop}; was it changed?")
            if response.status_code == 206 and not _starts_at(response, start):
                raise ContradictionError(
                    f"{self.name}: the server sent another part than bytes {start} to {stop} "
                    f"({response.headers.get('Content-Range', 'no Content-Range')})"
                )
            try:
                yield from response.iter_bytes()  # as they come: nothing that arrived is lost with the connection
            except http_error() as error:
                raise TransientError(reason(error)) from None

    def _compare(self, response: Any) -> None:
        """Refuse bytes of another version than the first answer was about."""
        now = (_total(response), None if self.pinned else _version(response))
        if self._seen is None:
            self._seen = now
        for before, after in zip(self._seen, now, strict=True):
            if before is not None and after is not None and before != after:
                raise ContradictionError(
                    f"{self.name} was changed on the server while it was read ({before} became {after}); "
                    "run the command again, or, if it says so each time, download the files and convert them here"
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
            raise TransientError(reason(error)) from None
        except bad_address() as error:
            raise CheckpointError(f"{self.name} is at no valid address, or redirected to one that is not") from error

    def _judge(self, response: Any) -> None:
        status = response.status_code
        if status in (200, 206, 416):
            return
        if status in (404, 410):
            raise NotFoundError(self.name)
        if status in PASSING:
            raise TransientError(f"status {status}", asked_pause(response))
        if status in (401, 403, 407):
            kind = ForbiddenError if status == 403 else CheckpointError
            raise kind(f"{self.name}: the server refuses it (status {status}); {self.refusal}")
        raise CheckpointError(f"{self.name}: the server answers with status {status}; expected 200 or 206")


def asked_pause(response: Any) -> float | None:
    """Return how many seconds a server asks to wait, if it asks."""
    wait = response.headers.get("Retry-After", "")
    return min(float(wait), LONGEST_WAIT) if re.fullmatch(r"\d{1,9}", wait, re.ASCII) else None


class _NoSecrets(logging.Filter):
    """Redacts addresses, whose queries may sign them, and escapes what a terminal would obey."""

    def filter(self, record: logging.LogRecord) -> bool:
        with suppress(TypeError, ValueError):  # a record whose arguments do not fit is logging's to report
            record.msg, record.args = printable(redacted_text(record.getMessage())), ()
        return True


_NO_SECRETS = _NoSecrets()


def keep_secrets_from_logs() -> None:
    """Have the loggers of the HTTP client show no secret of an address, from now on."""
    client = http_error().__module__.partition(".")[0]
    core = client.replace("httpx", "httpcore")
    parts = (f"{core}.{part}" for part in ("connection", "http11", "http2", "proxy", "socks"))
    loggers = [logging.getLogger(name) for name in (client, *parts, "huggingface_hub.utils._http")]
    for each in (*loggers, *logging.getLogger("huggingface_hub").handlers):
        each.addFilter(_NO_SECRETS)  # which adds it once only


def http_error() -> type[Exception]:
    """Return the class of the client's errors, whichever client huggingface_hub is built on."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__[0]


def bad_address() -> tuple[type[Exception], ...]:
    """Return what the client raises for an address that cannot be one."""
    return (UnicodeError, sys.modules[http_error().__module__].InvalidURL)


def reason(error: Exception) -> str:
    """Return what went wrong with a connection, with no secret of an address."""
    return redacted_text(str(error)) or type(error).__name__


def _total(response: Any) -> int | None:
    """Return the size of the whole file, if the answer tells it."""
    if response.headers.get("Content-Encoding", "") not in IDENTITY:
        return None
    if response.status_code == 200:
        length = response.headers.get("Content-Length", "")
        return int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None
    found = re.fullmatch(r"bytes (?:[0-9]+-[0-9]+|\*)/([0-9]{1,18})", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _starts_at(response: Any, start: int) -> bool:
    found = re.match(r"bytes ([0-9]{1,18})-", response.headers.get("Content-Range", ""))
    return found is not None and int(found[1]) == start


def _version(response: Any) -> str | None:
    etag: str = response.headers.get("ETag", "").removeprefix("W/")  # one machine's may be weak, another's not
    return etag or response.headers.get("Last-Modified")
