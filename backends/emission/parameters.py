"""parameters.py: what every parameter is, and how it lies on the mesh."""

from __future__ import annotations

from math import prod

from ...ir.graph import Dims
from ...ir.plan import Plan


def parameters_source(plan: Plan) -> str:
    """The text of parameters.py."""
    types, stages, dims = plan.parameter_types(), plan.parameter_stages(), _dims(plan)
    lines = []
    for name, parameter in plan.model.parameters.items():
        if name not in types:
            continue
        kinds = {axis: str(types[name][axis]) for axis in plan.tensor_axes}
        fields = [repr(parameter.shape), _quoted(repr(kinds))]
        fields.append(_quoted(repr((parameter.init.kind, parameter.init.value))))
        fields.append(repr(tuple(stages[name])))
        if not parameter.trainable:
            fields.append("trainable=False")
        factors = tuple(
            tuple(int(s) for s in dim) if prod(int(s) for s in dim) == size else (size,)
            for dim, size in zip(dims[name], parameter.shape, strict=True)
        )
        if any(len(dim) != 1 for dim in factors):
            shown = ", ".join(
                "(" + ", ".join(map(str, dim or (1,))) + ("," if len(dim) < 2 else "") + ")"
                for dim in factors
            )
            fields.append(f"factors=({shown}{',' if len(factors) == 1 else ''})")
        lines.append(f'    "{name}": Parameter({", ".join(fields)}),')
    head = (
        f'"""The parameters of {plan.model.name}: full shape, types, first value, '
        'stages.\n\nSee layout.py for what types and factors mean.\n"""'
    )
    body = "PARAMETERS: dict[str, Parameter] = {\n" + "\n".join(lines) + "\n}"
    return (
        f"{head}\n\nfrom __future__ import annotations\n\nfrom layout import Parameter\n\n{body}\n"
    )


def _dims(plan: Plan) -> dict[str, Dims]:
    """The factors of every parameter's dims."""
    found: dict[str, Dims] = {}
    for segment in plan.model.segments:
        graph = plan.model.blocks[segment.block]
        for name, inner in zip(segment.parameters, graph.parameters, strict=True):
            found[name] = graph.values[inner].dims
    return found


def _quoted(text: str) -> str:
    return text.replace("'", '"')
