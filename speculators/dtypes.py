"""Data types of stored tensors: their names, their sizes, and casts between the floating ones.

Names are those of the safetensors header (``"BF16"``). Casts work on raw bytes with numpy, which
knows no bfloat16, so that a conversion needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}

TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
STORED_NAMES = {name: stored for stored, name in TORCH_NAMES.items()}

FLOATS = ("F64", "F32", "F16", "BF16")
INTEGERS = ("I64", "I32")

_NUMPY = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "I16": "<i2",
    "U16": "<u2",
    "F16": "<f2",
    "I32": "<i4",
    "U32": "<u4",
    "F32": "<f4",
    "F64": "<f8",
    "I64": "<i8",
    "U64": "<u8",
}


_EXPONENTS = {"F64": 0x7FF0_0000_0000_0000, "F32": 0x7F80_0000, "F16": 0x7C00, "BF16": 0x7F80}
"""The bits of an exponent (IEEE 754, and bfloat16 like the upper half of a single)."""


def array(data: bytes | memoryview, dtype: str) -> NDArray[Any]:
    """View ``data`` as a flat array of ``dtype``; bfloat16 arrives as the equal float32 values.

    Raises:
        ValueError: numpy has no counterpart of ``dtype`` (the eight-bit floats).
    """
    import numpy as np

    if dtype == "BF16":
        return (np.frombuffer(data, dtype="<u2").astype("<u4") << 16).view("<f4")
    if dtype not in _NUMPY:
        raise ValueError(f"{dtype} values cannot be read as numbers")
    return np.frombuffer(data, dtype=_NUMPY[dtype])


def tensor(data: bytes | memoryview, dtype: str) -> torch.Tensor:
    """Return the bytes as a flat torch tensor, which shares their memory where that may be written."""
    import torch

    kind = getattr(torch, TORCH_NAMES[dtype])
    if not len(data):
        return torch.empty(0, dtype=kind)
    view = memoryview(data)
    return torch.frombuffer(bytearray(view) if view.readonly else view, dtype=kind)


def cast(data: bytes | memoryview, source: str, target: str) -> bytes:
    """Cast floating values from ``source`` to ``target`` with round-to-nearest-even, as torch does.

    Raises:
        OverflowError: a finite value has no finite counterpart in ``target``.
    """
    import numpy as np

    if source == target:
        return bytes(data)
    original = values = array(data, source)
    with np.errstate(over="ignore", invalid="ignore"):
        if target in ("F16", "BF16"):
            values = values.astype("<f4")  # torch narrows float64 in two steps
        result = _to_bfloat16(values) if target == "BF16" else values.astype(_NUMPY[target])
    finite = array(result.tobytes(), target) if target == "BF16" else result
    if np.isinf(finite).sum() != np.isinf(original).sum():
        raise OverflowError(f"a value of {np.abs(original[np.isfinite(original)]).max():g} overflows {target}")
    return result.tobytes()


def count_unsound(data: bytes | memoryview, dtype: str) -> int:
    """Count the floating values that are NaN or infinite: those whose exponent has all bits set."""
    import numpy as np

    bits = np.frombuffer(data, f"<u{SIZES[dtype]}")
    exponent = bits.dtype.type(_EXPONENTS[dtype])
    return int(((bits & exponent) == exponent).sum())


def _to_bfloat16(values: NDArray[Any]) -> NDArray[np.uint16]:
    import numpy as np

    bits = values.view("<u4")
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    result: NDArray[np.uint16] = np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype("<u2")
    return result
