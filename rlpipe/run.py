"""The entry: `python -m rlpipe.run recipe=NAME [key=value …]`.

Exit codes: 0 done, 1 the run failed, 2 the recipe, the data or the model is not usable, 75 asked to end by SIGTERM or SIGUSR1
(the last finished step is saved; see `rlpipe.interruption` for why 75), 130 by Ctrl-C. After 75 and 130 the same command with
resume=auto goes on. `rlpipe.supervise` repeats a run that died, and leaves these alone.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rlpipe import interruption
from rlpipe.config import RunConfig, SftConfig
from rlpipe.contradictions import CONVERT
from rlpipe.errors import CheckpointError, ConfigError, DataError, Interrupted, ModelError, RlpipeError
from rlpipe.run_names import attempt, folders_of, free_folder

log = logging.getLogger("rlpipe")
GO_ON = "the same command with resume=auto continues from the last checkpoint, if one was written"


def main(arguments: list[str] | None = None, command: Callable[[list[str]], int] | None = None) -> int:
    """Run a recipe, or another command with the same manners; returns the process's exit code. Every expected failure is one
    message with its remedy."""
    # Threads that wait must sleep: spinning, two of them on a machine with one free core were seen to take 20 times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    log.setLevel(logging.INFO)
    interruption.install()
    try:
        return (command or run)(sys.argv[1:] if arguments is None else arguments)
    except Interrupted as error:
        print(f"{error}; {GO_ON}", file=sys.stderr, flush=True)
        return 130 if interruption.requested() == "SIGINT" else interruption.EXIT_CODE
    except (ConfigError, DataError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except RlpipeError as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; {GO_ON}", file=sys.stderr)
        return 130
    finally:
        interruption.uninstall()


def run(arguments: list[str]) -> int:
    from rlpipe import recipe
    from rlpipe.data.registry import source_of
    from rlpipe.plan import describe

    if "help=true" in arguments or "--help" in arguments or "-h" in arguments:
        print(recipe.document())
        return 0
    cfg = without_links(recipe.load(arguments))
    warnings = recipe.check(cfg)
    if cfg.dry_run:
        print(describe(cfg, *cluster_resources(cfg)))
        for warning in warnings:
            print(f"warning: {warning}")
        return 0
    from rlpipe.warm_start import with_converted_model  # torch, which a dry run does without

    if cfg.sft != SftConfig():
        log.warning("this recipe has a section sft, which plays no part here: supervised training is python -m rlpipe.sft")
    source = source_of(with_converted_model(cfg))  # templates and token counts may need the model's folder
    check_parts(cfg, source, check_model(cfg))
    run_dir, resume_from = run_folder(cfg)
    if resume_from is not None and finished(cfg, resume_from):
        print(f"{run_dir} is finished (step {cfg.steps}); raise steps= to train on, or give resume=never to start anew")
        return 0
    return train(cfg, source, run_dir, resume_from, warnings)


def train(cfg: RunConfig, source, run_dir: Path, resume_from: Path | None, warnings: list[str]) -> int:
    """Connect, build the driver, run it, leave a summary."""
    from rlpipe.checkpoint import Checkpoints
    from rlpipe.crew import Crew
    from rlpipe.data import pass_rates, report
    from rlpipe.data.source import Cursor
    from rlpipe.driver import Driver
    from rlpipe.plan import roles
    from rlpipe.stage import Stage
    from rlpipe.warm_start import initial_model

    needed = roles(cfg)
    with Stage(cfg, run_dir, resume_from, warnings) as stage:
        monitor = stage.monitor
        if report.write(source.reports, run_dir / report.NAME):
            monitor.note(f"records that were left out: {run_dir / report.NAME}")
        stage.connect(needed)
        with monitor.phase("warm start on demonstrations", cfg.warm_start.steps) as phase:
            folder = initial_model(cfg, source, lambda done, total: phase.advance(1))
        cursor = Cursor(source, pass_rates.PassRateLog(run_dir / pass_rates.NAME))
        monitor.watch()
        monitor.note("starting the workers")
        place = stage.place(needed)
        crew = Crew.start(cfg, run_dir, str(folder.resolve()), source.verifier, place, monitor.timeline.span)
        told = {"warn": monitor.warn, "note": monitor.note, "timeout_s": cfg.learner.timeout_s}
        checkpoints = Checkpoints(cfg.checkpoint, run_dir, **told)
        stage.run(Driver(cfg, monitor, source, cursor, crew, checkpoints, resume_from))
    return 0


def without_links(cfg: RunConfig) -> RunConfig:
    """The configuration with what earlier runs left named by where it is: `latest` means another folder tomorrow, and a resumed
    run must have the same."""
    data = replace(cfg.data, pass_rates=_followed(cfg.data.pass_rates))
    data.mixture = [part | {key: _followed(part[key]) for key in part if key == "pass_rates"} for part in data.mixture]
    sft = replace(cfg.sft, trajectories=_followed(cfg.sft.trajectories))
    return replace(cfg, model=replace(cfg.model, path=_followed(cfg.model.path)), data=data, sft=sft)


def _followed(path: str) -> str:
    """A path that is there, without symbolic links in it; others as they are."""
    if not isinstance(path, str) or not os.path.exists(path) or os.path.realpath(path) == os.path.abspath(path):
        return path
    return os.path.realpath(path) if os.path.isabs(path) else os.path.relpath(os.path.realpath(path))


def cluster_resources(cfg: RunConfig) -> tuple[dict[str, float] | None, list[dict[str, float]]]:
    """Of the cluster that the run would join, and of each of its machines; (None, []) if it would start its own on this one."""
    from rlpipe import cluster

    if not cluster.address_to_join(cfg.cluster):
        return None, []
    cluster.connect(cfg.cluster, need_cpus=0, need_gpus=0)
    resources = cluster.resources(), cluster.machines()
    cluster.disconnect()
    return resources


def check_model(cfg: RunConfig) -> int:
    """Refuse a model that cannot be used before anything starts, and fetch one from the hub; returns its attention block, 0 for
    full attention. Tiny and converted models are made on the spot."""
    from rlpipe.contradictions import block_size
    from rlpipe.models import loading

    if cfg.model.path.startswith(("tiny:", CONVERT)):
        return block_size(cfg) or 0
    settings = loading.settings_of(cfg.model)
    known = loading.check_model(cfg.model.path, **settings)
    if not known.spec.eos_token_ids:
        log.warning("%s has no token that ends a response, so each fills max_tokens; say eos_token_ids", cfg.model.path)
    if cfg.value.enabled and cfg.value.path:
        others = settings | {"revision": ""}
        loading.check_model(cfg.value.path, **others)
        loading.check_same_tokens(known.folder, cfg.value.path, **others)
    return known.spec.block_size


def check_parts(cfg: RunConfig, source, size: int) -> None:
    """Refuse a decoder that contradicts the model, a verifier that is not there and answers that it cannot read, before
    anything starts. size: of the model's attention block, 0 for full attention."""
    from rlpipe.contradictions import decoder_of_eval
    from rlpipe.data.registry import check_block_sizes
    from rlpipe.models.spec import DiffusionSpec
    from rlpipe.sampling.decoder import Decoder
    from rlpipe.verifiers.checking import check_answers

    source.prompt(0)  # a task for evaluation has none, and says so
    check_answers(source, cfg.verifier)
    check_block_sizes(source, size, cfg.model.path)
    spec = DiffusionSpec(mask_token_id=0, attention="block" if size else "full", block_size=size)
    for name, decoder in (("rollout.decoder", cfg.rollout.decoder), ("eval.decoder", decoder_of_eval(cfg))):
        try:
            Decoder.resolve(decoder, spec)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error


