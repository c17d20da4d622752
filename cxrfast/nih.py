"""NIH ChestX-ray14's conventions: classes, spellings, metadata generations, official lists, published totals.

Every table that leaves this file has one row per film and the columns ``TABLE_COLUMNS``, whichever generation of
the CSV it came from. Values that cannot be true become missing, and each such repair is named; what cannot be
understood is an ``InputError``. Where films lie on disk is not known here (sources.py), nor which of them are
there (prep.py).
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cxrfast.errors import InputError

if TYPE_CHECKING:  # loaded where it is used: it takes longer than reading the CSV, and prep can do without
    import pandas as pd

CLASSES: tuple[str, ...] = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
"""The 14 findings in the paper's order; every label column, target and AUC follows it."""

NO_FINDING = "No Finding"

TABLE_COLUMNS: tuple[str, ...] = ("file", "patient", "age", "sex", "view", "follow_up", *CLASSES)

MAX_AGE = 100.0
"""Years. The 2017 CSVs hold 16 impossible ages, 148–155 and 411–414; v2020, corrected, ends at 95."""

PUBLISHED_TOTALS: dict[str, int] = {
    "images": 112_120,
    "patients": 30_805,
    NO_FINDING: 60_361,
    "Atelectasis": 11_559,
    "Cardiomegaly": 2_776,
    "Effusion": 13_317,
    "Infiltration": 19_894,
    "Mass": 5_782,
    "Nodule": 6_331,
    "Pneumonia": 1_431,
    "Pneumothorax": 5_302,
    "Consolidation": 4_667,
    "Edema": 2_303,
    "Emphysema": 2_516,
    "Fibrosis": 1_686,
    "Pleural_Thickening": 3_385,
    "Hernia": 227,
    "M": 63_340,
    "F": 48_780,
    "PA": 67_310,
    "AP": 44_810,
}
"""What the complete v2020 CSV adds up to (NIH's own figures)."""

TRAIN_LIST = "train_val_list.txt"
TEST_LIST = "test_list.txt"

# Column of the table -> its names in the CSVs, the usual one first.
_CSV_COLUMNS: dict[str, tuple[str, ...]] = {
    "file": ("Image Index",),
    "labels": ("Finding Labels",),
    "follow_up": ("Follow-up #",),
    "patient": ("Patient ID",),
    "age": ("Patient Age",),
    "sex": ("Patient Gender", "Patient Sex"),
    "view": ("View Position",),
}

# Spellings that circulate besides the CSV's own (papers, BBox list, Kaggle's sample).
_SPELLINGS = {
    "Infiltrate": "Infiltration",
    "Pleural Thickening": "Pleural_Thickening",
    "No_Finding": NO_FINDING,
}

_AGE = re.compile(r"(-?\d+(?:\.\d+)?)\s*([YMWD]?)", re.IGNORECASE)
_YEARS_PER_UNIT = {
    "": 1.0,
    "Y": 1.0,
    "M": 1 / 12,
    "W": 7 / 365.25,
    "D": 1 / 365.25,
}  # the units of DICOM's AS

_NIH_NAME = re.compile(r"(\d{8})_\d{3}\.png")
_PATIENT = re.compile(r"\d{1,18}")


@dataclass(frozen=True)
class Metadata:
    """One CSV, read.

    Attributes:
        columns: ``TABLE_COLUMNS``, each with one value per film in the CSV's order: file str; patient int64; age
            float64 in years, NaN = unknown; sex "M", "F" or "" = unknown; view "PA", "AP" or ""; follow_up float64;
            the 14 classes float32: 1, 0 or NaN = unknown.
        generation: whose layout the CSV has: "2017-09", "2017-11", "v2020" or "kaggle-sample".
        repairs: how many values were repaired, by kind ("age", "sex", "view", "label spelling"); absent = none.
        film_repairs: file -> what was set to missing in its row, one phrase. Spellings lose nothing: not in here.
    """

    columns: dict[str, np.ndarray]
    generation: str
    repairs: dict[str, int]
    film_repairs: dict[str, str]

    @cached_property
    def table(self) -> pd.DataFrame:
        """The columns as a DataFrame."""
        import pandas as pd

        return pd.DataFrame(self.columns)

    def columns_of(self, files: Sequence[str]) -> dict[str, np.ndarray]:
        """The columns of some of the films, in the order of ``files``."""
        rows = {file: row for row, file in enumerate(self.columns["file"].tolist())}
        wanted = [rows[file] for file in files]
        return {name: values[wanted] for name, values in self.columns.items()}


