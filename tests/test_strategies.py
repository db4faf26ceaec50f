"""Recipes by name, and what is replayed beside the corpora."""

import typing

import pytest
import transformers
from conftest import DEMO
from test_corpora import wav

from hebrew_asr.data.rows import load_rows
from hebrew_asr.errors import InputError
from hebrew_asr.model.stages import LAYER, trains_in
from hebrew_asr.training.strategies import STRATEGIES, RecipeOptions
from train_round2_gradual import recipe, round2


def test_every_strategy_can_be_named_and_none_changes_another():
    named = typing.get_args(typing.get_type_hints(RecipeOptions)["strategy"])
    assert set(named) == set(STRATEGIES)
    for name in named:
        recipe(["--demo", "--strategy", name])  # at 20 times the rates
        noise = ["--nonspeech", "noise"] if STRATEGIES[name].replay_nonspeech else []
        config = recipe(["--strategy", name, *noise])
        config.check(processes=8)
        assert config.stages == STRATEGIES[name].stages and config.num_epochs == config.stages[-1].last_epoch
        assert config.optimizer == ("muon" if name == "muon_with_replay" else "adamw")
    assert recipe([]) == round2()


def test_more_epochs_are_those_of_a_strategys_last_stage():
    def last_epochs(*arguments: str) -> list[int]:
        config = recipe(list(arguments))
        config.check(processes=2)
        return [stage.last_epoch for stage in config.stages]

    assert last_epochs("--num_epochs", "8") == [2, 8] and last_epochs("--num_epochs", "3") == [2, 5]
    assert last_epochs("--demo", "--strategy", "muon_with_replay", "--num_epochs", "5") == [5]
    own = '[{"name": "A", "last_epoch": 5, "learning_rates": {"projector": 1e-4}}]'
    with pytest.raises(InputError, match="ends at epoch 5"):
        last_epochs("--num_epochs", "8", "--stages", own)


def test_everything_means_every_layer_of_both_towers():
    stage, model_config = STRATEGIES["all"].stages[0], transformers.AutoConfig.from_pretrained(DEMO / "base")
    model = transformers.Qwen3ASRForConditionalGeneration(model_config)
    resting = {name for name, _ in model.named_parameters() if not trains_in(name, stage, model_config)}
    assert not any(LAYER.search(name) for name in resting) and len(resting) < 12


def test_replay_takes_its_shares_from_the_sources():
    config = recipe(["--demo", "--replay_english", "0.1", "--replay_nonspeech", "0.02"])
    assert [source.probability for source in config.train_sources] == [0.88, 0.1, 0.02]
    assert [source.replay for source in config.train_sources] == [None, True, True]
    assert [source.language for source in config.train_sources] == [None, "English", "None"]
    config.check(processes=2)
    config = recipe(["--demo", "--strategy", "all_with_replay", "--replay_english", "0.08"])
    assert [source.probability for source in config.train_sources] == [0.9, 0.08, 0.02]
    given = ["--train_sources", '[{"path": "a", "probability": 0.75}, {"path": "b", "probability": 0.25}]']
    config = recipe([*given, "--replay_english", "0.2", "--english", "mine"])
    found = [(source.path, source.probability, source.replay) for source in config.train_sources]
    assert found == [("a", pytest.approx(0.6), None), ("b", pytest.approx(0.2), None), ("mine", 0.2, True)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--replay_nonspeech", "0.1"], "needs --nonspeech"),
        (["--strategy", "all_with_replay"], "or leave it out: --replay_nonspeech 0"),
        (["--strategy", "all", "--english", "en"], "--english names what is replayed.*add --replay_english 0.1"),
        (["--nonspeech.path=noise", "--replay_english", "0.1"], "--nonspeech names what is replayed"),
        (["--strategy", "all_with_replay", "--replay_english", "0", "--english", "en"], "--english names what is"),
        (["--replay_english", "0.1", "--train_sources", '[{"path": "a"}, {"path": "b"}]'], "a probability for each"),
        (["--strategy", "everything"], "b_then_a"),
        (["--strategy", "all", "--config", "x.yaml"], "leave one of them out"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(arguments, said):
    with pytest.raises(InputError, match=said):
        recipe(arguments)


def test_recordings_without_speech_need_no_table(tmp_path):
    for number in range(3):
        wav(tmp_path / "noise" / f"{number}.wav", 1 + number / 10)
    config = recipe(["--demo", "--strategy", "all_with_replay", "--nonspeech", str(tmp_path / "noise")])
    rows = load_rows(config.train_sources[-1:], config, for_training=True)
    assert len(rows) == 3 and set(rows.column("text")) == {""} and set(rows.column("language")) == {"None"}
