"""Files of fitted methods: what goes in comes out, and nothing else does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_model

from fewbits.core.errors import FewbitsError
from fewbits.kv._files import (
    FORMAT,
    check_model,
    fingerprint,
    head_width,
    load_fitted,
    save_fitted,
)

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.int16)}
SETTINGS = {"keep": 0.25, "ranks": [[1, 2], [3, 4]]}


@pytest.fixture
def path(tmp_path: Path, llama: Any) -> Path:
    found = tmp_path / "new" / "fitted.safetensors"
    save_fitted(found, "some", TENSORS, SETTINGS, fingerprint(llama))
    return found


def test_what_goes_in_comes_out(path: Path, llama: Any) -> None:
    tensors, settings, model = load_fitted(path, "some")
    assert set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert settings == SETTINGS
    assert model == fingerprint(llama)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_view_is_saved_alone(tmp_path: Path, llama: Any) -> None:
    big = torch.zeros(1000, 10)
    save_fitted(tmp_path / "f", "some", {"a": big[:2].T, "b": big[:2]}, {}, fingerprint(llama))
    assert (tmp_path / "f").stat().st_size < 2000
    assert load_fitted(tmp_path / "f", "some")[0]["a"].shape == (10, 2)


def test_an_existing_file_is_kept_unless_told(path: Path, llama: Any) -> None:
    before = path.read_bytes()
    with pytest.raises(FewbitsError, match="exists"):
        save_fitted(path, "some", {}, {}, fingerprint(llama))
    assert path.read_bytes() == before
    save_fitted(path, "some", {}, {"keep": 1}, fingerprint(llama), overwrite=True)
    assert load_fitted(path, "some")[1] == {"keep": 1}


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, llama: Any) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FewbitsError, match="cannot write"):
        save_fitted(tmp_path / "file" / "inside", "some", TENSORS, {}, fingerprint(llama))
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_files_that_are_none_are_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match="cannot read"):
        load_fitted(tmp_path / "nothing", "some")
    with pytest.raises(FewbitsError, match="is of the method some, not of other"):
        load_fitted(path, "other")
    for content in (b"", b"no safetensors", path.read_bytes()[:-4]):
        (tmp_path / "bad").write_bytes(content)
        with pytest.raises(FewbitsError, match="damaged"):
            load_fitted(tmp_path / "bad", "some")


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {"format": "other"},
        {"format": FORMAT},
        {"format": FORMAT, "about": "{"},
        {"format": FORMAT, "about": "[" * 100_000},
        {"format": FORMAT, "about": "[]"},
        {"format": FORMAT, "about": json.dumps({"kind": "some", "settings": [], "model": {}})},
    ],
)
def test_files_of_others_are_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file(TENSORS, tmp_path / "bad", metadata=metadata)
    with pytest.raises(FewbitsError, match=r"bad is (damaged|no file)"):
        load_fitted(tmp_path / "bad", "some")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_none_are_refused(tmp_path: Path, llama: Any, bad: float) -> None:
    save_fitted(tmp_path / "f", "some", {"a": torch.tensor([1, bad])}, {}, fingerprint(llama))
    with pytest.raises(FewbitsError, match="a has NaN or infinity"):
        load_fitted(tmp_path / "f", "some")


# -- models --------------------------------------------------------------------------------


def test_a_model_is_known_in_every_float_type(llama: Any) -> None:
    found = fingerprint(llama)
    json.dumps(found)
    check_model(found, llama)
    check_model(found, tiny_model().to(torch.bfloat16))
    check_model(found, tiny_model().half())


def test_another_model_is_refused(llama: Any) -> None:
    found = fingerprint(llama)
    for other, says in (
        (tiny_model("mistral"), "architecture llama, but this one has mistral"),
        (tiny_model(num_hidden_layers=2), "layers 3, but this one has 2"),
        (tiny_model(num_key_value_heads=4), "key heads 2, but this one has 4"),
        (tiny_model(head_dim=8), "width of a head 16, but this one has 8"),
        (tiny_model(initializer_range=0.1, intermediate_size=100), "other weights"),
    ):
        with pytest.raises(FewbitsError, match=says):
            check_model(found, other)
    with pytest.raises(FewbitsError, match="fit it again"):
        check_model({}, llama)


def test_the_width_of_a_head_follows_where_it_is_not_given(llama: Any) -> None:
    class Config:
        hidden_size, num_attention_heads, head_dim = 64, 4, None

    assert head_width(Config()) == 16
