"""Tests of s2mts2.py: python -m pytest -q. They need no network and make their own data."""

import copy
import csv
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image
from sklearn import metrics
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import s2mts2
from s2mts2 import PLAIN, Data, UserError, load_data, main, parse_args

SCRIPT = Path(s2mts2.__file__).resolve()
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SCRIPT.parent), "OMP_NUM_THREADS": "1"}
SMALL = "--epochs 1 --batch 4 --size 32 --device cpu".split()


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def table(path):
    """Header, image names and numbers of a CSV file with predictions."""
    header, *rows = csv.reader(Path(path).read_text().splitlines())
    return header, [row[0] for row in rows], np.array([row[1:] for row in rows], float)


def state(path):
    return torch.load(path, weights_only=True)["state"]


def equal(ours, theirs):
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(equal(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


def files():
    return sorted(str(path) for path in Path().rglob("*"))


def interrupt(*arguments, **keywords):
    raise KeyboardInterrupt


def error_of(command, capsys):
    """The error of a command: exit status 2 and, at the end, one line."""
    capsys.readouterr()
    assert main(command) == 2
    err = capsys.readouterr().err
    assert err.count("error: ") == 1 and err.splitlines()[-1].startswith("error: "), err
    return err.splitlines()[-1]


# ------------------------------------------------------------------------------------------ made data


def made_by_hand(channels=1, multilabel=True, count=40):
    """Noise; an image shows a bright square if its first target is 1. 12 test images."""
    random, targets = np.random.default_rng(0), np.eye(3)[np.arange(count) % 3]
    images = random.integers(0, 120, (count, channels, 16, 16), np.uint8)
    if multilabel:
        targets = (random.random((count, 3)) < 0.4) * (np.arange(count)[:, None] > 3)
    images[targets[:, 0] == 1, :, 4:12, 4:12] = 250
    split = random.permutation(count)
    return Data("mine", images, targets, ["a", "b", "c"], [f"i{k}" for k in range(count)], split[:-12],
                split[-12:], multilabel)


def changed(data, **parts):
    return Data(**{**vars(data), **parts})


def write_image(path, seed, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 4, 3), np.uint8)
    Image.fromarray(coarse).resize((40, 30), Image.Resampling.BICUBIC).convert(mode).save(path)


FINDINGS = ["No Finding", "Hernia", "Mass|Nodule", "Effusion", "Mass|Pleural_Thickening"]
LESIONS = ["MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"]


def cxr14(root):
    """30 images of 10 patients; image 3 is RGBA, image 4 RGB."""
    rows = ["Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
            "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"]
    names = [f"{k // 3:08d}_{k % 3:03d}.png" for k in range(30)]
    for k, name in enumerate(names):
        rows.append(f"{name},{FINDINGS[k % 5]},0,{k // 3},50,M,PA,2500,2048,0.168,0.168")
        write_image(root / "images" / name, k, {3: "RGBA", 4: "RGB"}.get(k, "L"))
    for name, part in (("Data_Entry_2017_v2020.csv", rows), ("train_val_list.txt", names[:20]),
                       ("test_list.txt", names[20:])):
        (root / name).write_text("\n".join(part) + "\n")


def chexpert(root, prefix="CheXpert-v1.0-small"):
    """40 patients with two views; entry j of patient p is number (p + j) % 4 of the four values."""
    rows = ["Path,Sex,Age,Frontal/Lateral,AP/PA," + ",".join(f"finding {k}" for k in range(14))]
    for k in range(80):
        name = f"{prefix}/train/patient{k // 2:05d}/study1/view{k % 2 + 1}_frontal.jpg"
        write_image(root / name, k)
        cells = ",".join(["1.0", "0.0", "-1.0", ""][(k // 2 + j) % 4] for j in range(14))
        rows.append(f"{name},Female,68,Frontal,AP,{cells}")
    (root / prefix / "train.csv").write_text("\n".join(rows) + "\n")


def isic2018(root, groupings=True):
    """12 images of each class, two of each lesion."""
    prefix, rows = "ISIC2018_Task3_Training_", ["image," + ",".join(LESIONS)]
    lesions = ["image,lesion_id,diagnosis_confirm_type"]
    for k in range(84):
        name = f"ISIC_{24306 + k:07d}"
        write_image(root / f"{prefix}Input" / f"{name}.jpg", k, "RGB")
        rows.append(name + "," + ",".join("1.0" if k % 7 == j else "0.0" for j in range(7)))
        lesions.append(f"{name},HAM_{k % 7}{k // 14},histopathology")
    (root / f"{prefix}GroundTruth").mkdir()
    (root / f"{prefix}GroundTruth/{prefix}GroundTruth.csv").write_text("\n".join(rows) + "\n")
    if groupings:
        (root / f"{prefix}LesionGroupings.csv").write_text("\n".join(lesions) + "\n")


def npz(root=Path(), grey=True, multilabel=False, counts=(60, 4, 16), **changes):
    """A file of MedMNIST's form, set.npz."""
    random, arrays = np.random.default_rng(0), {}
    for part, count in zip(("train", "val", "test"), counts):
        shape = (count, 16, 16) if grey else (count, 16, 16, 3)
        number = np.arange(count, dtype=np.uint8)[:, None]
        arrays[f"{part}_images"] = random.integers(0, 255, shape, np.uint8)
        arrays[f"{part}_labels"] = (number >> np.arange(3)) % 2 if multilabel else number % 4
    root.mkdir(exist_ok=True)
    np.savez_compressed(root / "set.npz", **arrays | changes)
    return arrays


def folder(root, labelled=40, mode="L"):
    """60 own images of two classes; those after `labelled` are not in the table."""
    rows, names = ["image,cat,dog"], [f"{'ab'[k % 2]}/{k:03d}.{'png' if k % 3 else 'jpg'}" for k in range(60)]
    for k, name in enumerate(names):
        write_image(root / name, k, mode)
        rows += [f"{name},{k % 2},{1 - k % 2}"] * (k < labelled)
    (root / "labels.csv").write_text("\n".join(rows) + "\n")
    return names


def close_to_file(pixels, path, mode):
    expected = TF.resize(TF.pil_to_tensor(Image.open(path).convert(mode)), pixels.shape[1:], antialias=True)
    return np.abs(expected.numpy().astype(int) - pixels).max() <= 1


# ------------------------------------------------------------------------------------------ data sets


def test_digits_are_split_stratified_and_always_the_same():
    data = load_data("digits")
    assert data.images.shape == (1797, 1, 8, 8) and data.images.max() == 255 and not data.multilabel
    assert len(data.train) == 1437 and len(data.test) == 360 and not set(data.train) & set(data.test)
    assert np.abs(data.targets[data.test].mean(0) / data.targets.mean(0) - 1).max() < 0.03
    assert (load_data("digits").train == data.train).all()


def test_cxr14_in_three_layouts(tmp_path):
    root = tmp_path / "root"
    cxr14(root)
    data = load_data("cxr14", root, size=24, cache=tmp_path / "one")
    assert data.images.shape == (30, 1, 24, 24) and data.images.dtype == np.uint8 and data.multilabel
    for part, name in ((data.train, "train_val_list.txt"), (data.test, "test_list.txt")):
        assert [data.names[k] for k in part] == (root / name).read_text().split()
    assert len(data.classes) == 14 and (data.classes[0], data.classes[13]) == ("Atelectasis", "Hernia")
    for name, row, pixels in zip(data.names, data.targets, data.images):
        found = "|".join(sorted(data.classes[k] for k in np.flatnonzero(row))) or "No Finding"
        assert found == FINDINGS[(int(name[:8]) * 3 + int(name[9:12])) % 5]
        assert close_to_file(pixels, root / "images" / name, "L")
    (root / "Data_Entry_2017_v2020.csv").rename(root / "Data_Entry_2017.csv")
    (root / "images").rename(root / "data")
    assert (load_data("cxr14", root, size=24, cache=tmp_path / "two").images == data.images).all()
    for k, file in enumerate(sorted((root / "data").iterdir())):
        (root / f"images_{1 + k // 10:03d}/images").mkdir(parents=True, exist_ok=True)
        file.rename(root / f"images_{1 + k // 10:03d}/images" / file.name)
    assert (load_data("cxr14", root, size=24, cache=tmp_path / "three").images == data.images).all()


@pytest.mark.parametrize("prefix, uncertain, value", [
    ("CheXpert-v1.0-small", "zeros", 0), ("CheXpert-v1.0", "ones", 1), ("CheXpert-v1.0", "ignore", np.nan)])
def test_chexpert_is_split_by_patient_and_has_three_policies(tmp_path, prefix, uncertain, value):
    chexpert(tmp_path, prefix)
    data = load_data("chexpert", tmp_path / prefix if value else tmp_path, size=16, uncertain=uncertain)
    patient = np.array([int(re.search(r"patient(\d+)", name)[1]) for name in data.names])
    parts = [sorted(set(patient[part].tolist())) for part in (data.train, data.test)]
    # A stable hash: these patients for good. Patients in neither part are for tuning.
    assert parts[1] == [0, 5, 9, 10, 11, 14, 23] and len(data.train) == 2 * len(parts[0]) == 58
    assert set(range(40)) - set(parts[0] + parts[1]) == {2, 21, 29, 36}
    for part, of_part in ((data.train, value), (data.test, 0))[:1 if uncertain == "ones" else 2]:
        expected = np.array([1, 0, of_part, 0], np.float32)[(patient[part, None] + np.arange(14)) % 4]
        assert np.array_equal(data.targets[part], expected, equal_nan=True)


@pytest.mark.parametrize("groupings", [True, False])
def test_isic2018_is_split_by_lesion(tmp_path, groupings):
    isic2018(tmp_path, groupings)
    data = load_data("isic2018", tmp_path, size=24)
    number = np.array([int(name[5:]) - 24306 for name in data.names])
    assert data.classes == LESIONS and not data.multilabel and (data.targets.argmax(1) == number % 7).all()
    assert sorted([*data.train, *data.test]) == list(range(84)) and 8 <= len(data.test) <= 26
    lesions = [set(zip(number[part] % 7, number[part] // 14)) for part in (data.train, data.test)]
    assert groupings == (not lesions[0] & lesions[1])
    assert close_to_file(data.images[5], f"ISIC2018_Task3_Training_Input/{data.names[5]}.jpg", "RGB")


@pytest.mark.parametrize("grey, multilabel", [(True, True), (True, False), (False, True), (False, False)])
def test_a_medmnist_file_is_read(grey, multilabel):
    arrays, data = npz(Path(), grey, multilabel), load_data("set.npz")
    assert data.name == "set" and data.images.shape == (80, 1 if grey else 3, 16, 16)
    assert data.multilabel == multilabel and [*data.train, *data.test] == [*range(80)]
    assert len(data.test) == 16
    for part, index, row in (("train", 3, 3), ("val", 2, 62), ("test", 6, 70)):
        image, label = arrays[f"{part}_images"][index], arrays[f"{part}_labels"][index]
        assert (data.images[row] == (image if grey else image.transpose(2, 0, 1))).all()
        assert (data.targets[row] == (label if multilabel else np.arange(4) == label)).all()


def test_a_folder_of_own_images_is_read(capsys):
    names = folder(Path("pets"))
    data, out = load_data("pets", size=24), capsys.readouterr().out
    assert data.name == "pets" and data.images.shape == (60, 1, 24, 24) and not data.multilabel
    assert data.classes == ["cat", "dog"] and set(data.names) == set(names)
    number = np.array([int(name[2:5]) for name in data.names])
    known = ~np.isnan(data.targets).any(1)
    assert (known == (number < 40)).all() and (data.targets[known, 0] == number[known] % 2).all()
    assert sorted([*data.train, *data.test]) == list(range(60)) and known[data.test].all()
    for word in ("60 images", "40 labelled", "20 unlabelled", "cat 20", "dog 20", f"{len(data.test)} test"):
        assert word in out
    assert close_to_file(data.images[7], f"pets/{data.names[7]}", "L")
    # Groups, unknown findings and colours; then a given split.
    names = sorted(folder(Path("pets"), mode="RGB"))
    rows = [f"{name},1,{'' if k % 2 else 0},1,{k // 4}" for k, name in enumerate(names)]
    Path("pets/labels.csv").write_text("image,a,b,c,group\n" + "\n".join(rows))
    data = load_data("pets", size=16, cache="cache")
    assert data.multilabel and data.images.shape[1] == 3 and np.isnan(data.targets[:, 1]).sum() == 30
    groups = [{names.index(data.names[k]) // 4 for k in part} for part in (data.train, data.test)]
    assert not groups[0] & groups[1] and len(groups[0] | groups[1]) == 15 and groups[1]
    rows = [f"{row},{'test' if k // 4 in (3, 5) else 'train'}" for k, row in enumerate(rows)]
    Path("pets/labels.csv").write_text("image,a,b,c,group,split\n" + "\n".join(rows))
    data = load_data("pets", size=16, cache="cache")
    assert {names.index(data.names[k]) // 4 for k in data.test} == {3, 5} and len(data.test) == 8


def edit(name, change):
    return lambda: Path("root", name).write_text(change(Path("root", name).read_text()))


def replace(name, old, new):
    return edit(name, lambda text: text.replace(old, new, 1))


def of_table(text):
    return edit("labels.csv", lambda old: text)


ENTRIES, BROKEN = "Data_Entry_2017_v2020.csv", "images/00000002_001.png"
TRAIN = "CheXpert-v1.0-small/train.csv"
TRUTH, OWN = "{0}GroundTruth/{0}GroundTruth.csv".format("ISIC2018_Task3_Training_"), "b/001.png"


@pytest.mark.parametrize("make, spoil, word", [
    (cxr14, lambda: Path("root", ENTRIES).unlink(), "Data_Entry_2017"),
    (cxr14, lambda: Path("root/test_list.txt").unlink(), "test_list.txt"),
    (cxr14, lambda: Path("root", BROKEN).unlink(), BROKEN),
    (cxr14, lambda: Path("root", BROKEN).write_bytes(b"\x89PNG not an image"), BROKEN),
    (cxr14, lambda: os.truncate(f"root/{BROKEN}", 300), BROKEN),
    (cxr14, lambda: Image.fromarray(np.full((9, 9), 40000, np.uint16)).save(f"root/{BROKEN}"), BROKEN),
    (cxr14, replace(ENTRIES, "Effusion", "Confusion"), "Confusion"),
    (cxr14, replace(ENTRIES, "Effusion", "No Finding|Mass"), "No Finding"),
    (cxr14, edit(ENTRIES, lambda text: text + "nonsense\n"), "root"),
    (cxr14, edit("test_list.txt", lambda text: text + "00000000_000.png\n"), "00000000_000.png"),
    (cxr14, edit("test_list.txt", lambda text: text + "99999999_000.png\n"), "99999999_000.png"),
    (cxr14, edit("test_list.txt", lambda text: ""), "empty"),
    (chexpert, replace(TRAIN, "0.0", "0.5"), "0.5"),
    (chexpert, edit(TRAIN, lambda text: text[:-2].rpartition(",")[0]), "train.csv"),
    (chexpert, edit(TRAIN, lambda text: text + text.splitlines()[1]), "patient00000"),
    (isic2018, replace(TRUTH, "1.0", "0.0"), "ISIC_0024306"),
    (isic2018, replace(TRUTH, "0.0", "1.0"), "ISIC_0024306"),
    (folder, lambda: Path("root/labels.csv").unlink(), "labels.csv"),
    (folder, of_table(""), "root"),
    (folder, replace("labels.csv", "image", "file"), "image"),
    (folder, replace("labels.csv", OWN, "b/999.png"), "b/999.png"),
    (folder, edit("labels.csv", lambda text: text + OWN + ",1,0\n"), OWN),
    (folder, replace("labels.csv", OWN + ",1", OWN + ",maybe"), OWN),
    (folder, replace("labels.csv", OWN + ",1,0", OWN + ",1,2"), OWN),
    (folder, replace("labels.csv", OWN + ",1,0", OWN + ",1"), "labels.csv"),
    (folder, of_table(f"image,cat,group,split\na/000.jpg,1,g7,train\n{OWN},0,g7,test\n"), "g7"),
    (folder, of_table(f"image,cat,split\na/000.jpg,1,train\n{OWN},0,validation\n"), OWN),
    (folder, of_table(f"image,cat,split\na/000.jpg,1,train\n{OWN},,test\n"), OWN),
    (folder, of_table("image,cat\na/000.jpg,\n"), "label"),
    (folder, lambda: [path.unlink() for path in Path("root").rglob("*.*")], "root"),
    (folder, lambda: Path("root", OWN).write_bytes(b"not an image"), OWN),
    (npz, lambda: np.savez("root/set.npz", train_images=np.zeros((9, 16, 16), np.uint8)), "set.npz"),
    (npz, lambda: npz(Path("root"), train_labels=np.array([[print]] * 60, object)), "set.npz"),
    (npz, lambda: npz(Path("root"), train_images=np.zeros((60, 16, 16))), "uint8"),
    (npz, lambda: npz(Path("root"), train_labels=np.zeros(60, np.uint8)), "set.npz"),
    (npz, lambda: npz(Path("root"), train_labels=np.zeros((59, 1), np.uint8)), "n"),
    (npz, lambda: Path("root/set.npz").write_bytes(b""), "set.npz"),
    (npz, lambda: os.truncate("root/set.npz", 900), "set.npz"),
    (npz, lambda: Path("root/set.npz").unlink(), "set.npz")])
def test_bad_data_is_named_in_one_line_and_nothing_is_written(make, spoil, word, capsys):
    make(Path("root"))
    spoil()
    before, own = files(), dict(folder="root", npz="root/set.npz").get(make.__name__)
    where = ["--data", own] if own else ["--data", make.__name__, "--root", "root"]
    assert word in error_of(["pretrain", *where, *SMALL], capsys)
    assert [name for name in files() if not name.endswith(".part")] == before


NAN_7, ONES = np.where(np.arange(40) == 7, np.nan, np.ones((3, 40))).T, np.ones((40, 3))


@pytest.mark.parametrize("change, word", [
    (dict(images=np.zeros((40, 16, 16), np.uint8)), "uint8"),
    (dict(images=np.zeros((40, 1, 16, 16))), "uint8"),
    (dict(images=np.zeros((39, 1, 16, 16), np.uint8)), "names"), (dict(targets=np.zeros((40, 4))), "targets"),
    (dict(targets=np.where(np.arange(40)[:, None] == 7, 0.5, ONES)), "image i7 "),
    (dict(targets=np.eye(3)[np.arange(40) % 3] + NAN_7 * [0, 0, 0], test=[7], multilabel=False), "image i7 "),
    (dict(targets=NAN_7, test=[7], train=[1]), "image i7 "), (dict(test=[]), "empty"),
    (dict(test=[40]), "ind"), (dict(test=[-1]), "ind"), (dict(train=[1], test=[3, 3]), "image i3 "),
    (dict(train=[3], test=[3]), "image i3 "),
    (dict(targets=1 * (np.eye(3)[[0] * 40] + np.isnan(NAN_7) > 0), multilabel=False), "image i7 "),
    (dict(names=["i8" if k == 7 else f"i{k}" for k in range(40)]), "image i8 ")])
def test_data_made_by_hand_is_checked_and_the_image_is_named(change, word):
    with pytest.raises(UserError, match=word):
        changed(made_by_hand(), **change)
    assert changed(made_by_hand(), classes=range(3), names=np.arange(40)).names[-1] == "39"


def test_decoding_resumes_and_a_finished_cache_needs_no_originals(tmp_path, monkeypatch):
    root, cache, opened, original = tmp_path / "root", tmp_path / "cache", [], Image.open
    cxr14(root)
    load = lambda size=16, **more: load_data("cxr14", root, size=size, cache=cache, **more).images
    monkeypatch.setattr(Image, "open", lambda path, *more: opened.append(path) or original(path, *more))
    first, (whole,) = np.array(load()), cache.iterdir()
    assert len(opened) == 30 and whole.stat().st_size == first.size
    # Killed within image 13: 12 whole images are kept.
    content, part = whole.read_bytes(), whole.with_suffix(".part")
    whole.rename(part)
    os.truncate(part, 12 * 16 * 16 + 99)
    opened.clear()
    assert (load() == first).all() and len(opened) == 18 and list(cache.iterdir()) == [whole]
    whole.unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Image, "open", interrupt)
        load()
    assert not whole.exists() and (load() == first).all() and whole.read_bytes() == content
    for name in ("00000000_001.png", "00000009_002.png"):
        (root / "images" / name).unlink()
    with pytest.raises(UserError, match="2 of 30 .*0000000[09]_00[12].png.*--partial"):
        load(24)
    data = load_data("cxr14", root, size=24, partial=True)
    assert (len(data.images), len(data.train), len(data.test)) == (28, 19, 9)
    assert close_to_file(data.images[1], root / "images" / data.names[1], "L")
    (root / "images").rename(root / "gone")
    opened.clear()
    assert (load() == first).all() and not opened
    with pytest.raises(UserError):
        load(partial=True, size=20)
    os.truncate(whole, 1000)
    with pytest.raises(UserError, match=whole.name):
        load()


# ------------------------------------------------------------------------------------ labelled images


def long_tailed():
    """1,000 training images: class a on 500, b on 100, c on 3 of them; 447 without a finding."""
    targets = np.zeros((1010, 3), np.float32)
    targets[:500, 0] = targets[450:550, 1] = targets[600:603, 2] = 1
    return Data("tail", np.zeros((1010, 1, 8, 8), np.uint8), targets, ["a", "b", "c"],
                [f"{k}.png" for k in range(1010)], np.arange(1000), np.arange(1000, 1010), True)


def test_the_labelled_are_a_fraction_of_each_class_and_at_least_one():
    data = long_tailed()
    samples = [s2mts2.choose_labelled(data, 0.02, seed) for seed in range(20)]
    for chosen in samples:
        assert chosen.dtype == np.int64 and (np.diff(chosen) > 0).all() and chosen.max() < 1000
        count, without = data.targets[chosen].sum(0), (data.targets[chosen].sum(1) == 0).sum()
        # Sampled: 10, 2, 1 and 9 of 447. A sample of one class may contain another class as well.
        assert count[0] >= 10 and count[1] >= 2 and count[2] == 1 and without == 9 and 19 <= len(chosen) <= 22
    assert len(set(map(tuple, samples))) == 20
    assert (s2mts2.choose_labelled(data, 0.02, 7) == samples[7]).all()


@pytest.mark.parametrize("number", [4, 50.0, 777, 1000])
def test_a_number_of_labels_is_met_exactly_with_each_class(number):
    data = long_tailed()
    chosen = s2mts2.choose_labelled(data, number, 3)
    assert len(np.unique(chosen)) == number and (data.targets[chosen].sum(0) >= 1).all()
    assert (data.targets[chosen].sum(1) == 0).any()
    assert number < 50 or abs(data.targets[chosen, 0].mean() - 0.5) < 0.1
    digits = load_data("digits")
    assert s2mts2.choose_labelled(digits, 2.0 * 10, 0).shape == (20,)


def test_labels_from_a_file_and_only_among_known_targets(tmp_path, capsys):
    data, path, targets = long_tailed(), tmp_path / "list.txt", long_tailed().targets
    chosen = s2mts2.choose_labelled(data, 0.05, 1)
    path.write_text("\n".join(data.names[k] for k in [*chosen[::-1], *chosen[:3]]) + "\n\n")
    assert all((s2mts2.choose_labelled(data, labels, 99) == chosen).all() for labels in (path, str(path)))
    assert len(s2mts2.choose_labelled(data, "all", 0)) == 1000
    targets[:900], targets[900:950, 0] = np.nan, np.nan
    data, _ = changed(data, targets=targets), capsys.readouterr()
    for labels, count in (("all", 100), (0.2, 20), (7, 7), (100, 100)):
        chosen = s2mts2.choose_labelled(data, labels, 0)
        assert len(chosen) == count and chosen.min() >= 900 and "warning" in capsys.readouterr().out
    path.write_text("5.png\n")
    for labels in (101, path):
        with pytest.raises(UserError):
            s2mts2.choose_labelled(data, labels, 0)


@pytest.mark.parametrize("labels", [3, 1001, "nowhere.txt", "empty.txt", "stranger.txt", "test.txt"])
def test_labels_that_do_not_match_raise_an_error(labels):
    for name, text in (("empty", "\n"), ("stranger", "1.png\nx.png\n"), ("test", "1005.png\n")):
        Path(f"{name}.txt").write_text(text)
    with pytest.raises((UserError, OSError), match=str(labels)):
        s2mts2.choose_labelled(long_tailed(), labels, 0)


# ---------------------------------------------------------------------------------------------- views


def photo(count=3, channels=3, side=48):
    """Smooth random images in [0, 1]."""
    return F.interpolate(torch.rand(count, channels, 6, 6), (side, side), mode="bicubic").clamp(0, 1)


def normalised(images):
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    if images.shape[1] == 1:
        mean, std = mean.mean(0, keepdim=True), std.mean(0, keepdim=True)
    return (images - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


def column(*values):
    return torch.tensor(values, dtype=torch.float32)


ZERO, ONE = torch.zeros(3), torch.ones(3)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_plain_view_is_the_normalised_image(channels):
    images = (photo(channels=channels) * 255).to(torch.uint8)
    before, views = images.clone(), s2mts2.random_views(images, PLAIN, 48)
    assert views.dtype == torch.float32 and (images == before).all()
    assert torch.allclose(views, normalised(images / 255), atol=1e-6)
    resized = normalised(TF.resize(images / 255, [20, 20], antialias=True))
    assert torch.allclose(s2mts2.random_views(images, PLAIN, 20), resized, atol=1e-5)
    # Zero strengths with probability 1 change nothing.
    idle = dict(PLAIN, rotate_p=1.0, jitter_p=1.0, blur_p=1.0)
    assert torch.allclose(s2mts2.random_views(images, idle, 48), views, atol=1e-5)


def test_crop_rotation_and_flips_agree_with_torchvision():
    images, angles = photo(), column(10, -7, 90)
    views = s2mts2.crop_rotate_flip(images, column(.25, .125, .5), column(.125, .25, .25),
                                    column(.5, .5, .25), column(.5, .25, .5), ZERO, ZERO, ZERO)
    flipped = s2mts2.crop_rotate_flip(images, ZERO, ZERO, ONE, ONE, ZERO, column(1, 0, 0), column(0, 0, 1))
    rotated = s2mts2.crop_rotate_flip(images, ZERO, ZERO, ONE, ONE, angles, ZERO, ZERO)
    both = s2mts2.crop_rotate_flip(images, ZERO, ZERO, ONE, ONE, angles, ONE, ONE)
    crops = [(6, 12, 24, 24), (12, 6, 12, 24), (12, 24, 24, 12)]
    flips = (TF.hflip, lambda image: image, TF.vflip)
    for k, image in enumerate(images):
        expected = TF.resize(TF.crop(image, *crops[k]), [48, 48], antialias=False)
        # torchvision does not see pixels beyond the border of the crop.
        assert (views[k] - expected)[:, 4:-4, 4:-4].abs().max() < 1e-5
        assert torch.allclose(flipped[k], flips[k](image), atol=1e-6)
        expected = TF.rotate(image, float(angles[k]), TF.InterpolationMode.BILINEAR)
        assert torch.allclose(rotated[k], expected, atol=1e-5)
        assert torch.allclose(both[k], TF.vflip(TF.hflip(expected)), atol=1e-5)
    # All three at once.
    images = photo(1, 1, 64)
    view = s2mts2.crop_rotate_flip(images, *map(column, (.25, .25, .5, .5, 20, 1, 0)))
    cropped = TF.resized_crop(images, 16, 16, 32, 32, [64, 64], antialias=False)
    expected = TF.hflip(TF.rotate(cropped, 20, TF.InterpolationMode.BILINEAR))
    assert (view - expected)[..., 16:48, 16:48].abs().max() < 0.01


def test_brightness_contrast_saturation_and_hue():
    images, factors = photo(), column(.6, 1.3, 1.4)
    for place, theirs in enumerate((TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)):
        values = [factors if k == place else ONE for k in range(3)]
        ours, grey = (s2mts2.jitter_colours(each, *values, ZERO) for each in (images, images[:, :1]))
        for k in range(3):
            assert (ours[k] - theirs(images[k], float(factors[k]))).abs().max() < 0.005
            assert (grey[k] - theirs(images[k, :1], float(factors[k]))).abs().max() < 1e-5
    rotate = lambda images, angle: s2mts2.jitter_colours(images, ONE, ONE, ONE, ONE * angle)
    images = images * 0.2 + 0.4
    assert torch.allclose(rotate(images, 1), images, atol=1e-3)
    assert (rotate(images, 0.5) - images).abs().max() > 0.05
    assert (TF.rgb_to_grayscale(rotate(images, 0.5)) - TF.rgb_to_grayscale(images)).abs().max() < 0.005
    assert torch.allclose(rotate(rotate(rotate(images, 1 / 3), 1 / 3), 1 / 3), images, atol=1e-3)


@pytest.mark.parametrize("channels", [1, 3])
def test_blur_agrees_with_torchvision_and_erase_clears_the_rectangle(channels):
    images, sigma = torch.rand(3, channels, 48, 40), column(0.1, 1.0, 2.0)
    expected = torch.ones(2, channels, 8, 8)
    for image, view, width in zip(images, s2mts2.gaussian_blur(images, sigma, 2.0), sigma.tolist()):
        assert torch.allclose(view, TF.gaussian_blur(image, [13, 13], [width] * 2), atol=1e-5)
    expected[0, :, 4:6, 2:6] = 0
    rectangle = column(.25, 0), column(.5, 0), column(.5, 0), column(.25, 1)
    assert (s2mts2.erase(torch.ones_like(expected), *rectangle) == expected).all()


STRONG = dict(centre=0.1, crop=0.8, vertical_flip_p=0.5, rotate=10.0, rotate_p=0.5, flip_p=0.5, jitter=0.4,
              hue=0.4, jitter_p=0.8, blur=2.0, blur_p=0.5, erase_p=0.5)


@pytest.mark.parametrize("channels", [1, 3])
def test_each_view_has_its_own_random_numbers_and_a_seed_repeats_them(channels):
    copies = photo(1, channels).mul(255).to(torch.uint8).expand(16, -1, -1, -1)
    seeded = lambda seed: torch.manual_seed(seed) and s2mts2.random_views(copies, STRONG, 32)
    views = seeded(5)
    assert set(STRONG) == set(PLAIN) and views.shape == (16, channels, 32, 32) and views.isfinite().all()
    assert torch.cdist(views.flatten(1), views.flatten(1)).add(torch.eye(16)).min() > 0.1
    assert (seeded(5) == views).all() and (seeded(6) != views).any()


@pytest.mark.parametrize("strength, probability", [
    (dict(flip_p=0.5), 0.5), (dict(vertical_flip_p=0.3), 0.3), (dict(rotate=10.0, rotate_p=0.3), 0.3),
    (dict(jitter=0.4, jitter_p=0.8), 0.8), (dict(hue=0.4, jitter_p=0.6), 0.6), (dict(erase_p=0.5), 0.5),
    (dict(jitter=0.4, hue=0.4, jitter_p=0.5), 0.5), (dict(blur=2.0, blur_p=0.5), 0.5), (dict(crop=0.8), 1.0)])
def test_each_change_has_its_probability(strength, probability):
    copies = photo(1, 3, 24).expand(600, -1, -1, -1)
    views = s2mts2.random_views(copies, dict(PLAIN, **strength), 24) - s2mts2.random_views(copies, PLAIN, 24)
    assert abs((views.abs().flatten(1).amax(1) > 1e-3).float().mean() - probability) < 0.07


def test_random_crops_have_the_right_area_and_keep_off_the_border(monkeypatch):
    bordered, seen = torch.ones(200, 1, 40, 40), []
    bordered[..., 4:36] = 0.5
    views = s2mts2.random_views(bordered, dict(PLAIN, centre=0.25, crop=0.5), 40)
    assert (views - normalised(torch.full((1, 1, 1, 1), 0.5))).max() < 1e-5
    monkeypatch.setattr(s2mts2, "crop_rotate_flip", lambda images, *random: seen.extend(random[:4]) or images)
    s2mts2.random_views(torch.zeros(4000, 1, 4, 4), dict(PLAIN, crop=0.8), 4)
    left, top, width, height = seen
    area = width * height
    assert 0.199 < area.min() < 0.25 and 0.95 < area.max() <= 1 and abs(area.mean() - 0.58) < 0.03
    assert (width / height).max() <= 4 / 3 + 1e-4 and left.min() >= 0 and (left + width).max() <= 1.00001
    assert top.min() >= 0 and (top + height).max() <= 1.00001


# -------------------------------------------------------------------- network, teacher, losses, metrics


@pytest.mark.parametrize("arch", ["densenet121", "tiny"])
def test_a_grey_network_equals_the_colour_network_on_a_grey_image(arch):
    colour = (torch.manual_seed(1), s2mts2.build_network(arch, 3, 5).eval())[1]
    grey = (torch.manual_seed(1), s2mts2.build_network(arch, 1, 5).eval())[1]
    grey.classifier.load_state_dict(colour.classifier.state_dict())
    images = torch.randn(2, 1, 64, 64)
    assert torch.allclose(grey(images), colour(images.expand(-1, 3, -1, -1)), atol=1e-4)
    assert s2mts2.build_network("tiny", 1, 7, "mlp")(images).shape == (2, 7)


def test_the_ema_equals_the_general_sum_over_changing_students():
    student, a = s2mts2.build_network("tiny", 1, 4).double(), 0.9
    teacher = s2mts2.make_teacher(student)
    places = [value.data_ptr() for value in teacher.state_dict().values()]
    expected = {name: a ** 7 * value for name, value in teacher.state_dict().items()}
    for n in range(1, 8):
        for name, value in student.state_dict().items():
            value.copy_(torch.randn_like(value) if value.is_floating_point() else torch.tensor(10 * n))
            expected[name] = expected[name] + (1 - a) * a ** (7 - n) * value
        before = copy.deepcopy(dict(student.state_dict()))
        s2mts2.ema_update(teacher, student, a)
        assert equal(before, dict(student.state_dict()))
    assert places == [value.data_ptr() for value in teacher.state_dict().values()]
    for name, value in teacher.state_dict().items():
        assert torch.allclose(value, expected[name], atol=1e-12) if value.is_floating_point() else value == 70
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_the_teachers_batchnorm_uses_the_batch_and_keeps_its_running_statistics():
    student = s2mts2.build_network("tiny", 1, 4)
    teacher, images = s2mts2.make_teacher(student).train(), torch.randn(8, 1, 32, 32) * 5 + 3
    before = {name: value.clone() for name, value in teacher.state_dict().items() if "num" not in name}
    training = teacher(images)
    assert torch.allclose(training, student.train()(images), atol=1e-5)
    assert equal(before, {name: teacher.state_dict()[name] for name in before})
    # In evaluation it uses the running statistics.
    one = teacher.eval()(images)[0]
    assert torch.allclose(one, teacher(images[:1])[0], atol=1e-4)
    assert not torch.allclose(one, training[0], atol=1e-3)
    teacher.features.norm0.running_mean.add_(1)
    assert not torch.allclose(one, teacher(images)[0], atol=1e-3)


def embeddings(images=6, keys=4, dim=10, negatives=30, dtype=torch.float64):
    query = F.normalize(torch.randn(images, dim, dtype=dtype), dim=1)
    key = F.normalize(query[:, None] + torch.randn(images, keys, dim, dtype=dtype) * 0.5, dim=2)
    return query.clone().requires_grad_(), key, F.normalize(torch.randn(negatives, dim, dtype=dtype), dim=1)


def loss_with_covariance_matrices(query, keys, queue, t, weight):
    losses = []
    for q, k in zip(query, keys):
        mean = k.mean(0)
        covariance = sum(torch.outer(one - mean, one - mean) for one in k) / len(k)
        positive = q @ mean / t + weight / (2 * t ** 2) * q @ covariance @ q
        losses.append(torch.log(positive.exp() + sum((q @ n / t).exp() for n in queue)) - q @ mean / t)
    return sum(losses) / len(losses)


@pytest.mark.parametrize("weight", [0.0, 0.7, 1.0, 2.0])
def test_the_joint_contrastive_loss_equals_its_definition(weight):
    query, keys, queue = embeddings()
    ours = s2mts2.joint_contrastive_loss(query, keys, queue, 0.3, weight)
    theirs = loss_with_covariance_matrices(query, keys, queue, 0.3, weight)
    assert abs(ours - theirs) < 1e-9
    assert (torch.autograd.grad(ours, query)[0] - torch.autograd.grad(theirs, query)[0]).abs().max() < 1e-9
    # With one key it is InfoNCE.
    logits = torch.cat([(query * keys[:, 0]).sum(1, keepdim=True), query @ queue.T], 1) / 0.2
    expected = F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))
    assert abs(s2mts2.joint_contrastive_loss(query, keys[:, :1], queue, 0.2, weight) - expected) < 1e-12


def test_the_loss_bounds_the_mean_over_many_gaussian_keys():
    query, keys, queue = (each.detach() for each in embeddings(images=3, keys=5, negatives=200))
    mean, noise, t = keys.mean(1, keepdim=True), torch.randn(3, 100_000, 5, dtype=torch.float64), 0.2
    # mean + sum_m z_m (k_m - mean) / sqrt(M) has the mean and the biased covariance of the keys.
    sample = mean + torch.cat([noise, -noise], 1) @ (keys - mean) / math.sqrt(5)
    positives = torch.einsum("nd,nsd->ns", query, sample) / t
    negatives = (query @ queue.T / t).exp().sum(1, keepdim=True)
    monte_carlo = (torch.log(positives.exp() + negatives) - positives).mean()
    assert -2e-4 <= s2mts2.joint_contrastive_loss(query, keys, queue, t, 1.0) - monte_carlo <= 0.005
    assert s2mts2.joint_contrastive_loss(query, keys, queue, t, 0.0) < monte_carlo - 0.005


def test_the_loss_is_finite_and_forms_no_tensor_larger_than_the_logits():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            self.size = max(self.size, result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    query, keys, queue = embeddings(images=30, keys=5, dim=20, negatives=200, dtype=torch.float32)
    keys[0, 0], keys[0, 1] = query[0].detach(), -query[0].detach()
    with Largest() as largest:
        loss = s2mts2.joint_contrastive_loss(query, keys, queue, 0.005, 2.0)
        loss.backward()
    assert 0 < largest.size <= 30 * 201 and loss.isfinite() and query.grad.isfinite().all()


@pytest.mark.parametrize("multilabel", [True, False])
def test_unknown_targets_have_no_part_in_loss_and_metrics(multilabel):
    logits, other = torch.randn(2, 40, 3, dtype=torch.float64)
    truth = torch.eye(3, dtype=torch.float64)[torch.arange(40) % 3]
    unknown = torch.rand(40, 3) < 0.3 if multilabel else (torch.arange(40)[:, None] % 4 == 1).expand(40, 3)
    targets = truth.masked_fill(unknown, math.nan)
    p, soft = logits.sigmoid(), logits.exp() / logits.exp().sum(1, keepdim=True)
    terms = [-(p[n, c] if truth[n, c] else 1 - p[n, c]).log() for n in range(40) for c in range(3)
             if not unknown[n, c]] if multilabel else [-soft[n, n % 3].log() for n in range(40) if n % 4 != 1]
    loss = s2mts2.supervised_loss(logits.requires_grad_(), targets, multilabel)
    assert loss.item() == pytest.approx(sum(terms).item() / len(terms), rel=1e-9)
    loss.backward()
    assert (logits.grad[unknown] == 0).all() and (logits.grad[~unknown] != 0).all()
    ours, theirs = (p, other.sigmoid()) if multilabel else (soft, other.softmax(1))
    expected = (ours - theirs).square().sum().item() / 120
    assert s2mts2.consistency_loss(logits, other, multilabel).item() == pytest.approx(expected, rel=1e-9)
    scores, targets = soft.detach().numpy(), targets.numpy()
    targets[:, 2] = np.where(targets[:, 2] == 1, np.nan, targets[:, 2])
    result = s2mts2.classification_metrics(targets, scores, list("abc"), True)
    auc = [metrics.roc_auc_score(targets[known, c], scores[known, c])
           for c, known in enumerate(~np.isnan(targets[:, :2]).T)]
    assert result["auc"] == dict(a=pytest.approx(auc[0]), b=pytest.approx(auc[1]), c=None)
    assert result["mean_auc"] == pytest.approx(np.mean(auc))


def test_multi_class_metrics_agree_with_scikit_learn():
    random = np.random.default_rng(0)
    truth, scores = random.integers(0, 3, 60), random.random((60, 4)).astype(np.float32)
    scores[np.arange(60), truth] += 0.4
    result = s2mts2.classification_metrics(np.eye(4)[truth], scores, list("abcd"), False)
    auc, most = [metrics.roc_auc_score(truth == k, scores[:, k]) for k in range(3)], scores.argmax(1)
    assert result["auc"]["d"] is None and result["mean_auc"] == pytest.approx(np.mean(auc))
    mean = dict(labels=[0, 1, 2], average="macro")
    names = ["accuracy", "macro_sensitivity", "macro_f1", "macro_specificity"]
    assert [result[name] for name in names] == (
        pytest.approx([metrics.accuracy_score(truth, most), metrics.recall_score(truth, most, **mean),
                       metrics.f1_score(truth, most, **mean),
                       np.mean([np.mean(most[truth != k] != k) for k in range(3)])]))


# ------------------------------------------------------------------------------------- the two stages


@pytest.mark.parametrize("length, batch", [(7, 3), (5, 5), (4, 9), (8, 4)])
def test_the_queue_holds_the_newest_means_first(length, batch):
    queue, means = torch.full((length, 2), -1.0), torch.arange(36.0).repeat(2, 1).T
    place, expected = queue.data_ptr(), [-1.0] * length
    for first in range(0, 36, batch):
        s2mts2.enqueue(queue, means[first:first + batch])
        expected = (list(range(first, min(36, first + batch))) + expected)[:length]
        assert queue[:, 0].tolist() == queue[:, 1].tolist() == expected and queue.data_ptr() == place


@pytest.mark.parametrize("channels, multilabel", [(1, True), (3, False)])
def test_both_stages_on_data_made_by_hand_with_pathlib_paths(channels, multilabel, monkeypatch):
    data, args, first = made_by_hand(channels, multilabel), parse_args(["pretrain", *SMALL]), []
    args.out, args.root = Path("mine"), Path("root")
    student, teacher = s2mts2.pretrain(data, args)
    saved = state("mine/pretrain.pt")
    for name, network in (("student", student), ("teacher", teacher)):
        assert equal(saved[name], dict(network.state_dict()))
    # Student and teacher differ. The queue holds means of keys that are not normalised again.
    assert not equal(saved["student"], saved["teacher"]) and saved["queue"].shape == (28, 128)
    assert (saved["queue"].norm(dim=1) < 0.99999).all() and np.array(Image.open("mine/views.png")).std() > 10
    start = "finetune --from mine/pretrain.pt --batch 8 --labels 6".split()
    args = parse_args([*start, "--epochs", "2"])
    assert args.size == 32 and args.arch == "tiny"
    args.start, args.out = Path(args.start), Path("mine")
    # Stage 2 starts from stage 1: with a learning rate of 0 the first update shows it.
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(s2mts2, "ema_update", lambda *networks: first.extend(networks[:2]) or interrupt())
        s2mts2.finetune(data, parse_args([*start, "--lr", "0", "--out", "new"]))
    for network, name in zip(first, ("teacher", "student")):
        weights = {key: value for key, value in network.named_parameters() if "classifier" not in key}
        assert weights and all(torch.equal(value, saved[name][key]) for key, value in weights.items())
    assert torch.equal(first[0].classifier.weight, first[1].classifier.weight)
    result, (header, names, scores) = s2mts2.finetune(data, args), table("mine/predictions.csv")
    assert json.loads(Path("mine/metrics.json").read_text()) == result and "mean_auc" in result["student"]
    assert header == ["image", *data.classes] == ["image", *result["auc"]]
    assert ("accuracy" in result) != multilabel
    assert names == [data.names[k] for k in data.test]
    assert multilabel or np.allclose(scores.sum(1), 1, atol=1e-4)
    labelled = Path("mine/labelled.txt").read_text().split()
    assert len(labelled) == 6 and set(labelled) <= {data.names[k] for k in data.train}
    assert [(line["stage"], line["epoch"]) for line in lines("mine/log.jsonl")] == [
        ("pretrain", 0), ("finetune", 0), ("finetune", 1)]
    broken = torch.load("mine/pretrain.pt", weights_only=True)
    broken["state"]["teacher"].pop("features.norm0.weight")
    torch.save(broken, "broken.pt")
    with pytest.raises(UserError, match="broken.pt"):
        s2mts2.finetune(data, parse_args("finetune --from broken.pt --labels 6 --out new".split()))


class Mean(nn.Module):
    """Its outputs show which image it sees: the mean of the view."""
    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(1, 3)
        nn.init.ones_(self.classifier.weight), nn.init.zeros_(self.classifier.bias)

    def forward(self, views):
        return self.classifier(views.mean((1, 2, 3))[:, None])


@pytest.mark.parametrize("consistency", ["0", "1"])
def test_each_loss_of_stage_2_gets_the_right_images(consistency, monkeypatch):
    data, seen, unseen = made_by_hand(count=30), [], []
    data.images[...] = np.arange(30, dtype=np.uint8).reshape(-1, 1, 1, 1) * 8
    data.targets[...] = (np.arange(30)[:, None] >> np.arange(3)) % 2
    number = lambda logits: ((logits.detach()[:, 0] * 0.226 + 0.449) * 255 / 8).round().int().tolist()

    def supervised(logits, targets, multilabel):
        seen.extend(number(logits))
        assert (targets.numpy() == data.targets[number(logits)]).all()
        return logits.mean()

    def consistent(student, teacher, multilabel):
        unseen.extend(number(student))
        assert number(student) == number(teacher)
        return student.mean()

    for name, spy in dict(supervised_loss=supervised, consistency_loss=consistent,
                          build_network=lambda *arguments, **keywords: Mean()).items():
        monkeypatch.setattr(s2mts2, name, spy)
    args = parse_args(["finetune", "--from", "scratch", "--lr", "0", "--consistency", consistency,
                       *"--epochs 1 --batch 7 --labels 5 --size 16".split()])
    args.augment = PLAIN
    s2mts2.finetune(data, args)
    labelled = set(s2mts2.choose_labelled(data, 5, 0).tolist())
    # 13 unlabelled images are two steps, with and without the consistency loss.
    assert set(seen) == labelled and len(seen) == 14
    assert set(unseen) == (set(data.train.tolist()) - labelled if consistency == "1" else set())


def test_targets_of_unlabelled_images_are_never_read():
    data = made_by_hand()
    chosen = s2mts2.choose_labelled(data, 8, 0)
    Path("labels.txt").write_text("\n".join(data.names[k] for k in chosen))
    for name, value in (("nan", np.nan), ("one", 1), ("zero", 0)):
        targets = data.targets.copy()
        targets[np.setdiff1d(data.train, chosen)] = value
        other, common = changed(data, targets=targets), f"--epochs 2 --batch 8 --size 32 --out {name}".split()
        s2mts2.pretrain(other, parse_args(["pretrain", *common]))
        labels = ["--labels", "all" if name == "nan" else "labels.txt"]
        s2mts2.finetune(other, parse_args(["finetune", "--from", f"{name}/pretrain.pt", *labels, *common]))
        for file in ("pretrain.pt", "finetune.pt"):
            assert equal(state(f"{name}/{file}"), state(f"nan/{file}"))
        assert Path(name, "predictions.csv").read_text() == Path("nan/predictions.csv").read_text()


def test_evaluation_shows_each_image_once_in_order_and_keeps_digits(monkeypatch):
    data, network = made_by_hand(count=400), s2mts2.build_network("tiny", 1, 3)
    whole = s2mts2.evaluate(network, data, data.test, 32, batch=64)
    assert whole.shape == (12, 3) and network.training
    for batch in (1, 5):
        assert np.allclose(s2mts2.evaluate(network, data, data.test, 32, batch=batch), whole, atol=1e-5)
    assert np.allclose(s2mts2.evaluate(network, data, data.test[::-1].copy(), 32), whole[::-1], atol=1e-5)
    # Small probabilities keep their order in predictions.csv.
    data = changed(data, train=data.train[:100], test=[*data.train[100:], *data.test])
    scores = (10.0 ** -np.random.default_rng(0).uniform(1, 12, (len(data.test), 3))).astype(np.float32)
    monkeypatch.setattr(s2mts2, "evaluate", lambda *arguments, **keywords: scores)
    result = s2mts2.finetune(data, parse_args(["finetune", "--from", "scratch", "--labels", "6", *SMALL]))
    scores = table("runs/mine/predictions.csv")[2]
    again = s2mts2.classification_metrics(data.targets[data.test], scores, data.classes, True)
    assert again["auc"] == pytest.approx(result["auc"], abs=1e-6)


# ------------------------------------------------------------------------------ checkpoints, processes


@pytest.mark.parametrize("command", ["pretrain", "finetune --from scratch --labels 6"])
def test_a_run_stopped_by_ctrl_c_resumes_exactly(command, monkeypatch):
    data, command = made_by_hand(), [*command.split(), *"--epochs 3 --batch 8 --size 32 --out".split()]
    stage, update, calls = command[0], s2mts2.ema_update, []
    run = lambda data, *words: getattr(s2mts2, stage)(data, parse_args([*command, *words]))
    run(data, "whole")
    stop = lambda *networks: calls.append(1) or (interrupt if len(calls) == 8 else update)(*networks)
    monkeypatch.setattr(s2mts2, "ema_update", stop)
    with pytest.raises(KeyboardInterrupt):
        run(data, "halves")
    assert len(lines("halves/log.jsonl")) == 2
    calls.clear()
    run(data, "halves")
    assert len(calls) < 8 and equal(state(f"whole/{stage}.pt"), state(f"halves/{stage}.pt"))
    assert [line["epoch"] for line in lines("halves/log.jsonl")] == [0, 1, 2]
    # A finished run does not train. Other settings and other data raise an error, unless --fresh.
    monkeypatch.setattr(s2mts2, "ema_update", None)
    run(data, "halves")
    before, both = Path(f"halves/{stage}.pt").read_bytes(), np.concatenate([data.train, data.test])
    with pytest.raises(UserError, match="lr .*0.5"):
        run(data, "halves", "--lr", ".5")
    for parts in (dict(images=255 - data.images), dict(targets=1 - data.targets),
                  dict(classes=["a", "c", "b"]), dict(train=both[:-11], test=both[-11:])):
        with pytest.raises(UserError, match="data|labelled"):
            run(changed(data, **parts), "halves")
    assert Path(f"halves/{stage}.pt").read_bytes() == before
    monkeypatch.setattr(s2mts2, "ema_update", update)
    run(data, "halves", "--lr", ".01", "--fresh")
    assert Path(f"halves/{stage}.pt").read_bytes() != before


KILLED = """
import os, signal, sys, s2mts2
left, ema, replace = int(sys.argv.pop(1)), s2mts2.ema_update, os.replace
def event(*arguments):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
s2mts2.ema_update = lambda *arguments: (event(), ema(*arguments))[1]
os.replace = lambda *arguments: (event(), replace(*arguments), event())[1]
sys.exit(s2mts2.main())
"""


@pytest.mark.parametrize("stage, lives", [("pretrain", (2, 12, 10)), ("finetune", (12, 9, 17))])
def test_a_run_killed_at_several_moments_ends_the_same(stage, lives):
    """An event is a training step, or the moment before or after a file is replaced."""
    npz()
    command = [stage, *"--data set.npz --epochs 4 --batch 16 --size 16 --device cpu".split()]
    command += ["--from", "scratch", "--arch", "tiny", "--labels", "10"] * (stage == "finetune")
    assert main([*command, "--out", "whole"]) == 0
    for life in lives:
        done = subprocess.run([sys.executable, "-c", KILLED, str(life), *command], env=ENVIRONMENT,
                              capture_output=True)
        assert done.returncode == -9, done.stderr.decode()
    assert main(command) == 0 and equal(state(f"whole/{stage}.pt"), state(f"runs/set/{stage}.pt"))
    logs = [[(line["epoch"], line["loss"], line["lr"]) for line in lines(f"{out}/log.jsonl")]
            for out in ("whole", "runs/set")]
    assert logs[0] == logs[1] and len(logs[0]) == 4
    for name in ("metrics.json", "predictions.csv", "labelled.txt") if stage == "finetune" else ["views.png"]:
        assert Path("whole", name).read_bytes() == Path("runs/set", name).read_bytes()


class Trap:
    def __reduce__(self):
        return os.system, ("touch sprung",)


def test_checkpoints_that_are_gone_or_broken_or_malicious(capsys):
    npz()
    assert main(["pretrain", "--data", "set.npz", *SMALL]) == 0
    # A broken newer checkpoint of another data set is no obstacle.
    Path("runs/other").mkdir()
    Path("runs/other/pretrain.pt").write_bytes(b"broken")
    os.utime("runs/other/pretrain.pt", (2e9, 2e9))
    command = ["finetune", "--data", "set.npz", "--labels", "10", *SMALL]
    assert main(command) == 0
    result, path = Path("runs/set/metrics.json").read_bytes(), Path("runs/set/finetune.pt")
    npz(counts=(61, 4, 16))
    error_of(["evaluate"], capsys)
    npz()
    Path("runs/set/pretrain.pt").unlink()
    for start in (["--from", "runs/set/pretrain.pt"], []):
        Path("runs/set/metrics.json").unlink()
        assert main([*command, *start]) == 0 and Path("runs/set/metrics.json").read_bytes() == result
    os.truncate(path, path.stat().st_size // 2)
    assert "finetune.pt" in error_of(["evaluate"], capsys)
    torch.save(dict(stage="pretrain", state=Trap(), args=Trap()), "trap.pt")
    assert "trap.pt" in error_of(["finetune", "--from", "trap.pt"], capsys) and not Path("sprung").exists()


@pytest.mark.parametrize("command", ["pretrain --batch 8", "finetune --from scratch --batch 28 --labels 28"])
def test_a_loss_that_is_not_finite_stops_the_run(command):
    args = parse_args([*command.split(), "--size", "32", "--lr", "1e30", "--epochs", "1"])
    with pytest.raises(UserError, match="finite"):
        getattr(s2mts2, args.stage)(made_by_hand(), args)
    assert not Path("runs/mine/metrics.json").exists()


PROCESS = """
import sys, s2mts2
from torch import nn
plain, pretrain = sys.argv[1] == "plain", s2mts2.pretrain
if plain:
    s2mts2.build_network = lambda arch, channels, outputs, *more, **words: nn.Sequential(
        nn.Flatten(), nn.Linear(256, 32), nn.Tanh(), nn.Linear(32, outputs))
def changed(data, args):
    args.augment = s2mts2.PLAIN if plain else args.augment
    return pretrain(data, args)
s2mts2.pretrain = changed
sys.exit(s2mts2.main(["pretrain", *sys.argv[2:]]))
"""


def test_two_processes_compute_what_one_does():
    npz()
    Path("process.py").write_text(PROCESS)
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2 process.py".split()
    for start, kind, out in ((["process.py"], "plain", "one"), (torchrun, "plain", "two"),
                             (torchrun, "densenet", "both")):
        words = f"--data set.npz --size 16 --batch 8 --device cpu --epochs 2 --out {out}".split()
        done = subprocess.run([sys.executable, *start, kind, *words], capture_output=True, text=True,
                              env=ENVIRONMENT)
        assert done.returncode == 0 and done.stdout.count("epoch 2/2") == 1, done.stderr
    ours, theirs = state("one/pretrain.pt"), state("two/pretrain.pt")
    losses = [[line["loss"] for line in lines(f"{out}/log.jsonl")] for out in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for one, two in zip([ours["queue"], *ours["student"].values()],
                        [theirs["queue"], *theirs["student"].values()]):
        assert torch.allclose(one, two, atol=1e-4)
    # With BatchNorm it runs. One process resumes its checkpoint, and stage 2 takes it.
    saved = torch.load("both/pretrain.pt", weights_only=True)
    saved["history"].pop()
    torch.save(saved, "both/pretrain.pt")
    assert main(["pretrain", *words]) == 0 and len(lines("both/log.jsonl")) == 2
    assert main(["finetune", "--from", "both/pretrain.pt", "--labels", "10", *SMALL]) == 0


# ------------------------------------------------------------------------------------------- commands


def test_the_two_commands_on_digits_and_evaluate():
    done = subprocess.run([sys.executable, SCRIPT, *"pretrain --epochs 1 --size 16".split()],
                          capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0 and "loss" in done.stderr, done.stderr
    assert main(["finetune", "--epochs", "1"]) == 0
    root, data = Path("runs/digits"), load_data("digits")
    assert {file.name for file in root.iterdir()} == set(
        "pretrain.pt finetune.pt log.jsonl metrics.json predictions.csv labelled.txt views.png".split())
    result = json.loads((root / "metrics.json").read_text())
    header, _, scores = table(root / "predictions.csv")
    for k, name in enumerate(data.classes):
        auc = metrics.roc_auc_score(data.targets[data.test, k], scores[:, k])
        assert header[1 + k] == name and result["auc"][name] == pytest.approx(auc, abs=1e-6)
    before = [(root / name).read_bytes() for name in ("metrics.json", "predictions.csv")]
    (root / "metrics.json").unlink()
    assert main(["evaluate"]) == 0
    assert [(root / name).read_bytes() for name in ("metrics.json", "predictions.csv")] == before
    assert main(["evaluate", "runs/digits/finetune.pt", "--out", "other"]) == 0
    assert np.allclose(table("other/predictions.csv")[2], scores, atol=1e-5)


@pytest.mark.parametrize("make", [cxr14, chexpert, isic2018, npz])
def test_both_stages_run_on_each_data_set(make):
    make(Path("root"))
    where = ["--data", "root/set.npz"] if make is npz else ["--data", make.__name__, "--root", "root"]
    where += ["--uncertain", "ignore"] * (make is chexpert)
    assert main(["pretrain", *where, "--arch", "tiny", "--init", "random", *SMALL]) == 0
    assert main(["finetune", "--labels", "0.5", "--epochs", "1", "--batch", "4"]) == 0
    out, = Path("runs").iterdir()
    result = json.loads((out / "metrics.json").read_text())
    header, names, scores = table(out / "predictions.csv")
    assert list(result["auc"]) == header[1:] and result["mean_auc"] and np.isfinite(scores).all()
    assert ("macro_f1" in result) == (make in (isic2018, npz))
    if make is cxr14:
        assert names == Path("root/test_list.txt").read_text().split()
        assert [key for key, auc in result["auc"].items() if auc is not None] == [
            "Effusion", "Mass", "Nodule", "Pleural_Thickening", "Hernia"]


def test_predict_repeats_predictions_and_names_broken_images(capsys):
    folder(Path("DIR"))
    assert main(["pretrain", "--data", "DIR", *SMALL]) == 0 and main(["finetune", *SMALL[:4]]) == 0
    header, names, scores = table("runs/DIR/predictions.csv")
    assert main("predict DIR --out out/new.csv --device cpu".split()) == 0
    again, images, new = table("out/new.csv")
    assert again == header and len(images) == 60
    assert np.allclose(new[[images.index(name) for name in names]], scores, atol=1e-5)
    assert main(["predict", "DIR/a/002.png", "DIR/b/001.png", "--from", "runs/DIR/finetune.pt"]) == 0
    _, paths, two = table("predicted.csv")
    assert paths == ["DIR/a/002.png", "DIR/b/001.png"]
    assert np.allclose(two, new[[images.index(name[4:]) for name in paths]], atol=1e-5)
    broken = ["a/002.png", "b/059.png"]
    for name in broken:
        Path("DIR", name).write_bytes(b"broken")
    assert main("predict DIR --out good.csv".split()) == 2
    printed = "".join(capsys.readouterr())
    assert all(name in printed for name in broken)
    _, good, scores = table("good.csv")
    assert good == [name for name in images if name not in broken]
    assert np.allclose(scores, new[[images.index(name) for name in good]], atol=1e-5)
    # Only broken images: an error, no traceback.
    error_of("predict DIR/a/002.png --out none.csv".split(), capsys)


def test_settings_come_from_the_recipe_the_checkpoint_and_the_command_line():
    args = parse_args("pretrain --data cxr14 --keys 5".split())
    assert (args.size, args.batch, args.queue, args.temperature, args.keys) == (256, 256, 65536, 0.07, 5)
    args = parse_args("finetune --data cxr14 --from imagenet --labels 500".split())
    assert (args.size, args.batch, args.lr, args.labels, args.arch) == (512, 16, 0.05, 500, "densenet121")
    assert [round(s2mts2.learning_rate(args, epoch), 6) for epoch in (0, 14, 15, 24, 25, 29)] == [
        .05, .05, .005, .005, .0005, .0005]
    args = parse_args("pretrain --lr 1 --epochs 4".split())
    assert [round(s2mts2.learning_rate(args, epoch), 3) for epoch in range(4)] == [1, .854, .5, .146]
    args.augment["flip_p"] = 0.7
    assert args.data == "digits" and parse_args(["pretrain"]).augment["flip_p"] == 0
    args = parse_args("pretrain --data cxr14 --root root --partial --arch tiny --init random".split())
    args.epochs, args.batch = 1, 8
    # Stage 2 takes over the size only if the user chose it.
    recipe, stage_2 = args.size, parse_args("finetune --data cxr14 --from scratch --arch tiny".split()).size
    for size in (recipe, 16):
        args.size, args.out = size, f"size{size}"
        s2mts2.pretrain(made_by_hand(), args)
        ours = parse_args(["finetune", "--from", f"size{size}/pretrain.pt"])
        assert (ours.data, ours.size, ours.arch, str(ours.root), ours.partial, ours.out) == (
            "cxr14", stage_2 if size == recipe else size, "tiny", "root", True, f"size{size}")
    args = parse_args("finetune --from size16/pretrain.pt --data digits".split())
    assert (args.root, args.partial, args.arch) == (None, False, "tiny")


@pytest.mark.parametrize("command", """|train|pretrain --data mnist|pretrain --epochs 0
pretrain --epochs x|pretrain --batch 1
pretrain --batch 1438|pretrain --lr -1|pretrain --lr nan|pretrain --lr inf|pretrain --keys 0
pretrain --queue 0|pretrain --temperature 0|pretrain --covariance-weight -1
pretrain --teacher-momentum 1.1|pretrain --dim 0|pretrain --dim 1000000000000|pretrain --batch 1e9
pretrain --batch 10000000000|pretrain --size 8|pretrain --size 31 --arch densenet121
pretrain --arch resnet|pretrain --init zeros|pretrain --init imagenet|pretrain --seed -1
pretrain --device tpu|pretrain --device cuda:99|pretrain --labels 3|pretrain --nonsense
pretrain --out file|pretrain --data cxr14|pretrain --data cxr14 --root file|pretrain --data file
pretrain --epoch 2|pretrain extra|pretrain --root x|pretrain --partial
pretrain --data cxr14 --uncertain ones|finetune|finetune --from nowhere.pt|finetune --from file
finetune --from scratch --labels 0|finetune --from scratch --labels 1.5
finetune --from scratch --labels 5|finetune --from scratch --labels 2000
finetune --from scratch --labels nowhere.txt|finetune --from scratch --labels file|finetune --keys 3
finetune --from scratch --consistency -1|finetune --from imagenet --arch tiny|finetune --data cxr14
evaluate|evaluate nowhere.pt|evaluate file|evaluate --epochs 3|predict|predict file|predict nowhere
ablate --seeds 1|ablate --lr 3|ablate --epochs 0|ablate --size 8|ablate --data mnist
ablate --labels -1|ablate --labels nowhere.txt|ablate --init imagenet --arch tiny
ablate --arch densenet121 --size 20""".replace("\n", "|").split("|"))
def test_bad_commands_end_with_one_line_and_write_nothing(command, capsys):
    Path("file").write_text("neither a folder nor a checkpoint\n")
    error_of(command.split(), capsys)
    assert files() == ["file"]


def test_importing_does_nothing_and_ctrl_c_gives_130(monkeypatch, capsys):
    code = """import torch, numpy
state = lambda: (torch.get_float32_matmul_precision(), torch.get_num_threads(), torch.initial_seed(),
                 torch.get_default_dtype(), torch.is_grad_enabled(), torch.backends.cudnn.benchmark,
                 torch.get_rng_state().sum().item(), numpy.random.get_state()[1].sum())
before = state()
import s2mts2
assert state() == before"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, env=ENVIRONMENT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and files() == []
    monkeypatch.setattr(s2mts2, "pretrain", interrupt)
    assert main(["pretrain", "--fresh", "--seed", "3"]) == 130
    assert capsys.readouterr().err.strip().endswith("python s2mts2.py pretrain --seed 3")


def test_the_ablation_has_five_rows_with_the_same_labels(monkeypatch):
    seen, stages = [], (s2mts2.pretrain, s2mts2.finetune)
    monkeypatch.setattr(s2mts2, "load_data", lambda *arguments: made_by_hand(multilabel=False))
    monkeypatch.setattr(s2mts2, "pretrain", lambda data, args: seen.append(
        (args.seed, args.keys, args.covariance_weight > 0)) or stages[0](data, args))
    monkeypatch.setattr(s2mts2, "finetune", lambda data, args: seen.append(
        (args.seed, Path(args.start).parent.name, args.consistency > 0)) or stages[1](data, args))
    command = "ablate --seeds 2 --epochs 1 --batch 8 --labels 6 --size 16 --out out".split()
    assert main(command) == 0
    assert seen == [row for k in (0, 1) for row in [
        (k, 1, False), (k, 2, True), (k, "", False), (k, "", True), (k, f"moco-{k}", True),
        (k, f"jcl-{k}", False), (k, f"jcl-{k}", True)]]
    rows, result = (json.loads(Path("out", name).read_text())
                    for name in ("ablation.json", "jcl-mean-teacher-1/metrics.json"))
    assert sorted(rows) == ["jcl + mean teacher", "jcl + supervised", "moco + mean teacher",
                            "scratch + mean teacher", "scratch + supervised"]
    assert rows["jcl + mean teacher"]["accuracy"][1] == result["accuracy"]
    for seed in "01":
        labels = [path.read_text() for path in Path("out").glob(f"*-{seed}/labelled.txt")]
        assert len(labels) == 5 and len(set(labels)) == 1
    # Finished runs are only evaluated again.
    monkeypatch.setattr(s2mts2, "ema_update", None)
    assert main(command) == 0 and json.loads(Path("out/ablation.json").read_text()) == rows


def readme():
    """The README's indented blocks of commands, without those that need a download or several GPUs."""
    text = (SCRIPT.parent / "README.md").read_text()
    skip = re.compile("torchrun|--root|cxr14|chexpert|isic2018|imagenet|densenet|--help|[A-Z]{3,}[.][a-z]")
    for block in re.findall(r"(?:^    python s2mts2\.py.*\n)+", text, re.M):
        commands = [part.strip() for line in block.splitlines() for part in line.split("#")[0].split("&&")]
        yield [command.removeprefix("python s2mts2.py ") for command in commands if not skip.search(command)]


@pytest.mark.parametrize("own", [False, True])
def test_the_commands_of_the_readme_run(own, monkeypatch):
    """One epoch each, on fewer images. The commands of a block run in their order."""
    def fewer(*arguments, **keywords):
        data = load_data(*arguments, **keywords)
        return changed(data, train=data.train[:400], test=data.test[:100])

    monkeypatch.setattr(s2mts2, "load_data", fewer)
    folder(Path("DIR")), folder(Path("IMAGES"))
    assert main(["pretrain", "--data", "DIR" if own else "digits", "--batch", "8", "--epochs", "1"]) == 0
    assert main(["finetune", "--batch", "8", "--epochs", "1"]) == 0
    commands = sum((block for block in readme() if own == bool(re.search("DIR|IMAGES", str(block)))), [])
    assert commands
    for command in commands:
        words = shlex.split(command)
        words += dict(ablate=["--seeds", "2", "--size", "16"], pretrain=["--size", "16"]).get(words[0], [])
        words += ["--epochs", "1", "--batch", "8", "--fresh"] * (words[0] not in ("evaluate", "predict"))
        assert main(words) == 0, command


def test_the_example_for_notebooks_runs():
    text = (SCRIPT.parent / "README.md").read_text()
    code = text[text.index("    import numpy as np, s2mts2"):].split("\n\n")[0]
    exec("\n".join(line[4:] for line in code.splitlines()), {})
    assert list(Path("runs").glob("*/metrics.json"))


def test_no_line_of_the_file_is_longer_than_100_columns():
    assert max(map(len, SCRIPT.read_text().splitlines())) <= 100
