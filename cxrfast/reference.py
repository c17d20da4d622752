"""The slow, obvious truth that fast code is held against. Tests import it, the package does not."""

from __future__ import annotations

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
