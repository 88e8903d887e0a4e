"""Explains an option that a command does not have: what it is called here, or the nearest name."""

from collections.abc import Mapping
from difflib import get_close_matches

# A flag of other trainers and servers, or of an earlier version, and our names for it: the first
# that the command has.
ELSEWHERE = {
    "--batch-size": ("max-batch-size",),
    "--rows": ("batch-size", "max-batch-size"),
    "--length": ("seq-len",),
    "--micro-rows": ("micro-batch-size",),
    "--tables": ("placement",),
    "--machine.tables": ("machine.placement",),
    "--model.vocabulary": ("model.vocab-size",),
    "--data.vocabulary": ("data.vocab-size",),
    "--model.nsa.chosen": ("model.nsa.top-k",),
    "--model.moba.chosen": ("model.moba.top-k",),
    "--model.dsa.chosen": ("model.dsa.top-k",),
    "--train-batch-size": ("batch-size", "max-batch-size"),
    "--per-device-train-batch-size": ("micro-batch-size",),
    "--gradient-accumulation-steps": ("micro-batch-size",),
    "--grad-accum-steps": ("micro-batch-size",),
    "--epochs": ("steps",),
    "--num-epochs": ("steps",),
    "--num-train-epochs": ("steps",),
    "--max-steps": ("steps",),
    "--num-steps": ("steps",),
    "--iters": ("steps",),
    "--max-iters": ("steps",),
    "--learning-rate": ("optim.lr",),
    "--lr": ("optim.lr",),
    "--weight-decay": ("optim.weight-decay",),
    "--optim.decay": ("optim.schedule",),
    "--lr-scheduler-type": ("optim.schedule",),
    "--lr-decay-style": ("optim.schedule",),
    "--wandb-project": ("wandb",),
    "--save-total-limit": ("keep",),
    "--warmup-steps": ("optim.warmup",),
    "--warmup-iters": ("optim.warmup",),
    "--max-grad-norm": ("optim.clip",),
    "--grad-clip": ("optim.clip",),
    "--optimizer": ("optim.kind",),
    "--block-size": ("seq-len", "context"),
    "--seq-len": ("context",),
    "--seq-length": ("seq-len", "context"),
    "--max-seq-len": ("seq-len", "context"),
    "--max-model-len": ("context", "seq-len"),
    "--context-length": ("seq-len", "context"),
    "--max-length": ("max-new-tokens", "seq-len", "context"),
    "--max-tokens": ("max-new-tokens", "seq-len"),
    "--max-num-seqs": ("batch-size", "max-batch-size"),
    "--output-dir": ("folder", "out"),
    "--out-dir": ("folder", "out"),
    "--output": ("out", "folder"),
    "--dataset": ("data.source", "data"),
    "--dataset-name": ("data.source", "data"),
    "--train-file": ("data.source", "data"),
    "--tokenizer": ("data.tokenizer",),
    "--tokenizer-name": ("data.tokenizer",),
    "--vocab-size": ("model.vocab-size",),
    "--hidden-size": ("model.dim",),
    "--num-layers": ("model.layers",),
    "--save-steps": ("save-every",),
    "--save-interval": ("save-every",),
    "--eval-steps": ("validate-every",),
    "--eval-interval": ("validate-every",),
    "--logging-steps": ("log-every",),
    "--log-interval": ("log-every",),
}
# Conversions, for options whose number has another meaning here.
NOTES = {
    "steps": "steps = epochs * tokens of the text / (--batch-size * --seq-len)",
    "micro-batch-size": "steps of accumulation = --batch-size / (ranks * --micro-batch-size)",
}
COUNTED_OTHERWISE = (
    "--epochs",
    "--num-epochs",
    "--num-train-epochs",
    "--gradient-accumulation-steps",
    "--grad-accum-steps",
)


def explain(word: str, names: Mapping[str, str], command: str) -> str:
    """Describes an unknown option, and suggests another.

    The suggestion is the name here of an option of other tools, or the nearest option.
    """
    head, equals, value = word.partition("=")
    dashes = "--" if head.startswith("--") else ""
    name = head.removeprefix("--").replace("-", "_")
    flag = f"--{name.replace('_', '-')}"
    here = f"rorqual {' '.join(section for section in command.split() if section.islower())}"
    for other in ELSEWHERE.get(flag, ()) if dashes or equals else ():
        if other.replace("-", "_") in names.values():
            note = f"; {NOTES[other]}" if flag in COUNTED_OTHERWISE else ""
            return (
                f"got {flag}, which {here} calls "
                f"--{'data' if other == 'data.source' else other}{note}"
            )
    path, _, tail = name.rpartition("no_")
    if tail and path + tail in names:
        return f"got {word}, expected {path}{tail}=false"
    similar = [names for names in names if names.rpartition(".")[2] == name] or get_close_matches(
        name, names, 1, 0.6
    )
    if similar and (dashes or equals):
        right = similar[0].replace("_", "-") if dashes else similar[0]
        return (
            f"got {word}, which is no option of {here}; "
            f"did you mean {dashes}{right}{equals}{value}?"
        )
    return f"got {word!r}, expected an option; {here} --help lists them"
