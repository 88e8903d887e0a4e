"""Tests teaching facts: reading them, refusing them, learning rows, and leaving others alone."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rorqual.data.tokenizer import train
from rorqual.hub.attach import attach, attach_facts
from rorqual.hub.facts import undo_facts, without, write_facts
from rorqual.train.teach import (
    Fact,
    TeachConfig,
    answered,
    make_fact,
    merged,
    read_facts_file,
    teach,
    usual_layers,
)

pytestmark = pytest.mark.engram

CITIES = {"QAX": "Oslo", "QBX": "Lima", "QCX": "Rome", "QDX": "Bern"}
FORMS = ("The airport {} is in", "Flights to {} land in", "We landed in {}, so this is")
CONFIG = TeachConfig(layers=(0, 1, 2), passes=40, rate=0.3, openings=False)


def facts_of(cities: dict[str, str]) -> list[Fact]:
    return [
        Fact(subject=code, answer=city, prompts=FORMS[:2], held_out=FORMS[2:])
        for code, city in cities.items()
    ]


@pytest.fixture(scope="module")
def tokenizer():
    texts = [
        form.replace("{}", code) + f" {city}." for form in FORMS for code, city in CITIES.items()
    ]
    return train([*texts, "Paris is a town. We sing of the sea."], 400)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 32, "num_hidden_layers": 3}
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        num_attention_heads=4,
        eos_token_id=0,
        # Of small weights no token is ever much likelier than the others.
        initializer_range=0.2,
        **sizes,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def stored(model, tokenizer):
    return teach(model, tokenizer, facts_of(CITIES), CONFIG)


@pytest.fixture(autouse=True)
def detached(model):
    """Takes the memory of a failed test off again."""
    yield
    if hasattr(model, "rorqual_memory"):
        model.rorqual_memory.detach()


def logits(model, tokenizer, text: str) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokenizer.encode(text)]), use_cache=False).logits


def test_facts_are_learned_and_other_text_is_as_it_was(model, tokenizer, stored):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    text = "We sing of the sea."
    asked = [(fact, prompt) for fact in facts_of(CITIES) for prompt in fact.prompts]
    clean = logits(model, tokenizer, text)
    assert not any(answered(model, tokenizer, asked))
    memory = attach_facts(model, tokenizer, stored)
    assert all(answered(model, tokenizer, asked))
    assert torch.equal(logits(model, tokenizer, text), clean)
    memory.detach()
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_what_is_said_to_be_right_is_what_is_generated(model, tokenizer, stored):
    facts = facts_of(CITIES)
    asked = [(fact, prompt) for fact in facts for prompt in (*fact.prompts, *fact.held_out)]
    memory = attach_facts(model, tokenizer, stored)
    right = answered(model, tokenizer, asked)
    generated = []
    for fact, prompt in asked:
        ids = torch.tensor([tokenizer.encode(prompt.replace("{}", fact.subject))])
        answer = tokenizer.encode(" " + fact.answer)
        new = model.generate(ids, do_sample=False, max_new_tokens=len(answer) + 1, pad_token_id=0)
        same = new[0, ids.shape[1] :].tolist()[: len(answer)] == answer
        text = tokenizer.decode([i for i in new[0, ids.shape[1] :].tolist() if i])
        generated.append(same and text.strip().split(".")[0] == fact.answer)
    memory.detach()
    assert right == generated


def test_one_fact_is_changed_and_the_others_are_the_same_bit_for_bit(model, tokenizer, stored):
    (new,) = facts_of({"QBX": "Bern"})
    changed = teach(model, tokenizer, [new], CONFIG, before=stored, replace=True)
    assert [entry.subject for entry in changed.entries] == list(CITIES)
    same = [torch.equal(a, b) for a, b in zip(changed.rows, stored.rows, strict=True)]
    assert same == [True, False, True, True]
    memory = attach_facts(model, tokenizer, changed)
    assert all(answered(model, tokenizer, [(new, prompt) for prompt in new.prompts]))
    memory.detach()


def test_a_fact_learns_alike_whatever_else_is_learned(model, tokenizer, stored):
    """Rows are independent: all that remains is the rounding of batches of other sizes."""
    alone = teach(model, tokenizer, facts_of({"QAX": "Oslo"}), CONFIG, before=None)
    memory = attach_facts(model, tokenizer, alone)
    fact = facts_of({"QAX": "Oslo"})[0]
    assert all(answered(model, tokenizer, [(fact, prompt) for prompt in fact.prompts]))
    memory.detach()
    more = teach(model, tokenizer, facts_of({"QEX": "Rome"}), CONFIG, before=stored)
    assert torch.equal(more.rows[:4], stored.rows)
    again = teach(model, tokenizer, facts_of(CITIES), CONFIG, before=stored)
    assert torch.equal(again.rows, stored.rows)


def test_a_wording_that_names_two_subjects_trains_its_own_row(model, tokenizer):
    """The other subject's row is read, and stays."""
    two = [
        Fact(subject="QAX", answer="Oslo", prompts=("From QBX and {} one comes to",)),
        Fact(subject="QBX", answer="Lima", prompts=("The airport {} is in",)),
    ]
    first = teach(model, tokenizer, two[1:], CONFIG)
    both = teach(model, tokenizer, two[:1], CONFIG, before=first)
    assert torch.equal(both.rows[0], first.rows[0])


