import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import mutual_info_score
from torch import Tensor, nn

from fewbits.core.errors import FewbitsError
from fewbits.primitives.bits import pack, unpack
from fewbits.primitives.clustering import kmeans, purity
from fewbits.primitives.hamming import neighbour_vote, pairwise_hamming, redundancy_ratio
from fewbits.reproductions.vectors.activation_code import load_digits, trained
from fewbits.vectors import _activation_analysis as analysis
from fewbits.vectors.activation_code import (
    ActivationCode,
    LabelledData,
    analyse,
    averaged,
    bit_information,
    measure_network,
    network_digests,
    phase_chart,
    region_diameters,
    sweep,
    uniform_inputs,
    with_regimes,
)


def inputs(rows: int = 60, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, *(shape or (6,)))).astype(np.float32)


def seeded(seed: int = 0) -> None:
    torch.manual_seed(seed)


def deep(norm: bool = True, slope: float = 0.0) -> nn.Sequential:
    """Three hidden layers; batch statistics are those of some data."""
    seeded()
    layers: list[nn.Module] = []
    for before, after in ((6, 20), (20, 15), (15, 10)):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after) if norm else nn.Identity()]
        layers += [nn.LeakyReLU(slope) if slope else nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(10, 4))
    for _ in range(5):
        model(torch.from_numpy(inputs(200)))
    return model


class Convolutions(nn.Module):
    """Maps, one ReLU module for two layers, mean over all places."""

    def __init__(self, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        seeded()
        self.one, self.two = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 5, 3, stride=2)
        self.act, self.last = act(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.one(x) - 1)  # so that some channels are off everywhere
        x = self.act(self.two(x) - 0.1)
        return self.last(x.mean(dim=(2, 3)))

    def pre_activations(self, x: np.ndarray) -> list[np.ndarray]:
        with torch.no_grad():
            first = self.one(torch.from_numpy(x)) - 1
            return [first.numpy(), (self.two(self.act(first)) - 0.1).numpy()]


def unpacked(encoder: ActivationCode, x: Any) -> np.ndarray:
    return unpack(encoder.encode(x)["bits"], encoder.bits, 1)


# -- exact invariants: acceptance 1 to 4 ---------------------------------------------------


