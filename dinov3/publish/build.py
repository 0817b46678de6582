"""Builds, gates and signs one release; on refusal nothing appears.

chain gathered -> gates -> attempt noted -> files -> SHA256SUMS -> signature -> verified
"""

import datetime
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dinov3.config import ReleaseConfig, dump
from dinov3.errors import ConfigError, DataError, ReleaseRefused
from dinov3.gates import Evidence
from dinov3.publish.admission import Attempted, pass_gates, policy_of
from dinov3.publish.chain import gather
from dinov3.publish.contents import write_contents
from dinov3.publish.draft import Draft
from dinov3.publish.licence_texts import LOG_FOLDER
from dinov3.publish.places import FOLDER, refuse_occupied, refuse_traces
from dinov3.publish.store import check_name, version_key
from dinov3.release.audit import Question, audit_release
from dinov3.release.head import KEYED
from dinov3.release.receipts import RECEIPTS_NAME, read_receipts
from dinov3.release.record import Edge, parse_json
from dinov3.release.refusals import CannotCheck, Refused
from dinov3.release.revoked import REVOKED_NAME
from dinov3.stage import Stage, open_stage

if TYPE_CHECKING:
    from dinov3.publish.private_key import PrivateKey

_MIN_SALT = 16  # bytes


@dataclass(frozen=True)
class ReleaseRequest:
    """What is to be released, from where, and how.

    Attributes:
        stage: Key of the stage.
        model: Name of the model.
        version: MAJOR.MINOR.PATCH.
        weights: Folder of the weights.
        report: Folder of their evaluation.
        artifacts: Folder below which every artifact of the chain lies.
        log: Folder of the log of releases: waivers, attempts, receipts.
        output: Folder of the stage; the release is its sub-folder `release`.
        config: The resolved recipe.
        key: Signs; None leaves the release unsigned, which no verifier takes with a key.
        recipe: What the recipe was called.
        overrides: Laid over it.
        texts: Folder of licence texts beyond those that ship with us and those in the log.
        salt: Keys the list of images, where the recipe asks for it.
        today: Of waivers and attempts; by default this day in UTC.
    """

    stage: str
    model: str
    version: str
    weights: Path
    report: Path
    artifacts: Path
    log: Path
    output: Path
    config: ReleaseConfig
    key: "PrivateKey | None"
    recipe: str
    overrides: tuple[str, ...] = ()
    texts: Path | None = None
    salt: bytes | None = None
    today: datetime.date | None = None


def build_release(request: ReleaseRequest) -> Path:
    """Builds the release directory and returns it.

    Raises:
        ReleaseRefused: A gate failed without a waiver, or the finished release does not verify.
        LineageBroken: A record is unreadable, or the log of attempts was rewritten.
        ConfigError: The output is no folder of its own, or a salt is missing or too much.
        DataError, StoreError: Something is missing or malformed.
    """
    check_name(request.model, request.version)
    _check_salt(request)
    draft = _judge(request)
    identity = {"model": request.model, "version": request.version}
    with open_stage(request.stage, request.output, config=dump(request.config) | identity) as stage:
        _add_edges(stage, draft.evidence)
        folder = stage.path(FOLDER)
        folder.mkdir()
        write_contents(folder, draft)
        stage.facts = identity | {"release": _sign_and_verify(folder, request)}
        stage.run_facts["signer"] = None if request.key is None else request.key.fingerprint
    return request.output / FOLDER


def _judge(request: ReleaseRequest) -> Draft:
    """Gathers the chain and lets it through the gates; nothing but the attempt is written."""
    policy = policy_of(request.config)
    evidence = gather(
        request.weights,
        request.report,
        request.artifacts,
        licence=str(policy["licence"]),
        texts=(request.texts, request.log / LOG_FOLDER),
    )
    _check_output(request, evidence)
    tried = Attempted(request.model, request.version, request.log, request.today or _today())
    return Draft(
        model=request.model,
        version=request.version,
        recipe=request.recipe,
        overrides=request.overrides,
        config=request.config,
        policy=policy,
        evidence=evidence,
        checks=pass_gates(evidence, policy, tried),
        report=parse_json((evidence.evaluation.folder / "report.json").read_bytes()),
        previous=_previous(request),
        salt=request.salt,
    )


def read_salt(path: Path) -> bytes:
    """The secret that keys a list of images; whoever has it can look for a picture there.

    Raises:
        ConfigError: It cannot be read, or is so short that it could be guessed.
    """
    try:
        salt = path.read_bytes()
    except OSError as error:
        msg = f"{path}: cannot be read, got {error.strerror}. Give a file of random bytes."
        raise ConfigError(msg) from error
    if len(salt) < _MIN_SALT:
        msg = f"{path}: shorter than {_MIN_SALT} bytes, got {len(salt)}. Draw it at random."
        raise ConfigError(msg)
    return salt


def _check_salt(request: ReleaseRequest) -> None:
    wanted = request.config.images == KEYED
    if wanted != (request.salt is not None):
        msg = (
            f"images: a salt goes with images=keyed and nothing else, got {request.config.images}. "
            f"{'Give it: --images-salt FILE' if wanted else 'Leave --images-salt out'}."
        )
        raise ConfigError(msg)


def _check_output(request: ReleaseRequest, evidence: Evidence) -> None:
    refuse_occupied(
        request.output,
        request.stage,
        artifacts=request.artifacts,
        log=request.log,
        nodes=[node for copies in evidence.copies.values() for node in copies],
    )


def _today() -> datetime.date:
    return datetime.datetime.now(datetime.UTC).date()


def _add_edges(stage: Stage, evidence: Evidence) -> None:
    """An edge to every file of the chain, each hashed by its gate."""
    for node in evidence.nodes:
        for name, output in node.record.outputs.items():
            edge = Edge(node.record.stage, name, output.sha256, node.digest)
            stage.add_edge(edge, node.record)


def _previous(request: ReleaseRequest) -> str | None:
    """Digest of the newest published release of the model that is older than this one.

    Raises:
        DataError: The log of receipts does not hold together.
    """
    try:
        receipts = read_receipts(request.log / RECEIPTS_NAME, None)
    except (Refused, CannotCheck) as error:
        msg = f"{error}. Restore the log from git."
        raise DataError(msg) from error
    older = [
        receipt
        for receipt in receipts
        if receipt.kind == "publish"
        and receipt.model == request.model
        and version_key(receipt.version) < version_key(request.version)
    ]
    newest = max(older, key=lambda receipt: version_key(receipt.version), default=None)
    return None if newest is None else newest.release


def _sign_and_verify(folder: Path, request: ReleaseRequest) -> str:
    """Signs the finished folder and has the verifier read it; returns the release's digest.

    Raises:
        ReleaseRefused: What was written does not verify, or tells of this machine.
    """
    name = f"{request.model}@{request.version}"
    refuse_traces(folder, [request.artifacts.resolve(), request.output.resolve()])
    try:
        if request.key is not None:
            from dinov3.publish.sign import sign_release

            sign_release(folder, request.key)
        key = None if request.key is None else request.key.public
        revoked = request.log / REVOKED_NAME
        question = Question(key=key, expect=name, revoked=revoked if revoked.exists() else None)
        audit = audit_release(folder, question)
    except Refused as error:
        msg = f"{name}: the finished release is refused ({error.name}): {error}. Mend that."
        raise ReleaseRefused(msg) from error
    except CannotCheck as error:
        msg = f"{name}: the finished release cannot be verified: {error}. Mend that."
        raise ReleaseRefused(msg) from error
    return str(audit.digest)
