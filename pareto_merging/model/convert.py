"""A plain module turned into a Pareto one in place, and back."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import nn

from pareto_merging.model.layer import ParetoModule, merged_property, pareto_modules
from pareto_merging.model.parameters import PARTS, part_name
from pareto_merging.model.state import ParetoState, pareto_states
from pareto_merging.system.register import add_member

Fits: TypeAlias = Callable[[nn.Module, Sequence[str]], bool]


@functools.cache
def _pareto_class(original: Any, names: tuple[str, ...]) -> type[nn.Module]:
    """Make the Pareto form of any class: the parameters ``names`` are read as merged tensors."""

    def reduce(self: Any, protocol: Any) -> Any:
        return _blank, (original, names), self.__getstate__()

    body: dict[str, Any] = {name: merged_property(name) for name in names}
    if issubclass(original, nn.RNNBase):
        # RNNBase keeps its own list of the parameters; it must be the merged ones
        body["_flat_weights"] = property(
            lambda self: [getattr(self, name, None) for name in self._flat_weights_names], lambda self, value: None
        )
    body |= {"__reduce_ex__": reduce, "__module__": original.__module__, "__doc__": original.__doc__}
    return type(f"Pareto{original.__name__}", (ParetoModule, original), body)


def _blank(original: Any, names: tuple[str, ...]) -> nn.Module:
    cls: Any = _pareto_class(original, names)
    return cast(nn.Module, cls.__new__(cls))


# class of a module -> its Pareto form, and whether that can have those parameters of that module merged
LAYERS: dict[type[nn.Module], tuple[type[ParetoModule], Fits]] = {}


def register(original: type[nn.Module], pareto: type[ParetoModule], fits: Fits, *, replace: bool = False) -> None:
    """Give modules of exactly the class ``original`` the Pareto form ``pareto`` from now on.

    Args:
        fits: whether the form can have those parameters of that module merged; where not, and for every class that is
            not registered, the module keeps its own forward and reads merged tensors.

    Raises:
        ValueError: as :func:`.register.add_member`.
    """
    add_member(LAYERS, "layer", original, (pareto, fits), replace=replace)


def convert(module: nn.Module, names: Sequence[str], state: ParetoState, has_parts: bool = False) -> ParetoModule:
    """Turn ``module`` into the Pareto form of its class, in place. The parts of ``names`` are the caller's to register.

    Raises ValueError if it has an attribute that a part would be called, unless it ``has_parts`` already.
    """
    original: Any = type(module)
    pareto, fits = LAYERS.get(original, (None, None))
    for name, part in itertools.product(names, PARTS):
        attribute = part_name(name, part)
        if not has_parts and hasattr(module, attribute):
            raise ValueError(f"{original.__name__}: expected no attribute {attribute}, which {name}'s parts need")
    is_known = fits is not None and fits(module, names)
    module.__class__ = pareto if is_known and pareto is not None else _pareto_class(original, tuple(names))
    assert isinstance(module, ParetoModule)
    module.pareto_names = tuple(names)
    module.pareto_original = original
    module.pareto_groups = {}
    module.pareto = state
    module.__dict__.pop("_flat_weights", None)
    return module


def restore(module: ParetoModule) -> nn.Module:
    """Undo :func:`convert` in place: the original class, none of our attributes, no parts."""
    for name, part in itertools.product(module.pareto_names, PARTS):
        module._parameters.pop(part_name(name, part), None)
    module.__class__ = cast(Any, module.pareto_original)
    for attribute in ("pareto_names", "pareto_original", "pareto_groups", "pareto_batch_dim", "pareto"):
        module.__dict__.pop(attribute, None)
    if isinstance(module, nn.RNNBase):
        module.__dict__["_flat_weights"] = [getattr(module, name, None) for name in module._flat_weights_names]
    return module


@contextlib.contextmanager
def unchanged_on_error(model: Any, *, buffers: bool) -> Iterator[None]:
    """Guard a block that turns the plain module ``model`` into a Pareto model. If it fails, the module is plain again.

    ``buffers``: whether it may change the numbers in floating-point buffers, which are then kept until it is through.
    What is no plain module to begin with is not touched.
    """
    if not isinstance(model, nn.Module) or pareto_states(model):
        yield
        return
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    kept = [(tensor, tensor.clone()) for tensor in model.buffers() if buffers and tensor.is_floating_point()]
    try:
        yield
    except BaseException:
        make_plain(model)
        for parameter, flag in required:
            parameter.requires_grad_(flag)
        with torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)
        raise


def make_plain(model: nn.Module) -> None:
    """Give every module its original class again, without our attributes and parts. W0 is where it was."""
    for _, pareto in list(pareto_modules(model)):
        restore(pareto)
    for module in model.modules():
        if isinstance(module.__dict__.get("pareto"), ParetoState):
            del module.__dict__["pareto"]
        module.__dict__.update(module.__dict__.pop("pareto_flags", {}))


def prepare_transformers(model: nn.Module) -> None:
    """Prepare torch's own transformer blocks for Pareto layers; :func:`.fold.merge` puts their flags back.

    nn.TransformerEncoderLayer has a fused inference path that wants each weight as one tensor, nn.TransformerEncoder
    one with nested tensors; the ordinary path calls the layers, which can do more (a preference per item). And in a
    block whose attention is sequence-first, the linear layers beside it have the items along dimension 1 as well.
    """
    for module in list(model.modules()):
        if not any(True for _ in pareto_modules(module)):
            continue
        flags = {}
        if isinstance(module, nn.TransformerEncoderLayer):
            flags = {"activation_relu_or_gelu": 0}
        elif isinstance(module, nn.TransformerEncoder):
            flags = {"enable_nested_tensor": False, "use_nested_tensor": False}
        if flags:
            module.__dict__.setdefault("pareto_flags", {name: getattr(module, name) for name in flags})
            module.__dict__.update(flags)
        attentions = [child for child in module.children() if isinstance(child, nn.MultiheadAttention)]
        if any(not attention.batch_first for attention in attentions):
            for _, inner in pareto_modules(module):
                inner.pareto_batch_dim = 1
