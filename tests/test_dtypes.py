"""Casts between floating dtypes: the bytes that torch would give."""

from __future__ import annotations

import itertools
import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from speculators.dtypes import FLOATS, SIZES, STORED_NAMES, TORCH_NAMES, array, cast

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WORDS = {"F64": "<u8", "F32": "<u4", "F16": "<u2", "BF16": "<u2"}
PAIRS = list(itertools.permutations(FLOATS, 2))
TINY16, TINY32 = 2.0**-24, 2.0**-149
EDGES = {
    "zeros": [0.0, -0.0],
    "plain": [1.0, -1.0, 0.1, -3.14159265358979, 1e-3, 2.5, 12345.678],
    "infinities": [math.inf, -math.inf],
    "ties of bfloat16": [1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), -(1 + 3 * 2**-8)],
    "ties of float16": [1 + 2**-11, 1 + 3 * 2**-11, -(1 + 2**-11), -(1 + 3 * 2**-11)],
    "ties of float32": [1 + 2**-24, 1 + 3 * 2**-24, -(1 + 2**-24), -(1 + 3 * 2**-24)],
    "just above a tie of bfloat16": [1 + 2**-8 + 2**-23, 1 + 2**-8 + 2**-40],
    "just above a tie of float16": [1 + 2**-11 + 2**-23, 1 + 2**-11 + 2**-40],
    "just below a tie": [1 + 2**-8 - 2**-23, 1 + 2**-11 - 2**-23, 1 + 2**-11 - 2**-40],
    "carry into the exponent": [1.99999, 2 - 2**-9, 2 - 2**-12, 2 - 2**-25],
    "large": [65280.0, -65280.0, 60001.0],
    "float16 subnormals": [TINY16, -TINY16, 3 * TINY16, 1023 * TINY16, 2.0**-14, 2.0**-14 - 2.0**-26],
    "ties of float16 subnormals": [TINY16 / 2, 1.5 * TINY16, 2.5 * TINY16, -TINY16 / 2, TINY16 / 2 * (1 + 2**-20)],
    "just above half the smallest float16": [TINY16 / 2 * (1 + 2**-30), -TINY16 / 2 * (1 + 2**-30)],
    "float32 subnormals": [TINY32, -TINY32, 3 * TINY32, 2.0**-126, 2.0**-126 - TINY32],
    "ties of float32 subnormals": [TINY32 / 2, 1.5 * TINY32, 2.5 * TINY32],
    "bfloat16 subnormals": [2.0**-133, 3 * 2.0**-133, 127 * 2.0**-133],
    "ties of bfloat16 subnormals": [2.0**-134, 1.5 * 2.0**-133, 2.5 * 2.0**-133],
    "float64 subnormals": [5e-324, -5e-324, 2.0**-1030],
}


def torch_cast(data: bytes, source: str, target: str) -> bytes:
    """Cast with torch."""
    values = torch.frombuffer(bytearray(data), dtype=TORCH[source])
    return values.to(TORCH[target]).view(torch.uint8).numpy().tobytes()


def stored(values: list[float], dtype: str) -> bytes:
    """Store values in a dtype."""
    return torch.tensor(values, dtype=torch.float64).to(TORCH[dtype]).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("values", EDGES.values(), ids=EDGES.keys())
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_edge_values_are_cast_as_torch_casts_them(source: str, target: str, values: list[float]) -> None:
    data = stored(values, source)

    assert cast(data, source, target).hex(" ", 2) == torch_cast(data, source, target).hex(" ", 2)


@pytest.mark.parametrize(
    ("source", "data", "target", "expected"),
    [
        pytest.param("F32", "0000803f", "BF16", "803f", id="one to bfloat16"),
        pytest.param("F32", "0080803f", "BF16", "803f", id="a tie goes down to even"),
        pytest.param("F32", "0080813f", "BF16", "823f", id="a tie goes up to even"),
        pytest.param("F32", "0180803f", "BF16", "813f", id="above a tie goes up"),
        pytest.param("F32", "00000080", "BF16", "0080", id="minus zero to bfloat16"),
        pytest.param("F32", "00000080", "F16", "0080", id="minus zero to float16"),
        pytest.param("F32", "0000807f", "BF16", "807f", id="infinity"),
        pytest.param("F32", "000080ff", "F16", "00fc", id="minus infinity"),
        pytest.param("F32", "00008033", "F16", "0100", id="smallest float16"),
        pytest.param("F32", "00000033", "F16", "0000", id="half the smallest float16"),
        pytest.param("BF16", "803f", "F32", "0000803f", id="bfloat16 to float32"),
        pytest.param("BF16", "0100", "F32", "00000100", id="smallest bfloat16 to float32"),
        pytest.param("F16", "0100", "BF16", "8033", id="smallest float16 to bfloat16"),
        pytest.param("F64", "000000000000f03f", "F32", "0000803f", id="one from float64"),
    ],
)
def test_a_value_is_rounded_to_nearest_even(source: str, data: str, target: str, expected: str) -> None:
    assert cast(bytes.fromhex(data), source, target).hex() == expected


