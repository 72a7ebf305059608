# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Measure, write and look at the features of a checkpoint, without training it.

python probe.py runs/photos --data_path labeled
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from config.probe_flags import PROBES, files_to_write, parse_probe, side_file

if __name__ == "__main__":  # --help and wrong flags are answered before torch is imported
    view, args = parse_probe()

import torch
from torch import Tensor

from data_loading.labels import describe_one_class
from data_loading.mixed import refuse_overwriting
from errors import UserError, plural
from insight import drawing, embedding, feature_files
from insight.drawing import BAD, GOOD, Cell, write_picture
from insight.evaluators import (
    Labeled,
    check_features,
    class_count,
    few_labels,
    fit_ridge,
    knn_outputs,
    take,
)
from insight.feature_files import Table, write_csv, write_output
from insight.logistic import fit_logistic
from insight.neighbors import check_k, group, near_duplicates, nearest, normalize
from insight.scores import SCORES, score
from insight.selectivity import find_layers, summarize
from parallel.process_group import is_main_process, launch
from training.confusion import name_classes
from training.frozen import (
    FeatureSet,
    FrozenModel,
    ImageSet,
    check_labels,
    class_means,
    compute_features,
    find_module,
    load_frozen,
    open_parts,
)

ROW = 6  # images in a row of a picture
BOTH = ("train", "val")
TOP5 = 5  # classes from which on the top 5 say something: more than that many


def open_sets(
    args: Any, frozen: FrozenModel, names: Sequence[str], labeled: bool = False
) -> list[ImageSet]:
    """`open_parts`, with a UserError if --output would overwrite the checkpoint or an image."""
    parts = open_parts(frozen, names, labeled)
    for part in parts:
        refuse_overwriting(files_to_write(args.output), part.dataset, args.checkpoint)
    return parts


# --- accuracy -------------------------------------------------------------------------------------


def measure_accuracy(args: Any) -> None:
    """Print how well frozen features separate classes; --output writes the same as JSON."""
    frozen = load_frozen(args)
    parts = open_sets(args, frozen, BOTH, labeled=True)
    args = frozen.args
    check_fits(args, parts[0])
    found = [compute_features(frozen, each) for each in parts]
    if not is_main_process():
        return
    device, kind = frozen.device, parts[0].kind
    train, val = (Labeled(each.features.to(device), each.labels.to(device)) for each in found)
    check_features(train, val, kind)
    probes = chosen_probes(args, kind)
    results = []
    for fraction in args.fractions:
        some = take(train, few_labels(train.targets, fraction, args.seed, kind))
        check_features(some, val, kind)
        for name in probes:
            results.append({"probe": name, "fraction": fraction, "images": len(some.targets)})
            results[-1] |= run_probe(name, some, val, kind, args)
    about = describe_accuracy(frozen, train, val, kind)
    print("\n".join(accuracy_lines(about, results)))
    if args.output:
        text = json.dumps(about | {"results": results}, indent=2) + "\n"
        write_output(text, Path(args.output))
        print(args.output)


def chosen_probes(args: Any, kind: str) -> list[str]:
    """Return the probes of --probes in their order; without that flag those for a kind of labels.

    UserError for a typed one that these labels do not allow.
    """
    if kind != "class" and "logistic" in args.probes and "probes" in args.typed:
        raise UserError(
            "--probes logistic needs one class per image, and the data has others; use knn and "
            "linear"
        )
    return [
        name for name in PROBES if name in args.probes and (kind == "class" or name != "logistic")
    ]


def check_fits(args: Any, train: ImageSet) -> None:
    """Raise UserError, before features are computed, for probes that cannot be fitted."""
    if train.kind == "class":
        check_labels(train)
    chosen_probes(args, train.kind)
    labels = train.labels()
    for fraction in args.fractions:
        count = round(fraction * len(train))
        if labels is not None:
            count = len(few_labels(labels, fraction, args.seed))
        if "knn" in args.probes:
            check_k(args.k, count, f" at fraction {fraction:g}" * (fraction < 1))


def run_probe(name: str, train: Labeled, val: Labeled, kind: str, args: Any) -> dict[str, Any]:
    """Fit a probe and return its score on the evaluation images, and what was chosen."""
    classes = class_count(train, val) if kind == "class" else 0
    if name == "knn":
        outputs = knn_outputs(train, val, kind, args.k, args.temperature)
        chosen: dict[str, Any] = {"k": args.k, "temperature": args.temperature}
    elif name == "linear":
        ridge = fit_ridge(train, kind, classes)
        outputs, chosen = ridge.outputs(val.features), {"penalty": ridge.penalty}
    else:
        model = fit_logistic(*train, classes, args.seed)
        outputs, chosen = model(val.features), {"penalty": model.penalty}
        chosen["whitened"] = model.whitened
    result = {"score": score(outputs, val.targets, kind)}
    if kind == "class":
        result["standard_error"] = standard_error(result["score"] / 100, len(val.targets))
        if classes > TOP5:
            best = outputs.topk(TOP5, dim=1).indices
            result["top5"] = 100 * (best == val.targets[:, None]).any(1).double().mean().item()
    return result | chosen


