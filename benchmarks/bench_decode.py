"""How much faster than Pillow is a film decoded and prepared, and how do the others compare?

One run, real films in memory, one thread each, S = 224. Every way's output is checked before it is timed. The ways take
turns on the same films, and what is counted is the processor time of the process, so that what else the machine does
falls on none of them or on all; on an idle machine that is the time that passes. A ratio is the median over the rounds
of (Pillow's time / the way's time in the same round).

    python -m pytest --benchmark-only benchmarks/bench_decode.py -s --benchmark-json=decode.json
    python tools/plot_bench.py decode.json docs/decode.png      (plot, and the table for the README on stdout)

Terms: a way either prepares a film (decode to grey, then resize), or does less, and says so: "decode only" leaves out
the resize, "inflate only" is the bare zlib stream. OpenCV resizes by area, pyvips in its own way; their images are
checked to be near Pillow's, all the others to be equal (DALI: to one level, its border apart). A rival that is not
installed is left out with the reason.
"""

from __future__ import annotations

import importlib.metadata
import io
import os
import platform
import statistics
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("VIPS_CONCURRENCY", "1")  # read when libvips is loaded

import numpy as np
import pytest
from PIL import Image

import cxrfast

SIZE = 224
ROUNDS = 7  # in each of which every way prepares every film once
WARM_UP = 20  # films, not timed, before each turn
DALI_BATCH = 100  # the quickest of 1, 4, 10, 20, 40, 100 and 200; one film at a time is a tenth slower
LEVELS = ["portable", "avx2", "avx512"]

Way = Callable[[list[bytes]], list[Any]]


class Rival(NamedTuple):
    does: str  # "prepare", "decode only" or "inflate only"
    make: Callable[[ExitStack], Way]  # pytest.skip with the reason where it is not installed
    package: str  # whose version is recorded
    near: float = 0.0  # mean difference from Pillow's pixels that is allowed, levels


def each(one: Callable[[bytes], Any]) -> Way:
    return lambda films: [one(film) for film in films]


def pillow(stack: ExitStack) -> Way:
    def one(film: bytes) -> np.ndarray:
        with Image.open(io.BytesIO(film)) as image:
            return np.asarray(image.convert("L").resize((SIZE, SIZE), Image.Resampling.BILINEAR))

    return each(one)


def opencv(stack: ExitStack) -> Way:
    cv2 = pytest.importorskip("cv2")
    stack.callback(cv2.setNumThreads, cv2.getNumThreads())
    cv2.setNumThreads(1)

    def one(film: bytes) -> np.ndarray:
        grey = cv2.imdecode(np.frombuffer(film, np.uint8), cv2.IMREAD_GRAYSCALE)
        return cv2.resize(grey, (SIZE, SIZE), interpolation=cv2.INTER_AREA)

    return each(one)


def pyvips(stack: ExitStack) -> Way:
    vips = pytest.importorskip("pyvips")

    def one(film: bytes) -> np.ndarray:
        return vips.Image.thumbnail_buffer(film, SIZE, height=SIZE, size="force").numpy()

    return each(one)


def torchvision(stack: ExitStack) -> Way:
    torch = pytest.importorskip("torch")
    try:
        from torchvision.io import ImageReadMode, decode_png  # type: ignore[import-not-found]
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"no torchvision for this torch ({error})")
    stack.callback(torch.set_num_threads, torch.get_num_threads())
    torch.set_num_threads(1)

    def one(film: bytes) -> np.ndarray:
        grey = decode_png(torch.frombuffer(bytearray(film), dtype=torch.uint8), ImageReadMode.GRAY)[None]
        resize = torch.nn.functional.interpolate
        return resize(grey, (SIZE, SIZE), mode="bilinear", antialias=True)[0, 0].numpy()

    return each(one)


def dali(stack: ExitStack) -> Way:
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def
    def graph() -> Any:
        films = fn.external_source(name="films", dtype=types.UINT8, ndim=1, no_copy=True)
        grey = fn.decoders.image(films, output_type=types.GRAY)
        return fn.resize(grey, size=(SIZE, SIZE), interp_type=types.INTERP_TRIANGULAR, antialias=True)

    pipeline = graph(batch_size=DALI_BATCH, num_threads=1, device_id=None, prefetch_queue_depth=1)
    pipeline.build()

    def way(films: list[bytes]) -> list[Any]:
        images: list[Any] = []
        for first in range(0, len(films), DALI_BATCH):
            batch = films[first : first + DALI_BATCH]
            pipeline.feed_input("films", [np.frombuffer(film, np.uint8) for film in batch])
            images.extend(np.array(pipeline.run()[0].as_tensor())[..., 0])
        return images

    return way


