"""The DALI backends: the films go through an NVIDIA DALI pipeline, on a GPU where one is asked for.

    dali         DALI's own decoder and resize
    dali-native  cxrfast's decoder as an operator of the pipeline (csrc/dali); it resizes too, unless a GPU is to

One graph serves both devices: every line but the device's name runs on a CPU. What DALI resizes is within one level of
the pixel rule everywhere and has a rule of its own, ``dali-triangle``; what the operator resizes is the pixel rule
itself, bit for bit.

Nothing in DALI decodes PNG on a GPU: its device ``mixed`` decodes on the CPU and uploads the image.

One broken film would end DALI's run, so cxrfast's decoder sees every film before DALI's does, and the statuses are
those of the native backend. Left out: several GPUs, and what is not PNG (``UNSUPPORTED``).
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.backend import GetCUDADeviceCount
from nvidia.dali.plugin_manager import load_library

from cxrfast.decode import MIN_SIZE, PIXEL_RULE, Code, Decoded, Film, Status
from cxrfast.decode.backends import available_cores, missing, operator_path
from cxrfast.decode.native import NativeDecoder, check_isa, prepared_array, split_film
from cxrfast.errors import InputError, ResourceError

DALI_RULE = "dali-triangle"
"""The pixel rule to within one level: DALI's triangle filter with antialiasing, borders renormalised as Pillow does."""

_RUN_FILMS = 32  # films of one run of the pipeline, for each thread
_RUNS_AHEAD = 2  # runs that DALI has under way at once
_GREY8 = bytes([8, 0, 0, 0, 0])  # a film's bytes 24 to 28: 8 bits, grey, deflate, adaptive filters, not interlaced


def gpu_count() -> int:
    """CUDA devices that DALI can use."""
    try:
        return int(GetCUDADeviceCount())
    except RuntimeError:  # a driver that is broken, or too old for this DALI
        return 0


class _Run(NamedTuple):
    """What one run of the pipeline is given. DALI does not copy the films' bytes: this keeps them until it is done."""

    rows: list[int]  # the films' places in the batch
    inputs: tuple[list[np.ndarray], ...]  # one list for each input of the graph; uint8, 1-D


