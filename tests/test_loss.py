"""The loss's danger: training on a number that is slightly wrong. Values, gradients, counts against the reference."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import cxrfast
from cxrfast import loss_op
from cxrfast.auc import CODES, AucCounts, add_counts, score_codes
from cxrfast.doctor import examine
from cxrfast.errors import InputError
from cxrfast.loss import WeightedBCEWithAUC, class_weights, weighted_bce
from cxrfast.reference import weighted_bce_ref

NAN, INF = float("nan"), float("inf")
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, *HALVES, torch.float64)


@pytest.fixture(params=["compiled", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each test of the module runs on the compiled operator and on the fallback."""
    if request.param == "plain":
        monkeypatch.setitem(loss_op.MISSING, "cpu", "a test")
    else:
        assert "cpu" not in loss_op.MISSING, loss_op.MISSING
    yield request.param


def batch(N: int, C: int, seed: int = 0, spread: float = 4.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits, targets (a tenth unknown), pos_weight, class_weight."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((N, C), generator=generator) * spread
    targets = (torch.rand((N, C), generator=generator) < 0.3).float()
    targets[torch.rand((N, C), generator=generator) < 0.1] = NAN
    return logits, targets, torch.rand(C, generator=generator) * 50, torch.rand(C, generator=generator) + 0.5


def ulps(values: Tensor, truth: Tensor) -> float:
    """Greatest distance in units of the last place of the truth, of values' dtype."""
    rounded = truth.to(values.dtype)
    spacing = (rounded.abs().nextafter(torch.tensor(INF, dtype=values.dtype)) - rounded.abs()).double()
    return float(((values.double() - truth).abs() / spacing).max()) if len(values) else 0.0


# ---- values and gradients ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(0, 3), (1, 1), (1, 14), (32, 14), (72, 14), (73, 14), (74, 14), (257, 3), (3, 1025)]
)
def test_loss_and_gradient_are_the_references(way: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits, targets, pos_weight, class_weight = batch(*shape)
    logits = logits.to(dtype).requires_grad_()
    module = WeightedBCEWithAUC(pos_weight, class_weight)
    counts = AucCounts(shape[1]) if shape[1] < 100 else None  # 1 MiB a class
    loss = module(logits, targets, counts)
    loss.backward()
    value, grad = weighted_bce_ref(logits.detach(), targets, pos_weight, class_weight)
    assert loss.shape == () and loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(value, rel=1e-6)
    assert logits.grad is not None and logits.grad.dtype == dtype
    if dtype in HALVES:
        assert ulps(logits.grad, grad) <= 1
    else:
        torch.testing.assert_close(logits.grad.double(), grad, rtol=1e-6, atol=1e-37)
    if counts is not None:
        expected = torch.zeros_like(counts.counts)
        add_counts(logits, targets, expected)
        assert torch.equal(counts.counts, expected)


def test_counts_of_more_classes_than_a_tile_holds() -> None:
    logits, targets, *_ = batch(5, 1025)
    counts = torch.from_numpy(np.zeros((1025, 2, CODES), dtype=np.int64))  # pages that nobody writes take no memory
    operator()(logits, targets, None, None, counts)
    known = ~targets.isnan()
    columns = torch.arange(1025).expand(5, 1025)[known]
    places = (columns, targets[known].long(), score_codes(logits[known]).long())
    expected, number = torch.stack(places).unique(dim=1, return_counts=True)
    assert torch.equal(counts[tuple(expected)], number) and int(counts.sum()) == int(known.sum())


def test_every_size_of_logit_to_1e_6(way: str) -> None:
    """Also where fp32's loss is tiny: no cancellation anywhere. Below fp32's normal range it may be 0."""
    x = torch.cat([torch.logspace(-30, 4, 2000), torch.linspace(0, 120, 3000), torch.tensor([0.0])])
    logits = torch.cat([x, -x])[:, None].repeat(1, 2).requires_grad_()
    targets = torch.tensor([0.0, 1.0]).expand_as(logits)
    for row in torch.arange(len(logits)).chunk(4):
        part = logits[row].detach().requires_grad_()
        WeightedBCEWithAUC()(part, targets[row]).backward()
        grad = weighted_bce_ref(part.detach(), targets[row])[1]
        assert part.grad is not None
        torch.testing.assert_close(part.grad.double(), grad, rtol=1e-6, atol=1.2e-38)
    for index in range(0, len(logits), 97):
        part = logits[index : index + 1].detach()
        assert WeightedBCEWithAUC()(part, targets[:1]).item() == pytest.approx(
            weighted_bce_ref(part, targets[:1])[0], rel=1e-6, abs=1.2e-38
        )


def test_the_two_lines_that_it_replaces(way: str) -> None:
    logits, targets, pos_weight, class_weight = batch(40, 14)
    targets = targets.nan_to_num(0.0)
    expected = F.binary_cross_entropy_with_logits(logits, targets, class_weight, pos_weight=pos_weight)
    assert WeightedBCEWithAUC(pos_weight, class_weight)(logits, targets).item() == pytest.approx(
        expected.item(), rel=1e-6
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e4, INF])
def test_extreme_logits(way: str, dtype: torch.dtype, size: float) -> None:
    """Right: no loss, no slope. Wrong: the whole size, slope 1. BCEWithLogitsLoss gives NaN at infinity."""
    logits = torch.tensor([[size, -size], [-size, size]], dtype=dtype, requires_grad=True)
    right, wrong = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    counts = AucCounts(2)
    loss = WeightedBCEWithAUC()(logits, right, counts)
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and (logits.grad == 0).all()
    assert counts.compute().auc.tolist() == [1.0, 1.0]
    logits.grad = None
    loss = WeightedBCEWithAUC()(logits, wrong)
    loss.backward()
    assert loss.item() == pytest.approx(float(logits.detach()[0, 0]))
    assert logits.grad.tolist() == [[0.25, -0.25], [-0.25, 0.25]]


