"""Faults that a run meets on other people's machines: nothing is lost, nothing wrong is called right, all is said."""

import contextlib
import dataclasses
import errno
import gc
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pyarrow.parquet
import pytest
import torch
from accelerate import skip_first_batches
from conftest import ROOT, first_rows, small_config
from forked import forked
from tqdm import tqdm

from hebrew_asr.checkpoints import hub as hub_upload
from hebrew_asr.checkpoints import store
from hebrew_asr.checkpoints.final import damage_of
from hebrew_asr.checkpoints.hub import upload
from hebrew_asr.checkpoints.store import UnreadableCheckpoint
from hebrew_asr.command_line import parse_config
from hebrew_asr.console import Console
from hebrew_asr.data import utterances
from hebrew_asr.data.audio import AudioError, decode_audio
from hebrew_asr.data.identity import identity_of, with_lost
from hebrew_asr.data.rows import load_rows
from hebrew_asr.data.shared_memory import advice, needed, sent
from hebrew_asr.data.sources import Source
from hebrew_asr.data.utterances import SpeechDataset
from hebrew_asr.errors import InputError
from hebrew_asr.evaluation.settings import Decoding
from hebrew_asr.evaluation.transcription import key, load_speech_model
from hebrew_asr.files import Appended
from hebrew_asr.model.loading import load_processor
from hebrew_asr.processes import launch
from hebrew_asr.training.feed import speech_loader
from hebrew_asr.training.final_model import write_final_model
from hebrew_asr.training.resuming import ResumableTrainer
from hebrew_asr.training.run_folder import check_same_run, open_run_folder
from hebrew_asr.training.run_log import RunLog
from hebrew_asr.training.watch import Batches, die_of_a_lost_batch, take_lock
from train_hebrew_asr_enhanced import TrainingConfig, main

FACTS = {"wer": None, "settings": {}}


def save(folder, step, wer=None, value=1.0):
    tensors = {"model.safetensors": {"a": torch.full((10,), value)}}
    return store.write(folder, step, tensors, {"state.json": b"{}"}, {**FACTS, "wer": wer})


def unreadable(monkeypatch, name: str, number: int) -> None:
    """Lets nobody read the files whose path holds `name`, with an errno that root meets too."""
    read_text, sha256 = store.Path.read_text, store.sha256

    def refuse(path):
        if name in str(path):
            raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(store.Path, "read_text", lambda self, *a, **k: refuse(self) or read_text(self, *a, **k))
    monkeypatch.setattr(store, "sha256", lambda path: refuse(path) or sha256(path))


