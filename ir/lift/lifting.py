"""All of lifting, in order: a draft in a framework's words becomes one in kinds of the op table."""

from __future__ import annotations

from .attention import lift_attention
from .attention_by_index import lift_attention_by_index
from .contraction import lower_einsums
from .draft import Draft
from .evaluate import Settings
from .layer_norm import lift_layer_norm
from .loss import lift_loss
from .mixture import lift_mixtures
from .pointwise import lift_activations, lift_dropout, lift_rms_norm, lift_softplus
from .rotary import lift_rotary
from .softmax import lift_means, lift_one_hot, lift_softmax
from .statics import fold_statics
from .token_loss import lift_token_loss
from .views import simplify_views


def lift(draft: Draft, make: Settings) -> None:
    """Lifts attention, rotary embeddings, norms and losses, folds what is static, tidies views.

    Raises UnsupportedOp, naming the place, for a form of these that has no op.
    """
    lift_dropout(draft)
    lift_means(draft, make)
    lift_softmax(draft)
    lift_mixtures(draft, make)
    lift_one_hot(draft, make)
    lift_token_loss(draft, make)
    lift_loss(draft, make)
    lift_attention(draft, make)
    lift_attention_by_index(draft, make)
    lower_einsums(draft)
    lift_rotary(draft, make)
    lift_rms_norm(draft)
    lift_layer_norm(draft)
    lift_activations(draft)
    lift_softplus(draft)
    fold_statics(draft, make)
    simplify_views(draft)
    draft.take_pins()
    simplify_views(draft)
