"""Plans: bytes as FSDP2 really allocates them, operations as published, and what is refused.

Run by torchrun, this file is a rank of a small FSDP job that writes down what it has allocated.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dinov3.config import DinotxtConfig, DistillConfig, TrainConfig
from dinov3.distributed import join_world, rank, shard
from dinov3.errors import ConfigError
from dinov3.plan import Frozen, frozen_of, plan, plan_recipe, render
from dinov3.plan.networks import build_network
from dinov3.plan.sharding import shard_of
from dinov3.plan.work import backbone_pass
from dinov3.recipe import load_recipe
from dinov3.train.students import group_sizes

ODD_SIZES = [  # rows that two ranks do not share evenly, so that padding shows
    "model.embed_dim=24",
    "model.num_registers=1",
    "model.qkv_bias=false",
    "heads.dino={num_prototypes: 51, hidden_dim: 37, bottleneck_dim: 17}",
    "heads.ibot={num_prototypes: 33, hidden_dim: 32, bottleneck_dim: 9}",
]
STUDENTS = ("vits", "vitsplus", "vitb", "vitl", "vithplus")
STUDENT_OF_VITL = "vitl16_distilled/distill:vitl"
GFLOPS = {  # paper, figure 16a: at 256 and at 512 pixels
    "vit7b16/distill:vits": (12, 63),
    "vit7b16/distill:vitsplus": (16, 79),
    "vit7b16/distill:vitb": (47, 216),
    "vit7b16/distill:vitl": (163, 721),
    "vit7b16/distill:vithplus": (450, 1903),
    "vit7b16/pretrain": (3550, 14515),
}


def train_config(*overrides):
    config = load_recipe("smoke_cpu/gram", overrides)
    assert isinstance(config, TrainConfig)
    return config


def stored_bytes(tensors):
    """Bytes behind tensors, each storage once."""
    storages = {}
    for tensor in tensors:
        storage = tensor.to_local().untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def allocated(dtype):
    """One step of a real sharded student beside an EMA and a Gram teacher."""
    config = train_config(*ODD_SIZES)
    networks = [build_network(config.model, config.heads, device="cpu") for _ in range(2)]
    gram = build_network(config.model, None, device="cpu")
    kind = torch.bfloat16 if dtype == "bf16" else None
    for network in (*networks, gram):
        shard(network.parts().values(), torch.device("cpu"), dtype=kind)
    student, ema, gram_teacher = (
        [p for part in network.parts().values() for p in part.parameters()]
        for network in (*networks, gram)
    )
    features = networks[0].backbone.forward_features(torch.zeros(2, 3, 16, 16))
    cls = networks[0].heads["dino_head"](features["x_norm_clstoken"])
    patches = networks[0].heads["ibot_head"](features["x_norm_patchtokens"].flatten(0, 1))
    (cls.sum() + patches.sum()).backward()
    optimizer = torch.optim.AdamW(student)
    optimizer.step()
    states = optimizer.state.values()
    return {
        "weights": stored_bytes(student),
        "gradients": stored_bytes(p.grad for p in student),
        "moments": stored_bytes(s[key] for s in states for key in ("exp_avg", "exp_avg_sq")),
        "EMA": stored_bytes(ema),
        "Gram teacher": stored_bytes(gram_teacher),
    }


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What each of two gloo ranks has allocated, by dtype."""
    folder = tmp_path_factory.mktemp("ranks")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launcher, __file__, str(folder)], check=True, capture_output=True)
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(2)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_bytes_are_those_the_fullest_rank_allocates(measured, dtype):
    planned = plan(train_config(*ODD_SIZES, f"compute.dtype={dtype}"), world_size=2)
    memory = planned.groups[0].memory
    assert {name: memory[name] for name in measured[0][dtype]} == measured[0][dtype]


def test_the_last_rank_pads_all_but_its_moments(measured):
    first, last = measured[0]["fp32"], measured[1]["fp32"]
    assert last["moments"] < first["moments"]
    assert {**last, "moments": first["moments"]} == first


