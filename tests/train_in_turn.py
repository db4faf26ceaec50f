"""Runs `main` several times in the same processes, which saves their start, and keeps what each rank ends with.

    torchrun --nproc_per_node=2 tests/train_in_turn.py RUNS.json

RUNS.json holds a list of runs: a free port, a TrainingConfig, and the steps without a finite gradient. Into a run's
folder goes, for each rank, `ends-with-<rank>.json`: of every parameter whether it is sharded, how much of it is here,
whether it trains, and the types of it, of its moments, and if it is a layer's product's, of what it was computed with.
"""

import json
import os
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from accelerate.state import AcceleratorState, PartialState
from torch.distributed.tensor import DTensor

from hebrew_asr.command_line import parse_config
from hebrew_asr.processes import launch
from train_hebrew_asr_enhanced import GradualUnfreezeTrainer, TrainingConfig, main

train, clip = GradualUnfreezeTrainer.train, GradualUnfreezeTrainer._clip_grad_norm
broken: list[int] = []  # steps of the run at hand


def train_and_keep(self: GradualUnfreezeTrainer) -> None:
    seen = defaultdict(set)
    hooks = [
        layer.mlp.up_proj.register_forward_pre_hook(
            lambda module, _, number=number: seen[f"layers.{number}.mlp.up_proj.weight"].add(str(module.weight.dtype))
        )
        for number, layer in enumerate(self.model.model.language_model.layers)
    ]
    train(self)
    for hook in hooks:
        hook.remove()
    ends = {}
    for name, parameter in self.model.named_parameters():
        is_sharded = isinstance(parameter, DTensor)
        moments = self.optimizer.optimizer.state.get(parameter, {})
        ends[name] = {
            "sharded": is_sharded,
            "here": (parameter.to_local() if is_sharded else parameter).numel(),
            "of": parameter.numel(),
            "trains": parameter.requires_grad,
            "type": str(parameter.dtype),
            "seen": sorted(seen[name.removeprefix("model.language_model.")]),
            "moments": [str(moments[key].dtype) for key in ("exp_avg", "exp_avg_sq") if key in moments],
        }
    (Path(self.args.output_dir) / f"ends-with-{self.args.process_index}.json").write_text(json.dumps(ends))


def break_some(self: GradualUnfreezeTrainer, model):
    if self.order == 0 and self.state.global_step + 1 in broken:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.fill_(float("nan"))
    return clip(self, model)


if __name__ == "__main__":
    GradualUnfreezeTrainer.train, GradualUnfreezeTrainer._clip_grad_norm = train_and_keep, break_some
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # torchrun's own store serves one process group
    for port, settings, steps in json.loads(Path(sys.argv[1]).read_text()):
        broken[:] = steps
        os.environ["MASTER_PORT"] = str(port)
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        file = Path(f"{sys.argv[1]}.{os.environ['RANK']}")
        file.write_text(json.dumps(settings))
        launch(lambda _, file=file: main(parse_config(["--config", str(file)], TrainingConfig())))
