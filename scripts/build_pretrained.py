"""Trains the checkpoints that come with the package, and puts them into rorqual/weights.

    python scripts/build_pretrained.py                        all of them, one after another
    python scripts/build_pretrained.py tiny tiny-nsa          these alone
    python scripts/build_pretrained.py --jobs 2 tiny tiny-engram    two at a time, a core each

Each is two commands, which are printed: `rorqual train` on the bundled text with one thread, into
runs/pretrained/NAME, and `rorqual export` in bfloat16. An interrupted training goes on where it
was, to the same weights: one thread, one seed, and the same order of the text. A checkpoint of the
package is replaced once its successor is whole. At the end tests/golden/pretrained.json gets what
tests/test_pretrained.py compares with: the greedy continuation of a prompt and the loss on held-out
text of each. What shows these models is then renewed by the command that is printed last.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from rorqual.evaluate import score, texts
from rorqual.serve.generate import Run, load

ROOT = Path(__file__).resolve().parents[1]
RUNS = Path("runs/pretrained")
EXPECTED = ROOT / "tests" / "golden" / "pretrained.json"
# As the bundled text has them; the first after which a model says enough.
PROMPTS = ("genus of", "a city in the", "whale:", "king:")
ENOUGH = 4  # tokens
TOKENS = 24  # at most, of what it says
CLEAR = 0.01  # of logits, between the likeliest token and the next
DOCUMENTS = 40  # of the held-out text
SHOWN_BY = ("06_gates", "08_sparse_attention", "09_drafts")  # notebooks that load them
# Steps of 8 x 128 tokens: four to thirty minutes each on one core. 3,400 are one time over the
# text.
STEPS = {
    "tiny": 3400,
    "tiny-engram": 3400,
    "tiny-gqa": 800,
    "tiny-nsa": 800,
    "tiny-moba": 800,
    "tiny-dsa": 800,
    "tiny-csa": 800,
    "tiny-csa2": 800,
    "tiny-qsa": 800,
}


def rorqual(*words: str | os.PathLike[str]) -> str:
    """Runs a command of rorqual in the checkout and returns what it prints."""
    print("rorqual", shlex.join(map(os.fspath, words)), flush=True)
    command = [sys.executable, "-m", "rorqual", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout


def build(name: str) -> None:
    """Trains a checkpoint and replaces the one in the package."""
    run = RUNS / name
    size = ["batch_size=8", "seq_len=128", "threads=1", "device=cpu"]
    rorqual("train", name, f"steps={STEPS[name]}", *size, f"folder={run}")
    exported = RUNS / "exported" / name
    shutil.rmtree(ROOT / exported, ignore_errors=True)
    rorqual("export", run, exported, "--dtype", "bfloat16", "--license", "mit")
    folder = ROOT / "rorqual" / "weights" / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.move(ROOT / exported, folder)


def clear(run: Run, prompt: str) -> list[int]:
    """Returns the greedy ids up to the first that is not clearly the likeliest.

    Another machine adds the terms of a product in another order.
    """
    ids = run.prompt(prompt)
    first = len(ids)
    with torch.no_grad():
        while len(ids) < first + TOKENS:
            values, indices = run.model(torch.tensor([ids]))[0, -1].topk(2)
            likeliest = int(indices[0])
            if values[0] - values[1] < CLEAR or likeliest == run.tokenizer.end_id:
                break
            ids.append(likeliest)
    return ids[first:]


def expected(name: str) -> dict[str, object]:
    """Returns what a checkpoint says and how well it predicts held-out text."""
    run = load(name, device="cpu")
    prompt, ids = next(
        (prompt, ids) for prompt in PROMPTS if len(ids := clear(run, prompt)) >= ENOUGH
    )
    documents = texts("wordnet", split="validation", limit=DOCUMENTS)
    scored = score(run.model, run.tokenizer, documents, seq_len=128, batch_size=8)
    return {
        "prompt": prompt,
        "text": run.tokenizer.decode(ids),
        "ids": ids,
        "nats_per_token": round(scored.nats_per_token, 4),
    }


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a checkpoint; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, a core each")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in STEPS]:
        parser.error(f"got {unknown[0]}, expected one of {', '.join(STEPS)}")
    names = options.names or list(STEPS)
    lines = json.loads(EXPECTED.read_text(encoding="utf-8")) if EXPECTED.is_file() else {}
    with ThreadPoolExecutor(options.jobs) as pool:
        # An error of a training is raised here, when those that run have ended.
        for name, _ in zip(names, pool.map(build, names), strict=True):
            lines[name] = expected(name)
            trained = [one for one in STEPS if one in lines]
            # One line a model.
            each = [f" {json.dumps(one)}: {json.dumps(lines[one])}" for one in trained]
            EXPECTED.write_text("{\n" + ",\n".join(each) + "\n}\n", encoding="utf-8")
    print("show them anew: python scripts/build_notebooks.py", *SHOWN_BY)


if __name__ == "__main__":
    main()
