"""Figures and the comparison table: what an evaluation shows, drawn from numbers that it is given.

Promises: every figure is written as PNG and SVG, each as one step; the same numbers give the same bytes. Averages in
the table are recomputed from its rows, each system has its split beside it, and the paper's own errors are named.
Left out: computing any score (evaluate.py).
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from cxrfast.auc import RocCurve
from cxrfast.files import write_atomic
from cxrfast.nih import CLASSES, NO_FINDING

_PNG_DPI = 150
_COLORS = ("#1f5fa8", "#d1652b", "#3d8b57", "#8a5ba6")  # runs, in the order given; distinct in grey as well
_GREY = "#8c8c8c"
_THOUSANDS = "{x:,.0f}"


@dataclass(frozen=True)
class System:
    """A column of the comparison: one system's AUCs.

    Attributes:
        name: as printed.
        split: what it was measured on.
        auc: 14 values in ``CLASSES`` order; NaN = undefined.
    """

    name: str
    split: str
    auc: tuple[float, ...]

    @property
    def defined(self) -> int:
        return sum(not math.isnan(value) for value in self.auc)

    @property
    def average(self) -> float:
        """Mean over the defined classes; NaN when there is none."""
        return float(np.nanmean(self.auc)) if self.defined else math.nan


_OFFICIAL, _OWN, _UNSTATED = "official", "own, patient-wise", "not stated"

# The cells of the paper's Table 1, in CLASSES order. Its printed averages are not kept: they are recomputed.
PUBLISHED: tuple[System, ...] = tuple(
    System(name, split, tuple(value / 1000 for value in thousandths))
    for name, split, thousandths in (
        ("Yao", _OFFICIAL, (733, 856, 806, 673, 777, 724, 684, 805, 711, 806, 842, 743, 724, 775)),
        ("Wang", _OFFICIAL, (700, 810, 759, 661, 693, 669, 658, 799, 703, 805, 833, 786, 684, 872)),
        ("Shen", _UNSTATED, (766, 801, 797, 751, 760, 741, 778, 800, 787, 820, 773, 786, 759, 748)),
        ("Gündel", _OFFICIAL, (767, 883, 828, 709, 821, 758, 731, 846, 745, 835, 895, 818, 761, 896)),
        ("Yan", _OFFICIAL, (792, 881, 842, 710, 847, 811, 740, 876, 760, 848, 942, 833, 808, 934)),
        ("Baltruschat", _OFFICIAL, (763, 875, 822, 694, 820, 747, 714, 840, 749, 846, 895, 816, 763, 937)),
        ("Kufel", _OWN, (817, 911, 879, 716, 853, 771, 769, 898, 815, 908, 935, 824, 812, 890)),
        ("Rajpurkar", _OWN, (809, 925, 864, 735, 868, 780, 768, 889, 790, 888, 937, 805, 806, 916)),
        ("paper, multimodal", "paper", (772, 901, 854, 689, 767, 709, 714, 845, 792, 876, 868, 754, 758, 881)),
        ("paper, CNN", "paper", (761, 890, 842, 689, 751, 712, 709, 838, 783, 881, 859, 775, 758, 867)),
    )
)

PAPER_NOTES: tuple[str, ...] = (
    "Averages are recomputed from the 14 rows above them.",
    "The paper prints 0.727 as Baltruschat's average; its rows average 0.806.",
    "The paper prints 0.775 as Shen's average; its rows average 0.776, and its Fibrosis cell repeats Wang's.",
    "The official test set is a harder population than its training set (57 % AP views against 35 %): one and the same "
    "model scores 0.02 to 0.03 less there. Compare columns of the same split only.",
)


def comparison_table(runs: Sequence[System]) -> pd.DataFrame:
    """The paper's Table 1 with the runs as further columns.

    Returns:
        One column per system; rows: "Split" (str), the 14 classes, "Average" (over the defined classes) and
        "Classes" (how many those are).
    """
    systems = [*PUBLISHED, *runs]
    return pd.DataFrame(
        {s.name: [s.split, *s.auc, s.average, s.defined] for s in systems},
        index=["Split", *CLASSES, "Average", "Classes"],
        dtype=object,
    )


def comparison_markdown(table: pd.DataFrame, notes: Sequence[str]) -> str:
    """The table for people: three decimals, n/a for the undefined, the notes beneath."""
    lines = ["| AUC | " + " | ".join(table.columns) + " |", "|---" * (1 + len(table.columns)) + "|"]
    rows = table.to_dict("index")
    for row in ["Split", *CLASSES, "Average"]:
        cells = [
            value if isinstance(value, str) else _cell(value, int(table[system]["Classes"]) if row == "Average" else 14)
            for system, value in rows[row].items()
        ]
        lines.append(f"| {row.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes), ""])


def _cell(value: float, classes: int) -> str:
    if math.isnan(value):
        return "n/a"
    return f"{value:.3f}" + (f" ({classes} of 14)" if classes < 14 else "")


def labels_figure(table: pd.DataFrame) -> Figure:
    """The paper's Fig. 1: films per label, ``No Finding`` included; a film counts once for each of its findings."""
    findings = table[list(CLASSES)]
    counts = {name: int(findings[name].sum()) for name in CLASSES}
    counts[NO_FINDING] = int((findings == 0).all(axis=1).sum())
    names = sorted(counts, key=lambda name: counts[name])
    figure, axes = _axes((7.5, 4.8))
    bars = axes.barh(
        [name.replace("_", " ") for name in names],
        [counts[name] for name in names],
        color=[_GREY if name == NO_FINDING else _COLORS[0] for name in names],
    )
    axes.bar_label(bars, labels=[_count(counts[name], len(table)) for name in names], padding=3, fontsize=8)
    axes.set_xlim(right=max(1, *counts.values()) * 1.22)
    axes.set_xlabel("films")
    axes.xaxis.set_major_formatter(_THOUSANDS)
    axes.set_title(f"Labels of {len(table):,} films")
    return figure


