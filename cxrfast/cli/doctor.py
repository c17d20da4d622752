"""Say what this machine has, which parts of cxrfast are ready, and what is missing for the rest.

cxrfast-doctor
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cxrfast.cli.common import run
from cxrfast.doctor import examine, report


@dataclass(frozen=True)
class DoctorConfig:
    """No options."""


def command(options: DoctorConfig) -> tuple[int, dict[str, Any]]:
    findings = examine()
    print(report(findings))
    return 0, findings


def main(argv: Sequence[str] | None = None) -> int:
    return run(DoctorConfig, command, prog="cxrfast-doctor", description=__doc__, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
