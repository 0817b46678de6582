"""A phase starts from weights that exist: all of them, or it says which are not there."""

import pickle
from pathlib import Path

import pytest
import torch

from dinov3.checkpoint import save_tensors
from dinov3.errors import CheckpointError, DataError, LineageBroken
from dinov3.models.backbone import build_backbone
from dinov3.recipe import load_recipe
from dinov3.stage import Stage, open_stage
from dinov3.train.build import build_network, build_pair
from dinov3.train.init_from import load_gram_backbone, load_network, load_pair

PARTS = ("dino_head.", "ibot_head.")


def a_config(*overrides, phase="gram"):
    return load_recipe("smoke_cpu", list(overrides), phase=phase)


@pytest.fixture(scope="module")
def networks():
    """Student and EMA that differ, as after training."""
    config = a_config("seed=11")
    student, ema = build_pair(config.model.model_dump(), config.heads, config.seed)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01)
    return student, ema


def roles_of(networks):
    student, ema = networks
    return {"student": student.state_dict(), "teacher": ema.state_dict()}


def write_artifact(folder, networks, *, with_heads=True, change=None):
    """As a training stage leaves it; `change` edits the tensors of either file."""
    backbone, heads = {}, {}
    for role, tensors in roles_of(networks).items():
        for name, tensor in tensors.items():
            if name.startswith(PARTS):
                heads[f"{role}.{name}"] = tensor
            else:
                backbone[f"{role}.{name.removeprefix('backbone.')}"] = tensor
    if change is not None:
        change(backbone, heads)
    with open_stage("pretrained_checkpoint", folder, config={}) as stage:
        save_tensors(stage.path("backbone.safetensors"), backbone)
        if with_heads:
            save_tensors(stage.path("heads.safetensors"), heads)
    return folder


@pytest.fixture
def artifact(tmp_path, networks):
    return write_artifact(tmp_path / "artifact", networks)


@pytest.fixture
def stage(tmp_path):
    return Stage("gram_checkpoint", tmp_path / "output", {})


def assert_equal(network, expected):
    torch.testing.assert_close(network.state_dict(), dict(expected), rtol=0, atol=0)


def test_continue_takes_student_and_ema_as_they_are(stage, artifact, networks):
    student, ema = load_pair(stage, artifact, a_config("init=continue"))
    assert_equal(student, networks[0].state_dict())
    assert_equal(ema, networks[1].state_dict())
    assert {(edge.role, edge.name) for edge in stage.edges} == {
        ("init", "backbone.safetensors"),
        ("init heads", "heads.safetensors"),
    }


def test_teacher_starts_both_from_the_ema(stage, artifact, networks):
    student, ema = load_pair(stage, artifact, a_config("init=teacher"))
    assert_equal(student, networks[1].state_dict())
    assert_equal(ema, networks[1].state_dict())


def test_heads_that_are_not_there_are_drawn_from_the_seed_and_that_is_said(
    stage, tmp_path, networks, capfd
):
    folder = write_artifact(tmp_path / "bare", networks, with_heads=False)
    config = a_config("init=teacher", "seed=5")
    student, ema = load_pair(stage, folder, config)
    drawn, _ = build_pair(config.model.model_dump(), config.heads, 5)
    assert_equal(student.backbone, networks[1].backbone.state_dict())
    assert_equal(student.dino_head, drawn.dino_head.state_dict())
    assert_equal(ema, student.state_dict())
    expected = f"{folder} (teacher): no heads in it; they are drawn from the recipe's seed"
    assert expected in capfd.readouterr().err


def drop(name):
    return lambda backbone, heads: (backbone if name in backbone else heads).pop(name)


def add(name):
    return lambda backbone, heads: backbone.update({name: torch.zeros(1)})


def reshape(name):
    return lambda backbone, heads: backbone.update({name: torch.zeros(3)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("teacher.cls_token"), r"got missing: backbone\.cls_token; unexpected: none"),
        (drop("teacher.dino_head.last_layer.weight"), r"missing: dino_head\.last_layer\.weight"),
        (add("teacher.extra"), r"missing: none; unexpected: backbone\.extra; of another"),
        (
            reshape("teacher.norm.bias"),
            r"of another shape: backbone\.norm\.bias \(3,\) for \(32,\)",
        ),
        (
            drop("student.cls_token"),
            r"\(student\): not the network .* missing: backbone\.cls_token",
        ),
    ],
)
def test_names_and_shapes_that_differ_are_listed_and_refused(
    stage, tmp_path, networks, change, message
):
    folder = write_artifact(tmp_path / "odd", networks, change=change)
    with pytest.raises(CheckpointError, match=message):
        load_pair(stage, folder, a_config("init=continue"))