# ---- A checkpoint unreadable
@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ETIMEDOUT])
@pytest.mark.parametrize("name", ["step-00000002/manifest.json", "step-00000002/model.safetensors"])
def test_a_checkpoint_that_cannot_be_read_stops_the_start_and_nothing_is_moved(tmp_path, monkeypatch, number, name):
    save(tmp_path, 1), save(tmp_path, 2)
    with monkeypatch.context() as patched:
        unreadable(patched, name, number)
        with pytest.raises(UnreadableCheckpoint, match=r"step-00000002 cannot be read \(.*nothing was changed"):
            store.newest_valid(tmp_path, print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    assert store.newest_valid(tmp_path, print).step == 2


def test_a_folder_of_checkpoints_that_cannot_be_read_is_not_an_empty_one(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    save(tmp_path, 1)
    monkeypatch.setattr(store.Path, "iterdir", refuse)
    with pytest.raises(UnreadableCheckpoint, match="Permission denied"):
        store.newest_valid(tmp_path, print)


def test_the_best_one_is_not_pruned_while_its_manifest_cannot_be_read(tmp_path, monkeypatch):
    for step, wer in ((1, 5.0), (2, 9.0), (3, 9.0)):
        save(tmp_path, step, wer)
    said = []
    with monkeypatch.context() as patched:
        unreadable(patched, "step-00000001/manifest.json", errno.EIO)
        store.prune(tmp_path, 1, said.append)
    assert len(store.names(tmp_path)) == 3 and "no older checkpoint is removed" in said[0]
    store.prune(tmp_path, 1, said.append)
    assert [path.name for path in store.names(tmp_path)] == ["step-00000003", "step-00000001"]


def test_files_have_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        folder = save(tmp_path, 1).folder
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}


# ---- Another checkpoint
def test_a_copy_of_another_runs_checkpoint_that_fails_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    mine, other = tmp_path / "mine", tmp_path / "other"
    save(mine, 5), save(mine, 10)
    found = save(other, 5, value=2.0)
    with monkeypatch.context() as patched:
        patched.setattr(store, "flush", lambda path: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        with pytest.raises(InputError, match="cannot be copied"):
            store.settle(found, mine)
    assert sorted(path.name for path in mine.iterdir()) == ["step-00000005", "step-00000010"]
    settled = store.settle(found, mine)
    assert [path.name for path in store.names(mine)] == ["step-00000005"]
    assert dict(settled.tensors("model.safetensors"))["a"][0] == 2.0


# ---- Folders
@pytest.mark.parametrize("name", ["final_model", "final_model.unfinished", "moving_average", "checkpoints"])
def test_a_folder_that_is_of_no_run_is_refused_by_name(config, tmp_path, name):
    run = tmp_path / "run"
    (run / name).mkdir(parents=True)
    check_same_run(config, run)
    (run / name / "theirs.bin").write_text("x")
    with pytest.raises(InputError, match=rf"run/{name} is there, and is of no run"):
        check_same_run(config, run)
    (run / "config.yaml").write_text(json.dumps(dataclasses.asdict(config)))  # of a run that left no checkpoint
    with pytest.raises(InputError, match=name) if name != "checkpoints" else contextlib.nullcontext():
        check_same_run(config, run)


@pytest.mark.parametrize("text", ["my: project", "{}", "[]", "null", "", '{"seed": 41, "model_name_or_path": "x"}'])
@pytest.mark.parametrize("name", ["config.yaml", "status.json", "metrics.jsonl", "curves.png"])
def test_a_file_that_is_of_no_run_is_refused_by_name(config, tmp_path, name, text):
    (tmp_path / "notes.txt").write_text(text)
    check_same_run(config, tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=rf"{name} is there, and is of no run"):
        check_same_run(config, tmp_path)


@pytest.mark.parametrize("only_reads", ["inspect_data", "prepare"])
def test_to_read_the_corpora_changes_no_settings_of_a_run(config, tmp_path, only_reads):
    """Also while it trains, and before it has a checkpoint."""
    state, file = accelerate.PartialState(cpu=True), tmp_path / "run" / "config.yaml"
    reads = dataclasses.replace(config, max_audio_length_seconds=20.0, **{only_reads: True})
    _, lock = open_run_folder(reads, state)
    kept = json.loads(file.read_text())
    assert kept["max_audio_length_seconds"] == 20 and not kept[only_reads], "a new folder has its settings"
    if lock:
        lock.close()
    open_run_folder(dataclasses.replace(config, accept_changed_data=True), state)[1].close()
    before = file.read_text()
    assert parse_config(["--config", str(file)], TrainingConfig()) == config
    open_run_folder(reads, state)
    assert file.read_text() == before


def test_a_run_that_left_no_checkpoint_begins_anew_with_other_settings(config, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(json.dumps(dataclasses.asdict(dataclasses.replace(config, seed=41))))
    (run / "status.json").write_text("{}")
    for resume in ("auto", "never"):
        config.resume = resume
        check_same_run(config, run)
    save(run / "checkpoints", 2)
    with pytest.raises(InputError, match="holds a run already"):
        check_same_run(config, run)
    config.resume = "auto"
    with pytest.raises(InputError, match=r"with other settings:\n  seed: 41 → 42"):
        check_same_run(config, run)


@pytest.mark.parametrize("text", ["[]", "null", "7", '"running"', "{}"])
def test_a_status_that_is_none_is_unknown(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    assert store.read_status(tmp_path) == {"state": "unknown"}
    store.update_status(tmp_path, step=3)
    assert json.loads((tmp_path / "status.json").read_text())["step"] == 3


# ---- A full disk
def test_a_log_that_the_disk_does_not_take_is_kept_said_once_counted_and_written_when_there_is_room(tmp_path, capsys):
    log = RunLog(tmp_path, rank=0)
    log.log({"train/loss": 3.0}, 1)
    (tmp_path / "metrics.jsonl").rename(tmp_path / "kept")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    for step in (2, 3, 4):
        log.log({"train/loss": 3.0}, step)
    assert log.failed_writes == 3
    assert capsys.readouterr().err.count("metrics.jsonl cannot be written ([Errno 28]") == 1
    (tmp_path / "kept").replace(tmp_path / "metrics.jsonl")
    log.finish()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


def test_a_torn_write_is_taken_back_and_what_is_kept_has_a_bound(tmp_path, monkeypatch):
    file = Appended(tmp_path / "log")
    assert file.write("one\n") is None
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        assert isinstance(file.write("two\n" * 5), OSError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert (tmp_path / "log").read_text() == "one\n"
    assert file.write("") is None and (tmp_path / "log").read_text() == "one\n" + "two\n" * 5
    monkeypatch.setattr(Appended, "MOST", 10)
    full = Appended(Path("/dev/full"))
    full.write("x" * 25)
    assert (full.waiting, full.lost) == ("x" * 10, 15)


def test_the_status_never_says_running_after_the_end_on_a_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    store.write_status(tmp_path, "running", pid=1)
    monkeypatch.setattr(store, "put", full)
    store.write_status(tmp_path, "finished", step=2)
    assert store.read_status(tmp_path)["state"] == "finished"
    store.update_status(tmp_path, uploaded="there")
    monkeypatch.setattr("builtins.open", full)
    store.write_status(tmp_path, "failed")
    monkeypatch.undo()
    assert not (tmp_path / "status.json").exists()


def console_on(path, encoding="utf-8") -> Console:
    return Console(open(path, "w", encoding=encoding))


def test_a_full_console_keeps_its_newest_text_and_writes_it_when_there_is_room(tmp_path, monkeypatch):
    monkeypatch.setattr("hebrew_asr.console.MOST_BYTES", 6)
    console = console_on("/dev/full")
    for text in ("one\n", "two\n", "three\n"):
        tqdm.write(text, file=console, end="")
    tqdm(range(3), file=console).update()
    assert console.lost > 8
    with open(tmp_path / "room", "w") as room:
        os.dup2(room.fileno(), console.descriptor)
    console.write("four\n")
    assert re.fullmatch(
        r".{6}four\nwarning: \d+ bytes of the console's text could not be written\n",
        (tmp_path / "room").read_text(),
        re.DOTALL,
    )


def test_a_closed_pipe_and_a_narrow_encoding_do_not_end_a_command(tmp_path):
    code = "from hebrew_asr import console as c\nc.use_console()\nfor n in range(99999): print('שלום', n, flush=True)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "latin-1"}
    running = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=-1, stderr=-1)
    assert running.stdout.readline() == b"\\u05e9\\u05dc\\u05d5\\u05dd 0\n"
    running.stdout.close()
    assert running.wait(timeout=120) == 0 and running.stderr.read() == b""


def test_a_command_has_that_console(monkeypatch):
    used = []
    monkeypatch.setattr("hebrew_asr.processes.use_console", lambda: used.append(True))
    launch(lambda arguments: used.append(arguments))
    assert used == [True, sys.argv[1:]]


# ---- A model
def test_transcripts_are_named_by_the_weights_that_were_loaded(tmp_path, eval_rows):
    folder = shutil.copytree(ROOT / "demo" / "base", tmp_path / "model")
    model = load_speech_model(str(folder), Decoding(), torch.device("cpu"))
    named = key(model, Decoding(), eval_rows)
    weights, times = folder / "model.safetensors", (folder / "model.safetensors").stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)  # as averaging does, while sets are measured
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert key(model, Decoding(), eval_rows) == named
    again = load_speech_model(str(folder), Decoding(), torch.device("cpu"))
    assert key(again, Decoding(), eval_rows) != named


def test_a_checkpoint_that_brings_code_is_not_asked_about_and_runs_none(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    for name in ("processor_config.json", "config.json", "preprocessor_config.json"):
        folder = shutil.copytree(ROOT / "demo" / "base", tmp_path / name)
        for file in (folder / name, folder / "tokenizer_config.json"):
            settings = json.loads(file.read_text()) if file.exists() else {}
            settings["auto_map"] = {"AutoProcessor": "theirs.Theirs", "AutoConfig": "theirs.Theirs"}
            file.write_text(json.dumps(settings))
        (folder / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        with contextlib.suppress(InputError):
            load_processor(str(folder))
            load_speech_model(str(folder), Decoding(), torch.device("cpu"))
    assert not (tmp_path / "ran").exists()


def test_settings_that_name_a_class_are_refused_without_an_import(tmp_path):
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    sys.path.insert(0, str(tmp_path))
    try:
        (tmp_path / "config.yaml").write_text("train_sources: [{class_path: theirs.Theirs, init_args: {}}]")
        with pytest.raises(InputError, match="class_path is no setting here"):
            parse_config(["--config", str(tmp_path / "config.yaml")], TrainingConfig())
        with pytest.raises(InputError, match="class_path is no setting here"):
            parse_config(["--text_rules", "{class_path: theirs.Theirs}"], TrainingConfig())
    finally:
        sys.path.remove(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_path_of_the_hub_that_leaves_the_folder_is_refused_once_and_for_good(tmp_path):
    class Api:
        def list_repo_files(self, repo_id, revision):
            return ["README.md", "step-00000002/model.safetensors", "step-00000002/../../evil"]

    said = []
    assert hub_upload._fetch(Api(), "o/n", "b", "step-00000002", tmp_path, said.append) is None
    assert said == ["warning: checkpoint step-00000002 of o/n is not used: it has a file 'step-00000002/../../evil'"]
    assert hub_upload.is_plain("step-00000002/model..safetensors", "step-00000002")


def test_the_card_has_no_local_paths(copied, finished):
    card = (Path(copied.output_dir) / "final_model" / "README.md").read_text()
    assert "local: corpus" in card and "local: heldout" in card and "local: base" in card
    assert str(ROOT) not in card and str(Path(finished.output_dir).parent.parent) not in card


# ---- Loaders, locks and signals
class Features(torch.utils.data.Dataset):
    """Batches of 1 MB; where `is_full`, no tensor can be sent through shared memory."""

    def __init__(self, is_full: bool):
        self.is_full = is_full

    def __len__(self) -> int:
        return 6

    def __getitem__(self, number: int) -> dict:
        if self.is_full:
            multiprocessing.reduction.ForkingPickler.register(torch.UntypedStorage, lambda _: 1 / 0)
        return {"features": [torch.full((500, 500), float(number))], "name": f"{number}"}


def only(items: list) -> dict:
    (item,) = items
    return item


def batches(is_full: bool, collate) -> list:
    steps = [[number] for number in range(6)]
    how = {"collate_fn": collate, "num_workers": 1, "worker_init_fn": lambda _: die_of_a_lost_batch()}
    loader = torch.utils.data.DataLoader(Features(is_full), batch_sampler=steps, **how)
    found = Batches(iter(loader), lambda done: iter(skip_first_batches(loader, done)), lambda why: None, lambda: ["it"])
    return [(batch["name"], batch["features"][0].mean().item()) for batch in found]


def test_without_shared_memory_batches_come_by_value_and_a_lost_one_is_a_dead_worker(monkeypatch):
    expected = [(str(number), float(number)) for number in range(6)]
    monkeypatch.setattr("hebrew_asr.data.shared_memory.PLACE", Path("/nowhere"))
    assert batches(True, sent(only, 1, 1.0)) == expected
    monkeypatch.setattr("hebrew_asr.data.shared_memory.PLACE", Path("/"))
    assert sent(only, 1, 1.0) is only
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"3 workers .*shm-size.*does not survive, one of it"):
        batches(True, only)
    assert time.monotonic() - began < 60, "it does not wait for ever"


def test_what_shared_memory_must_hold_is_known_before_the_first_step(monkeypatch):
    assert 0.9 < needed(4, 64 * 6) / 1.5 / 157e6 < 1.1  # Round 2's defaults, as measured
    usage = SimpleNamespace(free=64 * 2**20)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    assert "--shm-size=" in advice(4, 64 * 6) and advice(0, 64 * 6) is None
    usage.free = 2**30
    assert advice(4, 64 * 6) is None


def test_a_recording_that_kills_the_decoder_is_named(train_rows, processor, config, monkeypatch):
    dataset = SpeechDataset(train_rows, processor, config, training=True)
    fatal = train_rows[3]["recording"]
    decode = utterances.decode_audio

    def dies(audio, *where):
        if train_rows[3]["audio"]["path"] == audio["path"] and train_rows[3]["audio"]["bytes"] == audio["bytes"]:
            os.kill(os.getpid(), signal.SIGSEGV)
        return decode(audio, *where)

    monkeypatch.setattr(utterances, "decode_audio", dies)
    steps = [[[(1, number)]] for number in range(6)]
    loader = speech_loader(dataset, steps, list, dataclasses.replace(config, dataloader_num_workers=1), 1.0)
    found = Batches(iter(loader), lambda done: iter(skip_first_batches(loader, done)), print, dataset.begun)
    with pytest.raises(RuntimeError, match=f"does not survive, one of {re.escape(fatal)}$"):
        list(found)


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    assert take_lock(tmp_path)
    assert "without locks (No locks available): see to it that no other run is there" in capsys.readouterr().err


def test_a_slow_disk_at_a_signal_is_a_preemption(config, tmp_path):
    config = short(config, preemption_grace_seconds=1.0)
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(dataclasses.asdict(config)))
    done = forked("tests/run_and_stop.py", file, -1, "TERM-while-writing", timeout=120)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert status_of(config)["state"] == "preempted"


def test_a_full_disk_for_temporary_files_is_none_of_the_runs_own(config, monkeypatch):
    save_checkpoint = ResumableTrainer.save_checkpoint

    def after_tmp_is_full(trainer):
        monkeypatch.setattr("tempfile.tempdir", "/dev/full")
        save_checkpoint(trainer)

    monkeypatch.setattr(ResumableTrainer, "save_checkpoint", after_tmp_is_full)
    main(short(config, max_steps=1))
    run = Path(config.output_dir)
    assert status_of(config)["state"] == "finished" and not list(run.glob(".unfinished*"))
    for name in ("config.json", "tokenizer.json"):
        assert (run / "checkpoints" / "step-00000001" / name).exists()


def stopped_in_a_child(config, monkeypatch, where: str) -> int:
    """The exit status of a run in a process of its own that gets a SIGTERM where it calls something."""
    monkeypatch.setattr(where, lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    if not (pid := os.fork()):
        with contextlib.suppress(BaseException):
            main(config)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_signal_before_the_first_step_is_a_preemption(config, monkeypatch, capfd):
    where = "train_hebrew_asr_enhanced.GradualUnfreezeTrainer.load_data"
    assert stopped_in_a_child(short(config), monkeypatch, where) == 128 + signal.SIGTERM
    assert (status_of(config)["state"], status_of(config)["why"]) == ("preempted", "SIGTERM")
    assert "stopped (SIGTERM), no checkpoint yet; the same command begins again\n" in capfd.readouterr().err


def test_a_signal_during_the_last_upload_is_said(copied, hub, monkeypatch, capfd):
    config = dataclasses.replace(copied, hf_repo_id="OzLabs/asr", skip_hf_upload=False)
    with monkeypatch.context() as patched:
        status = stopped_in_a_child(config, patched, "hebrew_asr.training.run_folder.upload")
    assert status == 128 + signal.SIGTERM
    assert (status_of(config)["state"], status_of(config)["why"]) == ("finished", "SIGTERM during the upload")
    assert "(SIGTERM) during the upload to OzLabs/asr: the model is in" in capfd.readouterr().err
    main(config)
    assert status_of(config)["uploaded"] and status_of(config)["why"] is None


def test_an_evaluation_file_that_vanishes_is_named_and_the_step_is_saved(config, tmp_path, monkeypatch):
    config, decode = short(config, eval_steps=1), utterances.decode_audio
    (gone,) = load_rows(config.eval_sources, config, for_training=False).column("recording")[:1]
    wave = load_rows(config.eval_sources, config, for_training=False)[0]["audio"]

    def vanished(audio, *where):
        if audio["bytes"] == wave["bytes"] and (Path(config.output_dir) / "checkpoints").exists():
            raise AudioError("no such audio file")
        return decode(audio, *where)

    with monkeypatch.context() as patched:
        patched.setattr(utterances, "decode_audio", vanished)
        with pytest.raises(InputError, match=f"1 recordings of the evaluation set .*no such audio file: {gone}"):
            main(dataclasses.replace(config, save_steps=1))
    gc.collect()  # the frames of the run, with its lock
    newest = store.names(Path(config.output_dir) / "checkpoints")[0]
    assert json.loads((newest / "state.json").read_text())["evaluation_pending"]
    main(config)
    assert status_of(config)["state"] == "finished"


def test_a_finished_run_is_uploaded_to_each_repository_that_is_asked_for_once(copied, hub, capsys):
    for repository in ("OzLabs/later", "OzLabs/other"):
        for uploads in (1, 0):
            main(dataclasses.replace(copied, hf_repo_id=repository, skip_hf_upload=False))
            assert capsys.readouterr().out.count("uploaded: ") == uploads
        assert "model.safetensors" in hub.repos[repository]["main"]
        assert f"/{repository}/commit/" in status_of(copied)["uploaded"]


# ---- Names and texts
def test_line_breaks_in_names_and_torn_lines_do_not_hinder_a_run_that_goes_on(tmp_path):
    log, dropped = RunLog(tmp_path, rank=0), tmp_path / "dropped-0.txt"
    log.note_dropped(["silent: a\nb\u2028c.wav", "silent: d.wav"], 3)
    assert dropped.read_text().splitlines() == ["step 3: silent: a\\nb\\u2028c.wav", "step 3: silent: d.wav"]
    log.note_dropped(["silent: e.wav"], 5)
    with open(dropped, "a") as file:
        file.write("ste")
    log.go_back([], 4)
    assert len(dropped.read_text().splitlines()) == 2


def test_what_a_terminal_would_act_on_is_written_out(tmp_path, capsys):
    RunLog(tmp_path, rank=0).say("\x1b]0;title\x07 שלום \u202eabc\r\nnext\tcolumn")
    assert capsys.readouterr().out == "\\x1b]0;title\\x07 שלום \\u202eabc\\r\nnext\tcolumn\n"


# ---- A run
def short(config, **changed):
    """Two steps of one stage, evaluated at the end."""
    stages = [dataclasses.replace(config.stages[0], last_epoch=5)]
    return dataclasses.replace(config, **({"num_epochs": 1, "max_steps": 2, "save_steps": 1} | changed), stages=stages)


def status_of(config):
    return store.read_status(Path(config.output_dir))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, corpus, heldout):
    """A run of two steps that nothing hit, and its settings."""
    config = short(small_config(corpus, heldout, tmp_path_factory.mktemp("finished") / "run"))
    main(config)
    return config


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of it that a test may damage."""
    shutil.copytree(finished.output_dir, tmp_path / "run")
    return dataclasses.replace(finished, output_dir=str(tmp_path / "run"))


def test_a_run_whose_last_saves_fail_does_not_end_finished_and_goes_on_when_there_is_room(
    config, monkeypatch, finished
):
    config, write = short(config), store.write

    def full(parent, step, *rest):
        if step > 1:
            raise OSError(errno.EIO, "Input/output error")
        return write(parent, step, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(store, "write", full)
        with pytest.raises(InputError, match=r"at its last step, 2, which could not be saved \(.*step-00000001\. Make"):
            main(config)
    status = status_of(config)
    assert (status["state"], status["failed_saves"], status["checkpoint"]) == ("failed", 2, "step-00000001")
    assert not (Path(config.output_dir) / "final_model").exists()
    main(config)
    assert status_of(config)["state"] == "finished" and status_of(config)["failed_saves"] == 0
    one, two = (Path(c.output_dir) / "final_model" / "model.safetensors" for c in (config, finished))
    assert one.read_bytes() == two.read_bytes()


def test_the_card_says_when_the_best_step_could_not_be_saved(copied):
    trainer = SimpleNamespace(
        writer=SimpleNamespace(wait=lambda: None, parent=Path(copied.output_dir) / "checkpoints"),
        args=SimpleNamespace(process_index=0),
        run_log=SimpleNamespace(say=print),
        config=copied,
        processor=SimpleNamespace(save_pretrained=lambda folder: None),
        final_folder=Path(copied.output_dir) / "final_model",
        best_wer=1.0,
        best_step=1,
    )
    write_final_model(trainer)
    assert trainer.final_origin == (
        "The checkpoint with the lowest WER of those that could be saved, at step 2: that of step 1, whose WER was"
        " 1.00 %, could not."
    )


@pytest.mark.parametrize("damage", ["empty", "cut", "gone"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "README.md"])
def test_a_damaged_final_model_is_seen_and_not_uploaded(copied, name, damage):
    folder = Path(copied.output_dir) / "final_model"
    assert damage_of(folder) is None
    (folder / "README.md").write_text("edited by its user")
    assert damage_of(folder) is None
    file = folder / name
    if damage == "gone":
        if name == "README.md":
            return
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-5] if damage == "cut" and name != "README.md" else b"")
    assert name in damage_of(folder)
    with pytest.raises(InputError, match="is damaged and is not uploaded"):
        upload(copied, folder, print)
    (folder / "manifest.json").unlink()  # as an older version left it
    if name == "model.safetensors" or damage == "empty":
        assert damage_of(folder) is not None


def test_a_finished_run_whose_model_a_power_cut_emptied_makes_it_anew(copied, finished, capsys):
    folder = Path(copied.output_dir) / "final_model"
    for name in ("config.json", "README.md", "tokenizer.json"):
        (folder / name).write_bytes(b"")
    main(copied)
    assert "final_model is damaged" in capsys.readouterr().out
    assert damage_of(folder) is None and status_of(copied)["state"] == "finished"
    whole = Path(finished.output_dir) / "final_model"
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    (folder / "model.safetensors").write_bytes(b"")
    shutil.rmtree(folder.parent / "checkpoints")
    with pytest.raises(InputError, match="no checkpoint is left to make it of"):
        main(copied)
    assert (folder / "config.json").exists()


def test_a_start_that_fails_after_the_checkpoint_was_chosen_leaves_the_folder_as_it_was(copied, finished, tmp_path):
    run = Path(copied.output_dir)
    (run / "status.json").unlink()
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    for name in (str(run), finished.output_dir):
        asked = f"{name}/checkpoints/step-00000001"
        with pytest.raises(InputError):
            main(dataclasses.replace(copied, resume=asked, model_name_or_path=str(tmp_path / "gone")))
        with pytest.raises(InputError, match="is of another run"):
            main(dataclasses.replace(copied, resume=asked, bf16=True))
    assert {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()} == before


# ---- The data under a run
@pytest.fixture
def moved(finished, corpus, heldout, tmp_path):
    """A run that stopped at step 1 of 2, with data of its own; `change` writes them anew."""
    shutil.copytree(finished.output_dir, tmp_path / "run")
    run = tmp_path / "run"
    (run / "status.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000002"), shutil.rmtree(run / "final_model")
    config = dataclasses.replace(finished, output_dir=str(run))
    for name, source in (("train_sources", corpus), ("eval_sources", heldout)):
        setattr(config, name, [Source(str(shutil.copytree(source, tmp_path / "elsewhere" / name)))])
    return config


def test_a_checkpoint_of_the_version_before_goes_on_to_the_same_bits(moved, finished, corpus, heldout):
    (folder,) = store.names(Path(moved.output_dir) / "checkpoints")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "data.safetensors").unlink()
    del manifest["files"]["data.safetensors"], manifest["run"]["data"], manifest["settings"]["accept_changed_data"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"train_sources\.0\.path"):
        main(moved)  # that the data only moved cannot be told
    same = dataclasses.replace(moved, train_sources=finished.train_sources, eval_sources=finished.eval_sources)
    main(same)
    one, two = (Path(c.output_dir) / "final_model" / "model.safetensors" for c in (same, finished))
    assert one.read_bytes() == two.read_bytes()


def rewrite(config, part: str, change) -> None:
    file = Path(getattr(config, part)[0].path) / "train.parquet"
    table, times = pyarrow.parquet.read_table(file), file.stat()
    pyarrow.parquet.write_table(change(table), file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def exchanged(table):
    """The first two transcripts, one in the place of the other."""
    texts = table["transcript"].to_pylist()
    return table.set_column(
        table.column_names.index("transcript"), "transcript", pyarrow.array([texts[1], texts[0], *texts[2:]])
    )


def test_data_that_only_moved_are_the_same_data(moved, finished):
    main(moved)
    one, two = (Path(c.output_dir) / "final_model" / "model.safetensors" for c in (moved, finished))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("train_sources", exchanged, r"training data: of 41 utterances 2 are gone or changed, and 1 of the 40 now are"),
        (
            "train_sources",
            lambda t: t.take(list(range(40, -1, -1))),
            r"training data: its 41 utterances are in another",
        ),
        ("eval_sources", exchanged, r"evaluation data: of 11 utterances 2 are gone or changed"),
    ],
)
def test_other_data_under_the_same_path_are_named_and_one_may_go_on(moved, part, change, said):
    rewrite(moved, part, change)
    run = Path(moved.output_dir)
    with pytest.raises(InputError, match=said + r"(.|\n)*--accept_changed_data"):
        main(moved)
    assert [path.name for path in store.names(run / "checkpoints")] == ["step-00000001"]
    if part == "eval_sources":
        main(dataclasses.replace(moved, accept_changed_data=True))
        assert status_of(moved)["state"] == "finished"


def test_a_run_whose_data_shrank_below_its_step_does_not_end_untrained(finished, corpus, heldout, tmp_path):
    """Of 41 utterances it has 6 steps an epoch, of 8 it has one."""
    config = short(small_config(corpus, heldout, tmp_path / "run"), max_steps=None, eval_steps=100)
    config.train_sources = [Source(str(first_rows("corpus", 8, tmp_path / "few")))]
    begun = tmp_path / "step-00000001"
    shutil.copytree(f"{finished.output_dir}/checkpoints/{begun.name}", begun)
    facts = json.loads((begun / "manifest.json").read_text())
    facts["settings"]["max_steps"] = None
    (begun / "manifest.json").write_text(json.dumps(facts))
    config.resume, config.accept_changed_data = str(begun), True
    with pytest.raises(InputError, match=r"is at step 1, .* ends at step 1: .* --model_name_or_path .*step-00000001"):
        main(config)
    assert not store.names(tmp_path / "run" / "checkpoints")


def test_the_lowest_wer_is_of_one_evaluation_set(tmp_path):
    for step, wer, measured_on in ((1, 5.0, "a"), (2, 50.0, "b"), (3, 60.0, "b")):
        facts = {**FACTS, "wer": wer, "run": {"data": {"evaluation": measured_on}}}
        store.write(tmp_path, step, {}, {"state.json": b"{}"}, facts)
    assert store.best_valid(tmp_path, print).step == 2


def test_a_finished_run_says_that_its_data_are_others_now(finished, moved, capsys):
    shutil.copytree(finished.output_dir, moved.output_dir, dirs_exist_ok=True)
    main(moved)
    assert "data are others" not in capsys.readouterr().out
    rewrite(moved, "eval_sources", exchanged)
    main(moved)
    assert "the evaluation data are others now than this model was made with" in capsys.readouterr().out


def test_a_lost_file_keeps_its_place_and_is_dropped_there(tmp_path, corpus, config):
    table = pyarrow.parquet.read_table(corpus / "train.parquet").slice(0, 40).to_pylist()
    (tmp_path / "audio").mkdir()
    lines = ["file_name,text"]
    for number, row in enumerate(table):
        (tmp_path / "audio" / f"{number}.wav").write_bytes(row["audio"]["bytes"])
        lines.append(f'{number}.wav,"{row["transcript"]}"')
    (tmp_path / "audio" / "metadata.csv").write_text("\n".join(lines))
    sources = [Source(str(tmp_path / "audio"))]
    before = load_rows(sources, config, for_training=True)
    (tmp_path / "audio" / "7.wav").unlink()
    now = load_rows(sources, config, for_training=True)
    whole = with_lost(now, identity_of(before))
    assert (len(before), len(now), len(whole)) == (40, 39, 40)
    assert identity_of(whole).tolist() == identity_of(before).tolist()
    assert [row["text"] for row in whole][8:] == [row["text"] for row in before][8:]
    with pytest.raises(AudioError, match="no such audio file"):
        decode_audio(whole[7]["audio"])
    assert len(with_lost(now, identity_of(before)[::-1])) == 39, "in another order it is other data"
