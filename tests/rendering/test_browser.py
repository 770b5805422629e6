"""The page in a real browser: clicks, search, filters, sorting, the keyboard, hostile names and accessibility.

Needs Chromium with its driver (Debian: chromium, chromium-driver) and selenium; without them these tests are skipped.
"""

from __future__ import annotations

import importlib.util
import shutil
import time
from pathlib import Path

import pytest
from torch import nn

import warmstart

selenium = pytest.importorskip("selenium")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--hide-scrollbars", "--window-size=1360,1100"),
]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_script_timeout(120)
    yield driver
    driver.quit()


class Page:
    def __init__(self, driver, path: Path, scheme: str = "light") -> None:
        self.driver = driver
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        driver.get(path.as_uri())

    def all(self, selector: str):
        return self.driver.find_elements("css selector", selector)

    def one(self, selector: str):
        return self.driver.find_element("css selector", selector)

    def run(self, script: str):
        return self.driver.execute_script(script)

    def text(self, selector: str) -> str:
        return self.run(f"return document.querySelector({selector!r}).textContent").strip()

    def column(self, number: int, place: str = "#entries") -> list[str]:
        script = (
            f"return [...document.querySelectorAll('{place} tbody tr')].map(row => row.cells[{number}].textContent)"
        )
        return self.run(script)

    def press(self, *keys: str) -> None:
        self.driver.switch_to.active_element.send_keys(*keys)

    @property
    def focused(self) -> str:
        return self.run(
            "return document.activeElement.getAttribute('aria-label') || document.activeElement.textContent"
        )

    def tile(self, path: str):
        return next(t for t in self.all("#map .tile") if t.get_attribute("data-path") == path)

    def open(self, tile) -> None:
        """Click where a module has its name; its middle may be one of its own modules."""
        from selenium.webdriver import ActionChains

        left, top = -tile.size["width"] // 2 + 12, -tile.size["height"] // 2 + 10
        ActionChains(self.driver).move_to_element_with_offset(tile, left, top).click().perform()


@pytest.fixture
def mixed(chromium, mixed_plan, tmp_path):
    page = Page(chromium, mixed_plan.apply().to_html(tmp_path / "report.html"))
    yield page
    assert chromium.get_log("browser") == []


def test_a_click_opens_a_module_and_a_breadcrumb_goes_back(mixed):
    assert len(mixed.column(0)) == 14
    mixed.open(mixed.tile("head"))
    assert mixed.column(0) == ["head.weight", "head.bias"]
    assert mixed.text("#crumbs") == "Nethead"
    assert mixed.text("#say") == "head: module, 2 tensors, 10 elements: 2 own init"
    mixed.open(mixed.tile("head.bias"))
    assert mixed.column(0) == ["head.bias"]
    mixed.one("#crumbs button").click()
    assert len(mixed.column(0)) == 14


def test_modules_and_tensors_go_by_the_keyboard_alone(mixed):
    from selenium.webdriver.common.keys import Keys

    mixed.run("document.querySelector('#map .tile').focus()")
    first = mixed.focused
    assert first.startswith("encoder.layer, module, 6 tensors, 60 elements: 6 loaded; 2 frozen")
    seen = {first}
    for key in [Keys.ARROW_RIGHT, Keys.ARROW_DOWN] * 8:
        mixed.press(key)
        seen.add(mixed.focused)
    assert len(seen) > 3
    mixed.press(Keys.HOME)
    assert mixed.focused == first
    mixed.press(Keys.ENTER)
    assert mixed.focused.startswith("0, module, 2 tensors")
    mixed.press(Keys.ENTER)
    assert mixed.column(0) == ["encoder.layer.0.weight", "encoder.layer.0.bias"]
    mixed.press(Keys.ESCAPE)
    assert mixed.focused.startswith("0, module")  # where one came from
    mixed.press(Keys.ESCAPE)
    assert mixed.focused == first
    mixed.press(Keys.ENTER)
    mixed.press(Keys.END)
    assert mixed.focused.startswith("2, module")
    assert len(mixed.run("return [...document.querySelectorAll('#map [tabindex=\"0\"]')]")) == 1


