"""Recipes that YAML or JSON trips over, and values out of bounds: sentences, never tracebacks."""

import pytest

from dinov3.errors import ConfigError
from dinov3.recipe import load_recipe

DEEP = "[" * 5000 + "]" * 5000
ILL_FORMED = [
    ("seed", "2026-01-01", r"seed: Input should be a valid integer, got '2026-01-01'"),
    ("schedules.lr.peak", ".inf", r"schedules\.lr\.peak: Input should be a finite number, got inf"),
    ("schedules.lr.peak", "-.inf", r"should be a finite number, got -inf"),
    ("seed", "{1: 2}", r"seed: Input should be a valid integer, got \{'1': 2\}"),
    ("phase", "[1]", r"phase is not one of .* got \[1\]"),
    ("seed", DEEP, "nested too deep"),
    ("seed", "[" * 250 + "]" * 250, "recursion limit exceeded"),
    ("seed", "[" * 100 + "]" * 100, r"got \[{80}…\."),
    ("seed", "!!int x", "not readable as YAML, got '!!int x'"),
    ("seed", "!!bool x", "not readable as YAML, got '!!bool x'"),
    ("seed", "!!map [1]", "not readable as YAML"),
    ("seed", "!!timestamp x", "not readable as YAML"),
    ("seed", "!!timestamp 2026-01-01", "a value JSON does not know, got Object of type date"),
    ("seed", "!!set {1}", "a value JSON does not know, got Object of type set"),
    ("seed", "9" * 5000, "Exceeds the limit"),
    ("seed", "{", "override seed: not readable as YAML"),
]


@pytest.mark.parametrize(("key", "value", "message"), ILL_FORMED)
def test_an_override_that_cannot_be_is_explained(key, value, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("demo", [f"{key}={value}"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 2026-01-01", "seed: Input should be a valid integer, got '2026-01-01'"),
        ("seed: !!timestamp 2026-01-01", "a value JSON does not know"),
        (f"seed: {DEEP}", "nested too deep"),
        ("model: &a {b: *a}", "Circular reference"),
        ("1: 2", "1: unknown key"),
        ("seed: {", "not readable as YAML"),
    ],
)
def test_a_file_that_cannot_be_is_explained(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(f"extends: demo/pretrain\n{text}\n")
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(path))


def test_an_unknown_override_of_a_file_with_odd_keys_is_explained(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: demo/pretrain\n1: 2\n")
    expected = r"foo: unknown key, got 'foo'\. Valid here: 1, compute, crops, gram"
    with pytest.raises(ConfigError, match=expected):
        load_recipe(str(path), ["foo=3"])


def test_a_mapping_shared_by_an_alias_extends_its_parent_in_both_places(tmp_path):
    path = tmp_path / "mine.yaml"
    shared = "students: {one: &shared {extends: students/vits16}, two: *shared}"
    path.write_text(f"extends: default/distill\n{shared}\n")
    students = load_recipe(str(path), phase="distill").students
    assert students["one"] == students["two"]
    assert students["two"].model.embed_dim == 384


def test_a_mapping_used_twice_is_no_circle(tmp_path):
    path = tmp_path / "mine.yaml"
    head = "{num_prototypes: 64, hidden_dim: 64, bottleneck_dim: 32}"
    path.write_text(f"extends: demo/pretrain\nheads: {{dino: &head {head}, ibot: *head}}\n")
    heads = load_recipe(str(path)).heads
    assert heads.dino == heads.ibot
    assert heads.ibot.bottleneck_dim == 32


def test_bytes_that_are_no_text_are_explained(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a readable text"):
        load_recipe(str(path))


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + ".yaml"])
def test_a_name_no_file_can_have_is_no_recipe(name):
    with pytest.raises(ConfigError, match="no such recipe"):
        load_recipe(name)


UNORDERED = "The first must not be above the second"
OUT_OF_BOUNDS = [
    ("pretrain", "seed=-1", "seed: .* greater than or equal to 0, got -1"),
    ("pretrain", "seed=2147483648", "seed: .* less than 2147483648"),
    ("embeddings", "seed=-1", "seed: "),
    ("curation", "seed=2147483648", "seed: "),
    ("evals", "seed=-1", "seed: "),
    ("pretrain", "optim.betas=[0.9,1.0]", r"optim\.betas\.1: .* less than 1, got 1\.0"),
    ("pretrain", "optim.betas=[1.0,0.9]", r"optim\.betas\.0: .* less than 1, got 1\.0"),
    ("pretrain", "model.drop_path=1.0", r"model\.drop_path: .* less than 1"),
    ("pretrain", "health.num_images=1", r"health\.num_images: .* equal to 2, got 1"),
    ("pretrain", "masks.ratio=[0.5,0.1]", rf"masks\.ratio: {UNORDERED}, got \[0\.5, 0\.1\]"),
    ("pretrain", "masks.ratio=[0.5,1.1]", r"masks\.ratio\.1: .* less than or equal to 1"),
    ("pretrain", "crops.global_scale=[0.0,1.0]", r"crops\.global_scale\.0: .* greater than 0"),
    ("pretrain", "crops.global_scale=[1.0,0.5]", rf"crops\.global_scale: {UNORDERED}"),
    ("pretrain", "crops.local_scale=[0.5,1.5]", r"crops\.local_scale\.1: .* or equal to 1"),
    ("pretrain", "crops.local_scale=[0.5,0.1]", rf"crops\.local_scale: {UNORDERED}"),
    ("pretrain", "crops.blur_sigma=[0.0,2.0]", r"crops\.blur_sigma\.0: .* greater than 0"),
    ("pretrain", "crops.blur_sigma=[2.0,0.1]", rf"crops\.blur_sigma: {UNORDERED}"),
    ("pretrain", "crops.backgrounds=[[0,0,256]]", r"backgrounds\.0\.2: .* equal to 255, got 256"),
    ("evals", "background=[-1,0,0]", r"background\.0: .* or equal to 0, got -1"),
    ("evals", "logreg.log10_c=[1.0,-1.0]", rf"logreg\.log10_c: {UNORDERED}"),
    ("evals", "retrieval.scale=[0.5,1.5]", r"retrieval\.scale\.1: .* equal to 1, got 1\.5"),
    ("evals", "retrieval.scale=[1.0,0.5]", rf"retrieval\.scale: {UNORDERED}"),
]


@pytest.mark.parametrize(("phase", "override", "message"), OUT_OF_BOUNDS)
def test_values_out_of_bounds_are_refused(phase, override, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("demo", [override], phase=phase)


@pytest.mark.parametrize(
    ("phase", "override"),
    [
        ("pretrain", "seed=2147483647"),
        ("pretrain", "optim.betas=[0.0,0.9999]"),
        ("pretrain", "masks.ratio=[0.0,1.0]"),
        ("pretrain", "crops.global_scale=[1.0,1.0]"),
        ("pretrain", "health.num_images=2"),
        ("evals", "logreg.log10_c=[-2.0,-2.0]"),
    ],
)
def test_values_on_the_bounds_are_taken(phase, override):
    load_recipe("demo", [override], phase=phase)
