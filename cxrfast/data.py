"""A store's films where the training device can reach them, and batches of them, with no loader process.

Three places, chosen by what fits and said in one line:

    device   the whole store as one uint8 tensor in the device's memory; a batch is one gather there
    pinned   the whole store in page-locked host memory; a thread copies batches ahead, beside the computation
    mmap     the store's own file, memory-mapped; the same thread reads ahead (on a CPU the page cache is the memory)

Normalisation, cast and channels-last happen on the device. Left out: augmentation, which the paper does without.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from cxrfast.errors import InputError, ResourceError
from cxrfast.models import encode_metadata, mix_seed
from cxrfast.store import Store

Placement = Literal["auto", "device", "pinned", "mmap"]

# What a batch of 32 films of 224 pixels needs beside the data: activations, gradients, Adam's moments, cuDNN's work
# space. An estimate on the safe side; --data overrides the choice that rests on it.
DEVICE_RESERVE_NBYTES = 4 << 30


class Normalisation(NamedTuple):
    """Of the training split's pixels, in grey levels 0 to 255."""

    mean: float
    std: float


def pixel_statistics(store: Store, rows: np.ndarray) -> Normalisation:
    """Mean and standard deviation of all pixels of the rows, from the index's integer sums: exact, no pixel is read."""
    count = len(rows) * store.size**2
    total = int(store.index["pixel_sum"].to_numpy(np.int64)[rows].sum())
    squares = int(store.index["pixel_sumsq"].to_numpy(np.int64)[rows].sum())
    variance = (count * squares - total * total) / count**2  # Python integers: nothing is rounded before the division
    if variance <= 0:
        raise InputError(f"every pixel of the {len(rows)} training films has the same value; there is nothing to learn")
    return Normalisation(total / count, variance**0.5)


def epoch_order(rows: np.ndarray, seed: int, epoch: int) -> Tensor:
    """int64 (N,): the rows in the order of one epoch, a function of seed and epoch alone.

    Drawn on the CPU (1 ms for the whole data set), so that every device and every process has the same order.
    """
    generator = torch.Generator().manual_seed(mix_seed(seed, epoch))
    return torch.from_numpy(rows)[torch.randperm(len(rows), generator=generator)]


class Batch(NamedTuple):
    """One step's data of one process, on the device."""

    images: Tensor  # float32 (N, 1, S, S), normalised, channels-last
    metadata: Tensor  # float32 (N, 5), see cxrfast.models.METADATA
    targets: Tensor  # float32 (N, 14): 1, 0 or NaN


class Feed(NamedTuple):
    """What a batch is made of, on the device."""

    rows: Tensor  # int64 (N,), of the store
    pixels: Tensor | None  # uint8 (N, S, S); None where all films are on the device


