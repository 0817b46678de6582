"""The fixed list of reasons to refuse a release, each explained in `docs/audit.md`."""

REFUSALS = {
    "file-changed": "a file's bytes differ from SHA256SUMS",
    "file-missing": "a listed file is not there",
    "file-unlisted": "a file is there that is not listed",
    "file-special": "a link, pipe, device or hard link stands where a file should",
    "name-unsafe": "a path escapes, or two names differ only by case or Unicode form",
    "sums-malformed": "SHA256SUMS is not a sorted list of digests and paths",
    "json-malformed": "a JSON file is not strict, canonical JSON",
    "schema-unknown": "a schema older than this verifier accepts, or of another kind",
    "weights-malformed": "a safetensors file is not well formed",
    "weights-differ": "the weights are not those of the final record",
    "record-malformed": "a record lacks a field or holds one of the wrong kind",
    "record-missing": "the chain is cut: a record it names is not there",
    "record-unlisted": "a record is there that the chain does not lead to, or out of order",
    "release-malformed": "release.json lacks a field or holds one of the wrong kind",
    "root-undeclared": "something outside the graph is not declared, or said to be known better",
    "run-differs": "run.json names another record or other files than are here",
    "edge-broken": "an edge names bytes that the upstream record did not write",
    "steps-differ": "steps, events and records contradict each other",
    "events-malformed": "an event log is not one JSON object per line in order of steps",
    "evaluation-unbound": "the evaluation is of other weights or another record",
    "contamination": "an image was trained on and evaluated on",
    "images-malformed": "images.bin is not a sorted list of digests and roles",
    "images-differ": "images.bin is not the one of the curated dataset",
    "dedup-threshold": "near-duplicates were removed less strictly than the policy says",
    "licence": "a licence is unknown, dropped, or forbids this release",
    "check-missing": "checks.json lacks a gate of the fixed list",
    "check-differs": "checks.json says otherwise than the release's own files give",
    "check-failed": "a gate failed and no valid waiver stands beside it",
    "provenance-differs": "the provenance statement contradicts the release",
    "bom-differs": "the bill of materials contradicts the release",
    "card-differs": "the model card contradicts the release",
    "signature-missing": "there is no signature although a key was given",
    "signature-invalid": "the signature is not of this key over these files",
    "signature-scope": "the signature leaves files out or names none",
    "signature-type": "the signature is of another payload or predicate type",
    "key-revoked": "the key that signed was revoked",
    "wrong-release": "a genuine release of another model or version",
    "artifact-changed": "an artifact of the chain differs from its record",
    "receipts-broken": "a line of the receipts does not follow the one before it",
    "withdrawn": "the release was withdrawn by its signer",
}


class Refused(Exception):
    """The release does not hold; `name` is one of REFUSALS.

    Raises:
        ValueError: The name is not in the list.
    """

    def __init__(self, name: str, where: str, why: str) -> None:
        if name not in REFUSALS:
            msg = f"refusal: not in the fixed list, got {name!r}"
            raise ValueError(msg)
        super().__init__(f"{where}: {why}")
        self.name, self.where, self.why = name, where, why


class CannotCheck(Exception):
    """Something could not be read or is of a newer schema: neither verified nor refused."""