def outputs(model: nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = model.eval()(torch.from_numpy(x)).numpy()
    return found


@pytest.mark.parametrize("model", [deep(), deep(norm=False, slope=0.1), Convolutions()])
def test_equal_codes_lie_in_one_linear_region(model: nn.Module) -> None:
    shape = (1, 9, 9) if isinstance(model, Convolutions) else (6,)
    a, steps = inputs(400, *shape, seed=1).astype(np.float64), 10.0 ** np.linspace(-4, -0.5, 400)
    b = a + steps.reshape(-1, *[1] * len(shape)) * inputs(400, *shape, seed=2)
    model = copy.deepcopy(model).double()  # so that a kink is no matter of rounding
    encoder = ActivationCode(model).fit(a, b).all_units()
    assert encoder.bits == encoder.units
    same = (unpacked(encoder, a) == unpacked(encoder, b)).all(axis=1)
    assert 40 < same.sum() < 360
    middle = outputs(model, (a + b) / 2)
    bent = np.abs(middle - (outputs(model, a) + outputs(model, b)) / 2).max(axis=1)
    assert bent[same].max() < 1e-12
    assert (bent[~same] > 1e-7).mean() > 0.7  # elsewhere there is a kink in between
    model.float()
    for one, other in ((a, b), (b, a)):
        one, other = one[same].astype(np.float32), other[same].astype(np.float32)
        mean = (outputs(model, one) + outputs(model, other)) / 2
        np.testing.assert_allclose(outputs(model, (one + other) / 2), mean, atol=1e-5)


def test_scaling_what_goes_into_each_unit_changes_no_code() -> None:
    model, scaled = deep(norm=False), deep(norm=False)
    rng = np.random.default_rng(3)
    with torch.no_grad():
        for layer, following in ((0, 3), (3, 6), (6, 9)):
            # Powers of two are exact; the next layer takes them back.
            factor = torch.from_numpy(2.0 ** rng.integers(-6, 7, len(scaled[layer].bias)))
            scaled[layer].weight *= factor[:, None]
            scaled[layer].bias *= factor
            scaled[following].weight /= factor
    x = inputs(100)
    one, other = (ActivationCode(net).fit(x).all_units() for net in (model, scaled))
    assert (one.encode(x)["bits"] == other.encode(x)["bits"]).all()
    assert (outputs(model, x) == outputs(scaled, x)).all()
    assert one.digest != other.digest


def test_codes_are_the_signs_of_pre_activations_without_constant_units() -> None:
    model, train, test = deep(), inputs(40, seed=1), inputs(30, seed=2)
    with torch.no_grad():
        model[0].weight[3] = 0  # its unit is always off, or always on
        x = torch.from_numpy(np.concatenate([train, test]))
        signs = []
        for layer in model.eval():
            if isinstance(layer, nn.ReLU):
                signs.append((x > 0).numpy())
            x = layer(x)
    table = np.concatenate(signs, axis=1)
    varying = table.any(axis=0) & ~table.all(axis=0)
    encoder = ActivationCode(model).fit(train, test)
    assert (encoder.units, encoder.bits) == (45, varying.sum())
    assert encoder.bits < 45
    assert (encoder.columns == np.flatnonzero(varying)).all()
    assert (unpacked(encoder, train) == table[:40, varying]).all()
    assert (unpacked(encoder, test) == table[40:, varying]).all()
    new = encoder.encode(inputs(20, seed=5))
    assert new["bits"].shape == (20, -(-encoder.bits // 8))
    assert (encoder.columns == np.flatnonzero(varying)).all()
    assert list(encoder.bits_by_layer()) == ["2", "5", "8"]
    assert sum(encoder.bits_by_layer().values()) == encoder.bits
    alone = ActivationCode(model).fit(train)
    assert alone.bits == (table[:40].any(axis=0) & ~table[:40].all(axis=0)).sum()
    whole = table[:40].astype(np.uint8)
    assert (unpacked(encoder.all_units(), train) == whole).all()
    assert redundancy_ratio(pack(whole, 1)) == (40 - len({row.tobytes() for row in whole})) / 40
    distances = (whole[:, None] != whole).sum(axis=2)
    assert (pairwise_hamming(encoder.all_units().encode(train)["bits"]) == distances).all()


def test_exactly_zero_is_off() -> None:
    encoder = ActivationCode(nn.Sequential(nn.ReLU())).fit(np.array([[0.0, -1], [1e-30, 2]]))
    assert unpacked(encoder, np.array([[0, -0.0], [1, 1e-38]])).tolist() == [[0, 0], [1, 1]]


def test_training_mode_and_batches_change_no_code() -> None:
    model = deep().train()
    model.insert(3, nn.Dropout(0.5))
    x = inputs(50)
    encoder = ActivationCode(model, batch=7).fit(x)
    code = encoder.encode(x)
    assert model.training
    assert (ActivationCode(model.eval(), batch=50).fit(x).encode(x)["bits"] == code["bits"]).all()
    alone = np.concatenate([encoder.encode(x[i : i + 1])["bits"] for i in range(50)])
    assert (alone == code["bits"]).mean() > 0.999  # a sum within rounding of zero may differ
    assert code.nbytes == 50 * -(-encoder.bits // 8)


# -- kinds of networks ---------------------------------------------------------------------


@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.ReLU6])
def test_units_and_channels_of_maps(act: type[nn.Module]) -> None:
    model, x = Convolutions(act), inputs(40, 1, 9, 9)
    maps = model.pre_activations(x)
    units = ActivationCode(model).fit(x)
    assert [(layer.name, layer.shape, layer.units) for layer in units.layers_] == [
        ("act", (4, 7, 7), 196),
        ("act#2", (5, 3, 3), 45),
    ]
    flat = np.concatenate([values.reshape(40, -1) > 0 for values in maps], axis=1)
    assert (unpacked(units.all_units(), x) == flat).all()
    channels = ActivationCode(model, mode="channel").fit(x)
    on = np.concatenate([np.maximum(values, 0).sum(axis=(2, 3)) > 0 for values in maps], axis=1)
    assert channels.units == 9
    assert (unpacked(channels.all_units(), x) == on).all()
    larger = channels.encode(inputs(5, 1, 12, 12))
    assert larger["bits"].shape == (5, -(-channels.bits // 8))


def test_functions_are_seen_through_the_layer_before_them() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            seeded()
            self.fc1, self.fc2 = nn.Linear(6, 12), nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(torch.relu(self.fc1(x)))

    model, x = Functional(), inputs()
    with pytest.raises(FewbitsError, match="no ReLU-like modules"):
        ActivationCode(model).fit(x)
    encoder = ActivationCode(model, layers=["fc1"]).fit(x)
    with torch.no_grad():
        expected = (model.fc1(torch.from_numpy(x)) > 0).numpy()
    assert (unpacked(encoder.all_units(), x) == expected).all()
    with pytest.raises(FewbitsError, match="no layer 'fc'; did you mean 'fc"):
        ActivationCode(model, layers=["fc"]).fit(x)


def test_a_vision_transformer_gives_bits_of_its_pooled_token() -> None:
    from transformers import ViTConfig, ViTModel

    seeded()
    model = ViTModel(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=16,
            patch_size=8,
            num_channels=1,
        )
    )
    x = inputs(30, 1, 16, 16)
    encoder = ActivationCode(model).fit({"pixel_values": x})
    assert encoder.units == 48
    hidden: list[Tensor] = []
    names = [
        name for name, _ in model.named_modules() if name.endswith(("fc1", "intermediate.dense"))
    ]
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda m, a, out: hidden.append(out))
    with torch.no_grad():
        model.eval()(torch.from_numpy(x))
    expected = np.concatenate([values[:, 0].numpy() > 0 for values in hidden], axis=1)
    assert (unpacked(encoder.all_units(), {"pixel_values": x}) == expected).all()
    assert (encoder.encode(x)["bits"] == encoder.encode({"pixel_values": x})["bits"]).all()
    everything = ActivationCode(model, tokens="all").fit(x)
    assert everything.units == 5 * 48
    anywhere = ActivationCode(model, tokens="all", mode="channel").fit(x)
    assert anywhere.units == 48
    hidden.clear()
    with torch.no_grad():
        model.eval()(torch.from_numpy(x))
    expected = np.concatenate([(values > 0).any(dim=1).numpy() for values in hidden], axis=1)
    assert (unpacked(anywhere.all_units(), x) == expected).all()


def test_texts_of_any_length_are_read_at_their_first_token() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            seeded()
            self.embed, self.act = nn.Embedding(9, 7), nn.GELU()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.act(self.embed(input_ids))

    model, ids = Text(), np.random.default_rng(0).integers(9, size=(40, 5))
    masked = (np.arange(5) >= np.arange(40)[:, None] % 5).astype(np.int64)  # padded left
    encoder = ActivationCode(model).fit({"input_ids": ids, "attention_mask": masked})
    first = ids[np.arange(40), np.arange(40) % 5]
    expected = model.embed.weight.detach().numpy()[first] > 0
    code = encoder.all_units().encode({"input_ids": ids, "attention_mask": masked})
    assert (unpack(code["bits"], 7, 1) == expected).all()
    longer = np.concatenate([ids, ids], axis=1)
    assert len(encoder.encode({"input_ids": longer, "attention_mask": longer * 0 + 1})) == 40


def test_tokens_and_one_dimensional_maps_are_not_confused() -> None:
    seeded()
    model = nn.Sequential(nn.Conv1d(2, 5, 3), nn.ReLU())
    x = inputs(30, 2, 8)
    with pytest.raises(FewbitsError, match="tokens=first for tokens, or tokens=all"):
        ActivationCode(model).fit(x)
    with torch.no_grad():
        expected = (model[0](torch.from_numpy(x)) > 0).any(dim=2).numpy()
    encoder = ActivationCode(model, mode="channel", tokens="all", channel_axis=1).fit(x)
    assert (unpacked(encoder.all_units(), x) == expected).all()
    maps = inputs(30, 1, 5, 5)
    last = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU())  # (b, 3, 4, 4)
    with torch.no_grad():
        last[0].bias -= 1  # so that some channels are off
    assert ActivationCode(last, mode="channel").fit(maps).units == 3
    assert ActivationCode(last, mode="channel", channel_axis=-1).fit(maps).units == 4


# -- searching, choosing, files ------------------------------------------------------------


def test_search_ranks_by_differing_bits() -> None:
    encoder = ActivationCode(deep()).fit(inputs(200))
    code, queries = encoder.encode(inputs(200)), inputs(9, seed=4)
    distances, rows = encoder.search(code, queries, 5)
    every = (unpacked(encoder, queries)[:, None] != unpacked(encoder, inputs(200))).sum(axis=2)
    assert (rows == np.argsort(every, axis=1, kind="stable")[:, :5]).all()
    assert (distances == np.take_along_axis(every, rows, axis=1)).all()
    assert (encoder.search(code, encoder.encode(queries), 5)[1] == rows).all()
    assert (encoder.search(code, inputs(200), 1)[0] == 0).all()
    with pytest.raises(FewbitsError, match="k is 201"):
        encoder.search(code, queries, 201)
    other = ActivationCode(deep(), sample_bits=9).fit(inputs(200))
    with pytest.raises(FewbitsError, match="another encoder"):
        other.search(code, queries, 5)
    with pytest.raises(FewbitsError, match="another encoder"):
        other.search(other.encode(queries), encoder.encode(queries), 5)


def test_a_sample_of_bits_follows_the_seed() -> None:
    model, x = deep(), inputs(100)
    every = ActivationCode(model).fit(x)
    some = ActivationCode(model, sample_bits=10, seed=3).fit(x)
    assert some.bits == 10
    assert set(some.columns) < set(every.columns)
    assert (some.columns == ActivationCode(model, sample_bits=10, seed=3).fit(x).columns).all()
    assert (some.columns != ActivationCode(model, sample_bits=10, seed=4).fit(x).columns).any()
    assert ActivationCode(model, sample_bits=1000).fit(x).bits == every.bits
    own = np.searchsorted(every.columns, some.columns)
    assert (unpacked(some, x) == unpacked(every, x)[:, own]).all()


def test_streaming_to_a_file_gives_the_same_code(tmp_path: Path) -> None:
    encoder, x = ActivationCode(deep(), batch=16).fit(inputs(100)), inputs(100)
    code = encoder.encode(x)
    path = tmp_path / "new" / "codes.fewbits"
    streamed = encoder.encode((x[i : i + 30] for i in range(0, 100, 30)), to=path)
    assert (streamed["bits"] == code["bits"]).all()
    assert streamed.nbytes == code.nbytes
    assert isinstance(streamed["bits"].base, np.ndarray)  # mapped
    assert (encoder.read_code(path)["bits"] == code["bits"]).all()
    assert [file.name for file in path.parent.iterdir()] == ["codes.fewbits"]
    with pytest.raises(FewbitsError, match="exists already"):
        encoder.encode(x, to=path)
    encoder.encode(x[:10], to=path, overwrite=True)
    assert len(encoder.read_code(path)) == 10

    def failing() -> Any:
        yield x
        raise RuntimeError("the reader broke")

    with pytest.raises(RuntimeError, match="the reader broke"):
        encoder.encode(failing(), to=tmp_path / "other" / "codes.fewbits")
    assert not (tmp_path / "other").exists()
    other = ActivationCode(deep(), seed=1).fit(x)
    with pytest.raises(FewbitsError, match="another encoder"):
        other.read_code(path)
    with pytest.raises(FewbitsError, match="does not hold codes"):
        ActivationCode(deep(), sample_bits=3).fit(x).read_code(path)


def test_a_saved_encoder_belongs_to_its_network(tmp_path: Path) -> None:
    x, path = inputs(100), tmp_path / "encoder.fewbits"
    encoder = ActivationCode(deep(), mode="channel", sample_bits=20, seed=2).fit(x)
    encoder.save(path)
    again = ActivationCode.load(path, deep())
    assert (again.digest, again.columns.tolist()) == (encoder.digest, encoder.columns.tolist())
    assert (again.encode(x)["bits"] == encoder.encode(x)["bits"]).all()
    assert again.search(encoder.encode(x), x[:2], 1)[1].tolist() == [[0], [1]]
    assert path.stat().st_size < 3000  # not the network
    with pytest.raises(FewbitsError, match="another structure"):
        ActivationCode.load(path, deep(norm=False))
    changed = deep()
    with torch.no_grad():
        changed[0].bias[0] += 1
    with pytest.raises(FewbitsError, match="other weights"):
        ActivationCode.load(path, changed)
    named = ActivationCode(deep(), layers=["2", "5"]).fit(x)
    named.save(path, overwrite=True)
    assert ActivationCode.load(path, deep()).digest == named.digest


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    from fewbits.core import container
    from fewbits.vectors.baselines import Sign

    x = inputs(100)
    encoder = ActivationCode(deep()).fit(x)
    path = encoder.save(tmp_path / "encoder.fewbits")
    content = path.read_bytes()
    (tmp_path / "cut.fewbits").write_bytes(content[:-1])
    with pytest.raises(FewbitsError, match="cut short"):
        ActivationCode.load(tmp_path / "cut.fewbits", deep())
    Sign().fit(x).save(tmp_path / "sign.fewbits")
    with pytest.raises(FewbitsError, match="does not hold an activation-code encoder"):
        ActivationCode.load(tmp_path / "sign.fewbits", deep())
    about = container.read(path).about
    for spoilt in (
        {"mask": encoder.mask_[:-1]},
        {"mask": encoder.mask_ ^ 1},
        {"mask": np.zeros_like(encoder.mask_)},
        {"other": encoder.mask_},
    ):
        container.write(path, "codec", about, spoilt, overwrite=True)
        with pytest.raises(FewbitsError, match="does not hold"):
            ActivationCode.load(path, deep())
    for part, value in (("options", {"mode": "both"}), ("options", {"model": 1}), ("layers", 3)):
        spoilt_about = about | {"activation-code": about["activation-code"] | {part: value}}
        container.write(path, "codec", spoilt_about, {"mask": encoder.mask_}, overwrite=True)
        with pytest.raises(FewbitsError):
            ActivationCode.load(path, deep())


def test_digests_tell_networks_apart() -> None:
    structure, weights = network_digests(deep())
    assert network_digests(deep()) == (structure, weights)
    assert network_digests(deep(norm=False))[0] != structure
    half = deep().to(torch.bfloat16)
    assert network_digests(half)[0] == structure
    assert network_digests(half)[1] != weights


def test_few_bits_keep_redundancy_low() -> None:
    encoder = ActivationCode(deep()).fit(inputs(300))
    code = encoder.encode(inputs(300))
    least = redundancy_ratio(code["bits"])
    for tau in (least, 0.1, 0.5, 1.0):
        columns = encoder.bits_needed(code, tau=tau)
        kept = encoder.keep_code(code, columns)
        assert redundancy_ratio(kept["bits"]) <= tau
        if len(columns) > 1:  # the last one was needed
            assert redundancy_ratio(encoder.keep_code(code, columns[:-1])["bits"]) > tau
    assert len(encoder.bits_needed(code, tau=1.0)) == 1
    few = encoder.bits_needed(code, tau=0.1)
    assert len(set(few)) == len(few) < encoder.bits - 10
    rng = np.random.default_rng(0)
    chance = [rng.choice(encoder.bits, len(few), replace=False) for _ in range(10)]
    assert min(redundancy_ratio(encoder.keep_code(code, c)["bits"]) for c in chance) > 0.1
    shorter = encoder.keep(few)
    assert shorter.bits == len(few)
    assert (shorter.encode(inputs(300))["bits"] == encoder.keep_code(code, few)["bits"]).all()
    assert encoder.keep_code(code, few).codec_digest == shorter.digest
    with pytest.raises(FewbitsError, match="cannot be met"):
        encoder.bits_needed(code, tau=least / 2)


def test_greedy_choice_does_not_depend_on_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack(np.random.default_rng(0).integers(2, size=(90, 37)), 1)
    whole = analysis.separating_bits(packed, 37, 0.0)
    information = bit_information(packed, np.arange(90) % 4, 37)
    monkeypatch.setattr(analysis, "BLOCK_CELLS", 800)
    assert (analysis.separating_bits(packed, 37, 0.0) == whole).all()
    np.testing.assert_allclose(bit_information(packed, np.arange(90) % 4, 37), information)


# -- analysis ------------------------------------------------------------------------------


def test_information_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=200)
    table = rng.integers(2, size=(200, 11))
    table[:, 4] = labels == 2
    found = bit_information(pack(table, 1), labels, 11)
    expected = [mutual_info_score(labels, bit) / np.log(2) for bit in table.T]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert found.argmax() == 4


