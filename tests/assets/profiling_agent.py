"""``kiridashi-agent run`` with played measuring: ``profiling_agent.py SECONDS_PER_GRAPH STATE [--once]``."""

from __future__ import annotations

import sys

from fake_profile import FakeMeasuring
from kiridashi.command import main
from kiridashi_agent.cli import run

if __name__ == "__main__":
    run.measure_probes = FakeMeasuring(pause_s=float(sys.argv[1]))
    sys.exit(main("kiridashi-agent", "", run.COMMANDS, ["run", "--state", *sys.argv[2:], "--json"]))
