# %% [markdown] lang="en"
# # 9. Multi-token prediction and drafts
#
# DeepSeek-V3 is trained to predict two tokens at every position. The second prediction is meant to make the model plan ahead, and at generation it is a draft for
# free: the model reads the draft together with the last token, and if it is what the model would have said, two tokens came out of one forward pass. The text does not
# change, only the number of passes.
#
# Level: look inside. Takes 20 minutes. Paper: DeepSeek-V3 (arXiv 2412.19437), section 2.2. A minute of one core.
# %% [markdown] lang="zh"
# # 9. 多词元预测与草稿
#
# DeepSeek-V3 在每个位置上训练预测两个词元。第二个预测意在促使模型提前规划，而在生成时它就是一份免费的草稿：模型把草稿连同最后一个词元一起读入，如果草稿正是
# 模型自己会说的，一次前向就得到两个词元。文本不变，变的只是前向的次数。
#
# 层次：深入内部。用时 20 分钟。论文：DeepSeek-V3（arXiv 2412.19437）第 2.2 节。单核约一分钟。
# %%
import os

# Generation module by module: the compiled step would first have to be compiled on a new machine.
os.environ["RORQUAL_KERNELS"] = "decode_step=reference"

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import rorqual as rq
from rorqual.data.sources import find
from rorqual.data.tokenizer import train as train_tokenizer
from rorqual.layers.mtp import MTPConfig, ahead
from rorqual.serve.decoding import decode, speculate
from rorqual.serve.drafts import AcceptanceStats
from rorqual.serve.sampling import Sampling
from rorqual.train.config import recipe
from rorqual.train.optim import Optimizer, schedule

# %% [markdown] lang="en"
# ## One more block a depth
#
# The model's last block leaves $h_i$ at position $i$, from which the head predicts $t_{i+1}$. Depth $k$ of MTP joins the state of the depth before with the embedding of the
# token $k$ further, which is known in training, and runs one more block:
#
# $$h^k_i = \mathrm{block}\big(W\,[\mathrm{norm}(\mathrm{emb}(t_{i+k}))\,;\,\mathrm{norm}(h^{k-1}_i)]\big), \qquad
# \mathrm{logits\ of\ } t_{i+k+1} = \mathrm{head}(\mathrm{norm}(h^k_i))$$
#
# Embedding and head are the model's. What is minimised is $\mathcal L + \lambda\,\frac1D \sum_k \mathcal L_k$ with $\lambda = 0.3$. Here: two blocks of width 64, depth
# $D = 2$, and 3000 lines of WordNet in 512 tokens.
# %% [markdown] lang="zh"
# ## 每个深度多一个块
#
# 模型最后一块在位置 $i$ 留下 $h_i$，由它经 head 预测 $t_{i+1}$。MTP 的深度 $k$ 把上一深度的状态与再往后 $k$ 个的词元的嵌入（训练时已知）拼在一起，再经过一个块：
#
# $$h^k_i = \mathrm{block}\big(W\,[\mathrm{norm}(\mathrm{emb}(t_{i+k}))\,;\,\mathrm{norm}(h^{k-1}_i)]\big), \qquad
# t_{i+k+1} \text{ 的 logits} = \mathrm{head}(\mathrm{norm}(h^k_i))$$
#
# 嵌入与 head 是模型自己的。被最小化的是 $\mathcal L + \lambda\,\frac1D \sum_k \mathcal L_k$，$\lambda = 0.3$。这里用两块、宽 64 的模型，深度 $D = 2$，以及 WordNet 的 3000 行，
# 切成 512 种词元。
# %% tags=["exact"]
source = find("wordnet").read(lambda reason, position: None)
lines = [line.decode() for _, (_, line) in zip(range(3000), source, strict=False)]
tokenizer = train_tokenizer(lines, 512)
text = torch.tensor(tokenizer.encode("".join(lines)))

config = rq.ModelConfig(
    vocab_size=tokenizer.vocab_size,
    dim=64,
    layers=2,
    dense_width=256,
    mtp=MTPConfig(depth=2, weight=0.3),
    init_std=0.1,
)
model = rq.LanguageModel(config, seed=0)
costs = rq.costs.costs(config)
print(f"{len(text):,} tokens; {costs.total:,} parameters, {costs.mtp:,} more for two depths of MTP")


