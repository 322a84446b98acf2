"""`init_from`: one training in phases, each a run of its own, by the real command; and weights of another origin."""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import synthos
from launch.cli import main
from synthos.build import build_job, measure
from synthos.data.index import open_index
from synthos.data.shards import ShardPlace
from synthos.models.content import digest
from synthos.models.wan import original_name
from synthos.run import main as main_of_ranks
from synthos.schema import RunConfig
from synthos.strict import read_config
from synthos.train.memory import export_bytes
from synthos.train.stop import Stop
from tests.launch.conftest import write_shard
from tests.support import synthos as command
from tests.support import world_of_one

Capture = pytest.CaptureFixture[str]
DECOUPLED = "recipe.attention=decoupled"


class Laboratory:
    """A data set, a folder of runs, and the command line that is the same for all of them."""

    def __init__(self, home: Path) -> None:
        self.home = home
        write_shard(home / "00000.tar", {f"{key:04d}": "a plain colour" for key in range(24)})
        open_index(ShardPlace.beside(str(home / "00000.tar")))
        self.arguments = (
            *("recipe=i2i", "model=tiny", "cluster=debug", "cluster.device=cpu", "cluster.threads=1", "precision=fp32"),
            *(f"data.shards={home / '00000.tar'}", "data.holdout_fraction=0.2", "data.height=32", "data.width=32"),
            *("data.workers=0", "batch={size: 4, micro: 2}", "optim.steps=3", "optim.lr=1e-2", "validate.samples=2"),
            *("validate.every=null", "validate.from_split=0", "checkpoint.every=null", "wandb.mode=off"),
            *(f"runs_dir={home / 'runs'}", f"cache_dir={home / 'cache'}"),
        )

    def submit(self, *overrides: str) -> int:
        return main(["submit", *self.arguments, *overrides])

    def train(self, name: str, *overrides: str) -> Path:
        """Train a run to its end; returns its weights."""
        assert self.submit(f"name={name}", *overrides) == 0
        return self.weights(name)

    def weights(self, name: str) -> Path:
        (weights,) = self.run(name).glob("weights/*")
        return weights

    def run(self, name: str) -> Path:
        (folder,) = (self.home / "runs").glob(f"*/{name}-*")
        return folder


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    """Three phases: the projector, with shared keys and values; then with it image keys and values; then everything."""
    lab = Laboratory(tmp_path_factory.mktemp("lab"))
    first = lab.train("first")
    second = lab.train("second", DECOUPLED, "recipe.train=image_attention", f"init_from={first}")
    lab.train("third", DECOUPLED, "recipe.train=full", f"init_from={second}")
    return lab


def stored(weights: Path) -> dict[str, Tensor]:
    (file,) = (weights / "transformer").glob("*.safetensors")
    return load_file(file)


def start(lab: Laboratory, name: str, tmp_path: Path) -> dict[str, Tensor]:
    """Every tensor of a run's network as its ranks build it, before the first step."""
    config = read_config(RunConfig, lab.run(name) / "config.yaml")
    shutil.copytree(lab.run(name) / "requests", tmp_path / "requests")
    with contextmanager(world_of_one)() as world, Stop(tmp_path / "stop", world) as stop:
        job = build_job(config, tmp_path, world, stop, 1)
        tensors = {n: p.detach().full_tensor().clone() for n, p in job.recipe.network.named_parameters()}  # type: ignore[operator]
        job.stream.close()
        job.report.close({"status": "stopped", "cause": "test", "step": 0})
    return tensors


@pytest.mark.parametrize(("name", "before"), [("second", "first"), ("third", "second")])
def test_a_phase_starts_where_the_one_before_ended(lab: Laboratory, name: str, before: str, tmp_path: Path) -> None:
    given, fresh = stored(lab.weights(before)), start(lab, before, tmp_path / "before")
    tensors = start(lab, name, tmp_path / "now")
    assert given.keys() < tensors.keys()
    assert all(torch.equal(tensors[key], value) for key, value in given.items())
    assert not any(torch.equal(fresh[key], value) for key, value in given.items() if key.endswith("weight"))
    rest = (tensors.keys() & fresh.keys()) - given.keys()  # the base model, which has not learned yet
    assert rest and all(torch.equal(tensors[key], fresh[key]) for key in rest)