@pytest.mark.parametrize("number", [0, 1])
def test_moments_are_those_each_rank_allocates(measured, number):
    config = train_config(*ODD_SIZES)
    parts = build_network(config.model, config.heads).parts().values()
    sharded = shard_of(parts, world_size=2, dtype="fp32")
    assert sharded.moment_bytes(number) == measured[number]["fp32"]["moments"]


def test_one_rank_stores_everything_and_talks_to_nobody():
    config = train_config()
    group = plan(config, world_size=1).groups[0]
    assert group.memory["weights"] == 4 * sum(group.parameters.values())
    assert group.memory["moments"] == 2 * group.memory["weights"]
    assert group.total_traffic == 0


def test_ranks_share_memory_and_operations():
    config = load_recipe("vitl16_im1k")
    few, many = (plan(config, world_size=n).groups[0] for n in (8, 32))
    assert many.rank_flops == pytest.approx(few.rank_flops / 4)
    assert many.memory["weights"] == pytest.approx(few.memory["weights"] / 4, rel=1e-3)
    assert many.memory["activations"] == pytest.approx(few.memory["activations"] / 4)


def test_micro_batches_lower_memory_and_cost_traffic():
    whole = plan(load_recipe("vitl16_im1k"), world_size=8)
    parted = plan(load_recipe("vitl16_im1k", ["run.micro_batches=4"]), world_size=8)
    assert parted.groups[0].memory["activations"] * 4 == whole.groups[0].memory["activations"]
    assert parted.groups[0].total_traffic == 4 * whole.groups[0].total_traffic
    assert parted.step_flops == whole.step_flops


def test_checkpointing_trades_memory_for_operations():
    modes = ("none", "selective", "full")
    plans = [
        plan(load_recipe("vit7b16", [f"compute.checkpointing={mode}"]), world_size=256)
        for mode in modes
    ]
    kept = [each.groups[0].memory["activations"] for each in plans]
    assert kept[0] > kept[1] > kept[2]
    assert plans[0].step_flops == plans[1].step_flops < plans[2].step_flops


def test_traffic_of_a_step_is_what_its_collectives_move():
    """The student comes twice (forward, backward), the EMA once; gradients return in fp32."""
    config = train_config("gram=null", "crops.gram_size=null", "compute.dtype=bf16")
    total = sum(build_network(config.model, config.heads).sizes().values())
    traffic = plan(config, world_size=2).groups[0].traffic
    received = {"student gathered": 2 * 2, "EMA gathered": 2, "gradients reduced": 4}
    for name, num_bytes in received.items():
        assert traffic[name] == pytest.approx(total * num_bytes / 2, rel=0.01)


@pytest.mark.parametrize(("name", "published"), GFLOPS.items())
def test_operations_of_a_forward_pass_are_the_published_ones(name, published):
    backbone = frozen_of(name).build().backbone
    counted = [backbone_pass(backbone, size).flops / 1e9 for size in (256, 512)]
    assert counted == pytest.approx(published, rel=0.045)


def saved_bytes(model, images):
    """What autograd keeps of a forward pass, parameters aside."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        features = model.forward_features(images)
    assert features["x_prenorm"].requires_grad
    return sum(size for pointer, size in kept.items() if pointer not in own)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("demo/distill:vits", {}),
        ("demo/distill:vits", {"ffn": "swiglu", "ffn_ratio": 6.0}),
        ("demo/distill:convnext", {}),
    ],
)
def test_activations_are_about_what_autograd_keeps(name, changes):
    fields = frozen_of(name).model.model_copy(update=changes)
    model = build_network(fields, None, device="cpu").backbone.train()
    estimate = 4 * 2 * backbone_pass(model, 96).kept
    assert estimate == pytest.approx(saved_bytes(model, torch.randn(2, 3, 96, 96)), rel=0.1)


def test_pretraining_the_7b_takes_the_time_the_paper_reports():
    """61 440 accelerator hours, of which fp8 has its part: 57 % of the bf16 peak."""
    planned = plan(load_recipe("vit7b16"), world_size=256, utilisation=0.57)
    assert planned.total_seconds / 3600 * 256 == pytest.approx(61_440, rel=0.05)


def test_the_fast_recipe_takes_the_time_its_authors_report():
    """.57 s per step on 32 accelerators: 13 % of the peak."""
    planned = plan(load_recipe("vitl16_im1k"), world_size=32, utilisation=0.13)
    assert planned.step_seconds == pytest.approx(0.57, rel=0.05)


def test_operations_of_training_are_those_of_its_parts():
    """Teacher once, student three times, on a recipe without heads' weight in it."""
    config = load_recipe("vit7b16", ["model.drop_path=0.0"])
    backbone = build_network(config.model, None).backbone
    seen, local = (backbone_pass(backbone, size).flops for size in (256, 112))
    expected = 4096 * (2 * seen + 3 * (2 * seen + 8 * local))
    assert plan(config, world_size=256).step_flops == pytest.approx(expected, rel=0.03)


