"""How much of a training step is signal: Round 3's objectives and cross-entropy at one checkpoint of the demo world.

    uv run --group demo python benchmarks/gradient_signal.py --start CHECKPOINT --work FOLDER

Of the gradients g of n steps of different utterances at the same weights, the products of two different ones are on
average |E g|², those of one with itself E |g|². Their quotient is the share of signal in a step. Where it is s, the
noise scale of McCandlish et al. (2018, arXiv:1812.06162, equation 2.9: the batch at which both are equally large) is
utterances a step · (1 - s) / s. Intervals are of a bootstrap over steps. Two objectives are compared by products of
different steps too, so that what the utterances have in common does not count.

FOLDER is the --work of round3.py. The steps are those of its arms (its utterances, noise and samples) at rates that
move nothing.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from benchmarks import round3
from hebrew_asr.processes import launch
from scripts import train_round3_gspo
from train_hebrew_asr_enhanced import main

STILL = 1e-9  # of the rates
UTTERANCES_A_STEP = 64
FEWEST_STEPS = 16  # of three, the bootstrap draws one alone
ARMS = {
    "cross-entropy": ("ce", {}),
    "gspo, temperature 0.5": ("gspo", {"temperature": 0.5}),
    "gspo, temperature 1": ("gspo", {"temperature": 1.0}),
    "mwer, temperature 1": ("mwer", {"temperature": 1.0}),
}


def gradients_of(name: str, setup: round3.Setup) -> torch.Tensor:
    """(steps, parameters) of one epoch, without the last step, which may have fewer utterances."""
    objective, options = ARMS[name]
    options = options | {"target_effective_batch": UTTERANCES_A_STEP, "max_grad_norm": 1e9}
    arm = round3.Arm(objective, STILL, seed=1, options=json.dumps(options))
    config, found = round3.arm_config(arm, setup), []

    def keep(optimizer: torch.optim.Optimizer, *_) -> None:
        found.append(torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]))

    hook = register_optimizer_step_pre_hook(keep)
    try:
        with tempfile.TemporaryDirectory() as config.output_dir:
            main(config) if objective == "ce" else train_round3_gspo.train_round3(config)
    finally:
        hook.remove()
    return torch.stack(found[:-1])


def products(first: torch.Tensor, second: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(steps, steps) of different steps, 0 on the diagonal; (steps,) the diagonal."""
    all_products = (first @ second.T).double().numpy()
    return all_products - np.diag(all_products.diagonal()), all_products.diagonal().copy()


def share_of_signal(gradients: torch.Tensor, draws: int = 2000) -> tuple[float, float, float]:
    """The share and its 95 % interval."""
    apart, alike = products(gradients, gradients)

    def share(times: np.ndarray) -> float:  # how often each step was drawn; a step is never paired with itself
        pairs = np.outer(times, times)
        return (pairs * apart).sum() / (pairs.sum() - (times**2).sum()) / (times @ alike / times.sum())

    steps, random = len(alike), np.random.default_rng(0)
    drawn = [share(np.bincount(random.integers(steps, size=steps), minlength=steps)) for _ in range(draws)]
    return share(np.ones(steps)), *np.quantile(drawn, (0.025, 0.975))


def agreement(first: torch.Tensor, second: torch.Tensor) -> float:
    """Cosine of the two expected gradients, where there is signal in both of them."""
    own = products(first, first)[0].sum() * products(second, second)[0].sum()
    return float(products(first, second)[0].sum() / np.sqrt(own))


def noise_scale(share: float) -> float:
    return UTTERANCES_A_STEP * (1 - share) / share if share > 0 else float("inf")


def benchmark(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--start", type=Path, required=True, help="a final_model of Round 2")
    parser.add_argument("--work", type=Path, default=Path("runs/round3-benchmark"), help="of round3.py, with its sets")
    parser.add_argument("--utterances", type=int, default=2400)
    given = parser.parse_args(argv)
    if given.utterances < FEWEST_STEPS * UTTERANCES_A_STEP:
        parser.error(f"--utterances must be at least {FEWEST_STEPS * UTTERANCES_A_STEP}: fewer steps tell nothing")
    setup = round3.Setup(given.work.resolve(), given.start.resolve(), given.utterances, "dev")
    torch.set_num_threads(1)
    gradients = {name: gradients_of(name, setup) for name in ARMS}
    print("\n| objective | share of signal in a step of 64 | noise scale, utterances | cosine with cross-entropy |")
    print("|---|---|---|---|")
    shares = {name: share_of_signal(mine) for name, mine in gradients.items()}
    for name, (share, low, high) in shares.items():
        scale = f"{noise_scale(share):,.0f} (≥ {noise_scale(high):,.0f})"
        is_known = low > 0 and shares["cross-entropy"][1] > 0
        cosine = f"{agreement(gradients[name], gradients['cross-entropy']):.2f}" if is_known else "too little signal"
        print(f"| {name} | {share:.4f} ({low:.4f} to {high:.4f}) | {scale} | {cosine} |")


if __name__ == "__main__":
    launch(benchmark)
