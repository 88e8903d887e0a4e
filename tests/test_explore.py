"""Tests the page and its endpoints: the numbers, the edits and their undo, and refused requests."""

import http.client
import json
import re
import shutil
import socket
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

uvicorn = pytest.importorskip("uvicorn", reason="the extra [serve] is not installed")
pytest.importorskip("httpx", reason="starlette's test client needs httpx")

from starlette.testclient import TestClient  # noqa: E402 (after the extras are known to be there)

from rorqual import explore  # noqa: E402
from rorqual.analyze.measures import gates, without_memory  # noqa: E402
from rorqual.data.tokenizer import train  # noqa: E402
from rorqual.explore import MAX_TOKENS, ExploreConfig, app, main  # noqa: E402
from rorqual.layers.engram import EngramConfig  # noqa: E402
from rorqual.model import LanguageModel  # noqa: E402
from rorqual.presets import preset  # noqa: E402
from rorqual.serve.generate import Run  # noqa: E402

TEXTS = [
    "The whale swims in the sea.",
    "A river runs to the sea, the Sea!",
    "a whale sings: the whale dives",
]
TEXT = "the whale sings in the sea"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
]


def new_run(**parts) -> Run:
    tokenizer = train(TEXTS * 20, 300)
    memory = EngramConfig(layers=(0, 2), rows_per_head=(151, 157), heads=2, head_dim=8)
    config = replace(
        preset("tiny"), vocab_size=tokenizer.vocab_size + 3, engram=memory, init_std=0.3
    )
    config = replace(config, **parts)
    model = LanguageModel(
        config, torch.from_numpy(tokenizer.canonical_map()) if config.engram else None, seed=1
    )
    with torch.no_grad():
        for table in model.tables:
            table.weight.normal_(std=2.0)
    return Run(model, tokenizer)


@pytest.fixture(scope="module")
def run():
    return new_run()


@pytest.fixture
def client(run):
    return TestClient(app(run), base_url="http://127.0.0.1")


def read(client, text=TEXT):
    answer = client.post("/api/read", json={"text": text})
    assert answer.status_code == 200, answer.text
    return answer.json()


def ids_of(run, text=TEXT):
    return torch.tensor([[run.tokenizer.begin_id, *run.tokenizer.encode(text)]])


@torch.no_grad()
def chances(run, text=TEXT):
    return run.model(ids_of(run, text))[0, :, : run.tokenizer.vocab_size].softmax(-1)


def test_the_model_is_described(run, client):
    result = client.get("/api/model").json()
    assert result["parameters"] == sum(p.numel() for p in run.model.parameters())
    assert result["memory"] == {
        "layers": [0, 2],
        "orders": [2, 3],
        "heads": 2,
        "rows": [t.rows for t in run.model.tables],
    }
    assert (
        result["experts"] == {"layers": [0, 1, 2], "routed": 32, "active": 2}
        and result["streams"] == 4
    )


def test_tokens_carry_their_canonical_ids_and_what_reads_alike(run, client):
    result = read(client)
    ids = ids_of(run)[0].tolist()
    folded = run.tokenizer.canonical_map()
    assert [token["id"] for token in result["tokens"]] == ids
    assert [token["canonical"] for token in result["tokens"]] == [int(folded[i]) for i in ids]
    assert "".join(token["text"] for token in result["tokens"][1:]) == TEXT
    sea = read(client, " sea")["tokens"][-1]
    assert {word.strip().lower() for word in sea["alike"]} == {"sea"} and " sea" not in sea["alike"]


def test_ngrams_say_which_words_they_are_of(client):
    result = read(client, "the sea")
    words = [token["text"] for token in result["tokens"]]
    assert result["ngrams"][0] == ["“⟨start⟩”", "“⟨start⟩”"]
    assert result["ngrams"][-1][0] == f"“{'⟨start⟩' * (len(words) < 3)}{''.join(words[1:][-2:])}”"
    assert result["ngrams"][1] == [f"“⟨start⟩{words[1]}”"] * 2


