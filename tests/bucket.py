"""A bucket for tests: a real Cloud Storage API on loopback, in a process of its own, that can fail on demand.

Import `bucket` (and `storage`, which it needs) into a test file to use it as a fixture.
"""

import itertools
import json
import os
import pathlib
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from typing import Any

import fsspec.config
import pytest
from etils import epath

EMULATOR = pathlib.Path(__file__).with_name("emulator.py")
PROJECT = "tests"


class Storage:
    """The server; `environment` leads gcsfs, TensorStore, google-cloud-storage and array_record to it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(EMULATOR)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.url = f"http://127.0.0.1:{int(self._read_line())}"
        self._names = (f"bucket-{number}" for number in itertools.count())
        self.environment = {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "GOOGLE_CLOUD_PROJECT": PROJECT,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks a server that has no emulator
            "NO_GCE_CHECK": "true",
            "FSSPEC_GS": json.dumps({"token": "anon"}),  # or it looks for an account, and says so
        }

    def make_bucket(self) -> str:
        """Makes an empty bucket and returns its name."""
        name = next(self._names)
        request = urllib.request.Request(
            f"{self.url}/storage/v1/b?project={PROJECT}",
            json.dumps({"name": name}).encode(),
            {"Content-Type": "application/json"},
        )
        urllib.request.urlopen(request).close()
        return name

    def set_faults(self, **faults: Any) -> list[str]:
        """Replaces what goes wrong from now on: nothing, but for what is given.

        Args:
            **faults: fail (how many requests are answered by `status`), status (503), cut (how many uploads lose
                their connection half way), delay (seconds before each answer), match (only requests whose first
                line, such as "GET /storage/v1/b/NAME/o HTTP/1.1", contains it).

        Returns:
            The first lines of all requests since the last call.
        """
        assert self._process.stdin
        self._process.stdin.write(json.dumps(faults) + "\n")
        self._process.stdin.flush()
        return list(json.loads(self._read_line()))

    def close(self) -> None:
        """Ends the server."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout
        self._process.stdout.close()

    def _read_line(self) -> str:
        assert self._process.stdout
        return self._process.stdout.readline()


class Bucket:
    """An empty bucket: `root` is gs://NAME, as epath has it."""

    def __init__(self, storage: Storage):
        self.root = epath.Path(f"gs://{storage.make_bucket()}")
        self.set_faults = storage.set_faults

    def __truediv__(self, path: str) -> epath.Path:
        return self.root / path

    def __str__(self) -> str:
        return os.fspath(self.root)


@pytest.fixture(scope="session")
def storage() -> Iterator[Storage]:
    """The server, and the variables of this process (so of its commands) that lead to it."""
    server = Storage()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        conf: dict[str, dict] = {}
        fsspec.config.set_conf_env(conf)  # else read at its import
        patch.setitem(fsspec.config.conf, "gs", conf["gs"])
        yield server
    server.close()


@pytest.fixture
def bucket(storage: Storage) -> Iterator[Bucket]:
    """An empty bucket; what the test made go wrong ends with it."""
    yield Bucket(storage)
    storage.set_faults()
