"""A device whose root is read-only: everything that is written lies below the state folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from agent_program import BINARY
from kiridashi.messages import Desired, LineDesired
from kiridashi.slots import LineSlots
from tiny_bundle import make_bundle, write_device_samples

# In a mount namespace of its own: /tmp in memory, the state folder as it is, all the rest read-only.
READ_ONLY = """
set -e
mount --make-rprivate /
mount --bind "$STATE" "$STATE"
findmnt -rno TARGET,FSTYPE | while read -r place kind; do
  case "$place $kind" in
    "$STATE"*|"/proc"*|"/sys"*|"/dev"*) ;;
    *) mount -o remount,bind,ro "$place" 2>/dev/null || true ;;
  esac
done
if touch /etc/kiridashi-was-here 2>/dev/null; then exit 77; fi
exec "$@"
"""


def may_unshare() -> bool:
    found = shutil.which("unshare") and shutil.which("findmnt") and os.geteuid() == 0
    probe = ["unshare", "-m", "sh", "-c", "mount --make-rprivate / && mount -o remount,bind,ro /"]
    return bool(found) and subprocess.run(probe, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not may_unshare(), reason="no mount namespaces here")
def test_a_whole_update_with_tuning_needs_only_the_state_folder(program, responder, fleet, tmp_path) -> None:
    folder, samples = tmp_path / "bundle", tmp_path / "samples"
    fleet.publish(folder, make_bundle(folder, version=1))
    write_device_samples(samples, per_class=12)
    program.configure(samples=samples)
    responder.want("cam-1", Desired(1, {"press-3": LineDesired("lines/press-3/1.json")}))
    for words in (("run", "--once"), ("doctor",), ("status",)):
        command = ["unshare", "-m", "sh", "-c", READ_ONLY, "sh", *BINARY, *words, "--state", str(program.state)]
        place = {"STATE": str(program.state), "HOME": "/root", "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, env={**os.environ, **place}, check=False
        )
        assert done.returncode == 0, done.stderr
    assert LineSlots(program.state, "press-3").active().tuned


RECORD = """
import os, sys
# Where an event has the path that changes, and the open folder, if any, that it is relative to.
CHANGES = {
    "os.mkdir": (0, 2), "os.remove": (0, 1), "os.rmdir": (0, 1), "os.chmod": (0, 2), "os.truncate": (0, None),
    "os.rename": (1, 3), "os.link": (1, 3), "os.symlink": (1, 2),
}
def note(event, arguments):
    if event == "open":
        (path, mode, flags), folder = arguments, -1
        written = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    else:
        place, relative = CHANGES[event]
        path, folder, written = arguments[place], -1 if relative is None else arguments[relative], True
    if written and isinstance(path, (str, bytes)):
        start = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 else os.getcwd()
        whole = os.path.abspath(os.path.join(start, os.fsdecode(path)))
        if not whole.startswith((STATE, "/proc/", "/sys/fs/cgroup/", "/dev/null")):
            os.write(2, f"WROTE {event} {whole}\\n".encode())
sys.addaudithook(lambda event, arguments: note(event, arguments) if event == "open" or event in CHANGES else None)
"""


def recording(state: Path) -> str:
    """A module that tells what its process writes outside of ``state``; children do not get the test's environment."""
    return f"STATE = {str(state)!r}\n{RECORD}"


def test_python_writes_nowhere_else_in_any_process(program, responder, fleet, tmp_path) -> None:
    """Also where namespaces are not to be had: every Python process tells of what it writes, its children too."""
    hook, home = tmp_path / "hook", tmp_path / "home"
    hook.mkdir()
    home.mkdir()
    (hook / "sitecustomize.py").write_text(recording(program.state))
    folder = tmp_path / "bundle"
    fleet.publish(folder, make_bundle(folder, version=1))
    write_device_samples(tmp_path / "samples", per_class=12)
    program.configure(samples=tmp_path / "samples")
    responder.want("cam-1", Desired(1, {"press-3": LineDesired("lines/press-3/1.json")}))
    place = {"HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    paths = {"PYTHONPATH": os.pathsep.join([str(hook), *sys.path])}
    command = [*BINARY, "run", "--once", "--log-level", "debug", "--state", str(program.state)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, **place, **paths}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [row for row in done.stderr.splitlines() if "WROTE" in row] == []
    assert list(home.rglob("*")) == []  # nor does a library in C


WRITTEN = (("open", "x"), ("os.mkdir", "y"), ("os.rmdir", "y"))


def test_the_hook_sees_what_is_written(tmp_path) -> None:
    (tmp_path / "sitecustomize.py").write_text(recording(Path("/nowhere")))
    code = f"open({str(tmp_path / 'x')!r}, 'w'); import os; os.mkdir({str(tmp_path / 'y')!r}); "
    code += f"folder = os.open({str(tmp_path)!r}, os.O_RDONLY); os.rmdir('y', dir_fd=folder)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path)},
        timeout=30,
        check=True,
    )
    assert [f"WROTE {event} {tmp_path}/{name}" in done.stderr for event, name in WRITTEN] == [True] * 3
