"""The conformance suite finds the mistakes that are seeded in a plugin, and nothing else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Tensors, read_tensors, write_checkpoint
from installing import TOY, Announce
from safetensors.torch import load_file, save_file
from seeded import LADDER, MISTAKES, Mistake, changed, without_original
from snippets import elsewhere

from speculators import PluginError, Registry, Table, Verifier, convert_model, examples
from speculators.conformance import CHECKS, Bench, Verdict, judge
from speculators.testing import Conformance, NonconformanceError

PAGE = Path(__file__).parents[1] / "docs" / "plugins" / "conformance.md"
WIDTH, INNER, RUNGS = 64, 24, 2
DROPPED = ("trainer.step",)
OPTIONAL = ("input.bias", "rungs.0.norm.weight", "rungs.1.norm.weight")


def trained(verifier: Path) -> Tensors:
    """Weights of a ladder head as its trainer saves them."""
    random = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random) / shape[-1] ** 0.5

    tensors = {"mix.weight": some(WIDTH, 2 * WIDTH), "input.weight": some(WIDTH, 2 * WIDTH), "input.bias": some(WIDTH)}
    for number in range(RUNGS):
        shapes = {"turn": (WIDTH, WIDTH), "tilt": (WIDTH, WIDTH), "wide": (INNER, WIDTH), "narrow": (WIDTH, INNER)}
        tensors |= {f"rungs.{number}.{name}.weight": some(*shape) for name, shape in shapes.items()}
        tensors[f"rungs.{number}.norm.weight"] = 1 + some(WIDTH)
    tensors["embed_tokens.weight"] = Verifier(verifier).checkpoint.tensor("model.embed_tokens.weight").clone()
    return tensors | {"trainer.step": torch.tensor([7])}


def original_code(weights: Tensors, embedded: torch.Tensor, lower: torch.Tensor, upper: torch.Tensor) -> torch.Tensor:
    """What training computes: ``[B, T, H]`` embeddings and states of two layers → ``[B, T, H]``."""
    mixed = torch.einsum("oi,bti->bto", weights["mix.weight"], torch.cat((lower, upper), dim=2))
    climbing = torch.einsum("oi,bti->bto", weights["input.weight"], torch.cat((embedded, mixed), dim=2))
    climbing = climbing + weights["input.bias"]
    for number in range(RUNGS):
        turn, tilt, wide, narrow, norm = (
            weights[f"rungs.{number}.{name}.weight"] for name in ("turn", "tilt", "wide", "narrow", "norm")
        )
        size = ((climbing**2).sum(dim=2, keepdim=True) / WIDTH + 1e-6) ** 0.5
        level = climbing / size * norm
        turned = torch.einsum("oi,bti->bto", turn, level)
        acted = torch.where(turned > 0, turned, turned / 4)
        climbing = climbing + torch.einsum("oi,bti->bto", narrow @ wide, acted)
        climbing = climbing + torch.einsum("oi,bti->bto", tilt, level)
    return climbing


def write_native(folder: Path, layout: str = "safetensors", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Write a checkpoint, its verifier and what the original code computes on them; return arguments of a bench."""
    verifier = examples.write_verifier(folder / "verifier")
    stored = {name: each.to(dtype) if each.is_floating_point() else each for name, each in trained(verifier).items()}
    draft = write_checkpoint(folder / "draft", {"model_type": "ladder", "num_rungs": RUNGS}, stored, layout)
    weights = {name: each.float() for name, each in stored.items()}
    model: Any = Verifier(verifier).load("cpu")
    tokens = torch.randint(128, (2, 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states = model(tokens, output_hidden_states=True).hidden_states
        lower, upper = states[4][:, :-1], states[8][:, :-1]
        hidden = original_code(weights, weights["embed_tokens.weight"][tokens[:, 1:]], lower, upper)
        logits = hidden @ model.lm_head.weight.T
    outputs = {
        "input_ids": tokens,
        "draft_input_ids": tokens[:, 1:].contiguous(),
        "verifier_hidden_states": torch.cat((lower, upper), dim=-1),
        "draft_hidden_states": hidden,
        "draft_logits": logits,
        "draft_token_ids": logits.argmax(dim=-1),
    }
    save_file(outputs, folder / "reference.safetensors")
    return {
        "checkpoint": draft,
        "verifier": verifier,
        "reference": folder / "reference.safetensors",
        "optional": OPTIONAL,
        "dropped": DROPPED,
    }


def test_the_script_of_the_page_writes_what_the_original_code_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = write_native(tmp_path / "native")
    expected = load_file(native["reference"])
    weights = read_tensors(native["checkpoint"])
    monkeypatch.chdir(tmp_path)
    (script,) = elsewhere("test_the_script_of_the_page_writes_what_the_original_code_computes").values()

    exec(
        script,
        {
            "model": Verifier(native["verifier"]).load("cpu"),
            "layers": (4, 8),
            "original": lambda embedded, states: original_code(weights, embedded, *states.chunk(2, dim=-1)),
            "input_ids": expected["input_ids"],
        },
    )

    written = load_file(tmp_path / "reference.safetensors")
    assert expected.keys() - written.keys() == {"draft_token_ids"}
    for name, tensor in written.items():
        assert torch.allclose(tensor, expected[name], atol=1e-5), name


IN_PROCESSES = ("light", "reproducible")
"""Checks that start processes, and are made where they are meant."""

Native = dict[str, Any]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Let no threads wait for each other over tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Native:
    """The checkpoint of a ladder head, with what the original code computes."""
    return write_native(tmp_path_factory.mktemp("native"))


def failed(bench: Bench, left_out: Iterable[str] = ()) -> list[Verdict]:
    checks = [check for check in CHECKS if check.name not in left_out]
    return [finding for finding in judge(bench, checks=checks) if not finding.passed]


def first_failure(bench: Bench, expected: str) -> Verdict | None:
    """Run checks until one fails; those that take long where they are expected to, or where none is."""
    long = (*IN_PROCESSES, "distinct", "damage", "optional", "whole") if expected else IN_PROCESSES
    for check in CHECKS:
        if check.name == expected or check.name not in long:
            for finding in judge(bench, checks=[check]):
                if not finding.passed:
                    return finding
    return None


def test_a_plugin_that_is_right_passes_every_check(native: Native, beside_ours: Announce, tmp_path: Path) -> None:
    beside_ours("ladder", LADDER)

    assert failed(Bench("ladder", tmp_path, **native)) == []


def test_a_plugin_that_is_right_passes_on_its_own_example(beside_ours: Announce, tmp_path: Path) -> None:
    beside_ours("ladder", LADDER)

    assert failed(Bench("ladder", tmp_path)) == []


def test_the_smallest_plugin_passes_every_check(beside_ours: Announce, tmp_path: Path) -> None:
    beside_ours("toy", TOY)

    assert failed(Bench("toy", tmp_path), IN_PROCESSES) == []


def test_checks_depend_on_no_order_and_can_be_made_again(native: Native, beside_ours: Announce, tmp_path: Path) -> None:
    beside_ours("ladder", LADDER)
    bench = Bench("ladder", tmp_path)

    for _ in range(2):
        findings = judge(bench, checks=[check for check in reversed(CHECKS) if check.name not in IN_PROCESSES])
        assert [finding for finding in findings if not finding.passed] == []


@pytest.mark.parametrize("mistake", [each for each in MISTAKES if each.check], ids=lambda each: each.what)
def test_a_mistake_is_found_and_named(mistake: Mistake, native: Native, beside_ours: Announce, tmp_path: Path) -> None:
    beside_ours("ladder", mistake.source)

    found = first_failure(Bench("ladder", tmp_path, **native), mistake.check)

    assert found is not None
    assert (found.check, mistake.says in found.detail) == (mistake.check, True), found.detail


@pytest.mark.parametrize(
    "mistake", [each for each in MISTAKES if each.alone not in IN_PROCESSES], ids=lambda each: each.what
)
def test_the_plugin_s_own_example_shows_it_too(mistake: Mistake, beside_ours: Announce, tmp_path: Path) -> None:
    beside_ours("ladder", mistake.source)

    found = first_failure(Bench("ladder", tmp_path), mistake.alone)

    assert (found.check if found else "") == mistake.alone
    if found and not mistake.check:
        assert mistake.says in found.detail


@pytest.mark.parametrize("mistake", [each for each in MISTAKES if each.bare], ids=lambda each: each.what)
def test_what_the_original_code_computed_shows_it_without_the_plugin_s_own_words(
    mistake: Mistake, native: Native, beside_ours: Announce, tmp_path: Path
) -> None:
    beside_ours("ladder", without_original(mistake.source))

    found = first_failure(Bench("ladder", tmp_path, **native), mistake.bare)

    assert found is not None
    assert found.check == mistake.bare, found.detail


@pytest.mark.parametrize(
    ("what", "check", "says"),
    [
        ("a bias that is read and never added", "essential", "fuse.bias is loaded, but the forward computes the same"),
        ("a layer of the loop left out", "essential", "steps.1.norm.weight is loaded"),
        ("tokens shifted once more", "causal", "computed at position 7 changes with a later token"),
        ("tokens shifted once more, padded with zeros", "causal", "computed at position 8 ignores its own token"),
        ("later tokens are seen", "causal", "computed at position 7 changes with a later token"),
        ("the first sequence for all", "causal", "computed for a sequence depends on another one beside it"),
        ("a mean over all tokens", "causal", "computed for a token depends on how many follow"),
    ],
)
def test_some_wrong_forwards_show_when_nobody_says_what_is_right(
    what: str, check: str, says: str, beside_ours: Announce, tmp_path: Path
) -> None:
    (mistake,) = (each for each in MISTAKES if each.what == what)
    beside_ours("ladder", without_original(mistake.source))

    found = first_failure(Bench("ladder", tmp_path), check)

    assert found is not None
    assert (found.check, says in found.detail) == (check, True), found.detail


def test_a_wrong_state_is_told_by_the_verifier_itself(native: Native, beside_ours: Announce, tmp_path: Path) -> None:
    (mistake,) = (each for each in MISTAKES if each.what == "wrong states of the verifier")
    beside_ours("ladder", without_original(mistake.source))

    (found,) = failed(Bench("ladder", tmp_path, **native), (*IN_PROCESSES, "whole"))

    assert found.check == "reference"
    assert "state_layers() says [5, 8], and verifier_hidden_states are those of layers 4, 8" in found.detail


def run(name: str, bench: Bench) -> None:
    """Make one check."""
    (check,) = (each for each in CHECKS if each.name == name)
    check.run(bench)


def test_another_plugin_that_takes_the_checkpoint_for_its_own_is_named(
    native: Native, beside_ours: Announce, tmp_path: Path
) -> None:
    beside_ours("ladder", LADDER)
    beside_ours("toy", TOY.replace('set(source.tensors) == {"toy.weight"}', "True"))

    with pytest.raises(NonconformanceError, match=r"toy \(speculators-toy 0\.3\.0\) recognises this checkpoint, too"):
        run("distinct", Bench("ladder", tmp_path, **native))


def test_a_byte_that_is_not_the_source_s_is_found(native: Native, beside_ours: Announce, tmp_path: Path) -> None:
    beside_ours("ladder", LADDER)
    bench = Bench("ladder", tmp_path, **native)
    written = bench.converted.output_path / "model.safetensors"
    data = bytearray(written.read_bytes())
    data[-1] ^= 1
    written.write_bytes(data)

    with pytest.raises(NonconformanceError, match=r"is not, bit for bit, "):
        run("unchanged", bench)


def test_a_table_that_leads_back_elsewhere_is_found(
    native: Native, beside_ours: Announce, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside_ours("ladder", LADDER)
    monkeypatch.setattr(Table, "native", lambda self, target: "mix.weight")

    with pytest.raises(NonconformanceError, match=r"and reads that back as mix\.weight"):
        run("reversible table", Bench("ladder", tmp_path, **native))


@contextmanager
def in_place(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Let an output grow where it will stand."""
    path.mkdir(exist_ok=True)
    yield path


@pytest.mark.parametrize(
    ("check", "says"),
    [("whole", "a full disk at change [0-9]+ leaves half an output"), ("damage", "a refused checkpoint leaves out")],
)
def test_an_output_that_grows_where_it_stands_is_found(
    check: str, says: str, native: Native, beside_ours: Announce, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside_ours("ladder", LADDER)
    monkeypatch.setattr("speculators.output.staged", in_place)

    with pytest.raises(NonconformanceError, match=says):
        run(check, Bench("ladder", tmp_path, **native))


def test_what_is_written_before_a_refusal_is_found_though_it_is_tidied_up(
    native: Native, beside_ours: Announce, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside_ours("ladder", LADDER)
    bench = Bench("ladder", tmp_path, **native)

    def hasty(source: Path, output_path: Path, **more: Any) -> Any:
        (output_path.parent / "model.safetensors").write_bytes(b"")
        (output_path.parent / "model.safetensors").unlink()
        return convert_model(source, output_path=output_path, **more)

    monkeypatch.setattr("speculators.conformance.bench.convert_model", hasty)

    with pytest.raises(NonconformanceError, match=r"before a checkpoint is refused, model\.safetensors is written"):
        run("damage", bench)


def test_a_draft_vocabulary_that_the_logits_do_not_have_is_no_forward(
    native: Native, beside_ours: Announce, tmp_path: Path
) -> None:
    source = changed(
        {
            "copies_embedding = True": "copies_embedding = True\n    draft_to_target = 'd2t'",
            'draft_vocab_size=facts.dims["V"]': 'draft_vocab_size=facts.dims["H"]',
            '"V": config.draft_vocab_size': '"V": 128',
            "    def build(": "    def targets(self, *given):\n        return np.arange(64)\n\n    def build(",
        }
    )
    beside_ours("ladder", source)

    with pytest.raises(NonconformanceError, match="draft_vocab_size 64, and the logits are for 128 tokens"):
        run("forward", Bench("ladder", tmp_path, **native))


def test_a_checkpoint_that_is_not_tiny_is_not_written_again_and_again(
    native: Native, beside_ours: Announce, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside_ours("ladder", LADDER)
    monkeypatch.setattr("speculators.conformance.bench.LARGEST", 1 << 10)

    with pytest.raises(NonconformanceError, match="give a checkpoint of 0 MiB or less"):
        run("damage", Bench("ladder", tmp_path, **native))


def test_required_options_and_plurals_are_no_mistakes(native: Native, beside_ours: Announce, tmp_path: Path) -> None:
    fields = "    layer: int = Field(description='One.')\n    layers: int = Field(default=1, description='Many.')\n"
    beside_ours("ladder", changed({"    slope: float = Field(": f"{fields}    slope: float = Field("}))

    run("strict options", Bench("ladder", tmp_path))
    run("strict options", Bench("ladder", tmp_path, options={"layer": 1}, **native))
    run("alternatives", Bench("ladder", tmp_path, options={"layer": 1}, **native))


def test_one_reason_is_told_once(native: Native, beside_ours: Announce, tmp_path: Path) -> None:
    (mistake,) = (each for each in MISTAKES if each.what == "a row is missing")
    beside_ours("ladder", mistake.source)

    told = failed(Bench("ladder", tmp_path, **native), IN_PROCESSES)

    assert [finding.check for finding in told if not finding.detail.startswith("as ")] == ["accounted"]
    assert {finding.detail for finding in told[1:]} == {"as 'accounted'"}


@pytest.mark.parametrize("layout", ["bin", "sharded-safetensors", "sharded-bin", "pt"])
def test_checkpoints_come_in_any_layout(layout: str, beside_ours: Announce, tmp_path: Path) -> None:
    beside_ours("ladder", LADDER)
    given = write_native(tmp_path / "native", layout.replace("pt", "bin"))
    if layout == "pt":
        (given["checkpoint"] / "pytorch_model.bin").rename(given["checkpoint"] / "ladder.pt")
    (tmp_path / "bench").mkdir()

    assert failed(Bench("ladder", tmp_path / "bench", **given), (*IN_PROCESSES, "whole", "optional")) == []


def test_a_weight_file_of_halves_at_a_relative_path(
    beside_ours: Announce, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside_ours("ladder", LADDER)
    given = write_native(tmp_path / "native", dtype=torch.bfloat16)
    shutil.copy(given["checkpoint"] / "model.safetensors", given["checkpoint"] / "earlier.safetensors")
    (tmp_path / "bench").mkdir()
    monkeypatch.chdir(tmp_path / "native")
    for name in ("verifier", "reference"):
        given[name] = str(given[name].relative_to(Path.cwd()))
    given["checkpoint"] = "draft/model.safetensors"
    bench = Bench("ladder", Path("../bench"), **given)
    monkeypatch.chdir("/")

    assert failed(bench) == []


def test_embeddings_that_training_rounded_show_in_halves(beside_ours: Announce, tmp_path: Path) -> None:
    beside_ours("ladder", changed({"copies_embedding = True": "copies_embedding = False"}))
    given = write_native(tmp_path / "native", dtype=torch.bfloat16)
    (tmp_path / "bench").mkdir()

    found = first_failure(Bench("ladder", tmp_path / "bench", **given), "reference")

    assert found is not None
    assert found.check == "reference"


FUSED = {
    """            Rename("mix.weight", "combiner.weight", "H, 2*H"),
""": """            Rename("mix.weight", "combiner.weight", "H, 2*H"),
            Merge("mix.upper.weight", "combiner.weight", 0, "half, 2*H"),
            Merge("mix.lower.weight", "combiner.weight", 1, "half, 2*H"),
            Split("rungs.{0:L}.both.weight", ("steps.{0:L}.turn.weight", "steps.{0:L}.tilt.weight")),
""",
    "    Derive,\n": "    Derive,\n    Merge,\n    Split,\n",
    '"L": rungs}\n': '"L": rungs, "half": context.verifier.hidden_size // 2}\n',
    '"I": config.inner}': '"I": config.inner, "half": config.target_hidden_size // 2}',
    'endswith(".turn.weight")': 'endswith(".wide.weight")',
    '{"mix.weight", "input.weight", "rungs.0.turn.weight"}': '{"input.weight", "rungs.0.wide.weight"}',
}
"""How a ladder plugin reads heads of a trainer that saves fused tensors, and pieces."""


def test_tensors_that_are_cut_and_joined(beside_ours: Announce, tmp_path: Path) -> None:
    beside_ours("ladder", without_original(changed(FUSED)))
    given = write_native(tmp_path / "native")
    weights = read_tensors(given["checkpoint"])
    pieces = weights.pop("mix.weight").chunk(2)
    weights |= {"mix.upper.weight": pieces[0].clone(), "mix.lower.weight": pieces[1].clone()}
    for number in range(RUNGS):
        both = [weights.pop(f"rungs.{number}.{name}.weight") for name in ("turn", "tilt")]
        weights[f"rungs.{number}.both.weight"] = torch.cat(both)
    save_file(weights, given["checkpoint"] / "model.safetensors")
    given["optional"] = ("input.bias",)
    (tmp_path / "bench").mkdir()

    assert failed(Bench("ladder", tmp_path / "bench", **given), IN_PROCESSES) == []


def test_a_plugin_that_is_installed_twice_is_told_once(native: Native, beside_ours: Announce, tmp_path: Path) -> None:
    beside_ours("ladder", LADDER)
    beside_ours("ladder", LADDER, package="ladders-r-us", version="2.0")

    (told,) = judge(Bench("ladder", tmp_path, **native))

    assert (told.check, told.passed) == ("found", False)
    assert "ladders-r-us 2.0 and speculators-ladder 0.3.0 both bring an algorithm of this name" in told.detail


def test_a_plugin_that_prints_when_it_is_imported_is_no_heavy_one(beside_ours: Announce, tmp_path: Path) -> None:
    beside_ours("ladder", LADDER.replace("import numpy as np\n", "import numpy as np\n\nprint('torch', end='')\n"))

    assert [finding.passed for finding in judge(Bench("ladder", tmp_path), checks=CHECKS[:3])] == [True] * 3


def test_a_plugin_that_ends_the_process_is_told(beside_ours: Announce, tmp_path: Path) -> None:
    beside_ours("ladder", LADDER + "\nimport os, sys\n\nif 'pytest' not in sys.modules:\n    os._exit(3)\n")

    (light,) = (check for check in CHECKS if check.name == "light")
    (found,) = judge(Bench("ladder", tmp_path), checks=[light])

    assert found.detail == "in a process of its own: it ends with 3 and says nothing"


def test_a_plugin_without_an_example_is_checked_as_far_as_that_goes(beside_ours: Announce, tmp_path: Path) -> None:
    beside_ours("toy", TOY.replace("def example(", "def _example("))
    bench = Bench("toy", tmp_path)

    assert [finding.check for finding in judge(bench) if finding.passed] == [
        check.name for check in CHECKS if not check.needs
    ]
    for check in CHECKS:
        if check.needs == "checkpoint":
            with pytest.raises(PluginError, match="the plugin of 'toy' brings no example"):
                check.run(bench)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"draft_logits": None}, "lacks draft_logits"),
        ({"draft_input_ids": torch.zeros(2, 12)}, "draft_input_ids as float32 [2, 12], expected int64 in 2 dimensions"),
        ({"draft_logits": torch.zeros(12, 128)}, "draft_logits as float32 [12, 128], expected fractions in 3 or 4"),
        ({"draft_input_ids": torch.zeros(2, 13, dtype=torch.int64)}, "and verifier_hidden_states for [2, 12]"),
        ({"verifier_hidden_states": torch.zeros(2, 12, 64)}, "the draft model cannot be run"),
        ({"draft_token_ids": torch.zeros(2, 12, dtype=torch.int64)}, "of 24 draft_token_ids are other"),
        ("one token", "one token per sequence"),
        ("no file", "there are no reference outputs at"),
        ("garbage", "is no safetensors file of reference outputs"),
    ],
)
def test_a_file_of_reference_outputs_that_is_none(
    change: str | dict[str, Any], says: str, native: Native, beside_ours: Announce, tmp_path: Path
) -> None:
    beside_ours("ladder", LADDER)
    outputs, file = load_file(native["reference"]), tmp_path / "reference.safetensors"
    if change == "garbage":
        file.write_text("garbage")
    elif change == "one token":
        save_file({name: each[:, :1].contiguous() for name, each in outputs.items()}, file)
    elif isinstance(change, dict):
        save_file({name: each for name, each in (outputs | change).items() if each is not None}, file)
    (reference,) = (check for check in CHECKS if check.name == "reference")
    (tmp_path / "bench").mkdir()

    (found,) = judge(Bench("ladder", tmp_path / "bench", **{**native, "reference": file}), checks=[reference])

    assert not found.passed
    assert says in found.detail


def test_names_that_are_one_string_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"optional is 'input\.bias', expected a tuple of names"):
        Bench("ladder", tmp_path, optional="input.bias")


def test_a_misspelt_attribute_of_the_class_is_refused() -> None:
    with pytest.raises(TypeError, match=r"TestLadder\.refrence is nothing that the checks read; reference is meant\?"):
        type("TestLadder", (Conformance,), {"algorithm": "ladder", "refrence": Path("golden.safetensors")})
    type("TestLadder", (Conformance,), {"algorithm": "ladder", "data": 1, "test_more": lambda self: None})


SUITE = """
from pathlib import Path
from speculators.testing import Conformance


class TestLadder(Conformance):
    algorithm = "ladder"
    checkpoint = Path({checkpoint!r})
    verifier = Path({verifier!r})
    reference = Path({reference!r})
    optional = {optional!r}
    dropped = {dropped!r}
"""


def run_pytest(folder: Path, native: Native, *more: str) -> subprocess.CompletedProcess[str]:
    """Run what a plugin's author would write."""
    given = {name: str(value) if isinstance(value, Path) else value for name, value in native.items()}
    (folder / "test_ladder.py").write_text(SUITE.format(**given))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-W", "error", *more, "test_ladder.py"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_class_makes_every_check_a_test(native: Native, beside_ours: Announce, tmp_path: Path) -> None:
    beside_ours("ladder", LADDER)

    ran = run_pytest(tmp_path, native, "-v")

    assert ran.returncode == 0, ran.stdout
    assert re.findall(r"TestLadder::test_conformance\[(.*)\] PASSED", ran.stdout) == [check.name for check in CHECKS]


def test_the_class_says_what_is_wrong(native: Native, beside_ours: Announce, tmp_path: Path) -> None:
    (mistake,) = (each for each in MISTAKES if each.what == "a bias dropped")
    beside_ours("ladder", mistake.source)

    ran = run_pytest(tmp_path, native, "-k", "found or described or accounted")

    assert ran.returncode == 1
    assert "1 failed, 2 passed" in ran.stdout
    assert f"NonconformanceError: {mistake.says}" in ran.stdout
    assert issubclass(NonconformanceError, AssertionError)


def section(mark: str) -> str:
    return re.findall(rf"<!-- {mark} -->\n(.*?)<!-- end of {mark} -->", PAGE.read_text(), re.DOTALL)[0]


def test_the_page_lists_every_check_with_its_promise() -> None:
    rows = [f"| {check.name} | {check.promise} |" for check in CHECKS]

    assert section("checks") == "\n".join(["| check | promise |", "|---|---|", *rows, ""])


def test_the_page_lists_every_mistake_with_what_finds_it() -> None:
    rows = [
        f"| {each.what} | {each.check} | {each.bare or each.check} | {each.alone} | `{each.says}` |"
        for each in MISTAKES
    ]
    head = [
        "| mistake | found by | without `original` | by the example alone | the message says |",
        "|---|---|---|---|---|",
    ]

    assert section("mistakes") == "\n".join([*head, *rows, ""])
    assert len(MISTAKES) == len({each.what for each in MISTAKES}) >= 60


def test_the_page_explains_every_attribute_of_the_class() -> None:
    names = [name for name in Conformance.__annotations__ if not name.startswith("_")]

    assert re.findall(r"^\| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)[: len(names)] == names


def test_the_example_of_the_page_runs(
    native: Native, beside_ours: Announce, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside_ours("ladder", LADDER)
    (example, golden) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    shutil.copytree(native["checkpoint"], tmp_path / "data" / "ladder")
    shutil.copytree(native["verifier"], tmp_path / "data" / "verifier")
    model: Any = Verifier(native["verifier"]).load("cpu")
    outputs = load_file(native["reference"])
    monkeypatch.chdir(tmp_path / "data")
    exec(
        golden,
        {
            "model": model,
            "input_ids": outputs["input_ids"],
            "layers": (4, 8),
            "original": lambda embedded, states: original_code(
                trained(native["verifier"]), embedded, *states.chunk(2, dim=-1)
            ),
        },
    )
    (tmp_path / "test_ladder.py").write_text(example)
    found: dict[str, Any] = {"__file__": str(tmp_path / "test_ladder.py"), "__name__": "test_ladder"}
    exec(example, found)
    made = found["TestLadder"]
    (tmp_path / "bench").mkdir()

    bench = Bench(
        made.algorithm,
        tmp_path / "bench",
        made.checkpoint,
        made.verifier,
        made.options,
        made.reference,
        made.optional,
        made.dropped,
    )

    assert failed(bench, (*IN_PROCESSES, "whole", "damage")) == []
    assert Registry().get("ladder").spec.name == found["TestExample"].algorithm
