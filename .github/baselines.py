"""LabelSpreading and logistic regression on the pixels, with the labels that ablate uses.

python .github/baselines.py digits 10 20 50 100 300 all > .github/digits-pixels.json
"""

import json
import sys
from pathlib import Path

import numpy as np
from sklearn import linear_model, semi_supervised

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import s2mts2  # noqa: E402

sys.stdout, out = sys.stderr, sys.stdout
table, data = {}, s2mts2.load_data(sys.argv[1])
pixels, truth = data.images.reshape(len(data.names), -1) / 255, data.targets.argmax(1)
for labels in map(s2mts2.file_or_number, sys.argv[2:]):
    for seed in range(5):
        chosen = s2mts2.choose_labelled(data, labels, seed)
        known = np.where(np.isin(data.train, chosen), truth[data.train], -1)
        models = {
            # 20 neighbours: the best of 3 to 20 on the training images of digits, with 10 labels.
            "LabelSpreading": semi_supervised.LabelSpreading(
                "knn", n_neighbors=20, max_iter=200
            ).fit(pixels[data.train], known),
            "logistic regression": linear_model.LogisticRegression(max_iter=1000).fit(
                pixels[chosen], truth[chosen]
            ),
        }
        for row, model in models.items():
            scores = np.nan_to_num(model.predict_proba(pixels[data.test]))
            result = s2mts2.classification_metrics(
                data.targets[data.test], scores, data.classes, False
            )
            for metric in result.keys() - {"auc"}:
                values = table.setdefault(str(labels), {}).setdefault(row, {})
                values.setdefault(metric, []).append(result[metric])
json.dump(table, out, indent=1)
