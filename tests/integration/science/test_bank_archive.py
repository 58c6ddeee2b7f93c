"""Signed archives: same bytes, idempotent, and refused whole when anything about them is wrong."""

import dataclasses
import hashlib
import io
import json
import zipfile

import msgspec
import numpy as np
import pytest
import safetensors.numpy
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kiridashi.errors import InputError, KiridashiError, TrustError
from kiridashi_server.bank import archive as archives
from kiridashi_server.bank.archive import read_archive
from kiridashi_server.bank.record import encode_arrays, record_id
from kiridashi_server.bank.sharing import carry_records, export_records, import_records
from kiridashi_server.bank.store import Bank
from tiny_science import make_record

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
TRUSTED = [KEY.public_key()]


@pytest.fixture
def other(tmp_path):
    with Bank.open(tmp_path / "other") as bank:
        yield bank


@pytest.fixture
def archive(bank, tmp_path):
    bank.add(make_record(policy="shareable"))
    bank.add(make_record("old model", headless=True, kind="tuned", policy="shareable", fingerprint="elsewhere"))
    path = tmp_path / "shared.kiribank"
    export_records(bank, path, KEY)
    return path


def _state(bank):
    files = sorted(path.name for path in (bank.folder / "blobs").rglob("*") if path.is_file())
    return files, bank.summaries()


def _rewritten(path, change, *, sign=False, compress=zipfile.ZIP_STORED):
    """The archive with its members changed by ``change``; with ``sign`` by who has the key."""
    with zipfile.ZipFile(path) as source:
        members = {name: source.read(name) for name in source.namelist()}
    change(members)
    if sign:
        signature = KEY.sign(b"kiridashi bank archive 1\n" + members["manifest.json"]).hex()
        members["signature.json"] = json.dumps(
            {"key": archives.public_hex(KEY.public_key()), "signature": signature}
        ).encode()
    with zipfile.ZipFile(path, "w", compress) as target:
        for name, data in members.items():
            target.writestr(name, data)


def test_records_come_over_whole_internal_and_with_their_origin(archive, bank, other):
    done = import_records(other, archive, TRUSTED)
    assert (len(done.new), done.known, done.backbones) == (2, (), {"backbone": 1, "elsewhere": 1})
    for task in ("hues", "old model"):
        sent, got = bank.get(task), other.get(task)
        assert (got.id, got.kind, got.policy) == (sent.id, sent.kind, "internal")
        assert encode_arrays(got) == encode_arrays(sent)
        assert got.provenance.origin == f"imported, signed by {done.signer[:16]}"
    assert other.list(backbone_fingerprint="backbone")[0].task == "hues"
    again = import_records(other, archive, TRUSTED)
    assert (again.new, len(again.known)) == ((), 2)
    with pytest.raises(InputError, match="may be exported"):
        export_records(other, archive.with_name("again"), KEY)


def test_the_same_records_give_the_same_bytes_in_whatever_order_they_were_added(archive, other, tmp_path):
    other.add(make_record("old model", headless=True, kind="tuned", policy="shareable", fingerprint="elsewhere"))
    other.add(make_record(policy="shareable"))
    export_records(other, tmp_path / "second", KEY)
    assert (tmp_path / "second").read_bytes() == archive.read_bytes()


def test_internal_records_stay_until_the_policy_changes(bank, tmp_path):
    bank.add(make_record())
    path = tmp_path / "out"
    for keys in ((), ("hues",)):
        with pytest.raises(InputError) as caught:
            export_records(bank, path, KEY, keys)
        assert "bank policy RECORD shareable" in caught.value.next_step
        assert [p.name for p in tmp_path.iterdir()] == ["bank"]
    bank.set_policy("hues", "shareable")
    assert export_records(bank, path, KEY) == (bank.get("hues").id,)
    bank.set_policy("hues", "internal")
    with pytest.raises(InputError, match="internal: hues"):
        export_records(bank, path, KEY, ["hues"])


def test_an_unknown_signer_is_refused(archive, other):
    with pytest.raises(TrustError, match="not trusted"):
        import_records(other, archive, [Ed25519PrivateKey.generate().public_key()])
    assert other.summaries() == ()


def _drop(name):
    return lambda members: members.pop(name)


def _set(name, data):
    return lambda members: members.__setitem__(name, data)


def _flip_a_blob(members):
    name = next(name for name in members if name.startswith("blobs/"))
    members[name] = bytes([members[name][0] ^ 1]) + members[name][1:]


def _drop_a_blob(members):
    members.pop(next(name for name in members if name.startswith("blobs/")))


def _rename_a_task(members):
    members["manifest.json"] = members["manifest.json"].replace(b'"hues"', b'"hvac"')


@pytest.mark.parametrize(
    "change",
    [
        _drop("signature.json"),
        _drop("manifest.json"),
        _set("signature.json", b"{}"),
        _set("signature.json", b"x" * 5000),
        _set("../../outside", b"x"),
        _set("/etc/passwd", b"x"),
        _set("blobs/" + "ab" * 32, b"not signed"),
        _flip_a_blob,
        _drop_a_blob,
        _rename_a_task,
    ],
)
def test_what_was_changed_by_who_has_no_key_is_refused_before_anything_changes(change, archive, other, tmp_path):
    other.add(make_record("mine"))
    before, around = _state(other), sorted(tmp_path.rglob("*"))
    _rewritten(archive, change)
    with pytest.raises(TrustError):
        import_records(other, archive, TRUSTED)
    assert _state(other) == before
    assert sorted(tmp_path.rglob("*")) == around


