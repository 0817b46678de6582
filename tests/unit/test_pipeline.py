"""`dvc.yaml` names every file a stage's result depends on."""

from pathlib import Path

import grimp
import pytest
import yaml

CHECKOUT = Path(__file__).resolve().parents[2]
ENTRIES = {
    "image_manifest": "dinov3.curation.manifest",
    "image_embeddings": "dinov3.curation.embed",
    "curated_dataset": "dinov3.curation.curate",
    "pretrained_checkpoint": "dinov3.train.pretrain",
    "eval_reports": "dinov3.evals.report",
}
# They carry a stage and its words, and decide nothing: a better error message re-trains no model.
FRAME = {
    "dinov3.checkpoint",
    "dinov3.config",
    "dinov3.curation.progress",
    "dinov3.device",
    "dinov3.errors",
    "dinov3.launch",
    "dinov3.stage",
}


@pytest.fixture(scope="module")
def graph():
    return grimp.build_graph("dinov3", cache_dir=None)


@pytest.fixture(scope="module")
def stages():
    pipeline = yaml.safe_load((CHECKOUT / "dvc.yaml").read_text())["stages"]
    return {name: stage.get("do", stage) for name, stage in pipeline.items()}


def test_every_stage_is_looked_at(stages):
    assert set(stages) == set(ENTRIES)


@pytest.mark.parametrize(("stage", "entry"), ENTRIES.items())
def test_every_module_a_stage_imports_is_a_dependency_of_it(graph, stages, stage, entry):
    needed = {entry, *graph.find_upstream_modules(entry)} - FRAME
    needed = {name for name in needed if not name.startswith("dinov3.release")}
    files = [path_of(name) for name in needed]
    files = [path for path in files if path.name != "__init__.py" or "sources" in path.parts]
    deps = [Path(dep) for dep in stages[stage]["deps"] if dep.startswith("dinov3")]
    missing = [path for path in files if not any(path.is_relative_to(dep) for dep in deps)]
    assert sorted(map(str, missing)) == []


def path_of(module: str) -> Path:
    path = Path(*module.split("."))
    return path / "__init__.py" if (CHECKOUT / path).is_dir() else path.with_suffix(".py")


@pytest.mark.parametrize("stage", ENTRIES)
def test_every_output_is_named_one_by_one(stages, stage):
    """Times stand in `run.json` alone, so what lies downstream depends on single files."""
    outs = stages[stage]["outs"]
    assert {Path(out).name for out in outs} >= {"record.json", "run.json"}
    assert not [dep for dep in stages[stage]["deps"] if dep.endswith("run.json")]
