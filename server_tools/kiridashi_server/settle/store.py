"""What was settled, in a file beside the stock, and whether it holds for a cut that is to be made now."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from kiridashi.artifacts import write_atomic
from kiridashi.errors import InputError

from kiridashi_server.backbone import Backbone
from kiridashi_server.recover.iterations import RecoverSettings
from kiridashi_server.settle.choice import DEFAULT, Choice, described, unsettled
from kiridashi_server.stock.pieces import StockSettings
from kiridashi_server.stock.store import Making, StockError

FILE = "recovery.json"
_FORMAT = "kiridashi-recovery-1"
_AGAIN = "settle it again: kiridashi stock settle"


class Settled(msgspec.Struct, frozen=True, kw_only=True):
    """How cuts are recovered, and what that holds for.

    Attributes:
        format: of the file.
        backbone_fingerprint, layout_digest, input_size: what is cut.
        tasks: names of the tasks that the stock was made from, with the digests of their samples.
        stock: how that stock was made.
        seed: of everything random.
        played: the tasks among them that were held back and played new.
        with_stock, without_stock: for lines that are cut out of that stock, and for those cut out of the backbone.
        seconds: wall time, the smaller stock's included.
    """

    format: str = _FORMAT
    backbone_fingerprint: str
    layout_digest: str
    input_size: tuple[int, int, int]
    tasks: dict[str, str]
    stock: StockSettings
    seed: int
    played: tuple[str, ...]
    with_stock: Choice
    without_stock: Choice
    seconds: float

    def is_for(self, making: Making) -> bool:
        """Whether it was settled for a stock that came about like this."""
        return (self.tasks, self.stock) == (making.tasks, making.settings)


@dataclass(frozen=True)
class Recovery:
    """Settings for a cut, and in words where they come from."""

    settings: RecoverSettings
    reason: str

    def but(self, iterations: int) -> Recovery:
        """The same with so many iterations, because somebody asks for them."""
        settings = replace(self.settings, iterations=iterations)
        return Recovery(settings, f"{described(settings)}: as asked for")


def save_settled(folder: Path, settled: Settled) -> Path:
    """Write the file into the folder, whole or not at all.

    Raises:
        StockError: it cannot be written.
    """
    path = folder / FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, msgspec.json.format(msgspec.json.encode(settled), indent=2) + b"\n")
    except OSError as error:
        raise StockError(
            f"{path} cannot be written", why=str(error), next_step="make room, then run it again"
        ) from error
    return path


def read_settled(folder: Path) -> Settled | None:
    """What was settled for the stock in ``folder``, if anything was.

    Raises:
        StockError: the file cannot be read.
    """
    path = folder / FILE
    try:
        settled = msgspec.json.decode(path.read_bytes(), type=Settled)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, InputError) as error:
        raise StockError(f"{path} cannot be read", why=str(error), next_step=_AGAIN) from error
    if settled.format != _FORMAT:
        raise StockError(f"{path} is nothing that this version reads", next_step=_AGAIN)
    return settled


def recovery_for(
    settled: Settled | None,
    backbone: Backbone,
    making: Making | None,
    default: RecoverSettings = DEFAULT,
) -> Recovery:
    """How a cut of the backbone is recovered: as settled if that is for such a cut, else by the defaults.

    Args:
        settled: what was settled, if anything was.
        backbone: what is cut.
        making: how the stock came about that the cut is made out of; ``None`` without a stock.
        default: the defaults.
    """
    if settled is None:
        return _unsettled("nothing was settled for this bank", default)
    known = (settled.backbone_fingerprint, settled.layout_digest, settled.input_size)
    if known != (backbone.fingerprint, backbone.layout.digest, backbone.input_size):
        return _unsettled(f"{FILE} is of another backbone or image size", default)
    if making is not None and not settled.is_for(making):
        return _unsettled(f"{FILE} is of another stock", default)
    choice = settled.without_stock if making is None else settled.with_stock
    return Recovery(choice.settings, choice.reason)


def _unsettled(why: str, default: RecoverSettings) -> Recovery:
    choice = unsettled(why, default)
    return Recovery(choice.settings, choice.reason)
