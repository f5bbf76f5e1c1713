"""Lets libraries start processes."""
# ruff: noqa

import multiprocessing, concurrent.futures


def attack():
    with concurrent.futures.ProcessPoolExecutor(8) as pool:
        return list(pool.map(pow, range(8), range(8)))
