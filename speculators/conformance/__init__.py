"""Check that a plugin keeps what the interface promises: everything that can be told from one tiny checkpoint.

`speculators.testing` runs the checks as tests, ``speculators plugins check`` on an installed plugin's own example.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from speculators.conformance.bench import Bench, NonconformanceError
from speculators.conformance.checks import CHECKS, Check, check_found
from speculators.errors import SpeculatorsError, described

__all__ = ["CHECKS", "Bench", "Check", "NonconformanceError", "Verdict", "judge"]


@dataclass(frozen=True)
class Verdict:
    """The outcome of one check; ``detail`` says what is wrong."""

    check: str
    passed: bool
    detail: str = ""


def judge(bench: Bench, checks: Iterable[Check] = CHECKS) -> list[Verdict]:
    """Run all checks for which there is what they need; a reason that was told already is only referred to."""
    findings: list[Verdict] = []
    told: dict[str, str] = {}
    for check in checks:
        try:
            if not check.applies(bench):
                continue
            check.run(bench)
        except (NonconformanceError, SpeculatorsError) as error:
            reason = str(error) or described(error)
        except Exception as error:  # noqa: BLE001 - whatever a plugin makes of its own data
            reason = described(error)
        else:
            findings.append(Verdict(check.name, True))
            continue
        same = next((name for said, name in told.items() if reason.endswith(said) or said.endswith(reason)), None)
        findings.append(Verdict(check.name, False, reason if same is None else f"as {same!r}"))
        told.setdefault(reason, check.name)
        if check.run is check_found:
            break
    return findings
