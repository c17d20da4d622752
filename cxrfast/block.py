"""A block of the network (csrc/block): batch norm with what follows it in one pass, and, on CPUs that gain by it,
convolutions and their gradients by Winograd's way.

    conv_norm_relu_conv   convolution, batch norm, ReLU, convolution
    norm_pool             batch norm, 2x2 max-pool, ReLU, dropout

They compute what torch's own layers compute, forward and backward, and keep less: the first computes the second
convolution's input again in the backward pass (on a CPU), and where it begins at an image writes no gradient of the
first's result; the second keeps one byte per pooled value instead of two maps and an index. On a GPU the passes are
CUDA kernels that ask the host nothing; the convolutions there are cuDNN's.
Left out: float64, and the layers' plain form (models.py), which serves wherever `usable` says no.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _load(file: str) -> str:
    path = Path(__file__).with_name(file)
    if not path.exists():
        return f"{path.name} was not built"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error.__cause__ or error}"
    return ""


MISSING: dict[str, str] = {"cpu": _load("_block.so")}
"""Device type -> why the compiled part is not there; empty where it is."""

# the CPU's holds the schemas too
MISSING["cuda"] = "_block.so, which it builds on, is missing" if MISSING["cpu"] else _load("_block_cuda.so")

WINOGRAD_DTYPES: tuple[torch.dtype, ...] = tuple(
    dtype
    for dtype in (torch.float32, torch.bfloat16)
    if not MISSING["cpu"] and torch.ops.cxrfast_block.has_winograd(dtype == torch.bfloat16)
)
"""For which types it is one for our convolutions (Winograd's) and their gradients."""

FEW_PIXELS = 512  # of all images: below, turning the kernel into Winograd's costs more than it saves

DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}
"""The maps' types that the compiled part takes."""

CUDA_CHANNELS = 8, 256  # on a GPU channels are a multiple of the first, up to the second (block_kernel.cuh)


def usable(x: Tensor, channels: int) -> bool:
    """Whether the compiled part takes this map, and a batch norm of so many channels behind it: dense channels-last
    float32 or bfloat16, on a GPU float16 too."""
    device = x.device.type
    if MISSING.get(device, "no such device") or torch.compiler.is_compiling():
        return False
    multiple, most = CUDA_CHANNELS
    return (
        x.dtype in DTYPES[device]
        and _dtype_of(x) in DTYPES[device]
        and x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and (device == "cpu" or (channels % multiple == 0 and channels <= most))
    )


