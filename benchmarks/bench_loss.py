"""What does a training step's loss with AUC cost, beside BCEWithLogitsLoss and torchmetrics, and beside what it must?

Each question is one benchmark that times all its contenders in turn within one run (the machine's moods then hit all of
them), after it has checked that they agree; the ratios are in `extra_info` and printed. One thread, medians of rounds.

    pytest --benchmark-only benchmarks/bench_loss.py -s
"""

from __future__ import annotations

import importlib.util
import statistics
import subprocess
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from cxrfast import AucCounts, WeightedBCEWithAUC, loss_op
from cxrfast.auc import exact_auc

C = 14


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batch(N: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(N)
    logits = (torch.randn((N, C), generator=generator) * 2).requires_grad_()
    targets = (torch.rand((N, C), generator=generator) < 0.1).float()
    return logits, targets, torch.linspace(1, 50, C)


def step_of(module: Callable[..., Tensor], logits: Tensor, *arguments: Any) -> Callable[[], Tensor]:
    def step() -> Tensor:
        logits.grad = None
        loss = module(logits, *arguments)
        loss.backward()
        return loss

    return step


def side_by_side(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median microseconds of each, measured in turn; quick ones are repeated to 20 ms a round.

    One thread is timed by the processor's clock for it, so that what else runs on the machine is not in the figure.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    repeats = {}
    for name, run in contenders.items():
        run()
        start = clock()
        run()
        repeats[name] = max(1, min(300, int(20e-3 / (clock() - start))))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            start = clock()
            for _ in range(repeats[name]):
                run()
            times[name].append((clock() - start) / repeats[name] * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def record(benchmark: Any, times: dict[str, float], **ratios: float) -> None:
    benchmark.extra_info.update({f"{name} us": round(value, 1) for name, value in times.items()})
    benchmark.extra_info.update({name: round(value, 2) for name, value in ratios.items()})
    print(" ", benchmark.extra_info)


EMPTY = """
#include "bce_auc_cpu.h"
namespace cxrfast {
template <class T>
BceAucSums bce_auc_cpu(const BceAucBatch&, int, ParallelFor) {
  return {0, 1};
}
template <class T>
void scale_grad_cpu(const void*, double, void*, int64_t) {}
template BceAucSums bce_auc_cpu<float>(const BceAucBatch&, int, ParallelFor);
template void scale_grad_cpu<float>(const void*, double, void*, int64_t);
}  // namespace cxrfast
"""


@pytest.fixture(scope="module")
def empty_functions(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Ours with kernels that compute nothing: what Python, autograd and the allocation of the results cost alone."""
    folder = tmp_path_factory.mktemp("empty")
    (folder / "empty.cpp").write_text(EMPTY)
    torch_folder = Path(torch.__file__).parent
    csrc = Path(__file__).parents[1] / "csrc" / "loss"
    command = ["g++", "-std=c++20", "-O3", "-shared", "-fPIC", "-fvisibility=hidden", f"-I{csrc}"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(torch_folder / "include")]
    command += ["-isystem", sysconfig.get_path("include"), str(csrc / "bce_auc_direct.cpp"), "empty.cpp"]
    subprocess.run([*command, "-o", "_loss.so", f"-L{torch_folder / 'lib'}", "-ltorch_cpu"], cwd=folder, check=True)
    spec = importlib.util.spec_from_file_location("_loss", folder / "_loss.so")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Rivals:
    """The two lines that the operator replaces, checked against it."""

    def __init__(self, N: int, thresholds: int | None = None, device: str = "cpu") -> None:
        from torchmetrics.classification import MultilabelAUROC

        logits, targets, pos_weight = batch(N)
        self.logits, self.targets = logits.detach().to(device).requires_grad_(), targets.to(device)
        bce = nn.BCEWithLogitsLoss(pos_weight=pos_weight).to(device)
        self.auroc = MultilabelAUROC(num_labels=C, average=None, thresholds=thresholds).to(device)
        labels = self.targets.int()
        self.counts = AucCounts(C, device)
        self.ours = step_of(WeightedBCEWithAUC(pos_weight).to(device), self.logits, self.targets, self.counts)
        self.bce = step_of(bce, self.logits, self.targets)
        self.update = lambda: self.auroc.update(self.logits.detach(), labels)
        ours, ours_grad = self.ours(), self.logits.grad
        theirs = self.bce()
        assert ours_grad is not None and self.logits.grad is not None
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
        torch.testing.assert_close(ours_grad, self.logits.grad, rtol=1e-5, atol=1e-7)  # theirs cancels
        assert exact_auc(self.logits.cpu(), self.targets.cpu()) == pytest.approx(
            self.counts.compute().auc.numpy(), abs=2e-3, nan_ok=True
        )


@pytest.mark.parametrize("N", [32, 256, 4096])
def test_step(benchmark: Any, N: int, empty_functions: Any) -> None:
    """Loss, gradient and counts of one batch: BCEWithLogitsLoss and torchmetrics' exact update, and the floor."""
    rivals = Rivals(N)

    ours = loss_op._direct
    assert ours is not None

    def floor() -> None:
        loss_op._direct = empty_functions
        try:
            rivals.ours()
        finally:
            loss_op._direct = ours

    contenders = {"ours": rivals.ours, "floor": floor, "bce": rivals.bce, "torchmetrics": rivals.update}
    times: dict[str, float] = {}

    def run() -> None:
        times.update(side_by_side(contenders, 21))
        rivals.auroc.reset()

    benchmark.pedantic(run, rounds=1, warmup_rounds=0)
    together = times["bce"] + times["torchmetrics"]
    record(benchmark, times, faster=together / times["ours"], over_floor=times["ours"] / times["floor"])


@pytest.mark.parametrize("N", [32, 256, 4096])
def test_step_against_200_thresholds(benchmark: Any, N: int) -> None:
    """The same against torchmetrics' constant-memory mode."""
    rivals = Rivals(N, thresholds=200)
    contenders = {"ours": rivals.ours, "bce": rivals.bce, "torchmetrics": rivals.update}
    times: dict[str, float] = {}
    benchmark.pedantic(lambda: times.update(side_by_side(contenders, 9 if N < 1000 else 3)), rounds=1, warmup_rounds=0)
    record(benchmark, times, faster=(times["bce"] + times["torchmetrics"]) / times["ours"])


@pytest.mark.gpu
@pytest.mark.parametrize("N", [32, 256, 4096])
def test_step_on_a_gpu(benchmark: Any, N: int) -> None:
    """Eager steps as the host launches them, and replayed CUDA graphs of them, in the GPU's time."""
    rivals, binned = Rivals(N, device="cuda"), Rivals(N, 200, "cuda")
    eager = {"ours": rivals.ours, "bce": rivals.bce, "torchmetrics": rivals.update, "200 thresholds": binned.update}
    contenders = {name: (run, 200) for name, run in eager.items()}
    contenders |= {f"{name}, replayed": (replayed(eager[name]), 1000) for name in ("ours", "bce")}
    times: dict[str, list[float]] = {name: [] for name in contenders}

    def take_turns() -> None:
        for name, (run, count) in contenders.items():
            times[name].append(gpu_us(run, count))
        rivals.auroc.reset()

    benchmark.pedantic(take_turns, rounds=11, warmup_rounds=1)
    us = {name: statistics.median(values[1:]) for name, values in times.items()}
    ratios = {f"faster than {way}": (us["bce"] + us[way]) / us["ours"] for way in ("torchmetrics", "200 thresholds")}
    record(benchmark, us, **ratios)


def replayed(step: Callable[[], object]) -> Callable[[], None]:
    """A step as a CUDA graph, captured after it has run on a stream of its own."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def gpu_us(run: Callable[[], object], count: int) -> float:
    """Microseconds of a call, the mean over ``count`` of them between two of the GPU's events."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    begin.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / count


def test_epoch_end(benchmark: Any) -> None:
    """The AUC of 22,433 x 14 scores at the end of an epoch against scikit-learn's."""
    logits, targets, _ = batch(22_433)
    counts = AucCounts(C)
    counts.update(logits, targets)
    scores, labels = logits.detach().numpy(), targets.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = roc_auc_score(labels, scores, average=None)
    assert counts.compute().auc.numpy() == pytest.approx(expected, abs=1e-4)
    contenders = {"ours": counts.compute, "scikit-learn": lambda: roc_auc_score(labels, scores, average=None)}
    times: dict[str, float] = {}
    benchmark.pedantic(lambda: times.update(side_by_side(contenders, 9)), rounds=1, warmup_rounds=0)
    record(benchmark, times, faster=times["scikit-learn"] / times["ours"])


@pytest.mark.parametrize("threads", [1, 2])
def test_distance_to_the_limit(benchmark: Any, threads: int) -> None:
    """1 M x 14: the operator's forward pass, with and without counts, against a plain read of the same bytes."""
    torch.set_num_threads(threads)
    logits, targets, pos_weight = batch(1_000_000)
    logits = logits.detach()
    counts = AucCounts(C)
    operator = torch.ops.cxrfast.weighted_bce_auc
    contenders = {
        "loss, gradient, counts": lambda: operator(logits, targets, pos_weight, None, counts.counts),
        "loss, gradient": lambda: operator(logits, targets, pos_weight, None, None),
        "counts": lambda: counts.update(logits, targets),
        "read": lambda: (logits.sum(), targets.sum()),
    }
    times: dict[str, float] = {}
    benchmark.pedantic(lambda: times.update(side_by_side(contenders, 3)), rounds=1, warmup_rounds=0)
    per_entry = {f"{name} ns/entry": value * 1e3 / logits.numel() for name, value in times.items()}
    record(benchmark, times, **per_entry, over_read=times["loss, gradient, counts"] / times["read"])


if __name__ == "__main__":
    sys.exit(pytest.main(["--benchmark-only", "-s", "-q", __file__]))
