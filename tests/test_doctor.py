"""The doctor's danger: a part that is said to be ready and is not, or a failure instead of a diagnosis."""

from __future__ import annotations

import json

import pytest
import torch

from cxrfast.cli.doctor import main
from cxrfast.decode import backends
from cxrfast.doctor import examine


def test_the_command_prints_what_it_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    findings = json.loads(lines[-1])
    assert findings["versions"]["torch"] == torch.__version__
    assert any(line.startswith("decoder native") for line in lines)
    assert findings["machine"]["cores"] == backends.available_cores()


def test_a_part_is_ready_exactly_where_it_can_be_used() -> None:
    parts = examine()["parts"]
    for name in ("pillow", "native"):
        part = parts[f"decoder {name}"]
        assert part["ready"] == (backends.missing(name) == "") and part["ready"] == (part["reason"] == "")
        if part["ready"]:
            decoder, _ = backends.choose_decoder(name, 1)
            with decoder:
                assert decoder.name == name
    assert parts["training on a GPU"]["ready"] == torch.cuda.is_available()


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cxrfast._png", None)  # as if it had not been compiled
    assert main([]) == 0
    printed = capsys.readouterr().out
    part = json.loads(printed.splitlines()[-1])["parts"]["decoder native"]
    assert not part["ready"] and "C++ compiler" in part["reason"]
    decoder, why = backends.choose_decoder("auto", 1)
    with decoder:
        assert decoder.name == "pillow" and "not installed" in why
