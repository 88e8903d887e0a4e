"""Tests reading and editing a model's memory, and undoing edits bit for bit."""

from collections import Counter

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from rorqual import memory
from rorqual.data.tokenizer import train
from rorqual.hub.attach import attach
from rorqual.layers.engram import EngramConfig
from rorqual.layers.hyper import HyperConfig
from rorqual.model import LanguageModel, ModelConfig

pytestmark = pytest.mark.engram

TEXTS = ["the great whale", "the great sea", "a GREAT whale in the sea", "whale whale whale"] * 3
ENGRAM = EngramConfig(layers=(0, 2), rows_per_head=(997, 499), heads=2, head_dim=8)


@pytest.fixture(scope="module")
def tokenizer():
    return train(TEXTS, 300)


@pytest.fixture
def model(tokenizer):
    config = ModelConfig(
        vocab_size=300,
        dim=32,
        layers=3,
        dense_width=32,
        engram=ENGRAM,
        hyper=HyperConfig(streams=2, iterations=2),
        init_std=0.3,
    )
    model = LanguageModel(config, torch.from_numpy(tokenizer.canonical_map()), seed=4).eval()
    for table in model.tables:
        torch.nn.init.normal_(table.weight)
    return model


@pytest.fixture
def editor(model, tokenizer):
    return memory.Editor(model, tokenizer)


def test_every_token_says_what_it_read(model, tokenizer):
    read = memory.reads(model, tokenizer, TEXTS[0])
    ids = [tokenizer.begin_id, *tokenizer.encode(TEXTS[0])]
    assert [one.id for one in read] == ids
    assert [one.token for one in read] == [tokenizer.token(token) for token in ids]
    rows = memory.rows(model, torch.tensor([ids]))
    for t, one in enumerate(read):
        assert one.rows == {0: rows[0, 0, t].tolist(), 2: rows[1, 0, t].tolist()}
        assert set(one.gates) == {0, 2}
        assert all(
            len(gates) == 2 and all(0 < gate < 1 for gate in gates) for gates in one.gates.values()
        )
    assert not any(
        engram.gate._forward_hooks for engram in (model.blocks[0].engram, model.blocks[2].engram)
    )


def test_rows_of_an_ngram_are_those_read_wherever_it_stands(model, tokenizer):
    ids = tokenizer.encode(TEXTS[2])
    for order in (2, 3):
        ngram = ids[-order:]
        for layer in (0, 2):
            ours = memory.rows_of(model, tokenizer, ngram, layer)
            last = memory.reads(model, tokenizer, TEXTS[2])[-1].rows[layer]
            assert ours == last[(order - 2) * 2 : (order - 1) * 2]


def test_folded_spellings_read_alike(model, tokenizer):
    small = tokenizer.encode("a")[0]
    large = tokenizer.encode("A")[0]
    assert small != large
    assert memory.rows_of(model, tokenizer, [small, small], 0) == memory.rows_of(
        model, tokenizer, [large, large], 0
    )


def test_edits_change_only_what_reads_them_and_undo_is_exact(editor, model, tokenizer):
    ids = torch.tensor([[tokenizer.begin_id, *tokenizer.encode(TEXTS[0])]])
    ngram = ids[0, -2:].tolist()
    tables = [table.weight.detach().clone() for table in model.tables]
    with torch.no_grad():
        before = model(ids)
        edit = editor.suppress(ngram, 0)
        suppressed = model(ids)
        editor.overwrite(ngram, 0, torch.ones(2, 8))
        editor.overwrite(ngram, 2, torch.ones(2, 8))
    assert "suppress" in edit.what
    assert torch.equal(editor.lookup(ngram, 0), torch.ones(2, 8))
    assert torch.equal(suppressed[:, :-1], before[:, :-1])
    assert not torch.allclose(suppressed[:, -1], before[:, -1])
    changed = (model.tables[0].weight != tables[0]).any(1).nonzero().flatten().tolist()
    assert changed == sorted(memory.rows_of(model, tokenizer, ngram, 0))
    assert [editor.undo().layer for _ in range(3)] == [2, 0, 0]
    assert all(
        torch.equal(table.weight, old) for table, old in zip(model.tables, tables, strict=True)
    )
    with torch.no_grad():
        assert torch.equal(model(ids), before)
    with pytest.raises(ValueError, match="no edit to take back"):
        editor.undo()


def test_a_transplant_makes_one_ngram_lookup_as_another(editor, tokenizer):
    source = tokenizer.encode(TEXTS[0])[-2:]
    target = tokenizer.encode(TEXTS[1])[-2:]
    editor.transplant(source, target, 0)
    assert torch.equal(editor.lookup(source, 0), editor.lookup(target, 0))
    with pytest.raises(ValueError, match="n-grams of 2 and 3 tokens"):
        editor.transplant(source, [*target, 5], 0)


