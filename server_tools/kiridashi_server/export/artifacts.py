"""One call from a cut model to all its inference artifacts, measured against the model they come from."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from kiridashi.artifacts import describe_file, write_atomic
from kiridashi.errors import InputError
from kiridashi.manifest import Artifact, ArtifactKind, Code, Preprocessing
from numpy.typing import NDArray
from torch import Tensor

from kiridashi_server.classifier import Classifier
from kiridashi_server.export.bundle import BundleFile, Probe
from kiridashi_server.export.calibration import Calibration, calibrate
from kiridashi_server.export.codes import float16_codes, mend_tflite, onnx_codes, tflite_codes, unlisted
from kiridashi_server.export.errors import ExportError
from kiridashi_server.export.onnx import export_onnx, require_onnx
from kiridashi_server.export.parity import check_batch, compare, objection, run_artifact
from kiridashi_server.export.patches import (
    Located,
    check_tunable,
    markers_for,
    place_parameters,
    with_parameters,
    write_parameters,
)
from kiridashi_server.export.quantise import quantise_onnx, quantise_tflite, tflite_float16
from kiridashi_server.export.tflite import (
    TIMEOUT_S,
    TfliteExport,
    require_tflite,
    start_tflite_export,
)

Float32 = NDArray[np.float32]

FILE_NAMES: dict[ArtifactKind, str] = {
    "onnx-fp32": "model.onnx",
    "onnx-int8": "model-int8.onnx",
    "tflite-fp32": "model.tflite",
    "tflite-fp16": "model-fp16.tflite",
    "tflite-int8": "model-int8.tflite",
}
ALL_KINDS: tuple[ArtifactKind, ...] = tuple(FILE_NAMES)


@dataclass(frozen=True)
class ExportSettings:
    """What is exported and what is good enough.

    Attributes:
        kinds: the wanted artifacts; float32 forms that others are made from are made in any case.
        min_top1_agreement: share of calibration images on which a smaller form must agree with the model.
        probe_images: how many calibration images, from the first, become the probe.
        tflite_timeout_s: seconds for one TFLite conversion.
    """

    kinds: tuple[ArtifactKind, ...] = ALL_KINDS
    min_top1_agreement: float = 0.9
    probe_images: int = 8
    tflite_timeout_s: float = TIMEOUT_S


@dataclass(frozen=True)
class ExportResult:
    """What was exported.

    Attributes:
        folder: where the files are.
        artifacts: their manifest entries, with parity and patches.
        dropped: wanted kinds that were not good enough, and why.
        unlocated: per kind, tunable parameters that a device cannot patch in that file, and why.
        recipes: how the int8 ONNX file was quantised, if there is one.
        seconds: wall time per kind, its parity check included; conversions run side by side.
        probe: inputs and outputs for the bundle.
        logits: the model's on the calibration images, float32 [n, classes].
    """

    folder: Path
    artifacts: tuple[Artifact, ...]
    dropped: Mapping[str, str]
    unlocated: Mapping[str, Mapping[str, str]]
    recipes: Mapping[str, str]
    seconds: Mapping[str, float]
    probe: Probe
    logits: Float32

    @property
    def files(self) -> tuple[BundleFile, ...]:
        """The artifacts as files of a bundle."""
        return tuple(BundleFile(self.folder / artifact.name, artifact) for artifact in self.artifacts)


def export_artifacts(
    model: Classifier,
    example: Tensor,
    images: NDArray[np.uint8],
    preprocessing: Preprocessing,
    tunable: Mapping[str, Float32],
    out_dir: Path,
    settings: ExportSettings | None = None,
) -> ExportResult:
    """Export a classifier, check every file with its runtime, and note where its tunable parameters lie.

    Args:
        model: in evaluation mode, batch normalisation folded, features captured with a dynamic batch.
        example: one input, float32 [1, 3, H, W].
        images: calibration images, uint8 [n, H, W, 3]: for int8 ranges, parity, and the probe.
        preprocessing: from images to the model's input.
        tunable: name in ``model.named_parameters()`` -> float32 values (the model's own).
        out_dir: gets one file per artifact, replacing files of the same names.
        settings: see ``ExportSettings``.

    Raises:
        InputError: images, settings or tunable parameters do not fit the model.
        MissingExtraError: a library for a wanted kind is missing; nothing was started.
        ExportError: a float32 form cannot be made or differs from the model. Smaller forms that are not good
            enough are listed in ``dropped`` instead.
    """
    settings = settings or ExportSettings()
    _check(model, settings, tunable)
    calibration = calibrate(model, images, preprocessing)
    out_dir.mkdir(parents=True, exist_ok=True)
    work_dir = out_dir.with_name(f".{out_dir.name}.work")
    shutil.rmtree(work_dir, ignore_errors=True)
    work_dir.mkdir()
    try:
        work = _Work(model, example, calibration, dict(tunable), work_dir, settings)
        work.run()
        return work.publish(out_dir)
    finally:
        shutil.rmtree(work_dir, ignore_errors=True)


def _check(model: Classifier, settings: ExportSettings, tunable: Mapping[str, Float32]) -> None:
    unknown = set(settings.kinds) - set(ALL_KINDS)
    if unknown or not settings.kinds or len(set(settings.kinds)) != len(settings.kinds):
        raise InputError(
            f"cannot export {list(settings.kinds)}", why=f"choose some of {', '.join(ALL_KINDS)}, each once"
        )
    if settings.probe_images < 1:
        raise InputError("a probe needs at least one image")
    check_tunable(model, tunable)
    if any(kind.startswith("onnx") for kind in settings.kinds):
        require_onnx()
    if any(kind.startswith("tflite") for kind in settings.kinds):
        require_tflite()


@dataclass
class _Work:
    """One export under way: what is given, and what has been found so far."""

    model: Classifier
    example: Tensor
    calibration: Calibration
    tunable: dict[str, Float32]
    folder: Path
    settings: ExportSettings
    artifacts: dict[ArtifactKind, Artifact] = field(default_factory=dict)
    logits: dict[str, Float32] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    unlocated: dict[str, Mapping[str, str]] = field(default_factory=dict)
    recipes: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self) -> None:
        """Make every wanted artifact; TFLite converts in its own process while ONNX is made here."""
        if not self._wants("tflite"):
            self._make_onnx()
            return
        with self._start_tflite(markers_for(self.tunable)) as conversion:
            if self._wants("onnx"):
                self._make_onnx()
            self._make_tflite(conversion)

    def publish(self, out_dir: Path) -> ExportResult:
        """Move the wanted files to their place and describe them."""
        wanted = [kind for kind in self.settings.kinds if kind in self.artifacts]
        for kind in wanted:
            name = FILE_NAMES[kind]
            write_atomic(out_dir / name, (self.folder / name).read_bytes())
        count = self.settings.probe_images
        return ExportResult(
            folder=out_dir,
            artifacts=tuple(self.artifacts[kind] for kind in wanted),
            dropped=self.dropped,
            unlocated={kind: self.unlocated[kind] for kind in wanted if self.unlocated.get(kind)},
            recipes=self.recipes,
            seconds=self.seconds,
            probe=Probe(
                self.calibration.images[:count],
                {FILE_NAMES[kind]: self.logits[kind][:count] for kind in wanted},
            ),
            logits=self.calibration.logits,
        )

    def _wants(self, family: str) -> bool:
        return any(kind.startswith(family) for kind in self.settings.kinds)

    def _make_onnx(self) -> None:
        path, marked = self._path("onnx-fp32"), self.folder / "marked.onnx"

        def export(markers: Mapping[str, Float32]) -> Path:
            export_onnx(with_parameters(self.model, markers), self.example, marked)
            return marked

        with self._timed("onnx-fp32"):
            self._accept("onnx-fp32", place_parameters(export, self.tunable, path))
            check_batch(path, self.calibration)
        self._try_smaller("onnx-int8", lambda: self._make_onnx_int8(path))

    def _make_onnx_int8(self, source: Path) -> None:
        recipe = quantise_onnx(source, self._path("onnx-int8"), self.calibration)
        codes = onnx_codes(self._path("onnx-int8"), self._parameters(), self.tunable)
        self._accept("onnx-int8", Located((), unlisted(codes, self.tunable)), codes)
        self.recipes["onnx-int8"] = recipe.name

    def _start_tflite(self, markers: Mapping[str, Float32]) -> TfliteExport:
        model, path = with_parameters(self.model, markers), self.folder / "marked.tflite"
        return start_tflite_export(model, self.example, path, timeout_s=self.settings.tflite_timeout_s)

    def _make_tflite(self, conversion: TfliteExport) -> None:
        path, started = self._path("tflite-fp32"), [conversion]

        def export(markers: Mapping[str, Float32]) -> Path:
            with started.pop() if started else self._start_tflite(markers) as running:
                return running.result()

        with self._timed("tflite-fp32", conversion.started):
            located = place_parameters(export, self.tunable, path)
            self._accept("tflite-fp32", located)
        self._try_smaller("tflite-fp16", lambda: self._make_float16(path, located))
        self._try_smaller("tflite-int8", lambda: self._make_tflite_int8(path))

    def _make_tflite_int8(self, source: Path) -> None:
        quantise_tflite(source, self._path("tflite-int8"), self.calibration)
        mend_tflite(self._path("tflite-int8"), self._parameters())
        codes = tflite_codes(self._path("tflite-int8"), self._parameters(), self.tunable)
        self._accept("tflite-int8", Located((), unlisted(codes, self.tunable)), codes)

    def _make_float16(self, source: Path, located: Located) -> None:
        """The float16 form of the float32 file, whose patches allow marking it without a new conversion."""
        tunable = {patch.parameter: self.tunable[patch.parameter] for patch in located.patches}

        def export(markers: Mapping[str, Float32]) -> Path:
            marked, cast = self.folder / "marked.tflite", self.folder / "marked-fp16.tflite"
            write_parameters(source, marked, located.patches, {**tunable, **markers})
            tflite_float16(marked, cast)
            return cast

        found = place_parameters(export, tunable, self._path("tflite-fp16"))
        markers, codes = markers_for({name: tunable[name] for name in found.unlocated}), tuple[Code, ...]()
        if markers:
            codes = float16_codes(self._path("tflite-fp16"), export(markers), markers, tunable)
        patched = [patch.parameter for patch in found.patches]
        self._accept("tflite-fp16", Located(found.patches, unlisted(codes, self.tunable, patched)), codes)

    def _parameters(self) -> dict[str, Float32]:
        return {name: value.detach().cpu().numpy() for name, value in self.model.named_parameters()}

    def _try_smaller(self, kind: ArtifactKind, make: Callable[[], None]) -> None:
        """Make a form that the bundle can do without: what is wrong with it is noted, and it is left out."""
        if kind in self.settings.kinds:
            with self._timed(kind):
                try:
                    make()
                except ExportError as error:
                    self.dropped[kind] = str(error)

    def _accept(self, kind: ArtifactKind, located: Located, codes: Sequence[Code] = ()) -> None:
        """Measure a file's parity and list it.

        Raises:
            ExportError: it does not compute what the model computes.
        """
        path = self._path(kind)
        logits = run_artifact(path, self.calibration.inputs)
        parity = compare(self.calibration, logits, kind)
        why = objection(parity, self.settings.min_top1_agreement)
        if why:
            raise ExportError(
                f"the {kind} artifact does not compute what the model computes",
                why=why,
                next_step="export other kinds, or compare the model's operators with those of the runtime",
            )
        self.logits[kind], self.unlocated[kind] = logits, located.unlocated
        self.artifacts[kind] = msgspec.structs.replace(
            describe_file(path, kind),
            input_layout="NCHW" if kind.startswith("onnx") else "NHWC",
            parity=parity,
            patches=located.patches,
            codes=tuple(codes) or msgspec.UNSET,
        )

    def _path(self, kind: ArtifactKind) -> Path:
        return self.folder / FILE_NAMES[kind]

    @contextmanager
    def _timed(self, kind: ArtifactKind, started: float | None = None) -> Iterator[None]:
        started = time.monotonic() if started is None else started
        yield
        self.seconds[kind] = time.monotonic() - started
