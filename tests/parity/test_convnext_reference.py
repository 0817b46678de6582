"""The ConvNeXt equals the reference's stored numbers, and two independent implementations."""

import numpy as np
import pytest
import torch

from dinov3.models.convnext import ConvNeXt, build_convnext
from tests.golden_numbers import GOLDEN, assert_matches, inp

GOLD = GOLDEN["convnext"]
SIZE = {"depths": [1, 1, 2, 1], "dims": [8, 16, 32, 64]}
X = inp(2, 3, 64, 80)


def fill_procedurally(model: ConvNeXt) -> None:
    """Write the weights that the stored numbers were made with; of an alias the last name wins."""
    state = model.state_dict()
    for index, name in enumerate(sorted(state)):
        values = 0.05 * np.sin(0.37 * np.arange(state[name].numel()) + 0.11 * index)
        is_norm = "norm" in name or name == "downsample_layers.0.1.weight"
        if state[name].ndim == 1 and is_norm and name.endswith("weight"):
            values = values + 1.0
        if name.endswith("gamma"):
            values = values + 0.5
        state[name].copy_(torch.from_numpy(values).reshape(state[name].shape))


@pytest.fixture
def model() -> ConvNeXt:
    built = build_convnext(**SIZE, patch_size=16).eval()
    fill_procedurally(built)
    return built


@pytest.fixture
def far_from_initial() -> ConvNeXt:
    """Weights so large that every part of the network shows in the output."""
    built = build_convnext(**SIZE, layerscale=0.5).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return built


def test_state_dict_has_the_stored_keys(model):
    state = sorted([name, list(value.shape)] for name, value in model.state_dict().items())
    assert state == sorted(GOLD["keys"])


@pytest.mark.parametrize(
    "key", ["x_norm_clstoken", "x_storage_tokens", "x_norm_patchtokens", "x_prenorm"]
)
def test_features_match(model, key):
    assert_matches(model.forward_features(X)[key], GOLD[key])
    assert_matches(model(X, is_training=True)[key], GOLD[key])


def test_forward_gives_the_pooled_feature(model):
    assert_matches(model(X), GOLD["x_norm_clstoken"])


def test_a_list_matches_too(model):
    local = inp(4, 3, 32, 32)
    of_global, of_local = model.forward_features([X, local])
    assert_matches(of_global["x_norm_patchtokens"], GOLD["x_norm_patchtokens"])
    assert torch.equal(of_local["x_norm_clstoken"], model(local))


def test_maps_of_all_stages_match(model):
    layers = model.get_intermediate_layers(X, n=4, reshape=True, return_class_token=True)
    flat = [each for layer in layers for each in layer]
    assert len(flat) == len(GOLD["gil_n4_reshape_cls"]) == 8
    for actual, stored in zip(flat, GOLD["gil_n4_reshape_cls"], strict=True):
        assert_matches(actual, stored)


def test_maps_without_norm_match(model):
    (patches,) = model.get_intermediate_layers(X, n=1, norm=False)
    assert_matches(patches, GOLD["gil_n1_nonorm"])


def to_transformers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of the independent implementation."""
    parts = {
        "gamma": "gamma",
        "dwconv": "depthwise_conv",
        "norm": "layer_norm",
        "pwconv1": "pointwise_conv1",
        "pwconv2": "pointwise_conv2",
    }
    mapped = {}
    for name, value in state.items():
        kind, *rest = name.split(".")
        if kind == "downsample_layers":
            stage, index, parameter = rest
            mapped[f"model.stages.{stage}.downsample_layers.{index}.{parameter}"] = value
        elif kind == "stages":
            stage, block, part, *parameter = rest
            new = ".".join([parts[part], *parameter])
            mapped[f"model.stages.{stage}.layers.{block}.{new}"] = value
        elif kind == "norm":
            mapped[f"layer_norm.{rest[0]}"] = value
    return mapped


@torch.no_grad()
def test_random_model_equals_transformers(far_from_initial):
    transformers = pytest.importorskip("transformers")
    config = transformers.DINOv3ConvNextConfig(hidden_sizes=SIZE["dims"], depths=SIZE["depths"])
    theirs = transformers.DINOv3ConvNextModel(config).eval()
    theirs.load_state_dict(to_transformers(far_from_initial.state_dict()))
    features = far_from_initial.forward_features(X)
    actual = torch.cat(
        [features["x_norm_clstoken"][:, None], features["x_norm_patchtokens"]], dim=1
    )
    torch.testing.assert_close(actual, theirs(X).last_hidden_state, rtol=0, atol=1e-5)


def to_timm(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of the other one, where a stage owns the downsampling before it."""
    parts = {
        "gamma": "gamma",
        "dwconv": "conv_dw",
        "norm": "norm",
        "pwconv1": "mlp.fc1",
        "pwconv2": "mlp.fc2",
    }
    mapped = {}
    for name, value in state.items():
        kind, *rest = name.split(".")
        if kind == "downsample_layers":
            stage, index, parameter = rest
            place = f"stem.{index}" if stage == "0" else f"stages.{stage}.downsample.{index}"
            mapped[f"{place}.{parameter}"] = value
        elif kind == "stages":
            stage, block, part, *parameter = rest
            new = ".".join([parts[part], *parameter])
            mapped[f"stages.{stage}.blocks.{block}.{new}"] = value
        elif kind == "norm":
            mapped[f"head.norm.{rest[0]}"] = value
    return mapped


@torch.no_grad()
def test_maps_of_a_random_model_equal_timm(far_from_initial):
    convnext = pytest.importorskip("timm.models.convnext")
    theirs = convnext.ConvNeXt(**SIZE, num_classes=0).eval()
    theirs.load_state_dict(to_timm(far_from_initial.state_dict()))
    actual = far_from_initial.get_intermediate_layers(X, n=4, reshape=True, norm=False)
    expected = theirs.forward_intermediates(X, intermediates_only=True)
    for ours, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(far_from_initial(X), theirs(X), rtol=0, atol=1e-5)
