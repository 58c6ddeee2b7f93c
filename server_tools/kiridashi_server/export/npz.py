"""Archives of arrays whose bytes depend on their content alone."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from kiridashi.artifacts import write_atomic
from numpy.typing import NDArray

_EPOCH = (1980, 1, 1, 0, 0, 0)
_UNIX, _FILE_MODE = 3, 0o644


def deterministic_npz(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write an ``.npz`` that ``numpy.load`` reads without pickle: sorted names, no time stamps, uncompressed.

    Compression is left out because its output differs between versions of the library.

    Raises:
        ValueError: an array holds Python objects.
    """
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(arrays):
            entry = zipfile.ZipInfo(f"{name}.npy", _EPOCH)
            entry.create_system, entry.external_attr = _UNIX, _FILE_MODE << 16
            content = io.BytesIO()
            np.lib.format.write_array(content, np.asarray(arrays[name], order="C"), (1, 0), allow_pickle=False)
            archive.writestr(entry, content.getvalue())
    write_atomic(path, whole.getvalue())
