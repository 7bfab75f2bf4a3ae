"""One training step up to the gradients: microbatches, pipeline, and the sums over ranks.

The loss of a step is the sum of its terms (valid tokens) over the global batch, divided by their
global count; the count is known before the first backward pass, so every microbatch's loss is
scaled once and gradients are only ever added.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import model
import settings
import torch
import torch.distributed as dist
from parallel import axis, axis_rank, device, is_owner, model_dtype, shard, uses_fsdp, wide_dtype
from parameters import PARAMETERS
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining._backward import stage_backward

Batch = Mapping[str, Tensor]

# the schedule has names of its own (`target`, `losses`), which an input of the model may share
BATCH_PREFIX = "batch_"

BUCKET_ELEMENTS = 1 << 25  # gradients are reduced in pieces of about this size


class Step:
    """Runs forward and backward of one step over a stage; gradients are complete afterwards."""

    def __init__(self, stage: nn.Module) -> None:
        self.stage = stage
        self.tied = _tied_groups(stage)
        self.schedule = _schedule(stage) if settings.MESH["pp"] > 1 else None

    def __call__(self, batch: Batch) -> Tensor:
        """The loss of the global batch, the same on every rank.

        `batch` holds this data-parallel rank's rows, on the device.
        """
        rows = settings.MICROBATCHES * settings.MICRO_BATCH
        for name, tensor in batch.items():
            if tensor.shape[0] != rows:
                raise ValueError(f"{name} has {tensor.shape[0]} rows, this rank takes {rows}")
        count = torch.as_tensor(model.count_terms(**batch), device=device()).to(torch.int64)
        dist.all_reduce(count, group=axis("dp"))
        scale = 1 / count.clamp(min=1).to(wide_dtype())
        if self.schedule is None:
            total = self._accumulate(batch, scale)
        else:
            total = self._pipeline(batch, scale)
        if not uses_fsdp() and settings.MESH["dp"] > 1:
            _all_reduce(_gradients(self.stage), axis("dp"))
        for names, group in self.tied:
            _all_reduce([g for name, g in _named_gradients(self.stage) if name in names], group)
        return _over_ranks(total)

    def _accumulate(self, batch: Batch, scale: Tensor) -> Tensor:
        """Microbatch after microbatch, without a pipeline."""
        total = torch.zeros((), dtype=wide_dtype(), device=device())
        for i in range(settings.MICROBATCHES):
            rows = slice(i * settings.MICRO_BATCH, (i + 1) * settings.MICRO_BATCH)
            _prepare(self.stage, last=i == settings.MICROBATCHES - 1)
            loss = self.stage(**{name: tensor[rows] for name, tensor in batch.items()}) * scale
            loss.backward()
            total += loss.detach()
        return total

    def _pipeline(self, batch: Batch, scale: Tensor) -> Tensor:
        """The same through the pipeline's schedule; only the last stage has a loss."""
        losses: list[Tensor] = []
        assert self.schedule is not None
        self.schedule.step(
            target=scale.expand(settings.MICROBATCHES),
            losses=losses if axis_rank("pp") == settings.MESH["pp"] - 1 else None,
            return_outputs=False,
            **{BATCH_PREFIX + name: tensor for name, tensor in batch.items()},
        )
        if not losses:
            return torch.zeros((), dtype=wide_dtype(), device=device())
        return torch.stack([loss.detach() for loss in losses]).sum()


def _prepare(stage: nn.Module, last: bool) -> None:
    """Tells FSDP what to do after a microbatch's backward pass.

    ZeRO 3 and 2 reduce gradients after every microbatch, so that only a shard accumulates; ZeRO 1
    after the last one. ZeRO 2 and 1 keep the parameters whole until then.
    """
    if isinstance(stage, FSDPModule):
        stage.set_requires_gradient_sync(last or settings.ZERO > 1)
        stage.set_reshard_after_backward(last or settings.ZERO > 2)
        stage.set_is_last_backward(last)


# --- the pipeline --------------------------------------------------------------------------------


