"""The rules of all known operators; importing this package fills the table in ``rules``."""

from kiridashi_server.graph.operators import compute, rearrange

KERNEL = compute.KERNEL

__all__ = ["KERNEL", "compute", "rearrange"]
