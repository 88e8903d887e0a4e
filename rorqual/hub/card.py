"""The parts of a model card that every card has, in the format of the Hugging Face hub.

A card is README.md: front matter that the hub reads, then how to use the model and what it is.
"""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from rorqual.costs import costs
from rorqual.model_config import ModelConfig

CARD = "README.md"
# The scores of a training that a card has: their kind, and what they are called.
SCORES = {
    "validation_loss": ("loss", "nats a token"),
    "bits_per_byte": ("bits_per_byte", "bits a byte"),
    "accuracy": ("accuracy", "share of right answers"),
}


def front_matter(
    name: str,
    config: ModelConfig,
    data: str | None = None,
    scores: Mapping[str, float] | None = None,
    **fields: Any,
) -> str:
    """Returns the YAML that begins a card, with its two lines of dashes.

    `data` names the text that the scores are of; `fields` are others of the hub's, such as license.
    """
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=data.partition(" ")[0],
            dataset_name=f"{data}, held out",
            metric_type=kind,
            metric_name=words,
            metric_value=round(scores[key], 4),
        )
        for key, (kind, words) in SCORES.items()
        if data is not None and scores is not None and key in scores
    ]
    described = ModelCardData(
        library_name="rorqual",
        pipeline_tag="text-generation",
        tags=["rorqual", *config.parts],
        model_name=name,
        eval_results=results or None,
        **fields,
    )
    return f"---\n{described.to_yaml()}\n---\n"


def usage() -> str:
    """Returns the section that says how a folder is used, in a terminal and from Python."""
    return """## Use

PATH is this folder, or its name on the hub.

```sh
pip install rorqual
rorqual generate PATH "..."
```

```python
import rorqual  # transformers knows the model from here on; no code of the folder is run
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH")
tokenizer = AutoTokenizer.from_pretrained("PATH")
```
"""


def description(config: ModelConfig, context: int) -> str:
    """Returns the section with the sizes of a model and its costs in a context."""
    counted = costs(config, context)
    rows = {
        "parameters": f"{counted.total + counted.mtp:,}",
        "activated a token": f"{counted.activated:,}",
        f"FLOPs a token, forward, context {context:,}": f"{counted.flops_per_token:,}",
        "cache bytes a token, bfloat16": f"{counted.cache_bytes_per_token:,}",
        "blocks, width, vocabulary": f"{config.layers}, {config.dim}, {config.vocab_size:,}",
        "parts": ", ".join(config.parts),
    }
    return f"## Model\n\n{table(rows)}\n\n`config.json` has every field.\n"


def table(rows: Mapping[str, str]) -> str:
    """Returns a table of two columns without headings."""
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    return "\n".join(["| | |", "| --- | ---: |", *lines])
