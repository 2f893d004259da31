"""Teach vLLM the output type ``eagle``: the entry point of the group ``vllm.general_plugins``.

Stock vLLM knows other types of the format only, and its own EAGLE class has neither the fusion bias nor
the norms of HASS. vLLM calls `register` in every process it starts, before it reads a model's config;
nothing of vLLM is imported before. The draft model itself is in `speculators_eagle.vllm.model`, which
vLLM imports when it loads one.
"""

from __future__ import annotations

import logging
from typing import Any

from packaging.version import InvalidVersion, Version

from speculators import CheckpointError
from speculators_eagle import EagleConfig

TYPE = "eagle"
ARCHITECTURE = "EagleSpeculatorForCausalLM"
MODEL = "speculators_eagle.vllm.model:EagleSpeculatorForCausalLM"

OLDEST = (0, 31)
"""The oldest vLLM that was run. Before 0.30, a compiled draft is taken for that of another head, as the cache looks at
the verifier alone (``SpeculativeConfig.compute_hash``)."""

UNTAGGED = (0, 1)
"""What a build from a checkout without tags calls itself, whatever it is."""

logger = logging.getLogger("vllm.speculators_eagle")  # vLLM's handlers are those of the logger "vllm"


def register() -> None:
    """Register the type and its model, unless vLLM knows the type by itself or lacks what is needed for it.

    Raises nothing: vLLM would not start, whatever it was to serve.
    """
    try:
        _register()
    except Exception as error:  # noqa: BLE001 - whatever another vLLM lacks
        logger.warning(cannot(f"{type(error).__name__}: {error}"))


def _register() -> None:
    from vllm import ModelRegistry, __version__
    from vllm.transformers_utils.configs.speculators.algos import SUPPORTED_SPECULATORS_TYPES, register_speculator

    known = SUPPORTED_SPECULATORS_TYPES.get(TYPE)
    if known is describe:
        return
    if known is not None:
        logger.info("vLLM %s knows speculators of type 'eagle' by itself and is left to it", __version__)
    elif UNTAGGED < _release(__version__) < OLDEST:
        logger.warning(cannot("it is too old"))
    else:
        ModelRegistry.register_model(ARCHITECTURE, MODEL)
        register_speculator(TYPE)(describe)


def describe(config_dict: dict[str, Any], pre_trained_config: dict[str, Any]) -> None:
    """Turn an output's config into that of the draft model, as vLLM asks of each type.

    Args:
        config_dict: The output's whole ``config.json``.
        pre_trained_config: Its ``transformer_layer_config``, which becomes the model's config; the output's
            goes along as its ``speculator``.

    Raises:
        ValueError: It is no config of the type.
    """
    try:
        speculator = EagleConfig.read(config_dict)
    except CheckpointError as error:
        raise ValueError(
            f"this is no config of a speculator of type 'eagle': {error}; convert the original checkpoint again"
        ) from error
    pre_trained_config["speculator"] = speculator.model_dump(mode="json")
    pre_trained_config["architectures"] = [ARCHITECTURE]


def cannot(why: str) -> str:
    """Say that this vLLM cannot be taught."""
    try:
        from vllm import __version__ as found
    except ImportError:
        found = "(not installed)"
    return (
        f"speculators-eagle cannot teach vLLM {found} to serve speculators of type 'eagle': {why}. "
        f"Install vLLM {'.'.join(map(str, OLDEST))} or later; 0.32 is what it was written for"
    )


def _release(version: str) -> tuple[int, ...]:
    try:
        return Version(version).release[:2]
    except InvalidVersion:
        return UNTAGGED
