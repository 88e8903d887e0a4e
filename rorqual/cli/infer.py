"""Implements the commands that run a trained model: generate, chat, eval, serve and more."""

import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rorqual.cli.parse import Positional, UsageError, emit, parse, parse_new, split_first, take

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from rorqual.evaluate import Score
    from rorqual.memory import Edit, Editor
    from rorqual.serve.chat import Conversation
    from rorqual.serve.generate import Run
    from rorqual.serve.sampling import Sampling


# How often an idle thread of GNU OpenMP looks for work before it sleeps: some 0.1 ms, not 5.
SPINS = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Generate:
    """Continues a text, printing it as it comes. --json prints one object at the end.

    rorqual generate tiny-engram "A whale is"
    rorqual generate runs/demo/engram "A whale is" --max-new-tokens 100 --temperature 0.7 --seed 1
    """

    run: Positional[str]  # a run folder, a pretrained name, a DeepSeek folder or a hub id
    text: Positional[str] = "-"  # what to continue; - reads standard input
    max_new_tokens: int = 64
    temperature: float = 0.8  # 0 takes the likeliest token each time
    top_k: int | None = None  # draw from this many of the likeliest
    top_p: float | None = None  # draw from the likeliest that together have this probability
    min_p: float | None = None  # draw from those at least this probable, relative to the likeliest
    repetition_penalty: float = 1.0
    seed: int | None = None  # the same seed draws the same text
    stop: tuple[str, ...] = ()  # end before any of these
    speculative: bool = False  # draft with the MTP module; the text stays the same
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] | None = None  # default: as stored
    placement: Literal["device", "host", "disk"] = "device"  # the placement of Engram's rows
    # folder of tables 0, 1, ... that `rorqual table convert` made; none: the run's own
    rows_in: str | None = None
    hot_bytes: int = 64 << 20  # bytes of rows in memory, of a table on a disk


def _table_options(options: "Generate | Serve | Chat") -> dict[str, Any]:
    """Returns the options of `load` that say where Engram's rows are."""
    return {
        "placement": options.placement,
        "folder": options.rows_in,
        "hot_bytes": options.hot_bytes,
    }


def generate_command(argv: list[str]) -> int:
    """Continues a text; returns the exit code."""
    as_json, argv = take("--json", argv)
    options = parse_new(Generate, argv, "generate")
    from rorqual.serve.drafts import AcceptanceStats
    from rorqual.serve.generate import load
    from rorqual.serve.sampling import Sampling

    if options.text == "-" and sys.stdin.isatty():
        print(
            "reading the text from standard input; ctrl-D ends it (Windows: ctrl-Z, Enter)",
            file=sys.stderr,
        )
    text = sys.stdin.read() if options.text == "-" else options.text
    sampling = Sampling(**{name: getattr(options, name) for name in _SAMPLED})
    run = load(options.run, device=options.device, dtype=options.dtype, **_table_options(options))
    largest = options.max_new_tokens
    stop = options.stop
    if as_json:
        drafts = options.speculative
        done = run.complete(
            [text], max_new_tokens=largest, sampling=sampling, stop=stop, speculative=drafts
        )[0]
        counted = (
            {**asdict(done.acceptance_stats), "acceptance": done.acceptance_stats.acceptance}
            if done.acceptance_stats
            else None
        )
        emit(
            {
                "prompt": text,
                "text": done.text,
                "ids": done.ids,
                "finish": done.finish,
                "acceptance_stats": counted,
            }
        )
        return 0
    acceptance_stats = AcceptanceStats() if options.speculative else None
    print(text, end="", flush=True)
    for piece in run.stream(
        text,
        max_new_tokens=largest,
        sampling=sampling,
        stop=stop,
        acceptance_stats=acceptance_stats,
    ):
        print(piece, end="", flush=True)
    print()
    if acceptance_stats is not None:
        print(
            f"drafts: {acceptance_stats.drafted} in {acceptance_stats.rounds} forwards, "
            f"accepted {acceptance_stats.acceptance:.0%}",
            file=sys.stderr,
        )
    return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluate:
    """Measures a model's loss on text, in nats a token and bits a byte, or its scores in lm-eval.

    Without --data the text is the part that the run kept apart from its training.

    rorqual eval runs/demo/engram
    rorqual eval runs/demo/engram --data notes/ --split all
    """

    run: Positional[str]  # a run folder, a pretrained name, a DeepSeek folder or a hub id
    # a corpus name, a file, a folder, a Hugging Face data set; none: the run's own, or wordnet
    data: str | None = None
    # the field that holds the text; none: the run's for its own data, else text
    column: str | None = None
    split: Literal["validation", "train", "all"] = "validation"  # which documents of it
    limit: int | None = None  # at most this many documents, or items a task
    seq_len: int | None = None  # sequence length; none: as in the run's training, or 512
    batch_size: int = 8  # sequences at a time
    tasks: tuple[str, ...] = ()  # names that `lm-eval ls tasks` lists, instead of text
    device: str = "auto"


