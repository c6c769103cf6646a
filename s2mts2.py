"""S2MTS2: a mean teacher, pre-trained without labels, then fine-tuned with a few of them.

A complete implementation, in one file, of "Self-supervised Mean Teacher for Semi-supervised Chest
X-ray Classification" (Liu, Tian, Cordeiro, Belagiannis, Reid and Carneiro, MLMI 2021,
arXiv 2103.03629).

The idea. Radiographs are plentiful, labels are not. So learn in two stages, with two networks of
one shape: a STUDENT, trained by gradient descent, and a TEACHER, never trained itself: its weights
are a running average of the student's. An average over many steps is steadier than any one of them,
and so it can set the targets for the very student that it is made of.

    Stage 1, pretrain: all images, no labels.

        image --> 1 query view --> student --> q ------------------+
          |                           |                            |
          |                           | weights, averaged          +--> joint contrastive loss,
          |                           v                            |    trains the student
          +-----> M key views ---> teacher --> k_1 ... k_M --------+
                                                 | their mean      |
                                                 v                 |
                                        queue of past means: n_1 ... n_K

    Stage 2, finetune: the same two networks with a classifier, 2 % of the labels.

        labelled image --> a view --> student --> p -- cross-entropy with its label --+
                                                                                      +--> trains
        unlabelled image > view 1 --> student --> p --+                               |    the
                 |                                    +-- mean squared difference ----+    student
                 +-------> view 2 --> teacher --> p' -+           times w

    After every step the teacher moves a little towards the student. At the end it is tested.

How to run it:

    a laptop            python s2mts2.py pretrain && python s2mts2.py finetune
    each ingredient     python s2mts2.py ablate --seeds 5
    X-rays and a GPU    python s2mts2.py pretrain --data cxr14 --root DIR
                        python s2mts2.py finetune
    and several GPUs    torchrun --nproc_per_node=4 s2mts2.py pretrain --data cxr14 --root DIR
    test once more      python s2mts2.py evaluate runs/digits/finetune.pt

The paper's letters, the names that they have here, and their shapes:

    q       query [N, D]         student's embedding of each image's query view, unit length
    k_m     keys [N, M, D]       teacher's embeddings of its M key views, unit length
    mu      keys.mean(1) [N, D]  their mean; this is what enters the queue
    S       never formed         their covariance; only q'S q is needed, and that is a variance
    n_j     queue [K, D]         negatives: the means mu of the last K images
    t       temperature          how finely the loss tells similarities apart
    c       covariance_weight    grows up to lambda, which is args.covariance_weight
    a       teacher_momentum     share of itself that the teacher keeps at each step
    w       weight               of the unlabelled images; grows from 0 towards args.consistency
    p, p'   probabilities [N, C] student's and teacher's, of C classes

N images in a batch, M keys of an image, D numbers in an embedding, K negatives in the queue.
Inside a view, [N, C, H, W] is images, channels, height, width.

Comments say whose decision a line is: [paper], [authors' code] (github.com/FBLADL/semi-chest), [our
choice] where those are silent or wrong, and [plumbing] where it has nothing to do with the method.
A tag speaks for the paragraph that it begins, or for the sentence that it ends.

Map:  1 data    2 views    3 network and teacher    4 joint contrastive loss    5 stage 1: pretrain
      6 stage 2: finetune    7 evaluation and ablation    -- a first reader can stop there --
      8 other data sets    9 recipes    10 training loop and checkpoints    11 several processes
      12 command line
"""

import argparse
import contextlib
import copy
import csv
import ctypes
import datetime
import hashlib
import io
import json
import math
import os
import shlex
import signal
import sys
import tempfile
import textwrap
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from sklearn import datasets, metrics, model_selection
from torch import distributed, nn
from tqdm import tqdm

try:
    import fcntl
except ImportError:
    # Windows has none, and no lock then.
    fcntl = None


class UserError(Exception):
    """Something the user can mend; its text is one line that says what to do."""


# ==================================================================================================
# 1. What a data set is
# ==================================================================================================


@dataclass
class Data:
    """Images, labels and a split: all that the two stages ask of a data set.

    name         str; results go to runs/<name>/
    images       uint8 [N, C, H, W], C = 1 (grey) or 3 (RGB), in memory or memory-mapped
    targets      float32 [N, classes] of 0 and 1; exactly one 1 in a row unless multilabel
    classes      names of the columns of targets
    names        names of the images, for labelled.txt and predictions.csv
    train, test  int64 indices; pre-training sees all of train, labelled or not
    multilabel   True: an image shows any number of findings, each a yes or no of its own (sigmoid)
                 False: an image is of exactly one class (softmax)

    A Data can be made by hand. Raises UserError when the parts do not fit together.
    """

    name: str
    images: np.ndarray
    targets: np.ndarray
    classes: list
    names: list
    train: np.ndarray
    test: np.ndarray
    multilabel: bool

    def __post_init__(self):
        # asarray takes torch tensors too, and leaves memory-mapped images on the disk.
        self.classes, self.names = list(map(str, self.classes)), list(map(str, self.names))
        self.images, self.targets = np.asarray(self.images), np.asarray(self.targets, np.float32)
        self.train, self.test = np.asarray(self.train, np.int64), np.asarray(self.test, np.int64)
        count, split = len(self.images), np.concatenate([self.train, self.test])
        is_image = self.images.ndim == 4 and self.images.shape[1] in (1, 3)
        for fits, rule in (
            (len(self.train) and len(self.test), "train and test must not be empty"),
            (is_image and self.images.dtype == np.uint8, "images must be uint8 [N, 1 or 3, H, W]"),
            (self.targets.shape == (count, len(self.classes)), "targets must be [images, classes]"),
            (((self.targets == 0) | (self.targets == 1)).all(), "targets must be 0 or 1"),
            (self.multilabel or (self.targets.sum(1) == 1).all(), "targets must be one-hot"),
            (len(set(self.names)) == len(self.names) == count, "each image needs its own name"),
            (((split >= 0) & (split < count)).all(), "the split must index images"),
            (len(np.unique(split)) == len(split), "an image must not be in the split twice"),
        ):
            if not fits:
                raise UserError(f"data set {self.name}: {rule}")


def load_data(name, root=None, size=None, cache=None, uncertain="zeros", partial=False,
              validation=False, check=None):
    """Load a data set by its name, a row of RECIPES. Returns a Data.

    root        folder of the data; data/<name> unless given
    size        side in pixels to which folders of images are resized once; the recipe's unless
                given
    cache       folder that takes the resized images; root unless given
    uncertain   "zeros" or "ones": what a finding counts as that the report leaves open (CheXpert)
    partial     bool: make do with the images that are there
    validation  bool: test on the validation part instead (CheXpert)
    check       function that may refuse the Data before its images, black as yet, are decoded
    Raises UserError when files are missing, broken or contradict each other.
    """
    root = Path(root or f"data/{name}")
    size = size or recipe(name, "pretrain")["size"]
    if name == "digits":
        return load_digits()
    if name in MEDMNIST:
        return load_medmnist(name, root, size, cache)
    if name == "cxr14":
        found = load_cxr14(root)
    elif name == "chexpert":
        found = load_chexpert(root, uncertain)
    elif name == "isic2018":
        found = load_isic2018(root)
    else:
        raise UserError(f"there is no data set {name!r}; choose from {', '.join(RECIPES)}, or for "
                        "stage 2 another checkpoint with --from")
    return from_folder(name, found, size, cache or root, partial, validation, check)


def load_digits():
    """scikit-learn's digits: 1,797 scans of handwritten digits, 8 x 8 pixels, ten classes.

    They are part of the package, so that the whole method runs at once, with nothing to download.
    The split, 80 % train and 20 % test, keeps the classes' shares and is the same for every --seed.
    """
    digits = datasets.load_digits()
    # Grey levels run from 0 to 16.
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    train, test = model_selection.train_test_split(
        np.arange(len(images)), test_size=0.2, stratify=digits.target, random_state=0)
    names = [f"digit{index:04d}" for index in range(len(images))]
    return Data("digits", images, np.eye(10)[digits.target], list("0123456789"), names, train, test,
                multilabel=False)


def choose_labelled(data, labels, seed):
    """Choose the training images whose labels may be used; all others count as unlabelled.

    labels  share of each class if < 1; number of images in all if >= 1; else the path of a file
            with the name of one image a line
    seed    int; decides the draw
    Returns int64 indices, ascending. Raises UserError when a number or file does not fit the data.

    [authors' code] Of each class draw the given share of its images, at least one; their union is
    the labelled set. A share of the whole could leave a rare finding with hardly any example, or
    none: Hernia is on 1 chest X-ray in 500. Images without any target form a class of their own,
    on Chest X-ray14 "No Finding".
    [our choice] A number instead of a share is met exactly, in nearly the same proportions.
    """
    if isinstance(labels, (str, os.PathLike)):
        row = {data.names[index]: index for index in data.train}
        wanted = read_lines(labels)
        strange = [name for name in wanted if name not in row]
        if strange or not wanted:
            what = f"{strange[0]} is not a training image" if strange else "the file is empty"
            raise UserError(f"--labels {labels}: {what}; give one image a line, such as "
                            f"{data.names[data.train[0]]}")
        chosen = np.unique([row[name] for name in wanted])
        without = data.targets[data.train].any(0) & ~data.targets[chosen].any(0)
        if without.any():
            raise UserError(f"--labels {labels} has no image of class "
                            f"{data.classes[without.argmax()]}; add at least one")
        return chosen

    targets = data.targets[data.train]
    if data.multilabel:
        targets = np.column_stack([targets, targets.sum(1) == 0])
    generator = np.random.default_rng(seed)
    chosen = np.zeros(len(targets), bool)
    # How large the share must be before an image is drawn: its place in the random order of its
    # class.
    share_needed = np.full(len(targets), np.inf)
    for column in targets.T:
        members = generator.permutation(np.flatnonzero(column))
        chosen[members[:max(1, round(labels * len(members))) if labels < 1 else 1]] = True
        place = np.arange(len(members)) / max(1, len(members))
        share_needed[members] = np.minimum(share_needed[members], place)
    if labels >= 1:
        if not chosen.sum() <= labels <= len(targets):
            raise UserError(f"--labels {labels} is not from {chosen.sum()}, one of each class, "
                            f"to {len(targets)}, all training images")
        # First the one of each class, then what a growing share would draw next.
        chosen[np.lexsort((share_needed, ~chosen))[:labels]] = True
    return np.sort(data.train[chosen])


# ==================================================================================================
# 2. Views: one image, seen differently
# ==================================================================================================

# Both stages learn by asking for one answer to several views of an image. What the views change
# (place, exposure, sharpness) the network learns to overlook; what they all share it must learn to
# see.
#
# The views are tensor arithmetic on a whole batch, on whatever device it is. The functions that
# change images take the random draws as arguments [N], so that each can be tested against
# torchvision's; random_views draws them.

# All strengths of a view at zero: a test image. Their meaning and units:
PLAIN = dict(
    # Share of the width that is cut off, half of it on either side, before anything else.
    centre=0.0,
    # Random crop: the largest share of the area that is cut away. torchvision's scale=(.2, 1) is
    # .8.
    crop=0.0,
    # Rotation: largest angle in degrees, and the share of views that are rotated at all.
    rotate=0.0, rotate_p=0.0,
    # Share of views that are mirrored left to right, and top to bottom.
    flip_p=0.0, vertical_flip_p=0.0,
    # Brightness, contrast and saturation are multiplied by 1 - jitter to 1 + jitter, and the hue
    # turned by up to this share of a full circle, in a share jitter_p of the views.
    jitter=0.0, hue=0.0, jitter_p=0.0,
    # Gaussian blur: largest standard deviation in pixels (the smallest is .1), and the share of
    # views.
    blur=0.0, blur_p=0.0,
    # Share of views that lose a random rectangle.
    erase_p=0.0,
)

