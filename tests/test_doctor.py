"""Tests that the doctor's report is true, and that every failure has a hint."""

import importlib.metadata
import json
import platform
import tomllib
from pathlib import Path

import torch

from rorqual import doctor, hints, kernels
from rorqual.cli.main import main
from rorqual.layers.addresses import follow_rows


def test_the_report_is_true_and_speaks_json(tmp_path):
    report = doctor.examine(tmp_path)
    text = json.loads(json.dumps(report.to_dict()))
    assert text["python"] == platform.python_version()
    assert text["cores"] >= 1
    assert text["memory_bytes"] > 2**28
    assert text["threads"] == torch.get_num_threads()
    assert any(device.startswith("cpu") for device in text["devices"])
    checks = {check["name"]: check for check in text["checks"]}
    assert checks["torch"]["value"].split("+")[0] == torch.__version__.split("+")[0]
    assert checks["arithmetic"]["state"] == "ok"
    assert text["well"] == all(check["state"] != "wrong" for check in text["checks"])
    assert all(check["hint"] for check in text["checks"] if check["state"] != "ok")


def test_the_text_names_everything_once(tmp_path):
    report = doctor.examine(tmp_path)
    text = "\n".join(doctor.lines(report))
    for check in report.checks:
        assert f"{check.name}: {check.value}" in text
    for kernel in report.kernels:
        assert f"kernel {kernel}: " in text


def test_what_is_missing_comes_with_its_hint(tmp_path, monkeypatch):
    plain = importlib.metadata.version
    absent = {"torch", "uvicorn", "peft", "numba", "pyarrow"}

    def version(name: str) -> str:
        if name in absent:
            raise importlib.metadata.PackageNotFoundError(name)
        return plain(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.runtime, "cores", lambda: 0)
    report = doctor.examine(tmp_path)
    checks = {check.name: check for check in report.checks}
    assert (checks["torch"].state, checks["torch"].hint) == ("wrong", "pip install torch")
    assert (checks["uvicorn"].state, checks["uvicorn"].hint) == ("missing", hints.install("serve"))
    assert (checks["numba"].state, checks["numba"].hint) == ("wrong", "pip install numba")
    assert (checks["pyarrow"].state, checks["pyarrow"].hint) == ("missing", hints.install("hub"))
    assert (checks["peft"].state, checks["peft"].hint) == ("missing", hints.install("retrofit"))
    assert "apt install g++" in checks["C++ compiler"].hint
    assert "OMP_NUM_THREADS=0" in checks["threads"].hint
    assert not report.well
    assert doctor.lines(report)[-1].startswith("wrong")


def test_every_dependency_of_the_project_is_looked_at(tmp_path):
    project = tomllib.loads(
        (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    )["project"]
    extras = {
        name: lines
        for name, lines in project["optional-dependencies"].items()
        if name not in ("all", "dev")
    }
    words = [
        line.split(">")[0].split("=")[0]
        for lines in (project["dependencies"], *extras.values())
        for line in lines
    ]
    seen = [check.name.replace("_", "-") for check in doctor.examine(tmp_path).checks]
    assert not {word.replace("_", "-") for word in words} - set(seen)
    assert len(seen) == len(set(seen))
    assert "pytest" not in seen


def test_not_installed_is_reported_and_hinted(tmp_path, monkeypatch):
    def absent(name):
        raise doctor.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.importlib.metadata, "requires", absent)
    checks = {check.name: check for check in doctor.examine(tmp_path).checks}
    assert checks["rorqual"].state == "missing"
    assert "pip install" in checks["rorqual"].hint


def test_the_kernel_reported_is_the_one_that_is_picked(tmp_path, monkeypatch):
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    picked = doctor.examine(tmp_path).kernels_picked
    on_cpu = doctor.runtime.device().type == "cpu"
    assert picked["hash_rows"] == ("numba" if on_cpu else "triton")
    assert picked["fuse"] == ("reference" if on_cpu else "triton")
    assert picked["decode_step"] == ("numba" if on_cpu else "reference")
    assert picked.keys() == kernels.registered().keys()
    monkeypatch.setenv(kernels.VARIABLE, "hash_rows=reference")
    assert doctor.examine(tmp_path).kernels_picked == picked | {"hash_rows": "reference"}
    monkeypatch.setenv(kernels.VARIABLE, "reference")
    report = doctor.examine(tmp_path)
    assert set(report.kernels_picked.values()) == {"reference"}
    text = "\n".join(doctor.lines(report))
    assert all(f"kernel {name}: reference" in text for name in report.kernels)
    assert report.well


def test_nonsense_asked_of_the_kernels_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(kernels.VARIABLE, "hash_rows=nonsense")
    assert main(["doctor", "--folder", str(tmp_path)]) == 1
    message = capsys.readouterr().out
    assert "wrong   kernels: " in message
    assert "nonsense" in message
    assert "Traceback" not in message


def test_a_kernel_that_says_something_else_is_found(tmp_path, monkeypatch):
    (kernel,) = follow_rows.choice.kernels
    monkeypatch.setattr(
        kernel, "function", lambda *arguments: follow_rows.reference(*arguments) * 0
    )
    checks = {check.name: check for check in doctor.examine(tmp_path).checks}
    assert checks["arithmetic"].state == "wrong"
    assert "at fault" in checks["arithmetic"].hint
