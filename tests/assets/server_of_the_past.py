"""A plant server whose clock stands in the past: ``server_of_the_past.py STATE DAYS BUNDLE LINE``.

It publishes the bundle and serves until SIGTERM, as ``kiridashi serve --with-broker`` does, but everything that it
signs was signed ``DAYS`` days ago.
"""

from __future__ import annotations

import signal
import sys
from datetime import timedelta
from pathlib import Path

from kiridashi_server.fleet.server import PlantServer, utc_now


def main(state: Path, days: float, bundle: Path, line: str) -> None:
    server = PlantServer.open(state, now=lambda: utc_now() - timedelta(days=days))
    with server.start_broker():
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        release = server.publish(bundle, line)
        server.set_desired(line, version=release.version)
        with server.serving():
            print("serving the past; stop with Ctrl-C", flush=True)
            signal.sigwait([signal.SIGTERM])
    server.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
