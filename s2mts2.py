"""S2MTS2: self-supervised mean teacher for semi-supervised image classification, in one file.

This file implements "Self-supervised Mean Teacher for Semi-supervised Chest X-ray Classification"
(Liu, Tian, Cordeiro, Belagiannis, Reid and Carneiro, MLMI 2021, arXiv 2103.03629).

Images are plentiful, labels are expensive. The method trains two networks of the same shape. The
STUDENT is trained by gradient descent. The TEACHER is an exponential moving average (EMA) of the
student: after each step, teacher <- a teacher + (1 - a) student. An average over many steps is more
accurate than one step, so the teacher can provide targets for the student.

    Stage 1, pretrain: all images, no labels.

        image --> 1 query view --> student --> q ------------------+
          |                           |                            |
          |                           | EMA of the weights         +--> joint contrastive loss,
          |                           v                            |    trains the student
          +-----> M key views ---> teacher --> k_1 ... k_M --------+
                                                 | mean            |
                                                 v                 |
                                        queue of past means: n_1 ... n_K

    Stage 2, finetune: the same two networks with a new classifier, few labels.

        labelled image --> a view --> student --> p -- cross-entropy with its label --+
                                                                                      +--> trains
        unlabelled image > view 1 --> student --> p --+                               |    the
                 |                                    +-- mean squared difference ----+    student
                 +-------> view 2 --> teacher --> p' -+           times w

    The teacher of stage 2 is the result. The student is tested too.

Commands:
    a laptop            python s2mts2.py pretrain && python s2mts2.py finetune
    each ingredient     python s2mts2.py ablate --seeds 10
    MoCo instead        python s2mts2.py pretrain --keys 1 --covariance-weight 0 --out runs/moco
    your own images     python s2mts2.py pretrain --data DIR && python s2mts2.py finetune
    new images          python s2mts2.py predict IMAGES
    several GPUs        torchrun --nproc_per_node=4 s2mts2.py pretrain --data cxr14 --root DIR

Symbols of the paper, names in this file, shapes:
    q, k_m, n_j   query [N, D], keys [N, M, D], queue [K, D]: embeddings and negatives
    mu, Sigma     mean (it enters the queue) and covariance (never formed) of the keys of an image
    t             temperature
    c, lambda     covariance_weight; args.covariance_weight, which is c in the last epoch
    a, w          teacher_momentum, the EMA decay; weight of the consistency loss
    p, p'         probabilities [N, C] of student and teacher
N images in a batch, M keys of an image, D dimensions of an embedding, K negatives, C classes.

A tag names the source of the sentence or paragraph that follows it: [paper], [authors' code]
(github.com/FBLADL/semi-chest), [Mean Teacher] (arXiv 1703.01780), [JCL] (joint contrastive loss,
arXiv 2009.14776), [MoCo] (arXiv 1911.05722), [ACPL] (github.com/FBLADL/ACPL, the authors' label
lists), [our choice]. [plumbing] is code that is not part of the method.

Map: 1 settings   2 network and teacher   3 joint contrastive loss   4 stage 1   5 stage 2
     6 evaluation   -- a first reader can stop there --   7 metrics, report, ablation   8 views
     9 data   10 runs and checkpoints   11 devices and processes   12 command line
"""

import argparse
import copy
import csv
import ctypes
import io
import json
import math
import os
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from sklearn import datasets, metrics, model_selection
from torch import distributed, nn
from tqdm import tqdm


class UserError(Exception):
    """An error that the user can fix. The text is one line and says what to do."""


def require(condition, message):
    """Raise UserError unless the condition holds."""
    if not condition:
        raise UserError(message)


# ---- 1. Settings ---------------------------------------------------------------------------------

# One column for each recipe; a single value holds for all. Each row is an option of its stage; the
# strengths of the views are options of both. --temperature 0.1 overrides the recipe.
#   cxr14, chexpert, isic2018   [authors' code] unless a row says otherwise. For DenseNet-121.
#   digits                      [our choice] Chosen on held-out training images, but after an
#                               earlier recipe was seen on the test images; see README, Results.
#   small                       [our choice] All other data, and --arch tiny on all but digits.
#                               On held-out images of ISIC2018 these were not clearly better:
#                               lambda 0 or 1; at equal cost MoCo or five keys; in stage 1 a shorter
#                               queue or another EMA decay; in stage 2 stronger views. 10 epochs of
#                               stage 2 with consistency 50 were slightly better, in twice the time.
RECIPES = ("cxr14", "chexpert", "isic2018", "digits", "small")

# [authors' code] pretrain.py and dataloader.py.
PRETRAIN = dict(
    arch=("densenet121", "densenet121", "densenet121", "tiny", "tiny"),
    init=("imagenet", "imagenet", "imagenet", "random", "random"),
    # Side of a view, pixels. [our choice] 224 for chexpert and isic2018; the authors use 256.
    size=(256, 224, 224, 32, 32),
    # Passes over the training images; images in a step.
    epochs=(100, 100, 100, 45, 45),
    batch=(256, 256, 256, 64, 128),
    # SGD: learning rate of the first epoch, its schedule (see learning_rate), momentum, L2 penalty.
    lr=(0.03, 0.03, 0.03, 0.06, 0.06),
    schedule="cosine", momentum=0.9, weight_decay=1e-4,
    # EMA decay a: the average covers about the last 1 / (1 - a) steps.
    teacher_momentum=(0.999, 0.999, 0.999, 0.99, 0.99),
    # M, key views of an image; [JCL] 4. D, dimensions. K, negatives, at most the training images.
    keys=(2, 5, 5, 2, 2),
    dim=128,
    queue=(65536, 65536, 65536, 512, 4096),
    # t, in units of cosine similarity; [JCL] 0.2.
    temperature=(0.07, 0.07, 0.07, 0.4, 0.07),
    # lambda, the value of c in the last epoch; [JCL] also 2.
    covariance_weight=2.0,
    # Strengths of the views, see PLAIN. [our choice] The vertical flip of isic2018.
    centre=(0.0, 0.0, 0.25, 0.0, 0.0),
    crop=(0.8, 0.8, 0.0, 0.5, 0.8),
    rotate=(10.0, 10.0, 10.0, 25.0, 25.0),
    rotate_p=(0.5, 0.5, 1.0, 1.0, 1.0),
    flip_p=(0.5, 0.5, 0.5, 0.0, 0.5),
    vertical_flip_p=(0.0, 0.0, 0.5, 0.0, 0.0),
    jitter=(0.4, 0.4, 0.4, 0.4, 0.2),
    jitter_p=0.8,
    hue=(0.4, 0.4, 0.4, 0.0, 0.02),
    blur=(2.0, 2.0, 2.0, 0.0, 0.0),
    blur_p=(0.5, 0.5, 0.5, 0.0, 0.0),
    erase_p=(0.5, 0.0, 0.0, 0.0, 0.0),
)

# [authors' code] cxr14 is a blend. The last script has size, batch, optimizer, schedule, 2 % of the
# labels, and 10 epochs of supervised loss only. Epochs, EMA decay, consistency weight and ramp are
# from the older scripts for CheXpert and ISIC2018.
FINETUNE = dict(
    # [our choice] 224 for isic2018.
    size=(512, 224, 224, 32, 64),
    epochs=(30, 30, 80, 14, 5),
    # Unlabelled images in a step; as many labelled images, or all of them if they are fewer.
    batch=(16, 64, 16, 32, 64),
    # Steps of an epoch, at least: with a few hundred images stage 2 would be too short.
    min_steps=(0, 0, 0, 0, 75),
    # AdamW; without weight decay it is Adam. This eps is far above most gradients, so a step is
    # nearly that of SGD with a learning rate of lr / eps, 0.5 or 1. With few labels such steps
    # can overwrite the features of stage 1. Few epochs and an early w, as in small, limit this.
    lr=(0.05, 0.05, 0.05, 0.1, 0.05),
    beta1=0.9, beta2=0.99, eps=0.1,
    weight_decay=(0.0, 0.01, 0.0, 0.0, 0.0),
    schedule=("steps", "cosine", "cosine", "cosine", "cosine"),
    teacher_momentum=(0.999, 0.999, 0.999, 0.97, 0.99),
    # Weight w of the consistency loss; fraction of the epochs in which w increases to it. w is 0 in
    # the first epoch; in the last, if ramp is 1, consistency * (epochs - 1) / epochs.
    consistency=(1.0, 1.0, 1.0, 200.0, 20.0),
    ramp=(1.0, 1.0, 1.0, 1.0, 0.33),
    # Labels in use, see choose_labelled. With --arch tiny the first three keep theirs. [our choice]
    # CheXpert: the authors' lists are unpublished.
    labels=(0.02, 0.02, 0.2, 10, "all"),
    # Strengths of the views; those of PLAIN that are not here are 0. [our choice] The rotation of
    # cxr14, the vertical flip of isic2018. The recipe small changes colours as little as stage 1:
    # with more, stage 2 lost much of what stage 1 had added.
    crop=(0.8, 0.8, 0.8, 0.4, 0.2),
    rotate=(5.0, 10.0, 10.0, 20.0, 10.0),
    rotate_p=1.0,
    flip_p=(0.5, 0.5, 0.5, 0.0, 0.5),
    vertical_flip_p=(0.0, 0.0, 0.5, 0.0, 0.0),
    jitter=(0.0, 0.4, 0.0, 0.4, 0.2),
    jitter_p=(0.0, 0.8, 0.0, 0.8, 0.8),
    hue=(0.0, 0.4, 0.0, 0.0, 0.02),
)


# ---- 2. Network and teacher ----------------------------------------------------------------------

