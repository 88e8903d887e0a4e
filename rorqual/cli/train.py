"""Implements the commands that train, plan and compare models, and those about configs.

They are demo, train, config, launch, params, plan and sweep.
"""

import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rorqual import config as configs
from rorqual.cli.cluster import cluster_command, size
from rorqual.cli.parse import UsageError, changed, emit, parse, read, split_first, take
from rorqual.costs import Costs, costs
from rorqual.hints import choose
from rorqual.model_config import ModelConfig, RopeConfig, YarnConfig, longest_context
from rorqual.presets import PRESETS, preset

if TYPE_CHECKING:
    from rorqual.experiments.devices import Machine
    from rorqual.train.config import TrainConfig
    from rorqual.train.footprint import Footprint
    from rorqual.train.optim import Role

T = TypeVar("T")


def demo_command(argv: list[str]) -> int:
    """Trains the two models of the demo and compares them; returns the exit code."""
    as_json, argv = take("--json", argv)
    from rich.console import Console

    from rorqual.experiments import demo
    from rorqual.train.config import recipe

    changes = read(demo.DemoConfig(), argv, "demo")
    shape = dict(changes).get("preset", demo.DemoConfig().preset)
    start = demo.DemoConfig(preset=shape, optim=recipe(named(shape).dim))
    result = demo.main(changed(start, changes), console=Console(stderr=as_json))
    if as_json:
        emit(result)
    return 0


TRAIN_ENDS = """examples:
  rorqual train tiny --data notes/ --steps 500     a preset, on the text of a folder, into runs/tiny
  rorqual train tiny data=notes/ steps=500         the same
  rorqual train notes.yaml                         a file that \
`rorqual config tiny > notes.yaml` began, into runs/notes
  rorqual train runs/tiny                          goes on where it was stopped; \
so does the first line, typed again
  rorqual train runs/tiny --steps 1000             goes on for longer
  rorqual train tiny --dry-run                     prints shapes, memory and FLOPs, and stops

--data is short for --data.source: a corpus (wordnet), a file, a folder, or a Hugging Face dataset.

A part that is off (engram, mtp, hyper, moe, gqa, nsa, moba, dsa, csa, csa2, qsa, delta) is \
switched on by naming one of its fields, or with
`default`; `none` switches a part off. The result has to be valid, not each word on the way:
  rorqual train tiny model.mtp.depth=1 model.hyper=default
  rorqual train tiny model.engram=none

--needles puts made-up questions about pairs hidden in a text in the text's place (docs/needle.md):
  rorqual train tiny --needles default"""
DATA = {"data": "data.source"}  # what --data is short for


def train_command(argv: list[str]) -> int:
    """Trains a model, or counts what that would take; returns the exit code."""
    as_json, argv = take("--json", argv)
    dry, argv = take("--dry-run", argv)
    options = train_options(argv)
    from rorqual import runtime

    if dry:
        if runtime.ranks()[0] == 0:
            dry_run(options, runtime.ranks()[1], as_json)
        return 0
    from rorqual.train.run_folder import finished
    from rorqual.train.trainer import train

    if not finished(options):
        refuse_too_large(options)
    clock = runtime.Clock()
    folder = train(options, on_metrics=progress(options.steps))
    if runtime.ranks()[0] > 0:
        return 0
    if as_json:
        emit({"folder": folder} | scored(Path(folder)) | {"seconds": clock.seconds})
    else:
        print(
            f'{folder}: rorqual generate {folder} "..." continues a text, '
            f"rorqual eval {folder} scores it"
        )
    return 0


def dry_run(options: "TrainConfig", ranks: int, as_json: bool) -> None:
    """Prints what a run would hold, compute and send, and writes nothing."""
    from rorqual.train.footprint import footprint

    result = footprint(options, ranks)
    if as_json:
        emit(
            result._asdict()
            | {
                "costs": result.costs._asdict(),
                "roles": {role: each._asdict() for role, each in result.roles.items()},
                "memory": result.memory,
                "rows_elsewhere": result.rows_elsewhere,
            }
        )
        return
    print_footprint(result)


