"""Each case as something to call: the kernel forward, and its backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..efficiency import ComputeDtype, Direction
from .cases import Case

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Operation = Callable[[], object]


def operation(case: Case, direction: Direction, device: torch.device) -> tuple[Operation, int]:
    """What to time, and how many kernels of the case it is worth.

    Operands want gradients, so that what autograd adds to a forward pass is in it.
    """
    match case.kind:
        case "matmul":
            return _product(case, direction, device)
        case "attention":
            return _attention(case, direction, device), 1
        case "normalisation":
            return _normalisation(case, direction, device), 1
        case "pointwise":
            return _pointwise(case, direction, device), 3
        case "copy":
            source = _operand((case.dims[0],), case.dtype, device).detach()
            target = source.clone()
            return lambda: target.copy_(source), 1


def _product(case: Case, direction: Direction, device: torch.device) -> tuple[Operation, int]:
    """x·Wᵀ; backward dY·W and dYᵀ·x."""
    import torch
    from torch.nn import functional

    m, k, n = case.dims
    torch.set_float32_matmul_precision("high" if case.dtype == "tf32" else "highest")
    if case.dtype == "float8":
        return _float8_product(case, device), 1
    x, w = _operand((m, k), case.dtype, device), _operand((n, k), case.dtype, device)
    if direction == "forward":
        return lambda: functional.linear(x, w), 1
    x, w = x.detach(), w.detach()
    gradient = _operand((m, n), case.dtype, device).detach()

    def backward() -> None:
        torch.mm(gradient, w)
        torch.mm(gradient.t(), x)

    return backward, 2


def _float8_product(case: Case, device: torch.device) -> Operation:
    import torch

    m, k, n = case.dims
    x = _operand((m, k), "bfloat16", device).detach().to(torch.float8_e4m3fn)
    w = _operand((n, k), "bfloat16", device).detach().to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(x, w.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def _attention(case: Case, direction: Direction, device: torch.device) -> Operation:
    from torch.nn import functional

    maps, positions, head = case.dims
    q, k, v = (_operand((1, maps, positions, head), case.dtype, device) for _ in range(3))

    def forward() -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return forward if direction == "forward" else _backward(forward, [q, k, v])


def _normalisation(case: Case, direction: Direction, device: torch.device) -> Operation:
    from torch.nn import functional

    rows, hidden = case.dims
    x, w = _operand((rows, hidden), case.dtype, device), _operand((hidden,), case.dtype, device)

    def forward() -> Tensor:
        return functional.rms_norm(x, (hidden,), w)

    return forward if direction == "forward" else _backward(forward, [x, w])


def _pointwise(case: Case, direction: Direction, device: torch.device) -> Operation:
    """A product, a sum and an activation: what a gated layer with a residual is made of."""
    from torch.nn import functional

    x = _operand(case.dims, case.dtype, device)
    y = _operand(case.dims, case.dtype, device)
    forwards = (lambda: x * y, lambda: x + y, lambda: functional.silu(x))
    parts: list[Operation] = list(forwards)
    if direction == "backward":
        operands = ([x, y], [x, y], [x])
        parts = [_backward(f, of) for f, of in zip(forwards, operands, strict=True)]

    def mixed() -> None:
        for part in parts:
            part()

    return mixed


def _backward(forward: Callable[[], Tensor], operands: list[Tensor]) -> Operation:
    import torch

    result = forward()
    gradient = torch.randn_like(result)
    return lambda: torch.autograd.grad(result, operands, gradient, retain_graph=True)


def _operand(shape: tuple[int, ...], dtype: ComputeDtype, device: torch.device) -> Tensor:
    import torch

    kind = torch.float32 if dtype in ("tf32", "float8") else getattr(torch, dtype)
    # Random values: GPUs draw less power, and run faster, on zeros.
    return torch.randn(shape, device=device).to(kind).requires_grad_()
