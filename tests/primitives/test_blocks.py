"""The network builder, and folding batch normalisation away."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from fewbits.primitives.blocks import fold_batch_norm, mlp  # noqa: E402


def trained_a_little(blocks=2):
    torch.manual_seed(0)
    network = mlp(6, 4, hidden=9, blocks=blocks)
    for layer in network:
        if isinstance(layer, nn.BatchNorm1d):
            nn.init.uniform_(layer.weight, -2, 2)
            nn.init.uniform_(layer.bias, -1, 1)
    for _ in range(5):
        network(torch.randn(32, 6) * 3 + 1)
    return network


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_layers_and_their_start(blocks):
    torch.manual_seed(0)
    network = mlp(300, 200, hidden=250, blocks=blocks)
    kinds = [type(layer) for layer in network]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * blocks + [nn.Linear]
    widths = [300, *[250] * blocks, 200]
    linears = [layer for layer in network if isinstance(layer, nn.Linear)]
    for linear, inputs, outputs in zip(linears, widths, widths[1:], strict=False):
        assert linear.weight.shape == (outputs, inputs)
        deviation = (2 / (inputs + outputs)) ** 0.5
        assert linear.weight.std().item() == pytest.approx(deviation, rel=0.02)
        assert linear.weight.abs().max() > 3 * deviation  # normal, not uniform
        assert not linear.bias.any()
    assert network(torch.randn(5, 300)).shape == (5, 200)


def test_without_blocks_no_hidden_width_is_needed():
    assert len(mlp(3, 2, blocks=0)) == 1


@pytest.mark.parametrize(
    "wrong", [{"inputs": 0}, {"outputs": 0}, {"hidden": 0}, {"blocks": -1, "hidden": 4}]
)
def test_impossible_networks_are_refused(wrong):
    with pytest.raises(ValueError):
        mlp(**({"inputs": 3, "outputs": 2, "hidden": 4} | wrong))


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_folding_changes_nothing_but_the_layers(blocks):
    network = trained_a_little(blocks)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    folded = fold_batch_norm(network)
    assert not any(isinstance(layer, nn.BatchNorm1d) for layer in folded)
    assert len(folded) == 2 * blocks + 1
    x = torch.randn(50, 6)
    torch.testing.assert_close(folded(x), network.eval()(x), rtol=1e-4, atol=1e-5)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])


def test_folding_leaves_the_mode_alone_and_gives_evaluation_mode():
    network = trained_a_little()
    folded = fold_batch_norm(network)
    assert network.training
    assert not folded.training
    folded[0].weight.data.zero_()
    assert network[0].weight.any()  # a copy


def test_a_folded_row_does_not_depend_on_its_batch():
    folded = fold_batch_norm(trained_a_little())
    x = torch.randn(20, 6)
    torch.testing.assert_close(folded(x)[:1], folded(x[:1]))


@pytest.mark.parametrize(
    "layers",
    [
        [nn.BatchNorm1d(3)],
        [nn.Linear(3, 3), nn.ReLU(), nn.BatchNorm1d(3)],
        [nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False)],
        [nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False)],
    ],
)
def test_what_cannot_be_folded_is_refused(layers):
    with pytest.raises(ValueError, match="BatchNorm"):
        fold_batch_norm(nn.Sequential(*layers))
