"""The compiled passes against torch's layers: values, gradients, statistics, odd sides, tails of the channel loops."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cxrfast import block

pytestmark = [
    pytest.mark.skipif(bool(block.MISSING["cpu"]), reason=block.MISSING["cpu"] or "built"),
    pytest.mark.usefixtures("isa"),  # every instruction set that the CPU has
]

SHAPES = [
    (1, 1, 2, 2),
    (2, 3, 2, 5),
    (3, 32, 7, 4),
    (2, 33, 5, 5),
    (1, 65, 9, 2),
    (5, 128, 3, 3),
    (2, 32, 70, 33),
]
TOLERANCE = {
    torch.float32: 1e-4,
    torch.bfloat16: 0.03,
    torch.float16: 0.01,
}  # of the largest value; sums of up to 4620 terms


def channels_last(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def make_norm(channels: int) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(channels)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(channels))  # negative too: then the pool's largest is the map's smallest
        layer.bias.copy_(torch.randn(channels))
        layer.running_mean.copy_(torch.randn(channels))
        layer.running_var.copy_(torch.rand(channels) + 0.5)
    return layer


def assert_close(found, expected, dtype):
    scale = max(1e-6, expected.abs().max().item())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=TOLERANCE[dtype] * scale)


def compare(fused, plain, x, layers, training):
    """Output, gradients and statistics of ``fused`` in x's type against ``plain`` in float64 from the same numbers."""
    truth = [copy.deepcopy(layer).double().train(training) for layer in layers]
    layers = [layer.train(training) for layer in layers]
    x64 = x.double().requires_grad_()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    out, expected = fused(x, *layers), plain(x64, *truth)
    assert out.dtype == x.dtype and out.shape == expected.shape
    assert_close(out, expected, x.dtype)
    incoming = torch.randn(expected.shape).to(x)
    out.backward(incoming)
    expected.backward(incoming.double())
    assert_close(x.grad, x64.grad, x.dtype)
    for layer, true in zip(layers, truth, strict=True):
        for (name, p), (_, q) in zip(layer.named_parameters(), true.named_parameters(), strict=True):
            assert p.grad is not None, name
            assert_close(p.grad, q.grad, x.dtype)
        for p, q in zip(layer.buffers(), true.buffers(), strict=True):
            torch.testing.assert_close(p.double(), q.double(), rtol=1e-3, atol=1e-4)


def make_conv(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1, bias=False)


def plain_conv_norm_relu_conv(x, conv1, norm, conv2):
    return conv2(F.relu(norm(conv1(x))))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("out", [5, 6, 64])
def test_conv_norm_relu_conv(shape, training, out):
    torch.manual_seed(0)
    layers = [make_conv(shape[1], out), make_norm(out), make_conv(out, 3)]
    compare(block.conv_norm_relu_conv, plain_conv_norm_relu_conv, channels_last(*shape), layers, training)


@pytest.mark.parametrize("shape", [*SHAPES, (2, 16, 1, 9), (1, 48, 9, 1), (40, 16, 3, 2), (1, 256, 70, 40)])
@pytest.mark.parametrize("out", [1, 2, 8, 12])
def test_conv(shape, out):
    """Rows in one part and in many, tiles of six, four and two, groups of rows within and across images."""
    torch.manual_seed(0)
    layer = make_conv(shape[1], out)
    compare(lambda x, c: block._Conv.apply(x, c.weight), lambda x, c: c(x), channels_last(*shape), [layer], True)


each_winograd = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(dtype, marks=pytest.mark.skipif(dtype not in block.WINOGRAD_DTYPES, reason="not on this CPU"))
        for dtype in (torch.float32, torch.bfloat16)
    ],
)

# Sides of less than a tile, odd, of several chunks; channels of one cache line and of three; parts within an image.
WINOGRAD_SHAPES = [
    *((1, 32, 1, 1), (2, 32, 2, 3), (3, 96, 7, 4), (1, 32, 1, 29), (1, 64, 30, 2)),
    *((5, 64, 9, 16), (1, 32, 40, 101), (2, 256, 15, 14)),
]
# In bf16 rounding V and U adds 2.4 times the rounding of the result, by the variances of their sums. In float it is
# less than what torch loses in its longer sums, but for maps of one pixel, where eight taps must cancel.
WINOGRAD_LOSS = {torch.float32: 4, torch.bfloat16: 3}


def error(found, expected):
    return (found.double() - expected).square().mean().sqrt().item()


