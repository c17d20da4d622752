"""The trainer: what a run leaves behind, that it learns, and that it can be stopped anywhere and goes on exactly."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from training import make_store, without_speeds

from cxrfast.bench import make_noise_store
from cxrfast.checkpoint import LATEST, PREVIOUS, load_checkpoint
from cxrfast.cli.train import main
from cxrfast.devices import (
    Precision,
    ReplayedStep,
    bf16_gain,
    capture_cuda_graph,
    choose_device,
    keep_freed_memory,
)
from cxrfast.errors import InputError
from cxrfast.models import ChestNet, load_weights
from cxrfast.nih import CLASSES
from cxrfast.parallel import World
from cxrfast.store import open_store
from cxrfast.train import (
    BEST,
    LAST,
    Adam,
    Diverged,
    TrainConfig,
    Trainer,
    _stop_signals,
    read_metrics,
    seconds_of,
    train,
)

EPOCHS, BATCH, STEPS = 2, 16, 6  # STEPS: of one epoch, over the 89 training films of the store below
QUICK = {"epochs": EPOCHS, "batch_size": BATCH, "head": "gap"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """98 films of 16 pixels; some labels, ages, sexes and views unknown."""
    return make_store(tmp_path_factory.mktemp("train") / "store", count=98, unknown=True)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(store, run, **options) -> TrainConfig:
    return TrainConfig(store.path, run, **{**QUICK, **options})


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory):
    """A run that nothing happened to."""
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train(config(store, run), quiet)
    return run


def assert_same_end(run: Path, expected: Path) -> None:
    """Weights bit for bit, and everything in metrics.jsonl but the speeds."""
    for name in (BEST, LAST):
        found, wanted = load_file(run / name), load_file(expected / name)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert without_speeds(read_metrics(run)) == without_speeds(read_metrics(expected))


def assert_states_equal(run: Path, expected: Path) -> None:
    found, wanted = load_checkpoint(run / "checkpoint"), load_checkpoint(expected / "checkpoint")
    assert found.state == wanted.state
    assert found.tensors.keys() == wanted.tensors.keys()
    assert all(torch.equal(found.tensors[name], wanted.tensors[name]) for name in wanted.tensors)


class TestRun:
    def test_folder(self, undisturbed, store):
        assert sorted(os.listdir(undisturbed)) == [
            "checkpoint", "config.json", LAST, "metrics.jsonl", BEST,
        ]  # fmt: skip
        assert sorted(os.listdir(undisturbed / "checkpoint")) == [LATEST, PREVIOUS]
        content = json.loads((undisturbed / "config.json").read_text())
        assert content["options"]["head"] == "gap"
        assert content["store"] == {"digest": store.digest, "pixel_rule": store.pixel_rule, "size": 16}
        assert content["classes"] == list(CLASSES)
        assert content["split"]["train"] + content["split"]["test"] == len(store)
        assert content["precision"] == "fp32"
        train_pixels = store.images[np.flatnonzero(~np.isin(np.arange(98), rows_of_the_test_split(store)))]
        assert content["normalisation"]["mean"] == pytest.approx(train_pixels.mean(), rel=1e-12)

    def test_metrics(self, undisturbed):
        lines = read_metrics(undisturbed)
        assert [line["epoch"] for line in lines] == [1, 2]
        for line in lines:
            assert set(line["test_auc"]) == set(CLASSES)
            known = [value for value in line["test_auc"].values() if value is not None]
            assert line["test_macro_auc"] == pytest.approx(np.mean(known))
            assert line["test_classes"] == len(known)
            assert all(
                line["test_auc_low"][name] <= line["test_auc"][name] <= line["test_auc_high"][name]
                for name in CLASSES
                if line["test_auc"][name] is not None
            )
            assert line["images_per_second"] > 0 and 0 < line["input_share"] < 1 and line["flops_share"] > 0
        assert sum(line["best"] for line in lines) >= 1

    def test_scores_are_those_of_the_saved_weights(self, undisturbed, store):
        """The epoch's test AUC is recomputed from last.safetensors, with scikit-learn."""
        from sklearn.metrics import roc_auc_score

        from cxrfast.data import normalise, pixel_statistics

        test = rows_of_the_test_split(store)
        net = ChestNet(16, head="gap").eval()
        load_weights(net, load_file(undisturbed / LAST), LAST)
        statistics = pixel_statistics(store, np.setdiff1d(np.arange(98), test))
        with torch.no_grad():
            scores = net(normalise(torch.from_numpy(store.images[test]), statistics)).numpy()
        for c, name in enumerate(CLASSES):
            known = np.isfinite(store.targets[test, c])
            found = read_metrics(undisturbed)[-1]["test_auc"][name]
            if len(np.unique(store.targets[test, c][known])) < 2:
                assert found is None
            else:
                rounded = scores[known, c].astype(np.float16)  # as the counts have them
                assert found == pytest.approx(roc_auc_score(store.targets[test, c][known], rounded), abs=1e-9)

    def test_learns(self, store, tmp_path):
        train(config(store, tmp_path / "run", epochs=12, model="multimodal", lr=0.003), quiet)
        first, *_, last = read_metrics(tmp_path / "run")
        assert last["train_macro_auc"] > first["train_macro_auc"] + 0.15
        assert last["train_loss"] < 0.8 * first["train_loss"]

    def test_same_seed_same_run_other_seed_other_run(self, store, undisturbed, tmp_path):
        train(config(store, tmp_path / "same"), quiet)
        assert_same_end(tmp_path / "same", undisturbed)
        train(config(store, tmp_path / "other", seed=1, epochs=1), quiet)
        assert read_metrics(tmp_path / "other")[0]["train_loss"] != read_metrics(undisturbed)[0]["train_loss"]

    @pytest.mark.parametrize("options", [{"data": "device"}, {"prefetch": 0}, {"deterministic": True}])
    def test_options_that_change_no_bit(self, store, undisturbed, tmp_path, options):
        train(config(store, tmp_path / "run", **options), quiet)
        assert_same_end(tmp_path / "run", undisturbed)

    def test_amp_on_any_cpu(self, store, tmp_path):
        said: list[str] = []
        train(config(store, tmp_path / "run", amp=True, epochs=1), said.append)
        line = next(line for line in said if line.startswith("arithmetic"))
        precision = json.loads((tmp_path / "run" / "config.json").read_text())["precision"]
        assert precision in line and " x the speed of fp32" in line

    def test_bf16_is_trained_where_the_cpu_has_it(self, store, tmp_path, undisturbed):
        if bf16_gain() < 1:
            pytest.skip("this CPU emulates bf16, far too slowly to train with")
        train(config(store, tmp_path / "run", amp=True, amp_dtype="bf16", epochs=1), quiet)
        found, wanted = read_metrics(tmp_path / "run")[0], read_metrics(undisturbed)[0]
        assert found["train_loss"] != wanted["train_loss"]
        assert found["train_loss"] == pytest.approx(wanted["train_loss"], rel=0.05)