def age_figure(table: pd.DataFrame) -> Figure:
    """The paper's Fig. 2: ages at the time of the film, in bins of five years."""
    ages = table["age"].dropna().to_numpy(np.float64)
    figure, axes = _axes((7.5, 4.0))
    axes.hist(ages, bins=list(range(0, 101, 5)), color=_COLORS[0], edgecolor="white", linewidth=0.6)
    unknown = len(table) - len(ages)
    axes.set_title(f"Age of {len(ages):,} films" + (f" ({unknown:,} unknown)" if unknown else ""))
    axes.set_xlabel("age, years")
    axes.set_ylabel("films")
    axes.yaxis.set_major_formatter(_THOUSANDS)
    axes.set_xlim(0, 100)
    return figure


def sex_figure(table: pd.DataFrame) -> Figure:
    """The paper's Fig. 3: films by sex."""
    return _categories(table["sex"], {"M": "male", "F": "female", "": "unknown"}, "Sex")


def view_figure(table: pd.DataFrame) -> Figure:
    """The paper's Fig. 4: films by view."""
    names = {"PA": "PA (back to front)", "AP": "AP (front to back)", "": "unknown"}
    return _categories(table["view"], names, "View")


def _categories(values: pd.Series, names: Mapping[str, str], what: str) -> Figure:
    counts = {name: int((values == code).sum()) for code, name in names.items()}
    counts = {name: count for name, count in counts.items() if count or name != "unknown"}
    figure, axes = _axes((5.0, 4.0))
    bars = axes.bar(list(counts), list(counts.values()), width=0.6, color=_COLORS[0])
    axes.bar_label(bars, labels=[_count(count, len(values)) for count in counts.values()], padding=2, fontsize=9)
    axes.set_ylim(top=max(1, *counts.values()) * 1.1)
    axes.set_ylabel("films")
    axes.yaxis.set_major_formatter(_THOUSANDS)
    axes.set_title(f"{what}, {len(values):,} films")
    return figure


def preparation_figure(
    names: Sequence[str], sources: Sequence[np.ndarray | None], prepared: np.ndarray, mean: float, std: float
) -> Figure:
    """The paper's Fig. 5: films before and after preparation, and as the network sees them.

    Args:
        names: N films.
        sources: grey originals, uint8 (H, W); None where the original is not to be had any more.
        prepared: uint8 (N, S, S).
        mean, std: of the training split, on the scale 0 to 255.
    """
    with_sources = any(source is not None for source in sources)
    columns = 3 if with_sources else 2
    figure = Figure(figsize=(3.3 * columns + 0.6, 3.3 * len(names)), layout="constrained")
    grid = figure.subplots(len(names), columns, squeeze=False)
    side = prepared.shape[1]
    for row, name in enumerate(names):
        axes = list(grid[row])
        if with_sources:
            source = sources[row]
            if source is not None:
                axes[0].imshow(source, cmap="gray", vmin=0, vmax=255)
                axes[0].set_title(f"{name}\noriginal, {source.shape[1]} × {source.shape[0]}", fontsize=9)
            else:
                axes[0].set_title(f"{name}\noriginal absent", fontsize=9)
            axes = axes[1:]
        axes[0].imshow(prepared[row], cmap="gray", vmin=0, vmax=255)
        axes[0].set_title(f"{'' if with_sources else name}\nprepared, {side} × {side}", fontsize=9)
        normalised = (prepared[row].astype(np.float32) - mean) / std
        shown = axes[1].imshow(normalised, cmap="gray", vmin=(0 - mean) / std, vmax=(255 - mean) / std)
        axes[1].set_title(f"normalised: (x − {mean:.1f}) / {std:.1f}", fontsize=9)
        figure.colorbar(shown, ax=axes[1], shrink=0.8, label="standard deviations")
        for one in grid[row]:
            one.set_axis_off()
    return figure