class FilmData:
    """A store's films, labels and metadata, ready to be asked for batches by row number.

    Args:
        store: an open store.
        device: where batches are wanted.
        normalisation: of the training split.
        age: mean and standard deviation of age in the training split, in years.
        placement: where the films are kept; ``auto`` chooses.
        prefetch: batches read ahead by a thread when the films are not on the device; 0 reads when asked.

    Attributes:
        placement: where they are.
        line: says so in words.
        wait_s: seconds that feeding and making batches has taken the caller since it last set this to 0.
    """

    def __init__(
        self,
        store: Store,
        device: torch.device,
        normalisation: Normalisation,
        age: tuple[float, float],
        placement: Placement = "auto",
        prefetch: int = 2,
    ) -> None:
        if placement not in get_args(Placement):
            raise InputError(f"--data must be one of {', '.join(get_args(Placement))}, not {placement!r}")
        if prefetch < 0:
            raise InputError(f"--prefetch must be 0 or more batches, not {prefetch}")
        self.device, self.normalisation, self.wait_s = device, normalisation, 0.0
        self._prefetch = prefetch
        self._file = store.images
        self.placement, self.line = choose_placement(store.images.nbytes, device, placement)
        self._on_device: Tensor | None = None
        if self.placement == "device":
            self._on_device = _load(store.images, device)
        elif self.placement == "pinned":
            self._file = _load_pinned(store.images)
        self._targets = torch.from_numpy(store.targets).to(device)
        self._metadata = torch.from_numpy(encode_metadata(store.index, *age)).to(device)

    def batches(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        """Batches in the order of ``batches``, each an int64 tensor of row numbers on the CPU."""
        return (self.make_batch(feed) for feed in self.feeds(batches))

    def feeds(self, batches: Sequence[Tensor]) -> Iterator[Feed]:
        """What `make_batch` takes, in the order of ``batches``: the part that is not arithmetic on the device."""
        pixels = None if self._on_device is not None else self._read_ahead(batches)
        for rows in batches:
            begin = time.perf_counter()
            feed = Feed(rows.to(self.device, non_blocking=True), None if pixels is None else next(pixels))
            self.wait_s += time.perf_counter() - begin
            yield feed

    def make_batch(self, feed: Feed) -> Batch:
        """Gather, normalise, cast; on the device, with no word to the host."""
        begin = time.perf_counter()
        pixels = feed.pixels
        if pixels is None:
            assert self._on_device is not None
            pixels = self._on_device.index_select(0, feed.rows)
        batch = Batch(
            normalise(pixels, self.normalisation),
            self._metadata.index_select(0, feed.rows),
            self._targets.index_select(0, feed.rows),
        )
        self.wait_s += time.perf_counter() - begin
        return batch

    def _read_ahead(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Rows of the host's array as device tensors; a thread fills the next staging buffers and starts their copy."""
        if self._prefetch == 0 or not batches:
            yield from (self._to_device(self._read(rows, None)) for rows in batches)
            return
        slots = [_Slot(max(map(len, batches)), self._file.shape[1:], self.device) for _ in range(self._prefetch + 1)]
        with ThreadPoolExecutor(1, thread_name_prefix="cxrfast-read") as executor:
            pending: deque[tuple[Future[Tensor], _Slot]] = deque()
            try:
                for number, rows in enumerate(batches):
                    slot = slots[number % len(slots)]
                    # A slot comes round again only when the batch it held has been handed over (below).
                    pending.append((executor.submit(self._fill, slot, rows), slot))
                    if len(pending) > self._prefetch:
                        yield _take(*pending.popleft())
                while pending:
                    yield _take(*pending.popleft())
            finally:
                for future, _ in pending:
                    future.cancel()

    def _fill(self, slot: _Slot, rows: Tensor) -> Tensor:
        if self.device.type != "cuda":  # a fresh tensor: the caller may keep it, and there is nothing to copy to
            return self._read(rows, None)
        if slot.copied is not None:
            slot.copied.synchronize()
        staged = self._read(rows, slot.staging[: len(rows)])
        with torch.cuda.stream(slot.stream):
            images = staged.to(self.device, non_blocking=True)
            slot.copied = torch.cuda.Event()
            slot.copied.record(slot.stream)
        return images

    def _read(self, rows: Tensor, out: Tensor | None) -> Tensor:
        if out is None:
            out = torch.empty((len(rows), *self._file.shape[1:]), dtype=torch.uint8)
        np.take(self._file, rows.numpy(), axis=0, out=out.numpy(), mode="clip")  # "raise" would buffer the whole output
        return out

    def _to_device(self, images: Tensor) -> Tensor:
        return images.to(self.device)


class _Slot:
    """A page-locked staging buffer with the stream that empties it."""

    def __init__(self, num_rows: int, shape: tuple[int, ...], device: torch.device) -> None:
        self.copied: torch.cuda.Event | None = None
        if device.type == "cuda":
            self.staging = torch.empty((num_rows, *shape), dtype=torch.uint8, pin_memory=True)
            self.stream = torch.cuda.Stream(device)


def _take(future: Future[Tensor], slot: _Slot) -> Tensor:
    images = future.result()
    if images.is_cuda and slot.copied is not None:
        stream = torch.cuda.current_stream(images.device)
        stream.wait_event(slot.copied)
        images.record_stream(stream)
    return images


def normalise(images: Tensor, normalisation: Normalisation) -> Tensor:
    """uint8 (N, S, S) to float32 (N, 1, S, S), channels-last: (x - mean) / std."""
    scale = 1 / normalisation.std
    x = images.unsqueeze(1).to(torch.float32, memory_format=torch.channels_last)
    return x.mul_(scale).sub_(normalisation.mean * scale)


def choose_placement(nbytes: int, device: torch.device, wanted: Placement) -> tuple[Placement, str]:
    """Where ``nbytes`` of films go, and the line that says so.

    Raises:
        ResourceError: the wanted place is too small.
    """
    size = _gib(nbytes)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        rooms: list[tuple[Placement, int, str]] = [
            (
                "device",
                free - DEVICE_RESERVE_NBYTES,
                f"{_gib(free)} free on the GPU, {_gib(DEVICE_RESERVE_NBYTES)} kept",
            ),
            ("pinned", available_memory() // 2, f"half of the {_gib(available_memory())} of free host memory"),
        ]
    else:
        rooms = [("device", available_memory() // 2, f"half of the {_gib(available_memory())} of free memory")]
    names = {"device": "in the device's memory", "pinned": "in page-locked host memory", "mmap": "memory-mapped"}
    if device.type == "cpu":
        names["device"] = "copied into memory"
    for place, room, words in rooms:
        if wanted == place and nbytes > room:
            raise ResourceError(f"--data {place}: {size} of films do not fit ({words}); use --data auto")
        # On a CPU the page cache serves the mapped file at memory speed, and a run starts without a copy.
        if wanted == place or (wanted == "auto" and device.type == "cuda" and nbytes <= room):
            return place, f"films: {size}, {names[place]} ({words})"
    if wanted == "pinned":
        raise InputError("--data pinned is for GPUs; on a CPU use mmap or device")
    return "mmap", f"films: {size}, {names['mmap']}" + (", cached by the system" if device.type == "cpu" else "")


def available_memory() -> int:
    """Bytes of host memory that can be had without swapping; where the system does not say, 4 GiB."""
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 4 << 30


def _load(images: np.ndarray, device: torch.device) -> Tensor:
    """The whole array on the device, piece by piece, so that the host never holds a second copy."""
    tensor = torch.empty(images.shape, dtype=torch.uint8, device=device)
    _copy_rows(images, lambda begin, piece: tensor[begin : begin + len(piece)].copy_(torch.from_numpy(piece)))
    return tensor


def _load_pinned(images: np.ndarray) -> np.ndarray:
    pinned = torch.empty(images.shape, dtype=torch.uint8, pin_memory=True).numpy()
    _copy_rows(images, lambda begin, piece: np.copyto(pinned[begin : begin + len(piece)], piece))
    return pinned


def _copy_rows(images: np.ndarray, put: Callable[[int, np.ndarray], object]) -> None:
    rows = max(1, (64 << 20) // max(1, images[:1].nbytes))
    for begin in range(0, len(images), rows):
        put(begin, np.array(images[begin : begin + rows]))


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
