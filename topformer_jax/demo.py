"""A page that segments pictures and the camera in the browser, by an exported file; nothing leaves the device.

  python -m topformer_jax.demo --exported t_web.onnx                 serves it at http://127.0.0.1:8000/
  python -m topformer_jax.demo --exported t_web.onnx --output page   writes a folder for any web server

The file is one of labels: `python -m topformer_jax.export --output t_web.onnx --target web` (WebGPU and wasm) or
without --target (wasm alone). Its runtime, onnxruntime-web, comes from npm the first time, into the cache folder.
"""

import argparse

from topformer_jax import cli, files


def make_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--exported", type=files.as_path, required=True, metavar="FILE", help="an .onnx file of labels")
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--output", type=files.as_path, metavar="DIR", help="write the page, and serve nothing"
    )
    target.add_argument("--port", type=int, default=8000, metavar="N", help="of 127.0.0.1 (default 8000)")
    add(
        "--runtime",
        type=files.as_path,
        metavar="DIR",
        help="npm's onnxruntime-web, unpacked (default: fetched)",
    )
    return parser


cli.answer_help(__name__, make_parser)

import gzip
import hashlib
import http.server
import json
import pathlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping
from typing import Any

from topformer_jax.errors import UserError
from topformer_jax.exporters.exported import open_exported

RUNTIME, VERSION = "onnxruntime-web", "1.30.0"  # of npm
# The package's files by what they compute with. Those of wasm are half as many bytes.
RUNTIME_FILES = {
    "wasm": ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
    "webgpu": (
        "ort.webgpu.min.mjs",
        "ort-wasm-simd-threaded.asyncify.mjs",
        "ort-wasm-simd-threaded.asyncify.wasm",
    ),
}
SOURCES = pathlib.Path(__file__).parent / "page"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".wasm": "application/wasm",
    ".onnx": "application/octet-stream",
}
# Threads in wasm share memory, which browsers allow to pages that ask to be isolated from other origins.
ISOLATION = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
}
Page = dict[str, bytes]  # files by their paths below the page's address


def build_page(path: files.Path, description: Mapping[str, Any], runtime: files.Path) -> Page:
    """The page of an exported file: its sources, the file, its description for the page, and the runtime.

    Args:
        path: of the exported file.
        description: its own.
        runtime: the folder of npm's onnxruntime-web.

    Raises:
        UserError: the file cannot be read, or the folder is not the runtime's.
    """
    with files.report_errors("read", path):
        data = files.retry(path.read_bytes)
    providers = ["wasm", "webgpu"] if description.get("target") == "web" else ["wasm"]
    version = _runtime_version(runtime)
    folder = f"{RUNTIME}-{version}"
    page: Page = {}
    with files.report_errors("read", runtime, f": expected npm's {RUNTIME} {VERSION}, unpacked"):
        for provider in providers:
            for name in RUNTIME_FILES[provider]:
                page[f"{folder}/{name}"] = (runtime / "dist" / name).read_bytes()
    page["model.onnx"] = data
    # A name for each content: what a browser has kept of another file is never mistaken for this one.
    model = f"model.onnx?{hashlib.sha256(data).hexdigest()[:16]}"
    config = description["config"]
    facts = {
        "name": config["name"],
        "classes": description["classes"],
        "palette": description["palette"],
        "size": description["size"],
        # Pixels of a picture for a file of any size: as many as the network was trained on.
        "area": config["data"]["crop_size"][0] * config["data"]["crop_size"][1],
        "stride": description["stride"],
        "model": model,
        "runtime": folder,
        "providers": {
            provider: {
                "files": [f"{folder}/{name}" for name in RUNTIME_FILES[provider]],
                "bytes": len(data) + sum(len(page[f"{folder}/{name}"]) for name in RUNTIME_FILES[provider]),
            }
            for provider in providers
        },
    }
    page["model.json"] = json.dumps(facts).encode()
    # The address of the page last: where it is there, all others are.
    for source in sorted(SOURCES.iterdir(), key=lambda source: source.name == "index.html"):
        if source.suffix in KINDS:
            page[source.name] = source.read_bytes()
    return page


def read_description(path: files.Path) -> Mapping[str, Any]:
    """What an exported file says of itself.

    Raises:
        UserError: it cannot be read, is damaged, or is no ONNX file of labels, which the page shows.
    """
    if path.suffix.lower() != ".onnx":
        raise UserError(f"--exported {path}: the page runs .onnx files; export one with --target web")
    description = open_exported(path).description
    if description["output"] != "labels":
        raise UserError(
            f"--exported {path} gives {description['output']}: the page shows labels, which a segmenter's file "
            "gives that is exported without --logits and --probabilities"
        )
    return description


def _runtime_version(runtime: files.Path) -> str:
    """The version of an unpacked package."""
    path = runtime / "package.json"
    advice = f": expected npm's {RUNTIME} {VERSION}, unpacked"
    with files.report_errors("read", path, advice):
        text = path.read_bytes()
    try:
        facts = json.loads(text)
        name, version = facts["name"], facts["version"]
    except (ValueError, TypeError, KeyError):
        name = version = ""
    if name != RUNTIME or not version:
        raise UserError(f"--runtime {runtime} holds {name or 'no package of npm'}{advice}")
    return str(version)


