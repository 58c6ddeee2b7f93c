"""The ONNX file of a classifier: one graph for prediction, and for the features the device's head is fitted on."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from kiridashi.artifacts import write_atomic
from kiridashi.errors import MissingExtraError
from torch import Tensor, nn

from kiridashi_server.classifier import Classifier
from kiridashi_server.export.errors import ExportError
from kiridashi_server.export.quiet import quiet_libraries

INPUT_NAME = "input"
OUTPUT_NAMES = ("logits", "features")
OPSET = 20
_BATCH = "batch"
_LIBRARIES = ("onnx", "onnxscript", "onnxruntime")


def require_onnx() -> None:
    """Check that the ONNX exporter can run here.

    Raises:
        MissingExtraError: one of its libraries is missing.
    """
    for library in _LIBRARIES:
        if importlib.util.find_spec(library) is None:
            raise MissingExtraError.for_extra(library, "server")


def export_onnx(model: Classifier, example: Tensor, path: Path) -> None:
    """Write ``model`` as ONNX: ``input`` [batch, 3, H, W] -> ``logits`` [batch, classes], ``features`` [batch, D].

    The batch is dynamic, because the device fits its head on features of many images at once; the graph and
    the latency of a single image are the same as with a fixed batch. Initialisers carry the names of
    ``model.named_parameters()`` unless an optimisation merged or removed them. The same model gives the same bytes.

    Args:
        model: batch normalisation folded, captured with a dynamic batch; left as it is.
        example: one input, float32 [1, 3, H, W]; its values do not matter.
        path: the file to write, replaced whole.

    Raises:
        MissingExtraError: the ONNX libraries are not installed.
        ExportError: the model cannot be expressed in ONNX.
    """
    require_onnx()
    batch = torch.zeros(2, *example.shape[1:])  # a batch of one would be taken for a constant
    try:
        with quiet_libraries(), torch.no_grad():
            captured = torch.export.export(_Outputs(model), (batch,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
            program = torch.onnx.export(
                contiguous_attention(captured),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT_NAME],
                output_names=list(OUTPUT_NAMES),
                optimize=True,
                verbose=False,
            )
    except Exception as error:  # the exporter raises errors of many unrelated classes
        raise ExportError(
            "the model cannot be exported to ONNX",
            why=f"{type(error).__name__}: {_first_line(error)}",
            next_step="capture the features with a dynamic batch, and look at the operator that is named",
        ) from error
    if program is None:
        raise ExportError("the ONNX exporter returned no model")
    write_atomic(path, canonical_bytes(program.model_proto))


def contiguous_attention(captured: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Lay the results of fused attention out plainly, in ``captured`` itself; the numbers stay the same.

    The exporter decides how to reshape such a result while attention is one operator, and then takes attention
    apart into others that lay theirs out differently; with a mask, that fails.
    """
    for node in list(captured.graph.nodes):
        if node.target is torch.ops.aten.scaled_dot_product_attention.default:
            with captured.graph.inserting_after(node):
                plain = captured.graph.call_function(
                    torch.ops.aten.clone.default, (node,), {"memory_format": torch.contiguous_format}
                )
            plain.meta = dict(node.meta)
            node.replace_all_uses_with(plain, delete_user_cb=lambda user, plain=plain: user is not plain)
    captured.graph_module.recompile()
    return captured


def canonical_bytes(model: Any) -> bytes:
    """An ONNX ``ModelProto`` as bytes that depend on the computation alone.

    Removed: producer, doc strings, and the metadata in which exporters keep stack traces, source paths and
    shapes of intermediate values (runtimes infer those). The symbol for the batch is called ``batch``.
    """
    model.producer_name, model.producer_version = "kiridashi", ""
    model.domain, model.model_version, model.doc_string = "", 0, ""
    graph = model.graph
    graph.doc_string = ""
    graph.ClearField("value_info")
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    for value in (*graph.input, *graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_param = _BATCH
    data: bytes = model.SerializeToString(deterministic=True)
    return data


class _Outputs(nn.Module):
    """The classifier with both outputs; its children keep their names, so parameters do as well."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.features = model.features
        self.head = model.head

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(images)
        return self.head(features), features


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