def run_folder(cfg: RunConfig) -> tuple[Path, Path | None]:
    """(run folder, checkpoint to resume from or None). `resume=auto` looks at the run that run_id names, without one at the
    run of the recipe whose checkpoint under checkpoint.path is the newest, or without that at the latest on this machine.
    Damaged checkpoints are passed over. Raises CheckpointError if there is none but damaged ones."""
    from rlpipe.checkpoint import Checkpoints, unpack

    home = Path(cfg.output_dir) / cfg.name
    if cfg.resume == "auto":
        for run_dir in earlier_runs(cfg, home):
            newest = Checkpoints(cfg.checkpoint, run_dir).newest()
            if newest is not None:
                unpack(newest, run_dir)
                return run_dir, newest
            log.info("resume=auto: %s has no complete checkpoint yet; starting anew", run_dir)
    elif cfg.resume != "never":
        run_dir = Path(cfg.resume).resolve()  # `latest` may mean another run soon
        newest = Checkpoints(cfg.checkpoint, run_dir).newest()
        if newest is None:
            raise CheckpointError(f"resume={cfg.resume}: no complete checkpoint under {run_dir / 'checkpoints'}")
        unpack(newest, run_dir)
        return run_dir, newest
    return free_folder(home, cfg.run_id or time.strftime("%Y%m%d-%H%M%S")), None


def earlier_runs(cfg: RunConfig, home: Path) -> list[Path]:
    """Folders of runs that resume=auto may continue, the best first; one that this machine has never seen may not be there."""
    from rlpipe.checkpoint import find_run
    from rlpipe.monitor.latest import latest_run

    def wanted(name: str) -> bool:
        return not cfg.run_id or attempt(name, cfg.run_id) > 0

    known = find_run(cfg.checkpoint.path, cfg.name, wanted) if cfg.checkpoint.path else None
    latest = latest_run(home)
    here = reversed(folders_of(home, cfg.run_id)) if cfg.run_id else [latest] if latest is not None else []
    return [*([home / known] if known else []), *here]


def finished(cfg: RunConfig, resume_from: Path) -> bool:
    from rlpipe import checkpoint

    return checkpoint.read_state(resume_from)["step"] >= cfg.steps


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # worker threads of torch and W&B may linger; everything of ours is closed by now
