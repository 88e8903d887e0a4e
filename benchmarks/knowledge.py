"""Asks what gates and memory know: the ends of entities, definitions, what a text itself says.

    rorqual demo --seeds 3 --minutes 60
    python benchmarks/knowledge.py runs/demo/engram runs/demo/engram-2 runs/demo/engram-3
    python benchmarks/knowledge.py --print                  the tables of what has been measured

Each MODEL is a run folder or a preset that comes with the package, a seed each; its figures go to a
JSON file in docs/results/knowledge when they are whole. Two questions of the Engram paper, on
WordNet:

Gates. In definitions that no model was trained on, is the gate (its mean over streams and blocks)
higher at the last token of an entity of several words, such as "great white shark", than at other
tokens? The entities are WordNet's own lemmas of two words or more, longest match first.

    all tokens     area under the curve: a token at an end of an entity against one that is none
    word ends      the same against the last tokens of other words alone
    equal counts   the same among word ends whose last two tokens occur equally often in the
                   training text (powers of two): what is left once frequency is accounted for
    shuffled       word ends with the labels permuted, the 95 % range of 200 permutations

Suppression. The output of Engram is zeroed when the model reads. Four definitions are offered, and
the one is picked whose probability behind the prompt grew most over that behind ":" alone.

    recall    "lemma:", of documents that were in the training text
    copy      a made-up word, its definition, and the word again
"""

import argparse
import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rorqual.analyze.measures import MemoryScores, gates, suppressed
from rorqual.analyze.states import run
from rorqual.data.tokenizer import Tokenizer
from rorqual.evaluate import texts
from rorqual.experiments.paired import established, mean_and_error
from rorqual.io import write_json
from rorqual.serve.generate import load

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "knowledge"
CHOICES = 4
LONGEST = 60  # characters of a definition that is offered
SHORTEST = 15
SHUFFLES = 200
TASKS = ("recall", "copy")
SENTENCES = (
    "the great white shark is the largest fish of the Pacific Ocean",
    "a city in New South Wales on the west coast of North America",
)


class Marked(NamedTuple):
    """A definition, and where its words and entities end, as character offsets."""

    text: str
    word_ends: set[int]
    entity_ends: set[int]


class Question(NamedTuple):
    """A prompt and definitions, the first of which is right."""

    prompt: str
    options: list[str]


def parts(document: str) -> tuple[list[str], str] | None:
    """Splits "lemma, lemma: definition; examples" into the lemmas and the definition."""
    head, colon, rest = document.partition(": ")
    definition = rest.split('; "')[0]
    return (head.split(", "), definition) if colon and definition else None


def lemmas() -> set[str]:
    """Returns WordNet's lemmas of two words or more."""
    split = (parts(document) for document in texts("wordnet", split="all"))
    return {lemma for pair in split if pair for lemma in pair[0] if " " in lemma}


def marked(text: str, entities: set[str], most_words: int = 6) -> Marked:
    """Finds the entities of a text, the longest first, from left to right."""
    words = [match.span() for match in re.finditer(r"\w+", text)]
    entity_ends = set()
    index = 0
    while index < len(words):
        step = 1
        for count in range(min(most_words, len(words) - index), 1, -1):
            start = words[index][0]
            end = words[index + count - 1][1]
            if text[start:end] in entities:
                entity_ends.add(end)
                step = count
                break
        index += step
    return Marked(text, {end for _, end in words}, entity_ends)


def area(positive: np.ndarray, negative: np.ndarray) -> float:
    """Returns the probability that a positive score is the higher one; ties count half."""
    both = np.concatenate([positive, negative])
    order = np.argsort(both, kind="stable")
    _, groups, sizes = np.unique(both[order], return_inverse=True, return_counts=True)
    ranks = np.empty(len(both))
    ranks[order] = (np.cumsum(sizes) - (sizes - 1) / 2)[groups]
    over = ranks[: len(positive)].sum() - len(positive) * (len(positive) + 1) / 2
    return float(over / (len(positive) * len(negative)))


def stratified_area(scores: np.ndarray, labels: np.ndarray, strata: np.ndarray) -> float:
    """Returns the mean area within strata, weighted by their pairs."""
    areas = []
    pairs = []
    for stratum in np.unique(strata):
        inside = strata == stratum
        positive = scores[inside & labels]
        negative = scores[inside & ~labels]
        if len(positive) and len(negative):
            areas.append(area(positive, negative))
            pairs.append(len(positive) * len(negative))
    return float(np.average(areas, weights=pairs))


