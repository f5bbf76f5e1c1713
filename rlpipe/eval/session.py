"""One evaluation from settings to results: read model and task, draw what is missing, judge it, measure."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlpipe.config import DecoderConfig
from rlpipe.errors import DataError
from rlpipe.eval.contestants import Contestant, Member, contestants
from rlpipe.eval.identity import content_hash, prompts_hash, tokenizer_hash, weights_hash
from rlpipe.eval.pools import workers
from rlpipe.eval.settings import EvaluationConfig
from rlpipe.eval.store import Store
from rlpipe.evaluation.drawing import draw, judge
from rlpipe.evaluation.samples import Sample
from rlpipe.models.spec import DiffusionSpec
from rlpipe.monitor.console import Console
from rlpipe.monitor.latest import latest_run
from rlpipe.rollout.pool import RolloutPool
from rlpipe.sampling.decoder import GUIDED
from rlpipe.server_settings import ROLES, identity_of, with_servers_asked
from rlpipe.trajectory import Prompt
from rlpipe.verifiers.pool import VerifierPool

log = logging.getLogger("rlpipe")

HOME = Path("outputs") / "eval"
ENDLESS = 256  # prompts of a task that has no end
ALL = 1_000_000  # prompts that no benchmark has
JUDGED_TOGETHER = 8  # batches of each verifier worker between two writes of verdicts


@dataclass(frozen=True, slots=True)
class Task:
    """prompts: those to answer · identity: what the source, its template and the verifiers are · verifier: the task's own ·
    verifiers: all that may judge."""

    prompts: list[Prompt]
    identity: dict[str, Any]
    verifier: str
    verifiers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """All that is known before anything starts. identity: what the numbers depend on, besides prompts and decoders."""

    cfg: EvaluationConfig
    folder: Path
    spec: DiffusionSpec
    rows: list[Contestant]
    task: Task
    identity: dict[str, Any]

    @property
    def members(self) -> dict[str, tuple[str, Member]]:
        """Decoder key → (label of the first row with it, the decoder); rows may share one."""
        found: dict[str, tuple[str, Member]] = {}
        for row in self.rows:
            for member in row.members:
                name = f"{row.label}, blocks of {member.config.block_size}" if row.hex else row.label
                found.setdefault(member.key, (name, member))
        return found

    @property
    def content(self) -> str:
        """Hash of everything that the numbers depend on."""
        cfg = self.cfg
        counts = {"samples": cfg.samples, "k": cfg.k, "confidence": cfg.confidence, "right": [cfg.right, cfg.right_at]}
        rows = [[row.label, *(member.key for member in row.members)] for row in self.rows]
        return content_hash([self.identity, prompts_hash(self.task.prompts), counts, rows])


def plan(cfg: EvaluationConfig) -> Plan:
    """Everything that can be refused is refused here: ModelError, DataError or ConfigError with the remedy."""
    from rlpipe.models.loading import check_model, settings_of

    model = check_model(cfg.model.path, **settings_of(cfg.model))
    rows = contestants(cfg.decoders, cfg.rollout.decoder, cfg.hex, model.spec, cfg.model.path)
    task = read_task(cfg, model.spec)
    guided = [row.label for row in rows if any(member.config.select == GUIDED for member in row.members)]
    cfg = with_servers_asked(cfg, task.verifiers, guided)
    log.info("hashing the weights of %s", model.folder)
    identity = {
        "weights": weights_hash(model.folder),
        "tokenizer": tokenizer_hash(model.folder),
        "model": {"family": model.family.name, "dtype": cfg.model.dtype} | model.spec.to_dict(),
        **task.identity,
        "seed": cfg.seed,
        **{role: identity_of(server) for role in ROLES if (server := getattr(cfg, role)).model or server.url},
    }
    return Plan(cfg, model.folder, model.spec, rows, task, identity)


def read_task(cfg: EvaluationConfig, spec: DiffusionSpec) -> Task:
    """Held-out prompts and what judges them. Raises DataError where there are fewer prompts than asked for, or an answer that
    its verifier cannot read."""
    from rlpipe.data.registry import check_block_sizes, source_of
    from rlpipe.verifiers.checking import check_answers

    source = source_of(cfg, training=False)
    check_block_sizes(source, spec.block_size, cfg.model.path)
    prompts = source.test_prompts(cfg.prompts or (ENDLESS if source.size is None else ALL))
    if len(prompts) < max(1, cfg.prompts):
        raise DataError(
            f"prompts={cfg.prompts}: task {task_name(cfg)} has {len(prompts)} held-out prompts"
            f"{f'; set prompts={len(prompts)}, or 0 for all' if prompts else ', so there is nothing to evaluate on'}"
        )
    check_answers(_HeldOut(source.verifier, prompts), cfg.verifier, len(prompts))
    judged_by = {"name": cfg.verifier.name, "parts": cfg.verifier.parts, "options": cfg.verifier.options}
    identity = {
        "task": {"name": task_name(cfg), "identity": source.identity},
        "templates": _templates(source),
        "verifier": {"of the task": list(source.verifiers)} | judged_by,
    }
    named = (cfg.verifier.name or source.verifier, *cfg.verifier.parts, *(prompt.verifier for prompt in prompts))
    return Task(prompts, identity, source.verifier, tuple(dict.fromkeys(named)))


def _templates(source: Any) -> list[dict[str, str]]:
    """Name, with its version, and full text of the template of a source, or of each part of a mixture."""
    if hasattr(source, "components"):
        return [template for part in source.components for template in _templates(part.source)]
    template = getattr(source, "template", None)
    return [{"name": template.label, "text": template.text()} if template else {"name": "{prompt}", "text": "{prompt}"}]


@dataclass(frozen=True, slots=True)
class _HeldOut:
    """Prompts as a source that has none to train on."""

    verifier: str
    prompts: list[Prompt]
    size: int = 0

    def test_prompts(self, count: int) -> list[Prompt]:
        return self.prompts[:count]


def describe(known: Plan) -> str:
    """For `dry_run`: model, task with one prompt as the model gets it, rows with their decoders, what it amounts to."""
    from rlpipe.data.description import describe_source

    cfg, prompts = known.cfg, known.task.prompts
    kind = f"blocks of {known.spec.block_size}" if known.spec.attention == "block" else "full attention"
    weights = known.identity["weights"]
    lines = [
        f"model     {known.folder} ({kind}, {weights['parameters']} parameters, weights {weights['blake2b']})",
        describe_source(cfg),
        f"prompts   {len(prompts)}; the first held-out one, as the model reads it:",
        *(f"          | {line}" for line in prompts[0].text.split("\n")),
    ]
    for row in known.rows:
        for member in row.members:
            changed = {k: v for k, v in dataclasses.asdict(member.config).items() if v != getattr(DecoderConfig(), k)}
            lines.append(f"decoder   {row.label}: {', '.join(f'{k}={v}' for k, v in changed.items()) or 'the default'}")
    count = len(known.members)
    lines.append(
        f"work      {count} decoders × {len(prompts)} × {cfg.samples} = {count * len(prompts) * cfg.samples} responses"
    )
    return "\n".join(lines)


def model_is_elsewhere(cfg: EvaluationConfig) -> bool:
    from rlpipe.model_shapes import is_hub_id, local_folder

    return is_hub_id(cfg.model.path) and local_folder(cfg.model.path, cfg.model.revision) is None


def describe_unseen(cfg: EvaluationConfig) -> str:
    """For `dry_run` with a model that would have to be downloaded first: what can be said without it."""
    from rlpipe.data.description import describe_source

    name = cfg.model.path
    return (
        f"model     {name} is not in the local cache; fetched at the start, or with  hf download {name}\n{describe_source(cfg)}"
    )


def task_name(cfg: EvaluationConfig) -> str:
    """`gsm8k`, or `gsm8k+sudoku` of a mixture."""
    return "+".join(str(part.get("name") or part.get("task", "")) for part in cfg.data.mixture) or cfg.data.task


def home_of(cfg: EvaluationConfig) -> Path:
    """Folder of all evaluations of a task."""
    return HOME / "".join(c if c.isalnum() or c in "._-+" else "_" for c in task_name(cfg))


def results_folder(cfg: EvaluationConfig) -> Path:
    """Where the results go; `resume=auto` without `out` goes on with the latest of the task."""
    if cfg.out:
        return Path(cfg.out)
    home = home_of(cfg)
    if cfg.resume == "auto":
        before = latest_run(home)
        if before is not None:
            return before
    name = time.strftime("%Y%m%d-%H%M%S")
    folder, copy = home / name, 1
    while folder.exists():
        copy += 1
        folder = home / f"{name}-{copy}"
    return folder


def run(known: Plan, store: Store, console: Console) -> None:
    """Draw and judge what the store lacks; afterwards it holds every response with its verdict, in order."""
    cfg, prompts = known.cfg, known.task.prompts
    with ExitStack() as stack:
        pools = None
        for key, (name, member) in known.members.items():
            if not _unjudged(store, key, prompts, cfg.samples):
                console.line(f"{name}: all responses are there already")
                continue
            if pools is None:
                console.line("starting the workers")
                pools = stack.enter_context(workers(cfg, str(known.folder.resolve()), known.task.verifier, store.folder))
            _draw(known, store, console, pools[0], key, name, member)
            _judge(known, store, pools[1], key, name)
    store.finish(list(known.members), prompts)


def _draw(known: Plan, store: Store, console: Console, rollouts: RolloutPool, key: str, name: str, member: Member) -> None:
    """Only drawing is timed as such: verdicts come afterwards, so that no worker waits for them."""
    cfg = known.cfg
    missing = [prompt for prompt in known.task.prompts if not store.has(key, prompt.uid, cfg.samples)]
    if not missing:
        return
    with console.phase(name, len(missing), console.line) as phase:
        started = time.perf_counter()
        for _, group in draw(rollouts, missing, cfg.samples, member.config, name=name, seed=cfg.seed):
            store.add(key, name, [store.lacking(key, group)])
            now = time.perf_counter()
            tokens = sum(sample.tokens for sample in group)
            store.spend(key, cfg.rollout.workers, seconds=now - started, tokens=tokens, responses=len(group))
            started = now
            phase.advance(1)


def _judge(known: Plan, store: Store, verifiers: VerifierPool, key: str, name: str) -> None:
    """Some at a time, so that verdicts that took long are kept when a later one fails or the user has waited enough."""
    cfg, samples = known.cfg, known.cfg.samples
    todo = _unjudged(store, key, known.task.prompts, samples)
    size = max(1, JUDGED_TOGETHER * cfg.verifier.workers * cfg.verifier.batch_size // samples)
    for start in range(0, len(todo), size):
        part, started = todo[start : start + size], time.perf_counter()
        store.add(key, name, judge(verifiers, part, [store.group(key, prompt.uid, samples) for prompt in part]))
        store.spend(key, cfg.rollout.workers, judge_seconds=time.perf_counter() - started)


def _unjudged(store: Store, key: str, prompts: Sequence[Prompt], samples: int) -> list[Prompt]:
    """Prompts with a response that has no verdict, or is not drawn yet."""
    return [
        prompt
        for prompt in prompts
        if not store.has(key, prompt.uid, samples)
        or any(sample.parts is None for sample in store.group(key, prompt.uid, samples))
    ]


def groups(known: Plan, store: Store, row: Contestant) -> list[list[Sample]]:
    """Judged responses of one row, a list a prompt; of HEX those of all block lengths, one after the other."""
    samples = known.cfg.samples
    return [
        [sample for member in row.members for sample in store.group(member.key, prompt.uid, samples)]
        for prompt in known.task.prompts
    ]
