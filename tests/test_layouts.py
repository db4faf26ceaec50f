"""A checkpoint goes into the other layout and back without a bit changed, and loads from either."""

import dataclasses
import errno
import io
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import soundfile
import tokenizers
import torch
import transformers
from conftest import DEMO
from safetensors.torch import load_file, save_file

from hebrew_asr.checkpoints.model_card import SERVE
from hebrew_asr.errors import InputError
from hebrew_asr.evaluation.settings import Decoding
from hebrew_asr.evaluation.transcription import load_speech_model
from hebrew_asr.model import layouts
from hebrew_asr.model.costs import real_config
from hebrew_asr.model.layouts import convert, expected_shapes, in_transformers_layout, layout_of, renamed
from hebrew_asr.model.loading import load_model
from hebrew_asr.training.plan import model_config
from scripts import convert_layout
from train_hebrew_asr_enhanced import main

TUNED = DEMO / "tuned"
WEIGHTS = "model.safetensors"
EMBEDDING, HEAD = "thinker.model.embed_tokens.weight", "thinker.lm_head.weight"


@pytest.fixture(scope="session")
def older(tmp_path_factory) -> Path:
    """The demo's tuned checkpoint in the older layout."""
    folder = tmp_path_factory.mktemp("layouts") / "older"
    convert(TUNED, folder, "thinker")
    return folder


@pytest.fixture
def copy(older, tmp_path) -> Path:
    return Path(shutil.copytree(older, tmp_path / "copy"))


@pytest.fixture
def home(monkeypatch, tmp_path) -> Path:
    """A cache of its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hebrew_asr" / "layouts"


def read(file: Path) -> dict:
    return json.loads(file.read_text())


def edit(file: Path, change) -> None:
    content = read(file)
    change(content)
    file.write_text(json.dumps(content))


def edit_weights(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def split(folder: Path, files: int = 3) -> None:
    """Shards a checkpoint, the n-th tensor into the n-th file in turn."""
    tensors = load_file(folder / WEIGHTS)
    names = [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
    placed = {name: names[i % files] for i, name in enumerate(tensors)}
    for file in names:
        save_file({n: t for n, t in tensors.items() if placed[n] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / WEIGHTS).unlink()


def assert_same(one: Path, other: Path) -> None:
    """The same files but for the card and the manifest: weights to the byte, JSON by content, text to the letter."""
    left_out = {"README.md", "manifest.json"}
    names = {file.name for file in one.iterdir()} - left_out
    assert names == {file.name for file in other.iterdir()} - left_out
    for name in names:
        same = (one / name).read_bytes() == (other / name).read_bytes()
        assert same or (name.endswith(".json") and read(one / name) == read(other / name)), name


def test_there_and_back_is_the_same(older, tmp_path):
    convert(older, tmp_path / "back", "transformers")
    assert_same(TUNED, tmp_path / "back")
    assert (layout_of(TUNED), layout_of(older)) == ("transformers", "thinker")


def test_there_and_back_sharded(tmp_path):
    own = Path(shutil.copytree(TUNED, tmp_path / "own"))
    split(own)
    convert(own, tmp_path / "older", "thinker")
    convert(tmp_path / "older", tmp_path / "back", "transformers")
    assert_same(own, tmp_path / "back")
    assert all(name.startswith("thinker.") for f in (tmp_path / "older").glob("*.safetensors") for name in load_file(f))


def test_what_the_older_layout_says(older):
    """Against the fields that the older library reads, written down apart from the conversion."""
    config, weights = read(older / "config.json")["thinker_config"], load_file(older / WEIGHTS)
    text, audio = config["text_config"], config["audio_config"]
    assert text["rope_theta"] == 10000 and "rope_parameters" not in text and text["tie_word_embeddings"] is True
    assert sum(text["rope_scaling"]["mrope_section"]) == text["head_dim"] / 2
    assert audio["num_hidden_layers"] == audio["encoder_layers"] == 3 and audio["output_dim"] == 144
    assert (config["audio_token_id"], config["audio_start_token_id"], config["audio_end_token_id"]) == (5, 3, 4)
    own = load_file(TUNED / WEIGHTS)
    for thinker, name in {
        EMBEDDING: "model.language_model.embed_tokens.weight",
        "thinker.audio_tower.proj2.bias": "model.multi_modal_projector.linear_2.bias",
        "thinker.audio_tower.layers.1.fc1.weight": "model.audio_tower.layers.1.fc1.weight",
    }.items():
        assert torch.equal(weights[thinker], own[name])
    tokenizer = read(older / "tokenizer_config.json")
    assert tokenizer["additional_special_tokens"] == [] and tokenizer["extra_special_tokens"]["audio_token"]
    assert read(older / "chat_template.json")["chat_template"] == (TUNED / "chat_template.jinja").read_text()
    assert read(older / "preprocessor_config.json")["feature_extractor_type"] == "WhisperFeatureExtractor"


def test_every_weight_of_the_full_size():
    shapes = expected_shapes(real_config().to_dict(), Path("config.json"))
    older = {renamed(name, "thinker"): shape for name, shape in shapes.items()}
    assert len(older) == len(shapes) == 708
    assert {renamed(name, "transformers"): shape for name, shape in older.items()} == shapes
    head = np.prod(older.pop(HEAD))
    assert sum(int(np.prod(shape)) for shape in older.values()) == 2_038_052_480 and head == 151_936 * 2048
    parts = Counter(re.sub(r"\.\d+\.", ".N.", name).split(".N.")[0].rsplit(".", 1)[0] for name in older)
    assert parts["thinker.model"] == 28 * 11 and parts["thinker.audio_tower"] == 24 * 16
    assert parts["thinker.audio_tower.proj1"] == parts["thinker.audio_tower.proj2"] == 2


def remove(name):
    return lambda folder: edit_weights(folder, lambda tensors: tensors.pop(name))


def add(name, make):
    return lambda folder: edit_weights(folder, lambda tensors: tensors.update({name: make(tensors)}))


def setting(path: str, value=None):
    """Sets a field of config.json's thinker_config, or removes it."""

    def change(config):
        *parts, name = ["thinker_config", *path.split(".")]
        for part in parts:
            config = config[part]
        config.pop(name, None) if value is None else config.__setitem__(name, value)

    return lambda folder: edit(folder / "config.json", change)


