"""Writes the files beside it: pickles as in the release of task_vectors, by open_clip 2.0.2, which that code used.

    pip download open_clip_torch==2.0.2 --no-deps
    unzip open_clip_torch-2.0.2-py3-none-any.whl -d /tmp/open_clip_2.0.2
    PYTHONPATH=/tmp/open_clip_2.0.2:tests python tests/data/task_vectors/make.py

Each is a whole ``ImageEncoder`` or ``ClassificationHead`` of ``src.modeling`` around open_clip's classes of that time,
with the transforms of both, for a model small enough to commit. expected.safetensors has, for each file, the live
model's tensors, its features of ``images`` and its preprocessing, so that no test needs this version of open_clip.
"""

import json
import tempfile
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from support.clip import head_rows, images, randomize_all
from support.pickled_modules import ClassificationHead, ImageEncoder, task_vectors_code

FOLDER = Path(__file__).parent
CONFIG = {
    "embed_dim": 12,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 8, "layers": 2, "width": 16, "head_width": 4, "patch_size": 4},
    "text_cfg": {"context_length": 6, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1},
}
# file: (seed, the text transformer is kept, the format of torch.save before 1.6)
ENCODERS = {
    "zeroshot.pt": (0, False, False),
    "MNIST/finetuned.pt": (1, False, False),
    "DTD/finetuned.pt": (2, False, False),
    "keep_lang.pt": (0, True, False),
    "legacy.pt": (0, False, True),
}
HEADS = {"head_MNISTVal.pt": (1, 10), "head_DTDVal.pt": (2, 47)}


def main() -> None:
    version = Path(open_clip.__file__).parent.parent / "open_clip_torch-2.0.2.dist-info"
    if not version.is_dir():
        raise SystemExit(f"expected open_clip 2.0.2 first on PYTHONPATH, got {open_clip.__file__}")
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "tiny.json"
        config.write_text(json.dumps(CONFIG))
        open_clip.add_model_config(config)
    expected = {"images": images(3, size=8)}
    for name, (seed, keep_lang, legacy) in ENCODERS.items():
        model, train_preprocess, val_preprocess = open_clip.create_model_and_transforms("tiny")
        randomize_all(model, 0)
        if seed:
            moved, _, _ = open_clip.create_model_and_transforms("tiny")
            randomize_all(moved, seed, scale=0.05)
            difference = moved.visual.state_dict()
            with torch.no_grad():
                for key, tensor in model.visual.state_dict().items():
                    tensor.add_(difference[key] - difference[key].mean())
        encoder = ImageEncoder(model, train_preprocess, val_preprocess, keep_lang).eval()
        path = FOLDER / name
        path.parent.mkdir(exist_ok=True)
        with task_vectors_code():
            torch.save(encoder.cpu(), path, _use_new_zipfile_serialization=not legacy)
        expected[f"{name}/features"] = encoder(expected["images"]).detach()
        # the same weights as zeroshot.pt but for the text tower
        state = {} if legacy else model.state_dict()
        for key, tensor in state.items():
            if key.startswith("visual.") != keep_lang:
                expected[f"{name}/{key.removeprefix('visual.')}"] = tensor.clone()
    for name, (seed, classes) in HEADS.items():
        with task_vectors_code():
            torch.save(ClassificationHead(True, head_rows(seed, classes, 12) * 100), FOLDER / name)
        expected[name] = head_rows(seed, classes, 12)
    save_file(expected, FOLDER / "expected.safetensors", metadata={"open_clip": "2.0.2", "torch": torch.__version__})


if __name__ == "__main__":
    main()
