"""The bundle manifest: one signed document that says what a model version is made of.

The manifest is the TUF target; artifacts are content-addressed and listed in it chunk by chunk, so a
device can check every chunk as it arrives, whoever it came from. The encoding is canonical (sorted keys,
no white space): the same bundle always has the same bytes and so the same digest.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Literal

import msgspec

from kiridashi.budget import Budget
from kiridashi.errors import BundleError

FORMAT = "kiridashi-bundle/1"
CHUNK_BYTES = 256 * 1024
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
MAX_ARTIFACT_BYTES = 2 * 1024**3
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

ArtifactKind = Literal[
    "onnx-fp32",
    "onnx-int8",
    "tflite-fp32",
    "tflite-fp16",
    "tflite-int8",
    "train-step",
    "train-state",
    "probe",
    "drift-reference",
]
VariantName = Literal["biases", "last-blocks", "all"]
"""How much the iterations train: biases of the last blocks, all weights of the last blocks, or everything; with each
the head. The head alone is fitted in closed form and needs no graph."""
RuntimeName = Literal["onnxruntime", "litert"]
RUNTIME_OF_KIND: dict[str, RuntimeName] = {
    "onnx-fp32": "onnxruntime",
    "onnx-int8": "onnxruntime",
    "tflite-fp32": "litert",
    "tflite-fp16": "litert",
    "tflite-int8": "litert",
}


class Parity(msgspec.Struct, frozen=True):
    """How closely an artifact reproduces the cut torch model, as measured at export.

    ``max_abs_diff`` is over all logits of the calibration images, ``top1_agreement`` the share of images
    with the same best class, ``tolerance`` the bound on ``max_abs_diff`` that was accepted.
    """

    max_abs_diff: float
    top1_agreement: float
    tolerance: float


class Patch(msgspec.Struct, frozen=True):
    """Where a tunable parameter's float32 little-endian values lie in an artifact file.

    ``shape`` is the parameter's own shape; with ``transposed`` the file holds the two axes swapped, and with ``axes``
    these axes of the parameter in this order.
    """

    parameter: str
    offset: int
    shape: tuple[int, ...]
    transposed: bool = False
    axes: tuple[int, ...] = ()

    @property
    def order(self) -> tuple[int, ...]:
        """The parameter's axes in the order of the file."""
        return self.axes or ((1, 0) if self.transposed else tuple(range(len(self.shape))))


class Code(msgspec.Struct, frozen=True, omit_defaults=True):
    """How a smaller file holds a tunable parameter, so that a device can write it anew (:mod:`kiridashi.recode`).

    Attributes:
        parameter: its name.
        dtype: "float16"; "int8" with a float32 scale for each channel; "int32" for a bias, whose scales are its
            weight's times that of what the weight is applied to.
        offset: where its values lie, little-endian.
        shape: the parameter's own.
        axes: its axes in the order of the file; as they are if empty.
        scales: where its scales lie.
        channels: how many scales there are: one, or as many as ``shape`` has along ``axis``.
        axis: of the parameter, along which the scales go.
        limit: the largest magnitude of an int8 weight.
        weight: of a bias, the weight's name; empty if that has no place itself, so that the scales never change.
    """

    parameter: str
    dtype: Literal["float16", "int8", "int32"]
    offset: int
    shape: tuple[int, ...]
    axes: tuple[int, ...] = ()
    scales: int = 0
    channels: int = 1
    axis: int = 0
    limit: int = 127
    weight: str = ""

    @property
    def order(self) -> tuple[int, ...]:
        """The parameter's axes in the order of the file."""
        return self.axes or tuple(range(len(self.shape)))


class Artifact(msgspec.Struct, frozen=True):
    """One file of a bundle.

    ``chunks`` are the SHA-256 digests of its consecutive 256 KiB pieces. ``patches`` are the places of parameters that
    it holds as float32, ``codes`` those of others; a bundle from before there were codes has the field unset, so that
    its manifest keeps its digest.
    """

    name: str
    kind: ArtifactKind
    bytes: int
    sha256: str
    chunks: tuple[str, ...]
    input_layout: Literal["NCHW", "NHWC"] | None = None
    parity: Parity | None = None
    patches: tuple[Patch, ...] = ()
    codes: tuple[Code, ...] | msgspec.UnsetType = msgspec.UNSET

    @property
    def coded(self) -> tuple[Code, ...]:
        """``codes``, empty where they are unset."""
        return () if isinstance(self.codes, msgspec.UnsetType) else self.codes

    @property
    def tunable(self) -> frozenset[str]:
        """The parameters that a device can write into this file."""
        return frozenset({place.parameter for place in self.patches} | {code.parameter for code in self.coded})

    @property
    def runtime(self) -> RuntimeName | None:
        """The runtime that runs this file, ``None`` for files that are not inference models."""
        return RUNTIME_OF_KIND.get(self.kind)


class Preprocessing(msgspec.Struct, frozen=True):
    """From a camera frame to the model's input: RGB, resized, ``(pixel / 255 - mean) / std``."""

    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class TrainVariant(msgspec.Struct, frozen=True):
    """One size of the train step: its graph, what it trains, and an estimate of what it costs.

    ``peak_bytes`` is what the runtime needs at most for weights, momenta, activations and the graph, beside the process
    itself. ``macs`` are multiply-accumulates of an iteration, ``moved_bytes`` what its other operators read and write.
    """

    name: VariantName
    graph: str
    parameters: tuple[str, ...]
    learning_rate: float
    peak_bytes: int
    macs: int
    moved_bytes: int


