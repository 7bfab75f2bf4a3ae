"""DeepSpeed without what it would compile; to be imported before it is used.

The lock of a build outlives a process that was killed, and all later ones wait for it.
"""

from __future__ import annotations

import deepspeed

deepspeed.ops.__compatible_ops__.clear()
