"""Compute again what README says of our runs on TissueMNIST and no stage writes.

    python tests/reference.py seeds DATA   all seeds' networks, and that of raw pixels, on seed 0's
                                           test images
    python tests/reference.py search DATA  the search's best and the poster's hyperparameters, each
                                           trained on the search's images to its last rung

DATA is tissuemnist or a file of the same images. The search's images are those of our run only in
our own file: from MedMNIST's, which has 86 more, `search` draws others.
"""

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data
import metrics
import model
import reproduce

RUN = reproduce.REFERENCE / "tissuemnist"


def seeds(images):
    """Print the figures and AUCs of our networks on the images that seed 0's predictions name."""
    test = metrics.read_predictions(RUN / "test" / "predictions.csv")
    rows = {name: row for row, name in enumerate(data.ids(images.images))}
    if missing := {*test.ids} - {*rows}:
        raise data.DataError(f"{images.source} lacks {len(missing):,} of our test images")
    raw = images.images[[rows[name] for name in test.ids]]
    pixels = {"raw": raw, "stretched": data.stretch(raw)}

    def measure(folder):
        network = model.load_network(folder / "train" / "model.pt")
        logits = model.predict(network, pixels[network.pixels]).numpy()
        figures = metrics.summary(test.labels, logits.argmax(1), images.num_classes)
        areas = [curve.auc for curve in metrics.roc_curves(test.labels, logits)]
        return [*figures.values(), *areas, np.mean(areas)]

    found = [measure(folder) for folder in (RUN, *sorted(RUN.glob("seed-*")))]
    poster = metrics.read_column(reproduce.POSTER / "table.csv", "value")
    areas = metrics.read_column(reproduce.POSTER / "auc.csv", "auc")
    poster += [*areas, np.mean(areas)]
    table = {f"seed {seed}": row for seed, row in enumerate(found)}
    table |= {"mean": np.mean(found, 0), "std": np.std(found, 0, ddof=1), "poster": poster}
    table["largest"] = np.abs(np.subtract(found, poster)).max(0)
    table["raw"] = measure(RUN.with_name("tissuemnist-raw"))
    print("         accur. F1     recall precis. AUC of class 0, 1, ...", "mean".rjust(42))
    for name, row in table.items():
        print(f"{name:<8}", *(f"{value:.4f}" for value in row))
    print("largest: the largest difference of a seed from the poster; raw: seed 0 on raw pixels")


def search(images):
    """Print the validation loss and accuracy of both trainings, done as `reproduce.tune` does."""
    record = json.loads((RUN / "tune" / "run.json").read_bytes())
    if images.md5 != record["data"]["md5"]:
        print(f"NOTE: {images.source} is not our file: other images than our search's")
    best = json.loads((RUN / "tune" / "best.json").read_bytes())
    options = {name: record["settings"][name] for name in ("seed", "precision")}
    split = data.poster_split(images.images, record["data"]["split_seed"])
    split = data.tuning_split(split, reproduce.TUNING_IMAGES, options["seed"])
    arrays = []
    for index in (split.train, split.valid):
        arrays += [data.stretch(images.images[index]), images.labels[index]]
    print(f"{'best.json':<12} loss {best['loss']:.4f}")
    hyperparameters = {"again": best["hyperparameters"], "the poster's": asdict(model.POSTER)}
    for name, values in hyperparameters.items():
        h = replace(model.Hyperparameters(**values), epochs=best["resource"])
        with model.one_thread():
            network = model.build(reproduce.network_config(record["data"], h), options["seed"])
            last = model.fit(network, *arrays, h, compile="off", **options)[-1]
        print(f"{name:<12} loss {last.valid_loss:.4f}, accuracy {last.valid_accuracy:.4f}")


def parse(argv):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("seeds", "search"))
    parser.add_argument("data", metavar="DATA", help="tissuemnist, or a file of the same images")
    return parser.parse_args(argv)


def main():
    options = parse(None)
    try:
        {"seeds": seeds, "search": search}[options.what](data.load(options.data))
    except reproduce.ERRORS as error:
        print(f"reference.py: error: {metrics.describe(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
