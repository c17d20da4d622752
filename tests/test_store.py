"""The store's dangers: a writer killed at any byte, two writers, files changed afterwards, files that do not fit."""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import content
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrfast.errors import InputError
from cxrfast.nih import CLASSES
from cxrfast.store import INDEX_COLUMNS, Entry, StoreWriter, open_store, verify_pixels

SIZE = 9
IDENTITY = {"size": SIZE, "pixel_rule": "pillow-bilinear", "sources_digest": "ab", "csv_digest": "cd"}
COUNT = 12


def image(row: int) -> np.ndarray:
    return np.random.default_rng(row).integers(0, 256, (SIZE, SIZE), np.uint8)


def entry(row: int) -> Entry:
    if row % 5 == 3:
        return Entry(f"{row:04d}.png", "rejected", "corrupt: truncated chunk at byte 7")
    pixels = image(row)
    wide = pixels.astype(np.int64)
    sums = int(wide.sum()), int((wide**2).sum())
    return Entry(f"{row:04d}.png", "ok", "", *sums, f"{zlib.crc32(pixels.tobytes()):08x}")


def append(writer: StoreWriter, rows: range) -> None:
    entries = [entry(row) for row in rows]
    images = [image(row) for row, one in zip(rows, entries, strict=True) if one.accepted]
    writer.append(entries, np.array(images, np.uint8).reshape(-1, SIZE, SIZE))


def table() -> pd.DataFrame:
    files = [entry(row).file for row in range(COUNT) if entry(row).accepted]
    labels = {name: [np.nan if i == 0 else float(i % 2) for i in range(len(files))] for name in CLASSES}
    return pd.DataFrame(
        {"file": files, "patient": range(len(files)), "age": [np.nan, 1 / 12, *[50.0] * (len(files) - 2)]}
        | {"sex": ["", "M"] + ["F"] * (len(files) - 2), "view": "PA", "follow_up": 0.0}
        | labels
    )


def finish(writer: StoreWriter) -> None:
    writer.finish(table(), [Entry("9999.png", "rejected", "not on the disk")], {"csv_generation": "v2020"})


def write(path: Path, batch: int = 5, expected: int = COUNT) -> Path:
    with StoreWriter(path, SIZE, IDENTITY, "pillow", expected) as writer:
        for first in range(len(writer.entries), COUNT, batch):
            append(writer, range(first, min(first + batch, COUNT)))
            writer.sync()
        finish(writer)
    return path


@pytest.fixture
def undisturbed(tmp_path: Path) -> Path:
    return write(tmp_path / "undisturbed")


def test_what_was_written_is_read(undisturbed: Path) -> None:
    store = open_store(undisturbed)
    accepted = [row for row in range(COUNT) if entry(row).accepted]
    assert np.array_equal(store.images, [image(row) for row in accepted])
    assert np.array_equal(np.load(undisturbed / "images.npy"), store.images)
    assert list(store.index.columns) == list(INDEX_COLUMNS)
    assert list(store.index["file"]) == [entry(row).file for row in accepted]
    assert np.isnan(store.targets[0]).all() and set(store.targets[1:].ravel()) == {0.0, 1.0}
    assert np.isnan(store.index["age"][0]) and store.index["age"][1] == 1 / 12
    assert list(store.index["sex"][:3]) == ["", "M", "F"]
    assert store.index["pixel_sum"][0] == image(0).astype(int).sum()
    assert (store.size, store.pixel_rule, len(store)) == (SIZE, "pillow-bilinear", len(accepted))
    verify_pixels(store)
    ledger = store.ledger()
    assert len(ledger) == COUNT + 1 and ledger["file"].is_unique
    counts = store.manifest["counts"]
    assert counts["films"] == counts["ok"] + counts["repaired"] + counts["rejected"] == COUNT + 1
    assert store.manifest["rejected"] == {"corrupt": 2, "not on the disk": 1}
    assert sorted(content(undisturbed)) == ["images.npy", "index.csv", "ledger.csv", "manifest.json"]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_killed_anywhere_and_gone_on_gives_the_same_bytes(tmp_path_factory: pytest.TempPathFactory, data) -> None:
    """A kill leaves every synced journal line, and any part of what came after; pixels at least as far."""
    folder = tmp_path_factory.mktemp("killed")
    expected = content(write(folder / "undisturbed"))
    synced = data.draw(st.integers(0, COUNT), "films synced")
    more = data.draw(st.integers(0, COUNT - synced), "films in flight")
    with StoreWriter(folder / "store", SIZE, IDENTITY, "pillow") as writer:
        append(writer, range(synced))
        writer.sync()
        journal = (folder / "store" / "journal.jsonl").read_bytes()
        append(writer, range(synced, synced + more))
    whole = (folder / "store" / "journal.jsonl").read_bytes()
    cut = data.draw(st.integers(len(journal), len(whole)), "journal bytes that reached the disk")
    (folder / "store" / "journal.jsonl").write_bytes(whole[:cut])
    write(folder / "store", batch=data.draw(st.integers(1, 5)))
    assert content(folder / "store") == expected
    shutil.rmtree(folder)


