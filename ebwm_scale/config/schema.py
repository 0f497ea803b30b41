"""Every key of a configuration: its type, its bounds, and what it means.

The objects are frozen. Types are strict: no text is taken for a number, no number for a boolean.
`ebwm config schema` prints the same as a JSON schema, for editors.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ebwm_scale.config.plain_values import as_tuples, on_or_off, refuse_unplain
from ebwm_scale.config.strict_yaml import dump_yaml

# Whole numbers above these are mistakes; below them no size, product or position of a run
# overflows 64 bits.
MANY = 10**12

Count = Annotated[int, Field(gt=0, le=MANY)]
CountOrNone = Annotated[int, Field(ge=0, le=MANY)]  # 0 means none
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]

Points = Annotated[tuple[tuple[float, float], ...], BeforeValidator(as_tuples)]
"""(progress in [0, 1], value) points, joined by straight lines and flat outside."""

SizeName = Literal["4xs", "3xs", "xxs", "xs", "small", "medium", "large", "xl"]


NoDecay = Literal["norms", "embeddings"]
HeadTerm = Literal["linear", "quadratic", "bilinear", "direct", "context"]


class Section(BaseModel):
    """Frozen, strict, without unknown keys; documented by the text under each key."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )

    def replace(self, **values: Any):
        """The same with some keys changed; not checked again."""
        return self.model_copy(update=values)


class ModelConfig(Section):
    kind: Literal["energy", "baseline"] = "energy"
    """energy: an energy-based world model; baseline: Transformer++ from the same blocks."""
    size: SizeName = "xxs"
    """Published sizes: layers, width and heads, see sizes.py."""
    num_layers: Annotated[int, Field(gt=0, le=10**4)] | None = None
    """Overrides the size's."""
    width: Annotated[int, Field(gt=0, le=10**6)] | None = None
    """Overrides the size's."""
    num_heads: Annotated[int, Field(gt=0, le=10**6)] | None = None
    """Overrides the size's."""
    num_kv_heads: Annotated[int, Field(gt=0, le=10**6)] | None = None
    """Grouped-query attention; default: num_heads."""
    feed_forward_width: Annotated[int, Field(gt=0, le=10**7)] | None = None
    """Default: width, as in the published sizes."""
    parametrization: Literal["standard", "width_scaled"] = "standard"
    """width_scaled: starts and rates by role, so that the best learning rate of base_width holds at
    other widths (docs/width.md)."""
    base_width: Annotated[int, Field(gt=0, le=10**6)] | None = None
    """Of width_scaled: the width at which optimizer.learning_rate was found."""
    base_num_heads: Annotated[int, Field(gt=0, le=10**6)] | None = None
    """Of width_scaled: num_heads there."""
    conditioning: Literal["default", "time_embed", "adaln", "adaln_zero", "predicted_only"] = (
        "default"
    )
    """How refinement steps are told apart, see model/energy_transformer.py."""
    predicted_input: Literal["state", "anchored"] = "state"
    """anchored: what the observed stream has where the predicted one enters is added."""
    predicted_layers: Annotated[int, Field(gt=0, le=10**4)] | None = None
    """The predicted stream passes the last so many blocks; default: all."""
    own_keys: bool = True
    """Candidates attend to themselves beside the context; false: to the context alone, for less."""
    reach: Annotated[int, Field(ge=0, le=10**4)] | None = None
    """grids: cells see those at most so many rows and columns away, see model/reach.py; default:
    all."""
    energy_head: Annotated[tuple[HeadTerm, ...], BeforeValidator(as_tuples)] = ("linear",)
    """Terms of the energy behind the last block, see model/energy_head.py; released: linear."""
    loops: Annotated[int, Field(gt=0, le=10**4)] = 1
    """Times that the observed stream passes its blocks: of a baseline see model/baseline.py, of an
    energy model the candidates see the last pass."""
    loop_loss: Literal["last", "every"] = "last"
    """Of a looped baseline: the loss after the last pass, or the mean over those after each."""
    vocabulary_size: Annotated[int, Field(gt=0, le=10**8)] | None = None
    """Default: the data's."""
    output: Literal["one_linear", "two_linear"] = "one_linear"
    """Of a baseline of frame embeddings: width -> dimension, or width -> width -> dimension."""
    predicts: Literal["state", "change"] = "state"
    """Of a baseline of frame embeddings; change: what is added to the last frame."""
    norm_epsilon: Positive = 1e-5
    qk_norm: bool = False
    """RMSNorm of each head's queries and keys, in both streams, in front of their rotation."""
    logit_softcap: Positive | None = None
    """vocabulary: c of c tanh(x / c), which logits become: a baseline's, and a state after each
    refinement step; default: none."""
    rope_theta: float = 1e4
    attention_backend: Literal["auto", "triton", "reference"] = "auto"
    """Of the predicted stream, and of norms, activations, rotations and passes over states."""
    observed_backend: Literal["auto", "flash_attn", "flex", "sdpa"] = "auto"
    """Of the observed stream, and of the baseline."""


