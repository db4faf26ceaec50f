"""What the tests share: a few rows of the demo world, its model, and a place of their own for every cache."""

import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "demo"
TOKEN = "hf_write_token_that_must_not_leak"
sys.path.insert(0, str(ROOT))
CACHE = tempfile.TemporaryDirectory(prefix="hebrew-asr-tests-")
# Read when the libraries are imported, hence before any of them is.
os.environ |= {
    "HF_HOME": f"{CACHE.name}/hf",
    "TRACKIO_DIR": f"{CACHE.name}/trackio",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "OMP_NUM_THREADS": "1",
}
for name in (
    "HF_REPO_ID",
    "HF_TOKEN",
    "SKIP_HF_UPLOAD",
    "WANDB_PROJECT",
    "WANDB_RUN_NAME",
    "WANDB_API_KEY",
    "WANDB_MODE",
):
    os.environ.pop(name, None)

import huggingface_hub
import pyarrow.parquet
import pytest
import torch
import transformers
from hub_server import HubServer

from hebrew_asr.checkpoints import hub as hub_upload
from hebrew_asr.checkpoints.hub import CheckpointUploader
from hebrew_asr.data.rows import load_rows
from hebrew_asr.data.sources import Source
from hebrew_asr.model.loading import load_to_train
from hebrew_asr.model.stages import Stage
from train_hebrew_asr_enhanced import TrainingConfig

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--run-slow", action="store_true", help="also run what takes minutes: the whole demo")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--run-slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes; run with --run-slow"))
    long = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in long)  # so that no worker begins a long file when the others end


def first_rows(part: str, count: int, folder: Path) -> Path:
    """Writes the first rows of a part of the demo world as a corpus of its own."""
    (file,) = (DEMO / part).glob("*.parquet")
    folder.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(file).slice(0, count), folder / "train.parquet")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """41 utterances: with steps of 8 the last step of an epoch has one, and a second process has none."""
    return first_rows("corpus", 41, tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture(scope="session")
def heldout(tmp_path_factory) -> Path:
    return first_rows("heldout", 11, tmp_path_factory.mktemp("data") / "heldout")


def small_config(corpus: Path, heldout: Path, output_dir: Path) -> TrainingConfig:
    """Two stages of one epoch each on the small corpus, steps of 8 utterances."""
    return TrainingConfig(
        model_name_or_path=str(DEMO / "base"),
        train_sources=[Source(str(corpus))],
        eval_sources=[Source(str(heldout))],
        output_dir=str(output_dir),
        stages=[
            Stage("B", 1, {"projector": 4e-3, "llm_top": 1e-3, "lm_head": 2e-3}, 1, 1),
            Stage("A", 2, {"projector": 2e-3, "audio_top": 6e-4, "llm_top": 6e-4, "lm_head": 2e-3}, 1, 1),
        ],
        num_epochs=2,
        target_effective_batch=8,
        tokens_per_micro_batch=350,  # about half of a step
        batch_size=4,
        dataloader_num_workers=0,
        generation_max_new_tokens=30,
        eval_batch_size=4,
        eval_steps=1000,
        logging_steps=1,
        tracker="none",
        final_dtype="float32",
    )


@pytest.fixture
def config(corpus, heldout, tmp_path) -> TrainingConfig:
    return small_config(corpus, heldout, tmp_path / "run")


@pytest.fixture(scope="session")
def processor():
    return transformers.AutoProcessor.from_pretrained(DEMO / "base")


@pytest.fixture
def model(config):
    return load_to_train(config, use_bf16=False)


@pytest.fixture
def train_rows(config):
    return load_rows(config.train_sources, config, for_training=True)


@pytest.fixture
def eval_rows(config):
    return load_rows(config.eval_sources, config, for_training=False)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A running server that the client of this process takes for the Hub; pauses after failures are short."""
    with HubServer(users={TOKEN: ("OzLabs", "write"), "hf_read_token": ("OzLabs", "read")}) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.utils._http.time", HastyClock())
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(hub_upload, "FIRST_WAIT_SECONDS", 0.01)
        monkeypatch.setattr(hub_upload, "SILENT_SECONDS", 2.0)
        hub_upload.prepare_library()
        huggingface_hub.utils._http.close_session()
        begun = noted(monkeypatch)
        yield server
        for uploader in begun:
            uploader.stop()
    for thread in [uploader._thread for uploader in begun if uploader._thread]:
        thread.join(20)
        assert not thread.is_alive(), "it would end the connections of the next test"
    huggingface_hub.utils._http.close_session()


def noted(monkeypatch) -> list[CheckpointUploader]:
    """The uploaders that are made from now on. One that goes on after its test ends the connections of the next."""
    begun, make = [], CheckpointUploader.__init__

    def note(uploader, *rest):
        begun.append(uploader)
        make(uploader, *rest)

    monkeypatch.setattr(CheckpointUploader, "__init__", note)
    return begun


class HastyClock:
    """The time module for the client, whose own attempts then follow one another a hundred times as fast."""

    def __getattr__(self, name):
        return getattr(time, name)

    @staticmethod
    def sleep(seconds):
        time.sleep(seconds / 100)
