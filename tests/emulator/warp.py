"""Instructions of a whole warp: shuffles, votes, matches, reductions."""

from __future__ import annotations

import numpy as np

from tests.emulator.program import DTYPES, Program, Step, allow, instruction
from tests.emulator.ptx import Instruction

LANES = 32


@instruction("shfl")
def shuffle(i: Instruction, p: Program) -> Step:
    allow(i, "sync", "up", "down", "bfly", "idx")
    mode = i.modifiers[1]
    names = [name.strip() for name in i.operands[0].split("|")]
    target = p.target(names[0], "b32")
    valid = p.target(names[1] if len(names) > 1 else "_", "pred")
    value, lane_or_delta, clamp_and_segment = (p.source(o, "u32") for o in i.operands[1:4])

    def step(run, ix):
        threads = run.threads[ix]
        lane = threads % LANES
        by = (run.v[lane_or_delta][ix] & 31).astype(np.int64)
        c = run.v[clamp_and_segment][ix].astype(np.int64)
        clamp, segment = c & 31, c >> 8 & 31
        last = (lane & segment) | (clamp & ~segment)
        source = {
            "up": lane - by,
            "down": lane + by,
            "bfly": lane ^ by,
            "idx": (lane & segment) | (by & ~segment),
        }[mode]
        inside = source >= last if mode == "up" else source <= last
        source_thread = threads - lane + np.where(inside, source, lane)
        run.check_takes_part(ix, source_thread)
        run.v[target][ix] = run.v[value][source_thread]
        run.v[valid][ix] = inside

    return step


@instruction("vote")
def vote(i: Instruction, p: Program) -> Step:
    mode = i.modifiers[1]
    allow(i, "sync", "all", "any", "uni", "ballot")
    target = p.target(i.operands[0], i.type)
    predicate, negated = p.source(i.operands[1].lstrip("!"), "pred"), i.operands[1].startswith("!")

    def step(run, ix):
        warps, rows = run.warp_rows(ix)
        ballot, taking_part = np.zeros((2, len(warps)), np.uint32)
        bit = np.uint32(1) << (run.threads[ix] % LANES).astype(np.uint32)
        holds = run.v[predicate][ix] ^ negated
        np.bitwise_or.at(taking_part, rows, bit)
        np.bitwise_or.at(ballot, rows, np.where(holds, bit, np.uint32(0)))
        result = {
            "ballot": ballot,
            "any": ballot != 0,
            "all": ballot == taking_part,
            "uni": (ballot == 0) | (ballot == taking_part),
        }[mode]
        run.v[target][ix] = result[rows]

    return step


@instruction("match")
def match(i: Instruction, p: Program) -> Step:
    allow(i, "any", "all", "sync")
    names = [name.strip() for name in i.operands[0].split("|")]
    target = p.target(names[0], "b32")
    all_equal = p.target(names[1] if len(names) > 1 else "_", "pred")
    value = p.source(i.operands[1], i.type)

    def step(run, ix):
        _, rows = run.warp_rows(ix)
        values, bit = run.v[value][ix], np.uint32(1) << (run.threads[ix] % LANES).astype(np.uint32)
        same = (rows[:, None] == rows) & (values[:, None] == values)
        mask = (same * bit).sum(1).astype(np.uint32)
        if i.modifiers[0] == "all":
            whole = ((rows[:, None] == rows) * bit).sum(1).astype(np.uint32)
            run.v[all_equal][ix] = mask == whole
            mask = np.where(mask == whole, mask, np.uint32(0))
        run.v[target][ix] = mask

    return step


@instruction("redux")
def reduce(i: Instruction, p: Program) -> Step:
    operations = {"add": np.add, "min": np.minimum, "max": np.maximum}
    operations |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    allow(i, "sync", *operations)
    operation = operations[i.modifiers[1]]
    target, value = p.target(i.operands[0], i.type), p.source(i.operands[1], i.type)

    def step(run, ix):
        warps, rows = run.warp_rows(ix)
        values = run.v[value][ix]
        # Threads are in order, so that a warp's are neighbours.
        starts = np.searchsorted(rows, np.arange(len(warps)))
        run.v[target][ix] = operation.reduceat(values, starts).astype(DTYPES[i.type])[rows]

    return step


@instruction("activemask")
def activemask(i: Instruction, p: Program) -> Step:
    allow(i)
    target = p.target(i.operands[0], "b32")

    def step(run, ix):
        warps, rows = run.warp_rows(ix)
        masks = np.zeros(len(warps), np.uint32)
        np.bitwise_or.at(masks, rows, np.uint32(1) << (run.threads[ix] % LANES).astype(np.uint32))
        run.v[target][ix] = masks[rows]

    return step