class StateConfig(Section):
    kind: Literal["vocabulary", "embedding"] = "vocabulary"
    """vocabulary: logits over tokens; embedding: a frame embedding."""
    dimension: Annotated[int, Field(gt=0, le=10**7)] | None = None
    """embedding: size of a frame embedding; default: the data's. vocabulary: must be absent."""
    tie_embedding: bool = False
    """vocabulary: map states with the token embedding instead of a matrix of their own."""
    map_scale: Positive = 1.0
    """vocabulary: constant factor on the map, so that the network sees the state."""
    initial: Literal["random_noise", "zeros", "most_recent"] = "random_noise"
    """most_recent: video starts from the last frame."""
    workspace: Annotated[int, Field(gt=0, le=10**6)] | None = None
    """Numbers of each position that are refined beside its state and not scored; default: none."""
    workspace_initial: Literal["random_noise", "zeros"] = "zeros"


class RefinementScheduleConfig(Section):
    """Each is a list of [progress, value] points; progress runs from 0 to 1 over the training."""

    step_size: Points = ()
    """Factor on refinement.step_size."""
    num_steps: Points = ()
    """Replaces refinement.num_steps (rounded); never above it."""
    noise: Points = ()
    """Factor on refinement.noise."""


class RefinementConfig(Section):
    num_steps: Annotated[int, Field(gt=0, le=10**4)] = 2
    """The largest number of steps; always used in evaluation."""
    min_num_steps: Annotated[int, Field(gt=0)] | None = None
    """Draw the number of steps per batch from min_num_steps..num_steps; default: num_steps."""
    step_size: Positive = 500.0
    """alpha."""
    learnable: bool = True
    """Learn alpha, and beta of a workspace."""
    learning_rate_multiplier: Positive | None = None
    """alpha's learning rate over the model's; default: 3 * step_size."""
    workspace_step_size: Positive = 1.0
    """beta, of state.workspace."""
    workspace_learning_rate_multiplier: Positive | None = None
    """beta's learning rate over the model's; default: 3 * workspace_step_size."""
    step_size_random_factor: Annotated[float, Field(ge=1)] = 1.0
    """r > 1: alpha of each position is uniform in [alpha / r, alpha * r] in training."""
    landscapes: Literal["one", "per_step"] = "per_step"
    """What conditionings tell apart; `default` has one anyway."""
    graph: Literal["detach", "truncate", "full"] = "detach"
    """detach: each step on its own; truncate: only the last step; full: through all steps."""
    backprop_steps: Annotated[int, Field(gt=0)] | None = None
    """Of graph full: the last so many steps of a batch are differentiated and scored, the ones in
    front of them run without a graph; default: all."""
    loss: Literal["every", "last"] = "every"
    """The mean over the steps' losses, or the last one's."""
    loss_weights: (
        Literal["rising", "exits"]
        | Annotated[tuple[NotNegative, ...], BeforeValidator(as_tuples)]
        | None
    ) = None
    """With loss every: rising (1, 4, 9, ..) or one weight per step, which are made to sum to 1; or
    exits, a learned distribution over the steps (refinement/exits.py)."""
    exit_entropy: NotNegative = 0.1
    """Of loss_weights exits: what a nat of divergence from the uniform distribution costs."""
    exit_learning_rate_multiplier: Positive = 10.0
    """Of loss_weights exits: the learning rate of the distribution over the model's."""
    update: Literal["probabilities", "logits", "mirror"] = "probabilities"
    """vocabulary states only, see ebwm_kernels.vocabulary.api."""
    candidates: Count | None = None
    """Steps after the first move the so many most probable tokens of each position; default: all
    tokens, as with a number that is not below the vocabulary's size."""
    reencode: Literal["none", "all"] | Annotated[int, Field(gt=0, le=10**4)] = "none"
    """Before a further step the observed stream is encoded again with each position's prediction
    added to it: through all blocks, or through the last so many."""
    reencode_every: Annotated[int, Field(ge=1, le=2)] = 1
    """1: before every further step; 2: before every other one, the second step being the first."""
    damping: NotNegative = 0.0
    """p: alpha and beta of step i = 1, 2, .. are over i ** p, also beyond the trained steps."""
    damping_after: Count = 1
    """k: the first k steps keep their length, and damping gives step i > k (k / i) ** p of it."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """mu: a step of the state and of a workspace goes on with so much of the one before it."""
    accept: Literal["always", "lower"] = "always"
    """lower: a row or group whose energy a step does not lower keeps its state, in training too."""
    spectral_penalty: NotNegative = 0.0
    """Weight in the training loss of steps that move further than spectral_bound times the one
    before, see refinement/spectral_penalty.py."""
    spectral_bound: Positive = 0.8
    level_weight: NotNegative = 0.0
    """Weight in the training loss of what the energy of a state is off the state's own loss, see
    refinement/energy_level.py: asks for an energy that can judge."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the state and of a workspace that a step forgets: the energy has a minimum then."""
    change_clamp: Positive | None = None
    """Bound on |alpha dE/dx| of each number of a state and step (released: clamp_futures_grad)."""
    state_clamp: Positive | None = None
    """Bound on |x| of each number of a state after a step (released: absolute_clamp)."""
    noise: NotNegative = 0.0
    """Langevin: + noise * N(0, 1) before each step in training."""
    replay: bool = False
    """Half of a batch restarts from stored final states."""
    replay_capacity: Count = 256
    """Samples kept in all, over all ranks."""
    tile_rows: Count | None = None
    """(sample, position) rows refined at a time; changes memory and speed only."""
    recompute: Literal["none", "step", "block"] = "none"
    """Activation checkpointing: compute a step, or each block of it, again in the backward."""
    compile: bool = False
    """TorchInductor for the network's part of a step: minutes at the start."""
    cuda_graph: bool = True
    """On a GPU: replay the launches of batches that are alike (refinement/graphed.py)."""
    schedule: RefinementScheduleConfig = RefinementScheduleConfig()


