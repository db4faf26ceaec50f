"""The token budget that is found fits a step, is close to the largest, and an error of one process stays its own."""

import dataclasses
import gc
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_config
from forked import forked
from test_training_plan import Peak

from hebrew_asr.command_line import parse_config
from hebrew_asr.data.utterances import SpeechDataset
from hebrew_asr.errors import InputError
from hebrew_asr.model.loading import load_to_train
from hebrew_asr.model.loss import IGNORED_LABEL
from hebrew_asr.model.packing import useful_tokens
from hebrew_asr.model.stages import freeze_for
from hebrew_asr.training.token_budget import Utterances, largest_budget, run_micro_batches, search
from train_hebrew_asr_enhanced import DataCollatorSpeechSeq2SeqWithPadding, main

HERE = Path(__file__).parent
CPU = torch.device("cpu")


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class SmallDevice(Peak):
    """Ends an operation after which more than so many bytes are alive as CUDA's allocator does."""

    def __init__(self, there: list[torch.Tensor], limit: int):
        super().__init__(there)
        self.limit = limit

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(function, types, args, kwargs)
        if self.now > self.limit:
            out_of_memory()
        return result


def peak_of_training(model, batch: dict[str, torch.Tensor], stages: list) -> int:
    """Bytes of two steps of two micro-batches in each stage, one after the other, with AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    model.zero_grad()
    with Peak(list(model.parameters())) as memory:
        for stage in stages:
            freeze_for(model, stage)
            for _ in range(2):
                for _ in range(2):
                    model(**batch, num_items_in_batch=1).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    return memory.most


@pytest.fixture(autouse=True)
def collects_quickly():
    """accelerate collects garbage after each error, which takes a second with all the libraries' objects."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("limit", [559, 3000, 35_776])
def test_the_budget_found_is_within_a_step_of_the_limit(limit):
    tried = []

    def attempt(tokens: int) -> None:
        tried.append(tokens)
        if tokens > limit:
            out_of_memory()

    found = largest_budget(attempt, least=559, most=35_776)
    assert found <= limit and (found == 35_776 or found > 0.95 * limit - 64)
    assert tried == sorted(tried, reverse=True) and tried[-1] == found


def test_what_is_no_lack_of_memory_is_not_searched_around_and_a_device_too_small_is_said():
    def broken(tokens: int) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        largest_budget(broken, 559, 5000)
    with pytest.raises(InputError, match=r"longest utterance training allows \(559 tokens\).*gradient_checkpointing"):
        largest_budget(lambda tokens: out_of_memory(), 559, 5000)


