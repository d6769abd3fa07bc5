"""bench memory: blocks counted by hand for small cases, and the scenarios beside what was published."""

import json

import numpy as np
import pytest

from torch_paged.cli.bench.kv_geometry import KVGeometry
from torch_paged.cli.bench.length_mixes import MIXES, LengthMix
from torch_paged.cli.bench.memory_decoding import RandomBeamSearch, decode
from torch_paged.cli.bench.memory_scenarios import shared_prompt, users, waste

SMALL = KVGeometry(num_layers=2, num_kv_heads=2, head_dim=8, block_size=4)
QUICK = ("--requests", "8", "--rounds", "3", "--max-len", "256", "--widths", "2", "3")


def test_token_of_llama_7b_takes_half_a_mebibyte():
    assert KVGeometry(32, 32, 128, 16).token_bytes == 512 * 1024


def test_waste_by_hand():
    found = waste(SMALL, np.array([1, 4, 5, 10]), reserved=16)
    assert (found.num_tokens, found.preallocated_slots) == (20, 64)
    assert found.num_blocks == 1 + 1 + 2 + 3
    assert found.of_preallocation == 1 - 20 / 64
    assert found.of_blocks == 1 - 20 / 28


def test_users_by_hand():
    # Means of 1 make every prompt and every output one token: a user takes one block of 4.
    always_two = LengthMix("one and one", 1, 1)
    kv_bytes = 50 * 4 * SMALL.token_bytes
    found = users(SMALL, kv_bytes + 1, always_two, longest=16, rounds=3, seed=0)
    assert found.in_blocks == [50, 50, 50]
    assert found.preallocated == 50 // 4
    assert found.ratio == 50 / 12


@pytest.mark.parametrize(
    "num_users, prompt, own, shared, unshared",
    [
        # 31 whole blocks of 16 once; the tail of 4 tokens is copied by all but the last, which goes on in it.
        (100, 500, 100, 31 + 100 * 7, 100 * 38),
        (3, 32, 1, 2 + 3, 3 * 3),
        (3, 33, 0, 3, 3 * 3),
        (1, 33, 16, 4, 4),
    ],
)
def test_shared_prompt_by_hand(num_users, prompt, own, shared, unshared):
    found = shared_prompt(KVGeometry(32, 32, 128, 16), num_users, prompt, own)
    assert (found.blocks_shared, found.blocks_unshared) == (shared, unshared)
    assert found.saved == 1 - shared / unshared


def test_samples_by_hand():
    # Prompt of 6 in blocks of 4: one block shared, the tail of 2 copied. Tokens 7, 8 | 9: a third block each.
    found = decode(SMALL, np.array([6]), np.array([3]), width=2, parents=None)
    assert found.blocks_unshared == 4 + 4 + 6
    assert found.blocks_shared == 3 + 3 + 5
    # A request that ends after its first token holds blocks in one step alone.
    both = decode(SMALL, np.array([6, 4]), np.array([3, 1]), width=2, parents=None)
    assert both.blocks_unshared == found.blocks_unshared + 4
    assert both.blocks_shared == found.blocks_shared + 3


def test_beams_by_hand():
    steps = iter([[[0, 1]], [[0, 0]]])
    found = decode(SMALL, np.array([4]), np.array([3]), width=2, parents=lambda requests: np.array(next(steps)))
    # Step 1: the prompt's block and one each. Step 2: the same. Step 3: beam 1 forks from beam 0, and copies its tail.
    assert found.blocks_shared == 3 + 3 + 3
    assert found.blocks_unshared == 4 + 4 + 4
    steps = iter([[[0, 0]] * 1, [[0, 1]], [[1, 1]], [[0, 1]], [[0, 0]]])
    found = decode(SMALL, np.array([3]), np.array([6]), width=2, parents=lambda requests: np.array(next(steps)))
    # Tokens 4 | 5 6 7 8 | 9. Token 4 splits the block; at 5 both go on from beam 0, so block 0 is one again; from then
    # on each has its own second block; at 9 both go on from beam 0, so two blocks are shared.
    assert found.blocks_shared == 2 + 3 + 3 + 3 + 3 + 4
    assert found.blocks_unshared == 2 + 4 + 4 + 4 + 4 + 6


def test_beams_of_several_requests_stay_apart():
    search = RandomBeamSearch(5, 3, 1.0, np.random.default_rng(0))
    for requests in (np.arange(5), np.array([0, 2, 4]), np.array([4])):
        parents = search(requests)
        assert parents.shape == (len(requests), 3)
        assert parents.min() >= 0 and parents.max() < 3