def fail(*_: object) -> None:
    raise RuntimeError("no graphs")


def tensors_of(trainer: Trainer) -> list[torch.Tensor]:
    """All that a step writes to."""
    side = trainer.train_side
    tensors = [*trainer.net.parameters(), *trainer.net.buffers(), side.counts.counts, side.loss_sum, side.known]
    tensors += [value for state in trainer.optimizer.state.values() for value in state.values()]
    scaling = [trainer.scaler._scale, trainer.scaler._growth_tracker] if trainer.scaler.is_enabled() else []
    return [tensor.detach() for tensor in [*tensors, *scaling, trainer._step_number, trainer._first_bad_step]]


class NoQuestions(TorchDispatchMode):
    """Fails where the host asks the device for a value, or for a shape that depends on values."""

    aten = torch.ops.aten
    ASKING = (aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten.bincount, aten._unique2)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in self.ASKING, func
        return func(*args, **(kwargs or {}))


def silent(step):
    """A stand-in for a graph that asks nothing."""

    def replay():
        with NoQuestions():
            step()

    return replay


class TestReplay:
    """All of --cuda-graphs but the graph: the step works on tensors of fixed place alone, which a stand-in shows."""

    def run(self, options: TrainConfig, capture=lambda step: step) -> None:
        trainer = Trainer(options, World(), torch.device("cpu"), quiet)
        trainer.replay_steps(capture)
        trainer.run()

    @pytest.mark.parametrize("options", [{}, {"data": "device"}])
    def test_same_bits_as_steps_that_are_not(self, store, undisturbed, tmp_path, options):
        captured, replays = [], [0]

        def capture(step):
            captured.append(step)

            def replay():
                replays[0] += 1
                step()

            return replay

        self.run(config(store, tmp_path / "run", **options), capture)
        assert_same_end(tmp_path / "run", undisturbed)
        assert_states_equal(tmp_path / "run", undisturbed)
        full = STEPS - 1  # of an epoch's steps, the last one is shorter
        assert len(captured) == 1 and replays[0] == EPOCHS * full - ReplayedStep.WARM_UP

    def test_a_replay_asks_nothing_and_reads_and_writes_the_same_places(self, store, tmp_path):
        """What a graph demands of every step: the addresses that it saw when it was captured, and no host."""
        places = []

        def capture(step):
            def replay():
                silent(step)()
                tensors = [*trainer._replayed._inputs, *trainer._noise, trainer._step_number, trainer._first_bad_step]
                tensors += [*trainer.net.parameters(), *trainer.net.buffers(), trainer.train_side.counts.counts]
                tensors += [trainer.train_side.loss_sum, trainer.train_side.known]
                tensors += [value for state in trainer.optimizer.state.values() for value in state.values()]
                places.append([None if tensor is None else tensor.data_ptr() for tensor in tensors])

            return replay

        trainer = Trainer(config(store, tmp_path / "run"), World(), torch.device("cpu"), quiet)
        trainer.replay_steps(capture)
        trainer.run()
        assert len(places) > 2 and all(seen == places[0] for seen in places)

    def test_resume(self, store, undisturbed, tmp_path, monkeypatch):
        stop_after(monkeypatch, STEPS + 2, signal.SIGTERM)
        options = config(store, tmp_path / "run")
        with _stop_signals() as signals:
            trainer = Trainer(options, World(), torch.device("cpu"), quiet, signals)
            trainer.replay_steps(lambda step: step)
            assert trainer.run()["state"] == "stopped"
        monkeypatch.undo()
        self.run(replace(options, resume=True))
        assert_same_end(tmp_path / "run", undisturbed)

    def test_a_bad_step_is_named(self, store, tmp_path):
        with pytest.raises(Diverged, match=r"epoch 1, step [2-6]; the state before it is in"):
            self.run(config(store, tmp_path / "run", lr=1e30))

    def test_loss_scaling(self, store, tmp_path, monkeypatch):
        """fp16 as on a GPU without bf16: scale, growth and skipped steps are the same."""
        monkeypatch.setattr(Trainer, "_precision", lambda self: Precision("fp16", "arithmetic: fp16"))
        monkeypatch.setattr("cxrfast.train.matmul_rate", lambda *_: 1e9)  # minutes in fp16 on a CPU
        kept = {}
        for name in ("plain", "replayed"):
            trainer = Trainer(config(store, tmp_path / name, epochs=1), World(), torch.device("cpu"), quiet)
            if name == "replayed":
                trainer.replay_steps(silent)
            trainer.scaler = torch.amp.GradScaler(
                "cpu", init_scale=2.0**30, growth_interval=2
            )  # the first ones overflow
            trainer.run()
            kept[name] = trainer.scaler.state_dict()
        assert kept["plain"] == kept["replayed"] and kept["plain"]["scale"] < 2.0**30
        assert_same_end(tmp_path / "replayed", tmp_path / "plain")

    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    @pytest.mark.parametrize("moment", ["before the step", "in the middle of it"])
    def test_capturing_fails(self, store, tmp_path, monkeypatch, precision, moment):
        """The host has gone through a part of the step and the device through none; the run goes on, bit for bit."""
        monkeypatch.setattr(Trainer, "_precision", lambda self: Precision(precision, "arithmetic"))
        monkeypatch.setattr("cxrfast.train.matmul_rate", lambda *_: 1e9)  # minutes in fp16 on a CPU
        ends, said = [], []
        for name in ("plain", "failing"):
            options = config(store, tmp_path / name, epochs=1)
            trainer = Trainer(options, World(), torch.device("cpu"), said.append if name == "failing" else quiet)

            def capture(step, trainer=trainer):
                if moment == "before the step":
                    raise RuntimeError("\nno graphs\nhere")
                tensors = tensors_of(trainer)
                kept = [tensor.clone() for tensor in tensors]
                with monkeypatch.context() as patch:
                    patch.setattr(trainer.scaler, "update", fail)  # between the optimiser's step and the epoch's sums
                    try:
                        step()
                    finally:
                        for tensor, value in zip(tensors, kept, strict=True):
                            tensor.copy_(value)

            if name == "failing":
                trainer.replay_steps(capture)
            trainer.run()
            ends.append(trainer.scaler.state_dict())
        assert ends[0] == ends[1]
        assert_same_end(tmp_path / "failing", tmp_path / "plain")
        assert_states_equal(tmp_path / "failing", tmp_path / "plain")
        assert said.count("network: steps are not replayed, because capturing one fails here (no graphs)") == 1
        assert trainer.network_line().endswith("; no CUDA graph (capturing one failed)")

    def test_a_capture_that_is_cut_short(self, monkeypatch):
        """torch, with CUDA played: the end of such a capture fails as well, and leaves the stream as it is."""
        current, ended = ["main"], []

        @contextlib.contextmanager
        def graph(_, pool, stream, capture_error_mode):
            current[0] = stream
            try:
                yield
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")

        class Stream(str):
            device_index = 0

        monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream(current[0]))
        monkeypatch.setattr(torch.cuda, "Stream", lambda: "beside")
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: current.__setitem__(0, stream))
        monkeypatch.setattr(torch.cuda, "graph", graph)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *about: ended.append(about), raising=False)
        with pytest.raises(RuntimeError) as caught:
            capture_cuda_graph(fail)
        assert str(caught.value.__context__) == "no graphs"
        assert current == ["main"] and ended == [(0, (0, 7))]

    def test_capturing_fails_where_it_was_asked_for(self, store, tmp_path):
        trainer = Trainer(config(store, tmp_path / "run"), World(), torch.device("cpu"), quiet)
        trainer.config = replace(trainer.config, cuda_graphs="yes")
        trainer.replay_steps(fail)
        with pytest.raises(InputError, match=r"--cuda-graphs yes: .* \(no graphs\); use --cuda-graphs no"):
            trainer.run()

    @pytest.mark.parametrize("order", [(False, True), (True, False)])
    def test_a_run_changes_sides(self, store, undisturbed, tmp_path, monkeypatch, order):
        """Begun with steps that are replayed and resumed with such that are not, and the other way round."""
        stop_after(monkeypatch, STEPS + 2, signal.SIGTERM)
        for replays, state in zip(order, ("stopped", "complete"), strict=True):
            options = config(store, tmp_path / "run", resume=state == "complete")
            with _stop_signals() as signals:
                trainer = Trainer(options, World(), torch.device("cpu"), quiet, signals)
                if replays:
                    trainer.optimizer = Adam(trainer.net.parameters(), options.lr, fused=True, capturable=True)
                    trainer.replay_steps(silent)
                assert trainer.run()["state"] == state
            for parameter, kept in trainer.optimizer.state.items():
                assert all(value.device == parameter.device for value in kept.values())
            monkeypatch.undo()
        assert_same_end(tmp_path / "run", undisturbed)
        assert_states_equal(tmp_path / "run", undisturbed)

    @pytest.mark.parametrize("asked", ["auto", "no"])
    def test_is_off_on_a_cpu(self, store, tmp_path, asked):
        trainer = Trainer(config(store, tmp_path / "run", cuda_graphs=asked), World(), torch.device("cpu"), quiet)
        assert trainer._replayed is None and "graph" not in trainer.network_line()
        assert not trainer.optimizer.defaults["capturable"]

    def test_is_refused_where_it_cannot_be_right(self, store, tmp_path):
        with pytest.raises(InputError, match="--cuda-graphs is for one GPU, and this run is on a CPU"):
            train(config(store, tmp_path / "run", device="cpu", cuda_graphs="yes"), quiet)
        with pytest.raises(InputError, match="--cuda-graphs must be one of auto, yes, no, not True"):
            train(config(store, tmp_path / "run", device="cpu", cuda_graphs=True), quiet)
        world = World()
        world.size = 2
        with pytest.raises(InputError, match="--cuda-graphs is for one GPU, and this run is on 2 devices"):
            Trainer(config(store, tmp_path / "run", cuda_graphs="yes"), world, torch.device("cuda"), quiet)
        with pytest.raises(InputError, match="--compile yes is for one process on a CPU"):
            Trainer(config(store, tmp_path / "run", compile="yes"), world, torch.device("cpu"), quiet)
        assert not (tmp_path / "run").exists()


