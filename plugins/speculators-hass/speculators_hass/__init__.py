"""Convert HASS draft heads, as HArmonizedSS/HASS and vllm-project/speculators v0.1.0 train them.

HASS trains EAGLE's modules with another objective (``model/cnets_hass.py`` declares what EAGLE's
``cnets1.py`` does), so table, options, output and forward are EAGLE's. Without its three extra norms a
HASS head cannot be told from an EAGLE head, and converts identically.
"""

from __future__ import annotations

from speculators import Checkpoint, ConverterSpec, Example, Verifier, decoder, hookimpl
from speculators_eagle import Eagle, has_layernorms, is_eagle


class Hass(Eagle):
    """HASS, with and without layer norms."""

    name = "hass"
    aliases = ()
    summary = "HASS draft heads, with and without layer norms (HArmonizedSS/HASS)"
    reference = "https://github.com/HArmonizedSS/HASS"
    quirks = (
        "The modules are EAGLE's, trained with another objective. Without its norms, a HASS head cannot be told from "
        "an EAGLE head and converts identically.",
        "The variant with layer norms applies `embed_layernorm` to the token embeddings, `hidden_layernorm` to the "
        "hidden state before the fusion, and `lm_head_layernorm` to what the LM head reads.",
        *Eagle.quirks[1:],
    )

    def recognises(self, source: Checkpoint) -> bool:
        """EAGLE's modules with the norms, the variant that can be told from EAGLE."""
        return is_eagle(source) and has_layernorms(source)

    def example(self, verifier: Verifier) -> Example:
        """A head with the three norms."""
        return decoder.example(verifier, ["layernorms"])


@hookimpl
def register_converter() -> type[ConverterSpec]:
    """Bring the algorithm ``hass``."""
    return Hass
