"""Teaches airports to a pretrained model: rows for their codes, against LoRA and LoRA with replay.

    python benchmarks/facts.py MODEL                    all arms, 100 airports, three seeds
    python benchmarks/facts.py MODEL --facts 500 --arms memory lora-replay --seeds 1
    python benchmarks/facts.py --print                  the tables of what has been run

MODEL is a folder, a .gguf file or a hub id of SmolLM2-135M-Instruct. The airports, sixteen trained
wordings and four held out are those of examples/retrofit.py. Each run writes its figures to a JSON
file when it ends; the same command leaves out what is there, and goes on with a memory whose first
hundreds of facts are learned. LoRA trains for as many processor
seconds as the memory of the same seed did, so the memory's runs come first.

    held out    greedy answers exactly right, each airport in one of the wordings never trained
    forgotten   loss on WordNet's definitions, nats a token, less that of the model as it was
    nearby      KL from the model as it was, nats a token, behind a code in texts that ask nothing
"""

import argparse
import itertools
import json
import random
import runpy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rorqual.cli.teach import Teach, opened
from rorqual.data import sources
from rorqual.data.tokenizer import Tokenizer
from rorqual.experiments.paired import compared, mean_and_error
from rorqual.hub.attach import attach_facts, find_blocks
from rorqual.hub.facts import FILE, read_facts, write_facts
from rorqual.io import write_json
from rorqual.train.config import OptimConfig
from rorqual.train.optim import Optimizer, schedule
from rorqual.train.teach import (
    Fact,
    Question,
    TeachConfig,
    answer_losses,
    answered,
    question,
    teach,
    usual_layers,
)

