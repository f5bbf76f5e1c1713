"""The typed schema of a recipe: every key, its default, its unit. Loading and checks live in `rlpipe.recipe`.

Plain dataclasses, so that the pure parts (sampling, objectives) can be configured without OmegaConf. The comment under or
beside a field is its documentation; a test freezes the number of leaves so that each new one is a decision.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class ModelConfig:
    path: str = "tiny:block"  # a folder, a hub id OWNER/NAME, or tiny:block | tiny:full, made here with a character tokenizer
    revision: str = ""  # of a hub id: branch, tag or commit; empty: its main branch
    family: str = ""  # empty: by its config.json; or a name from rlpipe.models.families, or file.py:NAME
    dtype: str = "float32"  # float32 | bfloat16; bfloat16 is 50 to 90 times slower than float32 on most CPUs
    block_size: int = 0  # 0: what the model says; another one changes the grid, and the model has to adapt to it
    attention: str = ""  # empty: what the model says | block: a full-attention model gets the grid of block_size | full
    mask_token_id: int = -1  # -1: what the model says
    layers: int = 4  # of a tiny model, as the next three
    width: int = 64
    heads: int = 4
    mlp: int = 256


@dataclass
class WarmStartConfig:
    """Supervised steps on demonstrations before RL; the result is cached by content."""

    steps: int = 0  # 0: none
    batch_size: int = 64  # demonstrations of a step
    lr: float = 3e-3  # at its height; it falls to a tenth


@dataclass
class SftConfig:
    """Supervised training: `python -m rlpipe.sft`; steps, learner, data, model and checkpoint count as in RL."""

    objective: str = "random_mask"  # random_mask | block | trace | certainty: see rlpipe.objectives.supervised
    options: dict[str, Any] = field(default_factory=dict)  # numbers of its rows, e.g. {draws: 2}, {size: 16}, {shrink: 2}
    batch_size: int = 32  # responses of an optimizer update
    epochs: int = 0  # passes over the data, instead of `steps`; 0: `steps` counts
    trajectories: str = ""  # recorded responses instead of demonstrations: .npz, .jsonl, or a folder of them
    held_out: int = 64  # examples that are never trained on; their loss is taken every eval.every steps


@dataclass
class DataConfig:
    task: str = "sudoku"  # sudoku | countdown | reasoning_gym:NAME+NAME | records (jsonl) | a benchmark: gsm8k, humaneval, …
    train: str = ""  # records: a file, a folder or a hub id (OWNER/NAME,subset=…,split=…); empty: the benchmark's own
    test: str = ""  # held out, likewise; held_out: an eighth of data.train by content
    options: dict[str, Any] = field(default_factory=dict)  # of the task, e.g. {careless: 0.55}; of records: names of fields
    template: str = ""  # text with {prompt}, or a named one: chat, boxed, sdar:boxed, …; empty: the task's own
    format: str = "auto"  # what the fields of records are: auto | rlpipe | dllm_rl | verl | gsm8k | … or your own file.py:NAME
    bad_records: str = "refuse"  # refuse: the first ends the start | skip: counted and listed, in the log and the run's folder
    max_prompt_chars: int = 0  # records whose prompt, as the model reads it, is longer are left out and counted; 0: none
    max_prompt_tokens: int = 0  # likewise, by the model's tokenizer
    mixture: list[dict[str, Any]] = field(default_factory=list)  # parts such as {task: gsm8k, weight: 2}, instead of task
    pass_rates: str = ""  # pass_rates.jsonl of an earlier run, or its folder, for the next two
    difficulty: list[float] = field(default_factory=lambda: [0.0, 1.0])  # measured pass rates of the records to train on
    curriculum: str = "none"  # none: shuffled | easy_to_hard | target: nearest to the middle of difficulty first


@dataclass
class DecoderConfig:
    """One sampler as data: schedule · score · select · edit · cache · stop; a named one is rlpipe.decoder_presets' NAME."""

    preset: str = ""  # a named decoder: it sets all keys but max_tokens, temperature, top_p, top_k; keys beside it win
    max_tokens: int = 16  # response tokens
    block_size: int = 0  # commits stay inside one block of the absolute grid; 0: the model's block, or one canvas
    schedule: str = "tokens"  # tokens | even | dream | doubling | linear | cosine | pow | log | exp: commits of each step
    tokens_per_step: int = 1  # of schedule tokens
    steps: int = 0  # of a block, for the other schedules; 0: their default
    select: str = "static"  # which positions commit: see rlpipe.sampling.selection; guided: see rlpipe.sampling.guidance
    threshold: float = 0.9  # of the confidence, for selectors that have one
    score: str = "max_prob"  # state-only: max_prob | entropy | margin | random | left_to_right; sampled_prob: as published
    confidence: str = "model"  # the distribution that scores are taken from: model (temperature 1) | sampler
    order_temperature: float = 0.0  # above 0: positions are drawn by score (Dream's alg_temp)
    eos_gamma: float = 1.0  # EOSER: the score of a drawn EOS starts at this share and rises to all of it; 1 switches it off
    fuse: str = "none"  # none | credit: logits are fused with what earlier steps said
    cache: str = "auto"  # auto: exact | none | block | prefix | dual | vicinity | every | dkv_decode | dkv_greedy
    edit: str = "none"  # none | rcr | wino | remdm: committed tokens can be taken back (an editor brings its own selector)
    stop: str = "auto"  # auto | block | prefix | eotp | length: what EOS ends
    options: dict[str, Any] = field(default_factory=dict)  # numbers of any of these pieces, e.g. {gamma: 0.35}
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # 1: off
    top_k: int = 0  # 0: off