class SourceConfig(Section):
    """One dataset of a mixture."""

    manifest: str = ""
    weight: float = 1.0
    """Its share of the samples, relative to the other weights."""
    epochs: Positive | None = None
    """It is passed through at most so often; then the others make up for it. Default: no end."""
    tokens: Count | None = None
    """It gives at most so many tokens (positions) in all; with epochs whichever is less."""


class ConditionConfig(Section):
    """What is known of each frame beside it, such as an action."""

    name: str = ""
    kind: Literal["continuous", "discrete"] = "continuous"
    width: Annotated[int, Field(gt=0, le=10**6)] = 1
    """Numbers per frame; of a discrete one ids."""
    num_values: Annotated[int, Field(gt=0, le=10**6)] | None = None
    """discrete: each id is below this; continuous: absent."""

    @property
    def size(self) -> int:
        """Inputs of its map: its width, for each of the values that an id can have."""
        return self.width * (self.num_values or 1)


class CacheConfig(Section):
    """Streamed shards kept on a local disk, so that a further pass reads them there."""

    folder: str | None = None
    """Of a disk of this machine, shared by its processes; default: nothing is kept."""
    limit_gib: Positive = 100.0
    """The least recently used shards leave first."""


class DataConfig(Section):
    manifest: str | None = None
    """Path of a manifest.json that one of tools/make_*_shards.py wrote."""
    sources: Annotated[tuple[SourceConfig, ...], BeforeValidator(as_tuples)] = ()
    """Instead of manifest: a mixture, a list of {manifest, weight}."""
    stream: Annotated[tuple[str, ...], BeforeValidator(as_tuples)] = ()
    """Training shards to stream instead (pipe: commands, URLs): a weaker promise, docs/data.md."""
    stream_format: Literal["shards", "text"] = "shards"
    """text: data.stream names files, folders, globs or addresses of raw text, prepared by nobody;
    tokenised while training, with the tokenizer of data.manifest."""
    stream_buffer: Count = 1000
    """Samples that a stream is shuffled in; of raw text documents, over all lanes."""
    stream_lanes: Count | None = None
    """Raw text: places that are read at once, over all processes; default: up to 64."""
    stream_field: str | None = None
    """Raw text: the field of a record that holds the text; default: text."""
    stream_filters: Annotated[tuple[str, ...], BeforeValidator(as_tuples)] = ()
    """Raw text: records are taken for which these hold, such as 'score >= 0.5'."""
    cache: CacheConfig = CacheConfig()
    """Of data.stream with shards."""
    mask_document_starts: bool = False
    """text: the first token of a document is no target."""
    mask_documents: bool | None = None
    """text: no attention across documents; each begins with the end of sequence before it. Default:
    what the dataset says, true of new ones, false of those from before it was said."""
    eos_id: Annotated[int, Field(ge=0)] | None = None
    """text: the token between documents; mask_documents takes it from the dataset."""
    max_quarantined: CountOrNone = 16
    """Damaged samples that are replaced before the run stops."""
    context_length: Annotated[int, Field(gt=0, le=10**8)] | None = None
    """Observed positions per sample; default: what the shards were packed for."""
    tokenizer_sha256: str | None = None
    """text: of the run's tokenizer; taken from its dataset."""
    group_size: Annotated[int, Field(gt=1, le=10**6)] | None = None
    """Tokens that are predicted together; taken from the dataset, absent: one at a time."""
    grid: Annotated[tuple[int, int] | None, BeforeValidator(as_tuples)] = None
    """(rows, columns) of a group's tokens; taken from the dataset."""
    conditions: Annotated[tuple[ConditionConfig, ...], BeforeValidator(as_tuples)] = ()
    """video: actions and the like, tokens behind each frame; taken from the dataset."""
    scored_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the targets that are scored; taken from the dataset, absent: all are."""
    num_workers: Annotated[int, Field(ge=0, le=10**4)] = 0
    """Loader processes per rank; never changes a batch."""
    window_shards: Count = 4
    """Samples are permuted inside windows of this many shards."""
    verify: Literal["sizes", "hashes"] = "hashes"
    """What is checked before the start; every sample that is read is checked anyway."""


class ParameterRule(Section):
    """What some parameters have of their own; the first rule that fits a parameter counts."""

    parameters: str = ""
    """A regular expression that fits the whole name of a parameter."""
    rate: Positive = 1.0
    """Factor on the learning rate they would have."""
    weight_decay: NotNegative | None = None
    """Default: the one they would have."""


class OptimizerConfig(Section):
    name: Literal["adamw", "muon", "schedule_free"] = "adamw"
    """muon: for the matrices of the blocks, AdamW for all others; schedule_free: AdamW whose
    weights are averaged in place of a decay of the rate."""
    learning_rate: Positive | None = None
    """Peak; default: the published one of the size (a third for embeddings)."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    epsilon: Positive = 1e-8
    weight_decay: NotNegative = 0.01
    """On everything but alpha, as released."""
    no_decay: Annotated[tuple[NoDecay, ...], BeforeValidator(as_tuples)] = ()
    """Without weight decay: norms (with biases), embeddings (of tokens and refinement steps)."""
    rules: Annotated[tuple[ParameterRule, ...], BeforeValidator(as_tuples)] = ()
    """Rates and decays by parameter name, a list of {parameters, rate, weight_decay}."""
    muon_learning_rate: Positive | None = None
    """Of muon: peak for the blocks' matrices, at AdamW's size of update; default: learning_rate."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Of muon."""
    gradient_clipping: NotNegative = 1.0
    """Global norm over all gradients; 0: off."""