def test_the_loss_goes_on_where_it_was(lab: Laboratory) -> None:
    """Of the same network on the same grid: one phase's last validation and the next one's first."""

    def losses(name: str) -> list[float]:
        rows = [json.loads(line) for line in (lab.run(name) / "metrics.jsonl").open()]
        return [row["val/loss"] for row in rows if "val/loss" in row]

    assert losses("third")[0] == losses("second")[-1] != losses("second")[0]


def test_exports_hold_what_their_base_does_not(lab: Laboratory) -> None:
    names = {name: set(stored(lab.weights(name))) for name in ("first", "second", "third")}
    assert len(names["first"]) == 8 and names["first"] < names["second"] < names["third"]
    assert len(names["second"]) == 8 + 4 * 5
    abouts = {name: json.loads((lab.weights(name) / "synthos.json").read_text()) for name in names}
    assert [about["complete"] for about in abouts.values()] == [False, False, True]
    assert all(about["run"] == lab.run(name).name for name, about in abouts.items())


@pytest.mark.parametrize("name", ["first", "second", "third"])
def test_every_phase_generates_with_what_it_learned(lab: Laboratory, name: str) -> None:
    generator = synthos.load(lab.weights(name), dtype="fp32")
    network = dict(generator.recipe.network.named_parameters())
    assert all(torch.equal(network[key], value) for key, value in stored(lab.weights(name)).items())
    assert generator.generate("red", steps=1).size == (32, 32)


def test_the_whole_decoupled_export_is_diffusers_own(lab: Laboratory) -> None:
    from diffusers import WanTransformer3DModel

    theirs = WanTransformer3DModel.from_pretrained(lab.weights("third") / "transformer").eval()
    ours = synthos.load(lab.weights("third"), dtype="fp32").recipe.network
    assert theirs.config.added_kv_proj_dim == 128 and theirs.config.image_dim == 64
    inputs = (torch.ones(1, 16, 1, 4, 4), torch.tensor([500.0]), torch.ones(1, 512, 32), torch.ones(1, 17, 64))
    with torch.no_grad():
        pair = [network(*inputs, return_dict=False)[0] for network in (theirs, ours)]
    assert torch.equal(*pair)


def test_the_log_says_what_was_taken(lab: Laboratory) -> None:
    (log,) = lab.run("second").glob("attempts/0001/rank-00000.log")
    line = next(line for line in log.read_text().splitlines() if "init_from" in line)
    assert f"{lab.weights('first')}: took 8 of its 8 tensors" in line
    assert "condition_embedder.image_embedder.norm1.weight" in line


def test_the_projector_goes_out_and_in_under_its_original_names(
    lab: Laboratory, tmp_path: Path, capsys: Capture
) -> None:
    """Out of one run, into another by the release's names, among tensors of a model with other channels."""
    file = tmp_path / "out" / "connector.safetensors"
    assert main(["weights", "export", f"weights={lab.weights('second')}", f"out={file}"]) == 0
    ours, written = stored(lab.weights("second")), load_file(file)
    assert {original_name(name) for name in ours} == written.keys()
    assert all(torch.equal(written[original_name(name)], value) for name, value in ours.items())  # type: ignore[index]
    assert {name.split(".")[-2] for name in written} == {"0", "1", "3", "4", "k_img", "v_img", "norm_k_img"}
    folder = tmp_path / "release"
    folder.mkdir()
    other = {
        "patch_embedding.weight": torch.ones(128, 36, 1, 2, 2),
        "blocks.0.cross_attn.k.weight": torch.ones(128, 128),
    }
    save_file(written | other, folder / "diffusion_pytorch_model.safetensors")
    lab.train("warm", DECOUPLED, "recipe.train=projector", f"init_from={folder}")
    tensors = start(lab, "warm", tmp_path / "warm")
    assert all(torch.equal(tensors[key], value) for key, value in ours.items())
    learned, kept = stored(lab.weights("warm")), {k: v for k, v in ours.items() if "attn2" in k}
    assert learned.keys() == ours.keys()  # keys and values did not learn, but no base has them
    assert all(torch.equal(learned[key], value) for key, value in kept.items())
    assert not torch.equal(learned["condition_embedder.image_embedder.norm1.weight"],
                           ours["condition_embedder.image_embedder.norm1.weight"])  # fmt: skip
    generator = synthos.load(lab.weights("warm"), dtype="fp32")
    network = dict(generator.recipe.network.named_parameters())
    assert all(torch.equal(network[key], value) for key, value in learned.items())