def eval_command(argv: list[str]) -> int:
    """Scores a run on a text or on tasks; returns the exit code."""
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
            numbers = (
                f"{name} {value:.4f}" for name, value in scores.items() if isinstance(value, float)
            )
            print(task, *numbers, sep="  ")
        return 0
    score = _score(run, options)
    if as_json:
        emit(score)
        return 0
    print(f"{score.nats_per_token:.4f} nats a token, {score.bits_per_byte:.4f} bits a byte")
    print(
        f"{score.tokens:,} tokens of {score.documents:,} documents, "
        f"{score.bytes:,} bytes ({options.split})"
    )
    return 0


def _score(run: "Run", options: Evaluate) -> "Score":
    """Scores the text of --data, or else that of the run's own training."""
    from rorqual import evaluate
    from rorqual.data.chats import COLUMN
    from rorqual.data.corpus import trained

    trained_on = trained(run.folder or options.run)
    usual = trained_on.seq_len if trained_on is not None else 512
    length = usual if options.seq_len is None else options.seq_len
    text = trained_on if options.data is None else None
    column = options.column or (text.column if text is not None else "text")
    as_chats = column == COLUMN
    documents = evaluate.texts(
        text.source if text is not None else options.data or "wordnet",
        split=options.split,
        limit=options.limit,
        column=column,
        within=text.limit if text is not None else None,
        as_chats=as_chats,
    )
    return evaluate.score(
        run.model,
        run.tokenizer,
        documents,
        seq_len=length,
        batch_size=options.batch_size,
        as_chats=as_chats,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Serve:
    """Answers OpenAI-style completion requests over HTTP until interrupted.

    rorqual serve runs/demo/engram --port 8000
    """

    run: Positional[str]  # a run folder, a pretrained name, a DeepSeek folder or a hub id
    host: str = "127.0.0.1"  # another address lets other machines connect; set a key then
    port: int = 8000
    # what clients must send as `Authorization: Bearer KEY`; none: RORQUAL_API_KEY, or no login
    api_key: str | None = None
    cors: tuple[str, ...] = ()  # origins whose pages may use the server, as https://example.org
    max_batch_size: int = 8  # requests at once
    context: int = 4096  # tokens of a request and its answer
    # tokens that the cache has space for, of all requests together; none: max-batch-size times the
    # context
    cache_tokens: int | None = None
    prefix_cache: bool = True  # whether prompts that were read stay for others that begin alike
    prefill_chunk: int = 64  # tokens of long prompts that are read in a step beside others
    drafts: bool = False  # draft with the MTP module; pays where enough drafts are accepted
    max_waiting: int = 256  # requests in the queue; more are answered with status 429
    timeout: float = 600.0  # seconds that a request may take, in the queue and out of it
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] | None = None  # default: as stored
    placement: Literal["device", "host", "disk"] = "device"  # the placement of Engram's rows
    # folder of tables 0, 1, ... that `rorqual table convert` made; none: the run's own
    rows_in: str | None = None
    hot_bytes: int = 64 << 20  # bytes of rows in memory, of a table on a disk


