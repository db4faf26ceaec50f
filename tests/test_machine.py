"""--check_machine: each of its lines is `ok` where all is well, and says what to do where a cause is planted."""

import dataclasses
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import wandb
from conftest import ROOT

from hebrew_asr.data import shared_memory
from hebrew_asr.data.sources import Source
from hebrew_asr.errors import InputError
from hebrew_asr.training import machine
from hebrew_asr.training.plan import Plan, StagePlan
from train_hebrew_asr_enhanced import DataCollatorSpeechSeq2SeqWithPadding, main

A100 = "NVIDIA A100-SXM4-40GB"
TWO = SimpleNamespace(num_processes=2, process_index=0, device=torch.device("cpu"))


def lines_of(config, capsys) -> dict[str, str]:
    """What was printed, by what it is about."""
    with pytest.raises(InputError, match="would stop the run"):
        main(dataclasses.replace(config, check_machine=True))
    return {line[5:].split(":")[0]: line for line in capsys.readouterr().out.splitlines()}


def test_a_machine_that_is_fit_has_ok_in_every_line_and_nothing_is_left_behind(config, tmp_path, capsys):
    main(dataclasses.replace(config, check_machine=True))
    lines = capsys.readouterr().out.splitlines()
    assert [line[:5] for line in lines[:-1]] == ["ok   "] * 11 and lines[-1] == "nothing here would stop the run"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_processes_meet(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "train_round2_gradual.py"), "--demo", "--check_machine", f"--output_dir={tmp_path}/run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ok   exchange: 2 processes over gloo" in done.stdout and done.stdout.count("ok   disk") == 1


def test_what_would_stop_the_run_is_said_line_by_line(config, capsys, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_read_token")
    monkeypatch.setenv("WANDB_MODE", "")
    changed = dataclasses.replace(
        config,
        output_dir="/proc/run",  # where nobody writes
        hf_repo_id="OzLabs/model",
        train_sources=[*config.train_sources, Source("/nowhere/corpus")],
    )
    lines = lines_of(changed, capsys)
    assert "stop disk: cannot write to /proc" in lines["disk"] and "--output_dir" in lines["disk"]
    assert lines["Hub"].startswith("stop Hub: cannot upload to OzLabs/model") and "token" in lines["Hub"]
    assert lines["corpus /nowhere/corpus"].startswith("stop ") and "no such folder" in lines["corpus /nowhere/corpus"]
    assert "first step" not in lines
    missing = lines_of(dataclasses.replace(config, model_name_or_path="/nowhere/model"), capsys)
    assert missing["model"] == "stop model: /nowhere/model: no such folder or file"


def test_the_disk(config, model, tmp_path, monkeypatch):
    slow = machine.of_disk(tmp_path, model, dataclasses.replace(config, preemption_grace_seconds=0.0))
    assert slow.kind == "note" and "--preemption_grace_seconds" in slow.text
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=10**6))
    with pytest.raises(InputError, match=r"0.0 GB free on its disk, the run needs"):
        machine.of_disk(tmp_path / "not" / "there", model, config)


def test_a_micro_batch_has_as_many_tensors_as_are_counted(processor, config):
    empty = DataCollatorSpeechSeq2SeqWithPadding(processor, config).packed([])
    assert sum(torch.is_tensor(one) for one in empty.values()) == machine.TENSORS


def test_limits(monkeypatch, tmp_path):
    assert machine.of_open_files(4, 3, 1024).kind == "ok"
    few = machine.of_open_files(4, 3, 256)
    assert few.kind == "stop" and "ulimit -n" in few.text
    assert machine.of_shared_memory(4, 60.0).kind == "ok"
    monkeypatch.setattr(shared_memory, "PLACE", tmp_path / "missing")
    small = machine.of_shared_memory(4, 60.0)
    assert small.kind == "note" and "--shm-size" in small.text


def test_devices():
    assert machine.of_devices([A100] * 8, 8, 10**9).kind == "ok"
    more, fewer = machine.of_devices([A100], 2, 10**9), machine.of_devices([A100] * 8, 1, 10**9)
    assert more.kind == "stop" and "--nproc_per_node=1" in more.text
    assert fewer.kind == "note" and "--nproc_per_node=8" in fewer.text
    assert [machine.of_devices([], 2, size).kind for size in (10**6, 10**9)] == ["ok", "note"]
    names = {A100: 42e9, "NVIDIA A100 80GB PCIe": 85e9, "NVIDIA H100 80GB HBM3": 85e9, "NVIDIA L40S": 48e9}
    names |= {"NVIDIA RTX A6000": 51e9, "NVIDIA GeForce RTX 4090": 25e9}
    found = [machine.kind_of(name, int(total)) for name, total in names.items()]
    assert found == ["A100-40GB", "A100-80GB", "H100", "L40S", "L40S", "4090"]


def test_memory_is_compared_with_the_plan():
    stage = StagePlan("B", 1, {"all": 30 * 10**9}, 38 * 10**9, ["--fsdp true"], 1, [1.0, 1.0], [0.4, 0.3])
    plan = Plan([stage], [], [1.0, 1.0], None)

    def of(free: float, total: float) -> machine.Finding:
        return machine.of_memory(plan, A100, int(free * 1e9), int(total * 1e9))

    assert of(40, 42).kind == "ok"
    assert of(20, 42).kind == "stop" and "another process" in of(20, 42).text
    assert of(24, 24).kind == "stop" and "--fsdp true" in of(24, 24).text and "--find_token_budget" in of(24, 24).text


def test_an_exchange_that_fails_hangs_or_adds_up_wrong(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")

    def found(all_reduce) -> machine.Finding:
        monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
        return machine.of_exchange(TWO, seconds=0.5)

    def fails(tensor):
        raise RuntimeError("NCCL error: unhandled system error")

    assert found(lambda tensor: tensor.fill_(3.0)).kind == "ok"
    assert found(lambda tensor: None).kind == "stop" and "adds up wrong" in found(lambda tensor: None).text
    assert found(fails).kind == "stop" and "NCCL_DEBUG=INFO" in found(fails).text
    hangs = found(lambda tensor: time.sleep(5))
    assert hangs.kind == "stop" and "NCCL_SOCKET_IFNAME" in hangs.text


def test_tracking(monkeypatch):
    assert machine.of_tracker("none").kind == "ok"
    monkeypatch.setattr(wandb, "login", lambda prompt, timeout: False)
    without = machine.of_tracker("wandb")
    assert without.kind == "note" and "uv run wandb login" in without.text
    monkeypatch.setattr(wandb, "login", lambda prompt, timeout: True)
    assert machine.of_tracker("wandb").kind == "ok"
    monkeypatch.setenv("WANDB_MODE", "offlin")
    assert machine.asked("tracking", lambda: machine.of_tracker("wandb")).kind == "stop"
