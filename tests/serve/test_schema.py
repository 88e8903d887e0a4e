"""Tests what requests may hold: what is accepted, and that each error names its field."""

import json

import pytest

for module in ("fastapi", "llguidance", "prometheus_client"):
    pytest.importorskip(module, reason="the extra [serve] is not installed")

from fastapi import FastAPI  # noqa: E402 (after the extra is known to be there)
from fastapi.testclient import TestClient  # noqa: E402

from rorqual.serve.body import loads  # noqa: E402
from rorqual.serve.sampling import Sampling  # noqa: E402
from rorqual.serve.schema import ChatRequest, CompletionRequest  # noqa: E402
from rorqual.serve.server import ERROR_HANDLERS  # noqa: E402

USER = {"role": "user", "content": "hi"}


def completion(**fields):
    return CompletionRequest.model_validate({"prompt": "x"} | fields)


@pytest.fixture(scope="module")
def client():
    """An app that reads requests and answers with what it understood."""
    app = FastAPI(exception_handlers=ERROR_HANDLERS)

    @app.post("/completion")
    def _(request: CompletionRequest) -> str:
        return repr(request)

    @app.post("/chat")
    def _(request: ChatRequest) -> str:
        return repr(request)

    return TestClient(app)


def error(client, path, body):
    answer = client.post(path, json=body)
    assert answer.status_code == 400, answer.text
    assert len(answer.text) < 1200
    return answer.json()["error"]


