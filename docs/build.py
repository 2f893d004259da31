"""Build the site: ``python docs/build.py [FOLDER]``, by default into ``.cache/docs``.

Needs ``docs/requirements.txt``. A page or a heading that a link does not find, a page that nothing leads to, and a
name in a docstring that does not exist are errors. Nothing is fetched.
"""

from __future__ import annotations

import sys
from pathlib import Path

from sphinx.cmd.build import main as sphinx_build

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str]) -> int:
    """Build anew, since pages that come from code do not show what they depend on; return the exit code."""
    output = Path(arguments[0]) if arguments else ROOT / ".cache" / "docs"
    strict = ["--fail-on-warning", "--keep-going", "--nitpicky", "--fresh-env", "--quiet"]
    code = int(sphinx_build([*strict, "--conf-dir", str(ROOT / "docs"), str(ROOT), str(output)]))
    if code == 0:
        sys.stdout.write(f"{output / 'index.html'}\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
