"""Train one of the paper's networks on a prepared store.

    cxrfast-train STORE RUN --model multimodal --amp
    cxrfast-train STORE RUN --resume

The defaults are the paper's recipe; tools/demo.sh has one for a few hundred small films on two cores.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

import tyro

from cxrfast.cli import common
from cxrfast.parallel import launch
from cxrfast.train import TrainConfig, recorded_config, train

PROG = "cxrfast-train"


class _Launched(Exception):
    """The processes that `launch` started have done the work and printed the result."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if int(os.environ.get("RANK", "0")) == 0:
        return _run(arguments)
    # Every process finds the same wrong input: the first one says it. What only this one knows is said below.
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = _run(arguments)
    if code not in (0, 2):
        sys.stderr.write(said.getvalue())
    return code


def _run(arguments: list[str]) -> int:
    def command(config: TrainConfig) -> tuple[int, dict[str, Any]]:
        if config.resume:  # parsed again over what the run was begun with, so that only what was given changes it
            config = tyro.cli(TrainConfig, prog=PROG, args=arguments, default=recorded_config(config))
        if config.devices != 1 and "RANK" not in os.environ:
            raise _Launched(launch("cxrfast.cli.train", arguments, config.devices))
        return 0, train(config, say=lambda line: print(line, flush=True))

    try:
        return common.run(TrainConfig, command, prog=PROG, description=__doc__, argv=arguments)
    except _Launched as done:
        return int(done.args[0])


if __name__ == "__main__":
    sys.exit(main())