class DaliDecoder:
    """DALI's own decoder on ``threads`` threads (default: one for each core this process may use).

    The pipeline is built at the first call for a size and lives until ``close``. A call streams its films through it,
    ``32 * threads`` a run, and reads and checks the films of one run while DALI works at the runs before.

    Args:
        threads: of DALI's thread pool.
        gpu: resize on the first CUDA device.
    Raises:
        InputError: ``gpu`` where DALI finds no CUDA device; threads below 1.
    """

    name = "dali"
    pixel_rule = DALI_RULE

    def __init__(self, threads: int | None = None, *, gpu: bool = False) -> None:
        if gpu and not gpu_count():
            raise InputError("DALI finds no CUDA device; leave --require-gpu out to decode on the CPU")
        self._threads = available_cores() if threads is None else threads
        self._native = NativeDecoder(self._threads)
        self.calls = 1
        self.batch_films = 4 * _RUN_FILMS * self._threads
        self._gpu = gpu
        self._pipeline: Any = None
        self._size = 0
        self._runs: Iterator[_Run] = iter(())  # where DALI's external source gets its next run
        self._under_way: deque[_Run] = deque()  # given to DALI, not delivered yet

    def __enter__(self) -> DaliDecoder:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the pipeline: its threads, its memory, what it has under way. A later call builds it anew."""
        self._pipeline = None
        self._under_way.clear()

    def decode_resize(self, films: Sequence[Film], size: int, out: np.ndarray | None = None) -> Decoded:
        """Decode N films to grey and resize them to (size, size). A bad film never raises: its status says why.

        Args:
            films: N PNG files, as bytes or as paths.
            size: S, the side of the prepared image in pixels; 8 to 1024.
            out: uint8 (N, S, S), C-contiguous, written in place and returned as ``images``; made when absent.
        Raises:
            InputError: a size out of range, an ``out`` of another shape, an unknown CXRFAST_ISA.
            TypeError: a film that is neither bytes nor a path.
            ResourceError: DALI fails on every film that it has under way (a lost GPU, no memory).
        """
        check_isa()
        for film in films:
            split_film(film)
        images = prepared_array(len(films), size, out)
        sums, sums_sq = np.zeros(len(films), np.int64), np.zeros(len(films), np.int64)
        decoded = Decoded(images, [Status()] * len(films), sums, sums_sq)
        runs = self._prepare(films, decoded)
        try:
            while True:
                try:
                    self._stream(runs, size, decoded)
                    return decoded
                except RuntimeError as error:
                    lost = list(self._under_way)
                    if not lost:  # it came from elsewhere
                        raise
                    self.close()  # a pipeline that has failed once is of no more use
                    self._retry(lost, films, size, decoded, error)
        except BaseException:
            self.close()
            raise

    def _stream(self, runs: Iterator[_Run], size: int, decoded: Decoded) -> None:
        """Run the pipeline until the last of ``runs`` has been delivered. RuntimeError: DALI failed."""
        if self._pipeline is None or self._size != size:
            self.close()
            self._pipeline, self._size = self._build(size), size
        self._runs = runs
        while True:
            try:
                outputs = self._pipeline.run()
            except StopIteration:
                self._pipeline.reset()
                return
            arrays = [np.asarray(output.as_cpu().as_tensor()) for output in outputs[: self._dense_outputs]]
            self._deliver(self._under_way[0].rows, [*arrays, *outputs[self._dense_outputs :]], decoded)
            self._under_way.popleft()

    def _next_run(self) -> tuple[list[np.ndarray], ...]:
        """DALI's external source; StopIteration when ``_runs`` is at its end."""
        run = next(self._runs)
        self._under_way.append(run)
        return run.inputs

    def _retry(self, lost: list[_Run], films: Sequence[Film], size: int, decoded: Decoded, error: RuntimeError) -> None:
        """Give the films of failed runs to DALI one by one, and those that fail again to the native decoder."""
        failed: list[int] = []
        for run in lost:
            for place, row in enumerate(run.rows):
                single = _Run([row], tuple([films_[place]] for films_ in run.inputs))
                try:
                    self._stream(iter([single]), size, decoded)
                except RuntimeError as failure:
                    self.close()
                    failed.append(row)
                    error = failure
        reason = _reason(error)
        if len(failed) == sum(len(run.rows) for run in lost) > 1:
            raise ResourceError(f"DALI fails on every film ({reason}); use --backend native, or repeat the command")
        self._decode_natively(failed, films, size, decoded)
        if failed:
            warnings.warn(
                f"DALI failed on {len(failed)} sound films ({reason}); the native decoder took them",
                RuntimeWarning,
                stacklevel=3,
            )

    def _decode_natively(self, rows: list[int], films: Sequence[Film], size: int, decoded: Decoded) -> None:
        whole = self._native.decode_resize([films[row] for row in rows], size)
        decoded.images[rows] = whole.images
        decoded.pixel_sum[rows], decoded.pixel_sumsq[rows] = whole.pixel_sum, whole.pixel_sumsq
        for row, status in zip(rows, whole.statuses, strict=True):
            decoded.statuses[row] = status

    def _pipeline_options(self) -> dict[str, Any]:
        return {
            "batch_size": _RUN_FILMS * self._threads,
            "num_threads": self._threads,
            "device_id": 0 if self._gpu else None,
            "prefetch_queue_depth": _RUNS_AHEAD,
        }

    # ---- what differs between the two backends ----

    _dense_outputs = 1  # the graph's first outputs, of one shape for all films; the others are used film by film

    def _prepare(self, films: Sequence[Film], decoded: Decoded) -> Iterator[_Run]:
        """Check the films, settle those that are not for DALI's decoder, and yield the others run by run.

        DALI's decoder gets 8-bit grey only, which is nearly all of them: its grey of other kinds is not Pillow's.
        """
        size = decoded.images.shape[1]
        for first in range(0, len(films), _RUN_FILMS * self._threads):
            rows = range(first, min(first + _RUN_FILMS * self._threads, len(films)))
            checked = self._native.decode_resize([films[row] for row in rows], MIN_SIZE)
            run, others = _Run([], ([],)), []
            for row, status in zip(rows, checked.statuses, strict=True):
                data = _read(films[row]) if status.ok else b""
                if data[24:29] == _GREY8:
                    run.rows.append(row)
                    run.inputs[0].extend(_arrays([data]))
                else:
                    others.append(row)
            self._decode_natively(others, films, size, decoded)
            if run.rows:
                yield run

    def _build(self, size: int) -> Any:
        return _dali_graph(self._next_run, size, self._gpu, **self._pipeline_options())

    def _deliver(self, rows: list[int], outputs: list[Any], decoded: Decoded) -> None:
        """Copy the outputs of one run to their places."""
        _deliver_images(rows, outputs[0], decoded)


