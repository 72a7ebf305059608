# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""ConvNeXt V2 and V1 in all sizes for `torch.hub.load`, from a local folder or a repository.

python -c "import torch; torch.hub.load('.', 'convnextv2_atto', source='local')"

The modules here have short names (models, utils, errors, ...). A program with a module of the same
name needs to load the model in a process of its own.
"""

# torch.hub.list shows every public callable of this file as a model, so all others are _private.
import errors as _errors
import models as _models
from config.flags import MODEL_KEY as _MODEL_KEY
from models import heads as _heads
from weights import convert as _convert
from weights import fit as _fit
from weights import pretrained as _pretrained

dependencies = ["torch"]

_DOC = """{network}, {count} parameters: images (N, 3, H, W) -> logits (N, num_classes).

torch.hub.load(folder, "{name}", source="local", checkpoint="checkpoint-best.pth").eval()

checkpoint: a file, a run's folder, `hf-hub:owner/name`, `timm:model.tag` or an https address, in
    any published layout; without one the weights are random.
num_classes, in_chans, stem_stride: default to the checkpoint's, and without one to 1000, 3 and 4.
    A pre-trained checkpoint has no head, so it gives normalized features (N, C), as num_classes=0
    does; with any other num_classes than the checkpoint's, the head is new and random. That of a
    regression gives numbers in the units of the data.
features_only, out_indices: return feature maps of strides 4, 8, 16, 32, not logits; needs timm.
model_key, model_prefix, sha256: select the weights, as in main_finetune.py;
    model_key="model_ema" selects the EMA weights.

Other arguments are those of models.convnextv2.ConvNeXtV2. The model is in training mode, which
differs from .eval() only with drop_path_rate, and expects images normalized as in training.
"""


def _entry(name, count):
    family, size = name.split("_")
    network = f"ConvNeXt {'V2' if family == 'convnextv2' else 'V1'} {size.capitalize()}"

    def build(checkpoint=None, model_key=_MODEL_KEY, model_prefix="", sha256="", **kwargs):
        if checkpoint is None:
            return _models.create_model(name, **kwargs)
        weights = _pretrained.read_pretrained(checkpoint, model_key, model_prefix, sha256)
        _refuse_heads(weights.saved, kwargs)
        found = _convert.describe(_convert.to_convnextv2(weights.state)[0])
        shape = {key: found[key] for key in ("num_classes", "in_chans", "stem_stride")}
        model = _models.create_model(name, **{**shape, **kwargs})
        loaded = weights.load(model).loaded
        if (scale := weights.saved.head.scale) and "head.weight" in loaded:  # a regression
            model.load_state_dict(_fit.undo_scale(model.state_dict(), "head.", scale))
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = _DOC.format(name=name, network=network, count=count)
    return build


def _refuse_heads(saved, given):
    """Raise UserError if a run has heads that the network's own classifier cannot replace."""
    head, heads = saved.flags.get("head", ""), saved.flags.get("heads", "")
    if "num_classes" not in given and (heads or not _heads.is_plain(head)):
        text = f"--heads {heads}" if heads else f"--head {head}"
        raise _errors.UserError(
            f"{saved.source} was trained with {text}, which torch.hub does not build; give "
            "num_classes=0 for the features, or use export.py --to pt2"
        )


convnextv2_atto = _entry("convnextv2_atto", "3.7M")
convnextv2_femto = _entry("convnextv2_femto", "5.2M")
convnextv2_pico = _entry("convnextv2_pico", "9.1M")
convnextv2_nano = _entry("convnextv2_nano", "15.6M")
convnextv2_tiny = _entry("convnextv2_tiny", "28.6M")
convnextv2_base = _entry("convnextv2_base", "89M")
convnextv2_large = _entry("convnextv2_large", "198M")
convnextv2_huge = _entry("convnextv2_huge", "660M")
convnext_atto = _entry("convnext_atto", "3.7M")
convnext_femto = _entry("convnext_femto", "5.2M")
convnext_pico = _entry("convnext_pico", "9.0M")
convnext_nano = _entry("convnext_nano", "15.6M")
convnext_tiny = _entry("convnext_tiny", "28.6M")
convnext_small = _entry("convnext_small", "50.2M")
convnext_base = _entry("convnext_base", "88.6M")
convnext_large = _entry("convnext_large", "198M")
convnext_xlarge = _entry("convnext_xlarge", "350M")
