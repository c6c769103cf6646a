"""S2MTS2: a mean teacher, pre-trained without labels, then fine-tuned with a few of them.

A complete implementation, in one file, of "Self-supervised Mean Teacher for Semi-supervised Chest
X-ray Classification" (Liu, Tian, Cordeiro, Belagiannis, Reid, Carneiro; MLMI 2021, arXiv 2103.03629).

The idea. Radiographs are plentiful, labels are not. So learn in two stages from two networks of one
shape: a STUDENT, trained by gradient descent, and a TEACHER, never trained itself, whose weights are
a running average of the student's. An average over many steps is steadier than any one of them, so
its outputs are good enough to serve as targets for the student that it is made of.

    stage 1: pretrain, no labels                     stage 2: finetune, 2 % of the labels

    image --> query view --> student --> q           labelled   --> student --> cross-entropy
          \\                              |                                           |
           --> M key views -> teacher -> k_1..k_M    unlabelled --> student --> p     |
                                |         |                    \\-> teacher -> p'      |
    queue of past keys: n_1..n_K <--------+                          |               |
                |                                    mean squared difference of p, p' + --> student
       joint contrastive loss --> student                       teacher follows the student (EMA)
       teacher follows the student (EMA)                     the teacher is what is evaluated

    laptop, 2 minutes   python s2mts2.py pretrain && python s2mts2.py finetune      (digits)
    the baseline        python s2mts2.py finetune --from scratch --consistency 0 --out runs/scratch
    X-rays and a GPU    python s2mts2.py pretrain --data cxr14 --root DIR
                        python s2mts2.py finetune --root DIR
    again on a test set python s2mts2.py evaluate runs/digits/finetune.pt

The paper's letters, and the names used for them below:

    q        query           [N, D]     student's unit-length embedding of an image's query view
    k_m      keys            [N, M, D]  teacher's unit-length embeddings of the image's M key views
    mu       keys.mean(1)    [N, D]     their mean; this is what enters the queue
    S        (never formed)             their covariance; only q'S q is needed, a variance
    n_j      queue           [K, D]     negatives: the means mu of the last K images
    t        temperature                how sharply similarities are told apart
    lambda   covariance_weight          largest weight of the covariance term; c at a given epoch
    a        teacher_momentum           share of itself that the teacher keeps at each step
    w        weight                     weight of the unlabelled images' consistency

    N images in a batch, M keys an image, D numbers an embedding, K negatives; C classes, H x W pixels.

Where a line departs from the plain text of the paper its comment says whose decision it is:
[paper], [authors' code] (github.com/FBLADL/semi-chest), [our choice], and [plumbing] for what has
nothing to do with the method.

Map:  1 data   2 views   3 network and teacher   4 joint contrastive loss   5 stage 1: pretrain
      6 stage 2: finetune   7 evaluation      -- a first reader can stop there --
      8 folders of images   9 recipes   10 the training loop's plumbing   11 command line
"""

import argparse
import copy
import csv
import hashlib
import json
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from sklearn import datasets, metrics, model_selection
from torch import nn
from tqdm import tqdm


class UserError(Exception):
    """Something the user can mend. Its text is one line that says what to do."""


# ==================================================================================================
# 1. What a data set is
# ==================================================================================================


