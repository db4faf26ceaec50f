"""Does a checkpoint say the same in the older layout, under the package that reads it?

Converts a checkpoint to the older layout, has the `qwen-asr` package transcribe with it, and compares tokens, texts and
logits with those of transformers' own classes. That package pins another transformers, so it runs in an environment of
its own:

    uv venv /tmp/qwen-asr && uv pip install --python /tmp/qwen-asr/bin/python qwen-asr==0.0.6 torch==2.14.1
    uv run python benchmarks/layout_parity.py --reference_python /tmp/qwen-asr/bin/python

The reference also saves what it loaded, as its fine-tuning does; that folder is converted back and its weights are
compared with the checkpoint's. And it builds Qwen3-ASR-1.7B without memory (on the meta device) from the converted
configuration: every weight must have the name and shape that the conversion gives it. Ends with 1 where any of this
fails, or a clip of a second or more differs.

    uv run python benchmarks/layout_parity.py --cost

says instead what the conversion of a whole 1.7B in bf16 takes; its 4 GB of zeros need 4 GB of room for the copy.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
PROMPT = (
    "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|audio_start|><|audio_pad|><|audio_end|><|im_end|>\n"
    "<|im_start|>assistant\n"
)
MAX_NEW_TOKENS = 100
SHORTEST_SECONDS = 1.0  # below, the libraries pad the features differently


def transcripts(model, forward, processor, clips: np.lib.npyio.NpzFile, features_mask: str, eos: list[int]) -> dict:
    """Greedy tokens, text and the logits that each token was chosen by, of each clip alone.

    Args:
        forward: the module whose output holds `logits`: the model, or the part of it that has them.
        features_mask: what the model calls the mask of its features.
    """
    import torch

    found = {}
    for name in clips.files:
        inputs = processor(text=[PROMPT], audio=[clips[name]], sampling_rate=16_000, return_tensors="pt", padding=True)
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, eos_token_id=eos, pad_token_id=eos[0])
            tokens = getattr(tokens, "sequences", tokens)
            begin = inputs["input_ids"].shape[1]
            inputs["input_ids"] = tokens
            inputs["attention_mask"] = torch.ones_like(tokens)
            audio = {key: inputs[key] for key in ("input_features", features_mask)}
            logits = forward(input_ids=tokens, attention_mask=inputs["attention_mask"], **audio).logits
        written = tokens[0, begin:]
        found[f"tokens/{name}"] = written.numpy()
        found[f"logits/{name}"] = logits[0, begin - 1 : -1].float().numpy()
        found[f"text/{name}"] = np.array(processor.tokenizer.decode(written, skip_special_tokens=False))
    return found


def reference_side(checkpoint: str, clips: str, output: str, saved: str, full_size: str) -> None:
    """Runs under the other environment's Python."""
    import torch
    import transformers
    from qwen_asr import Qwen3ASRModel

    loaded = Qwen3ASRModel.from_pretrained(checkpoint, dtype=torch.float32)
    model, processor = loaded.model.eval(), loaded.processor
    eos = json.loads(Path(checkpoint, "generation_config.json").read_text())["eos_token_id"]
    with np.load(clips) as content:
        found = transcripts(model, model.thinker, processor, content, "feature_attention_mask", eos)
        built = loaded._build_text_prompt(context="", force_language=None)
        if built != PROMPT:
            raise SystemExit(f"the package's prompt is {built!r}, this script's {PROMPT!r}")
    np.savez(output, **found)
    type(model).from_pretrained(checkpoint, dtype=torch.bfloat16).save_pretrained(saved)
    processor.save_pretrained(saved)
    with torch.device("meta"):
        large = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(full_size))
    shapes = {name: list(tensor.shape) for name, tensor in large.state_dict().items()}
    Path(full_size, "shapes.json").write_text(json.dumps(shapes))


def full_size_shapes(folder: Path) -> dict[str, list[int]]:
    """Writes config.json of Qwen3-ASR-1.7B in the older layout; returns its weights' shapes by their older names."""
    from hebrew_asr.model.costs import real_config
    from hebrew_asr.model.layouts import expected_shapes, renamed, to_thinker, write_json

    config = real_config().to_dict()
    folder.mkdir()
    special = {"audio_start": 151669, "audio_end": 151670}
    write_json(folder / "config.json", to_thinker(config, special, folder))
    return {renamed(name, "thinker"): shape for name, shape in expected_shapes(config, folder).items()}


