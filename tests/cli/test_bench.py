"""Tests `rorqual bench serve`: it starts a server, measures and ends it; mistakes are a line."""

import contextlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from rorqual.cli.main import main


def test_a_run_is_served_measured_and_ended(small_run: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
    sizes = ["--requests=3", "--concurrency=2", "--input-tokens=12", "--output-tokens=4"]
    out = tmp_path / "figures.json"
    limits = ["--goodput", "ttft:60000", "itl:60000"]
    words = ["bench", "serve", str(small_run), *sizes, *limits, "--out", str(out)]
    assert main([*words, "--serve", "context=64"]) == 0
    shown = capsys.readouterr().out
    assert "3 of 3 requests whole, 0 failed" in shown
    assert "(36 in, 12 out)" in shown
    for name in ("time to first token", "inter-token latency", "end to end"):
        assert name in shown
    assert "(100%) within ttft 60000 ms" in shown
    figures = json.loads(out.read_text())
    assert (figures["completed"], figures["total_output_tokens"]) == (3, 12)
    assert figures["request_rate"] == "inf"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "expected serve first"),
        (["server"], "did you mean 'serve'"),
        (["serve", "runs/x", "--url", "http://a"], "expected one"),
        (["serve", "--requests", "0"], "--requests 0, expected at least 1"),
        (["serve", "--rate", "0"], "--rate 0.0, expected more than 0"),
        (["serve", "--rate", "fast"], "rate"),
        (["serve", "--goodput", "ttft"], "NAME:MILLISECONDS"),
        (["serve", "--url", "http://127.0.0.1:9"], "got no connection"),
        (["serve", "--url", "localhost:80"], "expected http://HOST:PORT"),
        (["serve", "runs/nothing-there"], "runs/nothing-there"),
        (["serve", "--url", "http://a:x"], "expected http://HOST:PORT"),
        # What is wrong without any server is said before one is started or asked.
        (["serve", "runs/nothing-there", "--input-tokens", "0"], "got 0 input tokens"),
        (["serve", "runs/nothing-there", "--prompts", "no-such-file.txt"], "no-such-file.txt"),
    ],
)
def test_mistakes_are_a_line(words: list[str], message: str, capsys) -> None:
    assert main(["bench", *words]) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("rorqual: error: ")
    assert message in error
    assert "Traceback" not in error


@pytest.mark.skipif(os.name != "posix", reason="elsewhere 0.0.0.0 is no address to connect to")
def test_the_key_of_the_environment_goes_to_no_other_machine(monkeypatch, capsys) -> None:
    seen: list[str | None] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.headers["authorization"])
            self.send_error(401)

        def log_message(self, *arguments) -> None:
            """Prints nothing."""

    monkeypatch.setenv("RORQUAL_API_KEY", "secret")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for words in (["127.0.0.1"], ["0.0.0.0"], ["0.0.0.0", "--api-key", "its"]):
            url = f"http://{words[0]}:{server.server_port}"
            assert main(["bench", "serve", "--url", url, *words[1:]]) == 1
            assert "got status 401" in capsys.readouterr().err
        server.shutdown()
    assert seen == ["Bearer secret", None, "Bearer its"]


def answered(folder: Path) -> str:
    """Waits until the server that logs into a folder has answered some requests."""
    due = time.monotonic() + 120
    while time.monotonic() < due:
        time.sleep(0.5)
        texts = [log.read_text(encoding="utf-8") for log in folder.glob("*/log")]
        if match := re.search(r"http://127\.0\.0\.1:\d+", " ".join(texts)):
            with contextlib.suppress(httpx.HTTPError):
                metrics = httpx.get(match[0] + "/metrics", trust_env=False).text
                ended = re.search(r'^rorqual_finished_total\{.*"length"\} (\S+)', metrics, re.M)
                if ended and float(ended[1]) >= 5:
                    return match[0]
    raise AssertionError("the server has answered nothing")


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="Windows has no such signals")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_and_ctrl_c_prints_what_was_measured(
    small_run: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
    words = ["--requests=100000", "--input-tokens=8", "--output-tokens=2", "--concurrency=2"]
    command = [sys.executable, "-m", "rorqual", "bench", "serve", str(small_run), *words, "--json"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    url = answered(tmp_path)
    if sent == signal.SIGTERM:
        process.terminate()
        process.communicate(timeout=60)
        assert process.returncode == 143
        with pytest.raises(httpx.ConnectError):
            httpx.get(url, trust_env=False)
        return
    os.killpg(process.pid, sent)
    printed, error = process.communicate(timeout=60)
    figures = json.loads(printed)
    assert process.returncode == 130, error
    assert figures["completed"] > 0
    assert figures["completed"] + figures["failed"] + figures["unfinished"] < 100000
