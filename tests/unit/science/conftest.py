"""One tiny backbone for all tests of the science; tests must not change it."""

from collections.abc import Iterator

import pytest
import torch
from kiridashi_server.backbone import Backbone
from tiny_science import tiny_backbone


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny networks run faster on one thread than on several that wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def backbone() -> Backbone:
    return tiny_backbone()
