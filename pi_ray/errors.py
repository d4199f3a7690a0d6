"""The exceptions that pi-ray raises on purpose, each with a sentence that says what to do. Any other one is a bug."""


class PiRayError(Exception):
    """Base class. The command line prints it without a traceback and exits with `exit_code`."""
    exit_code = 1


class ConfigError(PiRayError):
    """run.yaml (or an override) is wrong: unknown key, wrong type, impossible value. Names file, line, key and cure."""
    exit_code = 2


class DataError(PiRayError):
    """The user's rows or template cannot be used: too many bad rows, splits that overlap, an empty split."""
    exit_code = 3


class ModelError(PiRayError):
    """A base model, tokenizer or chat template is missing or unsuited."""
    exit_code = 4


class MissingExtraError(PiRayError):
    """An optional package is needed; the message names the pip command that installs it."""
    exit_code = 5


class CorruptArtifactError(PiRayError):
    """A file on disk does not match its recorded hash, or is not what its manifest says."""
    exit_code = 6


class TrainingError(PiRayError):
    """Training stopped: NaN loss, lost workers, or a checkpoint that belongs to another configuration."""
    exit_code = 7


class AdapterError(PiRayError):
    """An adapter is unknown, has a forbidden name, or fails verification."""
    exit_code = 8


class ClusterError(PiRayError):
    """A cluster does not answer, refuses a job, has no token or lost the job. A failed job gives its own exit code."""
    exit_code = 9


class StorageError(PiRayError):
    """A file cannot be written: the disk is full or read-only, or this user may not. Existing files are untouched."""
    exit_code = 10
