"""A model run piece by piece with other weights, its streams kept in between.

A transformer whose blocks are known (:data:`WRITERS`) is cut before its first block, between its blocks, and after the
last; any other model is one piece. A piece is run with any weights (``torch.func.functional_call``) on the stream of
the same chain: the model with one set of weights, seen from its images to its features.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

# weights by the name that the model has them under
Weights: TypeAlias = Mapping[str, Tensor]

# class of a block -> (the norm that reads the stream, the map that then writes into it) in order, as different
# versions of the library call them
WRITERS: dict[str, tuple[tuple[tuple[str, str], ...], ...]] = {
    "ResidualAttentionBlock": ((("ln_1", "attn.out_proj"), ("ln_2", "mlp.c_proj")),),
    "CLIPEncoderLayer": ((("layer_norm1", "self_attn.out_proj"), ("layer_norm2", "mlp.fc2")),),
    "SiglipEncoderLayer": ((("layer_norm1", "self_attn.out_proj"), ("layer_norm2", "mlp.fc2")),),
    "ViTLayer": (
        (("layernorm_before", "attention.o_proj"), ("layernorm_after", "mlp.fc2")),
        (("layernorm_before", "attention.output.dense"), ("layernorm_after", "output.dense")),
    ),
    "Block": ((("norm1", "attn.proj"), ("norm2", "mlp.fc2")),),
}


@dataclass(frozen=True)
class Residual:
    """Where the stream is around a map that writes into it.

    Attributes:
        before: the module whose input is the stream before. after: the one whose input (``at_output``: its output) it
            is afterwards. swapped: the map has the first two dimensions of its rows the other way round.
    """

    before: str
    after: str
    at_output: bool
    swapped: bool


@dataclass
class Batch:
    """Some images of one task, and the stream of each chain.

    ``others`` and ``keywords`` are what blocks are given beside it, ``expert_after`` is the
    fine-tuned model's stream after the block in hand, once it is known.
    """

    images: Tensor
    streams: dict[str, Tensor] = field(default_factory=dict)
    others: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)
    expert_after: Tensor | None = None


@dataclass
class Piece:
    """A piece of a model.

    Attributes:
        names: its parameters' names in the module it is run as, and in the model. buffers: those of its floating-point
            buffers (running statistics, say), which are each chain's own as well.
        run: (weights by the name in the module, batch, chain) -> the stream after it, or the model's output.
    """

    names: dict[str, str]
    run: Callable[[Weights, Batch, str], Any]
    buffers: dict[str, str] = field(default_factory=dict)

    def __call__(self, weights: Weights, batch: Batch, chain: str) -> Any:
        everything = self.names | self.buffers
        return self.run({name: weights[full] for name, full in everything.items()}, batch, chain)


class Reached(Exception):
    """What stops a forward where no more of it is wanted."""

    def __init__(self, *values: Any) -> None:
        super().__init__()
        self.values = values


class _AtBlocks(Reached):
    """The first block, called with these arguments."""


@dataclass
class Layout:
    """What a model consists of, as one forward shows.

    Attributes:
        blocks: its blocks' names in order; none where they are not known, or not simply one after the other.
        block_class: their class. residuals: by the name of the writing map's weight.
        read: [*, 1] per row of the last block's stream, whether the output depends on it; None: on all.
    """

    blocks: list[str] = field(default_factory=list)
    block_class: str = ""
    residuals: dict[str, Residual] = field(default_factory=dict)
    read: Tensor | None = None
    tuples: bool = False

    @property
    def last_writers(self) -> list[str]:
        """Return the weights that write into the stream in the last block."""
        return [name for name in self.residuals if self.blocks and name.startswith(f"{self.blocks[-1]}.")]


def survey(model: nn.Module, images: Tensor) -> Layout:
    """Find out what a plain module consists of by running it on a few images."""
    known = {name: module for name, module in model.named_modules() if _writers(module)}
    calls: list[tuple[str, Any, Any]] = []
    seen: dict[tuple[str, bool], Any] = {}
    with contextlib.ExitStack() as hooks:
        for name, module in known.items():
            hook = module.register_forward_hook(lambda m, args, out, name=name: calls.append((name, args[:1], out)))
            hooks.callback(hook.remove)
            for inner in _watched(name, module):
                watched = model.get_submodule(inner)
                hook = watched.register_forward_hook(partial(_remember, seen, inner))
                hooks.callback(hook.remove)
        model(images)
    names = [name for name, _, _ in calls]
    chained = all(
        len(after[1]) == 1 and after[1][0] is hidden_of(before[2]) for before, after in itertools.pairwise(calls)
    )
    if not calls or not chained or len(set(names)) < len(names) or len({type(known[n]) for n in names}) > 1:
        return Layout()
    if len(calls[0][1]) != 1 or not isinstance(calls[0][1][0], Tensor):
        return Layout()
    layout = Layout(names, type(known[names[0]]).__name__, tuples=not isinstance(calls[-1][2], Tensor))
    for name in names:
        own = _residuals(name, known[name])
        if all(_is_written(model, weight, residual, seen) for weight, residual in own.items()):
            layout.residuals |= own
    layout.read = _read_rows(model, images, layout, hidden_of(calls[-1][2]))
    return layout


def _remember(
    seen: dict[tuple[str, bool], Any], name: str, module: nn.Module, arguments: tuple[Any, ...], output: Any
) -> None:
    """Keep a module's input, and its output."""
    seen[name, False], seen[name, True] = arguments[0] if arguments else None, hidden_of(output)


