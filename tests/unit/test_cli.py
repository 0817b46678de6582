"""The command line: every verb helps, every wrong use is one sentence and exit code 2."""

import json
import re
import sys

import pytest
import torch
import typer
from safetensors.torch import save_file

from dinov3 import hub
from dinov3.__main__ import main
from dinov3.cli import app, run
from dinov3.models.vit import ViTConfig

MODEL = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8}
CLICK_VERBS = sorted(typer.main.get_command(app).commands)
GROUPS = {"releases"}  # of verbs of their own
VERBS = [*CLICK_VERBS, "lineage", "source", "verify", "adopt", "keys", "lake"]


def call(monkeypatch, *arguments):
    """The exit code of `python -m dinov3 ARGUMENTS`; a verb of a group is one argument here."""
    words = [word for argument in arguments for word in argument.split(" ")]
    monkeypatch.setattr(sys, "argv", ["dinov3", *words])
    try:
        return main()
    except SystemExit as leave:  # argparse leaves so
        return leave.code or 0


def refusal(capsys, *arguments):
    """The one sentence on standard error of a refused call."""
    assert run(list(arguments)) == 2
    text = capsys.readouterr().err.strip()
    assert text.startswith("dinov3: ")
    assert "\n" not in text
    return text


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(monkeypatch, capsys, verb):
    assert call(monkeypatch, verb, "--help") == 0
    assert verb in capsys.readouterr().out


WITH_ARGUMENTS = [*sorted(set(CLICK_VERBS) - GROUPS), "lineage", "verify", "adopt"]


@pytest.mark.parametrize("verb", WITH_ARGUMENTS)
def test_every_verb_without_arguments_is_refused_in_a_sentence(monkeypatch, capsys, verb):
    assert call(monkeypatch, verb) == 2
    assert re.search("Missing (argument|option)|are required", capsys.readouterr().err)


PLAIN_VERBS = [
    *sorted(set(VERBS) - GROUPS - {"adopt", "keys", "lake"}),
    "releases get",
    "keys new",
    "lake pin",
]


@pytest.mark.parametrize("verb", PLAIN_VERBS)
def test_every_verb_refuses_an_unknown_option(monkeypatch, capsys, verb):
    assert call(monkeypatch, verb, "x", "--no-such") == 2
    assert "--no-such" in capsys.readouterr().err


def test_an_unknown_verb_is_refused(monkeypatch, capsys):
    assert call(monkeypatch, "trian") == 2
    assert "trian" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"{",
        b"[]",
        b"3",
        b"null",
        b"{}",
        b"[" * 100_000,
        b'{"schema": "dinov3.record/1"}',
        b'{"schema": "dinov3.report/1"}',
        b'{"schema": "dinov3.report/1", "rows": 3}',
        b'{"schema": "dinov3.report/1", "rows": [], "missing": [1]}',
        b'{"schema": "dinov3.report/1", "rows": [3]}',
    ],
)
def test_summary_of_what_is_no_report_is_refused(capsys, tmp_path, content):
    path = tmp_path / "report.json"
    path.write_bytes(content)
    assert f"{path}: not a report" in refusal(capsys, "summary", str(path))


def test_summary_of_nothing_is_refused(capsys, tmp_path):
    assert "no report there" in refusal(capsys, "summary", str(tmp_path))


def test_summary_names_each_reason_once(capsys, tmp_path):
    missing = [{"protocol": name, "reason": "needs labels"} for name in ("k-NN", "probe")]
    missing.append({"protocol": "retrieval", "reason": "needs two pictures"})
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"schema": "dinov3.report/1", "rows": [], "missing": missing}))
    assert run(["summary", str(path)]) == 0
    expected = "k-NN: not judged (k-NN, probe: needs labels; retrieval: needs two pictures)\n"
    assert capsys.readouterr().out.startswith(expected)


@pytest.mark.parametrize("key", ["../../x", "", "a/b", "Upper", "a b", "a\n"])
@pytest.mark.parametrize("verb", ["train", "report"])
def test_a_stage_key_that_no_record_may_hold_is_refused(capsys, tmp_path, verb, key):
    names = ["source", "manifest", "dataset", "output", *(["model"] if verb == "report" else [])]
    options = [f"--{name}={tmp_path / name}" for name in names]
    found = refusal(capsys, verb, key, "--recipe", "smoke_cpu", *options)
    assert f"stage: not a key of lower-case letters, digits, _ and @, got {key!r}" in found
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def model(tmp_path):
    """A folder as training leaves it."""
    folder = tmp_path / "model"
    folder.mkdir()
    backbone = hub.random_init(ViTConfig(**MODEL), 0)
    save_file({f"teacher.{k}": v for k, v in backbone.state_dict().items()}, _weights(folder))
    crops = {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
    (folder / "config.json").write_text(json.dumps({"model": MODEL, "crops": crops}))
    return folder


def _weights(folder):
    return folder / "backbone.safetensors"


@pytest.mark.parametrize("option", ["--size=0", "--size=-16", "--batch-size=0"])
def test_embed_refuses_sizes_below_one(capsys, option):
    assert run(["embed", "pictures", "--model", "some", option]) == 2
    name = option.partition("=")[0]
    expected = f"Invalid value for '{name}': Input should be greater than or equal to 1"
    assert expected in capsys.readouterr().err


def test_embed_makes_no_folder_for_its_output(capsys, tmp_path):
    output = tmp_path / "nosuch" / "f.parquet"
    found = refusal(capsys, "embed", "pictures", "--model", "some", "--output", str(output))
    assert f"output: no such folder, got {output.parent}" in found
    assert not output.parent.exists()


def test_embed_does_not_write_over_a_folder(capsys, tmp_path):
    found = refusal(capsys, "embed", "pictures", "--model", "some", "--output", str(tmp_path))
    assert f"output: a folder, got {tmp_path}" in found


@pytest.mark.parametrize("verb", ["embed", "eval"])
def test_weights_with_nan_give_no_figure(capsys, tmp_path, model, verb):
    backbone = hub.load(model)
    backbone.cls_token.data[0, 0, 3] = torch.nan
    save_file({f"teacher.{k}": v for k, v in backbone.state_dict().items()}, _weights(model))
    calls = {
        "embed": ["embed", str(tmp_path), "--output", str(tmp_path / "f.parquet")],
        "eval": ["eval", "--train", str(tmp_path), "--recipe", "smoke_cpu"],
    }
    found = refusal(capsys, *calls[verb], "--model", str(model))
    assert "NaN or infinity among the weights, got it in cls_token" in found


@pytest.mark.parametrize("device", ["meta", "meta:0"])
def test_a_device_that_computes_nothing_is_refused(capsys, tmp_path, model, device):
    output = ["--output", str(tmp_path / "f.parquet"), "--device", device]
    found = refusal(capsys, "embed", str(tmp_path), "--model", str(model), *output)
    assert f"run.device: computes nothing, got {device!r}" in found
