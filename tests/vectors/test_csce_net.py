import contextlib
import io
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from PIL import Image

from fewbits.core import container
from fewbits.core.catalogue import find
from fewbits.core.errors import FewbitsError
from fewbits.primitives.bits import unpack
from fewbits.primitives.hamming import pairwise_hamming
from fewbits.primitives.image_folder import image_folder, image_list
from fewbits.vectors import _csce_network as network
from fewbits.vectors.csce_net import CSCENet, HashHead, HashModel, class_targets, hash_retrieval

LABELS = np.arange(24) % 3


def pictures(rows: int = 24, side: int = 32, seed: int = 0) -> np.ndarray:
    """Noise that is brighter in the colour of its class, row % 3."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 160, (rows, side, side, 3)).astype(np.uint8)
    images[np.arange(rows), :, :, np.arange(rows) % 3] += 80
    return images


def tiny(**options: Any) -> CSCENet:
    return CSCENet.small(**{"bits": 16, "epochs": 2, "batch": 8, "device": "cpu", **options})


def vectors(rows: int = 90, seed: int = 0) -> np.ndarray:
    """Three classes, row % 3, around corners of a cube in 12 dimensions."""
    rng = np.random.default_rng(seed)
    corners = 3 * np.sign(np.random.default_rng(99).standard_normal((3, 12)))
    return (corners[np.arange(rows) % 3] + rng.standard_normal((rows, 12))).astype(np.float32)


@pytest.fixture(scope="module")
def trained() -> CSCENet:
    return tiny(epochs=12, held_out=0.0, dead_zone=0.05).fit(pictures(), LABELS)


def weights(model: HashModel) -> dict[str, np.ndarray]:
    return network.state_of(model.network_)


def same_weights(one: HashModel, other: HashModel) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


# -- codes: card item 14 -------------------------------------------------------------------


def test_codes_are_the_dynamic_signs_with_what_is_needed_to_judge_them(trained: CSCENet) -> None:
    images = pictures(50, seed=1)
    code, v = trained.encode(images), trained.pre_activations(images)
    assert {name: (a.shape, a.dtype.name) for name, a in code.arrays.items()} == {
        "bits": ((50, 2), "uint8"),
        "threshold": ((50,), "float32"),
        "ambiguous": ((50,), "uint16"),
    }
    assert code.bytes_per_item == 2 + 4 + 2
    t = code["threshold"]
    assert (np.abs(t) <= 0.05 + 1e-6).all()
    signs = network.dynamic_sign(torch.from_numpy(v), torch.from_numpy(t)).numpy()
    assert (unpack(code["bits"], 16, 1) == (signs > 0)).all()
    assert (code["ambiguous"] == (np.abs(v) < t[:, None]).sum(axis=1)).all()
    assert code["ambiguous"].any()


def test_a_consistent_zone_is_half_as_wide(trained: CSCENet) -> None:
    images = pictures(60, seed=1)
    other = tiny(dead_zone=0.05, consistent=True)
    other.scores_, other.about_ = {}, {}
    other._keep(trained.network_, {})
    v, t = trained.pre_activations(images), trained.encode(images)["threshold"]
    code = other.encode(images)
    assert (code["ambiguous"] == (np.abs(v) < t[:, None] / 2).sum(axis=1)).all()
    assert code["ambiguous"].sum() < trained.encode(images)["ambiguous"].sum()
    squashed = torch.from_numpy(np.clip(2 * v, -1, 1))
    signs = network.dynamic_sign(squashed, torch.from_numpy(t)).numpy()
    assert (unpack(code["bits"], 16, 1) == (signs > 0)).all()


@pytest.mark.parametrize(("dsf", "threshold"), [("off", 0.0), ("fixed", 0.01)])
def test_thresholds_without_a_head(dsf: Any, threshold: float) -> None:
    code = tiny(dsf=dsf, epochs=1, held_out=0.0).fit(pictures(), LABELS).encode(pictures())
    assert (code["threshold"] == np.float32(threshold)).all()


def test_faiss_and_search_find_the_same(trained: CSCENet) -> None:
    images, queries = pictures(40, seed=1), pictures(6, seed=2)
    code, asked = trained.encode(images), trained.encode(queries)
    distances, rows = trained.search(code, queries, k=5)
    index = faiss.IndexBinaryFlat(16)
    index.add(np.ascontiguousarray(code["bits"]))
    assert (index.search(np.ascontiguousarray(asked["bits"]), 5)[0] == distances).all()
    all_of_them = pairwise_hamming(asked["bits"], code["bits"])
    assert (np.take_along_axis(all_of_them, rows, axis=1) == distances).all()
    assert (trained.search(code, asked, k=5)[1] == rows).all()


def test_an_image_is_encoded_alike_in_any_company(trained: CSCENet) -> None:
    images = pictures(20, seed=1)
    v = trained.pre_activations(images)
    alone = np.concatenate([trained.pre_activations(images[i : i + 1]) for i in range(20)])
    np.testing.assert_allclose(v, alone, atol=1e-4)


# -- learning ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"branches": False},
        {"aie": "off", "dsf": "off"},
        {"aie": "exact", "dsf": "ste"},
        {"dsf": "fixed", "margin_kind": "cos", "quantization": "l1"},
        {"quantization": "l2", "margin_deviation": 0.0},
    ],
)
def test_every_variant_learns_what_is_easy(options: dict[str, Any]) -> None:
    model = tiny(epochs=8, held_out=0.0, learning_rate=3e-3, **options).fit(pictures(), LABELS)
    asked, held = model.encode(pictures(30, seed=1)), model.encode(pictures(60, seed=2))
    found = hash_retrieval(asked["bits"], np.arange(30) % 3, held["bits"], np.arange(60) % 3)
    assert found["mAP"] > 0.9


def test_the_published_threshold_stays_where_it_started() -> None:
    paper, ste = (
        tiny(dsf=dsf, epochs=3, held_out=0.0, optimizer="rmsprop", weight_decay=0.1, dead_zone=9.0)
        .fit(pictures(), LABELS)
        .network_.threshold.weight
        for dsf in ("paper", "ste")
    )
    start = tiny(epochs=0, held_out=0.0).fit(pictures(), LABELS).network_.threshold.weight
    assert torch.equal(paper, start)
    assert not torch.equal(ste, start)


def test_the_seed_decides_everything() -> None:
    options = {"held_out": 0.0, "resize": 40}
    one, same = (tiny(**options).fit(pictures(), LABELS) for _ in range(2))
    other = tiny(**options, seed=1).fit(pictures(), LABELS)
    assert same_weights(one, same)
    assert one.digest == same.digest != other.digest
    assert not same_weights(one, other)


def test_names_numbers_and_columns_are_labels() -> None:
    names = np.array(["c", "a", "b"])[LABELS]
    assert class_targets(names, 24).tolist() == np.array([2, 0, 1])[LABELS].tolist()
    assert class_targets(list(10 * LABELS), 24).tolist() == LABELS.tolist()
    columns = np.eye(3, dtype=bool)[LABELS]
    assert class_targets(columns, 24).dtype == np.float32
    columns[:, 0] |= columns[:, 1]
    model = tiny(epochs=12, learning_rate=3e-3).fit(pictures(), columns)
    held = model.encode(pictures(60, seed=1))
    shown = np.eye(3)[np.arange(60) % 3]
    shown[:, 0] += shown[:, 1]
    assert hash_retrieval(held["bits"], shown, held["bits"], shown)["mAP"] > 0.9
    assert set(model.scores_) == {5, 10, 12}


# -- the best epoch ------------------------------------------------------------------------


def test_the_best_epoch_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float] = []
    monkeypatch.setattr(CSCENet, "_score", lambda *unused: given.pop(0))
    options = {"check_every": 1, "held_out": 0.25}
    given[:] = [0.2, 0.7, 0.7, 0.1]  # of equals the first
    best = tiny(epochs=4, **options).fit(pictures(), LABELS)
    assert best.scores_ == {1: 0.2, 2: 0.7, 3: 0.7, 4: 0.1}
    given[:] = [0.1, 0.2]
    assert same_weights(best, tiny(epochs=2, **options).fit(pictures(), LABELS))
    given[:] = [0.1, 0.2, 0.3]
    assert not same_weights(best, tiny(epochs=3, **options).fit(pictures(), LABELS))


def test_scores_are_the_retrieval_of_images_not_trained_on(trained: CSCENet) -> None:
    images, rows = pictures(40, seed=1), np.array([3, 8, 9, 20, 21, 30])
    labels = np.arange(40) % 3
    found = trained._score(trained.network_, trained._inputs(images), labels, rows)
    packed = trained.encode(images[rows])["bits"]
    distances = pairwise_hamming(packed)
    wanted = []
    for i, row in enumerate(rows):
        others = [j for j in np.argsort(distances[i], kind="stable") if j != i]
        hits = np.array([labels[rows[j]] == labels[row] for j in others])
        ranks = np.flatnonzero(hits) + 1
        wanted.append(np.mean(np.arange(1, len(ranks) + 1) / ranks) if len(ranks) else 0.0)
    assert found == pytest.approx(np.mean(wanted))


def test_an_interrupted_training_goes_on_to_the_same_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = {"epochs": 4, "check_every": 1, "held_out": 0.25}
    given = [0.5, 0.6, 0.4, 0.3]
    calls: list[int] = []

    def score(*unused: Any) -> float:
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return given[(len(calls) - 1) % 4]

    monkeypatch.setattr(CSCENet, "_score", score)
    whole = tiny(**options).fit(pictures(), LABELS)
    checkpoint = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):  # in its third epoch: the best one is behind it
        tiny(**options).fit(pictures(), LABELS, checkpoint=checkpoint)
    with pytest.raises(FewbitsError, match="another run"):
        tiny(**options).fit(pictures(seed=5), LABELS, checkpoint=checkpoint)
    resumed = tiny(**options).fit(pictures(), LABELS, checkpoint=checkpoint)
    assert not checkpoint.exists()
    assert resumed.scores_ == {4: 0.3}
    assert same_weights(whole, resumed)


# -- folders and lists ---------------------------------------------------------------------


def test_folders_and_lists_give_what_arrays_give(tmp_path: Path) -> None:
    images = pictures(side=36)
    for row, image in enumerate(images):
        folder = tmp_path / "photos" / "rgb"[LABELS[row]]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{row:02}.png")
    files = image_folder(tmp_path / "photos")
    order = [int(path.stem) for path in files.paths]
    options = {"held_out": 0.0, "epochs": 1}
    from_folder = tiny(**options).fit(tmp_path / "photos")
    from_array = tiny(**options).fit(images[order], files.labels)
    assert same_weights(from_folder, from_array)
    code = from_folder.encode(files)
    assert (code["bits"] == from_array.encode(images[order])["bits"]).all()
    lines = [
        f"{path.relative_to(tmp_path)} {' '.join('1' if c == label else '0' for c in range(3))}\n"
        for path, label in zip(files.paths, files.labels, strict=True)
    ]
    (tmp_path / "list.txt").write_text("".join(lines))
    listed = tiny(**options).fit(image_list(tmp_path / "list.txt"))
    assert listed.encode(images).arrays["bits"].shape == (24, 2)
    named = tiny(**options).fit(files, np.array(["r", "g", "b"])[LABELS[order]])
    assert same_weights(named, from_folder)


def test_grey_images_of_any_size_are_taken(trained: CSCENet) -> None:
    grey = pictures(6, side=50)[..., 0]
    code = trained.encode(grey)
    repeated = trained.encode(np.repeat(grey[..., None], 3, axis=3))
    assert (code["bits"] == repeated["bits"]).all()


def test_a_damaged_image_is_named(tmp_path: Path, trained: CSCENet) -> None:
    (tmp_path / "broken.png").write_text("nothing")
    with pytest.raises(FewbitsError, match=r"broken\.png cannot be read"):
        trained.encode(tmp_path)
    with pytest.raises(FewbitsError, match="give labels, or a folder per class"):
        tiny().fit(tmp_path)


# -- backbones of transformers -------------------------------------------------------------


def resnet_folder(folder: Path, **settings: Any) -> Any:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 36, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        **settings,
    )
    model = ResNetForImageClassification(config)
    model.save_pretrained(folder)
    return model


LARGER = {"size": 96, "resize": 96, "windows": (1, 2), "epochs": 1, "held_out": 0.0}


def test_a_resnet_from_a_folder_keeps_its_weights(tmp_path: Path) -> None:
    model = resnet_folder(tmp_path / "resnet")
    made = tiny(backbone=str(tmp_path / "resnet"), **LARGER | {"epochs": 0})
    made.fit(pictures(side=96), LABELS)
    inside = made.network_.features.backbone.model
    kept, wanted = inside.encoder.state_dict(), model.resnet.encoder.state_dict()
    assert all(torch.equal(kept[name], wanted[name]) for name in wanted)
    before, last = made.network_.features.backbone(torch.zeros(2, 3, 96, 96))
    assert (before.shape, last.shape) == ((2, 36, 6, 6), (2, 64, 3, 3))
    assert made.network_.features.join.channels == 36


def test_a_backbone_is_trained_saved_and_read_without_its_folder(tmp_path: Path) -> None:
    resnet_folder(tmp_path / "resnet")
    model = tiny(backbone=str(tmp_path / "resnet"), **LARGER).fit(pictures(side=96), LABELS)
    path = model.save(tmp_path / "model.fewbits")
    (tmp_path / "resnet").rename(tmp_path / "elsewhere")
    again = CSCENet.load(path, device="cpu")
    images = pictures(10, side=96, seed=1)
    assert (again.encode(images)["bits"] == model.encode(images)["bits"]).all()
    assert again.digest == model.digest


def test_a_convnext_is_a_backbone_too(tmp_path: Path) -> None:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[8, 12, 16, 24], depths=[1, 1, 1, 1])
    ConvNextForImageClassification(config).save_pretrained(tmp_path)
    model = tiny(backbone=str(tmp_path), **LARGER).fit(pictures(side=96), LABELS)
    assert model.encode(pictures(3, side=96))["bits"].shape == (3, 2)


def test_what_is_no_backbone_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(FewbitsError, match="is no backbone"):
        tiny(backbone=str(tmp_path / "bert"), **LARGER).fit(pictures(), LABELS)
    (tmp_path / "empty").mkdir()
    for name in (tmp_path / "empty", tmp_path / "missing"):
        with pytest.raises(FewbitsError, match="cannot load the backbone"):
            tiny(backbone=str(name), **LARGER).fit(pictures(), LABELS)


def test_a_backbone_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    resnet_folder(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if "stages.3" in name))
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(FewbitsError, match="lacks 1 weights, such as"):
        tiny(backbone=str(tmp_path), **LARGER).fit(pictures(), LABELS)


@pytest.mark.parametrize(
    "about",
    [
        {"model_type": "resnet", "hidden_sizes": [2**20] * 4},
        {"model_type": "bert"},
        {"model_type": "none of these"},
        {},
    ],
)
def test_a_false_description_builds_nothing(about: dict[str, Any]) -> None:
    with pytest.raises((ValueError, KeyError, TypeError)):
        network.described_backbone(about)


# -- files ---------------------------------------------------------------------------------


def test_a_model_survives_its_file(trained: CSCENet, tmp_path: Path) -> None:
    path = trained.save(tmp_path / "net.fewbits")
    again = CSCENet.load(path)
    assert same_weights(trained, again)
    assert (again.spec, again.digest) == (trained.spec, trained.digest)
    assert again.windows == (2, 3)
    images = pictures(9, seed=3)
    code = trained.encode(images)
    assert (again.encode(images)["bits"] == code["bits"]).all()
    assert (again.search(code, images[:2], 3)[1] == trained.search(code, images[:2], 3)[1]).all()
    with pytest.raises(FewbitsError, match="exists already"):
        trained.save(path)


def test_codes_survive_their_file(trained: CSCENet, tmp_path: Path) -> None:
    path, images = tmp_path / "photos.fewbits", pictures(30, seed=3)
    code = trained.encode(images, to=path)
    again = trained.read_code(path)
    assert all((again[name] == code[name]).all() for name in code.arrays)
    assert (trained.search(again, images[:4], 1)[0] == 0).all()
    with pytest.raises(FewbitsError, match="exists already"):
        trained.encode(images, to=path)
    assert len(trained.encode(images[:5], to=path, overwrite=True)) == 5
    other = tiny(epochs=1).fit(pictures(), LABELS)
    with pytest.raises(FewbitsError, match="holds no codes of this model"):
        other.read_code(path)
    with pytest.raises(FewbitsError, match="another model"):
        other.search(code, images[:4], 1)
    with pytest.raises(FewbitsError, match="does not hold codes of 16 bits"):
        trained.read_code(trained.save(tmp_path / "net.fewbits"))


def broken(path: Path, to: Path, change: Any) -> Path:
    """The file with something changed, and digests that fit."""
    content = container.read(path)
    about, arrays = dict(content.about), {n: np.array(a) for n, a in content.arrays.items()}
    change(about["csce-net"], arrays)
    return container.write(to, content.kind, about, arrays)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda about, arrays: about["options"].update(bits=12), "multiple of 8"),
        (lambda about, arrays: about["options"].update(bits=24), "must be torch.float32"),
        (lambda about, arrays: about["options"].update(bits=2**40), "from 8 to 4096"),
        (lambda about, arrays: about["options"].update(size=10**6), "size=1000000 must be"),
        (lambda about, arrays: about["options"].update(channels=36 * 10**7), "must be torch"),
        (lambda about, arrays: about["options"].update(windows=[2, 9]), "does not fit|multiple"),
        (lambda about, arrays: about["options"].update(dsf="other"), "must be off or paper"),
        (lambda about, arrays: about["options"].update(seed=3), "does not match its digest"),
        (lambda about, arrays: about["options"].update(nothing=3), "unexpected keyword"),
        (lambda about, arrays: about.pop("options"), "usable"),
        (lambda about, arrays: arrays.pop("code.bias"), "not those of its network"),
        (lambda about, arrays: arrays["code.bias"].fill(np.nan), "NaN or infinity"),
        (lambda about, arrays: arrays["code.bias"].fill(0), "does not match its digest"),
        (
            lambda about, arrays: arrays.update({"code.bias": arrays["code.bias"][:8]}),
            "must be torch.float32",
        ),
        (
            lambda about, arrays: arrays.update({"code.bias": np.zeros(16, np.int64)}),
            "must be torch.float32",
        ),
    ],
)
def test_a_false_file_is_refused(
    trained: CSCENet, tmp_path: Path, change: Any, complaint: str
) -> None:
    path = broken(trained.save(tmp_path / "net.fewbits"), tmp_path / "false.fewbits", change)
    with pytest.raises(FewbitsError, match=complaint):
        CSCENet.load(path)


def test_files_of_other_things_are_refused(trained: CSCENet, tmp_path: Path) -> None:
    path = trained.save(tmp_path / "net.fewbits")
    with pytest.raises(FewbitsError, match="does not hold a csce-net-head model"):
        HashHead.load(path)
    damaged = tmp_path / "damaged.fewbits"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(FewbitsError, match="damaged"):
        CSCENet.load(damaged)


# -- vectors -------------------------------------------------------------------------------


def test_a_head_on_vectors_learns_and_survives_its_file(tmp_path: Path) -> None:
    head = HashHead(bits=24, epochs=20, batch=10, device="cpu").fit(vectors(), np.arange(90) % 3)
    asked, held = head.encode(vectors(30, seed=1)), head.encode(vectors(60, seed=2))
    found = hash_retrieval(asked["bits"], np.arange(30) % 3, held["bits"], np.arange(60) % 3)
    assert found["mAP"] > 0.95
    assert held["bits"].shape == (60, 3)
    again = HashHead.load(head.save(tmp_path / "head.fewbits"), device="cpu")
    assert (again.encode(vectors(60, seed=2))["bits"] == held["bits"]).all()
    assert (again.search(held, vectors(60, seed=2)[:3], 1)[0] == 0).all()
    shift = head.pre_activations(vectors(5))
    features = head.network_.features
    np.testing.assert_allclose(features.mean, vectors().mean(axis=0), atol=1e-5)
    assert np.isfinite(shift).all()


def test_neither_scale_nor_origin_of_vectors_matters() -> None:
    options = {"bits": 16, "epochs": 3, "batch": 10, "device": "cpu", "held_out": 0.0}
    labels = np.arange(90) % 3
    plain = HashHead(**options).fit(vectors(), labels)
    moved = HashHead(**options).fit(vectors() * 1024 + 512, labels)
    np.testing.assert_allclose(
        plain.pre_activations(vectors()), moved.pre_activations(vectors() * 1024 + 512), atol=0.02
    )


# -- measures ------------------------------------------------------------------------------


def test_retrieval_is_what_papers_on_hashing_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    queries, rows = (rng.integers(0, 256, (n, 1)).astype(np.uint8) for n in (9, 40))
    asked, held = rng.integers(0, 4, 9), rng.integers(0, 3, 40)  # nothing has class 3
    asked[0] = 3
    distances = pairwise_hamming(queries, rows)
    precisions, recalls, near = [], [], []
    for i in range(9):
        order = np.argsort(distances[i], kind="stable")
        hits = held[order] == asked[i]
        top = hits[:12]
        ranks = np.flatnonzero(top) + 1
        precisions.append(np.mean(np.arange(1, len(ranks) + 1) / ranks) if len(ranks) else 0.0)
        recalls.append(hits[:5].sum() / max(hits.sum(), 1))
        within = distances[i] <= 2
        near.append((held[within] == asked[i]).mean() if within.any() else 0.0)
    for cells in (4_000_000, 1):
        monkeypatch.setattr("fewbits.vectors.csce_net.BLOCK_CELLS", cells)
        found = hash_retrieval(queries, asked, rows, held, cut=12, k=5)
        assert list(found) == ["mAP", "recall@5", "precision within 2"]
        wanted = [np.mean(values) for values in (precisions, recalls, near)]
        assert list(found.values()) == pytest.approx(wanted)


def test_retrieval_refuses_what_does_not_pair_up() -> None:
    codes, labels = np.zeros((4, 2), np.uint8), np.arange(4)
    for given in (
        (codes, labels[:3], codes, labels),
        (codes, labels, codes, labels[:3]),
        (codes, labels, codes[:, :1], labels),
        (codes, labels, codes[:0], labels[:0]),
        (codes, np.eye(4), codes, labels),
    ):
        with pytest.raises(FewbitsError, match="hash_retrieval"):
            hash_retrieval(*given)
    for options in ({"cut": 0}, {"k": 0}):
        with pytest.raises(FewbitsError, match="at least 1"):
            hash_retrieval(codes, labels, codes, labels, **options)


# -- bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"bits": 12}, "multiple of 8"),
        ({"bits": 0}, "multiple of 8"),
        ({"bits": 16.0}, "bits must be a whole number"),
        ({"size": "32"}, "size must be a whole number"),
        ({"resize": 4096}, "which is at most 2048"),
        ({"batch": 1}, "batch=1 must be at least 2"),
        ({"held_out": 1.0}, "held_out below 1"),
        ({"held_out": -0.1}, "held_out=-0.1 must be at least 0"),
        ({"margin": float("nan")}, "margin must be finite"),
        ({"scale": 0.0}, "scale=0.0 must be positive"),
        ({"learning_rate": float("inf")}, "must be positive"),
        ({"dead_zone": float("nan")}, "must be at least 0"),
        ({"dsf": "learned"}, "dsf='learned' must be off or paper or fixed or ste"),
        ({"dsf": "ste", "dead_zone": 0.0}, "needs a dead_zone"),
        ({"aie": "on"}, "aie='on' must be"),
        ({"margin_kind": "sine"}, "must be arc or cos"),
        ({"quantization": "l3"}, "must be cs or l1 or l2"),
        ({"optimizer": "sgd"}, "must be rmsprop or adam"),
        ({"size": 16, "resize": 16}, "size=16 must be at least 32"),
        ({"resize": 31}, "at most resize=31"),
        ({"windows": ()}, "windows"),
        ({"windows": (0, 2)}, "windows"),
        ({"seed": -1}, "seed"),
        ({"device": "nowhere"}, "device nowhere"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(FewbitsError, match=complaint):
        tiny(**options).fit(pictures(), LABELS)


@pytest.mark.parametrize(
    ("images", "labels", "complaint"),
    [
        (pictures().astype(np.float32), LABELS, "images are uint8"),
        (pictures()[0], LABELS, "one per item \\(32\\)"),
        (pictures()[:0], LABELS[:0], "no images"),
        (pictures()[:1], LABELS[:1], "all labels are the same"),
        (pictures(2), LABELS[:2], "leaves 1 to train on|held_out"),
        (pictures(), LABELS[:5], "one per item \\(24\\)"),
        (pictures(), None, "learns from labels"),
        (pictures(), 0 * LABELS, "all labels are the same"),
        (pictures(), LABELS + 0.5, "whole numbers or names"),
        (pictures(), np.full(24, np.nan), "whole numbers or names"),
        (pictures(), np.eye(3)[LABELS] * 2, "are 0 or 1"),
        (pictures(), np.ones((24, 1)), "one column"),
        (pictures(), np.eye(24)[:, :20], "row 20 has no label"),
        (pictures(), np.zeros((24, 2, 2)), "one per item"),
    ],
)
def test_unusable_images_and_labels_are_refused(
    images: np.ndarray, labels: Any, complaint: str
) -> None:
    with pytest.raises(FewbitsError, match=complaint):
        tiny(held_out=0.5 if len(images) == 2 else 0.1).fit(images, labels)


@pytest.mark.parametrize(
    ("x", "complaint"),
    [
        (np.full((6, 3), np.nan), "NaN"),
        (np.full((6, 3), np.inf), "NaN, infinity"),
        (np.ones((6, 3)), "all the same"),
        (np.empty((0, 3)), "empty"),
        (np.ones(6), "2 axes"),
        (np.array([["a"] * 3] * 6), "dtype"),
    ],
)
def test_unusable_vectors_are_refused(x: np.ndarray, complaint: str) -> None:
    with pytest.raises(FewbitsError, match=complaint):
        HashHead(16, held_out=0.0).fit(x, np.arange(6) % 2)


def test_constant_images_give_one_code() -> None:
    images = np.full((24, 32, 32, 3), 7, dtype=np.uint8)
    code = tiny(held_out=0.0).fit(images, LABELS).encode(images)
    assert len(np.unique(code["bits"], axis=0)) == 1


def test_nothing_is_done_before_fitting_and_with_other_vectors(tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match="not fitted yet"):
        tiny().encode(pictures())
    with pytest.raises(FewbitsError, match="not fitted yet"):
        HashHead().save(tmp_path / "x.fewbits")
    head = HashHead(16, epochs=1, device="cpu").fit(vectors(), np.arange(90) % 3)
    with pytest.raises(FewbitsError, match="fitted on 12 dimensions, but these vectors have 11"):
        head.encode(vectors()[:, 1:])
    with pytest.raises(FewbitsError, match="the collection has only 90 rows"):
        head.search(head.encode(vectors()), vectors()[:1], k=91)


def test_more_classes_than_bits_have_centres_for_are_refused() -> None:
    labels = np.arange(300) // 2
    x = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    with pytest.raises(FewbitsError, match=r"csce-net-head: 150 classes .* take more bits"):
        HashHead(8, held_out=0.0, epochs=1, device="cpu").fit(x, labels)


def test_the_catalogue_has_it_and_training_is_quiet() -> None:
    assert find("csce-net").load() is CSCENet
    assert (CSCENet().batch, CSCENet().optimizer, CSCENet().learning_rate) == (50, "rmsprop", 1e-5)
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        tiny(epochs=1).fit(pictures(), LABELS, progress=True)
    assert shown.getvalue() == ""