def _watched(name: str, block: nn.Module) -> set[str]:
    """Return the modules whose inputs and outputs show how a block writes into the stream."""
    pairs = _writers(block)
    return {
        name,
        *(f"{name}.{norm}" for norm, _ in pairs),
        *(f"{name}.{_writing(block, writer)}" for _, writer in pairs),
    }


def _writing(model: nn.Module, writer: str) -> str:
    """Return the module whose output a writing map's is: nn.MultiheadAttention never calls its own."""
    owner = writer.rpartition(".")[0]
    return owner if isinstance(model.get_submodule(owner), nn.MultiheadAttention) else writer


def _is_written(model: nn.Module, weight: str, residual: Residual, seen: Mapping[tuple[str, bool], Any]) -> bool:
    """Tell if a map's output is added to the stream as it is."""
    writing = _writing(model, weight.removesuffix(".weight"))
    streams = (residual.before, False), (writing, True), (residual.after, residual.at_output)
    values = [seen.get(key) for key in streams]
    tensors = [value for value in values if isinstance(value, Tensor)]
    if len(tensors) < 3 or len({tensor.shape for tensor in tensors}) > 1:
        return False
    before, output, after = tensors
    expected, exact = before + output, after.dtype in (torch.float32, torch.float64)
    return bool((after - expected).abs().max() <= (1e-4 if exact else 3e-2) * expected.abs().max())


def hidden_of(output: Any) -> Any:
    """Return the stream of what a block returns: it, or the first of several things."""
    return output[0] if isinstance(output, tuple | list) else output


def _writers(block: nn.Module) -> tuple[tuple[str, str], ...]:
    for pairs in WRITERS.get(type(block).__name__, ()):
        with contextlib.suppress(AttributeError):
            if all(isinstance(block.get_submodule(path), nn.Module) for pair in pairs for path in pair):
                return pairs
    return ()


def _residuals(name: str, block: nn.Module) -> dict[str, Residual]:
    """Return where the stream is around each writing map of one block."""
    pairs, residuals = _writers(block), {}
    for index, (norm, writer) in enumerate(pairs):
        is_last = index + 1 == len(pairs)
        after = name if is_last else f"{name}.{pairs[index + 1][0]}"
        owner = block.get_submodule(writer.rpartition(".")[0])
        swapped = isinstance(owner, nn.MultiheadAttention) and owner.batch_first
        residuals[f"{name}.{writer}.weight"] = Residual(f"{name}.{norm}", after, is_last, swapped)
    return residuals


def _read_rows(model: nn.Module, images: Tensor, layout: Layout, stream: Tensor) -> Tensor | None:
    """Return which rows of the last stream the output depends on, by its gradient."""
    with torch.enable_grad():
        stream = stream.detach().requires_grad_(True)
        output = tail(layout)(model, {}, images, stream)
        if not isinstance(output, Tensor) or not output.requires_grad:
            return None
        weights = torch.arange(1, output.numel() + 1, dtype=torch.float32, device=output.device).cos()
        (gradient,) = torch.autograd.grad((output.float().flatten() * weights).sum(), stream)
    read = gradient.ne(0).any(dim=-1)
    # a dimension along which all is the same is the batch, of whatever size
    for dim in range(read.ndim):
        if bool((read == read.narrow(dim, 0, 1)).all()):
            read = read.narrow(dim, 0, 1)
    return None if bool(read.all()) or not bool(read.any()) else read[..., None]


