"""What a tuning would learn from and be judged by, in a child process: nothing is changed by looking."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from kiridashi.gathering import Gathered, Sources, gather
from kiridashi.kept import KeptSamples
from kiridashi.manifest import Manifest
from kiridashi.slots import LineSlots
from kiridashi.spool import SpoolFolder

from kiridashi_agent.gate import smallest_refused_loss
from kiridashi_agent.jobs import ClassSurvey, Survey, TuneRequest
from kiridashi_agent.probe import read_manifest

Request = TuneRequest


def run(request: TuneRequest) -> Survey:
    """Count the samples of a tuning of the bundle in ``request.slot``.

    Raises:
        InputError, StateError: samples cannot be read.
        BundleError: the slot has no bundle.
    """
    manifest = read_manifest(LineSlots(Path(request.state_dir), request.line).folder(request.slot))
    found = gathered(request, manifest)
    train, held = found.samples.part(holdout=False), found.samples.part(holdout=True)
    size = len(manifest.labels)
    learn, hold = np.bincount(train.labels, minlength=size), np.bincount(held.labels, minlength=size)
    return Survey(
        classes={
            label: ClassSurvey(
                int(learn[n]), int(hold[n]), smallest_refused_loss(int(hold[n]), request.max_recall_drop)
            )
            for n, label in enumerate(manifest.labels)
        },
        sources=found.counts(),
        shortage=found.shortage(manifest.labels),
    )


def gathered(request: TuneRequest, manifest: Manifest) -> Gathered:
    """The samples of a request. Raises as :func:`kiridashi.gathering.gather`."""
    state, size = Path(request.state_dir), manifest.preprocessing
    sources = Sources(
        folder=Path(request.samples) if request.samples else None,
        given=tuple(Path(place) for place in request.given),
        spool=SpoolFolder(state, request.line),
        kept=KeptSamples(state, request.line),
    )
    return gather(sources, manifest.labels, size.height, size.width)
