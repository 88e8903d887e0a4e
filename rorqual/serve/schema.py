"""Defines what requests and answers hold, as pydantic models; the OpenAPI page is made of them.

The fields are OpenAI's, and those that other servers share: top_k, min_p, repetition_penalty,
ignore_eos, min_tokens, stop_token_ids, skip_special_tokens, echo. Two are this server's alone:
return_routed_experts and return_memory. Errors name the field that is wrong.
"""

import difflib
import json
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    PrivateAttr,
    Strict,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from rorqual.serve.body import LONGEST_VALUE
from rorqual.serve.sampling import Sampling

# These fields would change the answer and are not supported, so they are accepted only at values
# without effect. The first group is OpenAI's, the second that of other servers.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "best_of": (None, 1),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "reasoning_effort": (None, "none"),
    "web_search_options": (None,),
    #
    "include_stop_str_in_output": (None, False),
    "use_beam_search": (None, False),
    "length_penalty": (None, 1),
    "typical_p": (None, 1),
    "repeat_penalty": (None, 1),
    "prompt_logprobs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "structured_outputs": (None,),
    "grammar": (None, ""),
    "json_schema": (None,),
    "chat_template": (None,),
    "detokenize": (None, True),
    "echo": (None, False),
    "add_special_tokens": (None, False),
    "documents": (None, []),
    "early_stopping": (None, False),
    "bad_words": (None, []),
    "allowed_token_ids": (None, []),
    "logits_processors": (None, []),
    "return_token_ids": (None, False),
    "return_tokens_as_token_ids": (None, False),
    "return_hidden_states": (None, False),
    "timings_per_token": (None, False),
    "n_probs": (None, 0),
    "samplers": (None, []),
    "tfs_z": (None, 1),
    "top_a": (None, 0),
    "mirostat": (None, 0),
    "dry_multiplier": (None, 0),
    "xtc_probability": (None, 0),
}
# OpenAI and other servers accept these fields; they would not change an answer of this server.
IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "verbosity",
        "request_id",
        "priority",
        "spaces_between_special_tokens",
        "cache_prompt",
        "cache_salt",
        "keep_alive",
        "id_slot",
        "include_reasoning",
        "separate_reasoning",
        "stream_reasoning",
    }
)
MAXIMUM = 64  # continuations that one request may ask for
MOST_LOGPROBS = 20  # likeliest ids that one request may ask for
# Words of a template's call that a request must not set.
_RESERVED = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "documents",
    "messages",
    "padding",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
}

Flag = Annotated[bool, Strict()]
Count = Annotated[int, Strict()]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]
Text = Annotated[str, Strict()]


def short(value: Any) -> str:
    """Formats a value for an error message, at most one line of it."""
    text = reprlib.repr(value)
    return text if len(text) <= LONGEST_VALUE else text[:LONGEST_VALUE] + "..."


def refuse(param: str, message: str, code: str | None = None) -> PydanticCustomError:
    """Returns an error about a field; the message is a whole sentence about it."""
    context = {"param": param, "message": message, "code": code}
    return PydanticCustomError("refused", "{message}", context)


class Input(BaseModel):
    """What every request has in common: unknown fields are refused with the nearest known one."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: Annotated[str | None, Strict()] = None
    _ignored: tuple[str, ...] = PrivateAttr(())

    @property
    def ignored(self) -> tuple[str, ...]:
        """The fields of the request that change nothing here."""
        return self._ignored

    @model_validator(mode="wrap")
    @classmethod
    def _only_known(cls, value: Any, handler: Any) -> Any:
        """Drops fields without effect. Refuses unknown ones, and values that are not supported."""
        if not isinstance(value, Mapping):
            raise refuse("", f"body: got {type(value).__name__}, expected a JSON object")
        ignored = []
        fields = {}
        for name, one in value.items():
            if name in cls.model_fields:
                fields[name] = one
            elif name in NEUTRAL:
                if one not in NEUTRAL[name]:
                    got = f"{name}: got {short(one)}"
                    message = f"{got}, which this server does not do; leave it out"
                    raise refuse(name, message, "unsupported_parameter")
            elif name in IGNORED:
                ignored.append(name)
            # Clients send null for what they do not ask for.
            elif one is not None:
                name = name[:LONGEST_VALUE]
                similar = difflib.get_close_matches(name, list(cls.model_fields), 1)
                hint = f", did you mean {similar[0]}?" if similar else ""
                raise refuse(name, f"{name}: unknown field{hint}", "unknown_parameter")
        parsed = handler(fields)
        parsed._ignored = tuple(ignored)
        return parsed


class StreamOptions(BaseModel):
    """Says which counts of tokens a stream has besides its pieces."""

    model_config = ConfigDict(extra="ignore")

    include_usage: Flag | None = None  # a last chunk with the counts of tokens
    continuous_usage_stats: Flag | None = None  # the counts in every chunk
    include_obfuscation: Flag | None = None  # OpenAI's padding of chunks; nothing here


class JsonSchema(BaseModel):
    """A JSON schema that the answer follows."""

    model_config = ConfigDict(extra="forbid")

    name: Text = "answer"
    description: Text | None = None
    # A field of BaseModel is called `schema`.
    json_schema: dict[str, Any] = Field(default_factory=lambda: {"type": "object"}, alias="schema")
    strict: Flag | None = None


class ResponseFormat(BaseModel):
    """The format of the answer: any text, a JSON object, or JSON of a schema."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> "ResponseFormat":
        """Refuses the type json_schema without a schema."""
        if self.type == "json_schema" and self.json_schema is None:
            name = "response_format.json_schema"
            raise refuse(name, f"{name}: got none, expected an object with name and schema")
        return self

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:
        """The JSON schema that the answer follows; None where it may be any text."""
        if self.type == "text":
            return None
        return {"type": "object"} if self.json_schema is None else self.json_schema.json_schema


