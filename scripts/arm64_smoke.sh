#!/usr/bin/env bash
# The agent on arm64, under emulation: arm64_smoke.sh FOLDER
# Verifies a signed bundle, probes and measures it, does a train step, in both runtimes (tests/assets/arm64_smoke.py).
# FOLDER keeps the arm64 userland and the wheels, about 200 MB, so that a second run needs no network.
#
# Wants Debian 12's apt-get, qemu-user-static, and a Python with pip. onnxruntime is held at 1.27.0 and ai-edge-litert at
# 2.1.2: later ones (1.32.0, 2.3.0) crash under qemu 7.2. On real hardware the newest are installed.
set -euo pipefail
cd "$(dirname "$0")/.."
folder="$(mkdir -p "${1:?a folder}" && cd "$1" && pwd)"
root="$folder/root" wheels="$folder/wheels" site="$folder/site"
qemu="$(command -v qemu-aarch64-static || command -v qemu-aarch64)"
python="${PYTHON:-python3}"
unreachable=75 # the exit code when packages or wheels cannot be fetched
debs=(python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libc6 libexpat1 zlib1g libssl3 libffi8 libsqlite3-0
  libbz2-1.0 liblzma5 libgcc-s1 libstdc++6 libuuid1)
requirements=('numpy==2.4.*' 'msgspec>=0.19' 'onnxruntime==1.27.0' 'ai-edge-litert==2.1.2' flatbuffers protobuf
  'cryptography>=43' cffi pycparser 'paho-mqtt>=2.1' 'tuf>=6' 'securesystemslib>=1.2' urllib3 typing_extensions packaging
  backports.strenum tqdm)

if [ ! -x "$root/usr/bin/python3.11" ]; then
  mkdir -p "$folder/debs" "$root"
  # An apt of our own over the machine's sources: its list of architectures stays as it is.
  apt=(-o "Dir::State=$folder/apt" -o "Dir::Cache=$folder/apt" -o "Dir::State::status=$folder/apt/status"
    -o APT::Architecture=arm64 -o APT::Architectures::=arm64 -o Debug::NoLocking=1 -o APT::Sandbox::User=root)
  mkdir -p "$folder/apt/lists/partial" "$folder/apt/archives/partial"
  touch "$folder/apt/status"
  apt-get "${apt[@]}" update -qq || exit "$unreachable"
  (cd "$folder/debs" && apt-get "${apt[@]}" download -qq "${debs[@]}") || exit "$unreachable"
  for deb in "$folder"/debs/*.deb; do dpkg-deb -x "$deb" "$root"; done
fi
if [ ! -d "$site/numpy" ]; then
  "$python" -m pip download -q --disable-pip-version-check --no-deps -d "$wheels" --python-version 311 \
    --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 --platform manylinux_2_27_aarch64 \
    --platform manylinux_2_34_aarch64 --only-binary=:all: "${requirements[@]}" || exit "$unreachable"
  mkdir -p "$site"
  for wheel in "$wheels"/*.whl; do "$python" -m zipfile -e "$wheel" "$site"; done
fi

# The agent starts its children by sys.executable: a wrapper that emulates.
wrapper="$folder/python3.11"
printf '#!/bin/sh\nexec "%s" -cpu cortex-a72 -L "%s" "%s/usr/bin/python3.11" "$@"\n' "$qemu" "$root" "$root" >"$wrapper"
chmod +x "$wrapper"
export PYTHONPATH="$PWD/sdk:$PWD/device_agent:$site" OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1
exec "$wrapper" tests/assets/arm64_smoke.py "$wrapper" "$folder/bundle"