@pytest.mark.parametrize("augmented", [False, True])
def test_the_micro_batches_tried_fill_the_budget_with_the_longest_utterances(config, processor, augmented):
    config = dataclasses.replace(config, use_waveform_augmentation=augmented, max_audio_length_seconds=12.0)
    utterances = Utterances(DataCollatorSpeechSeq2SeqWithPadding(processor, config), config)
    longest = utterances.tokens(12.0)
    text = len(utterances.collator.language_prefix("Hebrew")) + 60 + 1
    assert longest == len(utterances.collator.prompt(1200, "")) + text
    slower = 1 / 0.9 if augmented else 1.0
    for budget in (longest // 2, longest, 3 * longest + 100, 5 * longest - 1):
        batch = utterances.filling(budget)
        audio = (batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<|audio_pad|>")).sum().item()
        without_augmentation = useful_tokens(batch) - audio * (1 - 1 / slower)
        assert without_augmentation == pytest.approx(max(budget, longest), abs=40 if budget > longest else 2)
        assert (batch["labels"] != IGNORED_LABEL).sum(dim=1).max() >= text
        assert batch["input_features_mask"].sum() >= (1200 * slower - 1) * (budget // longest)


def test_where_training_gives_contexts_they_are_tried(config, processor):
    """With all utterances, and with none; the longest utterance there may be has one."""
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor, config)
    utterances = Utterances(collator, dataclasses.replace(config, max_audio_length_seconds=12.0))
    none, all_of_them = utterances.fillings(3 * utterances.least)
    assert utterances.least == utterances.tokens(12.0) + 60
    lengths = [batch["utterance_ends"].diff().max().item() for batch in (none, all_of_them)]
    assert lengths == [utterances.tokens(12.0), utterances.least] and lengths[0] < lengths[1]
    learnt = [(batch["labels"] != IGNORED_LABEL).sum() for batch in (none, all_of_them)]
    assert learnt[0] >= learnt[1] > 0
    without = Utterances(collator, dataclasses.replace(config, max_audio_length_seconds=12.0, prev_context_prob=0.0))
    assert len(without.fillings(1000)) == 1 and without.least == without.tokens(12.0)


@pytest.mark.parametrize("prev_context_prob", [0.05, 0.0])
def test_a_step_of_training_at_the_budget_found_stays_within_the_memory(
    config, processor, train_rows, prev_context_prob
):
    """In both stages, with AdamW's moments and the gradients of a micro-batch before; half as much again does not."""
    config.prev_context_prob = prev_context_prob
    collator = DataCollatorSpeechSeq2SeqWithPadding(processor, config)
    config.max_audio_length_seconds, config.target_effective_batch = 4.0, 64
    model = load_to_train(config, use_bf16=False)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    limit = 4 * weights + 40_000_000
    with SmallDevice(list(model.parameters()), limit):
        budget, most = search(config, model, collator, CPU, use_bf16=False, processes=1)
    assert budget < most // 2

    dataset = SpeechDataset(train_rows, processor, config, training=True)
    clips = sorted((dataset[(1, row)] for row in range(len(train_rows))), key=lambda u: -u["features"].shape[1])

    def peak(tokens: int) -> int:
        """With the corpus' longest utterances, so many that they fill so many tokens."""
        parts = [collator.sequences([clip], [clip["features"].shape[1]]) for clip in clips]
        sizes = np.cumsum([len(prompts[0] + targets[0]) for prompts, targets in parts])
        utterances = [clip for clip, size in zip(clips, sizes, strict=True) if size <= tokens]
        assert len(utterances) < len(clips), "the corpus fills it"
        return peak_of_training(load_to_train(config, use_bf16=False), collator.packed(utterances), config.stages)

    assert peak(budget) <= limit < peak(3 * budget // 2)


def test_what_stands_beside_a_micro_batch_is_what_stands_in_training(config, processor):
    """In the last stage; with several processes also the buckets of DistributedDataParallel."""
    batch = Utterances(DataCollatorSpeechSeq2SeqWithPadding(processor, config), config).filling(1500)
    model = load_to_train(config, use_bf16=False)
    freeze_for(model, config.stages[-1])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = []
    for processes in (1, 2):
        model.zero_grad()
        with Peak(list(model.parameters())) as memory:
            run_micro_batches(model, batch, trained, CPU, use_bf16=False, processes=processes)
        found.append(memory.most)
    assert found[1] - found[0] == sum(parameter.nbytes for parameter in trained)
    assert found[0] == pytest.approx(peak_of_training(model, batch, config.stages[-1:]), rel=0.02)


@pytest.mark.parametrize(("tokens", "status"), [(1500, 0), (10, 1)])
def test_one_process_out_of_memory_holds_up_no_other(tmp_path, corpus, heldout, tokens, status):
    """The smallest counts for both; where there is none, both say so; and each still hears the other."""
    config = small_config(corpus, heldout, tmp_path / "run")
    config.max_audio_length_seconds, config.target_effective_batch = 12.0, 16
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(dataclasses.asdict(config)))
    done = forked("tests/find_budget.py", settings, tokens, processes=2)
    assert done.returncode == status, done.stderr
    for rank in (0, 1):
        assert f"process {rank} hears of [0, 1]" in done.stdout
    if status:
        assert done.stderr.count("error: not even the longest utterance") == 1
        return
    budget = int(done.stdout.split("--tokens_per_micro_batch ")[1].split()[0])
    assert 0.85 * 1500 < budget <= 1500 and done.stdout.count("--tokens_per_micro_batch") == 1
    assert f"process 1 {budget}; the smallest counts" in done.stdout
    assert not (tmp_path / "run").exists()


def test_without_a_gpu_there_is_one_message(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parse_config(["--find_token_budget"], config).find_token_budget
    with pytest.raises(InputError, match=r"no GPU here.*--plan"):
        main(dataclasses.replace(config, find_token_budget=True))
