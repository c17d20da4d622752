"""The native decoder's dangers: pixels that differ from Pillow's, at some size, ISA level or grouping; a broken file
that gives an image, a crash or no reason; memory or time taken before a limit is looked at; a bad film that spoils its
batch.
"""

from __future__ import annotations

import multiprocessing
import os
import struct
import tempfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import pillow_resized
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from png_files import KINDS, chunk, chunks_of, filtered_rows, idats, ihdr, join, random_png

import cxrfast
from cxrfast.decode import Code, pillow
from cxrfast.errors import InputError

native = pytest.importorskip("cxrfast.decode.native", reason="the compiled decoder is not installed")

SIZES = [32, 64, 128, 224, 256, 320, 512, 1024]
SIDES = [1, 2, 7, 8, 9, 63, 64, 65, 127, 224, 257]


def prepared(grey: np.ndarray, size: int) -> np.ndarray:
    return pillow_resized(Image.fromarray(grey), size)


def assert_equal_to_pillow(files: list[bytes], sizes: list[int], threads: int = 1) -> None:
    """Whole images and prepared images are Pillow's, and so are the sums."""
    greys = []
    for file in files:
        status, grey = pillow.decode(file)
        assert grey is not None, status
        assert np.array_equal(cxrfast.decode(file), grey)
        greys.append(grey)
    for size in sizes:
        expected = np.stack([prepared(grey, size) for grey in greys])
        decoded = cxrfast.decode_resize(files, size, threads=threads)
        assert [str(status) for status in decoded.statuses] == ["ok"] * len(files)
        wrong = [row for row in range(len(files)) if not np.array_equal(decoded.images[row], expected[row])]
        assert wrong == []
        wide = expected.reshape(len(files), -1).astype(np.int64)
        assert np.array_equal(decoded.pixel_sum, wide.sum(1))
        assert np.array_equal(decoded.pixel_sumsq, (wide * wide).sum(1))


# ---- the pixels ----


@pytest.mark.films
@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_real_films(films: list[Path], real_greys: list[np.ndarray], isa: str, size: int) -> None:
    expected = np.stack([prepared(grey, size) for grey in real_greys])
    decoded = cxrfast.decode_resize(films, size)
    assert {str(status) for status in decoded.statuses} == {"ok"}
    assert np.array_equal(decoded.images, expected)
    assert np.array_equal(decoded.pixel_sum, expected.sum((1, 2), dtype=np.int64))
    assert np.array_equal(decoded.pixel_sumsq, np.square(expected, dtype=np.int64).sum((1, 2)))


@pytest.fixture(scope="module")
def real_greys(films: list[Path]) -> list[np.ndarray]:
    greys = [pillow.decode(film)[1] for film in films]
    assert all(grey is not None for grey in greys)
    return greys  # type: ignore[return-value]


@pytest.mark.films
def test_real_films_at_their_own_size(films: list[Path], isa: str) -> None:
    for film in films[:: 1 if isa == "avx512" else 6]:
        assert np.array_equal(cxrfast.decode(film), pillow.decode(film)[1]), film.name