@pytest.mark.long
def test_phases_on_two_ranks_end_as_on_one(lab: Laboratory) -> None:
    arguments = [a for a in lab.arguments if a != "cluster=debug"]
    others = ("name=pair", "cluster=local", "gpus_per_node=2", "batch.micro=1", "mesh=full")
    overrides = (DECOUPLED, "recipe.train=image_attention", f"init_from={lab.weights('first')}")
    done = command("submit", *arguments, *others, *overrides)
    assert done.returncode == 0, done.stderr
    one, two, before = (stored(lab.weights(name)) for name in ("second", "pair", "first"))
    assert one.keys() == two.keys()
    for key, value in one.items():
        learned = (value - before.get(key, torch.zeros_like(value))).norm()
        assert (two[key] - value).norm() < 1e-2 * learned, key  # Adam turns rounding of tiny gradients into steps


def test_what_did_not_learn_goes_out_as_it_came_in(lab: Laboratory) -> None:
    """The computation rounds to bfloat16; an export of a network that was not trained further does not."""
    before = stored(lab.weights("second"))
    options = ("recipe.train=projector", "precision=bf16", f"init_from={lab.weights('second')}")
    now = stored(lab.train("rounded", DECOUPLED, *options))
    kept = {name for name in before if "attn2" in name}
    assert now.keys() == before.keys() and len(kept) == 4 * 5
    assert all(torch.equal(now[name], before[name]) for name in kept)
    assert any(not torch.equal(before[name], before[name].bfloat16().float()) for name in kept)
    planned = export_bytes(measure(read_config(RunConfig, lab.run("rounded") / "config.yaml")))
    assert planned == sum(4 * value.numel() for value in now.values())


def test_an_export_knows_the_content_of_its_base(lab: Laboratory, tmp_path: Path, capsys: Capture) -> None:
    (tiny,) = (lab.home / "cache" / "tiny").glob("vae-*")
    vae = shutil.copytree(tiny, tmp_path / "vae")
    weights = lab.train("local", "optim.steps=1", f"+model.parts.vae.path={vae}")
    assert json.loads((weights / "synthos.json").read_text())["content"] == {"vae": digest(vae)}
    moved = f"+model.parts.vae.path={vae.rename(tmp_path / 'moved')}"
    assert lab.submit(moved, f"init_from={weights}", "dry_run=full") == 0
    config = tmp_path / "moved" / "config.json"
    config.write_text(config.read_text() + "\n")
    capsys.readouterr()
    assert "was trained with model.parts.vae's content" in refused(lab, capsys, moved, f"init_from={weights}")


