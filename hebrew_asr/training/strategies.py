"""Recipes as data: what trains in which stage and how fast, and what is heard beside the corpora.

The rates are those of the 1.7B. B and A have the spec's. Where everything trains, its one rate is the one the spec
gives the language model in B, 5e-5, which lies at the upper end of what public fine-tunes of whole models take: 2e-5
for Qwen3-ASR (zyoung11/Win-AMD-Qwen3-ASR, finetuning/README.md), 1e-5 for Whisper large v2 in Hebrew
(Wenxin-Jiang/CS577-NLP, project/model_cards/_train/Shiry_whisper-large-v2-he_README.md), 5e-5 for Whisper large v3
turbo (malaysia-ai/cooking, whisper/run-large-v3-turbo.sh). Muon has the same: its step is scaled to AdamW's. The demo
trains at 20 times the rates, with replay at 30, by Muon at 60. No recipe but the demo's was measured; docs/recipes.md
has how they compare there.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

from hebrew_asr.command_line import Range
from hebrew_asr.data.sources import Source
from hebrew_asr.errors import InputError
from hebrew_asr.model.stages import COMPONENTS, Stage

ENGLISH = Source("google/fleurs", "en_us", "refs/convert/parquet", text_column="transcription", language="English")


def everything(rate: float) -> dict[str, float]:
    return dict.fromkeys(COMPONENTS, rate)


B = {"projector": 2e-4, "llm_top": 5e-5, "lm_head": 1e-4}
A = {"projector": 1e-4, "audio_top": 3e-5, "llm_top": 3e-5, "lm_head": 1e-4}


@dataclass(frozen=True)
class Strategy:
    stages: list[Stage]
    replay_english: float = 0.0
    replay_nonspeech: float = 0.0
    optimizer: Literal["adamw", "muon"] = "adamw"


STRATEGIES = {
    "b_then_a": Strategy([Stage("B", 2, B), Stage("A", 5, A)]),
    "b_then_all": Strategy([Stage("B", 2, B), Stage("all", 5, everything(3e-5), None, None)]),
    "all": Strategy([Stage("all", 5, everything(5e-5), None, None)]),
    "all_with_replay": Strategy([Stage("all", 5, everything(5e-5), None, None)], 0.16, 0.02),
    "muon_with_replay": Strategy([Stage("all", 3, everything(5e-5), None, None)], 0.16, 0.02, "muon"),
}


@dataclass
class RecipeOptions:
    """Recipe"""

    strategy: Literal["b_then_a", "b_then_all", "all", "all_with_replay", "muon_with_replay"] = "b_then_a"
    """b_then_a: the spec's, Strategy B (projector, top of the language model, head) for two epochs, then A (with the
    encoder's top) for three. b_then_all: B, then everything. all: everything from the start, at one rate; on the demo
    it has fewer errors from 700 utterances on, and more with 175. all_with_replay: all, with 16 % English and 2 %
    without speech beside it, so that these are not forgotten; it needs --nonspeech. muon_with_replay: the same by Muon
    in three epochs; about as good on the demo, but on larger models others found Muon worse (docs/recipes.md)."""
    replay_english: Annotated[float, Range(0, 1)] | None = None
    """Share of an epoch that is English, so that not all is forgotten; None: the strategy's."""
    english: Source = field(default_factory=lambda: dataclasses.replace(ENGLISH))
    """Where the English is from."""
    replay_nonspeech: Annotated[float, Range(0, 1)] | None = None
    """Share of an epoch without speech, so that silence and noise stay without words; None: the strategy's."""
    nonspeech: Source | None = None
    """Recordings in which nobody speaks, for replay_nonspeech."""


def stages_of(strategy: str) -> list[Stage]:
    return [dataclasses.replace(one, learning_rates=dict(one.learning_rates)) for one in STRATEGIES[strategy].stages]


def shares_of(options: RecipeOptions) -> tuple[float, float]:
    """Shares of an epoch that are English, and without speech."""
    strategy = STRATEGIES[options.strategy]
    english = strategy.replay_english if options.replay_english is None else options.replay_english
    nonspeech = strategy.replay_nonspeech if options.replay_nonspeech is None else options.replay_nonspeech
    return english, nonspeech


def check_replayed(given: list[str], options: RecipeOptions) -> None:
    """Raises InputError for recordings to replay, named on the command line, of which the share is 0."""
    names = {argument.partition("=")[0].partition(".")[0] for argument in given}
    for name, share in zip(("english", "nonspeech"), shares_of(options), strict=True):
        if f"--{name}" in names and not share:
            raise InputError(
                f"--{name} names what is replayed, of which this recipe has no share: add --replay_{name} 0.1 for a"
                f" tenth of an epoch, or leave --{name} out"
            )


def with_replay(sources: list[Source], options: RecipeOptions) -> list[Source]:
    """The sources with what is replayed beside them; their own shares shrink by as much."""
    english, nonspeech = shares_of(options)
    if nonspeech and options.nonspeech is None:
        raise InputError(
            f"{nonspeech:.0%} of an epoch without speech needs --nonspeech, recordings in which nobody speaks; or leave"
            " it out: --replay_nonspeech 0"
        )
    replayed = [
        dataclasses.replace(source, probability=share, replay=True, language=language)
        for source, share, language in (
            (options.english, english, options.english.language or "English"),
            (options.nonspeech, nonspeech, "None"),
        )
        if source is not None and share
    ]
    if not replayed:
        return sources
    left = 1 - english - nonspeech
    if len(sources) > 1 and any(source.probability is None for source in sources):
        raise InputError("replaying English or non-speech beside several sources needs a probability for each of them")
    return [dataclasses.replace(s, probability=left * (s.probability or 1.0)) for s in sources] + replayed
