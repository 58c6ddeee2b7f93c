"""Build the Debian package of the device's side: agent, line server and runtimes, for one or more architectures.

    python scripts/build_deb.py --arch amd64 arm64 --out dist

The package brings its own libraries (``packaging/wheels.txt``, fixed by digest) and uses the system's Python 3.11; it
needs no network to be installed. The same sources give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGING = ROOT / "packaging"
NAME = "kiridashi-agent"
PYTHON = "3.11"
PLACE = Path("opt/kiridashi")
LIBRARIES = PLACE / "lib" / f"python{PYTHON}" / "site-packages"
PLATFORMS = {"amd64": "x86_64", "arm64": "aarch64"}
MANYLINUX = ("2_34", "2_28", "2_27", "2_17")
SOURCES = {"kiridashi": ROOT / "sdk", "kiridashi_agent": ROOT / "device_agent"}
PROGRAMS = {
    "kiridashi-agent": "kiridashi_agent.cli import main",
    "kiridashi-line": "kiridashi.line_command import run as main",
}
# Parts of the runtimes that convert models or belong to other processors; a device loads none of them.
LEFT_OUT = re.compile(
    r"onnxruntime/(transformers|quantization|tools|datasets)/.*|ai_edge_litert/(vendors|tools|aot)/.*"
    r"|ai_edge_litert/libLiteRtWebGpuAccelerator\.so|(numpy|cffi)/.*/?tests/.*|.*\.pyc"
)
CONTROL = """\
Package: {name}
Version: {version}
Architecture: {arch}
Maintainer: The Kiridashi authors <kiridashi@localhost>
Section: science
Priority: optional
Installed-Size: {kib}
Depends: python3 (>= {python}), python{python}, libc6 (>= 2.34), libstdc++6, libgcc-s1, adduser
Recommends: systemd
Description: device agent for pruned vision models
 Takes the model of a production line, checks its signatures, measures it on
 this device, tunes it on local samples, and activates it. Runs as an
 unprivileged service, and offline.
"""


def main() -> int:
    """Build for every architecture that was asked for; prints the path, the size and the digest of each package."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=sorted(PLATFORMS), default=sorted(PLATFORMS))
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where packages go (default: dist)")
    parser.add_argument(
        "--wheels", type=Path, help="folder with amd64/ and arm64/ to take wheels from, without a network"
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for arch in arguments.arch:
        with tempfile.TemporaryDirectory(prefix="kiridashi-deb-") as scratch:
            package = build(arch, Path(scratch), arguments.out, arguments.wheels)
        digest = hashlib.sha256(package.read_bytes()).hexdigest()
        print(f"{package}: {package.stat().st_size / 2**20:.1f} MiB, sha256 {digest}")
    return 0


def build(arch: str, scratch: Path, out: Path, wheels: Path | None) -> Path:
    """One package; ``scratch`` is an empty folder to work in."""
    version, epoch = source_version(), source_date()
    tree, fetched = scratch / "tree", scratch / "wheels"
    fetch_wheels(arch, fetched, wheels / arch if wheels else None)
    for wheel in sorted(fetched.glob("*.whl")):
        unpack(wheel, tree / LIBRARIES)
    copy_sources(tree / LIBRARIES)
    write_programs(tree)
    copy_packaging(tree)
    write_control(tree, arch, version)
    settle(tree, epoch)
    package = out / f"{NAME}_{version}_{arch}.deb"
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch)}
    command = ["dpkg-deb", "--root-owner-group", "-Zzstd", "-z9", "--threads-max=1", "--build", str(tree), str(package)]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return package


