"""The constant ranking: every record says the same. The candidate that any other measure has to beat."""

from __future__ import annotations

from kiridashi_server.bank.record import Record
from kiridashi_server.similarity.descriptor import Descriptor, Need


class Uniform:
    """Gives every record similarity 0."""

    name = "uniform"
    needs: tuple[Need, ...] = ()

    def similarity(self, record: Record, target: Descriptor) -> float:
        """0, whatever the record and the target are."""
        del record, target
        return 0.0

    def zero_point(self, target: Descriptor) -> float | None:
        """None: this measure cannot tell knowing from not knowing."""
        del target
        return None