@pytest.mark.gpu
class TestOnGpu:
    @pytest.mark.parametrize("amp_dtype", ["fp32", "fp16"])
    def test_cuda_graph_gives_the_bits_of_plain_steps(self, store, tmp_path, amp_dtype):
        amp = {"amp": True, "amp_dtype": amp_dtype} if amp_dtype != "fp32" else {}
        for name, graphs in (("plain", "no"), ("graph", "yes")):
            options = {"device": "cuda", "compile": "no", "deterministic": True, "cuda_graphs": graphs, **amp}
            train(config(store, tmp_path / name, **options), quiet)
        assert_same_end(tmp_path / "graph", tmp_path / "plain")

    @pytest.mark.parametrize("data", ["pinned", "mmap"])
    def test_capturing_while_films_are_read_ahead(self, store, tmp_path, data):
        for name, graphs in (("plain", "no"), ("graph", "yes")):
            options = {"device": "cuda", "compile": "no", "deterministic": True, "cuda_graphs": graphs, "data": data}
            train(config(store, tmp_path / name, **options), quiet)
        assert_same_end(tmp_path / "graph", tmp_path / "plain")

    def test_graph_is_the_default_and_said(self, store, tmp_path):
        said: list[str] = []
        train(config(store, tmp_path / "run", device="cuda", compile="no", epochs=1), said.append)
        (line,) = (line for line in said if line.startswith("network: "))
        assert line.endswith("; steps are replayed as a CUDA graph (the default on one GPU)")
        train(config(store, tmp_path / "none", device="cuda", compile="no", cuda_graphs="no", epochs=1), said.append)
        assert any(line.startswith("network: ") and line.endswith("; no CUDA graph (as asked)") for line in said)

    @pytest.mark.parametrize("data", ["device", "pinned"])
    @pytest.mark.parametrize("amp_dtype", ["fp32", "fp16"])
    def test_capturing_fails(self, store, tmp_path, children, amp_dtype, data):
        """A question to the device in the middle of the captured step, in a process of its own."""
        amp = {"amp": True, "amp_dtype": amp_dtype} if amp_dtype != "fp32" else {}
        options = {"device": "cuda", "compile": "no", "deterministic": True, "data": data, "epochs": 4, **amp}
        train(config(store, tmp_path / "plain", cuda_graphs="no", **options), quiet)
        child = children.Process(
            target=_train_and_ask, args=(config(store, tmp_path / "run", **options), tmp_path / "seen.json")
        )
        child.start()
        child.join(300)
        assert child.exitcode == 0
        assert_same_end(tmp_path / "run", tmp_path / "plain")
        lines, memory = json.loads((tmp_path / "seen.json").read_text())
        assert sum("steps are not replayed, because capturing one fails here" in line for line in lines) == 1
        assert memory[3] <= memory[1]  # after epochs 4 and 2

    @pytest.mark.parametrize("order", ["cpu cuda cpu", "cuda cpu cuda"])
    def test_a_run_goes_from_device_to_device(self, store, undisturbed, tmp_path, monkeypatch, order):
        run, saved = tmp_path / "run", None
        for number, device in enumerate(order.split()):
            if number < 2:
                stop_after(monkeypatch, 4, signal.SIGTERM)
            with _stop_signals() as signals:
                options = config(store, run, device=device, compile="no", resume=number > 0)
                trainer = Trainer(options, World(), choose_device(device), quiet, signals)
                if saved is not None:  # what is taken is what was saved, Adam's counts of steps included
                    trainer._take(saved)
                    trainer._save()
                    taken = load_checkpoint(run / "checkpoint")
                    assert taken.state == saved.state and taken.tensors.keys() == saved.tensors.keys()
                    assert all(torch.equal(taken.tensors[name], saved.tensors[name]) for name in saved.tensors)
                trainer.run()
            for parameter, kept in trainer.optimizer.state.items():
                assert all(value.device == parameter.device for value in kept.values())
            monkeypatch.undo()
            saved = load_checkpoint(run / "checkpoint")
        assert int(saved.tensors["adam.logits.weight.step"]) == EPOCHS * STEPS
        for found, wanted in zip(read_metrics(run), read_metrics(undisturbed), strict=True):
            assert found["train_loss"] == pytest.approx(wanted["train_loss"], rel=0.2)  # dropout's bytes are others

    def test_compiled_learns_as_eager(self, store, tmp_path):
        for name in ("no", "yes"):
            train(config(store, tmp_path / name, device="cuda", compile=name), quiet)
        for found, wanted in zip(read_metrics(tmp_path / "yes"), read_metrics(tmp_path / "no"), strict=True):
            assert found["train_loss"] == pytest.approx(wanted["train_loss"], rel=0.01)


