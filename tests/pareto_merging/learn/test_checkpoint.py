"""Runs that are stopped, killed and resumed, and checkpoints that are not theirs."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from learn_cases import learned, same, short_run, task_set
from torch import nn

from pareto_merging.checkpoints.safetensors import read_metadata, read_tensors
from pareto_merging.errors import TrainingError, UserError
from pareto_merging.learn.checkpoint import CHECKPOINT_NAME
from pareto_merging.learn.log import LOG_NAME
from pareto_merging.learn.loop import learn_pareto_set
from pareto_merging.model.parametrize import parametrize

# those of these tests run twice, with the eager strategy and with the kernels
with_kernels = pytest.mark.usefixtures("strategy")

Copies = Callable[[nn.Module, int], dict[str, nn.Module]]


@with_kernels
def test_resumed_run_has_the_bits_of_an_uninterrupted_one(tiny_vit: nn.Module, copies: Copies, tmp_path: Path) -> None:
    def fresh() -> nn.Module:
        return parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)

    whole = fresh()
    learn_pareto_set(whole, task_set(2), short_run(steps=7), folder=tmp_path / "whole", progress=False)

    class Stop(Exception):
        pass

    calls: list[int] = []

    def die_in_step_6(module: nn.Module, args: Any) -> None:
        calls.append(1)
        if len(calls) == 6:
            raise Stop

    tasks = task_set(2)
    tasks["t0"].head.register_forward_pre_hook(die_in_step_6)
    with pytest.raises(Stop):
        learn_pareto_set(fresh(), tasks, short_run(steps=7), folder=tmp_path / "cut", progress=False)
    resumed = fresh()
    result = learn_pareto_set(
        resumed, task_set(2), short_run(steps=7), folder=tmp_path / "cut", resume=True, progress=False
    )
    assert result.resumed_from == 4
    assert [row["step"] for row in result.history] == [5, 6, 7]
    assert same(learned(whole), learned(resumed))
    log = [json.loads(line) for line in (tmp_path / "cut" / LOG_NAME).read_text().splitlines()]
    assert [row["step"] for row in log if "event" not in row] == list(range(1, 8))
    assert {"event": "resumed", "step": 4, "steps": 7, "remaining": 3} in log
    again = fresh()
    done = learn_pareto_set(
        again, task_set(2), short_run(steps=7), folder=tmp_path / "cut", resume=True, progress=False
    )
    assert done.history == []
    assert same(learned(whole), learned(again))


def test_checkpoint_of_other_settings_is_refused(tiny_vit: nn.Module, copies: Copies, tmp_path: Path) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    learn_pareto_set(model, task_set(2), short_run(), folder=tmp_path, progress=False)
    with pytest.raises(UserError, match=r"differs in mu \(0.1, now 0.2\)"):
        learn_pareto_set(model, task_set(2), short_run(mu=0.2), folder=tmp_path, resume=True, progress=False)
    larger = parametrize(tiny_vit, copies(tiny_vit, 2), rank=3)
    with pytest.raises(UserError, match=r"differs in rank \(2, now 3\), model: rank \(2, now 3\)"):
        learn_pareto_set(larger, task_set(2), short_run(rank=3), folder=tmp_path, resume=True, progress=False)
    for other, tasks, message in (
        (parametrize(tiny_vit, copies(tiny_vit, 3), rank=2), task_set(3), "task_names"),
        (parametrize(tiny_vit, {"t0": tiny_vit, "t1": copies(tiny_vit, 2)["t1"]}, rank=2), task_set(2), "digests: t0"),
        (parametrize(tiny_vit, copies(tiny_vit, 2), rank=2), task_set(2, seed=8), "heads: t0 .*heads: t1"),
    ):
        with pytest.raises(UserError, match=message):
            learn_pareto_set(other, tasks, short_run(), folder=tmp_path, resume=True, progress=False)
    (tmp_path / CHECKPOINT_NAME).write_bytes(b"\x00" * 100)
    with pytest.raises(UserError, match="expected a safetensors file"):
        learn_pareto_set(model, task_set(2), short_run(), folder=tmp_path, resume=True, progress=False)


STOPPABLE = """
    import sys, time, torch
    sys.path.insert(0, {tests!r})
    torch.set_num_threads(1)
    from pathlib import Path
    from helpers import noisy_copy
    from open_clip.transformer import VisionTransformer
    from pareto_merging.errors import Interrupted
    from pareto_merging.model.learned import learned_parameters
    from pareto_merging.model.parametrize import parametrize
    from pareto_merging.learn.loop import learn_pareto_set
    from learn_cases import short_run, task_set
    torch.manual_seed(0)
    vit = VisionTransformer(image_size=8, patch_size=4, width=32, layers=2, heads=2, mlp_ratio=2.0, output_dim=8)
    model = parametrize(vit.eval(), {{f"t{{k}}": noisy_copy(vit, k + 1) for k in range(2)}}, rank=2)
    try:
        r = learn_pareto_set(model, task_set(2), short_run(steps={steps}, checkpoint_every=5), folder=Path({folder!r}),
                             resume=True, progress=False)
        from safetensors.torch import save_file
        end = {{n: p.detach().clone() for n, p in learned_parameters(model).items()}}
        save_file(end, {folder!r} + "/end.safetensors")
    except Interrupted as stop:
        print("interrupted", stop.step, flush=True)