def read_metadata(path: str | Path) -> Metadata:
    """Read any generation of ``Data_Entry_2017*.csv``, or Kaggle's ``sample_labels.csv``.

    Raises:
        InputError: not readable, empty, another data set's CSV, a column is missing, a file is named twice, a
            label is unknown, ``No Finding`` stands beside a finding, or a patient id is no number or contradicts
            the file's name.
    """
    path = Path(path)
    header, raw = _read_columns(path, _match_columns)
    files = raw["file"]
    if "" in files:
        raise InputError(f"{path}: row {_line(files.index(''))} names no file")
    named = Counter(files)
    if len(named) < len(files):
        repeated = next(file for file in files if named[file] > 1)
        raise InputError(f"{path} names {repeated} more than once ({len(files) - len(named)} rows too many)")

    patients = _read_patients(path, raw["patient"], files)
    labels, respelled = _read_labels(path, raw["labels"])
    ages, age_repairs = _read_ages(raw["age"])
    sexes, sex_repairs = _read_codes(raw["sex"], {"M": "M", "F": "F", "MALE": "M", "FEMALE": "F"}, "sex")
    views, view_repairs = _read_codes(raw["view"], {"PA": "PA", "AP": "AP"}, "view")
    follow_ups = {text: _number_or_nan(text) for text in set(raw["follow_up"])}

    notes: dict[int, list[str]] = {}
    for repairs in (age_repairs, sex_repairs, view_repairs):
        for row, note in repairs.items():
            notes.setdefault(row, []).append(note)
    counts = {
        "age": len(age_repairs),
        "sex": len(sex_repairs),
        "view": len(view_repairs),
        "label spelling": respelled,
    }
    columns = {
        "file": np.array(files, object),
        "patient": patients,
        "age": ages,
        "sex": np.array(sexes, object),
        "view": np.array(views, object),
        "follow_up": np.array([follow_ups[text] for text in raw["follow_up"]]),
        **{name: labels[:, i] for i, name in enumerate(CLASSES)},
    }
    return Metadata(
        columns,
        generation=_generation(header, raw["age"]),
        repairs={kind: count for kind, count in counts.items() if count},
        film_repairs={files[row]: "; ".join(notes[row]) for row in sorted(notes)},
    )


def check_totals(table: pd.DataFrame) -> list[str]:
    """How the table differs from the complete, published v2020 set: a phrase per total; none = it is that set."""
    findings = table[list(CLASSES)]
    found = {
        "images": len(table),
        "patients": int(table["patient"].nunique()),
        NO_FINDING: int((findings == 0).all(axis=1).sum()),
        **{name: int(findings[name].sum()) for name in CLASSES},
        **{sex: int((table["sex"] == sex).sum()) for sex in ("M", "F")},
        **{view: int((table["view"] == view).sum()) for view in ("PA", "AP")},
    }
    return [
        f"{name}: {found[name]:,} instead of {published:,}"
        for name, published in PUBLISHED_TOTALS.items()
        if found[name] != published
    ]


def read_list(path: str | Path) -> list[str]:
    """Read a split list, one file name a line; the official ones end without a newline, other copies have CRLF.

    Raises:
        InputError: not readable, empty, a line that holds more than a file name, or a name given twice.
    """
    path = Path(path)
    names = [line.strip() for line in _read_text(path).splitlines() if line.strip()]
    if not names:
        raise InputError(f"{path} names no film; it must hold one file name a line")
    for name in names:
        if len(name.split()) > 1 or "," in name:
            raise InputError(f"{path}: {name[:60]!r} is not a file name; the list must hold one file name a line")
    if len(set(names)) < len(names):
        seen: set[str] = set()
        repeated = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise InputError(f"{path} names {repeated} more than once")
    return names


