"""What a run leaves behind: lines on the console, metrics.jsonl, a tracked dashboard, curves, and its verdict.

What the disk does not take, or the console, does not end the run.
"""

import contextlib
import importlib
import itertools
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from hebrew_asr.command_line import YES
from hebrew_asr.console import Bar, escaped, visible
from hebrew_asr.errors import InputError
from hebrew_asr.files import Appended

TRACKERS = ("wandb", "trackio", "none")
WANDB_MODES = ("", "online", "offline", "shared", "dryrun", "run")
OFF = ("disabled", "off", "none", "false", "0", "no")  # of WANDB_MODE
FINISH_SECONDS = 300.0  # for W&B, at the end, to take what it has not yet; by itself it waits until it has all
ROUND2_WER = 11.0  # percent, Round 2's target on eval-d1
METRICS, SKIPPED = "metrics.jsonl", "skipped-steps.txt"
WORSE = (
    "the final model is worse than before training, so it is better not to use it. To try: more data, more steps"
    " (--num_epochs, or a smaller --target_effective_batch for few recordings), lower rates in --stages; and look at"
    " corpus.html for wrong transcripts"
)
Row = dict[str, Any]  # one line of metrics.jsonl: `step`, and names such as train/loss or eval/wer with their values


def tracker_here(name: str) -> str:
    """The tracker that is used: none where W&B's own variables switch it off; InputError for an unknown mode."""
    if name != "wandb":
        return name
    mode = os.environ.get("WANDB_MODE", "").lower()
    if os.environ.get("WANDB_DISABLED", "").lower() in YES or mode in OFF:
        return "none"
    if mode not in WANDB_MODES:
        raise InputError(f"WANDB_MODE is {mode!r}: it takes {', '.join(filter(None, WANDB_MODES))} or disabled")
    return name


