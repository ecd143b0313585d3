import errno
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from kvinv_pl.data.runs.edits import Edits
from kvinv_pl.data.runs.files import FORMAT, DamagedError, read_tensors, write_tensors
from kvinv_pl.data.runs.layout import DTYPES, serialize
from kvinv_pl.data.runs.lock import InUseError
from kvinv_pl.data.runs.run_store import RunStore
from kvinv_pl.errors import UserError

SITE = "up_blocks.1.attentions.0.transformer_blocks.0.attn1"
Z = torch.arange(12.0).reshape(3, 2, 2) / 7


def psi() -> dict[str, Tensor]:
    return {f"{SITE}.k_hat": torch.randn(1, 4, 6), f"{SITE}.lambda_k": torch.ones(1, 1, 1)}


def child(program: str, folder: Path) -> subprocess.Popen[str]:
    """A second process with a RunStore on the folder."""
    start = "import os, sys, time, torch\nfrom kvinv_pl import RunStore\nstore = RunStore(sys.argv[1])\n"
    command = [sys.executable, "-c", start + program, str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def files(folder: Path) -> set[str]:
    return {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and f.name != ".lock"}


def test_a_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "runs" / "cat")
    run = {"prompt": "eine Katze läuft \udcff", "sites": [{"path": SITE, "grid": (4, 6)}], "guidance": 7.5}
    assert not store.has_run()
    store.write_run(run)
    assert store.has_run()
    assert store.read_run() == json.loads(json.dumps(run))
    assert json.loads((store.folder / "run.json").read_bytes())["format"] == FORMAT


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run\.json"):
        RunStore(tmp_path).read_run()
    with pytest.raises(UserError, match="kvinv invert"):
        RunStore(tmp_path).trajectory()
    with pytest.raises(UserError, match="kvinv fit"):
        RunStore(tmp_path).step(3)
    assert RunStore(tmp_path).done() == set()
    assert not RunStore(tmp_path).has_trajectory()


@pytest.mark.parametrize("content", ["", '{"format": 1, "prom', "\x00\xff", "[1]", "{}", '{"format": 2}'])
def test_a_damaged_run_or_one_of_another_format_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"run\.json (is damaged|has format)"):
        RunStore(tmp_path).read_run()


