"""The CUDA passes of csrc/block: nvcc compiles them, their very source runs here on threads, and a GPU, where there is
one, gives what torch's layers give."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_host import compile_host, sanitised
from test_block import channels_last, compare, compare_norm_pool, make_conv, make_norm, plain_conv_norm_relu_conv
from torch import Tensor, nn

from cxrfast import block

ROOT = Path(__file__).parents[1]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of block_cuda_host.cpp's numbers
needs_cpu_passes = pytest.mark.skipif(bool(block.MISSING["cpu"]), reason=block.MISSING["cpu"] or "built")

# ---- the passes, one by one: on threads here, on a GPU where there is one ----


class Job(ctypes.Structure):
    """HostJob of block_cuda_host.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in "NHWC"),
        *((name, ctypes.c_void_p) for name in ("image", "kernel", "x", "grad", "scale", "shift", "coef", "bytes")),
        ("threshold", ctypes.c_int64),
        ("keep_scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("out", "place", "sums")),
    )


class HostOps:
    """The operators of csrc/block by the CUDA kernels on threads, named and called as torch's."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def _run(self, number: int, map_: Tensor, threshold: int = 0, keep_scale: float = 1.0, **tensors: Any) -> None:
        pointers = {name: None if t is None else t.data_ptr() for name, t in tensors.items()}
        job = Job(*map_.shape, threshold=threshold, keep_scale=keep_scale, **pointers)
        self._library.block_host(number, DTYPES.index(map_.dtype), ctypes.byref(job))

    def sums(self, x, sums):
        self._run(0, x, x=x, sums=sums)

    def relu(self, x, scale, shift, out):
        self._run(1, x, x=x, scale=scale, shift=shift, out=out)

    def relu_backward_sums(self, x, grad, scale, shift, sums):
        self._run(2, x, x=x, grad=grad, scale=scale, shift=shift, sums=sums)

    def relu_backward(self, x, grad, scale, shift, coef):
        self._run(3, x, x=x, scale=scale, shift=shift, coef=coef, out=grad)

    def pool(self, x, scale, shift, bytes_, threshold, keep_scale, out, place):
        self._run(4, x, threshold, keep_scale, x=x, scale=scale, shift=shift, bytes=bytes_, out=out, place=place)

    def pool_backward_sums(self, x, grad, place, keep_scale, sums):
        self._run(5, x, 0, keep_scale, x=x, grad=grad, place=place, sums=sums)

    def pool_backward(self, x, grad, place, keep_scale, coef, out):
        self._run(6, x, 0, keep_scale, x=x, grad=grad, place=place, coef=coef, out=out)

    def image_conv(self, image, kernel, out, sums):
        self._run(7, out, image=image, kernel=kernel, out=out, sums=sums)

    def image_conv_backward(self, image, x, grad, scale, shift, coef, grad_kernel):
        maps = {"image": image, "x": x, "grad": grad}
        self._run(8, x, scale=scale, shift=shift, coef=coef, sums=grad_kernel, **maps)


@pytest.fixture(scope="module")
def host_ops(tmp_path_factory: pytest.TempPathFactory) -> HostOps:
    library = compile_host("block_cuda_host.cpp", tmp_path_factory.mktemp("host") / "host.so", "-shared", "-fPIC")
    return HostOps(ctypes.CDLL(str(library)))


def all_passes(ops: Any, shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """What each pass gives for the same numbers, which bfloat16 and float16 hold exactly; float64 on the CPU."""
    N, H, W, C = shape
    generator = torch.Generator().manual_seed(N + 10 * H + 100 * W + 1000 * C)

    def eighths(*sides: int) -> Tensor:
        return (torch.randint(-16, 17, sides, generator=generator) / 8).to(device)

    x, grad, pooled_grad = eighths(*shape).to(dtype), eighths(*shape).to(dtype), eighths(N, H // 2, W // 2, C).to(dtype)
    image, kernel, scale, shift, coef = eighths(N, H, W), eighths(9, C), eighths(C), eighths(C), eighths(3, C)
    noise = torch.randint(0, 256, (N, H // 2, W // 2, C), generator=generator).to(device, torch.uint8)
    nan = float("nan")

    def sums(rows: int) -> Tensor:
        return torch.full((rows, C), nan, dtype=torch.float64, device=device)

    found: dict[str, Tensor] = {}
    ops.sums(x, found.setdefault("sums", sums(2)))
    ops.relu(x, scale, shift, found.setdefault("relu", torch.full_like(x, nan)))
    ops.relu_backward_sums(x, grad, scale, shift, found.setdefault("relu backward sums", sums(2)))
    ops.relu_backward(x, found.setdefault("relu backward", grad.clone()), scale, shift, coef)
    for name, bytes_ in (("pool", None), ("pool and dropout", noise)):
        place = torch.full_like(noise, 99)
        keep_scale = 1.0 if bytes_ is None else 256 / 192
        ops.pool(
            x, scale, shift, bytes_, 64, keep_scale, found.setdefault(name, torch.full_like(pooled_grad, nan)), place
        )
        ops.pool_backward_sums(x, pooled_grad, place, keep_scale, found.setdefault(f"{name} backward sums", sums(2)))
        back = found.setdefault(f"{name} backward", torch.full_like(x, nan))
        ops.pool_backward(x, pooled_grad, place, keep_scale, coef, back)
        found[f"{name} places"] = place
    ops.image_conv(
        image, kernel, found.setdefault("image", torch.full_like(x, nan)), found.setdefault("image sums", sums(2))
    )
    ops.image_conv_backward(image, x, grad, scale, shift, coef, found.setdefault("image kernel", sums(9)))
    return {name: tensor.cpu().double() for name, tensor in found.items()}


def assert_the_cpus(found: dict[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """To a rounding of the type; the CPU has no float16, its float32 stands in."""
    of_cpu = torch.float32 if dtype == torch.float16 else dtype
    digits = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    for name, expected in all_passes(torch.ops.cxrfast_block, shape, of_cpu).items():
        largest = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        if "places" not in name:
            torch.testing.assert_close(
                found[name], expected, rtol=0, atol=digits * largest, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert torch.equal(found[name], expected), name


# (N, H, W, C): no window, odd sides, several blocks, channels that leave threads without work
SHAPES = [(2, 1, 1, 8), (1, 1, 5, 16), (2, 7, 4, 24), (1, 33, 21, 32), (3, 9, 15, 64), (1, 6, 11, 256), (1, 90, 70, 8)]


@needs_cpu_passes
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, torch.bfloat16) for shape in SHAPES),
        *((shape, torch.float32) for shape in SHAPES[2:4]),
        (SHAPES[2], torch.float16),
    ],
)
def test_the_kernels_on_threads_give_what_the_cpu_gives(host_ops, shape, dtype):
    assert_the_cpus(all_passes(host_ops, shape, dtype), shape, dtype)


@pytest.mark.slow
def test_thread_sanitizer_finds_no_race(tmp_path):
    done = sanitised("block_cuda_host.cpp", tmp_path)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr


@pytest.mark.slow
def test_thread_sanitizer_would_find_one(tmp_path):
    done = sanitised("block_cuda_host.cpp", tmp_path, "-DCXRFAST_DROP_BARRIERS")
    assert done.returncode == 66 and "data race" in done.stderr and "block_kernel.cuh" in done.stderr


@pytest.mark.slow
def test_nvcc_compiles_every_kernel_without_spills():
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc")
    command = [sys.executable, str(ROOT / "tools" / "check_cuda.py"), "block", "sm_75", "sm_80", "sm_90"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    # ten kernels a type, four that have none
    assert found["kernels"] == 3 * (10 * len(DTYPES) + 4) and found["spilling"] == 0
    # 256 threads a block: 128 registers leave room for two blocks on each multiprocessor
    assert all(row["stack"] == 0 and row["registers"] <= 128 for row in found["rows"])


# ---- on a GPU ----

MAPS = [(1, 8, 2, 2), (2, 24, 2, 5), (3, 32, 7, 4), (1, 64, 9, 3), (5, 128, 3, 3), (2, 256, 17, 33)]


@pytest.fixture
def exact_convolutions():
    """cuDNN's fp32 convolutions in fp32, not in TF32."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_convolutions")