class RunLog:
    """The one place that numbers and lines go to. On ranks above 0 it does nothing, so no caller asks for the rank."""

    CONSOLE = (
        *("loss", "wer", "cer", "wer_raw", "empty_predictions", "grad_norm", "epoch", "audio_seconds_per_second"),
        *("wer_noisy", "reward", "kept_groups", "clip_share", "entropy", "kl"),
    )

    def __init__(self, folder: Path, rank: int):
        self.folder, self.rank, self.is_main = folder, rank, rank == 0
        self.hides_progress = True if rank else None  # None: tqdm shows itself on a terminal only
        self.rows: list[Row] = []
        self.bar: Bar | None = None
        self.on_bar: dict[str, str] = {}
        self.tracker: Any = None  # the tracker's run
        self.library: Any = None  # wandb or trackio
        self.tracker_id: list[str] | None = None  # which tracker, and what it calls the run
        self.files = {name: Appended(folder / name) for name in (METRICS, SKIPPED, f"dropped-{rank}.txt")}

    def check_tracker(self, name: str, project: str) -> None:
        """Raises InputError for a project or a variable that W&B does not take, as its own settings check them."""
        if not self.is_main or tracker_here(name) != "wandb":
            return
        library = importlib.import_module("wandb")
        try:
            library.Settings(project=project).update_from_env_vars(dict(os.environ))
            return
        except library.errors.Error as error:
            problem = str(error)
        except ValueError as error:  # pydantic's, whose end has the value, which may be a key
            setting, why = str(error).splitlines()[1:3]
            problem = f"WANDB_{setting.upper()}: {why.strip().partition(' [')[0]}"
        raise InputError(f"W&B refuses its settings: {problem}. Change that, or give --tracker none")

    def start_tracker(self, name: str, project: str, run_name: str, settings: dict[str, Any], tags: list[str]) -> None:
        """Opens the dashboard: wandb (offline without an account or a network), trackio (local), or none."""
        name = tracker_here(name)
        if not self.is_main or name == "none":
            return
        library = importlib.import_module(name)
        options: dict[str, Any] = {"project": project, "name": run_name, "config": settings | {"tags": tags}}
        before = self.tracker_id[1] if self.tracker_id and self.tracker_id[0] == name else None
        if name == "trackio" and before:
            options |= {"name": before, "resume": "allow"}
        if name == "wandb":
            options |= {"tags": tags, "dir": str(self.folder), "id": before, "resume": "allow" if before else None}
            options["settings"] = {"finish_timeout": FINISH_SECONDS, "finish_timeout_raises": True}
            self.tracker = self.start_wandb(library, options)
        else:
            with silenced_stdout():
                self.tracker = library.init(**options)
        self.library = library
        self.tracker_id = [name, self.tracker.id if name == "wandb" else self.tracker.name]

    def start_wandb(self, library: Any, options: dict[str, Any]) -> Any:
        with silenced_stdout():
            try:
                if "WANDB_MODE" in os.environ or library.login(prompt=False):
                    return library.init(**options)
            except library.errors.Error as error:
                problem = str(error).splitlines()[0]
                print(
                    f"warning: W&B cannot be used ({problem}); the run is tracked offline", file=sys.stderr, flush=True
                )
            return library.init(**options, mode="offline")

    def dashboard(self) -> str:
        """How to look at what was tracked, as one line."""
        name = self.library.__name__ if self.tracker else "none"
        if name == "trackio":
            return f"dashboard: uv run trackio show --project {self.tracker.project}"
        if name == "wandb" and self.tracker.offline:
            return f"W&B was offline; to sync: uv run wandb sync {Path(self.tracker.dir).parent}"
        return f"dashboard: {self.tracker.url}" if name == "wandb" else f"metrics: {self.folder / 'metrics.jsonl'}"

    def finish(self) -> None:
        for name, file in self.files.items():
            if file.waiting and (error := file.write("")):
                self.say(f"warning: the end of {name} could not be written ({error})")
        if not self.tracker:
            return
        with silenced_stdout(), self.unless_it_fails():
            try:
                self.library.finish()
            except TimeoutError:
                folder = Path(self.tracker.dir).parent
                line = f"W&B has not taken all within {FINISH_SECONDS:g} s; to send it: uv run wandb sync {folder}"
                print(f"warning: {line}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def unless_it_fails(self):
        """A dashboard that fails (W&B's is a process of its own, which can die) is given up; the run goes on."""
        try:
            yield
        except Exception as error:
            name, why = self.library.__name__, str(error).partition("\n")[0] or "no reason given"
            line = f"{name} failed and gets no more ({type(error).__name__}: {why}); metrics.jsonl has every number"
            print(f"warning: {line}", file=sys.stderr, flush=True)
            self.tracker = None

    def say(self, line: str) -> None:
        if self.is_main:
            Bar.write(visible(line), file=sys.stdout)
            sys.stdout.flush()

    def append(self, name: str, text: str) -> None:
        """Appends to a file of the run's folder; says once when that is not possible."""
        file = self.files[name]
        if (error := file.write(text)) and file.failures == 1:
            line = f"warning: {name} cannot be written ({error}): what belongs there is kept until it can be"
            print(line, file=sys.stderr, flush=True)

    @property
    def failed_writes(self) -> int:
        """Times that a file of this process's log could not be written when it should have been."""
        return sum(file.failures for file in self.files.values())

    def log(self, numbers: dict[str, Any], step: int) -> None:
        """Writes numbers under their names to metrics.jsonl and the dashboard, and the main ones as one line."""
        if not self.is_main:
            return
        numbers = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}
        self.rows.append({"step": step} | numbers)
        self.append(METRICS, json.dumps(self.rows[-1]) + "\n")
        if self.tracker:
            with self.unless_it_fails():
                self.tracker.log(numbers, step=step)
        shown = {
            name.removeprefix("train/"): f"{value:.4g}"
            for name, value in numbers.items()
            if value is not None and (name.split("/")[-1] in self.CONSOLE or "learning_rate" in name)
        }
        self.say(f"step {step} | " + " | ".join(f"{name} {value}" for name, value in shown.items()))
        self.on_bar |= {name: value for name, value in shown.items() if name in ("loss", "eval/wer")}
        if self.bar is not None:
            self.bar.set_postfix(self.on_bar, refresh=False)

    def go_back(self, rows: list[Row], step: int) -> None:
        """Truncates the log to a step, to log the later ones again; `rows` is what was logged by then."""
        self.rows = rows
        if self.is_main:
            self.rewrite(METRICS, [json.dumps(row) + "\n" for row in rows])
        dropped = self.folder / f"dropped-{self.rank}.txt"
        if dropped.exists():
            text = dropped.read_text(encoding="utf-8", errors="replace")
            lines = re.finditer(r"^step (\d+): .*\n", text, re.MULTILINE)  # others are torn
            self.rewrite(dropped.name, [found[0] for found in lines if int(found[1]) <= step])

    def rewrite(self, name: str, lines: list[str]) -> None:
        """Replaces a file of the run's folder; says so where that is not possible."""
        self.files[name].waiting = ""
        unfinished = self.folder / f".{name}"
        try:
            unfinished.write_text("".join(lines), encoding="utf-8")
            unfinished.replace(self.folder / name)
        except OSError as error:
            self.say(f"warning: {name} cannot be written ({error}): it still has the steps that are done again")

    def note_skipped(self, utterances: list[str], norm: float, step: int) -> None:
        """Names the utterances of a step that was not applied, all of them in a file."""
        if self.is_main:
            self.append(SKIPPED, "".join(f"step {step}: {escaped(name)}\n" for name in utterances))
            self.say(
                f"warning: step {step} was not applied, its gradient norm is {norm}; its {len(utterances)} utterances"
                f" are in skipped-steps.txt: {', '.join(utterances[:3])}, …"
            )

    def note_full_memory(self, halved: int, failed: list[str]) -> None:
        """Says that evaluation batches did not fit the memory, and names the utterances that did not even alone."""
        if halved or failed:
            alone = f"; alone did not fit, and count as not heard at all: {', '.join(failed)}" if failed else ""
            self.say(f"warning: out of memory in the evaluation, {halved} times a batch was halved{alone}")

    def note_dropped(self, reasons: list[str], step: int) -> None:
        """Lists utterances that were left out of a step (any rank: each has a file of its own)."""
        if reasons:
            lines = [f"step {step}: {escaped(reason)}\n" for reason in reasons]
            self.append(f"dropped-{self.rank}.txt", "".join(lines))

    def log_predictions(self, name: str, pairs: list[tuple[str, str]], step: int) -> None:
        for reference, hypothesis in pairs:
            self.say(f"  reference  {reference}\n  hypothesis {hypothesis}")
        if self.tracker:
            with self.unless_it_fails():
                table = self.library.Table(columns=["reference", "hypothesis"], data=[list(pair) for pair in pairs])
                self.tracker.log({name: table}, step=step)

    def open_progress(self, steps: int, done: int) -> None:
        if self.bar is not None:
            self.bar.close()
        self.bar = Bar(total=steps, initial=done, desc="training", unit="step", disable=self.hides_progress)