def test_a_run_goes_on_only_from_the_weights_it_started_from(lab: Laboratory, tmp_path: Path) -> None:
    """What it adopted and does not train is in no checkpoint: it is read again by every attempt, and to generate."""
    copy = shutil.copytree(lab.weights("second"), tmp_path / "copy")
    lab.train("held", DECOUPLED, "recipe.train=projector", "optim.steps=1", f"init_from={copy}")
    run = lab.run("held")
    (checkpoint,) = run.glob("checkpoints/*")
    synthos.load(checkpoint)
    file = copy / "transformer" / "trained.safetensors"
    tensors = load_file(file)
    tensors["blocks.0.attn2.add_v_proj.weight"] += 1
    save_file(tensors, file)
    with pytest.raises(RuntimeError, match=f"^init_from: {copy} has content .*, the run started from {copy} with"):
        main_of_ranks(run, 2)
    with pytest.raises(ValueError, match=f"^weights: {checkpoint}: init_from: {copy} has content"):
        synthos.load(checkpoint)


def about_with(weights: Path, folder: Path, **changes: Any) -> Path:
    """A copy of exported weights whose synthos.json says something else."""
    copy = shutil.copytree(weights, folder)
    about = json.loads((copy / "synthos.json").read_text())
    (copy / "synthos.json").write_text(json.dumps(about | changes))
    return copy


def refused(lab: Laboratory, capsys: Capture, *overrides: str) -> str:
    """What a submission answers; nothing is written."""
    before = sorted((lab.home / "runs").rglob("*"))
    assert lab.submit("name=refused", *overrides) == 2
    shown = capsys.readouterr()
    assert sorted((lab.home / "runs").rglob("*")) == before and "Traceback" not in shown.err
    return shown.err.removeprefix("error: ").strip()


def test_weights_that_do_not_belong_to_the_run_are_refused(lab: Laboratory, tmp_path: Path, capsys: Capture) -> None:
    first, second, third = (lab.weights(name) for name in ("first", "second", "third"))
    image_attention = (DECOUPLED, "recipe.train=image_attention")
    message = refused(lab, capsys, "recipe.train=full", f"init_from={second}")
    assert f"init_from: {second} holds 20 tensors that this run's network has not" in message
    assert "attention decoupled there, shared_kv here" in message
    shared = about_with(lab.train("shared", "recipe.train=full"), tmp_path / "shared")
    message = refused(lab, capsys, *image_attention, f"init_from={shared}")
    assert "is a whole network and lacks 20 tensors of this run's" in message
    assert "attention shared_kv there, decoupled here" in message
    assert lab.submit("name=fits", DECOUPLED, f"init_from={third}", "dry_run=full") == 0
    capsys.readouterr()
    recipe = json.loads((first / "synthos.json").read_text())["recipe"] | {"name": "other"}
    message = refused(lab, capsys, f"init_from={about_with(first, tmp_path / 'recipe', recipe=recipe)}")
    assert "was trained by recipe other, this run is of recipe i2i" in message
    model = {"name": "tiny", "parts": {"vae": {"path": "lab/vae", "subfolder": None, "revision": None}}}
    message = refused(lab, capsys, f"init_from={about_with(first, tmp_path / 'model', model=model)}")
    assert "was trained with model.parts.vae.path lab/vae, this run has None" in message
    for changes, words in (({"cache_dir": None}, "cache_dir: None is not allowed"), ({"more": 1}, "more: unknown key")):
        path = about_with(first, tmp_path / words[:4], **changes)
        message = refused(lab, capsys, f"init_from={path}")
        assert message.startswith(f"init_from: {path / 'synthos.json'}: {words}") and "\n" not in message
    message = refused(lab, capsys, f"init_from={about_with(first, tmp_path / 'format', format=99)}")
    assert message.startswith("init_from: ") and "has format 99, this version reads 1" in message


