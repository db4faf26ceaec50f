"""The commands a user types: what they leave behind, what they upload, and what they say when they cannot run."""

import dataclasses
import json
import os
import re
import socket
import struct
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
import soundfile
import torch
import transformers
from conftest import DEMO, ROOT
from forked import forked
from hub_server import HubServer

from hebrew_asr.checkpoints import store
from hebrew_asr.command_line import parse_config
from hebrew_asr.data.audio import decode_audio
from hebrew_asr.data.sources import Source
from hebrew_asr.errors import InputError
from hebrew_asr.model.stages import Stage
from train_hebrew_asr_enhanced import TrainingConfig, main
from train_round2_gradual import demo, recipe, round2

TOKEN = "hf_write_token_that_must_not_leak"
USERS = {TOKEN: ("OzLabs", "write"), "hf_read_token": ("OzLabs", "read")}


def command(script: str, *arguments: object, processes: int | None = None, env: dict | None = None, timeout: int = 200):
    """Runs a script as its user does, under torchrun when `processes` is given; `timeout` in seconds."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    line = [*(torchrun if processes else [sys.executable]), ROOT / script, *arguments]
    environment = {**os.environ, **(env or {})}
    return subprocess.run(
        list(map(str, line)), env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def short_run(corpus, heldout, folder) -> list[str]:
    """Options for one epoch of the demo recipe on the small corpus: one step of B, four of A."""
    stages = [
        {"name": "B", "last_epoch": 1, "learning_rates": {"projector": 1e-3}},
        {"name": "A", "last_epoch": 5, "learning_rates": {"projector": 1e-3, "audio_top": 1e-3}, "audio_top_layers": 1},
    ]
    return [
        *(
            "--train_sources",
            json.dumps([{"path": str(corpus)}]),
            "--eval_sources",
            json.dumps([{"path": str(heldout)}]),
        ),
        *("--stages", json.dumps(stages), "--output_dir", str(folder), "--max_steps", "5"),
        *("--generation_max_new_tokens", "30", "--logging_steps", "2"),
    ]


@pytest.fixture(scope="module")
def uploaded(tmp_path_factory, corpus, heldout):
    """A run of two processes that tracks with W&B, offline, and uploads to the stand-in of the Hub."""
    folder = tmp_path_factory.mktemp("main")
    with HubServer(users=USERS) as hub:
        env = hub.env(home=folder / "home", token=TOKEN) | {
            "HF_REPO_ID": "OzLabs/Qwen3-ASR-Hebrew-Round2",
            "WANDB_PROJECT": "a-project",
            "WANDB_RUN_NAME": "a-name",
        }
        options = [*short_run(corpus, heldout, folder / "run"), "--tracker", "wandb", "--skip_hf_upload", "false"]
        done = command("train_round2_gradual.py", "--demo", *options, processes=2, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        yield folder / "run", done, hub, env


def test_a_run_leaves_its_settings_numbers_picture_and_model(uploaded):
    run, done, _, _ = uploaded
    settings = json.loads((run / "config.yaml").read_text())
    assert settings["max_steps"] == 5 and settings["stages"][1]["audio_top_layers"] == 1
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert next(iter(row["eval/wer"] for row in rows if "eval/wer" in row)) > 0 and rows[0]["step"] == 0
    logged = {name for row in rows for name in row}
    assert logged >= {
        *(
            "train/loss",
            "train/grad_norm",
            "train/learning_rate_projector",
            "train/trainable_parameters",
            "train/stage",
        ),
        *("train/audio_seconds_per_second", "eval/wer", "eval/cer", "eval/loss", "eval/wer_nonempty", "eval/wer_raw"),
        *("eval/empty_predictions", "eval/loss_minus_train_loss", "final/wer", "final/cer"),
    }
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "8 utterances × 1 micro-batches × 2 processes = 16 a step" in done.stdout
    assert "lm_head is tied to the embedding" not in done.stdout, "lm_head does not train in this run"
    assert "stage A is cut" in done.stdout
    for end in ("before training", "at the end", "final model, reloaded from disk"):
        assert re.search(rf"WER +[\d.]+ %  .*{end}", done.stdout)
    assert done.stdout.count("run folder") == 1, "rank 0 alone speaks"
    assert "Traceback" not in done.stderr
    assert re.search(r"W&B was offline; to sync: uv run wandb sync .*offline-run", done.stdout.splitlines()[-1])


def wandb_records(file: Path):
    """Reads an offline run: after 7 bytes, LevelDB's log format (blocks of 32 KiB, chunks of crc, length, kind)."""
    from wandb.proto import wandb_internal_pb2

    data, position, parts = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or its last chunk
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def test_wandb_gets_project_name_tags_settings_and_the_same_numbers(uploaded):
    (file,) = uploaded[0].glob("wandb/offline-run-*/*.wandb")
    settings, run, names = {}, None, set()
    for record in wandb_records(file):
        if record.HasField("run"):
            run = record.run
            settings |= {item.key: json.loads(item.value_json) for item in run.config.update}
        if record.HasField("history"):
            names |= {item.key or "/".join(item.nested_key) for item in record.history.item}
    assert (run.project, run.display_name) == ("a-project", "a-name")
    assert set(run.tags) == {"sota-2025", "specaugment", "cosine-lr", "gradual-unfreezing"}
    assert settings["time_mask_param"] == 80 and settings["processes"] == 2 and settings["effective_batch_size"] == 16
    assert names >= {"train/loss", "train/learning_rate_projector", "train/grad_norm", "eval/wer", "eval/cer"}
    assert "eval/predictions/path" in names