class _Sticks:
    """Breaks off the same part of a beam's stick for each of its candidates."""

    def __init__(self, *calls):
        self.calls = iter(calls)

    def standard_exponential(self, shape):
        parts = np.array(next(self.calls))
        return np.broadcast_to(-np.log(1 - parts)[None, :, None], shape)


def test_beam_search_by_hand():
    # At first all beams are one, so that its two best tokens begin them: 0.5 and 0.25.
    search = RandomBeamSearch(1, 2, 1.0, _Sticks([0.5, 0.9], [0.5, 0.9], [0.9, 0.5], [0.5, 0.1]))
    everyone = np.array([0])
    assert search(everyone).tolist() == [[0, 1]]  # 0.5 * 0.5 and 0.25 * 0.9, before 0.5 * 0.25
    assert search(everyone).tolist() == [[0, 1]]  # 0.25 * 0.9 and 0.225 * 0.5
    assert search(everyone).tolist() == [[0, 0]]  # 0.225 * 0.5 and 0.225 * 0.25, before 0.1125 * 0.1


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_lengths_have_the_means_of_the_data_sets(mix):
    prompt_lens, output_lens = mix.draw(np.random.default_rng(0), 200_000, 1 << 40)
    assert prompt_lens.mean() == pytest.approx(mix.mean_prompt, rel=0.02)
    assert output_lens.mean() == pytest.approx(mix.mean_output, rel=0.02)
    prompt_lens, output_lens = mix.draw(np.random.default_rng(0), 2000, 20)
    assert prompt_lens.min() >= 1 and output_lens.min() >= 1
    assert (prompt_lens + output_lens).max() == 20


def test_json_has_every_scenario_beside_what_was_published(run):
    status, out, _ = run("bench", "memory", *QUICK, "--json", "-")
    report = json.loads(out)
    assert status == 0
    assert report["bench"] == "memory" and report["token_bytes"] == 512 * 1024
    assert {"cpu", "cpu_instruction_set", "threads", "torch", "torch_paged"} <= set(report["environment"])
    results = {
        (result["scenario"], result.get("mix"), result.get("width")): result
        for result in report["results"]
        if result["scenario"] in ("samples", "beams")
    }
    assert set(results) == {
        (name, mix, width) for name in ("samples", "beams") for mix in ("alpaca", "sharegpt") for width in (2, 3)
    }
    for result in results.values():
        assert result["ours"] == 1 - result["blocks_shared"] / result["blocks_unshared"]
        assert 0 < result["ours"] < 1 - 1 / result["width"]
    for mix in MIXES:
        for width in (2, 3):
            samples, beams = results["samples", mix, width], results["beams", mix, width]
            assert samples["blocks_unshared"] == beams["blocks_unshared"]
            assert samples["blocks_shared"] > beams["blocks_shared"]
    waste, users, shared = report["results"][:3]
    assert waste["published"] == [0.77, 0.77] and users["published"] == [4, 4] and shared["published"] == [0.8, 0.83]
    assert waste["waste_of_preallocation"]["median"] == 1 - waste["tokens"] / (8 * 256) == waste["ours"]
    assert waste["waste_of_blocks"] == 1 - waste["tokens"] / (16 * waste["blocks"])
    assert users["kv_bytes"] == (30 << 30) - 2 * 6_738_415_616
    assert users["users_preallocated"] == users["kv_bytes"] // (256 * 512 * 1024)
    assert users["ours"] == users["users_in_blocks"]["median"] / users["users_preallocated"] > 1
    assert (shared["blocks_shared"], shared["blocks_unshared"]) == (731, 3800)


def test_the_same_seed_gives_the_same_figures(run):
    first, again, other = (
        json.loads(run("bench", "memory", *QUICK, "--seed", seed, "--json", "-")[1])["results"] for seed in "001"
    )
    assert first == again != other


def test_table_says_what_is_ours_and_what_is_published(run):
    status, out, _ = run("bench", "memory", *QUICK, "--threads", "1")
    assert status == 0
    assert "80.8%" in out and "80–83%" in out and "44.3–66.3%" in out and "37.6–55.2%" in out
    assert "6.1–9.8%" in out and "16.2–30.5%" in out and "77%" in out and "4x" in out
    assert "Ours: counted here" in out and "Published: by others" in out and "published" in out


def test_weights_that_leave_no_room_get_one_line(run):
    status, out, err = run("bench", "memory", *QUICK, "--memory", "14GiB")
    assert (status, out) == (2, "")
    assert "after 13476831232 of weights" in err and err.count("\n") == 1