def spoil(name, value):
    def change(backbone, heads):
        tensors = backbone if name in backbone else heads
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[-1] = value

    return change


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "teacher.blocks.1.mlp.fc1.weight",
            "nan",
            r"got it in backbone\.blocks\.1\.mlp\.fc1\.weigh",
        ),
        (
            "teacher.dino_head.last_layer.weight",
            "-inf",
            r"it in dino_head\.last_layer\.weight\. St",
        ),
        (
            "student.cls_token",
            "inf",
            r"\(student\): NaN or infinity .* backbone\.cls_token\. Start",
        ),
    ],
)
def test_weights_that_are_not_finite_are_named_and_refused_before_the_first_step(
    stage, tmp_path, networks, name, value, message
):
    folder = write_artifact(tmp_path / "odd", networks, change=spoil(name, float(value)))
    with pytest.raises(CheckpointError, match=message):
        load_pair(stage, folder, a_config("init=continue"))


def test_a_gram_teacher_that_is_not_finite_is_refused(stage, tmp_path, networks):
    change = spoil("teacher.norm.weight", float("nan"))
    folder = write_artifact(tmp_path / "odd", networks, change=change)
    with pytest.raises(CheckpointError, match=r"NaN or infinity .* in norm\.weight\. Start"):
        load_gram_backbone(stage, folder, a_config())


def test_long_lists_of_differences_are_cut(stage, artifact):
    with pytest.raises(CheckpointError, match=r"of another shape: .* and \d+ more\. Use the rec"):
        load_pair(stage, artifact, a_config("model.embed_dim=64"))


def test_an_artifact_that_holds_the_teacher_alone_cannot_be_continued(stage, tmp_path, networks):
    def forget_student(*files):
        for tensors in files:
            for name in [one for one in tensors if one.startswith("student.")]:
                del tensors[name]

    folder = write_artifact(tmp_path / "alone", networks, change=forget_student)
    with pytest.raises(CheckpointError, match=r"\(student\): not the network of the recipe"):
        load_pair(stage, folder, a_config("init=continue"))
    load_pair(stage, folder, a_config("init=teacher"))


def test_bytes_that_are_not_those_of_the_record_are_refused(stage, artifact):
    path = artifact / "heads.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(LineageBroken, match="differ from the record"):
        load_pair(stage, artifact, a_config())


def test_a_folder_without_weights_is_refused(stage, tmp_path):
    with pytest.raises(DataError, match=r"backbone\.safetensors: missing"):
        load_pair(stage, tmp_path, a_config())


def published_backbone(networks):
    return {
        name.removeprefix("backbone."): tensor
        for name, tensor in networks[1].state_dict().items()
        if name.startswith("backbone.")
    }


def test_a_published_backbone_starts_both_networks(stage, tmp_path, networks, capfd):
    path = tmp_path / "vit.pth"
    torch.save(published_backbone(networks), path)
    config = a_config("init=teacher")
    student, ema = load_pair(stage, path, config)
    assert_equal(student.backbone, networks[1].backbone.state_dict())
    assert_equal(ema, student.state_dict())
    assert "no heads in it" in capfd.readouterr().err
    (edge,) = stage.edges
    assert (edge.role, edge.name, edge.record) == ("init", "vit.pth", None)


def test_a_published_training_checkpoint_brings_its_heads(stage, tmp_path, networks, capfd):
    path = tmp_path / "teacher_checkpoint.pth"
    torch.save({"teacher": networks[1].state_dict()}, path)
    student, ema = load_pair(stage, path, a_config("init=teacher"))
    assert_equal(student, networks[1].state_dict())
    assert_equal(ema, networks[1].state_dict())
    assert capfd.readouterr().err == ""