@pytest.fixture(scope="class")
def compiled(store, tmp_path_factory):
    """Two runs of a network of one block, which compiles in a quarter of the time: eager and compiled."""
    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs g++")
    folder = tmp_path_factory.mktemp("compiled")
    said: list[str] = []
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cxrfast.models.WIDTHS", (16,))
        train(config(store, folder / "eager"), quiet)
        train(config(store, folder / "compiled", compile="yes"), said.append)
        assert any(line.startswith("network: torch.compile (as asked)") for line in said)
        yield folder


@pytest.mark.slow
class TestCompile:
    def test_same_curve_and_keys_as_eager(self, compiled):
        lines = (read_metrics(compiled / name) for name in ("compiled", "eager"))
        for found, wanted in zip(*lines, strict=True):
            assert found["train_loss"] == pytest.approx(wanted["train_loss"], rel=1e-3)
            assert found["test_loss"] == pytest.approx(wanted["test_loss"], rel=5e-3)
            assert found["train_macro_auc"] == pytest.approx(wanted["train_macro_auc"], abs=5e-3)
        for name in (BEST, LAST):
            load_weights(ChestNet(16, head="gap"), load_file(compiled / "compiled" / name), name)

    def test_resume(self, store, compiled, tmp_path, monkeypatch):
        stop_after(monkeypatch, STEPS + 2, signal.SIGTERM)
        assert train(config(store, tmp_path / "run", compile="yes"), quiet)["state"] == "stopped"
        monkeypatch.undo()
        train(config(store, tmp_path / "run", compile="yes", resume=True), quiet)
        assert_same_end(tmp_path / "run", compiled / "compiled")

    def test_where_it_fails(self, store, tmp_path, monkeypatch):
        def broken(model, **_):
            def call(*_):
                import torch._dynamo

                raise torch._dynamo.exc.TorchDynamoException("no compiler")

            return call

        monkeypatch.setattr(torch, "compile", broken)
        with pytest.raises(InputError, match=r"torch.compile fails here \(no compiler\); use --compile no"):
            train(config(store, tmp_path / "run", compile="yes"), quiet)

    def test_a_cpu_is_left_its_own_passes(self, store, tmp_path):
        said: list[str] = []
        train(config(store, tmp_path / "run", epochs=1), said.append)
        assert any(line.startswith("network: eager") for line in said)


