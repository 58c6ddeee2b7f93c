"""Sticks: read within bounds, no name of theirs followed, and checked like the network."""

from __future__ import annotations

import os
import tarfile
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta

import pytest
from fake_stick import contents, write_file, write_folder
from kiridashi.artifacts import MANIFEST_NAME
from kiridashi.errors import BundleError, InputError, NetworkError, TrustError
from kiridashi.manifest import CHUNK_BYTES
from kiridashi.messages import MAX_MESSAGE_BYTES, Request
from kiridashi.stick import INDEX_NAME, StickIndex, decode_index, place_of
from kiridashi_agent.actions import Actions
from kiridashi_agent.agent import Agent
from kiridashi_agent.cli.usb import serves_soundly, verified
from kiridashi_agent.profile_task import ProfileTask
from kiridashi_agent.profile_worker import ProfileWorker
from kiridashi_agent.stick import opened
from kiridashi_agent.transport import NotFoundError, request_one

V1, V2 = "lines/press-3/1.json", "lines/press-3/2.json"


@pytest.fixture(params=["folder", "file"])
def write(request, tmp_path):
    """Writes a stick, as a folder or as one file."""

    def writer(files):
        if request.param == "folder":
            return write_folder(tmp_path / "stick", files)
        return write_file(tmp_path / "stick.tar", files)

    return writer


def bring(device, path, target=V2):
    """``kiridashi-agent import`` without its process: the device's parts over the stick."""
    (device.state / "trust").mkdir(parents=True, exist_ok=True)
    (device.state / "trust" / "root.json").write_bytes(device.fleet.root)
    with opened(path) as stick:
        verified(device.config, stick, stick.index())
        actions = Actions(device.config, stick, device.trust, device.jobs, device.stop, lambda: device.runtimes)
        profiles = ProfileWorker(ProfileTask(device.config, stick, device.trust, device.journal, device.measure_probes))
        agent = Agent(device.config, stick, device.journal, actions, profiles, device.stop)
        return agent.bring_in("press-3", target)


def test_a_stick_goes_the_whole_way_to_active(device, fleet, bundles, write) -> None:
    state = bring(device, write(contents(fleet, V2)))
    assert (state.phase, state.version, state.target, state.error) == ("active", 2, V2, None)
    assert device.slots.active().model_digest == bundles[2][1].digest
    assert [job for job, _ in device.jobs.calls if job == "measure"]
    assert fleet.requests == []  # nothing of it came over the network


@pytest.mark.parametrize("damaged", ["model", "manifest"])
def test_a_damaged_model_is_mended_by_the_same_stick(device, fleet, bundles, tmp_path, damaged) -> None:
    stick, digest = write_folder(tmp_path / "stick", contents(fleet, V2)), bundles[2][1].digest
    bring(device, stick)
    assert serves_soundly(device.config, "press-3", digest)
    active = device.slots.active()
    path = device.slots.model_path(active) if damaged == "model" else device.slots.folder(active.slot) / MANIFEST_NAME
    path.write_bytes(path.read_bytes()[:-9])
    assert not serves_soundly(device.config, "press-3", digest)
    assert bring(device, stick).phase == "active"
    assert serves_soundly(device.config, "press-3", digest)


def test_the_network_s_old_wish_does_not_undo_an_import_and_a_new_one_counts(serving, fleet, tmp_path) -> None:
    bring(serving, write_folder(tmp_path / "stick", contents(fleet, V2)))
    serving.transport.want(1, press_3=V1)  # retained at the broker, so it comes again
    assert serving.settle().target == V2
    serving.transport.want(2, press_3=V1)  # another line's change: the same wish for this one
    assert serving.settle().target == V2
    assert serving.journal.device().generation == 2
    serving.transport.want(3, press_3=V2)  # the server has caught up
    serving.settle()
    assert serving.journal.line("press-3").imported_over is None
    serving.transport.want(4, press_3=V1)  # and now wants the old one
    assert serving.settle().target == V1


def test_a_first_import_does_not_hide_the_server_s_first_wish(device, fleet, tmp_path) -> None:
    bring(device, write_folder(tmp_path / "stick", contents(fleet, V2)))
    device.transport.want(1, press_3=V1)
    assert device.settle().target == V1


def test_a_stick_that_is_pulled_out_is_gone_on_with(device, fleet, tmp_path) -> None:
    folder = write_folder(tmp_path / "stick", contents(fleet, V2))
    (folder / "blobs").rename(tmp_path / "away")
    (folder / "blobs").touch()  # so that reading fails as it does on a device that has gone
    state = bring(device, folder)
    assert (state.phase, state.error.kind) == ("downloading", "NetworkError")
    assert "cannot be read" in state.error.message
    (folder / "blobs").unlink()
    (tmp_path / "away").rename(folder / "blobs")
    assert bring(device, folder).phase == "active"


