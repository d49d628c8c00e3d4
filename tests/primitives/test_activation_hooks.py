import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fewbits.primitives.activation_hooks import (
    activation_layers,
    batches,
    evaluating,
    find_layers,
    record,
)


class Twice(nn.Module):
    """One ReLU module used twice, one in place, a module that never runs, and a function."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.relu = nn.ReLU()
        self.norm = nn.BatchNorm1d(6)
        self.gelu = nn.GELU()
        self.extra = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
        self.unused = nn.SiLU()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        x = self.relu(self.norm(self.one(x)))
        x = self.gelu(self.relu(self.two(self.drop(x))))
        return functional.relu(self.extra(self.three(x))), None


class Tokens(nn.Module):
    """Tokens (b, t) to (b, t, 5), by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp = nn.Embedding(10, 5), nn.Linear(5, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return {"hidden": self.mlp(self.embed(input_ids)), "mask": attention_mask}


def inputs(rows: int = 10, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 4)).astype(np.float32)


def joined(parts: Any) -> dict[str, Tensor]:
    parts = list(parts)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def test_every_call_is_recorded_with_what_goes_into_an_activation() -> None:
    model, x = Twice().eval(), torch.from_numpy(inputs())
    seen = joined(record(model, inputs(), batch=4))
    assert list(seen) == ["relu", "relu#2", "gelu", "extra.1"]
    with torch.no_grad():
        first = model.norm(model.one(x))
        second = model.two(first.relu())
        last = model.extra[0](model.three(model.gelu(second.relu())))
    for name, values in (("relu", first), ("relu#2", second), ("extra.1", last)):
        torch.testing.assert_close(seen[name], values)  # also before a ReLU that works in place
    outputs = joined(record(model, x, ["three", "extra"]))
    torch.testing.assert_close(outputs["extra"], last.relu())
    after = joined(record(model, x, ["relu", "extra.1"], read="output"))
    torch.testing.assert_close(after["relu#2"], second.relu())
    torch.testing.assert_close(after["extra.1"], last.relu())
    into = joined(record(model, x, ["three", "norm"], read="input"))
    torch.testing.assert_close(into["norm"], model.one(x).detach())
    torch.testing.assert_close(into["three"], model.gelu(second.relu()))
    assert torch.cat([part[""] for part in record_root(model, x)]).shape == (10, 3)


def record_root(model: nn.Module, x: Tensor) -> Any:
    """The root has no name to give; wrapped, its output (the first of a tuple) is read."""
    wrapped = nn.ModuleDict({"inner": model})
    wrapped.forward = lambda x: model(x)  # type: ignore[method-assign]
    for part in record(wrapped, x, ["inner"]):
        yield {"": part["inner"]}


def test_modes_hooks_and_gradients_are_left_as_they_were() -> None:
    model = Twice().train()
    model.norm.eval()  # frozen on purpose
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    for _ in record(model, inputs(), batch=3):
        assert [module.training for module in model.modules()] == modes
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    one, other = (joined(record(model, inputs())) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)  # no dropout
    assert not any(values.requires_grad for values in one.values())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    def fail(name: str, values: Tensor) -> None:
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        list(record(model, inputs(), keep=fail))
    assert [module.training for module in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with evaluating(model):
        assert not model.drop.training


def test_a_batch_is_forgotten_when_the_next_one_comes() -> None:
    alive: list[weakref.ref] = []
    for seen in record(Twice(), inputs(30), batch=3):
        assert sum(ref() is not None for ref in alive) == 0
        alive.append(weakref.ref(seen["relu"]))
        del seen
    assert len(alive) == 10


@pytest.mark.parametrize("tokens", ["first", "last", "mean", 1, -1, "all"])
def test_tokens_heed_the_mask(tokens: str | int) -> None:
    model = Tokens()
    ids = torch.arange(8).reshape(2, 4)
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])  # padded right, and left
    given = {"input_ids": ids, "attention_mask": mask}
    hidden = model.mlp(model.embed(ids)).detach()
    rows = torch.arange(2)
    expected = {
        "first": hidden[rows, torch.tensor([0, 1])],
        "last": hidden[rows, torch.tensor([1, 3])],
        "mean": torch.stack([hidden[0, :2].mean(dim=0), hidden[1, 1:].mean(dim=0)]),
        1: hidden[:, 1],
        -1: hidden[:, 3],
        "all": hidden,
    }
    seen = joined(record(model, given, ["mlp"], tokens=tokens, batch=1))
    torch.testing.assert_close(seen["mlp"], expected[tokens])
    unmasked = joined(record(model, {"input_ids": ids}, ["mlp"], tokens="last"))
    torch.testing.assert_close(unmasked["mlp"], hidden[:, 3])


