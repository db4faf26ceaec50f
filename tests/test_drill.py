"""The drill's short form: the first faults of its list, all survived, and a control that is not."""

import pytest
from forked import forked


@pytest.mark.slow
def test_faults_are_survived_and_the_control_is_not(tmp_path):
    done = forked("benchmarks/drill.py", "--faults", 8, "--work", tmp_path / "drill", timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 of 8 survived" in done.stdout
    again = forked("benchmarks/drill.py", "--faults", 8, "--work", tmp_path / "drill", timeout=100)
    assert again.returncode == 0 and "at step" not in again.stdout, "what is done is not done again"
