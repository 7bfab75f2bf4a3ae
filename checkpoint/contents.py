"""What a checkpoint is, for every format: arrays, the boxes in which their elements lie, records.

A reader makes `Contents` of a directory without reading a tensor. A writer makes a `Target` of the
arrays that are wanted, without writing one. Neither moves bytes: that is the engine's, which sees
nothing of formats.

A *state* is one of the arrays that training keeps per parameter:

    weight      what the model computes with
    master      the float32 copy of an optimizer in mixed precision
    exp_avg, exp_avg_sq, …   the optimizer's moments, under torch's names
    buffer      what the model carries without training it

Both sides speak of *stored* arrays under the format's own names and dims. A layout (`layout.py`)
says which logical tensors they are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .boxes import Boxes
from .dtypes import itemsize

WEIGHT, MASTER, EXP_AVG, EXP_AVG_SQ, BUFFER = "weight", "master", "exp_avg", "exp_avg_sq", "buffer"

DigestKind = Literal["crc32", "xxh3", "sha256"]


@dataclass(frozen=True, slots=True)
class Digest:
    """A checksum: its kind and value (hexadecimal). `xxh3` is XXH3 of 128 bits."""

    kind: DigestKind
    value: str


@dataclass(frozen=True, slots=True)
class Record:
    """A run of bytes in a file (relative to the checkpoint's root).

    `digest` is over exactly these bytes: what a source promises, None where it promises nothing.
    `read` fills a buffer with bytes from an offset on, where they are not in the file as they are
    (compressed chunks); such a record has no digest.
    """

    file: str
    offset: int
    nbytes: int
    digest: Digest | None = None
    read: Callable[[int, NDArray[np.uint8]], None] | None = field(default=None, compare=False)


def with_unread(records: Sequence[Record], unread: Iterable[Record]) -> tuple[Record, ...]:
    """Records of arrays (whose numbers stay), and the storages of their files that no array uses.

    What nobody moves is promised by the files' checksums all the same: the engine checks it.
    """
    known = {(record.file, record.offset) for record in records}
    more = {(record.file, record.offset): record for record in unread}
    return (*records, *(record for place, record in more.items() if place not in known))


Key = tuple[str, str]
"""(state, name)."""

Combine = Literal["copy", "equal", "sum", "mean"]
"""What an element is that lies in several boxes (see `Array`)."""


@dataclass(frozen=True, slots=True, eq=False)
class Array:
    """A stored array (or, after a layout, a logical tensor) of a checkpoint.

    `shape` is that of the whole, over all ranks; `where` gives the boxes of its elements, whose
    records are numbers of `Contents.records`. Replicas may be there or not. `combine` says what an
    element is that lies in several boxes: a copy (any of them is read), one of several that have to
    be equal (all are read), or a summand (a partial sum, or one of several values to be averaged).

    `axes`: where a reader has the shards of ranks and does not know what whole they make, the first
    dims of the array count the ranks of these mesh axes, and the others are those of a shard. The
    layout's types say how the whole is put together.
    """

    state: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    where: Callable[[], Boxes]
    combine: Combine = "copy"
    axes: tuple[str, ...] = ()

    @property
    def key(self) -> Key:
        return self.state, self.name


@dataclass(frozen=True, slots=True)
class Job:
    """What a training run keeps beside its arrays, in values that JSON can say.

    `step` of the optimizer (None where the checkpoint is of weights only); `param_groups` as torch
    names their entries (`lr`, `betas`, `weight_decay`, …), with `params`, the names of the
    parameters, where the source tells; `scheduler`, `rng` by rank, and `others`, what else the
    format holds, by its own names. Values that are not JSON's are encoded (`values.py`) so that
    they survive any number of hops.
    """

    step: int | None = None
    param_groups: tuple[Mapping[str, Any], ...] = ()
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    rng: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """A checkpoint as read: nothing of it but its headers has been touched.

    `facts` are sizes of the model that the checkpoint tells (`num_attention_heads`,
    `num_query_groups`, …): layouts find the sizes of factors in them. `files` are all files that
    belong to it with their sizes in bytes, also those without arrays. `conventions` are facts of
    how this one is stored: layouts read with them, and what is made of it knows nothing of them.
    `companions` are those of a Hugging Face folder (config, tokenizer) that it promises to hold,
    with XXH3-128 of their bytes.
    """

    format: str
    root: Path
    files: Mapping[str, int]
    records: Sequence[Record]
    arrays: Mapping[Key, Array]
    job: Job = field(default_factory=Job)
    mesh: Mapping[str, int] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    conventions: Mapping[str, bool] = field(default_factory=dict)
    companions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A stored array that a writer is to lay out.

    `shape` is that of the whole with its padding. `dims` and `sizes` are its factors (numbers of
    columns per dim, and the size of every factor); `splits` says which factor each mesh axis
    splits, outermost axis first; an axis that is not named holds copies (and `tp:2` is the outer
    two of tp: the rest of it holds copies, see `placement.py`). `unpadded`: the shape without
    padding, where there is some.
    """

    state: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    dims: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    splits: tuple[tuple[str, int], ...] = ()
    unpadded: tuple[int, ...] | None = None

    @property
    def key(self) -> Key:
        return self.state, self.name

    @property
    def true_shape(self) -> tuple[int, ...]:
        """Of the whole, without padding."""
        return self.shape if self.unpadded is None else self.unpadded

    @property
    def nbytes(self) -> int:
        """Of the whole, with its padding."""
        return prod(self.shape) * itemsize(self.dtype)


@dataclass(frozen=True, slots=True)
class Given:
    """Bytes that a writer knows: a header, a pickle, a manifest."""

    file: str
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A checkpoint to be written.

    `files` with their final sizes in bytes; bytes that no literal and no array fills are zero.
    `records` say which checksum of them is wanted (`digests`, by record; None: none).
    `arrays` are the wanted ones with their boxes. When everything has been moved, `finish` makes
    the last literals of the checksums found (in the order of `records`), in the order in which
    they are to be written: the one that says that the checkpoint is whole comes last.
    """

    format: str
    files: Mapping[str, int]
    records: Sequence[Record]
    digests: Sequence[DigestKind | None]
    arrays: Mapping[Key, Array]
    literals: Sequence[Given]
    finish: Callable[[Sequence[Digest | None]], Sequence[Given]]
