"""Transformers from their dimensions: the IR without a framework and without tracing.

    TransformerDims    what a published table says of a model; Experts, LatentAttention
    transformer        dims → Model, the same graph as a traced model of these dims
    dims_of_config     the contents of a Hugging Face config.json → dims
    expert_binding     {"b", "s"} → {"b", "s", "c"}: tokens per expert under balanced load

How it goes: `sheet` writes ops and values, `layers` and `experts` say which ops a decoder layer is
made of, `latent` its attention where that is DeepSeek's, `transformer` puts blocks and segments
together.
"""

from .binding import expert_binding
from .configs import dims_of_config
from .dims import Experts, LatentAttention, TransformerDims
from .transformer import transformer

__all__ = [
    "Experts", "LatentAttention", "TransformerDims", "dims_of_config", "expert_binding",
    "transformer",
]  # fmt: skip