def source_version() -> str:
    """The version in the sources."""
    text = (ROOT / "sdk" / "kiridashi" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if found is None:
        raise SystemExit("sdk/kiridashi/__init__.py has no __version__")
    return found[1]


def source_date() -> int:
    """``SOURCE_DATE_EPOCH``, else the time of the last commit."""
    told = os.environ.get("SOURCE_DATE_EPOCH")
    if told:
        return int(told)
    command = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def fetch_wheels(arch: str, folder: Path, source: Path | None) -> None:
    """Have pip bring exactly the files of ``packaging/wheels.txt``, from ``source`` alone if it is given."""
    machine = PLATFORMS[arch]
    places = [word for tag in MANYLINUX for word in ("--platform", f"manylinux_{tag}_{machine}")]
    places += ["--platform", f"manylinux2014_{machine}", "--python-version", PYTHON, "--implementation", "cp"]
    only = ["--no-index", "--find-links", str(source)] if source else []
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", *places, *only, "-d", str(folder)]
    command += ["-r", str(PACKAGING / "wheels.txt")]
    subprocess.run(command, check=True, stderr=None if only else subprocess.DEVNULL)


def unpack(wheel: Path, place: Path) -> None:
    """A wheel's files that a device needs; names were checked by pip's digest, and once more here."""
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.infolist():
            name = re.sub(r"^[^/]+\.data/(purelib|platlib)/", "", entry.filename)
            if entry.is_dir() or ".data/" in name or LEFT_OUT.fullmatch(name):
                continue
            target = (place / name).resolve()
            if not target.is_relative_to(place.resolve()):
                raise SystemExit(f"{wheel.name} holds the name {entry.filename}")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(entry))


def copy_sources(place: Path) -> None:
    """Our own packages for the device: not the server's."""
    for package, folder in SOURCES.items():
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
        shutil.copytree(folder / package, place / package, ignore=ignored)


def write_programs(tree: Path) -> None:
    """A Python of our own that sees these libraries only, and the programs on it."""
    programs = tree / PLACE / "bin"
    programs.mkdir(parents=True)
    (programs / "python3").symlink_to(f"/usr/bin/python{PYTHON}")
    settings = "home = /usr/bin\ninclude-system-site-packages = false\n"
    (tree / PLACE / "pyvenv.cfg").write_text(settings)
    commands = tree / "usr" / "bin"
    commands.mkdir(parents=True)
    for name, entry in PROGRAMS.items():
        path = programs / name
        code = f"import sys; sys.argv[0] = '{name}'; from {entry}; sys.exit(main())"
        path.write_text(f'#!/bin/sh\nhere=$(dirname "$(readlink -f "$0")")\nexec "$here/python3" -P -c "{code}" "$@"\n')
        path.chmod(0o755)
        (commands / name).symlink_to(f"/{PLACE}/bin/{name}")


def copy_packaging(tree: Path) -> None:
    """Units, settings and documents."""
    for unit in sorted((PACKAGING / "systemd").iterdir()):
        install(unit, tree / "lib" / "systemd" / "system" / unit.name)
    install(PACKAGING / "agent.env", tree / "etc" / "kiridashi" / "agent.env")
    documents = tree / "usr" / "share" / "doc" / NAME
    install(ROOT / "docs" / "how-to" / "service.md", documents / "README.md")
    install(ROOT / "LICENSE", documents / "copyright")


def write_control(tree: Path, arch: str, version: str) -> None:
    """``DEBIAN/``: what dpkg reads."""
    place = tree / "DEBIAN"
    for script in sorted((PACKAGING / "debian").iterdir()):
        install(script, place / script.name, 0o755)
    files = sorted(
        path for path in tree.rglob("*") if path.is_file() and not path.is_symlink() and place not in path.parents
    )
    kib = sum(-(-path.stat().st_size // 1024) for path in files)
    (place / "control").write_text(CONTROL.format(name=NAME, version=version, arch=arch, kib=kib, python=PYTHON))
    (place / "conffiles").write_text("/etc/kiridashi/agent.env\n")
    sums = [f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.relative_to(tree)}\n" for path in files]
    (place / "md5sums").write_text("".join(sums))


def install(source: Path, target: Path, mode: int = 0o644) -> None:
    """Copy one file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(mode)


def settle(tree: Path, epoch: int) -> None:
    """The same modes and times, whoever builds, and when."""
    for path in [tree, *tree.rglob("*")]:
        if not path.is_symlink():
            runs = path.is_dir() or (os.access(path, os.X_OK) and path.parent.name in ("bin", "DEBIAN"))
            path.chmod(0o755 if runs and path.stat().st_mode & 0o100 else 0o644)
        os.utime(path, (epoch, epoch), follow_symlinks=False)


if __name__ == "__main__":
    sys.exit(main())