def tear(name, left):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:left])


def sharded(change):
    def apply(folder):
        split(folder)
        edit(folder / "model.safetensors.index.json", lambda index: change(index["weight_map"]))

    return apply


def only_pickles(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove("thinker.audio_tower.proj1.bias"), "1 weights are missing, thinker.audio_tower.proj1.bias"),
        (
            add("thinker.talker.weight", lambda t: torch.zeros(2)),
            "holds thinker.talker.weight, which Qwen3-ASR does not",
        ),
        (add("lm_head.weight", lambda t: t[EMBEDDING].clone()), "holds lm_head.weight, which Qwen3-ASR does not have"),
        (
            add("thinker.model.norm.weight", lambda t: torch.zeros(7)),
            r"norm.weight has the shape \[7\], .* for \[144\]",
        ),
        (add(HEAD, lambda t: t[EMBEDDING] + 1), "differs from the embedding, but config.json ties"),
        (setting("text_config.tie_word_embeddings", False), "weights are missing, thinker.lm_head.weight"),
        (tear(WEIGHTS, 1_000_000), "model.safetensors is not there or not whole"),
        (tear(WEIGHTS, 100), "model.safetensors is not there or not whole"),
        (only_pickles, "save the weights as safetensors"),
        (
            sharded(lambda m: m.update({EMBEDDING: "../../x.safetensors"})),
            "is '../../x.safetensors', no safetensors",
        ),
        (
            sharded(lambda m: m.update({EMBEDDING: "absent.safetensors"})),
            "absent.safetensors is not there or not whole",
        ),
        (sharded(lambda m: m.pop(EMBEDDING)), f"does not say that {EMBEDDING} is in model-0"),
        (sharded(lambda m: m.clear()), "weight_map is missing"),
        (tear("config.json", 50), "config.json cannot be read"),
        (setting("text_config"), "config.json: thinker_config.text_config is missing"),
        (setting("text_config.head_dim"), "config.json: thinker_config.text_config.head_dim is missing"),
        (setting("audio_config.encoder_layers", 10**9), "audio_config.encoder_layers is 1000000000; it must be"),
        (setting("audio_config.d_model", -1), "thinker_config.audio_config.d_model is -1"),
        (setting("text_config.vocab_size", True), "text_config.vocab_size is True"),
        (setting("audio_config.encoder_attention_heads", 5), "encoder_attention_heads does not divide d_model"),
        (setting("audio_config.encoder_layers", 4), r"weights are missing, thinker.audio_tower.layers.3"),
        (setting("text_config.rope_theta"), "thinker_config.text_config.rope_theta is missing"),
        (setting("text_config.rope_scaling", {"type": "yarn"}), "rope_scaling is of type 'yarn'"),
        (setting("text_config.hidden_act", "import os"), "config.json describes no model"),
        (setting("audio_token_id", 151646), "audio_token_id is 151646, but the tokenizer's <|audio_pad|> is 5"),
        (setting("classify_num", 5000), "is of a forced aligner"),
        (
            lambda folder: edit(folder / "tokenizer_config.json", lambda c: c.update(additional_special_tokens=7)),
            "a field that is not of the kind its library writes",
        ),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json, and no vocab.json"),
        (tear("tokenizer.json", 300), "tokenizer.json is not there or no tokenizer"),
        (lambda folder: (folder / "chat_template.json").unlink(), "has no chat template"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "preprocessor_config.json cannot be read"),
    ],
)
def test_a_spoilt_checkpoint_is_refused_in_a_sentence(copy, tmp_path, spoil, message):
    spoil(copy)
    with pytest.raises(InputError, match=message):
        convert(copy, tmp_path / "out", "transformers")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["copy"], "nothing of the target is left"