def test_distillation_groups_hold_their_student_and_a_share_of_the_teacher():
    config = load_recipe("vitl16_distilled/distill")
    planned = plan(config, world_size=296, frozen=frozen_of("vit7b16/pretrain"))
    assert {g.name: g.num_ranks for g in planned.groups} == {
        "vits": 48, "vitsplus": 48, "vitb": 80, "vitl": 120,
    }  # fmt: skip
    teacher = {g.memory["teacher"] for g in planned.groups}
    assert len(teacher) == 1
    assert teacher.pop() == pytest.approx(4 * planned.frozen_parameters / 296, rel=0.02)


def test_ranks_are_shared_out_by_cost():
    config = load_recipe("vit7b16/distill", [f"students.{name}.ranks=null" for name in STUDENTS])
    assert isinstance(config, DistillConfig)
    planned = plan(config, world_size=16, frozen=frozen_of("vit7b16/pretrain"))
    assert [group.name for group in planned.groups] == list(config.students)
    assert [group.num_ranks for group in planned.groups] == group_sizes(config, 16)


def test_fewer_ranks_than_students_train_all_of_them_together():
    config = load_recipe("vit7b16/distill", [f"students.{name}.ranks=null" for name in STUDENTS])
    teacher = frozen_of("vit7b16/pretrain")
    one, two = (plan(config, world_size=n, frozen=teacher).groups for n in (1, 2))
    assert [group.num_ranks for group in (*one, *two)] == [1, 2]
    assert two[0].parameters == one[0].parameters
    assert two[0].rank_flops == pytest.approx(one[0].rank_flops / 2)
    assert two[0].traffic["teacher features"] == 0


def test_students_receive_the_bottleneck_features_of_the_whole_batch():
    """In fp32: two CLS features, and on average so many masked patches of each image."""
    config, teacher = load_recipe("smoke_cpu/distill"), frozen_of("smoke_cpu/pretrain")
    assert isinstance(config, DistillConfig)
    assert teacher.heads is not None
    side = config.crops.global_size // teacher.model.stride
    masked = 2 * side**2 * config.masks.probability * sum(config.masks.ratio) / 2
    numbers = 2 * teacher.heads.dino.bottleneck_dim + masked * teacher.heads.ibot.bottleneck_dim
    for group in plan(config, world_size=2, frozen=teacher).groups:
        from_the_other = 4 * config.batch_size / 2 * numbers
        assert group.traffic["teacher features"] == pytest.approx(from_the_other)


def test_students_that_share_a_teacher_save_one_pass_of_it():
    frozen = frozen_of("vitl_1gpu/pretrain")
    both = load_recipe("vitl_1gpu/distill")
    apart = [
        both.model_copy(update={"students": {name: both.students[name]}}) for name in both.students
    ]
    together = plan(both, world_size=1, frozen=frozen).step_flops
    separate = sum(plan(each, world_size=1, frozen=frozen).step_flops for each in apart)
    one_pass = 2 * 256 * backbone_pass(frozen.build().backbone, 256).flops
    assert separate - together == pytest.approx(one_pass, rel=0.05)


def test_a_teacher_without_heads_is_planned():
    config = load_recipe("vits_1gpu/distill", ["objective=features"])
    teacher = Frozen(frozen_of("vits_1gpu/pretrain").model, None)
    sizes = plan(config, world_size=1, frozen=teacher).groups[0].parameters
    assert sizes["vits.dino_head"] == 192 * 384 + 384


