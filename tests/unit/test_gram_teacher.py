"""The Gram teacher: when it is refreshed, what it sees, and that it leaves the rest alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as oracle

from dinov3.config import GramConfig
from dinov3.losses.gram import gram_loss
from dinov3.models.backbone import build_backbone
from dinov3.train.gram_teacher import GramTeacher
from dinov3.train.objective import Weights
from tests.small_training import VIT, a_learner, a_method, a_share, copy_of, cut_share

MODES = {
    "bicubic": InterpolationMode.BICUBIC,
    "bilinear": InterpolationMode.BILINEAR,
    "nearest": InterpolationMode.NEAREST,
}


def a_config(**changes):
    plain = {
        "teacher": "checkpoint",
        "refresh": None,
        "weight": {
            "start": 1.0,
            "peak": 1.0,
            "end": 1.0,
            "warmup_steps": 0,
            "cosine_steps": 0,
        },
        "normalize": True,
        "image_level": True,
        "remove": "none",
        "tokens": "all",
        "resize": "bicubic",
        "antialias": False,
    }
    return GramConfig.model_validate({**plain, **changes})


def a_backbone(seed=7):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_backbone(VIT)


def a_teacher(seed=7, **changes):
    config = a_config(**changes)
    return GramTeacher(config, None if config.teacher == "ema" else a_backbone(seed))


class PatchMeans(nn.Module):
    """Its features are known: the mean colours of each patch."""

    stride = 8

    def forward_features(self, crops):
        return {"x_norm_patchtokens": F.avg_pool2d(crops, self.stride).flatten(2).mT}


def refreshed_after(rule, num_steps=12):
    """The numbers of steps done at which the teacher took over the EMA of that very step."""
    teacher, ema = a_teacher(refresh=rule), a_backbone()
    found = []
    for step in range(num_steps):
        with torch.no_grad():
            ema.cls_token.fill_(step)
        teacher.before_step(step, ema)
        before = teacher.backbone.cls_token.clone()
        teacher.after_step(step, ema)
        if not torch.equal(teacher.backbone.cls_token, before):
            assert torch.equal(teacher.backbone.cls_token, ema.cls_token)
            found.append(step + 1)
    assert teacher.num_updates == len(found)
    return found


@pytest.mark.parametrize(
    ("first", "every", "max_updates", "expected"),
    [
        (4, 3, None, [4, 7, 10]),
        (4, 3, 2, [4, 7]),
        (1, 5, None, [1, 6, 11]),
        (12, 1, None, [12]),
        (13, 1, None, []),
        (2, 100, 1, [2]),
    ],
)
def test_it_is_refreshed_first_then_every_so_many_steps(first, every, max_updates, expected):
    rule = {"first": first, "every": every, "max_updates": max_updates}
    assert refreshed_after(rule) == expected


def test_it_stays_as_it_is_without_a_rule():
    assert refreshed_after(None) == []


def test_a_refreshed_teacher_is_a_copy_of_the_whole_ema():
    teacher, ema = a_teacher(refresh={"first": 1, "every": 1, "max_updates": None}), a_backbone(3)
    teacher.after_step(0, ema)
    torch.testing.assert_close(teacher.backbone.state_dict(), ema.state_dict(), rtol=0, atol=0)
    with torch.no_grad():
        ema.cls_token.add_(1)
    assert not torch.equal(teacher.backbone.cls_token, ema.cls_token)


def steps_of(method, num_steps):
    share = a_share()
    return [method.step(step, [share]) for step in range(num_steps)]


def test_a_copy_of_the_ema_is_taken_before_its_step_and_kept():
    """The EMA before step 2 is that after two steps; earlier steps have no such term."""
    gram = a_teacher(teacher="ema@2")
    method = a_method(gram, learner=a_learner(gram_weight=1.0))
    share = a_share()
    states, outcomes = [], []
    for step in range(4):
        states.append(copy_of(method.teacher.backbone.state_dict()))
        outcomes.append(method.step(step, [share]))
    assert ["gram" in outcome.numbers for outcome in outcomes] == [False, False, True, True]
    torch.testing.assert_close(gram.backbone.state_dict(), states[2], rtol=0, atol=0)
    assert not torch.equal(states[2]["cls_token"], states[3]["cls_token"])


def test_the_living_ema_is_never_behind():
    """The term is that against a frozen copy of the EMA at each very step."""
    living = a_method(a_teacher(teacher="ema"), learner=a_learner(gram_weight=1.0))
    share = a_share()
    for step in range(3):
        frozen = GramTeacher(a_config(), a_backbone())
        frozen.backbone.load_state_dict(living.teacher.backbone.state_dict())
        anchor = frozen.patches(share.global_crops, a_backbone(9), (4, 4))
        expected = gram_loss(living.predictions(step, share).patches, anchor).item()
        assert living.step(step, [share]).numbers["gram"] == pytest.approx(expected, rel=1e-5)
    assert living.gram.tensors() == {}


def test_a_step_that_is_not_finite_refreshes_nothing():
    rule = {"first": 1, "every": 1, "max_updates": None}
    gram = a_teacher(refresh=rule)
    method = a_method(gram, learner=a_learner(gram_weight=1.0))
    before = copy_of(gram.tensors())
    share = a_share()
    share.global_crops[0, 0, 0, 0] = float("nan")
    assert not method.step(0, [share]).is_finite
    torch.testing.assert_close(gram.tensors(), before, rtol=0, atol=0)
    assert gram.num_updates == 0


@pytest.mark.parametrize(
    ("size", "grid"), [((64, 96), (4, 6)), ((64, 48), (4, 2)), ((48, 64), (5, 3))]
)
@pytest.mark.parametrize(
    ("resize", "antialias"),
    [("bicubic", False), ("bicubic", True), ("bilinear", False), ("bilinear", True),
     ("nearest", False)],
)  # fmt: skip
def test_features_of_larger_crops_are_resized_to_the_students_grid(size, grid, resize, antialias):
    teacher = GramTeacher(a_config(resize=resize, antialias=antialias), PatchMeans())
    crops = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    found = teacher.patches(crops, nn.Identity(), grid)
    maps = F.avg_pool2d(crops, 8)
    expected = oracle.resize(maps, list(grid), MODES[resize], antialias=antialias)
    torch.testing.assert_close(found, expected.flatten(2).mT)


def test_antialiasing_changes_what_is_reduced():
    crops = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    plain, smooth = (
        GramTeacher(a_config(antialias=one), PatchMeans()).patches(crops, nn.Identity(), (4, 4))
        for one in (False, True)
    )
    assert (plain - smooth).abs().max() > 0.05


@pytest.mark.parametrize("resize", ["bicubic", "bilinear"])
def test_resized_patches_lie_where_the_students_lie(resize):
    """Colours that grow along rows and columns keep their values at the centre of each patch."""
    rows, columns = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(128) + 0.5, indexing="ij")
    crops = torch.stack([rows, columns, rows + columns])[None]
    teacher = GramTeacher(a_config(resize=resize), PatchMeans())
    found = teacher.patches(crops, nn.Identity(), (4, 8)).unflatten(1, (4, 8))[0]
    inner = found[1:-1, 1:-1]  # at the border bicubic repeats the outermost patch
    torch.testing.assert_close(inner[..., 0], (torch.arange(1, 3) * 16 + 8.0)[:, None].expand(2, 6))
    torch.testing.assert_close(inner[..., 1], (torch.arange(1, 7) * 16 + 8.0).expand(2, 6))


def test_crops_of_the_students_grid_are_not_resized():
    teacher = a_teacher()
    crops = a_share().global_crops
    expected = teacher.backbone.forward_features(crops)["x_norm_patchtokens"]
    torch.testing.assert_close(teacher.patches(crops, nn.Identity(), (4, 4)), expected)


def test_the_term_compares_with_the_teachers_own_larger_crops():
    gram = a_teacher()
    method = a_method(gram, learner=a_learner(gram_weight=1.0))
    share = a_share(gram_size=64)
    patches = gram.backbone.forward_features(share.gram_crops)["x_norm_patchtokens"]
    maps = patches.mT.unflatten(-1, (8, 8))
    anchor = oracle.resize(maps, [4, 4], InterpolationMode.BICUBIC, antialias=False)
    expected = gram_loss(method.predictions(0, share).patches, anchor.flatten(2).mT)
    outcome = method.step(0, [share])
    assert outcome.numbers["gram"] == pytest.approx(expected.item(), rel=1e-4)


def test_the_term_adds_to_the_loss_and_to_nothing_else():
    """With weight 0, without a teacher and with the term, the other losses of a step are equal."""
    share = a_share(gram_size=64)
    bare = a_method().step(0, [share]).numbers
    without = a_method(a_teacher(), learner=a_learner(gram_weight=0.0)).step(0, [share]).numbers
    anchored = a_method(a_teacher(), learner=a_learner(gram_weight=2.0)).step(0, [share]).numbers
    for name in ("dino_global", "dino_local", "ibot", "koleo"):
        assert bare[name] == without[name] == anchored[name]
    assert without["loss"] == pytest.approx(bare["loss"], rel=1e-6)
    assert anchored["loss"] == pytest.approx(bare["loss"] + 2 * anchored["gram"], rel=1e-6)
    assert anchored["gram"] > 0


def test_a_weight_of_zero_trains_as_without_the_term():
    share = a_share(gram_size=64)
    bare, without = a_method(), a_method(a_teacher(), learner=a_learner(gram_weight=0.0))
    for step in range(3):
        bare.step(step, [share])
        without.step(step, [share])
    torch.testing.assert_close(without.student.state_dict(), bare.student.state_dict())


def test_the_teacher_gets_no_gradient():
    gram = a_teacher()
    method = a_method(gram, learner=a_learner(gram_weight=1.0))
    share = a_share()
    method.backward(0, [share], method.targets([share], 0.05), Weights(gram=1.0))
    assert all(one.grad is None and not one.requires_grad for one in gram.backbone.parameters())


@pytest.mark.parametrize("tokens", ["all", "masked", "unmasked"])
@pytest.mark.parametrize("num_parts", [2, 4])
def test_a_gram_matrix_of_the_whole_batch_is_that_of_its_micro_batches(num_parts, tokens):
    """Value and gradients, although the terms look across images."""

    def gradients(parts):
        gram = a_teacher(image_level=False, tokens=tokens)
        method = a_method(gram, learner=a_learner(gram_weight=1.0))
        share = a_share(batch=8, gram_size=64)
        shares = cut_share(share, parts)
        targets = method.targets(shares, 0.05)
        terms = method.backward(0, shares, targets, Weights(gram=50.0))
        return terms, {name: one.grad for name, one in method.student.named_parameters()}

    expected, whole = gradients(1)
    found, parted = gradients(num_parts)
    torch.testing.assert_close(found["gram"], expected["gram"])
    torch.testing.assert_close(parted, whole, rtol=1e-3, atol=1e-5)


def test_its_state_is_its_weights():
    gram = a_teacher()
    names = {f"gram_teacher.{name}" for name in gram.backbone.state_dict()}
    assert gram.tensors().keys() == names
    assert all(one.data_ptr() == two.data_ptr() for one, two in zip(
        gram.tensors().values(), gram.backbone.state_dict().values(), strict=True))  # fmt: skip


def test_the_term_draws_patch_similarities_to_the_teachers():
    """Thirty steps on the same crops, and only the term's own loss."""
    aims = {"dino": 0.0, "ibot": 0.0, "koleo": 0.0}
    method = a_method(a_teacher(), learner=a_learner(gram_weight=1.0), **aims)
    values = [outcome.numbers["gram"] for outcome in steps_of(method, 30)]
    assert values[-1] < 0.7 * values[0]