# One normalisation for pre-training, fine-tuning and test: ImageNet's, as the ImageNet weights
# expect; for grey images its mean over the colours. [our choice] The authors' code has two, so that
# its second stage starts on inputs that its first never saw.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def random_views(images, augment, size):
    """One random view of each image.

    images   uint8 [N, C, H, W], or float in 0..1; C = 1 or 3, any device
    augment  dict with the keys of PLAIN: the strengths in force
    size     int, side of the views in pixels
    Returns float32 [N, C, size, size] on the device of images, normalised.

    Every image has its own draws, from torch's global generator: one seed, one set of views. With
    augment = PLAIN only resizing and normalisation are left.
    """
    count, device = len(images), images.device
    # A CPU is fastest with as many images at a time as its cache holds.
    at_once = max(1, 2**20 // size**2)
    if device.type == "cpu" and count > at_once:
        return torch.cat([random_views(part, augment, size) for part in images.split(at_once)])
    images = images / 255 if images.dtype == torch.uint8 else images.float().clone()

    def uniform(low, high):
        return torch.empty(count, device=device).uniform_(low, high)

    def sometimes(probability):
        return (torch.rand(count, device=device) < probability).float()

    # [our choice] The crop is taken from the resized image, so that the views of a batch are of one
    # shape from the start; torchvision crops at full resolution, which shows finer detail.
    if images.shape[-2:] != (size, size):
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)

    if any(augment[name] for name in ("centre", "crop", "rotate", "flip_p", "vertical_flip_p")):
        ratio = 4 / 3 if augment["crop"] else 1
        left, top, width, height = rectangle(uniform, 1 - augment["crop"], 1, ratio)
        kept = 1 - augment["centre"]
        left, width = (1 - kept) / 2 + kept * left, kept * width
        angle = uniform(-1, 1) * augment["rotate"] * sometimes(augment["rotate_p"])
        flip, flip_y = sometimes(augment["flip_p"]), sometimes(augment["vertical_flip_p"])
        images = crop_rotate_flip(images, left, top, width, height, angle, flip, flip_y)

    if augment["jitter_p"]:
        drawn = sometimes(augment["jitter_p"])
        brightness, contrast, saturation, hue = (
            drawn * augment[strength] * uniform(-1, 1) for strength in ("jitter",) * 3 + ("hue",))
        images = jitter_colours(images, 1 + brightness, 1 + contrast, 1 + saturation, hue)

    # Blurring is dear, so only the images drawn for it take it. How many they are is drawn on the
    # CPU: to ask a GPU for the number would make the program wait.
    blurred = int(augment["blur_p"] * count + torch.rand(()))
    if blurred and augment["blur"]:
        picked = torch.rand(count, device=device).argsort()[:blurred]
        sigma = uniform(min(0.1, augment["blur"]), augment["blur"])[:blurred]
        images[picked] = gaussian_blur(images[picked], sigma, augment["blur"])

    images.sub_(channel_values(MEAN, images)).div_(channel_values(STD, images))

    if augment["erase_p"]:
        # The colour of the hole is 0, by now the mean grey.
        left, top, width, height = rectangle(uniform, 0.02, 0.33, 3.3)
        images = erase(images, left, top, width * sometimes(augment["erase_p"]), height)
    return images


def rectangle(uniform, smallest, largest, ratio):
    """Random rectangles: left, top, width and height [N], in shares of the image.

    uniform            (low, high) -> N random numbers
    smallest, largest  area, in shares of the image's    ratio  of the sides, from 1 / ratio to this
    As in torchvision; but a side longer than the image is cut to it, where torchvision draws again,
    and its smallest ratio for erasing is .3 instead of 1 / 3.3. [our choice]
    """
    area, ratio = uniform(smallest, largest), torch.exp(uniform(-1, 1) * math.log(ratio))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    return uniform(0, 1) * (1 - width), uniform(0, 1) * (1 - height), width, height


def channel_values(values, images):
    """MEAN or STD as [C, 1, 1] to go with images [N, C, H, W]; for grey their mean."""
    values = torch.tensor(values if images.shape[1] == 3 else [sum(values) / 3])
    return send(values, images.device).view(-1, 1, 1)


def crop_rotate_flip(images, left, top, width, height, angle, flip, flip_y):
    """Crop and enlarge to the old size, rotate, mirror: one affine map, one bilinear resampling.

    images                    float32 [N, C, S, S]
    left, top, width, height  float32 [N], the crop, in shares of the image's side
    angle                     float32 [N], degrees, counter-clockwise
    flip, flip_y              float32 [N], 1 to mirror left to right, top to bottom, 0 not to
    Returns float32 [N, C, S, S], black where the view looks beyond the image.

    The result is that of torchvision's three functions one after another, but smoothed once instead
    of twice, and with the image itself in the corners where they would show black.
    """
    # Where in the input does an output pixel come from? Go back along the chain: mirror, turn by
    # the angle, shrink to the crop's size, move to its centre. Coordinates run from -1 to 1.
    def per_image(values):
        return values.view(-1, 1, 1)

    side, radians = images.shape[-1], torch.deg2rad(angle)
    place = (torch.arange(side, device=images.device) * 2 + 1) / side - 1
    x, y = per_image(1 - 2 * flip) * place, per_image(1 - 2 * flip_y) * place[:, None]
    cos, sin = per_image(radians.cos()), per_image(radians.sin())
    left, top, width, height = map(per_image, (left, top, width, height))
    # What an output column adds to the place in the input, [N, 1, S], and what a row does, [N, S,
    # 1]. Both coordinates in one complex number, so that their sum is one pass over the pixels.
    columns = torch.complex(width * cos * x + 2 * left + width - 1,
                            height * sin * x + 2 * top + height - 1)
    rows = torch.complex(-width * sin * y, height * cos * y)
    grid = torch.view_as_real(columns + rows)
    return F.grid_sample(images, grid, padding_mode="zeros", align_corners=False)


def jitter_colours(images, brightness, contrast, saturation, hue):
    """Change exposure and colour of each image.

    images                            float32 [N, C, H, W] in 0..1; grey ones have no colour
    brightness, contrast, saturation  float32 [N], factors, 1 for no change
    hue                               float32 [N], turns of the colour circle, 0 for no change
    Returns float32 [N, C, H, W] in 0..1.
    """
    def per_image(values):
        return values.view(-1, 1, 1, 1)

    grey = images
    if images.shape[1] == 3:
        # In YIQ coordinates the first number is the grey level and the other two span the colours:
        # saturation stretches that plane and hue turns it, together one 3 x 3 matrix an image.
        # torchvision turns the hue in HSV, which no matrix can; the purpose is the same. [our
        # choice]
        to_yiq = torch.tensor(
            [[0.299, 0.587, 0.114], [0.596, -0.275, -0.321], [0.212, -0.523, 0.311]])
        to_yiq, back = (send(matrix, images.device) for matrix in (to_yiq, to_yiq.inverse()))
        cos, sin = (saturation * wave(2 * math.pi * hue) for wave in (torch.cos, torch.sin))
        one, zero = torch.ones_like(cos), torch.zeros_like(cos)
        turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], 1).view(-1, 3, 3)
        images = torch.einsum("nij,njhw->nihw", back @ turn @ to_yiq, images)
        grey = torch.einsum("c,nchw->nhw", to_yiq[0], images)
    # Contrast moves the pixels away from the image's mean grey level, or towards it:
    # contrast * (brightness * pixel) + (1 - contrast) * (brightness * mean), in one pass.
    mean = brightness * grey.flatten(1).mean(1)
    shift, factor = per_image((1 - contrast) * mean), per_image(contrast * brightness)
    return (images * factor).add_(shift).clamp_(0, 1)


def gaussian_blur(images, sigma, largest):
    """Blur each image [N, C, H, W] with a Gaussian of its own sigma [N], in pixels, up to largest.

    Beyond the border the image is continued by its reflection.
    """
    count, channels, height, width = images.shape
    # Past three standard deviations a Gaussian is next to nothing.
    radius = math.ceil(3 * largest)
    distance = torch.arange(-radius, radius + 1, device=images.device)
    weights = torch.softmax(-distance.square() / (2 * sigma.square()[:, None]), 1)
    # A Gaussian treats rows and columns apart: two thin kernels do for a wide square one. As
    # channels of a single image, in groups of one, all images may have kernels of their own.
    weights = weights.repeat_interleave(channels, 0)
    images = F.pad(images.reshape(1, -1, height, width), [radius] * 4, mode="reflect")
    images = F.conv2d(images, weights[:, None, None, :], groups=len(weights))
    images = F.conv2d(images, weights[:, None, :, None], groups=len(weights))
    return images.view(count, channels, height, width)


def erase(images, left, top, width, height):
    """Set a rectangle of each image [N, C, H, W] to 0, in place; in shares [N] of its sides."""
    def inside(start, length, side):
        place = (torch.arange(side, device=images.device) + 0.5) / side
        return ((place >= start[:, None]) & (place < (start + length)[:, None])).float()

    rows, columns = inside(top, height, images.shape[-2]), inside(left, width, images.shape[-1])
    return images.mul_(1 - rows[:, None, :, None] * columns[:, None, None, :])


# ==================================================================================================
# 3. The network, and a teacher that follows it
# ==================================================================================================


def build_network(arch, channels, outputs, head="linear", imagenet=False):
    """torchvision's DenseNet with a head of our own.

    arch      "densenet121" [paper]; "tiny", a DenseNet with 0.14 million weights for small images
    channels  1 or 3
    outputs   int: D with head "mlp", the number of classes with head "linear"
    head      "mlp", the projection of stage 1, dropped after it; "linear", a classifier's logits
    imagenet  bool: start densenet121 from torchvision's ImageNet weights, a download of 31 MB
    Returns an nn.Module, [N, channels, H, W] -> [N, outputs]. UserError if there are no weights.
    """
    if arch == "densenet121":
        network = imagenet_densenet121() if imagenet else torchvision.models.densenet121()
    else:
        network = torchvision.models.DenseNet(16, block_config=(2, 4, 4), num_init_features=32)
    if channels == 1:
        # Three equal channels through a filter are one channel through the filter's sum. So grey
        # images stay grey, at a third of the memory, and the network starts as exactly the one that
        # sees three copies of the normalised image.
        stem = network.features.conv0
        stem.weight, stem.in_channels = nn.Parameter(stem.weight.sum(1, keepdim=True)), 1
    features = network.classifier.in_features
    network.classifier = nn.Linear(features, outputs)
    if head == "mlp":
        hidden = nn.Sequential(nn.Linear(features, features), nn.ReLU())
        network.classifier = hidden.append(network.classifier)
    # Keep the channels of a pixel side by side in memory, the order in which convolutions run
    # fastest.
    return network.to(memory_format=torch.channels_last)


def make_teacher(student):
    """A copy of the student that no gradient reaches; only ema_update changes it.

    With a gradient it would no longer be the judge. To lower a loss that asks two networks to
    agree, it could move towards the student's answer as well as the student towards its own: the
    two would meet where it is easiest, at an answer that says little about the image, and the
    average, steady because it only follows, would be gone. It also saves the backward pass of M of
    the M + 1 views.

    Its BatchNorm layers, while training, normalise with the statistics of the batch at hand. The
    other way, evaluation mode with running statistics, would describe what the student's fast
    weights produced in the past and not what the teacher's averaged weights produce now: tried on
    digits, stage 1 then does not learn, its loss stuck near log(K + 1), the loss of guessing.
    Evaluation does need running statistics, and at the end of training, when the weights hardly
    move any more, they fit. They follow the student's in ema_update, like weights, and must not
    also be moved by the teacher's own passes, as they are in the authors' code. [our choice] To a
    BatchNorm that has them already, track_running_stats=False means just that.
    """
    teacher = copy.deepcopy(student).requires_grad_(False)
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
    return teacher


@torch.no_grad()
def ema_update(teacher, student, momentum):
    """teacher <- momentum * teacher + (1 - momentum) * student, in place. [paper]

    teacher, student  nn.Modules of one architecture; the student is not changed
    momentum          float in 0..1; .999 averages over about the last 1 / (1 - .999) = 1,000 steps

    With a student that stands still, n updates give momentum^n teacher + (1 - momentum^n) student.
    BatchNorm's running mean and variance are averaged like weights; its integer count of batches
    has no meaningful average and is copied. [our choice] In the authors' code it stays behind.
    """
    pairs = list(zip([*teacher.parameters(), *teacher.buffers()],
                     [*student.parameters(), *student.buffers()], strict=True))
    # All tensors in one call: a GPU takes longer to be asked than to answer.
    floats = [pair for pair in pairs if pair[0].is_floating_point()]
    torch._foreach_lerp_(*zip(*floats), 1 - momentum)
    for mine, theirs in pairs:
        if not mine.is_floating_point():
            mine.copy_(theirs)


# ==================================================================================================
# 4. The joint contrastive loss
# ==================================================================================================


