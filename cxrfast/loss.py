"""Binary cross-entropy on logits, weighted by class, that counts the scores for the AUC on its way.

Promises: the mean over the known entries, in fp32 for half-precision logits too; an unknown target gives no loss, no
gradient and no count. The compiled operator (csrc/loss) computes all of it in one pass; `weighted_bce` and
`cxrfast.auc.add_counts` are the same in plain torch, for where it is missing. Left out: soft labels (targets are 1, 0
or unknown), second derivatives.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxrfast import loss_op
from cxrfast.auc import AucCounts, add_counts, check_batch
from cxrfast.errors import InputError

Weighting = Literal["positive", "class", "none"]


def class_weights(targets: Any, weighting: Weighting = "positive") -> tuple[Tensor, Tensor]:
    """Weights by the reciprocal of each class's prevalence (the paper, section 3.2).

    Args:
        targets: (N, C) of the training split, tensor or NumPy array: 1, 0, and everything else unknown.
        weighting: "positive" puts the weight on the positive term, "class" on the class's whole term, "none" nowhere.
    Returns:
        (pos_weight, class_weight): float32 (C,) each. Prevalence is positives / known entries. A class without a
        positive has no prevalence to go by, and its weight is 1.
    """
    if weighting not in ("positive", "class", "none"):
        raise InputError(f"weighting must be positive, class or none, not {weighting!r}")
    targets = torch.as_tensor(targets)
    if targets.dim() != 2:
        raise InputError(f"targets must be (N, C), got {tuple(targets.shape)}")
    n_pos = (targets == 1).sum(0)
    n_known = n_pos + (targets == 0).sum(0)
    reciprocal = torch.where(n_pos > 0, n_known / n_pos.clamp(min=1), 1.0).to(torch.float32)
    ones = torch.ones_like(reciprocal)
    return (
        reciprocal if weighting == "positive" else ones,
        reciprocal if weighting == "class" else ones.clone(),
    )


class WeightedBCEWithAUC(nn.Module):
    """Weighted BCE with logits; with ``counts``, the scores are added to them in the same pass.

    It replaces these two lines::

        loss = F.binary_cross_entropy_with_logits(logits.float(), targets, class_weight, pos_weight=pos_weight)
        auroc.update(logits.sigmoid(), targets.int())

    Args:
        pos_weight: (C,) weight of the positive term; 1 by default. Kept as a float32 buffer.
        class_weight: (C,) weight of a class's whole term; 1 by default. Kept as a float32 buffer.
    """

    pos_weight: Tensor | None
    class_weight: Tensor | None

    def __init__(self, pos_weight: Tensor | None = None, class_weight: Tensor | None = None) -> None:
        super().__init__()
        for name, weight in (("pos_weight", pos_weight), ("class_weight", class_weight)):
            if weight is not None:
                weight = weight.detach().resolve_neg().to(torch.float32)
                if weight.dim() != 1:
                    raise InputError(f"{name} must be (C,), got {tuple(weight.shape)}")
            self.register_buffer(name, weight)

    def forward(self, logits: Tensor, targets: Tensor, counts: AucCounts | None = None) -> Tensor:
        """The loss, a float32 scalar.

        Args:
            logits: floating (N, C), any strides.
            targets: (N, C), any dtype: 1, 0, and everything else (NaN, -1) unknown.
            counts: AUC counts that this batch is added to, detached.
        Returns:
            sum over known entries of class_weight * (pos_weight * y * softplus(-x) + (1 - y) * softplus(x)), divided by
            their number; 0 where nothing is known.
        Raises:
            InputError: shapes that disagree, or logits that are not floating.
        """
        pos_weight, class_weight = self._buffers["pos_weight"], self._buffers["class_weight"]  # past Module.__getattr__
        if loss_op.compiled_for(logits):
            tensor = None if counts is None else counts.counts
            try:
                return loss_op.weighted_bce_auc(logits, targets, pos_weight, class_weight, tensor)
            except RuntimeError:
                self._check(logits, targets, counts)  # says it in a sentence, if it was the arguments
                raise
        self._check(logits, targets, counts)
        if counts is not None:
            add_counts(logits, targets, counts.counts)
        return weighted_bce(logits, targets, pos_weight, class_weight)

    def _check(self, logits: Tensor, targets: Tensor, counts: AucCounts | None) -> None:
        check_batch(logits, targets, counts)
        for name, weight in (("pos_weight", self.pos_weight), ("class_weight", self.class_weight)):
            if weight is not None and weight.shape[0] != logits.shape[1]:
                raise InputError(f"{name} must be ({logits.shape[1]},), got {tuple(weight.shape)}")
            if weight is not None and weight.device != logits.device:
                raise InputError(f"{name} is on {weight.device}, the logits are on {logits.device}")


def weighted_bce(logits: Tensor, targets: Tensor, pos_weight: Tensor | None, class_weight: Tensor | None) -> Tensor:
    """Plain torch: the loss of `WeightedBCEWithAUC.forward` for a checked batch."""
    positive = targets == 1
    known = positive | (targets == 0)
    x = torch.where(known, logits, 0).to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.softplus(torch.where(positive, -x, x))
    if pos_weight is not None:
        loss = loss * torch.where(positive, pos_weight, 1)
    if class_weight is not None:
        loss = loss * class_weight
    return torch.where(known, loss, 0).sum() / known.sum().clamp(min=1)
