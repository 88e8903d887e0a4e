"""Options of a command that asks a trained model -> one call into its room out."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from rorqual.cli.parse import UsageError, emit, parse, parse_new, split_first, take

if TYPE_CHECKING:
    from rorqual.evaluate import Score
    from rorqual.serve.generate import Run


@dataclass(frozen=True, kw_only=True, slots=True)
class Generate:
    """Continues a text, printing it as it comes. --json prints one object at the end.

    rorqual generate runs/demo/engram "A whale is" --max-new-tokens 100 --temperature 0.7 --seed 1
    """

    run: Positional[str]  # a run folder, a DeepSeek folder or a hub id
    text: Positional[str] = "-"  # what to continue; - reads standard input
    max_new_tokens: int = 64
    temperature: float = 0.8  # 0 takes the likeliest token each time
    top_k: int | None = None  # draw from this many of the likeliest
    top_p: float | None = None  # draw from the likeliest that together have this probability
    min_p: float | None = None  # draw from those at least this probable, relative to the likeliest
    repetition_penalty: float = 1.0
    seed: int | None = None  # the same seed draws the same text
    stop: tuple[str, ...] = ()  # end before any of these
    speculative: bool = False  # draft with the MTP module; needs --temperature 0
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] | None = None  # default: as stored


def generate_command(argv: list[str]) -> int:
    as_json, argv = take("--json", argv)
    options = parse_new(Generate, argv, "generate")
    from rorqual.serve.decoding import Tally
    from rorqual.serve.generate import load
    from rorqual.serve.sampling import Sampling

    text = sys.stdin.read() if options.text == "-" else options.text
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    sampling = Sampling(**{name: getattr(options, name) for name in names})
    run = load(options.run, device=options.device, dtype=options.dtype)
    most, stop = options.max_new_tokens, options.stop
    if as_json:
        drafts = options.speculative
        done = run.complete([text], max_new_tokens=most, sampling=sampling, stop=stop, speculative=drafts)[0]
        emit({"prompt": text, "text": done.text, "ids": done.ids, "finish": done.finish, "tally": done.tally})
        return 0
    tally = Tally() if options.speculative else None
    print(text, end="", flush=True)
    for piece in run.stream(text, max_new_tokens=most, sampling=sampling, stop=stop, tally=tally):
        print(piece, end="", flush=True)
    print()
    if tally is not None:
        print(f"drafts: {tally.drafted}, accepted {tally.acceptance:.0%}", file=sys.stderr)
    return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluate:
    """Loss of a model on text it may not have seen: nats a token, bits a byte. Or scores of lm-eval's tasks.

    Without --data on the text that the run kept apart from its training.

    rorqual eval runs/demo/engram
    rorqual eval runs/demo/engram --data notes/ --split all
    """

    run: Positional[str]  # a run folder, a DeepSeek folder or a hub id
    data: str | None = None  # a corpus name, a file, a folder, a Hugging Face data set; none: the run's own, or wordnet
    column: str | None = None  # the field that holds the text; none: the run's for its own data, else text
    split: Literal["validation", "train", "all"] = "validation"  # which documents of it
    limit: int | None = None  # at most this many documents, or items a task
    length: int | None = None  # tokens of context; none: as in the run's training, or 512
    rows: int = 8  # sequences at a time
    tasks: tuple[str, ...] = ()  # names that `lm-eval ls tasks` lists, instead of text
    device: str = "auto"


def eval_command(argv: list[str]) -> int:
    as_json, argv = take("--json", argv)
    options = parse_new(Evaluate, argv, "eval")
    from rorqual import evaluate
    from rorqual.serve.generate import load

    run = load(options.run, device=options.device)
    if options.tasks:
        results = evaluate.tasks(run.model, run.tokenizer, list(options.tasks), limit=options.limit)
        if as_json:
            emit(results)
            return 0
        for task, scores in results.items():
            numbers = (f"{name} {value:.4f}" for name, value in scores.items() if isinstance(value, float))
            print(task, *numbers, sep="  ")
        return 0
    score = _score(run, options)
    if as_json:
        emit(score)
        return 0
    print(f"{score.nats_per_token:.4f} nats a token, {score.bits_per_byte:.4f} bits a byte")
    print(f"{score.tokens:,} tokens of {score.documents:,} documents, {score.bytes:,} bytes ({options.split})")
    return 0


def _score(run: "Run", options: Evaluate) -> "Score":
    """Over the text asked for, or else that of the run's own training."""
    from rorqual import evaluate
    from rorqual.data.corpus import trained

    before = trained(options.run)
    usual = before.length if before is not None else 512
    length = usual if options.length is None else options.length
    own = before if options.data is None else None
    documents = evaluate.texts(
        own.source if own is not None else options.data or "wordnet",
        part=options.split,
        limit=options.limit,
        column=options.column or (own.column if own is not None else "text"),
        within=own.limit if own is not None else None,
    )
    return evaluate.score(run.model, run.tokenizer, documents, length=length, rows=options.rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class Serve:
    """Answers OpenAI-style completion requests over HTTP until interrupted.

    rorqual serve runs/demo/engram --port 8000
    """

    run: Positional[str]  # a run folder, a DeepSeek folder or a hub id
    host: str = "127.0.0.1"  # another address lets other machines ask; there is no login
    port: int = 8000
    rows: int = 8  # requests at once
    context: int = 4096  # tokens of a request and its answer
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] | None = None  # default: as stored