def test_diameters_are_those_between_the_kinks() -> None:
    model = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.Linear(3, 1))
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[0].bias.copy_(torch.tensor([1.01, -0.51, -30]))  # kinks at -1.01, 0.51 and 30
    encoder = ActivationCode(model).fit(np.array([[-2.0], [0], [1]]))
    assert encoder.bits == 2  # the third unit is off for all, but a kink all the same
    starts = np.array([[0.0], [-1.0], [2.0], [29.0]])
    found = region_diameters(encoder, starts)
    # 2.0 sees no kink to the right, and 29.0 none to the left, within 5.
    expected = [0.51 + 1.01, 0.51 + 1.01, 5 + 2 - 0.51, 5 + 1]
    assert (np.abs(found - expected) <= 0.1).all()
    assert region_diameters(encoder, starts[:1], np.array([[-3.0]]), reach=0.2)[0] == 0.45


def test_diameters_have_no_gaps() -> None:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(x.abs() - 1)  # on below -1 and above 1

    encoder = ActivationCode(Folded()).fit(np.array([[0.0], [2.0]]))
    assert abs(region_diameters(encoder, np.array([[2.0]]))[0] - (5 + 1)) <= 0.1
    with pytest.raises(FewbitsError, match="no length"):
        region_diameters(encoder, np.ones((2, 1)), np.array([[1.0], [0.0]]))
    with pytest.raises(FewbitsError, match="shape"):
        region_diameters(encoder, np.ones((2, 1)), np.ones((1, 1)))
    with pytest.raises(FewbitsError, match="step"):
        region_diameters(encoder, np.ones((2, 1)), step=6)


