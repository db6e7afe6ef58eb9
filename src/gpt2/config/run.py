"""The configuration of a run, as frozen dataclasses, and numbers derived from it. Pure.

Each part defines the flags of one concern: their names, types, defaults and help. Those of the
model are in `gpt2.config.model`. `None` means off. Invalid values and combinations of values raise
ConfigError.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from gpt2.base.validation import (
    LARGEST,
    LARGEST_SEED,
    nearest_multiples,
    require,
    require_positive,
    require_within,
    suggestion,
)
from gpt2.config.experiment_name import ExperimentConfig
from gpt2.config.lr_schedule import Schedule, Shape
from gpt2.config.mixture import StepPhase, mixture_of, typed
from gpt2.config.model import ModelConfig
from gpt2.data import batch_ramp
from gpt2.data.batch_ramp import BatchRamp
from gpt2.data.sampler import Sampler, Shuffle

PresetName = Literal[
    "gpt2-124m",
    "gpt2-350m",
    "gpt2-774m",
    "gpt2-1558m",
    "fast-124m",
    "fast-350m",
    "fast-774m",
    "demo",
    "demo-fast",
]
OPTIMIZERS = {
    "adamw": "gpt2.optim.combined:build_adamw",
    "muon": "gpt2.optim.combined:build_muon",
    "normuon": "gpt2.optim.combined:build_normuon",
}
"""`module:function` of each optimiser, which `gpt2.optim.build` calls; a new optimiser is a file in
`gpt2.optim` and an entry here"""
MAX_GRAD_CLIP = 10**6


@dataclass(frozen=True)
class DataConfig:
    """Training data, batch sizes and the length of the run."""

    data_root: tuple[str, ...] = ("data/fineweb_edu",)
    """folder or glob of token shards, or a URL such as s3://bucket/folder; several corpora as
    NAME=FOLDER:WEIGHT, without weights by their sizes"""
    mixture: tuple[str, ...] = ()
    """weights of the corpora that change, one text per phase: 'until=0.8 web=0.7 code=0.3'
    'web=0.2 code=0.8' (until is a share of the run)"""
    cache_dir: Path = Path("data/cache")
    """folder for local copies of remote shards"""
    cache_gb: float | None = 50.0
    """disk space for those copies in GB; the least recently used ones are removed"""
    total_batch_size: int = 524288
    """tokens per optimiser step, over all ranks"""
    batch_ramp: tuple[str, ...] = ()
    """fewer tokens per step at first, as STEP:TOKENS up to each step: '200:131072 600:262144' has
    131,072 in the first 200 steps, 262,144 up to step 600, then total_batch_size"""
    mini_batch_size: int | Literal["auto"] = "auto"
    """rows of block_size tokens in a micro-batch of one rank; auto is what fits into a GPU's
    memory; on CPUs 64, 32, 16 or 8, by preset"""
    auto_mini_batch: bool = False
    """halve a given mini_batch_size at the start until a micro-batch fits into memory"""
    epochs: int = 5
    """passes over the training split"""
    max_steps: int | None = None
    """stop after this many steps; overrides epochs"""
    shuffle: Shuffle = "shards"
    """what each epoch permutes: the shards; also the rows within each shard; all rows of all shards
    (global); or nothing"""

    def __post_init__(self) -> None:
        typed(self.data_root, self.mixture)
        require_within(self, 0, 10**6, "cache_gb")
        require_within(self, 1, LARGEST, "total_batch_size", "epochs", "max_steps")
        if self.mini_batch_size != "auto":
            require_within(self, 1, LARGEST, "mini_batch_size")


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser, its learning rate and its schedule (Brown et al. 2020, appendix B)."""

    optimizer: str = "adamw"
    """adamw; muon: Muon for the hidden matrices, and AdamW for everything else; normuon: Muon whose
    updates are normalised by neuron"""
    learning_rate: float = 6e-4
    """peak learning rate"""
    embedding_lr_ratio: float = 1.0
    """learning rate of embeddings, as a multiple of learning_rate"""
    head_lr_ratio: float = 1.0
    """learning rate of an untied output head, as a multiple of learning_rate"""
    scalar_lr_ratio: float = 1.0
    """learning rate of vectors, as a multiple of learning_rate"""
    min_lr_ratio: float = 0.1
    """final learning rate as a share of the peak"""
    warmup_steps: int = 715
    """steps of the linear warm-up"""
    schedule: Shape = "cosine"
    """decay of the learning rate: cosine, or wsd (constant, then a linear cooldown)"""
    decay_steps: int | None = None
    """step at which the decay ends; None is the end of the run"""
    cooldown: float = 0.2
    """wsd: share of the steps, at the end, in which the learning rate falls"""
    weight_decay: float = 0.1
    """weight decay of matrices; biases and layer norms have none"""
    cautious_decay: bool = False
    """Muon: only weights that the update moves towards zero decay"""
    momentum_warmup: int = 0
    """Muon: updates in which the momentum grows from 0.85 to 0.95"""
    beta1: float = 0.9
    """AdamW: decay of the first moment"""
    beta2: float = 0.95
    """AdamW: decay of the second moment"""
    grad_clip: float | None = 1.0
    """maximum norm of the gradient; None is no clipping"""
    max_bad_steps: int = 5
    """consecutive skipped updates before the run goes back"""
    shard_optimizer: bool = False
    """several ranks: divide AdamW's moments among them, 8 of 16 bytes per weight; Muon's momentum
    always is divided"""
    skip_spikes: bool = False
    """skip an update whose loss or gradient norm is 6 standard deviations above the mean of the
    last 128; without it, such an update is only reported"""

    def __post_init__(self) -> None:
        require(
            self.optimizer in OPTIMIZERS,
            f"optimizer={self.optimizer} is unknown{suggestion(self.optimizer, list(OPTIMIZERS))}; "
            f"expected one of {', '.join(OPTIMIZERS)}",
        )
        require_within(self, 0, LARGEST, "warmup_steps", "momentum_warmup")
        require_within(self, 1, LARGEST, "decay_steps", "max_bad_steps")
        require_within(self, 0, 10, "weight_decay")
        require_within(self, 0, 1, "min_lr_ratio")
        require_positive(self, 1, "cooldown")
        require_positive(self, 10, "learning_rate")
        require_positive(self, 10**4, "embedding_lr_ratio", "head_lr_ratio", "scalar_lr_ratio")
        require(
            self.grad_clip is None or 0 < self.grad_clip <= MAX_GRAD_CLIP,
            f"grad_clip={self.grad_clip} is invalid; expected more than 0 and at most "
            f"{MAX_GRAD_CLIP}, or None for no clipping",
        )
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name}={value} is invalid; expected 0 <= {name} < 1")


