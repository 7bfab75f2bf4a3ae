"""Both sides of a conversion in logical coordinates, with the rules of states and dtypes.

A weight that a checkpoint lacks is made of its float32 master copy, and a master copy of the
weight: optimizers in mixed precision keep both, others one. `--dtype` is of weights; moments and
master copies keep theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..ir.errors import InvalidInput
from . import formats
from .boxes import Boxes
from .contents import BUFFER, EXP_AVG, MASTER, WEIGHT, Array, Contents, Job, Key, Target
from .dtypes import named
from .formats import Options
from .formats.companions import with_config
from .from_stored import Piece, joined
from .layout import Layout, StoredWanted, choose_layout, choose_target_layout, load_layout

_LOGICAL_NAMES = ("universal", "safetensors", "dcp", "deepspeed", "deepspeed-universal")
"""Formats that are written under the logical names, unless a layout is given."""

_KEEP_MASTERS = ("deepspeed", "deepspeed-universal")

_FLOATS = ("F64", "F32", "F16", "BF16")
_WEIGHTS = (*_FLOATS, "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A checkpoint as read, and the logical tensors that it holds."""

    contents: Contents
    layout: Layout
    logical: Mapping[Key, Array]


@dataclass(frozen=True, slots=True, eq=False)
class Destination:
    """A checkpoint to be written, its layout, the tensors that it is made of (with their dtypes),
    and its arrays as logical ones (several of a key where tied tensors are stored more than once).
    """

    target: Target
    layout: Layout
    tensors: Mapping[Key, tuple[Array, str]]
    logical: Sequence[Array]


def read(
    root: Path,
    format_name: str = "",
    spec: str = "",
    options: Options | None = None,
    given: Mapping[str, Any] | None = None,
) -> Source:
    """Reads a checkpoint's headers; format and layout are found where they are not given."""
    return understood(opened(root, format_name, options), spec, given)


def opened(
    root: Path, format_name: str = "", options: Options | None = None, config: Path | None = None
) -> Contents:
    """What a checkpoint's headers say, under the names that are stored; the config of a Hugging
    Face folder, of `config` or of that in which it lies, tells sizes that it does not tell itself.
    """
    name = format_name or formats.detect(root)
    contents = formats.load(name).read(root, options or Options())
    return replace(contents, facts=with_config(contents, root, config))


def understood(
    contents: Contents, spec: str = "", given: Mapping[str, Any] | None = None
) -> Source:
    """The logical tensors of a checkpoint; its layout is found by its names if none is given."""
    layout = load_layout(spec) if spec else choose_layout(contents)
    names = [name for _, name in contents.arrays]
    if spec and layout.rules and names and len(layout.unruled(names)) == len(names):
        raise InvalidInput(
            f"--spec {spec}: it has no rule for any array of {contents.root} ({names[0]}, …)"
        )
    logical = layout.logical(contents, given)
    return Source(replace(contents, job=layout.job(contents, given)), layout, logical)


def chosen(
    logical: Mapping[Key, Array], states: Sequence[str] = (), dtype: str = "", to: str = ""
) -> dict[Key, tuple[Array, str]]:
    """The tensors that are to be converted, with the dtype that each is to have.

    `states` (all, if none is given) may name a state that only the other copy of a parameter has.
    Formats (`to`) that keep master copies beside moments get them, of the weights if need be.
    Weights of another `dtype` are rounded from the master copies, where there are any. Raises
    InvalidInput where the checkpoint has nothing of a state, or `dtype` is none of floats.
    """
    there = {state for state, _ in logical}
    names = dict.fromkeys(name for _, name in logical)
    wanted = list(dict.fromkeys(states)) or list(dict.fromkeys(state for state, _ in logical))
    if not states and WEIGHT not in there and MASTER in there:
        wanted = [WEIGHT, *wanted]
    if not states and to in _KEEP_MASTERS and EXP_AVG in there and MASTER not in there:
        wanted.append(MASTER)
    if WEIGHT in wanted and BUFFER in there and BUFFER not in wanted:
        wanted.append(BUFFER)
    new = named(dtype) if dtype else ""
    if new and new not in _WEIGHTS:
        raise InvalidInput(f"--dtype {dtype}: weights are rounded to one of {', '.join(_WEIGHTS)}")
    if new and WEIGHT not in wanted:
        raise InvalidInput(
            f"--dtype {dtype} is of weights, which are not among {', '.join(wanted)}"
        )
    found: dict[Key, tuple[Array, str]] = {}
    for state in wanted:
        before = len(found)
        for name in names:
            array = logical.get((state, name))
            if array is None and state in (WEIGHT, MASTER) and (BUFFER, name) not in logical:
                trained = EXP_AVG not in there or (EXP_AVG, name) in logical
                if state == WEIGHT or trained:
                    array = logical.get((MASTER if state == WEIGHT else WEIGHT, name))
            if array is None:
                continue
            if state == WEIGHT and new and array.dtype in _FLOATS and array.dtype != new:
                array = logical.get((MASTER, name), array)
            kind = array.dtype
            if state == MASTER:
                kind = "F32"
            elif new and state in (WEIGHT, BUFFER) and kind in _FLOATS:
                kind = new
            found[state, name] = (array, kind)
        if len(found) == before:
            raise InvalidInput(
                f"--states {state}: the checkpoint has none; it has {', '.join(sorted(there))}"
            )
    return found


