"""How fast this machine trains, and what it waits for: the trainer's own step, timed, against its matrix product.

Promises: every figure comes from one process on one machine within a minute, so that their ratios hold. On a GPU, where
the host launches steps ahead as it does in training, steps are timed in groups between two synchronisations; on a CPU
one by one. Left out: comparisons with other code (benchmarks/), and several devices.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import tyro

from cxrfast.data import Feed, Placement
from cxrfast.decode import MAX_SIZE, PIXEL_RULE
from cxrfast.devices import AmpDtype, ReplayedStep, choose_device, device_name, matmul_rate, synchronise
from cxrfast.errors import InputError
from cxrfast.models import MIN_SIZE, HeadName, ModelName
from cxrfast.nih import CLASSES
from cxrfast.parallel import World
from cxrfast.store import Entry, StoreWriter, checksum
from cxrfast.train import Switch, TrainConfig, Trainer

INPUT_BOUND_SHARE = 0.1  # of the step spent on input, from which on the input is what to look at first
WARM_UP = ReplayedStep.WARM_UP + 2  # steps that are not timed: the last two after the capture, where there is one
STEPS, GROUPS = 10, 20  # that are timed where --steps does not say: steps on a CPU, groups of steps on a GPU
GROUP_S, MAX_GROUP = 0.05, 200  # of a group: seconds at least, steps at most
COMPUTE_BOUND_SHARE = 0.5  # of the matrix product's rate, from which on the arithmetic is


@dataclass(frozen=True)
class BenchConfig:
    """Options of cxrfast-bench."""

    store: Annotated[Path | None, tyro.conf.Positional] = None
    """Prepared store; without one, noise of --size is trained on."""
    model: ModelName = "cnn"
    """cnn sees the image, multimodal also age, sex and view."""
    head: HeadName = "flatten"
    """flatten is the paper's; gap averages each feature map first."""
    amp: bool = False
    """Half-precision arithmetic where the device gains by it."""
    amp_dtype: AmpDtype = "auto"
    """What --amp means; auto looks at the device."""
    size: int = 224
    """Side of the images of noise, pixels."""
    batch_size: int = 32
    """Films a step."""
    steps: int | None = None
    """Steps that are timed, after a few that are not; 10 on a CPU, 20 groups of about 50 ms on a GPU."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:0."""
    data: Placement = "auto"
    """Where the films are kept."""
    prefetch: int = 2
    """Batches read ahead when the films are not on the device."""
    compile: Switch = "auto"
    """Fuse the network's layers by torch.compile; auto does so on one GPU for which our own passes were not built."""
    cuda_graphs: Switch = "auto"
    """Capture the training step once and replay it; auto does so on a GPU."""