def drop_rope_scaling(folder):
    setting("text_config.rope_scaling")(folder)


def wrong_generation(folder):
    wrong = {"eos_token_id": 7, "do_sample": True, "temperature": 1e-6, "top_k": 1, "max_new_tokens": 128}
    (folder / "generation_config.json").write_text(json.dumps(wrong | {"transformers_version": "5.23.0"}))


def call_for_code(folder):
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        edit(
            folder / name, lambda config: config.update(auto_map={"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"})
        )
    (folder / "evil.py").write_text("raise SystemExit('ran')")


def as_the_older_library_saves(folder):
    """What transformers 4.57 adds to each part, and where it puts the template and the tokens."""
    noise = {"_name_or_path": "", "id2label": {"0": "LABEL_0"}, "temperature": 1.0, "torchscript": False, "dtype": None}
    for path in ("audio_config", "text_config"):
        edit(
            folder / "config.json", lambda c, path=path: c["thinker_config"][path].update(noise | {"dtype": "float32"})
        )
    edit(folder / "config.json", lambda c: c["thinker_config"].update(noise | {"torch_dtype": "bfloat16"}))
    template = read(folder / "chat_template.json")["chat_template"]
    (folder / "chat_template.jinja").write_text(template)
    (folder / "chat_template.json").unlink()


@pytest.mark.parametrize("change", [drop_rope_scaling, wrong_generation, call_for_code, as_the_older_library_saves])
def test_older_checkpoints_as_they_are_found(copy, tmp_path, change):
    change(copy)
    convert(copy, tmp_path / "back", "transformers")
    assert_same(TUNED, tmp_path / "back")