@contextlib.contextmanager
def silenced_stdout():
    """The trackers announce themselves on stdout; what a user must know of it is `RunLog.dashboard`."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def curve(rows: list[Row], name: str) -> list[tuple[int, float]]:
    """(step, value) of one metric, in the order of logging."""
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


PANELS = {
    "nats per token": ["train/loss", "eval/loss"],
    "percent": ["eval/wer", "eval/cer"],
    "learning rate": [f"train/learning_rate_{name}" for name in ("projector", "audio_top", "llm_top", "lm_head")],
}


def draw_curves(rows: list[Row], stage_ends: dict[int, str], panels: dict[str, list[str]], file: Path) -> None:
    """Draws what was logged over the steps, with the end of each stage marked.

    Args:
        panels: the metrics of each panel, by the label of its axis; what was not logged is left out.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.7 * len(panels)), layout="constrained")
    all_axes = figure.subplots(len(panels), 1, sharex=True)
    for axes, (label, names) in zip(all_axes, panels.items(), strict=True):
        styles = itertools.cycle(("-", "--", "-.", ":"))  # equal rates lie on one another
        for name, style in zip(names, styles, strict=False):
            if points := curve(rows, name):
                marker = "o" if name.startswith("eval") else None
                axes.plot(*zip(*points, strict=True), style, label=name, marker=marker)
        for step, stage in stage_ends.items():
            axes.axvline(step, color="grey", linestyle=":")
            top = axes.get_xaxis_transform()
            axes.text(step, 0.99, f"end of {stage} ", ha="right", va="top", transform=top, color="grey")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=min(0, axes.dataLim.ymin))
        if axes.lines:
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    all_axes[-1].set_xlabel("optimizer step")
    figure.savefig(file, dpi=110)


