"""What people mistype at the start gets one sentence with a remedy, at once, and Ctrl-C one line."""

import io
import os
import signal
import subprocess
import sys
import time

import huggingface_hub
import pytest
from conftest import DEMO, ROOT

from evaluate_hebrew_asr import parse
from hebrew_asr.console import Bar
from hebrew_asr.errors import InputError
from hebrew_asr.model.loading import load_processor
from hebrew_asr.names import ask_the_hub, check_name
from hebrew_asr.training.run_folder import knows_its_data, note_others, what_resume_takes


def test_a_path_that_is_not_there_is_no_id_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo" / "tuned").mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: pytest.fail("the Hub was asked"))
    with pytest.raises(InputError, match="demo/tunde: no such folder or file; did you mean demo/tuned"):
        load_processor("demo/tunde")
    for name in ("./model", "/tmp/nothere", "a/b/c"):
        with pytest.raises(InputError, match="no such folder or file"):
            load_processor(name)


def test_an_id_while_the_hub_cannot_be_reached_is_refused_at_once(monkeypatch):
    def no_network(*_, **__):
        raise ConnectionError("name or service not known")

    ask_the_hub.cache_clear()
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", no_network)
    for kind in ("model", "dataset"):
        with pytest.raises(InputError, match=f"no such folder, no such {kind} in the cache .* cannot be reached"):
            check_name("OWNER/NAME", kind)
    ask_the_hub.cache_clear()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("eval_d1", "did you mean eval-d1"),
        ("data/calls", '{"name": "calls", "path": "data/calls"}'),
        ('{"name": "x", "path": "y", "splitt": "test"}', "there is no 'splitt' (did you mean split?)"),
        ('{"path": "y"}', "it needs name"),
        ('{"name": "x", "path": "y"', "Expecting ',' delimiter"),
    ],
)
def test_a_wrong_set_says_what_a_set_is(text, said):
    with pytest.raises(InputError) as problem:
        parse(["--model", "x", "--sets", text])
    assert said in str(problem.value)


def test_resume_says_what_it_takes(tmp_path):
    assert "there is no such folder; it takes auto, never, hub, or a checkpoint" in what_resume_takes(tmp_path / "no")
    (tmp_path / "checkpoints" / "step-00000007").mkdir(parents=True)
    assert what_resume_takes(tmp_path).endswith("checkpoints/step-00000007")
    assert what_resume_takes(DEMO / "tuned").startswith("; it takes auto")


def test_a_folder_with_other_files_is_noted(tmp_path, capsys):
    note_others(tmp_path / "new")
    note_others(tmp_path)
    assert not capsys.readouterr().err
    (tmp_path / "thesis.tex").touch()
    note_others(tmp_path)
    assert "holds other files already (thesis.tex)" in capsys.readouterr().err
    (tmp_path / "config.yaml").touch()
    note_others(tmp_path)
    assert not capsys.readouterr().err


def test_a_command_shows_a_sign_of_life_and_ctrl_c_is_one_line():
    """While it imports, which takes seconds."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "transcribe_hebrew_asr.py", "--help"],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr.read(7) == "loading"
    process.send_signal(signal.SIGINT)
    output, said = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "") and said.splitlines()[1:] == ["interrupted"]


@pytest.mark.parametrize("manifest", [None, "", "null", "[]", "{}"])
def test_a_newest_checkpoint_with_a_damaged_manifest_does_not_stop_the_start(tmp_path, manifest):
    assert knows_its_data(tmp_path / "checkpoints")
    for step, text in ((1, '{"run": {}}'), (2, manifest)):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        if text is not None:
            (folder / "manifest.json").write_text(text)
    assert not knows_its_data(tmp_path / "checkpoints"), "the one before it tells"


def test_a_progress_bars_clock_goes_on_inside_a_long_batch(monkeypatch):
    monkeypatch.setattr("hebrew_asr.console.TICK_SECONDS", 0.05)
    shown = io.StringIO()
    with Bar(total=2, file=shown) as bar:
        time.sleep(0.5)
    lines = shown.getvalue()
    time.sleep(0.2)
    assert lines.count("0/2") > 4 and shown.getvalue() == lines, "until it is closed"
    assert bar.closed.is_set()
