"""Runs `main` and keeps what each rank ends with; for tests that compare ranks and process counts.

    torchrun --nproc_per_node=2 tests/train_and_keep.py SETTINGS.json FOLDER [without_rewrap] [slow_rank]

SETTINGS.json holds a TrainingConfig. With `without_rewrap`, a stage is entered the way that breaks DDP in silence. With
`slow_rank`, each backward pass of the second process takes a quarter of a second more.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from safetensors.torch import save_file

from hebrew_asr.command_line import parse_config
from hebrew_asr.model.stages import freeze_for
from hebrew_asr.processes import launch
from train_hebrew_asr_enhanced import GradualUnfreezeTrainer, TrainingConfig, main


def enter_stage_without_rewrap(self, stage):
    self.stage = stage
    freeze_for(self.model, stage)


def slow_on_the_second_process(self, model, batch, scale, compute=GradualUnfreezeTrainer.scaled_loss):
    loss = compute(self, model, batch, scale)
    if self.args.process_index == 1:
        loss.register_hook(lambda _: time.sleep(0.25))
    return loss


def keep_after_training(folder: Path):
    train = GradualUnfreezeTrainer.train

    def train_then_keep(self):
        train(self)
        rank = self.args.process_index
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {n: p.detach().contiguous() for n, p in self.model.named_parameters()}, folder / f"{rank}.safetensors"
        )
        names = {id(p): n for n, p in self.model.named_parameters()}
        adam = {
            names[id(p)]: {"steps": int(s["step"]), "types": [str(p.dtype), str(s["exp_avg"].dtype)]}
            for p, s in self.optimizer.optimizer.state.items()
        }
        (folder / f"{rank}.json").write_text(json.dumps(adam))

    return train, train_then_keep


def run(settings: str, folder: str, *flags: str) -> None:
    if "without_rewrap" in flags:
        GradualUnfreezeTrainer.enter_stage = enter_stage_without_rewrap
        GradualUnfreezeTrainer.check_ranks = lambda self: None  # it would end the run
    if "slow_rank" in flags:
        GradualUnfreezeTrainer.scaled_loss = slow_on_the_second_process
    _, GradualUnfreezeTrainer.train = keep_after_training(Path(folder))
    launch(lambda _: main(parse_config(["--config", settings], TrainingConfig())))


if __name__ == "__main__":
    run(*sys.argv[1:])
