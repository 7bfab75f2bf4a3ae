"""MODEL specifications: a preset name, a Hugging Face config, `package.module:callable`.

Nothing is downloaded. Large models are built on meta; a model made small for `verify` has values.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..callables import FunctionModel, called, function_parts
from ..errors import InvalidInput
from ..graph import Model
from .export import token_inputs
from .inits import skeleton
from .presets import nearest, preset_config, preset_names
from .scaling import scale_config
from .trace import trace

_LARGEST_REAL = 500_000_000
"""Parameters of a model with values: 2 GB in float32."""


@dataclass(frozen=True)
class LoadedModel:
    """A module with example inputs and loss, and a note that lets it be loaded again.

    `source` is plain data for JSON files: `load_model(source)` gives the same model.
    """

    name: str
    module: nn.Module
    example_inputs: Mapping[str, Tensor] | Sequence[Tensor]
    loss: Callable[..., Any] | None
    source: Mapping[str, Any]

    def build_real(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
        """The module with values on the CPU, freshly initialised. Raises InvalidInput for one that
        is too large to have around."""
        count = sum(p.numel() for p in self.module.parameters())
        if count > _LARGEST_REAL:
            raise InvalidInput(
                f"{self.name} has {count / 1e9:.1f} billion parameters, at most "
                f"{_LARGEST_REAL / 1e9:g} billion can be run here: load it with small=True"
            )
        torch.manual_seed(seed)
        if "config" in self.source:
            made: nn.Module = type(self.module)(self.module.config)
        else:
            made, _, _ = _called(str(self.source["callable"]))
        return made.to(dtype)


def load_model(
    spec: str | Path | Mapping[str, Any] | nn.Module,
    *,
    small: bool = False,
    tp: int = 1,
    layers: int | None = None,
) -> LoadedModel:
    """Resolves a MODEL specification.

    Arguments:
        spec: a preset name; a Hugging Face config.json or its folder; `package.module:callable`,
            which returns a module, `(module, example_inputs)` or `(module, example_inputs, loss)`;
            a `source` of a loaded model or the contents of a config.json; a Hugging Face module.
        small: scale a Hugging Face config down, keeping its structure, to sizes that `tp` divides
            and to `layers` layers. What a callable returns keeps its size, and has values.

    Raises InvalidInput for what is none of these, naming the nearest presets.
    """
    if isinstance(spec, nn.Module):
        config = getattr(spec, "config", None)
        if not hasattr(config, "model_type"):
            raise InvalidInput(
                f"{type(spec).__name__}: a module in memory cannot be built again; give "
                "package.module:callable that returns it"
            )
        return _from_config(type(spec).__name__, config, small, tp, layers)
    if isinstance(spec, Mapping):
        return _from_source(spec, small, tp, layers)
    text = str(spec)
    if text in preset_names():
        return _from_config(text, _parsed(preset_config(text), text), small, tp, layers)
    if path := _config_file(Path(text).expanduser()):
        name = path.parent.name if path.name == "config.json" else path.stem
        return _from_config(name, _parsed(_read(path), str(path)), small, tp, layers)
    module, colon, function = text.partition(":")
    if colon and module and function:
        return _from_callable(text, small)
    raise InvalidInput(
        f"model {text!r}: no preset, no config file and no package.module:callable; {nearest(text)}"
    )


def trace_loaded(loaded: LoadedModel) -> Model:
    """The graph of a loaded model, with its source."""
    model = trace(loaded.module, loaded.example_inputs, loss=loaded.loss, name=loaded.name)
    return model.with_source(loaded.source)


def trace_spec(spec: str | Path | Mapping[str, Any]) -> Model:
    """The graph of a MODEL specification; see `load_model` and `trace` for what they raise."""
    return trace_loaded(load_model(spec))


def config_of(spec: str) -> dict[str, Any] | None:
    """The Hugging Face config behind a MODEL specification; None where it is a callable, or no
    config at all (`load_model` says what is wrong with it then)."""
    if spec in preset_names():
        return preset_config(spec)
    path = Path(spec)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return dict(found) if isinstance(found, dict) and "model_type" in found else None


def _from_source(
    source: Mapping[str, Any], small: bool, tp: int, layers: int | None
) -> LoadedModel:
    if "callable" in source:
        return _from_callable(str(source["callable"]), small)
    config = source.get("config", source)
    if not isinstance(config, Mapping):
        raise InvalidInput(f"model source: expected a config or a callable, got {sorted(source)}")
    name = str(source.get("name") or config.get("model_type") or "model")
    return _from_config(name, _parsed(config, name), small, tp, layers)


def _config_file(path: Path) -> Path | None:
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InvalidInput(f"model folder {path}: it has no config.json")
        return path / "config.json"
    return path if path.is_file() else None


def _read(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidInput(f"model config {path}: {error}") from None
    if not isinstance(data, dict):
        raise InvalidInput(f"model config {path}: expected an object, got {type(data).__name__}")
    return data


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise InvalidInput(
            "Hugging Face configs and presets need transformers: pip install shardwright[hf]"
        ) from None
    transformers.logging.set_verbosity_error()
    return transformers


def _parsed(data: Mapping[str, Any], where: str) -> Any:
    """The transformers config of the contents of a config.json."""
    transformers = _transformers()
    kind = data.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise InvalidInput(
            f"model config {where}: its model_type is {kind!r}, so it is none of Hugging Face"
        )
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    if kind not in known:
        raise InvalidInput(
            f"model config {where}: transformers {transformers.__version__} has no architecture "
            f"{kind!r}; give a package.module:callable that returns the module"
        )
    try:
        return known[kind].from_dict(dict(data))
    except Exception as error:
        raise InvalidInput(f"model config {where}: {type(error).__name__}: {error}") from None


def _from_config(name: str, config: Any, small: bool, tp: int, layers: int | None) -> LoadedModel:
    transformers = _transformers()
    source = {"name": name, "config": config.to_diff_dict() | {"model_type": config.model_type}}
    if small:
        config = scale_config(config, tp, layers)
    config.use_cache = False
    try:
        with torch.device("meta"):
            module = transformers.AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        first = str(error).splitlines()[0][:160]
        raise InvalidInput(
            f"model {name}: architecture {config.model_type!r} has no causal language model head "
            f"in transformers ({first})"
        ) from None
    return LoadedModel(
        name, module, token_inputs(), None, json.loads(json.dumps(source, default=str))
    )


def _from_callable(path: str, small: bool) -> LoadedModel:
    if small:
        module, inputs, loss = _called(path)
    else:
        with skeleton():
            module, inputs, loss = _called(path)
    return LoadedModel(path.partition(":")[2], module, inputs, loss, {"callable": path})


def _called(
    path: str,
) -> tuple[nn.Module, Mapping[str, Tensor] | Sequence[Tensor], Callable[..., Any] | None]:
    """(module, example inputs, loss) of a callable."""
    returned = called(path, nn.Module)
    parts = function_parts(returned)
    if parts is not None and not isinstance(parts[0], nn.Module):
        raise FunctionModel(path, parts)
    given = returned if isinstance(returned, tuple) else (returned,)
    module, inputs, loss = (*given, None, None)[:3]
    if len(given) > 3 or not isinstance(module, nn.Module):
        raise InvalidInput(
            f"model {path!r}: expected a torch module, (module, example_inputs) or "
            f"(module, example_inputs, loss), got {_shown(returned)}"
        )
    if inputs is None:
        if not hasattr(getattr(module, "config", None), "model_type"):
            raise InvalidInput(
                f"model {path!r}: it returns {type(module).__name__} without example inputs; "
                "return (module, example_inputs)"
            )
        inputs = token_inputs()
    if isinstance(inputs, Tensor):
        inputs = (inputs,)
    return module, inputs, loss


def _shown(returned: object) -> str:
    if isinstance(returned, tuple):
        return f"({', '.join(type(part).__name__ for part in returned)})"
    return type(returned).__name__
