"""nih.py. The danger: a value that is read wrongly, or repaired in silence, is believed by everything after it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cxrfast.errors import InputError
from cxrfast.nih import (
    CLASSES,
    PUBLISHED_TOTALS,
    TABLE_COLUMNS,
    Metadata,
    check_totals,
    read_boxes,
    read_list,
    read_metadata,
)

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
SAMPLE_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImageWidth,OriginalImageHeight,OriginalImagePixelSpacing_x,OriginalImagePixelSpacing_y"
)
ROW = "00000001_000.png,Cardiomegaly,0,1,57,M,PA,2682,2749,0.143,0.143"


def write(folder: Path, *lines: str, newline: str = "\n") -> Path:
    path = folder / "metadata.csv"
    path.write_bytes(newline.join(lines).encode())
    return path


def row(**cells: str) -> str:
    default = dict(file="00000001_000.png", labels="Mass", follow_up="0", patient="1", age="57", sex="M", view="PA")
    return ",".join([*{**default, **cells}.values(), "2682,2749,0.143,0.143"])


def test_classes_are_fourteen_in_the_papers_order() -> None:
    assert len(CLASSES) == len(set(CLASSES)) == 14
    assert (CLASSES[0], CLASSES[3], CLASSES[8], CLASSES[12], CLASSES[13]) == (
        "Atelectasis",
        "Infiltration",
        "Consolidation",
        "Pleural_Thickening",
        "Hernia",
    )


@pytest.mark.parametrize(
    ("header", "line", "newline", "generation", "age"),
    [
        (HEADER + ",", row(patient="00000001", follow_up="000", age="058Y"), "\r\n", "2017-09", 58.0),
        (HEADER + ",", row(age="58"), "\n", "2017-11", 58.0),
        (HEADER + ",", row(age="58") + ",", "\r\n", "2017-11", 58.0),
        (HEADER, row(age="58"), "\n", "v2020", 58.0),
        (HEADER.replace("Gender", "Sex"), row(age="58"), "\n", "v2020", 58.0),
        (SAMPLE_HEADER, row(patient="00000001", age="058Y"), "\r\n", "kaggle-sample", 58.0),
    ],
)
def test_every_generation_gives_the_same_table(
    tmp_path: Path, header: str, line: str, newline: str, generation: str, age: float
) -> None:
    metadata = read_metadata(write(tmp_path, header, line, "", newline=newline))
    assert metadata.generation == generation
    assert list(metadata.table.columns) == list(TABLE_COLUMNS)
    film = metadata.table.iloc[0]
    assert tuple(film[["file", "patient", "age", "sex", "view", "follow_up"]]) == (
        "00000001_000.png",
        1,
        age,
        "M",
        "PA",
        0.0,
    )
    assert [name for name in CLASSES if film[name] == 1] == ["Mass"]
    assert metadata.repairs == {} and metadata.film_repairs == {}


def test_column_types(tmp_path: Path) -> None:
    table = read_metadata(write(tmp_path, HEADER, ROW)).table
    assert table["patient"].dtype == np.int64
    assert table["age"].dtype == table["follow_up"].dtype == np.float64
    assert all(table[name].dtype == np.float32 for name in CLASSES)


@pytest.mark.parametrize(
    ("text", "years"),
    [("057Y", 57.0), ("013M", 13 / 12), ("001D", 1 / 365.25), ("002w", 14 / 365.25), ("0", 0.0), ("100", 100.0)],
)
def test_ages_are_years(tmp_path: Path, text: str, years: float) -> None:
    metadata = read_metadata(write(tmp_path, HEADER, row(age=text)))
    assert metadata.table["age"][0] == pytest.approx(years, rel=1e-15)
    assert "age" not in metadata.repairs


@pytest.mark.parametrize("text", ["148", "155Y", "411", "414Y", "101", "-1", "old", "1e1"])
def test_impossible_ages_become_missing_and_are_named(tmp_path: Path, text: str) -> None:
    metadata = read_metadata(write(tmp_path, HEADER, row(), row(file="00000002_000.png", patient="2", age=text)))
    assert metadata.table["age"].isna().tolist() == [False, True]
    assert metadata.repairs == {"age": 1}
    assert metadata.film_repairs == {"00000002_000.png": f"age {text!r} set to missing"}


@pytest.mark.parametrize("follow_up", ["", "x", "inf", "1e999"])
def test_what_is_empty_is_unknown_and_no_repair(tmp_path: Path, follow_up: str) -> None:
    metadata = read_metadata(write(tmp_path, HEADER, row(labels="", age="", sex="", view="", follow_up=follow_up)))
    film = metadata.table.iloc[0]
    assert np.isnan(film["age"]) and np.isnan(film["follow_up"]) and film["sex"] == film["view"] == ""
    assert film[list(CLASSES)].isna().all()
    assert metadata.repairs == {}


def test_unknown_codes_become_missing_and_all_repairs_of_a_film_are_told(tmp_path: Path) -> None:
    metadata = read_metadata(
        write(tmp_path, HEADER, row(age="412", sex="O", view="LL"), row(file="a.png", sex="female"))
    )
    assert metadata.table["sex"].tolist() == ["", "F"]
    assert metadata.repairs == {"age": 1, "sex": 1, "view": 1}
    assert metadata.film_repairs == {
        "00000001_000.png": "age '412' set to missing; sex 'O' set to missing; view 'LL' set to missing"
    }


def test_spellings_that_circulate(tmp_path: Path) -> None:
    lines = [
        row(labels="No_Finding"),
        row(file="00000001_001.png", labels="Infiltrate|Pleural Thickening"),
        row(file="00000001_002.png", labels="No Finding"),
    ]
    metadata = read_metadata(write(tmp_path, HEADER, *lines))
    assert (metadata.table.loc[[0, 2], list(CLASSES)] == 0).all(axis=None)
    assert [name for name in CLASSES if metadata.table[name][1] == 1] == ["Infiltration", "Pleural_Thickening"]
    assert metadata.repairs == {"label spelling": 2} and metadata.film_repairs == {}


def test_byte_order_mark(tmp_path: Path) -> None:
    assert len(read_metadata(write(tmp_path, "\ufeff" + HEADER, ROW)).table) == 1


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([""], "is empty"),
        ([HEADER], "no rows"),
        (["Path,Sex,Age,Frontal/Lateral", "a,b,c,d"], "is not ChestX-ray14's metadata: it lacks Image Index"),
        (["Image Index,Finding Label,Bbox [x,y,w,h],,,", "a,b,1,2,3,4"], "is not ChestX-ray14's metadata"),
        ([HEADER.replace("Patient Age,", ""), ROW], "lacks the column Patient Age"),
        ([HEADER.replace("Follow-up #,", "").replace("Patient ID,", ""), ROW], "Follow-up #, Patient ID"),
        ([HEADER.replace("View Position", "Patient Age"), ROW], "'Patient Age' more than once"),
        ([HEADER, ROW, ROW], "names 00000001_000.png more than once"),
        ([HEADER, row(file="")], "row 2 names no file"),
        ([HEADER, ROW, row(file="b.png", labels="Mass|Cancer")], "row 3 has the label 'Cancer'"),
        ([HEADER, row(labels="No Finding|Mass")], "'No Finding' beside a finding"),
        ([HEADER, row(patient="one")], "patient id 'one'"),
        ([HEADER, row(patient="7")], "of patient 7, its name says 1"),
        ([HEADER, ROW, ROW[:40]], "row 3 has fewer fields"),
        ([HEADER, ROW + ",9"], "row 2 has more fields"),
        ([HEADER, '"' + ROW], "is not a CSV that can be read"),
    ],
)
def test_wrong_csvs_are_one_sentence(tmp_path: Path, lines: list[str], sentence: str) -> None:
    with pytest.raises(InputError) as error:
        read_metadata(write(tmp_path, *lines))
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_unreadable_csvs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_metadata(tmp_path / "absent.csv")
    with pytest.raises(InputError, match="cannot be read"):
        read_metadata(tmp_path)
    (tmp_path / "film.csv").write_bytes(b"\x89PNG\r\n\x1a\n\xff")
    with pytest.raises(InputError, match="UTF-8"):
        read_metadata(tmp_path / "film.csv")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 400))
def test_a_cut_off_csv_never_reads_as_a_whole_one(tmp_path: Path, cut: int) -> None:
    """The rows that are whole, or an error: a row that was cut within its needed columns is never believed."""
    text = "\n".join([HEADER, *(row(file=f"0000000{i}_000.png", patient=str(i)) for i in (1, 2, 3))]) + "\n"
    (tmp_path / "cut.csv").write_text(text[: len(text) - cut])
    try:
        table = read_metadata(tmp_path / "cut.csv").table
    except InputError:
        return
    assert (table["Mass"] == 1).all() and (table["age"] == 57).all() and (table["view"] == "PA").all()


def test_lists(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    for text in ("a.png\nb.png", "a.png\r\nb.png\r\n", "\ufeffa.png\n\n b.png \n"):
        path.write_bytes(text.encode())
        assert read_list(path) == ["a.png", "b.png"]
    for text, sentence in (
        ("\n", "is empty"),
        ("a.png\na.png", "a.png more than once"),
        ("a.png 0 1 0", "not a file name"),
        ("a.png,Mass", "not a file name"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=sentence):
            read_list(path)


def test_box_list(tmp_path: Path) -> None:
    header = "Image Index,Finding Label,Bbox [x,y,w,h],,,"
    boxes = read_boxes(write(tmp_path, header, "a.png,Infiltrate,1.5,2,3,4"))
    assert boxes.to_dict("records") == [{"file": "a.png", "label": "Infiltration", "x": 1.5, "y": 2, "w": 3, "h": 4}]
    for lines, sentence in (
        ([HEADER, ROW], "is not a BBox list"),
        ([header, "a.png,Cancer,1,2,3,4"], "'Cancer' is not one"),
        ([header, "a.png,Mass,1,2,3,?"], "row 2 is not a box"),
        ([header, "a.png,Mass,1,2"], "fewer fields"),
    ):
        with pytest.raises(InputError, match=sentence):
            read_boxes(write(tmp_path, *lines))


@pytest.fixture(scope="module")
def published(data: Path) -> Metadata:
    """The complete v2020 CSV."""
    return read_metadata(data / "nih" / "metadata" / "Data_Entry_2017_v2020.csv")


@pytest.mark.films
def test_published_totals(published: Metadata) -> None:
    """The known answer: the complete v2020 CSV adds up to NIH's own figures, and one changed cell is seen."""
    metadata = published
    assert metadata.generation == "v2020" and metadata.repairs == {}
    assert check_totals(metadata.table) == []
    assert (metadata.table["age"].min(), metadata.table["age"].max()) == (0, 95)
    assert (metadata.table["age"] == 0).sum() == 14
    changed = metadata.table.copy()
    changed.loc[0, "Hernia"] = 1.0
    assert check_totals(changed) == ["Hernia: 228 instead of 227"]
    assert len(check_totals(metadata.table.iloc[:10])) == len(PUBLISHED_TOTALS)