def test_a_run_does_not_import_what_it_does_not_use(store, tmp_path):
    """torch's compiler is two seconds of a run's start, scikit-learn one."""
    script = (
        "import sys; from cxrfast.cli.train import main; assert main(sys.argv[1:]) == 0\n"
        "print([name for name in ('torch._dynamo', 'torch._inductor', 'sklearn', 'matplotlib') if name in sys.modules])"
    )
    arguments = [str(store.path), str(tmp_path / "run"), "--epochs", "1", "--batch-size", "64", "--head", "gap"]
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def rows_of_the_test_split(store) -> np.ndarray:
    from cxrfast.splits import make_split

    return make_split("paper", store.index).test


def stop_after(monkeypatch, steps: int, number: signal.Signals) -> None:
    """Send this process a signal after so many training steps."""
    original, done = Trainer.train_step, [0]

    def step(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        done[0] += 1
        if done[0] == steps:
            os.kill(os.getpid(), number)
        return loss

    monkeypatch.setattr(Trainer, "train_step", step)


class TestStopping:
    @pytest.mark.parametrize("steps", [1, STEPS - 1, STEPS, STEPS + 1, 2 * STEPS])
    def test_sigterm_saves_and_the_run_goes_on_exactly(self, store, undisturbed, tmp_path, monkeypatch, steps):
        run = tmp_path / "run"
        stop_after(monkeypatch, steps, signal.SIGTERM)
        said: list[str] = []
        result = train(config(store, run), said.append)
        assert result["state"] == "stopped"
        assert f"{run} --resume" in said[-1]
        assert len(read_metrics(run)) == (steps - 1) // STEPS
        monkeypatch.undo()
        assert train(config(store, run, resume=True), quiet)["state"] == "complete"
        assert_same_end(run, undisturbed)
        assert_states_equal(run, undisturbed)

    def test_handlers_are_put_back(self, store, tmp_path):
        def handlers():
            return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

        before = handlers()  # SIGINT is ignored where the tests run in the background
        train(config(store, tmp_path / "run", epochs=1), quiet)
        assert handlers() == before

    def test_ctrl_c_saves_and_says_so(self, store, undisturbed, tmp_path, monkeypatch, capsys):
        run = tmp_path / "run"
        stop_after(monkeypatch, 3, signal.SIGINT)
        arguments = [str(store.path), str(run), "--epochs", "2", "--batch-size", "16", "--head", "gap"]
        assert main(arguments) == 130
        monkeypatch.undo()
        assert main([str(store.path), str(run), "--resume"]) == 0  # the other options are the run's own
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["state"] == "complete"
        assert_same_end(run, undisturbed)

    def test_max_time(self, store, undisturbed, tmp_path, monkeypatch):
        run = tmp_path / "run"
        original = Trainer.train_step
        steps = [0]

        def slow(self, *args, **kwargs):
            steps[0] += 1
            time.sleep(0.5)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Trainer, "train_step", slow)
        result = train(config(store, run, max_time="3s"), quiet)  # 12 steps take more than 6
        assert result["state"] == "stopped" and steps[0] <= 6  # on however slow a machine
        monkeypatch.undo()
        train(config(store, run, resume=True), quiet)
        assert_same_end(run, undisturbed)

    def test_complete_and_then_more_epochs(self, store, tmp_path, undisturbed):
        run = tmp_path / "run"
        train(config(store, run, epochs=1), quiet)
        said: list[str] = []
        assert train(config(store, run, epochs=1, resume=True), said.append)["state"] == "complete"
        assert "is complete" in said[-1] and len(read_metrics(run)) == 1
        train(config(store, run, resume=True), quiet)
        assert_same_end(run, undisturbed)

    def test_damaged_state_falls_back_to_the_previous(self, store, tmp_path, undisturbed):
        run = tmp_path / "run"
        shutil.copytree(undisturbed, run)
        latest = run / "checkpoint" / LATEST
        latest.write_bytes(latest.read_bytes()[:-100])
        said: list[str] = []
        train(config(store, run, resume=True), said.append)
        assert any("warning" in line and LATEST in line for line in said)
        assert_same_end(run, undisturbed)

    def test_resume_of_nothing_begins(self, store, tmp_path, undisturbed):
        train(config(store, tmp_path / "run", resume=True), quiet)
        assert_same_end(tmp_path / "run", undisturbed)


