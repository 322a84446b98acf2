"""LongAlign-style metadata, from a hub to shards: huggingface_hub itself talks to a small hub on this machine."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote

import pytest

from synthos.data.stream import Stream
from tests.data.make import INPUTS, config, parquet, picture
from tests.support import ROOT

BASE = "/datasets/luping-liu/LongAlign"


class Hub(BaseHTTPRequestHandler):
    """What HfFileSystem asks of a hub: the data set, the list of its files, ranges of them."""

    folder: ClassVar[Path]
    ranges: ClassVar[list[tuple[str, int, int]]]

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        if path.startswith(f"{BASE}/resolve/main/"):
            name = path.removeprefix(f"{BASE}/resolve/main/")
            first, last = map(int, self.headers["range"].removeprefix("bytes=").split("-"))
            self.ranges.append((name, first, last))
            self._answer(206, (self.folder / name).read_bytes()[first : last + 1])
        elif path == f"/api{BASE}":
            self._answer(200, json.dumps({"id": BASE[10:], "sha": "1" * 40, "siblings": []}).encode())
        elif path == f"/api{BASE}/tree/main":
            files = sorted(self.folder.rglob("*.*"))
            entries = [{"type": "file", "path": str(f.relative_to(self.folder)), "size": f.stat().st_size, "oid": "0"}
                       for f in files]  # fmt: skip
            self._answer(200, json.dumps(entries).encode())
        else:
            self._answer(404, b"{}")

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """The address of a hub that holds what lies in tmp_path/hub."""
    Hub.folder, Hub.ranges = tmp_path / "hub", []
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def write(hub: str, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`synthos data write`, in a process of its own: the hub's address is read when huggingface_hub is imported."""
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "launch.cli", "data", "write", "--out", str(tmp_path / "out"), *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def test_metadata_of_the_hub_becomes_shards(tmp_path: Path, hub: str) -> None:
    images = tmp_path / "images" / "coco2017" / "train2017"
    images.mkdir(parents=True)
    for i in range(20):
        (images / f"{i:012d}.jpg").write_bytes(picture((10 * i, 0, 0), kind="JPEG"))
    (images / f"{19:012d}.jpg").unlink()
    rows = [
        {
            "caption": f"Picture {i} shows it.\n\nIt is red.",
            "path": f"coco2017/train2017/{i:012d}.jpg",
            "source": "coco",
        }
        for i in range(20)
    ] + [{"caption": "Elsewhere.", "path": f"laion/{i}.jpg", "source": "laion"} for i in range(10)]
    parquet(tmp_path / "hub" / "data" / "train-00000.parquet", rows[::2])
    parquet(tmp_path / "hub" / "data" / "train-00001.parquet", rows[1::2])
    (tmp_path / "hub" / "README.md").write_text("about it")
    table = ("--table", "hf:/" + BASE, "--images", str(tmp_path / "images"))
    done = write(hub, tmp_path, *table, "--source", "coco", "--shard-size", "8", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["samples"], told["shards"], told["skipped"], told["sources_left_out"]) == (19, 3, 1, {"laion": 10})
    assert told["reasons"] == {"No such file or directory": 1}
    assert {name for name, _, _ in Hub.ranges} == {"data/train-00000.parquet", "data/train-00001.parquet"}
    stream = Stream(config(tmp_path / "out"), INPUTS, batch_size=19, rank=0, world=1, seed=0)
    batch = stream.next()
    for text, pixels in zip(batch.texts("text"), batch.images("image"), strict=True):
        number = int(text.split()[1])
        assert text == f"Picture {number} shows it. It is red."
        assert abs(int(pixels[0, 0, 0]) - 10 * number) <= 3


def test_a_data_set_that_is_not_there_is_exit_code_2(tmp_path: Path, hub: str) -> None:
    done = write(hub, tmp_path, "--table", "hf://datasets/luping-liu/absent", "--no-captions")
    assert (done.returncode, done.stdout) == (2, "")
    message = "error: --table: hf://datasets/luping-liu/absent can't be read: "
    assert done.stderr.startswith(message) and "Traceback" not in done.stderr and not (tmp_path / "out").exists()
