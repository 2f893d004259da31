"""What becomes of each tensor, and what is reported when it cannot be done."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from speculators.dtypes import FLOATS
from speculators.operations import Cut, join
from speculators.plan import Derivation, Facts, Move, Plan, fold, match, plan
from speculators.table import Derive, Drop, Keep, Merge, Refuse, Rename, Row, Shared, Split, Table
from speculators.weights import TensorInfo

DIMS = {"H": 4, "V": 8, "L": 2}
MADE_FROM_T2D = Derive("package:offsets", ("t2d",), "made from t2d")
EMBEDDINGS = Shared("embed.weight", "embed_tokens.weight", "V, H", verifier="embed_tokens")


def f32(*shape: int) -> TensorInfo:
    """Describe a float32 tensor."""
    return TensorInfo("F32", shape)


def planned(
    rows: tuple[Row, ...],
    tensors: Mapping[str, TensorInfo],
    *,
    dims: Mapping[str, int] = DIMS,
    parts: tuple[str, ...] = (),
    findings: tuple[str, ...] = (),
    verifier: Mapping[str, tuple[int, ...]] | None = None,
) -> Plan:
    """Match and plan with a table of ``rows``."""
    table = Table(rows)
    facts = Facts(dims, frozenset(parts), findings=findings)
    return plan(table, tensors, match(table, tensors), facts, verifier or {})


def test_match_puts_every_name_in_exactly_one_bucket() -> None:
    table = Table(
        (
            Rename("midlayer.w", "layers.0.w", "H"),
            Keep("(fc|proj).weight", "H"),
            Drop("**.inv_freq", why="recomputed"),
            Refuse("mask_hidden", why="another kind of draft"),
        ),
    )
    names = ["midlayer.w", "fc.weight", "proj.weight", "layers.0.rotary.inv_freq", "mask_hidden", "surprise"]

    found = match(table, names)

    assert {target: move.source for target, move in found.moves.items()} == {
        "layers.0.w": "midlayer.w",
        "fc.weight": "fc.weight",
    }
    assert found.dropped == {"layers.0.rotary.inv_freq": "recomputed"}
    assert found.refused == {"mask_hidden": "another kind of draft"}
    assert found.unmatched == ("surprise",)
    assert found.doubled == ("fc.weight and proj.weight are both fc.weight: only one can be meant",)


def test_the_order_of_rows_and_names_does_not_matter() -> None:
    rows = (Keep("fc.weight", "H"), Drop("fc.*", why="not needed"), Keep("norm.weight", "H"))
    names = ["norm.weight", "fc.weight", "other"]

    assert match(Table(rows), names) == match(Table(rows[::-1]), names[::-1])


@pytest.mark.parametrize(
    ("rows", "bucket"),
    [
        pytest.param((Keep("fc", "H"), Drop("fc", why="a")), "dropped", id="drop before keep"),
        pytest.param((Drop("fc", why="a"), Refuse("fc", why="b")), "refused", id="refuse before drop"),
        pytest.param((Keep("fc", "H"), Refuse("**", why="b")), "refused", id="refuse before keep"),
    ],
)
def test_the_stricter_row_wins(rows: tuple[Row, ...], bucket: str) -> None:
    found = match(Table(rows), ["fc"])

    filled = [name for name in ("moves", "dropped", "refused", "unmatched", "doubled") if getattr(found, name)]
    assert filled == [bucket]


@pytest.mark.parametrize("name", ["fc.weight", "model.fc.weight", "ea_layer.fc.weight"])
def test_match_looks_behind_declared_prefixes(name: str) -> None:
    table = Table((Keep("fc.weight", "H"),), prefixes=("model.", "ea_layer."))

    assert match(table, [name]).moves["fc.weight"].source == name


def test_a_tensor_with_and_without_its_prefix_is_doubled() -> None:
    table = Table((Keep("fc.weight", "H"),), prefixes=("model.",))

    found = match(table, ["model.fc.weight", "fc.weight"])

    assert found.doubled == ("fc.weight and model.fc.weight are both fc.weight: only one can be meant",)


def test_an_undeclared_prefix_is_unmatched() -> None:
    assert match(Table((Keep("fc.weight", "H"),)), ["model.fc.weight"]).unmatched == ("model.fc.weight",)


def test_match_remembers_the_number() -> None:
    table = Table((Rename("blocks.{0:L}.w", "layers.{0:L}.w", "H"),))

    assert match(table, ["blocks.7.w"]).moves["layers.7.w"].numbers == (7,)


def test_a_part_is_present_when_any_of_its_tensors_is() -> None:
    table = Table((Keep("fc.weight", "H"), Keep("fc.bias", "H", part="bias"), Keep("d2t", "H", part="vocabulary")))

    found = match(table, ["fc.weight", "fc.bias"])

    assert found.present("bias")
    assert not found.present("vocabulary")


def test_a_plan_moves_every_tensor_in_the_order_of_targets() -> None:
    result = planned(
        (Rename("midlayer.{0:L}.w", "layers.{0:L}.w", "2*H, H"), Keep("fc.weight", "H")),
        {"midlayer.0.w": f32(8, 4), "midlayer.1.w": f32(8, 4), "fc.weight": f32(4)},
    )

    assert result == Plan(
        moves=(
            Move("fc.weight", "fc.weight", f32(4)),
            Move("midlayer.0.w", "layers.0.w", f32(8, 4)),
            Move("midlayer.1.w", "layers.1.w", f32(8, 4)),
        )
    )


def test_a_dropped_tensor_is_in_the_plan_with_its_reason() -> None:
    result = planned((Drop("inv_freq", why="recomputed"),), {"inv_freq": f32(2)})

    assert result == Plan(dropped={"inv_freq": "recomputed"})


@pytest.mark.parametrize(
    ("row", "tensors", "finding"),
    [
        pytest.param(
            Rename("midlayer.w", "layers.0.w", "2*H, H"), {}, "missing: midlayer.w [2*H, H] = [8, 4]", id="missing"
        ),
        pytest.param(
            Keep("(midlayer|layers.0).w", "H"),
            {},
            "missing: midlayer.w [H] = [4]",
            id="missing, in training's spelling",
        ),
        pytest.param(
            Keep("layers.{0:L}.w", "H"), {"layers.1.w": f32(4)}, "missing: layers.0.w [H] = [4]", id="missing layer"
        ),
        pytest.param(Keep("layers.{0:L}.w", "H"), {}, "missing: layers.{0…1}.w [H] = [4]", id="missing layers, folded"),
        pytest.param(
            Keep("fc.weight", "V, H"),
            {"fc.weight": f32(4, 8)},
            "fc.weight is F32 [4, 8], expected [V, H] = [8, 4]",
            id="transposed",
        ),
        pytest.param(
            Keep("fc.weight", "H"),
            {"fc.weight": f32(4, 1)},
            "fc.weight is F32 [4, 1], expected [H] = [4]",
            id="another rank",
        ),
        pytest.param(
            Keep("fc.weight", "H"),
            {"fc.weight": TensorInfo("I8", (4,))},
            "fc.weight is I8 [4], expected F64 or F32 or F16 or BF16; quantised weights are not supported",
            id="another dtype",
        ),
        pytest.param(
            Keep("fc.weight", "H"),
            {"fc.weight": f32(4), "surprise.weight": f32(2)},
            "surprise.weight F32 [2]: matches no row of the table",
            id="no row",
        ),
    ],
)
def test_one_finding(row: Row, tensors: dict[str, TensorInfo], finding: str) -> None:
    assert planned((row,), tensors).findings == (finding,)


def test_a_tensor_of_wrong_dtype_and_shape_is_reported_for_both() -> None:
    result = planned((Keep("d2t", "V", dtypes=("I64", "I32")),), {"d2t": f32(4)})

    assert result.findings == ("d2t is F32 [4], expected I64 or I32", "d2t is F32 [4], expected [V] = [8]")


def test_all_findings_are_reported_together() -> None:
    result = planned(
        (Keep("(fc|proj)", "H"), Keep("norm", "H"), Keep("gate", "H"), Keep("layers.{0:L}.w", "H")),
        {
            "fc": f32(4),
            "proj": f32(4),
            "gate": f32(5),
            "layers.0.w": f32(4),
            "layers.1.w": f32(4),
            "layers.2.w": f32(4),
            "surprise": f32(2),
        },
        findings=("config.json says 3 layers",),
    )

    assert result.findings == (
        "fc and proj are both fc: only one can be meant",
        "surprise F32 [2]: matches no row of the table",
        "layers.2.w is outside layers.{0:L}.w with L = 2",
        "missing: norm [H] = [4]",
        "gate is F32 [5], expected [H] = [4]",
        "config.json says 3 layers",
    )


def test_a_tensor_to_refuse_is_reported_alone() -> None:
    result = planned(
        (Refuse("medusa.*", why="a Medusa head is no EAGLE head"), Keep("fc.weight", "H"), Drop("x", why="not needed")),
        {"medusa.0": f32(1), "medusa.1": f32(1), "medusa.2": f32(1), "surprise": f32(1), "x": f32(1)},
        findings=("config.json says 3 layers",),
    )

    assert result == Plan(findings=("a Medusa head is no EAGLE head (medusa.0 and 2 more)",))


def test_each_reason_to_refuse_is_named_once() -> None:
    result = planned((Refuse("a", why="one"), Refuse("b.*", why="another")), {"a": f32(1), "b.0": f32(1)})

    assert result.findings == ("one (a)", "another (b.0)")


OPTIONAL = (
    Keep("norm.weight", "H", part="norm"),
    Keep("norm.bias", "H", part="norm", unless="the norm is off"),
)


def test_an_optional_part_that_is_not_in_use_may_be_absent() -> None:
    assert planned(OPTIONAL, {}) == Plan()


def test_an_optional_part_that_is_in_use_must_be_there_whole() -> None:
    result = planned(OPTIONAL, {"norm.weight": f32(4)}, parts=("norm",))

    assert result.findings == ("missing: norm.bias [H] = [4]",)


def test_an_optional_part_that_is_in_use_is_moved() -> None:
    result = planned(OPTIONAL, {"norm.weight": f32(4), "norm.bias": f32(4)}, parts=("norm",))

    assert result == Plan(moves=(Move("norm.bias", "norm.bias", f32(4)), Move("norm.weight", "norm.weight", f32(4))))


def test_an_optional_part_that_is_there_but_not_in_use_is_left_out_with_the_reason() -> None:
    result = planned(OPTIONAL, {"norm.weight": f32(4), "norm.bias": f32(4)})

    assert result == Plan(dropped={"norm.weight": "the draft does not use norm", "norm.bias": "the norm is off"})


def test_a_shared_tensor_that_is_there_is_compared_with_the_verifiers() -> None:
    result = planned((EMBEDDINGS,), {"embed.weight": f32(8, 4)}, verifier={"embed_tokens": (8, 4)})

    (comparison,) = result.comparisons
    assert comparison.move == Move("embed.weight", "embed_tokens.weight", f32(8, 4))
    assert comparison.row == EMBEDDINGS
    assert (result.moves, result.findings) == ((), ())


def test_an_absent_shared_tensor_comes_from_the_verifier() -> None:
    result = planned((EMBEDDINGS,), {}, verifier={"embed_tokens": (8, 4)})

    assert result == Plan(from_verifier={"embed_tokens.weight": "embed_tokens"})


def test_an_absent_shared_tensor_is_missing_when_the_verifiers_has_another_shape() -> None:
    result = planned((EMBEDDINGS,), {}, verifier={"embed_tokens": (16, 4)})

    assert result.from_verifier == {}
    assert result.findings == (
        "missing: embed.weight [V, H] = [8, 4]; the verifier's embed_tokens is [16, 4] and cannot stand in",
    )


def test_an_absent_shared_tensor_is_missing_when_the_verifier_has_none() -> None:
    result = planned((EMBEDDINGS,), {}, verifier={"lm_head": (8, 4)})

    assert result.findings == ("missing: embed.weight [V, H] = [8, 4]",)


def test_an_absent_tensor_is_made_from_its_source() -> None:
    row = Keep("d2t", "V", dtypes=("I64",), derive=MADE_FROM_T2D)

    result = planned((row, Keep("(t2d|mask)", "H")), {"mask": f32(4)})

    assert result == Plan(
        moves=(Move("mask", "t2d", f32(4)),),
        derivations=(Derivation("d2t", ("mask",), (8,), ("I64",), MADE_FROM_T2D, "made from t2d"),),
    )


def test_a_tensor_that_is_there_is_not_made() -> None:
    result = planned((Keep("d2t", "V", derive=MADE_FROM_T2D), Keep("t2d", "H")), {"d2t": f32(8), "t2d": f32(4)})

    assert result.derivations == ()


def test_an_absent_tensor_is_missing_when_its_source_is_absent_too() -> None:
    row = Keep("d2t", "V", part="vocabulary", derive=MADE_FROM_T2D)

    result = planned((row, Keep("t2d", "H", part="mask")), {}, parts=("vocabulary",))

    assert result == Plan(findings=("missing: d2t [V] = [8]",))


def test_a_tensor_is_made_only_when_all_its_sources_are_there() -> None:
    derive = Derive("package:make", ("a", "b"), "made from a and b")

    result = planned((Keep("c", "H", derive=derive), Keep("a", "H"), Keep("b", "H", part="b")), {"a": f32(4)})

    assert result.derivations == ()
    assert result.findings == ("missing: c [H] = [4]",)


def test_a_tensor_is_made_from_the_source_of_its_own_layer() -> None:
    derive = Derive("package:zeros", ("layers.{0:L}.q",), "zeros")
    row = Keep("layers.{0:L}.o", "H", derive=derive)

    result = planned(
        (row, Rename("blocks.{0:L}.q", "layers.{0:L}.q", "H")), {"blocks.0.q": f32(4), "blocks.1.q": f32(4)}
    )

    assert result.derivations == (
        Derivation("layers.0.o", ("blocks.0.q",), (4,), FLOATS, derive, "zeros"),
        Derivation("layers.1.o", ("blocks.1.q",), (4,), FLOATS, derive, "zeros"),
    )


def test_a_tensor_of_a_part_that_is_not_in_use_is_not_made() -> None:
    row = Keep("d2t", "V", part="vocabulary", derive=MADE_FROM_T2D)

    assert planned((row, Keep("t2d", "H")), {"t2d": f32(4)}).derivations == ()


@pytest.mark.parametrize(
    ("row", "tensors", "findings"),
    [
        pytest.param(
            Keep("layers.{0:L}.w", "H"),
            {f"layers.{number}.w": f32(4) for number in range(4)},
            ("layers.{2…3}.w is outside layers.{0:L}.w with L = 2",),
            id="bounded by a symbol",
        ),
        pytest.param(
            Keep("layers.{0:1}.w", "H"),
            {"layers.0.w": f32(4), "layers.1.w": f32(4)},
            ("layers.1.w is outside layers.{0:1}.w",),
            id="bounded by a number",
        ),
        pytest.param(
            Keep("layers.{0:L}.w", "H", part="extra"),
            {"layers.2.w": f32(4)},
            ("layers.2.w is outside layers.{0:L}.w with L = 2",),
            id="of a part that is not in use",
        ),
    ],
)
def test_a_number_beyond_the_range_is_reported(
    row: Row, tensors: dict[str, TensorInfo], findings: tuple[str, ...]
) -> None:
    assert planned((row,), tensors).findings == findings


def test_unknown_symbols_are_reported_together() -> None:
    result = planned(
        (Keep("fc", "TH, H"), Keep("layers.{0:N}.w", "H")), {"fc": f32(8, 4), "layers.0.w": f32(4)}, dims={"H": 4}
    )

    assert result.findings == ("neither config nor tensors tell N, TH",)


def test_unknown_symbols_are_not_reported_when_their_cause_is() -> None:
    result = planned((Keep("fc", "TH, H"),), {}, dims={"H": 4})

    assert result.findings == ("missing: fc [TH, H]",)


def test_an_absent_shared_tensor_of_unknown_shape_comes_from_the_verifier_but_the_symbol_is_reported() -> None:
    result = planned((EMBEDDINGS,), {}, dims={"H": 4}, verifier={"embed_tokens": (8, 4)})

    assert result.from_verifier == {"embed_tokens.weight": "embed_tokens"}
    assert result.findings == ("neither config nor tensors tell V",)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        pytest.param([], [], id="nothing"),
        pytest.param(["fc.weight"], ["fc.weight"], id="no number"),
        pytest.param(["layers.3.w"], ["layers.3.w"], id="one number"),
        pytest.param(["layers.1.w", "layers.2.w", "layers.3.w"], ["layers.{1…3}.w"], id="a run"),
        pytest.param(["layers.2.w", "layers.1.w"], ["layers.{1…2}.w"], id="a run in any order"),
        pytest.param(["layers.4.w", "layers.1.w"], ["layers.{1,4}.w"], id="a gap"),
        pytest.param(["layers.9.w", "layers.10.w"], ["layers.{9…10}.w"], id="numbers, not text"),
        pytest.param(
            ["layers.0.a", "layers.0.b", "layers.1.a"], ["layers.{0…1}.a", "layers.0.b"], id="different ends apart"
        ),
        pytest.param(
            ["layers.0.experts.1.w", "layers.1.experts.1.w"],
            ["layers.{0…1}.experts.1.w"],
            id="the first number is the layer",
        ),
        pytest.param(["layers.0", "layers.1"], ["layers.0", "layers.1"], id="a number at the end stays"),
        pytest.param(["layers.01.w"], ["layers.01.w"], id="a leading zero stays"),
    ],
)
def test_fold(lines: list[str], expected: list[str]) -> None:
    assert fold(lines) == expected


def test_fold_keeps_tensors_of_different_shapes_apart() -> None:
    tensors = {"layers.0.w": f32(4, 4), "layers.1.w": f32(4, 4), "layers.2.w": f32(8)}

    assert fold(tensors, tensors) == ["layers.{0…1}.w F32 [4, 4]", "layers.2.w F32 [8]"]


FUSED = (
    Rename("layers.{0:L}.gate", "mlp.{0:L}.gate", "I, H"),
    Rename("layers.{0:L}.up", "mlp.{0:L}.up", "2*I, H"),
    Split("layers.{0:L}.gate_up", ("mlp.{0:L}.gate", "mlp.{0:L}.up")),
)
JOINED = (
    Keep("qkv", "3*H, H"),
    Merge("(q|query)", "qkv", 0, "H, H"),
    Merge("kv", "qkv", 1, "2*H, H"),
)


def test_a_tensor_that_holds_several_is_cut_into_them() -> None:
    result = planned(FUSED, {"layers.0.gate_up": f32(9, 4)}, dims={"L": 1, "I": 3, "H": 4})

    assert result == Plan(
        derivations=(
            Derivation("mlp.0.gate", ("layers.0.gate_up",), (3, 4), FLOATS, Cut(0), reworks=True),
            Derivation("mlp.0.up", ("layers.0.gate_up",), (6, 4), FLOATS, Cut(12), reworks=True),
        )
    )


def test_tensors_that_are_stored_apart_need_no_cutting() -> None:
    tensors = {"layers.0.gate": f32(3, 4), "layers.0.up": f32(6, 4)}

    result = planned(FUSED, tensors, dims={"L": 1, "I": 3, "H": 4})

    assert [move.target for move in result.moves] == ["mlp.0.gate", "mlp.0.up"]
    assert result.derivations == ()


def test_pieces_are_joined_in_the_order_of_their_places() -> None:
    result = planned(JOINED, {"kv": f32(8, 4), "query": f32(4, 4)})

    assert result == Plan(derivations=(Derivation("qkv", ("query", "kv"), (12, 4), FLOATS, join, reworks=True),))


@pytest.mark.parametrize(
    ("rows", "tensors", "finding"),
    [
        pytest.param(
            FUSED,
            {"layers.0.gate_up": f32(8, 4)},
            "layers.0.gate_up is F32 [8, 4], expected [9, 4] for its pieces [3, 4] and [6, 4]",
            id="a larger tensor of another size",
        ),
        pytest.param(
            FUSED,
            {"layers.0.gate_up": TensorInfo("I8", (9, 4))},
            "layers.0.gate_up is I8 [9, 4], expected F64 or F32 or F16 or BF16",
            id="a larger tensor of another kind",
        ),
        pytest.param(
            FUSED,
            {"layers.0.gate_up": f32(9, 4), "layers.0.up": f32(6, 4)},
            "layers.0.gate_up holds mlp.{0:L}.up, which is stored as layers.{0:L}.up too: only one can be meant",
            id="a piece that is stored by itself too",
        ),
        pytest.param(
            FUSED,
            {"layers.0.gate_up": f32(9, 4), "layers.7.gate_up": f32(9, 4)},
            "layers.7.gate_up holds mlp.{0:L}.gate, which the draft does not use",
            id="a layer too many",
        ),
        pytest.param(
            JOINED,
            {"q": f32(4, 4)},
            "missing: kv [2*H, H], a piece of qkv",
            id="a missing piece",
        ),
        pytest.param(
            JOINED,
            {"q": f32(8, 4), "kv": f32(4, 4)},
            "q is F32 [8, 4], expected [H, H] = [4, 4]",
            id="pieces of other shapes that fill it",
        ),
        pytest.param(
            JOINED,
            {"q": f32(4, 4), "query": f32(4, 4), "kv": f32(8, 4)},
            "kv and q and query both hold qkv: only one can be meant",
            id="a piece under two names",
        ),
        pytest.param(
            JOINED,
            {"q": f32(4, 4), "kv": TensorInfo("F16", (8, 4))},
            "the pieces of qkv differ in dtype: kv is F16 [8, 4], q is F32 [4, 4]",
            id="pieces of two dtypes",
        ),
        pytest.param(
            (Keep("ab", "V, H"), Merge("a", "ab", 0, "H, H"), Merge("b", "ab", 1, "I, H")),
            {"a": f32(4, 4), "b": f32(3, 4)},
            "a and b do not fill ab [V, H] = [8, 4]",
            id="pieces that do not fill it",
        ),
        pytest.param(
            JOINED,
            {"q": f32(4, 4), "kv": f32(8, 4), "qkv": f32(12, 4)},
            "kv holds qkv, which is stored as qkv too: only one can be meant",
            id="pieces beside the whole",
        ),
    ],
)
def test_pieces_that_do_not_fit_are_findings(
    rows: tuple[Row, ...], tensors: Mapping[str, TensorInfo], finding: str
) -> None:
    result = planned(rows, tensors, dims={"L": 1, "I": 3, "H": 4, "V": 8})

    assert finding in result.findings


def test_biases_are_cut_as_weights_are() -> None:
    rows = (Keep("q", "H", part="bias"), Keep("k", "I", part="bias"), Split("(qk|fused)", ("q", "k")))

    result = planned(rows, {"fused": f32(7)}, dims={"H": 4, "I": 3}, parts=("bias",))

    assert [(made.target, made.shape, made.operation) for made in result.derivations] == [
        ("q", (4,), Cut(0)),
        ("k", (3,), Cut(4)),
    ]


def test_an_optional_part_is_present_in_a_larger_tensor_too() -> None:
    table = Table((Keep("q", "H", part="bias"), Keep("k", "H", part="bias"), Split("qk", ("q", "k")), Keep("w", "H")))

    assert match(table, ["qk", "w"]).present("bias")
    assert not match(table, ["w"]).present("bias")


def test_a_piece_of_a_part_that_is_not_in_use_is_a_finding() -> None:
    rows = (Keep("q", "H"), Keep("k", "H", part="extra"), Split("qk", ("q", "k")))

    assert planned(rows, {"qk": f32(8)}).findings == ("qk holds k, which the draft does not use",)


def test_pieces_are_found_behind_a_prefix() -> None:
    table = Table((Keep("ab", "2*H"), Merge("a", "ab", 0, "H"), Merge("b", "ab", 1, "H")), prefixes=("model.",))
    tensors = {"model.a": f32(4), "b": f32(4)}
    matching = match(table, tensors)

    result = plan(table, tensors, matching, Facts(DIMS), {})

    assert [made.sources for made in result.derivations] == [("model.a", "b")]
    assert matching.native == {"a": "model.a", "b": "b"}


@pytest.mark.parametrize("dims", [{"H": 4}, {"I": 3, "L": 1}, {"H": 4, "L": 1}], ids=str)
def test_a_larger_tensor_of_unknown_size_says_what_is_unknown(dims: dict[str, int]) -> None:
    unknown = ", ".join(sorted({"H", "I", "L"} - dims.keys()) if "L" in dims else ["L"])

    assert planned(FUSED, {"layers.0.gate_up": f32(9, 4)}, dims=dims).findings == (
        f"neither config nor tensors tell {unknown}",
    )


def test_a_split_and_merged_tensor_for_one_target_are_a_finding() -> None:
    rows = (Keep("q", "2*H"), Keep("k", "H"), Split("qk", ("q", "k")), Merge("a", "q", 0, "H"), Merge("b", "q", 1, "H"))

    findings = planned(rows, {"qk": f32(12), "a": f32(4)}).findings

    assert findings == ("a and qk both hold q: only one can be meant",)


def test_findings_about_pieces_of_many_layers_are_one_line_each() -> None:
    tensors = {f"layers.{layer}.gate_up": f32(9, 4) for layer in range(4)}
    tensors |= {f"layers.{layer}.up": f32(6, 4) for layer in range(4)}

    assert planned(FUSED, tensors, dims={"L": 2, "I": 3, "H": 4}).findings == (
        "layers.{2…3}.up is outside layers.{0:L}.up with L = 2",
        "layers.{0…3}.gate_up holds mlp.{0:L}.up, which is stored as layers.{0:L}.up too: only one can be meant",
        "layers.{2…3}.gate_up holds mlp.{0:L}.gate, which the draft does not use",
    )


def test_a_larger_tensor_of_another_size_is_one_finding() -> None:
    result = planned(FUSED, {"layers.0.gate_up": f32(8, 4)}, dims={"L": 1, "I": 3, "H": 4})

    assert len(result.findings) == 1