def test_the_next_token_is_the_models(model, tokenizer):
    best = memory.next_tokens(model, tokenizer, TEXTS[0], 5)
    ids = torch.tensor([[tokenizer.begin_id, *tokenizer.encode(TEXTS[0])]])
    chances = model(ids)[0, -1, : tokenizer.vocab_size].softmax(-1)
    # The two calls have different shapes, so their float32 results differ a little.
    assert [p for _, p in best] == pytest.approx(chances.topk(5).values.tolist(), rel=1e-5)
    assert len(memory.next_tokens(model, tokenizer, TEXTS[0], 10_000)) == tokenizer.vocab_size


def test_popular_rows_and_who_shares_them(model, tokenizer):
    row, number, ngram = memory.popular(model, tokenizer, TEXTS, 0, 3)[0]
    counted = sum(
        row in one.rows[0] for text in TEXTS for one in memory.reads(model, tokenizer, text)[1:]
    )
    assert number == counted
    assert isinstance(ngram, str)
    ids = tokenizer.encode(TEXTS[3])[-2:]
    ours = set(memory.rows_of(model, tokenizer, ids, 0))
    shared = memory.sharing(model, tokenizer, ids, TEXTS, 0)
    assert all(1 <= count <= len(ours) for count in shared.values())
    tight = LanguageModel(
        ModelConfig(
            vocab_size=300,
            dim=32,
            layers=1,
            dense_width=32,
            engram=EngramConfig(layers=(0,), rows_per_head=(2, 3)),
        )
    )
    assert memory.sharing(tight, tokenizer, ids, TEXTS, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, t: memory.rows_of(m, t, "the", 1), "n-gram: got|layer: got 1"),
        (lambda m, t: memory.rows_of(m, t, [1], 0), "got 1 tokens .*expected 2 to 3"),
        (lambda m, t: memory.rows_of(m, t, [1, 2, 3, 4], 0), "got 4 tokens"),
        (
            lambda m, t: memory.rows_of(m, t, [1, 2], 1),
            "layer: got 1, expected a block with Engram: 0, 2",
        ),
        (
            lambda m, t: memory.Editor(m, t).overwrite([1, 2], 0, torch.ones(2, 7)),
            r"values: got shape \(2, 7\)",
        ),
        (
            lambda m, t: memory.Editor(LanguageModel(ModelConfig(dim=32)), t),
            "a model without Engram",
        ),
    ],
)
def test_what_cannot_be_is_refused(model, tokenizer, call, message):
    with pytest.raises(ValueError, match=message):
        call(model, tokenizer)


@pytest.fixture
def host(tokenizer):
    torch.manual_seed(3)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    host = LlamaForCausalLM(LlamaConfig(vocab_size=300, **shape)).eval()
    stored = attach(
        host, tokenizer, (0, 2), rows_per_head=(97, 89), heads=2, head_dim=8, dead_tokens=(7,)
    )
    with torch.no_grad():
        for parameter in stored.parameters():
            torch.nn.init.normal_(parameter)
    return host


def every_reader(model, tokenizer, layer: int) -> dict[int, Counter]:
    """Maps each row to the n-grams of TEXTS that read it, one row of one token at a time."""
    readers: dict[int, Counter] = {}
    for text in TEXTS:
        read = memory.reads(model, tokenizer, text)
        ids = [one.id for one in read]
        for t, one in enumerate(read):
            for n in (2, 3):
                for row in one.rows[layer][(n - 2) * 2 : (n - 1) * 2] if t + 1 >= n else ():
                    readers.setdefault(row, Counter())[tuple(ids[t + 1 - n : t + 1])] += 1
    return readers


@pytest.mark.parametrize("kind", ["model", "host"])
def test_a_corpus_is_counted_as_by_hand(kind, request, tokenizer):
    model = request.getfixturevalue(kind)
    readers = every_reader(model, tokenizer, 2)
    number = {row: item.total() for row, item in readers.items()}
    top = memory.popular(model, tokenizer, iter(TEXTS), 2, 7)
    assert [row for row, _, _ in top] == sorted(number, key=lambda row: (-number[row], row))[:7]
    for row, times, ngram in top:
        assert times == number[row]
        best = max(readers[row].values())
        assert ngram in {
            tokenizer.decode(ids) for ids, times in readers[row].items() if times == best
        }
    canonical = tokenizer.canonical_map()
    different = {
        row: {tuple(canonical[list(ids)]) for ids in item} for row, item in readers.items()
    }
    result = memory.collisions(model, tokenizer, iter(TEXTS), 2, 5)
    assert result.ngrams == len(set().union(*different.values()))
    assert result.rows == len(readers)
    assert result.shared == sum(len(ngrams) > 1 for ngrams in different.values())
    assert [len(ngrams) for _, ngrams in result.worst] == sorted(map(len, different.values()))[
        ::-1
    ][: len(result.worst)]
    assert all(len(ngrams) == len(different[row]) for row, ngrams in result.worst)


