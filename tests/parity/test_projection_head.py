"""The projection head equals the reference's stored numbers."""

import itertools

import numpy as np
import pytest
import torch

from dinov3.errors import ConfigError
from dinov3.heads.projection import ProjectionHead
from tests.golden_numbers import GOLDEN as ALL
from tests.golden_numbers import assert_matches, inp

GOLDEN = ALL["dinohead"]


@pytest.fixture
def head() -> ProjectionHead:
    """The head with the weights that the stored numbers were made with."""
    head = ProjectionHead(64, 128, hidden_dim=96, bottleneck_dim=32)
    state = head.state_dict()
    for index, name in enumerate(sorted(state)):
        values = 0.05 * np.sin(0.37 * np.arange(state[name].numel()) + 0.11 * index)
        state[name].copy_(torch.from_numpy(values).reshape(state[name].shape))
    return head


def test_state_dict_has_the_stored_keys(head):
    state = {name: list(value.shape) for name, value in head.state_dict().items()}
    assert sorted(state.items()) == [tuple(each) for each in GOLDEN["keys"]]


def test_logits_match(head):
    assert_matches(head(inp(5, 64)), GOLDEN["out"])


def test_bottleneck_matches_and_has_unit_length(head):
    bottleneck = head(inp(5, 64), no_last_layer=True)
    assert_matches(bottleneck, GOLDEN["no_last"])
    torch.testing.assert_close(bottleneck.norm(dim=-1), torch.ones(5))


def test_the_two_halves_make_the_whole(head):
    bottleneck = head(inp(5, 64), no_last_layer=True)
    assert torch.equal(head(bottleneck, only_last_layer=True), head(inp(5, 64)))


def test_half_precision_survives_a_zero_bottleneck():
    head = ProjectionHead(8, 4, hidden_dim=8, bottleneck_dim=4, mlp_bias=False).half()
    assert torch.isfinite(head(torch.zeros(2, 8, dtype=torch.float16))).all()


def test_gain_scales_only_the_prototypes():
    head = ProjectionHead(16, 512, hidden_dim=64, bottleneck_dim=32)
    torch.manual_seed(0)
    head.reset_parameters()
    before = {name: value.clone() for name, value in head.state_dict().items()}
    torch.manual_seed(0)
    head.reset_parameters(last_layer_gain=5.0)
    for name, value in head.state_dict().items():
        gain = 5.0 if name == "last_layer.weight" else 1.0
        torch.testing.assert_close(value, gain * before[name])
    assert before["last_layer.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert not before["mlp.0.bias"].any()


@pytest.mark.parametrize("num_layers", [1, 2, 4])
def test_depth_and_biases_follow_the_arguments(num_layers):
    head = ProjectionHead(
        8, 16, num_layers=num_layers, hidden_dim=6, bottleneck_dim=4, mlp_bias=False
    )
    linears = [each for each in head.modules() if isinstance(each, torch.nn.Linear)]
    widths = [8, *[6] * (num_layers - 1), 4, 16]
    assert [(each.in_features, each.out_features) for each in linears] == list(
        itertools.pairwise(widths)
    )
    assert not any(name.endswith("bias") for name in head.state_dict())
    assert head(torch.ones(3, 8)).shape == (3, 16)


def test_a_head_is_built_without_memory_on_the_meta_device():
    head = ProjectionHead(64, 65536, device="meta")
    assert all(parameter.is_meta for parameter in head.parameters())
    assert head(torch.empty(2, 64, device="meta")).shape == (2, 65536)


def test_a_head_without_layers_is_refused():
    with pytest.raises(ConfigError, match="num_layers: must be at least 1, got 0"):
        ProjectionHead(8, 16, num_layers=0)
