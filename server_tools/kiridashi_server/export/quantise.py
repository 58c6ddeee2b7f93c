"""Smaller forms of an exported file: static int8 for ONNX and TFLite, float16 weights for TFLite.

Input and output stay float32 everywhere, so a device feeds every form alike. Ranges come from calibration
images only. The same file and images give the same bytes.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from kiridashi.artifacts import write_atomic
from numpy.typing import NDArray

from kiridashi_server.export.calibration import Calibration
from kiridashi_server.export.errors import ExportError
from kiridashi_server.export.onnx import INPUT_NAME, canonical_bytes
from kiridashi_server.export.parity import compare, run_artifact
from kiridashi_server.export.quiet import quiet_libraries

Float32 = NDArray[np.float32]
_SIGNATURE, _INPUT = "serving_default", "args_0"
_OUTPUT_PATTERN = "^serving_default_output"


@dataclass(frozen=True)
class OnnxRecipe:
    """A choice of integer types for onnxruntime; weights are int8 per channel, activations per tensor.

    Attributes:
        name: how reports call it.
        unsigned_activations: uint8 instead of int8.
        reduce_range: weights in 7 bits, so that sums of two products cannot overflow 16 bits on processors
            without a dot-product instruction.
    """

    name: str
    unsigned_activations: bool
    reduce_range: bool


ONNX_RECIPES = (
    OnnxRecipe("u8s8-reduced", unsigned_activations=True, reduce_range=True),
    OnnxRecipe("s8s8", unsigned_activations=False, reduce_range=False),
)


def quantise_onnx(source: Path, target: Path, calibration: Calibration) -> OnnxRecipe:
    """Write the static int8 form (QDQ) of a float32 ONNX file, by the best of ``ONNX_RECIPES``.

    Best: highest agreement of the top class with the torch model on the calibration images, then the
    smallest difference of the logits.

    Raises:
        ExportError: onnxruntime cannot quantise the file with any recipe.
    """
    with tempfile.TemporaryDirectory(prefix="kiridashi-int8-") as folder:
        prepared = Path(folder, "prepared.onnx")
        candidates = []
        try:
            _prepare(source, prepared)
            for recipe in ONNX_RECIPES:
                path = Path(folder, f"{recipe.name}.onnx")
                _quantise(prepared, path, calibration.inputs, recipe)
                candidates.append((recipe, path))
        except Exception as error:  # the quantiser raises errors of many unrelated classes
            raise _failed("onnxruntime", source, error) from error
        recipe, path = min(candidates, key=lambda candidate: _cost(candidate[1], calibration))
        write_atomic(target, path.read_bytes())
    return recipe


def _cost(path: Path, calibration: Calibration) -> tuple[float, float]:
    logits = run_artifact(path, calibration.inputs)
    parity = compare(calibration, logits, "onnx-int8")
    return -parity.top1_agreement, float(np.square(logits - calibration.logits).mean())


def _prepare(source: Path, target: Path) -> None:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with quiet_libraries():
        quant_pre_process(str(source), str(target), skip_symbolic_shape=True)


def _quantise(source: Path, target: Path, inputs: Float32, recipe: OnnxRecipe) -> None:
    import onnx
    from onnxruntime import quantization

    class Images(quantization.CalibrationDataReader):  # type: ignore[misc]
        """Feeds one calibration image at a time."""

        def __init__(self) -> None:
            self._remaining = iter(inputs)

        def get_next(self) -> dict[str, Float32] | None:
            image = next(self._remaining, None)
            return None if image is None else {INPUT_NAME: image[None]}

    kinds = quantization.QuantType
    with quiet_libraries():
        quantization.quantize_static(
            str(source),
            str(target),
            Images(),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=kinds.QUInt8 if recipe.unsigned_activations else kinds.QInt8,
            weight_type=kinds.QInt8,
            per_channel=True,
            reduce_range=recipe.reduce_range,
        )
        written = onnx.load(target)
        for constant in written.graph.initializer:  # typed fields have no bytes that a device could replace
            constant.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(constant), constant.name))
        target.write_bytes(canonical_bytes(written))


def tflite_float16(source: Path, target: Path) -> None:
    """Write a float32 TFLite file with float16 weights; the layers at the output keep float32.

    The output layer is the head, which the device fits: it is small, and float32 is what a patch holds.

    Raises:
        ExportError: the quantiser refuses the file.
    """
    with quiet_libraries():  # importing it configures logging for the whole process
        from ai_edge_quantizer import qtyping, recipe_manager
        from ai_edge_quantizer.algorithm_manager import AlgorithmName

    operators = qtyping.TFLOperationName
    recipe = recipe_manager.RecipeManager()
    recipe.add_quantization_config(
        ".*",
        operators.ALL_SUPPORTED,
        qtyping.OpQuantizationConfig(
            weight_tensor_config=qtyping.TensorQuantizationConfig(num_bits=16, dtype=qtyping.TensorDataType.FLOAT),
            compute_precision=qtyping.ComputePrecision.FLOAT,
            explicit_dequantize=True,
        ),
        AlgorithmName.FLOAT_CASTING,
    )
    recipe.add_quantization_config(_OUTPUT_PATTERN, operators.FULLY_CONNECTED, None, AlgorithmName.NO_QUANTIZE)
    _quantise_tflite(source, target, recipe, None)


def quantise_tflite(source: Path, target: Path, calibration: Calibration) -> None:
    """Write the static int8 form of a float32 TFLite file (int8 inside, float32 input and output).

    Static, not dynamic: older TFLite runtimes silently compute nonsense for dynamic int8.

    Raises:
        ExportError: the quantiser refuses the file.
    """
    with quiet_libraries():  # importing it configures logging for the whole process
        from ai_edge_quantizer import qtyping, recipe_manager
        from ai_edge_quantizer.algorithm_manager import AlgorithmName

    operators = qtyping.TFLOperationName
    recipe = recipe_manager.RecipeManager()
    recipe.add_static_config(".*", operators.ALL_SUPPORTED, 8, 8)
    for edge in (operators.INPUT, operators.OUTPUT):
        recipe.add_quantization_config(".*", edge, None, AlgorithmName.NO_QUANTIZE)
    _quantise_tflite(source, target, recipe, calibration.inputs)


def _quantise_tflite(source: Path, target: Path, recipe: Any, inputs: Float32 | None) -> None:
    from ai_edge_quantizer import quantizer

    try:
        with quiet_libraries():
            ranges = None if inputs is None else _ranges(source, recipe, inputs)
            work = quantizer.Quantizer(str(source), recipe.get_quantization_recipe())
            written = work.quantize(ranges).quantized_model
    except Exception as error:  # the quantiser raises errors of many unrelated classes
        raise _failed("ai-edge-quantizer", source, error) from error
    write_atomic(target, bytes(written))


def _ranges(source: Path, recipe: Any, inputs: Float32) -> Any:
    """Smallest and largest value of every tensor over all images.

    The library's default is a moving average in which 64 images have not yet reached the extremes: values then
    saturate, and the outcome depends on the order of the images.
    """
    from ai_edge_quantizer import calibrator
    from ai_edge_quantizer.utils import qsv_utils

    measured = calibrator.Calibrator(str(source), num_threads=1, qsv_update_func=qsv_utils.min_max_update)
    images = np.ascontiguousarray(inputs.transpose(0, 2, 3, 1))
    measured.calibrate({_SIGNATURE: [{_INPUT: image[None]} for image in images]}, recipe)
    return measured.get_model_qsvs()


def _failed(library: str, source: Path, error: Exception) -> ExportError:
    return ExportError(
        f"{library} cannot quantise {source.name}",
        why=f"{type(error).__name__}: {error}",
        next_step="export without this artifact",
    )
