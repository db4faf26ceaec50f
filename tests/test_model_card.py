"""The README.md of a final model: its snippet as a user runs it, and nothing of this machine."""

import io
import itertools
import re
import shutil
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import soundfile
import transformers
from test_transcribe import encode

from hebrew_asr.checkpoints.model_card import renamed, settings_of, write_model_card
from hebrew_asr.errors import InputError
from hebrew_asr.files import DEMO
from hebrew_asr.training.run_folder import name_in_card
from hebrew_asr.training.run_report import describe_result

RATE = 16_000


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `final_model`, whose card names folders that are here."""
    place = tmp_path_factory.mktemp("card")
    model = place / "final_model"
    shutil.copytree(DEMO / "tuned", model)
    final = {f"final/{name}": 12.0 for name in ("wer", "cer", "wer_raw", "utterances")}
    final |= {"final/wer_low": 9.5, "final/wer_high": 15.25}
    corpus, heldout = str(DEMO / "corpus"), str(DEMO / "heldout")
    settings = {"eval_prefill_language": False, "model_name_or_path": str(DEMO / "base"), "language": "Hebrew"}
    settings |= {"train_sources": [{"path": corpus}], "hf_repo_id": "a/b", "text_rules": {"quote_style": "/"}}
    write_model_card(model, str(model), str(DEMO / "base"), [corpus], [heldout], final, "Weights.", settings, [])
    return place


@pytest.fixture(scope="module")
def clip():
    (file,) = (DEMO / "heldout").glob("*.parquet")
    audio = pyarrow.parquet.read_table(file).slice(0, 1)["audio"][0].as_py()["bytes"]
    return soundfile.read(io.BytesIO(audio), dtype="float32")[0]


def test_a_card_goes_with_its_model_to_another_repository(place, tmp_path):
    """As if it had been written for it; what its user wrote instead stays."""
    final = {f"final/{name}": 12.0 for name in ("wer", "cer", "wer_raw", "utterances")}
    settings = {"eval_prefill_language": False, "language": "Hebrew", "text_rules": {"quote_style": "hebrew"}}
    cards = {}
    for base in (str(place / "final_model"), "OzLabs/hebrew"):
        for name in (str(place / "final_model"), "OzLabs/hebrew", "OzLabs/hebrew-2"):
            write_model_card(tmp_path, name, base, ["OzLabs/hebrew"], ["set"], final, "Weights.", settings, [])
            cards[base, name] = (tmp_path / "README.md").read_text()
    for (base, before), (other, after) in itertools.permutations(cards, 2):
        if base == other and "/final_model" not in after:
            assert renamed(cards[base, before], after) == cards[base, after]
    (local, hub), lines = (cards[key] for key in list(cards)[:2]), []
    named = local.replace("- name: final_model", "- name: RUN/final_model")  # as the evaluation's --update_card does
    for card, expected in ((named, hub), ("# Mine\n", "# Mine\n"), (local + "\nMy words.", hub + "\nMy words.")):
        (tmp_path / "README.md").write_text(card)
        name_in_card(tmp_path / "README.md", "OzLabs/hebrew", lines.append)
        assert (tmp_path / "README.md").read_text() == expected
    name_in_card(tmp_path, "OzLabs/hebrew", lines.append)
    assert [line.split(":")[0] for line in lines] == ["warning"]


def test_a_card_that_the_disk_does_not_take_is_one_sentence(place, config):
    folder = place / "not there" / "final_model"
    final = {f"final/{name}": 12.0 for name in ("wer", "cer", "wer_raw", "utterances")}
    trainer: Any = SimpleNamespace(config=config, run_log=None, final_folder=folder, final_origin="Weights.")
    with pytest.raises(InputError, match=r"the card of .*final_model cannot be written \(.*make room, then the same"):
        describe_result(trainer, final)


def run_snippet(place, monkeypatch, capsys, file: str) -> str:
    monkeypatch.chdir(place)
    card = (place / "final_model" / "README.md").read_text(encoding="utf-8")
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    exec(compile(snippet.replace("speech.wav", file), "snippet", "exec"), {})
    return capsys.readouterr().out.strip()


def test_the_snippet_works_on_every_format(place, clip, monkeypatch, capsys):
    soundfile.write(place / "a.flac", clip, RATE)
    soundfile.write(place / "a.wav", np.stack([clip, clip], axis=1), RATE)
    soundfile.write(place / "a.mp3", clip, RATE)
    encode(place / "a.m4a", clip, "aac", 48_000)
    encode(place / "a.mkv", clip, "libopus", 48_000)
    texts = {name: run_snippet(place, monkeypatch, capsys, name) for name in ("a.flac", "a.wav")}
    assert re.search("[א-ת]", texts["a.flac"]) and texts["a.wav"] == texts["a.flac"]
    for name in ("a.mp3", "a.m4a", "a.mkv"):
        assert re.search("[א-ת]", run_snippet(place, monkeypatch, capsys, name)), name


def test_the_snippet_refuses_what_it_would_cut_off(place, clip, monkeypatch, capsys):
    soundfile.write(place / "long.wav", np.tile(clip, 20), RATE)
    with pytest.raises(SystemExit, match="longer than 30 s and would be cut off"):
        run_snippet(place, monkeypatch, capsys, "long.wav")

    soundfile.write(place / "short.wav", clip, RATE)
    generate = transformers.Qwen3ASRForConditionalGeneration.generate

    def without_end(self, **inputs):
        return generate(self, **inputs)[:, :-1]

    monkeypatch.setattr(transformers.Qwen3ASRForConditionalGeneration, "generate", without_end)
    with pytest.raises(SystemExit, match="does not end"):
        run_snippet(place, monkeypatch, capsys, "short.wav")


def test_the_card_shows_no_folder_of_this_machine(place):
    card = (place / "final_model" / "README.md").read_text(encoding="utf-8")
    assert str(DEMO) not in card and str(place) not in card and "a/b" not in card
    assert (
        "local: base` fine-tuned" in card
        and "| local: heldout | 12.0 | 12.00 (9.50–15.25) |" in card
        and 'model_id, file, longest = "final_model"' in card
    )
    assert "transcribe_hebrew_asr.py FILE_OR_FOLDER --model final_model" in card
    settings = settings_of(card)
    assert settings["model_name_or_path"] == "local: base"
    assert settings["train_sources"] == [{"path": "local: corpus"}]
    assert settings["text_rules"] == {"quote_style": "/"} and settings["language"] == "Hebrew"
