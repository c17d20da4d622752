"""The DALI backends' dangers: a border that is not Pillow's, a broken film that ends the run or is lost, pixels that
depend on the backend without anyone saying so, an operator that was built for another DALI, memory that grows.
"""

from __future__ import annotations

import ctypes
import json
import resource
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import file_name, film, pillow_prepared, png, write_csv, write_films
from png_files import KINDS, chunks_of, filtered_rows, idats, ihdr, join

from cxrfast.cli.prep import main
from cxrfast.decode import PIXEL_RULE, Code, Decoder, Status, backends
from cxrfast.errors import InputError, ResourceError
from cxrfast.store import Store, open_store

if reason := backends.missing("dali"):
    pytest.skip(reason, allow_module_level=True)

from nvidia.dali import fn, pipeline_def, types

from cxrfast.decode import dali
from cxrfast.decode.native import NativeDecoder

needs_operator = pytest.mark.skipif(
    bool(backends.missing("dali-native")), reason=backends.missing("dali-native") or "ready"
)


def fused() -> Decoder:
    return dali.DaliNativeDecoder(2)


def operator_and_resize() -> Decoder:
    return dali.DaliNativeDecoder(2, dali_resize=True)


def dali_alone() -> Decoder:
    return dali.DaliDecoder(2)


MAKERS = [
    dali_alone,
    pytest.param(operator_and_resize, marks=needs_operator),
    pytest.param(fused, marks=needs_operator),
]


@pytest.fixture(scope="module", params=MAKERS, ids=lambda maker: maker.__name__)
def decoder(request: pytest.FixtureRequest) -> Iterator[Decoder]:
    """Each variant that runs on a CPU."""
    with request.param() as made:
        yield made


@pytest.fixture(scope="module")
def native() -> NativeDecoder:
    return NativeDecoder(2)


def tolerance(decoder: Decoder) -> int:
    """Levels by which an image may differ from Pillow's: the rule's, or one more rounding than Pillow does."""
    return 0 if decoder.pixel_rule == PIXEL_RULE else 1


def difference(images: np.ndarray, others: np.ndarray) -> int:
    """The greatest, in levels."""
    return int(np.abs(images.astype(np.int16) - others.astype(np.int16)).max())


# ---- pixels ----

SIDES = [(64, 64), (1, 1), (1, 50), (50, 1), (2, 2), (3, 5), (7, 300), (97, 101), (224, 224), (225, 223), (449, 1000)]


@pytest.mark.parametrize("size", [8, 9, 64, 224])
def test_pixels_of_white_noise(decoder: Decoder, size: int) -> None:
    """White noise at the edge is what DALI's own border rule gets most wrong: there it is off by 28 levels and more."""
    rng = np.random.default_rng(size)
    files = [png(rng.integers(0, 256, side, np.uint8)) for side in SIDES]
    decoded = decoder.decode_resize(files, size)
    assert all(status.ok for status in decoded.statuses)
    for file, image, total, squares in zip(files, *decoded[0:1], *decoded[2:], strict=True):
        assert difference(image, pillow_prepared(file, size)) <= tolerance(decoder)
        assert total == image.astype(int).sum()
        assert squares == (image.astype(int) ** 2).sum()


def test_every_kind_of_png_is_grey_as_the_native_decoder_has_it(decoder: Decoder, native: NativeDecoder) -> None:
    rng = np.random.default_rng(1)
    files = []
    for color, depth in KINDS:
        for interlace in (0, 1):
            rows = filtered_rows(rng, 40, 30, color, depth, interlace)
            palette = [(b"PLTE", rng.bytes(3 * (1 << depth)))] if color == 3 else []
            stream = zlib.compress(rows)
            files.append(join([ihdr(40, 30, color, depth, interlace), *palette, *idats(stream), (b"IEND", b"")]))
    decoded, expected = decoder.decode_resize(files, 16), native.decode_resize(files, 16)
    assert decoded.statuses == expected.statuses
    assert all(status.ok for status in decoded.statuses)
    assert difference(decoded.images, expected.images) <= tolerance(decoder)


