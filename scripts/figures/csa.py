"""Figures of docs/csa.md: DeepSeek-V4's compressed attention."""

from figures.svg import SMALL, Box, Figure

CELL = 22.0


def csa_entries(f: Figure) -> None:
    """Tokens, the entries that are made of them, and what one query reads."""
    f.alt = f.say(
        "Sixteen tokens. An HCA entry is made of eight tokens here, a CSA entry of four and of "
        "the four before them. The query, the last token, reads the window of the last four keys, "
        "the selected CSA entries or all HCA entries, and a sink, in one softmax.",
        "十六个词元。图中 HCA 的条目由八个词元构成，CSA 的条目由四个词元及其前四个构成。查询是最"
        "后一个词元，它在一个 softmax 中读最近四个键的窗口、"
        "选出的 CSA 条目或全部 HCA 条目，以及一个汇点。",
    )
    x = 14.0

    def kind(_: int, column: int) -> str:
        return "state" if column >= 12 else "plain"

    f.text(
        x, 4, f.say("keys of 16 tokens", "16 个词元的键"), anchor="start", size=SMALL, kind="soft"
    )
    f.text(x + 14 * CELL, 4, f.say("window", "窗口"), size=SMALL)
    row = f.cells(x, 24, [[str(i) for i in range(16)]], size=CELL, kind=kind)
    y = row.bottom + 8
    for entry in range(4):
        group = Box(x + entry * 4 * CELL + 2, row.y, 4 * CELL - 4, row.height)
        f.bracket(group, "below")
        box = f.box(
            x + entry * 4 * CELL + 14,
            y + 34,
            4 * CELL - 28,
            f"e_{{{entry}}}",
            kind="chosen" if entry in (0, 2) else "learned",
        )
        f.connect((group.cx, y + 2), box.north())
        if entry:
            before = x + entry * 4 * CELL - 2 * CELL
            f.connect(
                (before, y + 2),
                (before, y + 18),
                (box.x + 12, y + 18),
                (box.x + 12, box.y),
                dashed=True,
            )
    csa = f.text(
        x,
        y + 64,
        f.say(
            "CSA (r = 4): its own tokens and, dashed, the 4 before",
            "CSA（r = 4）：自己的词元，以及前 4 个（虚线）",
        ),
        anchor="start",
        size=SMALL,
        kind="soft",
    )
    heavy = csa.bottom + 10
    boxes = [
        f.box(x + n * 8 * CELL + 14, heavy, 8 * CELL - 28, f"h_{{{n}}}", kind="learned")
        for n in range(2)
    ]
    hca = f.text(
        x,
        boxes[0].bottom + 4,
        f.say(
            "HCA: one entry for r tokens (8 here, 128 in V4)",
            "HCA：r 个词元一个条目（图中 8，V4 为 128）",
        ),
        anchor="start",
        size=SMALL,
        kind="soft",
    )
    bar = hca.bottom + 30
    f.text(
        x,
        hca.bottom + 10,
        f.say(
            "What token 15 reads in a CSA block: one softmax", "CSA 块中词元 15 所读：一个 softmax"
        ),
        anchor="start",
        size=SMALL,
    )
    f.cells(x, bar, [["12", "13", "14", "15"]], size=CELL + 6, kind="state", height=26)
    f.cells(
        x + 4 * (CELL + 6) + 12, bar, [["e_{0}", "e_{2}"]], size=CELL + 16, kind="chosen", height=26
    )
    f.box(x + 4 * (CELL + 6) + 100, bar, 56, f.say("sink", "汇点"), kind="learned", height=26)
    f.text(
        x + 4 * (CELL + 6) + 164,
        bar + 4,
        f.say("has no value", "没有值"),
        anchor="start",
        size=SMALL,
        kind="soft",
    )


def csa_block(f: Figure) -> None:
    """The attention of a block, from hidden states to the output that is rotated back."""
    f.alt = f.say(
        "Hidden states become the queries of many heads and one key for each token, which is the "
        "value as well; both are rotated. A softmax over window, entries and sink sums keys. Each "
        "head's sum is rotated back by the query's position, and groups of heads are projected.",
        "隐藏状态变成多个头的查询与每个词元一个键，键同时也是值；两者都旋转。在窗口、条目与汇点"
        "上做 softmax，对键求和。每个头的和按查询的位置转回来，再分组投影。",
    )
    hidden = f.box(110, 6, 160, f.say("hidden states x", "隐藏状态 x"))
    query = f.box(
        6,
        60,
        176,
        f.say("queries of H heads,\nrotated by t", "H 个头的查询，\n旋转 t"),
        kind="learned",
    )
    key = f.box(
        198,
        60,
        176,
        f.say(
            "a key for each token,\nrotated by s; also its value",
            "每词元一个键，旋转 s：\n键同时也是值",
        ),
        kind="learned",
        size=12,
    )
    f.connect(hidden.west(), (query.cx, hidden.cy), query.north())
    f.connect(hidden.east(), (key.cx, hidden.cy), key.north())
    entries = f.box(
        198,
        key.bottom + 20,
        140,
        f.say("entries: tokens,\ncompressed", "条目：\n压缩的词元"),
        kind="state",
    )
    f.connect(hidden.south(0.5), (190, entries.cy), entries.west())
    soft = f.box(
        6,
        entries.bottom + 26,
        368,
        f.say(
            "softmax over window, entries and sink; o_{h} = Σ p k",
            "对窗口、条目与汇点做 softmax；o_{h} = Σ p k",
        ),
    )
    f.connect(query.south(), (query.cx, soft.y))
    f.connect((entries.cx, entries.bottom), (entries.cx, soft.y))
    f.connect((key.right - 18, key.bottom), (key.right - 18, soft.y))
    back = f.box(
        80,
        soft.bottom + 20,
        220,
        f.say("rotate o_{h} back by −t", "o_{h} 旋转 −t 转回来"),
        kind="chosen",
    )
    f.connect((back.cx, soft.bottom), back.north())
    groups = f.box(
        80,
        back.bottom + 20,
        220,
        f.say("W_{oa} by group, then W_{ob}", "先按组 W_{oa}，再 W_{ob}"),
        kind="learned",
    )
    f.connect(back.south(), groups.north())
