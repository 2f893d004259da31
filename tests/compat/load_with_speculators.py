"""Load converted EAGLE-3 models with speculators 0.9.0 and print what it finds missing or unexpected.

Run with the Python of an environment that holds speculators 0.9.0 (see speculators-0.9.txt):
``python load_with_speculators.py CONVERTED...``. Prints one JSON object per line.
"""

import json
import sys
from importlib.metadata import version

from speculators.models.eagle3 import Eagle3DraftModel

assert version("speculators") == "0.9.0", version("speculators")
for path in sys.argv[1:]:
    # Its own from_pretrained cannot pass the loading report on; the one it inherits can.
    model, report = super(Eagle3DraftModel, Eagle3DraftModel).from_pretrained(path, output_loading_info=True)
    found = {key: sorted(map(str, report[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    layer = model.config.transformer_layer_config
    found |= {"path": path, "rope_parameters": layer.rope_parameters, "head_dim": layer.head_dim}
    print(json.dumps(found))
