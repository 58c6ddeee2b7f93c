"""The plant's certificate authority: it signs the broker's, the server's and the devices' certificates.

A device asks with a PKCS #10 request. Of the request only the public key and the common name are used, and the
name must be the one that was enrolled: whatever else it asks for (extensions, other names, a longer life) is
ignored. Certificates follow RFC 5280; the key usages keep a device's certificate from serving as the broker's.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from kiridashi.artifacts import write_atomic
from kiridashi.errors import InputError, StateError
from kiridashi.messages import check_name

from kiridashi_server.fleet.keys import read_private_key, write_private_key

# No device can have these names: device names hold no dot.
SERVER_IDENTITY = "server.kiridashi"
BROKER_IDENTITY = "broker.kiridashi"
DEFAULT_HOSTS = ("localhost", "127.0.0.1")
# A device without a battery-backed clock starts in the past: certificates are valid from a day before signing.
_BACKDATE = timedelta(days=1)


@dataclass(frozen=True)
class CertificateLife:
    """How long each kind of certificate is valid."""

    authority: timedelta = timedelta(days=20 * 365)
    broker: timedelta = timedelta(days=5 * 365)
    server: timedelta = timedelta(days=5 * 365)
    device: timedelta = timedelta(days=5 * 365)


@dataclass(frozen=True)
class Credentials:
    """A certificate and its private key, as paths of PEM files."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class Authority:
    """An opened certificate authority. ``certificate`` is the one that every device pins."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    life: CertificateLife = CertificateLife()

    @classmethod
    def init(cls, folder: Path, plant: str, now: datetime, life: CertificateLife | None = None) -> Authority:
        """Create the authority's key and self-signed certificate in ``folder``; an existing one is kept.

        Raises:
            StateError: the folder holds a damaged authority.
        """
        life = life or CertificateLife()
        if (folder / "ca.pem").is_file():
            return cls.open(folder, life)
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{plant} Kiridashi CA")])
        builder = _builder(name, name, key.public_key(), now, life.authority)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_key_usage(signs_certificates=True), critical=True)
        certificate = builder.sign(key, hashes.SHA256())
        write_private_key(folder / "ca.key", key)
        write_atomic(folder / "ca.pem", certificate.public_bytes(serialization.Encoding.PEM))
        return cls(certificate, key, life)

    @classmethod
    def open(cls, folder: Path, life: CertificateLife | None = None) -> Authority:
        """Open an authority.

        Raises:
            StateError: a file is missing or damaged, or key and certificate do not belong together.
        """
        try:
            certificate = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
        except (OSError, ValueError) as error:
            raise StateError(f"the certificate authority in {folder} cannot be opened", why=str(error)) from error
        key = read_private_key(folder / "ca.key")
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise StateError(f"the key and the certificate in {folder} do not belong together")
        return cls(certificate, key, life or CertificateLife())

    @property
    def certificate_pem(self) -> bytes:
        """The authority's own certificate."""
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    def issue_broker(self, folder: Path, hosts: Sequence[str], now: datetime) -> Credentials:
        """Write key and certificate of the broker, for ``localhost``, ``127.0.0.1`` and the given hosts.

        Raises:
            InputError: a host is neither an IP address nor a host name in ASCII.
        """
        names = tuple(dict.fromkeys((*DEFAULT_HOSTS, *hosts)))
        alternatives = x509.SubjectAlternativeName([_alternative_name(host) for host in names])
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
        return self._issue(folder / "broker", BROKER_IDENTITY, (alternatives, usage), now, self.life.broker)

    def issue_server(self, folder: Path, now: datetime) -> Credentials:
        """Write key and certificate with which the plant server itself connects to the broker."""
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
        return self._issue(folder / "server", SERVER_IDENTITY, (usage,), now, self.life.server)

    def sign_device(self, csr_pem: bytes, device: str, now: datetime) -> x509.Certificate:
        """Sign a device's request: client certificate with the common name ``device`` and nothing else of the CSR.

        Raises:
            InputError: not a request, its own signature is wrong, its key is not EC P-256, or it names another device.
        """
        request = read_device_request(csr_pem, device)
        public_key = request.public_key()
        if not isinstance(public_key, ec.EllipticCurvePublicKey):
            raise InputError(f"the request of device '{device}' has no EC key")
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, device)])
        builder = _builder(subject, self.certificate.subject, public_key, now, self.life.device)
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
        return self._sign(builder, (usage,))

    def _issue(
        self,
        stem: Path,
        name: str,
        extensions: Sequence[x509.ExtensionType],
        now: datetime,
        life: timedelta,
    ) -> Credentials:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = _builder(subject, self.certificate.subject, key.public_key(), now, life)
        certificate = self._sign(builder, extensions)
        credentials = Credentials(stem.with_suffix(".pem"), stem.with_suffix(".key"))
        write_private_key(credentials.key, key)
        write_atomic(credentials.certificate, certificate.public_bytes(serialization.Encoding.PEM))
        return credentials

    def _sign(self, builder: x509.CertificateBuilder, extensions: Sequence[x509.ExtensionType]) -> x509.Certificate:
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_key_usage(signs_certificates=False), critical=True)
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        return builder.add_extension(issuer, critical=False).sign(self.key, hashes.SHA256())


def read_device_request(csr_pem: bytes, device: str) -> x509.CertificateSigningRequest:
    """Check a device's PKCS #10 request: signature, key type and name.

    Raises:
        InputError: any of them is wrong.
    """
    again = f"run 'kiridashi-agent enroll request' on device '{device}' again"
    try:
        request = x509.load_pem_x509_csr(csr_pem)
        key = request.public_key()
        signed = request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(
            f"the certificate request of device '{device}' cannot be read", why=str(error), next_step=again
        ) from error
    if not signed:
        raise InputError(
            f"the certificate request of device '{device}' is not signed by its own key",
            why="it was changed on the way, or the asker does not hold the key",
            next_step=again,
        )
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InputError(
            f"the certificate request of device '{device}' has a key of another kind than EC P-256",
            next_step=again,
        )
    names = [str(name.value) for name in request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if names != [check_name(device, "device")]:
        raise InputError(
            f"the certificate request is for {names or 'nobody'}, the enrolment for '{device}'",
            why="a certificate is only ever given for the enrolled name",
            next_step=again,
        )
    return request


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public_key: ec.EllipticCurvePublicKey,
    now: datetime,
    life: timedelta,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(now + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not host or not host.isascii() or any(character.isspace() for character in host):
        raise InputError(f"'{host}' is neither an IP address nor a host name in ASCII")
    return x509.DNSName(host)
