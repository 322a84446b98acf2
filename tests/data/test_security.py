"""What comes from elsewhere runs nothing, reaches nothing and fills no memory: at every door it is refused by name."""

import io
import json
import pickle
import struct
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from synthos.batch import Input
from synthos.data.decode import decode_image
from synthos.data.embedding import read_embedding
from synthos.data.selection import PICKLES
from synthos.data.shards import list_shards
from synthos.data.stream import HeldOut, Stream
from tests.data.faults import FaultServer, serving
from tests.data.make import INPUTS, Payload, config, data_set, encoded, noise, pairs, tar


def stream(folder: Path | list[str], inputs: dict[str, Input] = INPUTS, batch: int = 1, **changes: Any) -> Stream:
    return Stream(config(folder, **changes), inputs, batch_size=batch, rank=0, world=1, seed=0)


def executables(ran: Path) -> dict[str, bytes]:
    """Members that make the folder `ran` when they are read as what they are called."""
    plain = pickle.dumps(Payload(ran))
    weights, archive, array = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"weights": Payload(ran)}, weights)
    np.savez(archive, a=np.array([Payload(ran)], dtype=object), allow_pickle=True)
    np.save(array, np.array([Payload(ran)], dtype=object), allow_pickle=True)
    return {
        **dict.fromkeys(("pyd", "pkl", "pickle"), plain),
        **dict.fromkeys(("pt", "pth"), weights.getvalue()),
        "npz": archive.getvalue(),
        "npy": array.getvalue(),
    }


def test_members_that_could_run_code_are_never_decoded(tmp_path: Path) -> None:
    members = executables(tmp_path / "ran")
    for kind, load in (("pkl", pickle.loads), ("pt", lambda data: torch.load(io.BytesIO(data), weights_only=False)),
                       ("npz", lambda data: np.load(io.BytesIO(data), allow_pickle=True)["a"]),
                       ("npy", lambda data: np.load(io.BytesIO(data), allow_pickle=True))):  # fmt: skip
        load(members[kind])
        (tmp_path / "ran").rmdir()  # so they would
    (tmp_path / "set").mkdir()
    beside = [(f"{key}.{kind}", data) for key in "ab" for kind, data in members.items()]
    tar(tmp_path / "set" / "0.tar", sorted([*pairs(["a", "b"]), *beside]))
    one = stream(tmp_path / "set", batch=2)
    assert sorted(one.next().texts("text")) == ["caption a", "caption b"]
    held = HeldOut(config(tmp_path / "set", holdout_fraction=0.5), INPUTS)
    assert held.batch([*range(len(held))]).texts("text")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("extension", [*PICKLES, "seg.pkl", "npy", "safetensors", "exe"])
@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_recipe_cannot_ask_for_them(tmp_path: Path, kind: Any, extension: str) -> None:
    (tmp_path / "set").mkdir()
    tar(tmp_path / "set" / "0.tar", [*pairs(["a"]), (f"a.{extension}", pickle.dumps(Payload(tmp_path / "ran")))])
    why = ": a pickle can run any code" if extension.rpartition(".")[2] in PICKLES else ""
    with pytest.raises(
        ValueError, match=rf"input 'x': members \.{extension} are not read{why}; .* is read of (jpg|txt)"
    ):
        stream(tmp_path / "set", {"x": Input(kind, (extension,))})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_no_members(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as file:
        for name, data in pairs(["a"]):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
        info = tarfile.TarInfo("b.txt")
        info.type, info.linkname = kind, "/etc/hostname"
        file.addfile(info)
    with pytest.raises(ValueError, match=r"0\.tar: 'b\.txt' is a link or a device; only regular files are read"):
        stream(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["0.tar"]


@pytest.mark.parametrize("name", ["/etc/a.txt", "../a.txt", "a/../../b.txt", "a\nb.txt", "a\0b.txt"])
def test_names_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / "0.tar", "w", format=tarfile.PAX_FORMAT) as file:
        info = tarfile.TarInfo("b.txt")
        info.pax_headers = {"path": name}
        file.addfile(info)
    with pytest.raises(ValueError, match=r"0\.tar: unsafe member name"):
        stream(tmp_path)


def test_no_path_is_made_of_a_key(tmp_path: Path) -> None:
    """Whatever a key is made of, the only new file is the index."""
    keys = ["a/b/c", "~root", "$HOME", "%2e%2e", "con", "; ls", "\N{FULLWIDTH FULL STOP}" * 2, "x" * 900]
    (tmp_path / "set").mkdir()
    tar(tmp_path / "set" / "0.tar", pairs(keys), tarfile.PAX_FORMAT)
    read = stream(tmp_path / "set", batch=len(keys)).next().texts("text")
    assert sorted(read) == sorted(f"caption {key}" for key in keys)
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")) == [
        "set", "set/0.idx.npz", "set/0.tar",
    ]  # fmt: skip


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultServer]:
    with serving({"/set/0.tar": tar(tmp_path / "0.tar", pairs(["a"])).read_bytes()}) as faults:
        yield faults


