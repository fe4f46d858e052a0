"""Pages as a reader has them, in Debian's Chromium: on a phone and a desk, light and dark, under the pointer."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from megarlhf.observe.charts import WIDTH
from megarlhf.observe.comparison import write_comparison
from megarlhf.observe.evaluation import Decoding, write_evaluation
from megarlhf.observe.report import write_page, write_report
from megarlhf.observe.samples import Rollout
from megarlhf.observe.writers import read_metrics
from tests.helpers.pages import ABOUT, policy_run
from tests.observe.test_report import HOSTILE, demo_run

WIDTHS = (390, 1400)
SCHEMES = ("light", "dark")
READABLE = 4.5
"""Contrast of text that WCAG 2.1 asks for (1.4.3, AA)."""
CONTRAST = """
const shades = text => (text.match(/[\\d.]+/g) || [0, 0, 0, 0]).map(Number);
const linear = c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
const behind = element => {
  for (let at = element; at; at = at.parentElement) {
    const shade = shades(getComputedStyle(at).backgroundColor);
    if (shade.length === 3 || shade[3] === 1) return shade;
  }
  return [255, 255, 255];
};
const found = [];
for (const element of document.querySelectorAll("main *")) {
  const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
  if (!own || !element.getClientRects().length) continue;
  const style = getComputedStyle(element), ink = light(shades(element.ownerSVGElement ? style.fill : style.color));
  const [low, high] = [ink, light(behind(element))].sort((a, b) => a - b);
  found.push([(high + 0.05) / (low + 0.05), element.tagName + " " + element.textContent.slice(0, 40)]);
}
return found;
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    paths = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if missing := [name for name, path in paths.items() if path is None]:
        pytest.skip(f"{' and '.join(missing)} not installed; apt-get install chromium chromium-driver")
    chrome = pytest.importorskip("selenium.webdriver")
    options = chrome.ChromeOptions()
    options.binary_location = str(paths["chromium"])
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    profile = tmp_path_factory.mktemp("profile")
    # The sandbox works neither for root nor in most containers; the pages are our own.
    for argument in (
        "--headless=new",
        "--hide-scrollbars",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--user-data-dir={profile}",
        "--no-sandbox",
    ):
        options.add_argument(argument)
    service = chrome.ChromeService(executable_path=paths["chromedriver"])  # named: nothing is looked for or downloaded
    driver = chrome.Chrome(options=options, service=service)
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """One of each kind."""
    place = tmp_path_factory.mktemp("pages")
    policy_run(place / "grpo")
    policy_run(place / "other", lr=1e-4, iterations=12)
    chat = (("system", "Answer with a number."), ("user", HOSTILE))
    rollouts = [Rollout(chat, f"said {at}", "7", 0.5, correct=at % 2 == 0) for at in range(20)]
    ways = [Decoding(name, (0.5, 0.3, 0.7), None, 12.3, 0.05, rollouts) for name in ("sampled", "greedy")]
    evaluated, compared = place / "eval.html", place / "compared.html"
    write_evaluation(evaluated, "runs/a/very/long/path/of/a/model" * 4, "maths", "megarlhf eval", ABOUT, ways)
    return {
        "run": write_page(place / "grpo"),
        "demo": write_report(place / "demo", demo_run(place / "demo")),
        "compared": write_comparison([place / "grpo", place / "other"], compared),
        "evaluated": evaluated,
    }


def show(browser: Any, page: Path, *, width: int = 1400, scheme: str = "light") -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    browser.get(page.as_uri())


def chart(browser: Any, title: str) -> Any:
    """The figure with this title, in view."""
    (found,) = [
        each
        for each in browser.find_elements("css selector", "figure")
        if each.find_element("css selector", "figcaption").text.partition("\n")[0] == title
    ]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
    return found


def point(browser: Any, figure: Any, across: float) -> str:
    """What the page says with the pointer over the curves, so far across them, from 0 to 1."""
    svg = figure.find_element("css selector", "svg")
    data = json.loads(figure.find_element("css selector", ".plot").get_attribute("data-chart"))
    place = browser.execute_script("return arguments[0].getBoundingClientRect().toJSON()", svg)
    scale = place["width"] / WIDTH
    left, top, right, bottom = data["box"]
    x, y = place["left"] + scale * (left + across * (right - left)), place["top"] + scale * (top + bottom) / 2
    browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": x, "y": y})
    readout = figure.find_element("css selector", ".readout")
    shown = browser.execute_script("return arguments[0].getBoundingClientRect().toJSON()", readout)
    assert shown["left"] >= 0
    assert shown["right"] <= browser.execute_script("return document.documentElement.clientWidth")
    return readout.text