def test_numbers_are_the_models_own(run, client):
    result = read(client)
    ids = ids_of(run)
    with torch.no_grad():
        routings = [aux.routing for aux in run.model.hidden(ids)[1] if aux.routing is not None]
    expected = gates(run.model, run.tokenizer, TEXT)
    torch.testing.assert_close(
        torch.tensor(result["gates"])[:, 1:], expected.values, atol=6e-5, rtol=0
    )
    for n, routing in enumerate(routings):
        assert [
            [e["expert"] for e in took] for took in result["experts"][n]
        ] == routing.topk_indices[0].tolist()
    assert torch.tensor(result["rows"]).shape == (2, ids.shape[1], 4)
    now = chances(run)
    with without_memory(run.model):
        without = chances(run)
    assert result["kinds"] == ["now", "without"]
    for t, guesses in enumerate(result["predictions"]):
        best = {run.tokenizer.token(int(i)) for i in now[t].topk(explore.BEST).indices}
        assert best <= {guess["text"] for guess in guesses}
        assert guesses[0]["p"][0] == pytest.approx(float(now[t].max()), abs=1e-5)
        text = sorted((guess["p"][1] for guess in guesses), reverse=True)
        torch.testing.assert_close(
            torch.tensor(text[: explore.BEST]),
            without[t].topk(explore.BEST).values,
            atol=1e-5,
            rtol=0,
        )
    effect = (now * (now / without).log()).sum(-1)
    torch.testing.assert_close(
        torch.tensor(result["effects"]["without"]), effect, atol=1e-4, rtol=0
    )
    surprise = -now[:-1].gather(1, ids[0, 1:, None]).log()[:, 0]
    torch.testing.assert_close(torch.tensor(result["surprise"]), surprise, atol=1e-4, rtol=0)


def weights(run):
    return [table.weight.detach().clone() for table in run.model.tables]


def test_suppressed_rows_are_zero_and_come_back(run, client):
    before = weights(run)
    first = read(client)
    position = 3
    edits = client.post("/api/edit", json={"text": TEXT, "token": position, "order": 3}).json()[
        "edits"
    ]
    assert len(edits) == 1 and "suppressed" in edits[0]["what"]
    for n, (old, new) in enumerate(zip(before, weights(run), strict=True)):
        rows = torch.tensor(first["rows"])[n, position, 2:]
        assert edits[0]["rows"][n] == rows.tolist() and not new[rows].any()
        cached = torch.ones(len(old), dtype=torch.bool).index_fill(0, rows, False)
        assert torch.equal(old[cached], new[cached])
    second = read(client)
    assert second["kinds"] == ["now", "without", "before"] and second["edits"] == edits
    assert (
        second["effects"]["before"][position] > 0
        and max(second["effects"]["before"][: position - 1]) == 0
    )
    was = {guess["text"]: guess["p"][0] for guess in first["predictions"][position]}
    for guess in second["predictions"][position]:
        assert guess["p"][2] == was.get(guess["text"], guess["p"][2])
    assert client.post("/api/undo", json={}).json() == {"edits": []}
    assert all(torch.equal(a, b) for a, b in zip(before, weights(run), strict=True))
    assert read(client) == first


def test_overwritten_rows_are_those_of_the_source(run, client):
    before = weights(run)
    source = "a river runs"
    rows = torch.tensor(read(client)["rows"])[:, 4, :2]
    arguments = torch.tensor(read(client, source)["rows"])[:, -1, :2]
    change = {"text": TEXT, "token": 4, "order": 2, "source": source}
    edits = client.post("/api/edit", json=change).json()["edits"]
    assert "reads as" in edits[0]["what"]
    for n, (old, new) in enumerate(zip(before, weights(run), strict=True)):
        assert torch.equal(new[rows[n]], old[arguments[n]])
    client.post("/api/undo", json={})
    assert all(torch.equal(a, b) for a, b in zip(before, weights(run), strict=True))