def build_network(arch, channels, outputs, head="linear", imagenet=False):
    """torchvision's DenseNet with a new head: float32 [N, channels, side, side] -> [N, outputs].

    arch      "densenet121" [paper]; "tiny", a DenseNet of 0.14 million weights for small images
    channels  1 or 3
    outputs   int: D for head "mlp", C for head "linear"
    head      "mlp": projection head of stage 1, dropped after it; "linear": classifier
    imagenet  bool: start densenet121 from torchvision's ImageNet weights, a download of 31 MB
    Returns an nn.Module. Raises OSError if the weights cannot be downloaded.
    """
    if arch == "densenet121":
        network = torchvision.models.densenet121(weights="IMAGENET1K_V1" if imagenet else None)
    else:
        network = torchvision.models.DenseNet(16, block_config=(2, 4, 4), num_init_features=32)
    if channels == 1:
        # Three equal channels through a filter are one channel through the sum of the filter. The
        # network starts as exactly the one that sees three copies of the normalised grey image.
        stem = network.features.conv0
        stem.weight, stem.in_channels = nn.Parameter(stem.weight.sum(1, keepdim=True)), 1
    features = network.classifier.in_features
    network.classifier = nn.Linear(features, outputs)
    if head == "mlp":
        network.classifier = nn.Sequential(nn.Linear(features, features), nn.ReLU(),
                                           network.classifier)
    # [plumbing] The channels of a pixel stand side by side in memory: convolutions run faster.
    return network.to(memory_format=torch.channels_last)


def make_teacher(student):
    """A copy of the student. No gradient reaches it; only ema_update changes its weights.

    Why no gradient, stage 1: [MoCo] keys of earlier steps stay in the queue. They are comparable
    with new keys only if the teacher changes slowly. This also saves M of M + 1 backward passes.
    Why no gradient, stage 2: [Mean Teacher] the consistency loss asks two networks to agree. If
    both could move, the two networks could collapse to a trivial solution, one output for all
    unlabelled images.

    BatchNorm of the teacher. In stage 1 and 2 it normalises with the statistics of its batch. In
    stage 2 this batch has unlabelled images only; the student's batch has both kinds. In evaluation
    it uses running statistics: [our choice] the EMA of the student's, not changed by the teacher's
    own passes. They describe past students, not the present teacher. A teacher that normalises with
    them in stage 1 does not learn: measured on digits, the loss stays at log(K + 1), chance level.
    """
    teacher = copy.deepcopy(student).requires_grad_(False)
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            # PyTorch: running <- (1 - momentum) * running + momentum * batch.
            module.momentum = 0.0
    return teacher


@torch.no_grad()
def ema_update(teacher, student, momentum):
    """[paper] teacher <- momentum * teacher + (1 - momentum) * student, in place.

    teacher, student  nn.Modules of the same architecture; the student does not change
    momentum          float in [0, 1], the EMA decay a
    After n updates with students theta_1 ... theta_n the teacher theta' is a weighted mean,
        theta'_n = a^n theta'_0 + (1 - a) sum_{i=1..n} a^(n-i) theta_i.
    [our choice] BatchNorm's running statistics are averaged like weights; its integer counter is
    copied. In the authors' code the counter stays behind.
    """
    averages = [*teacher.parameters(), *teacher.buffers()]
    latest = [*student.parameters(), *student.buffers()]
    for average, value in zip(averages, latest, strict=True):
        if average.is_floating_point():
            average.lerp_(value, 1 - momentum)
        else:
            average.copy_(value)


# ---- 3. Joint contrastive loss -------------------------------------------------------------------

def joint_contrastive_loss(query, keys, queue, temperature, covariance_weight):
    """[paper] The loss of [JCL]: contrast a query with infinitely many keys of its own image.

    query              float [N, D], unit length
    keys               float [N, M, D], unit length, no gradient; the positives
    queue              float [K, D], no gradient; the negatives
    temperature        float > 0, t
    covariance_weight  float >= 0, c; c = 0 and M = 1 is MoCo's InfoNCE
    Returns a scalar, the mean over the N images.

    InfoNCE asks which of 1 + K vectors is the key of this query. It is a cross-entropy,
        -log( e^(q.k/t) / (e^(q.k/t) + sum_j e^(q.n_j/t)) ),
    and depends on the one random view behind k. JCL asks for its mean over all possible views.
    Model the keys of an image as a Gaussian with mean mu and covariance Sigma. Then
      - the mean of -q.k/t is -q.mu/t;
      - the mean of log(e^(q.k/t) + ...) is at most log(mean of e^(q.k/t) + ...), because log is
        concave (Jensen's inequality);
      - the mean of e^(q.k/t) is e^(q.mu/t + q^T Sigma q / (2 t^2)) (moment-generating function).
    So the mean over infinitely many keys is at most, with c = 1,
        loss = log( e^(q.mu/t + c q^T Sigma q / (2 t^2)) + sum_j e^(q.n_j/t) ) - q.mu/t.
    For c < 1 the loss may not be an upper bound. Even for c = 1 the bound is approximate: unit
    vectors are not Gaussian, and mu and Sigma are estimated from M keys. The covariance term is
    large where the keys of an image differ along the query. It turns the query to directions in
    which they agree.

    [authors' code] Sigma is the biased covariance, the mean of (k - mu)(k - mu)^T. So q^T Sigma q
    / t^2 is the biased variance of the M numbers q.k_m / t, and no D x D matrix is formed.
    """
    positives = torch.einsum("nd,nmd->nm", query, keys) / temperature   # [N, M]
    mean = positives.mean(1)                                            # [N]
    # 1/t^2 is already in `positives`.
    variance = positives.var(1, unbiased=False)                         # [N]
    positive = mean + covariance_weight / 2 * variance                  # [N]
    negatives = query @ queue.T / temperature                           # [N, K]
    logits = torch.cat([positive[:, None], negatives], 1)               # [N, 1 + K]
    # Minus mean, not minus positive: in the loss the covariance stands only inside the log.
    return (logits.logsumexp(1) - mean).mean()


# ---- 4. Stage 1: pretrain ------------------------------------------------------------------------

# The student sees one view of an image. It must distinguish the teacher's keys of other views of
# this image from K negatives, key means of earlier images. No label is needed.
#
# [MoCo] Queue: a few negatives are easy to reject and teach little, so the key means of the last K
# images are kept. Keys of a quickly changing teacher would differ by their age, and the student
# could recognise old keys without looking at the image. Hence an EMA decay close to 1.
# Temperature t: a low value gives most weight to the most similar negatives, which separates images
# that look alike. A high value treats all negatives alike.
# BatchNorm leakage: an embedding depends on the other images of its batch. A query and its keys
# share these images, so the student could find its keys by this trace. MoCo shuffles the images
# between GPUs. [our choice] Not done: an earlier version of this file with BatchNorm in shuffled
# groups did not improve stage 1. Several GPUs use SyncBatchNorm as in MoCo v3 (arXiv 2104.02057):
# loss and BatchNorm statistics are those of one GPU; only the random views differ.


