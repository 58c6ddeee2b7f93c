"""A complete bundle small enough to build in a test: a conv, a mean, a linear head, four classes of coloured tiles.

``make_bundle`` writes onnx-fp32 (logits and features), onnx-int8 (weights only), tflite-fp32, a train step for the
head and the conv's bias, its state, the probe and the manifest. The server's tiles and the device's differ in colour
and light, so the shipped head errs on the device and local tuning has something to win.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import flatbuffers
import msgspec
import numpy as np
import onnx
from ai_edge_litert import schema_py_generated as tflite
from kiridashi.artifacts import MANIFEST_NAME, describe_file
from kiridashi.budget import Budget
from kiridashi.manifest import Artifact, Code, Manifest, Parity, Patch, Preprocessing, TrainSpec
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

LABELS = ("dent", "ok", "scratch", "stain")
SIDE, WIDTH, CLASSES, BATCH = 16, 12, len(LABELS), 8
PREPROCESSING = Preprocessing(height=SIDE, width=SIDE, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
BIAS, HEAD_WEIGHT, HEAD_BIAS = "features.conv.bias", "head.weight", "head.bias"
PARAMETERS = (BIAS, HEAD_WEIGHT, HEAD_BIAS)
_COLOURS = np.array([[210, 60, 60], [60, 190, 80], [70, 80, 220], [200, 190, 60]], np.float32)
Float = NDArray[np.float32]


@dataclass(frozen=True)
class Weights:
    """The network's parameters: kernel [WIDTH, 3, 3, 3], bias [WIDTH], head [CLASSES, WIDTH] and its bias."""

    kernel: Float
    bias: Float
    head: Float
    head_bias: Float

    @property
    def tunable(self) -> dict[str, Float]:
        return {BIAS: self.bias, HEAD_WEIGHT: self.head, HEAD_BIAS: self.head_bias}


def server_tiles(per_class: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Tiles as the server sees them: uint8 [N, SIDE, SIDE, 3] and labels [N]."""
    return _tiles(per_class, np.random.default_rng([seed, 1]), _COLOURS)


def device_tiles(per_class: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The same classes under the device's own lamp: duller, darker and tinted, so two classes look swapped."""
    return _tiles(per_class, np.random.default_rng([seed, 2]), _COLOURS[[1, 0, 2, 3]] * 0.7 + 20)


def write_device_samples(folder: Path, per_class: int = 8, seed: int = 5, *, named: bool = False) -> None:
    """One local sample file, as a line process leaves it on the device, without hold-out flags."""
    images, labels = device_tiles(per_class, seed)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "commissioning.npz", images=images, labels=np.array(LABELS)[labels] if named else labels)


def make_bundle(
    folder: Path,
    line: str = "press-3",
    version: int = 1,
    budget: Budget | None = None,
    iterations: int = 12,
    seed: int = 0,
    *,
    coded: bool = False,
) -> Manifest:
    """Write the whole bundle into ``folder`` and return its manifest. Same arguments, same bytes.

    With ``coded`` the manifest says how the int8 file holds its parameters, so that it can be tuned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = _fit(seed)
    images, _ = server_tiles(3, seed + 100)
    x = normalise(images)
    logits = dict.fromkeys(("model.onnx", "model.tflite"), forward(weights, x)[0])
    logits["model.int8.onnx"] = forward(_rounded(weights), x)[0]
    int8 = _write(folder, "model.int8.onnx", _inference_onnx(weights, quantised=True), "onnx-int8")
    artifacts = [
        _write(folder, "model.onnx", _inference_onnx(weights), "onnx-fp32", weights),
        _with_codes(int8, weights, folder) if coded else int8,
        _write(folder, "model.tflite", _inference_tflite(weights), "tflite-fp32", weights),
        _write(folder, "train_step.onnx", _train_step(weights), "train-step"),
    ]
    np.savez(folder / "train_state.npz", **weights.tunable)
    probe = {f"logits.{name}": value for name, value in logits.items()}
    np.savez(folder / "probe.npz", images=images, **probe)
    artifacts += [
        describe_file(folder / "train_state.npz", "train-state"),
        describe_file(folder / "probe.npz", "probe"),
    ]
    manifest = Manifest(
        line=line,
        version=version,
        task="tiles",
        labels=LABELS,
        backbone="tiny",
        backbone_fingerprint="sha256:" + "0" * 64,
        layout_digest="sha256:" + "1" * 64,
        plan_digest="sha256:" + "2" * 64,
        parameters_dense=2 * WIDTH * 27,
        parameters_kept=WIDTH * 27,
        preprocessing=PREPROCESSING,
        budget=budget or Budget(),
        artifacts=tuple(artifacts),
        train=TrainSpec(
            graph="train_step.onnx",
            state="train_state.npz",
            parameters=PARAMETERS,
            batch=BATCH,
            iterations=iterations,
            learning_rate=0.05,
            head_weight=HEAD_WEIGHT,
            head_bias=HEAD_BIAS,
            head_ridge=0.01,
        ),
    )
    (folder / MANIFEST_NAME).write_bytes(manifest.encode())
    return manifest


def normalise(images: NDArray[np.uint8]) -> Float:
    """float32 [N, 3, SIDE, SIDE], written out plainly so that it can check the SDK's faster form."""
    scaled = (images.astype(np.float32) / 255 - np.float32(0.5)) / np.float32(0.25)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def forward(weights: Weights, x: Float) -> tuple[Float, Float]:
    """Logits [N, CLASSES] and features [N, WIDTH] in numpy: the reference for both files."""
    padded = np.pad(x, ((0, 0), (0, 0), (0, 1), (0, 1)))
    taps = [
        np.einsum("nchw,oc->nohw", padded[:, :, i : i + SIDE : 2, j : j + SIDE : 2], weights.kernel[:, :, i, j])
        for i in range(3)
        for j in range(3)
    ]
    hidden = np.maximum(sum(taps) + weights.bias[:, None, None], 0)
    features = hidden.mean((2, 3)).astype(np.float32)
    return features @ weights.head.T + weights.head_bias, features


