"""Tests text generation: streaming, stops, batches, and what `load` finds and refuses."""

import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from rorqual import checkpoint
from rorqual.data.tokenizer import train
from rorqual.layers.engram import EngramConfig
from rorqual.layers.mtp import MTPConfig
from rorqual.model import LanguageModel, ModelConfig
from rorqual.serve import generate
from rorqual.serve.drafts import AcceptanceStats
from rorqual.serve.generate import Run, TextStream, load
from rorqual.serve.sampling import GREEDY, Sampling
from rorqual.tables import write_table

TEXT = [
    "A whale is a mammal that lives in the sea.",
    "Ein Wal ist kein Fisch: é ü ß 鲸鱼 🐋 ☃.",
] * 4


@pytest.fixture(scope="module")
def tokenizer():
    return train(TEXT, 290)


@pytest.fixture(scope="module")
def model(tokenizer):
    config = ModelConfig(
        vocab_size=300,
        dim=32,
        layers=2,
        dense_width=32,
        engram=EngramConfig(layers=(0,), rows_per_head=(97, 97), heads=2, head_dim=8),
        mtp=MTPConfig(),
        init_std=0.2,
    )
    model = LanguageModel(config, torch.from_numpy(tokenizer.canonical_map()), seed=1)
    with torch.no_grad():
        model.head.weight[tokenizer.end_id] = 0.0  # the end id would come too early for these tests
    return model


@pytest.fixture(scope="module")
def run(model, tokenizer):
    return Run(model, tokenizer)


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whale"
    checkpoint.save_model(folder, model, tokenizer)
    return folder


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=30))
def test_streamed_text_is_the_text(tokenizer, text):
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in tokenizer.encode(text)] + [stream.flush()]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(1, 288), max_size=25))
def test_streamed_ids_are_their_text_even_when_they_are_no_text(tokenizer, ids):
    stream = TextStream(tokenizer)
    assert "".join([stream.push(token) for token in ids] + [stream.flush()]) == tokenizer.decode(
        ids
    )


def test_a_character_comes_whole_and_at_once(tokenizer):
    # The four bytes of a whale, as byte-level BPE spells them.
    whale = [tokenizer.backend.token_to_id(byte) for byte in "ðŁĲĭ"]
    assert tokenizer.decode(whale) == "🐋"
    stream = TextStream(tokenizer)
    assert [stream.push(token) for token in [*whale, *tokenizer.encode("a")]] == [
        "",
        "",
        "",
        "🐋",
        "a",
    ]
    cut = TextStream(tokenizer)
    assert [cut.push(token) for token in whale[:3]] + [cut.flush()] == ["", "", "", "\ufffd"]