def test_every_tile_is_reached_by_arrows(mixed):
    from selenium.webdriver.common.keys import Keys

    mixed.run("document.querySelector('#map .tile').focus()")
    labels = set(mixed.run("return [...document.querySelectorAll('#map .tile[aria-label]')].map(t => t.ariaLabel)"))
    frontier, reached = [mixed.focused], {mixed.focused}
    while frontier:
        start = frontier.pop()
        for key in (Keys.ARROW_RIGHT, Keys.ARROW_LEFT, Keys.ARROW_UP, Keys.ARROW_DOWN):
            mixed.run(f"[...document.querySelectorAll('#map .tile')].find(t => t.ariaLabel === {start!r}).focus()")
            mixed.press(key)
            if mixed.focused not in reached:
                reached.add(mixed.focused)
                frontier.append(mixed.focused)
    assert reached == labels


def test_search_finds_names_keys_and_rules(mixed):
    box = mixed.one("#search")
    box.send_keys("blocks.1.w")
    assert mixed.column(0) == ["encoder.layer.1.weight"]
    assert mixed.text("#entries mark") == "blocks.1.w"
    assert mixed.text("#say") == "1 tensor of 14"
    box.clear()
    box.send_keys("SliceOrPad")
    assert mixed.column(0) == ["position"]
    box.clear()
    box.send_keys("<nothing>")
    assert mixed.column(0) == []
    assert mixed.text("#entries .count") == "0 tensors of 14"


def test_statuses_filter_and_are_said_in_words(mixed):
    own = next(b for b in mixed.all("#legend button") if b.get_attribute("data-status") == "own init")
    own.click()
    assert own.get_attribute("aria-pressed") == "true"
    assert mixed.column(4) == ["own init", "own init"]
    assert mixed.run("return document.querySelectorAll('#map .dim').length") > 0
    own.click()
    out = next(b for b in mixed.all("#legend button") if b.get_attribute("data-status") == "out of scope")
    out.click()
    assert mixed.column(4) == ["out of scope", "out of scope"]
    out.click()
    mixed.one("#only-frozen").click()
    assert mixed.column(0) == ["encoder.layer.0.weight", "encoder.layer.0.bias"]
    assert mixed.column(7) == ["frozen", "frozen"]