@dataclass
class RolloutConfig:
    workers: int = 2  # processes that sample
    min_workers: int = 0  # the run starts with so many, the others join as room for them appears; 0: all at once
    cpus: float = 0.5  # Ray CPUs per worker: bookkeeping, not a limit
    gpus: float = 0.0  # Ray GPUs per worker; above 1 the model's layers are spread over them
    threads: int = 1  # torch threads per worker
    batch_size: int = 64  # responses of one unit of work, fixed by the driver
    slots: int = 0  # responses of a unit denoised at a time; finished ones make room for the next. 0: all that fit
    timeout_s: float = 600.0  # of one unit of work
    retries: int = 4  # of one unit of work, over all workers
    transport: str = "auto"  # of weights: auto | store (Ray's objects) | broadcast (NCCL, gloo) | shared (memory of a node)
    order: str = "in_order"  # of mode async, which finished groups a step takes: in_order of their prompts | freshest weights
    partial: bool = True  # of mode async: responses under way take new weights between two blocks; else the old ones to the end
    oversample: float = 1.0  # groups begun for every group that a step trains on; late ones wait for a later step
    decoder: DecoderConfig = field(default_factory=DecoderConfig)


@dataclass
class VerifierConfig:
    name: str = ""  # empty: the task's own; or module:function, or file.py:function; a prompt's own verifier wins
    parts: dict[str, float] = field(default_factory=dict)  # verifier: weight in the reward; the first says what is correct
    options: dict[str, Any] = field(default_factory=dict)  # of verifiers, e.g. {extract: boxed} or {format: {pattern: boxed}}
    sandbox: str = "auto"  # of programs: auto | strict (refuse a weak one) | weak; see rlpipe.sandbox
    workers: int = 2  # processes that judge
    cpus: float = 0.1  # Ray CPUs per worker
    batch_size: int = 64  # responses per call
    timeout_s: float = 30.0  # of one call
    retries: int = 2  # elsewhere, before the group fails
    max_failed_groups: float = 0.25  # share of a step's groups; more stops the run


