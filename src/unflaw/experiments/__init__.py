"""Experiments: grids of training and evaluation runs, and the tables made of them.

`unflaw benchmark` and `unflaw ablate` are one thing: `grid.plan` makes a list of runs, `run.run_experiment` does those
that are left, and `tables.write_tables` writes the results.

| file | content |
|---|---|
| `grid.py` | `Grid` (from YAML and options), `Run` (one cell of the grid and one seed), `plan` |
| `variants.py` | `Variant`, a method with changed settings: named ones and those that a user writes |
| `run.py` | `run_experiment`, `measure`: training, evaluation and costs of one run |
| `processes.py` | `ChildProcess`, which does tasks in a process of its own |
| `records.py` | `Record` of a finished run, and `Log`, the file that an interrupted experiment goes on from |
| `tables.py` | one pandas DataFrame of all results, written as Markdown, CSV, JSON and LaTeX |
| `page.py` | the same as an HTML page with sortable tables |
| `feature_store.py`, `disk_cache.py` | raw features shared between runs, in files below a total size |
| `per_category.py` | `unflaw fleet`: a detector for each category in a folder |
"""
