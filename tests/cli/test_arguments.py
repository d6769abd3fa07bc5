"""A wrong argument gets exit status 2 and one line that says what is wrong."""

import subprocess
import sys

import pytest
import torch

import torch_paged

DEMO_ERRORS = [
    ("--batch 0", "argument --batch: 0; must be an integer of at least 1"),
    ("--batch two", "argument --batch: two; must be"),
    ("--max-new-tokens -3", "argument --max-new-tokens: -3; must be"),
    ("--max-new-tokens 4000", "--max-new-tokens 4000: after a prompt of"),
    ("--dtype int7", "argument --dtype: invalid choice: 'int7'"),
    ("--device nowhere", "--device nowhere: not available here"),
    ("--device meta", "--device meta: torch_paged has no attention kernel for it"),
    ("--model /no/such/model", "--model /no/such/model: no such folder"),
    ("--model ./pyproject.toml", "--model ./pyproject.toml: no such folder"),
    ("--prompt=", "--prompt '': has no tokens"),
]
BENCH_ERRORS = [
    ("", "the following arguments are required: {ops,copies,bookkeeping,memory,steps,generate}"),
    ("ops --shape 1,2,3", "'1,2,3'; must be batch,heads,kv_heads,head_dim,context[,query_len]"),
    ("ops --shape 1,2,2,64,x", "'1,2,2,64,x'; must be"),
    ("ops --shape 1,2,0,64,8", "'1,2,0,64,8'; must be"),
    ("ops --shape 1,3,2,64,8", "'1,3,2,64,8': 3 heads; must be a multiple of the 2 kv_heads"),
    ("ops --shape 1,2,2,64,8,9", "'1,2,2,64,8,9': query_len 9; must be at most the context, 8"),
    ("ops --shape 1,2,2,12,8", "head_dim"),
    ("ops --only decode --shape 1,2,2,64,8", "not allowed with argument"),
    ("ops --block-size 3", "argument --block-size: invalid choice: 3"),
    ("copies --tokens 7", "argument --tokens: 7; must be an integer of at least 8"),
    ("bookkeeping --rounds 0", "argument --rounds: 0; must be"),
    ("bookkeeping --json /no/such/folder/b.json", "--json /no/such/folder/b.json: no folder /no/such/folder"),
    ("bookkeeping --json /", "--json /: a folder; must be a file"),
    ("generate --hidden 100 --heads 3", "--hidden 100 --heads 3 --kv-heads 2; must be an even multiple of"),
    ("generate --ragged-prompts 9 8", "--ragged-prompts 9 8; the first must be at most the second"),
    ("generate --model /no/such/model", "--model /no/such/model: no such folder"),
    ("generate --model torch_paged/cli/demo_model --context 9999", "prompts and new tokens take 10031 positions"),
    ("generate --cases two", "argument --cases: invalid choice: 'two'"),
    ("memory --max-len 1", "argument --max-len: 1; must be an integer of at least 2"),
    ("memory --memory 0.5", 'argument --memory: 0.5; must be bytes, such as "32GiB"'),
    ("memory --memory lots", "argument --memory: lots; must be bytes"),
    ("memory --concentration 0", "argument --concentration: 0; must be a number greater than 0"),
    ("memory --concentration nan", "argument --concentration: nan; must be"),
    ("memory --mix lmsys", "argument --mix: invalid choice: 'lmsys'"),
]
ERRORS = [
    *(("demo", *case) for case in DEMO_ERRORS),
    *(("bench", *case) for case in BENCH_ERRORS),
    ("env", "--yaml", "unrecognized arguments: --yaml"),
    ("fly", "", "invalid choice: 'fly'"),
]


@pytest.mark.parametrize("command, arguments, message", ERRORS)
def test_wrong_argument_gets_one_line(run, command, arguments, message):
    status, out, err = run(command, *arguments.split())
    assert status == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_missing_gpu_gets_one_line(run):
    status, _, err = run("demo", "--device", "cuda")
    assert status == 2
    assert err.startswith("python -m torch_paged demo: error: --device cuda: not available here (")
    assert err.count("\n") == 1


def test_folder_that_is_no_model_gets_one_line(run, tmp_path):
    status, _, err = run("demo", "--model", str(tmp_path))
    assert status == 2
    assert err.startswith(f"python -m torch_paged demo: error: --model {tmp_path}: ")
    assert err.count("\n") == 1


def test_no_command_names_the_commands(run):
    status, _, err = run()
    assert status == 2
    assert "{demo,bench,env}" in err and err.count("\n") == 1


def test_runs_as_a_module():
    ran = subprocess.run([sys.executable, "-m", "torch_paged", "--version"], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout.strip()) == (0, torch_paged.__version__)
