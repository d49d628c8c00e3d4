import gzip
from pathlib import Path

import numpy as np
import pytest

from fewbits.core.errors import FewbitsError
from fewbits.reproductions.vectors.activation_code import (
    CLUSTERED,
    CLUSTERS,
    COLLAPSE,
    OF_NETWORK,
    REDUNDANT,
    VOTED,
    chart,
    conditions,
    load_mnist,
    read_idx,
    run,
)

OWN = "digits, 60 units"
FIGURES = {
    f"{OWN}: redundancy train": 0.001,
    f"{OWN}: network test": 0.99,
    f"{OWN}: {CLUSTERED}": 0.9,
    f"{OWN}: {VOTED}": 0.97,
    f"{OWN}, Xavier start: {CLUSTERED}": 0.9,
    f"{OWN}, 0 epochs: {CLUSTERED}": 0.6,
    f"{OWN}, 0 epochs: {VOTED}": 0.89,
    f"{OWN}, 100% random labels: redundancy train": 0.0,
    f"{OWN}, 100% random labels: {CLUSTERED}": 0.65,
}
BASELINES = {
    f"digits, pixels: {CLUSTERED}": 0.79,
    f"digits, SimHash, 60 bits: {CLUSTERED}": 0.7,
    f"digits, SimHash, 60 bits: {VOTED}": 0.93,
}
WIDTHS = [{"width": 60, "redundancy train": 0.001}, {"width": 7, "redundancy train": 0.93}]


def failed(figures: dict[str, float], baselines: dict[str, float]) -> str:
    met = conditions(FIGURES | figures, BASELINES | baselines, WIDTHS)
    return "; ".join(name for name, is_met in met.items() if not is_met)


@pytest.mark.parametrize(
    ("figure", "value", "complaint"),
    [
        (f"{OWN}: redundancy train", REDUNDANT, "units leave little redundancy"),
        (f"{OWN}: network test", 0.97 + OF_NETWORK + 0.001, "close to the network"),
        (f"{OWN}, Xavier start: {CLUSTERED}", 0.789 + CLUSTERS, "far above pixels, Xavier start"),
        (f"{OWN}, 0 epochs: {VOTED}", 0.97, "9-NN is above the untrained network"),
        (f"{OWN}, 0 epochs: {CLUSTERED}", 0.901 - CLUSTERS, "K-means is far above the untrained"),
        (f"{OWN}, 100% random labels: redundancy train", REDUNDANT, "random labels leave little"),
        (f"{OWN}, 100% random labels: {CLUSTERED}", 0.901 - COLLAPSE, "cost the categories"),
        (f"digits, SimHash, 60 bits: {VOTED}", 0.97, "9-NN is above SimHash"),
        (f"digits, SimHash, 60 bits: {CLUSTERED}", 0.901 - CLUSTERS, "far above SimHash"),
        (f"digits, pixels: {CLUSTERED}", 0.901 - CLUSTERS, "far above pixels"),
    ],
)
def test_each_part_of_the_claim_can_fail(figure: str, value: float, complaint: str) -> None:
    assert failed({}, {}) == ""
    which = ({figure: value}, {}) if figure in FIGURES else ({}, {figure: value})
    assert complaint in failed(*which)


def test_redundancy_must_fall_with_width() -> None:
    risen = [*WIDTHS, {"width": 100, "redundancy train": 0.002}]
    assert not conditions(FIGURES, BASELINES, risen)["redundancy falls with every width"]


def test_quick_run_computes_its_verdict(tmp_path: Path) -> None:
    result = run("quick")
    sweep = [row for row in result.details if row["table"] == "sweep"]
    widths = [
        row
        for row in sweep
        if row["epochs"] == 5 and row["noise"] == 0 and row["start"] == "pytorch"
    ]
    assert sorted(row["width"] for row in widths) == [7, 60]
    met = conditions(result.figures, result.baselines, widths)
    assert result.holds == all(met.values())
    assert all(name in result.reason for name, is_met in met.items() if not is_met)
    assert {row["regime"] for row in sweep} <= {"under", "critical", "sufficient"}
    assert next(row for row in sweep if row["width"] == 7)["regime"] == "under"
    assert all(0 <= value <= 1 for value in result.baselines.values())
    assert chart(result.details, tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_mnist_is_read_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWBITS_DATA", str(tmp_path))
    assert load_mnist() is None
    (tmp_path / "mnist").mkdir()
    images = np.arange(8200 * 4, dtype=np.uint32).astype(np.uint8).reshape(8200, 2, 2)
    labels = (np.arange(8200) % 10).astype(np.uint8)
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
        path = tmp_path / "mnist" / f"t10k-{name}-ubyte.gz"
        path.write_bytes(gzip.compress(header + array.tobytes()))
    data = load_mnist()
    assert data is not None
    assert (data.train.shape, data.test.shape) == ((8000, 4), (200, 4))
    pairs = {
        (tuple(x), y) for x, y in zip(images.reshape(-1, 4) / np.float32(255), labels, strict=True)
    }
    assert (tuple(data.test[7]), data.test_labels[7]) in pairs
    path.write_bytes(gzip.compress(header + array.tobytes()[:-1]))
    with pytest.raises(FewbitsError, match="not an idx file"):
        read_idx(path)
