"""The training loop: the same seed gives the same weights, interrupted or not."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file  # noqa: E402
from torch import nn  # noqa: E402

from fewbits.core.checkpoint import read_checkpoint, write_checkpoint  # noqa: E402
from fewbits.core.devices import resolve_device, seeded  # noqa: E402
from fewbits.core.errors import FewbitsError  # noqa: E402
from fewbits.core.schedules import step_decay, warmup_cosine  # noqa: E402
from fewbits.core.training import Plan, train  # noqa: E402

ADAM = partial(torch.optim.Adam, lr=0.01)
ROWS = 50


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model() -> nn.Sequential:
    """A network with everything that makes resuming hard: statistics, and random dropout."""
    with seeded(3):
        return nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1)
        )


def make_data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 4, generator=generator)
    return x, x[:, :1] * 2 - x[:, 1:2]


def fit(model, *, on_batch=None, **options):
    x, y = make_data()
    taken = 0

    def loss(rows):
        nonlocal taken
        taken += 1
        if on_batch is not None:
            on_batch(taken)
        return (model(x[rows]) - y[rows]).square().mean()

    settings = {
        "epochs": 4,
        "batch_size": 16,
        "optimizer": ADAM,
        "scheduler": warmup_cosine(0.2),
        "seed": 5,
        "device": "cpu",
    }
    return train(model, loss, ROWS, **(settings | options))


def weights(model) -> bytes:
    return b"".join(v.numpy().tobytes() for v in model.state_dict().values())


def ctrl_c_at(step):
    return lambda taken: os.kill(os.getpid(), signal.SIGINT) if taken == step else None


# -- the loop ------------------------------------------------------------------------------


def test_learns_and_tells_what_it_did():
    model = make_model()
    calls = []
    history = fit(model, epochs=30, callback=lambda epoch, h: calls.append((epoch, len(h.loss))))
    assert history.loss[-1] < 0.5 * history.loss[0]
    assert history.steps == 30 * 3
    assert history.seconds > 0
    assert history.resumed_at == 0
    assert calls == [(epoch, epoch) for epoch in range(1, 31)]
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_same_seed_same_weights_to_the_bit():
    models = [make_model() for _ in range(3)]
    histories = [fit(m, seed=s) for m, s in zip(models, (5, 5, 6), strict=True)]
    assert weights(models[0]) == weights(models[1])
    assert histories[0].loss == histories[1].loss
    assert weights(models[0]) != weights(models[2])


def test_result_does_not_depend_on_the_callers_randomness_nor_disturb_it():
    models = [make_model(), make_model()]
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        fit(model, callback=lambda epoch, history: torch.rand(3))
        assert torch.equal(torch.get_rng_state(), before)
    assert weights(models[0]) == weights(models[1])


def test_one_step_is_the_optimizers_step():
    model, reference = nn.Linear(2, 1), nn.Linear(2, 1)
    reference.load_state_dict(model.state_dict())
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    sgd = partial(torch.optim.SGD, lr=0.1)
    train(
        model, lambda rows: model(x[rows]).sum(), 2, epochs=1, batch_size=2, optimizer=sgd,
        device="cpu",
    )  # fmt: skip
    expected = reference.weight - 0.1 * x.sum(0)
    torch.testing.assert_close(model.weight, expected)
    torch.testing.assert_close(model.bias, reference.bias - 0.2)


def test_every_row_once_in_each_epoch_in_a_new_order():
    model, seen = nn.Linear(1, 1), []

    def loss(rows):
        assert rows.dtype == torch.int64
        seen.append(rows.tolist())
        return model(torch.ones(1, 1)).sum()

    train(
        model, loss, 10, epochs=2, batch_size=4, optimizer=ADAM, drop_last=False, device="cpu"
    )  # fmt: skip
    assert [len(rows) for rows in seen] == [4, 4, 2, 4, 4, 2]
    first, second = ([row for rows in part for row in rows] for part in (seen[:3], seen[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert first != sorted(first)


@pytest.mark.parametrize(("drop_last", "steps"), [(True, 2), (False, 3)])
def test_the_last_small_batch(drop_last, steps):
    plan = Plan(10, 1, 4, drop_last, seed=0)
    assert plan.steps == steps
    assert len(plan.order(0)) == (8 if drop_last else 10)


def test_a_batch_larger_than_the_data_is_all_of_it():
    assert Plan(10, 3, 512, True, seed=0).steps == 3


def test_shares_of_the_processes_make_up_the_batch():
    plans = [Plan(11, 1, 4, False, 0, process, 2) for process in range(2)]
    assert [plan.steps for plan in plans] == [3, 3]
    order = plans[0].order(0)
    assert torch.equal(order, plans[1].order(0))
    for batch in range(3):
        shares = [plan.share(order, batch) for plan in plans]
        assert len(shares[0]) == len(shares[1])
        together = sorted(torch.cat(shares).tolist())
        assert together == sorted(order[batch * 4 : batch * 4 + 4].tolist())
    with pytest.raises(FewbitsError, match="multiple of 2"):
        Plan(11, 1, 5, False, 0, 0, 2)


def test_named_terms_are_added_and_recorded():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 3.0)
    sgd = partial(torch.optim.SGD, lr=0.1)

    def loss(rows):
        return {"line": 2 * model.weight.sum(), "square": model.weight.square().sum()}

    history = train(model, loss, 1, epochs=2, batch_size=1, optimizer=sgd, device="cpu")
    first, second = 3.0, 3.0 - 0.1 * (2 + 2 * 3.0)
    assert history.terms["line"] == pytest.approx([2 * first, 2 * second])
    assert history.terms["square"] == pytest.approx([first**2, second**2])
    assert history.loss == pytest.approx([2 * first + first**2, 2 * second + second**2])


def test_loss_is_the_mean_over_rows_not_over_batches():
    model = nn.Linear(1, 1)
    values = torch.tensor([0.0, 0.0, 0.0, 9.0])
    history = train(
        model, lambda rows: values[rows].mean() + 0 * model.weight.sum(), 4, epochs=1,
        batch_size=3, optimizer=ADAM, drop_last=False, device="cpu",
    )  # fmt: skip
    assert history.loss == pytest.approx([9 / 4])


def test_gradients_are_clipped_to_the_length_asked():
    model = nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    x = torch.tensor([[300.0, 400.0]])
    train(
        model, lambda rows: model(x).sum(), 1, epochs=1, batch_size=1, device="cpu",
        optimizer=partial(torch.optim.SGD, lr=1.0), gradient_clip=5.0,
    )  # fmt: skip
    torch.testing.assert_close(before - model.weight, torch.tensor([[3.0, 4.0]]))


def test_frozen_parameters_stay_and_a_ready_optimizer_is_used():
    model = make_model()
    model[0].requires_grad_(False)
    frozen, last = model[0].weight.clone(), model[4].weight.clone()
    fit(model, optimizer=torch.optim.Adam(model[4].parameters(), lr=0.1))
    assert torch.equal(model[0].weight, frozen)
    assert not torch.equal(model[4].weight, last)


def test_trains_under_no_grad_too():
    model = make_model()
    with torch.no_grad():
        fit(model)
        assert not torch.is_grad_enabled()
    assert weights(model) != weights(make_model())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_stops_and_says_what_to_do(bad, tmp_path):
    model = make_model()
    file = tmp_path / "run"

    def loss(rows):
        assert file.exists() or not calls
        calls.append(rows)
        return model(make_data()[0]).mean() * (bad if len(calls) == 5 else 1)

    calls: list = []
    with pytest.raises(FewbitsError, match=r"epoch 2 \(step 5\); lower the learning rate.*0\.01"):
        train(
            model, loss, ROWS, epochs=4, batch_size=16, optimizer=ADAM, device="cpu",
            checkpoint=file, checkpoint_seconds=0,
        )  # fmt: skip
    assert not file.exists()  # going on from it would end here again


def test_weights_spoiled_by_the_last_step_are_noticed():
    model = nn.Linear(1, 1)
    sgd = partial(torch.optim.SGD, lr=1e38)
    with pytest.raises(FewbitsError, match="lower the learning rate"):
        train(
            model, lambda rows: 1e3 * model.weight.sum(), 1, epochs=1, batch_size=1,
            optimizer=sgd, device="cpu",
        )  # fmt: skip


@pytest.mark.parametrize(
    "wrong", [{"epochs": -1}, {"batch_size": 0}, {"seed": -1}, {"gradient_clip": 0.0}]
)
def test_numbers_out_of_range_are_named(wrong):
    (name,) = wrong
    with pytest.raises(FewbitsError, match=name):
        fit(make_model(), **wrong)


def test_a_model_without_parameters_is_refused():
    with pytest.raises(FewbitsError, match="no trainable parameters"):
        fit(nn.ReLU())


def test_no_epochs_leave_the_model_as_it_was():
    model = make_model()
    assert fit(model, epochs=0).loss == []
    assert weights(model) == weights(make_model())


# -- going on after an interruption --------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = make_model()
    history = fit(model)
    torch.set_num_threads(threads)
    return weights(model), history


@pytest.mark.parametrize("step", range(1, 13))
def test_ctrl_c_at_any_batch_then_resume_gives_the_very_same_weights(tmp_path, step, uninterrupted):
    file = tmp_path / "new folder" / "run.checkpoint"
    with pytest.raises(KeyboardInterrupt):
        fit(make_model(), checkpoint=file, on_batch=ctrl_c_at(step))
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    torch.manual_seed(step)
    model = make_model()
    history = fit(model, checkpoint=file)
    assert history.resumed_at == step
    expected, reference = uninterrupted
    assert weights(model) == expected
    assert history.loss == reference.loss
    assert history.steps == reference.steps
    assert list(file.parent.iterdir()) == []


class Killed(Exception):
    """As good as a power cut: nothing is written after it."""


def kill_at(step):
    def on_batch(taken):
        if taken == step:
            raise Killed

    return on_batch


def test_two_power_cuts_cost_nothing_but_the_batch_they_hit(tmp_path, uninterrupted):
    file = tmp_path / "run"
    often = {"checkpoint": file, "checkpoint_seconds": 0}
    with pytest.raises(Killed):
        fit(make_model(), on_batch=kill_at(5), **often)
    with pytest.raises(Killed):
        fit(make_model(), on_batch=kill_at(4), **often)
    model = make_model()
    assert fit(model, **often).resumed_at == 4 + 3
    assert weights(model) == uninterrupted[0]


@pytest.mark.parametrize(
    ("optimizer", "scheduler"),
    [
        (partial(torch.optim.SGD, lr=0.02, momentum=0.9, weight_decay=1e-4), step_decay(0.5)),
        (partial(torch.optim.AdamW, lr=0.01, amsgrad=True), None),
        (
            partial(torch.optim.RMSprop, lr=0.01, centered=True),
            lambda optimizer, steps: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps),
        ),
    ],
)
def test_every_optimizer_and_scheduler_resumes(tmp_path, optimizer, scheduler):
    options = {"optimizer": optimizer, "scheduler": scheduler, "gradient_clip": 1.0}
    whole, part = make_model(), make_model()
    fit(whole, **options)
    with pytest.raises(KeyboardInterrupt):
        fit(make_model(), checkpoint=tmp_path / "run", on_batch=ctrl_c_at(7), **options)
    assert fit(part, checkpoint=tmp_path / "run", **options).resumed_at == 7
    assert weights(part) == weights(whole)


def test_ctrl_c_in_the_callback_keeps_the_epoch(tmp_path, uninterrupted):
    def callback(epoch, history):
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(make_model(), checkpoint=tmp_path / "run", callback=callback)
    model, epochs = make_model(), []
    fit(model, checkpoint=tmp_path / "run", callback=lambda epoch, history: epochs.append(epoch))
    assert epochs == [3, 4]
    assert weights(model) == uninterrupted[0]


def test_a_second_ctrl_c_leaves_at_once_without_a_file(tmp_path):
    def twice(taken):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(make_model(), checkpoint=tmp_path / "run", on_batch=twice)
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_shared_weights_are_kept(tmp_path):
    def tied():
        with seeded(1):
            model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1))
        model[1].weight = model[0].weight
        return model

    whole, part = tied(), tied()
    fit(whole)
    with pytest.raises(KeyboardInterrupt):
        fit(tied(), checkpoint=tmp_path / "run", on_batch=ctrl_c_at(4))
    fit(part, checkpoint=tmp_path / "run")
    assert weights(part) == weights(whole)
    assert part[1].weight is part[0].weight


@pytest.fixture
def interrupted(tmp_path):
    file = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        fit(make_model(), checkpoint=file, on_batch=ctrl_c_at(5))
    return file


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"seed": 6}, "seed"),
        ({"epochs": 5}, "epochs"),
        ({"batch_size": 8}, "batch_size"),
        ({"drop_last": False}, "drop_last"),
        ({"gradient_clip": 1.0}, "gradient_clip"),
        ({"identity": "other data"}, "identity"),
        ({"optimizer": partial(torch.optim.Adam, lr=0.02)}, "optimizer"),
        ({"scheduler": warmup_cosine(0.1)}, "scheduler"),
        ({"scheduler": None}, "scheduler"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_by_name(interrupted, other, named):
    before = interrupted.read_bytes()
    with pytest.raises(FewbitsError, match=rf"another run \(other .*{named}.*\); delete it"):
        fit(make_model(), checkpoint=interrupted, **other)
    assert interrupted.read_bytes() == before


def test_a_checkpoint_of_another_model_is_refused(interrupted):
    model = nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 1))
    with pytest.raises(FewbitsError, match=r"other model\)"):
        fit(model, checkpoint=interrupted)
    frozen = make_model()
    frozen[0].requires_grad_(False)
    with pytest.raises(FewbitsError, match=r"other model\)"):
        fit(frozen, checkpoint=interrupted)


def test_the_file_is_plain_safetensors(interrupted):
    tensors = load_file(interrupted)
    assert tensors["state/model/0.weight"].shape == (8, 4)
    assert tensors["state/optimizer/state/0/exp_avg"].shape == (8, 4)


def test_damage_anywhere_is_noticed(interrupted):
    good = interrupted.read_bytes()
    places = np.linspace(0, len(good) - 1, 40).astype(int)
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1
        interrupted.write_bytes(bad)
        with pytest.raises(FewbitsError, match=r"delete it|move it away"):
            fit(make_model(), checkpoint=interrupted)
    for length in (0, 4, 100, len(good) - 1):
        interrupted.write_bytes(good[:length])
        with pytest.raises(FewbitsError, match="delete it"):
            fit(make_model(), checkpoint=interrupted)
    interrupted.write_bytes(b"not safetensors at all")
    with pytest.raises(FewbitsError, match="delete it"):
        fit(make_model(), checkpoint=interrupted)


def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(FewbitsError, match="checkpoint"):
        fit(make_model(), checkpoint=tmp_path)


def test_any_state_comes_back_as_it_was(tmp_path):
    state = {
        "numbers": [1, 2.5, -0.0, 1e-320, float("inf"), True, None, "é"],
        3: (torch.tensor(7), [torch.ones(2, 3, dtype=torch.bfloat16)]),
        "empty": [{}, [], (), torch.empty(0, 2)],
        "flags": torch.tensor([True, False]),
        "slanted": torch.arange(6.0).reshape(2, 3).T,
    }
    write_checkpoint(tmp_path / "file", {"run": "a"}, state)
    back = read_checkpoint(tmp_path / "file", {"run": "a"})
    assert back["numbers"] == state["numbers"]
    assert json.dumps(back["numbers"]) == json.dumps(state["numbers"])
    assert back[3][0].item() == 7
    assert back[3][1][0].dtype == torch.bfloat16
    assert back["empty"][:3] == [{}, [], ()]
    assert back["empty"][3].shape == (0, 2)
    assert torch.equal(back["flags"], state["flags"])
    assert torch.equal(back["slanted"], state["slanted"])
    with pytest.raises(FewbitsError, match="cannot hold state/x/0, which is a set"):
        write_checkpoint(tmp_path / "file", {}, {"x": [{1}]})


def test_a_failed_write_leaves_the_old_file_and_nothing_else(interrupted, monkeypatch):
    before = interrupted.read_bytes()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FewbitsError, match=r"cannot write the checkpoint .*No space"):
        fit(make_model(), checkpoint=interrupted, checkpoint_seconds=0)
    assert interrupted.read_bytes() == before
    assert list(interrupted.parent.iterdir()) == [interrupted]


# -- schedules, devices, progress ----------------------------------------------------------


def rates(factory, steps, rate=2.0):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)
    scheduler = factory(optimizer, steps)
    used = []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


def test_warmup_cosine_by_hand():
    got = rates(warmup_cosine(0.2, final=0.1), 10)
    falling = [0.1 + 0.9 * (1 + np.cos(np.pi * i / 8)) / 2 for i in range(8)]
    assert got == pytest.approx([1.0, 2.0, *(2 * f for f in falling)])
    assert rates(warmup_cosine(), 4)[0] == 2.0


def test_step_decay_by_hand():
    assert rates(step_decay(0.5, 0.8), 10) == pytest.approx([2] * 5 + [0.2] * 3 + [0.02] * 2)
    assert rates(step_decay(0.5, factor=0.5), 2) == [2, 1]


def test_schedules_out_of_range_are_refused():
    with pytest.raises(FewbitsError, match="warmup"):
        warmup_cosine(1.0)
    with pytest.raises(FewbitsError, match="step_decay"):
        step_decay(6)


def test_seeded_draws_the_same_and_puts_everything_back():
    before = torch.get_rng_state()
    draws = []
    for seed in (1, 1, 2):
        with seeded(seed):
            draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_devices():
    best = resolve_device()
    assert best == resolve_device("auto")
    assert torch.ones(2, device=best).sum().item() == 2
    assert resolve_device("cpu") == torch.device("cpu")
    for wrong in ("nonsense", "cuda:99"):
        with pytest.raises(FewbitsError, match="device=cpu"):
            resolve_device(wrong)


def test_the_bar_shows_on_a_terminal_only(monkeypatch, capsys):
    fit(make_model(), progress=True)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    fit(make_model(), progress=False)
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""
    fit(make_model(), progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    for part in ("training", "100%", "epoch 4/4", "loss", "steps/s"):
        assert part in captured.err


# -- several processes ---------------------------------------------------------------------

TOGETHER = """
import sys
from functools import partial
from pathlib import Path
import torch
from safetensors.torch import save_file
from torch import nn
from fewbits.core.devices import join_processes, seeded
from fewbits.core.training import train

