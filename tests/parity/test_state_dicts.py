"""Names, shapes, order and sizes of every released state dict, on the meta device."""

import json
from pathlib import Path

import pytest

from dinov3 import hub

EXPECTED = json.loads(
    (Path(__file__).parents[1] / "golden" / "STATE_DICTS.json").read_text(encoding="utf-8")
)
NAMES = [name for name in EXPECTED if not name.startswith("HEAD:")]
PARAMETERS = {
    "dinov3_vits16": 21_601_152,
    "dinov3_vits16plus": 28_697_472,
    "dinov3_vitb16": 85_669_632,
    "dinov3_vitl16": 303_154_176,
    "dinov3_vitl16[SAT493M]": 303_156_224,
    "dinov3_vitl16plus": 403_915_776,
    "dinov3_vith16plus": 840_633_600,
    "dinov3_vit7b16": 6_716_043_264,
    "dinov3_vit7b16[SAT493M]": 6_716_043_264,
    "dinov3_convnext_tiny": 27_820_128,
    "dinov3_convnext_small": 49_454_688,
    "dinov3_convnext_base": 87_566_464,
    "dinov3_convnext_large": 196_230_336,
}


def build(name: str):
    builder, _, variant = name.removesuffix("]").partition("[")
    return getattr(hub, builder)(pretrained=False, weights=variant or None, device="meta")


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_has_the_published_names_shapes_and_order(name):
    state = build(name).state_dict()
    assert [[key, list(value.shape)] for key, value in state.items()] == EXPECTED[name]


@pytest.mark.parametrize("name", NAMES)
def test_parameter_count_is_the_published_one(name):
    assert sum(parameter.numel() for parameter in build(name).parameters()) == PARAMETERS[name]


def test_all_eleven_sizes_and_both_satellite_variants_are_covered():
    assert set(NAMES) == set(PARAMETERS)
