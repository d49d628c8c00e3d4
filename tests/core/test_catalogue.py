"""The catalogue: complete, consistent, and honest about what is here."""

from __future__ import annotations

import re
from collections import Counter
from itertools import groupby

import pytest

from fewbits.core import catalogue
from fewbits.core.catalogue import (
    ROOMS,
    System,
    cache_stage,
    codec_class,
    codecs,
    find,
    opponents,
    systems,
)
from fewbits.core.errors import FewbitsError, MissingExtraError

KINDS = {"codec", "cache", "weights", "measure", "layer", "model"}
EXTRAS = {"", "torch", "kv", "weights", "media", "tables", "measures"}
PAPERS_PER_ROOM = {
    "vectors": 7,
    "kv": 7,
    "weights": 10,
    "media": 13,
    "fields": 4,
    "tables": 6,
    "sequences": 10,
    "latents": 7,
    "memory": 4,
    "measures": 10,
}
ROWS = (*systems(), *opponents())

each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


def made_up(extra: str = "torch") -> System:
    return System("made-up", "Title", "", "vectors", "codec", "Does it.", "fewbits.x.y:Z", extra)


def test_seventy_eight_papers_in_their_rooms() -> None:
    assert len(systems()) == 78
    assert Counter(row.room for row in systems()) == PAPERS_PER_ROOM


def test_papers_follow_the_order_of_rooms_then_names() -> None:
    rooms = [room for room, _ in groupby(systems(), key=lambda row: row.room)]
    assert rooms == list(ROOMS)
    for _, rows in groupby(systems(), key=lambda row: row.room):
        names = [row.name for row in rows]
        assert names == sorted(names)


def test_nothing_stands_twice() -> None:
    papers = [row for row in ROWS if row.arxiv]
    for values in (
        [row.name for row in ROWS],
        [row.title for row in ROWS],
        [row.path for row in ROWS],
        [row.summary for row in ROWS],
        [row.arxiv for row in papers],
    ):
        assert [value for value, count in Counter(values).items() if count > 1] == []


def test_every_paper_has_an_arxiv_number() -> None:
    assert [row.name for row in systems() if not row.arxiv] == []


def test_known_numbers_are_right() -> None:
    assert find("muvera").arxiv == "2405.19504"
    assert find("simvq").arxiv == "2411.02038"
    assert find("rabitq").arxiv == "2405.12497"
    assert find("turboquant").arxiv == "2504.19874"


@each_row
def test_row_is_well_formed(row: System) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", row.name)
    assert row.title
    assert row.title == row.title.strip()
    assert "  " not in row.title
    assert row.arxiv == "" or re.fullmatch(r"\d\d(0[1-9]|1[0-2])\.\d{4,5}", row.arxiv)
    assert row.room in ROOMS
    assert row.kind in KINDS
    assert row.extra in EXTRAS
    assert 0 < len(row.summary) <= 90
    assert row.summary.endswith(".")
    assert row.summary.isprintable()


@each_row
def test_path_follows_from_room_and_name(row: System) -> None:
    module, _, attribute = row.path.partition(":")
    files = [row.name.replace("-", "_"), *(["baselines"] if row in opponents() else [])]
    if row.name == "pca":  # MatryoshkaKV begins with it
        files.append("matryoshkakv")
    assert module in [f"fewbits.{row.room}.{file}" for file in files]
    assert module == row.module
    assert attribute.isidentifier()
    assert attribute[0].islower() == (row.kind == "measure")


@pytest.mark.parametrize("room", ROOMS)
def test_exported_names_of_a_room_do_not_collide(room: str) -> None:
    """A room exports the attributes by name, beside its modules."""
    rows = [row for row in ROWS if row.room == room]
    attributes = [row.path.partition(":")[2] for row in rows]
    assert len(set(attributes)) == len(attributes)
    assert not {row.module.rpartition(".")[2] for row in rows} & set(attributes)


def test_opponents_are_codecs_of_the_core() -> None:
    names = ["float16", "int8", "sign", "pq", "opq", "rabitq", "turboquant", "itq", "lsh"]
    rows = [row for row in opponents() if row.room == "vectors"]
    assert [row.name for row in rows] == names
    assert {(row.kind, row.extra, row.status) for row in rows} == {("codec", "", "available")}


def test_opponents_of_caches_are_caches() -> None:
    rows = [row for row in opponents() if row.room == "kv"]
    assert [row.name for row in rows] == ["full", "window", "snapkv", "h2o", "kivi", "pca", "saq"]
    assert {(row.kind, row.extra) for row in rows} == {("cache", "kv")}
    assert [cache_stage(row.name).name for row in rows] == [row.name for row in rows]
    with pytest.raises(FewbitsError, match="pq is a codec, not a way to compress KV caches"):
        cache_stage("pq")


@pytest.mark.parametrize(
    "row", [row for row in ROWS if row.status == "available"], ids=lambda row: row.name
)
def test_available_row_loads(row: System) -> None:
    assert callable(row.load())
    if row.kind == "codec" and row.room == "vectors":
        assert codec_class(row.name).name == row.name


def test_find_returns_papers_and_opponents() -> None:
    assert find("pca-rag").path == "fewbits.vectors.pca_rag:PCARAG"
    assert find("pq").path == "fewbits.vectors.baselines:PQ"


@pytest.mark.parametrize(("typed", "meant"), [("muvra", "muvera"), ("turboquand", "turboquant")])
def test_unknown_name_suggests_the_nearest(typed: str, meant: str) -> None:
    with pytest.raises(FewbitsError, match=f"did you mean '{meant}'"):
        find(typed)


def test_unknown_name_without_a_near_one() -> None:
    with pytest.raises(FewbitsError, match="unknown method 'qqqqqqqq'") as caught:
        find("qqqqqqqq")
    assert "did you mean" not in str(caught.value)
    assert "fewbits systems" in str(caught.value)


def test_what_is_no_codec_cannot_encode() -> None:
    with pytest.raises(FewbitsError, match="think is a cache, not a codec"):
        codec_class("think")


def test_planned_row_does_not_load() -> None:
    row = made_up()
    assert row.status == "planned"
    with pytest.raises(FewbitsError, match="made-up is planned"):
        row.load()


def test_status_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    here: set[str] = set()
    monkeypatch.setattr(catalogue, "installed", here.__contains__)
    row = made_up()
    assert row.status == "planned"
    here.add("fewbits.x.y")
    assert (row.status, row.missing_packages) == ("needs fewbits[torch]", ["torch"])
    with pytest.raises(MissingExtraError, match=r"needs torch; .*'fewbits\[torch\]'"):
        row.load()
    here.add("torch")
    assert (row.status, row.missing_packages) == ("available", [])
    assert made_up(extra="").status == "available"


def test_codecs_lists_what_is_written_opponents_first(monkeypatch: pytest.MonkeyPatch) -> None:
    written = {"fewbits.vectors.baselines", "fewbits.vectors.bebr"}
    monkeypatch.setattr(catalogue, "installed", written.__contains__)
    rows = codecs("vectors")
    assert rows == [*(row for row in opponents() if row.room == "vectors"), find("bebr")]
    assert rows[-1].status == "needs fewbits[torch]"
    assert codecs("kv") == []


def test_installed_answers_without_importing() -> None:
    assert catalogue.installed("json")
    assert not catalogue.installed("no_such_package_at_all")
    assert not catalogue.installed("no_such_package_at_all.part")
