"""The transport for every other scheme (``s3://``, ``gs://``, …): whatever driver of fsspec is installed."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from speculators.errors import CheckpointError, UnavailableError
from speculators.sources.locations import is_name
from speculators.sources.remote import ContradictionError, NotFoundError, Stat, TransientError

AT_ONCE = 8 << 20
"""Bytes asked of a driver at a time."""


VERSIONS = ("ETag", "etag", "md5Hash", "crc32c", "generation", "version_id", "checksum", "sha", "content_md5")
"""What drivers call that which changes with the content, the best first."""

TIMES = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")
"""What drivers call the time of the last change. Times of access are none."""


class Driver:
    """A folder that a driver of fsspec reads.

    Args:
        url: The folder.
        name: What messages call it.
    """

    def __init__(self, url: str, name: str) -> None:
        self._url = url
        self._name = name

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        """The `fsspec.AbstractFileSystem`, and its own path of the folder.

        Raises:
            CheckpointError: No driver is installed for it, which names the package; or it cannot begin.
        """
        import fsspec
        from fsspec.registry import known_implementations

        scheme, name = self._url.partition("://")[0], self._name
        try:
            driver, path = fsspec.core.url_to_fs(self._url)
        except ImportError:
            hint = known_implementations.get(scheme, {}).get("err") or "its package could not be imported"
            raise CheckpointError(f"{name}: the driver for {scheme}:// is not installed ({hint})") from None
        except Exception as error:  # noqa: BLE001 - some connect at once, and raise whatever their libraries do
            if isinstance(error, ValueError) and scheme not in known_implementations:
                raise CheckpointError(
                    f"{name}: no installed package reads {scheme}://; expected a local path, a Hugging Face ID, "
                    "hf://, http://, https://, or what a driver of fsspec reads (s3://, gs://, …)"
                ) from None
            raise UnavailableError(f"{name} cannot be reached: {_why(error)}") from None
        return driver, path.rstrip("/")

    def file(self, name: str) -> DriverFile:
        """Return a file in the folder."""
        driver, path = self._opened
        return DriverFile(driver, f"{path}/{name}", f"{self._name}/{name}")

    def names(self) -> Collection[str]:
        """Return the names of the files in the folder."""
        driver, path = self._opened
        try:
            with _told(self._name):
                names = [found.rpartition("/")[2] for found in driver.ls(path, detail=False)]
                return [name for name in names if is_name(name)]
        except (NotFoundError, TransientError):
            return ()


@dataclass
class DriverFile:
    """A file that a driver of fsspec reads.

    Attributes:
        driver: The `fsspec.AbstractFileSystem`.
        path: The driver's own path.
        name: What messages call it.
    """

    driver: Any = field(repr=False)
    path: str = field(repr=False)
    name: str
    _seen: Stat | None = field(default=None, init=False, repr=False)

    def stat(self) -> Stat:
        """Ask the driver what it knows about the file."""
        self._seen = self._stat()
        return self._seen

    def _stat(self) -> Stat:
        with _told(self.name):
            self.driver.invalidate_cache()
            info = self.driver.info(self.path)
            if info.get("type") == "directory":
                raise NotFoundError(self.name)
            told = next((str(info[key]) for key in VERSIONS if info.get(key)), None)
            if told is None and (changed := next((info[key] for key in TIMES if info.get(key)), None)) is not None:
                told = f"{changed} {info.get('size')}"
            return Stat(info.get("size"), told, ranges=info.get("size") is not None)

    def read(self, start: int, stop: int | None) -> Iterator[bytes]:
        """Yield the bytes, some MiB at a time."""
        while stop is None or start < stop:
            end = start + AT_ONCE if stop is None else min(stop, start + AT_ONCE)
            with _told(self.name):
                chunk: bytes = self.driver.cat_file(self.path, start=start, end=end)
            if not chunk:
                break
            yield chunk
            start += len(chunk)
        if self._seen is not None and self._seen != self._stat():
            raise ContradictionError(f"{self.name} was changed while it was read; run the command again")


@contextmanager
def _told(name: str) -> Iterator[None]:
    """Turn what a driver raises into what the core knows, without its text, which may hold secrets."""
    try:
        yield
    except (NotFoundError, CheckpointError):
        raise
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise NotFoundError(name) from None
    except PermissionError:
        raise CheckpointError(
            f"{name}: the server refuses it; the driver takes credentials from its own configuration"
        ) from None
    except (OSError, EOFError) as error:
        raise TransientError(_why(error)) from None
    except Exception as error:  # noqa: BLE001 - drivers raise whatever their libraries do
        raise UnavailableError(f"{name} cannot be read: {_why(error)}") from None


def _why(error: Exception) -> str:
    """Return the kind of an error, and what the system calls it."""
    meaning = error.strerror if isinstance(error, OSError) else None
    return f"{type(error).__name__}{f': {meaning}' if meaning else ''}"
