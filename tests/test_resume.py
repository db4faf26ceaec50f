"""An interrupted run ends in the same bits as one that was not: weights, Adam, and every number that was logged."""

import dataclasses
import gc
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import transformers
import wandb
from conftest import DEMO, TOKEN, first_rows, small_config
from forked import forked
from hub_server import HubServer

from hebrew_asr.checkpoints import store
from hebrew_asr.command_line import parse_config
from hebrew_asr.data.sources import Source
from hebrew_asr.errors import InputError
from hebrew_asr.training.resuming import CheckpointEvents
from hebrew_asr.training.run_log import RunLog
from hebrew_asr.training.watch import STOP_SIGNALS
from train_hebrew_asr_enhanced import GradualUnfreezeTrainer, TrainingConfig, main

HERE = Path(__file__).parent
LAST = 12  # steps of small_config: two epochs of 6, a stage each
TIMES = (
    *("train/audio_seconds_per_second", "train/waiting_for_data"),
    *("train/gigaflops_per_second", "train/rank_spread"),
)
OWN = (*TIMES, "train/dead_workers")  # of each run
STATE = ("model.safetensors", "optimizer.safetensors", "state.json")


@pytest.fixture(scope="module")
def settings(tmp_path_factory, corpus, heldout):
    """Makes the settings of a run with all that is random switched on, dropout in the model included."""
    base = tmp_path_factory.mktemp("base") / "base"
    shutil.copytree(DEMO / "base", base)
    text = (base / "config.json").read_text()
    for name in ("dropout", "attention_dropout"):
        assert f'"{name}": 0.0' in text
        text = text.replace(f'"{name}": 0.0', f'"{name}": 0.1')
    (base / "config.json").write_text(text)

    def make(folder: Path, **changed) -> TrainingConfig:
        config = small_config(corpus, heldout, folder)
        config.model_name_or_path, config.use_waveform_augmentation = str(base), True
        config.logging_steps, config.eval_steps, config.save_steps, config.save_total_limit = 4, 5, 1, 100
        config.eval_batch_size = 1  # at most four at once: an evaluation has three batches
        return dataclasses.replace(config, **changed)

    return make


