"""What an evaluation says of itself, and that saying it part by part changes no figure."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3.evals.candidate import open_candidate
from dinov3.evals.composites import cut_outs
from dinov3.evals.dense import NEEDS_SHAPES
from dinov3.evals.progress import EvaluationProgress, watched
from dinov3.evals.protocols import Results, judge_labelled, rows_of
from dinov3.evals.study import Scope, _inside, run_study
from dinov3.publish.benchmark import Benchmark, open_benchmark
from dinov3.recipe import load_recipe
from tests.reevaluated import paint
from tests.released import make_chain


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A model that was hardly trained, and pictures of three colours, without shapes."""
    root = tmp_path_factory.mktemp("study")
    chain = make_chain(root / "data", loadable=True)
    config = load_recipe(
        "smoke_cpu", ["run.device=cpu", "run.threads=1", "num_random_inits=1"], phase="evals"
    )
    opened = open_benchmark(Benchmark(paint(root / "colours")), config)
    device = torch.device("cpu")
    candidate = open_candidate(chain.model("vits"), None, device)
    return candidate, opened.table, opened.pictures, opened.halves, config, device


def test_each_part_is_said_once_with_its_number_and_nothing_is_blank(given, capsys):
    study = run_study(*given)
    lines = capsys.readouterr().err.splitlines()
    name, test = given[0].name, len(study.test)
    assert lines == [
        f"{name}: 1/7 features, 3 models on 48 pictures",
        *(
            f"{name}: {number}/7 {part}, 3 models on {48 - test} + {test} pictures"
            for number, part in enumerate(
                ("k-NN", "logistic regression", "linear probe", "k-NN, leave one out"), 2
            )
        ),
        f"{name}: 6/7 instance retrieval, 3 models on two views of {test} pictures",
        f"{name}: 7/7 segmentation and foreground segmentation, left out: {NEEDS_SHAPES}",
    ]


def test_protocols_that_are_not_asked_for_are_neither_said_nor_counted(given, capsys):
    run_study(*given, scope=Scope({"k-NN"}, baselines={}))
    said = [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()]
    assert [line.partition(",")[0] for line in said] == ["1/2 features", "2/2 k-NN"]


def test_part_by_part_gives_what_all_at_once_gives(given):
    study, config = run_study(*given), given[4]
    at_once = Results()
    judge_labelled(study.features, _inside(study.halves, study.places), config, at_once)
    labelled = [row for row in study.rows if row["protocol"] != "instance retrieval"]
    assert labelled == rows_of(at_once, config)
    assert study.choices == at_once.choices


def test_a_bar_writes_nothing_where_there_is_no_terminal(capsys):
    assert list(watched(iter(range(3)), 3, "pictures")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_progress_counts_from_one(capsys):
    progress = EvaluationProgress("vits", 2)
    progress.begin("one", "3 pictures")
    progress.begin("two", "4 pictures")
    assert capsys.readouterr().err == "vits: 1/2 one, 3 pictures\nvits: 2/2 two, 4 pictures\n"


def test_the_need_of_a_shape_is_told_in_the_numbers_that_decide_it():
    clear_share, clear, solid_share, solid = (
        int(number) / 100 for number in re.findall(r"(\d+) %", NEEDS_SHAPES)
    )

    def has_shape(num_clear: int, num_solid: int) -> bool:
        """Of 10 000 pixels so many are just clear, just solid, the others neither."""
        alpha = np.full(10_000, 128, dtype=np.uint8)
        alpha[:num_clear] = int(clear * 255)
        alpha[10_000 - num_solid :] = int(solid * 255) + 1
        pixels = np.zeros((100, 100, 4), dtype=np.uint8)
        pixels[..., 3] = alpha.reshape(100, 100)
        return bool(cut_outs([Image.fromarray(pixels)], np.zeros(1, dtype=int), 1, 64)[0])

    wanted = round(clear_share * 10_000), round(solid_share * 10_000)
    assert has_shape(*wanted)
    assert not has_shape(wanted[0] - 1, wanted[1])
    assert not has_shape(wanted[0], wanted[1] - 1)
