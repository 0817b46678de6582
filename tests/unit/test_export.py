"""Exported weights are those of the artifact or the state, in names that every reader knows."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dinov3 import hub
from dinov3.cli import run
from dinov3.errors import CheckpointError, ConfigError, LineageBroken
from dinov3.export import ExportRequest, export_weights
from dinov3.models.backbone import build_backbone
from dinov3.recipe import load_recipe
from dinov3.release.atomic import atomic_write
from dinov3.release.record import canonical_json, file_sha256
from dinov3.stage import Stage, open_stage
from dinov3.state import StateWriter
from dinov3.train.build import build_pair
from dinov3.train.distill import open_teacher
from dinov3.train.frame import export_networks
from dinov3.train.init_from import load_pair
from tests.saved_states import flip_a_bit, names_in, same

ROLES = ("teacher", "student")


def recipe_of(*overrides, phase="pretrain"):
    return load_recipe("smoke_cpu", overrides, phase=phase)


def networks(config=None):
    """A student and an EMA that differ, as those of a trained model do."""
    config = config or recipe_of()
    student, _ = build_pair(config.model.model_dump(), config.heads, 1)
    ema, _ = build_pair(config.model.model_dump(), config.heads, 2)
    return {"student": student.state_dict(), "teacher": ema.state_dict()}


def write_state(folder, tensors, *, learners=("",), step=3):
    facts = {"method": {"learners": {name: {} for name in learners}}}
    with StateWriter(folder, keep=1) as writer:
        writer.save(step, tensors, facts, wait=True)
    return folder / f"step_{step:09d}"


def state_tensors(weights, name=""):
    prefix = f"{name}." if name else ""
    kept = {"student": "student", "teacher": "ema"}
    return {
        f"{prefix}{kept[role]}.{key}": tensor
        for role, tensors in weights.items()
        for key, tensor in tensors.items()
    }


@pytest.fixture(scope="module")
def weights():
    return networks()


@pytest.fixture
def artifact(tmp_path, weights):
    """As a training stage leaves it."""
    state = write_state(tmp_path / "run", state_tensors(weights))
    with open_stage("model", tmp_path / "model", config={}) as stage:
        export_networks(stage, state)
        config = recipe_of().model_dump(mode="json", exclude={"run"})
        atomic_write(stage.path("config.json"), canonical_json(config))
    return tmp_path / "model"


def start_from(source: Path, init="teacher"):
    config = recipe_of(f"init={init}", "seed=7")
    return load_pair(Stage("test", source, {}), source, config)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("role", ROLES)
def test_a_phase_starts_from_an_export_as_from_the_artifact(
    tmp_path, artifact, weights, ending, role
):
    target = tmp_path / f"w.{ending}"
    assert run(["export", str(artifact), "--to", str(target), "--role", role]) == 0
    for network in start_from(target):
        assert same(network.state_dict(), weights[role])


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_an_exported_backbone_has_the_names_of_released_files(tmp_path, artifact, weights, ending):
    target = tmp_path / f"w.{ending}"
    export_weights(ExportRequest(artifact, target, with_heads=False))
    content = load_file(target) if ending == "safetensors" else torch.load(target)["teacher"]
    backbone = {
        name.removeprefix("backbone."): value
        for name, value in weights["teacher"].items()
        if name.startswith("backbone.")
    }
    assert same(content, backbone)
    student, ema = start_from(target)
    assert same(student.backbone.state_dict(), backbone)
    assert same(ema.backbone.state_dict(), backbone)


def test_the_config_beside_opens_the_model(tmp_path, artifact, weights):
    target = tmp_path / "out" / "w.safetensors"
    assert export_weights(ExportRequest(artifact, target, with_heads=False)) == [
        target,
        tmp_path / "out" / "config.json",
    ]
    config = json.loads((target.parent / "config.json").read_bytes())
    record = file_sha256(artifact / "record.json")
    assert config.pop("exported") == {"role": "teacher", "record": record}
    assert config.keys() == {"model", "heads", "crops"}
    opened = build_backbone(config["model"])
    opened.load_state_dict(load_file(target))
    expected = hub.load(artifact).state_dict()
    assert same(opened.state_dict(), expected)


@pytest.mark.parametrize("role", ROLES)
def test_a_state_is_exported_as_the_artifact_made_from_it(tmp_path, weights, role):
    run_folder = tmp_path / "run"
    state = write_state(run_folder, state_tensors(weights))
    atomic_write(run_folder / "job.json", canonical_json({"config": recipe_of().model_dump()}))
    target = tmp_path / "w.safetensors"
    export_weights(ExportRequest(state, target, role=role))
    assert same(load_file(target), weights[role])
    config = json.loads((tmp_path / "config.json").read_bytes())
    assert config["model"] == recipe_of().model.model_dump(mode="json")


def test_one_of_several_students_is_exported_by_name(tmp_path):
    recipe = recipe_of(phase="distill")
    of_each = {name: networks(student) for name, student in recipe.students.items()}
    tensors = {k: v for name, one in of_each.items() for k, v in state_tensors(one, name).items()}
    state = write_state(tmp_path / "run", tensors, learners=tuple(of_each))
    job = {"config": recipe.model_dump(mode="json")}
    atomic_write(tmp_path / "run" / "job.json", canonical_json(job))
    target = tmp_path / "w.safetensors"
    arguments = ["export", str(state), "--to", str(target), "--student", "convnext"]
    assert run(arguments) == 0
    assert same(load_file(target), of_each["convnext"]["teacher"])
    config = json.loads((tmp_path / "config.json").read_bytes())
    assert config["model"]["arch"] == "convnext"
    assert config["exported"] == {"role": "teacher", "student": "convnext", "step": 3}
    assert config["crops"]["global_size"] == 128
    with pytest.raises(ConfigError, match=r"got 'vitl'\. Use one of: convnext, vits"):
        export_weights(ExportRequest(state, target, student="vitl", force=True))


def test_a_finished_state_finds_its_config_in_the_record(tmp_path, weights):
    state = write_state(tmp_path / "finished", state_tensors(weights))
    with open_stage("model", tmp_path / "model", config=recipe_of().model_dump(mode="json")):
        pass
    (tmp_path / "model" / "record.json").rename(tmp_path / "finished" / "record.json")
    export_weights(ExportRequest(state, tmp_path / "w.safetensors"))
    config = json.loads((tmp_path / "config.json").read_bytes())
    assert config["model"]["embed_dim"] == 32


def test_a_state_far_from_its_run_goes_to_pth_alone(tmp_path, weights):
    state = write_state(tmp_path / "far" / "away", state_tensors(weights))
    with pytest.raises(CheckpointError, match=r"no job\.json of its run"):
        export_weights(ExportRequest(state, tmp_path / "w.safetensors"))
    assert not (tmp_path / "w.safetensors").exists()
    export_weights(ExportRequest(state, tmp_path / "w.pth"))
    assert same(torch.load(tmp_path / "w.pth")["teacher"], weights["teacher"])


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors", "config.json"])
def test_nothing_is_overwritten_without_force(tmp_path, artifact, capsys, name):
    ending = "pth" if name == "w.pth" else "safetensors"
    (tmp_path / name).write_text("mine")
    arguments = ["export", str(artifact), "--to", str(tmp_path / f"w.{ending}")]
    assert run(arguments) == 2
    assert f"{name}: is there already" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "mine"
    assert run([*arguments, "--force"]) == 0
    assert (tmp_path / name).read_bytes() != b"mine"


def test_an_artifacts_own_folder_stays_as_its_record_says(artifact, tmp_path):
    before = {path: file_sha256(path) for path in artifact.iterdir()}
    with pytest.raises(CheckpointError, match=r"model is vouched for by its record\.json"):
        export_weights(ExportRequest(artifact, artifact / "w.safetensors", force=True))
    state = tmp_path / "run" / "step_000000003"
    with pytest.raises(CheckpointError, match=r"is vouched for by its state\.json"):
        export_weights(ExportRequest(state, state / "w.pth"))
    assert {path: file_sha256(path) for path in artifact.iterdir()} == before


def test_an_artifact_whose_bytes_changed_is_not_exported(tmp_path, artifact):
    flip_a_bit(artifact / "backbone.safetensors")
    with pytest.raises(LineageBroken, match="its bytes differ from the record"):
        export_weights(ExportRequest(artifact, tmp_path / "w.pth"))


@pytest.mark.parametrize(("name", "kind"), [("w.bin", None), ("w", None), ("w.pth", "safetensors")])
def test_the_ending_must_be_that_of_the_format(tmp_path, artifact, name, kind):
    with pytest.raises(ConfigError, match=r"--to: must end with \.safetensors or \.pth"):
        export_weights(ExportRequest(artifact, tmp_path / name, kind=kind))


def test_a_failed_write_leaves_the_old_file_and_no_rest(tmp_path, artifact):
    old = tmp_path / "out"
    old.mkdir()
    target = old / "w.pth"
    export_weights(ExportRequest(artifact, target))
    sha256, before = file_sha256(target), names_in(old)
    os.truncate(artifact / "heads.safetensors", 100)
    with pytest.raises(LineageBroken, match="differ from the record"):
        export_weights(ExportRequest(artifact, target, force=True))
    assert (file_sha256(target), names_in(old)) == (sha256, before)


def test_a_target_that_cannot_be_written_is_named(tmp_path, artifact):
    (tmp_path / "w.pth").mkdir()
    with pytest.raises(CheckpointError, match=r"w\.pth: cannot be written"):
        export_weights(ExportRequest(artifact, tmp_path / "w.pth", force=True))
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]


def test_a_folder_that_is_neither_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"neither an artifact with backbone\.safetensors"):
        export_weights(ExportRequest(tmp_path, tmp_path / "w.pth"))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file as released training checkpoints come, heads beside the backbone."""
    folder = tmp_path_factory.mktemp("published")
    model = hub.random_init("dinov3_vits16", 3)
    tensors = {f"ema.backbone.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors["ema.dino_head.last_layer.weight"] = torch.ones(2, 2)
    path = folder / "w.pth"
    export_weights(ExportRequest(write_state(folder / "run", tensors), path))
    return path, model


def test_the_published_layout_opens_as_a_known_architecture(published):
    """The hub drops the heads of a training checkpoint by itself."""
    path, model = published
    assert "dino_head.last_layer.weight" in torch.load(path, mmap=True)["teacher"]
    opened = hub.load_backbone(path, "dinov3_vits16")
    assert same(opened.state_dict(), model.state_dict())


def test_a_published_file_teaches_by_its_features(tmp_path, published):
    path, model = published
    config = recipe_of("objective=features", phase="distill")
    stage = Stage("test", tmp_path, {})
    teacher = open_teacher(stage, path, config, "dinov3_vits16")
    assert same(teacher.backbone.state_dict(), model.state_dict())
    assert teacher.backbone.stride == 16
    assert not any(tensor.is_meta for tensor in teacher.state_dict().values())
    (edge,) = stage.edges
    assert (edge.role, edge.name, edge.record) == ("teacher", path.name, None)
    assert edge.sha256 == file_sha256(path)


def test_a_published_file_has_no_heads_to_teach_with(tmp_path, published):
    path, _ = published
    config = recipe_of(phase="distill")
    with pytest.raises(ConfigError, match=r"comes without heads, got heads\. Set objective="):
        open_teacher(Stage("test", tmp_path, {}), path, config, "dinov3_vits16")


def test_file_and_architecture_belong_together(tmp_path, published, artifact):
    path, _ = published
    config = recipe_of("objective=features", phase="distill")
    stage = Stage("test", tmp_path, {})
    for source, arch in ((path, None), (artifact, "dinov3_vits16")):
        with pytest.raises(ConfigError, match="--teacher-arch: goes with a file of weights"):
            open_teacher(stage, source, config, arch)
    with pytest.raises(ConfigError, match="arch: no such architecture, got 'vits'"):
        open_teacher(stage, path, config, "vits")
    with pytest.raises(CheckpointError, match=r"gone\.pth: no such file of weights"):
        open_teacher(stage, tmp_path / "gone.pth", config, "dinov3_vits16")
