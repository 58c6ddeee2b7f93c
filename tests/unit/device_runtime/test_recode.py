"""Writing other parameters into integers: what comes out is what quantising those parameters gives."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from kiridashi.artifacts import describe_file
from kiridashi.errors import BundleError
from kiridashi.manifest import Artifact, Code, check_artifacts
from kiridashi.recode import decode, recode

INPUT_SCALE = np.float32(0.021)
WEIGHT = Code("w", "int8", 4, (3, 2, 2, 5), axes=(0, 2, 3, 1), scales=64, channels=3, limit=127)
BIAS = Code("b", "int32", 76, (3,), scales=88, channels=3, weight="w")
HALF = Code("h", "float16", 100, (2, 3), axes=(1, 0))
CODES = (WEIGHT, BIAS, HALF)
SIZE = 112


def quantised(weight: np.ndarray, bias: np.ndarray, half: np.ndarray, limit: int = 127) -> bytes:
    """The file as a quantiser writes it, plainly."""
    data = bytearray(b"?" * SIZE)
    scales = np.array([np.float32(np.abs(channel).max() / limit) for channel in weight], np.float32)
    levels = np.stack([np.rint(channel / scale) for channel, scale in zip(weight, scales, strict=True)])
    data[4:64] = levels.transpose(0, 2, 3, 1).astype(np.int8).tobytes()
    data[64:76] = scales.tobytes()
    steps = (INPUT_SCALE * scales).astype(np.float32)
    data[76:88] = np.rint(bias.astype(np.float64) / steps).astype(np.int32).tobytes()
    data[88:100] = steps.tobytes()
    data[100:112] = half.T.astype(np.float16).tobytes()
    return bytes(data)


def draw(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"w": (3, 2, 2, 5), "b": (3,), "h": (2, 3)}
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def shipped(seed: int = 0, limit: int = 127) -> bytes:
    return quantised(*(draw(seed)[name] for name in "wbh"), limit)


@pytest.mark.parametrize("limit", [64, 127])
def test_other_values_give_the_file_that_the_quantiser_makes_of_them(limit: int) -> None:
    codes = (msgspec.structs.replace(WEIGHT, limit=limit), BIAS, HALF)
    found = recode(shipped(0, limit), codes, draw(1), "f")
    expected = shipped(1, limit)
    np.testing.assert_array_equal(np.frombuffer(found, np.uint8)[:76], np.frombuffer(expected, np.uint8)[:76])
    assert found[100:] == expected[100:]
    for offset, kind in ((76, np.int32), (88, np.float32)):  # the scale of the input is worked out: an ulp may be off
        ours, theirs = (np.frombuffer(one, kind, 3, offset) for one in (found, expected))
        np.testing.assert_allclose(ours, theirs, rtol=3e-7, atol=1 if kind is np.int32 else 0)


def test_the_same_values_give_the_same_file() -> None:
    assert recode(shipped(), CODES, draw(0), "f") == shipped()
    assert recode(shipped(), CODES, {}, "f") == shipped()


def test_a_bias_follows_its_weight_s_scales_when_it_is_not_tuned_itself() -> None:
    values = draw(0) | {"w": 3 * draw(0)["w"]}
    found = recode(shipped(), CODES, {"w": values["w"]}, "f")
    np.testing.assert_allclose(decode(found, WEIGHT, "f"), values["w"], atol=0.01)
    np.testing.assert_allclose(decode(found, BIAS, "f"), values["b"], atol=3e-4)  # its steps are three times as large


def test_a_bias_alone_keeps_the_scales() -> None:
    found = recode(shipped(), CODES, {"b": draw(1)["b"]}, "f")
    assert found[:76] + found[88:] == shipped()[:76] + shipped()[88:]
    np.testing.assert_allclose(decode(found, BIAS, "f"), draw(1)["b"], atol=1e-4)
    alone = (msgspec.structs.replace(BIAS, weight=""),)
    assert recode(shipped(), alone, {"b": draw(1)["b"]}, "f") == found


def test_a_channel_of_zeros_keeps_its_scale_and_a_large_bias_fits() -> None:
    weight, bias = draw(0)["w"], draw(0)["b"]
    weight[1] = 0
    weight[2] *= 1e-9
    bias[2] = 50.0
    found = recode(shipped(), CODES, {"w": weight, "b": bias}, "f")
    old, new = (np.frombuffer(one, np.float32, 3, 64) for one in (shipped(), found))
    assert new[1] == old[1]
    np.testing.assert_allclose(decode(found, BIAS, "f"), bias, rtol=1e-3)


@given(arrays(np.float32, (3, 2, 2, 5), elements=st.floats(-8, 8, width=32)))
def test_no_weight_is_further_off_than_half_a_step(weight: np.ndarray) -> None:
    found = recode(shipped(), CODES, {"w": weight}, "f")
    steps = np.frombuffer(found, np.float32, 3, 64)
    off = np.abs(decode(found, WEIGHT, "f") - weight).reshape(3, -1).max(1)
    assert (off <= 0.5001 * steps + 1e-12).all()


@pytest.mark.parametrize("bad", [np.full((3, 2, 2, 5), np.nan, np.float32), np.zeros((2, 2), np.float32)])
def test_values_that_do_not_fit_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(BundleError, match="no usable values for 'w'"):
        recode(shipped(), CODES, {"w": bad}, "f")


def test_places_outside_the_file_and_scales_that_are_none_are_refused() -> None:
    for code in (msgspec.structs.replace(WEIGHT, offset=100), msgspec.structs.replace(WEIGHT, scales=110)):
        with pytest.raises(BundleError, match="outside the file"):
            decode(shipped(), code, "f")
    with pytest.raises(BundleError, match="are none"):
        decode(shipped()[:64] + b"\0" * 12 + shipped()[76:], WEIGHT, "f")


def listed(tmp_path, *codes: Code) -> Artifact:
    (tmp_path / "m.onnx").write_bytes(shipped())
    return msgspec.structs.replace(describe_file(tmp_path / "m.onnx", "onnx-int8"), codes=codes)


@pytest.mark.parametrize(
    "changes",
    [
        {"offset": -1},
        {"axes": (0, 0, 1, 2)},
        {"channels": 2},
        {"axis": 4},
        {"limit": 0},
        {"limit": 128},
        {"scales": -1},
    ],
)
def test_a_malformed_code_is_refused(tmp_path, changes) -> None:
    check_artifacts((listed(tmp_path, *CODES),), "m")
    with pytest.raises(BundleError, match="malformed"):
        check_artifacts((listed(tmp_path, msgspec.structs.replace(WEIGHT, **changes), HALF),), "m")


def test_a_bias_without_its_weight_is_refused(tmp_path) -> None:
    with pytest.raises(BundleError, match="malformed"):
        check_artifacts((listed(tmp_path, BIAS),), "m")


def test_a_file_without_codes_is_encoded_as_before_there_were_any(tmp_path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"x")
    plain = describe_file(tmp_path / "m.onnx", "onnx-fp32")
    assert b"codes" not in msgspec.json.encode(plain)
    assert plain.coded == ()
    coded = listed(tmp_path, *CODES)
    assert msgspec.json.decode(msgspec.json.encode(coded), type=Artifact) == coded
