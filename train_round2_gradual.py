"""Round 2: Strategy B for two epochs, then Strategy A for three; or another recipe, by name.

    uv run torchrun --nproc_per_node=8 train_round2_gradual.py            Qwen3-ASR-1.7B on the ivrit.ai corpora
    uv run torchrun --nproc_per_node=2 train_round2_gradual.py --demo     a small model on the corpus in demo/, no GPU
    uv run torchrun --nproc_per_node=8 train_round2_gradual.py --strategy all_with_replay --nonspeech data/noise

Every field of TrainingConfig can be given after it: `--num_epochs 3 --use_specaugment false`.
"""

if __name__ == "__main__":  # the imports take seconds
    from hebrew_asr.start import begin

    begin()

import functools
import typing

from hebrew_asr.command_line import READERS, help_of, parse_config, split_options
from hebrew_asr.data.sources import Source, WaveformAugmentation
from hebrew_asr.errors import InputError
from hebrew_asr.files import DEMO
from hebrew_asr.training.strategies import STRATEGIES, RecipeOptions, check_replayed, stages_of, with_replay

if typing.TYPE_CHECKING:  # its imports take seconds
    from train_hebrew_asr_enhanced import TrainingConfig

DEMO_OPTIONS = RecipeOptions(
    english=Source(str(DEMO / "replay/english_900")), nonspeech=Source(str(DEMO / "replay/nonspeech"))
)


def round2(strategy: str = "b_then_a") -> "TrainingConfig":
    """B adapts the projector and the language model's top while the encoder rests; A adds the encoder's top."""
    from train_hebrew_asr_enhanced import TrainingConfig  # here, since it is also called while that is imported

    stages = stages_of(strategy)
    return TrainingConfig(stages=stages, num_epochs=stages[-1].last_epoch, optimizer=STRATEGIES[strategy].optimizer)


def demo(strategy: str = "b_then_a") -> "TrainingConfig":
    """Round 2 on the small world: fewer layers, rates 20 times as high, a batch of 16, and no account anywhere."""
    config, faster = round2(strategy), {"all_with_replay": 30, "muon_with_replay": 60}.get(strategy, 20)
    if strategy.endswith("with_replay"):  # what was best of some 40 runs there (docs/recipes.md)
        config.num_time_masks = 0  # its clips have 1.7 s: a mask hides whole words
        config.use_waveform_augmentation = True
        config.waveform_augmentation = WaveformAugmentation((1.0,), 0, gain_probability=0, noise_probability=0.1)
    for stage in config.stages:
        stage.learning_rates = {component: faster * rate for component, rate in stage.learning_rates.items()}
        if stage.llm_top_layers is not None:
            stage.audio_top_layers = stage.llm_top_layers = 1
    config.model_name_or_path = str(DEMO / "base")
    config.train_sources = [Source(str(DEMO / "corpus"))]
    config.eval_sources = [Source(str(DEMO / "heldout"), split="test")]
    config.text_rules.quote_style = "keep"  # the corpus and the test set write צה״ל alike
    config.no_system_prob = config.prev_context_prob = 0.0  # so short a run learns one form best
    config.target_effective_batch, config.batch_size = 16, 8
    config.dataloader_num_workers = config.preprocessing_num_workers = 0
    config.eval_batch_size = 64
    config.logging_steps = 25
    config.tracker = "trackio"
    config.skip_hf_upload = True
    config.target_loss, config.target_wer = 1.0, 20.0
    return config


def recipe(arguments: list[str]) -> "TrainingConfig":
    mine, others = split_options(arguments, RecipeOptions)
    given = parse_config(mine, DEMO_OPTIONS if "--demo" in others else RecipeOptions())
    check_replayed(mine, given)
    if mine and any(argument.split("=")[0] == "--config" for argument in others):
        raise InputError(
            f"{mine[0]} and --config: the file has its stages and sources already, so leave one of them out"
        )

    chosen = functools.partial(demo, given.strategy)
    stages = (chosen() if "--demo" in others else round2(given.strategy)).stages

    def completed(config: "TrainingConfig") -> "TrainingConfig":
        config.train_sources = with_replay(config.train_sources, given)
        if config.stages == stages:  # the strategy's own, whose last one lasts as long as the run
            config.stages[-1].last_epoch = max(config.num_epochs, stages[-1].last_epoch)
        return config

    about = f"{__doc__}\n{help_of(RecipeOptions())}"
    return parse_config(others, round2(given.strategy), chosen, about, adapt=completed)


if __name__ == "__main__":
    READERS.append(lambda arguments: recipe(arguments).check_early())  # called where the script has its config
    from train_hebrew_asr_enhanced import launch, main

    launch(lambda arguments: main(recipe(arguments)))