def print_footprint(result: "Footprint") -> None:
    """Prints shapes, counts, the memory of a rank by role, and the bytes over the wire."""
    from rich.console import Console
    from rich.table import Table

    def table(*names: str) -> Table:
        made = Table(*names, box=None)
        for column in made.columns[1:]:
            column.justify = "right"
        return made

    shapes = table("parameter", "shape", "tensors", "role")
    for name, shape, tensors, role in result.shapes:
        shapes.add_row(name, " x ".join(map(str, shape)), f"{tensors:,}", role)
    counts = table("", "")
    for words, value in (
        ("parameters", result.costs.total + result.costs.mtp),
        ("activated a token", result.costs.activated),
        ("FLOPs a token, forward", result.costs.flops_per_token),
        ("tokens a step", result.tokens_per_step),
        ("FLOPs a step, forward and backward", result.flops_per_step),
        ("ranks", result.ranks),
        ("micro-batches of a rank", result.micro_batches),
    ):
        counts.add_row(words, f"{value:,}")
    memory = table("memory of a rank", "weights", "gradients", "optimizer state")
    for role, words in ROLES.items():
        if role in result.roles:
            memory.add_row(words, *map(size, result.roles[role][1:]))
    sums = table("", "")
    if result.gathered:
        sums.add_row("a block while it runs, and its gradients", size(result.gathered))
    sums.add_row("activations of a micro-batch, an estimate", size(result.activations))
    sums.add_row("a rank, all together", size(result.memory))
    if result.rows_elsewhere:
        where = "in the host's memory" if result.placement == "host" else "on the disk"
        sums.add_row(f"besides, rows {where}", size(result.rows_elsewhere))
    wire = table("bytes a rank sends a step", "")
    for words, value in result.wire.items():
        wire.add_row(words, size(value))
    wire.add_row("all together", size(sum(result.wire.values())))
    for each in (shapes, counts, memory, sums, wire):
        Console(width=Console(width=9999).measure(each).maximum).print(each)
        print()
    print("Nothing was written, and no text was read.")


def train_options(argv: list[str]) -> "TrainConfig":
    """Builds the TrainConfig from the words after `rorqual train`."""
    example = "rorqual train tiny --data notes/"
    name, words = split_first(argv, "a preset's name, a YAML file or a run folder", example)
    from rorqual.train.config import TrainConfig

    command = "train PRESET|FILE.yaml|RUN"
    if name in ("-h", "--help"):
        read(TrainConfig(), ["--help"], command, TRAIN_ENDS, DATA)
    saved = Path(name) / "train.json"
    if saved.is_file():
        # The saved folder is out of date once a run was moved.
        start = configs.replace(configs.load(TrainConfig, saved), "folder", name)
    elif configs.is_yaml(name):
        start = TrainConfig(folder=f"runs/{Path(name).stem}")
    else:
        start = TrainConfig(model=named(name), folder=f"runs/{name}")
    changes = read(start, words, command, TRAIN_ENDS, DATA)

    def asked(before: TrainConfig) -> TrainConfig:
        return changed(
            configs.load(TrainConfig, name, before) if configs.is_yaml(name) else before, changes
        )

    before = start if saved.is_file() else begun(asked(start).folder)
    if before is not None:
        # A run that is resumed keeps its optimizer, which may be older than today's recipe.
        return asked(replace(start, optim=before.optim))
    return with_recipe(start, asked)


def begun(folder: str) -> "TrainConfig | None":
    """Returns the config of the run in this folder, if it can be resumed."""
    if not (Path(folder) / "train.json").is_file():
        return None
    from rorqual.train.run_folder import begun

    return begun(folder)


def config_command(argv: list[str]) -> int:
    """Prints what `rorqual train` would train, as YAML that it also reads."""
    if not argv or argv[0] in ("-h", "--help"):
        print(CONFIG_HELP)
        return 0
    text = configs.to_yaml(train_options(argv))
    print(
        "# rorqual train FILE.yaml trains what this file says; "
        f"rorqual train --help has examples\n\n{text}",
        end="",
    )
    return 0


CONFIG_HELP = """usage: rorqual config PRESET|FILE.yaml|RUN [--OPTION VALUE | OPTION=VALUE ...]

Prints the whole configuration of a training, every field with its comment, \
as YAML that rorqual train takes.
The names are those of rorqual train --help; what they change is printed changed.

  rorqual config tiny > notes.yaml
  rorqual config tiny model.engram=default data=notes/ > notes.yaml"""


