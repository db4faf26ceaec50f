"""The evaluation command: the same transcripts however they are batched, resumed and shared out, and honest gaps."""

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import jiwer
import numpy as np
import psutil
import pyarrow.parquet
import pytest
import soundfile
import torch
import transformers
from conftest import DEMO, ROOT
from forked import forked
from safetensors.torch import load_file, save_file
from test_corpora import parquet

import evaluate_hebrew_asr as evaluation
from evaluate_hebrew_asr import parse
from hebrew_asr.command_line import as_written
from hebrew_asr.data.audio import decode_audio
from hebrew_asr.data.sources import Source
from hebrew_asr.errors import InputError
from hebrew_asr.evaluation import measuring
from hebrew_asr.evaluation import sets as sets_module
from hebrew_asr.evaluation.settings import Decoding, EvaluationSet
from hebrew_asr.evaluation.transcription import (
    Transcript,
    batches_of,
    cut_at_pauses,
    load_speech_model,
    plan,
    read_transcripts,
)
from hebrew_asr.text.intervals import error_rate_interval
from hebrew_asr.text.scoring import leaderboard_normalize
from train_round2_gradual import demo as demo_training
from train_round2_gradual import recipe

BASE = str(DEMO / "base")


def settings(tmp_path, heldout, *arguments, sets=None):
    few = own(name="few", path=str(heldout), split="train")
    config = parse(["--model", BASE, "--sets", few, "--output_dir", str(tmp_path / "out"), *arguments])
    config.num_workers = 0
    if sets:
        config.sets = sets
    return config


def own(**fields) -> str:
    return json.dumps({"name": "calls", "path": "data/calls"} | fields)


def results_of(folder) -> dict:
    results = json.loads((folder / "results.json").read_text())
    results["settings"]["output_dir"] = ""
    for result in results["results"]:
        for name in ("audio_seconds_per_second", "peak_memory_gb"):
            result.pop(name, None)
    return results


def hypotheses_of(folder) -> list[str]:
    return pyarrow.parquet.read_table(folder / "utterances.parquet")["hypothesis"].to_pylist()


