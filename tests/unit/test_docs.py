"""What the documents show exists and runs, and the tree keeps its own rules."""

import ast
import contextlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from dinov3.__main__ import main
from dinov3.cli import app

CHECKOUT = Path(__file__).resolve().parents[2]
README = (CHECKOUT / "README.md").read_text()
USAGE_ERROR = typer.BadParameter.__base__
DOCUMENTS = sorted(
    path
    for folder in (".", "docs", "data", "data/release_log")
    for path in CHECKOUT.glob(f"{folder}/*.md")
)
BLOCKS = re.findall(r"<!-- run -->\n```(python|sh)\n(.*?)```", README, re.DOTALL)
CODE = sorted(
    path for top in ("dinov3", "assets", "orchestration") for path in (CHECKOUT / top).rglob("*.py")
)


def shown(path):
    """All code of a document: lines of its blocks, and what stands in backticks."""
    text = path.read_text()
    fences = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^ {4}(.*)$", prose, re.MULTILINE)
    blocks = "\n".join([*fences, *indented]).replace("\\\n", " ")
    inline = re.findall(r"`([^`]+)`", re.sub(r"^ {4}.*$", "", prose, flags=re.MULTILINE))
    return [*blocks.splitlines(), *(" ".join(code.split()) for code in inline)]


SHOWN = [(path.name, line) for path in DOCUMENTS for line in shown(path)]
COMMANDS = sorted(
    {
        (name, found[1])
        for name, line in SHOWN
        if (found := re.search(r"(?:^|-m )dinov3 ([a-z].*)$", line))
    }
)


def refused_by_the_parser(words, capsys, monkeypatch):
    """Why the verb would not take these words, if so. `…` stands for what is left out."""
    elided = "…" in words or len(words) == 1  # a verb alone is only spoken of
    group, words = typer.main.get_command(app), [word for word in words if word != "…"]
    while words and words[0] in getattr(group, "commands", {}):
        group = group.commands[words.pop(0)]
    if not words:
        return ""
    if hasattr(group, "commands"):
        return refused_by_a_light_verb(words, capsys, monkeypatch, elided=elided)
    if elided:
        known = {option for parameter in group.params for option in parameter.opts}
        return " ".join({word for word in words if word.startswith("--")} - known)
    try:
        group.make_context("shown", words)
    except typer.Exit:  # of --help
        return ""
    except USAGE_ERROR as error:
        return str(error)
    return ""


def refused_by_a_light_verb(words, capsys, monkeypatch, *, elided):
    """The same of a verb with its own parser, which names what it does not know last of all."""
    monkeypatch.setattr(sys, "argv", ["dinov3", *words, "--no-such"])
    with contextlib.suppress(SystemExit):
        main()
    said = capsys.readouterr().err.strip().splitlines()
    if not said or said[-1].endswith("unrecognized arguments: --no-such"):
        return ""
    return "" if elided and "are required" in said[-1] else said[-1]


@pytest.mark.parametrize(("document", "command"), COMMANDS)
def test_command_that_a_document_shows_is_taken_by_its_parser(
    document, command, capsys, monkeypatch
):
    words = shlex.split(command.partition(" > ")[0], comments=True)
    assert refused_by_the_parser(words, capsys, monkeypatch) == ""


@pytest.mark.parametrize(
    "command",
    [
        "trian x",
        "verify … --kee y",
        "verify x --format xml",
        "keys new",
        "releases lst",
        "export x",
        "export … --too y",
    ],
)
def test_command_that_does_not_exist_is_noticed(command, capsys, monkeypatch):
    assert refused_by_the_parser(command.split(), capsys, monkeypatch)


def test_documents_show_many_commands():
    assert {"README.md", "audit.md", "releases.md", "lineage.md"} <= {name for name, _ in COMMANDS}
    assert len(COMMANDS) > 40


@pytest.mark.parametrize(("language", "block"), BLOCKS)
def test_block_of_the_readme_runs_and_prints_what_it_shows(language, block, tmp_path):
    if language == "python":
        command = [sys.executable, "-W", "ignore", "-c", block]
    else:
        command = ["sh", "-ec", block.replace("python ", f"{sys.executable} ")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    promised = re.findall(r"^# -> (.*)$", block, re.MULTILINE)
    assert promised == (done.stdout.splitlines() if promised else [])


def test_readme_has_blocks_that_run():
    assert {language for language, _ in BLOCKS} == {"python", "sh"}


def test_readme_is_short_enough_to_be_read():
    assert len(README.splitlines()) <= 150


def test_every_path_that_a_document_names_exists():
    tops = "dinov3|tests|docs|assets|orchestration|tools"
    named = {
        (name, found[1])
        for name, line in SHOWN
        for found in re.finditer(rf"(?:^|\s)((?:{tops})/[\w./-]+)(?=$|[\s:,])", line)
    }
    assert len(named) > 50
    absent = {pair for pair in named if not (CHECKOUT / pair[1]).exists()}
    assert absent == {("recipes.md", "dinov3/recipes/lab")}  # which its reader makes


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_every_link_of_a_document_leads_somewhere(path):
    for target, heading in re.findall(r"\]\(((?!https?:)[^)#]+)(?:#([^)]+))?\)", path.read_text()):
        assert (path.parent / target).exists(), target
        text = (path.parent / target).read_text()
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings}
        assert heading in ("", *anchors), f"{target}#{heading}"


def test_every_document_is_found_in_one_hop():
    linked = set(re.findall(r"\]\((docs/[\w.]+)[)#]", README))
    assert {f"docs/{path.name}" for path in CHECKOUT.glob("docs/*.md")} == linked


def test_make_targets_that_a_document_shows_exist():
    targets = set(re.findall(r"^([a-z-]+):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE))
    named = {found[1] for _, line in SHOWN if (found := re.match(r"make ([a-z-]+)", line))}
    assert {"demo", "test"} <= named <= targets


def test_stages_that_a_document_shows_exist():
    stages = set(yaml.safe_load((CHECKOUT / "dvc.yaml").read_text())["stages"])
    spoken = r"(?:tools/)?dvc (?:repro|checkout|commit|pull) ([a-z_]+)"
    named = {found[1] for _, line in SHOWN if (found := re.match(spoken, line))}
    assert "release" in named <= stages


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_file_is_short_and_opens_with_what_it_is_for(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "no module docstring"
    assert len(text.splitlines()) <= 500


def test_every_stage_depends_on_files_that_exist():
    params = yaml.safe_load((CHECKOUT / "params.yaml").read_text())
    pipeline = yaml.safe_load((CHECKOUT / "dvc.yaml").read_text())["stages"]
    deps = [dep for stage in pipeline.values() for dep in stage.get("do", stage)["deps"]]
    code = [dep.replace("${recipe}", params["recipe"]) for dep in deps if dep.startswith("dinov3")]
    assert code
    assert [dep for dep in code if not (CHECKOUT / dep).exists()] == []
