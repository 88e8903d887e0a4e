# %% [markdown] lang="en"
# # 10. Train, resume, compare
#
# What `rorqual train` does, from Python: a run folder, an interruption, and a resumption that agrees to the last bit. Then the experiment that this library is about: one budget of parameters and FLOPs, spent on
# experts or on a memory. You will see a difference, and learn what it takes to call it one.
#
# Level: extend. Takes 40 minutes. Paper: Conditional Memory via Scalable Lookup (arXiv 2601.07372), section 3. Forty seconds of one core. Needs the extra `train`.
# %% [markdown] lang="zh"
# # 10. 训练、续训、比较
#
# 在 Python 里完成 `rorqual train` 所做的事：一个运行目录，一次中断，以及逐位一致的续训。然后是这个库的核心实验：同样的参数与 FLOPs 预算，花在专家上还是记忆上。
# 你会看到一个差异，也会知道要满足什么条件才能说它是差异。
#
# 层次：扩展。用时 40 分钟。论文：Conditional Memory via Scalable Lookup（arXiv 2601.07372）第 3 节。单核约四十秒。需要可选依赖 `train`。
# %%
import signal
import statistics
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

# Progress bars are plain where ipywidgets is missing.
warnings.filterwarnings("ignore", message="IProgress not found")

import matplotlib.pyplot as plt
import torch
from IPython.utils.capture import capture_output

import rorqual as rq
from rorqual.experiments.allocation import SweepConfig, points
from rorqual.experiments.paired import compared, difference, t_factor
from rorqual.experiments.runs import last, records
from rorqual.train.config import DataConfig, TrainConfig, recipe
from rorqual.train.trainer import Stopped, train

FOLDER = Path(tempfile.mkdtemp())

# %% [markdown] lang="en"
# ## A run
#
# `TrainConfig` holds every option of `rorqual train`: model, data, optimizer, steps. The model is `tiny` made smaller: width 32, 2 blocks, 32 experts of which a token takes 2, 512 tokens in the vocabulary. The data are 6000
# definitions of WordNet, which come with the package. The first call trains the tokenizer and stores the token ids.
# %% [markdown] lang="zh"
# ## 一次运行
#
# `TrainConfig` 就是 `rorqual train` 能接受的一切：模型、数据、优化器、步数。模型是缩小了的 `tiny`：宽 32，2 块，32 个专家，每个词元选 2 个，词表 512。数据是随包附带的 WordNet 的
# 6000 条释义。第一次调用会训练分词器并存下词元 id。
# %%
base = rq.preset("tiny")
for name, value in {
    "hyper": None,
    "dim": 32,
    "layers": 2,
    "vocab_size": 512,
    "mla.heads": 2,
    "mla.kv_lora_rank": 16,
}.items():
    base = rq.replace(base, name, value)

config = TrainConfig(
    model=base,
    data=DataConfig(limit=6000, vocab_size=512, cache=str(FOLDER / "cache")),
    optim=recipe(base.dim),
    steps=40,
    batch_size=16,
    seq_len=64,
    save_every=10,
    validate_every=20,
    device="cpu",
    folder=str(FOLDER / "whole"),
)


def run(config: TrainConfig, **options) -> Path:
    """Trains without printing the log."""
    with capture_output():
        return train(config, **options)


whole = run(config)

# %%
for path in sorted(whole.iterdir()):
    print(path.name + "/" * path.is_dir())

# %% [markdown] lang="en"
# `metrics.jsonl` has a line a step: loss, gradient norm, learning rate, load of the experts and more. `rorqual report` draws it; so can you.
# %% [markdown] lang="zh"
# `metrics.jsonl` 每步一行：损失、梯度范数、学习率、专家负载等。`rorqual report` 会画出来，你也可以自己画。
# %%
lines = [line for line in records(whole) if "loss" in line]
checks = [line for line in records(whole) if "validation_loss" in line]
figure, panels = plt.subplots(1, 3, figsize=(10, 2.6), layout="constrained")
for axes, name in zip(panels, ("loss", "grad_norm", "max_violation"), strict=True):
    axes.plot([line["step"] for line in lines], [line[name] for line in lines], label=name)
    axes.set(xlabel="step", title=name)
panels[0].plot(
    [line["step"] for line in checks],
    [line["validation_loss"] for line in checks],
    "o",
    label="validation",
)
panels[0].legend(frameon=False)
plt.show()