def test_text_alignment_holds_the_published_number_of_parameters():
    config = load_recipe("dinotxt_vitl16/dinotxt")
    assert isinstance(config, DinotxtConfig)
    planned = plan(config, world_size=32, frozen=frozen_of(STUDENT_OF_VITL))
    assert sum(planned.groups[0].parameters.values()) + 1 == 563_457_537  # with the logit scale
    assert planned.frozen_parameters == 303_154_176


def test_text_of_a_plan_names_every_figure():
    text = render(plan(load_recipe("vit7b16"), world_size=256))
    for word in ("6,716.04 M", "weights", "moments", "gradients reduced", "images per second"):
        assert word in text


@pytest.mark.parametrize(
    ("name", "changes", "options", "message"),
    [
        ("demo/evals", [], {}, "recipe: only phases that train can be planned, got evals"),
        ("demo", [], {"world_size": 0}, "world_size: must be at least 1, got 0"),
        ("demo", [], {"world_size": 3}, r"optim\.batch_size: 3 ranks of 1 micro-batches do not"),
        ("demo", [], {"utilisation": 0.0}, r"utilisation: must lie in \(0, 1\], got 0\.0"),
        ("demo", [], {"peak_flops": -1.0}, r"peak_flops: must be positive, got -1\.0"),
        ("demo/distill", [], {}, "teacher: this phase needs a frozen network, got none"),
    ],
)
def test_what_cannot_be_planned_is_refused(name, changes, options, message):
    with pytest.raises(ConfigError, match=message):
        plan(load_recipe(name, changes), **{"world_size": 1, **options})


def test_options_and_overrides_are_told_apart():
    planned = plan_recipe("vitl16_im1k", ["world_size=8", "utilisation=.5", "optim.batch_size=512"])
    assert (planned.world_size, planned.utilisation, planned.batch_size) == (8, 0.5, 512)


def test_a_teacher_is_named_on_the_command_line():
    planned = plan_recipe("vitl_1gpu/distill", ["teacher=vitl_1gpu/pretrain"])
    assert planned.frozen_parameters > 303_154_176


def test_an_option_that_is_no_number_is_refused():
    with pytest.raises(ConfigError, match="world_size: not a number, got 'many'"):
        plan_recipe("demo", ["world_size=many"])


def test_ranks_that_are_not_those_of_the_recipe_are_refused():
    config = load_recipe("vitl16_distilled/distill")
    with pytest.raises(ConfigError, match="students: 256 ranks cannot be split among 4 students"):
        plan(config, world_size=256, frozen=frozen_of("vit7b16/pretrain"))


def test_an_unknown_teacher_is_refused():
    with pytest.raises(ConfigError, match=r"teacher: no such network, got 'demo/distill:big'"):
        frozen_of("demo/distill:big")


def documented():
    """Rows of the table in docs/recipes.md: recipe, ranks, frozen network, memory, step."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text()
    rows = re.findall(
        r"^\| `(\S+)` \| (\d+) \| (\S+) \| [^|]+ \| (.+) GiB \|.*\| (.+) s \|", text, re.M
    )
    return [
        (name, int(ranks), frozen.strip("`-"), *figures) for name, ranks, frozen, *figures in rows
    ]


@pytest.mark.parametrize(("name", "ranks", "frozen", "memory", "seconds"), documented())
def test_the_documented_estimates_are_those_of_the_plan(name, ranks, frozen, memory, seconds):
    network = frozen_of(frozen) if frozen else None
    planned = plan(load_recipe(name), world_size=ranks, frozen=network)
    fullest = max(group.total_memory for group in planned.groups)
    assert (f"{fullest / 2**30:.1f}", f"{planned.step_seconds:.2f}") == (memory, seconds)


def test_every_published_run_is_documented():
    assert len(documented()) >= 20


def main():
    """One rank: write down what was allocated."""
    with join_world(torch.device("cpu")):
        found = {dtype: allocated(dtype) for dtype in ("fp32", "bf16")}
        (Path(sys.argv[1]) / f"{rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
