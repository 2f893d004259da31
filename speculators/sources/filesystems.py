"""The transport for every other scheme (``s3://``, ``gs://``, …): whatever driver of fsspec is installed."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from speculators.errors import CheckpointError
from speculators.sources.remote import NotFoundError, Stat, TransientError

CHUNK = 8 << 20
"""Bytes asked of a driver at a time."""


class Driver:
    """The driver of fsspec for a folder.

    Args:
        url: The folder.
        name: What messages call it.
        user: User and password in the URL, as ``user:password``.

    Raises:
        CheckpointError: No driver is installed for it, which names the package; or it cannot begin.
    """

    def __init__(self, url: str, name: str, user: str | None) -> None:
        import fsspec
        from fsspec.registry import known_implementations

        scheme = url.partition("://")[0]
        self._name = name
        self._secret = (user or "").partition(":")[2]
        try:
            self._driver, self._path = fsspec.core.url_to_fs(url)
        except ImportError as error:
            hint = known_implementations.get(scheme, {}).get("err") or str(error)
            raise CheckpointError(f"{name}: the driver for {scheme}:// is not installed ({hint})") from error
        except Exception as error:  # some connect at once
            if isinstance(error, ValueError) and scheme not in known_implementations:
                raise CheckpointError(
                    f"{name}: no installed package reads {scheme}://; expected a local path, a Hugging Face ID, "
                    "hf://, http://, https://, or what a driver of fsspec reads (s3://, gs://, …)"
                ) from error
            raise CheckpointError(f"{name} cannot be reached: {shown(error, self._secret)}") from error

    def file(self, name: str) -> DriverFile:
        """Return a file in the folder."""
        return DriverFile(self._driver, f"{self._path.rstrip('/')}/{name}", f"{self._name}/{name}", self._secret)

    def names(self) -> Collection[str]:
        """Return the names of the files in the folder."""
        try:
            with _told(self._name, self._secret):
                return [path.rpartition("/")[2] for path in self._driver.ls(self._path, detail=False)]
        except (NotFoundError, TransientError):
            return ()


@dataclass
class DriverFile:
    """A file that a driver of fsspec reads.

    Attributes:
        driver: The `fsspec.AbstractFileSystem`.
        path: The driver's own path.
        name: What messages call it.
        secret: What must not stand in a message.
    """

    driver: Any = field(repr=False)
    path: str = field(repr=False)
    name: str
    secret: str = field(default="", repr=False)
    _seen: Stat | None = field(default=None, init=False, repr=False)

    def stat(self) -> Stat:
        """Ask the driver what it knows about the file."""
        self._seen = self._stat()
        return self._seen

    def _stat(self) -> Stat:
        with _told(self.name, self.secret):
            self.driver.invalidate_cache()
            info = self.driver.info(self.path)
            if info.get("type") == "directory":
                raise NotFoundError(self.name)
            version = info.get("ETag") or info.get("etag") or info.get("md5Hash") or self.driver.ukey(self.path)
            size = info.get("size")
            return Stat(size, str(version), ranges=size is not None)

    def read(self, start: int, stop: int | None) -> Iterator[bytes]:
        """Yield the bytes, some MiB at a time."""
        while stop is None or start < stop:
            end = start + CHUNK if stop is None else min(stop, start + CHUNK)
            with _told(self.name, self.secret):
                chunk: bytes = self.driver.cat_file(self.path, start=start, end=end)
            if not chunk:
                break
            yield chunk
            start += len(chunk)
        if self._seen is not None and self._seen != self._stat():
            raise CheckpointError(f"{self.name} was changed while it was read; run the command again")


@contextmanager
def _told(name: str, secret: str) -> Iterator[None]:
    """Turn what a driver raises into what the core knows, without secrets."""
    try:
        yield
    except (NotFoundError, CheckpointError):
        raise
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise NotFoundError(name) from error
    except PermissionError as error:
        raise CheckpointError(
            f"{name}: the server refuses it; the driver takes credentials from its own configuration"
        ) from error
    except (OSError, EOFError) as error:
        raise TransientError(shown(error, secret)) from error
    except Exception as error:  # drivers raise whatever their libraries do
        raise CheckpointError(f"{name} cannot be read: {shown(error, secret)}") from error


def shown(error: Exception, secret: str) -> str:
    """Return the kind and the first line of an error, without the secret."""
    line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {line.replace(secret, '…') if secret else line}"
