"""Every error that a user can meet, as one tree.

::

    SpeculatorsError
    ├── CheckpointError        the draft or the verifier cannot be read, or is not what it should be
    │   ├── AlreadyConvertedError  the draft is in the speculators format
    │   ├── MismatchError          tensors, shapes or configs contradict each other; lists all findings
    │   └── UnavailableError       a network, a disk or the cache keeps it from being read
    ├── AlgorithmError         no such algorithm, none or several recognise the draft
    ├── OptionError            an algorithm option is unknown, ill-typed, or contradicts the draft
    ├── PluginError            an installed plugin is broken or clashes with another
    ├── ExecutorError          what jobs should run on cannot be used, or died
    ├── OutputError            the output cannot be written, or something stands in its place
    ├── PublishError           the Hub does not take the output: its name, the token, or what is there keeps it
    │   └── UploadError            a network or the Hub keeps the output from getting there
    └── ValidationError        the converted model failed a check

The command line prints the message of any of these as one error and exits with ``exit_code``: 2 for wrong
usage, 3 for bad input or a broken plugin, 4 for a failed validation, 5 for a network, disk or memory that fails;
every other exception is a bug, which keeps its traceback and exits with 1.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speculators.convert import ConversionResult

LONGEST_LINE = 2000
"""Characters of a line that are shown; names in a stranger's checkpoint may have millions."""

MOST_FINDINGS = 100
"""Findings that are shown."""

BUG = 1
"""The exit code of an error that nobody expected."""

ENVIRONMENT = 5
"""The exit code where a network, a disk or memory fails, or something stands in the output's place."""


def printable(text: str) -> str:
    """Escape control characters, which names in a stranger's checkpoint or on a server may hold, and cut long lines.

    What is invisible, or changes the direction in which text is read, counts as a control character.
    """
    return "\n".join(map(_shown, text.split("\n")))


def _shown(line: str) -> str:
    cut = len(line) > LONGEST_LINE
    shown = "".join(char if char.isprintable() else _escaped(ord(char)) for char in line[:LONGEST_LINE])
    return f"{shown}… ({len(line)} characters)" if cut else shown


def _escaped(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def described(error: BaseException) -> str:
    """Name an exception and say its message, on one line."""
    try:
        message = " ".join(str(error).split())
    except Exception:  # noqa: BLE001 - it is a stranger's exception
        message = "with a message that cannot be read"
    return f"{type(error).__name__}: {message}"


NO_MEMORY = ("not enough memory", "allocate memory", "failed to map segment", "can't start new thread")
"""How errors are worded that mean a lack of memory, but are of a kind that means something else."""


class SpeculatorsError(Exception):
    """Base class of everything this package raises on purpose."""

    exit_code = 3

    def __reduce__(self) -> tuple[Any, ...]:
        """Let it pass from one process to another, whatever its constructor asks for."""
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[SpeculatorsError], said: tuple[Any, ...], members: Mapping[str, Any]) -> SpeculatorsError:
    error = kind.__new__(kind, *said)
    error.__dict__.update(members)
    return error


class CheckpointError(SpeculatorsError):
    """A draft or verifier checkpoint cannot be read or used."""


class AlreadyConvertedError(CheckpointError):
    """The draft is in the speculators format already."""


class MismatchError(CheckpointError):
    """Draft, table, config and verifier do not fit together.

    ``findings`` holds one line per fact, so that the user sees all of them at once.
    """

    def __init__(self, headline: str, findings: Iterable[str], advice: str = "") -> None:
        self.headline = headline
        self.findings = tuple(findings)
        lines = [headline, *(f"    {finding}" for finding in self.findings[:MOST_FINDINGS])]
        if len(self.findings) > MOST_FINDINGS:
            lines.append(f"    and {len(self.findings) - MOST_FINDINGS} more")
        if advice:
            lines.append(advice)
        super().__init__("\n".join(lines))


class UnavailableError(CheckpointError):
    """A network, a disk or the cache keeps a checkpoint from being read; nothing is known to be wrong with it."""

    exit_code = ENVIRONMENT


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that memory was not enough; torch and the loader of libraries say so in a text."""
    said = isinstance(error, RuntimeError | ImportError) and any(text in str(error) for text in NO_MEMORY)
    return said or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


@contextmanager
def reading(name: object) -> Iterator[None]:
    """Say which file could not be read.

    Raises:
        UnavailableError: In place of any `OSError`, but where a file is missing.
        CheckpointError: In place of that.
    """
    try:
        yield
    except OSError as error:
        kind = CheckpointError if isinstance(error, FileNotFoundError) else UnavailableError
        raise kind(f"{name} cannot be read: {error.strerror or error}") from error


class AlgorithmError(SpeculatorsError):
    """No installed algorithm fits, or several do."""


class OptionError(SpeculatorsError):
    """An algorithm option is unknown, ill-typed, or contradicts the checkpoint."""

    exit_code = 2


class PluginError(SpeculatorsError):
    """An installed plugin cannot be used."""


class OutputError(SpeculatorsError):
    """The output cannot be written where the user wants it."""

    exit_code = ENVIRONMENT


class PublishError(SpeculatorsError):
    """The Hub does not take an output: a wrong name, a token that may not write, something else in its place.

    Attributes:
        result: What `convert_model` did before; ``None`` where nothing was converted.
    """

    result: ConversionResult | None = None


class UploadError(PublishError):
    """A network or the Hub keeps an output from getting there; nothing is known to be wrong with either."""

    exit_code = ENVIRONMENT


class ExecutorError(SpeculatorsError):
    """What jobs should run on cannot be used, or a process or machine of it died."""

    exit_code = ENVIRONMENT


class ValidationError(SpeculatorsError):
    """The converted model failed a check; the caller's previous output is untouched."""

    exit_code = 4


def explained(error: Exception) -> tuple[str, int]:
    """Return what to print about an error, and the exit code."""
    if isinstance(error, SpeculatorsError):
        return f"Error: {printable(str(error))}", error.exit_code
    if is_out_of_memory(error):
        return "Error: out of memory; nothing was kept. Make some free, or convert on a larger machine", ENVIRONMENT
    if isinstance(error, OSError):
        return f"Error: {printable(str(error))}", ENVIRONMENT
    if isinstance(error, TypeError | ValueError):  # what reading entry points ends with, where one package is damaged
        from speculators.discovery import unreadable

        if found := "; ".join(unreadable()):
            return f"Error: {printable(found)}", SpeculatorsError.exit_code
    from speculators import __version__

    return f"{traced(error)}This is a bug of speculators {__version__}; please report it with the lines above", BUG


def traced(error: BaseException) -> str:
    """Return where an error comes from, through all its causes, without secrets."""
    from speculators.sources.locations import redacted_text

    return printable(redacted_text("".join(traceback.format_exception(error))))
