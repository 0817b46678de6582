"""Shipped recipes: each is a diff, builds the published sizes and follows the published numbers."""

import copy

import pytest
import yaml

from dinov3.config import DinotxtConfig, DistillConfig, TrainConfig, dump, type_of_phase
from dinov3.heads.projection import ProjectionHead
from dinov3.hub import ARCHITECTURES
from dinov3.models.backbone import backbone_config, build_backbone
from dinov3.recipe import RECIPES, _merge, _resolve, load_recipe
from dinov3.train.schedules import Schedule, scaled_lr

COMPLETE = ("default", "demo", "smoke_cpu", "vits_1gpu", "vitl_1gpu")
FILES = sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.yaml"))
FRAGMENTS = {
    "convnext_distilled/schedules",
    "default/anchoring",
    "vit7b16/frozen",
    "vit7b16/heads",
    "vit7b16_sat/normalisation",
}
PHASES = [name for name in FILES if not name.startswith("students/") and name not in FRAGMENTS]
TRAINED = [name for name in PHASES if isinstance(load_recipe(name), TrainConfig)]
DISTILLED = [name for name in PHASES if isinstance(load_recipe(name), DistillConfig)]


def own_tree(name):
    return yaml.safe_load((RECIPES / f"{name}.yaml").read_text())


def parents(tree):
    """Every `extends` of a recipe, nested ones too."""
    for key, value in tree.items():
        if key == "extends":
            yield value
        elif isinstance(value, dict):
            yield from parents(value)


def repeated(own, inherited, prefix=""):
    """Keys whose value would be the same without the line that sets them."""
    below = dict(inherited)
    if "extends" in own:
        below = _merge(below, _resolve(RECIPES / f"{own['extends']}.yaml", ()))
    for key, value in own.items():
        if isinstance(value, dict):
            nested = below.get(key)
            yield from repeated(
                value, nested if isinstance(nested, dict) else {}, f"{prefix}{key}."
            )
        elif key != "extends" and key in below and below[key] == value:
            yield prefix + key


@pytest.mark.parametrize("name", PHASES)
def test_every_recipe_resolves_to_the_phase_it_is_named_after(name):
    assert dump(load_recipe(name))["phase"] == name.partition("/")[2]


@pytest.mark.parametrize("family", COMPLETE)
def test_a_complete_family_has_every_phase(family):
    assert {name for name in PHASES if name.startswith(f"{family}/")} == {
        f"{family}/{phase}" for phase in type_of_phase
    }


def test_every_fragment_and_student_file_is_used():
    used = {parent for name in FILES for parent in parents(own_tree(name))}
    unused = {name for name in FILES if name not in PHASES} - used
    assert not unused


@pytest.mark.parametrize("name", FILES)
def test_no_recipe_repeats_a_value_of_its_parents(name):
    """A recipe is a diff: every key it sets changes something."""
    assert not list(repeated(own_tree(name), {}))


def test_a_repeated_value_is_found():
    tree = copy.deepcopy(own_tree("vit7b16/gram"))
    tree["seed"], tree["gram"]["normalize"] = 0, True
    assert list(repeated(tree, {})) == ["gram.normalize", "seed"]


@pytest.mark.parametrize("name", [n for n in PHASES if n.endswith(("/gram", "/highres"))])
def test_a_later_phase_shows_at_most_thirty_lines(name):
    text = (RECIPES / f"{name}.yaml").read_text().splitlines()
    assert sum(not line.lstrip().startswith("#") for line in text) <= 30


@pytest.mark.parametrize("name", [n for n in PHASES if n.endswith(("/gram", "/highres"))])
def test_a_later_phase_extends_the_one_before(name):
    """Those of satellite tiles lie over the same phase on photographs."""
    family, phase = name.split("/")
    before = f"{family}/{'pretrain' if phase == 'gram' else 'gram'}"
    allowed = {before, f"{family.removesuffix('_sat')}/{phase}"} - {name}
    assert own_tree(name)["extends"] in allowed


def chain(name):
    """A recipe and all recipes it extends, nested ones too."""
    found = {name}
    for parent in parents(own_tree(name)):
        found |= chain(parent)
    return found


def watched_recipes():
    """Of each phase in dvc.yaml: the recipe files its stage depends on."""
    stages = yaml.safe_load((RECIPES.parents[1] / "dvc.yaml").read_text())["stages"]
    own = "dinov3/recipes/${recipe}/"
    for stage in stages.values():
        deps = stage.get("do", stage).get("deps", [])
        for phase in type_of_phase:
            if f"{own}{phase}.yaml" in deps:
                yield phase, [each for each in deps if each.startswith("dinov3/recipes/")]


