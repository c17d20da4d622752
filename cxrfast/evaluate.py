"""A run and a store to per-class AUC, with everything that makes the number true beside it.

Promises: no number comes out unless the weights match the architecture key for key, the store is prepared as the run's
was, and no patient of the test side was trained on. A class with one label is undefined: it is NaN here and n/a in
print, and the macro average says over how many classes it is. Scores are computed in fp32 unless asked otherwise.
Left out: what the figures look like (report.py), and films without a store (predict.py).
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from cxrfast import report
from cxrfast.auc import AucCounts, AucResult, exact_auc
from cxrfast.data import FilmData
from cxrfast.decode import pillow
from cxrfast.devices import choose_device, choose_precision
from cxrfast.errors import InputError
from cxrfast.files import write_atomic, write_json
from cxrfast.models import ChestNet
from cxrfast.nih import CLASSES, PUBLISHED_TOTALS, check_totals
from cxrfast.run import Run, Weights, load_model, load_run
from cxrfast.sources import find_films
from cxrfast.splits import Split, check_leak, make_split
from cxrfast.store import Store, open_store
from cxrfast.train import read_metrics

_ROC_POINTS = 1000  # more than a panel has pixels
_MIN_PATIENTS = 5  # with each label, for a standard error
_SHOWN_FILMS = 2  # in the figure of the preparation, each of another patient


@dataclass(frozen=True)
class EvalConfig:
    """What is evaluated, on what, and where the results go."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders of cxrfast-train. Several are drawn side by side, on one split."""
    store: Path | None = None
    """Store to evaluate on. Default: the run's own."""
    split: str | None = None
    """paper, official:FOLDER or TRAIN.txt,TEST.txt; its test side is evaluated. Default: the run's own."""
    weights: Weights = "best"
    """best or last epoch. The best one was chosen on the test split, hence its score there is optimistic."""
    out: Path | None = None
    """Folder for the results. Default: RUN/eval; what several runs share goes to the first one's."""
    batch_size: int = 64
    """Films scored at once."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:0."""
    amp: bool = False
    """Score in half precision where the device gains by it; the scores then have more ties."""
    bootstrap: int = 200
    """Resamples of patients for the standard errors; 0 leaves them out."""
    figures: bool = True
    """Draw the figures."""


@dataclass(frozen=True)
class Scores:
    """One run's scores on one split's test side of N films.

    Attributes:
        run: the run.
        name: what it is called in tables; unique among the runs of one evaluation.
        weights, epoch: whose weights these are, "best" or "last", and of which epoch.
        store: where the films are from.
        split: its test side is what was scored.
        logits: float32 (N, 14), in the order of ``split.test``.
        targets: float32 (N, 14): 1, 0 or NaN = unknown.
        patients: int64 (N,).
        counts: of the logits; the ROC curves come from them.
        result: of the counts: the interval, positives and negatives.
        auc: float64 (14,), exact, by sorting, inside that interval; NaN = undefined.
        error: float64 (14,), standard error of each AUC over resampled patients; NaN = not computed or undefined.
        macro_error: that of the macro average.
    """

    run: Run
    name: str
    weights: Weights
    epoch: int
    store: Store
    split: Split
    logits: Tensor
    targets: Tensor
    patients: np.ndarray
    counts: AucCounts
    result: AucResult
    auc: np.ndarray
    error: np.ndarray
    macro_error: float

    @property
    def macro(self) -> float:
        """Mean over the defined classes; NaN when there is none."""
        return float(np.nanmean(self.auc)) if self.result.defined else math.nan


