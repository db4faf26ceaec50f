"""Round 2: Strategy B for two epochs, then Strategy A for three.

    uv run torchrun --nproc_per_node=8 train_round2_gradual.py            Qwen3-ASR-1.7B on the ivrit.ai corpora
    uv run torchrun --nproc_per_node=2 train_round2_gradual.py --demo     a small model on the corpus in demo/, no GPU

Every field of TrainingConfig can be given after it: `--num_epochs 3 --use_specaugment false`.
"""

if __name__ == "__main__":  # the imports take seconds
    from hebrew_asr.start import begin

    begin()

from hebrew_asr.command_line import parse_config
from hebrew_asr.data.sources import Source
from hebrew_asr.files import DEMO
from hebrew_asr.model.stages import Stage
from hebrew_asr.processes import launch
from train_hebrew_asr_enhanced import TrainingConfig, main


def round2() -> TrainingConfig:
    """B adapts the projector and the language model's top while the encoder rests; A adds the encoder's top."""
    return TrainingConfig(
        stages=[
            Stage("B", last_epoch=2, learning_rates={"projector": 2e-4, "llm_top": 5e-5, "lm_head": 1e-4}),
            Stage(
                "A",
                last_epoch=5,
                learning_rates={"projector": 1e-4, "audio_top": 3e-5, "llm_top": 3e-5, "lm_head": 1e-4},
            ),
        ]
    )


def demo() -> TrainingConfig:
    """Round 2 on the small world: fewer layers, rates 20 times as high, a batch of 16, and no account anywhere."""
    config = round2()
    for stage in config.stages:
        stage.learning_rates = {component: 20 * rate for component, rate in stage.learning_rates.items()}
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


def recipe(arguments: list[str]) -> TrainingConfig:
    return parse_config(arguments, round2(), demo, __doc__)


if __name__ == "__main__":
    launch(lambda arguments: main(recipe(arguments)))
