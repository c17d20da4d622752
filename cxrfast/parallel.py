"""Several processes that train one network: who is who, sums across them, batch norm over all, and how they start.

Processes find each other by torchrun's environment variables (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT),
whether torchrun set them or `launch` did. NCCL carries tensors between GPUs, gloo between CPUs and everything that the
host decides. Left out: gradients, which DistributedDataParallel averages.
"""

from __future__ import annotations

import datetime
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cxrfast.errors import InputError, ResourceError

TIMEOUT = datetime.timedelta(minutes=10)  # of one collective; a rank may be writing its checkpoint meanwhile
GRACE_S = 20.0  # between asking the other processes to stop and stopping them


class World:
    """The processes of this job, of which one is us; a single process needs no set-up and pays nothing.

    Used as a context manager: the group is left at the end.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self._host: Any = None

    @property
    def is_first(self) -> bool:
        """Whether we are the one that writes files and prints."""
        return self.rank == 0

    def join(self, device: torch.device) -> None:
        """Meet the other processes; each keeps its share of this machine's cores."""
        if self.size == 1:
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            local_size = int(os.environ.get("LOCAL_WORLD_SIZE", str(self.size)))
            torch.set_num_threads(max(1, torch.get_num_threads() // local_size))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
        self._host = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        # After a failure the others may be gone, and leaving in order would wait for them.
        if self.size > 1 and dist.is_initialized() and kind is None:
            dist.destroy_process_group()

    def share(self, count: int) -> slice:
        """Our part of ``count`` rows: every row belongs to exactly one process, parts differ by at most one row."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, a new tensor."""
        total = tensor.detach().clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag, whether any process raised it. Goes between hosts: no device is waited for."""
        if self.size == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX, group=self._host)
        return [bool(flag) for flag in raised.tolist()]

    def agree(self, value: Any) -> Any:
        """The first process's value (anything that JSON holds), in every process."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self._host, src=0)
        return values[0]


class _SyncNorm(torch.autograd.Function):
    """Batch norm over the rows of all processes, in plain torch; sums travel in fp64, so that order does not matter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, stats: list[Tensor]) -> Tensor:
        values = x.detach().to(torch.float32)
        count = torch.tensor([x.numel() // x.shape[1]], dtype=torch.float64, device=x.device)
        sums = torch.cat([_channel_sum(values), _channel_sum(values * values), count])
        dist.all_reduce(sums)
        channels = x.shape[1]
        total = sums[-1]
        mean = sums[:channels] / total
        variance = (sums[channels:-1] / total - mean * mean).clamp(min=0)
        inverse = (variance + eps).rsqrt().to(torch.float32)
        mean32 = mean.to(torch.float32)
        stats += [mean32, (variance * total / (total - 1).clamp(min=1)).to(torch.float32)]
        ctx.save_for_backward(x, weight, mean32, inverse)
        ctx.total = total
        scale = weight * inverse
        return (values * _per_channel(scale) + _per_channel(bias - mean32 * scale)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].to(torch.float32)
        x, weight, mean, inverse = ctx.saved_tensors
        centred = (x.to(torch.float32) - _per_channel(mean)) * _per_channel(inverse)
        grad_bias, grad_weight = _channel_sum(grad), _channel_sum(grad * centred)
        sums = torch.cat([grad_bias, grad_weight])
        dist.all_reduce(sums)
        sums /= ctx.total
        mean_grad, mean_product = sums.to(torch.float32).chunk(2)
        grad_x = (grad - _per_channel(mean_grad) - centred * _per_channel(mean_product)) * _per_channel(
            weight * inverse
        )
        # Weight and bias keep this process's part: DistributedDataParallel adds up those of all.
        return grad_x.to(x.dtype), grad_weight.to(torch.float32), grad_bias.to(torch.float32), None, None


def _channel_sum(x: Tensor) -> Tensor:
    return x.sum((0, 2, 3), dtype=torch.float64)


def _per_channel(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm whose statistics are those of the global batch, on CPUs and on GPUs (torch's own needs GPUs)."""

    def all_reduce(self, sums: Tensor) -> None:
        """What the fused passes (block.py) sum over the processes."""
        dist.all_reduce(sums)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        stats: list[Tensor] = []
        out: Tensor = _SyncNorm.apply(input, self.weight, self.bias, self.eps, stats)
        with torch.no_grad():
            for running, new in zip((self.running_mean, self.running_var), stats, strict=True):
                assert running is not None and self.momentum is not None
                running.lerp_(new.to(running.dtype), self.momentum)
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
        return out


def synchronise_norms(model: nn.Module) -> nn.Module:
    """The same network with batch norm over all processes; its keys and weights stay what they are."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                norm = SyncBatchNorm(child.num_features, child.eps, child.momentum or 0.1)
                norm.load_state_dict(child.state_dict())
                setattr(module, name, norm.to(child.weight.device))
    return model


def launch(module: str, argv: Sequence[str], processes: int) -> int:
    """Run ``python -m module argv`` as so many processes of one job, and wait.

    The first one has our stdout. SIGTERM and SIGINT reach all of them. When one dies, the others are stopped.

    Returns:
        0 when all ended well, else the exit code of the first that did not (2 for wrong input, see DESIGN: Commands).
    Raises:
        ResourceError: a process was killed; the sentence names it and the signal.
    """
    if processes < 1:
        raise InputError(f"--devices must be 1 or more, not {processes}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children: list[subprocess.Popen[bytes]] = []
    handlers = {}
    try:
        for rank in range(processes):
            variables = {**common, "RANK": rank, "LOCAL_RANK": rank}
            environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
            stdout = None if rank == 0 else subprocess.DEVNULL
            children.append(subprocess.Popen([sys.executable, "-m", module, *argv], env=environment, stdout=stdout))

        def forward(number: int, _: object) -> None:
            for child in children:
                if child.poll() is None:
                    child.send_signal(signal.SIGTERM)

        for number in (signal.SIGTERM, signal.SIGINT):
            handlers[number] = signal.signal(number, forward)
        return _wait(children)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Until all have ended, or one has failed and the rest had time to say why."""
    while not any(child.poll() for child in children):
        if all(child.poll() == 0 for child in children):
            return 0
        time.sleep(0.05)
    killed = any((child.poll() or 0) < 0 for child in children)
    deadline = time.monotonic() + (0 if killed else GRACE_S)
    while time.monotonic() < deadline and any(child.poll() is None for child in children):
        time.sleep(0.05)
    failed = [(child.poll() or 0, rank) for rank, child in enumerate(children) if child.poll()]
    code, rank = min(failed)  # a process that was killed is the cause, one that lost its neighbour is not
    if code < 0:
        name = signal.Signals(-code).name
        raise ResourceError(f"process {rank} of {len(children)} was killed by {name}; go on with --resume")
    return code
