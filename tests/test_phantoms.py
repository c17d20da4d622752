"""Phantom films: encoded as NIH's are, the same for the same seed, never over others' files, finished when killed."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from helpers import content
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cxrfast.cli.phantoms import main
from cxrfast.nih import CLASSES, read_metadata
from cxrfast.phantoms import png
from cxrfast.phantoms.cases import SHARES, make_cases
from cxrfast.phantoms.draw import SIGNS, Case, draw_film
from cxrfast.phantoms.film import film_bytes, is_rgba
from cxrfast.splits import in_paper_test, official_split

TIME = (2016, 9, 1, 12, 30, 0)
SMALL = ["--images", "14", "--seed", "3", "--size", "128"]
NIH_MEAN_NBYTES = 411_000


def chunks(file: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and data of each chunk; a wrong CRC fails."""
    assert file.startswith(png.SIGNATURE)
    at = 8
    while at < len(file):
        (nbytes,) = struct.unpack(">I", file[at : at + 4])
        kind, data = file[at + 4 : at + 8], file[at + 8 : at + 8 + nbytes]
        assert struct.unpack(">I", file[at + 8 + nbytes : at + 12 + nbytes])[0] == zlib.crc32(kind + data)
        yield kind, data
        at += 12 + nbytes


def idat(file: bytes) -> bytes:
    return b"".join(data for kind, data in chunks(file) if kind == b"IDAT")


def row_filters(file: bytes) -> np.ndarray:
    """The filter byte of each row of a 1024 px film."""
    return np.frombuffer(zlib.decompress(idat(file)), np.uint8).reshape(1024, -1)[:, 0]


def case(*signs: str, film: int = 0, sex: str = "F", view: str = "PA") -> Case:
    return Case((0, 1, 7), (0, 2, film), 50.0, sex, view, frozenset(signs))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished set of 14 films of 128 px, drawn by one process."""
    out = tmp_path_factory.mktemp("phantoms") / "set"
    assert main([str(out), *SMALL, "--workers", "1"]) == 0
    return out


def test_each_film_is_drawn_from_its_row(small: Path) -> None:
    cases = make_cases(14, 3)
    for index, row in enumerate(read_metadata(small / "Data_Entry_2017_v2020.csv").table.to_dict("records")):
        signs = frozenset(name for name, there in zip(CLASSES, cases.signs[index], strict=True) if there)
        drawn = Case((3, 1, row["patient"]), (3, 2, index), row["age"], row["sex"], row["view"], signs)
        assert film_bytes(drawn, 128, 3, index) == (small / "images" / row["file"]).read_bytes()


@pytest.fixture(scope="module")
def full_size() -> list[bytes]:
    """Twelve grey films of 1024 px, as a set's own cases have them."""
    cases = make_cases(12, 5)
    films = []
    for index in range(12):
        signs = [name for name, there in zip(CLASSES, cases.signs[index], strict=True) if there]
        row = cases.table.iloc[index]
        films.append(film_bytes(case(*signs, film=index, sex=row["sex"], view=row["view"]), 1024, 0, index))
    return films


# ---- the files ----


@pytest.mark.films
def test_recipe_gives_back_the_idat_stream_of_real_films(films: list[Path]) -> None:
    if "ng" in zlib.ZLIB_RUNTIME_VERSION:
        pytest.skip("zlib-ng makes other streams than zlib")
    grey = [film for path in films if "reencoded" not in str(path) for film in [path.read_bytes()] if film[25] == 0]
    assert len(grey) >= 200
    for film in grey[::20]:
        again = png.encode_grey(np.asarray(Image.open(BytesIO(film))), TIME)
        assert idat(again) == idat(film)
        assert [kind for kind, _ in chunks(again)] == [kind for kind, _ in chunks(film)]
        assert [len(data) for _, data in chunks(again)] == [len(data) for _, data in chunks(film)]


