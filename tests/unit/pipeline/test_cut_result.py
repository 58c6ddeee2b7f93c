"""What a stage stores must come back: also a recovery that took no iteration."""

from pathlib import Path

from kiridashi_server.cut_run import CutResult
from kiridashi_server.stages import Workspace


def test_a_recovery_without_iterations_is_reused(tmp_path: Path) -> None:
    made = CutResult(iterations=0, loss_first=None, loss_last=None, seconds=1.5)
    for _ in range(2):
        assert Workspace(tmp_path).run("cut", "the same", lambda folder: made, CutResult) == made
