"""`make moe`: PC-MoE beside its baselines, as a Flower job: quality, memory, traffic, speed, and whether it is exact.

`settings` says what is compared; `texts` and `choices` are the data; `methods` train; a `cells` entry is one method on
one dealing with one seed, and a message to a node; `measures` looks at one step very closely; `job` sends the cells and
writes `result.json`; `page` shows it.
"""
