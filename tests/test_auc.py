"""The AUC's danger: a number that looks right. Counted values against scikit-learn, and intervals that must hold."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from cxrfast.auc import CODES, NAN_CODE, AucCounts, add_counts, count_pairs, exact_auc, score_codes, score_of_code
from cxrfast.errors import InputError
from cxrfast.nih import CLASSES, read_metadata
from cxrfast.reference import auc_ref

NAN = float("nan")


def counted(scores: torch.Tensor, targets: torch.Tensor) -> AucCounts:
    counts = AucCounts(scores.shape[1])
    counts.update(scores, targets)
    return counts


# ---- codes ----


def test_codes_keep_the_order_of_every_fp16_number() -> None:
    every = torch.arange(CODES, dtype=torch.int32).to(torch.int16).view(torch.float16)
    numbers = every[~every.isnan()].sort().values
    codes = score_codes(numbers)
    rising = numbers[1:] > numbers[:-1]  # all but the two zeros
    assert torch.equal(codes[1:] > codes[:-1], rising) and int((~rising).sum()) == 1
    assert torch.equal(score_of_code(codes), numbers.double())
    assert (score_codes(every[every.isnan()]) == NAN_CODE).all() and int(codes.max()) < NAN_CODE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_compiled_and_plain_counts_are_the_same(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=generator).to(torch.int32).view(torch.float32)
    halfway = torch.arange(0, 0x7C00).to(torch.int16).view(torch.float16).float()
    halfway = (halfway[1:] + halfway[:-1]) / 2  # where rounding has to choose
    edges = torch.tensor([0.0, 65504, 65519.99, 65520, 1e9, 2**-24, 2**-25, 2**-25 * 1.0001, 1e-30, torch.inf, NAN])
    near = torch.cat([halfway, halfway.nextafter(torch.tensor(torch.inf)), halfway.nextafter(torch.tensor(0.0)), edges])
    scores = torch.cat([bits, near, -near]).to(dtype)
    scores = scores[: len(scores) // 3 * 3].view(-1, 3)
    targets = torch.randint(-1, 2, scores.shape, generator=generator).float()
    targets[targets < 0] = NAN
    plain = torch.zeros((3, 2, CODES), dtype=torch.int64)
    add_counts(scores, targets, plain)
    assert torch.equal(counted(scores, targets).counts, plain)
    assert int(plain.sum()) == int((~targets.isnan()).sum())


# ---- values ----


def test_cases_to_check_in_the_head() -> None:
    scores = torch.tensor([[1.0, 4.0, 5.0, 1.0, 3.0], [2.0, 3.0, 5.0, 2.0, 1.0], [3.0, 2.0, 5.0, 3.0, 2.0]])
    targets = torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0, NAN]])
    result = counted(scores, targets).compute()
    assert result.auc[:3].tolist() == [1.0, 0.0, 0.5]  # perfect, inverted, all tied
    assert result.auc[3].isnan() and result.low[3].isnan() and result.high[3].isnan()  # one label: undefined, not 0
    assert result.auc[4] == 1.0  # the unknown one is left out
    assert result.defined == 4 and result.macro == 0.625
    assert result.n_pos.tolist() == [1, 1, 2, 3, 1] and result.n_neg.tolist() == [2, 2, 1, 0, 1]
    assert exact_auc(scores, targets)[:3].tolist() == [1.0, 0.0, 0.5] and np.isnan(exact_auc(scores, targets)[3])


def test_no_sample_and_no_defined_class() -> None:
    result = AucCounts(3).compute()
    assert result.auc.isnan().all() and result.defined == 0 and np.isnan(result.macro)


def random_case(random: np.random.Generator, C: int, dtype: torch.dtype) -> tuple[torch.Tensor, np.ndarray]:
    """60 scores and targets of C classes, each with both labels; from heavy ties to none, of any size."""
    spread = 10.0 ** random.uniform(-6, 3, C)
    steps = random.choice([2, 3, 10, 1e3, 1e7], C)
    scores = torch.tensor(np.round(random.uniform(-1, 1, (60, C)) * steps) / steps * spread).to(dtype)
    targets = (random.random((60, C)) < random.uniform(0.02, 0.98, C)).astype(np.float32)
    targets[0], targets[1] = 0, 1
    return scores, targets


@pytest.mark.slow
def test_ten_thousand_cases_of_half_precision_against_scikit_learn() -> None:
    random, counts = np.random.default_rng(7), AucCounts(50)
    for _ in range(200):
        scores, targets = random_case(random, 50, torch.float16)
        counts.reset()
        counts.update(scores, torch.tensor(targets))
        expected = roc_auc_score(targets.astype(int), scores.double().numpy(), average=None)
        assert np.abs(counts.compute().auc.numpy() - expected).max() <= 1e-12
        assert np.abs(exact_auc(scores, targets) - expected).max() <= 1e-12


@pytest.mark.slow
def test_ten_thousand_cases_of_fp32_are_inside_the_interval() -> None:
    random, counts = np.random.default_rng(8), AucCounts(50)
    for _ in range(200):
        scores, targets = random_case(random, 50, torch.float32)
        targets[2:][random.random((58, 50)) < 0.1] = np.nan
        counts.reset()
        counts.update(scores, torch.tensor(targets))
        result, exact = counts.compute(), exact_auc(scores, targets)
        assert (result.low.numpy() <= exact + 1e-12).all() and (exact <= result.high.numpy() + 1e-12).all()
        assert np.allclose(result.auc, (result.low + result.high) / 2, rtol=0, atol=1e-12)


@settings(deadline=None)
@given(st.data())
def test_both_ways_agree_with_comparing_all_pairs(data: st.DataObject) -> None:
    N = data.draw(st.integers(0, 30))
    value = st.floats(width=16, allow_nan=False)
    scores = torch.tensor(data.draw(st.lists(value, min_size=N, max_size=N)), dtype=torch.float16)[:, None]
    labels = data.draw(st.lists(st.sampled_from([0.0, 1.0, NAN]), min_size=N, max_size=N))
    targets = torch.tensor(labels)[:, None]
    expected = auc_ref(scores[:, 0].float(), targets[:, 0])
    assert counted(scores, targets).compute().auc[0].item() == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert exact_auc(scores, targets)[0] == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_bf16_logits_of_usual_size_are_exact() -> None:
    generator = torch.Generator().manual_seed(3)
    scores = (torch.randn((3000, 4), generator=generator) * 5).to(torch.bfloat16)
    scores[scores.abs() < 2**-17] = 0
    targets = (torch.rand((3000, 4), generator=generator) < 0.2).float()
    assert counted(scores, targets).compute().auc.numpy() == pytest.approx(exact_auc(scores, targets), abs=1e-12)


def test_the_interval_is_reached_from_both_sides() -> None:
    """Two scores that fp16 cannot tell apart: their true order decides between the two ends."""
    close = torch.tensor([[1.0], [1.0001]])
    assert score_codes(close)[0] == score_codes(close)[1]
    for targets, exact in (([[0.0], [1.0]], 1.0), ([[1.0], [0.0]], 0.0)):
        counts = counted(close, torch.tensor(targets))
        low, high = counts.interval()
        assert (low.item(), high.item()) == (0.0, 1.0) and counts.compute().auc.item() == 0.5
        assert exact_auc(close, torch.tensor(targets))[0] == exact


def test_compiled_and_plain_pairs_are_the_same() -> None:
    generator = torch.Generator().manual_seed(4)
    targets = (torch.rand((500, 3), generator=generator) < 0.3).float()
    counts = counted(torch.randn((500, 3), generator=generator).round(decimals=1), targets)
    assert torch.equal(torch.ops.cxrfast.auc_pairs(counts.counts), count_pairs(counts.counts))


def test_a_billion_samples_do_not_overflow() -> None:
    counts = AucCounts(1)
    counts.counts[0, 0, 100] = counts.counts[0, 1, 200] = 3_000_000_000
    counts.counts[0, 1, 100] = 1_000_000_000
    result = counts.compute()
    assert result.auc.item() == pytest.approx(0.75 + 0.125, abs=1e-12) and int(result.n_pos) == 4_000_000_000


@pytest.mark.films
def test_the_oracle(data: Path) -> None:
    """22,433 x 14 real predictions: the exact path to 1e-12; counted, inside the interval and within 1e-4."""
    table = read_metadata(data / "nih" / "metadata" / "Data_Entry_2017_v2020.csv").table.set_index("file")
    predictions = pd.read_csv(data / "auc_oracle" / "preds.csv").set_index("Image Index")
    published = pd.read_csv(data / "auc_oracle" / "aucs.csv").set_index("label")["auc"].loc[list(CLASSES)].to_numpy()
    scores = predictions[[f"prob_{name}" for name in CLASSES]].to_numpy()
    targets = table.loc[predictions.index, list(CLASSES)].to_numpy(dtype=np.float64)
    assert np.abs(exact_auc(scores, targets) - published).max() <= 1e-12
    for dtype in (torch.float64, torch.float32):
        result = counted(torch.tensor(scores).to(dtype), torch.tensor(targets)).compute()
        assert (result.low.numpy() <= published).all() and (published <= result.high.numpy()).all()
        assert np.abs(result.auc.numpy() - published).max() <= 1e-4
        assert float((result.high - result.low).max()) <= 1e-3


# ---- NaN scores ----


def test_a_nan_score_is_an_error_that_names_the_class() -> None:
    scores = torch.tensor([[1.0, NAN], [2.0, -NAN], [3.0, 3.0]])
    targets = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    counts = AucCounts(2, names=["Mass", "Hernia"])
    counts.update(scores, targets)
    for use in (counts.compute, counts.interval, lambda: counts.roc(1)):
        with pytest.raises(InputError, match=r"Hernia \(2\)"):
            use()
    assert len(counts.roc(0).fpr) == 4  # the other class has its curve
    with pytest.raises(InputError, match="class 1"):
        exact_auc(scores, targets)
    targets[:2, 1] = NAN  # unknown: nobody's score
    counts.reset()
    counts.update(scores, targets)
    assert counts.compute().n_pos.tolist() == [2, 1]


# ---- merging, state ----


@settings(max_examples=20, deadline=None)  # an example moves 14 MB of counters
@given(st.permutations(range(5)), st.integers(0, 100))
def test_merging_in_any_order_gives_the_same_bits(order: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = []
    whole = AucCounts(2)
    for _ in range(5):
        scores = torch.randn((11, 2), generator=generator)
        targets = (torch.rand((11, 2), generator=generator) < 0.5).float()
        parts.append(counted(scores, targets))
        whole.update(scores, targets)
    merged = AucCounts(2)
    for number in order:
        merged.merge(parts[number])
    assert torch.equal(merged.counts, whole.counts)
    ours, theirs = merged.compute(), whole.compute()
    for name in ("auc", "low", "high"):
        assert torch.equal(getattr(ours, name).nan_to_num(9), getattr(theirs, name).nan_to_num(9))


def test_state_comes_back() -> None:
    counts = counted(torch.randn(50, 3), (torch.rand(50, 3) < 0.5).float())
    other = AucCounts(3)
    other.load_state_dict(counts.state_dict())
    assert torch.equal(other.counts, counts.counts) and other.counts is not counts.counts
    tensor = counts.counts
    counts.reset()
    assert counts.counts is tensor and int(tensor.sum()) == 0 and int(other.counts.sum()) == 150
    with pytest.raises(InputError, match=r"counts must be int64 \(4, 2, 65536\)"):
        AucCounts(4).load_state_dict(other.state_dict())


def test_wrong_input_is_said() -> None:
    counts = AucCounts(3)
    for logits, targets, said in (
        (torch.zeros(4, 2), torch.zeros(4, 2), "2 classes"),
        (torch.zeros(4, 3), torch.zeros(3, 3), r"targets must be \(4, 3\)"),
        (torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3), "floating"),
        (torch.zeros(3), torch.zeros(3), r"\(N, C\)"),
        (torch.zeros(4, 3, device="meta"), torch.zeros(4, 3, device="meta"), "one device"),
    ):
        with pytest.raises(InputError, match=said):
            counts.update(logits, targets)
    with pytest.raises(InputError, match="do not merge"):
        counts.merge(AucCounts(2))
    with pytest.raises(InputError, match="3 classes, but 2 names"):
        AucCounts(3, names=["a", "b"])
    with pytest.raises(InputError, match="at least one class"):
        AucCounts(0)
    with pytest.raises(InputError, match="alike"):
        exact_auc(np.zeros((4, 3)), np.zeros((4, 2)))
    assert int(counts.counts.sum()) == 0


# ---- ROC ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_roc_curve_bounds_the_auc(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    targets = (torch.rand((2000, 2), generator=generator) < 0.3).float()
    scores = (torch.randn((2000, 2), generator=generator) + targets).to(dtype)
    counts = counted(scores, targets)
    auc = counts.compute().auc[1].item()
    curve = counts.roc(1)
    assert torch.trapezoid(curve.tpr, curve.fpr).item() == pytest.approx(auc, abs=1e-12)
    every = {(x, y) for x, y in zip(curve.fpr.tolist(), curve.tpr.tolist(), strict=True)}
    # A point is what its threshold says.
    middle = len(curve.threshold) // 2
    passed = score_codes(scores[:, 1]) >= score_codes(curve.threshold[middle : middle + 1])
    assert curve.tpr[middle] == passed[targets[:, 1] == 1].double().mean()
    assert curve.fpr[middle] == passed[targets[:, 1] == 0].double().mean()
    for points in (2, 3, 10, 100, 10**6):
        short = counts.roc(1, points)
        corners = list(zip(short.fpr.tolist(), short.tpr.tolist(), strict=True))
        assert len(corners) <= points and corners[0] == (0.0, 0.0) and corners[-1] == (1.0, 1.0)
        assert set(corners) <= every
        assert all(a <= c and b <= d for (a, b), (c, d) in itertools.pairwise(corners))
    assert torch.trapezoid(counts.roc(1, 100).tpr, counts.roc(1, 100).fpr).item() == pytest.approx(auc, abs=5e-3)


def test_the_roc_curve_of_wrong_or_no_class() -> None:
    counts = counted(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [1.0]]))
    assert counts.roc(0).fpr.isnan().all() and counts.roc(0).tpr.tolist() == [0.0, 0.5, 1.0]
    assert len(AucCounts(1).roc(0).fpr) == 1
    for arguments, said in (((1,), "no class 1"), ((0, 1), "at least 2 points")):
        with pytest.raises(InputError, match=said):
            counts.roc(*arguments)
