"""The report page in a real browser: Chromium, driven by selenium, without a network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fewbits.core.report import page_text

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None
)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Chromium and chromedriver on the PATH"
)
webdriver: Any = pytest.importorskip("selenium.webdriver")
Keys: Any = pytest.importorskip("selenium.webdriver.common.keys").Keys
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --window-size=1280,1700"
)
EXAMPLE = json.loads(Path(__file__).with_name("comparison_example.json").read_text())
POINTS = EXAMPLE["points"]
HOSTILE = "</script><img src=x onerror='window.broken=1'>it's <b>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The report page, open in the browser."""

    def __init__(self, browser: Any, folder: Path) -> None:
        self.browser = browser
        self.file = folder / "report.html"

    def open(self, comparison: Any = EXAMPLE) -> Page:
        self.file.write_text(page_text(comparison), encoding="utf-8")
        self.browser.get(self.file.as_uri())
        return self

    def all(self, selector: str) -> list[Any]:
        return list(self.browser.find_elements("css selector", selector))

    def one(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
        return list(self.browser.execute_script(script, selector))

    def run(self, script: str) -> Any:
        return self.browser.execute_script(script)

    def drawn(self) -> set[int]:
        script = "return [...document.querySelectorAll('.marker')].map((e) => +e.dataset.index)"
        return set(self.run(script))

    def actions(self) -> Any:
        return webdriver.ActionChains(self.browser, duration=0)

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.browser.get_log("browser")]

    def type_number(self, selector: str, value: float) -> None:
        self.run(f"document.querySelector('{selector}').select()")
        self.one(selector).send_keys(str(value))


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Iterator[Page]:
    page = Page(browser, tmp_path).open()
    yield page
    assert page.errors() == []


def frontier(points: list[dict[str, Any]], quality: str = "recall@10") -> list[str]:
    found, most = [], -1.0
    for point in sorted(points, key=lambda p: (p["bytes_per_item"], -p["quality"][quality])):
        if point["quality"][quality] > most:
            found.append(point["spec"])
            most = point["quality"][quality]
    return found


def test_all_points_are_drawn_and_nothing_else_is_loaded(page: Page) -> None:
    assert page.drawn() == set(range(len(POINTS)))
    assert len(page.all("#table tbody tr")) == len(POINTS)
    assert page.one("h1").text == "docs.npy"
    assert "needs torch" in page.one("#left-out").text
    page.browser.get_log("performance")
    page.open()
    events = [json.loads(e["message"])["message"] for e in page.browser.get_log("performance")]
    asked = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert [request["documentURL"] for request in asked] == [page.file.as_uri()]


def test_points_stand_where_their_figures_say(page: Page) -> None:
    places = page.run(
        "return [...document.querySelectorAll('.marker')].map((m) => [+m.dataset.index,"
        " m.transform.baseVal[0].matrix.e, m.transform.baseVal[0].matrix.f])"
    )
    for a, x, y in places:
        for b, other_x, other_y in places:
            size, other_size = POINTS[a]["bytes_per_item"], POINTS[b]["bytes_per_item"]
            good, other_good = (POINTS[i]["quality"]["recall@10"] for i in (a, b))
            assert (size < other_size) == (x < other_x - 1e-6)
            assert (good > other_good) == (y < other_y - 1e-6)
    at = {index: x for index, x, _ in places}
    # pq at 16, 32 and 64 bytes: one doubling is as wide as the next.
    assert at[1] - at[0] == pytest.approx(at[3] - at[1], abs=0.01)


def test_frontier_is_that_of_the_comparison(page: Page) -> None:
    assert page.texts("tr.on-frontier button") == frontier(POINTS)
    assert page.run("return document.querySelector('.frontier').getTotalLength()") > 500
    page.one("#frontier").click()
    assert page.all(".frontier") == []


def test_hover_shows_all_figures(page: Page) -> None:
    index = next(i for i, point in enumerate(POINTS) if point["spec"] == "pca-rag:dims=110")
    assert not page.one("#tooltip").is_displayed()
    page.actions().move_to_element(page.one(f'.marker[data-index="{index}"]')).perform()
    text = page.one("#tooltip").text
    for figure in ("pca-rag:dims=110", "440", "3.5×", "0.717", "0.812", "0.865", "0.380"):
        assert figure in text
    for figure in ("167 KiB", "42.7 B", "1.1M/s", "12.2k/s", "0.31 s"):
        assert figure in text
    assert page.one("tr.active").get_attribute("data-index") == str(index)
    page.actions().move_to_element(page.one("h1")).perform()
    assert not page.one("#tooltip").is_displayed()


