"""The compiled operators of csrc/loss: loading, fake kernels for torch.compile, and the autograd formula.

`torch.ops.cxrfast.weighted_bce_auc(logits, targets, pos_weight, class_weight, counts) -> (loss, grad, known)` returns
the mean loss over the known entries, the gradient of the *sum* of the losses by the logits, and the number of known
entries, and adds the scores to ``counts``; its loss is differentiable once. An eager step on the CPU takes the same
kernels past the dispatcher, whose way costs more than a small batch's arithmetic. Where a library was not built or does
not load, `MISSING` says so and `cxrfast.loss` and `cxrfast.auc` compute the same in plain torch.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Device type -> why its operators are missing. Empty where all is well.
MISSING: dict[str, str] = {}


Others = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # targets, pos_weight, class_weight, counts


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


def compiled_for(logits: Tensor) -> bool:
    """Whether the compiled operators take these logits."""
    device = "cpu" if logits.is_cpu else "cuda" if logits.is_cuda else "other"
    return device not in MISSING and logits.dtype in DTYPES and device != "other"


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""The logits' types that they take."""


def weighted_bce_auc(
    logits: Tensor, targets: Tensor, pos_weight: Tensor | None, class_weight: Tensor | None, counts: Tensor | None
) -> Tensor:
    """The operator's loss. Targets and weights of any type; `torch.compile` sees one node, with no graph break."""
    if targets.dtype is not torch.float32:
        targets = targets.to(torch.float32)
    if pos_weight is not None and pos_weight.dtype is not torch.float32:
        pos_weight = pos_weight.to(torch.float32)
    if class_weight is not None and class_weight.dtype is not torch.float32:
        class_weight = class_weight.to(torch.float32)
    others = targets, pos_weight, class_weight, counts
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return torch.ops.cxrfast.weighted_bce_auc(logits, *others)[0]
    if torch._C._are_functorch_transforms_active():
        return LossFunction.apply(logits, others)
    return _apply(logits, others)


def auc_count(logits: Tensor, targets: Tensor, counts: Tensor) -> None:
    """Add a batch to the counts, without a loss."""
    torch.ops.cxrfast.auc_count(logits.detach(), targets.to(torch.float32), counts)


def _real(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


if "cpu" not in MISSING:
    _forward = torch.ops.cxrfast.weighted_bce_auc.default
    _backward = torch.ops.cxrfast.weighted_bce_auc_backward.default

    class OperatorFunction(torch.autograd.Function):
        """The operator's autograd formula: its arguments, its three results."""

        @staticmethod
        def forward(ctx: Any, logits: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            with torch._C._AutoDispatchBelowAutograd():  # as torch.library's own formulas do
                loss, grad, known = _forward(logits, *others)
            ctx.save_for_backward(grad, known)
            ctx.dtype = logits.dtype
            ctx.mark_non_differentiable(grad, known)
            ctx.set_materialize_grads(False)
            return loss, grad, known

        @staticmethod
        def backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
            if grad_loss is None:
                return None, None, None, None, None
            return _backward(grad_loss, *ctx.saved_tensors, ctx.dtype), None, None, None, None

    # csrc/loss/bce_auc_direct.cpp: None where this torch lacks what it stands on.
    try:
        _direct: Any = import_module("cxrfast._loss")
    except ImportError:
        _direct = None

    def _seen_by_a_mode() -> bool:
        """Whether a mode wants to see the operators: fake tensors, tracers, counters of work."""
        return torch._C._len_torch_dispatch_stack() > 0 or torch._C._is_torch_function_mode_enabled()

    class LossFunction(torch.autograd.Function):
        """The loss alone, which is what an eager training step calls, past the dispatcher where that is possible.

        The gradient is kept until the backward pass, which scales it where it lies and hands it on; only a graph that
        is retained needs a copy.
        """

        @staticmethod
        def forward(ctx: Any, logits: Tensor, others: Others) -> Tensor:
            results = None
            if not (_direct is None or _seen_by_a_mode() or logits.is_neg() or others[0].is_neg()):
                results = _direct.bce_auc(logits, *others)
            if results is None:
                with torch._C._AutoDispatchBelowAutograd():
                    results = _forward(logits, *others)
            loss, grad, known = results
            ctx.kept = grad, known, logits.dtype
            return loss

        @staticmethod
        def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
            if ctx.kept is None:
                raise RuntimeError(
                    "the loss's gradient was freed by the first backward pass; give it retain_graph=True"
                )
            grad, known, dtype = ctx.kept
            if not (torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()):
                ctx.kept = None
                if isinstance(known, int) and not (_seen_by_a_mode() or grad_loss.is_neg()):
                    scaled = _direct.scale_grad(grad_loss, grad, known)
                    if scaled is not None:
                        return scaled, None
            if isinstance(known, int):
                known = torch.tensor(known)
            return _backward(grad_loss, grad, known, dtype), None

    # Function.apply unwraps functorch's tensors first, which costs as much as the arithmetic of a small batch.
    _apply = super(torch.autograd.Function, LossFunction).apply

    def _autograd(
        logits: Tensor,
        targets: Tensor,
        pos_weight: Tensor | None = None,
        class_weight: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return OperatorFunction.apply(logits, targets, pos_weight, class_weight, counts)

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