def pretrain(data, args):
    """Pre-train student and teacher on all training images, without labels.

    data  Data
    args  from parse_args(["pretrain", ...])
    Returns (student, teacher). Writes pretrain.pt, log.jsonl and views.png to the output folder.
    Raises UserError if args and data do not match.
    """
    device = choose_device(args.device)
    seed_torch(args.seed, args.stage)
    imagenet = args.init == "imagenet"
    student = build_network(args.arch, data.images.shape[1], args.dim, "mlp", imagenet).to(device)
    teacher = make_teacher(student)
    student, teacher = synchronise(student), synchronise(teacher)
    # [authors' code] Random directions fill the queue at first. They are easy negatives: the loss
    # starts low and increases while keys replace them. [our choice] The queue is at most as long as
    # the training set. The order changes in each epoch, so even then some queries meet an old key
    # of their own image; in a longer queue nearly all would.
    length = min(args.queue, len(data.train))
    queue = F.normalize(torch.randn(length, args.dim), dim=1).to(device)   # [K, D]
    optimizer = torch.optim.SGD(student.parameters(), args.lr, momentum=args.momentum,
                                weight_decay=args.weight_decay, fused=device.type != "mps")
    steps = len(data.train) // args.batch
    # [plumbing] Loads an earlier checkpoint; keeps learning rate, bar, log and checkpoint.
    run = Run(data, args, steps * args.batch, student=student, teacher=teacher,
              optimizer=optimizer, queue=queue)
    save_views(data, args)
    # [plumbing] With several processes: averages gradients.
    embed = nn.parallel.DistributedDataParallel(student) if PROCESSES > 1 else student

    for epoch in range(run.epochs_done, args.epochs):
        # [plumbing] Sets the learning rate and seeds torch.
        run.start_epoch(epoch)
        # [authors' code] Sigma means little while the network is untrained, so c increases. With
        # lambda = 2, c reaches 1, the value of the bound, in the middle of training.
        covariance_weight = args.covariance_weight * (epoch + 1) / args.epochs
        for indices in batches(data.train, steps, args.batch, args, epoch):
            # uint8 [N, channels, height, width]
            images = torch.from_numpy(data.images[indices]).to(device)
            copies = images.repeat_interleave(args.keys, 0)   # uint8 [N * M, channels, ...]
            query_views = random_views(images, args.augment, args.size)  # [N, channels, size, size]
            key_views = random_views(copies, args.augment, args.size)    # [N * M, channels, ...]
            with mixed_precision(device, args.amp):
                query = F.normalize(embed(query_views).float(), dim=1)   # [N, D]
                with torch.no_grad():
                    keys = F.normalize(teacher(key_views).float(), dim=1)
                    keys = keys.unflatten(0, (-1, args.keys))            # [N * M, D] -> [N, M, D]
            loss = joint_contrastive_loss(query, keys, queue, args.temperature, covariance_weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema_update(teacher, student, args.teacher_momentum)
            enqueue(queue, all_gather(keys.mean(1)))                     # [N, M, D] -> [N, D]
            run.step(loss, args.batch)
        # [plumbing] Writes checkpoint and log.
        run.finish_epoch()
    return student, teacher


def enqueue(queue, means):
    """Put means [N, D] in front of queue [K, D], in place. The oldest drop out at the end.

    [authors' code] The mean of several unit vectors is shorter than 1. It is not normalised again.
    """
    queue.copy_(torch.cat([means, queue])[:len(queue)])


# ---- 5. Stage 2: finetune ------------------------------------------------------------------------

# [Mean Teacher] Labels say what the classes are. Unlabelled images say where a prediction must not
# change: student and teacher see two views of an image and should predict the same. The teacher
# provides the target and is evaluated, because an average over many steps is more accurate.
# [our choice] An epoch shows each unlabelled image about once, or more often if there are few. The
# labelled images repeat. With a consistency weight of 0 the number of steps is the same, so that
# runs can be compared.


def finetune(data, args):
    """Fine-tune student and teacher with a few labels and all unlabelled images, then test both.

    data  Data                             args  from parse_args(["finetune", ...])
    Returns the dict in metrics.json. Writes finetune.pt, log.jsonl, labelled.txt, metrics.json and
    predictions.csv to the output folder. Raises UserError if args and data do not match.
    """
    device = choose_device(args.device)
    labelled = choose_labelled(data, args.labels, args.seed)
    unlabelled = np.setdiff1d(data.train, labelled)
    seed_torch(args.seed, args.stage)
    # [paper] Stage 1's student and teacher with one new, identical classifier.
    student, teacher = load_networks(args, data.images.shape[1], len(data.classes))
    optimizer = torch.optim.AdamW(student.parameters(), args.lr, (args.beta1, args.beta2), args.eps,
                                  args.weight_decay, fused=device.type != "mps")
    steps = max(args.min_steps, math.ceil(max(len(labelled), len(unlabelled)) / args.batch))
    use_unlabelled = args.consistency > 0 and len(unlabelled) > 0
    # L labelled and N unlabelled images in a step. [our choice] L is at most the number of labels.
    batch = min(args.batch, len(labelled))
    print(f"{len(labelled):,} labelled and {len(unlabelled):,} unlabelled training images")
    run = Run(data, args, steps * (batch + args.batch * use_unlabelled), labelled,
              student=student, teacher=teacher, optimizer=optimizer)
    write_file(run.path.with_name("labelled.txt"), "".join(f"{data.names[i]}\n" for i in labelled))

    for epoch in range(run.epochs_done, args.epochs):
        run.start_epoch(epoch)
        # [authors' code] w increases, with ramp = 1 until the end. At first the classifier is
        # random, and so are the teacher's predictions.
        weight = args.consistency * min(1, epoch / (args.ramp * args.epochs))
        pairs = zip(batches(labelled, steps, batch, args, epoch),
                    batches(unlabelled, steps, args.batch, args, epoch))
        for step, (indices, others) in enumerate(pairs):
            targets = torch.from_numpy(data.targets[indices]).to(device)             # [L, C]
            images = torch.from_numpy(data.images[indices]).to(device)  # uint8 [L, channels, ...]
            views = random_views(images, args.augment, args.size)      # [L, channels, size, size]
            if use_unlabelled:
                # [Mean Teacher] Each network has its own view. In the authors' code both see one.
                images = torch.from_numpy(data.images[others]).to(device)  # [N, channels, ...]
                teacher_views = random_views(images, args.augment, args.size)
                student_views = random_views(images, args.augment, args.size)
                views = torch.cat([views, student_views])                  # [L + N, channels, ...]
            with mixed_precision(device, args.amp):
                logits = student(views).float()                            # [L, C] or [L + N, C]
                if use_unlabelled:
                    with torch.no_grad():
                        teacher_logits = teacher(teacher_views).float()    # [N, C]
            loss = supervised_loss(logits[:batch], targets, data.multilabel)
            if use_unlabelled:
                loss = loss + weight * consistency_loss(logits[batch:], teacher_logits,
                                                        data.multilabel)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            # [Mean Teacher] Warm-up: until the decay reaches a, the teacher is the plain mean of
            # its first weights and all students. It forgets the untrained classifier sooner.
            updates = epoch * steps + step + 1
            ema_update(teacher, student, min(1 - 1 / (updates + 1), args.teacher_momentum))
            run.step(loss, len(views))
        run.finish_epoch()
    return report(student, teacher, data, args)


def supervised_loss(logits, targets, multilabel):
    """[paper] Cross-entropy of logits [N, C] with targets [N, C] of 0, 1 or NaN (not known).

    Multi-label: binary cross-entropy, mean over the known targets. Multi-class: cross-entropy, mean
    over the images whose row is known. Returns a scalar; an unknown target has a gradient of 0.
    """
    if multilabel:
        known = ~targets.isnan()
        losses = F.binary_cross_entropy_with_logits(logits, targets.nan_to_num(), reduction="none")
    else:
        known = ~targets.isnan().any(1)
        losses = F.cross_entropy(logits, targets.nan_to_num(), reduction="none")
    return losses.where(known, 0).sum() / known.sum()


def consistency_loss(student_logits, teacher_logits, multilabel):
    """[paper] Mean squared difference of probabilities, from logits [N, C]. Returns a scalar.

    Probabilities, not logits: confident and very confident should count as nearly the same.
    """
    return F.mse_loss(probabilities(student_logits, multilabel),
                      probabilities(teacher_logits, multilabel))


def probabilities(logits, multilabel):
    """Sigmoid (multi-label) or softmax (multi-class) of logits [N, C]."""
    return logits.sigmoid() if multilabel else logits.softmax(1)


# ---- 6. Evaluation -------------------------------------------------------------------------------

def evaluate(network, data, indices, size, batch=64):
    """Probabilities of all classes, each image once and in the given order.

    network  from build_network           size   int, side of a view in pixels
    indices  int64 [n], into data.images  batch  int, images at a time
    Returns float32 [n, C].
    """
    blocks = [indices[start:start + batch] for start in range(0, len(indices), batch)]
    return np.concatenate([
        predict_batch(network, torch.from_numpy(data.images[block]), size, data.multilabel)
        for block in tqdm(blocks, "test", unit="batch", leave=False)])


@torch.no_grad()
def predict_batch(network, images, size, multilabel):
    """Probabilities of images, a uint8 tensor [N, channels, height, width]: float32 array [N, C].

    Without bfloat16: it has so few digits that images would have equal probabilities.
    """
    training = network.training
    network.eval()
    views = random_views(images.to(next(network.parameters()).device), PLAIN, size)
    scores = probabilities(network(views), multilabel)
    network.train(training)
    return scores.cpu().numpy()


# ---- A first reader can stop here: the rest is views, data, files and the command line ----------

# ---- 7. Metrics, report, ablation ----------------------------------------------------------------

def classification_metrics(targets, scores, classes, multilabel):
    """Metrics of scores [n, C] for targets [n, C] of 0, 1 or NaN. Returns a dict, all in [0, 1].

    auc       {class: area under the ROC curve over its known targets; None without a positive or
              without a negative}
    mean_auc  mean over the classes that have an AUC; None if no class has one
    Multi-class also: accuracy, and macro_sensitivity, macro_specificity and macro_f1, means over
    the classes that occur in targets.
    """
    auc = {}
    for name, truth, score in zip(classes, targets.T, scores.T, strict=True):
        known = ~np.isnan(truth)
        both = 0 < truth[known].sum() < known.sum()
        auc[name] = float(metrics.roc_auc_score(truth[known], score[known])) if both else None
    values = [value for value in auc.values() if value is not None]
    result = dict(mean_auc=float(np.mean(values)) if values else None, auc=auc)
    if not multilabel:
        truth, prediction = targets.argmax(1), scores.argmax(1)
        # For each class that occurs: true negatives, false positives and so on.
        counts = metrics.multilabel_confusion_matrix(truth, prediction, labels=np.unique(truth))
        tn, fp, fn, tp = counts.reshape(-1, 4).T
        means = dict(accuracy=truth == prediction, macro_sensitivity=tp / (tp + fn),
                     macro_specificity=tn / np.maximum(tn + fp, 1),
                     macro_f1=2 * tp / (2 * tp + fp + fn))
        result |= {name: float(np.mean(values)) for name, values in means.items()}
    return result


def report(student, teacher, data, args):
    """Evaluate both networks on the test images. Print a table, best class first.

    Writes metrics.json and predictions.csv. Returns the dict in metrics.json: the teacher's
    classification_metrics, and the student's under "student". Test images select nothing, neither
    an epoch nor a network. n/a: a class without a positive or negative test image, not in the mean.
    """
    targets, out = data.targets[data.test], output_folder(data, args)
    scores = [evaluate(network, data, data.test, args.size) for network in (teacher, student)]
    result, students = (classification_metrics(targets, each, data.classes, data.multilabel)
                        for each in scores)
    best_first = sorted(data.classes, key=lambda name: -(result["auc"][name] or 0))
    print(f"{f'AUC on {len(targets):,} test images':28} teacher  student")
    for name in [*best_first, *(name for name in result if name != "auc")]:
        values = [(each | each["auc"])[name] for each in (result, students)]
        print(f"{name:27}", *("     n/a" if value is None else f"{value:8.4f}" for value in values))
    result["student"] = students
    write_file(out / "metrics.json", json.dumps(result, indent=1) + "\n")
    names = [data.names[index] for index in data.test]
    write_predictions(out / "predictions.csv", data.classes, names, scores[0])
    print(f"written to {out}: metrics.json, predictions.csv")
    return result


def write_predictions(path, classes, names, scores):
    """A CSV file with the probabilities [n, C] of images, six significant digits."""
    table = io.StringIO()
    rows = [[name, *map("{:.6g}".format, row)] for name, row in zip(names, scores)]
    csv.writer(table, lineterminator="\n").writerows([["image", *classes], *rows])
    write_file(path, table.getvalue())


# What is each ingredient worth? Leave it out. Each row is a start of stage 2, a stage 1 of STARTS
# or none, and the settings of stage 2 that differ. The teacher is evaluated in every row.
STARTS = dict(moco=dict(keys=1, covariance_weight=0.0), jcl={})
ABLATION = {"scratch + supervised": dict(consistency=0.0), "scratch + mean teacher": {},
            "moco + mean teacher": {}, "jcl + supervised": dict(consistency=0.0),
            "jcl + mean teacher": {}}


def ablate(args):
    """Run the five rows of ABLATION with seeds 0 to args.seeds - 1. Print a table.

    A seed has the same labels in every row. An option such as --lr sets both stages. Each run has a
    folder in args.out; a finished run is only evaluated again. Returns the dict in ablation.json,
    {row: {metric: [value of each seed]}}.
    """
    # Stage 2 first: its wrong settings, except labels, raise an error before the first run.
    data2, data1 = (data_for(settings_of(stage, args.given | dict(start="scratch")))
                    for stage in ("finetune", "pretrain"))
    out = Path(args.out or f"runs/{data1.name}/ablation")
    table = {row: {} for row in ABLATION}
    first = "imagenet" if args.init == "imagenet" else "scratch"
    for seed in range(args.seeds):
        for name, changes in STARTS.items():
            changes = changes | dict(seed=seed, out=f"{out}/{name}-{seed}")
            pretrain(data1, settings_of("pretrain", args.given | changes))
        for row, changes in ABLATION.items():
            start, folder = row.split(" + ")[0], row.replace(" + ", "-").replace(" ", "-")
            # Without stage 1: the weights from which stage 1 starts.
            start = first if start == "scratch" else f"{out}/{start}-{seed}/pretrain.pt"
            changes = changes | dict(seed=seed, out=f"{out}/{folder}-{seed}", start=start)
            result = finetune(data2, settings_of("finetune", args.given | changes))
            for metric in sorted(result.keys() - {"auc", "student"}):
                table[row].setdefault(metric, []).append(result[metric])
        write_file(out / "ablation.json", json.dumps(table, indent=1) + "\n")
    print(f"\nteacher, mean +- standard deviation over seeds 0 to {args.seeds - 1}")
    for row, columns in table.items():
        print(f"{row:24}", *(f"{metric} {np.mean(values):.4f} +- {np.std(values, ddof=1):.4f} "
                             for metric, values in columns.items() if None not in values))
    return table


# ---- 8. Views ------------------------------------------------------------------------------------

# A view shows an image with another position, exposure or sharpness. The networks learn to ignore
# what differs between views. random_views samples the random numbers; the others take them.

# The strengths of a view. All zero: no random change, for evaluation.
PLAIN = dict(
    # Fraction of the width that is removed, half of it on each side, before the crop.
    centre=0.0,
    # Random crop: largest fraction of the area that is cut off; 0.8 is torchvision's (0.2, 1).
    crop=0.0,
    # Rotation: largest angle in degrees. A name with _p is a probability.
    rotate=0.0, rotate_p=0.0, flip_p=0.0, vertical_flip_p=0.0,
    # Brightness, contrast, saturation: factors from 1 - jitter to 1 + jitter. Hue: largest
    # rotation, in fractions of a circle. jitter_p is for the four together.
    jitter=0.0, hue=0.0, jitter_p=0.0,
    # Gaussian blur: largest standard deviation in pixels; the smallest is 0.1. Erasing of a
    # random rectangle.
    blur=0.0, blur_p=0.0, erase_p=0.0)

# [our choice] One normalisation for both stages and evaluation: mean and standard deviation of
# ImageNet, for grey images their mean over the colours.
NORMALISATION = {1: ([0.449], [0.226]), 3: ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])}


