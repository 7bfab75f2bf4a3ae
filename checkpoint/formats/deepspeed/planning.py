"""What DeepSpeed's writers have in common: the plan over all ranks, files, places in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ....ir import InvalidInput
from ...boxes import Boxes
from ...contents import (
    BUFFER,
    MASTER,
    WEIGHT,
    Array,
    Digest,
    DigestKind,
    Given,
    Job,
    Key,
    Record,
    Target,
    Wanted,
)
from ...pickles import (
    Tensor,
    TorchLayout,
    decode,
    lay_out,
)
from ...placement import shard_of, shard_shape
from .. import Options
from .expert_names import DATA_FIRST, split_name
from .flat import Piece, partition_elements
from .sharing import LAYERS, Sharing, shared

_SUB_GROUP_ELEMENTS = 10**9
"""DeepSpeed's default of `sub_group_size` (zero/config.py)."""

_VERSION = "0.19.8"
"""Of the DeepSpeed whose form this is."""

Wants = dict[Key, Wanted]


@dataclass
class Files:
    """The layouts of files, their records, and the boxes of wanted arrays in them."""

    layouts: list[TorchLayout] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    boxes: dict[Key, list[Boxes]] = field(default_factory=dict)

    def add(self, file: str, value: Any, places: Sequence[Place]) -> None:
        """A file, and which parts of which arrays are in which of its tensors."""
        layout = lay_out(file, value, stem=Path(file).stem)
        numbers = {}
        for storage, record in layout.records.items():
            numbers[storage] = len(self.records)
            self.records.append(record)
        self.layouts.append(layout)
        for place in places:
            table = self.boxes.setdefault(place.key, [])
            if place.tensor.storage in numbers:
                table.append(place.make(numbers[place.tensor.storage]))


@dataclass(frozen=True, slots=True)
class Place:
    """Elements of an array in a tensor of a file: `make` gives their boxes for its record."""

    key: Key
    tensor: Tensor
    make: Callable[[int], Boxes]


@dataclass(frozen=True)
class Plan:
    """What is to be written, over all ranks."""

    wants: Wants
    order: list[str]
    groups: list[list[str]]
    entries: list[dict[str, Any]]
    moments: list[str]
    job: Job
    stage: int
    tag: str
    mesh: Mapping[str, int]
    sharing: Sharing
    inert: bool = False
    """Pieces of client state that a pickle would call are written as plain values."""

    @property
    def buffers(self) -> list[str]:
        """Those that the source calls so: DCP, for one, does not tell them from frozen weights."""
        said = self.kept.get("buffer_names", ())
        return [
            name
            for state, name in self.wants
            if state == BUFFER or (state == WEIGHT and name in said)
        ]

    @property
    def version(self) -> str:
        """Of DeepSpeed's form."""
        return _VERSION

    @property
    def data_ranks(self) -> int:
        return self.mesh.get("dp", 1)

    @property
    def prefix(self) -> str:
        """DeepSpeed looks for `bf16_` where bf16 is enabled."""
        dtypes = {w.dtype for (state, _), w in self.wants.items() if state == WEIGHT}
        return "bf16_" if "BF16" in dtypes or self._bf16 else ""

    @property
    def _bf16(self) -> bool:
        config = self.kept.get("ds_config")
        said = config.get("bf16") if isinstance(config, dict) else None
        return bool(isinstance(said, dict) and said.get("enabled"))

    @property
    def kept(self) -> Mapping[str, Any]:
        """What DeepSpeed's model states held beside tensors, if the source was one."""
        return beside(self.job, "model")

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """Of the shard of a tensor rank."""
        wanted = self.wants[MASTER, name]
        return shard_shape(wanted, self.mesh, {"tp": rank})


