import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from synthos.models.autoencoder import TINY_WAN, build_autoencoder
from synthos.models.clip import TINY_CLIP, build_image_encoder
from synthos.models.meta import find_class
from synthos.models.parts import Models, find_folder, missing, pinned
from synthos.models.tensors import match_tensors, seeded
from synthos.models.text import TINY_TEXT, TINY_TOKENIZER
from synthos.schema import ModelConfig, PartConfig
from tests.models.conftest import fill


class Small(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(2, 3)


def stored(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file({key: value.clone() for key, value in tensors.items()}, folder / "model.safetensors")
    return folder


WEIGHT, BIAS = torch.arange(6.0).view(3, 2), torch.ones(3)


def test_tensors_are_found_by_name(tmp_path: Path) -> None:
    found = match_tensors(Small(), stored(tmp_path, {"inner.weight": WEIGHT, "inner.bias": BIAS}))
    assert list(found) == ["inner.weight", "inner.bias"]
    assert torch.equal(found["inner.weight"](), WEIGHT)


def test_tensors_are_found_under_a_prefix_among_others(tmp_path: Path) -> None:
    folder = stored(tmp_path, {"a.b.inner.weight": WEIGHT, "a.b.inner.bias": BIAS, "a.c.weight": WEIGHT})
    assert torch.equal(match_tensors(Small(), folder)["inner.bias"](), BIAS)


def test_tensors_are_found_without_the_modules_own_prefix(tmp_path: Path) -> None:
    found = match_tensors(Small(), stored(tmp_path, {"weight": WEIGHT, "bias": BIAS}))
    assert torch.equal(found["inner.weight"](), WEIGHT)


def test_an_absent_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"lack 1 of 2 tensors, first 'inner\.bias'"):
        match_tensors(Small(), stored(tmp_path, {"inner.weight": WEIGHT}))


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"inner\.weight has shape \(2, 3\), the model needs \(3, 2\)"):
        match_tensors(Small(), stored(tmp_path, {"inner.weight": WEIGHT.T.contiguous(), "inner.bias": BIAS}))


def test_what_was_left_out_of_a_module_is_not_asked_for(tiny: Models) -> None:
    encoder = build_image_encoder(tiny)
    names = [name for name, _ in encoder.named_parameters()]
    assert list(tiny.tensors(encoder)) == names
    assert not any(name.startswith("encoder.layers.2.") for name in names)
    assert any(name.startswith("encoder.layers.1.") for name in names)


def test_a_built_module_has_meta_parameters_real_buffers_and_is_frozen(tiny: Models) -> None:
    module = tiny.build("image_encoder", TINY_CLIP)
    assert {p.device.type for p in module.parameters()} == {"meta"}
    assert torch.equal(module.get_buffer("embeddings.position_ids"), torch.arange(17)[None])
    assert not module.training
    assert not any(p.requires_grad for p in module.parameters())


def test_tiny_parts_are_the_same_wherever_they_are_written(tiny: Models, tmp_path: Path) -> None:
    again = Models(tiny.config, tmp_path)
    for part, kind in [("text_encoder", TINY_TEXT), ("image_encoder", TINY_CLIP), ("tokenizer", TINY_TOKENIZER)]:
        one, two = tiny.folder(part, kind), again.folder(part, kind)
        assert one.name == two.name
        for file in one.iterdir():
            assert file.read_bytes() == (two / file.name).read_bytes()


def test_tiny_parts_are_written_once_and_leave_the_generator_alone(tmp_path: Path) -> None:
    models = Models(ModelConfig("tiny"), tmp_path)
    state = torch.get_rng_state()
    folder = models.folder("image_encoder", TINY_CLIP)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert models.folder("image_encoder", TINY_CLIP) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert torch.equal(torch.get_rng_state(), state)
    assert [f.name for f in folder.parent.iterdir()] == [folder.name]


def test_a_part_of_the_tiny_model_may_be_a_real_one(tmp_path: Path) -> None:
    import diffusers

    cls: Any = diffusers.AutoencoderKLWan
    cls(**TINY_WAN.config).save_pretrained(tmp_path / "vae")
    models = Models(ModelConfig("tiny", {"vae": PartConfig(str(tmp_path / "vae"))}), tmp_path / "cache")
    assert type(fill(models, build_autoencoder(models))).__name__ == "AutoencoderKLWan"


