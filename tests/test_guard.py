"""Hooks that fail, or return what the interface does not allow, while a conversion or a validation runs."""

from __future__ import annotations

import json
from inspect import isfunction
from pathlib import Path

import pytest
import torch
from checkpoints import VERIFIER, unrecorded, write_checkpoint
from installing import TOY, Announce, Install

from speculators import (
    Checkpoint,
    CheckpointError,
    ConverterSpec,
    PluginError,
    Registry,
    ValidationError,
    Verifier,
    convert_model,
    export_model,
    validate_model,
)
from speculators.guard import HOOKS

ORIGIN = r"the plugin speculators-toy 0\.3\.0 does not keep to the interface: "
HEADER = "@hookimpl\ndef register_converter() -> type[ConverterSpec]:\n    return Toy\n"
MODEL = (
    """type("Model", (torch.nn.Module,), {{"state_size": 128, "combine": print, "forward": print, **{changes}}})()"""
)


def model(changes: str = "{}") -> str:
    return MODEL.format(changes=changes)


def original(model: str = model(), names: str = "{}", layers: str = "(8,)", more: str = "") -> str:
    return f"speculators.Original({model}, {names}, {layers}{more})"


def hooked(hook: str, body: str) -> str:
    """The toy plugin with one hook replaced."""
    assert TOY.endswith(HEADER)
    replaced = f"class Damaged(Toy):\n    def {hook}(self, *given):\n        import torch\n        {body}\n\n\n"
    return TOY.removesuffix(HEADER) + replaced + HEADER.replace("return Toy", "return Damaged")


@pytest.fixture
def head(tmp_path: Path) -> Path:
    """A checkpoint that the toy plugin converts."""
    return write_checkpoint(tmp_path / "head", {}, {"toy.weight": torch.full((128, 256), 0.01)})


def convert(registry: Registry, head: Path) -> Path:
    out = head.parent / "out"
    convert_model(head, verifier=VERIFIER, algorithm="toy", output_path=out, registry=registry)
    return out


def provoke(hook: str, registry: Registry, head: Path) -> None:
    """Do what calls ``hook``."""
    if hook == "recognises":
        registry.recognise(Checkpoint(head))
    elif hook == "example":
        registry.get("toy").spec.example(Verifier(VERIFIER))
    elif hook == "export_config":
        output = unrecorded(convert(registry, head)).rename(head.parent / "unrecorded")
        export_model(output, output_path=head.parent / "exported", registry=registry)
    elif hook == "alternatives":
        validate_model(convert(registry, head), level="acceptance", diagnose=True, registry=registry)
    else:
        convert(registry, head)


def test_every_hook_is_guarded() -> None:
    public = {name for name, member in vars(ConverterSpec).items() if isfunction(member) and not name.startswith("_")}

    assert HOOKS.keys() == public


def test_what_keeps_to_the_interface_passes_untouched(install: Install, head: Path) -> None:
    registry = install("toy", TOY)

    assert (convert(registry, head) / "model.safetensors").exists()
    assert registry.recognise(Checkpoint(head)).spec.name == "toy"
    assert registry.get("toy").spec.table.rows[0].source == "toy.weight"
    assert not hasattr(registry.get("toy").spec, "no_such_member")


@pytest.mark.parametrize("hook", sorted(HOOKS.keys() - {"recognises", "build", "alternatives"}))
@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        pytest.param("KeyError('bias')", "KeyError: 'bias'", id="an exception"),
        pytest.param(r"ValueError('one\n  two')", "ValueError: one two", id="two lines"),
        pytest.param("SystemExit('bye')", "SystemExit: bye", id="an exit"),
    ],
)
def test_a_hook_that_raises_is_named_with_its_plugin(
    hook: str, raised: str, reason: str, install: Install, head: Path
) -> None:
    registry = install("toy", hooked(hook, f"raise {raised}"))

    with pytest.raises(PluginError, match=f"^{ORIGIN}{hook} raised {reason}; report this to its authors$"):
        provoke(hook, registry, head)

    assert not (head.parent / "out").exists()