@pytest.mark.films
@pytest.mark.parametrize(
    ("name", "generation"),
    [
        ("fixture_first_release_head.csv", "2017-09"),
        ("fixture_v2020_shortfloat_head.csv", "v2020"),
        ("fixture_kaggle_sample_labels_head.csv", "kaggle-sample"),
    ],
)
def test_rows_of_real_csvs(data: Path, published: Metadata, name: str, generation: str) -> None:
    """The generations agree on the films they share, apart from what the releases themselves changed."""
    metadata = read_metadata(data / "nih" / "metadata" / name)
    full = published.table.set_index("file")
    assert metadata.generation == generation
    table = metadata.table.set_index("file")
    same = full.loc[table.index]
    pd.testing.assert_frame_equal(table[["patient", "view"]], same[["patient", "view"]])
    assert (table["age"] - same["age"]).abs().max() <= 2  # ages were recomputed in 2020
    assert ((table[list(CLASSES)] != same[list(CLASSES)]).any(axis=1)).mean() < 0.1


@pytest.mark.films
def test_official_lists_and_boxes(data: Path) -> None:
    folder = data / "nih" / "metadata"
    assert len(read_list(folder / "train_val_list.txt")) == 86_524
    assert len(read_list(folder / "test_list.txt")) == 25_596
    boxes = read_boxes(folder / "BBox_List_2017.csv")
    assert (len(boxes), boxes["file"].nunique(), boxes["label"].nunique()) == (984, 880, 8)
    assert ((boxes["x"] >= 0) & (boxes["x"] + boxes["w"] <= 1024.5)).all()
