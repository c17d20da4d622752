"""Films where the device can reach them: the same batches from every place, exact statistics, one order for all."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from training import make_store

from cxrfast.data import FilmData, Normalisation, available_memory, choose_placement, epoch_order, pixel_statistics
from cxrfast.errors import InputError, ResourceError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("data") / "store", count=40, size=18, unknown=True)


def test_statistics_are_those_of_the_pixels(store):
    rows = np.array([3, 4, 5, 20, 39])
    pixels = store.images[rows].astype(np.float64)
    found = pixel_statistics(store, rows)
    assert found.mean == pytest.approx(pixels.mean(), rel=1e-14)
    assert found.std == pytest.approx(pixels.std(), rel=1e-12)


def test_films_of_one_grey_are_refused(store):
    flat = type(store)(
        store.path, store.images, store.index.assign(pixel_sum=324 * 7, pixel_sumsq=324 * 49), store.manifest
    )
    with pytest.raises(InputError, match="same value"):
        pixel_statistics(flat, np.arange(40))


def test_order_is_a_permutation_of_seed_and_epoch():
    rows = np.array([5, 9, 2, 30, 31, 77, 4])
    one = epoch_order(rows, 0, 1)
    assert sorted(one.tolist()) == sorted(rows.tolist())
    assert torch.equal(one, epoch_order(rows, 0, 1))
    many = np.arange(100)
    orders = [epoch_order(many, seed, epoch) for seed in (0, 1) for epoch in (1, 2)]
    assert len({tuple(order.tolist()) for order in orders}) == 4


@pytest.mark.parametrize("placement", ["auto", "mmap", "device"])
@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_batches_are_the_rows_asked_for(store, placement, prefetch):
    data = FilmData(store, CPU, Normalisation(100.0, 50.0), (40.0, 10.0), placement, prefetch)
    wanted = [torch.tensor(rows) for rows in ([3, 1, 39], [0], [], [7, 7, 2, 5], [38, 20])]
    wanted[2] = wanted[2].long()
    found = list(data.batches(wanted))
    assert len(found) == len(wanted)
    for rows, batch in zip(wanted, found, strict=True):
        expected = (store.images[rows.numpy()][:, None].astype(np.float64) - 100) / 50
        np.testing.assert_allclose(batch.images.numpy(), expected, atol=1e-6)
        assert batch.images.dtype == torch.float32
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        np.testing.assert_array_equal(batch.targets.numpy(), store.targets[rows.numpy()])
        assert batch.metadata.shape == (len(rows), 5)
    assert data.wait_s > 0


def test_batches_may_be_left_early(store):
    data = FilmData(store, CPU, Normalisation(100.0, 50.0), (40.0, 10.0), "mmap", 2)
    batches = data.batches([torch.tensor([row]) for row in range(40)])
    next(batches)
    batches.close()  # the reading thread ends with it
    assert len(list(data.batches([torch.tensor([1])]))) == 1


def test_a_read_that_fails_is_raised(store):
    data = FilmData(store, CPU, Normalisation(100.0, 50.0), (40.0, 10.0), "mmap", 2)
    with pytest.raises(IndexError):
        list(data.batches([torch.tensor([1]), torch.tensor([40])]))


def test_the_place_is_chosen_and_said():
    assert choose_placement(1 << 20, CPU, "auto")[0] == "mmap"
    place, line = choose_placement(1 << 30, CPU, "device")
    assert place == "device" and "1.00 GiB" in line
    with pytest.raises(ResourceError, match="do not fit"):
        choose_placement(available_memory(), CPU, "device")
    with pytest.raises(InputError, match="for GPUs"):
        choose_placement(1 << 20, CPU, "pinned")


def test_wrong_options(store):
    with pytest.raises(InputError, match="--prefetch"):
        FilmData(store, CPU, Normalisation(1.0, 1.0), (0.0, 1.0), "auto", -1)
    with pytest.raises(InputError, match="--data"):
        FilmData(store, CPU, Normalisation(1.0, 1.0), (0.0, 1.0), "ram")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("placement", ["device", "pinned", "mmap"])
def test_batches_on_a_gpu(store, placement):
    host = FilmData(store, CPU, Normalisation(100.0, 50.0), (40.0, 10.0))
    data = FilmData(store, torch.device("cuda", 0), Normalisation(100.0, 50.0), (40.0, 10.0), placement)
    rows = [torch.randint(0, 40, (5,)) for _ in range(20)]
    for expected, found in zip(host.batches(rows), data.batches(rows), strict=True):
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(a, b.cpu(), equal_nan=True)