@pytest.mark.films
def test_rgba_recipe_makes_the_filters_and_chunks_of_real_films(films: list[Path]) -> None:
    rgba = [film for path in films for film in [path.read_bytes()] if film[25] == 6]
    assert rgba
    for film in rgba:
        again = png.encode_rgba(np.asarray(Image.open(BytesIO(film)))[:, :, 0], TIME)
        assert np.array_equal(row_filters(again), row_filters(film))
        assert idat(again)[:2] == idat(film)[:2]
        assert abs(len(again) - len(film)) < 0.02 * len(film)  # the deflate of those files is not zlib's
        ours, theirs = ([(kind, len(data)) for kind, data in chunks(file)] for file in (again, film))
        assert ours[:-2] == theirs[: len(ours) - 2]  # all but the last IDAT, whose length differs


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40), st.booleans(), st.booleans())
def test_encoded_pixels_are_what_pillow_decodes(seed: int, height: int, width: int, rgba: bool, smooth: bool) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)
    if smooth:
        pixels = np.cumsum(pixels // 32, axis=1, dtype=np.uint8)
    image = Image.open(BytesIO((png.encode_rgba if rgba else png.encode_grey)(pixels, TIME)))
    assert image.mode == ("RGBA" if rgba else "L")
    assert np.array_equal(np.asarray(image.convert("L")), pixels)


def test_row_filter_is_the_one_with_the_least_absolute_sum() -> None:
    rows = np.array([[9, 9, 9, 9], [9, 9, 9, 9], [10, 20, 30, 40], [0, 0, 0, 0]], np.uint8)
    lines = png.filter_rows(rows)
    # constant first row: Sub leaves 9 0 0 0; the same again: Up leaves nothing, as Paeth would, which comes later;
    # a ramp: Paeth leaves 1 10 10 10, Sub 10s; zeros: None, the only filter that leaves nothing
    assert lines.tolist() == [[1, 9, 0, 0, 0], [2, 0, 0, 0, 0], [4, 1, 10, 10, 10], [0, 0, 0, 0, 0]]


def test_full_size_films_cost_what_real_ones_do(full_size: list[bytes]) -> None:
    assert abs(np.mean([len(film) for film in full_size]) - NIH_MEAN_NBYTES) < 0.25 * NIH_MEAN_NBYTES
    filters = np.bincount(np.concatenate([row_filters(film) for film in full_size]), minlength=5)
    share = filters / filters.sum()
    assert share[png.AVERAGE] + share[png.PAETH] > 0.8
    assert min(share[png.AVERAGE], share[png.PAETH]) > 0.1  # mixed, as NIH's are
    for film in full_size:
        kinds = [kind for kind, _ in chunks(film)]
        assert kinds[:2] == [b"IHDR", b"tIME"] and kinds[-1] == b"IEND" and set(kinds[2:-1]) == {b"IDAT"}
        lengths = [len(data) for kind, data in chunks(film) if kind == b"IDAT"]
        assert set(lengths[:-1]) == {8192} and lengths[-1] <= 8192
        assert idat(film)[:2] == b"\x78\x9c"
        assert Image.open(BytesIO(film)).size == (1024, 1024)


def test_one_film_of_a_hundred_is_rgba() -> None:
    for seed in (0, 1, 73):
        assert sum(is_rgba(seed, index) for index in range(17, 117)) == 1
    index = next(index for index in range(100) if is_rgba(0, index))
    image = Image.open(BytesIO(film_bytes(case(), 128, 0, index)))
    pixels = np.asarray(image)
    assert image.mode == "RGBA"
    assert (pixels[:, :, 3] == 255).all()
    assert (pixels[:, :, 0] == pixels[:, :, 1]).all() and (pixels[:, :, 0] == pixels[:, :, 2]).all()


# ---- the drawing ----


def test_every_class_has_a_sign_that_shows_at_64_pixels() -> None:
    assert set(SIGNS) == set(CLASSES)

    def small_film(*signs: str) -> np.ndarray:
        film = Image.fromarray(draw_film(case(*signs), 256)).resize((64, 64), Image.Resampling.BILINEAR)
        return np.asarray(film, np.float64)

    healthy = small_film()
    for name in CLASSES:
        changed = np.abs(small_film(name) - healthy)
        assert (changed > 25).sum() >= 10, name  # a tenth of the grey range, on ten or more of the 4096 pixels
        corners = np.concatenate([changed[:4, :4], changed[:4, -4:], changed[-4:, :4], changed[-4:, -4:]])
        assert corners.max() < 12, name  # and nothing is told beside the chest


def test_films_of_a_patient_are_alike_but_not_the_same() -> None:
    first, second = (draw_film(case(film=film), 128).astype(float) for film in (0, 1))
    assert not np.array_equal(first, second)
    assert np.corrcoef(first.ravel(), second.ravel())[0, 1] > 0.9


# ---- who has what ----


def test_label_frequencies_follow_nih_with_the_rarest_raised() -> None:
    cases = make_cases(4000, 2)
    share = cases.labels.mean(axis=0)
    assert np.abs(share - SHARES).max() < 0.03
    assert share.argmax() == CLASSES.index("Infiltration")
    assert share.min() > 0.04
    assert 0.35 < (~cases.labels.any(axis=1)).mean() < 0.6
    wrong = (cases.labels != cases.signs).sum() / cases.signs.sum()
    assert 0.005 < wrong < 0.08  # label noise: some, not much


@pytest.mark.parametrize("images", [100, 600])
@pytest.mark.parametrize("seed", [0, 1, 42])
def test_both_splits_have_every_class_on_both_sides(images: int, seed: int) -> None:
    cases = make_cases(images, seed)
    for test in (in_paper_test(cases.table["patient"].to_numpy()), cases.official_test):
        for side in (test, ~test):
            assert cases.labels[side].any(axis=0).all()
            assert not cases.labels[side].all(axis=0).any()


def test_metadata_lean_a_little() -> None:
    cases = make_cases(6000, 4)
    table = cases.table
    ap, age = (table["view"] == "AP").to_numpy(), table["age"].to_numpy()
    edema, hernia = (cases.labels[:, CLASSES.index(name)] for name in ("Edema", "Hernia"))
    assert ap[edema].mean() > ap[~edema].mean() + 0.1
    assert age[hernia].mean() > age[~hernia].mean() + 3
    assert 0.3 < ap.mean() < 0.55 and 0.5 < (table["sex"] == "M").mean() < 0.65
    assert (table.groupby("patient")["sex"].nunique() == 1).all()
    assert (table.groupby("patient")["age"].diff().dropna() >= 0).all()


# ---- the set ----


def test_set_has_nihs_layout(small: Path) -> None:
    text = (small / "Data_Entry_2017_v2020.csv").read_bytes().decode()
    header, first, *_ = text.split("\n")
    assert header == (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
    )
    assert "\r" not in text and text.endswith("\n") and first.startswith("00000001_000.png,") and first.count(",") == 10
    metadata = read_metadata(small / "Data_Entry_2017_v2020.csv")
    assert metadata.generation == "v2020" and not metadata.repairs
    table = metadata.table
    assert sorted(path.name for path in (small / "images").iterdir()) == sorted(table["file"])
    assert table["patient"].is_monotonic_increasing
    cases = make_cases(14, 3)
    assert np.array_equal(table[list(CLASSES)].to_numpy(bool), cases.labels)
    lists = [(small / name).read_text() for name in ("train_val_list.txt", "test_list.txt")]
    assert not any(text.endswith("\n") for text in lists)
    assert sorted("\n".join(lists).split("\n")) == sorted(table["file"])
    split = official_split(table, small / "train_val_list.txt", small / "test_list.txt")
    assert len(split.train) + len(split.test) == 14


def test_same_seed_same_bytes_whatever_the_workers(small: Path, tmp_path: Path) -> None:
    assert main([str(tmp_path / "again"), *SMALL, "--workers", "2"]) == 0
    assert content(tmp_path / "again") == content(small)
    other = [word if word != "3" else "4" for word in SMALL]
    assert main([str(tmp_path / "other"), *other, "--workers", "1"]) == 0
    assert content(tmp_path / "other") != content(small)


def test_killed_run_goes_on(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "set"
    code = "import sys; from cxrfast.cli.phantoms import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, str(out), *SMALL, "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(out.glob("images/0*.png"))) < 3 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = len(list(out.glob("images/0*.png")))
    assert 3 <= there < 14 and not (out / "Data_Entry_2017_v2020.csv").exists()
    cut = sorted(out.glob("images/0*.png"))[0]
    cut.write_bytes(cut.read_bytes()[:-100])  # a film that was damaged since is drawn again
    assert main([str(out), *SMALL, "--workers", "1"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["already_there"] == there - 1
    assert content(out) == content(small)


def test_finished_set_is_left_alone(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (small / "images").iterdir()}
    assert main([str(small), *SMALL]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["already_there"] == result["images"] == 14
    assert {path: path.stat().st_mtime_ns for path in (small / "images").iterdir()} == before


def test_unfinished_set_of_another_version_is_not_mixed(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    out.mkdir()
    record = json.loads((small / "phantoms.json").read_text()) | {"cxrfast": "other"}
    (out / "phantoms.json").write_text(json.dumps(record))
    assert main([str(out), *SMALL]) == 2
    (out / "Data_Entry_2017_v2020.csv").write_bytes((small / "Data_Entry_2017_v2020.csv").read_bytes())
    assert main([str(out), *SMALL, "--workers", "1"]) == 0  # finished once: it is only completed


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--images", "0"], "--images is 0"),
        (["--images", "-5"], "--images is -5"),
        (["--seed", "-1"], "--seed is -1"),
        (["--size", "0"], "--size is 0"),
        (["--workers", "0"], "--workers is 0"),
    ],
)
def test_options_out_of_range(
    options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "out"), *SMALL, *options]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_folders_of_others_are_refused(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(small)
    assert main([str(small), "--images", "15", "--seed", "3", "--size", "128"]) == 2
    assert "another set of phantoms" in capsys.readouterr().err
    assert content(small) == before

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("do not touch")
    assert main([str(mine), *SMALL]) == 2
    assert "not empty" in capsys.readouterr().err
    assert content(mine) == {"thesis.txt": b"do not touch"}

    assert main([str(mine / "thesis.txt"), *SMALL]) == 2
    assert "is a file" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    assert main([str(tmp_path / "out"), *SMALL]) == 2
    assert str(tmp_path) in capsys.readouterr().err
