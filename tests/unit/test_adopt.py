"""Outside weights as a root: the same features, a licence to carry, and nothing executed."""

import dataclasses
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from dinov3 import hub
from dinov3.adopt import AdoptRequest, adopt_weights, main
from dinov3.errors import CheckpointError, ConfigError
from dinov3.evals.candidate import open_candidate
from dinov3.models.vit import ViTConfig, build_vit
from dinov3.recipe import load_recipe
from dinov3.release.record import Edge, canonical_json, file_sha256, read_record
from dinov3.stage import Stage, open_stage
from dinov3.train.distill import open_teacher
from dinov3.train.init_from import load_pair

ORIGIN = "https://example.org/weights, fetched 2026-11-21"
LICENCE = "LicenseRef-DINOv3"
FIELDS = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_registers": 3, "patch_size": 8}
PICTURES = torch.rand(2, 3, 48, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def network():
    """A small network, every parameter far from its initial value."""
    torch.manual_seed(0)
    model = build_vit(**FIELDS).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture
def published(tmp_path, network):
    """A file in the published layout and a config.json that describes it."""
    path = tmp_path / "outside_sat493m.pth"
    torch.save(network.state_dict(), path)
    config = {"model": {"arch": "vit", **dataclasses.asdict(network.config)}}
    (tmp_path / "arch.json").write_bytes(canonical_json(config))
    return path


def request(source, tmp_path, **changes):
    fields = {
        "source": source,
        "output": tmp_path / "data" / "outside",
        "origin": ORIGIN,
        "licence": LICENCE,
        "arch": str(tmp_path / "arch.json") if source.is_file() else None,
    }
    return AdoptRequest(**{**fields, **changes})


def adopt(source, tmp_path, **changes):
    return adopt_weights(request(source, tmp_path, **changes))


def same_features(one, other):
    with torch.no_grad():
        ours, theirs = one.forward_features(PICTURES), other.forward_features(PICTURES)
    for name in ("x_norm_clstoken", "x_storage_tokens", "x_norm_patchtokens"):
        assert torch.equal(ours[name], theirs[name])


@pytest.mark.parametrize("layout", ["plain", "teacher", "safetensors"])
def test_published_file_becomes_an_artifact_with_the_same_features(
    layout, published, network, tmp_path
):
    tensors = network.state_dict()
    if layout == "teacher":
        heads = {"dino_head.mlp.0.weight": torch.zeros(1)}
        inside = {f"backbone.{name}": one for name, one in tensors.items()}
        torch.save({"teacher": {**inside, **heads}}, published)
    if layout == "safetensors":
        published = published.with_suffix(".safetensors")
        save_file(tensors, published)
    same_features(hub.load(adopt(published, tmp_path)), network)


def test_released_name_says_the_architecture(tmp_path):
    path = tmp_path / "small.pth"
    torch.save(hub.dinov3_vits16(pretrained=False).state_dict(), path)
    found = hub.load(adopt(path, tmp_path, arch="dinov3_vits16"))
    assert found.config == hub.ARCHITECTURES["dinov3_vits16"]


def test_record_names_the_given_bytes_their_origin_and_licence(published, tmp_path):
    record = read_record(adopt(published, tmp_path) / "record.json")
    given = Edge("outside weights", published.name, file_sha256(published), None)
    assert record.inputs == (given,)
    assert dict(record.facts) == {"training_data": "unknown", "origin": ORIGIN}
    assert record.licences["out"] == (LICENCE,)
    assert record.stage == "outside_weights"


def test_record_and_config_hold_no_path(published, tmp_path):
    folder = adopt(published, tmp_path)
    for name in ("record.json", "config.json", "run.json"):
        assert str(tmp_path) not in (folder / name).read_text()


def test_whatever_is_made_from_it_says_so_too(published, tmp_path):
    folder = adopt(published, tmp_path)
    with open_stage("student", tmp_path / "data" / "student", config={}) as stage:
        stage.read("teacher", folder / "backbone.safetensors")
        stage.path("backbone.safetensors").write_bytes(
            (folder / "backbone.safetensors").read_bytes()
        )
    with open_stage("report", tmp_path / "data" / "report", config={}) as stage:
        stage.read("weights", tmp_path / "data" / "student" / "backbone.safetensors")
    record = read_record(tmp_path / "data" / "report" / "record.json")
    assert record.facts["training_data"] == "unknown"
    assert record.licences["out"] == (LICENCE,)


def test_it_starts_a_phase_teaches_students_and_is_judged(tmp_path):
    config = load_recipe("smoke_cpu", ["init=teacher"], phase="gram")
    network = hub.backbone_of(hub.backbone_config(config.model.model_dump()))
    torch.save(network.state_dict(), tmp_path / "outside.pth")
    described = {"model": config.model.model_dump(mode="json")}
    (tmp_path / "arch.json").write_bytes(canonical_json(described))
    folder = adopt(tmp_path / "outside.pth", tmp_path)

    stage = Stage("gram_checkpoint", tmp_path / "x", {})
    student, _ = load_pair(stage, folder, config)
    assert torch.equal(student.backbone.cls_token, network.cls_token)
    students = load_recipe("smoke_cpu", ["objective=features"], phase="distill")
    teacher = open_teacher(stage, folder, students)
    assert torch.equal(teacher.backbone.cls_token, network.cls_token)
    assert stage.contamination == "unknown"
    candidate = open_candidate(folder, None, torch.device("cpu"))
    assert candidate.mean == hub.IMAGENET_MEAN


def test_satellite_weights_keep_their_normalisation(published, tmp_path):
    candidate = open_candidate(adopt(published, tmp_path), None, torch.device("cpu"))
    assert candidate.mean == (0.430, 0.411, 0.296)


class Planted:
    """Runs a command when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_planted_code_would_run_where_pickles_are_trusted(tmp_path):
    pickle.loads(pickle.dumps(Planted(tmp_path / "ran"), protocol=2))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("where", ["file", "folder"])
def test_planted_code_does_not_run(where, old_format, published, saved, tmp_path):
    mark = tmp_path / "ran"
    source = published if where == "file" else saved
    path = source if where == "file" else saved / "pytorch_model.bin"
    (saved / "model.safetensors").unlink()
    content = {"cls_token": torch.zeros(1), "planted": Planted(mark)}
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(CheckpointError, match="not a readable file of weights"):
        adopt(source, tmp_path)
    assert not mark.exists()
    assert not (tmp_path / "data" / "outside").exists()


def test_bare_pickle_does_not_run(published, tmp_path):
    published.write_bytes(pickle.dumps(Planted(tmp_path / "ran"), protocol=2))
    with pytest.raises(CheckpointError, match="not a readable file of weights"):
        adopt(published, tmp_path)
    assert not (tmp_path / "ran").exists()


def theirs(**fields):
    """A model of the independent implementation, every parameter far from its initial value."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
    config = {**size, "intermediate_size": 64, "num_register_tokens": 3, **fields}
    model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**config)).eval()
    return far_from_initial(model)