"""


def start(folder: Path, steps: int) -> subprocess.Popen[str]:
    tests = str(Path(__file__).parents[2])
    code = textwrap.dedent(STOPPABLE).format(tests=tests, folder=str(folder), steps=steps)
    environment = {**os.environ, "PYTHONPATH": tests, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)


def wait_for_steps(folder: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        log = folder / LOG_NAME
        if log.exists() and sum('"loss"' in line for line in log.read_text().splitlines()) >= steps:
            return
        time.sleep(0.02)
    raise AssertionError("the run made no progress")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_killed_or_interrupted_processes_resume_to_the_same_bits(tmp_path: Path, number: signal.Signals) -> None:
    steps = 120
    whole = start(tmp_path / "whole", steps)
    process = start(tmp_path / "cut", steps)
    wait_for_steps(tmp_path / "cut", 12)
    process.send_signal(number)
    out, _ = process.communicate(timeout=120)
    assert not (tmp_path / "cut" / "end.safetensors").exists(), "the signal came too late to test anything"
    if number != signal.SIGKILL:
        assert "interrupted" in out
    assert not list((tmp_path / "cut").glob("*.tmp"))
    resumed = start(tmp_path / "cut", steps)
    assert resumed.wait(timeout=300) == 0
    assert whole.wait(timeout=300) == 0
    log = [json.loads(line) for line in (tmp_path / "cut" / LOG_NAME).read_text().splitlines()]
    (event,) = [row for row in log if row.get("event") == "resumed"]
    assert 10 <= event["step"] < steps
    assert event["remaining"] == steps - event["step"]
    assert [row["step"] for row in log if "event" not in row] == list(range(1, steps + 1))
    first, second = (read_tensors(tmp_path / name / "end.safetensors") for name in ("whole", "cut"))
    assert same(first, second)


def test_a_failed_first_update_leaves_no_moments(tiny_vit: nn.Module, copies: Copies, tmp_path: Path) -> None:
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    with pytest.raises(TrainingError, match="not finite after the update"):
        learn_pareto_set(model, task_set(2), short_run(learning_rate=1e39), folder=tmp_path, progress=False)
    assert not any(name.startswith("exp_avg") for name in read_tensors(tmp_path / CHECKPOINT_NAME))


def test_an_unlearned_lambda_survives_a_resume(tiny_vit: nn.Module, copies: Copies, tmp_path: Path) -> None:
    from pareto_merging.model.learned import get_lambda, set_lambda

    settings = short_run(learn_lambda=False)
    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    set_lambda(model, 0.1)
    learn_pareto_set(model, task_set(2), settings, folder=tmp_path, progress=False)
    again = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    learn_pareto_set(again, task_set(2), settings, folder=tmp_path, resume=True, progress=False)
    assert torch.equal(get_lambda(again), get_lambda(model))
    assert same(learned(again), learned(model))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t, m: m.pop("step"), "expected a step from 0 to 4, got None"),
        (lambda t, m: m.update(step="9"), "expected a step from 0 to 4, got '9'"),
        (lambda t, m: m.pop("settings"), "expected settings in the header"),
        (lambda t, m: m.update(settings="[]"), "differs in settings"),
        (lambda t, m: t.pop(next(n for n in t if n.startswith("exp_avg_sq"))), "expected exp_avg_sq"),
        (lambda t, m: t[next(iter(t))].fill_(math.nan), "expected finite numbers in"),
        (lambda t, m: m.update(format="else"), "expected a training checkpoint"),
    ],
)
def test_damaged_checkpoints_are_one_clear_error(
    tiny_vit: nn.Module, copies: Copies, tmp_path: Path, damage: Callable[[Any, Any], Any], message: str
) -> None:
    from safetensors.torch import save_file

    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    learn_pareto_set(model, task_set(2), short_run(), folder=tmp_path, progress=False)
    path = tmp_path / CHECKPOINT_NAME
    tensors, metadata = read_tensors(path), read_metadata(path)
    del metadata["checksums"]
    damage(tensors, metadata)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(UserError, match=message):
        learn_pareto_set(model, task_set(2), short_run(), folder=tmp_path, resume=True, progress=False)


def test_settings_that_contradicted_their_model_do_not_stop_a_resume(
    tiny_vit: nn.Module, copies: Copies, tmp_path: Path
) -> None:
    """As a run of before could have them: what is the model's is compared as the model has it."""
    from safetensors.torch import save_file

    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2, granularity="block")
    settings = short_run(granularity="block")
    learn_pareto_set(model, task_set(2), settings, folder=tmp_path, progress=False)
    path = tmp_path / CHECKPOINT_NAME
    metadata = read_metadata(path)
    del metadata["checksums"]
    before = json.loads(metadata["settings"]) | {"rank": 16, "core": "outer-product", "granularity": "tensor"}
    save_file(read_tensors(path), path, metadata={**metadata, "settings": json.dumps(before)})
    result = learn_pareto_set(model, task_set(2), settings, folder=tmp_path, resume=True, progress=False)
    assert result.resumed_from == 4
    save_file(read_tensors(path), path, metadata={**metadata, "settings": json.dumps(before | {"mu": 0.2})})
    with pytest.raises(UserError, match=r"but it differs in mu \(0.2, now 0.1\)$"):
        learn_pareto_set(model, task_set(2), settings, folder=tmp_path, resume=True, progress=False)
    other = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    save_file(read_tensors(path), path, metadata={**metadata, "settings": json.dumps(before)})
    with pytest.raises(UserError, match=r"in model: granularity \('block', now 'tensor'\)"):
        learn_pareto_set(other, task_set(2), short_run(), folder=tmp_path, resume=True, progress=False)


