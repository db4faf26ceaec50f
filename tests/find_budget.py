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

from label_loss import SpeechModel
from train_hebrew_asr_enhanced import TrainingConfig, launch, leave_process_group, parse_config, print_token_budget


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
        print_token_budget(config, state, use_bf16=False)
    finally:
        print(f"process {state.process_index} hears of {gather_object([state.process_index])}", flush=True)
    leave_process_group()


if __name__ == "__main__":
    launch(lambda arguments: main(*arguments))
