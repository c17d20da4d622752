"""splits.py. The danger: one patient on both sides, and every figure after it is too good and nobody sees why."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrfast.errors import InputError
from cxrfast.nih import PUBLISHED_TOTALS, read_metadata
from cxrfast.splits import check_leak, in_paper_test, make_split, paper_split


def table_of(patients: list[int]) -> pd.DataFrame:
    """One film a patient id, numbered within the patient as NIH does."""
    patient = pd.Series(patients, dtype=np.int64)
    number = patient.groupby(patient).cumcount()
    file = [f"{p:08d}_{n:03d}.png" for p, n in zip(patient, number, strict=True)]
    return pd.DataFrame({"file": file, "patient": patient})


def write_lists(folder: Path, train: list[str], test: list[str]) -> str:
    (folder / "train.txt").write_text("\n".join(train))
    (folder / "test.txt").write_text("\r\n".join(test))
    return f"{folder / 'train.txt'},{folder / 'test.txt'}"


@pytest.fixture(scope="module")
def published(data: Path) -> pd.DataFrame:
    """The complete v2020 table."""
    return read_metadata(data / "nih" / "metadata" / "Data_Entry_2017_v2020.csv").table


@pytest.mark.films
def test_papers_counts(published: pd.DataFrame) -> None:
    split = make_split("paper", published)
    assert (len(split.train), len(split.test)) == (89_826, 22_294)
    assert (published["patient"][split.train].nunique(), published["patient"][split.test].nunique()) == (24_644, 6_161)
    assert split.train.dtype == split.test.dtype == np.int64
    assert not set(split.train) & set(split.test)


@pytest.mark.films
def test_official_counts(data: Path, published: pd.DataFrame) -> None:
    split = make_split(f"official:{data / 'nih' / 'metadata'}", published)
    assert split.name == "official"
    assert (len(split.train), len(split.test), split.absent, split.unlisted) == (86_524, 25_596, 0, 0)
    assert (published["patient"][split.train].nunique(), published["patient"][split.test].nunique()) == (28_008, 2_797)
    assert (published["view"][split.test] == "AP").mean() == pytest.approx(0.57, abs=0.01)


@settings(max_examples=100, deadline=None)
@given(
    patients=st.lists(st.integers(1, 30_805), min_size=40, max_size=200),
    keep=st.lists(st.booleans(), min_size=200, max_size=200),
)
def test_paper_side_belongs_to_the_patient(patients: list[int], keep: list[bool]) -> None:
    """However many films are missing, nobody changes sides; and nobody is on both."""
    table = table_of(patients)
    try:
        whole = paper_split(table)
        part_table = table[keep[: len(table)]].reset_index(drop=True)
        part = paper_split(part_table)
    except InputError as error:
        assert "empty" in str(error) or "at least two" in str(error)
        return
    assert sorted([*whole.train, *whole.test]) == list(range(len(table)))
    train, test = set(table["patient"][whole.train]), set(table["patient"][whole.test])
    assert not train & test
    assert set(part_table["patient"][part.train]) <= train
    assert set(part_table["patient"][part.test]) <= test


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 10, 11, 999, PUBLISHED_TOTALS["patients"]])
def test_paper_draw_is_scikit_learns(count: int) -> None:
    from sklearn.model_selection import GroupShuffleSplit

    first = 1 if count == PUBLISHED_TOTALS["patients"] else 10**9  # the published patients, or others
    patients = np.arange(first, first + count)
    draw = GroupShuffleSplit(n_splits=1, test_size=0.2, random_state=42)
    _, test = next(draw.split(patients, groups=patients))
    assert np.array_equal(np.flatnonzero(in_paper_test(patients)), np.sort(test))


def test_paper_split_of_other_ids_is_drawn_over_those_present() -> None:
    split = paper_split(table_of([10**9 + i // 2 for i in range(100)]))
    assert (len(split.train), len(split.test)) == (80, 20)


def test_too_few_patients() -> None:
    with pytest.raises(InputError, match="at least two"):
        paper_split(table_of([10**9] * 3))
    with pytest.raises(InputError, match="side empty"):
        paper_split(table_of([1, 1]))


def test_digest_names_the_films_and_not_their_order() -> None:
    table = table_of(list(range(1, 101)))
    split, shuffled = paper_split(table), paper_split(table[::-1].reset_index(drop=True))
    assert split.digest == shuffled.digest and len(split.digest) == 64
    assert paper_split(table[:-1]).digest != split.digest
    assert str(split) == f"paper ({split.digest[:12]})"


def test_own_lists(tmp_path: Path) -> None:
    table = table_of([1, 1, 2, 3, 4])
    files = table["file"].tolist()
    spec = write_lists(tmp_path, [files[1], files[0], "absent.png"], [files[3]])
    split = make_split(spec, table)
    assert split.name == "train.txt,test.txt"
    assert (split.train.tolist(), split.test.tolist(), split.absent, split.unlisted) == ([0, 1], [3], 1, 2)


def test_overlap_of_one_patient_is_named(tmp_path: Path) -> None:
    table = table_of([1, 2, 2, 2, 3])
    files = table["file"].tolist()
    with pytest.raises(InputError, match=r"patient 2 is in training and in test \(1 .* 1 training and 2 test films"):
        make_split(write_lists(tmp_path, files[:2], files[2:]), table)
    with pytest.raises(InputError, match="patient 1"):  # the same film on both sides
        make_split(write_lists(tmp_path, files[:1], [files[0], files[4]]), table)


def test_a_side_without_films(tmp_path: Path) -> None:
    table = table_of([1, 2])
    with pytest.raises(InputError, match=r"test side empty; 1 listed film\(s\) are not among the 2 here"):
        make_split(write_lists(tmp_path, table["file"].tolist(), ["absent.png"]), table)


@pytest.mark.parametrize("spec", ["", "official", "official:", "train.txt", "a,b,c", "Paper", ","])
def test_other_texts_are_refused_with_the_forms(spec: str) -> None:
    with pytest.raises(InputError, match="write paper, official:FOLDER"):
        make_split(spec, table_of([1, 2]))


def test_lists_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train_val_list\.txt cannot be read"):
        make_split(f"official:{tmp_path}", table_of([1, 2]))


def test_check_leak() -> None:
    check_leak(np.array([1, 1, 2]), np.array([3]))
    check_leak(np.array([], np.int64), np.array([3]))
    with pytest.raises(InputError, match=r"patient 3 .*2 such"):
        check_leak(np.array([3, 4, 4]), np.array([5, 4, 3]))