class Stage(PipelineStage):
    """A pipeline stage that lets FSDP work as it does without a pipeline.

    torch's own keeps gradients and parameters whole until the last microbatch (that is ZeRO 1).
    """

    def forward_maybe_with_nosync(self, *carried: Tensor, **batch: Tensor) -> Any:
        """Runs one microbatch's forward pass."""
        return self.submod(
            *carried, **{name.removeprefix(BATCH_PREFIX): t for name, t in batch.items()}
        )

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> Any:
        """Runs one microbatch's backward pass."""
        assert backward_type == "full"
        _prepare(self.submod, last=last_backward)
        outputs, gradients = bwd_kwargs["stage_output"], bwd_kwargs["output_grads"]
        return stage_backward(outputs, gradients, bwd_kwargs["input_values"]), None

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Nothing is left to reduce."""


def _schedule(stage: nn.Module) -> Any:
    """The pipeline's schedule, told what passes between stages: no trial run is needed."""
    index, stages = axis_rank("pp"), settings.MESH["pp"]
    total = torch.empty((), dtype=wide_dtype(), device="meta")
    pipeline_stage = Stage(
        stage,
        index,
        stages,
        device(),
        input_args=_carried(index - 1) if index else (),
        output_args=_carried(index) if index < stages - 1 else (total,),
        group=axis("pp"),
    )
    schedules = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}
    return schedules[settings.SCHEDULE](
        pipeline_stage,
        settings.MICROBATCHES,
        loss_fn=lambda total, scale: total * scale.sum(),
        scale_grads=False,
    )


def _carried(boundary: int) -> tuple[Tensor, ...]:
    """Empty tensors like those that pass from stage `boundary` to the next."""
    dtypes = {"model": model_dtype(), "wide": wide_dtype()}
    return tuple(
        torch.empty(
            carried.shape(settings.MICRO_BATCH, settings.SEQ_LEN),
            dtype=dtypes[carried.dtype],
            device="meta",
            requires_grad=True,
        )
        for carried in model.CARRIED[boundary]
    )


# --- sums over ranks -----------------------------------------------------------------------------


def _named_gradients(stage: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in stage.named_parameters():
        if parameter.grad is not None:
            yield name, shard(parameter.grad)


def _gradients(stage: nn.Module) -> list[Tensor]:
    return [gradient for _, gradient in _named_gradients(stage)]


def _all_reduce(tensors: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Sums tensors over a group in place, many in one message."""
    bucket: list[Tensor] = []
    elements = 0
    pending = list(tensors)
    while pending or bucket:
        if pending and (not bucket or elements + pending[0].numel() <= BUCKET_ELEMENTS):
            bucket.append(pending.pop(0))
            elements += bucket[-1].numel()
            continue
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        dist.all_reduce(flat, group=group)
        sums = flat.split([tensor.numel() for tensor in bucket])
        for tensor, part in zip(bucket, sums, strict=True):
            tensor.copy_(part.view_as(tensor))
        bucket, elements = [], 0


def _tied_groups(stage: nn.Module) -> list[tuple[list[str], dist.ProcessGroup]]:
    """Parameters that several stages hold, with the group of this rank's copies."""
    by_stages: dict[tuple[int, ...], list[str]] = {}
    for name, _ in stage.named_parameters():
        if len(PARAMETERS[name].stages) > 1:
            by_stages.setdefault(tuple(PARAMETERS[name].stages), []).append(name)
    ranks = dist.get_process_group_ranks(axis("pp"))
    return [
        (names, dist.new_group([ranks[i] for i in stages], use_local_synchronization=True))
        for stages, names in sorted(by_stages.items())
    ]


def _over_ranks(total: Tensor) -> Tensor:
    """The loss on every rank: summed where ranks hold summands (`P`), counted once where copies."""
    last = axis_rank("pp") == settings.MESH["pp"] - 1
    counts = last and all(
        kind == "P" or axis_rank(name) == 0 for name, kind in model.LOSS_TYPES.items()
    )
    total = total.clone() if counts else torch.zeros_like(total)
    dist.all_reduce(total)
    return total


def clip_gradients(stage: nn.Module, maximum: float) -> Tensor:
    """Scales all gradients so that their norm is at most `maximum`; returns the norm before.

    Every element of the model counts once, however many ranks or stages hold a copy of it.
    """
    gradients = _gradients(stage)
    owned = [g for name, g in _named_gradients(stage) if is_owner(name) and g.numel()]
    squares = torch.zeros((), dtype=torch.float64, device=device())
    if owned:
        squares += torch.stack(torch._foreach_norm(owned)).double().square().sum()
    dist.all_reduce(squares)
    norm = squares.sqrt()
    factor = (maximum / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, factor.to(wide_dtype()))
    return norm