@pytest.mark.parametrize("family", ["default", "demo", "smoke_cpu"])
@pytest.mark.parametrize(("phase", "deps"), list(watched_recipes()))
def test_the_pipeline_watches_every_recipe_that_matters(family, phase, deps):
    allowed = [dep.replace("${recipe}", family) for dep in deps]
    for name in chain(f"{family}/{phase}"):
        path = f"dinov3/recipes/{name}.yaml"
        assert any(path == dep or path.startswith(f"{dep}/") for dep in allowed), path


BACKBONES = {  # recipe, student: parameters, published
    ("vit7b16/distill", "vits"): 21_601_152,
    ("vit7b16/distill", "vitsplus"): 28_697_472,
    ("vit7b16/distill", "vitb"): 85_669_632,
    ("vit7b16/distill", "vitl"): 303_154_176,
    ("vit7b16/distill", "vithplus"): 840_633_600,
    ("vitl16_distilled/distill", "vitl"): 303_154_176,
    ("vitl16_sat/distill", "vitl"): 303_156_224,
    ("convnext_distilled/distill", "tiny"): 27_820_128,
    ("convnext_distilled/distill", "small"): 49_454_688,
    ("convnext_distilled/distill", "base"): 87_566_464,
    ("convnext_distilled/distill", "large"): 196_230_336,
    ("vitl_1gpu/distill", "vits"): 21_601_152,
    ("vitl_1gpu/distill", "convnext"): 27_820_128,
}
SEVEN_BILLION = 6_716_043_264


def num_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("where", "published"), BACKBONES.items())
def test_students_have_the_published_number_of_parameters(where, published):
    recipe, student = where
    model = load_recipe(recipe).students[student].model
    assert num_parameters(build_backbone(model.model_dump(), device="meta")) == published


@pytest.mark.parametrize("family", ["vit7b16", "vit7b16_sat"])
@pytest.mark.parametrize("phase", ["pretrain", "gram", "highres"])
def test_the_7b_has_the_published_number_of_parameters(family, phase):
    model = load_recipe(family, phase=phase).model
    assert num_parameters(build_backbone(model.model_dump(), device="meta")) == SEVEN_BILLION


@pytest.mark.parametrize("student", [True, False])
def test_backbones_are_those_of_the_hub(student):
    """All fields but those that matter in training alone."""
    names = {"vits": "vits16", "vitsplus": "vits16plus", "vitl": "vitl16", "vithplus": "vith16plus"}
    recipe = load_recipe("vit7b16/distill")
    models = {f"dinov3_{hub}": recipe.students[name].model for name, hub in names.items()}
    if not student:
        models = {"dinov3_vit7b16": load_recipe("vit7b16").model}
    for name, model in models.items():
        config = backbone_config({**model.model_dump(), "drop_path": 0.0})
        assert config == ARCHITECTURES[name]


HEADS = {  # by width of the backbone: DINO head (published at 4096), iBOT head (by its shapes)
    4096: (239_092_224, 72_884_608),
    1024: (213_926_400, 60_301_696),
}


@pytest.mark.parametrize(("width", "published"), HEADS.items())
def test_heads_of_the_7b_have_the_published_sizes(width, published):
    heads = load_recipe("vit7b16").heads
    made = [
        ProjectionHead(width, device="meta", **head.model_dump())
        for head in (heads.dino, heads.ibot)
    ]
    assert tuple(num_parameters(head) for head in made) == published


@pytest.mark.parametrize(
    "name", [n for n in DISTILLED if n.split("/")[0] not in ("demo", "smoke_cpu")]
)
def test_students_have_the_heads_of_their_teacher(name):
    """Prototypes are the teacher's: without as many there is nothing to follow."""
    teacher = {"vits_1gpu": "vits_1gpu", "vitl_1gpu": "vitl_1gpu", "default": "default"}
    heads = load_recipe(teacher.get(name.split("/")[0], "vit7b16")).heads
    for student in load_recipe(name).students.values():
        assert student.heads == heads


@pytest.mark.parametrize("name", DISTILLED)
def test_student_crops_have_the_teachers_grid(name):
    """Student crop = teacher crop x student stride / teacher patch."""
    config = load_recipe(name)
    patch = {"demo": 8, "smoke_cpu": 8}.get(name.split("/")[0], 16)
    for student in config.students.values():
        grid = student.crops.global_size // student.model.stride
        assert grid == config.crops.global_size // patch