def test_what_is_uploaded_is_the_final_model(uploaded):
    run, done, hub, _ = uploaded
    files = hub.repos["OzLabs/Qwen3-ASR-Hebrew-Round2"]["main"]
    local = {f.name: f.read_bytes() for f in (run / "final_model").iterdir()}
    assert {name: files[name] for name in local} == local
    assert "model.safetensors" in local and not [name for name in files if name.endswith((".bin", ".pt", ".pkl"))]
    card = local["README.md"].decode()
    final = next(json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "final/wer" in line)
    assert f"{final['final/wer']:.2f}" in card
    header = card.split("---")[1]
    for line in ("language: he", "library_name: transformers", "type: wer", "automatic-speech-recognition"):
        assert line in header
    assert "uploaded: " in done.stdout


def holders_of(token: str, folder: Path, done, hub: HubServer) -> list[str]:
    """Where a token stands in clear: files, console, and what was sent to the Hub beside the header it belongs in."""
    found = [str(f) for f in folder.rglob("*") if f.is_file() and token.encode() in f.read_bytes()]
    found += ["console"] if token in done.stdout + done.stderr else []
    commits = [commit for repo in hub.repos.values() for commit in repo.commits.values()]
    stored = {path: content for commit in commits for path, content in commit.files.items()}
    found += [f"on the Hub: {path}" for path, content in stored.items() if token.encode() in content]
    return found + [path for _, path, _, body in hub.requests if token.encode() in body or token in path]


def test_the_token_is_nowhere(uploaded):
    run, done, hub, _ = uploaded
    assert any(TOKEN in headers.get("authorization", "") for _, _, headers, _ in hub.requests)
    assert {"checkpoints-run", "main"} == hub.repos["OzLabs/Qwen3-ASR-Hebrew-Round2"].branches.keys()
    assert (run / "status.json").exists() and list((run / "checkpoints").glob("step-*/state.json"))
    assert not holders_of(TOKEN, run, done, hub)
    (run / "planted.txt").write_text(f"token={TOKEN}")
    hub.add_repo("OzLabs/planted", {"model.safetensors": TOKEN.encode()})
    assert holders_of(TOKEN, run, done, hub) == [str(run / "planted.txt"), "on the Hub: model.safetensors"]
    (run / "planted.txt").unlink()


