# %% [markdown] lang="en"
# # 7. Streams and Sinkhorn
#
# A transformer adds every sublayer to one residual stream. Hyper-connections keep several, let each sublayer read a mixture
# of them, and mix them at every step. Sixty mixtures in a row can blow a signal up by orders of magnitude; mHC forces each of them to be
# doubly stochastic, and the trouble is gone. You will see both.
#
# Level: look inside. Takes 30 minutes. Papers: Hyper-Connections (arXiv 2409.19606), mHC (arXiv 2512.24880), section 3; used in DeepSeek-V4. Half a minute of one core.
# %% [markdown] lang="zh"
# # 7. 残差流与 Sinkhorn
#
# Transformer 把每个子层加到同一条残差流上。超连接保持多条残差流：每个子层读取它们的加权和，各流在每一步还要相互混合。连续混合六十次，
# 信号可能被放大几个数量级；mHC 要求每个混合矩阵都是双随机矩阵，问题就消失了。两种情形你都会看到。
#
# 层次：深入内部。用时 30 分钟。论文：Hyper-Connections（arXiv 2409.19606）、mHC（arXiv 2512.24880）第 3 节；DeepSeek-V4 采用。单核约半分钟。
# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

import rorqual as rq
from rorqual.analyze.taps import Taps
from rorqual.data.sources import find
from rorqual.layers.hyper import Connection, HyperConfig, Streams, composite_gain, expand, spread
from rorqual.layers.streams import sinkhorn

plt.rcParams["figure.dpi"] = 80

# %% [markdown] lang="en"
# ## One site
#
# A block keeps $S$ streams $x_1 \dots x_S$ of width $D$. Each sublayer $F$ (attention, feed-forward) has a site with three mappings, which it
# computes anew for every token from the streams themselves:
#
# $$u = \sum_i \mathrm{pre}_i\, x_i, \qquad x_k \leftarrow \mathrm{post}_k\, F(u) + \sum_j \mathrm{comb}_{jk}\, x_j$$
#
# `read` computes $u$, `write` the rest. Here is a site of 4 streams, and the same sums written out.
# %% [markdown] lang="zh"
# ## 一个连接点
#
# 每个块保持 $S$ 条宽为 $D$ 的流 $x_1 \dots x_S$。每个子层 $F$（注意力、前馈）有一个连接点，它有三种映射，对每个词元都由各流自身重新算出：
#
# $$u = \sum_i \mathrm{pre}_i\, x_i, \qquad x_k \leftarrow \mathrm{post}_k\, F(u) + \sum_j \mathrm{comb}_{jk}\, x_j$$
#
# `read` 算出 $u$，`write` 完成其余部分。下面是一个有 4 条流的连接点，以及同样的求和逐项写出的结果。
# %% tags=["exact"]
torch.manual_seed(0)
site = Connection(HyperConfig(streams=4), dim=32)
x = torch.randn(1, 5, 4, 32)  # [B, T, S, D]
with torch.no_grad():
    pre, post, comb = site.coefficients(x)
    u, mapping = site.read(Streams(x))
    out = torch.tanh(u)  # any sublayer
    written = site.write(out, mapping).values
print("pre ", pre[0, 0].numpy().round(2), "      how much of each stream is read")
print("post", post[0, 0].numpy().round(2), "      how much of the output each stream takes")
print("comb", str(comb[0, 0].numpy().round(2)).replace("\n", "\n    "))

assert torch.allclose(u, torch.einsum("bts,btsd->btd", pre, x), atol=1e-5)
mixed = torch.einsum("btjk,btjd->btkd", comb, x)
assert torch.allclose(written, post[..., None] * out[:, :, None] + mixed, atol=1e-5)


