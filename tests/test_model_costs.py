"""The count of operations from the configuration is PyTorch's own."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hebrew_asr.data.utterances import SpeechDataset
from hebrew_asr.model.costs import flops, work_of
from hebrew_asr.model.stages import freeze_for
from train_hebrew_asr_enhanced import DataCollatorSpeechSeq2SeqWithPadding

PARTS = ("audio_tower", "multi_modal_projector", "language_model")


@pytest.mark.parametrize("number", [0, 1, None])
def test_operations_of_a_stage_are_those_pytorch_counts(config, model, processor, train_rows, number):
    """To 2 %, there and back, in both stages and with everything trained; of attention it counts the math kind."""
    dataset = SpeechDataset(train_rows, processor, config, training=True)
    batch = DataCollatorSpeechSeq2SeqWithPadding(processor, config).packed([dataset[(1, row)] for row in range(12)])
    if number is not None:
        freeze_for(model, config.stages[number])
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(**batch).loss.backward()
    counted = sum(flops(model.config, work_of(batch, model.config), trains.__contains__).values())
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_components_alone_are_those_pytorch_counts(config, model, processor, train_rows):
    dataset = SpeechDataset(train_rows, processor, config, training=True)
    batch = DataCollatorSpeechSeq2SeqWithPadding(processor, config).packed([dataset[(1, row)] for row in range(12)])
    with torch.no_grad(), FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(**batch)
    found = flops(model.config, work_of(batch, model.config))
    counts = {name: sum(by_operation.values()) for name, by_operation in counter.get_flop_counts().items()}
    assert found["llm"] == pytest.approx(counts["SpeechModel.model.language_model"], rel=0.02)
    assert found["projector"] == counts["SpeechModel.model.multi_modal_projector"]
    assert found["convolution"] + found["encoder"] == pytest.approx(counts["SpeechModel.model.audio_tower"], rel=0.02)
    assert found["head"] == counts["Global"] - sum(counts[f"SpeechModel.model.{part}"] for part in PARTS)
