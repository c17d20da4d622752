"""A block of the network on the CPU (csrc/block): batch norm with what follows it in one pass, and convolutions whose
weight gradient is ours where torch's is slow.

    conv_norm_relu_conv   convolution, batch norm, ReLU, convolution
    norm_pool             batch norm, 2x2 max-pool, ReLU, dropout

They compute what torch's own layers compute, forward and backward, and keep less: the first computes the second
convolution's input again in the backward pass, and where it begins at an image writes no gradient of the first's
result; the second keeps one byte per pooled value instead of two maps and an index.
Left out: GPUs, float64, and the layers' plain form (models.py), which serves wherever `usable` says no.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _load() -> str:
    path = Path(__file__).with_name("_block.so")
    if not path.exists():
        return f"{path.name} was not built"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return ""


MISSING = _load()
"""Why the compiled part is not there; empty where it is."""

HAS_WEIGHT_GRAD: bool = not MISSING and torch.ops.cxrfast_block.has_weight_grad()
"""Whether this CPU is one for our weight gradient in float32."""

WINOGRAD_DTYPES: tuple[torch.dtype, ...] = tuple(
    dtype
    for dtype in (torch.float32, torch.bfloat16)
    if not MISSING and torch.ops.cxrfast_block.has_winograd(dtype == torch.bfloat16)
)
"""For which types it is one for our convolutions (Winograd's) and their gradients."""

FEW_PIXELS = 512  # of all images: below, turning the kernel into Winograd's costs more than it saves


def usable(x: Tensor) -> bool:
    """Whether the compiled part takes this map: dense channels-last float32 or bfloat16 on the CPU."""
    if MISSING or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return (
        dtype in (torch.float32, torch.bfloat16)
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def conv_norm_relu_conv(x: Tensor, conv1: nn.Conv2d, norm: nn.BatchNorm2d, conv2: nn.Conv2d) -> Tensor:
    """conv2(relu(norm(conv1(x)))) for 3x3 convolutions with padding 1 and no bias; for maps that `usable` takes."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    out: Tensor
    if x.shape[1] == 1 and not x.requires_grad:
        out = _ImageConvNormReluConv.apply(x, conv1.weight, norm.weight, norm.bias, conv2.weight, norm, dtype)
    else:
        between: Tensor = _Conv.apply(x.to(dtype), conv1.weight)
        out = _NormReluConv.apply(between, norm.weight, norm.bias, conv2.weight, norm)
    return out


def norm_pool(x: Tensor, norm: nn.BatchNorm2d, noise: Tensor | None, threshold: int) -> Tensor:
    """dropout(relu(max_pool2d(norm(x), 2))); (N, C, H, W) to (N, C, H // 2, W // 2).

    Args:
        x: what `usable` takes.
        norm: its statistics are of the batch (of all processes where it has ``all_reduce``) or, evaluated, its own.
        noise: uint8 (N, C, H // 2, W // 2), channels-last, random; None drops nothing.
        threshold: values whose byte is below it are dropped, the rest multiplied by 256 / (256 - threshold).
    """
    out: Tensor = _NormPool.apply(x, norm.weight, norm.bias, noise, threshold, norm)
    return out


class _Affine:
    """The affine map per channel that a batch norm is for one batch, and its derivative."""

    def __init__(self, x: Tensor, norm: nn.BatchNorm2d, sums: Tensor | None = None) -> None:
        """``sums``: those of x and of x * x, float64 (2, C), where they are known."""
        self.all_reduce = getattr(norm, "all_reduce", None) if norm.training else None
        weight, bias = norm.weight.detach(), norm.bias.detach()
        self.count = x.numel() / x.shape[1]
        if norm.training:
            if sums is None:
                sums = torch.empty(2, x.shape[1], dtype=torch.float64)
                torch.ops.cxrfast_block.sums(_nhwc(x), sums)
            sums = self._over_all(sums)
            self.mean = sums[0] / self.count
            variance = (sums[1] / self.count - self.mean * self.mean).clamp_(min=0)
            _update_running(norm, self.mean, variance, self.count)
        else:
            assert norm.running_mean is not None and norm.running_var is not None
            self.mean, variance = norm.running_mean.double(), norm.running_var.double()
        self.training = norm.training
        self.inverse = (variance + norm.eps).rsqrt()
        scale = weight.double() * self.inverse
        self._scale = scale
        self.scale = scale.float()
        self.shift = (bias.double() - self.mean * scale).float()

    def backward(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the sums of g and g * x: the coefficients of grad x = c0 * g + c1 * x + c2, and the gradients of weight
        and bias (this process's part, as everywhere under DistributedDataParallel)."""
        grad_weight = ((sums[1] - self.mean * sums[0]) * self.inverse).float()
        grad_bias = sums[0].float()
        coef = torch.zeros(3, len(self.mean), dtype=torch.float64)
        coef[0] = self._scale
        if self.training:  # the statistics depend on x too
            total = sums if self.all_reduce is None else self._over_all(sums, counted=True)
            mean_g = total[0] / self.count
            mean_product = (total[1] - self.mean * total[0]) * self.inverse / self.count
            coef[1] = -self._scale * self.inverse * mean_product
            coef[2] = -self._scale * mean_g - coef[1] * self.mean
        return coef.float(), grad_weight, grad_bias

    def _over_all(self, sums: Tensor, counted: bool = False) -> Tensor:
        if self.all_reduce is None:
            return sums
        with_count = torch.cat([sums.flatten(), torch.tensor([self.count], dtype=torch.float64)])
        self.all_reduce(with_count)
        if not counted:
            self.count = float(with_count[-1])
        return with_count[:-1].view(2, -1)


def _update_running(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: float) -> None:
    assert norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None
    assert norm.num_batches_tracked is not None
    norm.running_mean.lerp_(mean.float(), norm.momentum)
    norm.running_var.lerp_((variance * (count / max(1.0, count - 1))).float(), norm.momentum)
    norm.num_batches_tracked += 1


def _nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _channels_last(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def _relu(x: Tensor, affine: _Affine) -> Tensor:
    out = torch.empty_like(x)
    torch.ops.cxrfast_block.relu(_nhwc(x), affine.scale, affine.shift, _nhwc(out))
    return out


def _convolve(x: Tensor, kernel: Tensor, affine: _Affine | None = None) -> Tensor:
    """The 3x3 convolution with padding 1 of x, or of relu(affine(x))."""
    if _for_winograd(x, kernel) and _num_pixels(x) >= FEW_PIXELS:
        return _winograd(x, kernel, affine)
    if affine is not None:
        x = _relu(x, affine)
    # the result is channels-last for a map of one channel too, whose own memory format says nothing
    return _channels_last(F.conv2d(x, _channels_last(kernel, x.dtype), padding=1), x.dtype)


def _for_winograd(x: Tensor, kernel: Tensor) -> bool:
    return x.dtype in WINOGRAD_DTYPES and (kernel.shape[0] % 32, kernel.shape[1] % 32) == (0, 0)


def _num_pixels(x: Tensor) -> int:
    return x.numel() // max(1, x.shape[1])


def _winograd(x: Tensor, kernel: Tensor, affine: _Affine | None = None, turned: bool = False) -> Tensor:
    """`_convolve`; turned, x is the gradient of a convolution's result and what comes back that of its input."""
    N, _, H, W = x.shape
    channels = kernel.shape[1 if turned else 0]
    out = torch.empty(N, channels, H, W, dtype=x.dtype, memory_format=torch.channels_last)
    scale, shift = (None, None) if affine is None else (affine.scale, affine.shift)
    torch.ops.cxrfast_block.winograd_conv(_nhwc(x), scale, shift, kernel.detach().float(), turned, _nhwc(out))
    return out


def conv_backward(
    grad: Tensor, x: Tensor, kernel: Tensor, need_x: bool, affine: _Affine | None = None
) -> tuple[Tensor | None, Tensor]:
    """Gradients of `_convolve`'s input (x, or relu(affine(x))) and of its kernel.

    On CPUs with AVX2 and nothing wider, torch's weight gradient of channels-last maps runs at a fifth to a half of its
    forward pass (docs/notes.md); ours at about the forward pass. A map of one channel goes by nine matrix products.
    On CPUs with bf16 products but no matrix unit both gradients are Winograd's, at about half of torch's cost.
    """
    out_channels, in_channels = kernel.shape[:2]
    taps: Tensor | None = None  # (out, in, 3, 3), as a view
    if _for_winograd(x, kernel):
        by_tap = torch.empty(3, 3, in_channels, out_channels)
        scale, shift = (None, None) if affine is None else (affine.scale, affine.shift)
        torch.ops.cxrfast_block.winograd_weight_grad(_nhwc(x), scale, shift, _nhwc(grad), by_tap)
        taps = by_tap.permute(3, 2, 0, 1)
    elif affine is not None:
        return conv_backward(grad, _relu(x, affine), kernel, need_x)  # again: one pass, against a map kept in memory
    elif HAS_WEIGHT_GRAD and x.dtype == torch.float32:
        by_tap = torch.empty(3, 3, out_channels, in_channels)
        if in_channels % 16 == 0 and out_channels % 2 == 0:
            torch.ops.cxrfast_block.weight_grad(_nhwc(x), _nhwc(grad), by_tap)
        else:
            _weight_grad_by_products(x, grad, by_tap)
        taps = by_tap.permute(2, 3, 0, 1)
    grad_x: Tensor | None = None
    if need_x and _for_winograd(x, kernel) and _num_pixels(x) >= FEW_PIXELS:
        grad_x = _winograd(grad, kernel, turned=True)
    elif need_x or taps is None:
        grad_x, theirs, _ = torch.ops.aten.convolution_backward(
            grad, x, kernel.to(x.dtype), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [need_x, taps is None, False]
        )
        taps = theirs if taps is None else taps
    assert taps is not None
    return grad_x, taps.to(kernel.dtype)


def _weight_grad_by_products(x: Tensor, grad: Tensor, out: Tensor) -> None:
    """Both maps padded to the same row length, so that a tap is one offset between two flat lists of pixels."""
    width = x.shape[3] + 2
    pixels = F.pad(_nhwc(x), (0, 0, 1, 1, 1, 1)).reshape(-1, x.shape[1])
    grads = F.pad(_nhwc(grad), (0, 0, 0, 2, 0, 2)).reshape(-1, grad.shape[1]).t()
    for ky in range(3):
        for kx in range(3):
            offset = ky * width + kx
            torch.mm(grads[:, : grads.shape[1] - offset], pixels[offset:], out=out[ky, kx])


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor) -> Tensor:
        ctx.save_for_backward(x, kernel)
        return _convolve(x, kernel)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor]:
        x, kernel = ctx.saved_tensors
        return conv_backward(_channels_last(grads[0], x.dtype), x, kernel, ctx.needs_input_grad[0])


class _NormReluConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, kernel: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        ctx.affine = _Affine(x, norm)
        ctx.save_for_backward(x, kernel)
        return _convolve(x, kernel, ctx.affine)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel = ctx.saved_tensors
        affine: _Affine = ctx.affine
        grad, sums, grad_kernel = _relu_conv_backward(grads[0], x, affine, kernel)
        coef, grad_weight, grad_bias = affine.backward(sums)
        torch.ops.cxrfast_block.relu_backward(_nhwc(x), _nhwc(grad), affine.scale, affine.shift, coef)
        return grad, grad_weight, grad_bias, grad_kernel, None


class _ImageConvNormReluConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image: Tensor, kernel1: Tensor, weight: Tensor, bias: Tensor, kernel2: Tensor,
        norm: nn.BatchNorm2d, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        N, _, H, W = image.shape
        image = image.float().reshape(N, H, W).contiguous()
        x = torch.empty(N, len(kernel1), H, W, dtype=dtype, memory_format=torch.channels_last)
        sums = torch.empty(2, len(kernel1), dtype=torch.float64)
        taps = kernel1.detach().float().view(-1, 9).t().contiguous()
        torch.ops.cxrfast_block.image_conv(image, taps, _nhwc(x), sums)
        ctx.affine = _Affine(x, norm, sums)
        ctx.save_for_backward(image, x, kernel1, kernel2)
        return _convolve(x, kernel2, ctx.affine)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        image, x, kernel1, kernel2 = ctx.saved_tensors
        affine: _Affine = ctx.affine
        grad, sums, grad_kernel2 = _relu_conv_backward(grads[0], x, affine, kernel2)
        coef, grad_weight, grad_bias = affine.backward(sums)
        taps = torch.empty(9, x.shape[1], dtype=torch.float64)
        torch.ops.cxrfast_block.image_conv_backward(
            image, _nhwc(x), _nhwc(grad), affine.scale, affine.shift, coef, taps
        )
        grad_kernel1 = taps.t().reshape(kernel1.shape).to(kernel1.dtype)
        return None, grad_kernel1, grad_weight, grad_bias, grad_kernel2, None, None


def _relu_conv_backward(grad: Tensor, x: Tensor, affine: _Affine, kernel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Back through conv(relu(affine(x))): the gradient before the convolution, its sums for `_Affine.backward`, and
    the kernel's gradient."""
    grad_y, grad_kernel = conv_backward(_channels_last(grad, x.dtype), x, kernel, True, affine)
    assert grad_y is not None
    grad_y = _channels_last(grad_y, x.dtype)
    sums = torch.empty(2, x.shape[1], dtype=torch.float64)
    torch.ops.cxrfast_block.relu_backward_sums(_nhwc(x), _nhwc(grad_y), affine.scale, affine.shift, sums)
    return grad_y, sums, grad_kernel


class _NormPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, noise: Tensor | None, threshold: int, norm: nn.BatchNorm2d
    ) -> Tensor:
        ctx.affine = _Affine(x, norm)
        ctx.keep_scale = 1.0 if noise is None else 256 / (256 - threshold)
        N, C, H, W = x.shape
        shape = (N, C, H // 2, W // 2)
        out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        place = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
        torch.ops.cxrfast_block.pool(
            _nhwc(x), ctx.affine.scale, ctx.affine.shift, None if noise is None else _nhwc(noise), threshold,
            ctx.keep_scale, _nhwc(out), _nhwc(place),
        )  # fmt: skip
        ctx.save_for_backward(x, place)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, place = ctx.saved_tensors
        grad = _nhwc(_channels_last(grads[0], x.dtype))
        sums = torch.empty(2, x.shape[1], dtype=torch.float64)
        torch.ops.cxrfast_block.pool_backward_sums(_nhwc(x), grad, _nhwc(place), ctx.keep_scale, sums)
        coef, grad_weight, grad_bias = ctx.affine.backward(sums)
        out = torch.empty_like(x)
        torch.ops.cxrfast_block.pool_backward(_nhwc(x), grad, _nhwc(place), ctx.keep_scale, coef, _nhwc(out))
        return out, grad_weight, grad_bias, None, None, None
