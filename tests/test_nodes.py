"""Two agents of torchrun, as on two machines, train what one agent with two processes trains, bit for bit."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_resume import HERE, assert_same, settings, two_processes  # noqa: F401 - `settings` is a fixture

from hebrew_asr.checkpoints import store
from train_hebrew_asr_enhanced import TrainingConfig

pytestmark = pytest.mark.slow
SECONDS = 400


def two_agents(config: TrainingConfig, step: int, how: str, static: bool = False) -> list[tuple[int, str]]:
    """Runs an agent of one process for each of two machines; returns their exit statuses and what they said.

    `static`: each agent is told its number and who is the first; else they meet and number themselves.
    """
    file = Path(f"{config.output_dir}.json")
    file.write_text(json.dumps(dataclasses.asdict(config)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
    meeting = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=a-run", "--local_addr=127.0.0.1"]
    agents, said = [], [file.with_suffix(f".{number}.txt") for number in range(2)]
    try:
        for number in range(2):
            told = [f"--node_rank={number}", "--master_addr=127.0.0.1", f"--master_port={port}"]
            line = [*torchrun, *(told if static else meeting), HERE / "run_and_stop.py", file, step, how]
            with said[number].open("w") as output:
                agents.append(subprocess.Popen(list(map(str, line)), stdout=output, stderr=subprocess.STDOUT))
        statuses = [agent.wait(SECONDS) for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()  # it ends its process first
            agent.wait(60)
    left = [entry for entry in os.listdir("/proc") if entry.isdigit() and str(file) in command_line(entry)]
    assert not left, "a process was left behind"
    return list(zip(statuses, (output.read_text() for output in said), strict=True))


def command_line(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""  # it ended


@pytest.fixture(scope="module")
def one_agent(tmp_path_factory, settings) -> Path:  # noqa: F811
    """A run of two processes under one agent, over the stage switch to its end."""
    folder = tmp_path_factory.mktemp("one-agent") / "run"
    done = two_processes(settings(folder, save_steps=100), -1, "TERM")
    assert done.returncode == 0, done.stderr
    return folder


def test_two_agents_end_in_the_bits_of_one(one_agent, settings, tmp_path):  # noqa: F811
    done = two_agents(settings(tmp_path / "run", save_steps=100), -1, "TERM")
    assert [status for status, _ in done] == [0, 0], done
    assert sum("stage A, to epoch 2" in said for _, said in done) == 1, "one process speaks"
    assert_same(tmp_path / "run", one_agent)


def test_a_signal_to_one_agent_saves_a_checkpoint_from_which_the_same_command_goes_on(one_agent, settings, tmp_path):  # noqa: F811
    config = settings(tmp_path / "run", save_steps=100)
    stopped = two_agents(config, 8, "TERM-to-the-agent", static=True)
    assert all(status != 0 for status, _ in stopped), stopped
    status = store.read_status(tmp_path / "run")
    assert status["state"] == "preempted" and status["checkpoint"] == "step-00000009", stopped
    done = two_agents(config, -1, "TERM", static=True)
    assert [status for status, _ in done] == [0, 0], done
    assert_same(tmp_path / "run", one_agent)
