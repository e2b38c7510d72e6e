"""Chromium without a window, driven through the DevTools protocol on a pipe: JSON messages that end with a zero."""

import collections
import json
import os
import pathlib
import select
import shutil
import subprocess
import tempfile
import time
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # it does not start as root with one
    "--remote-debugging-pipe",
    "--no-first-run",
    "--disable-background-networking",
    "--use-fake-device-for-media-stream",  # a camera that shows a moving test picture
    "--use-fake-ui-for-media-stream",
)
TIMEOUT = 120.0  # seconds for what a page is asked


def find() -> str | None:
    """The path of a Chromium, if there is one."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """A Chromium with one page: a context manager, whose end closes it and removes its profile."""

    def __init__(self, *flags: str):
        path = find()
        assert path is not None, "no Chromium is installed"
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        self._log = pathlib.Path(self._profile.name, "output.txt")
        their_input, self._output = os.pipe()
        self._input, their_output = os.pipe()
        # It reads commands at file descriptor 3 and writes answers at 4.
        words = [path, *FLAGS, *flags, f"--user-data-dir={self._profile.name}", "about:blank"]
        script = f'exec "$@" 3<&{their_input} 4>&{their_output}'
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["bash", "-c", script, "chromium", *words],
                pass_fds=(their_input, their_output),
                stdout=log,
                stderr=log,
            )
        os.close(their_input)
        os.close(their_output)
        self._rest, self._number = b"", 0
        self._session: str | None = None
        self.events: collections.deque[dict[str, Any]] = collections.deque(maxlen=1000)
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "DOM", "Log", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None
        try:
            self.send("Browser.close")
            self._process.wait(timeout=20)
        except (OSError, EOFError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._input)
        os.close(self._output)
        self._profile.cleanup()

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a command of the protocol, or a RuntimeError; events that come before it are kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._output, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return dict(answer["result"])
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select.select([self._input], [], [], TIMEOUT)[0]:
                raise TimeoutError(f"Chromium says nothing for {TIMEOUT:.0f} seconds")
            read = os.read(self._input, 1 << 20)
            if not read:
                raise EOFError(f"Chromium ended: {self._log.read_text(errors='replace')[-2000:]}")
            self._rest += read
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))

    def open(self, address: str) -> None:
        """Goes to an address; a RuntimeError if there is no page."""
        found = self.send("Page.navigate", url=address)
        if "errorText" in found:
            raise RuntimeError(f"{address}: {found['errorText']}")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page, awaited; a RuntimeError if it throws."""
        found = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            details = found["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return found["result"].get("value")

    def wait_for(self, expression: str) -> Any:
        """The value of an expression once it is true; a TimeoutError if it does not become true."""
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            try:
                value = self.evaluate(expression)
            except RuntimeError:  # of a page that is going or coming
                value = None
            if value:
                return value
            time.sleep(0.05)
        raise TimeoutError(f"{expression} is not true after {TIMEOUT:.0f} seconds")

    def choose_file(self, selector: str, path: pathlib.Path) -> None:
        """Gives a file to an <input>."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(path)])
