"""The report's table, picture and files; test_report_page.py opens the page in a browser."""

from __future__ import annotations

import errno
import html
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fewbits.core import report, report_text
from fewbits.core.errors import FewbitsError
from fewbits.core.report import draw_png, page_text, print_table, table_text, write_report

HOSTILE = "</script><img src=x onerror=alert(1)> & [red]$x^2 \x1b[31m"
NAMES = ("comparison.json", "recall.png", "report.html")


@pytest.fixture
def example() -> dict[str, Any]:
    """A made-up comparison of 37 points."""
    path = Path(__file__).with_name("comparison_example.json")
    return dict(json.loads(path.read_text()))


@pytest.fixture
def empty(example: dict[str, Any]) -> dict[str, Any]:
    return {**example, "points": []}


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves the time to draw, where the picture is not what is tested."""
    monkeypatch.setattr(report, "png_bytes", lambda comparison: b"picture")


def embedded(page: str) -> Any:
    data = re.search(r'<script type="application/json" id="comparison">(.*?)</script>', page, re.S)
    assert data is not None
    return json.loads(data[1])


# -- figures as text -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (report_text.count_text, 1536.0, "1,536"),
        (report_text.count_text, 17.75, "17.75"),
        (report_text.count_text, 100, "100"),
        (report_text.count_text, None, "–"),
        (report_text.ratio_text, 32.0, "32×"),
        (report_text.ratio_text, 10.67, "10.7×"),
        (report_text.ratio_text, 1234.5, "1,234×"),
        (report_text.size_text, 0, "0 B"),
        (report_text.size_text, 393216, "384 KiB"),
        (report_text.size_text, 1.5 * 2**20, "1.5 MiB"),
        (report_text.size_text, 3 * 2**40, "3072 GiB"),
        (report_text.rate_text, 41, "41"),
        (report_text.rate_text, 5300.0, "5.3k"),
        (report_text.rate_text, 999_800.0, "1M"),
        (report_text.rate_text, float("inf"), "–"),
        (report_text.seconds_text, 0.0231, "0.023"),
        (report_text.seconds_text, 0.0, "0"),
        (report_text.seconds_text, 1234.5, "1,234"),
        (report_text.quality_text, float("nan"), "–"),
    ],
)
def test_figures_as_text(write: Any, value: Any, text: str) -> None:
    assert write(value) == text


def test_a_sample_says_of_how_many_rows(example: dict[str, Any]) -> None:
    about = example["input"]
    # 4,000 rows and 300 held out are all there is; of more rows, it was a sample.
    assert report_text.rows_text({**about, "rows_in_file": 4300}) == "4,000"
    assert report_text.rows_text({**about, "rows_in_file": 90000}) == "4,000 of 90,000"


# -- the table -----------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 100, 120])
def test_table_holds_every_spec_whole_and_fits(example: dict[str, Any], width: int) -> None:
    text = table_text(example, width)
    lines = text.splitlines()
    assert all(len(line) <= width for line in lines)
    assert "\x1b" not in text
    assert "…" not in text
    for point in example["points"]:
        (line,) = [line for line in lines if f" {point['spec']} " in line]
        assert line.startswith(" ●") == point["on_frontier"]
        assert f"{point['quality']['recall@10']:.3f}" in line


def test_table_goes_from_few_to_many_bytes(example: dict[str, Any]) -> None:
    text = table_text({**example, "points": example["points"][::-1]}, 200)
    places = [text.index(f" {spec} ") for spec in ("opq:bytes=16", "pq:bytes=16", "float32 ")]
    assert places == sorted(places)
    header = next(line for line in text.splitlines() if "bytes/item" in line)
    assert all(name in header for name in ("recall@1 ", "recall@100", "ndcg@10", "search/s"))


def test_narrow_table_says_what_it_leaves_out(example: dict[str, Any]) -> None:
    text = table_text(example, 80)
    header, note = (
        next(line for line in text.splitlines() if mark in line)
        for mark in ("bytes/item", "not shown at this width")
    )
    assert "recall@10" in header
    assert "encode/s" not in header
    assert "encode/s" in note
    assert "not shown" not in table_text(example, 200)


def test_target_column_stays(example: dict[str, Any]) -> None:
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=64)
    print_table(example, console, target="ndcg@10")
    text = console.file.getvalue()
    assert "ndcg@10" in text.splitlines()[2]
    assert "recall@10" not in text.splitlines()[2]


def test_table_says_what_was_compared_and_left_out(example: dict[str, Any]) -> None:
    text = table_text(example, 120)
    assert text.startswith(
        "docs.npy: 4,000 × 384 float32, 1,536 bytes per item, cosine, 300 queries"
    )
    (line,) = [line for line in text.splitlines() if "pip install" in line]
    assert line.startswith("left out: bebr, csce-net, activation-code: needs torch")
    assert "fewbits[torch]" in line


def test_table_without_points(empty: dict[str, Any]) -> None:
    text = table_text(empty)
    assert "No method could be compared." in text
    assert "left out: muvera" in text


def test_hostile_names_cannot_steer_the_terminal(example: dict[str, Any]) -> None:
    example["input"]["name"] = example["points"][0]["spec"] = HOSTILE
    text = table_text(example, 200)
    assert text.count("[red]$x^2") == 2
    assert "\x1b" not in text


def test_ascii_terminal_gets_ascii_marks(example: dict[str, Any]) -> None:
    rich_console = pytest.importorskip("rich.console")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    example["points"][0]["spec"] = "größe"
    print_table(example, rich_console.Console(file=stream, width=100))
    stream.flush()
    text = stream.buffer.getvalue().decode("ascii")
    assert all(word in text for word in ("4,000 x 384", "96x", "gr??e", "* on the frontier"))


# -- files ---------------------------------------------------------------------------------


def test_report_writes_three_files(example: dict[str, Any], tmp_path: Path) -> None:
    page, picture = write_report(example, tmp_path / "new" / "folder")
    assert (page.name, picture.name) == ("report.html", "recall.png")
    assert sorted(path.name for path in page.parent.iterdir()) == sorted(NAMES)
    assert json.loads((page.parent / "comparison.json").read_text()) == example


def test_picture_is_a_picture(example: dict[str, Any], tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    draw_png(example, tmp_path / "full.png")
    draw_png({**example, "points": []}, tmp_path / "empty.png")
    pictures = []
    for name in ("full.png", "empty.png"):
        with image.open(tmp_path / name) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 1000
            pictures.append({colour for _, colour in picture.convert("RGB").getcolors(2**20)})
    # The methods' own colours: blue, orange and green are in the one, and not in the other.
    marks = {(0x2F, 0x6F, 0xDE), (0xE0, 0x66, 0x2B), (0x1F, 0x9D, 0x63)}
    assert marks <= pictures[0]
    assert not marks & pictures[1]


def test_picture_takes_hostile_names_and_missing_figures(
    example: dict[str, Any], tmp_path: Path
) -> None:
    example["input"]["name"] = "costs $5 and _$x^"
    first, second, *_ = example["points"]
    first.update(spec="$\\frac", method="$a$")
    second["quality"] = {"recall@10": float("nan")}
    draw_png(example, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("no_picture")
def test_numpy_figures_and_what_is_not_finite(example: dict[str, Any], tmp_path: Path) -> None:
    point = example["points"][0]
    point["bytes_per_item"] = np.float32(16)
    point["codec_bytes"] = np.int64(7)
    point["search_per_second"] = np.inf
    write_report(example, tmp_path)
    written = json.loads((tmp_path / "comparison.json").read_text())["points"][0]
    assert (written["bytes_per_item"], written["codec_bytes"]) == (16, 7)
    assert written["search_per_second"] is None


@pytest.mark.usefixtures("no_picture")
def test_a_full_disk_leaves_the_old_report(
    example: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        (tmp_path / name).write_text("old")
    write_bytes = Path.write_bytes

    def full(path: Path, content: Any) -> int:
        if "html" in path.name:
            write_bytes(path, content[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(FewbitsError, match=r"disk is full while writing .*report\.html"):
        write_report(example, tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(
        NAMES, "old"
    )


@pytest.mark.usefixtures("no_picture")
def test_a_folder_that_is_a_file_is_refused(example: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(FewbitsError, match=r"cannot write .*taken"):
        write_report(example, tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


# -- the page, as text ---------------------------------------------------------------------


def test_page_refers_to_nothing_outside(example: dict[str, Any]) -> None:
    page = page_text(example).replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|//[a-z]+\.|\bsrc=|\bhref=|@import|url\((?!#)", page)
    assert "$" not in re.sub(r"<script.*?</script>", "", page, flags=re.S)


def test_page_holds_the_comparison(example: dict[str, Any]) -> None:
    assert embedded(page_text(example)) == example


def test_page_policy_allows_only_its_own_script_and_style(example: dict[str, Any]) -> None:
    page = page_text(example)
    style, script = (
        re.search(pattern, page, re.S)
        for pattern in (r"<style>(.*?)</style>", r"<script>(.*?)</script>")
    )
    assert style is not None
    assert script is not None
    assert f"style-src '{report.content_hash(style[1])}'" in page
    assert f"script-src '{report.content_hash(script[1])}'" in page
    assert "default-src 'none'" in page
    assert "unsafe" not in page


def test_hostile_names_stay_text(example: dict[str, Any]) -> None:
    plain_tags = page_text(example).count("<")
    example["input"]["name"] = HOSTILE
    example["points"][0].update(spec=HOSTILE, method=HOSTILE)
    example["left_out"][0].update(method=HOSTILE, why=HOSTILE)
    page = page_text(example)
    assert page.count("<script") == 2
    assert "<img" not in page
    assert page.count("<") == plain_tags + 4  # one more left-out line, of two elements
    assert html.escape("</script><img src=x onerror=alert(1)>") in page
    assert embedded(page)["points"][0]["spec"] == HOSTILE


def test_page_shows_every_point_without_scripts(example: dict[str, Any]) -> None:
    (table,) = re.findall(r"<noscript>.*?</noscript>", page_text(example), re.S)
    for point in example["points"]:
        assert f"<td>{point['spec']}</td><td>" in table


def test_page_without_points_is_written(empty: dict[str, Any], tmp_path: Path) -> None:
    page, picture = write_report(empty, tmp_path)
    assert embedded(page.read_text())["points"] == []
    assert picture.stat().st_size > 1000
