# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Class names and preprocessing of a model from the JSON files that transformers writes with it.

python -c "from weights import hub_config; print(hub_config.FILES)"
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from config.sizes import default_crop_pct
from errors import UserError

FILES = CONFIG, PROCESSOR = "config.json", "preprocessor_config.json"
PLACEHOLDER = r"(LABEL|class)_\d+"  # of transformers and of export.py, for classes without names
NO_CROP = 384  # from this size on, transformers' processor of ConvNeXt resizes the whole image
CROP_PCT = 224 / 256  # its default for smaller images


def read_hub_run(folder: Path, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what a checkpoint stores as `args` and `classes`, for the weights in a hub's folder.

    What the files do not say is left out.
    """
    counts = {len(x) for name, x in state.items() if name.startswith("classifier.") and x.ndim == 2}
    classes = _read(folder / CONFIG, _class_names)
    args = _read(folder / PROCESSOR, lambda file: _size(file) | _mean_and_std(file))
    return {"args": args, "classes": classes if classes and len(classes) in counts else None}


def _read(path: Path, parse: Callable[[Mapping[str, Any]], Any]) -> Any:
    """Parse the object in a JSON file; {} if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return parse(content if isinstance(content, dict) else {})
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{path} is damaged ({error!r}); download it again, or remove it"
        ) from error


def _class_names(config: Mapping[str, Any]) -> list[str] | None:
    """Return the names in the order of the head, None if they are incomplete or placeholders."""
    labels = config.get("id2label") or {v: k for k, v in (config.get("label2id") or {}).items()}
    labels = {int(label): str(name) for label, name in labels.items()}
    names = [labels[label] for label in sorted(labels)]
    if sorted(labels) != [*range(len(names))] or len({*names}) < len(names):
        return None
    if all(re.fullmatch(PLACEHOLDER, name) for name in names):
        return None
    # ImageNet in words, while its folders are called n01440764: found by ImageNet's own names.
    return None if len(names) == 1000 and names[0].startswith("tench") else names


def _size(processor: Mapping[str, Any]) -> dict[str, Any]:
    """Return `input_size`, and `crop_pct` where it is not the default of our evaluation."""
    resized, cropped = (_sides(processor.get(name)) for name in ("size", "crop_size"))
    cropped = cropped if processor.get("do_center_crop", False) else []
    if not resized:
        return {}
    size = cropped or resized
    if cropped:
        crop_pct = min(1.0, min(cropped) / min(resized))
    elif len(size) == 2 or min(size) >= NO_CROP:
        crop_pct = None  # the whole image is resized
    else:
        crop_pct = processor.get("crop_pct") or CROP_PCT
    if crop_pct == default_crop_pct(size):
        return {"input_size": size}
    # Evaluation resizes the whole image at some sizes only; at others 1.0 is nearest to it.
    return {"input_size": size, "crop_pct": crop_pct or 1.0}


def _sides(size: Any) -> list[int]:
    """Return one or two sides in pixels; [] if the size is of another kind."""
    if isinstance(size, list):
        return [int(side) for side in size]
    if not isinstance(size, dict):
        return [] if size is None else [int(size)]
    if "shortest_edge" in size:
        return [int(size["shortest_edge"])]
    return [int(size[name]) for name in ("height", "width") if name in size]


def _mean_and_std(processor: Mapping[str, Any]) -> dict[str, Any]:
    """Return `mean` and `std` of images in 0 to 1; {} if the file lacks them.

    Also the `value_range` that `export.py` has written, as other programs do not.
    """
    found = [processor.get(name) for name in ("image_mean", "image_std")]
    found = found if processor.get("do_normalize", True) else [0.0, 1.0]
    if None in found:
        return {}
    factor = processor.get("rescale_factor") if processor.get("do_rescale", True) else 1
    factor = 1 / 255 if factor is None else factor
    mean, std = (value if isinstance(value, list) else [value] for value in found)
    if own := processor.get("value_range"):
        low, high = map(float, own)
        return {"mean": [x - low * factor for x in mean], "std": std, "value_range": [low, high]}
    return {"mean": [x / (255 * factor) for x in mean], "std": [x / (255 * factor) for x in std]}
