"""The number of loss terms in a batch, known before anything is computed."""

from __future__ import annotations

from ...ir.errors import UnsupportedOp
from ...ir.graph import Op, Segment
from ...ir.mesh import Axis, Mesh
from ...ir.plan import Plan
from .body import Body, Statement, needed_inputs
from .language import Language
from .naming import Writer
from .peephole import simplify
from .target import Target
from .text import indented, keyword_name
from .wiring import Wiring


def count_terms(plan: Plan, language: Language, constants: dict[str, str]) -> str:
    """The source of `count_terms(**batch)`.

    A cross-entropy counts valid labels, on this rank's rows and whole sequences: no type but the
    data-parallel one plays a part.
    """
    op, segment = _loss_op(plan)
    mesh = Mesh(tuple(a if a.name == "dp" else Axis(a.name, 1, a.parent) for a in plan.mesh.axes))
    target = Target(mesh)
    graph, annotation = plan.model.blocks[segment.block], plan.annotations[segment.block]
    head, kind = "def count_terms(", language.annotation
    if op.kind == "sum_loss":
        doc = '"""Number of terms of the loss: one, counted by the first data-parallel rank."""'
        return f"{head}**_: {kind}) -> int:\n    {doc}\n    return {language.first_rank}"
    wiring = Wiring(plan, target)
    body = Body(target, language, constants=constants)
    outer = dict(zip(graph.inputs, segment.inputs, strict=True))
    wanted = {op.operands[1]} if op.kind == "cross_entropy" else set()
    inner = needed_inputs(graph, wanted)
    read = {outer[name] for name in inner}
    tables = read & set(plan.model.preamble.outputs)
    batch = needed_inputs(plan.model.preamble, tables) | read
    if op.kind != "cross_entropy":
        batch = {plan.model.inputs[0].name}
    for value in plan.model.inputs:
        if value.name in batch:
            body.argument(value, wiring.types[value.name], keyword_name(value.name))
    arguments = "".join(f"{v}: {kind}, " for v in body.inputs.values())
    head += f"{arguments}**_: {kind})"
    if op.kind != "cross_entropy":
        return head + _elements(body, plan, graph.values[op.operands[0]].dims)
    body.add_constants(plan.model, batch)
    body.add_graph(plan.model.preamble, plan.preamble, tables)
    for name in inner:
        types = body.made[outer[name]]
        form = body.know(graph.values[name], types)
        body.statements.append(
            Statement([(outer[name], types)], [form], lambda x: x[0], [""], role="alias")
        )
    body.add_graph(graph, annotation, wanted)
    types = annotation.ops[op.name].operands[1]
    body.outputs = [body.need(op.operands[1], target.live(types))]
    simplify(body)
    writer = Writer(body)
    lines = writer.lines()
    (labels,) = writer.result()
    ignore = op.attributes.get("ignore_index", -100)
    doc = '"""Number of terms of the loss on this rank\'s rows: labels that are valid."""'
    lines = [doc, *lines, f"return ({labels} != {ignore}).sum()"]
    return "\n".join([f"{head} -> {kind}:", indented("\n".join(lines))])


def _elements(body: Body, plan: Plan, dims: tuple[tuple[int | str, ...], ...]) -> str:
    factors = [size for dim in dims for size in dim]
    first = next(iter(body.inputs.values()))
    texts = [f"{first}.shape[0]" if size == "b" else body.extent(size) for size in factors]
    doc = '"""Number of terms of the loss on this rank\'s rows: elements."""'
    return f" -> int:\n    {doc}\n    return {' * '.join(texts) or '1'}"


def _loss_op(plan: Plan) -> tuple[Op, Segment]:
    segment = plan.model.segments[-1]
    graph = plan.model.blocks[segment.block]
    inner = graph.outputs[segment.outputs.index(plan.model.loss[1])]
    op, _ = graph.producer()[inner]
    if op.kind not in ("cross_entropy", "sum_loss", "mean_loss"):
        raise UnsupportedOp(f"op {op.kind!r} ({op.name}) counts the loss terms: expected a loss op")
    return op, segment
