"""Faults of a filesystem, and signals, at an exact point of a real run of the command line; for Linux.

::

    with Injector(root) as injector:
        whole = injector.run(["convert", ...])
        for number in range(1, len(whole.calls) + 1):
            outcome = injector.run(["convert", ...], fault=Fault(number, "SIGKILL"))

Points are system calls that change something below a folder, or have a change last; see `tracing`, whose
``CALLS`` has them all.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

DRIVER = Path(__file__).with_name("tracing.py")

SLACK = 120.0
"""Seconds that a tracer has beside those of its run, of which the first waits until everything is imported."""


@dataclass(frozen=True)
class Fault:
    """What happens at a changing call, before it is carried out.

    Attributes:
        number: Which call it is, from 1 on.
        action: A signal (``"SIGKILL"``: the call is not carried out; after others, it is), the name of an error
            (``"ENOSPC"``) with which it fails, or ``"pause"``.
        of: Count only calls with this name or of this kind, as ``tracing.CALLS`` has them. Threads make the
            order of all calls vary, but hardly that of one kind.
        lasting: Have all later calls of the same kind fail, too.
    """

    number: int
    action: str
    of: str = ""
    lasting: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        status: The exit code, or minus the signal that ended it.
        stdout: What it printed.
        stderr: What it printed beside that.
        calls: The changing calls that were begun, failed ones too: a name, and paths relative to the root.
        struck: Those of them that faults struck.
    """

    status: int
    stdout: str
    stderr: str
    calls: list[str]
    struck: list[str]

    def numbers(self, part: str) -> list[int]:
        """Return the numbers of the calls that contain a text."""
        return [number for number, call in enumerate(self.calls, 1) if part in call]


class Running:
    """A run that may be paused; one that is not waited for is killed."""

    def __init__(self, args: list[str], connection: socket.socket) -> None:
        self.args = args
        self.channel = connection.makefile("rw")
        self.connection = connection

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *error: object) -> None:
        self.channel.close()
        self.connection.close()

    def paused(self) -> str:
        """Wait until all its threads are stopped, and return the call that comes next."""
        answer = self.receive()
        assert "paused" in answer, f"it ended without a pause: {answer}"
        call: str = answer["paused"]
        return call

    def resume(self, action: str = "") -> None:
        """Let it go on, or do to the call what a fault can do to it."""
        self.send({"action": action})

    def wait(self) -> Outcome:
        """Return the outcome.

        Raises:
            TimeoutError: It took too long and was killed.
        """
        answer = self.receive()
        assert "paused" not in answer, f"it is paused at {answer}"
        if answer["status"] is None:
            raise TimeoutError(f"{self.args} did not end; its last calls: {answer['calls'][-5:]}; {answer['stderr']}")
        return Outcome(**answer)

    def send(self, message: dict[str, Any]) -> None:
        self.channel.write(json.dumps(message) + "\n")
        self.channel.flush()

    def receive(self) -> dict[str, Any]:
        line = self.channel.readline()
        answer = json.loads(line) if line else {"error": "the tracer is gone"}
        if "error" in answer:
            raise RuntimeError(answer["error"])
        assert isinstance(answer, dict)
        return answer


class Injector:
    """Runs the command line in processes of their own, which it disturbs.

    Args:
        root: Calls that concern something outside of this folder go their way and are not counted.
        env: Changes of the environment that libraries read when they are imported, once for all runs.
        timeout: Seconds after which a run is killed.
    """

    def __init__(self, root: Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 60.0) -> None:
        self.root = root
        self.env = env or {}
        self.timeout = timeout

    def __enter__(self) -> Injector:
        if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
            raise RuntimeError("processes are traced on Linux alone, on x86-64 and aarch64")
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.driver = subprocess.Popen(
                [sys.executable, str(DRIVER), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, **self.env},
                start_new_session=True,
            )
        return self

    def __exit__(self, *error: object) -> None:
        self.control.close()
        self.driver.wait()

    def run(self, args: Iterable[object] = (), **how: Any) -> Outcome:
        """Run the command line to its end; `start` says how."""
        with self.start(args, **how) as running:
            return running.wait()

    def start(
        self,
        args: Iterable[object] = (),
        *,
        code: str = "",
        fault: Fault | Iterable[Fault] = (),
        failing: Mapping[str, str] | None = None,
        root: Path | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str | None] | None = None,
        timeout: float | None = None,
    ) -> Running:
        """Start the command line.

        Args:
            args: Its arguments.
            code: Python code that runs in its place, with these arguments.
            fault: What happens to it.
            failing: Names or kinds of calls that always fail → with which error, as on a filesystem that lacks them.
            root: Another root than the injector's.
            cwd: Where it runs; in the root by default.
            env: Variables to change, or to remove when ``None``, among those that the injector was started with.
            timeout: Another limit than the injector's.
        """
        root = root or self.root
        assert root is not None, "name the folder whose changes count"
        request = {
            "code": code,
            "args": [str(each) for each in args],
            "faults": [asdict(each) for each in ([fault] if isinstance(fault, Fault) else fault)],
            "failing": dict(failing or {}),
            "root": str(root.resolve()),
            "cwd": str(cwd or root),
            "env": dict(env or {}),
            "timeout": timeout or self.timeout,
        }
        ours, theirs = socket.socketpair()
        ours.settimeout(request["timeout"] + SLACK)
        with theirs:
            socket.send_fds(self.control, [b"!"], [theirs.fileno()])
        running = Running(request["args"], ours)
        running.send(request)
        return running


@pytest.fixture(scope="session")
def injector() -> Iterator[Injector]:
    """An injector whose runs name their roots."""
    with Injector() as running:
        yield running
