"""The configuration of a training run: the model, its optimizer, the data and the number of steps.

It imports no torch, so that the command line can list every option at once.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

from rorqual.data.mixture import read_mixture
from rorqual.data.needle_config import NeedleConfig
from rorqual.distributed_config import DistributedConfig
from rorqual.model_config import ModelConfig

BYTE_VOCAB_SIZE = 257  # the smallest vocabulary that can express any text: the bytes and the end
NEEDLE_RATE = 6e-3  # Muon's, for needles; at 1e-2 attention stays at chance for hundreds of steps
SPIKE_WINDOW = 128  # steps whose losses and gradient norms say what a spike is
WIDEST = 512  # the largest model width for which `recipe` has a rate


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The text that a model is trained on, and its tokenizer."""

    # a corpus name, a file or folder of texts or of token ids, or a Hugging Face dataset
    source: str = "wordnet"
    # several sources and their shares, in place of one: wordnet:0.7,notes/:0.3
    mixture: tuple[str, ...] = ()
    # of a jsonl, parquet or dataset source; messages: chats, with a loss on their answers alone
    column: str = "text"
    limit: int | None = None  # documents at most, besides those of files called val
    vocab_size: int | None = None  # of the tokenizer that is trained on the text; None: the model's
    tokenizer: str | None = None  # a folder, a tokenizer.json or a hub id to use instead
    # of files of ids without a header; auto: the smallest for the tokenizer's vocabulary
    token_dtype: Literal["auto", "uint16", "uint32"] = "auto"
    streaming: bool = False  # hf: datasets are tokenised while the model trains, not before
    processes: int = 1  # that tokenise; 1: this one, with the tokenizer's threads
    cache: str = "runs/cache"  # tokenizers and token files, for later runs

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 2:
            raise ValueError(
                f"limit: got {self.limit}, "
                "expected at least 2 documents, one of them to validate on"
            )
        if self.vocab_size is not None and self.vocab_size < BYTE_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size: got {self.vocab_size}, expected at least {BYTE_VOCAB_SIZE}: the "
                "bytes and the end; try --data.vocab-size 4096"
            )
        if self.processes < 1:
            raise ValueError(f"processes: got {self.processes}, expected at least 1")
        if self.mixture and self.source != "wordnet":
            raise ValueError(
                f"mixture: got {','.join(self.mixture)!r} and the source {self.source!r}, expected "
                "one of them"
            )
        shares = self.shares
        if self.streaming and not any(map(self.is_streamed, shares)):
            raise ValueError(
                f"streaming: got {', '.join(shares)}, expected a Hugging Face dataset: "
                "--data hf:NAME"
            )

        if self.limit is not None and self.streaming:
            raise ValueError(
                f"limit: got {self.limit} documents with streaming, expected none: a stream is "
                "read as far as the steps go"
            )

    @property
    def shares(self) -> dict[str, Fraction]:
        """The sources and the share of sequences of each; they sum to 1."""
        return read_mixture(self.mixture) if self.mixture else {self.source: Fraction(1)}

    def is_streamed(self, source: str) -> bool:
        """Returns whether this source is tokenised while the model trains."""
        return self.streaming and source.startswith("hf:")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Options of the optimizer. `optim.schedule` scales all rates from step to step."""

    kind: Literal["adamw", "muon"] = "adamw"  # what updates the matrices of the blocks
    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices and embeddings
    momentum: float = 0.95  # Muon's
    clip: float = 1.0  # of the norm of all gradients together
    row_scale: float = 5.0  # the tables' rate over the others'
    warmup: int = 20  # steps
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"  # after the warm-up
    # share of the steps after the warm-up in which the rate falls to 0, the last ones; it is
    # constant before them. None: 0.2 of wsd, 1 of linear and cosine
    decay_share: float | None = None

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "clip", "row_scale"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: got {value}, expected more than 0")
        for name, values in (("betas", self.betas), ("momentum", (self.momentum,))):
            for value in values:
                if not 0 <= value < 1:
                    raise ValueError(f"{name}: got {value}, expected 0 <= value < 1")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay: got {self.weight_decay}, expected at least 0")
        if self.warmup < 0:
            raise ValueError(f"warmup: got {self.warmup}, expected at least 0 steps")
        if self.decay_share is not None and not 0 <= self.decay_share <= 1:
            raise ValueError(f"decay_share: got {self.decay_share}, expected 0..1")
        _expect_one_of("kind", self.kind, "adamw", "muon")
        _expect_one_of("schedule", self.schedule, "constant", "linear", "cosine", "wsd")


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskConfig:
    """Tasks of EleutherAI's evaluation harness that are run during training (lm-eval)."""

    tasks: tuple[str, ...] = (
        "arc_easy",
        "piqa",
    )  # names that `lm-eval ls tasks` lists, or YAML files
    every: int | None = None  # steps; None: when held-out text is scored
    limit: int | None = None  # questions of a task at most

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("tasks: got none, expected names: --lm-eval.tasks arc_easy piqa")
        for name in ("every", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """A training run. A batch is `batch_size` sequences of `seq_len` tokens over all ranks."""

    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    needles: NeedleConfig | None = None  # questions to train on; `data` is then not read
    init_from: str | None = None  # a run whose weights and tokenizer the training begins with
    folder: str = "runs/train"
    steps: int = 1000  # updates of the parameters
    batch_size: int = 16
    seq_len: int = 256
    micro_batch_size: int | None = None  # sequences a forward pass; None: all of this rank's
    seed: int = 0  # of the values at the start and of the order of the data
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products; parameters are float32
    placement: Literal["device", "host", "disk"] = "device"  # Engram's rows; disk: FOLDER/learning
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    threads: int | None = None  # None: as many as torch uses
    bias_rest: float = 0.05  # share of the last steps, in which router biases do not change
    mtp_late: float | None = None  # MTP's weight in the last third of the steps; None: as before
    indexer_alone: bool = False  # only DSA's indexers are trained during their warm-up
    log_every: int = 1  # steps between two collections of metrics, which contain every step
    validate_every: int | None = None  # steps; None: ten times a run; 0: at the end only
    validation_tokens: int | None = None  # at most; None: all at the end, 1 % of the run's before
    lm_eval: TaskConfig | None = None
    wandb: str | None = None  # a project of Weights & Biases, to which metrics are sent
    profile: int | None = None  # a step whose trace is written to FOLDER/profile
    save_every: int = 250  # steps between two checkpoints
    keep: int = 2  # checkpoints
    keep_every: int | None = None  # steps; checkpoints of their multiples are never removed
    # deviations from the mean of the last steps above which a loss or a gradient is a spike,
    # whose step is skipped; OLMo uses 6. None: none is
    skip_spikes: float | None = None
    skip_limit: int = 10  # steps in a row that are skipped, after which the run has diverged
    # rollback: to the last checkpoint, and on without the batches that came after it
    on_diverged: Literal["stop", "rollback"] = "stop"
    rollbacks: int = 3  # of a run at most

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "seq_len", "log_every", "save_every", "keep", "skip_limit")
        optional_counts = (
            "micro_batch_size",
            "threads",
            "validation_tokens",
            "keep_every",
            "profile",
        )
        for name in (*counts, *optional_counts):
            value = getattr(self, name)
            if value is None and name in optional_counts:
                continue
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        if self.validate_every is not None and self.validate_every < 0:
            raise ValueError(f"validate_every: got {self.validate_every}, expected at least 0")
        self._check_divergence()
        if self.keep_every is not None and self.keep_every % self.save_every:
            raise ValueError(
                f"keep_every: got {self.keep_every}, "
                f"expected a multiple of save_every, {self.save_every}"
            )
        if self.keep_every is not None and self.placement == "disk":
            raise ValueError(
                f"keep_every: got {self.keep_every} with rows on the disk, expected none: they can "
                "be rewound to the newest checkpoints alone"
            )
        if self.indexer_alone and self.model.indexer is None:
            raise ValueError(
                "indexer_alone: got a model without DSA or CSA, "
                "expected --model.dsa, whose indexers it is about"
            )
        if not 0 <= self.bias_rest <= 1:
            raise ValueError(f"bias_rest: got {self.bias_rest}, expected 0..1")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed: got {self.seed}, expected 0 <= seed < 2**32")

    def _check_divergence(self) -> None:
        """Raises ValueError for bad values of what is done about spikes and divergence."""
        if self.skip_spikes is not None and not 0 < self.skip_spikes < math.inf:
            raise ValueError(f"skip_spikes: got {self.skip_spikes}, expected more than 0")
        # So many steps pass until a level that stays belongs to the last SPIKE_WINDOW ones.
        streak = 0 if self.skip_spikes is None else SPIKE_WINDOW / (1 + self.skip_spikes**2)
        if streak >= self.skip_limit:
            raise ValueError(
                f"skip_spikes: got {self.skip_spikes} with skip_limit {self.skip_limit}, expected "
                f"a limit above {math.ceil(streak)}: so many steps in a row are skipped where the "
                "loss goes to another level and stays there"
            )
        if self.rollbacks < 0:
            raise ValueError(f"rollbacks: got {self.rollbacks}, expected at least 0")
        _expect_one_of("on_diverged", self.on_diverged, "stop", "rollback")


def _expect_one_of(name: str, value: Any, *choices: str) -> None:
    """Raises ValueError for a value that is none of the choices."""
    if value not in choices:
        raise ValueError(
            f"{name}: got {value!r}, expected {', '.join(choices[:-1])} or {choices[-1]}"
        )


def recipe(dim: int, *, needles: bool = False) -> OptimConfig:
    """Returns the default optimizer of `rorqual train`, the demo and the sweeps.

    `dim` is the model's width. Up to 64 it is Muon at 0.02, as measured (docs/log.md). An update's
    largest singular value grows with sqrt(width) here, and should not for one rate to serve every
    width (arXiv 2310.17813), so the rate falls with 1 / sqrt(width). Needles have NEEDLE_RATE
    (docs/needle.md). Beyond WIDEST, where models of papers are, it is OptimConfig's AdamW.
    """
    if dim > WIDEST:
        return OptimConfig()
    if needles:
        return OptimConfig(kind="muon", lr=NEEDLE_RATE)
    return OptimConfig(kind="muon", lr=0.02 * min(1.0, math.sqrt(64 / dim)))
