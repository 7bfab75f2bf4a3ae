"""Pickles of strangers: torch.save files read and written without torch, and without running code.

foreign     what a pickle may become: plain values, descriptions of tensors, inert stand-ins
loading     the restricted unpickler
dumping     the pickler that writes the same values back
zip_reading torch's zips: which bytes of a file are which storage, with their CRCs
zip_layout  a torch.save file laid out before its tensors are there
values      any of these values as JSON, and back
"""

from .dumping import dumps
from .foreign import (
    Named,
    Ordered,
    Size,
    StandIn,
    Storage,
    Tensor,
    fields_of,
    hole,
    mapping_of,
    named,
    same,
    scalar,
    sequence_of,
    small,
    stand_in,
    torch_dtype,
)
from .loading import loads
from .values import decode, encode
from .zip_directory import Span
from .zip_layout import TorchLayout, lay_out
from .zip_reading import TorchFile, open_torch, read_torch

__all__ = [
    "Named", "Ordered", "Size", "Span", "StandIn", "Storage", "Tensor", "TorchFile", "TorchLayout",
    "decode", "dumps", "encode", "fields_of", "hole", "lay_out", "loads", "mapping_of", "named",
    "open_torch", "read_torch", "same", "scalar", "sequence_of", "small", "stand_in",
    "torch_dtype",
]  # fmt: skip
