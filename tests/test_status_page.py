"""The status page in a real browser, without a window."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from moelora_jax.server.keys import Key, Keys, digest
from tests.served_model import MODEL, Served, served, tiny_model, wait_for

KEY = "sk-status"
#: A name that would run as a script if the page took names for HTML.
EVIL = "<img src=x onerror=\"document.title='broken'\">"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder: Path = tmp_path_factory.mktemp("status")
    llm = tiny_model(folder)
    llm.load_adapter(EVIL, folder / "adapters" / "attention-r3")
    with served(llm, folder, keys=Keys([Key(digest(KEY))])) as server:
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Browser"]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver; `make browser` installs them on Debian")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    profile = tmp_path_factory.mktemp("profile")
    for argument in (
        "headless=new",
        "no-sandbox",
        "disable-dev-shm-usage",
        "disable-gpu",
        "no-first-run",
        "disable-background-networking",
        f"user-data-dir={profile}",
    ):
        options.add_argument(f"--{argument}")
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        yield Browser(chrome)
    finally:
        chrome.quit()


class Browser:
    """What the tests look at."""

    def __init__(self, chrome: object) -> None:
        self.chrome = chrome

    def script(self, source: str) -> object:
        return self.chrome.execute_script(f"return {source}")  # type: ignore[attr-defined]

    def text(self, selector: str) -> str:
        return str(self.script(f"document.querySelector({selector!r})?.textContent ?? ''"))

    def rows(self) -> dict[str, list[str]]:
        """The cells of the table of models, by model."""
        rows = self.script(
            "[...document.querySelectorAll('#models tr')]"
            ".map(row => [...row.cells].map(cell => cell.textContent))"
        )
        assert isinstance(rows, list)
        return {name: cells for name, *cells in rows}

    def figure(self, name: str) -> str:
        return self.text(f"[data-name='{name}'] dd")


def test_the_page_shows_what_the_server_does(server: Served, browser: Browser) -> None:
    browser.chrome.get(server.url)  # type: ignore[attr-defined]
    wait_for(lambda: "API key" in browser.text("#state"))
    assert browser.rows() == {}
    browser.script(f"document.querySelector('#key').value = '{KEY}'")
    browser.script("document.querySelector('#login button').click()")
    wait_for(lambda: browser.text("#state") == "up")
    assert browser.script("document.querySelector('#login').hidden")

    wait_for(lambda: set(browser.rows()) == {MODEL, EVIL, *server.llm.runner.registry.names()})
    assert browser.rows()["experts-r24"][:2] == ["24", "yes"]
    assert browser.rows()[EVIL][0] == "3"
    assert browser.script("document.title") == "moelora"
    assert browser.figure("compilations") == browser.figure("moved buffers") == "0"

    body = {
        "model": "experts-r24", "prompt": [1, 2, 3], "max_tokens": 100, "n": 8, "ignore_eos": True,
    }  # fmt: skip
    assert server.request("POST", "/v1/completions", body, key=KEY)[0] == 200
    wait_for(lambda: browser.rows()["experts-r24"][3:5] == ["8", "800"])
    assert browser.rows()["experts-r8"][3:5] == ["0", "0"]
    wait_for(lambda: browser.script("Math.max(...curve) > 0"))
    assert browser.figure("running") == browser.figure("waiting") == "0"

    errors = [
        entry
        for entry in browser.chrome.get_log("browser")  # type: ignore[attr-defined]
        if "401" not in entry["message"]  # Before the key was given.
    ]
    assert errors == []
