"""A Hypothesis state machine: any sequence of edits against lists of tokens, with real writes into a tiny pool."""

import gc
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.memory.small_pool import small_pool
from torch_paged.memory import (
    BlockTables,
    PoolExhausted,
    PrefixIndex,
    block_keys,
    full_blocks,
    hit_length,
    root_key,
)

NUM_BLOCKS = 20
ROOT = root_key(b"tenant", b"model")
# Batches are named by number: Hypothesis keeps what it draws alive, and a batch is to die when it is forgotten.
WHICH = st.integers(0, 2)


@dataclass(frozen=True)
class Row:
    """What one row must hold: its tokens, and how many blocks have left the window."""

    tokens: tuple[int, ...] = ()
    gone: int = 0


class TableEdits(RuleBasedStateMachine):
    """Batches in one pool with a prefix index, each beside the plain lists it must equal."""

    @initialize(block_size=st.sampled_from([4, 8, 2, 1]), window=st.sampled_from([0, 3, 1, 6, 0]), data=st.data())
    def start(self, block_size, window, data):
        self.size, self.window = block_size, window
        self.pool = small_pool(NUM_BLOCKS, block_size, sliding_window=window)
        kv = torch.zeros(1, 2, 1, 8)
        # Key and value cache of both layers; the c-th holds each token plus c / 4.
        self.caches = [cache.numpy() for index in range(2) for cache in self.pool.layer(index, kv, kv)]
        self.batches: list[tuple[BlockTables, list[Row]]] = []
        self.index = PrefixIndex(self.pool.budget)
        # All tokens up to the end of a remembered block, and the block; the one used longest ago first.
        self.remembered: dict[tuple[int, ...], int] = {}
        self.next_token = 1
        self.prompt(2, data)

    @precondition(lambda self: len(self.batches) < 3)
    @rule(num_seqs=st.integers(1, 3), data=st.data())
    def prompt(self, num_seqs, data):
        self.batches.append((BlockTables(self.pool, num_seqs), [Row()] * num_seqs))
        self.append_columns(len(self.batches) - 1, data.draw(st.integers(1, 9)), data)

    @precondition(lambda self: 0 < len(self.batches) < 3)
    @rule(which=WHICH)
    def fork(self, which):
        tables, rows = self.pick(which)
        self.batches.append((tables.fork(), list(rows)))

    @precondition(lambda self: self.batches)
    @rule(which=WHICH, width=st.integers(0, 5), data=st.data())
    def append_columns(self, which, width, data):
        tables, rows = self.pick(which)
        cells = st.lists(st.booleans(), min_size=width, max_size=width)
        valid = np.array([data.draw(cells) for _ in rows], dtype=bool).reshape(len(rows), width)
        self.write(tables, rows, valid, valid.sum(axis=1))

    @precondition(lambda self: self.batches)
    @rule(which=WHICH, steps=st.integers(1, 4))
    def decode(self, which, steps):
        tables, rows = self.pick(which)
        for _ in range(steps):
            self.write(tables, rows, None, np.ones(len(rows), dtype=np.int64))

    @precondition(lambda self: self.batches)
    @rule(which=WHICH, picks=st.lists(st.integers(0, 3), min_size=1, max_size=4), then_decode=st.booleans())
    def select(self, which, picks, then_decode):
        tables, rows = self.pick(which)
        picks = [pick % len(rows) for pick in picks]
        tables.select(np.array(picks, dtype=np.int64))
        rows[:] = [rows[pick] for pick in picks]
        if then_decode:
            self.decode(which, 1)

    @precondition(lambda self: self.batches)
    @rule(which=WHICH, cuts=st.lists(st.sampled_from([0, 1, 2, 3, 5, 99]), min_size=4, max_size=4))
    def crop(self, which, cuts):
        tables, rows = self.pick(which)
        cut = [min(n, len(row.tokens)) for row, n in zip(rows, cuts, strict=False)]
        ends = [len(row.tokens) - n for row, n in zip(rows, cut, strict=True)]
        lost = [
            n and end and max(0, end - self.window + 1) < row.gone * self.size
            for row, n, end in zip(rows, cut, ends, strict=True)
        ]
        if self.window and any(lost):
            with pytest.raises(ValueError, match="must leave the last"):
                tables.crop(np.array(cut, dtype=np.int64))
        else:
            tables.crop(np.array(cut, dtype=np.int64))
            rows[:] = [Row(row.tokens[:end], row.gone if end else 0) for row, end in zip(rows, ends, strict=True)]

    @precondition(lambda self: self.batches)
    @rule(which=WHICH)
    def remember(self, which):
        tables, rows = self.pick(which)
        for i, row in enumerate(rows):
            blocks, prefixes = tables.blocks(i)[: len(row.tokens) // self.size], self.prefixes(row.tokens)
            keys, tokens = self.keys(row.tokens)
            self.index.put(self.pool.allocator, keys, tokens, blocks)
            for prefix, block in zip(prefixes, blocks.tolist(), strict=True):
                if block >= 0:
                    self.remembered.setdefault(prefix, block)
            self.touch(prefixes)

    @precondition(lambda self: self.remembered and len(self.batches) < 3)
    @rule(pick=st.integers(0, 30), steps=st.integers(0, 3))
    def adopt(self, pick, steps):
        """A batch of two rows: one that begins with a remembered prefix, as far as there is one, and an empty one."""
        wanted = list(self.remembered)[pick % len(self.remembered)]
        keys, tokens = self.keys(wanted)
        found = self.index.find(self.pool.allocator, keys, tokens)
        prefixes = self.prefixes(wanted)
        assert found.tolist() == [self.remembered.get(prefix, -1) for prefix in prefixes]
        length = hit_length([(self.window, found)], self.size)
        gone = self.gone(length)
        assert length == max(
            n for n in range(len(found) + 1) if all(prefix in self.remembered for prefix in prefixes[self.gone(n) : n])
        )
        self.index.touch(keys[:length])
        self.touch(prefixes[:length])
        found[length:] = -1
        found[:gone] = -1
        tables = BlockTables(self.pool, 2)
        tables.adopt(np.stack([np.full_like(found, -1), found]), np.array([0, length * self.size]))
        self.batches.append((tables, [Row(), Row(wanted[: length * self.size], gone)]))
        if steps:
            self.decode(len(self.batches) - 1, steps)

    @rule()
    def flush(self):
        self.index.flush()
        self.remembered.clear()

    @precondition(lambda self: self.batches)
    @rule(which=WHICH, how=st.sampled_from(["trim", "release", "forget"]))
    def end(self, which, how):
        if how == "forget":
            del self.batches[which % len(self.batches)]
        elif how == "release":
            tables, rows = self.pick(which)
            tables.release()
            rows[:] = [Row()] * len(rows)
        self.pool.trim()

    @invariant()
    def everything_agrees(self):
        stats = self.pool.stats()
        owners = self.owners()
        assert self.pool.allocator.ref_counts.tolist() == [owners[block] for block in range(NUM_BLOCKS)]
        assert (stats.blocks_used, stats.blocks_free) == (len(owners), NUM_BLOCKS - len(owners))
        assert stats.blocks_shared == sum(count > 1 for count in owners.values())
        assert stats.blocks_cached == sum(owners[block] == 1 for block in self.remembered.values())
        for prefix, block in self.remembered.items():
            self.check_row(Row(prefix, len(prefix) // self.size - 1), [-1] * (len(prefix) // self.size - 1) + [block])
        assert stats.bytes_useful * self.size == self.tokens_stored() * stats.bytes_held // max(1, stats.blocks_used)
        for tables, rows in self.batches:
            block_table, seq_lens = tables.step()
            assert seq_lens.tolist() == [len(row.tokens) for row in rows]
            for row, blocks in zip(rows, block_table.tolist(), strict=True):
                self.check_row(row, blocks)

    def teardown(self):
        if hasattr(self, "batches"):
            self.batches.clear()
            self.index.flush()
            gc.collect()
            assert self.pool.stats().blocks_used == self.pool.budget.used_bytes == 0

    def pick(self, which):
        return self.batches[which % len(self.batches)]

    def write(self, tables, rows, valid, num_tokens):
        """Append, copy, write a new token into each slot; or see PoolExhausted exactly when blocks are short."""
        before = self.state(tables)
        gone = [
            max(row.gone, (len(row.tokens) - self.window + 1) // self.size) if self.window and n else row.gone
            for row, n in zip(rows, num_tokens, strict=True)
        ]
        free = self.free_after_window(tables, rows, gone)
        needed = sum(
            -(-(len(row.tokens) + n) // self.size) - -(-len(row.tokens) // self.size)
            for row, n in zip(rows, num_tokens.tolist(), strict=True)
        ) + self.copies_needed(tables, rows, num_tokens)
        used = set(self.owners()) - set(free)
        evicted = self.evict(needed - len(free), tables, rows, gone)
        used -= set(evicted)
        free = sorted(free + evicted)
        if needed > len(free):
            try:
                tables.append(num_tokens)
            except PoolExhausted as error:  # not pytest.raises, whose result would keep the batch alive
                assert (error.needed, error.free) == (needed, len(free))
            else:
                raise AssertionError(f"{needed} blocks from {len(free)}")
            assert self.state(tables) == before
            return

        mapping = tables.append(num_tokens)
        assert set(self.owners()) - used <= set(free[:needed])
        sources, destinations = mapping[:, 0].tolist(), mapping[:, 1].tolist()
        assert len(set(destinations)) == len(destinations) and not set(destinations) & set(sources)
        assert set(destinations) <= set(free[:needed])
        self.pool.copy_blocks(mapping)

        width = int(num_tokens.max(initial=0)) if valid is None else valid.shape[1]
        slots = tables.slots(num_tokens, valid, width).reshape(len(rows), width)
        owners = self.owners()
        for i, row in enumerate(rows):
            here = slots[i][slots[i] >= 0]
            new = tuple(range(self.next_token, self.next_token + int(num_tokens[i])))
            assert len(here) == len(new)
            assert all(owners[block] == 1 for block in (here // self.size).tolist())
            for c, cache in enumerate(self.caches):
                cache[here // self.size, here % self.size] = np.array(new)[:, None, None] + c / 4
            rows[i] = replace(row, tokens=row.tokens + new, gone=gone[i])
            self.next_token += len(new)

    def check_row(self, row, blocks):
        held = -(-len(row.tokens) // self.size)
        assert [block >= 0 for block in blocks] == [row.gone <= column < held for column in range(len(blocks))]
        visible = np.array(row.tokens[row.gone * self.size :], dtype=np.float32)
        for c, cache in enumerate(self.caches):
            stored = cache[blocks[row.gone : held]].reshape(-1, *cache.shape[2:])[: len(visible)]
            assert (stored == visible[:, None, None] + c / 4).all()

    def owners(self):
        """How many entries of tables and of the index point at each block that is used."""
        entries = (tables.step()[0] for tables, _ in self.batches)
        held = Counter(block for table in entries for block in table.flatten().tolist() if block >= 0)
        return held + Counter(self.remembered.values())

    def state(self, tables):
        return tables.step()[0].tolist(), tables.seq_lens.tolist()

    def prefixes(self, tokens):
        return [tokens[: end + self.size] for end in range(0, len(tokens) - self.size + 1, self.size)]

    def keys(self, tokens):
        array = np.array(tokens, dtype=np.int64)
        return block_keys(ROOT, array, self.size), full_blocks(array, self.size)

    def gone(self, num_blocks):
        """Of so many blocks, how many the next token does not see."""
        return max(0, (num_blocks * self.size - self.window + 1) // self.size) if self.window else 0

    def touch(self, prefixes):
        for prefix in reversed(prefixes):
            if prefix in self.remembered:
                self.remembered[prefix] = self.remembered.pop(prefix)

    def evict(self, missing, tables, rows, gone):
        """Forget unheld prefixes, those used longest ago first, until `missing` blocks are free; the blocks freed."""
        owners = self.owners()
        for row, blocks, end in zip(rows, tables.step()[0].tolist(), gone, strict=True):
            owners.subtract(blocks[row.gone : end])
        evicted: list[int] = []
        if missing <= 0 or not any(owners[block] == 1 for block in self.remembered.values()):
            return evicted
        for prefix in list(self.remembered):
            if len(evicted) >= missing:
                break
            block = self.remembered.pop(prefix)
            if owners[block] == 1:
                evicted.append(block)
            else:
                self.remembered[prefix] = block
        return evicted

    def free_after_window(self, tables, rows, gone):
        """The free block ids, ascending, once the blocks before column gone[i] of each row i are given up."""
        owners = self.owners()
        for row, blocks, end in zip(rows, tables.step()[0].tolist(), gone, strict=True):
            owners.subtract(blocks[row.gone : end])
        return [block for block in range(NUM_BLOCKS) if owners[block] == 0]

    def copies_needed(self, tables, rows, num_tokens):
        """Of the k rows that write into a partly filled block with r owners, k copy; all but one where k = r."""
        owners = self.owners()
        writers = Counter(
            blocks[len(row.tokens) // self.size]
            for row, blocks, n in zip(rows, tables.step()[0].tolist(), num_tokens, strict=True)
            if n and len(row.tokens) % self.size
        )
        return sum(k - (k == owners[block]) for block, k in writers.items())

    def tokens_stored(self):
        """Tokens in distinct blocks: of rows that share one, the row with most tokens in it counts."""
        most = Counter({block: self.size for block in self.remembered.values()})
        for tables, rows in self.batches:
            for row, blocks in zip(rows, tables.step()[0].tolist(), strict=True):
                for column, block in enumerate(blocks):
                    if block >= 0:
                        most[block] = max(most[block], min(self.size, len(row.tokens) - column * self.size))
        return sum(most.values())


TestTableEdits = TableEdits.TestCase
TestTableEdits.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
