"""The page of `gemlet export web` in Chromium, served by Python's own server of files.

Needs Chromium, its chromedriver, and the packages of wllama: in the cache (`gemlet export web --fetch` puts them there)
or in the folder that GEMLET_WLLAMA names.
"""

import functools
import os
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gemlet.errors import GemletError
from gemlet.export.web import cache_folder, export_web, read_wllama
from gemlet.lm import LM, load
from tests.interop import chromium
from tests.interop.chromium import Chromium
from tests.test_golden import MODEL, PROMPT, STORY

CONTROL, ENTER, ESCAPE = "\ue009", "\ue007", "\ue00c"  # WebDriver's names of the keys
BEGINNINGS = ("Once upon a time", "One day, a", "Ben and Lucy")
READY = "!document.getElementById('tell').disabled"
FAILED = "document.getElementById('status').className === 'error'"


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def wllama() -> Path:
    folder = Path(os.environ.get("GEMLET_WLLAMA") or cache_folder())
    lacking = chromium.missing()
    if lacking:
        pytest.skip(lacking)
    try:
        read_wllama(folder)
    except GemletError as error:
        pytest.skip(str(error))
    return folder


@pytest.fixture(scope="module")
def lm() -> LM:
    return load(MODEL, device="cpu")


@pytest.fixture(scope="module")
def site(wllama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_web(MODEL, tmp_path_factory.mktemp("web") / "site", dtype="f32", wllama=wllama)


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with serving(site) as address:
        yield address


class serving:
    """Serve a folder's files while the block runs."""

    def __init__(self, folder: Path):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))

    def __enter__(self) -> str:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def status(browser: Chromium) -> str:
    return " ".join(browser.run("return document.getElementById('status').textContent").split())


def opened(browser: Chromium, address: str) -> Chromium:
    """The page, once the model is loaded."""
    browser.open(address)
    browser.wait(f"{READY} || {FAILED}")
    assert not browser.run(f"return {FAILED}"), status(browser)
    return browser


def begin(browser: Chromium, prompt: str, **settings: float) -> None:
    script = "for (const [id, value] of Object.entries(arguments[0])) document.getElementById(id).value = value"
    browser.run(script, {"prompt": prompt, **settings})
    browser.run("document.getElementById('tell').click()")


def told(browser: Chromium, prompt: str, **settings: float) -> str:
    """What the page tells after a prompt."""
    begin(browser, prompt, **settings)
    browser.wait(READY)
    assert not browser.run(f"return {FAILED}"), status(browser)
    return browser.run("return document.getElementById('told').textContent")


def test_the_page_tells_what_gemlet_tells_and_asks_its_own_server_alone(lm: LM, address: str):
    with Chromium() as browser:
        opened(browser, address)
        for prompt in BEGINNINGS:
            expected = lm.generate(prompt, temperature=0, max_new_tokens=512)
            assert len(lm.tokenizer.encode(expected)) >= 64
            assert told(browser, prompt, temperature=0) == expected
        told(browser, PROMPT, temperature=0)
        assert browser.run("return document.getElementById('story').textContent") == STORY
        assert browser.console() == []
    asked = browser.asked_by(address)
    assert {f"{address}/{name}" for name in ("page.js", "model.gguf", "wllama/wllama.wasm")} <= asked
    assert [url for url in asked if not url.startswith(f"{address}/")] == []


def test_the_browser_keeps_the_page_from_asking_anyone_else(site: Path, address: str):
    with socket.create_server(("127.0.0.1", 0)) as other, Chromium() as browser:
        other.settimeout(0.5)
        opened(browser, address)
        url = f"http://127.0.0.1:{other.getsockname()[1]}/"
        script = "return fetch(arguments[0], {mode: 'no-cors'}).then(() => 'sent', (error) => error.name)"
        assert browser.run(script, url) == "TypeError"
        worker = "fetch(URL).then(() => postMessage('sent'), (error) => postMessage(error.name))".replace(
            "URL", repr(f"{url}from-a-worker")
        )
        script = """
            const worker = new Worker(URL.createObjectURL(new Blob([arguments[0]])));
            return new Promise((answer) => { worker.onmessage = (message) => answer(message.data); });
        """
        assert browser.run(script, worker) == "TypeError"
        with pytest.raises(TimeoutError):
            other.accept()


