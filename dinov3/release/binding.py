"""What binds weights, evaluation and images of a release to its records."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinov3.release.card_facts import protocol_of
from dinov3.release.chain import Chain, Link
from dinov3.release.contents import (
    CONFIG_NAME,
    EVALS_NAME,
    HEADS_NAME,
    MODEL_NAME,
    Contents,
)
from dinov3.release.head import DIGEST_ONLY, KEYED, PLAIN, Head
from dinov3.release.images import IMAGES_NAME, ROLE_EVALUATED, ROLE_TRAINED, read_images
from dinov3.release.policy import (
    MODEL,
    NONE,
    UNKNOWN,
    ImageCounts,
    PolicyError,
    contamination_of,
    held_out_faults,
)
from dinov3.release.record import file_sha256
from dinov3.release.record_rules import datasets_of
from dinov3.release.refusals import CannotCheck, Refused

WEIGHTS_NAMES = ("backbone.safetensors", "dinotxt.safetensors")  # as stages call them
WRITTEN_AS = {
    MODEL_NAME: WEIGHTS_NAMES[0],
    HEADS_NAME: HEADS_NAME,
    CONFIG_NAME: CONFIG_NAME,
}  # name in a release -> name in the folder of the stage
REPORT_NAME = "report.json"
_MOST_ROWS = 2000  # of a report; the card lays protocols against subjects


def weights_name(link: Link) -> str:
    """What the stage called the file of weights it wrote.

    Raises:
        Refused: `weights-differ`: it wrote none.
    """
    for name in WEIGHTS_NAMES:
        if name in link.record.outputs:
            return name
    raise Refused("weights-differ", MODEL_NAME, f"{link.stem} wrote no weights")


def check_weights(contents: Contents, head: Head, chain: Chain) -> None:
    """The weights are those of the final record, by their bytes and by their tensors.

    Raises:
        Refused: `weights-differ`.
    """
    outputs = chain.final.record.outputs
    written = {**WRITTEN_AS, MODEL_NAME: weights_name(chain.final)}
    for name, written_as in written.items():
        here, wrote = contents.hashes.get(name), outputs.get(written_as)
        if here is None and wrote is None:
            continue
        if here is None or wrote is None:
            why = f"{chain.final.stem} wrote none" if wrote is None else "not here"
            raise Refused("weights-differ", name, why)
        if here.sha256 != wrote.sha256 or here.bytes != wrote.bytes:
            why = f"sha256 {here.sha256[:16]}, {chain.final.stem} wrote {wrote.sha256[:16]}"
            raise Refused("weights-differ", name, why)
        if here.tensors != wrote.tensors:
            raise Refused("weights-differ", name, "the record's tensor digest is of other tensors")
    tensors = {name: one.tensors for name, one in contents.hashes.items() if one.tensors}
    if dict(head.tensors) != tensors:
        raise Refused("weights-differ", "release.json", "its tensor digests are of other tensors")


def check_evaluation(contents: Contents, chain: Chain) -> dict[str, Any]:
    """The report is the one its record wrote, of these weights, on the image table of the chain.

    Returns:
        The report.

    Raises:
        Refused: `evaluation-unbound`, or `evals.json` is malformed.
    """
    link, report = chain.evaluation, contents.read_object(EVALS_NAME)
    wrote = link.record.outputs.get(REPORT_NAME)
    if wrote is None or wrote.sha256 != contents.hashes[EVALS_NAME].sha256:
        raise _unbound(f"{link.stem} wrote another report")
    name = weights_name(chain.final)
    weights = chain.final.record.outputs[name]
    expected = {
        "name": name,
        "sha256": weights.sha256,
        "tensors": weights.tensors,
        "record": chain.final.digest,
    }
    if report.get("model") != expected:
        raise _unbound("it is of other weights or of another record of them")
    edges = {(edge.name, edge.sha256, edge.record) for edge in link.record.inputs}
    if (name, weights.sha256, chain.final.digest) not in edges:
        raise _unbound(f"{link.stem} did not read these weights")
    stated = {"stage": link.record.stage, "code": link.record.code}
    stated["config"] = link.record.config_digest
    for field, value in stated.items():
        if report.get(field) != value:
            raise _unbound(f"its {field} is not that of {link.stem}")
    for field in ("rows", "differences"):
        found = report.get(field)
        if not isinstance(found, list) or len(found) > _MOST_ROWS:
            raise _unbound(f"its {field} are no list of at most {_MOST_ROWS}")
    _check_rows(report)
    _check_dataset(report, link, chain)
    return report


def _check_rows(report: Mapping[str, Any]) -> None:
    """Each figure is said once, and differences are of the model: a card has room for no other."""
    try:
        named = [(protocol_of(row), str(row["metric"]), row["subject"]) for row in report["rows"]]
        subjects = [row["subject"] for row in report["differences"]]
    except (LookupError, TypeError, AttributeError) as error:
        raise _unbound(f"a row lacks a field: {error}") from error
    if any(not isinstance(subject, str) for *_, subject in named):
        raise _unbound("a row of no subject")
    if len(set(named)) != len(named):
        raise _unbound("it gives a figure twice")
    if any(subject != MODEL for subject in subjects):
        raise _unbound("a difference is not of the model")


def _check_dataset(report: Mapping[str, Any], link: Link, chain: Chain) -> None:
    """The pictures are those of one image table, held out from one curated dataset."""
    dataset = report.get("dataset")
    tables = {edge.sha256 for edge in link.record.inputs if edge.role == "manifest"}
    if not isinstance(dataset, Mapping) or [dataset.get("sha256")] != sorted(tables):
        raise _unbound("its pictures are not those of the image table that was read")
    try:
        claimed = contamination_of(report)
    except PolicyError as error:
        raise _unbound(str(error)) from error
    if claimed not in (NONE, UNKNOWN):
        raise _unbound(f"says contamination is {claimed!r}, which is neither {NONE} nor {UNKNOWN}")
    if link.record.facts.get("contamination") != claimed:
        raise _unbound(f"says contamination is {claimed!r}, {link.stem} says otherwise")
    if chain.unknown_roots and claimed != UNKNOWN:
        names = ", ".join(chain.unknown_roots)
        raise _unbound(f"says contamination is {claimed!r}, training data of {names} are unknown")
    trained_on = {one for above in chain.above(chain.final) for one in datasets_of(above.record)}
    read = datasets_of(link.record)
    if not trained_on <= read:
        raise _unbound("its pictures were held out from another dataset than was trained on")
    for digest in read:
        made_of = chain.links[str(digest)].record.inputs if digest in chain.links else ()
        if not tables <= {edge.sha256 for edge in made_of if edge.role == "manifest"}:
            raise _unbound("its pictures are of another image table than its dataset is")


def check_images(
    contents: Contents, head: Head, chain: Chain, given: Path | None
) -> tuple[ImageCounts | None, list[str]]:
    """The list of images is the curated dataset's own, and says what the records say.

    Args:
        contents: The release.
        head: Its `release.json`.
        chain: Its records.
        given: The list itself, where the release holds its digest alone or keyed digests.

    Returns:
        What was counted, None where there is no dataset or no list to count; what is not proven.

    Raises:
        Refused: `images-differ`, `images-malformed`, or `contamination`.
        CannotCheck: The given file cannot be read.
    """
    link = _dataset_of(contents, head, chain)
    if link is None:
        return None, []
    mode = _mode(contents, head, link)
    _check_one_dataset(chain, link)
    open_ends = _check_held_out(contents, head, link)
    counts = _count_here(contents, head)
    if given is not None:
        return _count_given(given, head, link), open_ends
    if mode == PLAIN:
        return counts, open_ends
    if mode == KEYED:
        return counts, [
            *open_ends,
            f"that the keyed {IMAGES_NAME} is made of the list that {link.stem} wrote "
            "(give that one with --images)",
        ]
    return None, [f"that no image was trained and evaluated on (give {IMAGES_NAME} with --images)"]


def _dataset_of(contents: Contents, head: Head, chain: Chain) -> Link | None:
    """The one record that wrote the list of images; None below outside weights alone."""
    writers = chain.writers_of(IMAGES_NAME)
    if len(writers) > 1:
        raise _differ(f"{len(writers)} curated datasets, one list of images can stand for one")
    if writers:
        return writers[0]
    if head.images is not None or IMAGES_NAME in contents.hashes:
        raise _differ("no curated dataset in the chain")
    if not chain.unknown_roots:
        raise _differ("nothing says which images were trained on")
    return None


def _mode(contents: Contents, head: Head, link: Link) -> str:
    said, here = head.images, contents.hashes.get(IMAGES_NAME)
    if said is None or said.sha256 != link.record.outputs[IMAGES_NAME].sha256:
        raise _differ(f"release.json names another list than {link.stem} wrote")
    if (here is None) != (said.mode == DIGEST_ONLY):
        raise _differ(f"release.json calls it {said.mode}")
    if said.mode == PLAIN and here is not None and here.sha256 != said.sha256:
        raise _differ(f"other bytes than {link.stem} wrote")
    kept = link.record.facts.get("kept")
    if said.num_trained != kept:
        raise _differ(f"release.json counts {said.num_trained} trained, {link.stem} kept {kept}")
    return said.mode


def _check_one_dataset(chain: Chain, dataset: Link) -> None:
    """Whatever read a dataset read the one whose images are listed."""
    for link in chain.links.values():
        if not datasets_of(link.record) <= {dataset.digest}:
            raise _differ(f"{link.stem} read another dataset than {dataset.stem}")


def _check_held_out(contents: Contents, head: Head, dataset: Link) -> list[str]:
    """The report judged the pictures that the list holds out, as many as there are.

    Returns:
        What only the record of the dataset says.
    """
    listed = 0 if head.images is None else head.images.num_evaluated
    report, facts = contents.read_object(EVALS_NAME), dataset.record.facts
    for why in held_out_faults(report, listed, facts):
        raise _unbound(why)
    copies = report["dataset"].get("num_held_out", listed) - listed
    if copies <= 0:
        return []
    return [f"that {copies} of the held-out pictures are copies of others: {dataset.stem} says so"]


def _count_here(contents: Contents, head: Head) -> ImageCounts | None:
    if IMAGES_NAME not in contents.hashes:
        return None
    is_keyed = head.images is not None and head.images.mode == KEYED
    sha256 = contents.hashes[IMAGES_NAME].sha256
    return _count(contents.folder / IMAGES_NAME, sha256, head, is_keyed=is_keyed)


def _count_given(path: Path, head: Head, link: Link) -> ImageCounts:
    """Counts a list that does not come with the release, after its digest was found right."""
    try:
        found = file_sha256(path)
    except OSError as error:
        msg = f"{path}: cannot be read: {error}"
        raise CannotCheck(msg) from error
    if found != link.record.outputs[IMAGES_NAME].sha256:
        raise Refused("images-differ", str(path), f"not the list that {link.stem} wrote")
    return _count(path, found, head, is_keyed=False)


def _count(path: Path, sha256: str, head: Head, *, is_keyed: bool) -> ImageCounts:
    """Counts of a list, held against release.json and each other."""
    try:
        with read_images(path) as images:
            if is_keyed != (images.salt_sha256 is not None):
                raise _differ("release.json says otherwise whether its digests are keyed")
            tally = images.tally()
    except OSError as error:
        msg = f"{path}: cannot be read: {error}"
        raise CannotCheck(msg) from error
    if tally.sha256 != sha256:
        raise Refused("file-changed", IMAGES_NAME, "changed while it was read")
    trained, evaluated = (tally.counts.get(role, 0) for role in (ROLE_TRAINED, ROLE_EVALUATED))
    if tally.overlap:
        first = (tally.first_overlap or b"").hex()[:16]
        why = f"{tally.overlap} images were trained on and evaluated on, the first is {first}"
        raise Refused("contamination", IMAGES_NAME, why)
    if head.images is None or (trained, evaluated) != (
        head.images.num_trained,
        head.images.num_evaluated,
    ):
        raise _differ(f"counts {trained} trained and {evaluated} evaluated, release.json others")
    return ImageCounts(trained, evaluated, tally.overlap)


def _unbound(why: str) -> Refused:
    return Refused("evaluation-unbound", EVALS_NAME, why)


def _differ(why: str) -> Refused:
    return Refused("images-differ", IMAGES_NAME, why)