def evaluate(config: EvalConfig) -> tuple[list[Scores], list[Path]]:
    """Score every run, then write tables and figures.

    Returns:
        The scores, one a run, and the files written.

    Raises:
        InputError: a run or store cannot be read, they do not fit together, a patient would be tested on whom the run
            was trained on, the runs are on different splits, or an option is out of range. Nothing is written then.
    """
    if not config.runs:
        raise InputError("name at least one run folder")
    if config.batch_size < 1 or config.bootstrap < 0:
        raise InputError("--batch-size must be 1 or more, and --bootstrap 0 or more")
    device = choose_device(config.device)
    runs = [load_run(path) for path in config.runs]
    stores = [_open_store(run, config.store) for run in runs]
    splits = []
    for run, store in zip(runs, stores, strict=True):
        check_store(run, store)
        splits.append(make_split(config.split or run.split, store.index))
        check_unseen(run, store, splits[-1])
    for run, split in zip(runs, splits, strict=True):
        if split.digest != splits[0].digest:
            raise InputError(
                f"{runs[0].path} is on the split {splits[0]} and {run.path} on {split}; their figures do not compare: "
                "evaluate them one at a time, or both on one with --split"
            )
    names = _names(config.runs)
    shared, own = _folders(runs, names, config)
    for folder in (shared, *own):
        _check_writable(folder)
    models = [load_model(run, config.weights) for run in runs]
    scores = [
        score_run(run, name, model, epoch, store, split, device, config)
        for run, name, (model, epoch), store, split in zip(runs, names, models, stores, splits, strict=True)
    ]
    return scores, write_results(scores, shared, own, config.figures)


def check_store(run: Run, store: Store) -> None:
    """Refuse a store whose images are not what the run was trained on.

    Raises:
        InputError: another side length or pixel rule.
    """
    for what, of_run, of_store in (
        ("size", f"{run.size} pixels", f"{store.size} pixels"),
        ("pixel rule", run.pixel_rule, store.pixel_rule),
    ):
        if of_run != of_store:
            raise InputError(
                f"{run.path} was trained on films of {what} {of_run}, {store.path} holds {what} {of_store}; "
                "a score would say nothing about the run, so prepare a store like the run's"
            )


def check_unseen(run: Run, store: Store, split: Split) -> None:
    """Refuse to test on patients on whom the run was trained.

    On the run's own store and split that is what the split itself guarantees; on any other the run's training side is
    rebuilt from its configuration and compared.

    Raises:
        InputError: a patient is in both, or it cannot be known.
    """
    if store.digest == run.store_digest and split.digest == run.split_digest:
        return
    try:
        own = store if store.digest == run.store_digest else open_store(run.store)
        trained = make_split(run.split, own.index)
    except InputError as error:
        raise InputError(f"it cannot be known on which patients {run.path} was trained: {error}") from error
    if trained.digest != run.split_digest:
        raise InputError(
            f"it cannot be known on which patients {run.path} was trained: its split was {run.split_name} "
            f"({run.split_digest[:12]}), and {run.split} is now {trained}"
        )
    try:
        check_leak(
            own.index["patient"].to_numpy(np.int64)[trained.train],
            store.index["patient"].to_numpy(np.int64)[split.test],
        )
    except InputError as error:
        raise InputError(f"{run.path} cannot be tested on the split {split}: {error}") from None


def score_run(
    run: Run,
    name: str,
    model: ChestNet,
    epoch: int,
    store: Store,
    split: Split,
    device: torch.device,
    config: EvalConfig,
) -> Scores:
    """Score the split's test side and count.

    Raises:
        InputError: a score is not a number.
    """
    model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    data = FilmData(store, device, run.normalisation, run.age)
    precision = choose_precision(config.amp, "auto", device)
    rows = torch.from_numpy(split.test)
    pieces = rows.split(config.batch_size)
    logits = torch.empty(len(rows), len(CLASSES))
    done = 0
    with torch.inference_mode(), tqdm(total=len(rows), desc=name, unit=" images", file=sys.stderr) as bar:
        for batch in data.batches(pieces):
            with torch.autocast(device.type, precision.dtype, enabled=precision.name != "fp32"):
                out = model(batch.images, batch.metadata)
            logits[done : done + len(out)] = out.float().cpu()
            done += len(out)
            bar.update(len(out))
    targets = torch.from_numpy(store.targets[split.test])
    counts = AucCounts(len(CLASSES), names=CLASSES)
    counts.update(logits, targets)
    result = counts.compute()
    auc = np.asarray(exact_auc(logits, targets))
    _check_interval(auc, result)
    patients = store.index["patient"].to_numpy(np.int64)[split.test]
    error, macro_error = standard_errors(logits.numpy(), targets.numpy(), patients, config.bootstrap)
    return Scores(
        run,
        name,
        config.weights,
        epoch,
        store,
        split,
        logits,
        targets,
        patients,
        counts,
        result,
        auc,
        error,
        macro_error,
    )


