"""Children that crash, hang, chatter, eat memory, or lose their parent."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import kiridashi_agent.process as module
import pytest
from kiridashi.errors import ExitCode
from kiridashi_agent.cage import OpenCage, open_cage
from kiridashi_agent.process import (
    JobCancelledError,
    JobCrashedError,
    JobTimeoutError,
    Limits,
    MemoryLimitError,
    run_child,
)

EAT_MEMORY = """
    import sys, time
    sys.stdin.readline()
    held = []
    for _ in range(400):
        held.append(bytearray(b"x" * (1 << 20)))
        time.sleep(0.002)
    print("ate it all")
"""


def run(code: str, limits: Limits, request: bytes = b"{}") -> bytes:
    arguments = ["-c", textwrap.dedent(code)]
    return run_child(arguments, lambda kind: request, limits, "the test's child")[0]


def test_reply_and_request() -> None:
    assert run("import sys; print(sys.stdin.readline()[::-1].strip())", Limits(10), b"abc") == b"cba\n"


def test_environment_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    names = run("import os; print(' '.join(os.environ))", Limits(10)).split()
    assert b"SECRET_TOKEN" not in names
    assert b"OMP_NUM_THREADS" in names


def test_crash_shows_signal_and_last_words() -> None:
    code = "import os, sys; print('step 1\\nstep 2', file=sys.stderr, flush=True); os.abort()"
    with pytest.raises(JobCrashedError) as caught:
        run(code, Limits(10))
    assert "the test's child failed" in caught.value.what
    assert "SIGABRT" in caught.value.what
    assert "step 2" in caught.value.why
    assert caught.value.exit_code == ExitCode.MEASURE


def test_silent_end_is_a_crash_too() -> None:
    with pytest.raises(JobCrashedError, match="exit code 0"):
        run("pass", Limits(10))


def test_hang_is_ended_with_everything_it_started(tmp_path: Path) -> None:
    code = f"""
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
        print("waiting for nothing", file=sys.stderr, flush=True)
        time.sleep(60)
    """
    started = time.monotonic()
    with pytest.raises(JobTimeoutError, match="waiting for nothing") as caught:
        run(code, Limits(1.5))
    assert "1.5 s" in caught.value.what
    assert time.monotonic() - started < 5
    wait_until_gone(int((tmp_path / "pid").read_text()))


def test_cancelling_ends_it() -> None:
    cancel = threading.Event()
    threading.Timer(0.3, cancel.set).start()
    started = time.monotonic()
    with pytest.raises(JobCancelledError):
        run("import time; time.sleep(60)", Limits(30, cancel=cancel))
    assert time.monotonic() - started < 5


def test_endless_output_is_cut_off() -> None:
    with pytest.raises(JobCrashedError, match="the reply is over"):
        run("while True: print('x' * 1000)", Limits(20))


def test_endless_last_words_are_not_kept() -> None:
    code = "import sys, os\nfor n in range(20000): print('noise', n, file=sys.stderr)\nos.abort()"
    with pytest.raises(JobCrashedError, match="noise 19999"):
        run(code, Limits(20))


def test_kernel_ends_a_child_over_its_memory_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_resident_bytes", lambda _: 0)  # the kernel alone
    with open_cage(64 << 20) as cage:
        if cage.kind != "cgroup":
            pytest.skip("this machine gives no writable memory controller")
    with pytest.raises(MemoryLimitError, match="64 MiB") as caught:
        run(EAT_MEMORY, Limits(30, memory_bytes=64 << 20))
    assert caught.value.why == "the kernel ended the child process (cgroup)"


def test_groups_are_cleared_away() -> None:
    with open_cage(64 << 20) as cage:
        if cage.kind != "cgroup":
            pytest.skip("this machine gives no writable memory controller")
        folder = cage._folder  # type: ignore[attr-defined]
        assert folder.is_dir()
    assert not folder.exists()


@pytest.mark.parametrize("kernel", ["as it is", "without a controller"])
def test_the_resident_set_is_watched(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    if kernel == "without a controller":
        monkeypatch.setattr(module, "open_cage", lambda _: OpenCage("rlimit"))
    with pytest.raises(MemoryLimitError, match="64 MiB") as caught:
        run(EAT_MEMORY, Limits(30, memory_bytes=64 << 20))
    assert caught.value.why in (
        "its resident memory went over the limit",
        "the kernel ended the child process (cgroup)",
    )


def test_enough_memory_is_enough() -> None:
    assert run(EAT_MEMORY.replace("400", "10"), Limits(30, memory_bytes=200 << 20)) == b"ate it all\n"


CHATTER = """
    import os, sys, types
    from kiridashi_agent import child
    import msgspec
    class Request(msgspec.Struct):
        n: int
    def run(request):
        print("python chatter")
        os.write(1, b"chatter from C\\n")
        return {"n": request.n + 1}
    job = types.ModuleType("chatter_job")
    job.Request, job.run = Request, run
    sys.modules["chatter_job"] = job
    child.MODULES["chatter"] = "chatter_job"
    sys.exit(child.main(["chatter"]))
"""


def test_chatter_does_not_reach_the_reply() -> None:
    assert run(CHATTER, Limits(10), b'{"body": {"n": 41}}') == b'{"ok":{"n":42},"fault":null}'


def test_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    child = f"""
        import os, time
        from kiridashi_agent import child
        child._answer = lambda *_: (open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid())), time.sleep(60))
        child.main(["measure"])
    """
    parent = f"""
        from kiridashi_agent.process import Limits, run_child
        run_child(["-c", {textwrap.dedent(child)!r}], lambda kind: b'{{"body": {{}}}}', Limits(60), "test")
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(parent)])
    pid_file = tmp_path / "pid"
    deadline = time.monotonic() + 10
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    pid = int(pid_file.read_text())
    process.kill()
    process.wait()
    wait_until_gone(pid)


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + 5
    while alive(pid):
        if time.monotonic() > deadline:
            os.kill(pid, 9)
            pytest.fail(f"process {pid} outlived its parent")
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
