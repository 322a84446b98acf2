"""`synthos data index`: here, elsewhere, again, and on what is damaged."""

import json
import multiprocessing
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.cli import main
from synthos.data.index import load_index
from synthos.data.indexing import over_shards
from synthos.data.shards import ShardPlace
from synthos.data.stream import Stream
from tests.data.commands.conftest import Command
from tests.data.commands.work import name_of
from tests.data.faults import Fault, FaultServer, serving
from tests.data.make import INPUTS, config, pairs, tar
from tests.support import ROOT, environment


def bare(folder: Path) -> tuple[bytes, dict[str, bytes]]:
    """Take manifest and indexes away; returns them."""
    manifest = (folder / "manifest.json").read_bytes()
    indexes = {path.name: path.read_bytes() for path in folder.glob("*.npz")}
    for path in [*folder.glob("*.npz"), folder / "manifest.json"]:
        path.unlink()
    return manifest, indexes


@pytest.mark.parametrize("workers", [1, 2])
def test_what_the_writer_wrote_is_found_again(folder: Path, command: Command, workers: int) -> None:
    manifest, indexes = bare(folder)
    code, said = command("index", folder, "--workers", workers)
    assert code == 0 and said["samples"] == 11 and said["built"] == 3 and said["note"] is None
    assert (folder / "manifest.json").read_bytes() == manifest
    assert said["fingerprint"] == json.loads(manifest)["fingerprint"]
    for name, expected in indexes.items():
        (folder.parent / name).write_bytes(expected)
        ours, theirs = load_index(folder / name), load_index(folder.parent / name)
        assert ours.line(name) == theirs.line(name) and np.array_equal(ours.members, theirs.members)


def test_a_second_time_keeps_what_is_whole(folder: Path, command: Command) -> None:
    bare(folder)
    command("index", folder)
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "00001.idx.npz").write_bytes(b"half")
    code, said = command("index", folder)
    assert (code, said["built"], said["kept"]) == (0, 1, 2)
    changed = {path.name for path, then in times.items() if path.stat().st_mtime_ns != then}
    assert changed == {"00001.idx.npz"}


def test_a_part_of_a_folder_gets_no_manifest(folder: Path, command: Command) -> None:
    bare(folder)
    code, said = command("index", folder / "00000.tar", folder / "00002.tar")
    assert code == 0 and said["shards"] == 2 and "00001.tar" in said["note"]
    assert not (folder / "manifest.json").exists() and not (folder / "00001.idx.npz").exists()