def standard_errors(
    scores: np.ndarray, targets: np.ndarray, patients: np.ndarray, repeats: int, seed: int = 0
) -> tuple[np.ndarray, float]:
    """Standard errors of the AUCs when patients, not films, are drawn anew: films of one patient are no independent
    evidence.

    Args:
        scores: floating (N, C). targets: (N, C), 1, 0 or NaN. patients: (N,).
        repeats: resamples, each of as many patients as there are, drawn with replacement.
    Returns:
        float64 (C,), and that of the mean over the defined classes. NaN for a class of which one label occurs in fewer
        than ``_MIN_PATIENTS`` patients, and then for the mean, too: resamples without them leave the class undefined,
        and those with them repeat one patient, so that the spread would look smaller than it is.
    Source: Efron & Tibshirani 1993, bootstrap over clusters.
    """
    C = scores.shape[1]
    ids, cluster = np.unique(patients, return_inverse=True)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(ids), np.full(len(ids), 1 / max(1, len(ids))), size=repeats)[:, cluster]
    auc = np.full((repeats, C), np.nan)
    enough, defined = np.zeros(C, bool), np.zeros(C, bool)
    for c in range(C):
        known = np.isfinite(targets[:, c])
        carriers = [len(np.unique(cluster[targets[:, c] == label])) for label in (0, 1)]
        enough[c], defined[c] = min(carriers) >= _MIN_PATIENTS, min(carriers) > 0
        if not enough[c]:
            continue
        _, bins = np.unique(scores[known, c], return_inverse=True)
        positive = targets[known, c] == 1
        for i in range(repeats):
            drawn = weights[i, known]
            pos = np.bincount(bins, drawn * positive)
            neg = np.bincount(bins, drawn * ~positive)
            if pos.sum() and neg.sum():
                auc[i, c] = (pos * (neg.cumsum() - neg / 2)).sum() / (pos.sum() * neg.sum())
    errors = np.full(C, np.nan)
    whole = auc[np.isfinite(auc[:, enough]).all(axis=1)]  # of five patients, 1 resample in 150 has none
    if len(whole) < 2 or not enough.any():
        return errors, math.nan
    errors[enough] = whole[:, enough].std(axis=0, ddof=1)
    macro = float(whole[:, enough].mean(axis=1).std(ddof=1)) if (enough == defined).all() else math.nan
    return errors, macro


def _check_interval(auc: np.ndarray, result: AucResult) -> None:
    """Two ways to the same number, by sorting and by counting, must agree before either is shown."""
    low, high = result.low.numpy(), result.high.numpy()
    for c in np.flatnonzero(~np.isnan(auc)):
        if not low[c] - 1e-12 <= auc[c] <= high[c] + 1e-12:  # float64's rounding of the quotients
            raise RuntimeError(f"the AUC of {CLASSES[c]} is {auc[c]}, outside of [{low[c]}, {high[c]}]: a bug")


def format_scores(scores: Scores) -> str:
    """The table for people, its split above it."""
    n_patients = len(np.unique(scores.patients))
    lines = [
        f"{scores.name} ({scores.run.model}) on the test side of split {scores.split}: "
        f"{len(scores.patients):,} films of {n_patients:,} patients",
        f"  weights of epoch {scores.epoch}, {selection(scores)}",
        f"  {'class':20}{'AUC':>8}{'counted between':>20}{'std. error':>12}{'positive':>10}{'negative':>10}",
    ]
    for row in score_rows(scores):
        interval = "" if math.isnan(row["auc"]) else f"{row['low']:.5f}–{row['high']:.5f}"
        lines.append(
            f"  {row['class']:20}{_number(row['auc'], 4):>8}{interval:>20}{_number(row['standard_error'], 4):>12}"
            f"{row['positive']:>10,}{row['negative']:>10,}"
        )
    result = scores.result
    macro = f"macro, {result.defined} of {len(CLASSES)}"
    lines.append(f"  {macro:20}{_number(scores.macro, 4):>8}{'':20}{_number(scores.macro_error, 4):>12}")
    return "\n".join(lines)


