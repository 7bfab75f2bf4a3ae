"""Blocks and segments of a transformer: embedding, each distinct layer once, head with its loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

from ..errors import InvalidInput
from ..graph import Init, Model, Parameter, Segment, Value
from ..refine import Link, RawGraph, refine
from .dims import TransformerDims
from .experts import mixture
from .latent import latent_attention
from .layers import INIT_STD, dropout, linear, mlp, norm, self_attention, tokens_by
from .names import names_of
from .sheet import Sheet, dims_of

_PREAMBLE, _EMBEDDING, _HEAD = "preamble", "Embedding", "Head"
_TABLE = Init("normal", INIT_STD)
_MTP_WEIGHT = 0.3
"""Weight of the losses of further tokens (DeepSeek-V3, arXiv:2412.19437, section 4.2)."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """What tells one decoder layer from another."""

    experts: bool
    window: int | None


def transformer(dims: TransformerDims, name: str = "transformer") -> Model:
    """The model of these dimensions: preamble, distinct blocks, segments, parameters.

    Refined like a traced model; rotary tables are without scaling. A model with experts has the
    symbol `c` beside `b` and `s`: see `expert_binding`.
    """
    if not isinstance(dims, TransformerDims):
        raise InvalidInput(
            f"transformer: got {type(dims).__name__}, expected TransformerDims (dims_of_config "
            "makes them of a Hugging Face config)"
        )
    kinds = [_Kind(dims.has_experts(i), dims.window(i)) for i in range(dims.layers)]
    blocks = _block_names(kinds)
    sheets = {_PREAMBLE: Sheet(), _EMBEDDING: Sheet()}
    outputs = {_PREAMBLE: _preamble(sheets[_PREAMBLE], dims)}
    outputs[_EMBEDDING] = (_embedding(sheets[_EMBEDDING], dims),)
    for kind, block in blocks.items():
        sheets[block] = sheet = Sheet()
        hidden = sheet.input("hidden", tokens_by(dims.hidden))
        outputs[block] = (_layer(sheet, hidden, dims, kind),)
    sheets[_HEAD] = Sheet()
    outputs[_HEAD] = _head(sheets[_HEAD], dims)

    raw = {block: sheet.graph(outputs[block]) for block, sheet in sheets.items()}
    segments = _segments(raw, [blocks[kind] for kind in kinds], names_of(dims).layers)
    graphs = refine(raw, list(_links(raw, segments)))
    model = Model(
        name=name,
        inputs=tuple(
            Value(v, tokens_by(), "int64", "input", grad=False) for v in ("input_ids", "labels")
        ),
        preamble=graphs.pop(_PREAMBLE),
        blocks=graphs,
        segments=segments,
        parameters=_parameters(raw, sheets, segments),
        loss=(segments[-1].outputs[0], segments[-1].outputs[1]),
        source={"name": name, "dims": asdict(dims)},
    )
    model.check()
    return model


def _block_names(kinds: Sequence[_Kind]) -> dict[_Kind, str]:
    """Distinct layers by what sets them apart from the others."""
    windows = {kind.window for kind in kinds}
    found: dict[_Kind, str] = {}
    for kind in kinds:
        what = "Expert" if kind.experts else "Decoder"
        window = f"Window{kind.window}" if kind.window and len(windows) > 1 else ""
        found.setdefault(kind, f"{window}{what}Layer")
    return found


def _preamble(sheet: Sheet, dims: TransformerDims) -> tuple[str, ...]:
    """What depends on no parameter: positions, rotary tables, and the labels, moved by one token
    (for further tokens by more, and the ids with them)."""
    outputs: list[str] = []
    labels = sheet.input("labels", tokens_by(), "int64", grad=False)
    ids = sheet.input("input_ids", tokens_by(), "int64", grad=False) if dims.mtp_layers else ""
    if dims.positions == "learned":
        outputs.append(sheet.op("positions", (), dims_of(1, "s"), dtype="int64"))
    if dims.positions == "rotary":
        positions = sheet.op("positions", (), dims_of("s"), dtype="int64")
        size = dims.rotary_dim
        outputs += sheet.op_of_several(
            "rotary_table", (positions,), (dims_of(1, "s", size),) * 2, ("cos", "sin"),
            dtypes=("model", "model"),
            attributes={
                "inv_freq": [dims.rotary_base ** (-i / size) for i in range(0, size, 2)],
                "scaling": 1.0,
                "style": "half",
            },
        )  # fmt: skip
    for depth in range(dims.mtp_layers + 1):
        labels = sheet.op("shift_labels", (labels,), tokens_by(), name=_labels(depth),
                          attributes={"ignore_index": -100})  # fmt: skip
        outputs.append(labels)
        if depth:
            ids = sheet.op("shift_labels", (ids,), tokens_by(), name=_ids(depth),
                           attributes={"ignore_index": 0})  # fmt: skip
            outputs.append(ids)
    return tuple(outputs)


def _labels(depth: int) -> str:
    return f"shifted_labels_{depth}" if depth else "shifted_labels"


def _ids(depth: int) -> str:
    return f"shifted_ids_{depth}"


def _token_table(sheet: Sheet, dims: TransformerDims) -> str:
    return sheet.parameter(f"{names_of(dims).tokens}.weight", (dims.vocab, dims.hidden), _TABLE)


def _embedding(sheet: Sheet, dims: TransformerDims) -> str:
    names = names_of(dims)
    ids = sheet.input("input_ids", tokens_by(), "int64", grad=False)
    shape = tokens_by(dims.hidden)
    x = sheet.op("embedding", (_token_table(sheet, dims), ids), shape, name="tokens",
                 at=names.tokens)  # fmt: skip
    if dims.positions == "learned":
        table = sheet.parameter(
            f"{names.positions}.weight", (dims.max_positions, dims.hidden), _TABLE
        )
        positions = sheet.input("positions", dims_of(1, "s"), "int64", grad=False)
        rows = sheet.op("embedding", (table, positions), dims_of(1, "s", dims.hidden),
                        name="rows", at=names.positions)  # fmt: skip
        x = sheet.op("add", (x, rows), shape)
    if dims.embedding_norm:
        x = norm(sheet, x, dims, names.embedding_norm)
    return dropout(sheet, x, dims, names.embedding_dropout)


def _layer(sheet: Sheet, hidden: str, dims: TransformerDims, kind: _Kind) -> str:
    names = names_of(dims)
    x = norm(sheet, hidden, dims, names.norms[0])
    if dims.latent:
        x = latent_attention(sheet, x, dims, dims.latent, kind.window)
    else:
        x = self_attention(sheet, x, dims, kind.window)
    x = dropout(sheet, x, dims, f"{names.attention}.resid_dropout")
    hidden = sheet.op("add", (hidden, x), tokens_by(dims.hidden))
    x = norm(sheet, hidden, dims, names.norms[1])
    if kind.experts and dims.experts:
        x = mixture(sheet.under("mlp"), x, dims, dims.experts)
    else:
        x = mlp(sheet.under("mlp"), x, dims, dims.ffn)
    x = dropout(sheet, x, dims, "mlp.dropout")
    return sheet.op("add", (hidden, x), tokens_by(dims.hidden))


def _head(sheet: Sheet, dims: TransformerDims) -> tuple[str, str]:
    """The final norm, the language model head and its loss; modules that predict further tokens
    are here, so that one activation crosses every cut between segments."""
    hidden = sheet.input("hidden", tokens_by(dims.hidden))
    x = norm(sheet, hidden, dims, names_of(dims).final_norm)
    loss, count = _loss(sheet, x, dims, _labels(0))
    last = _Kind(dims.has_experts(dims.layers - 1), dims.window(dims.layers - 1))
    for depth in range(1, dims.mtp_layers + 1):
        module = sheet.under(f"{names_of(dims).layers}.{dims.layers + depth - 1}")
        ids = sheet.input(_ids(depth), tokens_by(), "int64", grad=False)
        table = _token_table(sheet, dims)
        embedded = module.op("embedding", (table, ids), tokens_by(dims.hidden), name="tokens")
        pair = (norm(module, embedded, dims, "enorm"), norm(module, hidden, dims, "hnorm"))
        both = module.op("concat", pair, tokens_by(2 * dims.hidden), attributes={"dim": 2})
        hidden = linear(module, both, "eh_proj", (2 * dims.hidden, dims.hidden))
        hidden = _layer(module, hidden, dims, last)
        x = norm(module, hidden, dims, "shared_head.norm")
        further, _ = _loss(sheet, x, dims, _labels(depth))
        further = sheet.op("scale", (further,), (),
                           attributes={"factor": _MTP_WEIGHT / dims.mtp_layers})  # fmt: skip
        loss = sheet.op("add", (loss, further), (), name="loss_sum")
    return loss, count


def _loss(sheet: Sheet, x: str, dims: TransformerDims, labels: str) -> tuple[str, str]:
    """Sum over the valid tokens and their count."""
    if dims.tied:
        weight = _token_table(sheet, dims)
    else:
        weight = sheet.parameter("lm_head.weight", (dims.vocab, dims.hidden), _TABLE)
    shape = tokens_by(dims.vocab)
    logits = sheet.op("linear", (x, weight), shape, name="lm_head", at="lm_head")
    logits = sheet.op("cast", (logits,), shape, name="lm_head_cast", dtype="wide",
                      attributes={"to": "wide"})  # fmt: skip
    labels = sheet.input(labels, tokens_by(), "int64", grad=False)
    loss, count = sheet.op_of_several(
        "cross_entropy", (logits, labels), ((), ()), ("loss_sum", "loss_count"),
        attributes={"ignore_index": -100}, constant=("loss_count",),
    )  # fmt: skip
    return loss, count


def _segments(raw: Mapping[str, RawGraph], layers: Sequence[str], path: str) -> tuple[Segment, ...]:
    """The calls in order: `hidden_0` leaves the embedding, `hidden_i` layer i - 1."""

    def called(block: str, module: str, hidden: Sequence[str], outputs: tuple[str, ...]) -> Segment:
        graph = raw[block]
        inputs = tuple(hidden[0] if v == "hidden" else v for v in graph.inputs)
        parameters = tuple(f"{module}.{p}" if module else p for p in graph.parameters)
        return Segment(block, module, parameters, inputs, outputs)

    found = [called(_EMBEDDING, "", (), ("hidden_0",))]
    for i, block in enumerate(layers):
        found.append(called(block, f"{path}.{i}", (f"hidden_{i}",), (f"hidden_{i + 1}",)))
    outputs = raw[_HEAD].outputs
    return (*found, called(_HEAD, "", (f"hidden_{len(layers)}",), outputs))


def _links(raw: Mapping[str, RawGraph], segments: Sequence[Segment]) -> Iterator[Link]:
    """Values that are one tensor in several graphs: activations between blocks, what the preamble
    makes, inputs and shared parameters."""
    chains = dict.fromkeys((a.block, b.block) for a, b in pairwise(segments))
    for before, after in chains:
        yield (before, raw[before].outputs[0]), (after, "hidden")
    made: dict[str, tuple[str, str]] = {}
    for block in raw:
        graph = raw[block]
        shared = [v for v in graph.inputs if v != "hidden"]
        if block in (_EMBEDDING, _HEAD):  # a layer's parameters are its own
            shared += graph.parameters
        if block == _PREAMBLE:
            shared += graph.outputs
        for value in shared:
            if value in made:
                yield made[value], (block, value)
            made.setdefault(value, (block, value))


def _parameters(
    raw: Mapping[str, RawGraph], sheets: Mapping[str, Sheet], segments: Sequence[Segment]
) -> dict[str, Parameter]:
    kinds = {
        block: [(graph.values[p].shape({}), sheets[block].inits[p]) for p in graph.parameters]
        for block, graph in raw.items()
    }
    return {
        name: Parameter(name, shape, init)
        for segment in segments
        for name, (shape, init) in zip(segment.parameters, kinds[segment.block], strict=True)
    }
