"""What a record must hold for its weights to be accounted for, whoever wrote it.

    tabled    pictures from a source, in a table with a verdict on it
    trained   planned steps, a log of events, a verdict on its health, a dataset that lists images
    chosen    a snapshot of a training above it, byte for byte: the Gram teacher
    adopted   outside weights, of which nobody here knows what they were trained on

Weights of any other origin come from nowhere. Gates ask this before signing, verifiers after.
"""

from collections.abc import Iterator, Mapping

from dinov3.release.policy_terms import NO_WEIGHTS
from dinov3.release.record import Edge, Record

CURATED_NAME = "curated.parquet"
HEALTH_NAME = "health.json"
VERDICT_NAME = "verdict.json"
TRAINING_DATA, UNKNOWN = "training_data", "unknown"  # a fact that everything below inherits
RESUME = "resume"  # role of the finished run that a longer one goes on from

_TABLE_NAME = "manifest.parquet"
_PAIRS_NAME = "pairs.parquet"
_REPORTS = ("report.json",)
_READ_WHERE = {  # root -> what a record writes that reads it; such a record trains nothing
    "source": (_TABLE_NAME,),
    "captions": (_PAIRS_NAME,),
    "embedder": ("embeddings.parquet",),
    "backgrounds": (*_REPORTS, "choice.json"),
    **dict.fromkeys(("pictures", "training pictures", "test pictures"), _REPORTS),
}
_TRAINED_BY = (_TABLE_NAME, CURATED_NAME, _PAIRS_NAME, "config.json")  # and weights
_WEIGHTS = ".safetensors"

Faults = Iterator[tuple[str, str]]  # name of the refusal, why
RootKey = tuple[str, str, str]  # role, name, sha256


def record_faults(record: Record, above: Mapping[str, Record]) -> Faults:
    """What is wrong with a record by these rules.

    Args:
        record: One of a chain.
        above: The records of its inputs, by digest.

    Yields:
        The refusal's name and why.
    """
    yield from _root_faults(record)
    yield from _unknown_faults(record, above)
    if trains(record):
        yield from _training_faults(record, above)
    elif "chosen" in record.steps:
        yield from _choice_faults(record, above)
    elif writes_weights(record) and not any(map(is_outside_weights, record.inputs)):
        yield "steps-differ", "wrote weights in no steps, and not from outside weights"
    yield from _resume_faults(record, above)
    yield from _table_faults(record, above)


def trains(record: Record) -> bool:
    """Whether a record says that it trained."""
    return "performed" in record.steps


def writes_weights(record: Record) -> bool:
    """Whether there are tensors among its outputs."""
    return any(
        output.tensors is not None or name.endswith(_WEIGHTS)
        for name, output in record.outputs.items()
    )


def is_outside_weights(edge: Edge) -> bool:
    """Whether nobody here knows what an input was trained on."""
    return edge.record is None and edge.role not in NO_WEIGHTS


def datasets_of(record: Record) -> set[str | None]:
    """Digests of the records of the curated datasets it read; None for one without a record."""
    return {edge.record for edge in record.inputs if edge.name == CURATED_NAME}


def root_licences(records: Mapping[str, Record]) -> dict[RootKey, set[str]]:
    """The licences that may have come with each root of a chain, by its role, name and sha256.

    A record does not say which of its inputs a licence came with: it is whichever no record above
    hands down, and any where all are handed down.

    Args:
        records: All of a chain, by digest.
    """
    found: dict[RootKey, set[str]] = {}
    for record in records.values():
        roots = [edge for edge in record.inputs if edge.record is None]
        inherited: set[str] = set()
        for edge in record.inputs:
            if edge.record in records:
                inherited.update(records[str(edge.record)].licences.get("out", ()))
        entering = set(record.licences.get("in", ()))
        own = entering - inherited or entering
        for edge in roots:
            found.setdefault((edge.role, edge.name, edge.sha256), set()).update(own)
    return found


def _root_faults(record: Record) -> Faults:
    """A role vouches for what entered only where that role is read."""
    makes_weights = trains(record) or ("chosen" not in record.steps and writes_weights(record))
    for edge in record.inputs:
        if edge.record is not None or edge.role not in NO_WEIGHTS:
            continue
        places = _READ_WHERE.get(edge.role, ())
        if makes_weights or not any(name in record.outputs for name in places):
            why = f"{edge.name!r} enters as {edge.role}, where no such thing is read"
            yield "root-undeclared", why


