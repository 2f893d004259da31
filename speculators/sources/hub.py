"""Repositories of the Hugging Face Hub, through huggingface_hub: its login, its cache, its errors.

Whole files lie where every other program that uses huggingface_hub finds them. Before it registers one there
it is fetched here, as its own downloads begin anew after an interruption; and what arrived is compared
with the checksum that the Hub names.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from threading import Thread
from typing import Any

from speculators import __version__
from speculators.errors import CheckpointError, UnavailableError
from speculators.sources.access import Access
from speculators.sources.cache import download, feed, note, storing
from speculators.sources.folders import Folder, Opener, open_partly
from speculators.sources.locations import COMMIT, HubLocation, is_inside
from speculators.sources.parts import Pieces
from speculators.sources.remote import (
    FIRST_RETRIES,
    Stat,
    TransientError,
    UnreachableError,
    patiently,
)
from speculators.sources.web import (
    PASSING,
    TIMEOUT,
    WebFile,
    asked_pause,
    bad_address,
    http_error,
    keep_secrets_from_logs,
    reason,
)
from speculators.weights import WeightFile

LOOK = 3.0
"""Seconds for a look whether a name that is a local folder is also one of the Hub."""

_SILENT: set[str] = set()
"""Hubs that did not answer a look in time; this process does not wait for them again."""

_SHOWN = 6
"""How many names a message lists."""


class HubFolder(Folder):
    """A repository of models, or a folder or a file in it, at one commit.

    Args:
        location: What the user named.
        access: How to reach it.
        partly: Whether weights are to be fetched in parts.
        suffixes: Endings of weight files.

    Raises:
        CheckpointError: There is no such repository, revision or folder, or it may not be read.
    """

    def __init__(self, location: HubLocation, access: Access, *, partly: bool, suffixes: Collection[str]) -> None:
        keep_secrets_from_logs()
        self.name = location.name
        self._location = location
        self._access = access
        self._partly = partly
        self._suffixes = tuple(suffixes)
        self._storage = access.hub_cache / _storage_name(location)
        self._certain = True
        self._away = access.is_offline
        self.commit, files = self._cached() if self._away else self._asked()
        inside, self.file = location.path, None
        if inside == "config.json" or inside.endswith("/config.json"):
            inside = inside.rpartition("/")[0]
        if inside in files and inside.endswith(self._suffixes):
            inside, _, self.file = inside.rpartition("/")
        self._inside = f"{inside}/" if inside else ""
        found = [path.removeprefix(self._inside) for path in files if path.startswith(self._inside)]
        self._names = {name for name in found if "/" not in name}
        self._folders = {f"{name.rpartition('/')[0]}/" for name in found if "/" in name}
        if location.path and not found:
            raise CheckpointError(
                f"{location.repository} has no folder or weight file {location.path!r}; it has {_listed(sorted(files))}"
            )

    def has(self, name: str) -> bool:
        """Tell whether a file is in it.

        Raises:
            CheckpointError: Nobody can tell, as it is not in the cache and nobody can be asked.
        """
        if name in self._names or self._certain:
            return name in self._names
        if name.endswith(self._suffixes) and not any(each.endswith(self._suffixes) for each in self._names):
            raise self._not_cached(name)
        return False

    def listing(self) -> Collection[str]:
        """Return the names of all its files, and of the folders in it, which end in a slash."""
        return sorted(self._names) + sorted(self._folders)

    def path(self, name: str) -> Path:
        """Return where the cache has a file, fetched first if it must be."""
        if not self.has(name):
            raise FileNotFoundError(name)
        kept = self._snapshot / f"{self._inside}{name}"
        if self._away:
            if not kept.exists():
                raise self._not_cached(name)
            return kept
        if not kept.exists():
            kept = self._fetch(f"{self._inside}{name}")
        self._refer()
        return kept

    def open(self, name: str, opener: Opener) -> WeightFile:
        """Open a weight file, in parts where that was asked for and the format allows it."""
        if not self.has(name):
            raise FileNotFoundError(name)
        inside = f"{self._inside}{name}"
        if (self._snapshot / inside).exists() or not self._partly:
            return opener.read(self.path(name))
        kept = self._access.own_cache / "hub" / self._storage.name / self.commit / inside
        size, ranges = next((int(path.name) for path in kept.glob("size/[0-9]*")), None), True
        if self._away:
            if size is None:
                raise self._not_cached(name)
            pieces = Pieces(None, f"{self._location.repository}/{inside}", kept)
            return opener.read_partly(pieces, size, lambda why: opener.read(self.path(name)))
        file = self._web(inside, size)
        if size is None:
            stat = patiently(file.stat, file.name, "the network")
            size, ranges = stat.size, stat.ranges
            if ranges and size is not None:
                note(kept / "size" / str(size), b"")
        return open_partly(file, Stat(size, self.commit, ranges), kept, opener, lambda: self.path(name))

    @property
    def reference(self) -> str:
        """The repository, which engines load from its main branch."""
        inside = self._inside.rstrip("/")
        return f"{self._location.repository}{f':{inside}' if inside else ''}"

    @property
    def loadable(self) -> bool:
        """Whole repositories are, folders in them are not."""
        return not self._inside

    @property
    def revision(self) -> str | None:
        """The branch, tag or commit that the user named."""
        return self._location.revision

    @property
    def identity(self) -> Mapping[str, object]:
        """Repository, commit, and folder or file, which mean the same content for ever."""
        found: dict[str, object] = {"repository": self._location.repository, "commit": self.commit}
        found |= {"path": self._inside.rstrip("/")} if self._inside else {}
        return found | ({"file": self.file} if self.file else {})

    @property
    def _snapshot(self) -> Path:
        return self._storage / "snapshots" / self.commit

    @cached_property
    def _token(self) -> str | bool:
        return self._access.hub_token

    def _asked(self) -> tuple[str, list[str]]:
        """Ask the Hub for the commit and its files; where it cannot be reached, take what is cached."""
        from huggingface_hub import HfApi

        location = self._location
        api = HfApi(
            endpoint=location.endpoint, token=self._token, library_name="speculators", library_version=__version__
        )
        try:
            info = self._patiently(
                lambda: api.model_info(location.repository, revision=location.revision, timeout=TIMEOUT)
            )
        except UnreachableError as error:
            try:
                commit, files = self._cached()
            except CheckpointError as nothing:
                raise UnreachableError(f"{error}, and {nothing}") from error
            self._away = True
            warnings.warn(f"{error}; the cached commit {commit} is used", stacklevel=2)
            return commit, files
        if not COMMIT.fullmatch(info.sha or ""):
            raise CheckpointError(f"{location.hub} names no commit of {self.name}; is it a Hub?")
        files = sorted(each.rfilename for each in info.siblings or () if is_inside(each.rfilename))
        note(self._listed_in(info.sha), json.dumps(files).encode())
        return info.sha, files

    def _listed_in(self, commit: str) -> Path:
        """Return where it is kept which files a commit has; huggingface_hub keeps those that were fetched."""
        return self._access.own_cache / "hub" / self._storage.name / commit / "files.json"

    def _cached(self) -> tuple[str, list[str]]:
        revision = self._location.revision or "main"
        commit = revision
        if not COMMIT.fullmatch(revision):
            reference = self._storage / "refs" / revision
            commit = reference.read_text(errors="replace").strip() if reference.is_file() else ""
            if not COMMIT.fullmatch(commit):
                commit = ""
        files: list[str] = []
        if commit:
            with suppress(OSError, ValueError):
                return commit, json.loads(self._listed_in(commit).read_bytes())
            folder = self._storage / "snapshots" / commit
            files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            self._certain = False
        if not files:
            here = ", and there is no folder of this name here" if self._location.bare else ""
            raise UnavailableError(
                f"nothing of {self.name} is in the cache {self._access.hub_cache}{here}{self._others()}"
            )
        return commit, files

    def _others(self) -> str:
        """Say what the cache has of the repository instead."""
        refs, snapshots = self._storage / "refs", self._storage / "snapshots"
        names = [path.relative_to(refs).as_posix() for path in refs.rglob("*") if path.is_file()]
        names += [path.name for path in snapshots.glob("*")]
        has = f" (of it the cache has {_listed(sorted(names))})" if names else ""
        return f"{has}; run once without --offline" if self._away else has

    def _not_cached(self, name: str) -> UnavailableError:
        files = [each.relative_to(self._snapshot).as_posix() for each in self._snapshot.rglob("*") if each.is_file()]
        return UnavailableError(
            f"{self.name} at commit {self.commit}: {name} is not in the cache {self._access.hub_cache}, and offline "
            f"nothing can be fetched (it has {_listed(sorted(files)) or 'nothing'}); run once with the Hub in reach"
        )

    def _fetch(self, inside: str) -> Path:
        """Fetch one file into huggingface_hub's cache."""
        import huggingface_hub as hub

        location, cache = self._location, self._access.hub_cache
        common: dict[str, Any] = {"token": self._token, "endpoint": location.endpoint}
        common |= {"library_name": "speculators", "library_version": __version__}
        url = hub.hf_hub_url(location.repository, inside, revision=self.commit, endpoint=location.endpoint)
        told = self._patiently(lambda: hub.get_hf_file_metadata(url, timeout=TIMEOUT, **common))
        if told.etag is None or not re.fullmatch(r"[\w-][\w.+=-]{0,199}", told.etag, re.ASCII):
            raise CheckpointError(
                f"{location.hub} gives {inside} of {self.name} the ETag {told.etag!r}, which is none; is it a Hub?"
            )
        blob = self._storage / "blobs" / told.etag
        with storing(blob, told.size):
            if not blob.exists():
                download(
                    self._web(inside),
                    Stat(told.size, told.etag),
                    blob,
                    check=lambda path: _is(path, told.etag or ""),
                    progress=self._access.progress,
                )
            registered = self._patiently(
                lambda: hub.hf_hub_download(
                    location.repository, inside, revision=self.commit, cache_dir=cache, etag_timeout=TIMEOUT, **common
                ),
                retries=0,  # it makes some itself
            )
        return Path(registered)

    def _refer(self) -> None:
        """Note which commit the revision was, as huggingface_hub does, for when nobody can be asked."""
        revision = self._location.revision or "main"
        if not COMMIT.fullmatch(revision):
            reference = self._storage / "refs" / revision
            note(reference, self.commit.encode())

    def _web(self, inside: str, size: int | None = None) -> WebFile:
        import huggingface_hub as hub
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined] # documented nevertheless

        location = self._location
        url = hub.hf_hub_url(location.repository, inside, revision=self.commit, endpoint=location.endpoint)
        headers = build_hf_headers(token=self._token, library_name="speculators", library_version=__version__)
        return WebFile(url, f"{location.repository}/{inside}", headers, self._refusal, pinned=True, size=size)

    @property
    def _refusal(self) -> str:
        return f"see {self._location.page}, and pass a token that may read it with --token, HF_TOKEN or hf auth login"

    def _patiently(self, ask: Callable[[], Any], retries: int = FIRST_RETRIES) -> Any:
        """Ask the Hub, again where that may help, and say in one line what stands in the way."""
        return patiently(lambda: self._asking(ask), f"the Hub at {self._location.hub}", "the network", retries)

    def _asking(self, ask: Callable[[], Any]) -> Any:
        from huggingface_hub import errors

        location, name = self._location, self._location.repository
        try:
            return ask()
        except errors.GatedRepoError:
            raise CheckpointError(
                f"{name} is gated: ask for access at {location.page}, then pass a token with --token, HF_TOKEN or "
                "hf auth login"
            ) from None
        except errors.RevisionNotFoundError:
            raise CheckpointError(
                f"{name} has no revision {location.revision or 'main'!r}{self._revisions()}"
            ) from None
        except errors.RepositoryNotFoundError:
            here = "; there is no folder of this name here either" if location.bare else ""
            token = "" if self._token else ", or pass a token with --token, HF_TOKEN or hf auth login"
            raise CheckpointError(
                f"{location.hub} has no repository {name}, or it is private and not to be seen "
                f"{'with this token' if self._token else 'without a token'}{here}; check the name{token}"
            ) from None
        except errors.LocalEntryNotFoundError as error:  # how the library says that it could not ask
            raise self._refused(error.__cause__) from None
        except errors.EntryNotFoundError:
            raise CheckpointError(f"{self.name} does not have a file that it lists; try again") from None
        except errors.HfHubHTTPError as error:
            raise self._refused(error) from None
        except errors.HFValidationError:
            raise CheckpointError(f"{name} is no Hugging Face ID; expected org/name") from None
        except (http_error(), ConnectionError) as error:
            raise TransientError(reason(error)) from None
        except bad_address():
            raise CheckpointError(f"{location.hub} is no address of a Hub; is HF_ENDPOINT right?") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{location.hub} does not answer like a Hub when asked for {name}") from error

    def _refused(self, error: Any) -> Exception:
        if not hasattr(error, "response"):
            return TransientError(reason(error) if error else "it does not answer")
        status = error.response.status_code
        if status == 401:
            return CheckpointError(f"{self._location.hub} does not accept the token (status 401); {self._refusal}")
        if status == 403:
            return CheckpointError(f"{self.name} may not be read with this token (status 403); {self._refusal}")
        if status in PASSING:
            return TransientError(f"status {status}", asked_pause(error.response))
        return CheckpointError(
            f"{self._location.hub} answers with status {status} when asked for {self.name}; is HF_ENDPOINT right?"
        )

    def _revisions(self) -> str:
        """Say which revisions there are, if that can be learnt."""
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self._location.endpoint, token=self._token)
        try:
            refs = api.list_repo_refs(self._location.repository)
        except Exception:  # noqa: BLE001 - it would only have been a help
            return ""
        return f"; it has {_listed([each.name for each in (*refs.branches, *refs.tags)])}"


