"""The page: what it is made of, how it is served, what it refuses; and all that it does in Chromium."""

import contextlib
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
    for name, change in (
        ("logits", {"output": "logits"}),
        ("scores", {"output": "scores"}),
        ("other", {"checkpoint": {"sha256": "0"}}),
    ):
        graph = onnx.load(folder / "web.onnx")
        onnx.helper.set_model_props(graph, {exported.KEY: json.dumps(written | change)})
        onnx.save(graph, folder / f"{name}.onnx")
    settings = network.export_config(config.load("topformer_t_ade"))
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
    (folder / "noise.onnx").write_bytes(bytes(range(256)))
    (folder / "cut.onnx").write_bytes((folder / "web.onnx").read_bytes()[:-100_000])
    return folder


@pytest.fixture(scope="module")
def picture(folder: pathlib.Path) -> pathlib.Path:
    """A drawn scene of another size and another shape than the network's."""
    path = folder / "scene.png"
    path.write_bytes(cv2.imencode(".png", shapes.draw("validation", 0, 200)[0][..., ::-1])[1].tobytes())
    return path


def make_runtime(
    folder: pathlib.Path, facts: str = '{"name": "onnxruntime-web", "version": "9.8.7"}'
) -> pathlib.Path:
    """A folder that looks like the runtime's package."""
    (folder / "dist").mkdir(parents=True)
    for names in demo.RUNTIME_FILES.values():
        for name in names:
            (folder / "dist" / name).write_text(f"content of {name}")
    (folder / "package.json").write_text(facts)
    return folder


def build(path: pathlib.Path, runtime: pathlib.Path, webgpu: pathlib.Path | None = None) -> demo.Page:
    return demo.build_page(*demo.find_files(path, webgpu), runtime)


@pytest.fixture
def serve() -> Iterator[Any]:
    """Serves pages until the test's end, or until a server is closed."""
    with contextlib.ExitStack() as stack:
        yield lambda page, port=0: stack.enter_context(page_lib.serve(page, port))


# What it is made of


def test_the_page_holds_what_it_names(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    page = build(folder / "web.onnx", make_runtime(tmp_path / "package"))
    small = {name for name in page if "/" not in name and not name.endswith(".onnx")}
    assert list(page)[-1] == "index.html"
    assert {pathlib.PurePath(name).suffix for name in page} <= demo.KINDS.keys()
    text = "".join(page[name].decode() for name in small if not name.endswith(".json"))
    named = re.findall(r'(?:src|href)="([^"]+)"|(?:from|fetch|URL|register)\(? ?"(?:\./)?([^"]+\.\w+)"', text)
    assert {name for pair in named for name in pair if name} == small - {"index.html", "icon.svg"} | {
        "icon.svg"
    }
    kept = json.loads(re.search(r"const PAGE = (\[.*\])", text)[1])  # type: ignore[index]
    assert {"index.html" if name == "./" else name for name in kept} == small - {"offline.js"}
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text)
    facts = json.loads(page["model.json"])
    assert (facts["size"], facts["classes"][0]) == ([96, 128], "wall")
    for provider in facts["providers"].values():
        assert provider["bytes"] == sum(len(page[name.partition("?")[0]]) for name in provider["files"])


