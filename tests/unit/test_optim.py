"""Parameter groups follow the published rules; schedules and clipping act per group and module."""

import pytest
import torch
from torch import nn

from dinov3.heads.projection import ProjectionHead
from dinov3.models.vit import build_vit
from dinov3.train.optim import apply_schedule, build_adamw, clip_gradients, parameter_groups

DEPTH = 3


@pytest.fixture
def backbone():
    return build_vit(embed_dim=32, depth=DEPTH, num_heads=2, untie_global_and_local_cls_norm=True)


@pytest.fixture
def head():
    return ProjectionHead(32, 16, hidden_dim=8, bottleneck_dim=4)


def group_of(groups, name):
    return next(group for group in groups if name in group["names"])


def test_every_trainable_parameter_is_in_exactly_one_group(backbone):
    backbone.mask_token.requires_grad_(False)
    groups = parameter_groups(backbone, name="backbone", layerwise_decay=0.9)
    names = [name for group in groups for name in group["names"]]
    expected = {f"backbone.{name}" for name, _ in backbone.named_parameters()}
    assert len(names) == len(set(names))
    assert set(names) == expected - {"backbone.mask_token"}
    by_name = dict(backbone.named_parameters())
    for group in groups:
        keys = [name.removeprefix("backbone.") for name in group["names"]]
        assert all(by_name[k] is p for k, p in zip(keys, group["params"], strict=True))


@pytest.mark.parametrize(
    ("name", "exponent", "factor", "wd_mult"),
    [
        ("cls_token", DEPTH + 1, 1.0, 1.0),
        ("storage_tokens", DEPTH + 1, 1.0, 1.0),
        ("mask_token", DEPTH + 1, 1.0, 1.0),
        ("patch_embed.proj.weight", DEPTH + 1, 0.2, 1.0),
        ("patch_embed.proj.bias", DEPTH + 1, 0.2, 0.0),
        ("blocks.0.attn.qkv.weight", DEPTH, 1.0, 1.0),
        ("blocks.0.attn.qkv.bias", DEPTH, 1.0, 0.0),
        ("blocks.1.ls1.gamma", DEPTH - 1, 1.0, 0.0),
        ("blocks.2.norm1.weight", 1, 1.0, 0.0),
        ("blocks.2.mlp.fc1.weight", 1, 1.0, 1.0),
        ("norm.weight", 0, 1.0, 0.0),
        ("local_cls_norm.bias", 0, 1.0, 0.0),
    ],
)
def test_multipliers_of_the_backbone(backbone, name, exponent, factor, wd_mult):
    groups = parameter_groups(
        backbone, name="backbone", layerwise_decay=0.9, patch_embed_lr_mult=0.2
    )
    group = group_of(groups, f"backbone.{name}")
    assert group["lr_mult"] == pytest.approx(0.9**exponent * factor)
    assert group["wd_mult"] == wd_mult
    assert not group["is_last_layer"]


def test_vectors_are_what_the_published_names_exempt_from_decay(backbone):
    for group in parameter_groups(backbone, name="backbone"):
        for name in group["names"]:
            exempt = name.endswith("bias") or "norm" in name or "gamma" in name
            assert group["wd_mult"] == (0.0 if exempt else 1.0)


def test_groups_are_fused(backbone):
    groups = parameter_groups(backbone, name="backbone")
    assert [(group["lr_mult"], group["wd_mult"]) for group in groups] == [(1.0, 1.0), (1.0, 0.0)]
    decayed = parameter_groups(backbone, name="backbone", layerwise_decay=0.9)
    kinds = {(group["lr_mult"], group["wd_mult"]) for group in decayed}
    assert len(kinds) == len(decayed) == 2 * (DEPTH + 1) + 1  # vectors only after the blocks


def test_heads_have_a_resting_last_layer_and_their_own_decay(head):
    groups = parameter_groups(head, name="dino_head", layerwise_decay=0.9, wd_mult=0.5)
    assert group_of(groups, "dino_head.last_layer.weight")["is_last_layer"]
    for group in groups:
        assert group["lr_mult"] == 1.0
        assert group["wd_mult"] == (0.0 if group["names"][0].endswith("bias") else 0.5)
        assert group["is_last_layer"] == ("dino_head.last_layer.weight" in group["names"])