def test_settings_are_the_parts_own_config(tiny: Models) -> None:
    assert tiny.settings("image_encoder", TINY_CLIP)["hidden_size"] == 64
    planned = Models(ModelConfig("tiny"), Path("no/such/folder"), meta_only=True)
    assert planned.settings("image_encoder", TINY_CLIP)["hidden_size"] == 64


def test_planning_reads_and_writes_nothing(tmp_path: Path) -> None:
    models = Models(ModelConfig("tiny"), tmp_path / "cache", meta_only=True)
    assert len(build_image_encoder(models).encoder.layers) == 2
    assert not list(tmp_path.iterdir())


def test_an_unknown_part_lists_the_known(tmp_path: Path) -> None:
    models = Models(ModelConfig("mine", {"vae": PartConfig("x")}), tmp_path)
    with pytest.raises(ValueError, match=r"no 'image_encoder' in mine; .*vae"):
        build_image_encoder(models)


def test_a_hub_id_that_is_not_cached_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = ModelConfig("mine", {"vae": PartConfig("nobody/no-such-model", subfolder="vae")})
    (line,) = missing(config)
    assert "model.parts.vae: 'nobody/no-such-model' is no local folder" in line
    assert "hf download nobody/no-such-model --include 'vae/*'" in line
    assert "model=tiny" in line


def test_a_path_that_does_not_exist_is_no_hub_id(tmp_path: Path) -> None:
    (line,) = missing(ModelConfig("mine", {"vae": PartConfig(str(tmp_path / "gone"))}))
    assert line == f"model.parts.vae: '{tmp_path / 'gone'}' does not exist"


@pytest.mark.parametrize(
    ("files", "absent"),
    [
        ({}, "config.json"),
        ({"config.json": {}}, "diffusion_pytorch_model.safetensors or model.safetensors"),
        (
            {
                "config.json": {},
                "model.safetensors.index.json": {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}},
            },
            "1.safetensors, 2.safetensors",
        ),
    ],
)
def test_absent_files_of_a_folder_are_named(tmp_path: Path, files: dict[str, Any], absent: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    (line,) = missing(ModelConfig("mine", {"vae": PartConfig(str(tmp_path))}))
    assert line == f"model.parts.vae: {tmp_path} lacks {absent}"


def test_classes_are_found_here_and_in_both_libraries() -> None:
    names = ["PatchAutoencoder", "AutoencoderKLWan", "UMT5EncoderModel"]
    packages = [find_class(name).__module__.split(".")[0] for name in names]
    assert packages == ["synthos", "diffusers", "transformers"]
    with pytest.raises(ValueError, match="'NoSuchModel'"):
        find_class("NoSuchModel")


def test_seeded_values_depend_on_seed_and_name_alone() -> None:
    def normal(generator: torch.Generator) -> torch.Tensor:
        return torch.randn(4, generator=generator)

    torch.manual_seed(1)
    first: Callable[[], torch.Tensor] = seeded(0, "proj.weight", normal)
    torch.manual_seed(2)
    assert torch.equal(first(), seeded(0, "proj.weight", normal)())
    assert not torch.equal(first(), seeded(0, "other.weight", normal)())
    assert not torch.equal(first(), seeded(1, "proj.weight", normal)())


def test_hub_parts_are_fixed_to_the_commit_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--lab--vae"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (snapshot / name).write_text("{}")
    (tmp_path / "local").mkdir()
    parts = {
        "vae": PartConfig("lab/vae"),
        "transformer": PartConfig("lab/absent"),
        "text": PartConfig(str(tmp_path / "local")),
    }
    fixed = pinned(ModelConfig("mine", parts)).parts
    assert fixed["vae"].revision == commit
    assert fixed["transformer"].revision is None and fixed["text"].revision is None
    assert find_folder("vae", fixed["vae"]) == snapshot


def test_what_a_gated_model_needs_is_said_where_there_is_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig("x", {"transformer": PartConfig("stabilityai/stable-diffusion-3.5-medium")})
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN_PATH", "/nowhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")
    assert "a gated model also needs `hf auth login`, there is no Hugging Face token here" in missing(config)[0]
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert "gated" not in missing(config)[0]


def test_an_index_that_lists_nothing_is_said_and_not_raised(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("[]")
    assert missing(ModelConfig("mine", {"vae": PartConfig(str(tmp_path))})) == [
        f"{index} has no weight_map from tensors to files"
    ]
