"""Notebooks and recorded results travel in the package, so that it works without a clone."""

from setuptools import find_packages, setup

SHIPPED = {"labkit.shipped.notebooks": "notebooks", "labkit.shipped.results": "benchmarks/results"}
setup(packages=[*find_packages(include=["labkit*"]), *SHIPPED], package_dir=SHIPPED)