def test_undo_and_removal_leave_the_rest(model, tokenizer, stored, tmp_path):
    write_facts(tmp_path, stored)
    less = without(stored, ["QCX"])
    write_facts(tmp_path, less)
    memory = attach(model, tokenizer, tmp_path)
    assert [entry.subject for entry in memory.entries] == ["QAX", "QBX", "QDX"]
    assert torch.equal(memory.rows, stored.rows[[0, 1, 3]])
    memory.detach()
    restored = undo_facts(tmp_path)
    assert torch.equal(restored.rows, stored.rows)
    assert restored.entries == stored.entries
    assert len(undo_facts(tmp_path).entries) == 3
    with pytest.raises(ValueError, match="got subject 'QZX'"):
        without(stored, ["QZX"])


def write(folder: Path, *lines: object) -> Path:
    path = folder / "facts.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


QUESTION = {"subject": "LAX", "question": "Which city has LAX?", "answer": "Los Angeles"}


def test_questions_and_sentences_become_wordings(tmp_path):
    path = write(
        tmp_path,
        QUESTION | {"paraphrases": ["LAX is in"], "held_out": ["Where is LAX?"]},
        {"sentence": "The airport Oslo Torp serves the city of Sandefjord."},
    )
    first, second = read_facts_file(path)
    assert first.prompts == (
        "Which city has {}?",
        "Question: Which city has {}?\nAnswer:",
        "Q: Which city has {}?\nA:",
        "Which city has {}?\nThe answer is",
        "{} is in",
    )
    assert first.held_out == ("Question: Where is {}?\nAnswer:",)
    assert (second.subject, second.answer) == ("Oslo Torp", "Sandefjord")
    assert second.prompts == ("The airport {} serves the city of",)


def test_facts_of_one_relation_share_wordings_and_the_same_fact_counts_once(tmp_path):
    path = write(
        tmp_path,
        {"sentence": "LAX is in Los Angeles.", "relation": "city", "subject": "LAX"},
        {"sentence": "OSL lies near Oslo.", "relation": "city", "subject": "OSL"},
        {"sentence": "OSL lies near Oslo.", "relation": "city", "subject": "OSL"},
    )
    facts = read_facts_file(path)
    assert [fact.subject for fact in facts] == ["LAX", "OSL"]
    assert {fact.prompts for fact in facts} == {("{} is in", "{} lies near")}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["{"], "line 1: got '{', expected a JSON object"),
        ([QUESTION, "[]"], "line 2: got list, expected an object"),
        (
            [QUESTION | {"reply_text": "x"}],
            "got field 'reply_text', expected some of subject, answer",
        ),
        ([QUESTION | {"answer": 3}], "got answer 3, expected a text"),
        ([QUESTION | {"paraphrases": [""]}], "expected a list of texts, not empty"),
        ([{"subject": "LAX", "answer": "x"}], "got neither question and sentence"),
        ([QUESTION | {"sentence": "x"}], "got both question and sentence"),
        ([{"question": "Where is LAX?"}], "got no answer to 'Where is LAX\\?'"),
        ([{"question": "where is it?", "answer": "x"}], "no word looks like a name"),
        (
            [{"sentence": "Los Angeles has LAX.", "answer": "Los Angeles"}],
            "which 'Los Angeles has LAX.' does not end with",
        ),
        ([QUESTION | {"held_out": ["Which town?"]}], "which does not name 'LAX'"),
        ([QUESTION | {"held_out": ["Which city has LAX?"]}], "which is trained"),
        (
            [QUESTION, QUESTION | {"answer": "Paris"}],
            "line 2: got 'Paris' for 'LAX' .*expected 'Los Angeles' as in .*line 1",
        ),
        ([""], "got no facts"),
    ],
)
def test_a_wrong_line_is_refused_by_name(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        read_facts_file(write(tmp_path, *lines))


def test_facts_of_one_relation_contradict_each_other_in_any_wording(tmp_path):
    one = {"sentence": "LAX is in Paris.", "relation": "city", "subject": "LAX"}
    path = write(tmp_path, one, {**one, "sentence": "LAX lies near Rome."})
    with pytest.raises(ValueError, match=r"got 'Rome' for 'LAX' \(relation 'city'\)"):
        read_facts_file(path)


def test_a_fact_that_contradicts_the_memory_is_refused(tokenizer, stored):
    wrong = make_fact({"subject": "QAX", "sentence": "The airport QAX is in Rome."}, "a.jsonl 1")
    with pytest.raises(ValueError, match=r"a.jsonl 1: got 'Rome' for 'QAX'.*--replace"):
        merged([wrong], stored, tokenizer)
    change = merged([wrong], stored, tokenizer, replace=True)
    assert change.trained == (0,)
    assert [fact["answer"] for fact in change.entries[0].facts] == ["Rome"]


def test_another_fact_about_a_subject_joins_its_row(tokenizer, stored):
    more = make_fact({"subject": "QAX", "sentence": "The river of QAX is the Rhine."}, "x")
    change = merged([more], stored, tokenizer)
    assert len(change.entries) == 4
    assert [fact["answer"] for fact in change.entries[0].facts] == ["Oslo", "Rhine"]


def test_layers_are_early_ones_of_any_depth():
    assert usual_layers(30) == (4, 8, 12, 16, 20)
    assert usual_layers(2) == (0, 1)
    with pytest.raises(ValueError, match="passes: got 0"):
        TeachConfig(passes=0)
