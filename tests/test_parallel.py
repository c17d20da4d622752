"""What several processes rest on, as far as one process can see it; two of them train in test_train.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cxrfast.errors import InputError
from cxrfast.models import ChestNet
from cxrfast.parallel import SyncBatchNorm, World, launch, synchronise_norms


@given(st.integers(0, 1000), st.integers(1, 9))
def test_every_row_belongs_to_one_process(rows, processes):
    parts = []
    for rank in range(processes):
        world = World()
        world.rank, world.size = rank, processes
        parts.append(range(rows)[world.share(rows)])
    assert [row for part in parts for row in part] == list(range(rows))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_process_is_alone():
    world = World()
    assert world.is_first and world.any([True, False]) == [True, False] and world.agree({"a": 1}) == {"a": 1}
    tensor = torch.ones(3)
    total = world.sum(tensor)
    assert torch.equal(total, tensor) and total is not tensor


@pytest.mark.parametrize("training", [True, False])
def test_norm_over_all_processes(monkeypatch, training):
    """Two processes with the same rows are one with each row twice: so the sums are doubled here."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda sums: sums.mul_(2))
    torch.manual_seed(0)
    plain, sync = nn.BatchNorm2d(5).double(), SyncBatchNorm(5).double()
    with torch.no_grad():
        plain.weight.copy_(torch.randn(5))
    sync.load_state_dict(plain.state_dict())
    plain.train(training)
    sync.train(training)
    ours = torch.randn(3, 5, 4, 2).double().requires_grad_()
    twice = ours.detach().repeat(2, 1, 1, 1).requires_grad_()
    incoming = torch.randn(3, 5, 4, 2).double()
    out, expected = sync(ours), plain(twice)
    torch.testing.assert_close(out, expected[:3], rtol=1e-5, atol=1e-5)
    out.backward(incoming)
    expected.backward(incoming.repeat(2, 1, 1, 1))
    torch.testing.assert_close(ours.grad, twice.grad[:3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(2 * sync.weight.grad, plain.weight.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(2 * sync.bias.grad, plain.bias.grad, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(sync.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_synchronised_norms_keep_keys_and_values():
    net = ChestNet(16)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    synchronise_norms(net)
    assert sum(isinstance(module, SyncBatchNorm) for module in net.modules()) == 8
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_no_processes():
    with pytest.raises(InputError, match="--devices"):
        launch("cxrfast.cli.train", [], 0)
