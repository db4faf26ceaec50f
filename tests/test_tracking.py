"""W&B with a server: what arrives there, and what becomes of a run whose server is gone."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from wandb_server import WandbServer

from hebrew_asr.errors import InputError
from hebrew_asr.training import run_log

HERE = Path(__file__).parent
KEY = "0123456789" * 4  # as long as W&B's
SCRIPT = """
import psutil, sys, time
from pathlib import Path
from hebrew_asr.training import run_log
run_log.FINISH_SECONDS = 3.0
log = run_log.RunLog(Path(sys.argv[1]), rank=0)
log.start_tracker("wandb", "a-project", "a-name", {"seed": 1}, ["a-tag"])
for step in (1, 2, 3):
    log.log({"train/loss": 1.0 / step, "eval/wer": float("nan")}, step)
print("trained", flush=True)
sys.stdin.readline()
if sys.argv[2:]:
    for process in psutil.Process().children(recursive=True):
        process.kill()
    time.sleep(1)
    log.log({"train/loss": 0.25}, 4)
log.finish()
print(log.dashboard())
"""


@pytest.fixture()
def server():
    with WandbServer() as server:
        yield server


def tracked_run(server: WandbServer, folder: Path, *how: str) -> subprocess.Popen:
    env = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}  # WANDB_SERVICE too
    env |= {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "PYTHONPATH": str(HERE.parent)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", SCRIPT, str(folder), *how]
    running = subprocess.Popen(command, env=env, cwd=folder, text=True, **pipes)
    assert "trained\n" in iter(running.stdout.readline, ""), running.communicate()[1]
    return running


def ended(running: subprocess.Popen) -> tuple[str, str]:
    try:
        return running.communicate("\n", timeout=120)
    finally:
        running.kill()


def test_the_server_gets_every_number_and_the_key_is_not_written_down(server, tmp_path):
    running = tracked_run(server, tmp_path)
    out, err = ended(running)
    assert running.returncode == 0, err
    assert [(row["_step"], row["train/loss"]) for row in server.history] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert re.fullmatch(rf"dashboard: {server.url}/me/a-project/runs/\w+\n", out)
    assert KEY.encode() not in server.said
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def test_a_server_that_no_longer_answers_does_not_hold_up_the_end(server, tmp_path):
    running = tracked_run(server, tmp_path)
    server.fall_silent()
    began = time.monotonic()
    _, err = ended(running)
    assert running.returncode == 0 and time.monotonic() - began < 30
    (warning,) = [line for line in err.splitlines() if line.startswith("warning: ")]
    folder = re.fullmatch(r"warning: W&B has not taken all within 3 s; to send it: uv run wandb sync (.+)", warning)[1]
    assert list(Path(folder).glob("*.wandb")), "what it syncs is there"


def test_a_run_outlives_its_dashboard(server, tmp_path):
    running = tracked_run(server, tmp_path, "kill")
    out, err = ended(running)
    assert running.returncode == 0, err
    (warning,) = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert re.fullmatch(r"warning: wandb failed and gets no more \(\w+: .+\); metrics.jsonl has every number", warning)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4] and out.endswith(f"metrics: {tmp_path / 'metrics.jsonl'}\n")


def test_a_final_model_with_more_errors_than_the_start_is_worse():
    final = {"final/wer": 20.0, "final/wer_low": 15.0, "final/wer_high": 25.0}
    rows = [{"step": 0, "eval/wer": 19.0}, {"step": 4, "eval/wer": 18.0}, {"step": 4, **final}]
    assert run_log.is_worse(rows)
    assert not run_log.is_worse([{"step": 0, "eval/wer": 21.0}, *rows[1:]])
    assert run_log.wer_summary(rows, {}, "A")[-1] == (
        "WER  20.00 %  final model, reloaded from disk (95 % interval 15.00–25.00)"
    )


@pytest.mark.parametrize(
    ("project", "name", "value", "said"),
    [
        ("my-team/qwen3-asr", "WANDB_MODE", "offline", "Invalid project name 'my-team/qwen3-asr'"),
        ("x" * 140, "WANDB_MODE", "offline", "exceeded 128 characters"),
        ("asr", "WANDB_BASE_URL", "wandb.mycompany.com", "WANDB_BASE_URL: Input should be a valid URL"),
        ("asr", "WANDB_RESUME", "yes", "WANDB_RESUME: Input should be 'allow'"),
        ("asr", "WANDB_RUN_ID", "a/b", "Run ID cannot contain"),
    ],
)
def test_what_wandb_would_refuse_is_one_message_at_the_start(tmp_path, monkeypatch, project, name, value, said):
    log = run_log.RunLog(tmp_path, rank=0)
    log.check_tracker("wandb", "asr")
    monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=f"W&B refuses its settings: .*{said}") as problem:
        log.check_tracker("wandb", project)
    assert "\n" not in str(problem.value)
    log.check_tracker("none", project)


def test_the_switches_of_wandb_are_heard(monkeypatch):
    for name, value, tracker in (
        ("WANDB_MODE", "disabled", "none"),
        ("WANDB_MODE", "off", "none"),
        ("WANDB_DISABLED", "true", "none"),
        ("WANDB_MODE", "offline", "wandb"),
    ):
        with monkeypatch.context() as patched:
            patched.delenv("WANDB_MODE", raising=False)
            patched.setenv(name, value)
            assert run_log.tracker_here("wandb") == tracker
            assert run_log.tracker_here("trackio") == "trackio"
    monkeypatch.setenv("WANDB_MODE", "onlin")
    with pytest.raises(InputError, match="online, offline"):
        run_log.tracker_here("wandb")
