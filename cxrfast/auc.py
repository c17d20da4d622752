"""Per-class ROC AUC: from integer counts while an epoch runs, and exactly from kept scores.

Promises: AUC = P(score of a positive > score of a negative) + P(equal) / 2 (Hanley & McNeil 1982). A class with one
label only is undefined: NaN here, `n/a` in print, never 0, and the macro average says over how many classes it is. NaN
scores are an error that names the class, never an AUC.

`AucCounts` keeps no scores, but one integer per class, label and order-preserving code (65,536 of them) of the score
rounded to fp16. Scores that fp16 holds keep their order and ties, so that the AUC is exact: all fp16 logits, and bf16
logits that are 0 or of magnitude 2^-17 to 65504. Any other score may tie with a near neighbour, and `low` and `high`
bound what that can change.
Left out: weights per sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cxrfast import loss_op
from cxrfast.errors import InputError

CODES = 1 << 16
# The code of fp16's canonical NaN. No number has it, so NaN scores are counted in this bin, apart from all others,
# and one tensor carries everything through an all-reduce.
NAN_CODE = CODES - 1


@dataclass(frozen=True)
class AucResult:
    """Per-class AUC of C classes, on the CPU.

    An entry is NaN where the class is undefined (it lacks positives or negatives).
    """

    auc: Tensor
    """float64 (C,): ties inside a bin count one half."""
    low: Tensor
    """float64 (C,): the exact AUC of the unrounded scores is not below this."""
    high: Tensor
    """float64 (C,): nor above this."""
    n_pos: Tensor
    """int64 (C,): samples with label 1."""
    n_neg: Tensor
    """int64 (C,): samples with label 0."""

    @property
    def defined(self) -> int:
        """The number of classes that have both labels."""
        return int(((self.n_pos > 0) & (self.n_neg > 0)).sum())

    @property
    def macro(self) -> float:
        """The mean over the defined classes; NaN when there is none. Print `defined` beside it."""
        return float(self.auc.nanmean())


@dataclass(frozen=True)
class RocCurve:
    """Points of one class's ROC curve, from (0, 0) to (1, 1). Undefined classes have NaN rates."""

    fpr: Tensor
    """float64 (points,): share of negatives that score at or above the threshold."""
    tpr: Tensor
    """float64 (points,): share of positives that score at or above the threshold."""
    threshold: Tensor
    """float64 (points,): falling scores (logits), fp16 values; the first is above all of them: infinity."""


def score_codes(scores: Tensor) -> Tensor:
    """Order-preserving 16-bit codes of the scores, rounded to fp16: a < b gives code(a) <= code(b).

    Args:
        scores: any floating dtype and shape.
    Returns:
        int32, same shape, in [0, 65535]. -0 and +0 share a code; every NaN has `NAN_CODE`.
    """
    half = scores.detach().to(torch.float16)
    bits = half.view(torch.int16).to(torch.int32) & 0xFFFF
    codes = torch.where(bits >= 0x8000, 0xFFFF - bits, bits + 0x8000)
    codes = torch.where(half == 0, 0x8000, codes)
    return torch.where(half.isnan(), NAN_CODE, codes)


def score_of_code(codes: Tensor) -> Tensor:
    """The fp16 score of each code, as float64; the inverse of `score_codes`."""
    codes = codes.to(torch.int32)
    bits = torch.where(codes >= 0x8000, codes - 0x8000, 0xFFFF - codes)
    return bits.to(torch.int16).view(torch.float16).to(torch.float64)


