"""Engines of the evaluation: a server's answers, CTranslate2's folders, languages of sets, prompts, missing sets."""

import dataclasses
import importlib.util
import io
import json
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jiwer
import numpy as np
import pyarrow.parquet
import pytest
import soundfile
import torch
from conftest import DEMO, ROOT
from test_evaluation import BASE, hypotheses_of, results_of, settings
from test_scoring import leaderboard

import evaluate_hebrew_asr as evaluation
from hebrew_asr.data.audio import decode_audio
from hebrew_asr.data.sources import Source
from hebrew_asr.errors import InputError
from hebrew_asr.evaluation import engines, transcription
from hebrew_asr.evaluation import sets as sets_module
from hebrew_asr.evaluation.engines import EndpointModel, open_engine
from hebrew_asr.evaluation.recordings import transcribe
from hebrew_asr.evaluation.settings import LEADERBOARD, Decoding, EvaluationSet, read_set

CPU = torch.device("cpu")


class Server:
    """A stand-in for vLLM: it serves `models`, and answers with the seconds that it heard, or as `fails` says."""

    def __init__(self, *models: str):
        self.models, self.fails, self.requests = models, lambda number: None, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def reply(self, status: int, content: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_GET(self):
                self.reply(200, json.dumps({"data": [{"id": name} for name in outer.models]}).encode())

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                parts = body.split(b"--" + self.headers["Content-Type"].split("boundary=")[1].encode())
                fields = {}
                for part in parts[1:-1]:
                    head, _, content = part[2:-2].partition(b"\r\n\r\n")
                    fields[head.split(b'name="')[1].split(b'"')[0].decode()] = content
                outer.requests.append({name: value.decode() for name, value in fields.items() if name != "file"})
                if (failure := outer.fails(len(outer.requests))) is not None:
                    return self.reply(*failure)
                samples, rate = soundfile.read(io.BytesIO(fields["file"]))
                text = f"language Hebrew<asr_text>{len(samples)} {rate}"
                return self.reply(200, json.dumps({"text": text}).encode())

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(engines, "FIRST_WAIT_SECONDS", 0.01)
    one = Server("qwen", "other")
    yield one
    one.close()


def test_an_endpoint_stands_in_the_table_beside_a_model_and_transcripts_made_elsewhere(tmp_path, heldout, server):
    """With a 500 in between: what was transcribed is kept, the rest is done, and the same command ends it."""
    (file,) = heldout.glob("*.parquet")
    table = pyarrow.parquet.read_table(file).to_pylist()
    lines = [{"reference": row["transcript"], "hypothesis": row["transcript"]} for row in table]
    (tmp_path / "right.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "short.jsonl").write_text("\n".join(map(json.dumps, lines[:-1])))
    arguments = ["--endpoint", server.url, "--score", str(tmp_path / "right.jsonl"), "--batch_seconds", "3"]
    server.fails = lambda number: (500, b"out of\nmemory") if number > 5 else None
    with pytest.raises(InputError, match=r"not measured: .*/audio/transcriptions answers 500: out of memory"):
        evaluation.main(settings(tmp_path, heldout, *arguments))
    found = {r["model"]: r for r in results_of(tmp_path / "out")["results"]}
    assert found["base"]["reason"] is None and found["right.jsonl"]["wer"]["value"] == 0
    kept = sum(len(f.read_text().splitlines()) for f in (tmp_path / "out" / "transcripts").glob("*/0.jsonl"))
    server.fails, before = lambda number: None, len(server.requests)
    evaluation.main(settings(tmp_path, heldout, *arguments))
    again = len(server.requests) - before
    assert kept and 0 < again < 11, "what was transcribed is not asked for again"
    results = results_of(tmp_path / "out")
    rows = pyarrow.parquet.read_table(tmp_path / "out" / "utterances.parquet").to_pylist()
    heard = [row["hypothesis"] for row in rows if row["model"] == server.url]
    assert all(
        text.endswith(" 16000") and abs(int(text.split()[0]) - 16_000 * row["seconds"]) < 3
        for text, row in zip(heard, [row for row in rows if row["model"] == server.url], strict=True)
    )
    assert [m["language"] for m in results["models"]] == ["free", "free", "free"]
    assert {row["detected_language"] for row in rows if row["model"] == server.url} == {"Hebrew"}
    assert server.requests[-1]["model"] == "qwen" and "language" not in server.requests[-1]
    assert len(results["comparisons"]) == 2
    arguments = ["--score", str(tmp_path / "short.jsonl")]
    with pytest.raises(InputError, match="does not have the references of few, in their order"):
        evaluation.main(settings(tmp_path, heldout, *arguments))


def test_an_endpoint_transcribes_recordings(tmp_path, server):
    speech = decode_audio(pyarrow.parquet.read_table(next((DEMO / "heldout").glob("*.parquet")))["audio"][0].as_py())
    soundfile.write(tmp_path / "call.flac", speech, 16_000)
    (recording,) = transcribe(tmp_path / "call.flac", server.url)
    samples, rate = map(int, recording.text.split())
    assert rate == 16_000 and abs(samples - len(speech)) < 16_000 and recording.language == "Hebrew"
    assert not recording.segments[0].words, "an endpoint says no times"


def test_a_clip_that_an_endpoint_refuses_is_its_recordings_problem(tmp_path, server):
    clips = pyarrow.parquet.read_table(next((DEMO / "heldout").glob("*.parquet")))["audio"].to_pylist()
    for number, clip in enumerate(clips[:4]):
        (tmp_path / f"{number}.opus").write_bytes(clip["bytes"])
    given = {"paths": tmp_path, "model": server.url, "formats": ["text"], "output_dir": tmp_path / "out"}
    answers = iter([(400, b"too short"), (413, b""), (422, b"\x1b[31mred"), None, (401, b"no key")])
    server.fails = lambda number: next(answers)
    found = transcribe(**given)
    assert sorted(one.problem.split("answers ")[1][:3] if one.problem else "" for one in found) == [
        "",
        "400",
        "413",
        "422",
    ]
    assert sum("answers 400: too short" in (one.problem or "") for one in found) == 1
    with pytest.raises(InputError, match="answers 401: no key") as ended:
        server.fails = lambda number: (401, b"no key")
        transcribe(**given)
    assert not isinstance(ended.value, engines.ClipsRefused)
    server.fails, before = lambda number: None, len(server.requests)
    assert all(one.problem is None for one in transcribe(**given))
    assert len(server.requests) == before + 3, "the one that was transcribed is kept"


def test_an_endpoint_that_cannot_be_used_is_one_sentence(server, monkeypatch):
    with pytest.raises(InputError, match="serves qwen, other, not third"):
        EndpointModel(f"{server.url}#third", Decoding())
    assert EndpointModel(f"{server.url}#other", Decoding()).model == "other"
    model = EndpointModel(server.url.removesuffix("/v1"), Decoding())
    clip = model.features(torch.zeros(16_000).numpy())
    for failure, message in (
        ((404, b'{"error": "no such model"}'), "answers 404: .*no such model"),
        ((200, b"<html>"), "what is no JSON object: <html>"),
        ((200, b'{"texts": []}'), "answers without a text"),
    ):
        server.fails = lambda number, failure=failure: failure
        with pytest.raises(InputError, match=message):
            model.transcribe([clip], [1.0])
    asked = len(server.requests)
    server.fails = lambda number: (503, b"") if number < asked + 3 else None
    (transcript,) = model.transcribe([clip], [1.0])
    assert transcript.text == "16000 16000" and len(server.requests) == asked + 3, "it is asked again"
    silent = threading.Event()
    monkeypatch.setattr(engines, "ANSWER_SECONDS", 0.2)
    server.fails = lambda number: silent.wait(5) or None
    with pytest.raises(InputError, match=r"has not answered in 0\.2 s"):
        EndpointModel(server.url, Decoding()).transcribe([clip], [1.0])
    silent.set()
    with pytest.raises(InputError, match=r"does not answer .*: is the server running"):
        EndpointModel("http://127.0.0.1:9/v1", Decoding())


def test_the_language_is_the_sets(tmp_path, heldout, server):
    """`--language` says that one is given; which, the set says. Whisper is given one always."""
    sets = [
        EvaluationSet("hebrew", Source(str(heldout))),
        EvaluationSet("english", Source(str(DEMO / "english"), split="test[:2]"), "English"),
        EvaluationSet("silence", Source(str(DEMO / "nonspeech"), split="test[:2]"), "None"),
    ]

    def languages(*arguments) -> list[str | None]:
        server.requests.clear()
        config = settings(tmp_path, heldout, "--output_dir", str(tmp_path / f"out{len(list(tmp_path.iterdir()))}"))
        config.models, config.sets = [server.url], sets
        config.decoding = dataclasses.replace(config.decoding, **dict(arguments))
        evaluation.main(config)
        return list(dict.fromkeys(request.get("language") for request in server.requests))

    assert languages() == [None]
    assert languages(("language", "Hebrew")) == ["he", "en"], "and Hebrew again where nobody speaks"
    server.models = ("whisper-large-v3",)
    assert languages() == ["he", "en"]


def test_a_ctranslate2_folder(tmp_path, heldout, monkeypatch):
    """With a stand-in for faster-whisper: what it is given is what ivrit.ai's engine gives, with the set's language."""
    folder, given = tmp_path / "ct2", []
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.bin").write_bytes(b"weights")

    class WhisperModel:
        def __init__(self, path, **settings):
            assert path == str(folder) and settings["compute_type"] == "float32"

        def transcribe(self, waveform, **settings):
            given.append(settings | {"seconds": len(waveform) / 16_000})
            return (types.SimpleNamespace(text=text) for text in (" שלום", " עולם ")), None

    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(InputError, match="uv sync --group engines"):
        open_engine(str(folder), Decoding(), CPU)
    monkeypatch.setitem(sys.modules, "faster_whisper", types.SimpleNamespace(WhisperModel=WhisperModel))
    with pytest.raises(InputError, match=r"ct2 has no tokenizer\.json"):
        open_engine(str(folder), Decoding(), CPU)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="only Qwen3-ASR takes a context"):
        open_engine(str(folder), Decoding(context="x"), CPU)
    config = settings(tmp_path, heldout, "--longest_seconds", "1")
    config.models = [str(folder)]
    config.sets = [*config.sets, EvaluationSet("english", Source(str(DEMO / "english"), split="test[:2]"), "English")]
    evaluation.main(config)
    assert [g["language"] for g in given] == ["he"] * 11 + ["en"] * 2 and max(g["seconds"] for g in given) > 1
    assert {(g["beam_size"], g["task"]) for g in given} == {(5, "transcribe")}
    assert set(hypotheses_of(tmp_path / "out")) == {"שלום עולם"}
    assert results_of(tmp_path / "out")["models"][0]["decoding"] == "5 beams"


def test_each_form_of_the_prompt_is_measured(tmp_path, heldout, processor):
    """The forms are the tokens that engines send; one model has a row for each, and the gates compare no forms."""
    evaluation.main(settings(tmp_path, heldout, "--prompt_forms", "true", "--context", "ספר"))
    found = results_of(tmp_path / "out")
    names = [f"base [{form}]" for form in ("empty-system", "no-system", "language", "no-system-language", "context")]
    assert [model["name"] for model in found["models"]] == names and len(found["comparisons"]) == 4
    assert "| few | base \\[empty-system\\] | base \\[no-system\\] | " in (tmp_path / "out" / "table.md").read_text()
    model = open_engine(BASE, Decoding(), CPU)
    config = settings(tmp_path, heldout, "--prompt_forms", "true", "--context", "ספר")
    user = "<|im_start|>user\n<|audio_start|><|audio_end|><|im_end|>\n<|im_start|>assistant\n"
    starts = {"empty-system": "<|im_start|>system\n<|im_end|>\n", "context": "<|im_start|>system\nספר<|im_end|>\n"}
    starts["language"] = starts["empty-system"]
    for way in engines.ways_of(model, config):
        decoding = way.decoding
        context = decoding.context if decoding.system_turn else None
        prompt = processor.tokenizer.decode(model.prompts.prompt(0, context))
        assert prompt == starts.get(way.form, "") + user
        assert (decoding.language is not None) == way.form.endswith("language")


def test_numbers_of_beams_are_measured_side_by_side(tmp_path, heldout, monkeypatch):
    given, generate = [], transcription.generate

    def noted(*args, num_beams, **others):
        given.append(num_beams)
        return generate(*args, num_beams=num_beams, **others)

    monkeypatch.setattr(transcription, "generate", noted)
    evaluation.main(settings(tmp_path, heldout, "--decodings", "true"))
    found = results_of(tmp_path / "out")
    assert given == [1, 2, 4, 8]
    assert [model["decoding"] for model in found["models"]] == ["greedy", "2 beams", "4 beams", "8 beams"]
    assert [comparison["second"] for comparison in found["comparisons"]] == [f"base [{n} beams]" for n in (2, 4, 8)]
    with pytest.raises(InputError, match="chooses the beams"):
        settings(tmp_path, heldout, "--decodings", "true", "--num_beams", "4")


def test_a_set_that_was_not_asked_for_may_be_missing(tmp_path, heldout, monkeypatch, capsys):
    gone = EvaluationSet("common-voice", Source(str(tmp_path / "gone"), "he", split="test"), where="Get it there")
    here = EvaluationSet("few", Source(str(heldout), split="train"))
    monkeypatch.setattr(evaluation, "LEADERBOARD", [here, gone])
    arguments = ["--model", BASE, "--output_dir", str(tmp_path / "out"), "--num_workers", "0"]
    evaluation.main(evaluation.parse(arguments))
    assert "Get it there" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"not measured: base on common-voice .*Get it there"):
        evaluation.main(evaluation.parse([*arguments, "--sets", "common-voice"]))
    monkeypatch.setattr(evaluation, "LEADERBOARD", [gone])
    with pytest.raises(InputError, match="nothing could be measured"):
        evaluation.main(evaluation.parse(arguments))


