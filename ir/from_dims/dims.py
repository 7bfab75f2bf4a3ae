"""What there is to know about a transformer: its dimensions, validated."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from ..errors import InvalidInput

Norm = Literal["layer_norm", "rms_norm"]
Activation = Literal["gelu", "silu", "relu"]
Positions = Literal["learned", "rotary", "alibi", "none"]
AttentionBias = Literal["none", "qkv", "all"]
Scoring = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Attention through low ranks (DeepSeek-V2, arXiv:2405.04434, section 2.1); sizes in elements.

    `q_rank` and `kv_rank`: the compressed queries (0: not compressed) and keys and values. A head's
    queries and keys have `nope_dim` elements without positions and `rope_dim` rotated ones (keys
    share these), its values `v_dim`.
    """

    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    q_rank: int = 0

    def __post_init__(self) -> None:
        _positive(self, "kv_rank", "nope_dim", "v_dim")
        _not_negative(self, "q_rank")
        if self.rope_dim < 2 or self.rope_dim % 2:
            raise InvalidInput(f"LatentAttention.rope_dim is {self.rope_dim}: expected even, >= 2")


@dataclass(frozen=True, slots=True)
class Experts:
    """Layers with a mixture of experts in place of the MLP.

    `count` experts of inner width `ffn`, of which every token takes `top_k`; `shared` more, of
    width `shared_ffn` (0: `ffn`), take every token. The first `dense_layers` layers, and of the
    others all but every `every`-th (counted from layer 0: layers every-1, 2*every-1, ...), keep
    the dense MLP. `scoring` makes gates of router logits; `normalise` scales the chosen ones to
    a sum of 1.
    """

    count: int
    top_k: int
    ffn: int
    shared: int = 0
    shared_ffn: int = 0
    dense_layers: int = 0
    every: int = 1
    scoring: Scoring = "softmax"
    normalise: bool = True

    def __post_init__(self) -> None:
        _positive(self, "top_k", "ffn", "every")
        _not_negative(self, "shared", "shared_ffn", "dense_layers")
        _one_of(self, "scoring", Scoring)
        if self.count < 2:
            raise InvalidInput(f"Experts.count is {self.count}: expected at least 2 experts")
        if self.top_k > self.count:
            raise InvalidInput(
                f"Experts.top_k is {self.top_k}: a token cannot take more than {self.count} experts"
            )

    def at(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return layer >= self.dense_layers and (layer + 1) % self.every == 0

    @property
    def shared_width(self) -> int:
        """Inner width of all shared experts together, which are one MLP."""
        return self.shared * (self.shared_ffn or self.ffn)


@dataclass(frozen=True, slots=True)
class TransformerDims:
    """A decoder-only transformer with norms before attention and MLP. The defaults are Llama's.

    Sizes in elements, `vocab` and `max_positions` in rows; 0 for `kv_heads` means as many as
    `heads`, for `head_dim` hidden / heads; a `replace` of those must give these again. `bias`: on
    every linear layer and layer norm of the blocks; `attention_bias`: on those of attention alone,
    or of queries, keys and values alone. `fused_qkv`: one linear layer for all three, and the
    parameter names of GPT-2 (Llama's else).
    `windows`: how many tokens back the attention of a layer looks (None: all), repeated over the
    layers: `(128, None)` alternates. `dropout` after embedding, attention and MLP,
    `attention_dropout` on its weights: probabilities. `mtp_layers`: modules that predict further
    tokens (DeepSeek-V3, arXiv:2412.19437, section 2.2), part of the head.

    Raises InvalidInput for dimensions that make no transformer.
    """

    layers: int
    hidden: int
    heads: int
    ffn: int
    vocab: int
    kv_heads: int = 0
    head_dim: int = 0
    gated: bool = True
    norm: Norm = "rms_norm"
    activation: Activation = "silu"
    bias: bool = False
    attention_bias: AttentionBias = "none"
    positions: Positions = "rotary"
    max_positions: int = 0
    rotary_base: float = 10000.0
    tied: bool = False
    fused_qkv: bool = False
    qk_norm: bool = False
    embedding_norm: bool = False
    windows: tuple[int | None, ...] = (None,)
    dropout: float = 0.0
    attention_dropout: float = 0.0
    norm_eps: float = 1e-5
    latent: LatentAttention | None = None
    experts: Experts | None = None
    mtp_layers: int = 0

    def __post_init__(self) -> None:
        _positive(self, "layers", "hidden", "heads", "ffn", "vocab")
        _not_negative(self, "kv_heads", "head_dim", "max_positions", "mtp_layers")
        for name, kind in _CHOICES.items():
            _one_of(self, name, kind)
        for name in ("dropout", "attention_dropout"):
            p = getattr(self, name)
            if isinstance(p, bool) or not 0 <= p < 1:
                raise InvalidInput(
                    f"TransformerDims.{name} is {p!r}: expected a probability, 0 <= p < 1"
                )
        object.__setattr__(self, "kv_heads", self.kv_heads or self.heads)
        self._check_heads()
        if self.positions == "learned" and not self.max_positions:
            raise InvalidInput("TransformerDims.max_positions is 0: learned positions need rows")
        if not self.windows or any(w is not None and w < 1 for w in self.windows):
            raise InvalidInput(
                f"TransformerDims.windows is {self.windows!r}: expected one window or more, each "
                "None or a number of tokens above 0"
            )

    def _check_heads(self) -> None:
        if self.heads % self.kv_heads:
            raise InvalidInput(
                f"TransformerDims.kv_heads is {self.kv_heads}: expected a divisor of the "
                f"{self.heads} heads"
            )
        if self.latent:
            if self.fused_qkv or self.qk_norm or self.kv_heads != self.heads:
                raise InvalidInput(
                    "TransformerDims.latent: latent attention has keys for every head, and neither "
                    "fused_qkv nor qk_norm"
                )
            if self.positions != "rotary":
                raise InvalidInput(
                    f"TransformerDims.positions is {self.positions!r}: latent attention is rotary"
                )
            object.__setattr__(self, "head_dim", self.latent.nope_dim + self.latent.rope_dim)
            return
        if not self.head_dim and self.hidden % self.heads:
            raise InvalidInput(
                f"TransformerDims.head_dim is 0: hidden {self.hidden} is no multiple of "
                f"{self.heads} heads, so give the head_dim"
            )
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden // self.heads)
        if self.positions == "rotary" and self.head_dim % 2:
            raise InvalidInput(
                f"TransformerDims.head_dim is {self.head_dim}: rotary positions need an even one"
            )
        if self.fused_qkv and self.kv_heads != self.heads:
            raise InvalidInput(
                f"TransformerDims.kv_heads is {self.kv_heads}: fused_qkv needs as many as the "
                f"{self.heads} heads"
            )

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that are rotated."""
        return self.latent.rope_dim if self.latent else self.head_dim

    def window(self, layer: int) -> int | None:
        """How many tokens back the attention of a layer looks."""
        return self.windows[layer % len(self.windows)]

    def has_experts(self, layer: int) -> bool:
        """Whether a layer is a mixture of experts."""
        return self.experts is not None and self.experts.at(layer)

    @staticmethod
    def gpt(
        layers: int, hidden: int, heads: int, vocab: int, max_positions: int, **changes: Any
    ) -> TransformerDims:
        """GPT-2 and GPT-3 as Megatron-LM trains them: learned positions, tied embeddings, biases,
        dropout of 0.1 everywhere, an MLP of 4 * hidden. `changes` are fields that differ."""
        given: dict[str, Any] = dict(
            ffn=4 * hidden, max_positions=max_positions, gated=False, norm="layer_norm",
            activation="gelu", bias=True, positions="learned", tied=True, fused_qkv=True,
            dropout=0.1, attention_dropout=0.1,
        )  # fmt: skip
        return TransformerDims(
            layers=layers, hidden=hidden, heads=heads, vocab=vocab, **(given | changes)
        )


_CHOICES: dict[str, Any] = {
    "norm": Norm,
    "activation": Activation,
    "positions": Positions,
    "attention_bias": AttentionBias,
}
_Dims = TransformerDims | Experts | LatentAttention


def _positive(dims: _Dims, *names: str) -> None:
    for name in names:
        _whole(dims, name, 1)


def _not_negative(dims: _Dims, *names: str) -> None:
    for name in names:
        _whole(dims, name, 0)


def _whole(dims: _Dims, name: str, least: int) -> None:
    assert name in {field.name for field in fields(dims)}
    value = getattr(dims, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidInput(
            f"{type(dims).__name__}.{name} is {value!r}: expected a whole number of at least "
            f"{least}"
        )


def _one_of(dims: _Dims, name: str, kind: Any) -> None:
    value, known = getattr(dims, name), get_args(kind)
    if value not in known:
        raise InvalidInput(
            f"{type(dims).__name__}.{name} is {value!r}: expected one of {', '.join(known)}"
        )
