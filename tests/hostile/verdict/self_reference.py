"""A result that contains itself."""
# ruff: noqa


def attack():
    result = {"a": []}
    result["a"].append(result)
    return result