def test_the_checkpoints_are_on_the_hub_and_the_model_is_tagged(uploaded):
    run, done, hub, _ = uploaded
    repo = hub.repos["OzLabs/Qwen3-ASR-Hebrew-Round2"]
    assert repo.private and repo["run"] == repo["main"]
    newest = store.names(run / "checkpoints")[0]
    for path in newest.iterdir():
        assert repo["checkpoints-run"][f"{newest.name}/{path.name}"] == path.read_bytes()
    status = store.read_status(run)
    assert (status["state"], status["hub"]["checkpoint"]) == ("finished", newest.name)
    assert "/commit/" in status["uploaded"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(row["hub/failures"] == 0 and row["hub/lag_steps"] >= 0 for row in rows if "train/loss" in row)
    assert f"checkpoint {newest.name} is on the Hub: " in done.stdout


def test_the_cards_snippet_transcribes_as_printed(uploaded, tmp_path):
    run, _, _, env = uploaded
    card = (run / "final_model" / "README.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    rows = datasets.load_dataset("parquet", data_files=str(next((DEMO / "heldout").glob("*.parquet"))), split="train")
    audio = rows.cast_column("audio", datasets.Audio(decode=False))[0]["audio"]
    soundfile.write(tmp_path / "speech.wav", decode_audio(audio), 16_000)
    environment = {**os.environ, **env}
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search("[א-ת]", done.stdout)


def test_a_failed_upload_keeps_the_model_and_ends_with_an_error(tmp_path, corpus, heldout):
    with HubServer(users=USERS) as hub:
        hub.fail("POST", "/commit/main", 413)
        env = hub.env(home=tmp_path / "home", token=TOKEN)
        options = [*short_run(corpus, heldout, tmp_path / "run"), "--hf_repo_id", "OzLabs/asr", "--max_steps", "1"]
        done = forked("train_round2_gradual.py", "--demo", *options, "--skip_hf_upload", "false", env=env)
    assert done.returncode == 1
    assert re.search(r"error: the upload to OzLabs/asr failed: .*, or: uv run hf upload OzLabs/asr", done.stderr)
    assert (tmp_path / "run" / "final_model" / "model.safetensors").exists()
    assert store.read_status(tmp_path / "run")["uploaded"] is None
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("token", ["hf_read_token", "hf_unknown_token"])
def test_a_token_that_cannot_write_stops_the_run_before_training(tmp_path, token):
    with HubServer(users=USERS) as hub:
        hub.add_repo("OzLabs/asr", {})
        env = hub.env(home=tmp_path / "home", token=token) | {"HF_REPO_ID": "OzLabs/asr", "SKIP_HF_UPLOAD": "false"}
        options = ["--output_dir", tmp_path / "run", "--skip_hf_upload", "false"]
        done = forked("train_round2_gradual.py", "--demo", *options, env=env)
    assert done.returncode == 1 and "step 0" not in done.stdout
    assert "error: cannot upload to OzLabs/asr" in done.stderr and "Traceback" not in done.stderr
    assert token not in done.stdout + done.stderr


def test_round2_itself_runs_on_a_local_folder(tmp_path, corpus):
    """The real command with its defaults (workers, steps of 64, W&B, held-out recordings), but for model and data."""
    stages = [dataclasses.asdict(stage) | {"audio_top_layers": 1, "llm_top_layers": 1} for stage in round2().stages]
    done = forked(
        "train_round2_gradual.py",
        *("--model_name_or_path", DEMO / "base", "--train_sources", json.dumps([{"path": str(corpus)}])),
        *("--stages", json.dumps(stages), "--max_steps", 3, "--output_dir", tmp_path / "run"),
        processes=2,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 utterances × 16 micro-batches × 2 processes = 64 a step" in done.stdout
    assert "WER" in done.stdout and "not uploaded; to do it: uv run hf upload OWNER/NAME" in done.stdout
    config = transformers.AutoConfig.from_pretrained(tmp_path / "run" / "final_model")
    assert config.dtype == torch.bfloat16
    assert [path.name for path in (tmp_path / "run").glob("wandb/offline-run-*")]


def test_inspecting_the_data_writes_its_report_and_trains_nothing(tmp_path, corpus):
    sources = json.dumps([{"path": str(corpus)}])
    options = ["--train_sources", sources, "--inspect_data", "--output_dir", tmp_path / "run"]
    done = forked(
        "train_round2_gradual.py", "--demo", *options, env={"HF_REPO_ID": "no/check", "CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {f.name for f in (tmp_path / "run").iterdir()} == {
        "config.yaml",
        "corpus.json",
        "corpus.md",
        "corpus.html",
        "corpus-dropped.tsv",
    }
    assert "41" in done.stdout and "step 0" not in done.stdout


def test_every_rank_ends_with_one_message_between_them(tmp_path):
    done = command("train_round2_gradual.py", "--demo", "--num_epoch", 3, processes=2)
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert "did you mean --num_epochs" in done.stderr.splitlines()[-1], "below the launcher's own report"


def test_both_ranks_end_by_themselves_with_one_message_between_them(tmp_path):
    """Started without torchrun, which would end the slower one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    arguments = ["--demo", "--output_dir", str(tmp_path / "run"), "--model_name_or_path", "/no"]
    ranks = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "train_round2_gradual.py"), *arguments],
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    errors = "".join(rank.communicate(timeout=180)[1] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [1, 1] and errors.count("error: /no") == 1, errors


# What is refused before training, in this process


def check_refused(config: TrainingConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        main(config)


def rewrite(corpus: Path, folder: Path, change) -> Path:
    folder.mkdir()
    pyarrow.parquet.write_table(change(pyarrow.parquet.read_table(corpus / "train.parquet")), folder / "train.parquet")
    return folder


def test_a_dataset_that_is_not_there(config):
    config.train_sources = [Source("/no/such/folder")]
    check_refused(config, "/no/such/folder: no such folder")


def test_a_dataset_without_audio_or_text(config, corpus, tmp_path):
    config.train_sources = [Source(str(rewrite(corpus, tmp_path / "a", lambda t: t.drop_columns("audio"))))]
    check_refused(config, "no column `audio`, there are transcript")
    config.output_dir += "2"
    config.train_sources = [Source(str(rewrite(corpus, tmp_path / "b", lambda t: t.drop_columns("transcript"))))]
    check_refused(config, "no column transcript or text or sentence or transcription, there are audio")


def test_nothing_left_after_filtering(config):
    config.max_audio_length_seconds = 0.31
    check_refused(config, r"none of its 41 rows can be used: .*longer than 0.31 s")


def test_a_model_that_is_not_qwen3_asr(config, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "whisper"}')
    config.model_name_or_path = str(tmp_path / "other")
    check_refused(config, "other (cannot be loaded|is not a Qwen3-ASR checkpoint)")


def test_a_folder_that_holds_a_run(config, tmp_path):
    (tmp_path / "run").mkdir()
    other = dataclasses.asdict(dataclasses.replace(config, num_epochs=5))
    (tmp_path / "run" / "config.yaml").write_text(json.dumps(other))
    (tmp_path / "run" / "status.json").write_text('{"state": "finished"}')  # one without a checkpoint has not begun
    check_refused(
        config, r"holds a run already, with other settings:(.|\n)*num_epochs: 5 → 2(.|\n)*another --output_dir"
    )
    config.resume = "never"
    check_refused(config, "holds a run already: leave --resume never out to go on with it, or choose another")


def test_a_full_disk(config, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    check_refused(config, "0.0 GB free on its disk, the run needs")


def test_a_gated_dataset_without_a_token(tmp_path):
    with HubServer(users=USERS) as hub:
        hub.add_repo("someone/gated", {"data/train-0.parquet": b""}, repo_type="dataset", gated="all")
        sources = json.dumps([{"path": "someone/gated"}])
        options = ["--train_sources", sources, "--output_dir", tmp_path / "run"]
        done = command("train_round2_gradual.py", "--demo", *options, env=hub.env(home=tmp_path / "home"))
    assert done.returncode == 1
    assert re.search(r"error: someone/gated: .*(gated|HF_TOKEN)", done.stderr) and "Traceback" not in done.stderr


# The command line


def test_any_field_can_be_given_and_the_saved_settings_read_back(uploaded):
    given = parse_config(["--num_epochs", "3", "--use_specaugment", "false"], round2())
    assert (given.num_epochs, given.use_specaugment, given.stages) == (3, False, round2().stages)
    sources = parse_config(["--eval_sources", '[{"path": "x"}]'], demo()).eval_sources
    assert sources == [Source("x")], "nothing of the default's split is left in it"
    stages = '[{"name": "all", "last_epoch": 5, "learning_rates": {"projector": 1e-3}, "llm_top_layers": 4}]'
    assert parse_config(["--stages", stages], round2()).stages == [
        Stage("all", 5, {"projector": 1e-3}, audio_top_layers=8, llm_top_layers=4)
    ]
    saved = uploaded[0] / "config.yaml"
    again = dataclasses.asdict(parse_config(["--config", str(saved)], TrainingConfig()))
    assert json.loads(json.dumps(again)) == json.loads(saved.read_text())
    rules = parse_config(["--text_rules.niqqud", "false"], demo()).text_rules
    assert (rules.niqqud, rules.quote_style) == (False, "keep"), "the recipe's other rules stay"
    assert parse_config(["--seed", "1"], demo()) == dataclasses.replace(demo(), seed=1), (
        "and so does all that is not given"
    )
    assert recipe(["--demo", "--seed", "7"]).seed == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_epoch", "3"], r"num_epoch.*did you mean --num_epochs"),
        (["--freq_mask_params=3"], "did you mean --freq_mask_param"),
        (["--num_epochs", "three"], "num_epochs"),
        (["--use_specaugment", "perhaps"], "use_specaugment"),
        (["--stages", '[{"name": "A", "last_epohc": 3}]'], "last_epohc"),
    ],
)
def test_an_option_that_is_unknown_or_ill_typed_is_an_error_that_names_the_field(arguments, message):
    with pytest.raises(InputError, match=message):
        parse_config(arguments, round2())