def test_statuses_that_no_tensor_has_are_left_out_and_the_others_keep_theirs(chromium, tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    report = warmstart.load(model, nn.Linear(2, 2), into="a", exclude="a.bias", allow_unexpected="bias")
    page = Page(chromium, report.to_html(tmp_path / "report.html"))
    buttons = {b.get_attribute("data-status"): b for b in page.all("#legend button")}
    assert list(buttons) == ["loaded", "out of scope"]
    buttons["out of scope"].click()
    assert page.column(0) == ["a.bias", "b.weight", "b.bias"]
    dimmed = page.run("return [...document.querySelectorAll('#map .dim')].map(band => band.className)")
    assert dimmed
    assert set(dimmed) == {"s-loaded dim"}


def test_columns_sort_both_ways(mixed):
    heads = mixed.all("#entries th button")
    heads[0].click()
    names = mixed.column(0)
    assert names == sorted(names)
    assert mixed.one("#entries th").get_attribute("aria-sort") == "ascending"
    heads[2].click()
    heads[2].click()
    assert mixed.column(2)[0] == "(8, 4)"
    assert [th.get_attribute("aria-sort") for th in mixed.all("#entries th[aria-sort]")] == ["descending"]


def test_areas_by_elements_or_by_tensors(mixed):
    def area(path: str) -> int:
        size = mixed.tile(path).size
        return size["width"] * size["height"]

    before = area("embed.weight") / area("gate")
    mixed.one("#by-tensors").click()
    assert before > 4 * area("embed.weight") / area("gate")


def test_unused_keys_are_searched_too(mixed):
    assert len(mixed.column(0, "#keys")) == 3
    mixed.one("#search-unused").send_keys("not selected")
    assert mixed.column(0, "#keys") == ["temperature"]


def test_a_failed_plan_gives_its_lines_to_the_clipboard(chromium, failed_plan, tmp_path):
    page = Page(chromium, failed_plan.to_html(tmp_path / "plan.html"))
    buttons = page.all(".copy")
    buttons[0].click()
    deadline = time.monotonic() + 5
    while page.text("#say") != "Copied" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert page.text("#say") == "Copied"
    assert page.run("return String(getSelection())") == 'allow_missing=["head.bias"]'
    assert chromium.get_log("browser") == []


def test_ten_thousand_hostile_tensors_are_shown_and_do_nothing(chromium, hostile_report, tmp_path):
    path = hostile_report.to_html(tmp_path / "hostile.html")
    started = time.monotonic()
    page = Page(chromium, path)
    assert time.monotonic() - started < 10  # 0.6 s on an idle machine
    page.open(page.all("#map .tile")[0])
    assert page.text("#where").startswith("in ")
    page.one("#crumbs button").click()
    box = page.one("#search")
    box.send_keys("<script>")
    # Of two names with a script tag; the other is in the second's keys as well.
    assert page.text("#entries .count").startswith("1 to 100 of 1,250 tensors of 10,000")
    next_page = next(b for b in page.all("#entries .pager button") if b.text == "Next")
    next_page.click()
    assert page.text("#entries .count").startswith("101 to 200")
    assert page.run("return document.querySelectorAll('#entries tbody tr').length") == 100
    assert page.run("return [window.pwned, document.querySelectorAll('script, img').length]") == [None, 2]
    page.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"pwned=1\">')")
    time.sleep(0.2)
    assert page.run("return window.pwned") is None  # the policy would stop even what got in
    refused = chromium.get_log("browser")
    assert refused
    assert all("Content Security Policy" in entry["message"] for entry in refused)


def _axe() -> str:
    found = importlib.util.find_spec("axe_core_python")
    if found is None or found.origin is None:
        pytest.skip("no axe_core_python")
    return (Path(found.origin).parent / "axe.min.js").read_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("which", ["mixed_plan", "failed_plan", "hostile_report"])
def test_axe_finds_nothing(chromium, request, tmp_path, which, scheme):
    page = Page(chromium, request.getfixturevalue(which).to_html(tmp_path / "page.html"), scheme)
    page.run(_axe())
    found = chromium.execute_async_script("axe.run().then(arguments[0])")
    assert [(v["id"], [n["html"] for n in v["nodes"]][:3]) for v in found["violations"]] == []
    assert chromium.get_log("browser") == []


def test_a_window_that_grows_keeps_the_focus(mixed):
    from selenium.webdriver.common.keys import Keys

    mixed.run("document.querySelector('#map .tile').focus()")
    mixed.press(Keys.ARROW_RIGHT)
    focused, width = mixed.focused, mixed.run("return document.activeElement.offsetWidth")
    mixed.run("document.querySelector('#map').style.width = '50%'")
    deadline = time.monotonic() + 5
    while mixed.run("return document.activeElement.offsetWidth") == width and time.monotonic() < deadline:
        time.sleep(0.05)
    assert mixed.focused == focused
    assert mixed.run("return document.activeElement.offsetWidth") < width


def test_a_narrow_window_needs_no_sideways_scrolling(chromium, mixed_plan, tmp_path):
    chromium.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    )
    try:
        page = Page(chromium, mixed_plan.apply().to_html(tmp_path / "report.html"))
        assert page.run("return document.documentElement.scrollWidth") <= 400
    finally:
        chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