def test_a_plain_completion():
    body = completion(
        model="x", prompt="a whale", max_tokens=5, temperature=0, stop=".", logit_bias={"3": -1}
    )
    assert (body.prompt, body.new_tokens, body.stop) == (["a whale"], 5, ["."])
    assert body.parameters() == Sampling(temperature=0.0, logit_bias=((3, -1.0),))
    assert (body.copies, body.stream, body.usage_at_end) == (1, None, False)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [(["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1, 2], [3]], [[1, 2], [3]])],
)
def test_prompts_are_texts_or_ids(prompt, expected):
    assert completion(prompt=prompt).prompt == expected


def test_echo_with_logprobs_reads_the_prompt():
    assert completion(echo=True, logprobs=2, max_tokens=0).parameters().prompt_logprobs
    assert completion(echo=True, max_tokens=0).parameters().prompt_logprobs
    assert not completion(echo=True).parameters().prompt_logprobs
    assert not completion(logprobs=1).parameters().prompt_logprobs


def test_a_chat_with_a_stream():
    request = ChatRequest.model_validate(
        {
            "messages": [USER],
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "max_completion_tokens": 3,
            "max_tokens": 9,
            "seed": 4,
            "n": 2,
            "logprobs": True,
            "top_logprobs": 3,
        }
    )
    assert [message.filled() for message in request.messages] == [USER]
    assert (request.new_tokens, request.copies, request.usage_always) == (3, 2, True)
    assert (request.parameters().seed, request.parameters().logprobs) == (4, 3)


def test_what_asks_for_nothing_is_accepted():
    fields = {
        "logprobs": None,
        "presence_penalty": 0,
        "user": "me",
        "best_of": 1,
        "suffix": None,
        "detokenize": True,
    }
    request = completion(**fields)
    assert request.ignored == ("user",)
    # What a client has no value for is null, whatever its name; an empty text never stops.
    request = completion(lora_request=None, bad_words=[], mirostat=0, stop="")
    assert (request.ignored, request.stop) == ((), [])
    assert completion(stop=["", "a"]).stop == ["a"]


BAD = [
    ([], None, "body: got list"),
    ({}, "prompt", "prompt: expected a value"),
    ({"prompt": []}, "prompt", "prompt: expected"),
    ({"prompt": [1, "a"]}, "prompt", "prompt: expected"),
    ({"prompt": [True]}, "prompt", "prompt: expected"),
    ({"prompt": "x", "messages": []}, "messages", "messages: unknown field"),
    ({"prompt": "x", "temprature": 1}, "temprature", "did you mean temperature"),
    ({"prompt": "x", "temperature": "hot"}, "temperature", "temperature: got 'hot'"),
    ({"prompt": "x", "temperature": True}, "temperature", "temperature: got True"),
    ({"prompt": "x", "top_p": -0.1}, "top_p", "top_p: got -0.1"),
    ({"prompt": "x", "top_k": -2}, "top_k", "top_k: got -2"),
    ({"prompt": "x", "guided_json": {}}, "guided_json", "which this server does not do"),
    ({"prompt": "x", "detokenize": False}, "detokenize", "which this server does not do"),
    (
        {"prompt": "x", "truncate_prompt_tokens": 0},
        "truncate_prompt_tokens",
        "truncate_prompt_tokens: got 0",
    ),
    (
        {"prompt": "x", "echo": True, "truncate_prompt_tokens": 3},
        "truncate_prompt_tokens",
        "beside echo, expected one of the two",
    ),
    ({"prompt": "x", "model": 5}, "model", "model: got 5"),
    ({"prompt": "x", "top_k": 1.5}, "top_k", "top_k: got 1.5, expected a valid integer"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens", "max_tokens: got 0"),
    ({"prompt": "x", "n": 65}, "n", "n: got 65"),
    ({"prompt": ["x"] * 40, "n": 2}, "n", "n: got 2 for each of 40"),
    ({"prompt": "x", "stop": [1]}, "stop", "stop: got"),
    ({"prompt": "x", "return_token_ids": True}, "return_token_ids", "which this server does not"),
    ({"prompt": "x", "stop": ["a"] * 17}, "stop", "stop: got"),
    ({"prompt": "x", "stream": 1}, "stream", "stream: got 1"),
    ({"prompt": "x", "logprobs": 21}, "logprobs", "logprobs: got 21"),
    ({"prompt": "x", "stream_options": 3}, "stream_options", "stream_options: got 3"),
    ({"prompt": "x", "stream_options": {}}, "stream_options", "expected stream to be true"),
    ({"prompt": "x", "min_tokens": 5, "max_tokens": 4}, "min_tokens", "at most the 4 new tokens"),
    ({"prompt": "x", "seed": 2**63}, "seed", "seed: got 9223372036854775808"),
    ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias", "logit_bias: got"),
    ({"prompt": "x", "logit_bias": {"1": 101}}, "logit_bias", "logit_bias: got"),
    ({"prompt": "x", "response_format": {"type": "xml"}}, "response_format.type", "got 'xml'"),
    (
        {"prompt": "x", "response_format": {"type": "json_schema"}},
        "response_format.json_schema",
        "got none",
    ),
    ({"prompt": "x", "x" * 10**6: 1}, "x" * 200, "unknown field"),
    ({"prompt": "x", "seed": [["x" * 99] * 99] * 99}, "seed", "seed: got"),
    ({"prompt": "x", "stop": {"x" * 10**6: {}}}, "stop", "stop: got"),
]


@pytest.mark.parametrize(("body", "param", "message"), BAD)
def test_a_bad_completion_names_its_field(client, body, param, message):
    problem = error(client, "/completion", body)
    assert message in problem["message"]
    assert problem["param"] == param


FUNCTION = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "messages", "messages: expected a value"),
        ({"messages": None}, "messages", "messages: got None"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": "hi"}, "messages", "messages: got 'hi'"),
        ({"messages": ["hi"]}, "messages[0]", "messages[0]: got 'hi'"),
        ({"messages": [{"role": 1, "content": ""}]}, "messages[0].role", "got 1"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "got null"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "got null"),
        (
            {"messages": [{"role": "user", "content": {"text": "hi"}}]},
            "messages[0].content",
            "messages[0].content: got {'text': 'hi'}",
        ),
        (
            {"messages": [{"role": "user", "content": ["hi"]}]},
            "messages[0].content[0]",
            "got 'hi', expected",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
            "got None",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            "messages[0].content[0]",
            "this model reads text only",
        ),
        ({"messages": [USER], "top_logprobs": 2}, "top_logprobs", "expected logprobs to be true"),
        ({"messages": [USER], "tool_choice": "required"}, "tool_choice", "expected tools"),
        ({"messages": [USER], "tools": [{"type": "x"}]}, "tools[0].type", "got 'x'"),
        (
            {
                "messages": [USER],
                "tools": [FUNCTION],
                "tool_choice": {"type": "function", "function": {"name": "g"}},
            },
            "tool_choice",
            "got 'g', expected one of ['f']",
        ),
        (
            {"messages": [USER], "chat_template_kwargs": {"tokenize": False}},
            "chat_template_kwargs",
            "got tokenize",
        ),
        ({"messages": [USER], "prompt": "x"}, "prompt", "prompt: unknown field"),
    ],
)
def test_a_bad_chat_names_its_field(client, body, param, message):
    problem = error(client, "/chat", body)
    assert message in problem["message"]
    assert problem["param"] == param


def test_codes_say_what_kind_of_error_it_is(client):
    codes = [
        error(client, "/completion", {"prompt": "x"} | more)["code"]
        for more in ({"y": 1}, {"grammar": "x"}, {"n": 0}, {"n": "a"}, {"prompt": []})
    ]
    assert codes[:2] == ["unknown_parameter", "unsupported_parameter"]
    assert codes[2:] == ["invalid_value", "invalid_type", "invalid_value"]
    assert error(client, "/chat", {})["code"] == "missing_required_parameter"


def test_messages_as_clients_send_them():
    parts = [{"type": "text", "text": "a \ud83d\udc0b"}, {"type": "text", "text": "b \ud83d"}]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "system", "content": "s", "name": "x"},
        {"role": "user", "content": parts},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]
    body = loads(json.dumps({"messages": messages}).encode(), replace_halves=True)
    request = ChatRequest.model_validate(body)
    assert [message.filled() for message in request.messages] == [
        {"role": "system", "content": "s", "name": "x"},
        {"role": "user", "content": "a 🐋\nb \ufffd"},
        {"role": "assistant", "content": ""},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [call | {"function": {"name": "f", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "1"},
    ]


def test_fields_of_other_servers():
    request = completion(top_k=-1, top_p=0, user="me", priority=3, min_tokens=2, ignore_eos=True)
    sampling = request.parameters()
    assert (sampling.top_k, sampling.top_p) == (None, 1e-6)
    assert (sampling.min_tokens, sampling.ignore_eos) == (2, True)
    assert request.ignored == ("user", "priority")
    assert completion(top_k=0).parameters().top_k is None
    assert completion(seed=-1).parameters().seed is None
