"""Chains of records as a release holds them: order, continued runs, what is handed down."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dinov3.release.chain import Chain, read_chain, stem_of
from dinov3.release.contents import Contents
from dinov3.release.head import Head, Root
from dinov3.release.policy_terms import Policy
from dinov3.release.record import Edge, Output, Record, canonical_json, digest_of
from dinov3.release.record_rules import record_faults
from dinov3.release.refusals import Refused
from dinov3.release.tensors import hash_file

SOURCE = Edge("source", "folder", "a" * 64, None)
DECLARED_SOURCE = Root("source", "folder", "a" * 64, (), "listed")
OUTPUT = Output("b" * 64, 3)
WEIGHTS = Output("b" * 64, 3, "9" * 64)
SNAPSHOT = "snapshots/step_000000003.safetensors"
TRAINED = ("backbone.safetensors", "health.json", SNAPSHOT)
COUNTED = {"num_images": 8}
DATA = ("manifest.parquet", "verdict.json", "curated.parquet")  # a table and a dataset in one


class Drawer:
    """Writes records into a folder, each made from those written before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.listed: list[tuple[str, str]] = []

    def add(
        self,
        stage: str,
        *edges: Edge,
        steps: range | None = None,
        facts: Mapping[str, Any] | None = None,
        licences: Mapping[str, tuple[str, ...]] | None = None,
        writes: tuple[str, ...] | None = None,
        chosen: int | None = None,
    ) -> Edge:
        """An edge to the new record's first output."""
        trained = {} if steps is None else {"planned": steps[-1], "performed": steps[-1]}
        if chosen is not None:
            trained = {"chosen": chosen}
        names = writes or (("out",) if steps is None else TRAINED)
        record = Record(
            stage=stage,
            inputs=edges,
            config={},
            config_digest=digest_of({}),
            code="c" * 64,
            environment="d" * 64,
            outputs={name: WEIGHTS if name.endswith(".safetensors") else OUTPUT for name in names},
            steps=trained,
            licences=licences or {"in": (), "out": ()},
            facts=facts or {},
        )
        data = record.to_bytes()
        digest = digest_of(json.loads(data))
        stem = stem_of(stage, digest)
        run: dict[str, Any] = {"record": digest, "beside": {}}
        self._write(f"records/{stem}.json", data)
        if steps is not None:
            lines = [json.dumps({"step": step, "time": 0}) for step in steps]
            log = self._write(f"events/{stem}.jsonl", "".join(f"{one}\n" for one in lines).encode())
            run["beside"]["events.jsonl"] = hash_file(log).sha256
        self._write(f"runs/{stem}.json", canonical_json(run))
        self.listed.append((stage, digest))
        return Edge(f"from {stage}", names[0], "b" * 64, digest)

    def data(self, **fields: Any) -> Edge:
        """An edge to a dataset of eight images; that is where the chain begins."""
        start = self.add("data", SOURCE, writes=DATA, facts={"kept": 8}, **fields)
        return replace(start, name="curated.parquet")

    def read(self, roots: tuple[Root, ...] = ()) -> Chain:
        """The chain, the last record being weights and evaluation in one."""
        hashes = {
            path.relative_to(self.folder).as_posix(): hash_file(path)
            for path in self.folder.rglob("*")
            if path.is_file()
        }
        last = self.listed[-1][1]
        head = Head(
            model="vits",
            version="0.1.0",
            final=last,
            evaluation=last,
            records=tuple(self.listed),
            roots=roots or (DECLARED_SOURCE,),
            previous=None,
            policy=Policy((), 1.0, 1.0, "MIT"),
            licence="MIT",
            tensors={},
            images=None,
        )
        return read_chain(Contents(self.folder, hashes), head)

    def _write(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return path


@pytest.fixture
def drawer(tmp_path: Path) -> Drawer:
    return Drawer(tmp_path)


def _refusal(drawer: Drawer, *roots: Root) -> str:
    with pytest.raises(Refused, match=r".") as caught:
        drawer.read(roots)
    return caught.value.name


def test_records_of_equal_rank_stand_by_stage(drawer: Drawer) -> None:
    start = drawer.data()
    first, second = drawer.add("first", start), drawer.add("second", start)
    drawer.add("end", first, second)
    assert [link.record.stage for link in drawer.read().links.values()] == [
        "data",
        "first",
        "second",
        "end",
    ]
    drawer.listed[1:3] = drawer.listed[2:0:-1]
    assert _refusal(drawer) == "record-unlisted"


def test_long_chain_is_no_recursion(drawer: Drawer) -> None:
    edge = drawer.data()
    for number in range(400):
        edge = drawer.add(f"stage_{number}", edge)
    assert len(drawer.read().links) == 401


def _continue(drawer: Drawer, steps: range) -> None:
    start = drawer.data()
    short = drawer.add("training", start, steps=range(1, 6), facts=COUNTED)
    ancestor = Edge("resume", short.name, short.sha256, short.record)
    drawer.add("training", start, ancestor, steps=steps, facts=COUNTED)


@pytest.mark.parametrize("steps", [range(6, 11), range(10, 11), range(8, 21, 4)])
def test_continued_run_logs_what_came_after(steps: range, drawer: Drawer) -> None:
    _continue(drawer, steps)
    assert drawer.read().final.events is not None


def test_continued_run_that_logs_its_ancestors_steps_is_refused(drawer: Drawer) -> None:
    _continue(drawer, range(5, 11))
    assert _refusal(drawer) == "steps-differ"


def test_licences_are_handed_down(drawer: Drawer) -> None:
    start = drawer.data(licences={"in": ("MIT",), "out": ("MIT",)})
    drawer.add("end", start, licences={"in": ("MIT",), "out": ("MIT",)})
    assert len(drawer.read((replace(DECLARED_SOURCE, licences=("MIT",)),)).links) == 2


@pytest.mark.parametrize("licences", [(), ("MIT", "CC0-1.0"), ("CC0-1.0",)])
def test_root_with_other_licences_than_came_in_is_refused(
    licences: tuple[str, ...], drawer: Drawer
) -> None:
    drawer.data(licences={"in": ("MIT",), "out": ("MIT",)})
    assert _refusal(drawer, replace(DECLARED_SOURCE, licences=licences)) == "licence"


@pytest.mark.parametrize(
    ("entering", "leaving"), [((), ()), (("MIT",), ()), (("GPL-2",), ("MIT",))]
)
def test_licence_that_gets_lost_is_refused(
    entering: tuple[str, ...], leaving: tuple[str, ...], drawer: Drawer
) -> None:
    start = drawer.data(licences={"in": ("MIT",), "out": ("MIT",)})
    drawer.add("end", start, licences={"in": entering, "out": leaving})
    assert _refusal(drawer) == "licence"


def _choose(drawer: Drawer, chosen: int) -> None:
    run = drawer.add("training", drawer.data(), steps=range(1, 6), facts=COUNTED)
    snapshot = Edge("snapshot 3", SNAPSHOT, "b" * 64, run.record)
    photographs = Edge("backgrounds", "scikit-image", "8" * 64, None)
    writes = ("backbone.safetensors", "choice.json")
    drawer.add("gram_teacher", snapshot, photographs, writes=writes, chosen=chosen)


PHOTOGRAPHS = Root("backgrounds", "scikit-image", "8" * 64, (), "listed")


def test_chosen_snapshot_took_no_steps_of_its_own(drawer: Drawer) -> None:
    _choose(drawer, 3)
    assert drawer.read((DECLARED_SOURCE, PHOTOGRAPHS)).final.events is None


@pytest.mark.parametrize("chosen", [2, 6, -1])
def test_choice_of_a_step_without_a_snapshot_is_refused(chosen: int, drawer: Drawer) -> None:
    _choose(drawer, chosen)
    assert _refusal(drawer, DECLARED_SOURCE, PHOTOGRAPHS) == "steps-differ"


def _record(**fields: Any) -> Record:
    known = {"config": {}, "config_digest": "", "code": "", "environment": ""}
    return Record(**{"stage": "some", "inputs": (), "outputs": {}, **known, **fields})


def _faults(record: Record, **above: Record) -> list[str]:
    return [refusal for refusal, _ in record_faults(record, above)]


RUN = _record(steps={"planned": 3, "performed": 3}, outputs={SNAPSHOT: WEIGHTS})
CHOICE = _record(
    steps={"chosen": 3},
    inputs=(Edge("snapshot 3", SNAPSHOT, "b" * 64, "run"),),
    outputs={"backbone.safetensors": WEIGHTS},
)


def test_chosen_weights_are_the_snapshots_bytes() -> None:
    assert _faults(CHOICE, run=RUN) == []
    other = {"backbone.safetensors": replace(WEIGHTS, sha256="f" * 64)}
    assert _faults(replace(CHOICE, outputs=other), run=RUN) == ["weights-differ"]
    more = {**CHOICE.outputs, "heads.safetensors": replace(WEIGHTS, sha256="f" * 64)}
    assert _faults(replace(CHOICE, outputs=more), run=RUN) == ["weights-differ"]


def test_chosen_snapshot_is_of_a_training() -> None:
    assert _faults(CHOICE, run=replace(RUN, steps={})) == ["steps-differ"]
    early = {"planned": 2, "performed": 2}
    assert _faults(CHOICE, run=replace(RUN, steps=early)) == ["steps-differ"]


LISTED = _record(outputs={"curated.parquet": OUTPUT}, facts={"kept": 8})
CAPTIONED = _record(inputs=(Edge("dataset", "curated.parquet", "", "data"),))
TRAINING = _record(
    steps={"planned": 3, "performed": 3},
    inputs=(Edge("dataset", "curated.parquet", "", "data"),),
    outputs={"backbone.safetensors": WEIGHTS, "health.json": OUTPUT},
    facts=COUNTED,
)
ALIGNMENT = replace(TRAINING, inputs=(Edge("pairs", "pairs.parquet", "", "pairs"),), facts={})
OUTSIDE = Edge("init", "outside.pth", "e" * 64, None)


def test_training_reads_what_a_dataset_lists_or_pairs_made_of_it() -> None:
    assert _faults(TRAINING, data=LISTED) == []
    assert _faults(ALIGNMENT, pairs=CAPTIONED) == []
    assert _faults(ALIGNMENT, pairs=replace(CAPTIONED, inputs=())) == ["images-differ"]
    assert _faults(ALIGNMENT) == ["images-differ"]
    assert _faults(replace(TRAINING, inputs=()), data=LISTED) == ["images-differ"]


def test_training_below_outside_weights_may_read_what_nothing_lists() -> None:
    facts = {"training_data": "unknown"}
    assert _faults(replace(ALIGNMENT, inputs=(OUTSIDE,), facts=facts)) == []


@pytest.mark.parametrize("num_images", [None, 7, 8.0, True, "8"])
def test_training_counts_the_images_that_were_kept(num_images: Any) -> None:
    record = replace(TRAINING, facts={"num_images": num_images})
    assert _faults(record, data=LISTED) == ["images-differ"]


def test_training_reads_no_table_that_lists_nothing() -> None:
    stray = Edge("init", "embeddings.parquet", "", "data")
    record = replace(TRAINING, inputs=(*TRAINING.inputs, stray))
    assert _faults(record, data=LISTED) == ["edge-broken"]


def test_weights_come_from_steps_or_from_outside() -> None:
    outputs = {"backbone.safetensors": WEIGHTS}
    assert _faults(_record(outputs=outputs)) == ["steps-differ"]
    assert _faults(_record(outputs=outputs, inputs=(OUTSIDE,), facts=UNKNOWN)) == []


@pytest.mark.parametrize(
    ("role", "writes"),
    [
        ("source", "manifest.parquet"),
        ("captions", "pairs.parquet"),
        ("embedder", "embeddings.parquet"),
        ("backgrounds", "report.json"),
        ("backgrounds", "choice.json"),
        ("test pictures", "report.json"),
    ],
)
def test_role_of_a_root_counts_where_it_is_read(role: str, writes: str) -> None:
    root = (Edge(role, "it", "e" * 64, None),)
    written = {writes: OUTPUT, "verdict.json": OUTPUT}
    assert _faults(_record(inputs=root, outputs=written)) == []
    assert _faults(_record(inputs=root, outputs={"out": OUTPUT})) == ["root-undeclared"]
    record = replace(TRAINING, inputs=(*TRAINING.inputs, *root))
    with_it = replace(record, outputs={**record.outputs, **written})
    assert _faults(with_it, data=LISTED) == ["root-undeclared"]


UNKNOWN = {"training_data": "unknown"}
DECLARED = Root("init", "outside.pth", "e" * 64, (), "unknown")


def test_outside_weights_are_told_all_the_way_down(drawer: Drawer) -> None:
    start = drawer.add("start", OUTSIDE, facts=UNKNOWN)
    drawer.add("end", start, facts=UNKNOWN)
    assert drawer.read((DECLARED,)).unknown_roots == ("outside.pth",)


@pytest.mark.parametrize("facts", [({}, UNKNOWN), (UNKNOWN, {})])
def test_record_that_forgets_outside_weights_is_refused(
    facts: tuple[dict[str, str], dict[str, str]], drawer: Drawer
) -> None:
    start = drawer.add("start", OUTSIDE, facts=facts[0])
    drawer.add("end", start, facts=facts[1])
    assert _refusal(drawer, DECLARED) == "root-undeclared"


@pytest.mark.parametrize(
    "root",
    [
        Root("init", "outside.pth", "e" * 64, (), "listed"),
        Root("init", "outside.pth", "f" * 64, (), "unknown"),
        Root("source", "outside.pth", "e" * 64, (), "unknown"),
    ],
)
def test_root_that_is_declared_otherwise_is_refused(root: Root, drawer: Drawer) -> None:
    drawer.add("start", OUTSIDE, facts=UNKNOWN)
    assert _refusal(drawer, root) == "root-undeclared"