@settings(max_examples=60, deadline=None)
@given(
    text=st.text("ab.c", max_size=20),
    stop=st.lists(st.text("ab.", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_end_the_text_before_them(tokenizer, text, stop):
    stream = TextStream(tokenizer, stop)
    pieces = []
    for token in tokenizer.encode(text):
        pieces.append(stream.push(token))
    whole = "".join([*pieces, stream.flush()])
    assert stream.stopped == any(word in text for word in stop)
    if not stream.stopped:
        assert whole == text
    else:
        assert text.startswith(whole)
        assert not any(word in whole for word in stop)


def test_what_is_streamed_is_what_is_generated(run):
    for options in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 5, "top_p": 0.9}):
        pieces = list(run.stream("A whale", max_new_tokens=12, **options))
        assert "".join(pieces) == run.generate("A whale", max_new_tokens=12, **options)
        assert all(pieces)


def test_a_batch_of_texts_in_order(run):
    texts = ["A whale is a mammal", "", "Ein"]
    together = run.generate(texts, max_new_tokens=10, temperature=0.0)
    assert together == [run.generate(text, max_new_tokens=10, temperature=0.0) for text in texts]


def test_a_seed_repeats_and_none_does_not(run):
    options = {"max_new_tokens": 6, "temperature": 5.0}
    assert run.generate("A", seed=3, **options) == run.generate("A", seed=3, **options)
    assert len({run.generate("A", **options) for _ in range(3)}) > 1


def test_completions_say_why_they_ended(run):
    plain = run.complete(["A whale"], max_new_tokens=8, sampling=GREEDY)[0]
    assert (plain.finish, len(plain.ids), plain.text) == (
        "length",
        8,
        run.tokenizer.decode(plain.ids),
    )
    stopped = run.complete(["A whale"], max_new_tokens=8, sampling=GREEDY, stop=[plain.text[1:3]])[
        0
    ]
    assert stopped.finish == "stop"
    assert stopped.text == plain.text[: plain.text.index(plain.text[1:3])]


def test_the_end_of_a_document_ends_the_text(run, monkeypatch):
    free = run.complete(["A whale"], max_new_tokens=8, sampling=GREEDY)[0]
    monkeypatch.setattr(run.tokenizer, "end_id", free.ids[3])
    ended = run.complete(["A whale"], max_new_tokens=8, sampling=GREEDY)[0]
    assert ended.finish == "stop"
    assert ended.ids == free.ids[: free.ids.index(free.ids[3]) + 1]
    assert ended.text == run.tokenizer.decode(ended.ids[:-1])
    assert "".join(run.stream("A whale", max_new_tokens=8, sampling=GREEDY)) == ended.text


def test_drafts_say_the_same_and_are_counted(run):
    plain = run.complete(["A whale"], max_new_tokens=12, sampling=GREEDY)[0]
    drafted = run.complete(["A whale"], max_new_tokens=12, sampling=GREEDY, speculative=True)[0]
    assert (drafted.text, drafted.ids) == (plain.text, plain.ids)
    assert drafted.acceptance_stats.drafted > 0
    assert 0 <= drafted.acceptance_stats.acceptance <= 1
    texts = ["A whale", "The sea below is", "A"]
    for sampling in ({"temperature": 0.0}, {"seed": 3, "top_p": 0.9, "repetition_penalty": 1.3}):
        several = {"max_new_tokens": 12, **sampling}
        assert run.generate(texts, speculative=True, **several) == run.generate(texts, **several)
    acceptance_stats = AcceptanceStats()
    assert (
        "".join(
            run.stream(
                "A whale", max_new_tokens=12, sampling=GREEDY, acceptance_stats=acceptance_stats
            )
        )
        == plain.text
    )
    assert acceptance_stats == drafted.acceptance_stats


def test_the_object_says_what_it_is(run, folder):
    text = repr(load(folder))
    for piece in ("whale", "2 layers of width 32", "mla + engram + mtp", "float32 on cpu"):
        assert piece in text
    assert "in memory" in repr(run)
    assert run.config is run.model.config


def test_a_run_folder_comes_back(run, folder):
    loaded = load(folder, device="cpu")
    options = {"max_new_tokens": 9, "temperature": 0.0}
    assert loaded.generate("A whale", **options) == run.generate("A whale", **options)
    assert not loaded.model.training
    half = load(str(folder), device="cpu", dtype="bfloat16")
    assert half.model.embed.weight.dtype == torch.bfloat16
    half.generate("A whale", max_new_tokens=3)


def test_a_folder_without_a_tokenizer_says_so_when_text_is_asked_for(folder, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    run = load(bare)
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json"):
        run.generate("A")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: run.generate("A", max_new_tokens=0), "max_new_tokens=0, expected at least 1"),
        (lambda run: run.generate("A", temperature=-1.0), "temperature"),
        (lambda run: run.chat([{"role": "user", "content": "hi"}]), "no chat template"),
    ],
)
def test_what_cannot_be_done_is_refused(run, call, message):
    with pytest.raises(ValueError, match=message):
        call(run)


def test_load_says_what_is_missing_and_what_to_do(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nothing.*expected a run folder"):
        load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=f"did you mean .*{folder.name}"):
        load(folder.parent)
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        load(tmp_path)
    with pytest.raises(ValueError, match="is a file, expected the folder"):
        load(folder / "model.safetensors")
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is not JSON"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    with pytest.raises(ValueError, match="is a llama model, expected a rorqual run"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"dimm": 3}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"got no model\.safetensors"):
        load(tmp_path)