@pytest.fixture(scope="module")
def whole(tmp_path_factory, settings) -> Path:
    """A run that nothing interrupts, with a checkpoint of every step."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    main(settings(folder))
    return folder


@pytest.fixture(autouse=True)
def own_signals():
    """A process that was stopped ignores further signals: it is about to end, but this one is not."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def stopped(config: TrainingConfig) -> int:
    """The exit status of a run that a signal stops; the signals are as before, as in a new process."""
    before, status = {number: signal.getsignal(number) for number in STOP_SIGNALS}, None
    try:
        main(config)
    except SystemExit as end:
        status = end.code
    gc.collect()  # the frames of the run, with its lock
    for number, handler in before.items():
        signal.signal(number, handler)
    assert status is not None, "nothing stopped it"
    return status


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def rows(run: Path) -> list[dict]:
    """What was logged, without times, how far the uploads were, and the workers that died."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{n: value for n, value in line.items() if not n.startswith("hub/") and n not in OWN} for line in lines]


def newest(run: Path) -> Path:
    return store.names(run / "checkpoints")[0]


def assert_same(run: Path, reference: Path) -> None:
    for name in STATE:
        mine, other = newest(run) / name, newest(reference) / name
        if name == "state.json":
            mine, other = (json.loads(file.read_text(), parse_constant=pytest.fail) for file in (mine, other))
            for window in mine["windows"] + other["windows"]:
                del window["waited"], window["computed"]  # times
            assert mine | {"dead_workers": 0} == other
        else:
            assert mine.read_bytes() == other.read_bytes(), name
    assert rows(run) == rows(reference)
    mine, other = (folder / "final_model" / "model.safetensors" for folder in (run, reference))
    assert mine.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("step", [1, 5, 7, 11])
def test_from_any_step_a_run_ends_in_the_same_bits(whole, settings, tmp_path, step, capsys):
    workers = 1 if step == 5 else 0
    config = settings(tmp_path / "run", resume=str(checkpoint(whole, step)), dataloader_num_workers=workers)
    main(config)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("resumed"))
    assert f"resumed at step {step} of 12, stage {'B' if step < 6 else 'A'}" in line
    assert_same(tmp_path / "run", whole)


def test_a_checkpoint_loads_as_a_model(whole):
    folder = checkpoint(whole, 7)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["step"], manifest["processes"], manifest["stage"]) == (7, 1, "A")
    assert manifest["fingerprint"] == store.fingerprint(TrainingConfig(**manifest["settings"]).identity())
    assert manifest["files"].keys() | {"manifest.json"} == {path.name for path in folder.iterdir()}
    model = transformers.Qwen3ASRForConditionalGeneration.from_pretrained(folder)
    transformers.AutoProcessor.from_pretrained(folder)
    saved = dict(store.verify(folder).tensors("model.safetensors"))
    assert all(torch.equal(parameter, saved[name]) for name, parameter in model.named_parameters())


def interrupt(monkeypatch, step: int, with_what) -> None:
    """Has the next run call something when it is about to do the step after `step`, once."""
    on_step_begin = CheckpointEvents.on_step_begin

    def first(self, args, state, control, **kwargs):
        if state.global_step == step:
            monkeypatch.setattr(CheckpointEvents, "on_step_begin", on_step_begin)
            self.trainer.writer.wait()
            with_what()
        on_step_begin(self, args, state, control, **kwargs)

    monkeypatch.setattr(CheckpointEvents, "on_step_begin", first)


def fail() -> None:
    raise RuntimeError("the machine is gone")


def test_the_same_command_goes_on_and_a_finished_run_does_nothing(whole, settings, tmp_path, monkeypatch, capsys):
    config = settings(tmp_path / "run", save_steps=3, save_total_limit=1)
    interrupt(monkeypatch, 8, fail)
    with pytest.raises(RuntimeError):
        main(config)
    assert store.read_status(tmp_path / "run")["why"] == "the machine is gone"
    assert rows(tmp_path / "run")[-1]["step"] == 8, "two steps are logged that the checkpoint does not have"
    main(dataclasses.replace(config, batch_size=config.batch_size, num_logged_predictions=1))
    assert "resumed at step 6 of 12, stage A, epoch 1.00" in capsys.readouterr().out
    assert_same(tmp_path / "run", whole)
    status = store.read_status(tmp_path / "run")
    assert status["state"] == "finished" and status["step"] == 12
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    main(config)
    assert "is finished" in capsys.readouterr().out
    changed = {p.name for p in (tmp_path / "run").rglob("*") if p.stat().st_mtime_ns != before.get(p)}
    assert changed <= {"run", "config.yaml"}


def test_a_signal_saves_once_and_ends_with_a_status(whole, settings, tmp_path, monkeypatch, capsys):
    config = settings(tmp_path / "run", save_steps=100)
    interrupt(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert stopped(config) == 128 + signal.SIGTERM
    status = store.read_status(tmp_path / "run")
    assert (status["state"], status["why"]) == ("preempted", "SIGTERM")
    assert status["step"] == 3 and status["checkpoint"] == "step-00000003"
    assert "stopped at step 3 (SIGTERM), checkpoint step-00000003" in capsys.readouterr().out
    assert [path.name for path in store.names(tmp_path / "run" / "checkpoints")] == ["step-00000003"]
    main(config)
    assert_same(tmp_path / "run", whole)


def test_a_run_begun_at_a_checkpoint_of_another_goes_on_from_its_own(whole, settings, tmp_path, monkeypatch, capsys):
    """By the same command, and by the settings that it kept; to go back to one of its own is another command."""
    run = tmp_path / "run"
    config = settings(run, resume=str(checkpoint(whole, 8)), save_steps=100)
    interrupt(monkeypatch, 9, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert stopped(config) == 128 + signal.SIGTERM
    assert "checkpoint step-00000010; the same command goes on from there" in capsys.readouterr().out
    interrupt(monkeypatch, 10, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert stopped(config) == 128 + signal.SIGTERM
    assert "goes on from its own step-00000010\n" in capsys.readouterr().out
    kept = parse_config(["--config", str(run / "config.yaml")], config)
    assert kept == dataclasses.replace(config, resume="auto")
    back = dataclasses.replace(config, resume=str(checkpoint(run, 10)))
    interrupt(monkeypatch, 10, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert stopped(back) == 128 + signal.SIGTERM
    out = capsys.readouterr().out
    assert "resumed at step 10 of 12" in out
    assert f"the same command with --resume auto --output_dir {run} goes on from there" in out
    main(kept)
    assert_same(run, whole)


def test_a_new_run_says_which_command_goes_on_with_it(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = dataclasses.replace(settings(tmp_path), output_dir=None, resume="never", save_steps=100, eval_steps=100)
    interrupt(monkeypatch, 0, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert stopped(config) == 128 + signal.SIGTERM
    (run,) = Path("runs").iterdir()
    assert f"; the same command with --resume auto --output_dir {run} goes on from" in capsys.readouterr().out
    kept = parse_config(["--config", str(run / "config.yaml")], config)
    assert (kept.resume, kept.output_dir) == ("auto", str(run))


@pytest.mark.parametrize("step", [5, 12])
def test_a_signal_in_an_evaluation_cuts_it_off_and_it_is_done_on_resuming(whole, settings, tmp_path, monkeypatch, step):
    config = settings(tmp_path / "run", save_steps=100)
    prediction_step = GradualUnfreezeTrainer.prediction_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == step:
            monkeypatch.setattr(GradualUnfreezeTrainer, "prediction_step", prediction_step)
            os.kill(os.getpid(), signal.SIGINT)
        return prediction_step(self, *args, **kwargs)

    monkeypatch.setattr(GradualUnfreezeTrainer, "prediction_step", interrupted)
    assert stopped(config) == 128 + signal.SIGINT
    assert json.loads((newest(tmp_path / "run") / "state.json").read_text())["evaluation_pending"]
    assert not [row for row in rows(tmp_path / "run") if row["step"] == step and "eval/wer" in row]
    main(config)
    assert_same(tmp_path / "run", whole)


def broken_steps(monkeypatch, is_broken) -> None:
    """Turns the gradients of some steps to NaN, as one broken utterance would."""
    clip = GradualUnfreezeTrainer._clip_grad_norm

    def break_some(self, model):
        if is_broken(self, self.state.global_step + 1):
            self._tr_loss += float("nan")
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(float("nan"))
        return clip(self, model)

    monkeypatch.setattr(GradualUnfreezeTrainer, "_clip_grad_norm", break_some)


def test_a_step_without_a_finite_gradient_is_skipped_and_its_utterances_named(whole, settings, tmp_path, monkeypatch):
    broken_steps(monkeypatch, lambda trainer, step: step == 3)
    config = settings(tmp_path / "run", save_steps=1, max_steps=4)
    config.stages = config.stages[:1]
    main(config)
    two, three = (
        dict(store.verify(checkpoint(tmp_path / "run", step)).tensors("model.safetensors")) for step in (2, 3)
    )
    assert all(torch.equal(two[name], three[name]) for name in two)
    lines = (tmp_path / "run" / "skipped-steps.txt").read_text().splitlines()
    assert len(lines) == 8 and all(line.startswith("step 3: ") for line in lines)
    (logged,) = [row for row in rows(tmp_path / "run") if "train/loss" in row]
    losses = [row["train/loss"] for row in rows(whole) if "train/loss" in row]
    assert logged["train/loss"] is not None and abs(logged["train/loss"] - losses[0]) < 1


def test_after_several_broken_steps_the_run_goes_back_and_takes_another_order(settings, tmp_path, monkeypatch, capsys):
    broken_steps(monkeypatch, lambda trainer, step: trainer.order == 0 and step in (8, 9, 10))
    config = settings(tmp_path / "run", save_steps=7)
    main(config)
    out = capsys.readouterr().out
    assert "3 steps in a row up to step 10 had no finite gradient" in out and "back to step 7, with data order 1" in out
    assert json.loads((newest(tmp_path / "run") / "state.json").read_text())["order"] == 1
    steps = [row["step"] for row in rows(tmp_path / "run") if "train/loss" in row]
    assert steps == sorted(set(steps)) and steps[-1] == LAST


def test_a_run_whose_steps_stay_broken_gives_up(settings, tmp_path, monkeypatch):
    broken_steps(monkeypatch, lambda trainer, step: step > 3)
    with pytest.raises(InputError, match=r"going back 2 times did not help.*skipped-steps\.txt"):
        main(settings(tmp_path / "run", save_steps=1))
    assert store.read_status(tmp_path / "run")["state"] == "failed"


def kill_a_worker() -> None:
    multiprocessing.active_children()[0].kill()


def test_a_killed_worker_of_the_loader_is_counted_said_and_survived(whole, settings, tmp_path, monkeypatch, capfd):
    prediction_step, killed = GradualUnfreezeTrainer.prediction_step, []

    def killing(self, *args, **kwargs):
        if self.state.global_step == 5 and not killed:
            killed.append(kill_a_worker())
        return prediction_step(self, *args, **kwargs)

    monkeypatch.setattr(GradualUnfreezeTrainer, "prediction_step", killing)
    interrupt(monkeypatch, 7, kill_a_worker)
    config = settings(tmp_path / "run", dataloader_num_workers=1, resume=str(checkpoint(whole, 2)))
    main(config)
    assert_same(tmp_path / "run", whole)
    err = capfd.readouterr().err
    assert err.count("DataLoader worker (pid") == 2 and "new workers go on from the batch that is due" in err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["train/dead_workers"] for line in lines if line["step"] in (4, 8, 12) and "train/loss" in line] == [
        0,
        1,
        2,
    ]
    assert json.loads((newest(tmp_path / "run") / "state.json").read_text())["dead_workers"] == 2


# Over the Hub


def uploading(config: TrainingConfig) -> TrainingConfig:
    return dataclasses.replace(config, hf_repo_id="OzLabs/asr", skip_hf_upload=False)


def test_a_run_whose_folder_is_gone_goes_on_from_the_hub_in_the_same_bits(
    whole, settings, hub, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    config = uploading(settings(run, save_steps=3, save_total_limit=1))
    interrupt(monkeypatch, 8, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert stopped(config) == 128 + signal.SIGTERM
    status = store.read_status(run)
    assert (status["state"], status["on_hub"], status["hub"]["lag_steps"]) == ("preempted", True, 0)
    assert "checkpoint step-00000009 is on the Hub" in capsys.readouterr().out.splitlines()
    shutil.rmtree(run)
    with pytest.raises(InputError, match="holds step-00000009 of the run run"):
        main(config)
    assert not store.names(run / "checkpoints")
    main(dataclasses.replace(config, resume="hub"))
    out = capsys.readouterr().out
    assert "checkpoint step-00000009 from OzLabs/asr: " in out and "resumed at step 9 of 12, stage A" in out
    assert_same(run, whole)
    files = hub.repos["OzLabs/asr"]["run"]
    assert {path.name: path.read_bytes() for path in (run / "final_model").iterdir()}.items() <= files.items()
    assert TOKEN not in out
    assert not [p for p in run.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]
    assert not [request for request in hub.requests if TOKEN.encode() in request.body]


def test_a_run_that_loses_the_network_goes_on_and_is_uploaded_by_the_same_command(
    whole, settings, hub, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    config = uploading(settings(run, save_steps=3))
    monkeypatch.setattr("hebrew_asr.checkpoints.hub.FINAL_ATTEMPTS", 2)
    interrupt(monkeypatch, 4, lambda: hub.fail("*", "", hang_up=True, times=10**9))
    with pytest.raises(InputError, match=r"the upload to OzLabs/asr failed: .*\. Is there a network"):
        main(config)
    assert_same(run, whole)
    status = store.read_status(run)
    assert (status["state"], status["uploaded"]) == ("finished", None)
    assert status["hub"]["failures"] > 0 and status["hub"]["problem"]
    assert capsys.readouterr().out.count("training goes on, the next attempt") == 1
    hub.faults.clear()
    main(config)
    assert "is finished" in (out := capsys.readouterr().out) and "uploaded: " in out
    assert "/commit/" in store.read_status(run)["uploaded"]


def test_a_hub_that_does_not_answer_does_not_hold_up_a_run_that_must_stop(settings, hub, tmp_path, monkeypatch, capsys):
    config = uploading(settings(tmp_path / "run", save_steps=100, preemption_grace_seconds=5))

    def stop() -> None:
        hub.fail("*", "", delay_s=60, times=10**9)
        os.kill(os.getpid(), signal.SIGTERM)

    interrupt(monkeypatch, 2, stop)
    started = time.monotonic()
    assert stopped(config) == 128 + signal.SIGTERM
    assert time.monotonic() - started < 60
    assert store.read_status(tmp_path / "run")["on_hub"] is False
    assert "checkpoint step-00000003 is not on the Hub, which has none" in capsys.readouterr().out


# What is refused


def test_settings_that_mean_another_run_are_listed_and_refused(whole, settings):
    config = settings(whole, seed=7, use_specaugment=False)
    config.stages[1].learning_rates["audio_top"] = 1e-5
    with pytest.raises(InputError) as refusal:
        main(config)
    for line in ("seed: 42 → 7", "use_specaugment: True → False", "stages.1.learning_rates.audio_top: 0.0006 → 1e-05"):
        assert line in str(refusal.value)
    assert "choose another --output_dir" in str(refusal.value)


def test_a_checkpoint_of_other_data_or_settings_is_refused(whole, settings, tmp_path):
    other = Source(str(first_rows("corpus", 20, tmp_path / "other_corpus")))
    config = settings(tmp_path / "run", resume=str(checkpoint(whole, 3)), train_sources=[other])
    with pytest.raises(InputError, match=r"with other data:\n  training data: of 41 utterances 2\d are gone"):
        main(config)
    with pytest.raises(InputError, match=r"no valid checkpoint: it has no manifest"):
        main(settings(tmp_path / "other", resume=str(tmp_path)))


def test_a_checkpoint_of_another_model_size_is_refused(whole, settings, tmp_path):
    shutil.copytree(checkpoint(whole, 2), tmp_path / "step-00000002")
    found = store.verify(checkpoint(whole, 2))
    weights = dict(found.tensors("model.safetensors"))
    weights["model.multi_modal_projector.linear_1.weight"] = torch.zeros(2, 3)
    other = store.write(tmp_path / "other", 2, {"model.safetensors": weights}, {}, found.facts)
    with pytest.raises(InputError, match=r"is not of .*base: .*linear_1\.weight\.0: 2 → "):
        main(settings(tmp_path / "run", resume=str(other.folder)))


def test_a_folder_that_cannot_be_written_to_is_one_message(settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write to .*/file/run: Not a directory"):
        main(settings(tmp_path / "file" / "run"))


def test_processes_whose_weights_differ_are_named(whole, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "hebrew_asr.training.watch.Watch.differing_ranks", lambda self, number: [1, 3] if self.where == "step 4" else []
    )
    with pytest.raises(InputError, match=r"at step 4 the weights of process 1, 3 differ from those of process 0"):
        main(settings(tmp_path / "run", check_ranks_steps=2, save_steps=100))


# Two processes


def two_processes(config: TrainingConfig, step: int, how: str, env: dict[str, str] | None = None):
    """`step` is where it is stopped, `how` by which signal."""
    file = Path(f"{config.output_dir}.json")
    file.write_text(json.dumps(dataclasses.asdict(config)))
    return forked("tests/run_and_stop.py", file, step, how, processes=2, env=env)


@pytest.mark.slow
def test_a_run_of_two_processes_whose_folder_is_gone_goes_on_from_the_hub_in_the_same_bits(settings, tmp_path):
    config = settings(tmp_path / "whole", save_steps=3, save_total_limit=1, batch_size=2)
    assert two_processes(config, -1, "TERM").returncode == 0
    config = uploading(dataclasses.replace(config, output_dir=str(tmp_path / "run")))
    with HubServer(users={TOKEN: ("OzLabs", "write")}) as hub:
        env = hub.env(home=tmp_path / "home", token=TOKEN)
        done = two_processes(config, 8, "TERM", env)
        assert done.returncode == 1 and "checkpoint step-00000009 is on the Hub" in done.stdout, done.stdout
        assert store.read_status(tmp_path / "run")["on_hub"] is True
        shutil.rmtree(tmp_path / "run")
        done = two_processes(dataclasses.replace(config, resume="hub"), -1, "TERM", env)
        assert done.returncode == 0 and done.stdout.count("resumed at step 9 of 12, stage A") == 1, done.stderr
        assert TOKEN not in done.stdout + done.stderr and done.stdout.count("uploaded: ") == 1
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_preempted_run_of_two_processes_ends_in_the_same_bits(settings, tmp_path):
    def run(name: str, step: int, how: str) -> subprocess.CompletedProcess:
        return two_processes(settings(tmp_path / name, save_steps=100, batch_size=2), step, how)

    assert run("whole", -1, "TERM").returncode == 0
    done = run("broken", 8, "TERM")
    assert done.returncode == 1 and "stopped at step 9 (SIGTERM)" in done.stdout, done.stderr
    assert store.read_status(tmp_path / "broken")["state"] == "preempted"
    done = run("broken", -1, "TERM")
    assert done.returncode == 0 and "resumed at step 9 of 12, stage A" in done.stdout, done.stderr
    assert_same(tmp_path / "broken", tmp_path / "whole")


def losses(run: Path) -> list[float]:
    return [row["train/loss"] for row in rows(run) if "train/loss" in row]


def test_another_number_of_processes_goes_on_with_the_same_steps_in_the_same_order(settings, tmp_path):
    """One process, then two, then one again; without dropout, which each process draws for itself."""

    def of(name: str, **changed) -> TrainingConfig:
        config = settings(tmp_path / name, logging_steps=1, eval_steps=100, **changed)
        return dataclasses.replace(config, model_name_or_path=str(DEMO / "base"))

    main(of("whole"))
    begun = of("resumed", resume=str(checkpoint(tmp_path / "whole", 3)))
    done = two_processes(begun, 8, "TERM")
    assert "resumed at step 3 of 12" in done.stdout and "stopped at step 9 (SIGTERM)" in done.stdout, done.stderr
    assert store.verify(newest(tmp_path / "resumed")).facts["processes"] == 2
    main(dataclasses.replace(begun, resume="auto"))
    assert store.verify(newest(tmp_path / "resumed")).facts["processes"] == 1
    expected = losses(tmp_path / "whole")
    assert len(expected) == LAST and losses(tmp_path / "resumed") == pytest.approx(expected, rel=1e-5)
    assert min(abs(a - b) for a, b in itertools.pairwise(expected)) > 1e-3, "other utterances would be seen"


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_the_dashboard_goes_on_in_the_same_run(tmp_path, tracker):
    before = RunLog(tmp_path, rank=0)
    before.start_tracker(tracker, "a-project", "a-name", {}, [])
    before.log({"train/loss": 1.0}, 1)
    before.finish()
    after = RunLog(tmp_path, rank=0)
    after.tracker_id = json.loads(json.dumps(before.tracker_id))  # as it comes from a checkpoint
    after.start_tracker(tracker, "a-project", "another-name", {}, [])
    after.finish()
    assert after.tracker_id == before.tracker_id and before.tracker_id[0] == tracker
    other = RunLog(tmp_path, rank=0)
    other.start_tracker(tracker, "a-project", "a-third-name", {}, [])
    other.finish()
    assert other.tracker_id != before.tracker_id


@pytest.mark.parametrize("fails", ["login", "init"])
def test_a_run_goes_on_offline_when_wandb_cannot_be_reached(tmp_path, monkeypatch, capsys, fails):
    """What wandb 0.31 raises where nothing answers: from its login after 25 s, from its init after 90."""
    error = {"login": wandb.errors.AuthenticationError, "init": wandb.errors.CommError}[fails]
    init = wandb.init

    def out_of_reach(**options):
        if options.get("mode") == "offline":
            return init(**options)
        raise error("Timed out while retrying\nConsider increasing the init_timeout setting")

    monkeypatch.setattr(wandb, "init", out_of_reach)
    monkeypatch.setattr(wandb, "login", out_of_reach if fails == "login" else lambda prompt: True)
    log = RunLog(tmp_path, rank=0)
    log.start_tracker("wandb", "a-project", "a-name", {}, [])
    log.log({"train/loss": 1.0}, 1)
    log.finish()
    assert "warning: W&B cannot be used (Timed out while retrying); the run is tracked off" in capsys.readouterr().err
    assert "wandb sync" in log.dashboard() and list(tmp_path.glob("wandb/offline-run-*"))


def test_what_was_logged_after_the_checkpoint_is_forgotten(tmp_path):
    log = RunLog(tmp_path, rank=0)
    for step in (1, 2, 3):
        log.log({"train/loss": float(step)}, step)
        log.note_dropped(["damaged: a.wav"], step)
    log.go_back(log.rows[:2], 2)
    log.log({"train/loss": 30.0}, 3)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["train/loss"]) for line in lines] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ] and log.rows == lines
    assert (tmp_path / "dropped-0.txt").read_text().splitlines() == ["step 1: damaged: a.wav", "step 2: damaged: a.wav"]