def selection(scores: Scores) -> str:
    """How the epoch was chosen, in words; an honest reader needs it beside the figure."""
    if scores.weights == "last":
        return "the last, chosen by nothing"
    words = f"the best by test {scores.run.selected_by}"
    if scores.split.digest == scores.run.split_digest:
        words += ": chosen on this very test side, hence an optimistic score"
    return words


def score_rows(scores: Scores) -> list[dict[str, Any]]:
    """One row a class: class, auc, low, high, standard_error (NaN = undefined), positive, negative."""
    result = scores.result
    return [
        {
            "class": name,
            "auc": float(scores.auc[c]),
            "low": float(result.low[c]),
            "high": float(result.high[c]),
            "standard_error": float(scores.error[c]),
            "positive": int(result.n_pos[c]),
            "negative": int(result.n_neg[c]),
        }
        for c, name in enumerate(CLASSES)
    ]


def summary(scores: Scores) -> dict[str, Any]:
    """What the result means and where it is from, as JSON values; None = undefined."""
    return {
        "run": str(scores.run.path),
        "model": scores.run.model,
        "store": str(scores.store.path),
        "store_digest": scores.store.digest,
        "epoch": scores.epoch,
        "selection": selection(scores),
        "split": scores.split.name,
        "split_digest": scores.split.digest,
        "test_images": len(scores.patients),
        "test_patients": len(np.unique(scores.patients)),
        "macro_auc": _json(scores.macro),
        "macro_standard_error": _json(scores.macro_error),
        "classes_defined": scores.result.defined,
        "auc": {name: _json(float(value)) for name, value in zip(CLASSES, scores.auc, strict=True)},
    }


def write_results(scores: Sequence[Scores], shared: Path, own: Sequence[Path], figures: bool) -> list[Path]:
    """Write tables and figures, and last of all each run's ``result.json``.

    Args:
        shared: folder for what the runs have in common.
        own: a folder for each run; the same one where there is one run.
    Returns:
        The files' paths.
    """
    for folder in (shared, *own):
        folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for one, folder in zip(scores, own, strict=True):
        written += _write_own(one, folder, figures)
    written += _write_shared(scores, shared, figures)
    for one, folder in zip(scores, own, strict=True):
        write_json(folder / "result.json", summary(one))
        written.append(folder / "result.json")
    return written


def _write_own(scores: Scores, folder: Path, figures: bool) -> list[Path]:
    table = pd.DataFrame(score_rows(scores)).assign(split=scores.split.name, split_digest=scores.split.digest)
    write_atomic(folder / "auc.csv", table.to_csv(index=False, lineterminator="\n"))
    index = scores.store.index.iloc[scores.split.test].reset_index(drop=True)
    # The sigmoid in float64: in fp32 it would tie scores that the AUC keeps apart.
    probabilities = pd.DataFrame(torch.sigmoid(scores.logits.double()).numpy(), columns=list(CLASSES))
    predictions = pd.concat([index[["file", "patient"]], probabilities], axis=1)
    write_atomic(folder / "predictions.csv", predictions.to_csv(index=False, lineterminator="\n", float_format="%.12g"))
    written = [folder / "auc.csv", folder / "predictions.csv"]
    if figures:
        curves = [scores.counts.roc(c, _ROC_POINTS) for c in range(len(CLASSES))]
        figure = report.roc_figure([(scores.name, curves, scores.auc.tolist())], str(scores.split))
        written += report.save_figure(figure, folder, "roc")
        epochs = read_metrics(scores.run.path)
        trained_on = f"{scores.run.split_name} ({scores.run.split_digest[:12]})"
        written += report.save_figure(report.training_figure(epochs, scores.name, trained_on), folder, "training")
    return written


