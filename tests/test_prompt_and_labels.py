"""The tokens a model is trained on are the base model's prompt and the transcript, and nothing else is supervised."""

import re
import shutil
import time

import numpy as np
import pytest
import torch
from conftest import DEMO

from hebrew_asr.data.audio import SAMPLE_RATE, decode_audio
from hebrew_asr.data.utterances import SpeechDataset
from hebrew_asr.errors import InputError
from hebrew_asr.model.frames import audio_token_count
from hebrew_asr.model.loading import load_processor
from hebrew_asr.model.prompts import Prompts
from train_hebrew_asr_enhanced import DataCollatorSpeechSeq2SeqWithPadding


@pytest.fixture
def utterances(train_rows, processor, config):
    config.no_system_prob = config.prev_context_prob = 0.0
    dataset = SpeechDataset(train_rows, processor, config, training=True)
    return [dataset[(1, row)] for row in range(6)]


@pytest.fixture
def collator(processor, config):
    return DataCollatorSpeechSeq2SeqWithPadding(processor, config)


def test_supervised_tokens_are_the_target_and_nothing_else(collator, utterances, processor):
    batch = collator(utterances, training=True)
    for utterance, ids, labels in zip(utterances, batch["input_ids"], batch["labels"], strict=True):
        supervised = labels != -100
        assert processor.tokenizer.decode(ids[supervised]) == f"language Hebrew<asr_text>{utterance['text']}<|im_end|>"
        assert torch.equal(ids[supervised], labels[supervised])
        first, last = supervised.nonzero()[[0, -1], 0].tolist()
        assert supervised[first : last + 1].all(), "the target has no gap"
        assert processor.tokenizer.decode(ids[:first]).endswith("<|im_start|>assistant\n")


def test_input_is_the_prompt_of_the_base_model(collator, utterances, processor):
    batch = collator(utterances, training=True)
    for i, utterance in enumerate(utterances):
        ids = batch["input_ids"][i][batch["attention_mask"][i] == 1]
        pads = audio_token_count(utterance["features"].shape[1])
        assert processor.tokenizer.decode(ids) == (
            "<|im_start|>system\n<|im_end|>\n"
            f"<|im_start|>user\n<|audio_start|>{'<|audio_pad|>' * pads}<|audio_end|><|im_end|>\n"
            f"<|im_start|>assistant\nlanguage Hebrew<asr_text>{utterance['text']}<|im_end|>"
        )


def test_prompt_and_features_equal_those_of_the_processor_on_the_clip_alone(
    collator, train_rows, utterances, processor
):
    batch = collator(utterances, training=False)
    for row in range(len(utterances)):
        waveform = decode_audio(*(train_rows[row][name] for name in ("audio", "start", "end")))
        alone = processor.apply_transcription_request(audio=waveform, sampling_rate=SAMPLE_RATE)
        prompt = batch["prompt_input_ids"][row][batch["prompt_attention_mask"][row] == 1]
        assert prompt.tolist() == alone["input_ids"][0].tolist()
        frames = int(alone["input_features_mask"].sum())
        assert int(batch["input_features_mask"][row].sum()) == frames
        assert torch.equal(batch["input_features"][row, :, :frames], alone["input_features"][0, :, :frames])
        assert not batch["input_features"][row, :, frames:].any()


def test_language_can_be_prefilled_for_evaluation(config, processor, utterances):
    config.eval_prefill_language = True
    batch = DataCollatorSpeechSeq2SeqWithPadding(processor, config)(utterances, training=False)
    for ids in batch["prompt_input_ids"]:
        assert processor.tokenizer.decode(ids).endswith("<|im_start|>assistant\nlanguage Hebrew<asr_text>")


