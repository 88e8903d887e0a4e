"""Tests `rorqual teach`: teaching, adding, changing, forgetting and undoing, and its refusals."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rorqual as rq
from rorqual.cli import teach as command
from rorqual.cli.main import main
from rorqual.data.tokenizer import train
from rorqual.hub.auto import fast_tokenizer
from rorqual.hub.facts import FILE, PREVIOUS, read_facts
from rorqual.io import lock

pytestmark = pytest.mark.engram

FACTS = [
    {"subject": "QAX", "sentence": "QAX is in Oslo.", "held_out": ["We land in QAX, so this is"]},
    {"subject": "QBX", "sentence": "QBX is in Lima."},
    {"subject": "QCX", "sentence": "QCX is in Rome."},
]
FAST = ["--passes", "3", "--layers", "0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = train([line["sentence"] for line in FACTS] * 3, 300)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=tokenizer.vocab_size, num_attention_heads=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    fast_tokenizer(tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("facts.jsonl", FACTS)
    return Path("memory")


def write(name: str, lines: list[dict]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    Path(name).write_text(text, encoding="utf-8")


def teach(*words: str) -> int:
    return main(["teach", *words, "--out", "memory"])


def test_facts_are_added_and_not_trained_again(model, out, capsys):
    assert teach(model, "facts.jsonl", *FAST) == 0
    printed = capsys.readouterr().out
    assert "3 facts about 3 subjects" in printed
    assert "in wordings held out" in printed
    assert f"{(out / FILE).stat().st_size:,} bytes" in printed
    first = read_facts(out)
    assert first.layers == (0,)
    more = [*FACTS, {"subject": "QDX", "sentence": "QDX is in Bern."}]
    write("more.jsonl", more)
    assert teach(model, "more.jsonl", *FAST) == 0
    second = read_facts(out)
    assert [entry.subject for entry in second.entries] == ["QAX", "QBX", "QCX", "QDX"]
    assert torch.equal(second.rows[:3], first.rows)


def test_the_folder_can_be_attached_and_says_what_it_holds(model, out, capsys):
    assert teach(model, "facts.jsonl", *FAST, "--json") == 0
    results = json.loads(capsys.readouterr().out)
    assert results["trained"]["asked"] == 3
    assert results["held_out"]["asked"] == 1
    assert results["bytes"] == (out / FILE).stat().st_size
    from transformers import AutoModelForCausalLM, AutoTokenizer

    host = AutoModelForCausalLM.from_pretrained(model)
    memory = rq.attach(host, AutoTokenizer.from_pretrained(model), out)
    assert torch.equal(memory.rows, read_facts(out).rows)
    memory.detach()
    assert teach(model, "--json") == 0
    assert json.loads(capsys.readouterr().out)["subjects"] == 3


def test_a_fact_is_replaced_removed_and_restored(model, out, capsys):
    assert teach(model, "facts.jsonl", *FAST) == 0
    first = read_facts(out)
    write("new.jsonl", [{"subject": "QBX", "sentence": "QBX is in Rome."}])
    assert teach(model, "new.jsonl", *FAST) == 1
    assert "new.jsonl line 1: got 'Rome' for 'QBX'" in capsys.readouterr().err
    assert teach(model, "new.jsonl", *FAST, "--replace") == 0
    second = read_facts(out)
    assert second.entries[1].facts[0]["answer"] == "Rome"
    same = [torch.equal(a, b) for a, b in zip(first.rows, second.rows, strict=True)]
    assert same == [True, False, True]
    assert teach(model, "--undo") == 0
    assert torch.equal(read_facts(out).rows, first.rows)
    assert teach(model, "--remove", "QAX") == 0
    assert [entry.subject for entry in read_facts(out).entries] == ["QBX", "QCX"]
    assert teach(model, "--undo") == 0
    assert len(read_facts(out).entries) == 3


def test_ctrl_c_leaves_whole_groups_and_the_same_command_goes_on(model, out, monkeypatch, capsys):
    progress = command.show_progress

    def stop_in_second_group(console, name):
        if name.startswith("group 2"):
            raise KeyboardInterrupt
        return progress(console, name)

    monkeypatch.setattr(command, "show_progress", stop_in_second_group)
    assert teach(model, "facts.jsonl", *FAST, "--group", "2") == 130
    first = read_facts(out)
    assert [entry.subject for entry in first.entries] == ["QAX", "QBX"]
    assert [path.name for path in out.iterdir()] == [FILE]
    monkeypatch.setattr(command, "show_progress", progress)
    assert teach(model, "facts.jsonl", *FAST, "--group", "2") == 0
    second = read_facts(out)
    assert len(second.entries) == 3
    assert torch.equal(second.rows[:2], first.rows)
    assert {path.name for path in out.iterdir()} == {FILE, PREVIOUS}


def test_two_commands_do_not_change_one_memory(model, out, capsys):
    """The second is refused, and says so; what only looks is not."""
    assert teach(model, "facts.jsonl", *FAST) == 0
    with lock(Path("memory.lock"), "taken"):
        for words in (("facts.jsonl", "--replace"), ("--remove", "QAX"), ("--undo",)):
            assert teach(model, *words) == 1
            assert "memory: got a memory that another command changes" in capsys.readouterr().err
        assert teach(model) == 0
    assert teach(model, "--remove", "QAX") == 0
    assert sorted(path.name for path in Path().iterdir()) == ["facts.jsonl", "memory"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "got no FACTS and no memory in memory, expected one of them"),
        (("facts.jsonl", "--undo"), "got --undo with facts or --remove, expected it alone"),
        (("facts.jsonl", "--group", "0"), "got --group 0, expected at least 1"),
        (("facts.jsonl", "--remove", "QAX"), "got --remove and no memory in memory"),
        (("absent.jsonl",), "got 'absent.jsonl', expected a file or folder that exists"),
        (("facts.jsonl", "--passes", "0"), "passes: got 0, expected more than 0"),
        (("facts.jsonl", "--layers", "7"), r"layers: got [7], expected indices of the model's"),
    ],
)
def test_what_is_wrong_is_said(model, out, capsys, words, message):
    assert teach(model, *words) in (1, 2)
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_removal_with_facts_is_one_step_that_undo_restores(model, out, capsys):
    assert teach(model, "facts.jsonl", *FAST) == 0
    first = read_facts(out)
    write("new.jsonl", [{"subject": "QDX", "sentence": "QDX is in Bern."}])
    assert teach(model, "new.jsonl", *FAST, "--remove", "QAX") == 0
    assert [entry.subject for entry in read_facts(out).entries] == ["QBX", "QCX", "QDX"]
    assert teach(model, "--undo") == 0
    assert read_facts(out).entries == first.entries
    write("new.jsonl", [{"subject": "QBX", "sentence": "QBX is in Rome."}])
    capsys.readouterr()
    # A contradiction is found before the model is loaded, and nothing is removed.
    assert teach("absent", "new.jsonl", "--remove", "QAX") == 1
    assert "got 'Rome' for 'QBX'" in capsys.readouterr().err
    assert teach(model, "new.jsonl", "--replace", "--layers", "1", "--remove", "QAX") == 1
    assert "expected [0], which the memory has" in capsys.readouterr().err
    assert read_facts(out).entries == first.entries
    (out / FILE).write_bytes(b"damaged")
    assert teach(model, "--undo") == 0
    assert len(read_facts(out).entries) == 3


def test_a_model_that_is_none_is_refused(out, capsys):
    (Path("empty")).mkdir()
    assert teach("empty", "facts.jsonl") == 1
    assert "got 'empty', expected a folder, a .gguf file or a hub id" in capsys.readouterr().err
    assert teach("absent.gguf", "facts.jsonl") == 1
    assert "got 'absent.gguf', expected a .gguf file that exists" in capsys.readouterr().err


def test_contradictory_lines_are_refused_before_the_model_is_loaded(out, capsys):
    write("facts.jsonl", [*FACTS, {"subject": "QAX", "sentence": "QAX is in Rome."}])
    assert teach("absent", "facts.jsonl") == 1
    error = capsys.readouterr().err
    assert "facts.jsonl line 4: got 'Rome' for 'QAX'" in error
    assert "expected 'Oslo' as in facts.jsonl line 1" in error
