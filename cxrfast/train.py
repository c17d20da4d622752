"""Training: a store in, a RUN folder out (DESIGN: Run), the paper's recipe as the defaults.

    RUN/config.json          every option, versions, split, store, class order, normalisation
    RUN/metrics.jsonl        one line per epoch
    RUN/model.safetensors    weights of the best epoch on the test split
    RUN/last.safetensors     weights of the last epoch
    RUN/checkpoint/          the state to resume from

Everything random is a function of the seed and of the step's number (order of the films, initial weights, dropout), so
that a run which was killed anywhere and resumed does the same arithmetic as one that was not: on a CPU its weights are
the same bits.

The best epoch is chosen on the test split, because the paper has no third one. Its score is therefore optimistic, by
little when the curve is flat; last.safetensors is free of that choice. config.json says which is which.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import platform
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import cxrfast
from cxrfast import block as fused
from cxrfast.auc import AucCounts, AucResult
from cxrfast.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, save_tensors
from cxrfast.data import Feed, FilmData, Placement, epoch_order, pixel_statistics
from cxrfast.devices import (
    AmpDtype,
    Capture,
    Precision,
    ReplayedStep,
    capture_cuda_graph,
    choose_device,
    choose_precision,
    device_name,
    keep_freed_memory,
    matmul_rate,
    synchronise,
)
from cxrfast.errors import InputError
from cxrfast.files import holds_other_files, make_durable, write_atomic, write_json
from cxrfast.loss import WeightedBCEWithAUC, Weighting, class_weights
from cxrfast.models import (
    METADATA,
    ChestNet,
    HeadName,
    ModelName,
    Noise,
    age_statistics,
    load_weights,
    mix_seed,
)
from cxrfast.nih import CLASSES
from cxrfast.parallel import World, synchronise_norms
from cxrfast.splits import make_split
from cxrfast.store import open_store

CONFIG, METRICS, BEST, LAST, CHECKPOINT = (
    "config.json",
    "metrics.jsonl",
    "model.safetensors",
    "last.safetensors",
    "checkpoint",
)

Switch = Literal["auto", "yes", "no"]


@dataclass(frozen=True)
class TrainConfig:
    """Options of cxrfast-train; the defaults are the paper's recipe."""

    store: Annotated[Path, tyro.conf.Positional]
    """Prepared store (cxrfast-prep)."""
    run: Annotated[Path, tyro.conf.Positional]
    """Folder of this run: made when absent."""
    model: ModelName = "cnn"
    """cnn sees the image, multimodal also age, sex and view."""
    head: HeadName = "flatten"
    """flatten is the paper's; gap averages each feature map first."""
    amp: bool = False
    """Half-precision arithmetic where the device gains by it: bf16, or fp16 with loss scaling."""
    amp_dtype: AmpDtype = "auto"
    """What --amp means; auto looks at the device."""
    epochs: int = 25
    """Epochs in all."""
    batch_size: int = 32
    """Films a step, over all devices together."""
    lr: float = 0.001
    """Adam's learning rate."""
    weighting: Weighting = "positive"
    """Where the reciprocal of a class's prevalence goes: on its positive term, on its whole term, nowhere."""
    split: str = "paper"
    """paper, official:FOLDER or TRAIN.txt,TEST.txt."""
    seed: int = 0
    """Of initial weights, order and dropout."""
    best_by: Literal["auc", "loss"] = "auc"
    """What on the test split makes an epoch the best: highest macro AUC or lowest loss."""
    resume: bool = False
    """Go on with the run in RUN; options that are not given are those it was begun with."""
    max_time: str = ""
    """Stop in time, saved: 8h30m, 45m, 90s."""
    checkpoint_minutes: float = 10.0
    """Minutes between saved states within an epoch; every epoch ends with one."""
    checkpoint_steps: int = 0
    """Steps between saved states; 0 leaves it to the minutes."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:0."""
    devices: int = 1
    """Processes, one a device (GPUs, or shares of the CPU's cores)."""
    data: Placement = "auto"
    """Where the films are kept: in the device's memory, in pinned host memory, or in the mapped file."""
    prefetch: int = 2
    """Batches read ahead when the films are not on the device."""
    compile: Switch = "auto"
    """Fuse the network's layers by torch.compile; auto does so on one GPU for which our own passes were not built."""
    cuda_graphs: Switch = "auto"
    """Capture the training step once and replay it, which spares the host's part; auto does so on one GPU."""
    deterministic: bool = False
    """Only algorithms that give the same bits each time, on a GPU too; slower there."""


# What must be the same for a run to be continued; everything else may change from one start to the next.
IDENTITY = ("model", "head", "amp", "amp_dtype", "batch_size", "lr", "weighting", "split", "seed", "best_by")


