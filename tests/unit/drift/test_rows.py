"""Files of rows, the bundle's reference, and the line's sampler."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time

import msgspec
import numpy as np
import pytest
from agent_program import wait_for
from kiridashi.drift.rows import (
    MAX_FILES,
    DriftReference,
    Row,
    RowFile,
    RowFolder,
    decode_reference,
    write_reference,
)
from kiridashi.drift.sampler import Sampler
from kiridashi.drift.statistics import NAMES
from kiridashi.errors import BundleError, InputError

VALUES = np.array([0.2, 0.7, 0.1], np.float32)


def a_file(count: int = 2) -> RowFile:
    return RowFile("sha256:m", ("a", "b"), tuple(Row(float(n), n, (0.5, float(n))) for n in range(count)))


def frame(shade: int = 90) -> np.ndarray:
    return np.full((16, 16, 3), shade, np.uint8)


class TestRowFolder:
    def test_files_come_back_in_order_and_are_private(self, tmp_path) -> None:
        folder = RowFolder(tmp_path, "press-3")
        assert folder.names() == []
        for count in (1, 2, 3):
            folder.add(a_file(count))
        assert [len(folder.read(name).rows) for name in folder.names()] == [1, 2, 3]
        assert (tmp_path / "spool").stat().st_mode & 0o777 == 0o700
        assert (folder.path / folder.names()[0]).stat().st_mode & 0o777 == 0o600
        folder.remove(folder.names()[:2])
        assert len(folder.names()) == 1

    def test_the_oldest_leave(self, tmp_path) -> None:
        folder = RowFolder(tmp_path, "press-3")
        for n in range(MAX_FILES + 3):
            folder.add(RowFile("sha256:m", ("a",), (Row(float(n), 0, (1.0,)),)))
        names = folder.names()
        assert len(names) == MAX_FILES
        assert folder.read(names[0]).rows[0].at_s == 3.0

    @pytest.mark.parametrize("damage", [b"", b"{", b'{"digest":"m","names":["a"],"rows":[[0,0,[1,2]]]}', b"\xff"])
    def test_what_cannot_be_read_is_left_out(self, tmp_path, damage, caplog) -> None:
        folder = RowFolder(tmp_path, "press-3")
        folder.add(a_file())
        (folder.path / folder.names()[0]).write_bytes(damage)
        assert folder.read(folder.names()[0]) is None
        assert "left out" in caplog.text
        assert folder.read("gone.rows") is None

    def test_what_a_dead_writer_left_is_swept(self, tmp_path) -> None:
        folder = RowFolder(tmp_path, "press-3")
        folder.add(a_file())
        left, fresh = folder.path / ".1-a.rows", folder.path / ".2-b.rows"
        for part in (left, fresh):
            part.write_bytes(b"x")
        os.utime(left, (time.time() - 3600,) * 2)
        folder.remove([])
        assert (left.exists(), fresh.exists()) == (False, True)

    def test_a_line_needs_a_safe_name(self, tmp_path) -> None:
        with pytest.raises(InputError):
            RowFolder(tmp_path, "../x")


class TestReference:
    def test_the_same_rows_are_the_same_bytes(self, tmp_path) -> None:
        rows = [Row(0.0, 1, (1 / 3, 2.0))]
        for name in ("one", "two"):
            write_reference(tmp_path / name, ("a", "b"), rows)
        data = (tmp_path / "one").read_bytes()
        assert data == (tmp_path / "two").read_bytes()
        assert decode_reference(data, "one") == DriftReference(names=("a", "b"), rows=(Row(0.0, 1, (0.333333, 2.0)),))

    @pytest.mark.parametrize(
        "data",
        [
            b"no",
            b'{"format":"other/1","names":["a"],"rows":[]}',
            b'{"names":["a"],"rows":[[0,0,[1,2]]]}',
            b'{"names":["a"],"rows":[[0,-1,[1]]]}',
        ],
    )
    def test_another_file_is_refused(self, data) -> None:
        with pytest.raises(BundleError):
            decode_reference(data, "here")


class TestSampler:
    def sampler(self, tmp_path, every_s: float = 0.0) -> Sampler:
        return Sampler(RowFolder(tmp_path, "press-3"), every_s, 60.0, 0)

    def rows(self, tmp_path) -> list[Row]:
        folder = RowFolder(tmp_path, "press-3")
        return [row for name in folder.names() for row in folder.read(name).rows]

    def test_samples_are_noted_and_written_at_the_end(self, tmp_path) -> None:
        sampler = self.sampler(tmp_path)
        for n in range(3):
            sampler.offer(frame(60 + n), VALUES, "sha256:m", (16, 16))
        wait_for(lambda: sampler.noted == 3)
        sampler.close()
        found = self.rows(tmp_path)
        assert [row.best for row in found] == [1, 1, 1]
        brightness = [row.values[NAMES.index("brightness")] for row in found]
        assert brightness == pytest.approx([60 / 255, 61 / 255, 62 / 255], abs=1e-4)
        sampler.offer(frame(), VALUES, "sha256:m", (16, 16))
        assert len(self.rows(tmp_path)) == 3

    def test_only_now_and_then_a_frame_is_taken(self, tmp_path) -> None:
        sampler = self.sampler(tmp_path, every_s=3600.0)
        for _ in range(1000):
            sampler.offer(frame(), VALUES, "sha256:m", (16, 16))
        sampler.close()
        assert len(self.rows(tmp_path)) == 1

    def test_each_model_has_files_of_its_own(self, tmp_path) -> None:
        sampler = self.sampler(tmp_path)
        for digest in ("sha256:m", "sha256:m", "sha256:n"):
            sampler.offer(frame(), VALUES, digest, (16, 16))
        sampler.close()
        folder = RowFolder(tmp_path, "press-3")
        assert [(folder.read(name).digest, len(folder.read(name).rows)) for name in folder.names()] == [
            ("sha256:m", 2),
            ("sha256:n", 1),
        ]

    def test_nothing_that_is_offered_can_stop_the_line(self, tmp_path) -> None:
        sampler = self.sampler(tmp_path)
        for bad in (None, np.zeros(3), np.zeros((4, 4, 3), np.float64)):
            sampler.offer(bad, VALUES, "sha256:m", (16, 16))
        sampler.offer(frame(), np.array([np.nan], np.float32), "sha256:m", (16, 16))
        wait_for(sampler._waiting.empty)
        sampler.offer(frame(), VALUES, "sha256:m", (16, 16))
        sampler.close()
        assert len(self.rows(tmp_path)) == 1
        assert sampler.error

    def test_a_full_disk_costs_the_rows_only(self, tmp_path, monkeypatch) -> None:
        sampler = Sampler(RowFolder(tmp_path, "press-3"), 0.0, 0.01, 0)

        def full(_self, _file) -> None:
            raise OSError(errno.ENOSPC, "no space left")

        monkeypatch.setattr(RowFolder, "add", full)
        sampler.offer(frame(), VALUES, "sha256:m", (16, 16))
        wait_for(lambda: "no space left" in sampler.error)
        monkeypatch.undo()
        sampler.offer(frame(), VALUES, "sha256:m", (16, 16))
        sampler.close()
        assert len(self.rows(tmp_path)) == 1


def test_reading_rows_and_reports_needs_no_numpy() -> None:
    modules = "kiridashi.drift.rows, kiridashi.drift.report, kiridashi.drift.sampler"
    code = f"import sys, {modules}; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


def test_a_row_is_an_array_on_disk() -> None:
    assert msgspec.json.encode(Row(1.0, 2, (3.0,))) == b"[1.0,2,[3.0]]"