def _write_shared(scores: Sequence[Scores], folder: Path, figures: bool) -> list[Path]:
    systems = [report.System(one.name, str(one.split), tuple(one.auc)) for one in scores]
    table = report.comparison_table(systems)
    text = report.comparison_markdown(table, [*report.PAPER_NOTES, *_notes(scores)])
    write_atomic(folder / "comparison.md", text)
    write_atomic(folder / "comparison.csv", table.to_csv(index_label="AUC", lineterminator="\n"))
    written = [folder / "comparison.md", folder / "comparison.csv"]
    if not figures:
        return written
    if len(scores) > 1:
        curves = [
            (one.name, [one.counts.roc(c, _ROC_POINTS) for c in range(len(CLASSES))], one.auc.tolist())
            for one in scores
        ]
        written += report.save_figure(report.roc_figure(curves, str(scores[0].split)), folder, "roc_compared")
    store, run = scores[0].store, scores[0].run
    for name, draw in (
        ("labels", report.labels_figure),
        ("age", report.age_figure),
        ("sex", report.sex_figure),
        ("view", report.view_figure),
    ):
        written += report.save_figure(draw(store.index), folder, name)
    test = scores[0].split.test
    _, first_films = np.unique(scores[0].patients, return_index=True)
    rows = test[np.sort(first_films)[:_SHOWN_FILMS]]
    names = store.index["file"].iloc[rows].tolist()
    figure = report.preparation_figure(names, _originals(store, names), store.images[rows], *run.normalisation)
    return written + report.save_figure(figure, folder, "preparation")


def _folders(runs: Sequence[Run], names: Sequence[str], config: EvalConfig) -> tuple[Path, list[Path]]:
    """Where the results go that the runs share, and those of each."""
    shared = config.out or runs[0].path / "eval"
    if len(runs) == 1:
        return shared, [shared]
    return shared, [shared / name if config.out else run.path / "eval" for run, name in zip(runs, names, strict=True)]


def _check_writable(folder: Path) -> None:
    """Said before the work, not after it."""
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"{folder} cannot be written ({there} is no folder that can); choose another with --out")


def _open_store(run: Run, given: Path | None) -> Store:
    if given is None and not run.store.is_dir():
        raise InputError(f"{run.path} was trained on the store {run.store}, which is not there; give it with --store")
    return open_store(given or run.store)


def _notes(scores: Sequence[Scores]) -> list[str]:
    """What a reader must know before a run's column is set against a published one."""
    notes = []
    for one in scores:
        notes.append(f"{one.name}: weights of epoch {one.epoch}, {selection(one)}.")
        differences = check_totals(one.store.index)
        if not differences:
            continue
        listed = "; ".join(differences[:3]) + (f"; and {len(differences) - 3} more" if len(differences) > 3 else "")
        complete = len(one.store) >= 0.99 * PUBLISHED_TOTALS["images"]
        verdict = "" if complete else " Its column does not compare with the published ones."
        notes.append(f"{one.name}: its store is not the complete v2020 data set ({listed}).{verdict}")
    return notes


def _originals(store: Store, names: Sequence[str]) -> list[np.ndarray | None]:
    """Grey originals from where the store was made; None for what is no longer there."""
    try:
        films = find_films(Path(str(store.manifest.get("source", "")))).films
    except (InputError, OSError):
        return [None for _ in names]
    return [pillow.decode(films[name])[1] if name in films else None for name in names]


def _names(paths: Sequence[Path]) -> list[str]:
    """Short names for the runs: the folders' own where they differ, else the paths; a run named twice is an error."""
    if len({path.resolve() for path in paths}) < len(paths):
        raise InputError("a run is named twice; name each once")
    names = [path.resolve().name for path in paths]
    return names if len(set(names)) == len(names) else [str(path).replace("/", "-") for path in paths]


def _number(value: float, digits: int) -> str:
    return "n/a" if math.isnan(value) else f"{value:.{digits}f}"


def _json(value: float) -> float | None:
    return None if math.isnan(value) else value
