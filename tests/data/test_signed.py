"""Lists of signed addresses: each signature is used as it is, and never shown."""

import logging
from collections.abc import Iterator
from http.client import HTTPMessage
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from launch.cli import main
from synthos.data.shards import list_shards
from synthos.data.stream import Stream
from synthos.data.streaming import Streaming
from synthos.schema import StreamingConfig
from tests.data.faults import Answer, Fault, FaultServer, serving
from tests.data.make import INPUTS, config, data_set

SAMPLES = 8
QUERY = "?X-Amz-Expires=60&X-Amz-Signature=planted%2Bsignature"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return data_set(tmp_path / "set", SAMPLES, shard_size=4)


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    """One that refuses what is not signed."""
    with serving({f"/set/{file.name}": file.read_bytes() for file in folder.iterdir()}) as faults:
        answer = faults.answer

        def signed(method: str, target: str, headers: HTTPMessage, body: bytes) -> tuple[Fault, Answer]:
            given = answer(method, target, headers, body)
            return given if f"?{urlsplit(target).query}" == QUERY else (Fault(), Answer(403, {}, b""))

        monkeypatch.setattr(faults, "answer", signed)
        yield faults


@pytest.fixture
def listed(server: FaultServer, tmp_path: Path) -> Path:
    path = tmp_path / "list.txt"
    path.write_text("".join(f"{server.url(f'/set/0000{number}.tar')}{QUERY}\n" for number in range(2)))
    return path


def captions(stream: Stream | Streaming) -> list[str]:
    found = [text for _ in range(SAMPLES // 4) for text in stream.next().texts("text")]
    stream.close()
    return sorted(found)


EXPECTED = [f"caption {i}" for i in range(SAMPLES)]


def test_they_are_read_with_their_indexes_and_never_shown(
    listed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """By an index beside each shard, signed alike; by a folder of indexes; and without any."""
    places = list_shards(str(listed))
    assert [place.name for place in places] == ["00000.tar", "00001.tar"]
    assert [place.index for place in places] == [place.url.replace(".tar", ".idx.npz") for place in places]
    with caplog.at_level(logging.DEBUG):
        asked = {"batch_size": 4, "rank": 0, "world": 1, "seed": 0}
        assert captions(Stream(config(str(listed)), INPUTS, **asked)) == EXPECTED
        streamed = config(str(listed), streaming=StreamingConfig(SAMPLES))
        assert captions(Streaming(streamed, INPUTS, **asked)) == EXPECTED
        out = tmp_path / "indexes"
        assert main(["data", "index", str(listed), "--out", str(out), "--workers", "1"]) == 0
        assert captions(Stream(config(out), INPUTS, **asked)) == EXPECTED
    said = capsys.readouterr()
    assert "planted" not in caplog.text + said.out + said.err and "***" in caplog.text


def test_an_expired_signature_is_named_without_it(listed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed.write_text(listed.read_text().replace("planted", "plantedold"))
    assert main(["data", "stats", str(listed)]) == 1
    said = capsys.readouterr().err
    assert "HTTP 403" in said and "/set/00000.idx.npz" in said and "planted" not in said


@pytest.mark.parametrize(("name", "fault"), [
    ("x.zip?sig=planted", r"x\.zip\?sig=\*\*\*' is no \.tar"), ("more.txt?sig=planted", "names another list"),
])  # fmt: skip
def test_what_is_no_tar_is_refused_without_it(tmp_path: Path, name: str, fault: str) -> None:
    (tmp_path / "list.txt").write_text(f"https://host/{name}\n")
    with pytest.raises(ValueError, match=fault):
        list_shards(str(tmp_path / "list.txt"))