def test_arrow_keys_move_between_points_and_enter_picks(page: Page) -> None:
    page.run("document.querySelector('.marker[tabindex=\"0\"]').focus()")
    assert page.one("#tooltip strong").text == "opq:bytes=16"
    page.actions().send_keys(Keys.ARROW_RIGHT).perform()
    assert page.one("#tooltip strong").text == "pq:bytes=16"
    page.actions().send_keys(Keys.END).perform()
    assert page.one("#tooltip strong").text == "float32"
    page.actions().send_keys(Keys.ARROW_LEFT, Keys.ENTER).perform()
    assert page.one("#picked .spec").text == "pca-rag:dims=256"
    assert page.one("#tooltip strong").text == "pca-rag:dims=256"
    # Zoomed in on the right end, Home brings the first point into view.
    page.actions().send_keys("+", "+", "+", Keys.HOME).perform()
    assert page.one("#tooltip strong").text == "opq:bytes=16"
    assert page.texts(".x-tick")[0] not in ("256", "512")
    page.actions().send_keys("0").perform()
    assert page.texts(".x-tick")[-1] == "1,024"


def test_click_on_a_point_or_its_row_gives_the_command(page: Page) -> None:
    page.actions().move_to_element(page.one('.marker[data-index="18"]')).click().perform()
    assert "--method " + page.one("#picked .spec").text in page.one("#picked code").text
    page.one('#table tr[data-index="0"] button').click()
    expected = "fewbits encode docs.npy --method pq:bytes=16 -o docs.fewbits"
    assert page.one("#picked code").text == expected
    assert page.one('.chosen[data-letter="C"]').get_attribute("data-index") == "0"


def test_legend_filters_methods(page: Page) -> None:
    page.one('#methods input[value="opq"]').click()
    kept = [point for point in POINTS if point["method"] != "opq"]
    assert page.drawn() == {i for i, point in enumerate(POINTS) if point["method"] != "opq"}
    assert page.texts("tr.on-frontier button") == frontier(kept)
    assert page.one("#best .spec").text == "pca-rag:dims=192+pq:bytes=96"
    assert page.one("#shown").text == f"{len(kept)} of {len(POINTS)} shown"
    page.one("#none").click()
    assert page.drawn() == set()
    assert "No method is shown" in page.one("#best .answer").text
    page.one('#methods input[value="pq"]').send_keys(" ")
    assert {POINTS[index]["method"] for index in page.drawn()} == {"pq"}
    page.one("#all").click()
    assert len(page.drawn()) == len(POINTS)


def test_wheel_and_buttons_zoom(page: Page) -> None:
    whole = page.texts(".x-tick"), page.texts(".y-tick")
    origin = pytest.importorskip("selenium.webdriver.common.actions.wheel_input").ScrollOrigin
    place = origin.from_element(page.one("#canvas"))
    page.actions().scroll_from_origin(place, 0, -500).perform()
    zoomed = page.texts(".x-tick"), page.texts(".y-tick")
    assert zoomed[0] != whole[0]
    assert zoomed[1] != whole[1]
    assert page.run("return scrollY") == 0
    page.one("#reset").click()
    assert (page.texts(".x-tick"), page.texts(".y-tick")) == whole
    page.one("#zoom-in").click()
    assert page.texts(".y-tick") != whole[1]
    for _ in range(3):
        page.one("#zoom-out").click()
    assert (page.texts(".x-tick"), page.texts(".y-tick")) == whole


def test_drag_zooms_into_a_box_and_double_click_resets(page: Page) -> None:
    whole = page.texts(".x-tick")
    first, last = (page.one(f'.marker[data-index="{index}"]') for index in (1, 4))  # 32, 96 bytes
    drag = page.actions().move_to_element(first).click_and_hold()
    drag.move_to_element(last).release().perform()
    ticks = [float(tick) for tick in page.texts(".x-tick")]
    assert 30 < min(ticks) <= 40
    assert 80 <= max(ticks) < 100
    assert len(ticks) >= 5
    qualities = [float(tick) for tick in page.texts(".y-tick")]
    assert min(qualities) > 0.6
    assert max(qualities) < 0.85
    assert page.all(".box") == []
    assert page.all("#picked .spec") == []
    page.actions().double_click(page.one("#axes .label")).perform()
    page.actions().move_to_element_with_offset(page.one("#canvas"), 0, 150).double_click().perform()
    assert page.texts(".x-tick") == whole


def test_least_quality_finds_the_smallest(page: Page) -> None:
    for least in (0.5, 0.874, 0.95, 0.991):
        page.type_number("#smallest input[type=number]", least)
        enough = [point for point in POINTS if point["quality"]["recall@10"] >= least]
        wanted = min(enough, key=lambda p: (p["bytes_per_item"], -p["quality"]["recall@10"]))
        assert page.one("#smallest .spec").text == wanted["spec"]
        assert f"--method {wanted['spec']} -o" in page.one("#smallest code").text
        chosen = page.one('.chosen[data-letter="A"]').get_attribute("data-index")
        assert chosen == str(POINTS.index(wanted))