def test_without_generation_config(copy, tmp_path):
    (copy / "generation_config.json").unlink()
    convert(copy, tmp_path / "back", "transformers")
    written = {"do_sample": False, "eos_token_id": [0, 2], "max_new_tokens": 512, "pad_token_id": 2}
    assert read(tmp_path / "back" / "generation_config.json") == written


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_is_in_the_file(copy, tmp_path, tied):
    """Equal to the embedding where they are tied, of its own where they are not; kept either way, and loaded."""
    add(HEAD, lambda tensors: tensors[EMBEDDING] + (0 if tied else 1))(copy)
    setting("text_config.tie_word_embeddings", tied)(copy)
    convert(copy, tmp_path / "back", "transformers")
    weights = load_file(tmp_path / "back" / WEIGHTS)
    assert torch.equal(weights["lm_head.weight"], load_file(copy / WEIGHTS)[HEAD])
    model = load_model(str(tmp_path / "back"), use_bf16=False)
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"].float())
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tied
    convert(tmp_path / "back", tmp_path / "again", "thinker")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (copy / WEIGHTS).read_bytes()


def test_a_vocabulary_in_two_files(copy, tmp_path):
    """vocab.json and merges.txt become the tokenizer.json they came from, and go back unchanged."""
    learnt = tokenizers.Tokenizer(tokenizers.models.BPE())
    learnt.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    learnt.train_from_iterator(["שלום עולם, מה שלומך היום? the user said so"] * 5, trainer)
    learnt.model.save(str(copy))
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>"]
    begin = learnt.get_vocab_size()
    plain = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    added = {str(begin + i): {"content": name, "special": True, **plain} for i, name in enumerate(names)}
    change = {"added_tokens_decoder": added, "tokenizer_class": "Qwen2Tokenizer", "unk_token": None}
    edit(copy / "tokenizer_config.json", lambda c: c.update(change | {"additional_special_tokens": names[1:]}))
    (copy / "tokenizer.json").unlink()
    (copy / "special_tokens_map.json").unlink()
    vocab = begin + len(names)
    setting("text_config.vocab_size", vocab)(copy)
    setting("audio_token_id", begin + 5)(copy)
    add(EMBEDDING, lambda tensors: torch.zeros(vocab, 144, dtype=torch.bfloat16))(copy)
    convert(copy, tmp_path / "own", "transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "own")
    text = "<|im_start|>שלום, user<|im_end|>"
    expected = [begin + 1, *learnt.encode("שלום, user").ids, begin + 2]
    assert tokenizer(text)["input_ids"] == expected and tokenizer.decode(expected) == text
    assert read(tmp_path / "own" / "config.json")["eos_token_id"] == [begin, begin + 2]
    convert(tmp_path / "own", tmp_path / "again", "thinker")
    assert read(tmp_path / "again" / "vocab.json") == read(copy / "vocab.json")
    assert (tmp_path / "again" / "merges.txt").read_text() == (copy / "merges.txt").read_text()
    assert read(tmp_path / "again" / "tokenizer_config.json")["added_tokens_decoder"] == added


# ------------------------------------------------------------------------------------------------------------- Loading


def waveforms(count: int) -> list[np.ndarray]:
    (file,) = (DEMO / "heldout").glob("*.parquet")
    rows = pyarrow.parquet.read_table(file).slice(0, count).to_pylist()
    return [soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")[0] for row in rows]


def test_transcripts_are_the_same_from_either_layout(older, home):
    written, heard = [], waveforms(6)
    for name in (TUNED, older):
        model = load_speech_model(str(name), Decoding(), torch.device("cpu"))
        written.append(model.transcribe([model.features(w) for w in heard], [len(w) / 16_000 for w in heard]))
    assert written[0] == written[1] and all(transcript.text for transcript in written[0])


def test_training_is_the_same_from_either_layout(config, older, home, tmp_path):
    losses = []
    for start in (TUNED, older):
        folder = tmp_path / start.name
        main(dataclasses.replace(config, model_name_or_path=str(start), output_dir=str(folder), max_steps=2))
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["train/loss"] for line in lines if "train/loss" in line])
    assert losses[0] == losses[1] and len(losses[0]) == 2
    assert len([folder for folder in home.iterdir() if folder.is_dir()]) == 1, "processor and model share one copy"
    convert(folder / "final_model", tmp_path / "served", "thinker")
    convert(tmp_path / "served", tmp_path / "back", "transformers")
    assert_same(folder / "final_model", tmp_path / "back")


