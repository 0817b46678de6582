"""Every phase: stopped in any way and run again, it ends with the same bits; and it trains."""

import signal

import pytest

from dinov3.checkpoint import load_tensors
from dinov3.release.record import read_record
from tests.flow.forks import fork, run_on

PHASES = ("pretrain", "gram", "highres", "distill", "dinotxt")
STOPS = {
    "killed early": ("step 1/", signal.SIGKILL),
    "killed late": ("step 4/", signal.SIGKILL),
    "cancelled": ("step 3/", signal.SIGINT),
}
QUICK = {
    ("gram", "killed late", 1),
    ("gram", "cancelled", 2),
    ("highres", "cancelled", 1),
    ("distill", "killed early", 1),
    ("dinotxt", "killed late", 1),
    ("distill", "killed late", 2),
}
MATRIX = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in ((phase, stop, ranks) for phase in PHASES for stop in STOPS for ranks in (1, 2))
]


def tensor_digests(output):
    """Of every weight file, by its place."""
    return {
        (path.parent.relative_to(output).as_posix(), name): file.tensors
        for path in sorted(output.rglob("record.json"))
        for name, file in read_record(path).outputs.items()
        if file.tensors is not None
    }


@pytest.fixture(scope="module")
def uninterrupted(chain, tmp_path_factory):
    """Output of a whole run of a phase on so many ranks, trained when first asked for."""
    outputs = {(phase, 1): output for phase, output in chain.outputs.items()}

    def get(phase, num_ranks):
        if (phase, num_ranks) not in outputs:
            output = tmp_path_factory.mktemp("whole") / "out"
            done = run_on(num_ranks, *chain.training(phase, output))
            assert done.returncode == 0, done.stderr
            outputs[phase, num_ranks] = output
        return outputs[phase, num_ranks]

    return get


@pytest.mark.parametrize(("phase", "stop", "num_ranks"), MATRIX)
def test_stopped_phase_ends_with_the_same_bits(
    chain, uninterrupted, tmp_path, phase, stop, num_ranks
):
    output = tmp_path / "out"
    words, number = STOPS[stop]
    arguments = chain.training(phase, output)
    stopped = run_on(num_ranks, *arguments, signal_at=(words, number))
    assert stopped.returncode == (130 if number == signal.SIGINT else -number)
    assert not list(output.rglob("record.json"))
    again = run_on(num_ranks, *arguments)
    assert again.returncode == 0, again.stderr
    expected = tensor_digests(uninterrupted(phase, num_ranks))
    assert expected
    assert tensor_digests(output) == expected


@pytest.mark.parametrize(
    ("phase", "init", "role"),
    [
        ("gram", "pretrain", {"teacher": "teacher", "student": "student"}),
        ("highres", "gram", {"teacher": "teacher", "student": "teacher"}),
    ],
)
@pytest.mark.parametrize("name", ["backbone.safetensors", "heads.safetensors"])
def test_phase_ends_with_other_weights_than_it_began_with(chain, phase, init, role, name):
    before = load_tensors(chain.outputs[init] / name)
    after = load_tensors(chain.outputs[phase] / name)
    assert before.keys() == after.keys()
    for key, tensor in after.items():
        kind, _, rest = key.partition(".")
        if tensor.is_floating_point() and "periods" not in key and "bias_mask" not in key:
            assert not tensor.equal(before[f"{role[kind]}.{rest}"]), key


def test_students_leave_their_common_start(uninterrupted):
    """Student and EMA begin equal."""
    output = uninterrupted("distill", 1)
    students = sorted(path.name for path in output.iterdir() if path.is_dir())
    assert students == ["convnext", "vits"]
    for student in students:
        weights = load_tensors(output / student / "backbone.safetensors")
        names = {name.partition(".")[2] for name in weights}
        assert any(not weights[f"teacher.{n}"].equal(weights[f"student.{n}"]) for n in names)


@pytest.mark.parametrize(
    ("phase", "options", "sentence"),
    [
        ("pretrain", ("--init-from", "pretrain"), "init: random starts without an artifact"),
        ("pretrain", ("--gram-teacher", "pretrain"), "gram.teacher: checkpoint and --gram-teacher"),
        ("gram", ("--gram-teacher", "pretrain"), "init: random starts without an artifact"),
        ("gram", ("--init-from", "pretrain"), "gram.teacher: checkpoint and --gram-teacher"),
    ],
)
def test_artifacts_that_contradict_the_recipe_are_refused(
    chain, tmp_path, phase, options, sentence
):
    name, artifact = options
    common = ("--phase", phase, "--recipe", "smoke_cpu", "run.device=cpu", *chain.world.inputs)
    given = (name, chain.outputs[artifact], "--output", tmp_path / "out")
    done = fork("train", "stage", *common, *given)
    assert done.returncode == 2
    assert done.stderr.startswith(f"dinov3: {sentence}")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