def finished(
    files: Files, wants: Wants, format_name: str, last: Sequence[Given], known: Sequence[Given] = ()
) -> Target:
    """The target of some files: `last` are written when all else is (`latest`)."""
    arrays = {
        key: Array(*key, wants[key].shape, wants[key].dtype, partial(_joined, tables, wants[key]))
        for key, tables in files.boxes.items()
        if key in wants
    }

    def finish(digests: Sequence[Digest | None]) -> list[Given]:
        found: list[Given] = []
        done = 0
        for layout in files.layouts:
            found.extend(layout.ending(digests[done : done + len(layout.records)]))
            done += len(layout.records)
        return [*found, *last]

    sizes = {layout.file: layout.nbytes for layout in files.layouts}
    for given in (*known, *last):
        sizes[given.file] = len(given.data)
    literals = [given for layout in files.layouts for given in layout.literals]
    digests: list[DigestKind | None] = ["crc32"] * len(files.records)
    return Target(
        format_name,
        sizes,
        files.records,
        digests,
        arrays,
        [*literals, *known],
        finish,
    )


def _joined(tables: Sequence[Boxes], wanted: Wanted) -> Boxes:
    return Boxes.joined(tables, len(wanted.shape))


def plan_of(wanted: Sequence[Wanted], job: Job, options: Options, universal: bool = False) -> Plan:
    """What is to be written; raises InvalidInput where DeepSpeed could not load it."""
    wants = {one.key: one for one in wanted}
    mesh = dict(options.mesh)
    if unknown := {axis for axis, n in mesh.items() if n > 1} - {"dp", "tp", "ep"}:
        raise InvalidInput(
            f"mesh {mesh}: DeepSpeed's ZeRO files have the axes dp, tp and ep, not "
            f"{', '.join(sorted(unknown))}"
        )
    said = str(options.flags.get("stage", _stage_of(job)))
    stage = int(said) if said.isdigit() else 0
    if stage not in (1, 2, 3):
        raise InvalidInput(f"stage={said}: expected 1, 2 or 3")
    trained = [name for state, name in wants if state == MASTER]
    if not trained:
        raise InvalidInput(
            "DeepSpeed's ZeRO keeps float32 master weights: add them with "
            "--states weight,master,exp_avg,exp_avg_sq"
        )
    for state, name in wants:
        if state not in (WEIGHT, BUFFER, MASTER) and (MASTER, name) not in wants:
            raise InvalidInput(f"{state} of {name} without its master weights: add --states master")
    moments = [
        m for m in dict.fromkeys(state for state, _ in wants) if m not in (WEIGHT, BUFFER, MASTER)
    ]
    for moment in moments:
        missing = [name for name in trained if (moment, name) not in wants]
        if missing:
            raise InvalidInput(f"{moment} of {missing[0]} is missing, others have it")
    if (
        stage < 3
        and not universal
        and (lacking := [name for name in trained if (WEIGHT, name) not in wants])
    ):
        raise InvalidInput(
            f"the weight of {lacking[0]}: ZeRO-{stage} keeps weights whole beside the optimizer; "
            "add --states weight,master,exp_avg,exp_avg_sq"
        )
    experts = [name for _, name in wants if split_name(name)[0]]
    if experts and (universal or stage == 3 or mesh.get("tp", 1) > 1):
        raise InvalidInput(
            f"{experts[0]}: an expert of DeepSpeed-MoE, whose engines load experts of --to "
            "deepspeed with stage=1 or 2 and without tp; choose these, or give the experts other "
            "names by --target-spec"
        )
    groups, entries = groups_of(trained, job, options.flags.get("order"))
    config = decode(beside(job, "model").get("ds_config"))
    data_first = isinstance(config, dict) and bool(config.get(DATA_FIRST))
    pairs = list(zip(entries, groups, strict=True))
    pairs, sharing = shared(pairs, wants, mesh, _moe_layers(job), data_first)
    entries, groups = [entry for entry, _ in pairs], [group for _, group in pairs]
    order = [name for group in groups for name in group]
    tag = _tag(job, options)
    inert = options.flags.get("foreign") == "data"
    return Plan(wants, order, groups, entries, moments, job, stage, tag, mesh, sharing, inert)