@pytest.mark.parametrize("name", TRAINED)
def test_positions_are_computed_in_full_precision(name):
    """But in the released fast recipe, which is the default, and asks for bf16."""
    asks_for_bf16 = name.split("/")[0] in ("default", "vitl16_im1k")
    assert load_recipe(name).model.rope_dtype == ("bf16" if asks_for_bf16 else "fp32")


@pytest.mark.parametrize("name", DISTILLED)
def test_positions_of_students_are_computed_in_full_precision(name):
    models = [student.model for student in load_recipe(name).students.values()]
    assert {model.rope_dtype for model in models if model.arch == "vit"} <= {"fp32"}


def lr_at(config, step, schedules=None, optim=None, batch_size=None):
    """Learning rate of a step, with the batch's factor."""
    part = (schedules or config.schedules).lr
    rule = (optim or config.optim).lr_scaling
    size = batch_size or config.optim.batch_size
    return value_at(part, config.schedules.num_steps, step, scaled_lr(rule, 1.0, size))


def value_at(part, num_steps, step, scale=1.0):
    return Schedule(
        part.start,
        part.peak * scale,
        part.end * scale,
        part.warmup_steps,
        num_steps,
        cosine_steps=part.cosine_steps,
    )(step)


RATES = [  # recipe, step, published effective rate
    ("vitl16_im1k/pretrain", 0, 0.0),
    ("vitl16_im1k/pretrain", 6_250, 2.8284e-3),
    ("vitl16_im1k/pretrain", 12_500, 5.65685e-3),
    ("vitl16_im1k/pretrain", 125_000, 1e-6),
    ("vit7b16/pretrain", 50_000, 2e-4),
    ("vit7b16/pretrain", 100_000, 4e-4),
    ("vit7b16/pretrain", 999_999, 4e-4),
    ("vit7b16/gram", 1_000, 2.4e-4),
    ("vit7b16/gram", 199_999, 2.4e-4),
    ("vit7b16/highres", 0, 0.0),
    ("vit7b16/highres", 10_000, 7.07107e-5),
    ("vit7b16/highres", 29_999, 7.07107e-5),
    ("vit7b16_sat/highres", 7_999, 7.07107e-5),
    ("vits_1gpu/pretrain", 12_500, 2.82843e-3),
    ("vitl_1gpu/pretrain", 12_500, 2e-3),
    ("vits_1gpu/highres", 2_500, 5.65685e-5),
]


@pytest.mark.parametrize(("name", "step", "rate"), RATES)
def test_learning_rates_are_the_published_ones(name, step, rate):
    assert lr_at(load_recipe(name), step) == pytest.approx(rate, rel=1e-5)


STUDENT_RATES = [  # recipe, student, step, effective rate
    ("vitl16_distilled/distill", "vitl", 0, 0.0),
    ("vitl16_distilled/distill", "vitl", 12_500, 2.73861e-4),
    ("vitl16_distilled/distill", "vits", 24_999, 2.73861e-4),
    ("vit7b16/distill", "vithplus", 500_000, 4e-4),
    ("convnext_distilled/distill", "tiny", 0, 1e-6),
    ("convnext_distilled/distill", "tiny", 100_000, 1.6e-3),
    ("convnext_distilled/distill", "large", 100_000, 8e-4),
    ("convnext_distilled/distill", "large", 625_000, 8e-6),
]


@pytest.mark.parametrize(("name", "student", "step", "rate"), STUDENT_RATES)
def test_learning_rates_of_students_are_the_published_ones(name, student, step, rate):
    config = load_recipe(name)
    own = config.students[student]
    found = lr_at(config, step, own.schedules, own.optim, config.batch_size)
    assert found == pytest.approx(rate, rel=1e-5)


SCHEDULES = [  # recipe, schedule, step, value; step 0 of later phases is step 1 000 000 there
    ("vitl16_im1k/pretrain", "momentum", 0, 0.992),
    ("vitl16_im1k/pretrain", "momentum", 125_000, 1.0),
    ("vitl16_im1k/pretrain", "weight_decay", 125_000, 0.4),
    ("vitl16_im1k/pretrain", "teacher_temperature", 37_500, 0.07),
    ("vit7b16/pretrain", "weight_decay", 700_000, 0.04),
    ("vit7b16/pretrain", "teacher_temperature", 50_000, 0.055),
    ("vit7b16/pretrain", "momentum", 999_999, 0.994),
    ("vit7b16/pretrain", "local_loss_weight", 999_999, 1.0),
    ("vit7b16/gram", "momentum", 0, 0.999),
    ("vit7b16/gram", "teacher_temperature", 0, 0.07),
    ("vit7b16/gram", "local_loss_weight", 0, 1.0),
    ("vit7b16/gram", "local_loss_weight", 1_000, 0.5),
    ("vit7b16/highres", "local_loss_weight", 0, 0.5),
    ("vit7b16/highres", "momentum", 0, 0.999),
]


