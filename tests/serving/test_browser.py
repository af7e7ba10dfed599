"""The page in a real browser: type, draw, watch the rows, save, and come back. Debian: chromium and chromium-driver."""

import json
import os
import shutil
import time

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait
from server_process import pixels

ROWS = 16
# Notes every picture that the page shows, in its order, for the pictures of the newest drawing.
WATCH = """
window.shown = [];
new MutationObserver((changes) => {
  for (const { target } of changes) {
    window.shown.push([target.src, target.closest('li').querySelector('.seed').textContent]);
  }
}).observe(document.getElementById('drawings'), { subtree: true, attributeFilter: ['src'] });
"""
HOSTILE = ('<img src=x onerror="window.hacked = 1">', "<script>window.hacked = 1</script>", "</h2><b>bold</b>&amp;")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium. Absent: skipped, and failed where the variable CI is set."""
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        problem = "no chromium and chromedriver: apt-get install --no-install-recommends chromium chromium-driver"
        if os.environ.get("CI"):
            pytest.fail(problem)
        pytest.skip(problem)
    folder = tmp_path_factory.mktemp("browser")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--user-data-dir={folder}/profile"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": f"{folder}/saved"})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(programs[1]))
    driver.saved = folder / "saved"
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, server):
    """The page in a browser without a history; nothing may be complained of in the console."""
    browser.get(server.url)
    browser.execute_script("localStorage.clear()")
    reload(browser)
    browser.get_log("browser")
    yield browser
    assert browser.get_log("browser") == []


def wait(browser, condition):
    return WebDriverWait(browser, 120, 0.05).until(lambda _: condition())


def find(browser, selector: str):
    return browser.find_element(By.CSS_SELECTOR, selector)


def texts(browser, selector: str) -> list[str]:
    return [element.text for element in browser.find_elements(By.CSS_SELECTOR, selector)]


def reload(browser) -> None:
    browser.refresh()
    wait(browser, lambda: find(browser, "#temperature").get_property("value") != "")
    browser.execute_script(WATCH)


def fill(browser, prompt: str, **settings) -> None:
    for name, value in ({"prompt": prompt} | settings).items():
        field = find(browser, f"#{name}")
        field.clear()
        field.send_keys(str(value))


def draw(browser, prompt: str, **settings) -> None:
    """Draw, and wait for all the images."""
    before = len(texts(browser, ".drawing"))
    fill(browser, prompt, **settings)
    find(browser, "#draw").click()
    wait(browser, lambda: len(texts(browser, ".drawing")) > before)
    wait(browser, lambda: not browser.find_elements(By.CSS_SELECTOR, ".drawing .stop"))
    assert texts(browser, ".drawing:first-child .problem") == [""]


def test_the_page_knows_the_model(page):
    assert find(page, "#model").text == "run, 16 × 16 pixels"
    fields = {name: find(page, f"#{name}").get_property("value") for name in ("temperature", "top_k", "guidance")}
    assert fields == {"temperature": "1.5", "top_k": "0", "guidance": "1"}
    for field in page.find_elements(By.CSS_SELECTOR, "main input, main button"):
        assert field.accessible_name, field.get_attribute("id")


def test_type_draw_watch_save(page, server):
    draw(page, "red hut", n=2, seed=5, temperature=0.8, top_k=6, guidance=2)
    expected = server.images(prompt="red hut", n=2, seed=5, temperature=0.8, top_k=6, guidance=2)
    shown = page.execute_script("return window.shown")
    for number, whole in enumerate(expected):
        mine = [pixels(source.split(",")[1]) for source, label in shown if label == f"seed {5 + number}"]
        heights = [len(part) for part in mine]
        assert heights == sorted(set(heights)) and heights[-1] == ROWS and heights[0] <= ROWS // 2
        assert all(np.array_equal(part, whole[: len(part)]) for part in mine)
    sizes = [image.get_property("naturalHeight") for image in page.find_elements(By.CSS_SELECTOR, ".images img")]
    assert sizes == [ROWS, ROWS] and texts(page, ".drawing h2") == ["red hut"]
    assert "temperature 0.8, top-k 6, guidance 2" in find(page, ".facts").text
    page.find_elements(By.CSS_SELECTOR, ".save")[1].click()
    file = page.saved / "red-hut-6.png"
    wait(page, file.exists)
    with Image.open(file) as saved:
        assert np.array_equal(np.asarray(saved), expected[1])
        assert json.loads(saved.text["megat2i"])["seed"] == 6


def test_the_history_stays(page):
    draw(page, "green square", n=1, seed=3, temperature=0.7)
    draw(page, "blue circle", n=2)
    reload(page)
    assert [text.split("\n")[0] for text in texts(page, "#history li")] == ["blue circle", "green square"]
    page.find_elements(By.CSS_SELECTOR, "#history button")[1].click()
    values = {name: find(page, f"#{name}").get_property("value") for name in ("prompt", "n", "seed", "temperature")}
    assert values == {"prompt": "green square", "n": "1", "seed": "3", "temperature": "0.7"}
    find(page, "#clear").click()
    reload(page)
    assert texts(page, "#history li") == [] and find(page, "#no-history").is_displayed()


def test_a_damaged_history_is_no_history(page):
    for content in ("{", "7", '[null, {"prompt": 7}, 3]'):
        page.execute_script("localStorage.setItem('megat2i.history', arguments[0])", content)
        reload(page)
        assert texts(page, "#history li") == []


def test_a_script_in_a_prompt_stays_text(page):
    for prompt in HOSTILE:
        draw(page, prompt, n=1)
    for _ in range(2):  # as drawn, and from the history after a reload
        assert [text.split("\n")[0] for text in texts(page, "#history button")] == list(HOSTILE[::-1])
        assert page.execute_script("return window.hacked") is None
        places = "#history img, #history script, #history b, .drawing h2 *, .images img[src=x], b"
        assert page.find_elements(By.CSS_SELECTOR, places) == []
        reload(page)


def test_the_policy_blocks_what_would_be_html(page):
    """Even code of the page itself could not turn text into elements, and no script from elsewhere runs."""
    blocked = "try { document.body.innerHTML = '<b>x</b>'; return 'set' } catch (error) { return error.name }"
    assert page.execute_script(blocked) == "TypeError"
    page.get_log("browser")  # the browser tells of it there


def test_an_error_is_shown(page):
    fill(page, "red hut", n=11)
    page.execute_script("document.getElementById('form').noValidate = true")
    find(page, "#draw").click()
    wait(page, lambda: find(page, "#problem").text.startswith("n: "))
    assert texts(page, ".drawing") == [] and texts(page, "#history li") == []
    page.get_log("browser")  # a status of 400 is noted there


def test_stop_ends_a_drawing(page, server):
    page.execute_script(
        "new MutationObserver(() => document.querySelector('.stop')?.click())"
        ".observe(document.getElementById('drawings'), { subtree: true, attributeFilter: ['src'] })"
    )
    fill(page, "red hut", n=10)
    find(page, "#draw").click()
    wait(page, lambda: texts(page, ".drawing .problem") == ["Stopped."])
    while (health := server.health())["drawing"] or health["waiting"]:
        time.sleep(0.05)
    assert len(page.find_elements(By.CSS_SELECTOR, ".finished")) < 10


@pytest.mark.parametrize("width", [1280, 420])
def test_nothing_is_wider_than_the_window(page, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 800}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        draw(page, "W" * 200, n=3)
        assert page.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
