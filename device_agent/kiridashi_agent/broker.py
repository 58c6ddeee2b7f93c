"""Where the broker is, as whom to connect, and why that may fail."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from kiridashi.config import Config
from kiridashi.errors import InputError


@dataclass(frozen=True)
class TlsFiles:
    """PEM files of the mutual TLS connection."""

    ca: Path
    certificate: Path
    key: Path

    def context(self) -> ssl.SSLContext:
        """A client context: TLS 1.2 or later, the server's name is checked, only our CA is trusted.

        Raises:
            InputError: a file is missing or is not what it should be.
        """
        try:
            context = ssl.create_default_context(cafile=str(self.ca))
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise InputError(
                f"the TLS files {self.ca}, {self.certificate}, {self.key} cannot be used",
                why=str(error),
                next_step="install the ticket of the enrolment again: kiridashi-agent enroll install",
            ) from error
        return context


@dataclass(frozen=True)
class MqttSettings:
    """Where to connect and as whom; times in seconds."""

    device: str
    host: str
    port: int
    tls: TlsFiles | None = None
    window: int = 4
    request_timeout_s: float = 10.0
    keepalive_s: int = 30
    session_expiry_s: int = 24 * 3600
    will_delay_s: int = 30

    @classmethod
    def from_config(cls, config: Config) -> MqttSettings:
        """The settings that a configuration file stands for."""
        broker, limits = config.broker, config.limits
        tls = None
        if broker.ca is not None and broker.cert is not None and broker.key is not None:
            tls = TlsFiles(broker.ca, broker.cert, broker.key)
        return cls(
            device=config.device.id,
            host=broker.host,
            port=broker.port,
            tls=tls,
            window=limits.window,
            request_timeout_s=limits.request_timeout_s,
        )


def diagnose(settings: MqttSettings, timeout_s: float = 5.0) -> str:
    """Why a connection to the broker fails, as far as TCP and TLS can tell; empty when both work.

    Raises:
        InputError: the TLS files cannot be used.
    """
    context = settings.tls.context() if settings.tls else None
    try:
        with socket.create_connection((settings.host, settings.port), timeout_s) as raw:
            if context is None:
                return ""
            with context.wrap_socket(raw, server_hostname=settings.host) as secured:
                # With TLS 1.3 a refused client certificate only shows at the first read.
                secured.settimeout(0.5)
                secured.recv(1)
    except TimeoutError:
        return "" if context is not None and _listens(settings, timeout_s) else f"no answer in {timeout_s:g} s"
    except ssl.SSLCertVerificationError as error:
        return f"the broker's certificate was not accepted: {error.verify_message}"
    except ssl.SSLError as error:
        return f"the TLS handshake failed: {error.reason or error}"
    except OSError as error:
        return f"no connection: {error.strerror or error}"
    return "the broker closed the connection before anything was sent"


def _listens(settings: MqttSettings, timeout_s: float) -> bool:
    try:
        with socket.create_connection((settings.host, settings.port), timeout_s):
            return True
    except OSError:
        return False
