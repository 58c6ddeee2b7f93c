from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from kiridashi.artifacts import read_bundle
from kiridashi.errors import BundleError, InputError, RuntimeUnavailableError
from kiridashi.preprocess import to_input
from kiridashi.runtime import available_runtimes, litert, open_file, open_model, runnable
from kiridashi.runtime.litert import LitertModel
from kiridashi.runtime.onnx import choose, load
from kiridashi.runtime.protocol import PREFERENCE

from tests.assets.dynamic_tflite import write_dynamic
from tests.assets.tiny_bundle import CLASSES, SIDE, WIDTH


def probe_of(bundle: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    with np.load(bundle / "probe.npz") as file:
        return file["images"], {name.removeprefix("logits."): file[name] for name in file.files if name != "images"}


@pytest.mark.parametrize("name", ["model.onnx", "model.int8.onnx", "model.tflite"])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_model_computes_the_reference(bundle: Path, name: str, threads: int) -> None:
    manifest = read_bundle(bundle)
    images, expected = probe_of(bundle)
    model = open_model(bundle / name, manifest.artifact(name), threads)
    logits = model.run(to_input(images, manifest.preprocessing, model.layout))
    assert logits.dtype == np.float32
    assert model.frame_shape == (SIDE, SIDE)
    np.testing.assert_allclose(logits, expected[name], atol=1e-5)


@pytest.mark.parametrize("name", ["model.onnx", "model.tflite"])
def test_threads_share_a_model_without_mixing_frames(bundle: Path, name: str) -> None:
    manifest = read_bundle(bundle)
    images, expected = probe_of(bundle)
    model = open_file(bundle / name)
    batch = to_input(images, manifest.preprocessing, model.layout)

    def ask(n: int) -> float:
        row = n % len(batch)
        return float(np.abs(model.run(batch[row : row + 1])[0] - expected[name][row]).max())

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(ask, range(400))) < 1e-5


def test_features_come_from_the_onnx_file(bundle: Path) -> None:
    images, expected = probe_of(bundle)
    model = load(bundle / "model.onnx", 1)
    x = to_input(images, read_bundle(bundle).preprocessing, "NCHW")
    logits, features = model.run_outputs(x, ["logits", "features"])
    assert logits.shape == (len(images), CLASSES)
    assert features.shape == (len(images), WIDTH)
    np.testing.assert_allclose(logits, expected["model.onnx"], atol=1e-5)
    with pytest.raises(BundleError, match="no output nonsense"):
        model.run_outputs(x, ["nonsense"])


