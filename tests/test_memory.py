"""Reading what a model remembers, editing it, and undoing it bit for bit."""

import pytest
import torch

from rorqual import memory
from rorqual.data.tokenizer import train
from rorqual.layers.engram import EngramConfig
from rorqual.layers.hyper import HyperConfig
from rorqual.model import LanguageModel, ModelConfig

TEXTS = ["the great whale", "the great sea", "a GREAT whale in the sea", "whale whale whale"] * 3
ENGRAM = EngramConfig(layers=(0, 2), rows_per_head=(997, 499), heads=2, head_dim=8)


@pytest.fixture(scope="module")
def tokenizer():
    return train(TEXTS, 300)


@pytest.fixture
def model(tokenizer):
    config = ModelConfig(
        vocabulary=300,
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
        assert all(len(gates) == 2 and all(0 < gate < 1 for gate in gates) for gates in one.gates.values())
    assert not any(engram.gate._forward_hooks for engram in (model.blocks[0].engram, model.blocks[2].engram))


def test_rows_of_an_ngram_are_those_read_wherever_it_stands(model, tokenizer):
    ids = tokenizer.encode(TEXTS[2])
    for order in (2, 3):
        ngram = ids[-order:]
        for layer in (0, 2):
            own = memory.rows_of(model, tokenizer, ngram, layer)
            last = memory.reads(model, tokenizer, TEXTS[2])[-1].rows[layer]
            assert own == last[(order - 2) * 2 : (order - 1) * 2]


def test_folded_spellings_read_alike(model, tokenizer):
    small, large = tokenizer.encode("a")[0], tokenizer.encode("A")[0]
    assert small != large
    assert memory.rows_of(model, tokenizer, [small, small], 0) == memory.rows_of(model, tokenizer, [large, large], 0)


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
    assert torch.equal(editor.look(ngram, 0), torch.ones(2, 8))
    assert torch.equal(suppressed[:, :-1], before[:, :-1])
    assert not torch.allclose(suppressed[:, -1], before[:, -1])
    changed = (model.tables[0].weight != tables[0]).any(1).nonzero().flatten().tolist()
    assert changed == sorted(memory.rows_of(model, tokenizer, ngram, 0))
    assert [editor.undo().layer for _ in range(3)] == [2, 0, 0]
    assert all(torch.equal(table.weight, old) for table, old in zip(model.tables, tables, strict=True))
    assert torch.equal(model(ids), before)
    with pytest.raises(ValueError, match="no edit to take back"):
        editor.undo()


def test_a_transplant_makes_one_ngram_recall_as_another(editor, tokenizer):
    source, target = tokenizer.encode(TEXTS[0])[-2:], tokenizer.encode(TEXTS[1])[-2:]
    editor.transplant(source, target, 0)
    assert torch.equal(editor.look(source, 0), editor.look(target, 0))
    with pytest.raises(ValueError, match="n-grams of 2 and 3 tokens"):
        editor.transplant(source, [*target, 5], 0)


def test_the_next_token_is_the_models(model, tokenizer):
    best = memory.next_tokens(model, tokenizer, TEXTS[0], 5)
    ids = torch.tensor([[tokenizer.begin_id, *tokenizer.encode(TEXTS[0])]])
    chances = model(ids)[0, -1, : tokenizer.vocabulary].softmax(-1)
    assert [p for _, p in best] == pytest.approx(chances.topk(5).values.tolist(), rel=1e-5)  # float32, two call shapes
    assert len(memory.next_tokens(model, tokenizer, TEXTS[0], 10_000)) == tokenizer.vocabulary


def test_popular_rows_and_who_shares_them(model, tokenizer):
    row, number, ngram = memory.popular(model, tokenizer, TEXTS, 0, 3)[0]
    counted = sum(row in one.rows[0] for text in TEXTS for one in memory.reads(model, tokenizer, text)[1:])
    assert number == counted
    assert isinstance(ngram, str)
    ids = tokenizer.encode(TEXTS[3])[-2:]
    own = set(memory.rows_of(model, tokenizer, ids, 0))
    shared = memory.sharing(model, tokenizer, ids, TEXTS, 0)
    assert all(1 <= count <= len(own) for count in shared.values())
    tight = LanguageModel(
        ModelConfig(
            vocabulary=300, dim=32, layers=1, dense_width=32, engram=EngramConfig(layers=(0,), rows_per_head=(2, 3))
        )
    )
    assert memory.sharing(tight, tokenizer, ids, TEXTS, 0)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m, t: memory.rows_of(m, t, "the", 1), "n-gram: got|layer: got 1"),
        (lambda m, t: memory.rows_of(m, t, [1], 0), "got 1 tokens .*expected 2 to 3"),
        (lambda m, t: memory.rows_of(m, t, [1, 2, 3, 4], 0), "got 4 tokens"),
        (lambda m, t: memory.rows_of(m, t, [1, 2], 1), "layer: got 1, expected a block that remembers: 0, 2"),
        (lambda m, t: memory.Editor(m, t).overwrite([1, 2], 0, torch.ones(2, 7)), r"values: got shape \(2, 7\)"),
        (lambda m, t: memory.Editor(LanguageModel(ModelConfig(dim=32)), t), "a model without Engram"),
    ],
)
def test_what_cannot_be_is_refused(model, tokenizer, call, said):
    with pytest.raises(ValueError, match=said):
        call(model, tokenizer)