# %% [markdown] lang="en"
# `model.hidden(ids, for_mtp=True)` gives $h$; `model.draft(h, following, depth=0)` gives $h^1$ from the ids one further, `depth=1` then $h^2$ from the ids two further.
# `ahead(ids)` moves ids by one, and puts 0 (or `beyond`) where a row ends.
#
# **Exercise 1.** Which token does depth $k$ predict at position $i$? Return the labels of the head and of both depths: three tensors $[B, T]$ with -100 where the row has no such token.
# %% [markdown] lang="zh"
# `model.hidden(ids, for_mtp=True)` 给出 $h$；`model.draft(h, following, depth=0)` 用往后一位的 id 算出 $h^1$，`depth=1` 再用往后两位的 id 算出 $h^2$。`ahead(ids)` 把 id 前移一位，
# 在行尾填 0（或 `beyond`）。
#
# **练习 1.** 深度 $k$ 在位置 $i$ 预测哪个词元？返回 head 与两个深度的标签：三个 $[B, T]$ 的张量，行内没有该词元处为 -100。
# %% tags=["exercise"]
def labels_of(ids: torch.Tensor) -> list[torch.Tensor]:
    """Returns the labels of the head, of depth 1 and of depth 2."""
    ### BEGIN SOLUTION
    labels = []
    for _ in range(3):
        ids = ahead(ids, beyond=-100)
        labels.append(ids)
    return labels
    ### END SOLUTION


# %% tags=["wrong"]
def labels_of(ids: torch.Tensor) -> list[torch.Tensor]:
    """Gives all depths the label of the head: they have read that token already."""
    return [ahead(ids, beyond=-100)] * 3


# %% tags=["wrong"]
def labels_of(ids: torch.Tensor) -> list[torch.Tensor]:
    """Rolls, so that the end of a row predicts its beginning."""
    return [ids.roll(-1 - depth, dims=1) for depth in range(3)]


# %% tags=["gate"]
some = torch.tensor([[10, 11, 12, 13, 14]])
assert labels_of(some)[0].tolist() == [[11, 12, 13, 14, -100]]
assert labels_of(some)[1].tolist() == [[12, 13, 14, -100, -100]]
assert labels_of(some)[2].tolist() == [[13, 14, -100, -100, -100]]

# %%
STEPS = 240


def batch(step: int, batch_size: int = 16, seq_len: int = 64) -> torch.Tensor:
    """Draws pieces of the text, one id longer than a sequence."""
    draw = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - seq_len, (batch_size, 1), generator=draw)
    return text[starts + torch.arange(seq_len + 1)]


optimizer = Optimizer(model, recipe(config.dim))
history = []
for step in range(STEPS):
    ids = batch(step)
    optimizer.begin_step()
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    loss.total.backward()
    optimizer.clip()
    optimizer.step(schedule(step, STEPS, optimizer.config))
    history.append((loss.next_token.item(), loss.mtp.item()))
model = model.eval()


# %% [markdown] lang="en"
# How good is each depth? Depth 1 has read one true token more than the head and predicts one further; depth 2 two more. Below, their loss and the share of positions where the most likely token is right.
# %% [markdown] lang="zh"
# 每个深度有多准？深度 1 比 head 多读了一个真实词元，预测再往后一位；深度 2 多读两个。下面是各自的损失，以及最可能的词元恰好正确的位置所占的份额。
# %%
@torch.no_grad()
def states(ids: torch.Tensor) -> list[torch.Tensor]:
    """Returns what the head reads for the next token and for each depth, [B, T, D] each."""
    hidden, _ = model.hidden(ids, for_mtp=True)
    result = [model.head_input(hidden)]
    following = ids
    for depth, module in enumerate(model.mtp):
        following = ahead(following)
        hidden, _ = model.draft(hidden, following, depth=depth)
        result.append(module.head_input(hidden))
    return result


