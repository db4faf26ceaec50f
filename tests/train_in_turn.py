"""Runs `main` several times in the same processes, which saves their start, and keeps what each rank ends with.

    torchrun --nproc_per_node=2 tests/train_in_turn.py RUNS.json

RUNS.json holds a list of TrainingConfigs, each with a port that is free. Into a run's folder goes, for each rank, a file
`ends-with-<rank>.json`: of every parameter whether it is sharded, how much of it is here, and the types of it and of its
moments.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import accelerate.state
from torch.distributed.tensor import DTensor

from train_hebrew_asr_enhanced import GradualUnfreezeTrainer, TrainingConfig, launch, main, parse_config


def keep(trainer: GradualUnfreezeTrainer) -> None:
    ends = {}
    for name, parameter in trainer.model.named_parameters():
        is_sharded = isinstance(parameter, DTensor)
        moments = trainer.optimizer.optimizer.state.get(parameter, {})
        ends[name] = {
            "sharded": is_sharded,
            "here": (parameter.to_local() if is_sharded else parameter).numel(),
            "of": parameter.numel(),
            "trains": parameter.requires_grad,
            "type": str(parameter.dtype),
            "moments": [str(moments[key].dtype) for key in ("exp_avg", "exp_avg_sq") if key in moments],
        }
    file = Path(trainer.args.output_dir) / f"ends-with-{trainer.args.process_index}.json"
    file.write_text(json.dumps(ends))


def train_and_keep(self: GradualUnfreezeTrainer) -> None:
    train(self)
    keep(self)


if __name__ == "__main__":
    train, GradualUnfreezeTrainer.train = GradualUnfreezeTrainer.train, train_and_keep
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # torchrun's own store serves one process group
    for port, settings in json.loads(Path(sys.argv[1]).read_text()):
        os.environ["MASTER_PORT"] = str(port)
        for state in (accelerate.state.AcceleratorState, accelerate.state.PartialState):
            state._reset_state()
        config = dataclasses.replace(TrainingConfig(), **settings)
        file = Path(f"{sys.argv[1]}.{os.environ['RANK']}")
        file.write_text(json.dumps(dataclasses.asdict(config)))
        launch(lambda _, file=file: main(parse_config(["--config", str(file)], TrainingConfig())))