def test_a_checkpoint_of_before_has_none_of_the_newer_settings(
    tiny_vit: nn.Module, copies: Copies, tmp_path: Path
) -> None:
    """What was not there meant what is the default now: a run of then goes on, and only with the defaults."""
    from safetensors.torch import save_file

    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    learn_pareto_set(model, task_set(2), short_run(), folder=tmp_path, progress=False)
    path = tmp_path / CHECKPOINT_NAME
    metadata = read_metadata(path)
    del metadata["checksums"]
    settings, built = json.loads(metadata["settings"]), json.loads(metadata["model"])
    newer = ("temperature", "entropy_weight", "features_weight", "teacher_outputs", "constant_rank", "start")
    for name in (*newer, "start_images", "ridge", "schedule", "warm_up", "few_images", "held_back"):
        del settings[name]
    del built["constant_rank"]
    assert "base" not in json.loads(metadata["digests"])
    save_file(
        read_tensors(path), path, metadata={**metadata, "settings": json.dumps(settings), "model": json.dumps(built)}
    )
    how: dict[str, Any] = {"folder": tmp_path, "resume": True, "progress": False}
    assert learn_pareto_set(model, task_set(2), short_run(), **how).resumed_from == 4
    with pytest.raises(UserError, match=r"differs in schedule \('constant', now 'cosine'\)"):
        learn_pareto_set(model, task_set(2), short_run(schedule="cosine"), **how)
    larger = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2, constant_rank=2)
    with pytest.raises(UserError, match=r"differs in .*constant_rank \(0, now 2\)"):
        learn_pareto_set(larger, task_set(2), short_run(constant_rank=2), **how)


def test_a_checkpoint_of_another_base_is_refused(tiny_vit: nn.Module, copies: Copies, tmp_path: Path) -> None:
    from pareto_merging.model.base import set_base

    def based(value: float) -> nn.Module:
        model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
        set_base(model, {"ln_post.bias": torch.full((32,), value)}, "regmean")
        return model

    settings = short_run(start="regmean")
    how: dict[str, Any] = {"folder": tmp_path, "resume": True, "progress": False}
    learn_pareto_set(based(0.1), task_set(2), settings, **how)
    assert learn_pareto_set(based(0.1), task_set(2), settings, **how).resumed_from == 4
    with pytest.raises(UserError, match=r"differs in digests: base \(\w{12}…, now \w{12}…"):
        learn_pareto_set(based(0.2), task_set(2), settings, **how)


def test_the_cosine_schedule_is_a_function_of_the_step(tiny_vit: nn.Module, copies: Copies, tmp_path: Path) -> None:
    from pareto_merging.learn.learner import Learner

    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    learner = Learner(model, task_set(2), short_run(schedule="cosine", steps=8))
    shares = [learner._share_of_rates(step) for step in range(1, 9)]
    assert shares == pytest.approx([0.5 * (1 + math.cos(math.pi * t / 8)) for t in range(8)])
    assert shares[0] == 1 and 0 < shares[-1] < 0.05
    assert Learner(model, task_set(2), short_run())._share_of_rates(3) == 1


def test_rates_warm_up(tiny_vit: nn.Module, copies: Copies) -> None:
    from pareto_merging.learn.learner import Learner

    model = parametrize(tiny_vit, copies(tiny_vit, 2), rank=2)
    rising = Learner(model, task_set(2), short_run(warm_up=4, steps=8))
    assert [rising._share_of_rates(step) for step in range(1, 9)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    both = Learner(model, task_set(2), short_run(warm_up=4, schedule="cosine", steps=8))
    cosine = [0.5 * (1 + math.cos(math.pi * t / 8)) for t in range(8)]
    expected = [share * min(1, (t + 1) / 4) for t, share in enumerate(cosine)]
    assert [both._share_of_rates(step) for step in range(1, 9)] == pytest.approx(expected)
