"""Inference runtimes: which are here, and opening a model with the right one.

Nothing heavy is imported until a model is opened. To add a runtime, write a module with a function ``load`` as
:class:`~kiridashi.runtime.protocol.Loader` describes, and give it a line in :data:`RUNTIMES`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from kiridashi.errors import BundleError, InputError, RuntimeUnavailableError
from kiridashi.manifest import Artifact, RuntimeName
from kiridashi.runtime.protocol import PREFERENCE, LoadedModel, Loader, Provider

if TYPE_CHECKING:
    from kiridashi.runtime.bare import BareModel

__all__ = ["RUNTIMES", "available_runtimes", "installed_runtimes", "open_bare", "open_file", "open_model", "runnable"]
Opened = TypeVar("Opened")


@dataclass(frozen=True)
class RuntimeEntry:
    """Where a runtime is implemented, what to install for it, and the libraries it can use, best first.

    ``libraries`` are pairs of an import name and a distribution name.
    """

    module: str
    extra: str
    suffix: str
    libraries: tuple[tuple[str, str], ...]


RUNTIMES: dict[RuntimeName, RuntimeEntry] = {
    "onnxruntime": RuntimeEntry("kiridashi.runtime.onnx", "line", ".onnx", (("onnxruntime", "onnxruntime"),)),
    "litert": RuntimeEntry(
        "kiridashi.runtime.litert",
        "litert",
        ".tflite",
        (("ai_edge_litert", "ai-edge-litert"), ("tflite_runtime", "tflite-runtime")),
    ),
}


def available_runtimes() -> dict[RuntimeName, str]:
    """The installed runtimes, each with its library and version: ``{"litert": "ai-edge-litert 2.3.0"}``.

    Looks at what is installed without importing it.
    """
    found = {name: _installed(entry) for name, entry in RUNTIMES.items()}
    return {name: library for name, library in found.items() if library}


def installed_runtimes() -> frozenset[RuntimeName]:
    """The names of the installed runtimes; nothing of them is imported."""
    return frozenset(name for name, entry in RUNTIMES.items() if _library(entry))


def runnable(artifacts: Sequence[Artifact]) -> tuple[Artifact, ...]:
    """The inference models among ``artifacts`` whose runtime is installed, in their order."""
    available = installed_runtimes()
    return tuple(artifact for artifact in artifacts if artifact.runtime in available)


def open_model(
    path: Path,
    artifact: Artifact,
    threads: int = 1,
    siblings: Sequence[Artifact] = (),
    providers: Sequence[Provider] = PREFERENCE,
) -> LoadedModel:
    """Open an artifact's file with its runtime.

    Args:
        path: the file; its digest has been checked by the caller.
        artifact: its manifest entry.
        threads: threads inside one prediction.
        siblings: the bundle's other artifacts, to name an alternative when the runtime is missing.
        providers: what may compute it, best first.

    Raises:
        RuntimeUnavailableError: the runtime is not installed or does not work here; names what to install, and the
            sibling that an installed runtime could run. Or none of ``providers`` is here.
        BundleError: not an inference model, or the runtime refuses the file.
    """
    name = artifact.runtime
    if name is None:
        raise BundleError(f"'{artifact.name}' is a {artifact.kind} file and cannot predict")
    others = [sibling.name for sibling in runnable(siblings) if sibling.runtime != name]
    hint = f"; or use '{others[0]}', whose runtime is here" if others else ""
    model = _open(path, name, threads, hint, providers)
    if artifact.input_layout not in (None, model.layout):
        raise BundleError(
            f"'{artifact.name}' takes {model.layout} input, its manifest says {artifact.input_layout}",
            next_step="export the bundle again",
        )
    return model


def open_file(path: Path, threads: int = 1, providers: Sequence[Provider] = PREFERENCE) -> LoadedModel:
    """Open a model file that has no manifest; the runtime follows from ``.onnx`` or ``.tflite``.

    Raises:
        InputError: no such file, or another suffix.
        RuntimeUnavailableError, BundleError: as :func:`open_model`.
    """
    return _open(path, runtime_of(path), threads, "", providers)


def open_bare(path: Path, threads: int = 1, providers: Sequence[Provider] = PREFERENCE) -> BareModel:
    """Open a model file with whatever inputs it has, to be prepared and timed.

    Raises:
        InputError: no such file, or another suffix.
        RuntimeUnavailableError, BundleError: as :func:`open_model`.
    """
    name = runtime_of(path)

    def load() -> BareModel:
        from kiridashi.runtime.bare import KINDS

        return KINDS[name](path, threads, providers)

    return _guarded(path, name, "", load)


def runtime_of(path: Path) -> RuntimeName:
    """The runtime for a model file, by its suffix.

    Raises:
        InputError: no such file, or another suffix.
    """
    if not path.is_file():
        raise InputError(f"the model file {path} does not exist")
    for name, entry in RUNTIMES.items():
        if path.suffix == entry.suffix:
            return name
    known = ", ".join(entry.suffix for entry in RUNTIMES.values())
    raise InputError(f"{path} is of an unknown kind", why=f"known are {known}")


def _open(path: Path, name: RuntimeName, threads: int, hint: str, providers: Sequence[Provider]) -> LoadedModel:
    def load() -> LoadedModel:
        loader: Loader = importlib.import_module(RUNTIMES[name].module).load
        return loader(path, threads, providers)

    return _guarded(path, name, hint, load)


def _guarded(path: Path, name: RuntimeName, hint: str, load: Callable[[], Opened]) -> Opened:
    """``load()``, or what to install for it."""
    entry = RUNTIMES[name]
    if _installed(entry) is None:
        libraries = " or ".join(distribution for _, distribution in entry.libraries)
        raise RuntimeUnavailableError(
            f"{path.name} needs the runtime '{name}', which is not installed",
            why=f"none of its libraries is here: {libraries}",
            next_step=f"pip install 'kiridashi[{entry.extra}]'{hint}",
        )
    try:
        return load()
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"{path.name} needs the runtime '{name}', which does not work here",
            why=str(error),
            next_step=f"pip install 'kiridashi[{entry.extra}]'{hint}",
        ) from error


def _library(entry: RuntimeEntry) -> str | None:
    """The distribution of the first of the runtime's libraries that is installed."""
    for module, distribution in entry.libraries:
        if importlib.util.find_spec(module) is not None:
            return distribution
    return None


def _installed(entry: RuntimeEntry) -> str | None:
    distribution = _library(entry)
    return f"{distribution} {_version(distribution)}" if distribution else None


def _version(distribution: str) -> str:
    # Here and not above: the resident agent only asks what is installed, and this module needs three megabytes.
    import importlib.metadata

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "(unknown version)"
