"""The whole road, as its user walks it: films → store → both networks → tables and figures, by the commands alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cxrfast.cli import eval as eval_command
from cxrfast.cli import phantoms, prep, train
from cxrfast.nih import CLASSES
from cxrfast.store import open_store

MODELS = ("cnn", "multimodal")


def last_line(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def train_and_evaluate(store: Path, folder: Path, epochs: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Both models by the commands, then every promise about what a run leaves behind."""
    options = ["--epochs", str(epochs), "--amp", "--head", "gap"]
    for model in MODELS:
        assert train.main([str(store), str(folder / model), "--model", model, *options]) == 0
        assert last_line(capsys)["state"] == "complete"
        metrics = [json.loads(line) for line in (folder / model / "metrics.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in metrics] == list(range(1, epochs + 1))
        assert all(np.isfinite(line["train_loss"]) and np.isfinite(line["test_loss"]) for line in metrics)
    assert eval_command.main([str(folder / model) for model in MODELS]) == 0
    printed = capsys.readouterr().out
    digest = json.loads((folder / "cnn" / "config.json").read_text())["split"]["digest"]
    assert "paper" in printed and digest[:8] in printed  # no AUC without its split
    result = json.loads((folder / "cnn" / "eval" / "result.json").read_text())
    assert result["split_digest"] == digest
    for model in MODELS:
        for name in ("auc.csv", "predictions.csv", "roc.png", "training.png"):
            assert (folder / model / "eval" / name).stat().st_size > 0, (model, name)
    for name in ("comparison.md", "labels.png", "age.png", "sex.png", "view.png", "preparation.png"):
        assert (folder / "cnn" / "eval" / name).stat().st_size > 0, name


@pytest.mark.slow
def test_phantoms_to_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    films, store = tmp_path / "films", tmp_path / "store"
    assert phantoms.main([str(films), "--images", "150", "--seed", "3", "--size", "256"]) == 0
    assert prep.main([str(films), str(store), "--size", "32"]) == 0
    assert last_line(capsys)["images"] == 150
    assert (np.nansum(open_store(store).targets, axis=0) > 0).all(), "a class that no phantom has"
    train_and_evaluate(store, tmp_path, 2, capsys)


@pytest.mark.slow
@pytest.mark.films
def test_real_films_to_tables(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv = data / "nih" / "metadata" / "Data_Entry_2017_v2020.csv"
    assert prep.main([str(data / "nih" / "images"), str(tmp_path / "store"), "--csv", str(csv), "--size", "64"]) == 0
    assert last_line(capsys)["images"] == 203
    assert open_store(tmp_path / "store").index[list(CLASSES)].sum().gt(0).all()
    train_and_evaluate(tmp_path / "store", tmp_path, 3, capsys)
