"""The training loop: data, step, guard, log, save. One loop for every phase.

Everything random is a function of (seed, step, position), so the state after n steps is the same
however often the run was stopped, and no generator needs saving. A `Method` says what a step is.
"""

import resource
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dinov3.config import AlignmentHealth, HealthConfig, TrainRun
from dinov3.data.augment import Batch
from dinov3.data.loader import ImageSet, Pipeline, TrainingLoader
from dinov3.distributed import any_rank, from_first_rank, gather_objects, rank, world_size
from dinov3.errors import CheckpointError, Interrupted, TrainingDiverged
from dinov3.state import StateWriter, latest_state, load_state, read_facts, state_path
from dinov3.train.events import EventLogs
from dinov3.train.interrupt import StopRequest
from dinov3.train.learner import Learner, Outcome
from dinov3.train.progress import TrainingProgress
from dinov3.train.replay import save_batch

SNAPSHOTS = "snapshots"
NON_FINITE = "non_finite"
_ALL = 10**6  # snapshots kept


class Method(Protocol):
    """A phase's own part: from a batch to updates."""

    learners: Sequence[Learner]  # that this rank takes part in training

    @property
    def pipeline(self) -> Pipeline:
        """How pictures become crops."""

    @property
    def rows(self) -> range:
        """This rank's places in the global batch."""

    def step(self, batch: Batch) -> dict[str, Outcome]:
        """Updates every learner, each by itself; outcomes by name."""

    def tensors(self) -> dict[str, Tensor]:
        """All live tensors of this rank that the next step depends on."""

    def snapshot(self) -> dict[str, Tensor]:
        """Those of them that a snapshot keeps."""

    def facts(self) -> dict[str, Any]:
        """What else the next step depends on, JSON values; `learners` holds each one's.

        All ranks call it.
        """

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Takes back `facts`."""

    def measure(self, learner: Learner) -> dict[str, float]:
        """Signs of health; all ranks of the learner's group call it."""

    def judge(self, learner: Learner, step: int) -> str | None:
        """Why the run must end, or None."""

    def pictures(self, learner: Learner, batch: Batch) -> dict[str, Tensor]:
        """What to show in TensorBoard, uint8 [3, H, W] by name."""

    def rehearse(self) -> None:
        """Does the work of one step on empty crops and forgets it."""


@dataclass(frozen=True)
class Course:
    """How long a run is, on what, and how it is kept.

    Attributes:
        seed: Of the order of images and of all that is drawn.
        num_steps: Length of the run.
        batch_size: Images per step, over all ranks.
        run: What cannot change the result.
        policy: What the recipe says of steps that are not finite.
        snapshot_steps: After these steps the method's snapshot is kept for good.
    """

    seed: int
    num_steps: int
    batch_size: int
    run: TrainRun
    policy: HealthConfig | AlignmentHealth
    snapshot_steps: Sequence[int] = ()


