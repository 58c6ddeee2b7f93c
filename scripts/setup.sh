#!/usr/bin/env bash
# Make the virtual environment and install Kiridashi into it: setup.sh all|dev
# System packages are installed only where that is possible without a question (root, or sudo that asks nothing).
set -euo pipefail
cd "$(dirname "$0")/.."
extra="${1:-all}"
python="${PYTHON:-python3}"
venv="${VENV:-.venv}"

say() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }

as_root() {
  if [ "$(id -u)" = 0 ]; then "$@"
  elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then sudo -n "$@"
  else return 1
  fi
}

apt_install() {
  command -v apt-get >/dev/null || return 1
  say "installing system packages: $*"
  as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq || return 1
  # A broker installed for its program must not start as a system service on this machine.
  local policy=/usr/sbin/policy-rc.d ours=no result=0
  if [ ! -e "$policy" ]; then
    ours=yes
    printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
    as_root chmod +x "$policy"
  fi
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null || result=$?
  [ "$ours" = no ] || as_root rm -f "$policy"
  return "$result"
}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || apt_install python3 || true
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "Kiridashi needs Python 3.11 or newer; '$python' is not. Set PYTHON=/path/to/python3.11" >&2
  exit 2
}
"$python" -c 'import ensurepip, venv' 2>/dev/null || apt_install python3-venv || {
  echo "Python's venv module is missing: apt-get install python3-venv, then run this again" >&2
  exit 2
}
[ -x /usr/sbin/mosquitto ] || command -v mosquitto >/dev/null || apt_install mosquitto || {
  if [ "$extra" = dev ]; then
    echo "the tests need the mosquitto broker: apt-get install mosquitto, then run this again" >&2
    exit 2
  fi
  say "mosquitto could not be installed; the quickstart will use the broker from a wheel and say so"
}

has_chromium() { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null
[ "$extra" != dev ] || has_chromium || apt_install chromium fonts-ipafont-gothic || {
  echo "the tests of pages need a browser: apt-get install chromium, then run this again" >&2
  exit 2
}

[ "$extra" != dev ] || command -v qemu-aarch64-static >/dev/null || apt_install qemu-user-static \
  || say "qemu-user-static could not be installed; the test on arm64 will be skipped"
[ "$extra" != dev ] || command -v cc >/dev/null || command -v gcc >/dev/null || apt_install gcc libc6-dev \
  || say "a C compiler could not be installed; some tests of faults will be skipped"

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
index=()
[ -z "${TORCH_INDEX:-}" ] || index=(--extra-index-url "$TORCH_INDEX")
say "installing Python packages into $venv (a few minutes the first time)"
"$venv/bin/python" -m pip install -q --disable-pip-version-check "${index[@]}" 'torch>=2.9,<2.14'
"$venv/bin/python" -m pip install -q --disable-pip-version-check "${index[@]}" -e ".[$extra]"
say "ready"
