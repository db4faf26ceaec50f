"""Runs `main` and stops it at a step, for tests of resuming.

    torchrun --nproc_per_node=2 tests/run_and_stop.py SETTINGS.json STEP HOW

SETTINGS.json holds a TrainingConfig. After STEP steps the process stops itself: `kill` as when the machine ends, once
the checkpoint before it is written; `TERM` as when a scheduler asks the last one to; `TERM-to-the-agent` as when it
asks that one's torchrun to; `TERM-while-writing` as when it asks while the first checkpoint is written to a disk that
takes a minute; with -1 it runs to its end.
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from hebrew_asr.checkpoints import store
from hebrew_asr.command_line import parse_config
from hebrew_asr.processes import launch
from hebrew_asr.training.resuming import CheckpointEvents
from train_hebrew_asr_enhanced import TrainingConfig, main


def stop_at(stop_step: int, how: str) -> None:
    on_step_begin = CheckpointEvents.on_step_begin

    def stop_first(self, args, state, control, **kwargs):
        on_step_begin(self, args, state, control, **kwargs)
        if state.global_step == stop_step and how == "kill":
            self.trainer.writer.wait()
            os.kill(os.getpid(), signal.SIGKILL)
        if state.global_step == stop_step and args.process_index == args.world_size - 1:
            name, _, to_agent = how.partition("-")
            os.kill(os.getppid() if to_agent else os.getpid(), getattr(signal, f"SIG{name}"))
            while not self.trainer.watch.stop:  # the agent passes it on
                time.sleep(0.01)

    CheckpointEvents.on_step_begin = stop_first


def stop_while_writing() -> None:
    write = store.write
    store.write = lambda *rest: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(60), write(*rest))


if __name__ == "__main__":
    settings, step, how = sys.argv[1:]
    if how == "TERM-while-writing":
        stop_while_writing()
    else:
        stop_at(int(step), how)
    launch(lambda _: main(parse_config(["--config", settings], TrainingConfig())))
