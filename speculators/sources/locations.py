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
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import SplitResult, quote, unquote, urlsplit, urlunsplit

from speculators.errors import CheckpointError

HUB = "https://huggingface.co"
"""The public Hub; ``HF_ENDPOINT`` names another one."""

HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
"""Hosts of the public Hub's pages."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_HALF_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)")
"""A scheme that lacks a slash; one letter and a colon are a drive."""

_REPOSITORY = r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9_][\w.-]*)?"
_ID = re.compile(
    rf"(?![A-Za-z]:[\\/])(?P<repository>{_REPOSITORY})(?:@(?P<revision>[^:]+))?(?::(?P<path>.+))?", re.ASCII
)
_PAGES = ("tree", "blob", "resolve", "raw")
"""What stands between a repository and a revision in the address of a folder or file."""

COMMIT = re.compile(r"[0-9a-f]{40}")
"""The full hash of a commit."""

LONGEST = 240
"""Bytes of a file's name that every common filesystem has room for, and a short ending besides."""

_LONG = r"refs/(?:pr/\d+|convert/[\w.-]+)"
_LONG_REVISION = re.compile(rf"({_LONG})(?:/|$)")
"""Revisions that hold slashes themselves."""

_HF = re.compile(rf"(?P<repository>[^/@]+(?:/[^/@]+)?)(?:@(?P<revision>{_LONG}(?=/|$)|[^/]*))?(?:/(?P<path>.*))?")
"""What follows ``hf://``."""

WRAPPERS = frozenset(
    (
        *("reference", "dir", "generic", "simplecache", "filecache", "blockcache", "cached", "async_wrapper"),
        *("zip", "tar", "libarchive", "data", "local"),
    )
)
"""Drivers of fsspec that read through others, or that take instructions from what they read."""


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
    endpoint: str = field(default=HUB, repr=False)
    bare: bool = False

    @property
    def name(self) -> str:
        """What messages call it."""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repository}{revision}{f':{self.path}' if self.path else ''}"

    @property
    def page(self) -> str:
        """Where a person reads about the repository."""
        return f"{self.hub}/{self.repository}"

    @property
    def hub(self) -> str:
        """What messages call the Hub."""
        return redacted(self.endpoint)


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


def hub_endpoint() -> str:
    """Return the address of the Hub that the environment names.

    Raises:
        CheckpointError: It names something else.
    """
    endpoint = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    if not re.match(r"https?://[^/\s]", endpoint, re.IGNORECASE):
        said = os.environ["HF_ENDPOINT"].rpartition("@")[2]
        raise CheckpointError(f"HF_ENDPOINT is {said!r}; expected an address such as {HUB}")
    return endpoint


def parse(location: str | Path) -> Location:
    """Tell what kind of place a user means.

    A name that exists here is local, also where it could be a Hugging Face ID.

    Raises:
        CheckpointError: It is no place at all.
    """
    if isinstance(location, Path):
        path = local_path(location)
        return LocalLocation(path, str(path))
    exact = bool(location.strip()) and _exists(local_path(location))
    text = location if exact else location.strip()
    if scheme := _SCHEME.match(text):
        return _parse_url(text, scheme[1].lower())
    path = local_path(text)
    exists = exact or (text != location and bool(text) and _exists(path))
    if not text or not (exists or text.isprintable()):
        raise CheckpointError(f"{text!r} is no place of a checkpoint; expected a path, a Hugging Face ID or a URL")
    if not exists and "::" in text and "://" in text:
        raise _led_anywhere(text.partition("::")[0])
    if not exists and (half := _HALF_SCHEME.match(text)):
        if half[1].lower() == "file":
            return _parse_file(urlsplit(text), text)
        raise CheckpointError(f"{half[0]!r} is no place of a checkpoint; write {half[1]}://…")
    if exists or not (found := _ID.fullmatch(text)):
        if not exists and re.fullmatch(rf"{_REPOSITORY}[@:]+", text, re.ASCII):
            raise _no_id(text)
        return LocalLocation(path, str(path) if text.startswith("~") else text, bare=True)
    return replace(_hub(found["repository"], found["revision"], found["path"] or "", text), bare=True)


def as_id(location: LocalLocation) -> HubLocation | None:
    """Return the repository that a local path could mean as well, as it is written ``org/name``."""
    found = _ID.fullmatch(location.given)
    if not location.bare or not found or found["revision"] or found["path"] or "/" not in location.given:
        return None
    try:
        return HubLocation(location.given, endpoint=hub_endpoint())
    except CheckpointError:  # there is no Hub that could have it
        return None


def redacted(url: str) -> str:
    """Return a URL without user, password, query and fragment, all of which may hold secrets."""
    scheme, _, rest = url.partition("://")
    server, slash, path = rest.partition("/")
    if "@" not in server and re.search(r":(?!\d*([?#].*)?$)", re.sub(r"^\[[^\]]*\]", "", server)):
        # What follows the colon is no port: it must be a password, with a slash or another mark in it.
        _, marked, rest = rest.rpartition("@")
        server, slash, path = rest.partition("/") if marked else ("…", "", "")
    user, _, host = server.rpartition("@")
    # Some schemes have something else before the @, such as a container; a password follows a colon.
    server = server if user and ":" not in user and scheme.lower() not in ("http", "https") else host
    return re.split(r"[?#]", f"{scheme}://{server}{slash}{path}", maxsplit=1)[0]