def joint_contrastive_loss(query, keys, queue, temperature, covariance_weight):
    """Contrast each query with infinitely many keys of its own image at once.

    query              float [N, D], unit length
    keys               float [N, M, D], unit length, without gradient
    queue              float [K, D], the negatives, without gradient
    temperature        float > 0
    covariance_weight  float >= 0: c below; 0 with M = 1 is MoCo's InfoNCE
    Returns a scalar, the mean over the N images. It is the loss of JCL (arXiv 2009.14776). [paper]

    InfoNCE asks which of 1 + K keys is of the query's own image. It is a cross-entropy,
        -log( e^(q.k/t) / (e^(q.k/t) + sum_j e^(q.n_j/t)) ),
    and its value hangs on the one view of which k happens to be the key. Better would be its mean
    over all views that the image could have had. Let their keys be Gaussian, with mean mu and
    covariance S:
      - the mean of -q.k/t is -q.mu/t;
      - the mean of log(e^(q.k/t) + ...) is at most log(mean of e^(q.k/t) + ...), because log is
        concave (Jensen's inequality);
      - the mean of e^(q.k/t) is e^(q.mu/t + q'Sq/(2 t^2)), a Gaussian's moment-generating function.
    So the mean over infinitely many keys is at most, with c = 1,
        L = log( e^(q.mu/t + c q'Sq/(2 t^2)) + sum_j e^(q.n_j/t) ) - q.mu/t.

    A larger c gives a looser bound, a smaller one is not sure to be a bound. Nor is any quite sure
    to be: unit vectors are Gaussian only nearly, and mu and S are estimated, from M keys. What the
    covariance term does: q'Sq is large where the keys of an image still disagree in the direction
    of its query. The keys have no gradient, so it turns the query towards directions in which they
    agree.

    How it is computed: S is the mean over the M keys of (k - mu)(k - mu)', so q'Sq is the mean of
    (q.k - q.mu)^2, which is nothing but the variance of the M numbers q.k. The N x M similarities
    are enough, and no D x D matrix is ever formed.
    """
    positives = torch.einsum("nd,nmd->nm", query, keys) / temperature
    mean, variance = positives.mean(1), positives.var(1, unbiased=False)
    positive = mean + covariance_weight / 2 * variance
    negatives = query @ queue.T / temperature
    logits = torch.cat([positive[:, None], negatives], 1)
    return (logits.logsumexp(1) - mean).mean()


# ==================================================================================================
# 5. Stage 1: pretrain
# ==================================================================================================

# What stage 1 asks of the student: look at one view of an image, and pick its teacher's answer to
# other views of that image out of K earlier answers, nearly all to other images. Nothing but the
# images is needed.
#
# The negatives. To tell one's own key from a handful of others is easy and teaches little; it takes
# many more than fit in a batch: 65,536 for X-rays, 512 for the digits. So the teacher's answers to
# the last K images are kept, in a queue, and used again: a slow teacher would hardly answer
# otherwise now. A fast one would, and the student could tell the old answers by their age; hence a
# momentum near 1.
#
# What BatchNorm could leak. It normalises an image with the statistics of its batch, so that an
# embedding carries a trace of its neighbours. Where a query and its keys are computed among the
# same few neighbours, the trace tells them and nothing need be learnt from the image. With several
# processes the keys are therefore computed among other neighbours (orders_of_processes). On one
# device nothing is done about it: a batch has the same statistics in any order, and the trace does
# tell a key, of this batch, from the queue's, of earlier ones. The larger the batch, the weaker is
# the trace, as the statistics of many images are nearly the same from batch to batch.


