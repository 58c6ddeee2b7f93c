"""The Debian package: built twice alike, installed without a network into a copy of this system, used, and purged.

The copy is an overlay in a mount namespace of its own: this machine is not touched.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_bundle import make_bundle

ROOT = Path(__file__).parents[2]
WHEELS = os.environ.get("KIRIDASHI_WHEELS")  # a folder with amd64/: instead of the package index
ENTER = """
set -e
mount --make-rprivate /
mount -t tmpfs none "$PLACE"
mkdir "$PLACE/upper" "$PLACE/work" "$PLACE/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$PLACE/upper,workdir=$PLACE/work" "$PLACE/root"
mount --bind /proc "$PLACE/root/proc"
mount --bind /dev "$PLACE/root/dev"
mount -t tmpfs none "$PLACE/root/run"
mkdir "$PLACE/root/handed"
mount --bind "$HANDED" "$PLACE/root/handed"
exec chroot "$PLACE/root" /bin/sh /handed/steps.sh
"""
STEPS = """
set -e
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
unset PYTHONPATH VIRTUAL_ENV
dpkg -i /handed/package.deb >&2
as() { runuser -u kiridashi -- env HOME=/nonexistent "$@"; }
echo owner $(stat -c %U:%a /var/lib/kiridashi)
echo code $(find /opt/kiridashi/lib -name '*.pyc' | head -1 | wc -l)
echo stray $(/opt/kiridashi/bin/python3 -c 'import sys; print(sum("dist-packages" in p for p in sys.path))')
as kiridashi-agent enroll request --device cam-1 -o /tmp/request.json >&2
echo key $(stat -c %U:%a /var/lib/kiridashi/tls/key.pem)
as kiridashi-agent measure /handed/model.onnx /handed/model.tflite --json > /handed/measured.json
as kiridashi-agent doctor --json > /handed/doctor.json || echo doctor $?
kiridashi-line --help > /dev/null
echo "KIRIDASHI_STATE=/elsewhere" >> /etc/kiridashi/agent.env
dpkg -i /handed/package.deb >&2
echo kept $(tail -1 /etc/kiridashi/agent.env) $(test -f /var/lib/kiridashi/tls/key.pem && echo key)
dpkg -r kiridashi-agent >&2
echo removed $(ls /opt/kiridashi 2>/dev/null | wc -l) $(test -d /var/lib/kiridashi && echo state)
dpkg -P kiridashi-agent >&2
echo purged $(ls -d /var/lib/kiridashi /etc/kiridashi /opt/kiridashi /usr/bin/kiridashi-agent 2>/dev/null | wc -l)
"""


def may_overlay(place: Path) -> bool:
    code = 'mount --make-rprivate / && mount -t tmpfs none "$0" && mkdir "$0/u" "$0/w" "$0/m" && '
    code += 'mount -t overlay overlay -o "lowerdir=/,upperdir=$0/u,workdir=$0/w" "$0/m"'
    tools = all(map(shutil.which, ("unshare", "dpkg-deb", "adduser", "runuser")))
    return tools and subprocess.run(["unshare", "-m", "sh", "-c", code, str(place)], check=False).returncode == 0


def build(out: Path) -> Path:
    command = [sys.executable, str(ROOT / "scripts" / "build_deb.py"), "--arch", "amd64", "--out", str(out)]
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1790000000"}
    subprocess.run([*command, *(["--wheels", WHEELS] if WHEELS else [])], check=True, env=environment, timeout=600)
    (package,) = out.glob("*.deb")
    return package


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_built_installed_used_and_purged(tmp_path) -> None:
    (tmp_path / "place").mkdir()
    if not may_overlay(tmp_path / "place"):
        pytest.skip("no overlay mounts here, or not Debian")
    package = build(tmp_path / "first")
    assert package.read_bytes() == build(tmp_path / "second").read_bytes()
    assert package.stat().st_size < 60 * 2**20
    handed = tmp_path / "handed"
    make_bundle(handed)
    handed.chmod(0o777)
    shutil.copyfile(package, handed / "package.deb")
    (handed / "steps.sh").write_text(STEPS)
    environment = {**os.environ, "PLACE": str(tmp_path / "place"), "HANDED": str(handed)}
    command = ["unshare", "-m", "-n", "sh", "-c", ENTER]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, (done.stdout, done.stderr[-3000:])
    said = dict(row.split(" ", 1) for row in done.stdout.splitlines())
    assert said == {
        "owner": "kiridashi:755",
        "code": "1",
        "stray": "0",
        "key": "kiridashi:600",
        "doctor": "10",  # not enrolled yet, and it says so
        "kept": "KIRIDASHI_STATE=/elsewhere key",
        "removed": "0 state",
        "purged": "0",
    }
    measured = json.loads((handed / "measured.json").read_text())["files"]
    assert [row["measured"]["runtime"].split()[0] for row in measured] == ["onnxruntime", "ai-edge-litert"]
    (check,) = json.loads((handed / "doctor.json").read_text())["checks"]
    assert (check["name"], check["result"]) == ("config", "failed")
