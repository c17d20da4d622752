"""Fixtures that several test files share: where the real films are, and the rules of the markers."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

DATA = Path(os.environ.get("CXRFAST_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder with the real films and oracles; the test skips where it is absent."""
    if not (DATA / "nih" / "images").is_dir():
        pytest.skip(f"real films are not at {DATA}; set CXRFAST_DATA to their folder")
    return DATA


@pytest.fixture(scope="session")
def films(data: Path) -> list[Path]:
    """The 203 original NIH films and the 8 re-encoded ones, sorted."""
    return sorted((data / "nih" / "images").glob("*.png")) + sorted((data / "nih" / "images_reencoded").glob("*.png"))


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forces the native decoder to each instruction set level that the CPU has."""
    png = pytest.importorskip("cxrfast._png", reason="the compiled decoder is not installed")
    monkeypatch.setenv("CXRFAST_ISA", request.param)
    if png.best_isa() != request.param:
        pytest.skip(f"this CPU has no {request.param}")
    return request.param


@pytest.fixture(scope="session")
def children() -> ForkServerContext:
    """Starts processes in a tenth of a second: a server that has imported the commands forks. One serves a session."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"cxrfast.cli.{name}" for name in ("phantoms", "prep", "train", "eval")])
    return context


def pytest_runtest_setup(item: pytest.Item) -> None:
    """`gpu` tests skip without a CUDA device, and fail instead where CXRFAST_REQUIRE_GPU=1."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        reason = "no CUDA device"
        if os.environ.get("CXRFAST_REQUIRE_GPU") == "1":
            pytest.fail(f"{reason}, and CXRFAST_REQUIRE_GPU=1")
        pytest.skip(reason)
