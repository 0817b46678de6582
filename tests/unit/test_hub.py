"""Local weights in, a checked backbone in eval mode out; nothing is downloaded."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms import v2

from dinov3 import hub
from dinov3.errors import CheckpointError, ConfigError
from dinov3.models.backbone import Backbone
from dinov3.models.convnext import ConvNeXt, ConvNeXtConfig
from dinov3.models.vit import VisionTransformer, ViTConfig

REPOSITORY = Path(__file__).parents[2]
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (4, 8, 12, 16), "layerscale": 0.5}
IMAGES = torch.linspace(-1, 1, 2 * 3 * 24 * 32).view(2, 3, 24, 32)


def tiny(seed: int = 0, **fields: object) -> VisionTransformer:
    return hub.random_init(ViTConfig.from_fields({**TINY, **fields}), seed)


def open_tiny(path: Path, **arguments: object) -> VisionTransformer:
    return hub.dinov3_vits16(weights=path, **{**TINY, **arguments})


def save(state: object, path: Path, **options: object) -> Path:
    torch.save(state, path, **options)
    return path


@pytest.fixture
def artifact(tmp_path):
    """A directory as training leaves it: EMA teacher and student in one file."""
    teacher, student = tiny(1), tiny(2)
    tensors = {
        f"{role}.{name}": value
        for role, model in (("teacher", teacher), ("student", student))
        for name, value in model.state_dict().items()
    }
    save_file(tensors, tmp_path / "backbone.safetensors")
    config = {"model": dataclasses.asdict(teacher.config), "data": {"source": "folder"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return tmp_path, teacher, student


def assert_same(one: Backbone, other: Backbone) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_load_gives_teacher_or_student_in_eval_mode(artifact):
    directory, teacher, student = artifact
    assert_same(hub.load(directory), teacher)
    assert_same(hub.load(str(directory), role="student"), student)
    assert not hub.load(directory).training


def test_loaded_weights_do_not_depend_on_the_file_any_more(artifact):
    directory, teacher, _ = artifact
    model = hub.load(directory)
    path = directory / "backbone.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    assert_same(model, teacher)
    assert all(parameter.requires_grad for parameter in model.parameters())


def convnext_folder(folder: Path) -> tuple[Path, ConvNeXt]:
    model = hub.random_init(ConvNeXtConfig(**CONVNEXT), 1)
    save_file(
        {f"teacher.{name}": value.clone() for name, value in model.state_dict().items()},
        folder / "backbone.safetensors",
    )
    config = {"model": {"arch": "convnext", **dataclasses.asdict(model.config)}}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder, model


def test_load_and_random_init_open_a_convnext(tmp_path):
    folder, model = convnext_folder(tmp_path)
    opened = hub.load(folder)
    assert isinstance(opened, ConvNeXt)
    assert not opened.training
    assert_same(opened, model)
    assert opened.norms[3] is opened.norm
    assert_same(hub.random_init(folder, 1), model)
    assert not torch.equal(
        hub.random_init(folder, 2).stages[0][0].dwconv.weight, model.stages[0][0].dwconv.weight
    )


def test_load_takes_configs_that_name_the_family_of_a_vit(artifact):
    directory, teacher, _ = artifact
    config = {"model": {"arch": "vit", **dataclasses.asdict(teacher.config)}}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert_same(hub.load(directory), teacher)


def test_a_convnext_file_loads_as_its_own_size_alone(tmp_path):
    model = hub.random_init("dinov3_convnext_tiny", 0)
    path = save(model.state_dict(), tmp_path / "w.pth")
    assert_same(hub.load_backbone(path, "dinov3_convnext_tiny"), model)
    assert_same(hub.dinov3_convnext_tiny(weights=path, patch_size=16), model)
    with pytest.raises(CheckpointError, match=r"missing: stages\.2\.9\.gamma"):
        hub.dinov3_convnext_small(weights=path)
    with pytest.raises(CheckpointError, match=r"missing: cls_token"):
        hub.load_backbone(path, "dinov3_vits16")


def test_load_without_weights_names_the_file(artifact):
    directory, *_ = artifact
    (directory / "backbone.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"backbone\.safetensors: no such file of weights"):
        hub.load(directory)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        pytest.param("[" * 100_000, id="deep"),
        "[]",
        "{}",
        '{"model": 3}',
        '{"model": {"embed_dim": "a"}}',
    ],
)
def test_load_refuses_a_broken_config(artifact, text):
    directory, *_ = artifact
    (directory / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json: not the config of a backbone"):
        hub.load(directory)


def test_load_waits_for_no_pipe(artifact):
    directory, *_ = artifact
    (directory / "config.json").unlink()
    os.mkfifo(directory / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: .*not a regular file"):
        hub.load(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 10**9}, "of fewer tensors than layers, got [0-9]+ for 1000000000"),
        ({"embed_dim": 2**40}, "no network has the sizes of its config, got 'Storage size"),
        ({"ffn_ratio": 1e308}, "no network has the sizes of its config"),
    ],
)
def test_load_refuses_sizes_that_no_machine_holds(artifact, changes, message):
    directory, *_ = artifact
    path = directory / "config.json"
    model = json.loads(path.read_text())["model"]
    path.write_text(json.dumps({"model": {**model, **changes}}))
    with pytest.raises(CheckpointError, match=message):
        hub.load(directory)


def test_load_refuses_an_unknown_role(artifact):
    with pytest.raises(CheckpointError, match="no tensor of the gram in it"):
        hub.load(artifact[0], role="gram")


def test_load_lists_missing_and_unexpected_tensors(artifact):
    directory, teacher, _ = artifact
    tensors = {f"teacher.{name}": value for name, value in teacher.state_dict().items()}
    tensors["teacher.extra"] = tensors.pop("teacher.mask_token")
    save_file(tensors, directory / "backbone.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: mask_token; unexpected: extra"):
        hub.load(directory)


def test_load_backbone_needs_only_a_path_and_a_name(tmp_path):
    model = hub.random_init("dinov3_vits16", 0)
    path = save(model.state_dict(), tmp_path / "w.pth")
    assert_same(hub.load_backbone(path, "dinov3_vits16"), model)
    with pytest.raises(ConfigError, match="arch: no such architecture, got 'vit_tiny'"):
        hub.load_backbone(path, "vit_tiny")


def test_pretrained_without_a_file_says_where_weights_come_from():
    with pytest.raises(
        CheckpointError, match=r"Meta's form .* weights=PATH, or pass pretrained=False"
    ):
        hub.dinov3_vitb16()


@pytest.mark.parametrize("weights", ["https://example.org/w.pth", Path("http://example.org/w.pth")])
def test_addresses_are_refused(weights):
    with pytest.raises(CheckpointError, match="nothing is ever downloaded, got http"):
        hub.dinov3_vitb16(weights=weights)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone\.pth: no such file of weights"):
        hub.dinov3_vits16(weights=tmp_path / "gone.pth")


def test_the_satellite_hash_selects_the_satellite_variant(tmp_path):
    fields = {**TINY, "untie_global_and_local_cls_norm": True}
    name = "dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth"
    path = save(tiny(**fields).state_dict(), tmp_path / name)
    model = hub.dinov3_vitl16(weights=path, **TINY)
    assert model.config.untie_global_and_local_cls_norm


@pytest.mark.parametrize("build", [hub.dinov3_vits16, hub.dinov3_convnext_tiny])
def test_satellite_weights_of_other_sizes_are_refused(build):
    with pytest.raises(ConfigError, match="SAT493M is published for"):
        build(weights=hub.Weights.SAT493M)


def test_an_unknown_override_names_the_nearest():
    for build in (hub.dinov3_vits16, hub.dinov3_convnext_tiny):
        with pytest.raises(ConfigError, match=r"drop_pat: no such .* Did you mean drop_path\?"):
            build(pretrained=False, drop_pat=0.1)


def test_a_file_with_pretrained_false_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="a file is given with pretrained=False"):
        hub.dinov3_vits16(pretrained=False, weights=tmp_path / "w.pth")


def test_a_hub_model_gives_the_same_output_twice():
    model = hub.dinov3_vits16(pretrained=False, **TINY)
    assert not model.training
    assert torch.equal(model(IMAGES), model(IMAGES))


def test_random_init_depends_on_the_seed_alone(artifact):
    directory, teacher, _ = artifact
    before = torch.get_rng_state()
    assert_same(hub.random_init(directory, 7), hub.random_init(teacher.config, 7))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(tiny(7).cls_token, tiny(8).cls_token)


def gradient_picture(mode: str = "RGB", size: tuple[int, int] = (90, 60)) -> Image.Image:
    channels = [Image.linear_gradient("L").rotate(90 * turn).resize(size) for turn in range(3)]
    return Image.merge("RGB", channels).convert(mode)


def test_transform_equals_the_evaluation_protocol():
    expected = v2.Compose(
        [
            v2.ToImage(),
            v2.Resize(64, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(56),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )(gradient_picture())
    assert torch.equal(hub.transform(56)(gradient_picture()), torch.as_tensor(expected))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1", "I;16"])
def test_transform_takes_pictures_of_every_mode(mode):
    source = gradient_picture("L" if mode == "I;16" else "RGB")
    result = hub.transform(32, resize=40)(source.convert(mode))
    assert result.shape == (3, 32, 32)
    assert result.dtype == torch.float32
    assert result.isfinite().all()


def test_sixteen_bit_pictures_keep_their_range():
    picture = Image.new("I;16", (8, 8), 0x8000)
    half = Image.new("RGB", (8, 8), (128, 128, 128))
    assert torch.equal(hub.transform(8)(picture), hub.transform(8)(half))


@pytest.mark.parametrize(("background", "value"), [("white", 255), ("#404040", 0x40)])
def test_transparency_shows_the_background(background, value):
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    opaque = Image.new("RGB", (8, 8), (value,) * 3)
    result = hub.transform(8, background=background)(clear)
    assert torch.equal(result, hub.transform(8)(opaque))


def test_rotation_tags_are_applied():
    picture = gradient_picture()
    picture.getexif()[0x0112] = 6
    turned = gradient_picture().transpose(Image.Transpose.ROTATE_270)
    assert torch.equal(hub.transform(32)(picture), hub.transform(32)(turned))


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (1, 1)])
def test_a_line_of_pixels_is_not_enlarged_whole(size):
    assert hub.transform(256)(Image.new("RGB", size)).shape == (3, 256, 256)


@pytest.mark.parametrize("size", [0, -16, 224.0, "224", True, 10**6])
def test_silly_sizes_are_refused(size):
    with pytest.raises(ConfigError, match="size: not a whole number from 1 to 8192"):
        hub.transform(size)


def test_a_resize_below_the_cut_is_refused():
    with pytest.raises(ConfigError, match="resize: not a whole number from 224 to 8192, got 200"):
        hub.transform(224, resize=200)


def test_an_unknown_background_is_refused():
    with pytest.raises(ConfigError, match="background: not a colour, got 'see-through'"):
        hub.transform(224, background="see-through")


def run_python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return done.stdout


def test_hubconf_imports_nothing_but_model_code():
    loaded = set(run_python("import hubconf, sys; print(*sys.modules)").split())
    unwanted = {"dagster", "polars", "great_expectations", "sklearn", "matplotlib", "torchvision"}
    packages = {"train", "evals", "data", "curation", "losses", "heads", "release", "config"}
    assert not loaded & (unwanted | {f"dinov3.{name}" for name in packages})
    assert "dinov3.models.vit" in loaded


@pytest.mark.parametrize("name", hub.ARCHITECTURES)
def test_torch_hub_finds_every_builder(name):
    model = torch.hub.load(str(REPOSITORY), name, source="local", pretrained=False, device="meta")
    assert model.config == hub.ARCHITECTURES[name]
