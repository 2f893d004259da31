"""Engines that run in environments of their own, which .ci/run and .ci/serve make (see tests/compat)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

COMPAT = Path(__file__).parent / "compat"


def interpreter(variable: str) -> Path:
    """Return the interpreter of an engine's environment, which an environment variable names."""
    assert variable in os.environ, f"set {variable} to the interpreter of the environment that .ci/environment makes"
    return Path(os.environ[variable])


def environment(**more: str) -> dict[str, str]:
    """Return the variables with which engines run: they ask no Hub and report to nobody."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **more}


def run(variable: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run an engine's interpreter to its end, whatever that is."""
    command = [interpreter(variable), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
