"""Compiles the CUDA loss for each architecture and prints what ptxas says of its kernels: registers, spills.

Needs nvcc and torch's headers (a CPU-only torch does), no GPU. Exit code 0; 1 where a kernel spills or nvcc fails; 2
without nvcc.

    python tools/check_cuda.py            # sm_75 sm_80 sm_90
    python tools/check_cuda.py sm_120
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

SOURCE = Path(__file__).parents[1] / "csrc" / "loss" / "bce_auc_cuda.cu"
STABLE_ABI = "0x020a000000000000"


def ptxas_report(nvcc: str, arch: str) -> str:
    """Compile for ``arch`` and return what nvcc wrote; raises CalledProcessError where it fails."""
    torch = importlib.util.find_spec("torch")
    assert torch is not None and torch.origin is not None
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(nvcc, "-std=c++20", "-O3", "-fmad=false", "-Xcompiler=-fPIC", "-Xptxas=-v", f"-arch={arch}"),
            *(
                "-DUSE_CUDA",
                f"-DTORCH_TARGET_VERSION={STABLE_ABI}",
                "-isystem",
                str(Path(torch.origin).parent / "include"),
            ),
            *("-c", str(SOURCE), "-o", str(Path(folder, "loss.o"))),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"nvcc fails for {arch}:\n{done.stderr}")
    return done.stderr + done.stdout


def kernels(report: str) -> list[dict[str, object]]:
    """One row per kernel of a ptxas report: name, registers, bytes of stack, spill stores and spill loads."""
    pattern = (
        r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<spill_stores>\d+) bytes "
        r"spill stores, (?P<spill_loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers"
    )
    rows: list[dict[str, object]] = []
    for match in re.finditer(pattern, report, re.DOTALL):
        row: dict[str, object] = {key: int(value) for key, value in match.groupdict().items() if key != "name"}
        rows.append({"kernel": match["name"], **row})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Print one row per kernel and architecture, then one JSON object."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("check_cuda: there is no nvcc", file=sys.stderr)
        return 2
    archs = list(sys.argv[1:] if argv is None else argv) or ["sm_75", "sm_80", "sm_90"]
    rows = [{"arch": arch, **row} for arch in archs for row in kernels(ptxas_report(nvcc, arch))]
    for row in rows:
        print("  ".join(str(value) for value in row.values()))
    spilling = sum(bool(row["spill_stores"] or row["spill_loads"]) for row in rows)
    print(json.dumps({"kernels": len(rows), "spilling": spilling, "rows": rows}))
    return 1 if spilling or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