def _tiles(per_class: int, rng: np.random.Generator, colours: Float) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    labels = np.tile(np.arange(CLASSES, dtype=np.int64), per_class)
    light = rng.uniform(0.8, 1.2, (len(labels), 1, 1, 1))
    noise = rng.normal(0, 25, (len(labels), SIDE, SIDE, 3))
    return np.clip(colours[labels][:, None, None] * light + noise, 0, 255).astype(np.uint8), labels


def _fit(seed: int) -> Weights:
    rng = np.random.default_rng(seed)
    kernel = (rng.normal(0, 1, (WIDTH, 3, 3, 3)) / np.sqrt(27)).astype(np.float32)
    bias = rng.normal(0, 0.1, WIDTH).astype(np.float32)
    blank = Weights(kernel, bias, np.zeros((CLASSES, WIDTH), np.float32), np.zeros(CLASSES, np.float32))
    images, labels = server_tiles(20, seed)
    features = forward(blank, normalise(images))[1].astype(np.float64)
    design = np.hstack([features, np.ones((len(features), 1))])
    ridge = design.T @ design + 1e-2 * np.eye(WIDTH + 1)
    solution = 6 * np.linalg.solve(ridge, design.T @ np.eye(CLASSES)[labels])
    return Weights(kernel, bias, solution[:-1].T.astype(np.float32).copy(), solution[-1].astype(np.float32))


def _quantise(value: Float) -> tuple[NDArray[np.int8], np.float32]:
    scale = np.float32(np.abs(value).max() / 127)
    return np.round(value / scale).astype(np.int8), scale


def _rounded(weights: Weights) -> Weights:
    """The weights as the int8 file holds them."""
    kernel, head = (np.multiply(*_quantise(value), dtype=np.float32) for value in (weights.kernel, weights.head))
    return Weights(kernel, weights.bias, head, weights.head_bias)


def _write(folder: Path, name: str, data: bytes, kind: str, patched: Weights | None = None) -> Artifact:
    (folder / name).write_bytes(data)
    artifact = describe_file(folder / name, kind)  # type: ignore[arg-type]
    if kind == "train-step":
        return artifact
    return msgspec.structs.replace(
        artifact,
        input_layout="NHWC" if name.endswith("tflite") else "NCHW",
        parity=Parity(max_abs_diff=0.0, top1_agreement=1.0, tolerance=1e-4),
        patches=() if patched is None else _patches(data, patched),
    )


def _patches(data: bytes, weights: Weights) -> tuple[Patch, ...]:
    return tuple(Patch(name, _place(data, value), value.shape) for name, value in weights.tunable.items())


def _place(data: bytes, value: NDArray[np.generic]) -> int:
    if data.count(value.tobytes()) != 1:
        raise ValueError("values are not found exactly once in the file")
    return data.index(value.tobytes())