def lay_out(
    format_name: str,
    tensors: Mapping[Key, tuple[Array, str]],
    job: Job,
    facts: Mapping[str, Any],
    options: Options,
    spec: str = "",
) -> Destination:
    """Where a format puts tensors."""
    if spec:
        layout = load_layout(spec)
        names = list(dict.fromkeys(name for _, name in tensors))
        if layout.rules and not layout.covers(names):
            raise InvalidInput(
                f"--target-spec {spec}: it has no rule for any tensor of the source ({names[0]}, …)"
            )
    elif format_name in _LOGICAL_NAMES:
        layout = Layout.identity()
    else:
        layout = choose_target_layout(format_name, list(tensors))
    tensors = _tied(tensors, layout, facts)
    shapes = {key: (array.shape, dtype) for key, (array, dtype) in tensors.items()}
    stored = layout.stored(shapes, options.mesh, facts)
    told = replace(options, flags={"facts": _with_sizes(facts, layout, stored), **options.flags})
    named_job = _with_stored_names(job, stored)
    target = formats.load(format_name).target([one.wanted for one in stored], named_job, told)
    return Destination(target, layout, tensors, _logical(stored, target))


def _with_stored_names(job: Job, stored: Sequence[StoredWanted]) -> Job:
    """The job with the names of stored arrays in its param groups, instead of logical ones."""
    names: dict[str, str] = {}
    for one in stored:
        if one.state == one.wanted.state:
            names |= {name: one.wanted.name for name in one.shapes if name not in names}
    groups = [
        {**group, "params": list(dict.fromkeys(names.get(name, name) for name in group["params"]))}
        if "params" in group
        else group
        for group in job.param_groups
    ]
    return replace(job, param_groups=tuple(groups))


def _tied(
    tensors: Mapping[Key, tuple[Array, str]], layout: Layout, facts: Mapping[str, Any]
) -> Mapping[Key, tuple[Array, str]]:
    """Tensors without those for which the layout has no place beside what they are tied to (torch's
    state dicts hold a tied head twice); that they are equal is proved when they are read.

    Raises CorruptCheckpoint where the shapes or dtypes of both differ.
    """
    found = dict(tensors)
    for copy, name in layout.tied([name for _, name in tensors], facts).items():
        for state in dict.fromkeys(state for state, of in tensors if of == copy):
            key = state if (state, name) in found else WEIGHT, name
            (array, dtype), (other, _) = found[key], found.pop((state, copy))
            both = [Piece(one.name, one, one.shape, one.where) for one in (array, other)]
            found[key] = replace(joined(key, both), combine="equal"), dtype
    return found


def _with_sizes(
    facts: Mapping[str, Any], layout: Layout, stored: Sequence[StoredWanted]
) -> dict[str, Any]:
    """Facts, and the sizes that the layout found in shapes, under the names by which it asks for
    them: what is written tells them to its next reader."""
    sizes: dict[str, int] = {}
    for one in stored:
        sizes |= {f: n for f, n in one.arranged.sizes.items() if f not in sizes}
    for one in stored:  # where a dim is one factor, its true size: the arranged one has padding
        for part in one.arranged.arrangement.parts:
            for shape in (one.shapes.get(name) for name in one.arranged.names(part)[:1]):
                single = zip(part.dims, shape or (), strict=False)
                sizes |= {dim[0]: n for dim, n in single if len(dim) == 1}
    found = dict(facts)
    for factor, said in layout.spec.sizes.items():
        names = [name.strip() for name in str(said).split("|")]
        if factor in sizes and names[0].isidentifier() and not found.keys() & set(names):
            found[names[0]] = sizes[factor]
    return found


def _logical(stored: Sequence[StoredWanted], target: Target) -> list[Array]:
    found = []
    for one in stored:
        if one.wanted.key not in target.arrays:
            continue  # the format says that it leaves this out (a tied copy)
        array = target.arrays[one.wanted.key]
        for name, shape in one.shapes.items():
            key = (one.state, name)
            where = _where(one, array.where, key, len(shape))
            found.append(Array(*key, shape, array.dtype, where))
    return found


def _where(
    one: StoredWanted, stored: Callable[[], Boxes], key: Key, dims: int
) -> Callable[[], Boxes]:
    def where() -> Boxes:
        found = one.logical(stored()).get(key)
        return Boxes.of([], dims) if found is None else found

    return where


def source_of(tensors: Mapping[Key, tuple[Array, str]]) -> dict[Key, Array]:
    """The source's arrays under the keys that the target has for them."""
    return {
        key: array if array.key == key else replace(array, state=key[0])
        for key, (array, _) in tensors.items()
    }


def as_expected(logical: Mapping[Key, Array], expected: Mapping[Key, Array]) -> Mapping[Key, Array]:
    """A target as read, under the states that are expected of it.

    Formats that have float32 weights and their master copies in one dtype are read as having one;
    those that tell buffers from weights only by their dtype, or not at all, as having the other.
    """
    made = dict(logical)
    other = {WEIGHT: BUFFER, BUFFER: WEIGHT}
    for state, name in expected:
        if (state, name) in made:
            continue
        weight = logical.get((WEIGHT, name))
        if state == MASTER and weight and weight.dtype == "F32":
            made[MASTER, name] = replace(weight, state=MASTER)
        elif found := logical.get((other.get(state, ""), name)):
            made[state, name] = replace(found, state=state)
    return made