def test_bombs_and_doubled_names_are_refused(archive, other):
    content = archive.read_bytes()
    _rewritten(archive, _set("blobs/bomb", bytes(50_000_000)), compress=zipfile.ZIP_DEFLATED)
    assert archive.stat().st_size < 100_000
    with pytest.raises(TrustError, match="compressed"):
        import_records(other, archive, TRUSTED)
    archive.write_bytes(content)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(archive, "a") as target:
        target.writestr("manifest.json", b"{}")
    with pytest.raises(TrustError, match="same name"):
        import_records(other, archive, TRUSTED)
    assert other.summaries() == ()


def test_an_archive_that_is_too_large_is_not_opened(archive, other, monkeypatch):
    monkeypatch.setattr(archives, "MAX_ARCHIVE_BYTES", 100)
    with pytest.raises(TrustError, match="at most 100"):
        import_records(other, archive, TRUSTED)


def _edit(change):
    """A change of the manifest's content."""

    def apply(members):
        content = json.loads(members["manifest.json"])
        change(content)
        members["manifest.json"] = msgspec.json.encode(content, order="sorted")

    return apply


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda m: m.__setitem__("format", "kiridashi-bank/9"), InputError),
        (lambda m: m["records"][0]["row"].__setitem__("task", "renamed"), InputError),
        (lambda m: m["records"][0]["row"].__setitem__("kind", "guessed"), InputError),
        (lambda m: m["records"][0]["row"].__setitem__("samples", "many"), InputError),
        (lambda m: m["records"][0]["blobs"].pop("scores"), InputError),
        (lambda m: m["records"][0]["blobs"].__setitem__("scores", "../../bank.db"), TrustError),
        (lambda m: m["sizes"].__setitem__("../../bank.db", 5), TrustError),
        (lambda m: m["sizes"].update({next(iter(m["sizes"])): 10**12}), TrustError),
    ],
)
def test_what_a_signer_wrote_wrongly_is_refused_too(change, error, archive, other):
    _rewritten(archive, _edit(change), sign=True)
    with pytest.raises(error):
        import_records(other, archive, TRUSTED)
    assert _state(other) == ([], ())


def test_arrays_that_are_not_finite_are_refused(bank, other, tmp_path):
    scores = {"a": np.array([1, np.nan, 3, 4], np.float32), "b": np.ones(6, np.float32)}
    record = make_record(policy="shareable")
    with pytest.raises(InputError, match="not finite"):
        bank.add(dataclasses.replace(record, scores=scores))
    blobs = encode_arrays(record) | {"scores": safetensors.numpy.save(scores)}
    record.__dict__["id"] = record_id(record, {kind: hashlib.sha256(data).hexdigest() for kind, data in blobs.items()})
    bank.add_all([(record, blobs)])
    export_records(bank, tmp_path / "out", KEY)
    with pytest.raises(InputError, match="malformed"):
        import_records(other, tmp_path / "out", TRUSTED)
    assert other.summaries() == ()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_never_brings_in_anything_else(archive, place, bit, tmp_path):
    content = bytearray(archive.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    path = tmp_path / "flipped"
    path.write_bytes(content)
    try:
        entries = list(read_archive(path, TRUSTED).entries())
    except KiridashiError:
        return
    with zipfile.ZipFile(io.BytesIO(archive.read_bytes())) as whole:
        signed = {whole.read(name) for name in whole.namelist() if name.startswith("blobs/")}
    assert {data for _, blobs in entries for data in blobs.values()} == signed


def test_carrying_over_keeps_scores_and_leaves_what_belongs_to_the_old_weights(bank):
    bank.add(make_record())
    done = carry_records(bank, "new weights", "layout")
    (record,) = bank.list(backbone_fingerprint="new weights")
    assert record.id == done.new[0]
    assert record.provenance.origin == "carried over from backbone"
    assert (record.head_weight, record.feature_mean, record.outcomes, record.kind) == (None, None, {}, "learnt")
    assert record.scores["a"].tolist() == make_record().scores["a"].tolist()
    assert bank.list(backbone_fingerprint="backbone")[0].head_weight is not None
    assert carry_records(bank, "new weights", "layout").known == done.new
    assert bank.backbones() == {"backbone": 1, "new weights": 1}


def test_another_layout_is_refused_with_what_to_learn_again(bank):
    bank.add(make_record())
    bank.add(make_record("fits", layout="wanted", fingerprint="old"))
    with pytest.raises(InputError, match="layout differs") as caught:
        carry_records(bank, "new", "unheard of")
    assert caught.value.next_step == "kiridashi bank learn --task fits --task hues"
    done = carry_records(bank, "new", "wanted")
    assert ([record.task for record in done.left], len(done.new)) == (["hues"], 1)
    with pytest.raises(InputError, match="no record of another backbone"):
        carry_records(bank, "new", "wanted", source="ffff")
    assert dataclasses.asdict(bank.summary("hues").provenance)["origin"] == ""
