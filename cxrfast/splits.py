"""Which films train and which test: patient-wise splits, and the guard that no patient is on both sides.

A split is chosen by one text, everywhere the same (``--split``, a run's configuration):

    paper               the paper's 80/20 split over patients
    official:FOLDER     NIH's own lists, train_val_list.txt and test_list.txt in FOLDER
    TRAIN.txt,TEST.txt  a user's own lists, one file name a line

Its name and hash go beside every figure. The hash is over the films that are really there: two stores that lack
different films have the same split by name, and different hashes.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from cxrfast.errors import InputError
from cxrfast.nih import PUBLISHED_TOTALS, TEST_LIST, TRAIN_LIST, read_list

TEST_SHARE = 0.2
PAPER_SEED = 42  # reproduces the paper's four counts exactly


@dataclass(frozen=True)
class Split:
    """Row numbers of a table's two sides; no patient is on both.

    Attributes:
        name: "paper", "official", or the two lists' file names.
        train: int64, ascending row numbers of the table that the split was made for.
        test: likewise; rows in neither are left out.
        digest: SHA-256, as hex, over the name and both sides' sorted file names.
        absent: names that the lists hold and the table lacks.
        unlisted: rows of the table that no list names.
    """

    name: str
    train: np.ndarray
    test: np.ndarray
    digest: str
    absent: int = 0
    unlisted: int = 0

    def __str__(self) -> str:
        return f"{self.name} ({self.digest[:12]})"


def make_split(spec: str, table: pd.DataFrame) -> Split:
    """The split that ``spec`` names (forms: top of this file) over a table with the columns file and patient.

    Raises:
        InputError: the text has none of the forms, a list cannot be read, a patient is on both sides, a side is empty.
    """
    if spec == "paper":
        return paper_split(table)
    kind, _, folder = spec.partition(":")
    if kind == "official" and folder:
        return official_split(table, Path(folder) / TRAIN_LIST, Path(folder) / TEST_LIST)
    lists = spec.split(",")
    if len(lists) == 2 and all(lists):
        return list_split(table, Path(lists[0].strip()), Path(lists[1].strip()))
    raise InputError(
        f"no split is called {spec!r}; write paper, official:FOLDER (with {TRAIN_LIST} and {TEST_LIST} in it) "
        "or TRAIN.txt,TEST.txt"
    )


def paper_split(table: pd.DataFrame) -> Split:
    """The paper's 80/20 split over patients: 89,826 / 22,294 images of 24,644 / 6,161 patients on the complete set.

    It was a draw over the published patients, whose ids are 1 to 30,805 without a gap. That draw is repeated here
    whichever of them are in the table, so that a patient's side is a property of the patient: a film that was rejected,
    or Kaggle's sample, moves nobody across. A table with other ids (no NIH data) is drawn over the patients it has.

    Raises:
        InputError: a side is empty (a handful of patients).
    """
    in_test = in_paper_test(table["patient"].to_numpy(np.int64))
    return _split("paper", table, ~in_test, in_test)


def in_paper_test(patients: np.ndarray) -> np.ndarray:
    """bool, one for each of the patient ids, repeats allowed: is this patient on the test side of ``paper_split``?"""
    published = np.arange(1, PUBLISHED_TOTALS["patients"] + 1)
    drawn_over = published if np.isin(patients, published).all() else np.unique(patients)
    if len(drawn_over) < 2:
        raise InputError(f"there is {len(drawn_over)} patient; a split needs at least two")
    # What scikit-learn's GroupShuffleSplit draws (a test holds it to that), whose import is a third of a run's start.
    shuffled = np.random.RandomState(PAPER_SEED).permutation(drawn_over)
    return np.isin(patients, shuffled[: math.ceil(TEST_SHARE * len(drawn_over))])


def official_split(table: pd.DataFrame, train_list: Path, test_list: Path) -> Split:
    """NIH's own split: 86,524 / 25,596 images of 28,008 / 2,797 patients. Its test set is another, harder population
    (57 % AP against 35 % in training): one and the same model scores 0.02 to 0.03 less there than on ``paper``.

    Raises:
        InputError: as ``list_split``.
    """
    return list_split(table, train_list, test_list, name="official")


def list_split(table: pd.DataFrame, train_list: Path, test_list: Path, name: str | None = None) -> Split:
    """The split of two lists, one file name a line; names that the table lacks and rows that no list names are counted.

    Raises:
        InputError: a list cannot be read or repeats a name, a patient is on both sides, or a side is empty.
    """
    train_names, test_names = read_list(train_list), read_list(test_list)
    in_train = table["file"].isin(train_names).to_numpy()
    in_test = table["file"].isin(test_names).to_numpy()
    listed = len({*train_names, *test_names})
    return _split(
        name or f"{train_list.name},{test_list.name}",
        table,
        in_train,
        in_test,
        absent=listed - int((in_train | in_test).sum()),
        unlisted=int((~(in_train | in_test)).sum()),
    )


def check_leak(train_patients: np.ndarray, test_patients: np.ndarray) -> None:
    """Raise InputError, naming one patient and the counts, unless the two sets of patients are disjoint."""
    shared = np.intersect1d(train_patients, test_patients)
    if not len(shared):
        return
    n_train = int(np.isin(train_patients, shared).sum())
    n_test = int(np.isin(test_patients, shared).sum())
    raise InputError(
        f"patient {shared[0]} is in training and in test ({len(shared)} such patient(s), with {n_train} training and "
        f"{n_test} test films); a score on them would not be one on unseen patients"
    )


def _split(
    name: str, table: pd.DataFrame, in_train: np.ndarray, in_test: np.ndarray, absent: int = 0, unlisted: int = 0
) -> Split:
    patients = table["patient"].to_numpy(np.int64)
    check_leak(patients[in_train], patients[in_test])
    for side, rows in (("training", in_train), ("test", in_test)):
        if not rows.any():
            lists = f"; {absent:,} listed film(s) are not among the {len(table):,} here" if absent else ""
            raise InputError(f"the split {name} leaves the {side} side empty{lists}")
    digest = hashlib.sha256(f"{name}\n".encode())
    for side, rows in (("train", in_train), ("test", in_test)):
        names = sorted(table["file"][rows])
        digest.update("\n".join([f"{side} {len(names)}", *names, ""]).encode())
    return Split(name, np.flatnonzero(in_train), np.flatnonzero(in_test), digest.hexdigest(), absent, unlisted)
