"""What people mistype at the start gets one sentence with a remedy, at once, and Ctrl-C one line."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow.parquet
import pytest
import soundfile
import yaml
from conftest import DEMO, ROOT

from evaluate_hebrew_asr import parse
from hebrew_asr import processes
from hebrew_asr.console import Bar
from hebrew_asr.data.audio import SAMPLE_RATE, decode_audio
from hebrew_asr.errors import InputError
from hebrew_asr.model.loading import load_processor
from hebrew_asr.names import ask_the_hub, check_name
from hebrew_asr.training.run_folder import knows_its_data, note_others, what_resume_takes
from train_hebrew_asr_enhanced import main
from train_round2_gradual import recipe


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
        [sys.executable, "transcribe_hebrew_asr.py", "nowhere.wav", "--model", "demo/tuned"],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr.read(7) == "loading"
    process.send_signal(signal.SIGINT)
    output, said = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, "") and said.splitlines()[1:] == ["interrupted"]


@pytest.mark.parametrize(
    ("command", "right", "wrong"),
    [
        ("train_round2_gradual", [], "num_epohcs"),
        ("train_hebrew_asr_enhanced", [], "num_epohcs"),
        ("evaluate_hebrew_asr", ["--model", "x"], "num_beans"),
        ("transcribe_hebrew_asr", ["x", "--model", "x"], "num_beans"),
    ],
)
def test_options_are_answered_before_torch_is_imported(tmp_path, command, right, wrong):
    for library in ("torch", "transformers", "datasets", "accelerate"):
        (tmp_path / f"{library}.py").write_text("raise ImportError(__name__ + ' was imported')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}

    def answer(*options: str) -> tuple[int, str, str]:
        line = [sys.executable, str(ROOT / f"{command}.py"), *options]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout, re.sub(r"^loading torch and transformers \.*\n", "", done.stderr)

    status, shown, said = answer("--help")
    assert (status, said) == (0, "") and "--config FILE" in shown
    meant = {"num_epohcs": "num_epochs", "num_beans": "num_beams"}[wrong]
    assert answer(*right, f"--{wrong}", "2") == (
        1,
        "",
        f"error: there is no option --{wrong} (did you mean --{meant}?)\n",
    )
    status, printed, said = answer(*right, f"--{meant}", "2", "--print_config")
    assert (status, said) == (0, "") and yaml.safe_load(printed)[meant] == 2
    if command.startswith("train"):
        assert answer("--hf_repo_id", "mine") == (
            1,
            "",
            "error: hf_repo_id must be owner/name, got 'mine' (from HF_REPO_ID?)\n",
        )
        assert answer("--plan", "--plan_devices", "7", "--tokens_per_micro_batch", "null")[2].startswith(
            "error: target_"
        )
    assert "was imported" in answer(*right)[2]  # so a command that goes on meets them


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


def flat(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> str:
    """A folder of twelve clips with their transcripts, changed."""
    (folder / "calls").mkdir()
    table = pyarrow.parquet.read_table(next((DEMO / "corpus").glob("*.parquet"))).slice(0, 12).to_pylist()
    for number, row in enumerate(table):
        waveform = change(decode_audio(row["audio"]))
        soundfile.write(folder / "calls" / f"{number}.wav", waveform, SAMPLE_RATE)
    lines = [f'{number}.wav,"{row["transcript"]}"' for number, row in enumerate(table)]
    (folder / "calls" / "metadata.csv").write_text("\n".join(["file_name,text", *lines]))
    return json.dumps([{"path": str(folder / "calls")}])


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--bf16 fp16", "--bf16 takes true or false or null, got fp16"),
        ("--fp16", "did you mean --bf16"),
        ("--learning_rate 1e-4", "the learning rates are in --stages"),
        ("--learning_rate_projector 1e-4", "the learning rates are in --stages"),
        ("--encoder_lr 1e-4", "the learning rates are in --stages"),
        ("--layerwise_lr_decay 0.9", "did you mean --layerwise_lr_decay_rate?"),
        ("--learning-rate 1e-4", "the learning rates are in --stages"),
        ("--max_grad_norm .inf", "must be a finite number, got inf"),
        ("--output_dir 2026-02-30 --num_epochs x", "takes a whole number, got x"),
        ("--lr_scheduler cosine", "did you mean --lr_scheduler_type?"),
        ("--gradient_accumulation_steps 8", "it follows from --target_effective_batch"),
        ("--max_grad_norm 0", "must be above 0, got 0"),
        ("--max_grad_norm -1", "must be above 0, got -1"),
        ("--num_time_masks -1", "at least 0, got -1"),
        ("--stall_timeout_minutes 0", "must be above 0, got 0"),
        ("--max_audio_length_seconds 0", "at least 0.1, got 0"),
        ("--min_audio_length_seconds 9 --max_audio_length_seconds 8", "must be less than max_audio_length_seconds (8)"),
        ("--max_broken_share 5", "0 to 1, got 5"),
        ("--plan_hours_of_audio 0", "must be above 0, got 0"),
        ("--waveform_augmentation.speeds [0]", "one or more factors between 0.5 and 2"),
        ("--waveform_augmentation.noise_folder nothere", "nothere: no such folder"),
        ('--text_rules {"quote_style":"x"}', "--text_rules.quote_style takes ascii, hebrew or keep, got x"),
        ("--epochs 3", "did you mean --num_epochs"),
        ("--gpus 2", "--nproc_per_node=N"),
        ("--device cuda", "CUDA_VISIBLE_DEVICES"),
        ("--num_epochs three", "takes a whole number, got three"),
        ("--num_epochs=", "takes a whole number"),
        ("--num_epochs", "takes one value, got none"),
        ("--num_epochs -1", "give 1 or more"),
        ("--save_total_limit 0", "at least 1, got 0"),
        ("--seed -1", "0 to 4294967295, got -1"),
        ("--weight_decay -1", "at least 0, got -1"),
        ("--dataloader_num_workers -1", "at least 0, got -1"),
        ("--num_logged_predictions -1", "at least 0, got -1"),
        ("--max_eval_utterances -3", "at least 0"),
        ("–-num_epochs 3", "two hyphens, not a dash"),
        ("num_epochs 3", "--tracker takes one value, got none num_epochs 3"),
        ("--tracker tensorboard", "takes wandb, trackio or none"),
        ("--config nothere.yaml", "nothere.yaml cannot be read"),
        ("--train_sources data/nothere", "data/nothere: no such folder"),
        ('--train_sources [{"pth":"x"}]', "did you mean path"),
        ("--language he", "language is 'he', must be a name like English, or None: Hebrew?"),
        ("--language Hebrw", "did you mean Hebrew?"),
        ("--resume runs/nothere", "it takes auto, never, hub, or a checkpoint"),
        ("--model_name_or_path RUN", "is the folder of a run: name its model, "),
        ("--model_name_or_path EMPTY", "is no checkpoint: it has no config.json; did you mean "),
        ("--model_name_or_path FILE", "is a file: name the folder of a checkpoint"),
        ("--model_name_or_path ./nothere", "./nothere: no such folder or file"),
        ("--output_dir FILE", "is a file: choose another --output_dir"),
        ("--hf_repo_id mymodel --skip_hf_upload false", "hf_repo_id must be owner/name"),
        ('--stages [{"name":"A","last_epoch":5}]', "Stage needs 'learning_rates'"),
        ('--stages [{"name":"A","last_epoch":5,"learning_rates":{"projectr":1e-3}}]', "projector"),
        ("--train_sources FLAT", "a folder of audio has its splits in subfolders"),
        ("--train_sources SILENT", "silent"),
        ("--train_sources CLIPPED", "clipped"),
    ],
)
def test_a_mistake_is_one_message_last_on_the_screen(tmp_path, monkeypatch, capfd, typed, said):
    (tmp_path / "data").mkdir()
    (tmp_path / "run" / "final_model").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "models" / "tuned").mkdir(parents=True)
    (tmp_path / "models" / "tuned" / "config.json").touch()
    sources = {
        "FLAT": lambda: flat(tmp_path, lambda waveform: waveform).replace("}]", ', "split": "test"}]'),
        "SILENT": lambda: flat(tmp_path, lambda waveform: 0 * waveform),
        "CLIPPED": lambda: flat(tmp_path, lambda waveform: np.clip(99 * waveform, -1, 1)),
        "EMPTY": lambda: str(tmp_path / "models"),
        "RUN": lambda: str(tmp_path / "run"),
        "FILE": lambda: str(tmp_path / "file"),
    }
    words = [sources[word]() if word in sources else word for word in typed.split()]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "use_console", lambda: None)
    monkeypatch.setattr(sys, "argv", ["train", "--demo", "--output_dir", "new", "--tracker", "none", *words])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    began = time.monotonic()
    with pytest.raises(SystemExit) as end:
        processes.launch(lambda arguments: main(recipe(arguments)))
    output, error = capfd.readouterr()
    problem = error[error.rindex("error: ") :].strip()
    assert end.value.code == 1 and said in problem and "\n" not in problem, error
    assert "Traceback" not in error + output
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("text", "skips"),
    [(text, True) for text in ("1", "true", "TRUE", "True ", "t", "yes", "y", "on")]
    + [(text, False) for text in ("", " ", "0", "false", "F", "no", "n", "off")],
)
def test_skip_hf_upload_takes_the_usual_words(monkeypatch, text, skips):
    monkeypatch.setenv("HF_REPO_ID", "OzLabs/asr")
    monkeypatch.setenv("SKIP_HF_UPLOAD", text)
    assert recipe([]).uploads is not skips
    for other in ("maybe", "2", "ja"):
        monkeypatch.setenv("SKIP_HF_UPLOAD", other)
        with pytest.raises(InputError, match=f"SKIP_HF_UPLOAD is '{other}': it takes 1 or true"):
            recipe([])


def test_options_win_over_the_environment_and_that_over_a_file(tmp_path, monkeypatch):
    file = tmp_path / "config.yaml"
    file.write_text("hf_repo_id: OzLabs/a\nskip_hf_upload: false\nwandb_project: a\nseed: 7\n")
    for name in ("HF_REPO_ID", "SKIP_HF_UPLOAD", "WANDB_PROJECT"):
        monkeypatch.setenv(name, "")
    config = recipe(["--config", str(file)])
    assert (config.hf_repo_id, config.uploads, config.wandb_project, config.seed) == ("OzLabs/a", True, "a", 7)
    for name, text in (("HF_REPO_ID", "OzLabs/b"), ("SKIP_HF_UPLOAD", "true"), ("WANDB_PROJECT", "b")):
        monkeypatch.setenv(name, text)
    config = recipe(["--config", str(file)])
    assert (config.hf_repo_id, config.uploads, config.wandb_project, config.seed) == ("OzLabs/b", False, "b", 7)
    config = recipe(["--hf_repo_id", "OzLabs/c", "--config", str(file), "--skip_hf_upload", "false"])
    assert (config.hf_repo_id, config.uploads, config.wandb_project, config.seed) == ("OzLabs/c", True, "b", 7)


LAUNCHER = """
import os, sys
from hebrew_asr.start import say_last
for rank in (1, 0):
    if not os.fork():
        os.environ |= {"TORCHELASTIC_RUN_ID": "run", "RANK": str(rank), "GROUP_RANK": sys.argv[1]}
        say_last("error: it is this")
        os._exit(1)
    os.wait()
os.write(2, b"the launcher's own report\\n")
"""


@pytest.mark.parametrize(("machine", "said"), [("0", ["error: it is this"]), ("1", [])])
def test_under_torchrun_the_first_process_that_fails_has_the_last_word(machine, said):
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, machine], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr.splitlines() == ["the launcher's own report", *said]