def row(redundancy: float, voted: float, **settings: Any) -> dict[str, Any]:
    measures = {"redundancy train": redundancy, "9-NN test": voted, "logistic test": voted}
    return settings | measures | {"k-means purity train": voted}


def test_regimes_follow_the_rule() -> None:
    rows = [row(0.011, 0.99), row(0.01, 0.95), row(0.0, 0.981), row(0.0, 0.98), row(0.0, 0.99)]
    names = ["under", "critical", "sufficient", "sufficient", "sufficient"]
    assert [found["regime"] for found in with_regimes(rows)] == names


def test_seeds_are_averaged() -> None:
    rows = [row(0.2, 0.5, width=3, seed=0), row(0.4, 0.7, width=3, seed=1), row(0, 1, width=5)]
    found = averaged(rows, ["width"])
    assert [one["width"] for one in found] == [3, 5]
    assert found[0]["redundancy train"] == pytest.approx(0.3)
    assert "seed" not in found[0]


def test_the_chart_is_a_picture_that_is_there_as_a_whole(tmp_path: Path) -> None:
    rows = [row(0.1 / w, e / 30, width=w, epochs=e) for w in (3, 7) for e in (0, 30)]
    path = phase_chart(tmp_path / "new" / "chart.png", [(rows, "width", "epochs")])
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert content.endswith(b"IEND\xaeB`\x82")
    with pytest.raises(FewbitsError, match="exists already"):
        phase_chart(path, [(rows, "width", "epochs")])
    for grids, complaint in (
        ([], "nothing to draw"),
        ([([], "width", "epochs")], "nothing to draw"),
        ([(rows, "width", "samples")], "lack samples"),
    ):
        with pytest.raises(FewbitsError, match=complaint):
            phase_chart(path, grids, overwrite=True)
    assert path.read_bytes() == content
    assert [file.name for file in path.parent.iterdir()] == ["chart.png"]