class DaliNativeDecoder(DaliDecoder):
    """cxrfast's decoder as a DALI operator, on DALI's threads, which read the files too.

    Args:
        threads: of DALI's thread pool; default: one for each core this process may use.
        gpu: the first CUDA device resizes; otherwise the operator does.
        dali_resize: DALI resizes on the CPU as it would on a GPU.
    Raises:
        InputError: the operator does not fit the installed DALI; ``gpu`` where DALI finds no CUDA device.
    """

    name = "dali-native"

    def __init__(self, threads: int | None = None, *, gpu: bool = False, dali_resize: bool = False) -> None:
        super().__init__(threads, gpu=gpu)
        self._fused = not gpu and not dali_resize
        self.pixel_rule = PIXEL_RULE if self._fused else DALI_RULE
        self._dense_outputs = 3 if self._fused else 2
        load_operators()

    def _prepare(self, films: Sequence[Film], decoded: Decoded) -> Iterator[_Run]:
        for first in range(0, len(films), _RUN_FILMS * self._threads):
            rows = list(range(first, min(first + _RUN_FILMS * self._threads, len(films))))
            data, paths = zip(*(split_film(films[row]) for row in rows), strict=True)
            # a path ends with a null character, so an empty one is none
            named = [b"" if path is None else path + b"\0" for path in paths]
            yield _Run(rows, (_arrays([b"" if film is None else film for film in data]), _arrays(named)))

    def _build(self, size: int) -> Any:
        return _native_graph(self._next_run, size, self._gpu, self._fused, **self._pipeline_options())

    def _deliver(self, rows: list[int], outputs: list[Any], decoded: Decoded) -> None:
        images, status, *sums, messages = outputs
        if self._fused:
            decoded.images[rows] = images[..., 0]
            decoded.pixel_sum[rows], decoded.pixel_sumsq[rows] = sums[0].T
        else:
            _deliver_images(rows, images, decoded)
        for place in np.flatnonzero(status[:, 0]):
            code, offset = status[place].tolist()
            message = np.asarray(messages[int(place)]).tobytes().decode()
            decoded.statuses[rows[place]] = Status(Code(code), message, offset)


def load_operators() -> None:
    """Make ``nvidia.dali.fn.cxrfast.decode`` and ``nvidia.dali.fn.cxrfast.decode_resize`` known to DALI.

    Raises:
        InputError: they were not built, or not for the DALI that is installed.
    """
    if reason := missing("dali-native"):
        raise InputError(reason)
    try:
        load_library(str(operator_path()))
    except RuntimeError as error:
        raise InputError(f"DALI cannot load cxrfast's operator ({error}); reinstall cxrfast") from error


def _read(film: Film) -> bytes:
    """A film that has been read before; empty if it is gone since."""
    if isinstance(film, (str, Path)):
        try:
            return Path(film).read_bytes()
        except OSError:
            return b""
    return film


