"""Prep's dangers: a bad film that ends the run, a film that is lost, a kill that costs work, a store half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from helpers import content, csv_row, file_name, film, pillow_prepared, png, write_csv, write_films
from PIL import Image

from cxrfast.cli.prep import main
from cxrfast.decode import PIXEL_RULE, Decoded, Film, backends, pillow
from cxrfast.store import Entry, StoreWriter, open_store, verify_pixels

BACKENDS = [
    "pillow",
    pytest.param("native", marks=pytest.mark.skipif(bool(backends.missing("native")), reason="not built")),
]


def prep(*arguments: object) -> int:
    return main(["--workers", "1", *(str(argument) for argument in arguments)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_folder_to_store(tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str) -> None:
    write_films(tmp_path / "films", 20)
    assert prep(tmp_path / "films", tmp_path / "store", "--size", 32, "--backend", backend) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (printed["images"], printed["ok"], printed["rejected"], printed["backend"]) == (20, 20, 0, backend)
    store = open_store(tmp_path / "store")
    verify_pixels(store)
    assert store.manifest["csv_generation"] == "v2020"
    for row, name in enumerate(store.index["file"]):
        expected = pillow_prepared((tmp_path / "films" / "images" / name).read_bytes(), 32)
        assert np.array_equal(store.images[row], expected)
        assert store.index["pixel_sum"][row] == expected.astype(int).sum()
        assert store.index["pixel_sumsq"][row] == (expected.astype(int) ** 2).sum()


def spoil(images: Path) -> dict[str, str]:
    """Seven broken films and three odd ones; film → the reason that its ledger row must begin with."""
    good = png(film(0))
    idat = good.index(b"IDAT")
    flipped = bytearray(good)
    flipped[idat + 40] ^= 0x10
    wrong_crc = bytearray(good)
    wrong_crc[-16] ^= 0xFF  # the last byte of IDAT's CRC: Pillow alone lets it pass
    huge = bytearray(good)
    huge[16:24] = (60_000).to_bytes(4, "big") * 2
    huge[29:33] = zlib.crc32(bytes(huge[12:29])).to_bytes(4, "big")
    bad = {
        0: (good[: len(good) // 2], "corrupt: truncated chunk"),
        1: (bytes(flipped), "corrupt: CRC-32 mismatch in IDAT"),
        2: (bytes(wrong_crc), "corrupt: CRC-32 mismatch in IDAT"),
        3: (b"this is not a film", "unsupported: not a PNG file"),
        4: (b"", "corrupt: empty file"),
        5: (bytes(huge), "too_large: more than the pixel limit"),
        6: (good[: idat - 4] + good[-12:], "corrupt: no IDAT chunk"),
    }
    for index, (data, _) in bad.items():
        (images / file_name(index)).write_bytes(data)
    return {file_name(index): reason for index, (_, reason) in bad.items()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_films_are_in_the_ledger_and_stop_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str
) -> None:
    films = write_films(tmp_path / "films", 20)
    reasons = spoil(films / "images")
    (films / "images" / "stray_000.png").write_bytes(png(film(1)))
    (films / "images" / file_name(7)).unlink()
    write_csv(films / "Data_Entry_2017_v2020.csv", 21)
    reasons |= {"stray_000.png": "not in the CSV", file_name(7): "not on the disk", file_name(20): "not on the disk"}

    assert prep(films, tmp_path / "store", "--size", 16, "--backend", backend, "--strict") == 1
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["films"] == 22 and printed["rejected"] == len(reasons) == 10
    assert printed["rejected_by_reason"] == {
        "corrupt": 5,
        "not in the CSV": 1,
        "not on the disk": 2,
        "too_large": 1,
        "unsupported": 1,
    }
    store = open_store(tmp_path / "store")
    ledger = store.ledger().set_index("file")
    assert ledger.index.is_unique and len(ledger) == 22
    rejected = ledger[ledger["outcome"] == "rejected"]["reason"].to_dict()
    assert rejected.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert rejected[name].startswith(reason), (name, rejected[name])
    assert set(store.index["file"]) == {name for name, outcome in ledger["outcome"].items() if outcome == "ok"}


@pytest.mark.skipif(bool(backends.missing("native")), reason="not built")
def test_both_backends_write_the_same_store(tmp_path: Path) -> None:
    films = write_films(tmp_path / "films", 20)
    spoil(films / "images")
    Image.fromarray(film(3)).save(films / "images" / file_name(8), "JPEG")
    for backend in ("pillow", "native"):
        assert prep(films, tmp_path / backend, "--size", 16, "--backend", backend) == 0
    pillow, native = content(tmp_path / "pillow"), content(tmp_path / "native")
    assert {name for name in pillow if pillow[name] != native[name]} == {"manifest.json"}


def test_a_jpeg_is_prepared(tmp_path: Path) -> None:
    films = write_films(tmp_path / "films", 3)
    Image.fromarray(film(9)).save(films / "images" / file_name(1), "JPEG")
    assert prep(films, tmp_path / "store", "--size", 16) == 0
    expected = pillow_prepared((films / "images" / file_name(1)).read_bytes(), 16)
    assert np.array_equal(open_store(tmp_path / "store").images[1], expected)


@pytest.mark.parametrize("layout", ["flat", "kaggle", "linked"])
def test_every_layout(tmp_path: Path, layout: str) -> None:
    films = write_films(tmp_path / "films", 6)
    images = films / "images"
    if layout == "kaggle":
        for index in range(6):
            folder = films / f"images_{index // 2 + 1:03d}" / "images"
            folder.mkdir(parents=True, exist_ok=True)
            (images / file_name(index)).rename(folder / file_name(index))
        images.rmdir()
    elif layout == "linked":
        images.rename(tmp_path / "elsewhere")
        images.symlink_to(tmp_path / "elsewhere")
        (tmp_path / "elsewhere" / "back").symlink_to(films)  # a cycle
    (films / "._00000001_000.png").write_bytes(b"a macOS leftover")
    assert prep(films, tmp_path / "store", "--size", 16) == 0
    assert list(open_store(tmp_path / "store").index["file"]) == [file_name(index) for index in range(6)]


def test_ages_that_cannot_be_are_repaired_and_said(tmp_path: Path) -> None:
    films = write_films(tmp_path / "films", 6)
    csv = films / "Data_Entry_2017_v2020.csv"
    csv.write_text(csv.read_text().replace(f"{csv_row(2)}", csv_row(2).replace(",1,20,", ",1,414,")))
    assert prep(films, tmp_path / "store", "--size", 16) == 0
    store = open_store(tmp_path / "store")
    assert np.isnan(store.index["age"][2])
    assert store.manifest["counts"]["repaired"] == 1 and store.manifest["csv_repairs"] == {"age": 1}
    assert store.ledger().iloc[2].tolist()[:2] == [file_name(2), "repaired"]
    assert "414" in store.ledger().iloc[2]["reason"]


def test_repeated_on_a_finished_store_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    films = write_films(tmp_path / "films", 6)
    assert prep(films, tmp_path / "store", "--size", 16) == 0
    before = content(tmp_path / "store")
    capsys.readouterr()
    assert prep(films, tmp_path / "store", "--size", 16) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["decoded_now"] == 0
    assert content(tmp_path / "store") == before


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_killed_and_repeated_until_done(tmp_path: Path, backend: str) -> None:
    """SIGKILL as soon as the journal has grown; the same command, repeated, ends with an undisturbed run's bytes."""
    films = write_films(tmp_path / "films", 12, side=1024)
    originals = sorted((films / "images").iterdir())
    count = 160 if backend == "pillow" else 800
    for index in range(12, count):
        os.link(originals[index % 12], films / "images" / file_name(index))
    write_csv(films / "Data_Entry_2017_v2020.csv", count)
    command = [sys.executable, "-m", "cxrfast.cli.prep", films, "--size", "64", "--backend", backend, "--workers", "1"]
    subprocess.run([*command, tmp_path / "undisturbed"], check=True, capture_output=True)

    kills, store, ended = 0, tmp_path / "store", False
    while not ended:  # a kill may come when the store is finished and nothing has been said yet
        before = journal_nbytes(store)
        process = subprocess.Popen([*command, store], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        while process.poll() is None and (kills >= 3 or journal_nbytes(store) <= max(before, 500)):
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        printed = process.communicate()[0]
        ended = process.returncode == 0
        assert ended or process.returncode == -signal.SIGKILL
    assert kills >= 1, "the kills came too late to show anything"
    assert json.loads(printed.splitlines()[-1])["decoded_now"] < count
    assert content(store) == content(tmp_path / "undisturbed")


def journal_nbytes(store: Path) -> int:
    journal = store / "journal.jsonl"
    return journal.stat().st_size if journal.exists() else 0


@pytest.mark.films
@pytest.mark.parametrize("backend", BACKENDS)
def test_real_films_are_pixel_identical_to_pillow(data: Path, tmp_path: Path, backend: str) -> None:
    csv = data / "nih" / "metadata" / "Data_Entry_2017_v2020.csv"
    assert main([str(data / "nih" / "images"), str(tmp_path / "store"), "--csv", str(csv), "--backend", backend]) == 0
    store = open_store(tmp_path / "store")
    assert len(store) == 203 and store.size == 224
    modes = set()
    for row, name in enumerate(store.index["file"]):
        path = data / "nih" / "images" / name
        modes.add(Image.open(path).mode)
        assert np.array_equal(store.images[row], pillow_prepared(path.read_bytes(), 224)), name
    assert modes == {"L", "RGBA"}
    assert store.manifest["counts"]["films"] == 112_120


class SlowStore(StoreWriter):
    """A disk that is slower than the decoder."""

    def append(self, entries: list[Entry], images: np.ndarray) -> None:
        time.sleep(0.005)
        super().append(entries, images)


class CountingDecoder:
    """The Pillow decoder without processes; counts the arrays that it was given to decode into."""

    name, pixel_rule, calls, batch_films = "pillow", PIXEL_RULE, 3, 5

    def __init__(self) -> None:
        self.arrays: set[int] = set()

    def __enter__(self) -> CountingDecoder:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def decode_resize(self, films: Sequence[Film], size: int, out: np.ndarray | None = None) -> Decoded:
        assert out is not None
        self.arrays.add(out.ctypes.data)
        decoded = [pillow.decode_one(film, size) for film in films]
        out[:] = [image for _, image in decoded]
        sums = np.array([pillow.pixel_sums(image) for image in out])
        return Decoded(out, [status for status, _ in decoded], sums[:, 0], sums[:, 1])


@pytest.mark.parametrize(("ahead_nbytes", "batches"), [(1, 3), (16 * 16 * 5 * 8, 8)])
def test_a_slow_disk_costs_no_memory_and_no_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead_nbytes: int, batches: int
) -> None:
    """What is decoded ahead is bounded, and no image is overwritten before it is written."""
    films = write_films(tmp_path / "films", 103)
    monkeypatch.setattr("cxrfast.prep.choose_decoder", lambda *_: (decoder, "for the test"))
    decoder = CountingDecoder()
    assert prep(films, tmp_path / "undisturbed", "--size", 16) == 0
    decoder = CountingDecoder()
    monkeypatch.setattr("cxrfast.prep.StoreWriter", SlowStore)
    monkeypatch.setattr("cxrfast.prep._AHEAD_NBYTES", ahead_nbytes)
    assert prep(films, tmp_path / "store", "--size", 16) == 0
    assert content(tmp_path / "store") == content(tmp_path / "undisturbed")
    assert len(decoder.arrays) <= batches + 1  # the one being written