@pytest.mark.parametrize("token", [0, 1, 2])
def test_ngrams_that_reach_before_the_document_can_be_edited(run, client, token):
    rows = read(client)["rows"]
    edits = client.post("/api/edit", json={"text": TEXT, "token": token, "order": 3}).json()[
        "edits"
    ]
    assert edits[0]["rows"] == [rows[n][token][2:] for n in range(2)]
    client.post("/api/undo", json={})


@pytest.mark.parametrize("at_once", [True, False])
def test_edits_of_the_same_rows_are_taken_back_in_turn(run, client, at_once):
    before = weights(run)
    for source in (None, "the sea", "a whale"):
        client.post("/api/edit", json={"text": TEXT, "token": 2, "order": 2, "source": source})
    # Reading restores the original memory for a moment, and keeps the edits.
    read(client)
    left = [
        client.post("/api/undo", json={"all": at_once}).json()["edits"]
        for _ in range(1 if at_once else 3)
    ]
    assert [len(edits) for edits in left] == ([0] if at_once else [2, 1, 0])
    assert all(torch.equal(a, b) for a, b in zip(before, weights(run), strict=True))


def test_a_failure_leaves_the_edits_standing(run, monkeypatch):
    """The model fails where it reads the text with the rows of before the edit."""
    explorer = explore.Explorer(run)
    before = weights(run)
    explorer.edit(explore.Change(text=TEXT, token=2, order=2))
    edited = weights(run)
    plain = run.model.hidden

    def fail_without_edits(*arguments):
        if all(torch.equal(a, b) for a, b in zip(before, weights(run), strict=True)):
            raise RuntimeError("the edits are away")
        return plain(*arguments)

    monkeypatch.setattr(run.model, "hidden", fail_without_edits)
    with pytest.raises(RuntimeError, match="the edits are away"):
        explorer.read(explore.Read(text=TEXT))
    assert all(torch.equal(a, b) for a, b in zip(edited, weights(run), strict=True))
    explorer.undo(explore.Undo())


GOOD = {"text": TEXT, "token": 1, "order": 2}


@pytest.mark.parametrize(
    "path, body, message",
    [
        ("read", {}, "text: got nothing"),
        ("read", {"text": ""}, "text: got nothing"),
        ("read", {"text": 3}, "expected str"),
        ("read", {"txt": "a"}, "did you mean 'text'"),
        ("read", [1], "got a list, expected an object"),
        ("read", {"text": "a b " * MAX_TOKENS}, f"expected at most {MAX_TOKENS}"),
        ("edit", {}, "text: got nothing"),
        ("edit", GOOD | {"order": 1}, "order: got 1, expected 2..3"),
        ("edit", GOOD | {"order": 4}, "order: got 4"),
        ("edit", GOOD | {"order": True}, "expected int"),
        ("edit", GOOD | {"token": -1}, "token: got -1"),
        ("edit", GOOD | {"token": 500}, "token: got 500"),
        ("edit", GOOD | {"token": 1.5}, "expected int"),
        ("edit", GOOD | {"source": ""}, "text: got nothing"),
        ("edit", {"text": "", "token": 0}, "text: got nothing"),
        ("undo", {"all": 1}, "expected bool"),
        ("undo", {}, "nothing to take back"),
    ],
)
def test_nonsense_is_refused_with_a_sentence(client, path, body, message):
    answer = client.post(f"/api/{path}", json=body)
    assert answer.status_code == 400 and message in answer.json()["error"]


