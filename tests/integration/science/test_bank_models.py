"""Records from checkpoints: what each kind tells, and files that are refused."""

import pickle
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from kiridashi.errors import InputError, KiridashiError
from kiridashi_server.bank.adding import record_from_model
from kiridashi_server.bank.checkpoint import read_checkpoint
from kiridashi_server.graph.cut import cut, save_cut
from kiridashi_server.graph.dims import Atom, units_along
from kiridashi_server.graph.plan import Plan
from tiny_science import tiny_backbone, tiny_net


@pytest.fixture(scope="module")
def backbone():
    return tiny_backbone()


def _weights():
    return {name: tensor.clone() for name, tensor in tiny_net().state_dict().items()}


def _tuned(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point() else tensor
        for name, tensor in _weights().items()
    }


def _save(path, tensors, metadata=None):
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def test_units_along_a_product_and_a_concatenation():
    heads, channels, others = Atom(2), Atom(3), Atom(2)
    assert units_along((heads, channels), heads).tolist() == [0, 0, 0, 1, 1, 1]
    assert units_along((heads, channels), channels).tolist() == [0, 1, 2, 0, 1, 2]
    joined = (Atom(5, pieces=((channels,), (others,))),)
    assert units_along(joined, others).tolist() == [-1, -1, -1, 0, 1]


def test_a_tuned_checkpoint_scores_what_moved_along_its_weights(backbone, tmp_path):
    tuned, before = _tuned(), _weights()
    record = record_from_model(backbone, _save(tmp_path / "m.safetensors", tuned), "old line", ("good", "bad"))
    assert (record.kind, record.labels, record.samples) == ("tuned", ("good", "bad"), 0)
    assert (record.backbone_fingerprint, record.layout_digest) == (backbone.fingerprint, backbone.layout.digest)
    assert record.head_weight is None
    assert record.provenance.origin.startswith("tuned weights; m.safetensors, sha256:")
    unit, total = 7, 0.0
    for name, axis in (
        *(
            (f"{layer}{end}", 0)
            for layer in ("expand", "depthwise")
            for end in (".weight", "_norm.weight", "_norm.bias")
        ),
        ("project.weight", 1),
    ):
        new, old = (tensors[name].double().select(axis, unit) for tensors in (tuned, before))
        total += float((new * (new - old)).sum())
    assert record.scores["expand"][unit] == pytest.approx(abs(total), rel=1e-5)


def test_torch_files_prefixes_and_heads_give_the_same_record(backbone, tmp_path):
    tuned = _tuned()
    plain = record_from_model(backbone, _save(tmp_path / "a.safetensors", tuned), "line")
    wrapped = {f"module.{name}": tensor for name, tensor in tuned.items()} | {"module.fc.weight": torch.zeros(9, 32)}
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "b.pt")
    assert record_from_model(backbone, tmp_path / "b.pt", "line").id == plain.id


def test_zeroed_units_score_zero_and_the_rest_by_their_weights(backbone, tmp_path):
    weights = _weights()
    for name, axis in (("expand.weight", 0), ("depthwise.weight", 0), ("project.weight", 1)):
        weights[name].index_fill_(axis, torch.tensor([3, 11]), 0)
    record = record_from_model(backbone, _save(tmp_path / "m.safetensors", weights), "line")
    assert record.kind == "masked"
    assert np.flatnonzero(record.scores["expand"] == 0).tolist() == [3, 11]
    expected = sum(
        float(weights[name].double().select(axis, 5).abs().sum())
        for name, axis in (("expand.weight", 0), ("depthwise.weight", 0), ("project.weight", 1))
    )
    assert record.scores["expand"][5] == pytest.approx(expected, rel=1e-5)


def test_a_cut_tells_its_mask(backbone, tmp_path):
    kept = [0, 2, 5, 9]
    plan = Plan.of(backbone.layout, {"expand": kept})
    path = tmp_path / "cut.safetensors"
    save_cut(path, plan, cut(backbone.program, backbone.tracking, plan))
    record = record_from_model(backbone, path, "line")
    assert record.kind == "pruned"
    assert record.provenance.origin.startswith("mask only; ")
    assert np.flatnonzero(record.scores["expand"]).tolist() == kept
    assert record.scores["expand"][kept].mean() == pytest.approx(1)
    assert record.scores["top"].mean() == pytest.approx(1)


class _Bomb:
    def __reduce__(self):
        return (pytest.fail, ("code in a checkpoint was run",))


def _other_shape(tensors):
    return tensors | {"top.weight": torch.zeros(8, 16, 1, 1)}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "project.weight"}, "lacks it"),
        (_other_shape, "has it with shape"),
        (lambda t: t | {"top.weight": t["top.weight"] * float("nan")}, "not finite"),
        (lambda t: _weights(), "nothing was tuned"),
    ],
)
def test_weights_of_something_else_are_refused(change, match, backbone, tmp_path):
    with pytest.raises(InputError, match=match):
        record_from_model(backbone, _save(tmp_path / "m.safetensors", change(_tuned())), "line")


def test_files_that_could_run_code_are_refused_unread(backbone, tmp_path):
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(_Bomb()))
    torch.save(_Bomb(), tmp_path / "zip.pt")
    torch.save(tiny_net(), tmp_path / "module.pt")
    torch.save(_tuned(), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    for name in ("plain.pt", "zip.pt", "module.pt", "legacy.pt", "missing.pt"):
        with pytest.raises(InputError):
            read_checkpoint(tmp_path / name, backbone)


def test_files_that_are_too_large_packed_or_unpacked_are_refused(backbone, tmp_path):
    with (tmp_path / "long").open("wb") as file:
        file.truncate(200 * 1024**2)
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(100 * 1024**2))
    for name in ("long", "bomb.pt"):
        with pytest.raises(InputError, match="a checkpoint of this backbone may have"):
            read_checkpoint(tmp_path / name, backbone)


def test_a_cut_of_another_layout_or_with_a_torn_header_is_refused(backbone, tmp_path):
    other = Plan("0" * 64, {"expand": (0,)})
    save_cut(tmp_path / "a", other, backbone.program)
    _save(tmp_path / "b", _tuned(), {"kiridashi-cut-2": "{"})
    for name in "ab":
        with pytest.raises(KiridashiError, match="plan"):
            record_from_model(backbone, tmp_path / name, "line")
