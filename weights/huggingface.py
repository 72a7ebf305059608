# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The folder that transformers' from_pretrained opens: weights, labels, preprocessing, a card.

python export.py runs/demo/finetune --to hf --output my_model
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from data_loading.transforms import create_eval_transform
from errors import UserError
from weights.convert import to_hf
from weights.export_formats import Subject, save

MODELS_OF_HF = {"logits": "ConvNextV2ForImageClassification"}  # else ConvNextV2Model
OUTPUTS_OF_HF = {"logits": "logits", "features": "pooler_output", "map": "last_hidden_state"}


def hf_config(subject: Subject) -> dict[str, Any]:
    """config.json."""
    shape, (height, width) = subject.shape, subject.size
    dtype = str(subject.state["downsample_layers.0.0.weight"].dtype).removeprefix("torch.")
    names = {  # an encoder has none
        "id2label": {str(label): name for label, name in enumerate(subject.labels)},
        "label2id": {name: label for label, name in enumerate(subject.labels)},
    }
    return {
        "architectures": [MODELS_OF_HF.get(subject.output, "ConvNextV2Model")],
        "model_type": "convnextv2",
        "num_channels": shape["in_chans"],
        "patch_size": shape["stem_stride"],
        "num_stages": len(shape["dims"]),
        "depths": list(shape["depths"]),
        "hidden_sizes": list(shape["dims"]),
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "drop_path_rate": 0.0,
        "image_size": height if height == width else [height, width],
        "torch_dtype": dtype,  # the name that old and new versions read
        **(names if subject.labels else {}),
    }


def hf_processor(subject: Subject) -> dict[str, Any]:
    """preprocessor_config.json: our evaluation transform as an image processor of transformers.

    BiT's is the one that can squash to a size as well as resize the shorter side and crop.
    """
    (height, width), steps = subject.size, create_eval_transform(subject.size, subject.crop_pct)
    sized = [step.size for step in steps.transforms if hasattr(step, "size")]
    squash = len(sized) == 1
    if not squash and height != width:
        raise UserError(
            f"--input_size {height} {width}: image processors of transformers cut no rectangles as "
            f"evaluation does here; give one number, such as {min(height, width)}"
        )
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": subject.shape["in_chans"] == 3,
        "do_resize": True,
        "size": {"height": height, "width": width} if squash else {"shortest_edge": sized[0]},
        "resample": 3,  # bicubic, in PIL's numbers
        "do_center_crop": not squash,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": subject.mean,
        "image_std": subject.std,
    }


CARD = """---
library_name: transformers
pipeline_tag: {task}
tags: [convnextv2]
---

# {name}

{what} Depths {depths}, widths {dims}, stem of stride {stem_stride}, {in_chans} input channels.
Written by export.py of a ConvNeXt V2 toolkit. How the weights were trained, on what data, how
accurate they are and what their licence is, it cannot know: add it before you share them.

```python
from transformers import AutoImageProcessor, {auto}

processor = AutoImageProcessor.from_pretrained("FOLDER")
model = {auto}.from_pretrained("FOLDER")
{output} = model(**processor(image, return_tensors="pt")).{output}
```
"""


def write_hf(subject: Subject, path: Path) -> None:
    """A folder for `from_pretrained`: weights, config, labels, preprocessing, a model card."""
    path.mkdir()
    save(to_hf(subject.state), path / "model.safetensors")
    described = hf_config(subject), hf_processor(subject)
    for name, values in zip(("config.json", "preprocessor_config.json"), described, strict=True):
        text = json.dumps(values, indent=2, ensure_ascii=False)
        (path / name).write_text(text + "\n", encoding="utf-8")
    what = {
        "logits": f"A classifier of {len(subject.labels)} classes.",
        "features": "An encoder whose output is normalised; it has no classifier.",
        "map": "A pre-trained encoder without classifier. It has no final norm either: "
        "transformers starts one afresh, so use `last_hidden_state` and not `pooler_output`.",
    }[subject.output]
    is_classifier = subject.output == "logits"
    card = CARD.format(
        name=subject.size_name or "ConvNeXt V2",
        what=what,
        task="image-classification" if is_classifier else "image-feature-extraction",
        auto="AutoModelForImageClassification" if is_classifier else "AutoModel",
        output=OUTPUTS_OF_HF[subject.output],
        **subject.shape,
    )
    (path / "README.md").write_text(card, encoding="utf-8")


def read_hf(subject: Subject, path: Path) -> Callable[[Tensor], Tensor]:
    """By transformers' own Auto classes."""
    import transformers

    transformers.logging.set_verbosity_error()  # an encoder's fresh norm is no surprise
    transformers.logging.disable_progress_bar()
    is_classifier = subject.output == "logits"
    auto = transformers.AutoModelForImageClassification if is_classifier else transformers.AutoModel
    model = auto.from_pretrained(path).double().eval()
    if is_classifier and list(model.config.id2label.values()) != subject.labels:
        raise UserError(f"transformers reads other labels: {model.config.id2label}")
    transformers.AutoImageProcessor.from_pretrained(path)
    return lambda images: getattr(model(images), OUTPUTS_OF_HF[subject.output])


def find_labels(path: str | None, classes: list[str] | None, count: int) -> list[str]:
    """Names of the classes: of the file, the checkpoint, ImageNet if there are 1000, or numbers."""
    if path is not None:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeError) as error:
            raise UserError(f"--labels {path}: {error}; expected a text file") from error
        names = [line.strip() for line in lines if line.strip()]
        if len(names) != count:
            raise UserError(
                f"--labels {path} names {len(names)} classes, the weights have {count}; "
                "expected one name a line, in the order of the head"
            )
        return names
    if classes is not None and len(classes) == count:
        return list(map(str, classes))
    if count == 1000:
        from timm.data import ImageNetInfo

        info = ImageNetInfo()
        return [info.index_to_description(label) for label in range(count)]
    return [f"class_{label}" for label in range(count)]
