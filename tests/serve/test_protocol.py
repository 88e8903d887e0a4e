"""Bodies of requests: what is understood, and that each error names its field."""

import pytest

from rorqual.serve.protocol import parse
from rorqual.serve.sampling import Sampling


def test_a_plain_completion():
    ask = parse({"model": "x", "prompt": "a whale", "max_tokens": 5, "temperature": 0, "stop": "."}, chat=False)
    assert ask.prompts == ("a whale",)
    assert (ask.max_new_tokens, ask.sampling, ask.stop) == (5, Sampling(temperature=0.0), (".",))
    assert (ask.copies, ask.stream, ask.usage) == (1, False, False)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
    ],
)
def test_prompts_are_texts_or_ids(prompt, expected):
    assert parse({"prompt": prompt}, chat=False).prompts == expected


def test_a_chat_with_a_stream():
    body = {
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_completion_tokens": 3,
        "seed": 4,
        "n": 2,
    }
    ask = parse(body, chat=True)
    assert ask.messages == ({"role": "user", "content": "hi"},)
    assert (ask.stream, ask.usage, ask.copies, ask.max_new_tokens, ask.sampling.seed) == (True, True, 2, 3, 4)


def test_what_asks_for_nothing_is_accepted():
    parse(
        {"prompt": "x", "logprobs": None, "presence_penalty": 0, "user": "me", "echo": False, "tools": []}, chat=False
    )


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ([], "body: got list"),
        ({}, "prompt: expected"),
        ({"prompt": ""} | {"prompt": []}, "prompt: expected"),
        ({"prompt": [1, "a"]}, "prompt: expected"),
        ({"prompt": [True]}, "prompt: expected"),
        ({"prompt": "x", "messages": []}, "messages: unknown field"),
        ({"prompt": "x", "temprature": 1}, "temprature: unknown field, did you mean temperature"),
        ({"prompt": "x", "temperature": "hot"}, "temperature: got 'hot'"),
        ({"prompt": "x", "temperature": True}, "temperature: got True"),
        ({"prompt": "x", "top_p": 0}, "top_p"),
        ({"prompt": "x", "top_k": 1.5}, "top_k: got 1.5, expected an integer"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens: got 0"),
        ({"prompt": "x", "n": 65}, "n: got 65"),
        ({"prompt": ["x"] * 40, "n": 2}, "n: got 2 for each of 40"),
        ({"prompt": "x", "stop": [""]}, "stop: got"),
        ({"prompt": "x", "stop": ["a"] * 17}, "stop: got"),
        ({"prompt": "x", "stream": 1}, "stream: got 1"),
        ({"prompt": "x", "logprobs": 5}, "logprobs: got 5, which this server does not do"),
        ({"prompt": "x", "stream_options": 3}, "stream_options"),
        ({"prompt": "x", "seed": -1}, "seed: got -1"),
    ],
)
def test_a_bad_completion_names_its_field(body, said):
    with pytest.raises(ValueError, match=said):
        parse(body, chat=False)


@pytest.mark.parametrize(
    "messages", [None, [], "hi", [{"role": "user"}], [{"role": "user", "content": None}], [{"role": 1, "content": ""}]]
)
def test_bad_messages(messages):
    with pytest.raises(ValueError, match="messages: expected"):
        parse({"messages": messages}, chat=True)