def read_boxes(path: str | Path) -> pd.DataFrame:
    """Read ``BBox_List_2017.csv``: columns file, label (of ``CLASSES``), x, y, w, h (float64, 1024-pixel frame).

    Raises:
        InputError: not readable, not that list, an unknown label, or a box that is not four numbers.
    """
    path = Path(path)
    _, boxes = _read_columns(path, _box_columns)
    labels = [_SPELLINGS.get(label, label) for label in boxes["label"]]
    for label, text in zip(labels, boxes["label"], strict=True):
        if label not in CLASSES:
            raise InputError(f"{path}: {text!r} is not one of the 14 findings")
    numbers = np.array([[_number_or_nan(text) for text in boxes[name]] for name in "xywh"])
    bad = np.isnan(numbers).any(axis=0)
    if bad.any():
        raise InputError(f"{path}: row {_line(int(bad.argmax()))} is not a box of four numbers")
    import pandas as pd

    return pd.DataFrame({"file": boxes["file"], "label": labels, **dict(zip("xywh", numbers, strict=True))})


def _read_text(path: Path) -> str:
    """The file as text without a byte order mark; unreadable is an InputError."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a text file in UTF-8") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    if not text.strip():
        raise InputError(f"{path} is empty")
    return text


def _read_columns(
    path: Path, positions: Callable[[Path, list[str]], dict[str, int]]
) -> tuple[list[str], dict[str, list[str]]]:
    """The header's stripped names, empty ones included, and columns of stripped text: our name -> a cell for each row.

    Blank lines are no rows; a row that does not fit the header is an InputError.

    Args:
        positions: which columns, from path and header: our name -> its position.
    """
    rows = (row for row in csv.reader(io.StringIO(_read_text(path)), strict=True) if row)
    picked = []
    try:
        header = [name.strip() for name in next(rows)]
        columns = positions(path, header)
        pick = itemgetter(*columns.values())
        # The headers of 2017 name an empty last column that the rows may or may not have; a spare comma is harmless.
        width = len([name for name in header if name])
        for number, row in enumerate(rows, start=2):
            if len(row) < width or any(row[width:]):
                what = "fewer" if len(row) < width else "more"
                raise InputError(f"{path}: row {number} has {what} fields than the header; the file may be cut off")
            picked.append(pick(row))
    except csv.Error as error:
        raise InputError(f"{path} is not a CSV that can be read ({error})") from None
    if not picked:
        raise InputError(f"{path} has a header but no rows; give the file as NIH or Kaggle publish it")
    cells = zip(*picked, strict=True)
    return header, {name: [cell.strip() for cell in next(cells)] for name in columns}


def _match_columns(path: Path, header: list[str]) -> dict[str, int]:
    """Our name -> the column's position, for every column that is needed."""
    matched: dict[str, int] = {}
    missing = []
    for name, spellings in _CSV_COLUMNS.items():
        found = [spelling for spelling in spellings if spelling in header]
        if not found:
            missing.append(spellings[0])
        elif header.count(found[0]) > 1:
            raise InputError(f"{path} has the column {found[0]!r} more than once")
        else:
            matched[name] = header.index(found[0])
    if "file" not in matched or "labels" not in matched:
        shown = ", ".join(header[:6]) + (" …" if len(header) > 6 else "")
        raise InputError(
            f"{path} is not ChestX-ray14's metadata: it lacks {', '.join(missing)} (its columns: {shown[:160]})"
        )
    if missing:
        raise InputError(f"{path} lacks the column {', '.join(missing)}; give the CSV as NIH or Kaggle publish it")
    return matched


