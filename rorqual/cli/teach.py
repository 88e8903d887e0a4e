"""Implements `rorqual teach`: facts for a pretrained model, as a memory beside it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rorqual.cli.parse import Positional, UsageError, emit, parse_new, take
from rorqual.io import lock_beside

if TYPE_CHECKING:
    from rorqual.hub.facts import Stored
    from rorqual.train.teach import Fact, Progress, TeachConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Teach:
    """Teaches facts to a causal model of transformers, as a memory in a folder; the model stays.

    A line of FACTS is a JSON object with question and answer, or with a sentence that ends with the
    answer; docs/teach.md has the other fields. Facts that the folder has already are left out, so
    that the same command goes on after ctrl-C, which leaves the last whole group. A fact that
    contradicts another, in FACTS or in the folder, is refused by name.

    rorqual teach HuggingFaceTB/SmolLM2-135M facts.jsonl --out memory
    rorqual teach HuggingFaceTB/SmolLM2-135M corrected.jsonl --out memory --replace
    rorqual teach HuggingFaceTB/SmolLM2-135M --out memory --undo
    """

    model: Positional[str]  # a folder, a .gguf file or a hub id
    facts: Positional[str] = ""  # JSON lines; none: with --undo, --remove, or to see what is there
    out: str  # the folder of the memory, a new one or one to add to
    replace: bool = False  # teach the new answer where a fact contradicts the folder
    remove: tuple[str, ...] = ()  # subjects to take out of the folder, with all their facts
    undo: bool = False  # restore the memory before the last command that changed it
    passes: int = 24  # how often each fact is asked
    rate: float = 0.4  # of learning, in units of the hidden states
    # weight of the KL to the model as it was, behind subjects in texts that ask nothing; 0 saves
    # its forward passes
    quiet: float = 0.5
    layers: tuple[int, ...] = ()  # blocks that get rows; none: five early ones, or the folder's
    batch_size: int = 64  # facts at a time
    group: int = 500  # subjects after which the folder is written
    evaluate: bool = True  # ask the model at the end, in taught and in held-out wordings
    seed: int = 0
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the model; auto: as stored


def teach_command(argv: list[str]) -> int:
    """Teaches, changes or removes facts; returns the exit code."""
    as_json, argv = take("--json", argv)
    options = parse_new(Teach, argv, "teach")
    if options.undo and (options.facts or options.remove):
        raise UsageError("got --undo with facts or --remove, expected it alone: a step at a time")
    if options.group < 1:
        raise UsageError(f"got --group {options.group}, expected at least 1")
    from rorqual.train.teach import TeachConfig, read_facts_file

    folder = Path(options.out)
    config = TeachConfig(
        layers=options.layers,
        passes=options.passes,
        rate=options.rate,
        quiet=options.quiet,
        batch_size=options.batch_size,
        seed=options.seed,
    )
    # Whatever is wrong with the facts is said before the model is loaded.
    facts = read_facts_file(options.facts) if options.facts else []
    if not facts and not options.remove and not options.undo:
        return _change(folder, options, facts, config, as_json)
    folder.parent.mkdir(parents=True, exist_ok=True)
    refusal = f"{folder}: got a memory that another command changes, expected one at a time"
    with lock_beside(folder, refusal):
        return _change(folder, options, facts, config, as_json)


def _change(
    folder: Path, options: Teach, facts: "Sequence[Fact]", config: "TeachConfig", as_json: bool
) -> int:
    """Teaches, changes or removes facts in a folder that nobody else changes."""
    from rorqual.hub import facts as memories
    from rorqual.train.teach import check, joined

    before = _memory_before(folder, options, facts)
    results: dict[str, Any] = {"folder": str(folder)}
    if options.undo:
        stored = memories.undo_facts(folder)
        results |= {"undone": True}
    elif options.remove:
        assert before is not None
        before = stored = memories.without(before, options.remove)
    if facts:
        joined(facts, before, replace=options.replace)
        model, tokenizer = opened(options)
        if options.remove:
            # The model refuses facts, too; nothing is removed then.
            check(model, tokenizer, facts, config, before=stored, replace=options.replace)
            memories.write_facts(folder, stored)
        stored = _teach_groups(model, tokenizer, facts, before, options, config, as_json)
        if options.evaluate:
            results |= evaluated(model, tokenizer, facts, stored)
    elif options.remove:
        memories.write_facts(folder, stored)
    elif not options.undo:
        assert before is not None
        stored = before
    results |= {
        "subjects": len(stored.entries),
        "facts": sum(len(entry.facts) for entry in stored.entries),
        "layers": stored.layers,
        "bytes": (folder / memories.FILE).stat().st_size,
    }
    if as_json:
        emit(results)
        return 0
    _print(folder, results)
    return 0


def _memory_before(folder: Path, options: Teach, facts: "Sequence[Fact]") -> "Stored | None":
    """Reads the memory that the command changes; UsageError where it needs one and has none."""
    from rorqual.hub import facts as memories

    # A damaged memory can be undone, too.
    readable = (folder / memories.FILE).is_file() and not options.undo
    before = memories.read_facts(folder) if readable else None
    if before is None and not (facts or options.undo):
        raise UsageError(f"got no FACTS and no memory in {folder}, expected one of them")
    if before is None and options.remove:
        raise UsageError(f"got --remove and no memory in {folder}, expected one to remove from")
    return before


def _print(folder: Path, results: "dict[str, Any]") -> None:
    """Prints what is answered, and what the folder holds now."""
    for kind in ("trained", "held_out"):
        if results.get(kind):
            score = results[kind]
            share = score["right"] / score["asked"]
            print(
                f"{score['right']:,} of {score['asked']:,} answers exact ({share:.3f}) in "
                + ("a wording that was trained" if kind == "trained" else "wordings held out")
            )
    print(
        f"{folder}: {results['facts']:,} facts about {results['subjects']:,} subjects, "
        f"{results['bytes']:,} bytes; rq.attach(model, tokenizer, {str(folder)!r}) adds them"
    )


def opened(options: Teach) -> tuple[Any, Any]:
    """Loads the model and its tokenizer; no code of a checkpoint is executed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rorqual import runtime

    path = Path(options.model)
    source: dict[str, Any] = {"pretrained_model_name_or_path": options.model}
    more: dict[str, Any] = {"dtype": options.dtype}
    if path.suffix == ".gguf":
        from transformers import GgufConfig

        if not path.is_file():
            raise ValueError(f"got {options.model!r}, expected a .gguf file that exists")
        source = {"pretrained_model_name_or_path": path.resolve().parent, "gguf_file": path.name}
        more["quantization_config"] = GgufConfig(dequantize=True)
    source["trust_remote_code"] = False
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, **more)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"got {options.model!r}, expected a folder, a .gguf file or a hub id of a causal "
            f"model: {first}"
        ) from error
    return model.eval().to(runtime.device(options.device)), tokenizer


