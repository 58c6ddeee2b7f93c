"""``kiridashi bank``: records from checkpoints, out of and into signed archives, and over to new weights."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import get_args

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from kiridashi.artifacts import write_atomic
from kiridashi.command import Command, Outcome
from kiridashi.errors import InputError

from kiridashi_server.bank.archive import public_hex
from kiridashi_server.bank.record import Policy, check_policy
from kiridashi_server.bank.sharing import carry_records, export_records, import_records
from kiridashi_server.bank.store import Bank
from kiridashi_server.cli.bank_source import (
    SHORT,
    add_bank_argument,
    add_model_arguments,
    add_record_argument,
    load_backbone,
    row_data,
)
from kiridashi_server.fleet.keys import read_private_key, write_private_key

_KEYS, _PRIVATE, _PUBLIC = "keys", "export.pem", "export.pub"


def _configure_add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="FILE", help="safetensors, or a torch state dict")
    parser.add_argument("--task-name", required=True, metavar="NAME", help="the task that the model was made for")
    parser.add_argument("--labels", default="", metavar="A,B", help="its classes, if known")
    add_model_arguments(parser)


def _configure_policy(parser: argparse.ArgumentParser) -> None:
    add_record_argument(parser)
    parser.add_argument("policy", choices=get_args(Policy), help="who may use it")


def _configure_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("archive", type=Path, help="the file to write")
    parser.add_argument(
        "--record",
        action="append",
        default=[],
        metavar="RECORD",
        help="only this one (default: all that are shareable)",
    )
    parser.add_argument(
        "--key", type=Path, metavar="FILE", help="Ed25519 key, PEM (default: the bank's, made if missing)"
    )
    add_bank_argument(parser)


def _configure_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("archive", type=Path, help="a file that 'kiridashi bank export' wrote")
    parser.add_argument(
        "--trust",
        type=Path,
        action="append",
        required=True,
        metavar="PUBKEY",
        help="public key of who may have signed it",
    )
    add_bank_argument(parser)


def _configure_carry(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from", dest="source", metavar="FINGERPRINT", help="of this backbone only (default: all others)"
    )
    add_model_arguments(parser)


def _add(arguments: argparse.Namespace) -> Outcome:
    labels = tuple(label.strip() for label in arguments.labels.split(",") if label.strip())
    if not arguments.model.is_file():
        raise InputError(f"there is no file {arguments.model}")
    from kiridashi_server.bank.adding import record_from_model

    record = record_from_model(load_backbone(arguments), arguments.model, arguments.task_name, labels)
    with Bank.open(arguments.bank) as bank:
        is_new = bank.add(record)
    data = {**row_data(record), "origin": record.provenance.origin, "new": is_new}
    state = "added" if is_new else "known already"
    return Outcome(data, f"{record.task}: {state}, {record.id[:SHORT]}, from a {record.kind} checkpoint")


def _policy(arguments: argparse.Namespace) -> Outcome:
    with Bank.open(arguments.bank, create=False) as bank:
        record_id = bank.set_policy(arguments.record, check_policy(arguments.policy))
    return Outcome({"id": record_id, "policy": arguments.policy}, f"{record_id[:SHORT]} is {arguments.policy}")


def _export(arguments: argparse.Namespace) -> Outcome:
    with Bank.open(arguments.bank, create=False) as bank:
        key, public = _signing_key(arguments.key, arguments.bank / _KEYS)
        ids = export_records(bank, arguments.archive, key, arguments.record)
    signer = public_hex(key.public_key())
    data = {"archive": str(arguments.archive), "records": list(ids), "signer": signer, "public_key": str(public)}
    text = (
        f"{len(ids)} records in {arguments.archive}, signed by {signer[:16]}\n"
        f"next: give them {public} over a way they trust; kiridashi bank import FILE --trust {public.name}"
    )
    return Outcome(data, text)


def _import(arguments: argparse.Namespace) -> Outcome:
    trusted = [_public_key(path) for path in arguments.trust]
    if not arguments.archive.is_file():
        raise InputError(f"there is no file {arguments.archive}")
    with Bank.open(arguments.bank) as bank:
        before = bank.backbones()
        done = import_records(bank, arguments.archive, trusted)
    lines = [f"{len(done.new)} new records, {len(done.known)} known already, signed by {done.signer[:16]}"]
    lines += [
        f"backbone {name[:SHORT]}: {count} records"
        + ("" if name in before else "; the bank had none of it, and a cut of another one does not use them")
        for name, count in sorted(done.backbones.items())
    ]
    data = dataclasses.asdict(done) | {"new_backbones": sorted(set(done.backbones) - set(before))}
    return Outcome(data, "\n".join(lines))


def _carry(arguments: argparse.Namespace) -> Outcome:
    with Bank.open(arguments.bank, create=False) as bank:
        backbone = load_backbone(arguments)
        done = carry_records(bank, backbone.fingerprint, backbone.layout.digest, source=arguments.source)
    left = sorted({record.task for record in done.left})
    lines = [f"{len(done.new)} records carried over, {len(done.known)} known already; their heads were left behind"]
    if left:
        lines.append(
            f"of another layout, learn again: kiridashi bank learn {' '.join(f'--task {task}' for task in left)}"
        )
    return Outcome({"new": list(done.new), "known": list(done.known), "learn_again": left}, "\n".join(lines))


def _signing_key(path: Path | None, folder: Path) -> tuple[Ed25519PrivateKey, Path]:
    """The key and where its public half lies, which is written when it is not there."""
    if path is None:
        path = folder / _PRIVATE
        if not path.exists():
            write_private_key(path, Ed25519PrivateKey.generate())
    key = read_private_key(path)
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{path} cannot sign archives", why="it is no Ed25519 key")
    public = path.with_name(_PUBLIC) if path.name == _PRIVATE else path.with_suffix(".pub")
    pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    if not public.exists():
        write_atomic(public, pem)
    elif public.read_bytes() != pem:
        raise InputError(f"{public} is not the public half of {path}", next_step="move one of them away")
    return key, public


def _public_key(path: Path) -> Ed25519PublicKey:
    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is not a public key", why=str(error), next_step="pass the .pub file of the signer"
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise InputError(f"{path} is not an Ed25519 key", next_step="pass the .pub file of the signer")
    return key


COMMANDS = (
    Command("bank add", "make a record from a tuned or pruned checkpoint, without its data", _configure_add, _add),
    Command("bank policy", "say who may use a record", _configure_policy, _policy),
    Command("bank export", "write records into a signed archive", _configure_export, _export),
    Command("bank import", "take over records of an archive, if its signer is trusted", _configure_import, _import),
    Command(
        "bank carry", "copy records over to a backbone with new weights and the same layout", _configure_carry, _carry
    ),
)
