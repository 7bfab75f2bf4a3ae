"""How a framework runs a graph: its kernels, what it overlaps, what it keeps and reserves.

A graph says what is computed; a *runtime* says how: attention fused into one kernel or as three
with its scores in memory, pointwise ops fused or one by one, gradients reduced beside the backward
pass or after it. Presets are facts about frameworks, with their sources, in `data/runtimes.yaml`;
`torch` is what the torch backend emits.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from . import yaml_files
from .overlap import OverlapMode

AttentionKernel = Literal["flash", "flash2", "flash1", "unfused"]
"""`flash`: scores stay on the chip, in the maker's kernel for the device. `flash2`:
FlashAttention-2, as torch's SDPA has it, which newer devices leave behind. `flash1`: the first
version (arXiv:2205.14135), half as fast (arXiv:2307.08691, section 4.1). `unfused`: product,
softmax, product, with scores and probabilities in memory and no saving from a causal mask
(Megatron-LM until 2023)."""

Selective = Literal["contractions", "alternate-contractions", "core-attention"]
"""What selective recomputation keeps: all contractions and attention (torch's policy), attention
and every second contraction (torchtitan's option `op`), or everything but the attention core
(Korthikanti et al. 2022, arXiv:2205.05198)."""

CrossEntropy = Literal["log-probabilities", "probabilities", "logits", "in-place"]
"""What a cross-entropy keeps for its backward pass. `log-probabilities`: eager torch, at least in
float32, with a gradient of these and one of the float32 logits beside them. `probabilities`: in
float32, turned into the gradient in place (Megatron-LM's vocab-parallel one). `logits`: as they
were made, with a gradient of their dtype beside them (a compiled loss, flash-attention's kernel).
`in-place`: as they were made, overwritten with their gradient (Transformer Engine's kernel)."""


class Runtime(BaseModel):
    """The facts of a framework that time and memory depend on.

    `layout`: what decides how tensor ranks split a block, our search (`planned`) or a rule by which
    every product is split (`split`, Megatron-LM's).
    `host_s_per_call`: seconds the processor takes for one call of an op: to launch a kernel, or to
    make a view. It runs ahead of the device, so it counts where kernels are shorter.
    `synchronous_launches`: it waits for each kernel instead (CUDA_LAUNCH_BLOCKING=1),
    `launch_wait_s` more per call. `calls_per_collective` and `calls_per_checkpoint`: what a
    collective and a recomputed block (saving and restoring random states) are worth in calls.
    `collective_gap_s`: the device idles this long around a collective, which runs in a stream of
    its own that waits for the compute before it and is waited for by the compute after it.
    `gradient_bytes`: bytes of a gradient as it is accumulated and reduced (None: the precision's).
    `overlap_gradients`, `overlap_gathers`: data-parallel reductions hide behind the last backward
    pass, gathers of parameters behind the next forward pass. `overlap_from_zero`: the ZeRO stage
    from which gradients do so. `fused_accumulation`: products add to the gradients of microbatches
    before, which costs no pass of its own. `transfer_blocks`: a pipeline stage waits for its
    sends. `transfer_split`: an activation that all tensor ranks hold whole is sent in `tp` pieces
    and gathered again (Megatron-LM's scatter/gather, arXiv:2104.04473, section 4.1).
    `tensor_overlap`: how tensor-parallel communication hides behind products, in `overlap_chunks`
    where it is cut (`overlap.tensor_exposed_seconds`). `outer_every`: replicas are averaged only
    every so many steps (`overlap.outer_exposed_seconds`), which trains differently.
    `dropout_mask_bytes`: kept per dropped element (none where the mask is drawn again).
    `cross_entropy`: what a loss keeps. `gathers_again`: of an activation that is gathered for a
    product only the rank's own part is kept. `early_gates`: gates of experts are applied before
    their last product, so that what experts return is not kept. `keeps_outputs`: a stage holds its
    output until the backward pass. `transient_gradients`: gradients of parameters are made whole,
    in the compute dtype, before they are added up (FSDP's are counted with its gathers).
    `placeholder_gradients`: products that add to the accumulated gradient return a placeholder
    to autograd, one for every shape of weight and never freed. `flat_optimizer`: DeepSpeed's, whose
    step copies gradients into flat buffers, see `memory.flat_buffer_bytes`.
    `reserve_bytes`: framework, collective library and allocator, beyond the device's driver.
    `fragmentation_fraction`: what the allocator wastes of what is in use at the peak.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    layout: Literal["planned", "split"] = "split"
    attention: AttentionKernel = "flash"
    selective: Selective = "contractions"
    fused_pointwise: bool = False
    host_s_per_call: float = Field(ge=0)
    synchronous_launches: bool = False
    launch_wait_s: float = Field(default=20e-6, ge=0)
    calls_per_collective: int = Field(default=3, ge=0)
    collective_gap_s: float = Field(default=25e-6, ge=0)
    calls_per_checkpoint: int = Field(default=16, ge=0)
    gradient_bytes: int | None = Field(default=None, gt=0)
    overlap_gradients: bool = True
    overlap_from_zero: int = Field(default=0, ge=0, le=3)
    overlap_gathers: bool = True
    fused_accumulation: bool = False
    transfer_blocks: bool = False
    transfer_split: bool = False
    tensor_overlap: OverlapMode = "none"
    overlap_chunks: int = Field(default=4, ge=1)
    outer_every: int = Field(default=1, ge=1)
    dropout_mask_bytes: int = Field(default=0, ge=0)
    cross_entropy: CrossEntropy = "log-probabilities"
    gathers_again: bool = False
    early_gates: bool = False
    keeps_outputs: bool = False
    transient_gradients: bool = False
    placeholder_gradients: bool = False
    flat_optimizer: bool = False
    reserve_bytes: int = Field(default=0, ge=0)
    fragmentation_fraction: float = Field(default=0.0, ge=0, lt=1)

    @staticmethod
    def preset(name: str, **changes: Any) -> Runtime:
        """A known framework, with fields changed; raises InvalidInput with the nearest names."""
        entry = yaml_files.pick(yaml_files.packaged("runtimes"), name, "runtime")
        return yaml_files.validated(Runtime, {"name": name, **entry, **changes}, f"runtime {name}")

    @staticmethod
    def preset_names() -> tuple[str, ...]:
        """Names that `preset` takes, in the order of the data file."""
        return tuple(yaml_files.packaged("runtimes"))
