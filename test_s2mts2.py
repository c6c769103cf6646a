"""Tests of s2mts2.py: python -m pytest -q. They need no network and make their own data."""

import csv, json, os, re, subprocess, sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image
from sklearn import metrics
from torch.utils._python_dispatch import TorchDispatchMode

import s2mts2
from s2mts2 import PLAIN, Data, UserError, choose_labelled, load_data, main, parse_args

SCRIPT = Path(s2mts2.__file__).resolve()
# One thread here and in the subprocesses: the last bits depend on the number of threads.
torch.set_num_threads(1)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SCRIPT.parent), "OMP_NUM_THREADS": "1"}
SMALL = "--epochs 1 --batch 4 --size 32 --device cpu"
@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
def parse(command):
    return parse_args(command.split())
def run(*commands):
    for command in commands:
        assert main(command.split()) == 0, command
def error_of(command, capsys):  # The error of a command: exit status 2 and, at the end, one line
    assert main(command.split()) == 2
    *before, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ") and "error: " not in "".join(before)
    return last
def python(*words):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=ENVIRONMENT)
def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
def table(path):  # Header, image names and numbers of a CSV file with predictions
    header, *rows = csv.reader(Path(path).read_text().splitlines())
    return header, [row[0] for row in rows], np.array([row[1:] for row in rows], float)
def state(path):
    return torch.load(path, weights_only=True)["state"]
def same(ours, theirs, atol=0):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
def interrupt(*arguments, **keywords):
    raise KeyboardInterrupt

# ---- made data
def made_by_hand(channels=1, multilabel=True, count=40):  # A bright square if the first target is 1.
    random, targets = np.random.default_rng(0), np.eye(3)[np.arange(count) % 3]
    images = random.integers(0, 120, (count, channels, 16, 16), np.uint8)
    if multilabel:
        targets = (random.random((count, 3)) < 0.4) * (np.arange(count)[:, None] > 3)
    images[targets[:, 0] == 1, :, 4:12, 4:12] = 250
    split, names = random.permutation(count), [f"i{k}" for k in range(count)]
    return Data("mine", images, targets, ["a", "b", "c"], names, split[:-12], split[-12:], multilabel)
def write_image(path, seed, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 4, 3), np.uint8)
    Image.fromarray(coarse).resize((40, 30), Image.Resampling.BICUBIC).convert(mode).save(path)
def close_to_file(pixels, path, mode):
    expected = TF.resize(TF.pil_to_tensor(Image.open(path).convert(mode)), pixels.shape[1:], antialias=True)
    return np.abs(expected.numpy().astype(int) - pixels).max() <= 1
FINDINGS = ["No Finding", "Hernia", "Mass|Nodule", "Effusion", "Mass|Pleural_Thickening"]
LESIONS = ["MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC"]
ENTRIES, ISIC = "Data_Entry_2017_v2020.csv", "ISIC2018_Task3_Training_"
def cxr14(root):  # 30 images of 10 patients; image 3 is RGBA, image 4 RGB
    rows = ["Image Index,Finding Labels,Follow-up #,OriginalImage[Width,Height]"]
    names = [f"{k // 3:08d}_{k % 3:03d}.png" for k in range(30)]
    for k, name in enumerate(names):
        rows.append(f"{name},{FINDINGS[k % 5]},0,2500,2048")
        write_image(root / "images" / name, k, {3: "RGBA", 4: "RGB"}.get(k, "L"))
    for name, part in (ENTRIES, rows), ("train_val_list.txt", names[:20]), ("test_list.txt", names[20:]):
        (root / name).write_text("\n".join(part) + "\n")