# %% [markdown] lang="en"
# At the start `pre` is $1/S$ each and `post` 1: as long as all streams are equal, this is the plain residual network $x + F(x)$. The rows and the columns of
# `comb` sum to 1.
#
# ## Why the mixture needs a rule
#
# Through $L$ sites the streams are multiplied by $H_L \cdots H_1$ with $H = \mathrm{comb}^\top$. The largest absolute row sum of this product says how far a
# signal may grow along the streams alone, the largest column sum how far a gradient may. mHC calls it the gain. Below, 60 sites with random
# parameters: `hc` has no rule for `comb`, `mhc` makes it doubly stochastic.
#
# **Exercise 1.** `combs` is a list of matrices $[S, S]$ in the order of the sites, and `comb[j, k]` is the weight from stream $j$ to stream $k$. Compute the
# larger of the two sums of the product.
# %% [markdown] lang="zh"
# 初始时 `pre` 各为 $1/S$，`post` 为 1：只要各流相等，这就是普通的残差网络 $x + F(x)$。`comb` 的每行、每列之和都是 1。
#
# ## 混合为什么需要约束
#
# 经过 $L$ 个连接点，各流被乘以 $H_L \cdots H_1$，其中 $H = \mathrm{comb}^\top$。这个乘积的最大绝对行和说明信号仅沿各流最多放大多少，最大绝对列和说明梯度最多
# 放大多少；mHC 称之为增益。下面是 60 个参数随机的连接点：`hc` 对 `comb` 没有约束，`mhc` 使它成为双随机矩阵。
#
# **练习 1.** `combs` 是按连接点顺序排列的 $[S, S]$ 矩阵，`comb[j, k]` 是从流 $j$ 到流 $k$ 的权重。求乘积的两种和中较大的一个。
# %% tags=["exercise"]
def gain(combs: list[torch.Tensor]) -> float:
    """Returns the largest absolute row or column sum of H_L ... H_1."""
    ### BEGIN SOLUTION
    total = torch.eye(len(combs[0]))
    for comb in combs:
        total = comb.T @ total
    return max(total.abs().sum(0).max().item(), total.abs().sum(1).max().item())
    ### END SOLUTION


# %% tags=["wrong"]
def gain(combs: list[torch.Tensor]) -> float:
    """Multiplies in the wrong order."""
    total = torch.eye(len(combs[0]))
    for comb in combs:
        total = total @ comb.T
    return max(total.abs().sum(0).max().item(), total.abs().sum(1).max().item())


# %% tags=["wrong"]
def gain(combs: list[torch.Tensor]) -> float:
    """Adds with signs, so that large entries cancel."""
    total = torch.eye(len(combs[0]))
    for comb in combs:
        total = comb.T @ total
    return max(total.sum(0).max().item(), total.sum(1).max().item())


# %% tags=["gate"]
draw = torch.Generator().manual_seed(1)
matrices = [torch.randn(4, 4, generator=draw) for _ in range(3)]
expected = max(composite_gain([matrix[None] for matrix in matrices]))
assert abs(gain(matrices) - expected) < 1e-3 * expected


# %%
def random_sites(config: HyperConfig, count: int = 60, noise: float = 0.3) -> list[torch.Tensor]:
    """Returns the mixing matrices of `count` sites in a row, for one token."""
    torch.manual_seed(3)
    x = expand(torch.randn(1, 1, 32), config)
    combs = []
    for number in range(count):
        site = Connection(config, 32, number)
        with torch.no_grad():
            for name, parameter in site.mixer.named_parameters():
                scale = torch.full_like(parameter, noise)
                noisy = parameter + noise * torch.randn_like(parameter)
                parameter.copy_(scale if name == "scale" else noisy)
            combs.append(site.coefficients(x.values).comb[0, 0])
            u, mapping = site.read(x)
            x = site.write(F.rms_norm(u, (32,)), mapping)
    return combs


kinds = {"hc": HyperConfig(kind="hc"), "mhc": HyperConfig()}
combs_of = {name: random_sites(config) for name, config in kinds.items()}

