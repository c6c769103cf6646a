"""Draw README's picture: python .github/draw.py, with matplotlib, from the .json files here."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
ROWS = {
    "scratch + supervised": dict(label="labels only", color="gray"),
    "scratch + mean teacher": dict(label="mean teacher", color="tab:blue"),
    "jcl + mean teacher": dict(label="S2MTS2", color="tab:red"),
    "jcl + probe": dict(label="probe of stage 1", color="tab:orange", ls="--"),
    "LabelSpreading": dict(label="LabelSpreading on pixels", color="black", ls=":"),
}
figure, panels = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
for panel, name, metric in zip(panels, ("digits", "xray"), ("accuracy", "mean_auc"), strict=True):
    table = json.loads((HERE / f"{name}.json").read_text())
    pixels = json.loads((HERE / f"{name}-pixels.json").read_text())
    places = [1437 if labels == "all" else int(labels) for labels in table]
    for row, look in ROWS.items():
        values = np.array([(table[x] | pixels[x])[row][metric] for x in table])
        panel.errorbar(places, values.mean(1), values.std(1, ddof=1), marker=".", capsize=2, **look)
    panel.set(xscale="log", xticks=places, xticklabels=list(table))
    panel.minorticks_off()
    panel.set_xlabel("labelled images; bars: standard deviation of seeds")
    panel.set_title(dict(digits="digits: accuracy", xray="chest X-rays: mean AUC")[name])
panels[0].legend(frameon=False, fontsize=9)
figure.savefig(HERE / "results.png", dpi=150)
