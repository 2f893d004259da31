"""Make the shared checkpoints and fixtures available to the core's suite and to every plugin's."""

pytest_plugins = ["checkpoints", "installing"]
