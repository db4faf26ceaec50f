"""Finds the token budget on a CPU, where the last process alone runs out of memory.

    torchrun --nproc_per_node=2 tests/find_budget.py SETTINGS.json TOKENS

The last process has memory for TOKENS positions at once. Afterwards the processes still talk to one another.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import accelerate
import torch
from accelerate.utils import gather_object

from hebrew_asr.command_line import parse_config
from hebrew_asr.model.loading import load_processor, load_to_train
from hebrew_asr.model.loss import SpeechModel
from hebrew_asr.processes import fail_together, launch, leave_process_group
from hebrew_asr.training.token_budget import find_token_budget
from train_hebrew_asr_enhanced import DataCollatorSpeechSeq2SeqWithPadding, TrainingConfig


def run_out_of_memory(tokens: int) -> None:
    forward = SpeechModel.forward

    def forward_of_a_small_device(self, *args, input_ids: torch.Tensor, **inputs):
        if input_ids.numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, *args, input_ids=input_ids, **inputs)

    SpeechModel.forward = forward_of_a_small_device


def main(settings: str, tokens: str) -> None:
    config = parse_config(["--config", settings], TrainingConfig())
    state = accelerate.PartialState(cpu=True)
    if state.is_last_process:
        run_out_of_memory(int(tokens))
    try:
        with fail_together():
            processor = load_processor(config.model_name_or_path)
            model = load_to_train(config, use_bf16=False)
        collator = DataCollatorSpeechSeq2SeqWithPadding(processor, config)
        lines = find_token_budget(config, state, model, collator, use_bf16=False)
        if state.is_main_process:
            print(*lines, sep="\n")
    finally:
        print(f"process {state.process_index} hears of {gather_object([state.process_index])}", flush=True)
    leave_process_group()


if __name__ == "__main__":
    launch(lambda arguments: main(*arguments))