@pytest.mark.films
def test_any_grouping_and_order_gives_the_same(films: list[Path], isa: str) -> None:
    rng = np.random.default_rng(0)
    files = [film.read_bytes() for film in [*films[:: len(films) // 9], films[-1]]]
    alone = np.concatenate([cxrfast.decode_resize([file], 64, threads=1).images for file in files])
    for threads in (1, 2, 5):
        for _ in range(3):
            order = rng.permutation(len(files))[: rng.integers(1, len(files) + 1)]
            decoded = cxrfast.decode_resize([files[i] for i in order], 64, threads=threads)
            assert np.array_equal(decoded.images, alone[order])


@pytest.mark.parametrize("interlace", [0, 1], ids=["rows", "adam7"])
@pytest.mark.parametrize(("color", "depth"), KINDS, ids=[f"color{color}-{depth}bit" for color, depth in KINDS])
def test_every_kind(isa: str, color: int, depth: int, interlace: int) -> None:
    rng = np.random.default_rng([color, depth, interlace])
    sides = [(1, 1), (1, 70), (70, 1), (2, 3), (8, 8), (9, 5), (63, 66), (64, 64), (65, 63), (131, 97)]
    files = [
        random_png(rng, width, height, color, depth, interlace, noise=noise)
        for width, height in sides
        for noise in (256, 12)
    ]
    assert_equal_to_pillow(files, [8, 33, 64])


@pytest.mark.parametrize(("color", "depth"), [(2, 8), (2, 16), (6, 8), (6, 16)])
def test_grey_in_colour_files(isa: str, color: int, depth: int) -> None:
    """NIH's RGBA films: R = G = B, so one plane is the image. One pixel of colour must end that, in the last of the
    rows that are taken a few at a time as in the first.
    """
    rng = np.random.default_rng([color, depth])
    files = []
    for width, height in [(1, 1), (17, 40), (129, 64), (250, 400)]:
        rows = filtered_rows(rng, width, height, color, depth, 0, equal_channels=True)
        files.append(join([ihdr(width, height, color, depth), *idats(zlib.compress(rows)), (b"IEND", b"")]))
        row_nbytes, back = len(rows) // height, 2 * (depth // 8) * (2 if color == 6 else 1)
        for row in {0, height // 2, height - 1}:
            coloured = bytearray(rows)
            coloured[(row + 1) * row_nbytes - back] ^= 64  # high byte of the row's last pixel's G or B
            stream = zlib.compress(bytes(coloured))
            files.append(join([ihdr(width, height, color, depth), *idats(stream), (b"IEND", b"")]))
    assert_equal_to_pillow(files, [8, 32])


@pytest.mark.parametrize(("color", "depth"), [(0, 16), (4, 8), (4, 16), (2, 8), (6, 8), (6, 16)])
@pytest.mark.parametrize("where", ["filter", "checksum"])
def test_faults_in_films_of_several_planes(isa: str, color: int, depth: int, where: str) -> None:
    """They are taken a few rows at a time, too: what was taken before the fault leaves no trace."""
    rng = np.random.default_rng([color, depth])
    rows = bytearray(filtered_rows(rng, 300, 500, color, depth, 0, equal_channels=True))
    good = zlib.compress(bytes(rows))
    rows[len(rows) // 500 * 450] = 9
    bad = zlib.compress(bytes(rows)) if where == "filter" else good[:-4] + b"oops"
    files = [join([ihdr(300, 500, color, depth), *idats(stream), END]) for stream in (bad, good)]
    decoded = cxrfast.decode_resize(files, 64, threads=1)
    assert [status.code for status in decoded.statuses] == [Code.CORRUPT, Code.OK]
    assert decoded.statuses[0].message == ("bad row filter" if where == "filter" else "Adler-32 mismatch")
    assert not decoded.images[0].any()
    assert np.array_equal(decoded.images[1], prepared(pillow.decode(files[1])[1], 64))


@pytest.mark.parametrize("filters", [(0,), (1,), (2,), (3,), (4,), (3, 4), (0, 1, 2, 3, 4)], ids=str)
def test_filters_and_sides(isa: str, filters: tuple[int, ...]) -> None:
    rng = np.random.default_rng(len(filters) + filters[0])
    files = [
        random_png(rng, width, height, filters=filters, noise=int(rng.choice([3, 40, 256])), level=1)
        for width in SIDES
        for height in rng.choice(SIDES, 4)
    ]
    assert_equal_to_pillow(files, [32])


@pytest.mark.parametrize("side", [1023, 1024, 1025])
def test_sides_around_a_films(isa: str, side: int) -> None:
    rng = np.random.default_rng(side)
    files = [random_png(rng, side, other, noise=20, level=1) for other in (1, 1023, 1024, 1025)]
    files.append(random_png(rng, 1, side, noise=20))
    assert_equal_to_pillow(files, [224, 320])


def test_large_films_beside_small_ones_of_many_sizes(isa: str) -> None:
    """Rows of a large film are resampled while others begin and end: more sizes than the decoder remembers."""
    rng = np.random.default_rng(8)
    files = [random_png(rng, 40 + k, 90 - k, noise=20, level=1) for k in range(40)]
    for at, (width, height) in ((0, (900, 700)), (20, (700, 1100)), (20, (500, 2000))):
        files.insert(at, random_png(rng, width, height, noise=20))
    assert_equal_to_pillow(files, [64])


@pytest.mark.parametrize("size", SIZES)
def test_sizes_up_and_down(isa: str, size: int) -> None:
    rng = np.random.default_rng(size)
    sides = [(1, 1), (size, size), (size - 1, size + 1), (2 * size, size // 2), (300, 700)]
    assert_equal_to_pillow([random_png(rng, *side, noise=60, level=1) for side in sides], [size])


@settings(deadline=None, max_examples=150)
@given(
    width=st.integers(1, 300),
    height=st.integers(1, 300),
    kind=st.sampled_from(KINDS),
    interlace=st.integers(0, 1),
    noise=st.integers(1, 256),
    level=st.integers(0, 9),
    idat_nbytes=st.integers(1, 9000),
    size=st.integers(8, 350),
    seed=st.integers(0, 2**32),
)
def test_any_valid_file(
    width: int,
    height: int,
    kind: tuple[int, int],
    interlace: int,
    noise: int,
    level: int,
    idat_nbytes: int,
    size: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    file = random_png(rng, width, height, *kind, interlace, noise=noise, level=level, idat_nbytes=idat_nbytes)
    assert_equal_to_pillow([file], [size])


def test_high_byte_of_16_bits() -> None:
    """The one place where the rule is ours, not Pillow's: convert("L") of its mode I;16 would clip."""
    rows = b"\0" + struct.pack(">4H", 0x0000, 0x00FF, 0x1280, 0xFFFF)
    file = join([ihdr(4, 1, 0, 16), *idats(zlib.compress(rows)), (b"IEND", b"")])
    assert cxrfast.decode(file).tolist() == [[0x00, 0x00, 0x12, 0xFF]]


def test_alpha_and_transparency_are_dropped() -> None:
    head, data = ihdr(3, 1), idats(zlib.compress(b"\0\x05\x80\xff"))
    transparent = join([head, (b"tRNS", b"\0\x80"), *data, (b"IEND", b"")])
    assert cxrfast.decode(transparent).tolist() == [[5, 128, 255]]
    alpha = join([ihdr(2, 1, 4), *idats(zlib.compress(b"\0\x07\x00\x09\xff")), (b"IEND", b"")])
    assert cxrfast.decode(alpha).tolist() == [[7, 9]]


# ---- the interface ----


def test_paths_bytes_and_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    files = [random_png(rng, 40, 30) for _ in range(5)]
    for i, file in enumerate(files):
        (tmp_path / f"é {i}.png").write_bytes(file)
    paths = [tmp_path / f"é {i}.png" for i in range(5)]
    expected = np.stack([prepared(pillow.decode(file)[1], 16) for file in files])  # type: ignore[arg-type]
    out = np.full((5, 16, 16), 77, np.uint8)
    decoded = cxrfast.decode_resize([paths[0], str(paths[1]), files[2], bytearray(files[3]), paths[4]], 16, out)
    assert decoded.images is out
    assert np.array_equal(out, expected)
    assert np.array_equal(cxrfast.decode(paths[1]), pillow.decode(files[1])[1])
    assert cxrfast.decode_resize([], 16).images.shape == (0, 16, 16)


def test_a_bad_film_spoils_nothing_else(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    good = random_png(rng, 50, 60)
    expected = prepared(pillow.decode(good)[1], 24)  # type: ignore[arg-type]
    bad: list[tuple[bytes | Path, str]] = [
        (b"", "corrupt: empty file at byte 0"),
        (good[:100], "corrupt: truncated chunk at byte 33"),
        (b"\xff\xd8\xff\xe0 a JPEG", "unsupported: not a PNG file at byte 0"),
        (tmp_path / "absent.png", "corrupt: cannot be read (No such file or directory)"),
        (tmp_path, "corrupt: cannot be read (not a regular file)"),
        (
            join([ihdr(1 << 14, 1 << 14), (b"IDAT", b""), (b"IEND", b"")]),
            "too_large: more than the pixel limit at byte 8",
        ),
    ]
    for threads in (1, 2, 3):
        for position in range(4):
            films: list[bytes | Path] = [good] * 4
            for film, reason in bad:
                out = np.full((5, 24, 24), 9, np.uint8)
                decoded = cxrfast.decode_resize([*films[:position], film, *films[position:]], 24, out, threads)
                assert str(decoded.statuses[position]) == reason
                assert not decoded.images[position].any()
                assert decoded.pixel_sum[position] == decoded.pixel_sumsq[position] == 0
                for row in set(range(5)) - {position}:
                    assert decoded.statuses[row].ok
                    assert np.array_equal(decoded.images[row], expected)


def test_decode_raises_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "film.png").write_bytes(b"GIF89a")
    with pytest.raises(InputError, match=r"film\.png: unsupported: not a PNG file at byte 0"):
        cxrfast.decode(tmp_path / "film.png")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"size": 7}, "size=7 is out of range"),
        ({"size": 1025}, "size=1025 is out of range"),
        ({"threads": 0}, "threads=0: a decoder needs at least one"),
        ({"out": np.zeros((1, 16, 16), np.uint8)}, r"uint8 \(2, 16, 16\), got uint8 \(1, 16, 16\)"),
        ({"out": np.zeros((2, 16, 16), np.int16)}, "got int16"),
        ({"out": np.zeros((2, 16, 32), np.uint8)[:, :, ::2]}, "not contiguous"),
        ({"out": np.broadcast_to(np.zeros((2, 16, 16), np.uint8), (2, 16, 16))}, "read-only"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], sentence: str) -> None:
    film = random_png(np.random.default_rng(0), 8, 8)
    with pytest.raises(InputError, match=sentence):
        cxrfast.decode_resize([film, film], **({"size": 16} | arguments))  # type: ignore[arg-type]


def test_wrong_film_type_and_level(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="bytes or a path, got int"):
        cxrfast.decode_resize([3], 16)  # type: ignore[list-item]
    with pytest.raises(InputError, match="null character"):
        cxrfast.decode_resize(["a\0b"], 16)
    monkeypatch.setenv("CXRFAST_ISA", "sse9")
    with pytest.raises(InputError, match="CXRFAST_ISA=sse9 is not known"):
        cxrfast.decode_resize([], 16)


def test_calls_from_several_threads_share_a_pool(tmp_path: Path) -> None:
    """The pool goes on with the next call's films before one call's are done, also when these have another size."""
    rng = np.random.default_rng(8)
    files: list[bytes | Path] = [random_png(rng, 100 + i, 90, noise=30) for i in range(12)]
    files.insert(5, tmp_path / "absent.png")
    sizes = (48, 48, 33, 48)
    expected = {size: cxrfast.decode_resize(files, size, threads=1) for size in sizes}
    assert [row for row, status in enumerate(expected[48].statuses) if not status.ok] == [5]
    wrong: list[int] = []

    def call(i: int) -> None:
        for _ in range(10):
            decoded = cxrfast.decode_resize(files[i:], sizes[i], threads=2)
            if not np.array_equal(decoded.images, expected[sizes[i]].images[i:]):
                wrong.append(i)
            if decoded.statuses != expected[sizes[i]].statuses[i:]:
                wrong.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


def _sum_in_child(file: bytes, pool: native.NativeDecoder, queue: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    inherited = pool.decode_resize([file] * 7, 32)
    fresh = cxrfast.decode_resize([file] * 7, 32, threads=2)
    queue.put((int(inherited.pixel_sum.sum()), int(fresh.pixel_sum.sum())))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_decodes() -> None:
    """The pool's threads do not survive a fork; a data loader's workers must neither hang nor crash, at exit too."""
    file = random_png(np.random.default_rng(9), 60, 60)
    pool = native.NativeDecoder(2)
    expected = int(pool.decode_resize([file] * 7, 32).pixel_sum.sum())
    cxrfast.decode_resize([file], 32, threads=2)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_sum_in_child, args=(file, pool, queue))
    child.start()
    assert queue.get(timeout=60) == (expected, expected)
    child.join(60)
    assert child.exitcode == 0


# ---- broken files ----

GOOD = random_png(np.random.default_rng(1), 60, 50, noise=40, idat_nbytes=500)
STREAM = b"".join(data for name, data in chunks_of(GOOD) if name == b"IDAT")
ROWS = zlib.decompress(STREAM)
END = (b"IEND", b"")


def with_stream(stream: bytes) -> bytes:
    return join([ihdr(60, 50), *idats(stream, 500), END])


def with_crc_off(name: bytes) -> bytes:
    at = GOOD.index(name) + 4 + struct.unpack(">I", GOOD[GOOD.index(name) - 4 : GOOD.index(name)])[0]
    return GOOD[:at] + bytes([GOOD[at] ^ 1]) + GOOD[at + 1 :]


PALETTE = (b"PLTE", bytes(range(9)))
FLAT = idats(zlib.compress(b"\0\0\1\2" * 3))

BROKEN = {
    "corrupt: empty file at byte 0": b"",
    "corrupt: truncated chunk at byte 0": GOOD[:5],
    "corrupt: truncated chunk at byte 8": GOOD[:19],
    "corrupt: truncated chunk at byte 33": GOOD[:40],
    "corrupt: no IDAT chunk at byte 33": GOOD[:33],
    "corrupt: no IEND chunk at byte 545": GOOD[:545],
    "corrupt: truncated chunk at byte 33 ": GOOD[:33] + struct.pack(">I", 1 << 30) + GOOD[37:],
    "corrupt: invalid chunk length at byte 33": GOOD[:33] + b"\xff" + GOOD[34:],
    "corrupt: invalid chunk type at byte 33": GOOD[:37] + b"\x01" + GOOD[38:],
    "corrupt: CRC-32 mismatch in IHDR at byte 8": with_crc_off(b"IHDR"),
    "corrupt: CRC-32 mismatch in IDAT at byte 33": with_crc_off(b"IDAT"),
    "corrupt: CRC-32 mismatch in an unknown critical chunk at byte 33": GOOD.replace(b"IDAT", b"IDAU", 1),
    f"corrupt: CRC-32 mismatch in IEND at byte {len(GOOD) - 12}": GOOD[:-1] + b"\0",
    "unsupported: unknown critical chunk at byte 33": join([ihdr(3, 3), (b"NEWS", b"?"), *FLAT, END]),
    "unsupported: unknown critical chunk at byte 8": join([(b"CgBI", b"\0" * 4), ihdr(3, 3), *FLAT, END]),
    "unsupported: not a PNG file at byte 0": GOOD[1:],
    "corrupt: invalid IHDR at byte 8": join([(b"IDAT", b""), ihdr(3, 3), END]),
    "corrupt: chunk out of order at byte 33": join([ihdr(3, 3), ihdr(3, 3), *FLAT, END]),
    "corrupt: chunk out of order at byte 71": join(
        [ihdr(3, 3), (b"IDAT", STREAM[:7]), (b"tIME", b"\0" * 7), *FLAT, END]
    ),
    "corrupt: no PLTE chunk at byte 33": join([ihdr(3, 3, 3), *FLAT, PALETTE, END]),
    "corrupt: invalid PLTE at byte 33": join([ihdr(3, 3, 3), (b"PLTE", b"1234"), *FLAT, END]),
    "corrupt: CRC-32 mismatch in PLTE at byte 33": join([ihdr(3, 3, 3), PALETTE, *FLAT, END]).replace(
        chunk(*PALETTE)[-4:], b"\0\0\0\0"
    ),
    "corrupt: palette index out of range at byte 51": join([ihdr(3, 3, 3), (b"PLTE", b"123456"), *FLAT, END]),
    "corrupt: invalid zlib header at byte 41": with_stream(b"\x79" + STREAM[1:]),
    "corrupt: bad row filter at byte 33": with_stream(zlib.compress(ROWS[:61] + b"\5" + ROWS[62:])),
    "too_large: a side longer than the side limit at byte 8": join([ihdr(1 << 17, 1), *FLAT, END]),
    "too_large: more than the pixel limit at byte 8": join([ihdr(1 << 16, 1 << 16), *FLAT, END]),
}


@pytest.mark.parametrize(("reason", "file"), BROKEN.items(), ids=[reason.strip() for reason in BROKEN])
def test_reason_and_offset(reason: str, file: bytes, tmp_path: Path) -> None:
    (tmp_path / "film.png").write_bytes(file)
    decoded = cxrfast.decode_resize([file, tmp_path / "film.png"], 16, threads=1)
    assert [str(status) for status in decoded.statuses] == [reason.strip()] * 2
    assert not decoded.images.any()
    with pytest.raises(InputError, match=r"^(corrupt|unsupported|too_large): "):
        cxrfast.decode(file)


@pytest.mark.parametrize(
    ("message", "stream"),
    [
        ("Adler-32 mismatch", STREAM[:-1] + bytes([STREAM[-1] ^ 1])),
        ("image data ends early", STREAM[:-40]),
        ("image data ends early", STREAM[:-2]),
        ("image data ends early", zlib.compress(ROWS[:-1])),
        ("image data ends early", zlib.compress(ROWS[:1])),
        ("too much image data", zlib.compress(ROWS + b"\0")),
        ("too much image data", zlib.compress(bytes(1 << 24))),
        ("too much image data", STREAM + bytes(1 << 17)),
        ("invalid deflate block", b"\x78\x9c\x07" + STREAM[3:]),
    ],
)
def test_broken_streams(isa: str, message: str, stream: bytes, tmp_path: Path) -> None:
    film = with_stream(stream)
    (tmp_path / "film.png").write_bytes(film)
    decoded = cxrfast.decode_resize([film, GOOD, tmp_path / "film.png"], 16, threads=1)
    assert decoded.statuses[0].code == Code.CORRUPT
    assert decoded.statuses[0].message.startswith(message)
    assert decoded.statuses[0].offset >= 33
    assert decoded.statuses[1].ok
    assert decoded.statuses[2] == decoded.statuses[0]


def test_what_is_tolerated() -> None:
    """Accepted by libpng and Pillow alike: each of these is the image, not an error."""
    expected = cxrfast.decode(GOOD)
    ancillary = chunk(b"teXt", b"x")[:-1] + b"\xff"  # a wrong CRC where nothing is read
    assert np.array_equal(cxrfast.decode(GOOD[:33] + ancillary + GOOD[33:]), expected)
    assert np.array_equal(cxrfast.decode(GOOD + b"bytes behind the end"), expected)
    assert np.array_equal(cxrfast.decode(with_stream(STREAM + b"behind the checksum")), expected)
    empties = join([ihdr(60, 50), (b"IDAT", b""), *idats(STREAM, 1), (b"IDAT", b""), END])
    assert np.array_equal(cxrfast.decode(empties), expected)
    suggested = join([ihdr(60, 50, 0), (b"PLTE", b"123"), *idats(STREAM), END])
    assert np.array_equal(cxrfast.decode(suggested), expected)


@given(lengths=st.lists(st.sampled_from([0, 1, 7, 8, 12, 63, 64, 255, 256, 257, 700]), max_size=30), data=st.data())
@settings(max_examples=60, deadline=None)
def test_payloads_of_any_length_from_a_file(lengths: list[int], data: st.DataObject) -> None:
    """A file that the decoder read itself is joined in place. Image, reason and byte are those of a single payload."""
    rows = filtered_rows(np.random.default_rng(5), 70, 60, 0, 8, 0, noise=data.draw(st.sampled_from([2, 256])))
    stream = bytearray(zlib.compress(rows))
    if data.draw(st.booleans()):
        stream[data.draw(st.integers(0, len(stream) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    ends = [*np.cumsum(lengths, dtype=int), len(stream)]
    parts = [bytes(stream[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]
    film = join([ihdr(70, 60), *[(b"IDAT", part) for part in parts], END])
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        file.write(film)
        file.flush()
        whole = join([ihdr(70, 60), (b"IDAT", bytes(stream)), END])
        decoded = cxrfast.decode_resize([film, file.name, whole], 16, threads=1)
    joined, in_place, single = decoded.statuses
    assert joined == in_place and (joined.code, joined.message) == (single.code, single.message)
    assert np.array_equal(decoded.images[0], decoded.images[1]) and np.array_equal(decoded.images[0], decoded.images[2])
    if single.offset >= 41:  # 33 + length and name of the first chunk: a byte of the stream
        at = single.offset - 41
        where = 41 + at + 12 * next((i for i, end in enumerate(ends) if at < end), 0)
        assert joined.offset == (where if at < len(stream) else 33 + 12 * len(parts) + len(stream))


@pytest.mark.films
def test_truncated_at_every_997th_byte(films: list[Path], isa: str) -> None:
    for film in (films[0], films[-1]):
        file = film.read_bytes()
        cuts = [file[:nbytes] for nbytes in range(0, len(file), 997)]
        decoded = cxrfast.decode_resize(cuts, 8)
        assert {status.code for status in decoded.statuses} == {Code.CORRUPT}
        assert {status.message for status in decoded.statuses} <= {
            "empty file",
            "truncated chunk",
            "no IDAT chunk",
            "no IEND chunk",
        }
        assert not decoded.images.any()


@pytest.mark.films
def test_stream_truncated_at_every_997th_byte(films: list[Path], isa: str) -> None:
    """The same with whole chunks and right CRCs, so that it is inflate that meets the end."""
    parts = chunks_of(films[0].read_bytes())
    stream = b"".join(data for name, data in parts if name == b"IDAT")
    cuts = [join([parts[0], *idats(stream[:nbytes]), END]) for nbytes in range(0, len(stream), 997)]
    decoded = cxrfast.decode_resize(cuts, 8)
    assert {str(status.message) for status in decoded.statuses} == {"image data ends early"}


@pytest.mark.parametrize("row", [0, 500, 1099])
def test_a_fault_behind_rows_that_were_taken(isa: str, row: int) -> None:
    """A large film's rows are un-filtered before its end is seen: nothing of them is left in the image."""
    rng = np.random.default_rng(row)
    rows = bytearray(filtered_rows(rng, 300, 1100, 0, 8, 0, noise=20))
    good = zlib.compress(rows)
    rows[row * 301] = 7
    files = [
        join([ihdr(300, 1100), *idats(stream), END]) for stream in (zlib.compress(rows), good[:-4] + b"oops", good)
    ]
    decoded = cxrfast.decode_resize(files, 320, threads=1)
    assert [status.code for status in decoded.statuses] == [Code.CORRUPT, Code.CORRUPT, Code.OK]
    assert decoded.statuses[0].message == "bad row filter"
    assert not decoded.images[:2].any() and not decoded.pixel_sum[:2].any()
    assert np.array_equal(decoded.images[2], prepared(pillow.decode(files[2])[1], 320))


# ---- limits come before memory and time ----


def _peak_growth_kib() -> int:
    """Peak resident memory since the last call, above what is resident now."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    Path("/proc/self/clear_refs").write_text("5")
    return int(fields["VmHWM"].split()[0]) - int(fields["VmRSS"].split()[0])


def _bomb(width: int, height: int, color: int, depth: int, stream: bytes) -> bytes:
    return join([ihdr(width, height, color, depth), *idats(stream, 1 << 20), END])


BOMBS = {
    "sides": _bomb(2**31 - 1, 2**31 - 1, 6, 16, zlib.compress(bytes(1000))),
    "pixels": _bomb(60000, 60000, 0, 8, zlib.compress(bytes(1 << 20))),
    "memory": _bomb(8192, 8192, 6, 16, bytes(1 << 19)),
    "declared but not there": _bomb(8192, 8192, 0, 8, zlib.compress(bytes(1 << 20))),
    "there but not declared": _bomb(8, 8, 0, 8, zlib.compress(bytes(1 << 28), 1)),
    "text": join([ihdr(60, 50), (b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 27), 1)), *idats(STREAM[:40]), END]),
}


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_at_once(name: str) -> None:
    bomb = BOMBS[name]
    cxrfast.decode_resize([GOOD], 16, threads=1)
    took_ms, grown_kib = [], []
    for _ in range(5):  # the least counts: a page fault or another thread of this process is not the bomb's
        _peak_growth_kib()
        began = time.process_time()
        decoded = cxrfast.decode_resize([bomb], 16, threads=1)
        took_ms.append((time.process_time() - began) * 1e3)
        grown_kib.append(_peak_growth_kib())
        assert decoded.statuses[0].code in (Code.TOO_LARGE, Code.CORRUPT)
    assert min(took_ms) < 10
    assert min(grown_kib) < 1024


def test_limits_can_be_set() -> None:
    film = random_png(np.random.default_rng(2), 400, 400)
    with native.NativeDecoder(1, max_pixels=159_999) as decoder:
        assert str(decoder.decode_resize([film], 16).statuses[0]) == "too_large: more than the pixel limit at byte 8"
    with native.NativeDecoder(1, max_memory_nbytes=470_000) as decoder:
        assert str(decoder.decode_resize([film], 16).statuses[0]) == "too_large: more than the memory limit"
    with native.NativeDecoder(1, max_memory_nbytes=900_000) as decoder:  # enough for one at a time
        decoded = decoder.decode_resize([film] * 3, 16)
        assert all(status.ok for status in decoded.statuses)
        assert np.array_equal(decoded.images, cxrfast.decode_resize([film] * 3, 16).images)
