"""Probe sets: cuts of a backbone, as the files that a device would run, for it to measure.

The cuts are random, so that what is fitted to them holds for any cut that may be asked for: sizes are spread evenly
from the dense model down, and within a cut some groups are narrowed much more than others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from kiridashi import __version__
from kiridashi.artifacts import check_file, describe_file, write_atomic
from kiridashi.errors import BundleError, InputError
from kiridashi.manifest import ArtifactKind, RuntimeName
from kiridashi.probes import PROBE_SET_NAME, ProbeGraph, ProbeRole, ProbeSet, decode_probe_set
from kiridashi.runtime import RUNTIMES

from kiridashi_server.backbone import Backbone
from kiridashi_server.classifier import Classifier
from kiridashi_server.export.onnx import export_onnx
from kiridashi_server.export.tflite import export_tflite
from kiridashi_server.graph.cut import cut
from kiridashi_server.graph.fold import fold_batch_norm
from kiridashi_server.graph.layout import Group, Layout
from kiridashi_server.graph.plan import Plan
from kiridashi_server.progress import Progress, no_progress

KINDS: dict[RuntimeName, ArtifactKind] = {"onnxruntime": "onnx-fp32", "litert": "tflite-fp32"}
_CLASSES = 12
_MULTIPLES = (8, 16)
_SPREADS = (0.3, 0.7)
_SMALLEST_SHARE = 0.12


@dataclass(frozen=True)
class ProbeSettings:
    """How a probe set is made.

    Attributes:
        runtime: which is to run the files.
        cuts: whole cuts, the dense model included; at least 3.
        cliffs: numbers of channels to try as multiples: one cut with odd multiples of each.
        seed: of the random widths.
    """

    runtime: RuntimeName = "onnxruntime"
    cuts: int = 32
    cliffs: tuple[int, ...] = (2, 4, 8)
    seed: int = 0


def make_probe_set(
    backbone: Backbone,
    folder: Path,
    settings: ProbeSettings = ProbeSettings(),
    *,
    progress: Progress = no_progress,
) -> ProbeSet:
    """Export the cuts of a probe set to ``folder``, with its ``probes.json``.

    Cuts that are there already are kept, so an interrupted call goes on.

    Raises:
        InputError: fewer than three cuts.
        ExportError, MissingExtraError: a cut cannot be exported for that runtime.
    """
    if settings.cuts < 3:
        raise InputError(f"a probe set needs at least 3 cuts, got {settings.cuts}")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = list(_wanted(backbone.layout, settings))
    graphs = []
    for number, (name, role, multiple, widths) in enumerate(wanted):
        file = folder / file_name(backbone, name, widths, settings.runtime)
        if not file.is_file():
            export_bare(backbone, first_units(backbone.layout, widths), file, settings.runtime)
        graphs.append(ProbeGraph(describe_file(file, KINDS[settings.runtime]), role, dict(widths), multiple))
        progress(number + 1, len(wanted))
    _, height, width = backbone.input_size
    probes = ProbeSet(
        name=f"{backbone.name}-{height}-{settings.runtime}",
        backbone=backbone.name,
        backbone_fingerprint=backbone.fingerprint,
        layout_digest=backbone.layout.digest,
        height=height,
        width=width,
        runtime=settings.runtime,
        graphs=tuple(graphs),
    )
    write_atomic(folder / PROBE_SET_NAME, probes.encode())
    return probes


def read_probe_set(folder: Path) -> ProbeSet:
    """Read a probe set's folder and check every file.

    Raises:
        BundleError: it is none, or a file is missing or changed.
    """
    path = folder / PROBE_SET_NAME
    if not path.is_file():
        raise BundleError(
            f"{folder} is not a probe set", why=f"it has no {PROBE_SET_NAME}", next_step="kiridashi profile make"
        )
    probes = decode_probe_set(path.read_bytes(), str(path))
    for graph in probes.graphs:
        check_file(folder / graph.artifact.name, graph.artifact)
    return probes


def export_bare(backbone: Backbone, plan: Plan, path: Path, runtime: RuntimeName) -> Path:
    """A cut without recovery and with an empty head, as the fp32 file that a device would get; returns ``path``."""
    small = fold_batch_norm(cut(backbone.program, backbone.tracking, plan))
    with torch.no_grad():
        features = int(small(torch.zeros(1, *backbone.input_size)).shape[1])
    model = Classifier.with_zero_head(small, features, classes=_CLASSES).eval()
    export = export_onnx if runtime == "onnxruntime" else export_tflite
    export(model, torch.zeros(1, *backbone.input_size), path)
    return path


def first_units(layout: Layout, widths: Mapping[str, int]) -> Plan:
    """The plan that keeps the first units of every group: which ones stay does not matter for what a cut needs."""
    return Plan.of(layout, {name: range(width) for name, width in widths.items()})


def random_widths(
    layout: Layout, share: float, spread: float, multiple: int, rng: np.random.Generator
) -> dict[str, int]:
    """Widths around ``share`` of each group, log-normally spread, at multiples of ``multiple`` where there is room."""
    shares = share * np.exp(rng.normal(0.0, spread, len(layout.groups)))
    return {
        group.name: _near(group, float(one), multiple, odd=False)
        for group, one in zip(layout.groups, shares, strict=True)
    }


def _wanted(layout: Layout, settings: ProbeSettings) -> Iterator[tuple[str, ProbeRole, int, Mapping[str, int]]]:
    yield "dense", "cut", 0, layout.sizes
    rng = np.random.default_rng(settings.seed)
    shares = rng.permutation(np.linspace(_SMALLEST_SHARE, 1.0, settings.cuts))[: settings.cuts - 1]
    for number, share in enumerate(shares):
        multiple, spread = _MULTIPLES[number % 2], _SPREADS[number // 2 % 2]
        yield f"cut-{number:02d}", "cut", 0, random_widths(layout, float(share), spread, multiple, rng)
    for multiple in settings.cliffs:
        widths = {group.name: _near(group, 0.5, multiple, odd=True) for group in layout.groups}
        yield f"multiple-{multiple}", "multiple", multiple, widths


def file_name(backbone: Backbone, name: str, widths: Mapping[str, int], runtime: RuntimeName) -> str:
    """A name that tells cuts apart, so that a file that is there can be trusted to be the one that is wanted."""
    content = json.dumps([backbone.fingerprint, backbone.input_size, runtime, __version__, sorted(widths.items())])
    return f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:12]}{RUNTIMES[runtime].suffix}"


def _near(group: Group, share: float, multiple: int, *, odd: bool) -> int:
    """The multiple (or odd multiple) nearest to a share of the group; heads go one by one."""
    step = 1 if group.kind == "head" else multiple
    wanted = min(share, 1.0) * group.size / step
    if wanted >= group.size / step:
        return group.size
    if odd and step == multiple:
        return min(group.size, step * (2 * round((wanted - 1) / 2) + 1))
    return min(group.size, step * max(1, round(wanted)))
