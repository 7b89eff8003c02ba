"""The kernels on a CUDA GPU: the interpreter's cases on hardware, full-size projections, every shipped configuration.

Needs torch, triton and pytest only. A miscompile shows here and nowhere else: Triton 3.4 to 3.7.0 have a known one.
"""

import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from kernel_cases import (
    LOW_RANK,
    check_linear,
    check_served,
    configurations,
    exactly,
    folded,
    gradients,
    linear_arguments,
    served,
    use_configuration,
)
from smoke import smoke
from torch import Tensor

import pmkernels
from pmkernels import configs, launch, reference

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNEL_STRATEGIES = ("fused", "streamed")
PREFERENCES = {"shared": (), "per item": (3, 1), "per position": (1, 5), "per row": (3, 5), "one for all": (1, 1)}
WITHOUT = [(), ("bias",), ("task_vectors", "lam"), LOW_RANK, ("task_vectors", "lam", *LOW_RANK)]


@pytest.mark.parametrize("strategy", [*KERNEL_STRATEGIES, "auto"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gamma_lead", PREFERENCES.values(), ids=PREFERENCES)
def test_forward_and_every_gradient(gamma_lead: tuple[int, ...], dtype: torch.dtype, strategy: str) -> None:
    values = linear_arguments((3, 5), 70, 67, gamma_lead=gamma_lead, dtype=dtype, device="cuda")
    check_linear(values, strategy=strategy)
    values["lam"].requires_grad_(False)
    check_linear(values, strategy=strategy)


@pytest.mark.parametrize("without", WITHOUT, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_optional_arguments(without: Sequence[str], dtype: torch.dtype) -> None:
    options = {"dtype": dtype, "device": "cuda", "without": without}
    for constant, gamma_lead in itertools.product((0, 32), ((),) if "gamma" in without else ((), (2, 1))):
        values = linear_arguments((2, 33), 80, 64, rank=16, gamma_lead=gamma_lead, constant=constant, **options)
        for strategy in KERNEL_STRATEGIES:
            check_linear(values, strategy=strategy)


@pytest.mark.parametrize("seed", range(60))
def test_random_shapes(seed: int) -> None:
    rng = random.Random(seed)
    lead = (rng.choice((1, 2, 7, 16)), rng.choice((1, 3, 17, 65)))
    n, d = rng.choice((1, 13, 64, 96, 127, 256)), rng.choice((1, 17, 64, 80, 129, 256))
    gamma_lead = rng.choice(((), (), (lead[0], 1), lead, (1, lead[1])))
    dtype = rng.choice(DTYPES)
    values = linear_arguments(
        lead,
        n,
        d,
        tasks=rng.choice((1, 2, 8, 32)),
        rank=rng.choice((1, 4, 16, 17, 32, 64)),
        gamma_lead=gamma_lead,
        dtype=dtype,
        device="cuda",
        seed=seed,
    )
    values["lam"].requires_grad_(rng.random() < 0.7)
    values["x"] = values["x"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    dy = torch.randn(*lead, n, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)
    if rng.random() < 0.3:
        dy = dy[:1, :1, :1].expand(*lead, n)
    check_linear(values, dy, strategy=rng.choice(KERNEL_STRATEGIES))


# out and in features, items and tokens of ViT-B/32 and ViT-L/14
FULL_SIZE = {
    "ViT-B/32 in-projection": (2304, 768, 32, 50),
    "ViT-B/32 out-projection": (768, 768, 32, 50),
    "ViT-L/14 in-projection": (3072, 1024, 32, 257),
    "ViT-L/14 out-projection": (1024, 1024, 32, 257),
    "ViT-L/14 in-projection, one image": (3072, 1024, 1, 257),
}


@smoke(3, dtype=(torch.bfloat16,))
@pytest.mark.parametrize("per_item", [False, True], ids=["shared", "32 preferences"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", FULL_SIZE.values(), ids=FULL_SIZE)
def test_full_size_projections(layer: tuple[int, int, int, int], dtype: torch.dtype, per_item: bool) -> None:
    """K = 8, r = 16: at most twice the error of plain PyTorch in the same type, forward and in every gradient."""
    n, d, items, tokens = layer
    gamma_lead = (items, 1) if per_item else ()
    values = linear_arguments(
        (items, tokens), n, d, tasks=8, rank=16, gamma_lead=gamma_lead, dtype=dtype, device="cuda"
    )
    for strategy in KERNEL_STRATEGIES:
        check_linear(values, strategy=strategy)
        _check_twice(values, strategy)
    values["lam"].requires_grad_(False)
    check_linear(values, strategy="fused")


def _check_twice(values: dict[str, Tensor], strategy: str) -> None:
    """‖ours − float64‖ at most twice ‖plain PyTorch − float64‖, of y and of every gradient."""
    exact = exactly(values)
    dy = torch.randn(*values["x"].shape[:-1], len(values["weight"]), generator=torch.Generator().manual_seed(3))
    results = []
    for function, arguments in (
        (lambda **v: pmkernels.pareto_linear(**v, strategy=strategy), values),
        (reference.pareto_linear, values),
        (reference.pareto_linear, exact),
    ):
        y = function(**arguments)
        results.append({"y": y.detach(), **gradients(y, dy.to(y), arguments)})
    ours, plain, truth = results
    for name, value in truth.items():
        error, allowed = (float((found[name].double() - value).norm()) for found in (ours, plain))
        assert error <= 2 * allowed + 1e-6 * float(value.norm()), f"{name}: {error:.3g}, plain PyTorch {allowed:.3g}"


# which checks launch a kernel of that configuration
OPS_OF_LAYERS = ("linear", "weight_grad", "shrink", "factor_grad", "core_grad", "preference_grad", "sum")
OPS_OF_SERVED_LAYERS = ("preference", "widen", "sum")
OPS_OF_MERGES = ("merge", "merge_grad", "flat", "vectors", "sum")


@smoke(2, name=("sm_90",))
# up to a hundred kernels, compiled one after the other
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("name", "entry"), configurations().values(), ids=configurations())
def test_every_shipped_configuration(name: str, entry: configs.Entry) -> None:
    """Each line of each file gives right results wherever it is used, whatever GPU it was tuned on."""
    types = {"16-bit": (torch.bfloat16, torch.float16), "any": (torch.bfloat16, torch.float32)}
    shapes = {True: [(256, 320)], False: [(131, 77)], None: [(256, 320), (131, 77)]}[entry.aligned]
    rows, rank = min(entry.max_rows or 300, 300), min(entry.max_rank or launch.MAX_RANK, launch.MAX_RANK)
    with use_configuration(name, entry) as used:
        for dtype in types.get(entry.dtype, (torch.float32,)):
            for n, d in shapes:
                if entry.op in OPS_OF_LAYERS:
                    _check_layers(rows, n, d, rank, dtype, entry.dtype == "tf32")
                if entry.op in OPS_OF_SERVED_LAYERS:
                    _check_served_layers(rows, n, d, rank, dtype, entry.dtype == "tf32")
                if entry.op in OPS_OF_MERGES:
                    _check_merges(n, d, rank, dtype, entry.dtype == "tf32")
    assert entry.op in used


def _check_layers(rows: int, n: int, d: int, rank: int, dtype: torch.dtype, tf32: bool) -> None:
    """Many rows and one, which is a size that Triton compiles for; one preference or one for each row; a frozen λ."""
    for count, gamma_lead in ((rows, ()), (rows, (rows,)), (1, ())):
        values = linear_arguments((count,), n, d, tasks=8, rank=rank, gamma_lead=gamma_lead, dtype=dtype, device="cuda")
        _check_layer(values, tf32)
    _check_layer({**values, "lam": values["lam"].detach()}, tf32)


def _check_served_layers(rows: int, n: int, d: int, rank: int, dtype: torch.dtype, tf32: bool) -> None:
    """Many rows and one, which is a size that Triton compiles for; each with its own preference."""
    for count, strategy in itertools.product((rows, 1), ("fused", "streamed")):
        values = folded((count,), n, d, tasks=8, rank=rank, gamma_lead=(count,), dtype=dtype, device="cuda")
        if not tf32:
            check_served(values, strategy=strategy)
            continue
        y, truth = served(values, strategy=strategy), reference.pareto_linear(**exactly(values))
        assert float((y.double() - truth).norm() / truth.norm()) < 2e-3


def _check_merges(n: int, d: int, rank: int, dtype: torch.dtype, tf32: bool) -> None:
    """A matrix with a low-rank term, and a long vector."""
    matrix = linear_arguments((1,), n, d, tasks=8, rank=rank, dtype=dtype, device="cuda", without=("x", "bias"))
    vector = linear_arguments((1,), 1, 70_000, tasks=8, dtype=dtype, device="cuda", without=("x", "bias", *LOW_RANK))
    for parts in (matrix, vector):
        merged, exact = pmkernels.merge_weight(**parts, strategy="fused"), exactly(parts)
        truth = reference.merge_weight(**exact)
        # 72 terms are summed in float32
        ulps = 16 if dtype == torch.float32 else 2
        assert float((merged.double() - truth).abs().max()) <= ulps * torch.finfo(dtype).eps * float(truth.abs().max())
        dw = torch.randn(merged.shape, generator=torch.Generator().manual_seed(2)).to("cuda", dtype)
        found, theirs = gradients(merged, dw, parts), gradients(truth, dw.double(), exact)
        for name in theirs:
            # P and Q of 16-bit and TF32 models are TF32 products
            bound = 5e-3 if dtype != torch.float32 or tf32 else 1e-5
            assert float((found[name].double() - theirs[name]).norm()) <= bound * float(theirs[name].norm()), name
    offsets = torch.tensor([0, 1, 3000, 3000, 70_000], device="cuda")
    lam = torch.randn(4, 8, device="cuda", requires_grad=True)
    pieces = (vector["weight"].reshape(-1), vector["task_vectors"].reshape(8, -1), lam, offsets)
    merged = pmkernels.merge_vectors(*pieces, strategy="fused")
    truth = reference.merge_vectors(pieces[0].double(), pieces[1].double(), lam.double(), offsets)
    assert float((merged.double() - truth).abs().max()) <= ulps * torch.finfo(dtype).eps * float(truth.abs().max())
    dw = torch.randn(merged.shape, generator=torch.Generator().manual_seed(4)).to("cuda", dtype)
    (ours,), (exact_one,) = torch.autograd.grad(merged, lam, dw), torch.autograd.grad(truth, lam, dw.double())
    assert float((ours - exact_one).norm()) <= 1e-4 * float(exact_one.norm())


def _check_layer(values: dict[str, Tensor], tf32: bool) -> None:
    if not tf32:
        check_linear(values, strategy="fused")
        return
    y, exact = pmkernels.pareto_linear(**values, strategy="fused"), exactly(values)
    truth = reference.pareto_linear(**exact)
    assert float((y.double() - truth).norm() / truth.norm()) < 2e-3
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to("cuda")
    found, theirs = gradients(y, dy, values), gradients(truth, dy.double(), exact)
    for name in theirs:
        assert float((found[name].double() - theirs[name]).norm()) <= 5e-3 * float(theirs[name].norm()), name


def test_float32_is_exact_unless_told_otherwise() -> None:
    values = linear_arguments((256,), 512, 512, tasks=4, rank=8, device="cuda")
    truth = reference.pareto_linear(**exactly(values))
    errors = {}
    for precision in ("ieee", "tf32"):
        torch.backends.cuda.matmul.fp32_precision = precision
        y = pmkernels.pareto_linear(**values, strategy="fused")
        errors[precision] = float((y.double() - truth).norm() / truth.norm())
    assert errors["ieee"] < 2e-6
    assert 1e-5 < errors["tf32"] < 2e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gamma_lead", [(), (32, 1)])
def test_same_bits_twice(gamma_lead: tuple[int, ...], dtype: torch.dtype) -> None:
    runs = []
    for _ in range(3):
        values = linear_arguments(
            (32, 257), 1024, 1024, tasks=8, rank=16, gamma_lead=gamma_lead, dtype=dtype, device="cuda"
        )
        torch.full((64, 1024, 1024), torch.nan, device="cuda")
        y = pmkernels.pareto_linear(**values, strategy="fused")
        runs.append([y, *gradients(y, torch.ones_like(y), values).values()])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_unwritten_memory_is_not_read() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        # torch.empty is filled with NaN now
        for gamma_lead in ((), (9, 1)):
            values = linear_arguments((9, 31), 130, 200, rank=5, gamma_lead=gamma_lead, device="cuda")
            for frozen in (False, True):
                values["lam"].requires_grad_(not frozen)
                check_linear(values, strategy="fused")
        logits = torch.randn(33, 1000, device="cuda", requires_grad=True)
        entropy = pmkernels.softmax_entropy(logits, strategy="fused")
        (grad,) = torch.autograd.grad(entropy.sum(), logits)
        assert bool(torch.isfinite(entropy).all() and torch.isfinite(grad).all())
    finally:
        torch.use_deterministic_algorithms(False)


def test_nothing_of_the_size_of_a_weight_is_allocated() -> None:
    n, d = 3072, 1024
    for rank, frozen in ((16, False), (64, False), (16, True)):
        values = linear_arguments((32,), n, d, tasks=8, rank=rank, device="cuda")
        values["lam"].requires_grad_(not frozen)
        pmkernels.pareto_linear(**values, strategy="fused").sum().backward()
        torch.cuda.synchronize()
        torch.cuda.memory._record_memory_history(max_entries=10_000)
        try:
            pmkernels.pareto_linear(**values, strategy="fused").sum().backward()
            torch.cuda.synchronize()
            trace = torch.cuda.memory._snapshot()["device_traces"][0]
        finally:
            torch.cuda.memory._record_memory_history(enabled=None)
        # in float32 a byte count says how many elements
        assert max((event["size"] for event in trace if event["action"] == "alloc"), default=0) < n * d * 4


@smoke(8, dtype=(torch.bfloat16,), classes=(10, 1000, 5000))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [2, 10, 1000, 5000])
def test_softmax_entropy(classes: int, dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(300, classes, generator=torch.Generator().manual_seed(0))).to("cuda", dtype)
    logits[0] = 0
    logits[1, 1:] = -torch.inf
    logits[2] *= 1e4 / logits[2].abs().max()
    z, exact = logits.requires_grad_(), logits.detach().double().requires_grad_()
    entropy, truth = pmkernels.softmax_entropy(z, strategy="fused"), reference.softmax_entropy(exact)
    torch.testing.assert_close(entropy.double(), truth, rtol=1e-5, atol=1e-5)
    grad = torch.randn(300, device="cuda")
    (ours,) = torch.autograd.grad(entropy, z, grad)
    (theirs,) = torch.autograd.grad(truth, exact, grad.double())
    scale = float(theirs.abs().max())
    assert float((ours.double() - theirs).abs().max()) <= max(2 * torch.finfo(dtype).eps, 1e-5) * scale


@smoke(7, dtype=(torch.bfloat16,), shape=((1_000_003,), (64, 3, 16, 16), (1024, 1024)))
@pytest.mark.parametrize("shape", [(7,), (1_000_003,), (70, 130), (64, 3, 16, 16), (1024, 1024)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merge_weight(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to("cuda", dtype)
    task_vectors = torch.randn(5, *shape, generator=generator).to("cuda", dtype)
    lam = torch.randn(5, generator=generator).cuda().requires_grad_()
    for layout in (lambda t: t, lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.ndim > 2 else t):
        values = {"weight": layout(weight), "task_vectors": layout(task_vectors), "lam": lam}
        merged, exact = pmkernels.merge_weight(**values), exactly(values)
        truth = reference.merge_weight(**exact)
        assert float((merged.double() - truth).abs().max()) <= 4 * torch.finfo(dtype).eps * float(truth.abs().max())
        (ours,) = torch.autograd.grad(merged, lam, torch.ones_like(merged))
        (theirs,) = torch.autograd.grad(truth, exact["lam"], torch.ones_like(truth))
        terms = float(task_vectors.double().abs().flatten(1).sum(dim=1).max())
        assert float((ours.double() - theirs).abs().max()) <= 1e-6 * terms


def test_fused_equals_a_product_with_the_merged_weight() -> None:
    values = linear_arguments(
        (512,), 512, 512, tasks=8, rank=16, dtype=torch.bfloat16, device="cuda", without=("bias",)
    )
    parts = {name: v.detach() for name, v in values.items() if name != "x"}
    identity = torch.eye(512, dtype=torch.bfloat16, device="cuda")
    tile = pmkernels.pareto_linear(identity, **parts, strategy="fused").t()
    # the compiler may contract a multiplication and an addition in one kernel and not in the other
    merged = pmkernels.merge_weight(**parts, strategy="fused")
    assert float((tile != merged).float().mean()) < 1e-3
    torch.testing.assert_close(tile, merged, rtol=2**-7, atol=0)


@pytest.mark.parametrize("strategy", [*KERNEL_STRATEGIES, "auto"])
@pytest.mark.parametrize("gamma_lead", [(), (4, 1)])
def test_capture_in_a_cuda_graph(gamma_lead: tuple[int, ...], strategy: str) -> None:
    """Forward and backward captured once; replayed with new x, λ and γ written into the same memory."""
    first, second = (
        linear_arguments((4, 50), 96, 64, rank=4, gamma_lead=gamma_lead, dtype=torch.bfloat16, device="cuda", seed=s)
        for s in (0, 1)
    )
    dy = torch.randn(4, 50, 96, device="cuda").bfloat16()

    def step(values: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        y = pmkernels.pareto_linear(**values, strategy=strategy)
        return y, gradients(y, dy, values)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(first)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, found = step(first)
    with torch.no_grad():
        for name, value in first.items():
            value.copy_(second[name])
    graph.replay()
    expected, theirs = step(second)
    assert torch.equal(y, expected)
    for name in theirs:
        assert torch.equal(found[name], theirs[name]), name


def test_compile() -> None:
    for gamma_lead in ((), (4,)):
        values = linear_arguments((4,), 64, 48, gamma_lead=gamma_lead, device="cuda")

        def model(**arguments: Tensor) -> Tensor:
            return pmkernels.softmax_entropy(pmkernels.pareto_linear(**arguments))

        ours, theirs = torch.compile(model, fullgraph=True, backend="aot_eager")(**values), model(**values)
        torch.testing.assert_close(ours, theirs)
        found, expected = (gradients(h, torch.ones_like(h), values) for h in (ours, theirs))
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], msg=name)


def test_autocast() -> None:
    values = linear_arguments((4, 33), 96, 64, device="cuda")
    truth = reference.pareto_linear(**exactly(values))
    for strategy in (*KERNEL_STRATEGIES, "auto"):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y = pmkernels.pareto_linear(**values, strategy=strategy)
        assert y.dtype == torch.bfloat16
        assert float((y.double() - truth).abs().max()) <= 2**-6 * float(truth.abs().max())
        assert all(g.dtype == torch.float32 for g in gradients(y, torch.ones_like(y), values).values())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_kernels_run_on_the_device_of_their_arguments() -> None:
    values = linear_arguments((4,), 64, 48, device="cuda:1")
    assert torch.cuda.current_device() == 0
    check_linear(values, strategy="fused")
    with pytest.raises(ValueError, match="x: expected device cuda:1"):
        pmkernels.pareto_linear(**{**values, "x": values["x"].detach().to("cuda:0")})


def test_wrong_devices_are_named() -> None:
    values = linear_arguments((4,), 6, 5, device="cuda")
    with pytest.raises(ValueError, match="lam: expected device cuda:0, that of weight, got cpu"):
        pmkernels.pareto_linear(**{**values, "lam": values["lam"].detach().cpu()})


def test_large_offsets() -> None:
    """A weight of more than 2^31 elements apart: every second row of a huge tensor."""
    free, _ = torch.cuda.mem_get_info()
    stride = 2**31 // 2 + 16
    if free < 3 * stride * 2 * 1.2:
        pytest.skip("needs 8 GB of GPU memory")
    values = linear_arguments((5,), 3, 8, dtype=torch.float16, device="cuda", without=("task_vectors", "lam"))
    expected = pmkernels.pareto_linear(**values, strategy="fused")
    far = torch.empty(2 * stride + 8, dtype=torch.float16, device="cuda").as_strided((3, 8), (stride, 1))
    values["weight"] = far.copy_(values["weight"])
    assert torch.equal(pmkernels.pareto_linear(**values, strategy="fused"), expected)
