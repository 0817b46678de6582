"""Compute options on an accelerator: what they may change in a result, and what they must save."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dinov3.config import ComputeConfig
from dinov3.distributed import join_world, shard
from dinov3.heads.projection import ProjectionHead
from dinov3.layers.fp8 import Fp8Linear, linear, require_fp8
from dinov3.models.backbone import build_backbone
from dinov3.train.compute import prepare
from dinov3.train.optim import build_adamw, parameter_groups

HAS_CUDA = torch.cuda.is_available()
HAS_FP8 = HAS_CUDA and torch.cuda.get_device_capability() >= (8, 9)
needs_fp8 = pytest.mark.skipif(not HAS_FP8, reason="no fp8 matrix units")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_CUDA, reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # the compiler's and FSDP's own
]

CUDA = torch.device("cuda", 0)
VIT: dict[str, Any] = {
    "embed_dim": 256,
    "depth": 4,
    "num_heads": 4,
    "patch_size": 16,
    "ffn": "swiglu64",
    "layerscale": 0.1,
    "drop_path": 0.3,
    "rope_rescale": 2.0,
}
ALL = {"dtype": "bf16", "compile": True, "checkpointing": "selective", "fp8": HAS_FP8}


@pytest.fixture(autouse=True)
def world() -> Iterator[None]:
    """A group of one, as the trainer makes it for mixed precision; nothing compiled before."""
    torch._dynamo.reset()
    counters.clear()
    with join_world(CUDA, alone=True):
        yield


def pictures(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(CUDA)


def build(model: dict[str, Any] = VIT, **fields: Any) -> list[nn.Module]:
    """A sharded backbone and head with weights of seed 0."""
    plain = {"dtype": "fp32", "compile": False, "checkpointing": "none", "fp8": False}
    compute = ComputeConfig(**{**plain, **fields})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = [build_backbone(model), ProjectionHead(256, 512, bottleneck_dim=64)]
    for part in parts:
        part.to(CUDA).train()
    prepare(parts, compute, CUDA, trains=True)
    shard(parts, CUDA, dtype=torch.bfloat16 if compute.dtype == "bf16" else None)
    return parts


def loss_of(parts: list[nn.Module], *, images: int = 4) -> Tensor:
    """A loss of packed global and local crops."""
    backbone, head = parts
    backbone.set_generator(torch.Generator().manual_seed(0))
    crops = [pictures(images, 3, 128, 128), pictures(images, 3, 64, 64)]
    of_global, of_local = backbone.forward_features(crops)
    logits = head(torch.cat([of_global["x_norm_clstoken"], of_local["x_norm_clstoken"]]))
    patches = head(of_global["x_norm_patchtokens"].flatten(0, 1))
    target = torch.arange(len(patches), device=CUDA) % 512
    loss: Tensor = nn.functional.cross_entropy(patches.float(), target)
    return loss + logits.float().square().mean()


def gradients(parts: list[nn.Module]) -> Tensor:
    found = [each.grad for part in parts for each in part.parameters() if each.grad is not None]
    return torch.cat([each.full_tensor().flatten() for each in found])


def relative(found: Tensor, exact: Tensor) -> float:
    return ((found.float() - exact.float()).norm() / exact.float().norm()).item()


def run(**fields: Any) -> tuple[float, Tensor]:
    parts = build(**fields)
    loss = loss_of(parts)
    loss.backward()
    return loss.item(), gradients(parts)


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_checkpointing_changes_no_result(checkpointing, dtype):
    (loss, gradient), (other, recomputed) = (
        run(dtype=dtype),
        run(dtype=dtype, checkpointing=checkpointing),
    )
    assert loss == pytest.approx(other, rel=1e-6)
    # attention sums its gradients in the order its threads finish
    assert relative(recomputed, gradient) < (1e-5 if dtype == "fp32" else 1e-2)


@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_compilation_changes_no_result(checkpointing):
    (loss, gradient), (other, compiled) = run(), run(compile=True, checkpointing=checkpointing)
    assert loss == pytest.approx(other, rel=1e-4)
    assert relative(compiled, gradient) < 1e-3


def test_bf16_trains_fp32_shards():
    (loss, gradient), (other, rounded) = run(), run(dtype="bf16")
    assert loss == pytest.approx(other, rel=1e-2)
    assert rounded.dtype == torch.float32
    assert relative(rounded, gradient) < 0.1


def test_everything_together_stays_near_full_precision_and_learns():
    exact, _ = run()
    parts = build(**ALL)
    groups = [group for part in parts for group in parameter_groups(part, name="part")]
    optimizer = build_adamw(groups, (0.9, 0.99))
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    losses = []
    for _ in range(20):
        loss = loss_of(parts)
        loss.backward()
        assert gradients(parts).isfinite().all()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(exact, rel=0.05)
    assert losses[-1] < 0.97 * losses[0]


def test_blocks_of_equal_shape_share_their_graphs():
    parts = build(compile=True)
    loss_of(parts).backward()
    with torch.no_grad():
        loss_of(parts)
    # all blocks as one, and the head for two numbers of rows, each with gradients and without
    assert counters["stats"]["unique_graphs"] <= 6
    assert not counters["graph_break"]


def test_checkpointing_saves_memory():
    peaks = {}
    for checkpointing in ("none", "selective", "full"):
        parts = build({**VIT, "depth": 8, "drop_path": 0.0}, checkpointing=checkpointing)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss_of(parts, images=32).backward()
        peaks[checkpointing] = torch.cuda.max_memory_allocated() - before
        del parts
    assert peaks["full"] < peaks["selective"] < 0.9 * peaks["none"]


@needs_fp8
def test_fp8_layer_equals_the_same_arithmetic_on_a_cpu():
    require_fp8(CUDA)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 128, generator=generator).bfloat16() for n in (67, 192))
    upstream = torch.randn(67, 192, generator=generator).bfloat16()
    results = []
    for device in ("cpu", CUDA):
        inputs = [each.detach().to(device).requires_grad_() for each in (x, weight)]
        output = linear(*inputs, None)
        output.backward(upstream.to(device))
        results.append([each.detach().cpu() for each in (output, *(one.grad for one in inputs))])
    for on_cpu, on_gpu in zip(*results, strict=True):
        assert relative(on_gpu, on_cpu) < 0.01


@needs_fp8
@pytest.mark.parametrize("compile_blocks", [False, True])
def test_fp8_stays_near_bf16(compile_blocks):
    parts = build(dtype="bf16", fp8=True, compile=compile_blocks)
    assert sum(isinstance(module, Fp8Linear) for module in parts[0].modules()) == 4 * 4
    loss = loss_of(parts)
    loss.backward()
    exact, gradient = run(dtype="bf16")
    assert loss.item() == pytest.approx(exact, rel=0.05)
    assert relative(gradients(parts), gradient) < 0.3