def test_most_bytes_finds_the_best(page: Page) -> None:
    for most in (20, 52, 100.5, 5000):
        page.type_number("#best input[type=number]", most)
        small = [point for point in POINTS if point["bytes_per_item"] <= most]
        wanted = max(small, key=lambda p: p["quality"]["recall@10"])
        assert page.one("#best .spec").text == wanted["spec"]


def test_limits_out_of_reach_name_the_nearest(page: Page) -> None:
    page.type_number("#best input[type=number]", 3)
    assert "the smallest is opq:bytes=16 with 16 bytes" in page.one("#best .answer").text
    page.type_number("#smallest input[type=number]", 2)
    assert "the best is float32 with 1.000" in page.one("#smallest .answer").text


def test_sliders_step_through_what_was_measured(page: Page) -> None:
    slider = page.one("#best input[type=range]")
    assert page.one("#best .spec").text == "opq:bytes=96"
    slider.send_keys(Keys.ARROW_RIGHT)
    assert page.one("#best input[type=number]").get_attribute("value") == "100"
    assert page.one("#best .spec").text == "pca-rag:dims=192+turboquant:bits=4"
    slider.send_keys(Keys.HOME)
    assert page.one("#best .spec").text == "opq:bytes=16"
    slider.send_keys(Keys.END)
    assert page.one("#best .spec").text == "float32"
    page.one("#smallest input[type=range]").send_keys(Keys.END)
    assert page.one("#smallest .spec").text == "float32"


def test_another_quality_redraws_everything(page: Page) -> None:
    page.one('#quality option[value="ndcg@10"]').click()
    assert page.one("#axes .label").text == "ndcg@10 ↑"
    assert max(float(tick) for tick in page.texts(".y-tick")) < 0.5
    assert page.texts("tr.on-frontier button") == frontier(POINTS, "ndcg@10")
    best = max(point["quality"]["ndcg@10"] for point in POINTS)
    limit = float(page.one("#smallest input[type=number]").get_attribute("value"))
    assert limit == pytest.approx(0.95 * best, abs=0.001)


def test_table_sorts(page: Page) -> None:
    sizes = sorted(POINTS, key=lambda p: p["bytes_per_item"])
    assert page.texts("#table tbody button") == [point["spec"] for point in sizes]
    page.one('th[data-column="search/s"] button').click()
    ranked = sorted(POINTS, key=lambda p: -p["search_per_second"])
    assert page.texts("#table tbody button")[:3] == [point["spec"] for point in ranked[:3]]
    assert page.one('th[data-column="search/s"]').get_attribute("aria-sort") == "descending"
    page.one('th[data-column="search/s"] button').click()
    assert page.texts("#table tbody button")[0] == ranked[-1]["spec"]
    page.one('th[data-column="method"] button').click()
    assert page.texts("#table tbody button")[0] == "binary"


def test_copy_button_copies(page: Page) -> None:
    page.browser.execute_cdp_cmd(
        "Browser.grantPermissions",
        {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]},
    )
    page.one("#best .copy").click()
    read = (
        "const done = arguments[0]; navigator.clipboard.readText().then(done, (e) => done('' + e))"
    )
    assert page.browser.execute_async_script(read) == page.one("#best code").text
    assert page.one("#best .copy").text == "Copied"


def test_hostile_names_are_shown_as_text(page: Page) -> None:
    spec = "pq:bytes=1" + HOSTILE
    point = {**POINTS[0], "spec": spec, "method": HOSTILE, "bytes_per_item": 1.0}
    about = {**EXAMPLE["input"], "name": HOSTILE}
    page.open({"input": about, "points": [point, *POINTS], "left_out": []})
    assert page.one("h1").text == HOSTILE
    assert page.all("img") == page.all("b") == []
    page.one('#table tr[data-index="0"] button').click()
    assert page.one("#picked .spec").text == spec
    assert HOSTILE in page.texts("#methods label")
    quoted = "'" + spec.replace("'", "'\\''") + "'"
    assert f" --method {quoted} -o " in page.one("#picked code").text
    assert page.run("return window.broken") is None


def test_commands_name_the_file(page: Page) -> None:
    names = {
        "my docs.tar.npy": "'my docs.tar.npy' --method opq:bytes=96 -o 'my docs.tar.fewbits'",
        "data/shards": "data/shards --method opq:bytes=96 -o shards.fewbits",
        "-x.npy": "./-x.npy --method opq:bytes=96 -o ./-x.fewbits",
        "the input": "FILE --method opq:bytes=96 -o FILE.fewbits",
    }
    for name, rest in names.items():
        page.open({**EXAMPLE, "input": {**EXAMPLE["input"], "name": name}})
        assert page.one("#best code").text == f"fewbits encode {rest}"