def fetch_runtime() -> pathlib.Path:
    """The folder of onnxruntime-web in the cache, fetched with npm the first time.

    Raises:
        UserError: there is no npm, it cannot fetch the package, or the cache cannot be written.
    """
    folder = cli.cache_folder() / f"{RUNTIME}-{VERSION}"
    names = [f"dist/{name}" for names in RUNTIME_FILES.values() for name in names] + ["package.json"]
    if all((folder / name).exists() for name in names):
        return folder
    advice = (
        f"; on another machine, npm pack {RUNTIME}@{VERSION}, unpack it, and name its folder as --runtime"
    )
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"the page's runtime comes from npm, which is not installed: install Node.js{advice}")
    print(f"fetching {RUNTIME} {VERSION} with npm (33 MB, once)", flush=True)
    files.make_folder(folder)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        flags = ["--pack-destination", temporary, "--fetch-retries=0", "--loglevel=error"]
        command = [npm, "pack", f"{RUNTIME}@{VERSION}", *flags]
        done = subprocess.run(command, cwd=temporary, capture_output=True, text=True, check=False)
        archives = list(pathlib.Path(temporary).glob("*.tgz"))
        if done.returncode or not archives:
            raise UserError(f"npm cannot fetch {RUNTIME} {VERSION}: {_reason(done.stderr)}{advice}")
        try:
            with tarfile.open(archives[0]) as archive:
                for name in names:
                    content = archive.extractfile(f"package/{name}")
                    assert content is not None
                    files.write_file(folder / name, content.read())
        except (tarfile.TarError, KeyError, EOFError) as error:
            raise UserError(f"npm's {RUNTIME} {VERSION} is damaged: {error}{advice}") from None
    return folder


def _reason(printed: str) -> str:
    """Why npm failed: its first line that is a sentence."""
    for line in printed.splitlines():
        text = line.removeprefix("npm error").strip()
        if text and not text.startswith(("code ", "syscall ", "errno ", "path ")):
            return text
    return "it does not say why"


def write_page(page: Page, folder: files.Path) -> None:
    """Writes a page into a new folder, an empty one, or over an earlier page.

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    with files.report_errors("write into", folder):
        found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    own = {name.split("/")[0] for name in page}
    other = [name for name in found if name not in own and not name.startswith(f"{RUNTIME}-")]
    if other:
        raise UserError(f"--output {folder} holds {other[0]}, which is of no page: name a new folder")
    for name, content in page.items():
        files.write_file(folder / name, content)


def sizes(page: Page) -> str:
    """A table of what a browser loads: for the first picture, and for WebGPU if it is chosen; raw and compressed."""
    facts = json.loads(page["model.json"])
    shared = [name for name in page if "/" not in name and name != "model.onnx"]
    rows = [["first load, bytes", "raw", "gzip"]]

    def add(title: str, names: list[str]) -> list[int]:
        found = [
            sum(len(page[name]) for name in names),
            sum(len(gzip.compress(page[name])) for name in names),
        ]
        rows.append([title, *(f"{number:,}" for number in found)])
        return found

    parts = [
        add("page", shared),
        add("model.onnx", ["model.onnx"]),
        add("wasm", facts["providers"]["wasm"]["files"]),
    ]
    rows.append(["all", *(f"{sum(part[column] for part in parts):,}" for column in (0, 1))])
    if "webgpu" in facts["providers"]:
        add("when WebGPU is chosen", facts["providers"]["webgpu"]["files"])
    return cli.table(rows)


class Server(http.server.ThreadingHTTPServer):
    """Serves a page to this machine, isolated so that wasm has threads.

    Raises:
        UserError: the port is in use or out of range.
    """

    daemon_threads = True

    def __init__(self, page: Page, port: int):
        self.page = page
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            reason = files.explain(error)
            raise UserError(f"cannot serve at port {port}: {reason}; name another one as --port") from None

    @property
    def address(self) -> str:
        """Where a browser finds the page."""
        return f"http://127.0.0.1:{self.server_port}/"


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers requests for a page's files, and no others."""

    server: Server

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/") or "index.html"
        content = self.server.page.get(path)
        if content is None:
            self.send_error(404)
            return
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        fresh = self.headers.get("If-None-Match") == tag
        self.send_response(304 if fresh else 200)
        headers = {"Content-Type": KINDS[pathlib.PurePath(path).suffix], "Content-Length": str(len(content))}
        for name, value in (
            ISOLATION | {"Cache-Control": "no-cache", "ETag": tag} | ({} if fresh else headers)
        ).items():
            self.send_header(name, value)
        self.end_headers()
        if not fresh and self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: the page says what goes wrong."""


def main() -> None:
    """The command."""
    args = make_parser().parse_args()
    description = read_description(args.exported)  # before anything is fetched
    page = build_page(args.exported, description, args.runtime or fetch_runtime())
    if args.output is not None:
        write_page(page, args.output)
        print(
            f"{sizes(page)}\nwrote {args.output}: {len(page)} files, {sum(map(len, page.values())) / 1e6:.1f} MB"
        )
        return
    with Server(page, args.port) as server:
        print(f"{sizes(page)}\nserving {server.address} (Ctrl-C ends it)", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    cli.run(main)
