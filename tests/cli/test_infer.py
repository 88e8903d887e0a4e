"""Tests the commands that run a trained model."""

import io
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from rorqual import evaluate
from rorqual.checkpoint import save_model
from rorqual.cli.main import main
from rorqual.data.corpus import open_corpus
from rorqual.layers.mtp import MTPConfig
from rorqual.model import LanguageModel
from rorqual.serve.generate import load


def test_generate_prints_the_text_and_what_follows(
    small_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", str(small_run), "The blue whale", "--max-new-tokens", "5", "--seed", "1"]
    assert main(words) == 0
    first = capsys.readouterr().out
    assert first.startswith("The blue whale")
    assert main(words) == 0
    assert capsys.readouterr().out == first
    assert main([*words, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["prompt"] + content["text"] + "\n" == first
    assert len(content["ids"]) == 5
    assert content["finish"] in ("length", "stop")


def test_generate_with_drafts_says_the_same_and_how_many_stood(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = load(small_run)
    save_model(tmp_path, LanguageModel(replace(run.config, mtp=MTPConfig(depth=2))), run.tokenizer)
    words = [
        "generate",
        str(tmp_path),
        "The blue whale",
        "--max-new-tokens",
        "6",
        "--temperature",
        "0",
    ]
    assert main(words) == 0
    plain = capsys.readouterr().out
    assert main([*words, "--speculative"]) == 0
    message = capsys.readouterr()
    assert message.out == plain
    assert main([*words, "--speculative", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    acceptance_stats = content["acceptance_stats"]
    assert content["prompt"] + content["text"] + "\n" == plain
    assert 2 * acceptance_stats["rounds"] >= acceptance_stats["drafted"] > 0
    assert acceptance_stats["acceptance"] == pytest.approx(
        acceptance_stats["accepted"] / acceptance_stats["drafted"]
    )
    text = (
        f"drafts: {acceptance_stats['drafted']} in {acceptance_stats['rounds']} forwards, "
        f"accepted {acceptance_stats['acceptance']:.0%}"
    )
    assert text in message.err


def test_generate_reads_standard_input(
    small_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin.read", lambda: "A fin", raising=False)
    assert main(["generate", str(small_run), "--max-new-tokens", "1"]) == 0
    assert capsys.readouterr().out.startswith("A fin")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["generate", "{run}", "x", "--temperature", "-1"], 1, "got temperature=-1.0"),
        (["generate", "{run}", "x", "--max-new-tokens", "0"], 1, "got max_new_tokens=0"),
        (["generate", "{run}", "x", "--device", "gpu"], 1, "got device 'gpu'"),
        (["generate", "{run}", "x", "--speculative"], 1, "got a model without MTP"),
        (["generate", "{run}/..", "x"], 1, "did you mean"),
        (["generate", "no-such-folder", "x"], 1, "no folder no-such-folder"),
        (["generate"], 2, "required: RUN"),
        (["generate", "{run}", "x", "--dtype", "int8"], 2, "'int8'"),
        (["eval", "{run}", "--split", "test"], 2, "'test'"),
        (["eval", "{run}", "--data", "no-such-text.txt"], 1, "no-such-text.txt"),
        (["serve", "{run}", "--port", "70000"], 2, "expected 0..65535"),
        (["serve", "{run}", "--port", "0", "--drafts"], 1, "got a model without MTP"),
        (["explore"], 2, "expected a run folder first"),
        (["explore", "no-such-folder"], 1, "no folder no-such-folder"),
    ],
)
def test_mistakes_are_a_line(
    words: list[str], code: int, message: str, small_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(run=small_run) for word in words]) == code
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.splitlines()) <= 2


def test_eval_scores_a_file(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("The blue whale is large.\n\nA fin whale sings.\n")
    words = [
        "eval",
        str(small_run),
        "--data",
        str(tmp_path / "notes.txt"),
        "--split",
        "all",
        "--seq-len",
        "16",
    ]
    assert main([*words, "--json"]) == 0
    score = json.loads(capsys.readouterr().out)
    assert 0 < score["nats_per_token"] < 20
    assert score["documents"] >= 1
    assert main(words) == 0
    assert f"{score['nats_per_token']:.4f} nats a token" in capsys.readouterr().out


def test_eval_is_on_the_text_kept_apart_from_training(
    small_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    notes = tmp_path / "notes.jsonl"
    shutil.copytree(small_run, run)
    texts = [f"The whale number {n} sings below the sea." for n in range(12)]
    notes.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    data = {"source": str(notes), "column": "body", "limit": 4}
    (run / "train.json").write_text(json.dumps({"data": data, "seq_len": 16}))
    lengths = []
    score = evaluate.score
    monkeypatch.setattr(
        evaluate,
        "score",
        lambda *a, **arguments: lengths.append(arguments["seq_len"]) or score(*a, **arguments),
    )

    def documents(*words: str) -> int:
        assert main(["eval", str(run), "--json", *words]) == 0
        return json.loads(capsys.readouterr().out)["documents"]

    seen = sum(1 for _ in open_corpus(str(notes), column="body", limit=4).documents())
    assert documents("--split", "all") == seen
    assert documents("--split", "validation") + documents("--split", "train") == seen
    assert documents("--data", str(notes), "--column", "body", "--seq-len", "8") >= 1
    assert lengths == [16, 16, 16, 8]
    assert main(["eval", str(run), "--data", str(notes)]) == 1, "the run's column is its own data's"


def test_serve_passes_its_options_on(small_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}
    monkeypatch.setattr(
        "rorqual.serve.server.serve", lambda run, **options: asked.update(options, run=run)
    )
    words = ["--port", "1234", "--max-batch-size", "2", "--cache-tokens", "9000"]
    words += ["--prefill-chunk", "32", "--prefix-cache", "false"]
    assert main(["serve", str(small_run), *words]) == 0
    assert asked.pop("run").config.layers == 2
    assert asked.pop("run_name") == str(small_run)
    assert asked == {
        "host": "127.0.0.1",
        "port": 1234,
        "api_key": None,
        "cors": (),
        "max_batch_size": 2,
        "context": 4096,
        "cache_tokens": 9000,
        "prefill_chunk": 32,
        "prefix_cache": False,
        "drafts": False,
        "max_waiting": 256,
        "timeout": 600.0,
    }


def test_serve_takes_its_key_from_the_environment_too(
    small_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = []
    monkeypatch.setattr(
        "rorqual.serve.server.serve", lambda run, **options: keys.append(options["api_key"])
    )
    monkeypatch.setenv("RORQUAL_API_KEY", "from the environment")
    words = ["serve", str(small_run), "--port", "0"]
    assert main(words) == main([*words, "--api-key", "typed"]) == 0
    assert keys == ["from the environment", "typed"]
    monkeypatch.setenv("RORQUAL_API_KEY", " ")
    assert main(words) == 2
    assert "got an empty API key" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "count"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_serve_lets_idle_threads_sleep(
    variables: dict[str, str], count: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Set first, so that what the command sets is undone afterwards.
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["serve", "runs/none", "--port", "99999"]) == 2
    assert os.environ.get("GOMP_SPINCOUNT") == count


def test_a_chat_in_the_terminal(
    small_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["/set temperature 0", "The blue", "/nonsense", "/set top_k x", "/reset", "The blue"]
    typed = iter([*lines, "/help", "/history", "", "/exit now", "never read"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    assert main(["chat", str(small_run), "--max-new-tokens", "4"]) == 0
    assert next(typed) == "never read"
    printed = capsys.readouterr()
    first, second = printed.out.split("/reset")[0].splitlines()[:2]
    assert first == second
    assert "has no chat template" in printed.err
    assert len(re.findall(r"\(4 tokens, \d+\.\d a second\)", printed.err)) == 2
    assert "/nonsense" in printed.err or "'nonsense'" in printed.err
    assert "top_k: got 'x', expected a number or none" in printed.err


def test_explore_passes_its_options_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("rorqual.explore.main", asked.append)
    assert main(["explore", "runs/x", "--port", "1234"]) == 0
    assert (asked[0].run, asked[0].port) == ("runs/x", 1234)


def test_memory_shows_reads_and_what_an_edit_changes(
    small_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["memory", str(small_run), "The blue whale", "--top", "3"]
    assert main([*words, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert len(content["next"]["as it is"]) == 3
    assert all(0 < gate < 1 for read in content["reads"] for gate in read["gates"]["1"])
    assert main([*words, "--suppress", "blue whale"[:2]]) == 0
    assert "next, edited: " in capsys.readouterr().out
    assert main([*words, "--suppress", "The blue whale is the largest"]) == 1
    assert "expected 2 to 3" in capsys.readouterr().err


def test_memory_saves_edits_and_takes_them_back(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    weights = run / "model.safetensors"
    start = weights.read_bytes()

    def printed(*words: str) -> dict:
        assert main(["memory", str(run), *words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    ngram = printed("The blue whale")["reads"][-1]["ngrams"][0]
    edited = printed("The blue whale", "--suppress", ngram, "--save")
    assert weights.read_bytes() != start
    assert edited["change"]["kl"] >= 0 and edited["edited"][0]["layer"] == 1
    printed("--overwrite", ngram, "0.5", "--save")
    assert [edit["what"].split()[0] for edit in printed("--edits")["saved"]] == [
        "suppress",
        "overwrite",
    ]
    assert (
        printed("The blue whale")["next"]["as it is"]
        != printed("--undo", "The blue whale")["next"]["edited"]
    )
    assert printed("--undo")["undone"][0]["what"].startswith("suppress")
    assert weights.read_bytes() == start
    assert printed("--edits")["saved"] == []
    assert main(["memory", str(run), "--undo"]) == 1
    assert "no edit to take back" in capsys.readouterr().err


def test_memory_counts_a_corpus(
    small_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("The blue whale is large.\n\nA fin whale sings.\n")
    words = ["memory", str(small_run), "--data", str(tmp_path / "notes.txt"), "--top", "2"]
    assert main([*words, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)["corpus"]["1"]
    assert len(content["popular"]) == len(content["collisions"]["worst"]) == 2
    assert main(words) == 0
    assert "n-grams read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "got nothing to do"),
        (["x", "--shared", "ab"], 2, "got --shared without --data"),
        (["x", "--top", "0"], 2, "got --top 0"),
        (["x", "--layer", "0", "--suppress", "xy"], 1, "layer: got 0"),
        (["x", "--overwrite", "xy", "much"], 1, "expected a number or a JSON file"),
        (["--undo"], 1, "no edit to take back"),
    ],
)
def test_mistakes_about_memory_are_a_line(
    words: list[str], code: int, message: str, small_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["memory", str(small_run), *words]) == code
    printed = capsys.readouterr().err
    assert message in printed and len(printed.splitlines()) <= 2


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_generate_says_that_it_reads_a_terminal(
    small_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["generate", str(small_run), "--max-new-tokens", "1"]
    monkeypatch.setattr("sys.stdin", Terminal("A fin"))
    assert main(words) == 0
    message = capsys.readouterr()
    assert "reading the text from standard input" in message.err
    assert message.out.startswith("A fin")
    monkeypatch.setattr("sys.stdin", io.StringIO("A fin"))
    assert main(words) == 0
    assert capsys.readouterr().err == ""


def test_folders_of_another_kind_are_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    sweep = tmp_path / "sweep"
    pictures = tmp_path / "pictures"
    for folder in (adapter, sweep, pictures, *(sweep / f"run{n}" for n in range(6))):
        folder.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    for n in range(6):
        (sweep / f"run{n}" / "config.json").write_text("{}")
    (pictures / "whale.png").write_bytes(b"png")
    for where, printed_json in (
        (adapter, "holds a PEFT adapter"),
        (sweep, "or one of 2 more?"),
        (pictures, "holds no config.json"),
        (pictures / "whale.png", "is a file, expected the folder"),
    ):
        for words in (["generate", str(where), "x"], ["train", str(where)], ["params", str(where)]):
            assert main(words) == 1, words
            printed = capsys.readouterr().err
            assert printed_json in printed
            assert len(printed.splitlines()) == 1
    assert main(["train", str(tmp_path / "none")]) == 1
    assert f"no folder {tmp_path / 'none'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "no-such-owner/name", "x"],
        ["train", "tiny", "--data", "hf:no-such-owner/data"],
        ["train", "tiny", "--data", "wordnet", "--data.tokenizer", "no-such-owner/name"],
    ],
    ids=["model", "data", "tokenizer"],
)
def test_offline_the_hub_is_a_line(
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    # All tests start with this variable.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(words) == 1
    printed = capsys.readouterr().err.strip().splitlines()
    assert len(printed) == 1
    for piece in (
        "cannot be reached (HF_HUB_OFFLINE forbids",
        "set HF_ENDPOINT to a mirror",
        "a local path",
    ):
        assert piece in printed[0]


def test_a_dataset_without_its_prefix_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "some-owner/data"]) == 1
    assert "write hf:some-owner/data" in capsys.readouterr().err
