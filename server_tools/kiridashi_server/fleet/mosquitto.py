"""The configuration of mosquitto: mutual TLS, the certificate's name as user name, and an access list by pattern.

What a device may do follows from its name alone: ``%u`` in the access list is the common name of its
certificate. Options are those of mosquitto.conf(5), version 2.0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kiridashi.artifacts import write_atomic
from kiridashi.messages import MAX_MESSAGE_BYTES, PREFIX

from kiridashi_server.fleet.authority import SERVER_IDENTITY
from kiridashi_server.fleet.connection import ClientFiles

MAX_PACKET_BYTES = MAX_MESSAGE_BYTES
_ACCESS = f"""# Who may read and write what. Device names hold no '/', '+' or '#', so %u is always one level.
user {SERVER_IDENTITY}
topic readwrite {PREFIX}/#

pattern read  {PREFIX}/d/%u/desired
pattern read  {PREFIX}/d/%u/rx
pattern write {PREFIX}/d/%u/state
pattern write {PREFIX}/d/%u/online
pattern write {PREFIX}/d/%u/evt/+
pattern write {PREFIX}/d/%u/rpc
"""


@dataclass(frozen=True)
class MosquittoSettings:
    """What differs between plants. ``bind`` empty means every interface; ``run_as`` empty keeps mosquitto's default."""

    port: int
    tls: ClientFiles
    data_folder: Path
    bind: str = ""
    run_as: str = ""


def mosquitto_config(settings: MosquittoSettings, access_list: Path) -> str:
    """The text of ``mosquitto.conf``."""
    listener = f"listener {settings.port} {settings.bind}".rstrip()
    user = f"user {settings.run_as}\n" if settings.run_as else ""
    return f"""# Kiridashi's broker: mutual TLS only, nobody anonymous, every device on its own topics.
# The account that mosquitto runs as must be able to read the three TLS files and the access list.
per_listener_settings true
{user}log_dest stderr
log_type error
log_type warning
log_type notice

{listener}
max_connections -1
allow_anonymous false
cafile {settings.tls.authority}
certfile {settings.tls.certificate}
keyfile {settings.tls.key}
tls_version tlsv1.2
require_certificate true
use_identity_as_username true
acl_file {access_list}

# A chunk is 256 KiB; without nodelay each one costs 40 ms.
set_tcp_nodelay true
max_packet_size {MAX_PACKET_BYTES}
max_queued_messages 20000
max_queued_bytes 67108864

persistence true
persistence_location {settings.data_folder}/
autosave_interval 60
persistent_client_expiration 14d
"""


def write_mosquitto_config(folder: Path, settings: MosquittoSettings) -> Path:
    """Write ``mosquitto.conf`` and ``access.acl`` into ``folder``; returns the path of the former."""
    access_list = folder / "access.acl"
    write_atomic(access_list, _ACCESS.encode(), 0o600)
    path = folder / "mosquitto.conf"
    write_atomic(path, mosquitto_config(settings, access_list).encode())
    return path
