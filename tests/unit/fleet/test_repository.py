"""What the repository publishes, and what it refuses to."""

from __future__ import annotations

import hashlib
import json
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from kiridashi.errors import InputError, StateError, TrustError
from kiridashi_server.fleet import repository as module
from kiridashi_server.fleet.keys import SigningKeys
from kiridashi_server.fleet.published import version_of
from kiridashi_server.fleet.repository import Expiry, Repository


def test_a_published_manifest_reaches_a_device(repository, device, now):
    target = repository.publish_target("press-3", 1, b'{"v": 1}', now)
    assert target == "lines/press-3/1.json"
    assert device.fetch(target) == b'{"v": 1}'
    assert _versions(repository, "press-3") == (1,)
    assert device.fetch("lines/press-3/2.json") is None


def test_metadata_names_carry_their_version(repository, now):
    repository.publish_target("press-3", 1, b"1", now)
    names = {path.name for path in repository.published.metadata_folder.iterdir()}
    assert {"1.root.json", "timestamp.json", "2.line-press-3.json", "3.targets.json"} <= names
    assert "snapshot.json" not in names


def test_versions_of_a_line_only_grow(repository, device, now):
    repository.publish_target("press-3", 5, b"five", now)
    with pytest.raises(InputError, match="older than what is published"):
        repository.publish_target("press-3", 4, b"four", now)
    with pytest.raises(InputError, match="published with other content"):
        repository.publish_target("press-3", 5, b"other", now)
    assert device.fetch("lines/press-3/5.json") == b"five"
    assert device.fetch("lines/press-3/4.json") is None


def test_publishing_the_same_bytes_again_changes_nothing(repository, now):
    repository.publish_target("press-3", 1, b"one", now)
    before = _files(repository)
    assert repository.publish_target("press-3", 1, b"one", now) == "lines/press-3/1.json"
    assert _files(repository) == before


@pytest.mark.parametrize(
    ("line", "version", "size", "message"),
    [
        ("paint-9", 1, 10, "no line 'paint-9'"),
        ("press-3", 0, 10, "not a version number"),
        ("press-3", 10**9, 10, "not a version number"),
        ("press-3", 1, module.MAX_FILE_BYTES + 1, "fit into one message"),
    ],
)
def test_bad_input_is_refused_before_anything_changes(repository, now, line, version, size, message):
    before = _files(repository)
    with pytest.raises(InputError) as caught:
        repository.publish_target(line, version, b"x" * size, now)
    assert message in str(caught.value)
    assert _files(repository) == before


def test_metadata_that_outgrows_a_message_is_refused_before_anything_changes(repository, now, monkeypatch):
    repository.publish_target("press-3", 1, b"1", now)
    before = _files(repository, folder="metadata")
    monkeypatch.setattr(module, "MAX_FILE_BYTES", 700)
    with pytest.raises(InputError, match="would grow to"):
        repository.publish_target("press-3", 2, b"2", now)
    assert _files(repository, folder="metadata") == before


def test_two_writers_do_not_lose_each_others_releases(repository, device, now):
    with ThreadPoolExecutor(4) as pool:
        jobs = [
            pool.submit(repository.publish_target, line, version, f"{line}{version}".encode(), now)
            for version in (1, 2, 3)
            for line in ("press-3", "weld-1")
        ]
        outcomes = [job.exception() for job in jobs]
    published = [_versions(repository, line) for line in ("press-3", "weld-1")]
    # Threads may overtake each other: an overtaken version is refused, and no accepted one is missing.
    assert all(error is None or isinstance(error, InputError) for error in outcomes)
    assert sum(map(len, published)) == outcomes.count(None)
    assert device.fetch(f"lines/weld-1/{published[1][-1]}.json") == f"weld-1{published[1][-1]}".encode()


def test_refresh_renews_what_is_past_its_half_life_and_nothing_else(tmp_path, now):
    expiry = Expiry(timestamp=timedelta(days=2), snapshot=timedelta(days=20), line=timedelta(days=100))
    repository = Repository(tmp_path / "r", SigningKeys(tmp_path / "k"), expiry)
    repository.init(now)
    repository.add_line("press-3", now)
    assert repository.refresh_timestamp(now + timedelta(hours=23)) == ()
    assert repository.refresh_timestamp(now + timedelta(hours=25)) == ("timestamp",)
    assert repository.refresh_timestamp(now + timedelta(hours=26)) == ()
    assert repository.refresh_timestamp(now + timedelta(days=11)) == ("snapshot", "timestamp")
    assert repository.refresh_timestamp(now + timedelta(days=51)) == ("line-press-3", "snapshot", "timestamp")
    state = repository.published.committed()
    assert (state.timestamp.signed.version, state.lines["press-3"].signed.version) == (5, 2)
    assert state.targets.signed.version == 2


def test_refresh_leaves_roles_whose_key_is_kept_elsewhere(tmp_path, now):
    repository = Repository(tmp_path / "r", SigningKeys(tmp_path / "k"))
    repository.init(now)
    for path in (tmp_path / "k").glob("targets-*"):
        path.rename(tmp_path / path.name)
    assert repository.refresh_timestamp(now + timedelta(days=200)) == ("snapshot", "timestamp")
    with pytest.raises(StateError, match="no signing key of the role 'targets'"):
        repository.add_line("press-3", now)