def is_known(location: HubLocation, access: Access) -> bool:
    """Tell whether a repository is in the cache or, unless that takes long or is forbidden, on the Hub."""
    if (access.hub_cache / _storage_name(location)).is_dir():
        return True
    if access.is_offline or location.endpoint in _SILENT:
        return False
    from huggingface_hub import HfApi

    keep_secrets_from_logs()
    found: list[object] = []

    def look() -> None:
        with suppress(Exception):  # then nobody can have meant it
            api = HfApi(endpoint=location.endpoint, token=access.hub_token)
            found.append(api.model_info(location.repository, timeout=LOOK))

    looking = Thread(target=look, daemon=True)
    looking.start()
    looking.join(LOOK)
    if looking.is_alive():
        _SILENT.add(location.endpoint)
    return bool(found)


def _storage_name(location: HubLocation) -> str:
    return f"models--{location.repository.replace('/', '--')}"


def _listed(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:_SHOWN])
    return shown + (", …" if len(names) > _SHOWN else "")


def _is(path: Path, etag: str) -> bool:
    """Compare a file with its ETag: the SHA-256 of a large file, git's hash of a small one.

    Mirrors may name the plain SHA-1 of a small one. What has another form is no checksum.
    """
    if re.fullmatch(r"[0-9a-f]{64}", etag):
        digests = [hashlib.sha256()]
    elif re.fullmatch(r"[0-9a-f]{40}", etag):
        of_git = f"blob {path.stat().st_size}\0".encode()
        digests = [hashlib.sha1(start, usedforsecurity=False) for start in (of_git, b"")]
    else:
        return True
    feed(path, *digests)
    return any(digest.hexdigest() == etag for digest in digests)
