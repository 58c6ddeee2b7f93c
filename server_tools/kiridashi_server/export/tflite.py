"""The TFLite file of a classifier, converted in a process of its own.

``python -m kiridashi_server.export.tflite IN OUT`` converts a saved program; the parent saves the program,
starts that process and collects the result. The converter brings a compiler and many libraries: apart, they
cost the caller no memory, cannot take it down, can be stopped on time, and run beside the ONNX export.

What passes between the two is a ``.pt2`` archive of ``torch.export.save``: the graph as JSON and the weights
as raw bytes. Its format may also hold pickles; the converter refuses an archive that does.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from kiridashi.artifacts import write_atomic
from kiridashi.errors import MissingExtraError
from torch import Tensor, nn

from kiridashi_server.classifier import Classifier
from kiridashi_server.export.errors import ExportError
from kiridashi_server.export.quiet import quiet_libraries

TIMEOUT_S = 600.0
_LIBRARIES = ("litert_torch", "ai_edge_quantizer", "ai_edge_litert")
_REPORTED_LINES = 5
_USAGE = 2
_IN, _OUT, _LOG = "in.pt2", "out.tflite", "log.txt"


def require_tflite() -> None:
    """Check that TFLite files can be made and run here.

    Raises:
        MissingExtraError: a library of the extra ``tflite`` is missing.
    """
    for library in _LIBRARIES:
        if importlib.util.find_spec(library) is None:
            raise MissingExtraError.for_extra(library.replace("_", "-"), "tflite")


@dataclass
class TfliteExport:
    """A conversion that is under way; made by ``start_tflite_export``.

    Use it as a context manager: leaving the block stops a conversion whose result was not collected.
    """

    path: Path
    folder: Path
    process: subprocess.Popen[bytes]
    started: float
    timeout_s: float

    def result(self) -> Path:
        """Wait for the conversion and put its file at ``path``; ``started`` is in ``time.monotonic`` seconds.

        Raises:
            ExportError: it failed, with its last lines, or took longer than the time limit.
        """
        remaining = max(0.0, self.started + self.timeout_s - time.monotonic())
        try:
            code = self.process.wait(remaining)
            if code != 0:
                raise ExportError(
                    f"the TFLite conversion ended with code {code}",
                    why=_last_lines((self.folder / _LOG).read_text(errors="replace")),
                    next_step="export without the TFLite artifacts, or replace the operator that is named",
                )
            write_atomic(self.path, (self.folder / _OUT).read_bytes())
        except subprocess.TimeoutExpired as error:
            raise ExportError(
                f"the TFLite conversion took longer than {self.timeout_s:.0f} s and was stopped",
                next_step="allow more time, or export without the TFLite artifacts",
            ) from error
        finally:
            self.close()
        return self.path

    def close(self) -> None:
        """Stop the process if it still runs, and remove its files. Harmless to call again."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> TfliteExport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def start_tflite_export(
    model: Classifier, example: Tensor, path: Path, *, timeout_s: float = TIMEOUT_S
) -> TfliteExport:
    """Start converting ``model`` to TFLite float32: images [1, H, W, 3] -> logits [1, classes].

    Args:
        model: batch normalisation folded; copied before this returns, so it may change afterwards.
        example: one input, float32 [1, 3, H, W]; its values do not matter.
        path: where ``result()`` puts the file; until then the work is in a hidden folder beside it.
        timeout_s: seconds after which ``result()`` gives up.

    Raises:
        MissingExtraError: the extra ``tflite`` is not installed.
        ExportError: the model cannot be captured with its input's axes swapped.
    """
    require_tflite()
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=".tflite-"))
    try:
        _save(model, example, folder / _IN)
        with (folder / _LOG).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(folder / _IN), str(folder / _OUT)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return TfliteExport(path, folder, process, started, timeout_s)


def export_tflite(model: Classifier, example: Tensor, path: Path, *, timeout_s: float = TIMEOUT_S) -> None:
    """Convert ``model`` and wait; arguments and errors are those of ``start_tflite_export`` and ``result``."""
    with start_tflite_export(model, example, path, timeout_s=timeout_s) as export:
        export.result()


class _ChannelsLast(nn.Module):
    """Takes NHWC images: the converter then needs no transpose, and the device none either."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.features = model.features
        self.head = model.head

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images.permute(0, 3, 1, 2)))
        return logits


def _save(model: Classifier, example: Tensor, path: Path) -> None:
    images = torch.zeros(1, *example.shape[2:], example.shape[1])
    try:
        with quiet_libraries(), torch.no_grad():
            program = torch.export.export(_ChannelsLast(model), (images,))
            program.example_inputs = None  # would be stored as a pickle
            torch.export.save(program, path)
    except Exception as error:  # the exporter raises errors of many unrelated classes
        raise ExportError("the model cannot be captured for TFLite", why=f"{type(error).__name__}: {error}") from error


def _last_lines(output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return " | ".join(lines[-_REPORTED_LINES:]) or "it printed nothing"


def convert(source: Path, target: Path) -> None:
    """Convert a saved program to a TFLite file (the child process's work).

    Raises:
        ExportError: the archive holds pickles.
    """
    _refuse_pickles(source)
    import litert_torch

    program = torch.export.load(source)
    inputs = tuple(
        torch.zeros(tuple(node.meta["val"].shape))
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
    )
    litert_torch.convert(program.module(), inputs).export(str(target))


def _refuse_pickles(source: Path) -> None:
    with zipfile.ZipFile(source) as archive:
        for entry in archive.infolist():
            if entry.filename.endswith("_config.json"):
                payloads = json.loads(archive.read(entry)).get("config", {}).values()
                pickled = any(payload.get("use_pickle", True) for payload in payloads)
            else:
                pickled = entry.filename.endswith(".pt") and entry.file_size > 0
            if pickled:
                raise ExportError(f"{source} holds pickled data in '{entry.filename}'")


def main(arguments: list[str]) -> int:
    """Entry of the child process: the paths of the saved program and of the TFLite file to write."""
    if len(arguments) != 2:
        sys.stderr.write(f"usage: python -m {__spec__.name if __spec__ else __name__} IN OUT\n")
        return _USAGE
    convert(Path(arguments[0]), Path(arguments[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
