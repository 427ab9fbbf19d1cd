"""A Chromium without a window, driven by Selenium: what a person does on a page, and what the page does to a person."""

import base64
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from tests.browser import build
from tests.support.wait import LONG_S, wait_until

Theme = Literal["light", "dark"]

DESKTOP = (1280, 900)
PHONE = (390, 844)

FIRST_LOAD_BYTES = 400_000
"""The most that a page and all it needs may be, nothing cached."""


class Browser:
    """One window of it. Pages see the theme and the size that were set last."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def open(self, address: str) -> None:
        """Load a page, and forget what earlier ones logged. One with the token leads on to one without it."""
        self.leave()
        self.console()
        self.driver.get(address)
        self.wait_for("document.readyState === 'complete' && !location.search.includes('token=')", what=address)

    def leave(self) -> None:
        """Leave the page, which ends its stream of events."""
        self.driver.get("about:blank")

    def forget(self) -> None:
        """Lose all cookies and everything that was loaded before."""
        self._command("Network.clearBrowserCookies")
        self.forget_files()

    def forget_files(self) -> None:
        """Lose everything that was loaded before, but no cookies."""
        self._command("Network.clearBrowserCache")

    def transferred(self) -> int:
        """Bytes of the open page and of all that it has loaded, as they came over the wire."""
        script = "return performance.getEntries().reduce((sum, entry) => sum + (entry.transferSize ?? 0), 0)"
        return int(self.run(script))

    def metrics(self) -> dict[str, float]:
        """Chromium's own figures of the page, in seconds and counts: ScriptDuration, TaskDuration and others."""
        self._command("Performance.enable")
        return {one["name"]: one["value"] for one in self._command("Performance.getMetrics")["metrics"]}

    def path(self) -> str:
        """The address without host and port."""
        return "/" + str(self.driver.current_url).split("/", 3)[3]

    def console(self) -> list[str]:
        """Errors and warnings of the page since this was asked last: of scripts, of the network, of its own policy."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] in {"SEVERE", "WARNING"}]

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait_for(self, script: str, *arguments: Any, what: str = "", timeout_s: float = LONG_S) -> Any:
        """Wait until an expression is true, and return its value."""
        values: list[Any] = []

        def is_true() -> bool:
            values.append(self.run(f"return {script}", *arguments))
            return bool(values[-1])

        wait_until(is_true, timeout_s=timeout_s, what=what or script)
        return values[-1]

    def text(self, selector: str = "body") -> str:
        """What a person reads in the first such element."""
        return str(self.wait_for("document.querySelector(arguments[0])", selector, what=selector).text)

    def num(self, selector: str) -> int:
        return int(self.run("return document.querySelectorAll(arguments[0]).length", selector))

    def click(self, words: str) -> None:
        """Click the link or button with these words, as with a mouse; wait for the page that follows."""
        from selenium.webdriver.common.by import By

        quoted = json.dumps(words)
        path = f"//*[self::a or self::button][normalize-space()={quoted}]"
        wait_until(lambda: len(self.driver.find_elements(By.XPATH, path)) > 0, what=f"something to click: {words}")
        self.run("window.isOld = true")
        self.driver.find_element(By.XPATH, path).click()
        self.wait_for("!window.isOld && document.readyState === 'complete'", what=f"the page after {words}")

    def press(self, *keys: str) -> None:
        """Press keys, wherever the focus is: `TAB`, `ENTER`, or characters."""
        from selenium.webdriver import ActionChains, Keys

        chain = ActionChains(self.driver)
        for key in keys:
            chain.send_keys(getattr(Keys, key, key))
        chain.perform()

    def focused(self) -> str:
        """The text of the element that has the focus."""
        return str(self.run("return document.activeElement.textContent.trim()"))

    def show(self, theme: Theme = "light", size: tuple[int, int] = DESKTOP) -> None:
        """Set the system's theme and the size of the window, for pages that are open too."""
        features = [
            {"name": "prefers-color-scheme", "value": theme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self._command("Emulation.setEmulatedMedia", features=features)
        width, height = size
        self._command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=size == PHONE
        )

    @contextmanager
    def without_scripts(self) -> Iterator[None]:
        """Pages run no JavaScript in this block; ours still looks at them."""
        self._command("Emulation.setScriptExecutionDisabled", value=True)
        try:
            yield
        finally:
            self._command("Emulation.setScriptExecutionDisabled", value=False)

    def picture(self, *, max_height: int = 2400) -> bytes:
        """A PNG of the whole page, cut off below `max_height`."""
        content = self._command("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": content["width"], "height": min(content["height"], max_height), "scale": 1}
        return base64.b64decode(self._command("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"])

    def findings(self) -> list[str]:
        """What axe finds serious or critical on the open page, in a line each."""
        self.driver.execute_script(build.axe().read_text())
        script = (
            "axe.run({resultTypes: ['violations']}).then(arguments[0], error => arguments[0]({error: String(error)}))"
        )
        result = self.driver.execute_async_script(script)
        return [
            f"{rule['id']}: {rule['help']}: {node['html'][:200]} {node.get('failureSummary', '')}"
            for rule in result["violations"]
            if rule["impact"] in {"serious", "critical"}
            for node in rule["nodes"][:3]
        ]

    def _command(self, name: str, **arguments: Any) -> Any:
        return self.driver.execute_cdp_cmd(name, arguments)


@contextmanager
def running(downloads: Path) -> Iterator[Browser]:
    """A new Chromium with an empty profile."""
    sys.path.append(str(build.python_packages()))  # behind ours: it has other versions of some
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in (
        "--headless=new",
        "--no-sandbox",  # its sandbox does not start for root
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--no-first-run",
        "--force-color-profile=srgb",
        "--hide-scrollbars",
        "--lang=en",
        f"--window-size={DESKTOP[0]},{DESKTOP[1]}",
        f"--user-data-dir={downloads}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(executable_path=shutil.which("chromedriver")))
    try:
        driver.set_page_load_timeout(LONG_S)
        driver.set_script_timeout(LONG_S)
        driver.execute_cdp_cmd("Emulation.setTimezoneOverride", {"timezoneId": "UTC"})
        yield Browser(driver)
    finally:
        driver.quit()
