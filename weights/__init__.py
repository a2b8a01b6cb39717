"""Published checkpoints: from a name in the manifest to a model folder that the pipeline loads.

`manifest.json` says what there is. `python -m weights` fetches, checks, converts and removes it. `weights/embedded` is
a model folder that ships with the code and needs none of this.
"""