def _stop(value: Any) -> list[str]:
    """Reads `stop` as a list of 0 to 16 texts; a single text is a list of one."""
    words = [value] if isinstance(value, str) else [] if value is None else value
    good = isinstance(words, list) and all(isinstance(word, str) for word in words)
    if not good or len(words) > 16:
        raise refuse("stop", f"stop: got {short(value)}, expected a text or at most 16 texts")
    # Clients with an empty field for it send an empty text.
    return [word for word in words if word]


_TEXT = {"type": "string"}
_IDS = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
_PROMPT = {
    "anyOf": [
        _TEXT,
        {"type": "array", "items": _TEXT, "minItems": 1},
        _IDS,
        {"type": "array", "items": _IDS, "minItems": 1},
    ]
}


def _prompts(name: str) -> Any:
    """Returns a validator of texts or ids, or lists of them; its result is a list of either."""

    def read(value: Any) -> list[str | list[int]]:
        """Returns the list; a list of integers is one prompt of ids. Refuses anything else."""
        if isinstance(value, str):
            return [value]
        if isinstance(value, list) and value:
            if all(isinstance(piece, str) for piece in value):
                return value
            if _ids(value):
                return [value]
            if all(_ids(piece) for piece in value):
                return value
        raise refuse(
            name,
            f"{name}: expected a text, a list of texts, a list of token ids, "
            "or a list of such lists",
        )

    return read


def _ids(value: Any) -> bool:
    """Returns whether a value is a list of at least one integer; booleans are none."""
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _bias(value: Any) -> dict[int, float] | None:
    """Reads {"id": bias}; JSON has texts as keys."""
    if value is None:
        return None
    good = isinstance(value, dict) and all(
        type(bias) in (int, float) and -100 <= bias <= 100 for bias in value.values()
    )
    if not good or len(value) > 1024 or not all(key.isdecimal() and len(key) < 12 for key in value):
        raise refuse(
            "logit_bias",
            f"logit_bias: got {short(value)}, "
            "expected an object of at most 1024 token ids and numbers from -100 to 100",
        )
    return {int(key): float(bias) for key, bias in value.items()}


