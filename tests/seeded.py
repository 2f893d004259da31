"""Mistakes in a plugin, each made by one change of the text of `ladder`, and what the conformance suite says of them."""

# ruff: noqa: E501 - the text of the plugin is shown as it is

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

LADDER = (Path(__file__).parent / "ladder" / "speculators_ladder" / "__init__.py").read_text()


@dataclass(frozen=True)
class Mistake:
    """One mistake, and what tells of it.

    Attributes:
        what: What somebody did wrong.
        changes: What the right plugin says → what is said instead.
        check: The first check that fails, with a checkpoint and what the original code computed on it; empty where
            only the example is wrong.
        says: What it says.
        alone: The first one that fails with nothing but the plugin's own example; empty where none does.
        bare: The first one that fails where the plugin has no `original`, if that is another one.
    """

    what: str
    changes: dict[str, str]
    check: str
    says: str
    alone: str
    bare: str = ""

    @property
    def source(self) -> str:
        """The plugin with the mistake."""
        return changed(self.changes)


def changed(changes: dict[str, str]) -> str:
    """Return the text of the plugin with other passages, each of which it has once."""
    source = LADDER
    for old, new in changes.items():
        if source.count(old) != 1:
            raise AssertionError(f"{old!r} is {source.count(old)} times in the plugin")
        source = source.replace(old, new)
    return source


def without_original(source: str) -> str:
    """Return the text of a plugin that does not say what its training code computes."""
    before, _, rest = source.partition("    def original(")
    return before + "    def build(" + rest.partition("    def build(")[2]