def test_audio_tokens_match_the_encoder_for_every_length(processor, model):
    frames = torch.arange(50, 3001)
    expected = processor._get_audio_token_length(frames)
    assert [audio_token_count(int(count)) for count in frames] == expected.tolist()
    encoder = model.model.audio_tower
    for count in (50, 99, 100, 101, 357):
        width = -(-count // 100) * 100
        mask = (torch.arange(width) < count).long()[None]
        with torch.no_grad():
            outputs = encoder(torch.zeros(1, 128, width), mask).last_hidden_state
        assert outputs.shape[0] == audio_token_count(count)


@pytest.mark.parametrize("packed", [True, False])
def test_an_empty_share_of_a_step_has_no_supervised_token(collator, model, packed):
    batch = collator.packed([]) if packed else collator([], training=True)
    assert (batch["labels"] == -100).all()
    loss = model(**batch, num_items_in_batch=1).loss
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert loss.item() == 0 and gradients and not any(g.any() for g in gradients)


class TestSpecAugment:
    """Masks lie on the right axes, inside the speech, in training batches only, and depend on (seed, epoch, row)."""

    def features(self, frames=(300, 100, 57)):
        return torch.ones(len(frames), 128, 300), list(frames), [(1, row) for row in range(len(frames))]

    def test_masks_are_whole_stripes_inside_the_valid_frames(self, collator):
        features, frames, draws = self.features()
        features[:, 0, 0] = 7.0  # a mark, to see that the input is not written to
        masked = collator.apply_specaugment(features, frames, draws)
        assert (features[:, 0, 0] == 7.0).all()
        hit = masked == collator.config.mask_value
        for i, count in enumerate(frames):
            assert not hit[i, :, count:].any(), "padding is left alone"
            inside = hit[i, :, :count]
            columns, rows = inside.all(dim=0), inside.all(dim=1)
            assert (inside == (columns[None, :] | rows[:, None])).all(), (
                "time masks span all bins, frequency masks all frames"
            )
            assert columns.sum() <= 0.2 * count
            assert rows.sum() <= 2 * 27
        assert hit.any()

    def test_widths_follow_the_parameters(self, collator):
        widest_time = widest_frequency = 0
        for row in range(300):
            hit = collator.apply_specaugment(torch.ones(1, 128, 3000), [3000], [(1, row)])[0] == 0
            widest_time = max(widest_time, int(hit.all(dim=0).sum()))
            widest_frequency = max(widest_frequency, int(hit.all(dim=1).sum()))
        assert 120 < widest_time <= 2 * 80, "two masks of up to 80 frames"
        assert 40 < widest_frequency <= 2 * 27, "two masks of up to 27 bins"

    def test_a_clip_of_one_second_is_not_erased(self, collator):
        for row in range(100):
            hit = collator.apply_specaugment(torch.ones(1, 128, 100), [100], [(1, row)])[0] == 0
            assert hit.all(dim=0).sum() <= 20

    def test_masks_depend_on_seed_epoch_and_row_alone(self, collator, utterances):
        together = collator(utterances, training=True)["input_features"]
        reversed_order = collator(utterances[::-1], training=True)["input_features"]
        assert torch.equal(together, reversed_order.flip(0))
        later = [u | {"epoch": 2} for u in utterances]
        assert not torch.equal(together, collator(later, training=True)["input_features"])
        collator.config.seed += 1
        assert not torch.equal(together, collator(utterances, training=True)["input_features"])

    def test_only_training_batches_are_masked(self, collator, utterances):
        plain = collator(utterances, training=False)["input_features"]
        for i, utterance in enumerate(utterances):
            count = utterance["features"].shape[1]
            assert np.array_equal(plain[i, :, :count].numpy(), utterance["features"])
        assert not torch.equal(plain, collator(utterances, training=True)["input_features"])
        collator.config.use_specaugment = False
        assert torch.equal(plain, collator(utterances, training=True)["input_features"])


LOOPS = "{% for a in range(99999) %}" * 4 + "{% endfor %}" * 4
HOSTILE = {
    "loops": (LOOPS, "does not end within 5 s"),
    "memory": ("{{ 'a' * 99999999999 }}", "MemoryError"),
    "length": ("{{ '<|audio_pad|>' * 99999 }}", "<|audio_pad|> once"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "syntax": ("{% for %}", "TemplateSyntaxError"),
    "no audio": ("hello", "does not write <|audio_pad|> once"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_chat_template_is_refused_within_bounds(kind, tmp_path):
    template, said = HOSTILE[kind]
    shutil.copytree(DEMO / "tuned", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    processor, started = load_processor(str(tmp_path / "model")), time.monotonic()
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "model"))) as problem:
        Prompts(processor)
    assert said in str(problem.value) and time.monotonic() - started < 30


def test_a_context_stands_where_the_template_puts_it(processor):
    """As the template itself writes it, also with what a pattern or a template would act on."""
    prompts = Prompts(processor)
    for context in ("שלום עולם", r"\1 {{ x }} $0 ", "a"):
        system = {"role": "system", "content": [{"type": "text", "text": context}]}
        user = {"role": "user", "content": [{"type": "audio", "audio": ""}]}
        text = processor.apply_chat_template([system, user], add_generation_prompt=True, tokenize=False)
        before, after = (processor.tokenizer(part, add_special_tokens=False)["input_ids"]
                         for part in text.split("<|audio_pad|>"))  # fmt: skip
        assert prompts.around_audio(context) == (before, after)
