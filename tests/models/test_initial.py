"""Where `init_from` finds weights; runs that start from them are in tests/recipes/test_phases.py."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from synthos.models.autoencoder import build_autoencoder
from synthos.models.content import digest
from synthos.models.initial import changed, find, hold, missing, pinned, start_from
from synthos.models.parts import Models
from synthos.models.wan import build_transformer, original_name
from tests.models.test_exported import exported
from tests.models.test_parts import stored
from tests.support import run_config

TINY: dict[str, Any] = {"name": "tiny", "parts": {}}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty snapshot of lab/fun in a hub cache of its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--lab--fun"
    snapshot = repository / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    return snapshot


def test_a_file_a_folder_and_a_hub_id_are_found(hub: Path, tmp_path: Path) -> None:
    (tmp_path / "file.safetensors").touch()
    assert find(str(tmp_path / "file.safetensors")) == tmp_path / "file.safetensors"
    assert find(str(tmp_path)) == tmp_path
    assert find("lab/fun") == hub
    assert find("lab/other") is None and find("no/such/folder") is None


def test_the_connector_is_taken_from_a_hub_id_under_its_original_names(hub: Path, tiny: Models) -> None:
    network = build_transformer(tiny, 64, "shared_kv")
    names = {name: original for name, _ in network.named_parameters() if (original := original_name(name))}
    values = {original: torch.full(network.get_parameter(name).shape, 0.5) for name, original in names.items()}
    stored(hub, values | {"patch_embedding.weight": torch.zeros(128, 36, 1, 2, 2)})
    config = run_config("init_from=lab/fun")
    assert config.init_from == "lab/fun" and missing(config) == []
    start_from(config, network, tiny)
    tensors = tiny.tensors(network)
    assert all((tensors[name]() == 0.5).all() for name in names)
    assert tensors["patch_embedding.weight"]().shape == (128, 16, 1, 2, 2)


def test_a_snapshot_without_weights_is_no_use(hub: Path) -> None:
    with pytest.raises(ValueError, match=r"^init_from: .* lacks diffusion_pytorch_model.safetensors or model.saf"):
        missing(run_config("init_from=lab/fun"))


def test_a_network_that_takes_no_other_weights_says_so(hub: Path, tiny: Models) -> None:
    stored(hub, {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"^init_from: .* is no export of a run, and \w+ takes no other weights$"):
        start_from(run_config("init_from=lab/fun"), build_autoencoder(tiny), tiny)


@pytest.mark.parametrize("complete", [True, False])
def test_every_tensor_of_an_export_is_taken_however_it_is_named(tiny: Models, tmp_path: Path, complete: bool) -> None:
    folder = exported(tmp_path / "e", complete=complete, model=TINY)
    (file,) = (folder / "transformer").glob("*.safetensors")
    shapes = {n: p.shape for n, p in build_transformer(tiny, 64, "decoupled").named_parameters()}
    given = [name for name in shapes if complete or original_name(name)]
    save_file({name: torch.full(shapes[name], 0.5) for name in given}, file)
    for path in (folder, folder / "transformer", file):
        network = build_transformer(tiny, 64, "decoupled")
        config = run_config(f"init_from={path}")
        assert missing(config) == []
        start_from(config, network, tiny)
        tensors = tiny.tensors(network)
        assert {name for name in shapes if (tensors[name]() == 0.5).all()} == set(given)


def test_a_trained_body_is_not_left_behind(tiny: Models, tmp_path: Path) -> None:
    """Of a whole network that some other program trained, the connector alone would be half of what it learned."""
    network = build_transformer(tiny, 64, "shared_kv")
    stored(tmp_path, {name: torch.zeros(p.shape) for name, p in network.named_parameters()})
    with pytest.raises(ValueError, match=rf"^init_from: {tmp_path} holds \d+ tensors besides the projector .* be lost"):
        start_from(run_config(f"init_from={tmp_path}"), network, tiny)


def test_a_download_that_did_not_end_is_missing(tiny: Models, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    save_file({"a": torch.zeros(1)}, tmp_path / "1.safetensors")
    config = run_config(f"init_from={tmp_path}")
    assert missing(config) == [f"init_from: {tmp_path} lacks 2.safetensors"]
    network = build_transformer(tiny, 64, "shared_kv")
    with pytest.raises(ValueError, match=rf"^init_from: {tmp_path} lacks 2\.safetensors$"):
        start_from(config, network, tiny)
    save_file({"c": torch.zeros(1)}, tmp_path / "2.safetensors")
    with pytest.raises(ValueError, match=r"2\.safetensors is no whole safetensors file: .*\bb\b"):
        start_from(config, network, tiny)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "{"])
def test_an_index_that_is_none_is_one_message(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"^init_from: .*index\.json (is no JSON|has no weight_map from tensors)"):
        missing(run_config(f"init_from={tmp_path}"))


def test_a_hub_id_is_fixed_to_the_snapshot_in_the_cache(hub: Path, tmp_path: Path) -> None:
    assert pinned("lab/fun") == str(hub)
    assert pinned(str(tmp_path)) == str(tmp_path)
    assert pinned("lab/other") == "lab/other" and pinned(None) is None


def test_what_gated_weights_need_is_said_where_there_is_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")
    config = run_config("init_from=lab/gated")
    assert "a gated model also needs `hf auth login`, there is no Hugging Face token here" in missing(config)[0]
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert "gated model" not in missing(config)[0]


def test_a_run_is_held_to_what_it_started_from(tmp_path: Path) -> None:
    run, file = tmp_path / "run", tmp_path / "weights.safetensors"
    run.mkdir()
    file.write_text("one")
    config, first = run_config(f"init_from={file}"), digest(file)
    hold(config, run, write=False)  # of ranks, the main one notes it
    assert changed(config, run) is None and not list(run.iterdir())
    hold(config, run, write=True)
    assert json.loads((run / "provenance" / "init_from.json").read_text()) == {"path": str(file), "content": first}
    assert [path.name for path in (run / "provenance").iterdir()] == ["init_from.json"]
    moved = run_config(f"init_from={shutil.copy(file, tmp_path / 'moved.safetensors')}")
    file.write_text("two")
    hold(moved, run, write=True)
    for write in (True, False):
        with pytest.raises(RuntimeError, match=f"^init_from: {file} has content {digest(file)[:12]}, .* {first[:12]};"):
            hold(config, run, write)
    hold(run_config(), tmp_path / "other", write=True)
    assert not (tmp_path / "other").exists()


def based(export: Path, *overrides: str) -> list[str]:
    return missing(run_config(f"init_from={export}", *overrides))


def test_the_base_is_told_by_its_content_wherever_it_lies(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    (tmp_path / "vae" / "model.safetensors").write_text("one")
    parts = {"vae": {"path": str(tmp_path / "vae")}}
    known = exported(
        tmp_path / "known", model={"name": "tiny", "parts": parts}, content={"vae": digest(tmp_path / "vae")}
    )
    unknown = exported(tmp_path / "unknown", model={"name": "tiny", "parts": parts}, content={})
    here, moved = (f"+model.parts.vae.path={tmp_path / name}" for name in ("vae", "moved"))
    assert based(known, here) == based(unknown, here) == []
    shutil.copytree(tmp_path / "vae", tmp_path / "moved")
    assert based(known, moved) == []
    with pytest.raises(ValueError, match=f"with model.parts.vae.path {tmp_path / 'vae'}, this run has .*/moved;"):
        based(unknown, moved)
    (tmp_path / "vae" / "model.safetensors").write_text("two")
    with pytest.raises(ValueError, match=r"was trained with model\.parts\.vae's content \w{12}, this run has \w{12};"):
        based(known, here)
    assert based(unknown, here) == []  # nothing tells
    shutil.rmtree(tmp_path / "vae")
    assert based(known, here) == []  # not on this machine: its path is all there is
    with pytest.raises(ValueError, match=r"model\.parts\.vae\.path .*/vae, this run has None"):
        based(known)


def test_of_the_same_commit_any_part_may_be_here(hub: Path, tmp_path: Path) -> None:
    (hub / "config.json").write_text("{}")
    (hub / "model.safetensors").write_text("one")
    parts = {"vae": {"path": "lab/fun", "revision": hub.name}}
    export = exported(tmp_path / "e", model={"name": "tiny", "parts": parts}, content={"vae": "of more files"})
    part = "+model.parts.vae={path: lab/fun, revision: %s}"
    assert based(export, part % hub.name) == []
    with pytest.raises(ValueError, match=r"model\.parts\.vae's content of more file, this run has"):
        based(export, "+model.parts.vae={path: lab/fun}")