def test_wide_codes_are_projected_before_kmeans(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 30)
    table = rng.integers(2, size=(3, 5000))[labels] ^ (rng.random((90, 5000)) < 0.2)
    wide = analysis.as_floats(pack(table, 1))
    assert wide.shape == (90, 1024)
    assert purity(labels, kmeans(wide, 3)) == 1
    monkeypatch.setattr(analysis, "BLOCK_CELLS", 100_000)
    assert (analysis.as_floats(pack(table, 1)) == wide).all()


# -- acceptance 5 and 6, on digits ---------------------------------------------------------


@functools.cache
def digits() -> LabelledData:
    return load_digits()


def codes(network: nn.Module) -> tuple[ActivationCode, np.ndarray, np.ndarray]:
    encoder = ActivationCode(network).fit(digits().train, digits().test)
    train, test = (encoder.encode(x)["bits"] for x in (digits().train, digits().test))
    return encoder, train, test


def clustered(x: np.ndarray, seed: int) -> float:
    return purity(digits().train_labels, kmeans(x, 10, seed=seed))


@functools.cache
def on_digits(seed: int) -> dict[str, Any]:
    """Figures of one seed: 60 units after 30 epochs and before, random labels, and rivals."""
    data = digits()
    (_, start, _), (_, end, _) = trained(data, seed, 60, (0, 30))
    ((_, random, _),) = trained(data, seed, 60, (30,), noise=1.0)
    ((_, narrow, _),) = trained(data, seed, 7, (3,))  # 128 codes at most, however long it trains
    found: dict[str, Any] = {"network": end}
    for name, network in (("start", start), ("end", end), ("random", random), ("narrow", narrow)):
        _, train, test = codes(network)
        found[f"{name} redundancy"] = redundancy_ratio(train)
        found[f"{name} voted"] = vote_accuracy(train, test)
        found[f"{name} clustered"] = clustered(analysis.as_floats(train), seed)
    mean = data.train.mean(axis=0)
    directions = np.random.default_rng(seed).standard_normal((64, 60))
    train, test = (pack((x - mean) @ directions > 0, 1) for x in (data.train, data.test))
    found["simhash voted"] = vote_accuracy(train, test)
    found["simhash clustered"] = clustered(analysis.as_floats(train), seed)
    found["pixels clustered"] = clustered(data.train, seed)
    return found


