"""Figures of docs/mtp.md: multi-token prediction."""

from figures.svg import SMALL, Figure


def mtp_modules(f: Figure) -> None:
    """The model and two modules, what each reads and what each predicts."""
    f.alt = f.say(
        "The model reads token 1 to 4 and predicts token 5. Module 1 joins the model's hidden "
        "state at 4 with the embedding of token 5 and predicts token 6. Module 2 joins module 1's "
        "hidden state with the embedding of token 6 and predicts token 7. Embedding and head are "
        "shared.",
        "模型读入词元 1 到 4，预测词元 5。模块 1 把位置 4 的隐藏状态与词元 5 的嵌入合并，"
        "预测词元 6。"
        "模块 2 把模块 1 的隐藏状态与词元 6 的嵌入合并，预测词元 7。嵌入与 head 共用。",
    )
    columns = (8.0, 134.0, 260.0)
    width = 112.0
    inputs = ("t_{1} .. t_{4}", "t_{5}", "t_{6}")
    targets = ("t_{5}", "t_{6}", "t_{7}")
    names = (f.say("model", "模型"), f.say("module 1", "模块 1"), f.say("module 2", "模块 2"))
    heads = []
    blocks = []
    for i, x in enumerate(columns):
        f.text(x + width / 2, 4, names[i], kind="strong")
        target = f.box(x + 24, 28, width - 48, targets[i], kind="chosen")
        head = f.box(x, 76, width, f.say("norm, head", "归一化、head"), kind="learned")
        f.connect(head.north(), target.south())
        heads.append(head)
        words = f.say("blocks", "各块") if i == 0 else f.say("block", "一个块")
        block = f.box(x, 134, width, words, kind="learned")
        f.connect(block.north(), head.south())
        blocks.append(block)
        entry = block
        if i:
            join = f.box(x, 192, width, f.say("W [e ; h]", "W [e ; h]"), kind="learned")
            f.connect(join.north(), block.south())
            norms = f.box(x, 250, width, f.say("two norms", "两个归一化"), kind="learned")
            f.connect(norms.north(), join.south())
            entry = norms
            # The hidden state leaves the block before above, and enters here.
            before = blocks[i - 1]
            gap = (before.right + x) / 2
            f.connect(before.east(), (gap, before.cy), (gap, norms.cy), norms.west(), kind="state")
        embedding = f.box(x, 308, width, f.say("embedding", "嵌入"), kind="learned")
        f.connect(embedding.north(), entry.south())
        token = f.box(x + 16, 356, width - 32, inputs[i])
        f.connect(token.north(), embedding.south())
    f.text(
        190,
        388,
        f.say(
            "green: h before the final norm; embedding and head are the model's",
            "绿线：最终归一化之前的 h；嵌入与 head 是模型自己的",
        ),
        size=SMALL,
        kind="soft",
        width=364,
    )


def mtp_round(f: Figure) -> None:
    """One round of decoding with two drafts, of which the first stands."""
    f.alt = f.say(
        "One round of decoding with two drafts. The accepted id a and the drafts b and c go "
        "through "
        "one forward pass. The model draws b, then d. Draft b equals what was drawn and stands, c "
        "does not; the round gives b and d.",
        "带两个草稿的一轮解码：已确认的 a 与草稿 b、c 一起做一次前向。模型先抽出 b，再抽出 d。"
        "草稿 b 与抽出的一致，成立；c 不一致。这一轮给出 b 与 d。",
    )
    left = 108.0
    step = 92.0
    rows = (40.0, 96.0, 154.0, 212.0)
    labels = (
        f.say("read by one forward", "一次前向读入"),
        f.say("drawn from the logits", "由 logits 抽出"),
        f.say("compared with the draft", "与草稿比较"),
        f.say("what the round gives", "这一轮给出"),
    )
    for y, label in zip(rows, labels, strict=True):
        f.text(8, y, label, anchor="start", size=SMALL, kind="soft", width=92)
    heading = (f.say("accepted", "已确认"), f.say("draft 1", "草稿 1"), f.say("draft 2", "草稿 2"))
    read = []
    drawn = []
    for i, (words, name) in enumerate(zip(heading, "abc", strict=True)):
        x = left + i * step
        f.text(x + 36, 8, words, size=SMALL, kind="soft")
        read.append(f.box(x, rows[0], 72, name, kind="plain" if i == 0 else "memory"))
        drawn.append(f.box(x, rows[1], 72, ("b", "d", "?")[i], kind="chosen" if i < 2 else "empty"))
        f.connect(read[i].south(), drawn[i].north())
    checks = (f.say("b = b:\nstands", "b = b：\n成立"), f.say("d ≠ c:\nends", "d ≠ c：\n到此为止"))
    for i, words in enumerate(checks):
        x = left + (i + 1) * step
        check = f.box(x - 10, rows[2], 86, words, size=SMALL, kind="plain")
        f.connect(
            drawn[i].south(), (drawn[i].cx, check.y - 12), (check.cx, check.y - 12), check.north()
        )
    f.box(left, rows[3], 72, "b", kind="state")
    f.box(left + step, rows[3], 72, "d", kind="state")
    f.text(
        left,
        rows[3] + 36,
        f.say(
            "d costs nothing: it was drawn behind the draft that stands",
            "d 不花代价：它是在成立的草稿之后抽出的",
        ),
        anchor="start",
        size=SMALL,
        kind="soft",
        width=264,
    )
