"""Serve a model with vLLM on a CPU and print what it drafted, what was accepted, and what came out.

Run with the Python of an environment that holds vLLM 0.32 (see vllm-0.32.txt):
``python serve_with_vllm.py MODEL PROMPTS [SPECULATIVE_CONFIG]``. PROMPTS is a JSON file with a list of
prompts as token ids; SPECULATIVE_CONFIG is JSON, as vLLM takes it. Prints one JSON object.
"""

import json
import os
import sys

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

from vllm import LLM, SamplingParams

model, prompts, *speculative = sys.argv[1:]
engine = LLM(
    model=model,
    speculative_config=json.loads(speculative[0]) if speculative else None,
    skip_tokenizer_init=True,
    enforce_eager=True,
    dtype="float32",
    max_model_len=256,
    max_num_seqs=16,
    enable_prefix_caching=False,
    disable_log_stats=False,
    seed=0,
)
with open(prompts) as file:  # noqa: PTH123
    requests = [{"prompt_token_ids": ids} for ids in json.load(file)]
sampling = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, detokenize=False)
tokens = [list(output.outputs[0].token_ids) for output in engine.generate(requests, sampling, use_tqdm=False)]
counts = {metric.name: getattr(metric, "values", getattr(metric, "value", None)) for metric in engine.get_metrics()}
print(
    json.dumps(
        {
            "tokens": tokens,
            "drafts": counts.get("vllm:spec_decode_num_drafts"),
            "accepted": counts.get("vllm:spec_decode_num_accepted_tokens_per_pos"),
        }
    )
)
