"""Tests the parsing of request bodies: what is accepted, and that each error names its field."""

import pytest

from rorqual.serve.protocol import parse
from rorqual.serve.sampling import Sampling


def test_a_plain_completion():
    body = parse(
        {"model": "x", "prompt": "a whale", "max_tokens": 5, "temperature": 0, "stop": "."},
        chat=False,
    )
    assert body.prompts == ("a whale",)
    assert (body.max_new_tokens, body.sampling, body.stop) == (5, Sampling(temperature=0.0), (".",))
    assert (body.copies, body.stream, body.usage) == (1, False, False)


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
    request = parse(body, chat=True)
    assert request.messages == ({"role": "user", "content": "hi"},)
    assert (
        request.stream,
        request.usage,
        request.copies,
        request.max_new_tokens,
        request.sampling.seed,
    ) == (
        True,
        True,
        2,
        3,
        4,
    )


def test_what_asks_for_nothing_is_accepted():
    parse(
        {
            "prompt": "x",
            "logprobs": None,
            "presence_penalty": 0,
            "user": "me",
            "echo": False,
            "tools": [],
        },
        chat=False,
    )


@pytest.mark.parametrize(
    ("body", "message"),
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
        ({"prompt": "x", "top_p": -0.1}, "top_p: got -0.1"),
        ({"prompt": "x", "top_k": -2}, "top_k: got -2"),
        ({"prompt": "x", "guided_json": {}}, "guided_json: got {}, which this server does not do"),
        ({"prompt": "x", "response_format": {"type": "json_object"}}, "response_format: got"),
        ({"prompt": "x", "model": 5}, "model: got 5"),
        ({"prompt": "x", "top_k": 1.5}, "top_k: got 1.5, expected an integer"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens: got 0"),
        ({"prompt": "x", "n": 65}, "n: got 65"),
        ({"prompt": ["x"] * 40, "n": 2}, "n: got 2 for each of 40"),
        ({"prompt": "x", "stop": [""]}, "stop: got"),
        ({"prompt": "x", "stop": ["a"] * 17}, "stop: got"),
        ({"prompt": "x", "stream": 1}, "stream: got 1"),
        ({"prompt": "x", "logprobs": 5}, "logprobs: got 5, which this server does not do"),
        ({"prompt": "x", "stream_options": 3}, "stream_options"),
        ({"prompt": "x", "seed": 2**63}, "seed: got 9223372036854775808"),
    ],
)
def test_a_bad_completion_names_its_field(body, message):
    with pytest.raises(ValueError, match=message):
        parse(body, chat=False)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "messages: expected"),
        ([], "messages: expected"),
        ("hi", "messages: expected"),
        (["hi"], r"messages\[0\]: got 'hi'"),
        ([{"role": 1, "content": ""}], r"messages\[0\]: got"),
        ([{"role": "user"}], r"messages\[0\].content: got null"),
        ([{"role": "user", "content": None}], r"messages\[0\].content: got null"),
        (
            [{"role": "user", "content": {"text": "hi"}}],
            r"messages\[0\].content: got {'text': 'hi'}",
        ),
        ([{"role": "user", "content": ["hi"]}], r"messages\[0\].content\[0\]: got 'hi', expected"),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            r"messages\[0\].content\[0\].text: got None",
        ),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "this model reads text only"),
        (
            [{"role": "assistant", "content": None, "tool_calls": [{}]}],
            "tool_calls: this server does not do",
        ),
    ],
)
def test_bad_messages(messages, message):
    with pytest.raises(ValueError, match=message):
        parse({"messages": messages}, chat=True)


def test_messages_as_clients_send_them():
    parts = [{"type": "text", "text": "a \ud83d\udc0b"}, {"type": "text", "text": "b \ud83d"}]
    messages = [
        {"role": "system", "content": "s", "name": "x"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": None},
    ]
    assert parse({"messages": messages}, chat=True).messages == (
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a 🐋\nb \ufffd"},
        {"role": "assistant", "content": ""},
    )


def test_fields_of_other_servers():
    body = parse(
        {"prompt": "\udc0b", "top_k": -1, "top_p": 0, "user": "me", "priority": 3, "min_tokens": 0},
        chat=False,
    )
    assert body.prompts == ("\ufffd",)
    assert body.sampling.top_k is None
    assert body.sampling.top_p == 1e-6
    assert body.ignored == ("user", "priority")
    assert parse({"prompt": "x", "top_k": 0}, chat=False).sampling.top_k is None


def test_errors_repeat_little():
    for body in ({"x" * 10**6: 1}, {"seed": [["x" * 99] * 99] * 99}, {"stop": {"x" * 10**6: {}}}):
        with pytest.raises(ValueError) as error:
            parse({"prompt": "x"} | body, chat=False)
        assert len(str(error.value)) < 400
