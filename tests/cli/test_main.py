"""Tests the entry point: which modules it loads, what it prints, and its exit codes."""

import shlex
import subprocess
import sys

import pytest

import rorqual
from rorqual.cli import main as main_module


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_help_loads_neither_torch_nor_the_converter() -> None:
    done = run(
        "import sys; from rorqual.cli.main import main; code = main(['--help']);"
        "slow = {'torch', 'msgspec', 'yaml', 'numpy', 'rich', 'transformers'} & set(sys.modules);"
        "assert not slow, slow; sys.exit(code)"
    )
    assert done.returncode == 0, done.stderr
    for name, command in main_module.COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert f"rorqual {command.example}" in done.stdout


def test_the_package_loads_no_module_and_knows_its_names() -> None:
    done = run("import sys, rorqual; assert not {'torch', 'numpy'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr
    assert all(hasattr(rorqual, name) for name in rorqual.__all__)
    assert set(rorqual.__all__) <= set(dir(rorqual))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rorqual.nothing  # noqa: B018


def test_version_and_the_module_as_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "rorqual", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.split()[0]) == (0, "rorqual")


def test_every_command_has_its_function() -> None:
    for name, command in main_module.COMMANDS.items():
        module = __import__(f"rorqual.cli.{command.module}", fromlist=["x"])
        assert callable(getattr(module, f"{name}_command"))


def test_an_unknown_command_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main_module.main(["generat"]) == 2
    message = capsys.readouterr().err
    assert "did you mean 'generate'?" in message
    assert len(message.splitlines()) == 2


def raising(error: BaseException):
    class Module:
        @staticmethod
        def doctor_command(argv: list[str]) -> int:
            raise error

    return Module


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("got 3, expected 4"), 1, "rorqual: error: got 3, expected 4\n"),
        (FileNotFoundError("no folder x"), 1, "rorqual: error: no folder x\n"),
        (
            FileNotFoundError(2, "No such file", "x"),
            1,
            "rorqual: error: got 'x', expected a file or folder that exists\n",
        ),
        (
            PermissionError(13, "Permission denied", "x"),
            1,
            "rorqual: error: [Errno 13] Permission denied: 'x'\n",
        ),
        (RuntimeError("run a ended"), 1, "rorqual: error: run a ended\n"),
        (ModuleNotFoundError("no", name="olmo_core.train"), 1, "[train]'\n"),
        (ModuleNotFoundError("no", name="rorqual.nothing"), 1, "Traceback"),
        (TypeError("ours"), 1, "Traceback"),
        (KeyboardInterrupt(), 130, "rorqual: stopped\n"),
        (SystemExit(3), 3, ""),
        (SystemExit(), 0, ""),
    ],
)
def test_errors_and_their_codes(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("RORQUAL_DEBUG", raising=False)
    monkeypatch.setattr(main_module.importlib, "import_module", lambda name: raising(error))
    assert main_module.main(["doctor"]) == code
    printed = capsys.readouterr().err
    assert message in printed
    assert ("Traceback" in printed) == (message == "Traceback")


def test_debug_shows_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RORQUAL_DEBUG", "1")
    monkeypatch.setattr(
        main_module.importlib,
        "import_module",
        lambda name: raising(ValueError("got 3, expected 4")),
    )
    assert main_module.main(["doctor"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_error() -> None:
    code = f"{shlex.quote(sys.executable)} -m rorqual --help | head -n 1"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.startswith("usage: rorqual")


HELPS = [
    *([name] for name in main_module.COMMANDS if name != "table"),
    *(["table", verb] for verb in ("build", "convert", "inspect", "verify", "hot", "bench")),
    ["sweep", "needle"],
]


@pytest.mark.parametrize("words", HELPS, ids=" ".join)
def test_no_line_of_help_holds_two_examples(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main_module.main([*words, "--help"]) == 0
    message = capsys.readouterr().out
    assert message
    shown = f"rorqual {words[0]} "
    wrong = [
        line
        for line in message.splitlines()
        if line.count(shown) > 1 and not line.startswith("usage: ")
    ]
    assert not wrong
