"""The danger: a state that is half there, or not what it was. It must be noticed, and the one before must serve."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cxrfast.checkpoint import LATEST, PREVIOUS, load_checkpoint, load_tensors, save_checkpoint, save_tensors
from cxrfast.errors import InputError

TENSORS = {
    "weights": torch.arange(12.0).view(3, 4),
    "counts": torch.tensor([[1, 2**60]]),
    "step": torch.tensor(3.0),
    "strided": torch.arange(24.0).view(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
    "none": torch.zeros(0, 3),
}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name], expected[name])


def test_round_trip(tmp_path):
    save_tensors(tmp_path / "a.safetensors", TENSORS, {"epoch": 2, "value": 0.1 + 0.2, "none": None})
    tensors, state = load_tensors(tmp_path / "a.safetensors")
    assert_same(tensors, TENSORS)
    assert state == {"epoch": 2, "value": 0.1 + 0.2, "none": None}
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_none_yet(tmp_path):
    assert load_checkpoint(tmp_path / "absent") is None


def test_latest_and_previous(tmp_path):
    for number in range(3):
        save_checkpoint(tmp_path, TENSORS, {"number": number})
        assert load_checkpoint(tmp_path).state == {"number": number}
    assert sorted(os.listdir(tmp_path)) == [LATEST, PREVIOUS]
    assert load_tensors(tmp_path / PREVIOUS)[1] == {"number": 1}


@pytest.mark.parametrize("step", ["before the first rename", "between the renames"])
def test_killed_while_saving(tmp_path, step):
    save_checkpoint(tmp_path, TENSORS, {"number": 0})
    save_checkpoint(tmp_path, TENSORS, {"number": 1})
    save_tensors(tmp_path / "incoming.safetensors", TENSORS, {"number": 2})
    if step == "between the renames":
        os.replace(tmp_path / LATEST, tmp_path / PREVIOUS)
    assert load_checkpoint(tmp_path).state == {"number": 1}
    save_checkpoint(tmp_path, TENSORS, {"number": 3})
    assert load_checkpoint(tmp_path).state == {"number": 3}
    assert sorted(os.listdir(tmp_path)) == [LATEST, PREVIOUS]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damage_is_noticed_and_the_previous_serves(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damage")
    save_checkpoint(folder, TENSORS, {"number": 0})
    save_checkpoint(folder, TENSORS, {"number": 1})
    whole = (folder / LATEST).read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        damaged = whole[:at]
    else:
        damaged = whole[:at] + bytes([whole[at] ^ (1 << data.draw(st.integers(0, 7)))]) + whole[at + 1 :]
    (folder / LATEST).write_bytes(damaged)
    found = load_checkpoint(folder)
    assert_same(found.tensors, TENSORS)
    if found.path.name == PREVIOUS:
        assert found.state == {"number": 0} and LATEST in found.damage
    else:  # a bit of the header that carries nothing, such as its padding
        assert found.state == {"number": 1}


def test_no_state_is_whole(tmp_path):
    save_checkpoint(tmp_path, TENSORS, {})
    (tmp_path / LATEST).write_bytes((tmp_path / LATEST).read_bytes()[:-1])
    with pytest.raises(InputError, match="start again"):
        load_checkpoint(tmp_path)


def test_a_pickle_is_refused(tmp_path):
    torch.save(TENSORS, tmp_path / LATEST)
    with pytest.raises(InputError, match="cannot be read"):
        load_tensors(tmp_path / LATEST)