# %% [markdown] lang="en"
# ## Interrupted
#
# The same training again, into another folder, and ctrl-C at step 25. The trainer finishes the step, saves and says how to go on. Calling `train` with the same configuration is how: it reads the newest checkpoint, with the state of the optimizer, of the
# data and of the random numbers, and continues.
#
# **Exercise 1.** Compare the weights of two finished runs. "The same" means every bit, so `allclose` will not do.
# %% [markdown] lang="zh"
# ## 中断
#
# 同样的训练再来一次，写到另一个目录，在第 25 步按下 ctrl-C。训练器完成这一步，保存，并说明怎样继续。继续的办法就是用同样的配置再调用 `train`：它读入最新的检查点，连同优化器、数据与随机数的
# 状态，接着训练。
#
# **练习 1.** 比较两次已完成的运行的权重。“相同”指每一位都相同，所以 `allclose` 不够。
# %% tags=["exercise"]
def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Returns whether two state dicts have the same names and, bit for bit, the same tensors."""
    ### BEGIN SOLUTION
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    ### END SOLUTION


# %% tags=["wrong"]
def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Tolerates rounding."""
    return one.keys() == other.keys() and all(
        torch.allclose(one[name], other[name]) for name in one
    )


# %% tags=["wrong"]
def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Overlooks tensors that only the other has."""
    return all(torch.equal(one[name], other[name]) for name in one)


# %% tags=["gate"]
tensor = torch.ones(3)
assert same_weights({"a": tensor}, {"a": tensor.clone()})
assert not same_weights({"a": tensor}, {"a": tensor * (1 + 1e-7)})
assert not same_weights({"a": tensor}, {"a": tensor, "b": tensor})


# %% tags=["exact"]
def press_ctrl_c(line: dict) -> None:
    if line.get("step") == 25:
        signal.raise_signal(signal.SIGINT)


cut = replace(config, folder=str(FOLDER / "cut"))
try:
    run(cut, on_metrics=press_ctrl_c)
except Stopped:
    print("stopped; the last step in metrics.jsonl is", last(FOLDER / "cut")["step"])
run(cut)
print("resumed; the last step in metrics.jsonl is", last(FOLDER / "cut")["step"])

one, other = (rq.load(FOLDER / name, device="cpu").model.state_dict() for name in ("whole", "cut"))
print("the same weights to the last bit:", same_weights(one, other))

# %% [markdown] lang="en"
# ## One budget, two ways to spend it
#
# A sparse model has inactive parameters: experts that a token does not take. Engram offers another kind: rows of a table that a token does not look up. Take experts away, and spend their parameters on rows:
# $\rho$ is the share of the inactive parameters that experts keep. `points` solves for models of equal parameters and equal FLOPs a token, and adds a control: `few-rows` has all experts, and a memory of two rows a head, so
# gate and projections without anything to remember.
# %% [markdown] lang="zh"
# ## 同一预算的两种花法
#
# 稀疏模型有非激活参数：词元没有选中的专家。Engram 提供另一种：表里没有被查到的行。拿走一些专家，把它们的参数花在行上：$\rho$ 是非激活参数中由专家保留的份额。`points` 求出参数相等、每词元 FLOPs 相等的
# 几个模型，并加上对照：`few-rows` 保留全部专家，记忆每头只有两行，也就是只有门控与投影，没有可记的内容。
# %% tags=["exact"]
model = rq.replace(rq.replace(base, "engram.heads", 4), "engram.head_dim", 8)
sweep = SweepConfig(model=model, rhos=(1.0, 0.4), seq_len=64)
arms = {point.name: point.config for point in points(sweep, model) if point.name != "plain"}
print("             experts  rows a head   parameters  FLOPs a token")
for name, arm in arms.items():
    costs = rq.costs.costs(arm, 64)
    per_head = arm.engram.rows_per_head[0] if arm.engram else 0
    print(
        f"{name:12s} {arm.moe.routed:7d} {per_head:12,d} {costs.total:12,d} {costs.flops_per_token:14,d}"
    )

# %% [markdown] lang="en"
# Three seeds each: a seed draws the first weights and the order of the data. Batches are the same for all models of one seed.
# %% [markdown] lang="zh"
# 每个模型三个种子：种子决定初始权重与数据的顺序。同一种子下，各模型看到的批次相同。
# %%
SEEDS = (0, 1, 2)
losses = {name: [] for name in arms}
for seed in SEEDS:
    for name, arm in arms.items():
        job = replace(
            config,
            model=arm,
            seed=seed,
            steps=60,
            save_every=1000,
            validate_every=0,
            folder=str(FOLDER / f"{name}-{seed}"),
        )
        losses[name].append(last(run(job), "validation_loss")["validation_loss"])


# %% [markdown] lang="en"
# ## Is it a difference?
#
# Losses of one model vary from seed to seed. But a seed's luck with the data hits all models alike, so look at differences seed by seed:
#
# $$d_s = a_s - b_s, \qquad \bar d \pm \frac{\mathrm{stdev}(d)}{\sqrt n}, \qquad \text{established if } |\bar d| > t_{n-1}\,\frac{\mathrm{stdev}(d)}{\sqrt n}$$
#
# $t_{n-1}$ is Student's quantile for 95 %: 12.7 for two seeds, 4.3 for three, 2.3 for ten.
#
# **Exercise 2.** Compute mean and standard error of the paired differences.
# %% [markdown] lang="zh"
# ## 这算差异吗？
#
# 同一个模型的损失随种子而变。但一个种子遇到的数据好坏对各模型是一样的，所以要逐个种子看差值：
#
# $$d_s = a_s - b_s, \qquad \bar d \pm \frac{\mathrm{stdev}(d)}{\sqrt n}, \qquad \text{成立的条件：} |\bar d| > t_{n-1}\,\frac{\mathrm{stdev}(d)}{\sqrt n}$$
#
# $t_{n-1}$ 是 95 % 的学生 t 分位数：两个种子为 12.7，三个为 4.3，十个为 2.3。
#
# **练习 2.** 求成对差值的均值与标准误。
# %% tags=["exercise"]
def paired(a: list[float], b: list[float]) -> tuple[float, float]:
    """Returns the mean of a - b, seed by seed, and its standard error."""
    ### BEGIN SOLUTION
    differences = [x - y for x, y in zip(a, b, strict=True)]
    return statistics.fmean(differences), statistics.stdev(differences) / len(differences) ** 0.5
    ### END SOLUTION


# %% tags=["wrong"]
def paired(a: list[float], b: list[float]) -> tuple[float, float]:
    """Treats the seeds of both as unrelated."""
    error = (statistics.variance(a) / len(a) + statistics.variance(b) / len(b)) ** 0.5
    return statistics.fmean(a) - statistics.fmean(b), error


# %% tags=["wrong"]
def paired(a: list[float], b: list[float]) -> tuple[float, float]:
    """Returns the deviation of one difference, not the error of their mean."""
    differences = [x - y for x, y in zip(a, b, strict=True)]
    return statistics.fmean(differences), statistics.stdev(differences)


# %% tags=["gate"]
for pair in (([3.0, 4.0, 5.5], [2.0, 3.5, 4.0]), ([1.0, 2.0], [1.5, 1.0])):
    expected = difference(*pair)
    assert all(abs(x - y) < 1e-9 for x, y in zip(paired(*pair), expected, strict=True))

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3), layout="constrained")
for seed in SEEDS:
    left.plot(
        list(arms), [losses[name][seed] for name in arms], "o-", label=f"seed {seed}", alpha=0.7
    )
left.set(ylabel="validation loss, nats a token")
left.legend(frameon=False, fontsize=8)
first, *others = arms
for number, name in enumerate(others):
    mean, error = paired(losses[name], losses[first])
    right.errorbar(
        number,
        mean,
        yerr=error,
        fmt="o",
        capsize=4,
        color="tab:blue",
        label="standard error" if not number else None,
    )
    right.errorbar(
        number,
        mean,
        yerr=t_factor(3) * error,
        fmt="none",
        capsize=2,
        alpha=0.4,
        color="tab:gray",
        label="95 % of t" if not number else None,
    )
right.axhline(0, color="gray", lw=0.8)
right.set(ylabel=f"difference to {first}", xlim=(-0.5, len(others) - 0.5))
right.set_xticks(range(len(others)), others)
right.legend(frameon=False, fontsize=8)
plt.show()
for name in others:
    print(compared(name, first, losses[name], losses[first], digits=2))

# %% [markdown] lang="en"
# At this size the rows win by far, and the control says that it is the rows: gate and projections without rows bring nothing that three seeds could show. Whether that is so for a larger model, or a longer training, this does not say. The paper finds a U over $\rho$ with the best point near 0.75; with 1.6 million tokens a run, five values
# of $\rho$ and three seeds we found the loss falling all the way to $\rho = 0$ at this size, and no U (`docs/log.md`, "The smallest size at which experts were seen to pay"). The sweep of `tiny`, 15 runs, takes a quarter of an hour on two cores:
#
# ```
# rorqual sweep allocation --preset tiny --seeds 3
# ```
#
# **Key finding.** A run that can be resumed to the last bit makes two runs comparable; seeds, pairs and a control make a comparison a finding. "Not established" is a result, too.
#
# The code: `rorqual/train/`, `rorqual/experiments/allocation.py`, `rorqual/experiments/paired.py`. Next: a memory for a model that is there already, in notebook 11.
# %% [markdown] lang="zh"
# 在这个规模上，行大幅胜出；对照说明功劳在行：只有门控与投影、没有行，三个种子看不出任何好处。更大的模型、更长的训练是否如此，这里说明不了。论文在 $\rho$ 上得到一条 U 形曲线，最好的点在 0.75 附近；我们在这个规模上每次训练 160 万词元、
# 取五个 $\rho$ 和三个种子，损失一路降到 $\rho = 0$，没有 U（`docs/log.md` 的 “The smallest size at which experts were seen to pay”）。`tiny` 的扫描共 15 次训练，两个核约一刻钟：
#
# ```
# rorqual sweep allocation --preset tiny --seeds 3
# ```
#
# **关键结论。** 能逐位续训，两次运行才可比；有种子、配对和对照，比较才成为结论。“未能确立”也是一个结果。
#
# 代码：`rorqual/train/`、`rorqual/experiments/allocation.py`、`rorqual/experiments/paired.py`。接下来：给已有的模型装上记忆，见第 11 个笔记本。
