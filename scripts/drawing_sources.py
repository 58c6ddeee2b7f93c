"""Drawings from pinned packages of the npm registry: pictograms, and letters as a typeface draws them."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path

import msgspec
import numpy as np
from kiridashi_server.tasks.drawings import Package
from kiridashi_server.tasks.errors import TaskError
from kiridashi_server.tasks.task import SplitName
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

CELL, MARGIN = 48, 1
_PLATE, _INK, _LETTER = (236, 234, 228, 255), (28, 28, 32, 255), 34
"""A letter is printed on a plate, so that it can be read on every background; its height on the plate in pixels."""


class Style(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A drawing style: its package, and what it is used for.

    Attributes:
        member: a drawing's file, from its name; of a typeface the font file, from the script that the name begins with.
        splits: what its drawings are dealt to, in this order.
        kind: tasks of a kind use the styles of that kind.
        table: the list of pictograms (``emoji.json`` of emoji-data), in one of the packages.
        name_without: code points that the package leaves out of its file names.
    """

    style: str
    package: str
    version: str
    integrity: str
    licence: str
    member: str
    splits: list[SplitName]
    kind: str = "pictogram"
    table: str = ""
    name_without: list[str] = []

    @property
    def origin(self) -> Package:
        """What the pack's recipe says of it."""
        return Package(self.style, self.package, self.version, self.integrity, self.licence)


class Pictogram(msgspec.Struct, frozen=True):
    """An entry of the table of pictograms."""

    image: str
    short_name: str = ""
    subcategory: str = ""
    sort_order: int = 0
    skin_variations: dict[str, Pictogram] = {}

    @property
    def name(self) -> str:
        """Its code points, as drawings are named by them."""
        return Path(self.image).stem


class Sources:
    """The packages, opened and verified."""

    def __init__(self, folder: Path, styles: list[Style]) -> None:
        self.styles = {style.style: style for style in styles}
        self._archives = {style.style: _open_package(folder, style) for style in styles}
        tables = [json.loads(self._read(style.style, style.table)) for style in styles if style.table]
        self.pictograms = [entry for table in tables for entry in msgspec.convert(table, list[Pictogram])]
        self._variants = {
            entry.short_name: [entry.name, *(variant.name for variant in entry.skin_variations.values())]
            for entry in self.pictograms
        }

    def variants(self, short_name: str) -> list[str]:
        """Code points of a short name and of its skin tones."""
        if short_name not in self._variants:
            raise TaskError(f"there is no pictogram '{short_name}'", next_step="correct the recipe")
        return self._variants[short_name]

    def of_kind(self, kind: str) -> list[str]:
        """The styles of a kind."""
        return [name for name, style in self.styles.items() if style.kind == kind]

    def has(self, style: str, name: str) -> bool:
        """Whether a style has a drawing."""
        return self._member(style, name) in self._archives[style][1]

    def drawing(self, style: str, name: str) -> Image.Image:
        """A drawing, RGBA, trimmed and centred in a square cell with a transparent margin."""
        data = self._read(style, self._member(style, name))
        if self.styles[style].kind == "type":
            image = _letter(data, chr(int(name.partition("-")[2], 16)))
        else:
            image = Image.open(io.BytesIO(data)).convert("RGBA")
        trimmed = image.crop(image.getchannel("A").getbbox())
        scale = (CELL - 2 * MARGIN) / max(trimmed.size)
        width, height = (max(1, round(side * scale)) for side in trimmed.size)
        cell = Image.new("RGBA", (CELL, CELL), (0, 0, 0, 0))
        resized = trimmed.resize((width, height), Image.Resampling.LANCZOS)
        cell.paste(resized, ((CELL - width) // 2, (CELL - height) // 2))
        return cell

    def look(self, style: str, name: str) -> NDArray[np.float64]:
        """A drawing on grey at 32 x 32 pixels, for comparisons: float64 [3072], grey levels."""
        drawing = self.drawing(style, name)
        grey = Image.new("RGBA", drawing.size, (128, 128, 128, 255))
        grey.alpha_composite(drawing)
        return np.asarray(grey.convert("RGB").resize((32, 32), Image.Resampling.BOX), dtype=np.float64).ravel()

    def _member(self, style: str, name: str) -> str:
        source = self.styles[style]
        if source.kind == "type":
            return source.member.format(name.partition("-")[0])
        return source.member.format("-".join(part for part in name.split("-") if part not in source.name_without))

    def _read(self, style: str, member: str) -> bytes:
        archive, members = self._archives[style]
        file = archive.extractfile(members[member]) if member in members else None
        if file is None:
            raise TaskError(f"the package of style '{style}' has no {member}")
        return file.read()


def _letter(font_file: bytes, letter: str) -> Image.Image:
    """A letter on a plate."""
    scale = 4
    plate = Image.new("RGBA", (CELL * scale, CELL * scale), _PLATE)
    font = ImageFont.truetype(io.BytesIO(font_file), _LETTER * scale, layout_engine=ImageFont.Layout.BASIC)
    middle = CELL * scale / 2
    ImageDraw.Draw(plate).text((middle, middle), letter, fill=_INK, font=font, anchor="mm")
    return plate


def _open_package(folder: Path, style: Style) -> tuple[tarfile.TarFile, dict[str, tarfile.TarInfo]]:
    file = folder / f"{style.package.lstrip('@').replace('/', '-')}-{style.version}.tgz"
    data = file.read_bytes()
    digest = "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()
    if digest != style.integrity:
        raise TaskError(f"{file} is not the pinned package", why=f"its integrity is {digest}")
    archive = tarfile.open(fileobj=io.BytesIO(gzip.decompress(data)))  # noqa: SIM115 - read until the end
    return archive, {member.name: member for member in archive.getmembers()}
