"""A line process for the benchmark of memory: open a line's model, predict, and print what this process holds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from kiridashi import LineModel

_PREDICTIONS = 50


def main(state: str, line: str) -> int:
    """Print ``{"rss", "peak", "runtime", "provider"}``; bytes."""
    with LineModel.open(line, state) as model:
        info = model.info()
        frame = np.random.default_rng(0).integers(0, 256, (info.height, info.width, 3), dtype=np.uint8)
        for _ in range(_PREDICTIONS):
            model.predict(frame)
        rows = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines() if ":" in row)
        rss, peak = (int(rows[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    sys.stdout.write(json.dumps({"rss": rss, "peak": peak, "runtime": info.runtime, "provider": info.provider}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
