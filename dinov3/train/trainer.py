"""The training loop: data, step, guard, EMA, log, save.

Everything random is a function of (seed, step, position), so the state after n steps is the same
however often the run was stopped, and no generator needs saving.
"""

import math
import resource
import time
from collections import deque
from pathlib import Path
from typing import Any

import torch

from dinov3.checkpoint import latest_state, load_state, save_state
from dinov3.config import TrainConfig
from dinov3.data.augment import Augmentation, Batch, gallery
from dinov3.data.loader import ImageSet, TrainingLoader
from dinov3.errors import CheckpointError, Interrupted, TrainingDiverged
from dinov3.train.build import (
    build_augmentation,
    build_method,
    build_optimizer,
    build_schedules,
    masks_of_step,
)
from dinov3.train.ema import ema_update
from dinov3.train.events import EventLog
from dinov3.train.health import collapse_reason, is_finite, measure
from dinov3.train.interrupt import StopRequest
from dinov3.train.optim import apply_schedule, clip_gradients
from dinov3.train.probe import load_probe, patch_colours
from dinov3.train.progress import TrainingProgress

_NUM_SHOWN = 8  # probe pictures in TensorBoard


class Trainer:
    """One run: the method, its optimizer, its place in the schedule."""

    def __init__(
        self, config: TrainConfig, images: ImageSet, device: torch.device, folder: Path
    ) -> None:
        """Builds everything at step 0.

        Args:
            config: The resolved recipe.
            images: The training images.
            device: Where to train.
            folder: State folder of this very run.
        """
        self.config = config
        self.images = images
        self.device = device
        self.folder = folder
        self.step = 0
        self.interruptions: list[dict[str, Any]] = []
        self.health: dict[str, float] = {}
        self.method = build_method(config, device)
        self.optimizer = build_optimizer(config, self.method.student)
        self.schedules = build_schedules(config)
        self.augmentation: Augmentation = build_augmentation(config)
        self._log_size = 0
        self._bad_steps = 0
        crops = config.crops
        self._probe = load_probe(
            images, config.health.num_images, crops.global_size, (crops.mean, crops.std)
        ).to(device)

    def resume(self, path: Path | None = None) -> bool:
        """Continues from a state: the given one, or the newest of the folder, if there is any."""
        source = path or latest_state(self.folder)
        if source is None:
            return False
        state = load_state(source)
        try:
            self._restore(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            msg = (
                f"{source}: not a state of this run: {error}. Remove it to go on from an older one."
            )
            raise CheckpointError(msg) from error
        # a finished run that is extended here keeps its own log where it is
        same_folder = source.resolve().parent == self.folder.resolve()
        self._log_size = state["log_size"] if same_folder else 0
        return True

    def _restore(self, state: dict[str, Any]) -> None:
        self.method.student.load_state_dict(state["student"])
        self.method.teacher.load_state_dict(state["teacher"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.health = state["health"]
        self.interruptions = [*state["interruptions"], {"resumed_at_step": self.step}]
        self._bad_steps = state["bad_steps"]

    def run(self) -> None:
        """Trains to the end.

        Raises:
            Interrupted: A signal came; the state is saved.
            TrainingDiverged: Non-finite or collapsed; the state before is saved.
        """
        total = self.config.schedules.num_steps
        settings = self.config.run
        loader = TrainingLoader(
            self.images,
            augmentation=self.augmentation,
            batch_size=self.config.optim.batch_size,
            seed=self.config.seed,
            start_step=self.step,
            num_steps=total - self.step,
            num_workers=settings.num_workers,
        )
        recent: deque[float] = deque(maxlen=50)
        with (
            EventLog(self.folder, size=self._log_size, step=self.step) as log,
            TrainingProgress(total, start=self.step, log_every=settings.log_every) as progress,
            StopRequest() as stop,
        ):
            progress.say(self._estimate())
            began = time.perf_counter()
            for batch in loader:
                waited = time.perf_counter() - began
                numbers = self._train_step(batch, log)
                seconds = time.perf_counter() - began
                recent.append(seconds)
                self._after_step(batch, log, {**numbers, "wait_fraction": waited / seconds})
                progress.advance(self.step, numbers["loss"], sum(recent) / len(recent))
                if stop.name is not None:
                    self._interrupt(log, stop.name)
                began = time.perf_counter()
            self._log_size = log.size

    def save(self, log: EventLog) -> None:
        """Writes the state; a kill at any moment leaves this one or the one before."""
        self._log_size = log.size
        state = {**self.state(), "log_size": self._log_size}
        save_state(self.folder, self.step, state, keep=self.config.run.keep_checkpoints)

    def state(self) -> dict[str, Any]:
        """All that the next step depends on."""
        return {
            "step": self.step,
            "student": self.method.student.state_dict(),
            "teacher": self.method.teacher.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "health": self.health,
            "bad_steps": self._bad_steps,
            "interruptions": self.interruptions,
            "log_size": self._log_size,
        }

    def _train_step(self, batch: Batch, log: EventLog) -> dict[str, float]:
        """One update; guard order: loss finite, gradients finite, clip, optimizer, EMA."""
        now = self.schedules.at(batch.step)
        global_crops, local_crops = self.augmentation.apply(batch, self.device)
        masks = masks_of_step(self.config, len(global_crops), batch.step).to(self.device)
        self._seed_model(batch.step)
        losses = self.method.losses(global_crops, local_crops, masks, now["teacher_temperature"])
        numbers = {name: value.item() for name, value in losses.items()}
        norms: dict[str, float] = {}
        if is_finite(losses["loss"]):
            losses["loss"].backward()
            clipped = clip_gradients(self.method.student.parts(), self.config.optim.clip)
            norms = {f"gradient_norm/{name}": float(norm) for name, norm in clipped.items()}
        if norms and all(map(math.isfinite, norms.values())):
            apply_schedule(self.optimizer, now["lr"], now["weight_decay"], now["last_layer_lr"])
            self.optimizer.step()
            ema_update(self.method.teacher, self.method.student, now["momentum"])
            self._bad_steps = 0
        else:
            self._bad_steps += 1
            self._non_finite(batch, log, {**numbers, **norms})
        self.optimizer.zero_grad(set_to_none=True)
        self.step = batch.step + 1
        return {**numbers, **norms, **{f"schedule/{name}": v for name, v in now.items()}}

    def _after_step(self, batch: Batch, log: EventLog, numbers: dict[str, float]) -> None:
        settings = self.config.run
        last = self.step == self.config.schedules.num_steps
        if self.step % settings.health_every == 0 or last:
            self._judge(log)
            numbers |= {f"health/{name}": value for name, value in self.health.items()}
        if self.step % settings.log_every == 0 or last:
            log.numbers(self.step, numbers)
        if self.step % settings.picture_every == 0 or last:
            self._show(batch, log)
        if self.step % settings.checkpoint_every == 0 or last:
            self.save(log)

    def _seed_model(self, step: int) -> None:
        """Drop path and RoPE augmentation draw from (seed, step) alone."""
        generator = torch.Generator().manual_seed((self.config.seed << 32) + step)
        self.method.student.backbone.set_generator(generator)

    def _judge(self, log: EventLog) -> None:
        self.health = measure(
            self.method.teacher.backbone, self.method.teacher.dino_head, self._probe
        )
        limits = self.config.health
        if self.step < limits.after_step:
            return
        reason = collapse_reason(self.health, limits.model_dump())
        if reason is not None:
            self.save(log)
            msg = f"training collapsed at step {self.step}: {reason}. Lower the learning rate."
            raise TrainingDiverged(msg)

    def _non_finite(self, batch: Batch, log: EventLog, numbers: dict[str, float]) -> None:
        """Nothing was updated: the state before the step and its (seed, step) replay it exactly."""
        log.numbers(batch.step, {**numbers, "non_finite": 1.0})
        limits = self.config.health
        if limits.non_finite == "skip" and self._bad_steps < limits.max_consecutive_non_finite:
            return
        state = {**self.state(), "log_size": log.size}
        (self.folder / "non_finite").mkdir(exist_ok=True)
        dump = save_state(self.folder / "non_finite", batch.step, state, keep=1)
        bad = sorted(name for name, value in numbers.items() if not math.isfinite(value))
        msg = (
            f"step {batch.step}: non-finite {', '.join(bad)}; nothing was updated. "
            f"The state before it is {dump}. Lower the learning rate."
        )
        raise TrainingDiverged(msg)

    def _show(self, batch: Batch, log: EventLog) -> None:
        pictures = self._probe[:_NUM_SHOWN]
        log.picture("patches/pca", patch_colours(self.method.teacher.backbone, pictures), self.step)
        crops, _ = self.augmentation.apply(batch, self.device)
        log.picture(
            "crops/global", gallery(crops, self.config.crops.mean, self.config.crops.std), self.step
        )

    def _interrupt(self, log: EventLog, signal_name: str) -> None:
        if self.step == self.config.schedules.num_steps:
            return
        self.interruptions.append({"stopped_at_step": self.step, "signal": signal_name})
        self.save(log)
        msg = f"stopped by {signal_name} after step {self.step}; run the same command to go on."
        raise Interrupted(msg)

    def _estimate(self) -> str:
        """What the run will take, measured on one discarded step on empty crops."""
        config, student = self.config, self.method.student
        began = time.perf_counter()
        self._rehearse()
        seconds = time.perf_counter() - began
        count = sum(parameter.numel() for parameter in student.parameters())
        state = 4 * 4 * count  # bytes: student, teacher and two moments in fp32
        left = config.schedules.num_steps - self.step
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB on Linux
        return (
            f"training {left} steps of {config.optim.batch_size} out of {len(self.images)} images "
            f"on {self.device} with {torch.get_num_threads()} threads, {count / 1e6:.2f} M "
            f"parameters with heads: about {left * seconds / 60:.1f} min, {memory:.1f} GB of "
            f"memory, {config.run.keep_checkpoints * state / 1e9:.2f} GB of checkpoints on disk"
        )

    def _rehearse(self) -> None:
        crops, size = self.config.crops, self.config.optim.batch_size
        global_crops = torch.zeros(2 * size, 3, crops.global_size, crops.global_size)
        local_crops = torch.zeros(crops.num_local * size, 3, crops.local_size, crops.local_size)
        masks = masks_of_step(self.config, len(global_crops), self.step).to(self.device)
        self._seed_model(self.step)
        losses = self.method.losses(
            global_crops.to(self.device), local_crops.to(self.device), masks, temperature=1.0
        )
        losses["loss"].backward()
        self.optimizer.zero_grad(set_to_none=True)
