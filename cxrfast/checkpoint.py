"""The state from which a run goes on: one safetensors file with its JSON in the header, replaced as one step.

    RUN/checkpoint/latest.safetensors    the newest state
    RUN/checkpoint/previous.safetensors  the one before

Promises: a file of this name is whole or was damaged after it was written, and then its checksum says so and the
previous one serves; at no moment is there none, once the first was written. Nothing is pickled.
Left out: what the state means (train.py).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cxrfast.errors import InputError
from cxrfast.files import make_durable, write_atomic

LATEST, PREVIOUS = "latest.safetensors", "previous.safetensors"


class Checkpoint(NamedTuple):
    """A state that was read back."""

    tensors: dict[str, Tensor]  # on the CPU
    state: dict[str, Any]  # JSON values
    path: Path
    damage: str  # why `latest` could not be used and this is `previous`; empty otherwise


def save_tensors(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write one safetensors file durably and in one step; ``state`` (JSON values) and a checksum go into its header."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(state, allow_nan=False)
    header = {"state": text, "sha256": _digest(contiguous, text)}
    write_atomic(path, save(contiguous, metadata=header))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `save_tensors` wrote.

    Raises:
        InputError: the file is absent, truncated or changed, or not one of ours.
    """
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        state = json.loads(header["state"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error})") from error
    if _digest(tensors, header["state"]) != header.get("sha256"):
        raise InputError(f"{path} is damaged: its content does not match its checksum")
    return tensors, state


def save_checkpoint(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Make this the latest state and keep the one before as the previous."""
    folder.mkdir(parents=True, exist_ok=True)
    incoming = folder / "incoming.safetensors"
    save_tensors(incoming, tensors, state)
    if (folder / LATEST).is_file():
        os.replace(folder / LATEST, folder / PREVIOUS)
    os.replace(incoming, folder / LATEST)
    make_durable(folder)


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The latest state that is whole, or None where none was ever written.

    Raises:
        InputError: states are there, and none of them is whole.
    """
    damage = []
    for name in (LATEST, PREVIOUS):
        if not (folder / name).is_file():
            continue
        try:
            tensors, state = load_tensors(folder / name)
        except InputError as error:
            damage.append(str(error))
            continue
        return Checkpoint(tensors, state, folder / name, "; ".join(damage))
    if damage:
        raise InputError(f"{'; '.join(damage)}; no state is left to resume from, so start again in a new folder")
    return None


def _digest(tensors: Mapping[str, Tensor], state: str) -> str:
    digest = hashlib.sha256(f"{state}\n".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