@pytest.mark.parametrize("label", [0.0, 1.0, NAN])
def test_classes_of_one_label(way: str, label: float) -> None:
    logits = torch.randn(30, 2, requires_grad=True)
    targets = torch.full((30, 2), label)
    counts = AucCounts(2)
    loss = WeightedBCEWithAUC(torch.tensor([3.0, 0.5]))(logits, targets, counts)
    loss.backward()
    value, grad = weighted_bce_ref(logits.detach(), targets, torch.tensor([3.0, 0.5]))
    assert loss.item() == pytest.approx(value, rel=1e-6) and logits.grad is not None
    torch.testing.assert_close(logits.grad.double(), grad, rtol=1e-6, atol=0)
    assert counts.compute().defined == 0
    if label != label:
        assert loss.item() == 0 and not logits.grad.any() and int(counts.counts.sum()) == 0


def test_unknown_and_nan(way: str) -> None:
    """An unknown entry does nothing, whatever its logit; a NaN logit of a known one is not hidden."""
    logits = torch.tensor([[NAN, 1.0], [2.0, INF]], requires_grad=True)
    counts = AucCounts(2, names=["Mass", "Hernia"])
    loss = WeightedBCEWithAUC()(logits, torch.tensor([[NAN, 0.0], [1.0, -1.0]]), counts)
    loss.backward()
    value, _ = weighted_bce_ref(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0]]))
    assert loss.item() == pytest.approx(value, rel=1e-6) and logits.grad is not None
    assert logits.grad[0, 0] == 0 and logits.grad[1, 1] == 0 and (logits.grad[[0, 1], [1, 0]] != 0).all()
    assert int(counts.counts.sum()) == 2
    logits.grad = None
    loss = WeightedBCEWithAUC()(logits, torch.zeros(2, 2), counts)
    loss.backward()
    assert loss.isnan() and logits.grad[0, 0].isnan()
    with pytest.raises(InputError, match=r"Mass \(1\)"):
        counts.compute()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64, torch.float16, torch.float64])
