"""What does one training step cost at 224 pixels and batch 32, against plain torch and against the paper's way?

    python -m pytest --benchmark-only -s benchmarks/bench_train.py

Four ways, the same network, the same real films, the same number of threads, end to end from what each trains from:

    cxrfast        the trainer's own step, from a prepared store
    cxrfast --amp  the same in what --amp means on this machine
    plain          fp32, NCHW, nn.Conv2d ... nn.BCEWithLogitsLoss, torch.optim.Adam, from a tensor ready in memory
    paper          the same, fed by a DataLoader whose workers decode and resize 1024-pixel PNGs with Pillow

Where torch sees a GPU all four train there: ours from films in its memory, plain from a tensor there, the paper's way
from pinned batches of as many workers as there are cores. fp32 then means TF32 in everybody's convolutions, as torch
has it, and none in the matrix product.

Each way has a process of its own, so that what the trainer does to its process (devices.keep_freed_memory) neither
helps nor hurts another. They are timed in turns, each ended by a synchronisation; whoever has not the turn is stopped.
In every round the matrix product is timed too, in fp32 and half precision: shares and ratios are of medians over the
rounds.

On a CPU the convolutions, not the decoding, are the cost of the paper's way; on a GPU it is the other way round.
Before anything is timed, ours and the paper's are seen to compute the same logits from the same weights.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from cxrfast.bench import WARM_UP
from cxrfast.data import pixel_statistics
from cxrfast.devices import Precision, choose_device, choose_precision, device_name, matmul_rate, synchronise
from cxrfast.loss import class_weights
from cxrfast.models import ChestNet, ModelName, age_statistics, encode_metadata
from cxrfast.parallel import World
from cxrfast.prep import PrepConfig, prepare
from cxrfast.reference import PaperNet
from cxrfast.splits import make_split
from cxrfast.store import open_store
from cxrfast.train import TrainConfig, Trainer

DEVICE = choose_device()
ON_GPU = DEVICE.type == "cuda"
SIZE, BATCH = 224, 32
WORKERS = len(os.sched_getaffinity(0)) if ON_GPU else 2
ROUNDS = 5
STEPS = {"cxrfast": 2, "cxrfast --amp": 3, "plain": 1, "paper": 1}  # of one turn on a CPU: each some seconds
TURN_S = 1.0  # of one turn on a GPU


class Task(NamedTuple):
    """What a way's process is given."""

    way: str
    model: ModelName
    store: Path
    films: Path
    run: Path


class PngFilms(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """The paper's data set: a film is decoded and resized whenever it is asked for."""

    def __init__(self, task: Task) -> None:
        store = open_store(task.store)
        self.train = make_split("paper", store.index).train
        self.paths = [task.films / name for name in store.index["file"]]
        self.normalisation = pixel_statistics(store, self.train)
        age = age_statistics(store.index.iloc[self.train]["age"])
        self.metadata = torch.from_numpy(encode_metadata(store.index, *age))
        self.targets = torch.from_numpy(store.targets)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        with Image.open(self.paths[row]) as film:
            grey = film.convert("L").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(grey, np.float32))[None]
        mean, std = self.normalisation
        return (pixels - mean) / std, self.metadata[row], self.targets[row]


def plain_step(task: Task, films: PngFilms, batches: Iterator[tuple[Tensor, Tensor, Tensor]]) -> Callable[[], object]:
    """Eager torch as the paper wrote it, on whatever the iterator gives."""
    net = PaperNet(SIZE, task.model).to(DEVICE)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    pos_weight, _ = class_weights(films.targets.numpy()[films.train])
    criterion = nn.BCEWithLogitsLoss(pos_weight=pos_weight).to(DEVICE)

    def step() -> None:
        images, metadata, targets = (column.to(DEVICE, non_blocking=True) for column in next(batches))
        optimizer.zero_grad()
        criterion(net(images, metadata), targets).backward()
        optimizer.step()

    return step


def cxrfast_step(trainer: Trainer) -> Callable[[], object]:
    films = torch.from_numpy(trainer.split.train)
    rows = [films[torch.randperm(len(films))[:BATCH]] for _ in range(64)]
    feeds = (feed for _ in itertools.count() for feed in trainer.data.feeds(rows))
    trainer.model.train()

    def step() -> None:
        trainer.start_step(BATCH)
        trainer.train_step(next(feeds))

    return step


