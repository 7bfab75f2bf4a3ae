"""Checkpoints: layouts on disk, and conversion between any two of them.

    convert("runs/step-1000", "out", "safetensors", verify=True)
    print(inspect("runs/step-1000"))

A format (`formats/`) says which bytes of which files are which part of which stored array, a layout
(`layout.py`) which logical tensors these are made of; `plan.py` joins both sides of a conversion,
and the engine (`engine/`) moves the bytes.
"""

from .conversion import Converted, convert
from .inspection import Inspected, inspect
from .reads import Listed, list_reads

__all__ = ["Converted", "Inspected", "Listed", "convert", "inspect", "list_reads"]