def _box_columns(path: Path, header: list[str]) -> dict[str, int]:
    if header[:3] != ["Image Index", "Finding Label", "Bbox [x"]:
        raise InputError(f"{path} is not a BBox list; its header begins with {', '.join(header[:3])!r}")
    # The header has nine fields, "Bbox [x,y,w,h]" and three empty ones, over six fields of data.
    return {"file": 0, "label": 1, "x": 2, "y": 3, "w": 4, "h": 5}


def _generation(header: list[str], ages: list[str]) -> str:
    if "OriginalImageWidth" in header:
        return "kaggle-sample"
    if any(age[-1:].isalpha() for age in ages):
        return "2017-09"
    # The first two releases end their header in a comma; v2020 does not.
    return "2017-11" if header[-1] == "" else "v2020"


def _line(row: int) -> int:
    """A row's line in the file, as an editor counts."""
    return row + 2


def _number_or_nan(text: str) -> float:
    """NaN for what is no finite number."""
    try:
        number = float(text)
    except ValueError:
        return np.nan
    return number if np.isfinite(number) else np.nan


def _read_patients(path: Path, raw: list[str], files: list[str]) -> np.ndarray:
    """int64 (N,)."""
    for row, text in enumerate(raw):
        if not _PATIENT.fullmatch(text):
            raise InputError(f"{path}: row {_line(row)} has the patient id {text!r}, which is not a number")
    patients = [int(text) for text in raw]
    # NIH's file names begin with the patient's id. A CSV that contradicts them lets patients leak across a split.
    named = [_NIH_NAME.fullmatch(file) for file in files]
    wrong = [row for row, name in enumerate(named) if name and int(name[1]) != patients[row]]
    if wrong:
        row = wrong[0]
        raise InputError(
            f"{path}: row {_line(row)} says that {files[row]} is of patient {patients[row]}, "
            f"its name says {int(named[row][1])} ({len(wrong)} such rows)"  # type: ignore[index]
        )
    return np.array(patients, np.int64)


def _read_labels(path: Path, raw: list[str]) -> tuple[np.ndarray, int]:
    """The labels, float32 (N, 14), and how many rows were spelled otherwise."""
    values: dict[str, np.ndarray] = {}
    respelled = set[str]()
    for text in dict.fromkeys(raw):
        values[text] = np.full(len(CLASSES), np.nan if text == "" else 0, np.float32)
        if text == "":
            continue
        spelled = [label.strip() for label in text.split("|")]
        names = [_SPELLINGS.get(label, label) for label in spelled]
        if names != spelled:
            respelled.add(text)
        for name in names:
            if name != NO_FINDING and name not in CLASSES:
                row = _line(raw.index(text))
                raise InputError(f"{path}: row {row} has the label {name!r}, not one of the 14 findings")
        if NO_FINDING in names and len(names) > 1:
            raise InputError(f"{path}: row {_line(raw.index(text))} has {NO_FINDING!r} beside a finding ({text})")
        if names != [NO_FINDING]:
            values[text][[CLASSES.index(name) for name in names]] = 1
    return np.array([values[text] for text in raw]), sum(text in respelled for text in raw)


def _read_ages(raw: list[str]) -> tuple[np.ndarray, dict[int, str]]:
    """Ages in years, float64 (N,), and row -> repair."""
    years: dict[str, float] = {}
    for text in set(raw):
        match = _AGE.fullmatch(text)
        value = float(match[1]) * _YEARS_PER_UNIT[match[2].upper()] if match else np.nan
        years[text] = value if 0 <= value <= MAX_AGE else np.nan
    bad = {text for text, value in years.items() if text and np.isnan(value)}
    repairs = {row: f"age {text[:20]!r} set to missing" for row, text in enumerate(raw) if text in bad}
    return np.array([years[text] for text in raw]), repairs


def _read_codes(raw: list[str], meaning: dict[str, str], what: str) -> tuple[list[str], dict[int, str]]:
    """A column of short codes; one that has no meaning here becomes "" and a repair, an empty one only ""."""
    codes = [meaning.get(text.upper(), "") for text in raw]
    bad = [row for row, code in enumerate(codes) if not code and raw[row]]
    return codes, {row: f"{what} {raw[row][:20]!r} set to missing" for row in bad}