def test_batches_of_every_kind_are_the_same(tmp_path: Any) -> None:
    x = inputs(10)
    np.save(tmp_path / "x.npy", x)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.from_numpy(x), torch.arange(10)), batch_size=3
    )
    model = Twice()
    whole = joined(record(model, x))
    for given in (x.astype(np.float64), torch.from_numpy(x), mapped, loader, iter([x[:7], x[7:]])):
        seen = joined(record(model, given, batch=4))
        for name, values in whole.items():
            torch.testing.assert_close(seen[name], values)
    assert [len(part) for part in batches(x, 4)] == [4, 4, 2]


def test_activations_are_known_by_the_names_of_their_classes() -> None:
    class NewGELUActivation(nn.Module):
        pass

    kinds = [nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish]
    model = nn.Sequential(*(kind() for kind in kinds), nn.Mish(), NewGELUActivation())
    assert activation_layers(model) == [str(i) for i in range(10)]
    others = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Sigmoid(), nn.Softmax(dim=1), nn.GLU())
    assert activation_layers(others) == []


def test_bad_layers() -> None:
    model = Twice()
    with pytest.raises(ValueError, match="no ReLU-like modules"):
        find_layers(nn.Sequential(nn.Linear(2, 2), nn.Tanh()))
    with pytest.raises(ValueError, match=r"no layer 'thre'; did you mean 'three'\?"):
        find_layers(model, ["one", "thre"])
    for bad in ([], ["one", "one"], "one"):
        with pytest.raises(ValueError, match="list of different names"):
            find_layers(model, bad)


def test_bad_input() -> None:
    model = Twice()
    spoiled = inputs(10)
    spoiled[7, 2] = np.nan
    for given in (spoiled, torch.from_numpy(spoiled), [spoiled[:5], spoiled[5:]]):
        with pytest.raises(ValueError, match="item 7 has NaN"):
            list(record(model, given, batch=3))
    for given in (inputs(0), [], iter([])):
        with pytest.raises(ValueError, match="empty"):
            list(record(model, given))
    for given, complaint in (
        (inputs()[0], "two axes"),
        ("words", "not a str"),
        (7, "not a int"),
        ([["a"]], "array, a tensor"),
        ({}, "array, a tensor"),
        ({"x": inputs(3), "y": inputs(4)}, "differ in length"),
        (np.array([["a"]]), "dtype"),
        (inputs(5)[:, :3], "does not take these inputs"),
        ({"wrong": inputs(5)}, "does not take these inputs"),
    ):
        with pytest.raises(ValueError, match=complaint):
            list(record(model, given))
    with pytest.raises(ValueError, match="batch=0"):
        list(record(model, inputs(), batch=0))
    with torch.no_grad():
        model.two.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer 'relu#2' has NaN"):
        list(record(model, inputs()))


def test_values_that_are_not_one_row_per_item_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Flatten(0), nn.ReLU())
    with pytest.raises(ValueError, match="is not one row for each of 10 items"):
        list(record(model, inputs()))
    for tokens, complaint in (("middle", "must be all"), (4, "there are 4 tokens")):
        with pytest.raises(ValueError, match=complaint):
            list(record(Tokens(), {"input_ids": torch.zeros(2, 4, dtype=torch.long)}, ["mlp"],
                        tokens=tokens))  # fmt: skip
