"""What a user means by the place of a checkpoint: a path, a Hugging Face ID, or a URL.

=============================================  ======================================================
``folder``, ``~/folder``, ``file:///folder``   a local folder, or one weight file in it
``org/name``, ``org/name@rev:sub/folder``      a repository of the Hub, at a branch, tag or commit
``hf://org/name@rev/sub/folder``               the same
``https://huggingface.co/org/name/tree/rev``   the same, also on the host that ``HF_ENDPOINT`` names
``https://host/folder``                        a folder or a file that any web server serves
``s3://bucket/folder`` and others              whatever a driver of fsspec reads
=============================================  ======================================================

Nothing is looked at here but whether a local path exists; see `speculators.sources.find`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit, urlunsplit

from speculators.errors import CheckpointError

HUB = "https://huggingface.co"
"""The public Hub; ``HF_ENDPOINT`` names another one."""

HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_REPOSITORY = r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9_][\w.-]*)?"
_ID = re.compile(rf"(?P<repository>{_REPOSITORY})(?:@(?P<revision>[^:]+))?(?::(?P<path>.+))?", re.ASCII)
_PAGES = ("tree", "blob", "resolve", "raw")
"""What stands between a repository and a revision in the address of a folder or file."""

_LONG_REVISION = re.compile(r"(refs/(?:pr/\d+|convert/[\w.-]+))(?:/|$)")
"""Revisions that hold slashes themselves."""

SECRET = re.compile(r"token|secret|signature|password|passwd|credential|api[-_]?key|access[-_]?key|^sig$|^auth", re.I)
"""Names of parameters of a URL whose values are nobody's business."""


@dataclass(frozen=True)
class LocalLocation:
    """A folder or a file of this machine.

    Attributes:
        path: Where it is.
        given: How the user wrote it.
        bare: Whether it was written as text without a scheme, as a Hugging Face ID is.
    """

    path: Path
    given: str
    bare: bool = False

    @property
    def name(self) -> str:
        """What messages call it, and what engines find it under."""
        return self.given


@dataclass(frozen=True)
class HubLocation:
    """A repository of models on the Hub, or a folder or a file in it.

    Attributes:
        repository: ``org/name``.
        revision: Branch, tag or commit; the main branch by default.
        path: Folder or file in it; empty for all of it.
        endpoint: Address of the Hub.
        bare: Whether it was written without a scheme, as a local folder could be.
    """

    repository: str
    revision: str | None = None
    path: str = ""
    endpoint: str = HUB
    bare: bool = False

    @property
    def name(self) -> str:
        """What messages call it."""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repository}{revision}{f':{self.path}' if self.path else ''}"

    @property
    def page(self) -> str:
        """Where a person reads about the repository."""
        return f"{self.endpoint}/{self.repository}"


@dataclass(frozen=True)
class UrlLocation:
    """A folder or a file on another server.

    Attributes:
        url: Its address; one of a web server without user and password.
        name: The same without secrets.
        user: User and password that stood in it, as ``user:password``.
    """

    url: str = field(repr=False)
    name: str
    user: str | None = field(default=None, repr=False)

    @property
    def scheme(self) -> str:
        """``https``, ``s3`` and so on."""
        return self.url.partition("://")[0].lower()


Location = LocalLocation | HubLocation | UrlLocation


def local_path(location: str | Path) -> Path:
    """Return the path that a user means, with ``~`` expanded.

    Raises:
        CheckpointError: There is no such home directory.
    """
    try:
        return Path(location).expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"{location}: {error}") from error


def hub_endpoint(environment: Mapping[str, str] = os.environ) -> str:
    """Return the address of the Hub that the environment names."""
    return (environment.get("HF_ENDPOINT") or HUB).rstrip("/")


def parse(location: str | Path) -> Location:
    """Tell what kind of place a user means.

    A name that exists here is local, also where it could be a Hugging Face ID.

    Raises:
        CheckpointError: It is no place at all.
    """
    text = os.fspath(location)
    if isinstance(location, Path):
        return LocalLocation(local_path(location), text)
    if scheme := _SCHEME.match(text):
        return _parse_url(text, scheme[1].lower())
    path = local_path(text)
    if _exists(path) or not (found := _ID.fullmatch(text)):
        return LocalLocation(path, str(path) if text.startswith("~") else text, bare=True)
    return replace(_hub(found["repository"], found["revision"], found["path"] or "", text), bare=True)


def as_id(location: LocalLocation) -> HubLocation | None:
    """Return the repository that a local path could mean as well, as it is written ``org/name``."""
    found = _ID.fullmatch(location.given)
    if not location.bare or not found or found["revision"] or found["path"] or "/" not in location.given:
        return None
    return HubLocation(location.given, endpoint=hub_endpoint())


def redacted(url: str) -> str:
    """Return a URL without user, password, fragment, and values of parameters that are secrets.

    Query strings of signed addresses are left out as a whole.
    """
    parts = urlsplit(url)
    given = parse_qsl(parts.query, keep_blank_values=True)
    shown = [] if any(SECRET.search(name) for name, _ in given) else given
    return urlunsplit((parts.scheme, _host(parts), parts.path, urlencode(shown), ""))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no path that this system knows: {error}") from error