@dataclass(frozen=True)
class CheckpointConfig:
    """Where the weights come from, and the checkpoints of the run."""

    resume: str | None = None
    """continue a run: latest, best, a step, or a path; `latest` in an empty folder starts anew"""
    init_from: str = "scratch"
    """weights of a new run: scratch, a checkpoint's path, hf:FOLDER (Hugging Face's GPT-2) or
    nanogpt:FILE; `resume` means --resume latest"""
    checkpoint_dir: Path = Path("checkpoints")
    """folder for checkpoints and status.json"""
    checkpoint_interval: int | None = 250
    """steps between checkpoints; also saved after the last step and when the run is stopped"""
    keep_last: int = 10
    """number of newest checkpoints to keep, at least two; the best one is kept, too"""
    trust_checkpoint: bool = False
    """load a checkpoint that another user wrote: its pickle can run any code"""

    def __post_init__(self) -> None:
        require_within(self, 1, LARGEST, "checkpoint_interval", "keep_last")
        require(
            self.resume is None or self.init_from in ("scratch", "resume"),
            f"--resume {self.resume} and --init_from {self.init_from} both choose the weights; "
            "use one of them",
        )

    @property
    def resume_from(self) -> str | None:
        """The checkpoint to continue, `--init_from resume` included."""
        return "latest" if self.init_from == "resume" and self.resume is None else self.resume


