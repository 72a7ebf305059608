# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""A frozen checkpoint for probe.py: its network, images to look at, and their cached features.

python probe.py features runs/photos --data_path photos --output photos.npy
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image
from tqdm import tqdm

import datasets
import models
from config.flags import is_code
from data_loading.bad_images import BadImages
from data_loading.dataset import Replacement, TransformedDataset
from data_loading.labels import describe_label, describe_one_class
from data_loading.loader import DeviceLoader
from data_loading.rng import seed_all
from data_loading.split import Part, list_labels, list_values, split
from data_loading.stats import choose
from errors import UserError, first_few, plural, problem_of
from insight import feature_cache
from insight.feature_cache import FeatureCache
from insight.feature_files import Table, as_table
from insight.features import extract, pooled_features
from insight.selectivity import ClassMeans, pool
from models.attach import find_block, is_channels_last, trace
from models.parts import evaluating, find_classifier
from models.parts import features as module_outputs
from parallel.process_group import broadcast, from_main_process, get_logger, is_main_process
from training.pictures import as_rgb
from training.setup import check_start, setup_process, user_modules
from training.stepper import DTYPES, autocast
from training.trained_model import read_source
from weights.saved_run import inherit_flags

LIBRARIES = ("torch", "torchvision", "timm", "pillow")  # whose versions may change features
PREPROCESSING = (
    *("input_size", "crop_pct", "imagenet_default_mean_and_std", "mean", "std", "value_range"),
    *("in_chans", "on_bad_image"),
)
FOUND = {"multi": "several labels", "number": "numbers", "none": "no labels"}  # by kind


# --- the network ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class FrozenModel:
    """A checkpoint whose features are read, without training it.

    args: with the flags that the checkpoint brings. model: in evaluation mode, on `device`. layer:
    path of the module whose output is used, '' for the input of the classifier.
    """

    args: Any
    device: torch.device
    amp: str
    model: nn.Module
    cache: FeatureCache
    layer: str = ""

    @property
    def name(self) -> str:
        """The checkpoint, as it was given."""
        return self.args.checkpoint

    @cached_property
    def weights_hash(self) -> str:
        """A hash of the network without its classifier."""
        return feature_cache.hash_weights(self.model, find_classifier(self.model))

    def pool(self, model: nn.Module, images: Tensor) -> Tensor:
        """(N, C, H, W) -> features (N, D) float32, of --layer or of the classifier's input."""
        if self.layer:
            found = module_outputs(model, images, [self.layer])[self.layer].float()
            is_last = is_channels_last(model, self.layer, found.shape, images.shape[1:])
            return pool(found, is_last).flatten(1)
        if hasattr(model, "forward_features"):
            return pooled_features(model, images)
        return classifier_input(model, images)


def load_frozen(args: Any) -> FrozenModel:
    """Load the checkpoint that the flags name; UserError before data is listed if it is wrong."""
    device, amp = setup_process(args)
    off = args.feature_cache == "none"
    folder = Path(args.feature_cache or feature_cache.default_folder())
    cache = FeatureCache(None if off else folder)
    from_main_process(cache.check)
    weights = read_source(args, args.checkpoint)
    args = inherit_flags(args, weights.saved)
    count = weights.saved.head.count
    check_start(args, weights, count)
    seed_all(args.seed)  # of parts that the weights lack
    model = models.build_classifier(args, count).to(device).eval()
    weights.load(model, reset_head=True)  # no classifier is used
    return FrozenModel(args, device, amp, model, cache, _find_layer(args, model))


def find_module(args: Any, model: nn.Module, name: str, flag: str) -> str:
    """Return the path of a module that gives features; of a list of blocks, its last one.

    UserError, which names the flag, for one that a network lacks or does not call, and for its
    classifier, whose weights are random.
    """
    if f"{name}.".startswith(find_classifier(model)):
        raise UserError(f"{flag} {name}: the classifier is not used; choose another module")
    shapes, _ = trace(model, (args.in_chans, *args.input_size))
    return find_block(model, name, shapes, flag)


