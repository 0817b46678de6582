"""Training that is stopped in any way and run again ends with the same bits."""

import json
import os
import resource
import shutil
import signal

import pytest

from dinov3.checkpoint import load_tensors
from dinov3.release.record import file_sha256, read_record
from tests.flow.conftest import dinov3
from tests.flow.forks import Fork, fork

STEPS = 8
OVERRIDES = (f"schedules.num_steps={STEPS}", "run.checkpoint_every=2")


def digests(output):
    record = read_record(output / "record.json")
    return {name: out.sha256 for name, out in record.outputs.items()}, file_sha256(
        output / "record.json"
    )


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "pretrained_checkpoint"
    done = fork(*world.training(output, *OVERRIDES))
    assert done.returncode == 0, done.stderr
    return output


def stop_after(arguments, step, number):
    """Runs until so many steps are done, and sends a signal then."""
    end = fork(*arguments, signal_at=(f"step {step}/", number))
    return end.returncode, end.stderr


def saved_states(output):
    """Whole states of the one run that has not finished, oldest first."""
    (folder,) = (path.parent for path in (output.parent / ".state" / output.name).glob("*/lock"))
    return sorted(folder.glob("step_*"))


def contents(state):
    return {path.name: file_sha256(path) for path in state.iterdir()}


@pytest.mark.parametrize("step", [1, 4, STEPS - 1])
def test_killed_run_ends_with_the_same_bits(world, uninterrupted, tmp_path, step):
    output = tmp_path / "pretrained_checkpoint"
    code, _ = stop_after(world.training(output, *OVERRIDES), step, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (output / "record.json").exists()
    again = fork(*world.training(output, *OVERRIDES))
    assert again.returncode == 0, again.stderr
    assert digests(output) == digests(uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_says_how_to_go_on_and_exits_with_130(world, uninterrupted, tmp_path, number):
    output = tmp_path / "pretrained_checkpoint"
    code, said = stop_after(world.training(output, *OVERRIDES), 3, number)
    assert code == 130
    assert "run the same command to go on" in said
    again = fork(*world.training(output, *OVERRIDES))
    assert "continuing at step" in again.stderr
    assert digests(output) == digests(uninterrupted)
    run = json.loads((output / "run.json").read_text())
    assert run["interruptions"][0]["signal"] == signal.Signals(number).name


def test_workers_do_not_change_the_bits(world, uninterrupted, tmp_path):
    output = tmp_path / "pretrained_checkpoint"
    done = fork(*world.training(output, *OVERRIDES, "run.num_workers=2"))
    assert done.returncode == 0, done.stderr
    assert digests(output) == digests(uninterrupted)


def test_changed_recipe_starts_afresh_and_says_so(world, tmp_path):
    output = tmp_path / "pretrained_checkpoint"
    code, _ = stop_after(world.training(output, *OVERRIDES), 4, signal.SIGTERM)
    assert code == 130
    other = fork(*world.training(output, *OVERRIDES, "seed=5"))
    assert other.returncode == 0, other.stderr
    assert "starting afresh" in other.stderr
    assert read_record(output / "record.json").seeds == {"seed": 5}


def test_finished_run_is_extended_and_names_the_run_before(world, tmp_path):
    output, longer = tmp_path / "pretrained_checkpoint", tmp_path / "longer"
    fork(*world.training(output, *OVERRIDES))
    before = read_record(output / "record.json")
    state = tmp_path / ".state" / "pretrained_checkpoint" / "finished" / f"step_{STEPS:09d}"
    more = f"schedules.num_steps={STEPS + 3}"
    in_place = fork(*world.training(output, more), "--resume", state)
    assert in_place.returncode == 2
    assert "Choose another --output" in in_place.stderr
    done = fork(*world.training(longer, more), "--resume", state)
    assert done.returncode == 0, done.stderr
    record = read_record(longer / "record.json")
    assert record.steps == {"planned": STEPS + 3, "performed": STEPS + 3}
    (edge,) = (edge for edge in record.inputs if edge.role == "resume")
    assert edge.sha256 == before.outputs["backbone.safetensors"].sha256
    chain = dinov3("lineage", longer, "--root", tmp_path)
    assert "read resume" in chain.stdout


def test_damaged_state_is_refused_and_says_what_to_do(world, uninterrupted, tmp_path):
    output = tmp_path / "pretrained_checkpoint"
    code, _ = stop_after(world.training(output, *OVERRIDES), 4, signal.SIGTERM)
    assert code == 130
    newest = saved_states(output)[-1]
    shard = newest / "rank_00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    refused = fork(*world.training(output, *OVERRIDES))
    assert refused.returncode == 2
    assert "Remove it to continue from an older one" in refused.stderr
    shutil.rmtree(newest)
    again = fork(*world.training(output, *OVERRIDES))
    assert again.returncode == 0, again.stderr
    assert digests(output) == digests(uninterrupted)


def test_stopped_extension_goes_on_and_names_the_run_before(world, uninterrupted, tmp_path):
    state = uninterrupted.parent / ".state" / "pretrained_checkpoint" / "finished"
    more = (f"schedules.num_steps={STEPS + 4}", "run.checkpoint_every=2")
    whole, stopped = (tmp_path / name / "pretrained_checkpoint" for name in ("one", "two"))
    extended = [
        (*world.training(output, *more), "--resume", state / f"step_{STEPS:09d}")
        for output in (whole, stopped)
    ]
    assert fork(*extended[0]).returncode == 0
    code, _ = stop_after(extended[1], STEPS + 1, signal.SIGTERM)
    assert code == 130
    again = fork(*extended[1])
    assert f"continuing at step {STEPS + 1}" in again.stderr
    assert digests(stopped) == digests(whole)
    assert "resume" in {edge.role for edge in read_record(stopped / "record.json").inputs}


def test_extension_with_other_settings_is_refused(world, tmp_path):
    output = tmp_path / "pretrained_checkpoint"
    fork(*world.training(output, *OVERRIDES))
    state = tmp_path / ".state" / "pretrained_checkpoint" / "finished" / f"step_{STEPS:09d}"
    other = ("schedules.num_steps=20", "losses.koleo=0.5")
    done = fork(*world.training(tmp_path / "longer", *other), "--resume", state)
    assert done.returncode == 2
    assert "other settings, got losses.koleo" in done.stderr


def test_run_that_is_being_trained_is_refused_a_second_time(world, uninterrupted, tmp_path):
    output = tmp_path / "pretrained_checkpoint"
    arguments = world.training(output, *OVERRIDES)
    first = Fork(*arguments, signal_at=("step 2/", signal.SIGSTOP))
    first.until("step 2/")
    second = fork(*arguments)
    assert second.returncode == 2
    assert f"being trained by process {first.pid}" in second.stderr
    first.send_signal(signal.SIGCONT)
    end = first.wait()
    assert end.returncode == 0, end.stderr
    assert digests(output) == digests(uninterrupted)


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def test_full_disk_is_one_clear_error_and_costs_no_finished_work(world, uninterrupted, tmp_path):
    """A limit on file sizes fails the checkpoint's write as a full disk does."""
    output = tmp_path / "pretrained_checkpoint"
    code, _ = stop_after(world.training(output, *OVERRIDES), 3, signal.SIGTERM)
    assert code == 130
    good = {path: contents(path) for path in saved_states(output)}
    full = fork(*world.training(output, *OVERRIDES), prepare=limit_file_size)
    assert full.returncode == 2
    assert "could not be written" in full.stderr
    assert "Traceback" not in full.stderr
    assert {path: contents(path) for path in saved_states(output)} == good
    assert not list((output.parent / ".state").rglob(".step_*"))
    again = fork(*world.training(output, *OVERRIDES))
    assert again.returncode == 0, again.stderr
    assert digests(output) == digests(uninterrupted)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_output_is_one_clear_error(world, tmp_path):
    tmp_path.chmod(0o500)
    done = fork(*world.training(tmp_path / "out" / "pretrained_checkpoint", *OVERRIDES))
    tmp_path.chmod(0o700)
    assert done.returncode == 2
    assert "cannot be written" in done.stderr


def test_output_below_a_file_is_one_clear_error(world, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = fork(*world.training(tmp_path / "file" / "pretrained_checkpoint", *OVERRIDES))
    assert done.returncode == 2
    assert "cannot be written" in done.stderr


def test_collapsed_run_is_refused_and_says_why(world, tmp_path):
    """Without anything to tell images apart the features collapse, and health stops the stage."""
    output = tmp_path / "pretrained_checkpoint"
    collapsing = ("health.after_step=5", "health.min_participation_ratio=1000", *OVERRIDES)
    done = fork(*world.training(output, *collapsing))
    assert done.returncode == 3
    verdict = json.loads((output / "health.json").read_text())
    assert verdict["passed"] is False
    assert "participation_ratio" in verdict["reason"]
    assert [path.name for path in output.iterdir()] == ["health.json"]


def test_non_finite_step_updates_nothing_and_ends_the_run(world, tmp_path):
    output = tmp_path / "pretrained_checkpoint"
    wild = ("schedules.lr.peak=1e38", "schedules.lr.warmup_steps=0", *OVERRIDES)
    done = fork(*world.training(output, *wild))
    assert done.returncode == 3
    assert "nothing of it was updated" in done.stderr
    (dump,) = (tmp_path / ".state" / "pretrained_checkpoint").rglob("non_finite/step_*")
    assert (dump / "state.json").exists()


def test_student_and_teacher_differ_and_carry_the_names_of_the_backbone(uninterrupted):
    from dinov3 import hub

    weights = load_tensors(uninterrupted / "backbone.safetensors")
    names = {name.partition(".")[2] for name in weights}
    assert set(weights) == {f"{role}.{name}" for role in ("teacher", "student") for name in names}
    assert not weights["teacher.cls_token"].equal(weights["student.cls_token"])
    model = hub.load(uninterrupted)
    assert set(model.state_dict()) == names
    assert model.state_dict()["cls_token"].equal(weights["teacher.cls_token"])


def test_events_stand_once_each_whatever_happened(world, tmp_path):
    output = tmp_path / "pretrained_checkpoint"
    stop_after(world.training(output, *OVERRIDES), 5, signal.SIGKILL)
    again = fork(*world.training(output, *OVERRIDES))
    assert again.returncode == 0, again.stderr
    lines = [json.loads(line) for line in (output / "events.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
