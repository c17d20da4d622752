"""Each command that writes, killed before every change it makes in its folder, and repeated until it is done.

The random kills of the commands' own tests seldom meet the moments between two changes; here each of them is met.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from importlib import import_module
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from helpers import write_films
from safetensors import safe_open
from training import make_store

SPEEDS = ("images_per_second", "input_share", "flops_share")


def _die_before_change(folder: Path, number: int) -> None:
    """SIGKILL this process when it is about to create, rename or remove something there for the ``number``-th time."""
    seen = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        changes = event in ("os.mkdir", "os.rename", "os.remove") or (event == "open" and args[2] & os.O_CREAT)
        if changes and isinstance(args[0], str | os.PathLike) and str(folder) in os.fspath(args[0]):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def _command(name: str, arguments: list[str], folder: Path, number: int) -> None:
    with open(os.devnull, "w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        _die_before_change(folder, number)
        sys.exit(import_module(f"cxrfast.cli.{name}").main(arguments))


@pytest.fixture(scope="module")
def children() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"cxrfast.cli.{name}" for name in ("phantoms", "prep", "train", "eval")])
    return context


def files(folder: Path) -> dict[str, Any]:
    """Content of all files, but for a run's speeds and where it lies (a header's order differs from save to save)."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            continue
        data = path.read_bytes().replace(str(folder).encode(), b"FOLDER")
        found[str(path.relative_to(folder))] = data
        if path.suffix == ".safetensors":
            with safe_open(path, "np") as file:
                found[str(path.relative_to(folder))] = {
                    **{name: file.get_tensor(name).tobytes() for name in file.keys()},  # noqa: SIM118 (no mapping)
                    **file.metadata(),
                }
        elif path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in data.splitlines()]
            found[path.name] = [{k: v for k, v in line.items() if k not in SPEEDS} for line in lines]
    return found


def check(children: ForkServerContext, tmp_path: Path, name: str, before: list[str], *options: str) -> int:
    """Kill and repeat ``cxrfast-NAME BEFORE FOLDER OPTIONS``; returns how many kills it took to the end."""

    def run(folder: Path, number: int) -> int | None:
        child = children.Process(target=_command, args=(name, [*before, str(folder), *options], folder, number))
        child.start()
        child.join(120)
        return child.exitcode

    assert run(tmp_path / "undisturbed", 0) == 0
    kills = 0
    while (code := run(tmp_path / "killed", kills + 1)) != 0:  # always one change further than the time before
        assert code == -signal.SIGKILL, f"after {kills} kills"
        kills += 1
    assert files(tmp_path / "killed") == files(tmp_path / "undisturbed")
    return kills


def test_phantoms(children: ForkServerContext, tmp_path: Path) -> None:
    small = ("--images", "4", "--seed", "3", "--size", "128", "--workers", "1")
    assert check(children, tmp_path, "phantoms", [], *small) >= 6


@pytest.mark.parametrize("backend", ["native", "pillow"])
def test_prep(children: ForkServerContext, tmp_path: Path, backend: str) -> None:
    if backend == "native":
        pytest.importorskip("cxrfast._png", reason="the compiled decoder is not installed")
    films = write_films(tmp_path / "films", 20)
    options = ("--size", "32", "--backend", backend, "--workers", "1")
    assert check(children, tmp_path, "prep", [str(films)], *options) >= 6


@pytest.mark.slow
def test_train_and_eval(children: ForkServerContext, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "eval").mkdir()
    store = make_store(tmp_path / "store").path
    options = ("--resume", "--epochs", "2", "--batch-size", "40", "--head", "gap", "--checkpoint-steps", "1")
    assert check(children, tmp_path / "train", "train", [str(store)], *options) >= 6
    run = tmp_path / "train" / "undisturbed"
    quick = ("--no-figures", "--bootstrap", "0")
    assert check(children, tmp_path / "eval", "eval", [str(run), "--out"], *quick) >= 6