def transcribe_alone(rows: list[dict]) -> list[str]:
    """As the model card tells a user to: one clip at a time, transformers alone."""
    processor = transformers.AutoProcessor.from_pretrained(BASE)
    model = transformers.Qwen3ASRForConditionalGeneration.from_pretrained(BASE, dtype=torch.float32)
    texts = []
    for row in rows:
        turn = {"role": "user", "content": [{"type": "audio", "audio": decode_audio(row["audio"])}]}
        inputs = processor.apply_chat_template(
            [[turn]], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        written = model.generate(**inputs, max_new_tokens=100, do_sample=False)
        (text,) = processor.decode(written[:, inputs["input_ids"].shape[1] :], return_format="transcription_only")
        texts.append(text)
    return texts


def test_transcripts_and_rates_are_those_of_a_user_whatever_the_batch(tmp_path, heldout):
    evaluation.main(settings(tmp_path, heldout))
    found = results_of(tmp_path / "out")
    (file,) = heldout.glob("*.parquet")
    rows = pyarrow.parquet.read_table(file).to_pylist()
    assert hypotheses_of(tmp_path / "out") == transcribe_alone(rows)
    evaluation.main(settings(tmp_path / "alone", heldout, "--batch_seconds", "1"))
    assert hypotheses_of(tmp_path / "alone" / "out") == hypotheses_of(tmp_path / "out")
    references = [leaderboard_normalize(row["transcript"]) for row in rows]
    written = [leaderboard_normalize(text) for text in hypotheses_of(tmp_path / "out")]
    (result,) = found["results"]
    assert result["wer"]["value"] == pytest.approx(100 * jiwer.wer(references, written), abs=1e-9)
    assert result["cer"]["value"] == pytest.approx(100 * jiwer.cer(references, written), abs=1e-9)
    assert result["wil"] == pytest.approx(100 * jiwer.wil(references, written), abs=1e-9)
    assert result["wer"]["low"] < result["wer"]["value"] < result["wer"]["high"]
    errors = result["substitutions"] + result["deletions"] + result["insertions"]
    assert sum(result["error_classes"].values()) == errors and result["utterances"] == 11
    assert result["language_accuracy"] == 100 and result["failures"]["truncated"] == 0
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert "few" in page and "data:audio/ogg;base64," in page


@pytest.mark.parametrize(
    "ends",
    [
        {},
        {"repetition_penalty": 5.0, "no_repeat_ngram_size": 2},
        {"eos_token_id": 7, "pad_token_id": 9},
    ],
)
def test_a_transcript_ends_with_its_turn_whatever_the_generation_config_says(tmp_path, heldout, ends):
    shutil.copytree(BASE, tmp_path / "foreign")
    (tmp_path / "foreign" / "generation_config.json").write_text(json.dumps(ends))
    written = []
    for model in (BASE, str(tmp_path / "foreign")):
        evaluation.main(settings(tmp_path, heldout, "--model", model))
        written.append(hypotheses_of(tmp_path / "out"))
    assert written[0] == written[1]


@pytest.mark.slow
def test_two_processes_and_an_interrupted_run_write_the_same(tmp_path):
    """The first run is killed when some batches are on disk; the same command then ends as if nothing had been."""
    own = json.dumps({"name": "heldout", "path": str(DEMO / "heldout"), "split": "test[:60]"})
    line = ["evaluate_hebrew_asr.py", "--model", BASE, "--sets", own, "--batch_seconds", "8", "--num_workers", "0"]
    line += ["--output_dir"]
    forked(*line, tmp_path / "whole", processes=1).check_returncode()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    killed = subprocess.Popen(
        [*launcher, *line, str(tmp_path / "cut")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    deadline = time.monotonic() + 200
    while sum(len(f.read_bytes().splitlines()) for f in (tmp_path / "cut").glob("transcripts/*/*.jsonl")) < 4:
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.02)
    for process in (psutil.Process(killed.pid), *psutil.Process(killed.pid).children()):  # ranks outlive their launcher
        process.kill()
    killed.wait()
    assert not (tmp_path / "cut" / "results.json").exists()
    (part, *_) = (tmp_path / "cut").glob("transcripts/*/0.jsonl")
    part.write_bytes(part.read_bytes()[:-20])  # a line torn by the machine's end
    lines = sum(len(f.read_bytes().splitlines()) for f in (tmp_path / "cut").glob("transcripts/*/*.jsonl"))
    forked(*line, tmp_path / "cut", processes=2).check_returncode()
    assert lines < 20, "it was killed in the middle"
    assert results_of(tmp_path / "cut") == results_of(tmp_path / "whole")
    assert hypotheses_of(tmp_path / "cut") == hypotheses_of(tmp_path / "whole")


def test_what_cannot_be_measured_is_said_and_the_rest_measured(tmp_path, heldout):
    (tmp_path / "noise").mkdir()
    rows = [{"audio": tmp_path / "noise" / f"{i}.wav", "transcript": "שלום"} for i in range(3)]
    for row in rows:
        row["audio"].write_bytes(b"no audio")
    broken = parquet(tmp_path / "broken", rows)
    empty = parquet(tmp_path / "empty", [{"audio": rows[0]["audio"], "transcript": "(...)"}])
    sets = [
        EvaluationSet("few", Source(str(heldout))),
        EvaluationSet("gone", Source(str(tmp_path / "gone"))),
        EvaluationSet("broken", Source(str(broken))),
        EvaluationSet("empty", Source(str(empty))),
    ]
    shutil.copytree(BASE, tmp_path / "half")
    weights = load_file(DEMO / "base" / "model.safetensors")
    save_file(dict(sorted(weights.items())[20:]), tmp_path / "half" / "model.safetensors", {"format": "pt"})
    shutil.copytree(BASE, tmp_path / "torn")
    (tmp_path / "torn" / "model.safetensors").write_bytes((DEMO / "base" / "model.safetensors").read_bytes()[:5000])
    (tmp_path / "no-weights").mkdir()
    for file in ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "base" / file, tmp_path / "no-weights" / file)
    shutil.copytree(DEMO / "base", tmp_path / "no-processor", ignore=shutil.ignore_patterns("processor*", "token*"))
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    others = [str(tmp_path / name) for name in ("no-weights", "no-processor", "bert", "half", "torn")]
    config = settings(tmp_path, heldout, "--compare", *others, sets=sets)
    with pytest.raises(InputError) as problem:
        evaluation.main(config)
    results = results_of(tmp_path / "out")["results"]
    measured = {(r["model"], r["set"]) for r in results if r["reason"] is None}
    assert measured == {("base", "few")} and len(results) == 24
    assert not any("wer" in r for r in results if r["reason"])
    reasons = {(r["model"], r["set"]): r["reason"] for r in results}
    assert "no such folder" in reasons["base", "gone"] and "can be used" in reasons["base", "broken"]
    assert "does not transcribe speech (its model_type is bert)" in reasons["bert", "few"]
    assert "no-weights cannot be loaded" in reasons["no-weights", "few"]
    assert "no-processor cannot be loaded" in reasons["no-processor", "few"]
    assert "weights are missing" in reasons["half", "few"] and "torn cannot be loaded" in reasons["torn", "few"]
    assert "not measured: base on gone" in str(problem.value)
    assert "not measured: " in (tmp_path / "out" / "table.md").read_text()


def of_config(path: str, value):
    """Sets a field of config.json."""

    def spoil(folder):
        content = json.loads((folder / "config.json").read_text())
        *parts, last = path.split(".")
        place = content
        for part in parts:
            place = place[part]
        place[last] = value
        (folder / "config.json").write_text(json.dumps(content))

    return spoil


def of_file(name: str, content):
    return lambda folder: (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (of_config("text_config.vocab_size", 200), "weights are missing or of another size, .*embed_tokens"),
        (of_config("quantization_config", {"quant_method": "fp8"}), "is of quantized weights"),
        (of_config("text_config", None), "text_config is missing or no object"),
        (of_config("text_config", [1]), "text_config is missing or no object"),
        (of_config("text_config.num_attention_heads", 0), "describes no model|num_attention_heads is 0"),
        (of_config("text_config.num_hidden_layers", 1_000_000), "num_hidden_layers is 1000000; it must be"),
        (of_file("generation_config.json", {"max_new_tokens": "many"}), "cannot be loaded"),
        (of_file("processor_config.json", []), "cannot be loaded"),
        (of_file("tokenizer_config.json", []), "cannot be loaded"),
        (of_file("adapter_config.json", {"peft_type": "LORA"}), "merge it first"),
        (
            lambda folder: (folder / "processor_config.json").write_text(
                (folder / "processor_config.json").read_text().replace("128", "80")
            ),
            "feature_size of its processor is 80",
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_loaded_is_refused_in_a_sentence(tmp_path, spoil, message):
    folder = Path(shutil.copytree(BASE, tmp_path / "spoilt"))
    spoil(folder)
    with pytest.raises(InputError, match=message) as problem:
        load_speech_model(str(folder), Decoding(), torch.device("cpu"))
    assert "\n" not in str(problem.value)


def test_an_attention_that_a_checkpoint_names_is_not_taken(tmp_path):
    folder = Path(shutil.copytree(BASE, tmp_path / "named"))
    of_config("_attn_implementation", "flash_attention_2")(folder)
    loaded = load_speech_model(str(folder), Decoding(), torch.device("cpu")).model
    assert {loaded.config.text_config._attn_implementation, loaded.config.audio_config._attn_implementation} == {"sdpa"}


def test_forgetting_is_a_finding_and_a_gate_where_one_is_asked_for(tmp_path, heldout, model, processor, capsys):
    """A checkpoint whose language model was shaken forgets; the base, on itself, does not."""
    shaken = tmp_path / "shaken"
    with torch.no_grad():
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "language_model.layers" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(shaken)
    processor.save_pretrained(shaken)
    sets = [
        EvaluationSet("english", Source(str(DEMO / "english"), split="test[:20]"), "English"),
        EvaluationSet("silence", Source(str(DEMO / "nonspeech"), split="test[:20]"), "None"),
    ]
    evaluation.main(settings(tmp_path, heldout, "--compare", BASE, sets=sets))
    found = results_of(tmp_path / "out")
    assert len(found["gates"]) == 3 and all(gate["passed"] for gate in found["gates"])
    assert found["results"][1]["none_accuracy"] == 100 and found["results"][1]["failures"]["text_on_non_speech"] == 0
    assert found["comparisons"][0]["difference"]["value"] == 0 and not found["comparisons"][0]["more_than_noise"]
    config = settings(tmp_path / "b", heldout, "--compare", BASE, sets=sets)
    config.models[0] = str(shaken)
    evaluation.main(config)  # a finding
    said = capsys.readouterr().out
    assert "forgotten: english: WER" in said and "--max_wer_rise 5" in said
    config.max_wer_rise = 5.0
    with pytest.raises(InputError, match=r"forgotten: english: WER"):  # a gate
        evaluation.main(config)
    others = tmp_path / "others.jsonl"  # of another set: what it is compared with has nothing to gate by
    (first,) = pyarrow.parquet.read_table(next(heldout.glob("*.parquet"))).slice(0, 1)["transcript"].to_pylist()
    others.write_text(json.dumps({"reference": first, "hypothesis": first}) + "\n")
    config.models, config.score = config.models[:1], [str(others)]
    config.sets = [*sets, EvaluationSet("few", Source(str(heldout), split="train[:1]"))]
    with pytest.raises(InputError) as problem:
        evaluation.main(config)
    assert "no gate on english: it was not measured with both models; no gate on silence" in str(problem.value)


def test_the_demo_measures_what_the_first_command_trained(tmp_path):
    def run(name: str, at: int, state: str, **other) -> Path:
        (tmp_path / name).mkdir()
        settings = as_written(demo_training()) | other
        (tmp_path / name / "config.yaml").write_text(json.dumps(settings))
        (tmp_path / name / "status.json").write_text(json.dumps({"state": state}))
        os.utime(tmp_path / name / "status.json", (at, at))
        return tmp_path / name / "final_model"

    run("real", 9, "finished", model_name_or_path="Qwen/Qwen3-ASR-1.7B-hf")
    run("interrupted", 8, "preempted")
    assert evaluation.demo_model(tmp_path) == str(DEMO / "tuned")
    run("older", 1, "finished")
    newer = run("newer", 2, "finished", num_epochs=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "status.json").write_text("[]")
    assert evaluation.demo_model(tmp_path) == str(newer)
    replayed = recipe(["--demo", "--strategy", "muon_with_replay"]).train_sources
    newest = run("with_replay", 3, "finished", train_sources=[dataclasses.asdict(source) for source in replayed])
    assert evaluation.demo_model(tmp_path) == str(newest)


def test_long_recordings_are_cut_at_pauses_and_scored_whole(tmp_path, heldout):
    (file,) = heldout.glob("*.parquet")
    rows = pyarrow.parquet.read_table(file).to_pylist()
    pause, parts, speech, place = np.zeros(12_800, np.float32), [], [], 0
    for row in rows:
        clip = decode_audio(row["audio"])
        speech.append((place / 16_000, (place + len(clip)) / 16_000))
        parts += [clip, pause]
        place += len(clip) + len(pause)
    whole = np.concatenate(parts)
    soundfile.write(tmp_path / "long.flac", whole, 16_000)
    stretches = cut_at_pauses(whole, longest=8.0)
    assert stretches[0][0] == 0 and stretches[-1][1] == len(whole) / 16_000
    assert all(a[1] == b[0] for a, b in itertools.pairwise(stretches))
    assert all(0 < end - start <= 8 for start, end in stretches) and len(stretches) > 3
    inside = [cut for cut, _ in stretches[1:] for start, end in speech if start + 0.05 < cut < end - 0.05]
    assert not inside, "no cut is in a word"
    text = " ".join(row["transcript"] for row in rows)
    data = parquet(tmp_path / "data", [{"audio": tmp_path / "long.flac", "transcript": text}])
    evaluation.main(
        settings(tmp_path, heldout, "--longest_seconds", "4", sets=[EvaluationSet("long", Source(str(data)))])
    )
    (long,) = results_of(tmp_path / "out")["results"]
    assert long["utterances"] == 1 and long["words"] == len(leaderboard_normalize(text).split())
    pieces = []
    for start, end in cut_at_pauses(whole, longest=4.0):
        soundfile.write(tmp_path / "piece.flac", whole[round(start * 16_000) : round(end * 16_000)], 16_000)
        pieces.append({"audio": {"bytes": (tmp_path / "piece.flac").read_bytes()}})
    assert hypotheses_of(tmp_path / "out") == [" ".join(filter(None, transcribe_alone(pieces)))]


def test_batches_are_sorted_within_their_budget_and_hold_everything_once(tmp_path, heldout):
    config = settings(tmp_path, heldout)
    rows = sets_module.load_set(config.sets[0], config)
    pieces = plan(rows, 30.0, workers=0)
    batches = batches_of(pieces, batch_seconds=6.0)
    assert sorted(p for batch in batches for p in batch) == sorted(pieces) and len(pieces) == 11
    assert all(len(batch) == 1 or len(batch) * batch[0].seconds <= 6.0 for batch in batches)
    lengths = [p.seconds for batch in batches for p in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_a_batch_that_does_not_fit_is_done_in_halves(tmp_path, heldout, monkeypatch):
    generate, sizes, most = transformers.Qwen3ASRForConditionalGeneration.generate, [], 3

    def small(self, *args, **kwargs):
        sizes.append(len(kwargs["input_features"]))
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory, as injected by the test")
        return generate(self, *args, **kwargs)

    evaluation.main(settings(tmp_path / "whole", heldout))
    monkeypatch.setattr(transformers.Qwen3ASRForConditionalGeneration, "generate", small)
    evaluation.main(settings(tmp_path / "halves", heldout))
    assert sizes == [11, 5, 2, 3, 6, 3, 3]
    assert hypotheses_of(tmp_path / "halves" / "out") == hypotheses_of(tmp_path / "whole" / "out")
    most = 0
    with pytest.raises(InputError, match="do not fit the memory alone: lower longest_seconds"):
        evaluation.main(settings(tmp_path / "none", heldout))


def test_a_transcript_that_the_limit_cuts_is_counted(tmp_path, heldout):
    evaluation.main(settings(tmp_path, heldout, "--max_new_tokens", "25"))
    (found,) = results_of(tmp_path / "out")["results"]
    assert 0 < found["failures"]["truncated"] <= 11


def test_the_language_can_be_given(tmp_path, heldout):
    evaluation.main(settings(tmp_path, heldout, "--language", "Hebrew", "--context", "ספר"))
    found = results_of(tmp_path / "out")
    assert found["models"][0]["language"] == "given" and found["settings"]["decoding"]["context"] == "ספר"
    assert not any("language" in text for text in hypotheses_of(tmp_path / "out"))


def test_other_speech_models_are_run_by_their_own_pipeline(tmp_path, heldout):
    """A Whisper and a CTC model, small and untrained: what they write is nonsense, and is measured."""
    tokens = ["<|endoftext|>", "<|startoftranscript|>", "<|he|>", "<|transcribe|>", "<|notimestamps|>", *"אבגד "]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "<unk>": 1, "|": 2, "א": 3, "ב": 4}))
    ctc = transformers.Wav2Vec2Config(
        vocab_size=5, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        conv_dim=(8, 8, 8), conv_kernel=(10, 8, 8), conv_stride=(8, 8, 5), num_feat_extract_layers=3,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    transformers.Wav2Vec2ForCTC(ctc).save_pretrained(tmp_path / "ctc")
    transformers.Wav2Vec2Processor(
        transformers.Wav2Vec2FeatureExtractor(), transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "vocab.json"))
    ).save_pretrained(tmp_path / "ctc")
    whisper = transformers.WhisperConfig(
        vocab_size=len(vocabulary), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0, eos_token_id=0,
        bos_token_id=0, decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
        max_target_positions=20,
    )  # fmt: skip
    whisper_model = transformers.WhisperForConditionalGeneration(whisper)
    whisper_model.generation_config.max_length = 20
    whisper_model.save_pretrained(tmp_path / "whisper")
    transformers.WhisperTokenizer(vocab=vocabulary, merges=[], pad_token="<|endoftext|>").save_pretrained(
        tmp_path / "whisper"
    )
    transformers.WhisperFeatureExtractor().save_pretrained(tmp_path / "whisper")
    config = settings(tmp_path, heldout)
    config.models = [str(tmp_path / "ctc"), str(tmp_path / "whisper")]
    evaluation.main(config)
    found = results_of(tmp_path / "out")
    assert [r["reason"] for r in found["results"]] == [None, None]
    assert all(r["wer"]["value"] > 50 and r["language_accuracy"] is None for r in found["results"])
    told = load_speech_model(str(tmp_path / "whisper"), Decoding(), torch.device("cpu")).settings()
    assert told == {"generate_kwargs": {"num_beams": 1, "language": "hebrew", "task": "transcribe"}}
    with pytest.raises(InputError, match="only Qwen3-ASR takes a context"):
        load_speech_model(str(tmp_path / "ctc"), Decoding(context="x"), torch.device("cpu"))