def roc_figure(runs: Sequence[tuple[str, Sequence[RocCurve], Sequence[float]]], split: str) -> Figure:
    """The paper's Fig. 6 and 7: ROC by class, one small panel a class, so that 14 curves stay apart.

    Args:
        runs: for each run its name, 14 curves and 14 AUCs (NaN = undefined).
        split: what the curves were measured on; stands in the title.
    """
    figure = Figure(figsize=(12.5, 8.2), layout="constrained")
    grid = figure.subplots(3, 5, sharex=True, sharey=True).flatten()
    for c, name in enumerate(CLASSES):
        axes: Axes = grid[c]
        axes.plot([0, 1], [0, 1], color=_GREY, linewidth=0.8, linestyle=":")
        for i, (_, curves, auc) in enumerate(runs):
            color = _COLORS[i % len(_COLORS)]
            if not math.isnan(auc[c]):
                axes.plot(curves[c].fpr.numpy(), curves[c].tpr.numpy(), color=color, linewidth=1.4)
            text = "n/a" if math.isnan(auc[c]) else f"{auc[c]:.3f}"
            axes.text(0.97, 0.05 + 0.1 * (len(runs) - 1 - i), text, color=color, ha="right", fontsize=10)
        axes.set_title(name.replace("_", " "), fontsize=10)
        axes.set_xlim(-0.01, 1.01)
        axes.set_ylim(-0.01, 1.01)
        axes.set_aspect("equal")
        axes.set_xticks([0, 0.5, 1])
        axes.set_yticks([0, 0.5, 1])
        axes.tick_params(labelsize=8, labelbottom=c >= 9)  # the legend, not a panel, is below the tenth
    legend: Axes = grid[-1]
    legend.set_axis_off()
    for i, (name, _, auc) in enumerate(runs):
        defined = [value for value in auc if not math.isnan(value)]
        average = f"{np.mean(defined):.3f} over {len(defined)} of 14" if defined else "n/a"
        legend.plot([], [], color=_COLORS[i % len(_COLORS)], label=f"{name}\nmacro AUC {average}")
    legend.plot([], [], color=_GREY, linewidth=0.8, linestyle=":", label="chance")
    legend.legend(loc="center", frameon=False, fontsize=9)
    figure.suptitle(f"ROC by class, split {split}", fontsize=12)
    figure.supxlabel("false positive rate", fontsize=10)
    figure.supylabel("true positive rate", fontsize=10)
    return figure


def training_figure(epochs: Sequence[Mapping[str, Any]], name: str, split: str) -> Figure:
    """The paper's Fig. 8 and 9: train and test loss by epoch, and the macro AUC beside them.

    Args:
        epochs: one mapping an epoch with epoch, train_loss, test_loss, train_macro_auc, test_macro_auc; None or NaN =
            undefined.
    """
    figure = Figure(figsize=(10.0, 4.0), layout="constrained")
    for axes, quantity, title in zip(
        figure.subplots(1, 2), ("loss", "macro_auc"), ("Weighted BCE loss", "Macro AUC"), strict=True
    ):
        for i, side in enumerate(("train", "test")):
            points = [(e["epoch"], e[f"{side}_{quantity}"]) for e in epochs]
            known = [(x, y) for x, y in points if y is not None and math.isfinite(y)]
            axes.plot(*zip(*known, strict=True) if known else ([], []), color=_COLORS[i], label=side, marker=".")
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False)
        axes.grid(alpha=0.25)
        _plain(axes)
    figure.suptitle(f"{name}, split {split}", fontsize=11)
    return figure


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``name.png`` and ``name.svg`` into the folder; the same figure gives the same bytes."""
    FigureCanvasAgg(figure)
    paths = []
    # Without a salt and with a date, ids and header of an SVG would differ from run to run.
    with matplotlib.rc_context({"svg.hashsalt": "cxrfast", "svg.fonttype": "path"}):
        for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=suffix, dpi=_PNG_DPI, metadata=metadata)
            write_atomic(folder / f"{name}.{suffix}", buffer.getvalue())
            paths.append(folder / f"{name}.{suffix}")
    return paths


def _axes(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    _plain(axes)
    return figure, axes


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _count(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / total:.1f} %)" if total else "0"