class Diverged(InputError):
    """The loss or a gradient is not finite."""


def train(config: TrainConfig, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Train until the epochs are done, the time is up or SIGTERM comes; in each case the state is saved.

    Args:
        config: the options. Under torchrun (or `cxrfast.parallel.launch`) every process calls this alike.
        say: gets lines for people, in the first process.
    Returns:
        JSON values: ``state`` (complete or stopped), ``epoch`` (epochs done), ``best`` and what it scored.
    Raises:
        InputError: wrong options, store, split or folder, a run or checkpoint that does not fit; `Diverged`.
    """
    started = time.monotonic()
    _check(config)
    with World() as world, _stop_signals() as signals:
        device = choose_device(config.device, world.local_rank)
        world.join(device)
        return Trainer(config, world, device, say if world.is_first else _silent, signals, started).run()


def _silent(_: str) -> None:
    pass


def _check(config: TrainConfig) -> None:
    for name, least in (("epochs", 1), ("batch_size", 1), ("checkpoint_steps", 0), ("prefetch", 0), ("seed", 0)):
        if getattr(config, name) < least:
            raise InputError(f"--{name.replace('_', '-')} must be {least} or more, not {getattr(config, name)}")
    for name in ("compile", "cuda_graphs"):
        if getattr(config, name) not in get_args(Switch):
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option} must be one of {', '.join(get_args(Switch))}, not {getattr(config, name)!r}")
    if not (config.lr > 0 and math.isfinite(config.lr)):
        raise InputError(f"--lr must be a positive number, not {config.lr}")
    if not config.checkpoint_minutes > 0:
        raise InputError(f"--checkpoint-minutes must be positive, not {config.checkpoint_minutes}")
    seconds_of(config.max_time)


def seconds_of(text: str) -> float:
    """Seconds that ``8h30m``, ``45m`` or ``90s`` mean; infinity for an empty text."""
    if not text:
        return math.inf
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if match is None:
        raise InputError(f"--max-time must look like 8h30m, 45m or 90s, not {text!r}")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + seconds


def recorded_config(config: TrainConfig) -> TrainConfig:
    """``config`` with the identity options and epochs of the run in its folder, where there is one to resume."""
    path = config.run / CONFIG
    if not path.is_file():
        return config
    known = {field.name for field in fields(TrainConfig)}
    options = read_config(config.run)["options"]
    return replace(
        config, **{name: options[name] for name in (*IDENTITY, "epochs") if name in options and name in known}
    )


def read_config(run: Path) -> dict[str, Any]:
    """A run's config.json.

    Raises:
        InputError: not a run.
    """
    try:
        content = json.loads((run / CONFIG).read_text())
        if not isinstance(content, dict) or "options" not in content:
            raise ValueError("it has no options")
        return content
    except FileNotFoundError:
        raise InputError(f"{run} is not a run (it has no {CONFIG}); make one with cxrfast-train") from None
    except ValueError as error:
        raise InputError(f"{run / CONFIG} cannot be read ({error})") from error


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """A run's metrics.jsonl, one dict an epoch; a last line without its end is left out."""
    try:
        text = (run / METRICS).read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@dataclass
class _Signals:
    """What asked us to stop, if anything did."""

    reason: str = ""
    interrupted: bool = False


@contextmanager
def _stop_signals() -> Iterator[_Signals]:
    """SIGTERM and the first Ctrl-C ask for a stop after the step; a second Ctrl-C stops at once."""
    asked = _Signals()

    def stop(number: int, _: object) -> None:
        if number == signal.SIGINT and asked.interrupted:
            raise KeyboardInterrupt
        asked.reason = signal.Signals(number).name
        asked.interrupted = number == signal.SIGINT

    previous = {}
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, stop)
    except ValueError:  # not the main thread: whoever runs us there stops us some other way
        pass
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Adam(torch.optim.Adam):
    """torch's Adam, step for step, without its decorators: they keep `torch.compile` out of the optimiser, which is not
    compiled here, and to do so import the whole compiler, two seconds of a run's start."""

    add_param_group = inspect.unwrap(torch.optim.Adam.add_param_group)
    state_dict = inspect.unwrap(torch.optim.Adam.state_dict)
    zero_grad = inspect.unwrap(torch.optim.Adam.zero_grad)
    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