def test_transcripts_made_elsewhere(tmp_path, capsys):
    pairs = [("שלום עולם טוב", "שלום עולם"), ('צה"ל כאן', "צהל כאן"), ("...", "מה"), ("כן", "כן " * 9)]
    for name, cut in (("a", 0), ("b", 1)):
        lines = [{"reference": r, "hypothesis": h if not cut else ""} for r, h in pairs]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    evaluation.command(["--score", *files, "--output_dir", str(tmp_path / "out")])
    first, second = results_of(tmp_path / "out")["results"]
    assert first["wer"]["value"] == pytest.approx(100 * 9 / 6) and second["wer"]["value"] == 100
    assert first["empty_references"] == 1 and first["failures"]["repetition"] == 1 and second["failures"]["empty"] == 4
    assert "a.jsonl" in capsys.readouterr().out
    surrogate = '{"reference": "\\ud800", "hypothesis": ""}'
    seconds = '{"reference": "א", "hypothesis": "", "seconds": NaN}'
    for line, message in (("{", "line 5"), ('{"reference": "א"}', "'hypothesis'"), (surrogate, "5"), (seconds, "5")):
        (tmp_path / "c.jsonl").write_text((tmp_path / "a.jsonl").read_text() + f"\n{line}\n")
        with pytest.raises(InputError, match=message):
            evaluation.command(["--score", str(tmp_path / "c.jsonl"), "--output_dir", str(tmp_path / "out")])
    (tmp_path / "d.jsonl").write_text('{"reference": "...", "hypothesis": ""}\n')
    with pytest.raises(InputError, match="no reference with a word"):
        evaluation.command(["--score", str(tmp_path / "d.jsonl")])