def far_from_initial(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.fixture
def saved(tmp_path):
    theirs().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


KINDS = {
    "plain": {},
    "gated": {"use_gated_mlp": True, "hidden_act": "silu"},
    "with key bias": {"key_bias": True},
    "without biases": {
        "query_bias": False,
        "value_bias": False,
        "proj_bias": False,
        "mlp_bias": False,
    },
    "no registers, another base and epsilon": {
        "num_register_tokens": 0,
        "rope_theta": 50.0,
        "layer_norm_eps": 1e-6,
    },
}


def same_as(model, folder):
    backbone = hub.load(folder)
    with torch.no_grad():
        features = backbone.forward_features(PICTURES)
        expected = model(PICTURES).last_hidden_state
    parts = [features["x_norm_clstoken"][:, None], features["x_storage_tokens"]]
    found = torch.cat([*parts, features["x_norm_patchtokens"]], dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_hugging_face_directory_gives_the_same_features(kind, tmp_path):
    model = theirs(**KINDS[kind])
    model.save_pretrained(tmp_path / "saved")
    same_as(model, adopt(tmp_path / "saved", tmp_path))


def test_hugging_face_convnext_gives_the_same_features(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.DINOv3ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1])
    model = far_from_initial(transformers.DINOv3ConvNextModel(config).eval())
    model.save_pretrained(tmp_path / "saved")
    backbone = hub.load(adopt(tmp_path / "saved", tmp_path))
    pictures = PICTURES.repeat(1, 1, 2, 2)
    with torch.no_grad():
        features = backbone.forward_features(pictures)
        expected = model(pictures).last_hidden_state
    found = [features["x_norm_clstoken"][:, None], features["x_norm_patchtokens"]]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["parts", "pickle", "names in memory", "half"])