def redacted_text(text: str) -> str:
    """Return a text with every URL in it redacted; of one that holds blanks or quotes, no more than its end is kept."""
    return re.sub(r"\w[\w+.-]*://(?:\S*@)?[^\s()'\"]*", lambda found: redacted(found[0]), text)


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
    except ValueError:
        raise CheckpointError(
            f"{redacted(text)} is no URL: its host or port is not valid; in a user or password, write "
            "/ as %2F, # as %23, ? as %3F and @ as %40"
        ) from None
    if scheme in WRAPPERS or (scheme not in ("http", "https") and "::" in text):
        raise _led_anywhere(scheme)
    if scheme == "file":
        return _parse_file(parts, redacted(text))
    if scheme == "hf":
        return _parse_hf(text, redacted(text))
    if scheme in ("http", "https"):
        if (page := _hub_page(parts)) is not None:
            return page
        if not parts.hostname:
            raise CheckpointError(f"{redacted(text)} names no server")
        address = urlunsplit((scheme, _host(parts), parts.path, parts.query, ""))
        return UrlLocation(address, redacted(text), _user(parts))
    if not (parts.netloc or parts.path.strip("/")):
        raise CheckpointError(f"{redacted(text)} names no place; expected {scheme}://…/FOLDER")
    return UrlLocation(f"{scheme}{text[len(scheme) :]}", redacted(text), _user(parts))


def _user(parts: SplitResult) -> str | None:
    if "@" not in parts.netloc:
        return None
    return f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"


def _parse_file(parts: SplitResult, shown: str) -> LocalLocation:
    from urllib.request import url2pathname

    if parts.netloc not in ("", "localhost"):
        raise CheckpointError(f"{shown} names the machine {_host(parts)!r}; write file:///path for a path of this one")
    if not parts.path:
        raise CheckpointError(f"{shown} names no path; write file:///path")
    path = Path(url2pathname(parts.path))
    return LocalLocation(path, str(path))


def _parse_hf(text: str, shown: str) -> HubLocation:
    """Parse as huggingface_hub does: revisions may be percent-encoded, paths stand as they are."""
    rest = text.partition("://")[2].strip("/")
    kind, _, more = rest.partition("/")
    if kind in ("datasets", "spaces", "buckets", "kernels"):
        raise CheckpointError(f"{shown} names one of the Hub's {kind}; expected a repository of models")
    found = _HF.fullmatch(more if kind == "models" else rest)
    if not found:
        raise _no_id(shown)
    revision = None if found["revision"] is None else unquote(found["revision"])
    return _hub(found["repository"], revision, found["path"] or "", shown)


def _split_revision(text: str) -> tuple[str, str]:
    if found := _LONG_REVISION.match(text):
        return found[1], text[found.end() :]
    revision, _, path = text.partition("/")
    return revision, path


def _hub_page(parts: SplitResult) -> HubLocation | None:
    """Return what a page of the Hub shows; ``None`` for a page of another server."""
    endpoint = hub_endpoint()
    mirror = urlsplit(endpoint)
    inside = f"{parts.path}/"
    if (_host(parts), parts.scheme.lower()) == (_host(mirror), mirror.scheme) and inside.startswith(f"{mirror.path}/"):
        inside = inside[len(mirror.path) :]
    elif _host(parts).lower() not in HUB_HOSTS:
        return None
    elif _host(mirror) in HUB_HOSTS:
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
    path = path.strip("/")
    wrong = not re.fullmatch(_REPOSITORY, repository, re.ASCII) or "--" in repository or ".." in repository
    if wrong or not all(is_inside(text) for text in (revision, path or None) if text is not None):
        raise _no_id(given)
    return HubLocation(repository, revision, path, endpoint or hub_endpoint())


def _led_anywhere(scheme: str) -> CheckpointError:
    return CheckpointError(
        f"{scheme}:// with another address in it is not read, as it could lead anywhere; copy the files first"
    )


def _no_id(given: str) -> CheckpointError:
    shown = re.sub(r"^[^\s/@]+:\S+@", "", redacted_text(given))  # of a URL whose scheme was forgotten
    return CheckpointError(f"{shown} is no Hugging Face ID; expected org/name, org/name@revision or org/name:folder")


def is_name(text: str) -> bool:
    """Tell whether a text can name a file in a folder, and nothing elsewhere, on any system."""
    return "/" not in text and is_inside(text)


def is_inside(path: str) -> bool:
    """Tell whether a relative path cannot lead out of the folder that it starts in, on any system."""
    parts = path.split("/")
    odd = re.search(r"[\\:\x00-\x1f]", path) or any(len(part.encode(errors="replace")) > LONGEST for part in parts)
    return not odd and not {"", ".", ".."} & set(parts)


def split_url(url: str, suffixes: Collection[str]) -> tuple[str, str | None]:
    """Return the folder that a URL means, and the weight file if it names one.

    Raises:
        CheckpointError: The file's name could lead elsewhere.
    """
    address, mark, query = url.partition("?")
    address = address.rstrip("/")
    folder, _, last = address.rpartition("/")
    if last == "config.json":
        return f"{folder}{mark}{query}", None
    if not last.endswith(tuple(suffixes)):
        return f"{address}{mark}{query}", None
    name = unquote(last)
    if not is_name(name):
        raise CheckpointError(f"{redacted(url)} names no file: {name!r} is no name of one")
    return f"{folder}{mark}{query}", name


def below(folder: str, name: str) -> str:
    """Return the URL of a file in a folder, with the folder's query."""
    parts = urlsplit(folder)
    return urlunsplit(parts._replace(path=f"{parts.path}/{quote(name)}"))