def test_killed_while_finishing(tmp_path: Path, undisturbed: Path) -> None:
    """Between the renaming of the pixels and the manifest, the store goes on being unfinished, and is finished."""
    with StoreWriter(tmp_path / "store", SIZE, IDENTITY, "pillow") as writer:
        append(writer, range(COUNT))
    (tmp_path / "store" / "images.npy.part").rename(tmp_path / "store" / "images.npy")
    with pytest.raises(InputError, match="unfinished"):
        open_store(tmp_path / "store")
    assert content(write(tmp_path / "store")) == content(undisturbed)


@pytest.mark.parametrize(
    "expected", [0, COUNT - 2, COUNT, COUNT + 2], ids=["none", "right", "too many", "far too many"]
)
def test_checksums_are_those_of_the_files(tmp_path: Path, expected: int) -> None:
    """Whether the pixels' checksum was made on the way (two of the films are rejected), read back, or after a kill."""
    with StoreWriter(tmp_path / "resumed", SIZE, IDENTITY, "pillow", expected) as writer:
        append(writer, range(3))
    for path in (write(tmp_path / "at once", expected=expected), write(tmp_path / "resumed", expected=expected)):
        files = content(path)
        checksums = json.loads(files.pop("manifest.json"))["sha256"]
        assert checksums == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def test_a_finished_store_is_left_alone(undisturbed: Path) -> None:
    before = content(undisturbed)
    with StoreWriter(undisturbed, SIZE, IDENTITY, "pillow") as writer:
        assert writer.finished
    assert content(undisturbed) == before


@pytest.mark.parametrize("key", sorted(IDENTITY))
@pytest.mark.parametrize("finished", [True, False])
def test_another_identity_is_refused(tmp_path: Path, key: str, finished: bool) -> None:
    path = tmp_path / "store"
    if finished:
        write(path)
    else:
        with StoreWriter(path, SIZE, IDENTITY, "pillow") as writer:
            append(writer, range(3))
    before = content(path)
    with pytest.raises(InputError, match=f"begun with another {key.replace('_', ' ')}"):
        StoreWriter(path, SIZE, {**IDENTITY, key: "other"}, "pillow")
    assert content(path) == before


def test_every_backend_that_took_part_is_named(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "store", SIZE, IDENTITY, "pillow") as writer:
        append(writer, range(3))
    with StoreWriter(tmp_path / "store", SIZE, IDENTITY, "native") as writer:
        append(writer, range(3, COUNT))
        finish(writer)
    assert open_store(tmp_path / "store").manifest["backend"] == "pillow+native"


def test_two_writers(tmp_path: Path) -> None:
    with (
        StoreWriter(tmp_path / "store", SIZE, IDENTITY, "pillow"),
        pytest.raises(InputError, match="another cxrfast-prep"),
    ):
        StoreWriter(tmp_path / "store", SIZE, IDENTITY, "pillow")


def test_other_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds other files"):
        StoreWriter(tmp_path, SIZE, IDENTITY, "pillow")
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_images_must_match_the_entries(tmp_path: Path) -> None:
    with (
        StoreWriter(tmp_path / "store", SIZE, IDENTITY, "pillow") as writer,
        pytest.raises(ValueError, match="one for"),
    ):
        writer.append([entry(0), entry(1)], image(0)[None])


def test_pixels_shorter_than_the_journal_says(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "store", SIZE, IDENTITY, "pillow") as writer:
        append(writer, range(4))
    with open(tmp_path / "store" / "images.npy.part", "r+b") as file:
        file.truncate(200)
    with pytest.raises(InputError, match="shorter than its journal"):
        StoreWriter(tmp_path / "store", SIZE, IDENTITY, "pillow")


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("index.csv", lambda data: data.replace(b"PA", b"AP", 1), "was changed"),
        ("ledger.csv", lambda data: data[:-3], "was changed"),
        ("images.npy", lambda data: data[:-1], "cannot be read"),
        ("images.npy", lambda data: np.lib.format.magic(1, 0) + data[8:].replace(b"|u1", b"|i1"), "damaged"),
        ("manifest.json", lambda data: data[:40], "cannot be read"),
        ("manifest.json", lambda data: data.replace(b'"format": 1', b'"format": 7'), "format 7"),
        ("manifest.json", lambda data: data.replace(b"Mass", b"Moss"), "class order"),
    ],
)
def test_a_store_changed_afterwards_is_refused(undisturbed: Path, name: str, change, said: str) -> None:
    path = undisturbed / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match=said):
        open_store(undisturbed)


def test_a_changed_pixel_is_found(undisturbed: Path) -> None:
    with open(undisturbed / "images.npy", "r+b") as file:
        file.seek(128 + 2 * SIZE * SIZE)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(InputError, match=r"0002\.png"):
        verify_pixels(open_store(undisturbed))


def test_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a store"):
        open_store(tmp_path)


def test_manifest_is_json_that_anybody_can_read(undisturbed: Path) -> None:
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    assert manifest["classes"] == list(CLASSES)
    assert {"format", "size", "pixel_rule", "backend", "counts", "sha256", "digest"} <= manifest.keys()
