"""Serves a page that segments pictures and camera video in the browser by exported files; nothing leaves the device.

  python -m topformer_jax.demo --exported t.onnx                 serves it at http://127.0.0.1:8000/
  python -m topformer_jax.demo --exported t.onnx --output page   writes a folder for any web server

FILE holds labels, as export writes it without further flags. --webgpu adds WebGPU: the same checkpoint exported with
--target web. You can also give such a file as --exported: one download, slower on CPUs. The runtime,
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
    text = "another file for WebGPU, exported with --target web"
    add("--webgpu", type=files.as_path, metavar="FILE", help=text)
    target = parser.add_mutually_exclusive_group()
    text = "write the page instead of serving it"
    target.add_argument("--output", type=files.as_path, metavar="DIR", help=text)
    target.add_argument("--port", type=int, default=8000, metavar="N", help="default: 8000")
    text = "the unpacked onnxruntime-web of npm (default: fetched)"
    add("--runtime", type=files.as_path, metavar="DIR", help=text)
    return parser


cli.answer_help(__name__, make_parser)

import functools
import hashlib
import http.server
import json
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from typing import Any

from topformer_jax import config as config_lib
from topformer_jax.exporters.exported import open_exported
from topformer_jax.runtime.errors import UserError

RUNTIME, VERSION = "onnxruntime-web", "1.30.0"  # of npm
UNPACKED = f": expected npm's {RUNTIME} {VERSION}, unpacked"
# The files of its folder dist, by backend. Those for wasm have half as many bytes.
_WASM, _WEBGPU = "ort-wasm-simd-threaded", "ort-wasm-simd-threaded.asyncify"
RUNTIME_FILES = {
    "wasm": ("ort.wasm.min.mjs", f"{_WASM}.mjs", f"{_WASM}.wasm"),
    "webgpu": ("ort.webgpu.min.mjs", f"{_WEBGPU}.mjs", f"{_WEBGPU}.wasm"),
}
SOURCES = pathlib.Path(__file__).parent / "visualize" / "page"
HEADERS = {
    # Threads in wasm share memory, which browsers allow to pages that ask to be isolated from other origins.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
    "Connection": "close",
}


Description = Mapping[str, Any]


def find_files(path: files.Path, webgpu: files.Path | None) -> tuple[dict[str, files.Path], Description]:
    """Returns the exported files by backend, "wasm" and perhaps "webgpu", and the description of the first one.

    Raises UserError if one cannot be read, is damaged or no ONNX file of labels, or they do not belong together.
    """
    description = read_description("--exported", path)
    if webgpu is None:
        both = {"webgpu": path} if description.get("target") == "web" else {}
        return {"wasm": path} | both, description
    other = read_description("--webgpu", webgpu)
    if other.get("target") != "web":
        raise UserError(f"--webgpu {webgpu} would be wrong on WebGPU: export it with --target web")
    for key in ("checkpoint", "size", "stride"):
        first, second = description[key], other[key]
        if key == "checkpoint":
            first, second = first.get("sha256"), second.get("sha256")
        if first != second:
            raise UserError(f"--webgpu {webgpu} has another {key} than {path}: {second} and {first}")
    return {"wasm": path, "webgpu": webgpu}, description


def read_description(flag: str, path: files.Path) -> Description:
    """The description in an exported file; a UserError if it is no ONNX file of labels."""
    if path.suffix.lower() != ".onnx":
        raise UserError(f"{flag} {path}: expected an .onnx file, which the page runs")
    description = open_exported(path).description
    if description["output"] != "labels":
        raise UserError(
            f"{flag} {path} gives {description['output']}: the page shows labels: export a segmenter "
            "without --logits and --probabilities"
        )
    if not all(description.get(key) for key in ("classes", "palette", "checkpoint")):
        raise UserError(f"{flag} {path} does not name its classes, colours and checkpoint: export it again")
    return description | {"config": config_lib.complete(description["config"]).to_dict()}


def write_page(
    folder: files.Path, paths: Mapping[str, files.Path], description: Description, runtime: files.Path
) -> None:
    """Writes the page for `find_files`'s files into a new folder, an empty one, or over an earlier page.

    `runtime` is npm's package, unpacked. Raises UserError if a file cannot be read or written, or the folder holds
    something else.
    """
    with files.report_errors("write into", folder):
        is_free = not folder.exists() or not any(folder.iterdir()) or (folder / "model.json").exists()
    if not is_free:
        raise UserError(f"--output {folder} holds other files: name a new folder")
    names = [name for provider in paths for name in RUNTIME_FILES[provider]]
    scripts = {name: files.read_bytes(runtime / "dist" / name, UNPACKED) for name in names}
    # The names change with the content: a browser never mistakes an earlier file that it kept for a new one.
    place = f"{RUNTIME}-{_digest(b''.join(scripts.values()))}"
    page = {f"{place}/{name}": data for name, data in scripts.items()}
    providers = {}
    for provider, path in paths.items():
        model = "model.onnx" if path == paths["wasm"] else "model_webgpu.onnx"
        page[model] = files.read_bytes(path)
        size = len(page[model]) + sum(len(scripts[name]) for name in RUNTIME_FILES[provider])
        address = f"{model}?{_digest(page[model])}"
        needed = [address, *(f"{place}/{name}" for name in RUNTIME_FILES[provider])]
        providers[provider] = {"model": address, "files": needed, "bytes": size}
    config = description["config"]
    facts = {
        "name": config["name"],
        "classes": description["classes"],
        "palette": description["palette"],
        "size": description["size"],
        # Pixels of a picture for a file of any size: as many as the network was trained on.
        "area": config["data"]["crop_size"][0] * config["data"]["crop_size"][1],
        "runtime": place,
        "providers": providers,
    }
    page["model.json"] = json.dumps(facts).encode()
    # The page itself comes last: if it is there, all that it needs is.
    for source in sorted(SOURCES.iterdir(), key=lambda source: source.name == "index.html"):
        page[source.name] = source.read_bytes()
    for name, data in page.items():
        files.write_file(folder / name, data)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def fetch_runtime() -> pathlib.Path:
    """Returns the folder of onnxruntime-web in the cache; fetches it with npm the first time."""
    folder = cli.cache_folder() / f"{RUNTIME}-{VERSION}"
    if (folder / "package.json").exists():
        return folder
    advice = f"; on another machine, npm pack {RUNTIME}@{VERSION}, unpack it, and name its folder as --runtime"
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"the page's runtime comes from npm, which is not installed: install Node.js{advice}")
    print(f"fetching {RUNTIME} {VERSION} with npm (33 MB, once)", flush=True)
    files.make_folder(folder.parent)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary, files.report_errors("write", folder):
        command = [npm, "pack", f"{RUNTIME}@{VERSION}", "--fetch-retries=0", "--loglevel=error"]
        done = subprocess.run(command, cwd=temporary, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = files.shorten(" ".join(done.stderr.split()), 200)
            raise UserError(f"npm cannot fetch {RUNTIME} {VERSION}: {reason}{advice}")
        (archive,) = pathlib.Path(temporary).glob("*.tgz")
        with tarfile.open(archive) as package:
            package.extractall(temporary, filter="data")
        shutil.rmtree(folder, ignore_errors=True)
        pathlib.Path(temporary, "package").rename(folder)
    return folder


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder to this machine, isolated so that wasm has threads; a UserError if the port is in use."""

    def __init__(self, folder: str, port: int):
        try:
            super().__init__(("127.0.0.1", port), functools.partial(_Handler, directory=folder))
        except (OSError, OverflowError) as error:
            reason = files.explain(error)
            raise UserError(f"cannot serve at port {port}: {reason}; name another one as --port") from None

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignores a browser that left before its answer was there."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    @property
    def address(self) -> str:
        """The address of the page."""
        return f"http://127.0.0.1:{self.server_port}/"


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the files of a folder; it does not list them."""

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def list_directory(self, path: object) -> None:
        self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing: the page says what goes wrong."""


def main() -> None:
    """The command."""
    args = make_parser().parse_args()
    found = find_files(args.exported, args.webgpu)  # before anything is fetched
    runtime = args.runtime or fetch_runtime()
    if args.output is not None:
        write_page(args.output, *found, runtime)
        print(f"wrote {args.output}")
        return
    with tempfile.TemporaryDirectory() as folder:
        write_page(pathlib.Path(folder), *found, runtime)
        with Server(folder, args.port) as server:
            print(f"serving {server.address} (Ctrl-C ends it)", flush=True)
            server.serve_forever()


if __name__ == "__main__":
    cli.run(main)