def test_common_voice_from_its_archive(tmp_path, heldout):
    """As Mozilla packs it: tables of every split beside clips/, with the sentences in a column of their own."""
    (file,) = heldout.glob("*.parquet")
    rows = pyarrow.parquet.read_table(file).to_pylist()
    folder = tmp_path / "cv-corpus" / "he"
    (folder / "clips").mkdir(parents=True)
    header = "client_id\tpath\tsentence_id\tsentence\tup_votes\tdown_votes\n"
    for split, part in (("train", rows[:2]), ("test", rows[2:7]), ("dev", rows[7:])):
        lines = []
        for i, row in enumerate(part):
            (folder / "clips" / f"{split}{i}.ogg").write_bytes(row["audio"]["bytes"])
            lines.append(f"c{i}\t{split}{i}.ogg\ts{i}\t{row['transcript']}\t2\t0\n")
        (folder / f"{split}.tsv").write_text(header + "".join(lines))
    known = {one.name: one for one in LEADERBOARD}
    one = read_set(f"common-voice={folder}", known)
    found = sets_module.load_set(one, settings(tmp_path, heldout))
    assert found.column("reference") == [row["transcript"] for row in rows[2:7]] and len(found) == 5
    with pytest.raises(InputError, match="no set 'coommon'"):
        read_set(f"coommon={folder}", known)


