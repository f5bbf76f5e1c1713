"""Climbs out of the scratch folder."""
# ruff: noqa


def attack():
    with open("../" * 20 + FACTS["folder"].lstrip("/") + "/escaped", "w") as file:
        file.write("escaped")
    return FACTS["won"]