def bigrams(tokenizer: Tokenizer) -> Counter[tuple[int, int]]:
    """Counts pairs of tokens in the training text."""
    counts: Counter[tuple[int, int]] = Counter()
    for ids in tokenizer.encode_batch(list(texts("wordnet", split="train"))):
        counts.update(zip(ids, ids[1:], strict=False))
    return counts


def gate_figures(model: nn.Module, tokenizer: Tokenizer, seed: int) -> dict[str, Any]:
    """Measures how well gates tell the ends of entities from other tokens."""
    entities = lemmas()
    counts = bigrams(tokenizer)
    scores: list[float] = []
    is_entity: list[bool] = []
    is_word: list[bool] = []
    frequency: list[int] = []
    by_stream: list[np.ndarray] = []
    for document in texts("wordnet", split="validation"):
        split = parts(document)
        if split is None:
            continue
        definition = marked(split[1], entities)
        offsets = tokenizer.backend.encode(definition.text, add_special_tokens=False).offsets
        ids = tokenizer.encode(definition.text)
        values = gates(model, tokenizer, definition.text).values
        assert len(offsets) == len(ids) == values.shape[1]
        for index, (_, end) in enumerate(offsets):
            if not index:
                continue  # nothing was read before it that could be looked up together with it
            scores.append(float(values[:, index].mean()))
            by_stream.append(values[:, index].flatten().numpy())
            is_entity.append(end in definition.entity_ends)
            is_word.append(end in definition.word_ends)
            frequency.append(int(math.log2(1 + counts[ids[index - 1], ids[index]])))
    score = np.array(scores)
    entity = np.array(is_entity)
    word = np.array(is_word)
    strata = np.array(frequency)
    streams = np.array(by_stream)
    of_words = score[word]
    labels = entity[word]
    generator = np.random.default_rng(seed)
    shuffled = []
    for _ in range(SHUFFLES):
        mixed = generator.permutation(labels)
        shuffled.append(area(of_words[mixed], of_words[~mixed]))
    return {
        "tokens": len(score),
        "word_ends": int(word.sum()),
        "entity_ends": int(entity.sum()),
        "all_tokens": area(score[entity], score[~entity]),
        "word_area": area(of_words[labels], of_words[~labels]),
        "equal_counts": stratified_area(of_words, labels, strata[word]),
        "shuffled": [float(np.quantile(shuffled, q)) for q in (0.025, 0.975)],
        "streams": [area(column[word & entity], column[word & ~entity]) for column in streams.T],
        "mean_gate": {
            "entity": float(of_words[labels].mean()),
            "word": float(of_words[~labels].mean()),
        },
    }


def made_up(draw: random.Random) -> str:
    """Returns a word of three syllables that no dictionary has."""
    return "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(3))


def questions(task: str, count: int, seed: int) -> Iterator[Question]:
    """Draws questions of a task, the same for every model of one seed."""
    draw = random.Random(seed)
    split = [parts(document) for document in texts("wordnet", split="train")]
    short = [pair for pair in split if pair and SHORTEST <= len(pair[1]) <= LONGEST]
    for _ in range(count):
        drawn = draw.sample(short, CHOICES)
        options = [definition for _, definition in drawn]
        if task == "recall":
            yield Question(f"{drawn[0][0][0]}:", options)
            continue
        name = made_up(draw)
        yield Question(f"{name}: {options[0]}; {name}:", options)


def log_likelihoods(
    model: nn.Module, tokenizer: Tokenizer, pairs: Sequence[tuple[str, str]]
) -> list[float]:
    """Returns the log-probability of each continuation behind its prompt, in nats."""
    rows = []
    for prompt, continuation in pairs:
        before = [tokenizer.begin_id, *tokenizer.encode(prompt)]
        rows.append((before, tokenizer.encode(" " + continuation)))
    longest = max(len(before) + len(after) for before, after in rows)
    # What stands behind a sequence does not reach it: attention looks back alone.
    ids = torch.full((len(rows), longest), tokenizer.end_id)
    for row, (before, after) in enumerate(rows):
        ids[row, : len(before) + len(after)] = torch.tensor(before + after)
    logs = run(model, ids).float().log_softmax(-1)
    sums = []
    for row, (before, after) in enumerate(rows):
        steps = torch.arange(len(before) - 1, len(before) - 1 + len(after))
        sums.append(float(logs[row, steps, torch.tensor(after)].sum()))
    return sums