def _train_in_child(options: TrainConfig) -> None:
    torch.set_num_threads(1)
    with contextlib.redirect_stderr(io.StringIO()):
        train(options, quiet)


def _train_and_ask(options: TrainConfig, out: Path) -> None:
    """Train in a child whose step asks the device for a value while it is captured."""
    seen: tuple[list[str], list[int]] = ([], [])
    update = torch.amp.GradScaler.update

    def ask_and_update(self, *args):
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        update(self, *args)

    def say(line: str) -> None:
        seen[0].append(line)
        if line.startswith("epoch"):
            torch.cuda.synchronize()
            torch.empty(1, device="cuda")  # with it the allocator takes back what two streams used
            seen[1].append(torch.cuda.memory_stats()["active_bytes.all.current"])

    torch.amp.GradScaler.update = ask_and_update
    train(options, say)
    out.write_text(json.dumps(seen))


def killed_again_and_again(store, run: Path, children, kills: int, seed: int) -> None:
    """Train, and SIGKILL the process at a random moment so many times; then let it end."""
    rng = random.Random(seed)
    options = config(store, run, checkpoint_steps=1, resume=True)
    alone = 2.0
    for kill in range(kills + 1):
        begin = time.monotonic()
        child = children.Process(target=_train_in_child, args=(options,))
        child.start()
        child.join(rng.uniform(0, alone) if kill < kills else 120)
        if child.exitcode is None and kill < kills:
            os.kill(child.pid, signal.SIGKILL)
            child.join()
        elif kill < kills:  # it was done before we struck: keep the moments inside its life, and start over
            assert child.exitcode == 0
            alone = time.monotonic() - begin
            if kill < kills - 1:
                shutil.rmtree(run)
    assert child.exitcode == 0