@pytest.mark.parametrize(("name", "schedule", "step", "value"), SCHEDULES)
def test_schedules_are_the_published_ones(name, schedule, step, value):
    schedules = load_recipe(name).schedules
    found = value_at(getattr(schedules, schedule), schedules.num_steps, step)
    assert found == pytest.approx(value, rel=1e-9)


def test_schedules_of_convnext_students_are_the_published_ones():
    config = load_recipe("convnext_distilled/distill")
    length = config.schedules.num_steps
    tiny, base = (config.students[name].schedules for name in ("tiny", "base"))
    assert length == 500 * 1250
    assert value_at(tiny.weight_decay, length, length // 2) == pytest.approx(0.12)
    assert value_at(base.weight_decay, length, 0) == pytest.approx(0.02)
    assert value_at(tiny.momentum, length, length // 2) == pytest.approx(0.997)
    assert value_at(config.schedules.teacher_temperature, length, 75_000) == pytest.approx(0.055)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("vit7b16/gram", {0: 0.0, 500: 1.0, 1_000: 2.0, 199_999: 2.0}),
        ("vit7b16/highres", {0: 1.5, 29_999: 1.5}),
    ],
)
def test_the_gram_term_weighs_what_was_published(name, weights):
    config = load_recipe(name)
    part, length = config.gram.weight, config.schedules.num_steps
    assert {step: value_at(part, length, step) for step in weights} == pytest.approx(
        weights, rel=1e-2
    )


def test_the_gram_teacher_of_the_7b_is_refreshed_three_times():
    gram = load_recipe("vit7b16/gram").gram
    assert gram.refresh.model_dump() == {"first": 10_000, "every": 10_000, "max_updates": 3}
    assert (gram.normalize, gram.image_level) == (True, True)
    assert load_recipe("vit7b16/highres").gram.refresh is None


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("vitl16_im1k/pretrain", [(224, 96, None, 1.0)]),
        ("vit7b16/pretrain", [(256, 112, None, 1.0)]),
        ("vit7b16/gram", [(256, 112, 512, 1.0)]),
        (
            "vit7b16/highres",
            [
                (512, 112, 768, 0.3),
                (768, 112, 1152, 0.3),
                (768, 160, 1152, 0.3),
                (768, 224, 1152, 0.05),
                (768, 336, 1152, 0.05),
            ],
        ),
        ("vit7b16_sat/pretrain", [(256, 112, None, 1.0)]),
        ("vit7b16_sat/highres", [(512, 112, 768, 1.0)]),
    ],
)
def test_crops_have_the_published_sizes_and_odds(name, sizes):
    assert [tuple(size) for size in load_recipe(name).crops.resolutions] == sizes


def test_convnext_students_see_twice_the_teachers_crops():
    config = load_recipe("convnext_distilled/distill")
    assert config.crops.global_size == 256
    assert {tuple(dict(s.crops).values()) for s in config.students.values()} == {(512, 224)}


@pytest.mark.parametrize("name", ["vit7b16_sat/pretrain", "vit7b16_sat/gram", "vitl16_sat/distill"])
def test_satellite_recipes_normalise_as_released(name):
    crops = load_recipe(name).crops
    assert (crops.mean, crops.std) == ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))


@pytest.mark.parametrize(
    ("phase", "steps"), [("pretrain", 100_000), ("gram", 10_000), ("highres", 8_000)]
)
def test_satellite_phases_have_the_published_lengths(phase, steps):
    assert load_recipe("vit7b16_sat", phase=phase).schedules.num_steps == steps


def test_the_released_text_alignment_is_what_the_recipe_says():
    config = load_recipe("dinotxt_vitl16/dinotxt")
    assert isinstance(config, DinotxtConfig)
    assert (config.seed, config.optim.batch_size, config.schedules.num_steps) == (11, 8192, 50_000)
    assert value_at(config.schedules.lr, 50_000, 2_000) == pytest.approx(7e-4)
    assert value_at(config.schedules.lr, 50_000, 50_000) == 0.0
