"""inflate against zlib: the same bytes, the same verdict, whatever the level, the grouping and the damage.

Dangers: a table entry that outlives its block, a distance into the padding, a copy that overlaps itself, a code set
that zlib refuses, a step that reads or writes past an end, one stream's end that disturbs its neighbours. The compiled
driver gives every stream buffers of its own, and AddressSanitizer and UBSan watch all tests but that on whole films.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import png_files
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
SEGMENTS = (0, 999, 70_000)  # bytes at a time; 0: all at once
SOURCES = ["inflate", "inflate_careful", "inflate_portable", "inflate_avx2", "inflate_tables_avx512", "adler32", "isa"]
CAREFUL = 255
CORRUPT = 1


class Job(NamedTuple):
    stream: bytes
    out_nbytes: int


class Result(NamedTuple):
    code: int
    offset: int
    message: str
    out: bytes | None


class Driver:
    """The decoders behind tests/inflate_driver.cpp, compiled with ``flags``."""

    def __init__(self, folder: Path, *flags: str) -> None:
        compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            pytest.skip("no C++ compiler")
        self.binary = folder / "inflate_driver"
        self.left_to_careful = 0  # jobs by segments that a kernel gave up
        sources = [ROOT / f"csrc/png/{name}.cpp" for name in SOURCES]
        command = [compiler, "-std=c++20", *flags, f"-I{ROOT / 'csrc'}", ROOT / "tests/inflate_driver.cpp", *sources]
        subprocess.run([*command, "-o", self.binary], check=True)
        best = subprocess.run([self.binary, "levels"], check=True, capture_output=True, text=True).stdout.strip()
        self.levels = list(range(["portable", "avx2", "avx512"].index(best) + 1))

    def run(self, level: int, *groups: Sequence[Job], segment: int = 0) -> list[Result]:
        """One call of the decoder per group, in order; the results of all jobs in one list."""
        parts = []
        for jobs in groups:
            parts.append(struct.pack("<BII", level, len(jobs), segment))
            parts += [struct.pack("<QQ", len(job.stream), job.out_nbytes) + job.stream for job in jobs]
        done = subprocess.run([self.binary], input=b"".join(parts), capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        results, at = [], 0
        for job in itertools.chain(*groups):
            code, offset, left, nbytes = struct.unpack_from("<BqBB", done.stdout, at)
            self.left_to_careful += left
            at += 11
            message = done.stdout[at : at + nbytes].decode()
            at += nbytes
            out = done.stdout[at : at + job.out_nbytes] if code == 0 else None
            at += len(out or b"")
            results.append(Result(code, offset, message, out))
        assert at == len(done.stdout)
        return results

    def check(self, *groups: Sequence[Job]) -> list[Result]:
        """Every level agrees with the careful decoder to the word, and that with zlib; its results."""
        verdicts = self.run(CAREFUL, *groups)
        for job, verdict in zip(itertools.chain(*groups), verdicts, strict=True):
            assert verdict.out == by_zlib(job), (verdict, job.out_nbytes, job.stream[:100])
            assert (verdict.code == 0) == (verdict.message == "" and verdict.offset == -1)
            assert verdict.code in (0, CORRUPT) and verdict.offset <= len(job.stream)
        for level, segment in itertools.product(self.levels, SEGMENTS):
            assert self.run(level, *groups, segment=segment) == verdicts
        return verdicts


def by_zlib(job: Job) -> bytes | None:
    """What zlib makes of a job: its bytes, or None where it refuses the stream or finds another number of bytes."""
    inflater = zlib.decompressobj()
    try:
        out = inflater.decompress(job.stream, job.out_nbytes + 1)
    except zlib.error:
        return None
    return out if inflater.eof and len(out) == job.out_nbytes else None


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    """With sanitizers; every finding ends the process, which `run` sees."""
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    return Driver(tmp_path_factory.mktemp("inflate_sanitized"), *flags)


@pytest.fixture(scope="session")
def fast_driver(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    """As it is shipped."""
    return Driver(tmp_path_factory.mktemp("inflate"), "-O3", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror")


# ---- streams ----


def compress(data: bytes, level: int = 6, window: int = 15, memory: int = 8, strategy: int = 0) -> bytes:
    deflater = zlib.compressobj(level, zlib.DEFLATED, window, memory, strategy)
    return deflater.compress(data) + deflater.flush()


def payload(rng: random.Random, nbytes: int) -> bytes:
    """Bytes of one of several kinds: constant, noise, residuals of a film, a short period, copies from everywhere."""
    kind = rng.randrange(5)
    if kind == 0:
        return bytes([rng.randrange(256)]) * nbytes
    if kind == 1:
        return rng.randbytes(nbytes)
    if kind == 2:
        return bytes(round(rng.gauss(0, 3)) & 255 for _ in range(nbytes))
    if kind == 3:
        period = rng.randbytes(rng.randrange(1, 40))
        return (period * (nbytes // len(period) + 1))[:nbytes]
    data = bytearray(rng.randbytes(min(nbytes, 400)))
    while len(data) < nbytes:
        distance = rng.randrange(1, min(len(data), 32768) + 1)
        for _ in range(rng.choice([3, 4, 6, 6, 6, 7, 9, 15, 16, 17, 18, 33, 80, 258])):
            data.append(data[-distance])
        data += rng.randbytes(rng.randrange(4))
    return bytes(data[:nbytes])


def random_job(rng: random.Random) -> Job:
    """A valid stream of random kind and settings; some are flushed in the middle, which leaves stored blocks."""
    data = payload(rng, rng.choice([0, 1, 2, 5, 17, 64, 300, 1000, 3000, 9000, rng.randrange(40000)]))
    settings = rng.randrange(10), zlib.DEFLATED, rng.randrange(9, 16), rng.randrange(1, 10), rng.randrange(5)
    deflater = zlib.compressobj(*settings)
    cut = rng.randrange(len(data) + 1)
    flush = rng.choice([zlib.Z_NO_FLUSH, zlib.Z_NO_FLUSH, zlib.Z_PARTIAL_FLUSH, zlib.Z_SYNC_FLUSH, zlib.Z_FULL_FLUSH])
    stream = deflater.compress(data[:cut]) + deflater.flush(flush) + deflater.compress(data[cut:]) + deflater.flush()
    return Job(stream, len(data))


def mutated(rng: random.Random, job: Job) -> Job:
    """The job with one to four injuries: flipped bits, other bytes, cuts, splices, trailing bytes, another size."""
    stream, out_nbytes = bytearray(job.stream), job.out_nbytes
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(len(stream)) if stream else 0
        match rng.randrange(8):
            case 0 if stream:
                stream[at] ^= 1 << rng.randrange(8)
            case 1 if stream:
                stream[rng.randrange(min(len(stream), 100))] ^= 1 << rng.randrange(8)
            case 2:
                del stream[at:]
            case 3 if stream:
                other, nbytes = rng.randrange(len(stream)), rng.randrange(40)
                stream[at : at + nbytes] = stream[other : other + nbytes]
            case 4:
                out_nbytes = max(0, out_nbytes + rng.choice([-300, -17, -2, -1, 1, 2, 17, 300]))
            case 5:
                stream += rng.randbytes(rng.randrange(20))
            case 6 if stream:
                stream[at] = rng.randrange(256)
            case 7:
                del stream[max(0, len(stream) - rng.randrange(8)) :]
    return Job(bytes(stream), out_nbytes)


class Bits:
    """Writes a deflate stream bit by bit, as RFC 1951 packs it; the zlib header is there from the start."""

    def __init__(self) -> None:
        self.bits: list[int] = []

    def number(self, value: int, count: int) -> Bits:
        self.bits += [value >> i & 1 for i in range(count)]
        return self

    def code(self, text: str) -> Bits:
        """A Huffman code as the RFC writes it, first bit first."""
        self.bits += [int(bit) for bit in text]
        return self

    def dynamic(self, literals: list[int], distances: list[int], *, last: bool = True) -> Bits:
        """The header of a dynamic block with these code lengths, each sent as it is."""
        self.number(int(last), 1).number(2, 2)
        self.number(len(literals) - 257, 5).number(len(distances) - 1, 5).number(15, 4)
        for symbol in (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15):
            self.number(0 if symbol > 15 else 4, 3)  # sixteen codes of four bits: the code of a length is the length
        for length in (*literals, *distances):
            self.code(f"{length:04b}")
        return self

    def stream(self, out: bytes = b"") -> bytes:
        padded = self.bits + [0] * (-len(self.bits) % 8)
        body = bytes(sum(bit << i for i, bit in enumerate(padded[at : at + 8])) for at in range(0, len(padded), 8))
        return b"\x78\x9c" + body + struct.pack(">I", zlib.adler32(out))


def lengths(total: int, **symbols: int) -> list[int]:
    """Code lengths of ``total`` symbols: s65=2 gives the symbol 65 two bits; the others have none."""
    return [symbols.get(f"s{symbol}", 0) for symbol in range(total)]


# ---- valid streams ----


@pytest.mark.parametrize("strategy", range(5), ids=["default", "filtered", "huffman", "rle", "fixed"])
@pytest.mark.parametrize("level", [0, 1, 4, 6, 9])
def test_every_way_to_compress(driver: Driver, level: int, strategy: int) -> None:
    rng = random.Random(level * 5 + strategy)
    jobs = []
    for window, memory, kind in itertools.product((9, 12, 15), (1, 8, 9), range(3)):
        data = payload(rng, (300, 5000, 40000)[kind])
        jobs.append(Job(compress(data, level, window, memory, strategy), len(data)))
    assert all(result.code == 0 for result in driver.check(jobs))


SIZES = [*range(40), 63, 64, 65, 255, 256, 257, 258, 259, 511, 512, 513, 528, 1025, 32767, 32768, 32769, 65535, 65536]


def test_every_size_near_an_edge(driver: Driver) -> None:
    rng = random.Random(1)
    jobs = []
    for size, level in itertools.product(SIZES, (0, 1, 6)):
        data = payload(rng, size)
        jobs.append(Job(compress(data, level), size))
    assert all(result.code == 0 for result in driver.check(jobs))


def test_far_and_near_copies(driver: Driver) -> None:
    """Every distance around the edges of the codes, of the copies' width and of the window; every length."""
    distances = [
        *range(1, 70),
        127,
        128,
        129,
        255,
        256,
        257,
        511,
        512,
        513,
        1023,
        1025,
        4097,
        8193,
        16385,
        24577,
        32768,
    ]
    rng = random.Random(2)
    jobs = []
    for distance in distances:
        data = bytearray(rng.randbytes(distance))
        for length in (3, 4, 10, 11, 15, 16, 17, 18, 31, 32, 33, 34, 257, 258):
            for _ in range(length):
                data.append(data[-distance])
            data += rng.randbytes(2)
        jobs.append(Job(compress(bytes(data), 9), len(data)))
    assert all(result.code == 0 for result in driver.check(jobs))


