"""Tracing JAX functions into the IR.

    trace     a function (params, *inputs) -> loss, its parameters and example inputs → Model
    annotate  pins inside of functions
    weights_of  arrays of a tree by these names
    widen     a function in which float32 means float64: exact comparisons

How it goes: `trace` makes a jaxpr with symbolic batch and sequence, `flatten` sees through its
calls and writes out the first iterations of scans over layers, `normalise` renames primitives to
kinds of the op table, `ir/lift` finds attention, rotary embedding, norms and losses, `repeats` cuts
the chain by the names of parameters, and `ir/lift` makes the model and grows it to full depth.
"""

from .annotate import annotate, is_array
from .trace import trace
from .trees import weights_of
from .widen import widen

__all__ = ["annotate", "is_array", "trace", "weights_of", "widen"]
