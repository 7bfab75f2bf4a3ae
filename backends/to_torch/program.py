"""model.py: blocks, stages, what passes between them, and a docstring that says what it is."""

from __future__ import annotations

from ...ir.plan import Plan
from ..emission.batch import batch_entry
from ..emission.blocks import block_classes
from ..emission.carried import carried_table
from ..emission.counting import count_terms
from ..emission.settings import ZERO_IN_WORDS
from ..emission.target import Target
from ..emission.text import constant, imports
from ..emission.wiring import Wiring
from .blocks import write_class
from .language import TORCH
from .stages import StageWriter

_KNOWN = {
    "spmd_types": "",
    "F": "torch.nn",
    "attention": "ops", "cross_entropy": "ops", "dense_gradient": "ops", "Draw": "ops",
    "dropout": "ops", "embedding": "ops", "rms_norm": "ops", "rotary": "ops",
    "rotary_table": "ops", "selective": "ops", "shift_labels": "ops", "softmax": "ops",
    "sum_loss": "ops", "to_model": "ops", "wide": "ops",
    "at_factors": "typed", "on_shards": "typed",
    "axis": "parallel", "local": "parallel",
    "Carried": "layout", "add_modules": "layout", "add_parameters": "layout",
    "MICRO_BATCH": "settings", "MICROBATCHES": "settings", "SEQ_LEN": "settings",
    "I": "spmd_types", "P": "spmd_types", "R": "spmd_types", "S": "spmd_types",
    "Tensor": "torch", "nn": "torch",
    "checkpoint": "torch.utils.checkpoint",
}  # fmt: skip
"""Name → the module that a program imports it from, where it uses the name."""


def model_source(plan: Plan) -> str:
    """The text of model.py."""
    target = target_of(plan)
    constants: dict[str, str] = {}
    classes = block_classes(plan, TORCH)
    wiring = Wiring(plan, target)
    blocks = [write_class(plan, target, block, constants) for block in classes]
    writers = [StageWriter(wiring, i, classes, constants, TORCH) for i in range(len(plan.stages))]
    stages = [writer.source() for writer in writers]
    count = count_terms(plan, TORCH, constants)
    parts = [*blocks, *stages, count, _tables(plan, wiring, [c.name for c in classes])]
    body = "\n\n\n".join(parts)
    fixed = "\n\n".join(constant(name, text) for name, text in constants.items())
    if target.reduces_low:
        for name, line in _GRADIENT_SUMS.items():
            fixed = f"{line}\n\n{fixed}" if name in body else fixed
    heads = imports(body + fixed, {k: v for k, v in _KNOWN.items() if v and k != "F"})
    usual = "import torch\n" if "torch." in body + fixed else ""
    usual += "import spmd_types as spmd\n" if "spmd." in body else ""
    usual += "import torch.nn.functional as F\n" if "F." in body else ""
    text = [f'"""{_doc(plan)}\n"""', f"from __future__ import annotations\n\n{usual}{heads}"]
    return "\n\n".join([*text, *([fixed] if fixed else []), "", body]) + "\n"


def target_of(plan: Plan) -> Target:
    """What the plan's program is emitted for."""
    return Target(plan.mesh, reduces_low=plan.workload.get("precision", "bf16") == "bf16")


def _tables(plan: Plan, wiring: Wiring, blocks: list[str]) -> str:
    """BATCH, BLOCKS, STAGES, CARRIED and LOSS_TYPES."""
    types = wiring.types[plan.model.loss[0]]
    loss = dict(types.axes)
    kinds = {a: str(loss.get(a, "I")) for a in plan.type_axes}
    loss_text = "{" + ", ".join(f'"{a}": "{k}"' for a, k in kinds.items()) + "}"
    batch = "\n".join(f'    "{v.name}": {batch_entry(plan, v)},' for v in plan.model.inputs)
    return "\n".join(
        [
            "# name: (dtype, dims, bound of integers)",
            "BATCH = {",
            batch,
            "}",
            "",
            "# classes that FSDP shards and gathers one by one",
            f"BLOCKS = {_tuple(blocks)}",
            "",
            f"STAGES = {_tuple([f'Stage{i}' for i in range(len(plan.stages))])}",
            "",
            *carried_table(wiring),
            "",
            "# how the loss that the last stage returns lies on the mesh",
            f"LOSS_TYPES = {loss_text}",
        ]
    )


def _tuple(names: list[str]) -> str:
    return f"({', '.join(names)}{',' if len(names) == 1 else ''})"


_GRADIENT_SUMS = {
    "OWN_DTYPE": 'OWN_DTYPE = {"op_dtype": None}  # gradients are summed in the dtype they have',
    "FLOAT32_SUM": (
        "# gradients of parameters are summed in float32\n"
        'FLOAT32_SUM = {"op_dtype": torch.float32, "out_dtype": torch.bfloat16}'
    ),
}
"""How a bf16 program's conversions sum gradients: constants it declares where it uses them."""

_DOC = """{name} on {ranks} ranks: {mesh}.

The mesh, outermost axis first:

{rows}

Along dp, parameters are {zero}. A step takes {microbatches}
microbatch{es} of {micro_batch} sequence{s} per data-parallel rank; recomputation: {recompute}.

Every module computes on local shards. How a tensor lies along an axis is its type:

    S(d)   split along dim d, its gradient too      (S(d.k): along factor k of the dim)
    R      replicated; the ranks' gradients are summands
    I      replicated, so is its gradient
    P      the ranks hold summands; its gradient is replicated

A line that changes a type is a call of spmd_types, and above it stands what moves in the forward
pass, and in the backward pass where that differs. b and s are a microbatch's sequences per
data-parallel rank and their length."""


def _doc(plan: Plan) -> str:
    """The module docstring."""
    strategy = plan.strategy
    said = {"pp": "pipeline stages, each a class below", "dp": "data parallel"}
    rows = [
        f"    {a.name:<4} {a.size:>4}   {said.get(a.name, 'tensor parallel')}"
        for a in plan.mesh.axes
    ]
    return _DOC.format(
        name=plan.model.name,
        ranks=plan.mesh.size,
        mesh=" × ".join(f"{a.name}={a.size}" for a in plan.mesh.axes),
        rows="\n".join(rows),
        zero=ZERO_IN_WORDS[strategy.zero],
        microbatches=plan.microbatches,
        es="es" * (plan.microbatches > 1),
        micro_batch=strategy.micro_batch,
        s="s" * (strategy.micro_batch > 1),
        recompute=strategy.recompute,
    )
