"""Files and folders: locks that die with their process, failures of one kind, what is no file."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import tiny
from helpers import refused

from bertfast.cli import main
from bertfast.files import (
    check_file,
    check_folder,
    locked,
    os_errors,
    read_json,
    regular,
    write_text,
)

HOLD = """
import os, sys, time
from pathlib import Path
from bertfast.files import locked
with locked(Path(sys.argv[1])):
    worker = os.fork()  # outlives a killed parent, as a pool's does
    if worker:
        print(worker, flush=True)
    time.sleep(60)
"""


def enter(folder):
    with locked(folder):
        pass


@pytest.mark.seconds
def test_lock_ends_with_its_process(tmp_path):
    folder = tmp_path / "new" / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=-1, text=True)
    worker = int(holder.stdout.readline())
    try:
        refused(BlockingIOError, rf"{folder} is in use.*process {holder.pid}\b", enter, folder)
        holder.kill()
        holder.wait()
        os.kill(worker, 0)  # still there
        enter(folder)
    finally:
        os.kill(worker, signal.SIGKILL)
        holder.stdout.close()


def test_lock_in_one_process(tmp_path):
    with locked(tmp_path):
        refused(BlockingIOError, "another --out", enter, tmp_path)
    enter(tmp_path)


def fail(error):
    with os_errors("x.safetensors"):
        raise error


def test_os_errors():
    from safetensors import SafetensorError

    text = "Error while serializing: I/O error: No space left on device (os error 28)"
    refused(OSError, r"x.safetensors can't be written.*No space left", fail, SafetensorError(text))
    refused(OSError, "No space left", fail, Exception(text))  # tokenizers' kind
    refused(PermissionError, "^no$", fail, PermissionError("no"))
    refused(SafetensorError, "a bad header", fail, SafetensorError("a bad header"))


def test_check_folder_and_file(tmp_path):
    (tmp_path / "f").write_text("x")
    check_folder(tmp_path / "a" / "b")
    check_file(tmp_path / "new")
    check_file(tmp_path / "f")
    refused(NotADirectoryError, "f is a file", check_folder, tmp_path / "f" / "b")
    refused(NotADirectoryError, "f is a file", check_folder, tmp_path / "f")
    refused(IsADirectoryError, "is a folder", check_file, tmp_path)
    refused(FileNotFoundError, "its folder is not there", check_file, tmp_path / "a" / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f"]


def test_write_text(tmp_path):
    target = tmp_path / "t"
    target.write_text("old")
    target.chmod(0o600)
    (tmp_path / "link").symlink_to(target)
    write_text(tmp_path / "link", "é")
    assert target.read_text(encoding="utf-8") == "é" and (tmp_path / "link").is_symlink()
    assert target.stat().st_mode & 0o777 == 0o600


def test_read_json(tmp_path):
    path = tmp_path / "c.json"
    path.write_text('{"a": "é"}', encoding="utf-8")
    (tmp_path / "link").symlink_to(path)
    assert read_json(tmp_path / "link") == {"a": "é"} and regular(tmp_path / "no") is not None
    for text in (b"", b"\xff", b"[" * 10**5, b"9" * 5000):
        path.write_bytes(text)
        refused(ValueError, "c.json is no JSON", read_json, path)
    refused(OSError, "is a folder, expected a file", read_json, tmp_path)
    refused(FileNotFoundError, "no.json", read_json, tmp_path / "no.json")


pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")


@pipes
@pytest.mark.parametrize(
    "command",
    [
        "finetune classify --model {m} --train {pipe} --out {m}/o",
        "finetune classify --model {m} --train {rows} --valid {pipe} --out {m}/o",
        "quantize --model {m} --check {pipe}",
        "prepare --corpus {pipe} --out {m}/o",
        "pretrain --data {m}/data --out {m}/o",
        "predict classify --model {m} --input {rows}",
    ],
)
def test_what_is_read_twice_is_no_pipe(tmp_path, awake, capsys, command):
    """Whoever names a pipe there hears of it, and waits for nobody."""
    folder = tiny.checkpoint(tmp_path / "m")
    rows, pipe = tiny.write(tmp_path / "rows.jsonl", tiny.rows(60)), tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    (folder / "data").mkdir()
    os.mkfifo(folder / "data" / "index.json")
    if command.startswith("predict"):
        (folder / "config.json").unlink()
        os.mkfifo(folder / "config.json")
    assert main(command.format(m=folder, pipe=pipe, rows=rows).split()) == 1
    assert "is a pipe or a device, expected a file" in capsys.readouterr().err.splitlines()[-1]


@pipes
def test_write_text_into_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    found = []
    reader = threading.Thread(target=lambda: found.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_text(tmp_path / "pipe", "text")
    reader.join(10)
    assert found == ["text"] and not (tmp_path / "pipe").is_file()


@pytest.mark.seconds
def test_text_into_what_can_not_be_replaced(tmp_path):
    """A pipe, by a path whose real name is none, takes the text as it comes."""
    code = "from bertfast.files import write_text; write_text('/dev/stdout', 'text')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "text"), done.stderr