def _dtype_of(x: Tensor) -> torch.dtype:
    """Of the maps that are made from x: autocast's, where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def conv_norm_relu_conv(x: Tensor, conv1: nn.Conv2d, norm: nn.BatchNorm2d, conv2: nn.Conv2d) -> Tensor:
    """conv2(relu(norm(conv1(x)))) for 3x3 convolutions with padding 1 and no bias; for maps that `usable` takes."""
    dtype = _dtype_of(x)
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
    """The affine map per channel that a batch norm is for one batch, and its derivative (csrc/block/batch_norm.h)."""

    def __init__(self, x: Tensor, norm: nn.BatchNorm2d, sums: Tensor | None = None) -> None:
        """``sums``: those of x and of x * x, float64 (2, C), where they are known."""
        assert norm.running_mean is not None and norm.running_var is not None and norm.momentum is not None
        assert norm.num_batches_tracked is not None
        C = x.shape[1]
        self.training = norm.training
        self.all_reduce = getattr(norm, "all_reduce", None) if norm.training else None
        self.count = x.numel() / C  # of this process
        self.total: Tensor | None = None  # of all processes, float64 (1,), where they are several
        if norm.training:
            if sums is None:
                sums = x.new_empty(2, C, dtype=torch.float64)
                torch.ops.cxrfast_block.sums(_nhwc(x), sums)
            if self.all_reduce is not None:
                own = torch.full((1,), self.count, dtype=torch.float64, device=x.device)
                over_all = torch.cat([sums.flatten(), own])
                self.all_reduce(over_all)
                sums, self.total = over_all[:-1].view(2, C), over_all[-1:]
        self._stats = x.new_empty(3, C, dtype=torch.float64)
        affine = x.new_empty(2, C, dtype=torch.float32)
        torch.ops.cxrfast_block.batch_norm(
            sums if norm.training else None, self.total, self.count, norm.weight.detach(), norm.bias.detach(),
            norm.running_mean, norm.running_var, norm.num_batches_tracked, norm.momentum, norm.eps, self._stats, affine,
        )  # fmt: skip
        self.scale, self.shift = affine

    def backward(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the sums of g and g * x: the coefficients of grad x = c0 * g + c1 * x + c2, and the gradients of weight
        and bias (this process's part, as everywhere under DistributedDataParallel)."""
        over_all = sums
        if self.all_reduce is not None:  # only in training, where the statistics depend on x too
            over_all = sums.clone()
            self.all_reduce(over_all)
        C = sums.shape[1]
        coef = sums.new_empty(3, C, dtype=torch.float32)
        grad_weight, grad_bias = (sums.new_empty(C, dtype=torch.float32) for _ in range(2))
        torch.ops.cxrfast_block.batch_norm_grad(
            sums, over_all, self.total, self.count, self.training, self._stats, coef, grad_weight, grad_bias
        )
        return coef, grad_weight, grad_bias


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
    """Whether this CPU has Winograd's convolution for such a map and such channels; a GPU's is cuDNN's."""
    return x.is_cpu and x.dtype in WINOGRAD_DTYPES and (kernel.shape[0] % 32, kernel.shape[1] % 32) == (0, 0)


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

    Both are Winograd's where the result is, at about half of torch's cost (docs/notes.md).
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
        out, y = _relu_convolve(x, ctx.affine, kernel)
        ctx.save_for_backward(x, kernel, y)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel, y = ctx.saved_tensors
        affine: _Affine = ctx.affine
        grad, sums, grad_kernel = _relu_conv_backward(grads[0], x, y, affine, kernel)
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
        C = len(kernel1)
        x = torch.empty(N, C, H, W, dtype=dtype, device=image.device, memory_format=torch.channels_last)
        sums = image.new_empty(2, C, dtype=torch.float64)
        taps = kernel1.detach().float().view(-1, 9).t().contiguous()
        torch.ops.cxrfast_block.image_conv(image, taps, _nhwc(x), sums)
        ctx.affine = _Affine(x, norm, sums)
        out, y = _relu_convolve(x, ctx.affine, kernel2)
        ctx.save_for_backward(image, x, kernel1, kernel2, y)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        image, x, kernel1, kernel2, y = ctx.saved_tensors
        affine: _Affine = ctx.affine
        grad, sums, grad_kernel2 = _relu_conv_backward(grads[0], x, y, affine, kernel2)
        coef, grad_weight, grad_bias = affine.backward(sums)
        taps = x.new_empty(9, x.shape[1], dtype=torch.float64)
        torch.ops.cxrfast_block.image_conv_backward(
            image, _nhwc(x), _nhwc(grad), affine.scale, affine.shift, coef, taps
        )
        grad_kernel1 = taps.t().reshape(kernel1.shape).to(kernel1.dtype)
        return None, grad_kernel1, grad_weight, grad_bias, grad_kernel2, None, None


def _relu_convolve(x: Tensor, affine: _Affine, kernel: Tensor) -> tuple[Tensor, Tensor | None]:
    """conv(y) with y = relu(affine(x)), and what of y is kept for the backward pass: on a CPU nothing, because it costs
    less to compute it again than to have the memory; on a GPU, which has plenty, all."""
    if x.is_cpu:
        return _convolve(x, kernel, affine), None
    y = _relu(x, affine)
    return _convolve(y, kernel), y


def _relu_conv_backward(
    grad: Tensor, x: Tensor, y: Tensor | None, affine: _Affine, kernel: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Back through `_relu_convolve`: the gradient before the convolution, its sums for `_Affine.backward`, and the
    kernel's gradient."""
    grad = _channels_last(grad, x.dtype)
    if y is None:
        grad_y, grad_kernel = conv_backward(grad, x, kernel, True, affine)
    else:
        grad_y, grad_kernel = conv_backward(grad, y, kernel, True)
    assert grad_y is not None
    grad_y = _channels_last(grad_y, x.dtype)
    sums = x.new_empty(2, x.shape[1], dtype=torch.float64)
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
        out, place = (
            torch.empty((N, C, H // 2, W // 2), dtype=t, device=x.device, memory_format=torch.channels_last)
            for t in (x.dtype, torch.uint8)
        )
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
        sums = x.new_empty(2, x.shape[1], dtype=torch.float64)
        torch.ops.cxrfast_block.pool_backward_sums(_nhwc(x), grad, _nhwc(place), ctx.keep_scale, sums)
        coef, grad_weight, grad_bias = ctx.affine.backward(sums)
        out = torch.empty_like(x)
        torch.ops.cxrfast_block.pool_backward(_nhwc(x), grad, _nhwc(place), ctx.keep_scale, coef, _nhwc(out))
        return out, grad_weight, grad_bias, None, None, None
