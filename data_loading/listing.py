# Copyright (c) the ConvNeXt V2 toolkit authors.
# Licensed under the MIT License; see LICENSE.
"""Find the image files below a folder, and count what is left out, or listed twice by links.

python -c "from data_loading.listing import FolderWalk; print(*FolderWalk('assets').in_order())"
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from typing import NamedTuple

from data_loading.bad_images import retry_io
from data_loading.formats import extensions, how_to_read
from errors import UserError, first_few, plural
from parallel.process_group import get_logger

# Files and folders of systems and NAS devices, besides those whose names begin with a dot.
SYSTEM_NAMES = frozenset({
    "@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "__macosx",
    "$recycle.bin", "recycler", "system volume information", "lost+found", "found.000", "@tmp",
    "network trash folder", "temporary items", "__pycache__",
    "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r",
})  # fmt: skip
SYSTEM_STARTS = (".", "recup_dir.")  # the latter: PhotoRec's recovery folders, with a number
INDEX = ".index"  # folders that --data_index writes end in it
ARRAY = ".npy"
MAX_KINDS = 100  # extensions that are counted one by one: `scan.0001`, `scan.0002` ... are endless
MAX_EXTENSION = 12  # characters; what is longer is part of a name
# Reasons to leave something out. All others are extensions.
SYSTEM, NOWHERE, UNREADABLE = "hidden or system", "linking to nowhere", "unreadable"
LISTED = "linking to a folder above, or to one that is listed anyway"
OUTSIDE = "outside the class folders"
NO_EXTENSION, OTHERS = "without extension", "with other extensions"


class Names(NamedTuple):
    """Names in one folder, in any order; `folders` are real, `links` lead to folders."""

    images: list[str]
    folders: list[str]
    links: list[str]
    broken: list[str]  # links to nowhere, except those named like images
    others: list[str]
    linked: list[str]  # those of `images` that are links


def is_system(name: str) -> bool:
    """Return True for hidden files and folders, and for what operating systems leave."""
    lower = name.lower()
    return lower.startswith(SYSTEM_STARTS) or lower in SYSTEM_NAMES or lower.endswith(INDEX)


def arrays_of_images(names: Iterable[str]) -> set[str]:
    """Return the .npy files named after another image, such as features of it: no images.

    names: of images in the same folder or archive. `1.npy` and `1.features.npy` belong to `1.jpg`.
    """
    names = [*names]
    arrays = [name for name in names if name.lower().endswith(ARRAY)]
    if not arrays:
        return set()
    stems = {os.path.splitext(name)[0] for name in names if not name.lower().endswith(ARRAY)}
    found = set()
    for name in arrays:
        folder, _, base = name.rpartition("/")
        key = os.path.join(folder, base.partition(".")[0])
        if key in stems or os.path.splitext(name)[0] in stems:
            found.add(name)
    return found


def scan(folder: str) -> Names:
    """Read one folder."""
    found, ends = Names([], [], [], [], [], []), extensions()
    images, folders, links, broken, others, linked = found
    with os.scandir(folder) as entries:
        for entry in entries:
            name, is_link = entry.name, entry.is_symlink()
            if is_link and os.path.isdir(entry.path):  # False for a link to itself
                links.append(name)
            elif not is_link and entry.is_dir():
                folders.append(name)
            elif name.lower().endswith(ends) and name[0] != ".":
                images.append(name)
                if is_link:
                    linked.append(name)
            elif is_link and not os.path.exists(entry.path):
                broken.append(name)
            else:
                others.append(name)
    if arrays := arrays_of_images(images):
        others += arrays
        images[:] = [name for name in images if name not in arrays]
        linked[:] = [name for name in linked if name not in arrays]
    return found


def read_folder(folder: str, left_out: Counter[str]) -> Names:
    """Read one folder, without what belongs to the system; count what is no image."""
    try:
        names = retry_io(partial(scan, folder))
    except OSError as error:  # removed meanwhile, or not readable for this user
        get_logger().warning("skipped folder %s: %s", folder, error)
        left_out[UNREADABLE] += 1
        return Names([], [], [], [], [], [])
    if any(names[1:]):
        _count_others(names, left_out)
    return names


def _count_others(names: Names, left_out: Counter[str]) -> None:
    """Count what is no image, and remove the folders of the system from `names`."""
    for kind in (names.folders, names.links, names.broken):
        kept = [name for name in kind if not is_system(name)]
        if len(kept) < len(kind):
            left_out[SYSTEM] += len(kind) - len(kept)
            kind[:] = kept
    if names.broken:
        left_out[NOWHERE] += len(names.broken)
    for name in names.others:
        reason = reason_of(name)
        if reason not in left_out and len(left_out) >= MAX_KINDS:
            reason = OTHERS
        left_out[reason] += 1


def reason_of(name: str) -> str:
    """Return the reason to leave out a file that is no image: its extension, or its kind."""
    if is_system(name):
        return SYSTEM
    extension = os.path.splitext(name)[1].lower()
    return extension if 1 < len(extension) <= MAX_EXTENSION else NO_EXTENSION


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """Describe counts by reason: `; left out 103 files: 100 .heic (not readable here), 3 .txt`."""
    if not left_out:
        return ""
    total, are_files = sum(left_out.values()), all(reason[0] == "." for reason in left_out)
    found = plural(total, "file")
    if not are_files:
        found = f"{total} files and folders" if total > 1 else "1 file or folder"
    counts = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    texts = [f"{count} {reason}{how_to_read(reason)}" for reason, count in counts]
    return f"; left out {found}: {first_few(texts, 5)}"


class FolderWalk:
    """A walk through the images below `root/top`; links are followed, folders visited once.

    A link is left out if it leads to a folder above, to one that the walk visits by its own path,
    or to one that an earlier link led to. `left_out` counts what is no image, by reason;
    `by_links` has the real paths of the images that links lead to, if `top` is given.
    """

    def __init__(self, root: str, top: str = "", left_out: Counter | None = None) -> None:
        self.root, self.top = root, top
        self.real_root = os.path.realpath(root).rstrip("/")
        self.real_top = os.path.realpath(os.path.join(root, top))
        self.linked: set[str] = set()  # real paths of the folders that links led to
        self.left_out: Counter[str] = Counter() if left_out is None else left_out
        self.by_links: list[str] = []
        self.real_path = cache(os.path.realpath)  # of a few folders; of each link it takes 30 us

    def in_order(self) -> Iterator[str]:
        """Yield images folder by folder, each in order of the bytes of its names."""
        return self._walk(f"{self.top}/" if self.top else "", self.real_top)

    def _walk(self, below: str, real: str) -> Iterator[str]:
        names, folders = self._list(below.rstrip("/"), real)
        if self.top:  # two classes may share an image
            self._note_links(names, below.rstrip("/"), real)
        files = {os.fsencode(name): name for name in names.images}
        files |= {os.fsencode(name) + b"\0": f"{name}/" for name in folders}
        for _, name in sorted(files.items()):
            if name.endswith("/"):
                yield from self._walk(below + name, folders[name[:-1]])
            else:
                yield below + name

    def _note_links(self, names: Names, folder: str, real: str) -> None:
        """Note real paths: of links in a folder of the class, of all images in a linked folder."""
        is_own, linked = real == f"{self.real_root}/{folder}", set(names.linked)
        for name in names.linked if is_own else names.images:
            path = f"{real}/{name}"
            if name in linked:
                with suppress(OSError):  # removed meanwhile
                    above, base = os.path.split(os.path.join(real, os.readlink(path)))
                    path = f"{self.real_path(above)}/{base}"
                    path = os.path.realpath(path) if os.path.islink(path) else path
            self.by_links.append(path)

    def _list(self, folder: str, real: str) -> tuple[Names, dict[str, str]]:
        """Return the names in a folder, and the real paths of the subfolders to visit by name."""
        path = os.path.join(self.root, folder)
        names = read_folder(path, self.left_out)
        if not (names.folders or names.links):
            return names, {}
        real = real.rstrip("/")  # of the root of all folders
        folders = {name: f"{real}/{name}" for name in names.folders}
        if not self._is_visited_anyway(real):  # another link may lead here too
            folders = {name: target for name, target in folders.items() if self._enter(target)}
        for name in sorted(names.links):
            target = os.path.realpath(os.path.join(path, name))
            if not is_above(target, real) and self._enter(target):
                folders[name] = target
            else:
                self.left_out[LISTED] += 1
        return names, folders

    def _enter(self, real: str) -> bool:
        """Return True, once, for a folder that the walk does not visit by its own path."""
        if real in self.linked or is_above(real, self.real_top) or self._is_visited_anyway(real):
            return False
        self.linked.add(real)
        return True

    def _is_visited_anyway(self, real: str) -> bool:
        if not is_above(self.real_top, real):
            return False
        return not any(map(is_system, real.removeprefix(self.real_top).split("/")))


class SharedImages:
    """Counts real images that are listed in two classes, one of them by a link.

    root: of the class folders, in order of their labels.
    """

    def __init__(self, root: str, classes: Sequence[str]) -> None:
        self.top = f"{os.path.realpath(root).rstrip('/')}/"
        self.labels = {name: label for label, name in enumerate(classes)}
        self.first: dict[int, int] = {}  # hash of the real path -> a label; far smaller than paths
        self.shared: set[int] = set()

    def add(self, paths: Sequence[str], label: int) -> None:
        """Note the real paths of the images of a class that links lead to."""
        for path in paths:
            key = hash(path)
            if self.first.setdefault(key, self._label_of(path, label)) != label:
                self.shared.add(key)

    def _label_of(self, path: str, default: int) -> int:
        """Return the label of the class folder that holds the path and lists it."""
        if not path.startswith(self.top):
            return default
        parts = path.removeprefix(self.top).split("/")
        return default if any(map(is_system, parts)) else self.labels.get(parts[0], default)


def is_above(folder: str, other: str) -> bool:
    """Return True if the real path `folder` is `other`, or holds it."""
    return f"{other}/".startswith(f"{folder.rstrip('/')}/")


def class_folders(root: str, left_out: Counter[str]) -> list[str]:
    """Return the sorted names of the class folders in `root`, of which some may be links."""
    names, real_root = read_folder(root, left_out), os.path.realpath(root)
    if names.images:
        left_out[OUTSIDE] += len(names.images)
    above = [n for n in names.links if is_above(os.path.realpath(f"{root}/{n}"), real_root)]
    for kind, found in (("nowhere", names.broken), ("a folder above", above)):
        if found:
            raise UserError(
                f"{root}: links to {kind} instead of class folders: {first_few(sorted(found))}; "
                "correct or remove them"
            )
    return sorted([*names.folders, *names.links])
