"""Draw README's picture: python .github/draw.py, with matplotlib, from the .json files here."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

HERE = Path(__file__).parent
ROWS = {
    "scratch + supervised": ("labels only", "tab:gray", "-"),
    "scratch + mean teacher": ("mean teacher", "tab:blue", "-"),
    "jcl + mean teacher": ("S2MTS2", "tab:red", "-"),
    "jcl + probe": ("probe of stage 1", "tab:orange", "--"),
    "LabelSpreading": ("LabelSpreading on pixels", "black", ":"),
}
figure, panels = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
for panel, name, metric in zip(panels, ("digits", "xray"), ("accuracy", "mean_auc"), strict=True):
    table = json.loads((HERE / f"{name}.json").read_text())
    for labels, rows in json.loads((HERE / f"{name}-pixels.json").read_text()).items():
        table[labels] |= rows
    places = [1437 if labels == "all" else int(labels) for labels in table]
    for row, (label, colour, line) in ROWS.items():
        values = np.array([rows[row][metric] for rows in table.values()])
        panel.errorbar(places, values.mean(1), values.std(1, ddof=1), color=colour, ls=line,
                       label=label, marker="o", ms=3, capsize=2)  # fmt: skip
    panel.set(xscale="log", xlabel="labelled images", xticks=places, xticklabels=list(table))
    panel.minorticks_off()
    panel.set_title(dict(digits="digits: accuracy", xray="chest X-rays: mean AUC")[name])
panels[0].legend(frameon=False, fontsize=9)
figure.savefig(HERE / "results.png", dpi=150)
