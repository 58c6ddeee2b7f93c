"""Any model file with whatever inputs it has, to be timed: ONNX on onnxruntime, TFLite on LiteRT."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kiridashi.errors import BundleError, InputError
from kiridashi.manifest import RuntimeName
from kiridashi.runtime import litert, onnx
from kiridashi.runtime.protocol import LoadedModel, Provider

Shape = tuple[int, ...]
Feed = dict[str, NDArray[Any]]
MAX_INPUT_BYTES = 1024**3
_TYPICAL = {4: 224}
_OTHERWISE = 128
# What onnxruntime calls the number formats that numpy has too.
_FORMATS = {"float": "float32", "double": "float64"}
_NUMBERS = ("b", "i", "u", "f", "c")


@dataclass(frozen=True)
class Input:
    """One input of a model: its name, its numpy number format, and its shape; ``None`` where an extent is open.

    ``dtype`` is ``None`` for what is no array of numbers; ``kind`` then says what the runtime calls it.
    """

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[int | None, ...]
    kind: str


class BareModel(Protocol):
    """A model as the runtime has it.

    Attributes:
        runtime: name and version of the library.
        provider: what computes the model, known once it is prepared.
        inputs: what it takes.
    """

    runtime: str
    provider: Provider
    inputs: tuple[Input, ...]

    def prepare(self, shapes: Mapping[str, Shape]) -> None:
        """Take inputs of these shapes, one for each input. Called once, before the model runs.

        Raises:
            BundleError: the runtime refuses them.
            RuntimeUnavailableError: none of the wanted providers can compute the model.
        """

    def run(self, feed: Feed) -> None:
        """Predict once, and have the outputs as arrays.

        Raises:
            BundleError: the runtime fails.
        """

    def as_classifier(self, shapes: Mapping[str, Shape]) -> LoadedModel | None:
        """The model as a line runs it, if it takes one RGB image and gives one row of values; else ``None``."""


class BareOnnx:
    """An ONNX file."""

    def __init__(self, path: Path, threads: int, providers: Sequence[Provider]) -> None:
        import onnxruntime

        chosen = onnx.choose(providers, onnxruntime.get_available_providers())
        self._session = onnx.make_session(path, threads, chosen)
        self.runtime = f"onnxruntime {onnxruntime.__version__}"
        self.provider = onnx.provider_of(self._session)
        self.inputs = tuple(
            Input(entry.name, _onnx_dtype(entry.type), _open_shape(entry.shape), entry.type)
            for entry in self._session.get_inputs()
        )

    def prepare(self, shapes: Mapping[str, Shape]) -> None:
        """Nothing to do: a session takes what it is given."""

    def run(self, feed: Feed) -> None:
        """See :meth:`BareModel.run`."""
        try:
            self._session.run(None, feed)
        except onnx.refusals() as error:
            raise BundleError("onnxruntime could not run the model", why=onnx.first_line(error)) from error

    def as_classifier(self, shapes: Mapping[str, Shape]) -> LoadedModel | None:
        """See :meth:`BareModel.as_classifier`."""
        shape = _only(shapes)
        is_image = len(shape) == 4 and shape[:2] == (1, 3) and self.inputs[0].dtype == np.float32
        if not is_image or len(self._session.get_outputs()[0].shape) != 2:
            return None
        return onnx.OnnxModel(self._session, self.runtime)


class BareTflite:
    """A TFLite file."""

    def __init__(self, path: Path, threads: int, providers: Sequence[Provider]) -> None:
        self._interpreter, self.runtime, self._wanted = litert.new_interpreter(path, threads, providers)
        self.provider: Provider = "cpu"
        self._path = path
        self._details = self._interpreter.get_input_details()
        self.inputs = tuple(
            Input(entry["name"], _number(entry["dtype"]), _signature(entry), np.dtype(entry["dtype"]).name)
            for entry in self._details
        )

    def prepare(self, shapes: Mapping[str, Shape]) -> None:
        """See :meth:`BareModel.prepare`."""
        try:
            for entry in self._details:
                if shapes[entry["name"]] != tuple(entry["shape"]):
                    self._interpreter.resize_tensor_input(entry["index"], shapes[entry["name"]])
        except (RuntimeError, ValueError) as error:
            raise BundleError("LiteRT does not take inputs of these shapes", why=str(error)) from error
        self.provider = litert.allocate(self._interpreter, self.runtime, self._wanted, self._path)
        self._details = self._interpreter.get_input_details()

    def run(self, feed: Feed) -> None:
        """See :meth:`BareModel.run`."""
        try:
            for entry in self._details:
                self._interpreter.set_tensor(entry["index"], feed[entry["name"]])
            self._interpreter.invoke()
            for entry in self._interpreter.get_output_details():
                self._interpreter.get_tensor(entry["index"])
        except (RuntimeError, ValueError) as error:
            raise BundleError("LiteRT could not run the model", why=str(error)) from error

    def as_classifier(self, shapes: Mapping[str, Shape]) -> LoadedModel | None:
        """See :meth:`BareModel.as_classifier`."""
        shape, outputs = _only(shapes), self._interpreter.get_output_details()
        is_image = len(shape) == 4 and shape[0] == 1 and shape[3] == 3
        known = {np.dtype(np.float32), np.dtype(np.int8), np.dtype(np.uint8)}
        usual = {np.dtype(end["dtype"]) for end in (self._details[0], outputs[0])} <= known
        if not is_image or not usual or len(outputs[0]["shape"]) != 2:
            return None
        return litert.LitertModel(self._interpreter, self.runtime, self.provider)


KINDS: dict[RuntimeName, Callable[[Path, int, Sequence[Provider]], BareModel]] = {
    "onnxruntime": BareOnnx,
    "litert": BareTflite,
}


def resolve_shapes(inputs: Sequence[Input], given: Mapping[str, Shape], source: str) -> dict[str, Shape]:
    """The shape of every input: what was given, else the model's own; an open first extent is a batch, and becomes 1.

    Args:
        inputs: of the model.
        given: by the input's name; the name may be empty when the model has one input.
        source: the file, for messages.

    Raises:
        InputError: an unknown name, a shape that does not fit, an extent left open, or an input that is no array of
            numbers. Names the option that helps.
    """
    known = {entry.name: entry for entry in inputs}
    wanted = {(inputs[0].name if not name and len(inputs) == 1 else name): shape for name, shape in given.items()}
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        what = f"has no input '{unknown[0]}'" if unknown[0] else "has several inputs, and a shape names none of them"
        raise InputError(f"{source} {what}", why=f"its inputs: {', '.join(_described(entry) for entry in inputs)}")
    return {name: _resolved(entry, wanted.get(name), source) for name, entry in known.items()}


def make_feed(inputs: Sequence[Input], shapes: Mapping[str, Shape], rng: np.random.Generator) -> Feed:
    """Values to predict with: noise for floats, any value for 8-bit integers, and ones for longer integers.

    Those are counts or places in a table more often than pixels, and a 1 is valid as either.
    """
    return {entry.name: _values(np.dtype(entry.dtype), shapes[entry.name], rng) for entry in inputs}


def _values(dtype: np.dtype[Any], shape: Shape, rng: np.random.Generator) -> NDArray[Any]:
    if dtype.kind in "fc":
        return rng.standard_normal(shape).astype(dtype)
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(dtype)
    if dtype.itemsize == 1:
        limits = np.iinfo(dtype)
        return rng.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)
    return np.ones(shape, dtype)


def _resolved(entry: Input, given: Shape | None, source: str) -> Shape:
    if entry.dtype is None:
        raise InputError(
            f"{source} takes {entry.kind} as its input '{entry.name}'",
            why="only arrays of numbers can be made up for a measurement",
        )
    if given is None:
        given = tuple(1 if n == 0 and extent is None else extent or 0 for n, extent in enumerate(entry.shape))
        if 0 in given:
            raise InputError(
                f"{source} leaves the size of its input open: {_described(entry)}",
                next_step=f"say it: --shape {entry.name}={_suggested(entry)}",
            )
    fits = len(given) == len(entry.shape) and all(
        extent in (None, wanted) for extent, wanted in zip(entry.shape, given, strict=True)
    )
    if not fits:
        raise InputError(
            f"{source} does not take {'x'.join(map(str, given))} as its input '{entry.name}'",
            why=f"it takes {_described(entry)}",
            next_step=f"for example --shape {entry.name}={_suggested(entry)}",
        )
    if math.prod(given) * entry.dtype.itemsize > MAX_INPUT_BYTES:
        raise InputError(f"an input '{entry.name}' of {'x'.join(map(str, given))} is over 1 GiB")
    return given


def _described(entry: Input) -> str:
    """``x float32 [?, 3, 224, 224]``."""
    return f"{entry.name} {entry.dtype or entry.kind} [{', '.join(str(n or '?') for n in entry.shape)}]"


def _suggested(entry: Input) -> str:
    usual = _TYPICAL.get(len(entry.shape), _OTHERWISE)
    return "x".join(str(extent or (1 if n == 0 else usual)) for n, extent in enumerate(entry.shape))


def _only(shapes: Mapping[str, Shape]) -> Shape:
    return next(iter(shapes.values())) if len(shapes) == 1 else ()


def _onnx_dtype(kind: str) -> np.dtype[Any] | None:
    name = kind.removeprefix("tensor(").removesuffix(")")
    try:
        return _number(_FORMATS.get(name, name))
    except TypeError:
        return None


def _number(kind: Any) -> np.dtype[Any] | None:
    dtype = np.dtype(kind)
    return dtype if dtype.kind in _NUMBERS else None


def _open_shape(shape: Sequence[Any]) -> tuple[int | None, ...]:
    return tuple(extent if isinstance(extent, int) and extent > 0 else None for extent in shape)


def _signature(entry: Mapping[str, Any]) -> tuple[int | None, ...]:
    """A TFLite input's shape: -1 in the signature is open; files without one have their shape alone."""
    signature = entry.get("shape_signature", ())
    return tuple(int(n) if n > 0 else None for n in (signature if len(signature) else entry["shape"]))
