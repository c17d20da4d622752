"""Prepare a folder of films as a store.

    cxrfast-prep films/ store/ --csv Data_Entry_2017_v2020.csv

Films that cannot be used never stop the run: STORE/ledger.csv says what became of each. A run that was interrupted goes
on where it stopped when the same command is repeated.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from typing import Any

# Read when numpy is loaded: OpenBLAS's threads wait for work that never comes, on the cores that decode.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from cxrfast.cli.common import run
from cxrfast.prep import PrepConfig, prepare

gc.freeze()  # what was imported stays to the end: no collection need look at it


def command(options: PrepConfig) -> tuple[int, dict[str, Any]]:
    result = prepare(options)
    print(f"{result['store']}: {result['images']} images of {result['size']} x {result['size']}")
    for reason, count in result["rejected_by_reason"].items():
        print(f"  rejected, {reason}: {count}")
    return int(options.strict and result["rejected"] > 0), result


def main(argv: Sequence[str] | None = None) -> int:
    return run(PrepConfig, command, prog="cxrfast-prep", description=__doc__, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