@pytest.mark.parametrize("kind", ["run", "demo", "compared", "evaluated"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_page_fits_can_be_read_and_asks_for_nothing(
    kind: str, width: int, scheme: str, browser: Any, pages: Mapping[str, Path]
) -> None:
    for log in ("performance", "browser"):
        browser.get_log(log)
    show(browser, pages[kind], width=width, scheme=scheme)
    for fold in browser.find_elements("css selector", "details"):
        browser.execute_script("arguments[0].open = true", fold)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return document.documentElement.clientWidth") == width
    contrasts = browser.execute_script(CONTRAST)
    assert len(contrasts) > 40
    assert not [pair for pair in contrasts if pair[0] < READABLE]
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(13, 13, 13)") == (scheme == "dark")
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [each["params"] for each in events if each["method"] == "Network.requestWillBeSent"]
    # Of this page: Chromium's first tab asks for parts of itself.
    own = pages[kind].as_uri()
    assert [each["request"]["url"] for each in sent if each["documentURL"] == own] == [own]
    assert browser.get_log("browser") == []


def test_what_a_run_holds_cannot_run_or_load_anything(browser: Any, pages: Mapping[str, Path]) -> None:
    """Even where some text were not escaped: the page's own policy has the browser refuse."""
    show(browser, pages["run"])
    browser.get_log("browser")
    browser.execute_script(
        "const s = document.createElement('script'); s.textContent = 'document.title = 1'; document.body.append(s);"
        "const i = document.createElement('img'); i.src = 'http://localhost:9/a.png'; document.body.append(i)"
    )
    assert browser.title == "grpo"
    said = " ".join(entry["message"] for entry in browser.get_log("browser"))
    assert said.count("Content Security Policy") == 2


@pytest.mark.parametrize(("title", "metrics"), [
    ("Accuracy", ["rollout/accuracy"]),
    ("Judges", ["judge/taste_mean", "judge/answer_mean"]),
    ("Learning rate", ["policy/learning_rate"]),
    ("Peak memory", ["memory/peak_bytes"]),
])  # fmt: skip
@pytest.mark.parametrize("width", WIDTHS)
def test_the_pointer_is_told_the_values_of_the_log(
    title: str, metrics: list[str], width: int, browser: Any, pages: Mapping[str, Path]
) -> None:
    show(browser, pages["run"], width=width)
    figure = chart(browser, title)
    rows = read_metrics(pages["run"].parent).rows
    for across, step in ((0.0, 1), (0.5, None), (1.0, 20)):
        said = point(browser, figure, across).split()
        assert said[0] == "step"
        at = int(said[1])
        assert at == step or (step is None and 9 <= at <= 12)
        told = [float(word.replace("−", "-")) for word in said[2:] if word[-1].isdigit()]
        assert told == pytest.approx([rows[at - 1][name] for name in metrics], rel=1e-5)


def test_the_keys_walk_from_step_to_step(browser: Any, pages: Mapping[str, Path]) -> None:
    show(browser, pages["run"])
    figure = chart(browser, "Score")
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    svg = figure.find_element("css selector", "svg")
    said = []
    for key in (keys.ARROW_LEFT, keys.ARROW_LEFT, keys.ARROW_RIGHT):
        svg.send_keys(key)
        said.append(figure.find_element("css selector", ".readout b").text)
    assert said == ["step 19", "step 18", "step 19"]


def test_zeros_lie_on_an_axis_that_has_nothing_below(browser: Any, pages: Mapping[str, Path]) -> None:
    show(browser, pages["run"])
    for title in ("Truncated responses", "Groups of equal scores"):
        figure = chart(browser, title)
        ticks = [each.text for each in figure.find_elements("css selector", "svg text:not(.step)")]
        assert min(float(tick.replace("−", "-")) for tick in ticks) == 0
        curve, axis = (
            browser.execute_script(
                "const b = arguments[0].getBoundingClientRect(); return (b.top + b.bottom) / 2", each
            )
            for each in (figure.find_element("css selector", at) for at in (".curve path", ".axis"))
        )
        assert math.isclose(curve, axis, abs_tol=1.0)


def test_another_step_shows_its_rollouts_without_a_script(browser: Any, pages: Mapping[str, Path]) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        show(browser, pages["run"])
        # As a reader sees them; elements that are not shown have no text.
        body = browser.find_element("css selector", "main")
        assert "said 0 at 20" in body.text
        assert "at 10" not in body.text
        browser.find_element("xpath", "//label[text()='step 10']").click()
        assert "said 3 at 10" in body.text
        assert "at 20" not in body.text
        assert "Judges" in body.text
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_prompts_are_turns_and_control_tokens_are_tokens(browser: Any, pages: Mapping[str, Path]) -> None:
    show(browser, pages["run"])
    chat, written = browser.find_elements("css selector", ".panel:last-child article")
    assert [each.text for each in chat.find_elements("css selector", ".role")] == ["system", "user"]
    assert [each.text for each in chat.find_elements("css selector", ".prompt")] == [
        *("Answer with a number.", "What is 3 + 4?"),
    ]
    assert "taste +1.00" in chat.text
    tokens = [each.text for each in written.find_elements("css selector", ".token")]
    assert tokens == ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def test_runs_are_compared_by_name_setting_curve_and_value(browser: Any, pages: Mapping[str, Path]) -> None:
    show(browser, pages["compared"])
    body = browser.find_element("css selector", "main").text
    assert browser.find_element("css selector", "h1").text == "grpo vs other"
    assert "policy/learning_rate 0.0002 0.0001 −0.0001 1" in body
    figure = chart(browser, "Learning rate")
    assert figure.find_element("css selector", ".legend").text.split() == ["grpo", "other"]
    assert point(browser, figure, 0.25).split() == ["step", "6", "grpo", "0.0002", "other", "0.0001"]
    # The other run has ended by then: its last value is said to be of its last step.
    assert point(browser, figure, 1.0).split() == ["step", "20", "grpo", "0.0002", "other", "0.0001", "step", "12"]