def _find_layer(args: Any, model: nn.Module) -> str:
    """Return the path of --layer, '' for the input of the classifier."""
    if layer := vars(args).get("layer"):
        return find_module(args, model, layer, "--layer")
    if not (find_classifier(model) or hasattr(model, "forward_features")):
        raise UserError(
            f"the classifier of {type(model).__name__} is not found, so its features are not "
            "known; name a module with --layer"
        )
    return ""


def classifier_input(model: nn.Module, images: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, D) float32: what the last layer of a network gets."""
    found: list[Tensor] = []
    layer = model.get_submodule(find_classifier(model)[0][:-1])
    handle = layer.register_forward_pre_hook(lambda module, inputs: found.append(inputs[0]))
    try:
        model(images)
    finally:
        handle.remove()
    return pool(found[-1].float(), is_last=isinstance(layer, nn.Linear))


# --- the images -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageSet:
    """Images of a part of the data, train or val, in the preprocessing of an evaluation.

    labeled: False if the data has no labels.
    """

    part: str
    dataset: TransformedDataset
    labeled: bool

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def kind(self) -> str:
        """The kind of the labels: class, multi, number, or none."""
        return self.dataset.kind if self.labeled else "none"

    def labels(self) -> Tensor | None:
        """(N,) the class of each image, None if the data set does not list them."""
        if self.kind != "class" or (labels := list_labels(self.dataset.dataset)) is None:
            return None
        positions = self.dataset.positions
        return torch.as_tensor(labels if positions is None else np.asarray(positions)[labels])

    def name_of(self, index: int) -> str:
        """Return the path of an image, or `number 7` of the whole part if it has no file."""
        name, data = self.dataset.name_of(index).removeprefix("image "), self.dataset.dataset
        is_part = isinstance(data, Part) and name == f"number {index}"
        return f"number {data.indices[index]}" if is_part else name

    def picture(self, index: int) -> Image.Image:
        """Return an image as the network gets it, but with colors as they are."""
        sample = self.dataset[0, index]
        if isinstance(sample, UserError | Replacement):
            raise UserError(f"{self.name_of(index)} cannot be drawn: it cannot be read again")
        image = sample[0] if sample[0].is_floating_point() else sample[0].float() / 255
        return to_pil_image(as_rgb(image[None].clamp(0, 1))[0])


def open_parts(frozen: FrozenModel, names: Sequence[str], labeled: bool = False) -> list[ImageSet]:
    """Open the train and val images that `names` lists; labels of val are those of train.

    labeled: UserError for data without labels.
    """
    found: list[ImageSet] = []
    for name in names:
        head = found[0].dataset.head("train") if found and found[0].labeled else None
        found.append(_open_part(frozen.args, name, head, labeled))
    return found


def _open_part(args: Any, name: str, head: Any, labeled: bool) -> ImageSet:
    is_train, has_labels = name == "train", True
    try:
        dataset, _ = datasets.build_dataset(is_train, args, head)
    except UserError as error:
        if labeled or head is not None:
            raise
        dataset, has_labels = _open_unlabeled(args, is_train, error), False
        get_logger().info("%s: no labels: %s", name, problem_of(error))
    dataset.transform = datasets.build_transform(False, args)
    dataset.on_bad = datasets.on_bad_image(False, args)
    chosen = np.asarray(choose(len(dataset), args.max_images, args.seed))
    if len(chosen) < len(dataset):
        data = dataset.dataset
        part = isinstance(data, Part)
        dataset.dataset = Part(data.dataset, data.indices[chosen]) if part else Part(data, chosen)
    return ImageSet(name, dataset, has_labels)


def _open_unlabeled(args: Any, is_train: bool, problem: UserError) -> TransformedDataset:
    """Open images without labels; raises `problem`, which says more, if that fails too."""
    splits = args.val_split > 0
    spec = datasets.build_spec(args, columns=datasets.build_columns(args, args.label_column))
    data = datasets.create_unlabeled(args.data_set, spec, is_train or splits, problem)
    data = split(data, args.val_split, is_train) if splits else data
    return datasets.eval_dataset(data, args)


def check_labels(images: ImageSet) -> None:
    """Raise UserError for images without one class each, or all of one class, if that is listed."""
    if images.kind != "class":
        raise UserError(
            f"{images.part}: this needs one class per image, and the data has "
            f"{FOUND[images.kind]}; give class folders or a table with a label column"
        )
    labels = images.labels()
    if labels is not None and len(found := labels.unique()) < 2:
        problem = describe_one_class(describe_label(images.dataset, found[0]))
        raise UserError(f"{images.part}: {problem}; give images of two classes or more")


# --- features -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureSet:
    """Features (N, D) float32 of images on the CPU, in the order of the data set.

    ids: (N,) numbers of the images; those that could not be read are absent. labels: (N,) or
    (N, K), of the images; None without.
    """

    images: ImageSet
    ids: Tensor
    features: Tensor
    labels: Tensor | None

    def texts(self) -> list[str]:
        """Return the label of each image in words, '' without."""
        if self.labels is None:
            return [""] * len(self.ids)
        return [describe_label(self.images.dataset, label) for label in self.labels]

    def table(self, about: Mapping[str, str] | None = None) -> Table:
        """Return names, labels and features as a table."""
        return as_table(
            self.features,
            images=[self.images.name_of(number) for number in self.ids.tolist()],
            parts=[self.images.part] * len(self.ids),
            labels=self.labels if self.images.kind == "class" else None,
            classes=self.texts(),
            about=dict(about or {}),
        )


def compute_features(frozen: FrozenModel, images: ImageSet) -> FeatureSet | None:
    """Return the features of images from the cache, or compute them on all ranks.

    Every rank must call it; the result is on rank 0, None on others. UserError if some features
    are NaN or Inf.
    """

    def compute() -> dict[str, Tensor] | None:
        loader = _build_loader(frozen, images)
        dtype = DTYPES.get(frozen.amp) if frozen.amp != "none" else None
        batches = _with_bar(loader, images)
        found = extract(frozen.model, batches, frozen.device, dtype, frozen.pool)
        _report_bad(frozen, loader)
        if found is None:
            return None
        held = {"ids": found.ids, "features": found.features, "labels": found.labels}
        return {name: value.cpu() for name, value in held.items()}

    held = _cached(frozen, images, {"layer": frozen.layer}, compute, "features")
    if held is None:
        return None
    broken = held["ids"][~held["features"].isfinite().all(1)].tolist()
    if broken:
        names = first_few(images.name_of(number) for number in broken)
        raise UserError(
            f"features of {plural(len(broken), 'image')} hold NaN or Inf ({names}); the weights "
            "have diverged, or half precision is too narrow for them: try --amp none"
        )
    labels = held["labels"] if images.labeled else None
    return FeatureSet(images, held["ids"], held["features"], labels)


def class_means(
    frozen: FrozenModel, images: ImageSet, layers: Sequence[str]
) -> dict[str, Tensor] | None:
    """Return the mean activities (K, C) by layer, from the cache or computed on all ranks.

    Every rank must call it; the result is on rank 0, None on others.
    """

    def compute() -> dict[str, Tensor] | None:
        size = (frozen.args.in_chans, *frozen.args.input_size)
        counter = ClassMeans(frozen.model, layers, images.dataset.nb_classes, size)
        loader = _build_loader(frozen, images)
        with torch.no_grad(), evaluating(frozen.model), counter.watch():
            for batch, labels, _ in _with_bar(loader, images):
                with autocast(frozen.device, frozen.amp):
                    frozen.model(batch)
                counter.count(labels)
        _report_bad(frozen, loader)
        means = counter.reduce(frozen.device)
        return means if is_main_process() else None

    which = {"layers": json.dumps([*layers])}
    found = _cached(frozen, images, which, compute, "activities")
    return found and {name: found[name] for name in layers}


def _cached(
    frozen: FrozenModel,
    images: ImageSet,
    which: Mapping[str, str],
    compute: Callable[[], dict[str, Tensor] | None],
    what: str,
) -> dict[str, Tensor] | None:
    """Return tensors from the cache on rank 0, or compute and store them; None on other ranks."""
    find_key = partial(_key, frozen, images, which)
    key = from_main_process(find_key)
    held = frozen.cache.read(key) if is_main_process() else None
    count, log = plural(f"{len(images):,}", "image"), get_logger()
    if broadcast(held is not None):
        path = frozen.cache.path(key)
        log.info("%s: %s of %s from the cache, %s", images.part, what, count, path)
        return held
    start = time.perf_counter()
    held = compute()
    if held is None:
        return None
    seconds = time.perf_counter() - start
    path, note = None, ""
    if key is not None and find_key() != key:
        note = "; not cached, since files have changed meanwhile"
    elif path := frozen.cache.write(key, held):
        note = f", cached in {path}"
    elif frozen.cache.folder and key is None:
        note = "; not cached, since the data set lists neither files nor pixels"
    rate = len(images) / seconds
    text = "%s: %s of %s computed in %.1f s (%.0f images/s)%s"
    log.info(text, images.part, what, count, seconds, rate, note)
    return held


def _key(frozen: FrozenModel, images: ImageSet, which: Mapping[str, str]) -> dict[str, str] | None:
    """Return all that features depend on, None if the images cannot be recognized again."""
    args, dataset = frozen.args, images.dataset
    if frozen.cache.folder is None or is_code(args.data_set):  # whose code may change
        return None
    if (found := feature_cache.hash_images(dataset.dataset)) is None:
        return None
    labels = list_values(dataset.dataset, "targets")
    words = [labels.dtype.str, labels.shape] if labels is not None else []
    values = np.ascontiguousarray(labels).tobytes() if labels is not None else b""
    words += [dataset.kind, dataset.classes, dataset.positions, dataset.targets.scale]
    flags = {name: str(vars(args)[name]) for name in PREPROCESSING}
    code = {name: path.read_bytes() for name, path in user_modules(vars(args)).items()}
    return {
        "version": feature_cache.VERSION,
        "weights": frozen.weights_hash,
        "code": feature_cache.hash_bytes(*code.values()),
        "images": found,
        "labels": feature_cache.hash_bytes(values, repr(words).encode()),
        "labeled": str(images.labeled),
        "transform": re.sub(r" at 0x[0-9a-f]+", "", repr(dataset.transform)),  # of functions
        "precision": f"{frozen.device.type} {frozen.amp}",
        "libraries": " ".join(metadata.version(name) for name in LIBRARIES),
        **flags,
        **which,
    }


def _build_loader(frozen: FrozenModel, images: ImageSet) -> DeviceLoader:
    return datasets.build_loader(images.dataset, False, frozen.args, frozen.device)


def _with_bar(loader: DeviceLoader, images: ImageSet) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield batches below a progress bar of all images on rank 0's terminal."""
    hidden = None if is_main_process() else True
    options = {"desc": images.part, "unit": " images", "leave": False, "disable": hidden}
    with tqdm(total=len(images), **options) as bar:
        share = len(images) / max(len(loader), 1)  # of a batch of all ranks
        for batch in loader:
            yield batch
            bar.update(min(round(share), bar.total - bar.n))


def _report_bad(frozen: FrozenModel, loader: DeviceLoader) -> None:
    BadImages(None, loader, active=frozen.args.on_bad_image == "skip").write()