class Generation(Input):
    """The fields that a completion and a chat have in common."""

    max_tokens: Annotated[Count, Field(ge=0, le=2**31)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Count, Field(ge=-1, le=2**31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(ge=1e-3, le=1e3)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[
        dict[int, float] | None,
        PlainValidator(_bias),
        WithJsonSchema(
            {
                "anyOf": [
                    {
                        "type": "object",
                        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
                        "propertyNames": {"pattern": "^[0-9]{1,11}$"},
                    },
                    {"type": "null"},
                ]
            }
        ),
    ] = None
    seed: Annotated[Count, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Annotated[
        list[str],
        PlainValidator(_stop),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "maxItems": 16, "items": {"type": "string"}},
                    {"type": "null"},
                ]
            }
        ),
    ] = []
    n: Annotated[Count, Field(ge=1, le=MAXIMUM)] | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: Flag | None = None
    min_tokens: Annotated[Count, Field(ge=0, le=2**31)] | None = None
    stop_token_ids: Annotated[list[Count], Field(max_length=256)] | None = None
    skip_special_tokens: Flag | None = None
    # The prompt is its last so many tokens; None for all of them.
    truncate_prompt_tokens: Annotated[Count, Field(ge=1, le=2**31)] | None = None
    response_format: ResponseFormat | None = None
    return_routed_experts: Flag | None = None  # which experts each token went to, by block
    return_memory: Flag | None = None  # which rows each token read, and its gates, by block

    @model_validator(mode="after")
    def _fit_together(self) -> "Generation":
        """Refuses min_tokens above the limit, and stream_options without a stream."""
        least = self.min_tokens or 0
        limit = self.new_tokens
        if limit is not None and least > limit:
            got = f"min_tokens: got {least}, expected at most the {limit} new tokens"
            raise refuse("min_tokens", got)
        if self.stream_options is not None and not self.stream:
            name = "stream_options"
            raise refuse(name, f"{name}: got options, expected stream to be true beside them")
        return self

    @property
    def copies(self) -> int:
        """How many continuations of each prompt are asked for; 1 if `n` is left out."""
        return self.n or 1

    @property
    def new_tokens(self) -> int | None:
        """How many new tokens are asked for at most; None if the request does not say."""
        return self.max_tokens

    @property
    def shows_special(self) -> bool:
        """Whether special tokens are a part of the text, which must be asked for."""
        return self.skip_special_tokens is False

    @property
    def usage_at_end(self) -> bool:
        """Whether a stream ends with a chunk of the counts of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def usage_always(self) -> bool:
        """Whether every chunk has the counts of tokens."""
        # As elsewhere, it has an effect only beside include_usage.
        options = self.stream_options
        return self.usage_at_end and options is not None and bool(options.continuous_usage_stats)

    def sampling(self, *, logprobs: int | None, prompt_logprobs: bool = False) -> Sampling:
        """Returns the parameters of sampling; 1.0 is the temperature where none is asked for."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            # 0 keeps only the likeliest token, as does the smallest number that Sampling accepts.
            top_p=None if self.top_p is None else max(self.top_p, 1e-6),
            # Other servers use -1 or 0 for no limit.
            top_k=None if self.top_k in (-1, 0) else self.top_k,
            min_p=self.min_p,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((self.logit_bias or {}).items()),
            # Any 64-bit integer; -1 means a random seed, as in other servers.
            seed=None if self.seed in (None, -1) else (self.seed or 0) % 2**63,
            min_tokens=self.min_tokens or 0,
            ignore_eos=bool(self.ignore_eos),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


class CompletionRequest(Generation):
    """The body of /v1/completions: texts or ids that are continued."""

    prompt: Annotated[
        list[str | list[int]], PlainValidator(_prompts("prompt")), WithJsonSchema(_PROMPT)
    ]
    echo: Flag | None = None  # the prompt stands before the text
    # Whether the text of a special token in a prompt is the token.
    parse_special: Flag | None = None
    add_special_tokens: Flag | None = None  # begin as a document does; true if it is left out
    logprobs: Annotated[Count, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "CompletionRequest":
        """Refuses more than MAXIMUM choices, an echo of a truncated prompt, and 0 tokens alone."""
        if self.copies * len(self.prompt) > MAXIMUM:
            got = f"n: got {self.copies} for each of {len(self.prompt)} prompts"
            raise refuse("n", f"{got}, expected at most {MAXIMUM} in all")
        if self.echo and self.truncate_prompt_tokens is not None:
            name = "truncate_prompt_tokens"
            raise refuse(name, f"{name}: got a number beside echo, expected one of the two")
        if self.max_tokens == 0 and not self.echo:
            raise refuse("max_tokens", "max_tokens: got 0, expected at least 1 unless echo is true")
        return self

    def parameters(self) -> Sampling:
        """Returns the parameters of sampling."""
        echoed = bool(self.echo) and (self.logprobs is not None or self.max_tokens == 0)
        return self.sampling(logprobs=self.logprobs, prompt_logprobs=echoed)


def _content(value: Any) -> str | None:
    """Reads the text of a message: a text, nothing, or parts of text, which are joined by lines."""
    if not isinstance(value, list):
        if value is None or isinstance(value, str):
            return value
        raise PydanticCustomError(
            "content", "got {got}, expected a text or a list of text parts", {"got": short(value)}
        )
    return "\n".join(_text_of_piece(piece, index) for index, piece in enumerate(value))


def _text_of_piece(piece: Any, index: int) -> str:
    """Returns the text of one part of a message. Refuses an image, a sound or a file."""
    kind = piece.get("type") if isinstance(piece, Mapping) else None
    if kind not in ("text", "refusal"):
        got = f"a part of type {short(kind)}" if kind is not None else short(piece)
        message = f'got {got}, expected {{"type": "text", "text": ...}}: this model reads text only'
        raise PydanticCustomError("part", "{message}", {"message": message, "inside": f"[{index}]"})
    text = piece.get(kind)
    if not isinstance(text, str):
        message = f"got {short(text)}, expected a text"
        raise PydanticCustomError(
            "part", "{message}", {"message": message, "inside": f"[{index}].{kind}"}
        )
    return text


_PARTS = {
    "type": "object",
    "properties": {"type": {"enum": ["text"]}, "text": _TEXT},
    "required": ["type", "text"],
}


class FunctionCall(BaseModel):
    """A tool and its arguments as JSON."""

    model_config = ConfigDict(extra="ignore")

    name: Text
    arguments: Text


class MessageToolCall(BaseModel):
    """A call of a tool, as an assistant made it."""

    model_config = ConfigDict(extra="ignore")

    id: Text | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="ignore")

    role: Annotated[Text, Field(min_length=1, max_length=64)]
    content: Annotated[
        str | None,
        BeforeValidator(_content),
        WithJsonSchema(
            {"anyOf": [_TEXT, {"type": "array", "items": _PARTS, "minItems": 1}, {"type": "null"}]}
        ),
    ] = None
    name: Text | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: Text | None = None
    reasoning_content: Text | None = None

    @model_validator(mode="after")
    def _spoken(self) -> "Message":
        """Refuses a message without content, except for an assistant that only called a tool."""
        # The content is null where an assistant only called a tool, or declined.
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError(
                "part",
                "{message}",
                {
                    "message": "got null, expected a text or a list of text parts",
                    "inside": ".content",
                },
            )
        return self

    def filled(self) -> dict[str, Any]:
        """Returns the message as chat templates expect it: arguments are objects."""
        message: dict[str, Any] = {"role": self.role, "content": self.content or ""}
        for name in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(self, name)) is not None:
                message[name] = value
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": _object(call.function.arguments),
                    },
                }
                for call in self.tool_calls
            ]
        return message


