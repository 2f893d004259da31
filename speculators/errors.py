"""Every error that a user can meet, as one tree.

::

    SpeculatorsError
    ├── CheckpointError        the draft or the verifier cannot be read, or is not what it should be
    │   ├── AlreadyConvertedError  the draft is in the speculators format
    │   └── MismatchError          tensors, shapes or configs contradict each other; lists all findings
    ├── AlgorithmError         no such algorithm, none or several recognise the draft
    ├── OptionError            an algorithm option is unknown, ill-typed, or contradicts the draft
    ├── PluginError            an installed plugin is broken or clashes with another
    ├── OutputError            the output cannot be written, or something stands in its place
    └── ValidationError        the converted model failed a check

The command line prints the message of any of these as one error and exits with ``exit_code``;
every other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable


def printable(text: str) -> str:
    """Escape control characters, which names in a stranger's checkpoint or on a server may hold."""
    return "".join(char if char.isprintable() or char == "\n" else f"\\x{ord(char):02x}" for char in text)


class SpeculatorsError(Exception):
    """Base class of everything this package raises on purpose."""

    exit_code = 3


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
        lines = [headline, *(f"    {finding}" for finding in self.findings)]
        if advice:
            lines.append(advice)
        super().__init__("\n".join(lines))


class AlgorithmError(SpeculatorsError):
    """No installed algorithm fits, or several do."""


class OptionError(SpeculatorsError):
    """An algorithm option is unknown, ill-typed, or contradicts the checkpoint."""

    exit_code = 2


class PluginError(SpeculatorsError):
    """An installed plugin cannot be used."""


class OutputError(SpeculatorsError):
    """The output cannot be written where the user wants it."""

    exit_code = 5


class ValidationError(SpeculatorsError):
    """The converted model failed a check; the caller's previous output is untouched."""

    exit_code = 4
