"""The slow, obvious truth that fast code is held against. Tests import it, the package does not."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class PaperNet(nn.Module):
    """The paper's networks as its sentence has them, layer by layer: the truth for cxrfast.models.ChestNet."""

    def __init__(self, size: int, model: str = "cnn", head: str = "flatten") -> None:
        super().__init__()
        self.head = head
        self.blocks = nn.ModuleList()
        for in_channels, width in ((1, 32), (32, 64), (64, 128), (128, 256)):
            block = nn.Sequential()
            block.add_module("conv1", nn.Conv2d(in_channels, width, 3, padding=1))
            block.add_module("norm1", nn.BatchNorm2d(width))
            block.add_module("relu1", nn.ReLU())
            block.add_module("conv2", nn.Conv2d(width, width, 3, padding=1))
            block.add_module("norm2", nn.BatchNorm2d(width))
            block.add_module("relu2", nn.ReLU())
            block.add_module("pool", nn.MaxPool2d(2))
            block.add_module("dropout", nn.Dropout(0.25))
            self.blocks.append(block)
        side = size // 2 // 2 // 2 // 2
        self.hidden = nn.Linear(256 * side * side if head == "flatten" else 256, 256)
        self.metadata = nn.Linear(5, 32) if model == "multimodal" else None
        self.dropout = nn.Dropout(0.25)
        self.logits = nn.Linear(256 if model == "cnn" else 288, 14)

    def forward(self, images: Tensor, metadata: Tensor) -> Tensor:
        x = images
        for block in self.blocks:
            x = block(x)
        x = x.mean((2, 3)) if self.head == "gap" else x.flatten(1)
        x = torch.relu(self.hidden(x))
        if self.metadata is not None:
            x = torch.cat([x, torch.relu(self.metadata(metadata))], 1)
        out: Tensor = self.logits(self.dropout(x))
        return out

    def copy_to(self, net: nn.Module) -> None:
        """Give ``net``, which has no convolution biases, the same weights; keys are otherwise the same."""
        state = {
            key: value for key, value in self.state_dict().items() if not key.endswith(("conv1.bias", "conv2.bias"))
        }
        net.load_state_dict(state)
        for ours, theirs in zip(self.blocks, net.blocks, strict=True):  # type: ignore[arg-type]
            for k in "12":
                # What batch norm has seen so far was shifted by the bias.
                shifted = getattr(ours, f"norm{k}").running_mean - getattr(ours, f"conv{k}").bias.detach()
                getattr(theirs, f"norm{k}").running_mean.copy_(shifted)


# ---- the loss and the AUC ----


def weighted_bce_ref(
    logits: Tensor, targets: Tensor, pos_weight: Tensor | None = None, class_weight: Tensor | None = None
) -> tuple[float, Tensor]:
    """Loss and gradient by its formula in float64, entry by entry: the truth for cxrfast.loss.

    Returns:
        (loss, float64 (N, C) gradient of it). Targets other than 1 and 0 are unknown.
    """
    grad = torch.zeros(logits.shape, dtype=torch.float64)
    total, known = 0.0, 0
    for n in range(logits.shape[0]):
        for c in range(logits.shape[1]):
            x, y = float(logits[n, c]), float(targets[n, c])
            if y not in (0.0, 1.0):
                continue
            weight = 1.0 if class_weight is None else float(class_weight[c])
            if y == 1.0 and pos_weight is not None:
                weight *= float(pos_weight[c])
            a = -x if y == 1.0 else x  # the loss is softplus(a), its slope sigmoid(a)
            decay = math.exp(-abs(a))
            total += weight * (max(a, 0.0) + math.log1p(decay))
            slope = weight * (decay if a < 0 else 1.0) / (1.0 + decay)
            grad[n, c] = -slope if y == 1.0 else slope
            known += 1
    return total / max(known, 1), grad / max(known, 1)


def auc_ref(scores: Tensor, targets: Tensor) -> float:
    """AUC of one class by comparing every positive with every negative; NaN with one label only."""
    positives, negatives = (scores[targets == label].double() for label in (1, 0))
    if not len(positives) or not len(negatives):
        return math.nan
    won = (positives[:, None] > negatives[None]).double() + (positives[:, None] == negatives[None]).double() / 2
    return float(won.mean())