def test_targets_of_any_type(way: str, dtype: torch.dtype) -> None:
    logits, targets, *_ = batch(20, 4)
    targets = targets.nan_to_num(0.0 if dtype == torch.bool else -1.0)
    counts, expected = AucCounts(4), AucCounts(4)
    loss = WeightedBCEWithAUC()(logits, targets.to(dtype), counts)
    assert loss == WeightedBCEWithAUC()(logits, targets, expected)
    assert torch.equal(counts.counts, expected.counts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides(way: str, dtype: torch.dtype) -> None:
    logits, targets, *weights = batch(90, 14)
    logits = logits.to(dtype)
    module = WeightedBCEWithAUC(*weights)
    counts = AucCounts(14)
    expected = module(logits, targets, counts)
    wide = torch.full((180, 28), 7.0, dtype=dtype)
    wide[::2, 1::2] = logits
    for view in (logits.t().contiguous().t(), wide[::2, 1::2]):
        for labels in (targets, targets.t().contiguous().t()):
            other = AucCounts(14)
            leaf = view.detach().requires_grad_()
            loss = module(leaf, labels, other)
            loss.backward()
            assert not leaf.is_contiguous() and torch.equal(other.counts, counts.counts)
            dense = logits.clone().requires_grad_()
            module(dense, targets).backward()
            # torch's AVX-512 code and its code for single values differ by the last bit of more than one function
            spacing = 0 if way == "compiled" else 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(leaf.grad, dense.grad, rtol=spacing, atol=0)
            assert loss == expected if way == "compiled" else loss.item() == pytest.approx(expected.item(), rel=1e-6)
    one = torch.tensor([[0.5]], dtype=dtype).expand(50, 3)
    assert module.__class__()(one, torch.ones(1, 1).expand(50, 3)).item() == pytest.approx(
        weighted_bce_ref(one[:1], torch.ones(1, 3))[0], rel=1e-6
    )


# ---- autograd ----


def test_gradcheck(way: str) -> None:
    logits, targets, pos_weight, class_weight = batch(7, 5, spread=2.0)
    module = WeightedBCEWithAUC(pos_weight, class_weight)
    assert torch.autograd.gradcheck(lambda x: module(x, targets), logits.double().requires_grad_(), eps=1e-6, atol=1e-7)


def test_a_scaled_loss_scales_the_gradient_and_backward_can_be_repeated(way: str) -> None:
    logits, targets, pos_weight, _ = batch(20, 14)
    logits.requires_grad_()
    module = WeightedBCEWithAUC(pos_weight)
    (once,) = torch.autograd.grad(module(logits, targets), logits)
    loss = module(logits, targets)
    (scaled,) = torch.autograd.grad(loss * 65536, logits, retain_graph=True)  # as GradScaler does
    (again,) = torch.autograd.grad(loss, logits)
    assert torch.equal(scaled, once * 65536) and torch.equal(again, once)


def test_the_gradient_is_handed_on_once() -> None:
    """No copy of it for logits.grad; a second pass would find it scaled already, and is refused."""
    logits, targets, *_ = batch(20, 14)
    logits.requires_grad_()
    loss = WeightedBCEWithAUC()(logits, targets)
    assert loss.grad_fn is not None
    kept = loss.grad_fn.kept[0].data_ptr()  # type: ignore[attr-defined]
    loss.backward()
    assert logits.grad is not None and logits.grad.data_ptr() == kept
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        loss.backward()


def test_counts_take_no_part_in_autograd(way: str) -> None:
    logits, targets, *_ = batch(20, 14)
    counts = AucCounts(14)
    loss = WeightedBCEWithAUC()(logits, targets, counts)
    assert not loss.requires_grad
    with torch.no_grad():
        assert not WeightedBCEWithAUC()(logits.requires_grad_(), targets, counts).requires_grad
    counts.update(logits, targets)
    assert not counts.counts.requires_grad
    assert int(counts.counts.sum()) == 3 * int((~targets.isnan()).sum())


# ---- the compiled operator ----


def operator() -> torch._ops.OpOverload:
    assert "cpu" not in loss_op.MISSING, loss_op.MISSING
    return torch.ops.cxrfast.weighted_bce_auc.default


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    logits, targets, pos_weight, class_weight = batch(9, 3)
    logits = logits.to(dtype).requires_grad_()
    counts = AucCounts(3).counts
    torch.library.opcheck(operator(), (logits, targets, pos_weight, class_weight, counts))
    torch.library.opcheck(operator(), (logits, targets))
    real = torch.float64 if dtype == torch.float64 else torch.float32
    grads = (torch.ones((), dtype=real), torch.randn(9, 3, dtype=real), torch.tensor(27), dtype)
    torch.library.opcheck(torch.ops.cxrfast.weighted_bce_auc_backward.default, grads)
    torch.library.opcheck(torch.ops.cxrfast.auc_count.default, (logits.detach(), targets, counts))
    torch.library.opcheck(torch.ops.cxrfast.auc_pairs.default, (counts,))


def test_the_operator_alone_is_differentiable() -> None:
    logits, targets, pos_weight, class_weight = batch(30, 14)
    leaf = logits.clone().requires_grad_()
    loss, grad, known = operator()(leaf, targets, pos_weight, class_weight, None)
    loss.backward()
    assert int(known) == int((~targets.isnan()).sum()) and not grad.requires_grad
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, grad / known, rtol=2e-7, atol=0)


