"""What the device is and can do: its choice, its arithmetic under AMP, the rate of its matrix product, its memory from
one step to the next, and steps that are captured once and replayed.

Left out: several processes (parallel.py), and where films are kept (data.py).
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cxrfast.errors import InputError

AmpDtype = Literal["auto", "bf16", "fp16"]

# A CPU takes bf16 only where it clearly gains: below this ratio the loss of digits buys nothing.
BF16_GAIN = 1.2


class Precision(NamedTuple):
    """The arithmetic of forward and backward pass; weights and optimiser are always fp32."""

    name: str  # fp32, bf16 or fp16
    line: str  # why, in words

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.name]


def choose_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """``auto`` takes the GPU where there is one; of several, each process takes its own.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"there is no device {name!r}; write auto, cpu, cuda or cuda:0") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise InputError(f"cxrfast trains on cpu and cuda, not on {device.type}")
    if not torch.cuda.is_available():
        raise InputError(f"device {name} was asked for, but this torch sees no GPU; use --device cpu")
    index = local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise InputError(f"GPU {index} was asked for, but there are {torch.cuda.device_count()}")
    return torch.device("cuda", index)


def device_name(device: torch.device) -> str:
    """The device's name for people and for config.json."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as file:
            model = next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        model = "CPU"
    return f"{model}, {torch.get_num_threads()} threads"


def choose_precision(amp: bool, wanted: AmpDtype, device: torch.device) -> Precision:
    """The arithmetic that ``--amp`` means on this device.

    A GPU with bf16 takes bf16, any other fp16 with a GradScaler. A CPU takes bf16 where a measurement shows that bf16
    convolutions are faster there; many emulate them, ten times slower than fp32, and those stay in fp32.

    Raises:
        InputError: fp16 on a CPU, or bf16 on a GPU that has none.
    """
    if not amp:
        if wanted != "auto":
            raise InputError(f"--amp-dtype {wanted} needs --amp")
        return Precision("fp32", "arithmetic: fp32")
    if device.type == "cuda":
        has_bf16 = torch.cuda.get_device_capability(device)[0] >= 8  # below it torch emulates bf16
        if wanted == "bf16" and not has_bf16:
            raise InputError(f"{device_name(device)} has no bf16 arithmetic; use --amp-dtype auto")
        name = wanted if wanted != "auto" else ("bf16" if has_bf16 else "fp16")
        return Precision(name, f"arithmetic: {name}" + (" with loss scaling" if name == "fp16" else ""))
    if wanted == "fp16":
        raise InputError("--amp-dtype fp16 is for GPUs; on a CPU use bf16")
    gain = bf16_gain()
    measured = f"a bf16 convolution runs at {gain:.2g} x the speed of fp32 on this CPU"
    if wanted == "bf16":
        return Precision("bf16", f"arithmetic: bf16, as asked ({measured})")
    if gain >= BF16_GAIN:
        return Precision("bf16", f"arithmetic: bf16 ({measured})")
    return Precision("fp32", f"arithmetic: fp32 in spite of --amp, because {measured}")


def bf16_gain() -> float:
    """Speed of a bf16 convolution over that of the same in fp32 on this CPU; below 1 where bf16 is emulated."""
    x = torch.randn(4, 64, 28, 28).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 64, 3, 3).contiguous(memory_format=torch.channels_last)

    def convolve(dtype: torch.dtype) -> float:
        a, w = x.to(dtype), weight.to(dtype)
        with torch.inference_mode():
            return best_seconds(lambda: F.conv2d(a, w, padding=1), repeats=1)

    # In turns, and the best of each: what else the machine does must not decide how a run computes.
    rounds = [(convolve(torch.float32), convolve(torch.bfloat16)) for _ in range(7)]
    return min(fp32 for fp32, _ in rounds) / min(bf16 for _, bf16 in rounds)


def keep_freed_memory(device: torch.device) -> bool:
    """Have this process keep, on a CPU with glibc, what a step frees for the next one; returns whether it does.

    A map of a step is tens of MB. glibc gives blocks of that size back to the system as soon as they are freed, and
    gets them again as pages that the kernel must clear: a third of a training step in bf16 (docs/notes.md). Kept, a
    process holds what its largest step needed, no more. A GPU's allocator keeps blocks by itself, and other C
    libraries are left alone.
    """
    try:
        is_glibc = (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):  # Windows, macOS, musl
        is_glibc = False
    if device.type != "cpu" or not is_glibc:
        return False
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    # no block in a mapping of its own, and a heap whose end is never given back
    return bool(mallopt(m_mmap_max, 0)) and bool(mallopt(m_trim_threshold, -1))


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product: the yardstick that training is held against."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    with torch.inference_mode():
        return 2 * n**3 / best_seconds(lambda: a @ b, repeats=3, device=device)


def best_seconds(run: Callable[[], Tensor], repeats: int, device: torch.device | None = None) -> float:
    """The shortest of several runs, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        synchronise(device)
        begin = time.perf_counter()
        run()
        synchronise(device)
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def synchronise(device: torch.device | None) -> None:
    """Wait until the device has done what it was asked; nothing on a CPU."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Makes of a step over tensors of fixed place, without running it, what repeats it on whatever they hold then.

Raises RuntimeError where that cannot be done; the tensors are then as they were.
"""