LAUNCH_HELP = """usage: rorqual launch [FLAGS OF TORCHRUN] PRESET|FILE.yaml|RUN \
[OPTIONS OF rorqual train]

Trains in several processes by torchrun. When one of them dies, all are started again \
and go on from the newest
checkpoint, --max-restarts times (3). Batches are those of one process: \
--batch-size is of all processes together.

  rorqual launch --nproc-per-node 2 tiny --data notes/ --save-every 50
  rorqual launch --nproc-per-node gpu --max-restarts 10 small --data notes/
  rorqual launch --nproc-per-node 4 tiny --data notes/ --distributed.expert 4
  rorqual launch --nnodes 8 --nproc-per-node 8 engram-27b --batch-size 64 --dry-run     starts none

What goes wrong in the training itself, such as a loss that stays NaN, is tried as often, \
since torchrun
cannot tell it from a process that died. Ctrl-C stops and saves, as in one process.
torchrun --help lists its flags, rorqual train --help those of training."""


def launch_command(argv: list[str]) -> int:
    """Trains in several processes; a user's mistake is reported before any of them starts."""
    if not argv or argv[0] in ("-h", "--help"):
        print(LAUNCH_HELP)
        return 0
    from rorqual import distributed

    try:
        flags, words = distributed.torchrun_flags(argv)
    except ValueError as error:
        raise UsageError(f"{error}: rorqual launch --nproc-per-node 2 tiny --data notes/") from None
    from rorqual.train.trainer import refuse

    # What is launched is a training, whether that is said or not.
    words = words[1:] if words[0] == "train" else words
    as_json, options = take("--json", words)
    dry, options = take("--dry-run", options)
    config = train_options(options)
    ranks = distributed.torchrun_ranks(flags)
    if dry:
        if ranks is None:
            raise UsageError(
                "--dry-run: got a number of processes that is open, "
                "expected numbers: --nnodes 8 --nproc-per-node 8"
            )
        dry_run(config, ranks, as_json)
        return 0
    refuse(config, ranks)
    distributed.torchrun(["--max-restarts", "3", *flags], ["rorqual", "train", *words])
    return 0


def scored(folder: Path) -> dict[str, Any]:
    """Returns the steps of a run, its last loss, and the results of its last validation.

    These are nats a token and bits a byte, or accuracy; a missing value is None.
    """
    from rorqual.experiments.runs import last

    answers = last(folder, "accuracy")
    made = last(folder)
    results = {"steps": made.get("step"), "loss": made.get("loss")}
    if answers:
        return results | {"accuracy": answers["accuracy"]}
    validated = last(folder, "validation_loss")
    return results | {name: validated.get(name) for name in ("validation_loss", "bits_per_byte")}


def refuse_too_large(options: "TrainConfig") -> None:
    """Refuses a model that this machine cannot train, before any text is read.

    ValueError where the memory cannot hold the least that training keeps, or the disk its
    checkpoints. The least is the weight, the gradient and one value of the optimizer for each
    parameter, and the weight for each row. A run that passes may still be too large: activations
    are not counted.
    """
    import torch

    from rorqual import doctor, runtime

    counted = costs(options.model)
    device = runtime.device(options.device)
    rows = 4 * counted.memory
    dense = 12 * (counted.total + counted.mtp - counted.memory)
    ranks = runtime.ranks()[1]
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory * ranks
        needed = dense + (rows if options.placement == "device" else 0)
    else:
        available = doctor.memory() * ranks
        needed = dense + (rows if options.placement != "disk" else 0)
    large = f"a model of {counted.total + counted.mtp:,} parameters"
    smaller = "try a smaller one (rorqual params tiny small)"
    if available and needed > available:
        where = f"{size(available)} of memory ({device.type})"
        raise ValueError(
            f"{large}: got {where}, expected at least {size(needed)} to train it; {smaller}"
        )
    folder = Path(options.folder)
    if (folder / "checkpoints").is_dir():
        return
    directory = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(directory).free
    written = dense + 3 * rows
    if written > free:
        got = f"{size(free)} free for {folder}"
        raise ValueError(
            f"{large}: got {got}, expected at least {size(written)} for its checkpoints; {smaller}"
        )