def test_one_conversion_of_each_content(copy, home):
    assert in_transformers_layout(str(TUNED)) == str(TUNED) and not home.exists()
    first = Path(in_transformers_layout(str(copy)))
    assert first.parent == home
    assert_same(TUNED, first)
    written = (first / WEIGHTS).stat().st_mtime_ns
    moved = copy.rename(copy.with_name("moved"))
    assert in_transformers_layout(str(moved)) == str(first) and (first / WEIGHTS).stat().st_mtime_ns == written
    edit_weights(moved, lambda tensors: tensors["thinker.model.norm.weight"].add_(1))
    assert in_transformers_layout(str(moved)) != str(first)


def test_a_copy_that_cannot_be_written_leaves_nothing(older, home, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(layouts, "copy_renamed", full)
    with pytest.raises(InputError, match=r"cannot be written to .*No space left on device.*HF_HOME"):
        in_transformers_layout(str(older))
    assert [file.suffix for file in home.iterdir()] == [".lock"]


def test_a_plan_of_either_layout(older, home):
    for one, other in ((older, TUNED), ("Qwen/Qwen3-ASR-1.7B", "Qwen/Qwen3-ASR-1.7B-hf")):
        first, second = (model_config(str(name)).to_dict() | {"_name_or_path": ""} for name in (one, other))
        assert first == second


def test_a_repository_of_the_hub(hub, older, home):
    files = {file.name: file.read_bytes() for file in older.iterdir()}
    hub.add_repo("OzLabs/older", files | {"pytorch_model.bin": b"pickle", "evil.py": b"raise SystemExit"})
    hub.add_repo("OzLabs/own", {file.name: file.read_bytes() for file in TUNED.iterdir()})
    assert in_transformers_layout("OzLabs/own") == "OzLabs/own"
    assert_same(TUNED, Path(in_transformers_layout("OzLabs/older")))
    asked = [request.path for request in hub.requests]
    assert not any(path.endswith((".bin", ".py")) for path in asked)


# ------------------------------------------------------------------------------------------------------------- Command


def test_the_command(older, tmp_path, capsys):
    (tmp_path / "older").mkdir()
    convert_layout.main([str(TUNED), str(tmp_path / "older")])
    assert_same(older, tmp_path / "older")
    convert_layout.main([str(older), str(tmp_path / "own"), "--to", "transformers"])
    assert_same(TUNED, tmp_path / "own")
    assert f"{tmp_path / 'own'}: {older} in the transformers layout" in capsys.readouterr().out
    for arguments, message in (
        ([older, tmp_path / "own"], "exists and is not an empty folder"),
        ([older, tmp_path / "x", "--to", "thinker"], "is in the thinker layout already"),
        ([tmp_path / "nothing", tmp_path / "x"], "config.json cannot be read"),
        ([DEMO, tmp_path / "x"], "config.json cannot be read"),
        ([older, "/proc/x"], "/proc/x cannot be written"),
    ):
        with pytest.raises(InputError, match=message):
            convert_layout.main(list(map(str, arguments)))


def test_the_card_names_a_command_that_works(tmp_path, older):
    """What the card of a final model says to run, run."""
    (line,) = re.findall(r"`uv run scripts/convert_layout.py (.*?)`", SERVE)
    names = {"FOLDER": str(TUNED), "OLDER": str(tmp_path / "older")}
    convert_layout.main([names.get(word, word) for word in line.split()])
    assert_same(older, tmp_path / "older")