def vote_accuracy(train: np.ndarray, test: np.ndarray) -> float:
    voted = neighbour_vote(train, digits().train_labels, test, 9)
    return float((voted == digits().test_labels).mean())


def means() -> dict[str, float]:
    names = [name for name in on_digits(0) if name != "network"]
    return {name: float(np.mean([on_digits(seed)[name] for seed in range(3)])) for name in names}


def test_codes_tell_digits_apart_and_tell_what_they_are() -> None:
    mean = means()
    for seed in range(3):
        assert on_digits(seed)["end redundancy"] < 0.02
        assert on_digits(seed)["end redundancy"] < on_digits(seed)["narrow redundancy"]
        assert on_digits(seed)["end voted"] > on_digits(seed)["start voted"]
        assert on_digits(seed)["end voted"] > on_digits(seed)["simhash voted"]
    for rival in ("pixels", "simhash", "start"):
        assert mean["end clustered"] >= mean[f"{rival} clustered"] + 0.08


def test_random_labels_leave_the_codes_apart_but_not_the_classes() -> None:
    mean = means()
    assert mean["random redundancy"] < 0.02
    assert mean["random clustered"] <= mean["end clustered"] - 0.15


def test_few_bits_keep_the_vote_and_better_than_chance() -> None:
    encoder, train, test = codes(on_digits(0)["network"])
    code = encoder.encode(digits().train)
    columns = encoder.bits_needed(code, digits().train_labels, delta=0.02)
    assert 5 < len(columns) < 45
    asked = encoder.encode(digits().test)
    kept = [encoder.keep_code(one, columns)["bits"] for one in (code, asked)]
    assert vote_accuracy(*kept) > vote_accuracy(train, test) - 0.05
    rng = np.random.default_rng(0)
    chance = []
    for _ in range(5):
        some = rng.choice(encoder.bits, len(columns), replace=False)
        chance.append(vote_accuracy(*(encoder.keep_code(c, some)["bits"] for c in (code, asked))))
    assert vote_accuracy(*kept) > np.mean(chance)


