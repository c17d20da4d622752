"""Write synthetic chest films in NIH ChestX-ray14's layout, CSV and file encoding.

Example: cxrfast-phantoms films --images 600 --seed 1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from cxrfast.cli.common import run


@dataclass(frozen=True)
class PhantomsConfig:
    """Which films to make, and where."""

    out: tyro.conf.Positional[Path]
    """Folder for the films (out/images), the CSV and the official lists. New, empty, or an unfinished set to finish."""
    images: int
    """Number of films."""
    seed: int
    """Everything about the set follows from it, 0 or more."""
    size: int = 1024
    """Side of a film in pixels. NIH's films have 1024."""
    workers: int | None = None
    """Processes that draw. As many as there are cores if not given."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return run(PhantomsConfig, _command, prog="cxrfast-phantoms", description=__doc__, argv=argv)


def _command(config: PhantomsConfig) -> tuple[int, dict[str, Any]]:
    from cxrfast.phantoms.generate import generate  # not above: the workers, which import this file, need no pandas

    result = generate(config.out, config.images, config.seed, config.size, config.workers)
    print(f"{result['images']} films of {result['patients']} patients are in {config.out}")
    return 0, result


if __name__ == "__main__":
    raise SystemExit(main())