figure = plt.figure(figsize=(10, 4), layout="constrained")
left, right = figure.subfigures(1, 2, width_ratios=[1, 1.6])
curve = left.subplots()
panels = right.subplots(2, 4)
for line, (name, combs) in zip(panels, combs_of.items(), strict=True):
    counts = range(1, len(combs) + 1)
    curve.semilogy(counts, [gain(combs[:count]) for count in counts], label=name)
    for axes, count in zip(line, (1, 4, 16, 60), strict=True):
        total = torch.eye(4)
        for comb in combs[:count]:
            total = comb.T @ total
        image = axes.imshow(total, cmap="RdBu_r", vmin=-2, vmax=2)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(f"{name}, {count} site{'s' * (count > 1)}", fontsize=9)
right.colorbar(image, ax=panels, label="weight, cut at 2")
curve.set(xlabel="sites", ylabel="gain")
curve.legend(frameon=False)
plt.show()

# %% [markdown] lang="en"
# Without a rule the product grows exponentially with depth. The product of doubly stochastic matrices is doubly stochastic: its sums stay 1, and it
# tends to $1/S$ everywhere, the plain average.
#
# ## Sinkhorn: from any numbers to a doubly stochastic matrix
#
# Take the exponential, so that all numbers are positive; divide every row by its sum; divide every column by its sum, which spoils the rows a little; repeat. That is
# the algorithm of Sinkhorn and Knopp, and mHC runs 20 rounds of it for every token and site.
# %% [markdown] lang="zh"
# 没有约束时，乘积随深度指数增长。双随机矩阵的乘积仍是双随机矩阵：和始终为 1，并且趋于处处 $1/S$，即简单平均。
#
# ## Sinkhorn：把任意数变成双随机矩阵
#
# 先取指数，使所有数为正；每行除以行和；再让每列除以列和，行和因此稍有偏离；如此反复。这就是 Sinkhorn–Knopp 算法，mHC 对每个词元、
# 每个连接点各做 20 轮。
# %%
torch.manual_seed(0)
logits = 2 * torch.randn(4, 4, 1)  # [S, S, tokens]
shown = {"exp(logits), scaled": logits.exp() / logits.exp().max()}
for rounds in (1, 3, 20):
    shown[f"{rounds} round{'s' * (rounds > 1)}"] = sinkhorn(logits, rounds, eps=0.0)

figure, panels = plt.subplots(1, 4, figsize=(10, 2.9), layout="constrained")
for axes, (title, matrix) in zip(panels, shown.items(), strict=True):
    matrix = matrix[..., 0]
    axes.imshow(matrix, cmap="Blues", vmin=0, vmax=1)
    for j in range(4):
        for k in range(4):
            colour = "white" if matrix[j, k] > 0.6 else "black"
            axes.text(
                k, j, f"{matrix[j, k]:.2f}", ha="center", va="center", color=colour, fontsize=8
            )
    axes.set_xticks(range(4), [f"{value:.2f}" for value in matrix.sum(0)])
    axes.set_yticks(range(4), [f"{value:.2f}" for value in matrix.sum(1)])
    axes.tick_params(length=0)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("sums of columns")
panels[0].set_ylabel("sums of rows")
plt.show()


# %% [markdown] lang="en"
# **Exercise 2.** Write it: `rounds` times first the rows (axis 1), then the columns (axis 0), of logits $[S, S]$.
# %% [markdown] lang="zh"
# **练习 2.** 写出这个算法：对 $[S, S]$ 的 logits 做 `rounds` 轮，每轮先行（轴 1）后列（轴 0）。
# %% tags=["exercise"]
def balanced(logits: torch.Tensor, rounds: int) -> torch.Tensor:
    """Returns exp(logits) after `rounds` normalisations of rows, then of columns."""
    ### BEGIN SOLUTION
    matrix = logits.exp()
    for _ in range(rounds):
        matrix = matrix / matrix.sum(1, keepdim=True)
        matrix = matrix / matrix.sum(0, keepdim=True)
    return matrix
    ### END SOLUTION


# %% tags=["wrong"]
def balanced(logits: torch.Tensor, rounds: int) -> torch.Tensor:
    """Ends with the rows, so that the columns are off."""
    matrix = logits.exp()
    for _ in range(rounds):
        matrix = matrix / matrix.sum(0, keepdim=True)
        matrix = matrix / matrix.sum(1, keepdim=True)
    return matrix


