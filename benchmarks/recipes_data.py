"""Speech that recipes.py needs and the repository does not hold: a set to choose recipes by, and a larger corpus.

Spoken by espeak-ng as demo/make_demo.py has it (`uv run --group demo python benchmarks/recipes.py`), the same for every
run. The sentences are new: in none of the demo's sets, and none of the one in the other. The voices of the set to
choose by are in no other set.
"""

import dataclasses
import random
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from hebrew_asr.data.sources import Source
from hebrew_asr.errors import InputError
from hebrew_asr.evaluation.settings import DEMO_SETS, EvaluationSet
from hebrew_asr.files import DEMO, digest

# Between them as hard as the test sets' for what `all` and `b_then_a` make with seed 0, so that they rank as those do.
DEV_VOICES = "m8 rob Henrique steph max michel gustave benjamin".split()
DEV_HEBREW, DEV_ENGLISH, DEV_NONSPEECH = 600, 200, 110
SEED = 2026


def speech() -> Any:
    """The demo's way to make speech; InputError where espeak-ng is not there."""
    sys.path.insert(0, str(DEMO))
    try:
        import speech
    except ImportError as error:
        raise InputError(
            f"{error}: speech is made here, so start it by `uv run --group demo python benchmarks/recipes.py`"
        ) from error
    return speech


def texts_of(folder: Path) -> list[str]:
    tables = [pyarrow.parquet.read_table(file, columns=["transcript"]) for file in folder.glob("*.parquet")]
    return pyarrow.concat_tables(tables)["transcript"].to_pylist()


def new_sentences(make: Any, count: int) -> list[str]:
    """So many new Hebrew sentences, those to choose by first."""
    texts = [text for part in ("corpus", "heldout") for text in texts_of(DEMO / part)]
    spoken = [part for text in texts for part in make.TIMESTAMP.split(text)]
    known = {part.replace(",", "").rstrip(".") for part in spoken}
    rng = random.Random(SEED)
    return make.distinct(lambda: make.hebrew_sentence(rng, (0, 1)), count, known)


def dev_sets(data: Path) -> list[EvaluationSet]:
    """The demo's four sets with other sentences and voices, in a folder of `data`."""
    folder = data / f"dev-{digest(' '.join(DEV_VOICES).encode())[:8]}"
    if not folder.exists():
        make, rng = speech(), random.Random(SEED + 1)
        hebrew = new_sentences(make, DEV_HEBREW)
        known = {*texts_of(DEMO / "english"), *texts_of(DEMO / "replay/english_900")}
        english = make.distinct(lambda: make.english_sentence(rng), DEV_ENGLISH, known)
        make.HELDOUT_VOICES = DEV_VOICES
        for name, clips in make.test_clips(make.Espeak(), hebrew, english, DEV_NONSPEECH, rng).items():
            rows = [make.row(clip.wave, clip.text, "dev", f"{name}-{i:04d}") for i, clip in enumerate(clips)]
            make.write_parquet(data / "unfinished" / name / "test-00000-of-00001.parquet", rows)
        (data / "unfinished").rename(folder)
    sources = [Source(str(folder / Path(one.source.path).name), split="test") for one in DEMO_SETS]
    return [dataclasses.replace(one, source=source) for one, source in zip(DEMO_SETS, sources, strict=True)]


def larger_corpus(data: Path, rows: int) -> pyarrow.Table:
    """The demo's corpus with new sentences in the corpus's voices, `rows` in all."""
    (file,) = (DEMO / "corpus").glob("*.parquet")
    corpus = pyarrow.parquet.read_table(file)
    if rows <= len(corpus):
        return corpus
    more = data / f"more-{rows}.parquet"
    if not more.exists():
        make = speech()
        sentences = new_sentences(make, DEV_HEBREW + int(1.05 * (rows - len(corpus))))  # a twentieth are second parts
        made = make.corpus_rows(make.Espeak(), sentences[DEV_HEBREW:], random.Random(SEED + 2))
        make.write_parquet(more.with_suffix(".unfinished"), made[: rows - len(corpus)])
        more.with_suffix(".unfinished").rename(more)
    return pyarrow.concat_tables([corpus, pyarrow.parquet.read_table(more).cast(corpus.schema)])
