"""Recording trajectories: a model answers training prompts, and what the verifier accepts goes into a file.

Training on that file is self-distillation: `sft.objective=trace` learns the states that were visited, `certainty` to be sure of
such answers earlier (dParallel, arXiv 2509.26488, whose data are made so).
"""

from __future__ import annotations

from pathlib import Path

from rlpipe.errors import ConfigError, DataError, VerifierFailed
from rlpipe.trajectory import Trajectories, Trajectory

USAGE = "python -m rlpipe.sft collect recipe=NAME to=FILE.npz [prompts=256] [keep=1.0] [key=value …]"
OWN = {"to": "", "prompts": "256", "keep": "1.0"}


def collect(arguments: list[str]) -> int:
    """`to`: the file · `prompts`: how many training prompts · `keep`: the least reward. The recipe says the rest: model, data,
    verifier, decoder, algo.samples_per_prompt. Raises DataError if nothing was good enough, VerifierFailed for a group that
    could not be judged."""
    from rlpipe import recipe
    from rlpipe.data.registry import source_of
    from rlpipe.eval.pools import workers
    from rlpipe.run import check_model, check_parts
    from rlpipe.warm_start import initial_model, with_converted_model

    own = {**OWN, **dict(a.partition("=")[::2] for a in arguments if a.partition("=")[0] in OWN)}
    target, count, least = _settings(own)
    cfg = recipe.load([argument for argument in arguments if argument.partition("=")[0] not in OWN])
    for warning in recipe.check(cfg):
        print(f"warning: {warning}")
    size = check_model(cfg)
    cfg = with_converted_model(cfg)
    source = source_of(cfg)
    check_parts(cfg, source, size)
    folder = str(initial_model(cfg, source).resolve())
    prompts = [source.prompt(i) for i in range(min(count, source.size or count))]
    kept: list[Trajectory] = []
    with workers(cfg, folder, source.verifier) as (rollouts, verifiers):
        samples = cfg.algo.samples_per_prompt
        groups, counters = rollouts.generate(prompts, samples, cfg.rollout.decoder, what="recording trajectories")
        verdicts = verifiers.score_groups([[(group.prompt, text) for text in group.texts] for group in groups])
    for group, verdict in zip(groups, verdicts, strict=True):
        if isinstance(verdict, VerifierFailed):
            raise verdict
        kept += [t for t, part in zip(group.trajectories, verdict, strict=True) if part["reward"] >= least]
    if not kept:
        raise DataError(f"none of {len(prompts) * samples} responses had a reward of {least:g}; lower keep, or train the model")
    target.parent.mkdir(parents=True, exist_ok=True)
    Trajectories.of(kept).save(target)
    solved = len({trajectory.uid for trajectory in kept})
    print(f"{target}: {len(kept)} of {len(prompts) * samples} responses, for {solved} of {len(prompts)} prompts")
    return 0


def _settings(own: dict[str, str]) -> tuple[Path, int, float]:
    target = Path(own["to"])
    if target.suffix != ".npz":
        raise ConfigError(f"to={own['to']}: the file's name must end in .npz. {USAGE}")
    try:
        count, least = int(own["prompts"]), float(own["keep"])
    except ValueError as error:
        raise ConfigError(f"prompts={own['prompts']} keep={own['keep']}: numbers. {USAGE}") from error
    if count < 1:
        raise ConfigError(f"prompts={count}: at least 1")
    return target, count, least
