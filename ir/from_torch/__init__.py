"""Tracing PyTorch modules into the IR.

    trace         a module, its example inputs and its loss → Model
    load_model    a MODEL specification → module on meta, example inputs, loss, source
    trace_spec    both at once
    Widen         a context in which float32 means float64: exact comparisons

How it goes: `prefix` cuts lists of equal modules short, `export` runs torch.export on meta,
`normalise` renames operations to kinds of the op table, `lift_*` find attention, rotary embedding,
norms and losses, `statics` and `views` tidy up, `segments` cuts the chain, `assemble` makes the
model and grows it back to full depth.
"""

from .models import LoadedModel, config_of, load_model, trace_loaded, trace_spec
from .presets import preset_config, preset_names
from .scaling import scale_config
from .trace import trace
from .widen import Widen

__all__ = [
    "LoadedModel", "Widen", "config_of", "load_model", "preset_config", "preset_names",
    "scale_config", "trace", "trace_loaded", "trace_spec",
]  # fmt: skip