def random_views(images, augment, size):
    """One random view of each image. Each image has its own random numbers, from torch's generator.

    images   uint8 [N, channels, height, width], or float in [0, 1]; 1 or 3 channels, any device
    augment  dict with the keys of PLAIN
    size     int, side of the views in pixels
    Returns float32 [N, channels, size, size] on the same device, normalised.
    """
    count, device = len(images), images.device
    # [plumbing] A CPU is fastest with as many images at a time as its cache holds.
    at_once = max(1, 2**20 // size**2)
    if device.type == "cpu" and count > at_once:
        return torch.cat([random_views(part, augment, size) for part in images.split(at_once)])
    images = images / 255 if images.dtype == torch.uint8 else images.float().clone()

    def uniform(low, high):
        """Random numbers [N] from low to high."""
        return torch.empty(count, device=device).uniform_(low, high)

    def sometimes(probability):
        """1 with the probability, else 0, [N]."""
        return (torch.rand(count, device=device) < probability).float()

    # [our choice] Resize first, so that all views of a batch have one shape. torchvision crops at
    # full resolution.
    if images.shape[-2:] != (size, size):
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    if any(augment[name] for name in ("centre", "crop", "rotate", "flip_p", "vertical_flip_p")):
        ratio = 4 / 3 if augment["crop"] else 1
        left, top, width, height = rectangle(uniform, 1 - augment["crop"], 1, ratio)
        kept = 1 - augment["centre"]
        left, width = (1 - kept) / 2 + kept * left, kept * width
        angle = uniform(-1, 1) * augment["rotate"] * sometimes(augment["rotate_p"])
        flips = sometimes(augment["flip_p"]), sometimes(augment["vertical_flip_p"])
        images = crop_rotate_flip(images, left, top, width, height, angle, *flips)
    if augment["jitter_p"]:
        chosen = sometimes(augment["jitter_p"])
        factors = [1 + chosen * augment["jitter"] * uniform(-1, 1) for _ in range(3)]
        images = jitter_colours(images, *factors, chosen * augment["hue"] * uniform(-1, 1))
    # Blur is expensive, so only some images go through it: blur_p * count, rounded at random.
    blurred = int(augment["blur_p"] * count + torch.rand(()))
    if blurred and augment["blur"]:
        chosen = torch.rand(count, device=device).argsort()[:blurred]
        sigma = uniform(min(0.1, augment["blur"]), augment["blur"])[:blurred]
        images[chosen] = gaussian_blur(images[chosen], sigma, augment["blur"])
    mean, std = torch.tensor(NORMALISATION[images.shape[1]], device=device).view(2, -1, 1, 1)
    images.sub_(mean).div_(std)
    if augment["erase_p"]:
        # After the normalisation 0 is the mean grey of ImageNet.
        left, top, width, height = rectangle(uniform, 0.02, 0.33, 3.3)
        images = erase(images, left, top, width * sometimes(augment["erase_p"]), height)
    return images


def rectangle(uniform, smallest, largest, ratio):
    """Random rectangles: left, top, width, height [N], as fractions of the image's side.

    uniform            (low, high) -> random numbers [N]
    smallest, largest  area, as a fraction of the image's; ratio: largest ratio of the sides
    [our choice] A side longer than the image is cut to it, where torchvision samples again.
    """
    area, ratio = uniform(smallest, largest), torch.exp(uniform(-1, 1) * math.log(ratio))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    return uniform(0, 1) * (1 - width), uniform(0, 1) * (1 - height), width, height


def crop_rotate_flip(images, left, top, width, height, angle, flip, vertical_flip):
    """Crop, resize to the old size, rotate, flip: one affine map and one bilinear resampling.

    images                    float32 [N, channels, side, side]; the same shape is returned
    left, top, width, height  float32 [N], the crop as fractions of the side
    angle                     float32 [N], degrees counter-clockwise
    flip, vertical_flip       float32 [N], 1 to flip, 0 not to
    Outside of the image a view is black.
    """
    # From a pixel of the view back to the image: flip, rotate, shrink to the crop, move to it. Both
    # coordinates run from -1 to 1. F.affine_grid gives the same grid, but is slower on a CPU.
    cos, sin = torch.deg2rad(angle).cos(), torch.deg2rad(angle).sin()
    flip, vertical_flip = 1 - 2 * flip, 1 - 2 * vertical_flip
    place = (2 * torch.arange(images.shape[-1], device=images.device) + 1) / images.shape[-1] - 1
    column = torch.stack([width * cos * flip, height * sin * flip])                    # [2, N]
    row = torch.stack([-width * sin * vertical_flip, height * cos * vertical_flip])    # [2, N]
    shift = torch.stack([2 * left + width - 1, 2 * top + height - 1])                  # [2, N]
    across, down = column[..., None] * place + shift[..., None], row[..., None] * place
    grid = across[:, :, None, :] + down[:, :, :, None]                   # [2, N, side, side]
    return F.grid_sample(images, grid.permute(1, 2, 3, 0), align_corners=False)


def jitter_colours(images, brightness, contrast, saturation, hue):
    """Change brightness, contrast, saturation (factors [N]) and hue (fraction of a circle [N]).

    images  float32 [N, channels, height, width] in [0, 1]; the same shape is returned
    Grey images have no saturation and hue.
    """
    grey = images
    if images.shape[1] == 3:
        # In YIQ the first coordinate is the grey level, and the other two span the colours. So
        # saturation is a factor and hue a rotation of a plane: one 3 x 3 matrix for each image.
        # [our choice] torchvision rotates the hue in HSV, which no matrix can.
        to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.275, -0.321],
                               [0.212, -0.523, 0.311]], device=images.device)
        cos = saturation * torch.cos(2 * math.pi * hue)
        sin = saturation * torch.sin(2 * math.pi * hue)
        one, zero = torch.ones_like(cos), torch.zeros_like(cos)
        rows = [one, zero, zero, zero, cos, -sin, zero, sin, cos]
        matrix = to_yiq.inverse() @ torch.stack(rows, 1).view(-1, 3, 3) @ to_yiq
        images = torch.einsum("nij,njhw->nihw", matrix, images)
        grey = torch.einsum("c,nchw->nhw", to_yiq[0], images)
    # contrast * (brightness * pixel) + (1 - contrast) * (brightness * mean), in one pass.
    mean = brightness * grey.flatten(1).mean(1)
    shift, factor = (1 - contrast) * mean, contrast * brightness
    return (images * factor.view(-1, 1, 1, 1)).add_(shift.view(-1, 1, 1, 1)).clamp_(0, 1)


