"""The paper's two networks (sections 3.3 and 3.4), and how a film's metadata is encoded for the multimodal one.

Four blocks, each twice (3x3 convolution with padding 1, batch norm, ReLU), then 2x2 max-pool and dropout 0.25; widths
32, 64, 128, 256; flatten, 256 neurons, ReLU, dropout 0.25, 14 logits. The multimodal network widens that layer by 32
neurons which see age, sex and view.

Three things are written differently from the paper's sentence without changing the function, and a test holds each to
the plain form: the convolutions have no bias (the batch norm behind them subtracts any constant), the second ReLU of a
block comes after its max-pool (both are monotone, so they commute, and ReLU then touches a quarter of the map), and
dropout draws one random byte per value instead of one float (0.25 = 64/256, exactly). Batch norm and what follows it
is one pass (block.py) where that was built.

Left out: anything about training (train.py) and about where images come from (data.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxrfast import block as fused
from cxrfast.errors import InputError
from cxrfast.nih import CLASSES

ModelName = Literal["cnn", "multimodal"]
HeadName = Literal["flatten", "gap"]

WIDTHS = (32, 64, 128, 256)
HIDDEN = 256  # neurons of the flat layer
METADATA_HIDDEN = 32  # neurons that the multimodal network adds to it
METADATA = ("age", "sex_M", "sex_F", "view_PA", "view_AP")
DROPOUT = 0.25
MIN_SIZE = 2 ** len(WIDTHS)  # below it the last pooled map is empty


class Noise:
    """The random bytes of dropout: a function of (seed, step) alone, whatever the number of processes.

    Every process draws the bytes of the whole global batch and keeps those of its own rows, so that the masks of a step
    are the same on one device and on several, and nothing but the step number has to be saved to go on exactly. The
    bytes cost about a twelfth of what `torch.nn.functional.dropout` spends on its floats on a CPU. They lie at the same
    place in every step of the same size: what was captured as a graph finds them there.
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self._seed = seed
        self._generator = torch.Generator(device)
        self._words: dict[int, Tensor] = {}

    def draw(self, step: int, shapes: Sequence[Sequence[int]], rows: slice, num_rows_global: int) -> list[Tensor]:
        """One map of bytes for each dropout of a step: uint8 (N, C, H, W) in channels-last order, or (N, C).

        Args:
            step: number of the step; the same gives the same bytes.
            shapes: (C, H, W) or (C,), of one film (`ChestNet.noise_shapes`).
            rows: ours of the global batch's rows, N of them.
            num_rows_global: rows of the global batch.
        """
        self._generator.manual_seed(mix_seed(self._seed, step))
        return [self._draw(number, shape, rows, num_rows_global) for number, shape in enumerate(shapes)]

    def _draw(self, number: int, shape: Sequence[int], rows: slice, num_rows: int) -> Tensor:
        row_nbytes = math.prod(shape)
        count = -(-num_rows * row_nbytes // 8)
        words = self._words.get(number)
        if words is None or len(words) < count:
            words = self._words[number] = torch.empty(count, dtype=torch.int64, device=self._generator.device)
        # random_() without bounds draws 63 bits and leaves the sign bit 0, which would bias every eighth byte.
        words[:count].random_(-(2**63), None, generator=self._generator)
        drawn = words.view(torch.uint8)[rows.start * row_nbytes : rows.stop * row_nbytes]
        if len(shape) == 3:
            C, H, W = shape
            return drawn.view(-1, H, W, C).permute(0, 3, 1, 2)
        return drawn.view(-1, *shape)


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers (splitmix64's finaliser over each), so that neighbours do not correlate."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1


class Dropout(nn.Module):
    """Dropout whose mask comes from `Noise` bytes. The probability is ``p`` rounded to 1/256: 0.25 is exact.

    Without them it is torch's own dropout.
    """

    def __init__(self, p: float = DROPOUT) -> None:
        super().__init__()
        self.threshold = round(p * 256)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        p = self.threshold / 256
        if not self.training or self.threshold == 0:
            return x
        if noise is None:
            return F.dropout(x, p)
        return x * ((noise >= self.threshold) * (1 / (1 - p))).to(x.dtype)


class Block(nn.Module):
    """(N, in, H, W) to (N, out, H/2, W/2): two convolutions, each with batch norm and ReLU, then pool and dropout."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.dropout = Dropout()

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        drops = self.training and self.dropout.threshold > 0
        if fused.usable(x, self.conv1.out_channels) and (noise is not None or not drops):
            x = fused.conv_norm_relu_conv(x, self.conv1, self.norm1, self.conv2)
            return fused.norm_pool(x, self.norm2, noise if drops else None, self.dropout.threshold)
        x = self.conv1(x)
        x = self.conv2(F.relu(self.norm1(x), inplace=True))
        x = F.relu(F.max_pool2d(self.norm2(x), 2), inplace=True)
        return self.dropout(x, noise)


class ChestNet(nn.Module):
    """The paper's network for prepared films of one size.

    Args:
        size: S, the side of an image in pixels, at least 16; a side that is not a multiple of 16 loses its remainder
            in the pooling.
        model: ``cnn`` sees the image alone, ``multimodal`` the metadata too.
        head: ``flatten`` is the paper's; ``gap`` averages each feature map first (1.2 M instead of 14.0 M parameters at
            224 pixels).
    """

    def __init__(self, size: int, model: ModelName = "cnn", head: HeadName = "flatten") -> None:
        super().__init__()
        if model not in get_args(ModelName):
            raise InputError(f"there is no model {model!r}; choose one of {', '.join(get_args(ModelName))}")
        if head not in get_args(HeadName):
            raise InputError(f"there is no head {head!r}; choose one of {', '.join(get_args(HeadName))}")
        if size < MIN_SIZE:
            raise InputError(f"the network halves the image four times and needs {MIN_SIZE} pixels a side, not {size}")
        self.size, self.model, self.head = size, model, head
        self.blocks = nn.ModuleList(Block(a, b) for a, b in zip((1, *WIDTHS), WIDTHS, strict=False))
        side = size // 2 ** len(WIDTHS)
        self.hidden = nn.Linear(WIDTHS[-1] * (side * side if head == "flatten" else 1), HIDDEN)
        self.metadata = nn.Linear(len(METADATA), METADATA_HIDDEN) if model == "multimodal" else None
        self.dropout = Dropout()
        self.logits = nn.Linear(HIDDEN + (METADATA_HIDDEN if self.metadata is not None else 0), len(CLASSES))

    def forward(self, images: Tensor, metadata: Tensor | None = None, noise: Sequence[Tensor] | None = None) -> Tensor:
        """Logits, (N, 14), in the order of ``CLASSES``.

        Args:
            images: (N, 1, S, S), normalised by the training split's mean and standard deviation.
            metadata: float32 (N, 5), columns ``METADATA``; needed by the multimodal network, ignored by the other.
            noise: random bytes for the dropouts (`Noise.draw` with `noise_shapes`); None leaves them to torch's
                generator. Evaluated, the network drops nothing.
        """
        x = images
        for number, block in enumerate(self.blocks):
            x = block(x, None if noise is None else noise[number])
        x = x.mean((2, 3)) if self.head == "gap" else x.flatten(1)
        x = F.relu(self.hidden(x))
        if self.metadata is not None:
            if metadata is None:
                raise ValueError("the multimodal network needs metadata (N, 5)")
            x = torch.cat([x, F.relu(self.metadata(metadata)).to(x.dtype)], 1)
        return self.logits(self.dropout(x, None if noise is None else noise[-1]))

    def noise_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of what its dropouts see of one film, in the order of `forward`'s ``noise``."""
        sides = [self.size // 2 ** (number + 1) for number in range(len(WIDTHS))]
        return [*((C, side, side) for C, side in zip(WIDTHS, sides, strict=True)), (self.logits.in_features,)]

    def flops_per_image(self, *, training: bool) -> int:
        """Floating-point operations of direct convolutions and matrix products for one image; a multiply-add is two.

        Training is the forward pass and two products of the same size for the gradients, except that the first
        convolution needs no gradient of its input. Where convolutions are Winograd's the machine does fewer.
        """
        total, side, channels = 0, self.size, 1
        for width in WIDTHS:
            first = 2 * 9 * channels * width * side * side
            second = 2 * 9 * width * width * side * side
            total += (first + second) * (3 if training else 1) - (first if training and channels == 1 else 0)
            channels, side = width, side // 2
        linear = [m for m in (self.hidden, self.metadata, self.logits) if m is not None]
        return total + sum(2 * m.in_features * m.out_features for m in linear) * (3 if training else 1)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Put ``weights`` into ``model``, which must match them key for key, shape for shape and dtype for dtype.

    Raises:
        InputError: names the first key that is missing, unknown or of another shape or dtype; the model is untouched.
    """
    expected = model.state_dict()
    for key, tensor in expected.items():
        if key not in weights:
            raise InputError(f"{source} lacks {key!r}: it is not of this architecture")
        if weights[key].shape != tensor.shape or weights[key].dtype != tensor.dtype:
            found, wanted = weights[key], tensor
            raise InputError(
                f"{source}: {key!r} is {found.dtype} {tuple(found.shape)}, but this architecture needs"
                f" {wanted.dtype} {tuple(wanted.shape)}"
            )
    if unknown := sorted(set(weights) - set(expected)):
        raise InputError(f"{source} holds {unknown[0]!r}, which this architecture has not")
    model.load_state_dict(dict(weights))


def age_statistics(age: pd.Series) -> tuple[float, float]:
    """Mean and standard deviation in years of the known ages; (0, 1) where fewer than two differ."""
    known = age.dropna().to_numpy(np.float64)
    std = float(known.std()) if len(known) else 0.0
    return (float(known.mean()), std) if std > 0 else (float(known.mean()) if len(known) else 0.0, 1.0)


def encode_metadata(table: pd.DataFrame, age_mean: float, age_std: float) -> np.ndarray:
    """float32 (N, 5): standardised age, then one-hot sex (M, F) and view (PA, AP). Follow-up number, original size and
    pixel spacing are shortcuts and no inputs.

    What is unknown is 0: for age the training split's mean, for sex and view neither of the two.

    Args:
        table: columns ``age`` (years, NaN = unknown), ``sex`` (M, F, "" = unknown), ``view`` (PA, AP, "" = unknown).
        age_mean, age_std: of the training split, in years.
    """
    age = (table["age"].to_numpy(np.float64) - age_mean) / age_std
    one_hot = [table["sex"] == "M", table["sex"] == "F", table["view"] == "PA", table["view"] == "AP"]
    return np.stack([np.nan_to_num(age), *one_hot], 1).astype(np.float32)
