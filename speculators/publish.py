"""Push an output to a repository of the Hub, in one commit, through huggingface_hub.

What can be known before a conversion is asked before it. A repository is treated as a folder here is: a model in it
that a conversion wrote is replaced, anything else is left alone, and so is a card that somebody has changed.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from speculators import __version__
from speculators.errors import ENVIRONMENT, CheckpointError, PublishError, UploadError, described
from speculators.output import CARD_FILE, CONFIG_FILE, OWN_FILES, PROVENANCE_FILE, is_converted, is_unchanged
from speculators.sources import Access, HubLocation, parse
from speculators.sources.locations import hub_endpoint, redacted_text
from speculators.sources.remote import FIRST_RETRIES, TransientError, patiently
from speculators.sources.web import PASSING, TIMEOUT, asked_pause, http_error, keep_secrets_from_logs, reason
from speculators.validation import LOADED

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from speculators.verifier import Verifier

Answer = TypeVar("Answer")

SEES_ALL = frozenset({"read", "write"})
"""Roles of tokens that see every organisation that their user is in."""

TOKEN = "--token, HF_TOKEN or hf auth login"  # noqa: S105 - where one is given


@dataclass(frozen=True)
class Pushed:
    """An output on the Hub.

    Attributes:
        url: Address of its repository.
        notes: What the user should know, one sentence each.
    """

    url: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Standing:
    """What is in a repository: its commit, files that the output does not have, and whether its card was changed."""

    commit: str | None = None
    written: frozenset[str] = frozenset()
    keeps_card: bool = False


@dataclass(frozen=True)
class Destination:
    """A repository of models on the Hub that an output goes to.

    Attributes:
        location: Where it is; ``org/name`` in any case.
        access: How the Hub is reached.
        private: Whether it is made private, if it is made.
    """

    location: HubLocation
    access: Access = field(repr=False)
    private: bool = False

    @classmethod
    def find(cls, repository: str, access: Access, *, private: bool = False) -> Destination:
        """Find out, as far as that can be known, whether an output can go to a repository; nothing is made there.

        Args:
            repository: ``org/name``, or a name of the user's own.
            access: How to reach the Hub.
            private: Whether the repository is to be private.

        Raises:
            PublishError: It is no name of a repository, or the token may not write there, or something else is there.
            CheckpointError: The Hub cannot be reached.
        """
        location = _parse(repository)
        keep_secrets_from_logs()
        if access.is_offline:
            raise PublishError(
                f"offline, nothing can be pushed to {location.name}; leave out --push-to-hub or --offline"
            )
        if not access.hub_token:
            raise PublishError(f"pushing to {location.name} needs a token that may write; pass it with {TOKEN}")
        name = cls(location, access)._own_name()
        found = cls(HubLocation(name, endpoint=location.endpoint), access, private)
        found._survey()
        return found

    @property
    def name(self) -> str:
        """The repository, ``org/name``."""
        return self.location.repository

    def doubts(self, verifier: Verifier) -> list[str]:
        """Say what keeps others from using the output, one sentence each."""
        place = verifier.checkpoint.place
        if "repository" in place.identity:
            return []
        kind = "a path that others do not have" if place.local is not None else "an address that engines do not load"
        return [
            f"config.json names the verifier by {kind}, {verifier.reference}: whoever loads {self.name} must name "
            "another one; convert with its Hugging Face ID as --verifier to have it found"
        ]

    def push(self, folder: Path, message: str) -> Pushed:
        """Upload an output in one commit; what is here stays whatever happens.

        Args:
            folder: The output.
            message: What the commit says.

        Raises:
            PublishError: The Hub does not take it; says what to do.
            UploadError: A network or the Hub keeps it from getting there.
        """
        added = sorted(path.name for path in folder.iterdir() if OWN_FILES.fullmatch(path.name) and path.is_file())
        standing = _Standing()
        try:
            with _without_bars():
                self._ask(lambda: self._api.create_repo(self.name, private=self.private or None, exist_ok=True))
                standing = self._survey()
                stale = sorted(standing.written - {*added})
                added = [name for name in added if name != CARD_FILE or not standing.keeps_card]
                self.access.progress(f"uploading to {self.name}", 0, 0)
                self._ask(lambda: self._commit(folder, added, stale, message, standing.commit), retries=0)
        except (CheckpointError, PublishError) as error:
            kind = UploadError if error.exit_code == ENVIRONMENT else PublishError
            again = shlex.join(self._command(folder, standing, {*added}))
            raise kind(
                f"{error}\nThe output is complete in {folder}, only its upload failed. Try again with\n    {again}"
            ) from error
        kept = f"{CARD_FILE} of {self.name} was changed by somebody and is left as it is"
        return Pushed(self.location.page, (kept,) if standing.keeps_card else ())

    @property
    def _api(self) -> HfApi:
        from huggingface_hub import HfApi

        return HfApi(
            endpoint=self.location.endpoint,
            token=self.access.hub_token,
            library_name="speculators",
            library_version=__version__,
        )

    def _own_name(self) -> str:
        """Return the whole name, in a namespace in which the token may write as far as the Hub tells."""
        told = self._ask(self._api.whoami)
        token = (told.get("auth") or {}).get("accessToken") or {}
        user, role = str(told["name"]), token.get("role")
        if role == "read":
            raise PublishError(
                f"the token may only read; make one that may write at {self.location.hub}/settings/tokens and pass it "
                f"with {TOKEN}"
            )
        owner, slash, name = self.name.rpartition("/")
        mine = [user, *(str(each["name"]) for each in told.get("orgs") or ())]
        if slash and owner not in mine and role in SEES_ALL:
            raise PublishError(
                f"{self.name} belongs to {owner}, and the token is that of {user}"
                f"{f', a member of {_listed(mine[1:])}' if mine[1:] else ''}; name a repository such as {user}/{name}"
            )
        return f"{owner or user}/{name}"

    def _survey(self) -> _Standing:
        """Look at what is in the repository.

        Raises:
            PublishError: Something else than a model that a conversion wrote is, or it is public and should be private.
        """
        from huggingface_hub.errors import RepositoryNotFoundError

        def look() -> Any:
            try:
                return self._api.model_info(self.name, timeout=TIMEOUT)
            except RepositoryNotFoundError:
                return None

        info = self._ask(look)
        if info is None:
            return _Standing()
        if self.private and not info.private:
            raise PublishError(f"{self.location.page} is there already and is public; make it private there first")
        names = {each.rfilename for each in info.siblings or ()}
        written = {name for name in names if OWN_FILES.fullmatch(name)} - {CARD_FILE}
        others = [name for name in names - written if "/" not in name and name.endswith(LOADED)]
        if others:
            raise PublishError(
                f"{self.location.page} has {_listed(sorted(others))}, which engines would load beside a converted "
                "model; name another repository"
            )
        if written and not (CONFIG_FILE in written and is_converted(self._read(CONFIG_FILE, info.sha))):
            raise PublishError(f"{self.location.page} holds something other than a converted model; name another one")
        if written and PROVENANCE_FILE not in written:
            raise PublishError(
                f"{self.location.page} holds a model in the speculators format that no conversion wrote (it has no "
                f"{PROVENANCE_FILE}); name another repository"
            )
        changed = CARD_FILE in names and not is_unchanged(self._read(CARD_FILE, info.sha))
        return _Standing(info.sha, frozenset(written), changed)

    def _read(self, name: str, commit: str) -> bytes:
        cache = self.access.hub_cache
        path = self._ask(lambda: self._api.hf_hub_download(self.name, name, revision=commit, cache_dir=cache))
        return Path(path).read_bytes()

    def _commit(self, folder: Path, added: list[str], stale: list[str], message: str, parent: str | None) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

        operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = []
        operations += [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in added]
        operations += [CommitOperationDelete(path_in_repo=name) for name in stale]
        self._api.create_commit(self.name, operations, commit_message=message, parent_commit=parent)

    def _command(self, folder: Path, standing: _Standing, added: set[str]) -> list[str]:
        """Return the command that uploads the same."""
        command = ["hf", "upload", self.name, str(folder), ".", *(["--private"] if self.private else [])]
        command += ["--exclude", CARD_FILE] if standing.keeps_card else []
        return [*command, *(part for name in sorted(standing.written - added) for part in ("--delete", name))]

    def _ask(self, ask: Callable[[], Answer], retries: int = FIRST_RETRIES) -> Answer:
        """Ask the Hub, again where that may help, and say in one line what stands in the way."""
        return patiently(lambda: self._asking(ask), f"the Hub at {self.location.hub}", "the network", retries)

    def _asking(self, ask: Callable[[], Answer]) -> Answer:
        from huggingface_hub import errors

        try:
            return ask()
        except (CheckpointError, PublishError, MemoryError):
            raise
        except Exception as raised:  # the library, and what it uploads with, raise many kinds
            error: BaseException = raised
            while isinstance(error, RuntimeError) and error.__cause__ is not None:
                error = error.__cause__  # which file it was does not matter
            if isinstance(error, errors.HfHubHTTPError) and getattr(error, "response", None) is not None:
                raise self._refused(error, by_storage=error is not raised) from None
            if isinstance(error, (http_error(), ConnectionError)):
                raise TransientError(reason(error)) from None
            if isinstance(error, (KeyError, TypeError, AttributeError)):
                raise PublishError(
                    f"{self.location.hub} does not answer like a Hub when asked for {self.name}"
                ) from raised
            raise UploadError(f"pushing to {self.name} failed: {redacted_text(described(error))}") from raised

    def _refused(self, error: Any, *, by_storage: bool) -> Exception:
        status = error.response.status_code
        if by_storage:
            return UploadError(f"the storage of {self.location.hub} answers with status {status}")
        said = f": {redacted_text(error.server_message)}" if error.server_message else ""
        if status in PASSING:
            return TransientError(f"status {status}", asked_pause(error.response))
        if status == 401:
            return PublishError(
                f"{self.location.hub} does not accept the token (status 401); pass another with {TOKEN}"
            )
        if status == 403:
            return PublishError(
                f"the token may not write to {self.name} (status 403){said}; pass one that may with {TOKEN}, or name "
                "another repository"
            )
        if status in (409, 412):
            return UploadError(f"{self.name} was changed by somebody else meanwhile (status {status})")
        return PublishError(f"{self.location.hub} answers with status {status} when asked for {self.name}{said}")


def _parse(repository: str) -> HubLocation:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined] # documented nevertheless

    hub_endpoint()  # whose error is another one
    text = repository.strip()
    try:
        location = parse(text if "://" in text else f"hf://{text}")
        if isinstance(location, HubLocation) and not location.revision and not location.path:
            validate_repo_id(location.repository)
            return location
    except (CheckpointError, HFValidationError):
        pass
    raise PublishError(f"{redacted_text(text)!r} is no repository that can be pushed to; expected org/name")


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


@contextmanager
def _without_bars() -> Iterator[None]:
    """Silence the library's own progress bars, as commands have theirs."""
    from huggingface_hub import utils as library

    utils: Any = library  # which documents these, and exports them no further
    shown = not utils.are_progress_bars_disabled()
    utils.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            utils.enable_progress_bars()