def test_a_file_for_processors_offers_no_webgpu(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    page = build(folder / "any.onnx", make_runtime(tmp_path / "package"))
    facts = json.loads(page["model.json"])
    assert (list(facts["providers"]), facts["size"]) == (["wasm"], None)
    assert not any("webgpu" in name or "asyncify" in name for name in page)


def test_a_second_file_is_for_webgpu(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    page = build(folder / "cpu.onnx", make_runtime(tmp_path / "package"), folder / "web.onnx")
    assert page["model.onnx"] == (folder / "cpu.onnx").read_bytes()
    assert page["model_webgpu.onnx"] == (folder / "web.onnx").read_bytes()
    for file, words in (
        ("cpu.onnx", "would be wrong on WebGPU: export it with --target web"),
        ("other.onnx", "has another checkpoint than"),
        ("logits.onnx", "--webgpu .* gives logits"),
    ):
        with pytest.raises(UserError, match=words):
            demo.find_files(folder / "cpu.onnx", folder / file)
    with pytest.raises(UserError, match=r"has another size than .*: \[96, 128\] and None"):
        demo.find_files(folder / "any.onnx", folder / "web.onnx")


def test_the_folder_is_written_and_written_over(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    words = ["--runtime", make_runtime(tmp_path / "package"), "--output", tmp_path / "page"]
    said = command(demo.main, "--exported", folder / "web.onnx", *words)
    assert re.search(r"^all +[\d,]+ +[\d,]+$", said, re.MULTILINE)
    assert said.endswith(f"wrote {tmp_path / 'page'}: 15 files, {said.split()[-2]} MB\n")
    command(demo.main, "--exported", folder / "any.onnx", *words)
    for name, content in build(folder / "any.onnx", tmp_path / "package").items():
        assert (tmp_path / "page" / name).read_bytes() == content
    (tmp_path / "page/thesis.tex").touch()
    line = refused(demo.main, "--exported", folder / "web.onnx", *words)
    assert "holds thesis.tex, which is of no page: name a new folder" in line


def test_it_is_served_isolated_and_with_its_types(
    folder: pathlib.Path, tmp_path: pathlib.Path, serve: Any
) -> None:
    page = build(folder / "web.onnx", make_runtime(tmp_path / "package"))
    server = serve(page)
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=LONGEST)

    def get(path: str, **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response, response.read()

    for name, content in page.items():
        response, found = get(f"/{name}")
        assert (response.status, found) == (200, content)
        assert response.headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert response.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        kind = {".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm"}
        suffix = pathlib.PurePath(name).suffix
        assert response.headers["Content-Type"].startswith(kind.get(suffix, "")), name
    response, found = get("/")
    assert found == page["index.html"]
    assert get("/", **{"If-None-Match": response.headers["ETag"]})[0].status == 304
    assert get("/model.onnx?0123")[1] == page["model.onnx"]
    for path in ("/nothing", "/../setup.py", "//etc/passwd", "/page.js/"):
        assert get(path)[0].status == 404
    connection.close()


# What it refuses


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.onnx", "cannot read"),
        ("weights.pth", "expected an .onnx file, which the page runs"),
        ("logits.onnx", "gives logits: the page shows labels"),
        ("noise.onnx", "is not an ONNX file, or a damaged one"),
        ("cut.onnx", "is not an ONNX file, or a damaged one"),
        ("scores.onnx", "gives scores: the page shows labels"),
    ],
)
def test_files_that_the_page_cannot_show(
    folder: pathlib.Path, tmp_path: pathlib.Path, name: str, words: str
) -> None:
    assert words in refused(demo.main, "--exported", folder / name, "--output", tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_folders_that_are_not_the_runtime(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def line(runtime: pathlib.Path) -> str:
        words = ["--runtime", runtime, "--output", tmp_path / "page"]
        return refused(demo.main, "--exported", folder / "web.onnx", *words)

    assert "package.json: No such file or directory: expected npm's onnxruntime-web 1.30.0" in line(tmp_path)
    assert "holds react: expected npm's" in line(
        make_runtime(tmp_path / "a", '{"name": "react", "version": "1"}')
    )
    assert "is not the JSON file that was expected" in line(make_runtime(tmp_path / "b", "[1"))
    shutil.rmtree(make_runtime(tmp_path / "c") / "dist")
    assert "No such file or directory: expected npm's onnxruntime-web" in line(tmp_path / "c")


def test_ports_that_cannot_be_had(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    words = ["--exported", folder / "web.onnx", "--runtime", make_runtime(tmp_path / "package"), "--port"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot serve at port {port}: Address already in use; name another" in refused(
            demo.main, *words, port
        )
    assert "cannot serve at port 99999" in refused(demo.main, *words, 99999)


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
    enlarged = torch.nn.functional.interpolate(
        torch.tensor(logits), size, mode="bilinear", align_corners=False
    )
    return np.asarray(enlarged[0].argmax(0), np.uint8)


def different(labels: np.ndarray, others: np.ndarray) -> float:
    assert labels.shape == others.shape
    return float((labels != others).mean())


def test_labels_equal_those_of_onnxruntime_and_jax(
    folder: pathlib.Path, picture: pathlib.Path, runtime: pathlib.Path, browser: Browser, serve: Any
) -> None:
    open_page(browser, serve(build(folder / "web.onnx", runtime)).address)
    assert browser.evaluate("crossOriginIsolated")
    pixels, labels = segment(browser, picture)
    assert pixels.shape == (*SIZE, 3)
    assert len(np.unique(labels)) > 3
    assert different(labels, exported.open_exported(folder / "web.onnx")(pixels[None])[0]) <= 1e-4
    assert different(labels, expected_labels(folder, pixels)) <= 1e-4
    # What is shown: the colours of the classes, and their shares.
    palette = np.array(json.loads(build(folder / "web.onnx", runtime)["model.json"])["palette"], np.uint8)
    assert (overlay_of(browser)[..., :3] == palette[labels]).all()
    rows = browser.evaluate(
        "[...document.querySelectorAll('#legend button')].map((row) => row.innerText.split('\\n'))"
    )
    names = exported.open_exported(folder / "web.onnx").description["classes"]
    counts = np.bincount(labels.ravel(), minlength=len(names))
    for name, text in rows:
        share = counts[names.index(name)] / labels.size
        assert text == ("< 0.1 %" if share < 0.001 else f"{100 * share:.1f} %")
    assert [name for name, _ in rows] == [
        names[label] for label in np.argsort(-counts, kind="stable") if counts[label]
    ]
    assert re.match(r"\d+ ms a frame, \d+ of them the network", text_of(browser, "status"))


def test_a_file_of_any_size_keeps_the_shape_of_a_picture(
    folder: pathlib.Path, picture: pathlib.Path, runtime: pathlib.Path, browser: Browser, serve: Any
) -> None:
    open_page(browser, serve(build(folder / "any.onnx", runtime)).address)
    assert "No WebGPU: the page was made for processors." in text_of(browser, "hint")
    scene, tall = np.asarray(PIL.Image.open(picture)), folder / "tall.png"
    tall.write_bytes(cv2.imencode(".png", scene[:, :90, ::-1])[1].tobytes())
    height, width = scene.shape[0], 90
    pixels, labels = segment(browser, tall)
    assert pixels.shape[0] / pixels.shape[1] == pytest.approx(height / width, rel=0.02)
    assert pixels.shape[0] * pixels.shape[1] == pytest.approx(512 * 512, rel=0.02)  # the config's crop
    assert different(labels, expected_labels(folder, pixels, stride=2)) <= 1e-4


def test_it_works_without_a_network_after_the_first_load(
    folder: pathlib.Path,
    picture: pathlib.Path,
    runtime: pathlib.Path,
    browser: Browser,
    serve: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers: list[tuple[int, str]] = []
    monkeypatch.setattr(demo._Handler, "log_request", lambda self, code: answers.append((code, self.path)))
    page = build(folder / "web.onnx", runtime)
    server = serve(page)
    open_page(browser, server.address)
    browser.wait_for("document.getElementById('offline').textContent")
    # What was loaded is what the command prints: nothing twice, and not what WebGPU needs.
    loaded = [
        path.partition("?")[0].removeprefix("/") or "index.html" for code, path in answers if code == 200
    ]
    assert {code for code, _ in answers} == {200, 304}
    assert re.search(rf"^all +{sum(len(page[name]) for name in loaded):,} ", demo.sizes(page), re.MULTILINE)
    _, labels = segment(browser, picture)
    server.shutdown()
    server.server_close()
    with pytest.raises(RuntimeError, match="fetch"):
        browser.evaluate("fetch('nothing')")
    open_page(browser, server.address)
    assert browser.evaluate("crossOriginIsolated")
    assert different(segment(browser, picture)[1], labels) == 0
    # The next file at the same address takes its place at once.
    serve(build(folder / "any.onnx", runtime), server.server_port)
    open_page(browser, server.address)
    assert "any size" in text_of(browser, "facts")
    assert segment(browser, picture)[1].shape != labels.shape
    browser.wait_for(
        "caches.keys().then((names) => caches.open(names[0])).then((kept) => kept.keys()).then("
        "(keys) => keys.filter(({url}) => url.includes('.onnx')).length === 1)"
    )


def test_a_plain_server_gives_one_thread_at_first(
    folder: pathlib.Path,
    picture: pathlib.Path,
    runtime: pathlib.Path,
    browser: Browser,
    tmp_path: pathlib.Path,
) -> None:
    demo.write_page(build(folder / "web.onnx", runtime), tmp_path / "site/page")

    class Plain(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Plain, directory=str(tmp_path / "site"))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/page/"
        open_page(browser, address)
        assert not browser.evaluate("crossOriginIsolated")
        assert browser.evaluate("document.querySelectorAll('#device option').length") == 1
        assert "One thread: reload the page" in text_of(browser, "hint")
        assert segment(browser, picture)[1].shape == SIZE
        browser.wait_for("document.getElementById('offline').textContent")
        open_page(browser, address)
        assert browser.evaluate("crossOriginIsolated")
        assert "One thread" not in text_of(browser, "hint")
        server.shutdown()


def test_the_camera_and_what_is_no_picture(
    folder: pathlib.Path, picture: pathlib.Path, runtime: pathlib.Path, browser: Browser, serve: Any
) -> None:
    open_page(browser, serve(build(folder / "web.onnx", runtime)).address)
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


def test_a_device_without_a_camera(
    folder: pathlib.Path, runtime: pathlib.Path, browser: Browser, serve: Any
) -> None:
    open_page(browser, serve(build(folder / "web.onnx", runtime)).address)
    for code, sentence in (
        (
            "navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('', 'NotFoundError') }",
            "no camera",
        ),
        (
            "navigator.mediaDevices.getUserMedia = async () => { throw new DOMException('', 'NotAllowedError') }",
            "does not let",
        ),
    ):
        browser.evaluate(code)
        browser.evaluate("document.getElementById('camera').click()")
        browser.wait_for(f"document.getElementById('problem').textContent.includes('{sentence}')")
    assert text_of(browser, "camera") == "Camera"


def test_the_keyboard_reaches_everything(
    folder: pathlib.Path, picture: pathlib.Path, runtime: pathlib.Path, browser: Browser, serve: Any
) -> None:
    open_page(browser, serve(build(folder / "web.onnx", runtime)).address)
    segment(browser, picture)

    def press(key: str, text: str = "") -> str:
        for kind in ("keyDown", "keyUp"):
            extra = {"text": text} if text and kind == "keyDown" else {}
            code = {"Tab": 9, "ArrowRight": 39, "Enter": 13}[key]
            browser.send(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **extra
            )
        return str(
            browser.evaluate("document.activeElement.id || document.activeElement.dataset.label || ''")
        )

    reached = [press("Tab") for _ in range(5)]
    assert reached[:4] == ["choose", "camera", "opacity", "device"]
    press("Enter", "\r")
    labels = read_shown(browser)[1]
    assert ((overlay_of(browser)[..., 3] == 255) == (labels == int(reached[4]))).all()
    browser.evaluate("document.getElementById('opacity').focus()")
    press("ArrowRight")
    assert text_of(browser, "percent") == "51 %"
    assert browser.evaluate("document.getElementById('overlay').style.opacity") == "0.51"


@pytest.mark.slow
def test_webgpu_is_compared_with_the_processor(
    folder: pathlib.Path, picture: pathlib.Path, runtime: pathlib.Path, serve: Any
) -> None:
    """On SwiftShader, a GPU in software, as Chromium has it for tests."""
    if chromium.find() is None:
        pytest.skip("no Chromium is installed")
    with Browser("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader") as browser:
        page = build(folder / "cpu.onnx", runtime, folder / "web.onnx")
        open_page(browser, serve(page).address)
        _, labels = segment(browser, picture)
        choose_device(browser, "webgpu")
        found = re.match(r"WebGPU compared with the processor: (\d+) of (\d+)", text_of(browser, "hint"))
        assert found is not None
        different_labels = read_shown(browser)[1] != labels
        assert (int(found[1]), int(found[2])) == (different_labels.sum(), labels.size)
        assert different_labels.mean() <= 1e-4
        open_page(browser, serve(build(folder / "wrong.onnx", runtime)).address)
        segment(browser, picture)
        with pytest.raises(RuntimeError, match=r"WebGPU is wrong here: \d+\.\d % of its labels differ"):
            choose_device(browser, "webgpu")
        assert browser.evaluate("document.getElementById('device').value").startswith("wasm")
        assert different(read_shown(browser)[1], labels) <= 1e-4