def test_a_published_file_has_no_student_to_continue(stage, tmp_path, networks):
    path = tmp_path / "vit.pth"
    torch.save(published_backbone(networks), path)
    with pytest.raises(CheckpointError, match=r"continue needs a student too.*Use teacher"):
        load_pair(stage, path, a_config("init=continue"))


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_a_published_file_fits_or_is_refused(stage, tmp_path, networks, change):
    tensors = published_backbone(networks)
    if change == "missing":
        del tensors["mask_token"]
    elif change == "unexpected":
        tensors["head.weight"] = torch.zeros(2)
    else:
        tensors["mask_token"] = torch.zeros(2)
    path = tmp_path / "vit.pth"
    torch.save(tensors, path)
    with pytest.raises(CheckpointError, match=r"not the network of the recipe.*(mask_token|head)"):
        load_pair(stage, path, a_config("init=teacher"))


class Malicious:
    """Writes a file where it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_malicious_file_is_refused_and_does_not_run(stage, tmp_path, networks, as_zip):
    path, target = tmp_path / "vit.pth", tmp_path / "ran"
    content = {**published_backbone(networks), "evil": Malicious(target)}
    if as_zip:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(CheckpointError, match="not a readable file of weights"):
        load_pair(stage, path, a_config("init=teacher"))
    with pytest.raises(CheckpointError, match="not a readable file of weights"):
        load_gram_backbone(stage, path, a_config())
    assert not target.exists()
    pickle.loads(pickle.dumps(Malicious(target)))  # it would have
    assert target.exists()


def test_a_gram_teacher_is_the_ema_of_an_artifact_without_its_heads(stage, tmp_path, networks):
    folder = write_artifact(tmp_path / "bare", networks, with_heads=False)
    backbone = load_gram_backbone(stage, folder, a_config())
    assert_equal(backbone, networks[1].backbone.state_dict())
    assert [edge.role for edge in stage.edges] == ["gram teacher"]


@pytest.mark.parametrize("with_heads", [True, False])
def test_a_gram_teacher_may_be_a_published_file(stage, tmp_path, networks, with_heads):
    path = tmp_path / "vit.pth"
    whole = {"teacher": networks[1].state_dict()}
    torch.save(whole if with_heads else published_backbone(networks), path)
    backbone = load_gram_backbone(stage, path, a_config())
    assert_equal(backbone, networks[1].backbone.state_dict())


def test_a_gram_teacher_of_another_shape_is_refused(stage, artifact):
    with pytest.raises(CheckpointError, match=r"not the network of the recipe.*of another shape"):
        load_gram_backbone(stage, artifact, a_config("model.embed_dim=64"))


def test_a_gram_teacher_to_be_copied_later_needs_no_source(stage):
    config = a_config("gram.teacher=ema@2")
    backbone = load_gram_backbone(stage, None, config)
    wanted = build_backbone(config.model.model_dump()).state_dict()
    assert backbone.state_dict().keys() == wanted.keys()
    assert stage.edges == ()


def a_network(config):
    return build_network(config.model.model_dump(), config.heads)


def test_a_frozen_teacher_is_the_ema_with_its_heads(stage, artifact, networks):
    teacher = a_network(a_config())
    load_network(stage, artifact, teacher, with_heads=True)
    assert_equal(teacher, networks[1].state_dict())


def test_a_frozen_teacher_without_heads_is_refused_where_they_are_wanted(
    stage, tmp_path, networks, capfd
):
    folder = write_artifact(tmp_path / "bare", networks, with_heads=False)
    teacher = a_network(a_config())
    with pytest.raises(CheckpointError, match=r"comes without heads.*Set objective=features"):
        load_network(stage, folder, teacher, with_heads=True)
    load_network(stage, folder, teacher, with_heads=False)
    assert_equal(teacher.backbone, networks[1].backbone.state_dict())
    assert capfd.readouterr().err == ""


def test_one_head_alone_is_refused(stage, tmp_path, networks):
    """All heads or none: half a teacher is no teacher."""

    def forget_ibot(backbone, heads):
        for name in [one for one in heads if ".ibot_head." in one]:
            del heads[name]

    folder = write_artifact(tmp_path / "half", networks, change=forget_ibot)
    with pytest.raises(CheckpointError, match=r"missing: ibot_head\."):
        load_pair(stage, folder, a_config("init=teacher"))