def serve_command(argv: list[str]) -> int:
    """Starts the HTTP server and runs it until ctrl-C; returns the exit code."""
    options = parse_new(Serve, argv, "serve")
    _wait_shortly()
    from rorqual.serve.generate import load
    from rorqual.serve.server import listen, serve

    if not 0 <= options.port < 2**16:
        raise UsageError(f"got port {options.port}, expected 0..65535")
    api_key = os.environ.get("RORQUAL_API_KEY") if options.api_key is None else options.api_key
    if api_key is not None and not api_key.strip():
        raise UsageError(
            "got an empty API key, expected one, or neither --api-key nor the variable"
        )
    # Check the port before loading the model, which may take minutes.
    listen(options.host, options.port).close()
    run = load(options.run, device=options.device, dtype=options.dtype, **_table_options(options))
    try:
        serve(
            run,
            host=options.host,
            port=options.port,
            api_key=api_key,
            cors=options.cors,
            max_batch_size=options.max_batch_size,
            context=options.context,
            cache_tokens=options.cache_tokens,
            prefix_cache=options.prefix_cache,
            prefill_chunk=options.prefill_chunk,
            drafts=options.drafts,
            max_waiting=options.max_waiting,
            timeout=options.timeout,
            run_name=options.run,
        )
    except KeyboardInterrupt:
        # An orderly exit takes seconds, and crashes where a step is still running.
        print("\nrorqual: stopped", file=sys.stderr, flush=True)
        os._exit(130)
    return 0