class TestKilled:
    def test_sigkill_five_times(self, store, undisturbed, tmp_path, children):
        killed_again_and_again(store, tmp_path / "run", children, kills=5, seed=0)
        assert_same_end(tmp_path / "run", undisturbed)

    @pytest.mark.slow
    def test_sigkill_fifty_times(self, store, undisturbed, tmp_path, children):
        for seed in range(5):
            killed_again_and_again(store, tmp_path / f"run{seed}", children, kills=10, seed=seed + 1)
            assert_same_end(tmp_path / f"run{seed}", undisturbed)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"epochs": 0}, "--epochs"),
            ({"batch_size": 0}, "--batch-size"),
            ({"lr": math.nan}, "--lr"),
            ({"checkpoint_minutes": 0.0}, "--checkpoint-minutes"),
            ({"max_time": "8 hours"}, "--max-time"),
            ({"split": "mine"}, "no split is called"),
            ({"device": "tpu"}, "no device"),
            ({"amp_dtype": "bf16"}, "needs --amp"),
            ({"amp": True, "amp_dtype": "fp16"}, "for GPUs"),
            ({"data": "pinned"}, "for GPUs"),
        ],
    )
    def test_wrong_options_leave_nothing(self, store, tmp_path, options, words):
        with pytest.raises(InputError, match=words):
            train(config(store, tmp_path / "run", device=options.pop("device", "cpu"), **options), quiet)
        assert not (tmp_path / "run").exists()

    def test_wrong_folders(self, store, tmp_path, undisturbed):
        with pytest.raises(InputError, match="not a store"):
            train(replace(config(store, tmp_path / "run"), store=tmp_path), quiet)
        with pytest.raises(InputError, match="holds a run already"):
            train(config(store, undisturbed), quiet)
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "thesis.tex").write_text("")
        with pytest.raises(InputError, match="holds other files"):
            train(config(store, tmp_path / "other", resume=True), quiet)
        with pytest.raises(InputError, match="is a file"):
            train(config(store, tmp_path / "other" / "thesis.tex"), quiet)

    @pytest.mark.parametrize("option", [{"model": "multimodal"}, {"lr": 0.1}, {"seed": 3}, {"batch_size": 8}])
    def test_resume_with_other_options(self, store, undisturbed, option):
        with pytest.raises(InputError, match=f"begun with --{next(iter(option)).replace('_', '-')}"):
            train(config(store, undisturbed, resume=True, **option), quiet)

    def test_resume_with_another_store(self, undisturbed, tmp_path):
        other = make_store(tmp_path / "store", count=100, seed=1)
        with pytest.raises(InputError, match="another store"):
            train(config(other, undisturbed, resume=True), quiet)

    def test_state_of_another_run(self, store, undisturbed, tmp_path):
        run = tmp_path / "run"
        train(config(store, run, epochs=1, seed=9), quiet)
        shutil.copy(undisturbed / "checkpoint" / LATEST, run / "checkpoint" / LATEST)
        with pytest.raises(InputError, match="another seed"):
            train(config(store, run, seed=9, resume=True), quiet)

    def test_exit_codes(self, store, tmp_path, capsys):
        assert main([str(tmp_path), str(tmp_path / "run")]) == 2
        assert "not a store" in capsys.readouterr().err
        assert main([str(store.path), str(tmp_path / "run"), "--model", "vit"]) == 2
        assert main([str(store.path), str(tmp_path / "run"), "--cuda-graphs"]) == 2  # it was a flag once
        assert main([str(store.path), "--cuda-graphs", str(tmp_path / "run")]) == 2
        assert not (tmp_path / "run").exists()

    def test_diverging_stops_and_keeps_the_state_before(self, store, tmp_path):
        run = tmp_path / "run"
        with pytest.raises(Diverged, match=r"epoch 1, step [2-6]; the state before it is in"):
            train(config(store, run, lr=1e30), quiet)
        state = load_checkpoint(run / "checkpoint")
        assert state.state["position"]["epoch"] == 1 and 1 <= state.state["position"]["step"] <= 5
        assert all(t.isfinite().all() for name, t in state.tensors.items() if name.startswith("model."))
        steps = state.state["position"]["step"]
        assert int(state.tensors["train.counts"][1].sum()) == steps * BATCH  # class 1 is known everywhere


def test_seconds():
    assert [seconds_of(text) for text in ("", "8h30m", "45m", "90s", "1h1s")] == [math.inf, 30600, 2700, 90, 3601]


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def run_command(store, run: Path, *options: str, launcher: Sequence[str] = (), **popen) -> subprocess.Popen:
    arguments = [str(store.path), str(run), "--batch-size", str(BATCH), "--head", "gap", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "cxrfast.cli.train", *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen,
    )  # fmt: skip


@pytest.fixture(scope="module")
def pair(store, tmp_path_factory):
    run = tmp_path_factory.mktemp("pair") / "run"
    process = run_command(store, run, "--epochs", "2", "--devices", "2")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["state"] == "complete"
    return run


