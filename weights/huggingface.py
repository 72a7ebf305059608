# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Folders for transformers' from_pretrained: weights, labels and preprocessing.

python export.py runs/demo/finetune --to hf --output my_model
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_loading.transforms import create_eval_transform
from errors import UserError, plural
from weights.convert import family, to_hf
from weights.export_formats import ExportSpec, save

LUMA = (0.299, 0.587, 0.114)  # red, green, blue in a gray value: ITU-R 601-2, as in Pillow
OUTPUTS = {"logits": "logits", "features": "pooler_output", "map": "last_hidden_state"}


def hf_config(spec: ExportSpec) -> dict[str, Any]:
    """Return the content of config.json."""
    shape, (height, width) = spec.shape, spec.size
    model_type = family(shape)
    network = "ConvNextV2" if model_type == "convnextv2" else "ConvNext"
    kind = "ForImageClassification" if spec.output == "logits" else "Model"
    dtype = str(spec.state["downsample_layers.0.0.weight"].dtype).removeprefix("torch.")
    config = {
        "architectures": [f"{network}{kind}"],
        "model_type": model_type,
        "num_channels": shape["in_chans"],
        "patch_size": shape["stem_stride"],
        "num_stages": len(shape["dims"]),
        "depths": list(shape["depths"]),
        "hidden_sizes": list(shape["dims"]),
        "layer_norm_eps": 1e-6,
        "image_size": height if height == width else [height, width],
        "torch_dtype": dtype,  # old and new versions read this key
    }
    if spec.labels:  # an encoder has none
        config["id2label"] = {str(label): name for label, name in enumerate(spec.labels)}
        config["label2id"] = {name: label for label, name in enumerate(spec.labels)}
    return config


def hf_processor(spec: ExportSpec) -> dict[str, Any]:
    """Return the content of preprocessor_config.json, which equals our evaluation transform.

    BiT's processor can both resize to a fixed size, and resize the shorter side and crop.
    """
    (height, width), steps = spec.size, create_eval_transform(spec.size, spec.crop_pct)
    sizes = [step.size for step in steps.transforms if hasattr(step, "size")]
    no_crop = len(sizes) == 1
    low, high = spec.value_range or (0, 255)
    factor = 1 / (high - low)
    if not no_crop and height != width:
        raise UserError(
            f"--input_size {height} {width}: transformers' image processors cannot crop rectangles "
            f"as evaluation does here; give one number, such as {min(height, width)}"
        )
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": spec.shape["in_chans"] == 3,
        "do_resize": True,
        "size": {"height": height, "width": width} if no_crop else {"shortest_edge": sizes[0]},
        "resample": 3,  # bicubic, in PIL's numbers
        "do_center_crop": not no_crop,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": factor,
        "do_normalize": True,
        "image_mean": [mean + low * factor for mean in spec.mean],
        "image_std": spec.std,
    } | ({"value_range": [low, high]} if spec.value_range else {})


def as_rgb(spec: ExportSpec) -> ExportSpec:
    """Return the network for RGB images that computes what `spec` does for gray ones.

    transformers' pipelines convert every image to RGB. The first layer is linear, so it takes the
    gray value as the sum of the channels with Pillow's weights.
    """
    name = "downsample_layers.0.0.weight"
    weight = spec.state[name]  # (D, 1, k, k)
    rgb = (weight.double() * torch.tensor(LUMA).double().view(1, 3, 1, 1)).to(weight.dtype)
    state, shape = {**spec.state, name: rgb}, {**spec.shape, "in_chans": 3}
    return replace(spec, state=state, shape=shape, mean=spec.mean * 3, std=spec.std * 3)


def write_hf(spec: ExportSpec, path: Path) -> None:
    """Write a folder for `from_pretrained`."""
    path.mkdir()
    save(to_hf(spec.state), path / "model.safetensors", spec)
    configs = {"config.json": hf_config(spec), "preprocessor_config.json": hf_processor(spec)}
    for name, values in configs.items():
        text = json.dumps(values, indent=2, ensure_ascii=False)
        (path / name).write_text(text + "\n", encoding="utf-8")


def read_hf(spec: ExportSpec, path: Path) -> Callable[[Tensor], Tensor]:
    """Load with transformers' Auto classes."""
    import transformers

    transformers.logging.set_verbosity_error()  # of the untrained norm of an encoder
    transformers.logging.disable_progress_bar()
    is_classifier = spec.output == "logits"
    auto = transformers.AutoModelForImageClassification if is_classifier else transformers.AutoModel
    model = auto.from_pretrained(path).double().eval()
    if is_classifier and list(model.config.id2label.values()) != spec.labels:
        raise UserError(f"the labels differ: {model.config.id2label}")
    transformers.AutoImageProcessor.from_pretrained(path)
    return lambda images: getattr(model(images), OUTPUTS[spec.output])


def find_labels(path: str | None, classes: list[str] | None, count: int) -> list[str]:
    """Return class names from the file, the checkpoint, ImageNet (of 1000 classes), or numbers."""
    if path is not None:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeError) as error:
            raise UserError(f"--labels {path}: {error}; expected a text file") from error
        names = [line.strip() for line in lines if line.strip()]
        if len(names) != count:
            raise UserError(
                f"--labels {path} has {plural(len(names), 'name')} and the weights have "
                f"{plural(count, 'class')}; expected one name per line, in the order of the head"
            )
        return names
    if classes is not None and len(classes) == count:
        return list(map(str, classes))
    if count == 1000:
        from timm.data import ImageNetInfo

        return [*map(ImageNetInfo().index_to_description, range(count))]
    return [f"class_{label}" for label in range(count)]