def test_torch_compile_without_a_graph_break() -> None:
    layer = torch.nn.Linear(5, 14)
    inputs, targets = torch.randn(40, 5), batch(40, 14)[1]
    module = WeightedBCEWithAUC(torch.rand(14) + 1)

    def step(x: Tensor, counts: AucCounts) -> Tensor:
        return module(layer(x), targets, counts)

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        counts = AucCounts(14)
        layer.weight.grad = None
        loss = run(inputs, counts)
        loss.backward()
        assert layer.weight.grad is not None
        results.append((loss.detach(), layer.weight.grad.clone(), counts.counts))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
    assert int(results[0][2].sum()) == int((~targets.isnan()).sum())


def test_the_operator_refuses_what_it_cannot_read() -> None:
    logits, targets, weight, _ = batch(6, 3)
    counts = AucCounts(3).counts
    for arguments, said in (
        ((logits[0], targets), "logits must be"),
        ((logits, targets[:5]), "targets must be"),
        ((logits, targets.double()), "targets must be float32"),
        ((logits, targets, weight[:2]), "pos_weight and class_weight"),
        ((logits, targets, None, None, counts[:2]), "counts must be"),
        ((logits, targets, None, None, counts.int()), "counts must be"),
        ((logits, targets, None, None, counts.transpose(1, 2).contiguous().transpose(1, 2)), "counts must be"),
        ((logits.long(), targets), "logits must be float32"),
    ):
        with pytest.raises(RuntimeError, match=said):
            operator()(*arguments)


class Direct:
    """Stands before loss_op's way past the dispatcher and notes which calls it took."""

    def __init__(self, real: Any) -> None:
        self.real, self.took = real, [False]

    def bce_auc(self, *arguments: Any) -> Any:
        results = self.real.bce_auc(*arguments)
        self.took.append(results is not None)
        return results

    def scale_grad(self, *arguments: Any) -> Any:
        scaled = self.real.scale_grad(*arguments)
        self.took.append(scaled is not None)
        return scaled


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> Direct:
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("this torch has the operators alone")
    stand = Direct(loss_op._direct)
    monkeypatch.setattr(loss_op, "_direct", stand)
    return stand