def test_figures_that_are_missing_show_as_dashes(page: Page) -> None:
    odd = {"method": "odd", "spec": "odd", "bytes_per_item": 3.0, "quality": {"recall@1": 0.5}}
    page.open({**EXAMPLE, "points": [*POINTS, {**odd, "search_per_second": float("nan")}]})
    assert page.drawn() == set(range(len(POINTS)))
    row = page.one(f'#table tr[data-index="{len(POINTS)}"]').text
    assert row.startswith("odd 3 – 0.500 – – –")
    page.one('th[data-column="recall@10"] button').click()
    assert page.texts("#table tbody button")[-1] == "odd"


def test_one_point_and_no_points(page: Page) -> None:
    page.open({**EXAMPLE, "points": POINTS[:1]})
    assert page.drawn() == {0}
    assert len(page.texts(".y-tick")) >= 2
    page.open({**EXAMPLE, "points": []})
    assert page.one("#nothing").is_displayed()
    assert not page.one("#figures").is_displayed()
    assert page.one("#left-out").is_displayed()


def test_dark_scheme_and_narrow_screen(page: Page) -> None:
    colour = "return getComputedStyle(document.body).backgroundColor"
    light = page.run(colour)
    feature = {"name": "prefers-color-scheme", "value": "dark"}
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    assert page.run(colour) != light
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    size = {"width": 360, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.open()
    assert page.run("return document.documentElement.scrollWidth") == 360
    assert page.run("return document.querySelector('#canvas').clientWidth") > 280
    page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_without_scripts_the_table_is_there(page: Page) -> None:
    page.browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    page.open()
    document = page.browser.execute_cdp_cmd("DOM.getDocument", {"depth": -1})
    page.browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    text = json.dumps(document)
    assert '"NOSCRIPT"' in text
    assert '"nodeValue": "pca-rag:dims=192+pq:bytes=96"' in text


# -- caches: less is better ----------------------------------------------------------------

FIGURES = {  # bytes per token, KL, perplexity
    "window:keep=0.25": (768.0, 0.2, 19.0),
    "snapkv:keep=0.25": (768.0, 0.05, 17.5),
    "kivi:bits=2": (700.0, 0.01, 17.1),
    "kivi:bits=4": (900.0, 0.0001, 17.0),
    "full": (3072.0, 0.0, 17.2),
}
CACHES = {
    "input": {"kind": "kv", "name": "reference", "bytes_per_item": 3072, "rows": 4096},
    "points": [
        {
            "method": spec.partition(":")[0],
            "spec": spec,
            "bytes_per_item": size,
            "codec_bytes": 0,
            "ratio": 3072 / size,
            "quality": {"KL": divergence, "perplexity": perplexity},
        }
        for spec, (size, divergence, perplexity) in FIGURES.items()
    ],
    "left_out": [],
}


def test_caches_have_a_falling_frontier(page: Page) -> None:
    page.open(CACHES)
    assert page.texts("tr.on-frontier button") == ["kivi:bits=2", "kivi:bits=4", "full"]
    assert page.one("#axes .label").text == "KL ↓"
    assert page.one("#quality-sign").text == "≤"
    assert page.one("#help").text.startswith("Down and left is better.")
    assert {"1e-4", "0.001", "0.01", "0.1"} <= set(page.texts(".y-tick"))
    heads = page.texts("#table th button")
    assert heads[:4] == ["method", "bytes/token", "of full cache", "KL"]
    assert "25 %" in page.one('#table tr[data-index="0"]').text
    page.one('#quality option[value="perplexity"]').click()
    assert page.texts("tr.on-frontier button") == ["kivi:bits=2", "kivi:bits=4"]


def test_caches_are_chosen_by_the_most_there_may_be(page: Page) -> None:
    page.open(CACHES)
    page.type_number("#smallest input[type=number]", 0.001)
    assert page.one("#smallest .spec").text == "kivi:bits=4"
    assert page.one("#smallest code").text == 'fewbits.kv.cache(model, "kivi:bits=4")'
    page.type_number("#smallest input[type=number]", 0.02)
    assert page.one("#smallest .spec").text == "kivi:bits=2"
    page.type_number("#best input[type=number]", 768)
    assert page.one("#best .spec").text == "kivi:bits=2"
    page.type_number("#best input[type=number]", 5000)
    assert page.one("#best .spec").text == "full"
    page.type_number("#best input[type=number]", 3)
    assert "the smallest is kivi:bits=2 with 700 bytes" in page.one("#best .answer").text
