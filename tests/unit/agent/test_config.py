from __future__ import annotations

from pathlib import Path

import pytest
from kiridashi.config import (
    BrokerSection,
    Config,
    DeviceSection,
    LimitsSection,
    LineSection,
    load_config,
    render_config,
)
from kiridashi.errors import InputError

MINIMAL = '[device]\nid = "cam-1"\n[broker]\nhost = "localhost"\n'
TLS = '[device]\nid = "cam-1"\n[broker]\nhost = "b.plant"\nca = "ca.pem"\ncert = "c.pem"\nkey = "k.pem"\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_and_absolute_paths(tmp_path) -> None:
    config = load_config(write(tmp_path, TLS + '[lines.press-3]\nsamples = "samples/p3"\nthreads = 2\n'))
    assert config.broker.port == 8883
    assert config.broker.ca == tmp_path / "ca.pem"
    assert config.device.state_dir == tmp_path
    assert config.lines["press-3"].samples == tmp_path / "samples/p3"
    assert config.lines["press-3"].runtime == "auto"
    assert config.lines["press-3"].tune
    assert config.limits.window == 4
    assert config.lines["press-3"].providers == ("tensorrt", "cuda", "xnnpack", "cpu")
    assert config.lines["press-3"].max_accuracy_drop == 0.05


def test_providers_and_the_accuracy_that_may_be_lost_are_read_and_written(tmp_path) -> None:
    text = MINIMAL + '[lines.press-3]\nproviders = ["cuda", "cpu"]\nmax_accuracy_drop = 0\n'
    config = load_config(write(tmp_path, text))
    assert config.lines["press-3"].providers == ("cuda", "cpu")
    assert config.lines["press-3"].max_accuracy_drop == 0.0
    (tmp_path / "again").mkdir()
    assert load_config(write(tmp_path / "again", render_config(config))).lines == config.lines


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (MINIMAL + "prot = 1\n", "config.toml:5: the key 'broker.prot' is unknown"),
        (MINIMAL + "[lines.press-3]\nsample = 'x'\n", "config.toml:6: the key 'lines.press-3.sample' is unknown"),
        (MINIMAL + "[limit]\n", "config.toml:5: the key 'limit' is unknown"),
        (MINIMAL + "port = 'x'\n", "config.toml:5: 'broker.port' cannot be used: Expected `int`, got `str`"),
        (MINIMAL + "port = 70000\n", "config.toml:5: 'broker.port' cannot be used"),
        (MINIMAL + "[lines.press-3]\nruntime = 'tensorrt'\n", "config.toml:6: 'lines.press-3.runtime' cannot be used"),
        (
            MINIMAL + "[lines.press-3]\nsamples = 3\n",
            "config.toml:6: 'lines.press-3.samples' cannot be used: expected a path in quotes",
        ),
        (
            MINIMAL + "[lines.press-3]\nproviders = ['TPU']\n",
            "config.toml:6: 'lines.press-3.providers' cannot be used",
        ),
        (MINIMAL + "[lines.press-3]\nproviders = []\n", "config.toml:6: 'lines.press-3.providers' cannot be used"),
        (MINIMAL + "[lines.press-3]\nmax_accuracy_drop = 5\n", "toml:6: 'lines.press-3.max_accuracy_drop' cannot"),
        (MINIMAL + "[lines.Press]\n", "config.toml:5: 'Press' is not a valid line name"),
        (MINIMAL + "lines = 3\n", "the key 'broker.lines' is unknown"),
        ("lines = 3\n" + MINIMAL, "config.toml:1: 'lines' holds a table for every line"),
        ("broker = 3\n[device]\nid = 'cam-1'\n", "config.toml:1: 'broker' cannot be used"),
        (MINIMAL + "[lines]\npress-3 = [\n 'a',\n]\n", "config.toml:8: 'lines.press-3' cannot be used"),
        (MINIMAL + "[limits]\nrequest_timeout_s = 61\n", "config.toml:6: 'limits.request_timeout_s' cannot be used"),
        (MINIMAL + "[limits]\nrequest_timeout_s = 9\njob_timeout_s = 8\n", "toml:7: limits.job_timeout_s is below"),
        ("[device]\nname = 'cam-1'\n[broker]\nhost = 'localhost'\n", "config.toml:2: the key 'device.name' is unknown"),
        ("[device]\n[broker]\nhost = 'localhost'\n", "config.toml:1: 'device' cannot be used: Object missing"),
        (MINIMAL + "[limits]\nwindow = 0\n", "config.toml:6: 'limits.window' cannot be used"),
        (MINIMAL.replace("cam-1", "Cam 1"), "config.toml:2: 'Cam 1' is not a valid device name"),
        (MINIMAL.replace("[broker]", 'device_class = "Pi 4"\n[broker]'), "'Pi 4' is not a valid device class name"),
        (MINIMAL.replace("localhost", "b.plant"), "broker.ca, broker.cert and broker.key are missing"),
        (MINIMAL + "ca = 'ca.pem'\n", "belong together"),
        ("[device]\nid = 'cam-1'\n", "the section [broker] is missing"),
        ("[device\n", "cannot be read as TOML"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_key(tmp_path, text, part) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert part in str(caught.value)
    assert str(path) in str(caught.value)


def test_an_unknown_key_comes_with_a_hint(tmp_path) -> None:
    with pytest.raises(InputError) as caught:
        load_config(write(tmp_path, MINIMAL + "[lines.press-3]\nsample = 'x'\n"))
    assert caught.value.next_step == "did you mean 'lines.press-3.samples'?"


def test_a_missing_file_says_how_to_enrol(tmp_path) -> None:
    with pytest.raises(InputError) as caught:
        load_config(tmp_path / "config.toml")
    assert "enroll" in caught.value.next_step


def test_rendering_and_reading_give_the_same(tmp_path) -> None:
    config = Config(
        device=DeviceSection(id="cam-1", state_dir=tmp_path),
        broker=BrokerSection("b.plant", 1883, tmp_path / "ca.pem", tmp_path / 'c "1".pem', tmp_path / "鍵.pem"),
        lines={"press-3": LineSection(samples=tmp_path / "s", tune=False), "press-4": LineSection()},
        limits=LimitsSection(request_timeout_s=3.5),
    )
    assert load_config(write(tmp_path, render_config(config))) == config


def test_the_recall_policy_of_a_line_is_a_share(tmp_path) -> None:
    path = tmp_path / "config.toml"
    head = '[device]\nid = "cell-7"\n[broker]\nhost = "127.0.0.1"\n[lines.press-3]\n'
    path.write_text(head + "max_recall_drop = 0.25\n")
    assert load_config(path).lines["press-3"].max_recall_drop == 0.25
    path.write_text(head + "max_recall_drop = 25\n")
    with pytest.raises(InputError, match="cannot be used"):
        load_config(path)
