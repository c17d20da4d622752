"""The compiled loss past the dispatcher (csrc/loss/bce_auc_direct.cpp). Private: use cxrfast.loss_op."""

from torch import Tensor

def bce_auc(
    logits: Tensor, targets: Tensor, pos_weight: Tensor | None, class_weight: Tensor | None, counts: Tensor | None, /
) -> tuple[Tensor, Tensor, int] | None: ...
def scale_grad(grad_loss: Tensor, grad: Tensor, known: int, /) -> Tensor | None: ...