@pytest.mark.parametrize("value", [65504.0, -65504.0, 65503.0, 65519.0])
@pytest.mark.parametrize("source", ["F64", "F32"])
def test_the_largest_float16_is_reached(source: str, value: float) -> None:
    data = stored([value], source)

    assert cast(data, source, "F16") == (b"\xff\x7b" if value > 0 else b"\xff\xfb")


@pytest.mark.parametrize("word", ["0000c07f", "0000c0ff", "0100807f", "ffffff7f", "010080ff", "ffffffff"])
@pytest.mark.parametrize("target", ["F64", "F16", "BF16"])
def test_a_nan_stays_one(target: str, word: str) -> None:
    assert np.isnan(array(cast(bytes.fromhex(word), "F32", target), target)).all()


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_nan_stays_one_between_all_dtypes(source: str, target: str) -> None:
    assert np.isnan(array(cast(stored([math.nan], source), source, target), target)).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_cast_to_the_same_dtype_changes_nothing(dtype: str) -> None:
    data = bytes(range(240, 256))

    assert cast(data, dtype, dtype) == data


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_nothing_is_cast_to_nothing(source: str, target: str) -> None:
    assert cast(b"", source, target) == b""


@pytest.mark.parametrize(
    ("value", "source", "target", "message"),
    [
        pytest.param(65520.0, "F32", "F16", "65520 overflows F16", id="rounds beyond the largest float16"),
        pytest.param(-1e5, "F32", "F16", "100000 overflows F16", id="negative"),
        pytest.param(1e5, "BF16", "F16", "99840 overflows F16", id="bfloat16 to float16"),
        pytest.param(1e39, "F64", "F32", r"1e\+39 overflows F32", id="float64 to float32"),
        pytest.param(1e39, "F64", "BF16", r"1e\+39 overflows BF16", id="float64 to bfloat16"),
        pytest.param(3.4e38, "F32", "BF16", r"3.4e\+38 overflows BF16", id="rounds beyond the largest bfloat16"),
    ],
)
def test_a_value_too_large_for_the_target_is_refused(value: float, source: str, target: str, message: str) -> None:
    with pytest.raises(OverflowError, match=f"a value of {message}"):
        cast(stored([1.0, value, math.inf, math.nan], source), source, target)


def test_infinities_do_not_hide_an_overflow() -> None:
    with pytest.raises(OverflowError, match="a value of 70000 overflows F16"):
        cast(stored([-math.inf, 70000.0], "F32"), "F32", "F16")


@settings(derandomize=True, database=None, deadline=None, max_examples=500)
@given(words=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
@pytest.mark.parametrize("target", ["F64", "F16", "BF16"])
def test_any_float32_is_cast_as_torch_casts_it_or_overflows(target: str, words: list[int]) -> None:
    data = struct.pack(f"<{len(words)}I", *words)
    values = np.frombuffer(data, "<f4")
    expected = torch_cast(data, "F32", target)

    if np.isinf(array(expected, target))[np.isfinite(values)].any():
        with pytest.raises(OverflowError):
            cast(data, "F32", target)
        return
    numbers = ~np.isnan(values)
    result = cast(data, "F32", target)
    assert np.isnan(array(result, target)).tolist() == np.isnan(values).tolist()
    assert np.frombuffer(result, WORDS[target])[numbers].tolist() == (
        np.frombuffer(expected, WORDS[target])[numbers].tolist()
    )


@pytest.mark.parametrize(("source", "target"), [("F16", "F32"), ("F16", "F64"), ("BF16", "F32"), ("BF16", "F64")])
def test_every_16_bit_value_survives_the_way_there_and_back(source: str, target: str) -> None:
    words = np.arange(1 << 16, dtype="<u2")
    words = words[~np.isnan(array(words.tobytes(), source))]

    assert cast(cast(words.tobytes(), source, target), target, source) == words.tobytes()


@pytest.mark.parametrize(
    ("data", "dtype", "expected"),
    [
        pytest.param(b"\x80\x3f\x00\xc0", "BF16", [1.0, -2.0], id="bfloat16"),
        pytest.param(b"\x00\x3c\x00\xc0", "F16", [1.0, -2.0], id="float16"),
        pytest.param(b"\x01\x00", "BOOL", [True, False], id="bool"),
        pytest.param(b"\xff\xff", "I16", [-1], id="signed"),
        pytest.param(b"\xff\xff", "U16", [65535], id="unsigned"),
        pytest.param(b"\x02\x01\x00\x00\x00\x00\x00\x00", "I64", [258], id="little-endian"),
    ],
)
def test_bytes_are_read_as_numbers(data: bytes, dtype: str, expected: list[float]) -> None:
    assert array(data, dtype).tolist() == expected


@pytest.mark.parametrize("dtype", ["F8_E5M2", "F8_E4M3"])
def test_eight_bit_floats_are_not_read_as_numbers(dtype: str) -> None:
    with pytest.raises(ValueError, match=f"{dtype} values cannot be read as numbers"):
        array(b"\0", dtype)


@pytest.mark.parametrize("dtype", SIZES)
def test_every_dtype_has_torchs_size_and_a_name_in_both_directions(dtype: str) -> None:
    assert getattr(torch, TORCH_NAMES[dtype]).itemsize == SIZES[dtype]
    assert STORED_NAMES[TORCH_NAMES[dtype]] == dtype
