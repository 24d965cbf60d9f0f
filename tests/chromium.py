"""A headless Chromium, driven through the DevTools protocol over a pipe."""

import base64
import json
import os
import shutil
import subprocess
from contextlib import contextmanager

EXECUTABLE = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    """One page. ``requests`` lists the addresses that it asked for, ``errors`` what its scripts complained about."""

    def __init__(self, write, read):
        self._write, self._read = write, read
        self._last, self._session = 0, None
        self.requests, self.errors = [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def _send(self, method, parameters):
        self._last += 1
        message = {"id": self._last, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        self._write.flush()

    def _receive(self):
        message = b""
        while not message.endswith(b"\0"):
            byte = self._read.read(1)
            if not byte:
                raise RuntimeError("Chromium has gone")
            message += byte
        message = json.loads(message[:-1])
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.errors.append(message["params"])
        return message

    def call(self, method, **parameters):
        self._send(method, parameters)
        wanted = self._last
        while True:
            message = self._receive()
            if message.get("id") == wanted:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]

    def open(self, path, width=1100, height=1400, scheme="light"):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=path.resolve().as_uri())
        while self._receive().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, expression):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"])
        return result["result"].get("value")

    def press(self, key, **more):
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, **more)

    def screenshot(self):
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])


@contextmanager
def chromium_page(profile):
    """A page of a fresh Chromium whose profile lies in the directory ``profile``."""
    commands_in, commands_out = os.pipe()
    answers_in, answers_out = os.pipe()

    def place():
        # The protocol's places: it is read from 3 and written to 4.
        os.dup2(commands_in, 100), os.dup2(answers_out, 101)
        os.dup2(100, 3), os.dup2(101, 4)

    arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    process = subprocess.Popen(
        [EXECUTABLE, *arguments, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"],
        preexec_fn=place,
        close_fds=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(commands_in), os.close(answers_out)
    try:
        with os.fdopen(commands_out, "wb") as write, os.fdopen(answers_in, "rb", buffering=0) as read:
            yield Page(write, read)
    finally:
        process.terminate()
        process.wait(timeout=20)
