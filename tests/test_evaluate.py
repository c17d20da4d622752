"""evaluate.py, run.py and cxrfast-eval. The danger: a number is printed that is not this network's on these films."""

from __future__ import annotations

import csv
import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import film, write_csv
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from cxrfast.auc import exact_auc
from cxrfast.checkpoint import load_tensors, save_tensors
from cxrfast.cli.eval import main
from cxrfast.errors import InputError
from cxrfast.evaluate import EvalConfig, evaluate, standard_errors
from cxrfast.models import ChestNet, encode_metadata
from cxrfast.nih import CLASSES, read_metadata
from cxrfast.splits import make_split
from cxrfast.store import Entry, StoreWriter, open_store
from cxrfast.train import TrainConfig, train

SIZE, FILMS = 24, 180  # 60 patients of 3 films each; 9 of them test
FAST = ("--no-figures", "--bootstrap", "0")


def make_store(
    folder: Path, count: int = FILMS, size: int = SIZE, pixel_rule: str = "pillow-bilinear", first: int = 0
) -> Path:
    """A store of ``count`` made-up films whose mean grey tells Mass from the rest a little."""
    table = read_metadata(write_csv(folder.parent / f"{folder.name}.csv", count)).table.iloc[first:]
    images = np.stack([film(seed, size) for seed in range(first, count)])
    entries = [
        Entry(
            name,
            "ok",
            "",
            int(image.sum(dtype=np.int64)),
            int((image.astype(np.int64) ** 2).sum()),
            f"{zlib.crc32(image.tobytes()):08x}",
        )
        for name, image in zip(table["file"], images, strict=True)
    ]
    identity = {"size": size, "pixel_rule": pixel_rule, "sources_digest": "ab", "csv_digest": "cd"}
    with StoreWriter(folder, size, identity, "pillow") as writer:
        writer.append(entries, images)
        writer.finish(table.reset_index(drop=True), [], {"source": str(folder.parent), "csv_generation": "v2020"})
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small only wait for a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``store`` and one epoch of both networks, ``cnn`` and ``multimodal``. Not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    make_store(folder / "store")
    for model in ("cnn", "multimodal"):
        config = TrainConfig(folder / "store", folder / model, model=model, head="gap", epochs=1, batch_size=30)
        train(config, say=lambda line: None)
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained cnn, to be spoilt."""
    return shutil.copytree(trained / "cnn", tmp_path / "run")


def plain_logits(run: Path, store_path: Path, model: str) -> tuple[np.ndarray, pd.DataFrame]:
    """The same scores by the shortest way: read the files, normalise, one forward pass."""
    store, config = open_store(store_path), json.loads((run / "config.json").read_text())
    rows = make_split("paper", store.index).test
    net = ChestNet(SIZE, model, "gap").eval()  # type: ignore[arg-type]
    net.load_state_dict(load_file(run / "model.safetensors"))
    images = (torch.from_numpy(np.array(store.images[rows])).float() - config["normalisation"]["mean"]) / config[
        "normalisation"
    ]["std"]
    table = store.index.iloc[rows].reset_index(drop=True)
    metadata = torch.from_numpy(encode_metadata(table, config["age"]["mean"], config["age"]["std"]))
    with torch.inference_mode():
        return net(images[:, None], metadata).numpy(), table


@pytest.mark.parametrize("model", ["cnn", "multimodal"])
def test_auc_is_scikit_learns_of_a_plain_forward_pass(trained: Path, tmp_path: Path, model: str) -> None:
    scores, written = evaluate(EvalConfig((trained / model,), out=tmp_path / "out", figures=False))
    logits, table = plain_logits(trained / model, trained / "store", model)
    assert np.allclose(scores[0].logits.numpy(), logits, atol=1e-5)
    assert table["patient"].tolist() == scores[0].patients.tolist()
    expected = [roc_auc_score(table[name], scores[0].logits[:, c]) for c, name in enumerate(CLASSES)]
    assert scores[0].auc == pytest.approx(expected, abs=1e-12)
    assert scores[0].macro == pytest.approx(np.mean(expected), abs=1e-12)
    assert {path.name for path in written} == {
        "auc.csv",
        "predictions.csv",
        "comparison.md",
        "comparison.csv",
        "result.json",
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in written}


def test_files_say_the_same_as_the_scores(trained: Path, tmp_path: Path) -> None:
    scores, _ = evaluate(EvalConfig((trained / "cnn",), out=tmp_path, figures=False))
    one = scores[0]
    with open(tmp_path / "auc.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list(CLASSES)
    assert [float(row["auc"]) for row in rows] == one.auc.tolist()
    assert {(row["split"], row["split_digest"]) for row in rows} == {("paper", one.split.digest)}
    assert all(float(row["low"]) <= float(row["auc"]) <= float(row["high"]) for row in rows)
    predictions = pd.read_csv(tmp_path / "predictions.csv")
    assert predictions["file"].tolist() == one.store.index["file"].iloc[one.split.test].tolist()
    assert exact_auc(predictions[list(CLASSES)].to_numpy(), one.targets) == pytest.approx(one.auc, abs=1e-12)
    assert np.allclose(predictions[list(CLASSES)], torch.sigmoid(one.logits), atol=1e-6)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["split_digest"] == one.split.digest and result["store_digest"] == one.store.digest
    assert result["macro_auc"] == one.macro and result["classes_defined"] == 14
    table = (tmp_path / "comparison.md").read_text()
    assert f"paper ({one.split.digest[:12]})" in table
    assert "not the complete v2020 data set (images: 180 instead of 112,120;" in table
    assert "does not compare with the published ones" in table
    assert "chosen on this very test side, hence an optimistic score" in table


def test_repeated_it_writes_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    contents = []
    for _ in range(2):
        evaluate(EvalConfig((trained / "cnn",), out=tmp_path, figures=False, batch_size=27))
        contents.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
    assert contents[0] == contents[1]


def test_last_epoch_is_named(trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([str(trained / "cnn"), "--weights", "last", "--out", str(tmp_path), *FAST]) == 0
    assert "weights of epoch 1, the last, chosen by nothing" in capsys.readouterr().out


@pytest.mark.slow
def test_command_with_both_models_and_figures(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([str(trained / "cnn"), str(trained / "multimodal"), "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    digest = make_split("paper", open_store(trained / "store").index).digest
    for model, found in zip(("cnn", "multimodal"), result["runs"], strict=True):
        assert found["model"] == model and found["split_digest"] == digest
        assert f"{model} ({model}) on the test side of split paper ({digest[:12]}): 27 films of 9 patients" in lines
        assert {path.name for path in (out / model).iterdir()} == {
            "auc.csv",
            "predictions.csv",
            "result.json",
            *(f"{name}.{suffix}" for name in ("roc", "training") for suffix in ("png", "svg")),
        }
    drawn = {"labels", "age", "sex", "view", "preparation", "roc_compared"}
    assert {path.stem for path in out.glob("*.png")} == {path.stem for path in out.glob("*.svg")} == drawn
    assert sorted(result["files"]) == sorted(str(path) for path in out.rglob("*") if path.is_file())
    assert (out / "comparison.csv").read_text().splitlines()[0].endswith("cnn,multimodal")
    assert any(line.startswith(f"{out}: comparison.md") for line in lines)


def test_undefined_classes_are_na_everywhere(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A test side of one patient, three films with one finding each: eleven classes lack positives."""
    index = open_store(trained / "store").index
    split = make_split("paper", index)
    (tmp_path / "train.txt").write_text("\n".join(index["file"].iloc[split.train]))
    (tmp_path / "test.txt").write_text("\n".join(index["file"].iloc[split.test[:3]]))
    lists = f"{tmp_path / 'train.txt'},{tmp_path / 'test.txt'}"
    out = tmp_path / "out"
    assert main([str(trained / "cnn"), "--split", lists, "--out", str(out), *FAST]) == 0
    text = capsys.readouterr().out
    result = json.loads(text.splitlines()[-1])["runs"][0]
    defined = [name for name, value in result["auc"].items() if value is not None]
    assert len(defined) == result["classes_defined"] < 14
    assert result["macro_auc"] == pytest.approx(np.mean([result["auc"][name] for name in defined]))
    assert f"macro, {len(defined)} of 14" in text
    undefined = next(name for name in CLASSES if name not in defined)
    assert next(line for line in text.splitlines() if undefined in line).split()[:2] == [undefined, "n/a"]
    assert f"({len(defined)} of 14)" in (out / "comparison.md").read_text()
    assert "split train.txt,test.txt (" in text and "the best by test auc\n" in text