ids = batch(10_000, batch_size=64)
nats = []
right = []
for state, labels in zip(states(ids), labels_of(ids), strict=True):
    logits = model.head(state)
    nats.append(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).item())
    right.append((logits.argmax(-1) == labels)[labels != -100].float().mean().item())

figure, (left, right_axes) = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
curves = torch.tensor(history).T.unfold(1, 10, 1).mean(2)
left.plot(curves[0], label="next token")
left.plot(curves[1], label="MTP, mean of both depths")
left.set(xlabel="step", ylabel="loss, nats a token")
left.legend(frameon=False)
names = ["head", "depth 1", "depth 2"]
bars = right_axes.bar(names, right, color=["tab:blue", "tab:orange", "tab:orange"])
right_axes.bar_label(
    bars, [f"{share:.0%}\n{value:.2f} nats" for share, value in zip(right, nats, strict=True)]
)
right_axes.set(ylabel="most likely token is right", ylim=(0, 1.3 * max(right)))
plt.show()


# %% [markdown] lang="en"
# ## Draft, check, accept
#
# A round of generation: the model has said $t$. Depth 1 drafts the token after it, depth 2 the one after that. One forward pass reads $t$ and both drafts, which gives the model's own choice after each
# of them. Drafts are accepted from the left as long as they are that choice; the choice after the last accepted one is a further token. So a round gives 1, 2 or 3 tokens.
#
# **Exercise 2.** Write that rule. `drafts` are the $D$ drafts, `choices` the $D + 1$ ids that the model would say: after $t$, after the first draft, and so on.
# %% [markdown] lang="zh"
# ## 起草、核对、接受
#
# 生成的一轮：模型刚说出 $t$。深度 1 起草它之后的词元，深度 2 起草再下一个。一次前向读入 $t$ 和两份草稿，得到模型在每一个之后自己的选择。从左起，只要草稿就是那个选择，
# 便被接受；最后一份被接受的草稿之后的选择又是一个新词元。所以一轮给出 1、2 或 3 个词元。
#
# **练习 2.** 写出这条规则。`drafts` 是 $D$ 份草稿，`choices` 是模型自己会说的 $D + 1$ 个 id：在 $t$ 之后、在第一份草稿之后，依此类推。
# %% tags=["exercise"]
def new_tokens(drafts: list[int], choices: list[int]) -> list[int]:
    """Returns the tokens that a round gives."""
    ### BEGIN SOLUTION
    count = 0
    while count < len(drafts) and drafts[count] == choices[count]:
        count += 1
    return choices[: count + 1]
    ### END SOLUTION


# %% tags=["wrong"]
def new_tokens(drafts: list[int], choices: list[int]) -> list[int]:
    """Accepts a right draft behind a wrong one: the model chose after another token."""
    return [
        choice for draft, choice in zip(drafts, choices, strict=False) if draft == choice
    ] + choices[-1:]


# %% tags=["wrong"]
def new_tokens(drafts: list[int], choices: list[int]) -> list[int]:
    """Throws the free token away."""
    count = 0
    while count < len(drafts) and drafts[count] == choices[count]:
        count += 1
    return choices[:count]


# %% tags=["gate"]
assert new_tokens([5, 6], [5, 6, 7]) == [5, 6, 7]
assert new_tokens([5, 9], [5, 6, 7]) == [5, 6]
assert new_tokens([9, 6], [5, 6, 7]) == [5]
assert new_tokens([], [5]) == [5]

# %% [markdown] lang="en"
# The library's loop is `speculate`; it yields the same ids as `decode`. `AcceptanceStats.rounds` counts forwards, so ids that arrive while it stands still came from one round. Blue: the
# model's own token of a round; orange and red: accepted drafts of depth 1 and 2 that preceded it, which cost nothing.
# %% [markdown] lang="zh"
# 库里的循环是 `speculate`，它给出的 id 与 `decode` 相同。`AcceptanceStats.rounds` 统计前向次数，所以它不变期间到来的 id 出自同一轮。蓝色是一轮中模型自己的词元；橙色与红色是在它之前被接受的
# 深度 1、深度 2 的草稿，不费代价。
# %%
prompt = [tokenizer.begin_id, *tokenizer.encode("whale,")]
plain = [token for (token,) in decode(model, [prompt], max_new_tokens=120)]