@pytest.mark.films
@pytest.mark.slow
def test_real_films(decoder: Decoder, native: NativeDecoder, films: list[Path]) -> None:
    """All 211 at the paper's size. The native decoder stands for Pillow, to which its own tests hold it."""
    decoded, expected = decoder.decode_resize(films, 224), native.decode_resize(films, 224)
    assert all(status.ok for status in decoded.statuses)
    greatest = difference(decoded.images, expected.images)
    print(f"{decoder.name}, {decoder.pixel_rule}: at most {greatest} levels from Pillow over {len(films)} films")
    assert greatest <= tolerance(decoder)
    assert difference(decoded.images[:1], pillow_prepared(films[0].read_bytes(), 224)[None]) <= tolerance(decoder)
    if tolerance(decoder) == 0:
        assert np.array_equal(decoded.pixel_sum, expected.pixel_sum)
        assert np.array_equal(decoded.pixel_sumsq, expected.pixel_sumsq)


def test_out_is_written_in_place(decoder: Decoder) -> None:
    out = np.full((3, 16, 16), 7, np.uint8)
    files = [png(film(0)), b"no film", png(film(1))]
    decoded = decoder.decode_resize(files, 16, out)
    assert decoded.images is out
    assert not out[1].any()
    assert difference(out[2], pillow_prepared(files[2], 16)) <= tolerance(decoder)


@pytest.mark.parametrize("count", [0, 1, 64, 65, 200])
def test_batches_of_any_length(decoder: Decoder, count: int) -> None:
    """64 films are one run of two threads: the last run may be whole, short or absent."""
    files = [png(film(index, 20)) for index in range(count)]
    decoded = decoder.decode_resize(files, 8)
    assert decoded.images.shape == (count, 8, 8)
    assert decoded.statuses == [Status()] * count
    for file, image in zip(files, decoded.images, strict=True):
        assert difference(image, pillow_prepared(file, 8)) <= tolerance(decoder)


# ---- broken films ----