def test_an_agent_waits_while_an_import_has_the_line(serving, fleet, tmp_path) -> None:
    with serving.journal.lock("press-3", wait=False):
        serving.transport.want(2, press_3=V2)
        serving.agent.tick(0)
        assert serving.line.target == V1
        assert serving.journal.device().generation == 1
    assert serving.settle().target == V2
    assert serving.journal.device().generation == 2


def test_a_tuning_that_has_the_line_makes_way_for_a_wish(serving) -> None:
    class Tuning(ExitStack):
        def pause(self) -> None:
            self.close()

    with Tuning() as tuning:
        tuning.enter_context(serving.journal.lock("press-3", wait=False))
        profiles, *rest = serving.agent._idle
        serving.agent._idle = (profiles, tuning, *rest)
        serving.transport.want(2, press_3=V2)
        serving.agent.tick(0)
        serving.agent._idle = (profiles, *rest)
        assert serving.settle().target == V2


class TestRefused:
    @pytest.fixture
    def files(self, fleet):
        return contents(fleet, V2)

    def refusal(self, device, path, kind):
        before = device.slots.active()
        with pytest.raises(kind) as caught:
            bring(device, path)
        assert device.slots.active() == before
        assert device.journal.line("press-3").state.target in ("", V1)
        return caught.value

    def test_changed_metadata(self, device, files, write) -> None:
        files["metadata/timestamp.json"] = files["metadata/timestamp.json"].replace(b'"version":3', b'"version":9')
        self.refusal(device, write(files), TrustError)

    def test_a_stranger_s_stick(self, device, files, write, bundles) -> None:
        stranger = type(device.fleet)()
        for folder, manifest in bundles.values():
            stranger.publish(folder, manifest)
        error = self.refusal(device, write(contents(stranger, V2)), TrustError)
        assert "signatures" in error.what

    def test_expired_signatures_say_to_look_at_the_clock(self, device, fleet, write) -> None:
        fleet.commit(expires=datetime.now(UTC).replace(microsecond=0) - timedelta(days=800))
        error = self.refusal(device, write(contents(fleet, V2)), TrustError)
        assert "clock" in error.next_step
        assert "2026-12-24" in error.next_step

    def test_a_clock_that_is_years_behind(self, serving, fleet, write, monkeypatch) -> None:
        monkeypatch.setattr("kiridashi_agent.metadata.time.time", lambda: 86_400.0)  # January 1970
        error = self.refusal(serving, write(contents(fleet, V2)), TrustError)
        assert "clock went back" in error.what
        assert "timedatectl set-time" in error.next_step

    def test_an_older_stick_than_what_was_seen(self, serving, fleet, write) -> None:
        old = contents(fleet, V2)
        fleet.commit()
        fleet.commit()
        serving.transport.want(2, press_3=V2)
        serving.settle()
        serving.transport.want(3, press_3=V1)
        serving.settle()
        error = self.refusal(serving, write(old), TrustError)
        assert "write the stick again" in error.next_step

    def test_an_older_version_than_the_one_that_serves(self, serving, fleet, write) -> None:
        serving.transport.want(2, press_3=V2)
        serving.settle()
        with pytest.raises(TrustError, match="version 1 for line 'press-3' was refused") as caught:
            bring(serving, write(contents(fleet, V1)), V1)
        assert "undo" in caught.value.next_step

    def test_another_line_s_target(self, device, files, write) -> None:
        files[INDEX_NAME] = files[INDEX_NAME].replace(b"press-3", b"press-4", 1)
        self.refusal(device, write(files), BundleError)

    def test_a_missing_manifest(self, device, files, write) -> None:
        less = {name: data for name, data in files.items() if not name.startswith("targets/")}
        error = self.refusal(device, write(less), BundleError)
        assert "incomplete" in error.what

    def test_a_missing_file_of_the_bundle(self, device, files, write) -> None:
        less = {name: data for name, data in files.items() if not name.startswith("blobs/")}
        state = bring(device, write(less))
        assert (state.phase, state.error.kind) == ("rejected", "BundleError")

    def test_a_changed_file_of_the_bundle(self, device, files, write) -> None:
        changed = {name: data[:-1] + b"!" if name.startswith("blobs/") else data for name, data in files.items()}
        state = bring(device, write(changed))
        assert (state.phase, state.error.kind) == ("rejected", "TrustError")
        assert device.slots.active() is None

    def test_more_data_than_was_signed(self, device, files, write) -> None:
        (target,) = [name for name in files if name.startswith("targets/") and name.endswith(".2.json")]
        files[target] += bytes(10 * MAX_MESSAGE_BYTES)
        self.refusal(device, write(files), TrustError)