class ScheduleConfig(Section):
    """Tokens are observed positions, as tokens_seen (frames_seen) of metrics.jsonl counts them."""

    kind: Literal["cosine", "linear", "wsd", "inverse_sqrt", "constant"] = "cosine"
    """What follows the linear warm-up; wsd: the peak, then a decay in the last cooldown_steps."""
    warmup_steps: CountOrNone | None = None
    """Default: 10 000."""
    warmup_tokens: CountOrNone | None = None
    """Instead of warmup_steps."""
    decay_steps: Count | None = None
    """Of cosine, linear and wsd: the decay ends here; default: train.max_steps."""
    decay_tokens: Count | None = None
    """Instead of decay_steps."""
    cooldown_steps: Count | None = None
    """Of wsd: length of the decay; default: a tenth of decay_steps."""
    cooldown_tokens: Count | None = None
    """Instead of cooldown_steps."""
    cooldown_shape: Literal["linear", "cosine", "one_minus_sqrt"] = "linear"
    """Of wsd: the decay's course."""
    final_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Final over peak learning rate; inverse_sqrt never falls below it, constant has none."""


class TrainConfig(Section):
    global_batch_size: Count = 128
    """Sequences per optimizer step over all ranks and accumulation."""
    batch_ramp: Annotated[tuple[tuple[Count, Count], ...], BeforeValidator(as_tuples)] = ()
    """[steps, sequences] pieces in front of global_batch_size: batches that grow."""
    micro_batch_size: Count | None = None
    """Sequences per rank and forward pass; default: what makes accumulation 1, in the smallest
    batch of a ramp."""
    max_steps: Count = 100_000
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an average of the weights, kept beside them; default: none."""
    z_loss: NotNegative = 0.0
    """vocabulary: weight of logsumexp(logits)^2 in the training loss; logged losses are without."""
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 33
    max_minutes: Positive | None = None
    """Save and leave with exit code 75 after this long."""
    max_skipped_steps: Count = 3
    """Leave with exit code 76 after this many steps in a row whose gradients are not finite."""
    spike_deviations: Positive | None = None
    """A loss so many standard deviations above the mean of those before it is a spike: the run goes
    back to a checkpoint from before it, and leaves its samples out. Default: off."""
    spike_window: Annotated[int, Field(ge=2, le=10**6)] = 128
    """Losses that a spike is held against."""
    spike_skip_steps: Count = 1
    """Steps up to a spike whose samples are left out."""
    max_rollbacks: Count = 3
    """A run goes back at most so often; later spikes are only recorded."""
    hang_minutes: NotNegative = 30
    """A step, save or evaluation that takes longer is a hang: exit code 77, all stacks; 0: off."""