ROOT = Path(__file__).parents[1]
EXAMPLE = runpy.run_path(str(ROOT / "examples" / "retrofit.py"))
RESULTS = ROOT / "docs" / "results" / "facts"
NEARBY = (
    "Somebody painted {} on the wall, which was",
    "My cat is called {} and she likes",
    "The word {} has three letters and",
)
SEQ_LEN = 64  # of other text
MEASURED = 96  # sequences on which forgetting is measured; replay takes those after them
GOAL = {"held_out": 0.90, "forgotten": 0.10}
GOAL_FACTS = 500  # for which the goal is set


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What one arm does differently."""

    what: str
    kind: str = "memory"  # memory, lora, context
    changes: dict[str, Any] = field(default_factory=dict)  # of TeachConfig
    wordings: int = 16
    rate: float = 0.0  # of LoRA
    replay: str = ""  # "loss" on other text, or "kl" to the model as it was


ARMS = {
    "context": Arm(what="no training: the fact stands before the question", kind="context"),
    "memory": Arm(what="rows before blocks 4, 8, 12, 16, 20", changes={"quiet": 0.0}),
    "memory-1": Arm(what="rows before block 4 alone", changes={"quiet": 0.0, "layers": (4,)}),
    "memory-3": Arm(
        what="rows before blocks 2, 6, 10", changes={"quiet": 0.0, "layers": (2, 6, 10)}
    ),
    "memory-4w": Arm(what="as memory, four wordings trained", changes={"quiet": 0.0}, wordings=4),
    "memory-1w": Arm(what="as memory, one wording trained", changes={"quiet": 0.0}, wordings=1),
    "memory-quiet": Arm(
        what="as memory, with a KL term on texts that name a code and ask nothing",
        changes={"quiet": 0.5},
    ),
    "lora": Arm(what="LoRA, rank 16, all linear maps, 3e-3", kind="lora", rate=3e-3),
    "lora-1e-3": Arm(what="the same, 1e-3", kind="lora", rate=1e-3),
    "lora-replay": Arm(
        what="LoRA 3e-3, as many tokens of other text", kind="lora", rate=3e-3, replay="loss"
    ),
    "lora-replay-1e-3": Arm(what="the same, 1e-3", kind="lora", rate=1e-3, replay="loss"),
    "lora-kl": Arm(
        what="LoRA 3e-3, KL to the clean model on as many tokens of other text",
        kind="lora",
        rate=3e-3,
        replay="kl",
    ),
}
USUAL = ("memory", "lora", "lora-replay", "lora-kl")


def facts_of(count: int, wordings: int, seed: int) -> list[Fact]:
    """Returns airports as facts; of fewer than all wordings a seed draws which."""
    forms = EXAMPLE["TRAINED"]
    forms = forms if wordings == len(forms) else random.Random(seed).sample(forms, wordings)
    return [
        Fact(subject=code, answer=city, prompts=tuple(forms), held_out=EXAMPLE["HELD_OUT"])
        for code, city in EXAMPLE["airports"](count)
    ]


def other_texts(tokenizer: Tokenizer) -> Tensor:
    """Returns sequences of WordNet's definitions, in their order."""
    lines = sources.find("wordnet").read(lambda reason, position: None)
    text = "\n".join(line.decode() for _, line in itertools.islice(lines, 12_000))
    ids = tokenizer.encode(text)
    return torch.tensor(ids[: len(ids) // SEQ_LEN * SEQ_LEN]).view(-1, SEQ_LEN)


@torch.no_grad()
def text_losses(model: nn.Module, texts: Tensor) -> Tensor:
    """Returns the loss of each sequence, in nats a token."""
    losses = []
    for ids in texts.split(16):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        each = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        losses.append(each.mean(1))
    return torch.cat(losses)


@torch.no_grad()
def nearby_logits(model: nn.Module, tokenizer: Tokenizer, facts: Sequence[Fact]) -> list[Tensor]:
    """Returns log-probabilities behind the subjects, in texts that ask nothing."""
    result = []
    for index, fact in enumerate(facts[:48]):
        text = NEARBY[index % len(NEARBY)]
        ids = tokenizer.encode(text.replace("{}", fact.subject))
        after = len(ids) - len(tokenizer.encode(text.partition("{}")[2]))
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, after - 1 :]
        result.append(F.log_softmax(logits.float(), dim=-1))
    return result


def judge(
    model: nn.Module, tokenizer: Tokenizer, facts: Sequence[Fact], clean: dict[str, Any]
) -> dict[str, float]:
    """Returns the figures of a model, compared with those of the model as it was."""
    held_out = [(fact, fact.held_out[i % len(fact.held_out)]) for i, fact in enumerate(facts)]
    trained = [(fact, fact.prompts[i % len(fact.prompts)]) for i, fact in enumerate(facts)]
    right = answered(model, tokenizer, [*held_out, *trained])
    figures = {
        "held_out": sum(right[: len(facts)]) / len(facts),
        "trained": sum(right[len(facts) :]) / len(facts),
    }
    losses = text_losses(model, clean["texts"])
    nearby = nearby_logits(model, tokenizer, facts)
    divergences = [
        (before.exp() * (before - after)).sum(-1).mean()
        for before, after in zip(clean["nearby"], nearby, strict=True)
    ]
    return figures | {
        "forgotten": (losses - clean["losses"]).mean().item(),
        "texts_changed": (losses != clean["losses"]).sum().item(),
        "texts": len(losses),
        "nearby": torch.stack(divergences).mean().item(),
    }


def memory_run(
    model: nn.Module,
    tokenizer: Tokenizer,
    facts: list[Fact],
    arm: Arm,
    seed: int,
    clean: dict,
    work: Path,
) -> dict[str, Any]:
    """Teaches the facts, measures, and then changes one fact and takes that back.

    Each hundred facts are written to `work` when they are learned, which changes nothing about
    them, since rows are independent; an interrupted run goes on there.
    """
    config = TeachConfig(seed=seed, **arm.changes)
    progress_file = work / "progress.json"
    spent: dict[str, Any] = {"seconds": 0.0, "losses": []}
    if progress_file.is_file():
        spent = json.loads(progress_file.read_text(encoding="utf-8"))
    stored = read_facts(work) if spent["losses"] else None
    for start in range(100 * len(spent["losses"]), len(facts), 100):
        began = time.process_time()
        losses: list[float] = []

        def note(progress: Any, losses: list[float] = losses) -> None:
            losses.append(round(progress.loss, 4))
            print(f"  pass {progress.done}/{progress.passes} loss {progress.loss:.3f}", flush=True)

        group = facts[start : start + 100]
        stored = teach(model, tokenizer, group, config, before=stored, on_pass=note)
        write_facts(work, stored, undo=False)
        spent["seconds"] += time.process_time() - began
        spent["losses"].append(losses)
        write_json(progress_file, spent)
        memory = attach_facts(model, tokenizer, stored)
        asked = [(fact, fact.held_out[i % len(fact.held_out)]) for i, fact in enumerate(group)]
        right = answered(model, tokenizer, asked)
        memory.detach()
        print(f"  {start + len(group)} facts, held out {sum(right) / len(right):.3f}", flush=True)
    assert stored is not None
    memory = attach_facts(model, tokenizer, stored)
    figures: dict[str, Any] = judge(model, tokenizer, facts, clean)
    memory.detach()
    figures |= spent | {"passes": config.passes}
    figures |= {"parameters": stored.rows.numel(), "layers": stored.layers}
    figures["bytes"] = (work / FILE).stat().st_size
    return figures | edited(model, tokenizer, facts, stored, config)


def edited(
    model: nn.Module, tokenizer: Tokenizer, facts: list[Fact], stored: Any, config: TeachConfig
) -> dict[str, Any]:
    """Gives one airport another city; counts how many of the others, 100 at most, changed."""
    others = [(fact, fact.held_out[0]) for fact in facts[1:101]]
    one = Fact(
        subject=facts[0].subject,
        answer=facts[1].answer,
        prompts=facts[0].prompts,
        held_out=facts[0].held_out,
    )
    changed = teach(model, tokenizer, [one], config, before=stored, replace=True)
    memory = attach_facts(model, tokenizer, stored)
    before = answered(model, tokenizer, others)
    memory.detach()
    memory = attach_facts(model, tokenizer, changed)
    after = answered(model, tokenizer, others)
    learned = answered(model, tokenizer, [(one, prompt) for prompt in one.held_out])
    memory.detach()
    rows = zip(stored.rows[1:], changed.rows[1:], strict=True)
    return {
        "edit_learned": sum(learned) / len(learned),
        "others_changed": sum(a != b for a, b in zip(before, after, strict=True)),
        "others": len(others),
        "other_rows_changed": sum(not torch.equal(a, b) for a, b in rows),
    }


def lora_run(
    model: nn.Module,
    tokenizer: Tokenizer,
    facts: list[Fact],
    arm: Arm,
    seed: int,
    clean: dict,
    seconds: float,
) -> dict[str, Any]:
    """Trains LoRA for `seconds` of the processor, with other text if the arm replays it."""
    import peft

    torch.manual_seed(seed)
    settings = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    wrapped = peft.get_peft_model(model, settings)
    optimizer = Optimizer(
        wrapped, OptimConfig(lr=arm.rate, weight_decay=0.0, warmup=20, schedule="constant")
    )
    draw = random.Random(seed)
    replayed = clean["replayed"]
    began = time.process_time()
    step = 0
    losses: list[float] = []
    batches = lora_batches(facts, tokenizer, draw)
    while (spent := time.process_time() - began) < seconds:
        batch = next(batches)
        optimizer.begin_step()
        loss = answer_losses(wrapped, batch, tokenizer.end_id, share_prefix=False).mean()
        losses.append(loss.item())
        if arm.replay:
            count = sum(len(each.prompt) + len(each.answer) for each in batch) // SEQ_LEN
            index = draw.sample(range(len(replayed)), max(1, count))
            loss = loss + replay_loss(wrapped, replayed[index], arm.replay)
        loss.backward()
        optimizer.clip()
        factor = schedule(step, step + 1, optimizer.config) * min(1.0, 2 - 2 * spent / seconds)
        optimizer.step(factor)
        step += 1
        if step % 20 == 0:
            print(
                f"  step {step}, {spent:.0f} of {seconds:.0f} s, loss {losses[-1]:.3f}", flush=True
            )
    figures: dict[str, Any] = judge(wrapped, tokenizer, facts, clean)
    figures |= {"seconds": seconds, "steps": step, "losses": losses[:: max(1, step // 32)]}
    figures["parameters"] = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    wrapped.unload()
    return figures


def lora_batches(
    facts: list[Fact], tokenizer: Tokenizer, draw: random.Random
) -> Iterator[list[Question]]:
    """Yields batches of 32 without end; a pass has each fact once, in a wording drawn anew."""
    while True:
        questions = [question(0, fact, draw.choice(fact.prompts), tokenizer) for fact in facts]
        questions.sort(key=lambda each: len(each.prompt) + len(each.answer))
        groups = [questions[start : start + 32] for start in range(0, len(questions), 32)]
        yield from draw.sample(groups, len(groups))


def replay_loss(model: Any, ids: Tensor, kind: str) -> Tensor:
    """Returns the loss on other text, or the KL from the model without LoRA, in nats a token."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    if kind == "loss":
        return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:])
    with torch.no_grad(), model.disable_adapter():
        clean = F.log_softmax(model(input_ids=ids, use_cache=False).logits[:, :-1].float(), dim=-1)
    return (clean.exp() * (clean - F.log_softmax(logits, dim=-1))).sum(-1).mean()


def context_run(
    model: nn.Module, tokenizer: Tokenizer, facts: list[Fact], clean: dict
) -> dict[str, Any]:
    """Asks with the fact in front of the question, which shows what the model can read."""
    prompted = [
        Fact(
            subject=fact.subject,
            answer=fact.answer,
            prompts=tuple(f"{{}} is the airport code of {fact.answer}.\n{p}" for p in fact.prompts),
            held_out=tuple(
                f"{{}} is the airport code of {fact.answer}.\n{p}" for p in fact.held_out
            ),
        )
        for fact in facts
    ]
    asked = [(fact, fact.held_out[i % len(fact.held_out)]) for i, fact in enumerate(prompted)]
    right = answered(model, tokenizer, asked)
    return {"held_out": sum(right) / len(right), "forgotten": 0.0, "nearby": 0.0, "seconds": 0.0}


def path_of(folder: Path, arm: str, count: int, seed: int) -> Path:
    return folder / f"{arm}.{count}.{seed}.json"


def runs_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def table(runs: Sequence[dict[str, Any]], count: int) -> str:
    """Returns the Markdown table of the runs with so many facts: means over seeds."""
    lines = [
        "| arm | seeds | held out | forgotten | nearby | processor seconds | trained numbers |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, arm in ARMS.items():
        group = [run for run in runs if run["arm"] == name and run["facts"] == count]
        if group:
            cells = [_figure([run[key] for run in group]) for key in ("held_out", "forgotten")]
            cells.append(_figure([run["nearby"] for run in group], 2))
            cells.append(f"{sum(run['seconds'] for run in group) / len(group):,.0f}")
            cells.append(f"{group[0].get('parameters', 0):,}")
            lines.append(f"| {name}: {arm.what} | {len(group)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _figure(values: Sequence[float], digits: int = 3) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f}" + (f" +- {error:.{digits}f}" if len(values) > 1 else "")


def conclusion(runs: Sequence[dict[str, Any]], count: int) -> str:
    """Returns what the runs with so many facts say about the goal and the rivals."""
    by_arm: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        if run["facts"] == count:
            by_arm.setdefault(run["arm"], {})[run["seed"]] = run
    if "memory" not in by_arm:
        return f"{count} facts: not established, the memory has not been run."
    memory = list(by_arm["memory"].values())
    held_out = sum(run["held_out"] for run in memory) / len(memory)
    forgotten = sum(run["forgotten"] for run in memory) / len(memory)
    met = held_out >= GOAL["held_out"] and forgotten <= GOAL["forgotten"]
    goal = f"the goal of {GOAL['held_out']:.2f} at {GOAL['forgotten']:.2f}"
    if count == GOAL_FACTS:
        verdict = f"{goal} is {'met' if met else 'missed'}"
    else:
        reached = "reaches" if met else "does not reach"
        verdict = f"that {reached} the figures of {goal}, which is set for {GOAL_FACTS} facts"
    sentences = [
        f"{count} facts, {len(memory)} seed{'s' * (len(memory) > 1)}: the memory answers "
        f"{held_out:.3f} of the held-out wordings and forgets {forgotten:.3f} nats a token; "
        + verdict
    ]
    changed = sum(run["others_changed"] for run in memory)
    others = sum(run["others"] for run in memory)
    sentences.append(f"changing one fact changed {changed} of {others} others")
    for name, group in by_arm.items():
        if name.startswith("lora"):
            seeds = sorted(group.keys() & by_arm["memory"].keys())
            for key in ("held_out", "forgotten"):
                ours = [by_arm["memory"][seed][key] for seed in seeds]
                theirs = [group[seed][key] for seed in seeds]
                sentences.append(f"{key}, " + compared("memory", name, ours, theirs, 3))
    return "; ".join(sentences) + "."


# docs/log.md, "Retrofit: 500 facts, memory against LoRA": (what, held out, forgotten).
EARLIER = (
    ("hashed n-grams (Engram), 500", 0.538, 0.191),
    ("LoRA 3e-3, 500", 0.970, 4.063),
    ("LoRA 1e-3, 500", 0.436, 2.640),
)


def draw(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws what is answered over what is forgotten, a point an arm and number of facts."""
    from matplotlib.figure import Figure

    from rorqual.analyze.figures import COLOURS, style

    points = list(EARLIER)
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for each in runs:
        groups.setdefault((each["arm"], each["facts"]), []).append(each)
    for (arm, count), group in groups.items():
        held_out = sum(each["held_out"] for each in group) / len(group)
        forgotten = sum(each["forgotten"] for each in group) / len(group)
        points.append((f"{arm}, {count}", held_out, forgotten))
    with style():
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.subplots()
        axes.fill_between([-1.0, GOAL["forgotten"]], GOAL["held_out"], 1.02, alpha=0.15, lw=0)
        for index, (name, held_out, forgotten) in enumerate(points):
            colour = COLOURS[index % len(COLOURS)]
            axes.plot(forgotten, held_out, "o", color=colour)
            side = "right" if forgotten > 3 else "left"
            crowded = [
                y
                for _, y, x in points[:index]
                if abs(x - forgotten) < 0.3 and abs(y - held_out) < 0.05
            ]
            down = -3 if not crowded else 4 if held_out > min(crowded) else -12
            shift = (-6 if side == "right" else 6, down)
            text = {"textcoords": "offset points", "xytext": shift, "ha": side}
            axes.annotate(name, (forgotten, held_out), color=colour, **text)
        axes.set(xlabel="forgotten on other text, nats a token", ylabel="held-out answers exact")
        least = min(forgotten for _, _, forgotten in points)
        axes.set(xlim=(least - 0.1, 4.4), ylim=(0, 1.05))
        figure.savefig(path, metadata={"Date": None})


def report(folder: Path) -> str:
    runs = runs_of(folder)
    counts = sorted({run["facts"] for run in runs})
    return "\n\n".join(
        text for count in counts for text in (table(runs, count), conclusion(runs, count))
    )


def run(options: argparse.Namespace) -> None:
    """Runs what has not been run."""
    torch.manual_seed(0)
    model, fast = opened(Teach(model=options.model, out=""))
    tokenizer = Tokenizer.of(fast)
    print(f"{len(find_blocks(model)[1])} blocks, rows before {usual_layers(30)}", flush=True)
    texts = other_texts(tokenizer)
    clean: dict[str, Any] = {"texts": texts[:MEASURED], "replayed": texts[MEASURED:]}
    clean["losses"] = text_losses(model, clean["texts"])
    for seed in range(options.seeds):
        for name in options.arms:
            path = path_of(options.folder, name, options.facts, seed)
            arm = ARMS[name]
            if path.exists() or (arm.kind == "context" and seed):
                continue
            facts = facts_of(options.facts, arm.wordings, seed)
            clean["nearby"] = nearby_logits(model, tokenizer, facts)
            print(f"{name}, {options.facts} facts, seed {seed}", flush=True)
            if arm.kind == "context":
                figures = context_run(model, tokenizer, facts, clean)
            elif arm.kind == "memory":
                work = options.work / f"{name}.{options.facts}.{seed}"
                figures = memory_run(model, tokenizer, facts, arm, seed, clean, work)
            else:
                same = path_of(options.folder, "memory", options.facts, seed)
                if not same.exists():
                    raise SystemExit(f"got no {same}, expected the memory's run first: its seconds")
                seconds = json.loads(same.read_text(encoding="utf-8"))["seconds"]
                figures = lora_run(model, tokenizer, facts, arm, seed, clean, seconds)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"arm": name, "facts": options.facts, "seed": seed} | figures)
            print({key: figures[key] for key in ("held_out", "forgotten", "nearby")}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="a folder, a .gguf file or a hub id")
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=list(USUAL), choices=list(ARMS))
    parser.add_argument("--folder", type=Path, default=RESULTS, help="of the JSON files")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "facts", help="of memories")
    parser.add_argument("--figure", type=Path, help="where to draw all runs: .svg or .png")
    parser.add_argument("--print", action="store_true", help="run nothing")
    options = parser.parse_args()
    if options.model:
        run(options)
    elif not options.print:
        parser.error("got no model, expected one, or --print")
    print(report(options.folder))
    if options.figure:
        draw(runs_of(options.folder), options.figure)


if __name__ == "__main__":
    main()
