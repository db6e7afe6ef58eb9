"""What a run is: frozen dataclasses, presets, overlays and the numbers derived from them. Pure.

Each part holds the flags of one concern: their names, types, defaults and help stand here, those of
the model in `shape`, and nowhere else. `None` means off. Values that cannot work, alone or
together, raise ConfigError.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gpt2.base.validation import nearest_multiples, require, require_at_least
from gpt2.config.experiment_name import ExperimentConfig
from gpt2.config.lr_schedule import Schedule, Shape
from gpt2.config.model import ModelConfig
from gpt2.data.sampler import Shuffle

PresetName = Literal["gpt2-124m", "gpt2-350m", "gpt2-774m", "gpt2-1558m", "demo"]


@dataclass(frozen=True)
class DataConfig:
    """What to train on and in which portions."""

    data_root: str = "data/fineweb_edu"
    """folder or glob of token shards, or a URL such as s3://bucket/folder"""
    cache_dir: Path = Path("data/cache")
    """folder for local copies of shards that a URL names"""
    cache_gb: float | None = 50.0
    """disk space for those copies; the ones not used for longest make room"""
    total_batch_size: int = 524288
    """tokens per optimiser step, over all ranks"""
    mini_batch_size: int = 64
    """rows of block_size tokens that one rank takes through the model at once"""
    auto_mini_batch: bool = False
    """halve mini_batch_size at the start until it fits into the memory"""
    epochs: int = 5
    """passes over the training split"""
    max_steps: int | None = None
    """stop after this many steps, whatever the epochs say"""
    shuffle: Shuffle = "shards"
    """what each epoch permutes: its shards, also the rows within each shard, or nothing"""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "cache_gb")
        require(self.cache_gb != math.inf, "cache_gb=inf; None is no limit")
        require_at_least(self, 1, "total_batch_size", "mini_batch_size", "epochs", "max_steps")


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser, its learning rate and its schedule (Brown et al. 2020, appendix B)."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon trains the hidden matrices with Muon, and everything else with AdamW"""
    learning_rate: float = 6e-4
    """peak learning rate"""
    min_lr_ratio: float = 0.1
    """final learning rate as a share of the peak"""
    warmup_steps: int = 715
    """steps of linear warm-up"""
    schedule: Shape = "cosine"
    """how the learning rate falls: cosine, or wsd, constant until a linear cooldown"""
    decay_steps: int | None = None
    """step at which the decay ends; None is the end of the run"""
    cooldown: float = 0.2
    """wsd: share of the steps in which it falls, the last ones"""
    weight_decay: float = 0.1
    """decay of the matrices; biases and layer norms are never decayed"""
    beta1: float = 0.9
    """AdamW: decay of the first moment"""
    beta2: float = 0.95
    """AdamW: decay of the second moment"""
    grad_clip: float | None = 1.0
    """largest norm of the global gradient"""
    max_bad_steps: int = 5
    """updates in a row with a loss or gradient that is no number, until the run goes back"""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "warmup_steps", "weight_decay", "min_lr_ratio")
        require_at_least(self, 1, "decay_steps", "max_bad_steps")
        require(0 < self.cooldown <= 1, f"cooldown={self.cooldown} must be more than 0, at most 1")
        require(self.learning_rate > 0, f"learning_rate={self.learning_rate} must be more than 0")
        require(
            self.grad_clip is None or self.grad_clip > 0,
            f"grad_clip={self.grad_clip} must be more than 0, or None for no clipping",
        )
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"{name}={value} must be at least 0 and less than 1")


@dataclass(frozen=True)
class CheckpointConfig:
    """Where a run starts from and how it is kept."""

    resume: str | None = None
    """continue a run: latest, best, a step, or a path; `latest` in an empty folder starts fresh"""
    init_from: str = "scratch"
    """weights of a new run: scratch, a checkpoint's path, hf:FOLDER (Hugging Face's GPT-2) or
    nanogpt:FILE; `resume` is --resume latest"""
    checkpoint_dir: Path = Path("checkpoints")
    """folder of this run's checkpoints and status.json"""
    checkpoint_interval: int | None = 250
    """steps between checkpoints; the last step and a stopped run are always saved"""
    keep_last: int = 10
    """newest checkpoints to keep; the best one is kept beside them"""
    trust_checkpoint: bool = False
    """unpickle a checkpoint that this user did not write: it can run any code"""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "checkpoint_interval", "keep_last")
        require(
            self.resume is None or self.init_from in ("scratch", "resume"),
            f"--resume {self.resume} and --init_from {self.init_from} both say where the weights "
            "come from; give one of them",
        )

    @property
    def resume_from(self) -> str | None:
        """The checkpoint to continue, `--init_from resume` included."""
        return "latest" if self.init_from == "resume" and self.resume is None else self.resume