class AucCounts:
    """Counts of scores by class, label and code, from which AUC, its interval and ROC points follow.

    It replaces these lines, without keeping a score::

        scores.append(logits.detach().cpu()); labels.append(targets.cpu())               # every step
        [roc_auc_score(y, s) for s, y in zip(torch.cat(scores).T, torch.cat(labels).T)]  # every epoch

    Counts merge by addition: under DDP, `torch.distributed.all_reduce(counts.counts)` before `compute`.

    Args:
        num_classes: C.
        device: where the counts live; that of the logits avoids copies.
        names: the C classes' names, for error messages; their numbers by default.
    """

    counts: Tensor
    """int64 (C, 2, 65536): samples of class c with label y whose score has that code; NaN scores at the last code."""

    def __init__(
        self, num_classes: int, device: torch.device | str = "cpu", names: Sequence[str] | None = None
    ) -> None:
        if num_classes < 1:
            raise InputError(f"an AUC needs at least one class, not {num_classes}")
        if names is not None and len(names) != num_classes:
            raise InputError(f"{num_classes} classes, but {len(names)} names")
        self.names = [str(number) for number in range(num_classes)] if names is None else list(names)
        # NumPy asks for huge pages. A batch adds to counters all over the 14 MB of 14 classes; with small pages, their
        # addresses would be looked up anew each time.
        self.counts = torch.from_numpy(np.zeros((num_classes, 2, CODES), dtype=np.int64)).to(device)

    @property
    def num_classes(self) -> int:
        """C."""
        return self.counts.shape[0]

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch.

        Args:
            logits: floating (N, C), any strides. Any increasing score does: the AUC sees nothing but the order.
            targets: (N, C), any dtype: 1, 0, and everything else (NaN, -1) unknown, not counted.
        Raises:
            InputError: shapes that differ from each other or from C classes, or logits that are not floating.
        """
        check_batch(logits, targets, self)
        if loss_op.compiled_for(logits):
            loss_op.auc_count(logits, targets, self.counts)
        else:
            add_counts(logits, targets, self.counts)

    def merge(self, other: AucCounts) -> AucCounts:
        """Add the counts of ``other``, and return self. Any order of merges gives the same bits."""
        if other.num_classes != self.num_classes:
            raise InputError(f"counts of {other.num_classes} classes do not merge into {self.num_classes}")
        self.counts += other.counts.to(self.counts.device)
        return self

    def reset(self) -> None:
        """Forget every sample; the tensor stays the same one."""
        self.counts.zero_()

    def compute(self) -> AucResult:
        """AUC, interval and numbers of samples per class.

        The interval: a positive and a negative of one bin may truly be in either order, so the exact AUC differs from
        `auc` by at most half the share of such pairs, sum over bins of pos * neg / (P * N).

        Raises:
            InputError: a class has NaN scores; the message names it.
        """
        self._refuse_nan()
        if self.counts.is_cpu and "cpu" not in loss_op.MISSING:
            table = torch.ops.cxrfast.auc_pairs(self.counts)
        else:
            table = count_pairs(self.counts).cpu()
        won, tied, n_neg, n_pos = table.unbind(1)
        pairs = n_pos * n_neg
        low, auc, high = won / pairs, (won + tied / 2) / pairs, (won + tied) / pairs  # 0 / 0 is the NaN of undefined
        return AucResult(auc, low, high, n_pos.to(torch.int64), n_neg.to(torch.int64))

    def interval(self) -> tuple[Tensor, Tensor]:
        """(low, high) of `compute`: float64 (C,) each."""
        result = self.compute()
        return result.low, result.high

    def roc(self, class_index: int, points: int | None = None) -> RocCurve:
        """The ROC curve of one class.

        Args:
            class_index: in [0, C).
            points: at most so many, at least 2, evenly spread along the curve, each one a true point of it;
                all of them (one per bin in use) by default.
        Raises:
            InputError: no such class, fewer than 2 points, or NaN scores in that class.
        """
        if not 0 <= class_index < self.num_classes:
            raise InputError(f"there is no class {class_index} among {self.num_classes}")
        if points is not None and points < 2:
            raise InputError(f"a ROC curve needs at least 2 points, not {points}")
        self._refuse_nan(class_index)
        counts = self.counts[class_index].cpu()
        used = counts.sum(0).nonzero().flatten().flip(0)
        passed = counts[:, used].cumsum(1).to(torch.float64)
        rates = torch.nn.functional.pad(passed, (1, 0)) / counts.sum(1, keepdim=True)
        threshold = torch.nn.functional.pad(score_of_code(used), (1, 0), value=float("inf"))
        if points is not None and points < len(threshold):
            along = passed.sum(0) / passed[:, -1].sum()
            wanted = torch.linspace(0, 1, points, dtype=torch.float64)
            keep = torch.searchsorted(torch.nn.functional.pad(along, (1, 0)), wanted).unique()
            keep[-1] = len(threshold) - 1
            rates, threshold = rates[:, keep], threshold[keep]
        return RocCurve(fpr=rates[0], tpr=rates[1], threshold=threshold)

    def state_dict(self) -> dict[str, Tensor]:
        """The counts themselves (not a copy), for a checkpoint."""
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the counts of `state_dict`, onto the present device."""
        counts = state["counts"]
        if counts.shape != self.counts.shape or counts.dtype != torch.int64:
            raise InputError(
                f"counts must be int64 {tuple(self.counts.shape)}, got {counts.dtype} {tuple(counts.shape)}"
            )
        self.counts.copy_(counts)

    def _refuse_nan(self, class_index: int | None = None) -> None:
        nans = self.counts[:, :, NAN_CODE].sum(1).tolist()
        found = [c for c, count in enumerate(nans) if count and class_index in (None, c)]
        if found:
            listed = ", ".join(f"{self.names[c]} ({nans[c]})" for c in found)
            raise InputError(f"NaN scores in class {listed}: no AUC; training has diverged or an input was not finite")


