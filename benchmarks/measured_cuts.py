"""Have the device measure many cuts of one backbone, interleaved."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TypeVar

from kiridashi.artifacts import describe_file, write_atomic
from kiridashi.manifest import RuntimeName
from kiridashi.probes import PROBE_SET_NAME, ProbeGraph, ProbeSet
from kiridashi_server.backbone import Backbone
from kiridashi_server.budget.device import measure_probe_set
from kiridashi_server.budget.probes import KINDS, export_bare, file_name, first_units
from kiridashi_server.budget.profile import ProfilePoint, points_of

Key = TypeVar("Key", bound=Hashable)


def measure_cuts(
    backbone: Backbone,
    cuts: Mapping[Key, Mapping[str, int]],
    folder: Path,
    *,
    name: str,
    runtime: RuntimeName,
    seconds: float,
) -> dict[Key, ProfilePoint]:
    """Export and measure cuts by their widths; those of equal widths are one file. All are measured anew.

    Args:
        backbone: what is cut; which units stay makes no difference to time and memory.
        cuts: kept units by group, for each key.
        folder: keeps exported files.
        name: of the probe set.
        runtime: that runs them.
        seconds: of measuring.
    """
    folder.mkdir(parents=True, exist_ok=True)
    graphs: dict[str, ProbeGraph] = {}
    files: dict[Key, str] = {}
    for key, widths in cuts.items():
        path = folder / file_name(backbone, "cut", widths, runtime)
        if not path.is_file():
            export_bare(backbone, first_units(backbone.layout, widths), path, runtime)
        graphs[path.name] = ProbeGraph(describe_file(path, KINDS[runtime]), "cut", dict(widths))
        files[key] = path.name
    _, height, width = backbone.input_size
    probes = ProbeSet(
        name=name,
        backbone=backbone.name,
        backbone_fingerprint=backbone.fingerprint,
        layout_digest=backbone.layout.digest,
        height=height,
        width=width,
        runtime=runtime,
        graphs=tuple(graphs.values()),
    )
    write_atomic(folder / PROBE_SET_NAME, probes.encode())
    (folder / "record").unlink(missing_ok=True)
    points = dict(zip(graphs, points_of(probes, measure_probe_set(folder, seconds=seconds)), strict=True))
    return {key: points[file] for key, file in files.items()}
