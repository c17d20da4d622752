"""The bench command: figures that fit together, and a verdict that follows from them."""

from __future__ import annotations

import json

import pytest

from cxrfast.bench import GROUPS, MAX_GROUP, group_steps, verdict
from cxrfast.cli.bench import main


@pytest.mark.parametrize(
    ("input_share", "flops_share", "expected"),
    [(0.2, 0.9, "input-bound"), (0.01, 0.6, "compute-bound"), (0.01, 0.3, "memory-bound")],
)
def test_verdict(input_share, flops_share, expected):
    assert verdict(input_share, flops_share) == expected


def test_figures_fit_together(capsys):
    assert main(["--size", "32", "--batch-size", "4", "--steps", "2", "--head", "gap"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["slowest"] <= result["images_per_second"] <= result["fastest"]
    assert result["flops_share"] == pytest.approx(result["flops_per_second"] / result["matmul_per_second"])
    assert 0 < result["input_share"] < 1
    assert result["verdict"] == verdict(result["input_share"], result["flops_share"])
    assert (result["steps"], result["group_steps"]) == (2, 1) and result["network"].startswith("network: eager")


def test_groups():
    assert [group_steps(seconds) for seconds in (0.06, 0.049, 0.0037, 1e-9)] == [1, 2, 14, MAX_GROUP]


@pytest.mark.gpu
@pytest.mark.parametrize("data", ["device", "mmap"])
def test_groups_on_a_gpu(capsys, data):
    assert main(["--size", "32", "--batch-size", "4", "--compile", "no", "--data", data, "--device", "cuda"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["network"].startswith("network: eager")
    assert result["network"].endswith("; steps are replayed as a CUDA graph (the default on one GPU)")
    assert result["group_steps"] > 1 and result["steps"] == GROUPS * result["group_steps"]
    assert main(["--size", "32", "--batch-size", "4", "--compile", "no", "--steps", "3", "--device", "cuda"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["steps"] == result["group_steps"] > 1


@pytest.mark.parametrize(("option", "value"), [("--steps", "0"), ("--batch-size", "0"), ("--size", "15")])
def test_wrong_options(option, value, capsys):
    assert main([option, value]) == 2
    assert option in capsys.readouterr().err
