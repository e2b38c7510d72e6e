"""How long does the page of topformer_jax.demo take for a frame, in Chromium?

  python -m benchmarks.page --config configs/topformer_t_ade.py

The page's own time from a picture's pixels to the colours over it, in wasm with 1 thread and 2, for web and CPU
files, with full-size and half-size labels. The weights are random; labels are compared with onnxruntime's. It needs
chromium and npm.
"""

import argparse
import base64
import contextlib
import functools
import pathlib
import tempfile
import threading
from collections.abc import Iterator

import cv2
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict

from benchmarks import chromium, runner, samples
from benchmarks.chromium import Browser
from benchmarks.inference import write_file
from benchmarks.runner import Program, Report
from topformer_jax import demo
from topformer_jax.exporters import exported
from topformer_jax.runtime import cli
from topformer_jax.runtime.errors import UserError

FILES = (("web", 1), ("web", 2), ("cpu", 1), ("cpu", 2))  # target and stride


@contextlib.contextmanager
def serve(folder: pathlib.Path, port: int = 0) -> Iterator[demo.Server]:
    """Serves a folder while the context lasts."""
    with demo.Server(str(folder), port) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def text_of(browser: Browser, name: str) -> str:
    """The text of an element, by its id."""
    return str(browser.evaluate(f"document.getElementById('{name}').textContent"))


def check(browser: Browser) -> None:
    """Raises a RuntimeError with what the page complains about."""
    if problem := text_of(browser, "problem"):
        raise RuntimeError(f"the page says: {problem}")


def open_page(browser: Browser, address: str) -> None:
    """Opens a page, and waits until it has loaded the network."""
    browser.open(address)
    browser.wait_for("document.body.dataset.ready || document.getElementById('problem').textContent")
    check(browser)


def choose_device(browser: Browser, choice: str) -> None:
    """Has the page compute with "wasm 2", say, or "webgpu"."""
    browser.evaluate(
        "{ const device = document.getElementById('device');"
        f" device.value = '{choice}'; device.onchange({{ target: device }}) }}"
    )
    check(browser)


def show(browser: Browser, path: pathlib.Path) -> None:
    """Gives the page a picture, and waits until it is segmented."""
    browser.evaluate("window.shown = undefined; document.getElementById('problem').textContent = ''")
    browser.choose_file("#file", path)
    browser.wait_for(f"window.shown?.name === '{path.name}' || document.getElementById('problem').textContent")
    check(browser)


def read_bytes(browser: Browser, expression: str) -> bytes:
    """What an expression's array of bytes holds."""
    url = browser.evaluate(
        "new Promise((resolve) => { const reader = new FileReader(); reader.onload = () => resolve(reader.result);"
        f" reader.readAsDataURL(new Blob([{expression}])) }})"
    )
    return base64.b64decode(url.partition(",")[2])


def read_shown(browser: Browser) -> tuple[UInt8[np.ndarray, "h w 3"], UInt8[np.ndarray, "rows columns"]]:
    """The pixels that the network saw last, and its labels."""
    sizes = browser.evaluate("[shown.pixels.height, shown.pixels.width, shown.height, shown.width]")
    pixels = np.frombuffer(read_bytes(browser, "shown.pixels.data"), np.uint8).reshape(*sizes[:2], 4)
    labels = np.frombuffer(read_bytes(browser, "shown.labels"), np.uint8).reshape(sizes[2:])
    return pixels[..., :3], labels


def start(browser: Browser, name: str, picture: pathlib.Path) -> Program:
    """The page with a device as a program, once it has segmented the picture."""
    choose_device(browser, name)

    def run(calls: int) -> float:
        milliseconds = 0.0
        for _ in range(calls):
            show(browser, picture)
            milliseconds += browser.evaluate("shown.whole")
        return milliseconds / 1000

    first = run(1)
    return Program(run, first, result=read_shown(browser)[1])


def measure(args: argparse.Namespace, config: ConfigDict) -> Report:
    """The page with each file, and the labels that differ from onnxruntime's."""
    if chromium.find() is None:
        raise UserError(f"no browser is installed: looked for {', '.join(chromium.NAMES)}")
    runtime = demo.fetch_runtime()
    rows, notes = [], []
    with tempfile.TemporaryDirectory() as folder:
        picture = pathlib.Path(folder, "picture.png")
        image = samples.images(1, (args.size, args.size))[0]
        picture.write_bytes(cv2.imencode(".png", image[..., ::-1])[1].tobytes())
        for target, stride in FILES:
            path = pathlib.Path(folder, f"{target}_{stride}.onnx")
            size = (args.size, args.size)
            path.write_bytes(write_file(config, "labels", size, ".onnx", target=target, stride=stride))
            page = pathlib.Path(folder, f"{target}_{stride}")
            demo.write_page(page, {"wasm": path}, demo.read_description("--exported", path), runtime)
            with contextlib.ExitStack() as stack:
                server = stack.enter_context(serve(page))
                programs = {}
                for threads in (1, 2):
                    browser = stack.enter_context(Browser())
                    open_page(browser, server.address)
                    programs[f"wasm {threads}"] = start(browser, f"wasm {threads}", picture)
                case = f"target {target}, labels 1/{stride}"
                rows += runner.compare(case, programs, args.repeats, images=1)
                expected = exported.open_exported(path)(read_shown(browser)[0][None])[0]
                version = browser.send("Browser.getVersion")["product"]
            apart = {name: int((program.result != expected).sum()) for name, program in programs.items()}
            notes.append(f"{case}: labels unlike onnxruntime's, of {expected.size}: {apart}")
    return Report(f"page: {runner.describe(config)}, 1 x {args.size} x {args.size}, {version}", rows, notes)


main = functools.partial(runner.run, __doc__, measure, size=(512, "pixels of a side"))
if __name__ == "__main__":
    cli.run(main)