def _object(text: str) -> Any:
    """Returns the value of a JSON text, or the text itself where it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


class FunctionDefinition(BaseModel):
    """A function that the model may call; `parameters` is a JSON schema."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[Text, Field(pattern=r"^[\w.-]{1,64}$")]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: Flag | None = None


class Tool(BaseModel):
    """A tool that the model may call."""

    model_config = ConfigDict(extra="ignore")

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(BaseModel):
    """The name of a function."""

    name: Text


class NamedTool(BaseModel):
    """The tool that the model must call."""

    type: Literal["function"]
    function: NamedFunction


class Templated(BaseModel):
    """The fields of a request that go into the chat template beside the messages."""

    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    add_generation_prompt: Flag | None = None
    continue_final_message: Flag | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # Whether the text of a special token in a message, or in a prompt, is the token.
    parse_special: Flag | None = None

    @field_validator("chat_template_kwargs")
    @classmethod
    def _own_words(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        """Refuses template arguments that the server sets itself, as `messages` and `tools`."""
        if wrong := sorted(_RESERVED & set(value or {})):
            name = "chat_template_kwargs"
            raise refuse(name, f"{name}: got {', '.join(wrong)}, expected words of the template")
        return value

    def tool_dicts(self) -> list[dict[str, Any]]:
        """Returns the tools as chat templates expect them."""
        return [tool.model_dump(exclude_none=True) for tool in self.tools or ()]

    def template_options(self) -> dict[str, Any]:
        """Returns the options of the chat template besides the messages."""
        options: dict[str, Any] = dict(self.chat_template_kwargs or {})
        options["continue_final_message"] = bool(self.continue_final_message)
        options["add_generation_prompt"] = not self.continue_final_message
        if self.add_generation_prompt is not None:
            options["add_generation_prompt"] = self.add_generation_prompt
        if self.tools:
            options["tools"] = self.tool_dicts()
        return options


class ChatRequest(Templated, Generation):
    """The body of /v1/chat/completions: messages that are answered."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[Count, Field(ge=1, le=2**31)] | None = None
    max_completion_tokens: Annotated[Count, Field(ge=1, le=2**31)] | None = None
    logprobs: Flag | None = None
    top_logprobs: Annotated[Count, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: Flag | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ChatRequest":
        """Refuses fields that contradict each other: top_logprobs, tool_choice, response_format."""
        if self.top_logprobs and not self.logprobs:
            raise refuse("top_logprobs", "top_logprobs: got a number, expected logprobs to be true")
        names = self.tool_names
        choice = self.tool_choice
        if choice not in (None, "none") and not names:
            raise refuse("tool_choice", "tool_choice: got a choice, expected tools beside it")
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            got = f"tool_choice: got {short(choice.function.name)}"
            raise refuse("tool_choice", f"{got}, expected one of {short(list(names))}")
        if self.forces_tool and self.response_format is not None:
            message = "response_format: got one beside a tool_choice that forces a call"
            raise refuse("response_format", message)
        return self

    @property
    def new_tokens(self) -> int | None:
        """How many new tokens are asked for at most; max_completion_tokens before max_tokens."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def tool_names(self) -> list[str]:
        """The names of the tools that the model may call, in order."""
        return [tool.function.name for tool in self.tools or ()]

    @property
    def calls_tools(self) -> bool:
        """Whether calls of tools are read from the text."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def forces_tool(self) -> bool:
        """Whether the answer must be a call, of any tool or of a named one."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def forced_tool(self) -> str | None:
        """The one tool that must be called."""
        choice = self.tool_choice
        return choice.function.name if isinstance(choice, NamedTool) else None

    def parameters(self) -> Sampling:
        """Returns the parameters of sampling."""
        return self.sampling(logprobs=(self.top_logprobs or 0) if self.logprobs else None)


class EmbeddingRequest(Input):
    """The body of /v1/embeddings: the mean of the final hidden states of each text."""

    input: Annotated[
        list[str | list[int]], PlainValidator(_prompts("input")), WithJsonSchema(_PROMPT)
    ]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[Count, Field(ge=1)] | None = None
    truncate_prompt_tokens: Annotated[Count, Field(ge=1, le=2**31)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "EmbeddingRequest":
        """Refuses more than MAXIMUM texts at once."""
        if len(self.input) > MAXIMUM:
            raise refuse("input", f"input: got {len(self.input)} texts, expected at most {MAXIMUM}")
        return self


class TokenizeRequest(Templated, Input):
    """The body of /tokenize: a text, or the messages of a chat."""

    prompt: Text | None = None
    messages: list[Message] | None = None
    add_special_tokens: Flag | None = None  # begin as a document does; true if it is left out
    return_token_strs: Flag | None = None

    @model_validator(mode="after")
    def _one(self) -> "TokenizeRequest":
        """Refuses a request with both a prompt and messages, or with neither."""
        if (self.prompt is None) == (not self.messages):
            raise refuse("prompt", "prompt: expected either a prompt or messages")
        return self


class DetokenizeRequest(Input):
    """The body of /detokenize: ids."""

    tokens: Annotated[list[Count], Field(max_length=2**20)]


# What is answered. Routes build dictionaries of these shapes; a test holds them against each other.


class PromptTokensDetails(BaseModel):
    """Counts of tokens of the prompt."""

    cached_tokens: int  # found in the cache of an earlier prompt


class Usage(BaseModel):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a completion, a list entry a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class MemoryAnswer(BaseModel):
    """What one token read in one block: rows of the table, and the gate of each stream."""

    rows: list[int]
    gates: list[float]


class Observations(BaseModel):
    """What was asked for of the forward passes, an entry for every token that was read, by block.

    The last new token was not read yet, so it has no entry.
    """

    routed_experts: list[dict[str, list[int]]] | None = None
    memory: list[dict[str, MemoryAnswer]] | None = None


class CompletionChoice(Observations):
    """One continuation, or a piece of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(BaseModel):
    """The answer of /v1/completions, whole or a chunk of it."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    """A token, its bytes, and its log-probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """The token of an answer, and the likeliest tokens in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of the tokens of a message."""

    content: list[TokenLogprob] | None
    refusal: list[TokenLogprob] | None = None


class AnswerToolCall(BaseModel):
    """A call of a tool; `index` numbers the calls of a stream."""

    index: int | None = None
    id: str
    type: Literal["function"]
    function: FunctionCall


class AnswerMessage(BaseModel):
    """The message of an assistant, or a piece of it."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[AnswerToolCall] | None = None


class ChatChoice(Observations):
    """One answer to the messages."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    """The answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunkChoice(Observations):
    """A piece of an answer to the messages."""

    index: int
    delta: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class ChatChunk(BaseModel):
    """A chunk of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class Embedding(BaseModel):
    """The mean of the final hidden states of one text; base64 is of little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Counts of tokens."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    """The answer of /v1/embeddings."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    """The models that are served."""

    object: Literal["list"]
    data: list[ModelCard]


class Tokens(BaseModel):
    """The ids of a text."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(BaseModel):
    """The text of ids."""

    prompt: str


class Problem(BaseModel):
    """What is wrong with a request, or with the server."""

    message: str
    type: str
    param: str | None
    code: str | None


class ProblemAnswer(BaseModel):
    """An error, in OpenAI's shape."""

    error: Problem