def _wait_shortly() -> None:
    """Lets torch's threads sleep a tenth of a millisecond after an operation, not milliseconds.

    While they poll for the next one they take cores from the compiled step, which decodes in
    between. GNU OpenMP reads the variable when torch is imported; other systems ignore it.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    """Talks with a model in the terminal. /help lists what else can be typed.

    A model without a chat template continues what was written, as one text.

    rorqual chat runs/demo/engram --temperature 0.7
    """

    run: Positional[str]  # a run folder, a pretrained name, a DeepSeek folder or a hub id
    system: str | None = None  # the system message, before the conversation
    max_new_tokens: int = 256  # of each answer
    context: int = 4096  # tokens of the conversation; the oldest turns go where it is full
    temperature: float = 0.8  # 0 takes the likeliest token each time
    top_k: int | None = None  # draw from this many of the likeliest
    top_p: float | None = None  # draw from the likeliest that together have this probability
    min_p: float | None = None  # draw from those at least this probable, relative to the likeliest
    repetition_penalty: float = 1.0
    seed: int | None = None  # the same seed draws the same answers
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] | None = None  # default: as stored
    placement: Literal["device", "host", "disk"] = "device"  # the placement of Engram's rows
    # folder of tables 0, 1, ... that `rorqual table convert` made; none: the run's own
    rows_in: str | None = None
    hot_bytes: int = 64 << 20  # bytes of rows in memory, of a table on a disk


CHAT_HELP = """/reset              begin anew
/set NAME VALUE     change temperature, top_k, top_p, min_p, repetition_penalty or seed
/system TEXT        begin anew with this message of the system
/history            print the conversation
/exit               end (as ctrl-D does); ctrl-C ends an answer"""


def chat_command(argv: list[str]) -> int:
    """Talks with a run in the terminal; returns the exit code."""
    options = parse_new(Chat, argv, "chat")
    from rorqual.serve.chat import Conversation
    from rorqual.serve.generate import load
    from rorqual.serve.sampling import Sampling

    sampling = Sampling(**{name: getattr(options, name) for name in _SAMPLED})
    run = load(options.run, device=options.device, dtype=options.dtype, **_table_options(options))
    conversation = Conversation(
        run,
        sampling,
        system=options.system,
        max_new_tokens=options.max_new_tokens,
        context=options.context,
    )
    _enable_line_editing()
    way = "answers" if conversation.templated else "has no chat template, so it continues your text"
    print(f"{options.run} {way}. /help lists commands.", file=sys.stderr)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            break
        except KeyboardInterrupt:
            print(file=sys.stderr)
            continue
        if line.split()[:1] in (["/exit"], ["/quit"]):
            break
        try:
            if line.startswith("/"):
                _chat_control(conversation, line)
            elif line.strip():
                _chat_turn(conversation, line)
        except ValueError as error:
            print(f"rorqual: {error}", file=sys.stderr)
    run.close()
    return 0


_SAMPLED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


def _enable_line_editing() -> None:
    """Lets the arrow keys edit and repeat lines, where the system can."""
    try:
        import readline  # noqa: F401 (its import is its effect)
    except ImportError:
        return


def _chat_turn(conversation: "Conversation", line: str) -> None:
    """Prints the answer as it comes, and then how fast it came."""
    dropped = conversation.dropped
    try:
        for piece in conversation.ask(line):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" ...", end="")
    print()
    if conversation.dropped > dropped:
        print("the context is full: the oldest text is no longer read", file=sys.stderr)
    if (speed := conversation.speed) is not None:
        rate = f"{speed.tokens} tokens, {speed.tokens_per_second:.1f} a second"
        print(f"({rate})", file=sys.stderr)


def _chat_control(conversation: "Conversation", line: str) -> None:
    """Runs a line that begins with a slash. ValueError for one that is unknown."""
    from rorqual.hints import choose

    name, _, rest = line[1:].strip().partition(" ")
    name = choose("command", name, ("reset", "set", "system", "history", "help", "exit"))
    if name == "help":
        print(CHAT_HELP)
    elif name == "reset":
        conversation.reset()
    elif name == "system":
        conversation.system = rest.strip() or None
        conversation.reset()
    elif name == "set":
        conversation.sampling = _changed(conversation.sampling, rest)
    else:
        for message in conversation.messages:
            print(f"{message['role']}: {message['content']}")


def _changed(sampling: "Sampling", words: str) -> "Sampling":
    """Returns the sampling with one option changed, as `top_p 0.9` or `seed none`."""
    from rorqual.hints import choose

    name, _, value = words.strip().partition(" ")
    name = choose("option", name, _SAMPLED)
    read = int if name in ("top_k", "seed") else float
    try:
        changed = None if value.strip().lower() == "none" else read(value)
    except ValueError as error:
        raise ValueError(f"{name}: got {value!r}, expected a number or none") from error
    if changed is None and name in ("temperature", "repetition_penalty"):
        raise ValueError(f"{name}: got none, expected a number")
    change: dict[str, Any] = {name: changed}
    return replace(sampling, **change)


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """Writes a model to a new folder for transformers and the hub: weights, tokenizer, card.

    AutoModelForCausalLM.from_pretrained loads it after `import rorqual`, and runs no code of it.

    rorqual export runs/demo/engram exported --dtype bfloat16 --license mit
    rorqual export tiny-engram runs/mine
    """

    run: Positional[str]  # a run folder, a pretrained name, a DeepSeek folder or a hub id
    folder: Positional[str]  # a folder without a model
    dtype: Literal["float32", "bfloat16"] | None = None  # default: as stored
    license: str | None = None  # of the weights, by the hub's names; the card then has it
    # in the format of the architecture's authors (DeepSeek, Qwen), which needs no rorqual
    published: bool = False


def export_command(argv: list[str]) -> int:
    """Writes a folder for the hub from a run; returns the exit code."""
    as_json, argv = take("--json", argv)
    options = parse_new(Export, argv, "export")
    from rorqual.serve.export import export
    from rorqual.serve.generate import load

    run = load(options.run, device="cpu", dtype=options.dtype)
    folder = export(run, options.folder, license=options.license, published=options.published)
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    if as_json:
        emit({"folder": folder, "files": files})
        return 0
    print(f"{folder}: {', '.join(files)}, {sum(files.values()):,} bytes")
    return 0


def explore_command(argv: list[str]) -> int:
    """Shows the live page of a run until ctrl-C; returns the exit code."""
    name, flags = split_first(argv, "a run folder", "rorqual explore runs/demo/engram")
    from rorqual import explore

    if name in ("-h", "--help"):
        name = "RUN"
        flags = ["--help"]
    explore.main(parse(explore.ExploreConfig(run=name), flags, "explore RUN"))
    return 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Shows what each token reads from memory, and edits those rows, with undo.

    For each token it prints the gates, which weigh what the token reads; for an edit, what it
    changes in the next token.

    rorqual memory runs/demo/engram "the great white" --rows
    rorqual memory runs/demo/engram "the great white" --suppress " great white" --top 5 --save
    rorqual memory runs/demo/engram --undo
    rorqual memory runs/demo/engram --data wordnet --limit 500
    """

    run: Positional[str]  # a run folder, a pretrained name, a DeepSeek folder or a hub id
    text: Positional[str] = ""  # none: only edits, or a corpus
    rows: bool = False  # print which rows each token reads, order by order, head by head
    suppress: tuple[str, ...] = ()  # n-grams whose rows become zero
    # an n-gram, and a number for its rows or a JSON file [heads][width]
    overwrite: tuple[str, str] | None = None
    transplant: tuple[str, str] | None = None  # the second n-gram's rows become the first's
    layer: int | None = None  # the block to edit or to count; none: all with Engram
    save: bool = False  # keep the edits in the run's weights; --undo takes them back
    undo: bool = False  # take back what the last --save edited
    edits: bool = False  # list the edits that are saved
    data: str | None = None  # a corpus: the rows it reads most, and which of its n-grams share rows
    column: str = "text"  # the field of the corpus that holds the text
    limit: int = 1000  # documents of the corpus
    shared: str | None = None  # with --data: which of its n-grams read this one's rows
    top: int = 8  # how many next tokens, rows or n-grams to show
    device: str = "auto"