def _teach_groups(
    model: Any,
    tokenizer: Any,
    facts: "Sequence[Fact]",
    before: "Stored | None",
    options: Teach,
    config: "TeachConfig",
    as_json: bool,
) -> "Stored":
    """Teaches the facts group by group and writes the folder after each."""
    from rich.console import Console

    from rorqual.hub import facts as memories
    from rorqual.train.teach import teach

    console = Console(stderr=True, quiet=as_json)
    groups = _groups(facts, options.group)
    stored = before
    # What was removed is written already, and undone together with what is taught.
    first_change = not options.remove
    for number, group in enumerate(groups, 1):
        name = f"group {number} of {len(groups)}, " if len(groups) > 1 else ""
        stored_before = stored
        stored = teach(
            model,
            tokenizer,
            group,
            config,
            before=stored,
            replace=options.replace,
            on_pass=show_progress(console, name),
        )
        if stored is not stored_before:
            # What undo restores is the memory before this command, not before its last group.
            memories.write_facts(Path(options.out), stored, undo=first_change)
            first_change = False
    assert stored is not None
    return stored


def _groups(facts: "Sequence[Fact]", count: int) -> "list[list[Fact]]":
    """Splits facts into groups of `count` subjects; the facts of a subject stay together."""
    by_subject: dict[str, list[Fact]] = {}
    for fact in facts:
        by_subject.setdefault(fact.subject, []).append(fact)
    subjects = list(by_subject.values())
    return [
        [fact for subject in subjects[start : start + count] for fact in subject]
        for start in range(0, len(subjects), count)
    ]


def show_progress(console: Any, name: str) -> "Callable[[Progress], None]":
    """Returns a function that prints a line a pass on a terminal, and every eighth elsewhere."""

    def show(progress: "Progress") -> None:
        done, passes, loss = progress
        if console.is_terminal or done % 8 == 0 or done == passes:
            console.print(f"{name}pass {done} of {passes}: loss {loss:.3f}", highlight=False)

    return show


def evaluated(
    model: Any, tokenizer: Any, facts: "Sequence[Fact]", stored: "Stored"
) -> dict[str, Any]:
    """Asks the model with the memory: each fact in its first wording, and in those held out."""
    from rorqual.hub.attach import attach_facts
    from rorqual.train.teach import answered

    asked = [("trained", fact, fact.prompts[0]) for fact in facts]
    asked += [("held_out", fact, wording) for fact in facts for wording in fact.held_out]
    memory = attach_facts(model, tokenizer, stored)
    try:
        right = answered(model, tokenizer, [(fact, wording) for _, fact, wording in asked])
    finally:
        memory.detach()
    results: dict[str, Any] = {}
    for kind in ("trained", "held_out"):
        of_kind = [ok for ok, (name, *_) in zip(right, asked, strict=True) if name == kind]
        if of_kind:
            results[kind] = {"asked": len(of_kind), "right": sum(of_kind)}
    return results


__all__ = ["Teach", "evaluated", "opened", "teach_command"]