def cost() -> dict[str, float]:
    """CPU seconds and memory of a conversion of the full size, and CPU seconds to name its content."""
    import resource
    import shutil
    import time

    from hebrew_asr.model.layouts import content_key, convert, read_json, write_json

    with tempfile.TemporaryDirectory() as place:
        older, target = Path(place, "older"), Path(place, "converted")
        convert(ROOT / "demo/tuned", older, "thinker")
        shapes = full_size_shapes(Path(place, "full"))
        shapes.pop("thinker.lm_head.weight")  # tied
        config = read_json(Path(place, "full", "config.json"))
        config["thinker_config"]["audio_token_id"] = 5  # of the demo's tokenizer
        write_json(older / "config.json", config)
        header, end = {}, 0
        for name, shape in shapes.items():
            begin, end = end, end + 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        written = json.dumps(header).encode()
        with open(older / "model.safetensors", "wb") as file:
            file.write(len(written).to_bytes(8, "little") + written)
            file.truncate(8 + len(written) + end)  # zeros that take no room
        started = time.process_time()
        content_key(older)
        named = time.process_time()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        convert(older, target, "transformers")
        result = {
            "gb": round(end / 1e9, 2),
            "cpu_seconds_to_name_the_content": round(named - started, 1),
            "cpu_seconds_to_convert": round(time.process_time() - named, 1),
            "more_memory_at_the_peak_mb": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024),
        }
        shutil.rmtree(target)
    return result


def own_side(checkpoint: Path, clips: Path) -> dict:
    import torch
    import transformers

    model = transformers.Qwen3ASRForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(checkpoint)
    with np.load(clips) as content:
        eos = model.generation_config.eos_token_id
        return transcripts(model, model, processor, content, "input_features_mask", eos)


def demo_clips(file: Path) -> None:
    """Every held-out utterance of the demo world as mono 16 kHz float samples."""
    import io

    import pyarrow.parquet
    import soundfile

    (table,) = (ROOT / "demo/heldout").glob("*.parquet")
    clips = {}
    for row in pyarrow.parquet.read_table(table).to_pylist():
        samples, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")
        if rate != 16_000 or samples.ndim != 1:
            raise SystemExit(f"{row['audio']['path']} is not mono at 16 kHz")
        clips[f"{len(clips):04d}"] = samples
    np.savez(file, **clips)


def same_weights(one: Path, other: Path) -> bool:
    """Names, types and values."""
    import safetensors.torch

    first, second = (safetensors.torch.load_file(folder / "model.safetensors") for folder in (one, other))
    second.pop("lm_head.weight", None)  # tied: the reference saves it or not
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and tensor.equal(second[name]) for name, tensor in first.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "demo/tuned", help="a checkpoint in transformers' layout")
    parser.add_argument("--reference_python", help="Python of an environment with qwen-asr==0.0.6")
    parser.add_argument("--cost", action="store_true", help="only measure a conversion of the full size")
    options = parser.parse_args()
    if options.cost:
        print(json.dumps(cost(), indent=1))
        return
    if not options.reference_python:
        parser.error("--reference_python is needed: the Python of an environment with qwen-asr==0.0.6")
    from hebrew_asr.model.layouts import convert

    with tempfile.TemporaryDirectory() as place:
        names = ("older", "clips.npz", "output.npz", "saved", "full_size")
        older, clips, output, saved, full_size = (Path(place, name) for name in names)
        convert(options.model, older, "thinker")
        demo_clips(clips)
        shapes = full_size_shapes(full_size)
        arguments = [options.reference_python, __file__, "--reference_side", older, clips, output, saved, full_size]
        subprocess.run(list(map(str, arguments)), check=True)
        convert(saved, Path(place, "back"), "transformers")
        weights = same_weights(options.model, Path(place, "back"))
        own = own_side(options.model, clips)
        with np.load(clips) as content:
            seconds = {name: len(content[name]) / 16_000 for name in content.files}
        with np.load(output) as content:
            reference = dict(content)
        same_shapes = json.loads((full_size / "shapes.json").read_text()) == shapes
    result = {
        "weights_saved_by_the_reference_are_the_same": weights,
        "weights_of_1.7B": len(shapes),
        "of_the_names_and_shapes_that_the_reference_has": same_shapes,
    }
    for part, wanted in (("at_least_1_s", True), ("below_1_s", False)):
        names = [name for name, length in seconds.items() if (length >= SHORTEST_SECONDS) == wanted]
        same = [name for name in names if np.array_equal(own[f"tokens/{name}"], reference[f"tokens/{name}"])]
        pairs = [(own[f"logits/{name}"], reference[f"logits/{name}"]) for name in same]
        result[part] = {
            "clips": len(names),
            "same_tokens": len(same),
            "same_text": sum(str(own[f"text/{name}"]) == str(reference[f"text/{name}"]) for name in names),
            "same_logits_to_the_bit": sum(np.array_equal(*pair) for pair in pairs),
            "largest_difference_of_a_logit": max((float(np.abs(a - b).max()) for a, b in pairs), default=0.0),
        }
    print(json.dumps(result, indent=1))
    long = result["at_least_1_s"]
    sys.exit(not (weights and same_shapes and long["clips"] == long["same_tokens"] == long["same_logits_to_the_bit"]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--reference_side"]:
        reference_side(*sys.argv[2:])
    else:
        main()