def test_intervals_are_over_recordings_where_utterances_share_them(tmp_path, capsys):
    random = np.random.default_rng(0)
    words, hard = random.integers(4, 15, (20, 8)), random.beta(1.2, 6, (20, 1))
    errors = random.binomial(words, hard)
    names = np.repeat(np.arange(20), 8)
    for shared in (True, False):
        lines = [
            {"reference": "כן " * int(n), "hypothesis": "כן " * int(n - e) + "לא " * int(e)}
            | ({"recording": str(name)} if shared else {})
            for n, e, name in zip(words.flat, errors.flat, names, strict=True)
        ]
        (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
        evaluation.command(["--score", str(tmp_path / "a.jsonl"), "--output_dir", str(tmp_path / "out")])
        (found,) = results_of(tmp_path / "out")["results"]
        assert found["wer"] == dataclasses.asdict(
            error_rate_interval(errors.ravel(), words.ravel(), names if shared else None)
        )
        interval = f"{found['wer']['low']:.2f}–{found['wer']['high']:.2f}"
        said = f"({interval} over 20 recordings)" if shared else f"({interval})"
        assert said in capsys.readouterr().out and said in (tmp_path / "out" / "table.md").read_text()
        page = (tmp_path / "out" / "evaluation.html").read_text()
        assert page.count(f"{found['wer']['high']:.1f} over 20 recordings") == 5 * shared


def test_the_figures_land_in_the_model_card(tmp_path, heldout):
    tuned = tmp_path / "tuned"
    shutil.copytree(BASE, tuned)
    (tuned / "README.md").write_text("---\nlicense: apache-2.0\n---\n\n# tuned\n\nText.\n")
    for _ in range(2):
        config = settings(tmp_path, heldout)
        config.models, config.update_card = [str(tuned)], True
        evaluation.main(config)
    card = huggingface_hub.ModelCard.load(tuned / "README.md")
    (found,) = results_of(tmp_path / "out")["results"]
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values == {metric: round(found[metric]["value"], 2) for metric in ("wer", "cer")}
    assert card.data.license == "apache-2.0" and card.text.count("## Evaluation") == 1 and "Text." in card.text
    assert str(tmp_path) not in (tuned / "README.md").read_text()  # the set's path is not the world's concern

    before = (tuned / "README.md").read_bytes()
    config.sets = [*config.sets, EvaluationSet("gone", Source(str(tmp_path / "client" / "calls")))]
    with pytest.raises(InputError, match=r"not measured: .*the model's card is as it was"):
        evaluation.main(config)
    assert (tuned / "README.md").read_bytes() == before
    for unreadable in (b"---\nlicense: [\n---\n# tuned\n", "---\nlicense: x\n---\nשלום".encode("cp1255")):
        (tuned / "README.md").write_bytes(unreadable)
        config.sets = config.sets[:1]
        with pytest.raises(InputError, match=r"README.md cannot be read, so it has no figures"):
            evaluation.main(config)
        assert (tuned / "README.md").read_bytes() == unreadable


def test_a_folder_of_something_else_is_left_as_it_is(tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"reference": "שלום", "hypothesis": "שלום"}\n')
    for name, content in (("results.json", '{"accuracy": 1}'), ("table.md", "mine"), ("results.json", "[]")):
        folder = tmp_path / f"{name}-{len(content)}"
        folder.mkdir()
        (folder / name).write_text(content)
        with pytest.raises(InputError, match=f"{name} is of no evaluation"):
            evaluation.score_files(evaluation.parse(["--score", str(pairs), "--output_dir", str(folder)]))
        assert (folder / name).read_text() == content
    with pytest.raises(InputError, match="cannot write to"):
        evaluation.score_files(evaluation.parse(["--score", str(pairs), "--output_dir", str(pairs)]))
    for _ in range(2):  # its own it writes again
        evaluation.score_files(evaluation.parse(["--score", str(pairs), "--output_dir", str(tmp_path / "own")]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --model"),
        (["--score", "y", "--compare", "x"], "needs a --model"),
        (["--model", "x", "--prompt_forms", "true", "--language", "Hebrew"], "leave both options out"),
        (["--model", "x", "--sets", "eval-d2"], "no set 'eval-d2': there are eval-d1, whatsapp"),
        (["--model", "x", "--sets", '{"path": "y"}'], "is no set"),
        (["--model", "x", "--sets", "fleurs", '{"name": "fleurs", "path": "y"}'], "two sets have the name fleurs"),
        (["--model", "x", "--max_wer_rise", "inf"], "max_wer_rise takes a number at least 0"),
        (["--model", "x", "--longest_seconds", "0.03"], "longest_seconds must be"),
        (["--model", "x", "--dtype", "float16"], "dtype takes auto, bfloat16 or float32"),
        (["--model", "x", "--update_card"], "needs a local folder"),
        (["--score", "x", "--update_card"], "takes files alone"),
        (["--model", "x", "--demo", "--compare", "none", "--max_wer_rise", "5"], "compares two models"),
        (["--score", "x", "y", "--max_wer_rise", "5"], "compares two models"),
        (["--model", "x", "--compare", "y", "--max_wer_rise", "5"], 'none of --sets is one: .* "guarded": true'),
        (["--model", "x", "--compare", "y", "--sets", own(), "--max_wer_rise", "5"], "none of --sets is one"),
        (["--model", "x", "--language", "he"], "--language is 'he', must be a name like English, or None: Hebrew"),
        (["--model", "x", "--sets", own(language="he")], "is no set: language is 'he', must be a name"),
        (["--model", "x", "--sets", own(language="He")], "is no set: language is 'He', must be a name"),
        (["--model", "x", "--sets", own(split=None)], "is no set: split must not be null"),
        (["--model", "x", "--sets", own(split=3)], "is no set: split takes a text, got 3"),
        (["--model", "x", "--sets", own(channel="left")], "is no set: channel takes a whole number or each or null"),
        (["--model", "x", "--sets", own(text_column=5)], "is no set: text_column takes a text or null"),
        (["--model", "x", "--sets", own(config_name=7)], "is no set: config_name takes a text or null"),
    ],
)
def test_settings_that_cannot_be(arguments, message):
    with pytest.raises(InputError, match=message):
        parse(arguments)


def test_nobody_speaks_where_a_set_says_so_and_not_where_it_says_nothing():
    spoken = {"Hebrew": own(language=None), "English": own(language="English"), "None": own(language="None")}
    for language, one in spoken.items():
        (found,) = parse(["--model", "x", "--sets", one]).sets
        assert found.language == language and found.has_speech == (language != "None")


def test_figures_of_others_stand_beside_the_leaderboards_sets_only():
    assert parse(["--model", "x"]).quoted and parse(["--model", "x", "--sets", own(), "fleurs"]).quoted
    assert not parse(["--model", "x", "--sets", own()]).quoted and not parse(["--demo"]).quoted


def test_a_model_that_names_no_language_any_more_fails_the_gate():
    """`language None`, or no tag at all, is a wrong answer; Whisper, which is never asked, does not fail."""
    one = EvaluationSet("english", Source("x"), "English")
    named = [measuring.record("a cat", Transcript("a cat", language, False)) for language in ("English", "")]
    for record in named:
        record["seconds"], record["recording"] = 1.0, "r"
    results = [
        {"model": model, "set": "english", "reason": None} | measuring.summarize(records, one)
        for model, records in (("tuned", [named[1]] * 10), ("base", [named[0]] * 10))
    ]
    assert [r["language_accuracy"] for r in results] == [0.0, 100.0]
    gates = measuring.forgetting_gates(results, ["tuned", "base"], [one], limit=5.0)
    assert [gate["passed"] for gate in gates] == [True, False]
    results[0]["language_accuracy"] = None
    assert [g["passed"] for g in measuring.forgetting_gates(results, ["tuned", "base"], [one], 5.0)] == [True]
    results[0]["wer"] = None
    assert [g["passed"] for g in measuring.forgetting_gates(results, ["tuned", "base"], [one], 5.0)] == [False]


def test_audio_that_changed_is_transcribed_again(tmp_path, heldout):
    """A folder's files have the same names as before, and another content."""
    (file,) = heldout.glob("*.parquet")
    rows = pyarrow.parquet.read_table(file).to_pylist()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "metadata.csv").write_text("file_name,text\na.wav,שלום\n")
    written = []
    for row in rows[:2]:
        soundfile.write(folder / "a.wav", decode_audio(row["audio"]), 16_000)
        evaluation.main(settings(tmp_path, folder))
        written += hypotheses_of(tmp_path / "out")
    assert written[0] != written[1] and written == transcribe_alone(rows[:2])