stats = AcceptanceStats()
tokens = []
rounds = []
for (token,) in speculate(model, [prompt], max_new_tokens=120, acceptance_stats=stats):
    tokens.append(token)
    rounds.append(stats.rounds)
assert tokens == plain, "drafts change no token"

COLOURS = ("tab:blue", "tab:orange", "tab:red")
figure, axes = plt.subplots(figsize=(10, 2), layout="constrained")
column = 0
line = 0
for number, token in enumerate(tokens):
    shown = tokenizer.decode([token]).replace("\n", "⏎")
    if column + len(shown) > 120:
        column = 0
        line += 1
    before = number - rounds.index(rounds[number])  # tokens of this round before this one
    last = number + 1 == len(tokens) or rounds[number + 1] != rounds[number]
    colour = COLOURS[0] if last else COLOURS[1 + min(before, 1)]
    box = {"facecolor": colour, "alpha": 0.35, "edgecolor": "none", "pad": 1.5}
    axes.text(column, -line, shown, family="monospace", fontsize=9, bbox=box)
    column += len(shown) + 0.35
axes.set(xlim=(0, 124), ylim=(-line - 0.7, 1))
axes.axis("off")
axes.set_title(f"{len(tokens)} tokens in {stats.rounds + 1} forwards", loc="left", fontsize=10)
plt.show()

# %% [markdown] lang="en"
# ## Drafts for a model that was trained without them
#
# The model above is seconds old, and learned to draft along with everything else. `tiny` comes trained with the package and has no modules. They can be added: everything that `tiny` has stays frozen, so it says what it said before, and two new modules learn from its hidden states and from the same glosses.
# %% [markdown] lang="zh"
# ## 给训练时没有草稿的模型加上草稿
#
# 上面的模型只训练了几秒，起草与其他一切是一起学的。`tiny` 随软件包发布，已经训练好，但没有这些模块。可以后加：`tiny` 原有的参数全部冻结，所以它说的话与先前相同；两个新模块从它的隐藏状态和同样的释义中学习。
# %%
run = rq.load("tiny", dtype="float32")
tiny = rq.LanguageModel(rq.replace(run.model.config, "mtp", MTPConfig(depth=2)), seed=0)
tiny.load_state_dict(run.model.state_dict(), strict=False)
for name, parameter in tiny.named_parameters():
    parameter.requires_grad_(name.startswith("mtp."))

encoded = [[*run.tokenizer.encode(line.strip()), run.tokenizer.end_id] for line in lines]
text = torch.tensor([token for one in encoded for token in one])
optimizer = Optimizer(tiny, recipe(tiny.config.dim))
drafting = []
for step in range(120):
    ids = batch(step)
    optimizer.begin_step()
    loss = tiny.loss(ids[:, :-1], ids[:, 1:])
    loss.mtp.backward()
    optimizer.clip()
    optimizer.step(schedule(step, 120, optimizer.config))
    drafting.append(loss.mtp.item())
tiny = tiny.eval()
with torch.no_grad():
    assert torch.equal(tiny(ids), run.model(ids)), "the model itself has not changed"


