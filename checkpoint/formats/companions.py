"""What Hugging Face keeps beside weights: config, tokenizer, code of the model.

Every format carries these files at the top of its directory, as `transformers`' Trainer lays them
beside the checkpoints of DeepSpeed and FSDP; no loader of any format minds them there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from ...ir.errors import CorruptCheckpoint, InvalidInput
from ..contents import Contents, Given
from ..paths import within

CONFIG = "config.json"

_LARGEST_BYTES = 64 << 20
_NAMES = (
    CONFIG, "generation_config.json", "chat_template*", "tokenizer*", "special_tokens_map*",
    "added_tokens.json", "vocab*", "merges.txt", "*.model", "preprocessor_config.json",
    "processor_config.json", "*.py", "LICENSE*", "README.md",
)  # fmt: skip
_OF_FORMATS = ("zero_to_fp32.py",)  # DeepSpeed's own script, of that checkpoint only


def companions(root: Path, follows_links: bool = False) -> list[Given]:
    """The config and tokenizer files of a folder, to be written beside other weights.

    Raises CorruptCheckpoint for links that lead out of it, unless they are to be followed.
    """
    paths = {path.name: path for pattern in _NAMES for path in root.glob(pattern)}
    return [
        Given(name, 0, (path if follows_links else within(root, name)).read_bytes())
        for name, path in sorted(paths.items())
        if path.is_file() and path.stat().st_size <= _LARGEST_BYTES and name not in _OF_FORMATS
    ]


def carried(contents: Contents, root: Path, config: Path | None) -> list[Given]:
    """The companions that go with a checkpoint: those of the folder `config`, else those that it
    promises, else those of a Hugging Face folder in which it lies (`root`, as the user named it).

    Raises CorruptCheckpoint where a promised one is not as promised, InvalidInput where `config` is
    no folder.
    """
    if config is not None:
        if not config.is_dir():
            raise InvalidInput(f"--config {config}: expected a folder with a {CONFIG}")
        return companions(config, follows_links=True)
    if contents.companions:
        found = []
        for name, digest in contents.companions.items():
            data = within(contents.root, name).read_bytes()
            if xxhash.xxh3_128_hexdigest(data) != digest:
                raise CorruptCheckpoint(
                    f"{contents.root / name}: it is damaged (XXH3 expected: {digest}); take "
                    "another copy"
                )
            found.append(Given(name, 0, data))
        return found
    if contents.format == "safetensors":
        return companions(contents.root)
    if contents.format == "universal":
        return []  # its manifest names all that belongs to it
    home = next((folder for folder in (root, contents.root) if config_of(folder)), None)
    return companions(home) if home is not None else []


def config_of(root: Path) -> dict[str, Any]:
    """What `config.json` of a Hugging Face folder says; empty where there is none. Raises
    CorruptCheckpoint for one that is no JSON."""
    try:
        found = json.loads(within(root, CONFIG).read_bytes())
    except (OSError, CorruptCheckpoint):
        return {}
    except ValueError:
        raise CorruptCheckpoint(
            f"{root / CONFIG}: no JSON: it is truncated or damaged; restore it, or remove it and "
            "name another folder with --config"
        ) from None
    is_model = isinstance(found, dict) and ("model_type" in found or "architectures" in found)
    return dict(found) if is_model else {}


def with_config(contents: Contents, root: Path, given: Path | None = None) -> Mapping[str, Any]:
    """Sizes of the model: what a checkpoint tells itself goes before the config that is `given`, or
    else lies beside it."""
    if given is None and contents.format == "universal":
        return contents.facts  # its manifest has what its config says
    return {**config_of(given or root), **contents.facts}