def progress(steps: int, every: float = 5.0) -> Callable[[dict[str, Any]], None]:
    """Returns a callback that prints the progress of training.

    It prints the first step, the last, every validation, and a line every `every` seconds.
    """
    from rorqual import runtime

    clock = runtime.Clock()
    last_shown = [-every]

    def show(record: dict[str, Any]) -> None:
        if "validation_loss" in record:
            words = (
                f"{record['validation_loss']:.4f} nats a token, "
                f"{record['bits_per_byte']:.4f} bits a byte"
            )
            runtime.log(f"step {record['step']:,}  validation {words}", style="bold")
            if "sample" in record:
                text = " ".join(f"{record['prompt']} -> {record['sample']}".split())
                runtime.log(f"step {record['step']:,}  sample: {text}")
        elif "accuracy" in record:
            runtime.log(
                f"step {record['step']:,}  validation {record['accuracy']:.3f} of the answers",
                style="bold",
            )
        elif "loss" in record and (
            clock.seconds - last_shown[0] >= every or record["step"] == steps
        ):
            last_shown[0] = clock.seconds
            speed = record.get("tokens_per_second", 0.0)
            left = record.get("seconds_left", 0.0)
            where = f"step {record['step']:,}/{steps:,}  loss {record['loss']:.4f}"
            runtime.log(f"{where}  {speed:,.0f} tokens/s  {left:.0f} s left")

    return show


@dataclass(frozen=True, kw_only=True, slots=True)
class Params:
    """Prints parameters, FLOPs a token and cache bytes a token of models side by side.

    A model is a preset, a run folder, a published folder, or a config.json.

    rorqual params moe-27b engram-27b --context 32768
    rorqual params tiny --model.engram.layers 1
    rorqual params --base 500000
    """

    # the model; flags change every model that is named
    model: ModelConfig = field(default_factory=ModelConfig)
    context: int = 4096  # tokens that a token attends over, half of them on average
    base: float | None = None  # without a name: a rotary base, whose longest context is printed
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
    ("cache_bytes", "cache bytes of a sequence of --context tokens"),
    ("cache_bytes_1m", "cache bytes of a sequence of 1,000,000 tokens"),
    ("table_rows", "rows of Engram's table"),
    ("table_bytes", "bytes of Engram's tables, bfloat16"),
    ("table_bytes_fp8", "bytes of Engram's tables, fp8"),
    ("longest_context", "tokens that the rotary base tells apart"),
)
# What published folders have beside the model of a preset.
NOT_COUNTED = {
    "deepseek-v4.1-flash": "DSpark's draft layers (mtp.*) and the vision tower",
    "qwen3.8-flash-next": "MTP's layers and the vision tower",
}


def params_command(argv: list[str]) -> int:
    """Counts the parameters and FLOPs of models; returns the exit code."""
    as_json, argv = take("--json", argv)
    names: list[str] = []
    while argv and not is_option(argv[0]):
        names.append(argv[0])
        argv = argv[1:]
    options = [
        parse(Params(model=named(name)), argv, "params NAME...") for name in names or ["tiny"]
    ]
    if not names:
        return base_command(options[0], as_json)
    if options[0].base is not None:
        raise UsageError(
            "--base: got names too, expected it alone, or --model.rope.base for the models"
        )
    item = {
        name: costs(each.model, each.context) for name, each in zip(names, options, strict=True)
    }
    if as_json:
        emit(item)
        return 0
    show(item)
    return 0


def base_command(options: Params, as_json: bool) -> int:
    """Prints the longest context of a rotary base, without any model."""
    if options.base is None:
        raise UsageError(
            "got no name, expected presets or run folders first: rorqual params tiny small"
        )
    rope = RopeConfig(base=options.base, yarn=YarnConfig(factor=options.factor))
    tokens = longest_context(rope.base, options.factor)
    if as_json:
        emit({"base": options.base, "factor": options.factor, "longest_context": tokens})
    else:
        print(
            f"a rotary base of {options.base:,g}, stretched {options.factor:g} times, "
            f"tells {tokens:,} tokens apart"
        )
    return 0


