"""Teach vLLM the output type ``eagle``: the entry point of the group ``vllm.general_plugins``.

Stock vLLM knows other types of the format only, and its own EAGLE class has neither the fusion bias nor
the norms of HASS. vLLM calls `register` in every process it starts, before it reads a model's config;
nothing of vLLM is imported before. The draft model itself is in `speculators_eagle.vllm.model`, which
vLLM imports when it loads one.
"""

from __future__ import annotations

import logging
from typing import Any

TYPE = "eagle"
ARCHITECTURE = "EagleSpeculatorForCausalLM"
MODEL = "speculators_eagle.vllm.model:EagleSpeculatorForCausalLM"

logger = logging.getLogger("vllm.speculators_eagle")  # vLLM's handlers are those of the logger "vllm"


def register() -> None:
    """Register the type and its model, unless vLLM knows the type by itself or lacks what is needed for it.

    Raises nothing: vLLM would not start, whatever it was to serve.
    """
    try:
        from vllm import ModelRegistry
        from vllm.transformers_utils.configs.speculators.algos import SUPPORTED_SPECULATORS_TYPES, register_speculator
    except ImportError as error:
        logger.warning(missing_piece(error))
        return
    known = SUPPORTED_SPECULATORS_TYPES.get(TYPE)
    if known is describe:
        return
    if known is not None:
        logger.info(
            "vLLM %s knows speculators of type 'eagle' by itself; speculators-eagle leaves them to it", _version()
        )
        return
    ModelRegistry.register_model(ARCHITECTURE, MODEL)
    register_speculator(TYPE)(describe)


def describe(config_dict: dict[str, Any], pre_trained_config: dict[str, Any]) -> None:
    """Complete the config of the draft's layer by what the model needs to know, as vLLM asks of each type.

    Args:
        config_dict: The output's whole ``config.json``.
        pre_trained_config: Its ``transformer_layer_config``, which becomes the config of the draft model.

    Raises:
        ValueError: A key is missing that says what the head has.
    """
    missing = [key for key in ("layernorms", "fusion_bias") if not isinstance(config_dict.get(key), bool)]
    if missing:
        raise ValueError(
            f"the config of this speculator of type 'eagle' does not say {' and '.join(missing)} (true or false), "
            "so nothing tells how its draft computes; convert the original checkpoint again"
        )
    pre_trained_config["architectures"] = [ARCHITECTURE]
    for key in ("layernorms", "fusion_bias", "draft_vocab_size", "target_hidden_size"):
        pre_trained_config[key] = config_dict.get(key)


def missing_piece(error: ImportError) -> str:
    """Say which part of vLLM is not where it is looked for."""
    return (
        f"speculators-eagle cannot teach vLLM {_version()} to serve speculators of type 'eagle', as it lacks a part: "
        f"{error}. It was written for vLLM 0.32."
    )


def _version() -> str:
    try:
        from vllm import __version__
    except ImportError:
        return "(not installed)"
    return str(__version__)
