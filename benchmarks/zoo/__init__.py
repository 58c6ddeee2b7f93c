"""Architectures that this project did not write, in small configurations with random weights."""

from collections.abc import Mapping

from benchmarks.zoo.classification import CLASSIFICATION
from benchmarks.zoo.dense import DENSE
from benchmarks.zoo.entry import Entry

ZOO: Mapping[str, Entry] = {**CLASSIFICATION, **DENSE}

__all__ = ["ZOO", "Entry"]