def memory_command(argv: list[str]) -> int:
    """Prints or edits the rows that a text reads; returns the exit code."""
    as_json, argv = take("--json", argv)
    options = parse_new(Memory, argv, "memory")
    asked = (
        options.text,
        options.undo,
        options.edits,
        options.data,
        options.suppress,
        options.overwrite,
    )
    if not any((*asked, options.transplant)):
        raise UsageError("got nothing to do, expected a text, an edit, --undo, --edits or --data")
    if options.shared is not None and options.data is None:
        raise UsageError("got --shared without --data, expected the corpus in which to look")
    if options.top < 1 or options.limit < 1:
        raise UsageError(
            f"got --top {options.top} and --limit {options.limit}, expected at least 1 of each"
        )
    from rorqual import memory
    from rorqual.serve.generate import load

    run = load(options.run, device=options.device)
    editor = memory.Editor(run.model, run.tokenizer)
    results: dict[str, Any] = {}
    if options.text:
        results["reads"] = memory.reads(run.model, run.tokenizer, options.text)
    results |= _surgery(run, editor, options)
    if options.data is not None:
        results["corpus"] = _corpus(run, options)
    if as_json:
        emit(results)
    else:
        _show(results, options)
    return 0


def _surgery(run: "Run", editor: "Editor", options: Memory) -> dict[str, Any]:
    """Makes and undoes edits, and returns them with the change of the next token."""
    from rorqual import memory

    arguments = (run.model, run.tokenizer, options.text)
    journal = _journal(run, options)
    if journal is not None and journal.exists():
        editor.load(journal)
    before = memory.distribution(*arguments) if options.text else None
    undone = [editor.undo()] if options.undo else []
    saved = len(editor.edits)
    for layer in _layers(run, options):
        for ngram in options.suppress:
            editor.suppress(ngram, layer)
        if options.overwrite is not None:
            editor.overwrite(
                options.overwrite[0], layer, _values(*options.overwrite, editor, layer)
            )
        if options.transplant is not None:
            editor.transplant(*options.transplant, layer)
    made = editor.edits[saved:]
    if journal is not None and (undone or options.save):
        _keep(run, editor, journal, undone=bool(undone))
    lines = [("undone", undone), ("edited", made), ("saved", editor.edits if options.edits else [])]
    item: dict[str, Any] = {
        name: [_about(edit) for edit in edits] for name, edits in lines if edits
    }
    if options.edits:
        item.setdefault("saved", [])
    if before is None:
        return item
    item["next"] = {"as it is": memory.likeliest(before, run.tokenizer, options.top)}
    if made or undone:
        after = memory.distribution(*arguments)
        item["next"]["edited"] = memory.likeliest(after, run.tokenizer, options.top)
        item["change"] = memory.difference(before, after, run.tokenizer, options.top)
    return item


def _layers(run: "Run", options: Memory) -> tuple[int, ...]:
    """Returns the block that --layer names, or all blocks with Engram."""
    return (
        run.config.engram.layers  # type: ignore[union-attr]
        if options.layer is None
        else (options.layer,)
    )


def _journal(run: "Run", options: Memory) -> Path | None:
    """Returns the file beside the weights that keeps their edits; None if no option needs it."""
    if not (options.save or options.undo or options.edits):
        return None
    from rorqual import checkpoint, pretrained

    folder = run.folder
    if folder is not None and pretrained.is_pretrained(folder):
        raise ValueError(
            f"{options.run}: got a model of the package, which stays as it is, expected a copy: "
            f"rorqual export {options.run} runs/mine, then rorqual memory runs/mine"
        )
    if folder is None or not checkpoint.is_run(folder):
        raise ValueError(
            f"{options.run}: edits are saved in a run of rorqual's own, which this is not"
        )
    if checkpoint.is_checkpoint(options.run) or not checkpoint.is_finished(folder):
        raise ValueError(
            f"{options.run}: edits are saved in a run that is finished, "
            "and this is a checkpoint of one"
        )
    return folder / "edits.safetensors"