def test_a_damaged_shard_is_named_and_the_others_are_indexed(folder: Path, command: Command) -> None:
    bare(folder)
    whole = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(whole[: len(whole) // 2])
    code, said = command("index", folder)
    assert code == 1 and [Path(d["shard"]).name for d in said["damaged"]] == ["00001.tar"]
    assert "cut" in said["damaged"][0]["error"]
    assert not (folder / "manifest.json").exists() and said["fingerprint"] is None
    (folder / "00001.tar").write_bytes(whole)
    code, said = command("index", folder)
    assert (code, said["built"], said["kept"]) == (0, 1, 2) and (folder / "manifest.json").exists()


def test_another_content_than_the_manifest_tells(folder: Path, command: Command) -> None:
    tar(folder / "00001.tar", pairs(["a", "b"]))
    (folder / "00001.idx.npz").unlink()
    before = (folder / "manifest.json").read_bytes()
    code, said = command("index", folder)
    assert code == 1 and "00001.tar" in said["note"] and (folder / "manifest.json").read_bytes() == before


def test_an_index_in_a_folder_of_its_own(folder: Path, tmp_path: Path, command: Command) -> None:
    manifest, _ = bare(folder)
    code, said = command("index", folder, "--out", tmp_path / "indexes", "--workers", 2)
    assert code == 0 and said["fingerprint"] == json.loads(manifest)["fingerprint"]
    assert sorted(path.name for path in folder.iterdir()) == ["00000.tar", "00001.tar", "00002.tar"]
    assert_equal_streams(folder, tmp_path / "indexes", config(folder))


def test_over_http(folder: Path, tmp_path: Path, command: Command) -> None:
    bare(folder)
    files = {f"/data/{path.name}": path.read_bytes() for path in folder.iterdir()}
    with serving(files) as server:
        code, said = command("index", server.url("/data/"), "--out", tmp_path / "indexes", "--workers", 1)
        assert code == 0 and said["built"] == 3 and said["samples"] == 11
        assert not [path.name for path in (tmp_path / "indexes").iterdir() if path.name.endswith(".part")]
        assert_equal_streams(folder, tmp_path / "indexes", config(folder))
        sent = server.sent("/data/00000.tar")
        code, said = command("index", server.url("/data/"), "--out", tmp_path / "indexes", "--workers", 1)
        assert (code, said["built"], said["kept"]) == (0, 0, 3)
        assert server.sent("/data/00000.tar") == sent  # only its size was asked for


def test_over_s3(folder: Path, tmp_path: Path, command: Command, s3: FaultServer, s3_api: tuple[str, Any]) -> None:
    bare(folder)
    for path in folder.iterdir():
        s3_api[1].put_object(Bucket="bucket", Key=f"set/{path.name}", Body=path.read_bytes())
    code, said = command("index", "s3://bucket/set/", "--out", tmp_path / "indexes", "--workers", 1)
    assert code == 0 and said["samples"] == 11
    assert_equal_streams(folder, tmp_path / "indexes", config(folder))


def assert_equal_streams(here: Path, indexes: Path, data: Any) -> None:
    """The same batches are read by the folder of indexes as from the shards themselves."""
    near = Stream(data, INPUTS, batch_size=4, rank=0, world=1, seed=5)
    far = Stream(config(indexes), INPUTS, batch_size=4, rank=0, world=1, seed=5)
    for _ in range(4):
        ours, theirs = near.next(), far.next()
        assert torch.equal(ours.ids, theirs.ids) and ours.texts("text") == theirs.texts("text")
        assert torch.equal(ours.images("image"), theirs.images("image"))


def test_what_is_asked_wrongly(folder: Path, tmp_path: Path, refused: Any) -> None:
    assert "--out: needed" in refused("index", "https://host/a.tar")
    assert "pa55" not in refused("index", "https://user:pa55@host/a.tar")
    assert "no such folder" in refused("index", tmp_path / "nothing")
    assert "holds shards" in refused("index", folder / "00000.tar", "--out", tmp_path / "set")
    shutil.copytree(folder, tmp_path / "other")
    for path in (tmp_path / "other").glob("*.tar"):
        path.unlink()
    (tmp_path / "other.tar").write_bytes((folder / "00000.tar").read_bytes())
    assert "indexes other shards" in refused("index", tmp_path / "other.tar", "--out", tmp_path / "other")


def test_a_store_that_fails(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Any) -> None:
    """One message; what was indexed before stays."""
    bare(folder)
    files = {f"/data/{path.name}": path.read_bytes() for path in folder.iterdir()}
    out = tmp_path / "indexes"
    with serving(files) as server:
        missing = refused("index", server.url("/data/nothing.tar"), "--out", out, "--json")
        assert "/data/nothing.tar" in missing
        server.fail("/data/00001.tar", Fault(status=403), Fault(status=403), method="HEAD")
        server.fail("/data/00001.tar", Fault(status=403), Fault(status=403))
        assert main(["data", "index", server.url("/data/"), "--out", str(out), "--workers", "1", "--json"]) == 1
        said = capsys.readouterr()
        assert said.err.startswith("error: ") and "/data/00001.tar" in json.loads(said.out)["error"]
    assert sorted(path.name for path in out.iterdir()) == ["00000.idx.npz"]


def test_progress_goes_to_stderr(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare(folder)
    assert main(["data", "index", str(folder)]) == 0
    said = capsys.readouterr()
    assert "11 samples in 3 shards" in said.out and "indexing" in said.err and "indexing" not in said.out


def test_processes_end_with_the_one_that_asked(tmp_path: Path) -> None:
    """Also where it is killed, and can't tell them."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom synthos.data.indexing import over_shards\n"
        "from synthos.data.shards import ShardPlace\nfrom tests.data.commands.work import wait_here\n"
        "if __name__ == '__main__':\n"
        f"    places = [ShardPlace('{tmp_path}/a', ''), ShardPlace('{tmp_path}/b', '')]\n"
        "    list(over_shards(wait_here, places, 2))\n"
    )
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, str(tmp_path / "program.py")]
    parent = subprocess.Popen(command, env={**environment(), "PYTHONPATH": str(ROOT)})
    files = [tmp_path / "a", tmp_path / "b"]
    wait_until(lambda: parent.poll() is not None or all(file.exists() and file.read_text() for file in files))
    assert parent.poll() is None
    workers = [int(file.read_text()) for file in files]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not any(alive(worker) for worker in workers))
    assert not any(alive(worker) for worker in workers)


def alive(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def wait_until(happened: Any) -> None:
    for _ in range(500):
        if happened():
            return
        time.sleep(0.1)


def test_results_come_with_their_number(tmp_path: Path) -> None:
    places = [ShardPlace(str(tmp_path / str(number)), "") for number in range(7)]
    found = dict(over_shards(name_of, places, 2))
    assert found == {number: str(number) for number in range(7)}
    assert not multiprocessing.active_children()


def test_a_changed_shard_is_indexed_anew(folder: Path, command: Command) -> None:
    bare(folder)
    command("index", folder)
    (folder / "manifest.json").unlink()
    tar(folder / "00002.tar", pairs(["x"]))
    code, said = command("index", folder)
    assert (code, said["built"], said["samples"]) == (0, 1, 9)
    assert command("index", folder)[1]["kept"] == 3