# ---- wrong input: one sentence, exit code 2, nothing left behind ----


def two_of_one_name(films: Path) -> None:
    (films / "copy").mkdir()
    shutil.copy(films / "images" / file_name(0), films / "copy")


def another_data_sets_csv(films: Path) -> None:
    (films / "Data_Entry_2017_v2020.csv").write_text("dicom_id,subject_id,ViewPosition\nabc,1,PA\n")


def csv_without_a_column(films: Path) -> None:
    csv = films / "Data_Entry_2017_v2020.csv"
    csv.write_text(csv.read_text().replace("Patient Age", "Patient Shoe Size", 1))


def csv_of_other_films(films: Path) -> None:
    csv = films / "Data_Entry_2017_v2020.csv"
    csv.write_text(csv.read_text().replace("_00", "_10"))


WRONG_FILMS = [
    (lambda films: shutil.rmtree(films / "images"), [], "holds no film"),
    (lambda films: shutil.rmtree(films), [], "is not a folder"),
    (two_of_one_name, [], "two films have the name 00000001_000.png"),
    (another_data_sets_csv, [], "no metadata CSV"),
    (another_data_sets_csv, ["--csv", "{films}/Data_Entry_2017_v2020.csv"], "is not ChestX-ray14's metadata"),
    (csv_without_a_column, [], "lacks the column Patient Age"),
    (csv_of_other_films, [], "none of the 6 films"),
    (lambda films: None, ["--csv", "{films}/nowhere.csv"], "cannot be read"),
    (lambda films: None, ["--size", "0"], "--size 0 is out of range"),
    (lambda films: None, ["--workers", "-1"], "--workers -1 is negative"),
    (lambda films: write_csv(films / "other.csv", 6), [], "choose one with --csv"),
]


