"""The danger: a damaged film that decodes to something. Real films are damaged in four ways; each must end in a typed
reason, or in exactly the image that libpng reads from the same bytes.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from png_files import chunks_of, idats, join

from cxrfast.decode import Code

native = pytest.importorskip("cxrfast.decode.native", reason="the compiled decoder is not installed")

Libpng = Callable[[bytes], tuple[int, np.ndarray]]
Damage = Callable[[np.random.Generator, list[bytes]], bytes]

ROUND = 250  # films damaged before they are decoded together: groups of three then mix good and bad ones


@pytest.fixture(scope="session")
def libpng(tmp_path_factory: pytest.TempPathFactory) -> Libpng:
    """libpng's verdict (0: read to the end) and its grey image of a 1024 x 1024 film, 8-bit grey or RGBA."""
    compiler = shutil.which("c++")
    library = tmp_path_factory.mktemp("libpng") / "liboracle.so"
    command = [compiler or "c++", "-O2", "-shared", "-fPIC", "-o", library]
    command += [Path(__file__).with_name("libpng_oracle.cpp"), "-lpng"]
    if not compiler or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("libpng's headers (Debian: libpng-dev) or a C++ compiler are absent")
    decode = ctypes.CDLL(str(library)).libpng_decode
    decode.argtypes = [ctypes.c_char_p, ctypes.c_size_t, *[ctypes.c_uint32] * 2, *[ctypes.c_int] * 2]
    decode.argtypes += [ctypes.c_void_p, ctypes.c_size_t]

    def read(file: bytes) -> tuple[int, np.ndarray]:
        color = file[25]
        channels = 4 if color == 6 else 1
        pixels = np.zeros((1024, 1024, channels), np.uint8)
        verdict = decode(file, len(file), 1024, 1024, color, 8, pixels.ctypes.data, 1024 * channels)
        weights = np.array([19595, 38470, 7471, 0])[:channels] if channels == 4 else np.array([65536])
        return verdict, ((pixels @ weights + 0x8000) >> 16).astype(np.uint8)

    return read


def flip_bits(rng: np.random.Generator, films: list[bytes]) -> bytes:
    """One to four bits anywhere in the file."""
    file = bytearray(films[rng.integers(len(films))])
    for _ in range(rng.integers(1, 5)):
        file[rng.integers(len(file))] ^= 1 << rng.integers(8)
    return bytes(file)


def splice(rng: np.random.Generator, films: list[bytes]) -> bytes:
    """The beginning of one film and the end of another, cut anywhere."""
    one, other = (films[i] for i in rng.integers(len(films), size=2))
    return one[: rng.integers(len(one))] + other[rng.integers(len(other)) :]


def damage_stream(rng: np.random.Generator, films: list[bytes]) -> bytes:
    """Flipped bits or spliced chunks under CRCs that are right again, so that inflate is what meets them."""
    parts, other = (chunks_of(films[i]) for i in rng.integers(len(films), size=2))
    data = [i for i, (name, _) in enumerate(parts) if name == b"IDAT"]
    if rng.integers(3) == 0:
        alien = [part for part in other if part[0] == b"IDAT"]
        parts[data[rng.integers(len(data))]] = alien[rng.integers(len(alien))]
    else:
        for _ in range(rng.integers(1, 4)):
            at = data[rng.integers(len(data))] if rng.integers(4) else data[0 if rng.integers(2) else -1]
            payload = bytearray(parts[at][1])
            near = len(payload) if rng.integers(2) else min(len(payload), 60)
            payload[rng.integers(near)] ^= 1 << rng.integers(8)
            parts[at] = (b"IDAT", bytes(payload))
    return join(parts)


def damage_rows(rng: np.random.Generator, films: list[bytes]) -> bytes:
    """Filtered rows with flipped bits, filter bytes above all, in a sound stream: often another image, not an error."""
    parts = chunks_of(films[rng.integers(len(films))])
    rows = bytearray(zlib.decompress(b"".join(data for name, data in parts if name == b"IDAT")))
    for _ in range(rng.integers(1, 4)):
        row = rng.integers(1024) * (len(rows) // 1024)
        rows[row + (0 if rng.integers(2) else rng.integers(len(rows) // 1024))] ^= 1 << rng.integers(8)
    nbytes = len(rows) if rng.integers(8) else len(rows) + int(rng.integers(-3, 4))
    rows = rows[:nbytes] + bytes(nbytes - len(rows[:nbytes]))
    return join([parts[0], *idats(zlib.compress(bytes(rows), 1)), (b"IEND", b"")])


@pytest.mark.films
@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "count"), [(flip_bits, 4000), (splice, 2000), (damage_stream, 3000), (damage_rows, 1000)]
)
def test_damaged_films(films: list[Path], libpng: Libpng, damage: Damage, count: int) -> None:
    files = [film.read_bytes() for film in films[::10]]
    files += [file for film in films if len(file := film.read_bytes()) and file[25] == 6]  # the RGBA ones
    rng = np.random.default_rng(count)
    ends = Counter[str]()
    with native.NativeDecoder(2) as decoder:
        for _ in range(count // ROUND):
            damaged = [damage(rng, files) for _ in range(ROUND)]
            decoded = decoder.decode_resize(damaged, 8)
            for file, status, image in zip(damaged, decoded.statuses, decoded.images, strict=True):
                ends[status.message or "ok"] += 1
                if not status.ok:
                    assert status.message
                    assert -1 <= status.offset <= len(file)
                    assert not image.any()
                    continue
                verdict, expected = libpng(file)
                assert verdict == 0
                whole_status, whole = decoder.decode(file)
                assert whole_status.ok
                assert np.array_equal(whole, expected)
    assert sum(ends.values()) == count
    if damage is damage_rows:
        assert ends["ok"] > count // 4  # otherwise the pixels of damaged films were hardly compared
    print(dict(ends))


@pytest.mark.films
def test_what_libpng_accepts_of_a_damaged_stream(films: list[Path], libpng: Libpng) -> None:
    """The other way round: a file that is refused though libpng reads it must have one of the known reasons."""
    files = [film.read_bytes() for film in films[::20]]
    rng = np.random.default_rng(3)
    stricter = Counter[str]()
    with native.NativeDecoder(1) as decoder:
        for damage in (flip_bits, damage_stream, damage_rows):
            for _ in range(100):
                file = damage(rng, files)
                status, _ = decoder.decode(file)
                if not status.ok and libpng(file)[0] == 0:
                    assert status.code == Code.CORRUPT
                    stricter[status.message] += 1
    assert set(stricter) <= {"too much image data", "Adler-32 mismatch"}