def gaussian_blur(images, sigma, largest):
    """Blur images [N, channels, height, width] with standard deviations sigma [N] <= largest."""
    # A Gaussian is close to 0 beyond three standard deviations.
    radius = math.ceil(3 * largest)
    distance = torch.arange(-radius, radius + 1, device=images.device)
    weights = torch.softmax(-distance.square() / (2 * sigma.square()[:, None]), 1)
    # A Gaussian is a separable kernel: rows first, then columns. As a depthwise convolution, with
    # all images as its channels, each image has a kernel of its own.
    weights = weights.repeat_interleave(images.shape[1], 0)
    blurred = F.pad(images.flatten(0, 1)[None], [radius] * 4, mode="reflect")
    blurred = F.conv2d(blurred, weights[:, None, None, :], groups=len(weights))
    blurred = F.conv2d(blurred, weights[:, None, :, None], groups=len(weights))
    return blurred.view(images.shape)


def erase(images, left, top, width, height):
    """Set a rectangle of each image [N, channels, height, width] to 0, in place; fractions [N]."""
    def inside(start, length, side):
        """1 for the pixels of a row or column from start to start + length, else 0: [N, side]."""
        place = (torch.arange(side, device=images.device) + 0.5) / side
        return ((place >= start[:, None]) & (place < (start + length)[:, None])).float()

    rows, columns = inside(top, height, images.shape[-2]), inside(left, width, images.shape[-1])
    return images.mul_(1 - rows[:, None, :, None] * columns[:, None, None, :])


# ---- 9. Data -------------------------------------------------------------------------------------

