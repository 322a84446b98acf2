"""Where `init_from` finds weights; runs that start from them are in tests/recipes/test_phases.py."""

from pathlib import Path

import pytest
import torch

from synthos.models.autoencoder import build_autoencoder
from synthos.models.initial import find, missing, start_from
from synthos.models.parts import Models
from synthos.models.wan import build_transformer, original_name
from tests.models.test_parts import stored
from tests.support import run_config


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