def test_files_that_do_not_fit_are_refused(lab: Laboratory, tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "file.safetensors"
    save_file({"img_emb.proj.0.weight": torch.ones(64)}, file)
    assert "lacks 7 tensors of the projector, first 'img_emb.proj.0.bias'" in refused(lab, capsys, f"init_from={file}")
    tensors = {original_name(name): value for name, value in stored(lab.weights("first")).items()}
    save_file(tensors | {"img_emb.proj.1.weight": torch.ones(64, 3)}, file)  # type: ignore[arg-type]
    message = refused(lab, capsys, f"init_from={file}")
    assert message == f"init_from: {file}: img_emb.proj.1.weight has shape (64, 3), the model needs (64, 64)"
    file.write_bytes(b"none")
    assert f"init_from: {file} is no whole safetensors file" in refused(lab, capsys, f"init_from={file}")
    message = refused(lab, capsys, f"init_from={lab.run('first')}")
    assert "lacks" in message and "expected a folder like weights/step_00002000 of a run" in message
    message = refused(lab, capsys, "init_from=no/where")
    assert message.startswith("init_from: 'no/where' is no local file or folder and not in the hub cache")


@pytest.mark.parametrize("given", [False, True])
def test_a_projector_alone_cannot_learn_through_values_of_zero(lab: Laboratory, given: bool, capsys: Capture) -> None:
    start = [f"init_from={lab.weights('first')}"] if given else []  # which holds the projector only
    message = refused(lab, capsys, DECOUPLED, "recipe.train=projector", *start)
    assert message.startswith("recipe.train: projector is not allowed here with recipe.attention=decoupled")


def test_absent_weights_are_a_missing_line_of_the_plan(lab: Laboratory, capsys: Capture) -> None:
    assert lab.submit("init_from=no/where", "dry_run=true") == 0
    assert "\nmissing: init_from: 'no/where' is no local file" in capsys.readouterr().out


def test_an_unfinished_download_is_one_too(lab: Laboratory, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "1.safetensors"}}')
    assert lab.submit(f"init_from={tmp_path}", "dry_run=true") == 0
    assert f"\nmissing: init_from: {tmp_path} lacks 1.safetensors\n" in capsys.readouterr().out


def test_a_hub_id_is_frozen_as_its_snapshot(lab: Laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a later download brings is for later runs."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--lab--first" / "snapshots" / ("0123456789" * 4)
    shutil.copytree(lab.weights("first"), snapshot)
    (tmp_path / "models--lab--first" / "refs").mkdir()
    (tmp_path / "models--lab--first" / "refs" / "main").write_text(snapshot.name)
    lab.train("hub", "optim.steps=1", "init_from=lab/first")
    assert read_config(RunConfig, lab.run("hub") / "config.yaml").init_from == str(snapshot)


def test_a_path_is_taken_from_the_current_folder_and_content_is_the_identity(
    lab: Laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def folder(*overrides: str) -> str:
        assert lab.submit(*overrides, "dry_run=true") == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("run folder:"))

    copy = shutil.copytree(lab.weights("first"), tmp_path / "copy")
    there = folder(f"init_from={lab.weights('first')}")
    monkeypatch.chdir(tmp_path)
    assert folder("init_from=copy") == there != folder()
    tensors = stored(copy)
    tensors["condition_embedder.image_embedder.norm1.bias"] += 1
    save_file(tensors, copy / "transformer" / "trained.safetensors")
    assert folder("init_from=copy") != there
    file = copy / "transformer" / "trained.safetensors"
    shutil.copy(file, tmp_path / "other.safetensors")
    assert folder(f"init_from={file}") == folder("init_from=other.safetensors")


def test_export_says_what_is_wrong(lab: Laboratory, tmp_path: Path, capsys: Capture) -> None:
    for arguments, words in (
        (["weights=x"], "usage: synthos weights export"),
        ([f"weights={lab.weights('first')}", "out=x.bin"], "expected a file like projector.safetensors"),
        ([f"weights={tmp_path}", "out=x.safetensors"], "lacks synthos.json"),
        ([f"weights={about_with(lab.weights('first'), tmp_path / 'a', recipe=3)}", "out=x.safetensors"], "recipe: 3"),
    ):
        assert main(["weights", "export", *arguments]) == 2
        assert words in capsys.readouterr().err
    part = lab.weights("second") / "transformer"  # names the export as well
    assert main(["weights", "export", f"weights={part}", f"out={tmp_path / 'x.safetensors'}"]) == 0
    assert len(load_file(tmp_path / "x.safetensors")) == 8 + 4 * 5