ENTRIES = {
    "file:///etc/hostname.tar": "not allowed to begin with 'file:'",
    "FILE:/etc/hostname.tar": "not allowed to begin with 'file:'",
    "local:x.tar": "not allowed to begin with 'file:'",
    "pipe:touch ran": "'pipe:' runs a shell command",
    "PIPE:touch ran": "'pipe:' runs a shell command",
    "simplecache::file:///etc/x.tar": "'::' chains addresses",
    "ftp://host/0.tar": "unknown scheme 'ftp'",
    "/etc/hostname.tar": "no path below its folder",
    "~/x.tar": "no path below its folder",
    "../other/0.tar": "no path below its folder",
    "a/../../0.tar": "no path below its folder",
    "more.txt": "names another list",
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_list_from_elsewhere_names_nothing_of_this_machine(server: FaultServer, entry: str) -> None:
    server.files |= {"/set/list.txt": f"0.tar\n{entry}\n".encode(), "/set/list.json": json.dumps([entry]).encode()}
    server.etags |= {"/set/list.txt": "1", "/set/list.json": "2"}
    for name in ("list.txt", "list.json"):
        with pytest.raises(ValueError, match=rf"data\.shards: .*{ENTRIES[entry]}"):
            list_shards(server.url(f"/set/{name}"))


@pytest.mark.parametrize("change, fault", [
    ({"url": "/etc/hostname.tar"}, "names '/etc/hostname.tar', which is no address"),
    ({"url": "../x.tar"}, "names '../x.tar', which is no address"),
    ({"url": "file:///etc/x.tar"}, "not allowed to begin with 'file:'"),
    ({"url": "pipe:touch ran"}, "'pipe:' runs a shell command"),
    ({"name": "../../x.tar"}, "'../../x.tar' would lie in another folder"),
    ({"name": "/etc/x.tar"}, "'/etc/x.tar' would lie in another folder"),
])  # fmt: skip
def test_nor_does_a_manifest(server: FaultServer, change: dict[str, str], fault: str) -> None:
    from synthos.data.manifest import ShardLine, fingerprint

    line = {"name": "0.tar", "bytes": 1, "samples": 1, "checksum": 1, **change}
    content = {"format": 1, "fingerprint": fingerprint([ShardLine(**line)]), "shards": [line]}  # type: ignore[arg-type]
    server.files["/set/manifest.json"] = json.dumps(content).encode()
    server.etags["/set/manifest.json"] = "1"
    with pytest.raises(ValueError, match=fault.replace(".", r"\.")):
        list_shards(server.url("/set/"))


def test_embeddings_run_nothing(tmp_path: Path) -> None:
    for extension, data in executables(tmp_path / "ran").items():
        (tmp_path / f"a.{extension}").write_bytes(data)
        (tmp_path / "b.npy").write_bytes(data)
        (tmp_path / "b.safetensors").write_bytes(data)
        for name in (f"a.{extension}", "b.npy", "b.safetensors"):
            with pytest.raises(
                ValueError, match="^(is no|is an archive|Object arrays|This file contains pickled|has a header)"
            ):
                read_embedding(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "EPS", "ICO", "PPM", "TGA", "JPEG2000", "PDF"])
@pytest.mark.parametrize("extension", ["jpg", "png"])
def test_other_formats_are_refused_whatever_they_are_called(tmp_path: Path, kind: str, extension: str) -> None:
    if kind == "JPEG2000":
        pytest.importorskip("PIL.Jpeg2KImagePlugin")
    data = encoded(noise(16, 16), kind)
    with pytest.raises(ValueError, match="not a readable JPEG, PNG, WebP or AVIF"):
        decode_image(data, 8, 8, "shared")
    (tmp_path / "set").mkdir()
    tar(tmp_path / "set" / "0.tar", [*pairs(["a"]), (f"b.{extension}", data), ("b.txt", b"caption")])
    with pytest.raises(ValueError, match="sample 'b' has an unreadable image"):
        stream(tmp_path / "set")


def test_psd_is_refused() -> None:
    """A header and a flat picture, which Pillow can read."""
    data = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 4, 4, 8, 3) + bytes(12) + bytes(2) + bytes(48)
    assert Image.open(io.BytesIO(data)).format == "PSD"
    with pytest.raises(ValueError, match="not a readable JPEG, PNG, WebP or AVIF"):
        decode_image(data, 8, 8, "shared")


def test_two_data_sets_do_not_reach_into_each_other(tmp_path: Path) -> None:
    """A folder's manifest names its own shards only."""
    data_set(tmp_path / "one", 2, 2)
    folder = data_set(tmp_path / "two", 2, 2)
    text = (folder / "manifest.json").read_text().replace("00000.tar", "../one/00000.tar")
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        stream(folder)