def pretrain(data, args):
    """Pre-train student and teacher on all training images, without labels.

    data  Data
    args  from parse_args(["pretrain", ...])
    Returns (student, teacher). Leaves pretrain.pt, log.jsonl and views.png in the output folder.
    Raises UserError when args and data do not fit together.
    """
    device = choose_device(args.device)
    check_fit(data, args)
    seed_everything(args.seed, "pretrain")
    imagenet = args.init == "imagenet"
    student = build_network(args.arch, data.images.shape[1], args.dim, "mlp", imagenet).to(device)
    teacher = make_teacher(student)

    # Random directions fill the queue until real keys have come. [authors' code] It is never longer
    # than the training set: at that length about half the images meet an older answer to themselves
    # among the negatives, and a longer queue would make it most of them. [our choice]
    length = min(args.queue, len(data.train))
    if length < args.queue:
        print(f"queue cut from {args.queue} to {length}, the number of training images")
    queue = F.normalize(torch.randn(length, args.dim), dim=1).to(device)

    optimizer = torch.optim.SGD(student.parameters(), args.lr, momentum=0.9,
                                weight_decay=args.weight_decay, fused=device.type != "mps")
    state = dict(student=student, teacher=teacher, optimizer=optimizer, queue=queue)
    progress = resume(data, args, state)
    save_views(data, args)
    steps, embed = len(data.train) // args.batch, in_parallel(student)

    def one_epoch(epoch):
        # The spread of an image's keys means little while the network is untrained, so the weight
        # of the covariance grows: c = lambda (epoch + 1) / epochs, past the bound's own c = 1 half
        # way if lambda is 2. [authors' code]
        covariance_weight = args.covariance_weight * (epoch + 1) / args.epochs
        order = shuffled(data.train, steps * args.batch).view(steps, args.batch)
        orders, places = orders_of_processes(order, args, epoch)
        for step, batch in enumerate(read_ahead(data, device, *orders)):
            # With several processes, this one's keys are of other images than its queries.
            images, key_images = batch[0], batch[-1]
            copies = torch.cat([images, key_images.repeat_interleave(args.keys, 0)])
            views = random_views(copies, args.augment, args.size)
            query_views, key_views = views.tensor_split([len(images)])
            with mixed_precision(device, args.amp):
                query = F.normalize(embed(query_views).float(), dim=1)
                with torch.no_grad():
                    # All keys in one pass, then [N * M, D] -> [N, M, D].
                    keys = F.normalize(teacher(key_views).float(), dim=1)
                    keys = in_order(keys.unflatten(0, (-1, args.keys)), places, step)
            loss = joint_contrastive_loss(query, my_part(keys, 0), queue, args.temperature,
                                          covariance_weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema_update(teacher, student, args.teacher_momentum)
            enqueue(queue, keys.mean(1), (epoch * steps + step) * args.batch)
            yield loss

    run_stage(data, args, state, progress, one_epoch, steps, args.batch)
    return student, teacher


def enqueue(queue, means, first):
    """Write means [N, D] into queue [K, D], in place, as number first, first + 1 and so on.

    First in, first out: they take the place of the oldest, round and round, whatever N and K. The
    mean of several unit vectors is shorter than 1 and stays so. [authors' code]
    """
    places = torch.arange(first, first + len(means), device=queue.device) % len(queue)
    # A batch longer than the queue leaves its last ones.
    queue[places[-len(queue):]] = means[-len(queue):]


# ==================================================================================================
# 6. Stage 2: finetune
# ==================================================================================================

# A few labels say what the classes are; all other images show where an answer must not change.
# The student learns from the labels, and beside that to answer like the teacher on unlabelled
# images. It sees another view than the teacher, so to agree it must overlook what the views change.
# The teacher is the better judge because it averages the student over many steps, each of which
# erred in another direction; for the same reason the teacher is the network that is tested.
#
# An epoch shows each unlabelled image about once. The labelled ones are few and come round many
# times. Without unlabelled images the steps are as many, so that runs can be compared. [our choice]


def finetune(data, args):
    """Fine-tune student and teacher with a few labels and all unlabelled images, then test both.

    data  Data
    args  from parse_args(["finetune", ...])
    Returns the metrics as in metrics.json. Leaves finetune.pt, log.jsonl, labelled.txt,
    metrics.json and predictions.csv in the output folder.
    Raises UserError when args and data do not fit together.
    """
    device = choose_device(args.device)
    labelled = check_fit(data, args)
    unlabelled = np.setdiff1d(data.train, labelled)
    seed_everything(args.seed, "finetune")
    student, teacher = (network.to(device) for network in starting_networks(data, args))
    make_optimizer = dict(adam=torch.optim.Adam, adamw=torch.optim.AdamW)[args.optimizer]
    optimizer = make_optimizer(student.parameters(), args.lr, betas=(0.9, 0.99), eps=args.eps,
                               fused=device.type != "mps")
    state = dict(student=student, teacher=teacher, optimizer=optimizer)
    progress = resume(data, args, state, labelled)
    write_text(output_folder(data, args) / "labelled.txt",
               "".join(f"{data.names[index]}\n" for index in labelled))
    print(f"{len(labelled)} labelled and {len(unlabelled)} unlabelled training images")

    steps = math.ceil(max(len(labelled), len(unlabelled)) / args.batch)
    consistent = args.consistency > 0 and len(unlabelled) > 0

    def one_epoch(epoch):
        # While the teacher's classifier knows nothing w is 0, then it grows, in the last epoch to
        # (epochs - 1) / epochs of its full value; in a single epoch it stays 0. [authors' code]
        weight = args.consistency * epoch / args.epochs
        orders = [shuffled(indices, steps * args.batch).view(steps, args.batch)
                  for indices in ([labelled, unlabelled] if consistent else [labelled])]
        targets = torch.from_numpy(data.targets[orders[0].numpy()]).to(device)
        for step, (images, *others) in enumerate(read_ahead(data, device, *orders)):
            views = random_views(images, args.augment, args.size)
            if consistent:
                # Two views of an unlabelled image, one for each network. [our choice] The authors'
                # code shows both the same pixels. Labelled and unlabelled go through the student
                # together, so that BatchNorm sees both kinds.
                teacher_views = random_views(*others, args.augment, args.size)
                views = torch.cat([views, random_views(*others, args.augment, args.size)])
            with mixed_precision(device, args.amp):
                logits = student(views).float()
            loss = supervised_loss(logits[:len(images)], targets[step], data.multilabel)
            if consistent:
                with mixed_precision(device, args.amp), torch.no_grad():
                    teacher_logits = teacher(teacher_views).float()
                loss = loss + weight * consistency_loss(
                    logits[len(images):], teacher_logits, data.multilabel)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            # A long memory would keep the untrained classifier for hundreds of steps. So begin with
            # the plain mean of the first teacher and the n students since. [our choice]
            done = epoch * steps + step + 1
            ema_update(teacher, student, min(1 - 1 / (done + 1), args.teacher_momentum))
            yield loss

    run_stage(data, args, state, progress, one_epoch, steps, args.batch * (2 if consistent else 1))
    return report(student, teacher, data, args)


def supervised_loss(logits, targets, multilabel):
    """Cross-entropy of logits [N, C] with targets [N, C] of 0 and 1; a scalar. [paper]

    Multi-label: each class is a yes or no of its own, so binary cross-entropy, averaged over
    classes and images. Multi-class: one of C, so softmax cross-entropy, averaged over images.
    """
    if multilabel:
        return F.binary_cross_entropy_with_logits(logits, targets)
    return F.cross_entropy(logits, targets)


def consistency_loss(student_logits, teacher_logits, multilabel):
    """Mean squared difference of student's and teacher's probabilities, from logits [N, C]. [paper]

    It takes no label to know that two views of an image deserve one answer. The teacher's serves as
    target, being the steadier. Probabilities are compared, not logits: whether a "no" is firm or
    very firm should hardly matter.
    """
    return F.mse_loss(probabilities(student_logits, multilabel),
                      probabilities(teacher_logits, multilabel))


def probabilities(logits, multilabel):
    """Sigmoid (multi-label) or softmax (multi-class) of logits [N, C]."""
    return logits.sigmoid() if multilabel else logits.softmax(1)


def starting_networks(data, args):
    """Student and teacher at the start of stage 2: stage 1's, with one and the same new classifier.

    args.start is the path of a pretrain.pt, "scratch" or "imagenet". Returns two nn.Modules.
    Raises UserError unless the checkpoint has all weights but the classifier's, and no other.
    """
    channels, imagenet = data.images.shape[1], args.start == "imagenet"
    student = build_network(args.arch, channels, len(data.classes), imagenet=imagenet)
    teacher = make_teacher(student)
    if args.start in ("scratch", "imagenet"):
        return student, teacher
    state = load_checkpoint(args.start, "pretrain")["state"]
    for network, name in ((student, "student"), (teacher, "teacher")):
        features = {key: value for key, value in state[name].items() if "classifier." not in key}
        # strict=False alone would be content with a checkpoint of which not one weight fits.
        try:
            missing, unexpected = network.load_state_dict(features, strict=False)
        except RuntimeError as error:
            missing, unexpected = [], [str(error).splitlines()[-1].strip()]
        if missing != ["classifier.weight", "classifier.bias"] or unexpected:
            raise UserError(f"{args.start} does not fit a {args.arch} with {channels} channel(s): "
                            f"{(unexpected + missing)[0]}; leave out --arch and --data")
    return student, teacher


# ==================================================================================================
# 7. Evaluation, and what each ingredient is worth
# ==================================================================================================


@torch.no_grad()
def evaluate(network, data, indices, size, batch=64):
    """Probabilities of all classes for some images, each image once and in the order given.

    network  from build_network, on any device    size   int, pixels
    indices  int64 [n], rows of data.images       batch  int, images at a time
    Returns float32 [n, C]. Computed in float32: bfloat16 has so few digits that images would tie.
    """
    device, scores, was_training = next(network.parameters()).device, [], network.training
    network.eval()
    with tqdm(total=len(indices), desc="test", unit="image", mininterval=0.5, leave=False) as bar:
        for images, in read_ahead(data, device, torch.from_numpy(indices).split(batch)):
            logits = network(random_views(images, PLAIN, size))
            scores.append(probabilities(logits, data.multilabel))
            bar.update(len(images))
    network.train(was_training)
    return torch.cat(scores).cpu().numpy()


def classification_metrics(targets, scores, classes, multilabel):
    """How well scores [n, C] agree with targets [n, C] of 0 and 1. Returns a dict, all from 0 to 1.

    auc       {class: area under the ROC curve, or None where all targets are 1 or all are 0,
              since there is then nothing to rank}
    mean_auc  mean over the classes that have one; None if none has
    Multi-class, where a class is ranked against all others, also: accuracy, macro_sensitivity,
    macro_specificity, macro_f1. "Macro" is the plain mean over the classes that occur in targets.
    """
    auc = {}
    for name, truth, score in zip(classes, targets.T, scores.T, strict=True):
        both = 0 < truth.sum() < len(truth)
        auc[name] = float(metrics.roc_auc_score(truth, score)) if both else None
    known = [value for value in auc.values() if value is not None]
    result = dict(mean_auc=float(np.mean(known)) if known else None, auc=auc)
    if not multilabel:
        truth, answer = targets.argmax(1), scores.argmax(1)
        present = np.unique(truth)
        # A class's specificity is the sensitivity for "not this class".
        specificity = [np.mean(answer[truth != one] != one) for one in present if len(present) > 1]
        macro = dict(labels=present, average="macro", zero_division=0)
        result |= dict(
            accuracy=float(metrics.accuracy_score(truth, answer)),
            macro_sensitivity=float(metrics.recall_score(truth, answer, **macro)),
            macro_specificity=float(np.mean(specificity)) if specificity else None,
            macro_f1=float(metrics.f1_score(truth, answer, **macro)))
    return result


def report(student, teacher, data, args):
    """Test both networks on the whole test split; print the table, best class first.

    Leaves metrics.json and predictions.csv in the output folder.

    The result is the teacher's after the last epoch. Nothing here chooses by the test images, no
    epoch and no network; the settings that are the authors' may have been chosen so.
    Returns the dict in metrics.json: classification_metrics, and the student's under "student".
    """
    targets, batch = data.targets[data.test], max(args.batch, 64)
    scores = [evaluate(network, data, data.test, args.size, batch)
              for network in (teacher, student)]
    if not np.isfinite(scores).all():
        raise UserError("the networks' answers are not finite, training has diverged; start over "
                        "with --fresh and a smaller --lr")
    result, students = (classification_metrics(targets, each, data.classes, data.multilabel)
                        for each in scores)
    auc, order = result["auc"], sorted(data.classes, key=lambda name: -(result["auc"][name] or 0))
    positives = dict(zip(data.classes, targets.sum(0).astype(int), strict=True))
    rows = [(name, positives[name], auc[name], students["auc"][name]) for name in order]
    rows += [(name, "", result[name], students[name]) for name in result if name != "auc"]
    print(f"{f'AUC on {len(targets)} test images':24} positive  teacher  student")
    for name, count, *values in rows:
        shown = ("n/a" if value is None else f"{value:.4f}" for value in values)
        print(f"{name:26} {count:>6}", *(f"{value:>8}" for value in shown))
    unknown = [name for name in order if auc[name] is None]
    if unknown:
        print("n/a, and not in the mean, because the test split has no positive or no negative: "
              + ", ".join(unknown))

    result |= dict(split="validation" if args.validation else "test", student=students)
    out = output_folder(data, args)
    write_text(out / "metrics.json", json.dumps(result, indent=1) + "\n")
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows(
        [["image", *data.classes]] + [[data.names[index], *map("{:.6f}".format, row)]
                                      for index, row in zip(data.test, scores[0], strict=True)])
    write_text(out / "predictions.csv", table.getvalue())
    print(f"written to {out}: metrics.json, predictions.csv")
    return result


# What is each ingredient worth? Leave it out. Ways to begin and to go on, each with the switches
# that make it of the whole method, and the pairs of them that are compared. Where stage 1 begins
# with ImageNet's weights and "scratch" does not, --init random compares like with like.
BEGIN = dict(moco="--keys 1 --covariance-weight 0", jcl="")
GO_ON = {"supervised": "--consistency 0", "mean teacher": ""}
ABLATION = ("scratch + supervised", "scratch + mean teacher", "moco + mean teacher",
            "jcl + supervised", "jcl + mean teacher")


def ablate(args):
    """Run the five rows of ABLATION, each with seeds 0 to args.seeds - 1, and print a table.

    args  from parse_args(["ablate", ...])
    In every row a seed has the same labels. Each run is a command of its own, shown so that it can
    be typed, with a folder of its own in args.out; those that have finished are only tested again.
    Returns the dict in ablation.json, {row: {metric: [of each seed]}}. The metrics are the averaged
    teacher's in every row, also where it sets no targets.
    """
    def folder(name, seed):
        return Path(args.out) / f"{name.replace(' + ', '-').replace(' ', '-')}-{seed}"

    def run(stage, name, seed, switches):
        words = [stage, *switches, *args.switches[stage], "--seed", str(seed),
                 "--out", str(folder(name, seed))]
        print("\n+ python s2mts2.py", shlex.join(words))
        return run_command(parse_args(words))

    make_folder(args.out)
    file = Path(args.out) / "ablation.json"
    table = {row: dict(mean_auc=[], accuracy=[]) for row in ABLATION}
    if args.fresh:
        # All old runs at once, or one that is interrupted would later go on with some of them; but
        # not before the images are seen to be there.
        load_for(parse_args(["pretrain", *args.switches["pretrain"], "--fresh"]))
        for old in [path for name in (*BEGIN, *ABLATION)
                    for path in Path(args.out).glob(f"{folder(name, '*').name}/*.pt")]:
            old.unlink(missing_ok=True)
    if args.fresh or not file.exists():
        write_text(file, json.dumps(table, indent=1) + "\n")
    for seed in range(args.seeds):
        for begin in ("moco", "jcl"):
            run("pretrain", begin, seed, BEGIN[begin].split())
        for row, columns in table.items():
            begin, go_on = row.split(" + ")
            start = begin if begin == "scratch" else f"{folder(begin, seed)}/pretrain.pt"
            result = run("finetune", row, seed, ["--from", start, *GO_ON[go_on].split()])
            for name, values in columns.items():
                values.append(result.get(name))
        write_text(file, json.dumps(table, indent=1) + "\n")

    print(f"\nteacher, mean and standard deviation over {args.seeds} seeds, from 0 on")
    print(f"{'':24}mean AUC         accuracy")
    for row, columns in table.items():
        spread = ("n/a" if None in seeds else f"{np.mean(seeds):.4f} +- {np.std(seeds, ddof=1):.4f}"
                  for seeds in columns.values())
        print(f"{row:24}" + "  ".join(spread))
    return table


# ==================================================================================================
# What follows finds files, keeps settings and talks to the user. A first reader can stop here.
# ==================================================================================================

# ==================================================================================================
# 8. The other data sets [plumbing]
# ==================================================================================================

# What a load_* function of a folder of images returns: files {name: path}, and in their order the
# part of the split of each ("train", "test" or "validation") and the targets [files, classes]; then
# what all images have in common. from_folder makes a Data of it.

CXR14_CLASSES = (
    "Atelectasis Cardiomegaly Effusion Infiltration Mass Nodule Pneumonia Pneumothorax "
    "Consolidation Edema Emphysema Fibrosis Pleural_Thickening Hernia").split()
CXR14_HELP = ("--root must name a folder with Data_Entry_2017.csv (or Data_Entry_2017_v2020.csv), "
              "train_val_list.txt, test_list.txt and images/*.png, images_001/images/*.png ... or "
              "data/*.png; all of them come from https://nihcc.app.box.com/v/ChestXray-NIHCC")


def load_cxr14(root):
    """NIH Chest X-ray14: 14 findings, the official lists of training and test images."""
    table = first_that_exists(CXR14_HELP, root / "Data_Entry_2017_v2020.csv",
                              root / "Data_Entry_2017.csv")
    train, test = (read_lines(first_that_exists(CXR14_HELP, root / name))
                   for name in ("train_val_list.txt", "test_list.txt"))
    folders = [root / "images", root / "data", *sorted(root.glob("images_*/images"))]
    first_that_exists(CXR14_HELP, *folders)

    # Columns by number, not by name: two names in the header hold commas without quotes.
    findings = {row[0]: row[1] for row in read_table(table, lambda row: len(row) > 1)}
    # The few hundred combinations that occur are taken apart once each.
    combinations = {text: number for number, text in enumerate(dict.fromkeys(findings.values()))}
    targets = np.array([[finding in text.split("|") for finding in CXR14_CLASSES]
                        for text in combinations])
    for text in combinations:
        unknown = set(text.split("|")) - set(CXR14_CLASSES)
        if unknown and text != "No Finding":
            image = next(name for name in findings if findings[name] == text)
            raise UserError(f"{table}: unknown label {min(unknown)!r} of image {image}; known are, "
                            f"beside No Finding alone, {', '.join(CXR14_CLASSES)}")

    # Folders as texts, not Paths: to make 112,120 of those would take a second.
    folder_of, files = {}, {}
    for folder in filter(os.path.isdir, map(str, folders)):
        folder_of |= dict.fromkeys(os.listdir(folder), folder)
    for name in train + test:
        if name in files:
            raise UserError(f"image {name} is twice in train_val_list.txt and test_list.txt; once "
                            "is allowed")
        if name not in findings:
            raise UserError(f"image {name} is in a list, not in {table}; take files of one release")
        files[name] = f"{folder_of.get(name, folders[0])}/{name}"
    both = {name.split("_")[0] for name in train} & {name.split("_")[0] for name in test}
    if both:
        print(f"warning: {len(both)} patients are in both lists, such as {min(both)}; the test "
              "images are then not new to the networks")
    return dict(files=files, part=["train"] * len(train) + ["test"] * len(test),
                targets=targets[[combinations[findings[name]] for name in files]],
                classes=CXR14_CLASSES, channels=1, multilabel=True)


CHEXPERT_CLASSES = (
    "No Finding,Enlarged Cardiomediastinum,Cardiomegaly,Lung Opacity,Lung Lesion,Edema,"
    "Consolidation,Pneumonia,Atelectasis,Pneumothorax,Pleural Effusion,Pleural Other,Fracture,"
    "Support Devices").split(",")
CHEXPERT_HELP = ("--root must name CheXpert-v1.0-small or CheXpert-v1.0, or the folder that holds "
                 "it, with train.csv and train/patient*/study*/view*.jpg; they come from "
                 "https://stanfordmlgroup.github.io/competitions/chexpert")


def load_chexpert(root, uncertain):
    """CheXpert: 14 observations. All images of train.csv, frontal or lateral, split by patient.

    Of the patients 70 % train, 20 % test; 10 % are for whoever looks for better settings, with
    validation. There is no public list of test images, and the 234 of valid.csv are too few for
    most findings.
    """
    table = first_that_exists(CHEXPERT_HELP, *(
        root / folder / "train.csv" for folder in (".", "CheXpert-v1.0-small", "CheXpert-v1.0")))
    # A blank is a finding that the report does not mention, -1 one that it leaves open.
    number = {"": 0, "0.0": 0, "1.0": 1, "-1.0": uncertain == "ones"}
    header = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT_CLASSES]

    def name_of(row):
        # The path begins with the archive's name, whatever the folder is called now.
        return row[0].partition("/")[2]

    rows = read_table(table, lambda row: len(row) == len(header) and name_of(row).count("/") == 3
                      and number.keys() >= set(row[5:]), header, name_of)
    targets = {name_of(row): [number[value] for value in row[5:]] for row in rows}
    patients = [name.split("/")[1] for name in targets]
    part = dict.fromkeys(patients, "train") | dict.fromkeys(share_of(patients, 0, 0.2), "test")
    part |= dict.fromkeys(share_of(patients, 0.2, 0.3), "validation")
    return dict(files={name: f"{table.parent}/{name}" for name in targets},
                part=[part[patient] for patient in patients], targets=list(targets.values()),
                classes=CHEXPERT_CLASSES, channels=1, multilabel=True)


