"""Errors that a user can act on, and the process exit codes they end in.

Every message says what happened, the values with their units, the rule, and the way out (DESIGN section 4). The
command line prints the message alone, without a traceback, and exits with `exit_code`; anything that is not an
`Ernie5Error` is a bug and keeps its traceback in `RUN_DIR/errors/`.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_BUG = 1
EXIT_USER = 2
EXIT_ENVIRONMENT = 3
EXIT_NUMERICS = 4
EXIT_PEER = 5
EXIT_INTERRUPTED = 75


class Ernie5Error(Exception):
    """Base of all errors that are not bugs; printed as `ClassName: message`."""

    exit_code = EXIT_USER


class ConfigError(Ernie5Error):
    """A configuration key or value breaks a rule; the message ends in `(file:line)` where one is known."""


class LayoutError(ConfigError):
    """Parallel degrees that do not fit the model, the batch or the number of ranks."""


class DataError(Ernie5Error):
    """Shards, samples or media files that cannot be read or do not fit."""


class TokenizerError(Ernie5Error):
    """A tokenizer file that cannot be read, or that is not the one a checkpoint was trained with."""


class CheckpointError(Ernie5Error):
    """A checkpoint that is missing, damaged or does not match the configuration."""


class KernelError(Ernie5Error):
    """A kernel that was asked for by name cannot run here."""


class EnvironmentFault(Ernie5Error):
    """Disk full, no permission, out of memory, no network: the machine, not the user's input."""

    exit_code = EXIT_ENVIRONMENT


class NumericsError(Ernie5Error):
    """NaN, infinity, or a loss spike beyond the allowed number of retries."""

    exit_code = EXIT_NUMERICS


class PeerError(Ernie5Error):
    """Another rank died or hangs."""

    exit_code = EXIT_PEER


class Interrupted(Ernie5Error):
    """SIGINT or SIGTERM arrived; the message names the checkpoint that resumes the run."""

    exit_code = EXIT_INTERRUPTED