def capture_cuda_graph(step: Callable[[], None]) -> Callable[[], None]:
    """The step as one CUDA graph of the current device: what it launches, with the same arguments, by one launch."""
    graph, pool, stream = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle(), torch.cuda.current_stream()
    try:
        # "thread_local": meanwhile the thread that reads films ahead waits for events and allocates, which the default
        # forbids to every thread of the process.
        with torch.cuda.graph(graph, pool, torch.cuda.Stream(), capture_error_mode="thread_local"):
            step()
    except RuntimeError:
        # What a capture that was cut short leaves behind: its stream as the current one, and an allocator that waits
        # for its end before it takes back any block that two streams used.
        torch.cuda.set_stream(stream)
        with suppress(AttributeError, RuntimeError):  # where torch has told the allocator already
            torch._C._cuda_endAllocateToPool(stream.device_index, pool)
        raise
    return graph.replay


class ReplayedStep:
    """A training step that is run a few times, then captured, and from then on replayed.

    Its inputs are copied to where it will always find them, its result is where it always leaves it. The first steps
    are true ones: whatever allocates, measures or compiles at first use does so there, on a stream beside the main one,
    as capturing demands (https://docs.pytorch.org/docs/stable/notes/cuda.html, CUDA graphs).

    Args:
        step: computes from its inputs alone and from tensors of fixed place, asks the device for no value.
        capture: `capture_cuda_graph`; for tests, anything that can do the same on a CPU.
        on_failure: told why capturing failed; where it returns, this step and all later ones are run as they are.

    Attributes:
        has_failed: whether that is so.
    """

    WARM_UP = 3

    def __init__(
        self,
        step: Callable[..., Tensor],
        capture: Capture,
        device: torch.device,
        on_failure: Callable[[RuntimeError], None],
    ) -> None:
        self._step, self._capture, self._device, self._on_failure = step, capture, device, on_failure
        self._inputs: list[Tensor | None] | None = None
        self._result = torch.zeros((), device=device)
        self.has_failed = False
        self._runs = 0
        self._replay: Callable[[], None] | None = None

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """The step's result on ``inputs``, float32 (); overwritten by the next. Their shapes are always the same."""
        if self._inputs is None:
            self._inputs = [None if value is None else value.clone() for value in inputs]
        for place, value in zip(self._inputs, inputs, strict=True):
            if place is not None and value is not None:
                place.copy_(value)
        if self._replay is None and self._runs < self.WARM_UP:
            self._runs += 1
            self._run_beside()
            return self._result
        if self._replay is None:
            try:
                self._replay = self._capture(self._run)
            except RuntimeError as error:
                self._on_failure(error)
                self.has_failed, self._replay = True, self._run
        self._replay()
        return self._result

    def _run(self) -> None:
        assert self._inputs is not None
        self._result.copy_(self._step(*self._inputs))

    def _run_beside(self) -> None:
        if self._device.type != "cuda":
            self._run()
            return
        main, beside = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        beside.wait_stream(main)
        with torch.cuda.stream(beside):
            self._run()
        main.wait_stream(beside)
