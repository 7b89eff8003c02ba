"""The engine of a server: one folded model, each item at its own preference."""

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pareto_merging.checkpoints import encoders
from pareto_merging.data.tasks import ZeroShotHead
from pareto_merging.errors import UserError
from pareto_merging.model.files import load_heads, read_folded_header
from pareto_merging.model.state import pareto_state
from pareto_merging.preferences import equal_preference, parse_preferences
from pareto_merging.serving import inputs
from pareto_merging.serving.graphs import Graphs, batch_sizes, can_capture
from pareto_merging.serving.layers import serve_layers
from pareto_merging.system.devices import find_device
from pareto_merging.system.progress import progress_bar
from pmkernels.autocast import no_autocast

# from this many items on, a preference they share is worth merging at once
MERGE_FROM = 32


class Engine:
    """A folded model, ready to serve: ``features = engine(images, preferences)``.

    It holds one model: W with λ folded in, and the low-rank terms (:mod:`pareto_merging.serving.layers`). On a CUDA GPU
    the forward of every batch size of :attr:`buckets` is captured as a CUDA graph at its first use (or by
    :meth:`warm_up`); see :class:`.graphs.Graphs`.

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
        wanted = inputs.check_dtype(dtype)
        self.device = find_device(device)
        self.max_batch, self.keep_merged = max_batch, keep_merged
        self._header = read_folded_header(path)
        with torch.inference_mode(False), torch.no_grad():
            self._model, self.dtype = inputs.load_model(path, self._header, plain, self.device, wanted)
            self._state = pareto_state(self._model)
            self._served, self.per_item = serve_layers(self._model)
            self.task_names = self._state.task_names
            self.heads: dict[str, ZeroShotHead] = {name: h.to(self.device) for name, h in load_heads(path).items()}
            self._equal = self._state.now.gamma = equal_preference(len(self.task_names)).to(self.device)
            captures = cuda_graphs and can_capture(self.device)
            self._graphs = Graphs(self._equal, self.dtype, max_batch) if captures else None
        self._vectorised = self.per_item
        self._lock = threading.RLock()
        self._kept: Tensor | None = None
        self._last_shared: Tensor | None = None
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
        """Return the bytes of its weights, kept merged ones included, heads and graphs not."""
        tensors = [*self._model.parameters(), *self._model.buffers()]
        tensors += [part.merged for part in self._served if part.merged is not None]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(storages.values())

    @property
    def buckets(self) -> list[int]:
        """Return the batch sizes that are computed on a GPU: powers of two, and ``max_batch``."""
        return batch_sizes(self.max_batch)

    @property
    def cuda_graphs(self) -> bool:
        """Return whether CUDA graphs are used: not once something could not be captured."""
        return self._graphs is not None and self._graphs.enabled

    @cached_property
    def preprocessing(self) -> dict[str, Any] | None:
        """Return how image files become the model's input (:func:`.encoders.default_preprocessing`), None: unknown."""
        described = self._header.get("preprocessing")
        if described is not None:
            return inputs.preprocessing_in_header(described)
        return encoders.default_preprocessing(self._header["encoder"]) if self._header["encoder"] else None

    @property
    def image_size(self) -> int:
        """Return the side in pixels of its images; UserError where the file does not say."""
        return int(self._known_preprocessing["size"])

    @cached_property
    def preprocess(self) -> Callable[[Any], Tensor]:
        """Return the function from any PIL image to its input. That is float32 [3, size, size] on the CPU."""
        from open_clip import image_transform

        how = self._known_preprocessing
        return image_transform(int(how["size"]), is_train=False, mean=tuple(how["mean"]), std=tuple(how["std"]))

    @property
    def _known_preprocessing(self) -> dict[str, Any]:
        if self.preprocessing is None:
            raise UserError("engine: expected a file that says what images it takes, got one without an encoder")
        return self.preprocessing

    @property
    def card(self) -> dict[str, Any]:
        """Return what the file says of itself, and how it is served, as plain JSON."""
        left_out = ("task_names", "layers", "logit_scales", "tasks")
        classes = {name: head.weight.shape[0] for name, head in self.heads.items()}
        return {
            "tasks": [{"name": name, "classes": classes.get(name)} for name in self.task_names],
            **{key: value for key, value in self._header.items() if key not in left_out},
            "preprocessing": self.preprocessing,
            "parameters": sum(p.numel() for p in self._model.parameters()),
            "bytes": self.bytes,
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "preference_per_item": self.per_item,
        }

    def __call__(self, images: Tensor, preferences: inputs.Preferences) -> Tensor:
        """Compute the features of each image by the model of its own preference.

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
        gamma = inputs.read_preferences(preferences, self.task_names)
        if gamma.ndim == 2 and len(gamma) != len(images):
            expected = f"one for each of {len(images)} images (or one for all)"
            raise ValueError(f"preferences: expected {expected}, got {len(gamma)}")
        return self.features(images, gamma)

    def features(self, images: Tensor, gamma: Tensor) -> Tensor:
        """Compute what calling the engine does. Images and γ, [n, K] or [K], were checked on their way in."""
        count = len(images)
        if gamma.ndim == 2 and (count == 1 or (not gamma.is_cuda and bool((gamma == gamma[:1]).all()))):
            # all items are known to share one
            gamma = gamma[0]
        if gamma.ndim == 2 and not self.per_item:
            raise ValueError(
                "preferences: expected one for the whole batch (a low-rank term is neither in an nn.Linear nor in an "
                f"nn.MultiheadAttention layer, or has no learned core), got one for each of {count} images"
            )
        with self._in_order():
            mode = self._mode(gamma, count)
            if mode == "merged":
                self._keep(gamma)
            if count <= self.max_batch:
                return self._compute(mode, images, gamma)
            cuts = [slice(start, start + self.max_batch) for start in range(0, count, self.max_batch)]
            pieces = [self._compute(mode, images[cut], gamma[cut] if gamma.ndim == 2 else gamma) for cut in cuts]
            return torch.cat(pieces)

    def classify(self, images: Tensor, preferences: inputs.Preferences, task: str) -> Tensor:
        """Compute logits ``[n, classes]`` of ``task``'s zero-shot head, float32; otherwise as calling the engine.

        Raises ValueError for a task without a head.
        """
        if task not in self.heads:
            raise ValueError(f"task: expected one with a head, {', '.join(self.heads) or '(none)'}; got {task}")
        features = self(images, preferences)
        with self._in_order():
            logits: Tensor = self.heads[task](features)
            return logits

    def sweep(self, images: Tensor, preferences: inputs.Preferences) -> Tensor:
        """Compute the same images at each of R preferences: ``[R, n, dim]``.

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
            gammas = inputs.read_preferences(preferences, self.task_names)
        gammas = gammas[None] if gammas.ndim == 1 else gammas
        if not len(gammas):
            raise ValueError("preferences: expected at least one, got none")
        with self._in_order():
            # few images at a time and all preferences: the shared part is then computed once for an image
            each = max(1, self.max_batch // len(gammas))
            pieces = []
            for i in range(0, len(images), each):
                piece = images[i : i + each].to(self.device, self.dtype)
                together = max(1, self.max_batch // len(piece))
                cuts = [gammas[j : j + together] for j in range(0, len(gammas), together)]
                pieces.append(torch.cat([self._at(piece, cut) for cut in cuts]))
            return torch.cat(pieces, dim=1)

    def warm_up(self, *, item_shape: Sequence[int] | None = None, shared: bool = True, progress: bool = False) -> None:
        """Compute a batch of every size once, so that no request waits for that.

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
        inputs.check_images(images, None if self.preprocessing is None else self.preprocessing["size"])

    def _mode(self, gamma: Tensor, count: int) -> str:
        """Choose how to compute. ``rows``: a preference an item; ``shared``: one for all; ``merged``: W(γ) kept."""
        if gamma.ndim == 2:
            return "rows"
        if self.keep_merged and self._served and not gamma.is_cuda:
            again = self._last_shared is not None and torch.equal(gamma, self._last_shared)
            self._last_shared = gamma.clone()
            if again or count >= MERGE_FROM:
                return "merged"
        return "shared"

    def _keep(self, gamma: Tensor) -> None:
        if self._kept is not None and torch.equal(self._kept, gamma):
            return
        self._kept = None
        if self._graphs is not None and self._graphs.enabled:
            self._graphs.merge(gamma, self._merge)
        else:
            self._merge(gamma.to(self.device))
        self._kept = gamma.clone()

    def _merge(self, gamma: Tensor) -> None:
        for part in self._served:
            part.keep(gamma)

    def _compute(self, mode: str, images: Tensor, gamma: Tensor) -> Tensor:
        """Compute the features of up to ``max_batch`` images."""
        if self._graphs is not None and self._graphs.enabled:
            features = self._graphs.replay(mode, images, gamma, self._forward)
            if features is not None:
                return features
        return self._forward(mode, images.to(self.device, self.dtype), gamma.to(self.device))

    def _forward(self, mode: str, images: Tensor, gamma: Tensor) -> Tensor:
        for part in self._served:
            part.in_use = mode == "merged"
        self._state.now.gamma = gamma
        features = self._model(images)
        if not isinstance(features, Tensor):
            raise TypeError(f"model: expected it to return a tensor of features, got {type(features).__name__}")
        return features

    @contextlib.contextmanager
    def _in_order(self) -> Iterator[None]:
        """Let one call compute at a time, in no mode of the caller's. Each waits for the last, on whatever stream."""
        with self._lock, torch.inference_mode(False), torch.no_grad(), no_autocast(self.device.type):
            stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
            if stream is not None and self._done is not None:
                stream.wait_event(self._done)
            try:
                yield
            finally:
                if stream is not None:
                    self._done = stream.record_event()

    def _at(self, images: Tensor, gammas: Tensor) -> Tensor:
        """Compute features [R, n, dim] at a few preferences [R, K]."""
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
                self._state.now.gamma = self._equal
        return torch.stack([self._compute("shared", images, gamma) for gamma in gammas])
