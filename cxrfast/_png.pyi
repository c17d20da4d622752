"""The compiled decoder (csrc/png/bind.cpp). Private: use cxrfast.decode.native."""

import numpy as np
from numpy.typing import NDArray

_Status = tuple[int, str, int]  # Code, message, byte offset or -1

class Pool:
    def __init__(self, threads: int, max_pixels: int, max_memory_nbytes: int) -> None: ...
    def decode_resize(
        self, films: list[bytes | None], paths: list[bytes | None], out: NDArray[np.uint8]
    ) -> tuple[dict[int, _Status], NDArray[np.int64], NDArray[np.int64]]: ...
    def decode(self, film: bytes | None, path: bytes | None) -> tuple[_Status, NDArray[np.uint8] | None]: ...

def crc32(data: bytes | memoryview, /) -> int: ...  # zlib's
def cpu_isa() -> str: ...
def best_isa() -> str: ...