@dataclass
class Data:
    """Images, labels and a split. Can be made by hand.

    name         str; results go to runs/<name>/
    images       uint8 [n, 1 or 3, height, width], in memory or memory-mapped
    targets      float32 [n, C]: 0, 1 or NaN = not known. A row of NaN is an unlabelled image.
    classes      names of the columns of targets
    names        names of the images
    train, test  int64 indices. Unlabelled images are not in test.
    multilabel   True: each class is a yes or no (sigmoid). False: one class an image (softmax), and
                 a row that is not completely known counts as unlabelled.
    Raises UserError, which names the first wrong image.
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
        self.targets = np.asarray(self.targets, np.float32)
        self.train, self.test = np.asarray(self.train, np.int64), np.asarray(self.test, np.int64)
        self.classes, self.names = list(map(str, self.classes)), list(map(str, self.names))
        count, used = len(self.names), np.concatenate([self.train, self.test])
        require(self.images.dtype == np.uint8 and self.images.shape[:-2] in ((count, 1), (count, 3))
                and self.targets.shape == (count, len(self.classes)),
                "not uint8 images [n, 1 or 3, height, width], targets [n, classes] and n names")
        require(len(self.train) and len(self.test) and 0 <= used.min() and used.max() < count,
                "train and test must be indices of images, not empty; see column split")
        require(len({*self.classes} - {""}) == len(self.classes), "class names are equal or empty")
        last = {name: index for index, name in enumerate(self.names)}
        for right, rule in (
                (np.arange(count) == [last[name] for name in self.names], "is there twice"),
                (np.bincount(used, minlength=count) < 2, "is in train and test twice"),
                (np.isin(np.nan_to_num(self.targets), (0, 1)).all(1), "has a wrong target"),
                (self.multilabel | ~self.known | (self.targets.sum(1) == 1), "is not one-hot"),
                (self.known | ~np.isin(np.arange(count), self.test), "is in test without label")):
            require(right.all(), f"image {self.names[right.argmin()]} {rule}")

    @property
    def known(self):
        """bool [n]: whether an image is labelled."""
        known = ~np.isnan(self.targets)
        return known.any(1) if self.multilabel else known.all(1)


def load_data(name, root=None, size=64, cache=None, uncertain="zeros", partial=False):
    """Load a data set and print a line that describes it. Returns Data.

    name       digits, cxr14, chexpert, isic2018, a folder with labels.csv, or a MedMNIST .npz file
    root       folder of cxr14, chexpert or isic2018; data/<name> unless given
    size       side in pixels of the square to which image files are resized
    cache      folder for the resized images; the folder of the data unless given
    uncertain  CheXpert's -1: "zeros", "ones", or "ignore" (not known)
    partial    bool: use only the image files that are there
    Raises UserError if a file is missing or wrong.
    """
    loaders = dict(cxr14=load_cxr14, chexpert=load_chexpert, isic2018=load_isic2018)
    root = Path(root or f"data/{name}") if name in loaders else Path(name)
    try:
        if name == "digits":
            data = load_digits()
        elif root.suffix == ".npz":
            data = load_npz(root)
        else:
            columns, classes, channels, multilabel = loaders.get(name, load_folder)(root, uncertain)
            kept = [not partial or os.path.exists(path) for path in columns[1]]
            names, paths, split, targets = (np.array(column)[kept] for column in columns)
            train, test = np.flatnonzero(split == "train"), np.flatnonzero(split == "test")
            # Images that need no memory: first all other parts are checked.
            images = np.broadcast_to(np.uint8(0), (len(names), channels, size, size))
            data = Data(title_of(name), images, targets, classes, names, train, test, multilabel)
            # Two folders may have files of the same names.
            folder = Path(cache, *root.resolve().parts[1:]) if cache else root
            data.images = decode_all(data.names, paths.tolist(), size, channels, folder)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot read {root} ({type(error).__name__}: {error}); see README.md")
    kind, known = "multi-label" if data.multilabel else "one class an image", data.known
    counts = ", ".join(map("{} {:,.0f}".format, data.classes, np.nansum(data.targets, 0)))
    print(f"{data.name}: {len(known):,} images, {known.sum():,} labelled, {(~known).sum():,} "
          f"unlabelled; {len(data.train):,} train, {len(data.test):,} test; {kind}: {counts}")
    return data


def title_of(name):
    """The name of a data set in runs/: of a folder or an .npz file its last part."""
    return Path(name).resolve().name.removesuffix(".npz")


def load_digits():
    """scikit-learn's digits: 1,797 grey scans, 8 x 8 pixels, 10 classes. 80 % train, stratified."""
    images, digits = datasets.load_digits(return_X_y=True)
    images = np.round(images * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    names = [f"digit{index:04d}" for index in range(len(images))]
    train, test = model_selection.train_test_split(
        np.arange(len(images)), test_size=0.2, stratify=digits, random_state=0)
    return Data("digits", images, np.eye(10)[digits], range(10), names, train, test, False)


def load_npz(path):
    """A 2D set of MedMNIST (arXiv 2110.14795): {train,val,test}_{images,labels}; val is train."""
    # Not with allow_pickle: object arrays could run code.
    with np.load(path) as file:
        images = np.concatenate([file[f"{part}_images"] for part in ("train", "val", "test")])
        labels = np.concatenate([file[f"{part}_labels"] for part in ("train", "val", "test")])
        train, test = np.split(np.arange(len(labels)), [-len(file["test_labels"])])
    images = images.reshape(*images.shape[:3], -1).transpose(0, 3, 1, 2)
    names, multilabel = [f"image{row:06d}" for row in range(len(labels))], labels.shape[1] > 1
    targets = labels if multilabel else np.eye(labels.max() + 1)[labels[:, 0]]
    classes = range(targets.shape[1])
    return Data(title_of(path), images, targets, classes, names, train, test, multilabel)


CXR14_CLASSES = (
    "Atelectasis Cardiomegaly Effusion Infiltration Mass Nodule Pneumonia Pneumothorax "
    "Consolidation Edema Emphysema Fibrosis Pleural_Thickening Hernia").split()


def load_cxr14(root, uncertain):
    """NIH Chest X-ray14: 14 findings, the official lists of training and test images.

    Returns what all loaders of image files return: (names, paths, split, targets), classes,
    channels, multilabel.
    """
    # The name of the newer table, ..._v2020.csv, is the larger one.
    table = max(root.glob("Data_Entry_2017*.csv"), default=root / "Data_Entry_2017_v2020.csv")
    # Only the first two columns count. Without the csv module 112,120 rows are read sooner.
    findings = dict(line.split(",", 2)[:2] for line in read_lines(table)[1:])
    train, test = read_lines(root / "train_val_list.txt"), read_lines(root / "test_list.txt")
    # A row for each finding; the last row is zero.
    rows = dict(zip([*CXR14_CLASSES, "No Finding"], np.eye(15, 14)))
    targets = [sum(rows[label] for label in findings[name].split("|")) for name in train + test]
    folders = filter(os.path.isdir, [root / "images", root / "data", *root.glob("images_*/images")])
    folder_of = {name: folder for folder in map(str, folders) for name in os.listdir(folder)}
    paths = [f"{folder_of.get(name, root)}/{name}" for name in train + test]
    split = ["train"] * len(train) + ["test"] * len(test)
    return (train + test, paths, split, targets), CXR14_CLASSES, 1, True


def load_chexpert(root, uncertain):
    """CheXpert: 14 observations, all images of train.csv. 70 % of the patients train, 20 % test.

    [our choice] 10 % are in neither part, for tuning. A blank is negative. For -1 the CheXpert
    paper has U-Zeros, U-Ones and U-Ignore. In the test images "ignore" is 0, "ones" 1.
    """
    table = max(root.glob("CheXpert-v1.0*/train.csv"), default=root / "train.csv")
    header, *rows = read_table(table)
    value = {"": 0, "0.0": 0, "1.0": 1, "-1.0": dict(zeros=0, ones=1, ignore=np.nan)[uncertain]}
    targets = np.array([[value[cell] for cell in row[5:]] for row in rows], np.float32)
    # A path starts with the name of the archive; the patient comes after "train".
    names = [row[0].partition("/")[2] for row in rows]
    tenth = np.array([zlib.crc32(name.split("/")[1].encode()) % 10 for name in names])
    targets[tenth < 2] = np.nan_to_num(targets[tenth < 2])
    split = np.select([tenth < 2, tenth < 3], ["test", ""], "train")
    paths = [f"{table.parent}/{name}" for name in names]
    return (names, paths, split, targets), header[5:], 1, True


def load_isic2018(root, uncertain):
    """ISIC2018 task 3: photographs of skin lesions, 7 classes. 80 % of the lesions train.

    Without LesionGroupings.csv images of one lesion may be in train and in test.
    """
    prefix = "ISIC2018_Task3_Training_"
    header, *rows = read_table(root / f"{prefix}GroundTruth" / f"{prefix}GroundTruth.csv")
    names, targets = [row[0] for row in rows], np.array([row[1:] for row in rows], np.float32)
    groups = root / f"{prefix}LesionGroupings.csv"
    lesion = {row[0]: row[1] for row in read_table(groups)} if groups.exists() else {}
    split = ["test" if in_fifth(lesion.get(name, name)) else "train" for name in names]
    paths = [f"{root}/{prefix}Input/{name}.jpg" for name in names]
    return (names, paths, split, targets), header[1:], 3, False


def load_folder(root, uncertain):
    """A folder of PNG and JPEG files, at any depth, with a table labels.csv.

    Columns: image (path in the folder), one for each class (1, 0 or blank = not known), and if
    wanted split (train or test) and group (images of one group stay on one side). Images that are
    not in the table are unlabelled. Without split, a fifth of the labelled groups is the test set.
    """
    table, files = root / "labels.csv", image_files(root)
    header, *rows = read_table(table)
    classes = [name for name in header if name not in ("image", "split", "group")]
    require(header[0] == "image" and classes, f"{table}: needs the column image, then classes")
    rows = [[Path(row[0]).as_posix(), *row[1:]] for row in rows]
    rows += [[name] + [""] * len(header[1:]) for name in set(files) - {row[0] for row in rows}]
    columns = dict(zip(header, zip(*sorted(rows))))
    names, value = columns["image"], {"": np.nan, "0": 0, "1": 1, "0.0": 0, "1.0": 1}
    # Another cell becomes 2: Data names its image. Data also finds an image that is there twice.
    targets = np.array([[value.get(cell, 2) for cell in columns[name]] for name in classes]).T
    require((targets == 0).any(), f"{table}: no 0 in it; write the zeros, a blank is not a 0")
    known = ~np.isnan(targets)
    full = known.all(1)
    one_hot = len(classes) > 1 and full.any() and (targets[full].sum(1) == 1).all()
    groups = [group or name for group, name in zip(columns.get("group", names), names)]
    parts = columns.get("split", ["test" if in_fifth(group) else "" for group in groups])
    labelled = full if one_hot else known.any(1)
    tested = {group for group, part, has in zip(groups, parts, labelled) if has and part == "test"}
    # An unlabelled image of a test group is in neither part.
    split = np.select([~np.isin(groups, list(tested)), labelled], ["train", "test"], "")
    for name, group, part, side in zip(names, groups, parts, split):
        require("split" not in columns or part in ("", side), f"{table}: split is train or test, "
                f"one for a group, test needs labels; see {name}, group {group}")
    paths = [f"{root}/{name}" for name in names]
    grey = all(Image.open(path).mode in ("1", "L", "LA") for path in paths)
    return (names, paths, split, targets), classes, 1 if grey else 3, not one_hot


def image_files(root):
    """Names of the PNG and JPEG files in a folder, at any depth, sorted; none that is hidden, and
    not our own views.png."""
    files = (path.relative_to(root) for path in Path(root).rglob("*.*"))
    names = sorted(file.as_posix() for file in files
                   if file.suffix.lower() in (".png", ".jpg", ".jpeg")
                   and "/." not in f"/{file.as_posix()}" and file.name != "views.png")
    require(names, f"{root} is not a folder with PNG or JPEG files")
    return names


def in_fifth(group):
    """Whether a lesion or a group is one of a fifth, always the same: the test set."""
    return zlib.crc32(group.encode()) % 5 == 0


def read_lines(path):
    """The lines of a text file, without empty lines."""
    lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    return [line.strip() for line in lines if line.strip()]


def read_table(path):
    """Header and rows of a CSV file, lists of str of the same length."""
    table = [[cell.strip() for cell in row] for row in csv.reader(read_lines(path))]
    for number, row in enumerate(table, 1):
        require(len(row) == len(table[0]), f"{path}: row {number} is longer or shorter than row 1")
    return table


def decode(path, size, channels):
    """One image file as uint8 [channels, size, size]. Raises UserError if it is broken."""
    try:
        with Image.open(path) as image:
            # Pillow would cut 16 bits to 8 at white.
            require(image.mode[0] not in "IF", "not 8 bits for each channel")
            image = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
            return np.stack(image.resize((size, size), Image.BILINEAR).split())
    except Exception as error:
        raise UserError(f"cannot read image {path} ({error}); replace it or remove it")


def decode_all(names, paths, size, channels, cache):
    """Decode image files once, to a file in the folder cache. Returns uint8, memory-mapped.

    The file is raw bytes. Until it is complete it is called .part, and its length is the progress.
    When it is complete, cxr14, chexpert and isic2018 open without the image files, unless partial.
    """
    key = zlib.crc32("\0".join(names).encode())
    whole, length = cache / f"{size}px-{channels}-{key:08x}.uint8", channels * size**2
    if RANK == 0 and not whole.exists():
        gone = [str(path) for path in paths if not os.path.exists(path)]
        require(not gone, f"{len(gone):,} of {len(paths):,} image files are missing, such as "
                          f"{gone[:1]}; add them, or for {', '.join(RECIPES[:3])} use --partial")
        cache.mkdir(parents=True, exist_ok=True)
        part = whole.with_suffix(".part")
        with open(part, "ab") as stream, ThreadPoolExecutor() as pool:
            done = stream.tell() // length
            stream.truncate(done * length)
            for start in tqdm(range(done, len(paths), 64), "decode", unit="image", unit_scale=64):
                block = paths[start:start + 64]
                stream.writelines(pool.map(lambda path: decode(path, size, channels), block))
        os.replace(part, whole)
    # Of several processes the first decodes, and the others wait.
    while not whole.exists():
        time.sleep(1)
    require(whole.stat().st_size == len(paths) * length, f"{whole} is damaged; delete it")
    return np.memmap(whole, np.uint8, "r", shape=(len(paths), channels, size, size))


def choose_labelled(data, labels, seed):
    """Choose the labelled training images. The others count as unlabelled.

    labels  fraction of each class if < 1; number of images if >= 1; "all"; or the path of a file
            with one image name a line
    seed    int, of the random sample
    Returns int64 indices, ascending. Raises UserError if a number or a file does not match.

    [ACPL] From each class the given fraction of its images, "No Finding" counted as one class; the
    union of these. A fraction of all images could miss rare classes. [our choice] Rounded to the
    nearest number, at least one. A number of images is met exactly, in nearly the same proportions.
    """
    pool = data.train[data.known[data.train]]
    if labels != "all" and isinstance(labels, (str, os.PathLike)):
        wanted, names = set(read_lines(labels)), [data.names[index] for index in pool]
        other = sorted(wanted.difference(names))
        require(wanted and not other, f"--labels {labels}: no labelled training image {other[:1]}")
        return np.sort(pool[[name in wanted for name in names]])
    random, threshold = np.random.RandomState(seed), np.ones(len(pool))
    positive = data.targets[pool] == 1
    # Without a positive target: "No Finding". Multi-class data has no such images.
    for column in [*positive.T, ~positive.any(1)]:
        members = random.permutation(np.flatnonzero(column))
        # The fraction of the class from which on an image is chosen; 0 for the first image.
        fractions = (np.arange(len(members)) + 0.5) / len(members)
        fractions[:1] = 0
        threshold[members] = np.minimum(threshold[members], fractions)
    count, least = len(pool) if labels == "all" else labels, max(1, (threshold == 0).sum())
    if 0 < count < 1:
        count = (threshold <= count).sum()
    require(count % 1 == 0 and least <= count <= len(pool), f"--labels {labels} is not from "
            f"{least}, one of each class, to {len(pool)}, all labelled images")
    return np.sort(pool[np.argsort(threshold, kind="stable")[:int(count)]])


# ---- 10. Runs and checkpoints [plumbing] ---------------------------------------------------------

class Run:
    """A stage in its output folder: settings, checkpoint, log, bar, learning rate, seeds.

    data, args  as for the stage          images_per_epoch  int
    labelled    int64 indices, stage 2    state             modules, optimizer and tensors to save
    Prints the settings. If the folder has a checkpoint with the same settings, loads it into state;
    epochs_done counts its epochs. Raises UserError if the settings differ.
    """

    def __init__(self, data, args, images_per_epoch, labelled=(), **state):
        require(images_per_epoch, f"{len(data.train)} training images: --batch must not be larger")
        self.args, self.state, self.images, self.history = args, state, images_per_epoch, []
        self.path = output_folder(data, args) / f"{args.stage}.pt"
        # Plain values, whatever a notebook gave.
        plain = json.loads(json.dumps(vars(args), default=str))
        # The others do not change the result, or a checksum covers them.
        others = {*DEFAULTS, "start", "given", "files"} - {"seed", "amp"}
        settings = {name: value for name, value in plain.items() if name not in others}
        # The first weights: another stage 1 is another run of stage 2.
        weights = [weight.detach().cpu() for weight in state["student"].parameters()]
        settings |= dict(data=checksum_of(data), labelled=checksum(np.int64(labelled)),
                         first_weights=checksum(*weights))
        self.constant = dict(stage=args.stage, args=plain, settings=settings, classes=data.classes,
                             channels=data.images.shape[1], multilabel=data.multilabel)
        if args.fresh:
            self.path.unlink(missing_ok=True)
        if self.path.exists():
            saved = load_checkpoint(self.path, args.stage)
            differ = [f"{name} {saved['settings'].get(name)} there and {value} here"
                      for name, value in settings.items() if saved["settings"].get(name) != value]
            require(not differ, f"{self.path} differs, use --fresh or --out: {'; '.join(differ)}")
            for name, value in state.items():
                load = value.copy_ if isinstance(value, torch.Tensor) else value.load_state_dict
                load(saved["state"][name])
            self.history = saved["history"]
            # The newest checkpoint is that of the last command, also if nothing is left to do.
            self.path.touch()
        self.epochs_done = done = len(self.history)
        status = "finished" if done == args.epochs else f"{done} epochs done"
        print(f"\n{self.path}, start {args.start}, {status}: {settings}".replace("'", ""))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.bar = tqdm(total=args.epochs * self.images, initial=done * self.images, unit="image",
                        desc=args.stage, unit_scale=True, mininterval=0.5,
                        disable=RANK > 0 or done == args.epochs)

    def start_epoch(self, epoch):
        """Seed torch, so that a resumed run equals an uninterrupted one; set the learning rate."""
        seed_torch(self.args.seed, self.args.stage, epoch, RANK)
        for group in self.state["optimizer"].param_groups:
            group["lr"] = learning_rate(self.args, epoch)
        self.losses, self.start = [], time.perf_counter()

    def step(self, loss, images):
        """Count a step. The loss is read only when the bar is drawn: reading waits for a GPU."""
        self.losses.append(loss.detach())
        if self.bar.update(images):
            self.bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)

    def finish_epoch(self):
        """Write log and checkpoint. Raises UserError if the loss or a weight is not finite."""
        epoch, stage, seconds = len(self.history), self.args.stage, time.perf_counter() - self.start
        loss = all_gather(torch.stack(self.losses).mean()[None]).mean().item()
        # The sum of squares: weights that are finite but huge give outputs that are not.
        squares = [weight.square().sum() for weight in self.state["student"].parameters()]
        require(math.isfinite(loss) and torch.stack(squares).isfinite().all(),
                f"epoch {epoch + 1}: the loss or a weight is not finite; use a smaller --lr")
        lr, speed = self.state["optimizer"].param_groups[0]["lr"], self.images / seconds
        self.history.append(dict(stage=stage, epoch=epoch, loss=loss, lr=lr, seconds=seconds,
                                 images_per_second=speed))
        self.bar.write(f"{stage} epoch {epoch + 1}/{self.args.epochs}: loss {loss:.4f}, "
                       f"learning rate {lr:.2g}, {speed:.0f} images/s")
        # The log before the checkpoint: a run that is killed between them writes this line again.
        log = self.path.with_name("log.jsonl")
        lines = [json.loads(line) for line in read_lines(log)] if log.exists() else []
        lines = [line for line in lines if line["stage"] != stage] + self.history
        write_file(log, "".join(f"{json.dumps(line)}\n" for line in lines))
        state = {name: value if isinstance(value, torch.Tensor) else value.state_dict()
                 for name, value in self.state.items()}
        checkpoint = io.BytesIO()
        torch.save(self.constant | dict(history=self.history, state=state), checkpoint)
        write_file(self.path, checkpoint.getvalue())
        if epoch + 1 == self.args.epochs:
            self.bar.close()


