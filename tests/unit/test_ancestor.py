"""A finished run that a longer one is made from."""

import pytest

from dinov3.errors import CheckpointError
from dinov3.recipe import load_recipe
from dinov3.stage import Stage
from dinov3.train.ancestor import add_ancestor, kept_record


def test_a_finished_run_without_that_artifact_cannot_be_extended(tmp_path):
    stage = Stage("distilled_students_vits", tmp_path / "vits", {})
    record = kept_record(tmp_path / "finished" / "step_000000005", "vits")
    message = "resume: the finished run has no artifact distilled_students_vits, got .*vits.record"
    with pytest.raises(CheckpointError, match=message):
        add_ancestor(stage, record, load_recipe("smoke_cpu/distill"), "backbone.safetensors")