@contextlib.contextmanager
def _replaced(modules: Mapping[str, nn.Module], forward: Callable[[str, Any, Any], Any]) -> Iterator[None]:
    """Let modules do something else: ``forward(name, args, keywords)``."""
    try:
        for name, module in modules.items():
            module.__dict__["forward"] = lambda *args, name=name, **keywords: forward(name, args, keywords)
        yield
    finally:
        for module in modules.values():
            module.__dict__.pop("forward", None)


def tail(layout: Layout) -> Callable[[nn.Module, Weights, Tensor, Tensor], Any]:
    """Return how a model is run on from the stream after its last block."""

    def run(model: nn.Module, weights: Weights, images: Tensor, stream: Tensor) -> Any:
        def forward(name: str, args: Any, keywords: Any) -> Any:
            result = stream if name == layout.blocks[-1] else args[0]
            return (result,) if layout.tuples else result

        with _replaced({name: model.get_submodule(name) for name in layout.blocks}, forward):
            return functional_call(model, dict(weights), (images,))

    return run


def cut(model: nn.Module, layout: Layout) -> list[Piece]:
    """Return the pieces of a model in order."""
    full = {id(parameter): name for name, parameter in model.named_parameters()}
    all_names = {name: name for name in full.values()}
    buffers = {name: name for name in float_buffers(model)}

    def run_whole(weights: Weights, batch: Batch, chain: str) -> Any:
        return functional_call(model, dict(weights), (_images(batch, model),))

    if not layout.blocks:
        return [Piece(all_names, run_whole, buffers)]

    def run_head(weights: Weights, batch: Batch, chain: str) -> Any:
        def forward(name: str, args: Any, keywords: Any) -> Any:
            raise _AtBlocks(args, keywords)

        first = layout.blocks[0]
        with _replaced({first: model.get_submodule(first)}, forward):
            try:
                functional_call(model, dict(weights), (_images(batch, model),))
            except _AtBlocks as reached:
                (stream, *others), batch.keywords = reached.values
                batch.others = tuple(others)
                return stream
        raise AssertionError(f"{first}: expected to be called")

    run_tail = tail(layout)

    def run_end(weights: Weights, batch: Batch, chain: str) -> Any:
        images = _images(batch, model)
        return run_tail(model, weights, images, batch.streams[chain].to(images.device))

    within = tuple(f"{block}." for block in layout.blocks)
    outer, others = ({name: name for name in names if not name.startswith(within)} for names in (all_names, buffers))
    blocks = [_block(model, name, full) for name in layout.blocks]
    return [Piece(outer, run_head, others), *blocks, Piece(outer, run_end, others)]


def float_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the floating-point buffers of a module by name."""
    return {name: buffer for name, buffer in model.named_buffers() if buffer.is_floating_point()}


def _block(model: nn.Module, name: str, full: Mapping[int, str]) -> Piece:
    block = model.get_submodule(name)
    # to look for tied parameters in each call takes a tenth of a small block's time
    is_tied = len(list(block.named_parameters(remove_duplicate=False))) > len(list(block.parameters()))
    names = {own: full[id(parameter)] for own, parameter in block.named_parameters()}
    of_model = {id(buffer): own for own, buffer in model.named_buffers()}
    buffers = {own: of_model[id(buffer)] for own, buffer in float_buffers(block).items()}

    def run(weights: Weights, batch: Batch, chain: str) -> Any:
        device = next(iter(weights.values())).device
        arguments = (batch.streams[chain].to(device), *batch.others)
        return hidden_of(functional_call(block, dict(weights), arguments, batch.keywords, tie_weights=is_tied))

    return Piece(names, run, buffers)


def _images(batch: Batch, model: nn.Module) -> Tensor:
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    return batch.images.to(first.device, first.dtype if batch.images.is_floating_point() else None)


def streams_on(device: torch.device, batches: Sequence[Batch], stream: Tensor, chains: int) -> torch.device:
    """Return where all streams are kept. With the model, if they take little of what is free."""
    if device.type != "cuda":
        return device
    size = stream.numel() * stream.element_size() * len(batches) * chains
    return device if size < torch.cuda.mem_get_info(device)[0] // 4 else torch.device("cpu")
