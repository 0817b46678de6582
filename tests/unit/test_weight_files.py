"""Files of weights are data alone, and fit the model exactly or are refused."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dinov3 import hub
from dinov3.errors import CheckpointError
from dinov3.models.convnext import build_convnext
from dinov3.models.vit import VisionTransformer, ViTConfig
from dinov3.weight_files import fill, read_tensors

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}


def tiny(seed: int = 0, **fields: object) -> VisionTransformer:
    return hub.random_init(ViTConfig.from_fields({**TINY, **fields}), seed)


def open_tiny(path: Path, **arguments: object) -> VisionTransformer:
    return hub.dinov3_vits16(weights=path, **{**TINY, **arguments})


def save(state: object, path: Path, **options: object) -> Path:
    torch.save(state, path, **options)
    return path


def assert_same(one: VisionTransformer, other: VisionTransformer) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused(tmp_path, value, dtype):
    state = {name: tensor.to(dtype) for name, tensor in tiny().state_dict().items()}
    state["blocks.1.attn.qkv.weight"][3, 5] = value
    path = save(state, tmp_path / "weights.pth")
    message = r"weights\.pth: NaN or infinity among the weights, got it in blocks\.1\.attn\.qkv"
    with pytest.raises(CheckpointError, match=message):
        open_tiny(path)
    assert open_tiny(path, device="meta").cls_token.is_meta


def test_weights_too_large_for_the_asked_dtype_are_refused(tmp_path):
    state = tiny().state_dict()
    state["cls_token"][0, 0, 0] = 1e6
    path = save(state, tmp_path / "weights.pth")
    assert open_tiny(path).cls_token.max() == 1e6
    with pytest.raises(CheckpointError, match=r"NaN or infinity among the weights.*cls_token"):
        open_tiny(path, dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_numbers_that_are_no_weights_are_refused(tmp_path, dtype):
    state = tiny().state_dict()
    state["blocks.1.attn.qkv.weight"] = state["blocks.1.attn.qkv.weight"].to(dtype)
    path = save(state, tmp_path / "weights.pth")
    message = rf"without their scale: blocks\.1\.attn\.qkv\.weight {dtype}"
    with pytest.raises(CheckpointError, match=message):
        open_tiny(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sparse", torch.eye(3).to_sparse()),
        ("without data", torch.empty(3, device="meta")),
        ("one number spread over a terabyte", torch.zeros(1).expand(2**38)),
        (1, torch.zeros(3)),
    ],
)
@pytest.mark.filterwarnings("ignore:.*sparse tensor invariants")
def test_what_no_model_holds_is_refused(tmp_path, name, value):
    path = save({"backbone.norm.weight": torch.zeros(3), name: value}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=f"not a state dict of tensors, got .*{name}"):
        read_tensors(path)


def test_a_name_of_a_tensor_steers_no_terminal(tmp_path):
    path = save({**tiny().state_dict(), "\x1b[2J": torch.zeros(1)}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"unexpected: '\\x1b\[2J'"):
        open_tiny(path)


def test_a_key_mask_that_was_never_filled_does_not_hinder_loading(tmp_path):
    state = tiny(mask_k_bias=True).state_dict()
    state["blocks.0.attn.qkv.bias_mask"].fill_(torch.nan)
    model = open_tiny(save(state, tmp_path / "weights.pth"), mask_k_bias=True)
    assert model.state_dict()["blocks.0.attn.qkv.bias_mask"].isnan().all()


def test_two_values_of_one_parameter_are_refused(tmp_path):
    shape = {"depths": [1, 1, 1, 1], "dims": [4, 8, 12, 16]}
    state = {**build_convnext(**shape).state_dict(), "norms.3.bias": torch.ones(16)}
    path = save(state, tmp_path / "w.pth")
    model = build_convnext(**shape, device="meta")
    message = r"w\.pth: one parameter with two values, got norm\.bias unlike norms\.3\.bias"
    with pytest.raises(CheckpointError, match=message):
        fill(model, read_tensors(path), path, device=None)


@pytest.mark.parametrize("layout", ["plain", "teacher", "legacy"])
def test_pth_files_of_every_layout_load(tmp_path, layout):
    model = tiny(3)
    state = dict(model.state_dict())
    if layout == "teacher":
        heads = {
            "dino_head.last_layer.weight": torch.zeros(2),
            "ibot_head.mlp.0.bias": torch.ones(1),
        }
        state = {"teacher": {**{f"backbone.{key}": each for key, each in state.items()}, **heads}}
    path = save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=layout != "legacy")
    assert_same(open_tiny(path), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_safetensors_load_as_float32(tmp_path, dtype):
    half = {name: value.to(dtype) for name, value in tiny(4).state_dict().items()}
    save_file(half, tmp_path / "w.safetensors")
    model = open_tiny(tmp_path / "w.safetensors")
    torch.testing.assert_close(model.cls_token.detach(), half["cls_token"].float(), rtol=0, atol=0)
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


def test_dtype_can_be_chosen(tmp_path):
    path = save(tiny().state_dict(), tmp_path / "w.pth")
    model = open_tiny(path, dtype=torch.bfloat16)
    assert model.cls_token.dtype == torch.bfloat16
    assert model.rope_embed.periods.dtype == torch.float32


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_damaged_files_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x93not weights")
    with pytest.raises(CheckpointError, match="not a readable file of weights"):
        open_tiny(tmp_path / name)


def test_a_truncated_file_is_refused(tmp_path):
    path = save(tiny().state_dict(), tmp_path / "w.pth")
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match="not a readable file of weights"):
        open_tiny(path)


def test_pickled_code_is_refused(tmp_path):
    path = save({"model": tiny()}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="not a readable file of weights"):
        open_tiny(path)


def test_other_objects_than_tensors_are_refused(tmp_path):
    path = save({"cls_token": torch.zeros(1), "step": 3}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="not a state dict of tensors, got step"):
        open_tiny(path)


def test_weights_of_another_size_are_refused(tmp_path):
    path = save(tiny().state_dict(), tmp_path / "w.pth")
    with pytest.raises(
        CheckpointError, match=r"misshapen: cls_token \[1, 1, 32\] for \[1, 1, 64\]"
    ):
        open_tiny(path, embed_dim=64)


def test_check_hash_compares_the_file_with_its_name(tmp_path):
    path = save(tiny().state_dict(), tmp_path / "w.pth")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    good = path.rename(tmp_path / f"w-{digest[:8]}.pth")
    assert_same(open_tiny(good, check_hash=True), tiny())
    bad = good.rename(tmp_path / "w-00000000.pth")
    with pytest.raises(CheckpointError, match=f"sha256 is not that of the file name, got {digest}"):
        open_tiny(bad, check_hash=True)
    with pytest.raises(CheckpointError, match="no hash in the file name"):
        open_tiny(bad.rename(tmp_path / "w.pth"), check_hash=True)
