"""The contrastive loss is exact over ranks, in one chunk at a time; patches keep their Gram."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dinov3.errors import ConfigError
from dinov3.losses.contrastive import contrastive_loss, text_gram_loss

NUM_PAIRS, WIDTH = 24, 4
SUBGROUP = (1, 2)


def draw_pairs(num_pairs=NUM_PAIRS, width=WIDTH, dtype=torch.float32):
    """Unit features of pairs that match in part, and a scale."""
    generator = torch.Generator().manual_seed(5)
    image = torch.randn(num_pairs, width, generator=generator, dtype=torch.float64)
    text = image + torch.randn(num_pairs, width, generator=generator, dtype=torch.float64)
    scale = torch.tensor([3.5], dtype=dtype)
    return F.normalize(image, dim=-1).to(dtype), F.normalize(text, dim=-1).to(dtype), scale


def plain_loss(image, text, scale):
    logits = scale * image @ text.T
    labels = torch.arange(len(image))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def loss_and_gradients(function, *inputs):
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


class LargestTensor(TorchDispatchMode):
    """Notes how many elements the largest result of any operation has."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def run_rank(rank, folder):
    """Loss and gradients of this rank's rows, over the world of three and a group of two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    pair = dist.new_group(list(SUBGROUP))
    image, text, scale = draw_pairs()
    results, largest = {}, LargestTensor()
    for name, ranks, group in (("world", range(3), None), ("subgroup", SUBGROUP, pair)):
        if rank not in ranks:
            continue
        share = NUM_PAIRS // len(ranks)
        rows = slice(ranks.index(rank) * share, (ranks.index(rank) + 1) * share)
        with largest:
            results[name] = loss_and_gradients(
                lambda *inputs, group=group: contrastive_loss(*inputs, group=group),
                image[rows],
                text[rows],
                scale,
            )
        results[f"{name} largest"] = largest.numel
        largest.numel = 0
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_rank, args=(folder,), nprocs=3)
    return [torch.load(folder / f"{rank}.pt") for rank in range(3)]


@pytest.mark.parametrize(("name", "ranks"), [("world", (0, 1, 2)), ("subgroup", SUBGROUP)])
def test_ranks_together_equal_one_process_with_the_whole_batch(of_ranks, name, ranks):
    losses, images, texts, scales = zip(*(of_ranks[rank][name] for rank in ranks), strict=True)
    loss, image, text, scale = loss_and_gradients(plain_loss, *draw_pairs())
    close = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(torch.stack(losses).mean(), loss, **close)
    # every rank's gradient is that of its own mean; parameters see the mean over ranks
    torch.testing.assert_close(torch.cat(images) / len(ranks), image, **close)
    torch.testing.assert_close(torch.cat(texts) / len(ranks), text, **close)
    torch.testing.assert_close(torch.stack(scales).mean(0), scale, **close)
    assert len({round(each.item(), 4) for each in losses}) == len(ranks)


@pytest.mark.parametrize(("name", "ranks"), [("world", (0, 1, 2)), ("subgroup", SUBGROUP)])
def test_no_rank_ever_holds_logits_against_the_whole_batch(of_ranks, name, ranks):
    share = NUM_PAIRS // len(ranks)
    for rank in ranks:
        chunk_or_packet = max(share * share, share * (2 * WIDTH + 1))
        assert share * share <= of_ranks[rank][f"{name} largest"] <= chunk_or_packet
    assert chunk_or_packet < share * NUM_PAIRS


def test_alone_it_is_the_plain_loss():
    pairs = draw_pairs(7, 5)
    for ours, plain in zip(
        loss_and_gradients(contrastive_loss, *pairs),
        loss_and_gradients(plain_loss, *pairs),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-6)


def test_gradients_are_the_derivatives_of_the_loss():
    leaves = [each.requires_grad_() for each in draw_pairs(5, 3, torch.float64)]
    assert torch.autograd.gradcheck(contrastive_loss, leaves)


def test_a_sharp_scale_does_not_overflow():
    image, text, _ = draw_pairs(6, 8)
    ours, *gradients = loss_and_gradients(contrastive_loss, image, text, torch.tensor(1e4))
    plain = plain_loss(image, text, torch.tensor(1e4))
    torch.testing.assert_close(ours, plain)
    assert all(torch.isfinite(each).all() for each in gradients)


def test_half_precision_features_are_compared_in_full_precision():
    image, text, scale = draw_pairs(16, 32)
    image, text = image.bfloat16(), text.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        loss, *gradients = loss_and_gradients(contrastive_loss, image, text, scale)
    expected = plain_loss(image.float(), text.float(), scale)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    assert [each.dtype for each in gradients] == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_matched_pairs_cost_nothing_and_unrelated_ones_log_of_the_batch():
    matched = contrastive_loss(torch.eye(8), torch.eye(8), torch.tensor(100.0))
    assert matched.item() == pytest.approx(0, abs=1e-6)
    unrelated = contrastive_loss(torch.eye(8), torch.ones(8, 8), torch.tensor(1.0))
    assert unrelated.item() == pytest.approx(math.log(8), abs=1e-6)


@pytest.mark.parametrize(
    ("image", "text", "scale"), [((4, 8), (3, 8), 1), ((4, 8), (4, 6), 1), ((0, 8), (0, 8), 1)]
)
def test_what_are_no_pairs_is_refused(image, text, scale):
    with pytest.raises(ConfigError, match=r"contrastive: image, text and scale .* Pair every"):
        contrastive_loss(torch.ones(image), torch.ones(text), torch.ones(scale))


def test_a_scale_per_pair_is_refused():
    with pytest.raises(ConfigError, match=r"got \(4, 8\), \(4, 8\) and \(4,\)"):
        contrastive_loss(torch.ones(4, 8), torch.ones(4, 8), torch.ones(4))


def cosines(patches):
    unit = F.normalize(patches, dim=-1)
    return unit @ unit.mT


@pytest.fixture
def patches():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 6, 8, generator=generator), torch.randn(2, 6, 5, generator=generator)


def test_text_gram_compares_similarities_within_each_image(patches):
    ours, backbone = patches
    expected = (cosines(ours) - cosines(backbone)).square().mean()
    torch.testing.assert_close(text_gram_loss(ours, backbone), expected)


def test_text_gram_without_normalisation_compares_dot_products(patches):
    ours, backbone = patches
    expected = (ours @ ours.mT - backbone @ backbone.mT).square().mean()
    torch.testing.assert_close(text_gram_loss(ours, backbone, normalize=False), expected)


def test_text_gram_of_a_subset_sees_only_those_patches(patches):
    ours, backbone = patches
    chosen = torch.tensor([4, 0, 3])
    subset = text_gram_loss(ours, backbone, indices=chosen)
    torch.testing.assert_close(subset, text_gram_loss(ours[:, chosen], backbone[:, chosen]))
    ours.requires_grad_()
    text_gram_loss(ours, backbone, indices=chosen).backward()
    assert not ours.grad[:, [1, 2, 5]].any()
    assert ours.grad[:, chosen].any(-1).all()


def test_text_gram_gives_the_backbone_no_gradient(patches):
    ours, backbone = (each.requires_grad_() for each in patches)
    text_gram_loss(ours, backbone).backward()
    assert ours.grad is not None
    assert backbone.grad is None