ISIC_CLASSES = "MEL NV BCC AKIEC BKL DF VASC".split()
ISIC_HELP = ("--root must name a folder with ISIC2018_Task3_Training_GroundTruth/"
             "ISIC2018_Task3_Training_GroundTruth.csv, ISIC2018_Task3_Training_Input/*.jpg and, if "
             "there, ISIC2018_Task3_Training_LesionGroupings.csv; they come from "
             "https://challenge.isic-archive.com/data/#2018")


def load_isic2018(root):
    """ISIC2018 task 3: photographs of skin lesions in 7 classes, one each.

    Of each class 80 % train and 20 % test. Where the file of lesion groupings is there, the images
    of a lesion stay together: else the network is tested on lesions that it knows.
    """
    prefix = "ISIC2018_Task3_Training_"
    table = first_that_exists(ISIC_HELP, root / f"{prefix}GroundTruth" / f"{prefix}GroundTruth.csv",
                              root / f"{prefix}GroundTruth.csv")
    rows = read_table(table, lambda row: sorted(row[1:]) == ["0.0"] * 6 + ["1.0"],
                      ["image", *ISIC_CLASSES])
    column = {row[0]: row.index("1.0") - 1 for row in rows}
    groupings = [file for folder in (root, table.parent)
                 if (file := folder / f"{prefix}LesionGroupings.csv").exists()]
    lesion = {name: name for name in column}
    if groupings:
        lesion |= {row[0]: row[1] for row in read_table(groupings[0], lambda row: len(row) > 1)}
    else:
        print(f"no {prefix}LesionGroupings.csv: images of one lesion may be in train and test")
    tested = set()
    for each in range(len(ISIC_CLASSES)):
        tested |= share_of((lesion[name] for name in column if column[name] == each), 0, 0.2)
    return dict(files={name: f"{root}/{prefix}Input/{name}.jpg" for name in column},
                part=["test" if lesion[name] in tested else "train" for name in column],
                targets=np.eye(len(ISIC_CLASSES))[list(column.values())], classes=ISIC_CLASSES,
                channels=3, multilabel=False)


# MedMNIST (arXiv 2110.14795): for each set the classes, the images of its three splits, and for
# each size in pixels the MD5 checksum of its file.
MEDMNIST_URL = "https://zenodo.org/records/10519652/files/"
MEDMNIST = dict(
    chestmnist=(CXR14_CLASSES, dict(train=78468, val=11219, test=22433), {
        28: "02c8a6516a18b556561a56cbdd36c4a8", 64: "9de6cd0b934ebb5b7426cfba5efbae16",
        128: "db107e5590b27930b62dbaf558aebee3", 224: "45bd33e6f06c3e8cdb481c74a89152aa"}),
    dermamnist=("akiec bcc bkl df mel nv vasc".split(), dict(train=7007, val=1003, test=2005), {
        28: "0744692d530f8e62ec473284d019b0c7", 64: "b70a2f5635c6199aeaa28c31d7202e1f",
        128: "2defd784463fa5243564e855ed717de1", 224: "8974907d8e169bef5f5b96bc506ae45d"}))


def load_medmnist(name, root, size, cache):
    """ChestMNIST and DermaMNIST: images of Chest X-ray14 and ISIC2018, one file for each size.

    The smallest file with images of at least size pixels is taken, and downloaded on first use. Its
    train and val rows train, its test rows test: not the splits of the original sets.
    """
    classes, rows, checksums = MEDMNIST[name]
    side = next((side for side in checksums if side >= size), max(checksums))
    file = root / (f"{name}.npz" if side == 28 else f"{name}_{side}.npz")
    if not file.exists():
        download(f"{MEDMNIST_URL}{file.name}?download=1", file, checksums[side])
    found = torchvision.datasets.utils.calculate_md5(file)
    if found != checksums[side]:
        raise UserError(f"{file} is not the published file (MD5 {found}, not {checksums[side]}); "
                        "move it away and the same command downloads it")
    with np.load(file) as archive:
        labels = [archive[f"{split}_labels"] for split in rows]
        if [len(part) for part in labels] != list(rows.values()):
            raise UserError(f"{file} does not have {' + '.join(map(str, rows.values()))} rows")
        labels, multilabel = np.concatenate(labels), name == "chestmnist"
        # To unpack the images takes a while, so it is done once.
        unpacked = Path(cache or root) / f"{file.stem}-{found[:16]}.npy"
        if not unpacked.exists():
            make_folder(unpacked.parent)
            channels = 1 if multilabel else 3
            write_file(unpacked, lambda part: unpack_images(archive, rows, channels, side, part))
    names = [f"{split}{index:05d}" for split in rows for index in range(rows[split])]
    targets = labels if multilabel else np.eye(len(classes))[labels[:, 0]]
    train, test = np.split(np.arange(len(labels)), [rows["train"] + rows["val"]])
    return Data(name, open_images(unpacked), targets, classes, names, train, test, multilabel)


def unpack_images(archive, rows, channels, side, path):
    """Write the images of a MedMNIST file, [n, H, W] or [n, H, W, 3], to a .npy [N, C, H, W].

    rows  {split: its number of images}    side  int, height and width
    """
    images, start = new_images(path, (sum(rows.values()), channels, side, side)), 0
    for split, count in rows.items():
        block = archive[f"{split}_images"].reshape(count, side, side, channels)
        images[start:start + count] = block.transpose(0, 3, 1, 2)
        start += count
    images.flush()


def download(url, file, checksum):
    """Download url to file, with a bar. Until it is whole and checked it has another name."""
    part = file.with_name(file.name + ".part")
    make_folder(file.parent)
    try:
        torchvision.datasets.utils.download_url(url, file.parent, part.name, checksum)
        os.replace(part, file)
    except Exception as error:
        # A network fails in many ways.
        raise UserError(f"cannot download {url} ({error}); "
                        f"download it by hand and put it at {file}") from None
    finally:
        part.unlink(missing_ok=True)


def from_folder(name, found, size, cache, partial, validation, check):
    """The Data of a folder of images: found by a load_* function, the rest as for load_data."""
    files, part, targets = found["files"], np.array(found["part"]), np.array(found["targets"])
    if partial:
        there = np.array([os.path.exists(path) for path in files.values()], bool)
        print(f"--partial: {there.sum():,} of {len(there):,} images are there")
        if not there.any():
            raise UserError("there is no image to decode; download at least one archive of them")
        files = dict(pair for pair, exists in zip(files.items(), there, strict=True) if exists)
        part, targets = part[there], targets[there]
    # Zeros that take no memory.
    black = np.broadcast_to(np.uint8(0), (len(files), found["channels"], size, size))
    train = np.flatnonzero(part == "train")
    test = np.flatnonzero(part == ("validation" if validation else "test"))
    data = Data(name, black, targets, found["classes"], list(files), train, test,
                found["multilabel"])
    if check:
        check(data)
    data.images = decode_images(files, size, found["channels"], cache)
    return data


def first_that_exists(help, *paths):
    """The first of the paths that exists. UserError with help if none does."""
    for path in paths:
        # os.path takes a folder that may not be entered for one that is not there.
        if os.path.exists(path):
            return path
    raise UserError(f"there is no {paths[0]}: {help}")


def read_table(path, good, header=None, key=lambda row: row[0]):
    """Yield the rows of a CSV file, lists of texts, but its header, which is checked if given.

    UserError, while the rows are taken, for one that is not good(row) or has the key of another.
    """
    lines, seen = read_lines(path), set()
    try:
        if header and header not in csv.reader(lines[:1]):
            raise UserError(f"{path} does not have the columns {', '.join(header)}; get it again")
        for row in csv.reader(lines[1:]):
            name = key(row)
            if name in seen or not good(row):
                raise UserError(f"{path}: bad or repeated line {','.join(row)!r:.80}; get it again")
            seen.add(name)
            yield row
    except csv.Error as error:
        raise UserError(f"{path}: not a table ({error}); get it again") from None


def share_of(groups, low, high):
    """Some of the groups (texts): those from low to high, shares of 1, in a random order.

    The order is by a hash, so that it is the same on every machine, for good.
    """
    order = sorted(set(groups), key=fingerprint)
    return set(order[round(low * len(order)):round(high * len(order))])


# Images that are decoded between two notes of how far it has got, and by a thread at a time.
DECODE_BLOCK, THREAD_BLOCK = 2048, 32


def decode_images(files, size, channels, cache):
    """Decode and resize a folder of images, once: the result is kept and opened at once ever after.

    files  {name: path}, texts    size  int, pixels    channels  1 (grey, whatever is there) or 3
    cache  folder for the result, a .npy named by its size and a hash of names and channels
    Returns uint8 [files, channels, size, size], memory-mapped.
    Raises UserError that names a missing or broken image.

    Until it is whole the result is called .part, beside a .count of the images that are surely in
    it: an interrupted call goes on from there. The sizes of the files are in the name too, so that
    another release of the images is not taken for this one.
    """
    paths = list(files.values())
    sizes, missing = [], []
    for path in paths:
        try:
            sizes.append(os.path.getsize(path))
        except OSError:
            missing.append(path)
    if missing:
        raise UserError(f"{len(missing):,} of {len(paths):,} images are missing: "
                        f"{', '.join(missing[:3])}{' ...' * (len(missing) > 3)}; download the "
                        "archives that hold them, or use those that are there with --partial")
    found = fingerprint(str(channels), "\0".join(files), np.array(sizes))
    whole = Path(cache) / f"{size}px-{found}.npy"
    if not whole.exists():
        if RANK > 0:
            raise UserError(f"{whole} is not there for process {RANK}: all machines must share the "
                            "folders --root (or --cache) and --out")
        make_folder(whole.parent)
        try:
            with alone(whole):
                decode_all(paths, size, channels, whole)
        except OSError as error:
            raise UserError(f"cannot keep decoded images in {cache} ({error.strerror}); make room "
                            "or name another folder with --cache") from None
    return open_images(whole)


def decode_all(paths, size, channels, whole):
    """Write the images of paths to the .npy called whole, going on with its .part if there."""
    part, count = whole.with_suffix(".part"), whole.with_suffix(".count")
    mode = torchvision.io.ImageReadMode.GRAY if channels == 1 else torchvision.io.ImageReadMode.RGB

    def decode(first, stop):
        for index in range(first, min(first + THREAD_BLOCK, stop)):
            try:
                image = torchvision.io.decode_image(paths[index], mode)
                image = F.interpolate(image[None], (size, size), mode="bilinear", antialias=True)
                images[index] = image[0].numpy()
            except (RuntimeError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(f"broken image {paths[index]} ({reason}); get it again, as a PNG "
                                "or JPEG of 8 bits") from None
        return index + 1 - first

    try:
        done = int(count.read_text())
        images = np.lib.format.open_memmap(part, "r+")
    except (OSError, ValueError):
        # A count of older images must not vouch for the new ones.
        count.unlink(missing_ok=True)
        done, images = 0, new_images(part, (len(paths), channels, size, size))
    try:
        bar = tqdm(total=len(paths), initial=done, desc="decode", unit="image", mininterval=0.5)
        # torchvision decodes outside of Python's lock, so threads keep all cores busy.
        with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(done, len(paths), DECODE_BLOCK):
                stop = min(start + DECODE_BLOCK, len(paths))
                firsts = range(start, stop, THREAD_BLOCK)
                for decoded in pool.map(decode, firsts, [stop] * len(firsts)):
                    bar.update(decoded)
                images.flush()
                write_text(count, str(stop))
        count.unlink()
        os.replace(part, whole)
    finally:
        if not count.exists():
            part.unlink(missing_ok=True)


def new_images(path, shape):
    """A new .npy of uint8, memory-mapped. OSError if the disk has no room for the whole of it."""
    images = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    if hasattr(os, "posix_fallocate"):
        # Else a disk that fills up later would end the program without a word.
        with open(path, "rb+") as stream:
            os.posix_fallocate(stream.fileno(), 0, os.path.getsize(path))
    return images


def open_images(path):
    """The images of a .npy, memory-mapped. UserError if it is not whole."""
    try:
        return np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); delete it, it will be made anew") from None