def test_after_near_copies(driver: Driver) -> None:
    """Streams full of copies that overlap themselves change how steps are taken, also for their neighbours."""
    rng = random.Random(8)

    def job_of_copies(distances: range) -> Job:
        data = bytearray(rng.randbytes(distances.stop))
        while len(data) < 100_000:  # some thousand steps
            distance = rng.choice(distances)
            for _ in range(rng.choice([3, 4, 5, 8, 15, 16, 17, 18, 33])):
                data.append(data[-distance])
            data.append(rng.randrange(256))
        return Job(compress(bytes(data), 9), len(data))

    near, far = job_of_copies(range(1, 18)), job_of_copies(range(40, 3000))
    driver.left_to_careful = 0
    driver.check(*([*places] for places in itertools.product([near, far], repeat=3)))
    assert driver.left_to_careful == 0
    jobs = [random_job(rng) for _ in range(12)] + [stream_of_random_codes(rng, 0.6, 400) for _ in range(6)]
    driver.left_to_careful = 0
    driver.check([near, near, near], *([near, near, *jobs[at : at + 2]] for at in range(0, len(jobs), 2)))
    assert driver.left_to_careful == 0
    driver.check(*([near, mutated(rng, near), mutated(rng, rng.choice(jobs))] for _ in range(20)))