def test_the_harness_of_the_leaderboard_finds_the_same_rate(tmp_path, heldout):
    """Its calling convention, written again: a file that is imported by its path, threads, one entry at a time."""
    spec = importlib.util.spec_from_file_location("engine", ROOT / "scripts" / "ivrit_ai_engine.py")
    engine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(engine)
    transcribe = engine.create_app(model_path=BASE, device="auto")
    (file,) = heldout.glob("*.parquet")
    rows = pyarrow.parquet.read_table(file).to_pylist()
    entries = [{"audio": {"array": decode_audio(row["audio"]), "sampling_rate": 16_000}} for row in rows]
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(transcribe, entries))
    assert all(isinstance(text, str) and seconds > 0 for text, seconds in answers)
    words = jiwer.process_words([leaderboard(r["transcript"]) for r in rows], [leaderboard(a) for a, _ in answers])
    evaluation.main(settings(tmp_path, heldout))
    (found,) = results_of(tmp_path / "out")["results"]
    assert found["wer"]["value"] == pytest.approx(100 * words.wer, abs=1e-6)
    assert found["wil"] == pytest.approx(100 * words.wil, abs=1e-6)
    long = {"array": np.tile(entries[0]["audio"]["array"], 20)[: 40 * 16_000], "sampling_rate": 16_000}
    text, _ = transcribe({"audio": long})
    assert len(text.split()) > 2 * len(answers[0][0].split()), "what is longer than the model hears is cut"
