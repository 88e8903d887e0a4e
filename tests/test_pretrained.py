"""Tests the checkpoints of the package: what they are, say and weigh, and their names."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from rorqual import checkpoint, pretrained
from rorqual import config as configs
from rorqual.cli.main import main
from rorqual.evaluate import score, texts
from rorqual.presets import PRESETS
from rorqual.serve.generate import find, load
from rorqual.train.config import TrainConfig

GOLDEN = Path(__file__).parent / "golden" / "pretrained.json"
EXPECTED = json.loads(GOLDEN.read_text(encoding="utf-8"))
LARGEST = 12 << 20  # bytes of all of them in the wheel
# nats a token. Another order of a product's terms moves a loss by less than a thousandth of this.
MARGIN = 0.05


def test_every_checkpoint_is_a_preset_that_trained() -> None:
    assert sorted(EXPECTED) == pretrained.names()
    kinds = set()
    for name in pretrained.names():
        folder = pretrained.folder(name)
        files = {"config.json", "model.safetensors", "README.md", "train.json", "tokenizer.json"}
        assert {path.name for path in folder.iterdir()} == files | {"tokenizer_config.json"}
        config = checkpoint.read_config(folder)
        if config.engram is not None:
            # The tokenizer's own.
            config = configs.replace(config, "engram.pad_id", PRESETS[name].engram.pad_id)
        assert config == PRESETS[name]
        assert configs.load(TrainConfig, folder / "train.json").model == PRESETS[name]
        kinds.update(config.parts)
    assert kinds >= {"mla", "gqa", "nsa", "moba", "dsa", "csa", "csa2", "qsa", "engram", "moe"}


def test_they_are_small() -> None:
    files = [path for path in pretrained.WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < LARGEST
    for name in pretrained.names():
        with safe_open(pretrained.folder(name) / "model.safetensors", "pt") as file:
            names = file.keys()
            matrices = [one for one in names if len(file.get_slice(one).get_shape()) > 1]
            # Maps of ids and multipliers of hashes are whole numbers.
            dtypes = {file.get_slice(one).get_dtype() for one in matrices}
            assert "BF16" in dtypes and dtypes <= {"BF16", "I64", "I32"}


QUICK = ("tiny-engram", "tiny-nsa")  # one of each size for the fast tests


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name in pretrained.names()
    ],
)
def test_what_it_says(name: str) -> None:
    """Stored are the greedy tokens that are likelier than any other by more than a rounding."""
    run = load(name, device="cpu")
    expected = EXPECTED[name]
    done = run.complete([expected["prompt"]], max_new_tokens=len(expected["ids"]))[0]
    assert list(done.ids) == expected["ids"]
    assert done.text == expected["text"]


@pytest.mark.parametrize("name", ["tiny-engram", "tiny-nsa"])
def test_how_well_it_predicts(name: str) -> None:
    run = load(name, device="cpu")
    documents = texts("wordnet", split="validation", limit=40)
    scored = score(run.model, run.tokenizer, documents, seq_len=128, batch_size=8)
    assert scored.nats_per_token == pytest.approx(EXPECTED[name]["nats_per_token"], abs=MARGIN)


def test_a_model_here_comes_before_the_package(tmp_path, monkeypatch, capsys) -> None:
    """So does a run that has only begun; a folder with other things hides nothing."""
    monkeypatch.chdir(tmp_path)
    assert find("tiny") == pretrained.folder("tiny")
    assert capsys.readouterr().err == ""
    here = tmp_path / "tiny"
    here.mkdir()
    (here / "notes.txt").write_text("a whale")
    assert find("tiny") == pretrained.folder("tiny")
    assert "the folder tiny here holds no model" in capsys.readouterr().err
    (here / "config.json").write_text("{}")
    assert find("tiny") == Path("tiny") and find(here) == here
    (here / "config.json").rename(here / "train.json")
    with pytest.raises(FileNotFoundError, match="go on: rorqual train tiny"):
        find("tiny")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("checkpoints/step4/digest.json", "tiny holds no config.json"),
        ("model.safetensors", "tiny holds no config.json"),
        ("first/config.json", "did you mean tiny/first"),
    ],
)
def test_what_is_left_of_a_run_here_is_not_passed_over(
    tmp_path, monkeypatch, file: str, message: str
) -> None:
    """A user means this folder, and must not get the package's model of the same name instead."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny" / file
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    assert pretrained.resolve("tiny") == Path("tiny")
    with pytest.raises(FileNotFoundError, match=message):
        find("tiny")


def test_a_path_is_no_name(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in ("./tiny", "runs/tiny", "tiny/", str(tmp_path / "tiny")):
        assert not pretrained.is_pretrained(pretrained.resolve(path)), path


def test_a_run_of_that_name_is_mentioned(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "config.json").write_text("{}")
    assert find("tiny") == pretrained.folder("tiny")
    assert "your run is runs/tiny" in capsys.readouterr().err


def test_other_names_are_answered_with_what_there_is(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="preset without trained weights: rorqual train sm"):
        find("small")
    with pytest.raises(FileNotFoundError, match=r"pretrained model: tiny, .*tiny-engram"):
        find("tiny-engrm")
    with pytest.raises(ValueError, match="did you mean 'tiny-engram'"):
        pretrained.folder("tiny-engrm")


def test_commands_take_names_and_change_nothing(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in pretrained.WEIGHTS.rglob("*")}
    expected = EXPECTED["tiny-engram"]
    words = ["tiny-engram", expected["prompt"], "--temperature", "0", "--max-new-tokens", "4"]
    assert main(["generate", *words, "--device", "cpu"]) == 0
    assert (expected["prompt"] + expected["text"]).startswith(capsys.readouterr().out.strip())
    assert main(["memory", "tiny-engram", "a whale", "--suppress", " whale", "--save"]) == 1
    assert "expected a copy: rorqual export tiny-engram runs/mine" in capsys.readouterr().err
    assert stamps == {path: path.stat().st_mtime_ns for path in pretrained.WEIGHTS.rglob("*")}


@pytest.mark.slow
def test_the_report_of_one_is_written_here(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {path.name for path in pretrained.folder("tiny-engram").iterdir()}
    assert main(["report", "tiny-engram"]) == 0
    assert (tmp_path / "report.html").is_file()
    assert names == {path.name for path in pretrained.folder("tiny-engram").iterdir()}


@pytest.mark.slow
def test_a_training_begins_with_one(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": f"Whale {n} is a mammal of the sea."}) for n in range(50)]
    Path("notes.jsonl").write_text("\n".join(lines))
    sizes = ["steps=2", "batch_size=2", "seq_len=16", "data=notes.jsonl", "folder=run"]
    assert main(["train", "tiny-gqa", "init_from=tiny-gqa", *sizes]) == 0
    trained = checkpoint.load_model("run").state_dict()
    before = checkpoint.load_model(pretrained.folder("tiny-gqa")).state_dict()
    moved = [(trained[name] - before[name]).abs().max() for name in before if "weight" in name]
    assert 0 < max(moved) < 0.1
    assert configs.load(TrainConfig, "run/train.json").init_from == str(
        pretrained.folder("tiny-gqa")
    )