def bench(config: BenchConfig, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Time training steps and say what bounds them.

    Returns:
        JSON values: ``images_per_second`` (median over groups of ``group_steps`` steps), ``slowest`` and ``fastest``,
        ``input_share``, ``flops_per_second``, ``matmul_per_second``, ``flops_share``, ``verdict`` (input-bound,
        memory-bound or compute-bound), and what they were measured on.
    Raises:
        InputError: wrong options or store.
    """
    for name in ("steps", "batch_size"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} must be 1 or more, not {value}")
    if not MIN_SIZE <= config.size <= MAX_SIZE:
        raise InputError(f"--size must be {MIN_SIZE} to {MAX_SIZE} pixels, not {config.size}")
    with tempfile.TemporaryDirectory(prefix="cxrfast-bench-") as folder:
        store = config.store or make_noise_store(Path(folder) / "store", 4 * config.batch_size, config.size)
        options = TrainConfig(
            store,
            Path(folder) / "run",
            model=config.model,
            head=config.head,
            amp=config.amp,
            amp_dtype=config.amp_dtype,
            batch_size=config.batch_size,
            data=config.data,
            prefetch=config.prefetch,
            compile=config.compile,
            cuda_graphs=config.cuda_graphs,
        )
        trainer = Trainer(options, World(), choose_device(config.device), say)
        return _measure(trainer, config.steps, say)


def _measure(trainer: Trainer, steps: int | None, say: Callable[[str], None]) -> dict[str, Any]:
    device, size = trainer.device, trainer.config.batch_size
    rate = matmul_rate(device, trainer.precision.dtype)
    films = torch.from_numpy(trainer.split.train)
    most = 2 * WARM_UP + (GROUPS * MAX_GROUP if steps is None else steps + MAX_GROUP)
    order = films[torch.randint(len(films), (most * size,), generator=torch.Generator().manual_seed(0))]
    feeds = trainer.data.feeds(order.split(size))
    trainer.model.train()
    _step_seconds(trainer, feeds, WARM_UP)
    per_group = 1 if device.type == "cpu" else group_steps(_step_seconds(trainer, feeds, WARM_UP)[0])
    groups = -(-(steps or (STEPS if device.type == "cpu" else GROUPS * per_group)) // per_group)
    seconds, waits = zip(*(_step_seconds(trainer, feeds, per_group) for _ in range(groups)), strict=True)
    images_per_second = size / statistics.median(seconds)
    flops = images_per_second * trainer.net.flops_per_image(training=True)
    result: dict[str, Any] = {
        "images_per_second": images_per_second,
        "fastest": size / min(seconds),
        "slowest": size / max(seconds),
        "input_share": sum(waits) / sum(seconds),
        "flops_per_second": flops,
        "matmul_per_second": rate,
        "flops_share": flops / rate,
        "device": device_name(device),
        "precision": trainer.precision.name,
        "network": trainer.network_line(),
        "model": trainer.config.model,
        "head": trainer.config.head,
        "size": trainer.store.size,
        "batch_size": size,
        "steps": groups * per_group,
        "group_steps": per_group,
        "torch": torch.__version__,
    }
    result["verdict"] = verdict(result["input_share"], result["flops_share"])
    say(trainer.precision.line)
    say(result["network"])
    say(trainer.data.line)
    over = f"{groups} steps" if per_group == 1 else f"{groups} groups of {per_group} steps"
    say(
        f"{result['device']}: {images_per_second:,.1f} training images/s ({result['slowest']:,.1f} to "
        f"{result['fastest']:,.1f} over {over} of {size} films of {trainer.store.size} pixels, {trainer.config.model})"
    )
    say(
        f"{flops / 1e9:,.0f} GFLOP/s of direct convolutions (Winograd's need fewer), {result['flops_share']:.0%} of a "
        f"matrix product's {rate / 1e9:,.0f}"
    )
    say(f"input: {result['input_share']:.1%} of the step")
    say(
        f"verdict: {result['verdict']} (input-bound from {INPUT_BOUND_SHARE:.0%} of the step on, else compute-bound "
        f"from {COMPUTE_BOUND_SHARE:.0%} of the matrix product's rate on, else memory-bound)"
    )
    return result


def group_steps(step_s: float) -> int:
    """Steps of `step_s` seconds that are timed together on a GPU."""
    return min(MAX_GROUP, max(1, math.ceil(GROUP_S / step_s)))


def _step_seconds(trainer: Trainer, feeds: Iterator[Feed], count: int) -> tuple[float, float]:
    """Seconds of a step, and of its input, the mean over ``count`` of them between two synchronisations."""
    synchronise(trainer.device)
    begin, trainer.data.wait_s = time.perf_counter(), 0.0
    for _ in range(count):
        feed = next(feeds)
        trainer.start_step(trainer.config.batch_size)
        trainer.train_step(feed)
        trainer.position.step = (trainer.position.step + 1) % trainer.steps_per_epoch
    synchronise(trainer.device)
    return (time.perf_counter() - begin) / count, trainer.data.wait_s / count


def verdict(input_share: float, flops_share: float) -> str:
    """input-bound, compute-bound or memory-bound."""
    if input_share >= INPUT_BOUND_SHARE:
        return "input-bound"
    return "compute-bound" if flops_share >= COMPUTE_BOUND_SHARE else "memory-bound"


def make_noise_store(path: Path, count: int, size: int) -> Path:
    """A store of uniform noise with random labels, three films a patient: good for time, useless for learning."""
    rng = np.random.default_rng(0)
    count = max(count, 60)  # patients enough for both sides of a split
    images = rng.integers(0, 256, (count, size, size), np.uint8)
    patient = np.arange(count) // 3 + 1
    labels = (rng.random((count, len(CLASSES))) < 0.1).astype(np.float32)
    table = pd.DataFrame(
        {
            "file": [f"{patient[i]:08d}_{i % 3:03d}.png" for i in range(count)],
            "patient": patient,
            "age": rng.integers(1, 95, count).astype(np.float64),
            "sex": rng.choice(["M", "F"], count),
            "view": rng.choice(["PA", "AP"], count),
            "follow_up": (np.arange(count) % 3).astype(np.float64),
            **{name: labels[:, c] for c, name in enumerate(CLASSES)},
        }
    )
    entries = [
        Entry(
            name,
            "ok",
            pixel_sum=int(image.sum(dtype=np.int64)),
            pixel_sumsq=int(np.square(image, dtype=np.int64).sum()),
            crc32=checksum(image),
        )
        for name, image in zip(table["file"], images, strict=True)
    ]
    with StoreWriter(path, size, {"size": size, "pixel_rule": PIXEL_RULE}, "noise") as writer:
        writer.append(entries, images)
        writer.finish(table, [], {})
    return path
