# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""A headless Chromium, driven by the DevTools protocol through two pipes.

python -m tests.browser report.html report.png 1280 2200 --dark    (a picture of a page)
"""

import argparse
import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
FLAGS += ["--no-first-run", "--hide-scrollbars", "--disable-background-networking"]
FLAGS += ["--remote-debugging-pipe", "--force-color-profile=srgb", "about:blank"]
START = "import os, sys; r, w = map(int, sys.argv[1:3]); os.dup2(r, 3); os.dup2(w, 4); "
START += "os.execvp(sys.argv[3], sys.argv[3:])"
PATIENCE = 120.0  # seconds for an answer: the machine may be busy


def find() -> str | None:
    """Return the program, None if there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A Chromium with one page; it ends with the `with` block.

    errors: messages of the console that are errors, exceptions, and blocked or failed requests.
    requests: addresses other than data URLs that the page asked for.
    """

    def __init__(self, program: str) -> None:
        self.folder = tempfile.mkdtemp(prefix="chromium-")
        ours, theirs = os.pipe(), os.pipe()  # to the browser, from it
        self.out, self.inward = ours[1], theirs[0]
        words = [sys.executable, "-c", START, str(ours[0]), str(theirs[1]), program]
        words += [f"--user-data-dir={self.folder}", *FLAGS]
        fds = (ours[0], theirs[1])
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(words, pass_fds=fds, env=self._environment(), **quiet)
        for fd in fds:
            os.close(fd)
        self.buffer, self.count, self.session = b"", 0, None
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.loaded = False

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "HOME": self.folder, "XDG_CONFIG_HOME": self.folder}

    def __enter__(self) -> "Browser":
        try:
            targets = self.send("Target.getTargets")["targetInfos"]
            target = next(each for each in targets if each["type"] == "page")["targetId"]
            found = self.send("Target.attachToTarget", targetId=target, flatten=True)
            self.session = found["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                self.send(f"{domain}.enable")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.out)
        os.close(self.inward)
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- protocol ---------------------------------------------------------------------------

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result; RuntimeError for an error or without an answer."""
        self.count += 1
        number = self.count
        message = {"id": number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.out, data) :]
        while True:
            answer = self._read()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        """Return the next message, after noting what it says of errors and requests."""
        while b"\0" not in self.buffer:
            if not select.select([self.inward], [], [], PATIENCE)[0]:
                raise RuntimeError(f"Chromium gave no answer in {PATIENCE:.0f} s")
            part = os.read(self.inward, 1 << 20)
            if not part:
                raise RuntimeError("Chromium has ended")
            self.buffer += part
        line, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(line)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            said = details.get("exception", {}).get("description") or details["text"]
            self.errors.append(said)
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.errors.append(str([each.get("value") for each in params["args"]]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            url = params["request"]["url"]
            self.requests += [] if url.startswith("data:") else [url]
        elif method == "Page.loadEventFired":
            self.loaded = True

    # --- the page ---------------------------------------------------------------------------

    def open(
        self, path: str | Path, width: int = 1280, height: int = 900, dark: bool = False
    ) -> None:
        """Open a file in a window of this size; under 800 pixels of width it is a phone's."""
        phone = width < 800
        self.errors.clear()
        self.requests.clear()
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=2 if phone else 1, mobile=phone,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.loaded = False
        self.send("Page.navigate", url=Path(path).resolve().as_uri())
        while not self.loaded:
            self._read()
        self.settle()

    def settle(self) -> None:
        """Wait until the page has drawn what it was asked to draw."""
        self.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done, 0)))")

    def evaluate(self, code: str) -> Any:
        """Return the value of JavaScript, of a promise its result; RuntimeError if it throws."""
        how = {"returnByValue": True, "awaitPromise": True}
        answer = self.send("Runtime.evaluate", expression=code, **how)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def middle(self, selector: str) -> tuple[float, float]:
        """Scroll an element into view, and return its middle in pixels of the window."""
        code = (
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
            "e.scrollIntoView({block: 'center', behavior: 'instant'}); "
            "const b = e.getBoundingClientRect(); "
            "return [b.left + b.width / 2, b.top + b.height / 2]; })()"
        )
        return tuple(self.evaluate(code))

    def move(self, x: float, y: float) -> None:
        """Move the mouse."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.settle()

    def click(self, selector: str) -> None:
        """Click an element as a user does."""
        x, y = self.middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            button = {"button": "left", "clickCount": 1}
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **button)
        self.settle()

    def press(self, key: str) -> None:
        """Press a key such as ArrowRight on the element with the focus."""
        codes = {"ArrowLeft": 37, "ArrowRight": 39, "Enter": 13, " ": 32, "Tab": 9}
        text = {"text": {"Enter": "\r", " ": " "}[key]} if key in ("Enter", " ") else {}
        self.send(
            "Input.dispatchKeyEvent", type="keyDown", key=key, code=key,
            windowsVirtualKeyCode=codes.get(key, 0), **text,
        )  # fmt: skip
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, code=key)
        self.settle()

    def screenshot(self, path: str | Path, whole: bool = False) -> None:
        """Write the window, or the whole page, as PNG."""
        answer = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(answer["data"]))


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of `python -m tests.browser`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page")
    parser.add_argument("picture")
    parser.add_argument("width", type=int)
    parser.add_argument("height", type=int, help="0: of the whole page")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--run", default="", help="JavaScript to run before")
    parser.add_argument("--colors", type=int, help="colors of the PNG file; default: all")
    return parser


def main(words: Sequence[str]) -> None:
    """Write a picture of a page."""
    args = get_args_parser().parse_args(words)
    program = find()
    if program is None:
        sys.exit("no Chromium: install Debian's package chromium")
    with Browser(program) as browser:
        height = args.height or 900
        browser.open(args.page, args.width, height, args.dark)
        if args.height == 0:
            height = browser.evaluate("document.documentElement.scrollHeight")
            browser.open(args.page, args.width, height, args.dark)
        if args.run:
            browser.evaluate(args.run)
            browser.settle()
        time.sleep(0.3)  # lazy pictures
        browser.screenshot(args.picture)
        if args.colors:  # a smaller file
            image = Image.open(args.picture).convert("RGB")
            image.quantize(args.colors, dither=Image.Dither.NONE).save(args.picture, optimize=True)
        print("\n".join([args.picture, *browser.errors]))


if __name__ == "__main__":
    main(sys.argv[1:])
