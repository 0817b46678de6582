"""Health metrics: exact on features with a known answer, alarming on collapsed ones."""

import math

import pytest
import torch

from dinov3.errors import ConfigError, DataError
from dinov3.heads.projection import ProjectionHead
from dinov3.models.vit import VisionTransformer, ViTConfig, build_vit
from dinov3.train.health import (
    cls_patch_cosine,
    collapse_reason,
    gram_distance,
    is_finite,
    mean_cosine,
    measure,
    participation_ratio,
    patch_patch_cosine,
    prototype_entropy,
    rankme,
)

LIMITS = {
    "min_participation_ratio": 2.0,
    "max_mean_cosine": 0.98,
    "min_prototype_entropy": 0.05,
    "max_consecutive_non_finite": 3,  # of the same recipe section, no limit on a metric
}
HEALTHY = {"participation_ratio": 9.0, "mean_cosine": 0.3, "prototype_entropy": 0.8}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def collapsed(rows: int = 64, width: int = 16) -> torch.Tensor:
    """One direction, different lengths, a little rounding noise."""
    return torch.linspace(1, 2, rows)[:, None] * noise(1, width) + 1e-4 * noise(rows, width)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_directions_of_equal_power_are_counted(rank):
    axes = torch.eye(8)[:rank]
    features = torch.cat([axes, -axes])
    assert participation_ratio(features).item() == pytest.approx(rank)
    assert rankme(features).item() == pytest.approx(rank)


def test_participation_ratio_agrees_with_the_singular_values():
    features = noise(40, 12) * torch.linspace(0.1, 2, 12) + 5
    powers = torch.linalg.svdvals((features - features.mean(0)).double()).square()
    expected = powers.sum().square() / powers.square().sum()
    assert participation_ratio(features).item() == pytest.approx(expected.item(), rel=1e-5)


def test_only_participation_ratio_ignores_a_common_offset():
    features = noise(64, 16)
    assert participation_ratio(features + 100).item() == pytest.approx(
        participation_ratio(features).item(), rel=1e-3
    )
    assert rankme(features + 100) < 0.5 * rankme(features)


def test_a_collapsed_cloud_is_one_direction():
    assert participation_ratio(collapsed()).item() == pytest.approx(1, abs=1e-3)
    assert rankme(collapsed()).item() == pytest.approx(1, abs=0.05)
    assert mean_cosine(collapsed()).item() == pytest.approx(1, abs=1e-4)


def test_a_round_cloud_has_its_full_dimension():
    features = noise(20000, 8)
    assert participation_ratio(features).item() == pytest.approx(8, rel=0.01)
    assert rankme(features).item() == pytest.approx(8, rel=0.01)
    assert mean_cosine(features).item() == pytest.approx(0, abs=0.01)


def test_equal_features_have_no_direction():
    assert participation_ratio(torch.ones(8, 4)).item() == 0
    assert rankme(torch.zeros(8, 4)).item() == 1


def test_mean_cosine_is_the_mean_over_pairs():
    features = noise(6, 5)
    pairs = torch.nn.functional.cosine_similarity(features[:, None], features, dim=-1)
    expected = pairs[~torch.eye(6, dtype=torch.bool)].mean()
    assert mean_cosine(features).item() == pytest.approx(expected.item(), abs=1e-6)


def test_patch_cosine_stays_within_the_image():
    patches = torch.stack([torch.eye(4)[:2].repeat(3, 1), -torch.eye(4)[2:].repeat(3, 1)])
    inside = (2 * 3 * 2) / (6 * 5)  # pairs of equal patches among 6
    assert patch_patch_cosine(patches).item() == pytest.approx(inside)
    assert patch_patch_cosine(torch.ones(2, 6, 4)).item() == pytest.approx(1)


def test_cls_is_compared_with_its_own_patches():
    cls = torch.eye(3)[:2]
    patches = cls[:, None].repeat(1, 4, 1)
    assert cls_patch_cosine(cls, patches).item() == pytest.approx(1)
    assert cls_patch_cosine(cls.flip(0), patches).item() == pytest.approx(0)


@pytest.mark.parametrize(
    ("probs", "entropy"),
    [
        (torch.eye(8), 1.0),
        (torch.full((4, 8), 1 / 8), 1.0),
        (torch.eye(8)[:1].repeat(4, 1), 0.0),
        (torch.eye(8)[:2].repeat(4, 1), math.log(2) / math.log(8)),
        (torch.ones(4, 1), 0.0),
    ],
)
def test_prototype_entropy_is_the_share_of_the_possible(probs, entropy):
    assert prototype_entropy(probs).item() == pytest.approx(entropy, abs=1e-7)


@pytest.mark.parametrize("metric", [participation_ratio, rankme, mean_cosine])
def test_one_row_says_nothing_about_spread(metric):
    with pytest.raises(DataError, match="features: at least two rows are needed, got 1"):
        metric(torch.ones(1, 4))


def test_one_patch_says_nothing_about_patches():
    with pytest.raises(DataError, match="patches: at least two are needed, got 1"):
        patch_patch_cosine(torch.ones(2, 1, 4))