def _moe_layers(job: Job) -> list[str]:
    kept = job.others.get("deepspeed")
    return list(kept.get(LAYERS, ())) if isinstance(kept, dict) else []


def _tag(job: Job, options: Options) -> str:
    """The step's name: as it is asked for, or that of the source, or DeepSpeed's default.

    Raises InvalidInput for what is no name of a directory.
    """
    kept = job.others.get("deepspeed")
    own = kept.get("tag") if isinstance(kept, dict) else None
    said = str(options.tag or options.flags.get("tag") or own or f"global_step{job.step or 0}")
    if said in (".", "..") or "/" in said or "\0" in said or not said.isprintable():
        raise InvalidInput(f"tag={said!r}: expected the name of a directory, as global_step100")
    return said


def _stage_of(job: Job) -> int:
    config = decode(beside(job, "model").get("ds_config"))
    said = config.get("zero_optimization") if isinstance(config, dict) else None
    stage = said.get("stage") if isinstance(said, dict) else None
    return stage if stage in (1, 2, 3) else 2


def beside(job: Job, part: str) -> Mapping[str, Any]:
    """What the `model` or `optimizer` states of a DeepSpeed source held beside tensors."""
    kept = job.others.get("deepspeed")
    found = kept.get(part) if isinstance(kept, dict) else None
    return found if isinstance(found, dict) else {}


def groups_of(
    trained: Sequence[str], job: Job, order: Sequence[str] | None
) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """The parameters of each param group in the engine's order, and the groups' other entries.

    Raises InvalidInput where groups and parameters do not fit together.
    """
    entries = [{k: decode(v) for k, v in group.items()} for group in job.param_groups] or [{}]
    members = [list(entry.pop("params", ())) for entry in entries]
    known = set(trained)
    if order is not None:
        listed = list(order)
        if sorted(listed) != sorted(known):
            odd = sorted(set(listed) ^ known)
            raise InvalidInput(
                f"order: {len(listed)} names for {len(known)} parameters, as {odd[:3]}"
            )
        place = {name: k for k, name in enumerate(listed)}
        if len(entries) == 1:
            return [listed], entries
        members = [sorted(group, key=lambda name: place.get(name, 0)) for group in members]
    if sorted(name for group in members for name in group) == sorted(known):
        return members, entries
    if len(entries) > 1:
        raise InvalidInput(
            f"{len(entries)} param groups, whose parameters are not those of the model that is "
            "written; give the weights and optimizer of a source whose groups name them"
        )
    return [list(trained)], entries


def flat_groups(plan: Plan, rank: int) -> tuple[list[list[str]], list[list[int]]]:
    """(the parameters in each flat buffer, the buffers of each param group)."""
    flat: list[list[str]] = []
    members: list[list[int]] = []
    for group in plan.groups:
        parts = [group] if plan.stage < 3 else _sub_groups(plan, group, rank)
        members.append(list(range(len(flat), len(flat) + len(parts))))
        flat += parts
    return flat, members


def _sub_groups(plan: Plan, group: Sequence[str], rank: int) -> list[list[str]]:
    """A group cut as the engine cuts it: whole parameters, until `sub_group_size` is passed."""
    config = decode(plan.kept.get("ds_config")) or {}
    limit = (config.get("zero_optimization") or {}).get("sub_group_size", _SUB_GROUP_ELEMENTS)
    found: list[list[str]] = []
    held = 0
    for name in group:
        if not found or held >= limit:
            found.append([])
            held = 0
        found[-1].append(name)
        held += partition_elements(plan.shape(name, rank), plan.data_ranks)
    return found


def place_of(plan: Plan, key: Key, at: Mapping[str, int], tensor: Tensor, piece: Piece) -> Place:
    """A piece of a rank's shard, in a flat tensor."""
    wanted, part = plan.wants[key], (piece.begin, piece.end)
    return Place(
        key,
        tensor,
        lambda record: shard_of(wanted, plan.mesh, at, record, piece.offset, part),
    )
