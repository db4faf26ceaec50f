"""What trains when, at which rate, in which batch: against the spec's own figures and plain arithmetic."""

import dataclasses
import math

import pytest
import torch
import transformers

from hebrew_asr.errors import InputError
from hebrew_asr.model.stages import COMPONENTS, Stage, check_stages, component_of, freeze_for, trains_in
from hebrew_asr.training.resuming import training_arguments
from hebrew_asr.training.run_log import RunLog
from train_hebrew_asr_enhanced import GradualUnfreezeTrainer, TrainingConfig, schedule_factor
from train_round2_gradual import round2


@pytest.fixture(scope="module")
def real_size_model():
    """Qwen3-ASR-1.7B's module tree, without memory for its weights."""
    text = {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    }
    audio = {"output_dim": 2048}
    with torch.device("meta"):
        return transformers.Qwen3ASRForConditionalGeneration(
            transformers.Qwen3ASRConfig(text_config=text, audio_config=audio)
        )


def names(model) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def test_round2_trains_the_layers_of_the_spec_in_the_real_model(real_size_model):
    b, a = round2().stages
    config = real_size_model.config
    check_stages(real_size_model, [b, a])
    in_b = {n for n in names(real_size_model) if trains_in(n, b, config)}
    in_a = {n for n in names(real_size_model) if trains_in(n, a, config)}
    assert {n.split(".layers.")[1].split(".")[0] for n in in_b if "language_model.layers" in n} == set(
        map(str, range(16, 28))
    )
    assert not [n for n in in_b if "audio_tower.layers" in n]
    assert in_a - in_b == {n for n in names(real_size_model) for i in range(16, 24) if f"audio_tower.layers.{i}." in n}
    assert in_b < in_a
    rest = {n for n in in_b if "language_model.layers" not in n}
    assert rest == {
        "model.language_model.embed_tokens.weight",
        *(f"model.audio_tower.ln_post.{p}" for p in ("weight", "bias")),
        *(f"model.multi_modal_projector.linear_{i}.{p}" for i in (1, 2) for p in ("weight", "bias")),
    }
    assert "model.language_model.norm.weight" not in in_a
    assert {component_of(n, a, config) for n in in_a} == set(COMPONENTS)


def test_round2_has_the_rates_of_the_spec():
    b, a = round2().stages
    assert (b.name, b.last_epoch, a.name, a.last_epoch) == ("B", 2, "A", 5)
    assert b.learning_rates == {"projector": 2e-4, "llm_top": 5e-5, "lm_head": 1e-4}
    assert a.learning_rates == {"projector": 1e-4, "audio_top": 3e-5, "llm_top": 3e-5, "lm_head": 1e-4}
    config = round2()
    spec = {"use_specaugment": True, "time_mask_param": 80, "freq_mask_param": 27, "num_time_masks": 2}
    spec |= {"num_freq_masks": 2, "mask_value": 0.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1}
    spec |= {"warmup_steps": 500, "max_grad_norm": 1.0, "weight_decay": 0.01, "target_effective_batch": 64}
    assert {name: getattr(config, name) for name in spec} == spec
    assert config.gradient_accumulation_steps(2) == 16 and config.gradient_accumulation_steps(8) == 4


@pytest.fixture
def trainer(config, model, processor, train_rows, eval_rows, tmp_path):
    config.layerwise_lr_decay_rate = 0.5
    for stage in config.stages:
        stage.llm_top_layers = 2
    trainer = GradualUnfreezeTrainer(
        config,
        training_arguments(config, tmp_path, cpu=True),
        model,
        processor,
        train_rows,
        eval_rows,
        RunLog(tmp_path, rank=0),
        use_bf16=False,
    )
    trainer.create_optimizer_and_scheduler(trainer.total_steps)
    return trainer