def check_batch(logits: Tensor, targets: Tensor, counts: AucCounts | None) -> None:
    """The contract of a batch: floating (N, C) logits, targets of the same shape, counts of C classes."""
    if logits.dim() != 2 or not logits.is_floating_point():
        raise InputError(f"logits must be floating (N, C), got {logits.dtype} {tuple(logits.shape)}")
    if targets.shape != logits.shape:
        raise InputError(f"targets must be {tuple(logits.shape)} like the logits, got {tuple(targets.shape)}")
    if counts is not None and counts.num_classes != logits.shape[1]:
        raise InputError(f"logits have {logits.shape[1]} classes, the counts {counts.num_classes}")
    # Moving them would wait for the device at every step.
    devices = {logits.device, targets.device} | (set() if counts is None else {counts.counts.device})
    if len(devices) > 1:
        raise InputError(f"logits, targets and counts must be on one device, not {sorted(map(str, devices))}")


def add_counts(logits: Tensor, targets: Tensor, counts: Tensor) -> None:
    """Plain torch: add a checked batch to ``counts`` (C, 2, 65536) in place, without a host synchronisation."""
    positive = targets == 1
    known = positive | (targets == 0)
    rows = torch.arange(0, 2 * counts.shape[0], 2, device=counts.device)
    index = (rows + positive) * CODES + score_codes(logits)
    counts.view(-1).scatter_add_(0, index.flatten(), known.to(torch.int64).flatten())


def count_pairs(counts: Tensor) -> Tensor:
    """Plain torch: what the AUC needs from ``counts``.

    Returns:
        float64 (C, 4): pairs of a positive above a negative, pairs in one bin, negatives, positives. Float64 holds
        numbers of pairs exactly up to 2^53, and cannot overflow beyond.
    """
    neg, pos = counts.to(torch.float64).unbind(1)
    below = neg.cumsum(1) - neg
    return torch.stack([(pos * below).sum(1), (pos * neg).sum(1), neg.sum(1), pos.sum(1)], 1)


def exact_auc(scores: Any, targets: Any) -> np.ndarray | float:
    """AUC from the scores themselves, by sorting; ties count one half. For data sets that fit in memory.

    Args:
        scores: floating (N, C) or (N,): NumPy array or tensor; any increasing score (logit or probability).
        targets: same shape: 1, 0, and everything else unknown.
    Returns:
        float64 (C,), or a float for (N,); NaN where a class has one label only.
    Raises:
        InputError: shapes differ, or a known entry has a NaN score; the message names the class.
    """
    scores, targets = _to_numpy(scores), _to_numpy(targets)
    if scores.shape != targets.shape or scores.ndim not in (1, 2):
        raise InputError(f"scores and targets must be (N, C) or (N,) alike, got {scores.shape} and {targets.shape}")
    if scores.ndim == 1:
        return float(exact_auc(scores[:, None], targets[:, None])[0])  # type: ignore[index]
    result = np.full(scores.shape[1], np.nan)
    for c in range(scores.shape[1]):
        neg, pos = (np.sort(scores[targets[:, c] == label, c]) for label in (0, 1))
        if np.isnan(neg).any() or np.isnan(pos).any():
            raise InputError(f"NaN scores in class {c}: no AUC")
        if len(neg) and len(pos):
            won_twice = np.searchsorted(neg, pos, "left").sum() + np.searchsorted(neg, pos, "right").sum()
            result[c] = int(won_twice) / (2 * len(neg) * len(pos))
    return result


def _to_numpy(values: Any) -> np.ndarray:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values  # NumPy has no bf16
    return np.asarray(values)
