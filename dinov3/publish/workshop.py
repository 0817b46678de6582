"""A folder in which recorded commands, of recorded code, make the artifacts of a chain again."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dinov3.errors import ConfigError, DataError
from dinov3.launch import start, stop
from dinov3.publish.pipeline_commands import Command, read_commands
from dinov3.publish.recorded_code import default_runs, environment_of, find_code
from dinov3.release.atomic import atomic_write
from dinov3.release.record import RECORD_NAME, Record, canonical_json, parse_json, read_record

SOURCE = "source"  # role of the pictures in the record of their table

_LINES_SHOWN = 15


@dataclass(frozen=True)
class Link:
    """One record of the chain and the run.json beside it."""

    record: Record
    run: Mapping[str, Any]


class Workshop:
    """Artifacts lie in it under the pipeline's own names.

    Args:
        scratch: An empty folder.
        source: Where the pictures are.
        limits: Of what cannot change a result, what is to be as given here.
        is_trusted: Whether code that the release itself carries may be run.
    """

    def __init__(
        self, scratch: Path, source: str, *, limits: Mapping[str, Any], is_trusted: bool
    ) -> None:
        self._code = scratch / "code"
        self._root = scratch / "workspace"
        self._source = source
        self._limits = limits
        self._is_trusted = is_trusted
        self._codes: dict[str, Path] = {}  # checkout by digest
        self._commands: dict[Path, dict[str, Command]] = {}
        self._runs: dict[Path, dict[str, dict[str, Any]]] = {}
        self._made: dict[str, Path] = {}  # folder by stage
        self._ran: set[str] = set()
        (self._root / "recipes").mkdir(parents=True)

    def code_of(self, link: Link) -> Path:
        """A checkout of the code that made an artifact.

        Raises:
            DataError: It is not here, or must not be run.
        """
        digest = link.record.code
        if digest not in self._codes:
            found = find_code(digest, link.run, self._code, is_trusted=self._is_trusted)
            self._codes[digest] = found
        return self._codes[digest]

    def make(self, link: Link) -> Record:
        """Runs the command of an artifact, unless it made this one beside another; its record.

        Raises:
            DataError: The code or the pictures are not here, or the command failed.
            ConfigError: The recorded code has no command for it.
        """
        record, code = link.record, self.code_of(link)
        command = self._command(code, record.stage)
        if command.stage not in self._ran:
            self._see_source(code, record)
            recipe = self._write_recipe(code, record)
            line = command.line({"recipe": recipe, "source": self._source})
            self._run(line, code, record.stage)
            self._ran.add(command.stage)
        self._made[record.stage] = self._root / command.folder
        return read_record(self.folder_of(record) / RECORD_NAME)

    def folder_of(self, record: Record) -> Path:
        """Where an artifact that was made lies."""
        return self._made[record.stage]

    def _command(self, code: Path, stage: str) -> Command:
        if code not in self._commands:
            self._commands[code] = read_commands(code)
            self._runs[code] = default_runs(code)
        if stage not in self._commands[code]:
            msg = f"{stage}: no such stage, got none in dvc.yaml of its code. Make it by hand."
            raise ConfigError(msg)
        return self._commands[code][stage]

    def _see_source(self, code: Path, record: Record) -> None:
        """Refuses other pictures before hours are spent on them."""
        wanted = [edge.sha256 for edge in record.inputs if edge.role == SOURCE]
        if not wanted:
            return
        params = self._root / "params.yaml"
        params.write_text(yaml.safe_dump({"source": self._source}))
        self._run("python -m dinov3 source --refresh --params params.yaml", code, "source")
        seen = parse_json((self._root / "data/raw_images/fingerprint.json").read_bytes())
        if [seen["sha256"]] != wanted:
            msg = (
                f"source: other pictures than the release was made of, got {seen['sha256']} "
                f"instead of {wanted[0]}. Name the right ones with --source."
            )
            raise DataError(msg)

    def _write_recipe(self, code: Path, record: Record) -> str:
        """The recorded config as a recipe of its own; what cannot change results is ours."""
        tree = dict(record.config)
        run = self._runs[code].get(str(tree.get("phase")))
        if run is not None:
            limits = {name: value for name, value in self._limits.items() if name in run}
            tree["run"] = {**run, **limits}
        name = f"recipes/{record.stage}.yaml"
        atomic_write(self._root / name, canonical_json(tree))
        return name

    def _run(self, line: str, code: Path, what: str) -> None:
        with tempfile.TemporaryFile() as output:
            process = start(
                ["/bin/sh", "-c", line], output=output, cwd=self._root, env=environment_of(code)
            )
            try:
                returned = process.wait()
            finally:
                stop(process)
            output.seek(0)
            said = output.read().decode("utf-8", "replace").splitlines()
        if returned:
            last = "\n".join(said[-_LINES_SHOWN:])
            msg = f"{what}: its command ended with {returned}, got:\n{last}\nMend what it names."
            raise DataError(msg)
