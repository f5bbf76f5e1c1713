"""Typed failures. Each message says what happened, where, and what to do about it."""

from __future__ import annotations


class RlpipeError(Exception):
    """Base of every failure that rlpipe raises on purpose; `run` prints it without a traceback."""


class ConfigError(RlpipeError):
    """The recipe or an override is wrong: unknown key, wrong type, contradiction."""


class DataError(RlpipeError):
    """A prompt source is unusable: missing file, broken line, empty set. Names file, line and field."""


class ModelError(RlpipeError):
    """A model folder is missing, incomplete, or not a diffusion language model we know."""


class ClusterError(RlpipeError):
    """Ray cannot place or reach what the run needs; carries the arithmetic."""


class WaitTimeout(ClusterError):
    """A named wait passed its deadline."""


class WorkerLost(ClusterError):
    """A worker died more often than its retry budget allows."""


class LearnerLost(ClusterError):
    """A learner rank died, hung or lost its peers: all ranks start anew from the last checkpoint."""


class Interrupted(RlpipeError):
    """The run was asked to end (SIGTERM, a machine that is taken away): it saves what it has and leaves."""


class RolloutFailed(RlpipeError):
    """Sampling failed for a unit of work, after retries. Never recorded as an empty response."""


class VerifierFailed(RlpipeError):
    """Scoring failed for a group, after retries. Never recorded as a reward of 0."""


class ServerError(RlpipeError):
    """A server of a language model cannot be reached, refuses a request, or answers what cannot be read."""


class SandboxError(RlpipeError):
    """Programs cannot be confined here, or the machinery that does it broke; never the fault of the program in it."""


class NoStepMap(RlpipeError):
    """A step map was asked of a trajectory whose tokens changed after their commit."""


class WeightMismatch(RlpipeError):
    """A worker holds another weight version or other bytes than the driver expects."""


class ParityError(RlpipeError):
    """Learner and rollout disagree about the log-probability of the same tokens."""


class CheckpointError(RlpipeError):
    """A checkpoint cannot be written, read, or belongs to another run."""


class NoLiveGroups(RlpipeError):
    """Every group of a step was filtered away, refills included: there is nothing to learn from."""
