"""The networks are the paper's: held to its plain form, value for value and gradient for gradient."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cxrfast import block
from cxrfast.errors import InputError
from cxrfast.models import (
    ChestNet,
    Dropout,
    Noise,
    age_statistics,
    encode_metadata,
    load_weights,
    mix_seed,
)
from cxrfast.reference import PaperNet


@pytest.mark.parametrize(
    ("model", "head", "parameters"),
    [
        ("cnn", "flatten", 14_021_550),
        ("multimodal", "flatten", 14_022_190),
        ("cnn", "gap", 1_242_030),
        ("multimodal", "gap", 1_242_670),
    ],
)
def test_parameters_at_224_pixels(model, head, parameters):
    with torch.device("meta"):  # shapes alone, no weights
        net, paper = ChestNet(224, model, head), PaperNet(224, model, head)
    assert sum(p.numel() for p in net.parameters()) == parameters
    # The paper's form has a bias in each of its eight convolutions, which the batch norm behind it takes away again.
    assert sum(p.numel() for p in paper.parameters()) == parameters + 2 * (32 + 64 + 128 + 256)


@pytest.mark.parametrize("size", [16, 17, 33, 48])
@pytest.mark.parametrize("model", ["cnn", "multimodal"])
@pytest.mark.parametrize("head", ["flatten", "gap"])
@pytest.mark.parametrize("way", ["plain", "fused"])
def test_is_the_papers_network(size, model, head, way):
    """In float64 the plain layers, in float32 the compiled passes."""
    # A ReLU or a pool whose input is nearly a tie falls the other way in float32, and takes its gradient along.
    dtype, tolerance, for_gradients = (torch.float64, 1e-9, 1e-9) if way == "plain" else (torch.float32, 2e-4, 0.03)
    if way == "fused" and block.MISSING["cpu"]:
        pytest.skip(block.MISSING["cpu"])
    torch.manual_seed(size)
    paper = PaperNet(size, model, head).double()
    net = ChestNet(size, model, head).double()
    paper.copy_to(net)
    net.to(dtype).to(memory_format=torch.channels_last)
    noise = Noise(0).draw(0, net.noise_shapes(), slice(0, 3), 3)
    for module in (*paper.modules(), *net.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(module, Dropout):
            module.threshold = 0
    images, metadata = torch.randn(3, 1, size, size).double(), torch.randn(3, 5).double()

    def assert_close(found, expected, tolerance=tolerance):
        scale = expected.detach().abs().max().item()
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance * max(1.0, scale))

    for _ in range(2):  # the second step sees what the first has left in the running statistics
        expected, found = paper(images, metadata), net(images.to(dtype), metadata.to(dtype), noise)
        assert_close(found, expected)
        paper.zero_grad()
        net.zero_grad()
        expected.square().sum().backward()
        found.square().sum().backward()
    grads = {name: p.grad for name, p in net.named_parameters()}
    for name, p in paper.named_parameters():
        if name in grads:
            assert_close(grads[name], p.grad, for_gradients)
        else:
            assert name.endswith("bias") and p.grad.abs().max() < 1e-9  # a bias that nothing depends on
    assert_close(net.eval()(images.to(dtype), metadata.to(dtype)), paper.eval()(images, metadata))
    for name, buffer in net.named_buffers():
        assert buffer.dtype == torch.int64 or buffer.isfinite().all(), name


def test_multimodal_sees_the_metadata_and_cnn_does_not():
    images, one, other = torch.randn(2, 1, 16, 16), torch.zeros(2, 5), torch.ones(2, 5)
    cnn, multimodal = ChestNet(16).eval(), ChestNet(16, "multimodal").eval()
    assert torch.equal(cnn(images, one), cnn(images))
    assert not torch.allclose(multimodal(images, one), multimodal(images, other))
    with pytest.raises(ValueError, match="needs metadata"):
        multimodal(images)


@pytest.mark.parametrize(
    ("arguments", "words"), [((15,), "16 pixels"), ((32, "vit"), "cnn, multi"), ((32, "cnn", "x"), "gap")]
)
def test_what_there_is_not(arguments, words):
    with pytest.raises(InputError, match=words):
        ChestNet(*arguments)


@pytest.mark.parametrize(("size", "model"), [(16, "cnn"), (50, "multimodal")])
def test_flops_are_those_that_torch_counts(size, model):
    net, images, metadata = ChestNet(size, model), torch.randn(2, 1, size, size), torch.randn(2, 5)
    with FlopCounterMode(display=False) as counter:
        logits = net(images, metadata)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        logits.sum().backward()
    assert net.flops_per_image(training=False) * 2 == forward
    backward = net.flops_per_image(training=True) * 2 - forward
    if model == "multimodal":  # metadata needs no gradient either; torch leaves that product out
        backward -= 2 * 2 * 5 * 32
    assert backward == counter.get_total_flops()


class TestDropout:
    def drop(self, x: torch.Tensor, seed: int = 0, step: int = 0, rows: slice | None = None) -> torch.Tensor:
        """What dropout makes of rows of ``x``, all if not given."""
        own = rows or slice(0, len(x))
        (noise,) = Noise(seed).draw(step, [x.shape[1:]], own, len(x))
        return Dropout()(x[own], noise)

    def test_drops_a_quarter_and_keeps_the_mean(self):
        out = self.drop(torch.ones(8, 64, 50, 50))
        assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
        assert abs((out == 0).float().mean().item() - 0.25) < 0.002  # five standard deviations of 1.28 M draws
        # each of the eight bytes of a word is as random as the others
        assert ((out == 0).float().reshape(-1, 8).mean(0) - 0.25).abs().max() < 0.006

    def test_is_a_function_of_seed_and_step(self):
        x = torch.ones(8, 4, 6, 6)
        assert torch.equal(self.drop(x, 1, 5), self.drop(x, 1, 5))
        assert not torch.equal(self.drop(x, 1, 5), self.drop(x, 1, 6))
        assert not torch.equal(self.drop(x, 1, 5), self.drop(x, 2, 5))
        one, other = Noise(1).draw(5, [(4, 6, 6)] * 2, slice(0, 8), 8)
        assert not torch.equal(one, other)  # two layers of one step differ

    def test_does_not_depend_on_what_was_drawn_before_and_stays_in_its_place(self):
        noise, shapes = Noise(3), [(4, 6, 6), (11,)]
        first = noise.draw(1, shapes, slice(0, 8), 8)
        places, values = [t.data_ptr() for t in first], [t.clone() for t in first]
        short = noise.draw(2, shapes, slice(0, 3), 3)
        assert all(torch.equal(a, b) for a, b in zip(short, Noise(3).draw(2, shapes, slice(0, 3), 3), strict=True))
        again = noise.draw(1, shapes, slice(0, 8), 8)
        assert [t.data_ptr() for t in again] == places
        assert all(torch.equal(a, b) for a, b in zip(again, values, strict=True))

    @pytest.mark.parametrize("shape", [(7, 3, 5, 5), (7, 11)])
    def test_rows_of_a_share_are_rows_of_the_whole(self, shape):
        x = torch.ones(shape)
        whole = self.drop(x)
        for first, stop in ((0, 3), (3, 7), (7, 7)):
            assert torch.equal(self.drop(x, rows=slice(first, stop)), whole[first:stop])

    def test_does_not_depend_on_the_memory_format(self):
        x = torch.randn(8, 4, 6, 6)
        assert torch.equal(self.drop(x), self.drop(x.contiguous(memory_format=torch.channels_last)))

    def test_gradient_is_the_mask(self):
        x = torch.randn(8, 4, 6, 6, requires_grad=True)
        out = self.drop(x)
        out.sum().backward()
        torch.testing.assert_close(x.grad, torch.where(out == 0, 0.0, 1 / 0.75))

    def test_evaluation_changes_nothing(self):
        x = torch.randn(8, 4)
        assert torch.equal(Dropout().eval()(x), x)


def test_seeds_differ():
    seeds = {mix_seed(a, b) for a in range(30) for b in range(30)} | {mix_seed(a) for a in range(30)}
    assert len(seeds) == 930
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_weights_must_match_key_for_key():
    net, right = ChestNet(16), ChestNet(16).state_dict()
    key = "blocks.0.conv1.weight"
    load_weights(net, right, "F")
    assert torch.equal(net.state_dict()[key], right[key])
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    wrong = {
        "lacks": {name: tensor for name, tensor in right.items() if name != key},
        "has not": right | {"extra": torch.zeros(1)},
        "needs torch.float32": right | {key: right[key].half()},
        r"needs torch.float32 \(32, 1, 3, 3\)": right | {key: right[key][:1]},
    }
    for words, weights in wrong.items():
        with pytest.raises(InputError, match=f"(?s)F.*{words}"):
            load_weights(net, weights, "F")
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_metadata_encoding():
    table = pd.DataFrame(
        {"age": [30.0, 50.0, np.nan, 70.0], "sex": ["M", "F", "", "M"], "view": ["PA", "AP", "PA", ""]}
    )
    mean, std = age_statistics(table["age"])
    assert mean == 50.0 and std == pytest.approx(np.std([30, 50, 70]))
    expected = [[-20 / std, 1, 0, 1, 0], [0, 0, 1, 0, 1], [0, 0, 0, 1, 0], [20 / std, 1, 0, 0, 0]]
    np.testing.assert_allclose(encode_metadata(table, mean, std), np.float32(expected))
    assert encode_metadata(table, mean, std).dtype == np.float32


@pytest.mark.parametrize(("ages", "expected"), [([], (0.0, 1.0)), ([np.nan], (0.0, 1.0)), ([40.0, 40.0], (40.0, 1.0))])
def test_ages_without_a_spread(ages, expected):
    assert age_statistics(pd.Series(ages, dtype=float)) == expected
