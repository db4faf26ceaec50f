"""Rebuild the demo world: a tiny Qwen3-ASR checkpoint, and synthetic Hebrew speech to fine-tune and test it on.

    uv run --group demo python demo/make_demo.py              # everything, into demo/
    uv run --group demo python demo/make_demo.py --out DIR    # elsewhere
    uv run --group demo python demo/make_demo.py --replay     # only demo/replay/ and demo/domain/

The checkpoint has the classes, files, prompt and special tokens of Qwen/Qwen3-ASR-1.7B-hf, and a vocabulary of single
characters. It is taught some Hebrew words, some English and what the absence of speech sounds like. The corpus speaks
with other voices, and half of its words are new to the checkpoint: fine-tuning has something to learn, in CPU-minutes.

The encoder first learns whole words by CTC: a model of this size does not find the alignment of audio and text by
cross-entropy alone. Then the whole model is trained on the answers, their end token included.
"""

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path

import jiwer
import numpy as np
import torch
import torch.nn.functional as F
from speech import (
    CORPUS_VOICES,
    ENGLISH_VOICES,
    HELDOUT_VOICES,
    RATE,
    Clip,
    Espeak,
    base_clips,
    corpus_rows,
    delivery,
    distinct,
    english_sentence,
    hebrew_sentence,
    nonspeech_clip,
    read_clips,
    row,
    test_clips,
    write_parquet,
)
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3ASRConfig,
    Qwen3ASRFeatureExtractor,
    Qwen3ASRForConditionalGeneration,
    Qwen3ASRProcessor,
)
from transformers.models.whisper.english_normalizer import BasicTextNormalizer

SEED = 20
HELDOUT_ROWS, ENGLISH_ROWS, NONSPEECH_ROWS = 440, 160, 110
REPLAY_ENGLISH = {"english": 250, "english_900": 900}  # sentences by folder
REPLAY_NONSPEECH, DOMAIN_ROWS, DOMAIN_TEST_ROWS = 60, 240, 120
CORPUS_SENTENCES = 2_400
BASE_HEBREW, BASE_ENGLISH, BASE_NONSPEECH = 3_600, 900, 300  # clips to train the checkpoint on
BATCH = 24  # clips
CTC_EPOCHS, CTC_RATE = 7, 2e-3
CE_EPOCHS, CE_RATE = 6, 1.5e-3

# Tokenizer, processor, model

ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
AUDIO_START, AUDIO_END, AUDIO_PAD = "<|audio_start|>", "<|audio_end|>", "<|audio_pad|>"
SPECIAL = [ENDOFTEXT, IM_START, IM_END, AUDIO_START, AUDIO_END, AUDIO_PAD]
MARKERS = ["<timestamp>", "<asr_text>"]  # single tokens that skip_special_tokens keeps
PROMPT_WORDS = ["system", "user", "assistant", "language", " Hebrew", " English", " None"]
LETTERS_AND_NIQQUD = "".join(map(chr, [*range(0x05D0, 0x05EB), *range(0x05B0, 0x05BD), 0x05C1, 0x05C2]))
CHARACTERS = "\n\t" + "".join(map(chr, range(32, 127))) + LETTERS_AND_NIQQUD + "״׳־–—…“”„’‘₪°"

CHAT_TEMPLATE = """\
{%- macro text_of(message) -%}
  {%- if message.content is string -%}{{ message.content }}
  {%- else -%}{%- for part in message.content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{{- '<|im_start|>system\\n' -}}
{%- for message in messages if message.role == 'system' -%}{{ text_of(message) }}{%- endfor -%}
{{- '<|im_end|>\\n<|im_start|>user\\n' -}}
{%- for message in messages if message.role == 'user' and message.content is not string -%}
  {%- for part in message.content if part.type == 'audio' -%}<|audio_start|><|audio_pad|><|audio_end|>{%- endfor -%}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- for message in messages if message.role == 'assistant' -%}
  {{- '<|im_start|>assistant\\n' -}}{%- generation -%}{{- text_of(message) + '<|im_end|>\\n' -}}{%- endgeneration -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def build_processor() -> Qwen3ASRProcessor:
    """Qwen3-ASR's processor around a tokenizer of single characters and the few words of the prompt."""
    vocabulary = [*SPECIAL, *MARKERS, "<unk>", *PROMPT_WORDS, *CHARACTERS]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKERS])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(PROMPT_WORDS) + r"|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=ENDOFTEXT,
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"audio_token": AUDIO_PAD, "audio_bos_token": AUDIO_START, "audio_eos_token": AUDIO_END},
    )
    return Qwen3ASRProcessor(Qwen3ASRFeatureExtractor(), wrapped, chat_template=CHAT_TEMPLATE)