@pytest.mark.parametrize(
    "content, kind, message",
    [
        (b"{", "application/json", "is not JSON"),
        (b"\xff", "application/json", "is not JSON"),
        (b"[" * 100_000, "application/json", "is not JSON"),
        (b'{"text": "a"}', "text/plain", "expected application/json"),
        (b" " * (explore.LARGEST + 1), "application/json", "expected a smaller request"),
    ],
)
def test_a_body_that_is_no_request_is_refused(client, content, kind, message):
    answer = client.post("/api/read", content=content, headers={"Content-Type": kind})
    assert answer.status_code == 400 and message in answer.json()["error"]


def test_half_of_a_character_is_refused_with_a_sentence(client):
    for body in ({"text": "a\ud800"}, GOOD | {"source": "\udfff"}, {"text": "a\ud83d", "token": 0}):
        path = "edit" if "token" in body else "read"
        answer = client.post(
            f"/api/{path}", content=json.dumps(body), headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 400 and "half of a character" in answer.json()["error"]


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost:8765", "[::1]", "[::1]:8765"])
def test_every_name_of_this_machine_that_can_be_asked_for_answers(run, name):
    assert TestClient(app(run), base_url=f"http://{name}").get("/api/model").status_code == 200


def test_a_dead_token_has_no_gate():
    words = train(TEXTS * 20, 300)
    dead = words.encode(" sea")[-1]
    memory = EngramConfig(
        layers=(0, 2), rows_per_head=(151, 157), heads=2, head_dim=8, dead_tokens=(dead,)
    )
    run = new_run(engram=memory)
    result = read(TestClient(app(run), base_url="http://127.0.0.1"), "the sea, the sea sings")
    for layer in result["gates"]:
        for token, values in zip(result["tokens"], layer, strict=True):
            assert (max(values) == 0) == (token["id"] == dead)
    expected = gates(run.model, run.tokenizer, "the sea, the sea sings")
    torch.testing.assert_close(
        torch.tensor(result["gates"])[:, 1:], expected.values, atol=6e-5, rtol=0
    )


@pytest.mark.parametrize("gating", ["open", "shared"])
def test_a_memory_with_fewer_gates_is_read(run, gating):
    memory = replace(run.config.engram, gating=gating)
    result = read(TestClient(app(new_run(engram=memory)), base_url="http://127.0.0.1"))
    assert torch.tensor(result["gates"]).shape == (2, len(result["tokens"]), 4)


def test_edits_from_many_threads_are_each_whole(run):
    """Two threads edit, read and undo at once; afterwards the memory is as before."""
    explorer = explore.Explorer(run)
    before = weights(run)
    failed = []

    def tab(token):
        try:
            for _ in range(3):
                explorer.edit(explore.Change(text=TEXT, token=token, order=2))
                result = explorer.read(explore.Read(text=TEXT))
                assert len(result["edits"]) >= 1 and all(
                    len(edit["rows"]) == 2 for edit in result["edits"]
                )
                explorer.undo(explore.Undo())
        except Exception as error:
            failed.append(error)

    tabs = [threading.Thread(target=tab, args=(token,)) for token in (2, 3)]
    for one in tabs:
        one.start()
    for one in tabs:
        one.join()
    assert not failed and explorer.changes == [] == explorer.editor.edits
    assert all(torch.equal(a, b) for a, b in zip(before, weights(run), strict=True))


def test_other_sites_and_other_names_are_refused(run):
    assert TestClient(app(run), base_url="http://evil.example").get("/").status_code == 400
    assert TestClient(app(run), base_url="http://127.0.0.1").get("/api/read").status_code == 405


def test_the_page_loads_nothing_from_elsewhere(client):
    answer = client.get("/")
    assert (
        answer.status_code == 200
        and "default-src 'none'" in answer.headers["content-security-policy"]
    )
    assert not re.search(
        r'(src|href)="(?!#|data:,")', answer.text
    ) and "http" not in answer.text.replace("http-", "")


@pytest.mark.parametrize(
    "parts", [{"engram": None}, {"moe": None}, {"engram": None, "moe": None, "hyper": None}]
)
def test_models_without_a_part_are_read(parts):
    plain = new_run(**parts)
    client = TestClient(app(plain), base_url="http://127.0.0.1")
    result = read(client)
    body = client.get("/api/model").json()
    assert (body["memory"] is None) == ("engram" in parts) and (body["experts"] is None) == (
        "moe" in parts
    )
    assert bool(result["experts"]) == ("moe" not in parts) and bool(result["gates"]) == (
        "engram" not in parts
    )
    assert result["kinds"] == (["now"] if "engram" in parts else ["now", "without"])
    edit = client.post("/api/edit", json=GOOD)
    if "engram" in parts:
        assert edit.status_code == 400 and "without Engram" in edit.json()["error"]


@pytest.mark.parametrize("name", ["v4-tiny", "v4.1-tiny", "qwen4-tiny"])
def test_production_models_are_read(name):
    config = preset(name)
    unlike = {"mla": None, "engram": None}
    unlike |= {field: getattr(config, field) for field in config.parts}
    other = new_run(**unlike, layers=config.layers, rope=config.rope, eps=config.eps)
    client = TestClient(app(other), base_url="http://127.0.0.1")
    result = read(client)
    body = client.get("/api/model").json()
    assert body["parts"] == config.parts
    assert len(result["experts"]) == config.layers
    assert bool(result["gates"]) == (config.engram is not None)
    edit = client.post("/api/edit", json=GOOD)
    assert edit.status_code == (400 if config.engram is None else 200), edit.text


def test_a_run_that_diverged_says_so():
    broken = new_run()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    answer = TestClient(app(broken), base_url="http://127.0.0.1").post(
        "/api/read", json={"text": TEXT}
    )
    assert answer.status_code == 400 and "not finite" in answer.json()["error"]


def test_any_text_is_read(client):
    for text in (
        "\n\t ",
        "🐋",
        "\x00",
        "é" * 40,
        "<|end|>",
        "\ud800".encode("utf-8", "replace").decode(),
    ):
        assert read(client, text)["tokens"][0]["id"] == 0


@pytest.mark.parametrize(
    "wrong", [{"host": "0.0.0.0"}, {"host": "example.org"}, {"port": -1}, {"port": 1 << 16}]
)
def test_the_config_refuses_what_would_be_unsafe(wrong):
    with pytest.raises(ValueError, match=r"got .* expected"):
        ExploreConfig(run="runs/x", **wrong)


def test_a_port_that_is_taken_is_named(small_run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port: got {port} .* expected a free one"):
            main(ExploreConfig(run=str(small_run), port=port, device="cpu"))


@contextmanager
def shown(run):
    """Serves the page on a free port, as for a browser."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app(run), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(20)


def test_main_answers_on_this_machine_and_opens_the_browser(small_run, monkeypatch):
    stop = []
    opened = []
    monkeypatch.setattr(explore.webbrowser, "open", opened.append)

    def serve(self, sockets):
        stop.append((self.config, sockets[0].getsockname()))

    monkeypatch.setattr(uvicorn.Server, "run", serve)
    files = {path: path.stat().st_mtime_ns for path in small_run.iterdir()}
    main(ExploreConfig(run=str(small_run), port=0, open=True, device="cpu"))
    (_, (host, port)) = stop[0]
    assert host == "127.0.0.1" and opened == [f"http://127.0.0.1:{port}/"]
    assert files == {path: path.stat().st_mtime_ns for path in small_run.iterdir()}


def test_it_is_served_over_http(run):
    with shown(run) as port:
        line = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        line.request(
            "POST",
            "/api/read",
            json.dumps({"text": "the sea"}),
            {"Content-Type": "application/json"},
        )
        answer = line.getresponse()
        assert answer.status == 200 and json.loads(answer.read())["tokens"]
        line.close()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    if CHROMIUM is None:
        pytest.skip("no chromium here: apt install chromium")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield opened
        opened.close()


@contextmanager
def visit(browser, run, width=1200, scheme="light"):
    """Opens a fresh page of the run, and requires that its scripts report no error."""
    complaints = []
    with shown(run) as port:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request",
            lambda asked: (
                complaints.append(asked.url) if f"127.0.0.1:{port}/" not in asked.url else None
            ),
        )
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("#token:not([hidden])")
        yield page
        context.close()
    assert [text for text in complaints if text != "data:,"] == []


def say(page, text):
    page.locator("#ask").fill(text)
    page.get_by_role("button", name="Read", exact=True).click()


@pytest.mark.slow
def test_clicking_through_it(browser, run):
    from playwright.sync_api import expect

    before = weights(run)
    with visit(browser, run) as page:
        say(page, TEXT)
        expect(page.locator(".token")).to_have_count(ids_of(run).shape[1])
        page.locator(".token").nth(2).click()
        expect(page.locator("#token")).to_contain_text("token 2 of")
        page.keyboard.press("ArrowRight")
        expect(page.locator("#token")).to_contain_text("token 3 of")
        page.keyboard.press("Home")
        expect(page.locator("#token")).to_contain_text("start of the document")
        page.keyboard.press("End")
        expect(page.locator(".token").last).to_be_focused()
        assert page.locator(".token[tabindex='0']").count() == 1, (
            "one stop of the tab key for the whole text"
        )
        page.locator(".token").nth(3).click()
        for lens in ("Effect", "Expert", "Surprise", "Gate"):
            page.get_by_role("button", name=lens, exact=True).click()
            assert (
                page.locator(".token").nth(2).evaluate("node => node.style.getPropertyValue('--c')")
            )
        page.locator("#layer").select_option(label="block 2")
        page.locator("#stream").select_option(label="stream 3")
        assert page.locator(".token").nth(3).get_attribute("title").startswith("gate 0.")
        page.get_by_role("button", name="Suppress").first.click()
        expect(page.locator("#edits li")).to_have_count(1)
        expect(page.locator("#guesses .keys span")).to_have_count(3)
        expect(page.locator(".token").nth(3)).to_be_focused()
        page.get_by_role("button", name="Overwrite …").last.click()
        page.locator(".swap input").last.fill("a river runs")
        page.keyboard.press("Enter")
        expect(page.locator("#edits li")).to_have_count(2)
        assert page.locator(".rows .edited").count() > 0 and not torch.equal(
            before[0], weights(run)[0]
        )
        page.get_by_role("button", name="Undo", exact=True).click()
        expect(page.locator("#edits li")).to_have_count(1)
        page.get_by_role("button", name="Undo all").click()
        expect(page.locator("#edits")).to_be_hidden()
        page.locator(".map td[data-t='4']").first.click()
        expect(page.locator("#token")).to_contain_text("token 4 of")
        say(page, "")
        expect(page.locator("#status")).to_contain_text("expected at least one character")
    assert all(torch.equal(a, b) for a, b in zip(before, weights(run), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_reads_in_light_and_dark(browser, run, width, scheme):
    with visit(browser, run, width, scheme) as page:
        say(page, "a whale " * 60 + "w" * 300)
        page.wait_for_selector(".token >> nth=100")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, (
            "nothing sticks out of the page"
        )
        shades = page.evaluate(
            "[getComputedStyle(document.body).color, "
            "getComputedStyle(document.body).backgroundColor]"
        )
        ink, paper = (sum(map(int, re.findall(r"\d+", shade)[:3])) for shade in shades)
        assert (ink > paper) == (scheme == "dark") and abs(ink - paper) > 400
        assert len(page.screenshot(full_page=True)) > 10_000


@pytest.mark.slow
def test_panels_of_missing_parts_say_so(browser):
    with visit(browser, new_run(engram=None, moe=None)) as page:
        assert "no Engram memory and no routed experts" in page.locator("#absent").text_content()
        assert page.locator("#token").text_content().count("This model has no") == 2
        assert page.locator(".lenses button").count() == 1