def _with_codes(artifact: Artifact, weights: Weights, folder: Path) -> Artifact:
    """The int8 file with the places of its head's integers and their scale, and of its float32 biases."""
    data = (folder / artifact.name).read_bytes()
    biases = {BIAS: weights.bias, HEAD_BIAS: weights.head_bias}
    integers, scale = _quantise(weights.head)
    places = {"offset": _place(data, integers), "scales": _place(data, np.asarray(scale))}
    return msgspec.structs.replace(
        artifact,
        patches=tuple(Patch(name, _place(data, value), value.shape) for name, value in biases.items()),
        codes=(Code(parameter=HEAD_WEIGHT, dtype="int8", shape=weights.head.shape, **places),),
    )


def _graph(
    name: str,
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    constants: dict[str, NDArray[np.generic]],
) -> bytes:
    initialisers = [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()]
    graph = helper.make_graph(list(nodes), name, list(inputs), list(outputs), initialisers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def _value(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape))


def _conv(x: str, out: str) -> onnx.NodeProto:
    return helper.make_node("Conv", [x, "kernel", BIAS], [out], strides=[2, 2], pads=[0, 0, 1, 1], kernel_shape=[3, 3])


def _inference_onnx(weights: Weights, *, quantised: bool = False) -> bytes:
    constants: dict[str, NDArray[np.generic]] = {BIAS: weights.bias, HEAD_BIAS: weights.head_bias}
    nodes = []
    for name, value in (("kernel", weights.kernel), (HEAD_WEIGHT, weights.head)):
        if not quantised:
            constants[name] = value
            continue
        integers, scale = _quantise(value)
        constants[f"{name}.int8"] = integers
        constants[f"{name}.scale"] = np.asarray(scale)
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}.int8", f"{name}.scale"], [name]))
    nodes += [
        _conv("input", "conv"),
        helper.make_node("Relu", ["conv"], ["hidden"]),
        helper.make_node("ReduceMean", ["hidden"], ["features"], axes=[2, 3], keepdims=0),
        helper.make_node("Gemm", ["features", HEAD_WEIGHT, HEAD_BIAS], ["logits"], transB=1),
    ]
    outputs = [_value("logits", "n", CLASSES), _value("features", "n", WIDTH)]
    return _graph("tiny", nodes, [_value("input", "n", 3, SIDE, SIDE)], outputs, constants)