@dataclass(frozen=True)
class EvalConfig:
    """Evaluations during training."""

    eval_interval: int | None = 250
    """steps between validations; also before the first step and after the last"""
    eval_batches: int = 20
    """validation rows, in batches of total_batch_size tokens"""
    eval_rows: int | None = None
    """validation rows of block_size tokens, the same ones for batches of any size; None uses
    --eval_batches"""
    hellaswag_interval: int | None = 250
    """steps between HellaSwag evaluations; also after the last step"""
    hellaswag_limit: int | None = None
    """number of tasks, from the first one; None is all 10,042"""
    hellaswag_path: Path | None = None
    """file of tasks (.jsonl, .jsonl.gz); None downloads them once to data/hellaswag"""
    sample_interval: int | None = 250
    """steps between generated samples; also after the last step"""
    sample_prompt: str = "Hello, I'm a language model,"
    """text that the samples continue"""

    def __post_init__(self) -> None:
        require_within(self, 1, LARGEST, "eval_interval", "eval_batches", "eval_rows")
        require_within(self, 1, LARGEST, "sample_interval", "hellaswag_interval", "hellaswag_limit")


@dataclass(frozen=True)
class WatchConfig:
    """Logs and TensorBoard."""

    log_dir: Path = Path("logs")
    """folder of log.txt and metrics.jsonl; every run appends to them"""
    runs_dir: Path = Path("runs")
    """folder of TensorBoard runs"""
    use_tensorboard: bool = False
    """write curves, samples and hyperparameters for TensorBoard"""
    profile: int | None = None
    """steps to record with torch.profiler, from the sixth of this process on: a trace in the run's
    folder in runs_dir (TensorBoard, Perfetto), and the ten longest kernels in the log"""
    memory_snapshot: bool = False
    """CUDA: when a step runs out of memory, write what holds it to log_dir, for
    pytorch.org/memory_viz"""

    def __post_init__(self) -> None:
        require_within(self, 1, 100, "profile")


@dataclass(frozen=True)
class MachineConfig:
    """Devices, number types, seeds and other settings of the computation."""

    device: str = "auto"
    """auto, cpu, cuda; auto is cuda if there is a GPU"""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """autocast type of matrix products; auto is bfloat16 if the hardware multiplies it, float16 on
    GPUs that multiply that alone (V100, T4), else float32"""
    residual_dtype: Literal["float32", "bfloat16"] = "float32"
    """type of the residual stream; bfloat16, beside products in it, saves a tenth of the memory of
    activations"""
    grad_dtype: Literal["float32", "bfloat16"] = "float32"
    """several ranks: type in which they exchange gradients; bfloat16 sends half the bytes"""
    compile: Literal["auto", "on", "off"] = "auto"
    """use torch.compile; auto is on for GPUs from V100 on"""
    seed: int = 1337
    """seed of the weights, of dropout and of the shuffling"""
    collective_timeout: float = 600.0
    """seconds that a rank waits for the others before it reports a hang and exits; longer than a
    step takes"""
    deterministic: bool = False
    """bit-identical runs on CUDA, too, and float32 without TF32; slower"""
    keep_freed_memory: bool = True
    """CPU: glibc keeps freed buffers for the next step instead of unmapping them"""

    def __post_init__(self) -> None:
        require_within(self, 0, LARGEST_SEED, "seed")
        require_within(self, 1, 10**6, "collective_timeout")
        require(
            self.device in ("auto", "cpu", "cuda"),
            f"device={self.device} is unknown; expected auto, cpu or cuda "
            "(for one GPU of several: CUDA_VISIBLE_DEVICES=2)",
        )


