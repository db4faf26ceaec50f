"""What benchmarks/gpu.py does on a GPU runs, at small widths, on a CPU."""

import json
import os

import pytest
from forked import forked


@pytest.mark.slow
def test_its_parts_run(tmp_path):
    """Of those that differ only in settings one each; the demo has tests of its own."""
    parts = ["machine", "kernels", "step_B_share_of_8", "step_B_share_of_8_sharded", "same_texts", "synchronisations"]
    parts += ["evaluation", "checkpoint", "rollouts", "out_of_memory", "token_budget"]
    file = tmp_path / "gpu.json"
    done = forked(
        "benchmarks/gpu.py", "--tiny", "--json", file, "--parts", *parts, env=os.environ | {"TMPDIR": str(tmp_path)}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())
    assert list(found) == parts and "| step_B_share_of_8_sharded |" in done.stdout
    assert found["same_texts"]["equal"] == found["same_texts"]["texts"] == 8
    assert found["step_B_share_of_8_sharded"]["wrapped"] == "FSDPSpeechModel"
    assert found["kernels"]["fused functions"] == "right"