class ParallelConfig(Section):
    sequence: Annotated[int, Field(ge=1, le=10**4)] = 1
    """Neighbouring processes that share each sample of text, in training and validation: each has
    context_length / sequence of its positions; 1: a process has whole samples. A run may go on with
    another number."""


class DeepSpeedConfig(Section):
    zero_stage: Literal[0, 1, 2, 3] = 0
    """3: parameters are partitioned too; an energy model then needs refinement.recompute block."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """To the host; parameters (stage 3): with the optimizer state."""
    raw: Annotated[dict[str, Any], BeforeValidator(refuse_unplain)] = {}
    """Merged into the DeepSpeed configuration last, as it is."""


class BestConfig(Section):
    """By what the best checkpoint is known."""

    metric: str = "loss"
    """A number of the validation rows: loss, or a path such as sets/NAME/loss,
    questions/NAME/accuracy or tasks/NAME/acc."""
    mode: Literal["min", "max"] = "min"
    """Whether lower or higher is better."""


class CheckpointConfig(Section):
    every_steps: CountOrNone = 1000
    """0: only at the end."""
    keep_last: Count = 2
    keep_best: bool = True
    """Also keep the one with the lowest validation loss, or what `best` says."""
    best: BestConfig | None = None
    """What is best; an evaluation that is better than all before it is then saved at once. Default:
    the lowest validation loss among the checkpoints that are saved anyway."""
    milestone_every_steps: CountOrNone = 0
    """Also keep those at multiples of this; 0: none."""
    remote: str | None = None
    """An address of fsspec (s3://bucket/runs/mine) where each checkpoint and the metrics are copied
    to in the background; --resume on a machine without the run folder fetches them from there."""


class SetConfig(Section):
    """A held-out set beside the validation split."""

    name: str = ""
    manifest: str = ""
    """Its validation split is evaluated; made with the run's tokenizer or encoder."""


class QuestionsConfig(Section):
    """A file of questions, as `ebwm questions` reads it."""

    name: str = ""
    kind: Literal["multiple_choice", "cloze"] = "multiple_choice"
    file: str = ""


class EvaluationConfig(Section):
    every_steps: CountOrNone = 500
    """0: only at the end."""
    max_samples: Count = 1024
    """Validation samples used, the same ones each time; of each of `sets` as many."""
    sets: Annotated[tuple[SetConfig, ...], BeforeValidator(as_tuples)] = ()
    """Further held-out sets, a list of {name, manifest}, at each evaluation."""
    questions: Annotated[tuple[QuestionsConfig, ...], BeforeValidator(as_tuples)] = ()
    """text: a list of {name, kind, file}."""
    tasks: Annotated[tuple[str, ...], BeforeValidator(as_tuples)] = ()
    """text: tasks of lm-evaluation-harness, by name (the extra `harness`)."""
    tasks_path: str | None = None
    """The folder of these tasks' YAML files, whose data are local files."""
    tasks_limit: Count | None = None
    """So many documents of each task; default: all."""
    samples: CountOrNone = 0
    """text: so many held-out texts are continued greedily, and written into the row."""
    samples_tokens: Count = 24
    """The length of these continuations."""
    downstream_every_steps: Count | None = None
    """Questions, tasks and samples: a multiple of every_steps; default: at each evaluation. Always
    at the end."""
    curvature_samples: CountOrNone = 0
    """Of an energy model: validation samples of each rank in which the energy's largest curvature
    is measured in front of each step (inference/curvature.py); 0: off."""
    weights: Literal["trained", "ema"] = "trained"
    """Which are validated while training, and so decide what is best; ema: those of train.ema."""


class LoggingConfig(Section):
    every_steps: Count = 10
    norms_every_steps: CountOrNone = 0
    """Norms of gradients, weights and updates by layer and by kind of parameter, in the rows of
    every so many steps; 0: off."""
    tensorboard: bool = False
    """Event files in tensorboard/ of the run folder (the extra `tracking`)."""
    profile: Annotated[tuple[Count, Count] | None, BeforeValidator(as_tuples)] = None
    """[first step, steps]: so many steps are traced, with their memory, into profile/ of the run
    folder; steps are counted from 1, as in metrics.jsonl."""
    wandb: Annotated[Literal["off", "offline", "online"], BeforeValidator(on_or_off)] = "off"
    wandb_project: str = "ebwm_scale"
    run_name: str | None = None
    """Default: the run folder's name."""


class Config(Section):
    """A whole configuration."""

    model: ModelConfig = ModelConfig()
    state: StateConfig = StateConfig()
    refinement: RefinementConfig = RefinementConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    parallel: ParallelConfig = ParallelConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are written into files."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """What every run folder and checkpoint carries; `load_config` reads it back the same."""
        return dump_yaml(self.to_dict())
