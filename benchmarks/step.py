"""What a training step costs here, in the official recipe, and at the least: the same utterances, in turn.

    uv run python benchmarks/step.py [--quick] [--rounds 5] [--json FILE]

Every measurement is a fresh process on one thread (forked after the imports); those that are compared take turns, so
that other load on the machine meets all of them. Ratios are of CPU-seconds of the process unless said otherwise. The
official recipe is written out below as its published script goes: random batches of 32, the processor called twice on
each, logits at all positions, everything trained. The models are random, of the real classes: one with the 1.7B's
shares of arithmetic, one with its vocabulary.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
DEMO = ROOT / "demo"

MEDIAN_SECONDS, SPREAD, LONGEST = 5.0, 0.6, 30.0  # of the log-normal durations
TOKENS_PER_CHARACTER = 0.37  # of the real tokenizer on Hebrew; the demo's has one token for each character
STEP = 64  # utterances
OFFICIAL_BATCH = 32
EVALUATED = 512  # utterances: sorting gains little where a set is a few batches
ONCE = ("simulated", "evaluation", "evaluation_unsorted")  # parts of the first round only
GOALS = {
    "step: audio-seconds per CPU-second, ours / official": (">=", 2.5),
    "the same, times the balance over 8 ranks": (">=", 3.5),
    "step: ours / floor": (">=", 0.9),
    "step, data in workers: ours / floor": (">=", 0.9),
    "peak memory above what was resident, ours / official": ("<=", 0.35),
    "data path, flac: ours / official": ("<=", 0.35),
    "data path, mp3: ours / official": ("<=", 0.35),
    "useful share of padded tokens, 8 ranks": (">=", 0.92),
    "useful share of padded tokens, 1 rank": (">=", 0.92),
    "useful / (ranks × slowest), 8 ranks, 64 utterances": (">=", 0.87),
    "useful / (ranks × slowest), 64 ranks, 512 utterances": (">=", 0.87),
    "checkpointing: ours / encoder recomputed": ("<=", 0.6),
    "evaluation: sorted and budgeted / unsorted": ("<=", 0.4),
    "audio-seconds per second, two processes / one with two threads": (">=", 0.9),
}


# ----------------------------------------------------------------------------------------------------------- The world


def durations(count: int) -> Any:
    import numpy as np

    drawn = np.random.default_rng(0).normal(np.log(MEDIAN_SECONDS), SPREAD, count)
    return np.minimum(LONGEST, np.exp(drawn))


def make_corpus(folder: Path, count: int) -> None:
    """Speech of the demo, clip after clip up to each duration; flac and mp3 in turn, words for the real token rate."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    import soundfile

    from hebrew_asr.data.audio import SAMPLE_RATE, decode_audio

    clips = pq.read_table(next((DEMO / "corpus").glob("*.parquet"))).slice(0, 600).to_pylist()
    waves = [decode_audio(clip["audio"]) for clip in clips]
    text_of = next(name for name in ("transcript", "text") if name in clips[0])
    random = np.random.default_rng(1)
    rows: dict[str, list] = {"audio": [], "transcript": [], "metadata": []}
    for i, seconds in enumerate(durations(count)):
        samples, words, wave = int(seconds * SAMPLE_RATE), [], []
        while sum(map(len, wave)) < samples:
            chosen = random.integers(len(clips))
            wave.append(waves[chosen])
            words += re.sub(r"<\|[^|]*\|>", " ", clips[chosen][text_of]).split()
        sound = np.concatenate(wave)
        text = " ".join(words)[: max(3, round(TOKENS_PER_CHARACTER * len(" ".join(words)) * samples / len(sound)))]
        file = io.BytesIO()
        soundfile.write(file, sound[:samples], SAMPLE_RATE, format=("FLAC", "MP3")[i % 2])
        rows["audio"].append({"bytes": file.getvalue(), "path": f"{i}.{('flac', 'mp3')[i % 2]}"})
        rows["transcript"].append(text.strip() or "שלום")
        rows["metadata"].append({"entry_id": f"recording {i}"})
    folder.mkdir(parents=True)
    pq.write_table(pa.table(rows), folder / "train.parquet")