def test_the_first_field_that_differs_is_named_with_both_values(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    sites = [{"path": "a", "grid": (4, 6)}, {"path": "b", "grid": (8, 12)}]
    store.write_run({"model": {"id": "x", "hash": "1" * 500}, "sites": sites, "seed": 0})
    store.require({"sites": sites, "seed": 1}, ["sites"])
    with pytest.raises(
        UserError, match=r"seed = 0, not 1: use the same settings or another folder, or .* --overwrite"
    ):
        store.require({"seed": 1}, ["seed"])
    with pytest.raises(UserError, match=r"sites\.1\.grid\.0 = 8, not 4"):
        store.require({"sites": [sites[0], {"path": "b", "grid": (4, 12)}]}, ["sites"])
    with pytest.raises(UserError, match=r"with hash = '1+\.\.\., not '2'"):
        store.require({"model": {"id": "x", "hash": "2"}}, ["model"])
    with pytest.raises(UserError, match=r"scheduler = nothing, not 'ddim'"):
        store.require({"scheduler": "ddim"}, ["scheduler"])


def test_a_trajectory_is_read_as_it_was_written_in_fp32(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    z = torch.randn(6, 3, 2, 4, dtype=torch.float64)
    store.save_trajectory(z)
    assert store.has_trajectory()
    assert store.trajectory().dtype == torch.float32
    assert torch.equal(store.trajectory(), z.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.bool])
def test_a_step_is_read_as_it_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    store = RunStore(tmp_path)
    fused = torch.randn(2, 4, 6)
    parameters = {  # views of one memory, strides, no dimension, no element
        f"{SITE}.k_hat": fused[0].to(dtype),
        f"{SITE}.v_hat": fused.transpose(1, 2).to(dtype).requires_grad_(dtype.is_floating_point),
        f"{SITE}.scale.k": torch.tensor(3).to(dtype),
        f"{SITE}.none": torch.empty(0, 3).to(dtype),
    }
    kv = {SITE: (fused[0], fused[1]), "mid.attn1": (fused[:1].expand(2, 4, 6), fused)}
    info = {"loss": [0.1, 0.01], "converged": True, "note": "läuft"}
    store.save_step(7, parameters, Z, kv, info)
    step = store.step(7)
    assert step.psi.keys() == parameters.keys()
    for name, tensor in parameters.items():
        assert step.psi[name].dtype == dtype and torch.equal(step.psi[name], tensor)
    assert torch.equal(step.z, Z)
    assert step.kv is not None and step.kv.keys() == kv.keys()
    assert all(torch.equal(a, b) for path in kv for a, b in zip(step.kv[path], kv[path], strict=True))
    assert step.info == store.step_info(7) == info
    assert store.done() == {7}


def test_a_step_without_keys_values_or_parameters_is_a_step(tmp_path: Path) -> None:
    RunStore(tmp_path).save_step(0, {}, Z, None, {})
    step = RunStore(tmp_path).step(0)
    assert step.psi == {} and step.kv is None and step.info == {}


def test_any_altered_byte_is_noticed(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.save_step(0, psi(), Z, None, {"steps": 10})
    file = tmp_path / "steps" / "0.safetensors"
    whole = file.read_bytes()
    for position, bit in itertools.product(range(0, len(whole), 3), (1, 128)):
        altered = bytearray(whole)
        altered[position] ^= bit
        file.write_bytes(altered)
        with pytest.raises(
            UserError, match=r"0\.safetensors (is damaged .*delete it and run `kvinv fit`|has format)"
        ):
            store.step(0)
    file.write_bytes(whole)
    store.step(0)


def test_a_cut_file_is_noticed_and_counts_as_not_done(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.save_trajectory(Z[None])
    for i in range(2):
        store.save_step(i, psi(), Z, None, {})
    for file in (tmp_path / "steps" / "0.safetensors", tmp_path / "trajectory.safetensors"):
        whole = file.read_bytes()
        for length in (0, 7, 8, 100, len(whole) - 1):
            file.write_bytes(whole[:length])
            assert store.done() == ({1} if file.parent.name == "steps" else {0, 1})
            with pytest.raises(DamagedError, match=file.name):
                store.step(0) if file.parent.name == "steps" else store.trajectory()
            assert store.has_trajectory() == (file.parent.name == "steps")
        file.write_bytes(whole)


def test_a_file_under_another_name_is_refused(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.save_step(3, psi(), Z, None, {})
    os.replace(tmp_path / "steps" / "3.safetensors", tmp_path / "steps" / "4.safetensors")
    (tmp_path / "steps" / "05.safetensors").touch()
    assert store.done() == set()
    with pytest.raises(DamagedError, match="contains step 3, expected step 4"):
        store.step_info(4)


def test_psi_tuned_at_the_pivot_comes_back_until_the_picture_is_tuned(tmp_path: Path) -> None:
    store, later, kept = RunStore(tmp_path), RunStore(tmp_path).at_attempt(1), psi()
    assert not store.has_begun()
    for dtype in ("float32", "int8"):
        for place in (store, later):
            place.save_pivot(2, kept, {"inner_steps": 3}, dtype)
        assert store.done_at_pivots() == {2} == later.done_at_pivots() and store.has_begun()
        there, info = store.pivot(2)
        assert info == {"inner_steps": 3} and there.keys() == kept.keys()
        torch.testing.assert_close(there, kept, rtol=0, atol=0 if dtype == "float32" else 0.05)
    assert store.done() == set()
    store.write_run({"tuning": {}})
    store.settle()
    assert store.done_at_pivots() == {2}
    store.write_run({"reconstruction": {"kept": 0, "attempts": [{}]}})
    store.settle()
    assert store.done_at_pivots() == set() and later.done_at_pivots() == {2}
    store.write_run({"reconstruction": {"kept": 0, "attempts": [{}, {}]}})  # the later one was not better
    store.settle()
    assert later.done_at_pivots() == set()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_is_reported_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    store = RunStore(tmp_path)
    store.save_step(0, psi(), Z, None, {"try": 1})

    def full(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=rf"cannot write .*0\.safetensors: {os.strerror(code)}"):
        store.save_step(0, psi(), Z, None, {"try": 2})
    assert store.step(0).info == {"try": 1}
    assert files(tmp_path) == {"steps/0.safetensors"}


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_write_that_the_system_cuts_short_is_reported_and_leaves_nothing(tmp_path: Path) -> None:
    program = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    store.save_step(0, {"k": torch.zeros(4096)}, torch.zeros(1, 1, 1), None, {})
except ValueError as error:
    print(type(error).__name__, error)
"""
    out, err = child(program, tmp_path).communicate(timeout=120)
    assert out.startswith("NoRoomError cannot write") and "File too large" in out, err
    assert files(tmp_path) == set()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = RunStore(tmp_path / "file" / "run")
    with pytest.raises(UserError, match=r"cannot write .*file/run"):
        store.write_run({})
    with pytest.raises(UserError, match=r"cannot write .*file/run"), store.lock():
        pass
    with pytest.raises(UserError, match="cannot write"), RunStore(tmp_path / "file").lock():
        pass


def test_a_run_cannot_be_held_twice_and_is_free_afterwards(tmp_path: Path) -> None:
    refused = pytest.raises(InUseError, match=f"in use by process {os.getpid()}")
    with RunStore(tmp_path).lock(), refused, RunStore(tmp_path).lock():
        pass
    with pytest.raises(KeyError), RunStore(tmp_path).lock():
        raise KeyError
    with RunStore(tmp_path).lock():
        pass
    assert files(tmp_path) == set()


def test_a_second_process_is_refused_and_a_killed_one_leaves_a_free_and_clean_run(tmp_path: Path) -> None:
    program = """
def hang(_):
    print("in the middle of a write", flush=True)
    time.sleep(300)
with store.lock():
    store.save_step(0, {"k": torch.zeros(3)}, torch.zeros(1, 1, 1), None, {"try": 1})
    os.fsync = hang
    store.save_step(0, {"k": torch.zeros(3)}, torch.zeros(1, 1, 1), None, {"try": 2})
"""
    store = RunStore(tmp_path)
    with child(program, tmp_path) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            assert process.stdout.readline() == "in the middle of a write\n", process.stderr.read()
            with pytest.raises(InUseError, match=f"in use by process {process.pid}"), store.lock():
                pass
            assert len(files(tmp_path)) == 3  # the step, the one being written, the owner
        finally:
            process.send_signal(signal.SIGKILL if sys.platform != "win32" else signal.SIGTERM)
    with store.lock():
        assert files(tmp_path) == {"steps/0.safetensors", ".lock.pid"}
        assert store.step(0).info == {"try": 1}


def test_pictures_lie_beside_the_run(tmp_path: Path) -> None:
    picture = Image.new("RGB", (9, 5), "teal")
    path = RunStore(tmp_path).save_picture("source", picture)
    assert path == tmp_path / "source.png"
    with Image.open(path) as back:
        assert back.tobytes() == picture.tobytes()


def test_edits_with_other_settings_do_not_replace_each_other(tmp_path: Path) -> None:
    edits = Edits(tmp_path)
    picture = Image.new("RGB", (4, 4))
    asked = {"target": "A cat, running!", "start": 0.1, "grid": (1, 2)}
    first = edits.save("A cat, running!", picture, asked | {"figures": {"psnr": 20.0}})
    again = edits.save("A cat, running!", picture, asked | {"figures": {"psnr": 21.0}})
    other = edits.save("A cat, running!", picture, asked | {"start": 0.4})
    assert first == again == tmp_path / "edits" / "a-cat-running.png"
    assert other == tmp_path / "edits" / "a-cat-running-2.png"
    first.with_suffix(".json").write_text("{")  # damaged: never taken for the same
    assert edits.save("A cat, running!", picture, asked).name == "a-cat-running-3.png"
    assert {f.name for f in first.parent.iterdir()} == {
        f"a-cat-running{n}.{kind}" for n in ("", "-2", "-3") for kind in ("png", "json")
    }


def test_an_edit_is_found_by_its_settings_as_long_as_its_picture_is_whole(tmp_path: Path) -> None:
    edits, picture = Edits(tmp_path), Image.effect_noise((32, 32), 50)
    asked = {"target": "a cat", "grid": (1, 2)}
    assert edits.find("a cat", asked) is None
    edits.save("a cat", picture, asked | {"start": 0.4})
    path = edits.save("a cat", picture, asked | {"figures": {"seconds": 1.0}})
    assert edits.find("a cat", asked) == path == tmp_path / "edits" / "a-cat-2.png"
    assert edits.find("a cat", asked | {"start": 0.5}) is None
    path.write_bytes(path.read_bytes()[:-200])
    assert edits.find("a cat", asked) is None
    path.unlink()
    assert edits.find("a cat", asked) is None


@pytest.mark.parametrize(
    "prompt", ["../../etc/passwd", "狗在跑" * 100, "", "...", "a/b\\c\0d\n\udcff", "Ünï cödé"]
)
def test_any_prompt_makes_a_file_name(tmp_path: Path, prompt: str) -> None:
    path = Edits(tmp_path).save(prompt, Image.new("RGB", (2, 2)), {"target": prompt})
    assert path.parent == tmp_path / "edits" and path.is_file()
    assert json.loads(path.with_suffix(".json").read_bytes())["target"] == prompt


@pytest.mark.parametrize(
    "head",
    [
        b"[" * 1000,
        b"[]",
        b"{",
        b'{"z": 1}',
        b'{"z": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}',
        b'{"z": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"z": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"__metadata__": {"format": 1}}',
        b'{"__metadata__": {"format": "1", "kind": "step 0", "info": "[]"}}',
        b'{"__metadata__": {"format": "1", "kind": "step 0", "info": "{}"}}',
    ],
)
def test_a_file_of_a_strange_header_is_refused(head: bytes, tmp_path: Path) -> None:
    file = tmp_path / "steps" / "0.safetensors"
    file.parent.mkdir()
    file.write_bytes(len(head).to_bytes(8, "little") + head)
    with pytest.raises(UserError, match=r"0\.safetensors (is damaged|has format)"):
        RunStore(tmp_path).step(0)


def test_what_is_written_is_read_whatever_its_type(tmp_path: Path) -> None:
    for name, dtype in DTYPES.items():
        for shape in ((2, 3), (0,), ()):
            given = torch.ones(shape).to(dtype)
            write_tensors(tmp_path / "0.safetensors", "step 0", {"x": given}, {"type": name})
            found = read_tensors(tmp_path / "0.safetensors", "step 0")
            assert found.info == {"type": name} and found.tensors().keys() == {"x"}
            assert found.tensors()["x"].dtype == dtype and found.tensors()["x"].shape == given.shape
            assert torch.equal(found.tensors()["x"].to(torch.complex64), given.to(torch.complex64))


def test_a_step_is_serialised_once_into_what_safetensors_itself_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, kept, calls = psi(), {SITE: (torch.randn(2, 6, 8), torch.randn(2, 6, 8))}, list[int]()
    monkeypatch.setattr(
        "kvinv_pl.data.runs.files.serialize", lambda *args: calls.append(1) or serialize(*args)
    )
    store = RunStore(tmp_path)
    store.save_step(0, given, Z, kept, {"told": 'ünï "quoted" \\ \n'}, "int8")
    assert len(calls) == 1
    file = tmp_path / "steps" / "0.safetensors"
    theirs, mine = load_file(file), read_tensors(file, "step 0").tensors()
    assert theirs.keys() == mine.keys() and all(torch.equal(theirs[name], mine[name]) for name in mine)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    theirs_again = save(theirs, metadata)
    assert file.read_bytes()[-1000:] == theirs_again[-1000:], "not as safetensors would lay it out"
    assert len(file.read_bytes()) == len(theirs_again)
    assert store.step(0).info == {"told": 'ünï "quoted" \\ \n'}


def test_the_latents_sides_are_known_without_reading_the_trajectory(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.save_trajectory(torch.zeros(3, 4, 2, 5))
    assert store.latent_grid() == (2, 5)
    file = tmp_path / "trajectory.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DamagedError):
        store.latent_grid()
