"""model.py: a function per distinct block, the loss or the stages, tables, and a docstring."""

from __future__ import annotations

from textwrap import fill

from ...ir.errors import UnsupportedOp
from ...ir.plan import Plan
from ..emission.batch import batch_entry
from ..emission.blocks import block_classes
from ..emission.carried import carried_table
from ..emission.counting import count_terms
from ..emission.settings import ZERO_IN_WORDS
from ..emission.target import Target
from ..emission.text import constant, imports
from ..emission.wiring import Wiring
from .functions import StageWriter, stacks_of, write_block
from .language import JAX
from .pipeline import ProgramForm, ends_apart, program_form

_KNOWN = {
    **dict.fromkeys(
        (
            "attention", "cross_entropy", "dropout", "embedding", "layer_norm", "rms_norm",
            "rotary", "rotary_table", "shift_labels", "softmax", "sum_loss", "to_model", "wide",
        ),
        "ops",
    ),
    **dict.fromkeys(("at_factors", "cut", "keep_first", "of_first", "pad_part", "take_part"),
                    "typed"),
    **dict.fromkeys(("fold", "layers", "local", "own", "run", "under"), "blocks"),
    "Arrays": "blocks", "Params": "blocks", "Carried": "links", "pipelined": "ticks",
    "MICRO_BATCH": "settings", "SEQ_LEN": "settings",
    "Array": "jax", "lax": "jax", "nn": "jax",
}  # fmt: skip
"""Name → the module that a program imports it from, where it uses the name."""


def model_source(plan: Plan) -> str:
    """The text of model.py. Raises InvalidInput for stages that cannot be written."""
    form = program_form(plan)
    target = Target(plan.mesh)
    constants: dict[str, str] = {}
    classes = block_classes(plan, JAX)
    wiring = Wiring(ends_apart(plan) if form.kind == "ticks" else plan, target)
    _check_carried(wiring)
    methods: dict[int, str] = {}
    writers = [
        StageWriter(wiring, i, classes, constants, JAX, methods)
        for i in range(len(wiring.plan.stages))
    ]
    blocks = [write_block(plan, target, block, constants, writers[0]) for block in classes]
    own = [text for writer in writers for text in writer.functions()]
    names = _function_names(form, len(writers))
    callers = [
        writer.function(name, _said(form, wiring, i))
        for i, (name, writer) in enumerate(zip(names, writers, strict=True))
    ]
    callers += [_PIPELINED] if form.kind == "ticks" else []
    parts = [*blocks, *own, *callers, count_terms(plan, JAX, constants)]
    body = "\n\n\n".join([*parts, "\n".join(_tables(form, wiring, writers, names))])
    fixed = "\n\n".join(constant(name, text) for name, text in constants.items())
    usual = "import jax.numpy as jnp\n" if "jnp." in body + fixed else ""
    text = [
        f'"""{_doc(plan, form)}\n"""',
        f"from __future__ import annotations\n\n{usual}{imports(body + fixed, _KNOWN)}",
    ]
    return "\n\n".join([*text, *([fixed] if fixed else []), "", body]) + "\n"


_PIPELINED = '''\
def loss(params: Params, *, key: Array | None = None, **batch: Array) -> Array:
    """The sum of the loss terms of all microbatches. Numbers are drawn from `key`: dropout."""
    return pipelined(params, (before, stage, after), batch, BATCH, key)'''


def _check_carried(wiring: Wiring) -> None:
    """Raises UnsupportedOp where stages would send each other what has no gradient."""
    for boundary in range(len(wiring.plan.stages) - 1):
        for name in wiring.carried(boundary):
            if (dtype := wiring.values[name].dtype) not in ("model", "wide"):
                raise UnsupportedOp(
                    f"stage {boundary} would send {name}, which is {dtype}: stages of jax programs "
                    "send activations only; choose stages= so that both ends are in one stage"
                )


def _function_names(form: ProgramForm, count: int) -> list[str]:
    """What the functions that call the blocks are called."""
    if form.kind == "whole":
        return ["loss"]
    if form.kind == "ticks":
        return ["before", "stage", "after"]
    return [f"stage_{i}" for i in range(count)]


def _said(form: ProgramForm, wiring: Wiring, index: int) -> str:
    """The docstring of such a function."""
    stages = wiring.plan.stages
    draws = "Numbers are drawn from `key`: dropout."
    if form.kind == "whole":
        return f"The sum of the loss terms of one microbatch. {draws}"
    if form.kind == "ticks":
        what = (
            "What comes before the layers.",
            "The layers of this device's stage.",
            "What comes after the layers: the sum of the loss terms of one microbatch.",
        )[index]
        return f"{what}\n\n{draws}"
    own = wiring.plan.model.segments[stages[index].first : stages[index].last]
    names = [segment.module or segment.block for segment in own]
    held = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
    gives = "what the next stage takes"
    if index == len(stages) - 1:
        gives = "the sum of the loss terms of one microbatch"
    return f"Stage {index} of {len(stages)}: {held}.\n\nReturns {gives}.\n{draws}"