def make_folder(folder):
    """Make a folder and those above it. UserError if that is not allowed."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder} ({error.strerror}); choose another with --out, or "
                        "with --cache for images") from None


def read_lines(path):
    """The lines of a text file that are not empty. UserError if it cannot be read."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a text file"
        raise UserError(f"cannot read {path}: {reason}") from None
    return [line.strip() for line in lines if line.strip()]


# ==================================================================================================
# 9. Recipes: what a data set brings along for every setting
# ==================================================================================================

# A row for each data set and stage; the command line overrides it. size in pixels, batch in images,
# queue in embeddings, temperature in units of cosine similarity, augment as explained at PLAIN.
# schedule: "cosine" takes lr to 0 over the epochs; "steps" takes it to a tenth at 1/2 and at 5/6 of
# them.

# [authors' code] What their recipes have in common, with the values for Chest X-ray14.
AUTHORS_PRETRAIN = dict(
    arch="densenet121", init="imagenet", size=256, epochs=100, batch=256,
    lr=0.03, weight_decay=1e-4, schedule="cosine", teacher_momentum=0.999,
    keys=2, queue=65536, dim=128, temperature=0.07, covariance_weight=2.0,
    augment=dict(PLAIN, crop=0.8, rotate=10.0, rotate_p=0.5, flip_p=0.5, jitter=0.4, hue=0.4,
                 jitter_p=0.8, blur=2.0, blur_p=0.5, erase_p=0.5))
AUTHORS_FINETUNE = dict(
    size=512, epochs=30, batch=16, labels=0.02,
    optimizer="adam", lr=0.05, eps=0.1, schedule="steps", teacher_momentum=0.999, consistency=1.0,
    augment=dict(PLAIN, crop=0.8, rotate=5.0, rotate_p=1.0, flip_p=0.5))

# [our choice] For the digits: tuned with a fifth of the training images held out to test on, and
# with seeds from 100 on. See README. Why a consistency of 200: a mean squared difference of
# probabilities is a small number beside a cross-entropy, at most 2 / 10 for ten classes, and far
# less where the networks nearly agree. At a weight of 1, the authors', it would hardly count.
DIGITS_PRETRAIN = dict(
    arch="tiny", init="random", size=32, epochs=40, batch=64,
    lr=0.06, weight_decay=1e-4, schedule="cosine", teacher_momentum=0.99,
    keys=2, queue=512, dim=128, temperature=0.4, covariance_weight=2.0,
    augment=dict(PLAIN, crop=0.7, rotate=25.0, rotate_p=1.0, jitter=0.4, jitter_p=0.8))
DIGITS_FINETUNE = dict(
    size=32, epochs=14, batch=32, labels=0.02,
    optimizer="adam", lr=0.05, eps=0.1, schedule="cosine", teacher_momentum=0.97, consistency=200.0,
    augment=dict(PLAIN, crop=0.2, rotate=10.0, rotate_p=1.0, jitter=0.4, jitter_p=0.8))

# [our choice] For the small files of MedMNIST: as for the digits, but with JCL's temperature,
# flips, and a slower teacher, as there are more steps. Not tuned.
SMALL_PRETRAIN = dict(DIGITS_PRETRAIN, size=28, batch=128, temperature=0.2, teacher_momentum=0.996,
                      augment=dict(DIGITS_PRETRAIN["augment"], flip_p=0.5, rotate=10.0))
SMALL_FINETUNE = dict(DIGITS_FINETUNE, size=28, batch=64, consistency=10.0,
                      augment=dict(DIGITS_FINETUNE["augment"], flip_p=0.5))

RECIPES = dict(
    digits=dict(pretrain=DIGITS_PRETRAIN, finetune=DIGITS_FINETUNE),
    cxr14=dict(pretrain=AUTHORS_PRETRAIN, finetune=AUTHORS_FINETUNE),
    # [authors' code]
    chexpert=dict(
        pretrain=dict(AUTHORS_PRETRAIN, size=224, keys=5,
                      augment=dict(AUTHORS_PRETRAIN["augment"], erase_p=0.0)),
        finetune=dict(AUTHORS_FINETUNE, size=224, batch=64, optimizer="adamw", schedule="cosine",
                      augment=dict(AUTHORS_FINETUNE["augment"], rotate=10.0, jitter=0.4, hue=0.4,
                                   jitter_p=0.8))),
    # [authors' code] but for the vertical flip: a lesion has no upper end. [our choice] The
    # photographs are 4:3, kept as squares; stage 1 takes their middle 3/4, of the right
    # proportions; stage 2 and the test see them whole.
    isic2018=dict(
        pretrain=dict(AUTHORS_PRETRAIN, size=224, keys=5,
                      augment=dict(AUTHORS_PRETRAIN["augment"], centre=0.25, crop=0.0, rotate_p=1.0,
                                   vertical_flip_p=0.5, erase_p=0.0)),
        finetune=dict(AUTHORS_FINETUNE, size=224, epochs=80, labels=0.2, schedule="cosine",
                      augment=dict(AUTHORS_FINETUNE["augment"], rotate=10.0,
                                   vertical_flip_p=0.5))),
    chestmnist=dict(
        pretrain=dict(SMALL_PRETRAIN, epochs=10, queue=16384),
        finetune=dict(SMALL_FINETUNE, epochs=3)),
    dermamnist=dict(
        pretrain=dict(SMALL_PRETRAIN, epochs=40, queue=4096,
                      augment=dict(SMALL_PRETRAIN["augment"], hue=0.1, vertical_flip_p=0.5)),
        finetune=dict(SMALL_FINETUNE, epochs=14, labels=0.2,
                      augment=dict(SMALL_FINETUNE["augment"], hue=0.1, vertical_flip_p=0.5))),
)


def recipe(data, stage):
    """The row of RECIPES for a data set by its name and a stage; that of digits for one by hand."""
    return copy.deepcopy(RECIPES.get(data, RECIPES["digits"])[stage])


def learning_rate(args, epoch):
    """Learning rate in an epoch, 0 <= epoch < args.epochs. [authors' code]"""
    progress = epoch / args.epochs
    if args.schedule == "cosine":
        return args.lr * (1 + math.cos(math.pi * progress)) / 2
    return args.lr * 0.1 ** ((progress >= 1 / 2) + (progress >= 5 / 6))


# ==================================================================================================
# 10. Training loop and checkpoints [plumbing]
# ==================================================================================================


def run_stage(data, args, state, progress, one_epoch, steps, images_per_step):
    """Run all epochs that are left; after each write a line on screen, a checkpoint and the log.

    state, progress  as for resume
    one_epoch(epoch) generator that makes the epoch's steps and yields the loss of each
    Raises UserError when the loss is not finite; the last checkpoint stays.
    """
    out, history = output_folder(data, args), progress["history"]
    write_log(out, args.stage, history)
    images = steps * images_per_step
    with tqdm(total=args.epochs * images, initial=len(history) * images, desc=args.stage,
              unit="image", unit_scale=True, mininterval=0.5, disable=RANK > 0) as bar:
        for epoch in range(len(history), args.epochs):
            seed_everything(args.seed, args.stage, epoch)
            lr = learning_rate(args, epoch)
            for group in state["optimizer"].param_groups:
                group["lr"] = lr
            start, losses = time.perf_counter(), []
            for loss in one_epoch(epoch):
                losses.append(loss.detach())
                # To read a loss makes a GPU wait, so only when the bar is drawn.
                if bar.update(images_per_step) or len(losses) == steps:
                    check_finite(losses, state["student"], epoch, lr)
                    bar.set_postfix_str(f"loss {losses[-1].item():.3f}", refresh=False)
            average_statistics(state["student"], state["teacher"])
            loss = mean_over_processes(torch.stack(losses).mean())
            seconds = time.perf_counter() - start
            bar.write(f"{args.stage} epoch {epoch + 1}/{args.epochs}: loss {loss:.4f}, "
                      f"learning rate {lr:.2g}, {images / seconds:.0f} images/s")
            history.append(dict(stage=args.stage, epoch=epoch, loss=loss, lr=lr, seconds=seconds,
                                images_per_second=images / seconds))
            tensors = {name: value if isinstance(value, torch.Tensor) else value.state_dict()
                       for name, value in state.items()}
            checkpoint = dict(progress, state=tensors)
            write_file(out / f"{args.stage}.pt", lambda file: torch.save(checkpoint, file))
            write_log(out, args.stage, history)


def check_fit(data, args):
    """Raise UserError for settings that do not fit the data or the checkpoint in the folder.

    Needs no images, so it is called before they are decoded, which may take long.
    Returns the indices of the labelled images; in stage 1 None.
    """
    if args.batch > len(data.train):
        raise UserError(f"--batch {args.batch} is more than the {len(data.train)} training images")
    labelled = None
    if args.stage == "finetune":
        labelled = choose_labelled(data, args.labels, args.seed)
    path = Path(args.out or f"runs/{data.name}") / f"{args.stage}.pt"
    if path.exists() and not args.fresh:
        theirs = load_checkpoint(path, args.stage)["settings"]
        refuse_difference(path, theirs, settings_of(data, args, labelled) | dict(
            images=theirs.get("images")))
    return labelled


def check_finite(losses, network, epoch, lr):
    """Raise UserError with the first step of an epoch whose loss, or weights, are not finite."""
    finite = torch.stack(losses).isfinite()
    if not (finite.all() and all(weight.isfinite().all() for weight in network.parameters())):
        step = int(finite.long().cumprod(0).sum().clamp(max=len(losses) - 1))
        raise UserError(f"the loss is {losses[step].item():g} in epoch {epoch + 1}, step "
                        f"{step + 1}, at a learning rate of {lr:g}, or a weight is not finite; try "
                        "a smaller --lr. The checkpoint is that of the last finished epoch")


def settings_of(data, args, labelled):
    """All that decides the result of a stage but the images' pixels: a dict of plain values."""
    settings = {name: value for name, value in vars(args).items()
                if name not in ("stage", "start", "root", "cache", "device", "out", "fresh")}
    if args.stage == "finetune":
        settings["from"] = args.start
        if args.start not in ("scratch", "imagenet"):
            start = load_checkpoint(args.start, "pretrain")["state"]
            settings["from"] = fingerprint(*start["student"].values(), *start["teacher"].values())
        settings["labelled"] = fingerprint(labelled)
    settings |= dict(data=data.name, test=fingerprint(data.test))
    # Plain numbers and texts, whatever a notebook gave: only such can be read again.
    return json.loads(json.dumps(settings, default=str))


def refuse_difference(path, theirs, ours):
    """Raise UserError, with the differences named, unless a checkpoint's settings are ours."""
    differ = [f"{name} {theirs.get(name)} there and {ours.get(name)} here"
              for name in sorted(theirs | ours) if theirs.get(name) != ours.get(name)]
    if differ:
        raise UserError(f"{path} is of other settings: {'; '.join(differ)}. "
                        "Use --fresh to start over or --out for another folder")


def resume(data, args, state, labelled=None):
    """Go on from the checkpoint in the output folder, if there is one and its settings are these.

    state  {name: module, optimizer or tensor}, filled in place
    Returns the rest of a checkpoint; its "history" has one dict for each finished epoch.
    Raises UserError if the settings differ.
    """
    settings = settings_of(data, args, labelled) | dict(images=fingerprint_of(data))
    augment = {name: value for name, value in args.augment.items() if value}
    shown = ", ".join(f"{name} {value}" for name, value in dict(settings, augment=augment).items())
    print(textwrap.fill(f"{args.stage}: {shown}", 100))

    progress = dict(format=FORMAT, stage=args.stage, settings=settings, history=[],
                    source={name: getattr(args, name) for name in SOURCE})
    path = output_folder(data, args) / f"{args.stage}.pt"
    if args.fresh and RANK == 0:
        # At once, or the same command without --fresh would go on with the old run.
        path.unlink(missing_ok=True)
    if args.fresh or not path.exists():
        check_equal_progress(0)
        return progress
    checkpoint = load_checkpoint(path, args.stage)
    refuse_difference(path, checkpoint["settings"], settings)
    try:
        for name, value in state.items():
            load = value.copy_ if isinstance(value, torch.Tensor) else value.load_state_dict
            load(checkpoint["state"][name])
    except Exception as error:
        raise UserError(f"{path} has other contents than its settings say ({error}); "
                        "start over with --fresh") from None
    done = len(checkpoint["history"])
    check_equal_progress(done)
    print(f"{path}:", "finished, --fresh starts over" if done == args.epochs else
          f"going on after epoch {done}")
    return dict(progress, history=checkpoint["history"])


