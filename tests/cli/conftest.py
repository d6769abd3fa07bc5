"""Runs commands in this process."""

import pytest
import torch

from torch_paged.cli.main import main


@pytest.fixture(autouse=True)
def one_thread():
    """Commands may change the number of threads; models and cases this small need one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(capsys):
    """Run a command; return its exit status, its output and its errors."""

    def command(*arguments):
        try:
            status = main(arguments)
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return command
