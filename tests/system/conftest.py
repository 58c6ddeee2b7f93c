"""For all tests of faults: one broker and one device that serves, of which every test gets a copy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fault_place import FaultPlace, fault_place


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultPlace]:
    with fault_place(tmp_path_factory.mktemp("faults")) as place:
        yield place