def imagecodecs(stack: ExitStack) -> Way:
    codecs = pytest.importorskip("imagecodecs")
    return each(codecs.png_decode)


def pyspng(stack: ExitStack) -> Way:
    spng = pytest.importorskip("pyspng")
    return each(spng.load)


def libdeflate(stack: ExitStack) -> Way:
    deflate = pytest.importorskip("deflate")
    return each(lambda stream: deflate.zlib_decompress(stream, 1024 * 1025))


def isal(stack: ExitStack) -> Way:
    isal_zlib = pytest.importorskip("isal.isal_zlib")
    return each(lambda stream: isal_zlib.decompress(stream, bufsize=1024 * 1025))


def ours(level: str, threads: int = 1) -> Callable[[ExitStack], Way]:
    def make(stack: ExitStack) -> Way:
        native = pytest.importorskip("cxrfast.decode.native")
        cpu = native._png.cpu_isa()
        if LEVELS.index(level) > LEVELS.index(cpu):
            pytest.skip(f"this CPU has {cpu} at most")
        decoder = stack.enter_context(native.NativeDecoder(threads))
        out = np.empty((0, SIZE, SIZE), np.uint8)

        def way(films: list[bytes]) -> list[Any]:
            nonlocal out
            if len(out) < len(films):
                out = np.empty((len(films), SIZE, SIZE), np.uint8)
            with forced(level):
                return list(decoder.decode_resize(films, SIZE, out[: len(films)]).images)

        return way

    return make


@contextmanager
def forced(level: str) -> Iterator[None]:
    before = os.environ.get("CXRFAST_ISA")
    os.environ["CXRFAST_ISA"] = level
    try:
        yield
    finally:
        if before is None:
            del os.environ["CXRFAST_ISA"]
        else:
            os.environ["CXRFAST_ISA"] = before


RIVALS = {
    "Pillow": Rival("prepare", pillow, "Pillow"),
    "OpenCV": Rival("prepare", opencv, "opencv-python-headless", near=3.0),
    "DALI, CPU": Rival("prepare", dali, "nvidia-dali-cuda120", near=1.0),
    "pyvips": Rival("prepare", pyvips, "pyvips", near=3.0),
    "torchvision": Rival("prepare", torchvision, "torchvision", near=1.0),
    "imagecodecs": Rival("decode only", imagecodecs, "imagecodecs"),
    "pyspng": Rival("decode only", pyspng, "pyspng"),
    "libdeflate": Rival("inflate only", libdeflate, "deflate"),
    "ISA-L": Rival("inflate only", isal, "isal"),
    **{f"cxrfast, {level}": Rival("prepare", ours(level), "cxrfast") for level in LEVELS},
}


@pytest.fixture(scope="module")
def grey_films(data: Path) -> list[bytes]:
    """The 200 grey originals of NIH: 99 % of the data set is grey."""
    files = [path.read_bytes() for path in sorted((data / "nih" / "images").glob("*.png"))]
    return [file for file in files if file[25] == 0]


def stream_of(film: bytes) -> bytes:
    """The IDAT payloads, joined."""
    stream, at = b"", 8
    while at < len(film):
        (nbytes,) = struct.unpack_from(">I", film, at)
        if film[at + 4 : at + 8] == b"IDAT":
            stream += film[at + 8 : at + 8 + nbytes]
        at += 12 + nbytes
    return stream


def check(rival: Rival, way: Way, films: list[bytes], streams: list[bytes]) -> None:
    """The output that will be timed is right."""
    if rival.does == "inflate only":
        assert way(streams) == [zlib.decompress(stream) for stream in streams]
        return
    greys = [Image.open(io.BytesIO(film)).convert("L") for film in films]
    if rival.does == "prepare":
        greys = [grey.resize((SIZE, SIZE), Image.Resampling.BILINEAR) for grey in greys]
    for image, grey in zip(way(films), greys, strict=True):
        expected = np.asarray(grey).astype(int)
        assert np.asarray(image).shape == expected.shape
        assert np.abs(np.asarray(image) - expected).mean() <= rival.near


