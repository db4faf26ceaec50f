"""A process hears that it must stop, whatever it waits for, and ends when it cannot go on; two agree on both."""

import multiprocessing
import os
import re
import signal
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed
from accelerate import skip_first_batches

from hebrew_asr.training import watch as run_watch
from hebrew_asr.training.watch import Watch


def child(body) -> int:
    """Forks a process that runs `body`; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        body()
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(77)


def status(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_until(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


READY = os.pipe()


def started(body) -> int:
    """A child that has written to READY: a signal that comes while Python forks is forgotten."""
    pid = child(body)
    os.read(READY[0], 1)
    return pid


def waiting() -> None:
    os.write(READY[1], b"x")
    while True:  # in short sleeps: one that begins just after a signal came does not end before its time
        time.sleep(0.01)


def test_outside_of_training_a_signal_ends_the_process_and_none_of_its_workers(tmp_path):
    noted = tmp_path / "noted"

    def body() -> None:
        with run_watch.ends_at_a_signal(noted.write_text):
            worker = started(waiting)
            os.kill(worker, signal.SIGTERM)
            assert status(worker) == -signal.SIGTERM and not noted.exists()
            with Watch(0, 1, 60, 60, print) as watch:
                os.kill(os.getpid(), signal.SIGTERM)
                wait_until(lambda: watch.stop)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with run_watch.ends_at_a_signal(noted.write_text):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)

    assert status(child(body)) == 128 + signal.SIGTERM and noted.read_text() == "SIGTERM"


def watching(grace: float = 60, stall_minutes: float = 60, report=print):
    def body() -> None:
        with Watch(0, 1, grace, stall_minutes, report):
            waiting()  # the main thread never looks

    return body


def test_a_signal_is_heard_and_the_launchers_second_one_is_the_same():
    def body() -> None:
        with Watch(0, 1, 60, 60, print) as watch:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            wait_until(lambda: watch.agree_to_stop() == signal.SIGTERM)
            time.sleep(0.5)

    assert status(child(body)) == 0


def test_a_second_signal_later_ends_it_at_once(monkeypatch):
    monkeypatch.setattr(run_watch, "ONE_SIGNAL_SECONDS", 0.3)
    pid = started(watching())
    os.kill(pid, signal.SIGINT)
    time.sleep(3)  # until the first was surely seen, on a busy machine too
    os.kill(pid, signal.SIGTERM)
    assert status(pid) == 128 + signal.SIGTERM


def test_after_the_grace_time_it_ends_and_says_why(tmp_path):
    pid = started(watching(grace=0.5, report=lambda line: (tmp_path / "why").write_text(line)))
    begun = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    assert status(pid) == 128 + signal.SIGTERM and time.monotonic() - begun < 5
    assert "SIGTERM, but the start did not come to an end within 0.5 s" in (tmp_path / "why").read_text()


def test_without_progress_it_ends(tmp_path):
    pid = started(watching(stall_minutes=0.01, report=lambda line: (tmp_path / "why").write_text(line)))
    assert status(pid) == 1
    assert "no progress for 0.6 s since the start" in (tmp_path / "why").read_text()


def test_a_signal_that_is_ignored_stays_so_and_the_others_are_put_back():
    def body() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        before = signal.getsignal(signal.SIGINT)
        with Watch(0, 1, 60, 60, print) as watch:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.5)
            assert watch.agree_to_stop() == 0
        assert signal.getsignal(signal.SIGINT) is before
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN

    assert status(child(body)) == 0


def test_a_loaders_worker_outlives_a_signal_but_not_for_ever():
    def body() -> None:
        run_watch.outlive_stop_signals(0, seconds=1.0)
        os.write(READY[1], b"x")
        while True:
            time.sleep(0.01)

    pid = started(body)
    os.kill(pid, signal.SIGTERM)
    time.sleep(0.4)
    assert os.waitpid(pid, os.WNOHANG) == (0, 0), "it works on"
    assert status(pid) == -signal.SIGALRM


def test_it_stops_when_its_launcher_is_gone(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")

    def grandchild() -> None:
        with Watch(0, 1, 60, 60, print) as watch:
            os.write(READY[1], b"x")
            wait_until(lambda: watch.agree_to_stop() == run_watch.LAUNCHER_ENDED)
            (tmp_path / "stopped").write_text("")

    def launcher() -> None:
        child(grandchild)
        time.sleep(60)

    pid = started(launcher)
    os.kill(pid, signal.SIGKILL)
    status(pid)
    wait_until((tmp_path / "stopped").exists)


def two_ranks(tmp_path, body) -> list[int]:
    """Forks two ranks of a gloo group; `body(watch, rank)` runs in each."""

    def rank_body(rank: int):
        def run() -> None:
            torch.distributed.init_process_group(
                "gloo",
                init_method=f"file://{tmp_path}/store",
                rank=rank,
                world_size=2,
                timeout=timedelta(seconds=60),
            )
            report = (tmp_path / f"why-{rank}").write_text
            with Watch(rank, 2, 60, 0.05, report) as watch:
                body(watch, rank)

        return run

    return [child(rank_body(rank)) for rank in range(2)]


def test_ranks_agree_to_stop_and_see_other_weights(tmp_path):
    def body(watch, rank) -> None:
        assert watch.agree_to_stop() == 0
        assert watch.differing_ranks(5) == []
        assert watch.differing_ranks(5 + rank) == [1]
        assert watch.gather(rank) == [0, 1]
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            wait_until(lambda: watch.stop)
        assert watch.agree_to_stop() == signal.SIGTERM

    assert [status(pid) for pid in two_ranks(tmp_path, body)] == [0, 0]


def test_the_launchers_signal_after_a_ranks_death_is_no_preemption(tmp_path):
    def body(watch, rank) -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun's, to those that are left
        wait_until(lambda: watch.stop)
        with pytest.raises(RuntimeError, match=r"(?i)connection (closed|reset)"):
            watch.agree_to_stop()

    assert [status(pid) for pid in two_ranks(tmp_path, body)] == [0, -signal.SIGKILL]


@pytest.mark.parametrize("hanging", [0, 1])
def test_a_rank_that_hangs_is_named_by_the_other(tmp_path, hanging):
    def body(watch, rank) -> None:
        watch.mark("step 7")
        if rank == hanging:
            os.kill(os.getpid(), signal.SIGSTOP)
        watch.agree_to_stop()

    pids = two_ranks(tmp_path, body)
    assert status(pids[1 - hanging]) == 1
    os.kill(pids[hanging], signal.SIGKILL)
    status(pids[hanging])
    why = (tmp_path / f"why-{1 - hanging}").read_text()
    assert "no progress for 3 s since step 7" in why
    assert re.search(rf"[Rr]anks? {hanging}\b", why), why


# A loader's workers


class Clips(torch.utils.data.Dataset):
    """Numbers; the one called `deadly` kills the process that asks for it."""

    def __init__(self, deadly: int | None = None):
        self.deadly = deadly

    def __len__(self) -> int:
        return 24

    def __getitem__(self, number: int) -> int:
        if number == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return number


def batches_of(clips: Clips, workers: int, told: list[str]) -> run_watch.Batches:
    loader = torch.utils.data.DataLoader(clips, batch_size=2, num_workers=workers, collate_fn=list)
    return run_watch.Batches(iter(loader), lambda done: iter(skip_first_batches(loader, done)), told.append)


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_go_on_in_order_when_a_worker_is_killed(workers):
    told = []
    batches = batches_of(Clips(), workers, told)
    before = [next(batches)]
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    time.sleep(0.3)  # a handler of SIGCHLD would raise here
    assert [*before, *batches] == [[n, n + 1] for n in range(0, 24, 2)]
    assert len(told) == 1 and "DataLoader worker (pid" in told[0]
    del batches
    wait_until(lambda: not multiprocessing.active_children())


def test_a_batch_whose_tensors_went_with_its_worker_is_read_again():
    class Tensors(Clips):
        def __getitem__(self, number: int) -> torch.Tensor:
            return torch.full((1000,), float(number))

    loader, told = torch.utils.data.DataLoader(Tensors(), batch_size=2, num_workers=1), []
    batches = run_watch.Batches(iter(loader), lambda done: iter(skip_first_batches(loader, done)), told.append)
    found = [next(batches)]
    time.sleep(1.0)  # the next two are in the queue, and their tensors still with the worker
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    found += batches
    assert [batch[:, 0].tolist() for batch in found] == [[n, n + 1] for n in range(0, 24, 2)]
    assert len(told) == 1 and "DataLoader worker" in told[0]


def test_a_loader_whose_workers_go_on_dying_is_given_up():
    told, found = [], []
    with pytest.raises(
        RuntimeError, match=r"3 workers of the loader died one after the other: .*dataloader_num_workers"
    ):
        found += batches_of(Clips(deadly=5), 1, told)
    assert len(told) >= 3


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "(pid 7) is killed"),
        (ConnectionResetError(), "worker is gone (ConnectionResetError)"),  # as its tensors are fetched from it
    ],
)
def test_workers_that_die_now_and_then_do_not_end_a_run(error, why):
    def after(done: int):
        if done < 6:
            yield done
            raise error

    told = []
    assert list(run_watch.Batches(after(0), after, told.append)) == [0, 1, 2, 3, 4, 5] and len(told) == 6
    assert why in told[0]


def test_another_error_of_a_worker_is_raised_at_once():
    class Broken(Clips):
        def __getitem__(self, number: int) -> int:
            raise RuntimeError("a broken clip")

    told = []
    with pytest.raises(RuntimeError, match="a broken clip"):
        next(batches_of(Broken(), 1, told))
    assert not told