@given(data=st.lists(st.tuples(st.binary(max_size=60), st.integers(0, 300))), level=st.integers(0, 9))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes(driver: Driver, data: list[tuple[bytes, int]], level: int) -> None:
    whole = b"".join(part * times for part, times in data)
    assert driver.check([Job(compress(whole, level), len(whole))])[0].out == whole


def test_any_grouping_in_any_order(driver: Driver) -> None:
    """A job's result is its own: alone, in company, among broken ones, first or last."""
    rng = random.Random(3)
    jobs = [random_job(rng) if i % 4 else mutated(rng, random_job(rng)) for i in range(24)]
    alone = dict(zip(jobs, driver.check(*([job] for job in jobs)), strict=True))
    groups = [rng.choices(jobs, k=size) for size in (0, 1, 2, 3, 4, 5, 6, 7, 11, 24) for _ in range(3)]
    for level in driver.levels:
        assert driver.run(level, *groups) == [alone[job] for group in groups for job in group]


def test_a_bomb_stops_at_the_promised_size(driver: Driver) -> None:
    bomb = compress(bytes(4_000_000), 9)
    result = driver.check([Job(bomb, 1000), Job(bomb, 3_999_999), Job(bomb, 4_000_000), Job(bomb, 4_000_001)])
    assert [one.message for one in result] == [
        "too much image data",
        "too much image data",
        "",
        "image data ends early",
    ]


