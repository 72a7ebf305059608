# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""The eight sizes for `torch.hub.load`, from a local folder or a repository.

python -c "import torch; torch.hub.load('.', 'convnextv2_atto', source='local')"

The modules of this folder have short names (models, utils, errors, ...), and Python knows only one
module of a name. So a program that has a `utils` of its own cannot use both in one process: where
its own came first, loading is refused with the name; where it comes later, it gets this one.
"""

# torch.hub.list takes every public callable here for a model: modules and _private names are none.
from __future__ import annotations

import sys
from pathlib import Path as _Path

OWN = (
    "config",
    "data_loading",
    "errors",
    "models",
    "parallel",
    "utils",
    "weights",
)  # imported here
_HERE = _Path(__file__).resolve().parent
for _name in OWN:
    _other = getattr(sys.modules.get(_name), "__file__", None)
    if _name in sys.modules and (not _other or _HERE not in _Path(_other).resolve().parents):
        raise ImportError(
            f"another module called {_name!r} is loaded already, from {_other}, and hides the one "
            f"in {_HERE}; rename yours, or load this model in a process of its own"
        )

import models as _models  # noqa: E402
from config.flags import MODEL_KEY as _MODEL_KEY  # noqa: E402
from weights import convert as _convert  # noqa: E402
from weights import files as _checkpoint  # noqa: E402
from weights import pretrained as _pretrained  # noqa: E402

dependencies = ["torch"]

_DOC = """ConvNeXt V2 {size}, {count} parameters: images (N, 3, H, W) -> logits (N, num_classes).

torch.hub.load(folder, "{name}", source="local", checkpoint="checkpoint-best.pth").eval()

checkpoint: a file or a run's folder, `hf-hub:owner/name`, `timm:model.tag` or an https address,
    in any published layout; without one the weights are random.
num_classes, in_chans, stem_stride: those of the checkpoint unless given. One without a head, as
    after pre-training, gives normalised features (N, C) as num_classes=0 does; with another
    num_classes the head is new and random. Without a checkpoint: 1000, 3 and 4.
features_only, out_indices: a list of maps of strides 4, 8, 16, 32 instead of logits.
model_key, model_prefix, sha256: which weights of the file, as in main_finetune.py;
    model_key="model_ema" takes the moving average.

Other keywords are those of models.convnextv2.ConvNeXtV2. The model is in training mode, which
differs from .eval() only with drop_path_rate, and expects images normalised as in training.
"""


def _build(name, checkpoint=None, model_key=_MODEL_KEY, model_prefix="", sha256="", **kwargs):
    if checkpoint is None:
        return _models.create_model(name, **kwargs)
    content = _checkpoint.read_checkpoint(checkpoint, sha256)
    weights = _pretrained.pick_weights(content, checkpoint, model_key, model_prefix)
    found = _convert.describe(_convert.to_convnextv2(weights)[0])
    shape = {key: found[key] for key in ("num_classes", "in_chans", "stem_stride")}
    model = _models.create_model(name, **{**shape, **kwargs})
    _pretrained.load_pretrained(model, checkpoint, model_key, model_prefix, sha256)
    return model


def _entry(size, count):
    name = f"convnextv2_{size}"

    def build(checkpoint=None, **kwargs):
        return _build(name, checkpoint, **kwargs)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = _DOC.format(name=name, size=size.capitalize(), count=count)
    return build


convnextv2_atto = _entry("atto", "3.7M")
convnextv2_femto = _entry("femto", "5.2M")
convnextv2_pico = _entry("pico", "9.1M")
convnextv2_nano = _entry("nano", "15.6M")
convnextv2_tiny = _entry("tiny", "28.6M")
convnextv2_base = _entry("base", "89M")
convnextv2_large = _entry("large", "198M")
convnextv2_huge = _entry("huge", "660M")