def test_a_sweep_measures_every_network() -> None:
    small = LabelledData(*(part[:200] for part in vars(digits()).values()))
    networks = [({"width": w, "seed": 0}, nn.Sequential(nn.Linear(64, w), nn.ReLU()), small)
                for w in (5, 40)]  # fmt: skip
    rows = sweep(networks, k=5)
    assert [found["width"] for found in rows] == [5, 40]
    assert [found["units"] for found in rows] == [5, 40]
    assert rows[1] == {"width": 40, "seed": 0} | measure_network(networks[1][1], small, k=5)
    assert rows[0]["redundancy train"] > rows[1]["redundancy train"]
    assert rows[0]["redundancy random"] > 0.7
    assert rows[0]["k-means one to one train"] <= rows[0]["k-means purity train"]
    for name in ("k-means purity train", "k-means purity test", "5-NN test", "logistic test"):
        assert 0.1 < rows[1][name] < 1
    noise = uniform_inputs(small.train, 7, seed=1)
    assert noise.shape == (7, 64)
    assert 0 <= noise.min() < noise.max() <= 1


# -- bad input -----------------------------------------------------------------------------


def test_bad_input() -> None:
    x = inputs()
    spoiled = x.copy()
    spoiled[3, 1] = np.inf
    model = deep()
    for given, complaint in (
        (spoiled, "item 3 has NaN or infinity"),
        (x[:0], "empty"),
        (x[:1], "two inputs at least"),
        (np.ones((20, 6)), "every unit is the same"),
        (x[:, :4], "does not take these inputs"),
        ("x.npy", "not a str"),
    ):
        with pytest.raises(FewbitsError, match=complaint):
            ActivationCode(model).fit(given)
    with pytest.raises(FewbitsError, match="two inputs at least"):
        ActivationCode(model).fit()
    idle = nn.Sequential(nn.Linear(6, 6), nn.ModuleDict({"act": nn.ReLU()}))
    idle.forward = lambda x: idle[0](x)  # type: ignore[method-assign]
    with pytest.raises(FewbitsError, match="none of the layers runs"):
        ActivationCode(idle).fit(x)
    encoder = ActivationCode(model).fit(x)
    for given, complaint in ((spoiled, "item 3"), (x[:0], "empty"), (x[:, :4], "does not take")):
        with pytest.raises(FewbitsError, match=complaint):
            encoder.encode(given)
    assert encoder.encode(x[:1])["bits"].shape[0] == 1
    digest = encoder.digest
    with pytest.raises(FewbitsError, match="every unit is the same"):
        encoder.fit(np.ones((20, 6)))
    assert encoder.digest == digest  # a failed fit changes nothing
    with pytest.raises(FewbitsError, match="not fitted"):
        ActivationCode(model).encode(x)


