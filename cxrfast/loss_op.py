"""The compiled operators of csrc/loss: loading, fake kernels for torch.compile, and the autograd formula.

`torch.ops.cxrfast.weighted_bce_auc(logits, targets, pos_weight, class_weight, counts) -> (loss, grad, known)` returns
the mean loss over the known entries, the gradient of the *sum* of the losses by the logits, and the number of known
entries, and adds the scores to ``counts``; its loss is differentiable once. Where a library was not built or does not
load, `MISSING` says so and `cxrfast.loss` and `cxrfast.auc` compute the same in plain torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Device type -> why its operators are missing. Empty where all is well.
MISSING: dict[str, str] = {}


def _load(device: str, file: str) -> None:
    path = Path(__file__).with_name(file)
    if not path.exists():
        MISSING[device] = f"{file} was not built"
        return
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        MISSING[device] = f"{file} does not load: {error.__cause__ or error}"


_load("cpu", "_loss.so")
if "cpu" in MISSING:  # it holds the schemas too
    MISSING["cuda"] = "_loss.so, which it builds on, is missing"
else:
    _load("cuda", "_loss_cuda.so")


def compiled_for(device_type: str) -> bool:
    """Whether the compiled operators run on ``cpu`` or ``cuda`` tensors."""
    return device_type in ("cpu", "cuda") and device_type not in MISSING


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""The logits' types that they take."""


def weighted_bce_auc(
    logits: Tensor, targets: Tensor, pos_weight: Tensor | None, class_weight: Tensor | None, counts: Tensor | None
) -> Tensor:
    """The operator's loss. Targets and weights of any type; `torch.compile` sees one node, with no graph break."""
    targets, pos_weight, class_weight = _float32(targets), _float32(pos_weight), _float32(class_weight)
    if torch.compiler.is_compiling():
        return torch.ops.cxrfast.weighted_bce_auc(logits, targets, pos_weight, class_weight, counts)[0]
    # The same without the way through the dispatcher to `_autograd`: a third of the time of a small batch.
    return WeightedBCEFunction.apply(logits, targets, pos_weight, class_weight, counts)[0]


def auc_count(logits: Tensor, targets: Tensor, counts: Tensor) -> None:
    """Add a batch to the counts, without a loss."""
    torch.ops.cxrfast.auc_count(logits.detach(), _float32(targets), counts)


def _float32(values: Any) -> Any:
    return values if values is None or values.dtype == torch.float32 else values.to(torch.float32)


def _real(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


if "cpu" not in MISSING:
    _forward = torch.ops.cxrfast.weighted_bce_auc.default
    _backward = torch.ops.cxrfast.weighted_bce_auc_backward.default

    class WeightedBCEFunction(torch.autograd.Function):
        """The autograd formula. `apply` takes the operator's arguments and returns its results."""

        @staticmethod
        def forward(
            ctx: Any,
            logits: Tensor,
            targets: Tensor,
            pos_weight: Tensor | None,
            class_weight: Tensor | None,
            counts: Tensor | None,
        ) -> tuple[Tensor, Tensor, Tensor]:
            with torch._C._AutoDispatchBelowAutograd():  # as torch.library's own formulas do
                loss, grad, known = _forward(logits, targets, pos_weight, class_weight, counts)
            ctx.save_for_backward(grad, known)
            ctx.dtype = logits.dtype
            ctx.mark_non_differentiable(grad, known)
            ctx.set_materialize_grads(False)
            return loss, grad, known

        @staticmethod
        def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
            if grad_loss is None:
                return None, None, None, None, None
            grad, known = ctx.saved_tensors
            return _backward(grad_loss, grad, known, ctx.dtype), None, None, None, None

    def _autograd(
        logits: Tensor,
        targets: Tensor,
        pos_weight: Tensor | None = None,
        class_weight: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return WeightedBCEFunction.apply(logits, targets, pos_weight, class_weight, counts)

    # torch.library.register_autograd refuses operators that write to an argument, as ours does to the counts.
    _library = torch.library.Library("cxrfast", "IMPL")
    _library.impl("weighted_bce_auc", _autograd, "Autograd")

    @torch.library.register_fake("cxrfast::weighted_bce_auc")
    def _fake_forward(
        logits: Tensor,
        targets: Tensor,
        pos_weight: Tensor | None = None,
        class_weight: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        real = _real(logits.dtype)
        return (
            logits.new_empty((), dtype=real),
            logits.new_empty(logits.shape, dtype=real),
            logits.new_empty((), dtype=torch.int64),
        )

    @torch.library.register_fake("cxrfast::weighted_bce_auc_backward")
    def _fake_backward(grad_loss: Tensor, grad: Tensor, known: Tensor, dtype: torch.dtype) -> Tensor:
        return grad.new_empty(grad.shape, dtype=dtype)

    @torch.library.register_fake("cxrfast::auc_count")
    def _fake_count(logits: Tensor, targets: Tensor, counts: Tensor) -> None:
        return None

    @torch.library.register_fake("cxrfast::auc_pairs")
    def _fake_pairs(counts: Tensor) -> Tensor:
        return counts.new_empty((counts.shape[0], 4), dtype=torch.float64)