def _train_step(weights: Weights) -> bytes:
    """Forward, softmax cross-entropy, gradients by hand, and SGD with momentum 0.9 for the three parameters."""
    area = (SIDE // 2) ** 2
    node = helper.make_node
    nodes = [
        _conv("x", "z"),
        node("Relu", ["z"], ["r"]),
        node("ReduceMean", ["r"], ["f"], axes=[2, 3], keepdims=0),
        node("Gemm", ["f", HEAD_WEIGHT, HEAD_BIAS], ["logits"], transB=1),
        node("LogSoftmax", ["logits"], ["logp"], axis=1),
        node("Mul", ["logp", "y"], ["picked"]),
        node("ReduceSum", ["picked"], ["total"], keepdims=0),
        node("Mul", ["total", "minus_over_batch"], ["loss"]),
        node("Exp", ["logp"], ["p"]),
        node("Sub", ["p", "y"], ["error"]),
        node("Mul", ["error", "over_batch"], ["g"]),
        node("Gemm", ["g", "f"], [f"d.{HEAD_WEIGHT}"], transA=1),
        node("ReduceSum", ["g", "axis0"], [f"d.{HEAD_BIAS}"], keepdims=0),
        node("MatMul", ["g", HEAD_WEIGHT], ["df"]),
        node("Mul", ["df", "over_area"], ["dr"]),
        node("Unsqueeze", ["dr", "axes23"], ["dr4"]),
        node("Sign", ["r"], ["open"]),
        node("Mul", ["open", "dr4"], ["dz"]),
        node("ReduceSum", ["dz", "axes023"], [f"d.{BIAS}"], keepdims=0),
    ]
    inputs = [_value("x", BATCH, 3, SIDE, SIDE), _value("y", BATCH, CLASSES), _value("lr")]
    outputs = [_value("loss")]
    for name, value in weights.tunable.items():
        moment = f"momentum.{name}"
        inputs += [_value(name, *value.shape), _value(moment, *value.shape)]
        outputs += [_value(f"new.{name}", *value.shape), _value(f"new.{moment}", *value.shape)]
        nodes += [
            node("Mul", [moment, "decay"], [f"kept.{name}"]),
            node("Add", [f"kept.{name}", f"d.{name}"], [f"new.{moment}"]),
            node("Mul", [f"new.{moment}", "lr"], [f"step.{name}"]),
            node("Sub", [name, f"step.{name}"], [f"new.{name}"]),
        ]
    constants: dict[str, NDArray[np.generic]] = {
        "kernel": weights.kernel,
        "minus_over_batch": np.asarray(-1 / BATCH, np.float32),
        "over_batch": np.asarray(1 / BATCH, np.float32),
        "over_area": np.asarray(1 / area, np.float32),
        "decay": np.asarray(0.9, np.float32),
        "axis0": np.array([0], np.int64),
        "axes23": np.array([2, 3], np.int64),
        "axes023": np.array([0, 2, 3], np.int64),
    }
    return _graph("tiny-train-step", nodes, inputs, outputs, constants)


class _Tflite:
    """Collects tensors and operators of one TFLite subgraph."""

    def __init__(self) -> None:
        self.buffers = [tflite.BufferT()]
        self.tensors: list[tflite.TensorT] = []
        self.operators: list[tflite.OperatorT] = []
        self.codes: list[tflite.OperatorCodeT] = []

    def tensor(self, name: str, shape: Sequence[int], value: NDArray[np.generic] | None = None) -> int:
        tensor = tflite.TensorT()
        tensor.name, tensor.shape = name.encode(), list(shape)
        integer = value is not None and value.dtype == np.int32
        tensor.type = tflite.TensorType.INT32 if integer else tflite.TensorType.FLOAT32
        if value is not None:
            buffer = tflite.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(value).tobytes(), np.uint8)
            tensor.buffer = len(self.buffers)
            self.buffers.append(buffer)
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def operator(self, kind: str, inputs: list[int], output: int, options_type: str, options: object) -> None:
        code = tflite.OperatorCodeT()
        code.builtinCode = getattr(tflite.BuiltinOperator, kind)
        code.deprecatedBuiltinCode = min(code.builtinCode, 127)
        code.version = 1
        operator = tflite.OperatorT()
        operator.opcodeIndex, operator.inputs, operator.outputs = len(self.codes), inputs, [output]
        operator.builtinOptionsType = getattr(tflite.BuiltinOptions, options_type)
        operator.builtinOptions = options
        self.codes.append(code)
        self.operators.append(operator)


def _inference_tflite(weights: Weights) -> bytes:
    net = _Tflite()
    half = SIDE // 2
    frame = net.tensor("input", (1, SIDE, SIDE, 3))
    kernel = net.tensor("kernel", (WIDTH, 3, 3, 3), weights.kernel.transpose(0, 2, 3, 1))
    bias = net.tensor(BIAS, (WIDTH,), weights.bias)
    hidden = net.tensor("hidden", (1, half, half, WIDTH))
    axes = net.tensor("axes", (2,), np.array([1, 2], np.int32))
    features = net.tensor("features", (1, WIDTH))
    head = net.tensor(HEAD_WEIGHT, (CLASSES, WIDTH), weights.head)
    head_bias = net.tensor(HEAD_BIAS, (CLASSES,), weights.head_bias)
    logits = net.tensor("logits", (1, CLASSES))
    conv = tflite.Conv2DOptionsT()
    conv.padding, conv.strideH, conv.strideW = tflite.Padding.SAME, 2, 2
    conv.fusedActivationFunction = tflite.ActivationFunctionType.RELU
    net.operator("CONV_2D", [frame, kernel, bias], hidden, "Conv2DOptions", conv)
    net.operator("MEAN", [hidden, axes], features, "ReducerOptions", tflite.ReducerOptionsT())
    fully = tflite.FullyConnectedOptionsT()
    net.operator("FULLY_CONNECTED", [features, head, head_bias], logits, "FullyConnectedOptions", fully)
    graph = tflite.SubGraphT()
    graph.tensors, graph.operators, graph.inputs, graph.outputs = net.tensors, net.operators, [frame], [logits]
    model = tflite.ModelT()
    model.version, model.operatorCodes, model.subgraphs, model.buffers = 3, net.codes, [graph], net.buffers
    builder = flatbuffers.Builder(4096)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


if __name__ == "__main__":
    import sys

    made = make_bundle(Path(sys.argv[1]))
    print(json.dumps({artifact.name: artifact.bytes for artifact in made.artifacts}))
