"""The rules of all known operators; importing this package fills the table in ``rules``."""

from kiridashi_server.graph.operators import compute, contract, join, normalise, rearrange

KERNEL = contract.KERNEL

__all__ = ["KERNEL", "compute", "contract", "join", "normalise", "rearrange"]
