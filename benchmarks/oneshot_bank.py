"""The bank that a quick run of the benchmark of reuse starts from: 32 records, learnt by the long run with seed 0.

``python -m benchmarks.oneshot_bank BANK`` writes the archive anew from such a bank and prints its digest and key, which
then have to be put here. The key that signs is thrown away: nobody can sign another archive that is taken for this one.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from kiridashi.artifacts import sha256_file
from kiridashi_server.bank.archive import public_hex
from kiridashi_server.bank.sharing import export_records, import_records
from kiridashi_server.bank.store import Bank

from benchmarks.oneshot_tasks import DATA, task_names

ARCHIVE = DATA / "oneshot-bank.kbank"
SHA256 = "a9896fa4e5c754f9de1da899a0e3ac53bd0c5aa26003d5b2f4c6a827283945f7"
SIGNED_BY = "81b20ab7e0be2e41be95cc0a7aab567f0428edcbef11979defbe0f54532be682"


def shipped_bank(folder: Path) -> None:
    """Fill the bank in ``folder`` with the shipped records, after digest and signature were verified.

    Raises:
        ValueError: the archive is not the one that this code names.
        TrustError: it was altered.
    """
    if sha256_file(ARCHIVE) != SHA256:
        raise ValueError(f"{ARCHIVE} is not the file that this benchmark was written for: git checkout it")
    with Bank.open(folder) as bank:
        import_records(bank, ARCHIVE, [Ed25519PublicKey.from_public_bytes(bytes.fromhex(SIGNED_BY))])


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the archive."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.oneshot_bank", description="write the shipped bank anew"
    )
    parser.add_argument("bank", type=Path, metavar="BANK", help="with a record of every bank task of the benchmark")
    source = parser.parse_args(arguments).bank
    key = Ed25519PrivateKey.generate()
    with tempfile.TemporaryDirectory(prefix="kiridashi-bank-") as work:
        copied = Path(work, "bank")
        shutil.copytree(source, copied)
        with Bank.open(copied, create=False) as bank:
            for task in task_names("bank"):
                bank.set_policy(task, "shareable")
            kept = export_records(bank, ARCHIVE, key)
    print(f"{len(kept)} records, {ARCHIVE.stat().st_size:,} bytes")
    print(f'SHA256 = "{sha256_file(ARCHIVE)}"\nSIGNED_BY = "{public_hex(key.public_key())}"')
    return 0


if __name__ == "__main__":
    sys.exit(main())