@each_winograd
@pytest.mark.parametrize("shape", WINOGRAD_SHAPES)
@pytest.mark.parametrize("out", [32, 96])
def test_winograd(shape, out, dtype, monkeypatch):
    """Result and gradients, against float64 and by the measure of torch's own in the same type."""
    monkeypatch.setattr(block, "FEW_PIXELS", 0)
    torch.manual_seed(0)
    N, C, H, W = shape
    x, grad = (channels_last(N, channels, H, W, dtype=dtype) for channels in (C, out))
    x.clamp_(min=-0.5)  # values as a ReLU leaves them: a mean that is not 0
    kernel = torch.randn(out, C, 3, 3).contiguous(
        memory_format=torch.channels_last if out == 32 else torch.contiguous_format
    )
    found = [block._convolve(x, kernel), *block.conv_backward(grad, x, kernel, True)]
    assert found[0].dtype == found[1].dtype == dtype and found[2].dtype == torch.float32
    theirs = [
        F.conv2d(x, kernel.to(dtype), padding=1),
        *torch.ops.aten.convolution_backward(
            grad, x, kernel.to(dtype), None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
        )[:2],
    ]
    wide = [t.double() for t in (x, kernel, grad)]
    truth = [
        F.conv2d(wide[0], wide[1], padding=1),
        torch.nn.grad.conv2d_input(x.shape, wide[1], wide[2], padding=1),
        torch.nn.grad.conv2d_weight(wide[0], kernel.shape, wide[2], padding=1),
    ]
    for ours, other, true in zip(found, theirs, truth, strict=True):
        assert ours.shape == true.shape
        assert error(ours, true) <= WINOGRAD_LOSS[dtype] * error(other, true)
        assert_close(ours, true, dtype)


@each_winograd
def test_winograd_of_small_integers_is_exact(dtype):
    """Every channel, pixel and tap in its place: nothing is rounded here, so that one wrong value shows."""
    torch.manual_seed(0)
    x, grad = (torch.randint(-3, 4, (2, C, 9, 31)).float() for C in (64, 32))
    kernel = 4 * torch.randint(-3, 4, (32, 64, 3, 3)).float()  # a quarter of it stays whole
    maps = [t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, grad)]
    grad_x, grad_kernel = block.conv_backward(maps[1], maps[0], kernel, True)
    assert torch.equal(block._convolve(maps[0], kernel), F.conv2d(x, kernel, padding=1).to(dtype))
    assert torch.equal(grad_x, torch.nn.grad.conv2d_input(x.shape, kernel, grad, padding=1).to(dtype))
    assert torch.equal(grad_kernel, torch.nn.grad.conv2d_weight(x, kernel.shape, grad, padding=1))


@each_winograd
def test_winograd_by_parts_of_a_batch_and_without_images(dtype, monkeypatch):
    monkeypatch.setattr(block, "FEW_PIXELS", 0)
    torch.manual_seed(0)
    x, kernel = channels_last(5, 32, 9, 13, dtype=dtype), torch.randn(64, 32, 3, 3)
    parts = [block._convolve(part, kernel) for part in (x[:2], x[2:], x[:0])]
    assert torch.equal(torch.cat(parts), block._convolve(x, kernel))
    grad_x, grad_kernel = block.conv_backward(parts[2], x[:0], kernel, True)
    assert grad_x.shape == (0, 32, 9, 13) and not grad_kernel.any()


@each_winograd
@pytest.mark.parametrize("shape", [(2, 32, 5, 6), (3, 64, 16, 9)])
def test_a_block_by_winograd(shape, dtype, monkeypatch):
    """All of a block by Winograd, by the measure of the same by torch's convolutions."""
    torch.manual_seed(0)
    layers = [make_conv(shape[1], 64), make_norm(64), make_conv(64, 32)]
    x = channels_last(*shape, dtype=dtype)
    incoming = channels_last(shape[0], 32, *shape[2:], dtype=dtype)
    values = {}
    for way in ("winograd", "torch", "truth"):
        monkeypatch.setattr(block, "WINOGRAD_DTYPES", (dtype,) if way == "winograd" else ())
        monkeypatch.setattr(block, "FEW_PIXELS", 0)
        own = [copy.deepcopy(layer) for layer in layers]
        mine = x.clone(memory_format=torch.preserve_format)
        if way == "truth":
            own, mine = [layer.double() for layer in own], mine.double()
        out = (plain_conv_norm_relu_conv if way == "truth" else block.conv_norm_relu_conv)(mine.requires_grad_(), *own)
        out.backward(incoming.to(out.dtype))
        values[way] = [out.detach(), mine.grad, *(p.grad for layer in own for p in layer.parameters())]
    for ours, theirs, true in zip(values["winograd"], values["torch"], values["truth"], strict=True):
        assert error(ours, true) <= WINOGRAD_LOSS[dtype] * error(theirs, true)


