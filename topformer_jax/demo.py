"""A page that segments pictures and the camera in the browser, by exported files; nothing leaves the device.

  python -m topformer_jax.demo --exported t.onnx                 serves it at http://127.0.0.1:8000/
  python -m topformer_jax.demo --exported t.onnx --output page   writes a folder for any web server

FILE is one of labels, as export writes it without further flags. --webgpu adds WebGPU: the same checkpoint exported
with --target web. Such a file may also stand alone, as --exported: one download, slower on processors. The runtime,
onnxruntime-web, comes from npm the first time, into the cache folder.
"""

import argparse

from topformer_jax.runtime import cli, files


def make_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--exported", type=files.as_path, required=True, metavar="FILE", help="an .onnx file of labels")
    add("--webgpu", type=files.as_path, metavar="FILE", help="another for WebGPU, exported with --target web")
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

import contextlib
import gzip
import hashlib
import http.server
import json
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from topformer_jax import config as config_lib
from topformer_jax.exporters.exported import open_exported
from topformer_jax.runtime.errors import UserError

RUNTIME, VERSION = "onnxruntime-web", "1.30.0"  # of npm
UNPACKED = f": expected npm's {RUNTIME} {VERSION}, unpacked"
# The package's files by what they compute with. Those of wasm are half as many bytes.
RUNTIME_FILES = {
    "wasm": ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
    "webgpu": (
        "ort.webgpu.min.mjs",
        "ort-wasm-simd-threaded.asyncify.mjs",
        "ort-wasm-simd-threaded.asyncify.wasm",
    ),
}
SOURCES = pathlib.Path(__file__).parent / "visualize" / "page"
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
MOST_RUNTIME_BYTES = 1 << 28  # of a file of the package


class _Package(msgspec.Struct):
    """npm's package.json; the version becomes the name of a folder and a part of addresses."""

    name: str
    version: Annotated[str, msgspec.Meta(pattern=r"\A[0-9][0-9A-Za-z.+-]{0,63}\Z")]


Page = dict[str, bytes]  # files by their paths below the page's address


def find_files(
    path: files.Path, webgpu: files.Path | None
) -> tuple[dict[str, files.Path], Mapping[str, Any]]:
    """The exported files by what computes them, "wasm" and perhaps "webgpu"; and what the first says of itself.

    Raises:
        UserError: one cannot be read, is damaged or no ONNX file of labels, or they do not belong together.
    """
    description = read_description("--exported", path)
    if webgpu is None:
        both = {"webgpu": path} if description.get("target") == "web" else {}
        return {"wasm": path} | both, description
    other = read_description("--webgpu", webgpu)
    if other.get("target") != "web":
        raise UserError(f"--webgpu {webgpu} would be wrong on WebGPU: export it with --target web")
    for key in ("checkpoint", "size", "stride"):
        found = [
            each[key].get("sha256") if key == "checkpoint" else each[key] for each in (description, other)
        ]
        if found[0] != found[1]:
            raise UserError(f"--webgpu {webgpu} has another {key} than {path}: {found[1]} and {found[0]}")
    return {"wasm": path, "webgpu": webgpu}, description


def read_description(flag: str, path: files.Path) -> Mapping[str, Any]:
    """What an exported file says of itself; a UserError for one that is no ONNX file of labels, which are shown."""
    if path.suffix.lower() != ".onnx":
        raise UserError(f"{flag} {path}: expected an .onnx file, which the page runs")
    description = open_exported(path).description
    if description["output"] != "labels":
        raise UserError(
            f"{flag} {path} gives {description['output']}: the page shows labels, which a segmenter's file gives "
            "that is exported without --logits and --probabilities"
        )
    if not all(description.get(key) for key in ("classes", "palette", "checkpoint")):
        raise UserError(f"{flag} {path} does not name its classes, colours and checkpoint: export it again")
    return description | {"config": config_lib.complete(description["config"]).to_dict()}


