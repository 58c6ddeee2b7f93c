"""From what the registry holds to what one device is told to run. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kiridashi.messages import Desired, LineDesired, ProbesDesired

from kiridashi_server.fleet.records import Release


def desired_for(
    lines: Mapping[str, int | None],
    releases: Iterable[Release],
    generation: int,
    probes: ProbesDesired | None = None,
) -> Desired:
    """The desired state of a device.

    Args:
        lines: the device's lines, each with the version wanted there; ``None`` means nothing is wanted yet.
        releases: what is published; releases of other lines or versions are ignored.
        generation: the number of this desired state.
        probes: the profile that is asked for.

    Returns:
        One entry for each line whose wanted version is published. A wanted version that is not published is
        left out: the device then keeps what it runs.
    """
    targets = {(release.line, release.version): release.target for release in releases}
    wanted = ((line, version) for line, version in sorted(lines.items()) if version is not None)
    return Desired(
        generation=generation,
        lines={
            line: LineDesired(target=targets[line, version]) for line, version in wanted if (line, version) in targets
        },
        probes=probes,
    )