def answered(
    model: nn.Module, tokenizer: Tokenizer, asked: Sequence[Question], at_once: int = 8
) -> list[bool]:
    """Returns for each question whether its first option is picked."""
    right = []
    for first in range(0, len(asked), at_once):
        group = asked[first : first + at_once]
        pairs = [(q.prompt, option) for q in group for option in q.options]
        neutral = [(":", option) for q in group for option in q.options]
        gains = Tensor(log_likelihoods(model, tokenizer, pairs)) - Tensor(
            log_likelihoods(model, tokenizer, neutral)
        )
        right += (gains.view(len(group), -1).argmax(1) == 0).tolist()
    return right


def memory_figures(
    model: nn.Module, tokenizer: Tokenizer, count: int, seed: int
) -> dict[str, dict[str, float]]:
    """Scores each task with the memory and with its output zeroed."""
    asked = {task: list(questions(task, count, seed)) for task in TASKS}

    def share(task: str) -> float:
        return sum(answered(model, tokenizer, asked[task])) / count

    scores: dict[str, MemoryScores] = suppressed(
        model, {task: (lambda task=task: share(task)) for task in TASKS}
    )
    return {
        task: {"with": both.whole, "without": both.without, "kept": share_left(both)}
        for task, both in scores.items()
    }


def share_left(scores: MemoryScores) -> float:
    """Returns the share of the score above chance that is left without memory."""
    chance = 1 / CHOICES
    above = scores.whole - chance
    return (scores.without - chance) / above if above > 0 else math.nan


def _figure(values: Sequence[float]) -> str:
    mean, error = mean_and_error(values)
    return f"{mean:.3f}" + (f" +- {error:.3f}" if len(values) > 1 else "")


def report(measured: Sequence[dict[str, Any]]) -> str:
    """Returns the Markdown tables, and what they establish."""
    if not measured:
        return "nothing has been measured"
    lines = ["| gate at the ends of entities | area under the curve |", "| --- | --- |"]
    for key, what in (
        ("all_tokens", "against all other tokens"),
        ("word_area", "against the ends of other words"),
        ("equal_counts", "the same, between bigrams of equal counts"),
    ):
        lines.append(f"| {what} | {_figure([one['gates'][key] for one in measured])} |")
    low = min(one["gates"]["shuffled"][0] for one in measured)
    high = max(one["gates"]["shuffled"][1] for one in measured)
    lines.append(f"| labels shuffled, 95 % range | {low:.3f} to {high:.3f} |")
    lines += ["", "| task | with memory | without | left of what exceeds chance |"]
    lines.append("| --- | --- | --- | --- |")
    for task in TASKS:
        cells = [
            _figure([one["memory"][task][key] for one in measured])
            for key in ("with", "without", "kept")
        ]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", conclusion(measured)])


def conclusion(measured: Sequence[dict[str, Any]]) -> str:
    """Returns what is established, in sentences."""
    seeds = len(measured)

    def verdict(values: Sequence[float]) -> str:
        mean, error = mean_and_error(values)
        return "established" if established(mean, error, seeds) else "not established"

    sentences = []
    for key, what in (
        ("all_tokens", "other tokens"),
        ("word_area", "other ends of words"),
        ("equal_counts", "those as frequent"),
    ):
        over = [one["gates"][key] - 0.5 for one in measured]
        mean, _ = mean_and_error(over)
        side = "higher" if mean > 0 else "lower"
        sentences.append(
            f"gates at the ends of entities are {side} than at {what} (area {0.5 + mean:.3f}): "
            f"{verdict(over)}"
        )
    for task in TASKS:
        drops = [one["memory"][task]["with"] - one["memory"][task]["without"] for one in measured]
        mean, _ = mean_and_error(drops)
        sentences.append(f"without memory {task} loses {mean:.3f} of its answers: {verdict(drops)}")
    gaps = [one["memory"]["copy"]["kept"] - one["memory"]["recall"]["kept"] for one in measured]
    mean, _ = mean_and_error(gaps)
    more = "more" if mean > 0 else "less"
    sentences.append(
        f"without memory copying keeps {abs(mean):.2f} {more} of its score than recall does: "
        f"{verdict(gaps)}"
    )
    text = f"{seeds} seed{'s' * (seeds > 1)}: " + "; ".join(sentences)
    return text + "."