def test_rotating_the_root_key_carries_devices_over_and_retires_the_old_key(repository, device, tmp_path, now):
    device.refresh()
    old_keys = set((tmp_path / "keys").glob("root-*"))
    assert repository.rotate_root_key(now) == 2
    assert repository.rotate_root_key(now) == 3
    assert len(set((tmp_path / "keys").glob("root-*"))) == 1
    assert not old_keys & set((tmp_path / "keys").glob("root-*"))
    repository.publish_target("press-3", 1, b"after", now)
    assert device.fetch("lines/press-3/1.json") == b"after"
    assert json.loads((device.folder / "root.json").read_text())["signed"]["version"] == 3


def test_a_tampered_repository_is_never_signed_over(repository, now):
    repository.publish_target("press-3", 1, b"1", now)
    path = repository.published.metadata_folder / "2.line-press-3.json"
    data = json.loads(path.read_text())
    data["signed"]["targets"]["lines/press-3/1.json"]["length"] = 2
    path.write_text(json.dumps(data))
    with pytest.raises(TrustError, match="does not verify"):
        repository.publish_target("weld-1", 1, b"1", now)
    path.write_text("{")
    with pytest.raises(StateError, match="damaged"):
        repository.publish_target("weld-1", 1, b"1", now)


def test_init_keeps_a_repository_that_is_there(repository, now):
    before = _files(repository)
    repository.init(now)
    repository.add_line("press-3", now)
    assert _files(repository) == before


def test_key_files_are_for_their_owner_only(tmp_path, repository):
    keys = list((tmp_path / "keys").iterdir())
    assert len(keys) == 6
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700


@pytest.mark.parametrize(
    "name",
    ["../keys/root.pem", "timestamp.json/..", "0.root.json", "01.root.json", "1.line-.json", "root.json", "1.Root.json",
     "1.line-a/../b.json", "timestamp.json\n"],
)  # fmt: skip
def test_only_metadata_names_are_read(repository, name):
    assert repository.published.read_metadata(name) is None


def test_targets_are_read_with_and_without_the_digest_prefix(repository, now):
    repository.publish_target("press-3", 1, b"one", now)
    digest = repository.published.committed().lines["press-3"].signed.targets["lines/press-3/1.json"].hashes["sha256"]
    read = repository.published.read_target
    assert read("lines/press-3/1.json") == read(f"lines/press-3/{digest}.1.json") == b"one"
    assert read("lines/press-3/2.json") is None
    assert read(f"lines/press-3/{'0' * 64}.1.json") is None
    assert read("lines/weld-1/1.json") is None
    assert read("lines/press-3/../press-3/1.json") is None


def _versions(repository: Repository, line: str) -> tuple[int, ...]:
    targets = repository.published.committed().lines[line].signed.targets
    return tuple(sorted(version_of(path) for path in targets))


def _files(repository: Repository, folder: str = "") -> dict[Path, bytes]:
    top = repository.published.metadata_folder.parent / folder
    return {path: path.read_bytes() for path in top.rglob("*.json")}


def test_a_probe_set_reaches_a_device_under_its_own_digest(repository, device, now):
    digest = hashlib.sha256(b"probes").hexdigest()
    assert repository.published.committed().probes is None
    target = repository.publish_probes(b"probes", now)
    assert target == f"probes/{digest}.json"
    assert device.fetch(target) == b"probes"
    assert device.fetch(f"probes/{'0' * 64}.json") is None
    before = _files(repository)
    assert repository.publish_probes(b"probes", now) == target
    assert _files(repository) == before
    assert device.fetch(repository.publish_probes(b"others", now)) == b"others"
    assert device.fetch(target) == b"probes"
    assert repository.published.read_target(target) == b"probes"
    with pytest.raises(InputError, match="one message"):
        repository.publish_probes(bytes(module.MAX_FILE_BYTES + 1), now)


def test_the_probes_key_signs_no_lines_and_is_renewed_like_theirs(repository, device, now):
    target = repository.publish_probes(b"probes", now)
    role = repository.published.committed().targets.signed.get_delegated_role("probes")
    assert (role.paths, role.terminating) == (["probes/*"], True)
    assert set(role.keyids).isdisjoint(
        keyid
        for line in ("press-3", "weld-1")
        for keyid in repository.published.committed().targets.signed.get_delegated_role(f"line-{line}").keyids
    )
    assert "probes" in repository.refresh_timestamp(now + timedelta(days=200))
    assert device.fetch(target) == b"probes"


def test_a_repository_from_before_probe_sets_gets_the_role_with_the_first_one(repository, new_device, now):
    repository.publish_target("press-3", 1, b"one", now)
    device = new_device("enrolled-before")
    assert device.fetch("lines/press-3/1.json") == b"one"
    assert device.fetch(repository.publish_probes(b"probes", now)) == b"probes"
    assert device.fetch("lines/press-3/1.json") == b"one"