@dataclass
class AlgoConfig:
    preset: str = "tracerl"  # a method with its published numbers, or your own as file.py:NAME; keys beside it win
    options: dict[str, Any] = field(default_factory=dict)  # numbers of its row planner, e.g. {count: 24} for agrpo
    prompts_per_step: int = 16  # groups of a step
    samples_per_prompt: int = 8  # responses of a group
    shrink: int = 1  # merge every s denoising steps into one row
    advantage: str = "zscore"  # zscore | mean | leave_one_out | softmax
    ratio: str = "token"  # what is clipped as one: token | position (over its rows) | step | sequence
    clip_low: float = 0.2  # ratios below 1 - clip_low are clipped …
    clip_high: float = 0.2  # … and above 1 + clip_high
    clip_dual: float = 0.0  # above 1: with a negative advantage A the loss is at most this times |A|; 0: off
    clip_dynamic: bool = False  # bounds that widen for what was unlikely (DCPO) instead of 1 - clip_low and 1 + clip_high
    importance_cap: float = 2.0  # truncates importance weights of tokens that older weights or a changed sampler drew
    kl_coef: float = 0.0  # weight of the KL penalty; 0: none
    kl_estimator: str = "k3"  # k1 | k2 | k3, of each unit of the ratio
    kl_reference: str = "old"  # old: the policy that opened the step | initial | lagged: a copy that follows the policy
    kl_lag: int = 64  # steps between two moves of the lagged reference
    kl_mix: float = 0.6  # lagged reference <- kl_mix · policy + (1 - kl_mix) · itself
    random_share: float = 0.0  # of the responses, by chance: random masking of the answer instead of the preset's rows
    score_share: float = 1.0  # of a response's tokens: the loss scores those that were committed with least confidence
    score_by: str = "confidence"  # confidence | forced: only tokens that no test of the decoder would have committed
    normalizer: str = "token_mean"  # per unit of the ratio: see rlpipe.objectives.reducers
    kl_normalizer: str = ""  # empty: as normalizer; row_sum is the published full-attention TraceRL
    updates_per_step: int = 2  # optimizer updates a step and epoch
    epochs: int = 1  # passes over a step's responses
    redraw: bool = False  # every epoch draws its rows anew, for methods that mask at random; else they stay
    groups: str = "refill"  # keep all | drop those without signal | refill: replace them by fresh prompts
    accuracy_low: float = 0.0  # a group has signal if its mean reward lies strictly inside (low, high) …
    accuracy_high: float = 1.0  # … or, for rewards that are not 0/1, if they differ
    refill_rounds: int = 2  # of groups: refill
    overlong: str = "score"  # responses that end without EOS: score as any | zero | drop from the loss | soft penalty
    overlong_buffer: int = 0  # of soft: the last tokens of the budget, over which the reward falls by 1; 0: a quarter of it


@dataclass
class LearnerConfig:
    workers: int = 1  # data-parallel ranks
    cpus: float = 0.5  # Ray CPUs per rank
    gpus: float = 0.0  # Ray GPUs per rank
    threads: int = 2  # torch threads per rank
    lr: float = 1e-6  # AdamW's
    lr_schedule: str = "constant"  # constant | linear | cosine over `steps`
    lr_warmup: int = 0  # optimizer updates
    lr_floor: float = 0.0  # share of lr at which linear and cosine end
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float = 1.0  # largest norm of the gradient
    zero_stage: int = 1  # 0 to 3: what DeepSpeed shards over the ranks
    offload: bool = False  # optimizer (and at stage 3 parameters) to CPU memory
    token_budget: int = 8192  # tokens of a micro-batch: a group's prompt once, clean copies once, noisy rows
    activation_checkpointing: bool = False  # less memory for a third more time
    lora_rank: int = 0  # 0: all weights are trained
    lora_alpha: float = 0.0  # adapters count alpha / rank; 0: as rank
    lora_dropout: float = 0.0
    lora_targets: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    bucket_mb: int = 256  # of a weight export
    restarts: int = 10  # of all ranks from the last checkpoint, when one dies or hangs; more end the run
    timeout_s: float = 1800.0  # of one update


@dataclass
class ValueConfig:
    enabled: bool = False  # a value model of its own, with as many ranks as the learner
    path: str = ""  # a folder, a run's checkpoints/…/value_model for one; empty: starts as the policy
    lr: float = 5e-6  # of the value model
    clip: float = 0.2  # of a value's change since the step began, in units of the group-relative reward
    step_rewards: bool = False  # every step's full prediction is verified, and pays what it changed (full attention)
    gate: float = 0.0  # below this explained variance the policy is trained on group advantages while the value model learns
    gamma: float = 1.0  # discount of a denoising step
    lam: float = 1.0  # GAE's lambda