@dataclass(frozen=True)
class RunConfig:
    """The complete configuration of a training run."""

    preset: PresetName = "gpt2-124m"
    """a complete configuration; other flags override it"""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvalConfig = EvalConfig()
    watch: WatchConfig = WatchConfig()
    machine: MachineConfig = MachineConfig()
    experiment: ExperimentConfig = ExperimentConfig()

    def __post_init__(self) -> None:
        total, block = self.data.total_batch_size, self.model.block_size
        require(
            total % block == 0,
            f"total_batch_size={total} is not a multiple of block_size={block}; "
            f"nearest: {nearest_multiples(total, block)}",
        )
        batch_ramp.ramp_of(self.data.batch_ramp, total, block)

    @property
    def rows_per_step(self) -> int:
        """Rows of block_size tokens in one optimiser step, over all ranks; fewer during a ramp."""
        return self.data.total_batch_size // self.model.block_size

    @cached_property
    def ramp(self) -> BatchRamp:
        """The rows of each step."""
        data = self.data
        return batch_ramp.ramp_of(data.batch_ramp, data.total_batch_size, self.model.block_size)

    def tokens_before(self, step: int) -> int:
        """Tokens of the sampler's steps 0 to `step - 1`."""
        return self.ramp.rows_before(step) * self.model.block_size

    @property
    def eval_rows(self) -> int:
        """Rows of one validation, if the split has that many."""
        return self.evaluation.eval_rows or self.evaluation.eval_batches * self.rows_per_step

    def grad_accum_steps(self, world_size: int, mini_batch_size: int) -> int:
        """Micro-batches per step on the rank with the largest share of the rows."""
        largest_share = -(-self.rows_per_step // world_size)
        return -(-largest_share // mini_batch_size)

    def sampler(
        self, rows_per_shard: Mapping[str, tuple[int, ...]], phases: Sequence[StepPhase] = ()
    ) -> Sampler:
        """Which of the rows of the training shards each step reads.

        `rows_per_shard` is by name of corpus. Without `phases` there is only one.
        """
        seed, of_all = self.machine.seed, tuple(itertools.chain(*rows_per_shard.values()))
        sampler = Sampler(
            of_all, self.rows_per_step, seed, self.data.shuffle, ramp_phases=self.ramp.phases
        )
        if not phases:
            return sampler
        return replace(
            sampler,
            mixture=mixture_of(phases, list(rows_per_shard), self.ramp, seed),
            shards_per_corpus=tuple(len(rows) for rows in rows_per_shard.values()),
        )

    def total_steps(self, rows_per_epoch: int) -> int:
        """Steps of the whole run: enough to read every row of the last epoch."""
        if self.data.max_steps is not None:
            return self.data.max_steps
        return self.ramp.steps_for(self.data.epochs * rows_per_epoch)

    def lr_schedule(self, total_steps: int) -> Schedule:
        """The learning-rate schedule of a run of `total_steps`."""
        optim = self.optim
        return Schedule(
            peak=optim.learning_rate,
            floor=optim.learning_rate * optim.min_lr_ratio,
            warmup_steps=optim.warmup_steps,
            decay_steps=optim.decay_steps or total_steps,
            shape=optim.schedule,
            cooldown=optim.cooldown,
        )

    def with_vocab_size(self, rows: int) -> "RunConfig":
        """This configuration; if it has no vocabulary size, with `rows`."""
        if self.model.vocab_size is not None:
            return self
        return replace(self, model=replace(self.model, vocab_size=rows))

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries of plain values, as in checkpoints and logs."""
        return {
            key: _plain(value)
            if not isinstance(value, dict)
            else {inner: _plain(item) for inner, item in value.items()}
            for key, value in asdict(self).items()
        }


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):  # a single text as earlier versions had it
        return value[0] if len(value) == 1 else list(value)
    return str(value) if isinstance(value, Path) else value
