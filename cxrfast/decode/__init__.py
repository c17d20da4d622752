"""Film bytes to prepared images: one interface, several backends.

Every backend is a ``Decoder``: films (bytes or paths) in; ``Decoded`` out. The pixel rule of a backend stands in the
store's manifest, and stores of different rules do not mix. This package never imports torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, Protocol

import numpy as np

Film = bytes | str | Path

PIXEL_RULE = "pillow-bilinear"
"""``convert("L")`` (16-bit samples: the high byte), then ``resize((S, S), BILINEAR)`` of Pillow 13, bit for bit.

The horizontal pass comes first, but for films whose height shrinks more than twice as far as their width.
"""

MIN_SIZE, MAX_SIZE = 8, 1024
"""The sizes S that a film can be prepared at, in pixels."""

MAX_PIXELS = 1 << 26
"""The most pixels that a film may declare (8192 × 8192; the largest NIH original has 18 million). Beyond: too large."""

MAX_SIDE = 1 << 16
"""The longest side that a film may declare, in pixels."""


class Code(IntEnum):
    """How the decoding of one film ended."""

    OK = 0
    CORRUPT = 1  # the file is broken: it says where and how
    UNSUPPORTED = 2  # the file is not PNG, or valid PNG that this backend leaves to Pillow
    TOO_LARGE = 3  # a limit was reached before anything was allocated


@dataclass(frozen=True)
class Status:
    """The end of one film: its code, one clause that says what is wrong, and the byte at which it was seen (or -1)."""

    code: Code = Code.OK
    message: str = ""
    offset: int = -1

    @property
    def ok(self) -> bool:
        return self.code == Code.OK

    def __str__(self) -> str:
        if self.ok:
            return "ok"
        where = f" at byte {self.offset}" if self.offset >= 0 else ""
        return f"{self.code.name.lower()}: {self.message}{where}"


class Decoded(NamedTuple):
    """A decoded batch of N films."""

    images: np.ndarray  # uint8 (N, S, S); a row whose status is not ok is all zeros
    statuses: list[Status]  # N
    pixel_sum: np.ndarray  # int64 (N,), sum of the row's pixels; 0 where not ok
    pixel_sumsq: np.ndarray  # int64 (N,), sum of their squares


class Decoder(Protocol):
    """What prep asks of a backend. Used as a context manager."""

    name: str
    pixel_rule: str
    calls: int  # calls that may be under way at once, each from a thread of its own
    batch_films: int  # films to give to one call: enough to keep its workers busy, few enough to show progress

    def decode_resize(self, films: Sequence[Film], size: int, out: np.ndarray | None = None) -> Decoded:
        """Decode N films to grey and resize them to (size, size). A bad film never raises: its status says why.

        Args:
            films: N PNG files, as bytes or as paths.
            size: S, the side of the prepared image in pixels.
            out: uint8 (N, S, S), C-contiguous, written in place and returned as ``images``; made when absent.
        """
        ...

    def __enter__(self) -> Decoder: ...

    def __exit__(self, *exc: object) -> None: ...


def decode(film: Film) -> np.ndarray:
    """The grey image of one PNG film at its own size, as Pillow's ``convert("L")`` has it (16 bits: the high byte).

    Also to be had as ``cxrfast.decode(film)``.

    Args:
        film: the PNG file, as bytes or as a path.
    Returns:
        uint8 (H, W).
    Raises:
        InputError: the film is broken, not PNG or beyond a limit; the message says which, why and at what byte.
    """
    from cxrfast.decode.native import decode_or_raise

    return decode_or_raise(film)


class _CallablePackage(ModuleType):
    """``cxrfast.decode`` names this package; called, it is the function above."""

    def __call__(self, film: Film) -> np.ndarray:
        return decode(film)


sys.modules[__name__].__class__ = _CallablePackage