def draw(measured: Sequence[dict[str, Any]], case: str | Path, path: Path) -> None:
    """Draws the gates of two sentences, the areas, and the tasks with memory and without."""
    from matplotlib.figure import Figure

    from rorqual.analyze.figures import COLOURS, style

    opened = load(case)
    entities = lemmas()
    with style():
        figure = Figure(figsize=(7.2, 5.2), layout="constrained")
        grid = figure.add_gridspec(3, 2, height_ratios=[1, 1, 1.9])
        for line, sentence in enumerate(SENTENCES):
            axes = figure.add_subplot(grid[line, :])
            values = gates(opened.model, opened.tokenizer, sentence).values.mean((0, 2))
            offsets = opened.tokenizer.backend.encode(sentence, add_special_tokens=False).offsets
            ends = marked(sentence, entities).entity_ends
            inside = [end in ends for _, end in offsets]
            colours = [COLOURS[1] if one else COLOURS[0] for one in inside]
            axes.bar(range(len(values)), values, color=colours)
            labels = [sentence[start:end].strip() for start, end in offsets]
            axes.set_xticks(range(len(values)), labels, rotation=35, ha="right")
            axes.set(ylim=(0, 1), ylabel="gate")
            if not line:
                axes.bar([0], [0], color=COLOURS[1], label="last token of an entity")
                axes.legend(loc="upper left")
        axes = figure.add_subplot(grid[2, 0])
        names = ("all_tokens", "word_area", "equal_counts")
        for index, key in enumerate(names):
            each = [one["gates"][key] for one in measured]
            axes.plot([index] * len(each), each, "o", color=COLOURS[1], alpha=0.7)
        low = min(one["gates"]["shuffled"][0] for one in measured)
        high = max(one["gates"]["shuffled"][1] for one in measured)
        axes.axhspan(low, high, color="grey", alpha=0.3, lw=0, label="labels shuffled")
        axes.set_xticks(range(3), ["all tokens", "word ends", "equal counts"])
        axes.set(xlim=(-0.5, 2.5), ylim=(0.38, 0.56), ylabel="area under the curve")
        axes.legend(loc="upper left")
        axes = figure.add_subplot(grid[2, 1])
        for offset, key, colour in ((-0.2, "with", COLOURS[0]), (0.2, "without", COLOURS[3])):
            means = [
                sum(one["memory"][task][key] for one in measured) / len(measured) for task in TASKS
            ]
            spots = [index + offset for index in range(len(TASKS))]
            axes.bar(spots, means, 0.38, color=colour, label=f"{key} memory")
        axes.axhline(1 / CHOICES, color="grey", lw=1, ls=":")
        axes.set_xticks(range(len(TASKS)), TASKS)
        axes.set(ylim=(0, 1.18), ylabel="answers right")
        axes.legend(loc="upper left", ncols=2)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help="run folders with Engram, a seed each")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--folder", type=Path, default=RESULTS, help="of the JSON files")
    parser.add_argument("--figure", type=Path, help="where to draw it; the case is the first model")
    parser.add_argument("--print", action="store_true", help="run nothing")
    options = parser.parse_args()
    if not options.models and not options.print:
        parser.error("got no model, expected one, or --print")
    for seed, name in enumerate(options.models):
        path = options.folder / f"{Path(name).name}.json"
        if path.exists():
            continue
        opened = load(name)
        figures = {
            "model": Path(name).name,
            "questions": options.questions,
            "gates": gate_figures(opened.model, opened.tokenizer, seed),
            "memory": memory_figures(opened.model, opened.tokenizer, options.questions, seed),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, figures)
        print(f"{name}: {figures}", flush=True)
    measured = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(options.folder.glob("*.json"))
    ]
    print(report(measured))
    if options.figure:
        draw(measured, options.models[0], options.figure)


if __name__ == "__main__":
    main()