def _host(parts: SplitResult) -> str:
    return parts.netloc.rpartition("@")[2]


def _parse_url(text: str, scheme: str) -> Location:
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError as error:
        raise CheckpointError(f"{redacted_text(text)} is no URL: {error}") from error
    if scheme == "file":
        return _parse_file(parts, text)
    if scheme == "hf":
        return _parse_hf(text)
    if scheme in ("http", "https"):
        if (page := _hub_page(parts)) is not None:
            return page
        if not parts.hostname:
            raise CheckpointError(f"{redacted(text)} names no server")
        address = urlunsplit((scheme, _host(parts), parts.path, parts.query, ""))
        return UrlLocation(address, redacted(text), _user(parts))
    return UrlLocation(text, redacted(text), _user(parts))


def _user(parts: SplitResult) -> str | None:
    if "@" not in parts.netloc:
        return None
    return f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"


def redacted_text(text: str) -> str:
    """Return what can be shown of a text that may hold a password, although it is no URL."""
    scheme, _, rest = text.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2].partition('?')[0]}"


def _parse_file(parts: SplitResult, text: str) -> LocalLocation:
    from urllib.request import url2pathname

    if parts.netloc not in ("", "localhost"):
        raise CheckpointError(f"{text} names the machine {parts.netloc!r}; write file:///path for a path of this one")
    path = Path(url2pathname(parts.path))
    return LocalLocation(path, str(path))


def _parse_hf(text: str) -> HubLocation:
    rest = unquote(text.partition("://")[2]).strip("/")
    kind, _, more = rest.partition("/")
    if kind in ("datasets", "spaces", "buckets", "kernels"):
        raise CheckpointError(f"{text} names one of the Hub's {kind}; expected a repository of models")
    if kind == "models":
        rest = more
    before, marked, after = rest.partition("@")
    if not marked:
        repository, path = _first_two(rest)
        return _hub(repository, None, path, text)
    revision, path = _split_revision(after)
    return _hub(before, revision, path, text)


def _first_two(path: str) -> tuple[str, str]:
    parts = path.split("/")
    return "/".join(parts[:2]), "/".join(parts[2:])


def _split_revision(text: str) -> tuple[str, str]:
    if found := _LONG_REVISION.match(text):
        return found[1], text[found.end() :]
    revision, _, path = text.partition("/")
    return revision, path


def _hub_page(parts: SplitResult) -> HubLocation | None:
    """Return what a page of the Hub shows; ``None`` for a page of another server."""
    endpoint = hub_endpoint()
    mirror = urlsplit(endpoint)
    inside = parts.path
    if (_host(parts), parts.scheme.lower()) == (mirror.netloc, mirror.scheme) and inside.startswith(f"{mirror.path}/"):
        inside = inside[len(mirror.path) :]
    elif _host(parts).lower() not in HUB_HOSTS:
        return None
    elif endpoint == HUB or mirror.netloc in HUB_HOSTS:
        endpoint = HUB
    # Segments are decoded one by one, as a branch may hold an encoded slash.
    segments = [unquote(segment) for segment in inside.strip("/").split("/")]
    shown = redacted(urlunsplit(parts))
    if segments[0] in ("datasets", "spaces", "buckets", "kernels", "collections", "papers", "docs", "api", ""):
        raise CheckpointError(f"{shown} is no page of a repository of models")
    page = next((number for number in (1, 2) if segments[number : number + 1] and segments[number] in _PAGES), None)
    if page is None:
        if len(segments) > 2:
            raise CheckpointError(f"{shown} is no folder or file of a repository; expected …/tree/REVISION/FOLDER")
        return _hub("/".join(segments), None, "", shown, endpoint)
    repository, rest = "/".join(segments[:page]), segments[page + 1 :]
    if not rest:
        raise CheckpointError(f"{shown} names no revision; expected …/{segments[page]}/REVISION")
    revision, path = rest[0], "/".join(rest[1:])
    if rest[0] == "refs":
        revision, path = _split_revision("/".join(rest))
    return _hub(repository, revision, path, shown, endpoint)


def _hub(repository: str, revision: str | None, path: str, given: str, endpoint: str | None = None) -> HubLocation:
    segments = path.strip("/").split("/") if path.strip("/") else []
    wrong = not re.fullmatch(_REPOSITORY, repository, re.ASCII) or "--" in repository or ".." in repository
    if wrong or revision == "" or any(segment in ("", ".", "..") for segment in segments):
        raise CheckpointError(f"{given} is no Hugging Face ID; expected org/name, org/name@revision or org/name:folder")
    return HubLocation(repository, revision, "/".join(segments), endpoint or hub_endpoint())


def quoted(path: str) -> str:
    """Return a path as it stands in a URL."""
    return quote(path, safe="/")
