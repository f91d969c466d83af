# SPDX-License-Identifier: Apache-2.0
"""Headless Chromium, steered over a pair of pipes: pages are opened from files, clicked, and looked at.

Only tests use it. `Browser.find()` is None where no Chromium is installed (Debian: chromium-headless-shell).
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


class Browser:
    """`with Browser(folder) as browser:` one page at a time. Raises RuntimeError for the browser's errors."""

    def __init__(self, folder: Path) -> None:
        program = self.find()
        assert program is not None
        ours, theirs = os.pipe(), os.pipe()  # (their end to read, ours to write), (ours to read, theirs to write)

        def inherit() -> None:
            os.dup2(ours[0], 3)
            os.dup2(theirs[1], 4)

        flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run"]
        if "shell" not in program:
            flags.append("--headless=new")
        command = [program, *flags, "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"]
        log = subprocess.DEVNULL
        self._process = subprocess.Popen(command, pass_fds=(3, 4, ours[0], theirs[1]), preexec_fn=inherit, stderr=log)
        os.close(ours[0])
        os.close(theirs[1])
        self._out, self._in = os.fdopen(ours[1], "wb", buffering=0), os.fdopen(theirs[0], "rb")
        self._last, self._session = 0, None
        self.messages: list[dict[str, Any]] = []  # the page's events: what it logged, fetched, threw
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    @staticmethod
    def find() -> str | None:
        return next((found for name in PROGRAMS if (found := shutil.which(name))), None)

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(10)
        self._out.close()
        self._in.close()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.messages.append(answer)

    def _receive(self) -> dict[str, Any]:
        data = bytearray()
        while (byte := self._in.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser ended")
            data += byte
        return json.loads(data)

    def open(self, path: Path, width: int = 1000, height: int = 700, dark: bool = False) -> None:
        """Open a file and wait until it is loaded."""
        self.messages.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[theme])
        self.call("Page.navigate", url=path.as_uri())
        while not any(message["method"] == "Page.loadEventFired" for message in self.messages):
            self.messages.append(self._receive())

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"].get("description", str(found)))
        return found["result"].get("value")

    def middle(self, selector: str, n: int = 0) -> tuple[float, float]:
        """Where the n-th element stands, scrolled into view."""
        element = f"document.querySelectorAll({json.dumps(selector)})[{n}]"
        middle = "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]"
        scrolled = "await new Promise(go => requestAnimationFrame(() => requestAnimationFrame(go)))"
        where = f"(async e => {{ e.scrollIntoView({{ block: 'center' }}); {scrolled}; {middle} }})({element})"
        x, y = self.run(where)
        return x, y

    def point(self, x: float, y: float, kind: str = "mouseMoved", **more: Any) -> None:
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def click(self, selector: str, n: int = 0) -> None:
        x, y = self.middle(selector, n)
        for kind in ("mousePressed", "mouseReleased"):
            self.point(x, y, kind, button="left", clickCount=1)

    def press(self, key: str) -> None:
        codes = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Enter": 13, "Escape": 27, "Tab": 9}
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=codes[key], **text)
            text = {}

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def screenshot(self, path: Path, *, whole: bool = False) -> Path:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]))
        return path