torch.set_num_threads(1)
folder, me = Path(sys.argv[1]), join_processes("cpu").index
x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))

def fit(model, **options):
    return train(
        model, lambda rows: (model(x[rows])[:, 0] - x[rows, 0]).square().mean(), 30, epochs=3,
        batch_size=8, optimizer=partial(torch.optim.Adam, lr=0.01), device="cpu", **options
    )

def network(seed, *extra):
    with seeded(seed):
        return nn.Sequential(nn.Linear(4, 8), *extra, nn.Linear(8, 1))

plain = network(me)  # different at the start: process 0 decides
history = fit(plain)

def noisy():
    return network(0, nn.BatchNorm1d(8), nn.Dropout(0.3))

def callback(epoch, history):
    if me == 1 and epoch == 2:
        raise KeyboardInterrupt

whole, part = noisy(), noisy()
fit(whole)
try:
    fit(noisy(), checkpoint=folder / "run", callback=callback)
    left = False
except KeyboardInterrupt:
    left = True
resumed = fit(part, checkpoint=folder / "run").resumed_at
tensors = {f"plain/{k}": v for k, v in plain.state_dict().items()}
tensors |= {f"whole/{k}": v for k, v in whole.state_dict().items()}
tensors |= {f"part/{k}": v for k, v in part.state_dict().items()}
tensors |= {"facts": torch.tensor([left, resumed]), "loss": torch.tensor(history.loss)}
save_file(tensors, folder / f"process{me}")
torch.distributed.destroy_process_group()
"""


def test_two_processes_train_one_model(tmp_path):
    pytest.importorskip("accelerate")
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch cannot join processes on a CPU")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(map(str, sys.path)),
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(tmp_path)],
            env=os.environ | common | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    results = [load_file(tmp_path / f"process{rank}") for rank in range(2)]
    assert results[0]["facts"].tolist() == [1, 6]  # both left when one was asked to
    assert not (tmp_path / "run").exists()
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name
    for name in (name for name in results[0] if name.startswith("whole/")):
        assert torch.equal(results[0][name], results[0][name.replace("whole", "part")]), name
    expected, loss = alone()
    for name, tensor in expected.items():
        torch.testing.assert_close(results[0][f"plain/{name}"], tensor, rtol=1e-4, atol=1e-6)
    assert results[0]["loss"].tolist() == pytest.approx(loss, rel=1e-4)


def alone():
    """What one process makes of the plain network above."""
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    with seeded(0):
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    history = train(
        model, lambda rows: (model(x[rows])[:, 0] - x[rows, 0]).square().mean(), 30, epochs=3,
        batch_size=8, optimizer=ADAM, device="cpu",
    )  # fmt: skip
    return model.state_dict(), history.loss


def test_without_a_launcher_nothing_of_accelerate_is_imported(monkeypatch):
    def refuse(module, extra):
        raise AssertionError(f"{module} was asked for")

    monkeypatch.setattr("fewbits.core.devices.require", refuse)
    fit(make_model())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(AssertionError, match="accelerate was asked for"):
        fit(make_model())


def test_saved_paths_may_be_strings(tmp_path, uninterrupted):
    model = make_model()
    fit(model, checkpoint=str(tmp_path / "run"), checkpoint_seconds=0)
    assert weights(model) == uninterrupted[0]
    assert not (tmp_path / "run").exists()