# %% [markdown] lang="en"
# ## What acceptance is worth
#
# If each draft is right with probability $p$ whatever came before, a round of depth $D$ gives $1 + p + p^2 + \dots + p^D$ tokens. A draft also costs: a block of MTP, and more tokens to verify. Where a forward waits for memory, as on a
# GPU with few requests, both should cost little (not measured here); on a CPU they do cost (`python benchmarks/drafts.py`).
#
# Sampling at a temperature draws from the same logits by the same random numbers, so the text is again the one without drafts. (A forward of three tokens rounds differently from one of a single token. A random number can fall between the two, in float32 about once in a thousand draws here, so both models compute in float64.) The hotter, the less predictable, the fewer drafts survive. Fewer drafts of `tiny` stand than of
# the small model, whose 512 ids are mostly pieces of words that follow from each other. DeepSeek reports 85 to 90 % for its second token: drafts get better with the model and with training, and none of that is seen in a minute.
# %% [markdown] lang="zh"
# ## 接受率值多少
#
# 若每份草稿正确的概率都是 $p$，与之前无关，深度为 $D$ 的一轮给出 $1 + p + p^2 + \dots + p^D$ 个词元。草稿也有代价：MTP 的一个块，以及更多要核对的词元。在前向受限于访存的场合（如请求很少的 GPU）两者应当代价很小（这里没有测量），在 CPU 上则确有代价
# （`python benchmarks/drafts.py`）。
#
# 按温度采样时，用同样的随机数从同样的 logits 中抽取，所以文本仍与不用草稿时相同。（一次算三个词元的前向与只算一个的舍入不同，随机数可能恰好落在两者之间，float32 下约每千次抽取有一次，所以这里两个模型都用 float64 计算。）温度越高越难预测，留下的草稿越少。`tiny` 的草稿成立得比小模型少：小模型的 512 种词元多是词的片段，
# 前后容易推断。DeepSeek 报告第二个词元的接受率为 85 % 到 90 %：草稿随模型与训练而变好，一分钟之内还看不到。
# %%
def tokens_a_forward(model: rq.LanguageModel, tokenizer, temperature: float) -> float:
    """Returns the tokens that a forward gives in the mean, over four prompts of 60 tokens each."""
    stats = AcceptanceStats()
    count = 0
    for prompt_text in ("whale,", "a small", "a city in", "to move"):
        prompt = [tokenizer.begin_id, *tokenizer.encode(prompt_text)]
        sampling = Sampling(temperature=temperature, seed=0)
        options = {"max_new_tokens": 60, "sampling": sampling}
        drafted = [t for (t,) in speculate(model, [prompt], acceptance_stats=stats, **options)]
        assert drafted == [t for (t,) in decode(model, [prompt], **options)]
        count += len(drafted) - 1
    return count / stats.rounds


temperatures = (0.0, 0.4, 0.8, 1.2)
per_round = [tokens_a_forward(model.double(), tokenizer, t) for t in temperatures]
of_tiny = [tokens_a_forward(tiny.double(), run.tokenizer, t) for t in temperatures]

p = torch.linspace(0, 1, 100)
figure, (left, right_axes) = plt.subplots(1, 2, figsize=(10, 2.8), layout="constrained")
for depth in (1, 2, 4):
    left.plot(p, sum(p**power for power in range(depth + 1)), label=f"depth {depth}")
left.set(xlabel="probability that a draft is right", ylabel="tokens a forward")
left.legend(frameon=False)
right_axes.plot(temperatures, per_round, "o-", label="modules from the start, 512 ids")
right_axes.plot(temperatures, of_tiny, "o-", label="modules added to tiny, 4,096 ids")
right_axes.legend(frameon=False)
right_axes.set(xlabel="temperature", ylabel="tokens a forward, depth 2", ylim=(1, None))
plt.show()

# %% [markdown] lang="en"
# **Key finding.** A draft is a guess that the model checks at the price of reading it. What is drafted can never change what is said; a bad draft costs time and nothing else. That is why drafts may come from
# anywhere, and why the second prediction of the training is worth keeping.
#
# The code: `rorqual/layers/mtp.py`, `rorqual/serve/drafts.py`, and `Engine._give` in `rorqual/serve/engine.py`. With a trained run: `rorqual generate RUN TEXT --speculative`. Next: training, interruption and
# honest comparison, in notebook 10.
# %% [markdown] lang="zh"
# **关键结论。** 草稿只是一个猜测，模型读它一遍就能核对。起草什么都不会改变说出的内容，差的草稿只费时间。所以草稿可以来自任何地方，而训练中的第二个预测值得留下。
#
# 代码：`rorqual/layers/mtp.py`、`rorqual/serve/drafts.py`，以及 `rorqual/serve/engine.py` 的 `Engine._give`。对训练好的运行：`rorqual generate RUN TEXT --speculative`。接下来：训练、中断与公平的比较，见第 10 个笔记本。
