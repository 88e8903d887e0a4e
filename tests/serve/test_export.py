"""Tests exported folders: transformers loads them in a process of its own with equal logits."""

import json
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file

from rorqual import checkpoint
from rorqual.cli.main import main
from rorqual.data.tokenizer import train
from rorqual.model import LanguageModel, ModelConfig
from rorqual.model_config import EngramConfig, HyperConfig, MoEConfig
from rorqual.serve.export import export
from rorqual.serve.generate import Run, load

IDS = [[5, 6, 7, 8, 9, 5, 6]]
# What a program does that has nothing but rorqual, transformers and a folder.
PROGRAM = """
import sys, torch
{imports}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = torch.tensor({ids})
with torch.no_grad():
    torch.save(model(ids).logits, sys.argv[2])
print(type(model).__name__, model.dtype, tokenizer("A whale").input_ids[0])
"""
RORQUAL_FIRST = "import rorqual\nfrom transformers import AutoModelForCausalLM, AutoTokenizer"
RORQUAL_LAST = "from transformers import AutoModelForCausalLM, AutoTokenizer\nimport rorqual"
WITHOUT = "from transformers import AutoModelForCausalLM, AutoTokenizer"


@pytest.fixture(scope="module")
def tokenizer():
    return train(["A whale lives in the sea; a Whale in the sea. é è"] * 4, 280)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    config = ModelConfig(
        vocab_size=290,
        dim=32,
        layers=2,
        moe=MoEConfig(routed=6, active=2, width=16),
        engram=EngramConfig(layers=(0,), rows_per_head=(97, 97), heads=2, head_dim=8),
        hyper=HyperConfig(streams=2, iterations=2),
        init_std=0.2,
    )
    model = LanguageModel(config, torch.from_numpy(tokenizer.canonical_map()), seed=2)
    folder = tmp_path_factory.mktemp("runs") / "whale"
    checkpoint.save_model(folder, model, tokenizer)
    return folder


def in_a_program(folder, tmp_path, imports: str) -> tuple[str, torch.Tensor]:
    """Returns what a fresh process prints, and its logits."""
    script = PROGRAM.format(imports=imports, ids=IDS)
    command = [sys.executable, "-c", script, folder, tmp_path / "logits.pt"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip(), torch.load(tmp_path / "logits.pt")


@pytest.mark.slow
@pytest.mark.parametrize("imports", [RORQUAL_FIRST, RORQUAL_LAST], ids=["first", "last"])
def test_transformers_loads_it_with_equal_logits(folder, tmp_path, imports) -> None:
    out = export(load(folder, device="cpu"), tmp_path / "out")
    printed, logits = in_a_program(out, tmp_path, imports)
    assert printed == "RorqualForCausalLM torch.float32 0"
    with torch.no_grad():
        expected = load(folder, device="cpu").model(torch.tensor(IDS))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_published_format_needs_no_rorqual(tokenizer, tmp_path) -> None:
    config = ModelConfig(
        vocab_size=290, dim=32, layers=2, moe=MoEConfig(routed=8, active=2, width=16), init_std=0.2
    )
    model = LanguageModel(config, seed=2).eval()
    out = export(Run(model, tokenizer), tmp_path / "out", published=True)
    printed, logits = in_a_program(out, tmp_path, WITHOUT)
    assert printed.startswith("DeepseekV3ForCausalLM")
    with torch.no_grad():
        torch.testing.assert_close(logits, model(torch.tensor(IDS)), rtol=1e-4, atol=1e-5)


def test_the_command_writes_a_folder_for_the_hub(folder, tmp_path, capsys) -> None:
    out = tmp_path / "small"
    words = ["export", str(folder), str(out), "--dtype", "bfloat16", "--license", "mit", "--json"]
    assert main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    files = {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert set(printed["files"]) == files == {path.name for path in out.iterdir()}
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "mit" and "exported from whale" in card.content
    with safe_open(out / "model.safetensors", "pt") as file:
        assert file.get_slice("embed.weight").get_dtype() == "BF16"
    before = load_file(folder / "model.safetensors")
    for name, tensor in load_file(out / "model.safetensors").items():
        expected = before[name]
        # The router's bias moves by steps that bfloat16 would lose.
        as_it_was = not expected.is_floating_point() or "bias" in name
        assert torch.equal(tensor, expected if as_it_was else expected.bfloat16()), name


def test_the_card_and_the_data_of_a_run_go_with_it(folder, tmp_path) -> None:
    (folder / "README.md").write_text("---\nlibrary_name: rorqual\n---\n\n# whale\n")
    (folder / "train.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    out = export(load(folder, device="cpu"), tmp_path / "out", license="apache-2.0")
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "apache-2.0" and card.text.strip() == "# whale"
    assert (out / "train.json").is_file() and (out / "chat_template.jinja").is_file()
    for name in ("README.md", "train.json", "chat_template.jinja"):
        (folder / name).unlink()


def test_refusals(folder, tmp_path, capsys) -> None:
    with pytest.raises(ValueError, match="already holds a model, expected a new folder"):
        export(load(folder, device="cpu"), folder)
    with pytest.raises(ValueError, match="engram"):
        export(load(folder, device="cpu"), tmp_path / "out", published=True)
    assert main(["export", "no-such-run", str(tmp_path / "x")]) == 1
    assert "no folder no-such-run" in capsys.readouterr().err


def test_what_a_folder_has_stays(folder, tmp_path) -> None:
    run = load(folder, device="cpu")
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine", encoding="utf-8")
    (out / "notes.txt").write_text("mine, too", encoding="utf-8")
    with pytest.raises(ValueError, match=r"already has README\.md, expected a folder without"):
        export(run, out)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "notes.txt"]
    (out / "README.md").unlink()
    export(run, out)
    assert (out / "notes.txt").read_text(encoding="utf-8") == "mine, too"
    assert not list(out.glob(".*"))


def test_no_path_of_this_machine_is_published(folder, tmp_path) -> None:
    run = tmp_path / "here" / "whale"
    run.mkdir(parents=True)
    for path in folder.iterdir():
        (run / path.name).write_bytes(path.read_bytes())
    data = {"source": str(tmp_path / "here" / "texts"), "cache": None}
    options = {"folder": str(run), "init_from": str(tmp_path / "here" / "base"), "data": data}
    (run / "train.json").write_text(json.dumps(options), encoding="utf-8")
    (run / "README.md").write_text(f"---\n---\nrorqual train folder={run}\n", encoding="utf-8")
    out = export(load(run, device="cpu"), tmp_path / "out")
    exported = json.loads((out / "train.json").read_text(encoding="utf-8"))
    assert exported == {
        "folder": "whale",
        "init_from": "base",
        "data": {"source": "texts", "cache": None},
    }
    assert "rorqual train folder=whale" in (out / "README.md").read_text(encoding="utf-8")
    for path in out.iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()
