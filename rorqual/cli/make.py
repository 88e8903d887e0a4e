"""Options of a command that makes or weighs models -> one call into its room out."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rorqual import config as configs
from rorqual import runtime
from rorqual.cli.parse import UsageError, emit, parse, split_first, take
from rorqual.costs import Costs, costs
from rorqual.layers.basics import RopeConfig, YarnConfig, longest_context
from rorqual.model import ModelConfig
from rorqual.presets import PRESETS, preset


def demo_command(argv: list[str]) -> int:
    as_json, argv = take("--json", argv)
    from rorqual.experiments import demo

    options = parse(demo.DemoConfig(), argv, "demo")
    result = demo.main(options, console=Console(stderr=as_json))
    if as_json:
        emit(result)
    return 0


TRAIN_ENDS = """examples:
  rorqual train tiny --data notes/ --steps 500     a preset, on the text of a folder, into runs/tiny
  rorqual train runs/tiny                          goes on where it was stopped; so does the first line, typed again
  rorqual train runs/tiny --steps 1000             goes on for longer

--data is short for --data.source: a corpus (wordnet), a file, a folder, or a Hugging Face dataset.

The options above are those of the parts that are on. A part that is off (engram, mtp, hyper, moe, gqa, nsa, moba, dsa)
is put in by naming one of its fields, or with `default`; `none` takes a part out:
  rorqual train tiny --model.mtp.depth 1 --model.hyper default
  rorqual train tiny --model.engram none"""


def train_command(argv: list[str]) -> int:
    as_json, argv = take("--json", argv)
    name, flags = split_first(argv, "a preset's name or a run folder", "rorqual train tiny --data notes/")
    from rorqual.train.trainer import TrainConfig, train

    kept = Path(name) / "train.json"
    if name in ("-h", "--help"):
        start, flags = TrainConfig(), ["--help"]
    elif kept.is_file():
        # where it was trained is not where it is, once it was moved
        start = configs.replace(configs.load(TrainConfig, kept), "folder", name)
    else:
        start = TrainConfig(model=named(name), folder=f"runs/{name}")
    options = parse(start, renamed(flags, {"--data": "--data.source"}), "train PRESET", TRAIN_ENDS)
    folder = train(options, on_metrics=progress(options.steps))
    if as_json:
        emit({"folder": folder})
    else:
        print(f'{folder}: rorqual generate {folder} "..." continues a text, rorqual eval {folder} scores it')
    return 0


def progress(steps: int, every: float = 5.0) -> Callable[[dict[str, Any]], None]:
    """Says where training is: the first step, the last, every validation, and a line every so many seconds."""
    clock, told = runtime.Clock(), [-every]

    def show(record: dict[str, Any]) -> None:
        if "validation_loss" in record:
            words = f"{record['validation_loss']:.4f} nats a token, {record['bits_per_byte']:.4f} bits a byte"
            runtime.log(f"step {record['step']:,}  validation {words}", style="bold")
        elif "loss" in record and (clock.seconds - told[0] >= every or record["step"] == steps):
            told[0] = clock.seconds
            speed, left = record.get("tokens_per_second", 0.0), record.get("seconds_left", 0.0)
            where = f"step {record['step']:,}/{steps:,}  loss {record['loss']:.4f}"
            runtime.log(f"{where}  {speed:,.0f} tokens/s  {left:.0f} s left")

    return show


@dataclass(frozen=True, kw_only=True, slots=True)
class Params:
    """Parameters, FLOPs a token and cache bytes a token of presets or run folders, side by side.

    rorqual params moe-27b engram-27b --context 32768
    rorqual params tiny --model.engram.layers 1
    rorqual params --base 500000
    """

    model: ModelConfig = field(default_factory=ModelConfig)  # flags change every model that is named
    context: int = 4096  # tokens that a token attends over, half of them on average
    base: float | None = None  # without a name: how many tokens a rotary base tells apart
    factor: float = 1.0  # with --base: how far YaRN stretches it


ROWS = (
    ("total", "parameters"),
    ("activated", "activated a token"),
    ("activated_with_embedding", "activated, with the embedding"),
    ("memory", "of them Engram rows"),
    ("mtp", "MTP modules, not counted above"),
    ("mtp_activated", "activated in them, with the head"),
    ("mtp_activated_with_embedding", "and with the embedding"),
    ("flops_per_token", "FLOPs a token, forward"),
    ("cache_bytes_per_token", "cache bytes a token, bfloat16"),
    ("longest_context", "tokens that the rotary base tells apart"),
)


def params_command(argv: list[str]) -> int:
    as_json, argv = take("--json", argv)
    names: list[str] = []
    while argv and not argv[0].startswith("-"):
        names.append(argv[0])
        argv = argv[1:]
    options = [parse(Params(model=named(name)), argv, "params NAME...") for name in names or ["tiny"]]
    if not names:
        return base_command(options[0], as_json)
    if options[0].base is not None:
        raise UsageError("--base: got names too, expected it alone, or --model.rope.base for the models")
    found = {name: costs(each.model, each.context) for name, each in zip(names, options, strict=True)}
    if as_json:
        emit(found)
        return 0
    show(found)
    return 0


def base_command(options: Params, as_json: bool) -> int:
    """How long a context a rotary base carries, of no model in particular."""
    if options.base is None:
        raise UsageError("got no name, expected presets or run folders first: rorqual params tiny small")
    rope = RopeConfig(base=options.base, yarn=YarnConfig(factor=options.factor))
    tokens = longest_context(rope.base, options.factor)
    if as_json:
        emit({"base": options.base, "factor": options.factor, "longest_context": tokens})
    else:
        print(f"a rotary base of {options.base:,g}, stretched {options.factor:g} times, tells {tokens:,} tokens apart")
    return 0


def show(found: dict[str, Costs]) -> None:
    """A row a figure, a column a model; as wide as that is, since a terminal's width would cut digits off."""
    table = Table("", *found, box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for attribute, words in ROWS:
        table.add_row(words, *(f"{getattr(cost, attribute):,}" for cost in found.values()))
    Console(width=Console(width=9999).measure(table).maximum).print(table)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One budget spent three ways: on experts, on experts and memory, and densely (the same FLOPs alone).

    rorqual plan tiny --rho 0.75
    """

    model: ModelConfig = field(default_factory=ModelConfig)  # the pure mixture of experts
    rho: float = 0.75  # share of the inactive experts that stay experts; the rest becomes memory
    context: int = 4096


def plan_command(argv: list[str]) -> int:
    as_json, argv = take("--json", argv)
    name, flags = split_first(argv, "a preset's name", "rorqual plan tiny --rho 0.75")
    if name in ("-h", "--help"):
        name, flags = "tiny", ["--help"]
    options = parse(Plan(model=named(name)), flags, "plan PRESET")
    from rorqual.experiments.plan import split_budget

    plan = split_budget(options.model, options.rho, context=options.context)
    arms = {arm.name: arm for arm in (plan.moe, plan.engram, plan.dense)}
    if as_json:
        emit({"rho": plan.rho} | {name: {"config": arm.config, "costs": arm.costs} for name, arm in arms.items()})
        return 0
    show({name: arm.costs for name, arm in arms.items()})
    config = plan.engram.config
    if config.moe is not None and config.engram is not None:
        rows = " ".join(map(str, config.engram.rows_per_head))
        print(f"rho reached: {plan.rho:.4f}. The memory arm: --model.moe.routed {config.moe.routed}", end=" ")
        print(f"--model.engram.rows-per-head {rows}")
    if plan.rho == 1:
        print("rho reached: 1. No expert is given up, so the memory arm is the mixture of experts itself.")
    return 0


def sweep_command(argv: list[str]) -> int:
    as_json, argv = take("--json", argv)
    name, flags = split_first(argv, "a kind of sweep", "rorqual sweep allocation --seeds 3")
    from rorqual.experiments import allocation

    if name in ("-h", "--help"):
        name, flags = allocation.KINDS[0], ["--help"]
    start = configs.replace(allocation.SweepConfig(), "kind", usual("kind of sweep", name, allocation.KINDS))
    options = parse(start, renamed(flags, {"--data": "--data.source"}), "sweep KIND")
    folder = allocation.main(options, console=Console(stderr=as_json))
    if as_json:
        emit({"folder": folder, "conclusion": (folder / "conclusion.txt").read_text(encoding="utf-8").strip()})
    return 0


def named(name: str) -> ModelConfig:
    """The config of a preset, or of a run folder."""
    kept = Path(name) / "config.json"
    if kept.is_file():
        return configs.load(ModelConfig, kept)
    return preset(usual("preset", name, PRESETS))


def usual(kind: str, name: str, names: Iterable[str]) -> str:
    """The name if it is one of those; otherwise the command line is wrong."""
    try:
        return configs.choose(kind, name, names)
    except ValueError as error:
        raise UsageError(str(error)) from None


def renamed(argv: list[str], names: dict[str, str]) -> list[str]:
    """Short names of flags written out."""
    words = (word.partition("=") for word in argv)
    return [names.get(flag, flag) + equals + value for flag, equals, value in words]