def test_every_way_to_save_it_is_read(layout, tmp_path):
    model, folder = theirs(), tmp_path / "saved"
    model.save_pretrained(folder, max_shard_size="20KB" if layout == "parts" else "1GB")
    whole = folder / "model.safetensors"
    if layout == "parts":
        assert len(list(folder.glob("model-*.safetensors"))) > 1
    elif layout == "pickle":
        torch.save(load_file(whole), folder / "pytorch_model.bin")
        whole.unlink()
    elif layout == "half":
        halves = {name: one.bfloat16() for name, one in model.state_dict().items()}
        save_file(halves, whole)
        model.load_state_dict(halves)
    else:
        assert set(load_file(whole)) != set(model.state_dict())  # files keep older names
        save_file(model.state_dict(), whole)
    same_as(model, adopt(folder, tmp_path))


def test_what_describes_the_weights_stands_in_the_record_too(saved, tmp_path):
    preprocessor = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (saved / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    folder = adopt(saved, tmp_path)
    record = read_record(folder / "record.json")
    (edge,) = record.inputs
    assert (edge.name, edge.sha256) == (
        "model.safetensors",
        file_sha256(saved / "model.safetensors"),
    )
    names = ("config.json", "preprocessor_config.json")
    assert record.config["described_by"] == {name: file_sha256(saved / name) for name in names}
    assert open_candidate(folder, None, torch.device("cpu")).mean == (0.5, 0.5, 0.5)


def edit(saved, **changes):
    path = saved / "config.json"
    content = {**json.loads(path.read_bytes()), **changes}
    kept = {name: value for name, value in content.items() if value is not ...}
    path.write_text(json.dumps(kept))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model_type": "dinov2"}, "model_type: not of DINOv3, got 'dinov2'"),
        ({"hidden_act": "relu"}, "hidden_act: our networks know 'gelu', got 'relu'"),
        ({"layer_norm_eps": 1e-4}, "layer_norm_eps: our networks know"),
        ({"value_bias": False}, "value_bias: our networks know True"),
        ({"hidden_size": ...}, "lacks the field 'hidden_size'"),
        ({"hidden_size": "wide"}, "a field is of the wrong kind"),
        ({"patch_size": [8, 4]}, "patch_size: patches must be squares"),
        ({"num_attention_heads": 3}, "embed_dim: must be a multiple of"),
    ],
)
def test_directory_that_describes_another_model_is_refused(changes, why, saved, tmp_path):
    edit(saved, **changes)
    with pytest.raises(ConfigError, match=why):
        adopt(saved, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 1},
        {"num_hidden_layers": 10**9},
        {"num_register_tokens": 2},
        {"hidden_size": 2**40},
    ],
)
def test_weights_that_are_not_those_described_are_refused(changes, saved, tmp_path):
    edit(saved, **changes)
    with pytest.raises(
        CheckpointError, match=r"is missing, got no|not the weights of this arch|has the sizes"
    ):
        adopt(saved, tmp_path)


