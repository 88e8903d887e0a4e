"""The doctor tells the truth about this machine, and a mend for whatever is amiss."""

import json
import platform

import torch

from rorqual import doctor


def test_the_report_is_true_and_speaks_json(tmp_path):
    report = doctor.examine(tmp_path)
    said = json.loads(json.dumps(report.to_dict()))
    assert said["python"] == platform.python_version()
    assert said["cores"] >= 1
    assert said["memory_bytes"] > 2**28
    assert said["threads"] == torch.get_num_threads()
    assert any(device.startswith("cpu") for device in said["devices"])
    checks = {check["name"]: check for check in said["checks"]}
    assert checks["torch"]["found"].split("+")[0] == torch.__version__.split("+")[0]
    assert checks["arithmetic"]["state"] == "ok"
    assert said["well"] == all(check["state"] != "wrong" for check in said["checks"])
    assert all(check["mend"] for check in said["checks"] if check["state"] != "ok")


def test_the_text_names_everything_once(tmp_path):
    report = doctor.examine(tmp_path)
    text = "\n".join(doctor.lines(report))
    for check in report.checks:
        assert f"{check.name}: {check.found}" in text
    for kernel in report.kernels:
        assert f"kernel {kernel}: " in text


def test_what_is_missing_comes_with_its_mend(tmp_path, monkeypatch):
    real = doctor._version
    absent = {"torch", "uvicorn", "peft"}
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in absent else real(name))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "_cores", lambda: 0)
    report = doctor.examine(tmp_path)
    checks = {check.name: check for check in report.checks}
    assert (checks["torch"].state, checks["torch"].mend) == ("wrong", "pip install torch")
    assert (checks["uvicorn"].state, checks["uvicorn"].mend) == ("missing", "pip install 'rorqual[serve]'")
    assert checks["peft"].state == "missing"
    assert "apt install g++" in checks["C++ compiler"].mend
    assert "OMP_NUM_THREADS=0" in checks["threads"].mend
    assert not report.well
    assert doctor.lines(report)[-1].startswith("wrong")
