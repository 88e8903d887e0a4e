"""Serves a small model with experts, memory and a chat template, for the tests of this folder."""

import contextlib
import threading
import time

import pytest
import torch

from rorqual import checkpoint
from rorqual.data.tokenizer import train
from rorqual.layers.engram import EngramConfig
from rorqual.layers.moe import MoEConfig
from rorqual.model import LanguageModel, ModelConfig
from rorqual.serve.generate import load

TEMPLATE = r"""{{ bos_token }}{% for t in tools or [] %}[{{ t.function.name }}]{% endfor -%}
{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] -%}
<tool_call>{{ c.function.arguments["a"] }}</tool_call>{% endfor %}{{ "\n" }}{% endfor -%}
{% if add_generation_prompt %}assistant:{% endif %}"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model with experts and memory, whose table is longer than its tokenizer."""
    folder = tmp_path_factory.mktemp("runs") / "whale"
    tokenizer = train(["A whale lives in the sea. 🐋 é"] * 4, 280)
    config = ModelConfig(
        vocab_size=290,
        dim=32,
        layers=3,
        dense_width=32,
        engram=EngramConfig(layers=(1,), rows_per_head=(97, 97), heads=2, head_dim=8),
        moe=MoEConfig(routed=6, active=2, width=16, first_dense=1),
        init_std=0.1,
    )
    model = LanguageModel(config, torch.from_numpy(tokenizer.canonical_map()), seed=1)
    with torch.no_grad():
        model.tables[0].weight.normal_(std=2.0)
    checkpoint.save_model(folder, model, tokenizer)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def run(folder):
    return load(folder, device="cpu")


@pytest.fixture(scope="session")
def serving():
    """Runs real servers: `with serving(service, api_key=...) as address`."""
    uvicorn = pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")
    pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
    pytest.importorskip("llguidance", reason="the extra [serve] is not installed")
    from rorqual.serve.server import TimedProtocol, application

    @contextlib.contextmanager
    def serving(service, **options):
        config = uvicorn.Config(
            application(service, **options), http=TimedProtocol, port=0, log_level="error"
        )
        one = uvicorn.Server(config)
        thread = threading.Thread(target=one.run, daemon=True)
        thread.start()
        try:
            while not one.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield f"http://127.0.0.1:{one.servers[0].sockets[0].getsockname()[1]}"
        finally:
            one.should_exit = True
            thread.join()

    return serving