def _reason(error: RuntimeError) -> str:
    """The sentence of DALI's error that says what happened, out of the tracebacks around it."""
    lines = [line for line in str(error).rpartition("encountered:")[2].splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


def _arrays(films: Sequence[bytes]) -> list[np.ndarray]:
    return [np.frombuffer(film, np.uint8) for film in films]


def _deliver_images(rows: list[int], images: np.ndarray, decoded: Decoded) -> None:
    """images: uint8 (n, S, S, 1)."""
    decoded.images[rows] = images[..., 0]
    flat = images.reshape(len(rows), -1)
    decoded.pixel_sum[rows] = flat.sum(axis=1, dtype=np.int64)
    decoded.pixel_sumsq[rows] = np.square(flat, dtype=np.uint16).sum(axis=1, dtype=np.int64)


# ---- the graphs ----


@pipeline_def
def _dali_graph(source: Any, size: int, gpu: bool) -> Any:
    """Films (uint8, 1-D) to prepared images (uint8 (S, S, 1))."""
    (films,) = _inputs(source, 1)
    grey = fn.decoders.image(films, device="mixed" if gpu else "cpu", output_type=types.GRAY)
    return _resize(grey, size, gpu)


@pipeline_def
def _native_graph(source: Any, size: int, gpu: bool, fused: bool) -> Any:
    """Films and paths (uint8, 1-D; one of them empty) to prepared images (uint8 (S, S, 1)), statuses and messages."""
    films, paths = _inputs(source, 2)
    if fused:
        return tuple(fn.cxrfast.decode_resize(films, paths, size=size))
    grey, status, message = fn.cxrfast.decode(films, paths)
    return _resize(grey.gpu() if gpu else grey, size, gpu), status, message


def _inputs(source: Any, count: int) -> Any:
    return fn.external_source(source=source, num_outputs=count, batch=True, dtype=types.UINT8, ndim=1, no_copy=True)


def _resize(grey: Any, size: int, gpu: bool) -> Any:
    """DALI's resize with Pillow's border.

    Where the filter reaches over an edge, DALI repeats the edge's pixel; Pillow leaves the missing pixels out and
    renormalises. The filter is one output pixel wide to each side of its centre, so that happens in the outermost rows
    and columns of the output only: these are resized once more, from strips that go on with zeros behind the edge, and
    divided by the share of the filter that lies inside.

    Args:
        grey: uint8 (H, W, 1), on the GPU if ``gpu``.
    Returns:
        uint8 (size, size, 1), within one level of Pillow.
    """
    sides = grey.shape(dtype=types.INT32)[0:2]
    step = fn.cast(sides, dtype=types.FLOAT) / float(size)  # source pixels of one output pixel
    half_width = math.max(step, 1.0)  # of the filter, in source pixels
    margin = fn.cast(math.ceil(half_width), dtype=types.INT32) + 1  # zeros behind an edge
    depth = fn.cast(math.ceil(1.5 * half_width), dtype=types.INT32) + 1  # source pixels that an outermost pixel sees

    def edge(axis: int, far: bool) -> Any:
        """The first or last row (axis 0) or column (axis 1), not yet divided; float."""
        across, along = _unit(axis), 1 - _unit(axis)
        if far:  # the strip begins `depth` before the edge and ends `margin` behind it
            begin = (sides - depth) * across - margin * along
            roi_end = depth * across + (sides + margin) * along
            roi_begin = roi_end - step * across - sides * along
        else:
            begin = 0 - margin
            roi_begin = margin
            roi_end = margin + step * across + sides * along
        extent = (depth + margin) * across + (sides + 2 * margin) * along
        return _resize_part(grey, begin, extent, roi_begin, roi_end, (1, size) if axis == 0 else (size, 1))

    def share(axis: int) -> Any:
        """The share of each output row's (axis 0) or column's filter that lies inside; float (S, 1, 1) or (1, S, 1)."""
        across, along = _unit(axis), 1 - _unit(axis)
        ones = fn.ones(shape=fn.cat(sides * across + along, np.array([1], np.int32)), dtype=types.UINT8)
        begin, extent = 0 - margin * across, (sides + 2 * margin) * across + along
        roi_begin, roi_end = margin * across, (margin + sides) * across + along
        return _resize_part(ones, begin, extent, roi_begin, roi_end, (size, 1) if axis == 0 else (1, size))

    inner = slice(1, size - 1)
    rows, columns = share(0), share(1)
    of_rows, of_columns = rows[0:1] * columns, (rows * columns[:, 0:1])[inner]  # by symmetry of the last ones too
    if gpu:
        of_rows, of_columns = of_rows.gpu(), of_columns.gpu()
    left, right = (fn.cast(edge(1, far)[inner] / of_columns, dtype=types.UINT8) for far in (False, True))
    top, bottom = (fn.cast(edge(0, far) / of_rows, dtype=types.UINT8) for far in (False, True))
    interior = fn.resize(grey, size=(size, size), interp_type=types.INTERP_TRIANGULAR, antialias=True)
    return fn.cat(top, fn.cat(left, interior[inner, inner], right, axis=1), bottom, axis=0)


def _resize_part(image: Any, begin: Any, extent: Any, roi_begin: Any, roi_end: Any, target: tuple[int, int]) -> Any:
    """Resize the region of interest of image[begin : begin + extent], which goes on with zeros outside the image."""
    part = fn.slice(image, start=begin, shape=extent, axes=(0, 1), out_of_bounds_policy="pad", fill_values=0)
    return fn.resize(
        part,
        size=target,
        roi_start=fn.cast(roi_begin, dtype=types.FLOAT),
        roi_end=fn.cast(roi_end, dtype=types.FLOAT),
        interp_type=types.INTERP_TRIANGULAR,
        antialias=True,
        dtype=types.FLOAT,
    )


def _unit(axis: int) -> np.ndarray:
    return np.array([1, 0] if axis == 0 else [0, 1], np.int32)
