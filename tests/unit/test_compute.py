"""Compute options change memory and speed, not results.

Run by torchrun, this file is a rank of a small FSDP job that writes down what it has computed.
"""

import copy
import json
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dinov3.config import ComputeConfig
from dinov3.distributed import blocks_of, join_world, rank, shard, whole
from dinov3.errors import ConfigError
from dinov3.heads.projection import ProjectionHead
from dinov3.layers.attention import KeyMaskedLinear
from dinov3.layers.block import Block
from dinov3.layers.fp8 import Fp8Linear, linear, quantize_rows, quantize_whole, use_fp8
from dinov3.models.backbone import build_backbone
from dinov3.train.compute import prepare
from dinov3.train.optim import build_adamw, parameter_groups

CPU = torch.device("cpu")
VIT: dict[str, Any] = {
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "patch_size": 8,
    "layerscale": 0.1,
    "drop_path": 0.3,
    "rope_shift": 0.2,
    "rope_jitter": 1.2,
    "rope_rescale": 2.0,
}
CONVNEXT: dict[str, Any] = {
    "arch": "convnext",
    "depths": (1, 1, 2, 1),
    "dims": (16, 16, 32, 32),
    "drop_path": 0.3,
    "layerscale": 0.5,
}
CHECKPOINTING = ("none", "selective", "full")


def options(**fields: Any) -> ComputeConfig:
    plain = {"dtype": "fp32", "compile": False, "checkpointing": "none", "fp8": False}
    return ComputeConfig(**{**plain, **fields})


