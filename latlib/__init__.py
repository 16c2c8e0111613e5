"""latlib: latent adversarial training, its attacks and its audit, for the notebooks of this
repository.

The package is thin on purpose: the notebooks tell the story, latlib holds the code whose speed or
correctness matters. Follow a perturbation: `attack` makes it, `hooks` carries it into the model,
`losses` judge it, `train` hardens against it, `evaluate` counts what it did, `report` shows it."""

__version__ = "0.2.0"