class TrainSpec(msgspec.Struct, frozen=True):
    """How the device tunes: closed-form head first, then iterations of the train-step graph.

    The graph's inputs are ``x`` [batch, 3, H, W] float32 (preprocessed), ``y`` [batch, classes] float32 (one-hot times
    the sample's weight), ``lr`` [] float32, then every name of ``parameters`` and ``momentum.<name>`` for each. Its
    outputs are ``loss`` [], ``gradient_norm`` [] (before clipping), ``new.<name>`` and ``new.momentum.<name>``.
    ``state`` is an npz with the initial parameters. The ONNX inference artifact has a second output ``features`` [N, D]
    for the closed-form head.

    ``variants`` are several sizes of the train step, smallest first; the device takes the largest that it can afford.
    ``graph`` and ``parameters`` are the smallest one. What ``state`` does not hold is read from the ONNX float32 file,
    which the graphs also read their frozen weights from: it has to lie beside them.
    """

    graph: str
    state: str
    parameters: tuple[str, ...]
    batch: int
    iterations: int
    learning_rate: float
    head_weight: str
    head_bias: str
    head_ridge: float
    variants: tuple[TrainVariant, ...] = ()


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What one model version is: identity, inputs, limits, and its files."""

    format: str = FORMAT
    line: str
    version: int
    task: str
    labels: tuple[str, ...]
    backbone: str
    backbone_fingerprint: str
    layout_digest: str
    plan_digest: str
    parameters_dense: int
    parameters_kept: int
    preprocessing: Preprocessing
    budget: Budget
    artifacts: tuple[Artifact, ...]
    train: TrainSpec | None = None
    explanation: str = ""

    def encode(self) -> bytes:
        """The canonical bytes; their SHA-256 is the model digest."""
        return msgspec.json.encode(self, order="sorted")

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical bytes, as ``sha256:<hex>``."""
        return "sha256:" + hashlib.sha256(self.encode()).hexdigest()

    def artifact(self, name: str) -> Artifact:
        """The artifact with this file name.

        Raises:
            BundleError: there is none.
        """
        for artifact in self.artifacts:
            if artifact.name == name:
                return artifact
        raise BundleError(f"the bundle of line '{self.line}' version {self.version} has no artifact '{name}'")

    def of_kind(self, kind: ArtifactKind) -> Artifact | None:
        """The first artifact of a kind, or ``None``."""
        return next((artifact for artifact in self.artifacts if artifact.kind == kind), None)


def decode_manifest(data: bytes, source: str = "manifest") -> Manifest:
    """Read and check a manifest.

    Raises:
        BundleError: too large, not a manifest, another format version, an unsafe file name, a malformed
            digest, or a chunk list that does not add up.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{source} is larger than {MAX_MANIFEST_BYTES} bytes", why="no real manifest is that large")
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BundleError(f"{source} is not a bundle manifest", why=str(error)) from error
    if manifest.format != FORMAT:
        raise BundleError(
            f"{source} has the format '{manifest.format}', this program reads '{FORMAT}'",
            next_step="update the agent, or publish the bundle again with a matching version",
        )
    check_artifacts(manifest.artifacts, source)
    return manifest


def check_artifacts(artifacts: Sequence[Artifact], source: str) -> None:
    """Refuse a list of files that could not be stored or checked.

    Raises:
        BundleError: a name twice, an unsafe file name, a malformed digest, or a chunk list that does not add up.
    """
    names = [artifact.name for artifact in artifacts]
    if len(set(names)) != len(names):
        raise BundleError(f"{source} lists one file name twice")
    for artifact in artifacts:
        _check_artifact(artifact, source)


def _check_artifact(artifact: Artifact, source: str) -> None:
    pieces = -(-artifact.bytes // CHUNK_BYTES)
    digests = (artifact.sha256, *artifact.chunks)
    if not _SAFE_NAME.fullmatch(artifact.name):
        raise BundleError(f"{source} names the file '{artifact.name}'", why="that is not a plain file name")
    if not 0 < artifact.bytes <= MAX_ARTIFACT_BYTES or len(artifact.chunks) != pieces:
        raise BundleError(f"{source}: the size and the chunks of '{artifact.name}' do not match")
    if not all(_SHA256.fullmatch(digest) for digest in digests):
        raise BundleError(f"{source}: a digest of '{artifact.name}' is malformed")
    places: tuple[Patch | Code, ...] = (*artifact.patches, *artifact.coded)
    for place in places:
        rank = len(place.shape)
        if place.offset < 0 or any(extent <= 0 for extent in place.shape) or sorted(place.order) != [*range(rank)]:
            raise BundleError(f"{source}: the place of '{place.parameter}' in '{artifact.name}' is malformed")
    known = {code.parameter: code for code in artifact.coded}
    for code in artifact.coded:
        fits = code.channels == 1 or (0 <= code.axis < len(code.shape) and code.channels == code.shape[code.axis])
        weight = known.get(code.weight)
        paired = code.weight == "" or (
            weight is not None and weight.dtype == "int8" and weight.channels == code.channels
        )
        if code.scales < 0 or not 1 <= code.limit <= 127 or not fits or not paired:
            raise BundleError(f"{source}: how '{artifact.name}' holds '{code.parameter}' is malformed")
