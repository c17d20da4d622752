"""Evaluate trained runs: per-class AUC with its split, the paper's figures, the comparison with published systems.

    cxrfast-eval run/

With several runs they are also drawn side by side. A run whose weights or store do not fit is refused: no number is
printed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cxrfast.cli.common import run
from cxrfast.evaluate import EvalConfig, evaluate, format_scores, summary


def command(options: EvalConfig) -> tuple[int, dict[str, Any]]:
    scores, written = evaluate(options)
    for one in scores:
        print(format_scores(one), end="\n\n")
    for folder in dict.fromkeys(path.parent for path in written):
        names = [path.name for path in written if path.parent == folder and path.suffix != ".svg"]
        print(f"{folder}: {', '.join(names)}")
    return 0, {"runs": [summary(one) for one in scores], "files": [str(path) for path in written]}


def main(argv: Sequence[str] | None = None) -> int:
    return run(EvalConfig, command, prog="cxrfast-eval", description=__doc__, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
