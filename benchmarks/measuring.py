"""Run commands side by side and keep their times and peaks of memory."""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Measured:
    """One command, its wall times in seconds, and the highest peak of its resident memory in MB.

    Attributes:
        command: What is run.
        output: File or folder that it makes; removed before and after each run.
    """

    command: list[str]
    output: Path | None = None
    seconds: list[float] = field(default_factory=list)
    peak: float = 0.0

    def run(self) -> None:
        """Run the command once, on a disk that has nothing else to do.

        ``ru_maxrss`` of a child is at least its parent's, so whoever calls this must import nothing large.
        """
        self.clean()
        os.sync()
        with tempfile.TemporaryFile() as errors:
            started = time.perf_counter()
            process = subprocess.Popen(
                self.command, stdout=subprocess.DEVNULL, stderr=errors, cwd=tempfile.gettempdir()
            )
            _, status, usage = os.wait4(process.pid, 0)
            self.seconds.append(time.perf_counter() - started)
            process.returncode = status
            if status:
                errors.seek(0)
                raise SystemExit(f"{' '.join(self.command)} failed: {errors.read().decode()}")
        self.peak = max(self.peak, usage.ru_maxrss / 1000)
        self.clean()

    def clean(self) -> None:
        """Remove the output."""
        if self.output is not None and self.output.is_dir():
            shutil.rmtree(self.output)
        elif self.output is not None:
            self.output.unlink(missing_ok=True)

    @property
    def median(self) -> float:
        """Median wall time in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> str:
        """The shortest and the longest time."""
        return f"{min(self.seconds):.2f} to {max(self.seconds):.2f}"


def measure(rounds: int, commands: Iterable[Measured]) -> None:
    """Run each command ``rounds`` times, and once before that to warm the caches.

    Each round runs all of them, in an order of its own, so that a slow minute of the machine falls on all.
    """
    order = list(commands)
    for each in order:
        each.run()
        each.seconds, each.peak = [], 0.0
    shuffler = random.Random(0)
    for _ in range(rounds):
        shuffler.shuffle(order)
        for each in order:
            each.run()