def show(result: dict[str, Costs]) -> None:
    """Prints a table with a line a figure and a column a model.

    It is as wide as needed, since a terminal's width would cut digits off.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table("", *result, box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for attribute, words in ROWS:
        figures = [getattr(cost, attribute) for cost in result.values()]
        if attribute != "table_rows":
            table.add_row(words, *(f"{figure:,}" for figure in figures))
            continue
        for number in range(max(map(len, figures))):
            rows = [each[number] if number < len(each) else 0 for each in figures]
            table.add_row(f"{words} {number + 1}", *(f"{figure:,}" for figure in rows))
    Console(width=Console(width=9999).measure(table).maximum).print(table)
    for name, parts in NOT_COUNTED.items():
        if name in result:
            print(f"not counted of {name}, as published: {parts}")


ROLES: "dict[Role, str]" = {
    "rows": "rows",
    "matrix": "matrices",
    "decayed": "embedding and head",
    "plain": "rest",
}
PLAN_ENDS = """The last lines of the answer are the commands that train what was planned.
With a model's name first it plans that model on many devices: rorqual plan MODEL --help."""
MACHINE = ("device", "devices", "utilisation", "step_tokens", "optimizer", "placement")


def plan_command(argv: list[str]) -> int:
    """Plans a split of a budget, or a run on many devices; returns the exit code."""
    as_json, argv = take("--json", argv)
    if argv and not is_option(argv[0]):
        return cluster_command(argv[0], named(argv[0]), argv[1:], as_json)
    from rorqual.experiments.budget import Budget
    from rorqual.experiments.devices import estimate
    from rorqual.experiments.plan import PlanConfig, plan_budget

    changes = read(
        PlanConfig(), argv, "plan", PLAN_ENDS, {name: f"machine.{name}" for name in MACHINE}
    )
    typed = dict(changes)
    like = typed.get("like", PlanConfig().like)
    start = PlanConfig(like=like, model=named(like))
    options = changed(replace(start, machine=machine_for(start.model, typed)), changes)
    budget = Budget(options.total, options.activated, options.flops)
    try:
        plan = plan_budget(options.model, budget, options.rho, context=options.context)
    except ValueError as error:
        raise ValueError(as_typed(str(error), like, typed)) from error
    arms = {arm.name: arm for arm in (plan.moe, plan.engram, plan.dense)}
    estimates = {
        name: estimate(arm.config, options.machine, options.context) for name, arm in arms.items()
    }
    words = {
        name: [
            *configs.differing(start.model, arm.config, "model"),
            f"folder=runs/{Path(like).name}-{name}",
        ]
        for name, arm in arms.items()
    }
    if as_json:
        moe = plan.engram.config.moe
        each = {
            name: {
                "config": arm.config,
                "costs": arm.costs,
                "estimate": estimates[name],
                "flags": words[name],
            }
            for name, arm in arms.items()
        }
        head = {
            "rho": plan.rho,
            "routed_experts": moe and moe.routed,
            "memory": plan.engram.costs.memory,
        }
        emit(head | {"machine": options.machine} | each)
        return 0
    show({name: arm.costs for name, arm in arms.items()})
    show_estimates(options.machine, estimates)
    print(f"rho reached: {plan.rho:.4f}")
    if plan.rho == 1:
        print("No expert is given up, so the memory arm is the mixture of experts itself.")
    for name, flags in words.items():
        print(f"{name:7} rorqual train {shlex.join([like, *flags])}")
    return 0


def machine_for(model: ModelConfig, typed: dict[str, Any]) -> "Machine":
    """Returns the machine that a plan starts from.

    It is this machine for a small model or if --device names it, unless another is named.
    """
    from rorqual.experiments.devices import Machine, usual_machine

    device = typed.get("machine.device")
    if device == "cpu":
        return usual_machine(0)
    if device is not None or "machine.devices" in typed:
        return Machine()
    try:
        return usual_machine(float(typed.get("total", costs(model).total)))
    except ValueError:
        # A value that is no number is refused when the flags are parsed.
        return Machine()


def as_typed(error: str, like: str, typed: dict[str, Any]) -> str:
    """Rewrites a refusal of the planner, which begins with its field, with the flags as typed."""
    field, _, rest = error.partition(": ")
    name = {"base": "like", "flops_per_token": "flops"}.get(field, field)
    names = ("total", "activated", "flops") if field == "budget" else (name,)
    words = [
        f"--{name} {({'like': like} | typed)[name]}"
        for name in names
        if name in typed or name == "like"
    ]
    return f"{' '.join(words)}: {rest}" if words else error