def learning_rate(args, epoch):
    """[authors' code] Learning rate of an epoch, 0 <= epoch < args.epochs.

    "cosine" decreases towards 0. "steps" divides by 10 at 1/2 and again at 5/6 of the epochs.
    """
    progress = epoch / args.epochs
    if args.schedule == "cosine":
        return args.lr * (1 + math.cos(math.pi * progress)) / 2
    return args.lr * 0.1 ** ((progress >= 1 / 2) + (progress >= 5 / 6))


def batches(indices, steps, batch, args, epoch):
    """int64 [steps, batch]: the indices in random order, repeated if there are not enough.

    No indices give empty batches. With several processes: this process's part of each batch.
    """
    random = np.random.RandomState([args.seed, epoch])
    repeats = math.ceil(steps * batch / max(1, len(indices)))
    order = np.concatenate([random.permutation(indices) for _ in range(repeats)])
    return order[:steps * batch].reshape(steps, PROCESSES, -1)[:, RANK]


def seed_torch(*parts):
    """Seed torch's generator with a hash of the parts."""
    torch.manual_seed(zlib.crc32(repr(parts).encode()))


def checksum(*arrays):
    """CRC-32 of the bytes of arrays."""
    return zlib.crc32(b"".join(np.asarray(array).tobytes() for array in arrays))


def checksum_of(data):
    """Checksum of names, targets, split and some images."""
    names = str([data.classes, data.names, data.images.shape, len(data.train)])
    some = data.images[::len(data.images) // 16 + 1]
    return checksum(names, data.targets, data.train, data.test, some)


def save_views(data, args):
    """views.png: a row for each of 8 training images, one query view and M key views."""
    seed_torch(args.seed, "views")
    images = torch.from_numpy(data.images[data.train[:8]]).repeat_interleave(1 + args.keys, 0)
    views = random_views(images, args.augment, args.size)
    views, png = F.interpolate(views, scale_factor=math.ceil(96 / args.size)), io.BytesIO()
    torchvision.utils.save_image(views, png, "png", nrow=1 + args.keys, normalize=True)
    write_file(output_folder(data, args) / "views.png", png.getvalue())


def output_folder(data, args):
    """Path of the folder for results."""
    return Path(args.out or f"runs/{data.name}")


def write_file(path, content):
    """Write text or bytes and rename: path is the old file or the new one, never half of it."""
    if RANK == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)


def load_checkpoint(path, *stages):
    """The checkpoint of one of the stages, on the CPU. Raises UserError if it is not one."""
    try:
        # weights_only admits tensors and plain values. Other pickles could run code.
        saved = torch.load(path, map_location="cpu", weights_only=True)
        stage = saved["stage"]
    except Exception as error:
        raise UserError(f"{path} is not a readable checkpoint ({type(error).__name__})")
    require(stage in stages, f"{path} is a checkpoint of {stage}, not of {stages[0]}")
    return saved


def load_networks(args, channels, classes):
    """Student and teacher for stage 2, with the weights of args.start, on args.device.

    args.start  path of a checkpoint, "scratch" or "imagenet"
    From a checkpoint of stage 1 both networks have one new, identical classifier. Raises UserError
    if the checkpoint has another architecture or another number of channels.
    """
    student = build_network(args.arch, channels, classes, imagenet=args.start == "imagenet")
    teacher, new = make_teacher(student), student.classifier.state_dict(prefix="classifier.")
    if args.start not in ("scratch", "imagenet"):
        saved = load_checkpoint(args.start, "pretrain", "finetune")
        there, here = (saved["args"]["arch"], saved["channels"]), (args.arch, channels)
        require(there == here, f"{args.start} has network and channels {there}, not {here}")
        if len(saved["history"]) < saved["args"]["epochs"]:
            print(f"warning: {args.start} is not finished")
        for network, name in ((student, "student"), (teacher, "teacher")):
            kept = {key: value for key, value in saved["state"][name].items()
                    if "classifier" not in key or saved["stage"] == "finetune"}
            network.load_state_dict(new | kept)
    device = choose_device(args.device)
    return student.to(device), teacher.to(device)


# ---- 11. Devices and processes [plumbing] --------------------------------------------------------

# torchrun starts this program once for each GPU. Each process holds the same networks and the same
# queue, and takes its part of each batch. For one process the first two functions do nothing.
RANK, PROCESSES = 0, 1
if "TORCHELASTIC_RUN_ID" in os.environ:
    RANK, PROCESSES = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def synchronise(network):
    """BatchNorm with the statistics of all processes. PyTorch has it for GPUs only: on CPUs each
    process normalises with its part of the batch."""
    common = PROCESSES > 1 and next(network.parameters()).is_cuda
    return nn.SyncBatchNorm.convert_sync_batchnorm(network) if common else network


def all_gather(tensor):
    """The tensors [N, ...] of all processes, one after another."""
    if PROCESSES == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(PROCESSES)]
    distributed.all_gather(parts, tensor)
    return torch.cat(parts)


def choose_device(name):
    """The torch.device for auto, cpu, cuda, cuda:1 or mps. Raises UserError if it is not there."""
    # Each process of torchrun has its own GPU.
    cuda = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    name = dict(auto=cuda if torch.cuda.is_available() else "cpu", cuda=cuda).get(name, name)
    try:
        device = torch.zeros(1, device=name).device
    except Exception as error:
        raise UserError(f"--device {name} is not there ({str(error).splitlines()[0]})")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def mixed_precision(device, amp):
    """A context in which networks compute in bfloat16, on GPUs that have it and if amp is set."""
    amp = amp and device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=amp)