def test_links_and_pipes_in_a_folder_are_not_followed(tmp_path) -> None:
    folder = tmp_path / "stick"
    (folder / "metadata").mkdir(parents=True)
    (tmp_path / "secret").write_text("{}")
    (folder / "metadata" / "timestamp.json").symlink_to(tmp_path / "secret")
    (folder / "targets").symlink_to(tmp_path)
    (folder / "blobs").mkdir()
    os.mkfifo(folder / "blobs" / ("a" * 64))
    with opened(folder) as stick:
        for request in (
            Request("metadata", "timestamp.json"),
            Request("target", "secret"),
        ):
            with pytest.raises(NetworkError, match="cannot be read"):
                request_one(stick, request)
        with pytest.raises(NotFoundError):
            request_one(stick, Request("chunk", sha256="a" * 64))


@pytest.mark.parametrize(
    "name", ["../etc/passwd", "/etc/passwd", "a/../../b", "a//b", "", ".", "..", "a/.hidden", "a\0b", "ä.json"]
)
@pytest.mark.parametrize("method", ["metadata", "target"])
def test_no_name_leads_out_of_the_stick(method, name) -> None:
    with pytest.raises(InputError):
        place_of(Request(method, name))


@pytest.mark.parametrize("sha256", ["", "a" * 63, "A" * 64, "../" + "a" * 61])
def test_a_blob_is_named_by_a_digest_only(sha256) -> None:
    with pytest.raises(InputError):
        place_of(Request("chunk", sha256=sha256))
    with pytest.raises(InputError):
        place_of(Request("report"))


def entry(name="a", **fields) -> bytes:
    info = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (entry(type=tarfile.SYMTYPE, linkname="/etc/shadow"), "not a plain file"),
        (entry(type=tarfile.LNKTYPE, linkname="b"), "not a plain file"),
        (entry(type=tarfile.CHRTYPE), "not a plain file"),
        (entry(type=tarfile.XHDTYPE, size=1 << 32), "not a plain file"),
        (entry(size=10**9), "is cut short"),
        (entry() + entry(), "is there twice"),
        (entry().replace(b"ustar", b"zstar"), "not a plain file"),
        (entry()[:124] + b"zzzzzzzzzzz\0" + entry()[136:], "damaged header"),
        (entry()[:124] + b"-0000000100\0" + entry()[136:], "is cut short"),
        (b"no archive at all" * 100, "damaged header"),
        (b"", f"has no {INDEX_NAME}"),
    ],
)
def test_a_file_that_is_not_plain_is_refused(tmp_path, data, why) -> None:
    path = tmp_path / "stick.tar"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught, opened(path) as stick:
        stick.index()
    assert why in caught.value.why


def test_what_is_no_stick_is_said(tmp_path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(InputError, match="not a stick") as caught, opened(path) as stick:
            stick.index()
        assert "export-usb" in caught.value.next_step
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="not a stick"), opened(tmp_path / "pipe"):
        pass


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b'{"line":1}'])
def test_an_index_that_cannot_be_read_is_refused(data) -> None:
    with pytest.raises(InputError, match=r"stick\.json"):
        decode_index(data, "stick.json")


def test_an_index_of_another_format_is_refused() -> None:
    index = StickIndex(line="a", target="b", written="", valid_until="", format="kiridashi-stick/2")
    with pytest.raises(InputError, match="kiridashi-stick/2"):
        decode_index(index.encode(), "stick.json")


def test_reads_are_bounded_and_pieces_are_those_asked_for(tmp_path) -> None:
    blob = bytes(range(256)) * (CHUNK_BYTES // 256) + b"tail"
    files = {f"blobs/{'a' * 64}": blob, "metadata/big.json": bytes(3 * MAX_MESSAGE_BYTES)}
    for path in (write_folder(tmp_path / "stick", files), write_file(tmp_path / "stick.tar", files)):
        with opened(path) as stick:
            asked = [Request("chunk", sha256="a" * 64, index=index) for index in (1, 0)]
            assert [data for _, data in stick.request_many(asked)] == [b"tail", blob[:CHUNK_BYTES]]
            with pytest.raises(NotFoundError):
                request_one(stick, Request("chunk", sha256="a" * 64, index=2))
            assert len(request_one(stick, Request("metadata", "big.json"))) == MAX_MESSAGE_BYTES