def build_page(paths: Mapping[str, files.Path], description: Mapping[str, Any], runtime: files.Path) -> Page:
    """The page: its sources, the exported files (from `find_files`), what they say of themselves, and the runtime."""
    folder = f"{RUNTIME}-{_runtime_version(runtime)}"
    page: Page = {}
    providers = {}
    for provider, path in paths.items():
        data = files.read_bytes(path)
        model = "model.onnx" if path == paths["wasm"] else f"model_{provider}.onnx"
        page[model] = data
        names = [model, *(f"{folder}/{name}" for name in RUNTIME_FILES[provider])]
        for name in RUNTIME_FILES[provider]:
            page[f"{folder}/{name}"] = files.read_bytes(runtime / "dist" / name, UNPACKED, MOST_RUNTIME_BYTES)
        # A name for each content: what a browser has kept of another file is never mistaken for this one.
        address = f"{model}?{hashlib.sha256(data).hexdigest()[:16]}"
        size = sum(len(page[name]) for name in names)
        providers[provider] = {"model": address, "files": [address, *names[1:]], "bytes": size}
    config = description["config"]
    facts = {
        "name": config["name"],
        "classes": description["classes"],
        "palette": description["palette"],
        "size": description["size"],
        # Pixels of a picture for a file of any size: as many as the network was trained on.
        "area": config["data"]["crop_size"][0] * config["data"]["crop_size"][1],
        "runtime": folder,
        "providers": providers,
    }
    page["model.json"] = json.dumps(facts).encode()
    # The address of the page last: where it is there, all others are.
    for source in sorted(SOURCES.iterdir(), key=lambda source: source.name == "index.html"):
        if source.suffix in KINDS:
            page[source.name] = source.read_bytes()
    return page


def _runtime_version(runtime: files.Path) -> str:
    """The version of an unpacked package."""
    path = runtime / "package.json"
    facts = files.read_json(files.read_bytes(path, UNPACKED), _Package, path, UNPACKED)
    if facts.name != RUNTIME:
        raise UserError(f"--runtime {runtime} holds {files.shorten(facts.name)}{UNPACKED}")
    return facts.version


def fetch_runtime() -> pathlib.Path:
    """The folder of onnxruntime-web in the cache, fetched with npm the first time."""
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
                    member = archive.getmember(f"package/{name}")
                    content = archive.extractfile(member)
                    if content is None or member.size > MOST_RUNTIME_BYTES:
                        raise tarfile.TarError(f"{name} is no file of its size")
                    files.write_file(folder / name, content.read())
        except (tarfile.TarError, KeyError, EOFError, OSError, zlib.error) as error:
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
    """Writes a page into a new folder, an empty one, or over an earlier page; a UserError for any other."""
    with files.report_errors("write into", folder):
        found = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    own = {name.split("/")[0] for name in page} | {"model_webgpu.onnx"}
    other = [name for name in found if name not in own and not name.startswith(f"{RUNTIME}-")]
    if other:
        raise UserError(f"--output {folder} holds {other[0]}, which is of no page: name a new folder")
    for name, content in page.items():
        files.write_file(folder / name, content)


def sizes(page: Page) -> str:
    """A table of what a browser loads: for the first picture, and for WebGPU if it is chosen; raw and compressed."""
    providers = msgspec.json.decode(page["model.json"])["providers"]
    wasm = [name.partition("?")[0] for name in providers["wasm"]["files"]]
    small = [name for name in page if "/" not in name and not name.endswith(".onnx")]
    parts = {"page": small, "model": wasm[:1], "wasm": wasm[1:], "all": small + wasm}
    if "webgpu" in providers:
        names = (name.partition("?")[0] for name in providers["webgpu"]["files"])
        parts["WebGPU, when chosen"] = [name for name in names if name not in wasm]
    rows = [["first load, bytes", "raw", "gzip"]]
    for title, part in parts.items():
        raw = sum(len(page[name]) for name in part)
        rows.append([title, f"{raw:,}", f"{sum(len(gzip.compress(page[name])) for name in part):,}"])
    return cli.table(rows)


class Server(http.server.ThreadingHTTPServer):
    """Serves a page to this machine, isolated so that wasm has threads; a UserError where the port is in use."""

    daemon_threads = True

    def __init__(self, page: Page, port: int):
        self.page = page
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            reason = files.explain(error)
            raise UserError(f"cannot serve at port {port}: {reason}; name another one as --port") from None

    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing of a browser that left before its answer was there."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    @property
    def address(self) -> str:
        """Where a browser finds the page."""
        return f"http://127.0.0.1:{self.server_port}/"


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers requests for a page's files, and no others."""

    server: Server
    protocol_version = "HTTP/1.1"  # browsers revalidate nothing by its ETag that came with 1.0

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/") or "index.html"
        content = self.server.page.get(path)
        if content is None:
            self.send_error(404)
            return
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        fresh = self.headers.get("If-None-Match") == tag
        headers = ISOLATION | {"Cache-Control": "no-cache", "ETag": tag, "Connection": "close"}
        if not fresh:
            headers |= {
                "Content-Type": KINDS[pathlib.PurePath(path).suffix],
                "Content-Length": str(len(content)),
            }
        self.send_response(304 if fresh else 200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if not fresh and self.command == "GET":
            with contextlib.suppress(ConnectionError):  # of a browser that left
                self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: the page says what goes wrong."""


def main() -> None:
    """The command."""
    args = make_parser().parse_args()
    found = find_files(args.exported, args.webgpu)  # before anything is fetched
    page = build_page(*found, args.runtime or fetch_runtime())
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