def assert_same_logits(trainer: Trainer, films: PngFilms) -> None:
    """In fp32, evaluated, from pixels that Pillow prepared and from the store's."""
    paper = PaperNet(SIZE, trainer.config.model).to(DEVICE)
    paper.copy_to(trainer.net)
    ready = [films[row] for row in range(4)]
    images, metadata, _ = (torch.stack(column).to(DEVICE) for column in zip(*ready, strict=True))
    batch = next(trainer.data.batches([torch.arange(4)]))
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = paper.eval()(images, metadata)
        found = trainer.net.eval()(batch.images, batch.metadata)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def make_step(task: Task) -> tuple[Callable[[], object], str]:
    """The way's step, and its arithmetic."""
    torch.manual_seed(0)
    films = PngFilms(task)
    if task.way == "plain":
        ready = [torch.stack(column).to(DEVICE) for column in zip(*(films[row] for row in range(BATCH)), strict=True)]
        return plain_step(task, films, itertools.repeat(tuple(ready))), "fp32"
    if task.way == "paper":
        # On a GPU an epoch of these films would end before every worker had a batch: there it has no end.
        order = RandomSampler(films, replacement=ON_GPU, num_samples=10**7 if ON_GPU else None)
        loader = DataLoader(
            films, BATCH, sampler=order, drop_last=True, num_workers=WORKERS, persistent_workers=True, pin_memory=ON_GPU
        )
        return plain_step(task, films, (batch for _ in itertools.count() for batch in loader)), "fp32"
    amp = task.way.endswith("--amp")
    options = TrainConfig(task.store, task.run, model=task.model, batch_size=BATCH, amp=amp)
    trainer = Trainer(options, World(), DEVICE)
    assert_same_logits(trainer, films)
    return cxrfast_step(trainer), trainer.precision.name


def serve(task: Task, pipe: Connection) -> None:
    """A way's process: says its arithmetic, then the seconds of a step at every turn."""
    os.setsid()  # the workers of a DataLoader are stopped together with it
    step, precision = make_step(task)
    # not timed: memory, threads, the first use of everything
    step_seconds(step, WARM_UP if ON_GPU else 1)
    steps = max(10, math.ceil(TURN_S / step_seconds(step, 20))) if ON_GPU else STEPS[task.way]
    pipe.send(precision)
    while pipe.recv():
        pipe.send(step_seconds(step, steps))


def step_seconds(step: Callable[[], object], count: int) -> float:
    """Seconds of a step, the mean over ``count`` of them between two synchronisations."""
    synchronise(DEVICE)
    begin = time.perf_counter()
    for _ in range(count):
        step()
    synchronise(DEVICE)
    return (time.perf_counter() - begin) / count


class Way:
    """A way in its process, stopped but for its turns."""

    def __init__(self, task: Task) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(task, other))
        self.process.start()
        other.close()  # so that a process that died is seen here as the end of its pipe
        self.precision: str = self.pipe.recv()
        self.seconds: list[float] = []
        self._signal(signal.SIGSTOP)

    def take_turn(self) -> None:
        self._signal(signal.SIGCONT)
        self.pipe.send(True)
        self.seconds.append(self.pipe.recv())
        self._signal(signal.SIGSTOP)

    def end(self) -> None:
        self._signal(signal.SIGKILL)
        self.process.join()

    def _signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.killpg(self.process.pid, number)


@pytest.fixture(scope="module")
def store(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "store"
    csv = data / "nih" / "metadata" / "Data_Entry_2017_v2020.csv"
    prepare(PrepConfig(data / "nih" / "images", path, csv=csv, size=SIZE))
    return path


@pytest.mark.films
@pytest.mark.parametrize("model", ["cnn", "multimodal"])
def test_training_step(benchmark: Any, model: ModelName, store: Path, data: Path, tmp_path: Path) -> None:
    ways: dict[str, Way] = {}
    half = choose_precision(True, "auto", DEVICE).name if ON_GPU else "bf16"
    rates: dict[str, list[float]] = {"fp32": [], half: []}

    def take_turns() -> None:
        for name, values in rates.items():
            values.append(matmul_rate(DEVICE, Precision(name, "").dtype))
        for way in ways.values():
            way.take_turn()

    try:
        for number, way in enumerate(STEPS):
            ways[way] = Way(Task(way, model, store, data / "nih" / "images", tmp_path / f"run{number}"))
        benchmark.pedantic(take_turns, rounds=ROUNDS)
    finally:
        for way in ways.values():
            way.end()

    flops = ChestNet(SIZE, model).flops_per_image(training=True)
    rate = {name: statistics.median(values) for name, values in rates.items()}
    speed = {name: BATCH / statistics.median(way.seconds) for name, way in ways.items()}
    benchmark.extra_info |= {
        "model": model,
        "device": device_name(DEVICE),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "same_logits": True,
        "matmul_gflops": {name: round(value / 1e9) for name, value in rate.items()},
        "images_per_second": speed,
    }
    print(f"\n  {model}, {SIZE} pixels, batch {BATCH}, {device_name(DEVICE)}; matrix product", end=" ")
    print(", ".join(f"{name} {value / 1e9:.0f} GFLOP/s" for name, value in rate.items()))
    for name, way in ways.items():
        fastest, slowest = BATCH / min(way.seconds), BATCH / max(way.seconds)
        share = speed[name] * flops / rate[way.precision]
        print(
            f"  {name:13} {way.precision}: {speed[name]:5.2f} images/s ({slowest:.2f} to {fastest:.2f}), "
            f"{speed[name] / speed['plain']:.2f} x plain, {share:.0%} of the matrix product in {way.precision}"
        )
