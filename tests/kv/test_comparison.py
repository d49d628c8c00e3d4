"""``compare`` of caches: bytes, quality, the grid, the report, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from letters import Letters
from tiny_models import FAMILIES, tiny_model, tokens

import fewbits
from fewbits.cli import main
from fewbits.core.errors import FewbitsError
from fewbits.core.frontier import Point
from fewbits.core.report import page_text, table_text
from fewbits.kv import comparison, retrieval
from fewbits.kv._grid import BUDGETS, FITTED, ROWS, Candidate, FittedRow, Probe, candidates, known
from fewbits.kv.comparison import asked_for, compare
from fewbits.kv.evaluation import evaluate

FEW = "kivi:bits=4,group=16,recent=16,window:keep=0.5,snapkv:keep=0.25"
SIZES: dict[str, Any] = {"pieces": 3, "prompt": 64, "scored": 8}
TEXT = "the quick brown fox jumps over the lazy dog; " * 100


@pytest.fixture(scope="module")
def compared(llama: Any) -> Any:
    return compare(llama, tokens(3, 80), methods=FEW, **SIZES)


def by_spec(compared: Any) -> dict[str, Point]:
    return {point.spec: point for point in compared.points}


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(FewbitsError) as caught:
        compare(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- figures -------------------------------------------------------------------------------


def test_figures_are_those_of_the_evaluation(compared: Any, llama: Any) -> None:
    points = by_spec(compared)
    assert len(points) == 4  # the whole cache is always there
    for cost in evaluate(llama, tokens(3, 80)[:, :72], 64, list(points)):
        point = points[cost.method]
        assert point.bytes_per_item == pytest.approx(cost.bytes_per_token, abs=1e-3)
        assert point.ratio == pytest.approx(1 / cost.share, abs=1e-4)
        assert point.quality["KL"] == pytest.approx(cost.divergence, rel=1e-3, abs=1e-6)
        assert point.quality["perplexity"] == pytest.approx(cost.perplexity, abs=1e-3)
        assert point.quality["agreement"] == pytest.approx(cost.agreement, abs=1e-5)
        assert min(point.encode_per_second, point.search_per_second) > 0


def test_the_whole_cache_is_the_measure(compared: Any) -> None:
    full = by_spec(compared)["full"]
    assert (full.quality["KL"], full.quality["agreement"], full.ratio) == (0, 1, 1)
    assert full.bytes_per_item == compared.input["bytes_per_item"] == 3 * 2 * 2 * 16 * 4


def test_less_divergence_is_better(compared: Any) -> None:
    points = compared.points
    assert [p.bytes_per_item for p in points] == sorted(p.bytes_per_item for p in points)
    for point in points:
        beaten = any(
            other.bytes_per_item <= point.bytes_per_item
            and other.quality["KL"] <= point.quality["KL"]
            for other in points
            if other is not point
        )
        assert point.on_frontier == (not beaten)
    assert compared.cheapest(KL=0).spec == "full"
    assert compared.cheapest(KL=1e9).spec == "snapkv:keep=0.25"
    small = [point for point in points if point.bytes_per_item <= 384]
    assert compared.best(bytes=384) == min(small, key=lambda point: point.quality["KL"])
    with pytest.raises(FewbitsError, match="nothing that was compared keeps KL at -1"):
        compared.cheapest(KL=-1)


def test_the_whole_cache_is_read_once_per_batch(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewbits.kv import evaluation

    made: list[Any] = []
    monkeypatch.setattr(
        evaluation, "cache", lambda model, m: made.append(m) or fewbits.kv.cache(model, m)
    )
    evaluate(llama, tokens(3, 80), 64, ["full", "window"], batch=2)
    assert made == ["full", "window"] * 2


@pytest.mark.parametrize("name", [name for name in FAMILIES if name.startswith("gemma")])
def test_layers_that_slide_count_as_they_are(name: str) -> None:
    model = tiny_model(name)
    found = by_spec(
        compare(model, tokens(1, 80), methods="window:keep=0.5", **SIZES | {"pieces": 1})
    )
    probe = Probe(model, tokens(1, 64))
    assert 1 / found["window:keep=0.5"].ratio == pytest.approx(
        probe.share("window:keep=0.5"), abs=1e-3
    )


# -- the grid ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def probe(llama: Any) -> Probe:
    return Probe(llama, tokens(1, 256))


def test_the_probe_knows_the_bytes_before_the_model_runs(probe: Probe, llama: Any) -> None:
    methods = [one.spec for one in candidates([r for r in ROWS if known(r.name)], probe, (0.25,))]
    for cost in evaluate(llama, tokens(1, 258), 256, methods):
        assert probe.share(cost.method) == pytest.approx(cost.share, abs=1e-6), cost.method


@pytest.mark.parametrize("budget", BUDGETS)
def test_settings_land_at_the_budgets(probe: Probe, budget: float) -> None:
    searched = [row for row in ROWS if any("{keep}" in spec for spec in row.specs)]
    landed = {one.spec: one for one in candidates(searched, probe, (budget,))}
    assert {"window", "snapkv", "h2o", "prefixkv"} <= {one.name for one in landed.values()}
    for spec in landed:
        assert 0.75 * budget <= probe.share(spec) <= budget, spec
    assert f"window:keep={budget}" in landed


def test_chains_that_add_nothing_are_left_out(probe: Probe) -> None:
    assert probe.landing("snapkv:keep={keep}+kivi:bits=8", 0.9) is None  # all tokens fit
    assert probe.landing("snapkv:keep={keep}+kivi:recent=400", 0.25) is None  # nothing quantised
    assert probe.landing("snapkv:keep={keep}", 0.001) is None
    assert probe.landing("snapkv:keep={keep}+kivi:bits=4", 0.25) is not None


def test_every_row_of_the_grid_can_be_made() -> None:
    for row in ROWS:
        for spec in row.specs:
            made = fewbits.kv.stages(spec.format(keep=0.5))
            assert "+".join(stage.name for stage in made) == row.name


def test_a_name_stands_for_its_grid_and_a_spec_for_itself() -> None:
    rows, fitted, specs = asked_for("think,snapkv+kivi,kivi:bits=4,group=64,prefixkv")
    assert [row.name for row in rows] == ["full", "prefixkv", "think", "snapkv+kivi"]
    assert [row.name for row in fitted] == ["prefixkv"]
    assert [(one.name, one.spec) for one in specs] == [("kivi", "kivi:bits=4,group=64")]
    everything, learned, _ = asked_for(None)
    assert len(everything) == len([row for row in ROWS if known(row.name)])
    assert not any(row.trains for row in learned)


# -- methods that are fitted ---------------------------------------------------------------


def test_fitted_methods_learn_from_the_calibration_text(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def fit(model: Any, learned: Any, budgets: Any) -> dict[str, Any]:
        seen.append(learned)
        return {
            f"prefixkv:keep={b:g},fitted=FILE": fewbits.kv.stages("prefixkv")[0] for b in budgets
        }

    monkeypatch.setattr(comparison, "FITTED", (FittedRow("prefixkv", fit),))
    found = compare(
        llama, tokens(3, 80), methods="prefixkv", calibrate=tokens(8, 72, seed=5), **SIZES
    )
    assert torch.equal(seen[0], tokens(8, 72, seed=5))
    assert sum("FILE" in point.spec for point in found.points) == len(BUDGETS)
    compare(llama, TEXT, tokenizer=Letters(), methods="prefixkv", **SIZES)
    cut = TEXT[: int(0.4 * len(TEXT))]
    assert torch.equal(seen[1], fewbits_rows(cut, 8, 72))  # only the beginning of the text


def fewbits_rows(text: str, rows: int, length: int) -> Any:
    from fewbits.core.language_model import token_rows

    return token_rows(Letters(), text, rows, length)


def test_without_a_calibration_text_fitted_methods_are_left_out(llama: Any) -> None:
    found = compare(llama, tokens(3, 80), methods="prefixkv", **SIZES)
    (left,) = found.left_out
    assert left["method"] == "prefixkv"
    assert "calibration text" in left["why"]
    assert not any("FILE" in point.spec for point in found.points)


@pytest.mark.parametrize("row", [row for row in FITTED if not row.trains], ids=lambda row: row.name)
def test_rows_that_are_fitted_give_caches(row: FittedRow, llama: Any) -> None:
    if not known(row.name):
        pytest.skip(f"{row.name} is not part of this version")
    made = row.fit(llama, tokens(4, 96), (0.5,))
    assert made
    for cost in evaluate(llama, tokens(1, 68), 64, made):
        assert cost.share < 0.75
    found = [Candidate(row.name, spec, stage) for spec, stage in made.items()]
    assert all(one.simplicity == (1, 1) and one.fitted_bytes >= 0 for one in found)


def test_a_method_that_fails_does_not_cost_the_others(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("no\nroom")

    from fewbits.kv.baselines import KIVI

    monkeypatch.setattr(KIVI, "encode_keys", fail)
    found = compare(llama, tokens(3, 80), methods=FEW, **SIZES)
    assert found.left_out == [{"method": "kivi:bits=4,group=16,recent=16", "why": "no room"}]
    assert len(found.points) == 3


# -- needles -------------------------------------------------------------------------------


def test_needles_that_the_whole_cache_misses_are_not_counted(llama: Any) -> None:
    found = compare(llama, TEXT, tokenizer=Letters(), methods="window:keep=0.5", **SIZES)
    assert {row["method"] for row in found.left_out} == {"needle", "needle-aware"}
    assert all("the whole cache finds" in row["why"] for row in found.left_out)
    assert all("needle" not in point.quality for point in found.points)


def test_needles_that_it_finds_are(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def retrieve(model: Any, questions: Any, methods: Any, aware: bool) -> list[Any]:
        return [retrieval.Found(name, 1.0 if name == "full" else 0.25, {}) for name in methods]

    monkeypatch.setattr(comparison, "retrieve", retrieve)
    found = compare(llama, TEXT, tokenizer=Letters(), methods="window:keep=0.5", **SIZES)
    assert found.left_out == []
    assert by_spec(found)["window:keep=0.5"].quality["needle-aware"] == 0.25
    assert found.cheapest(needle=0.5).spec == "full"


# -- the report ----------------------------------------------------------------------------


def test_the_table_speaks_of_tokens(compared: Any) -> None:
    text = table_text(compared.to_json(), 160)
    assert text.startswith("LlamaForCausalLM: 3 layers × 2 heads × 16 float32, 768 bytes per token")
    header = next(line for line in text.splitlines() if "method" in line)
    for heading in ("bytes/token", "of full cache", "KL", "perplexity", "prompt/s", "decode/s"):
        assert heading in header
    assert "no method has less KL in fewer bytes" in text
    (row,) = [line for line in text.splitlines() if "window:keep=0.5" in line]
    assert " 384 " in row
    assert " 50 % " in row


def test_the_page_speaks_of_tokens(compared: Any) -> None:
    page = page_text(compared.to_json())
    assert "bytes per token ≤" in page
    assert "bytes per item" not in re.sub(r"<script.*?</script>", "", page, flags=re.S)
    (words,) = re.findall(r'<main data-words="(.*?)">', page)
    assert "decode/s" in words


def test_the_report_is_written(compared: Any, tmp_path: Path) -> None:
    page = compared.report(tmp_path)
    assert page.name == "report.html"
    assert {path.name for path in tmp_path.iterdir()} == {
        "comparison.json",
        "divergence.png",
        "report.html",
    }
    assert (tmp_path / "divergence.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "comparison.json").read_text())["input"]["kind"] == "kv"


def test_points_without_divergence_can_be_drawn(compared: Any) -> None:
    from fewbits.core.report_picture import png_bytes

    only = [replace(point, quality={"KL": 0.0}) for point in compared.points]
    about = {**compared.to_json(), "points": [point.to_json() for point in only]}
    assert png_bytes(about).startswith(b"\x89PNG")


# -- what is refused -----------------------------------------------------------------------


def test_unusable_sizes_and_texts_are_refused(llama: Any, tmp_path: Path) -> None:
    text = tokens(3, 80)
    assert "prompt must be a whole number of at least 16" in refusal(llama, text, prompt=8)
    assert "pieces must be" in refusal(llama, text, pieces=0)
    assert "scored must be" in refusal(llama, text, scored=1.5)
    assert "8 pieces of 72 tokens are needed" in refusal(llama, text, prompt=64, scored=8)
    assert "longer than the 512" in refusal(llama, tokens(8, 600), prompt=590, scored=8)
    assert "(pieces, tokens) int64" in refusal(llama, text.float(), **SIZES)
    assert "the text is empty" in refusal(llama, "  \n", **SIZES)
    assert "pass tokenizer=" in refusal(llama, TEXT, **SIZES)
    assert "token numbers outside 0 to 127" in refusal(llama, text + 100, **SIZES)
    assert "cannot read the text" in refusal(llama, tmp_path / "none.txt", **SIZES)
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8" in refusal(llama, tmp_path / "bad.txt", **SIZES)
    short = refusal(llama, TEXT, tokenizer=Letters(), calibrate="few", methods="prefixkv", **SIZES)
    assert short.startswith("the calibration text cannot be used: the text has 3 tokens")


def test_unknown_methods_are_refused(llama: Any) -> None:
    assert "did you mean 'kivi'" in refusal(llama, tokens(3, 80), methods="kivvi", **SIZES)
    assert "ratio=1.5" in refusal(llama, tokens(3, 80), methods="think:ratio=1.5", **SIZES)
    assert "no methods are named" in refusal(llama, tokens(3, 80), methods=[], **SIZES)
    assert "cannot do" in refusal(llama, tokens(3, 80), methods="window+kivi", **SIZES)


def test_models_that_cannot_are_refused() -> None:
    from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

    small = {"vocab_size": 128, "hidden_size": 32}
    mamba = MambaForCausalLM(MambaConfig(num_hidden_layers=2, **small))
    assert "no layer of full attention" in refusal(mamba, tokens(3, 80), methods="kivi", **SIZES)
    bloom = BloomForCausalLM(BloomConfig(n_layer=2, n_head=2, **small))
    says = refusal(bloom, tokens(3, 80), methods="kivi", **SIZES)
    assert "BloomForCausalLM" in says
    assert "is no causal language model" in refusal(object(), tokens(3, 80), **SIZES)


# -- the command line ----------------------------------------------------------------------


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    from fewbits.core.language_model import held_out_text

    (tmp_path / "words.txt").write_text(held_out_text()[:20_000], encoding="utf-8")
    return str(tmp_path / "words.txt")


def test_the_command_line_compares(
    text_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--pieces", "1", "--prompt", "64", "--scored", "4"]
    report = ["--methods", "kivi:bits=4,window:keep=0.5", "--report", str(tmp_path / "report")]
    arguments = ["compare", "reference", "--kind", "kv", "--text", text_file, *few, *report]
    assert main([*arguments, "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["input"]["name"] == f"reference on {Path(text_file).name}"
    specs = [point["spec"] for point in about["points"]]
    assert set(specs) == {"full", "kivi:bits=4", "window:keep=0.5"}
    assert (tmp_path / "report" / "report.html").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["m", "--kind", "kv"], "--kind kv needs --text"),
        (["m", "--kind", "kv", "--text", "none.txt"], "cannot read the text none.txt"),
        (["m", "--kind", "kv", "--text", "t", "--metric", "l2"], "--metric is only for"),
        (["m", "--kind", "kv", "--text", "t", "--rows", "5"], "--rows is only for"),
        (["m.npy", "--text", "t"], "--text is only for --kind kv"),
        (["m.npy", "--prompt", "9"], "--prompt is only for --kind kv"),
    ],
)
def test_the_command_line_refuses_in_one_line(
    options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fewbits: ")
    assert err.count("\n") == 1
    assert says in err