@pytest.mark.parametrize(
    ("hook", "returned", "found"),
    [
        ("recognises", "None", "None, expected True or False"),
        ("examine", "{'H': 128}", r"{'H': 128}, expected Facts"),
        ("examine", "Facts({'H': None})", "Facts with dims {'H': None}, expected a mapping from symbols to"),
        ("examine", "Facts({'H': 128.0})", "Facts with dims {'H': 128.0}, expected"),
        ("examine", "Facts({'H': True})", "Facts with dims {'H': True}, expected"),
        ("examine", "Facts({'H': 128}, ['bias'])", "Facts with parts ['bias'], expected a frozenset of parts"),
        ("examine", "Facts({'H': 128}, notes='a note')", "Facts with notes 'a note', expected a tuple of sentences"),
        ("examine", "Facts({'H': 128}, findings=(1,))", "Facts with findings (1,), expected a tuple of lines"),
        ("configure", "None", "None, expected (ToyConfig, list of sentences)"),
        ("configure", "super().configure(*given)[0]", "ToyConfig("),
        ("configure", "({}, [])", "({}, []), expected (ToyConfig, list of sentences)"),
        ("configure", "(super().configure(*given)[0], 'a note')", "'a note'), expected (ToyConfig"),
        ("dims", "128", "128, expected a mapping from symbols to whole numbers"),
        ("dims", "{'H': '128'}", "{'H': '128'}, expected a mapping"),
        ("parts", "None", "None, expected a frozenset of parts of the table (it has none)"),
        ("parts", "frozenset({'bias'})", "frozenset({'bias'}), expected a frozenset of parts"),
        ("state_layers", "8", "8, expected a tuple of at least one layer's number"),
        ("state_layers", "()", "(), expected a tuple"),
        ("state_layers", "('last',)", "('last',), expected a tuple"),
        ("inspect", "None", "None, expected a list of findings"),
        ("inspect", "'all is well'", "'all is well', expected a list of findings"),
        ("export_config", "[]", "[], expected a dict that JSON knows, or None"),
        ("export_config", "{'sizes': {1}}", "{'sizes': {1}}, expected a dict that JSON knows, or None"),
        ("alternatives", "None", "None, expected a list of Alternative"),
        ("alternatives", "[{'squash': True}]", "[{'squash': True}], expected a list of Alternative"),
        ("alternatives", "[speculators.Alternative('squash', True, {})]", "an Alternative with ('squash', True, {})"),
        ("alternatives", "[speculators.Alternative('squash', {1}, given[0])]", "an Alternative with ('squash', {1}"),
        ("original", "None", "None, expected an Original"),
        ("original", original("42"), "an Original with the model 42, expected a torch module"),
        ("original", original(names="['weight']"), "an Original with names ['weight'], expected a mapping"),
        ("original", original(layers="8"), "an Original with state_layers 8, expected a tuple"),
        ("original", original(more=", head=None"), "an Original with the head None, expected a source name"),
        ("original", original(more=", targets=[1]"), "an Original with targets [1], expected None or"),
        ("targets", "[1, 2]", "[1, 2], expected None or a one-dimensional array of whole numbers"),
        ("targets", "torch.ones(2).numpy()", "array([1., 1.], dtype=float32), expected None"),
        ("build", "None", "None, expected a torch module"),
        ("build", "torch.nn.Linear(1, 1)", "and it lacks combine, state_size"),
        ("build", model("{'forward': torch.nn.Module.forward}"), "and it lacks forward"),
        ("build", model("{'draft_tokens': 0}"), "with draft_tokens 0, expected a positive whole number"),
        ("build", model("{'logits': 1}"), "with logits that cannot be called"),
        ("build", model("{'embed': None}"), "with embed that cannot be called"),
        ("build", model("{'most_tokens': '4'}"), "with most_tokens '4', expected a positive whole number"),
        ("example", "{}", "{}, expected an Example or None"),
        ("example", "speculators.Example({}, {'H': 'many'})", "an Example with dims {'H': 'many'}, expected a mapping"),
        ("example", "speculators.Example({}, {}, frozenset({'bias'}))", "an Example with parts frozenset({'bias'})"),
        ("example", "speculators.Example({'a': {1}}, {})", "an Example with the config {'a': {1}}, expected what JSON"),
        ("example", "speculators.Example({}, {}, tensors={'a': [1]})", "an Example with tensors {'a': [1]}, expected"),
        ("example", "speculators.Example({}, {}, file='../head.pt')", "an Example with the file '../head.pt', "),
        ("example", "speculators.Example({}, {}, optional='fc.bias')", "an Example with optional 'fc.bias', expected"),
    ],
)  # fmt: skip
def test_a_hook_that_returns_something_else_is_named_with_what_was_expected(
    hook: str, returned: str, found: str, install: Install, head: Path
) -> None:
    registry = install("toy", hooked(hook, f"return {returned}"))

    with pytest.raises(PluginError, match=r"speculators-toy 0\.3\.0") as error:
        provoke(hook, registry, head)

    assert f"{hook} returned " in str(error.value)
    assert found in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def validating(schema: str, raised: str) -> str:
    """The toy plugin with a validator of its options or its config that fails on what is set."""
    validator = f"""
    @pydantic.field_validator("squash")
    def _strange(cls, value):
        if value:
            raise {raised}
        return value
"""
    lines = TOY.splitlines(keepends=True)
    place = next(number for number, line in enumerate(lines) if line.startswith(f"class {schema}("))
    last = next(number for number in range(place, len(lines)) if lines[number].startswith("    squash"))
    return "".join([lines[0], "\n", *lines[1 : last + 1], validator, *lines[last + 1 :]]).replace(
        "from pydantic import Field", "import pydantic\nfrom pydantic import Field"
    )