# ---- what is refused ----


def edit_config(run: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((run / "config.json").read_text())
    change(content)
    (run / "config.json").write_text(json.dumps(content))


def edit_weights(run: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object]) -> None:
    tensors, about = load_tensors(run / "model.safetensors")
    change(tensors, about)
    save_tensors(run / "model.safetensors", tensors, about)


def refused(capsys: pytest.CaptureFixture[str], sentence: str, *arguments: str) -> None:
    """Exit code 2, one sentence, and not a digit of a result on stdout."""
    assert main([*arguments, *FAST]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    said = [line for line in captured.err.splitlines() if line.startswith("cxrfast-eval: ")]
    assert len(said) == 1 and sentence in said[0], captured.err


def cut(path: Path, keep: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda run: (run / "config.json").unlink(), "is not a run"),
    "config is no JSON": (lambda run: cut(run / "config.json", 0.5), "cannot be read"),
    "config lacks a key": (lambda run: edit_config(run, lambda c: c.pop("normalisation")), "not a whole configuration"),
    "other class order": (lambda run: edit_config(run, lambda c: c["classes"].reverse()), "class order"),
    "no weights": (lambda run: (run / "model.safetensors").unlink(), "no epoch of it was finished"),
    "half the weights": (lambda run: cut(run / "model.safetensors", 0.5), "cannot be read"),
    "empty weights": (lambda run: cut(run / "model.safetensors", 0), "cannot be read"),
    "a changed bit": (lambda run: flip_last_byte(run / "model.safetensors"), "is damaged"),
    "a key missing": (lambda run: edit_weights(run, lambda t, _: t.pop("logits.bias")), "lacks 'logits.bias'"),
    "a key too many": (
        lambda run: edit_weights(run, lambda t, _: t.update(extra=torch.zeros(1))),
        "holds 'extra', which this architecture has not",
    ),
    "a key renamed": (
        lambda run: edit_weights(run, lambda t, _: t.update({"module.logits.bias": t.pop("logits.bias")})),
        "lacks 'logits.bias'",
    ),
    "another shape": (
        lambda run: edit_weights(run, lambda t, _: t.update({"logits.bias": torch.zeros(15)})),
        "'logits.bias' is torch.float32 (15,)",
    ),
    "another dtype": (
        lambda run: edit_weights(run, lambda t, _: t.update({"logits.bias": t["logits.bias"].half()})),
        "'logits.bias' is torch.float16 (14,)",
    ),
    "another architecture": (
        lambda run: edit_config(run, lambda c: c["options"].update(model="multimodal")),
        "lacks 'metadata.weight'",
    ),
    "weights of another run": (
        lambda run: edit_weights(run, lambda _, about: about.update(store="0" * 64)),
        "was trained on another store or split",
    ),
    "weights of another split": (
        lambda run: edit_weights(run, lambda _, about: about.update(split="paper " + "0" * 64)),
        "was trained on another store or split",
    ),
    "NaN in the weights": (
        lambda run: edit_weights(run, lambda t, _: t["logits.bias"].fill_(math.nan)),
        "NaN scores in class Atelectasis (27)",
    ),
    "store gone": (lambda run: edit_config(run, lambda c: c["options"].update(store="gone")), "give it with --store"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_runs_that_do_not_hold_together_are_refused(run: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    spoil, sentence = SPOILT[what]
    spoil(run)
    refused(capsys, sentence, str(run))
    assert not (run / "eval").exists()


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"size": 48}, "trained on films of size 24 pixels"),
        ({"pixel_rule": "another"}, "trained on films of pixel rule pillow-bilinear"),
    ],
)
def test_stores_prepared_otherwise_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kwargs: dict[str, Any], sentence: str
) -> None:
    refused(capsys, sentence, str(run), "--store", str(make_store(tmp_path / "other", **kwargs)))
    assert not (run / "eval").exists()