def build_model(processor: Qwen3ASRProcessor) -> Qwen3ASRForConditionalGeneration:
    """1.5 M random parameters: three layers of width 144 on either side of the projector."""
    token_id = processor.tokenizer.convert_tokens_to_ids
    audio = {"d_model": 144, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 432}
    audio |= {"downsample_hidden_size": 24, "output_dim": 144}
    text = {"hidden_size": 144, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"head_dim": 36, "intermediate_size": 432, "vocab_size": len(processor.tokenizer)}
    text |= {"max_position_embeddings": 4096, "tie_word_embeddings": True}
    config = Qwen3ASRConfig(
        audio_config=audio,
        text_config=text,
        audio_token_id=token_id(AUDIO_PAD),
        timestamp_token_id=token_id("<timestamp>"),
        pad_token_id=token_id(IM_END),
        eos_token_id=[token_id(ENDOFTEXT), token_id(IM_END)],
    )
    model = Qwen3ASRForConditionalGeneration(config)
    ends = {"eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    model.generation_config = GenerationConfig(**ends, do_sample=False, max_new_tokens=128)
    return model


# Features and batches


@dataclass
class Example:
    """`mel` (128, frames) float32, frames a multiple of 100 of which the first `valid` are audio; token ids."""

    mel: torch.Tensor
    valid: int
    prompt: list[int]
    answer: list[int]
    text: str


def prepare(clips: list[Clip], processor: Qwen3ASRProcessor) -> list[Example]:
    user_turn = [{"role": "user", "content": [{"type": "audio"}]}]
    prompt = processor.apply_chat_template(user_turn, add_generation_prompt=True, tokenize=False)
    examples = []
    for clip in clips:
        features = processor.feature_extractor(
            clip.wave, sampling_rate=RATE, padding="longest", return_attention_mask=True
        )
        valid = int(features["attention_mask"].sum())
        pads = int(processor._get_audio_token_length(torch.tensor([valid]))[0])
        ids = processor.tokenizer.encode(prompt.replace(AUDIO_PAD, AUDIO_PAD * pads))
        answer = processor.tokenizer.encode(f"language {clip.language}<asr_text>{clip.text}{IM_END}")
        examples.append(Example(features["input_features"][0], valid, ids, answer, clip.text))
    return examples


def mel_batch(examples: list[Example]) -> dict[str, torch.Tensor]:
    """(batch, 128, frames) features, padded on the right, and their (batch, frames) mask."""
    frames = max(example.mel.shape[1] for example in examples)
    mel = torch.stack([F.pad(example.mel, (0, frames - example.mel.shape[1])) for example in examples])
    valid = torch.tensor([[example.valid] for example in examples])
    return {"input_features": mel, "input_features_mask": (torch.arange(frames) < valid).long()}


def training_batch(examples: list[Example], pad: int) -> dict[str, torch.Tensor]:
    """Padded on the right; labels are the answers, told by position because the pad token also ends an answer."""
    length = max(len(example.prompt) + len(example.answer) for example in examples)
    ids = torch.full((len(examples), length), pad)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, example in enumerate(examples):
        start, end = len(example.prompt), len(example.prompt) + len(example.answer)
        ids[i, :end] = torch.tensor(example.prompt + example.answer)
        labels[i, start:end], mask[i, :end] = ids[i, start:end], 1
    return mel_batch(examples) | {"input_ids": ids, "attention_mask": mask, "labels": labels}


def shuffled_batches(examples: list[Example], size: int, rng: random.Random) -> list[list[Example]]:
    """Batches of clips of about the same length, in random order."""
    ordered = sorted(examples, key=lambda example: example.valid + rng.uniform(-30, 30))
    batches = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    rng.shuffle(batches)
    return batches


# Training the checkpoint


def optimize(name: str, parameters: list, loss_of, examples, epochs: int, rate: float, rng: random.Random) -> None:
    """AdamW along one cosine with 10 % linear warmup; prints the mean loss of each epoch."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01, betas=(0.9, 0.98))
    steps = epochs * -(-len(examples) // BATCH)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for epoch in range(epochs):
        started, losses = time.time(), []
        for batch in shuffled_batches(examples, BATCH, rng):
            loss = loss_of(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        print(f"  {name} epoch {epoch + 1}: loss {np.mean(losses):.3f} | {time.time() - started:.0f} s", flush=True)


def train_encoder(model, examples: list[Example], rng: random.Random) -> None:
    """Whole words by CTC over the encoder's output, 13 positions a second, through a head that is then dropped."""
    words = sorted({word for example in examples for word in example.text.split()})
    index = {word: i for i, word in enumerate(words, 1)}  # 0 is CTC's blank
    encoder, audio_id = model.model.audio_tower, model.config.audio_token_id
    head = torch.nn.Linear(encoder.config.d_model, len(words) + 1)

    def loss_of(batch):
        packed = head(encoder(**mel_batch(batch)).last_hidden_state).log_softmax(-1)
        lengths = [example.prompt.count(audio_id) for example in batch]
        targets = [[index[word] for word in example.text.split()] for example in batch]
        return F.ctc_loss(
            torch.nn.utils.rnn.pad_sequence(packed.split(lengths)),
            torch.tensor([label for target in targets for label in target]),
            torch.tensor(lengths),
            torch.tensor([len(target) for target in targets]),
            zero_infinity=True,
        )

    optimize("CTC", [*encoder.parameters(), *head.parameters()], loss_of, examples, CTC_EPOCHS, CTC_RATE, rng)


def train_model(model, examples: list[Example], rng: random.Random) -> None:
    def loss_of(batch):
        return model(**training_batch(batch, model.config.pad_token_id)).loss

    optimize("cross-entropy", list(model.parameters()), loss_of, examples, CE_EPOCHS, CE_RATE, rng)


# Evaluation


def normalize(text: str) -> str:
    """ivrit.ai's leaderboard: without direction marks, niqqud and ASCII quotes, then Whisper's basic normaliser."""
    marks = {0x061C, *range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF}
    niqqud = {*range(0x0591, 0x05BE), 0x05BF, 0x05C1, 0x05C2, 0x05C4, 0x05C5, 0x05C7}
    return BasicTextNormalizer()(text.translate(dict.fromkeys(marks | niqqud | {ord('"'), ord("'")}))).strip()


@torch.inference_mode()
def transcribe(model, processor, examples: list[Example], size: int = 64) -> list[str]:
    """Greedy answers as written, `language X<asr_text>…`, to prompts padded on the left."""
    model.eval()
    answers: dict[int, str] = {}
    order = sorted(range(len(examples)), key=lambda i: examples[i].valid)
    for chosen in (order[start : start + size] for start in range(0, len(order), size)):
        batch = [examples[i] for i in chosen]
        length = max(len(example.prompt) for example in batch)
        pads = [length - len(example.prompt) for example in batch]
        ids = [[model.config.pad_token_id] * pad + example.prompt for pad, example in zip(pads, batch, strict=True)]
        mask = torch.arange(length) >= torch.tensor(pads)[:, None]
        output = model.generate(input_ids=torch.tensor(ids), attention_mask=mask.long(), **mel_batch(batch))
        texts = processor.tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
        answers |= dict(zip(chosen, texts, strict=True))
    return [answers[i] for i in range(len(examples))]


def word_error_rate(answers: list[str], references: list[str]) -> float:
    """Percent, over the whole set."""
    hypotheses = [normalize(answer.split("<asr_text>")[-1]) for answer in answers]
    return 100 * jiwer.wer([normalize(text) for text in references], hypotheses)


def report(model, processor, folder: Path) -> None:
    for name, language in (("heldout", "Hebrew"), ("heldout_noisy", "Hebrew"), ("english", "English")):
        examples = prepare(read_clips(folder / name, language), processor)
        answers = transcribe(model, processor, examples)
        named = np.mean([answer.startswith(f"language {language}<asr_text>") for answer in answers])
        wer = word_error_rate(answers, [example.text for example in examples])
        print(f"  {name}: WER {wer:.1f} % | language right {100 * named:.0f} %", flush=True)
    answers = transcribe(model, processor, prepare(read_clips(folder / "nonspeech", "None"), processor))
    silent = np.mean([answer == "language None<asr_text>" for answer in answers])
    print(f"  nonspeech: answered with no text {100 * silent:.0f} %", flush=True)


def write_replay(espeak: Espeak, out: Path) -> None:
    """Training rows of what the checkpoint knows beside Hebrew; no sentence and no noise is one of the test sets'."""
    tested = {clip.text for clip in read_clips(out / "english", "English")}
    clips = {name: english_clips(espeak, count, tested) for name, count in REPLAY_ENGLISH.items()}
    noise_rng = np.random.default_rng(SEED + 1)
    clips["nonspeech"] = [nonspeech_clip(noise_rng) for _ in range(REPLAY_NONSPEECH)]
    for name, mine in clips.items():
        kind = name.partition("_")[0]
        rows = [row(clip.wave, clip.text, f"demo-{kind}", f"replay-{kind}-{i:04d}") for i, clip in enumerate(mine)]
        write_parquet(out / "replay" / name / "train-00000-of-00001.parquet", rows)


def english_clips(espeak: Espeak, count: int, tested: set[str]) -> list[Clip]:
    rng = random.Random(SEED + 1)
    sentences = distinct(lambda: english_sentence(rng), count, tested)
    return [Clip(espeak(t, rng.choice(ENGLISH_VOICES), **delivery(rng)), t, "English") for t in sentences]


def write_domain(espeak: Espeak, out: Path) -> None:
    """A small domain to adapt to: sentences of the words that the corpus has not, in its voices and the test sets'."""
    rng = random.Random(SEED + 2)
    texts = distinct(lambda: hebrew_sentence(rng, (2, 2)), DOMAIN_ROWS + DOMAIN_TEST_ROWS, set())
    parts = {"train": (CORPUS_VOICES, texts[:DOMAIN_ROWS]), "test": (HELDOUT_VOICES, texts[DOMAIN_ROWS:])}
    for split, (voices, mine) in parts.items():
        waves = [espeak(text, "he+" + rng.choice(voices), **delivery(rng)) for text in mine]
        rows = [
            row(wave, text, "demo-domain", f"domain-{split}-{i:04d}")
            for i, (wave, text) in enumerate(zip(waves, mine, strict=True))
        ]
        write_parquet(out / "domain" / f"{split}-00000-of-00001.parquet", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    parser.add_argument("--replay", action="store_true", help="only replay/ and domain/, beside sets that are there")
    given, started, rng = parser.parse_args(), time.time(), random.Random(SEED)
    out = given.out
    if given.replay:
        espeak = Espeak()
        write_replay(espeak, out)
        write_domain(espeak, out)
        return
    torch.set_num_threads(1)  # the same sums in the same order on every machine load
    torch.manual_seed(SEED)

    def step(title: str) -> None:
        print(f"[{time.time() - started:4.0f} s] {title}", flush=True)

    # 1. Sentences. Nothing of the test sets is in a training set.
    heldout = distinct(lambda: hebrew_sentence(rng, (0, 1)), HELDOUT_ROWS, set())
    corpus = distinct(lambda: hebrew_sentence(rng, (0, 1)), CORPUS_SENTENCES, set(heldout))
    base_hebrew = distinct(lambda: hebrew_sentence(rng, (0, 2)), BASE_HEBREW, set(heldout))
    english = distinct(lambda: english_sentence(rng), ENGLISH_ROWS, set())
    base_english = distinct(lambda: english_sentence(rng), BASE_ENGLISH, set(english))

    # 2. Speech
    espeak = Espeak()
    step("speaking the test sets")
    for name, clips in test_clips(espeak, heldout, english, NONSPEECH_ROWS, rng).items():
        rows = [row(clip.wave, clip.text, f"demo-{name}", f"{name}-{i:04d}") for i, clip in enumerate(clips)]
        write_parquet(out / name / "test-00000-of-00001.parquet", rows)
    write_replay(espeak, out)
    step("speaking the corpus")
    write_parquet(out / "corpus" / "train-00000-of-00001.parquet", corpus_rows(espeak, corpus, rng))
    write_domain(espeak, out)
    step("speaking what the checkpoint is trained on")
    processor = build_processor()
    clips = base_clips(espeak, base_hebrew, base_english, BASE_NONSPEECH, rng)
    examples = prepare(clips, processor)

    # 3. The checkpoint
    model = build_model(processor).train()
    step(f"training {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters on {len(examples)} clips")
    train_encoder(model, examples, rng)
    train_model(model, examples, rng)
    model.save_pretrained(out / "base")
    processor.save_pretrained(out / "base")
    step("measuring the checkpoint")
    report(model, processor, out)
    step("done")


if __name__ == "__main__":
    main()