def test_rates_are_one_cosine_with_warmup_times_the_stage(trainer):
    steps, per_epoch = trainer.total_steps, 6
    assert steps == 12, "41 utterances by 8 are 6 steps an epoch"
    warmup = math.ceil(0.1 * steps)
    for step in range(steps):
        factor = step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        peaks = (
            {"projector": 4e-3, "llm_top": 1e-3, "lm_head": 2e-3, "audio_top": 0}
            if step < per_epoch
            else {"projector": 2e-3, "llm_top": 6e-4, "lm_head": 2e-3, "audio_top": 6e-4}
        )
        for group in trainer.optimizer.param_groups:
            expected = factor * peaks[group["component"]] * 0.5 ** group["depth"]
            assert group["lr"] == pytest.approx(expected, rel=1e-9, abs=1e-15), (step, group["component"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()


def test_warmup_steps_count_when_the_ratio_is_zero():
    by_steps = schedule_factor(TrainingConfig(warmup_ratio=0.0, warmup_steps=500), 1000)
    by_ratio = schedule_factor(TrainingConfig(warmup_ratio=0.1, warmup_steps=500), 1000)
    assert [by_steps(step) for step in (0, 250, 500, 1000)] == pytest.approx([0.0, 0.5, 1.0, 0.0])
    assert [by_ratio(step) for step in (0, 50, 100, 550)] == pytest.approx([0.0, 0.5, 1.0, 0.5])


def test_every_parameter_that_ever_trains_is_in_exactly_one_group(trainer):
    config, model = trainer.config, trainer.model
    in_groups = [id(p) for g in trainer.optimizer.param_groups for p in g["params"]]
    ever = [
        (name, p)
        for name, p in model.named_parameters()
        if any(trains_in(name, s, model.config) for s in config.stages)
    ]
    assert sorted(in_groups) == sorted(id(p) for _, p in ever)
    by_id = {id(p): name for name, p in ever}
    for group in trainer.optimizer.param_groups:
        for p in group["params"]:
            name = by_id[id(p)]
            assert component_of(name, config.stages[-1], model.config) == group["component"]
            is_matrix = p.ndim > 1
            assert group["weight_decay"] == (config.weight_decay if is_matrix else 0.0), name
    depths = {g["depth"] for g in trainer.optimizer.param_groups if g["component"] == "llm_top"}
    assert depths == {0, 1}


def test_freezing_follows_the_stage(model, config):
    for stage in config.stages:
        freeze_for(model, stage)
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad == trains_in(name, stage, model.config), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch_size": 3, "tokens_per_micro_batch": None},
            r"not a multiple of batch_size × processes \(3 × 2 = 6\).*batch_size 2 or 4.*60 or 66",
        ),
        ({"batch_size": 0}, "at least 1"),
        ({"tokens_per_micro_batch": 0}, "at least 1"),
        ({"stages": []}, "stages is empty"),
        ({"stages": [Stage("B", 2, {"projector": 1e-4}), Stage("A", 2, {"projector": 1e-4})]}, "must grow"),
        ({"stages": [Stage("B", 5, {"encoder": 1e-4})]}, "unknown component"),
        ({"stages": [Stage("B", 5, {})]}, "trains nothing"),
        ({"num_epochs": 7}, "ends at epoch 5"),
        ({"num_epochs": 0}, "nothing to train"),
        ({"tracker": "mlflow"}, "tracker must be wandb, trackio or none, got mlflow"),
        ({"hf_repo_id": "no-owner"}, "owner/name"),
        ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(changes, message):
    config = dataclasses.replace(round2(), **changes)
    with pytest.raises(InputError, match=message):
        config.check(processes=2)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (Stage("A", 1, {"audio_top": 1e-4}, audio_top_layers=99), "audio_top_layers is 99, but the model has"),
        (Stage("A", 1, {"llm_top": 1e-4}, llm_top_layers=0), "llm_top_layers is 0"),
    ],
)
def test_stages_are_checked_against_the_model(model, stage, message):
    with pytest.raises(InputError, match=message):
        check_stages(model, [stage])


def test_tags_name_what_is_switched_on():
    assert round2().tags == ["sota-2025", "specaugment", "cosine-lr", "gradual-unfreezing"]
    plain = TrainingConfig(use_specaugment=False, lr_scheduler_type="linear")
    assert plain.tags == ["sota-2025"]
