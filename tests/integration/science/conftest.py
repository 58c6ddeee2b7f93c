"""A bank in a temporary folder, and few threads."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kiridashi_server.bank.store import Bank


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Tests share the machine; one thread each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bank(tmp_path: Path) -> Iterator[Bank]:
    with Bank.open(tmp_path / "bank") as bank:
        yield bank
