"""A step under a lens: which terms, modules, weights and gradients are the first not to be finite.

The phase takes its own step; only the update at its end is replaced by a look at the gradients.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from dinov3.data.augment import Batch
from dinov3.distributed import whole
from dinov3.train.learner import Learner, Outcome
from dinov3.train.trainer import Method

_NUM_SHOWN = 8  # names of a kind


@dataclass
class Look:
    """What one learner's step showed.

    Attributes:
        losses: Terms of the objective and their sum.
        norms: Gradient norm of each module, by its name in the student.
        parts: Gradient norm of each part that is clipped by itself; these decide.
        gradients: Parameters whose gradient is not finite.
    """

    losses: dict[str, float] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    parts: dict[str, float] = field(default_factory=dict)
    gradients: list[str] = field(default_factory=list)

    @property
    def bad(self) -> tuple[str, ...]:
        """Names of the numbers that are not finite, as the trainer's guard names them."""
        numbers = {**self.losses, **{f"gradient_norm/{n}": v for n, v in self.parts.items()}}
        return tuple(sorted(name for name, value in numbers.items() if not math.isfinite(value)))


@dataclass(frozen=True)
class Findings:
    """What a step showed.

    Attributes:
        step: Counted from 0.
        looks: Of each learner, by name.
        modules: Those whose outputs were not finite, in the order they occurred.
        state: Tensors that were not finite before the step began.
    """

    step: int
    looks: Mapping[str, Look]
    modules: tuple[str, ...]
    state: tuple[str, ...]

    @property
    def is_finite(self) -> bool:
        """Whether every learner could have taken its update."""
        return not any(look.bad for look in self.looks.values())


def look_at_step(method: Method, watched: Mapping[str, nn.Module], batch: Batch) -> Findings:
    """Takes the step of a batch without any update.

    Args:
        method: Is left with used-up gradients, and otherwise as it was but for a Gram teacher that
            this very step copies from the EMA.
        watched: Networks whose modules are listened to, by the name they shall have.
        batch: Of all ranks together.
    """
    state = tuple(sorted(non_finite(method.tensors().items())))
    looks: dict[str, Look] = {}
    modules: dict[str, None] = {}  # keeps the order, and each name once: some are computed twice
    with ExitStack() as stack:
        for learner in method.learners:
            looks[learner.name] = stack.enter_context(_looking(learner))
        for name, module in watched.items():
            stack.enter_context(watch_outputs(module, modules, name))
        method.step(batch)
    return Findings(batch.step, looks, tuple(modules), state)


@contextmanager
def watch_outputs(module: nn.Module, found: dict[str, None], prefix: str = "") -> Iterator[None]:
    """Notes the names of sub-modules whose outputs are not finite, in the order they occur."""

    def note(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if any(True for _ in non_finite((name, one) for one in _tensors_in(output))):
                found.setdefault(name)

        return hook

    handles = [
        part.register_forward_hook(note(f"{prefix}.{name}" if prefix else name))
        for name, part in module.named_modules()
        if name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def non_finite(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    """Names of the tensors that hold NaN or an infinity."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not bool(whole(tensor.detach()).isfinite().all()):
            yield name


def gradient_norms(module: nn.Module) -> dict[str, float]:
    """Norm of the gradients of each block and of each other sub-module."""
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            groups.setdefault(_module_of(name), []).append(parameter.grad)
    return {name: _norm(gradients) for name, gradients in groups.items()}


def describe(findings: Findings) -> str:
    """The findings as text, for people."""
    lines = [f"step {findings.step}, taken again without its update"]
    lines.append(_named("tensors of the state that are not finite", findings.state))
    lines.append(_named("first modules with non-finite outputs", findings.modules))
    for name, look in findings.looks.items():
        lines.append(f"{name or 'student'}:")
        lines += [f"  {term:<28} {value:.6g}" for term, value in sorted(look.losses.items())]
        lines.append("  " + _named("gradients that are not finite", look.gradients))
        lines.append("  gradient norms:")
        lines += [f"    {module:<40} {norm:.4g}" for module, norm in look.norms.items()]
    return "\n".join(lines)


def verdict(findings: Findings) -> str:
    """One sentence: what was not finite, or that nothing was."""
    if findings.is_finite:
        return (
            f"step {findings.step} is finite here: weights and batch are sound, so look at the "
            "device or the ranks of the run."
        )
    bad = [f"{name} {one}".strip() for name, look in findings.looks.items() for one in look.bad]
    return (
        f"step {findings.step}: reproduces, got non-finite {', '.join(bad)}. "
        "Lower the learning rate, or start before this step."
    )


@contextmanager
def _looking(learner: Learner) -> Iterator[Look]:
    """In the place of the learner's update stands a look at losses and gradients."""
    look = Look()

    def update(step: int, losses: Mapping[str, float]) -> Outcome:
        look.losses.update(losses)
        look.norms.update(gradient_norms(learner.student))
        for name, part in learner.parts.items():
            look.parts[name] = _norm([p.grad for p in part.parameters() if p.grad is not None])
        named = learner.student.named_parameters()
        look.gradients += non_finite((n, p.grad) for n, p in named if p.grad is not None)
        learner.optimizer.zero_grad(set_to_none=True)
        return Outcome(dict(losses), look.bad)

    learner.update = update  # type: ignore[method-assign]
    try:
        yield look
    finally:
        del learner.update  # the class's own shows again


def _norm(gradients: list[Tensor]) -> float:
    return float(whole(nn.utils.get_total_norm(gradients))) if gradients else 0.0


def _tensors_in(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for one in output.values():
            yield from _tensors_in(one)
    elif isinstance(output, list | tuple):
        for one in output:
            yield from _tensors_in(one)


def _module_of(parameter: str) -> str:
    """Up to the first number, or all but the parameter itself."""
    words = parameter.split(".")
    for index, word in enumerate(words):
        if word.isdigit():
            return ".".join(words[: index + 1])
    return ".".join(words[:-1]) or parameter


def _named(what: str, names: tuple[str, ...] | list[str]) -> str:
    if not names:
        return f"{what}: none"
    rest = len(names) - _NUM_SHOWN
    more = f" and {rest} more" if rest > 0 else ""
    return f"{what}: {', '.join(names[:_NUM_SHOWN])}{more}"