def keep_memory():
    """Linux: keep freed memory for the next step. It saves filling new memory with zeros."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        # -3: M_MMAP_THRESHOLD, older versions refuse more than 32 MB. -1: M_TRIM_THRESHOLD.
        mallopt(-3, 2**27) or mallopt(-3, 2**25)
        mallopt(-1, -1)


# ---- 12. Command line [plumbing] -----------------------------------------------------------------

# Settings that are not in the tables. LOWEST is 0 and HIGHEST no limit unless named.
DEFAULTS = dict(data="digits", root=None, cache=None, partial=False, uncertain="zeros", out=None,
                fresh=False, device="auto", amp=True, seed=0)
LOWEST = dict(batch=2, size=16, epochs=1, seeds=2, keys=1, queue=1, dim=1, temperature=1e-3,
              ramp=1e-3)
HIGHEST = dict(teacher_momentum=1, beta1=0.9999, beta2=0.9999, crop=0.99, centre=0.99,
               seed=2**32 - 1)
WORDS = dict(arch=("densenet121", "tiny"), init=("imagenet", "random"),
             schedule=("cosine", "steps"), uncertain=("zeros", "ones", "ignore"))


def file_or_number(text):
    """A type for argparse: "all", a file, a fraction below 1, or a number of images."""
    return text if text == "all" or os.path.isfile(text) else float(text)


def parse_args(argv=None):
    """Parse a command line, sys.argv[1:] if None. Returns a Namespace. Raises UserError.

    COMMAND      pretrain, finetune, evaluate, predict or ablate
    FILES        predict: a folder or image files; evaluate: a finetune.pt (the newest in runs/*/)

    data and run; in brackets the default:
      --data       digits, cxr14, chexpert, isic2018, a folder, or an .npz file (digits)
      --root       folder of cxr14, chexpert or isic2018 (data/NAME)
      --cache      folder for decoded images (the folder of the data)
      --partial    use only the image files that are there
      --uncertain  -1 of CheXpert: zeros, ones or ignore (zeros)
      --out        folder for results (of the checkpoint; if there is none runs/NAME, for ablate
                   runs/NAME/ablation); predict: CSV file (predicted.csv)
      --fresh      start over
      --from       finetune: a pretrain.pt, scratch or imagenet; predict, evaluate: a finetune.pt
                   (the newest in runs/*/, with --data NAME in runs/NAME/)
      --device     auto, cpu, cuda, cuda:1 or mps (auto: cuda, else cpu)
      --amp        bfloat16 on GPUs; --no-amp: not (on)
      --seed       of all random numbers, not of the split (0)
      --seeds      ablate: runs of each row (3)

    The other options are settings. Below are their defaults in stage 1; stage 2 (-: no row there),
    for cxr14, chexpert, isic2018, digits and small, or for all. Comments in the file explain each.
    """
    # --help prints the text above.
    text = parse_args.__doc__.partition("UserError.")[2]
    parser = argparse.ArgumentParser(
        "s2mts2.py", "python %(prog)s COMMAND [options] [FILES]", text, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    # Its errors, one line each, are UserErrors too.
    parser.error = lambda message: require(False, f"{message}; see python s2mts2.py --help")
    parser.add_argument("stage", metavar="COMMAND",
                        choices=["pretrain", "finetune", "evaluate", "predict", "ablate"])
    parser.add_argument("files", metavar="FILES", nargs="*")
    parser.add_argument("--from", dest="start", help=argparse.SUPPRESS)
    for name, row in (DEFAULTS | dict(seeds=3) | PRETRAIN | FINETUNE).items():
        option, value = "--" + name.replace("_", "-"), row[0] if isinstance(row, tuple) else row
        shown = "; ".join(str(table.get(name, "-")) for table in (PRETRAIN, FINETUNE))
        shown = argparse.SUPPRESS if shown == "-; -" else shown
        kind = dict(labels=file_or_number, root=str, cache=str, out=str).get(name, type(value))
        if kind is bool:
            parser.add_argument(option, action=argparse.BooleanOptionalAction, help=shown)
        else:
            parser.add_argument(option, type=kind, choices=WORDS.get(name), help=shown)
    given = vars(parser.parse_intermixed_args(argv))
    stage, files = given.pop("stage"), given.pop("files", [])
    if stage == "evaluate" and files:
        given["start"] = files.pop()
    for name, value in given.items():
        lowest, highest = LOWEST.get(name, 0), HIGHEST.get(name, sys.float_info.max)
        require(not isinstance(value, (int, float)) or lowest <= value <= highest,
                f"--{name.replace('_', '-')} {value} is out of range")
    require("start" not in given or stage not in ("pretrain", "ablate"), f"{stage} has no --from")
    require("seed" not in given or stage != "ablate", "ablate has no --seed; use --seeds")
    args = settings_of(stage, given)
    unread = sorted(given.keys() - {*vars(args), *args.augment}) + files * (stage != "predict")
    require(not unread, f"{stage} does not read {unread}")
    return argparse.Namespace(**vars(args) | dict(files=files))


def settings_of(stage, given):
    """All settings of a command: the given ones, else of the checkpoint, else of the recipe."""
    require(PROCESSES == 1 or stage == "pretrain", f"{stage} runs in one process, without torchrun")
    start, saved = given.get("start"), {}
    if stage not in ("pretrain", "ablate") and start not in ("scratch", "imagenet"):
        wanted = "pretrain" if stage == "finetune" else "finetune"
        pattern = f"runs/{title_of(given['data']) if 'data' in given else '*'}/{wanted}.pt"
        newest = max(Path().glob(pattern), key=os.path.getmtime, default=None)
        start = str(start or newest or "")
        require(start, f"no {pattern}; first run python s2mts2.py {wanted}, or use --from")
        saved = load_checkpoint(start, wanted)["args"]
        out = "predicted.csv" if stage == "predict" else str(Path(start).parent)
        if stage != "finetune":
            read = {"start", "data", "device", "out"}
            unread = given.keys() - (read if stage == "predict" else {*read, "root", "cache"})
            require(not unread, f"{stage} does not read {sorted(unread)}")
            saved |= dict(device="auto", out=out) | given
            return argparse.Namespace(**saved | dict(stage=stage, start=start))
        # Another data set takes the network only. A size is taken over if it was given.
        same = Path(given.get("data", saved["data"])).resolve() == Path(saved["data"]).resolve()
        taken = ("data", "root", "cache", "partial", "uncertain", "size") if same else ()
        saved = {name: saved["given"][name] for name in taken if name in saved["given"]} | dict(
            arch=saved["arch"], out=out if same else None)
    known = DEFAULTS | saved | given
    data = known["data"]
    small = data not in RECIPES or known.get("arch") == "tiny" and data != "digits"
    column = RECIPES.index("small" if small else data)
    tables = dict(pretrain=PRETRAIN, ablate=dict(seeds=3) | FINETUNE | PRETRAIN)
    rows = DEFAULTS | PLAIN | dict(arch=PRETRAIN["arch"]) | tables.get(stage, FINETUNE)
    if stage == "finetune" and data in RECIPES:
        rows["labels"] = FINETUNE["labels"][RECIPES.index(data)]
    values = {name: known.get(name, row[column] if isinstance(row, tuple) else row)
              for name, row in rows.items()}
    values["augment"] = {name: values.pop(name) for name in PLAIN}
    args = argparse.Namespace(**values | dict(stage=stage, start=start, given=given))
    require(args.batch % PROCESSES == 0, f"--batch must be a multiple of {PROCESSES} processes")
    require(args.arch == "tiny" or args.size >= 32, "densenet121 needs --size 32 or more")
    require(3 * args.augment["blur"] <= args.size - 1, "--blur must be below a third of --size")
    require(args.arch != "tiny" or "imagenet" not in (given.get("init"), start),
            "tiny has no ImageNet weights; use --arch densenet121")
    for name, sets in dict(root=RECIPES[:3], partial=RECIPES[:3], uncertain=["chexpert"]).items():
        require(name not in given or data in sets, f"--{name} is only for {', '.join(sets)}")
    return args


def retest(data, args):
    """Test the networks of the checkpoint args.start again. Raises UserError for other data."""
    saved = load_checkpoint(args.start, "finetune")
    require(saved["settings"]["data"] == checksum_of(data), f"{args.start} is of other data")
    return report(*load_networks(args, saved["channels"], len(data.classes)), data, args)


def predict(args):
    """Write the teacher's probabilities for image files to the CSV file args.out.

    Network, size, channels and classes are the checkpoint's. Raises UserError at the end if images
    are broken; the others are in the file.
    """
    saved, scores = load_checkpoint(args.start, "finetune"), {}
    _, teacher = load_networks(args, saved["channels"], len(saved["classes"]))
    paths = dict(zip(args.files, args.files))
    if len(args.files) == 1 and os.path.isdir(args.files[0]):
        paths = {name: f"{args.files[0]}/{name}" for name in image_files(args.files[0])}
    require(paths, "predict needs a folder or image files")
    for name, path in tqdm(paths.items(), "predict", unit="image"):
        try:
            image = torch.from_numpy(decode(path, args.size, saved["channels"])[None])
            scores[name] = predict_batch(teacher, image, args.size, saved["multilabel"])[0]
        except UserError as error:
            tqdm.write(str(error))
    write_predictions(Path(args.out), saved["classes"], scores, scores.values())
    print(f"written to {args.out}: {len(scores):,} images, with {args.start}")
    require(len(scores) == len(paths), f"{len(paths) - len(scores)} images are broken, named above")


def data_for(args):
    """The Data of args."""
    return load_data(args.data, args.root, args.size, args.cache, args.uncertain, args.partial)


def main(argv=None):
    """Run a command. Returns its exit status: 0, 2 if the user can fix it, 130 on Ctrl-C."""
    try:
        args = parse_args(argv)
        # TF32 on GPUs: faster, and exact enough for training.
        torch.set_float32_matmul_precision("high")
        keep_memory()
        if PROCESSES > 1:
            backend = "nccl" if choose_device(args.device).type == "cuda" else "gloo"
            distributed.init_process_group(backend)
            sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")
        commands = dict(pretrain=pretrain, finetune=finetune, evaluate=retest, predict=predict,
                        ablate=ablate)
        data = [] if args.stage in ("predict", "ablate") else [data_for(args)]
        commands[args.stage](*data, args)
        return 0
    except KeyboardInterrupt:
        print("\nstopped; to resume, run the same command without --fresh", file=sys.stderr)
        return 130
    except (UserError, OSError, RuntimeError) as error:
        text = " ".join(str(error).split())
        # Of torch's own errors the user can fix too little memory.
        if isinstance(error, RuntimeError) and "memory" not in text:
            raise
        # The cursor may stand behind a progress bar.
        print("\nerror:", text, file=sys.stderr)
        return 2
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
