"""Time the training step on this machine and say what bounds it: input, memory or arithmetic.

cxrfast-bench --amp
cxrfast-bench STORE --model multimodal
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cxrfast.bench import BenchConfig, bench
from cxrfast.cli import common


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return common.run(
        BenchConfig,
        lambda config: (0, bench(config, say=lambda line: print(line, flush=True))),
        prog="cxrfast-bench",
        description=__doc__,
        argv=argv,
    )


if __name__ == "__main__":
    sys.exit(main())