def optimizer_of(backbone, head):
    groups = [
        *parameter_groups(backbone, name="backbone", layerwise_decay=0.5),
        *parameter_groups(head, name="dino_head"),
    ]
    return build_adamw(groups, (0.9, 0.99))


def fill_gradients(*modules):
    for module in modules:
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)


def test_schedules_reach_every_group(backbone, head):
    optimizer = optimizer_of(backbone, head)
    apply_schedule(optimizer, 1.0, 0.04, 0.25)
    for group in optimizer.param_groups:
        base = 0.25 if group["is_last_layer"] else 1.0
        assert group["lr"] == base * group["lr_mult"]
        assert group["weight_decay"] == 0.04 * group["wd_mult"]
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.99)}


def test_frozen_prototypes_rest_while_the_others_move(backbone, head):
    optimizer = optimizer_of(backbone, head)
    before = {n: p.clone() for n, p in [*head.named_parameters(), *backbone.named_parameters()]}
    fill_gradients(backbone, head)
    apply_schedule(optimizer, 1e-2, 0.04, 0.0)
    optimizer.step()
    for name, parameter in [*head.named_parameters(), *backbone.named_parameters()]:
        assert torch.equal(parameter, before[name]) == (name == "last_layer.weight")


def test_without_a_schedule_nothing_moves(head):
    optimizer = build_adamw(parameter_groups(head, name="dino_head"), (0.9, 0.99))
    before = {name: value.clone() for name, value in head.state_dict().items()}
    fill_gradients(head)
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


def test_one_step_equals_the_formula():
    linear = nn.Linear(3, 2)
    before = {name: value.clone() for name, value in linear.named_parameters()}
    optimizer = build_adamw(parameter_groups(linear, name="dino_head"), (0.9, 0.999))
    fill_gradients(linear)
    apply_schedule(optimizer, 1e-2, 0.1, 1e-2)
    optimizer.step()
    decayed = before["weight"] * (1 - 1e-2 * 0.1)
    torch.testing.assert_close(linear.weight.detach(), decayed.detach() - 1e-2)
    torch.testing.assert_close(linear.bias.detach(), before["bias"].detach() - 1e-2)


def test_resumed_state_is_plain_data_and_continues_exactly(head, tmp_path):
    optimizer = build_adamw(parameter_groups(head, name="dino_head"), (0.9, 0.99))
    fill_gradients(head)
    apply_schedule(optimizer, 1e-2, 0.04, 1e-2)
    optimizer.step()
    torch.save([optimizer.state_dict(), head.state_dict()], tmp_path / "state.pt")
    optimizer.step()
    state, weights = torch.load(tmp_path / "state.pt", weights_only=True)
    again = ProjectionHead(32, 16, hidden_dim=8, bottleneck_dim=4)
    again.load_state_dict(weights)
    resumed = build_adamw(parameter_groups(again, name="dino_head"), (0.9, 0.99))
    resumed.load_state_dict(state)
    fill_gradients(again)
    resumed.step()
    for name, value in again.state_dict().items():
        assert torch.equal(value, head.state_dict()[name])


def test_modules_are_clipped_apart():
    small, large = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    small.weight.grad = torch.full((4, 4), 0.1)
    large.weight.grad = torch.full((4, 4), 10.0)
    norms = clip_gradients({"small": small, "large": large}, 3.0)
    assert {name: norm.item() for name, norm in norms.items()} == pytest.approx(
        {"small": 0.4, "large": 40.0}
    )
    assert small.weight.grad.norm().item() == pytest.approx(0.4)
    assert large.weight.grad.norm().item() == pytest.approx(3.0, rel=1e-5)


def test_a_non_finite_gradient_shows_in_the_norm():
    linear = nn.Linear(2, 2)
    fill_gradients(linear)
    linear.weight.grad[0, 0] = float("nan")
    assert not torch.isfinite(clip_gradients({"head": linear}, 3.0)["head"])


def test_a_module_without_gradients_has_norm_zero(head):
    assert clip_gradients({"ibot_head": head}, 3.0)["ibot_head"].item() == 0