def standard_error(share: float, count: int) -> float:
    """Return half of Wilson's interval of a share of `count` images, in percent.

    Unlike the usual sqrt(share * (1 - share) / count) it is not 0 at 100%.
    """
    variance = share * (1 - share) / count + 1 / (4 * count**2)
    return 100 * math.sqrt(variance) / (1 + 1 / count)


def describe_accuracy(
    frozen: FrozenModel, train: Labeled, val: Labeled, kind: str
) -> dict[str, Any]:
    """Return what was measured.

    chance: for classes, the accuracy of always answering the most frequent training class.
    """
    args = frozen.args
    about = {
        "checkpoint": frozen.name,
        "data": args.data_path or args.data_set,
        "score": SCORES[kind],
        "features": train.features.shape[1],
        "train_images": len(train.targets),
        "val_images": len(val.targets),
    }
    if kind == "class":
        common = train.targets.mode().values
        about["classes"] = len(train.targets.unique())
        about["chance"] = 100 * (val.targets == common).double().mean().item()
    return about


def accuracy_lines(about: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table of results."""
    sizes = f"{about['train_images']:,} training and {about['val_images']:,} evaluation images"
    yield f"{about['checkpoint']} on {about['data']}: {about['features']} features, {sizes}"
    has_top5 = any("top5" in result for result in results)
    yield f"{'probe':9} {'images':>8}  {about['score']:17}{'top-5' * has_top5}".rstrip()
    for result in results:
        text = f"{result['score']:.2f}%"
        if "standard_error" in result:
            text += f" ± {result['standard_error']:.2f}"
        top5 = f"{result['top5']:<9.2f}" if has_top5 else ""
        keys = ("k", "temperature", "penalty")
        chosen = ", ".join(f"{key} {result[key]:g}" for key in keys if key in result)
        chosen += ", whitened" * result.get("whitened", False)
        yield f"{result['probe']:9} {result['images']:8,}  {text:17}{top5}{chosen}"
    if "chance" in about:
        yield f"{'chance':9} {'':8}  {about['chance']:.2f}%, by the most frequent training class"


# --- features -------------------------------------------------------------------------------------


def gather(
    args: Any,
    check: Callable[[Any, list[ImageSet]], None] | None = None,
    names: Sequence[str] = (),
) -> tuple[FrozenModel, list[FeatureSet]] | None:
    """Return the features of the parts that --split names; None on other ranks than the first.

    check: raises UserError for data that cannot be used, before features are computed. names: of
    other parts.
    """
    names = names or (BOTH if args.split == "all" else (args.split,))
    frozen = load_frozen(args)
    parts = open_sets(args, frozen, names)
    if check:
        check(args, parts)
    found = [compute_features(frozen, each) for each in parts]
    return (frozen, found) if is_main_process() else None


def write_features(args: Any) -> None:
    """Write features with names and labels."""
    path = Path(args.output)
    feature_files.check_writer(path)
    if (found := gather(args)) is None:
        return
    frozen, sets = found
    about = {"checkpoint": frozen.name, "layer": frozen.layer}
    table = feature_files.join([each.table(about) for each in sets])
    written = feature_files.WRITERS[path.suffix](table, path)
    count, width = table.features.shape
    print(f"{', '.join(map(str, written))}: {width} features of {count:,} images")


# --- neighbors, duplicates, outliers --------------------------------------------------------------


def draw_neighbors(args: Any) -> None:
    """Draw images of a part with the most similar training images."""
    names = BOTH if args.split == "val" else ("train",)
    if (found := gather(args, check_neighbors, names)) is None:
        return
    frozen, sets = found
    gallery, queries = sets[0], sets[-1]
    count = min(args.num_images, len(queries.ids))
    rows = torch.arange(count) * len(queries.ids) // count  # spread evenly
    own = rows if queries is gallery else None
    known = gallery.features.to(frozen.device)
    wanted = queries.features[rows].to(frozen.device)
    middle = center(args, known)
    similar, places = nearest(wanted - middle, known - middle, args.k, own)
    texts, own_texts = gallery.texts(), queries.texts()
    cells = []
    for row, number in enumerate(rows.tolist()):
        text = own_texts[number]
        line = [make_cell(queries, number, text)]
        for place, value in zip(places[row].tolist(), similar[row].tolist(), strict=True):
            frame = text and (GOOD if texts[place] == text else BAD)
            words = join_words(f"{max(0.0, 1 - value):.3f}", texts[place])
            line.append(make_cell(gallery, place, words, frame))
        cells.append(line)
    title = f"Nearest training images by features of {frozen.name}, with cosine distances"
    title += "; green: same class" * any(own_texts)
    heads = ("image", *(f"neighbor {number + 1}" for number in range(args.k)))
    write_picture(drawing.draw_grid(cells, title, heads), args.output)
    print(f"{args.output}: {plural(count, 'image')} with {plural(args.k, 'neighbor')} each")


def center(args: Any, features: Tensor) -> Tensor:
    """Return what to subtract before features are compared: their mean (D,), or 0.

    Features of masked pre-training share a large part, next to which differences look small.
    """
    return features.mean(0) if args.center else features.new_zeros(())


def check_neighbors(args: Any, parts: list[ImageSet]) -> None:
    """Raise UserError if there are too few images to have k neighbors."""
    if len(parts) == 1 or args.split == "all":
        available = sum(map(len, parts)) - 1
    else:
        available = len(parts[0])
    check_k(args.k, available)


def join_words(*words: str) -> str:
    """Join a number and a class, which may be a number too."""
    return " · ".join(filter(None, words))


def make_cell(features: FeatureSet, row: int, text: str, frame: str = "", part: str = "") -> Cell:
    """Return the picture of an image with a text and its name below it.

    part: train or val, where images of both are shown.
    """
    number = int(features.ids[row])
    lines = [*filter(None, (text, part))]
    return Cell(features.images.picture(number), lines, frame, features.images.name_of(number))


def find_duplicates(args: Any) -> None:
    """List pairs of images over a similarity, and draw them in groups."""
    if (found := gather(args)) is None:
        return
    frozen, sets = found
    table = feature_files.join([each.table() for each in sets])
    table.features -= center(args, table.features)
    pairs, similar = near_duplicates(table.features.to(frozen.device), args.threshold, "pairs")
    groups = group(pairs, len(table.images))
    columns = [table.images, table.parts, table.classes]
    rows = []
    for (one, other), value in zip(pairs.tolist(), similar.tolist(), strict=True):
        facts = [column[place] for place in (one, other) for column in columns]
        rows.append([int(groups[one]) + 1, f"{value:.6f}", *facts])
    names = [f"{name}_{number}" for number in (1, 2) for name in ("image", "part", "class")]
    rows.sort(key=lambda row: row[0])  # stable: the most similar pair of a group first
    write_csv(("group", "similarity", *names), rows, Path(args.output))
    print(duplicates_line(args, table, pairs, groups))
    if len(pairs):
        title = f"Near-duplicates by features of {frozen.name}: cosine similarity to the first"
        cells = duplicate_cells(args, sets, table, groups)
        picture = side_file(Path(args.output))
        write_picture(drawing.draw_grid(cells, title), picture)
        print(picture)


def duplicate_cells(
    args: Any, sets: Sequence[FeatureSet], table: Table, groups: Tensor
) -> list[list[Cell]]:
    """Return a row of images for each of the largest groups."""
    cell, cells = cell_maker(sets), []
    for number in range(min(args.num_images, int(groups.max()) + 1)):
        members = (groups == number).nonzero()[:, 0]
        unit = normalize(table.features[members])
        values = [f"{value:.4f}" for value in (unit @ unit[0]).tolist()]
        values[0] = "first"
        shown = zip(members.tolist()[:ROW], values, strict=False)
        texts = [(row, join_words(text, table.classes[row])) for row, text in shown]
        cells.append([cell(row, text) for row, text in texts])
    return cells


def cell_maker(sets: Sequence[FeatureSet]) -> Callable[[int, str], Cell]:
    """Return `make_cell` for rows of the joined table of several sets."""
    places = [(each, row) for each in sets for row in range(len(each.ids))]

    def make(row: int, text: str) -> Cell:
        part = places[row][0].images.part * (len(sets) > 1)
        return make_cell(*places[row], text, part=part)

    return make


def duplicates_line(args: Any, table: Table, pairs: Tensor, groups: Tensor) -> str:
    """Describe what was found."""
    of = f"of {len(table.images):,} images at cosine similarity >= {args.threshold:g}"
    if not len(pairs):
        return f"{args.output}: no pair {of}"
    ends = pairs.tolist()
    images, sets = int((groups >= 0).sum()), int(groups.max()) + 1
    across = sum(table.parts[one] != table.parts[other] for one, other in ends)
    mixed = sum(table.classes[one] != table.classes[other] for one, other in ends)
    text = f"{args.output}: {plural(len(ends), 'pair')} in {plural(sets, 'group')} {of}"
    text += f", {plural(images, 'image')} in all"
    text += f"; {plural(across, 'pair')} across train and val" * (args.split == "all")
    return f"{text}; {plural(mixed, 'pair')} with two classes" if any(table.classes) else text


def rank_outliers(args: Any) -> None:
    """Rank images by the distance to their k-th nearest neighbor, and draw the first."""
    if (found := gather(args, check_neighbors)) is None:
        return
    frozen, sets = found
    table = feature_files.join([each.table() for each in sets])
    table.features -= center(args, table.features)
    features, count = table.features.to(frozen.device), len(table.images)
    found = nearest(features, features, args.k, torch.arange(count), bar="neighbors")
    similar, places = (values.cpu() for values in found)
    far, rows = 1 - similar[:, -1], []
    for row in far.argsort(descending=True, stable=True).tolist():
        near = places[row].tolist()
        same = sum(table.classes[place] == table.classes[row] for place in near) / len(near)
        facts = [table.images[row], table.parts[row], table.classes[row], f"{far[row]:.6f}"]
        facts += [table.images[near[0]], table.classes[near[0]]]
        rows.append([row, *facts, f"{same:.3f}" if table.classes[row] else ""])
    names = ("image", "part", "class", "distance", "neighbor", "neighbor_class", "same_class")
    ranked = [[number, *row[1:]] for number, row in enumerate(rows, 1)]
    write_csv(("rank", *names), ranked, Path(args.output))
    cell, cells = cell_maker(sets), []
    for row in rows[: args.num_images]:
        cells.append(cell(row[0], join_words(f"{float(row[4]):.3f}", row[3])))
    title = f"Outliers by features of {frozen.name}: distance to neighbor {args.k}"
    picture = side_file(Path(args.output))
    lines = [cells[start : start + ROW] for start in range(0, len(cells), ROW)]
    write_picture(drawing.draw_grid(lines, title), picture)
    middle = far.median().item()
    text = f"distance to neighbor {args.k} from {far.min():.3f} to {far.max():.3f}, median"
    print(f"{args.output}: {plural(count, 'image')}, {text} {middle:.3f}\n{picture}")


# --- map and selectivity --------------------------------------------------------------------------


def draw_map(args: Any) -> None:
    """Draw the images as points, colored by class."""
    embedding.check_method(args.method)
    if (found := gather(args, check_map)) is None:
        return
    frozen, sets = found
    table = feature_files.join([each.table() for each in sets])
    points, axes = embedding.embed(table.features, args.method, args.seed)
    dataset, names = sets[0].images.dataset, []
    if table.labels is not None:
        names = name_classes(dataset.nb_classes, dataset.classes)
    title = f"{embedding.TITLES[args.method]} of features of {frozen.name}"
    write_picture(drawing.draw_map(points, table.labels, names, title, axes), args.output, True)
    print(f"{args.output}: {plural(len(points), 'image')}, {axes[0]}, {axes[1]}")


def check_map(args: Any, parts: list[ImageSet]) -> None:
    """Raise UserError for too few images."""
    embedding.check_count(sum(map(len, parts)), args.method)


def draw_selectivity(args: Any) -> None:
    """Draw and print the class selectivity of the channels of each layer."""
    frozen = load_frozen(args)
    find = partial(find_module, frozen.args, frozen.model, flag="--layers")
    layers = [find(name) for name in args.layers or ()] or find_layers(frozen.model)
    (images,) = open_sets(args, frozen, (args.split,), labeled=True)
    check_labels(images)
    means = class_means(frozen, images, layers)
    if means is None:
        return
    if len(next(iter(means.values()))) < 2:
        problem = describe_one_class()
        raise UserError(f"{images.part}: {problem}; give images of two classes or more")
    width = max(map(len, layers))
    print(f"{'layer':{width}}  channels  silent   mean  median  over 0.5")
    drawn = []
    for name, index, silent in summarize(means):
        active = len(index) > 0
        facts = [float(index.mean()), float(index.median()), float((index > 0.5).double().mean())]
        texts = [f"{facts[0]:.3f}", f"{facts[1]:7.3f}", f"{facts[2]:9.1%}"] if active else ["-"]
        count = means[name].shape[1]
        print(f"{name:{width}}  {count:8}  {silent:6}  {' '.join(texts)}")
        drawn.append((name, index, f"mean {facts[0]:.2f}" if active else "silent"))
    title = f"Class selectivity of {frozen.name} on {plural(len(images), 'image')}"
    axis = "class selectivity index of the channels; red: mean"
    write_picture(drawing.draw_histograms(drawn, title, axis), args.output, True)
    print(args.output)


VIEWS: dict[str, Callable[[Any], None]] = {
    "accuracy": measure_accuracy,
    "features": write_features,
    "neighbors": draw_neighbors,
    "duplicates": find_duplicates,
    "outliers": rank_outliers,
    "map": draw_map,
    "selectivity": draw_selectivity,
}

if __name__ == "__main__":
    launch(VIEWS[view], args)