class Trainer:
    """One run: the method and its place in the schedule."""

    def __init__(self, method: Method, images: ImageSet, folder: Path, course: Course) -> None:
        """Starts at step 0.

        Args:
            method: What a step is.
            images: The training images.
            folder: State folder of this very run.
            course: Its length and settings.
        """
        self.method = method
        self.images = images
        self.folder = folder
        self.course = course
        self.settings = course.run
        self.num_steps = course.num_steps
        self.step = 0
        self.interruptions: list[dict[str, Any]] = []
        self.collapsed: str | None = None  # why the run ended for good
        self._log_sizes: dict[str, int] = {}

    def resume(self, path: Path | None = None) -> bool:
        """Continues from a state: the given one, or the newest of the folder, if there is any."""
        source = from_first_rank(path or latest_state(self.folder))
        if source is None:
            return False
        load_state(source, self.method.tensors())
        facts = read_facts(source)
        try:
            self.method.restore(facts["method"])
            self.step = facts["step"]
            self.collapsed = facts["collapsed"]
            self.interruptions = [*facts["interruptions"], {"resumed_at_step": self.step}]
            # a finished run that is extended here keeps its own log where it is
            same_folder = source.resolve().parent == self.folder.resolve()
            self._log_sizes = facts["log_sizes"] if same_folder else {}
        except (KeyError, TypeError) as error:
            msg = (
                f"{source}: not a state of this run: {error}. Remove it to go on from an older one."
            )
            raise CheckpointError(msg) from error
        return True

    def run(self) -> None:
        """Trains to the end.

        Raises:
            Interrupted: A signal came; the state is saved.
            TrainingDiverged: Non-finite, and the state before is saved; or collapsed, perhaps in
                the state it was resumed from.
        """
        self._refuse_collapsed()
        loader = TrainingLoader(
            self.images,
            augmentation=self.method.pipeline,
            batch_size=self.course.batch_size,
            seed=self.course.seed,
            start_step=self.step,
            num_steps=self.num_steps - self.step,
            num_workers=self.settings.num_workers,
            rows=self.method.rows,
        )
        recent: deque[float] = deque(maxlen=50)
        names = [one.name for one in self.method.learners if rank(one.group) == 0]
        with (
            EventLogs(self.folder, names, sizes=self._log_sizes, step=self.step) as logs,
            StateWriter(self.folder, keep=self.settings.keep_checkpoints) as writer,
            StateWriter(self.folder / SNAPSHOTS, keep=_ALL) as snapshots,
            TrainingProgress(
                self.num_steps,
                start=self.step,
                log_every=self.settings.log_every,
                speaks=rank() == 0,
            ) as progress,
            StopRequest() as stop,
        ):
            progress.say(self._estimate())
            began = time.perf_counter()
            for batch in loader:
                waited = time.perf_counter() - began
                outcomes = self.method.step(batch)
                self.step = batch.step + 1
                seconds = time.perf_counter() - began
                recent.append(seconds)
                self._guard(batch, outcomes, logs)
                if self.step in self.course.snapshot_steps:
                    # on disk before any state of this step: a resumed run never makes it again
                    snapshots.save(
                        self.step, self.method.snapshot(), {"step": self.step}, wait=True
                    )
                extra = {"wait_fraction": waited / seconds}
                self._after_step(batch, outcomes, extra, logs, writer)
                losses = [outcome.numbers["loss"] for outcome in outcomes.values()]
                progress.advance(self.step, sum(losses) / len(losses), sum(recent) / len(recent))
                if any_rank(stop.name is not None):
                    self._interrupt(stop.name, logs, writer)
                began = time.perf_counter()

    def final_state(self) -> Path:
        """The state after the last step."""
        return state_path(self.folder, self.step)

    def _after_step(
        self,
        batch: Batch,
        outcomes: Mapping[str, Outcome],
        extra: Mapping[str, float],
        logs: EventLogs,
        writer: StateWriter,
    ) -> None:
        settings = self.settings
        last = self.step == self.num_steps
        is_measured = self.step % settings.health_every == 0 or last
        reasons = []
        for learner in self.method.learners:
            numbers = {**outcomes[learner.name].numbers, **extra}
            if is_measured:
                learner.health = self.method.measure(learner)
                numbers |= {f"health/{name}": value for name, value in learner.health.items()}
                reasons.append(self.method.judge(learner, self.step))
            log = logs.of(learner.name)
            if self.step % settings.log_every == 0 or last:
                log.numbers(self.step, numbers)
            if self.step % settings.picture_every == 0 or last:
                for name, picture in self.method.pictures(learner, batch).items():
                    log.picture(name, picture, self.step)
        self._end_if_collapsed([one for one in reasons if one], logs, writer, is_measured)
        if self.step % settings.checkpoint_every == 0 or last:
            self.save(logs, writer, wait=last)

    def _end_if_collapsed(
        self, reasons: list[str], logs: EventLogs, writer: StateWriter, is_measured: bool
    ) -> None:
        found = [one for part in gather_objects(reasons) for one in part] if is_measured else []
        if found:
            self.collapsed = f"step {self.step}: {found[0]}"
            self.save(logs, writer, wait=True)
            self._refuse_collapsed()

    def _refuse_collapsed(self) -> None:
        if self.collapsed is not None:
            msg = f"training collapsed at {self.collapsed}. Lower the learning rate."
            raise TrainingDiverged(msg)

    def save(self, logs: EventLogs, writer: StateWriter, *, wait: bool = False) -> None:
        """Writes the state; a kill at any moment leaves this one or the one before."""
        writer.save(self.step, self.method.tensors(), self.facts(logs), wait=wait)

    def facts(self, logs: EventLogs) -> dict[str, Any]:
        """All that is not a tensor, gathered from the ranks."""
        sizes = gather_objects(logs.sizes())
        return {
            "step": self.step,
            "method": self.method.facts(),
            "interruptions": self.interruptions,
            "collapsed": self.collapsed,
            "log_sizes": {name: size for part in sizes for name, size in part.items()},
            "world_size": world_size(),
        }

    def _guard(self, batch: Batch, outcomes: Mapping[str, Outcome], logs: EventLogs) -> None:
        """Nothing of a student was updated whose step was not finite; the recipe's policy rules."""
        for learner in self.method.learners:
            outcome = outcomes[learner.name]
            if not outcome.is_finite:
                logs.of(learner.name).numbers(self.step - 1, {**outcome.numbers, "non_finite": 1.0})
        limit = (
            self.course.policy.max_consecutive_non_finite
            if self.course.policy.non_finite == "skip"
            else 1
        )
        ended = [
            (learner.name, outcomes[learner.name].bad)
            for learner in self.method.learners
            if learner.bad_steps >= limit
        ]
        if any_rank(bool(ended)):
            everywhere = [one for part in gather_objects(ended) for one in part]
            self._dump(batch, everywhere, logs)

    def _dump(
        self, batch: Batch, ended: Sequence[tuple[str, tuple[str, ...]]], logs: EventLogs
    ) -> None:
        """Keeps the batch and the state before the bad step: together they replay it exactly."""
        folder = self.folder / NON_FINITE
        folder.mkdir(exist_ok=True)
        self.step -= 1
        with StateWriter(folder, keep=1) as writer:
            self.save(logs, writer, wait=True)
        save_batch(folder, batch, rank())
        names = ", ".join(f"{name} {', '.join(bad)}".strip() for name, bad in ended)
        msg = (
            f"step {self.step}: non-finite {names}; nothing of it was updated. The state before is "
            f"{state_path(folder, self.step)}: look with `python -m dinov3 replay`, or lower the "
            "learning rate."
        )
        raise TrainingDiverged(msg)

    def _interrupt(self, signal_name: str | None, logs: EventLogs, writer: StateWriter) -> None:
        if self.step == self.num_steps:
            return
        name = next((one for one in gather_objects(signal_name) if one), "a signal")
        self.interruptions.append({"stopped_at_step": self.step, "signal": name})
        self.save(logs, writer, wait=True)
        msg = f"stopped by {name} after step {self.step}; run the same command to go on."
        raise Interrupted(msg)

    def _estimate(self) -> str:
        """What the run will take, measured on one discarded step on empty crops."""
        began = time.perf_counter()
        self.method.rehearse()
        seconds = time.perf_counter() - began
        tensors = self.method.tensors().values()
        state = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        learners = self.method.learners
        count = sum(p.numel() for one in learners for p in one.student.parameters())
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB on Linux
        left = self.num_steps - self.step
        device = next(learners[0].student.parameters()).device.type
        return (
            f"training {left} steps of {self.course.batch_size} of {len(self.images)} images on "
            f"{world_size()} x {device} with {torch.get_num_threads()} threads, "
            f"{count / 1e6:.2f} M parameters with heads: about {left * seconds / 60:.1f} min, "
            f"{memory:.1f} GB of memory, {self.settings.keep_checkpoints * state / 1e9:.2f} GB of "
            "checkpoints on disk"
        )
