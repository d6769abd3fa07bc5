"""Single instructions against values computed another way: Python's integers, and torch's conversions."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch

from tests.emulator.findings import Finding
from tests.emulator.launch import Emulator
from tests.emulator.ptx import BYTES, Module, Unsupported

NUM_THREADS = 64
WORDS = [0, 1, 2, 3, 7, 0x7F, 0x80, 0xFF, 0x8000, 0xFFFF, 0x12345678, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF]
LONGS = [0, 1, 3, 0xFFFFFFFF, 0x123456789ABCDEF0, 2**63 - 1, 2**63, 2**63 + 5, 2**64 - 1]
FLOATS = [0.0, -0.0, 1.0, -1.5, 2.5, 3.5, 1e-3, 65519.0, 65520.0, 1e5, 1e-8, 6e-8, 3.39e38, 1e-40, math.inf, -math.inf]
DTYPES = {"b16": np.uint16, "b32": np.uint32, "b64": np.uint64}


def execute(instruction, *inputs, result="b32", shared=0, num_threads=NUM_THREADS):
    """Run `instruction` with d as its result and a, b, c, ... as its inputs, one element of each input a thread.

    Inputs are unsigned integers that hold the bits; so is the result.
    """
    names = "abcefg"[: len(inputs)]
    bits = {name: np.resize(values, num_threads) for name, values in zip(names, inputs, strict=True)}
    out = np.zeros(num_threads, DTYPES[result])
    size = {name: values.dtype.itemsize for name, values in bits.items()}
    load = [
        f"ld.param.u64 %p{n}, [in{n}];\nmad.wide.u32 %p{n}, %t, {size[name]}, %p{n};\n"
        f"ld.global.b{8 * size[name]} {name}, [%p{n}];"
        for n, name in enumerate(names)
    ]
    text = "\n".join(
        [
            ".extern .shared .align 16 .b8 memory[];",
            f".visible .entry test({', '.join(f'.param .u64 in{n}' for n in range(len(inputs)))}, .param .u64 result)",
            "{",
            ".reg .b32 %t, %u; .reg .b64 %p<9>; .reg .pred p, q;",
            *(f".reg .b{8 * size[name]} {name};" for name in names),
            f".reg .{result} d;",
            "mov.u32 %t, %tid.x;",
            *load,
            instruction,
            f"ld.param.u64 %p8, [result];\nmad.wide.u32 %p8, %t, {BYTES[result]}, %p8;\nst.global.{result} [%p8], d;",
            "ret;",
            "}",
            "",
        ]
    )
    emulator = Emulator(Module(text))
    for name, values in bits.items():
        emulator.memory.add_array(name, values)
    emulator.memory.add_array("result", out, writable=True, initialised=False)
    pointers = [values.ctypes.data for values in (*bits.values(), out)]
    emulator.launch("test", (1, 1, 1), (num_threads, 1, 1), shared, struct.pack(f"<{len(pointers)}Q", *pointers))
    return out


def signed(value, bits):
    return value - (1 << bits) if value >> (bits - 1) else value


def pairs(values, dtype):
    """All pairs, as two arrays."""
    left, right = np.meshgrid(np.array(values, dtype), np.array(values, dtype))
    return left.reshape(-1), right.reshape(-1)


def divide(a, b):
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


INTEGERS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul.lo": lambda a, b: a * b,
    "mul.hi": lambda a, b: (a * b) >> BITS,
    "min": min,
    "max": max,
    "div": lambda a, b: divide(a, b) if b else -1,
    "rem": lambda a, b: a - divide(a, b) * b if b else None,
}
BITS = 0


@pytest.mark.parametrize("type", ["s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("opcode", INTEGERS)
def test_integers(opcode, type, monkeypatch):
    bits = int(type[1:])
    monkeypatch.setitem(globals(), "BITS", bits)
    left, right = pairs(WORDS if bits == 32 else LONGS, DTYPES[f"b{bits}"])
    out = execute(f"{opcode}.{type} d, a, b;", left, right, result=f"b{bits}", num_threads=-(-len(left) // 32) * 32)
    for a, b, d in zip(left.tolist(), right.tolist(), out.tolist(), strict=False):
        if type[0] == "s":
            a, b = signed(a, bits), signed(b, bits)
        expected = INTEGERS[opcode](a, b)
        assert expected is None or d == expected % (1 << bits), (a, b)


@pytest.mark.parametrize("type", ["s32", "u32"])
def test_wide_products(type):
    left, right = pairs(WORDS, np.uint32)
    out = execute(f"mad.wide.{type} d, a, b, c;", left, right, np.array([5], np.uint64), result="b64", num_threads=256)
    for a, b, d in zip(left.tolist(), right.tolist(), out.tolist(), strict=False):
        a, b = (signed(a, 32), signed(b, 32)) if type[0] == "s" else (a, b)
        assert d == (a * b + 5) % 2**64


@pytest.mark.parametrize("amount", [0, 1, 31, 32, 33, 255])
def test_shifts(amount):
    words, by = np.array(WORDS, np.uint32), np.array([amount], np.uint32)
    left, right = execute("shl.b32 d, a, b;", words, by), execute("shr.u32 d, a, b;", words, by)
    arithmetic = execute("shr.s32 d, a, b;", words, by)
    wrapped = execute("shf.l.wrap.b32 d, a, a, b;", words, by)
    clamped = execute("shf.r.clamp.b32 d, a, c, b;", words, by, np.array([0xABCD1234], np.uint32))
    for n, a in enumerate(WORDS):
        assert left[n] == (a << amount) % 2**32 and right[n] == a >> amount
        assert arithmetic[n] == (signed(a, 32) >> amount) % 2**32
        assert wrapped[n] == (a << amount % 32 | a >> (32 - amount % 32)) % 2**32
        assert clamped[n] == ((0xABCD1234 << 32 | a) >> min(amount, 32)) % 2**32


def test_logic():
    a, b = pairs(WORDS, np.uint32)
    c = np.roll(a, 3)
    # The table of (a & b) | (~a & c) is made from the same function of the constants 0xF0, 0xCC, 0xAA.
    table = (0xF0 & 0xCC) | (~0xF0 & 0xAA & 0xFF)
    out = execute(f"lop3.b32 d, a, b, c, {table};", a, b, c, num_threads=256)[: len(a)]
    assert (out == ((a & b) | (~a & c))).all()


def test_permutes_bytes():
    selectors = [0x3210, 0x7654, 0x5410, 0x1054, 0xBA98, 0x0123]
    a, b = 0x80FF7F01, 0x00817E02
    out = execute("prmt.b32 d, a, b, c;", *(np.array(v, np.uint32) for v in ([a], [b], selectors)))
    pool = struct.pack("<II", a, b)
    for n, selector in enumerate(selectors):
        nibbles = [selector >> 4 * k & 15 for k in range(4)]
        picked = [pool[k & 7] if k < 8 else 255 * (pool[k & 7] >> 7) for k in nibbles]
        assert out[n] == int.from_bytes(bytes(picked), "little")


@pytest.mark.parametrize(("position", "length"), [(0, 8), (4, 12), (24, 8), (28, 9), (31, 1), (8, 0), (40, 4)])
def test_fields(position, length):
    arguments = [np.array([n], np.uint32) for n in (position, length)]
    words = np.array(WORDS, np.uint32)
    unsigned, with_sign = (execute(f"bfe.{t} d, a, b, c;", words, *arguments) for t in ("u32", "s32"))
    inserted = execute("bfi.b32 d, a, 0x55555555, b, c;", words, *arguments)
    for n, a in enumerate(WORDS):
        field = a >> position & ((1 << length) - 1)
        assert unsigned[n] == field
        # Of a field that runs over the end, the upper bits repeat the word's sign.
        extended = signed(a, 32) >> position & ((1 << length) - 1) if length else 0
        assert with_sign[n] == (signed(extended, length) if length else 0) % 2**32
        mask = ((1 << length) - 1) << position & 0xFFFFFFFF
        assert inserted[n] == (0x55555555 & ~mask) | (a << position & mask)


def test_counts():
    out = {op: execute(f"{op} d, a;", np.array(WORDS, np.uint32)) for op in ("popc.b32", "clz.b32", "brev.b32")}
    highest = execute("bfind.u32 d, a;", np.array(WORDS, np.uint32))
    shift = execute("bfind.shiftamt.u32 d, a;", np.array(WORDS, np.uint32))
    for n, a in enumerate(WORDS):
        assert out["popc.b32"][n] == a.bit_count() and out["clz.b32"][n] == 32 - a.bit_length()
        assert out["brev.b32"][n] == int(f"{a:032b}"[::-1], 2)
        assert highest[n] == (a.bit_length() - 1) % 2**32
        assert shift[n] == (32 - a.bit_length() if a else 2**32 - 1)


HALVES = {"f16": torch.float16, "bf16": torch.bfloat16}


def half_bits(values, type):
    return torch.tensor(values).to(HALVES[type]).view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("type", HALVES)
def test_conversions_of_halves(type):
    floats = np.array([*FLOATS, *np.random.default_rng(0).standard_normal(40)], np.float32)
    down = execute(f"cvt.rn.{type}.f32 d, a;", floats.view(np.uint32), result="b16")
    expected = half_bits(floats, type)
    assert (down[: len(floats)] == expected).all()
    up = execute(f"cvt.f32.{type} d, a;", expected)[: len(floats)].view(np.float32)
    np.testing.assert_array_equal(up, torch.tensor(expected.view(np.int16)).view(HALVES[type]).float())
    packed = execute(f"cvt.rn.{type}x2.f32 d, a, b;", floats.view(np.uint32), floats[::-1].view(np.uint32).copy())
    assert (packed[: len(floats)] >> 16 == expected).all() and (packed[: len(floats)] & 0xFFFF == expected[::-1]).all()


@pytest.mark.parametrize("type", HALVES)
@pytest.mark.parametrize("opcode", ["add", "mul", "fma.rn", "max", "neg"])
def test_arithmetic_of_packed_halves(opcode, type):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(NUM_THREADS, 2, generator=generator).to(HALVES[type]) for _ in range(3)]
    words = [value.view(torch.int16).numpy().view(np.uint32)[:, 0].copy() for value in values]
    count = {"fma.rn": 3, "neg": 1}.get(opcode, 2)
    out = execute(f"{opcode}.{type}x2 d, {', '.join('abc'[:count])};", *words[:count])
    a, b, c = (value.double() for value in values)
    exact = {"add": a + b, "mul": a * b, "fma.rn": a * b + c, "max": torch.maximum(a, b), "neg": -a}[opcode]
    expected = exact.to(HALVES[type]).view(torch.int16).numpy().view(np.uint32)[:, 0]
    assert (out == expected).all()


@pytest.mark.parametrize(("rounding", "function"), [("rni", round), ("rzi", math.trunc), ("rmi", math.floor)])
def test_floats_to_integers_saturate(rounding, function):
    values = [0.5, 1.5, -2.5, 3.999, -7.2, 1e10, -1e10, 2147483520.0]
    out = execute(f"cvt.{rounding}.s32.f32 d, a;", np.array([*values, math.nan], np.float32).view(np.uint32))
    for n, value in enumerate(values):
        assert signed(int(out[n]), 32) == max(-(2**31), min(2**31 - 1, function(value)))
    assert out[len(values)] == 0


def test_integers_to_floats_round_once():
    longs = np.array([*LONGS, 2**24 + 1, 2**60 + 2**36 + 1, 2**63 + 2**39 + 1], np.uint64)
    out = execute("cvt.rn.f32.u64 d, a;", longs).view(np.float32)[: len(longs)]
    assert (out == longs.astype(np.float32)).all()


def test_float_instructions():
    x = np.linspace(-8, 8, NUM_THREADS, dtype=np.float32)
    bits = x.view(np.uint32)
    for opcode, function in (("ex2", np.exp2), ("tanh", np.tanh)):
        out = execute(f"{opcode}.approx.f32 d, a;", bits).view(np.float32)
        np.testing.assert_allclose(out, function(x.astype(np.float64)), rtol=1e-6)
    # Only a fused product keeps what the subtraction leaves.
    a = np.float32(1 + 2**-12)
    words = [np.array([v], np.float32).view(np.uint32) for v in (a, a, -(a * a))]
    assert execute("fma.rn.f32 d, a, b, c;", *words).view(np.float32)[0] == np.float32(2**-24)
    third = [np.array([v], np.float32).view(np.uint32) for v in (1 / 3, 1.0, 2.0**-30)]
    down, up = (execute(f"fma.{r}.f32 d, a, b, c;", *third).view(np.float32)[0] for r in ("rm", "rp"))
    assert (down, up) == (np.float32(1 / 3), np.nextafter(np.float32(1 / 3), np.float32(1)))
    tiny = np.array([1e-39], np.float32).view(np.uint32)
    assert execute("mul.ftz.f32 d, a, 0f3F800000;", tiny)[0] == 0
    assert execute("mul.f32 d, a, 0f3F800000;", tiny)[0] == tiny[0]


@pytest.mark.parametrize(("comparison", "expected"), [("lt", 0), ("ltu", 1), ("ne", 0), ("neu", 1), ("nan", 1)])
def test_comparisons_with_nan(comparison, expected):
    nan = np.array([math.nan], np.float32).view(np.uint32)
    out = execute(f"setp.{comparison}.f32 p, a, 0f3F800000; selp.u32 d, 1, 0, p;", nan)
    assert out[0] == expected


LANE = np.arange(NUM_THREADS) % 32


@pytest.mark.parametrize(
    ("mode", "argument", "clamp", "source"),
    [
        ("bfly", 5, 0x1F, LANE ^ 5),
        ("down", 3, 0x1F, np.where(LANE + 3 < 32, LANE + 3, LANE)),
        ("up", 3, 0, np.where(LANE >= 3, LANE - 3, LANE)),
        ("idx", 7, 0x1F, np.full(NUM_THREADS, 7)),
        ("idx", 2, 0x181F, LANE // 8 * 8 + 2),
        ("down", 2, 0x181F, np.where(LANE % 8 + 2 < 8, LANE + 2, LANE)),
    ],
)
def test_shuffles(mode, argument, clamp, source):
    values = np.arange(NUM_THREADS, dtype=np.uint32) * 3
    out = execute(f"shfl.sync.{mode}.b32 d, a, {argument}, {clamp}, 0xffffffff;", values)
    assert (out == values[np.arange(NUM_THREADS) // 32 * 32 + source]).all()


def test_votes_and_matches():
    values = np.array([3, 1, 4, 1], np.uint32)
    is_one = "setp.eq.u32 p, a, 1;"
    assert (execute(f"{is_one} vote.sync.ballot.b32 d, p, 0xffffffff;", values) == 0xAAAAAAAA).all()
    for mode, expected in (("any", 1), ("all", 0)):
        out = execute(f"{is_one} vote.sync.{mode}.pred q, p, -1; selp.u32 d, 1, 0, q;", values)
        assert (out == expected).all()
    out = execute("match.any.sync.b32 d, a, 0xffffffff;", values)
    assert out[:4].tolist() == [0x11111111, 0xAAAAAAAA, 0x44444444, 0xAAAAAAAA]
    assert (execute("redux.sync.add.u32 d, a, 0xffffffff;", values) == 72).all()


def test_atomics_take_turns():
    code = """ld.param.u64 %p7, [in0]; st.shared.u32 [memory], 0; bar.sync 0;
        atom.shared.add.u32 %u, [memory], 2; bar.sync 0; ld.shared.u32 d, [memory];"""
    assert (execute(code, np.zeros(1, np.uint32), shared=16) == 2 * NUM_THREADS).all()
    old = execute(
        code.replace("bar.sync 0; ld.shared.u32 d, [memory]", "mov.u32 d, %u"), np.zeros(1, np.uint32), shared=16
    )
    assert sorted(old.tolist()) == list(range(0, 2 * NUM_THREADS, 2))


def test_named_barriers_order_the_warps_that_meet():
    code = """setp.lt.u32 p, %t, 32; mov.u32 d, 0; @!p bra DONE; shl.b32 %u, %t, 2;
        st.shared.u32 [%u], %t; bar.sync 1, 32; xor.b32 %u, %u, 4; ld.shared.u32 d, [%u]; DONE:"""
    out = execute(code, np.zeros(1, np.uint32), shared=128)
    assert (out == np.where(np.arange(NUM_THREADS) < 32, np.arange(NUM_THREADS) ^ 1, 0)).all()
    with pytest.raises(Finding, match="race with a write by block 0 thread 1 "):
        execute(code.replace("bar.sync 1, 32; ", ""), np.zeros(1, np.uint32), shared=128)


def test_scopes_have_names_of_their_own():
    """As nvcc puts a rotation: braces at the beginning of a line end no kernel."""
    code = """mov.u32 %u, 7;
{
.reg .b32 %u;
shl.b32 %u, a, 31;
shr.u32 d, a, 1;
or.b32 d, d, %u;
}
add.u32 d, d, %u;"""
    out = execute(code, np.array(WORDS, np.uint32))
    assert out[: len(WORDS)].tolist() == [((a >> 1 | a << 31) + 7) % 2**32 for a in WORDS]


@pytest.mark.parametrize(
    "instruction",
    [
        "frobnicate.b32 d, a;",
        "add.sat.s32 d, a, a;",
        "ld.global.frob.b32 d, [%p0];",
        "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 d, a, a, d;",
        "cp.async.bulk.commit_group; mov.u32 d, 0;",
        "mov.u32 d, %clock;",
        "mbarrier.init.shared.b64 [memory], 1; mov.u32 d, 0;",
    ],
)
def test_what_is_not_modelled_fails(instruction):
    with pytest.raises(Unsupported):
        execute(instruction, np.zeros(1, np.uint32), shared=16)