def test_a_seed_is_a_story(address: str):
    with Chromium() as browser:
        opened(browser, address)
        first, again, other = (told(browser, "One day", temperature=1, seed=seed) for seed in (1, 1, 2))
        assert first == again != other
        assert status(browser).endswith("tokens/s, seed 2")


def test_the_build_for_other_browsers_tells_the_same(lm: LM, address: str):
    """What Safari lacks is taken away before the page's scripts run."""
    with Chromium() as browser:
        browser.devtools("Page.addScriptToEvaluateOnNewDocument", source="delete WebAssembly.Suspending")
        opened(browser, address)
        expected = lm.generate(BEGINNINGS[0], temperature=0, max_new_tokens=512)
        assert told(browser, BEGINNINGS[0], temperature=0) == expected
        assert browser.console() == []
    assert f"{address}/wllama/compat.wasm" in browser.asked_by(address)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_that_finds_it_without_https(site: Path, address: str, scheme: str):
    """Under a name of its own and http a browser grants a page less than on localhost."""
    port = address.rpartition(":")[2]
    with Chromium("--host-resolver-rules=MAP stories.test 127.0.0.1") as browser:
        phone = {"width": 320, "height": 640, "deviceScaleFactor": 2, "mobile": True}
        browser.devtools("Emulation.setDeviceMetricsOverride", **phone)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.devtools("Emulation.setEmulatedMedia", features=features)
        opened(browser, f"http://stories.test:{port}")
        browser.run("document.querySelector('details').open = true")
        assert told(browser, "Once" + "upon" * 40, temperature=0)  # a word that is longer than the screen
        widths = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        assert browser.run(widths) == [320, 320]
        paper = browser.run("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", paper))) < 3 * 128) == (scheme == "dark")
        assert browser.console() == []


def test_keys_tell_and_stop(address: str):
    with Chromium() as browser:
        opened(browser, address)
        browser.run("document.getElementById('temperature').value = 2")
        browser.run("document.getElementById('prompt').focus()")
        browser.press(CONTROL, ENTER)
        browser.wait("document.getElementById('told').textContent")
        browser.press(ESCAPE)
        browser.wait(READY)
        assert status(browser).endswith(", stopped")
        assert told(browser, "Once", temperature=0)  # and it goes on telling


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("model.gguf", None, "The server has no model.gguf (it says 404)"),
        ("model.gguf", b"no model", "The model does not start in this browser (gguf_init_from_reader: invalid magic"),
        ("wllama/index.js", None, "wllama/index.js does not run"),
        ("wllama/wllama.wasm", None, "The server has no wllama/wllama.wasm (it says 404)"),
        ("wllama/wllama.wasm", b"no program", "The model does not start in this browser (Aborted(CompileError"),
    ],
)
def test_what_goes_wrong_is_told_in_words(site: Path, tmp_path: Path, file: str, content: bytes | None, said: str):
    broken = shutil.copytree(site, tmp_path / "broken")
    (broken / file).unlink()
    if content is not None:
        (broken / file).write_bytes(content)
    with serving(broken) as address, Chromium() as browser:
        browser.open(address)
        browser.wait(FAILED, 30)
        assert said in status(browser)


def test_a_page_that_is_opened_as_a_file_says_how_to_serve_it(site: Path):
    with Chromium() as browser:
        browser.open((site / "index.html").as_uri())
        assert "needs JavaScript and a web server" in status(browser)
        assert "python3 -m http.server" in status(browser)
        assert not browser.run(f"return {READY}")


def test_a_beginning_that_is_too_long_is_told_so(address: str):
    with Chromium() as browser:
        opened(browser, address)
        begin(browser, "Once upon a time " * 200)
        browser.wait(FAILED)
        assert "The beginning is too long: it has" in status(browser)
        assert told(browser, "Once", temperature=0)  # and it goes on telling
