"""Make the shared checkpoints and fixtures available to the core's suite and to every plugin's."""

import atexit
import os
import shutil
import tempfile

import pytest

# Before huggingface_hub reads them: no login and no cache of the person who runs the tests, and no Hub but
# the one that a test starts on loopback, which does not speak Xet.
_home = tempfile.mkdtemp(prefix="speculators-tests-")
atexit.register(shutil.rmtree, _home, ignore_errors=True)
os.environ |= {"HF_HOME": _home, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_XET": "1"}
for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "HF_ASSETS_CACHE", "HF_TOKEN_PATH"):
    os.environ.pop(_name, None)

pytest_plugins = ["checkpoints", "injection", "installing", "loopback"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add what makes suites longer."""
    parser.addoption(
        "--kill-points", choices=("some", "all"), default="some", help="Disturb conversions of some or all heads."
    )