def wer_summary(rows: list[Row], stage_ends: dict[int, str], last_stage: str) -> list[str]:
    """WER before training, at the end of each stage and of the reloaded final model, a line each."""
    wers = dict(curve(rows, "eval/wer"))
    names = {0: "before training"} | {step: f"after {stage}" for step, stage in stage_ends.items()}
    names = {max(wers): f"after {last_stage}, at the end"} | names
    lines = [f"WER {wers[step]:6.2f} %  {name}" for step, name in sorted(names.items()) if step in wers]
    for kind, what in (("final", ""), ("confirm", ", on what was set aside and chose nothing")):
        low, high = curve(rows, f"{kind}/wer_low"), curve(rows, f"{kind}/wer_high")
        interval = f" (95 % interval {low[-1][1]:.2f}–{high[-1][1]:.2f})" if low else ""
        found = curve(rows, f"{kind}/wer")
        lines += [f"WER {wer:6.2f} %  final model, reloaded from disk{what}{interval}" for _, wer in found]
    return lines


def is_worse(rows: list[Row]) -> bool:
    """Whether the final model has more errors than the model had before training."""
    before, final = curve(rows, "eval/wer")[:1], curve(rows, "final/wer")
    return bool(before and final) and final[-1][1] > before[0][1]


def success_criteria(
    rows: list[Row], target_loss: float | None, target_wer: float | None, vocab_size: int
) -> list[str]:
    """Round 2's success criteria, each as a line that says whether it is met and by which figures; None: no target.

    There is a plateau when the mean loss of the run's last fifth is not at least 5 % below that of its first, or lies
    within half a nat of ln(vocab_size), where a model guesses.
    """
    losses = [loss for _, loss in curve(rows, "train/loss")]
    wers = [wer for _, wer in curve(rows, "eval/wer")]
    ((_, final_wer),) = curve(rows, "final/wer")
    fifth = max(1, len(losses) // 5)
    first, last, guessing = np.mean(losses[:fifth]), np.mean(losses[-fifth:]), math.log(vocab_size)
    checks = {}
    if target_loss is not None:
        checks[f"loss {last:.3f} nats per token, target below {target_loss:g}"] = last < target_loss
    if target_wer is not None:
        whose = " (Round 2's, on eval-d1; --target_wer gives another)" if target_wer == ROUND2_WER else ""
        checks[f"WER {final_wer:.2f} %, target below {target_wer:g} %{whose}"] = final_wer < target_wer
    checks |= {
        f"no plateau: loss from {first:.3f} to {last:.3f} (a model that guesses has {guessing:.2f})": (
            last < 0.95 * first and abs(last - guessing) > 0.5
        ),
        f"the WER changes: from {wers[0]:.2f} % to {wers[-1]:.2f} % over {len(wers)} evaluations": len(set(wers)) > 1,
    }
    return [f"{'met' if is_met else 'NOT met'}: {line}" for line, is_met in checks.items()]
