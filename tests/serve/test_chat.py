"""Tests conversations: history, a context that is full, models without a template."""

import pytest

from rorqual.serve.chat import Conversation
from rorqual.serve.generate import Run
from rorqual.serve.sampling import GREEDY


def test_a_conversation_keeps_its_turns(run):
    conversation = Conversation(run, GREEDY, system="s", max_new_tokens=5, context=128)
    first = "".join(conversation.ask("A"))
    second = "".join(conversation.ask("B"))
    assert conversation.messages == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "B"},
        {"role": "assistant", "content": second},
    ]
    assert conversation.speed.tokens == 5
    ids = run.chat(conversation.messages[:-1])
    assert second == "".join(run.stream(ids, max_new_tokens=5, sampling=GREEDY))
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "s"}]
    assert "".join(conversation.ask("A")) == first


def test_the_oldest_turns_go_where_the_context_is_full(run):
    conversation = Conversation(run, GREEDY, system="s", max_new_tokens=4, context=70)
    for _ in range(4):
        list(conversation.ask("A"))
    assert conversation.dropped > 0
    assert conversation.messages[0]["role"] == "system"
    with pytest.raises(ValueError, match="the context is full"):
        list(conversation.ask("A" * 200))
    assert conversation.messages[0]["role"] == "system"
    assert conversation.messages[-1]["content"] != "A" * 200


def test_a_model_without_a_template_goes_on_with_the_text(run):
    bare = Run(run.model, run.tokenizer)
    conversation = Conversation(bare, GREEDY, max_new_tokens=5, context=40)
    first = "".join(conversation.ask("A whale"))
    assert first == bare.generate("A whale", max_new_tokens=5, temperature=0)
    second = "".join(conversation.ask(" sea"))
    text = "A whale" + first + " sea"
    assert second == bare.generate(text, max_new_tokens=5, temperature=0)
    for _ in range(5):
        list(conversation.ask(" whale"))
    assert conversation.dropped > 0


def test_an_answer_that_is_stopped_stays_as_it_is(run):
    conversation = Conversation(run, GREEDY, max_new_tokens=9, context=128)
    pieces = conversation.ask("A")
    first = next(pieces)
    pieces.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": first}


def test_an_answer_needs_room_in_the_context(run):
    with pytest.raises(ValueError, match="expected 1 to 7"):
        Conversation(run, GREEDY, max_new_tokens=8, context=8)
