"""Floating-point formats: bits to numbers and back, with one rounding."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
PACKED = {"f16x2": "f16", "bf16x2": "bf16"}
# Roundings that go one way: toward zero, down, up.
DIRECTED = ("rz", "rm", "rp")
HALVES = ("f16", "bf16", *PACKED)


def decode(bits: Array, type: str) -> Array:
    """Return the numbers that bits of this type stand for; of a packed type `[..., 2]`, low half first."""
    if type in PACKED:
        return decode(np.ascontiguousarray(bits).view(np.uint16).reshape(*bits.shape, 2), PACKED[type])
    if type == "f16":
        return bits.view(np.float16).astype(np.float32)
    if type == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if type == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)
    return bits


def encode(numbers: Array, type: str, toward_zero: bool = False) -> Array:
    """Return the bits of numbers, rounded to nearest even, or toward zero."""
    if type in PACKED:
        halves = np.ascontiguousarray(encode(numbers, PACKED[type], toward_zero))
        return halves.view(np.uint32).reshape(numbers.shape[:-1])
    if type == "f16":
        return _f16(numbers, toward_zero)
    if type == "bf16":
        return _bf16(numbers, toward_zero)
    if type == "tf32":
        bits = _round_to_odd(numbers).view(np.uint32)
        # To nearest, ties away from zero: the only rounding that cvt.rna has.
        return np.where(np.isfinite(numbers), (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits)
    if toward_zero and numbers.dtype != np.dtype(type.replace("f", "float")):
        raise NotImplementedError(f"{type} toward zero")
    return numbers.astype({"f32": np.float32, "f64": np.float64}[type])


def directed(numbers: Array, mode: str) -> Array:
    """Return float64 numbers as float32, rounded one way."""
    near = numbers.astype(np.float32)
    above, below = near > numbers, near < numbers
    toward_zero = mode == "rz"
    down = above & (numbers > 0) if toward_zero else above & (mode == "rm")
    up = below & (numbers < 0) if toward_zero else below & (mode == "rp")
    near = np.where(down, np.nextafter(near, np.float32(-np.inf)), near)
    return np.where(up, np.nextafter(near, np.float32(np.inf)), near)


def flush(numbers: Array) -> Array:
    """Return float32 numbers with zeros, of their signs, in place of subnormals."""
    return np.where(np.abs(numbers) < np.float32(2.0**-126), np.copysign(np.float32(0), numbers), numbers)


def _f16(numbers: Array, toward_zero: bool) -> Array:
    bits = numbers.astype(np.float16).view(np.uint16)
    if toward_zero:
        too_large = np.abs(bits.view(np.float16).astype(np.float64)) > np.abs(numbers)
        bits = np.where(too_large & np.isfinite(numbers), bits - np.uint16(1), bits)
    return np.where(np.isnan(numbers), np.uint16(0x7FFF), bits)


def _bf16(numbers: Array, toward_zero: bool) -> Array:
    bits = _round_to_odd(numbers).view(np.uint32)
    if not toward_zero:
        bits = bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
    return np.where(np.isnan(numbers), np.uint16(0x7FFF), (bits >> np.uint32(16)).astype(np.uint16))


def _round_to_odd(numbers: Array) -> Array:
    """Return float32 whose last bit remembers what was cut off, so that a second rounding is as good as one."""
    if numbers.dtype == np.float32:
        return np.ascontiguousarray(numbers)
    near = numbers.astype(np.float32)
    inexact = np.isfinite(numbers) & (near.astype(np.float64) != numbers)
    bits = near.view(np.uint32)
    cut = np.where(np.abs(near.astype(np.float64)) > np.abs(numbers), bits - np.uint32(1), bits) | np.uint32(1)
    return np.where(inexact, cut, bits).view(np.float32)