def test_a_store_of_other_class_order_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_store(tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["classes"].reverse()
    (other / "manifest.json").write_text(json.dumps(manifest))
    refused(capsys, "another class order", str(run), "--store", str(other))


def test_patients_who_were_trained_on_are_not_tested_on(
    run: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = open_store(trained / "store").index
    split = make_split("paper", index)
    (tmp_path / "a.txt").write_text("\n".join(index["file"].iloc[split.test]))
    (tmp_path / "b.txt").write_text("\n".join(index["file"].iloc[split.train[:1]]))
    patient = index["patient"].iloc[split.train[0]]
    lists = f"{tmp_path / 'a.txt'},{tmp_path / 'b.txt'}"
    refused(capsys, f"patient {patient} is in training and in test", str(run), "--split", lists)
    assert not (run / "eval").exists()


def test_another_store_is_tested_only_when_the_training_patients_are_known(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A store with fewer films has the paper's sides too. When the run's own store is lost, nobody can tell."""
    smaller = make_store(tmp_path / "smaller", count=150)
    assert main([str(run), "--store", str(smaller), *FAST]) == 0
    capsys.readouterr()
    edit_config(run, lambda c: c["options"].update(store="gone"))
    refused(capsys, "cannot be known on which patients", str(run), "--store", str(smaller))


def test_a_store_that_moved_is_known_by_its_content(
    run: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(run, lambda c: c["options"].update(store="gone"))
    moved = shutil.copytree(trained / "store", tmp_path / "moved")
    assert main([str(run), "--store", str(moved), *FAST]) == 0


def test_a_split_that_changed_since_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(run, lambda c: c["split"].update(digest="0" * 64))
    refused(capsys, "its split was paper (000000000000), and paper is now paper (", str(run))


def test_runs_on_different_splits_are_not_put_side_by_side(
    run: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(make_store(tmp_path / "smaller", count=150))
    split = make_split("paper", store.index)
    other = shutil.copytree(trained / "cnn", tmp_path / "other")  # as if it had been trained on the smaller store
    edit_config(other, lambda c: c["options"].update(store=str(store.path)))
    edit_config(other, lambda c: (c["store"].update(digest=store.digest), c["split"].update(digest=split.digest)))
    edit_weights(other, lambda _, about: about.update(store=store.digest, split=f"paper {split.digest}"))
    refused(capsys, "their figures do not compare", str(run), str(other))


def test_wrong_usage(run: Path, trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    refused(capsys, "name at least one run")
    refused(capsys, "is not a run", str(tmp_path / "absent"))
    refused(capsys, "is not a run", str(trained / "store"))
    refused(capsys, "named twice", str(run), str(run))
    refused(capsys, "no split is called 'mine'", str(run), "--split", "mine")
    refused(capsys, "is not a store", str(run), "--store", str(run))
    refused(capsys, "--batch-size", str(run), "--batch-size", "0")
    refused(capsys, "no device 'abacus'", str(run), "--device", "abacus")
    (tmp_path / "file").write_text("")
    refused(capsys, "out cannot be written", str(run), "--out", str(tmp_path / "file" / "out"))


# ---- standard errors ----


def test_standard_errors_are_those_of_films_drawn_patient_by_patient() -> None:
    """Against the same resamples, made by repeating films and sorting scores."""
    rng = np.random.default_rng(1)
    patients = rng.integers(0, 20, 60)
    targets = (rng.random((60, 3)) < 0.4).astype(np.float32)
    targets[:5, 0] = np.nan
    scores = np.round(rng.normal(size=(60, 3)) + np.nan_to_num(targets), 1)  # rounded: with ties
    errors, macro = standard_errors(scores, targets, patients, repeats=30, seed=3)
    ids = np.unique(patients)
    draws = np.random.default_rng(3).multinomial(len(ids), np.full(len(ids), 1 / len(ids)), size=30)
    values = []
    for draw in draws:
        rows = np.concatenate([np.repeat(np.flatnonzero(patients == i), n) for i, n in zip(ids, draw, strict=True)])
        values.append(exact_auc(scores[rows], targets[rows]))
    assert errors == pytest.approx(np.std(values, axis=0, ddof=1), rel=1e-9)
    assert macro == pytest.approx(np.std(np.mean(values, axis=1), ddof=1), rel=1e-9)


def test_repeated_films_of_a_patient_are_no_further_evidence() -> None:
    rng = np.random.default_rng(2)
    targets = (rng.random((40, 1)) < 0.5).astype(np.float32)
    scores = rng.normal(size=(40, 1)) + targets
    once = standard_errors(scores, targets, np.arange(40), 50)
    thrice = standard_errors(np.tile(scores, (3, 1)), np.tile(targets, (3, 1)), np.tile(np.arange(40), 3), 50)
    assert once[0] == pytest.approx(thrice[0]) and once[1] == pytest.approx(thrice[1])
    assert once[1] > 0.03


def test_standard_errors_of_the_undefined() -> None:
    """One label only: no error, and the mean does without it. Four patients with a label: too few, the mean, too."""
    targets = np.zeros((20, 3), np.float32)
    targets[::2, 0] = 1
    targets[:4, 1] = 1
    scores = np.random.default_rng(0).normal(size=(20, 3))
    errors, macro = standard_errors(scores, targets, np.arange(20), 50)
    assert errors[0] > 0 and np.isnan(errors[1:]).all() and math.isnan(macro)
    errors, macro = standard_errors(scores[:, [0, 2]], targets[:, [0, 2]], np.arange(20), 50)
    assert errors[0] == pytest.approx(macro) and math.isnan(errors[1])
    targets[4, 1] = 1
    assert standard_errors(scores, targets, np.arange(20), 50)[0][1] > 0
    assert math.isnan(standard_errors(scores, targets, np.arange(20) // 2, 50)[0][1])
    assert np.isnan(standard_errors(scores, targets, np.arange(20), 0)[0]).all()


@pytest.mark.films
def test_standard_error_of_real_predictions(data: Path) -> None:
    """22,433 real films: the macro AUC's clustered standard error is known to be about 0.0034, Hernia's 0.026."""
    predictions = pd.read_csv(data / "auc_oracle" / "preds.csv")
    table = read_metadata(data / "nih" / "metadata" / "Data_Entry_2017_v2020.csv").table.set_index("file")
    table = table.loc[predictions["Image Index"]]
    errors, macro = standard_errors(
        predictions.iloc[:, 1:].to_numpy(), table[list(CLASSES)].to_numpy(), table["patient"].to_numpy(), 100
    )
    assert macro == pytest.approx(0.0034, abs=0.0007)
    assert errors[-1] == pytest.approx(0.026, abs=0.006)


def test_missing_run_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a run"):
        evaluate(EvalConfig((tmp_path,)))
