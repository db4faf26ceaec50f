"""A streamed corpus is heard whole, once a pass, by two processes without overlap, and goes on exactly where it was."""

import itertools
import json
import multiprocessing
import shutil
import subprocess
import time
from collections import Counter
from types import SimpleNamespace

import pyarrow.parquet
import pytest
from conftest import DEMO
from forked import forked
from test_corpora import parquet, wav

from hebrew_asr.data.rows import load_rows
from hebrew_asr.data.sources import DataConfig, Source
from hebrew_asr.data.stream import SpeechStream, StreamReader, load_streams_and_eval
from hebrew_asr.errors import InputError
from hebrew_asr.training.feed import StreamFeed
from hebrew_asr.training.watch import Batches


def shards(folder, counts: list[int], first: int = 0):
    """Parquet shards of consecutive utterances of the demo corpus."""
    (file,) = (DEMO / "corpus").glob("*.parquet")
    table, begin = pyarrow.parquet.read_table(file), first
    folder.mkdir(parents=True)
    for i, count in enumerate(counts):
        pyarrow.parquet.write_table(table.slice(begin, count), folder / f"train-{i:05}-of-{len(counts):05}.parquet")
        begin += count
    return folder


def config_of(folder, heldout, **settings) -> DataConfig:
    settings = {"streaming": True, "steps_per_epoch": 10} | settings
    sources = settings.pop("train_sources", [Source(str(folder))])
    return DataConfig(train_sources=sources, eval_sources=[Source(str(heldout))], **settings)


def loader(config, rank: int = 0, processes: int = 1, workers: int = 0, share: int = 4, start=None) -> StreamReader:
    """A step is a list of the utterances' (source's text, pass)."""
    streams, _ = load_streams_and_eval(config, seed=1)

    def featurize(piece, epoch, number):
        return {"text": piece["text"], "pass": epoch, "number": number, "recording": piece["recording"]}

    stream = SpeechStream(streams, featurize, lambda step: step, share, 1, rank, processes)
    reader = StreamReader(stream, workers, pin_memory=False)
    if start:
        reader.go_on_from(start, stream.seed)
    return reader


def take(stream: StreamReader, steps: int) -> list:
    return list(itertools.islice(stream, steps))


@pytest.mark.parametrize("counts", [[12, 12, 12, 12], [20, 9, 19], [48]])
def test_two_processes_hear_every_utterance_once_a_pass_and_none_twice(tmp_path, heldout, counts):
    config = config_of(shards(tmp_path / "c", counts), heldout, drop_duplicates=False)
    wanted = Counter(load_rows(config.train_sources, config, for_training=True).column("text"))
    heard = Counter()
    for rank in (0, 1):
        steps = take(loader(config, rank, processes=2, share=1), 80)
        first_pass = [u for step, _ in steps for u in step if u["pass"] == 1]
        assert {u["pass"] for step, _ in steps for u in step} >= {1, 2}, "the pass ended"
        heard += Counter(u["text"] for u in first_pass)
    assert heard == wanted


def test_a_stream_one_of_whose_workers_is_killed_goes_on_where_it_was(tmp_path, heldout):
    config = config_of(shards(tmp_path / "c", [30, 20, 25, 25]), heldout)
    whole, told = take(loader(config, workers=2), 20), []
    stream = loader(config, workers=2)
    batches = Batches(iter(stream), lambda _: iter(stream), told.append)
    before = take(batches, 3)
    multiprocessing.active_children()[0].kill()
    time.sleep(0.3)  # a handler of SIGCHLD would raise here
    assert before + take(batches, 17) == whole and len(told) == 1


def test_a_streamed_run_goes_on_with_no_other_number_of_processes():
    with pytest.raises(InputError, match="as many processes as before: 2, not 1"):
        StreamFeed.restore(SimpleNamespace(processes=1), [{}, {}])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_stream_goes_on_exactly_where_it_was(tmp_path, heldout, workers):
    folder = shards(tmp_path / "c", [30, 20, 25, 25])
    config = config_of(folder, heldout, train_sources=[Source(str(folder))])
    whole = take(loader(config, workers=workers), 31)
    assert {u["pass"] for step, _ in whole for u in step} == {1, 2}
    for stop in (3, 16):
        before = loader(config, workers=workers)
        assert take(before, stop) == whole[:stop]
        state = json.loads(json.dumps(before.state))
        assert take(loader(config, workers=workers, start=state), 31 - stop) == whole[stop:]


