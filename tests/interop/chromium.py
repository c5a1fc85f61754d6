"""Chromium without a screen, driven through chromedriver by the WebDriver protocol of the W3C: JSON over HTTP.

    with Chromium() as browser:
        browser.open("http://127.0.0.1:8000/")
        browser.run("return document.title")

The browser keeps a log of what it asks for, on behalf of any page and any worker; it is whole once it is closed.
"""

import json
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",  # which cannot be had by root, as in a container
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def missing() -> str | None:
    """What there has to be and is not."""
    if not any(map(shutil.which, BROWSERS)):
        return "Chromium is not installed (on Debian: apt install chromium)"
    if not shutil.which("chromedriver"):
        return "chromedriver is not installed (on Debian: apt install chromium-driver)"
    return None


class Chromium:
    """A browser with a new, empty profile; `flags` are more of its own."""

    def __init__(self, *flags: str):
        self.requests: list[dict[str, Any]] = []
        self.profile = Path(tempfile.mkdtemp())
        log = self.profile / "network.json"
        arguments = [*FLAGS, f"--user-data-dir={self.profile}", f"--log-net-log={log}", *flags]
        options = {"binary": next(filter(None, map(shutil.which, BROWSERS))), "args": arguments}
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        try:
            self.session = f"http://127.0.0.1:{self._port()}/session"
            wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            started = self._call("POST", "", {"capabilities": {"alwaysMatch": wanted}})
            self.session += f"/{started['sessionId']}"
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> "Chromium":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, url: str) -> None:
        """Go to a page and wait until it is there."""
        self._call("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of a function of the page returns, waited for if it is a promise."""
        return self._call("POST", "/execute/sync", {"script": script, "args": arguments})

    def wait(self, expression: str, seconds: float = 120) -> None:
        """Wait until an expression of the page is true."""
        end = time.monotonic() + seconds
        while not self.run(f"return Boolean({expression})"):
            assert time.monotonic() < end, f"{expression}: not within {seconds} s"
            time.sleep(0.05)

    def press(self, *keys: str) -> None:
        """Press keys together, as a hand would, and let them go."""
        down = [{"type": "keyDown", "value": key} for key in keys]
        up = [{"type": "keyUp", "value": key} for key in reversed(keys)]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": [*down, *up]}]})

    def devtools(self, command: str, **parameters: Any) -> Any:
        """A command of the DevTools protocol."""
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def console(self) -> list[str]:
        """What has been said in the console since it was last asked, with the level before it."""
        entries = self._call("POST", "/se/log", {"type": "browser"})
        return [f"{entry['level']}: {entry['message']}" for entry in entries]

    def close(self) -> None:
        """End the browser, politely, so that it writes its log to the end, and remove the profile."""
        if self.driver.poll() is None:
            self._call("DELETE", "")
            log = json.loads((self.profile / "network.json").read_text("utf-8"))
            self.requests = [p for event in log["events"] if "url" in (p := event.get("params", {}))]
            self._end()

    def asked_by(self, origin: str) -> set[str]:
        """The addresses that pages and workers of an origin asked for, once the browser is closed."""
        return {request["url"] for request in self.requests if request.get("initiator") == origin}

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(self.session + path, method=method)
        if body is not None:
            request.data = json.dumps(body).encode()
        try:
            with _direct.open(request, timeout=180) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {json.load(error)['value']['message']}") from None

    def _port(self) -> str:
        assert self.driver.stdout is not None
        for line in self.driver.stdout:
            if found := re.search(r"successfully on port (\d+)", line):
                return found[1]
        raise AssertionError("chromedriver did not start")

    def _end(self) -> None:
        self.driver.terminate()
        self.driver.communicate()
        shutil.rmtree(self.profile, ignore_errors=True)


_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy has no way to this machine