def chexpert(root, prefix="CheXpert-v1.0-small"):  # Entry j of patient p is number (p + j) % 4 of four
    rows = ["Path,Sex,Age,Frontal/Lateral,AP/PA," + ",".join(f"finding {k}" for k in range(14))]
    for k in range(80):
        name = f"{prefix}/train/patient{k // 2:05d}/study1/view{k % 2 + 1}_frontal.jpg"
        write_image(root / name, k)
        cells = ",".join(["1.0", "0.0", "-1.0", ""][(k // 2 + j) % 4] for j in range(14))
        rows.append(f"{name},Female,68,Frontal,AP,{cells}")
    (root / prefix / "train.csv").write_text("\n".join(rows) + "\n")
def isic2018(root):  # 12 images of each class, two of each lesion
    rows, lesions = ["image," + ",".join(LESIONS)], ["image,lesion_id,diagnosis_confirm_type"]
    (root / f"{ISIC}GroundTruth").mkdir(parents=True)
    for k in range(84):
        write_image(root / f"{ISIC}Input/ISIC_{k:07d}.jpg", k, "RGB")
        rows.append(f"ISIC_{k:07d}," + ",".join("1.0" if k % 7 == j else "0.0" for j in range(7)))
        lesions.append(f"ISIC_{k:07d},HAM_{k % 7}{k // 14},histopathology")
    (root / f"{ISIC}GroundTruth/{ISIC}GroundTruth.csv").write_text("\n".join(rows))
    (root / f"{ISIC}LesionGroupings.csv").write_text("\n".join(lesions))
def npz(root=Path(), grey=True, multilabel=False, counts=(60, 4, 16), **changes):  # As of MedMNIST
    random, arrays = np.random.default_rng(0), {}
    for part, count in zip(("train", "val", "test"), counts):
        number = np.arange(count, dtype=np.uint8)[:, None]
        arrays[f"{part}_images"] = random.integers(0, 255, (count, 16, 16, 3)[:4 - grey], np.uint8)
        arrays[f"{part}_labels"] = (number >> np.arange(3)) % 2 if multilabel else number % 4
    root.mkdir(exist_ok=True)
    np.savez_compressed(root / "set.npz", **arrays | changes)
    return arrays
def folder(root, mode="L"):  # 60 own images of two classes; the last 20 are not in the table
    names = [f"{'ab'[k % 2]}/{k:03d}.{'png' if k % 3 else 'jpg'}" for k in range(60)]
    for k, name in enumerate([*names, ".hidden/1.png", "a/.2.png", "views.png"]):  # Not read: the last 3
        write_image(root / name, k, mode)
    rows = [f"{name},{k % 2},{1 - k % 2}\n" for k, name in enumerate(names[:40])]
    (root / "labels.csv").write_text("image,cat,dog\n" + "".join(rows))
    return names

# ---- data sets
def test_digits_are_split_stratified_and_always_the_same():
    data = load_data("digits")
    assert data.images.shape == (1797, 1, 8, 8) and data.images.max() == 255 and not data.multilabel
    assert np.abs(data.targets[data.test].mean(0) / data.targets.mean(0) - 1).max() < 0.03
    assert sorted([*data.train, *data.test]) == [*range(1797)] and [*load_data("digits").test] == [*data.test]

def test_cxr14_in_three_layouts(tmp_path):
    cxr14(root := tmp_path / "root")
    data = load_data("cxr14", root, size=24)
    assert data.images.shape == (30, 1, 24, 24) and data.multilabel and len(data.classes) == 14
    for part, name in (data.train, "train_val_list.txt"), (data.test, "test_list.txt"):
        assert [data.names[k] for k in part] == (root / name).read_text().split()
    for k, row in enumerate(data.targets):
        assert ("|".join(sorted(np.array(data.classes)[row == 1])) or "No Finding") == FINDINGS[k % 5]
        assert close_to_file(data.images[k], root / "images" / data.names[k], "L")
    (root / ENTRIES).rename(root / "Data_Entry_2017.csv")  # The older table and two other layouts.
    for k, file in enumerate((root / "images").iterdir()):
        layout = root / ("data", "images_001/images", "images_012/images")[k % 3]
        layout.mkdir(parents=True, exist_ok=True)
        file.rename(layout / file.name)
    assert (load_data("cxr14", root, size=24, cache="new").images == data.images).all()

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

def test_isic2018_is_split_by_lesion_if_the_lesions_are_known(tmp_path):
    isic2018(tmp_path)
    for known in (True, False):
        data = load_data("isic2018", tmp_path, size=24)
        number = np.array([int(name[5:]) for name in data.names])
        assert data.classes == LESIONS and (data.targets.argmax(1) == number % 7).all()
        train, test = (set(zip(number[part] % 7, number[part] // 14)) for part in (data.train, data.test))
        assert len(data.train) + len(data.test) == 84 and len(test) > 2 and known == (not train & test)
        assert close_to_file(data.images[5], f"{ISIC}Input/{data.names[5]}.jpg", "RGB")
        Path(f"{ISIC}LesionGroupings.csv").unlink(missing_ok=True)

@pytest.mark.parametrize("grey, multilabel", [(True, True), (False, False)])
def test_a_medmnist_file_is_read(grey, multilabel):
    arrays, data = npz(Path(), grey, multilabel), load_data("set.npz")
    assert data.name == "set" and data.images.shape == (80, 1 if grey else 3, 16, 16)
    assert data.multilabel == multilabel and [*data.test] == [*range(64, 80)] and len(data.train) == 64
    for part, index, row in (("train", 3, 3), ("val", 2, 62), ("test", 6, 70)):
        image, label = arrays[f"{part}_images"][index], arrays[f"{part}_labels"][index]
        assert (data.images[row] == (image if grey else image.transpose(2, 0, 1))).all()
        assert (data.targets[row] == (label if multilabel else np.arange(4) == label)).all()

def test_a_folder_of_own_images_is_read(capsys):
    folder(Path("pets"))
    data, out = load_data("pets", size=24), capsys.readouterr().out
    number, known = np.array([int(name[2:5]) for name in data.names]), ~np.isnan(data.targets).any(1)
    assert data.images.shape == (60, 1, 24, 24) and data.classes == ["cat", "dog"] and not data.multilabel
    assert (known == (number < 40)).all() and (data.targets[known, 0] == number[known] % 2).all()
    assert len(data.train) + len(data.test) == 60 and known[data.test].all()
    assert f"60 images, 40 labelled, 20 unlabelled; {len(data.train)} train, {len(data.test)} test" in out
    assert "cat 20, dog 20" in out and close_to_file(data.images[7], f"pets/{data.names[7]}", "L")
    names = sorted(folder(Path("pets"), "RGB"))  # Groups, unknown findings, colours, a given split.
    for given in (False, True):
        rows = [f"{name},1,{'' if k % 2 else 0},1,{k // 4}" + given * (",test" if k // 4 in (3, 5) else ",")
                for k, name in enumerate(names)]
        Path("pets/labels.csv").write_text("\n".join(["image,a,b,c,group" + ",split" * given, *rows]))
        data = load_data("pets", size=16, cache="cache")
        assert data.multilabel and data.images.shape[1] == 3 and np.isnan(data.targets[:, 1]).sum() == 30
        train, test = ({names.index(data.names[k]) // 4 for k in part} for part in (data.train, data.test))
        assert not train & test and len(train | test) == 15 and (test == {3, 5} if given else test)

def edit(name, old="", new=""):  # A function that replaces `old` in a file, or the whole file
    path = Path("root", name)
    return lambda: path.write_text(path.read_text().replace(old, new, 1) if old else new)
BROKEN, OWN, LABELS = "images/00000002_001.png", "b/001.png", "labels.csv"
@pytest.mark.parametrize("make, spoil, word", [
    (cxr14, lambda: Path("root", ENTRIES).unlink(), "Data_Entry_2017"),
    (cxr14, lambda: os.truncate(f"root/{BROKEN}", 300), BROKEN),
    (cxr14, lambda: Image.fromarray(np.full((9, 9), 40000, np.uint16)).save(f"root/{BROKEN}"), BROKEN),
    (cxr14, edit("test_list.txt", "\n", "\n9999_000.png\n"), "9999_000.png"),
    (cxr14, edit(ENTRIES, "Effusion", "Confusion"), "Confusion"),
    (chexpert, edit("CheXpert-v1.0-small/train.csv", "0.0", "0.5"), "0.5"),
    (isic2018, edit(f"{ISIC}GroundTruth/{ISIC}GroundTruth.csv", "1.0", "0.0"), "ISIC_0000000"),
    (folder, lambda: [path.unlink() for path in Path("root").rglob("*.???")], "root"),
    (folder, edit(LABELS), "root"), (folder, edit(OWN, new="not an image"), OWN),
    (folder, edit(LABELS, "image", "file"), "image"), (folder, edit(LABELS, OWN, "b/999.png"), "b/999"),
    (folder, edit(LABELS, OWN, f"{OWN},1,0\n{OWN}"), OWN), (folder, edit(LABELS, f"{OWN},", f"{OWN},x"), OWN),
    (folder, edit(LABELS, f"{OWN},", OWN), LABELS), (folder, edit(LABELS, new="image,a\n"), LABELS),
    (folder, edit(LABELS, new=f"image,a\n{OWN},1\na/002.png,1\n"), "zeros"),
    (folder, edit(LABELS, new=f"image,cat,group,split\na/000.jpg,1,g7,train\n{OWN},0,g7,test\n"), "g7"),
    (folder, edit(LABELS, new=f"image,cat,split\na/000.jpg,1,train\n{OWN},0,validation\n"), OWN),
    (npz, lambda: np.savez("root/set.npz", train_images=np.zeros((9, 16, 16), np.uint8)), "set.npz"),
    (npz, lambda: npz(Path("root"), train_labels=np.array([[print]] * 60, object)), "set.npz"),
    (npz, edit("set.npz"), "set.npz"), (npz, lambda: os.truncate("root/set.npz", 900), "set.npz")])
def test_bad_data_is_named_in_one_line_and_nothing_is_written(make, spoil, word, capsys):
    make(Path("root")), spoil()
    before, own = {*Path().rglob("*")}, dict(folder="root", npz="root/set.npz").get(make.__name__)
    assert word in error_of(f"pretrain {SMALL} --data {own or f'{make.__name__} --root root'}", capsys)
    assert {path.suffix for path in {*Path().rglob("*")} - before} <= {".part"}

NAN_7, ONES = np.where(np.arange(40) == 7, np.nan, np.ones((3, 40))).T, np.ones((40, 3))
@pytest.mark.parametrize("change, word", [
    (dict(images=np.zeros((40, 1, 16, 16))), "uint8"), (dict(targets=np.zeros((40, 4))), "targets"),
    (dict(images=np.zeros((39, 1, 16, 16), np.uint8)), "names"), (dict(targets=ONES * 0.5), "image i0 "),
    (dict(targets=np.eye(3)[np.arange(40) % 3] + NAN_7 * 0, test=[7], multilabel=False), "image i7 "),
    (dict(targets=1 * (np.eye(3)[[0] * 40] + np.isnan(NAN_7) > 0), multilabel=False), "image i7 "),
    (dict(targets=NAN_7, test=[7], train=[1]), "image i7 "), (dict(test=[]), "empty"),
    (dict(test=[40]), "ind"), (dict(test=[-1]), "ind"), (dict(train=[1], test=[3, 3]), "image i3 "),
    (dict(train=[3], test=[3]), "image i3 "), (dict(classes="aba"), "class names"),
    (dict(names=["i8", *range(7), "i8", *range(31)]), "image i8 ")])
def test_data_made_by_hand_is_checked_and_the_image_is_named(change, word):
    pytest.raises(UserError, replace, made_by_hand(), **change).match(word)

def test_decoding_resumes_and_a_finished_cache_needs_no_originals(tmp_path, monkeypatch):
    opened, original = [], Image.open
    cxr14(root := tmp_path / "root")
    load = lambda size=16, **more: load_data("cxr14", root, size=size, cache="cache", **more)
    monkeypatch.setattr(Image, "open", lambda path, *more: opened.append(path) or original(path, *more))
    first, (whole,) = np.array(load().images), Path("cache").rglob("*.uint8")
    os.truncate(whole.rename(whole.with_suffix(".part")), 12 * 16 * 16 + 99)  # Killed within image 13.
    assert (load().images == first).all() and len(opened) == 48 and whole.exists()
    for name in ("00000000_001.png", "00000009_002.png"):
        (root / "images" / name).unlink()
    pytest.raises(UserError, load, 24).match("2 of 30 .*0000000[09]_00[12].png.*--partial")
    data = load(24, partial=True)
    assert (len(data.images), len(data.train), len(data.test)) == (28, 19, 9)
    assert close_to_file(data.images[1], root / "images" / data.names[1], "L")
    (root / "images").rename(root / "gone")
    assert (load().images == first).all()

# ---- labelled images
def long_tailed():  # 1,000 training images: class a on 500, b on 100, c on 3 of them; 447 without a finding
    targets, names = np.zeros((1010, 3), np.float32), [f"{k}.png" for k in range(1010)]
    targets[:500, 0] = targets[450:550, 1] = targets[600:603, 2] = 1
    images, train, test = np.zeros((1010, 1, 8, 8), np.uint8), np.arange(1000), np.arange(1000, 1010)
    return Data("tail", images, targets, ["a", "b", "c"], names, train, test, True)

def test_labels_are_a_fraction_of_each_class_or_an_exact_number():
    data = long_tailed()
    count = lambda chosen: [*data.targets[chosen].sum(0), (data.targets[chosen].sum(1) == 0).sum()]
    samples = [choose_labelled(data, 0.02, seed) for seed in range(20)]
    for chosen in samples:
        a, b, c, without = count(chosen)
        # Sampled: 10, 2, 1 and 9 of 447. A sample of one class may contain another class as well.
        assert a >= 10 and b >= 2 and c == 1 and without == 9 and 19 <= len(chosen) <= 22
        assert chosen.dtype == np.int64 and (np.diff(chosen) > 0).all() and chosen.max() < 1000
    assert len(set(map(tuple, samples))) == 20 and (choose_labelled(data, 0.02, 7) == samples[7]).all()
    for number in (4, 50.0, 777, 1000):
        chosen = choose_labelled(data, number, 3)
        assert len({*chosen}) == number and min(count(chosen)) >= 1
        assert number < 50 or abs(count(chosen)[0] / number - 0.5) < 0.1

def test_labels_from_a_file_and_only_among_known_targets():
    data, targets = long_tailed(), long_tailed().targets
    targets[:900], targets[900:950, 0] = np.nan, np.nan
    chosen, known = choose_labelled(data, 0.05, 1), replace(data, targets=targets)
    listed = "\n".join(data.names[k] for k in [*chosen[::-1], *chosen[:3]])
    for name, text in dict(listed=listed, empty="\n", other="1.png\nx.png", test="1005.png").items():
        Path(f"{name}.txt").write_text(text + "\n\n")
    assert all((choose_labelled(data, kind("listed.txt"), 99) == chosen).all() for kind in (str, Path))
    assert len(choose_labelled(data, "all", 0)) == 1000
    for labels, count in (("all", 100), (0.2, 20), (7, 7)):
        chosen = choose_labelled(known, labels, 0)
        assert len(chosen) == count and chosen.min() >= 900
    for labels in (3, 1001, "nowhere.txt", "empty.txt", "other.txt", "test.txt", 101, "listed.txt"):
        which = known if labels in (101, "listed.txt") else data
        pytest.raises((UserError, OSError), choose_labelled, which, labels, 0).match(str(labels))

# ---- views
def photo(count=3, channels=3, side=48):  # Smooth random images in [0, 1]
    return F.interpolate(torch.rand(count, channels, 6, 6), (side, side), mode="bicubic").clamp(0, 1)
ZERO, ONE = torch.zeros(3), torch.ones(3)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_plain_view_is_the_normalised_image(channels):
    colour = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]) if channels == 3 else ([0.449], [0.226])
    images = (photo(channels=channels) * 255).to(torch.uint8)
    before, views = images.clone(), s2mts2.random_views(images, PLAIN, 48)
    assert views.dtype == torch.float32 and (images == before).all()
    assert torch.allclose(views, TF.normalize(images / 255, *colour), atol=1e-6)
    resized = TF.normalize(TF.resize(images / 255, [20, 20], antialias=True), *colour)
    assert torch.allclose(s2mts2.random_views(images, PLAIN, 20), resized, atol=1e-5)

def test_crop_rotation_and_flips_agree_with_torchvision():
    images, bilinear = photo(side=64), TF.InterpolationMode.BILINEAR
    # Left, top, width, height, angle, flip and vertical flip of three images.
    numbers = torch.Tensor([[.25, .25, 0], [.25, .125, 0], [.5, .5, 1], [.5, .5, 1],
                            [20, -7, 90], [1, 0, 1], [0, 1, 1]])
    cropped = s2mts2.crop_rotate_flip(images, *numbers[:4], ZERO, ZERO, ZERO)
    views = s2mts2.crop_rotate_flip(images, *numbers)
    flips = TF.hflip, TF.vflip, lambda image: TF.vflip(TF.hflip(image))
    for k, image in enumerate(images):
        left, top, width, height = (64 * numbers[:4, k]).int().tolist()
        expected = TF.resized_crop(image, top, left, height, width, [64, 64], antialias=False)
        # torchvision does not see pixels beyond the border of the crop.
        assert (cropped[k] - expected)[:, 4:-4, 4:-4].abs().max() < 1e-5
        expected = flips[k](TF.rotate(expected, float(numbers[4, k]), bilinear))
        assert (views[k] - expected)[:, 16:48, 16:48].abs().max() < 0.01

def test_brightness_contrast_saturation_and_hue():
    images, factors = photo(), torch.Tensor([.6, 1.3, 1.4])
    for place, theirs in enumerate((TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)):
        values = [factors if k == place else ONE for k in range(3)]
        ours, grey = (s2mts2.jitter_colours(each, *values, ZERO) for each in (images, images[:, :1]))
        for k, factor in enumerate(factors.tolist()):
            assert (ours[k] - theirs(images[k], factor)).abs().max() < 0.005
            assert (grey[k] - theirs(images[k, :1], factor)).abs().max() < 1e-5
    images = images * 0.2 + 0.4
    half, third = (s2mts2.jitter_colours(images, ONE, ONE, ONE, ONE / parts) for parts in (2, 3))
    assert (half - images).abs().max() > 0.05
    assert (TF.rgb_to_grayscale(half) - TF.rgb_to_grayscale(images)).abs().max() < 0.005
    assert torch.allclose(s2mts2.jitter_colours(third, ONE, ONE, ONE, ONE * 2 / 3), images, atol=1e-3)

@pytest.mark.parametrize("channels", [1, 3])
def test_blur_agrees_with_torchvision_and_erase_clears_the_rectangle(channels):
    images, sigma = torch.rand(3, channels, 48, 40), torch.Tensor([0.1, 1.0, 2.0])
    for image, view, width in zip(images, s2mts2.gaussian_blur(images, sigma, 2.0), sigma.tolist()):
        assert torch.allclose(view, TF.gaussian_blur(image, [13, 13], [width] * 2), atol=1e-5)
    expected, place = torch.ones(2, channels, 8, 8), torch.Tensor([[.25, 0], [.5, 0], [.5, 0], [.25, 1]])
    expected[0, :, 4:6, 2:6] = 0
    assert (s2mts2.erase(torch.ones_like(expected), *place) == expected).all()

def test_each_view_has_its_own_random_numbers():
    strong = PLAIN | {name: 0.5 for name in PLAIN} | dict(centre=0.1, crop=0.8, rotate=10.0, blur=2.0)
    for channels in (1, 3):
        views = s2mts2.random_views(photo(1, channels).expand(16, -1, -1, -1), strong, 32).flatten(1)
        assert views.isfinite().all() and torch.cdist(views, views).add(torch.eye(16)).min() > 0.1

@pytest.mark.parametrize("strength, probability", [
    (dict(flip_p=0.5), 0.5), (dict(vertical_flip_p=0.3), 0.3), (dict(rotate=10.0, rotate_p=0.3), 0.3),
    (dict(jitter=0.4, jitter_p=0.8), 0.8), (dict(hue=0.4, jitter_p=0.6), 0.6), (dict(erase_p=0.5), 0.5),
    (dict(blur=2.0, blur_p=0.5), 0.5), (dict(crop=0.8), 1.0)])
def test_each_change_has_its_probability(strength, probability):
    copies = photo(1, 3, 24).expand(600, -1, -1, -1)
    views = s2mts2.random_views(copies, PLAIN | strength, 24) - s2mts2.random_views(copies, PLAIN, 24)
    assert abs((views.abs().flatten(1).amax(1) > 1e-3).float().mean() - probability) < 0.07

def test_random_crops_have_the_right_area_and_keep_off_the_border(monkeypatch):
    bordered, seen = torch.ones(200, 1, 40, 40), []
    bordered[..., 4:36] = 0.5
    views = s2mts2.random_views(bordered, PLAIN | dict(centre=0.25, crop=0.5), 40)
    assert (views - (0.5 - 0.449) / 0.226).max() < 1e-5
    monkeypatch.setattr(s2mts2, "crop_rotate_flip", lambda images, *random: seen.extend(random[:4]) or images)
    s2mts2.random_views(torch.zeros(4000, 1, 4, 4), PLAIN | dict(crop=0.8), 4)
    place, size = torch.stack(seen).view(2, 2, -1)
    area, ratio = size.prod(0), size[0] / size[1]
    assert 0.199 < area.min() < 0.25 and 0.95 < area.max() <= 1 and abs(area.mean() - 0.58) < 0.03
    assert ratio.max() <= 4 / 3 + 1e-4 and place.min() >= 0 and (place + size).max() <= 1.00001

# ---- network, teacher, losses, metrics
def test_a_grey_network_equals_the_colour_network_on_a_grey_image():
    colour, grey = (s2mts2.build_network("densenet121", channels, 5).eval() for channels in (3, 1))
    weights = colour.state_dict()
    weights["features.conv0.weight"] = weights["features.conv0.weight"].sum(1, keepdim=True)
    grey.load_state_dict(weights)
    images = torch.randn(2, 1, 64, 64)
    assert torch.allclose(grey(images), colour(images.expand(-1, 3, -1, -1)), atol=1e-4)

def test_the_ema_equals_the_general_sum_over_changing_students():
    student, a = s2mts2.build_network("tiny", 1, 4).double(), 0.9
    teacher = s2mts2.make_teacher(student)
    expected = {name: a ** 7 * value for name, value in teacher.state_dict().items()}
    for n in range(1, 8):
        for name, value in student.state_dict().items():
            value.copy_(torch.randn_like(value) if value.is_floating_point() else torch.tensor(10 * n))
            expected[name] = expected[name] + (1 - a) * a ** (7 - n) * value
        before = {name: value.clone() for name, value in student.state_dict().items()}
        s2mts2.ema_update(teacher, student, a)
        same(before, {**student.state_dict()})
    for name, value in teacher.state_dict().items():
        assert torch.allclose(value, expected[name], atol=1e-12) if value.is_floating_point() else value == 70

def test_the_teachers_batchnorm_uses_the_batch_and_keeps_its_running_statistics():
    student = s2mts2.build_network("tiny", 1, 4)
    teacher, images = s2mts2.make_teacher(student).train(), torch.randn(8, 1, 32, 32) * 5 + 3
    before = {name: value.clone() for name, value in teacher.state_dict().items() if "num" not in name}
    assert torch.allclose(teacher(images), student.train()(images), atol=1e-5)
    same(before, {name: teacher.state_dict()[name] for name in before})
    one = teacher.eval()(images)[0]  # In evaluation it uses the running statistics.
    assert torch.allclose(one, teacher(images[:1])[0], atol=1e-4)
    teacher.features.norm0.running_mean.add_(1)
    assert not torch.allclose(one, teacher(images)[0], atol=1e-3)

def embeddings(images=6, keys=4, dim=10, negatives=30, dtype=torch.float64):
    query = F.normalize(torch.randn(images, dim, dtype=dtype), dim=1)
    key = F.normalize(query[:, None] + torch.randn(images, keys, dim, dtype=dtype) * 0.5, dim=2)
    return query.clone().requires_grad_(), key, F.normalize(torch.randn(negatives, dim, dtype=dtype), dim=1)
def loss_with_covariance_matrices(query, keys, queue, t, weight):
    losses = []
    for q, k in zip(query, keys):
        mean, covariance = k.mean(0), torch.cov(k.T, correction=0)
        positive = q @ mean / t + weight / (2 * t ** 2) * q @ covariance @ q
        losses.append(torch.log(positive.exp() + sum((q @ n / t).exp() for n in queue)) - q @ mean / t)
    return sum(losses) / len(losses)
@pytest.mark.parametrize("weight", [0.0, 0.7, 2.0])
def test_the_joint_contrastive_loss_equals_its_definition(weight):
    query, keys, queue = embeddings()
    ours = s2mts2.joint_contrastive_loss(query, keys, queue, 0.3, weight)
    theirs = loss_with_covariance_matrices(query, keys, queue, 0.3, weight)
    assert abs(ours - theirs) < 1e-9
    assert (torch.autograd.grad(ours, query)[0] - torch.autograd.grad(theirs, query)[0]).abs().max() < 1e-9
    logits = torch.cat([(query * keys[:, 0]).sum(1, keepdim=True), query @ queue.T], 1) / 0.2
    expected = F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))  # InfoNCE: one key.
    assert abs(s2mts2.joint_contrastive_loss(query, keys[:, :1], queue, 0.2, weight) - expected) < 1e-12

def test_the_loss_bounds_the_mean_over_many_gaussian_keys():
    query, keys, queue = (each.detach() for each in embeddings(images=3, keys=5, negatives=200))
    mean, noise, t = keys.mean(1, keepdim=True), torch.randn(3, 100_000, 5, dtype=torch.float64), 0.2
    # mean + sum_m z_m (k_m - mean) / sqrt(M) has the mean and the biased covariance of the keys.
    sample = mean + torch.cat([noise, -noise], 1) @ (keys - mean) / 5 ** 0.5
    positives = torch.einsum("nd,nsd->ns", query, sample) / t
    negatives = (query @ queue.T / t).exp().sum(1, keepdim=True)
    monte_carlo = (torch.log(positives.exp() + negatives) - positives).mean()
    assert -2e-4 <= s2mts2.joint_contrastive_loss(query, keys, queue, t, 1.0) - monte_carlo <= 0.005
    assert s2mts2.joint_contrastive_loss(query, keys, queue, t, 0.0) < monte_carlo - 0.005

def test_the_loss_is_finite_and_forms_no_tensor_larger_than_the_logits():
    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.append(result.numel() if isinstance(result, torch.Tensor) else 0)
            return result
    query, keys, queue = embeddings(images=30, keys=5, dim=20, negatives=200, dtype=torch.float32)
    keys[0, 0], keys[0, 1], sizes = query[0].detach(), -query[0].detach(), []
    with Sizes():
        loss = s2mts2.joint_contrastive_loss(query, keys, queue, 0.005, 2.0)
        loss.backward()
    assert 0 < max(sizes) <= 30 * 201 and loss.isfinite() and query.grad.isfinite().all()

@pytest.mark.parametrize("multilabel", [True, False])
def test_unknown_targets_have_no_part_in_loss_and_metrics(multilabel):
    logits, other = torch.randn(2, 40, 3, dtype=torch.float64)
    truth, image = torch.eye(3, dtype=torch.float64)[torch.arange(40) % 3], torch.arange(40)[:, None]
    unknown = torch.rand(40, 3) < 0.3 if multilabel else (image % 4 == 1).expand(40, 3)
    targets = truth.masked_fill(unknown, np.nan)
    p, soft = logits.sigmoid(), logits.exp() / logits.exp().sum(1, keepdim=True)
    terms = [-(p[n, c] if truth[n, c] else 1 - p[n, c]).log() for n in range(40) for c in range(3)
             if not unknown[n, c]] if multilabel else [-soft[n, n % 3].log() for n in range(40) if n % 4 != 1]
    (loss := s2mts2.supervised_loss(logits.requires_grad_(), targets, multilabel)).backward()
    assert loss.item() == pytest.approx(sum(terms).item() / len(terms), rel=1e-9)
    assert (logits.grad[unknown] == 0).all() and (logits.grad[~unknown] != 0).all()
    expected = (p - other.sigmoid() if multilabel else soft - other.softmax(1)).square().sum().item() / 120
    assert s2mts2.consistency_loss(logits, other, multilabel).item() == pytest.approx(expected, rel=1e-9)
    scores, targets = soft.detach().numpy(), targets.numpy()
    targets[:, 2] = np.where(targets[:, 2] == 1, np.nan, targets[:, 2])
    result, known = s2mts2.classification_metrics(targets, scores, "abc", True), ~np.isnan(targets)
    a, b = (metrics.roc_auc_score(targets[known[:, c], c], scores[known[:, c], c]) for c in (0, 1))
    assert result["auc"] == dict(a=pytest.approx(a), b=pytest.approx(b), c=None)
    assert result["mean_auc"] == pytest.approx((a + b) / 2)

def test_multi_class_metrics_agree_with_scikit_learn():
    random, mean = np.random.default_rng(0), dict(labels=[0, 1, 2], average="macro")
    truth, scores = random.integers(0, 3, 60), random.random((60, 4)).astype(np.float32)
    scores[np.arange(60), truth] += 0.4
    result, most = s2mts2.classification_metrics(np.eye(4)[truth], scores, "abcd", False), scores.argmax(1)
    expected = dict(mean_auc=np.mean([metrics.roc_auc_score(truth == k, scores[:, k]) for k in range(3)]),
                    accuracy=np.mean(truth == most), macro_f1=metrics.f1_score(truth, most, **mean),
                    macro_sensitivity=metrics.recall_score(truth, most, **mean),
                    macro_specificity=np.mean([np.mean(most[truth != k] != k) for k in range(3)]))
    assert {name: result[name] for name in expected} == pytest.approx(expected)

# ---- the two stages
def test_the_queue_holds_the_newest_means_first():
    for length, batch in (7, 3), (5, 5), (4, 9):
        queue, means, expected = torch.full((length, 2), -1), torch.arange(36).repeat(2, 1).T, [-1] * length
        for first in range(0, 36, batch):
            s2mts2.enqueue(queue, means[first:first + batch])
            expected = (list(range(first, min(36, first + batch))) + expected)[:length]
            assert queue[:, 0].tolist() == queue[:, 1].tolist() == expected

@pytest.mark.parametrize("channels, multilabel", [(1, True), (3, False)])
def test_both_stages_on_data_made_by_hand_with_pathlib_paths(channels, multilabel, monkeypatch):
    data, args, first = made_by_hand(channels, multilabel), parse(f"pretrain {SMALL}"), []
    args.out, args.root = Path("mine"), Path("root")
    student, teacher = s2mts2.pretrain(data, args)
    saved, command = state("mine/pretrain.pt"), "finetune --from mine/pretrain.pt --batch 8 --labels 6"
    same([saved["student"], saved["teacher"]], [student.state_dict(), teacher.state_dict()])
    # Student and teacher differ. The queue holds means of keys that are not normalised again.
    assert not torch.equal(student.classifier[0].weight, teacher.classifier[0].weight)
    assert saved["queue"].shape == (28, 128) and (saved["queue"].norm(dim=1) < 0.99999).all()
    # Stage 2 starts from stage 1: with a learning rate of 0 the first update shows it.
    with monkeypatch.context() as patch:
        patch.setattr(s2mts2, "ema_update", lambda *networks: first.extend(networks[:2]) or interrupt())
        pytest.raises(KeyboardInterrupt, s2mts2.finetune, data, parse(f"{command} --lr 0 --out new"))
    for network, name in zip(first, ("teacher", "student")):
        names = [name for name, _ in network.named_parameters() if "classifier" not in name]
        assert all(torch.equal(network.state_dict()[key], saved[name][key]) for key in names)
    assert torch.equal(first[0].classifier.weight, first[1].classifier.weight)
    args = parse(command)
    args.start, args.out = Path(args.start), Path("mine")
    result, (header, names, scores) = s2mts2.finetune(data, args), table("mine/predictions.csv")
    assert json.loads(Path("mine/metrics.json").read_text()) == result and "mean_auc" in result["student"]
    assert header[1:] == data.classes == list(result["auc"]) and ("accuracy" in result) != multilabel
    assert names == [data.names[k] for k in data.test] and (multilabel or np.allclose(scores.sum(1), 1))
    assert len({*Path("mine/labelled.txt").read_text().split()} & {data.names[k] for k in data.train}) == 6

@pytest.mark.parametrize("weight", [0, 1])
def test_each_loss_of_stage_2_gets_the_right_images(weight, monkeypatch):
    """The output of the network is the mean of the view: it shows which image it is."""
    data, network, seen, unseen = made_by_hand(count=30), torch.nn.Sequential(), [], []
    network.pool = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    network.classifier = torch.nn.Linear(1, 3, bias=False)
    torch.nn.init.ones_(network.classifier.weight)
    data.images[...] = np.arange(30, dtype=np.uint8).reshape(-1, 1, 1, 1) * 8
    number = lambda logits: ((logits.detach()[:, 0] * 0.226 + 0.449) * 255 / 8).round().int().tolist()
    spies = dict(supervised_loss=lambda one, two, _: seen.append((number(one), two.numpy())) or one.mean(),
                 consistency_loss=lambda one, two, _: unseen.append((number(one), number(two))) or one.mean(),
                 build_network=lambda *arguments, **keywords: network)
    for name, spy in spies.items():
        monkeypatch.setattr(s2mts2, name, spy)
    args = parse(f"finetune --from scratch --lr 0 --epochs 1 --batch 7 --labels 5 --consistency {weight}")
    args.augment, args.size = PLAIN, 16
    s2mts2.finetune(data, args)
    labelled = {*choose_labelled(data, 5, 0).tolist()}
    # 13 unlabelled images are two steps, with and without the consistency loss.
    assert len(seen) == 2 and {k for numbers, _ in seen for k in numbers} == labelled
    assert all(len(numbers) == len({*numbers}) == 5 for numbers, _ in seen)  # Not 7 in a step.
    assert all((targets == data.targets[numbers]).all() for numbers, targets in seen)
    other = {k for one, two in unseen for k in one if one == two}
    assert other == ({*data.train.tolist()} - labelled if weight else set())
    args.fresh, args.min_steps = True, 5
    assert s2mts2.finetune(data, args) and len(seen) == 2 + 5

def test_targets_of_unlabelled_images_are_never_read():
    chosen = choose_labelled(data := made_by_hand(), 8, 0)
    Path("labels.txt").write_text("\n".join(data.names[k] for k in chosen))
    for out, value, labels in ("nan", np.nan, "all"), ("one", 1, "labels.txt"), ("zero", 0, "labels.txt"):
        other, common = replace(data, targets=data.targets.copy()), f"--epochs 2 --batch 8 --out {out}"
        other.targets[np.setdiff1d(data.train, chosen)] = value
        s2mts2.pretrain(other, parse(f"pretrain {common}"))
        s2mts2.finetune(other, parse(f"finetune --from {out}/pretrain.pt --labels {labels} {common}"))
        same(*([state(f"{each}/{stage}.pt") for stage in ("pretrain", "finetune")] for each in (out, "nan")))

def test_evaluation_shows_each_image_once_in_order_and_keeps_digits(monkeypatch):
    data, network = made_by_hand(count=400), s2mts2.build_network("tiny", 1, 3)
    whole = s2mts2.evaluate(network, data, data.test, 32)
    assert whole.shape == (12, 3) and network.training
    assert np.allclose(s2mts2.evaluate(network, data, data.test[::-1].copy(), 32, 5), whole[::-1], atol=1e-5)
    # Small probabilities keep their order in predictions.csv.
    data = replace(data, train=data.train[:100], test=[*data.train[100:], *data.test])
    scores = (10.0 ** -np.random.default_rng(0).uniform(1, 12, (len(data.test), 3))).astype(np.float32)
    monkeypatch.setattr(s2mts2, "evaluate", lambda *arguments, **keywords: scores)
    result = s2mts2.finetune(data, parse(f"finetune --from scratch --labels 6 {SMALL}"))
    written = table("runs/mine/predictions.csv")[2]
    auc = [metrics.roc_auc_score(data.targets[data.test, k], written[:, k]) for k in range(3)]
    assert [*result["auc"].values()] == pytest.approx(auc, abs=1e-6)

# ---- checkpoints, processes
@pytest.mark.parametrize("command", ["pretrain", "finetune --from scratch --labels 6"])
def test_a_run_stopped_by_ctrl_c_resumes_exactly(command, monkeypatch):
    data, stage, update, calls = made_by_hand(), command.split()[0], s2mts2.ema_update, []
    train = lambda data, options="--out halves": getattr(s2mts2, stage)(
        data, parse(f"{command} --epochs 3 --batch 8 --size 32 {options}"))
    train(data, "--out whole")
    with monkeypatch.context() as patch:
        patch.setattr(s2mts2, "ema_update", lambda *networks: calls.append(1) or (
            interrupt if len(calls) == 8 else update)(*networks))
        pytest.raises(KeyboardInterrupt, train, data)
    assert len(lines("halves/log.jsonl")) == 2
    train(data)
    same(state(f"whole/{stage}.pt"), state(f"halves/{stage}.pt"))
    assert [line["epoch"] for line in lines("halves/log.jsonl")] == [0, 1, 2]
    # A finished run does not train. Other settings and other data raise an error, unless --fresh.
    before, both = Path(f"halves/{stage}.pt").read_bytes(), np.concatenate([data.train, data.test])
    with monkeypatch.context() as patch:
        patch.setattr(s2mts2, "ema_update", None)
        train(data)
        pytest.raises(UserError, train, data, "--out halves --lr .5").match("lr .*0.5")
        for parts in (dict(images=255 - data.images), dict(targets=1 - data.targets),
                      dict(classes=["a", "c", "b"]), dict(train=both[:-11], test=both[-11:])):
            pytest.raises(UserError, train, replace(data, **parts)).match("data|labelled")
    assert Path(f"halves/{stage}.pt").read_bytes() == before
    train(data, "--out halves --lr .01 --fresh")
    assert Path(f"halves/{stage}.pt").read_bytes() != before

KILLED = """
import os, signal, sys, s2mts2
events, ema, replace = iter(range(int(sys.argv.pop(1)) - 1)), s2mts2.ema_update, os.replace
event = lambda: next(events, None) is None and os.kill(os.getpid(), signal.SIGKILL)
s2mts2.ema_update = lambda *arguments: (event(), ema(*arguments))
os.replace = lambda *arguments: (event(), replace(*arguments), event())
sys.exit(s2mts2.main())
"""
@pytest.mark.parametrize("stage, lives", [("pretrain", (2, 12, 10)), ("finetune", (12, 9, 17))])
def test_a_run_killed_at_several_moments_ends_the_same(stage, lives):  # Moments: steps, replaced files
    npz()
    command = f"{stage} --data set.npz --epochs 4 --batch 16 --size 16 --device cpu"
    command += " --from scratch --arch tiny --labels 10 --min-steps 0" * (stage == "finetune")
    run(f"{command} --out whole")
    for life in lives:
        assert python("-c", KILLED, str(life), *command.split()).returncode == -9
    run(command)
    same(state(f"whole/{stage}.pt"), state(f"runs/set/{stage}.pt"))
    assert [line["epoch"] for line in lines("runs/set/log.jsonl")] == [0, 1, 2, 3]
    for name in ("metrics.json", "predictions.csv", "labelled.txt") if stage == "finetune" else ["views.png"]:
        assert Path("whole", name).read_bytes() == Path("runs/set", name).read_bytes()

Trap = type("Trap", (), dict(__reduce__=lambda self: (os.system, ("touch sprung",))))
def test_checkpoints_that_are_gone_or_broken_or_malicious(capsys):
    npz()
    run(f"pretrain --data set.npz {SMALL}")
    s2mts2.write_file(Path("runs/other/pretrain.pt"), b"broken")  # Newer, but of another data set.
    os.utime("runs/other/pretrain.pt", (2e9, 2e9))
    run(command := f"finetune --data set.npz --labels 10 {SMALL}")
    assert "tiny" in error_of(f"{command} --arch densenet121", capsys)
    pytest.raises(UserError, s2mts2.load_networks, parse(command), 3, 4).match(r".* 1\), .* 3\)")
    result = Path("runs/set/metrics.json").read_bytes()
    npz(counts=(61, 4, 16))
    assert "finetune.pt" in error_of("evaluate", capsys)
    npz()
    Path("runs/set/pretrain.pt").unlink()
    run("evaluate --out again")
    assert Path("again/metrics.json").read_bytes() == result
    os.truncate("runs/set/finetune.pt", 9999)
    assert "finetune.pt" in error_of("evaluate", capsys)
    torch.save(dict(stage="pretrain", state=Trap(), args=Trap()), "trap.pt")
    assert "trap.pt" in error_of("finetune --from trap.pt", capsys) and not Path("sprung").exists()

@pytest.mark.parametrize("command", ["pretrain --batch 8", "finetune --from scratch --batch 28 --labels 28"])
def test_a_loss_that_is_not_finite_stops_the_run(command):
    args = parse(f"{command} --size 32 --lr 1e30 --epochs 1")
    pytest.raises(UserError, getattr(s2mts2, args.stage), made_by_hand(), args).match("finite")
    assert not Path("runs/mine/metrics.json").exists()

PROCESS = """
import sys, s2mts2
from torch import nn
if sys.argv.pop(1) == "plain":
    s2mts2.PRETRAIN.update(s2mts2.PLAIN)
    s2mts2.build_network = lambda arch, channels, outputs, *more, **words: nn.Sequential(
        nn.Flatten(), nn.Linear(256, 32), nn.Tanh(), nn.Linear(32, outputs))
sys.exit(s2mts2.main())
"""
def test_two_processes_compute_what_one_does():
    npz()
    Path("process.py").write_text(PROCESS)
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2"
    for start, network, out in ("", "plain", "one"), (torchrun, "plain", "two"), (torchrun, "tiny", "both"):
        command = f"pretrain --data set.npz {SMALL} --size 16 --batch 8 --epochs 2 --out {out}"
        done = python(*f"{start} process.py {network} {command}".split())
        assert done.returncode == 0 and done.stdout.count("epoch 2/2") == 1, done.stderr
    one, two = ([[line["loss"] for line in lines(f"{out}/log.jsonl")], state(f"{out}/pretrain.pt")]
                for out in ("one", "two"))
    assert one[0] == pytest.approx(two[0], abs=1e-5)
    same([one[1]["queue"], one[1]["student"]], [two[1]["queue"], two[1]["student"]], 1e-4)
    run(f"finetune --from both/pretrain.pt --labels 10 {SMALL}")

# ---- commands
@pytest.mark.parametrize("make", [None, cxr14, chexpert, isic2018, npz])
def test_both_stages_run_on_each_data_set_and_evaluate_repeats_the_results(make, capsys):
    where = {None: "digits", npz: "root/set.npz"}.get(make) or f"{make.__name__} --root root --init random"
    where += " --uncertain ignore" * (make is chexpert)
    make and make(Path("root"))
    run(f"pretrain --data {where} --arch tiny --epochs 1 --batch 8 --size 32")
    assert make or "loss" in capsys.readouterr().err
    run("finetune --labels 0.5 --epochs 1 --batch 4")
    out, = Path("runs").iterdir()
    assert {file.name for file in out.iterdir()} == set(
        "pretrain.pt finetune.pt log.jsonl metrics.json predictions.csv labelled.txt views.png".split())
    read = lambda out: [Path(out, name).read_bytes() for name in ("metrics.json", "predictions.csv")]
    before, result = read(out), json.loads(read(out)[0])
    assert result["mean_auc"] and ("macro_f1" in result) == (make in (None, isic2018, npz))
    (out / "metrics.json").unlink()
    run("evaluate", f"evaluate {out}/finetune.pt --out other")
    assert read(out) == read("other") == before

def test_predict_repeats_predictions_and_names_broken_images(capsys):
    folder(Path("DIR"))
    # Repeating a finished run makes its checkpoint the newest.
    run(first := f"pretrain --data DIR {SMALL}", f"{first} --seed 1 --out runs/other", first)
    run("finetune --epochs 1 --batch 4", "predict DIR --out out/new.csv")
    (header, names, scores), (again, images, new) = table("runs/DIR/predictions.csv"), table("out/new.csv")
    row, broken = dict(zip(images, new)), {"a/002.png", "b/059.png"}
    assert again == header and len(row) == 60 and np.allclose([*map(row.get, names)], scores, atol=1e-5)
    run("predict DIR/a/002.png DIR/b/001.png --from runs/DIR/finetune.pt")
    _, paths, scores = table("predicted.csv")
    assert len(paths) == 2 and np.allclose(scores, [row[path[4:]] for path in paths], atol=1e-5)
    for name in broken:
        Path("DIR", name).write_bytes(b"broken")
    assert main("predict DIR --out good.csv".split()) == 2
    printed, (_, good, scores) = "".join(capsys.readouterr()), table("good.csv")
    assert {*images} - {*good} == broken and all(name in printed for name in broken)
    assert np.allclose(scores, [row[name] for name in good], atol=1e-5)
    error_of("predict DIR/a/002.png --out none.csv", capsys)
    assert "['epochs', 'root']" in error_of("predict DIR/b/001.png --epochs 3 --root .", capsys)

def test_settings_come_from_the_recipe_the_checkpoint_and_the_command_line():
    args = parse("pretrain --data cxr14 --keys 5")
    assert (args.size, args.batch, args.queue, args.temperature, args.keys) == (256, 256, 65536, 0.07, 5)
    args = parse("finetune --data cxr14 --from imagenet --labels 500")
    assert (args.size, args.batch, args.lr, args.labels, args.arch) == (512, 16, 0.05, 500, "densenet121")
    rates = [s2mts2.learning_rate(args, epoch) for epoch in (0, 14, 15, 24, 25, 29)]
    assert rates == pytest.approx([.05, .05, .005, .005, .0005, .0005])
    rates = [s2mts2.learning_rate(parse("pretrain --lr 1 --epochs 4"), epoch) for epoch in range(4)]
    assert rates == pytest.approx([1, .854, .5, .146], abs=1e-3)
    # Stage 2 takes over the size only if the user chose it.
    stage_2, common = parse("finetune --data cxr14 --from scratch --arch tiny").size, "--epochs 1 --batch 8"
    for option, expected, out in ("", stage_2, "recipe"), ("--size 16", 16, "size16"):
        command = f"pretrain --data cxr14 --root root --partial --arch tiny {option} --out {out} {common}"
        s2mts2.pretrain(made_by_hand(), parse(command))
        ours = parse(f"finetune --from {out}/pretrain.pt")
        assert (ours.data, ours.size, ours.arch, str(ours.root), ours.partial, ours.out) == (
            "cxr14", expected, "tiny", "root", True, out)
    assert parse("finetune --from size16/pretrain.pt --data ./cxr14").size == 16  # The same folder.
    args = parse("finetune --from size16/pretrain.pt --data digits --blur 1")
    assert (args.root, args.partial, args.arch, args.augment["blur"]) == (None, False, "tiny", 1)

BAD = {"": "|train|evaluate|evaluate nowhere.pt|evaluate --epochs 3|predict|finetune|pretrain --from scratch",
       "pretrain ": "extra|--nonsense|--epoch 2|--data mnist|--epochs 0|--epochs x|--batch 1438|--lr nan|"
       "--lr inf|--teacher-momentum 1.1|--crop 1|--blur 11|--temperature 0|--dim 1000000000000|"
       "--size 31 --arch densenet121|--seed -1|--seed 4294967296|--init imagenet|--device tpu|"
       "--device cuda:99|--labels 3|--out file|--data file|--root x|--data cxr14|--partial|"
       "--data cxr14 --root file|--data cxr14 --uncertain ones",
       "finetune --from ": "nowhere.pt|file|imagenet --arch tiny|scratch --beta1 1",
       "finetune --from scratch --labels ": "0|1.5|5|2000|nowhere.txt|file",
       "ablate ": "--seeds 1|--seed 1|--lr -3|--size 8|--labels nowhere.txt|--init imagenet --arch tiny"}
@pytest.mark.parametrize("command", [start + end for start in BAD for end in BAD[start].split("|")])
def test_bad_commands_end_with_one_line_and_write_nothing(command, capsys):
    Path("file").write_text("neither a folder nor a checkpoint\n")
    error_of(command, capsys)
    assert os.listdir() == ["file"]

def test_importing_does_nothing_ctrl_c_gives_130_and_no_line_has_over_100_columns(monkeypatch, capsys):
    assert max(map(len, SCRIPT.read_text().splitlines())) <= 100
    done = python("-c", """import torch, numpy
state = lambda: (torch.get_float32_matmul_precision(), torch.get_num_threads(), torch.get_default_dtype(),
                 torch.is_grad_enabled(), torch.get_rng_state().sum(), numpy.random.get_state()[1].sum())
before = state()
import s2mts2
assert state() == before""")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "") and os.listdir() == []
    assert python(SCRIPT, "train").returncode == 2
    monkeypatch.setattr(s2mts2, "pretrain", interrupt)
    assert main(["pretrain", "--fresh", "--seed", "3"]) == 130
    assert capsys.readouterr().err.strip() == "stopped; to resume, run the same command without --fresh"

def test_the_ablation_has_five_rows_with_the_same_labels(monkeypatch):
    monkeypatch.setattr(s2mts2, "load_data", lambda *arguments: made_by_hand(multilabel=False))
    run(command := "ablate --seeds 2 --epochs 1 --batch 8 --labels 6 --size 16 --out out")
    rows = json.loads(Path("out/ablation.json").read_text())
    for row, seed in [(row, seed) for row in rows for seed in (0, 1)]:
        assert len({path.read_text() for path in Path("out").glob(f"*-{seed}/labelled.txt")}) == 1
        out, (start, stage_2) = f"out/{re.sub('[ +]+', '-', row)}-{seed}", row.split(" + ")
        ours = torch.load(f"{out}/finetune.pt", weights_only=True)["args"]
        assert rows[row]["accuracy"][seed] == json.loads(Path(out, "metrics.json").read_text())["accuracy"]
        assert (ours["consistency"] > 0) == (stage_2 == "mean teacher") and start in ours["start"]
        assert ours["seed"] == seed and len(rows) == 5
    for name, expected in dict(moco=(1, 0), jcl=(2, 2)).items():
        ours = torch.load(f"out/{name}-1/pretrain.pt", weights_only=True)["args"]
        assert (ours["keys"], ours["covariance_weight"]) == expected
    monkeypatch.setattr(s2mts2, "ema_update", None)  # Finished runs are only evaluated again.
    run(command)
    # If stage 1 starts from ImageNet weights, rows without stage 1 start from them too.
    starts, saved = [], dict(args=vars(parse("pretrain --data cxr14")))
    monkeypatch.setattr(s2mts2, "pretrain", lambda *arguments: None)
    monkeypatch.setattr(s2mts2, "load_checkpoint", lambda *arguments: saved)
    monkeypatch.setattr(s2mts2, "finetune", lambda data, args: starts.append(args.start) or {"mean_auc": 1})
    run("ablate --data cxr14 --seeds 2 --out out")
    assert starts[:4] == 2 * ["imagenet"] + ["out/moco-0/pretrain.pt", "out/jcl-0/pretrain.pt"]

README = (SCRIPT.parent / "README.md").read_text()
@pytest.mark.parametrize("own", [False, True])
def test_the_commands_of_the_readme_run(own, monkeypatch):
    # One epoch each, on fewer images, without those that need a download or several GPUs.
    monkeypatch.setattr(s2mts2, "load_data", lambda *arguments: replace(
        data := load_data(*arguments), train=data.train[:400], test=data.test[:100]))
    folder(Path("DIR")), folder(Path("IMAGES"))
    run(f"pretrain --data {'DIR' if own else 'digits'} --batch 8 --epochs 1", "finetune --batch 8 --epochs 1")
    skip = "torchrun|ablate|--root|cxr14|chexpert|isic2018|imagenet|densenet|--help|[A-Z]{3,}[.][a-z]"
    blocks = [[command for command in re.findall(r"python s2mts2\.py ([^#&\n]+)", block)
               if not re.search(skip, command)]
              for block in re.findall(r"(?:^    python s2mts2\.py.*\n)+", README, re.M)]
    commands = sum((block for block in blocks if own == bool(re.search("DIR|IMAGES", str(block)))), [])
    assert commands
    for command in commands:
        command += dict(ablate=" --seeds 2 --size 16", pretrain=" --size 16").get(command.split()[0], "")
        run(command + " --epochs 1 --batch 8 --fresh" * (command.split()[0] not in ("evaluate", "predict")))

def test_the_example_for_notebooks_runs():
    code = README[README.index("    import numpy as np, s2mts2"):].split("\n\n")[0]
    exec("\n".join(line[4:] for line in code.splitlines()), {})
    assert list(Path("runs").glob("*/metrics.json"))

