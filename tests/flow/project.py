"""A small pipeline with the real dvc, the real stage frame and records, and cheap commands.

    python -m tests.flow.project FOLDER GRACE KEY…

materializes assets of it in a process that can be stopped.
"""

import os
import subprocess
import sys
from pathlib import Path

import dagster as dg

from assets.checks import manifest_verdict
from orchestration.runner import StageRunner, stage_asset
from orchestration.stages import CHECKOUT, Pipeline, read_pipeline

CHECKS = {key: {"verdict": manifest_verdict} for key in ("first", "pair")}
DVC = CHECKOUT / ".venv-dvc" / "bin" / "dvc"

PIPELINE = """
stages:
  first:
    cmd: python code/stage.py first ${mode.first}
    deps: [code, data/raw_images/fingerprint.json]
    params: [mode.first]
    outs:
    - data/first/verdict.json
    - data/first/manifest.txt
    - data/first/record.json
    - data/first/run.json
  second:
    cmd: python code/stage.py second ${mode.second} data/first/manifest.txt
    deps: [code/stage.py, data/first/manifest.txt, data/first/record.json]
    params: [mode.second]
    outs:
    - data/second/manifest.txt
    - data/second/record.json
    - data/second/run.json
    - data/second/events.jsonl
  pair:
    cmd: python code/stage.py pair ${mode.pair} data/second/manifest.txt
    deps: [code/stage.py, data/second/manifest.txt, data/second/record.json]
    params: [mode.pair]
    outs:
    - data/pair/one/verdict.json
    - data/pair/one/manifest.txt
    - data/pair/one/record.json
    - data/pair/one/run.json
    - data/pair/one/events.jsonl
    - data/pair/two/verdict.json
    - data/pair/two/manifest.txt
    - data/pair/two/record.json
    - data/pair/two/run.json
    - data/pair/two/events.jsonl
  third:
    foreach:
      left: {model: pair/two}
    do:
      cmd: python code/stage.py third_${key} ok data/${item.model}/manifest.txt
      deps: [code/stage.py, "data/${item.model}/manifest.txt", "data/${item.model}/record.json"]
      outs:
      - data/third_${key}/manifest.txt
      - data/third_${key}/record.json
"""

STAGE = '''
"""Usage: stage.py NAME MODE [INPUT…]; modes: ok, refuse, broken, wait, deaf.

The stage `pair` makes two artifacts; only the first of them depends on the mode.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from dinov3.launch import die_with_parent
from dinov3.stage import open_stage

die_with_parent()
name, mode, *inputs = sys.argv[1:]
output = Path("data", name)


def saved(number, frame):
    with open("saved.txt", "a") as stream:
        stream.write(signal.Signals(number).name + "\\n")
    if mode == "wait":
        sys.exit(130)


if mode in ("wait", "deaf"):
    signal.signal(signal.SIGINT, saved)
    signal.signal(signal.SIGTERM, saved)
    ignore = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"
    rank = subprocess.Popen([sys.executable, "-c", ignore], start_new_session=True)
    Path("pids.fifo").write_text(f"{os.getpid()} {rank.pid}")
    while True:
        time.sleep(600)


def judge(folder, passed):
    failed = {"name": "rows", "column": "path", "observed": 0, "threshold": 1}
    expectation = {**failed, "passed": passed}
    verdict = {"passed": passed, "rows": 1, "expectations": [expectation]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "verdict.json").write_text(json.dumps(verdict))


def train(stage, loss):
    lines = [{"step": step, "time": time.time(), "loss": loss / step} for step in (1, 2, 3)]
    stage.path("events.jsonl").write_text("".join(json.dumps(one) + "\\n" for one in lines))


def make(key, output, text=""):
    with open_stage(key, output, config={"text": text}) as stage:
        if mode == "broken":
            sys.exit("cannot be done: " + name)
        text += key + "".join(stage.read("input", Path(path)).read_text() for path in inputs)
        if name in ("first", "pair"):
            judge(stage.path("."), True)
        if name in ("second", "pair"):
            train(stage, len(text))
        stage.path("manifest.txt").write_text(text)
        stage.facts["rows"] = len(text)


if mode == "refuse":
    if name == "pair":
        judge(output / "one", True)
    judge(output / "two" if name == "pair" else output, False)
    print("refused by its own checks", file=sys.stderr)
    sys.exit(3)
if name == "pair":
    make("pair_one", output / "one", mode)
    make("pair_two", output / "two")
elif name == "first":
    make(name, output, Path("data/raw_images/fingerprint.json").read_text())
else:
    make(name, output)
print("made", name, "x" * 10, sep="\\r", flush=True)
'''


def environment() -> dict[str, str]:
    """Ours, with this interpreter first and the plain shell, as tools/dvc has it."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "SHELL": "/bin/sh"}


class Project:
    """A checkout of its own, with dvc set up."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def create(cls, root: Path) -> "Project":
        """Makes one; nothing has run in it yet."""
        (root / "code").mkdir(parents=True)
        (root / "data" / "raw_images").mkdir(parents=True)
        (root / "dvc.yaml").write_text(PIPELINE)
        (root / "code" / "stage.py").write_text(STAGE)
        (root / ".dvcignore").write_text("__pycache__\n")
        project = cls(root)
        project.set_source("one")
        project.set_modes()
        project.dvc("init", "--no-scm", "--quiet")
        project.dvc("config", "core.analytics", "false")
        return project

    def set_source(self, content: str) -> None:
        """Changes what the source holds."""
        (self.root / "data" / "raw_images" / "fingerprint.json").write_text(content)

    def set_modes(self, first: str = "ok", second: str = "ok", pair: str = "ok") -> None:
        """Says how the stages shall behave."""
        text = f"mode: {{first: {first}, second: {second}, pair: {pair}}}\n"
        (self.root / "params.yaml").write_text(text)

    def dvc(self, *arguments: str, check: bool = True) -> str:
        """Runs dvc as a shell would; returns what it said."""
        done = subprocess.run(
            [DVC, *arguments],
            cwd=self.root,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0 or not check, done.stdout
        return done.stdout

    @property
    def pipeline(self) -> Pipeline:
        """As it is written now."""
        return read_pipeline(self.root)

    @property
    def assets(self) -> list[dg.AssetsDefinition]:
        """The assets of each stage; the first and the pair are judged."""
        graph = self.pipeline
        return [
            stage_asset(
                key, group="data", kinds=set(), description=key, pipeline=graph,
                checks=CHECKS.get(key),
            )
            for key in graph.stages
        ]  # fmt: skip

    def materialize(self, instance: dg.DagsterInstance, *keys: str, **settings):
        """Materializes all assets or those named, in this process."""
        runner = StageRunner(dvc=str(DVC), log_seconds=0.2, **settings)
        return dg.materialize(
            self.assets,
            selection=list(keys) or None,
            instance=instance,
            resources={"runner": runner},
            raise_on_error=False,
        )


if __name__ == "__main__":
    folder, grace, *wanted = sys.argv[1:]
    with dg.DagsterInstance.ephemeral() as ephemeral:
        Project(Path(folder)).materialize(ephemeral, *wanted, grace_seconds=float(grace))