# Changes when older checkpoints can no longer be read.
FORMAT = 2


def load_checkpoint(path, stage):
    """The checkpoint of a stage, on the CPU. UserError if it is missing, broken or another."""
    try:
        # A flipped bit would go unnoticed by torch; the archive has checksums.
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise ValueError("checksum")
        # weights_only admits tensors and plain values; a pickle could run any code.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        found = checkpoint["format"], checkpoint["stage"]
        if found == (FORMAT, stage):
            # What the callers rely on.
            checkpoint["settings"]["epochs"], checkpoint["source"]["root"], checkpoint["history"][0]
            checkpoint["state"]["student"].values(), checkpoint["state"]["teacher"].values()
    except FileNotFoundError:
        raise UserError(f"there is no {path}; python s2mts2.py {stage} makes one") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:
        # A broken file can make its reader stumble over anything.
        raise UserError(f"{path} is broken or not a checkpoint of this program; python s2mts2.py "
                        f"{stage} --fresh makes a new one ({type(error).__name__})") from None
    if found != (FORMAT, stage):
        raise UserError(f"{path} is of stage {found[1]} and format {found[0]}, not of {stage} and "
                        f"{FORMAT}; take another file, or the version of s2mts2.py that wrote it")
    return checkpoint


def write_file(path, write):
    """write(temporary file), flush, rename: path is the old file or the new one, never half.

    Of several processes only the first writes.
    """
    if RANK > 0:
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot write {path} ({reason}); make room or choose another folder with "
                        "--out, or with --cache for images") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file as write_file does."""
    write_file(path, lambda file: file.write_text(text, encoding="utf-8"))


def write_log(out, stage, history):
    """Write log.jsonl: the lines of this stage anew, those of the other as they were."""
    log = out / "log.jsonl"
    # Told apart by their beginning, which run_stage writes; whatever else is there stays.
    mine = json.dumps(dict(stage=stage))[:-1]
    old = read_lines(log) if log.exists() else []
    lines = [line for line in old if not line.startswith(mine)]
    lines += [json.dumps(entry) for entry in history]
    write_text(log, "".join(line + "\n" for line in lines))


def save_views(data, args):
    """views.png: a training image a row, its query view and its keys, as the networks see them."""
    seed_everything(args.seed, "views")
    images = torch.from_numpy(data.images[data.train[:8]])
    views = random_views(images.repeat_interleave(1 + args.keys, 0), args.augment, args.size)
    views = (views * channel_values(STD, views) + channel_values(MEAN, views)).clamp(0, 1)
    # Small views are enlarged, pixel by pixel, so that one can see them.
    views = F.interpolate(views, scale_factor=math.ceil(96 / args.size))
    grid = torchvision.utils.make_grid(views, nrow=1 + args.keys)
    path = output_folder(data, args) / "views.png"
    write_file(path, lambda file: torchvision.utils.save_image(grid, file, format="png"))
    print(f"{path}: an image a row; first the query view, then its {args.keys} key views")


def seed_everything(seed, stage, epoch=None):
    """Seed torch so that all draws to come depend on (seed, stage, epoch) alone.

    Seeded anew at each epoch, a run that goes on after an interruption needs no generator's state:
    the number of the epoch brings back its order of images, its views, everything.
    """
    torch.manual_seed(int(fingerprint(f"{seed} {stage} {epoch}")[:15], 16))


def shuffled(indices, length):
    """int64 tensor [length]: the indices in random order, over and over if length asks for it."""
    orders = [torch.randperm(len(indices)) for _ in range(math.ceil(length / len(indices)))]
    return torch.from_numpy(indices)[torch.cat(orders)[:length]]


def gather(data, picked, device):
    """The images of picked (int64 tensor [n]): uint8 tensor [n, C, H, W] on device."""
    return send(torch.from_numpy(data.images[picked.numpy()]), device)


def send(tensor, device):
    """The CPU tensor on device. A CUDA GPU fetches it by itself while the program goes on."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def read_ahead(data, device, *orders):
    """Yield a tuple of image batches for each step, and read those of the next step meanwhile.

    orders  one or more sequences of int64 tensors [n], a tensor for each step
    """
    with ThreadPoolExecutor(1) as reader:
        coming = []
        for picked in [*zip(*orders), None]:
            ready = [future.result() for future in coming]
            coming = [reader.submit(gather, data, each, device) for each in picked or ()]
            if ready:
                yield tuple(ready)


def choose_device(name):
    """The torch.device for auto, cpu, cuda, cuda:1, mps. UserError if it is not there."""
    if name == "auto":
        here = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
        name = next(device for device in here if here[device])
    if name == "cuda":
        # Of several processes each takes a GPU of its own.
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    # Where a matrix product is still in float32, 10 of its 23 binary digits are enough.
    torch.set_float32_matmul_precision("high")
    try:
        device = torch.zeros(1, device=name).device
        if device.type not in ("cpu", "cuda", "mps"):
            raise ValueError("only cpu, cuda and mps are")
    except Exception as error:
        # Each device reports its absence in its own way.
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} is not there ({reason}); try --device cpu") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif device.type == "cpu":
        keep_memory()
    return device


def keep_memory():
    """Let the C library keep freed memory for the next step, where it is Linux's.

    Otherwise each large tensor of each step is memory fresh from the kernel, which fills it with
    zeros first: a good part of a step on large images. It costs some memory. (README, Speed.)
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
        # Only tensors of 128 MB or more outside the heap (-3 is M_MMAP_THRESHOLD; older versions
        # refuse more than 32), and nothing of the heap given back (-1 is M_TRIM_THRESHOLD).
        if mallopt(-3, 2**27) or mallopt(-3, 2**25):
            mallopt(-1, -1)
    except (AttributeError, OSError, TypeError):
        # Another C library, which has other habits.
        pass


def mixed_precision(device, amp):
    """Context in which networks compute in bfloat16, on CUDA and if amp; losses stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=amp and device.type == "cuda")


def output_folder(data, args):
    """Where results go, runs/<data> unless --out says otherwise; it is made if need be."""
    out = Path(args.out or f"runs/{data.name}")
    make_folder(out)
    return out


def fingerprint(*parts):
    """16 hex digits that tell one sequence of texts, arrays and tensors from another."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(f"{part}\0".encode(errors="surrogateescape"))
        else:
            # With kind and shape, so that the end of one part is not taken for another's start.
            digest.update(f"{part.dtype} {tuple(part.shape)}".encode())
            digest.update(np.ascontiguousarray(part))
    return digest.hexdigest()[:16]


def fingerprint_of(data):
    """A fingerprint of what the networks are trained on: names, classes, labels, some images."""
    some = data.images[::max(1, len(data.images) // 16)]
    return fingerprint(data.name, *data.classes, *data.names, data.targets, data.train, some)


def imagenet_densenet121():
    """torchvision's DenseNet-121 with its ImageNet weights. UserError if they cannot be had."""
    weights = torchvision.models.DenseNet121_Weights.IMAGENET1K_V1
    try:
        return torchvision.models.densenet121(weights=weights)
    except Exception as error:
        # A network fails in many ways, and so does the reading of half a file.
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise UserError(f"cannot get {weights.url} ({error}); put the file into {folder}, or "
                        "delete it there if it is broken, or do without: pretrain --init random, "
                        "finetune --from scratch") from None


# ==================================================================================================
# 11. Several processes [plumbing]
# ==================================================================================================

# torchrun starts this program once for each GPU. The processes hold equal networks and queues, and
# share the images of each batch; all that the method's lines know of it are the calls of these
# functions, which do nothing in a single process.

RANK, PROCESSES = 0, 1
if "TORCHELASTIC_RUN_ID" in os.environ:
    RANK, PROCESSES = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def join_processes(device):
    """Meet the other processes. The wait may be long, as the first one decodes the images alone."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=datetime.timedelta(days=2))


def in_parallel(student):
    """The student with gradients averaged over all processes at each step."""
    if PROCESSES == 1:
        return student
    with warnings.catch_warnings():
        # The newest torch has another word for broadcast_buffers, which older ones do not know.
        warnings.simplefilter("ignore", FutureWarning)
        return nn.parallel.DistributedDataParallel(student, broadcast_buffers=False)


def my_part(tensor, dim):
    """This process's part of a tensor [..., N, ...]: the same number of rows for each."""
    return tensor.chunk(PROCESSES, dim)[RANK]


def orders_of_processes(order, args, epoch):
    """Which images of each batch's order int64 [steps, N] a process takes: for queries, for keys.

    Shuffled BatchNorm. If a process embedded the keys of its own queries, both would be normalised
    with the statistics of the same few images, and the student could tell its key by them instead
    of by what the image shows. So the places are shuffled, and in_order takes it back; the idea is
    MoCo's (arXiv 1911.05722).
    Returns the orders (a single one in a single process) and for in_order each image's place.
    """
    if PROCESSES == 1:
        return [order], None
    shuffle = torch.rand(order.shape).argsort(1)
    # Alike so far; from here on each process draws its own views.
    seed_everything(args.seed, args.stage, f"{epoch} process {RANK}")
    places = shuffle.argsort(1).to(choose_device(args.device))
    return [my_part(order, 1), my_part(order.gather(1, shuffle), 1)], places


def in_order(keys, places, step):
    """All processes' keys [N, M, D] of a step in the order of the batch."""
    if PROCESSES == 1:
        return keys
    parts = [torch.empty_like(keys) for _ in range(PROCESSES)]
    distributed.all_gather(parts, keys.contiguous())
    return torch.cat(parts)[places[step]]


def check_equal_progress(done):
    """Raise UserError unless all processes have found a checkpoint of as many epochs."""
    if PROCESSES > 1:
        everywhere = [None] * PROCESSES
        distributed.all_gather_object(everywhere, done)
        if len(set(everywhere)) > 1:
            raise UserError(f"the processes see checkpoints of {everywhere} epochs: --out must be "
                            "a folder that all machines share")


def mean_over_processes(value):
    """The mean of a scalar tensor over all processes: float."""
    if PROCESSES > 1:
        distributed.all_reduce(value)
    return value.item() / PROCESSES


def average_statistics(*networks):
    """Average BatchNorm's running statistics over all processes, in place.

    They are sums of what the steps brought, so once an epoch is as good as at each step.
    """
    for network in networks if PROCESSES > 1 else ():
        for buffer in network.buffers():
            if buffer.is_floating_point():
                distributed.all_reduce(buffer)
                buffer /= PROCESSES


# ==================================================================================================
# 12. Command line [plumbing]
# ==================================================================================================


COMMANDS = dict(pretrain="stage 1: joint contrastive learning from all images, without labels",
                finetune="stage 2: mean teacher with a few labels, then the test",
                evaluate="the test of a finetune.pt once more",
                ablate="both stages with each ingredient left out in turn")

# Where the images come from: stage 2 takes it over from stage 1.
SOURCE = ("root", "cache", "partial", "uncertain", "validation")


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and end the program."""

    def error(self, message):
        raise UserError(f"{message}; {self.prog} --help lists the switches")


def number(kind, low, high=math.inf):
    """Keywords for argparse: a finite int or float from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    parse.__name__ = kind.__name__
    return dict(type=parse)


def label_choice(text):
    """A type for argparse: a share < 1, a whole number, or the path of a file."""
    try:
        value = float(text)
    except ValueError:
        return text
    if not (0 < value < 1 or value >= 1 and value.is_integer()):
        raise argparse.ArgumentTypeError(f"{text} is neither a share below 1 nor a whole number")
    return value if value < 1 else int(value)