# %% tags=["wrong"]
def balanced(logits: torch.Tensor, rounds: int) -> torch.Tensor:
    """Divides by both sums at once, which does not converge to what it should."""
    matrix = logits.exp()
    for _ in range(rounds):
        matrix = matrix / matrix.sum(0, keepdim=True) / matrix.sum(1, keepdim=True)
    return matrix


# %% tags=["gate"]
for rounds in (1, 2, 20):
    expected = sinkhorn(logits, rounds, eps=0.0)[..., 0]
    assert torch.allclose(balanced(logits[..., 0], rounds), expected, atol=1e-5), rounds

# %% [markdown] lang="en"
# Twenty rounds are not always enough. The columns, normalised last, sum to 1 exactly; how far the rows are off depends on how uneven the logits are. Start-up
# logits are close to a diagonal of 2, which converges at once; learned ones may not be, and little harm is done: a gain a little above 1 is not one of 1000.
# %% [markdown] lang="zh"
# 二十轮并不总是够用。最后归一化的列之和恰为 1；行和偏离多少取决于 logits 有多不均匀。初始的 logits 接近对角线为 2 的矩阵，立刻收敛；学到的未必如此，但并无
# 大碍：增益略大于 1，而不是 1000。
# %%
torch.manual_seed(0)
noise = torch.randn(4, 4, 1000)
numbers = [1, 2, 3, 5, 8, 12, 20, 40]
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
for deviation in (0.5, 1, 2, 4):
    errors = [
        (sinkhorn(deviation * noise, rounds, eps=0.0).sum(1) - 1).abs().amax(0).median()
        for rounds in numbers
    ]
    axes.loglog(
        numbers, [max(error.item(), 1e-7) for error in errors], "o-", ms=3, label=f"{deviation}"
    )
axes.axvline(20, color="gray", ls=":")
axes.set_xticks(numbers, [f"{number}" for number in numbers])
axes.minorticks_off()
axes.set(xlabel="rounds", ylabel="sum of a row: distance from 1")
axes.legend(title="deviation of the logits", frameon=False, fontsize=8)
plt.show()

# %% [markdown] lang="en"
# ## In a model that learns
#
# Three models of 4 blocks read letters of WordNet's definitions: one stream, `hc` and `mhc`. Same blocks, same batches, same high learning rate.
# %% [markdown] lang="zh"
# ## 在训练中的模型里
#
# 三个 4 块的模型逐字母读 WordNet 的释义：单条流、`hc`、`mhc`。块相同，批次相同，同样偏高的学习率。
# %%
source = find("wordnet").read(lambda reason, position: None)
text = torch.tensor(list(b"".join(line for _, (_, line) in zip(range(4000), source, strict=False))))