@pytest.mark.parametrize("N", [1, 32, 73, 3000])
@pytest.mark.parametrize("weighted", [False, True])
def test_past_the_dispatcher_the_bits_are_the_same(
    N: int, weighted: bool, direct: Direct, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, targets, *weights = batch(2 * N, 28)
    logits, targets = logits[::2, 1::2], targets[::2, 1::2]
    module = WeightedBCEWithAUC(*(weight[::2] for weight in weights)) if weighted else WeightedBCEWithAUC()
    results = []
    for _ in range(2):
        counts = AucCounts(14)
        leaf = logits.detach().requires_grad_()
        loss = module(leaf, targets, counts if weighted else None)
        (loss * 3).backward()
        results.append((loss.detach(), leaf.grad, counts.counts))
        monkeypatch.setattr(loss_op, "_direct", None)
    assert direct.took == [False, True, True]
    for past, through in zip(*results, strict=True):
        assert torch.equal(past, through)


@pytest.mark.parametrize(
    "case", ["half", "double", "parameter", "negated", "empty", "mode", "function mode", "subclass"]
)
def test_what_the_dispatcher_must_see_goes_through_it(case: str, direct: Direct) -> None:
    logits, targets, weight, _ = batch(10, 3)
    module = WeightedBCEWithAUC(weight)
    value = weighted_bce_ref(logits, targets, weight)[0]
    mode: AbstractContextManager[Any] = nullcontext()
    seen: list[str] = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    if case in ("half", "double"):
        logits = logits.to({"half": torch.bfloat16, "double": torch.float64}[case])
        value = weighted_bce_ref(logits, targets, weight)[0]
    elif case == "parameter":
        logits = torch.nn.Parameter(logits)
    elif case == "negated":
        logits = torch.complex(torch.zeros(10, 3), -logits).conj().imag
        assert logits.is_neg()
    elif case == "empty":
        logits, targets, value = logits[:0], targets[:0], 0.0
    elif case == "mode":
        mode = Noting()
    elif case == "function mode":
        mode = torch.overrides.BaseTorchFunctionMode()
    elif case == "subclass":
        logits = logits.as_subclass(type("Logits", (Tensor,), {}))
    with mode:
        loss = module(logits, targets)
    assert float(loss.detach()) == pytest.approx(value, rel=1e-6)
    assert not any(direct.took)
    assert case != "mode" or "cxrfast.weighted_bce_auc.default" in seen


DIGEST = """
import hashlib, sys, torch
from cxrfast.auc import AucCounts
from cxrfast.loss import WeightedBCEWithAUC
torch.set_num_threads(int(sys.argv[1]))
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for N in (5, 300, 9000):
        generator = torch.Generator().manual_seed(N)
        logits = (torch.randn((N, 14), generator=generator) * 6).to(dtype).requires_grad_()
        targets = torch.randint(-1, 2, (N, 14), generator=generator).float()
        counts = AucCounts(14)
        loss = WeightedBCEWithAUC(torch.linspace(1, 50, 14))(logits, targets, counts)
        loss.backward()
        for result in (loss.detach(), logits.grad, counts.counts):
            digest.update(result.flatten().contiguous().view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_same_input_same_bits() -> None:
    """Whatever the number of threads and the instruction set."""
    runs = [("2", "auto"), ("1", "portable")]
    digests = {
        subprocess.run(
            [sys.executable, "-c", DIGEST, threads],
            env={**os.environ, "CXRFAST_ISA": isa},
            cwd=Path(cxrfast.__file__).parents[1],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for threads, isa in runs
    }
    assert len(digests) == 1 and len(digests.pop().strip()) == hashlib.sha256().digest_size * 2


@pytest.mark.parametrize("C", [1, 14, 1500])
def test_threads_count_as_one_does(C: int) -> None:
    logits, targets, *weights = batch(100_000 // C, C, seed=2)
    module = WeightedBCEWithAUC(*weights)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            counts = AucCounts(C) if C < 100 else None
            leaf = logits.clone().requires_grad_()
            loss = module(leaf, targets, counts)
            loss.backward()
            results.append((loss.detach(), leaf.grad, torch.empty(0) if counts is None else counts.counts))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for one, many in zip(results[0], other, strict=True):
            assert torch.equal(one, many)
    if C < 100:
        expected = torch.zeros_like(results[0][2])
        add_counts(logits, targets, expected)
        assert torch.equal(results[0][2], expected)


def test_memory_after_ten_thousand_updates_is_that_after_one() -> None:
    logits, targets, *weights = batch(32, 14)
    logits.requires_grad_()
    module, counts = WeightedBCEWithAUC(*weights), AucCounts(14)
    tensor = counts.counts

    def steps(times: int) -> int:
        for _ in range(times):
            logits.grad = None
            module(logits, targets, counts).backward()
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    steps(200)  # what torch sets up once
    first = steps(1)
    assert steps(10_000) - first <= 256 << 10
    assert counts.counts is tensor and int(tensor.sum()) == 10_201 * int((~targets.isnan()).sum())


# ---- the module ----


def test_fallback_gives_the_same_numbers_and_the_doctor_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets, *weights = batch(100, 14)
    module = WeightedBCEWithAUC(*weights)
    assert examine()["parts"]["loss on the CPU"]["ready"]
    results = []
    for _ in range(2):
        counts = AucCounts(14)
        leaf = logits.clone().requires_grad_()
        loss = module(leaf, targets, counts)
        loss.backward()
        results.append((loss.detach(), leaf.grad, counts.counts, counts.compute().auc))
        monkeypatch.setitem(loss_op.MISSING, "cpu", "_loss.so was not built")
    for compiled, plain in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-6, atol=1e-9)
    part = examine()["parts"]["loss on the CPU"]
    assert not part["ready"] and "plain torch is in use" in part["reason"]


def test_a_missing_library_is_no_failure(tmp_path: Path) -> None:
    """A checkout that was never built: the package imports, and computes in plain torch."""
    (tmp_path / "cxrfast").mkdir()
    for file in Path(cxrfast.__file__).parent.glob("*.py"):
        (tmp_path / "cxrfast" / file.name).write_text(file.read_text())
    code = (
        "import torch; from cxrfast import AucCounts, WeightedBCEWithAUC, loss_op; counts = AucCounts(2)\n"
        "print(float(WeightedBCEWithAUC()(torch.zeros(3, 2), torch.ones(3, 2), counts)), int(counts.counts.sum()))\n"
        "print(loss_op.MISSING['cpu'])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[:2] == ["0.6931471824645996 6", "_loss.so was not built"]


def test_wrong_input_is_said(way: str) -> None:
    logits, targets, weight, _ = batch(6, 3)
    for arguments, said in (
        ((logits[0], targets[0]), r"\(N, C\)"),
        ((logits, targets[:5]), r"targets must be \(6, 3\)"),
        ((logits.long(), targets), "floating"),
        ((logits, targets, AucCounts(4)), "3 classes, the counts 4"),
    ):
        with pytest.raises(InputError, match=said):
            WeightedBCEWithAUC(weight)(*arguments)
    with pytest.raises(InputError, match=r"pos_weight must be \(3,\)"):
        WeightedBCEWithAUC(weight[:2])(logits, targets)
    with pytest.raises(InputError, match=r"class_weight must be \(C,\)"):
        WeightedBCEWithAUC(None, torch.ones(1, 3))


def test_weights_are_buffers() -> None:
    module = WeightedBCEWithAUC(torch.ones(3, dtype=torch.float64), None)
    assert list(module.state_dict()) == ["pos_weight"] and not list(module.parameters())
    assert module.half()(torch.zeros(2, 3), torch.ones(2, 3)).item() == pytest.approx(0.6931472)


# ---- weights from prevalence ----


def test_class_weights() -> None:
    targets = torch.tensor([[1.0, 0.0, 1.0, NAN], [0.0, 0.0, 1.0, NAN], [0.0, NAN, NAN, NAN], [0.0, 0.0, 1.0, NAN]])
    expected = [4.0, 1.0, 1.0, 1.0]  # a quarter positive; no positive; all positive; nothing known
    for given in (targets, targets.numpy()):
        positive, whole = class_weights(given)
        assert positive.tolist() == expected and whole.tolist() == [1.0] * 4 and positive.dtype == torch.float32
        positive, whole = class_weights(given, "class")
        assert positive.tolist() == [1.0] * 4 and whole.tolist() == expected
        assert all(weight.tolist() == [1.0] * 4 for weight in class_weights(given, "none"))
    with pytest.raises(InputError, match="weighting must be"):
        class_weights(targets, "both")
    with pytest.raises(InputError, match=r"\(N, C\)"):
        class_weights(targets[0])


# ---- the real thing ----


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (32, 14), (73, 14), (74, 14), (5000, 14), (3, 1025), (300_000, 1)])
def test_cuda_gives_the_cpus_bits(shape: tuple[int, int], dtype: torch.dtype) -> None:
    assert "cuda" not in loss_op.MISSING, loss_op.MISSING
    logits, targets, *weights = batch(*shape)
    results = []
    for device in ("cpu", "cuda", "cuda"):
        counts = AucCounts(shape[1], device)
        leaf = logits.detach().to(device, dtype).requires_grad_()  # not logits itself, where it is there already
        loss = WeightedBCEWithAUC(*weights).to(device)(leaf, targets.to(device), counts)
        loss.backward()
        counts.update(leaf, targets.to(device))
        assert leaf.grad is not None
        results.append((loss.detach().cpu(), leaf.grad.cpu(), counts.counts.cpu()))
    for on_cpu, *on_cuda in zip(*results, strict=True):
        assert torch.equal(*on_cuda)
        if dtype == torch.float64:  # exp and log1p are the device's own
            torch.testing.assert_close(on_cpu, on_cuda[0], rtol=1e-14, atol=0)
        else:
            assert torch.equal(on_cpu, on_cuda[0])


@pytest.mark.gpu
def test_cuda_equal_scores_any_strides_and_streams() -> None:
    targets = batch(2000, 14)[1].cuda()
    module = WeightedBCEWithAUC().cuda()
    counts = AucCounts(14, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        loss = module(torch.zeros((1, 1), device="cuda").expand(2000, 14), targets, counts)
    stream.synchronize()
    assert loss.item() == pytest.approx(0.6931472, rel=1e-6)
    assert int(counts.counts[:, :, 0x8000].sum()) == int((~targets.isnan()).sum()) == int(counts.counts.sum())
    assert counts.compute().auc.tolist() == [0.5] * 14


@pytest.mark.gpu
def test_cuda_neither_waits_nor_allocates_outside_a_graph() -> None:
    logits, targets, *weights = batch(500, 14)
    leaf = logits.cuda().requires_grad_()
    targets = targets.cuda()
    module, counts = WeightedBCEWithAUC(*weights).cuda(), AucCounts(14, "cuda")
    module(leaf, targets, counts).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(leaf, targets, counts).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    counts.reset()
    leaf.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = module(leaf, targets, counts)
        loss.backward()
    for _ in range(3):
        graph.replay()
    expected = logits.requires_grad_()
    on_cpu = WeightedBCEWithAUC(*weights)(expected, targets.cpu())
    on_cpu.backward()
    assert loss.cpu() == on_cpu and leaf.grad is not None and expected.grad is not None
    torch.testing.assert_close(leaf.grad.cpu(), expected.grad, rtol=1e-6, atol=1e-12)
    assert int(counts.counts.sum()) == 3 * int((~targets.isnan()).sum())


def test_the_public_names() -> None:
    assert cxrfast.WeightedBCEWithAUC is WeightedBCEWithAUC and cxrfast.AucCounts is AucCounts
    assert weighted_bce(torch.zeros(1, 1), torch.ones(1, 1), None, None).item() == pytest.approx(0.6931472)
