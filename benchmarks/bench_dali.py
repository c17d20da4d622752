"""Which way from PNG files to prepared images is the fastest here, and does DALI take anything from our decoder?

Every way gets the same films, as paths on a disk that is in memory after the warm-up, and the same number of threads
(Pillow: processes). The images are compared with Pillow's before anything is timed: bit for bit where the pixel rule is
Pillow's, to one level where DALI or torch resizes; OpenCV has no such filter, its area average is something else.

    python -m pytest --benchmark-only benchmarks/bench_dali.py

``dali plain`` is DALI as its manual has it, wrong at the border and not checked: the price of our checks and border is
its distance from ``dali``. The test at the end runs the native decoder with and without DALI in turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cxrfast.decode import PIXEL_RULE
from cxrfast.decode.backends import BACKENDS, available_cores, choose_decoder, missing

SIZE = 224
THREADS = available_cores()
PASSES = 7  # of each of the two that are compared in turns

Prepare = Callable[[list[Path]], np.ndarray]  # films → uint8 (N, SIZE, SIZE)


def on_threads(one: Callable[[Path], np.ndarray], stack: ExitStack) -> Prepare:
    pool = stack.enter_context(ThreadPoolExecutor(THREADS))
    return lambda films: np.stack(list(pool.map(one, films)))


def with_opencv(stack: ExitStack) -> Prepare:
    cv2 = pytest.importorskip("cv2")
    cv2.setNumThreads(1)  # the threads are ours, one film each

    def one(film: Path) -> np.ndarray:
        grey = cv2.imread(str(film), cv2.IMREAD_GRAYSCALE)
        return cv2.resize(grey, (SIZE, SIZE), interpolation=cv2.INTER_AREA)

    return on_threads(one, stack)


def with_torchvision(stack: ExitStack) -> Prepare:
    torch = pytest.importorskip("torch")
    try:
        from torchvision.io import ImageReadMode, decode_png, read_file  # type: ignore[import-not-found]
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"no torchvision for this torch ({error})")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    stack.callback(torch.set_num_threads, threads)

    def one(film: Path) -> np.ndarray:
        grey = decode_png(read_file(str(film)), ImageReadMode.GRAY)[None]
        resize = torch.nn.functional.interpolate
        return resize(grey, (SIZE, SIZE), mode="bilinear", antialias=True)[0, 0].numpy()

    return on_threads(one, stack)


def with_plain_dali(stack: ExitStack) -> Prepare:
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def
    def graph(source: Any) -> Any:
        films = fn.external_source(source=source, batch=True, dtype=types.UINT8, ndim=1, no_copy=True)
        grey = fn.decoders.image(films, output_type=types.GRAY)
        return fn.resize(grey, size=(SIZE, SIZE), interp_type=types.INTERP_TRIANGULAR, antialias=True)

    batch = 32 * THREADS
    under_way: list[list[np.ndarray]] = []

    def prepare(films: list[Path]) -> np.ndarray:
        nonlocal batches
        batches = (films[first : first + batch] for first in range(0, len(films), batch))
        images = []
        while True:
            try:
                (prepared,) = pipeline.run()
            except StopIteration:
                pipeline.reset()
                under_way.clear()
                return np.concatenate(images)[..., 0]
            images.append(np.array(prepared.as_tensor()))

    def source() -> list[np.ndarray]:
        under_way.append([np.fromfile(film, np.uint8) for film in next(batches)])
        return under_way[-1]

    batches: Iterator[list[Path]] = iter(())
    pipeline = graph(source, batch_size=batch, num_threads=THREADS, device_id=None, prefetch_queue_depth=2)
    return prepare


def with_backend(name: str) -> Callable[[ExitStack], Prepare]:
    """As prep uses it: the films shared among as many calls as may be under way at once."""

    def make(stack: ExitStack) -> Prepare:
        if reason := missing(name):
            pytest.skip(reason)
        decoder = stack.enter_context(choose_decoder(name, THREADS)[0])
        calls = stack.enter_context(ThreadPoolExecutor(decoder.calls))

        def prepare(films: list[Path]) -> np.ndarray:
            images = np.empty((len(films), SIZE, SIZE), np.uint8)
            shares = [slice(first, None, decoder.calls) for first in range(decoder.calls)]
            decoded = calls.map(lambda share: decoder.decode_resize(films[share], SIZE), shares)
            for share, part in zip(shares, decoded, strict=True):
                images[share] = part.images
            return images

        return prepare

    return make


WAYS: dict[str, tuple[Callable[[ExitStack], Prepare], int]] = {  # → levels from Pillow that are allowed
    **{name: (with_backend(name), 1 if name == "dali" else 0) for name in BACKENDS},
    "dali plain": (with_plain_dali, 255),
    "opencv, area": (with_opencv, 255),
    "torchvision": (with_torchvision, 1),
}


@pytest.fixture(scope="module")
def expected(films: list[Path]) -> np.ndarray:
    decoder, _ = choose_decoder("pillow", THREADS)
    assert decoder.pixel_rule == PIXEL_RULE
    with decoder:
        return decoder.decode_resize(films, SIZE).images


@pytest.mark.films
@pytest.mark.parametrize("way", WAYS)
def test_films_to_prepared_images(benchmark: Any, films: list[Path], expected: np.ndarray, way: str) -> None:
    make, allowed = WAYS[way]
    with ExitStack() as stack:
        prepare = make(stack)
        greatest = int(np.abs(prepare(films).astype(int) - expected).max())
        assert greatest <= allowed
        benchmark.group = f"{len(films)} films, {THREADS} threads"
        benchmark.pedantic(prepare, (films,), rounds=3)
    benchmark.extra_info |= {
        "images_per_second": round(len(films) / benchmark.stats.stats.median, 1),
        "threads": THREADS,
        "levels_from_pillow": greatest,
    }


@pytest.mark.films
def test_dali_native_keeps_pace_with_native(benchmark: Any, films: list[Path]) -> None:
    """In turns, so that what else the machine does falls on both; the ratio is of the medians."""
    with ExitStack() as stack:
        ways = {name: with_backend(name)(stack) for name in ("native", "dali-native")}
        assert np.array_equal(*(prepare(films) for prepare in ways.values()))
        seconds: dict[str, list[float]] = {name: [] for name in ways}

        def take_turns() -> None:
            for name, prepare in ways.items():
                began = time.perf_counter()
                prepare(films * 4)
                seconds[name].append(time.perf_counter() - began)

        benchmark.pedantic(take_turns, rounds=PASSES)
    native, inside = (statistics.median(seconds[name]) for name in ways)
    benchmark.extra_info |= {"speed_of_dali_native_over_native": round(native / inside, 3), "threads": THREADS}
    print(f"dali-native reaches {native / inside:.1%} of native's speed (medians of {PASSES}, {THREADS} threads)")