def batch(step: int, batch_size: int = 16, seq_len: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws pieces of the text: ids and the letters that follow them."""
    draw = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - seq_len - 1, (batch_size, 1), generator=draw)
    pieces = text[starts + torch.arange(seq_len + 1)]
    return pieces[:, :-1], pieces[:, 1:]


@torch.no_grad()
def mixing(model: rq.LanguageModel) -> list[torch.Tensor]:
    """Returns the mixing matrices [tokens, S, S] of all sites, in their order."""
    with Taps(model, "*.mixer") as taps:
        model(batch(10_000)[0])
    return [made.comb.permute(2, 0, 1) for (made,) in taps.seen.values()]


def train(config: rq.ModelConfig, steps: int = 100) -> tuple[rq.LanguageModel, list[float]]:
    """Returns a trained model and its losses."""
    model = rq.LanguageModel(config, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        loss = model.loss(*batch(step)).total
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return model, losses


base = rq.ModelConfig(vocab_size=256, dim=32, layers=4, dense_width=64, init_std=0.1)
trained = {
    name: train(rq.replace(base, "hyper", config))
    for name, config in {"one stream": None, **kinds}.items()
}

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
for name, (model, losses) in trained.items():
    left.plot(torch.tensor(losses).unfold(0, 8, 1).mean(1), label=name)
    if name in kinds:
        combs = mixing(model)
        counts = range(1, len(combs) + 1)
        gains = [max(composite_gain(combs[:count])) for count in counts]
        right.plot(counts, gains, "o-", ms=3, color=left.lines[-1].get_color(), label=name)
left.set(xlabel="step", ylabel="loss, nats a letter", ylim=(None, 4))
right.set(xlabel="sites, after training", ylabel="gain, worst of all tokens", yscale="log")
left.legend(frameon=False)
right.legend(frameon=False)
plt.show()

# %% [markdown] lang="en"
# And the matrices themselves, the mean over tokens, site by site: first block on the left. `hc` may use negative weights and weights above 1, and does.
# %% [markdown] lang="zh"
# 再看矩阵本身：对词元取平均，逐个连接点列出，最左是第一块。`hc` 可以有负的权重和大于 1 的权重，它也确实这样用了。
# %%
figure, panels = plt.subplots(4, 8, figsize=(8.5, 4.2), layout="constrained")
for number, (name, config) in enumerate(kinds.items()):
    fresh = rq.LanguageModel(rq.replace(base, "hyper", config), seed=0)
    for line, (when, model) in zip(
        panels[2 * number :], (("start", fresh), ("trained", trained[name][0])), strict=False
    ):
        line[0].set_ylabel(f"{name}\n{when}", fontsize=8)
        for axes, comb in zip(line, mixing(model), strict=True):
            image = axes.imshow(comb.mean(0), cmap="RdBu_r", vmin=-1, vmax=1)
            axes.set_xticks([])
            axes.set_yticks([])
figure.colorbar(image, ax=panels, label="weight")
plt.show()

# %% [markdown] lang="en"
# ## A start that never ends
#
# If the streams are equal copies and a site treats them alike, they stay equal for ever: no gradient tells them apart, and $S$ streams are worth one. So the
# matrix `fn`, which computes the three mappings, must start at random. `spread` is the distance of the streams from their mean, relative to it.
# %% [markdown] lang="zh"
# ## 永远走不出的起点
#
# 如果各流是相同的副本，而连接点又对它们一视同仁，它们就永远相同：没有梯度能把它们分开，$S$ 条流只值一条。所以算出三种映射的矩阵 `fn` 必须随机初始化。
# `spread` 是各流到均值的距离与均值之比。
# %% tags=["exact"]
for name, scale in (("fn random", 1.0), ("fn = 0", 0.0)):
    torch.manual_seed(0)
    x = expand(torch.randn(1, 8, 32), HyperConfig())
    with torch.no_grad():
        for number in range(12):
            site = Connection(HyperConfig(), 32, number)
            site.mixer.fn *= scale
            u, mapping = site.read(x)
            x = site.write(F.rms_norm(u, (32,)), mapping)
    print(f"{name:9s}: spread after 12 sites {spread(x.values):.4f}")

# %% [markdown] lang="en"
# **Key finding.** Free mixing is powerful for one site and explosive for sixty. Doubly stochastic matrices are closed under products, so depth cannot amplify
# anything along the streams. It costs 39 tiny normalisations a token and site, for which there is a kernel.
#
# The code is `rorqual/layers/hyper.py` (sites) and `rorqual/layers/streams.py` (arithmetic). In training, `metrics.jsonl` logs `row_gain`, `column_gain` and
# `stream_spread`. Next: which keys a query reads, in notebook 8.
# %% [markdown] lang="zh"
# **关键结论。** 自由混合对一个连接点很有力，对六十个则会爆炸。双随机矩阵对乘法封闭，所以深度无法沿各流放大任何东西。代价是每个词元、每个连接点 39 次很小的
# 归一化，有专门的内核完成。
#
# 代码在 `rorqual/layers/hyper.py`（连接点）与 `rorqual/layers/streams.py`（算术）。训练时 `metrics.jsonl` 会记录 `row_gain`、`column_gain` 与
# `stream_spread`。接下来：一个查询究竟读哪些键，见第 8 个笔记本。
