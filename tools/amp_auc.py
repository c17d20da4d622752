"""Does half precision cost accuracy? Trains both networks in fp32 and in half precision and compares the test AUC.

    python tools/amp_auc.py STORE RUNS --epochs 4

Every run is the trainer's own, autocast and loss scaling included. On a GPU nothing is emulated, and layers are not
compiled: each rounds its result to half precision, which compiled ones partly spare. On a CPU that has bf16 arithmetic,
bf16 runs use it. Elsewhere, and in fp16, torch's convolutions are ten times too slow on a CPU, so that convolutions and
matrix products of half-precision tensors are computed here as tensor cores compute them: products and sums in fp32, the
result rounded once. Everything else (batch norm, pooling, dropout) runs in half precision as torch has it on a CPU.

A run that is complete is not repeated, one that was killed goes on: the tool may be stopped and started at any time.
Left out: speed, of which such an emulation says nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import tyro
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cxrfast import block
from cxrfast.devices import BF16_GAIN, Precision, bf16_gain, choose_device, device_name
from cxrfast.errors import InputError
from cxrfast.models import ModelName
from cxrfast.parallel import World
from cxrfast.train import TrainConfig, Trainer, read_metrics

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Config:
    """Options."""

    store: Annotated[Path, tyro.conf.Positional]
    """Prepared store."""
    runs: Annotated[Path, tyro.conf.Positional]
    """Folder of the runs."""
    epochs: int = 4
    """Epochs of each run."""
    seeds: int = 3
    """Runs of each kind."""
    precisions: tuple[str, ...] = ("fp32", "bf16")
    """fp32, bf16 and fp16 (with loss scaling, as on GPUs that lack bf16)."""
    batch_size: int = 32
    """Films a step."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes the GPU where there is one; runs of a GPU and of a CPU have folders of their own."""


class TensorCores(TorchDispatchMode):
    """Convolutions and matrix products of half-precision tensors with fp32 sums, rounded once."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        halves = [a for a in args if isinstance(a, Tensor) and a.dtype in HALF]
        aten = torch.ops.aten
        ours = (aten.convolution.default, aten.convolution_backward.default, aten.mm.default, aten.addmm.default)
        if halves and func in (aten.conv2d.default, aten.linear.default, aten.matmul.default):
            with self:  # in inference mode they come whole
                return func.decompose(*args, **(kwargs or {}))
        if not halves or func not in ours:
            return func(*args, **(kwargs or {}))
        wide = [a.float() if isinstance(a, Tensor) else a for a in args]
        dtype = halves[0].dtype
        if func is aten.convolution_backward.default:
            grad, x, kernel, mask = *wide[:3], args[-1]
            with torch.autocast("cpu", enabled=False):
                grad_x, grad_kernel = block.conv_backward(_dense(grad), _dense(x), kernel, bool(mask[0]))
            return None if grad_x is None else grad_x.to(dtype), grad_kernel.to(dtype), None
        return func(*wide, **(kwargs or {})).to(dtype)


def _dense(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class ForcedTrainer(Trainer):
    """A trainer that takes the arithmetic it is told, in spite of the CPU."""

    def _precision(self) -> Precision:
        name = self.config.amp_dtype if self.config.amp else "fp32"
        return Precision(name, f"arithmetic: {name}")


def arithmetic(precision: str, gain: float) -> str:
    """How a precision is computed on a CPU whose bf16 convolutions run at ``gain`` times the speed of fp32."""
    if precision == "fp32" or (precision == "bf16" and gain >= BF16_GAIN):
        return "native"
    return "emulated"


def score(config: Config, device: torch.device, model: ModelName, precision: str, seed: int, emulated: bool) -> float:
    """Test macro AUC after the last epoch; trains where that has not been done."""
    run = config.runs / (f"{model}-{precision}-{seed}" + ("" if device.type == "cpu" else f"-{device.type}"))
    options = TrainConfig(
        config.store,
        run,
        model=model,
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=seed,
        device=str(device),
        compile="no",
        resume=True,
        checkpoint_minutes=1.0,
    )
    if precision != "fp32":
        options = dataclasses.replace(options, amp=True, amp_dtype=precision)  # type: ignore[arg-type]
    metrics = read_metrics(run)
    if len(metrics) < config.epochs:
        cores: AbstractContextManager[Any] = TensorCores() if emulated else nullcontext()
        with cores:
            trainer = ForcedTrainer if device.type == "cpu" else Trainer
            trainer(options, World(), device, lambda line: None).run()
        metrics = read_metrics(run)
    return float(metrics[config.epochs - 1]["test_macro_auc"])


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, then print the table; the last line is JSON."""
    config = tyro.cli(Config, description=__doc__, args=argv)
    if unknown := set(config.precisions) - {"fp32", "bf16", "fp16"}:
        raise InputError(f"there is no precision {unknown.pop()!r}; choose among fp32, bf16 and fp16")
    device = choose_device(config.device)
    if device.type == "cpu":
        gain = bf16_gain()
        how = {precision: arithmetic(precision, gain) for precision in config.precisions}
        kinds = ", ".join(f"{precision} {kind}" for precision, kind in how.items())
        print(f"a bf16 convolution runs at {gain:.2g} x the speed of fp32 on this CPU: {kinds}", flush=True)
    else:
        how = dict.fromkeys(config.precisions, "native")
        print(f"{device_name(device)}: its own arithmetic", flush=True)
    found: dict[str, dict[str, list[float]]] = {m: {p: [] for p in config.precisions} for m in get_args(ModelName)}
    for seed, model, precision in itertools.product(range(config.seeds), found, config.precisions):
        auc = score(config, device, model, precision, seed, how[precision] == "emulated")  # type: ignore[arg-type]
        found[model][precision].append(auc)
        print(f"{model:10} {precision} ({how[precision]}) seed {seed}: test macro AUC {auc:.4f}", flush=True)
    for model, by_precision in found.items():
        means = {precision: statistics.mean(values) for precision, values in by_precision.items()}
        print(f"{model:10} " + ", ".join(f"{precision} {mean:.4f}" for precision, mean in means.items()))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
