"""The status page in a headless browser (Debian's `chromium` and `chromium-driver`)."""

import os
import shutil

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

from tests.serving import Server

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and chromedriver are not installed"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("chromium")
    for argument in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "no-first-run",
        "window-size=1100,1000",
        f"user-data-dir={profile}",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    server = Server("--api-key", "secret")
    browser = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    browser.get(server.url)
    yield browser
    browser.quit()
    server.stop()


def text(page, name):
    return page.find_element(By.ID, name).text


def until(page, condition):
    WebDriverWait(page, 20, poll_frequency=0.05).until(lambda _: condition())


def send(page, prompt, mode, key="secret", tokens="60"):
    for name, value in (("prompt", prompt), ("key", key), ("tokens", tokens)):
        field = page.find_element(By.ID, name)
        field.clear()
        field.send_keys(value)
    Select(page.find_element(By.ID, "mode")).select_by_value(mode)
    page.find_element(By.ID, "send").click()


def ready(page):
    return page.find_element(By.ID, "send").is_enabled()


def test_prompt_box_streams_and_numbers_follow(page):
    until(page, lambda: text(page, "state") == "policy fcfs")
    assert text(page, "model") == "tiny-moe"
    send(page, "What is a list?", "chat")
    until(page, lambda: ready(page) and text(page, "output"))
    send(page, "The list is", "text")
    until(page, lambda: ready(page) and text(page, "output"))
    until(page, lambda: text(page, "generated") not in ("\u2013", "0"))
    cell = "#latency tr:nth-child(2) td:nth-child(2)"
    until(page, lambda: page.find_element(By.CSS_SELECTOR, cell).text != "\u2013")
    until(page, lambda: text(page, "running") == "0" and text(page, "kv") == "0.0")
    picture = os.environ.get("PYRUNTIME_SCREENSHOT")
    if picture:
        page.save_screenshot(picture)
    errors = [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"]
    assert [entry for entry in errors if "favicon" not in entry["message"]] == []


def test_stop_ends_a_stream(page):
    send(page, "import os\n", "text", tokens="2000")
    until(page, lambda: len(text(page, "output")) > 20)
    page.find_element(By.ID, "stop").click()
    until(page, lambda: ready(page) and text(page, "running") == "0")
    assert text(page, "queue").startswith("request")


def test_errors_are_shown(page):
    send(page, "x", "text", key="wrong")
    until(page, lambda: "API key" in text(page, "output"))
    assert page.find_element(By.ID, "output").get_attribute("class") == "bad"
