"""The configuration of a model that is spread over several ranks.

It imports no torch, so that the command line can list every option at once.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from rorqual.model_config import ModelConfig

Recomputed = Literal["none", "block", "selective"]
Compiled = Literal["none", "block"]
Rows = Literal["shard", "replicate"]

# Parts of a model that context parallelism knows; all others see whole sequences alone.
CONTEXT_PARALLEL = ("mla", "gqa", "moe", "engram", "hyper", "mtp")


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributedConfig:
    """Settings of a model that is spread over ranks, as many as the product of the four sizes."""

    replicate: int = 1  # groups of ranks that each hold all parameters (HSDP)
    shard: int | None = None  # ranks that share parameters (FSDP); None: what the others leave
    context: int = 1  # ranks that share every sequence: each has a part of its tokens
    expert: int = 1  # ranks that share the experts, and send each other their tokens
    # Of Engram's tables: shard: each of all ranks owns some, and they exchange rows and gradients;
    # replicate: every rank has all.
    rows: Rows = "shard"
    # What backward computes again instead of storing it: block: all within a block; selective: all
    # but matrix products, attention and what other ranks sent.
    activation_checkpointing: Recomputed = "none"
    compile: Compiled = "none"  # block: every block by torch.compile

    def __post_init__(self) -> None:
        for name in ("replicate", "shard", "context", "expert"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"distributed.{name}: got {value}, expected at least 1")
        for name, choices in (
            ("activation_checkpointing", get_args(Recomputed)),
            ("compile", get_args(Compiled)),
            ("rows", get_args(Rows)),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(
                    f"distributed.{name}: got {value!r}, expected one of {', '.join(choices)}"
                )
        if self.compile != "none":
            for name, neutral, why in (
                ("expert", 1, "how many rows an expert gets is known only when they arrive"),
                ("context", 1, "keys of other ranks arrive within a block"),
                ("activation_checkpointing", "none", "it would see no single products"),
            ):
                value = getattr(self, name)
                if value not in (neutral, "block"):
                    raise ValueError(
                        f"distributed.{name}: got {value} with distributed.compile {self.compile}, "
                        f"expected {neutral}: {why}"
                    )

    def sizes(self, ranks: int) -> dict[str, int]:
        """Returns the size of each axis of a mesh of so many ranks, the last one side by side.

        ValueError where their product is not the number of ranks.
        """
        others = self.replicate * self.context * self.expert
        shard = ranks // others if self.shard is None else self.shard
        if shard * others != ranks:
            wanted = f"{self.replicate} x {self.shard or 'shard'} x {self.context} x {self.expert}"
            expected = (
                f"a multiple of {others}" if self.shard is None else f"{self.shard * others} ranks"
            )
            raise ValueError(
                f"distributed: got {ranks} ranks for replicate x shard x context x expert = "
                f"{wanted}, expected {expected}: rorqual launch --nproc-per-node N"
            )
        return {
            "replicate": self.replicate,
            "shard": shard,
            "context": self.context,
            "expert": self.expert,
        }

    def data_rank(self, rank: int, ranks: int) -> tuple[int, int]:
        """Returns which of how many parts of a batch a rank reads.

        The ranks that share a sequence read the same part.
        """
        group = self.context * self.expert
        return rank // group * self.expert + rank % self.expert, ranks // self.context


def refuse_layout(model: ModelConfig, config: DistributedConfig, ranks: int | None) -> None:
    """Raises ValueError where a model cannot be spread over so many ranks in this way.

    `ranks` is None where their number is not known yet.
    """
    if ranks is not None:
        config.sizes(ranks)
    if config.expert > 1:
        if model.moe is None:
            raise ValueError(
                f"distributed.expert: got {config.expert} for a model without experts, expected 1"
            )
        if model.moe.routed % config.expert:
            raise ValueError(
                f"distributed.expert: got {config.expert} ranks, "
                f"expected a divisor of {model.moe.routed} experts"
            )
    if config.context > 1:
        for name in model.parts:
            if name not in CONTEXT_PARALLEL:
                raise ValueError(
                    f"distributed.context: got {config.context} for a model with {name}, expected "
                    "1: only MLA and GQA attend to tokens of other ranks"
                )
        if model.rope.varies:
            raise ValueError(
                f"distributed.context: got {config.context} with rotary frequencies that vary "
                "with the length, expected 1"
            )
