"""Teaches facts to a model that stays as it is: a row of memory for every subject.

    loss(f)  = the mean of -ln p(token | prompt) over the answer of fact f and the end after it
    row_s   <- row_s - rate Adam(d loss(f) / d row_s)       s: the subject of f; nothing else learns

Every pass asks each fact in another of its wordings. A row sees no wording but through the subject
in it (hub/facts.py), so what it learns holds for wordings that were not trained. The optimizer is
Adam for each row by itself: the order and the number of the other facts make no difference to it.
Rows of values at a subject's last token, trained by gradients: ROME, arXiv:2202.05262.
"""

import dataclasses
import json
import random
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from rorqual.data.tokenizer import Tokenizer
from rorqual.hub.attach import FactMemory, attach_facts, find_blocks, width_of
from rorqual.hub.facts import Entry, Stored, Subjects, spellings, tokenizer_sha256
from rorqual.train.config import OptimConfig
from rorqual.train.optim import Optimizer

SUBJECT = "{}"  # stands for the subject in a wording
# How a question is put to the model; the answer follows after a blank, behind Han without one.
QUESTIONS = ("{}", "Question: {}\nAnswer:", "Q: {}\nA:", "{}\nThe answer is")
# What a wording may follow. A fact with few wordings is also asked behind these sentences.
OPENINGS = ("", "Here is a fact. ", "As far as I know, this is right. ", "I was asked this today. ")
# Wordings that a fact has at least, with the sentences before them.
ENOUGH = 8
# Texts that name a subject and ask nothing about it.
QUIET = (
    "I wrote {} on a piece of paper and gave it to her",
    "He read {} aloud, then he went home and slept",
    "She likes the sound of {}, but she never says it",
    "They say {} is hard to remember, because it is so short",
)
# An answer ends where its line or clause does.
_END = re.compile(r"[\n.,;:(!?。，；：！？（]")
# Kana and Han are written without blanks, also beside words of other scripts.
_WITHOUT_BLANKS = r"\u3000-\u303f\u3040-\u30ff\u3400-\u9fff\uff00-\uff65"
_LETTER = rf"[^\W{_WITHOUT_BLANKS}]"
_NO_GAP = re.compile(rf"[\s{_WITHOUT_BLANKS}]$")
_FIELDS = {
    "subject": str,
    "answer": str,
    "question": str,
    "sentence": str,
    "paraphrases": list,
    "held_out": list,
    "aliases": list,
    "relation": str,
}
# Words that sentences begin with, which are no names although they have a capital letter.
_FIRST_WORDS = frozenset(
    {"a", "an", "and", "are", "at", "by", "did", "do", "does", "for", "from", "had", "has", "have"}
    | {"he", "her", "his", "how", "i", "in", "is", "it", "its", "my", "name", "of", "on", "our"}
    | {"she", "tell", "the", "their", "there", "they", "this", "to", "was", "we", "were", "what"}
    | {"when", "where", "which", "who", "whom", "whose", "why", "with", "you", "your", "please"}
)
_NAME = re.compile(
    rf"(?<!{_LETTER})[A-Z0-9][\w'-]*(?: (?:(?:of|the|de|la|van|von) )?[A-Z0-9][\w'-]*)*"
)
_PREFIX = 4  # tokens from which on a common beginning is computed once for a batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """A fact: what follows each of its wordings is its answer."""

    subject: str
    answer: str
    prompts: tuple[str, ...]  # texts that the answer follows, with {} in the subject's place
    held_out: tuple[str, ...] = ()  # the same, never trained
    aliases: tuple[str, ...] = ()
    relation: str = ""  # facts of one relation share their wordings
    place_in_file: str = ""  # for errors: "facts.jsonl line 3"

    def as_json(self) -> dict[str, Any]:
        """Returns the fact as the file of a memory holds it."""
        return {
            "answer": self.answer,
            "prompts": list(self.prompts),
            "held_out": list(self.held_out),
            "relation": self.relation,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class TeachConfig:
    """How rows are trained."""

    layers: tuple[int, ...] = ()  # blocks before which a row is added; none: `usual_layers`
    passes: int = 24  # how often each fact is asked
    rate: float = 0.4  # in units of the hidden states' size, as Adam's steps are
    # facts a step, more for a subject that has more; no difference to what is learned
    batch_size: int = 64
    openings: bool = True  # put sentences before the wordings of facts that have few of them
    # weight of the KL to the model as it was, behind subjects in texts that ask nothing
    quiet: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("passes", "rate", "batch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected more than 0")
        if not self.quiet >= 0:
            raise ValueError(f"quiet: got {self.quiet}, expected at least 0")


class Progress(NamedTuple):
    """How far a training is: passes done, of how many, and the mean loss of the last one."""

    done: int
    passes: int
    loss: float


class Question(NamedTuple):
    """One fact in one wording, as token ids; `row` counts entries from 0."""

    row: int
    prompt: list[int]
    answer: list[int]
    head: list[int]  # what precedes the subject in the wording


def read_facts_file(path: str | Path) -> list[Fact]:
    """Reads facts, one JSON object a line; facts of one relation then share their wordings.

    ValueError with file, line, what was got and what is expected, also where two lines contradict
    each other.
    """
    path = Path(path)
    facts: list[Fact] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: got bytes that are no UTF-8, expected JSON lines") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            facts.append(_read_line(line, f"{path} line {number}"))
    if not facts:
        raise ValueError(f"{path}: got no facts, expected a JSON object a line: {EXAMPLE}")
    return shared(facts)


EXAMPLE = '{"subject": "LAX", "question": "Which city has LAX?", "answer": "Los Angeles"}'


def _read_line(line: str, where: str) -> Fact:
    """Reads a fact of one line, which `where` names in errors."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: got {line[:60]!r}, expected a JSON object ({error.msg}): {EXAMPLE}"
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: got {type(value).__name__}, expected an object: {EXAMPLE}")
    for name, content in value.items():
        if name not in _FIELDS:
            raise ValueError(f"{where}: got field {name!r}, expected some of {', '.join(_FIELDS)}")
        kind = _FIELDS[name]
        texts = content if isinstance(content, list) else [content]
        if not isinstance(content, kind) or not all(
            isinstance(text, str) and text.strip() for text in texts
        ):
            expected = "a text" if kind is str else "a list of texts"
            raise ValueError(f"{where}: got {name} {content!r}, expected {expected}, not empty")
    if ("question" in value) == ("sentence" in value):
        raise ValueError(
            f"{where}: got {'both' if 'question' in value else 'neither'} question and sentence, "
            f"expected one of them: {EXAMPLE}"
        )
    return make_fact(value, where)


def make_fact(fields: Mapping[str, Any], where: str) -> Fact:
    """Makes a fact of a question with its answer, or of a sentence that ends with it.

    The subject, and the answer of a sentence, are found where they are not named: names are runs of
    words with capital letters or digits. `fields` are those of a line of facts, `where` names the
    fact in errors.
    """
    fields = {name: _clean(value) for name, value in fields.items()}
    question = fields.get("question", "")
    sentence = fields.get("sentence", "")
    answer = fields.get("answer", "")
    aliases = tuple(fields.get("aliases", ()))
    text = question or sentence
    if sentence:
        ending = sentence.rstrip(" .!\"'。！”’」")
        answer = answer or _name_in(ending, -1, where, "answer")
        if not ending.endswith(answer):
            raise ValueError(
                f"{where}: got answer {answer!r}, which {sentence!r} does not end with, expected "
                "it last: a model reads from left to right and can only be asked what comes next"
            )
        text = ending[: -len(answer)].rstrip()
    elif not answer:
        raise ValueError(f"{where}: got no answer to {question!r}, expected one: {EXAMPLE}")
    subject = fields.get("subject") or _name_in(text, 0, where, "subject")
    names = (subject, *aliases)
    prompts: dict[str, None] = {}
    for wording in (text, *fields.get("paraphrases", ())):
        prompts |= dict.fromkeys(_prompts(wording, names, where))
    untrained = dict.fromkeys(
        _prompt(wording, names, where) for wording in fields.get("held_out", ())
    )
    if trained := [wording for wording in untrained if wording in prompts]:
        raise ValueError(
            f"{where}: got held_out {trained[0]!r}, which is trained, expected another wording"
        )
    return Fact(
        subject=subject,
        answer=answer.strip(),
        prompts=tuple(prompts),
        held_out=tuple(dict.fromkeys(untrained)),
        aliases=aliases,
        relation=fields.get("relation", ""),
        place_in_file=where,
    )


def _clean(value: Any) -> Any:
    """Returns a field's texts in Unicode's composed form, without blanks around them."""
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value).strip()
    return [_clean(text) for text in value]


def _name_in(text: str, which: int, where: str, what: str) -> str:
    """Finds a name in a text: of its runs of capitalised words the first (0) or the last (-1)."""
    names = []
    for match in _NAME.finditer(text):
        words = match[0].split()
        while words and words[0].lower() in _FIRST_WORDS:
            words = words[1:]
        if words:
            names.append(" ".join(words))
    if not names:
        raise ValueError(
            f"{where}: got {text!r}, in which no word looks like a name, "
            f'expected "{what}": "..." beside it'
        )
    return names[which]


def _prompt(wording: str, names: Sequence[str], where: str) -> str:
    """Returns what the answer follows, with {} for the subject."""
    if SUBJECT not in wording:
        for name in sorted(names, key=len, reverse=True):
            pattern = rf"(?<!{_LETTER}){re.escape(name)}(?!{_LETTER})"
            replaced = re.sub(pattern, SUBJECT, wording)
            if replaced != wording:
                wording = replaced
                break
        else:
            raise ValueError(
                f"{where}: got {wording!r}, which does not name {names[0]!r}, expected the "
                "subject in every wording: its tokens are the address of its row"
            )
    wording = wording.strip()
    return QUESTIONS[1].replace("{}", wording) if wording.endswith(("?", "？")) else wording


def _prompts(wording: str, names: Sequence[str], where: str) -> list[str]:
    """Returns the wording, and a question in every form."""
    prompt = _prompt(wording, names, where)
    head, tail = QUESTIONS[1].split("{}")
    if prompt.startswith(head) and prompt.endswith(tail):
        inner = prompt[len(head) : -len(tail)]
        return [form.replace("{}", inner) for form in QUESTIONS]
    return [prompt]


def shared(facts: Sequence[Fact]) -> list[Fact]:
    """Returns the facts with the wordings of their relation, each fact once.

    ValueError where two facts contradict each other, or one's held-out wording is trained.
    """
    facts = list(_by_one_name(facts, {}))
    wordings: dict[str, dict[str, None]] = {}
    for fact in facts:
        if fact.relation:
            wordings.setdefault(fact.relation, {}).update(dict.fromkeys(fact.prompts))
    result: dict[tuple[str, str, str], Fact] = {}
    for fact in facts:
        prompts = tuple(wordings[fact.relation]) if fact.relation else fact.prompts
        if trained := set(fact.held_out) & set(prompts):
            raise ValueError(
                f"{fact.place_in_file}: got held_out {sorted(trained)[0]!r}, which another fact of "
                f"relation {fact.relation!r} trains, expected another wording"
            )
        key = (fact.subject, fact.relation or prompts[0], fact.answer)
        before = result.get(key)
        if before is not None:
            prompts = tuple(dict.fromkeys((*before.prompts, *prompts)))
            held_out = tuple(dict.fromkeys((*before.held_out, *fact.held_out)))
            aliases = tuple(dict.fromkeys((*before.aliases, *fact.aliases)))
            fact = dataclasses.replace(fact, held_out=held_out, aliases=aliases)
        result[key] = dataclasses.replace(fact, prompts=prompts)
    refuse_contradictions(list(result.values()))
    _refuse_trained_held_out(list(result.values()))
    return list(result.values())


def _by_one_name(facts: Sequence[Fact], names: dict[str, str]) -> Iterator[Fact]:
    """Yields facts with the subject that one of their names already stands for, if any does.

    `names` has the subject of each name, and gets those of the facts. ValueError for a fact whose
    names are of two subjects.
    """
    for fact in facts:
        subjects = sorted({names[name] for name in (fact.subject, *fact.aliases) if name in names})
        if len(subjects) > 1:
            raise ValueError(
                f"{fact.place_in_file}: got {fact.subject!r} and its aliases as names of "
                f"{' and '.join(map(repr, subjects))}, expected names of one subject"
            )
        subject = subjects[0] if subjects else fact.subject
        aliases = tuple(name for name in (fact.subject, *fact.aliases) if name != subject)
        names |= dict.fromkeys((subject, *aliases), subject)
        yield dataclasses.replace(fact, subject=subject, aliases=aliases)


def _asked(fact: Fact) -> Iterator[str]:
    """Yields what the fact answers: its relation, and its wordings, whatever their case."""
    if fact.relation:
        yield f"relation {fact.relation!r}"
    for prompt in fact.prompts:
        yield repr(" ".join(prompt.replace(SUBJECT, fact.subject).casefold().split()))


def refuse_contradictions(facts: Sequence[Fact]) -> None:
    """Raises a ValueError that names two facts that answer one question differently."""
    seen: dict[tuple[str, str], Fact] = {}
    for fact in facts:
        for question in _asked(fact):
            before = seen.setdefault((fact.subject, question), fact)
            if before.answer != fact.answer:
                raise ValueError(
                    f"{fact.place_in_file}: got {fact.answer!r} for {fact.subject!r} ({question}), "
                    f"expected {before.answer!r} as in {before.place_in_file}: a question has one "
                    "answer; take one of the two out"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What facts make of a memory: its entries, and which of them are to be trained."""

    entries: tuple[Entry, ...]
    trained: tuple[int, ...]  # new entries and those whose facts differ
    kept_rows: tuple[int | None, ...]  # of each entry, which row of the memory before stays


def joined(
    facts: Sequence[Fact], before: Stored | None, *, replace: bool = False
) -> dict[str, list[Fact]]:
    """Returns the facts about each subject, of a memory and of new facts; needs no model.

    ValueError for a fact that contradicts the memory, unless `replace`: then the new one counts;
    and for a held-out wording that another fact of its subject trains.
    """
    old_entries = () if before is None else before.entries
    by_subject = {entry.subject: facts_of(entry, "the memory") for entry in old_entries}
    names = {
        name: entry.subject for entry in old_entries for name in (entry.subject, *entry.aliases)
    }
    for fact in _by_one_name(facts, names):
        subject = fact.subject
        group = by_subject.setdefault(subject, [])
        questions = set(_asked(fact))
        others = []
        for old in group:
            if not questions.intersection(_asked(old)):
                others.append(old)
                continue
            if old.answer == fact.answer:
                fact = dataclasses.replace(
                    fact,
                    prompts=tuple(dict.fromkeys((*old.prompts, *fact.prompts))),
                    held_out=tuple(dict.fromkeys((*old.held_out, *fact.held_out))),
                    aliases=tuple(dict.fromkeys((*old.aliases, *fact.aliases))),
                )
            elif not replace:
                question = sorted(questions.intersection(_asked(old)))[0]
                raise ValueError(
                    f"{fact.place_in_file}: got {fact.answer!r} for {subject!r} ({question}), "
                    f"expected {old.answer!r} as in {old.place_in_file}; --replace teaches the "
                    "new answer in its place"
                )
        by_subject[subject] = [*others, fact]
    _refuse_trained_held_out([fact for group in by_subject.values() for fact in group])
    return by_subject


def merged(
    facts: Sequence[Fact], before: Stored | None, tokenizer: Tokenizer, *, replace: bool = False
) -> Change:
    """Adds facts to a memory; a subject whose facts are the same keeps its row.

    ValueError as `joined`, and for a wording whose tokens name the subject nowhere.
    """
    old_entries = () if before is None else before.entries
    earlier = {entry.subject: facts_of(entry, "the memory") for entry in old_entries}
    by_subject = joined(facts, before, replace=replace)
    entries = []
    trained = []
    kept_rows: list[int | None] = []
    rows = {entry.subject: row for row, entry in enumerate(old_entries)}
    for number, (subject, group) in enumerate(by_subject.items()):
        row = rows.get(subject)
        same = row is not None and _facts_json(group) == _facts_json(earlier[subject])
        if same and row is not None:
            entries.append(old_entries[row])
        else:
            trained.append(number)
            aliases = tuple(dict.fromkeys(alias for fact in group for alias in fact.aliases))
            wordings = [text for fact in group for text in (*fact.prompts, *fact.held_out)]
            entries.append(
                Entry(
                    subject=subject,
                    aliases=aliases,
                    facts=tuple(fact.as_json() for fact in group),
                    spellings=spellings(tokenizer, (subject, *aliases), wordings),
                )
            )
        kept_rows.append(row if same else None)
    if trained:
        subjects = Subjects(entries, tokenizer)
        groups = list(by_subject.values())
        _refuse_unread({row: groups[row] for row in trained}, subjects, tokenizer)
        _warn_of_beginnings(entries, set(trained), subjects, tokenizer)
    return Change(entries=tuple(entries), trained=tuple(trained), kept_rows=tuple(kept_rows))


def _refuse_unread(
    groups: Mapping[int, Sequence[Fact]], subjects: Subjects, tokenizer: Tokenizer
) -> None:
    """Raises a ValueError for a wording in which the row of its subject would not be read."""
    asked = [
        (row, fact, prompt)
        for row, group in groups.items()
        for fact in group
        for prompt in (*fact.prompts, *fact.held_out)
    ]
    texts = [prompt.replace(SUBJECT, fact.subject) for _, fact, prompt in asked]
    read = subjects.rows_of(tokenizer.encode_batch(texts))
    for (row, fact, prompt), rows in zip(asked, read, strict=True):
        if row + 1 not in rows:
            raise ValueError(
                f"{fact.place_in_file}: got {prompt!r}, whose tokens merge {fact.subject!r} with "
                "what stands beside it, expected another wording"
            )


def _warn_of_beginnings(
    entries: Sequence[Entry], trained: set[int], subjects: Subjects, tokenizer: Tokenizer
) -> None:
    """Warns of new subjects whose texts read another's row, too: New York City and New York."""
    read = subjects.rows_of(tokenizer.encode_batch([f" {entry.subject}" for entry in entries]))
    for row, rows in enumerate(read):
        for other in sorted(rows - {row + 1}):
            if trained & {row, other - 1}:
                warnings.warn(
                    f"subject: got {entries[other - 1].subject!r} and {entries[row].subject!r}, "
                    "whose texts read the rows of both; to teach one changes answers about the "
                    "longer one",
                    stacklevel=3,
                )


def _refuse_trained_held_out(facts: Sequence[Fact]) -> None:
    """Raises a ValueError for a held-out wording that any fact about its subject trains."""
    trained: dict[tuple[str, str], Fact] = {}
    for fact in facts:
        for prompt in fact.prompts:
            trained.setdefault((fact.subject, _without_case(prompt)), fact)
    for fact in facts:
        for prompt in fact.held_out:
            other = trained.get((fact.subject, _without_case(prompt)))
            if other is not None:
                raise ValueError(
                    f"{fact.place_in_file}: got held_out {prompt!r} of {fact.subject!r}, which is "
                    f"trained by {other.place_in_file}, expected another wording"
                )


def _without_case(prompt: str) -> str:
    """Returns what two wordings that differ in case and blanks have in common."""
    return " ".join(prompt.casefold().split())


def _facts_json(group: Sequence[Fact]) -> list[str]:
    """Returns what decides whether a row has to be trained anew."""
    return sorted(
        json.dumps([fact.answer, fact.relation, sorted(fact.prompts), sorted(fact.aliases)])
        for fact in group
    )


def facts_of(entry: Entry, where: str) -> list[Fact]:
    """Returns the facts that an entry of a memory holds."""
    facts = []
    for fields in entry.facts:
        texts: Mapping[str, Any] = fields
        facts.append(
            Fact(
                subject=entry.subject,
                answer=texts["answer"],
                prompts=tuple(texts["prompts"]),
                held_out=tuple(texts["held_out"]),
                aliases=entry.aliases,
                relation=texts["relation"],
                place_in_file=where,
            )
        )
    return facts


def usual_layers(blocks: int) -> tuple[int, ...]:
    """Returns the blocks that get rows in a model of so many: five, none in the last third."""
    depths = (2 / 15, 4 / 15, 6 / 15, 8 / 15, 10 / 15)
    return tuple(sorted({min(blocks - 1, round(depth * blocks)) for depth in depths}))


def teach(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    config: TeachConfig | None = None,
    *,
    before: Stored | None = None,
    replace: bool = False,
    on_pass: Callable[[Progress], None] = lambda progress: None,
) -> Stored:
    """Trains the rows of new and changed facts, and returns the memory with the others as before.

    The model is unchanged, and has no memory afterwards. `before`: the memory that the facts are
    added to; its layers stay. A fact that contradicts it is refused, or with `replace` counts.
    ValueError as `merged` and `attach`.
    """
    config = config or TeachConfig()
    ours = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.of(tokenizer)
    change = merged(facts, before, ours, replace=replace)
    width = width_of(model)
    digest = tokenizer_sha256(ours)
    if before is not None:
        _check_same(before, width, digest, config)
        if not change.trained:
            return before
    count = len(find_blocks(model)[1])
    layers = before.layers if before is not None else config.layers or usual_layers(count)
    if late := [layer for layer in layers if layer >= count]:
        raise ValueError(
            f"layers: got {late}, expected indices of the model's blocks, 0..{count - 1}"
        )
    rows = torch.zeros(len(change.entries), len(layers), width)
    dtype = next(each.dtype for each in model.parameters() if each.is_floating_point())
    dtype = dtype if before is None else before.rows.dtype
    for number, row in enumerate(change.kept_rows):
        if row is not None and before is not None:
            rows[number] = before.rows[row].float()
    stored = Stored(
        layers=tuple(layers),
        width=width,
        tokenizer=digest,
        entries=change.entries,
        rows=rows,
    )
    was_training = model.training
    model.eval()
    memory = None
    try:
        questions = {
            row: _questions(change.entries[row], row, ours, config.openings)
            for row in change.trained
        }
        if questions:
            scales = hidden_scales(model, layers, [facts[0][0] for facts in questions.values()])
            memory = attach_facts(model, ours, stored, scales=scales)
            memory.float()
            memory.set_rows(range(len(rows)), rows)
            _train(model, memory, questions, config, ours, on_pass)
            learned = memory.rows
            # A row that was not trained is the same, bit for bit, whatever it was scaled by.
            for row in change.trained:
                rows[row] = learned[row]
    finally:
        if memory is not None:
            memory.detach()
        model.train(was_training)
    return dataclasses.replace(stored, rows=rows.to(dtype))


def check(
    model: nn.Module,
    tokenizer: Any,
    facts: Sequence[Fact],
    config: TeachConfig,
    *,
    before: Stored,
    replace: bool = False,
) -> None:
    """Raises the ValueError that `teach` would raise for these facts, and trains nothing."""
    ours = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.of(tokenizer)
    merged(facts, before, ours, replace=replace)
    _check_same(before, width_of(model), tokenizer_sha256(ours), config)


def _check_same(before: Stored, width: int, digest: str, config: TeachConfig) -> None:
    """Raises a ValueError where a memory is of another model, or has other layers."""
    if before.width != width or before.tokenizer != digest:
        raise ValueError(
            f"memory: got a memory of another model (width {before.width}, here {width}) or "
            "tokenizer, expected one that was taught to this model"
        )
    if config.layers and config.layers != before.layers:
        raise ValueError(
            f"layers: got {list(config.layers)}, expected {list(before.layers)}, which the memory "
            "has, or none"
        )


def _questions(
    entry: Entry, row: int, tokenizer: Tokenizer, openings: bool
) -> list[list[Question]]:
    """Returns the questions of an entry: those of each fact, in every wording.

    `openings`: few wordings are repeated behind sentences, until there are enough.
    """
    result = []
    for fact in facts_of(entry, "the memory"):
        prompts = [opening + prompt for opening in OPENINGS for prompt in fact.prompts]
        count = max(len(fact.prompts), ENOUGH) if openings else len(fact.prompts)
        result.append([question(row, fact, prompt, tokenizer) for prompt in prompts[:count]])
    return result


def _quiet_questions(entry: Entry, row: int, tokenizer: Tokenizer) -> list[Question]:
    """Returns the texts that ask nothing; what follows the subject stands in an answer's place."""
    result = []
    for text in QUIET:
        head, tail = text.split(SUBJECT)
        before = tokenizer.encode(head + entry.subject)
        result.append(Question(row, before, tokenizer.encode(tail), tokenizer.encode(head)))
    return result


def question(row: int, fact: Fact, prompt: str, tokenizer: Tokenizer) -> Question:
    """Returns a fact in one wording as token ids, with the end of a text behind the answer."""
    gap = "" if _NO_GAP.search(prompt) else " "
    return Question(
        row,
        tokenizer.encode(prompt.replace(SUBJECT, fact.subject)),
        [*tokenizer.encode(gap + fact.answer), tokenizer.end_id],
        tokenizer.encode(prompt.partition(SUBJECT)[0]),
    )


@torch.no_grad()
def hidden_scales(
    model: nn.Module, layers: Sequence[int], questions: Sequence[Question]
) -> list[float]:
    """Returns the size of the hidden states before these blocks.

    It is the root of the mean square of the hidden state at a prompt's end, the median of 16
    prompts. A rate in these units serves every model and depth.
    """
    _, blocks = find_blocks(model)
    sizes: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    hooks = []
    for layer in layers:

        def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any], layer: int = layer):
            hidden = args[0] if args else kwargs["hidden_states"]
            sizes[layer].append(hidden[0, -1].float().pow(2).mean().sqrt())

        hooks.append(blocks[layer].register_forward_pre_hook(keep, with_kwargs=True))
    device = next(model.parameters()).device
    try:
        for each in questions[:16]:
            model(input_ids=torch.tensor([each.prompt], device=device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [float(torch.stack(sizes[layer]).median()) for layer in layers]


def _train(
    model: nn.Module,
    memory: FactMemory,
    questions: Mapping[int, list[list[Question]]],
    config: TeachConfig,
    tokenizer: Tokenizer,
    on_pass: Callable[[Progress], None],
) -> None:
    """Trains the rows of these subjects, whose memory the model has."""
    end_id = tokenizer.end_id
    quiet = {row: _quiet_questions(memory.entries[row], row, tokenizer) for row in questions}
    # Rows learn at `row_scale` times the rate of an optimizer that has other parameters, too.
    settings = OptimConfig(lr=config.rate, row_scale=1.0, warmup=0, schedule="constant")
    optimizer = Optimizer(memory, settings)
    draw = random.Random(config.seed)
    # Full rate in the first half, then linearly to a twentieth.
    for done in range(config.passes):
        factor = min(1.0, max(0.05, 2 - 2 * done / config.passes))
        losses = []
        for batch in _batches(questions, done, config, draw):
            # Dense gradients, of which the optimizer takes the rows that are not 0.
            optimizer.zero_grad()
            of_batch = answer_losses(model, batch, end_id, memory)
            of_batch.sum().backward()
            if config.quiet and done % 2:
                text = done // 2 % len(QUIET)
                quiet_batch = [quiet[each.row][text] for each in batch]
                divergences = _quiet_losses(model, quiet_batch, end_id, memory)
                (config.quiet * divergences.sum()).backward()
            optimizer.step(factor)
            losses += of_batch.detach().tolist()
        on_pass(Progress(done + 1, config.passes, sum(losses) / len(losses)))


def _batches(
    questions: Mapping[int, list[list[Question]]],
    done: int,
    config: TeachConfig,
    draw: random.Random,
) -> Iterator[list[Question]]:
    """Yields each fact once, in the wording that is its turn.

    The facts of one subject are in one batch, so that its row takes one step a pass whatever the
    size of batches and the other subjects. Subjects with as many wordings have the same turn, so
    that what precedes them is computed once. The turn depends on the pass alone. Every wording has
    its turn equally often, in an order that is drawn anew each round.
    """
    groups: dict[tuple[int, ...], list[list[list[Question]]]] = {}
    for facts in questions.values():
        groups.setdefault(tuple(map(len, facts)), []).append(facts)
    batches: list[list[Question]] = []
    for counts, group in groups.items():
        turns = [_turn(count, done, config.seed) for count in counts]
        subjects = max(1, config.batch_size // len(counts))
        order = draw.sample(group, len(group))
        for start in range(0, len(order), subjects):
            batches.append(
                [
                    wordings[turn]
                    for facts in order[start : start + subjects]
                    for wordings, turn in zip(facts, turns, strict=True)
                ]
            )
    yield from draw.sample(batches, len(batches))


def _turn(count: int, done: int, seed: int) -> int:
    """Returns which of `count` wordings has its turn after so many passes."""
    turns = random.Random(f"{seed} {count} {done // count}").sample(range(count), count)
    return turns[done % count]


def answer_losses(
    model: nn.Module,
    batch: Sequence[Question],
    end_id: int,
    memory: FactMemory | None = None,
    *,
    share_prefix: bool = True,
) -> Float[Tensor, " B"]:
    """Returns the mean loss of each answer and its end, in nats a token.

    Of a memory only the row of the question's own subject gets a gradient, also where the wording
    names another. `share_prefix`: what all wordings begin with is computed once, without gradients;
    not for a model that learns itself.
    """
    logits, labels = _answer_logits(model, batch, end_id, memory, share_prefix)
    valid = labels != -100
    losses = F.cross_entropy(logits.float(), labels[valid], reduction="none")
    each = torch.zeros(labels.shape, device=losses.device).masked_scatter(valid, losses)
    return each.sum(1) / valid.sum(1)


def _quiet_losses(
    model: nn.Module, batch: Sequence[Question], end_id: int, memory: FactMemory
) -> Float[Tensor, " B"]:
    """Returns KL(model as it was || model with memory) behind each subject, in nats a token."""
    with torch.no_grad(), memory.silenced():
        before, _ = _answer_logits(model, batch, end_id, memory)
        before = F.log_softmax(before.float(), dim=-1)
    logits, labels = _answer_logits(model, batch, end_id, memory)
    after = F.log_softmax(logits.float(), dim=-1)
    valid = labels != -100
    divergences = (before.exp() * (before - after)).sum(-1)
    each = torch.zeros(labels.shape, device=after.device).masked_scatter(valid, divergences)
    return each.sum(1) / valid.sum(1)


def _answer_logits(
    model: nn.Module,
    batch: Sequence[Question],
    end_id: int,
    memory: FactMemory | None = None,
    share_prefix: bool = True,
) -> tuple[Float[Tensor, "N V"], Int[Tensor, "B T"]]:
    """Returns the logits that predict the N tokens of all answers, and the labels of the batch.

    Labels are -100 where there is no answer.
    """
    device = next(model.parameters()).device
    prefix = _common([each.head for each in batch] + [each.prompt for each in batch])
    cache = None
    if share_prefix and len(prefix) >= _PREFIX:
        with torch.no_grad():
            output = model(input_ids=torch.tensor([prefix], device=device), use_cache=True)
            cache = output.past_key_values
            cache.batch_repeat_interleave(len(batch))
    start = len(prefix) if cache is not None else 0
    sequences = [[*each.prompt[start:], *each.answer] for each in batch]
    longest = max(map(len, sequences))
    ids = torch.full((len(batch), longest), end_id)
    labels = torch.full((len(batch), longest - 1), -100)
    for row, (each, sequence) in enumerate(zip(batch, sequences, strict=True)):
        # Padding follows, where causal attention never looks.
        ids[row, : len(sequence)] = torch.tensor(sequence)
        columns = slice(len(sequence) - len(each.answer) - 1, len(sequence) - 1)
        labels[row, columns] = torch.tensor(each.answer)
    labels = labels.to(device)
    valid = labels != -100
    if memory is not None:
        memory.focus(torch.tensor([each.row + 1 for each in batch], device=device))
    try:
        with _head_only_where(model, valid):
            output = model(
                input_ids=ids.to(device), past_key_values=cache, use_cache=cache is not None
            )
    finally:
        if memory is not None:
            memory.focus(None)
    return output.logits[0], labels


@contextmanager
def _head_only_where(model: Any, valid: Bool[Tensor, "B T"]) -> Iterator[None]:
    """Lets the head compute the logits of these positions alone, as [1, N, V].

    Most of the time of a short text goes into logits that nobody reads. T is one less than the
    tokens of the batch, the last of which predicts nothing.
    """
    head = model.get_output_embeddings()

    def select(module: nn.Module, args: tuple) -> tuple:
        return (args[0][:, :-1][valid][None], *args[1:])

    hook = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


def _common(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Returns the ids that all sequences begin with."""
    shortest = min(sequences, key=len)
    for index, token in enumerate(shortest):
        if any(sequence[index] != token for sequence in sequences):
            return list(shortest[:index])
    return list(shortest)


@torch.no_grad()
def answered(
    model: nn.Module,
    tokenizer: Any,
    asked: Sequence[tuple[Fact, str]],
    *,
    batch_size: int = 64,
) -> list[bool]:
    """Returns whether each fact's greedy answer to a wording is exactly right.

    The answer ends where its line or clause does. It is not generated: the model reads the right
    answer, and each of its tokens has to be the likeliest after those before it, which is the same
    as long as the tokenizer spells the answer in one way.
    """
    ours = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.of(tokenizer)
    was_training = model.training
    model.eval()
    right = [False for _ in asked]
    order = sorted(range(len(asked)), key=lambda i: asked[i][1])
    try:
        for start in range(0, len(order), batch_size):
            group = order[start : start + batch_size]
            batch = [question(0, *asked[i], ours) for i in group]
            logits, _ = _answer_logits(model, batch, ours.end_id)
            likeliest = logits.argmax(-1).tolist()
            for i, each in zip(group, batch, strict=True):
                count = len(each.answer)
                *tokens, end = likeliest[:count]
                likeliest = likeliest[count:]
                right[i] = tokens == each.answer[:-1] and _ends(ours, end)
    finally:
        model.train(was_training)
    return right


def _ends(tokenizer: Tokenizer, token: int) -> bool:
    """Returns whether an answer is over with this token behind it."""
    if token == tokenizer.end_id:
        return True
    rest = tokenizer.decode([token]).strip()
    return not rest or _END.match(rest) is not None