@pytest.mark.parametrize(("change", "options", "said"), WRONG_FILMS)
def test_wrong_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], change, options: list[str], said: str) -> None:
    films = write_films(tmp_path / "films", 6)
    change(films)
    options = [option.format(films=films) for option in options]
    assert prep(films, tmp_path / "store", *options) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and error.startswith("cxrfast-prep: ") and "\n" not in error
    assert not (tmp_path / "store").exists()


def test_a_store_as_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    films = write_films(tmp_path / "films", 3)
    assert prep(films, tmp_path / "store", "--size", 16) == 0
    assert prep(tmp_path / "store", tmp_path / "again") == 2
    assert "is a store" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("kind", ["below a file", "is a file", "holds the films", "holds other files"])
def test_unusable_output(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    films = write_films(tmp_path / "films", 3)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    store = {
        "below a file": tmp_path / "file" / "store",
        "is a file": tmp_path / "file",
        "holds the films": films,
        "holds other files": tmp_path / "folder",
    }[kind]
    before = sorted(tmp_path.rglob("*"))
    assert prep(films, store) == 2
    error = capsys.readouterr().err.strip()
    assert str(store) in error and "\n" not in error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_store_of_another_size_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    films = write_films(tmp_path / "films", 3)
    assert prep(films, tmp_path / "store", "--size", 16) == 0
    before = content(tmp_path / "store")
    assert prep(films, tmp_path / "store", "--size", 32) == 2
    assert "begun with another size (16, now 32)" in capsys.readouterr().err
    assert content(tmp_path / "store") == before


def test_a_full_disk_is_a_resource_error_and_resumable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file-size limit stands in for the full disk: the write fails in the same place."""
    pytest.importorskip("resource")
    films = write_films(tmp_path / "films", 60)
    assert prep(films, tmp_path / "undisturbed", "--size", 64) == 0
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY));"
        "from cxrfast.cli.prep import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, str(films), str(tmp_path / "store"), "--size", "64", "--workers", "1"]
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 3, failed.stderr
    assert "repeat the command" in failed.stderr and "Traceback" not in failed.stderr
    assert prep(films, tmp_path / "store", "--size", 64) == 0
    assert content(tmp_path / "store") == content(tmp_path / "undisturbed")