def _keep(run: "Run", editor: "Editor", journal: Path, *, undone: bool) -> None:
    """Saves weights and journal, so that an edit can be undone wherever this is stopped.

    An edit writes the journal first, an undo the weights.
    """
    from rorqual import checkpoint

    for step in (1, 2):
        if (step == 1) == undone:
            checkpoint.save_model(journal.parent, run.model, run.tokenizer)
        else:
            editor.save(journal)


def _values(ngram: str, value: str, editor: "Editor", layer: int) -> "Tensor":
    """Returns rows filled with one number, or the rows in a JSON file."""
    import torch

    shape = editor.lookup(ngram, layer).shape
    try:
        if Path(value).is_file():
            return torch.tensor(
                json.loads(Path(value).read_text(encoding="utf-8")), dtype=torch.float32
            )
        return torch.full(shape, float(value))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"--overwrite: got {value!r}, expected a number or a JSON file of {list(shape)}"
        ) from error


def _about(edit: "Edit") -> dict[str, Any]:
    """Returns an edit as JSON values."""
    return {"what": edit.what, "layer": edit.layer, "rows": edit.rows.tolist()}


def _corpus(run: "Run", options: Memory) -> dict[str, Any]:
    """Returns, by block, the rows read most, the shared rows, and who shares one n-gram's rows."""
    from rorqual import evaluate, memory

    results: dict[str, Any] = {}
    for layer in _layers(run, options):

        def texts() -> "Iterator[str]":
            return evaluate.texts(
                str(options.data), split="all", limit=options.limit, column=options.column
            )

        arguments = (run.model, run.tokenizer)
        results[str(layer)] = {
            "popular": memory.popular(*arguments, texts(), layer, options.top),
            "collisions": memory.collisions(*arguments, texts(), layer, options.top),
        }
        if options.shared is not None:
            shared = memory.sharing(*arguments, options.shared, texts(), layer)
            results[str(layer)]["sharing"] = dict(list(shared.items())[: options.top])
    return results


def _show(result: dict[str, Any], options: Memory) -> None:
    """Prints the same as --json in readable form."""
    for one in result.get("reads", ()):
        gates = "  ".join(
            f"block {layer}: {' '.join(f'{g:.2f}' for g in gates)}"
            for layer, gates in one.gates.items()
        )
        print(f"{one.token!r:20} {gates}")
        for layer, read in one.rows.items() if options.rows else ():
            heads = len(read) // len(one.ngrams)
            for n, ngram in enumerate(one.ngrams):
                print(
                    f"    block {layer}  {ngram!r:24} rows "
                    f"{' '.join(map(str, read[n * heads : (n + 1) * heads]))}"
                )
    if "reads" in result and not options.rows:
        streams = len(next(iter(result["reads"][0].gates.values())))
        print(f"gates of {streams} streams; --rows shows the rows too")
    for name in ("undone", "edited", "saved"):
        for edit in result.get(name, ()):
            print(f"{name}: {edit['what']} in block {edit['layer']}, {len(edit['rows'])} rows")
    if result.get("saved") == []:
        print("no edit is saved")
    for name, likely in result.get("next", {}).items():
        print(f"next, {name}: " + "  ".join(f"{token!r} {chance:.1%}" for token, chance in likely))
    if "change" in result:
        movers = "  ".join(
            f"{token!r} {p:.2%} -> {q:.2%}" for token, p, q in result["change"].movers
        )
        print(f"KL {result['change'].kl:.3g} nats; moved most: {movers}")
    for layer, of in result.get("corpus", {}).items():
        _show_corpus(layer, of)


def _show_corpus(layer: str, of: dict[str, Any]) -> None:
    """Prints, for one block, the rows that are read or shared most."""
    all_of = of["collisions"]
    print(
        f"block {layer}: {all_of.ngrams:,} n-grams read {all_of.rows:,} rows, "
        f"{all_of.shared:,} of them shared"
    )
    for row, reads, ngram in of["popular"]:
        print(f"  row {row} read {reads:,} times, most by {ngram!r}")
    for row, ngrams in all_of.worst:
        more = f" and {len(ngrams) - 6} more" if len(ngrams) > 6 else ""
        print(f"  row {row} shared by {', '.join(map(repr, ngrams[:6]))}{more}")
    for ngram, rows in of.get("sharing", {}).items():
        print(f"  {ngram!r} reads {rows} of its rows")
