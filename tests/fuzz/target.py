"""Have inputs of `readers.read_all` made up, guided by the code that they reach.

::

    pip install -r tests/fuzz/requirements.txt
    python tests/fuzz/target.py -max_total_time=30 -rss_limit_mb=1500 .cache/fuzz tests/fuzz/corpus

What reaches new code is kept in the first folder. An input that fails is written to the current folder, or
where ``-artifact_prefix`` says; it belongs in ``corpus`` once it is understood.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["speculators", "zipfile", "pickletools"]):
    from readers import read_all


def main() -> None:
    """Run until the time is up or something fails."""
    with tempfile.TemporaryDirectory(prefix="speculators-fuzz-") as folder:

        def one(data: bytes) -> None:
            read_all(data, Path(folder))

        atheris.Setup(sys.argv, one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