@dataclass(frozen=True)
class EvalConfig:
    """How a run is judged while it trains."""

    eval_interval: int | None = 250
    """steps between validations; also before the first step and after the last"""
    eval_batches: int = 20
    """validation rows, counted in batches of total_batch_size tokens"""
    eval_rows: int | None = None
    """validation rows themselves, of block_size tokens; None counts them by --eval_batches"""
    hellaswag_interval: int | None = 250
    """steps between HellaSwag evaluations; also after the last step"""
    hellaswag_limit: int | None = None
    """the first so many tasks only; None is all 10,042"""
    hellaswag_path: Path | None = None
    """file of tasks (.jsonl, .jsonl.gz); None loads them once and keeps them in data/hellaswag"""
    sample_interval: int | None = 250
    """steps between generated samples; also after the last step"""
    sample_prompt: str = "Hello, I'm a language model,"
    """what the samples continue"""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "eval_interval", "eval_batches", "eval_rows")
        require_at_least(self, 1, "sample_interval", "hellaswag_interval", "hellaswag_limit")


@dataclass(frozen=True)
class WatchConfig:
    """Where the run can be watched."""

    log_dir: Path = Path("logs")
    """folder of log.txt, to which every run is appended"""
    runs_dir: Path = Path("runs")
    """folder of TensorBoard's runs"""
    use_tensorboard: bool = False
    """write curves, samples and hyper-parameters for TensorBoard"""


@dataclass(frozen=True)
class MachineConfig:
    """What the run computes with."""

    device: str = "auto"
    """auto, cpu, cuda; auto takes the GPUs if there are any"""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """autocast type of the matrix products; auto is bfloat16 where the hardware has it"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto is on for CUDA"""
    seed: int = 1337
    """seed of the weights, the dropout and the order of the data"""
    collective_timeout: float = 600.0
    """seconds that a rank waits for the others before it says that one hangs, and ends"""
    deterministic: bool = False
    """bit-identical runs on CUDA too, at some cost in speed"""
    fast: bool = True
    """--no_fast: the output head by plain operations of torch, to compare with"""
    keep_freed_memory: bool = True
    """on CPU, glibc keeps freed buffers for the next step instead of unmapping them"""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "seed")
        require_at_least(self, 1, "collective_timeout")
        require(
            self.device in ("auto", "cpu", "cuda"),
            f"device={self.device} is unknown; choose auto, cpu or cuda "
            "(one GPU of several: CUDA_VISIBLE_DEVICES=2)",
        )


@dataclass(frozen=True)
class RunConfig:
    """One training run, complete."""

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

    @property
    def rows_per_step(self) -> int:
        """Rows of block_size tokens in one optimiser step, over all ranks."""
        return self.data.total_batch_size // self.model.block_size

    @property
    def eval_rows(self) -> int:
        """Rows of one validation, before the split's own size limits them."""
        return self.evaluation.eval_rows or self.evaluation.eval_batches * self.rows_per_step

    def grad_accum_steps(self, world_size: int, mini_batch_size: int) -> int:
        """Micro-batches per step of the rank with the largest share of the rows."""
        largest_share = -(-self.rows_per_step // world_size)
        return -(-largest_share // mini_batch_size)

    def total_steps(self, rows_per_epoch: int) -> int:
        """Steps of the whole run: enough to see every row of the last epoch."""
        if self.data.max_steps is not None:
            return self.data.max_steps
        return -(-self.data.epochs * rows_per_epoch // self.rows_per_step)

    def lr_schedule(self, total_steps: int) -> Schedule:
        """The learning-rate curve of a run of `total_steps`."""
        optim = self.optim
        return Schedule(
            peak=optim.learning_rate,
            floor=optim.learning_rate * optim.min_lr_ratio,
            warmup_steps=optim.warmup_steps,
            decay_steps=optim.decay_steps or total_steps,
            shape=optim.schedule,
            cooldown=optim.cooldown,
        )

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, as checkpoints and logs keep them."""
        return {
            key: _plain(value)
            if not isinstance(value, dict)
            else {inner: _plain(item) for inner, item in value.items()}
            for key, value in asdict(self).items()
        }


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