@pytest.mark.films
def test_against_pillow(benchmark: Any, grey_films: list[bytes]) -> None:
    streams = [stream_of(film) for film in grey_films]
    absent: dict[str, str] = {}
    ways: dict[str, Way] = {}
    with ExitStack() as stack:
        for name, rival in RIVALS.items():
            try:
                ways[name] = rival.make(stack)
                check(rival, ways[name], grey_films, streams)
            except pytest.skip.Exception as reason:
                absent[name] = str(reason)
                ways.pop(name, None)
        seconds: dict[str, list[float]] = {name: [] for name in ways}

        def take_turns() -> None:
            for name, way in ways.items():
                given = streams if RIVALS[name].does == "inflate only" else grey_films
                way(given[:WARM_UP])  # the one before has left the caches full of its own
                began = time.process_time()
                way(given)
                seconds[name].append(time.process_time() - began)

        benchmark.pedantic(take_turns, rounds=ROUNDS, warmup_rounds=1)
    seconds = {name: times[1:] for name, times in seconds.items()}
    results = {}
    for name, times in seconds.items():
        ratios = [base / own for base, own in zip(seconds["Pillow"], times, strict=True)]
        results[name] = {
            "does": RIVALS[name].does,
            "version": importlib.metadata.version(RIVALS[name].package),
            "ms_per_film": round(statistics.median(times) / len(grey_films) * 1e3, 3),
            "times_pillow": round(statistics.median(ratios), 2),
            "times_pillow_range": [round(min(ratios), 2), round(max(ratios), 2)],
        }
        print(
            f"\n{name:18} {results[name]['ms_per_film']:7.3f} ms  {results[name]['times_pillow']:6.2f} x Pillow", end=""
        )
    for name, reason in absent.items():
        print(f"\n{name:18} left out: {reason}", end="")
    benchmark.extra_info |= {
        "results": results,
        "absent": absent,
        "films": len(grey_films),
        "size": SIZE,
        "cpu": cpu_name(),
    }


@pytest.mark.films
def test_two_threads_against_one(benchmark: Any, grey_films: list[bytes]) -> None:
    """In turns, medians; needs two idle cores."""
    with ExitStack() as stack:
        level = pytest.importorskip("cxrfast._png").cpu_isa()
        ways = [ours(level, threads)(stack) for threads in (1, 2)]
        films = grey_films
        for way in ways:
            check(RIVALS["Pillow"], way, films, [])
        seconds: list[list[float]] = [[], []]

        def take_turns() -> None:
            for times, way in zip(seconds, ways, strict=True):
                began = time.perf_counter()
                way(films)
                times.append(time.perf_counter() - began)

        benchmark.pedantic(take_turns, rounds=ROUNDS, warmup_rounds=1)
    ratio = statistics.median(one / two for one, two in zip(*seconds, strict=True))
    benchmark.extra_info |= {"two_threads_over_one": round(ratio, 2)}
    print(f"\ntwo threads: {ratio:.2f} x one")


def cpu_name() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@pytest.mark.films
def test_whole_images_against_pillow(benchmark: Any, grey_films: list[bytes]) -> None:
    """``cxrfast.decode``, nothing resized: one film a call, so inflate has one stream."""
    pytest.importorskip("cxrfast.decode.native")
    ways: dict[str, Callable[[bytes], Any]] = {
        "Pillow": lambda film: np.asarray(Image.open(io.BytesIO(film)).convert("L")),
        "cxrfast.decode": cxrfast.decode,
    }
    assert all((ways["Pillow"](film) == ways["cxrfast.decode"](film)).all() for film in grey_films)
    ratios: list[float] = []

    def take_turns() -> None:
        seconds = []
        for one in ways.values():
            began = time.process_time()
            for film in grey_films:
                one(film)
            seconds.append(time.process_time() - began)
        ratios.append(seconds[0] / seconds[1])

    benchmark.pedantic(take_turns, rounds=ROUNDS, warmup_rounds=1)
    print(f"\ncxrfast.decode: {statistics.median(ratios[1:]):.2f} x Pillow")