@pytest.mark.parametrize("name", ["model.onnx", "model.tflite"])
def test_a_file_that_is_no_model(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not a model at all")
    with pytest.raises(BundleError, match=f"cannot load {name}"):
        open_file(tmp_path / name)


@pytest.mark.parametrize("name", ["model.onnx", "model.tflite"])
def test_a_batch_of_another_size_is_refused(bundle: Path, name: str) -> None:
    model = open_file(bundle / name)
    shape = (1, 3, SIDE + 1, SIDE) if model.layout == "NCHW" else (1, SIDE + 1, SIDE, 3)
    with pytest.raises(BundleError, match="could not run"):
        model.run(np.zeros(shape, np.float32))


def test_a_file_of_unknown_kind_and_none(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"x")
    with pytest.raises(InputError, match="unknown kind"):
        open_file(tmp_path / "model.pt")
    with pytest.raises(InputError, match="does not exist"):
        open_file(tmp_path / "model.onnx")


def test_a_manifest_with_the_wrong_layout_is_refused(bundle: Path) -> None:
    wrong = msgspec.structs.replace(read_bundle(bundle).artifact("model.onnx"), input_layout="NHWC")
    with pytest.raises(BundleError, match="takes NCHW input"):
        open_model(bundle / "model.onnx", wrong)


def test_files_that_cannot_predict(bundle: Path) -> None:
    manifest = read_bundle(bundle)
    with pytest.raises(BundleError, match="cannot predict"):
        open_model(bundle / "probe.npz", manifest.artifact("probe.npz"))


def test_missing_runtime_names_the_extra_and_the_other_file(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_bundle(bundle)
    assert set(available_runtimes()) == {"onnxruntime", "litert"}
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert set(available_runtimes()) == {"litert"}
    assert [artifact.name for artifact in runnable(manifest.artifacts)] == ["model.tflite"]
    with pytest.raises(RuntimeUnavailableError) as caught:
        open_model(bundle / "model.onnx", manifest.artifact("model.onnx"), siblings=manifest.artifacts)
    assert "kiridashi[line]" in caught.value.next_step
    assert "'model.tflite'" in caught.value.next_step


def test_tflite_runtime_with_numpy_2_is_explained(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "old" / "tflite_runtime").mkdir(parents=True)
    (tmp_path / "old" / "tflite_runtime" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "old")
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    manifest = read_bundle(bundle)
    with pytest.raises(RuntimeUnavailableError, match="needs numpy below 2") as caught:
        open_model(bundle / "model.tflite", manifest.artifact("model.tflite"), siblings=manifest.artifacts)
    assert "kiridashi[litert]" in caught.value.next_step
    assert "'model.onnx'" in caught.value.next_step


def test_quantised_input_and_output_are_converted() -> None:
    class Interpreter:
        """Stands for an interpreter with int8 input and output that adds one step."""

        def get_input_details(self) -> list[dict[str, object]]:
            return [{"index": 0, "shape": np.array([1, 2, 2, 3]), "dtype": np.int8, "quantization": (0.5, 1)}]

        def get_output_details(self) -> list[dict[str, object]]:
            return [{"index": 1, "dtype": np.int8, "quantization": (2.0, 0)}]

        def set_tensor(self, index: int, value: np.ndarray) -> None:
            self.seen = value

        def invoke(self) -> None:
            self.out = self.seen.reshape(1, -1)[:, :2] + np.int8(1)

        def get_tensor(self, index: int) -> np.ndarray:
            return self.out

    model = LitertModel(Interpreter(), "test", "cpu")
    batch = np.zeros((2, 2, 2, 3), np.float32)
    batch[1] = 1.0
    assert model.run(batch).tolist() == [[4.0, 4.0], [8.0, 8.0]]


@pytest.mark.parametrize("frames", [1, 3, 4, 9])
def test_a_fixed_batch_is_met_by_splitting_and_filling_up(bundle: Path, frames: int) -> None:
    images, expected = probe_of(bundle)
    fixed = onnx.load(bundle / "model.onnx")
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(fixed, bundle / "fixed.onnx")
    x = to_input(images[:frames], read_bundle(bundle).preprocessing, "NCHW")
    model = load(bundle / "fixed.onnx", 1)
    logits, features = model.run_outputs(x, ["logits", "features"])
    assert features.shape == (frames, WIDTH)
    np.testing.assert_allclose(logits, expected["model.onnx"][:frames], atol=1e-5)
    np.testing.assert_array_equal(model.run(x), logits)


def test_the_preferred_provider_that_is_here_is_chosen_and_reported(bundle: Path) -> None:
    gpu = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    assert choose(PREFERENCE, gpu) == ("tensorrt", "cuda", "cpu")
    assert choose(("cuda", "cpu"), gpu) == ("cuda", "cpu")
    assert choose(PREFERENCE, ["AzureExecutionProvider", "CPUExecutionProvider"]) == ("cpu",)
    with pytest.raises(RuntimeUnavailableError, match="none of the providers tensorrt, xnnpack"):
        choose(("tensorrt", "xnnpack"), gpu[1:])
    assert open_file(bundle / "model.onnx").provider == "cpu"
    with pytest.raises(RuntimeUnavailableError, match="providers cuda"):
        load(bundle / "model.onnx", 1, ("cuda",))


def test_a_gpu_that_does_not_start_is_not_reported_as_used(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime lists what it was built for; a provider whose libraries do not load is passed over in silence."""
    import onnxruntime

    real = onnxruntime.InferenceSession
    asked = []

    def pass_over(path: str, options: object, providers: list[tuple[str, dict[str, str]]]) -> object:
        asked.append(providers)
        return real(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", pass_over)
    assert load(bundle / "model.onnx", 1).provider == "cpu"
    assert asked == [[("CUDAExecutionProvider", {"use_tf32": "0"}), ("CPUExecutionProvider", {})]]
    with pytest.raises(RuntimeUnavailableError, match="could not start cuda"):
        load(bundle / "model.onnx", 1, ("cuda",))


def test_litert_with_and_without_xnnpack(bundle: Path) -> None:
    images, expected = probe_of(bundle)
    x = to_input(images, read_bundle(bundle).preprocessing, "NHWC")
    for providers, used in ((PREFERENCE, "xnnpack"), (("xnnpack",), "xnnpack"), (("cpu", "xnnpack"), "cpu")):
        model = litert.load(bundle / "model.tflite", 1, providers)  # type: ignore[arg-type]
        assert model.provider == used
        np.testing.assert_allclose(model.run(x), expected["model.tflite"], atol=1e-5)
    with pytest.raises(RuntimeUnavailableError, match="providers cuda"):
        litert.load(bundle / "model.tflite", 1, ("cuda",))


def test_a_dynamically_quantised_file_is_refused_on_tflite_runtime_only(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dynamic(bundle / "model.tflite", bundle / "dynamic.tflite")
    images, expected = probe_of(bundle)
    x = to_input(images, read_bundle(bundle).preprocessing, "NHWC")
    assert np.abs(open_file(bundle / "dynamic.tflite").run(x) - expected["model.tflite"]).max() < 0.5
    library, _ = litert._library()
    monkeypatch.setattr(litert, "_library", lambda: (library, "tflite-runtime 2.14.0"))
    with pytest.raises(BundleError, match="quantised dynamically") as caught:
        open_file(bundle / "dynamic.tflite")
    assert "kiridashi[litert]" in caught.value.next_step
    assert open_file(bundle / "model.tflite").runtime == "tflite-runtime 2.14.0"
