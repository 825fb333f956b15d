"""The app in a headless Chromium, for the screenshots and the end-to-end test.

This needs selenium, and Debian's chromium and chromedriver.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PROGRAMS = ("chromium", "chromedriver")
WAIT = 240  # seconds; a busy machine is slow
CLOSED = (  # what a page says that is left, whose streams end; it may ask for them once more
    "AbortError: signal is aborted without reason", "AbortError: BodyStreamBuffer was aborted", "TypeError: network error",
    '"Unexpected error" "Connection errored out. "', '"Unexpected error" "404: Not Found"',
    "Failed to load resource: net::ERR_INCOMPLETE_CHUNKED_ENCODING",
)  # fmt: skip
LEFT_AT = "return performance.timeOrigin + performance.getEntriesByType('navigation')[0].unloadEventEnd"


def missing() -> str:
    """Why there is no browser here; "" if there is one."""
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    try:
        import selenium  # noqa: F401
    except ImportError:
        lacking.append("selenium")
    return f"no {' and '.join(lacking)} here (apt install chromium chromium-driver; pip install selenium)" if lacking else ""


@contextmanager
def browser(folder: Any, *, width: int = 1280, height: int = 900) -> Iterator[Browser]:
    """A fresh Chromium that downloads to `folder`. It is closed at the end."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_script_timeout(WAIT)
    try:
        page = Browser(driver)
        page.resize(width, height)
        yield page
    finally:
        driver.quit()


class Browser:
    """A driver with the few actions that we need, by CSS selector."""

    def __init__(self, driver: Any):
        self.driver, self.url = driver, ""
        self._said: list[str] = []  # errors of the pages so far

    def open(self, url: str) -> None:
        """Open the app and wait until its page is drawn. Gradio's page closes its connection when it is left, and says so in
        the console: that is no error."""
        self.url = url
        self.errors()
        self.driver.get(url)
        self.errors(left_at=self.driver.execute_script(LEFT_AT))
        self.until(lambda: self.all("#prompt textarea"), WAIT)

    def all(self, css: str) -> list[Any]:
        """All visible elements."""
        return [found for found in self.driver.find_elements("css selector", css) if found.is_displayed()]

    def one(self, css: str) -> Any:
        """Wait for a visible element, and return the first."""
        return self.until(lambda: self.all(css), WAIT)[0]

    def text(self, css: str) -> str:
        """The text of an element; "" if there is none."""
        return next((found.text for found in self.all(css)), "")

    def click(self, css: str) -> None:
        """Scroll to an element and click it, once nothing covers it."""
        from selenium.common.exceptions import ElementClickInterceptedException

        def clicked() -> bool:
            found = self.one(css)
            self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
            try:
                found.click()
            except ElementClickInterceptedException:  # the page is still being laid out
                return False
            return True

        self.until(clicked, WAIT)

    def tab(self, name: str) -> None:
        """Show a tab."""
        self.until(lambda: [b for b in self.all("#tabs [role=tab]") if b.text == name], WAIT)[0].click()

    def type(self, css: str, text: str) -> None:
        """Type text into a field, and leave the field."""
        from selenium.webdriver.common.keys import Keys

        field = self.one(css)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", field)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text, Keys.TAB)

    def choose(self, css: str, text: str) -> None:
        """Choose from a dropdown."""
        self.click(f"{css} input")
        options = self.until(lambda: [o for o in self.all(f"{css} [role=option]") if o.text.strip().endswith(text)], WAIT)
        options[0].click()

    def unnamed(self) -> list[str]:
        """Fields and buttons that you can see and reach, but that have no name for people who cannot see them.

        Elements that neither a screen reader nor the Tab key finds are left out: Gradio has copies of tabs to measure them.
        """
        reached = ":not([aria-hidden=true] [tabindex='-1'])"
        kinds = ", ".join(f".gradio-container {kind}{reached}" for kind in ("input", "textarea", "button", "[role=slider]"))
        return [found.get_attribute("outerHTML")[:200] for found in self.all(kinds) if not found.accessible_name.strip()]

    def until(self, true: Callable[[], Any], seconds: float) -> Any:
        """Wait until `true` returns something true, and return that. Elements that Gradio redraws are found again."""
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait

        wait = WebDriverWait(self.driver, seconds, 0.05, ignored_exceptions=[StaleElementReferenceException])
        return wait.until(lambda _: true())

    def resize(self, width: int, height: int) -> None:
        """Give the page this many pixels. A window itself cannot be as narrow as a phone."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def errors(self, left_at: float = 0) -> list[str]:
        """Errors in the pages' consoles so far, except missing files of icons and fonts, and except that a page closed its
        connection before `left_at`, in milliseconds since 1970."""
        for said in self.driver.get_log("browser"):
            closed = said["timestamp"] <= left_at and any(each in said["message"] for each in CLOSED)
            if said["level"] == "SEVERE" and "favicon" not in said["message"] and not closed:
                self._said.append(said["message"])
        return list(self._said)