@each_winograd
def test_a_nan_is_not_swallowed_by_winograd(dtype, monkeypatch):
    monkeypatch.setattr(block, "FEW_PIXELS", 0)
    x, layers = channels_last(1, 32, 4, 4, dtype=dtype), [make_conv(32, 32), make_norm(32).eval(), make_conv(32, 32)]
    x[0, 1, 2, 3] = float("nan")
    assert block.conv_norm_relu_conv(x, *layers)[0, :, 2, 3].isnan().all()


def test_conv_of_images_makes_a_channels_last_map():
    out = block._Conv.apply(torch.randn(2, 1, 16, 16), make_conv(1, 32).weight)
    assert out.is_contiguous(memory_format=torch.channels_last) and block.usable(out, 32)


@pytest.mark.parametrize("sides", [(1, 1), (2, 5), (7, 3), (8, 17), (19, 33)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("out", [1, 5, 32, 49])
def test_from_an_image(sides, training, out):
    """Chunks of rows within and across images, tails of the channels."""
    torch.manual_seed(0)
    layers = [make_conv(1, out), make_norm(out), make_conv(out, 3)]
    truth = [copy.deepcopy(layer).double().train(training) for layer in layers]
    images = torch.randn(3, 1, *sides)
    found = block.conv_norm_relu_conv(images, *(layer.train(training) for layer in layers))
    expected = plain_conv_norm_relu_conv(images.double(), *truth)
    assert type(found.grad_fn).__name__.startswith("_ImageConv")
    assert_close(found, expected, torch.float32)
    incoming = torch.randn(found.shape)
    found.backward(incoming)
    expected.backward(incoming.double())
    largest = max(q.grad.abs().max().item() for layer in truth for q in layer.parameters())
    for layer, true in zip(layers, truth, strict=True):
        for p, q in zip(layer.parameters(), true.parameters(), strict=True):
            # batch norm makes its convolution's gradient a small difference of large sums
            torch.testing.assert_close(p.grad.double(), q.grad, rtol=0, atol=TOLERANCE[torch.float32] * largest)
        for p, q in zip(layer.buffers(), true.buffers(), strict=True):
            torch.testing.assert_close(p.double(), q.double(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_image_conv(dtype):
    """Forward and backward passes by themselves, from the very values that they read."""
    torch.manual_seed(0)
    N, H, W, C = 2, 9, 21, 37
    image, kernel = torch.randn(N, H, W), torch.randn(9, C)
    x, sums = torch.empty(N, H, W, C, dtype=dtype), torch.empty(2, C, dtype=torch.float64)
    torch.ops.cxrfast_block.image_conv(image, kernel, x, sums)
    patches = F.unfold(image[:, None].double(), 3, padding=1).transpose(1, 2).reshape(-1, 9)
    assert_close(x.double().view(-1, C), patches @ kernel.double(), dtype)
    values = x.double().view(-1, C)
    torch.testing.assert_close(sums, torch.stack([values.sum(0), values.square().sum(0)]), rtol=1e-5, atol=1e-3)

    grad, (scale, shift), coef = torch.randn(N, H, W, C).to(dtype), torch.randn(2, C), torch.randn(3, C)
    taps = torch.empty(9, C, dtype=torch.float64)
    torch.ops.cxrfast_block.image_conv_backward(image, x, grad, scale, shift, coef, taps)
    g = torch.where(values * scale + shift > 0, grad.double().view(-1, C), 0)
    expected = patches.t() @ (coef[0] * g + coef[1] * values + coef[2])
    torch.testing.assert_close(taps, expected, rtol=1e-4, atol=1e-3)


def test_an_image_that_wants_a_gradient_has_one():
    image = torch.randn(2, 1, 8, 8, requires_grad=True)
    block.conv_norm_relu_conv(image, make_conv(1, 4), make_norm(4), make_conv(4, 3)).square().sum().backward()
    assert image.grad is not None and image.grad.abs().sum() > 0


def distinct_map(shape, dtype):
    """Numbers that the type holds exactly, different among neighbours: the largest of four is beyond doubt."""
    count = math.prod(shape)
    if dtype == torch.float32:
        values = (torch.randperm(count) - count / 2) / 8
    else:
        values = torch.stack([torch.randperm(256) for _ in range(-(-count // 256))]).flatten()[:count] / 64 - 2
    return values.view(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def compare_norm_pool(shape, training, dtype, dropout, device="cpu"):
    torch.manual_seed(0)
    N, C, H, W = shape
    noise = torch.randint(0, 256, (N, C, H // 2, W // 2)).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    noise = noise.to(device)

    def plain(x, layer):
        pooled = F.relu(F.max_pool2d(layer(x), 2))
        return pooled * (noise >= 64) / 0.75 if dropout else pooled

    x, layer = distinct_map(shape, dtype).to(device), make_norm(C).to(device)
    compare(lambda x, layer: block.norm_pool(x, layer, noise if dropout else None, 64), plain, x, [layer], training)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [True, False])
def test_norm_pool(shape, training, dtype, dropout):
    compare_norm_pool(shape, training, dtype, dropout)


def test_the_first_of_equals_has_the_gradient():
    x = torch.ones(1, 1, 2, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    layer = nn.BatchNorm2d(1).eval()
    block.norm_pool(x, layer, None, 0).sum().backward()
    assert torch.equal(x.grad.ne(0), torch.tensor([[[[1, 0, 1, 0], [0, 0, 0, 0]]]]).bool())


def test_bits_do_not_depend_on_threads():
    torch.manual_seed(0)
    x, layer = channels_last(8, 32, 40, 40), make_norm(32)
    layers = [make_conv(1, 32), make_norm(32), make_conv(32, 2)]
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        layer.zero_grad()
        block.norm_pool(x.requires_grad_(), layer, None, 0).square().sum().backward()
        results.append([layer.weight.grad.clone(), layer.bias.grad.clone()])
        layers[0].zero_grad()
        block.conv_norm_relu_conv(x.detach()[:, :1], *layers).square().sum().backward()
        results[-1].append(layers[0].weight.grad.clone())
        for dtype in block.WINOGRAD_DTYPES:
            maps, kernel = x.detach().to(dtype), torch.linspace(-1, 1, 32 * 32 * 9).view(32, 32, 3, 3)
            results[-1] += [block._convolve(maps, kernel), *block.conv_backward(maps, maps, kernel, True)]
    torch.set_num_threads(threads)
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True))


def test_a_nan_is_not_swallowed():
    x = channels_last(2, 3, 4, 4)
    x[0, 1, 2, 3] = float("nan")
    assert block.conv_norm_relu_conv(x, make_conv(3, 4), nn.BatchNorm2d(4), make_conv(4, 2)).isnan().any()
    assert block.conv_norm_relu_conv(x[:, 1:2], make_conv(1, 4), nn.BatchNorm2d(4), make_conv(4, 2)).isnan().any()
    assert block.norm_pool(x, nn.BatchNorm2d(3), None, 0).isnan().any()


def test_usable():
    assert block.usable(channels_last(2, 4, 4, 4), 4)
    assert not block.usable(torch.randn(2, 4, 4, 4), 4)
    assert not block.usable(channels_last(2, 4, 4, 4, dtype=torch.float64), 4)
    assert not block.usable(channels_last(2, 4, 4, 4).to("meta"), 4)


def test_wrong_shapes_are_refused():
    x = torch.randn(2, 4, 4, 3)
    with pytest.raises(RuntimeError, match="sums must be"):
        torch.ops.cxrfast_block.sums(x, torch.zeros(2, 4, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="out must be"):
        torch.ops.cxrfast_block.relu(x, torch.ones(3), torch.ones(3), torch.zeros(2, 4, 3, 4))
    for dtype in block.WINOGRAD_DTYPES:
        maps, kernel = torch.zeros(1, 4, 4, 48, dtype=dtype), torch.zeros(48, 48, 3, 3)
        with pytest.raises(RuntimeError, match="channels must be multiples of 32"):
            torch.ops.cxrfast_block.winograd_conv(maps, None, None, kernel, False, maps.clone())
        with pytest.raises(RuntimeError, match="channels must be multiples of 32"):
            torch.ops.cxrfast_block.winograd_weight_grad(maps, None, None, maps, torch.zeros(3, 3, 48, 48))
        x = maps[..., :32].contiguous()
        with pytest.raises(RuntimeError, match="kernel must be"):
            torch.ops.cxrfast_block.winograd_conv(x, None, None, kernel, False, x)
        with pytest.raises(RuntimeError, match="out must be of x's size"):
            torch.ops.cxrfast_block.winograd_conv(x, None, None, kernel, False, x[:, :3].contiguous())
