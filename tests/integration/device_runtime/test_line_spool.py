"""Predicted frames reach the spool by themselves, from Python and through the server, and never at the line's cost."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from kiridashi import LineModel
from kiridashi.errors import InputError
from kiridashi.spool import Frame, Spool, SpoolFolder

from tests.assets.tiny_bundle import LABELS, server_tiles
from tests.integration.device_runtime.conftest import Device

LINE = "press-3"
IMAGES, _ = server_tiles(4, 50)


class Offers(Spool):
    """A spool that remembers what it was offered."""

    seen: list[tuple[np.ndarray, np.ndarray, str, tuple[str, ...]]]

    def offer(self, frame, values, digest, labels=()) -> None:  # type: ignore[no-untyped-def]
        self.__dict__.setdefault("seen", []).append((frame, values, digest, labels))
        super().offer(frame, values, digest, labels)


def kept(state_dir: Path) -> list[Frame]:
    folder = SpoolFolder(state_dir, LINE)
    frames = [folder.read(folder.frames / place.name) for place in folder.scan(folder.frames)]
    return [frame for frame in frames if frame is not None]


def test_every_predicted_frame_is_offered_with_what_the_model_said(device: Device) -> None:
    spool = Offers.open(LINE, device.state_dir)
    assert isinstance(spool, Offers)
    tall = np.repeat(IMAGES[3], 2, axis=0)
    with LineModel.open(LINE, device.state_dir, spool=spool) as model:
        with pytest.raises(InputError):
            model.predict(IMAGES[0].astype(np.float32))  # type: ignore[arg-type]
        said = [
            model.predict(IMAGES[0]).values,
            *model.predict(IMAGES[1:3]).values,
            *model.predict([tall]).values,
            model.predict_async(IMAGES[4]).result(20).values,
        ]
    frames = [IMAGES[0], IMAGES[1], IMAGES[2], tall, IMAGES[4]]
    assert len(spool.seen) == len(frames)  # neither the frames of the warm-up nor the refused one
    for (frame, values, digest, labels), expected, numbers in zip(spool.seen, frames, said, strict=True):
        np.testing.assert_array_equal(frame, expected)
        np.testing.assert_array_equal(values, numbers)
        assert (digest, labels) == (device.manifest.digest, LABELS)
    assert (spool.counts().offered, spool.counts().failed) == (len(frames), 0)


def test_a_spool_of_the_models_own_is_written_when_it_closes(device: Device) -> None:
    with LineModel.open(LINE, device.state_dir, spool=True) as model:
        said = model.predict(IMAGES[0])
        spool = model.spool
    assert spool is not None
    (frame,) = kept(device.state_dir)
    assert frame.pixels == IMAGES[0].tobytes()
    assert (frame.header.digest, frame.header.labels) == (device.manifest.digest, LABELS)
    np.testing.assert_allclose(frame.header.values, said.values, atol=1e-5)
    spool.offer(IMAGES[1], said.values, said.model_digest, said.labels)
    assert len(kept(device.state_dir)) == spool.counts().written == 1


def test_a_spool_of_the_callers_stays_open(device: Device) -> None:
    spool = Spool.open(LINE, device.state_dir)
    with LineModel.open(LINE, device.state_dir, spool=spool) as model:
        said = model.predict(IMAGES[0])
    spool.offer(IMAGES[1], said.values, said.model_digest, said.labels)
    spool.close()
    assert spool.counts().offered == 2
    assert kept(device.state_dir)


def test_without_being_asked_nothing_is_kept(device: Device) -> None:
    with LineModel.open(LINE, device.state_dir) as model:
        model.predict(IMAGES[0])
        assert model.spool is None
    assert not (device.state_dir / "spool").exists()


def test_the_spool_of_another_line_is_refused(device: Device) -> None:
    with pytest.raises(InputError, match="'weld-1' cannot take frames of line 'press-3'"):
        LineModel.open(LINE, device.state_dir, spool=Spool.open("weld-1", device.state_dir))


def test_a_spool_that_cannot_be_written_costs_no_prediction(device: Device) -> None:
    (device.state_dir / "spool").write_text("not a folder")
    with LineModel.open(LINE, device.state_dir) as plain:
        expected = plain.predict(IMAGES).values
    with LineModel.open(LINE, device.state_dir, spool=True) as model:
        np.testing.assert_array_equal(model.predict(IMAGES).values, expected)
        np.testing.assert_array_equal(np.stack([model.predict(image).values for image in IMAGES[:4]]), expected[:4])
        spool = model.spool
    assert spool is not None
    assert (spool.counts().written, spool.counts().failed > 0) == (0, True)
    assert "spool" in spool.counts().error


@pytest.mark.parametrize("flags", [[], ["--spool"]])
def test_frames_of_other_languages_reach_the_spool_too(device: Device, flags: list[str]) -> None:
    command = [sys.executable, "-m", "kiridashi.line_command", "serve", "--line", LINE, "--port", "0"]
    process = subprocess.Popen(
        [*command, "--state", str(device.state_dir), *flags], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        port = int(process.stderr.readline().partition("127.0.0.1:")[2].partition("/")[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        size = {"binary_data_size": IMAGES[0].size}
        tensor = {"name": "frames", "datatype": "UINT8", "shape": list(IMAGES[0].shape), "parameters": size}
        head = json.dumps({"inputs": [tensor]}).encode()
        length = {"Inference-Header-Content-Length": str(len(head))}
        connection.request("POST", f"/v2/models/{LINE}/infer", head + IMAGES[0].tobytes(), length)
        assert connection.getresponse().status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()
    assert [frame.pixels for frame in kept(device.state_dir)] == [IMAGES[0].tobytes()] * len(flags)