def test_an_evaluation_takes_the_limits_of_training(tmp_path):
    folder, clip = tmp_path / "set", np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)
    folder.mkdir()
    for name, sound in {"short": clip[:3000], "long": np.tile(clip, 40), "silent": 0 * clip, "right": clip}.items():
        soundfile.write(folder / f"{name}.wav", sound, 16_000)
    (folder / "metadata.csv").write_text("file_name,text\n" + "".join(f"{p.name},שלום\n" for p in folder.glob("*.wav")))
    one = json.dumps({"name": "few", "path": str(folder)})
    options = ["--model", "x", "--sets", one, "--num_workers", "0"]
    assert len(sets_module.load_set(parse(options).sets[0], parse(options))) == 4
    options += ["--min_audio_length_seconds", "0.3", "--max_audio_length_seconds", "30", "--drop_silent"]
    rows = sets_module.load_set(parse(options).sets[0], parse(options))
    assert [name.rsplit("/")[-1] for name in rows.column("recording")] == ["right.wav"]
    reasons = {drop.reason: drop.utterances for drop in rows.dropped}
    assert reasons == {"shorter than 0.3 s": 1, "longer than 30 s": 1, "silent": 1}
    config = parse([*options, "--min_audio_length_seconds", "99"])
    with pytest.raises(InputError, match=r"nothing is left within the limits: .'shorter than 99 s': 4."):
        sets_module.load_set(config.sets[0], config)


def test_pieces_that_are_lost_are_missed(tmp_path):
    line = {"pieces": [(0, 0)], "transcripts": [("א", "", False)], "seconds": [1.0], "snr_db": [None], "of": [2]}
    line |= {"took_seconds": 1.0, "peak_memory_gb": 1.0}
    (tmp_path / "0.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match="1 transcripts are not in"):
        read_transcripts(tmp_path, 1)
    (tmp_path / "1.jsonl").write_text(json.dumps(line | {"pieces": [(0, 1)], "transcripts": [("ב", "", True)]}) + "\n")
    (joined,) = read_transcripts(tmp_path, 1).transcripts
    assert joined.text == "א ב" and joined.truncated