def test_counting_drops_only_the_rare(model, tokenizer, monkeypatch):
    monkeypatch.setattr(memory, "MAX_NGRAMS", 4)
    assert memory.popular(model, tokenizer, TEXTS, 0, 3)[0][2]
    assert memory.collisions(model, tokenizer, TEXTS, 0).ngrams <= 16


def test_an_attached_memory_is_read_edited_and_undone(host, tokenizer):
    ids = torch.tensor([tokenizer.encode(TEXTS[0])])
    read = memory.reads(host, tokenizer, TEXTS[0])
    assert [one.id for one in read] == ids[0].tolist()
    assert all(len(one.gates[layer]) == 1 for one in read for layer in (0, 2))
    assert read[-1].ngrams == [tokenizer.decode(ids[0, -n:].tolist()) for n in (2, 3)]
    before = memory.distribution(host, tokenizer, TEXTS[0])
    torch.testing.assert_close(before, host(ids).logits[0, -1, : tokenizer.vocab_size].softmax(-1))
    editor = memory.Editor(host, tokenizer)
    with torch.no_grad():
        whole = host(ids).logits
        editor.suppress(ids[0, -2:].tolist(), 2)
        assert torch.equal(host(ids).logits[:, :-1], whole[:, :-1])
        after = memory.distribution(host, tokenizer, TEXTS[0])
        change = memory.difference(before, after, tokenizer, 3)
        editor.undo()
        assert torch.equal(host(ids).logits, whole)
    assert change.kl == pytest.approx(
        torch.nn.functional.kl_div(after.log(), before, reduction="sum").item(), rel=1e-3
    )
    moved = (after - before).abs()
    assert abs(change.movers[0][2] - change.movers[0][1]) == pytest.approx(
        moved.max().item(), rel=1e-3
    )
    assert memory.difference(before, before, tokenizer).kl == 0.0


def test_dead_tokens_have_no_gate_and_are_part_of_no_ngram(host, tokenizer):
    text = tokenizer.decode([40, 7, 41])
    assert tokenizer.encode(text)[1] == 7
    assert memory.reads(host, tokenizer, text)[1].gates == {0: [0.0], 2: [0.0]}
    with pytest.raises(ValueError, match="expected none of the dead tokens, as 7 is"):
        memory.rows_of(host, tokenizer, [40, 7], 0)


def test_a_row_written_by_hand_changes_exactly_the_tokens_that_read_it(model, tokenizer):
    ids = torch.tensor([[tokenizer.begin_id, *tokenizer.encode(TEXTS[0])]])
    row = memory.rows(model, ids)[1, 0, 2, 1].item()
    readers = (memory.rows(model, ids)[1, 0] == row).any(-1).nonzero().flatten().tolist()
    gates = [one.gates[2] for one in memory.reads(model, tokenizer, TEXTS[0])]
    with torch.no_grad():
        model.tables[1].weight[row] = 9.0
    now = [one.gates[2] for one in memory.reads(model, tokenizer, TEXTS[0])]
    assert [t for t in range(ids.shape[1]) if now[t] != gates[t]] == readers


def test_edits_are_undone_by_another_process(editor, model, tokenizer, tmp_path):
    ngram = tokenizer.encode(TEXTS[0])[-2:]
    start = [table.weight.detach().clone() for table in model.tables]
    editor.suppress(ngram, 0)
    editor.overwrite(ngram, 2, torch.full((2, 8), 0.1))
    editor.save(tmp_path / "edits")
    other = memory.Editor(model, tokenizer)
    other.load(tmp_path / "edits")
    assert [edit.what for edit in other.edits] == [edit.what for edit in editor.edits]
    other.undo()
    late = memory.Editor(model, tokenizer)
    # The weights were saved without the journal: the edit that they lack is dropped.
    late.load(tmp_path / "edits")
    assert len(late.edits) == 1
    late.undo()
    assert all(
        torch.equal(table.weight, old) for table, old in zip(model.tables, start, strict=True)
    )
    with torch.no_grad():
        model.tables[1].weight.add_(1.0)
    with pytest.raises(ValueError, match="got other rows than overwrite"):
        late.load(tmp_path / "edits")
    (tmp_path / "torn").write_bytes(b"no")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        late.load(tmp_path / "torn")


@pytest.mark.parametrize("about", [None, "no JSON", "{}"])
def test_a_file_of_no_edits_is_refused(editor, tmp_path, about):
    metadata = {"format": memory.FORMAT} | ({} if about is None else {"about": about})
    save_file({"x": torch.zeros(1)}, tmp_path / "edits.safetensors", metadata)
    with pytest.raises(ValueError, match=r"got no edits|that an Editor saved"):
        editor.load(tmp_path / "edits.safetensors")
    assert not editor.edits