def _tables(
    form: ProgramForm, wiring: Wiring, writers: list[StageWriter], names: list[str]
) -> list[str]:
    """BATCH, STACKS, LOSS_TYPES, and what there is of a pipeline."""
    plan = wiring.plan
    types = wiring.types[plan.model.loss[0]]
    loss = "{" + ", ".join(f'"{axis}": "{kind}"' for axis, kind in types) + "}"
    batch = [f'    "{v.name}": {batch_entry(plan, v)},' for v in plan.model.inputs]
    found = {key: modules for writer in writers for key, modules in stacks_of(writer).items()}
    stacks = [
        f'    "{key}": ({", ".join(repr(m) for m in modules)}),'.replace("'", '"')
        for key, modules in found.items()
    ]
    listed = ", ".join(names) + "," * (len(names) == 1)
    pipeline = ["# stages that are programs of their own", "STAGES = ()"]
    if form.kind == "stages":
        pipeline[1] = f"STAGES = ({listed})"
        pipeline += ["", *carried_table(wiring)]
    if form.kind == "ticks":
        (stack,) = stacks_of(writers[1])
        pipeline += ["", "# layers that are split along pp", f'PIPELINED = "{stack}"']
    return [
        "# name: (dtype, dims, bound of integers)",
        "BATCH = {", *batch, "}",
        "",
        "# layers whose parameters are one array each, with the layer as its first dim",
        *(["STACKS: dict[str, tuple[str, ...]] = {", *stacks, "}"] if stacks else
          ["STACKS: dict[str, tuple[str, ...]] = {}"]),
        "",
        *pipeline,
        "",
        "# how the loss of a microbatch lies on the mesh",
        f"LOSS_TYPES = {loss}",
    ]  # fmt: skip


_DOC = """{name} on {ranks} devices: {mesh}.

The mesh, outermost axis first:

{rows}

{stages}Along dp, parameters are {zero}. A step takes {microbatches}
microbatch{es} of {micro_batch} sequence{s} per data-parallel rank; recomputation: {recompute}.

Every function computes on local shards, under `shard_map`. How an array lies along an axis is its
type:

    S(d)   split along dim d, its gradient too      (S(d.k): along factor k of the dim)
    R      replicated; the devices' gradients are summands
    I      replicated, so is its gradient
    P      the devices hold summands; its gradient is replicated

S, R and P are what JAX calls varying, I is its invariant. Above a line that changes a type stands
what moves in the forward pass, and in the backward pass where that differs. b and s are a
microbatch's sequences per data-parallel rank and their length."""


_KINDS = {"pp": "pipeline stages", "dp": "data parallel"}

_FORMS = {
    "whole": "",
    "stages": (
        "Stages are programs of their own, called in the order of the schedule: {reason}. "
        "There are {stages} on {pp} coordinates of pp, of {layers} layers.\n\n"
    ),
    "ticks": (
        "One program has all {pp} stages, of {layers} layers: {reason}. At every tick of a scan a "
        "device runs its stage and sends what comes out on.\n\n"
    ),
}


def _doc(plan: Plan, form: ProgramForm) -> str:
    """The module docstring."""
    strategy = plan.strategy
    axes = [a for a in plan.mesh.axes if a.name != "pp" or a.size > 1]
    rows = [f"    {a.name:<4} {a.size:>4}   {_KINDS.get(a.name, 'tensor parallel')}" for a in axes]
    stages = _FORMS[form.kind].format(
        reason=form.reason, pp=strategy.pp, stages=len(plan.stages),
        layers="-".join(map(str, strategy.layers)),
    )  # fmt: skip
    return _DOC.format(
        name=plan.model.name,
        ranks=plan.mesh.size,
        mesh=" × ".join(f"{a.name}={a.size}" for a in axes),
        stages=fill(stages.strip(), 100) + "\n\n" * bool(stages),
        rows="\n".join(rows),
        zero=ZERO_IN_WORDS[strategy.zero],
        microbatches=plan.microbatches,
        es="es" * (plan.microbatches > 1),
        micro_batch=strategy.micro_batch,
        s="s" * (strategy.micro_batch > 1),
        recompute=strategy.recompute,
    )
