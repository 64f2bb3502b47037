"""Crops on disk -> batches: open a data set, sample it, load it.

`open_dataset(source)` -> `FaceDataset`; `EpochSampler` says which images make up a step; `Loader` yields
`records.Batch`; `DatasetWriter` writes what `open_dataset` reads fastest.
"""