@dataclass
class ParityConfig:
    max_abs_delta: float = 1e-3  # stop when any |log p(learner) - log p(rollout)| passes this; 0 switches the stop off
    trajectories: int = 32  # replayed a step when the update's own rows cannot be compared (shrink > 1)


@dataclass
class EvalConfig:
    every: int = 20  # steps; 0: only at the start and the end
    prompts: int = 256  # held-out ones
    samples: int = 1  # to a prompt; with more than one the majority's answer is scored too
    hex: list[int] = field(default_factory=list)  # block lengths to sample under and vote over (full attention); empty: off
    decoder: dict[str, Any] = field(default_factory=lambda: {"select": "threshold"})  # besides the rollout's own: changes to it
    # a `preset` among them replaces all earlier ones, the default too


@dataclass
class CheckpointConfig:
    every: int = 20  # steps; 0: only at the end
    keep: int = 2  # the newest ones; older are removed
    path: str = ""  # a folder, or a URL that fsspec knows (s3://…); empty: checkpoints/ in the run's folder
    background: bool = True  # the state is copied, and written while training goes on


@dataclass
class MonitorConfig:
    wandb: str = "auto"  # auto: online with a login, else offline | online | offline | disabled
    project: str = "rlpipe"  # of W&B
    samples: int = 8  # responses shown and kept a step
    timeline: bool = True  # what every worker did when, as a trace for chrome://tracing or Perfetto


@dataclass
class ClusterConfig:
    address: str = "auto"  # auto: the job's or a running cluster, else a local one | local | HOST:PORT
    object_store_mb: int = 512  # of a local cluster
    start_timeout_s: float = 300.0  # of placing and starting the workers
    colocate: list[str] = field(default_factory=list)  # roles that share GPUs and take turns, e.g. [rollout, learner]


@dataclass
class ServerConfig:
    """A language model behind an OpenAI-compatible server: one that runs somewhere, or one of vLLM started with the run."""

    url: str = ""  # of a server that is there, e.g. http://HOST:8000/v1; empty: one is started for `model`
    model: str = ""  # a folder or hub id; empty with an empty url: no server
    gpus: float = 1.0  # Ray GPUs of a server that is started
    cpus: float = 1.0  # its Ray CPUs
    args: dict[str, Any] = field(default_factory=dict)  # of `vllm serve`, e.g. {max-model-len: 4096}
    key_env: str = ""  # environment variable that holds the server's API key
    start_timeout_s: float = 900.0  # until a server that is started answers


@dataclass
class RunConfig:
    """One run. `python -m rlpipe.run recipe=NAME key=value …`."""

    name: str = ""  # of the recipe, filled in when it is loaded
    seed: int = 0  # of data, weights made here and noise; the same seed gives the same run
    steps: int = 80  # of rollout and update
    mode: str = "sync"  # sync: rollout, then update | async: they overlap
    max_lag: int = 1  # of mode async: weight versions that a response may be behind the policy it trains; 0: as sync
    output_dir: str = "outputs"  # runs, caches and evaluations go below it
    run_id: str = ""  # empty: the time of the start
    resume: str = "never"  # never | auto: the latest run of this recipe, a new one if there is none | path of a run
    dry_run: bool = False  # print the plan and start nothing
    description: str = ""  # what the recipe is and what it was fed; printed at the start
    model: ModelConfig = field(default_factory=ModelConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    verifier: VerifierConfig = field(default_factory=VerifierConfig)
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    value: ValueConfig = field(default_factory=ValueConfig)
    parity: ParityConfig = field(default_factory=ParityConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    judge: ServerConfig = field(default_factory=ServerConfig)  # for the verifiers llm_judge and reward_model
    guide: ServerConfig = field(default_factory=ServerConfig)  # for decoders with select: guided