# The switches in their groups in --help. Of each: the initials of the subcommands that have it,
# itself, its value and what it means, in brackets what holds without it; then what argparse must
# know.
ON, ON_OFF = dict(action="store_true", default=None), dict(action=argparse.BooleanOptionalAction)
SWITCHES = dict(
    images=(
        ("pfa", "--data", "NAME", f"{', '.join(RECIPES)} (digits)", dict(choices=[*RECIPES])),
        ("pfea", "--root", "DIR", "folder of the data (data/NAME)", {}),
        ("pfea", "--cache", "DIR", "folder for decoded images (that of --root)", {}),
        ("pfea", "--partial", "", "make do with the images that are there (off)", ON_OFF),
        ("pfea", "--uncertain", "AS", "CheXpert's open findings count as zeros, or as ones (zeros)",
         dict(choices=["zeros", "ones"])),
        ("fea", "--validation", "", "test on CheXpert's validation part (off)", ON_OFF)),
    run=(
        ("pfea", "--out", "DIR", "for the results (runs/NAME, or where the checkpoint is)", {}),
        ("pfa", "--fresh", "", "start over, whatever is in --out", ON),
        ("pfea", "--device", "NAME", "auto, cpu, cuda, cuda:1 or mps (auto)", {}),
        ("pfa", "--amp", "", "bfloat16 on CUDA (on)", ON_OFF),
        ("pf", "--seed", "N", "of weights, views and label draw (0)", number(int, 0)),
        ("a", "--seeds", "N", "runs of each row, from seed 0 on (3)", number(int, 2, 10**4))),
    method=(
        ("f", "--from", "START", "a pretrain.pt, scratch or imagenet (the newest pretrain.pt)",
         dict(dest="start")),
        ("pfa", "--arch", "NAME", "densenet121 or tiny", dict(choices=["densenet121", "tiny"])),
        ("pa", "--init", "NAME", "random or imagenet weights",
         dict(choices=["random", "imagenet"])),
        ("pfa", "--size", "PX", "side of a view in pixels", number(int, 16, 4096)),
        ("fa", "--labels", "L", "share of each class, number of images, or file",
         dict(type=label_choice)),
        ("pfa", "--epochs", "N", "passes over the images", number(int, 1, 10**6)),
        ("pfea", "--batch", "N", "images in a step, of each kind", number(int, 2, 10**6)),
        ("pf", "--lr", "X", "learning rate in the first epoch", number(float, 0)),
        ("pf", "--teacher-momentum", "A", "share that the teacher keeps of itself",
         number(float, 0, 1)),
        ("p", "--keys", "M", "key views of an image", number(int, 1, 1000)),
        ("p", "--queue", "K", "negatives, in embeddings", number(int, 1, 10**9)),
        ("p", "--dim", "D", "numbers in an embedding", number(int, 1, 10**5)),
        ("p", "--temperature", "T", "divides the cosines of embeddings", number(float, 1e-3)),
        ("p", "--covariance-weight", "LAMBDA", "c in the last epoch, 1 is that of the bound",
         number(float, 0)),
        ("f", "--consistency", "W", "the unlabelled images' weight grows towards it",
         number(float, 0))))


def add_switches(parser, stage):
    """The switches of a subcommand. None has a default here: parse_args sees to that."""
    for title, switches in SWITCHES.items():
        group = parser.add_argument_group(title)
        for stages, switch, value, text, keywords in switches:
            if stage[0] in stages:
                # What the recipes say for the smallest set and for the paper's.
                recipes = [RECIPES[data].get(stage, {}).get(dest(switch))
                           for data in ("digits", "cxr14")]
                if None not in recipes and "(" not in text:
                    text += " (digits {}, cxr14 {})".format(*recipes)
                metavar = dict(metavar=value) if value else {}
                group.add_argument(switch, help=text, **metavar, **keywords)


def dest(switch):
    """The name of a switch in the settings."""
    return switch[2:].replace("-", "_")


def words_for(stage, given):
    """The given settings {name: value} that a stage has switches for, as words for its command."""
    words = []
    for stages, switch, *_ in [row for switches in SWITCHES.values() for row in switches]:
        value = given.get(dest(switch))
        if stage[0] in stages and value is not None and switch not in ("--out", "--fresh"):
            words += [switch, str(value)] if not isinstance(value, bool) else [
                switch if value else switch.replace("--", "--no-")]
    return words


def parse_args(argv=None):
    """Read a command line (list of str; sys.argv[1:] if None) and settle what it leaves open.

    A switch that is not given takes its value from the checkpoint that the command starts from
    (data set, folders, size, network), else from the recipe of the data set.
    Returns an argparse.Namespace with all of them. Raises UserError.
    """
    parser = Parser(prog="python s2mts2.py", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="stage", required=True, metavar="|".join(COMMANDS))
    for stage, text in COMMANDS.items():
        # No abbreviations: ablate --seed 3 would be taken for --seeds 3.
        command = commands.add_parser(
            stage, help=text, description=text, usage="%(prog)s [switches]", allow_abbrev=False,
            epilog="In brackets: what holds without the switch. finetune takes data, folders, size "
            "and network from the pretrain.pt it starts from.", formatter_class=lambda prog:
            argparse.HelpFormatter(prog, max_help_position=30, width=100))
        if stage == "evaluate":
            command.add_argument("checkpoint", help="(newest finetune.pt under runs/)", nargs="?")
        add_switches(command, stage)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items()
             if value is not None}
    stage = given["stage"]
    if PROCESSES > 1 and stage != "pretrain":
        raise UserError(f"{stage} runs in one process: start it without torchrun")
    settled = dict(root=None, cache=None, partial=False, uncertain="zeros", validation=False,
                   out=None, device="auto", amp=True, batch=64, seed=0, fresh=False)

    if stage == "pretrain":
        data = given.get("data", "digits")
        settled |= recipe(data, stage) | dict(data=data)
    elif stage == "finetune":
        start = given.get("start") or str(newest("pretrain", given.get("data")))
        theirs = {} if start in ("scratch", "imagenet") else inherited(start, "pretrain")
        data = given.get("data") or theirs.get("data", "digits")
        first = recipe(data, "pretrain")
        if theirs and theirs["data"] != data:
            theirs = dict(arch=theirs["arch"])
        elif theirs and theirs["size"] == first["size"]:
            # A size of the user's own holds for both stages; the recipe may have one for each.
            del theirs["size"]
        settled |= (recipe(data, stage) | dict(arch=first["arch"]) | theirs
                    | dict(data=data, start=start))
    elif stage == "evaluate":
        path = given.get("checkpoint") or newest("finetune")
        settled |= inherited(path, "finetune") | dict(checkpoint=path)
    elif stage == "ablate":
        data = given.get("data", "digits")
        settled |= dict(data=data, out=f"runs/{data}/ablation", seeds=3)
        settled["switches"] = {each: words_for(each, given) for each in ("pretrain", "finetune")}
        # What one of its runs would refuse is refused before the first of them.
        parse_args(["pretrain", *settled["switches"]["pretrain"]])
        parse_args(["finetune", "--from", "scratch", *settled["switches"]["finetune"]])
    settled |= given
    if stage != "ablate":
        check_settings(settled, given)
    return argparse.Namespace(**settled)


def check_settings(settled, given):
    """Raise UserError for settings that do not go together; given are those on the command line."""
    if settled["batch"] % PROCESSES or settled["batch"] < 2 * PROCESSES:
        raise UserError(f"--batch {settled['batch']} cannot be shared evenly by {PROCESSES} "
                        "processes; take a multiple of their number, at least twice it")
    folders = ("cxr14", "chexpert", "isic2018")
    for switch, sets in (("root", list(RECIPES)[1:]), ("cache", list(RECIPES)[1:]),
                         ("partial", folders), ("uncertain", ["chexpert"]),
                         ("validation", ["chexpert"])):
        if switch in given and settled["data"] not in sets:
            raise UserError(f"--{switch} has no meaning for {settled['data']}, only for "
                            f"{', '.join(sets)}; leave it out")
    if PROCESSES > 1 and ":" in settled["device"]:
        raise UserError("torchrun gives each process a device of its own: use --device cuda or cpu")
    labels = settled.get("labels")
    if isinstance(labels, str) and not os.path.isfile(labels):
        raise UserError(f"--labels {labels}: there is no such file; give a share below 1, a number "
                        "of images, or a file with one image name a line")
    smallest = 32 if settled["arch"] == "densenet121" else 16
    if settled["size"] < smallest:
        raise UserError(f"--size must be at least {smallest} for {settled['arch']}")
    if settled["arch"] == "tiny" and "imagenet" in (settled.get("init"), settled.get("start")):
        raise UserError("there are no ImageNet weights for --arch tiny; use densenet121")


def newest(stage, data=None):
    """Path of the newest checkpoint of a stage under runs/, of a data set if one is named."""
    # Those of an ablation are means to its table.
    paths = [path for path in Path("runs").rglob(f"{stage}.pt")
             if not (path.parent.parent / "ablation.json").exists()]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        if data is None or data == load_checkpoint(path, stage)["settings"]["data"]:
            return path
    raise UserError(f"there is no {stage}.pt under runs/; first run: python s2mts2.py {stage}"
                    + (f" --data {data}" if data else ""))


def inherited(path, stage):
    """What a command takes over from the checkpoint that it starts from."""
    checkpoint = load_checkpoint(path, stage)
    settings, done = checkpoint["settings"], len(checkpoint["history"])
    if done < settings["epochs"]:
        print(f"note: {path} has only {done} of {settings['epochs']} epochs")
    return ({name: settings[name] for name in ("data", "size", "arch")} | checkpoint["source"]
            | dict(out=str(Path(path).parent)))


def main(argv=None):
    """Run a command. Returns its exit status: 0, 2 if the user can mend it, 130 on Ctrl-C."""
    args = None
    try:
        args = parse_args(argv)
        choose_device(args.device)
        with alone(args.out or f"runs/{args.data}"):
            run_command(args)
    except (UserError, RuntimeError) as error:
        # Of torch's errors too little memory is the user's to mend; it says so in these words.
        text = " ".join(str(error).split())
        if isinstance(error, UserError):
            pass
        elif "out of memory" in text or "allocate memory" in text:
            text += ". Try a smaller --batch or --size"
        elif RANK > 0 and "by peer" in text:
            text = f"process {RANK} lost another one, whose message says why it stopped"
        else:
            raise
        print("error:", text, file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        again = [word for word in argv or sys.argv[1:] if word != "--fresh"]
        if args and args.stage == "finetune" and "--from" not in again:
            # The newest pretrain.pt may be another one by then.
            again += ["--from", args.start]
        program = "python s2mts2.py" if PROCESSES == 1 else "torchrun as before, with"
        print(f"\nstopped. To go on after the last finished epoch: {program} {shlex.join(again)}",
              file=sys.stderr)
        return stop.args[0] if stop.args else 130
    return 0


def run_command(args):
    """Load the data and do what the command says, in one process or in several."""
    if args.stage == "ablate":
        return ablate(args)
    if PROCESSES > 1:
        join_processes(choose_device(args.device))
        if RANK > 0:
            # One process speaks, and decodes images; the others wait, then find them decoded.
            sys.stdout = open(os.devnull, "w")
            distributed.barrier()
    data = load_for(args)
    if PROCESSES > 1 and RANK == 0:
        distributed.barrier()
    stages = dict(pretrain=pretrain, finetune=finetune, evaluate=evaluate_checkpoint)
    return stages[args.stage](data, args)


def load_for(args):
    """The Data for args, refused early where the two do not fit."""
    check = None if args.stage == "evaluate" else lambda data: check_fit(data, args)
    return load_data(args.data, args.root, args.size, args.cache, args.uncertain, args.partial,
                     args.validation, check)


@contextlib.contextmanager
def alone(path):
    """Hold a lock for what is written to path, so that a second run with the same is told."""
    user = str(os.getuid()) if hasattr(os, "getuid") else ""
    name = f"s2mts2-{fingerprint(user, str(Path(path).resolve()))}.lock"
    with open(Path(tempfile.gettempdir()) / name, "w") as lock:
        try:
            if fcntl and RANK == 0:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing to {path}; wait for its end, or choose "
                            "another folder with --out, or with --cache for images") from None
        yield


def terminate(*_):
    """On SIGTERM: stop as on Ctrl-C, with the status that belongs to it."""
    raise KeyboardInterrupt(128 + signal.SIGTERM)


def evaluate_checkpoint(data, args):
    """Test the student and the teacher of args.checkpoint again. UserError for other data."""
    checkpoint = load_checkpoint(args.checkpoint, "finetune")
    if checkpoint["settings"]["images"] != fingerprint_of(data):
        raise UserError(f"{args.checkpoint} was trained on other images, labels or another split "
                        f"than these of {data.name}; name their folder with --root")
    device, networks = choose_device(args.device), []
    for name in ("student", "teacher"):
        network = build_network(args.arch, data.images.shape[1], len(data.classes))
        network.load_state_dict(checkpoint["state"][name])
        networks.append(network.to(device))
    return report(*networks, data, args)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(main())