@dataclass
class Data:
    """Images, labels and a split: all that the two stages ask of a data set.

    name        str; outputs go to runs/<name>/
    images      uint8 [N, C, H, W], C = 1 (grey) or 3 (RGB), an array in memory or memory-mapped
    targets     float32 [N, K], 0 or 1: any number of ones in a row when multilabel, else exactly one
    classes     K names, in the order of the columns of targets
    names       N image names, unique: what labelled.txt and predictions.csv call the images
    train, test int64 indices; all of train takes part in pre-training, labels or not
    multilabel  True: an image can show several findings, or none (sigmoid, binary cross-entropy)
                False: exactly one class each (softmax, cross-entropy)

    Raises UserError when these do not fit together; a Data made by hand is checked the same way.
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
        # asarray takes torch tensors as well, and leaves a memory map on disk.
        self.images, self.targets = np.asarray(self.images), np.asarray(self.targets, np.float32)
        self.train, self.test = np.asarray(self.train, np.int64), np.asarray(self.test, np.int64)
        count = len(self.images)
        inside = np.concatenate([self.train, self.test])
        for holds, what in (
            (self.images.ndim == 4 and self.images.shape[1] in (1, 3) and
             self.images.dtype == np.uint8, "images must be uint8 [N, 1 or 3, H, W]"),
            (self.targets.shape == (count, len(self.classes)), "targets must be [images, classes]"),
            (np.isin(self.targets, (0, 1)).all(), "targets must be 0 or 1"),
            (self.multilabel or (self.targets.sum(1) == 1).all(), "targets must be one-hot"),
            (len(self.names) == count, "names must have one entry an image"),
            (len(self.train) and len(self.test), "train and test must not be empty"),
            (((inside >= 0) & (inside < count)).all(), "train and test must index images"),
            (len(set(inside.tolist())) == len(inside), "an image is in train and test, or twice"),
        ):
            if not holds:
                raise UserError(f"data set {self.name}: {what}")


def load_data(name, root=None, size=None, cache=None, uncertain="zeros"):
    """Load a data set by name.

    name       a row of RECIPES
    root       folder of the data, data/<name> unless given
    size       int, side in pixels to which folders of images are resized once; the recipe's unless given
    cache      folder for the resized images; root unless given
    uncertain  "zeros" or "ones": what a label that the radiologist left open counts as (CheXpert)
    Returns a Data. Raises UserError when files are missing, broken or contradict each other.
    """
    if name not in LOADERS:
        raise UserError(f"no data set {name!r}: choose from {', '.join(LOADERS)}")
    size = size or RECIPES[name]["pretrain"]["size"]
    return LOADERS[name](Path(root or f"data/{name}"), size, cache, uncertain)


def load_digits(root, size, cache, uncertain):
    """scikit-learn's digits: 1,797 real scans of handwritten digits, 8 x 8, ten classes.

    They come inside the package, so the whole method runs at once. The split into 80 % train and
    20 % test is stratified and always the same, whatever --seed says. No argument is needed.
    """
    bunch = datasets.load_digits()
    # Grey levels run from 0 to 16.
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    train, test = model_selection.train_test_split(
        np.arange(len(images)), test_size=0.2, stratify=bunch.target, random_state=0)
    return Data("digits", images, np.eye(10)[bunch.target], [str(digit) for digit in range(10)],
                [f"digit{index:04d}" for index in range(len(images))], np.sort(train), np.sort(test), False)


def choose_labelled(data, labels, seed):
    """Choose the training images whose labels may be used. All others count as unlabelled.

    labels  share of each class if < 1, else number of images in all (int >= 1), or the path of a
            file with one image name a line
    seed    int; decides the draw
    Returns int64 indices, ascending. Raises UserError when a file or a number does not fit data.

    [authors' code] For each class, draw the given share of its images, at random and at least one; the
    labelled set is the union. A share of the whole would leave a rare finding (Hernia: 1 image in 500)
    without a single example. An image without any finding belongs to the class "No Finding", which is
    drawn like the others. [our choice] A number of images is met exactly, in the same proportions.
    """
    if isinstance(labels, (str, os.PathLike)):
        row = {data.names[index]: index for index in data.train}
        wanted = [line.strip() for line in read_lines(labels) if line.strip()]
        strange = [name for name in wanted if name not in row]
        if strange or not wanted:
            what = f"{strange[0]!r} is not a training image" if strange else "the file is empty"
            raise UserError(f"--labels {labels}: {what}; give one name a line, such as {data.names[data.train[0]]}")
        return np.unique([row[name] for name in wanted])

    targets = data.targets[data.train]
    if data.multilabel:
        targets = np.column_stack([targets, targets.sum(1) == 0])
    draw = np.random.default_rng(seed)
    chosen = np.zeros(len(targets), bool)
    # The share of a class that must be drawn before an image is: its place in the class's random order.
    share_needed = np.full(len(targets), np.inf)
    for column in targets.T:
        members = draw.permutation(np.flatnonzero(column))
        if len(members):
            quota = max(1, round(labels * len(members))) if labels < 1 else 1
            chosen[members[:quota]] = True
            share_needed[members] = np.minimum(share_needed[members], np.arange(len(members)) / len(members))
    if labels >= 1:
        if not chosen.sum() <= labels <= len(targets):
            raise UserError(f"--labels {labels}: of {len(targets)} training images, at least {chosen.sum()} "
                            "are needed for one of each class; give a number between")
        # First the one of each class, then whatever a growing share would have drawn next.
        chosen[np.lexsort((share_needed, ~chosen))[:int(labels)]] = True
    return data.train[chosen]


# ==================================================================================================
# 2. Views: the same image, seen differently
# ==================================================================================================

# Both stages learn by asking for the same answer to different views of an image. What the views change
# (position, exposure, sharpness) the network learns to overlook; what they keep is what it can learn.
#
# All of it is tensor arithmetic on a whole batch, on whatever device the batch is on. Each function
# takes its random draws as arguments [N], so it can be tested against torchvision; random_views draws them.

# The strengths of a test view, all zero. What each means, and its unit:
PLAIN = dict(
    # largest share of the area that a random crop cuts away: .8 is the (.2, 1) of RandomResizedCrop
    crop=0.0,
    # largest angle in degrees, and the share of the views that are rotated at all
    rotate=0.0, rotate_p=0.0,
    # share of the views that are mirrored left to right
    flip_p=0.0,
    # brightness, contrast and saturation are multiplied by 1 - jitter to 1 + jitter, the hue turned by up to
    # `hue` of a full circle, in a share jitter_p of the views
    jitter=0.0, hue=0.0, jitter_p=0.0,
    # largest standard deviation of the Gaussian blur in pixels, and the share of the views that are blurred
    blur=0.0, blur_p=0.0,
    # share of the views from which a rectangle is erased
    erase_p=0.0,
)

# ImageNet's statistics, which the ImageNet weights expect; for grey images their mean. Both stages and the
# test use these and nothing else: the authors' code normalises differently in its two stages, so that
# stage 2 starts on inputs that stage 1 never saw. [our choice]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def random_views(images, augment, size):
    """One random view of each image.

    images   uint8 [N, C, H, W] (or float in 0..1), C = 1 or 3, on any device
    augment  dict with the keys of PLAIN: the strengths in force
    size     int, side of the views in pixels
    Returns float32 [N, C, size, size] on the same device, normalised. Every image has its own draws, from
    torch's global generator: the same seed gives the same views. With augment = PLAIN nothing but the
    resizing and the normalisation is left, which is what a test image gets.
    """
    count, device = len(images), images.device
    images = images.float() / 255 if images.dtype == torch.uint8 else images

    def uniform(low, high):
        return torch.empty(count, device=device).uniform_(low, high)

    def sometimes(probability):
        return (torch.rand(count, device=device) < probability).float()

    if images.shape[-2:] != (size, size):
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)

    if augment["crop"] or augment["rotate"] or augment["flip_p"]:
        # Area and aspect ratio of the crop as in torchvision's RandomResizedCrop. A side that would
        # come out longer than the image is cut to it, where torchvision would draw again. [our choice]
        area = uniform(1 - augment["crop"], 1)
        aspect = torch.exp(uniform(-1, 1) * (math.log(4 / 3) if augment["crop"] else 0))
        width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
        left, top = uniform(0, 1) * (1 - width), uniform(0, 1) * (1 - height)
        angle = uniform(-1, 1) * augment["rotate"] * sometimes(augment["rotate_p"])
        images = crop_rotate_flip(images, left, top, width, height, angle, sometimes(augment["flip_p"]))

    if augment["jitter_p"]:
        on, strength = sometimes(augment["jitter_p"]), augment["jitter"]
        brightness, contrast, saturation = (1 + on * strength * uniform(-1, 1) for _ in range(3))
        images = colour_jitter(images, brightness, contrast, saturation, on * augment["hue"] * uniform(-1, 1))

    # Blurring is the dearest step, so it runs on the drawn images alone. Their number is drawn on the CPU: to
    # ask a GPU how many of its draws came out true would make it wait.
    drawn = int(augment["blur_p"] * count + torch.rand(()))
    if drawn:
        picked = torch.rand(count, device=device).argsort()[:drawn]
        sigma = uniform(min(0.1, augment["blur"]), augment["blur"])[:drawn]
        images = images.index_copy(0, picked, gaussian_blur(images[picked], sigma))

    mean, std = torch.tensor((MEAN, STD), device=device).view(2, 1, 3, 1, 1)
    if images.shape[1] == 1:
        mean, std = mean.mean(1, keepdim=True), std.mean(1, keepdim=True)
    images = (images - mean) / std

    if augment["erase_p"]:
        # Area and aspect ratio as in torchvision's RandomErasing. Zero, after normalisation, is mean grey.
        area, aspect = uniform(0.02, 0.33), torch.exp(uniform(math.log(0.3), math.log(3.3)))
        width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
        width = width * sometimes(augment["erase_p"])
        images = erase(images, uniform(0, 1) * (1 - width), uniform(0, 1) * (1 - height), width, height)
    return images


def crop_rotate_flip(images, left, top, width, height, angle, flip):
    """Crop, resize to the old size, rotate, mirror: one affine map and one bilinear resampling.

    images                    float32 [N, C, S, S], square
    left, top, width, height  float32 [N], the crop in shares of the image's sides
    angle                     float32 [N], degrees, counter-clockwise
    flip                      float32 [N], 1 mirrors left to right, 0 does not
    Returns float32 [N, C, S, S]; black where a view reaches beyond its image.

    The order is that of torchvision's transforms applied one after another: but done at once an image is
    blurred by one interpolation, not three, and what turns into a corner is the image itself if it is there.
    """
    # For each output pixel, where in the input it comes from. Coordinates run from -1 to 1 over the image.
    # Backwards through the chain: mirror x, turn by the angle, shrink to the crop, move to its centre.
    radians = torch.deg2rad(angle)
    cos, sin, mirror = radians.cos(), radians.sin(), 1 - 2 * flip
    rows = [torch.stack([width * cos * mirror, -width * sin, 2 * left + width - 1], 1),
            torch.stack([height * sin * mirror, height * cos, 2 * top + height - 1], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), images.shape, align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def colour_jitter(images, brightness, contrast, saturation, hue):
    """Change exposure and colour, each image by its own factors.

    images                            float32 [N, C, H, W] in 0..1; saturation and hue matter for C = 3 only
    brightness, contrast, saturation  float32 [N] factors, 1 = unchanged
    hue                               float32 [N] in turns of the colour circle, 0 = unchanged
    Returns float32 [N, C, H, W], clamped to 0..1.
    """
    def per_image(values):
        return values.view(-1, 1, 1, 1)

    images = images * per_image(brightness)
    if images.shape[1] == 3:
        # In YIQ coordinates the first number is the grey level and the other two span the plane of colours.
        # Saturation is a stretch of that plane and hue a turn of it: one 3 x 3 matrix an image. torchvision
        # turns the hue in HSV, which no matrix can do; as augmentation the two serve alike. [our choice]
        to_yiq = images.new_tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
        a, b = saturation * torch.cos(2 * math.pi * hue), saturation * torch.sin(2 * math.pi * hue)
        one, zero = torch.ones_like(a), torch.zeros_like(a)
        change = torch.stack([one, zero, zero, zero, a, -b, zero, b, a], 1).view(-1, 3, 3)
        images = torch.einsum("nij,njhw->nihw", to_yiq.inverse() @ change @ to_yiq, images)
        mean = torch.einsum("c,nchw->n", to_yiq[0], images) / images[0, 0].numel()
    else:
        mean = images.mean((1, 2, 3))
    # Contrast stretches the grey levels about the image's mean.
    return (images * per_image(contrast) + per_image(mean * (1 - contrast))).clamp(0, 1)


def gaussian_blur(images, sigma):
    """Blur each image with its own Gaussian.

    images  float32 [N, C, H, W]
    sigma   float32 [N], standard deviation in pixels
    Returns float32 [N, C, H, W]. At the border the Gaussian is cut off and its weights rescaled.
    """
    def weights(side):
        # Row i says how much each pixel of a line counts for output pixel i.
        place = torch.arange(side, device=images.device, dtype=torch.float32)
        squared = (place[:, None] - place[None, :]) ** 2
        return torch.softmax(-squared / (2 * sigma.view(-1, 1, 1, 1) ** 2), -1)

    # A Gaussian blurs rows and columns independently, so it is two matrix products, one from each side. That
    # is more arithmetic than a convolution with a small kernel and still faster: nothing is as
    # fast as a matrix product, and each image may have its own sigma.
    height, width = images.shape[-2:]
    return weights(height) @ images @ weights(width).mT


def erase(images, left, top, width, height):
    """Set a rectangle of each image to zero; its place and sides float32 [N] in shares of the image's sides."""
    def inside(start, length, side):
        place = (torch.arange(side, device=images.device) + 0.5) / side
        return (place >= start[:, None]) & (place < (start + length)[:, None])

    rows, columns = inside(top, height, images.shape[-2]), inside(left, width, images.shape[-1])
    return images.masked_fill(rows[:, None, :, None] & columns[:, None, None, :], 0)


# ==================================================================================================
# 3. The network, and a teacher that follows it
# ==================================================================================================


def build_network(arch, channels, outputs, head="linear", imagenet=False):
    """torchvision's DenseNet with a new head.

    arch      "densenet121" [paper], or "tiny", a DenseNet of 0.15 million weights for images of 24 to 64 px
    channels  1 or 3; grey images stay one channel up to here
    outputs   int: D for the projection head, the number of classes for the classifier
    head      "mlp": the projection head of stage 1, thrown away after it; "linear": a classifier of logits
    imagenet  bool: start from torchvision's ImageNet weights (densenet121 only; a download of 31 MB)
    Returns an nn.Module, [N, channels, H, W] -> [N, outputs]. Raises UserError when the weights cannot be had.
    """
    if arch == "densenet121":
        network = torchvision.models.densenet121()
        if imagenet:
            network.load_state_dict(imagenet_weights())
    else:
        network = torchvision.models.DenseNet(growth_rate=16, block_config=(2, 4, 4), num_init_features=32)
    stem = network.features.conv0
    if channels == 1:
        # Three equal channels through a convolution are one channel through the sum of its filters: the same
        # numbers as from a grey image copied to RGB, for a third of the memory and of the work of the views.
        stem.weight = nn.Parameter(stem.weight.sum(1, keepdim=True))
        stem.in_channels = 1
    features = network.classifier.in_features
    if head == "mlp":
        network.classifier = nn.Sequential(
            nn.Linear(features, features), nn.ReLU(), nn.Linear(features, outputs))
    else:
        network.classifier = nn.Linear(features, outputs)
    # Pixels with their channels side by side in memory: the order in which convolutions are fastest.
    return network.to(memory_format=torch.channels_last)


def make_teacher(student):
    """A copy of the student that no gradient reaches; ema_update moves it.

    Its BatchNorm layers, in training mode, normalise with the statistics of the batch at hand. In evaluation
    mode they would use running statistics: but those average the past of a student that moves fast, and describe
    activations that the averaged weights do not produce. Tried here, stage 1 then does not start to
    learn, its loss stuck at log(K + 1).
    The running statistics are still wanted, for evaluation. They follow the student's like the weights, in
    ema_update, and must not also be moved by the teacher's own forward passes, as in the authors' code:
    track_running_stats=False says just that (and leaves evaluation mode as it was).
    """
    teacher = copy.deepcopy(student).requires_grad_(False)
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
    return teacher


@torch.no_grad()
def ema_update(teacher, student, momentum):
    """teacher <- momentum * teacher + (1 - momentum) * student, in place. [paper]

    teacher, student  nn.Modules of one architecture; the student is left untouched
    momentum          float in 0..1: .999 averages over about the last 1 / (1 - .999) = 1,000 steps

    After n updates with a student that stands still: momentum^n * teacher + (1 - momentum^n) * student.
    Buffers are state too: BatchNorm's running mean and variance are averaged like weights, its integer
    count of batches, which has no average, is copied. [our choice; the authors' code forgets the integers]
    """
    for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
        mine.lerp_(theirs, 1 - momentum)
    for mine, theirs in zip(teacher.buffers(), student.buffers(), strict=True):
        if mine.is_floating_point():
            mine.lerp_(theirs, 1 - momentum)
        else:
            mine.copy_(theirs)


# ==================================================================================================
# 4. The joint contrastive loss
# ==================================================================================================


def joint_contrastive_loss(query, keys, queue, temperature, covariance_weight):
    """Contrast each query with infinitely many keys of its image at once.

    query              float [N, D], unit length
    keys               float [N, M, D], unit length, constants
    queue              float [K, D], negatives, constants
    temperature        float > 0
    covariance_weight  float >= 0; 1 is the exact bound, 0 with M = 1 is MoCo's InfoNCE
    Returns a scalar, the mean over the N images. [JCL, arXiv 2009.14776, with the authors' weight]

    InfoNCE asks: among one key of the query's own image and K of other images, which is its own? That is
    cross-entropy over 1 + K similarities, -log(e^(q.k/t) / (e^(q.k/t) + sum_j e^(q.n_j/t))), and depends on
    which key happened to be drawn. We want its mean over *all* keys that the image could have had.
    Take them as Gaussian with mean mu and covariance S. Then
      the mean of -q.k/t is -q.mu/t;
      the mean of log(e^(q.k/t) + ...) is at most the log of the mean (Jensen: log is concave);
      the mean of e^(q.k/t), the moment-generating function of a Gaussian, is e^(q.mu/t + q'Sq/(2 t^2)).
    Together   L = log( e^(q.mu/t + c q'Sq/(2 t^2)) + sum_j e^(q.n_j/t) ) - q.mu/t,   with c = 1.
    The covariance makes the positive look more alike than it is, and asks more of the query.

    The trick: q'Sq is the variance of q.k over the keys. N x M dot products are enough, and no D x D
    matrix is ever formed.
    """
    positives = torch.einsum("nd,nmd->nm", query, keys) / temperature
    mean, variance = positives.mean(1), positives.var(1, unbiased=False)
    negatives = query @ queue.T / temperature
    positive = mean + covariance_weight / 2 * variance
    logits = torch.cat([positive[:, None], negatives], 1)
    return (logits.logsumexp(1) - mean).mean()


# ==================================================================================================
# 5. Stage 1: pretrain
# ==================================================================================================


def pretrain(data, args):
    """Joint contrastive pre-training of student and teacher on all training images, without labels.

    data  Data
    args  what parse_args(["pretrain", ...]) returns
    Returns (student, teacher), and leaves pretrain.pt, log.jsonl and views.png in the output folder.
    Raises UserError when args do not fit data.
    """
    device = choose_device(args.device)
    if args.batch > len(data.train):
        raise UserError(f"--batch {args.batch} is more than the {len(data.train)} training images")
    seed_everything(args.seed, "pretrain")
    student = build_network(args.arch, data.images.shape[1], args.dim, "mlp", args.init == "imagenet").to(device)
    teacher = make_teacher(student)

    # Negatives. A good query differs from *many* other images, far more than fit in a batch. So the teacher's
    # answers to the last K images are kept and used again; that they are a little old is harmless because
    # the teacher changes slowly. Random directions fill the queue until real ones have come. [authors' code]
    length = min(args.queue, len(data.train))
    if length < args.queue:
        print(f"queue cut from {args.queue} to {length}: there are no more training images to tell apart")
    queue = F.normalize(torch.randn(length, args.dim), dim=1).to(device)

    optimizer = torch.optim.SGD(student.parameters(), args.lr, momentum=0.9, weight_decay=args.weight_decay)
    state = dict(student=student, teacher=teacher, optimizer=optimizer, queue=queue)
    progress = resume(data, args, state)
    save_views(data, args)
    steps = len(data.train) // args.batch

    def one_epoch(epoch):
        # The covariance is an estimate from few keys of a network that still knows nothing: it
        # gets its weight as training goes on. [authors' code]
        covariance_weight = args.covariance_weight * (epoch + 1) / args.epochs
        order = shuffled(data.train, steps * args.batch)
        for step, picked in enumerate(order.split(args.batch)):
            images = gather(data, picked, device)
            query_views = random_views(images, args.augment, args.size)
            key_views = random_views(images.repeat_interleave(args.keys, 0), args.augment, args.size)
            with mixed_precision(device, args.amp):
                query = F.normalize(student(query_views).float(), dim=1)
                with torch.no_grad():
                    # All M keys of all images in one pass: [N * M, C, H, W] -> [N, M, D].
                    keys = F.normalize(teacher(key_views).float(), dim=1).unflatten(0, (-1, args.keys))
            loss = joint_contrastive_loss(query, keys, queue, args.temperature, covariance_weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema_update(teacher, student, args.teacher_momentum)
            # First in, first out: the new means overwrite the oldest entries, going round and round. The mean
            # of unit vectors is shorter than 1 and stays so. [authors' code]
            written = (epoch * steps + step) * args.batch
            queue[torch.arange(written, written + args.batch, device=device) % length] = keys.mean(1)
            yield loss

    run_stage(data, args, state, progress, one_epoch, steps, args.batch)
    return student, teacher


# ==================================================================================================
# 6. Stage 2: finetune
# ==================================================================================================


def finetune(data, args):
    """Fine-tune student and teacher on a few labelled images and all the unlabelled ones, then test both.

    data  Data
    args  what parse_args(["finetune", ...]) returns
    Returns the metrics as in metrics.json, and leaves finetune.pt, log.jsonl, labelled.txt, metrics.json and
    predictions.csv in the output folder. Raises UserError when args do not fit data.
    """
    device = choose_device(args.device)
    labelled = choose_labelled(data, args.labels, args.seed)
    unlabelled = np.setdiff1d(data.train, labelled)
    seed_everything(args.seed, "finetune")
    student, teacher = (network.to(device) for network in starting_networks(data, args))
    make_optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[args.optimizer]
    optimizer = make_optimizer(student.parameters(), args.lr, betas=(0.9, 0.99), eps=args.eps,
                               weight_decay=args.weight_decay)
    state = dict(student=student, teacher=teacher, optimizer=optimizer)
    progress = resume(data, args, state, labelled)
    write_file(output_folder(data, args) / "labelled.txt",
               lambda file: file.write_text("".join(data.names[index] + "\n" for index in labelled)))
    print(f"{len(labelled)} labelled and {len(unlabelled)} unlabelled training images, {len(data.test)} test images")

    # An epoch shows every unlabelled image once; the labelled ones, being few, come round many times. The
    # baseline without unlabelled images makes the same number of steps. [our choice]
    steps = math.ceil(max(len(labelled), len(unlabelled)) / args.batch)
    consistent = args.consistency > 0 and len(unlabelled) > 0

    def one_epoch(epoch):
        # Early on the teacher knows little that is worth agreeing with. [authors' code: epoch / epochs]
        weight = args.consistency * epoch / args.epochs
        labelled_order = shuffled(labelled, steps * args.batch).split(args.batch)
        unlabelled_order = shuffled(unlabelled, steps * args.batch).split(args.batch) if consistent else None
        for step in range(steps):
            picked = labelled_order[step]
            targets = torch.from_numpy(data.targets[picked.numpy()]).to(device)
            views = random_views(gather(data, picked, device), args.augment, args.size)
            if consistent:
                # Two views of each unlabelled image, one for each network: shown the same pixels, as in the
                # authors' code, they would agree without having learnt to overlook anything.
                images = gather(data, unlabelled_order[step], device)
                students_view = random_views(images, args.augment, args.size)
                teachers_view = random_views(images, args.augment, args.size)
                # Labelled and unlabelled in one pass, so that BatchNorm's statistics describe both.
                with mixed_precision(device, args.amp):
                    logits = student(torch.cat([views, students_view])).float()
                    with torch.no_grad():
                        teacher_logits = teacher(teachers_view).float()
                loss = supervised_loss(logits[:len(views)], targets, data.multilabel)
                loss = loss + weight * consistency_loss(logits[len(views):], teacher_logits, data.multilabel)
            else:
                with mixed_precision(device, args.amp):
                    logits = student(views).float()
                loss = supervised_loss(logits, targets, data.multilabel)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            # An average with a long memory would hold on to its first, untrained head for hundreds of steps. At
            # step i a plain mean of all i + 1 states so far has momentum 1 - 1 / (i + 1): start so. [our choice]
            momentum = min(1 - 1 / (epoch * steps + step + 1), args.teacher_momentum)
            ema_update(teacher, student, momentum)
            yield loss

    run_stage(data, args, state, progress, one_epoch, steps, args.batch * (1 + consistent))
    return report(student, teacher, data, args)


def supervised_loss(logits, targets, multilabel):
    """Cross-entropy of logits [N, K] with targets [N, K]; a scalar.

    Multi-label: each class is a yes-or-no question of its own, binary cross-entropy averaged over images and
    classes. Multi-class: one answer out of K, cross-entropy averaged over images. [paper]
    """
    if multilabel:
        return F.binary_cross_entropy_with_logits(logits, targets)
    return F.cross_entropy(logits, targets)


def probabilities(logits, multilabel):
    """Sigmoid or softmax of logits [N, K]: what the classes' probabilities are."""
    return logits.sigmoid() if multilabel else logits.softmax(1)


def consistency_loss(student_logits, teacher_logits, multilabel):
    """Mean squared difference of the two networks' probabilities, [N, K] each; a scalar. [paper]

    No label is needed to ask that two views of an image get one answer. The teacher's answer is the target:
    averaged over many students it is the steadier one. Probabilities, because a difference between two
    logits that both say "no" does not matter.
    """
    difference = probabilities(student_logits, multilabel) - probabilities(teacher_logits, multilabel)
    return difference.square().mean()


def starting_networks(data, args):
    """Student and teacher as stage 2 finds them: stage 1's, with one new and identical classifier.

    args.start is "scratch", "imagenet" or the path of a pretrain.pt. Returns two nn.Modules.
    Raises UserError unless the checkpoint fills every weight but the classifier's, and brings no other.
    """
    student = build_network(args.arch, data.images.shape[1], len(data.classes), imagenet=args.start == "imagenet")
    teacher = make_teacher(student)
    if args.start in ("scratch", "imagenet"):
        return student, teacher
    state = load_checkpoint(args.start, "pretrain")["state"]
    for network, weights in ((student, state["student"]), (teacher, state["teacher"])):
        # strict=False alone would let a checkpoint of another network load nothing, without a word.
        features = {name: value for name, value in weights.items() if not name.startswith("classifier.")}
        try:
            missing, unexpected = network.load_state_dict(features, strict=False)
        except RuntimeError as error:
            missing, unexpected = [], [str(error).splitlines()[-1].strip()]
        if unexpected or missing != ["classifier.weight", "classifier.bias"]:
            raise UserError(f"{args.start} is not of a {args.arch} with {data.images.shape[1]} channel(s): "
                            f"{(unexpected + missing)[0]}; give its own --arch and --data")
    return student, teacher


# ==================================================================================================
# 7. Evaluation
# ==================================================================================================


@torch.no_grad()
def evaluate(network, data, indices, size, batch=64, amp=False):
    """Probabilities for images, each exactly once and in order.

    network  from build_network, on any device; data  Data; indices  int [n]
    size     int, pixels; batch  int, images at a time; amp  bool, bfloat16 on CUDA
    Returns float32 [n, K].
    """
    device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    scores = []
    with tqdm(total=len(indices), desc="test", unit="image", mininterval=0.5, leave=False) as bar:
        for picked in torch.as_tensor(indices).split(batch):
            views = random_views(gather(data, picked, device), PLAIN, size)
            with mixed_precision(device, amp):
                logits = network(views)
            scores.append(probabilities(logits.float(), data.multilabel).cpu())
            bar.update(len(picked))
    network.train(was_training)
    return torch.cat(scores).numpy()


def classification_metrics(targets, scores, classes, multilabel):
    """How well scores [n, K] rank and name targets [n, K].

    Returns a dict: "auc" {class: area under the ROC curve, or None where the targets are all ones or all
    zeros, because then there is nothing to rank}, "mean_auc" over the others (None if there is none); for
    multi-class, one against the rest, also "accuracy" and the unweighted means over the classes that occur
    "macro_sensitivity", "macro_specificity" and "macro_f1". All from 0 to 1.
    """
    auc = {}
    for name, truth, score in zip(classes, targets.T, scores.T, strict=True):
        auc[name] = float(metrics.roc_auc_score(truth, score)) if 0 < truth.sum() < len(truth) else None
    known = [value for value in auc.values() if value is not None]
    result = dict(mean_auc=sum(known) / len(known) if known else None, auc=auc)
    if not multilabel:
        truth, answer = targets.argmax(1), scores.argmax(1)
        # [[true negatives, false positives], [false negatives, true positives]] for each class that occurs.
        counts = metrics.multilabel_confusion_matrix(truth, answer, labels=np.unique(truth)).astype(float)
        (tn, fp), (fn, tp) = counts.transpose(1, 2, 0)
        result.update(
            accuracy=float((truth == answer).mean()),
            macro_sensitivity=float((tp / (tp + fn)).mean()),
            macro_specificity=float((tn / np.maximum(tn + fp, 1)).mean()),
            macro_f1=float((2 * tp / (2 * tp + fp + fn)).mean()))
    return result


def report(student, teacher, data, args):
    """Test both networks on the whole test split; print the table, write metrics.json and predictions.csv.

    The result is the teacher's, after the last epoch. The test split has chosen nothing: no epoch, no
    network, no setting. The student's figures are there to compare.
    Returns the dict in metrics.json.
    """
    targets, scores = data.targets[data.test], {}
    for name, network in (("teacher", teacher), ("student", student)):
        scores[name] = evaluate(network, data, data.test, args.size, max(args.batch, 64), args.amp)
    result = classification_metrics(targets, scores["teacher"], data.classes, data.multilabel)
    result["student"] = classification_metrics(targets, scores["student"], data.classes, data.multilabel)

    def line(name, pick):
        figures = ["n/a" if value is None else f"{value:.4f}" for value in (pick(result), pick(result["student"]))]
        print(f"{name:<{width}} {figures[0]:>8} {figures[1]:>8}")

    width = max(map(len, [*data.classes, "macro_specificity"]))
    print(f"{'test AUC':<{width}}  teacher  student")
    for name in data.classes:
        line(name, lambda metric: metric["auc"][name])
    line("mean AUC", lambda metric: metric["mean_auc"])
    for name in [key for key in result if key not in ("auc", "mean_auc", "student")]:
        line(name, lambda metric: metric[name])
    unknown = [name for name, value in result["auc"].items() if value is None]
    if unknown:
        print(f"n/a: {', '.join(unknown)}: no positive, or no negative, among the {len(data.test)} test images; "
              "left out of the mean")

    out = output_folder(data, args)
    write_file(out / "metrics.json", lambda file: file.write_text(json.dumps(result, indent=1) + "\n"))

    def write_predictions(file):
        with open(file, "w", newline="") as stream:
            rows = csv.writer(stream)
            rows.writerow(["image", *data.classes])
            rows.writerows([data.names[index], *(f"{score:.6f}" for score in row)]
                           for index, row in zip(data.test, scores["teacher"], strict=True))

    write_file(out / "predictions.csv", write_predictions)
    print(f"written: {out}/metrics.json, predictions.csv")
    return result


# ==================================================================================================
# What follows moves files, remembers settings and talks to the user. A first reader can stop here.
# ==================================================================================================

# ==================================================================================================
# 8. Folders of images [plumbing]
# ==================================================================================================

CXR14_CLASSES = ("Atelectasis Cardiomegaly Effusion Infiltration Mass Nodule Pneumonia Pneumothorax "
                 "Consolidation Edema Emphysema Fibrosis Pleural_Thickening Hernia").split()
CXR14_HELP = ("Chest X-ray14 comes from https://nihcc.app.box.com/v/ChestXray-NIHCC: Data_Entry_2017.csv (or "
              "Data_Entry_2017_v2020.csv), train_val_list.txt, test_list.txt and a folder images/ in one folder; "
              "name it with --root")


def load_cxr14(root, size, cache, uncertain):
    """NIH Chest X-ray14 in its official layout: 14 findings, split by the official lists.

    root/Data_Entry_2017.csv or Data_Entry_2017_v2020.csv, train_val_list.txt, test_list.txt, images/*.png
    """
    tables = [root / name for name in ("Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv")]
    table = next((file for file in tables if file.is_file()), None)
    lists = [root / "train_val_list.txt", root / "test_list.txt"]
    for found, what in ((root.is_dir(), f"no folder {root}"), (table, f"no {tables[0].name} in {root}"),
                        *((file.is_file(), f"no {file.name} in {root}") for file in lists),
                        ((root / "images").is_dir(), f"no folder images in {root}")):
        if not found:
            raise UserError(f"{what}. {CXR14_HELP}")

    # Columns by position: the last two names of the header hold commas, unquoted.
    findings = {}
    for row in csv.reader(read_lines(table)[1:]):
        if len(row) < 2 or row[0] in findings:
            raise UserError(f"{table}: {'image twice' if row else 'empty line'}: {','.join(row)[:80]!r}")
        findings[row[0]] = [] if row[1] == "No Finding" else row[1].split("|")
        unknown = set(findings[row[0]]) - set(CXR14_CLASSES)
        if unknown:
            raise UserError(f"{table}: image {row[0]}: unknown label {unknown.pop()!r}; "
                            f"known are No Finding, {', '.join(CXR14_CLASSES)}")

    split = [[line.strip() for line in read_lines(file) if line.strip()] for file in lists]
    names = split[0] + split[1]
    both = set(split[0]) & set(split[1])
    if both or len(set(names)) < len(names):
        name = min(both) if both else next(name for name in names if names.count(name) > 1)
        raise UserError(f"image {name} is {'in both' if both else 'twice in one'} of {lists[0]} and {lists[1]}")
    stranger = next((name for name in names if name not in findings), None)
    if stranger:
        raise UserError(f"image {stranger} is in a list but not in {table}")

    column = {name: index for index, name in enumerate(CXR14_CLASSES)}
    targets = np.zeros((len(names), len(CXR14_CLASSES)), np.float32)
    for row, name in enumerate(names):
        targets[row, [column[finding] for finding in findings[name]]] = 1
    images = decode_images([root / "images" / name for name in names], size, 1, Path(cache or root))
    return Data("cxr14", images, targets, CXR14_CLASSES, names, np.arange(len(split[0])),
                np.arange(len(split[0]), len(names)), True)


def decode_images(files, size, channels, cache):
    """Decode and resize a folder of images once; later runs open the result in no time.

    files     paths; size int, pixels; channels 1 (grey, whatever the file holds) or 3 (RGB)
    cache     folder that takes the result, a memory-mapped .npy named by a hash of files, size and channels
    Returns uint8 [len(files), channels, size, size]. Raises UserError naming missing and broken images.

    An unfinished build is a .part file and a count of the images that are whole in it; it goes on from there.
    """
    key = hashlib.sha256("\n".join([f"{size} {channels}", *(file.name for file in files)]).encode()).hexdigest()
    whole = cache / f"s2mts2-{size}px-{key[:12]}.npy"
    if whole.is_file():
        return np.load(whole, mmap_mode="r")
    present = {file.name for folder in {file.parent for file in files} for file in folder.iterdir()}
    missing = [file for file in files if file.name not in present]
    if missing:
        raise UserError(f"{len(missing)} of {len(files)} images are missing, the first is {missing[0]}")

    mode = (None, torchvision.io.ImageReadMode.GRAY, None, torchvision.io.ImageReadMode.RGB)[channels]
    part, count = whole.with_suffix(".part"), whole.with_suffix(".count")

    def decode(index):
        try:
            image = torchvision.io.decode_image(str(files[index]), mode)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"broken image {files[index]}: {str(error).splitlines()[0]}; download it again") from None
        images[index] = torchvision.transforms.v2.functional.resize(image, [size, size], antialias=True)

    try:
        cache.mkdir(parents=True, exist_ok=True)
        done = int(count.read_text()) if count.is_file() and part.is_file() else 0
        images = np.lib.format.open_memmap(part, "r+" if done else "w+", np.uint8, (len(files), channels, size, size))
        with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(
                total=len(files), initial=done, desc="decode", unit="image", mininterval=0.5) as bar:
            for start in range(done, len(files), 512):
                stop = min(start + 512, len(files))
                for _ in pool.map(decode, range(start, stop)):
                    bar.update()
                images.flush()
                write_file(count, lambda file, stop=stop: file.write_text(str(stop)))
        os.replace(part, whole)
        count.unlink()
    except OSError as error:
        raise UserError(f"cannot write the decoded images to {cache}: {error.strerror}; name a folder with --cache")
    return np.load(whole, mmap_mode="r")


def read_lines(path):
    """The lines of a text file; UserError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'it is not a text file'}") from None


LOADERS = {"digits": load_digits, "cxr14": load_cxr14}


# ==================================================================================================
# 9. Recipes: every setting that a data set brings along
# ==================================================================================================

# One row for each data set; what the command line leaves unset comes from here. Units: size in pixels, batch
# in images, teacher_momentum a share, temperature in units of cosine similarity, augment as in PLAIN.
# schedule: "cosine" goes from lr to 0 over the epochs, "steps" takes a tenth at 1/2 and 5/6 of them.

RECIPES = dict(
    # [our choice], tuned on a held-out fifth of the training images with seeds 100 to 104, never on the test
    # images: ../README.md says how.
    digits=dict(
        pretrain=dict(
            arch="tiny", init="random", size=32, epochs=40, batch=64, lr=0.06, weight_decay=1e-4, schedule="cosine",
            teacher_momentum=0.99, queue=512, temperature=0.1, dim=128, covariance_weight=2.0, keys=2,
            augment=dict(PLAIN, crop=0.7, rotate=10.0, rotate_p=1.0, jitter=0.4, jitter_p=0.8)),
        finetune=dict(
            size=32, epochs=14, batch=64, lr=0.003, weight_decay=0.0, optimizer="adam", eps=1e-8,
            schedule="cosine", teacher_momentum=0.99, labels=0.02, consistency=50.0,
            augment=dict(PLAIN, crop=0.7, rotate=10.0, rotate_p=1.0, jitter=0.4, jitter_p=0.8))),
    # [authors' code] throughout; consistency 1 is theirs as well
    cxr14=dict(
        pretrain=dict(
            arch="densenet121", init="imagenet", size=256, epochs=100, batch=256, lr=0.03, weight_decay=1e-4,
            schedule="cosine", teacher_momentum=0.999, queue=65536, temperature=0.07, dim=128,
            covariance_weight=2.0, keys=2,
            augment=dict(PLAIN, crop=0.8, rotate=10.0, rotate_p=0.5, flip_p=0.5, jitter=0.4, hue=0.4, jitter_p=0.8,
                         blur=2.0, blur_p=0.5, erase_p=0.5)),
        finetune=dict(
            size=512, epochs=30, batch=16, lr=0.05, weight_decay=0.0, optimizer="adam", eps=0.1, schedule="steps",
            teacher_momentum=0.999, labels=0.02, consistency=1.0,
            augment=dict(PLAIN, crop=0.8, rotate=10.0, rotate_p=1.0, flip_p=0.5))),
)


def learning_rate(args, epoch):
    """Learning rate of an epoch, 0 <= epoch < args.epochs. [authors' code]"""
    progress = epoch / args.epochs
    if args.schedule == "cosine":
        return args.lr * 0.5 * (1 + math.cos(math.pi * progress))
    return args.lr * 0.1 ** ((progress >= 1 / 2) + (progress >= 5 / 6))


# ==================================================================================================
# 10. The training loop's plumbing: batches, seeds, checkpoints [plumbing]
# ==================================================================================================


def seed_everything(seed, stage, epoch=-1):
    """Make all that follows depend on (seed, stage, epoch) alone.

    Each epoch starts its random numbers anew, so going on after an interruption needs no generator's state: the
    epoch's number brings back its order of images, its views, everything.
    """
    text = f"{seed} {stage} {epoch}".encode()
    torch.manual_seed(int.from_bytes(hashlib.sha256(text).digest()[:7], "big"))


def shuffled(indices, length):
    """int64 tensor [length]: indices in random order, again and again in new orders if length asks for more."""
    orders = [torch.randperm(len(indices)) for _ in range(math.ceil(length / len(indices)))]
    return torch.from_numpy(indices)[torch.cat(orders)[:length]]


def gather(data, picked, device):
    """The images picked (int64 tensor [n]) as a uint8 tensor [n, C, H, W] on device."""
    return torch.from_numpy(data.images[picked.numpy()]).to(device)


def choose_device(name):
    """torch.device for auto, cpu, cuda, cuda:1, mps; UserError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}; try --device auto") from None
    return torch.device(name)


def mixed_precision(device, amp):
    """bfloat16 for the networks on CUDA if amp; the losses stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=amp and device.type == "cuda")


def output_folder(data, args):
    """runs/<data> unless --out says otherwise; made if need be."""
    out = Path(args.out or f"runs/{data.name}")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the output folder {out}: {error.strerror}; name another with --out") from None
    return out


def write_file(path, write):
    """write(temporary path), flush to disk, rename: path is the old file or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}; the old one is unharmed") from None


def load_checkpoint(path, stage):
    """A checkpoint of the given stage, on the CPU; UserError if path holds none."""
    try:
        # weights_only: tensors and plain values, nothing that could run code.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}; make one with: python s2mts2.py {stage}") from None
    except Exception as error:
        # torch.load raises whatever the broken file makes its reader stumble over.
        raise UserError(f"{path} is not a whole checkpoint of this program ({type(error).__name__}); "
                        f"make it anew with: python s2mts2.py {stage} --fresh") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("stage") != stage:
        raise UserError(f"{path} is not a checkpoint that python s2mts2.py {stage} wrote")
    return checkpoint


def fingerprint(*parts):
    """Short hash of texts, arrays and tensors."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:16]


def settings_in_force(data, args, labelled):
    """All that decides a run's result, as plain values: a checkpoint of other settings must not be continued."""
    settings = {name: value for name, value in vars(args).items()
                if name not in ("stage", "root", "cache", "device", "out", "fresh", "start")}
    settings["images"] = fingerprint(data.name, *data.names, data.targets, data.train, data.test)
    if args.stage == "finetune":
        settings["labels"] = f"{args.labels} ({fingerprint(labelled)})"
        settings["from"] = args.start
        if args.start not in ("scratch", "imagenet"):
            state = load_checkpoint(args.start, "pretrain")["state"]
            settings["from"] = "checkpoint " + fingerprint(*state["student"].values(), *state["teacher"].values())
    return settings


def resume(data, args, state, labelled=None):
    """Take up an unfinished run in the output folder, if there is one and its settings are the same.

    state  dict of modules, optimizers and tensors; changed in place
    Returns what a checkpoint says beside its state; its "history" has one dict for each epoch that is done.
    Raises UserError if the settings differ.
    """
    path = output_folder(data, args) / f"{args.stage}.pt"
    settings = settings_in_force(data, args, labelled)
    print(f"{args.stage}: " + "  ".join(f"{name}={value}" for name, value in settings.items()))
    progress = dict(format=1, stage=args.stage, settings=settings, root=args.root and str(args.root), history=[])
    if args.fresh or not path.exists():
        return progress
    checkpoint = load_checkpoint(path, args.stage)
    theirs = checkpoint["settings"]
    differ = [f"{name} {theirs.get(name)} there, {settings.get(name)} here"
              for name in sorted(settings.keys() | theirs.keys()) if settings.get(name) != theirs.get(name)]
    if differ:
        raise UserError(f"{path} has other settings ({'; '.join(differ)}); --fresh starts over, --out goes elsewhere")
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            value.copy_(checkpoint["state"][name])
        else:
            value.load_state_dict(checkpoint["state"][name])
    progress["history"] = checkpoint["history"]
    done = len(progress["history"])
    print(f"{path} is finished; --fresh starts over" if done == args.epochs else
          f"{path}: going on after epoch {done} of {args.epochs}")
    return progress


def run_stage(data, args, state, progress, one_epoch, steps, images_per_step):
    """Run one_epoch(epoch), a generator that yields the loss of each step, for all epochs that are left.

    After each epoch: a line on screen, a checkpoint, a line in log.jsonl. UserError when the loss is not finite.
    """
    out, history = output_folder(data, args), progress["history"]
    write_log(out, args.stage, history)
    with tqdm(total=args.epochs * steps * images_per_step, initial=len(history) * steps * images_per_step,
              desc=args.stage, unit="image", unit_scale=True, mininterval=0.5) as bar:
        for epoch in range(len(history), args.epochs):
            seed_everything(args.seed, args.stage, epoch)
            lr = learning_rate(args, epoch)
            for group in state["optimizer"].param_groups:
                group["lr"] = lr
            started, total = time.perf_counter(), 0.0
            for step, loss in enumerate(one_epoch(epoch)):
                loss = loss.detach()
                total = total + loss
                if step % 10 == 0:
                    # Reading a loss makes a GPU wait, hence not at every step.
                    bar.set_postfix_str(f"epoch {epoch + 1}/{args.epochs}, loss {float(loss):.3f}", refresh=False)
                bar.update(images_per_step)
            seconds, loss = time.perf_counter() - started, float(total) / steps
            if not math.isfinite(loss):
                raise UserError(f"the loss is {loss} in epoch {epoch + 1} at learning rate {lr:g}; try a smaller --lr")
            rate = steps * images_per_step / seconds
            bar.write(f"{args.stage} epoch {epoch + 1:3d}/{args.epochs}   loss {loss:.4f}   lr {lr:.2g}   "
                      f"{rate:.0f} images/s")
            history.append(dict(stage=args.stage, epoch=epoch, loss=loss, lr=lr, seconds=round(seconds, 3),
                                images_per_second=round(rate, 1)))
            tensors = {name: value if isinstance(value, torch.Tensor) else value.state_dict()
                       for name, value in state.items()}
            write_file(out / f"{args.stage}.pt", lambda file: torch.save(dict(progress, state=tensors), file))
            write_log(out, args.stage, history)


def write_log(out, stage, history):
    """log.jsonl: this stage's lines anew, the other stage's as they are."""
    log = out / "log.jsonl"
    others = [line for line in (read_lines(log) if log.exists() else []) if json.loads(line)["stage"] != stage]
    lines = others + [json.dumps(entry) for entry in history]
    write_file(log, lambda file: file.write_text("".join(line + "\n" for line in lines)))


def save_views(data, args):
    """views.png: the first training images, one a row: the query view and its keys, as the networks see them."""
    seed_everything(args.seed, "views")
    images = gather(data, torch.from_numpy(data.train[:8]), "cpu").repeat_interleave(args.keys + 1, 0)
    views = random_views(images, args.augment, args.size)
    mean, std = torch.tensor((MEAN, STD)).view(2, 1, 3, 1, 1)
    grid = torchvision.utils.make_grid((views * std + mean).clamp(0, 1), nrow=args.keys + 1)
    write_file(output_folder(data, args) / "views.png",
               lambda file: torchvision.utils.save_image(grid, file, format="png"))


def imagenet_weights():
    """torchvision's ImageNet weights of DenseNet-121; UserError if they can be neither found nor downloaded."""
    weights = torchvision.models.DenseNet121_Weights.IMAGENET1K_V1
    try:
        return weights.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise UserError(f"cannot download {weights.url} ({error}); put that file in {folder}, or choose random "
                        "weights: --init random (pretrain), --from scratch (finetune)") from None


# ==================================================================================================
# 11. The command line [plumbing]
# ==================================================================================================


class Parser(argparse.ArgumentParser):
    """Raises where argparse would print its usage and leave, so that a notebook survives a typing error."""

    def error(self, message):
        raise UserError(f"{message}; see python {self.prog} --help")


def number(kind, low, high=math.inf):
    """A type for argparse: an int or a float from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is out of range, {low} to {high}")
        return value
    parse.__name__ = "whole number" if kind is int else "number"
    return parse


def label_choice(text):
    """A type for argparse: a share < 1, a whole number, or else the path of a file."""
    try:
        value = float(text)
    except ValueError:
        return text
    if 0 < value < 1 or value >= 1 and value.is_integer():
        return value if value < 1 else int(value)
    raise argparse.ArgumentTypeError(f"{text} is neither a share between 0 and 1 nor a whole number nor a file")


def add_switches(parser, stage):
    """The switches of one subcommand. No defaults here: what is not given comes from the recipe or a checkpoint."""
    add = parser.add_argument
    if stage != "evaluate":
        add("--data", choices=list(LOADERS), help="data set (pretrain: digits; finetune: the checkpoint's)")
    add("--root", metavar="DIR", help="folder of the data (data/<name>)")
    add("--cache", metavar="DIR", help="folder for the decoded images (--root)")
    add("--device", help="auto, cpu, cuda, cuda:1, mps (auto)")
    add("--amp", action=argparse.BooleanOptionalAction, help="bfloat16 on CUDA (on)")
    add("--batch", type=number(int, 2), metavar="N", help="images of each kind in a step")
    add("--out", metavar="DIR", help="folder for the results (runs/<data>; finetune and evaluate: the checkpoint's)")
    if stage == "evaluate":
        return add("checkpoint", nargs="?", help="a finetune.pt (the newest under runs/)")
    add("--size", type=number(int, 16, 4096), metavar="PX", help="side of the views in pixels")
    add("--arch", choices=["densenet121", "tiny"], help="network")
    add("--seed", type=number(int, 0), metavar="N", help="decides weights, views and the label draw (0)")
    add("--fresh", action="store_true", default=None, help="start over, even if there is a checkpoint")
    add("--epochs", type=number(int, 1), metavar="N", help="passes over the unlabelled training images")
    add("--lr", type=number(float, 0), metavar="X", help="learning rate at the start")
    add("--teacher-momentum", type=number(float, 0, 1), metavar="A", help="share of itself the teacher keeps in a step")
    if stage == "pretrain":
        add("--init", choices=["random", "imagenet"], help="weights to start from")
        add("--keys", type=number(int, 1), metavar="M", help="key views of an image")
        add("--queue", type=number(int, 1), metavar="K", help="negatives, in embeddings")
        add("--temperature", type=number(float, 1e-3), metavar="T", help="divides the cosine similarities")
        add("--covariance-weight", type=number(float, 0), metavar="LAMBDA", help="of the last epoch; 0 is plain InfoNCE")
        add("--dim", type=number(int, 1), metavar="D", help="length of an embedding")
    else:
        add("--from", dest="start", metavar="CHECKPOINT", help="a pretrain.pt, or scratch, or imagenet (the newest "
            "pretrain.pt under runs/)")
        add("--labels", type=label_choice, help="share of each class (0.02), number of images (500), or a file of "
            "image names")
        add("--consistency", type=number(float, 0), metavar="W", help="largest weight of the unlabelled images; 0 leaves "
            "them out")


def parse_args(argv=None):
    """Read the command line and settle every setting: given ones first, then the checkpoint's, then the recipe's.

    argv  list of str, sys.argv[1:] unless given. Returns an argparse.Namespace. Raises UserError.
    """
    parser = Parser(prog="s2mts2.py", description=__doc__.split("\n")[0],
                    epilog="Defaults in brackets; all others come from the data set's recipe in s2mts2.py.")
    stages = parser.add_subparsers(dest="stage", required=True, metavar="pretrain|finetune|evaluate")
    for stage, what in (("pretrain", "stage 1: joint contrastive learning, without labels"),
                        ("finetune", "stage 2: mean teacher with a few labels, and its test"),
                        ("evaluate", "test a finetune.pt again")):
        add_switches(stages.add_parser(stage, help=what, description=what), stage)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    always = dict(root=None, cache=None, device="auto", amp=True, out=None)

    if given["stage"] == "evaluate":
        path = given.setdefault("checkpoint", newest("finetune"))
        return argparse.Namespace(**always | dict(batch=64) | inherited(path, "finetune") | given)

    always |= dict(seed=0, fresh=False)
    if given["stage"] == "pretrain":
        data = given.setdefault("data", "digits")
        settled = always | RECIPES[data]["pretrain"] | given
    else:
        path = given.setdefault("start", None) or newest("pretrain", given.get("data"))
        if path in ("scratch", "imagenet"):
            data = given.setdefault("data", "digits")
            theirs = dict(arch=RECIPES[data]["pretrain"]["arch"])
        else:
            theirs = inherited(path, "pretrain")
            data = given.setdefault("data", theirs["data"])
            # A size of one's own holds for both stages; the recipe's may differ between them.
            if theirs["size"] == RECIPES[theirs["data"]]["pretrain"]["size"]:
                del theirs["size"]
            if data != theirs["data"]:
                del theirs["root"]
        settled = always | RECIPES[data]["finetune"] | theirs | given | dict(start=str(path))
    args = argparse.Namespace(**settled)
    smallest = 32 if args.arch == "densenet121" else 16
    if args.size < smallest:
        raise UserError(f"--size {args.size} is too small: {args.arch} halves it five times, give at least {smallest}")
    if args.arch != "densenet121" and "imagenet" in (settled.get("init"), settled.get("start")):
        raise UserError(f"there are no ImageNet weights for --arch {args.arch}: use densenet121 or random weights")
    return args


def newest(stage, data=None):
    """Path of the newest checkpoint of a stage under runs/, of one data set if it is named."""
    found = sorted(Path("runs").rglob(f"{stage}.pt"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found:
        if data in (None, load_checkpoint(path, stage)["settings"]["data"]):
            return path
    raise UserError(f"no {stage}.pt under runs/; first run: python s2mts2.py {stage}" + (f" --data {data}" * bool(data)))


def inherited(path, stage):
    """What the next command takes over from a checkpoint: data, where it is, size, network, output folder."""
    checkpoint = load_checkpoint(path, stage)
    return dict({name: checkpoint["settings"][name] for name in ("data", "size", "arch")},
                root=checkpoint["root"], out=str(Path(path).parent))


def main(argv=None):
    """Run a command line. Returns the exit status: 0, 2 for what the user can mend, 130 on Ctrl-C."""
    try:
        args = parse_args(argv)
        data = load_data(args.data, args.root, args.size, args.cache)
        if args.stage == "pretrain":
            pretrain(data, args)
        elif args.stage == "finetune":
            finetune(data, args)
        else:
            evaluate_checkpoint(data, args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on after the last finished epoch", file=sys.stderr)
        return 130
    return 0


def evaluate_checkpoint(data, args):
    """Test the student and the teacher of a finetune.pt."""
    state, device = load_checkpoint(args.checkpoint, "finetune")["state"], choose_device(args.device)
    student, teacher = (build_network(args.arch, data.images.shape[1], len(data.classes)) for _ in range(2))
    student.load_state_dict(state["student"])
    teacher.load_state_dict(state["teacher"])
    return report(student.to(device), teacher.to(device), data, args)


if __name__ == "__main__":
    sys.exit(main())