def broken(good: bytes) -> dict[str, bytes]:
    """A film, damaged in the seven ways that prep must know, and in some that pass a look at the chunks."""
    idat = good.index(b"IDAT")
    flipped, wrong_crc, huge = bytearray(good), bytearray(good), bytearray(good)
    flipped[idat + 40] ^= 0x10
    wrong_crc[good.index(b"IEND") - 5] ^= 0xFF
    huge[16:24] = (60_000).to_bytes(4, "big") * 2
    huge[29:33] = zlib.crc32(bytes(huge[12:29])).to_bytes(4, "big")
    parts = chunks_of(good)
    stream = b"".join(data for name, data in parts if name == b"IDAT")
    head = [parts[0]]
    tail = [(b"IEND", b"")]
    adler = bytearray(stream)
    adler[-1] ^= 1
    block = bytearray(stream)
    block[2] |= 6
    rows = bytearray(zlib.decompress(stream))
    rows[0] = 5
    return {
        "truncated": good[: len(good) // 2],
        "flipped": bytes(flipped),
        "wrong crc": bytes(wrong_crc),
        "no png": b"this is not a film",
        "empty": b"",
        "huge": bytes(huge),
        "no idat": good[: idat - 4] + good[good.index(b"IEND") - 4 :],
        "adler": join([*head, *idats(bytes(adler)), *tail]),
        "block": join([*head, *idats(bytes(block)), *tail]),
        "short": join([*head, *idats(stream[: len(stream) // 2]), *tail]),
        "filter": join([*head, *idats(zlib.compress(bytes(rows))), *tail]),
        "jpeg": b"\xff\xd8\xff\xe0 and so on",
    }


@pytest.mark.parametrize("as_paths", [False, True], ids=["bytes", "paths"])
def test_broken_films_end_as_with_the_native_decoder(
    decoder: Decoder, native: NativeDecoder, tmp_path: Path, as_paths: bool
) -> None:
    """Each between two sound ones: same codes, words and bytes, and the neighbours are there."""
    good = png(film(0))
    files: list[bytes | Path] = [good]
    for index, bad in enumerate(broken(good).values()):
        files += [bad, png(film(index))]
    if as_paths:
        for index, file in enumerate(files):
            assert isinstance(file, bytes)
            (tmp_path / f"{index}.png").write_bytes(file)
        files = [tmp_path / f"{index}.png" for index in range(len(files))]
        files += [tmp_path / "absent.png", tmp_path]
    decoded, expected = decoder.decode_resize(files, 16), native.decode_resize(files, 16)
    assert decoded.statuses == expected.statuses
    assert {status.code for status in decoded.statuses} == set(Code)
    assert difference(decoded.images, expected.images) <= tolerance(decoder)
    for status, image, total, squares in zip(decoded.statuses, *decoded[0:1], *decoded[2:], strict=True):
        assert status.ok or (not image.any() and total == 0 and squares == 0)


def test_nothing_but_broken_films(decoder: Decoder, native: NativeDecoder) -> None:
    files = list(broken(png(film(0))).values()) * 12
    decoded = decoder.decode_resize(files, 16)
    assert decoded.statuses == native.decode_resize(files, 16).statuses
    assert not decoded.images.any()


@pytest.mark.parametrize("nonsense", [3, None, "a\0b"])
def test_a_film_that_is_none(decoder: Decoder, nonsense: object) -> None:
    good = png(film(0))
    with pytest.raises((TypeError, InputError)):
        decoder.decode_resize([good, nonsense], 16)  # type: ignore[list-item]
    assert difference(decoder.decode_resize([good], 16).images, pillow_prepared(good, 16)[None]) <= tolerance(decoder)


class Trusting:
    """A native decoder that finds nothing wrong, so that DALI's decoder meets broken films."""

    def __init__(self) -> None:
        self.native = NativeDecoder(1)

    def decode_resize(self, films: list[bytes], size: int) -> object:
        decoded = self.native.decode_resize(films, size)
        return decoded if size == 16 else decoded._replace(statuses=[Status()] * len(films))


def test_a_film_that_only_dali_cannot_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """DALI's pipeline is lost with it; the films around it are not, and the film goes to the native decoder."""
    good = [png(film(index, 40)) for index in range(100)]
    bad = good[70][:45] + b"\0" * 20 + good[70][65:]
    with dali.DaliDecoder(1) as decoder:
        monkeypatch.setattr(decoder, "_native", Trusting())
        with pytest.warns(RuntimeWarning, match="DALI failed on 1 sound film"):
            decoded = decoder.decode_resize([*good[:70], bad, *good[71:]], 16)
        assert [row for row, status in enumerate(decoded.statuses) if not status.ok] == [70]
        assert not decoded.images[70].any()
        for row in (*range(70), *range(71, 100)):
            assert difference(decoded.images[row], pillow_prepared(good[row], 16)) <= 1
        assert decoder.decode_resize(good[:3], 16).statuses == [Status()] * 3  # and the next call is as ever


def test_a_dali_that_fails_always_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = png(film(0))[:45] + b"\0" * 40
    with dali.DaliDecoder(1) as decoder:
        monkeypatch.setattr(decoder, "_native", Trusting())
        with pytest.raises(ResourceError, match="DALI fails on every film"):
            decoder.decode_resize([bad] * 3, 16)


# ---- memory ----


class Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2, of which two fields are read."""

    _fields_ = [("before", ctypes.c_size_t * 4), ("hblkhd", ctypes.c_size_t), ("between", ctypes.c_size_t * 2)]
    _fields_ += [("uordblks", ctypes.c_size_t), ("behind", ctypes.c_size_t * 2)]


def memory_mib() -> tuple[float, float]:
    """(allocated and not freed, resident) of this process in MiB, when the free part of the heap has been given back.

    Resident memory moves by tens of MiB with what the heap keeps for itself; what is allocated, by tenths.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("this C library does not say how much is allocated (mallinfo2, glibc 2.33)")
    libc.mallinfo2.restype = Mallinfo
    libc.malloc_trim(0)
    info = libc.mallinfo2()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return (info.uordblks + info.hblkhd) / 2**20, pages * resource.getpagesize() / 2**20


@pytest.mark.films
@pytest.mark.slow
def test_memory_does_not_grow_over_20_epochs(decoder: Decoder, films: list[Path]) -> None:
    """A third of the sample where DALI's own decoder or resize makes an epoch long. An epoch's images are then 3.4 MiB,
    its files 28 MiB: what is lost of either shows 11 times between the two measurements. A file that stays mapped is in
    resident memory only.
    """
    sample = films if decoder.pixel_rule == PIXEL_RULE else films[::3]
    allocated: list[float] = []
    resident: list[float] = []
    for _ in range(20):
        decoder.decode_resize(sample, 224)
        for values, value in zip((allocated, resident), memory_mib(), strict=True):
            values.append(value)
    print(
        f"{decoder.name}, {decoder.pixel_rule}: {allocated[4]:.1f} MiB allocated after 5 epochs, "
        f"{allocated[-1]:.1f} after 20; resident {resident[4]:.0f} and {resident[-1]:.0f}"
    )
    assert min(allocated[-5:]) - min(allocated[4:9]) < 24  # batches that wait in the pipeline come and go
    assert min(resident[-5:]) - min(resident[4:9]) < 128


# ---- the operators by themselves ----


def run_graph(build: Callable[..., Any], *inputs: list[np.ndarray]) -> tuple[Any, ...]:
    """The outputs of one run of a graph over these inputs."""
    pipeline = pipeline_def(build)(batch_size=len(inputs[0]), num_threads=2, device_id=None, prefetch_queue_depth=1)
    return tuple(pipeline.run(**{f"in{place}": given for place, given in enumerate(inputs)}))


def source(place: int, dtype: Any = types.UINT8) -> Any:
    return fn.external_source(name=f"in{place}", dtype=dtype, ndim=1)


@needs_operator
def test_the_operators_in_a_graph_of_ones_own() -> None:
    dali.load_operators()
    images = [film(index, side) for index, side in enumerate((40, 17, 90))]
    files = [np.frombuffer(file, np.uint8) for file in (*map(png, images), b"broken", png(film(3))[:100])]

    def graph() -> Any:
        return *fn.cxrfast.decode(source(0)), *fn.cxrfast.decode_resize(source(1), size=16)

    whole, statuses, messages, prepared, *same = run_graph(graph, files, files)
    for index, image in enumerate(images):
        assert np.array_equal(np.asarray(whole[index])[..., 0], image)
        assert np.array_equal(np.asarray(prepared[index])[..., 0], pillow_prepared(files[index].tobytes(), 16))
    assert whole.layout() == prepared.layout() == "HWC"
    assert [np.asarray(whole[index]).shape for index in (3, 4)] == [(1, 1, 1)] * 2
    assert np.asarray(statuses.as_tensor()).tolist() == np.asarray(same[0].as_tensor()).tolist()
    assert [np.asarray(status)[0] for status in statuses] == [Code.OK] * 3 + [Code.UNSUPPORTED, Code.CORRUPT]
    said = [[np.asarray(message).tobytes().decode() for message in all_] for all_ in (messages, same[2])]
    assert said[0] == said[1] == ["", "", "", "not a PNG file", "truncated chunk"]


@needs_operator
@pytest.mark.parametrize("operator", ["decode", "decode_resize"])
def test_the_operators_refuse_wrong_use(operator: str) -> None:
    dali.load_operators()
    made = getattr(fn.cxrfast, operator)
    size = {"size": 16} if operator == "decode_resize" else {}
    file = np.frombuffer(png(film(0)), np.uint8)
    with pytest.raises(TypeError, match="must be uint8"):
        run_graph(lambda: tuple(made(source(0, types.INT32), **size)), [np.zeros(4, np.int32)])
    with pytest.raises(ValueError, match="null character"):
        run_graph(lambda: tuple(made(source(0), source(1), **size)), [file], [np.frombuffer(b"a.png", np.uint8)])


@needs_operator
@pytest.mark.parametrize("size", [7, 1025])
def test_the_operator_refuses_a_size_out_of_range(size: int) -> None:
    dali.load_operators()
    with pytest.raises(ValueError, match=f"8 to 1024 pixels, got {size}"):
        run_graph(lambda: tuple(fn.cxrfast.decode_resize(source(0), size=size)), [np.zeros(4, np.uint8)])


@needs_operator
def test_the_operators_say_what_they_do() -> None:
    dali.load_operators()
    assert "convert" in fn.cxrfast.decode.__doc__ and "Outputs" in fn.cxrfast.decode.__doc__
    assert "8 to 1024" in fn.cxrfast.decode_resize.__doc__


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["dali", pytest.param("dali-native", marks=needs_operator)])
def test_a_gpu_resizes_within_one_level(backend: str, native: NativeDecoder) -> None:
    """The graph is the one that the tests above run on the CPU; what is left to see is DALI's GPU side."""
    rng = np.random.default_rng(4)
    good = [png(rng.integers(0, 256, side, np.uint8)) for side in SIDES]
    files = [file for pair in zip(good, broken(good[0]).values(), strict=False) for file in pair]
    decoder, why = backends.choose_decoder(backend, 2, require_gpu=True)
    assert "GPU" in why and decoder.pixel_rule == dali.DALI_RULE
    with decoder:
        for size in (8, 64, 224):
            decoded, expected = decoder.decode_resize(files, size), native.decode_resize(files, size)
            assert decoded.statuses == expected.statuses
            assert difference(decoded.images, expected.images) <= 1


# ---- prep ----


def prep(*arguments: object) -> int:
    return main(["--workers", "2", *(str(argument) for argument in arguments)])


BACKENDS = ["pillow", "native", "dali", pytest.param("dali-native", marks=needs_operator)]


def assert_same(store: Store, other: Store) -> None:
    """Rows, ledger and counts are the same, and so are the pixels as far as their rules say."""
    assert store.ledger().equals(other.ledger())
    assert store.manifest["counts"] == other.manifest["counts"]
    assert store.manifest["rejected"] == other.manifest["rejected"]
    same_rule = store.pixel_rule == other.pixel_rule
    of_pixels = [] if same_rule else ["pixel_sum", "pixel_sumsq", "crc32"]
    pd.testing.assert_frame_equal(store.index.drop(columns=of_pixels), other.index.drop(columns=of_pixels))
    assert difference(store.images, other.images) <= (0 if same_rule else 1)


@pytest.mark.films
@pytest.mark.slow
def test_the_store_and_the_ledger_do_not_depend_on_the_backend(tmp_path: Path, films: list[Path]) -> None:
    """200 films, seven of them corrupt in seven ways."""
    images = tmp_path / "films" / "images"
    images.mkdir(parents=True)
    for index in range(200):
        shutil.copy(films[index], images / file_name(index))
    for index, (_, bad) in zip(range(10, 200, 25), list(broken(films[0].read_bytes()).items())[:7], strict=False):
        (images / file_name(index)).write_bytes(bad)
    write_csv(tmp_path / "films" / "Data_Entry_2017_v2020.csv", 200)
    stores = {}
    for backend in ["pillow", "native", "dali", "dali-native"]:
        if not backends.missing(backend):
            assert prep(tmp_path / "films", tmp_path / backend, "--backend", backend) == 0
            stores[backend] = open_store(tmp_path / backend)
            assert stores[backend].manifest["backend"] == backend
    assert stores["pillow"].manifest["counts"]["images"] == 193
    assert stores["pillow"].manifest["rejected"] == {"corrupt": 5, "too_large": 1, "unsupported": 1}
    for store in stores.values():
        assert_same(store, stores["pillow"])


def test_small_stores_are_the_same(tmp_path: Path) -> None:
    write_films(tmp_path / "films", 30)
    for index, bad in enumerate(list(broken(png(film(0))).values())[:7]):
        (tmp_path / "films" / "images" / file_name(3 * index)).write_bytes(bad)
    stores = {}
    for backend in ["native", "dali", "dali-native"]:
        if not backends.missing(backend):
            assert prep(tmp_path / "films", tmp_path / backend, "--size", 24, "--backend", backend) == 0
            stores[backend] = open_store(tmp_path / backend)
    for store in stores.values():
        assert_same(store, stores["native"])


def test_rules_do_not_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_films(tmp_path / "films", 6)
    assert prep(tmp_path / "films", tmp_path / "store", "--size", 16, "--backend", "dali") == 0
    assert open_store(tmp_path / "store").manifest["pixel_rule"] == dali.DALI_RULE
    capsys.readouterr()
    assert prep(tmp_path / "films", tmp_path / "store", "--size", 16, "--backend", "native") == 2
    assert "another pixel rule (dali-triangle, now pillow-bilinear)" in capsys.readouterr().err


# ---- the choice ----


def test_auto_takes_the_fastest_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_films(tmp_path / "films", 3)
    assert prep(tmp_path / "films", tmp_path / "store", "--size", 16) == 0
    printed = capsys.readouterr()
    said = [line for line in printed.err.splitlines() if line.startswith("decoding with")]
    assert said == ["decoding with native: 2 threads, the fastest that is installed (no GPU decodes PNG)"]
    assert json.loads(printed.out.splitlines()[-1])["backend"] == "native"


@pytest.mark.parametrize("backend", ["auto", "dali", pytest.param("dali-native", marks=needs_operator)])
def test_a_required_gpu_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr(dali, "gpu_count", lambda: 0)
    write_films(tmp_path / "films", 3)
    assert prep(tmp_path / "films", tmp_path / "store", "--backend", backend, "--require-gpu") == 2
    assert "finds no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("backend", ["native", "pillow"])
def test_a_required_gpu_that_the_backend_does_not_use(backend: str) -> None:
    with pytest.raises(InputError, match="uses no GPU"):
        backends.choose_decoder(backend, 1, require_gpu=True)


def test_without_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "dali_version", lambda: "")
    for backend in ("dali", "dali-native"):
        with pytest.raises(InputError, match=r"pip install 'cxrfast\[dali\]'"):
            backends.choose_decoder(backend, 1)
    decoder, _ = backends.choose_decoder("auto", 1)
    assert decoder.name == "native"


@needs_operator
def test_another_dali_than_the_operator_was_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    built_for = backends.dali_version()
    monkeypatch.setattr(backends, "dali_version", lambda: "1.0.0")
    with pytest.raises(InputError, match=f"built for DALI {built_for}, and 1.0.0 is installed"):
        backends.choose_decoder("dali-native", 1)


@pytest.mark.parametrize(
    ("note", "said"),
    [
        (None, "was not built; reinstall"),
        ({"dali": "", "reason": "no CUDA headers"}, r"was not built \(no CUDA headers\)"),
        ({"dali": "2.4.0", "reason": ""}, "is not there"),
    ],
)
def test_an_operator_that_was_not_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: dict[str, str] | None, said: str
) -> None:
    monkeypatch.setattr(backends, "operator_path", lambda: tmp_path / "_dali_operator.so")
    if note is not None:
        (tmp_path / "_dali_build.json").write_text(json.dumps(note))
    with pytest.raises(InputError, match=said):
        backends.choose_decoder("dali-native", 1)