def show_estimates(machine: Any, result: Mapping[str, Any]) -> None:
    """Prints what each arm keeps, by role, and how long a step of it takes."""
    from rich.console import Console
    from rich.table import Table

    table = Table("an estimate, activations not counted", *result, box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for role, words in ROLES.items():
        by_role = [one.roles.get(role) for one in result.values()]
        if any(by_role):
            table.add_row(
                f"{words}: weights + gradients + state",
                *(" + ".join(map(size, k[1:])) if k else "" for k in by_role),
            )
    sizes = [size(one.device_bytes) + ("" if one.fits else ", too many") for one in result.values()]
    here = machine.device == "cpu"
    table.add_row(
        "on this machine" if here else f"on each of {machine.devices} {machine.device}", *sizes
    )
    if machine.placement == "host":
        table.add_row(
            "in the memory of the hosts", *(size(one.host_bytes) for one in result.values())
        )
    table.add_row(
        f"a step of {machine.step_tokens:,} tokens",
        *(f"{one.step:,.3g} s" for one in result.values()),
    )
    peak = "of what is measured" if here else "of the peak"
    parts = (
        (f"products, at {machine.utilisation:.0%} {peak}", "compute"),
        ("update", "update"),
        ("rows", "rows"),
    )
    for words, name in parts:
        table.add_row(f"  {words}", *(f"{getattr(one, name):,.3g} s" for one in result.values()))
    Console(width=Console(width=9999).measure(table).maximum).print(table)


SWEEP_ENDS = "The sweep of needles has options of its own: rorqual sweep needle --help"


def sweep_command(argv: list[str]) -> int:
    """Trains the runs of a comparison; returns the exit code."""
    as_json, argv = take("--json", argv)
    name, flags = split_first(argv, "a kind of sweep", "rorqual sweep allocation --seeds 3")
    from rich.console import Console

    from rorqual.experiments import allocation, needle

    if name in ("-h", "--help"):
        name = allocation.KINDS[0]
        flags = ["--help"]
    kind = usual("kind of sweep", name, (*allocation.KINDS, "needle"))
    console = Console(stderr=as_json)
    if kind == "needle":
        folder = needle.main(parse(needle.NeedleSweep(), flags, "sweep needle"), console=console)
    else:
        changes = read(allocation.SweepConfig(), flags, "sweep KIND", SWEEP_ENDS, DATA)
        shape = dict(changes).get("preset", allocation.SweepConfig().preset)
        start = configs.replace(
            allocation.SweepConfig(preset=shape, model=named(shape)), "kind", kind
        )
        options = with_recipe(start, lambda config: changed(config, changes))
        folder = allocation.main(options, console=console)
    if as_json:
        emit(
            {
                "folder": folder,
                "conclusion": (folder / "conclusion.txt").read_text(encoding="utf-8").strip(),
            }
        )
    else:
        print(f"{folder}: the runs, results and conclusion.txt")
    return 0


def named(name: str) -> ModelConfig:
    """Returns the config of a preset, of a run folder or a published one, or of a config.json."""
    is_config = name.endswith(".json") and Path(name).is_file()
    if is_config or (Path(name) / "config.json").is_file():
        from rorqual.serve.generate import read_config

        return read_config(Path(name))
    if name not in PRESETS and ("/" in name or os.sep in name or Path(name).exists()):
        from rorqual.serve.generate import missing

        raise missing(name)
    return preset(usual("preset", name, PRESETS))


def with_recipe(start: T, asked: Callable[[T], T]) -> T:
    """Returns a config whose `optim` starts as the recipe for what is trained.

    `asked` applies the user's changes to a config with `model` and `optim`. The model's width, and
    whether needles are trained, are known only after it was applied once.
    """
    from rorqual.train.config import OptimConfig, recipe

    def parsed(optim: OptimConfig) -> Any:
        return asked(replace(start, optim=optim))  # type: ignore[type-var]

    read = parsed(OptimConfig())
    usual = recipe(read.model.dim, needles=getattr(read, "needles", None) is not None)
    options = parsed(usual)
    # The recipe's learning rate is right for its own kind of optimizer only.
    return options if options.optim.kind == usual.kind else read


def usual(kind: str, name: str, names: Iterable[str]) -> str:
    """Returns the name if it is one of `names`; otherwise raises UsageError."""
    try:
        return choose(kind, name, names)
    except ValueError as error:
        raise UsageError(str(error)) from None


def is_option(word: str) -> bool:
    """Returns whether a word is --name or name=value, and not the name of a model."""
    return word.startswith("-") or "=" in word