def test_shares_of_two_sources_and_what_is_left_out(tmp_path, heldout):
    leaking = load_rows([Source(str(heldout))], DataConfig(), for_training=False)
    rows = [
        {"audio": wav(tmp_path / f"{i}.wav", 1 + i / 10), "transcript": text}
        for i, text in enumerate(["א ב", "...", leaking.column("reference")[1]])
    ]
    small = parquet(tmp_path / "small", rows)
    sources = [
        Source(str(shards(tmp_path / "c", [30, 30])), probability=0.75),
        Source(str(small), probability=0.25),
    ]
    config = config_of(None, heldout, train_sources=sources, leak_min_words=1, min_characters_per_second=0.1)
    steps = take(loader(config, share=8), 10)
    assert [sum(u["text"] == "א ב" for u in step) for step, _ in steps] == [2] * 10
    reasons = Counter(line.split(":")[0] for _, dropped in steps for line in dropped)
    assert reasons["empty text"] > 10 and reasons["text of an evaluation set"] > 10


@pytest.mark.parametrize("workers", [0, 1])
def test_a_source_of_which_nothing_can_be_used_ends_the_stream(tmp_path, heldout, workers, capfd):
    rows = [{"audio": wav(tmp_path / "a.wav"), "transcript": "..."}]
    config = config_of(parquet(tmp_path / "c", rows), heldout)
    with pytest.raises(InputError, match=r"c: a whole pass over this process's share gave nothing to train on$"):
        take(loader(config, workers=workers), 1)
    assert "error: " in capfd.readouterr().err, "whichever process it is"


def test_all_of_the_evaluation_set_is_kept_out_however_much_of_it_is_evaluated(tmp_path, heldout):
    config = config_of(heldout, heldout, max_eval_utterances=2, drop_duplicates=False)
    with pytest.raises(InputError, match="gave nothing to train on"):
        take(loader(config), 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_sources": []}, "eval_sources"),
        ({"steps_per_epoch": None}, "steps_per_epoch"),
        ({"train_sources": [Source("a"), Source("b")]}, "a probability for each"),
    ],
)
def test_what_a_stream_needs(settings, message):
    whole = {"train_sources": [Source("a")], "eval_sources": [Source("b")], "streaming": True, "steps_per_epoch": 5}
    DataConfig(**whole).check_sources()
    with pytest.raises(InputError, match=f"streaming needs.*{message}"):
        DataConfig(**(whole | settings)).check_sources()


@pytest.mark.slow
def test_a_streamed_run_that_was_stopped_ends_in_the_same_bits(tmp_path, heldout):
    """Two processes with two workers each; the second run is stopped in mid-epoch and goes on by the same command."""
    folder = shards(tmp_path / "c", [20, 20, 20, 20], first=200)

    def run(name: str, *more: str) -> subprocess.CompletedProcess:
        options = ["--streaming", "true", "--steps_per_epoch", 4, "--num_epochs", 3, "--target_effective_batch", 8]
        options += ["--train_sources", json.dumps([{"path": str(folder)}]), "--logging_steps", 1, "--tracker", "none"]
        options += ["--eval_sources", json.dumps([{"path": str(heldout)}]), "--dataloader_num_workers", 2]
        options += ["--eval_steps", 100, "--save_steps", 3, "--save_total_limit", 9, "--output_dir", tmp_path / name]
        return forked("train_round2_gradual.py", "--demo", *options, *more, processes=2)

    def logged(name: str) -> list[float]:
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [row["train/loss"] for row in rows if "train/loss" in row]

    whole = run("whole")
    assert whole.returncode == 0, whole.stderr
    assert "4 shards, read while training" in whole.stdout and "stage A" in whole.stdout
    assert len(logged("whole")) == 12 and logged("whole")[-1] < logged("whole")[0]
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for made in (tmp_path / "cut" / "final_model", *(tmp_path / "cut" / "checkpoints").iterdir()):
        if made.name not in ("step-00000003", "step-00000006"):
            shutil.rmtree(made)
    (tmp_path / "cut" / "status.json").unlink()
    again = run("cut", "--dataloader_num_workers", "1")
    assert again.returncode != 0 and "as many workers as before: 2, not 1" in again.stderr
    again = run("cut")
    assert again.returncode == 0, again.stderr
    assert "resumed at step 6 of 12" in again.stdout
    assert logged("cut") == logged("whole")
    ends = [tmp_path / name / "final_model" / "model.safetensors" for name in ("whole", "cut")]
    assert ends[0].read_bytes() == ends[1].read_bytes()