def test_inputs_of_another_size_are_refused() -> None:
    model = Convolutions()
    encoder = ActivationCode(model).fit(inputs(20, 1, 9, 9))
    with pytest.raises(FewbitsError, match=r"layer 'act' gives \(4, 10, 10\)"):
        encoder.encode(inputs(5, 1, 12, 12))
    with pytest.raises(FewbitsError, match="inputs of one size"):
        ActivationCode(model).fit(inputs(20, 1, 9, 9), inputs(20, 1, 12, 12))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"mode": "pixel"}, "mode='pixel'"),
        ({"sample_bits": 0}, "sample_bits=0"),
        ({"seed": -1}, "seed=-1"),
        ({"tokens": "middle"}, "tokens='middle'"),
        ({"batch": 0}, "batch=0"),
        ({"layers": []}, "list of different names"),
    ],
)
def test_bad_options(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(FewbitsError, match=complaint):
        ActivationCode(deep(), **options).fit(inputs())


def test_bad_choices_and_labels() -> None:
    encoder = ActivationCode(deep()).fit(inputs())
    code = encoder.encode(inputs())
    for columns in ([], [0, 0], [-1], [encoder.bits], [0.5], [[1]], 3):
        with pytest.raises(FewbitsError, match="different whole numbers"):
            encoder.keep(columns)
    for use in (lambda one: one.keep([0]), lambda one: one.all_units(), lambda one: one.digest):
        with pytest.raises(FewbitsError, match="not fitted"):
            use(ActivationCode(deep()))
    with pytest.raises(FewbitsError, match="at least 0"):
        encoder.bits_needed(code, tau=-0.1)
    with pytest.raises(FewbitsError, match="labels"):
        encoder.bits_needed(code, np.zeros(3))
    with pytest.raises(FewbitsError, match="labels"):
        bit_information(code["bits"], np.zeros(3), encoder.bits)
    packed, labels = code["bits"], np.arange(60) % 2
    for wrong, complaint in ((labels[:9], "as many labels"), (labels * 0, "too few to analyse")):
        with pytest.raises(FewbitsError, match=complaint):
            analyse(packed, wrong, packed, labels)
