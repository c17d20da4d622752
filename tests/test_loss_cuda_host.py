"""The CUDA kernel's danger: CI has no GPU. So its very source runs here on threads, and nvcc compiles it."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_host import compile_host, sanitised
from torch import Tensor

from cxrfast.auc import AucCounts
from cxrfast.reference import weighted_bce_ref

ROOT = Path(__file__).parents[1]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # in the order of its numbers
NAN = float("nan")


class Arguments(ctypes.Structure):
    """BceAucArgs of csrc/loss/bce_auc_kernel.cuh."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("logits_stride", ctypes.c_int64 * 2),
        ("targets", ctypes.c_void_p),
        ("targets_stride", ctypes.c_int64 * 2),
        ("N", ctypes.c_int64),
        ("C", ctypes.c_int64),
        ("pos_weight", ctypes.c_void_p),
        ("pos_weight_stride", ctypes.c_int64),
        ("class_weight", ctypes.c_void_p),
        ("class_weight_stride", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("grad", "counts", "loss", "known")),
        *((name, ctypes.c_void_p) for name in ("tile_loss", "tile_known", "n_finished")),
    )


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels as a library of the CPU."""
    return ctypes.CDLL(
        str(compile_host("loss_cuda_host.cpp", tmp_path_factory.mktemp("host") / "host.so", "-shared", "-fPIC"))
    )


def run_kernel(
    host: ctypes.CDLL,
    logits: Tensor,
    targets: Tensor,
    pos_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    counts: Tensor | None = None,
    only_counts: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """weighted_bce_auc by the CUDA kernel: (loss, grad, known)."""
    real = torch.float64 if logits.dtype == torch.float64 else torch.float32
    loss, grad = torch.full((), NAN, dtype=real), torch.full(logits.shape, NAN, dtype=real)
    known = torch.tensor(-1)
    address = lambda tensor: None if tensor is None else tensor.data_ptr()  # noqa: E731
    arguments = Arguments(
        logits=logits.data_ptr(),
        logits_stride=logits.stride(),
        targets=targets.data_ptr(),
        targets_stride=targets.stride(),
        N=logits.shape[0],
        C=logits.shape[1],
        pos_weight=address(pos_weight),
        pos_weight_stride=1,
        class_weight=address(class_weight),
        class_weight_stride=1,
        grad=None if only_counts else (grad if grad.numel() else loss).data_ptr(),
        counts=address(counts),
        loss=loss.data_ptr(),
        known=known.data_ptr(),
    )
    host.bce_auc_host(DTYPES.index(logits.dtype), ctypes.byref(arguments))
    return loss, grad, known


def batch(N: int, C: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(N * 100 + C)
    logits = (torch.randn((N, C), generator=generator) * 4).to(dtype)
    targets = torch.randint(-1, 2, (N, C), generator=generator).float()
    targets[targets < 0] = NAN
    return logits, targets, torch.rand(C, generator=generator) * 50, torch.rand(C, generator=generator) + 0.5


# A tile holds 73 rows of 14 classes, 1,024 of one, 341 of three, and no whole row of 1,025; a block has 256 threads.
EDGES = [(0, 3), (1, 1), (1, 14), (72, 14), (73, 14), (74, 14), (147, 14), (255, 1), (257, 1), (1024, 1), (1025, 1)]
EDGES += [(341, 3), (342, 3), (2, 1025)]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, torch.float32) for shape in EDGES), *(((74, 14), dtype) for dtype in DTYPES[1:])],
)
def test_the_kernel_gives_the_cpus_bits(host: ctypes.CDLL, shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits, targets, *weights = batch(*shape, dtype)
    counts, expected = (AucCounts(shape[1]).counts if shape[1] < 100 else None for _ in range(2))
    loss, grad, known = run_kernel(host, logits, targets, *weights, counts)
    on_cpu = torch.ops.cxrfast.weighted_bce_auc(logits, targets, *weights, expected)
    assert torch.equal(known, on_cpu[2])
    for ours, theirs in ((loss, on_cpu[0]), (grad, on_cpu[1])):
        # float64 has the device's exp and log1p; here, the CPU's own
        assert torch.equal(ours, theirs)
    if counts is not None and expected is not None:
        assert torch.equal(counts, expected) and int(counts.sum()) == int(known)
    value, gradient = weighted_bce_ref(logits, targets, *weights)
    assert loss.item() == pytest.approx(value, rel=1e-6)
    torch.testing.assert_close((grad / known.clamp(min=1)).double(), gradient, rtol=1e-6, atol=1e-37)


def test_more_tiles_than_a_block_has_threads(host: ctypes.CDLL) -> None:
    logits, targets, *weights = batch(260, 1024, torch.float32)
    ours = run_kernel(host, logits, targets, *weights)
    theirs = torch.ops.cxrfast.weighted_bce_auc(logits, targets, *weights, None)
    assert all(torch.equal(*pair) for pair in zip(ours, theirs, strict=True))


def test_all_scores_equal_and_special_ones(host: ctypes.CDLL) -> None:
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, NAN, 65520, 1e-8, -1e-8, 1e-40, 3e38, 2**-14, -(2**-25)])
    for logits in (torch.full((75, 12), 0.25), special.expand(40, 12)):
        targets = batch(len(logits), 12, torch.float32)[1]
        counts, expected = AucCounts(12).counts, AucCounts(12).counts
        loss, grad, _ = run_kernel(host, logits, targets, None, None, counts)
        on_cpu = torch.ops.cxrfast.weighted_bce_auc(logits, targets, None, None, expected)
        torch.testing.assert_close(loss, on_cpu[0], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(grad, on_cpu[1], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(counts, expected)


def test_any_strides_and_counting_alone(host: ctypes.CDLL) -> None:
    logits, targets, *weights = batch(80, 14, torch.float16)
    expected = run_kernel(host, logits, targets, *weights)
    counts, alone = AucCounts(14).counts, AucCounts(14).counts
    turned = run_kernel(host, logits.t().contiguous().t(), targets.t().contiguous().t(), *weights, counts)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(turned, expected, strict=True))
    loss, grad, known = run_kernel(host, logits, targets, counts=alone, only_counts=True)
    assert torch.equal(alone, counts) and loss.isnan() and grad.isnan().all() and known == -1  # untouched


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_backward_kernel(host: ctypes.CDLL, dtype: torch.dtype) -> None:
    logits, targets, *weights = batch(60, 14, dtype)
    _, grad, known = torch.ops.cxrfast.weighted_bce_auc(logits, targets, *weights, None)
    for incoming in (1.0, 65536.0, 1e-3):
        grad_loss = torch.tensor(incoming, dtype=grad.dtype)
        out = torch.empty((60, 14), dtype=dtype)
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (grad, grad_loss, known, out)]
        host.scale_grad_host(DTYPES.index(dtype), *pointers, ctypes.c_int64(out.numel()))
        assert torch.equal(out, torch.ops.cxrfast.weighted_bce_auc_backward(grad_loss, grad, known, dtype))


# ---- races ----


CPU = str(ROOT / "csrc" / "loss" / "bce_auc_cpu.cpp")


@pytest.mark.slow
def test_thread_sanitizer_finds_no_race(tmp_path: Path) -> None:
    done = sanitised("loss_cuda_host.cpp", tmp_path, CPU)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": same") == 4 and "WARNING" not in done.stderr


@pytest.mark.slow
def test_thread_sanitizer_would_find_one(tmp_path: Path) -> None:
    done = sanitised("loss_cuda_host.cpp", tmp_path, CPU, "-DCXRFAST_DROP_BARRIERS")
    assert done.returncode == 66 and "data race" in done.stderr and "bce_auc_kernel.cuh" in done.stderr


# ---- nvcc ----


@pytest.mark.slow
def test_nvcc_compiles_every_kernel_without_spills() -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc")
    archs = ["sm_75", "sm_80", "sm_90"]
    command = [sys.executable, str(ROOT / "tools" / "check_cuda.py"), "loss", *archs]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["spilling"] == 0
    assert sorted(row["arch"] for row in found["rows"]) == sorted(archs * 2 * len(DTYPES))  # two kernels a type
    # 256 threads a block: 64 registers leave room for four blocks on each multiprocessor of a T4
    assert all(row["stack"] == 0 and row["registers"] <= 64 for row in found["rows"])