@pytest.mark.parametrize(
    ("value", "finite"), [(1.0, True), (float("nan"), False), (float("-inf"), False)]
)
def test_finite_losses_are_recognised(value, finite):
    assert is_finite(torch.tensor(value)) is finite


def test_a_healthy_state_has_no_reason():
    assert collapse_reason(HEALTHY, LIMITS) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"participation_ratio": 1.01}, "participation_ratio is 1.01, must be at least 2"),
        ({"mean_cosine": 0.999}, "mean_cosine is 0.999, must be at most 0.98"),
        ({"prototype_entropy": 0.0}, "prototype_entropy is 0, must be at least 0.05"),
        ({"mean_cosine": float("nan")}, "mean_cosine is nan, must be at most 0.98"),
    ],
)
def test_a_broken_limit_is_named_with_its_value(change, reason):
    assert collapse_reason({**HEALTHY, **change}, LIMITS) == reason


def test_limits_themselves_are_healthy():
    at_the_limit = {"participation_ratio": 2.0, "mean_cosine": 0.98, "prototype_entropy": 0.05}
    assert collapse_reason(at_the_limit, LIMITS) is None


def test_a_limit_on_nothing_measured_is_refused():
    with pytest.raises(ConfigError, match="max_mean_cosine: mean_cosine was not measured"):
        collapse_reason({"participation_ratio": 9.0}, LIMITS)


def network():
    torch.manual_seed(0)
    backbone = build_vit(embed_dim=32, depth=2, num_heads=2, patch_size=8, layerscale=0.5).eval()
    return backbone, ProjectionHead(32, 64, hidden_dim=32, bottleneck_dim=16)


def test_measuring_in_chunks_changes_nothing():
    backbone, head = network()
    images = noise(70, 3, 16, 16)  # a chunk of 64 and one of 6
    measured = measure(backbone, head, images)
    with torch.no_grad():
        features = backbone.forward_features(images)
        cls, patches = features["x_norm_clstoken"], features["x_norm_patchtokens"]
        expected = {
            "participation_ratio": participation_ratio(cls),
            "rankme": rankme(cls),
            "mean_cosine": mean_cosine(cls),
            "cls_patch_cosine": cls_patch_cosine(cls, patches),
            "patch_patch_cosine": patch_patch_cosine(patches),
            "prototype_entropy": prototype_entropy((head(cls) / 0.1).softmax(-1)),
        }
    assert measured == pytest.approx({k: v.item() for k, v in expected.items()}, rel=1e-4)


def test_a_collapsed_backbone_is_caught():
    backbone, head = network()
    with torch.no_grad():
        backbone.norm.weight.zero_()
        backbone.norm.bias.normal_()
    metrics = measure(backbone, head, noise(8, 3, 16, 16))
    assert metrics["mean_cosine"] == pytest.approx(1)
    assert collapse_reason(metrics, LIMITS) is not None


def test_features_that_are_not_finite_are_measured_and_refused():
    backbone, head = network()
    with torch.no_grad():
        backbone.norm.weight.fill_(math.inf)
    metrics = measure(backbone, head, noise(8, 3, 16, 16))
    assert math.isnan(metrics["rankme"])
    assert collapse_reason(metrics, LIMITS) is not None


def test_a_head_with_one_winning_prototype_is_caught():
    backbone, head = network()
    with torch.no_grad():
        head.mlp[4].weight.zero_()
        head.mlp[4].bias.fill_(1)
        head.last_layer.weight.zero_()
        head.last_layer.weight[5] = 10
    metrics = measure(backbone, head, noise(8, 3, 16, 16))
    assert metrics["prototype_entropy"] == pytest.approx(0, abs=1e-6)
    limits = {"min_prototype_entropy": LIMITS["min_prototype_entropy"]}
    assert "prototype_entropy" in str(collapse_reason(metrics, limits))


def two_backbones() -> tuple[torch.nn.Module, torch.nn.Module]:
    config = ViTConfig(embed_dim=16, depth=1, num_heads=2, patch_size=8, layerscale=0.5)
    torch.manual_seed(0)
    return VisionTransformer(config).eval(), VisionTransformer(config).eval()


def test_gram_distance_is_the_mean_squared_difference_of_patch_cosines():
    """Written out, over more images than are seen at once."""
    ours, theirs = two_backbones()
    images = noise(70, 3, 16, 24)
    gaps = []
    with torch.no_grad():
        for model in (ours, theirs):
            patches = model.forward_features(images)["x_norm_patchtokens"]
            unit = patches / patches.norm(dim=-1, keepdim=True)
            gaps.append(unit @ unit.mT)
    expected = (gaps[0] - gaps[1]).square().mean().item()
    assert gram_distance(ours, patches_of(theirs), images) == pytest.approx(expected, rel=1e-4)
    assert gram_distance(ours, patches_of(ours), images) == 0


def patches_of(model):
    return lambda images: model.forward_features(images)["x_norm_patchtokens"]
