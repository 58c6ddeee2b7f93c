"""Enrolment: keys stay, requests prove them, and only a matching ticket is installed."""

from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fake_fleet import FakeFleet
from kiridashi.config import load_config
from kiridashi.enrolment import EnrolRequest, EnrolTicket, decode_enrolment, encode_enrolment
from kiridashi.errors import InputError, StateError, TrustError
from kiridashi.trust import load_public_key
from kiridashi_agent.identity import create_request, install_ticket

NOW = datetime(2030, 6, 1, tzinfo=UTC)


def name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


class Authority:
    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.pem = self._sign("plant", self.key.public_key()).public_bytes(serialization.Encoding.PEM).decode()

    def _sign(self, subject: str, public_key, days: int = 30) -> x509.Certificate:
        builder = x509.CertificateBuilder().subject_name(name(subject)).issuer_name(name("plant"))
        builder = builder.public_key(public_key).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(NOW - timedelta(days=1)).not_valid_after(NOW + timedelta(days=days))
        return builder.sign(self.key, hashes.SHA256())

    def ticket(self, request: EnrolRequest, **changes) -> EnrolTicket:
        csr = x509.load_pem_x509_csr(request.csr_pem.encode())
        certificate = self._sign(changes.pop("subject", request.device), csr.public_key(), changes.pop("days", 30))
        ticket = EnrolTicket(
            device=request.device,
            certificate_pem=certificate.public_bytes(serialization.Encoding.PEM).decode(),
            ca_pem=self.pem,
            tuf_root=FakeFleet().root.decode(),
            broker_host="broker.plant",
            broker_port=8883,
            lines=("press-3", "press-4"),
        )
        return msgspec.structs.replace(ticket, **changes)


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"


def test_a_request_proves_the_key_and_holds_no_secret(state) -> None:
    request = create_request("cam-1", state)
    csr = x509.load_pem_x509_csr(request.csr_pem.encode())
    assert csr.is_signature_valid
    assert csr.subject == name("cam-1")
    assert isinstance(csr.public_key().curve, ec.SECP256R1)
    seal = serialization.load_pem_public_key(request.seal_public_key_pem.encode())
    assert seal == load_public_key(state)
    assert "PRIVATE" not in encode_enrolment(request).decode()
    for path in ("tls/key.pem", "trust/seal.key"):
        assert stat.S_IMODE((state / path).stat().st_mode) == 0o600


def test_asking_again_keeps_the_keys(state) -> None:
    keys = [x509.load_pem_x509_csr(create_request("cam-1", state).csr_pem.encode()).public_key() for _ in range(2)]
    assert keys[0] == keys[1]


def test_a_ticket_makes_a_configuration_that_can_be_loaded(state, authority) -> None:
    ticket = authority.ticket(create_request("cam-1", state))
    config = load_config(install_ticket(ticket, state, NOW))
    assert (config.device.id, config.device.state_dir) == ("cam-1", state)
    assert (config.broker.host, config.broker.port, config.broker.key) == ("broker.plant", 8883, state / "tls/key.pem")
    assert set(config.lines) == {"press-3", "press-4"}
    assert (state / "trust/root.json").read_text() == ticket.tuf_root


def test_installing_again_keeps_the_settings_of_lines(state, authority) -> None:
    ticket = authority.ticket(create_request("cam-1", state))
    path = install_ticket(ticket, state, NOW)
    path.write_text(path.read_text().replace("[lines.press-3]", "[lines.press-3]\nthreads = 3"))
    moved = msgspec.structs.replace(ticket, broker_host="other.plant", lines=("press-5",))
    config = load_config(install_ticket(moved, state, NOW))
    assert (config.broker.host, config.lines["press-3"].threads) == ("other.plant", 3)
    assert set(config.lines) == {"press-3", "press-4", "press-5"}


@pytest.mark.parametrize(
    ("change", "error", "why"),
    [
        ({"subject": "cam-2"}, TrustError, "is for"),
        ({"ca_pem": Authority().pem}, TrustError, "not signed by its own authority"),
        ({"days": -1}, TrustError, "valid from"),
        ({"tuf_root": FakeFleet().metadata["timestamp.json"].decode()}, TrustError, "TUF root is not valid"),
        ({"tuf_root": FakeFleet().root.decode().replace('"version":1', '"version":2')}, TrustError, "TUF root"),
        ({"tuf_root": "{}"}, TrustError, "TUF root"),
        ({"certificate_pem": "nonsense"}, InputError, ""),
    ],
)
def test_a_wrong_ticket_changes_nothing(state, authority, change, error, why) -> None:
    request = create_request("cam-1", state)
    before = sorted(path for path in state.rglob("*"))
    with pytest.raises(error) as caught:
        install_ticket(authority.ticket(request, **change), state, NOW)
    assert why in caught.value.why
    assert sorted(path for path in state.rglob("*")) == before


def test_another_device_s_ticket_is_refused(state, authority, tmp_path) -> None:
    create_request("cam-1", state)
    foreign = authority.ticket(create_request("cam-1", tmp_path / "elsewhere"))
    with pytest.raises(TrustError, match="another key"):
        install_ticket(foreign, state, NOW)


def test_a_ticket_without_a_request_says_what_to_do(state, authority, tmp_path) -> None:
    ticket = authority.ticket(create_request("cam-1", tmp_path / "elsewhere"))
    with pytest.raises(StateError) as caught:
        install_ticket(ticket, state, NOW)
    assert "enroll request" in caught.value.next_step


def test_a_renamed_device_needs_another_folder(state, authority) -> None:
    install_ticket(authority.ticket(create_request("cam-1", state)), state, NOW)
    with pytest.raises(StateError, match="belongs to device 'cam-1'"):
        install_ticket(authority.ticket(create_request("cam-2", state)), state, NOW)


@pytest.mark.parametrize("damage", [b"", b"nonsense"])
def test_a_damaged_key_is_not_replaced_silently(state, damage) -> None:
    create_request("cam-1", state)
    (state / "tls/key.pem").write_bytes(damage)
    with pytest.raises(StateError, match="cannot be used"):
        create_request("cam-1", state)


class TestDocuments:
    def test_they_come_back_as_they_were(self, state, authority) -> None:
        request = create_request("cam-1", state)
        ticket = authority.ticket(request)
        assert decode_enrolment(encode_enrolment(request), EnrolRequest) == request
        assert decode_enrolment(encode_enrolment(ticket), EnrolTicket) == ticket

    @pytest.mark.parametrize(
        "change",
        [{"device": "../x"}, {"lines": ("Press",)}, {"broker_port": 0}, {"broker_port": 65536}, {"format": "x/1"}],
    )
    def test_what_is_wrong_in_them_is_refused(self, state, authority, change) -> None:
        ticket = authority.ticket(create_request("cam-1", state))
        with pytest.raises(InputError):
            decode_enrolment(encode_enrolment(msgspec.structs.replace(ticket, **change)), EnrolTicket)

    @pytest.mark.parametrize("data", [b"", b"[]", b"{}", b" " * 300_000])
    def test_other_files_are_refused(self, data) -> None:
        with pytest.raises(InputError):
            decode_enrolment(data, EnrolRequest, "x.json")
