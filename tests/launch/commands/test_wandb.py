"""`synthos wandb sync` by the real wandb, which ends with 0 also where the server takes nothing."""

import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tests.launch.commands.conftest import Runs, synthos

LOGGED = """
import sys, wandb
settings = wandb.Settings(console="off", x_disable_stats=True)
with wandb.init(mode="offline", project="p", id="abc", dir=sys.argv[1], settings=settings) as run:
    run.log({"x": 1})
"""


class Refusal(BaseHTTPRequestHandler):
    """A server that lets nobody in."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        answer = json.dumps({"errors": [{"message": "permission denied"}]}).encode()
        self.send_response(403)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """W&B is a server of this machine, which refuses a well-formed key."""
    with HTTPServer(("127.0.0.1", 0), Refusal) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        yield
        server.shutdown()


def test_what_the_server_refuses_is_not_sent(runs: Runs, refusing: None, capfd: pytest.CaptureFixture[str]) -> None:
    folder = runs.finished("a-00000001", "done")
    subprocess.run([sys.executable, "-c", LOGGED, str(folder)], check=True, timeout=60)
    (folder / "wandb" / "run_id").write_text("abc")
    (logged,) = (folder / "wandb").glob("offline-run-*")
    sent = folder / "wandb" / "offline-run-20200101_000000-abc"
    sent.mkdir()
    for name in ("run-abc.wandb", "run-abc.wandb.synced"):
        (sent / name).touch()
    (folder / "wandb" / "offline-run-20200101_000001-abc").mkdir()  # killed before it had logged anything
    capfd.readouterr()
    assert synthos("wandb", "sync", "a") == 1
    shown = capfd.readouterr().err
    assert "permission denied" in shown
    assert shown.splitlines()[-1] == "a-00000001: 1 of 1 attempt not sent, wandb says why"
    assert not [*logged.glob("*.synced")]
