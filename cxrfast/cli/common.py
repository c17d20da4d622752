"""What every command shares (DESIGN: Commands).

Options come from a frozen dataclass (tyro), progress goes to stderr, results to stdout, and the last line of stdout is
one JSON object. Exit codes: 0 done; 1 done, but --strict found something; 2 wrong input or usage; 3 resource.
"""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from cxrfast.errors import InputError, ResourceError

Options = TypeVar("Options")

_RESOURCE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM, errno.EMFILE, errno.EIO}


def run(
    options_type: type[Options],
    command: Callable[[Options], tuple[int, dict[str, Any]]],
    *,
    prog: str,
    description: str | None = None,
    argv: Sequence[str] | None = None,
) -> int:
    """Parse ``argv``, call ``command(options) -> (exit code, result)``, print the result as the last line.

    Returns the exit code; every expected failure becomes one sentence on stderr.
    """
    try:
        options = tyro.cli(options_type, prog=prog, description=description, args=argv)
    except SystemExit as stop:  # tyro has printed the usage; --help exits with 0
        return int(stop.code or 0) if not isinstance(stop.code, str) else 2
    try:
        code, result = command(options)
    except InputError as error:
        return _fail(prog, str(error), 2)
    except ResourceError as error:
        return _fail(prog, str(error), 3)
    except MemoryError:
        return _fail(prog, "memory ran out; repeat the command with less at a time to go on", 3)
    except OSError as error:
        resource = error.errno in _RESOURCE_ERRNOS
        hint = "free some and repeat the command to go on" if resource else "check the path and its permissions"
        where = f" ({error.filename})" if error.filename else ""
        return _fail(prog, f"{error.strerror or error}{where}; {hint}", 3 if resource else 2)
    except KeyboardInterrupt:
        return _fail(prog, "interrupted; the same command goes on from here", 130)
    print(json.dumps(result, allow_nan=False), flush=True)
    return code


def _fail(prog: str, sentence: str, code: int) -> int:
    print(f"{prog}: {sentence}", file=sys.stderr, flush=True)
    return code
