"""The attack matrix: what a hostile or broken server may send, against python-tuf's own client."""

from __future__ import annotations

from datetime import timedelta

import pytest
from kiridashi_server.fleet.keys import SigningKeys
from kiridashi_server.fleet.repository import Repository
from tuf.api import exceptions
from tuf.api.metadata import Metadata, MetaFile, TargetFile, Targets


def test_an_older_timestamp_is_refused(repository, device, fetcher, now):
    old = repository.published.read_metadata("timestamp.json")
    repository.publish_target("press-3", 1, b"1", now)
    device.refresh()
    fetcher.replaced["timestamp.json"] = old
    with pytest.raises(exceptions.BadVersionNumberError):
        device.refresh()


def test_an_older_snapshot_under_a_new_timestamp_is_refused(repository, device, fetcher, now):
    repository.publish_target("press-3", 1, b"1", now)
    device.refresh()
    signer = _online(repository, "timestamp")
    state = repository.published.committed()
    old = repository.published.read_metadata(f"{state.snapshot.signed.version - 1}.snapshot.json")
    state.timestamp.signed.version += 1
    state.timestamp.signed.snapshot_meta = MetaFile.from_data(state.snapshot.signed.version - 1, old, ["sha256"])
    state.timestamp.sign(signer)
    fetcher.replaced["timestamp.json"] = state.timestamp.to_bytes()
    with pytest.raises(exceptions.BadVersionNumberError):
        device.refresh()


def test_expired_metadata_is_refused_and_a_refresh_heals_it(tmp_path, now, new_device, fetcher):
    past = now - timedelta(days=5)
    repository = Repository(tmp_path / "old", SigningKeys(tmp_path / "old-keys"))
    repository.init(past)
    fetcher.published = repository.published
    device = new_device("device-b")
    device.root = repository.published.root_bytes()
    with pytest.raises(exceptions.ExpiredMetadataError):
        device.refresh()
    repository.refresh_timestamp(now)
    device.refresh()


@pytest.mark.parametrize("name", ["timestamp.json", "3.snapshot.json", "3.targets.json", "1.line-press-3.json"])
def test_a_changed_byte_in_metadata_is_refused(repository, device, fetcher, name):
    data = bytearray(repository.published.read_metadata(name))
    place = data.index(b'"expires"') + len('"expires": "20')
    data[place] ^= 1
    fetcher.replaced[name] = bytes(data)
    expected = exceptions.UnsignedMetadataError if name == "timestamp.json" else exceptions.LengthOrHashMismatchError
    with pytest.raises(expected):
        device.fetch("lines/press-3/1.json")


def test_a_changed_manifest_is_refused(repository, device, fetcher, now):
    target = repository.publish_target("press-3", 1, b'{"model": "good"}', now)
    digest = repository.published.committed().lines["press-3"].signed.targets[target].hashes["sha256"]
    fetcher.replaced[f"lines/press-3/{digest}.1.json"] = b'{"model": "evil"}'
    with pytest.raises(exceptions.LengthOrHashMismatchError):
        device.fetch(target)


def test_a_longer_manifest_is_cut_off(repository, device, fetcher, now):
    target = repository.publish_target("press-3", 1, b"short", now)
    digest = repository.published.committed().lines["press-3"].signed.targets[target].hashes["sha256"]
    fetcher.replaced[f"lines/press-3/{digest}.1.json"] = b"x" * 100_000
    with pytest.raises(exceptions.DownloadLengthMismatchError):
        device.fetch(target)


def test_the_key_of_one_line_cannot_sign_for_another(repository, device, fetcher, now):
    """Even a server whose online keys were stolen cannot give a line a model signed by another line's key."""
    forged = repository.published.committed().lines["press-3"]
    forged.signed.version += 1
    forged.signed.targets["lines/press-3/7.json"] = TargetFile.from_data("lines/press-3/7.json", b"evil", ["sha256"])
    forged.sign(_line_key(repository, "weld-1"))
    _commit_forged(repository, fetcher, "line-press-3", forged)
    with pytest.raises(exceptions.UnsignedMetadataError):
        device.fetch("lines/press-3/7.json")


def test_a_line_that_lists_anothers_targets_is_not_believed(repository, device, fetcher, now):
    forged = repository.published.committed().lines["weld-1"]
    forged.signed.version += 1
    for path in ("lines/press-3/7.json", "lines/weld-1/7.json"):
        forged.signed.targets[path] = TargetFile.from_data(path, b"evil", ["sha256"])
    forged.sign(_line_key(repository, "weld-1"))
    _commit_forged(repository, fetcher, "line-weld-1", forged)
    assert device.fetch("lines/press-3/7.json") is None
    updater = device.updater()
    updater.refresh()
    assert updater.get_targetinfo("lines/weld-1/7.json") is not None  # the forgery itself was well made


def test_metadata_of_different_moments_cannot_be_mixed(repository, device, fetcher, now):
    repository.publish_target("press-3", 1, b"1", now)
    repository.publish_target("press-3", 2, b"2", now)
    fetcher.replaced["3.line-press-3.json"] = repository.published.read_metadata("2.line-press-3.json")
    with pytest.raises(exceptions.LengthOrHashMismatchError):
        device.fetch("lines/press-3/1.json")


def test_a_retired_root_key_cannot_make_a_new_root(repository, device, fetcher, tmp_path, now):
    root = repository.published.committed().root
    old = SigningKeys(tmp_path / "keys").signer("root", root.signed.roles["root"].keyids)
    repository.rotate_root_key(now)
    device.refresh()
    root.signed.version = 3
    root.sign(old)
    fetcher.replaced["3.root.json"] = root.to_bytes()
    with pytest.raises(exceptions.UnsignedMetadataError):
        device.refresh()


def _keys(repository: Repository) -> SigningKeys:
    return SigningKeys(repository.published.metadata_folder.parent.parent / "keys")


def _online(repository: Repository, role: str):
    return _keys(repository).signer(role, repository.published.committed().root.signed.roles[role].keyids)


def _line_key(repository: Repository, line: str):
    role = repository.published.committed().targets.signed.get_delegated_role(f"line-{line}")
    return _keys(repository).signer(f"line-{line}", role.keyids)


def _commit_forged(repository: Repository, fetcher, role: str, forged: Metadata[Targets]) -> None:
    """Serve a forged role under a snapshot and timestamp with good signatures."""
    state = repository.published.committed()
    data = forged.to_bytes()
    snapshot, timestamp = state.snapshot, state.timestamp
    snapshot.signed.version += 1
    snapshot.signed.meta[f"{role}.json"] = MetaFile.from_data(forged.signed.version, data, ["sha256"])
    snapshot.sign(_online(repository, "snapshot"))
    timestamp.signed.version += 1
    timestamp.signed.snapshot_meta = MetaFile.from_data(snapshot.signed.version, snapshot.to_bytes(), ["sha256"])
    timestamp.sign(_online(repository, "timestamp"))
    fetcher.replaced |= {
        f"{forged.signed.version}.{role}.json": data,
        f"{snapshot.signed.version}.snapshot.json": snapshot.to_bytes(),
        "timestamp.json": timestamp.to_bytes(),
    }