def make_model(folder: Path, text: dict[str, int], audio: dict[str, int]) -> None:
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(DEMO / "base")
    for part, changes in ((config.text_config, text), (config.audio_config, audio)):
        for name, value in changes.items():
            setattr(part, name, value)
    config.text_config.layer_types = ["full_attention"] * config.text_config.num_hidden_layers
    torch.manual_seed(0)
    model = transformers.Qwen3ASRForConditionalGeneration(config)
    model.save_pretrained(folder)
    transformers.AutoProcessor.from_pretrained(DEMO / "base").save_pretrained(folder)


def make_world(folder: Path, steps: int) -> None:
    make_corpus(folder / "corpus", steps * STEP)
    make_corpus(folder / "evaluated", EVALUATED)
    text = {"hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 7, "head_dim": 48, "vocab_size": 3560}
    audio = {"d_model": 136, "encoder_ffn_dim": 544, "encoder_layers": 3, "downsample_hidden_size": 20}
    make_model(folder / "speed", text, audio | {"output_dim": 192})
    text |= {"hidden_size": 64, "head_dim": 16, "intermediate_size": 192, "vocab_size": 151_936}
    make_model(folder / "memory", text, audio | {"output_dim": 64})


def shares_of_arithmetic(folder: Path) -> dict[str, tuple[float, float]]:
    """Share of each component in the forward pass of a second of speech: the benchmark's model, and the 1.7B."""
    import transformers

    from hebrew_asr.model.costs import Work, flops, real_config

    seconds, tokens = 7, 7 * 13 + 50
    work = Work(seconds, 13 * seconds, 13**2 * seconds**2, tokens, tokens**2, tokens)
    found = []
    for config in (transformers.AutoConfig.from_pretrained(folder / "speed"), real_config()):
        counts = flops(config, work)
        found.append({component: counts[component] / sum(counts.values()) for component in counts})
    return {component: (found[0][component], found[1][component]) for component in found[0]}


# ---------------------------------------------------------------------------------------------------------------- Parts


def settings(folder: Path, model: str = "speed", **changes: Any) -> Any:
    """Round 2 as a user gets it, on the benchmark's world."""
    from hebrew_asr.data.sources import Source
    from train_round2_gradual import round2

    config = round2()
    for stage in config.stages:
        stage.audio_top_layers, stage.llm_top_layers = 1, 3  # of 3 and 7, as 8 and 12 of 24 and 28
    corpus = Source(str(folder / "corpus"))
    values = {"model_name_or_path": str(folder / model), "train_sources": [corpus], "eval_sources": [corpus]}
    values |= {"dataloader_num_workers": 0, "tracker": "none", "logging_steps": 10_000, "leak_min_words": 10_000}
    values |= {"preprocessing_num_workers": 1, "drop_duplicates": False, "max_characters_per_second": 1000}
    values |= {"min_characters_per_second": 0}
    return dataclasses.replace(config, **(values | changes))


def make_trainer(folder: Path, config: Any) -> Any:
    import transformers

    import train_hebrew_asr_enhanced as training
    from hebrew_asr.data.rows import load_rows
    from hebrew_asr.model import loading
    from hebrew_asr.training import resuming
    from hebrew_asr.training.run_log import RunLog

    run = Path(tempfile.mkdtemp(dir=folder))
    processor = transformers.AutoProcessor.from_pretrained(config.model_name_or_path)
    rows = load_rows(config.train_sources, config, for_training=True)
    arguments = resuming.training_arguments(config, run, cpu=True)
    arguments.eval_on_start = False
    model = loading.load_to_train(config, use_bf16=False)
    log = RunLog(run, arguments.process_index)
    return training.GradualUnfreezeTrainer(config, arguments, model, processor, rows, rows, log, use_bf16=False)


def timed(function: Callable, clock: list[float]) -> Callable:
    def run(*args: Any, **kwargs: Any) -> Any:
        began = time.process_time()
        result = function(*args, **kwargs)
        clock[0] += time.process_time() - began
        return result

    return run


def ours(folder: Path, **changes: Any) -> dict[str, float]:
    """GradualUnfreezeTrainer in stage B, from the compressed bytes to the optimizer's step; the first step warms up."""
    import transformers

    trainer = make_trainer(folder, settings(folder, **changes))
    data, marks = [0.0], []
    trainer.feed.dataset.__getitems__ = timed(trainer.feed.dataset.__getitems__, data)
    trainer.collator.packed = timed(trainer.collator.packed, data)
    trainer.evaluate = lambda **_: {}

    class Mark(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            marks.append((time.process_time(), time.perf_counter(), data[0], trainer.window.audio_seconds))
            control.should_training_stop = state.global_step == len(trainer.feed.sampler)

    trainer.add_callback(Mark())
    trainer.train()
    cpu, wall, in_data, audio = (last - first for first, last in zip(marks[0], marks[-1], strict=True))
    return {"cpu": cpu / audio, "cpu_without_data": (cpu - in_data) / audio, "wall": wall / audio}


def floor(folder: Path) -> dict[str, float]:
    """Forward and backward over the collated utterances of the same steps, and nothing else."""
    trainer = make_trainer(folder, settings(folder))
    trainer.model.train()
    steps = [trainer.feed.dataset.__getitems__(step) for step in trainer.feed.sampler]
    steps = [[(trainer.collator.packed(part), part) for part in step] for step in steps]
    audio = cpu = wall = 0.0
    for number, step in enumerate(steps):
        began, began_wall = time.process_time(), time.perf_counter()
        for batch, _ in step:
            trainer.model(**batch, num_items_in_batch=1).loss.backward()
        if number:
            cpu, wall = cpu + time.process_time() - began, wall + time.perf_counter() - began_wall
            audio += sum(u["features"].shape[1] for _, part in step for u in part) / 100
        trainer.model.zero_grad()
    return {"cpu": cpu / audio, "wall": wall / audio}


def official_batch(processor: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Prompt and full text through the processor, each with the audio; labels where the full text goes on."""
    from hebrew_asr.data.audio import SAMPLE_RATE, decode_audio

    turns = [{"role": "user", "content": [{"type": "audio", "audio": ""}]}]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    waves = [decode_audio(row["audio"]) for row in rows]
    options = {"audio": waves, "sampling_rate": SAMPLE_RATE, "return_tensors": "pt", "padding": True}
    options["padding_side"] = "right"
    batch = processor(text=[f"{prompt}language Hebrew<asr_text>{row['text']}<|im_end|>" for row in rows], **options)
    prefix = processor(text=[prompt] * len(rows), **options)
    labels = batch["input_ids"].clone()
    for i, length in enumerate(prefix["attention_mask"].sum(dim=1).tolist()):
        labels[i, :length] = -100
    labels[batch["attention_mask"] == 0] = -100
    return dict(batch) | {"labels": labels}


def official(folder: Path) -> dict[str, float]:
    """The published recipe on the same utterances, in a random order; the first step warms up."""
    import torch
    import transformers

    from hebrew_asr.data.rows import load_rows

    config = settings(folder)
    model = transformers.Qwen3ASRForConditionalGeneration.from_pretrained(config.model_name_or_path).train()
    processor = transformers.AutoProcessor.from_pretrained(config.model_name_or_path)
    rows = load_rows(config.train_sources, config, for_training=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    audio = cpu = wall = 0.0
    for begin in range(0, len(order), STEP):
        batches = [order[begin : begin + OFFICIAL_BATCH], order[begin + OFFICIAL_BATCH : begin + STEP]]
        if not begin:
            batches = [batches[0][:8]]
        began, began_wall = time.process_time(), time.perf_counter()
        for part in batches:
            batch = official_batch(processor, [rows[number] for number in part])
            (model(**batch).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if begin:
            cpu, wall = cpu + time.process_time() - began, wall + time.perf_counter() - began_wall
            audio += rows.seconds[order[begin : begin + STEP]].sum()
    return {"cpu": cpu / audio, "wall": wall / audio}


def peak_above(step: Callable[[], None]) -> float:
    """Megabytes that a step takes at most above what is resident before it (Linux)."""

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name))

    step()  # the optimizer's moments, and what libraries keep
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    step()
    return (status("VmHWM") - before) / 1e3


def memory(folder: Path, utterances: int = 8) -> dict[str, float]:
    """The same utterances in one forward pass of each; the official recipe's would be 32, and four times this."""
    import torch

    trainer = make_trainer(folder, settings(folder, "memory"))
    trainer.model.train()
    numbers = list(range(utterances))

    def step(make_batch: Callable[[], dict], model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(**make_batch()).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    if os.environ["BENCHMARK_PART"] == "memory_ours":
        model, optimizer = trainer.model, trainer.create_optimizer()
        draws = [(1, number) for number in numbers]
        peak = peak_above(
            lambda: step(lambda: trainer.collator.packed([trainer.feed.dataset[d] for d in draws]), model, optimizer)
        )
    else:
        import transformers

        model = transformers.Qwen3ASRForConditionalGeneration.from_pretrained(folder / "memory").train()
        rows, optimizer = trainer.feed.dataset.rows, torch.optim.AdamW(model.parameters(), lr=1e-5)
        processor = trainer.processor
        peak = peak_above(
            lambda: step(lambda: official_batch(processor, [rows[number] for number in numbers]), model, optimizer)
        )
    return {"megabytes": peak}


def data_path(folder: Path) -> dict[str, float]:
    """CPU per audio-second from compressed bytes to a collated batch: whole steps of one format, ours and official."""
    trainer = make_trainer(folder, settings(folder))
    dataset, collator, rows = trainer.feed.dataset, trainer.collator, trainer.feed.dataset.rows
    found = {}
    for parity, name in enumerate(("flac", "mp3")):
        mine = [number for number in range(len(rows)) if rows[number]["row"] % 2 == parity][:STEP]
        seconds = rows.seconds[mine].sum()
        for warm in (True, False):
            chosen = mine[:4] if warm else mine
            began = time.process_time()
            collator.packed([dataset[(1, number)] for number in chosen])
            middle = time.process_time()
            for begin in range(0, len(chosen), OFFICIAL_BATCH):
                batch = chosen[begin : begin + OFFICIAL_BATCH]
                official_batch(trainer.processor, [rows[number] for number in batch])
            ended = time.process_time()
        found |= {f"ours_{name}": (middle - began) / seconds, f"official_{name}": (ended - middle) / seconds}
    return found


def checkpointing(folder: Path, hooks: bool) -> dict[str, float]:
    """A stage B step with gradient checkpointing; with `hooks`, transformers' way, which revives the encoder."""
    trainer = make_trainer(folder, settings(folder, gradient_checkpointing=True))
    if hooks:
        trainer.model.enable_input_require_grads()
    trainer.model.train()
    (step,) = [trainer.feed.dataset.__getitems__(step) for step in trainer.feed.sampler][:1]
    batches = [trainer.collator.packed(part) for part in step]
    for warm in (True, False):
        began = time.process_time()
        for batch in batches[:1] if warm else batches:
            trainer.model(**batch).loss.backward()
        cpu = time.process_time() - began
    return {"cpu": cpu}


def evaluation(folder: Path, is_sorted: bool) -> dict[str, float]:
    """Transcribing: nothing ends a random model's output, so each batch goes on as long as its longest clip asks."""
    import numpy as np

    from hebrew_asr.data.sources import Source
    from hebrew_asr.training.batches import collate_evaluation

    config = settings(folder, train_sources=[Source(str(folder / "evaluated"))])
    trainer = make_trainer(folder, config)
    trainer.model.eval()
    trainer.model.generation_config.eos_token_id = None
    dataset = trainer.eval_dataset
    loader: Iterator = iter(trainer.get_eval_dataloader(dataset))
    if not is_sorted:
        order = np.random.default_rng(0).permutation(len(dataset)).reshape(-1, 8)
        loaded = ([[dataset[(0, int(number))] for number in batch]] for batch in order)
        loader = (collate_evaluation(trainer.collator, batch) for batch in loaded)
    began, steps = time.process_time(), 0
    for _, batch in loader:
        _, generated, _ = trainer.prediction_step(trainer.model, batch, prediction_loss_only=False)
        steps += generated.shape[1]
    return {"cpu": time.process_time() - began, "decoding_steps": steps}


def simulated() -> dict[str, float]:
    """What is padded, and how long ranks wait for the slowest, over 200,000 durations at Round 2's settings."""
    import numpy as np

    from hebrew_asr.model.packing import deal_step, rows_of
    from train_round2_gradual import round2

    random = np.random.default_rng(2)
    seconds = durations(200_000)
    characters = 12 * seconds * random.uniform(0.7, 1.3, len(seconds))
    tokens = np.ceil(13 * seconds) + 25 + np.ceil(TOKENS_PER_CHARACTER * characters)
    budget, found = round2().tokens_per_micro_batch, {}
    padded = [OFFICIAL_BATCH * part.max() for part in tokens.reshape(-1, OFFICIAL_BATCH)]
    found["useful_official"] = tokens.sum() / sum(padded)
    of_ranks = [8 * max(padded[begin : begin + 8]) for begin in range(0, len(padded) - 7, 8)]
    found["balance_official"] = tokens[: len(of_ranks) * 8 * OFFICIAL_BATCH].sum() / sum(of_ranks)
    for ranks, size in ((1, 64), (8, 64), (64, 512)):
        useful = padded_tokens = slowest = passes = 0
        for begin in range(0, len(tokens) - size + 1, size):
            step = tokens[begin : begin + size]
            costs = []
            for micro_batches in deal_step(step, ranks, budget):
                cuts = [(step[places], rows_of(step[places])) for places in micro_batches]
                costs.append(sum(len(rows) * max(sizes[row].sum() for row in rows) for sizes, rows in cuts))
                passes += len(micro_batches)
            useful, padded_tokens = useful + step.sum(), padded_tokens + sum(costs)
            slowest += ranks * max(costs)
        found |= {f"useful_{ranks}": useful / padded_tokens, f"balance_{ranks}": useful / slowest}
        found[f"tokens_of_a_pass_{ranks}"] = padded_tokens / passes
    return found


def processes(folder: Path) -> dict[str, float]:
    """Audio-seconds per second of wall clock over whole steps, on every process of the launch together."""
    return {"wall": ours(folder)["wall"]}


PARTS: dict[str, Callable[[Path], dict[str, float]]] = {
    "ours": ours,
    "official": official,
    "floor": floor,
    "memory_ours": memory,
    "memory_official": memory,
    "data": data_path,
    "checkpointing": lambda folder: checkpointing(folder, hooks=False),
    "checkpointing_hooks": lambda folder: checkpointing(folder, hooks=True),
    "evaluation": lambda folder: evaluation(folder, is_sorted=True),
    "evaluation_unsorted": lambda folder: evaluation(folder, is_sorted=False),
    "simulated": lambda _: simulated(),
    "one_process": processes,
    "two_processes": processes,
}


# --------------------------------------------------------------------------------------------------------------- Rounds


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a process of its own, forked from this one, which has imported everything and run nothing."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        sender.send(function(*arguments))

    child = context.Process(target=run)
    child.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        sys.exit(f"{function} failed, see above")
    finally:
        child.join()


def run_part(part: str, folder: Path) -> dict[str, float]:
    import torch

    torch.set_num_threads(2 if part == "one_process" else 1)
    os.environ["BENCHMARK_PART"] = part
    with contextlib.redirect_stdout(io.StringIO()):
        return PARTS[part](folder)


def measure(part: str, folder: Path) -> dict[str, float]:
    if part != "two_processes":
        return in_child(run_part, part, folder)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launch, __file__, "--part", part, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{part} failed:\n{done.stderr}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("result ")]
    return json.loads(lines[-1].removeprefix("result "))


def ratios(rounds: list[dict[str, dict[str, float]]]) -> dict[str, list[float]]:
    """Every ratio of the table, one value for each round that measured it."""
    simulation = rounds[0]["simulated"]
    found: dict[str, list[float]] = {name: [] for name in GOALS}
    names = list(GOALS)
    balance = (
        simulation["balance_8"]
        / simulation["balance_official"]
        * (simulation["useful_official"] / simulation["useful_8"])
    )  # what is padded is in the step's own cost already
    for one in rounds:
        if "official" in one:
            faster = one["official"]["cpu"] / one["ours"]["cpu"]
            found[names[0]].append(faster)
            found[names[1]].append(faster * balance)
            found[names[2]].append(one["floor"]["cpu"] / one["ours"]["cpu"])
            found[names[3]].append(one["floor"]["cpu"] / one["ours"]["cpu_without_data"])
        if "memory_ours" in one:
            found[names[4]].append(one["memory_ours"]["megabytes"] / one["memory_official"]["megabytes"])
        if "data" in one:
            found[names[5]].append(one["data"]["ours_flac"] / one["data"]["official_flac"])
            found[names[6]].append(one["data"]["ours_mp3"] / one["data"]["official_mp3"])
        if "simulated" in one:
            for name, key in zip(names[7:11], ("useful_8", "useful_1", "balance_8", "balance_64"), strict=True):
                found[name].append(simulation[key])
        if "checkpointing" in one:
            found[names[11]].append(one["checkpointing"]["cpu"] / one["checkpointing_hooks"]["cpu"])
        if "evaluation" in one:
            found[names[12]].append(one["evaluation"]["cpu"] / one["evaluation_unsorted"]["cpu"])
        if "two_processes" in one:
            found[names[13]].append(one["one_process"]["wall"] / one["two_processes"]["wall"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--json", help="file for every figure of every round")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        result = run_part(arguments.part, Path(arguments.folder))
        if os.environ.get("RANK", "0") == "0":
            print("result " + json.dumps(result), flush=True)
        return
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        os.environ |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
        from hebrew_asr import processes as processes_module

        processes_module.quiet_libraries(is_main=False)
        in_child(make_world, folder, 2)
        shares = in_child(shares_of_arithmetic, folder)
        print("share of the forward pass, here and in the 1.7B: ", end="")
        print(", ".join(f"{name} {here:.1%} / {there:.1%}" for name, (here, there) in shares.items()), flush=True)
        rounds: list[dict[str, dict[str, float]]] = []
        for number in range(1 if arguments.quick else arguments.rounds):
            parts = [part for part in PARTS if number == 0 or part not in ONCE]
            rounds.append({})
            for part in parts:
                rounds[-1][part] = figures = measure(part, folder)
                print(f"  {part}: " + ", ".join(f"{k} {v:.4g}" for k, v in figures.items()), flush=True)
            print(f"round {number + 1} done after {time.perf_counter() - began:.0f} s", flush=True)
    table = ratios(rounds)
    print("\n| figure | goal | measured | lowest–highest of the rounds |\n|---|---|---|---|")
    for name, values in table.items():
        sign, goal = GOALS[name]
        goal = f"{sign.replace('>=', '≥').replace('<=', '≤')} {goal}"
        spread = f"{min(values):.3f}–{max(values):.3f} ({len(values)})"
        print(f"| {name} | {goal} | {statistics.median(values):.3f} | {spread} |")
    if arguments.json:
        result = {"ratios": table, "shares": shares, "rounds": rounds, "seconds": time.perf_counter() - began}
        Path(arguments.json).write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