@pytest.mark.films
@pytest.mark.slow
def test_real_films(fast_driver: Driver, films: list[Path]) -> None:
    """Each of the films, in groups of five, at every level; the careful decoder on every tenth."""
    for first in range(0, len(films), 50):
        jobs = []
        for path in films[first : first + 50]:
            stream = b"".join(data for name, data in png_files.chunks_of(path.read_bytes()) if name == b"IDAT")
            jobs.append(Job(stream, len(zlib.decompress(stream))))
        truth = [zlib.decompress(job.stream) for job in jobs]
        groups = [jobs[at : at + 5] for at in range(0, len(jobs), 5)]
        for level in fast_driver.levels:
            for segment in (0, 64 * 1025):
                assert [result.out for result in fast_driver.run(level, *groups, segment=segment)] == truth
        assert [result.out for result in fast_driver.run(CAREFUL, jobs[::10])] == truth[::10]


# ---- broken streams ----

BROKEN: dict[str, tuple[str, Callable[[], bytes]]] = {
    "empty": ("image data ends early", lambda: b""),
    "header checksum": ("invalid zlib header", lambda: b"\x78\x9d" + compress(b"a")[2:]),
    "method": ("invalid zlib header", lambda: b"\x77\x85" + compress(b"a")[2:]),
    "window of 64 KiB": ("invalid zlib header", lambda: b"\x88\x1c" + compress(b"a")[2:]),
    "preset dictionary": ("invalid zlib header", lambda: b"\x78\xbb" + compress(b"a")[2:]),
    "block type": ("unknown block type", lambda: Bits().number(7, 3).stream()),
    "stored length": ("stored length", lambda: b"\x78\x01\x01\x01\x00\xff\xff" + b"a" * 9),
    "stored, cut": ("image data ends early", lambda: b"\x78\x01\x01\x04\x00\xfb\xffabc"),
    "287 literals": ("too many literal or distance", lambda: Bits().number(5, 3).number(30, 5).number(0, 9).stream()),
    "31 distances": ("too many literal or distance", lambda: Bits().number(5, 3).number(0, 5).number(30, 9).stream()),
    "no length code": ("code of the code lengths", lambda: Bits().number(5, 3).number(0, 14).number(0, 12).stream()),
    "length code over-subscribed": (
        "code of the code lengths",
        lambda: Bits().number(5, 3).number(0, 14).number(0o1111, 12).stream(),
    ),
    "length code incomplete": (
        "code of the code lengths",
        lambda: Bits().number(5, 3).number(0, 14).number(0o1, 12).stream(),
    ),
    "nothing to repeat": (  # two codes of one bit: 16 (the second), 18
        "without a previous one",
        lambda: Bits().number(5, 3).number(0, 14).number(0o0101, 12).number(0, 20).stream(),
    ),
    "repeats too far": (  # 18, 127 more: 138 zeros, twice is 276 of 258
        "more code lengths than symbols",
        lambda: (
            Bits()
            .number(5, 3)
            .number(0, 14)
            .number(0o0110, 12)
            .code("1")
            .number(127, 7)
            .code("1")
            .number(127, 7)
            .stream()
        ),
    ),
    "no end of block": (
        "no code for the end",
        lambda: Bits().dynamic(lengths(257, s65=1, s66=1), [1]).stream(),
    ),
    "literals over-subscribed": (
        "literal code",
        lambda: Bits().dynamic(lengths(257, s65=1, s66=1, s256=1), [1]).stream(),
    ),
    "literals incomplete": ("literal code", lambda: Bits().dynamic(lengths(257, s65=2, s256=2), [1]).stream()),
    "distances over-subscribed": (
        "distance code",
        lambda: Bits().dynamic(lengths(257, s65=1, s256=1), [1, 1, 1]).stream(),
    ),
    "distances incomplete": (
        "distance code",
        lambda: Bits().dynamic(lengths(257, s65=1, s256=1), [2, 2]).stream(),
    ),
    "one literal code, its complement": (
        "invalid literal or length",
        lambda: Bits().dynamic(lengths(257, s256=1), [1]).code("1").stream(),
    ),
    "literal 286": ("invalid literal or length", lambda: Bits().number(3, 3).code("11000110").stream()),
    "distance 30": ("invalid distance", lambda: Bits().number(3, 3).code("00110000000000111110").stream()),
    "no distance code": (
        "invalid distance",
        lambda: Bits().dynamic(lengths(258, s65=1, s256=2, s257=2), [0]).code("0110").stream(),
    ),
    "before the start": (
        "before the start",
        lambda: Bits().number(3, 3).code("001100000000001000010000000").stream(),
    ),
    "checksum": ("Adler-32 mismatch", lambda: compress(b"a")[:-1] + b"\0"),
    "no checksum": ("image data ends early", lambda: compress(b"a")[:-4]),
    "half a checksum": ("image data ends early", lambda: compress(b"a")[:-2]),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_names_what_is_broken(driver: Driver, kind: str) -> None:
    message, make = BROKEN[kind]
    (result,) = driver.check([Job(make(), 4 if kind == "stored, cut" else 1)])
    assert result.code == CORRUPT
    assert message in result.message


def test_sets_that_zlib_lets_pass(driver: Driver) -> None:
    """One code of one bit, or none for the distances, is incomplete and yet valid."""
    one = Bits().dynamic(lengths(257, s256=1), [1]).code("0").stream()
    no_distance = Bits().dynamic(lengths(257, s65=1, s256=1), [0]).code("001").stream(b"AA")
    one_distance = Bits().dynamic(lengths(258, s65=1, s256=2, s257=2), [1]).code("011010").stream(b"AAAA")
    fixed = Bits().number(3, 3).code("011100010000001000000000000").stream(b"AAAA")
    results = driver.check([Job(one, 0), Job(no_distance, 2), Job(one_distance, 4), Job(fixed, 4)])
    assert [result.out for result in results] == [b"", b"AA", b"AAAA", b"AAAA"]


def test_codes_of_every_length(driver: Driver) -> None:
    """Codes of 1 to 15 bits: literals, lengths with extra bits and distances cross every table's edge."""
    literals = lengths(286, **{f"s{symbol}": bits for symbol, bits in zip(range(60, 72), range(1, 13), strict=True)})
    literals[256], literals[262], literals[285] = 13, 14, 15
    literals[280] = 15
    order = [*range(60, 72), 256, 262, 280, 285]
    code = dict(zip(order, [*("1" * n + "0" for n in range(14)), "1" * 14 + "0", "1" * 15], strict=True))
    distances = [*range(1, 15), 15, 15]
    distance_code = [*("1" * n + "0" for n in range(14)), "1" * 14 + "0", "1" * 15]
    bits, out = Bits().dynamic(literals, distances), bytearray()
    rng = random.Random(4)
    for i in range(3000):
        symbol = rng.choice(order[:12] if i < 100 else [s for s in order if s != 256])
        bits.code(code[symbol])
        if symbol < 256:
            out.append(symbol)
            continue
        length = {262: 8, 280: 115, 285: 258}[symbol]
        if symbol == 280:
            extra = rng.randrange(16)
            bits.number(extra, 4)
            length += extra
        reachable = [i for i in range(16) if 2 * DISTANCES[i][0] <= len(out)]
        which = rng.choice(reachable)
        bits.code(distance_code[which])
        base, count = DISTANCES[which]
        extra = rng.randrange(1 << count)
        bits.number(extra, count)
        for _ in range(length):
            out.append(out[-base - extra])
    bits.code(code[256])
    stream = bits.stream(bytes(out))
    results = driver.check([Job(stream, len(out))] * 4, [Job(stream, len(out) - 1), Job(stream, len(out) + 1)])
    assert [result.code for result in results] == [0, 0, 0, 0, CORRUPT, CORRUPT]


def random_code(rng: random.Random, symbols: int, depth: float) -> list[int]:
    """Lengths of a complete code of that many symbols, at random; the more depth, the more codes are long."""
    leaves = [0]
    while len(leaves) < symbols:
        open_leaves = [i for i, length in enumerate(leaves) if length < 15]
        chosen = max(rng.choices(open_leaves, k=2), key=leaves.__getitem__) if rng.random() < depth else open_leaves[0]
        leaves[chosen] += 1
        leaves.append(leaves[chosen])
    rng.shuffle(leaves)
    return leaves


def canonical(lengths: Sequence[int]) -> list[str]:
    """The code of each symbol (RFC 1951, section 3.2.2); "" where it has none."""
    codes, code = [""] * len(lengths), 0
    for length in range(1, 16):
        for symbol, own in enumerate(lengths):
            if own == length:
                codes[symbol] = f"{code:0{length}b}"
                code += 1
        code *= 2
    return codes


LENGTHS = [(3 + i, 0) for i in range(8)]
LENGTHS += (
    [(11 + 2 * i, 1) for i in range(4)] + [(19 + 4 * i, 2) for i in range(4)] + [(35 + 8 * i, 3) for i in range(4)]
)
LENGTHS += [(67 + 16 * i, 4) for i in range(4)] + [(131 + 32 * i, 5) for i in range(4)] + [(258, 0)]
DISTANCES = [(1, 0), (2, 0), *((1 + (2 + k) * 2**extra, extra) for extra in range(14) for k in (0, 1))]


def stream_of_random_codes(rng: random.Random, depth: float, tokens: int, some: list[int] | None = None) -> Job:
    """Blocks of random codes; symbols are drawn evenly, or as their codes' lengths suggest."""
    bits, out = Bits(), bytearray()
    for last in (False, True):
        literals, distances = some or random_code(rng, 286, depth), random_code(rng, 30, depth)
        bits.dynamic(literals, distances, last=last)
        literal_code, distance_code = canonical(literals), canonical(distances)
        weights = [2.0**-length for length in literals] if rng.random() < 0.5 else [1.0] * 286
        weights[256] = 0
        for symbol in rng.choices(range(286), weights, k=tokens):
            if symbol < 256:
                bits.code(literal_code[symbol])
                out.append(symbol)
                continue
            reachable = [i for i, (base, extra) in enumerate(DISTANCES) if base + 2**extra - 1 <= len(out)]
            if not reachable:
                continue
            bits.code(literal_code[symbol])
            base, extra = LENGTHS[symbol - 257]
            more = rng.randrange(min(2**extra, 258 - base + 1))
            bits.number(more, extra)
            length, which = base + more, rng.choice(reachable)
            bits.code(distance_code[which])
            base, extra = DISTANCES[which]
            more = rng.randrange(2**extra)
            bits.number(more, extra)
            for _ in range(length):
                out.append(out[-base - more])
        bits.code(literal_code[256])
    return Job(bits.stream(bytes(out)), len(out))


def test_random_codes(driver: Driver) -> None:
    """Codes and extra bits cross the edges of all tables, with as many codes beyond the index as there can be; no valid
    stream is left to the careful decoder, which would be right, and slow."""
    rng = random.Random(5)
    jobs = [stream_of_random_codes(rng, depth, 1500) for depth in (0, 0.3, 0.6, 0.9, 0.95, 1) for _ in range(4)]
    most = [1, 2, 4, 5, 6, 8] + [11] * 280
    for _ in range(4):
        rng.shuffle(most)
        jobs.append(stream_of_random_codes(rng, 0.5, 3000, list(most)))
    driver.left_to_careful = 0
    assert all(result.code == 0 for result in driver.check(jobs))
    assert driver.left_to_careful == 0


def test_as_many_bits_as_a_step_can_take(driver: Driver) -> None:
    """14 bits of a literal, 15 of a length, 21 of a distance, wherever a byte ends: what is left over is too little for
    the next step."""
    order = [*range(60, 69), 284, 70, 71, 72, 73, 256]  # codes of 1 bit, of 2, ..., two of 14
    literals = [0] * 286
    for i, symbol in enumerate(order):
        literals[symbol] = min(i + 1, 14)
    distances = [min(i + 1, 14) for i in range(15)] + [0] * 15
    distances[7], distances[29] = 0, 8
    literal_code, distance_code = canonical(literals), canonical(distances)
    rng = random.Random(6)
    bits, out = Bits().dynamic(literals, distances), bytearray()
    for symbol in rng.choices(order[:9], k=2**15):
        bits.code(literal_code[symbol])
        out.append(symbol)
    for _ in range(1000):
        if rng.random() < 0.3:
            bits.code(literal_code[60])
            out.append(60)
        more, back = rng.randrange(31), rng.randrange(2**13)
        bits.code(literal_code[73]).code(literal_code[284]).number(more, 5).code(distance_code[29]).number(back, 13)
        out.append(73)
        for _ in range(227 + more):
            out.append(out[-24577 - back])
    bits.code(literal_code[256])
    driver.left_to_careful = 0
    assert driver.check([Job(bits.stream(bytes(out)), len(out))] * 3)[0].code == 0
    assert driver.left_to_careful == 0


def test_truncated_anywhere(driver: Driver) -> None:
    rng = random.Random(5)
    for data in (payload(rng, 700), b"abcabcabcd" * 30, rng.randbytes(100)):
        for level in (0, 6):
            stream = compress(data, level)
            results = driver.check([Job(stream[:cut], len(data)) for cut in range(len(stream))])
            assert {result.code for result in results} == {CORRUPT}
            assert results[-1].message == "image data ends early"


def test_bytes_behind_the_checksum_are_ignored(driver: Driver) -> None:
    data = b"some row " * 50
    results = driver.check([Job(compress(data) + bytes(extra), len(data)) for extra in range(20)])
    assert {result.out for result in results} == {data}


def stress(driver: Driver, seed: int, executions: int) -> int:
    """Checks that many streams, three quarters of them damaged; how many were accepted."""
    rng = random.Random(seed)
    base = [random_job(rng) for _ in range(80)]
    accepted = 0
    for _ in range(executions // 400):
        base[rng.randrange(len(base))] = random_job(rng)
        jobs = [rng.choice(base) for _ in range(400)]
        jobs = [mutated(rng, job) if rng.random() < 0.75 else job for job in jobs]
        accepted += sum(result.code == 0 for result in driver.check(jobs))
    return accepted


def test_damaged_streams(driver: Driver) -> None:
    assert 200 < stress(driver, seed=6, executions=2000) < 1000


@pytest.mark.slow
def test_many_damaged_streams(driver: Driver) -> None:
    assert stress(driver, seed=7, executions=20_000) > 4000