MISTAKES = (
    Mistake(
        "a row is missing",
        {'            Rename("rungs.{0:L}.tilt.weight", "steps.{0:L}.tilt.weight", "H, H"),\n': ""},
        "accounted",
        "rungs.{0…1}.tilt.weight F32 [64, 64]: matches no row of the table",
        "forward",
    ),
    Mistake(
        "a row is there twice",
        {
            '            Rename("rungs.{0:L}.turn.weight", "steps.{0:L}.turn.weight", "H, H"),\n': '            Rename("rungs.{0:L}.turn.weight", "steps.{0:L}.turn.weight", "H, H"),\n            Rename("rungs.{0:L}.turn.weight", "steps.{0:L}.turn.weight", "H, H"),\n'
        },
        "found",
        "rows 'rungs.{0:L}.turn.weight' and 'rungs.{0:L}.turn.weight' both match",
        "found",
    ),
    Mistake(
        "two rows write one tensor",
        {'"steps.{0:L}.tilt.weight", "H, H"': '"steps.{0:L}.turn.weight", "H, H"'},
        "found",
        "two rows write 'steps.0.turn.weight': 'rungs.{0:L}.turn.weight' and 'rungs.{0:L}.tilt.weight'",
        "found",
    ),
    Mistake(
        "a target that the built model does not have",
        {'"steps.{0:L}.tilt.weight", "H, H"': '"steps.{0:L}.tlit.weight", "H, H"'},
        "forward",
        "nothing reads steps.0.tlit.weight",
        "forward",
    ),
    Mistake(
        "two targets swapped",
        {
            '"steps.{0:L}.turn.weight", "H, H"),\n            Rename("rungs.{0:L}.tilt.weight", "steps.{0:L}.tilt.weight"': '"steps.{0:L}.tilt.weight", "H, H"),\n            Rename("rungs.{0:L}.tilt.weight", "steps.{0:L}.turn.weight"'
        },
        "forward",
        "rungs_0_wide (steps.0.wide in the output) is fed something else",
        "forward",
        bare="reference",
    ),
    Mistake(
        "a source name misspelt",
        {'"rungs.{0:L}.wide.weight"': '"rungs.{0:L}.wild.weight"'},
        "accounted",
        "missing: rungs.{0…1}.wild.weight [I, H]",
        "forward",
    ),
    Mistake(
        "numbers that start at 1",
        {'Rename("rungs.{0:L}.wide.weight", "steps.{0:L}': 'Rename("rungs.{1:L}.wide.weight", "steps.{1:L}'},
        "accounted",
        "rungs.0.wide.weight F32 [24, 64]: matches no row of the table",
        "accounted",
    ),
    Mistake(
        "a bias dropped",
        {
            '            Rename("input.bias", "fuse.bias", "H", part="bias"),\n': '            Drop("input.bias", "of no use"),\n'
        },
        "accounted",
        "input.bias is dropped (of no use)",
        "recognised",
    ),
    Mistake(
        "a row that drops everything",
        {'Drop("trainer.**"': 'Drop("**"'},
        "accounted",
        "the row Drop('**') takes embed_tokens.weight, which Shared('embed_tokens.weight') would write",
        "accounted",
    ),
    Mistake(
        "a required tensor in a part that nothing declares",
        {'"combiner.weight", "H, 2*H"': '"combiner.weight", "H, 2*H", part="mixing"'},
        "accounted",
        "mix.weight is dropped (the draft does not use mixing)",
        "recognised",
    ),
    Mistake(
        "a required tensor in the part of another",
        {'"combiner.weight", "H, 2*H"': '"combiner.weight", "H, 2*H", part="bias"'},
        "optional",
        "without input.bias, which may be lacking: mix.weight is dropped (the draft does not use bias)",
        "optional",
    ),
    Mistake(
        "a wrong symbol in a shape",
        {'"steps.{0:L}.wide.weight", "I, H"': '"steps.{0:L}.wide.weight", "H, H"'},
        "accounted",
        "rungs.{0…1}.wide.weight is F32 [24, 64], expected [H, H] = [64, 64]",
        "accounted",
    ),
    Mistake(
        "a tensor that must be there is made up",
        {
            '"steps.{0:L}.tilt.weight", "H, H"': '"steps.{0:L}.tilt.weight", "H, H", derive=Derive("speculators_ladder:ones", ("steps.{0:L}.turn.weight",), NO_NORM)'
        },
        "damage",
        "the checkpoint without rungs.0.tilt.weight is converted all the same",
        "damage",
    ),
    Mistake(
        "random numbers in place of a missing tensor",
        {'np.ones(shape, "<f4")': 'np.random.standard_normal(shape).astype("<f4")'},
        "optional",
        "without rungs.0.norm.weight, which may be lacking: model.safetensors differs between two conversions",
        "optional",
    ),
    Mistake(
        "an operation that makes another size",
        {'np.ones(shape, "<f4").tobytes()': 'np.ones(shape, "<f8").tobytes()'},
        "optional",
        "speculators_ladder:ones made 512 bytes for 'steps.0.norm.weight', expected 256",
        "optional",
    ),
    Mistake(
        "a bias that is read and never added",
        {
            "hidden = self.fuse(cat((embeddings, hidden), dim=-1))": "hidden = nn.functional.linear(cat((embeddings, hidden), dim=-1), self.fuse.weight)"
        },
        "forward",
        "input (fuse in the output) does not run in the output",
        "forward",
        bare="reference",
    ),
    Mistake(
        "a square matrix used transposed",
        {"self.turn(normed)": "normed @ self.turn.weight"},
        "forward",
        "rungs_0_turn (steps.0.turn in the output) does not run in the output",
        "forward",
        bare="reference",
    ),
    Mistake(
        "embeddings and states joined in the other order",
        {"cat((embeddings, hidden)": "cat((hidden, embeddings)"},
        "forward",
        "input (fuse in the output) is fed something else",
        "forward",
        bare="reference",
    ),
    Mistake(
        "tokens shifted once more",
        {"cat((embeddings, hidden)": "cat((embeddings.roll(1, dims=1), hidden)"},
        "forward",
        "input (fuse in the output) is fed something else",
        "forward",
        bare="reference",
    ),
    Mistake(
        "tokens shifted once more, padded with zeros",
        {"cat((embeddings, hidden)": "cat((nn.functional.pad(embeddings, (0, 0, 1, -1)), hidden)"},
        "forward",
        "input (fuse in the output) is fed something else",
        "forward",
        bare="reference",
    ),
    Mistake(
        "later tokens are seen",
        {
            "turned = nn.functional": "normed = normed - normed.mean(1, keepdim=True)\n                turned = nn.functional"
        },
        "forward",
        "rungs_0_turn (steps.0.turn in the output) is fed something else",
        "forward",
        bare="reference",
    ),
    Mistake(
        "a residual forgotten",
        {"return hidden + self.narrow": "return self.narrow"},
        "forward",
        "after rungs_0_tilt (steps.0.tilt in the output), which agrees",
        "forward",
        bare="reference",
    ),
    Mistake(
        "a constant of the norm",
        {"nn.RMSNorm(width, eps=1e-6)": "nn.RMSNorm(width, eps=1e-2)"},
        "forward",
        "rungs_0_norm (steps.0.norm in the output) makes something else of the same input",
        "forward",
        bare="reference",
    ),
    Mistake(
        "a layer of the loop left out",
        {"for step in self.steps:": "for step in self.steps[:1]:"},
        "forward",
        "rungs_1_norm (steps.1.norm in the output) does not run in the output",
        "forward",
        bare="reference",
    ),
    Mistake(
        "a constant in float32",
        {
            "self.tilt(normed)\n": "self.tilt(normed * __import__('torch').ones(width, dtype=__import__('torch').float32))\n"
        },
        "asked for",
        "with dtype='bfloat16', forward: the draft model cannot be run",
        "asked for",
    ),
    Mistake(
        "a buffer made in build",
        {
            "self.state_size = 2 * width\n": "self.state_size = 2 * width\n                self.register_buffer('scale', __import__('torch').ones(width), persistent=False)\n"
        },
        "forward",
        "build() makes the buffers scale, which hold nothing",
        "forward",
    ),
    Mistake(
        "wrong states of the verifier",
        {"        return (layers // 2, layers)\n": "        return (layers // 2 + 1, layers)\n"},
        "forward",
        "the output reads the states that enter layers [5, 8] of the verifier, its source those of [4, 8]",
        "forward",
        bare="reference",
    ),
    Mistake(
        "states in the other order",
        {"        return (layers // 2, layers)\n": "        return (layers, layers // 2)\n"},
        "forward",
        "the output reads the states that enter layers [8, 4] of the verifier, its source those of [4, 8]",
        "forward",
        bare="reference",
    ),
    Mistake(
        "a wrong default of an option",
        {"default=0.25, gt=0": "default=0.01, gt=0"},
        "reference",
        "with slope=0.25 they are equal, so its default or configure() is wrong",
        "",
    ),
    Mistake(
        "a default that the option refuses",
        {"default=0.25, gt=0": "default=0.0, gt=0"},
        "strict options",
        "the default of the option 'slope' is 0.0, which the option does not take",
        "strict options",
    ),
    Mistake(
        "an option that nothing reads",
        {"slope=context.options.slope,": "slope=0.01,"},
        "forward",
        "rungs_0_wide (steps.0.wide in the output) is fed something else",
        "forward",
        bare="reference",
    ),
    Mistake(
        "an option without a description",
        {', description="Slope of the rungs below zero, which no tensor shows."': ""},
        "described",
        "the option 'slope' has no description",
        "described",
    ),
    Mistake(
        "options that take typos",
        {
            '    """Options of ladder heads."""\n': '    """Options of ladder heads."""\n\n    model_config = {"extra": "ignore"}\n'
        },
        "strict options",
        "LadderOptions takes the misspelt option 'speculative_tokenss'",
        "strict options",
    ),
    Mistake(
        "options that take text for numbers",
        {
            '    """Options of ladder heads."""\n': '    """Options of ladder heads."""\n\n    model_config = {"strict": False}\n'
        },
        "strict options",
        "the option 'speculative_tokens' takes text for int",
        "strict options",
    ),
    Mistake(
        "a range that the alternatives leave",
        {"others = {0.01, 0.25}": "others = {0.01, 1.5}"},
        "alternatives",
        "alternatives() has slope=1.5, which is refused",
        "alternatives",
    ),
    Mistake(
        "an alternative that converting does not give",
        {'update={"slope": slope}': 'update={"slope": -slope}'},
        "alternatives",
        "slope 0.01 becomes -0.01",
        "alternatives",
    ),
    Mistake(
        "an alternative of no option",
        {'Alternative("slope"': 'Alternative("slant"'},
        "alternatives",
        "alternatives() changes 'slant', which is no option",
        "alternatives",
    ),
    Mistake(
        "everything is recognised",
        {'return {"mix.weight", "input.weight", "rungs.0.turn.weight"} <= set(source.tensors)': "return True"},
        "distinct",
        "recognises() says yes to a base model",
        "distinct",
    ),
    Mistake(
        "a checkpoint of another family is recognised",
        {"<= set(source.tensors)": '<= set(source.tensors) or "midlayer.mlp.up_proj.weight" in source.tensors'},
        "distinct",
        "recognises() says yes to a checkpoint of eagle3",
        "distinct",
    ),
    Mistake(
        "a row that drops what nobody knows",
        {'Drop("trainer.**"': 'Drop("mix.weight_*", "averages of a trainer"),\n            Drop("trainer.**"'},
        "damage",
        "the checkpoint with mix.weight_misnamed, which nobody knows, beside mix.weight is converted",
        "damage",
    ),
    Mistake(
        "a size that is whatever is there",
        {
            '"fuse.bias", "H", part="bias"': '"fuse.bias", "B", part="bias"',
            '"L": rungs}': '"L": rungs, "B": (context.shape("fuse.bias") or (64,))[0]}',
            '"I": config.inner}': '"I": config.inner, "B": 64}',
            '"I": 24}': '"I": 24, "B": 64}',
        },
        "damage",
        "input.bias of shape [65] in place of [64] is converted all the same",
        "damage",
    ),
    Mistake(
        "whole numbers taken for weights",
        {'"combiner.weight", "H, 2*H")': '"combiner.weight", "H, 2*H", dtypes=("F32", "F16", "BF16", "I64"))'},
        "damage",
        "mix.weight of I64 in place of F32 is converted all the same",
        "recognised",
    ),
    Mistake(
        "the first sequence for all",
        {
            "                    hidden = step(hidden)\n                return hidden, hidden": "                    hidden = step(hidden)\n                hidden = hidden[:1].expand_as(hidden)\n                return hidden, hidden"
        },
        "reference",
        "draft_hidden_states are other",
        "causal",
    ),
    Mistake(
        "a mean over all tokens",
        {
            "                    hidden = step(hidden)\n                return hidden, hidden": "                    hidden = step(hidden)\n                hidden = hidden * len(positions)\n                return hidden, hidden"
        },
        "forward",
        "hidden states by",
        "forward",
        bare="reference",
    ),
    Mistake(
        "nothing is recognised",
        {'"rungs.0.turn.weight"} <= set': '"rungs.0.turn"} <= set'},
        "recognised",
        "recognises() says no to",
        "recognised",
    ),
    Mistake(
        "a look at foreign checkpoints raises",
        {
            'return {"mix.weight", "input.weight", "rungs.0.turn.weight"} <= set(source.tensors)': 'return source.tensors["mix.weight"].shape[1] == 2 * source.tensors["mix.weight"].shape[0]'
        },
        "distinct",
        "recognises raised KeyError: 'mix.weight'",
        "distinct",
    ),
    Mistake(
        "torch imported at the top",
        {"import numpy as np\n": "import numpy as np\nimport torch\n"},
        "light",
        "importing the plugin imports torch",
        "light",
    ),
    Mistake(
        "the day in the config",
        {
            'default=["LadderSpeculator"]': 'default=["LadderSpeculator", __import__("datetime").date.today().isoformat()]'
        },
        "reproducible",
        "config.json (architectures",
        "reproducible",
    ),
    Mistake(
        "the second in the config",
        {'default=["LadderSpeculator"]': 'default=["LadderSpeculator", str(int(__import__("time").time()))]'},
        "reproducible",
        "config.json (architectures",
        "reproducible",
    ),
    Mistake(
        "chance in the config",
        {'default=["LadderSpeculator"]': 'default=["LadderSpeculator", str(__import__("random").random())]'},
        "reproducible",
        "config.json (architectures",
        "reproducible",
    ),
    Mistake(
        "a native config that says something else",
        {'"torch_dtype": config.dtype}': '"torch_dtype": "float16"}'},
        "export",
        "what export_config returns is converted to dtype 'float16', which was 'float32'",
        "export",
    ),
    Mistake(
        "a set in the config",
        {'default=["LadderSpeculator"]': 'default=[*{"LadderSpeculator", "LadderModel", "LadderDraft", "LadderHead"}]'},
        "reproducible",
        "config.json (architectures",
        "reproducible",
    ),
    Mistake(
        "a config that changes what it reads",
        {
            "    slope: float\n\n\nclass Ladder": "    slope: float\n\n    def model_post_init(self, _: Any) -> None:\n        self.inner += 1\n\n\nclass Ladder"
        },
        "config round trip",
        "LadderConfig changes what it reads: inner 25 becomes 26",
        "config round trip",
    ),
    Mistake(
        "a config that does not read what it wrote",
        {"    inner: int\n": "    inner: int = Field(exclude=True)\n"},
        "config round trip",
        "LadderConfig does not read what it wrote: inner",
        "config round trip",
    ),
    Mistake(
        "a config that reads any type",
        {'speculators_model_type: Literal["ladder"]': "speculators_model_type: str"},
        "config round trip",
        "LadderConfig reads configs of any type; narrow speculators_model_type to a Literal",
        "config round trip",
    ),
    Mistake(
        "an algorithm that does not read the output",
        {'common_fields("ladder")': 'common_fields("eagle3")'},
        "config round trip",
        "the written config says that 'eagle3' reads it, and that does not",
        "config round trip",
    ),
    Mistake(
        "an algorithm that there is not",
        {'common_fields("ladder")': 'common_fields("laddr")'},
        "config round trip",
        "no algorithm 'laddr' is installed",
        "config round trip",
    ),
    Mistake(
        "a dtype that is not the asked one",
        {
            "slope=context.options.slope,\n        )": 'slope=context.options.slope,\n        ).model_copy(update={"dtype": "float32"})'
        },
        "asked for",
        "with dtype='bfloat16' the config says dtype 'float32'",
        "asked for",
    ),
    Mistake(
        "draft tokens that are not those asked for",
        {
            "        return config, []": "        config.speculators_config.proposal_methods[0].speculative_tokens = 3\n        return config, []"
        },
        "asked for",
        "with the option speculative_tokens=1 the config proposes [3]",
        "asked for",
    ),
    Mistake(
        "a wrong draft vocabulary",
        {'draft_vocab_size=facts.dims["V"]': 'draft_vocab_size=facts.dims["H"]'},
        "config round trip",
        "examine() says V is 128, dims() of the written config 64",
        "config round trip",
    ),
    Mistake(
        "sizes that disagree",
        {'"I": config.inner}': '"I": config.inner + 1}'},
        "config round trip",
        "examine() says I is 24, dims() of the written config 25",
        "config round trip",
    ),
    Mistake(
        "sizes that are remembered",
        {
            "        return Facts(dims, frozenset(": "        self.rungs = rungs\n        return Facts(dims, frozenset(",
            '"L": config.rungs': '"L": self.rungs',
        },
        "config round trip",
        "dims raised AttributeError: 'Ladder' object has no attribute 'rungs'",
        "config round trip",
    ),
    Mistake(
        "parts that disagree",
        {"if config.bias else ()": "if not config.bias else ()"},
        "config round trip",
        "examine() finds the parts ['bias'], parts() of the written config []",
        "config round trip",
    ),
    Mistake(
        "a hook that raises",
        {"        others = {0.01": "        others = 1 / 0\n        others = {0.01"},
        "alternatives",
        "alternatives raised ZeroDivisionError: division by zero",
        "alternatives",
    ),
    Mistake(
        "a hook that returns another type",
        {"return (layers // 2, layers)\n\n    def alt": "return [layers // 2, layers]\n\n    def alt"},
        "forward",
        "state_layers returned [4, 8], expected a tuple",
        "forward",
    ),
    Mistake(
        "a hook misspelt",
        {"def alternatives(": "def alternative("},
        "described",
        "Ladder.alternative is no member of a spec, and nothing calls it; alternatives is meant?",
        "described",
    ),
    Mistake(
        "a member misspelt",
        {'    summary = "Ladder': '    alias = ("rungs",)\n    summary = "Ladder'},
        "described",
        "Ladder.alias is no member of a spec, and nothing calls it; aliases is meant?",
        "described",
    ),
    Mistake(
        "a name that is not the entry point's",
        {'    name = "ladder"': '    name = "lader"'},
        "found",
        "its entry point is named 'ladder', its spec 'lader'",
        "found",
    ),
    Mistake(
        "a hook of the registry misspelt",
        {"def register_converter": "def register_convertor"},
        "found",
        "unknown hook 'register_convertor'",
        "found",
    ),
    Mistake(
        "another interface",
        {"interface = 1": "interface = 2"},
        "found",
        "written for plugin interface 2, this is 1",
        "found",
    ),
    Mistake(
        "no reference",
        {'reference = "https://example.org/ladder"': 'reference = "see the paper"'},
        "described",
        "Ladder.reference must be the URL of a paper or code",
        "described",
    ),
    Mistake(
        "an original that is wrong",
        {'_turn"](level), context.options.slope)': '_turn"](level), 0.5)'},
        "forward",
        "rungs_0_wide (steps.0.wide in the output) is fed something else",
        "forward",
    ),
    Mistake(
        "an example that lacks a size",
        {'"L": 2, "I": 24}': '"L": 2}'},
        "",
        "the example of 'ladder' gives no size to 'I'",
        "recognised",
    ),
    Mistake(
        "an example with an optional tensor that is required",
        {'optional=frozenset({"input.bias", *norms})': 'optional=frozenset({"input.bias", "mix.weight", *norms})'},
        "",
        "without mix.weight, which may be lacking",
        "optional",
    ),
)