def _unknown_faults(record: Record, above: Mapping[str, Record]) -> Faults:
    """Training data are unknown below outside weights, and nowhere else: that excuses much."""
    is_unknown = any(map(is_outside_weights, record.inputs)) or any(
        above[str(edge.record)].facts.get(TRAINING_DATA) == UNKNOWN
        for edge in record.inputs
        if edge.record in above
    )
    if is_unknown != (record.facts.get(TRAINING_DATA) == UNKNOWN):
        found = "" if is_unknown else "no "
        yield "root-undeclared", f"has {found}outside weights above it, and says otherwise"


def _table_faults(record: Record, above: Mapping[str, Record]) -> Faults:
    """Pictures come from somewhere, by a table that was judged, and by one table alone."""
    is_table = _TABLE_NAME in record.outputs
    sources = [edge for edge in record.inputs if edge.role == "source" and edge.record is None]
    if is_table and not sources:
        yield "root-undeclared", "wrote an image table from no source"
    if is_table and VERDICT_NAME not in record.outputs:
        yield "record-malformed", f"wrote an image table without {VERDICT_NAME}"
    datasets = _known_datasets(record, above)
    made_of = {table for one in datasets for table in _tables(one)}
    if datasets and not _tables(record) <= made_of:
        yield "images-differ", "read another image table than its dataset was made of"


def _known_datasets(record: Record, above: Mapping[str, Record]) -> list[Record]:
    """The records of the datasets it read, itself or through pairs."""
    pairs = [above[str(edge.record)] for edge in _pairs(record) if edge.record in above]
    digests = {digest for one in (record, *pairs) for digest in datasets_of(one)}
    return [above[str(digest)] for digest in digests if digest in above]


def _tables(record: Record) -> set[tuple[str, str | None]]:
    """The image tables it read, by their bytes and their records."""
    return {(edge.sha256, edge.record) for edge in record.inputs if edge.name == _TABLE_NAME}


def _pairs(record: Record) -> list[Edge]:
    return [edge for edge in record.inputs if edge.name == _PAIRS_NAME]


def _resume_faults(record: Record, above: Mapping[str, Record]) -> Faults:
    """What a run goes on from is a shorter run of its own stage: its steps count as taken."""
    for edge in record.inputs:
        other = above.get(str(edge.record))
        if edge.role == RESUME and (other is None or other.stage != record.stage):
            yield "steps-differ", f"goes on from {edge.name!r}, which is of no run of its stage"


def _training_faults(record: Record, above: Mapping[str, Record]) -> Faults:
    if HEALTH_NAME not in record.outputs:
        yield "steps-differ", f"trained, and wrote no {HEALTH_NAME}"
    for edge in record.inputs:
        known = edge.name in _TRAINED_BY or edge.name.endswith(_WEIGHTS)
        if edge.record is not None and not known:
            yield "edge-broken", f"trained on {edge.name!r}, which is no dataset and no weights"
    datasets = datasets_of(record)
    if record.facts.get(TRAINING_DATA) != UNKNOWN:
        listed = [_is_listed(edge, above) for edge in _pairs(record)]
        if not all(listed) or not (listed or datasets):
            yield "images-differ", "trained on images that no curated dataset lists"
    if datasets:
        yield from _count_faults(record, datasets, above)


def _is_listed(pairs: Edge, above: Mapping[str, Record]) -> bool:
    return pairs.record in above and bool(datasets_of(above[str(pairs.record)]))


def _count_faults(record: Record, datasets: set[str | None], above: Mapping[str, Record]) -> Faults:
    """It says how many images it trained on, and they are those that its dataset kept."""
    used = record.facts.get("num_images")
    for digest in datasets:
        kept = above[str(digest)].facts.get("kept") if digest in above else None
        if type(used) is not int or type(kept) is not int or used != kept:
            yield "images-differ", f"trained on {used!r} images, its dataset kept {kept!r}"


def _choice_faults(record: Record, above: Mapping[str, Record]) -> Faults:
    """What is chosen is a snapshot of a training that went so far, and nothing else."""
    chosen = record.steps["chosen"]
    if type(chosen) is not int or chosen < 0:
        yield "steps-differ", f"chose step {chosen!r}"
        return
    name = f"snapshots/step_{chosen:09d}{_WEIGHTS}"
    snapshots = [edge for edge in record.inputs if edge.name == name and edge.record in above]
    if not any(_went_so_far(above[str(edge.record)], chosen) for edge in snapshots):
        yield "steps-differ", f"chose step {chosen}, of which no training above kept a snapshot"
        return
    kept = {edge.sha256 for edge in snapshots}
    for written, output in record.outputs.items():
        is_weights = output.tensors is not None or written.endswith(_WEIGHTS)
        if is_weights and {output.sha256} != kept:
            yield "weights-differ", f"{written} is not the snapshot of step {chosen}"


def _went_so_far(record: Record, step: int) -> bool:
    performed = record.steps.get("performed")
    return type(performed) is int and performed >= step
