"""Compiles CUDA sources for each architecture and prints what ptxas says of their kernels: registers, spills.

Needs nvcc and torch's headers (a CPU-only torch does), no GPU. Exit code 0; 1 where a kernel spills or nvcc fails; 2
for wrong arguments and without nvcc.

    python tools/check_cuda.py loss                 # sm_75 sm_80 sm_90
    python tools/check_cuda.py block sm_120
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

CSRC = Path(__file__).parents[1] / "csrc"
SOURCES = {"loss": CSRC / "loss" / "bce_auc_cuda.cu", "block": CSRC / "block" / "block_cuda.cu"}
FLAGS = {"loss": ["-fmad=false"], "block": []}  # as in setup.py
STABLE_ABI = "0x020a000000000000"


def ptxas_report(nvcc: str, part: str, archs: Sequence[str]) -> str:
    """Compile a part of `SOURCES` for all of ``archs`` and return what nvcc wrote.

    Raises:
        SystemExit: nvcc's errors.
    """
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    with tempfile.TemporaryDirectory() as folder:
        headers = str(Path(torch.origin).parent / "include")
        command = [
            *(nvcc, "-std=c++20", "-O3", *FLAGS[part], "-Xcompiler=-fPIC", "-Xptxas=-v", "-DUSE_CUDA"),
            *(f"-gencode=arch={arch.replace('sm_', 'compute_')},code={arch}" for arch in archs),
            *(f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-isystem", headers),
            *("-c", str(SOURCES[part]), "-o", str(Path(folder, "part.o"))),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"nvcc fails:\n{done.stderr}")
    return done.stderr + done.stdout


def kernels(report: str) -> list[dict[str, object]]:
    """One row per kernel of a ptxas report: architecture, name, registers, bytes of stack and of spills."""
    pattern = (
        r"Compiling entry function '(?P<kernel>\w+)' for '(?P<arch>\w+)'.*?(?P<stack>\d+) bytes stack frame, "
        r"(?P<spill_stores>\d+) bytes spill stores, (?P<spill_loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers"
    )
    rows: list[dict[str, object]] = []
    for match in re.finditer(pattern, report, re.DOTALL):
        rows.append({key: int(value) if value.isdigit() else value for key, value in match.groupdict().items()})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Print one row per kernel and architecture, then one JSON object."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("check_cuda: there is no nvcc", file=sys.stderr)
        return 2
    part, *archs = list(sys.argv[1:] if argv is None else argv) or ["loss"]
    if part not in SOURCES:
        print(f"check_cuda: the first argument is one of {', '.join(SOURCES)}, not {part}", file=sys.stderr)
        return 2
    rows = kernels(ptxas_report(nvcc, part, archs or ["sm_75", "sm_80", "sm_90"]))
    for row in rows:
        print("  ".join(str(value) for value in row.values()))
    spilling = sum(bool(row["spill_stores"] or row["spill_loads"]) for row in rows)
    print(json.dumps({"kernels": len(rows), "spilling": spilling, "rows": rows}))
    return 1 if spilling or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
