"""The engine of a server: one folded model in memory, and for every item of a batch the model of its own preference."""

from __future__ import annotations

import contextlib
import copy
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from pareto_merging.checkpoints import encoders
from pareto_merging.data.heads import ZeroShotHead
from pareto_merging.errors import UserError
from pareto_merging.model.files import load_folded, load_heads, read_folded_header
from pareto_merging.model.modules import LEARNED, part_name
from pareto_merging.model.state import pareto_state
from pareto_merging.preferences import (
    Preference,
    check_preference,
    equal_preference,
    parse_preference,
    parse_preferences,
)
from pareto_merging.serving.layers import serve_layers
from pareto_merging.system.devices import find_device
from pareto_merging.system.files import read_shapes
from pareto_merging.system.progress import progress_bar
from pmkernels.checks import no_autocast
from pmkernels.graphs import capture, warm_up

Preferences: TypeAlias = Preference | str | Sequence[Preference | str]
Result = TypeVar("Result")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
# item shapes that graphs are kept for
MAX_SHAPES = 4
# from this many items on, a preference they share is worth merging at once
MERGE_FROM = 32


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    features: Tensor


class Engine:
    """A folded model, ready to serve: ``features = engine(images, preferences)``.

    It holds one model: W with λ folded in, and the low-rank terms (:mod:`pareto_merging.serving.layers`). On a CUDA GPU
    the forward of every batch size of :attr:`buckets` is captured as a CUDA graph at its first use (or by
    :meth:`warm_up`); a batch is padded to the next one, and what the padding computes is never returned. Preferences
    are copied into memory the graphs read: a new one costs no capture, no allocation and no wait for the GPU.

    Threads may share an engine; their calls run one after the other. While a GPU's graph is captured, at the first use
    of a batch size, other threads should leave that GPU alone: call :meth:`warm_up` first. Two engines on one GPU must
    not compute at the same time on different streams (their graphs share the libraries' workspace).

    Attributes:
        task_names: the tasks, in the order of a preference's entries.
        heads: the zero-shot heads of the file by task name; perhaps none.
        device, dtype, max_batch: as it was made.
        card: what the file says of itself, as plain JSON.
        per_item: whether each item of a batch may have its own preference: every low-rank term is in an nn.Linear or
            nn.MultiheadAttention, and its core is learned.
    """

    def __init__(
        self,
        folded_file: str | Path,
        device: str | torch.device = "auto",
        dtype: torch.dtype | str | None = None,
        *,
        plain: nn.Module | None = None,
        max_batch: int = 128,
        cuda_graphs: bool = True,
        keep_merged: bool = True,
    ) -> None:
        """Load a folded file.

        Args:
            folded_file: as :func:`pareto_merging.save_folded` or ``pareto-merging export --folded`` wrote it.
            device: where to compute; ``auto``: a CUDA GPU where there is one.
            dtype: of weights and activations: float32, bfloat16, float16 or float64, or their names; by default the
                file's.
            plain: a module of the original class, where the file does not say how to build one; it is copied.
            max_batch: items computed at a time; a larger batch is cut. On a GPU, the largest graph.
            cuda_graphs: capture CUDA graphs on a CUDA GPU.
            keep_merged: keep W(γ) of the last preference that all items of a batch shared, once it has come twice or
                for :data:`MERGE_FROM` items: such batches then cost what the plain model costs, and the kept weights
                (those with a low-rank term: a third of a ViT) are memory more. Allocated when first wanted.

        Raises:
            UserError: no such file or device, a foreign or damaged file. ValueError: another argument.
        """
        path = Path(folded_file)
        if isinstance(max_batch, bool) or not isinstance(max_batch, int) or max_batch < 1:
            raise ValueError(f"max_batch: expected at least 1 item, got {max_batch!r}")
        wanted = _dtype(dtype)
        self.device = find_device(device)
        self.max_batch, self.keep_merged = max_batch, keep_merged
        self._header = read_folded_header(path)
        stored = _stored_dtype(path, self._header)
        with torch.inference_mode(False), torch.no_grad():
            plain = encoders.build(self._header["encoder"]) if plain is None else copy.deepcopy(plain)
            # in the file's own type: loading into another one would round
            model = load_folded(path, plain.to(stored))
            self.dtype = wanted or stored
            self._model = model.to(self.device, self.dtype).requires_grad_(False).eval()
            self._state = pareto_state(model)
            self._served, self.per_item = serve_layers(model)
            self._shared = self._served[0].shared if self._served else None
            self.task_names = self._state.task_names
            self.heads: dict[str, ZeroShotHead] = {name: h.to(self.device) for name, h in load_heads(path).items()}
            equal = equal_preference(len(self.task_names)).to(self.device)
            # what the graphs read: a preference for each item, and the one that all of them share
            self._static_gamma = equal.repeat(max_batch, 1)
            self._static_shared = equal.clone()
            self._state.gamma = equal
        self.cuda_graphs = cuda_graphs and _can_capture(self.device)
        self._vectorised = self.per_item
        self._lock = threading.RLock()
        self._kept: Tensor | None = None
        self._last_shared: Tensor | None = None
        self._graphs: dict[Any, _Captured] = {}
        self._static_images: dict[Any, Tensor] = {}
        self._merging: torch.cuda.CUDAGraph | None = None
        self._pool: Any = None
        self._captured: set[str] = set()
        self._done: torch.cuda.Event | None = None
        if self.device.type == "cuda":
            # the plain weights are gone, and no other tensor has their size
            torch.cuda.empty_cache()
            self._done = torch.cuda.current_stream(self.device).record_event()

    def __repr__(self) -> str:
        tasks = ", ".join(self.task_names)
        return f"Engine({tasks}; {self.device}, {str(self.dtype).removeprefix('torch.')}, {self.bytes:,} bytes)"

    @property
    def bytes(self) -> int:
        """Memory of the weights it holds, kept merged ones included; without heads and graphs."""
        tensors = [*self._model.parameters(), *self._model.buffers()]
        tensors += [part.merged for part in self._served if part.merged is not None]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values())

    @property
    def buckets(self) -> list[int]:
        """The batch sizes that are computed on a GPU: powers of two, and ``max_batch``."""
        return sorted({*(2**power for power in range(self.max_batch.bit_length())), self.max_batch})

    @cached_property
    def preprocessing(self) -> dict[str, Any] | None:
        """How image files become the model's input (:func:`.encoders.default_preprocessing`); None where
        the file does not know."""
        found = self._header.get("preprocessing")
        if found is not None:
            return _checked_preprocessing(found)
        return encoders.default_preprocessing(self._header["encoder"]) if self._header["encoder"] else None

    @property
    def image_size(self) -> int:
        """The side of the square images it takes, in pixels. UserError where the file does not say."""
        if self.preprocessing is None:
            raise UserError("engine: expected a file that says what images it takes, got one without an encoder")
        return int(self.preprocessing["size"])

    @cached_property
    def preprocess(self) -> Callable[[Any], Tensor]:
        """A PIL image of any size and mode -> its input, float32 [3, size, size] on the CPU."""
        from open_clip import image_transform

        size, how = self.image_size, self.preprocessing
        assert how is not None
        return image_transform(size, is_train=False, mean=tuple(how["mean"]), std=tuple(how["std"]))

    @property
    def card(self) -> dict[str, Any]:
        """What the file says of itself, and how it is served, as plain JSON."""
        left_out = ("task_names", "layers", "logit_scales", "tasks")
        said = {key: value for key, value in self._header.items() if key not in left_out}
        tasks: list[dict[str, Any]] = []
        for name in self.task_names:
            head = self.heads.get(name)
            tasks.append({"name": name, "classes": None if head is None else head.weight.shape[0]})
        return {
            "tasks": tasks,
            **said,
            "preprocessing": self.preprocessing,
            "parameters": sum(p.numel() for p in self._model.parameters()),
            "bytes": self.bytes,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "preference_per_item": self.per_item,
        }

    def __call__(self, images: Tensor, preferences: Preferences) -> Tensor:
        """The features of each image by the model of its own preference.

        Args:
            images: ``[n, 3, H, W]``, floating-point, as :attr:`preprocess` makes them; on any device.
            preferences: one for each image, ``[n, K]`` or a list of n, each K numbers, by name (``{"MNIST": 0.7}``, the
                rest is shared out) or as text (``"MNIST=0.7"``, ``"equal"``); or one for all. Of a tensor on a GPU
                the values are not looked at, which would wait for it; any other must be a preference
                (:func:`pareto_merging.preferences.check_preference`), and equal ones take the way of a shared one.

        Returns:
            Features ``[n, dim]`` in the engine's dtype on its device: a tensor of the caller's own.

        Raises:
            TypeError, ValueError: not such images, no preferences or another number of them.
        """
        self._check_images(images)
        count = len(images)
        gamma = self._preferences(preferences, count)
        if gamma.ndim == 2 and not self.per_item:
            raise ValueError(
                "preferences: expected one for the whole batch (a low-rank term is neither in an nn.Linear nor in an "
                f"nn.MultiheadAttention layer, or has no learned core), got one for each of {count} images"
            )
        with self._in_order():
            mode = self._mode(gamma, count)
            if count <= self.max_batch:
                return self._compute(mode, images, gamma)
            return torch.cat(
                [
                    self._compute(
                        mode,
                        images[i : i + self.max_batch],
                        gamma[i : i + self.max_batch] if gamma.ndim == 2 else gamma,
                    )
                    for i in range(0, count, self.max_batch)
                ]
            )

    def classify(self, images: Tensor, preferences: Preferences, task: str) -> Tensor:
        """Logits ``[n, classes]`` of ``task``'s zero-shot head, float32; otherwise as calling the engine.

        Raises ValueError for a task without a head.
        """
        if task not in self.heads:
            raise ValueError(f"task: expected one with a head, {', '.join(self.heads) or '(none)'}; got {task}")
        features = self(images, preferences)
        with self._in_order():
            logits: Tensor = self.heads[task](features)
            return logits

    def sweep(self, images: Tensor, preferences: Preferences) -> Tensor:
        """The same images at each of R preferences: ``[R, n, dim]``.

        What does not depend on γ is computed once for all of them (for every ``max_batch`` of them): everything before
        the first low-rank term, and that layer's product with W. ``max_batch`` bounds images times preferences computed
        at a time.

        Args:
            images: as calling the engine. preferences: ``[R, K]``, a list of R, or the command line's text:
                ``"grid:11"``, ``"one-hot;equal"`` (:func:`pareto_merging.preferences.parse_preferences`).

        Raises:
            TypeError, ValueError: as calling the engine.
        """
        self._check_images(images)
        if isinstance(preferences, str):
            gammas = torch.stack(parse_preferences(preferences, self.task_names))
        else:
            gammas = self._as_tensor(preferences)
        gammas = gammas[None] if gammas.ndim == 1 else gammas
        if not len(gammas):
            raise ValueError("preferences: expected at least one, got none")
        with self._in_order():
            # few images at a time and all preferences: the shared part is then computed once for an image
            each = max(1, self.max_batch // len(gammas))
            pieces = [self._swept(images[i : i + each], gammas) for i in range(0, len(images), each)]
            return torch.cat(pieces, dim=1)

    def warm_up(self, *, item_shape: Sequence[int] | None = None, shared: bool = True, progress: bool = False) -> None:
        """Compute a batch of every size once: kernels are compiled and graphs captured before the first request.

        Args:
            item_shape: of one input, by default ``(3, size, size)``.
            shared: on a GPU also the way of a preference that a batch shares, with its memory (``keep_merged``).
        """
        shape = (3, self.image_size, self.image_size) if item_shape is None else tuple(item_shape)
        everything = self.cuda_graphs or self.device.type != "cpu"
        sizes = [1, *(self.buckets[:0:-1] if everything else ())]
        merges = self.keep_merged and bool(self._served)
        todo = [("rows", size) for size in sizes if self.per_item]
        todo += [("shared", size) for size in sizes if not merges or size <= MERGE_FROM]
        todo += [("merged", size) for size in sizes if merges and shared and everything]
        gamma = equal_preference(len(self.task_names))
        with progress_bar("warming up", len(todo), enabled=progress) as advance:
            for number, (mode, size) in enumerate(todo, start=1):
                with self._in_order():
                    images = torch.zeros(size, *shape, dtype=self.dtype, device=self.device)
                    if mode == "merged":
                        self._keep(gamma)
                    self._compute(mode, images, gamma.expand(size, -1) if mode == "rows" else gamma)
                advance(number, f"batch of {size}")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _check_images(self, images: Tensor) -> None:
        if not isinstance(images, Tensor) or not images.is_floating_point():
            kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images: expected a floating-point tensor, as engine.preprocess makes them, got {kind}")
        if images.ndim < 2 or not len(images):
            raise ValueError(f"images: expected [n, …] with n at least 1, got {list(images.shape)}")
        size = None if self.preprocessing is None else self.preprocessing["size"]
        if size is not None and images.shape[1:] != (3, size, size):
            raise ValueError(f"images: expected shape [n, 3, {size}, {size}], got {list(images.shape)}")

    def _as_tensor(self, preferences: Preferences) -> Tensor:
        """[K] or [n, K]; on a GPU only if it came from there."""
        tasks = len(self.task_names)
        if isinstance(preferences, Tensor) and preferences.is_cuda:
            if preferences.ndim not in (1, 2) or preferences.shape[-1] != tasks or not preferences.is_floating_point():
                expected = f"floating-point [{tasks}] or [n, {tasks}]"
                raise ValueError(f"preferences: expected {expected}, got {list(preferences.shape)} {preferences.dtype}")
            return preferences.detach().float()
        if isinstance(preferences, str):
            return parse_preference(preferences, self.task_names)
        if isinstance(preferences, list | tuple) and any(_is_preference(one) for one in preferences):
            return torch.stack([self._one(one) for one in preferences])
        return check_preference(preferences, self.task_names).detach()  # type: ignore[arg-type]

    def _one(self, preference: Any) -> Tensor:
        if isinstance(preference, str):
            return parse_preference(preference, self.task_names)
        if isinstance(preference, int | float):
            raise ValueError("preferences: expected numbers, or one preference for each item, got a mixture")
        given = torch.as_tensor(preference) if hasattr(preference, "__array__") else preference
        return check_preference(given, self.task_names, per_item=False).detach().cpu()

    def _preferences(self, preferences: Preferences, count: int) -> Tensor:
        """[K] where all items are known to share one, else [n, K]."""
        gamma = self._as_tensor(preferences)
        if gamma.ndim == 2 and len(gamma) != count:
            raise ValueError(f"preferences: expected one for each of {count} images (or one for all), got {len(gamma)}")
        if gamma.ndim == 2 and (len(gamma) == 1 or (not gamma.is_cuda and bool((gamma == gamma[:1]).all()))):
            return gamma[0]
        return gamma

    def _mode(self, gamma: Tensor, count: int) -> str:
        """How to compute: ``rows`` (a preference an item), ``shared`` (one for all), ``merged`` (one whose W(γ) is
        kept)."""
        if gamma.ndim == 2:
            return "rows"
        if self.keep_merged and self._served and not gamma.is_cuda:
            again = self._last_shared is not None and torch.equal(gamma, self._last_shared)
            self._last_shared = gamma.clone()
            if again or count >= MERGE_FROM:
                self._keep(gamma)
                return "merged"
        return "shared"

    def _keep(self, gamma: Tensor) -> None:
        if self._kept is not None and torch.equal(self._kept, gamma):
            return
        self._kept = None
        if not self.cuda_graphs:
            self._merge(gamma.to(self.device))
        else:
            self._static_shared.copy_(gamma, non_blocking=True)
            if self._merging is None:
                # the memory that is kept must not be the graph's own
                self._merge(self._static_shared)
                found = self._capture("merge", lambda: self._merge(self._static_shared))
                self._merging = None if found is None else found[0]
            if self._merging is not None:
                self._merging.replay()
        self._kept = gamma.clone()

    def _merge(self, gamma: Tensor) -> None:
        for part in self._served:
            part.keep(gamma)

    def _compute(self, mode: str, images: Tensor, gamma: Tensor) -> Tensor:
        """Features of up to ``max_batch`` images."""
        if self.cuda_graphs:
            features = self._replayed(mode, images, gamma)
            if features is not None:
                return features
        return self._forward(mode, images.to(self.device, self.dtype), gamma.to(self.device))

    def _forward(self, mode: str, images: Tensor, gamma: Tensor) -> Tensor:
        if self._shared is not None:
            self._shared.in_use = mode == "merged"
        self._state.gamma = gamma
        features = self._model(images)
        if not isinstance(features, Tensor):
            raise TypeError(f"model: expected it to return a tensor of features, got {type(features).__name__}")
        return features

    def _replayed(self, mode: str, images: Tensor, gamma: Tensor) -> Tensor | None:
        """The same by a CUDA graph of the next larger batch; None where the model cannot be captured."""
        count, shape = len(images), tuple(images.shape[1:])
        key = (mode, next(size for size in self.buckets if size >= count), shape)
        if shape not in self._static_images and len(self._static_images) == MAX_SHAPES:
            return None
        static = self._static_images.get(shape)
        if static is None:
            static = torch.zeros(self.max_batch, *shape, dtype=self.dtype, device=self.device)
        read = self._static_gamma[: key[1]] if mode == "rows" else self._static_shared
        _copy(gamma, read[:count] if mode == "rows" else read)
        _copy(images, static[:count])
        captured = self._graphs.get(key)
        if captured is None:
            batch = static[: key[1]]
            found = self._capture(mode, lambda: self._forward(mode, batch, read))
            if found is None:
                return None
            self._static_images[shape] = static
            captured = self._graphs[key] = _Captured(*found)
        captured.graph.replay()
        return captured.features[:count].clone()

    def _capture(self, kind: str, function: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result] | None:
        """Graph and result; None, and no graphs from here on, where something in it cannot be captured."""
        warm_up(function, self.device)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            # what one batch size does without waiting for the GPU, the others do too
            found = capture(function, self.device, self._pool, probe=kind not in self._captured)
            self._captured.add(kind)
            return found
        except RuntimeError as error:
            if "out of memory" in str(error):
                raise
            self.cuda_graphs = False
            self._graphs.clear()
            self._static_images.clear()
            warnings.warn(f"engine: computed without CUDA graphs, because {error}", stacklevel=5)
            return None

    @contextlib.contextmanager
    def _in_order(self) -> Iterator[None]:
        """One call at a time, in no mode of the caller's; calls on several streams share the engine's memory, so each
        waits for the last."""
        with (
            self._lock,
            torch.inference_mode(False),
            torch.no_grad(),
            no_autocast(self.device.type),
        ):
            stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
            if stream is not None and self._done is not None:
                stream.wait_event(self._done)
            try:
                yield
            finally:
                if stream is not None:
                    self._done = stream.record_event()

    def _swept(self, images: Tensor, gammas: Tensor) -> Tensor:
        images = images.to(self.device, self.dtype)
        together = max(1, self.max_batch // len(images))
        return torch.cat([self._at(images, gammas[i : i + together]) for i in range(0, len(gammas), together)])

    def _at(self, images: Tensor, gammas: Tensor) -> Tensor:
        """[R, n, dim] for a few preferences [R, K]."""
        if self._vectorised:
            try:
                with warnings.catch_warnings():
                    # attention on the CPU is computed one preference at a time
                    warnings.filterwarnings("ignore", message="There is a performance drop")
                    gammas = gammas.to(self.device)
                    return torch.vmap(lambda gamma: self._forward("rows", images, gamma))(gammas)
            except (RuntimeError, ValueError, TypeError) as error:
                if "out of memory" in str(error):
                    raise
                # something in the model cannot be vectorised; what is wrong besides shows below
                self._vectorised = False
            finally:
                self._state.gamma = self._static_shared
        return torch.stack([self._compute("shared", images, gamma) for gamma in gammas])


def _is_preference(value: Any) -> bool:
    """One of several, in a form that a tensor cannot be made of as it is."""
    return isinstance(value, Mapping | str) or (hasattr(value, "__array__") and bool(getattr(value, "ndim", 0)))


def _copy(source: Tensor, target: Tensor) -> None:
    """Without waiting for the GPU, unless the caller could write into ``source`` before it has been read."""
    target.copy_(source, non_blocking=not source.is_pinned())


def _stored_dtype(path: Path, header: Mapping[str, Any]) -> torch.dtype:
    """Of most of a folded file's weights; what was learned is float32, whatever the model is."""
    learned = {
        f"model.{module}.{part_name(name, part)}" if module else f"model.{part_name(name, part)}"
        for module, entry in header["layers"].items()
        for name in entry["low_rank"]
        for part in LEARNED
    }
    found: dict[torch.dtype, int] = {}
    for name, (shape, kind) in read_shapes(path).items():
        if name.startswith("model.") and name not in learned and kind in _STORED:
            found[_STORED[kind]] = found.get(_STORED[kind], 0) + math.prod(shape)
    return max(found, key=lambda dtype: found[dtype], default=torch.float32)


def _can_capture(device: torch.device) -> bool:
    return device.type == "cuda"


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and found not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise ValueError(f"dtype: expected one of {names}, got {dtype}")
    return found


def _checked_preprocessing(found: Any) -> dict[str, Any]:
    """What a header says, or UserError: a size, and three finite numbers each as mean and std."""
    numbers = all(
        isinstance(found, dict)
        and isinstance(found.get(key), list)
        and len(found[key]) == 3
        and all(isinstance(v, int | float) and math.isfinite(v) for v in found[key])
        for key in ("mean", "std")
    )
    if not numbers or not isinstance(found.get("size"), int) or found["size"] < 1 or not all(found["std"]):
        raise UserError(
            f"preprocessing: expected size, mean and std of three channels in the header, got {found!r:.80}"
        )
    return dict(found)
