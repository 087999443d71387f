"""Experiments: whole federated runs of real models, beside each site alone and all data in one place.

Run them as ``python -m benchmarks.experiments``; each keeps what it has trained in its folder and goes on from
there.
"""
