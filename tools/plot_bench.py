"""The plot and the README's table of benchmarks/bench_decode.py: python tools/plot_bench.py RUN.json PLOT.png

Reads what ``pytest --benchmark-json`` wrote. The table goes to stdout, in Markdown.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"prepare": "#4c72b0", "decode only": "#9aa7c7", "inflate only": "#c9cedd"}
OURS = "#c44e52"


def read_run(path: Path) -> dict[str, Any]:
    """The extra_info of the benchmark that compares with Pillow."""
    for benchmark in json.loads(path.read_text())["benchmarks"]:
        if "results" in benchmark["extra_info"]:
            return benchmark["extra_info"]
    raise SystemExit(f"{path} holds no run of benchmarks/bench_decode.py")


def plot(run: dict[str, Any], target: Path) -> None:
    """Bars of images/s, slowest first."""
    rows = sorted(run["results"].items(), key=lambda row: -row[1]["ms_per_film"])
    figure, axes = plt.subplots(figsize=(8, 0.36 * len(rows) + 1.2), layout="constrained")
    for place, (name, row) in enumerate(rows):
        label = name if row["does"] == "prepare" else f"{name} ({row['does']})"
        rate = 1e3 / row["ms_per_film"]
        axes.barh(label, rate, color=OURS if name.startswith("cxrfast") else COLOURS[row["does"]])
        axes.text(rate, place, f" {rate:.0f}  ({row['times_pillow']:.1f} × Pillow)", va="center", fontsize=8)
    axes.set_xlabel(
        f"films a second, one thread (higher is better): 1024² PNG to {run['size']}²\n{run['cpu']}", fontsize=9
    )
    axes.set_xlim(right=1.3 * max(1e3 / row["ms_per_film"] for _, row in rows))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=160)


def table(run: dict[str, Any]) -> str:
    """Markdown, slowest first."""
    lines = ["| one thread | does | ms a film | × Pillow (range) |", "|---|---|--:|--:|"]
    for name, row in sorted(run["results"].items(), key=lambda row: -row[1]["ms_per_film"]):
        low, high = row["times_pillow_range"]
        lines.append(
            f"| {name} {row['version']} | {row['does']} | {row['ms_per_film']:.2f} "
            f"| {row['times_pillow']:.1f} ({low:.1f}–{high:.1f}) |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python tools/plot_bench.py RUN.json PLOT.png")
    finished = read_run(Path(sys.argv[1]))
    plot(finished, Path(sys.argv[2]))
    print(table(finished))
