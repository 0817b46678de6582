"""The few exceptions users see.

Form of a message: `<field or file>: <what is wrong>, got <value>. <One action>.`
"""


class DinoError(Exception):
    """Base of every error with a message written for the user; the command line exits with 2."""

    exit_code = 2


class ConfigError(DinoError):
    """A recipe or an override that cannot be used."""


class DataError(DinoError):
    """A source, an image table or a dataset that cannot be used."""


class CheckpointError(DinoError):
    """Weights or resumable state that cannot be written, read or matched."""


class JudgementFailed(DinoError):
    """A stage finished, but its own checks refuse the result."""

    exit_code = 3


class TrainingDiverged(DinoError):
    """Training met a non-finite or collapsed state and its policy is to stop."""

    exit_code = 3


class LineageBroken(DinoError):
    """Bytes on disk differ from the record that names them."""

    exit_code = 1


class Interrupted(DinoError):
    """Stopped by a signal after saving; running the same command again continues."""

    exit_code = 130


class RankLost(DinoError):
    """Another rank is gone; the command that started the ranks knows why."""

    exit_code = 4


class ReleaseRefused(DinoError):
    """A release's own gates refuse it: nothing was signed."""

    exit_code = 3


class KeyUnusable(DinoError):
    """A signing key that is not there, is open to others, or cannot be read."""


class StoreError(DinoError):
    """A store of releases, or its server, that cannot do what was asked."""


class StoreMissing(StoreError):
    """No store was ever made at that place."""


class AlreadyPublished(StoreError):
    """The version is published with other bytes."""

    exit_code = 1
