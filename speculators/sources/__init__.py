"""Checkpoints from anywhere: a local path, the Hugging Face Hub, or a URL.

`find` turns what a user wrote into a `Folder`, which hands out whole files or opens weights for parts of
them. Nothing that a conversion does not need is fetched, what was fetched is kept, and what is read twice
has come from one version.

=====================  =============================================================================
`locations`            what a user means, and what may be shown of it
`folders`, `hub`       folders here, on a server, and on the Hub
`remote`               what a transport offers, and how it is asked again: `web`, `filesystems`
`cache`, `parts`       what was fetched: whole files, and parts of them
`outlines`             PyTorch files of which parts are fetched
`access`               token, cache and offline
=====================  =============================================================================
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

from speculators.errors import CheckpointError
from speculators.sources.access import Access
from speculators.sources.folders import Folder, LocalFolder, Server, UrlFolder
from speculators.sources.locations import HubLocation, LocalLocation, UrlLocation, as_id, local_path, parse, split_url

__all__ = ["Access", "Folder", "HubLocation", "LocalFolder", "LocalLocation", "find", "local_path", "parse"]


def find(location: str | Path, access: Access, *, partly: bool, suffixes: Collection[str]) -> Folder:
    """Return the folder that a user means.

    Args:
        location: A path, a Hugging Face ID or a URL; see `speculators.sources.locations`.
        access: How to reach it.
        partly: Whether weights are wanted in parts, not whole.
        suffixes: Endings of weight files, which tell a file from a folder where nobody else does.

    Raises:
        CheckpointError: There is nothing, or it may not be read; says what to do.
    """
    found = parse(location)
    if isinstance(found, LocalLocation):
        _require_one_meaning(found, access)
        return LocalFolder(found)
    if isinstance(found, HubLocation):
        from speculators.sources.hub import HubFolder

        return HubFolder(found, access, partly=partly, suffixes=suffixes)
    url, file = split_url(found.url, suffixes)
    name, _ = split_url(found.name, suffixes)
    cache = access.own_cache / "url" / hashlib.sha256(url.encode()).hexdigest()[:24]
    return UrlFolder(name, file, cache=cache, server=_server(found, url, name), access=access, partly=partly)


def _server(location: UrlLocation, url: str, name: str) -> Server:
    if location.scheme in ("http", "https"):
        from speculators.sources.web import WebServer

        return WebServer(url, name, location.user)
    from speculators.sources.filesystems import Driver

    return Driver(url, name)


def _require_one_meaning(location: LocalLocation, access: Access) -> None:
    meant = as_id(location)
    if meant is None or not location.path.exists():
        return
    from speculators.sources.hub import is_known

    if is_known(meant, access):
        raise CheckpointError(
            f"{location.given} is both a folder here and a repository of the Hub; "
            f"write ./{location.given} or hf://{location.given}"
        )
