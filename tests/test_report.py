"""report.py. The danger: a table that repeats others' errors, or a figure whose caption is of other numbers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from cxrfast import report
from cxrfast.auc import AucCounts
from cxrfast.nih import CLASSES

# The averages as the paper prints them (its Table 1); two of them are wrong.
PRINTED = {
    "Yao": 0.761,
    "Wang": 0.745,
    "Shen": 0.775,
    "Gündel": 0.807,
    "Yan": 0.830,
    "Baltruschat": 0.727,
    "Kufel": 0.843,
    "Rajpurkar": 0.841,
    "paper, multimodal": 0.799,
    "paper, CNN": 0.794,
}


@pytest.fixture
def table() -> pd.DataFrame:
    """Four films with 1, 2, 0 and unknown findings."""
    table = pd.DataFrame(
        {"age": [10.0, 52.0, np.nan, 99.9], "sex": ["M", "F", "", "M"], "view": ["PA", "AP", "PA", "PA"]}
    )
    table[list(CLASSES)] = np.zeros((4, 14), np.float32)
    table.loc[0, "Mass"] = 1
    table.loc[1, ["Mass", "Hernia"]] = 1
    table.loc[3, list(CLASSES)] = np.nan
    return table


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for axes in figure.axes for text in (*axes.texts, axes.title)) + "\n".join(
        text.get_text() for text in figure.texts
    )


def test_published_averages_are_the_papers_but_for_its_two_errors() -> None:
    found = {system.name: round(system.average, 3) for system in report.PUBLISHED}
    assert {name for name in PRINTED if found[name] != PRINTED[name]} == {"Baltruschat", "Shen"}
    assert (found["Baltruschat"], found["Shen"]) == (0.806, 0.776)
    fibrosis = CLASSES.index("Fibrosis")
    shen, wang = (next(s for s in report.PUBLISHED if s.name == name) for name in ("Shen", "Wang"))
    assert shen.auc[fibrosis] == wang.auc[fibrosis]


def test_every_system_has_its_split() -> None:
    splits = {system.name: system.split for system in report.PUBLISHED}
    assert {name for name, split in splits.items() if split == "official"} == {
        "Yao",
        "Wang",
        "Gündel",
        "Yan",
        "Baltruschat",
    }
    assert {name for name, split in splits.items() if split.startswith("own")} == {"Kufel", "Rajpurkar"}
    assert all(len(system.auc) == 14 for system in report.PUBLISHED)


def test_table_keeps_the_undefined_apart() -> None:
    run = report.System("mine", "paper (0123)", (math.nan, *[0.75] * 13))
    nothing = report.System("nothing", "paper (0123)", (math.nan,) * 14)
    table = report.comparison_table([run, nothing])
    assert list(table.index) == ["Split", *CLASSES, "Average", "Classes"]
    assert (table["mine"]["Average"], table["mine"]["Classes"]) == (0.75, 13)
    assert math.isnan(table["nothing"]["Average"])
    text = report.comparison_markdown(table, ["a note"])
    rows = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in text.splitlines()[:18]}
    assert rows["AUC"][-2:] == ["mine", "nothing"]
    assert rows["Split"][0] == "official" and rows["Split"][-2] == "paper (0123)"
    assert rows["Atelectasis"][-2:] == ["n/a", "n/a"] and rows["Pleural Thickening"][-2:] == ["0.750", "n/a"]
    assert rows["Average"][-2:] == ["0.750 (13 of 14)", "n/a"]
    assert rows["Average"][5] == "0.806"
    assert text.endswith("- a note\n")


def test_labels_figure_counts_each_finding_and_unknown_is_no_finding_neither(table: pd.DataFrame) -> None:
    figure = report.labels_figure(table)
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert len(names) == 15
    counts = dict(zip(names, widths, strict=True))
    assert (counts["Mass"], counts["Hernia"], counts["No Finding"], counts["Edema"]) == (2, 1, 1, 0)


def test_age_figure_says_how_many_are_unknown(table: pd.DataFrame) -> None:
    figure = report.age_figure(table)
    assert sum(bar.get_height() for bar in figure.axes[0].patches) == 3
    assert "(1 unknown)" in texts(figure)


def test_sex_and_view_figures(table: pd.DataFrame) -> None:
    assert [bar.get_height() for bar in report.sex_figure(table).axes[0].patches] == [2, 1, 1]
    view = report.view_figure(table)
    assert [bar.get_height() for bar in view.axes[0].patches] == [3, 1]
    assert "3 (75.0 %)" in texts(view)


def test_roc_figure_prints_na_for_the_undefined() -> None:
    counts = AucCounts(14)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 14, generator=generator)
    targets = (torch.rand(50, 14, generator=generator) < 0.5).float()
    targets[:, 3] = 0
    counts.update(logits, targets)
    auc = counts.compute().auc.tolist()
    figure = report.roc_figure([("run", [counts.roc(c, 100) for c in range(14)], auc)], "paper (0123)")
    panels = {axes.get_title(): axes for axes in figure.axes}
    assert [text.get_text() for text in panels["Infiltration"].texts] == ["n/a"]
    assert [text.get_text() for text in panels["Mass"].texts] == [f"{auc[4]:.3f}"]
    assert len(panels["Infiltration"].lines) == 1 and len(panels["Mass"].lines) == 2
    curve = panels["Mass"].lines[1].get_xydata()
    assert curve[0].tolist() == [0, 0] and curve[-1].tolist() == [1, 1]
    assert "paper (0123)" in texts(figure)
    assert "over 13 of 14" in str([t.get_text() for t in figure.axes[-1].get_legend().get_texts()])


def test_training_figure_leaves_gaps_for_the_undefined() -> None:
    epochs = [
        {"epoch": i, "train_loss": 1.0 / i, "test_loss": 1.1 / i, "train_macro_auc": 0.5, "test_macro_auc": value}
        for i, value in enumerate((None, 0.6, math.nan), start=1)
    ]
    figure = report.training_figure(epochs, "cnn", "paper (0123)")
    loss, macro = figure.axes
    assert [len(line.get_xdata()) for line in loss.lines] == [3, 3]
    assert [list(line.get_xdata()) for line in macro.lines] == [[1, 2, 3], [2]]
    assert report.training_figure([], "cnn", "paper (0123)").axes[0].lines[0].get_xdata().size == 0


def test_preparation_figure_with_and_without_originals() -> None:
    prepared = np.full((2, 8, 8), 100, np.uint8)
    original = np.full((32, 32), 100, np.uint8)
    both = report.preparation_figure(["a.png", "b.png"], [original, None], prepared, 50.0, 25.0)
    shown = [axes.images[0].get_array() for axes in both.axes if axes.images]
    assert len(shown) == 5 and shown[0].shape == (32, 32) and (shown[2] == 2.0).all()
    assert "original absent" in texts(both)
    without = report.preparation_figure(["a.png", "b.png"], [None, None], prepared, 50.0, 25.0)
    assert sum(bool(axes.images) for axes in without.axes) == 4
    assert "a.png" in texts(without)


def test_files_are_readable_and_the_same_twice(tmp_path: Path, table: pd.DataFrame) -> None:
    first = [path.read_bytes() for path in report.save_figure(report.sex_figure(table), tmp_path, "sex")]
    again = report.save_figure(report.sex_figure(table), tmp_path, "sex")
    assert [path.name for path in again] == ["sex.png", "sex.svg"] == sorted(p.name for p in tmp_path.iterdir())
    assert [path.read_bytes() for path in again] == first
    with Image.open(tmp_path / "sex.png") as image:
        image.load()
        assert image.width > 500
    assert "</svg>" in (tmp_path / "sex.svg").read_text()
