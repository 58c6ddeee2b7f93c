"""A stock in a folder: one safetensors file a piece, and a manifest that says what it is and holds their digests."""

from __future__ import annotations

from pathlib import Path

import msgspec
from kiridashi.artifacts import sha256_file, write_atomic
from kiridashi.errors import ExitCode, KiridashiError

from kiridashi_server.backbone import Backbone
from kiridashi_server.graph.cut import load_cut, save_cut
from kiridashi_server.graph.plan import Plan
from kiridashi_server.stock.pieces import Piece, Stock, StockSettings

MANIFEST = "stock.json"
_FORMAT = "kiridashi-stock-1"


class StockError(KiridashiError):
    """A stock is missing, damaged, or of another backbone."""

    exit_code = ExitCode.STATE


class PieceEntry(msgspec.Struct, frozen=True):
    """A piece's file, its SHA-256, and how many parameters it has."""

    name: str
    sha256: str
    parameters: int


class Making(msgspec.Struct, frozen=True):
    """How a stock came about.

    Attributes:
        tasks: names of the tasks that it was tuned on, with the digests of their samples.
        records: ids of the bank's records whose scores decided the cuts.
        settings, seed: of :class:`~kiridashi_server.stock.pieces.StockMaker`.
        seconds: wall time.
    """

    tasks: dict[str, str]
    records: tuple[str, ...]
    settings: StockSettings
    seed: int
    seconds: float


class StockManifest(msgspec.Struct, frozen=True):
    """What a stock is: the backbone it is of, how it was made, and its pieces, the largest first."""

    format: str
    backbone_fingerprint: str
    layout_digest: str
    input_size: tuple[int, int, int]
    making: Making
    pieces: tuple[PieceEntry, ...]


def save_stock(folder: Path, stock: Stock, backbone: Backbone, making: Making) -> StockManifest:
    """Write the pieces, then the manifest, then remove what an earlier stock in the folder does not share with it.

    Until the manifest is replaced, an earlier stock stays as it was.

    Raises:
        StockError: the folder cannot be written, or the disk is full.
    """
    try:
        return _save(folder, stock, backbone, making)
    except OSError as error:
        raise StockError(
            f"the stock cannot be written to {folder}",
            why=str(error),
            next_step="make room or choose another folder, then run the same command again",
        ) from error


def _save(folder: Path, stock: Stock, backbone: Backbone, making: Making) -> StockManifest:
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, piece in enumerate(stock.pieces):
        path = folder / f"piece-{number}-{stock.digest[:12]}.safetensors"
        save_cut(path, piece.plan, piece.program)
        entries.append(PieceEntry(path.name, sha256_file(path), backbone.costs.parameters(piece.plan.counts)))
    manifest = StockManifest(
        format=_FORMAT,
        backbone_fingerprint=stock.backbone_fingerprint,
        layout_digest=stock.layout_digest,
        input_size=backbone.input_size,
        making=making,
        pieces=tuple(entries),
    )
    write_atomic(folder / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
    for path in folder.glob("piece-*.safetensors"):
        if path.name not in {entry.name for entry in entries}:
            path.unlink()
    return manifest


def read_manifest(folder: Path) -> StockManifest:
    """What the stock in ``folder`` is.

    Raises:
        StockError: there is none, or its manifest cannot be read.
    """
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=StockManifest)
    except FileNotFoundError as error:
        raise StockError(f"there is no stock in {folder}", next_step="make one: kiridashi stock make") from error
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise StockError(f"the stock in {folder} cannot be read", why=str(error), next_step=_AGAIN) from error
    if manifest.format != _FORMAT or any(Path(entry.name).name != entry.name for entry in manifest.pieces):
        raise StockError(f"{folder / MANIFEST} is no stock that this version reads", next_step=_AGAIN)
    return manifest


def load_stock(folder: Path, backbone: Backbone) -> Stock:
    """The stock in ``folder``, every file checked against its digest.

    Raises:
        StockError: there is none, it is of another backbone, or a file is missing or changed.
    """
    manifest = read_manifest(folder)
    wanted = (backbone.fingerprint, backbone.layout.digest)
    if (manifest.backbone_fingerprint, manifest.layout_digest) != wanted:
        raise StockError(
            f"the stock in {folder} is of another backbone",
            why=f"its fingerprint is {manifest.backbone_fingerprint[:12]}, that of {backbone.name} {wanted[0][:12]}",
            next_step=f"{_AGAIN}, or name another with --stock",
        )
    if manifest.input_size != backbone.input_size:
        raise StockError(
            f"the stock in {folder} is for images of {manifest.input_size[1]} pixels, not {backbone.input_size[1]}",
            next_step=f"use --image-size {manifest.input_size[1]}, or name another stock with --stock",
        )
    pieces = []
    for entry in manifest.pieces:
        path = folder / entry.name
        if not path.is_file() or sha256_file(path) != entry.sha256:
            raise StockError(f"{path} is missing or changed", next_step=_AGAIN)
        pieces.append(Piece(*load_cut(backbone.program, backbone.tracking, path)))
    if not pieces or pieces[0].plan != Plan.full(backbone.layout):
        raise StockError(f"the first piece of the stock in {folder} is not the whole backbone", next_step=_AGAIN)
    return Stock(manifest.backbone_fingerprint, manifest.layout_digest, tuple(pieces))


_AGAIN = "make it again: kiridashi stock make"