@dataclass
class _Side:
    """Loss and counts of one side of the split over an epoch, of this process."""

    counts: AucCounts
    loss_sum: Tensor  # float64 (), sum of loss over known entries
    known: Tensor  # int64 (), how many

    @classmethod
    def empty(cls, device: torch.device) -> _Side:
        return cls(
            AucCounts(len(CLASSES), device, CLASSES),
            torch.zeros((), dtype=torch.float64, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
        )

    def add(self, loss: Tensor, known: int | Tensor) -> None:
        self.loss_sum += loss.detach().double() * known
        self.known += known

    def reset(self) -> None:
        self.counts.reset()
        self.loss_sum.zero_()
        self.known.zero_()

    def tensors(self, world: World) -> dict[str, Tensor]:
        """The sums over all processes."""
        counts, loss_sum, known = (world.sum(t) for t in (self.counts.counts, self.loss_sum, self.known))
        return {"counts": counts, "loss_sum": loss_sum, "known": known}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self.counts.load_state_dict(tensors)
        self.loss_sum.copy_(tensors["loss_sum"])
        self.known.copy_(tensors["known"])

    def score(self, world: World) -> tuple[float, AucResult]:
        """Mean loss, and AUC, of the whole side."""
        total = self.tensors(world)
        counts = AucCounts(len(CLASSES), total["counts"].device, CLASSES)
        counts.load_state_dict(total)
        return float(total["loss_sum"]) / max(1, int(total["known"])), counts.compute()


@dataclass
class _Position:
    """Where a run is: everything of its state that is not a tensor."""

    epoch: int = 1  # the epoch being trained
    step: int = 0  # steps of it that are done
    best_epoch: int = 0
    best_value: float | None = None  # of what --best-by names


class Trainer:
    """One process of a run. `run` does all of it; the parts are separate for tests and benchmarks."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        device: torch.device,
        say: Callable[[str], None] = print,
        signals: _Signals | None = None,
        started: float | None = None,
    ) -> None:
        self.config, self.world, self.device, self.say = config, world, device, say
        self.signals = signals or _Signals()
        self.deadline = (started if started is not None else time.monotonic()) + seconds_of(config.max_time)
        self.store = open_store(config.store)
        self.split = make_split(config.split, self.store.index)
        if config.batch_size < world.size:
            raise InputError(f"--batch-size {config.batch_size} leaves some of the {world.size} devices without a film")
        is_one_gpu = device.type == "cuda" and world.size == 1
        if config.cuda_graphs == "yes" and not is_one_gpu:
            here = "a CPU" if device.type != "cuda" else f"{world.size} devices"
            raise InputError(f"--cuda-graphs is for one GPU, and this run is on {here}; leave the option out")
        if config.compile == "yes" and device.type == "cpu" and world.size > 1:
            raise InputError("--compile yes is for one process on a CPU (batch norm over several does not compile)")
        self.recorded = self._open_run()
        if device.type == "cuda" and device.index is not None:  # a graph is of the current device
            torch.cuda.set_device(device)
        self.precision = self._precision()
        _set_determinism(config.deterministic, device)

        train_index = self.store.index.iloc[self.split.train]
        self.normalisation = pixel_statistics(self.store, self.split.train)
        self.age = age_statistics(train_index["age"])
        self.data = FilmData(self.store, device, self.normalisation, self.age, config.data, config.prefetch)
        self.known = np.isfinite(self.store.targets).sum(1)  # per film, for exact means over several processes

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix_seed(config.seed))
            self.net = ChestNet(self.store.size, config.model, config.head)
        self.noise = Noise(config.seed, device)
        self.net.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model: torch.nn.Module = self.net
        if world.size > 1:
            synchronise_norms(self.net)
            self.model = DistributedDataParallel(self.net, broadcast_buffers=False, gradient_as_bucket_view=True)
        self._compiled: Callable[..., Any] | None = None
        if config.compile == "yes" or (config.compile == "auto" and is_one_gpu and fused.MISSING["cuda"]):
            self._compiled = torch.compile(self.model, dynamic=False)
        replays = is_one_gpu and config.cuda_graphs != "no"
        # Fused, Adam keeps its count of steps on the device in either case: a run may change sides when it is resumed.
        self.optimizer = Adam(self.net.parameters(), config.lr, fused=True, capturable=replays)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision.name == "fp16")
        weights = class_weights(self.store.targets[self.split.train], config.weighting)
        self.criterion = WeightedBCEWithAUC(*weights).to(device)
        self.train_side, self.test_side = _Side.empty(device), _Side.empty(device)
        self.position = _Position()
        self.steps_per_epoch = -(-len(self.split.train) // config.batch_size)
        self.stopping = False  # all processes agree on it, unlike on what their signals say
        self._saved_at = time.monotonic()
        self._save_s = 0.0
        self._memory_is_kept = False
        self._step_number = torch.zeros((), dtype=torch.int64, device=device)
        self._first_bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self._replayed: ReplayedStep | None = None
        if replays:
            self.replay_steps(capture_cuda_graph)

    def run(self) -> dict[str, Any]:
        """Train to the end, or to where something asks for a stop."""
        config = self.config
        self._write_config()
        self._resume()
        if self.position.epoch > config.epochs:
            self.say(f"{config.run} is complete: {config.epochs} of {config.epochs} epochs; more with --epochs")
            return self._result("complete")
        rate = float(self.world.sum(torch.tensor(matmul_rate(self.device, self.precision.dtype), device=self.device)))
        self._introduce(rate)
        self._saved_at = time.monotonic()
        while self.position.epoch <= config.epochs:
            speed = self._train_epoch(rate)
            if not self.stopping:
                self._evaluate()
            if self.stopping or self._should_stop():
                return self._stop()
            self._finish_epoch(speed)
        self.say(f"complete: {config.epochs} epochs; best epoch {self.position.best_epoch}")
        return self._result("complete")

    # ---- the arithmetic ----

    def replay_steps(self, capture: Capture) -> None:
        """Have every full batch's step replayed from what ``capture`` makes of it, once it has run a few times.

        The step then reads its batch, dropout's bytes and its own number from tensors of fixed place, and leaves its
        loss in one; nothing in it asks the device for a value. An epoch's last, shorter batch is stepped as ever.
        """

        def step(*feed: Any) -> Tensor:
            return self._step(Feed(*feed), 1.0, None)

        self._replayed = ReplayedStep(step, capture, self.device, self._go_on_uncaptured)

    def _go_on_uncaptured(self, error: RuntimeError) -> None:
        """Undo what an attempt to capture left on the host: the device has done nothing of it."""
        why = _first_line(error.__context__ or error)  # a capture that was cut short fails once more at its end
        if self.config.cuda_graphs == "yes":
            raise InputError(f"--cuda-graphs yes: capturing a step fails here ({why}); use --cuda-graphs no") from error
        self.say(f"network: steps are not replayed, because capturing one fails here ({why})")
        self.optimizer.zero_grad(set_to_none=True)  # they lie in the graph's memory, which nothing was written to
        if self.scaler.is_enabled():  # it may be in the middle of a step
            state = self.scaler.state_dict()
            self.scaler = torch.amp.GradScaler(self.device.type)
            self.scaler.load_state_dict(state)

    @property
    def _is_watched(self) -> bool:
        """Whether the host looks at every step: on a CPU, where that costs nothing."""
        return self.device.type == "cpu" and self._replayed is None

    def start_step(self, num_rows: int) -> None:
        """Before `train_step`: place dropout's noise at this step of a global batch of ``num_rows`` films."""
        step = (self.position.epoch - 1) * self.steps_per_epoch + self.position.step
        self._step_number.fill_(step)
        self._noise = self.noise.draw(step, self.net.noise_shapes(), self.world.share(num_rows), num_rows)
        self._is_full = num_rows == self.config.batch_size
        if self._is_watched:  # what the forward pass changes, so that a bad step can be undone
            self._buffers = [buffer.clone() for buffer in self.net.buffers()]

    def train_step(self, feed: Feed, known_share: float = 1.0, known: int | None = None) -> Tensor:
        """Forward, backward, update; returns the loss of this process's rows, still on the device.

        Args:
            feed: this process's rows.
            known_share: their known labels over those of the global batch, times the number of processes, so that the
                average of the processes' gradients is the gradient of the global mean.
            known: known labels of these rows, for the epoch's mean; None has the device count them.
        """
        if self._replayed is not None and self._is_full:
            return self._replayed(*feed)
        return self._step(feed, known_share, known)

    def _step(self, feed: Feed, known_share: float, known: int | None) -> Tensor:
        batch = self.data.make_batch(feed)
        with torch.autocast(self.device.type, self.precision.dtype, enabled=self.precision.name != "fp32"):
            logits = self._forward(batch.images, batch.metadata, self._noise)
        loss: Tensor = self.criterion(logits, batch.targets, self.train_side.counts)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss * known_share if known_share != 1.0 else loss).backward()
        self._guard(loss, logits, batch.targets)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.train_side.add(loss, torch.isfinite(batch.targets).sum() if known is None else known)
        if not self._memory_is_kept:
            # Not before: what the first step leaves for good, Adam's moments, would lie between what later steps share,
            # and large maps would no longer fit there (fp32, batch 32: 2.27 GiB instead of 1.76).
            self._memory_is_kept = True
            keep_freed_memory(self.device)
        return loss.detach()

    def _forward(self, *arguments: Any) -> Tensor:
        """The network, compiled where that was chosen; an epoch's last batch has a size of its own and is not."""
        if self._compiled is None or not self._is_full:
            logits: Tensor = self.model(*arguments)
            return logits
        try:
            return self._compiled(*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            why = _first_line(error)
            if self.config.compile == "yes":
                raise InputError(f"--compile yes: torch.compile fails here ({why}); use --compile no") from error
            self.say(f"network: as it is, because torch.compile fails here ({why})")
            self._compiled = None
            return self._forward(*arguments)

    def _train_epoch(self, rate: float) -> dict[str, float | None]:
        """The rest of the present epoch; returns its speed, of which ``rate`` is the matrix product's FLOP/s."""
        config, position = self.config, self.position
        order = epoch_order(self.split.train, config.seed, position.epoch)
        batches = [
            order[step * config.batch_size : (step + 1) * config.batch_size]
            for step in range(position.step, self.steps_per_epoch)
        ]
        ours = [rows[self.world.share(len(rows))] for rows in batches]
        if position.step == 0:
            self.train_side.reset()
        self.model.train()
        self.data.wait_s = 0.0
        synchronise(self.device)
        begin = time.perf_counter()
        paused, images = 0.0, 0
        with self._bar(f"epoch {position.epoch}/{config.epochs}", len(order), position.step * config.batch_size) as bar:
            for rows, own_rows, feed in zip(batches, ours, self.data.feeds(ours), strict=True):
                self.start_step(len(rows))
                known, all_known = int(self.known[own_rows].sum()), int(self.known[rows].sum())
                share = known * self.world.size / max(1, all_known) if self.world.size > 1 else 1.0
                loss = self.train_step(feed, share, known)
                position.step += 1
                images += len(rows)
                if bar.update(len(rows)):  # true only when the bar is drawn: the one time that the host waits
                    bar.set_postfix_str(f"loss {float(loss):.4f}", refresh=False)
                    self._raise_if_bad()
                pause = time.perf_counter()
                if self._should_stop():
                    break
                if position.step < self.steps_per_epoch and self._save_due():
                    self._save()
                    paused += time.perf_counter() - pause
        self._raise_if_bad()
        synchronise(self.device)
        seconds = max(1e-9, time.perf_counter() - begin - paused)
        if not images:  # resumed behind the last step: only the test is left of this epoch
            return dict.fromkeys(("images_per_second", "input_share", "flops_share"))
        return {
            "images_per_second": images / seconds,
            "input_share": self.data.wait_s / seconds,
            "flops_share": images / seconds * self.net.flops_per_image(training=True) / rate,
        }

    def _evaluate(self) -> None:
        """Loss and counts of the test split, each film once."""
        self.test_side.reset()
        self.model.eval()
        size = self.config.batch_size
        rows = torch.from_numpy(self.split.test)[self.world.share(len(self.split.test))]
        batches = [rows[begin : begin + size] for begin in range(0, len(rows), size)]
        with self._bar("test", len(rows), 0) as bar, torch.inference_mode():
            for own_rows, batch in zip(batches, self.data.batches(batches), strict=True):
                with torch.autocast(self.device.type, self.precision.dtype, enabled=self.precision.name != "fp32"):
                    logits = self.net(batch.images, batch.metadata)
                known = int(self.known[own_rows].sum())
                self.test_side.add(self.criterion(logits, batch.targets, self.test_side.counts), known)
                bar.update(len(own_rows))
                if self.world.size == 1 and self._should_stop():
                    return

    # ---- the guard ----

    def _guard(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Note the first step whose loss or gradient is not finite.

        Where the host looks at every step, it is undone and the state before it saved. A GPU is not waited for: there
        the bad step is seen when the bar is drawn, and the last saved state is the one before it that counts.
        """
        bad = ~torch.isfinite(loss.detach())
        if not self.scaler.is_enabled():  # with loss scaling a gradient that overflows is expected, and skipped
            grads = [p.grad for p in self.net.parameters() if p.grad is not None]
            bad = bad | ~torch.isfinite(torch.nn.utils.get_total_norm(grads))
        if not self._is_watched:
            seen = torch.where(bad & (self._first_bad_step < 0), self._step_number, self._first_bad_step)
            self._first_bad_step.copy_(seen)
            return
        if self.world.any([bool(bad)])[0]:
            self._first_bad_step.copy_(self._step_number)
            with torch.no_grad():
                for buffer, kept in zip(self.net.buffers(), self._buffers, strict=True):
                    buffer.copy_(kept)
            counted = AucCounts(len(CLASSES), self.device)
            counted.update(logits, targets)
            self.train_side.counts.counts -= counted.counts
            self._save()
            self._raise_if_bad()

    def _raise_if_bad(self) -> None:
        step = int(self._first_bad_step)
        if step < 0:
            return
        epoch, within = divmod(step, self.steps_per_epoch)
        raise Diverged(
            f"the loss or a gradient is not finite at epoch {epoch + 1}, step {within + 1}; the state before it is in "
            f"{self.config.run / CHECKPOINT}: start a new run with a lower --lr"
            + (" or without --amp" if self.precision.name != "fp32" else "")
        )

    # ---- stopping and saving ----

    def _should_stop(self) -> bool:
        """Whether any process was asked to stop, or the time is up once what is left to do is counted in."""
        if not self.signals.reason and time.monotonic() + 2 * self._save_s + 1 > self.deadline:
            self.signals.reason = f"--max-time {self.config.max_time} is up"
        if self.world.any([bool(self.signals.reason)])[0]:
            self.signals.reason = self.signals.reason or "another process was stopped"
            self.stopping = True
        return self.stopping

    def _stop(self) -> dict[str, Any]:
        self._save()
        position = self.position
        self.say(
            f"stopped ({self.signals.reason}) in epoch {position.epoch} after step {position.step} of "
            f"{self.steps_per_epoch}, saved; go on with: cxrfast-train {self.config.store} {self.config.run} --resume"
        )
        if self.signals.interrupted:
            raise KeyboardInterrupt
        return self._result("stopped")

    def _save_due(self) -> bool:
        config = self.config
        by_steps = config.checkpoint_steps > 0 and self.position.step % config.checkpoint_steps == 0
        by_time = time.monotonic() - self._saved_at > config.checkpoint_minutes * 60
        return by_steps or self.world.any([by_time])[0]

    def _save(self) -> None:
        """The whole state, as one durable file."""
        begin = time.monotonic()
        side = self.train_side.tensors(self.world)
        if self.world.is_first:
            tensors = {f"model.{name}": tensor for name, tensor in self.net.state_dict().items()}
            names = [name for name, _ in self.net.named_parameters()]
            for number, state in self.optimizer.state_dict()["state"].items():
                tensors |= {f"adam.{names[number]}.{key}": value for key, value in state.items()}
            tensors |= {f"train.{name}": tensor for name, tensor in side.items()}
            state = {"position": vars(self.position), "scaler": self.scaler.state_dict(), "identity": self._identity()}
            save_checkpoint(self.config.run / CHECKPOINT, tensors, state)
        self._saved_at = time.monotonic()
        self._save_s = max(self._save_s, self._saved_at - begin)

    def _resume(self) -> None:
        """Take the newest state that is whole, and cut metrics.jsonl back to it."""
        if not self.config.resume:
            return
        folder = self.config.run / CHECKPOINT
        checkpoint = load_checkpoint(folder)
        if checkpoint is None:
            self.say(f"nothing to resume in {self.config.run}; training begins")
        else:
            self._take(checkpoint)
        if self.world.is_first:
            kept = [m for m in read_metrics(self.config.run) if m["epoch"] < self.position.epoch]
            write_atomic(self.config.run / METRICS, "".join(json.dumps(m, allow_nan=False) + "\n" for m in kept))

    def _take(self, checkpoint: Checkpoint) -> None:
        for name, value in self._identity().items():
            found = checkpoint.state.get("identity", {}).get(name)
            if found != value:
                raise InputError(f"{checkpoint.path} belongs to another {name} ({found}), this run has {value}")
        if checkpoint.damage:
            self.say(f"warning: {checkpoint.damage}; going on from {checkpoint.path.name}")
        part: dict[str, dict[str, Tensor]] = {"model": {}, "adam": {}, "train": {}}
        for name, tensor in checkpoint.tensors.items():
            kind, _, rest = name.partition(".")
            part.setdefault(kind, {})[rest] = tensor
        load_weights(self.net, part["model"], str(checkpoint.path))
        for name, parameter in self.net.named_parameters():
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in part["adam"]]
            for key in keys:
                value = part["adam"][f"{name}.{key}"]
                like = parameter if value.dim() else torch.empty((), device=self.device)
                self.optimizer.state[parameter][key] = torch.empty_like(like, dtype=value.dtype).copy_(value)
        self.scaler.load_state_dict(checkpoint.state["scaler"]) if self.scaler.is_enabled() else None
        if self.world.is_first:  # the sum over all processes continues in the first; the others begin at nothing
            self.train_side.load(part["train"])
        self.position = _Position(**checkpoint.state["position"])

    def _identity(self) -> dict[str, Any]:
        """What a state must agree on with the run that takes it."""
        return {
            "model": f"{self.config.model}, head {self.config.head}, {self.store.size} pixels",
            "split": f"{self.split.name} {self.split.digest}",
            "store": self.store.digest,
            "classes": list(CLASSES),
            "precision": self.precision.name,
            **{name: getattr(self.config, name) for name in ("batch_size", "lr", "weighting", "seed", "best_by")},
        }

    # ---- the folder ----

    def _open_run(self) -> dict[str, Any] | None:
        """Check RUN before anything is computed; returns its config.json when it is to be continued."""
        config = self.config
        run = config.run
        if run.exists() and not run.is_dir():
            raise InputError(f"{run} is a file; the run must be a folder")
        problem = None
        if self.world.is_first:
            if (run / CONFIG).is_file() and not config.resume:
                problem = f"{run} holds a run already; go on with it by --resume, or choose another folder"
            elif not (run / CONFIG).is_file() and holds_other_files(run, run / CONFIG):
                problem = f"{run} holds other files; choose an empty or new folder for the run"
        problem = self.world.agree(problem)
        if problem:
            raise InputError(problem)
        if not (run / CONFIG).is_file():
            return None
        recorded = read_config(run)
        for name in IDENTITY:
            now = getattr(config, name)
            if recorded["options"].get(name) != now:
                option = f"--{name.replace('_', '-')}"
                raise InputError(
                    f"{run} was begun with {option} {recorded['options'].get(name)}, not {now}; leave the option out "
                    "to go on, or choose another folder"
                )
        for what, now in (("store", self.store.digest), ("split", self.split.digest)):
            if recorded.get(what, {}).get("digest") != now:
                raise InputError(f"{run} was begun with another {what}; give that one to go on, or another folder")
        if recorded.get("classes") != list(CLASSES):
            raise InputError(f"{run} has another class order than this cxrfast; start a new run")
        return recorded

    def _precision(self) -> Precision:
        """A run keeps its arithmetic; a new one takes what the first process chooses."""
        if self.recorded is not None:
            name = str(self.recorded["precision"])
            if name == "fp16" and self.device.type == "cpu":
                raise InputError(f"{self.config.run} was begun in fp16, which a CPU does not train in; use a GPU")
            return Precision(name, f"arithmetic: {name}, as this run began")
        chosen = choose_precision(self.config.amp, self.config.amp_dtype, self.device) if self.world.is_first else None
        return Precision(*self.world.agree(chosen))

    def _write_config(self) -> None:
        config = self.config
        content = {
            "options": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()},
            "versions": {
                "cxrfast": cxrfast.__version__,
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
            "device": device_name(self.device),
            "processes": self.world.size,
            "precision": self.precision.name,
            "store": {"digest": self.store.digest, "pixel_rule": self.store.pixel_rule, "size": self.store.size},
            "split": {
                "name": self.split.name,
                "digest": self.split.digest,
                "train": len(self.split.train),
                "test": len(self.split.test),
            },
            "classes": list(CLASSES),
            "normalisation": self.normalisation._asdict(),
            "age": {"mean": self.age[0], "std": self.age[1]},
            "metadata": list(METADATA) if config.model == "multimodal" else [],
            "parameters": sum(p.numel() for p in self.net.parameters()),
            "weights": {
                BEST: f"best epoch by test {config.best_by}: chosen on the test split, hence an optimistic score",
                LAST: "last epoch: chosen by nothing",
            },
        }
        if self.world.is_first:
            config.run.mkdir(parents=True, exist_ok=True)
            if content != self.recorded:
                write_json(config.run / CONFIG, content)

    def _finish_epoch(self, speed: dict[str, float | None]) -> None:
        """Score the epoch, then metrics, weights and state, in this order: a kill between any two only repeats work."""
        position, config = self.position, self.config
        (train_loss, train_auc), (test_loss, test_auc) = (
            side.score(self.world) for side in (self.train_side, self.test_side)
        )
        value = test_auc.macro if config.best_by == "auc" else -test_loss
        better = math.isfinite(value) and (position.best_value is None or value > position.best_value)
        if better or position.best_epoch == 0:
            position.best_epoch = position.epoch
            position.best_value = value if math.isfinite(value) else None
        line = {
            "epoch": position.epoch,
            "train_loss": train_loss,
            "test_loss": test_loss,
            "train_macro_auc": _number(train_auc.macro),
            "test_macro_auc": _number(test_auc.macro),
            "train_classes": train_auc.defined,
            "test_classes": test_auc.defined,
            "train_auc": _by_class(train_auc.auc),
            "test_auc": _by_class(test_auc.auc),
            "test_auc_low": _by_class(test_auc.low),
            "test_auc_high": _by_class(test_auc.high),
            "best": position.best_epoch == position.epoch,
            "split": {"name": self.split.name, "digest": self.split.digest},
            **speed,
        }
        if self.world.is_first:
            _append(config.run / METRICS, line)
            weights = dict(self.net.state_dict())
            about = {"epoch": position.epoch, **self._identity()}
            save_tensors(config.run / LAST, weights, about)
            if position.best_epoch == position.epoch:
                save_tensors(config.run / BEST, weights, about)
        self.say(_epoch_table(line, config.epochs, str(self.split)))
        position.epoch, position.step = position.epoch + 1, 0
        self._save()

    def _introduce(self, rate: float) -> None:
        parameters = sum(p.numel() for p in self.net.parameters())
        config, position = self.config, self.position
        self.say(
            f"{config.model} ({config.head}, {parameters:,} parameters) on {len(self.split.train):,} films of "
            f"{self.store.size} pixels, tested on {len(self.split.test):,}; split {self.split}"
        )
        devices = f"{self.world.size} x {device_name(self.device)}" if self.world.size > 1 else device_name(self.device)
        self.say(f"device: {devices}; matrix product {rate / 1e9:,.0f} GFLOP/s")
        self.say(self.precision.line)
        self.say(self.network_line())
        self.say(self.data.line)
        if position.epoch > 1 or position.step:
            self.say(f"going on in epoch {position.epoch} after step {position.step} of {self.steps_per_epoch}")

    def network_line(self) -> str:
        """How the network is run, and why."""

        def why(option: Switch, default: str = "the default on one GPU") -> str:
            return default if option == "auto" else "as asked"

        if self._compiled is not None:
            because = why(self.config.compile, fused.MISSING["cuda"])
            line = f"network: torch.compile ({because}); the first step waits for it"
        elif not fused.MISSING[self.device.type]:
            line = "network: eager, with compiled passes for batch norm and what follows it"
        else:
            line = "network: eager"
        if self._replayed is not None and self._replayed.has_failed:
            line += "; no CUDA graph (capturing one failed)"
        elif self._replayed is not None:
            line += f"; steps are replayed as a CUDA graph ({why(self.config.cuda_graphs)})"
        elif self.device.type == "cuda":
            line += f"; no CUDA graph ({'as asked' if self.config.cuda_graphs == 'no' else 'it is for one GPU'})"
        return line

    def _result(self, state: str) -> dict[str, Any]:
        metrics = read_metrics(self.config.run)
        best = next((m for m in metrics if m["epoch"] == self.position.best_epoch), None)
        return {
            "run": str(self.config.run),
            "state": state,
            "epochs": len(metrics),
            "best_epoch": self.position.best_epoch or None,
            "best_test_macro_auc": best and best["test_macro_auc"],
            "last_test_macro_auc": metrics[-1]["test_macro_auc"] if metrics else None,
            "split": {"name": self.split.name, "digest": self.split.digest},
            "selection": f"best epoch chosen on the test split by {self.config.best_by}",
        }

    def _bar(self, title: str, total: int, initial: int) -> tqdm:
        return tqdm(
            desc=title,
            total=total,
            initial=initial,
            unit="img",
            file=sys.stderr,
            mininterval=1.0,
            leave=False,
            disable=None if self.world.is_first else True,
        )


def _set_determinism(wanted: bool, device: torch.device) -> None:
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if wanted != torch.are_deterministic_algorithms_enabled():  # the setter imports torch's compiler, two seconds
        torch.use_deterministic_algorithms(wanted)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not wanted


def _append(path: Path, line: dict[str, Any]) -> None:
    """One JSON line, durably."""
    is_new = not path.exists()
    with open(path, "a") as file:
        file.write(json.dumps(line, allow_nan=False) + "\n")
    make_durable(path)
    if is_new:
        make_durable(path.parent)


def _first_line(error: BaseException) -> str:
    """What the error says, in one line."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _number(value: float) -> float | None:
    """JSON has no NaN: undefined is null."""
    return value if math.isfinite(value) else None


def _by_class(values: Tensor) -> dict[str, float | None]:
    return {name: _number(value) for name, value in zip(CLASSES, values.tolist(), strict=True)}


def _epoch_table(line: dict[str, Any], epochs: int, split: str) -> str:
    """What the terminal shows of an epoch."""

    def shown(value: float | None) -> str:
        return "   n/a" if value is None else f"{value:6.4f}"

    rows = [f"epoch {line['epoch']}/{epochs}, split {split}", f"  {'':20}  train    test"]
    for name in CLASSES:
        rows.append(f"  {name:20} {shown(line['train_auc'][name])}  {shown(line['test_auc'][name])}")
    macro = f"AUC over {line['train_classes']} / {line['test_classes']}"
    rows.append(f"  {macro:20} {shown(line['train_macro_auc'])}  {shown(line['test_macro_auc'])}")
    best = "  (best so far)" if line["best"] else ""
    rows.append(f"  {'loss':20} {line['train_loss']:6.4f}  {line['test_loss']:6.4f}{best}")
    if line["images_per_second"] is not None:
        rows.append(
            f"  {line['images_per_second']:,.1f} training images/s, input {line['input_share']:.1%} of the time, "
            f"{line['flops_share']:.0%} of the matrix product's rate"
        )
    return "\n".join(rows)
