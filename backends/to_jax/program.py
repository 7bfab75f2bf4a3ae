"""model.py: a function per distinct block, the loss of a microbatch, and a docstring."""

from __future__ import annotations

from ...ir.plan import Plan
from ..emission.batch import batch_entry
from ..emission.blocks import block_classes
from ..emission.counting import count_terms
from ..emission.settings import ZERO_IN_WORDS
from ..emission.target import Target
from ..emission.text import constant, imports
from ..emission.wiring import Wiring
from .functions import StageWriter, stacks_of, write_block
from .language import JAX

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
    "Arrays": "blocks", "Params": "blocks",
    "MICRO_BATCH": "settings", "SEQ_LEN": "settings",
    "Array": "jax", "lax": "jax", "nn": "jax",
}  # fmt: skip
"""Name → the module that a program imports it from, where it uses the name."""


def model_source(plan: Plan) -> str:
    """The text of model.py."""
    target = Target(plan.mesh)
    constants: dict[str, str] = {}
    classes = block_classes(plan, JAX)
    wiring = Wiring(plan, target)
    stage = StageWriter(wiring, 0, classes, constants, JAX)
    blocks = [write_block(plan, target, block, constants, stage) for block in classes]
    parts = [*blocks, *stage.functions(), stage.loss(), count_terms(plan, JAX, constants)]
    body = "\n\n\n".join([*parts, _tables(plan, wiring, stage)])
    fixed = "\n\n".join(constant(name, text) for name, text in constants.items())
    usual = "import jax.numpy as jnp\n" if "jnp." in body + fixed else ""
    text = [
        f'"""{_doc(plan)}\n"""',
        f"from __future__ import annotations\n\n{usual}{imports(body + fixed, _KNOWN)}",
    ]
    return "\n\n".join([*text, *([fixed] if fixed else []), "", body]) + "\n"


def _tables(plan: Plan, wiring: Wiring, stage: StageWriter) -> str:
    """BATCH, STACKS and LOSS_TYPES."""
    types = wiring.types[plan.model.loss[0]]
    loss = "{" + ", ".join(f'"{axis}": "{kind}"' for axis, kind in types) + "}"
    batch = [f'    "{v.name}": {batch_entry(plan, v)},' for v in plan.model.inputs]
    stacks = [
        f'    "{key}": ({", ".join(repr(m) for m in modules)}),'.replace("'", '"')
        for key, modules in stacks_of(stage).items()
    ]
    return "\n".join(
        [
            "# name: (dtype, dims, bound of integers)",
            "BATCH = {", *batch, "}",
            "",
            "# layers whose parameters are one array each, with the layer as its first dim",
            *(["STACKS: dict[str, tuple[str, ...]] = {", *stacks, "}"] if stacks else
              ["STACKS: dict[str, tuple[str, ...]] = {}"]),
            "",
            "# how the loss of a microbatch lies on the mesh",
            f"LOSS_TYPES = {loss}",
        ]
    )  # fmt: skip


_DOC = """{name} on {ranks} devices: {mesh}.

The mesh, outermost axis first:

{rows}

Along dp, parameters are {zero}. A step takes {microbatches}
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


def _doc(plan: Plan) -> str:
    """The module docstring."""
    strategy = plan.strategy
    rows = [
        f"    {a.name:<4} {a.size:>4}   {'data' if a.name == 'dp' else 'tensor'} parallel"
        for a in plan.mesh.axes
        if a.name != "pp"
    ]
    return _DOC.format(
        name=plan.model.name,
        ranks=plan.mesh.size,
        mesh=" × ".join(f"{a.name}={a.size}" for a in plan.mesh.axes if a.name != "pp"),
        rows="\n".join(rows),
        zero=ZERO_IN_WORDS[strategy.zero],
        microbatches=plan.microbatches,
        es="es" * (plan.microbatches > 1),
        micro_batch=strategy.micro_batch,
        s="s" * (strategy.micro_batch > 1),
        recompute=strategy.recompute,
    )
