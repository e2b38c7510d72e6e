"""The bucket of the tests: it stores, refuses and fails as Cloud Storage does."""

import json
import urllib.error
import urllib.request

import pytest

from tests.bucket import Bucket, Storage, bucket, storage

__all__ = ["bucket", "storage"]


def upload(storage: Storage, bucket: Bucket, condition: str) -> int:
    """The status of an upload that depends on a condition."""
    name = str(bucket).removeprefix("gs://")
    address = f"{storage.url}/upload/storage/v1/b/{name}/o?uploadType=multipart&{condition}"
    parts = [("application/json", '{"name": "x"}'), ("text/plain", "x" * 100_000)]
    body = "".join(f"--edge\r\nContent-Type: {kind}\r\n\r\n{part}\r\n" for kind, part in parts) + "--edge--"
    fields = {"Content-Type": "multipart/related; boundary=edge"}
    try:
        with urllib.request.urlopen(urllib.request.Request(address, body.encode(), fields)) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_it_fails_on_demand(storage: Storage, bucket: Bucket) -> None:
    bucket.set_faults(fail=2, status=429, match="POST")
    assert [upload(storage, bucket, "") for _ in range(3)] == [429, 429, 200]
    (bucket.root / "x").read_bytes()
    lines = bucket.set_faults(cut=1)
    assert [line.split(" ")[0] for line in lines[:3]] == ["POST"] * 3
    with pytest.raises(OSError, match=r"reset|closed|Broken"):
        upload(storage, bucket, "")
    assert upload(storage, bucket, "") == 200
    bucket.set_faults(away=True)
    with pytest.raises(urllib.error.URLError, match="refused"):
        upload(storage, bucket, "")
    bucket.set_faults()
    with urllib.request.urlopen(f"{storage.url}/storage/v1/b") as answer:
        assert str(bucket).removeprefix("gs://") in {item["name"] for item in json.load(answer)["items"]}