def serve_command(argv: list[str]) -> int:
    options = parse_new(Serve, argv, "serve")
    from rorqual.serve.generate import load
    from rorqual.serve.server import serve

    if not 0 <= options.port < 2**16:
        raise UsageError(f"got port {options.port}, expected 0..65535")
    run = load(options.run, device=options.device, dtype=options.dtype)
    serve(run, host=options.host, port=options.port, rows=options.rows, context=options.context)
    return 0


def explore_command(argv: list[str]) -> int:
    name, flags = split_first(argv, "a run folder", "rorqual explore runs/demo/engram")
    from rorqual import explore

    if name in ("-h", "--help"):
        name, flags = "RUN", ["--help"]
    explore.main(parse(explore.ExploreConfig(run=name), flags, "explore RUN"))
    return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """What each token of a text reads from memory and how far it trusts it; what an edit would change, unsaved.

    rorqual memory runs/demo/engram "the sperm whale"
    rorqual memory runs/demo/engram "the sperm whale" --suppress " whale is" --top 5
    """

    run: Positional[str]  # a run folder, a DeepSeek folder or a hub id
    text: Positional[str]
    suppress: tuple[str, ...] = ()  # n-grams whose rows become zero
    transplant: tuple[str, str] | None = None  # the second n-gram's rows become the first's
    top: int = 8  # likeliest next tokens to show
    device: str = "auto"


def memory_command(argv: list[str]) -> int:
    as_json, argv = take("--json", argv)
    options = parse_new(Memory, argv, "memory")
    from rorqual import memory
    from rorqual.serve.generate import load

    run = load(options.run, device=options.device)
    read = memory.reads(run.model, run.tokenizer, options.text)
    following = {"as it is": memory.next_tokens(run.model, run.tokenizer, options.text, options.top)}
    editor = memory.Editor(run.model, run.tokenizer)
    for layer in read[0].gates:
        for ngram in options.suppress:
            editor.suppress(ngram, layer)
        if options.transplant is not None:
            editor.transplant(*options.transplant, layer)
    if editor.edits:
        following["edited"] = memory.next_tokens(run.model, run.tokenizer, options.text, options.top)
    if as_json:
        emit({"reads": read, "next": following})
        return 0
    for one in read:
        gates = "  ".join(
            f"block {layer}: {' '.join(f'{g:.2f}' for g in values)}" for layer, values in one.gates.items()
        )
        print(f"{one.token!r:20} {gates}")
    print(f"gates of {len(next(iter(read[0].gates.values())))} streams; --json shows the rows too")
    for name, likely in following.items():
        print(f"next, {name}: " + "  ".join(f"{token!r} {chance:.1%}" for token, chance in likely))
    return 0
