"""The rows of a table: what their patterns match, and what is refused where it is written."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from speculators.table import (
    Derive,
    Drop,
    Keep,
    Merge,
    Refuse,
    Rename,
    Row,
    Shared,
    Split,
    Table,
    evaluate,
    fill,
    symbols,
)


@pytest.mark.parametrize(
    ("pattern", "name", "numbers"),
    [
        pytest.param("fc.weight", "fc.weight", (), id="exact name"),
        pytest.param("(midlayer|layers.0).weight", "midlayer.weight", (), id="first alternative"),
        pytest.param("(midlayer|layers.0).weight", "layers.0.weight", (), id="second alternative"),
        pytest.param("(|model.)fc.weight", "fc.weight", (), id="empty alternative"),
        pytest.param("layers.{0:n}.weight", "layers.0.weight", (0,), id="range from 0"),
        pytest.param("layers.{1:L}.weight", "layers.1.weight", (1,), id="range from 1"),
        pytest.param("layers.{1:L}.weight", "layers.20.weight", (20,), id="number of two digits"),
        pytest.param("*.inv_freq", "rotary_emb.inv_freq", (), id="one star is one part"),
        pytest.param("**.inv_freq", "layers.0.rotary_emb.inv_freq", (), id="two stars are any stretch"),
        pytest.param("**", "anything.at.all", (), id="two stars alone"),
    ],
)
def test_a_pattern_matches(pattern: str, name: str, numbers: tuple[int, ...]) -> None:
    found = Row(pattern).regex.fullmatch(name)

    assert found is not None
    assert tuple(map(int, found.groups())) == numbers


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        pytest.param("fc.weight", "fc.weight_scale", id="longer name"),
        pytest.param("fc.weight", "model.fc.weight", id="name with something before"),
        pytest.param("fc.weight", "fc-weight", id="a dot is a dot"),
        pytest.param("(midlayer|layers.0).weight", "midlayer|layers.0.weight", id="both alternatives at once"),
        pytest.param("layers.{1:L}.weight", "layers.0.weight", id="number below the range"),
        pytest.param("layers.{0:n}.weight", "layers.01.weight", id="leading zero"),
        pytest.param("layers.{0:n}.weight", "layers.-1.weight", id="negative number"),
        pytest.param("layers.{0:n}.weight", "layers..weight", id="no number"),
        pytest.param("*.inv_freq", "layers.rotary_emb.inv_freq", id="one star is not two parts"),
        pytest.param("*.inv_freq", ".inv_freq", id="one star is not nothing"),
    ],
)
def test_a_pattern_does_not_match(pattern: str, name: str) -> None:
    assert Row(pattern).regex.fullmatch(name) is None


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param("layers.{0:n.weight", id="open brace"),
        pytest.param("layers.0:n}.weight", id="closing brace alone"),
        pytest.param("layers.{n}.weight", id="range without a start"),
        pytest.param("layers.{0:}.weight", id="range without an end"),
        pytest.param("(midlayer|layers.0.weight", id="open parenthesis"),
        pytest.param("midlayer).weight", id="closing parenthesis alone"),
        pytest.param("((a|b)|c).weight", id="nested alternatives"),
    ],
)
@pytest.mark.parametrize("row", [Row, lambda pattern: Drop(pattern, why="not needed")], ids=["Row", "Drop"])
def test_a_malformed_pattern_is_refused(row: Callable[[str], Row], pattern: str) -> None:
    with pytest.raises(ValueError, match="malformed pattern"):
        row(pattern)


@pytest.mark.parametrize("pattern", ["layers.{2:L}.weight", "layers.{L:4}.weight"])
def test_a_range_that_starts_elsewhere_than_at_0_or_1_is_refused_where_it_is_written(pattern: str) -> None:
    with pytest.raises(ValueError, match="starts at 0 or 1"):
        Drop(pattern, why="not needed")


def test_a_row_may_run_over_several_numbers() -> None:
    row = Rename("layers.{0:L}.experts.{0:E}.weight", "blocks.{0:L}.experts.{0:E}.weight", "H")

    found = row.regex.fullmatch("layers.10.experts.2.weight")

    assert found is not None
    assert row.numbered(tuple(map(int, found.groups()))) == "blocks.10.experts.2.weight"
    assert row.expansions({"L": 2, "E": 3}) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    with pytest.raises(ValueError, match="L times E is 2000, at most 1000 can be converted"):
        row.expansions({"L": 40, "E": 50})


def test_a_table_is_read_backwards() -> None:
    table = Table(
        (Rename("(midlayer|layers.0).norm.weight", "layers.0.norm.weight", "H"), Keep("fc.{0:n}.weight", "H"))
    )

    assert table.native("layers.0.norm.weight") == "midlayer.norm.weight"
    assert table.native("fc.12.weight") == "fc.12.weight"
    with pytest.raises(KeyError, match="midlayer"):
        table.native("midlayer.norm.weight")


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param("", id="empty"),
        pytest.param("V,", id="trailing comma"),
        pytest.param("V, , H", id="empty dimension"),
        pytest.param("2**H", id="power"),
        pytest.param("H + 1", id="sum"),
        pytest.param("-1", id="negative number"),
        pytest.param("2H", id="number that runs into a symbol"),
        pytest.param("V x H", id="another product sign"),
    ],
)
def test_a_malformed_shape_is_refused(shape: str) -> None:
    with pytest.raises(ValueError, match="malformed shape"):
        Keep("fc.weight", shape)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param("*.weight", "fc.weight", id="star in the source"),
        pytest.param("fc.weight", "*.weight", id="star in the target"),
        pytest.param("**", "**", id="stars on both sides"),
        pytest.param("(a|b).weight", "(a|b).weight", id="alternatives in the target"),
    ],
)
def test_a_written_tensor_needs_exact_names(source: str, target: str) -> None:
    with pytest.raises(ValueError, match="needs exact names"):
        Rename(source, target, "H")


@pytest.mark.parametrize(
    ("source", "target"),
    [
        pytest.param("layers.{0:L}.weight", "layers.{1:L}.weight", id="other start"),
        pytest.param("layers.{0:L}.weight", "layers.{0:N}.weight", id="other end"),
        pytest.param("layers.{0:L}.weight", "layer.weight", id="only in the source"),
        pytest.param("layer.weight", "layers.{0:L}.weight", id="only in the target"),
    ],
)
def test_both_sides_of_a_row_run_over_the_same_numbers(source: str, target: str) -> None:
    with pytest.raises(ValueError, match="numbered places differ"):
        Rename(source, target, "H")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(Keep("fc.weight", "H"), Rename("proj.weight", "fc.weight", "H"), id="same target"),
        pytest.param(
            Rename("a.{0:L}.w", "layers.{0:L}.w", "H"), Rename("b.{0:L}.w", "layers.{0:L}.w", "H"), id="same range"
        ),
        pytest.param(
            Rename("a.{0:L}.w", "layers.{0:L}.w", "H"), Rename("b.w", "layers.0.w", "H"), id="one name of a range"
        ),
        pytest.param(
            Rename("a.{0:L}.w", "layers.{0:L}.w", "H"), Rename("b.{1:N}.w", "layers.{1:N}.w", "H"), id="crossing ranges"
        ),
    ],
)
@pytest.mark.parametrize("turn", [1, -1], ids=["in order", "reversed"])
def test_two_rows_that_write_one_target_are_refused(first: Rename, second: Rename, turn: int) -> None:
    with pytest.raises(ValueError, match="two rows write"):
        Table((first, second)[::turn])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(Keep("fc.weight", "H"), Rename("fc.weight", "proj.weight", "H"), id="same source"),
        pytest.param(Rename("a", "x", "H"), Rename("(b|a)", "y", "H"), id="exact name and second alternative"),
        pytest.param(Rename("(a|c)", "x", "H"), Rename("(b|c)", "y", "H"), id="second alternative of both"),
        pytest.param(
            Rename("layers.{0:L}.w", "x.{0:L}", "H"), Rename("layers.0.w", "y", "H"), id="first number of a range"
        ),
        pytest.param(
            Rename("layers.{0:L}.w", "x.{0:L}", "H"), Rename("layers.3.w", "y", "H"), id="later number of a range"
        ),
        pytest.param(
            Rename("layers.{0:L}.w", "x.{0:L}", "H"), Rename("layers.{1:L}.w", "y.{1:L}", "H"), id="crossing ranges"
        ),
    ],
)
@pytest.mark.parametrize("turn", [1, -1], ids=["in order", "reversed"])
def test_two_written_rows_that_match_one_name_are_refused(first: Rename, second: Rename, turn: int) -> None:
    with pytest.raises(ValueError, match=r"both match"):
        Table((first, second)[::turn])


def test_a_range_from_1_leaves_0_to_another_row() -> None:
    rows = (Rename("layers.0.w", "first", "H"), Rename("layers.{1:L}.w", "rest.{1:L}", "H"))

    assert Table(rows).moving == rows


def test_dropped_and_refused_rows_may_overlap_with_written_ones() -> None:
    keep = Keep("fc.weight", "H")

    table = Table((keep, Drop("fc.*", why="not needed"), Refuse("**", why="something else")))

    assert table.moving == (keep,)


def test_a_kept_tensor_is_written_under_its_first_spelling() -> None:
    row = Keep("(midlayer|layers.0).(mlp|ffn).up_proj.weight", "I, H")

    assert row.target == "midlayer.mlp.up_proj.weight"
    assert row.name == "midlayer.mlp.up_proj.weight"


def test_a_kept_tensor_with_a_range_keeps_it() -> None:
    assert Keep("layers.{0:L}.weight", "H").target == "layers.{0:L}.weight"


def test_keep_passes_everything_on() -> None:
    derive = Derive("package:make", ("t2d",), "made from t2d")

    row = Keep("d2t", "DV", part="vocabulary", dtypes=("I64",), derive=derive, unless="not used")

    assert row == Rename("d2t", "d2t", "DV", part="vocabulary", dtypes=("I64",), derive=derive, unless="not used")


def test_a_written_row_accepts_any_float_dtype_unless_told_otherwise() -> None:
    assert Keep("fc.weight", "H").dtypes == ("F64", "F32", "F16", "BF16")


def test_the_row_of_an_output_recognises_the_target_and_makes_nothing() -> None:
    row = Rename("midlayer.w", "layers.0.w", "H", part="mlp", derive=Derive("package:make", ("a",), "made from a"))

    assert row.as_output() == Rename("layers.0.w", "layers.0.w", "H", part="mlp")


def test_the_row_of_an_output_stays_shared() -> None:
    row = Shared("model.embed.weight", "embed.weight", "V, H", verifier="embed_tokens", own=False)

    assert row.as_output() == Shared("embed.weight", "embed.weight", "V, H", verifier="embed_tokens", own=False)


@pytest.mark.parametrize(
    ("pattern", "dims", "expected"),
    [
        pytest.param("fc.weight", {}, [()], id="no place"),
        pytest.param("layers.{0:L}.weight", {"L": 2}, [(0,), (1,)], id="from 0"),
        pytest.param("layers.{1:L}.weight", {"L": 3}, [(1,), (2,)], id="from 1"),
        pytest.param("layers.{0:2}.weight", {}, [(0,), (1,)], id="bounded by a number"),
        pytest.param("layers.{1:L}.weight", {"L": 1}, [], id="nothing left"),
    ],
)
def test_a_row_runs_over_its_numbers(pattern: str, dims: dict[str, int], expected: list[tuple[int, ...]]) -> None:
    assert Keep(pattern, "H").expansions(dims) == expected


def test_a_row_cannot_run_to_an_unknown_bound() -> None:
    with pytest.raises(KeyError, match="L"):
        Keep("layers.{0:L}.weight", "H").expansions({"H": 4})


def test_the_bounds_of_a_row_are_its_symbols() -> None:
    assert Keep("layers.{0:L}.weight", "H").bounds == ("L",)
    assert Keep("layers.{0:2}.weight", "H").bounds == ()


def test_a_number_fills_the_place_of_the_target() -> None:
    assert Rename("blocks.{0:L}.w", "layers.{0:L}.w", "H").numbered((3,)) == "layers.3.w"


def test_the_parts_of_a_table_are_those_of_its_written_rows() -> None:
    table = Table((Keep("d2t", "DV", part="vocabulary"), Keep("b", "H", part="bias"), Keep("fc", "H"), Drop("x", "y")))

    assert table.parts == ("bias", "vocabulary")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        pytest.param("fc.weight", ["fc.weight"], id="no prefix"),
        pytest.param("model.fc.weight", ["model.fc.weight", "fc.weight"], id="declared prefix"),
        pytest.param("ea_layer.fc.weight", ["ea_layer.fc.weight", "fc.weight"], id="another declared prefix"),
        pytest.param("draft.fc.weight", ["draft.fc.weight"], id="undeclared prefix"),
        pytest.param("fc.model.weight", ["fc.model.weight"], id="not at the start"),
        pytest.param("model.model.fc", ["model.model.fc", "model.fc", "fc"], id="one after another"),
    ],
)
def test_spellings_of_a_name(name: str, expected: list[str]) -> None:
    assert Table((), prefixes=("model.", "ea_layer.")).spellings(name) == expected


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        pytest.param("H", ["H"], id="one symbol"),
        pytest.param("heads*head_dim, 2*H", ["heads", "head_dim", "2", "H"], id="products"),
        pytest.param(" V ,H ", ["V", "H"], id="spaces do not matter"),
    ],
)
def test_symbols_of_a_shape(shape: str, expected: list[str]) -> None:
    assert symbols(shape) == expected


@pytest.mark.parametrize(
    ("product", "expected"),
    [("7", 7), ("H", 4), ("2*H", 8), ("H*2", 8), (" heads * head_dim ", 15), ("0*H", 0)],
)
def test_evaluate(product: str, expected: int) -> None:
    assert evaluate(product, {"H": 4, "heads": 3, "head_dim": 5}) == expected


def test_an_unknown_symbol_cannot_be_evaluated() -> None:
    with pytest.raises(KeyError, match="TH"):
        evaluate("3*TH", {"H": 4})


@pytest.mark.parametrize(
    ("pattern", "numbers", "expected"),
    [
        pytest.param("fc.weight", (), "fc.weight", id="no place"),
        pytest.param("layers.{0:L}.w", (7,), "layers.7.w", id="one place"),
        pytest.param("layers.{0:L}.experts.{0:E}", (7, 2), "layers.7.experts.2", id="two places, in order"),
        pytest.param("fc.weight", (7,), "fc.weight", id="a number too many"),
    ],
)
def test_fill(pattern: str, numbers: tuple[int, ...], expected: str) -> None:
    assert fill(pattern, numbers) == expected


QKV = (Keep("q", "Q, H"), Keep("k", "K, H"), Keep("v", "K, H"))


def test_a_split_row_names_pieces_that_rows_write() -> None:
    split = Split("qkv", ("q", "k", "v"))

    assert Table((*QKV, split)).reworked == (split,)
    with pytest.raises(ValueError, match="row 'qkv': no row writes 'z'"):
        Table((*QKV, Split("qkv", ("q", "k", "z"))))


def test_a_merged_row_is_a_piece_of_a_tensor_that_a_row_writes() -> None:
    whole = Keep("gate_up", "2*I, H")
    up, gate = Merge("up", "gate_up", 1, "I, H"), Merge("gate", "gate_up", 0, "I, H")

    assert Table((whole, up, gate)).pieces("gate_up") == (gate, up)
    with pytest.raises(ValueError, match="row 'gate': no row writes 'gate_up'"):
        Table((gate,))


@pytest.mark.parametrize("places", [(0, 0), (1, 2), (0, 2)], ids=str)
def test_pieces_are_numbered_from_0(places: tuple[int, ...]) -> None:
    pieces = [Merge(name, "ab", place, "H") for name, place in zip("ab", places, strict=True)]

    with pytest.raises(ValueError, match=r"the pieces of 'ab' are numbered"):
        Table((Keep("ab", "2*H"), *pieces))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        pytest.param(lambda: Split("layers.*.qkv", ("q",)), "a written tensor needs exact names", id="wildcard"),
        pytest.param(lambda: Split("layers.{0:L}.qkv", ("q",)), "the numbered places differ", id="no place"),
        pytest.param(lambda: Split("qkv", ()), "expected different tensors", id="no piece"),
        pytest.param(lambda: Split("qq", ("q", "q")), "expected different tensors", id="one piece twice"),
        pytest.param(lambda: Merge("up", "layers.{0:L}.up", 0, "I, H"), "the numbered places differ", id="one place"),
        pytest.param(lambda: Merge("up", "gate_up", 0, "I, -1"), "malformed shape", id="shape"),
    ],
)
def test_a_split_or_merged_row_checks_itself(row: Callable[[], Row], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        row()


@pytest.mark.parametrize("row", [Split("both", ("head", "q")), Merge("left", "head", 0, "V, H")])
def test_a_tensor_that_is_compared_with_the_verifiers_comes_whole(row: Row) -> None:
    shared = Shared("head", "head", "V, H", verifier="lm_head")

    with pytest.raises(ValueError, match="'head' may be the verifier's and must come whole"):
        Table((*QKV, shared, row))


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param((Keep("fc", "H, 2*H"), Merge("a", "fc", 0, "H, H"), Merge("b", "fc", 1, "H, H")), id="columns"),
        pytest.param((Keep("ab", "2*H, H"), Merge("a", "ab", 0, "H"), Merge("b", "ab", 1, "H")), id="stacked"),
        pytest.param((Keep("q", "Q, H"), Keep("k", "K, 2*H"), Split("qk", ("q", "k"))), id="pieces of two widths"),
    ],
)
def test_pieces_lie_along_the_first_dimension(rows: tuple[Row, ...]) -> None:
    with pytest.raises(ValueError, match="pieces lie along the first dimension"):
        Table(rows)


def test_a_width_may_be_written_in_either_order() -> None:
    rows = (Keep("q", "Q, 2*H"), Keep("k", "K, H * 2"), Split("qk", ("q", "k")))

    assert Table(rows).rows == rows


def test_a_split_tensor_cannot_be_written_whole_too() -> None:
    with pytest.raises(ValueError, match=r"rows 'q' and '\(q\|qkv\)' both match 'q'"):
        Table((*QKV, Split("(q|qkv)", ("k", "v"))))


def test_the_shapes_of_an_output_are_those_of_the_parts_that_it_has() -> None:
    table = Table(
        (
            Rename("fc.bias", "fusion.bias", "H", part="bias"),
            Keep("layers.{0:L}.q.weight", "heads*head_dim, 2*H"),
            Shared("lm_head.weight", "lm_head.weight", "V, H", verifier="lm_head"),
            Drop("**.inv_freq", "recomputed"),
        )
    )
    dims = {"H": 8, "L": 2, "V": 32, "heads": 2, "head_dim": 6}

    without = table.shapes(dims, frozenset())

    assert without == {"layers.0.q.weight": (12, 16), "layers.1.q.weight": (12, 16), "lm_head.weight": (32, 8)}
    assert table.shapes(dims, {"bias"}) == {"fusion.bias": (8,)} | without
    with pytest.raises(KeyError, match="V"):
        table.shapes({key: size for key, size in dims.items() if key != "V"}, ())
