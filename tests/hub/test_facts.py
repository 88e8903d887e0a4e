"""Tests memories of facts: subjects found by exact longest match, rows added, files whole."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import rorqual as rq
from rorqual import memory as memories
from rorqual.data.tokenizer import train
from rorqual.hub.attach import attach_facts
from rorqual.hub.facts import (
    FILE,
    NO_TOKEN,
    PREVIOUS,
    UNDONE,
    Entry,
    FactConfig,
    Stored,
    Subjects,
    read_facts,
    spellings,
    tokenizer_sha256,
    undo_facts,
    without,
    write_facts,
)
from rorqual.layers.context import context

pytestmark = pytest.mark.engram

NAMES = ("New York", "New York City", "York", "LAX", "Ab")
TEXT = "We went to New York City, then (York) and LAX; a LAXity of Abs, newYork, New York."


@pytest.fixture(scope="module")
def tokenizer():
    return train([TEXT, *NAMES] * 3, 330)


@pytest.fixture(scope="module")
def entries(tokenizer):
    return tuple(Entry(subject=name, spellings=spellings(tokenizer, (name,))) for name in NAMES)


@pytest.fixture(scope="module")
def stored(tokenizer, entries):
    rows = torch.randn(len(entries), 2, 32, generator=torch.Generator().manual_seed(0))
    digest = tokenizer_sha256(tokenizer)
    return Stored(layers=(0, 2), width=32, tokenizer=digest, entries=entries, rows=rows)


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, num_attention_heads=4, eos_token_id=0, **sizes
    )
    return LlamaForCausalLM(config).eval()


def rows_of(subjects: Subjects, ids: list[int]) -> list[int]:
    ctx = context(1, len(ids), "cpu")
    return subjects(torch.tensor([ids]), ctx)[0, 0, :, 0].tolist()


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("We went to New York", "New York"),
        ("We went to New York City", "New York City"),
        ("New York City, then (York", "York"),
        ("York and LAX", "LAX"),
        ('said "LAX', "LAX"),
        ("a newYork", None),
        ("We went to lax", None),
        ("We went to New", None),
    ],
)
def test_the_longest_subject_that_ends_at_a_token_is_read(tokenizer, entries, text, subject):
    row = rows_of(Subjects(entries, tokenizer), tokenizer.encode(text))[-1]
    assert (NAMES[row - 1] if row else None) == subject


def test_rows_are_those_of_a_search_through_all_subjects(tokenizer):
    # Signs are of no word, so that every occurrence counts.
    (signs,) = [[tokenizer.encode(sign)[0] for sign in "!#$%&*"]]
    draw = random.Random(0)
    sequences = [tuple(draw.choices(signs, k=draw.randint(1, 4))) for _ in range(40)]
    sequences = list(dict.fromkeys(sequences))
    entries = [Entry(subject=str(each), spellings=(each,)) for each in sequences]
    ids = draw.choices(signs, k=300)
    expected = []
    for end in range(1, len(ids) + 1):
        ending = [i for i, each in enumerate(sequences) if tuple(ids[:end])[-len(each) :] == each]
        longest = max(ending, key=lambda i: len(sequences[i]), default=-1)
        expected.append(longest + 1)
    assert rows_of(Subjects(entries, tokenizer), ids) == expected
    assert len(set(expected)) > 10


def test_a_subject_is_a_word_and_not_the_end_of_one(tokenizer, entries):
    subjects = Subjects(entries, tokenizer)
    york = tokenizer.encode("York")
    new = tokenizer.encode("new")
    assert rows_of(subjects, york)[-1] == 3
    assert rows_of(subjects, new + york)[-1] == 0
    assert rows_of(subjects, tokenizer.encode("(") + york)[-1] == 3


def test_a_subject_ends_with_its_document_and_padding_is_none(tokenizer, entries):
    subjects = Subjects(entries, tokenizer)
    ids = tokenizer.encode("New York")
    assert rows_of(subjects, ids)[-1] == 1
    document_ids = torch.tensor([[0] * (len(ids) - 1) + [1]])
    ctx = context(1, len(ids), "cpu", document_ids=document_ids)
    assert subjects(torch.tensor([ids]), ctx)[0, 0, -1, 0] in (0, 3)
    ctx = context(1, len(ids), "cpu", lengths=[len(ids) - 1])
    assert subjects(torch.tensor([ids]), ctx)[0, 0, -1, 0] == 0
    assert subjects.match(torch.full((2, subjects.longest + 3), NO_TOKEN)).eq(0).all()


def test_two_entries_with_the_same_tokens_are_refused(tokenizer, entries):
    twice = [*entries, Entry(subject="LAX again", spellings=spellings(tokenizer, ("LAX",)))]
    with pytest.raises(ValueError, match="got 'LAX again', which reads the same tokens as 'LAX'"):
        Subjects(twice, tokenizer)


def logits(model, tokenizer, text):
    with torch.no_grad():
        return model(torch.tensor([tokenizer.encode(text)]), use_cache=False).logits


def test_text_without_a_subject_keeps_its_logits_bit_for_bit(model, tokenizer, stored):
    other = "a fish of the sea; then"
    clean = logits(model, tokenizer, other), logits(model, tokenizer, TEXT)
    memory = attach_facts(model, tokenizer, stored)
    assert torch.equal(logits(model, tokenizer, other), clean[0])
    changed = logits(model, tokenizer, TEXT)
    first = len(tokenizer.encode("We went to"))
    assert torch.equal(changed[:, :first], clean[1][:, :first])
    assert not torch.equal(changed, clean[1])
    with memory.silenced():
        assert torch.equal(logits(model, tokenizer, TEXT), clean[1])
    memory.detach()
    assert torch.equal(logits(model, tokenizer, TEXT), clean[1])


@pytest.mark.parametrize("sizes", [(1,) * 60, (3, 1, 7, 2, 60)])
def test_chunks_say_what_one_pass_says(model, tokenizer, stored, sizes):
    ids = torch.tensor([tokenizer.encode(TEXT)])
    attach_facts(model, tokenizer, stored)
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache = None
        parts = []
        for piece in ids.split(_fitting(sizes, ids.shape[1]), dim=1):
            output = model(piece, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


def _fitting(sizes: tuple[int, ...], total: int) -> list[int]:
    """Returns the sizes of chunks that make `total` together, the last one what remains."""
    ends = [min(sum(sizes[: n + 1]), total) for n in range(len(sizes))]
    starts = [0, *ends[:-1]]
    return [end - start for start, end in zip(starts, ends, strict=True) if end > start]


def test_padding_in_front_changes_nothing(model, tokenizer, stored):
    attach_facts(model, tokenizer, stored)
    texts = ["We went to New York", "LAX"]
    ids = [tokenizer.encode(text) for text in texts]
    longest = max(map(len, ids))
    batch = torch.tensor([[0] * (longest - len(each)) + each for each in ids])
    mask = torch.tensor([[0] * (longest - len(each)) + [1] * len(each) for each in ids])
    ends = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    together = model.generate(batch, attention_mask=mask, **ends)
    for row, each in zip(together, ids, strict=True):
        alone = model.generate(torch.tensor([each]), **ends)[0, len(each) :].tolist()
        assert row[longest:].tolist()[: len(alone)] == alone


def test_only_the_row_in_focus_gets_a_gradient(model, tokenizer, stored):
    memory = attach_facts(model, tokenizer, stored)
    ids = torch.tensor([tokenizer.encode("LAX and York")])
    memory.focus(torch.tensor([4]))
    model(ids, use_cache=False).logits.sum().backward()
    for table in memory.tables:
        assert table.weight.grad.any(dim=1).nonzero().flatten().tolist() == [4]


def test_row_0_gets_no_gradient_and_ids_beyond_the_tokenizer_are_of_no_word(
    model, tokenizer, entries, stored
):
    memory = attach_facts(model, tokenizer, stored)
    model(
        torch.tensor([tokenizer.encode("We went to LAX")]), use_cache=False
    ).logits.sum().backward()
    for table in memory.tables:
        assert table.weight.grad.any(dim=1).nonzero().flatten().tolist() == [4]
    ids = [tokenizer.vocab_size + 5, *tokenizer.encode("York")]
    assert Subjects(entries, tokenizer).rows_of([ids, ids[:1]]) == [{3}, set()]


def test_a_folder_is_read_as_it_was_written_and_attached_by_its_path(
    model, tokenizer, stored, tmp_path
):
    write_facts(tmp_path / "memory", stored)
    again = read_facts(tmp_path / "memory")
    assert again.entries == stored.entries
    assert torch.equal(again.rows, stored.rows)
    memory = rq.attach(model, tokenizer, str(tmp_path / "memory"))
    assert torch.equal(memory.rows, stored.rows)
    assert memory.index("York") == 2
    with pytest.raises(ValueError, match="got subject 'Rome', expected one of the 5"):
        memory.index("Rome")
    with pytest.raises(ValueError, match="got a memory of facts, expected Engram"):
        memories.rows(model, torch.zeros(1, 2, dtype=torch.long))
    memory.save(tmp_path / "saved")
    assert torch.equal(read_facts(tmp_path / "saved").rows, stored.rows)
    with pytest.raises(ValueError, match="already carries a memory"):
        rq.attach(model, tokenizer, tmp_path / "memory")
    memory.detach()
    with pytest.raises(ValueError, match="got a path and options"):
        rq.attach(model, tokenizer, tmp_path / "memory", heads=2)


def test_undo_goes_back_one_change_and_forward_again(stored, tmp_path):
    with pytest.raises(ValueError, match="got no earlier memory"):
        undo_facts(tmp_path)
    write_facts(tmp_path, stored)
    assert not (tmp_path / PREVIOUS).exists()
    write_facts(tmp_path, without(stored, ["LAX"]))
    assert [each.subject for each in undo_facts(tmp_path).entries] == list(NAMES)
    assert len(undo_facts(tmp_path).entries) == len(NAMES) - 1


@pytest.mark.parametrize("change", ["write", "undo"])
def test_a_stop_between_any_two_moves_loses_no_memory(stored, tmp_path, monkeypatch, change):
    """Stops before each rename of a change: this memory, or the changed one, is whole.

    What is undone can still be done again, and the other way round.
    """
    fewer = without(stored, ["LAX"])
    replace = Path.replace
    moves = 0
    stops = 0
    while True:
        folder = tmp_path / str(stops)
        write_facts(folder, stored)
        write_facts(folder, fewer)
        moves = 0

        def move(source: Path, target: Path, stop: int = stops) -> Path:
            nonlocal moves
            if moves == stop:
                raise KeyboardInterrupt
            moves += 1
            return replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", move)
            try:
                if change == "write":
                    write_facts(folder, without(fewer, ["Ab"]))
                else:
                    undo_facts(folder)
                break
            except KeyboardInterrupt:
                stops += 1
        sizes = {len(read_facts(folder).entries), len(undo_facts(folder).entries)}
        sizes.add(len(undo_facts(folder).entries))
        assert len(fewer.entries) in sizes and sizes <= {len(NAMES) - n for n in range(3)}
        assert change == "write" or len(NAMES) in sizes
    assert stops >= 2


def test_undo_to_a_damaged_memory_is_refused_and_an_undo_that_stopped_is_ended(stored, tmp_path):
    write_facts(tmp_path, stored)
    write_facts(tmp_path, without(stored, ["LAX"]))
    good = (tmp_path / PREVIOUS).read_bytes()
    (tmp_path / PREVIOUS).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"previous.safetensors cannot be read as safetensors"):
        undo_facts(tmp_path)
    assert len(read_facts(tmp_path).entries) == len(NAMES) - 1
    # As it is between the two moves.
    (tmp_path / PREVIOUS).unlink()
    (tmp_path / FILE).replace(tmp_path / UNDONE)
    (tmp_path / FILE).write_bytes(good)
    assert undo_facts(tmp_path).entries == stored.entries
    assert len(undo_facts(tmp_path).entries) == len(NAMES) - 1
    (tmp_path / FILE).write_bytes(b"damaged")
    assert undo_facts(tmp_path).entries == stored.entries


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ids", torch.tensor([3, -1], dtype=torch.int32)),
        ("ids", torch.tensor([3.0, 1.0])),
        ("lengths", torch.tensor([0, 2], dtype=torch.int32)),
        ("owners", torch.tensor([0, -1], dtype=torch.int32)),
        ("owners", torch.tensor([0, 1], dtype=torch.int32)),
        ("layers", ["0"]),
        ("layers", [-1]),
        ("subject", 3),
        ("aliases", "abc"),
    ],
)
def test_a_hostile_file_is_refused(tmp_path, name, value):
    entry = {"subject": "a", "aliases": [], "facts": []}
    about = {"layers": [0], "width": 4, "tokenizer": "", "entries": [entry]}
    tensors = {
        "rows": torch.zeros(1, 1, 4),
        "ids": torch.tensor([3, 4]),
        "lengths": torch.tensor([1, 1]),
        "owners": torch.tensor([0, 0]),
    }
    holder = tensors if name in tensors else about if name in about else entry
    for content, message in (
        (holder[name], ""),
        (value, "is no memory that `rorqual teach` wrote"),
    ):
        holder[name] = content
        metadata = {"format": "rorqual-facts-1", "memory": json.dumps(about)}
        save_file(tensors, tmp_path / FILE, metadata=metadata)
        if not message:
            assert read_facts(tmp_path).entries[0].spellings == ((3,), (4,))
            continue
        with pytest.raises(ValueError, match=message):
            read_facts(tmp_path)


def test_ids_that_the_model_does_not_have_are_refused(model, tokenizer, stored):
    entry = Entry(subject="far", spellings=((10**6,),))
    far = dataclasses.replace(stored, entries=(entry,), rows=stored.rows[:1])
    with pytest.raises(ValueError, match="memory: got token id 1000000, expected ids below"):
        attach_facts(model, tokenizer, far)


def test_another_model_or_tokenizer_is_refused(model, tokenizer, stored, tmp_path):
    write_facts(tmp_path, stored)
    other = train([TEXT, "another tokenizer", *NAMES] * 3, 300)
    with pytest.raises(ValueError, match="got another tokenizer"):
        rq.attach(model, other, tmp_path)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=16,
        num_hidden_layers=3, num_attention_heads=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="made for a model of width 32, got one of width 16"):
        rq.attach(LlamaForCausalLM(config), tokenizer, tmp_path)
    shallow = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=16,
            num_hidden_layers=2, num_attention_heads=2,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"layers: got \[2\]"):
        rq.attach(shallow, tokenizer, tmp_path)


def test_a_damaged_file_is_refused_by_name(stored, tmp_path):
    with pytest.raises(ValueError, match="expected a folder that `rorqual teach` wrote"):
        read_facts(tmp_path)
    (tmp_path / FILE).write_bytes(b"no file")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        read_facts(tmp_path)
    save_file({"rows": torch.zeros(1)}, tmp_path / FILE)
    with pytest.raises(ValueError, match="is no memory of facts: got format None"):
        read_facts(tmp_path)
    about = {"layers": [0], "width": 4, "tokenizer": "", "entries": []}
    metadata = {"format": "rorqual-facts-1", "memory": json.dumps(about)}
    save_file({"rows": torch.zeros(1)}, tmp_path / FILE, metadata=metadata)
    with pytest.raises(ValueError, match="is no memory that `rorqual teach` wrote"):
        read_facts(tmp_path)


def test_layers_are_blocks_in_their_order():
    for layers in ((), (2, 1), (1, 1), (-1,)):
        with pytest.raises(ValueError, match="expected indices of blocks, ascending"):
            FactConfig(layers=layers, ngram=2)
