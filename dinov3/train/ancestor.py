"""The finished run that a longer one is made from: its last state, its records, its snapshots."""

from pathlib import Path

from dinov3.config import Section, dump
from dinov3.errors import CheckpointError
from dinov3.release.record import RECORD_NAME, Edge, RecordError, file_sha256, read_record
from dinov3.stage import Stage


def is_finished(state: Path | None) -> bool:
    """Whether a state is the last of a run whose records are kept beside it."""
    return state is not None and any(state.parent.glob(f"*{RECORD_NAME}"))


def kept_record(state: Path, learner: str) -> Path:
    """The record of a learner's artifact beside the last state of its run."""
    return state.with_name(f"{learner}.{RECORD_NAME}" if learner else RECORD_NAME)


def add_ancestor(stage: Stage, here: Path, config: Section, weights_name: str) -> None:
    """The finished run becomes an input of the longer one.

    Args:
        stage: Of the longer run.
        here: Record of the finished one.
        config: Of the longer run; schedules alone may differ.
        weights_name: The file that stands for the finished run.

    Raises:
        CheckpointError: There is no such record, other settings differ, or the longer run would
            replace the finished one.
    """
    try:
        record = read_record(here)
    except (OSError, RecordError) as error:
        msg = (
            f"resume: the finished run has no artifact {stage.name}, got {error}. "
            "Extend a run of the same artifacts."
        )
        raise CheckpointError(msg) from error
    changed = _differences(dict(record.config), dump(config))
    if any("schedules" not in name.split(".") for name in changed):
        msg = f"resume: the finished run had other settings, got {', '.join(changed)}. Undo them."
        raise CheckpointError(msg)
    own = stage.output / RECORD_NAME
    if own.is_file() and file_sha256(own) == file_sha256(here):
        msg = (
            f"resume: {stage.output} holds the finished run itself, which the longer one is made "
            "from. Choose another --output."
        )
        raise CheckpointError(msg)
    weights = record.outputs[weights_name]
    edge = Edge("resume", weights_name, weights.sha256, file_sha256(here))
    stage.add_edge(edge, record)


def _differences(before: dict[str, object], now: dict[str, object], prefix: str = "") -> list[str]:
    names = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            names += _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            names.append(f"{prefix}{name}")
    return names
