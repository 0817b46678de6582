"""Recipes: what is refused, what is hashed, how a child lies over its parents."""

import pytest

from dinov3.config import TrainConfig, config_digest
from dinov3.errors import ConfigError
from dinov3.recipe import load_recipe


def a_recipe(folder, text, name="mine.yaml"):
    path = folder / name
    path.write_text(text)
    return str(path)


def test_unknown_key_names_the_nearest_valid_one(tmp_path):
    path = a_recipe(tmp_path, "extends: demo/pretrain\noptim: {batchsize: 3}\n")
    with pytest.raises(ConfigError, match=r"optim\.batchsize: unknown key.*mean batch_size"):
        load_recipe(path)


def test_unknown_override_names_the_nearest_valid_one():
    with pytest.raises(ConfigError, match=r"unknown key.*mean schedules"):
        load_recipe("demo", ["schedlues.num_steps=3"])


def test_unknown_recipe_names_the_nearest_one():
    with pytest.raises(ConfigError, match=r"no such recipe, got 'demmo'.*Did you mean demo"):
        load_recipe("demmo")


def test_duplicate_key_is_refused(tmp_path):
    path = a_recipe(tmp_path, "extends: demo/pretrain\nseed: 1\nseed: 2\n")
    with pytest.raises(ConfigError, match="'seed' stands twice"):
        load_recipe(path)


def test_recipe_that_extends_itself_is_refused(tmp_path):
    path = a_recipe(tmp_path, "extends: mine.yaml\n")
    with pytest.raises(ConfigError, match="extends itself"):
        load_recipe(path)


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "1E-4"])
def test_exponents_without_a_point_are_numbers(text):
    config = load_recipe("demo", [f"schedules.lr.peak={text}"])
    assert config.schedules.lr.peak == pytest.approx(1e-4)


def test_text_where_a_number_belongs_is_refused():
    with pytest.raises(ConfigError, match=r"optim\.batch_size: .*got 'many'"):
        load_recipe("demo", ["optim.batch_size=many"])


def test_override_without_equals_sign_is_refused():
    with pytest.raises(ConfigError, match="not of the form key=value, got 'seed'"):
        load_recipe("demo", ["seed"])


def test_crop_that_is_no_multiple_of_the_patch_is_refused():
    with pytest.raises(ConfigError, match=r"crops\.global_size: not a multiple.*got 50"):
        load_recipe("demo", ["crops.global_size=50"])


def test_run_section_stays_outside_the_digest():
    plain = load_recipe("demo")
    assert config_digest(load_recipe("demo", ["run.num_workers=7"])) == config_digest(plain)
    assert config_digest(load_recipe("demo", ["seed=7"])) != config_digest(plain)


def test_config_is_frozen():
    config = load_recipe("demo")
    assert isinstance(config, TrainConfig)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3


def test_child_lies_over_its_parents_key_by_key(tmp_path):
    a_recipe(tmp_path, "extends: demo/pretrain\nseed: 5\noptim: {clip: 1.5}\n", "one.yaml")
    path = a_recipe(tmp_path, "extends: one.yaml\noptim: {batch_size: 64}\n", "two.yaml")
    config = load_recipe(path)
    assert (config.seed, config.optim.clip, config.optim.batch_size) == (5, 1.5, 64)
    assert config.optim.betas == load_recipe("demo").optim.betas
