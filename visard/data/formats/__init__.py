"""The kinds of files that hold crops, one module a kind; `visard.data.dataset.open_dataset` chooses among them."""
