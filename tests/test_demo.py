"""The page: what it is made of, how it is served, what it refuses; and all that it does in Chromium."""

import functools
import http.client
import http.server
import json
import pathlib
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from typing import Any

import cv2
import jax
import numpy as np
import onnx
import PIL.Image
import pytest
import torch

import topformer_jax
from benchmarks import chromium, page as page_lib
from benchmarks.chromium import Browser
from benchmarks.page import choose_device, open_page, read_bytes, read_shown, show, text_of
from tests.commands import LONGEST, free_port
from tests.test_export import command, refused
from topformer_jax import checkpoints, config, demo, export
from topformer_jax.data import shapes
from topformer_jax.data.augment import normalize
from topformer_jax.exporters import exported, network, onnx_file
from topformer_jax.runtime.errors import UserError

SIZE = (96, 128)


@pytest.fixture(scope="module")
def folder(states: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Random weights, the file of a command, and others with its description or a changed one."""
    folder = tmp_path_factory.mktemp("demo")
    torch.save({"state_dict": states}, folder / "weights.pth")
    flags = ["--checkpoint", folder / "weights.pth", "--size", "x".join(map(str, SIZE)), "--target", "web"]
    command(export.main, "--config", "topformer_t_ade", *flags, "--output", folder / "web.onnx")
    written = exported.open_exported(folder / "web.onnx").description
    for name, change in (("logits", {"output": "logits"}), ("other", {"checkpoint": {"sha256": "0"}})):
        graph = onnx.load(folder / "web.onnx")
        onnx.helper.set_model_props(graph, {exported.KEY: json.dumps(written | change)})
        onnx.save(graph, folder / f"{name}.onnx")
    settings = config.load("topformer_t_ade")
    model = checkpoints.load_model(settings, folder / "weights.pth")
    description = written | {"stride": 2, "size": None, "target": "cpu"}
    data = onnx_file.write(network.make_function(model, "labels", 2), description)
    (folder / "any.onnx").write_bytes(data)
    # The axes of the resize for processors are wrong on WebGPU.
    data = onnx_file.write(network.make_function(model, "labels"), written | {"target": "cpu"})
    (folder / "cpu.onnx").write_bytes(data)
    wrong = onnx.load_from_string(data)
    onnx.helper.set_model_props(wrong, {exported.KEY: json.dumps(written)})
    onnx.save(wrong, folder / "wrong.onnx")
    (folder / "cut.onnx").write_bytes((folder / "web.onnx").read_bytes()[:-100_000])
    return folder


@pytest.fixture(scope="module")
def picture(folder: pathlib.Path) -> pathlib.Path:
    """A drawn scene of another size and another shape than the network's."""
    path = folder / "scene.png"
    path.write_bytes(cv2.imencode(".png", shapes.draw("validation", 0, 200)[0][..., ::-1])[1].tobytes())
    return path


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder that looks like the runtime's package."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "dist").mkdir()
    for names in demo.RUNTIME_FILES.values():
        for name in names:
            (folder / "dist" / name).write_text(f"content of {name}")
    return folder


def build(
    page: pathlib.Path, runtime: pathlib.Path, path: pathlib.Path, webgpu: pathlib.Path | None = None
) -> dict[str, Any]:
    """Writes a page, and returns its description."""
    demo.write_page(page, *demo.find_files(path, webgpu), runtime)
    return json.loads((page / "model.json").read_text())


# What it is made of


def test_the_page_holds_what_it_names(folder: pathlib.Path, package: pathlib.Path, tmp_path: pathlib.Path) -> None:
    facts = build(tmp_path, package, folder / "web.onnx")
    small = {path.name for path in tmp_path.iterdir() if path.is_file() and path.suffix != ".onnx"}
    text = "".join((tmp_path / name).read_text() for name in small if not name.endswith(".json"))
    named = re.findall(r'(?:src|href)="([^"]+)"|(?:from|fetch|URL|register)\(? ?"(?:\./)?([^"]+\.\w+)"', text)
    assert {name for pair in named for name in pair if name} == small - {"index.html"}
    kept = json.loads(re.search(r"const PAGE = (\[.*\])", text)[1])  # type: ignore[index]
    assert {"index.html" if name == "./" else name for name in kept} == small - {"offline.js"}
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert (facts["size"], facts["classes"][0]) == ([96, 128], "wall")
    assert list(facts["providers"]) == ["wasm", "webgpu"]
    for provider in facts["providers"].values():
        sizes = [(tmp_path / name.partition("?")[0]).stat().st_size for name in provider["files"]]
        assert provider["bytes"] == sum(sizes)


def test_a_second_file_is_for_webgpu(folder: pathlib.Path, package: pathlib.Path, tmp_path: pathlib.Path) -> None:
    build(tmp_path, package, folder / "cpu.onnx", folder / "web.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == (folder / "cpu.onnx").read_bytes()
    assert (tmp_path / "model_webgpu.onnx").read_bytes() == (folder / "web.onnx").read_bytes()
    for first, second, words in (
        ("cpu", "cpu", "would be wrong on WebGPU: export it with --target web"),
        ("cpu", "other", "has another checkpoint than"),
        ("cpu", "logits", "--webgpu .* gives logits"),
        ("any", "web", r"has another size than .*: \[96, 128\] and None"),
    ):
        with pytest.raises(UserError, match=words):
            demo.find_files(folder / f"{first}.onnx", folder / f"{second}.onnx")


def test_the_folder_is_written_and_written_over(
    folder: pathlib.Path, package: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    words = ["--runtime", package, "--output", tmp_path / "page"]
    assert command(demo.main, "--exported", folder / "web.onnx", *words) == f"wrote {tmp_path / 'page'}\n"
    command(demo.main, "--exported", folder / "any.onnx", *words)
    assert (tmp_path / "page/model.onnx").read_bytes() == (folder / "any.onnx").read_bytes()
    facts = json.loads((tmp_path / "page/model.json").read_text())
    assert (list(facts["providers"]), facts["size"]) == (["wasm"], None)
    (tmp_path / "page/model.json").unlink()
    line = refused(demo.main, "--exported", folder / "web.onnx", *words)
    assert "holds other files: name a new folder" in line


def test_it_is_served_isolated_and_with_its_types(
    folder: pathlib.Path, package: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    page = tmp_path / "page"
    build(page, package, folder / "web.onnx")
    (tmp_path / "secret").touch()

    def get(path: str, **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=LONGEST)
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response, response.read()

    kinds = {".mjs": "javascript", ".js": "javascript", ".wasm": "application/wasm", ".css": "text/css"}
    with page_lib.serve(page) as server:
        for path in (path for path in page.rglob("*") if path.is_file()):
            response, found = get(f"/{path.relative_to(page)}")
            assert (response.status, found) == (200, path.read_bytes())
            assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
            assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
            assert kinds.get(path.suffix, "") in response.headers["Content-Type"], path
        response, found = get("/")
        assert found == (page / "index.html").read_bytes()
        assert get("/", **{"If-Modified-Since": response.headers["Last-Modified"]})[0].status == 304
        assert get("/model.onnx?0123")[1] == (page / "model.onnx").read_bytes()
        runtime = next(page.glob("onnxruntime-web-*")).name
        for name in ("/nothing", "/../secret", "/%2e%2e/secret", "//etc/passwd", "/page.js/", f"/{runtime}/"):
            assert get(name)[0].status == 404, name


def test_a_browser_that_left_is_no_traceback(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    with demo.Server(str(tmp_path), 0) as server:
        for error in (ConnectionResetError(), BrokenPipeError(), ValueError("a mistake")):
            try:
                raise error
            except Exception:
                server.handle_error(None, ("127.0.0.1", 1))
    assert capsys.readouterr().err.count("Traceback") == 1


# What it refuses


@pytest.mark.parametrize(("name", "words"), [
    ("none.onnx", "cannot read"),
    ("weights.pth", "expected an .onnx file, which the page runs"),
    ("logits.onnx", "gives logits: the page shows labels"),
    ("cut.onnx", "is not an ONNX file, or a damaged one"),
])  # fmt: skip
def test_files_that_the_page_cannot_show(folder: pathlib.Path, tmp_path: pathlib.Path, name: str, words: str) -> None:
    assert words in refused(demo.main, "--exported", folder / name, "--output", tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_runtimes_and_ports_that_cannot_be_had(
    folder: pathlib.Path, package: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    words = ["--exported", folder / "web.onnx", "--runtime"]
    line = refused(demo.main, *words, tmp_path, "--output", tmp_path / "page")
    assert "No such file or directory: expected npm's onnxruntime-web 1.30.0, unpacked" in line
    assert not (tmp_path / "page").exists()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refused(demo.main, *words, package, "--port", port)
        assert f"cannot serve at port {port}: Address already in use; name another" in line
    assert "cannot serve at port 99999" in refused(demo.main, *words, package, "--port", 99999)


def test_machines_without_the_package(
    folder: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--exported", folder / "web.onnx", "--output", tmp_path / "page"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if shutil.which("npm"):
        monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{free_port()}/")
        monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
        line = refused(demo.main, *words)
        assert "npm cannot fetch onnxruntime-web 1.30.0: " in line
        assert "ECONNREFUSED" in line
        assert "name its folder as --runtime" in line
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "npm, which is not installed: install Node.js" in refused(demo.main, *words)
    assert not (tmp_path / "page").exists()


# In Chromium


@pytest.fixture(scope="module")
def runtime() -> pathlib.Path:
    """The runtime from npm, in this user's cache: fetched once."""
    try:
        return demo.fetch_runtime()
    except UserError as error:
        pytest.skip(error.line)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if chromium.find() is None:
        pytest.skip("no Chromium is installed")
    with Browser() as browser:
        yield browser


def segment(browser: Browser, path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """The pixels that the network saw of a picture, and its labels."""
    show(browser, path)
    return read_shown(browser)


def overlay_of(browser: Browser) -> np.ndarray:
    """The pixels of the classes' colours, RGBA."""
    overlay = "document.getElementById('overlay').getContext('2d')"
    data = read_bytes(browser, f"{overlay}.getImageData(0, 0, {SIZE[1]}, {SIZE[0]}).data")
    return np.frombuffer(data, np.uint8).reshape(*SIZE, 4)


def expected_labels(folder: pathlib.Path, pixels: np.ndarray, stride: int = 1) -> np.ndarray:
    """JAX's logits of the pixels, enlarged by PyTorch."""
    model = topformer_jax.load("topformer_t_ade", folder / "weights.pth")
    logits = np.asarray(jax.jit(model)(normalize(pixels[None]))).transpose(0, 3, 1, 2)
    size = [(side - 1) // stride + 1 for side in pixels.shape[:2]]
    enlarged = torch.nn.functional.interpolate(torch.tensor(logits), size, mode="bilinear", align_corners=False)
    return np.asarray(enlarged[0].argmax(0), np.uint8)


def different(labels: np.ndarray, others: np.ndarray) -> float:
    assert labels.shape == others.shape
    return float((labels != others).mean())


@pytest.fixture(scope="module")
def page(folder: pathlib.Path, runtime: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a page."""
    build(path := tmp_path_factory.mktemp("page"), runtime, folder / "web.onnx")
    with page_lib.serve(path) as server:
        yield server.address


def test_labels_equal_those_of_onnxruntime_and_jax(
    folder: pathlib.Path, picture: pathlib.Path, browser: Browser, page: str
) -> None:
    open_page(browser, page)
    assert browser.evaluate("crossOriginIsolated")
    pixels, labels = segment(browser, picture)
    assert pixels.shape == (*SIZE, 3)
    assert len(np.unique(labels)) > 3
    file = exported.open_exported(folder / "web.onnx")
    assert different(labels, file(pixels[None])[0]) <= 1e-4
    assert different(labels, expected_labels(folder, pixels)) <= 1e-4
    # What is shown: the colours of the classes, and their shares.
    assert (overlay_of(browser)[..., :3] == np.array(file.description["palette"], np.uint8)[labels]).all()
    rows = browser.evaluate(
        "[...document.querySelectorAll('#legend button')].map((row) => row.innerText.split('\\n'))"
    )
    names = file.description["classes"]
    counts = np.bincount(labels.ravel(), minlength=len(names))
    for name, text in rows:
        share = counts[names.index(name)] / labels.size
        assert text == ("< 0.1 %" if share < 0.001 else f"{100 * share:.1f} %")
    assert [name for name, _ in rows] == [
        names[label] for label in np.argsort(-counts, kind="stable") if counts[label]
    ]
    assert re.match(r"\d+ ms a frame, \d+ of them the network", text_of(browser, "status"))
    # One class alone, by its button; another opacity.
    browser.evaluate("document.querySelector('#legend button').click()")
    assert ((overlay_of(browser)[..., 3] == 255) == (labels == counts.argmax())).all()
    browser.evaluate(
        "{ const opacity = document.getElementById('opacity'); opacity.value = 51;"
        " opacity.oninput({ target: opacity }) }"
    )
    assert text_of(browser, "percent") == "51 %"
    assert browser.evaluate("document.getElementById('overlay').style.opacity") == "0.51"


def test_a_file_of_any_size_keeps_the_shape_of_a_picture(
    folder: pathlib.Path,
    picture: pathlib.Path,
    runtime: pathlib.Path,
    browser: Browser,
    tmp_path: pathlib.Path,
) -> None:
    build(tmp_path / "page", runtime, folder / "any.onnx")
    scene, tall = np.asarray(PIL.Image.open(picture)), tmp_path / "tall.png"
    PIL.Image.fromarray(scene[:, :90]).save(tall)
    with page_lib.serve(tmp_path / "page") as server:
        open_page(browser, server.address)
        assert "No WebGPU: the page was made for processors." in text_of(browser, "hint")
        pixels, labels = segment(browser, tall)
    assert pixels.shape[0] / pixels.shape[1] == pytest.approx(scene.shape[0] / 90, rel=0.02)
    assert pixels.shape[0] * pixels.shape[1] == pytest.approx(512 * 512, rel=0.02)  # the config's crop
    assert different(labels, expected_labels(folder, pixels, stride=2)) <= 1e-4


def test_it_works_on_a_plain_server_and_then_without_a_network(
    folder: pathlib.Path,
    picture: pathlib.Path,
    runtime: pathlib.Path,
    browser: Browser,
    tmp_path: pathlib.Path,
) -> None:
    facts = build(tmp_path / "site/page", runtime, folder / "web.onnx")
    answers: list[tuple[int, str]] = []

    class Plain(http.server.SimpleHTTPRequestHandler):
        def log_request(self, code: Any = "-", size: Any = "-") -> None:
            answers.append((code, self.path))

    handler = functools.partial(Plain, directory=str(tmp_path / "site"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_port
        address = f"http://127.0.0.1:{port}/page/"
        open_page(browser, address)
        assert not browser.evaluate("crossOriginIsolated")
        assert browser.evaluate("document.querySelectorAll('#device option').length") == 1
        assert "One thread: reload the page" in text_of(browser, "hint")
        browser.wait_for("document.getElementById('offline').textContent")
        # Nothing large is loaded twice, nor what WebGPU needs.
        loaded = [path for code, path in answers if code == 200 and re.search(r"onnx\?|\.mjs|\.wasm", path)]
        assert sorted(loaded) == sorted(f"/page/{name}" for name in facts["providers"]["wasm"]["files"])
        open_page(browser, address)
        assert browser.evaluate("crossOriginIsolated")
        assert "One thread" not in text_of(browser, "hint")
        _, labels = segment(browser, picture)
        server.shutdown()
    browser.wait_for("fetch('nothing').then(() => false, () => true)")  # a spare connection may still be open
    open_page(browser, address)
    assert browser.evaluate("crossOriginIsolated")
    assert different(segment(browser, picture)[1], labels) == 0
    # The next file at the same address takes its place at once.
    build(tmp_path / "site/page", runtime, folder / "any.onnx")
    with page_lib.serve(tmp_path / "site", port):
        open_page(browser, address)
        assert "any size" in text_of(browser, "facts")
        assert segment(browser, picture)[1].shape != labels.shape
        browser.wait_for(
            "caches.keys().then((names) => caches.open(names[0])).then((kept) => kept.keys()).then("
            "(keys) => keys.filter(({url}) => url.includes('.onnx')).length === 1)"
        )


def test_the_camera_and_what_is_no_picture(
    folder: pathlib.Path, picture: pathlib.Path, browser: Browser, page: str
) -> None:
    open_page(browser, page)
    browser.evaluate("document.getElementById('camera').click()")
    browser.wait_for("window.shown")
    browser.evaluate("window.first = window.shown")
    browser.wait_for("window.shown !== window.first")
    assert text_of(browser, "camera") == "Stop camera"
    browser.choose_file("#file", folder / "weights.pth")
    browser.wait_for("document.getElementById('problem').textContent")
    assert text_of(browser, "problem") == "weights.pth is no picture that this browser can read."
    segment(browser, picture)  # which stops the camera
    assert text_of(browser, "problem") == ""
    assert text_of(browser, "camera") == "Camera"
    for error, sentence in (("NotFoundError", "no camera"), ("NotAllowedError", "does not let")):
        browser.evaluate(
            f"navigator.mediaDevices.getUserMedia = async () => {{ throw new DOMException('', '{error}') }}"
        )
        browser.evaluate("document.getElementById('camera').click()")
        browser.wait_for(f"document.getElementById('problem').textContent.includes('{sentence}')")
    assert text_of(browser, "camera") == "Camera"


@pytest.mark.slow
def test_webgpu_is_compared_with_the_processor(
    folder: pathlib.Path, picture: pathlib.Path, runtime: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """On SwiftShader, a GPU in software, as Chromium has it for tests."""
    if chromium.find() is None:
        pytest.skip("no Chromium is installed")
    build(tmp_path / "right", runtime, folder / "cpu.onnx", folder / "web.onnx")
    build(tmp_path / "wrong", runtime, folder / "wrong.onnx")
    with (
        page_lib.serve(tmp_path) as server,
        Browser("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader") as browser,
    ):
        open_page(browser, f"{server.address}right/")
        _, labels = segment(browser, picture)
        choose_device(browser, "webgpu")
        found = re.match(r"WebGPU compared with the processor: (\d+) of (\d+)", text_of(browser, "hint"))
        assert found is not None
        different_labels = read_shown(browser)[1] != labels
        assert (int(found[1]), int(found[2])) == (different_labels.sum(), labels.size)
        assert different_labels.mean() <= 1e-4
        open_page(browser, f"{server.address}wrong/")
        segment(browser, picture)
        with pytest.raises(RuntimeError, match=r"WebGPU is wrong here: \d+\.\d % of its labels differ"):
            choose_device(browser, "webgpu")
        assert browser.evaluate("document.getElementById('device').value").startswith("wasm")
        assert different(read_shown(browser)[1], labels) <= 1e-4
