"""Going on where a run stopped: its folder, what of the trainer a checkpoint holds, signals, and steps that fail.

Imports nothing of the training script: its trainer is a ResumableTrainer, its settings are passed in.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
import torch.distributed
import transformers
from accelerate import skip_first_batches
from transformers import Qwen3ASRProcessor, Trainer, TrainerCallback

from hebrew_asr.checkpoints import store
from hebrew_asr.checkpoints.hub import CheckpointUploader
from hebrew_asr.checkpoints.store import Checkpoint
from hebrew_asr.checkpoints.tensors import ADAM, AVERAGE, DATA, WEIGHTS, load_weights, weights_of
from hebrew_asr.data import identity
from hebrew_asr.data.audio import AudioError
from hebrew_asr.data.rows import SpeechRows
from hebrew_asr.errors import InputError
from hebrew_asr.files import UNFINISHED
from hebrew_asr.model.costs import Work
from hebrew_asr.model.sharding import gather_for_others, sharded_like, whole
from hebrew_asr.model.stages import Stage
from hebrew_asr.processes import fail_together
from hebrew_asr.start import is_under_torchrun, say_last
from hebrew_asr.training.feed import Feed
from hebrew_asr.training.moving_average import MovingAverage
from hebrew_asr.training.run_folder import (
    PATH,
    changes,
    find_checkpoint,
    first_line,
    note_failure,
    settle,
    way_on,
    what_is_left,
)
from hebrew_asr.training.run_log import RunLog
from hebrew_asr.training.settings import Settings
from hebrew_asr.training.speed import Window
from hebrew_asr.training.watch import Batches, Watch, checksum, exit_status, stop_name

SECONDS_TO_LEAVE = 2.0  # of the grace time, when the last checkpoint is still being uploaded
TIMES_TO_GO_BACK = 2  # to a checkpoint, before a run without finite gradients is given up


class Stopped(Exception):
    """A process was asked to stop, and all have agreed to."""


class Unheard(InputError):
    """Recordings of the evaluation set could not be read."""


class BadSteps(InputError):
    """Too many steps in a row without a finite gradient."""


class ResumableTrainer(Trainer):
    """Trainer that saves complete checkpoints, goes on from one in the same bits, and stops when a signal asks it to.

    RNG states are not in a checkpoint, since every step and every utterance seeds its own.

    What it relies on in Trainer 5.23: `_init_training_state` returns the epochs and steps that are done, `_run_epoch`
    skips those steps in the sampler, and `_tr_loss` and `_globalstep_last_logged` are the window of the next log line.
    """

    # What a subclass has before it calls `prepare_checkpoints`
    config: Settings
    run_log: RunLog
    processor: Qwen3ASRProcessor
    use_bf16: bool
    feed: Feed
    identities: dict[str, np.ndarray]
    """Of the `training` data, where they are known, and of the `evaluation` data."""
    total_steps: int
    stage: Stage
    stage_ends: dict[int, str]
    """The last step of each stage but the last one, with the stage's name."""
    moving_average: MovingAverage | None
    chosen_by: str
    """The metric whose lowest value makes the best checkpoint."""
    panels: ClassVar[dict[str, list[str]]]
    """Of curves.png."""
    final_origin: str
    """A sentence for the model card: which weights the final model has."""

    def prepare_checkpoints(self) -> None:
        """Sets the state that a checkpoint holds; called when the subclass has its own."""
        self.window, self.last_train_loss = Window(), float("nan")
        self.dropped_utterances = self.broken_utterances = 0
        self.best_wer, self.best_step = float("inf"), 0
        self.evaluated_step, self.saved_step = -1, 0
        self.evaluation_pending = False  # the evaluation of this step was cut off by a signal
        self.order, self.bad_steps, self.skipped_steps, self.times_gone_back = 0, 0, 0, 0
        self.dead_workers, self.newly_dead = 0, 0  # of the loaders of all processes; of this one's, not yet among them
        self.batches: Batches | None = None
        self._tr_loss, self._globalstep_last_logged = torch.zeros((), device=self.args.device), 0  # as Trainer does
        self.resumed: Checkpoint | None = None
        self.stopped = 0  # the signal that ended the run
        with fail_together():
            self.files_for_use = self.make_files_for_use() if self.args.process_index == 0 else {}
        config, folder = self.config, Path(self.args.output_dir)
        uploads = config.uploads and config.hub_checkpoints and self.args.process_index == 0
        self.uploader = CheckpointUploader(
            config.hf_repo_id if uploads else None, folder, config.hub_save_total_limit, self.run_log.say
        )
        self.writer = store.Writer(
            folder / "checkpoints",
            config.save_total_limit,
            self.run_log.say,
            self.checkpoint_written,
            lambda: self.uploader.in_use,
            lambda: store.update_status(folder, failed_saves=self.writer.failures),
        )
        self.watch = Watch(
            self.args.process_index,
            self.args.world_size,
            config.preemption_grace_seconds,
            config.stall_timeout_minutes,
            lambda line: note_failure(folder, line, "preempted" if self.watch.stop else "failed"),
        )
        self.add_callback(CheckpointEvents(self))

    # For the subclass, which may keep more than its place in the data

    def set_stage(self, stage: Stage) -> None:
        raise NotImplementedError

    def learning_rate(self, component: str, depth: int, step: int) -> float:
        raise NotImplementedError

    def verdict(self) -> list[str]:
        """The run's success criteria, a line each."""
        raise NotImplementedError

    @property
    def way_on(self) -> str:
        return way_on(self.config, Path(self.args.output_dir))

    @property
    def final_folder(self) -> Path:
        return Path(self.args.output_dir) / "final_model"

    def unwrap(self) -> None:
        """Takes DistributedDataParallel off, if there is any."""
        if self.model_wrapped is not self.model:
            self.model_wrapped._remove_autograd_hooks()
            self.model_wrapped.reducer = None  # frees its gradient buckets; Trainer's loop keeps the wrapper itself
        self.accelerator._models.clear()  # prepare_model appends; the model would be listed twice
        self.model_wrapped = self.model

    def run_facts(self) -> dict[str, Any]:
        """What a resumed run must find as it was, beside the settings."""
        data = {name: identity.digest_of(mine) for name, mine in self.identities.items()}
        return {"bf16_autocast": self.use_bf16, "steps": self.total_steps, "data": data} | self.feed.facts()

    def extra_state(self) -> Any:
        """What a checkpoint keeps of this process beside the trainer's own."""
        return self.feed.state()

    def restore_extra_state(self, states: list[Any]) -> None:
        """Goes on from the `extra_state` of every process."""
        self.feed.restore(states)

    def shuffle_anew(self, order: int) -> None:
        """Lets the epochs have another order: 0 is the seed's own, each time the run goes back it is the next."""
        self.order = order
        self.feed.reorder(order)

    # Saving

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.save_checkpoint()

    def save_checkpoint(self) -> None:
        """Has this step's checkpoint written by the first process; all of them call it."""
        step = self.state.global_step
        if self.saved_step == step:
            return
        self.saved_step = step
        self.check_ranks()
        mine = self._tr_loss.item(), self.extra_state(), dataclasses.asdict(self.window)
        losses, streams, windows = zip(*self.watch.gather(mine), strict=True)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        adam = {
            f"{names[id(parameter)]}/{key}": tensor
            for parameter, moments in self.optimizer.state.items()
            for key, tensor in moments.items()
        }
        weights = weights_of(self.model)
        if self.args.process_index > 0:
            averages = self.moving_average.weights.values() if self.moving_average else ()
            gather_for_others([*weights.values(), *adam.values(), *averages])
            return
        config = self.config
        state = {
            "losses": list(map(none_if_nan, losses)),
            "streams": streams,
            "last_logged_step": self._globalstep_last_logged,
            "windows": windows,
            "dropped_utterances": self.dropped_utterances,
            "broken_utterances": self.broken_utterances,
            "dead_workers": self.dead_workers,
            "last_train_loss": none_if_nan(self.last_train_loss),
            "best_wer": none_if_nan(self.best_wer),
            "best_step": self.best_step,
            "evaluation_pending": self.evaluation_pending,
            "order": self.order,
            "bad_steps": self.bad_steps,
            "skipped_steps": self.skipped_steps,
            "tracker": self.run_log.tracker_id,
        }
        documents = self.files_for_use | {
            "state.json": json.dumps(state, allow_nan=False).encode(),
            "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in self.run_log.rows).encode(),
        }
        facts = {
            "wer": none_if_nan(self.last_wer) if self.evaluated_step == step else None,
            "epoch": self.state.epoch,
            "stage": self.stage.name,
            "processes": self.args.world_size,
            "settings": json.loads(json.dumps(dataclasses.asdict(config))),
            "fingerprint": store.fingerprint(config.identity()),
            "run": self.run_facts(),
        }
        data = {name: torch.from_numpy(mine.copy()) for name, mine in self.identities.items()}
        tensors = {WEIGHTS: weights, ADAM: adam, DATA: data}
        if self.moving_average:
            tensors[AVERAGE] = self.moving_average.weights
        self.writer.save(step, tensors, documents, facts)

    def save_last(self) -> None:
        """Makes sure that the last step is on the disk, by a second attempt if need be; InputError on all processes."""
        step, place = self.state.global_step, self.writer.parent
        for is_last_attempt in (False, True):
            self.writer.wait()
            newest = store.newest_name(place)
            if self.watch.gather(newest is not None and store.number_of(Path(newest)) == step)[0]:
                return
            if is_last_attempt:
                break
            self.saved_step = 0
            self.save_checkpoint()
        with fail_together():
            raise InputError(
                f"the run is at its last step, {step}, which could not be saved ({self.writer.problem}); the newest"
                f" checkpoint is {newest or 'none'}. Make room in {place}, or mend the disk: {self.way_on} goes on from"
                " there"
            )

    def checkpoint_written(self, checkpoint: Checkpoint) -> None:
        """Called in the writer's thread for each checkpoint that is on the disk."""
        facts = {"step": checkpoint.step, "checkpoint": checkpoint.folder.name, "failed_saves": self.writer.failures}
        store.update_status(self.run_log.folder, **facts)
        self.uploader.wake()

    def make_files_for_use(self) -> dict[str, bytes]:
        """What a folder needs beside the weights to be loaded as a model; InputError where the disk has no place.

        Made before the first step, on the run's own disk: no save depends on another one, such as that of /tmp.
        """
        place = Path(self.args.output_dir)
        try:
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=place, prefix=f".{UNFINISHED}") as folder:
                self.processor.save_pretrained(folder)
                self.model.config.save_pretrained(folder)
                self.model.generation_config.save_pretrained(folder)
                return {path.name: path.read_bytes() for path in Path(folder).iterdir()}
        except OSError as error:
            raise InputError(f"cannot write to {place}: {error.strerror or error}") from error

    # Resuming

    def resume(self, checkpoint: Checkpoint) -> None:
        """Puts everything back to where it was at a checkpoint; Adam follows when Trainer has built it."""
        check_checkpoint(checkpoint, self)
        self.resumed = checkpoint
        self.state.global_step = self.saved_step = checkpoint.step
        self.args.eval_on_start = False
        load_weights(self.model, checkpoint)
        if self.moving_average:
            self.moving_average.load(checkpoint.tensors(AVERAGE))
        self.set_stage(self.config.stage_of_epoch(checkpoint.step // len(self.feed) + 1))
        state = checkpoint.document("state.json")
        for name in ("dropped_utterances", "broken_utterances", "best_step", "dead_workers"):
            setattr(self, name, state[name])
        for name in ("evaluation_pending", "bad_steps", "skipped_steps"):
            setattr(self, name, state[name])
        self.last_train_loss = float("nan") if state["last_train_loss"] is None else state["last_train_loss"]
        self.best_wer = float("inf") if state["best_wer"] is None else state["best_wer"]
        is_same_set = changed_data(checkpoint, self.identities, ("evaluation",)) == []
        if not is_same_set or self.best_step not in map(store.number_of, store.names(checkpoint.folder.parent)):
            self.best_wer, self.best_step = float("inf"), 0
        self.shuffle_anew(state["order"])
        self.restore_extra_state(state["streams"])
        self.restore_window()
        if self.evaluation_pending:
            self.saved_step = 0
        rows = [json.loads(line) for line in (checkpoint.folder / "metrics.jsonl").read_text().splitlines()]
        self.run_log.go_back(rows, checkpoint.step)
        self.run_log.tracker_id = state["tracker"]

    def restore_window(self) -> None:
        """The losses since the last logged step, which another number of processes shares evenly."""
        state = self.resumed.document("state.json")
        losses = [float("nan") if loss is None else loss for loss in state["losses"]]
        same = len(losses) == self.args.world_size
        self._tr_loss.fill_(losses[self.args.process_index] if same else sum(losses) / len(losses))
        self._globalstep_last_logged = state["last_logged_step"]
        window = state["windows"][self.args.process_index if same else 0]
        self.window = Window(**window | {"work": Work(**window["work"])})

    def load_adam(self) -> None:
        """Puts AdamW's moments back, by the names of their parameters."""
        parameters = dict(self.model.named_parameters())
        fused = self.optimizer.param_groups[0]["fused"]
        for name, tensor in self.resumed.tensors(ADAM):
            parameter, key = parameters[name.rpartition("/")[0]], name.rpartition("/")[2]
            if key != "step":
                tensor = sharded_like(tensor, parameter)
            elif fused:  # where AdamW keeps its step count
                tensor = tensor.to(parameter.device)
            self.optimizer.state[parameter][key] = tensor

    def _init_training_state(self, max_steps: int, num_update_steps_per_epoch: int, *args: Any) -> tuple[int, int]:
        """Trainer's own, then at the checkpoint's step; returns the epochs that are done, and the steps of the next."""
        super()._init_training_state(max_steps, num_update_steps_per_epoch, *args)
        if not self.resumed:
            return 0, 0
        self.state.global_step = self.resumed.step
        self.state.epoch = self.resumed.step / num_update_steps_per_epoch
        return divmod(self.resumed.step, num_update_steps_per_epoch)

    def _prepare_for_training(self, *args: Any) -> tuple[torch.nn.Module, torch.utils.data.DataLoader]:
        prepared = super()._prepare_for_training(*args)
        if self.resumed:
            self.load_adam()
            self.lr_scheduler.last_epoch = self.resumed.step
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(group["component"], group["depth"], self.resumed.step)
        return prepared

    def _run_epoch(self, model: torch.nn.Module, epoch: int, **kwargs: Any) -> None:
        if self.resumed and epoch == kwargs["epochs_trained"]:
            self.restore_window()
            kwargs["resume_from_checkpoint"] = str(self.resumed.folder)  # skips the steps that are done, undecoded
        super()._run_epoch(model=model, epoch=epoch, **kwargs)
        self.batches = None  # with its workers

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Trainer's own reads a pickle; here there is nothing to load."""

    # Stopping

    def while_running(self, loader: torch.utils.data.DataLoader | list[Any]) -> Iterator[Any]:
        """A loader's batches; raises Stopped on all processes between two batches when one of them is asked to stop.

        Raises Unheard on all of them, after the last batch, when a recording could not be read.
        """
        begun, problems = (
            cast(Any, loader.dataset).begun if isinstance(loader, torch.utils.data.DataLoader) else list,
            [],
        )
        batches = Batches(iter(loader), lambda done: iter(skip_first_batches(loader, done)), self.worker_died, begun)
        for _ in range(max(self.watch.gather(len(loader)))):
            self.watch.mark(f"the evaluation after step {self.state.global_step}")
            if stop := self.watch.agree_to_stop():
                self.stopped = stop
                raise Stopped
            try:
                yield from itertools.islice(batches, 1)
            except AudioError as error:  # of a worker, with its traceback before it
                problems.append(
                    str(error).strip().splitlines()[-1].removeprefix(f"{AudioError.__module__}.AudioError: ")
                )
        if found := [problem for mine in self.watch.gather(problems) for problem in mine]:
            raise Unheard(
                f"{len(found)} recordings of the evaluation set could not be read, {found[0]}. Put them back:"
                f" {self.way_on} goes on from the last step"
            )

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluates; where that is cut off, saves a checkpoint that knows it, and stops."""
        try:
            return super()._evaluate(*args, **kwargs)
        except Stopped:
            if not self.state.global_step:
                raise
            self.evaluation_pending = True
            self.control.should_save = self.control.should_training_stop = True
            return {}
        except Unheard:
            if self.state.global_step:
                self.evaluation_pending = True
                self.save_checkpoint()
                self.writer.wait()
            raise

    # Guards

    def get_batch_samples(self, epoch_iterator: Iterator[Any], *args: Any) -> tuple[list, torch.Tensor | int | None]:
        self.loss_before = self._tr_loss.clone()  # of the window, without the step that begins here
        return super().get_batch_samples(self.steps_of(epoch_iterator), *args)

    def steps_of(self, epoch_iterator: Iterator[Any]) -> Iterator[Any]:
        """The inputs of one step after the other, whatever becomes of the loader's workers."""
        if self.batches is None or self.batches.first is not epoch_iterator:
            begin = self.state.global_step % len(self.feed)
            again = functools.partial(self.rest_of_epoch, begin)
            self.batches = Batches(epoch_iterator, again, self.worker_died, self.feed.dataset.begun)
        return self.batches

    def rest_of_epoch(self, begin: int, done: int) -> Iterator[Any]:
        """The epoch's batches without the first ones, by new workers."""
        return iter(skip_first_batches(self.get_train_dataloader(), begin + done))

    def worker_died(self, why: str) -> None:
        """Says, from any process, that a worker of the loader died; the next step counts it."""
        self.newly_dead += 1
        line = f"warning: process {self.args.process_index}, after step {self.state.global_step}: {first_line(why)}"
        print(f"{line}; new workers go on from the batch that is due", file=sys.stderr, flush=True)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: torch.Tensor | None = None) -> torch.Tensor:
        norm = whole(super()._get_grad_norm(model, grad_norm=grad_norm))  # else every reading of it is an exchange
        if math.isfinite(norm):  # the same on every rank: gradients are reduced by now
            self.bad_steps = 0
        else:
            self.skip_step(float(norm))
        return norm

    def skip_step(self, norm: float) -> None:
        """Leaves weights, moments and the logged loss as they were, and names the utterances of the step."""
        step = self.state.global_step + 1
        self.bad_steps += 1
        self.skipped_steps += 1
        for parameter in self.model.parameters():
            parameter.grad = None  # AdamW leaves such a one alone
        self._tr_loss.copy_(self.loss_before)
        self._globalstep_last_logged += 1  # the mean is over the steps that were applied
        names = [name for share in self.watch.gather(self.feed.names_of_step(step)) for name in share]
        self.run_log.note_skipped(names, norm, step)
        if self.bad_steps >= self.config.max_bad_steps:
            raise BadSteps(
                f"{self.bad_steps} steps in a row up to step {step} had no finite gradient (its norm is {norm}): broken"
                " recordings, or too high a learning rate"
            )

    def go_back(self, problem: BadSteps) -> None:
        """Returns to the last checkpoint, to go on from there with the utterances in another order, or gives up."""
        self.writer.wait()
        found = find_checkpoint(self.writer.parent, self.run_log.say)
        self.times_gone_back += 1
        if found is None or self.times_gone_back > TIMES_TO_GO_BACK:
            why = "there is no checkpoint" if found is None else f"going back {TIMES_TO_GO_BACK} times did not help"
            raise InputError(f"{problem}; {why}. skipped-steps.txt names their utterances")
        order = self.order + 1
        self.unwrap()
        self.optimizer = None
        settled = settle(found, self.writer.parent)
        assert settled is not None
        self.resume(settled)
        self.shuffle_anew(order)
        self.bad_steps = 0
        self.run_log.say(f"warning: {problem}; back to step {found.step}, with data order {order}")

    def check_ranks(self) -> None:
        """Compares what trains, bit by bit, over the processes; what is sharded, as each of them gathers it."""
        mine = checksum(whole(parameter) for parameter in self.model.parameters() if parameter.requires_grad)
        if differing := self.watch.differing_ranks(mine):
            raise InputError(
                f"at step {self.state.global_step} the weights of process {', '.join(map(str, differing))} differ from"
                " those of process 0: broken hardware, or a gradient that is not reduced. Start again to go on from the"
                " last checkpoint"
            )


class CheckpointEvents(TrainerCallback):
    """Seeds each step, and after it has Trainer save by interval, compare the processes, and stop when one must."""

    def __init__(self, trainer: ResumableTrainer):
        self.trainer, self.config = trainer, trainer.config

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Whatever draws from the global generators (dropout) draws the same in a resumed run."""
        seed = np.random.SeedSequence([self.config.seed, state.global_step, args.process_index]).generate_state(1)
        transformers.set_seed(int(seed[0]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, step = self.trainer, state.global_step
        trainer.watch.mark(f"step {step}")
        if trainer.moving_average:
            trainer.moving_average.update()
        if step % self.config.check_ranks_steps == 0:
            trainer.check_ranks()
        if step % self.config.save_steps == 0 or step in trainer.stage_ends or step == trainer.total_steps:
            control.should_save = True
        if stop := trainer.watch.agree_to_stop():
            trainer.stopped, trainer.evaluation_pending = stop, control.should_evaluate
            control.should_evaluate = False
            control.should_save = control.should_training_stop = True


def none_if_nan(number: float) -> float | None:
    """None for NaN and infinity, which JSON does not have."""
    return number if math.isfinite(number) else None


def check_checkpoint(checkpoint: Checkpoint, trainer: ResumableTrainer) -> None:
    """Raises InputError for a checkpoint of another model, of other settings or of other data."""
    mine = {name: list(tensor.shape) for name, tensor in weights_of(trainer.model).items()}
    if differing := store.differences(checkpoint.shapes(WEIGHTS), mine):
        raise InputError(
            f"{checkpoint.folder} is not of {trainer.config.model_name_or_path}: {len(differing)} tensors differ,"
            f" {differing[0]}. Give the model it was trained from, or another --resume"
        )
    differing = changes(checkpoint.facts["settings"], trainer.config)
    run, mine = dict(checkpoint.facts["run"]), trainer.run_facts()
    if run.pop("data", None) is not None:  # else it is of an older version, which compares paths and counts
        changed = changed_data(checkpoint, trainer.identities)
        differing = [line for line in differing if not PATH.match(line)]
        if changed and not trainer.config.accept_changed_data:
            raise InputError(
                f"{checkpoint.folder} was trained with other data:\n  "
                + "\n  ".join(changed)
                + "\nPut the data back, or go on with these by --accept_changed_data, or train in another --output_dir"
            )
        if trainer.total_steps <= checkpoint.step and changed_data(checkpoint, trainer.identities, ("training",)):
            raise InputError(
                f"{checkpoint.folder} is at step {checkpoint.step}, and with these training data the run ends at step"
                f" {trainer.total_steps}: nothing would be trained on them. Put the data back, or train its weights on"
                f" in a run of their own: --model_name_or_path {checkpoint.folder} --output_dir OTHER"
            )
        for name in ("train_utterances", "train_seconds", *(["steps"] if changed else [])):
            run.pop(name, None), mine.pop(name, None)
    mine.pop("data")
    differing += store.differences(run, mine)
    if differing:
        raise InputError(f"{checkpoint.folder} is of another run:\n  " + "\n  ".join(differing))


def stand_in_for_lost(rows: SpeechRows, checkpoint: Checkpoint, run_log: RunLog) -> SpeechRows:
    """The training data as they were at a checkpoint, where files of them are lost: those are dropped at their turn."""
    if not (checkpoint.folder / DATA).exists():
        return rows
    whole = identity.with_lost(rows, dict(checkpoint.tensors(DATA))["training"].numpy())
    if lost := len(whole) - len(rows):
        run_log.say(f"warning: {lost} training utterances are lost since step {checkpoint.step}: they are dropped")
    return whole


def changed_data(
    checkpoint: Checkpoint, mine: dict[str, np.ndarray], names: Iterable[str] = ("training", "evaluation")
) -> list[str]:
    """How a checkpoint's data differ from a run's, a line each; none where it does not say which data it had."""
    if not (checkpoint.folder / DATA).exists():
        return []
    old = {name: tensor.numpy() for name, tensor in checkpoint.tensors(DATA)}
    lines = [identity.differences(f"{n} data", old[n], mine[n]) for n in names if n in old and n in mine]
    return list(itertools.chain(*lines))


def train(trainer: ResumableTrainer) -> None:
    """Trains to the end; goes back to the last checkpoint when steps keep failing. Raises Stopped on a signal."""
    if trainer.resumed:
        trainer.uploader.wake()
    while True:
        try:
            if trainer.evaluation_pending:
                trainer.create_optimizer()
                trainer.load_adam()
                trainer.evaluate()
                trainer.save_checkpoint()
            if trainer.state.global_step < trainer.total_steps:
                trainer.train()
            if trainer.stopped:
                raise Stopped
            trainer.save_last()
            return
        except BadSteps as problem:
            trainer.go_back(problem)


@contextlib.contextmanager
def ends_early(trainer: ResumableTrainer):
    """Ends the process with 128 + the signal's number when its block is stopped, once the checkpoint is on the disk."""
    try:
        yield
        return
    except Stopped:
        pass
    run_log, uploader = trainer.run_log, trainer.uploader
    trainer.writer.wait()
    seconds = trainer.watch.seconds_left() - SECONDS_TO_LEAVE
    if run_log.is_main:
        last = store.newest_name(trainer.writer.parent)
        where = f"checkpoint {last}" if last else "no checkpoint yet"
        step, why = trainer.state.global_step, stop_name(trainer.stopped)
        facts = {"step": step, "why": why, "checkpoint": last}
        store.write_status(run_log.folder, "preempted", **facts, **uploader.facts())
        line = f"stopped at step {step} ({why}), {what_is_left(trainer.config, run_log.folder)}"
        say_last(line) if is_under_torchrun() else run_log.say(line)
        if last and uploader.repo_id:
            is_there = uploader.drain(seconds) and uploader.uploaded == last
            state = "is on the Hub" if is_there else f"is not on the Hub, which has {uploader.uploaded or 'none'}"
            run_log.say(f"{where} {state}{'' if is_there or not uploader.problem else f' ({uploader.problem})'}")
            store.update_status(run_log.folder, on_hub=is_there, **uploader.facts())
    trainer.watch.gather(None)
    trainer.watch.close()
    run_log.finish()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.exit(exit_status(trainer.stopped))


class StepEvents(TrainerCallback):
    """Has Trainer log and evaluate by interval, at the end of each stage and at the end; moves the progress bar."""

    def __init__(self, note_step: Callable[[], None], run_log: RunLog, eval_steps: int, ends: set[int]):
        self.note_step, self.run_log, self.eval_steps, self.ends = note_step, run_log, eval_steps, ends

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run_log.open_progress(state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note_step()
        self.run_log.bar.update()
        if state.global_step in self.ends or state.global_step % self.eval_steps == 0:
            control.should_evaluate = control.should_log = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.run_log.bar.close()


def training_arguments(config: Settings, folder: Path, cpu: bool) -> transformers.TrainingArguments:
    """What Trainer reads; the rest is in TrainingConfig. No token, no upload and no tracker goes through Trainer."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=config.num_epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=1,  # one item of the loader is a whole step, see GlobalBatchSampler
        max_grad_norm=config.max_grad_norm,
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,
        eval_on_start=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=config.seed,
        use_cpu=cpu,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # they are constants; a forward pass may be run again by one process alone
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process on a machine of many GPUs takes one; Trainer would wrap it in DataParallel
    return arguments
