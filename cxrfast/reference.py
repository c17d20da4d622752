"""The slow, obvious truth that fast code is held against. Tests import it, the package does not."""

from __future__ import annotations

import math

import numpy as np
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


# ---- PNG's rows and the resize ----


def unfilter_ref(rows: np.ndarray, bpp: int) -> np.ndarray:
    """The rows of a PNG image without their filters, one byte after the other.

    Args:
        rows: uint8 (H, 1 + B), each row's filter byte (0 to 4) and its B filtered bytes.
        bpp: bytes per complete pixel, at least 1.
    Returns:
        uint8 (H, B).
    Source: PNG specification, section 9.
    """
    height, nbytes = rows.shape[0], rows.shape[1] - 1
    out = np.zeros((height + 1, nbytes + bpp), np.int64)  # zeros above the first row and left of the first pixel
    for y in range(height):
        for i in range(nbytes):
            a, b, c = out[y + 1, i], out[y, i + bpp], out[y, i]
            p = a + b - c
            paeth = min((a, b, c), key=lambda value: abs(p - value))
            predictor = (0, a, b, (a + b) // 2, paeth)[rows[y, 0]]
            out[y + 1, i + bpp] = (int(rows[y, i + 1]) + predictor) % 256
    return out[1:, bpp:].astype(np.uint8)


def resize_ref(grey: np.ndarray, size: int) -> np.ndarray:
    """The pixel rule "pillow-bilinear": uint8 (H, W) to uint8 (size, size).

    A triangle filter as wide as the scale, cut and normalised at the border, in fixed point with 22 fractional bits;
    rounded to uint8 after each pass. The horizontal pass comes first unless the height shrinks more than twice as far
    as the width.
    Source: Pillow 13.0, src/libImaging/Resample.c.
    """

    def shrink_columns(image: np.ndarray) -> np.ndarray:
        width = image.shape[1]
        scale = width / size
        reach = max(scale, 1.0)
        weights = np.zeros((size, width), np.int64)
        for o in range(size):
            center = (o + 0.5) * scale
            first, end = max(0, int(center - reach + 0.5)), min(width, int(center + reach + 0.5))
            exact = [max(0.0, 1.0 - abs((x - center + 0.5) * (1.0 / reach))) for x in range(first, end)]
            total = 0.0
            for weight in exact:  # not sum(), which compensates its rounding from Python 3.12 on
                total += weight
            weights[o, first:end] = [int(0.5 + weight / total * 2**22) for weight in exact]
        return np.clip((image @ weights.T + 2**21) >> 22, 0, 255)

    image = grey.astype(np.int64)
    height, width = image.shape
    if height - size > max(0, 2 * (width - size)):
        image = shrink_columns(shrink_columns(image.T).T)
    else:
        image = shrink_columns(shrink_columns(image).T).T
    return image.astype(np.uint8)
