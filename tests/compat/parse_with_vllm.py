"""Parse converted models with vLLM's own config code and print what the engine would see.

Run with the Python of an environment that holds vLLM 0.32 (see vllm-0.32.txt):
``python parse_with_vllm.py CONVERTED...``. Prints one JSON object per line.
"""

import json
import sys

from vllm.transformers_utils.config import get_config, maybe_override_with_speculators

for path in sys.argv[1:]:
    config = get_config(path, trust_remote_code=False)
    verifier, _, speculative = maybe_override_with_speculators(model=path, tokenizer=None, trust_remote_code=False)
    seen = {key: getattr(config, key, None) for key in (
        "architectures", "rope_parameters", "norm_before_residual", "norm_before_fc", "fc_norm", "norm_output",
        "draft_vocab_size", "target_hidden_size", "eagle_aux_hidden_state_layer_ids", "num_aux_hidden_states",
        "head_dim", "attention_bias", "num_hidden_layers", "max_position_embeddings",
    )}  # fmt: skip
    print(json.dumps({"path": path, "verifier": verifier, "speculative": speculative, "config": seen}))
