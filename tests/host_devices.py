"""The environment of JAX processes with several devices on this host's CPU."""

from __future__ import annotations

import os


def environment(devices: int) -> dict[str, str]:
    """With so many devices, beside the flags of XLA that all tests have (conftest.py)."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