def test_a_mistyped_path_is_not_asked_of_the_hub(folder, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "runs" / "demo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "snapshot", lambda name: pytest.fail(f"asked the hub for {name}"))
    for path in (
        "runs/dmeo",
        "./runs/dmeo",
        "./rusn/demo",
        "runs/deno/",
        f"../{tmp_path.name}/runs/demoo",
    ):
        with pytest.raises(FileNotFoundError, match=r"no folder .*did you mean .*runs/demo\?"):
            load(path)
    for path in ("./a/b", "../a", "~/no-such-folder-here/b", "a/b/c", "plain", "runs/quite-other"):
        with pytest.raises(FileNotFoundError, match=r"no folder .*expected a run folder"):
            load(path)


def test_a_hub_id_that_cannot_be_had_is_one_line():
    with pytest.raises(
        FileNotFoundError, match="the hub did not give a model of that name"
    ) as caught:
        load("rorqual-test/no-such-model")
    assert "\n" not in str(caught.value)


def test_a_chat_template_writes_the_messages(run, folder, tmp_path):
    chatty = tmp_path / "chatty"
    shutil.copytree(folder, chatty)
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n"
        "{% endfor %}assistant:"
    )
    (chatty / "chat_template.jinja").write_text(template, encoding="utf-8")
    loaded = load(chatty)
    ids = loaded.chat([{"role": "user", "content": "A whale"}])
    assert ids[0] == loaded.tokenizer.begin_id
    assert loaded.tokenizer.decode(ids[1:]) == "user: A whale\nassistant:"


def test_a_seeded_batch_row_is_its_own_draw(run):
    sampling = Sampling(temperature=1.5, seed=2)
    both = run.complete(["A", "A"], max_new_tokens=12, sampling=sampling)
    assert both[0].text == run.complete(["A"], max_new_tokens=12, sampling=sampling)[0].text
    assert both[0].text != both[1].text


def test_sixty_four_texts_are_the_same_wherever_the_rows_are(folder, model, tmp_path):
    """Holds on device, host and disk, with a cache of no, one and all rows, and with drafts.

    Also with prefetch on and off, and with hot rows that stay cached.
    """
    row = 8 * 4
    save_file({"0": torch.arange(100)}, tmp_path / "hot")
    placements = [
        {"placement": "host"},
        {"placement": "host", "prefetch": False},
        *(
            {"placement": "disk", "hot_bytes": hot, "prefetch": on}
            for hot in (0, row, 1 << 20)
            for on in (True, False)
        ),
        {"placement": "disk", "hot_bytes": 50 * row, "hot": str(tmp_path / "hot")},
    ]
    texts = [TEXT[n % 2][: 1 + n // 2] for n in range(64)]
    resident = load(folder)
    expected = [done.ids for done in resident.complete(texts, max_new_tokens=12)]
    drafted = [
        done.ids for done in resident.complete(texts[:4], max_new_tokens=12, speculative=True)
    ]
    for placement in placements:
        other = load(folder, **placement)
        assert [done.ids for done in other.complete(texts, max_new_tokens=12)] == expected, (
            placement
        )
        assert [
            d.ids for d in other.complete(texts[:4], max_new_tokens=12, speculative=True)
        ] == drafted, placement
        with torch.no_grad():
            ids = torch.randint(290, (3, 40))
            assert torch.equal(other.model(ids), resident.model(ids))
        assert other.model.tables[0].metrics()["rows"] > 0
        other.model.tables[0].close()


def test_rows_of_another_folder_and_placements_that_cannot_be(folder, model, tmp_path):
    rows = model.tables[0].weight.detach()
    write_table(tmp_path / "rows" / "0", rows, dtype=torch.bfloat16)
    halved = load(folder, folder=str(tmp_path / "rows"))
    assert torch.equal(halved.model.tables[0].weight, rows.bfloat16())
    lying = load(folder, placement="disk", folder=str(tmp_path / "rows"))
    assert (
        lying.complete([TEXT[0]], max_new_tokens=8)[0].ids
        == halved.complete([TEXT[0]], max_new_tokens=8)[0].ids
    )
    write_table(tmp_path / "wrong" / "0", rows[1:])
    with pytest.raises(ValueError, match=r"tables: got rows by width .* as the config says"):
        load(folder, placement="host", folder=str(tmp_path / "wrong"))
    with pytest.raises(ValueError, match="hot_bytes: got -1"):
        load(folder, placement="disk", hot_bytes=-1)
    with pytest.raises(ValueError, match="tables: got 'disk' and placement 'host', expected one"):
        load(folder, tables="disk", placement="host")
    assert load(folder, tables="disk", placement="disk").model.tables[0].placement == "disk"
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "deepseek_v3"}')
    with pytest.raises(ValueError, match=r"no weights, expected model\.safetensors"):
        load(other, placement="disk")
