"""Of processes that need the same work, one does it; however it ends, the next one can go on."""

import errno
import logging
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import jlcm
from experiments.config import DigitsConfig
from experiments.models import digits
from jlcm import locks
from jlcm.architecture import Architecture
from jlcm.learning.resume import stage_folder
from jlcm.locks import exclusive, once, seconds_waited

fork = multiprocessing.get_context("fork")  # spawned processes would import PyTorch anew


def work(path: Path, log: Path, again: bool = False) -> None:
    """Make a file with a line in the log for each time."""
    with once(path, again=again) as missing:
        if missing:
            with log.open("a") as file:
                file.write(f"{os.getpid()}\n")
            time.sleep(0.2)
            path.write_text(str(os.getpid()))
    assert path.is_file()


def lines(log: Path) -> int:
    return len(log.read_text().splitlines())


def run_at_once(target, *arguments, count: int) -> None:
    processes = [fork.Process(target=target, args=arguments) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * count


def test_one_process_does_the_work(tmp_path):
    path, log = tmp_path / "file", tmp_path / "log"
    run_at_once(work, path, log, count=4)
    assert lines(log) == 1
    work(path, log)
    assert lines(log) == 1
    assert sorted(tmp_path.iterdir()) == [path, log]  # no lock is left


def test_work_is_done_again_where_asked(tmp_path):
    path, log = tmp_path / "file", tmp_path / "log"
    for count in (1, 2):
        work(path, log, again=True)
        assert lines(log) == count


def test_waiting_counts_what_others_do_as_done(tmp_path):
    path, log = tmp_path / "file", tmp_path / "log"
    path.write_text("old")
    process = fork.Process(target=work, args=(path, log, True))
    with exclusive(path):
        process.start()
        time.sleep(1)  # it has seen the old file, and waits
        fresh = tmp_path / "fresh"
        fresh.write_text("new")
        os.replace(fresh, path)
    process.join()
    assert process.exitcode == 0 and path.read_text() == "new" and not log.exists()


def hold(path: Path, connection) -> None:
    with exclusive(path):
        child = fork.Process(target=time.sleep, args=(60,))  # as processes that load images
        child.start()
        connection.send(child.pid)
        child.join()


def wait_for(path: Path, connection) -> None:
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("jlcm.locks").addHandler(handler)
    logging.getLogger("jlcm.locks").setLevel(logging.INFO)
    with exclusive(path):
        connection.send((messages, seconds_waited()))


def test_a_killed_process_frees_its_lock_and_the_next_one_has_said_that_it_waits(tmp_path):
    path = tmp_path / "file"
    here, there = fork.Pipe()
    holder = fork.Process(target=hold, args=(path, there))
    holder.start()
    child = here.recv()
    waiting = fork.Process(target=wait_for, args=(path, there))
    waiting.start()
    assert not here.poll(0.7)  # it waits
    os.kill(holder.pid, signal.SIGKILL)
    try:
        assert here.poll(20)
    finally:
        os.kill(child, signal.SIGKILL)
    messages, seconds = here.recv()
    holder.join()
    waiting.join()
    assert messages == [f"waiting for another process that works on {path}"]
    assert seconds > 0


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_file_systems_without_locks_are_used_without(code, tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuse)
    path, log = tmp_path / "file", tmp_path / "log"
    work(path, log)
    assert "has no locks" in caplog.text and lines(log) == 1
    assert sorted(tmp_path.iterdir()) == [path, log]


def test_what_is_there_needs_no_lock_and_no_writable_folder(tmp_path, monkeypatch):
    def refuse(path, **_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    path = tmp_path / "file"
    path.write_text("")
    part = tmp_path / "stages"
    with stage_folder(part, "options", {}, []) as folder:
        folder.mkdir()
    monkeypatch.setattr(locks, "FileLock", refuse)
    with once(path) as missing:
        assert not missing
    with pytest.raises(OSError, match="Read-only"), once(tmp_path / "other"):
        pass
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with stage_folder(part, "options", {}, []) as again:
        assert again == folder


def test_other_errors_of_a_lock_stop_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError), once(tmp_path / "file" / "below") as missing:
        pytest.fail(f"went on with missing={missing}")


def test_an_error_inside_is_passed_on_and_frees_the_lock(tmp_path):
    with pytest.raises(KeyError), once(tmp_path / "file"):
        raise KeyError
    with once(tmp_path / "file") as missing:
        assert missing
    assert not list(tmp_path.iterdir())


def learn(folder: Path, connection) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8))).eval()
    packed = jlcm.compress(
        model,
        alpha=4.5,
        init="random",
        calibration=torch.randn(256, 64),
        learn=jlcm.Learn(),
        folder=folder,
        progress=False,
    )
    connection.send([layer.restored for layer in packed.learning])


def test_runs_that_begin_alike_share_stages_while_both_run(tmp_path):
    here, there = fork.Pipe()
    run_at_once(learn, tmp_path, there, count=2)
    assert sorted(here.recv() for _ in range(2)) == [[False] * 8, [True] * 8]


def test_a_network_is_trained_by_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("JLCM_CACHE", str(tmp_path / "cache"))
    architecture = Architecture(
        builder="timm:create_model", arguments={"num_classes": 10, "model_name": "test_byobnet"}
    )
    log, train = tmp_path / "log", digits.train

    def counted(*arguments, **options):
        with log.open("a") as file:
            file.write("trained\n")
        return train(*arguments, **options)

    monkeypatch.setattr(digits, "train", counted)
    data = DigitsConfig(image_size=16, epochs=1)
    threads = [
        threading.Thread(
            target=digits.trained_on_digits,
            args=(architecture, data),
            kwargs={"seed": 0, "device": "cpu"},
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lines(log) == 1 and len(list((tmp_path / "cache").iterdir())) == 1