class TestOnGpu:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("shape", MAPS)
    def test_conv_norm_relu_conv(self, shape, training):
        torch.manual_seed(0)
        layers = [make_conv(shape[1], 40), make_norm(40), make_conv(40, 8)]
        x = channels_last(*shape).cuda()
        assert block.usable(x, 40)
        compare(block.conv_norm_relu_conv, plain_conv_norm_relu_conv, x, [layer.cuda() for layer in layers], training)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("shape", MAPS)
    @pytest.mark.parametrize("dropout", [True, False])
    def test_norm_pool(self, shape, training, dtype, dropout):
        compare_norm_pool(shape, training, dtype, dropout, "cuda")

    @needs_cpu_passes
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES)
    def test_passes(self, shape, dtype):
        found, again = (all_passes(torch.ops.cxrfast_block, shape, dtype, "cuda") for _ in range(2))
        assert_the_cpus(found, shape, dtype)
        assert all(torch.equal(a, b) for a, b in zip(found.values(), again.values(), strict=True))

    def test_an_empty_batch(self):
        x = channels_last(0, 32, 4, 4).cuda()
        norm = nn.BatchNorm2d(32).cuda().eval()
        assert block.norm_pool(x, norm, None, 0).shape == (0, 32, 2, 2)

    def test_neither_waits_nor_needs_anything_outside_a_graph(self):
        layers = [make_conv(1, 32).cuda(), make_norm(32).cuda(), make_conv(32, 32).cuda(), make_norm(32).cuda()]
        images = torch.randn(4, 1, 20, 20, device="cuda")

        def step():
            y = block.conv_norm_relu_conv(images, *layers[:3])
            block.norm_pool(y, layers[3], None, 0).float().square().mean().backward()

        step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
