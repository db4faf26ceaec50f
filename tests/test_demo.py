"""The demo world holds what it says, and the main command learns from it."""

import ast
import io
import json
import random
import re
from itertools import pairwise
from pathlib import Path

import jiwer
import numpy as np
import pyarrow.parquet
import pytest
import soundfile
import torch
import transformers
from conftest import DEMO
from test_main_command import command

from hebrew_asr.data.rows import load_rows
from hebrew_asr.data.sources import DataConfig, Source
from hebrew_asr.data.utterances import SpeechDataset
from hebrew_asr.text.scoring import leaderboard_normalize
from hebrew_asr.text.targets import TIMESTAMP
from train_hebrew_asr_enhanced import DataCollatorSpeechSeq2SeqWithPadding
from train_round2_gradual import demo


def table(part: str) -> list[dict]:
    (file,) = (DEMO / part).glob("*.parquet")
    return pyarrow.parquet.read_table(file).to_pylist()


def sentences(part: str) -> list[str]:
    return [leaderboard_normalize(TIMESTAMP.sub(" ", row["transcript"])) for row in table(part)]


def test_held_out_sentences_are_not_in_training():
    heldout = sentences("heldout")
    assert len(heldout) >= 400 and min(len(s.split()) for s in heldout) >= 2
    assert not set(heldout) & set(sentences("corpus"))
    assert sentences("heldout_noisy") == heldout


def test_held_out_voices_are_in_no_training_set():
    """The voices are named in the script that makes the world, and nowhere in the data."""
    source = ast.parse((DEMO / "speech.py").read_text())
    names = {"BASE_VOICES", "CORPUS_VOICES", "HELDOUT_VOICES"}
    voices = {
        node.targets[0].id: set(node.value.func.value.value.split())
        for node in source.body
        if isinstance(node, ast.Assign) and node.targets[0].id in names
    }
    assert len(voices) == 3 and len(voices["HELDOUT_VOICES"]) >= 4
    assert not voices["HELDOUT_VOICES"] & (voices["BASE_VOICES"] | voices["CORPUS_VOICES"])


def test_the_schema_is_that_of_the_ivrit_ai_training_sets():
    (file,) = (DEMO / "corpus").glob("*.parquet")
    columns = pyarrow.parquet.read_schema(file).names
    assert columns == ["audio", "transcript", "metadata", "has_prev", "has_timestamps", "prev_transcript"]
    rows = table("corpus")
    assert {"seek", "duration", "source", "entry_id", "quality_score"} <= set(rows[0]["metadata"])
    formats = {soundfile.info(io.BytesIO(row["audio"]["bytes"])).format for row in rows}
    assert formats == {"OGG", "MP3"} or formats == {"OGG", "MPEG"}, formats
    assert 0.05 < np.mean([row["has_timestamps"] for row in rows]) < 0.5
    assert all(bool(TIMESTAMP.search(row["transcript"])) == row["has_timestamps"] for row in rows)
    assert any(row["has_prev"] and row["prev_transcript"] for row in rows)


def test_some_rows_lose_the_tail_that_has_no_text():
    rows = load_rows([Source(str(DEMO / "corpus"))], DataConfig(), for_training=True)
    cut = [i for i, end in enumerate(rows.column("end")) if end is not None]
    assert cut
    for row in (rows[i] for i in cut):
        assert row["end"] < soundfile.info(io.BytesIO(row["audio"]["bytes"])).duration - 0.2


def test_the_base_is_small_and_the_world_too():
    model = transformers.Qwen3ASRForConditionalGeneration.from_pretrained(DEMO / "base")
    assert sum(parameter.numel() for parameter in model.parameters()) <= 5e6
    assert sum(file.stat().st_size for file in DEMO.rglob("*") if file.is_file()) <= 20e6
    assert model.config.pad_token_id in model.config.eos_token_id, "<|im_end|> pads and ends, as in the 1.7B"


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    done = command("train_round2_gradual.py", "--demo", "--output_dir", folder, processes=2, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "console.txt").write_text(done.stdout)
    return folder


@pytest.mark.slow
def test_the_demo_halves_the_error_rate(demo_run):
    rows = [json.loads(line) for line in (demo_run / "metrics.jsonl").read_text().splitlines()]
    wers = [row["eval/wer"] for row in rows if "eval/wer" in row]
    (final,) = [row["final/wer"] for row in rows if "final/wer" in row]
    assert 35 <= wers[0] <= 90, "before training"
    assert final <= min(20, wers[0] / 2)
    assert all(a > b for a, b in pairwise((wers[0], wers[1], wers[-1]))), "after B, and again after A"
    assert min(row["train/loss"] for row in rows if "train/loss" in row) < 1
    console = (demo_run / "console.txt").read_text()
    assert re.search(r"WER +[\d.]+ %  before training\nWER +[\d.]+ %  after B\nWER +[\d.]+ %  after A", console)
    assert console.splitlines()[-1] == "dashboard: uv run trackio show --project qwen3-asr-hebrew"


@pytest.mark.slow
def test_the_trained_model_listens(demo_run):
    """With each utterance's audio replaced by another's, the error rate is that of not hearing it."""
    config = demo()
    model = transformers.Qwen3ASRForConditionalGeneration.from_pretrained(demo_run / "final_model", dtype=torch.float32)
    processor = transformers.AutoProcessor.from_pretrained(demo_run / "final_model")
    rows = load_rows(config.eval_sources, config, for_training=False)
    dataset = SpeechDataset(rows, processor, config, training=False)
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor, config)
    utterances = [dataset[(0, row)] for row in range(128)]
    order = list(range(len(utterances)))
    random.Random(1).shuffle(order)
    batch = collator(utterances, training=False)
    with torch.no_grad():
        generated = model.generate(
            input_ids=batch["prompt_input_ids"],
            attention_mask=batch["prompt_attention_mask"],
            input_features=batch["input_features"],
            input_features_mask=batch["input_features_mask"],
            max_new_tokens=100,
        )[:, batch["prompt_input_ids"].shape[1] :]
    heard = [leaderboard_normalize(text) for text in processor.decode(generated, return_format="transcription_only")]
    references = [leaderboard_normalize(u["text"]) for u in utterances]
    assert jiwer.wer(references, heard) < 0.3
    assert jiwer.wer([references[i] for i in order], heard) > 0.9