def test_a_validator_of_options_that_raises_is_named_with_its_plugin(install: Install, head: Path) -> None:
    registry = install("toy", validating("ToyOptions", "KeyError('squash')"))

    with pytest.raises(PluginError, match=f"^{ORIGIN}a validator of its options raised KeyError: 'squash'; report"):
        convert_model(
            head, verifier=VERIFIER, algorithm="toy", output_path=head.parent / "out", registry=registry, squash=True
        )


def test_a_validator_of_a_config_that_raises_is_a_failed_check(install: Install, head: Path) -> None:
    registry = install("toy", validating("ToyConfig", "KeyError('squash')"))
    out = convert(registry, head)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"squash": True}))

    report = validate_model(out, registry=registry)

    assert "a validator of ToyConfig raised KeyError: 'squash'" in str(report)


def test_what_cannot_even_be_looked_at_is_told(install: Install, head: Path) -> None:
    evil = "return type('Evil', (dict,), {'keys': lambda self: 1 / 0, '__repr__': lambda self: 1 / 0})()"
    registry = install("toy", hooked("dims", evil))

    with pytest.raises(PluginError, match=f"{ORIGIN}what dims returned cannot be read: ZeroDivisionError"):
        convert(registry, head)


def test_a_refusal_of_the_plugin_s_own_passes(install: Install, head: Path) -> None:
    registry = install("toy", hooked("examine", "raise speculators.CheckpointError('toys are for children')"))

    with pytest.raises(CheckpointError, match=r"^toys are for children$"):
        convert(registry, head)


@pytest.mark.parametrize("raised", ["KeyboardInterrupt", "MemoryError"])
def test_what_is_no_plugin_s_fault_passes(raised: str, install: Install, head: Path) -> None:
    registry = install("toy", hooked("examine", f"raise {raised}"))

    with pytest.raises((KeyboardInterrupt, MemoryError)):
        convert(registry, head)


def test_a_draft_that_cannot_be_built_fails_validation(install: Install, head: Path) -> None:
    registry = install("toy", hooked("build", "raise KeyError('unheard-of')"))

    with pytest.raises(ValidationError, match="cannot be built from the written config: KeyError: 'unheard-of'"):
        convert(registry, head)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        pytest.param("(9,)", r"the states of layers \[9\] of the verifier; .* has layers 0 to 8", id="past the last"),
        pytest.param("(-1,)", r"layers \[-1\] of the verifier", id="negative"),
        pytest.param("(1, 2)", r"128 numbers per token; .* layers \[1, 2\] of .* have 2 times 128", id="two"),
    ],
)  # fmt: skip
def test_states_that_the_verifier_has_not_fail_validation(
    layers: str, message: str, install: Install, head: Path
) -> None:
    registry = install("toy", hooked("state_layers", f"return {layers}"))

    with pytest.raises(ValidationError, match=message):
        convert(registry, head)


def test_an_error_of_a_hook_is_one_line_and_an_exit_code(beside_ours: Announce, head: Path) -> None:
    from click.testing import CliRunner

    from speculators.cli import cli

    beside_ours("toy", hooked("examine", "return 42"))
    arguments = ["convert", head, "--algorithm", "toy", "--verifier", VERIFIER, "--output-path", head.parent / "out"]

    result = CliRunner().invoke(cli, list(map(str, arguments)))

    assert result.exit_code == 3
    assert result.output == (
        "Error: the plugin speculators-toy 0.3.0 does not keep to the interface: examine returned 42, expected Facts; "
        "report this to its authors\n"
    )
