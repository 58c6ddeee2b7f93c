"""Who gets which certificate."""

from __future__ import annotations

import stat
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from kiridashi.errors import InputError, StateError
from kiridashi_server.fleet.authority import Authority, CertificateLife
from kiridashi_server.fleet.keys import write_private_key

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def _request(*names, key=None, extensions=()):
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.fixture
def authority(tmp_path):
    return Authority.init(tmp_path / "ca", "Kobe 2", NOW)


def test_a_device_certificate_says_the_name_and_nothing_the_request_adds(authority):
    greedy = (
        x509.BasicConstraints(ca=True, path_length=3),
        x509.SubjectAlternativeName([x509.DNSName("broker.kiridashi")]),
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
    )
    certificate = authority.sign_device(_request("cam-07", extensions=greedy), "cam-07", NOW)
    certificate.verify_directly_issued_by(authority.certificate)
    assert certificate.subject.rfc4514_string() == "CN=cam-07"
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]
    with pytest.raises(x509.ExtensionNotFound):
        certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert certificate.not_valid_after_utc == NOW + CertificateLife().device


@pytest.mark.parametrize(
    ("request_pem", "device", "message"),
    [
        (b"not a request", "cam-07", "cannot be read"),
        (_request("cam-08"), "cam-07", "the enrolment for 'cam-07'"),
        (_request("cam-07", "server.kiridashi"), "cam-07", "the enrolment for 'cam-07'"),
        (_request("server.kiridashi"), "server.kiridashi", "not a valid device name"),
        (_request(), "cam-07", "the enrolment for 'cam-07'"),
        (_request("cam-07", key=ec.generate_private_key(ec.SECP384R1())), "cam-07", "another kind than EC P-256"),
        (_request("cam-07", key=rsa.generate_private_key(65537, 2048)), "cam-07", "another kind than EC P-256"),
    ],
)
def test_requests_that_are_not_signed(authority, request_pem, device, message):
    with pytest.raises(InputError) as caught:
        authority.sign_device(request_pem, device, NOW)
    assert message in str(caught.value)


def test_a_request_without_proof_of_the_key_is_refused(authority):
    der = bytearray(x509.load_pem_x509_csr(_request("cam-07")).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1
    pem = x509.load_der_x509_csr(bytes(der)).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(InputError, match="not signed by its own key"):
        authority.sign_device(pem, "cam-07", NOW)


def test_the_broker_certificate_names_its_hosts(authority, tmp_path):
    files = authority.issue_broker(tmp_path / "tls", ["broker.plant.example", "10.1.2.3", "localhost"], NOW)
    certificate = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "broker.plant.example"]
    assert names.get_values_for_type(x509.IPAddress) == [ip_address("127.0.0.1"), ip_address("10.1.2.3")]
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert stat.S_IMODE(files.key.stat().st_mode) == 0o600
    with pytest.raises(InputError, match="neither an IP address nor a host name"):
        authority.issue_broker(tmp_path / "tls", ["two words"], NOW)


def test_an_authority_is_kept_and_opened_again(authority, tmp_path):
    again = Authority.init(tmp_path / "ca", "another name", NOW + timedelta(days=1))
    assert again.certificate == authority.certificate
    assert stat.S_IMODE((tmp_path / "ca").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "ca" / "ca.key").stat().st_mode) == 0o600


def test_a_damaged_authority_is_said_to_be(authority, tmp_path):
    write_private_key(tmp_path / "ca" / "ca.key", ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(StateError, match="do not belong together"):
        Authority.open(tmp_path / "ca")
    (tmp_path / "ca" / "ca.key").unlink()
    with pytest.raises(StateError, match="is missing"):
        Authority.open(tmp_path / "ca")
    (tmp_path / "ca" / "ca.pem").write_text("?")
    with pytest.raises(StateError, match="cannot be opened"):
        Authority.open(tmp_path / "ca")
