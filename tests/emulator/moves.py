"""Moves between registers, and loads and stores of every state space."""

from __future__ import annotations

import numpy as np

from tests.emulator.program import DTYPES, WINDOWS, Program, Step, allow, instruction, vector
from tests.emulator.ptx import BYTES, Instruction, Unsupported

# What only tells the caches of a GPU what to expect.
CACHE_HINTS = (
    *("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "volatile", "weak", "relaxed", "acquire", "release"),
    *("L1::evict_normal", "L1::evict_last", "L1::evict_first", "L1::no_allocate", "L1::evict_unchanged"),
    *("L2::evict_normal", "L2::evict_last", "L2::evict_first", "L2::64B", "L2::128B", "L2::256B", "L2::cache_hint"),
    *("cta", "cluster", "gpu", "sys"),
)
_SPACES = ("global", "shared", "shared::cta", "local", "const", "param")


@instruction("mov")
def mov(i: Instruction, p: Program) -> Step:
    allow(i)
    target, source = i.operands
    if target.startswith("{"):
        return _unpack(i, p)
    if source.startswith("{"):
        return _pack(i, p)
    a, b = p.target(target, i.type), p.source(source, i.type)

    def step(run, ix):
        run.v[a][ix] = run.v[b][ix]

    return step


def _unpack(i: Instruction, p: Program) -> Step:
    parts = vector(i.operands[0])
    part = f"b{8 * BYTES[i.type] // len(parts)}"
    targets, source = [p.target(name, part) for name in parts], p.source(i.operands[1], i.type)

    def step(run, ix):
        values = np.ascontiguousarray(run.v[source][ix]).view(DTYPES[part]).reshape(-1, len(parts)).copy()
        for n, target in enumerate(targets):
            run.v[target][ix] = values[:, n]

    return step


def _pack(i: Instruction, p: Program) -> Step:
    parts = vector(i.operands[1])
    part = f"b{8 * BYTES[i.type] // len(parts)}"
    sources, target = [p.source(name, part) for name in parts], p.target(i.operands[0], i.type)
    dtype = DTYPES[i.type]

    def step(run, ix):
        run.v[target][ix] = np.stack([run.v[source][ix] for source in sources], axis=1).view(dtype)[:, 0]

    return step


@instruction("cvta")
def cvta(i: Instruction, p: Program) -> Step:
    allow(i, "to", "global", "shared", "shared::cta", "local", "param")
    window = WINDOWS[i.modifiers[-2].partition("::")[0]]
    # Without .to, from an address of the space to a generic one.
    offset = np.uint64((1 << 64) - window if "to" in i.modifiers and window else window)
    target, source = p.target(i.operands[0], "u64"), p.source(i.operands[1], i.type)

    def step(run, ix):
        run.v[target][ix] = run.v[source][ix].astype(np.uint64) + offset

    return step


@instruction("isspacep")
def isspacep(i: Instruction, p: Program) -> Step:
    space = i.modifiers[0].partition("::")[0]
    low = WINDOWS[space]
    high = min((window for window in WINDOWS.values() if window > low), default=1 << 63)
    target, source = p.target(i.operands[0], "pred"), p.source(i.operands[1], "u64")

    def step(run, ix):
        address = run.v[source][ix]
        run.v[target][ix] = (address >= np.uint64(low)) & (address < np.uint64(high))

    return step


@instruction("ld", "ldu")
def load(i: Instruction, p: Program) -> Step:
    allow(i, *CACHE_HINTS, *_SPACES, "v2", "v4", "v8")
    targets = p.targets(i.operands[0], i.type)
    dtype, count = DTYPES[i.type], len(targets)
    space = _space(i)
    base, offset = p.address(i.operands[1])

    def step(run, ix):
        address = run.v[base][ix].astype(np.int64) + offset
        values = run.space(space).load(ix, address, dtype, count)
        for n, target in enumerate(targets):
            run.v[target][ix] = values[:, n]

    return step


@instruction("st")
def store(i: Instruction, p: Program) -> Step:
    allow(i, *CACHE_HINTS, *_SPACES, "v2", "v4", "v8")
    sources = p.sources(i.operands[1], i.type)
    base, offset = p.address(i.operands[0])
    space = _space(i)

    def step(run, ix):
        address = run.v[base][ix].astype(np.int64) + offset
        values = np.stack([run.v[source][ix] for source in sources], axis=1)
        run.space(space).store(ix, address, values)

    return step


def _space(i: Instruction) -> str:
    spaces = [modifier.partition("::")[0] for modifier in i.modifiers if modifier in _SPACES]
    if spaces == ["const"]:
        raise Unsupported(str(i))
    return spaces[0] if spaces else "generic"


@instruction("prefetch", "prefetchu", "griddepcontrol", "membar", "fence", "nanosleep", "applypriority", "discard")
def without_effect(i: Instruction, p: Program) -> Step:
    """Hints, and what orders accesses between blocks: blocks run apart here, and a race between them is found."""
    if i.opcode == "fence" and "proxy" in i.modifiers:
        raise Unsupported(str(i))
    return lambda run, ix: None


@instruction("createpolicy")
def createpolicy(i: Instruction, p: Program) -> Step:
    target = p.target(i.operands[0], "b64")

    def step(run, ix):
        run.v[target][ix] = 0

    return step
