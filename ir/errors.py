"""The exceptions of Shardwright: each message says what was given, what was expected, what to
do."""

from __future__ import annotations


class ShardwrightError(Exception):
    """Base of all errors a user can cause or meet; `exit_code` is what the command line returns."""

    exit_code = 2


class InvalidInput(ShardwrightError):
    """A file, flag or argument is not what it should be (exit code 2)."""


class UnsupportedOp(ShardwrightError):
    """The model holds an operation without a rule, or a form of it that has none (exit code 2)."""


class Infeasible(ShardwrightError):
    """No plan fits: the message says what is short, by how much, what would fit (exit code 3)."""

    exit_code = 3


class VerificationFailed(ShardwrightError):
    """The sharded program does not compute what the single-device model does (exit code 4)."""

    exit_code = 4


class CorruptCheckpoint(ShardwrightError):
    """A checkpoint is damaged, incomplete or mixed: the message names the file (exit code 2)."""