def test_description_that_is_a_pipe_is_not_waited_for(saved, tmp_path):
    (saved / "config.json").unlink()
    os.mkfifo(saved / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: not readable, got not a regular"):
        adopt(saved, tmp_path)


def test_architecture_that_is_named_must_agree_with_the_directory(saved, tmp_path):
    described = {"arch": "vit", **FIELDS, "ffn_ratio": 2.0}
    (tmp_path / "arch.json").write_bytes(canonical_json({"model": described}))
    folder = adopt(saved, tmp_path, arch=str(tmp_path / "arch.json"))
    assert hub.load(folder).config == ViTConfig.from_fields({**FIELDS, "ffn_ratio": 2.0})
    described["num_heads"] = 4
    (tmp_path / "arch.json").write_bytes(canonical_json({"model": described}))
    with pytest.raises(ConfigError, match=r"arch\.json has num_heads 4, got 2"):
        adopt(saved, tmp_path, arch=str(tmp_path / "arch.json"))


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "", ".hidden"])
def test_index_that_leads_out_of_the_directory_is_refused(name, saved, tmp_path):
    (saved / "model.safetensors").unlink()
    index = {"weight_map": {"norm.weight": name}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not an index of files beside it"):
        adopt(saved, tmp_path)


def test_directory_without_weights_or_description_is_refused(saved, tmp_path):
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights in it"):
        adopt(saved, tmp_path)
    (saved / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: not readable"):
        adopt(saved, tmp_path)


@pytest.mark.parametrize("values", [None, [0.5, 0.5], [0.5, 0.5, "x"], 0.5])
def test_normalisation_of_another_form_is_refused(values, saved, tmp_path):
    content = {"image_mean": values, "image_std": [0.5, 0.5, 0.5]}
    (saved / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="image_mean: must be three numbers"):
        adopt(saved, tmp_path)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"arch": None}, "--arch: a file does not say its architecture"),
        ({"arch": "dinov3_vits15"}, "neither a config.json nor a name of the hub"),
        ({"origin": " "}, "--origin: must be one line"),
        ({"origin": "two\nlines"}, "--origin: must be one line"),
        ({"origin": "/home/me/file"}, "--origin: names a place on this machine"),
        ({"licence": ""}, "--licence: licence expression"),
        ({"licence": "MIT AND"}, "Write an SPDX expression"),
    ],
)
def test_request_that_says_too_little_is_refused(changes, why, published, tmp_path):
    with pytest.raises(ConfigError, match=why):
        adopt(published, tmp_path, **changes)
    assert not (tmp_path / "data" / "outside").exists()


def test_licence_without_a_rule_is_adopted_with_a_warning(published, tmp_path, capsys):
    folder = adopt(published, tmp_path, licence="Hippocratic-2.1")
    assert read_record(folder / "record.json").licences["out"] == ("Hippocratic-2.1",)
    assert "no rule for Hippocratic-2.1; releases below it" in capsys.readouterr().err


def test_common_name_of_a_licence_is_written_as_spdx_has_it(published, tmp_path):
    folder = adopt(published, tmp_path, licence="dinov3-license")
    assert read_record(folder / "record.json").licences["out"] == (LICENCE,)


def test_verb_says_what_is_not_known(published, tmp_path, capsys):
    output = tmp_path / "data" / "outside"
    options = ["--origin", ORIGIN, "--licence", LICENCE, "--output", str(output)]
    command = [str(published), "--arch", str(tmp_path / "arch.json"), *options]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{output}: outside weights, training data unknown\n"
    assert main([str(tmp_path / "absent.pth"), *command[1:]]) == 2
    assert "no such file of weights" in capsys.readouterr().err
    assert main(command[:3]) == 2