@pytest.mark.slow
class TestTwoProcesses:
    def test_same_curve_as_one_process(self, pair, undisturbed):
        """Same order, same dropout, statistics of the global batch: only the order of sums differs."""
        for found, expected in zip(read_metrics(pair), read_metrics(undisturbed), strict=True):
            assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-3)
            assert found["test_loss"] == pytest.approx(expected["test_loss"], rel=5e-3)
            assert found["train_macro_auc"] == pytest.approx(expected["train_macro_auc"], abs=5e-3)
        assert json.loads((pair / "config.json").read_text())["processes"] == 2

    def test_every_film_is_counted_once(self, pair, store):
        """89 of the 98 films train: the last batch of 9 is uneven, and nothing is padded."""
        config = json.loads((pair / "config.json").read_text())
        state = load_checkpoint(pair / "checkpoint")
        assert int(state.tensors["train.counts"][1].sum()) == config["split"]["train"]
        assert config["split"]["train"] % BATCH % 2 == 1

    def test_one_process_goes_on_where_torchrun_started_two(self, store, undisturbed, tmp_path):
        run = tmp_path / "run"
        process = run_command(store, run, "--epochs", "1", launcher=TORCHRUN)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert json.loads(out.splitlines()[-1])["state"] == "complete"
        assert json.loads((run / "config.json").read_text())["processes"] == 2
        train(config(store, run, resume=True), quiet)
        for found, expected in zip(read_metrics(run), read_metrics(undisturbed), strict=True):
            assert found["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-3)

    def test_a_process_that_dies_ends_the_job_and_resume_goes_on(self, store, pair, tmp_path):
        run = tmp_path / "run"
        process = run_command(store, run, "--epochs", "2", "--devices", "2", "--checkpoint-steps", "1")
        deadline = time.monotonic() + 300
        while not (run / "checkpoint" / LATEST).is_file():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(ranks) == 2
        os.kill(int(ranks[1]), signal.SIGKILL)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 3
        assert "process 1 of 2 was killed by SIGKILL; go on with --resume" in err
        process = run_command(store, run, "--epochs", "2", "--devices", "2", "--resume")
        assert process.wait(300) == 0
        assert_same_end(run, pair)

    def test_sigterm_stops_both(self, store, pair, tmp_path):
        run = tmp_path / "run"
        process = run_command(store, run, "--epochs", "2", "--devices", "2", "--checkpoint-steps", "1")
        deadline = time.monotonic() + 300
        while not (run / "checkpoint" / LATEST).is_file():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert json.loads(out.splitlines()[-1])["state"] == "stopped"
        process = run_command(store, run, "--devices", "2", "--resume")
        assert process.wait(300) == 0
        assert_same_end(run, pair)

    def test_wrong_input_is_said_once(self, store, tmp_path):
        process = run_command(store, tmp_path / "run", "--devices", "2", "--split", "mine")
        _, err = process.communicate(timeout=300)
        assert process.returncode == 2
        assert err.count("no split is called") == 1


def anonymous_mib() -> float:
    """Memory of this process that no file backs."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024


def _train_and_watch(options: TrainConfig, steps: int, out: Path) -> None:
    """Train in a child; write the anonymous memory at the end of each epoch, or after each of so many steps."""
    seen: list[float] = []
    original = Trainer.train_step

    def step(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        seen.append(anonymous_mib())
        if len(seen) == steps:
            self.signals.reason = "enough"
        return loss

    if steps:
        Trainer.train_step = step  # type: ignore[method-assign]
    train(options, quiet if steps else lambda line: seen.append(anonymous_mib()) if line.startswith("epoch") else None)
    out.write_text(json.dumps(seen))


def _allocate_and_watch(out: Path) -> None:
    """MiB that stay of a freed tensor: as a library, asked to keep (and whether that was done), then of a smaller."""

    def left_over(mib: int) -> float:
        before = anonymous_mib()
        torch.ones(mib << 18)
        return anonymous_mib() - before

    left_over(64)  # threads and their stacks
    seen = [left_over(64), keep_freed_memory(torch.device("cpu")), left_over(64), left_over(32)]
    out.write_text(json.dumps(seen))


def test_other_systems_and_gpus_are_left_alone(monkeypatch):
    assert not keep_freed_memory(torch.device("cuda"))

    def unknown(name):
        raise ValueError("unrecognized configuration name")  # as on macOS

    monkeypatch.setattr(os, "confstr", unknown, raising=False)
    assert not keep_freed_memory(torch.device("cpu"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
class TestMemory:
    def watch(self, children, tmp_path, options: TrainConfig, steps: int = 0) -> list[float]:
        child = children.Process(target=_train_and_watch, args=(options, steps, tmp_path / "seen.json"))
        child.start()
        child.join(300)
        assert child.exitcode == 0
        return json.loads((tmp_path / "seen.json").read_text())

    def test_does_not_grow_from_epoch_2_to_20(self, store, children, tmp_path):
        seen = self.watch(children, tmp_path, config(store, tmp_path / "run", epochs=20))
        assert len(seen) == 20
        # What is kept may be cut so that a table of counts (14 MiB) no longer fits, two or three times in a run's life.
        assert seen[19] < seen[1] + 48

    def test_what_is_freed_is_kept_from_the_trainer_on(self, children, tmp_path):
        """A block of 64 MiB: given back before, kept afterwards, and used again."""
        child = children.Process(target=_allocate_and_watch, args=(tmp_path / "seen.json",))
        child.start()
        child.join(300)
        assert child.exitcode == 0
        before, kept, after, again = json.loads((tmp_path / "seen.json").read_text())
        assert before < 16 and again < 16
        assert (after > 48) == kept

    def test_the_whole_data_set_from_the_mapped_file(self, children, tmp_path):
        """112,120 films of 224 pixels, 5.6 GB, of which the run reads what it trains on and keeps nothing."""
        options = config(full_size_store(tmp_path / "store"), tmp_path / "run", batch_size=32, data="mmap")
        limit = 2048  # 2 GiB; what a step needs is kept, so that what is seen after it is its peak
        seen = self.watch(children, tmp_path, options, steps=3)
        assert len(seen) == 3 and max(seen) < limit
        resumed = self.watch(children, tmp_path, replace(options, resume=True), steps=2)
        assert len(resumed) == 2 and max(resumed) < limit


def full_size_store(path: Path):
    """A store as large as NIH's, all but 60 of its films a hole in the file."""
    count, size = 112_120, 224
    make_noise_store(path, 60, size)
    index = pd.read_csv(path / "index.csv", dtype=str, keep_default_na=False)
    index = pd.concat([index] * (count // 60 + 1), ignore_index=True).iloc[:count].copy()
    index["patient"] = np.arange(count) // 4 + 1
    index["file"] = [f"{row // 4 + 1:08d}_{row % 4:03d}.png" for row in range(count)]
    index.to_csv(path / "index.csv", index=False, lineterminator="\n")
    with open(path / "images.npy", "r+b") as file:
        header = file.read(128).replace(b"(60, ", f"({count}, ".encode())
        file.seek(0)
        file.write(header.rstrip().ljust(127) + b"\n")  # the new count is longer: as much of the padding goes
        file.truncate(128 + count * size * size)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["counts"]["images"] = count
    manifest["sha256"]["index.csv"] = hashlib.sha256((path / "index.csv").read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    return open_store(path)
