"""What this machine has, which parts of cxrfast can use it, and what is missing for the rest."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import cxrfast
from cxrfast import block, loss_op
from cxrfast.decode import backends

_PACKAGES = ("numpy", "pandas", "scikit-learn", "Pillow", "nvidia-dali-cuda120")


def examine() -> dict[str, Any]:
    """Everything that decides how fast cxrfast runs here; JSON values.

    Returns:
        versions: package → version, or None where it is absent.
        machine: cores that this process may use, memory in GiB, processor and operating system.
        devices: CUDA devices: name, compute capability, memory in GiB, whether they compute in bf16.
        parts: part → what it is, whether it is ready, and the reason where it is not.
    """
    return {
        "versions": {
            "cxrfast": cxrfast.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,  # with the CUDA that it was built for, which its metadata need not name
            **{name: _version(name) for name in _PACKAGES},
        },
        "machine": {
            "cores": backends.available_cores(),
            "memory_gib": _memory_gib(),
            "processor": _processor(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "devices": [_device(index) for index in range(torch.cuda.device_count())],
        "parts": {**_decoders(), **_training()},
    }


def report(findings: dict[str, Any]) -> str:
    """The findings as lines for people."""
    machine = findings["machine"]
    lines = [f"{name:<20} {found or 'not installed'}" for name, found in findings["versions"].items()]
    lines.append(f"{'machine':<20} {machine['cores']} cores, {machine['memory_gib']} GiB, {machine['processor']}")
    devices = [
        f"{device['name']}, sm_{device['capability']}, {device['memory_gib']} GiB" for device in findings["devices"]
    ]
    lines += [f"{'GPU':<20} {device}" for device in devices or ["none: everything runs on the CPU"]]
    for name, part in findings["parts"].items():
        state = "ready" if part["ready"] else "missing"
        lines.append(f"{name:<20} {state}: {part['what']}{'; ' + part['reason'] if part['reason'] else ''}")
    return "\n".join(lines)


def _part(what: str, reason: str = "") -> dict[str, Any]:
    return {"what": what, "ready": not reason, "reason": reason}


def _decoders() -> dict[str, Any]:
    what = {
        "pillow": "reference decoder, one process a core",
        "native": "cxrfast's own decoder, the fastest on a CPU",
        "dali": "NVIDIA DALI's decoder; resizes on a GPU where there is one",
        "dali-native": "cxrfast's decoder as an operator of NVIDIA DALI",
    }
    return {f"decoder {name}": _part(text, backends.missing(name)) for name, text in what.items()}


def _training() -> dict[str, Any]:
    reason = "" if torch.cuda.is_available() else "torch sees no CUDA device"
    plain = {device: f"{why}; plain torch is in use" for device, why in loss_op.MISSING.items()}
    layers = {device: why and f"{why}; plain torch is in use" for device, why in block.MISSING.items()}
    return {
        "training on a GPU": _part("CUDA through torch", reason),
        "network on the CPU": _part(
            "batch norm, ReLU, pool and dropout in one pass; weight gradients for AVX2",
            layers["cpu"],
        ),
        "network on a GPU": _part("batch norm, ReLU, pool and dropout in one CUDA kernel each", layers["cuda"]),
        "loss on the CPU": _part("weighted BCE, gradient and AUC counts in one pass", plain.get("cpu", "")),
        "loss on a GPU": _part("the same as one CUDA kernel", plain.get("cuda", "")),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "bf16": properties.major >= 8,  # before Ampere bf16 is emulated
    }


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _processor() -> str:
    if sys.platform == "linux":
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown processor"