def build(model: dict[str, Any] = VIT) -> list[nn.Module]:
    """A backbone and a head with weights of seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone = build_backbone(model)
        return [backbone.train(), ProjectionHead(32, 24, hidden_dim=48, bottleneck_dim=16)]


def prepared(model: dict[str, Any] = VIT, *, trains: bool = True, **fields: Any) -> list[nn.Module]:
    parts = build(model)
    prepare(parts, options(**fields), CPU, trains=trains)
    return parts


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loss_of(parts: list[nn.Module], step: int = 0, seed: int = 0) -> Tensor:
    """A loss of global and local crops that every parameter has a part in."""
    backbone, head = parts
    backbone.set_generator(torch.Generator().manual_seed(step))
    size = 64 if hasattr(backbone, "stages") else 24
    crops = [pictures(4, 3, size, size, seed=seed), pictures(4, 3, size // 2, size // 2, seed=seed)]
    of_global, of_local = backbone.forward_features(crops)
    logits = head(torch.cat([of_global["x_norm_clstoken"], of_local["x_norm_clstoken"]]))
    patches = head(of_global["x_norm_patchtokens"].flatten(0, 1))
    return logits.float().square().mean() + patches.float()[:, ::2].logsumexp(1).mean()


def gradients(parts: list[nn.Module]) -> list[Tensor | None]:
    return [each.grad for part in parts for each in part.parameters()]


def kept_bytes(parts: list[nn.Module]) -> int:
    """Bytes that a forward pass keeps for the backward pass outside of checkpointed blocks."""
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(parts)
    return sum(sizes)


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
@pytest.mark.parametrize("model", [VIT, CONVNEXT], ids=["vit", "convnext"])
def test_checkpointing_changes_neither_loss_nor_gradients(model, checkpointing):
    plain, recomputed = prepared(model), prepared(model, checkpointing=checkpointing)
    losses = [loss_of(parts, step=5) for parts in (plain, recomputed)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    found = list(zip(gradients(plain), gradients(recomputed), strict=True))
    assert all((a is None) == (b is None) for a, b in found)
    assert all(torch.equal(a, b) for a, b in found if a is not None)
    assert not torch.equal(loss_of(plain, step=6), losses[0])  # the step's draws do matter


def test_full_checkpointing_repeats_the_forward_pass_and_selective_not_its_products():
    flops = {}
    for kind in CHECKPOINTING:
        parts = prepared(checkpointing=kind)
        loss = loss_of(parts)
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        flops[kind] = counter.get_total_flops()
    assert flops["none"] == flops["selective"] < flops["full"]


def test_checkpointed_blocks_keep_few_activations():
    assert kept_bytes(prepared(checkpointing="full")) < 0.5 * kept_bytes(prepared())


@pytest.mark.parametrize("model", [VIT, CONVNEXT], ids=["vit", "convnext"])
def test_options_keep_names_and_kinds(model):
    plain, changed = build(model), prepared(model, checkpointing="selective", compile=True)
    assert sum(use_fp8(block) for part in changed for block in blocks_of(part)) > 0
    for one, other in zip(plain, changed, strict=True):
        assert list(one.state_dict()) == list(other.state_dict())
        assert all(
            isinstance(b, type(a)) for a, b in zip(blocks_of(one), blocks_of(other), strict=True)
        )


def test_a_copy_computes_with_its_own_weights():
    parts = prepared(checkpointing="full")
    twins = copy.deepcopy(parts)
    with torch.no_grad():
        twins[0].blocks[0].mlp.fc1.weight.zero_()
    assert torch.equal(loss_of(parts), loss_of(prepared()))
    assert not torch.equal(loss_of(twins), loss_of(prepared()))


def test_networks_that_do_not_train_are_not_checkpointed():
    blocks = prepared(trains=False, checkpointing="full")[0].blocks
    assert {type(block) for block in blocks} == {Block}


def test_checkpointed_blocks_infer_as_before():
    with torch.no_grad():
        assert torch.equal(loss_of(prepared(checkpointing="full")), loss_of(prepared()))


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()


def has_compiler() -> bool:
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return header.exists() and any(shutil.which(name) for name in ("g++", "c++", "clang++"))


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler or no Python headers")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_blocks_equal_eager_ones():
    small = {**VIT, "depth": 2, "rope_rescale": None, "drop_path": 0.0, "layerscale": None}
    (plain, _), (compiled, _) = prepared(small), prepared(small, compile=True)
    x = pictures(2, 3, 16, 16)
    outputs = [backbone.eval()(x) for backbone in (plain, compiled)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)
    for output in outputs:
        output[:, ::2].square().mean().backward()
    pairs = list(zip(gradients([plain]), gradients([compiled]), strict=True))
    assert all(relative(found, exact) < 1e-5 for exact, found in pairs if exact.any())


def test_fused_adamw_equals_the_plain_one_on_a_cpu():
    parts = build()[:1]
    twins = copy.deepcopy(parts)
    fused = build_adamw(parameter_groups(parts[0], name="backbone"), (0.9, 0.99))
    plain = torch.optim.AdamW(
        parameter_groups(twins[0], name="backbone"), betas=(0.9, 0.99), fused=False, foreach=False
    )
    for optimizer in (fused, plain):
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = 1e-3, 0.04 * group["wd_mult"]
    assert fused.defaults["fused"]
    for step in range(5):
        for module, optimizer in ((parts[0], fused), (twins[0], plain)):
            module.set_generator(torch.Generator().manual_seed(step))
            module(pictures(4, 3, 16, 16, seed=step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(parts[0].parameters(), twins[0].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("magnitude", [1e-20, 1e-4, 1.0, 1e6])
def test_quantised_rows_are_within_the_rounding_of_fp8(magnitude):
    x = pictures(6, 64) * magnitude * torch.logspace(-3, 3, 6)[:, None]
    values, scale = quantize_rows(x)
    assert values.dtype == torch.float8_e4m3fn
    amax = x.abs().amax(1, keepdim=True).clamp(min=1e-12)
    torch.testing.assert_close(scale, amax / 448)
    error = (values.float() * scale - x).abs()
    # 3 bits of mantissa; below the smallest normal number 2^-6 steps are 2^-9
    assert (error <= x.abs() / 16 * 1.001 + scale * 2**-10).all()
    assert error.max() > 0


def test_rows_of_zeros_stay_zeros():
    values, scale = quantize_rows(torch.zeros(2, 16))
    assert not (values.float() * scale).any()


def test_a_matrix_quantised_whole_has_one_scale():
    x = pictures(3, 16)
    values, scale = quantize_whole(x)
    assert scale.shape == (3, 1)
    assert scale.unique().tolist() == [(x.abs().max() / 448).item()]
    assert values.float().abs().max() == 448


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_layer_and_its_gradients_stay_within_the_rounding_error(dtype):
    exact = nn.Linear(64, 96).to(dtype)
    rounded = copy.deepcopy(exact)
    assert use_fp8(rounded) == 1
    x = pictures(2, 5, 64).to(dtype)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [layer(each) for layer, each in zip((exact, rounded), inputs, strict=True)]
    for output in outputs:
        output.backward(pictures(2, 5, 96, seed=1).to(dtype))
    assert outputs[1].dtype == inputs[1].grad.dtype == rounded.weight.grad.dtype == dtype
    assert 0.005 < relative(outputs[1], outputs[0]) < 0.06  # fp8 was used, and used well
    assert 0.005 < relative(inputs[1].grad, inputs[0].grad) < 0.06
    assert relative(rounded.weight.grad, exact.weight.grad) < 0.005  # bf16
    assert torch.equal(rounded.bias.grad, exact.bias.grad)


def test_fp8_products_are_those_of_the_rounded_factors():
    x, weight = pictures(7, 32), pictures(48, 32, seed=1)
    (a, of_a), (b, of_b) = quantize_rows(x), quantize_rows(weight)
    exact = (a.float() * of_a) @ (b.float() * of_b).T
    torch.testing.assert_close(linear(x, weight, None), exact, rtol=2**-8, atol=1e-5)  # bf16


def test_fp8_projection_holds_the_key_bias_at_zero():
    layer = KeyMaskedLinear(16)
    layer.fill_mask()
    nn.init.constant_(layer.bias, 3.0)
    use_fp8(layer)
    output = layer(torch.zeros(1, 16))
    assert output[0].tolist() == [3.0] * 16 + [0.0] * 16 + [3.0] * 16


def test_fp8_shares_parameters_and_spares_what_lies_outside_the_blocks():
    backbone, head = build()
    weight = backbone.blocks[0].mlp.fc1.weight
    assert sum(use_fp8(block) for block in backbone.blocks) == 3 * 4
    assert isinstance(backbone.blocks[0].mlp.fc1, Fp8Linear)
    assert backbone.blocks[0].mlp.fc1.weight is weight
    assert not any(isinstance(module, Fp8Linear) for module in head.modules())


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_fp8_and_checkpointing_work_together(checkpointing):
    plain, recomputed = prepared(), prepared(checkpointing=checkpointing)
    for parts in (plain, recomputed):
        for block in parts[0].blocks:
            use_fp8(block)
        loss_of(parts).backward()
    pairs = zip(gradients(plain), gradients(recomputed), strict=True)
    assert all(a is b or torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("trains", [True, False])
def test_fp8_is_refused_without_the_hardware(trains):
    message = "compute.fp8: needs a CUDA device of compute capability 8.9 or newer, got cpu"
    with pytest.raises(ConfigError, match=message):
        prepared(fp8=True, trains=trains)


def test_features_that_fp8_units_cannot_multiply_are_refused():
    block = build_backbone({**VIT, "embed_dim": 24, "ffn": "swiglu"}).blocks[0]
    with pytest.raises(ConfigError, match=r"fp8: .* multiples of 16, got 24 to 72 in attn\.qkv"):
        use_fp8(block)


def run_rank(checkpointing: str, dtype: str) -> dict[str, Any]:
    """Losses of three steps under FSDP, the final weights, and the dtypes met on the way."""
    parts, seen = build(), {}
    compute = options(checkpointing=checkpointing, dtype=dtype)
    prepare(parts, compute, CPU, trains=True)
    shard(parts, CPU, dtype=torch.bfloat16 if dtype == "bf16" else None)

    def look(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen["activations"], seen["rotations"] = str(inputs[0].dtype), str(inputs[2][0].cos.dtype)

    parts[0].blocks[0].attn.register_forward_pre_hook(look)
    groups = [group for part in parts for group in parameter_groups(part, name="part")]
    optimizer = build_adamw(groups, (0.9, 0.99))
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    losses = []
    for step in range(3):
        loss = loss_of(parts, step=step, seed=rank())
        loss.backward()
        optimizer.step()
        seen["gradients"] = dtypes_of(gradients(parts))
        optimizer.zero_grad()
        losses.append(loss.item())
    parameters = [each for part in parts for each in part.parameters()]
    seen["shards"] = dtypes_of(parameters)
    return {"losses": losses, "weights": [digest(each) for each in parameters], "seen": seen}


def dtypes_of(tensors: Iterable[Tensor | None]) -> list[str]:
    return sorted({str(each.dtype) for each in tensors if each is not None})


def digest(parameter: Tensor) -> list[float]:
    full = whole(parameter.detach()).double()
    return [full.sum().item(), full.square().sum().item(), full.flatten()[0].item()]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two gloo ranks has computed."""
    folder = tmp_path_factory.mktemp("ranks")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, __file__, str(folder)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(2)]


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_checkpointing_changes_nothing_under_fsdp(ranks, checkpointing):
    for found in ranks:
        assert found[checkpointing]["losses"] == found["none"]["losses"]
        assert found[checkpointing]["weights"] == found["none"]["weights"]
    assert ranks[0]["none"]["weights"] == ranks[1]["none"]["weights"]
    assert ranks[0]["none"]["losses"] != ranks[1]["none"]["losses"]  # their pictures differ


def test_bf16_trains_fp32_shards(ranks):
    seen = ranks[0]["bf16"]["seen"]
    assert seen["shards"] == seen["gradients"] == ["torch.float32"]
    assert seen["activations"] == "torch.bfloat16"
    losses = torch.tensor(ranks[0]["bf16"]["losses"])
    exact = torch.tensor(ranks[0]["none"]["losses"])
    torch.testing.assert_close(losses, exact, rtol=0, atol=0.05)
    assert not torch.equal(losses, exact)


def test_bf16_keeps_positions_in_fp32(ranks):
    assert ranks[0]["bf16"]["seen"]["rotations"] == "torch.float32"


def main() -> None:
    torch.set_num_threads(1)
    with join_world(CPU):
        found = {kind: run_rank(kind, "fp32") for kind in CHECKPOINTING}
        found["bf16"] = run_rank("selective", "bf16")
        Path(sys.argv[1], f"{rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
